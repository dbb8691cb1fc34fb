"""Prompts to batches, beside the learner and in an event loop of its own.

    slot ─► rollout servers ─► teachers, rewards ─► groups ─► StalenessBuffer ─► next()
     └────────────────────────────────────────────────────────────────────────── publish()

consumes   the next prompts of the data
produces   for each step one document (services/wire/batch.py)
waits for  a slot of the buffer, which a push frees; then for the servers, which may need a push as well (`next` says so)
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from services.clients import RolloutClient
from services.clients.base import all_or_first_error
from services.config import RunConfig
from services.errors import DistillServeError
from services.process.waiting import on_behalf_of
from services.wire.batch import encode_batch
from trainer.batch import collect
from trainer.checkpoint.journal import used
from trainer.data.prompts import Prompt
from trainer.data.stream import RowStream
from trainer.groups import PromptGroup
from trainer.rewards.totals import reward_metrics
from trainer.rollout_function import OwnRollouts
from trainer.rollouts import completion_metrics, generate_groups, training_sampling
from trainer.scoring import Scoring
from trainer.staleness_buffer import StalenessBuffer
from trainer.teacher_scores import Quarantine
from trainer.weights.snapshot import WeightSnapshot
from trainer.weights.weight_sync import WeightSync

logger = logging.getLogger(__name__)

Times: TypeAlias = dict[str, float]
"""Seconds, by the name of the metric."""

# Tries to make the groups of a step, where our own code fails.
_MOST_TRIES = 3


@dataclass
class _Batch:
    """The groups of a step, until it is trained on (staleness_buffer.py, `Aged`).

    Attributes:
        windows: of text.
        of_prompts, of_texts: positions of the data before and after the step.
        positions: of its prompts, by place.
        num_stale: completions that were too old, and made again.
    """

    step: int
    groups: list[PromptGroup]
    times: Times
    windows: list[list[int]]
    remake: Callable[[int, list[Prompt]], Awaitable[tuple[list[PromptGroup], Times]]]
    of_prompts: tuple[int, int]
    of_texts: tuple[int, int]
    positions: list[int]
    num_stale: int = 0
    dropped: list[PromptGroup] = field(default_factory=list)

    def versions(self) -> Sequence[Collection[int]]:
        return [{rollout.policy_version for rollout in group.rollouts} for group in self.groups]

    async def renew(self, places: list[int]) -> None:
        old = [self.groups[place] for place in places]
        num_stale = sum(len(group.rollouts) for group in old)
        text = "step %d: %d completions are too old to be trained on; their %d prompts are completed again"
        logger.warning(text, self.step, num_stale, len(old))
        fresh, times = await self.remake(self.step, [group.prompt for group in old])
        for name, seconds in times.items():
            self.times[name] += seconds
        self.num_stale += num_stale
        self.dropped += old
        for place, group in zip(places, fresh, strict=True):
            group.place = place
            self.groups[place] = group


class Pipeline:
    """Makes the batches of a run, as far ahead as the buffer lets it.

    Args:
        prompts: of the data, in the order of the run.
        weights: pushes them.
        spell: a token as text, for the names of metrics.
        texts: windows of data.lm_path, whose cross-entropy is learned as well.
        own_rollouts: asked for completions in the place of `client`.
        finished_step: after which the run goes on; the streams are at what comes then.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: RowStream[Prompt],
        num_steps: int,
        client: RolloutClient,
        weights: WeightSync,
        scoring: Scoring,
        quarantine: Quarantine,
        spell: Callable[[int], str],
        texts: RowStream[list[int]] | None = None,
        own_rollouts: OwnRollouts | None = None,
        finished_step: int = 0,
    ) -> None:
        self._config, self._prompts, self._num_steps, self._client = config, prompts, num_steps, client
        self._weights, self._scoring, self._quarantine, self._spell = weights, scoring, quarantine, spell
        self._texts, self._own_rollouts, self._finished_step = texts, own_rollouts, finished_step
        self._sampling = training_sampling(config.sampling)
        self._buffer: StalenessBuffer[_Batch] = StalenessBuffer(config.pipeline.max_staleness)
        self._producing: asyncio.Task[None] | None = None

    async def next(self) -> bytes | None:
        """The batch of the next step; None: the rollout servers want the weights of the last one once more, then ask again.

        Production starts at the first call.

        Raises:
            PeerError: a server failed, or sampled under weights that were not live.
            OutputError: what is set aside cannot be written down.
        """
        if self._producing is None:
            self._producing = asyncio.create_task(self._produce())
            # asyncio prints an error that nobody has asked for, and a run may end without asking
            self._producing.add_done_callback(lambda task: task.cancelled() or task.exception())
        batch = asyncio.create_task(self._buffer.get())
        wanted = asyncio.create_task(self._client.group.weights_wanted.wait())
        try:
            waiting: set[asyncio.Task[Any]] = {batch, wanted, self._producing}
            while not (batch.done() or wanted.done()):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._producing.done():
                    self._producing.result()
                    waiting.discard(self._producing)
            return self._document(await batch) if batch.done() else None
        finally:
            batch.cancel()
            wanted.cancel()
            await asyncio.wait({batch, wanted})

    async def publish(self, snapshot: WeightSnapshot) -> dict[str, float]:
        """As WeightSync.publish; then one more batch may be made."""
        pushed = await self._weights.publish(snapshot)
        self._buffer.weights_live(snapshot.version)
        return pushed

    async def close(self) -> None:
        """Give up the batch that is being made."""
        if self._producing is not None:
            self._producing.cancel()
            await asyncio.wait({self._producing})

    async def _produce(self) -> None:
        for step in range(self._finished_step + 1, self._num_steps + 1):
            await self._buffer.slot()
            with on_behalf_of(f"step {step}"):
                await self._make_batch(step)

    async def _generate(self, prompts: list[Prompt], on_group: Callable[[PromptGroup], None]) -> list[PromptGroup]:
        samples = self._config.pipeline.samples_per_prompt
        if self._own_rollouts is not None:
            return await self._own_rollouts.generate_groups(prompts, self._sampling, samples, on_group)
        return await generate_groups(
            self._client,
            prompts,
            self._sampling,
            self._weights.versions,
            samples_per_prompt=samples,
            student_top_k=self._scoring.support.student_top_k,
            on_group=on_group,
            waits_for_weights=True,
        )

    async def _make_batch(self, step: int) -> None:
        """What a batch has used of the data is written down in it: one that is made ahead and never trained on has used nothing."""
        start = self._prompts.position
        placed = self._prompts.take_placed(self._config.pipeline.prompts_per_step)
        of_prompts = start, self._prompts.position
        groups, times = await self._make_groups(step, [prompt for _, prompt in placed])
        windows: list[list[int]] = []
        of_texts = (0, 0)
        if self._texts is not None:
            start = self._texts.position
            windows, of_texts = self._texts.take(self._config.pipeline.texts_per_step), (start, self._texts.position)
        positions = [position for position, _ in placed]
        self._buffer.put(_Batch(step, groups, times, windows, self._make_groups, of_prompts, of_texts, positions))

    async def _make_groups(self, step: int, prompts: list[Prompt]) -> tuple[list[PromptGroup], Times]:
        """A scored group of each prompt, and the seconds that it took. Where our own code fails, what is missing is made again.

        Raises:
            DistillServeError: a server or a function failed.
            Exception: our own code failed twice in the same way.
        """
        times: Times = defaultdict(float)
        done: dict[int, PromptGroup] = {}
        last = ""
        for number in range(_MOST_TRIES):
            places = [place for place in range(len(prompts)) if place not in done]
            made: list[PromptGroup] = []
            try:
                await self._generate_and_score(step, [prompts[place] for place in places], made, times)
            except DistillServeError:
                raise
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                if said == last or number + 1 == _MOST_TRIES:
                    raise
                made, last = [group for group in made if self._is_whole(group)], said
                text = "step %d: %s; %d prompts are completed again"
                logger.warning(text, step, said, len(places) - len(made), exc_info=True)
            for group in made:
                group.place = places[group.place]
                done[group.place] = group
            if len(done) == len(prompts):
                break
        return [done[place] for place in range(len(prompts))], times

    def _is_whole(self, group: PromptGroup) -> bool:
        """Whether each of its samples is scored, or set aside."""
        is_rewarded = self._scoring.rewards is None or all(sample.rewards for sample in group.samples)
        num_settled = len(group.samples) + len(group.quarantined)
        return is_rewarded and num_settled == self._config.pipeline.samples_per_prompt

    async def _generate_and_score(
        self, step: int, prompts: list[Prompt], made: list[PromptGroup], times: Times
    ) -> None:
        """Add groups to `made` as they arrive; they go to the teachers at once."""
        arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
        scoring, rewards = self._scoring, self._scoring.rewards
        started, busy_s = time.monotonic(), scoring.busy_s
        rewarding_s = 0.0 if rewards is None else rewards.busy_s

        def arrive(group: PromptGroup) -> None:
            made.append(group)
            arriving.put_nowait(group)

        async def generate() -> None:
            await self._generate(prompts, arrive)
            times["rollout_s"] += time.monotonic() - started
            arriving.put_nowait(None)

        await all_or_first_error([generate(), scoring.score_arriving(arriving, step)])
        times["teacher_s"] += scoring.busy_s - busy_s
        if rewards is not None:
            times["reward_s"] += rewards.busy_s - rewarding_s

    def _document(self, made: _Batch) -> bytes:
        """What the learner gets of a batch.

        Raises:
            PeerError: too much of it was set aside.
            OutputError: that cannot be written down.
        """
        groups, pipeline = made.groups, self._config.pipeline
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        quarantined = [item for group in [*groups, *made.dropped] for item in group.quarantined]
        num_samples = (len(groups) + len(made.dropped)) * pipeline.samples_per_prompt
        self._quarantine.add(quarantined, num_samples, made.step)
        counts = {"num_quarantined": len(quarantined), "num_stale": made.num_stale}
        metrics = completion_metrics(rollouts, self._spell) | dict(made.times) | counts
        batch = collect(groups, metrics, made.windows, self._config.reward.names)
        batch.metrics.update(reward_metrics(batch, self._config.reward))
        batch.used.update(used(made.of_prompts, made.of_texts, made.positions, groups, made.dropped))
        return encode_batch(batch)
