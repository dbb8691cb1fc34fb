"""The chunked head against dense float64 autograd, finite differences, and the corners of its support."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.loss import head as lm_head
from trainer.loss.head import HeadOutput, support_logprobs

N, H, V, K = 7, 5, 11, 4

OPTIONS = [
    {"temperature": temperature, "softcap": softcap, "logit_scale": scale, "with_bias": with_bias}
    for temperature, softcap, (scale, with_bias) in itertools.product(
        (1.0, 0.7), (None, 1.5), ((1.0, False), (1.0, True), (0.3, True))
    )
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distinct_ids(n: int, k: int, vocabulary: int, seed: int = 1) -> Tensor:
    return torch.rand(n, vocabulary, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :k]


def leaves(n: int = N, h: int = H, v: int = V, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes_seeds = ((n, h), 2), ((v, h), 3), ((v,), 4)
    return [randn(*shape, seed=seed, dtype=dtype).requires_grad_() for shape, seed in shapes_seeds]


def token_ids(n: int = N, v: int = V) -> Tensor:
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(5))


def dense(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor, bias: Tensor | None, **options: object
) -> HeadOutput:
    """The same quantities the obvious way, from all [N, V] log-probabilities."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * options.get("logit_scale", 1.0)
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logprobs = (logits / options.get("temperature", 1.0)).log_softmax(-1)
    outside = torch.ones_like(logprobs)
    for row, column in (ids >= 0).nonzero().tolist():
        outside[row, ids[row, column]] = 0
    tail = (logprobs.exp() * outside).sum(-1).log()
    support = logprobs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return HeadOutput(logprobs.gather(1, tokens[:, None])[:, 0], support, tail, entropy.detach())


def random_functional(output: HeadOutput) -> Tensor:
    """A scalar that weighs every finite entry differently."""
    return sum(
        (torch.where(x.isfinite(), x, 0.0) * randn(*x.shape, seed=6 + i).to(x.dtype)).sum()
        for i, x in enumerate((output.token_logprobs, output.support_logprobs, output.tail_logprob))
    )


