"""Rewards of a step's completions to one number each, to advantages, and to metrics.

Shape legend: B completions, F functions.
"""

import math
from typing import Literal

import numpy as np
import torch

from services.config import RewardConfig
from services.errors import PeerError
from services.wire.batch import TrainingBatch
from trainer.loss import reward_advantages


def total_rewards(rewards: np.ndarray, weights: list[float]) -> np.ndarray:
    """[B] weighted sums of the rewards [B, F] of the functions that apply; NaN where none with a weight does."""
    applies = ~np.isnan(rewards)
    sums = np.where(applies, rewards, 0.0) @ np.array(weights, np.float64)
    return np.where((applies & (np.array(weights) != 0)).any(-1), sums, np.nan)


def advantages(batch: TrainingBatch, config: RewardConfig, truncated: Literal["train", "mask", "drop"]) -> torch.Tensor:
    """[B] float64 advantages of the batch's rewards, each compared within its group over the whole step.

    A completion to which no function applies has no reward: its advantage is 0, and the others are not compared with it.

    Args:
        truncated: with "drop" the others are not compared with truncated completions either.

    Raises:
        PeerError: the batch holds no rewards, or those of other functions.
    """
    if batch.rewards is None or batch.reward_names != config.names:
        raise PeerError(
            f"the batch holds rewards of {batch.reward_names}, but reward.functions are {config.names}; replay it with the "
            "functions it was recorded with"
        )
    totals = total_rewards(batch.rewards, config.function_weights)
    counts = ~np.isnan(totals)
    if truncated == "drop":
        counts &= ~batch.truncated
    _, group_ids = np.unique(batch.groups[counts], return_inverse=True)
    found = torch.zeros(len(batch), dtype=torch.float64)
    compared = reward_advantages(torch.from_numpy(totals[counts]), torch.from_numpy(group_ids), config.advantage)
    found[torch.from_numpy(counts)] = compared
    return found


def reward_metrics(batch: TrainingBatch, config: RewardConfig) -> dict[str, float]:
    """Mean and standard deviation (divided by their number) of the totals and of each function's rewards, and the share of
    groups whose rewards are all equal, which teach nothing when compared; without what nothing is known of."""
    if batch.rewards is None:
        return {}
    totals = total_rewards(batch.rewards, config.function_weights)
    found = _mean_and_std("reward", totals)
    for name, column in zip(batch.reward_names, batch.rewards.T, strict=True):
        found |= _mean_and_std(f"rewards/{name}", column)
    spreads = [
        np.ptp(of_group) for place in np.unique(batch.groups) if len(of_group := _known(totals[batch.groups == place]))
    ]
    if spreads:
        found["reward_equal_groups_fraction"] = float(np.mean([spread == 0 for spread in spreads]))
    return found


def _known(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[~np.isnan(values)]
    return found


def _mean_and_std(name: str, values: np.ndarray) -> dict[str, float]:
    known = _known(values)
    if not len(known):
        return {}
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = {f"{name}_mean": float(known.mean()), f"{name}_std": float(known.std())}
    return {key: number for key, number in numbers.items() if math.isfinite(number)}
