"""Which elements of a worker's parameters an update has written.

vLLM's layerwise reload runs every weight loader on tensors without memory first, to count what it would copy. Those copies
are seen here, with their place in the parameter, so that a shard of a tensor-parallel worker, one projection of a fused
one, a single expert and the padding of a vocabulary are all told from what never came.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

_ATEN = torch.ops.aten
_WRITES = {_ATEN.copy_.default, _ATEN.fill_.Scalar, _ATEN.fill_.Tensor, _ATEN.zero_.default}
"""Padding is filled with zeros by the loader of the parameter it belongs to."""


@dataclass
class _Parameter:
    """One parameter of one module, and what was written of it.

    Attributes:
        target: the tensor that weight loaders are given.
        served: identity of the parameter that the model computes with; tied modules share it.
        intervals: [start, end) of elements that are contiguous.
        strided: number of elements of every other view, by its (offset, size, stride).
    """

    module_name: str
    module: torch.nn.Module
    name: str
    target: torch.Tensor
    served: int
    intervals: list[tuple[int, int]] = field(default_factory=list)
    strided: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def note_write(self, view: torch.Tensor) -> None:
        size, stride = tuple(view.shape), view.stride()
        number = view.numel()
        if not number:
            return
        start = int(view.storage_offset())
        if view.is_contiguous():
            self.intervals.append((start, start + number))
        else:
            self.strided[start, size, stride] = number

    def num_written(self) -> int:
        written, end = sum(self.strided.values()), 0
        for start, stop in sorted(self.intervals):
            written += max(0, stop - max(start, end))
            end = max(end, stop)
        return written

    def is_whole(self) -> bool:
        return self.num_written() >= get_tensor_load_numel(self.target)


class Arrivals:
    """What has come in the update that `initialize_layerwise_reload` has just begun.

    Args:
        model: the worker's.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._parameters = list(_parameters(model))
        # By storage: a loader writes into views of the parameter.
        self._by_storage = {_storage(p.target): p for p in self._parameters}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes what `model.load_weights` writes in the body."""
        with _Writes(self):
            yield

    def note_write(self, written: torch.Tensor, read: torch.Tensor | None) -> None:
        parameter = self._by_storage.get(_storage(written))
        # A bias is in use while it is loaded: vLLM copies it onto itself when its layer is complete.
        if parameter is not None and (read is None or _storage(read) != _storage(written)):
            parameter.note_write(written)

    def release(self, buffer: torch.Tensor) -> None:
        """Make sure that no layer refers to a receive buffer any more.

        A layer waits for its last element, which a padded one never gets: when nothing else of it is to come it is loaded
        here. Whatever else waits keeps a copy.
        """
        for module in self._model.modules():
            info = get_layerwise_info(module)
            if not info.can_load() or not info.loaded_weights:
                continue
            is_whole = all(p.is_whole() for p in self._parameters if p.module is module)
            if is_whole and not is_deferred_attention_layer(module):
                _layerwise_process(module, info)
                continue
            for _, call in info.loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and _storage(value) == _storage(buffer):
                        call.arguments[name] = value.clone()

    def changed(self) -> bool:
        """Whether the model already computes with some of the new weights."""
        return any(
            not get_layerwise_info(p.module).can_load() or (not p.target.is_meta and p.num_written() > 0)
            for p in self._parameters
        )

    def missing(self, names: Collection[str]) -> list[str]:
        """Checkpoint names, as far as the model knows them, of what a parameter of this worker still lacks.

        Args:
            names: that the update announced.
        """
        served = {p.served for p in self._parameters if p.is_whole()}
        names_missing: list[str] = []
        for parameter in self._parameters:
            if parameter.served not in served and not is_deferred_attention_layer(parameter.module):
                served.add(parameter.served)  # tied parameters are named once
                names_missing += self._missing_parts(parameter, names)
        return names_missing

    def _missing_parts(self, parameter: _Parameter, names: Collection[str]) -> list[str]:
        """The parts of a fused parameter that were not announced; of another one its own name."""
        absent = [name for name in self._parts(parameter) if name not in names]
        return absent or [f"{parameter.module_name}.{parameter.name}".removeprefix(".")]

    def _parts(self, parameter: _Parameter) -> list[str]:
        module: Any = parameter.module
        if hasattr(module, "get_expert_mapping"):
            # Of w13_weight: (experts.w13_, experts.0.gate_proj., ...), (experts.w13_, experts.0.up_proj., ...) and so on.
            of_model, kind = module.layer_name.removesuffix("experts"), parameter.name.rpartition("_")[2]
            mapping = module.get_expert_mapping()
            parts = [part for fused, part, *_ in mapping if f"experts.{parameter.name}".startswith(fused)]
            return [f"{of_model}{part}{kind}" for part in dict.fromkeys(parts)]
        parent, _, own = parameter.module_name.rpartition(".")
        packed = getattr(self._model, "packed_modules_mapping", {}).get(own, [])
        return [".".join(filter(None, [parent, part, parameter.name])) for part in packed]


class _Writes(TorchDispatchMode):
    def __init__(self, arrivals: Arrivals) -> None:
        super().__init__()
        self._arrivals = arrivals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRITES:
            self._arrivals.note_write(args[0], args[1] if func is _ATEN.copy_.default else None)
        return func(*args, **(kwargs or {}))


def _parameters(model: torch.nn.Module) -> Iterator[_Parameter]:
    for module_name, module in model.named_modules():
        served: dict[str, torch.Tensor] = (get_layerwise_info(module).kernel_tensors or ({}, {}))[0]
        for name, target in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Parameter(module_name, module, name, target, id(served.get(name, target)))


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory, also of one on the meta device, where every address is 0."""
    return tensor.untyped_storage()._cdata
