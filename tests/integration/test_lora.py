"""An adapter through real servers: what vLLM holds is the student with its adapter, and an adapter that is withheld is seen."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.errors import WeightSyncError
from services.models.adapters import adapted_modules
from services.weight_transfer.source import CheckpointSource
from tests.integration.attach import PROMPTS, SAMPLING, attached, differences
from tests.integration.processes import Server, command, environment
from tests.unit.trainer.adapters import disturb, learner_of
from tests.unit.trainer.samples import BATCH
from trainer.tiny.pair import build_tiny_pair

pytestmark = pytest.mark.integration

NUM_TRIES = 20
PAGE = (Path(__file__).parents[2] / "docs" / "lora.md").read_text()


def block(language: str) -> str:
    """The page's one block of a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


class Withheld(CheckpointSource):
    """Sends the base's own weights in the place of some merged ones."""

    names: tuple[str, ...] = ()

    def __iter__(self) -> Any:
        modules = adapted_modules(self._model)
        for name, tensor in super().__iter__():
            is_withheld = (of := name.removesuffix(".weight")) in self.names
            yield name, modules[of].base_layer.weight.detach().to(self._dtype) if is_withheld else tensor


@pytest.mark.timeout(400)
async def test_the_server_answers_as_the_student_with_its_adapter(
    rollout_server: Server, models: dict[str, str]
) -> None:
    learner = learner_of(models["qwen3"], r=16, rate=1e-3)
    async with attached(learner, rollout_server.url) as (pushing, client):
        for version in range(5):
            metrics = await pushing.push(version)
            assert metrics["canary_residual"] <= 1e-4
            completions = await client.generate(PROMPTS, SAMPLING)
            assert differences(learner.student.model.eval(), completions).max() <= 1e-4
            learner.student.train()
            learner.step(BATCH)
            disturb(learner, scale=0.02)


@pytest.mark.timeout(600)
async def test_an_adapter_withheld_from_a_push_is_noticed_every_time(
    rollout_server: Server, models: dict[str, str]
) -> None:
    """After one more step each at a learning rate at which logprobs hardly move: of one module, then another, then of all."""
    learner = learner_of(models["qwen3"], r=16, rate=1e-5)
    modules, noticed = list(adapted_modules(learner.student.model)), 0
    async with attached(learner, rollout_server.url) as (pushing, _):
        await pushing.push(0)
        for version in range(1, NUM_TRIES + 1):
            learner.step(BATCH)
            source = Withheld(learner.student.model, torch.float32)
            source.names = tuple(modules) if version == NUM_TRIES else (modules[version % len(modules)],)
            with pytest.raises(WeightSyncError, match="the adapter is missing"):
                await pushing.push_once(version, source)
            noticed += 1
        assert (await pushing.push(NUM_TRIES + 1))["canary_residual"] <= 1e-4
    assert noticed == NUM_TRIES


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.timeout(1200)
def test_the_command_of_the_page_learns_the_tiny_task_and_its_program_loads_the_adapter(
    seed: int, tmp_path: Path
) -> None:
    pair = tmp_path / "pair"
    build_tiny_pair(pair, seed=seed)
    base = (pair / "student" / "model.safetensors").read_bytes()
    output = tmp_path / "out"
    program, *arguments = shlex.split(block("bash"))
    assert program == "distillserve" and arguments[arguments.index("--lora.r") + 1] == "16"
    arguments += [
        *("--student.model", f"{pair}/student", "--teacher.model", f"{pair}/teacher", "--seed", str(seed)),
        *("--data.path", f"{pair}/train.jsonl", "--data.eval_path", f"{pair}/eval.jsonl"),
        *("--output.dir", str(output)),
    ]
    run = subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["after"]["exact_match"] >= 0.95, summary
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["canary_residual"] <= 1e-4 for row in rows if "canary_residual" in row)
    assert (pair / "student" / "model.safetensors").read_bytes() == base
    merged = AutoModelForCausalLM.from_pretrained(output / "student")
    made: dict[str, Any] = {}
    exec(block("python").replace("outputs/tiny-pair", str(pair)).replace("outputs/tiny/", f"{output}/"), made)
    adapted = made["student"]
    ids = torch.randint(48, 57, (4, 9))
    with torch.no_grad():
        difference = (adapted.eval()(input_ids=ids).logits - merged.eval()(input_ids=ids).logits).abs().max()
    assert float(difference) <= 1e-5 * max(float(merged(input_ids=ids).logits.abs().max()), 1.0)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_base_is_the_teacher_of_its_own_adapter(tmp_path: Path, models: dict[str, str]) -> None:
    """`teacher.model = "base"`: at the beginning the two are one policy."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(20)))
    output = tmp_path / "out"
    arguments = [
        *("--student.model", models["llama"], "--teacher.model", "base", "--data.path", str(tmp_path / "train.jsonl")),
        *("--lora.r", "4", "--lora.target_modules", '["q_proj", "lm_head"]', "--rollout.max_model_len", "64"),
        *("--sampling.max_new_tokens", "8", "--pipeline.steps", "2", "--pipeline.prompts_per_step", "4"),
        *("--output.dir", str(output)),
    ]
    run = subprocess.run(command("up", *arguments), env=environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "num_steps" in row]
    assert abs(steps[0]["single_step_kl"]) <= 1e-4 and all(row["canary_residual"] <= 1e-4 for row in steps)
    assert (output / "student" / "adapter" / "adapter_model.safetensors").is_file()
