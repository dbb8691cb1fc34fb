"""`checkpoints/step-N/`: a student as every other, and in `resume/` what it takes to go on from there.

config.json, *.safetensors, ...   the student, as from_pretrained takes it; adapter/ with an adapter
resume/rank-K.safetensors         of the optimizer and the generators what rank K held
resume/state.json                 plain values, with size and checksum of every file above
resume/complete                   checksum of state.json, written last

All of it is written into `.step-N.part`, waited for, and renamed: under its name a checkpoint is complete, whenever a process is
killed or a disk is full. Reading compares every byte with its checksum, and unpickles nothing.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError

from services.config.output_dir import COMPLETE, RESUME, STATE, read_state, unusable
from services.errors import OutputError
from services.process.files import checksum, sync_names, sync_tree
from trainer.checkpoint.block import Block
from trainer.checkpoint.rank_file import RankFiles, write_rank_file

FORMAT = 2
"""Of state.json: raised with every change that an earlier version could not read."""


class _Written(BaseModel):
    step: PositiveInt
    num_ranks: PositiveInt
    files: dict[str, tuple[NonNegativeInt, str]]


def folder_beside(path: Path) -> Path:
    """Where a checkpoint is until it is complete."""
    return path.with_name(f".{path.name}.part")


def begin(path: Path) -> Path:
    """Make the folder that a checkpoint is written into, without what an earlier try left there.

    Raises:
        OSError: it cannot be made.
    """
    beside = folder_beside(path)
    remove(beside)
    (beside / RESUME).mkdir(parents=True)
    return beside


def rank_file(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / RESUME / f"rank-{rank}.safetensors"


def write_part(folder: Path, rank: int, tensors: Mapping[str, Any], blocks: Mapping[str, Block]) -> None:
    """Write what one rank holds.

    Raises:
        OutputError: it cannot be written.
    """
    path = rank_file(folder, rank)
    try:
        write_rank_file(path, tensors, blocks)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def check_parts(path: Path, ranks: Iterable[int]) -> None:
    """Refuse a checkpoint that is being written where the file of a rank is not there.

    Raises:
        OutputError: names the rank.
    """
    for rank in ranks:
        if not rank_file(folder_beside(path), rank).is_file():
            raise OutputError(
                f"{path} cannot be written: the file of rank {rank} is not there; put output.dir on a file system that the machines of "
                "all ranks share, or set output.save_every_steps = 0"
            )


def complete(path: Path, num_ranks: int, state: Mapping[str, Any]) -> None:
    """Give a folder in which student and ranks' files are the name of a checkpoint.

    Args:
        path: of the checkpoint, which `begin` was given.
        state: plain values.

    Raises:
        OSError: it cannot be written.
        OutputError: a rank's file is not there.
    """
    beside = folder_beside(path)
    check_parts(path, range(num_ranks))
    sync_tree(beside)
    files = {name: [file.stat().st_size, checksum(file)] for name, file in _files(beside).items()}
    document = json.dumps(
        {"format": FORMAT, "num_ranks": num_ranks, **state, "files": files}, indent=1, allow_nan=False
    ).encode()
    (beside / RESUME / STATE).write_bytes(document)
    (beside / RESUME / COMPLETE).write_text(blake3.blake3(document).hexdigest())
    sync_tree(beside / RESUME)
    remove(path)  # one that is there is of an attempt that has been given up, or of another run
    beside.replace(path)
    for parent in (path.parent, path.parent.parent):
        sync_names(parent)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is as it was written.

    Attributes:
        state: plain values, by the names under which the run keeps them.
    """

    path: Path
    step: int
    num_ranks: int
    state: Mapping[str, Any]

    def rank_files(self) -> RankFiles:
        """What the ranks held."""
        return RankFiles(rank_file(self.path, rank) for rank in range(self.num_ranks))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, and all its bytes once to compare them with their checksums.

    Raises:
        StartupError: a file is missing, has been changed, or does not belong there; names it.
    """
    state = read_state(path)
    where = path / RESUME / STATE
    check_state(_Written, path)
    if state.get("format") != FORMAT:
        raise unusable(where, f"its format is {state.get('format')!r}, and this version reads {FORMAT}")
    if f"step-{state['step']}" != path.name:
        raise unusable(where, f"it is of step {state['step']}")
    there = _files(path)
    for name, (size, expected) in state["files"].items():
        file = there.pop(name, None)
        if file is None:
            raise unusable(path / name, "it is missing")
        try:
            if (found := file.stat().st_size) != size:
                raise unusable(file, f"it has {found} bytes of {size}")
            if checksum(file) != expected:
                raise unusable(file, "its checksum is another one")
        except OSError as error:
            raise unusable(file, str(error.strerror)) from error
    if there:
        raise unusable(path / next(iter(there)), "nobody wrote it there")
    return Checkpoint(path, state["step"], state["num_ranks"], state)


def check_state(kind: type[BaseModel], path: Path) -> None:
    """Refuse a checkpoint of whose plain values one is missing or not of its kind.

    Raises:
        StartupError: names the value.
    """
    where = path / RESUME / STATE
    try:
        kind.model_validate_json(where.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise unusable(where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def remove(path: Path) -> None:
    """Remove a checkpoint, or what is left of one: from then on it is none, whatever comes in between. Of a link the link.

    Raises:
        OSError: it is still one.
    """
    if path.is_symlink():
        path.unlink()
        return
    make_incomplete(path)
    shutil.rmtree(path, ignore_errors=True)


def make_incomplete(path: Path) -> None:
    """Leave of a checkpoint the student, from which no run goes on."""
    (path / RESUME / COMPLETE).unlink(missing_ok=True)


def _files(folder: Path) -> dict[str, Path]:
    """What a state lists: all files but itself and its checksum, and but hidden ones, of which nothing reads any."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_own = name.parent == Path(RESUME) and name.name in (STATE, COMPLETE)
        if not path.is_dir() and not is_own and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path
    return found
