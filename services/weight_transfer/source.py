"""The trainer's weights as vLLM wants them: checkpoint names, the rollout's dtype, whole tensors, one layer at a time."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups, materialize_full_tensor

from services.models.adapters import has_adapter, merge, unpacked, without_memory


class CheckpointSource(WeightSource):
    """Yields what `save_pretrained` would write, under the same names, decoder layer by decoder layer.

    transformers 5 renames and fuses some parameters when it loads them (MoE experts, for one); vLLM reads checkpoints, so
    the conversion is reverted. Tied parameters come once. Floating-point tensors are cast to `dtype`, the dtype of the
    rollout server. Only one layer is gathered, converted and cast at any time. A layer's adapters are merged, out of place, in
    between.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """(name, dtype, shape) of everything iteration yields; gathers nothing."""
        if self._metadata is None:
            tensors = self._tensors().items()
            on_meta = {name: without_memory(t) for name, t in tensors}
            self._metadata = [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self._convert(on_meta)]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._convert(self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The model's parameters and persistent buffers, tied ones once."""
        kept = dict(self._model.named_parameters())
        names = self._model.state_dict().keys()
        return kept | {name: buffer for name, buffer in self._model.named_buffers() if name in names}

    @torch.no_grad()
    def _convert(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for group in layerwise_groups(list(tensors)):
            layer = {name: materialize_full_tensor(unpacked(tensors[name])) for name in group}
            if has_adapter(self._model):
                layer = dict(merge(self._model, layer))
            converted = revert_weight_conversion(self._model, layer)
            del layer
            for name in list(converted):
                tensor = converted.pop(name)
                yield name, tensor.to(self._dtype) if tensor.is_floating_point() else tensor
