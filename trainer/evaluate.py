"""What the student can do on held-out prompts, greedily, under the weights the rollout servers hold.

    exact_match   share of rows with an `answer` whose completion, stripped, equals it
    reverse_kl    mean over completion tokens of KL(student || teacher) over the full vocabulary, nats, along
                  the student's own greedy completions
    teacher       the same exact match for the teacher, without generating: greedy decoding yields the answer
                  if and only if each of its tokens, the end included, is the teacher's likeliest next one

Each row is measured against its own teacher. With a large vocabulary the full distributions are costly to move, so
`evaluation.kl_budget_mib` bounds them and a seeded subset of the completions is scored.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.clients import RolloutClient
from services.config import RunConfig
from services.padding import cut_by_padded_tokens, pad_rows, predicting_positions
from services.schemas import BYTES_PER_CANDIDATE, RolloutSampling
from trainer.model import head_of, student_logprobs
from trainer.prompts import Prompt
from trainer.rollouts import Rollout, generate_rollouts
from trainer.teachers import Teacher, Teachers

# One answer of the teacher holds at most this much; the work is cut accordingly.
_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True)
class Evaluation:
    exact_match: float | None
    reverse_kl: float
    num_prompts: int
    num_kl_tokens: int


class Evaluator:
    """Holds what every evaluation of a run shares."""

    def __init__(
        self,
        config: RunConfig,
        prompts: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        rollout_client: RolloutClient,
        teachers: Teachers,
        eos_token_ids: list[int],
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts = prompts[: config.evaluation.num_prompts]
        self._rollouts, self._teachers = rollout_client, teachers
        self._eos_token_ids = eos_token_ids

    async def student(self, model: PreTrainedModel) -> Evaluation:
        """Measure the student; the rollout servers must hold `model`'s weights."""
        sampling = RolloutSampling(max_new_tokens=self._config.evaluation_max_new_tokens(), temperature=0.0)
        rollouts = await generate_rollouts(self._rollouts, self._prompts, sampling)
        reverse_kl, num_tokens = await self._reverse_kl(model, rollouts)
        return Evaluation(self._exact_match(rollouts), reverse_kl, len(rollouts), num_tokens)

    async def teacher_exact_match(self) -> float | None:
        """Share of answers that greedy decoding of each row's teacher would give, or None without answers."""
        graded = [p for p in self._prompts if p.answer is not None]
        if not graded:
            return None
        hits = 0
        for teacher, places in self._teachers.split(graded):
            hits += await self._teacher_hits(teacher, [graded[place] for place in places])
        return hits / len(graded)

    async def _teacher_hits(self, teacher: Teacher, prompts: list[Prompt]) -> int:
        answers = [self._tokenizer(p.answer, add_special_tokens=False)["input_ids"] for p in prompts]
        end = self._tokenizer.eos_token_id
        sequences = [([*p.token_ids, *a, end], len(p.token_ids)) for p, a in zip(prompts, answers, strict=True)]
        scores = await teacher.score(sequences, top_k=1)
        hits = 0
        for index, answer in enumerate(answers):
            best = scores.topk_ids[scores.row_offsets[index] : scores.row_offsets[index + 1], 0].tolist()
            hits += best[:-1] == answer and best[-1] in self._eos_token_ids
        return hits

    def _exact_match(self, rollouts: list[Rollout]) -> float | None:
        graded = [r for r in rollouts if r.prompt.answer is not None]
        if not graded:
            return None
        texts = self._tokenizer.batch_decode([r.completion.token_ids for r in graded], skip_special_tokens=True)
        answers = [(r.prompt.answer or "").strip() for r in graded]
        return sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True)) / len(graded)

    async def _reverse_kl(self, model: PreTrainedModel, rollouts: list[Rollout]) -> tuple[float, int]:
        vocab = max(teacher.info.padded_vocab_size for teacher in self._teachers)
        rows_in_budget = max(1, (self._config.evaluation.kl_budget_mib << 20) // (vocab * BYTES_PER_CANDIDATE))
        chosen = within_rows(rollouts, rows_in_budget, seed=self._config.seed)
        # One after the other: embeddings differ in size, and one teacher's distributions at a time is memory enough.
        total = 0.0
        for teacher, places in self._teachers.split(r.prompt for r in chosen):
            total += await self._reverse_kl_sum(model, teacher, [chosen[place] for place in places])
        num_tokens = sum(len(r.completion.token_ids) for r in chosen)
        return total / num_tokens, num_tokens

    async def _reverse_kl_sum(self, model: PreTrainedModel, teacher: Teacher, rollouts: list[Rollout]) -> float:
        """Over all completion tokens of one teacher's rollouts, nats."""
        vocab = teacher.info.padded_vocab_size
        scores = await teacher.score(
            [(r.sequence, len(r.prompt.token_ids)) for r in rollouts],
            top_k=vocab,
            max_rows_per_request=max(1, _ANSWER_BYTES // (vocab * BYTES_PER_CANDIDATE)),
        )
        total = 0.0
        limit = self._config.pipeline.tokens_per_micro_batch
        for group in cut_by_padded_tokens([len(r.sequence) for r in rollouts], limit):
            rows = np.concatenate([np.arange(scores.row_offsets[i], scores.row_offsets[i + 1]) for i in group])
            of_group = scores.topk_ids[rows], scores.topk_logprobs[rows]
            total += reverse_kl_sum(model, [rollouts[i] for i in group], *map(torch.from_numpy, of_group))
        return total


def within_rows(rollouts: list[Rollout], max_rows: int, *, seed: int) -> list[Rollout]:
    """All rollouts, or a seeded random subset whose completion tokens fit into `max_rows` (at least one)."""
    order = list(range(len(rollouts)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    rows = 0
    for index in order:
        rows += len(rollouts[index].completion.token_ids)
        if chosen and rows > max_rows:
            break
        chosen.append(index)
    return [rollouts[index] for index in sorted(chosen)]


@torch.no_grad()
def reverse_kl_sum(
    model: PreTrainedModel, rollouts: list[Rollout], teacher_ids: torch.Tensor, teacher_logprobs: torch.Tensor
) -> float:
    """Sum over completion tokens of KL(student || teacher), nats.

    Ids that only one of two differently padded embeddings has belong to no token; they are left out.

    Args:
        teacher_ids, teacher_logprobs: [N, V_teacher], every token at every row, in any order.
    """
    input_ids = pad_rows([r.sequence for r in rollouts])
    prompts, lengths = zip(*((len(r.prompt.token_ids), len(r.completion.token_ids)) for r in rollouts), strict=True)
    positions = predicting_positions(list(prompts), list(lengths), input_ids.shape[1])
    token_ids = torch.from_numpy(np.concatenate([r.completion.token_ids for r in rollouts])).long()
    support_ids = torch.where(teacher_ids < len(head_of(model).weight), teacher_ids.long(), -1)
    ids, where, tokens, support = (x.to(model.device) for x in (input_ids, positions, token_ids, support_ids))
    q = student_logprobs(model, ids, where, tokens, support, temperature=1.0).support_logprobs.cpu()
    p = teacher_logprobs.float()
    terms = torch.where(q > -torch.inf, q.exp() * (q - p), 0.0)
    return float(terms.double().sum())
