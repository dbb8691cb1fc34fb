"""Real rollout servers that are killed, started again or stopped under a run: it ends with as many steps and samples as asked,
all of them of the right weights."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.endless_run import arguments, num_steps, started, wait_until_trained
from tests.integration.processes import Server, command, kill, server, wait_until
from tests.models import save_model

pytestmark = [pytest.mark.integration, pytest.mark.long]

NUM_STEPS, NUM_PROMPTS = 120, 16  # which take longer than a server needs to start
LIMITS = ["--rollout.max_model_len", "128", "--sampling.max_new_tokens", "100"]
GOES_ON_S = 5.0


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose policy a step changes visibly."""
    return save_model(tmp_path_factory.mktemp("student"), "qwen3", initializer_range=0.2)


@pytest.fixture(scope="module")
def teacher(student: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server("teacher", tmp_path_factory.mktemp("logs") / "teacher", "--teacher.model", student) as running:
        yield running


class Fleet:
    """Rollout servers of one student, which may be started again where they were."""

    def __init__(self, student: str, logs: Path, count: int, stack: ExitStack) -> None:
        self._student, self._logs, self._stack, self._num_started = student, logs, stack, 0
        self.servers = [self._start() for _ in range(count)]

    def _start(self, port: int | None = None) -> Server:
        self._num_started += 1
        log = self._logs / f"rollout-{self._num_started}"
        return self._stack.enter_context(server("rollout", log, "--student.model", self._student, *LIMITS, port=port))

    def restart(self, index: int) -> None:
        self.servers[index] = self._start(self.servers[index].address[1])


def start(student: str, fleet: Fleet, teacher: Server, output: Path, *more: str) -> "subprocess.Popen[str]":
    words = arguments({"qwen3": student}, fleet.servers[0], teacher, output)
    given = {
        "--rollout_client.urls": json.dumps([running.url for running in fleet.servers]),
        "--pipeline.steps": str(NUM_STEPS),
        "--pipeline.prompts_per_step": str(NUM_PROMPTS),
        "--sampling.max_new_tokens": "100",
        "--sampling.temperature": "1",
        "--output.samples_every_steps": "1",
        "--output.samples_per_record": str(NUM_PROMPTS),
        **dict(zip(more[::2], more[1::2], strict=True)),
    }
    for option, value in given.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return started(command("train", *words))


@contextmanager
def run_with(
    student: str, teacher: Server, output: Path, count: int, *more: str
) -> Iterator[tuple[Fleet, "subprocess.Popen[str]"]]:
    """A run with so many rollout servers, all ended at the end."""
    with ExitStack() as stack:
        fleet = Fleet(student, output.parent, count, stack)
        process = start(student, fleet, teacher, output, *more)
        stack.callback(process.kill)
        yield fleet, process


def rows(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "num_steps" in row]


def check_complete(process: "subprocess.Popen[str]", output: Path) -> str:
    """It ended well, with all steps and all samples, each of the weights before its step; returns what it said."""
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0 and "Traceback" not in said, said
    steps = rows(output)
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert {row["staleness"] for row in steps} == {0} and {row["num_stale"] for row in steps} == {0}
    assert max(abs(row["importance_ratio_mean"] - 1) for row in steps) <= 1e-3
    assert max(row["importance_ratio_max"] for row in steps) <= 1 + 1e-3
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_bytes().splitlines()]
    num_samples = [sum(sample["step"] == step for sample in samples) for step in range(1, NUM_STEPS + 1)]
    assert num_samples == [NUM_PROMPTS] * NUM_STEPS
    return said


def mid_step(process: "subprocess.Popen[str]", output: Path, steps: int) -> None:
    """Until completions of a step after `steps` are under way."""
    wait_until_trained(process, output, steps)
    time.sleep(0.1)


