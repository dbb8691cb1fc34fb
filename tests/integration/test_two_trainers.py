"""Two trainers with different students at one rollout server: one trains as if alone, the other ends in one line."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.endless_run import arguments, num_steps, started, wait_until_trained
from tests.integration.processes import Server, command, server, wait_until
from tests.models import save_model

pytestmark = [pytest.mark.integration, pytest.mark.long]

NUM_ROUNDS = 10
STEPS_BEFORE, STEPS_AFTER = 2, 5
CHECKED_STEPS = 4
"""First and last ones whose samples are compared token by token."""

Trainer = tuple["subprocess.Popen[str]", Path]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two students of one shape whose policies have little in common."""
    root = tmp_path_factory.mktemp("students")
    return [save_model(root / str(seed), "qwen3", seed=seed, initializer_range=0.2) for seed in (1, 2)]


@pytest.fixture(scope="module")
def servers(students: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    logs = tmp_path_factory.mktemp("logs")
    limits = ["--rollout.max_model_len", "128", "--sampling.max_new_tokens", "8"]
    with (
        server("rollout", logs / "rollout", "--student.model", students[0], *limits) as rollout,
        server("teacher", logs / "teacher", "--teacher.model", students[0]) as teacher,
    ):
        yield rollout, teacher


def start(student: str, servers: tuple[Server, Server], output: Path) -> Trainer:
    """`distillserve train`, which keeps all samples and every student."""
    words = arguments({"qwen3": student}, *servers, output)
    words[words.index("--output.save_every_steps") + 1] = "1"
    words += ["--output.save_total_limit", "1000", "--output.samples_every_steps", "1"]
    words += ["--output.samples_per_record", "8", "--evaluation.every_steps", "2", "--weight_sync.lease_s", "10"]
    words[words.index("--sampling.temperature") + 1] = "1"
    return started(command("train", *words)), output


def check_refused(refused: Trainer, holder: Trainer) -> None:
    """It ended in one line that names the run which holds the server, and trained on nothing."""
    process, output = refused
    _, said = process.communicate(timeout=60)
    last = said.splitlines()[-1]
    assert process.returncode not in (0, 1) and "Traceback" not in said, said
    assert re.search(r"^distillserve: .*held by the run .*weight_sync\.take_over", last), said
    assert str(holder[1]) in last, said
    assert num_steps(output) == 0 and not (output / "samples.jsonl").exists()


def check_undisturbed(trainer: Trainer, student: str, other: str) -> None:
    """It trains on, no push was repeated, and every token of its batches is its own student's."""
    process, output = trainer
    wait_until_trained(process, output, num_steps(output) + STEPS_AFTER)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "repeating" not in said, said
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "num_steps" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert max(row.get("canary_residual", 0.0) for row in steps) <= 1e-4  # the last push may have been ended
    assert max(abs(row["importance_ratio_mean"] - 1) for row in steps) <= 1e-3
    assert max(row["importance_ratio_max"] for row in steps) <= 1 + 1e-3
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_bytes().splitlines()]
    for step in [*range(1, CHECKED_STEPS + 1), *range(len(steps) - CHECKED_STEPS + 1, len(steps) + 1)]:
        folder = output / "checkpoints" / f"step-{step - 1}" if step > 1 else Path(student)
        own = [sample for sample in samples if sample["step"] == step]
        assert worst_difference(folder, own) <= 1e-3, step
        assert worst_difference(Path(other), own) > 1  # tokens of the other student would have been seen


def worst_difference(student: Path, samples: list[dict]) -> float:
    """Between the recorded logprobs of sampled tokens and those of a student."""
    assert samples
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    found = []
    for sample in samples:
        prompt, completion = tokenizer(sample["prompt"])["input_ids"], tokenizer.convert_tokens_to_ids(sample["tokens"])
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ours = logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1).numpy()
        found.append(np.abs(ours - np.array(sample["student_logprobs"])).max())
    return float(max(found))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(NUM_ROUNDS))
@pytest.mark.parametrize("moment", ["start", "mid-run"])
def test_of_two_trainers_at_one_server_one_trains_as_if_alone(
    moment: str, number: int, students: list[str], servers: tuple[Server, Server], tmp_path: Path
) -> None:
    order = students if number % 2 else students[::-1]
    trainers: dict[str, Trainer] = {}
    try:
        for student in order:
            trainers[student] = start(student, servers, tmp_path / f"out-{len(trainers)}")
            if moment == "mid-run" and len(trainers) == 1:
                wait_until_trained(*trainers[student], STEPS_BEFORE)
        wait_until(lambda: any(process.poll() is not None for process, _ in trainers.values()), 180.0)
        ended, alive = sorted(order, key=lambda student: trainers[student][0].poll() is None)
        check_refused(trainers[ended], trainers[alive])
        assert moment == "start" or alive == order[0]
        check_undisturbed(trainers[alive], alive, ended)
    finally:
        for process, _ in trainers.values():
            process.kill()
            process.communicate()
