"""What the chunked head keeps in memory at once: tiles of the logits, never [N, V]."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.loss import head as lm_head
from trainer.loss.head import support_logprobs

N, H, V, K = 512, 8, 20_000, 4
CHUNK_TOKENS = 128


class PeakMemory(TorchDispatchMode):
    """The most bytes that were alive at once, of all storages that operators return, and the largest of them."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = weakref.WeakSet(x.untyped_storage() for x in inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, num_bytes: int) -> None:
        self.live -= num_bytes


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_memory_is_tiles_and_the_weight_gradient(
    dtype: torch.dtype, copies: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds: two float32 buffers of a tile and their half-precision copies; the weight's gradient and its copy; rows."""
    columns = 1024
    monkeypatch.setattr(lm_head, "MAX_TILE_ELEMENTS", CHUNK_TOKENS * columns)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    tokens, ids = torch.randint(V, (N,)), torch.randint(V // K, (N, K)) + torch.arange(K) * (V // K)
    tile, rows, d_weight = 4 * CHUNK_TOKENS * columns, 4 * N * (2 * H + 12 * K), 4 * V * H
    with PeakMemory(hidden, weight) as memory:
        output = support_logprobs(hidden, weight, tokens, ids, softcap=softcap, chunk_tokens=CHUNK_TOKENS)
        loss = output.token_logprobs.sum() + output.support_logprobs.sum() + output.tail_logprob.sum()
        gradients = torch.autograd.grad(loss, [hidden, weight])
    assert memory.live >= sum(x.nbytes for x in gradients)  # the count counts
    assert memory.largest <= max(2 * tile, d_weight) < 4 * N * V / 8
    assert memory.peak <= d_weight + 3 * tile + copies * (d_weight // 2 + tile) + rows < 4 * N * V / 8