@pytest.mark.timeout(900)
def test_of_two_servers_one_may_be_killed_in_mid_step_and_come_back(
    student: str, teacher: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with run_with(student, teacher, output, 2) as (fleet, process):
        mid_step(process, output, 5)
        usual_s = max(row["step_s"] for row in rows(output)[1:])
        kill(fleet.servers[1].process)
        before, killed_at = num_steps(output), time.monotonic()
        wait_until(lambda: num_steps(output) > before, 60.0)
        assert time.monotonic() - killed_at <= GOES_ON_S + 2 * usual_s
        fleet.restart(1)
        said = check_complete(process, output)
        url = fleet.servers[1].url
        assert said.count(f"{url} is away: ") == 1 and said.count(f"{url} is back after ") == 1, said
        live = [row["num_rollout_servers"] for row in rows(output)]
        assert live[0] == 2 and live[-1] == 2 and 1 in live, live


@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment_s", [0.0, 0.2, 0.5])
def test_a_lone_server_may_be_killed_at_any_moment_and_is_sent_the_weights_when_it_is_back(
    moment_s: float, student: str, teacher: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with run_with(student, teacher, output, 1) as (fleet, process):
        for steps in (5, 20):
            wait_until_trained(process, output, steps)
            time.sleep(moment_s)
            kill(fleet.servers[0].process)
            fleet.restart(0)
        said = check_complete(process, output)
        assert said.count(f"{fleet.servers[0].url} is back after ") == 2, said


@pytest.mark.timeout(900)
def test_both_of_two_servers_may_be_killed_at_once(student: str, teacher: Server, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with run_with(student, teacher, output, 2) as (fleet, process):
        mid_step(process, output, 5)
        for running in fleet.servers:
            kill(running.process)
        fleet.restart(0)
        fleet.restart(1)
        check_complete(process, output)


@pytest.mark.timeout(900)
def test_an_evaluation_in_which_its_server_is_killed_is_made_again_under_the_same_weights(
    student: str, teacher: Server, tmp_path: Path
) -> None:
    output, held_out, every = tmp_path / "out", tmp_path / "held-out.jsonl", 40
    held_out.write_text("".join(json.dumps({"prompt": f"{i}*{i}=", "answer": str(i * i)}) + "\n" for i in range(400)))
    options = {"--data.eval_path": held_out, "--evaluation.num_prompts": 400, "--evaluation.every_steps": every}
    with run_with(student, teacher, output, 1, *(str(word) for pair in options.items() for word in pair)) as found:
        fleet, process = found
        wait_until_trained(process, output, every)
        time.sleep(1.0)
        kill(fleet.servers[0].process)
        assert num_steps(output) == every
        fleet.restart(0)
        said = check_complete(process, output)
    assert said.count(f"the evaluation after step {every} is made again: ") == 1, said
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in lines if "eval_reverse_kl" in row]
    assert [(row["step"], row["eval_policy_version"]) for row in evaluated] == [
        (step, step) for step in range(0, NUM_STEPS + 1, every)
    ]
    assert json.loads((output / "summary.json").read_text())["failed_evaluations"] == []


@pytest.mark.timeout(900)
def test_a_server_that_is_stopped_is_left_and_taken_back_when_it_goes_on(
    student: str, teacher: Server, tmp_path: Path
) -> None:
    """The whole session of the server is stopped: a push that is under way waits for its stage."""
    output = tmp_path / "out"
    with run_with(student, teacher, output, 2, "--weight_sync.stage_timeout_s", "20") as (fleet, process):
        mid_step(process, output, 5)
        stopped = fleet.servers[1].process
        stopped.send_signal(signal.SIGSTOP)
        try:
            before = num_steps(output)
            wait_until(lambda: num_steps(output) > before + 3, 120.0)
        finally:
            stopped.send_signal(signal.SIGCONT)
        check_complete(process, output)
        assert 1 in [row["num_rollout_servers"] for row in rows(output)]


@pytest.mark.timeout(600)
def test_a_server_that_stays_away_ends_the_run_with_its_own_exit_code_and_what_to_do(
    student: str, teacher: Server, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with run_with(student, teacher, output, 1, "--rollout_client.outage_s", "10") as (fleet, process):
        mid_step(process, output, 3)
        kill(fleet.servers[0].process)
        _, said = process.communicate(timeout=120)
        last = said.splitlines()[-1]
        assert process.returncode == 11 and "Traceback" not in said, said
        assert fleet.servers[0].url in last and "run the same command again" in last, last
        assert (output / "student" / "config.json").exists()
