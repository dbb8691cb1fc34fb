"""What callers hand to the Python clients, as what JSON can spell; the rest is refused before anything is sent.

Token ids may be lists, numpy arrays or torch tensors, their items plain or numpy integers; neither library is imported.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from services.errors import InputError


def integer(field: str, value: Any, *, at_least: int | None = None) -> int:
    """`value` as an int.

    Args:
        field: what the error calls it.

    Raises:
        InputError: it is no whole number (true and 3.0 are none), or below `at_least`.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not hasattr(plain, "__index__"):
        raise InputError(f"{field} = {_shown(value)} must be a whole number; pass an int")
    number = int(plain.__index__())
    if at_least is not None and number < at_least:
        raise InputError(f"{field} = {number} must be at least {at_least}")
    return number


def real(field: str, value: Any) -> float:
    """`value` as a finite float.

    Raises:
        InputError: it is no number, or not finite.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise InputError(f"{field} = {_shown(value)} must be a finite number; pass a float")
    return float(plain)


def token_ids(field: str, value: Any) -> list[int]:
    """One sequence of ids as a list of ints.

    Raises:
        InputError: names the field of what is no whole number, or says that it is no sequence of them.
    """
    ids = _plain(value)
    if not _is_sequence(ids):
        raise InputError(f"{field} = {_shown(value)} must be a sequence of token ids, such as [1, 2]")
    if all(type(i) is int for i in ids):  # the usual case, and there may be millions
        return list(ids)
    return [integer(f"{field}.{index}", i) for index, i in enumerate(ids)]


def rows_of_ids(field: str, value: Any) -> list[list[int]]:
    """Several sequences of ids, a two-dimensional array among them, as lists of ints.

    Raises:
        InputError: as of `token_ids`.
    """
    rows = _plain(value)
    if not _is_sequence(rows):
        raise InputError(f"{field} = {_shown(value)} must be a list of sequences of token ids, such as [[1, 2], [3]]")
    return [token_ids(f"{field}.{index}", row) for index, row in enumerate(rows)]


def prompts_of_ids(value: Any) -> list[list[int]]:
    """Prompts for a rollout server.

    Raises:
        InputError: there are none, one of them is empty, or as of `token_ids`.
    """
    prompts = rows_of_ids("prompts", value)
    if not prompts:
        raise InputError("prompts is empty; give at least one prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompts.{index} is empty; give at least one token id")
    return prompts


def teacher_sequences(value: Any) -> list[dict[str, Any]]:
    """Sequences for a teacher server, in any of the forms of its API (services.wire.teacher.TeacherSequence).

    Raises:
        InputError: there are none, or names the field of what cannot be sent.
    """
    if not _is_sequence(value) or not value:
        raise InputError(f"sequences = {_shown(value)} must be a list with at least one sequence")
    return [_teacher_sequence(f"sequences.{index}", sequence) for index, sequence in enumerate(value)]


def _teacher_sequence(field: str, sequence: Any) -> dict[str, Any]:
    if not isinstance(sequence, Mapping):
        raise InputError(f"{field} = {_shown(sequence)} must be a dict with token_ids, with prompt or with messages")
    sent = dict(sequence)
    for name, kind in (("token_ids", token_ids), ("prompt_length", integer), ("support_ids", rows_of_ids)):
        if sent.get(name) is not None:
            sent[name] = kind(f"{field}.{name}", sent[name])
    check_spellable(field, {name: part for name, part in sent.items() if name not in ("token_ids", "support_ids")})
    return sent


def check_spellable(field: str, value: Any) -> None:
    """Refuse what JSON in UTF-8 has no words for: half a surrogate pair, NaN, an object of another kind.

    Raises:
        InputError: names the field of it.
    """
    try:
        _check_spellable(field, value)
    except RecursionError as error:
        raise InputError(f"{field} is nested too deeply to be sent") from error


def _check_spellable(field: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{field} holds half a surrogate pair at {error.start}, which is no text") from error
    elif isinstance(value, float):
        real(field, value)
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise InputError(f"{field} has the key {_shown(key)}, JSON knows texts alone; pass str keys")
            _check_spellable(field, key)
            _check_spellable(f"{field}.{key}", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_spellable(f"{field}.{index}", part)
    elif value is not None and not isinstance(value, bool | int):
        raise InputError(f"{field} = {_shown(value)} is a {type(value).__name__}, which JSON cannot spell")


def _plain(value: Any) -> Any:
    """Arrays and their items, numpy's or torch's, as lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
