"""What the service asks of whatever scores, and how one is made of the options.

There are two kinds: a Batcher in front of a TransformersEngine, and vLLM, which forms its batches by itself.
"""

import multiprocessing
import os
from collections.abc import Callable
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from services.config import TeacherConfig
from services.errors import StartupError
from services.http.metrics import TeacherMetrics
from services.models.vllm_environment import KV_CACHE_VARIABLE, check_libnuma, vllm_defaults
from services.teacher.jobs import ScoreJob
from services.teacher.transformers.batcher import Batcher
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherInfo


class Scorer(Protocol):
    """Scores jobs, those of several requests together; may be called from any thread."""

    @property
    def info(self) -> TeacherInfo: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def submit(self, job: ScoreJob) -> None:
        """Begin with a job; its answer, or its error, arrives in `job.done`, whose cancelling stops the work."""

    def backlog_s(self) -> float:
        """Estimate of the time that the accepted work takes, seconds; 0 before anything was measured."""

    def close(self) -> None:
        """Take nothing more, and end every thread and process."""


def load_scorer(config: TeacherConfig, metrics: TeacherMetrics, on_failure: Callable[[Exception], None]) -> Scorer:
    """Load the model; takes seconds to minutes.

    Args:
        on_failure: told, from any thread, when the engine does not work any more; nothing is scored after that.

    Raises:
        StartupError: the model cannot be loaded.
    """
    if config.engine == "vllm":
        return _load_vllm(config, metrics, on_failure)
    engine = TransformersEngine(config)
    return Batcher(engine, engine.tokens_per_forward, metrics, on_failure)


def _load_vllm(config: TeacherConfig, metrics: TeacherMetrics, on_failure: Callable[[Exception], None]) -> Scorer:
    check_libnuma()
    # This process has threads, which a fork would leave with locks that nobody releases.
    for name, value in {**vllm_defaults(config.dtype), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}.items():
        os.environ.setdefault(name, value)
    os.environ.pop(KV_CACHE_VARIABLE, None)
    try:
        from services.teacher.vllm.engine import VllmScorer  # takes seconds, and reads the environment
    except ImportError as error:
        raise StartupError(
            f"teacher.engine = vllm needs vLLM, which cannot be imported ({error}); install the extra cpu or gpu, or use "
            "teacher.engine = transformers"
        ) from error
    return VllmScorer(config, metrics, on_failure)


def abandon_loading() -> None:
    """End what `load_scorer` has started in another thread: the processes of an engine that is not there yet."""
    for child in multiprocessing.active_children():
        child.kill()  # one that loads a model does not hear SIGTERM
