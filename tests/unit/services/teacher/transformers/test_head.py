"""Rows of an answer from logits, against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from services.errors import DistillServeError
from services.teacher.jobs import Columns
from services.teacher.transformers import head
from services.teacher.transformers.head import reduce_logits


def reduced(
    logits: list[list[float]],
    targets: list[int],
    top_k: int,
    support: list[list[int]] | None = None,
    temperature: float = 1.0,
) -> Columns:
    columns = Columns.empty(len(logits), top_k, None if support is None else len(support[0]))
    reduce_logits(
        columns,
        slice(0, len(logits)),
        torch.tensor(logits),
        torch.tensor(targets),
        None if support is None else torch.tensor(support),
        temperature=temperature,
    )
    return columns


def test_one_row_worked_by_hand() -> None:
    # p = 1/2, 1/4, 1/8, 1/8; the entropy is 1/2 log 2 + 1/4 log 4 + 2/8 log 8 = 1.75 log 2
    logits = [[math.log(4), math.log(2), 0.0, 0.0]]
    columns = reduced(logits, [1], top_k=2, support=[[3, 0]])
    log2 = math.log(2)
    assert columns.topk_ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(columns.topk_logprobs, [[-log2, -2 * log2]], atol=1e-6)
    np.testing.assert_allclose(columns.token_logprobs, [-2 * log2], atol=1e-6)
    np.testing.assert_allclose(columns.tail_logprobs, [-2 * log2], atol=1e-6)  # 1/8 + 1/8
    np.testing.assert_allclose(columns.entropies, [1.75 * log2], atol=1e-6)
    np.testing.assert_allclose(columns.support_logprobs, [[-3 * log2, -log2]], atol=1e-6)
    np.testing.assert_allclose(columns.support_tail_logprobs, [math.log(3 / 8)], atol=1e-6)


def test_entropy_of_a_uniform_row_is_the_logarithm_of_its_width() -> None:
    np.testing.assert_allclose(reduced([[0.0] * 1000], [0], top_k=1).entropies, [math.log(1000)], rtol=1e-5)


def test_tokens_without_probability_are_safe() -> None:
    # p = 1/2, 1/2, 0, 0, once by masked logits and once by underflow
    columns = reduced([[0.0, 0.0, -math.inf, -math.inf], [0.0, 0.0, -1e4, -1e4]], [2, 2], top_k=2, support=[[2, 3]] * 2)
    assert columns.token_logprobs.tolist() == [-math.inf, pytest.approx(-1e4 - math.log(2))]
    np.testing.assert_allclose(columns.entropies, [math.log(2)] * 2, atol=1e-6)
    assert columns.tail_logprobs.tolist() == [-math.inf, pytest.approx(-1e4)]
    assert columns.support_logprobs is not None and columns.support_logprobs[0].tolist() == [-math.inf] * 2
    np.testing.assert_allclose(columns.support_tail_logprobs, [0.0, 0.0], atol=1e-6)
    for values in vars(columns).values():
        assert not np.isnan(values).any()


def test_a_sure_row_has_no_entropy_and_an_exact_tail() -> None:
    # 1 - exp(-50) is 1 in float32; the tail of three times exp(-50) must survive all the same
    columns = reduced([[50.0, 0.0, 0.0, 0.0]], [0], top_k=1)
    assert 0.0 <= columns.entropies[0] < 1e-6
    np.testing.assert_allclose(columns.tail_logprobs, [math.log(3) - 50], atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DistillServeError, match="not finite"):
        reduced([[0.0, 1.0], [bad, 0.0]], [0, 0], top_k=1)


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([0, 0, 0, 0, 0], 3, [0, 1, 2]),
        ([-1, -3, -1, -2, -1], 4, [0, 2, 4, 3]),
        ([-2, -1, -1, -1], 2, [1, 2]),  # the tie reaches across the cut
        ([-4, -3, -2, -1], 4, [3, 2, 1, 0]),
        ([-math.inf, -1, -math.inf, -2], 3, [1, 3, 0]),
        ([0.0, -1], 1, [0]),
    ],
)
def test_equal_logprobs_are_ordered_by_id(values: list[float], k: int, expected: list[int]) -> None:
    rows = [[float(value) for value in values]] * 2
    assert reduced(rows, [0, 0], top_k=k).topk_ids.tolist() == [expected, expected]


def test_logits_that_become_equal_logprobs_are_ordered_by_id() -> None:
    # float32 tells 0.1 from its successor, but not -99.9 from -99.9 and 7e-9 more
    low = np.float32(0.1)
    high = np.nextafter(low, np.float32(1))
    columns = reduced([[float(low), float(high), 100.0]], [0], top_k=3)
    assert columns.topk_logprobs[0, 1] == columns.topk_logprobs[0, 2]
    assert columns.topk_ids.tolist() == [[2, 0, 1]]


def test_ties_in_a_large_row_do_not_depend_on_topks_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 20, (50, 3000), generator=generator).float().tolist()
    for k in (1, 7, 200, 3000):
        expected = [sorted(range(3000), key=lambda i, row=row: (-row[i], i))[:k] for row in logits]
        assert reduced(logits, [0] * 50, top_k=k).topk_ids.tolist() == expected


def test_the_mass_outside_a_support_by_hand() -> None:
    row = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    for support, mass in (([0, 2], 0.375), ([0, 0], 0.5), ([3, 1, 2, 0], 0.0)):  # a token twice counts once
        tail = reduced([row], [0], top_k=1, support=[support]).support_tail_logprobs
        assert tail is not None and tail[0] == pytest.approx(math.log(mass) if mass else -math.inf)


def test_the_temperature_divides_the_logits() -> None:
    # softmax(log 4 / 2, 0) is 2/3, 1/3
    columns = reduced([[math.log(4), 0.0]], [1], top_k=1, temperature=2.0)
    np.testing.assert_allclose(columns.topk_logprobs, [[math.log(2 / 3)]], atol=1e-6)
    np.testing.assert_allclose(columns.token_logprobs, [math.log(1 / 3)], atol=1e-6)


def test_positions_that_are_reduced_in_groups_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(11, 40, generator=generator).tolist()
    targets, support = list(range(11)), [[row, 39 - row] for row in range(11)]
    whole = reduced(logits, targets, 5, support)
    monkeypatch.setattr(head, "_CPU_GROUP_ELEMENTS", 3 * 40)
    for name, values in vars(reduced(logits, targets, 5, support)).items():
        np.testing.assert_array_equal(values, getattr(whole, name), err_msg=name)
