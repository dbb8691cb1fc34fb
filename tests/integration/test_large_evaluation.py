"""An evaluation at the size of real models: a vocabulary of 152 k, completions of 2,048 tokens, a bounded memory."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.processes import command, environment, server
from tests.models import save_model

pytestmark = [pytest.mark.integration, pytest.mark.long]

NEW_TOKENS = 2048
NUM_PROMPTS = 8


def children(pid: int) -> list[int]:
    """The process and everything it started."""
    try:
        own = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    except OSError:
        return []
    return [pid, *(grandchild for child in own for grandchild in children(child))]


def memory_mib(pid: int) -> float:
    """Resident memory of a process and its children, MiB."""
    total = 0.0
    for one in children(pid):
        try:
            total += int(Path(f"/proc/{one}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            continue
    return total


class Watch:
    """The memory of processes: when first looked at, and at most."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.before: dict[str, float] = {}
        self.most: dict[str, float] = {}

    def add(self, role: str, pid: int) -> None:
        self.before[role] = self.most[role] = memory_mib(pid)
        self.pids[role] = pid

    def look(self) -> None:
        for role, pid in list(self.pids.items()):
            self.most[role] = max(self.most[role], memory_mib(pid))


@contextmanager
def watching() -> Iterator[Watch]:
    watch, over = Watch(), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            watch.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(1800)
def test_an_evaluation_of_long_completions_over_a_large_vocabulary_grows_no_role_by_a_gibibyte(tmp_path: Path) -> None:
    shape = {"vocab_size": 151_936, "max_position_embeddings": 4096, "initializer_range": 0.1}
    student, teacher = (save_model(tmp_path / str(seed), "llama", seed=seed, **shape) for seed in (0, 1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(NUM_PROMPTS))
    )
    output = tmp_path / "out"
    at_most = ["--rollout.max_model_len", "4096"]
    server_options = [*at_most, "--rollout.kv_cache_gib", "0.25"]
    with (
        server("rollout", tmp_path / "rollout.log", "--student.model", student, *server_options) as rollouts,
        server("teacher", tmp_path / "teacher.log", "--teacher.model", teacher) as scorer,
        watching() as watch,
    ):
        watch.add("rollout", rollouts.process.pid)
        watch.add("teacher", scorer.process.pid)
        arguments = [
            *("--student.model", student, "--data.path", str(rows), "--data.eval_path", str(rows), *at_most),
            *("--rollout_client.urls", json.dumps([rollouts.url]), "--teacher_client.urls", json.dumps([scorer.url])),
            *("--evaluation.max_new_tokens", str(NEW_TOKENS), "--sampling.max_new_tokens", "4"),
            *("--pipeline.steps", "1", "--pipeline.prompts_per_step", "2", "--output.dir", str(output)),
        ]
        log = tmp_path / "trainer.log"
        with log.open("wb") as file:
            trainer = subprocess.Popen(
                command("train", *arguments), env=environment(), stdout=file, stderr=subprocess.STDOUT
            )
        while not (output / "config.json").exists():  # the student is loaded, the servers are attached
            assert trainer.poll() is None, log.read_text()
        watch.add("trainer", trainer.pid)
        assert trainer.wait(1500) == 0, log.read_text()
    before = json.loads((output / "summary.json").read_text())["before"]
    assert before["num_kl_tokens"] == NUM_PROMPTS * NEW_TOKENS and before["num_quarantined"] == 0
    assert before["reverse_kl"] > 0 and 0 < before["reverse_kl_stderr"] < before["reverse_kl"]
    grown = {role: watch.most[role] - watch.before[role] for role in watch.pids}
    print(grown)
    assert set(grown) == {"rollout", "teacher", "trainer"} and max(grown.values()) < 1024, grown
