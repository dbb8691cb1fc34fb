"""Which model a server has, as a few hexadecimal digits: equal for copies of one model, wherever they lie.

Not in it: paths, names, hosts, times, the version of transformers, how attention is computed. The first MODEL_DIGITS say
what the model is (configuration, weights, tokenizer), the rest how its logits are computed (engine, dtype, options).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from services.wire.teacher import MODEL_DIGITS

_SERVING_DIGITS = 6
# Tensors of up to this many values are read whole; of a larger one some rows, spread evenly.
_WHOLE = 1 << 16
_ROWS = 8
# Bytes at the end of a file of weights that is not safetensors.
_TAIL_BYTES = 1 << 16
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
# Entries of a configuration that say where it comes from, or how it is computed, not what is computed.
_NOT_OF_THE_MODEL = {
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "transformers_version",
    "auto_map",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def model_fingerprint(
    model: str,
    config: PreTrainedConfig,
    tokenizer: str,
    serving: Mapping[str, Any],
    cache_dir: str | None = None,
) -> str:
    """Fingerprint of a model that has been loaded, so that its files are on this machine.

    Args:
        model: folder or hub id.
        config: as it is used, with what options change in it.
        tokenizer: `services.models.causal_lm.tokenizer_fingerprint`.
        serving: how the logits are computed, as far as it changes them: engine, dtype, options.
        cache_dir: of the hub's files, if it is not the usual one.
    """
    what = hashlib.sha256(_spelled(_of_the_model(config.to_diff_dict())))
    what.update(tokenizer.encode())
    for part in _weights(model, cache_dir):
        what.update(part)
    how = hashlib.sha256(_spelled(dict(serving)))
    return what.hexdigest()[:MODEL_DIGITS] + how.hexdigest()[:_SERVING_DIGITS]


def _spelled(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _of_the_model(value: Any) -> Any:
    """A configuration, and those inside it, without what is not of the model."""
    if not isinstance(value, dict):
        return value
    return {
        name: _of_the_model(part)
        for name, part in value.items()
        if name not in _NOT_OF_THE_MODEL and not name.startswith("_attn_implementation")
    }


def _weights(model: str, cache_dir: str | None) -> Iterator[bytes]:
    """Enough of every tensor to tell two fine-tunes of one model apart, in an order that no sharding changes."""
    folder = _folder(model, cache_dir)
    if folder is None:
        yield model.encode()  # its files are nowhere: the name is all there is
        return
    names = _safetensors(folder)
    try:
        yield from _of_tensors([folder / name for name in names])
    except SafetensorError:  # a dtype that torch does not know
        yield from _of_files([folder / name for name in names])
    if not names:  # or they would be optimizer states and the like
        yield from _of_files(path for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS)


def _folder(model: str, cache_dir: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        config = cached_file(model, "config.json", cache_dir=cache_dir, local_files_only=True)
    except OSError:
        return None
    return Path(config).parent if config else None


def _safetensors(folder: Path) -> list[str]:
    """Names of the files that hold the weights; others may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _of_tensors(paths: list[Path]) -> list[bytes]:
    digests: dict[str, bytes] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                digests[name] = _of_tensor(file.get_slice(name))
    return [name.encode() + digest for name, digest in sorted(digests.items())]


def _of_tensor(tensor: Any) -> bytes:
    """Of some of its values in float32: a copy in another dtype that holds them exactly is the same model."""
    shape = tensor.get_shape()
    digest = hashlib.sha256(repr(shape).encode())
    if torch.Size(shape).numel() <= _WHOLE:
        parts = [tensor[...]]
    else:
        middle = tuple(size // 2 for size in shape[1:-1])  # of the dimensions between the first and the last
        count = min(_ROWS, shape[0])
        parts = [tensor[(index * (shape[0] - 1) // max(1, count - 1), *middle)] for index in range(count)]
    for part in parts:
        digest.update(part.float().contiguous().numpy().tobytes())
    return digest.digest()


def _of_files(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            yield f"{path.name} {size} ".encode() + file.read()
