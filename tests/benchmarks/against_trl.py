"""This project beside TRL on the same models, data, batches and optimizer; writes results/against_trl.json.

Quality: the pair of `make train`, three seeds, this project against MiniLLMTrainer of TRL 1.14.2, the last version that had it.
Both students are measured by the same code, which is neither's: the reverse KL over the whole vocabulary, on samples drawn by
transformers. Time: a step of a 235 M student and a 268 M teacher, 8 prompts, 48 new tokens, also against TRL 1.16's
DistillationTrainer: in float32, and in bfloat16 with float32 master weights. The latter is TRL's default (bf16=True); here servers run
in bfloat16. TRL has environments of its own, which see this one's torch and transformers.

Half an hour; quality or time alone: python -m tests.benchmarks.against_trl quality
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.benchmarks import results
from tests.benchmarks.push import NEW_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, save_student
from trainer.tiny.pair import build_tiny_pair

MINILLM, DISTILLATION = ("1.14.2", "MiniLLMTrainer"), ("1.16.0", "DistillationTrainer")
SEEDS = (0, 1, 2)
TIMED_STEPS, TEACHER_LAYERS = 6, 18
EVALUATION_SAMPLES = 4
# Of deploy/runs/tiny.toml.
TINY: dict[str, Any] = {
    "dtype": "float32",
    "steps": 240,
    "batch": 128,
    "max_new_tokens": 5,
    "learning_rate": 2e-3,
    "warmup_steps": 10,
    "beta2": 0.98,
}
LARGE: dict[str, Any] = {
    "steps": TIMED_STEPS,
    "batch": NUM_PROMPTS,
    "max_new_tokens": NEW_TOKENS,
    "learning_rate": 1e-5,
}
LARGE |= {"warmup_steps": 0, "beta2": 0.95}
DTYPES = ("float32", "bfloat16")
HALF = ("--rollout.dtype", "bfloat16", "--teacher.dtype", "bfloat16")  # on a CPU the trainer computes in float32 then
ENVIRONMENTS = Path("outputs/trl")


def python_with_trl(version: str) -> Path:
    """The interpreter of an environment with that version of TRL, made where it is missing."""
    folder = ENVIRONMENTS / version
    python = folder.absolute() / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (ours,) = (Path(path) for path in sys.path if path.endswith("site-packages"))
        (packages / "ours.pth").write_text(f"{ours}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={version}"], check=True)
        (folder / "complete").touch()
    return python


def run_trl(trl: tuple[str, str], job: dict[str, Any], folder: Path) -> list[float]:
    """Seconds of each step."""
    version, name = trl
    files = folder / "job.json", folder / "answer.json"
    files[0].write_text(json.dumps({**job, "trainer": name}))
    script = Path(__file__).with_name("trl_side.py")
    log = folder / "trl.log"
    with log.open("wb") as output:
        done = subprocess.run([python_with_trl(version), script, *files], stdout=output, stderr=subprocess.STDOUT)
    assert done.returncode == 0, log.read_text()[-2000:]
    found: list[float] = json.loads(files[1].read_text())["step_s"]
    return found


def run_ours(job: dict[str, Any]) -> list[float]:
    """Seconds of each step of `distillserve up`."""
    words = ["--student.model", job["student"], "--teacher.model", job["teacher"], "--data.path", job["data"]]
    words += ["--output.dir", job["output"], "--output.save_every_steps", "0", "--seed", str(job["seed"])]
    words += ["--pipeline.steps", str(job["steps"]), "--pipeline.prompts_per_step", str(job["batch"])]
    words += ["--sampling.max_new_tokens", str(job["max_new_tokens"]), "--rollout.max_model_len", "128"]
    words += ["--optimizer.learning_rate", str(job["learning_rate"]), "--optimizer.beta2", str(job["beta2"])]
    words += ["--optimizer.warmup_steps", str(job["warmup_steps"]), *(HALF if job["dtype"] == "bfloat16" else ())]
    command = [sys.executable, "-m", "services.cli", "up", *words]
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    rows = [json.loads(line) for line in Path(job["output"], "metrics.jsonl").read_text().splitlines()]
    return [row["step_s"] for row in rows if "step_s" in row]


@torch.no_grad()
def held_out(student_folder: str, teacher_folder: str, data: Path, max_new_tokens: int) -> dict[str, float]:
    """Reverse KL per token over the whole vocabulary, nats, on the student's own samples, and greedy exact match."""
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (student_folder, teacher_folder))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", add_special_tokens=False)["input_ids"]
    ends = {"eos_token_id": student.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    def complete(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        how = GenerationConfig(max_new_tokens=max_new_tokens, **ends, **options)
        found: torch.Tensor = student.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        return found

    torch.manual_seed(0)
    length = prompts.shape[1]  # all prompts of the pair are equally long
    sampled = complete(prompts.repeat(EVALUATION_SAMPLES, 1), do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    q, p = (model(sampled).logits[:, length - 1 : -1].double().log_softmax(-1) for model in (student, teacher))
    tokens = sampled[:, length:]
    has_ended = (tokens == tokenizer.eos_token_id).cumsum(-1) - (tokens == tokenizer.eos_token_id).int() > 0
    per_token = (q.exp() * (q - p)).sum(-1)[~has_ended]
    greedy = tokenizer.batch_decode(complete(prompts, do_sample=False)[:, length:], skip_special_tokens=True)
    right = [text.strip() == row["answer"] for text, row in zip(greedy, rows, strict=True)]
    return {"reverse_kl": float(per_token.mean()), "exact_match": sum(right) / len(right)}


def quality(folder: Path) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {
        "before": [],
        "this project": [],
        f"TRL {MINILLM[0]} MiniLLMTrainer": [],
    }
    for seed in SEEDS:
        pair = folder / f"pair-{seed}"
        build_tiny_pair(pair, seed=seed)
        job = {**TINY, "student": str(pair / "student"), "teacher": str(pair / "teacher"), "seed": seed, "saves": True}
        job["data"] = str(pair / "train.jsonl")
        ours, theirs = folder / f"ours-{seed}", folder / f"trl-{seed}"
        run_ours({**job, "output": str(ours)})
        theirs.mkdir()
        run_trl(MINILLM, {**job, "output": str(theirs / "student")}, theirs)
        for name, student in zip(found, (pair / "student", ours / "student", theirs / "student"), strict=True):
            found[name].append(held_out(str(student), job["teacher"], pair / "eval.jsonl", TINY["max_new_tokens"]))
    return found


def step_times(folder: Path) -> dict[str, dict[str, list[float]]]:
    """By dtype and trainer, seconds of the steps after the first, which warms up."""
    student, teacher = save_student(folder / "student"), save_student(folder / "teacher", num_layers=TEACHER_LAYERS)
    data = folder / "rows.jsonl"
    texts = [f"{place:0{PROMPT_TOKENS}d}" for place in range(NUM_PROMPTS * (TIMED_STEPS + 1))]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    job = {**LARGE, "student": student, "teacher": teacher, "data": str(data), "seed": 0, "saves": False}
    return {dtype: _step_times_in(folder / dtype, {**job, "dtype": dtype}) for dtype in DTYPES}


def _step_times_in(folder: Path, job: dict[str, Any]) -> dict[str, list[float]]:
    found = {"this project": run_ours({**job, "output": str(folder / "ours")})}
    for trl in (MINILLM, DISTILLATION):
        theirs = folder / trl[0]
        theirs.mkdir()
        found[" ".join(("TRL", *trl))] = run_trl(trl, {**job, "output": str(theirs / "out")}, theirs)
    return {name: seconds[1:] for name, seconds in found.items()}


def show_quality(found: dict[str, list[dict[str, float]]]) -> None:
    table = Table(
        "held-out, seeds 0, 1, 2", *(f"seed {seed}" for seed in SEEDS), title="reverse KL a token, exact match"
    )
    for name, rows in found.items():
        table.add_row(name, *(f"{row['reverse_kl']:.4f}, {row['exact_match']:.1%}" for row in rows))
    Console().print(table)


def show_times(found: dict[str, dict[str, list[float]]]) -> None:
    table = Table("a step", "dtype", "median s", "this project's of it")
    table.title = f"235 M student, {NUM_PROMPTS} x {NEW_TOKENS} tokens"
    for dtype, of_dtype in found.items():
        medians = {name: statistics.median(seconds) for name, seconds in of_dtype.items()}
        for name, median in medians.items():
            table.add_row(name, dtype, f"{median:.1f}", f"{medians['this project'] / median:.2f}x")
    Console().print(table)


def main(*parts: str) -> None:
    path = results.FOLDER / "against_trl.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    content = {name: kept[name] for name in ("quality", "step_s") if name in kept}
    with tempfile.TemporaryDirectory() as place:
        if not parts or "quality" in parts:
            content["quality"] = quality(Path(place))
            show_quality(content["quality"])
        if not parts or "time" in parts:
            content["step_s"] = step_times(Path(place))
            show_times(content["step_s"])
    results.write("against_trl", content)


if __name__ == "__main__":
    main(*sys.argv[1:])
