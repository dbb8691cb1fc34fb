"""Sequences to padded rows: what is predicted, from which position, and which sequences share a forward pass."""

import pytest
import torch

from services.models.padding import cut_by_padded_tokens, pad_sequences


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
