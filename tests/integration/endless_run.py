"""A run of a thousand steps against running servers, for tests that end it."""

import json
import subprocess
from pathlib import Path

from tests.integration.processes import Server, environment, wait_until


def arguments(models: dict[str, str], rollouts: Server, teacher: Server, output: Path) -> list[str]:
    """A run of a thousand steps against running servers."""
    data = output.with_name(f"{output.name}-rows.jsonl")
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(20)))
    return [
        *("--student.model", models["qwen3"], "--teacher.model", models["qwen3"], "--data.path", str(data)),
        *("--rollout_client.urls", json.dumps([rollouts.url]), "--teacher_client.urls", json.dumps([teacher.url])),
        *("--rollout.max_model_len", "128", "--sampling.max_new_tokens", "8", "--teacher_client.outage_s", "2"),
        *("--pipeline.steps", "1000", "--pipeline.prompts_per_step", "8", "--optimizer.learning_rate", "1e-3"),
        *("--sampling.temperature", "0.9", "--output.save_every_steps", "0", "--output.dir", str(output)),
        *("--data.eval_path", str(data), "--evaluation.num_prompts", "4"),
    ]


def started(words: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count('"num_steps"') if path.exists() else 0


def wait_until_trained(process: "subprocess.Popen[str]", output: Path, steps: int) -> None:
    wait_until(lambda: process.poll() is not None or num_steps(output) >= steps, 120.0)
    assert process.poll() is None, process.communicate()
