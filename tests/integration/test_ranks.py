"""Ranks of the trainer, under torchrun or `accelerate launch`, and real servers: what becomes of a run when one of them ends."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.endless_run import arguments, num_steps
from tests.integration.processes import Server, is_running, wait_until
from tests.integration.torchrun import accelerate_launch, all_ranks, rank_process, torchrun

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class Run:
    """An endless run of two ranks that has made a few steps."""

    def __init__(self, folder: Path, words: list[str], nodes: int = 1, *, by_accelerate: bool = False) -> None:
        self.output, self.log = folder / "out", folder / "log"
        if by_accelerate:
            self.launchers = [accelerate_launch(*words, log=self.log)]
        else:
            self.launchers = torchrun(*words, nodes=nodes, ranks=2 // nodes, log=self.log)
        wait_until(lambda: num_steps(self.output) >= 3 or self.has_ended, 180.0)
        assert not self.has_ended, self.said
        self.ranks = all_ranks(self.launchers, 2)

    @property
    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.launchers)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def end_by(self, process_id: int, number: signal.Signals) -> float:
        """Send a signal; returns how long it took until nothing was left, seconds."""
        started = time.monotonic()
        os.kill(process_id, number)
        for process in self.launchers:
            process.wait(60.0)
        wait_until(lambda: not any(map(is_running, self.ranks)), 10.0)
        return time.monotonic() - started

    def check_saved(self, start: str) -> None:
        """The student of the last step that was pushed, or the one before it where the push was under way."""
        before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (start, self.output / "student"))
        assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
        step = int(self.said.rpartition("the student of step ")[2].split()[0])
        assert step in (num_steps(self.output), num_steps(self.output) + 1), self.said
        assert not (self.output / ".student.part").exists()


@pytest.fixture
def words(
    models: dict[str, str], rollout_server: Server, teacher_server: Server, tmp_path: Path
) -> Iterator[list[str]]:
    yield [*arguments(models, rollout_server, teacher_server, tmp_path / "out"), "--weight_sync.lease_s", "3"]


@pytest.mark.parametrize(
    ("rank", "parallelism"),
    [
        (1, "fsdp2"),
        pytest.param(0, "fsdp2", marks=pytest.mark.long),
        pytest.param(1, "ddp", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_ends_all_and_the_student_is_saved(
    rank: int, parallelism: str, words: list[str], models: dict[str, str], tmp_path: Path
) -> None:
    run = Run(tmp_path, [*words, "--trainer.parallelism", parallelism])
    assert run.end_by(run.ranks[rank], signal.SIGKILL) < 30.0
    assert f"distillserve: rank {rank} " in run.said and "was killed, or lost its connection" in run.said
    run.check_saved(models["qwen3"])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_any_rank_ends_all_in_order(
    rank: int, words: list[str], models: dict[str, str], tmp_path: Path
) -> None:
    run = Run(tmp_path, words)
    assert run.end_by(run.ranks[rank], signal.SIGTERM) < 30.0
    assert "ended by SIGTERM: saving the student" in run.said and "distillserve: ended by SIGTERM" in run.said
    assert "is lost" not in run.said and "Traceback" not in run.said.partition("distillserve: ended")[0]
    run.check_saved(models["qwen3"])


@pytest.mark.long
def test_ctrl_c_on_the_second_of_two_torchruns_ends_both_in_order(
    words: list[str], models: dict[str, str], tmp_path: Path
) -> None:
    """Two machines with a rank each, as far as torchrun can tell: each rank holds the whole student."""
    run = Run(tmp_path, words, nodes=2)
    assert run.end_by(run.launchers[1].pid, signal.SIGINT) < 30.0
    assert "ended by SIGINT: saving the student" in run.said
    run.check_saved(models["qwen3"])


@pytest.mark.long
@pytest.mark.parametrize("by_accelerate", [False, True])
def test_rank_0_alone_speaks(by_accelerate: bool, words: list[str], tmp_path: Path) -> None:
    run = Run(tmp_path, words, by_accelerate=by_accelerate)
    run.end_by(rank_process(run.launchers, 0), signal.SIGINT)
    lines = [line for line in run.said.splitlines() if " INFO " in line or " WARNING " in line]
    assert len(lines) == len(set(lines)) and sum("exact match" in line for line in lines) >= 1, run.said
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "num_steps" in row] == list(range(1, num_steps(run.output) + 1))
