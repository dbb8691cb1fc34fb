"""Scores of a file on disk: safetensors shards and a manifest that says what they are and which are complete.

Both are written beside their place and renamed into it, a shard before the manifest that lists it: whatever ends the
program, every listed shard is whole, and one that is not listed is written anew.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from services.errors import ConfigError, DataError, PeerError
from services.process.files import write_by_rename
from services.score.rows import InputFile
from services.wire.document import decode_document, encode_document
from services.wire.teacher import SCORE_COLUMNS, TeacherScores

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ScoreSettings:
    """What makes two runs over one file the same run."""

    protocol: int
    teacher: str
    fingerprint: str
    tokenizer_fingerprint: str | None
    temperature: float
    top_k: int
    logprob_dtype: str
    shard_rows: int
    input: InputFile


@dataclass(frozen=True)
class Shard:
    """One file of scores; it covers `shard_rows` lines of the input from `first_row` (1-based) on."""

    file: str
    first_row: int
    num_sequences: int
    num_rows: int
    """Rows of the answer: scored tokens."""
    num_bytes: int


@dataclass
class Manifest:
    """manifest.json of a folder of scores."""

    settings: ScoreSettings
    num_lines: int
    shards: dict[int, Shard] = field(default_factory=dict)
    bad_rows: dict[int, str] = field(default_factory=dict)
    """Reasons of skipped lines of complete shards, by line."""

    @property
    def num_shards(self) -> int:
        """Shards of the whole input."""
        return -(-self.num_lines // self.settings.shard_rows)

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.num_shards

    def write(self, folder: Path) -> None:
        content = {
            **asdict(self.settings),
            "num_lines": self.num_lines,
            "complete": self.complete,
            "num_bad_rows": len(self.bad_rows),
            "bad_rows": [{"row": row, "reason": self.bad_rows[row]} for row in sorted(self.bad_rows)],
            "shards": [asdict(self.shards[index]) for index in sorted(self.shards)],
        }
        write_by_rename(folder / MANIFEST, json.dumps(content, indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Inverse of `write`.

        Raises:
            DataError: there is none, or it cannot be understood.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            settings = {name: content[name] for name in ScoreSettings.__dataclass_fields__}
            settings["input"] = InputFile(**settings["input"])
            shards = [Shard(**shard) for shard in content["shards"]]
            return cls(
                ScoreSettings(**settings),
                content["num_lines"],
                {(shard.first_row - 1) // settings["shard_rows"]: shard for shard in shards},
                {bad["row"]: bad["reason"] for bad in content["bad_rows"]},
            )
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a manifest of scores ({type(error).__name__}: {error}); choose another folder"
            ) from error


def resume(folder: Path, settings: ScoreSettings, num_lines: int) -> Manifest:
    """The manifest to go on from: that of an earlier run with these settings, or a new one.

    Raises:
        ConfigError: the folder holds scores with other settings, or other files.
    """
    if not (folder / MANIFEST).exists():
        if any(folder.glob("*.safetensors")):
            raise ConfigError(f"--output {folder} holds safetensors files but no {MANIFEST}; choose another folder")
        return Manifest(settings, num_lines)
    manifest = Manifest.read(folder)
    before, now = asdict(manifest.settings), asdict(settings)
    for name in (
        "protocol",
        "fingerprint",
        "tokenizer_fingerprint",
        "temperature",
        "top_k",
        "logprob_dtype",
        "shard_rows",
    ):
        if before[name] != now[name]:
            raise ConfigError(_other_settings(folder, name, before[name], now[name]))
    if before["input"]["sha256"] != now["input"]["sha256"]:
        raise ConfigError(_other_settings(folder, "input's sha256", before["input"]["sha256"], now["input"]["sha256"]))
    present = {i: shard for i, shard in manifest.shards.items() if _is_whole(folder / shard.file, shard.num_bytes)}
    return Manifest(settings, num_lines, present, manifest.bad_rows)


def _other_settings(folder: Path, name: str, before: Any, now: Any) -> str:
    return f"--output {folder} was scored with {name} = {before!r}, now it is {now!r}; choose another folder, or the same settings"


def _is_whole(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def write_shard(folder: Path, index: int, first_row: int, rows: list[int], scores: TeacherScores | None) -> Shard:
    """Write the scores of the input's lines `rows` (None: of no line).

    The document holds `input_rows` int64[B], `row_offsets` int64[B+1] and the columns of TeacherScores.
    """
    if scores is None:
        arrays = {"row_offsets": np.zeros(1, np.int64)}
    else:
        arrays = {"row_offsets": scores.row_offsets.astype(np.int64), **scores.columns()}
    name = f"scores-{index:05d}.safetensors"
    # One entry: safetensors writes several in an order of chance, and the same scores should be the same bytes.
    metadata = {} if scores is None else {"answer": scores.metadata()}
    document = encode_document({"input_rows": np.array(rows, np.int64), **arrays}, metadata)
    write_by_rename(folder / name, document)
    num_rows = int(arrays["row_offsets"][-1])
    return Shard(name, first_row, len(rows), num_rows, len(document))


@dataclass(frozen=True)
class ScoredRow:
    """The scores of one line of the input: R scored tokens, K candidates."""

    row: int
    """1-based line of the input."""
    arrays: dict[str, np.ndarray]
    """token_ids [R], token_logprobs [R], topk_ids [R, K], topk_logprobs [R, K], tail_logprobs [R], entropies [R]."""


def read_shards(folder: str | Path, *, partial: bool = False) -> Iterator[ScoredRow]:
    """The scores that `distillserve score --output` wrote, line by line of its input; skipped lines are left out.

    >>> for scored in read_shards("scores"):  # doctest: +SKIP
    ...     print(scored.row, scored.arrays["token_logprobs"].sum())

    Args:
        partial: also read a folder whose last lines have not been scored yet.

    Raises:
        DataError: there is no manifest, a shard is missing or damaged, or the scoring has not been finished.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if not manifest.complete and not partial:
        done, total = len(manifest.shards), manifest.num_shards
        raise DataError(f"{folder} has {done} of {total} shards; run `distillserve score` again to finish it")
    for index in sorted(manifest.shards):
        yield from _read_shard(folder / manifest.shards[index].file)


def _read_shard(path: Path) -> Iterator[ScoredRow]:
    try:
        arrays, _ = decode_document(path.read_bytes())
    except (OSError, PeerError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    offsets = arrays["row_offsets"]
    columns = {name: arrays[name] for name in SCORE_COLUMNS if name in arrays}
    for index, row in enumerate(arrays["input_rows"].tolist()):
        part = slice(int(offsets[index]), int(offsets[index + 1]))
        yield ScoredRow(row, {name: column[part] for name, column in columns.items()})
