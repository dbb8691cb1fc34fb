"""Which rows a run reads, and in which order, as a few hexadecimal digits: a run goes on from a checkpoint with the same ones."""

import dataclasses
import json
from array import array
from collections.abc import Iterable, Sequence

import blake3

from trainer.data.prompts import LatePrompts, StreamedPrompts
from trainer.data.rows import Prompt

A_STREAM = "a stream"
"""In the place of the fingerprint of rows of which a longer run has more."""

_DIGEST_BYTES = 16


def fingerprint_of_prompts(prompts: Sequence[Prompt | None] | StreamedPrompts) -> str:
    """Of tokenised prompts: of all that is in them. Of rows that are tokenised later: of their questions and their
    places. Of an IterableDataset, which nobody has read yet: a word that says so."""
    if isinstance(prompts, StreamedPrompts):
        return A_STREAM
    if isinstance(prompts, LatePrompts):
        return prompts.fingerprint()
    return _digest(_spelled(prompt) for prompt in prompts)


def fingerprint_of_texts(windows: Sequence[Sequence[int]]) -> str:
    """Of windows of token ids."""
    return _digest(array("q", [len(window), *window]).tobytes() for window in windows)


def _spelled(prompt: Prompt | None) -> bytes:
    content = None if prompt is None else dataclasses.asdict(prompt)
    return json.dumps(content, sort_keys=True, default=repr).encode() + b"\n"


def _digest(parts: Iterable[bytes]) -> str:
    hasher = blake3.blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest(_DIGEST_BYTES)