def gradients(output: HeadOutput, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(random_functional(output), inputs)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_forward_and_gradients_equal_dense_autograd(options: dict, chunk_tokens: int | None) -> None:
    options = dict(options)
    hidden, weight, bias = leaves()
    used = bias if options.pop("with_bias") else None
    ids = distinct_ids(N, K, V)
    tokens = torch.where(torch.arange(N) % 2 == 0, ids[:, 1], token_ids())  # some sampled tokens are in S for sure
    inputs = [hidden, weight] + ([] if used is None else [bias])
    expected = dense(hidden, weight, tokens, ids, used, **options)
    got = support_logprobs(hidden, weight, tokens, ids, bias=used, chunk_tokens=chunk_tokens, **options)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_equal_finite_differences(softcap: float | None) -> None:
    tokens, ids = token_ids(), distinct_ids(N, K, V)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        output = support_logprobs(
            hidden, weight, tokens, ids, bias=bias, temperature=0.7, softcap=softcap, logit_scale=0.9, chunk_tokens=3
        )
        return output[:3]

    assert torch.autograd.gradcheck(head, leaves())


def test_weight_tied_to_the_input_embedding_gets_both_gradients() -> None:
    tokens, ids, mixing = token_ids(), distinct_ids(N, K, V), randn(H, H, seed=9)
    weight = leaves()[1]

    def tied(head: Callable[..., HeadOutput], *extra: object) -> Tensor:
        return gradients(head((weight[tokens.flip(0)] @ mixing).tanh(), weight, tokens, ids, *extra), [weight])[0]

    assert_close(tied(support_logprobs), tied(dense, None))


def test_pads_belong_to_no_support_and_get_no_gradient() -> None:
    ids = distinct_ids(N, K, V)
    ids[1, 2:], ids[2, 0], ids[3] = -1, -1, -1  # at the end, at the start, all
    ids[4] = torch.tensor([0, -1, 3, -1])  # token 0 in S next to pads, which must not be taken for token 0
    ids[5] = torch.tensor([-1, 7, -1, 2])  # token 0 outside S next to pads
    tokens = token_ids()
    tokens[3:6] = 0
    hidden, weight, bias = leaves()
    got = support_logprobs(hidden, weight, tokens, ids, bias=bias, chunk_tokens=4)
    expected = dense(hidden, weight, tokens, ids, bias)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    assert_close(got.tail_logprob[3].exp(), torch.ones((), dtype=torch.float64))
    inputs = [hidden, weight, bias]
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(a, b)


def test_gradient_that_arrives_at_a_pad_is_ignored() -> None:
    ids = distinct_ids(N, K, V)
    ids[:, -1] = -1
    hidden, weight, _ = leaves()
    output = support_logprobs(hidden, weight, token_ids(), ids)
    upstream = randn(N, K, seed=8)
    first = torch.autograd.grad(output.support_logprobs, hidden, upstream, retain_graph=True)[0]
    upstream[:, -1] = torch.nan
    assert_close(torch.autograd.grad(output.support_logprobs, hidden, upstream)[0], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_vocabulary_as_support_has_an_empty_tail_and_no_nan(dtype: torch.dtype) -> None:
    hidden, weight, _ = leaves(dtype=dtype)
    tokens, ids = token_ids(), distinct_ids(N, V, V)
    with torch.autograd.set_detect_anomaly(True):
        output = support_logprobs(hidden, weight, tokens, ids)
        assert (output.tail_logprob == -torch.inf).all()
        upstream = [
            torch.full_like(x, 0.5) for x in output[:3]
        ]  # the tail's gradient is dropped, not multiplied by -inf
        got = torch.autograd.grad(output[:3], [hidden, weight], upstream)
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    loss = 0.5 * (logprobs.gather(1, tokens[:, None]).sum() + logprobs.sum())
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close(output.support_logprobs, logprobs.gather(1, ids), tolerance)
    for a, b in zip(got, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert_close(a, b, tolerance)


def test_support_of_no_token_has_the_whole_mass_in_the_tail() -> None:
    hidden, weight, _ = leaves()
    output = support_logprobs(hidden, weight, token_ids(), torch.empty(N, 0, dtype=torch.int64))
    assert output.support_logprobs.shape == (N, 0)
    assert_close(output.tail_logprob, torch.zeros(N, dtype=torch.float64))
    (got,) = torch.autograd.grad(output.token_logprobs.sum() + output.tail_logprob.sum(), hidden)
    dense_token = (hidden @ weight.t()).log_softmax(-1).gather(1, token_ids()[:, None])
    assert_close(got, torch.autograd.grad(dense_token.sum(), hidden)[0])


def test_no_positions_give_empty_outputs_and_zero_gradients() -> None:
    hidden, weight, bias = leaves(n=0)
    output = support_logprobs(hidden, weight, token_ids(0), torch.empty(0, K, dtype=torch.int64), bias=bias)
    assert [tuple(x.shape) for x in output] == [(0,), (0, K), (0,), (0,)]
    got = torch.autograd.grad(sum(x.sum() for x in output[:3]), [hidden, weight, bias])
    assert [x.abs().sum().item() for x in got] == [0.0, 0.0, 0.0]
    assert got[1].shape == (V, H)


@pytest.mark.parametrize("gap", [60.0, 5_000.0])
def test_tail_far_below_the_support_stays_accurate_in_float32(gap: float) -> None:
    logits = torch.tensor([[gap, 1.0, -0.5, 0.25]])  # the tail is tokens 1..3; log(1 - q_0) is -inf in float32
    hidden, weight = logits.clone().requires_grad_(), torch.eye(4)
    output = support_logprobs(hidden, weight, torch.tensor([1]), torch.tensor([[0]]))
    assert_close(output.tail_logprob, logits[:, 1:].logsumexp(-1) - gap, 1e-5)
    (got,) = torch.autograd.grad(output.tail_logprob.sum(), hidden)
    assert_close(got, torch.cat([torch.tensor([[-1.0]]), logits[:, 1:].softmax(-1)], -1), 1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_several_tiles_of_the_vocabulary_equal_dense_autograd(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "MAX_TILE_ELEMENTS", 1)  # the smallest tiles: tokens 0..63, 64..127 and 128..149
    v, k = 150, 70
    ids = distinct_ids(N, k, v)
    ids[0] = torch.arange(k)  # all of the first tile
    ids[1] = torch.arange(v - k, v)  # all of the last one
    ids[2], ids[3, 1:], ids[4, ::2] = -1, -1, -1
    tokens = torch.tensor([0, 63, 64, 127, 128, 149, 5])
    inputs = leaves(v=v)
    hidden, weight, bias = inputs
    options = {"temperature": 0.7, "softcap": softcap, "logit_scale": 0.9}
    got = support_logprobs(hidden, weight, tokens, ids, bias=bias, chunk_tokens=3, **options)
    expected = dense(hidden, weight, tokens, ids, bias, **options)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(a, b)


def test_whole_vocabulary_of_several_tiles_as_support_has_an_empty_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "MAX_TILE_ELEMENTS", 1)
    v = 150
    hidden, weight, _ = leaves(v=v)
    output = support_logprobs(hidden, weight, token_ids(v=v), distinct_ids(N, v, v))
    assert (output.tail_logprob == -torch.inf).all()
    assert_close(output.entropy, dense(hidden, weight, token_ids(v=v), distinct_ids(N, v, v), None).entropy)
    got = torch.autograd.grad(output[:3], [hidden, weight], [torch.full_like(x, 0.5) for x in output[:3]])
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("gap", [60.0, 5_000.0])
def test_tail_of_several_tiles_far_below_the_support_stays_accurate(
    gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "MAX_TILE_ELEMENTS", 1)
    v = 150  # the tail of the last tile is far below that of the first
    logits = torch.linspace(1.0, -30.0, v)
    logits[100] = gap
    hidden, weight = logits[None].requires_grad_(), torch.eye(v)
    output = support_logprobs(hidden, weight, torch.tensor([1]), torch.tensor([[100]]))
    tail = torch.cat([logits[:100], logits[101:]]).detach()
    assert_close(output.tail_logprob, tail.logsumexp(-1, keepdim=True) - gap, 1e-5)
    (got,) = torch.autograd.grad(output.tail_logprob.sum(), hidden)
    expected = tail.softmax(-1)
    assert_close(got[0], torch.cat([expected[:100], torch.tensor([-1.0]), expected[100:]]), 1e-5)


def test_half_precision_matches_float64_on_the_same_numbers() -> None:
    hidden, weight, bias = leaves(dtype=torch.bfloat16)
    tokens, ids = token_ids(), distinct_ids(N, K, V)
    output = support_logprobs(hidden, weight, tokens, ids, bias=bias, chunk_tokens=3)
    assert {x.dtype for x in output} == {torch.float32}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = dense(exact[0], exact[1], tokens, ids, exact[2])
    for a, b in zip(output, expected, strict=True):
        assert_close(a.double(), b, 0.05)
    for a, b in zip(gradients(output, [hidden, weight, bias]), gradients(expected, exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a.double(), b, 0.05)


def test_weight_gradient_of_many_chunks_is_summed_in_float32() -> None:
    n = 512  # times 1/2: a bfloat16 sum would stop growing at 128
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    zeros = torch.zeros(n, dtype=torch.int64)
    output = support_logprobs(hidden, weight, zeros, zeros[:, None], chunk_tokens=1)
    output.token_logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [n / 2, -n / 2]


def test_autocast_changes_neither_forward_nor_backward() -> None:
    hidden, weight, _ = leaves(dtype=torch.float32)
    tokens, ids = token_ids(), distinct_ids(N, K, V)
    plain = support_logprobs(hidden, weight, tokens, ids)
    expected = gradients(plain, [hidden, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = support_logprobs(hidden, weight, tokens, ids)
        got = gradients(output, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip([*output, *got], [*plain, *expected], strict=True))


def test_hidden_states_of_an_autocast_model_meet_float32_weights() -> None:
    hidden, weight = leaves()[0].to(torch.bfloat16), leaves()[1].detach().float().requires_grad_()
    output = support_logprobs(hidden, weight, token_ids(), distinct_ids(N, K, V))
    expected = dense(hidden.double(), weight.double(), token_ids(), distinct_ids(N, K, V), None)
    assert_close(output.token_logprobs.double(), expected.token_logprobs, 0.05)
    assert gradients(output, [weight])[0].dtype == torch.float32


def test_entropy_carries_no_gradient() -> None:
    hidden, weight, _ = leaves()
    output = support_logprobs(hidden, weight, token_ids(), distinct_ids(N, K, V))
    assert [x.requires_grad for x in output] == [True, True, True, False]


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_of_the_entropy_equals_dense_autograd_beside_those_of_the_others(
    options: dict, chunk_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "MAX_TILE_ELEMENTS", 1)  # tokens 0..63, 64..127 and 128..149
    options, v = dict(options), 150
    inputs = leaves(v=v)
    hidden, weight, bias = inputs
    used = bias if options.pop("with_bias") else None
    tokens, ids = token_ids(v=v), distinct_ids(N, K, v)
    ids[2] = -1
    got = support_logprobs(
        hidden, weight, tokens, ids, bias=used, chunk_tokens=chunk_tokens, entropy_gradient=True, **options
    )
    expected = dense(hidden, weight, tokens, ids, used, **options)
    logits = (hidden @ weight.t() + (0 if used is None else used)) * options["logit_scale"]
    if options["softcap"] is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logprobs = (logits / options["temperature"]).log_softmax(-1)
    entropy, weights = -(logprobs.exp() * logprobs).sum(-1), randn(N, seed=11)
    assert_close(got.entropy, entropy)
    wanted = inputs if used is not None else inputs[:2]
    for others in (0.0, 1.0):
        ours = torch.autograd.grad(
            (got.entropy * weights).sum() + others * random_functional(got), wanted, retain_graph=True
        )
        theirs = torch.autograd.grad(
            (entropy * weights).sum() + others * random_functional(expected), wanted, retain_graph=True
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_gradient_of_the_entropy_of_a_nearly_certain_token_is_finite_in_float32() -> None:
    logits = torch.tensor([[5_000.0, 1.0, -5_000.0, 0.25]], requires_grad=True)
    output = support_logprobs(logits, torch.eye(4), torch.tensor([1]), torch.tensor([[0]]), entropy_gradient=True)
    (got,) = torch.autograd.grad(output.entropy.sum(), logits)
    assert_close(got, torch.zeros(1, 4), 1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_input_does_not_need_that_of_the_other(frozen: int) -> None:
    inputs = leaves()[:2]
    inputs[frozen].requires_grad_(False)
    tokens, ids = token_ids(), distinct_ids(N, K, V)
    (got,) = gradients(support_logprobs(*inputs, tokens, ids), [inputs[1 - frozen]])
    (expected,) = gradients(dense(*inputs, tokens, ids, None), [inputs[1 - frozen]])
    assert_close(got, expected)


def test_nothing_of_the_size_of_the_logits_is_saved_for_backward() -> None:
    n, v = 64, 400
    hidden, weight, _ = leaves(n=n, v=v)
    sizes: list[int] = []

    def record(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        support_logprobs(hidden, weight, token_ids(n, v), distinct_ids(n, K, v))
    assert sizes
    assert max(sizes) == v * H < n * v
