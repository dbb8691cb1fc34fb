"""How far apart trainer, rollout server and teacher are in half precision, by the dtype of their heads' logits.

Writes results/precision.json. The body is in bfloat16 everywhere, over float32 master weights in the trainer. Every pair of
head dtypes is measured: both in bfloat16, one of them raised to float32, both. The teacher has the student's weights, so
that its logprobs of the same tokens should be the trainer's as well; its transformers engine always has a float32 head.

Two models: the tiny pair's student, and a random one with 32,768 tokens. Its final states have unit size, so that a head
with weights of sd LOGITS_SD / sqrt(hidden size) makes logits of sd LOGITS_SD: those of the likeliest tokens lie at 20 to 40,
where bfloat16 has steps of 0.125 and more. Its embeddings have sd 1, beside which the layers add little: otherwise what
bfloat16 does in a random body would drown what it does in the head.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from services.clients import RolloutClient, TeacherClient
from services.config import RunConfig
from services.models.causal_lm import hidden_states, output_head
from services.models.padding import pad_sequences
from services.wire.rollout import RolloutCompletion, RolloutSampling
from tests.benchmarks import results
from tests.integration.processes import KEY, server
from trainer.parallel import measuring
from trainer.student import Student, load_student
from trainer.tiny.pair import build_tiny_pair, build_tokenizer

PAIR = Path("outputs/tiny-pair")
VOCABULARY, HIDDEN_SIZE, LOGITS_SD = 32_768, 512, 7.0
HALF, FULL = "bfloat16", "float32"
REPEATS = 3


@dataclass(frozen=True)
class Case:
    folder: str
    prompts: list[list[int]]
    max_new_tokens: int


def save_random_model(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(shape)
    model.model.embed_tokens.weight.data.normal_()
    model.lm_head.weight.data.normal_(std=LOGITS_SD / HIDDEN_SIZE**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def cases() -> Iterator[dict[str, Case]]:
    build_tiny_pair(PAIR)
    sums = [list(f"{a:02d}+{b:02d}=".encode()) for a in range(3, 99, 6) for b in range(5, 99, 6)]
    with tempfile.TemporaryDirectory() as folder:
        random_model = save_random_model(Path(folder))
        prompts = torch.randint(0, VOCABULARY, (16, 12)).tolist()
        yield {"tiny": Case(str(PAIR / "student"), sums, 5), "random": Case(random_model, prompts, 48)}


def trainer_logprobs(student: Student, case: Case, completions: list[RolloutCompletion]) -> dict[str, np.ndarray]:
    """[N] logprobs of the sampled tokens by the head's dtype, and the logits themselves at "logits"."""
    prompts = [case.prompts[c.prompt_index] for c in completions]
    sequences = [[*p, *c.token_ids.tolist()] for p, c in zip(prompts, completions, strict=True)]
    batch = pad_sequences(sequences, [len(p) for p in prompts])
    tokens = batch.token_ids
    with measuring(student):
        full = student(batch.input_ids, batch.positions, tokens, tokens[:, None]).token_logprobs
        hidden = hidden_states(student.model, batch.input_ids).flatten(0, 1)[batch.positions]
        logits = (hidden @ output_head(student.model, check=False).weight.bfloat16().t()).float()
    half = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    return {FULL: full.numpy(), HALF: half.numpy(), "logits": logits.gather(1, tokens[:, None]).squeeze(1).numpy()}


async def sample(url: str, case: Case) -> tuple[list[RolloutCompletion], float]:
    """Completions, and the seconds that they take at best."""
    sampling = RolloutSampling(max_new_tokens=case.max_new_tokens, seed=0)
    seconds = []
    async with RolloutClient([url], key=KEY) as client:
        for _ in range(REPEATS):
            started = time.perf_counter()
            completions = await client.generate(case.prompts, sampling)
            seconds.append(time.perf_counter() - started)
    return sorted(completions, key=lambda c: c.prompt_index), min(seconds)


async def score(url: str, case: Case, completions: list[RolloutCompletion]) -> np.ndarray:
    prompts = [case.prompts[c.prompt_index] for c in completions]
    sequences = [([*p, *c.token_ids.tolist()], len(p)) for p, c in zip(prompts, completions, strict=True)]
    async with TeacherClient([url], key=KEY) as client:
        return (await client.score(sequences, top_k=1)).token_logprobs


def summary(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    difference = np.abs(ours - theirs)
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def teacher_options(engine: str, head: str) -> list[str]:
    if engine == "transformers":
        return []
    options = {"engine": "vllm", "float32_head": str(head == FULL).lower(), "max_model_len": "128"}
    return [word for name, value in options.items() for word in (f"--teacher.{name}", value)]


def measure(case: Case, logs: Path) -> dict[str, Any]:
    student = load_student(RunConfig(student={"model": case.folder, "dtype": "bfloat16"}).student)
    differences: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    limits = ["--rollout.max_model_len", "128", "--sampling.max_new_tokens", str(case.max_new_tokens)]
    for head in (HALF, FULL):
        options = ["--rollout.dtype", HALF, "--rollout.float32_head", str(head == FULL).lower(), *limits]
        with server("rollout", logs / f"rollout-{head}", "--student.model", case.folder, *options) as rollout:
            completions, seconds[head] = asyncio.run(sample(rollout.url, case))
        ours = trainer_logprobs(student, case, completions)
        theirs = np.concatenate([c.rollout_logprobs for c in completions])
        for trainer in (HALF, FULL):
            differences[f"rollout {head}, trainer {trainer}"] = summary(ours[trainer], theirs)
    for engine, head in (("transformers", FULL), ("vllm", HALF), ("vllm", FULL)):
        log, options = logs / f"teacher-{engine}-{head}", teacher_options(engine, head)
        with server("teacher", log, "--teacher.model", case.folder, "--teacher.dtype", HALF, *options) as teacher:
            scores = asyncio.run(score(teacher.url, case, completions))
        differences[f"teacher {engine} {head}, trainer {FULL}"] = summary(ours[FULL], scores)
    return {
        "tokens": len(theirs),
        "mean_logprob": float(theirs.mean()),
        "sampled_tokens_logits": {"mean": float(ours["logits"].mean()), "max": float(ours["logits"].max())},
        "difference_of_logprobs": differences,
        "rollout_s_by_head": seconds,
    }


def main() -> None:
    with cases() as models, tempfile.TemporaryDirectory() as logs:
        figures = {name: measure(case, Path(logs)) for name, case in models.items()}
    results.write("precision", {"logits_sd": LOGITS_SD, "vocabulary": VOCABULARY, "models": figures})
    table = Table("model", "logits of", "mean difference", "largest")
    for name, figure in figures.items():
        for between, found in figure["difference_of_logprobs"].items():
            table.add_row(name, between, f"{found['mean']:.4f}", f"{found['max']:.4f}")
    Console().print(table)
