"""A copy of saved weights in another dtype, a shard at a time.

consumes   a folder's safetensors files
produces   safetensors files of at most MAX_SHARD_BYTES each, with their index where there are several
memory     one shard of the copy; what it is cast from is read tensor by tensor
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization import StateDictSplit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from services.errors import DataError, OutputError
from services.process.files import cannot_write

MAX_SHARD_BYTES = 5 << 30
"""As transformers and the hub cut models for downloads that can be resumed."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What `dtype` stands for in a file; integers and float8 are no weights that were trained.
_CAST = {"F32", "F16", "BF16", "F64"}
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Cast:
    """What a copy will be.

    Attributes:
        dtype: of the weights in it.
        sources: file of each tensor.
        split: which tensor goes into which file of the copy.
    """

    dtype: str
    sources: dict[str, Path]
    split: StateDictSplit
    sizes: dict[str, int]
    """Bytes of each file, without its header."""

    def write(self, folder: Path, on_shard: Callable[[int, int], None]) -> None:
        """Write the files and their index into an empty folder.

        Args:
            on_shard: told, before each shard, its number from 1 and how many there are.

        Raises:
            OutputError: there is no room, or the folder cannot be written.
            DataError: a weight is too large for the dtype, or a file is damaged.
        """
        needed = sum(self.sizes.values()) + _HEADER_BYTES
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(
                f"{folder} has {free >> 20} MiB left, the copy in {self.dtype} needs {needed >> 20} MiB; free some space "
                "or push without a dtype, which copies nothing"
            )
        shards = self.split.filename_to_tensors
        for number, (name, tensors) in enumerate(shards.items(), start=1):
            on_shard(number, len(shards))
            self._write_shard(folder / name, tensors)
        if self.split.is_sharded:
            index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
            _written(index_name(next(iter(shards)), self.split), folder, json.dumps(index, indent=2) + "\n")

    def _write_shard(self, path: Path, names: list[str]) -> None:
        shard = {}
        with _files(sorted({self.sources[name] for name in names})) as files:
            for name in names:
                tensor = files[self.sources[name]].get_tensor(name)
                shard[name] = self._cast(name, tensor)
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # "I/O error: No space left on device"
            raise OutputError(f"{path} cannot be written: {error}; free some space") from error
        except OSError as error:
            raise cannot_write(path, error) from error

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in (torch.float64, *_DTYPES.values()):
            return tensor
        cast = tensor.to(_DTYPES[self.dtype])
        if not torch.equal(cast.isfinite(), tensor.isfinite()):
            largest = tensor[tensor.isfinite()].abs().max().item()
            raise DataError(
                f"{self.sources[name]}: {name} holds {largest:.4g}, more than {self.dtype} can "
                f"({torch.finfo(cast.dtype).max:.5g}); push it in another dtype"
            )
        return cast


def index_name(shard: str, split: StateDictSplit) -> str:
    """Name of the index of files that are called like `shard`."""
    assert split.is_sharded
    return shard.split("-")[0] + ".safetensors.index.json"


def plan_cast(sources: list[Path], dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> Cast | None:
    """How weights will be cut in another dtype, from the headers of their files; None where all have it already.

    Args:
        sources: safetensors files.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        DataError: a file is damaged.
    """
    where: dict[str, Path] = {}
    shapes: dict[str, torch.Tensor] = {}
    is_changed = False
    with _files(sources) as files:
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                is_cast = part.get_dtype() in _CAST
                if not is_cast:
                    shapes[name] = file.get_tensor(name).to("meta")
                else:
                    shapes[name] = torch.empty(part.get_shape(), dtype=_DTYPES[dtype], device="meta")
                    is_changed |= part.get_dtype() != _names(dtype)
                where[name] = path
    if not is_changed:
        return None
    stem = "adapter_model" if sources[0].name.startswith("adapter") else "model"
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    sizes = {
        name: sum(shapes[tensor].numel() * shapes[tensor].element_size() for tensor in tensors)
        for name, tensors in split.filename_to_tensors.items()
    }
    return Cast(dtype, where, split, sizes)


def with_dtype(config: Any, dtype: str) -> Any:
    """A model's config.json, and the configurations inside it, with another dtype where one is named."""
    if not isinstance(config, dict):
        return config
    return {
        name: dtype if name in ("dtype", "torch_dtype") and isinstance(part, str) else with_dtype(part, dtype)
        for name, part in config.items()
    }


def _names(dtype: str) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]


def _written(name: str, folder: Path, text: str) -> None:
    try:
        (folder / name).write_text(text)
    except OSError as error:
        raise cannot_write(folder / name, error) from error


@contextmanager
def _files(paths: list[Path]) -> Iterator[dict[Path, Any]]:
    """Open safetensors files."""
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for path in paths:
            try:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path} cannot be read: {error}; save the student again") from error
        yield opened
