"""The trainer's weights as vLLM wants them: checkpoint names, the rollout's dtype, whole tensors."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, materialize_full_tensor


class CheckpointSource(WeightSource):
    """Yields a transformers model's parameters under the names its checkpoint has.

    transformers 5 renames and fuses some parameters when it loads them (MoE experts, for one); vLLM reads
    checkpoints, so the conversion is reverted. Tied parameters come once. Floating-point tensors are cast to
    `dtype`, the dtype of the rollout server.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """(name, dtype, shape) of everything iteration yields; found by one pass, then remembered."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self]
        return self._metadata

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = {name: materialize_full_tensor(p.detach()) for name, p in self._model.named_parameters()}
        for name, tensor in revert_weight_conversion(self._model, parameters).items():
            yield name, tensor.to(self._dtype) if tensor.is_floating_point() else tensor
