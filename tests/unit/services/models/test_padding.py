"""Sequences to padded rows: what is predicted, from which position, and which sequences share a forward pass."""

import numpy as np
import pytest
import torch

from services.models.padding import cut_by_padded_tokens, cut_for_ranks, pad_sequences, share_out


def test_tokens_behind_the_prompts_are_predicted_by_the_positions_before_them() -> None:
    batch = pad_sequences([[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]], prompt_lengths=[2, 1, 1])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12], [13, 14, 0, 0, 0]]
    assert batch.positions.tolist() == [1, 5, 6, 7, 8, 10]
    assert batch.token_ids.tolist() == [7, 9, 10, 11, 12, 14]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_every_sequence_has_a_prompt() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pad_sequences([[5, 6], [7, 8]], prompt_lengths=[1])


def test_padded_size_stays_below_the_limit_and_nothing_is_lost() -> None:
    lengths = [5, 9, 1, 9, 3, 40, 2]
    groups = cut_by_padded_tokens(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 20


def test_a_group_of_its_own_costs_less_than_much_padding() -> None:
    assert cut_by_padded_tokens([10, 8, 7], 1000, most_padding=5) == [[0, 1, 2]]  # 2 and 3 tokens of padding
    assert cut_by_padded_tokens([10, 8, 7], 1000, most_padding=4) == [[0, 1], [2]]
    assert cut_by_padded_tokens([10, 9, 7, 6], 1000, most_padding=2) == [[0, 1], [2, 3]]  # counted anew in each group


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_have_nearly_the_same_number_of_tokens(num_ranks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(5.5, 0.8, 64 * num_ranks), 8, 4096).astype(int).tolist()
    shares = share_out(lengths, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    tokens = [sum(lengths[index] for index in share) for share in shares]
    assert max(tokens) <= 1.05 * sum(tokens) / num_ranks
    # What is padded, and waits for the slowest at every micro-batch, is as even.
    cut = [cut_for_ranks(lengths, 16_384, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(groups) for groups in cut}) == 1
    padded = [sum(len(group) * max((lengths[i] for i in group), default=1) for group in groups) for groups in cut]
    assert max(padded) <= 1.1 * sum(padded) / num_ranks


def test_a_rank_without_sequences_has_as_many_groups() -> None:
    lengths = [9, 3, 3]
    assert [cut_for_ranks(lengths, 3, rank, 3) for rank in range(3)] == [[[0]], [[1]], [[2]]]
    assert [cut_for_ranks(lengths, 6, rank, 2) for rank in range(2)] == [[[0]], [[1, 2]]]
    assert [cut_for_ranks(lengths, 3, rank, 2) for rank in range(2)] == [[[0], []], [[1], [2]]]
    assert [cut_for_ranks([4], 3, rank, 2) for rank in range(2)] == [[[0]], [[]]]
    assert [cut_for_ranks([], 3, rank, 2) for rank in range(2)] == [[], []]


def test_no_sequences_are_a_row_of_padding() -> None:
    padded = pad_sequences([], [])
    assert padded.input_ids.shape == (1, 1) and len(padded.positions) == len(padded.token_ids) == 0
    assert padded.lengths.tolist() == [1]
