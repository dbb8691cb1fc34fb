"""The whole loop through real processes: another architecture, untied embeddings, chat messages as data."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.clients import RolloutClient
from services.wire.rollout import RolloutSampling
from tests.integration.processes import KEY, command, environment, server
from tests.models import save_model

pytestmark = pytest.mark.integration


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_rows(count: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"Say {i}"}], "answer": str(i), "topic": "t"} for i in range(count)
    ]


@pytest.mark.timeout(600)
async def test_three_steps_of_an_untied_llama_on_chat_messages(tmp_path: Path, models: dict[str, str]) -> None:
    teacher = save_model(tmp_path / "teacher", "llama", seed=7)
    output = tmp_path / "out"
    arguments = [
        *("--student.model", models["llama"], "--teacher.model", teacher),
        *("--data.path", write_rows(tmp_path / "train.jsonl", chat_rows(20))),
        *("--data.eval_path", write_rows(tmp_path / "eval.jsonl", chat_rows(8))),
        *("--rollout.max_model_len", "128", "--sampling.max_new_tokens", "12", "--pipeline.steps", "3"),
        *("--pipeline.prompts_per_step", "4", "--pipeline.samples_per_prompt", "2", "--loss.gamma", "0.9"),
        *("--pipeline.tokens_per_micro_batch", "128", "--optimizer.learning_rate", "1e-3"),
        *("--evaluation.every_steps", "2", "--output.samples_every_steps", "1", "--output.dir", str(output)),
    ]
    run = subprocess.run(command("up", *arguments), env=environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]

    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "num_steps" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["canary_residual"] <= 1e-4 and row["staleness"] == 0 for row in steps)
    assert all(np.isfinite(row["single_step_kl"]) and row["num_sequences"] == 8 for row in steps)
    assert [row["step"] for row in rows if "eval_reverse_kl" in row] == [0, 2, 3]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["tokens"] > 0 and summary["wall_s"] > 0
    assert summary["after"]["reverse_kl"] < summary["before"]["reverse_kl"]
    assert set(summary["teacher"]) == {"exact_match"}
    sample = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["tokens"]) == len(sample["student_logprobs"]) == len(sample["teacher_logprobs"])
    assert json.loads((output / "config.json").read_text())["loss"]["gamma"] == 0.9
    assert list(output.rglob("events.out.tfevents.*"))
    assert KEY not in run.stdout + run.stderr + (output / "config.json").read_text()

    await check_student_loads(output / "student", Path(models["llama"]), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_students_support_texts_and_two_updates_a_batch(tmp_path: Path, models: dict[str, str]) -> None:
    """The options that reach through all three processes at once: the rollout server sends the student's top-k, the
    teacher scores it, each batch is used twice, and texts are trained on beside it."""
    output = tmp_path / "out"
    texts = [{"text": f"{i} plus {i} is {2 * i}"} for i in range(9)]
    arguments = [
        *("--student.model", models["qwen3"], "--teacher.model", save_model(tmp_path / "teacher", "qwen3", seed=7)),
        *("--data.path", write_rows(tmp_path / "train.jsonl", [{"prompt": f"{i}+{i}="} for i in range(20)])),
        *("--data.lm_path", write_rows(tmp_path / "texts.jsonl", texts), "--loss.alpha_lm", "0.5"),
        *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8", "--pipeline.steps", "2"),
        *("--pipeline.prompts_per_step", "8", "--pipeline.updates_per_batch", "2", "--pipeline.texts_per_step", "4"),
        *("--loss.support", "student_topk", "--loss.top_k", "6", "--loss.gamma", "0.9"),
        *("--loss.kd_temperature", "1.5", "--sampling.temperature", "1.5", "--optimizer.learning_rate", "1e-3"),
        *("--output.dir", str(output)),
    ]
    run = subprocess.run(command("up", *arguments), env=environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["num_quarantined"] == 0 and row["canary_residual"] <= 1e-4
        assert np.isfinite([row["loss"], row["single_step_kl"], row["lm_loss"]]).all()
        # On policy at the rollout server's own temperature: trainer and engine agree on log q(y).
        assert row["importance_ratio_mean"] == pytest.approx(1.0, abs=1e-3)
        # No 6 tokens hold more of the student's mass than its own likeliest.
        assert 6 / 261 < row["student_support_mass"] < 1
        assert row["student_support_mass"] > row["teacher_support_mass"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_each_row_is_scored_by_the_teacher_it_names(tmp_path: Path, models: dict[str, str]) -> None:
    """`up` starts the one of the rows without a name; the recorded scores are those of each teacher's own weights."""
    output = tmp_path / "out"
    folders = [save_model(tmp_path / f"teacher-{seed}", "qwen3", seed=seed) for seed in (7, 8)]
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), **({"teacher": "maths"} if i % 2 else {})} for i in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with server("teacher", tmp_path / "maths.log", "--teacher.model", folders[1]) as maths:
        arguments = [
            *("--student.model", models["qwen3"], "--teacher.model", folders[0]),
            *(
                "--teacher_client.named",
                json.dumps({"maths": [maths.url]}),
                "--data.path",
                data,
                "--data.eval_path",
                data,
            ),
            *("--rollout.max_model_len", "64", "--sampling.max_new_tokens", "8", "--pipeline.steps", "12"),
            *("--pipeline.prompts_per_step", "8", "--optimizer.learning_rate", "1e-3"),
            *("--output.samples_every_steps", "1", "--output.samples_per_record", "8", "--output.dir", str(output)),
        ]
        run = subprocess.run(command("up", *arguments), env=environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    teachers = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert sorted(sample["row"] for sample in samples) == sorted([*range(1, 9)] * 12)
    for sample in samples:
        prompt = tokenizer(sample["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer.convert_tokens_to_ids(sample["tokens"])]])
        with torch.no_grad():
            own, other = (
                model(ids)
                .logits[0]
                .log_softmax(-1)[len(prompt) - 1 : -1]
                .gather(1, ids[0, len(prompt) :, None])
                .numpy()
                for model in (teachers if sample["row"] % 2 else teachers[::-1])  # row 1 is that of 0+0
            )
        recorded = np.array(sample["teacher_logprobs"])
        np.testing.assert_allclose(recorded, own.squeeze(1), atol=1e-4)
        assert np.abs(recorded - other.squeeze(1)).max() > 1e-2
    summary = json.loads((output / "summary.json").read_text())
    assert summary["after"]["reverse_kl"] < summary["before"]["reverse_kl"]


async def check_student_loads(student: Path, before: Path, tmp_path: Path) -> None:
    """transformers and vLLM read the saved folder and compute the same logprobs; it differs from where it began."""
    model, start = AutoModelForCausalLM.from_pretrained(student), AutoModelForCausalLM.from_pretrained(before)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    prompt = AutoTokenizer.from_pretrained(student)("Say 3")["input_ids"]
    arguments = ["--student.model", str(student), "--rollout.max_model_len", "128", "--sampling.max_new_tokens", "8"]
    with server("rollout", tmp_path / "reload.log", *arguments) as running:
        async with RolloutClient([running.url], key=KEY) as client:
            completion = (await client.generate([prompt], RolloutSampling(max_new_tokens=8)))[0]
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    ours = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy()
    assert np.abs(ours - completion.rollout_logprobs).max() <= 1e-4
