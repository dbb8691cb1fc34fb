"""What every rank but the first does: as rank 0 says, call after call."""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from services.config import RunConfig
from services.config.output_dir import read_state
from services.errors import ERROR_PREFIX, RankLostError
from services.models.causal_lm import load_tokenizer
from services.process.signals import ENDING, handling
from services.wire.batch import decode_batch
from trainer.checkpoint.block import Block
from trainer.checkpoint.folder import Checkpoint, write_part
from trainer.learner import Learner
from trainer.output.saving import SavedStudents
from trainer.own_optimizers import DEFAULT, OwnOptimizers
from trainer.parallel import load_reference, load_student_of
from trainer.ranks.channel import Leader
from trainer.ranks.group import GivenUp, Ranks, check_together, is_of_ranks
from trainer.student import Student
from trainer.weights.snapshot import GivenTokens

logger = logging.getLogger(__name__)

# Later than in leading.py: where rank 0 lives, it is the one that saves and tells.
_STUCK_S = 12.0
# What rank 0 may take to tell why a collective has failed.
_REASON_S = 3.0


def follow(ranks: Ranks, optimizers: OwnOptimizers = DEFAULT) -> None:
    """Do what rank 0 asks, until it says that it is over.

    Args:
        optimizers: those of rank 0; a function does not travel.

    Raises:
        RankLostError: rank 0 was killed; the student of the last version that was pushed is saved, by one rank of its machine.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    follower = _Follower(ranks, optimizers)
    with handling(lambda number, frame: follower.leader.tell_signal(number), *ENDING):
        follower.run()


class _Follower:
    def __init__(self, ranks: Ranks, optimizers: OwnOptimizers) -> None:
        self._ranks, self._optimizers = ranks, optimizers
        self._config = RunConfig()
        self._student: Student | None = None
        self._reference: Student | None = None
        self._learner: Learner | None = None
        self._is_called = False
        self._is_over = threading.Event()
        self.leader = Leader(ranks, self._hear_of_end)

    def run(self) -> None:
        try:
            while (call := self.leader.next()) is not None:
                self._do(call.name, call.document)
        except Exception as error:
            is_cause = not is_of_ranks(error)
            if is_cause or not self._is_over.wait(_REASON_S):
                self.leader.tell_failure(str(error) or type(error).__name__, is_cause=is_cause)
                raise
        if self.leader.is_lost:
            self._rescue()
            raise self._lost()

    def _do(self, name: str, document: bytes) -> None:
        self._is_called = True
        try:
            if name == "load":
                given = json.loads(document)
                self._config = RunConfig.model_validate(given["config"], context={"role": None})
                checkpoint = given["checkpoint"]
                self._student = load_student_of(self._config, self._ranks, checkpoint and Path(checkpoint))
                self._reference = load_reference(self._config, self._ranks)
            elif name == "learn":
                assert self._student is not None, "load comes first"
                check = partial(check_together, self._ranks)
                arguments = (self._config, self._student, json.loads(document), self._ranks, check)
                self._learner = Learner(*arguments, self._reference, self._optimizers)
            elif name == "capture":
                self._capture(Path(document.decode()))
            elif name == "rehearse":
                self._write_part(Path(document.decode()), {}, {})
            else:
                assert self._learner is not None, "learn comes first"
                _CALLS[name](self._learner, document)
        except GivenUp:
            logger.debug("rank 0 has given up a %s", name)
        finally:
            self._is_called = False

    def _capture(self, folder: Path) -> None:
        """Copy this rank's part of a checkpoint, and write it while the next calls are done."""
        assert self._learner is not None, "learn comes first"
        state = self._learner.capture(folder).state
        arguments = (folder, state.tensors, state.blocks)
        threading.Thread(target=self._write_part, args=arguments, name="checkpoint", daemon=True).start()

    def _write_part(self, folder: Path, tensors: Mapping[str, Any], blocks: Mapping[str, Block]) -> None:
        problem = None
        try:
            write_part(folder, self._ranks.index, tensors, blocks)
        except Exception as error:
            problem = str(error)
        self.leader.tell_written(str(folder), problem)

    def _hear_of_end(self) -> None:
        """In another thread: this process must not wait in a collective that never ends."""
        self._is_over.set()
        timer = threading.Timer(_STUCK_S, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        if not self._is_called:
            return
        try:
            if self.leader.is_lost:
                print(f"{ERROR_PREFIX}{self._lost()}", file=sys.stderr, flush=True)
                self._rescue()
        finally:
            os._exit(RankLostError.exit_code if self.leader.is_lost else 0)

    def _lost(self) -> RankLostError:
        return RankLostError("rank 0 was killed, or lost its connection")

    def _rescue(self) -> None:
        """Save what rank 0 cannot save any more, unless another rank does."""
        if self._learner is None or not (state := self._learner.last_pushed()).step or not self._learner.claims_copy():
            return
        student = self._config.student
        tokenizer = load_tokenizer(student.model or "", trust_remote_code=student.trust_remote_code)
        logging.getLogger().setLevel(logging.INFO)
        model: Any = self._learner.student.model
        model.should_save_on_this_rank = lambda is_main_process: True  # transformers lets rank 0 alone
        SavedStudents(self._config.output, model, tokenizer, has_begun=True).save(state)


def _snapshot(learner: Learner, document: bytes) -> None:
    version, dtype, *canary = json.loads(document)
    learner.snapshot(version, getattr(torch, dtype), GivenTokens(*canary))


def _resume(learner: Learner, document: bytes) -> None:
    path, step, num_ranks = json.loads(document)
    learner.resume(Checkpoint(Path(path), step, num_ranks, read_state(Path(path))))


_CALLS: dict[str, Callable[[Learner, bytes], Any]] = {
    "step": lambda learner, document: learner.step(decode_batch(document)),
    "logprobs": lambda learner, document: learner.logprobs(GivenTokens.from_json(document)),
    "reverse_kl": lambda learner, document: learner.reverse_kl(decode_batch(document)),
    "snapshot": _snapshot,
    "resume": _resume,
    "state": lambda learner, document: learner.state(),
}
"""What leading.py asks for, but for the beginning."""
