"""The learner of rank 0: what it is asked, the learners of all ranks do."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from services.config import RunConfig
from services.errors import ERROR_PREFIX, RankLostError
from services.process.signals import Interrupted, Interruption
from services.wire.batch import TrainingBatch, encode_batch
from trainer.checkpoint.folder import Checkpoint
from trainer.learner import Captured, Learner
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.ranks.channel import Followers
from trainer.ranks.group import Ranks, check_together
from trainer.student import Student
from trainer.weights.snapshot import GivenTokens, StudentState, WeightSnapshot

logger = logging.getLogger(__name__)

# A collective over gloo ends by itself when a rank dies; one over nccl may never.
_STUCK_S = 8.0


def load_call(config: RunConfig, checkpoint: Path | None) -> bytes:
    """What the other ranks are told to load."""
    where = None if checkpoint is None else str(checkpoint)
    return json.dumps({"config": config.model_dump(mode="json"), "checkpoint": where}).encode()


class LeadingLearner(Learner):
    """Rank 0's.

    Args:
        rescue: saves a state of the student, from another thread, where this one cannot be waited for.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        num_steps: int,
        ranks: Ranks,
        followers: Followers,
        interruption: Interruption,
        rescue: Callable[[StudentState], object],
        reference: Student | None = None,
        optimizers: OwnOptimizers = DEFAULT,
    ) -> None:
        check = partial(check_together, ranks, interruption)
        super().__init__(config, student, num_steps, ranks, check, reference, optimizers)
        self._followers, self._interruption, self._rescue = followers, interruption, rescue
        self._is_called = False
        self._is_broken = False
        followers.on_lost.append(self._leave_if_stuck)
        followers.send("learn", json.dumps(num_steps).encode())

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        with self._called("step", encode_batch(batch)):
            return super().step(batch)

    def logprobs(self, given: GivenTokens) -> list[np.ndarray]:
        with self._called("logprobs", given.to_json()):
            return super().logprobs(given)

    def reverse_kl(self, batch: TrainingBatch) -> list[tuple[float, int]]:
        with self._called("reverse_kl", encode_batch(batch)):
            return super().reverse_kl(batch)

    def snapshot(self, version: int, dtype: torch.dtype, canary: GivenTokens) -> WeightSnapshot:
        document = json.dumps([version, str(dtype).removeprefix("torch."), canary.prompts, canary.completions])
        with self._called("snapshot", document.encode()):
            return super().snapshot(version, dtype, canary)

    def state(self) -> StudentState:
        """As `Learner.state`; of the last version that was pushed, where the ranks have lost one another."""
        if not self._is_broken and self._followers.lost is None:
            try:
                with self._called("state"):
                    return super().state()
            except RankLostError as error:
                logger.debug("the student cannot be gathered: %s", error)
        return self.last_pushed()

    @property
    def can_be_captured(self) -> bool:
        return super().can_be_captured and not self._is_broken and self._followers.lost is None

    def capture(self, folder: Path) -> Captured:
        with self._called("capture", str(folder).encode()):
            return super().capture(folder)

    def wait_for_parts(self, folder: Path) -> None:
        self._followers.wait_for_parts(str(folder))

    def rehearse_parts(self, folder: Path) -> None:
        with self._called("rehearse", str(folder).encode()):
            self.wait_for_parts(folder)

    def resume(self, checkpoint: Checkpoint) -> None:
        with self._called("resume", json.dumps([str(checkpoint.path), checkpoint.step, checkpoint.num_ranks]).encode()):
            super().resume(checkpoint)

    @contextmanager
    def _called(self, name: str, document: bytes = b"") -> Iterator[None]:
        """All ranks do the same inside the block; what a call asks for by itself, the others do by themselves."""
        if self._is_called:
            yield
            return
        self._is_called = True
        try:
            with self._interruption.deferring(), self._followers.blaming():
                self._followers.send(name, document)
                yield
        except BaseException as error:
            # An interruption is agreed upon with the others; after anything else they may be elsewhere.
            self._is_broken = not isinstance(error, Interrupted)
            raise
        finally:
            self._is_called = False

    def _leave_if_stuck(self, error: RankLostError) -> None:
        """A rank is lost: end this process where a collective keeps it, once the student is saved."""
        timer = threading.Timer(_STUCK_S, self._leave, (error,))
        timer.daemon = True
        timer.start()

    def _leave(self, error: RankLostError) -> None:
        if not self._is_called:
            return
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
        try:
            self._rescue(self.last_pushed())
        finally:
            os._exit(error.exit_code)
