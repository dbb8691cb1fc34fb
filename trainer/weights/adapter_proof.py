"""Whether the weights that are sent have the adapter in them: computed a second time, by peft itself.

The checksums of a push say that what was sent arrived; they are of whatever the source yields, also of weights that an adapter
was not merged into. So each adapted module is asked, before a push, what it answers to a fixed random input with its adapter and
without, and the tensor on its way to the servers is asked the same. This is done for every module at every push, in float64:
an adapter that has been trained for one step at a small learning rate moves logits by less than a canary can see.

Left out: changes that the rollout servers' dtype cannot hold, for those reach no server in any way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from services.errors import WeightSyncError
from services.models.adapters import adapted_modules, is_low_rank, plain_name, unpacked, without_memory
from services.weight_transfer.buckets import checksum
from services.weight_transfer.source import ParamMeta, WeightSource, materialize_full_tensor
from trainer.lora import checkpoint_name, trained_parameters

_SEED = 20_261
_TOKENS = 4
"""Rows of an embedding that are looked at."""
_CLEAR = 8.0
"""How many times the rounding of the sent weights a change has to be, to be told from it."""
_SHARE = 0.5
"""Of a change that is clear, how much may be missing."""
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class _Probe:
    """An adapted module's answers, float64, to an input: [in] of a linear layer, [_TOKENS] ids of an embedding."""

    input: Tensor
    is_transposed: bool
    without: Tensor
    change: Tensor

    def share_in(self, weight: Tensor) -> float | None:
        """How much of the adapter's change a weight has, 1 for all and 0 for none; None where its dtype hides the change."""
        wide = weight.double()
        if not self.input.is_floating_point():
            rows = wide[self.input.to(weight.device)]
            answer, size = rows.flatten(), rows
        else:
            wide = wide.t() if self.is_transposed else wide
            given = self.input.to(weight.device)
            answer, size = wide @ given, wide * given
        rounding = torch.finfo(weight.dtype).eps / 12**0.5 * float(size.norm())
        change = self.change.to(weight.device)
        if not float(change.norm()) > _CLEAR * rounding:
            return None
        return float((answer - self.without.to(weight.device)) @ change / (change @ change))


class AdapterProof:
    """What of a version's adapter has to be found in the tensors that are sent; made on all ranks together.

    Args:
        dtype: of the tensors that are sent.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._missing: dict[str, float] = {}
        self._probes = {
            checkpoint_name(model, f"{name}.weight", without_memory(module.base_layer.weight).shape): _probe(module)
            for name, module in adapted_modules(model).items()
        }
        self._checksums = {}
        for name, parameter in trained_parameters(model).items():
            if not is_low_rank(name):
                whole = materialize_full_tensor(parameter.detach()).to(dtype)
                self._checksums[checkpoint_name(model, plain_name(name), parameter.shape)] = checksum(
                    [whole.contiguous()]
                )
        self._unseen: set[str] = set()

    def watching(self, source: WeightSource) -> WeightSource:
        """The same tensors, looked at on their way; afterwards `check` says what was missing in them."""
        self._missing, self._unseen = {}, {*self._probes, *self._checksums}
        return _Watched(source, self)

    def look_at(self, name: str, tensor: Tensor) -> None:
        """At a tensor that is sent, by its name in a checkpoint."""
        self._unseen.discard(name)
        if (probe := self._probes.get(name)) is not None:
            share = probe.share_in(tensor)
            if share is not None and not abs(share - 1.0) <= _SHARE:
                self._missing[name] = share
        elif (expected := self._checksums.get(name)) is not None and checksum([tensor.contiguous()]) != expected:
            self._missing[name] = 0.0

    def check(self) -> None:
        """After everything was sent.

        Raises:
            WeightSyncError: tensors that do not have the adapter in them; names them.
        """
        names = sorted({*self._unseen, *self._missing})
        if names:
            shown = ", ".join(f"{name} ({self._missing.get(name, 0.0):.0%} of it)" for name in names[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise WeightSyncError(f"the adapter is missing in the weights that were sent: {shown}{more}")


class _Watched(WeightSource):
    def __init__(self, source: WeightSource, proof: AdapterProof) -> None:
        self._source, self._proof = source, proof

    def metadata(self) -> list[ParamMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source:
            self._proof.look_at(name, tensor)
            yield name, tensor


@torch.no_grad()
def _probe(module: Any) -> _Probe:
    """Run peft's own forward pass of one module, and of what it wraps, on whole weights in float64."""
    base = module.base_layer
    is_packed = (
        without_memory(base.weight).shape != base.weight.shape
    )  # in four bits, which bitsandbytes multiplies with itself
    parameters = (pair for pair in module.named_parameters() if not (is_packed and pair[1] is base.weight))
    weights = {key: materialize_full_tensor(p.detach()).double() for key, p in parameters}
    generator = torch.Generator().manual_seed(_SEED)
    shape, device = without_memory(base.weight).shape, next(iter(weights.values())).device
    is_transposed = isinstance(base, Conv1D)
    if isinstance(base, nn.Embedding):
        given = torch.randint(shape[0], (_TOKENS,), generator=generator).to(device)
    else:
        given = torch.randn(shape[0 if is_transposed else 1], generator=generator, dtype=torch.float64).to(device)
    was_training = module.training
    module.eval()  # without the adapter's dropout
    try:
        answer = functional_call(module, weights, (given.unsqueeze(0),)).flatten()
        alone = {key.removeprefix("base_layer."): w for key, w in weights.items() if key.startswith("base_layer.")}
        own = functional_call(base, alone, (given.unsqueeze(0),)).flatten()
    finally:
        module.train(was_training)
    without = unpacked(base.weight).double() @ given if is_packed else own
    without = without if is_packed or "bias" not in alone else without - alone["bias"]
    return _Probe(given, is_transposed, without, answer - own)
