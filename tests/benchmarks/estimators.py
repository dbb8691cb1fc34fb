"""Bias and noise of the single-step estimators' gradients on the tiny pair; writes results/estimators.json.

On the same sampled completions each estimator's gradient is compared with that of the full vocabulary, over many draws:
    bias    length of the mean difference
    noise   root mean square of the difference around its mean
both over the length of the mean full-vocabulary gradient. With D draws the bias of an unbiased estimator is still
measured at about noise / sqrt(D); that is its last column. Measured at the student's start and after some steps.
"""

import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from services.config import LossConfig, RunConfig
from services.models.causal_lm import hidden_states, load_tokenizer, output_head
from services.models.padding import pad_sequences
from tests.benchmarks import results
from trainer.data.prompts import read_prompts
from trainer.loss import LossInputs, minillm_loss
from trainer.loss.head import HeadOutput
from trainer.student import Student, load_student
from trainer.tiny.pair import build_tiny_pair

PAIR = Path("outputs/tiny-pair")
NUM_PROMPTS, NEW_TOKENS, DRAWS, TRAINING_STEPS = 128, 5, 200, 80
ON_POLICY = {"importance_sampling": "none", "advantage_clip": None}
ESTIMATORS: dict[str, tuple[LossConfig, int]] = {
    "policy gradient, gamma 0": (LossConfig(single_step_decomposition=False, **ON_POLICY), 4),
    "truncated, K = 4": (LossConfig(single_step_estimator="truncated", **ON_POLICY), 4),
    "hybrid, K = 4": (LossConfig(**ON_POLICY), 4),
    "truncated, K = 32": (LossConfig(single_step_estimator="truncated", **ON_POLICY), 32),
    "hybrid, K = 32": (LossConfig(**ON_POLICY), 32),
}
FULL = LossConfig(single_step_estimator="full", **ON_POLICY)


class Draw:
    """Completions sampled from the student, as tensors."""

    def __init__(self, student: Student, prompts: list[list[int]], end: int, generator: torch.Generator):
        self.prompts, self.completions = prompts, sample(student, prompts, end, generator)
        sequences = [p + c for p, c in zip(prompts, self.completions, strict=True)]
        self.batch = pad_sequences(sequences, [len(p) for p in prompts])
        self.cu_seqlens = torch.tensor([0, *map(len, self.completions)]).cumsum(0)

    def logprobs(self, model: Student, support_ids: Tensor) -> HeadOutput:
        output: HeadOutput = model(self.batch.input_ids, self.batch.positions, self.batch.token_ids, support_ids)
        return output

    def loss(self, student: Student, teacher: Student, config: LossConfig, top_k: int) -> Tensor:
        """Of the whole draw, against the teacher's top-k."""
        vocabulary = teacher.vocab_size
        with torch.no_grad():
            everything = torch.arange(vocabulary).expand(len(self.batch.token_ids), vocabulary)
            support_ids = self.logprobs(teacher, everything).support_logprobs.topk(top_k).indices
            scored = self.logprobs(teacher, support_ids)
        output = self.logprobs(student, support_ids)
        inputs = LossInputs(
            student_token_logprobs=output.token_logprobs,
            student_support_logprobs=output.support_logprobs,
            student_tail_logprob=output.tail_logprob,
            rollout_logprobs=output.token_logprobs.detach(),
            teacher_token_logprobs=scored.token_logprobs,
            teacher_support_logprobs=scored.support_logprobs,
            teacher_tail_logprob=scored.tail_logprob,
            support_ids=support_ids,
            token_ids=self.batch.token_ids,
            loss_mask=torch.ones_like(self.batch.token_ids),
            cu_seqlens=self.cu_seqlens,
        )
        return minillm_loss(inputs, config)[0]


@torch.no_grad()
def sample(student: Student, prompts: list[list[int]], end: int, generator: torch.Generator) -> list[list[int]]:
    """One completion a prompt; prompts of equal length."""
    ids = torch.tensor(prompts)
    for _ in range(NEW_TOKENS):
        last = hidden_states(student.model, ids)[:, -1]
        probabilities = output_head(student.model, check=False).float32_logits(last).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    completions = ids[:, len(prompts[0]) :].tolist()
    return [c[: c.index(end) + 1] if end in c else c for c in completions]


def gradient(loss: Tensor, model: Student) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def measure(student: Student, teacher: Student, prompts: list[list[int]], end: int) -> dict:
    """Bias and noise of every estimator, relative to the mean full-vocabulary gradient."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = teacher.vocab_size
    full, difference, square = (
        torch.zeros(()),
        dict.fromkeys(ESTIMATORS, torch.zeros(())),
        dict.fromkeys(ESTIMATORS, 0.0),
    )
    for _ in range(DRAWS):
        draw = Draw(student, prompts, end, generator)
        exact = gradient(draw.loss(student, teacher, FULL, vocabulary), student)
        full = full + exact / DRAWS
        for name, (config, top_k) in ESTIMATORS.items():
            d = gradient(draw.loss(student, teacher, config, top_k), student) - exact
            difference[name] = difference[name] + d / DRAWS
            square[name] += float(d @ d) / DRAWS
    size = float(full.norm())
    figures = {}
    for name in ESTIMATORS:
        bias = float(difference[name].norm())
        noise = max(square[name] - bias**2, 0.0) ** 0.5
        figures[name] = {
            "bias": bias / size,
            "noise": noise / size,
            "bias_of_unbiased": noise / size / DRAWS**0.5,
        }
    return figures


def trained(student: Student, teacher: Student, prompts: list[list[int]], end: int) -> Student:
    """A copy of the student after some steps on the full-vocabulary term."""
    student = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(TRAINING_STEPS):
        loss = Draw(student, prompts, end, generator).loss(student, teacher, FULL, teacher.vocab_size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return student


def main() -> None:
    build_tiny_pair(PAIR)
    student, teacher = (
        load_student(RunConfig(student={"model": str(PAIR / name)}).student) for name in ("student", "teacher")
    )
    tokenizer = load_tokenizer(str(PAIR / "student"))
    rows = read_prompts(str(PAIR / "train.jsonl"), RunConfig().data, tokenizer).fitting(64)[:NUM_PROMPTS]
    prompts = [row.token_ids for row in rows]
    end = tokenizer.eos_token_id
    figures = {"start": measure(student, teacher, prompts, end)}
    later = trained(student, teacher, prompts, end)
    figures[f"after {TRAINING_STEPS} steps"] = measure(later, teacher, prompts, end)
    results.write("estimators", {"draws": DRAWS, "prompts": NUM_PROMPTS, "figures": figures})
    table = Table("student", "estimator", "bias", "noise", "bias if unbiased", title="relative to the full gradient")
    for state, by_estimator in figures.items():
        for name, figure in by_estimator.items():
            table.add_row(state, name, *(f"{figure[key]:.3f}" for key in ("bias", "noise", "bias_of_unbiased")))
    Console().print(table)


if __name__ == "__main__":
    main()
