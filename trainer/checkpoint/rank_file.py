"""`resume/rank-K.safetensors`: the blocks of tensors that rank K held, each with its place in the whole tensor.

Any number of ranks reads what another number has written: a rank takes from the files what its own blocks overlap with.
(torch.distributed.checkpoint would tell the ranks of each other's blocks with pickled objects, and writes no folder as a whole.)
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.errors import StartupError
from trainer.checkpoint.block import Block


def write_rank_file(path: Path, tensors: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> None:
    """Write blocks, in host memory, under the names of their tensors.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    places = {name: [block.whole, block.offset] for name, block in blocks.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"blocks": json.dumps(places)})


class RankFiles:
    """Tensors whose blocks are in several files.

    Raises:
        StartupError: a file is none of these.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, list[tuple[Path, Block]]] = {}
        for path in paths:
            for name, block in _read_places(path):
                self._places.setdefault(name, []).append((path, block))

    def has(self, name: str) -> bool:
        """Whether there is anything of a tensor."""
        return name in self._places

    def read(self, name: str, wanted: Block | None = None) -> Tensor:
        """A block of a tensor, in host memory; default: all of it.

        Raises:
            StartupError: it is not there, has another shape, or a part of it is missing.
        """
        if name not in self._places:
            raise StartupError(f"the checkpoint holds no {name}; it is of another student or optimizer")
        files = self._places[name]
        whole = files[0][1].whole
        wanted = wanted or Block.all_of(whole)
        if wanted.whole != whole:
            raise StartupError(f"the checkpoint holds {name} with shape {list(whole)}, not {list(wanted.whole)}")
        found: Tensor | None = None
        num_found = 0
        for path, block in files:
            if (common := wanted.common(block)) is None:
                continue
            into, source = common
            with safe_open(path, "pt") as file:
                part = file.get_slice(name)[source] if whole else file.get_tensor(name)
            found = torch.empty(wanted.shape, dtype=part.dtype) if found is None else found
            found[into] = part
            num_found += part.numel()
        if found is None or num_found != wanted.num_values:
            if wanted.num_values == 0:  # of a rank that holds nothing of it
                return torch.empty(wanted.shape, dtype=self._dtype(name))
            raise StartupError(f"the checkpoint holds {num_found} of {wanted.num_values} values of {name}")
        return found

    def _dtype(self, name: str) -> torch.dtype:
        path, block = self._places[name][0]
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[tuple(slice(0, 0) for _ in block.whole)].dtype


def _read_places(path: Path) -> list[tuple[str, Block]]:
    try:
        with safe_open(path, "pt") as file:
            places: dict[str, Any] = json.loads((file.metadata() or {})["blocks"])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return [(name, Block(tuple(places[name][0]), tuple(places[name][1]), shapes[name])) for name in shapes]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}; it is no part of a checkpoint") from error
