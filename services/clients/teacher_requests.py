"""How the sequences of a call are cut into requests that a teacher server takes."""

from typing import Any

# Ids and characters of one request: a body of some MiB, of which servers take 64.
_IDS_PER_REQUEST = 1 << 21


def cut_sequences(sequences: list[dict[str, Any]], max_rows: int) -> list[list[int]]:
    """Indices of the sequences of each request, rising.

    Args:
        max_rows: completion tokens of a request, about; a longer sequence stands alone.
    """
    num_rows = [_estimated_rows(sequence) for sequence in sequences]
    num_ids = [_num_ids(sequence) for sequence in sequences]
    return [
        list(range(part.start + piece.start, part.start + piece.stop))
        for part in cut_by_rows(num_rows, max_rows)
        for piece in cut_by_rows(num_ids[part], _IDS_PER_REQUEST)
    ]


def fair_share(sequences: list[dict[str, Any]], num_servers: int) -> int:
    """Rows of each server's part of the work."""
    return -(-sum(map(_estimated_rows, sequences)) // num_servers)


def cut_by_rows(num_rows: list[int], limit: int) -> list[slice]:
    """Consecutive slices of sequences with at most `limit` rows each; a longer sequence stands alone."""
    slices, start, rows = [], 0, 0
    for index, count in enumerate(num_rows):
        if index > start and rows + count > limit:
            slices.append(slice(start, index))
            start, rows = index, 0
        rows += count
    return [*slices, slice(start, len(num_rows))]


def _estimated_rows(sequence: dict[str, Any]) -> int:
    if (token_ids := sequence.get("token_ids")) is not None:
        return max(1, len(token_ids) - (sequence.get("prompt_length") or 0))
    return max(1, _num_characters(sequence.get("completion")) or _num_characters((_messages(sequence) or [None])[-1]))


def _num_ids(sequence: dict[str, Any]) -> int:
    """Ids that are sent of a sequence, support_ids among them; of a text its characters."""
    ids = len(sequence.get("token_ids") or []) + sum(map(len, sequence.get("support_ids") or []))
    texts = (sequence.get("prompt"), sequence.get("completion"), *_messages(sequence))
    return ids + sum(map(_num_characters, texts))


def _messages(sequence: dict[str, Any]) -> list[Any]:
    messages = sequence.get("messages")
    return messages if isinstance(messages, list) else []


def _num_characters(part: Any) -> int:
    """Of a text, or of a message."""
    text = part.get("content") if isinstance(part, dict) else part
    return len(text) if isinstance(text, str) else 0
