"""The chunked head on a GPU: the same numbers as the dense one, and memory that the logits would not fit in.

Run on a machine with an NVIDIA GPU: `make test ARGS="-m gpu"`.
"""

import pytest
import torch
from torch import Tensor

from tests.benchmarks.head import dense
from trainer.loss.head import GPU_CHUNK_TOKENS, GPU_TILE_ELEMENTS, HeadOutput, support_logprobs

pytestmark = pytest.mark.gpu

VOCABULARY, HIDDEN, SUPPORT = 151_936, 256, 32


def inputs(num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_positions, HIDDEN, generator=generator, device="cuda")
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, device="cuda") * (3 * HIDDEN**-0.5)
    support_ids = torch.cat([(rows @ weight.t()).topk(SUPPORT).indices for rows in hidden.split(256)])
    token_ids = torch.randint(VOCABULARY, (num_positions,), generator=generator, device="cuda")
    token_ids[::2] = support_ids[::2, 0]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), token_ids, support_ids


def loss_of(output: HeadOutput) -> Tensor:
    return (output.token_logprobs.sum() + output.support_logprobs.sum() + output.tail_logprob.sum()) / 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_forward_and_gradients_equal_dense_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, *ids = inputs(GPU_CHUNK_TOKENS + 100, dtype)  # two chunks of several tiles
    got = support_logprobs(hidden, weight, *ids)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense(*exact, *ids)
    pairs = list(zip(got, expected, strict=True))
    pairs += zip(
        torch.autograd.grad(loss_of(got), [hidden, weight]), torch.autograd.grad(loss_of(expected), exact), strict=True
    )
    for a, b in pairs:
        assert ((a.double() - b).abs().max() / b.abs().max()).item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_on_cuda_is_tiles_rows_and_the_weight_gradient(dtype: torch.dtype) -> None:
    num_positions = 8 * GPU_CHUNK_TOKENS
    hidden, weight, *ids = inputs(num_positions, dtype)
    torch.autograd.grad(loss_of(support_logprobs(hidden, weight, *ids)), [hidden, weight])  # libraries' workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss_of(support_logprobs(hidden, weight, *ids)), [hidden, weight])
    peak = torch.cuda.max_memory_allocated() - before
    tiles = 4 * 4 * GPU_TILE_ELEMENTS  # two float32 buffers; in half precision, copies for the products
    rows = 4 * num_positions * (2 * HIDDEN + 16 * SUPPORT)
    gradient = 6 * VOCABULARY * HIDDEN  # float32 and, in half precision, the one returned
    assert peak <= tiles + rows + gradient < 4 * num_positions * VOCABULARY / 8
