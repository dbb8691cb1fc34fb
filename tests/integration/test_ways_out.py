"""Real ends of a real run: signals, a disk that fills up, a teacher that is gone. The student is there each time."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.config.output_dir import complete_checkpoints
from tests.integration.endless_run import arguments, num_steps, started, wait_until_trained
from tests.integration.processes import Server, command, server
from tests.small_disk import small_disk_at
from trainer.checkpoint.folder import open_checkpoint
from trainer.checkpoint.journal import read_journal

pytestmark = pytest.mark.integration


def check_end(process: "subprocess.Popen[str]", code: int, last_line: str, output: Path, start: str) -> str:
    """One line says why, one says where the student is, which transformers loads and which has learned something; returns what
    was said."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "Traceback" not in said and re.search(last_line, said.splitlines()[-1]), said
    saved = re.search(r"the student of step (\d+) is saved in", said)
    assert saved is not None and int(saved[1]) >= num_steps(output) > 0
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (output / "student", start))
    assert AutoTokenizer.from_pretrained(output / "student")("1+1=")["input_ids"] == [*b"1+1="]
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    for line in (output / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert not (output / ".reserve").exists() and not (output / "summary.json").exists()
    return said


@pytest.mark.timeout(300)
def test_sigterm_ends_a_run_in_order_also_as_the_first_process_of_a_container(
    rollout_server: Server, teacher_server: Server, models: dict[str, str], tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a PID namespace needs root")
    output = tmp_path / "out"
    words = command("train", *arguments(models, rollout_server, teacher_server, output))
    process = started(["unshare", "--pid", "--fork", "--kill-child", *words])
    wait_until_trained(process, output, 2)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGTERM)
    check_end(process, 143, "^distillserve: ended by SIGTERM$", output, models["qwen3"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """24 MiB, of which the test may take the rest."""
    with small_disk_at(tmp_path / "disk", mib=24) as folder:
        yield folder


@pytest.mark.timeout(300)
def test_a_disk_that_fills_up_costs_the_run_but_not_the_student(
    small_disk: Path, rollout_server: Server, teacher_server: Server, models: dict[str, str]
) -> None:
    output = small_disk / "out"
    words = command("train", *arguments(models, rollout_server, teacher_server, output))
    process = started(words)
    wait_until_trained(process, output, 2)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while filler.write(b"0" * size):
                    pass
            except OSError:
                continue
    check_end(
        process, 7, r"^distillserve: .* cannot be written: .*[Nn]o space left.*; free some", output, models["qwen3"]
    )


@pytest.mark.timeout(300)
def test_a_teacher_that_is_gone_ends_the_run_which_goes_on_with_the_same_teacher_only(
    rollout_server: Server, models: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with server("teacher", tmp_path / "teacher-1.log", "--teacher.model", models["llama"]) as teacher:
        words = arguments(models, rollout_server, teacher, output)
        words[words.index("--output.save_every_steps") + 1] = "1000"
        process = started(command("train", *words))
        wait_until_trained(process, output, 2)
        teacher.process.kill()
        said = check_end(process, 11, "^the same command goes on after step", output, models["qwen3"])
        assert "no teacher has answered for 2 s (teacher_client.outage_s)" in said
    ((step, checkpoint),) = complete_checkpoints(output).items()
    assert step == num_steps(output)
    port = teacher.address[1]
    with server("teacher", tmp_path / "teacher-2.log", "--teacher.model", models["qwen3"], port=port):
        _, said = started(command("train", *words)).communicate(timeout=120)
        assert (
            f"the teacher of teacher_client is not the one of {checkpoint}: it is another model: "
            in said.splitlines()[-1]
        )
    with server("teacher", tmp_path / "teacher-3.log", "--teacher.model", models["llama"], port=port):
        process = started(command("train", *words))
        wait_until_trained(process, output, step + 2)
        process.terminate()
        check_end(process, 143, "^the same command goes on after step", output, models["qwen3"])


@pytest.mark.timeout(300)
def test_a_killed_run_has_its_newest_checkpoint(
    rollout_server: Server, teacher_server: Server, models: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = arguments(models, rollout_server, teacher_server, output)
    words[words.index("--output.save_every_steps") + 1] = "1"
    process = started(command("train", *words))
    wait_until_trained(process, output, 4)
    process.kill()
    process.communicate(timeout=60)
    step, newest = list(complete_checkpoints(output).items())[-1]
    assert step >= num_steps(output) - 2  # one is written while the next step is made
    assert AutoModelForCausalLM.from_pretrained(newest).num_parameters() > 0
    process = started(command("train", *words))
    wait_until_trained(process, output, num_steps(output) + 2)
    process.terminate()
    said = check_end(process, 143, "^the same command goes on after step", output, models["qwen3"])
    assert f"going on after step {step}, from {newest}" in said
    journal, trained = read_journal(output), num_steps(output)
    journal.check(journal.attempts[0]["run"], trained)
    assert {row["attempt"] for row in journal.steps} == {1, 2}


@pytest.mark.timeout(300)
def test_a_disk_that_is_full_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(
    small_disk: Path, rollout_server: Server, teacher_server: Server, models: dict[str, str]
) -> None:
    output = small_disk / "out"
    words = arguments(models, rollout_server, teacher_server, output)
    words[words.index("--output.save_every_steps") + 1] = "1"
    words += ["--output.save_total_limit", "1"]
    process = started(command("train", *words))
    wait_until_trained(process, output, 3)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue
    check_end(process, 7, "^the same command goes on after step", output, models["qwen3"])
    (newest,) = complete_checkpoints(output).values()
    open_checkpoint(newest)
    filler.unlink()
    process = started(command("train", *words))
    wait_until_trained(process, output, num_steps(output) + 2)
    process.terminate()
    assert f"from {newest}" in check_end(process, 143, "^the same command goes on", output, models["qwen3"])
