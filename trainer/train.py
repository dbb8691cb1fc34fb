"""The algorithm: on-policy distillation, a step at a time.

    produce():  prompts ─► rollout servers ─► teacher ─► buffer        waits for a free slot, then for the servers
    consume():  buffer ─► loss ─► optimizer ─► push weights            waits for a batch, then for the push
                                                  └─► frees a slot     unblocks produce()

`StalenessBuffer` alone decides how far the two may be apart; with max_staleness 0 they take turns, and an
asynchronous run is the same two tasks with more slots.
"""

import asyncio
import time

from services.config import RunConfig
from services.errors import DistillServeError
from services.process.signals import Interruption
from services.wire.batch import decode_batch, encode_batch
from trainer.batch import collect
from trainer.output.report import Summary
from trainer.rollouts import completion_metrics, generate_rollouts, training_sampling
from trainer.session import Session, open_session
from trainer.teacher_scores import score_rollouts


async def train(config: RunConfig, interruption: Interruption | None = None) -> Summary:
    """Run the whole job; the servers must be up or coming up.

    However it ends after the first step, short of being killed, the student of the last finished step is in output.dir.

    Args:
        interruption: signals that are to end the run in order.

    Raises:
        DistillServeError: whatever a user can act on, see services/errors.py; the run is complete if it is an
            EvaluationError.
    """
    async with open_session(config, interruption) as run:
        with run.saving_the_student():
            await run.begin()
            before = await run.evaluate(step=0)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(produce(run))
                    tasks.create_task(consume(run))
            except* DistillServeError as group:
                raise group.exceptions[0] from None
        after = await run.evaluate(step=run.num_steps)
        return run.finish(before, after)


async def produce(run: Session) -> None:
    """Fill the buffer: one scored batch per slot."""
    config = run.config
    sampling = training_sampling(config.sampling)
    for _ in range(run.num_steps):
        await run.buffer.slot()
        prompts = run.prompts.take(config.pipeline.prompts_per_step)
        started = time.monotonic()
        rollouts, aborted = await generate_rollouts(
            run.rollout_client, prompts, sampling, config.pipeline.samples_per_prompt, run.support.student_top_k
        )
        generated = time.monotonic()
        samples, quarantined = await score_rollouts(
            run.teachers, rollouts, support=run.support, temperature=config.loss.kd_temperature
        )
        quarantined = aborted + quarantined
        run.quarantine.add(quarantined, len(rollouts) + len(aborted))
        metrics = completion_metrics(rollouts, run.record.token) | {
            "rollout_s": generated - started,
            "teacher_s": time.monotonic() - generated,
            "num_quarantined": len(quarantined),
        }
        versions = [run.weights.versions.oldest([sample.rollout.completion]) for sample in samples]
        batch = encode_batch(collect(samples, versions, metrics))
        run.buffer.put(batch, run.weights.versions.oldest(rollout.completion for rollout in rollouts))


async def consume(run: Session) -> None:
    """Drain the buffer: one optimizer step and one weight push per batch."""
    for step in range(1, run.num_steps + 1):
        document, staleness = await run.buffer.get()
        batch = decode_batch(document)
        started = time.monotonic()
        metrics = await run.to_the_end(run.learner.step, batch)
        trained = time.monotonic()
        run.students.step_finished(step)
        pushed = await run.publish(step)
        run.buffer.weights_live(step)
        run.record_step(step, batch, metrics | pushed, staleness=staleness, train_s=trained - started)
        if run.evaluates_at(step):
            await run.evaluate(step)
