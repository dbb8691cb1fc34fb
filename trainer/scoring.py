"""Groups of completions to scored groups: the one place where it is said how good a completion is.

consumes   PromptGroup, as soon as its last sample has arrived
produces   the same group with a score for each sample; what cannot be scored is quarantined
waits for  the teachers, and beside them the reward functions, which get whole groups
"""

import asyncio
import time
from dataclasses import replace

from services.clients.base import all_or_first_error
from trainer.groups import PromptGroup, Quarantined
from trainer.rewards.of_groups import GroupRewards
from trainer.teacher_scores import Support, score_rollouts
from trainer.teachers import Teachers


class Scoring:
    """Scores groups, those that wait at a time in one request.

    Args:
        temperature: of the teachers' distributions.
        rewards: besides the teachers' scores, where there are any.
        probe_every_steps: steps after which the teachers' probes are due; 0: never.

    Attributes:
        busy_s: seconds in which scores were waited for, of all groups so far.
    """

    def __init__(
        self,
        teachers: Teachers,
        support: Support,
        temperature: float,
        rewards: GroupRewards | None = None,
        probe_every_steps: int = 0,
    ) -> None:
        self._probe_every_steps = probe_every_steps
        self._teachers, self.support, self._temperature = teachers, support, temperature
        self.rewards = rewards
        self.busy_s = 0.0

    async def score(self, groups: list[PromptGroup], step: int = 0) -> None:
        """Fill in the samples of each group.

        Args:
            step: whose batch they are for, as reward functions are told.

        Raises:
            PeerError: a teacher failed.
            RewardError: a reward function failed.
        """
        rewarding = [] if self.rewards is None else [self.rewards.fill_in(groups, step)]
        await all_or_first_error([self._ask_teachers(groups), *rewarding])
        if self.rewards is not None:
            for group in groups:
                _join_rewards(group)

    async def _ask_teachers(self, groups: list[PromptGroup]) -> None:
        started = time.monotonic()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scored = iter(
            await score_rollouts(self._teachers, rollouts, support=self.support, temperature=self._temperature)
        )
        for group in groups:
            for _ in group.rollouts:
                found = next(scored)
                if isinstance(found, Quarantined):
                    group.quarantined.append(found)
                else:
                    group.samples.append(found)
        self.busy_s += time.monotonic() - started

    async def score_arriving(self, arriving: "asyncio.Queue[PromptGroup | None]", step: int = 0) -> None:
        """Score what arrives for a step until None does.

        While a request is under way groups gather for the next one: the teachers work beside the rollout servers, and on
        as much at once as there is.
        """
        if self._probe_every_steps and step % self._probe_every_steps == 0:
            self._teachers.distrust()
        has_ended = False
        while not has_ended:
            waiting = [await arriving.get()]
            while not arriving.empty():
                waiting.append(arriving.get_nowait())
            has_ended = waiting[-1] is None
            if groups := [group for group in waiting if group is not None]:
                await self.score(groups, step)


def _join_rewards(group: PromptGroup) -> None:
    """Put the rewards of a group's rollouts to those of them that the teacher could score."""
    of_rollout = {id(rollout): rewards for rollout, rewards in zip(group.rollouts, group.rewards, strict=True)}
    group.samples = [replace(sample, rewards=of_rollout[id(sample.rollout)]) for sample in group.samples]
