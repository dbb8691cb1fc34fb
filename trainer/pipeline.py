"""Prompts to batches, beside the learner and in an event loop of its own.

    slot ─► rollout servers ─► teachers, rewards ─► batch ─► StalenessBuffer ─► next()
     └────────────────────────────────────────────────────────────────────────── publish()

consumes   the next prompts of the data
produces   for each step one document (services/wire/batch.py)
waits for  a slot of the buffer, which a push frees; then for the servers
"""

import asyncio
import time
from collections.abc import Callable

from services.clients import RolloutClient
from services.clients.base import all_or_first_error
from services.config import RunConfig
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
        self._buffer: StalenessBuffer[bytes] = StalenessBuffer(config.pipeline.max_staleness)
        self._producing: asyncio.Task[None] | None = None

    async def next(self) -> bytes:
        """The batch of the next step. Production starts at the first call.

        Raises:
            PeerError: a server failed, or sampled under weights that were not live.
            OutputError: what is set aside cannot be written down.
        """
        if self._producing is None:
            self._producing = asyncio.create_task(self._produce())
            # asyncio prints an error that nobody has asked for, and a run may end without asking
            self._producing.add_done_callback(lambda task: task.cancelled() or task.exception())
        batch = asyncio.create_task(self._buffer.get())
        try:
            await asyncio.wait({batch, self._producing}, return_when=asyncio.FIRST_COMPLETED)
            if self._producing.done() and (error := self._producing.exception()) is not None:
                raise error
            return await batch
        finally:
            batch.cancel()

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
        )

    async def _make_batch(self, step: int) -> None:
        """Generate and score the next prompts; completions go to the teachers as they arrive.

        What a batch has used of the data is written down in it: a batch that is made ahead and never trained on has used nothing.
        """
        start = self._prompts.position
        placed = self._prompts.take_placed(self._config.pipeline.prompts_per_step)
        after, prompts = self._prompts.position, [prompt for _, prompt in placed]
        arriving: asyncio.Queue[PromptGroup | None] = asyncio.Queue()
        groups: list[PromptGroup] = []
        pipeline, scoring = self._config.pipeline, self._scoring
        started, busy_s, times = time.monotonic(), scoring.busy_s, {}
        rewards = scoring.rewards
        rewarding_s = 0.0 if rewards is None else rewards.busy_s

        async def generate() -> None:
            groups.extend(await self._generate(prompts, arriving.put_nowait))
            times["rollout_s"] = time.monotonic() - started
            arriving.put_nowait(None)

        await all_or_first_error([generate(), scoring.score_arriving(arriving, step)])
        times["teacher_s"] = scoring.busy_s - busy_s
        if rewards is not None:
            times["reward_s"] = rewards.busy_s - rewarding_s
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        quarantined = [item for group in groups for item in group.quarantined]
        self._quarantine.add(quarantined, len(prompts) * pipeline.samples_per_prompt, step)
        metrics = completion_metrics(rollouts, self._spell) | times | {"num_quarantined": len(quarantined)}
        windows, texts = [], (0, 0)
        if self._texts is not None:
            of_texts = self._texts.position
            windows, texts = self._texts.take(pipeline.texts_per_step), (of_texts, self._texts.position)
        batch = collect(groups, metrics, windows, self._config.reward.names)
        batch.metrics.update(reward_metrics(batch, self._config.reward))
        batch.used.update(used((start, after), texts, [position for position, _ in placed], groups))
        self._buffer.put(encode_batch(batch), batch.policy_versions.tolist())
