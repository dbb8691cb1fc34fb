"""The yardstick itself: full-vocabulary reverse KL and exact match."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.config import RunConfig
from services.schemas import TeacherScores
from tests.models import save_model
from tests.unit.trainer.attached import alone, attached
from tests.unit.trainer.test_batch import SAMPLES, VOCAB
from tests.unit.trainer.test_preflight import teacher_info
from trainer.evaluate import Evaluator, reverse_kl_sum, within_rows
from trainer.model import load_student
from trainer.prompts import Prompt
from trainer.teachers import Teachers
from trainer.tiny_pair import build_tokenizer

ROLLOUTS = [s.rollout for s in SAMPLES]
NUM_ROWS = sum(len(r.completion.token_ids) for r in ROLLOUTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return load_student(RunConfig(student={"model": save_model(tmp_path_factory.mktemp("m"), "llama")}).student)


def exact_kl(model, teacher: torch.Tensor) -> float:  # type: ignore[no-untyped-def]
    total, row = 0.0, 0
    for rollout in ROLLOUTS:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.sequence])).logits[0].double()
        q = logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1]
        p = teacher[row : row + len(q)].double()
        total += float((q.exp() * (q - p[:, :VOCAB])).sum())
        row += len(q)
    return total


def shuffled(logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logprobs of every token, in another order at every row."""
    ids = torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(2)).argsort(-1).int()
    return ids, logprobs.gather(1, ids.long())


@pytest.mark.parametrize("padding", [0, 59])
def test_reverse_kl_is_over_the_full_vocabulary_whatever_its_padding(model, padding: int) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(NUM_ROWS, VOCAB + padding, generator=torch.Generator().manual_seed(0))
    logits[:, VOCAB:] = -40.0
    teacher = logits.log_softmax(-1)
    assert reverse_kl_sum(model, ROLLOUTS, *shuffled(teacher)) == pytest.approx(exact_kl(model, teacher), rel=1e-5)


def test_ids_that_only_the_student_has_are_left_out(model) -> None:  # type: ignore[no-untyped-def]
    teacher = torch.randn(NUM_ROWS, VOCAB - 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    expected, row = 0.0, 0
    for rollout in ROLLOUTS:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.sequence])).logits[0].double()
        q = logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1, : VOCAB - 5]
        expected += float((q.exp() * (q - teacher[row : row + len(q)].double())).sum())
        row += len(q)
    assert reverse_kl_sum(model, ROLLOUTS, *shuffled(teacher)) == pytest.approx(expected, rel=1e-5)


def test_a_student_is_no_distance_from_itself(model) -> None:  # type: ignore[no-untyped-def]
    own = []
    for rollout in ROLLOUTS:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.sequence])).logits[0]
        own.append(logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1])
    assert reverse_kl_sum(model, ROLLOUTS, *shuffled(torch.cat(own))) == pytest.approx(0.0, abs=1e-4)


class FullTeacher:
    """Scores the whole vocabulary, its candidates in an order of their own, from [N, V] logprobs per sequence."""

    def __init__(self, logprobs: dict[tuple[int, ...], torch.Tensor]) -> None:
        self.logprobs = logprobs
        self.asked: list[int] = []

    async def score(
        self, sequences: list[tuple[list[int], int]], *, top_k: int, max_rows_per_request: int
    ) -> TeacherScores:
        rows = [self.logprobs[tuple(ids)] for ids, _ in sequences]
        self.asked = [len(r) for r in rows]
        best = torch.cat(rows).sort(-1, descending=True)
        assert top_k == best.values.shape[1] and max_rows_per_request >= 1
        offsets, zeros = np.cumsum([0, *self.asked]), np.zeros(len(best.values), np.float32)
        ids = best.indices.numpy().astype(np.int32)
        scored = np.concatenate([ids[prompt_length:] for ids, prompt_length in sequences])
        return TeacherScores("t", "f", 1.0, top_k, offsets, scored, zeros, ids, best.values.numpy(), zeros, zeros)


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 24, 10_000])
async def test_the_mean_reverse_kl_pairs_every_completion_with_its_own_teacher_rows(
    model,  # type: ignore[no-untyped-def]
    tokens_per_micro_batch: int,
) -> None:
    teacher = torch.randn(NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(2)).mul(3).log_softmax(-1)
    cut = teacher.split([len(r.completion.token_ids) for r in ROLLOUTS])
    client = FullTeacher({tuple(r.sequence): rows for r, rows in zip(ROLLOUTS, cut, strict=True)})
    config = RunConfig(pipeline={"tokens_per_micro_batch": tokens_per_micro_batch})
    tokenizer = build_tokenizer()
    evaluator = Evaluator(config, [], tokenizer, None, alone(client), [256])  # type: ignore[arg-type]
    reverse_kl, num_tokens = await evaluator._reverse_kl(model, ROLLOUTS)
    assert num_tokens == NUM_ROWS
    assert reverse_kl == pytest.approx(exact_kl(model, teacher) / NUM_ROWS, rel=1e-5)


async def test_each_completion_is_measured_against_its_own_teacher(model) -> None:  # type: ignore[no-untyped-def]
    """Every other row names the second teacher, whose embedding is padded by 59 rows."""
    own = torch.randn(NUM_ROWS, VOCAB, generator=torch.Generator().manual_seed(3)).mul(3).log_softmax(-1)
    padded = torch.randn(NUM_ROWS, VOCAB + 59, generator=torch.Generator().manual_seed(4)).mul(3).log_softmax(-1)
    lengths = [len(r.completion.token_ids) for r in ROLLOUTS]
    names = ["maths" if index % 2 else None for index in range(len(ROLLOUTS))]
    rollouts = [replace(r, prompt=replace(r.prompt, teacher=n)) for r, n in zip(ROLLOUTS, names, strict=True)]
    keys = [tuple(r.sequence) for r in rollouts]
    first, second = (FullTeacher(dict(zip(keys, rows.split(lengths), strict=True))) for rows in (own, padded))
    tokenizer = build_tokenizer()
    of_second = teacher_info(tokenizer, padded_vocab_size=VOCAB + 59)
    teachers = Teachers([attached(first, teacher_info(tokenizer)), attached(second, of_second, "maths")])
    evaluator = Evaluator(RunConfig(), [], tokenizer, None, teachers, [256])  # type: ignore[arg-type]
    reverse_kl, num_tokens = await evaluator._reverse_kl(model, rollouts)
    rows_of = np.repeat(names, lengths)
    expected = torch.where(torch.from_numpy(rows_of == "maths")[:, None], padded[:, :VOCAB], own)
    assert num_tokens == NUM_ROWS and first.asked == lengths[::2] and second.asked == lengths[1::2]
    assert reverse_kl == pytest.approx(exact_kl(model, expected) / NUM_ROWS, rel=1e-5)


async def test_a_large_vocabulary_is_scored_on_as_many_completions_as_the_budget_holds(model) -> None:  # type: ignore[no-untyped-def]
    vocab = 1 << 14  # 8 bytes a candidate: 1 MiB holds 8 rows
    teacher = torch.full((NUM_ROWS, vocab), 0.0).log_softmax(-1)
    cut = teacher.split([len(r.completion.token_ids) for r in ROLLOUTS])
    client = FullTeacher({tuple(r.sequence): rows for r, rows in zip(ROLLOUTS, cut, strict=True)})
    tokenizer = build_tokenizer()
    info = teacher_info(tokenizer, padded_vocab_size=vocab)
    # The budget holds for the largest vocabulary, whoever is asked.
    teachers = Teachers([attached(None, teacher_info(tokenizer), "maths"), attached(client, info)])
    config = RunConfig(evaluation={"kl_budget_mib": 1})
    evaluator = Evaluator(config, [], tokenizer, None, teachers, [256])  # type: ignore[arg-type]
    _, num_tokens = await evaluator._reverse_kl(model, ROLLOUTS)
    assert num_tokens == sum(client.asked) and 0 < len(client.asked) < len(ROLLOUTS)
    assert sum(client.asked) <= 8


def test_a_budget_takes_a_seeded_subset_of_at_least_one() -> None:
    assert within_rows(ROLLOUTS, NUM_ROWS, seed=0) == ROLLOUTS
    assert len(within_rows(ROLLOUTS, 0, seed=0)) == 1
    assert len({tuple(r.prompt.row for r in within_rows(ROLLOUTS, 10, seed=seed)) for seed in range(8)}) > 1
    some = within_rows(ROLLOUTS, 10, seed=0)
    assert sum(len(r.completion.token_ids) for r in some) <= 10 and some == within_rows(ROLLOUTS, 10, seed=0)


class GreedyTeacher:
    """Scores as if its likeliest token at every row were given."""

    def __init__(self, best: list[list[int]]) -> None:
        self.best = best

    async def score(self, sequences: list[tuple[list[int], int]], *, top_k: int) -> TeacherScores:
        assert [len(ids) - prompt for ids, prompt in sequences] == [len(b) for b in self.best]
        flat = np.array([token for row in self.best for token in row])
        zeros = np.zeros(len(flat), np.float32)
        offsets = np.concatenate([[0], np.cumsum([len(b) for b in self.best])])
        scored = np.concatenate([ids[prompt_length:] for ids, prompt_length in sequences])
        return TeacherScores("t", "f", 1.0, 1, offsets, scored, zeros, flat[:, None], zeros[:, None], zeros, zeros)


async def test_without_answers_nothing_is_asked_of_the_teacher() -> None:
    tokenizer = build_tokenizer()
    prompts = [Prompt(1, [1], "", None)]
    evaluator = Evaluator(RunConfig(), prompts, tokenizer, None, alone(None), [256])  # type: ignore[arg-type]
    assert await evaluator.teacher_exact_match() is None


async def test_the_teachers_exact_match_is_what_greedy_decoding_would_give() -> None:
    tokenizer = build_tokenizer()
    end = tokenizer.eos_token_id
    prompts = [Prompt(i, [1], "", answer) for i, answer in enumerate(["12", "34", "56", None])]
    best = [[*b"12", end], [*b"35", end], [*b"56", ord("7")]]  # right; a wrong digit; does not stop
    evaluator = Evaluator(
        RunConfig(),
        prompts,
        tokenizer,
        None,  # type: ignore[arg-type]
        alone(GreedyTeacher(best)),
        [end],
    )
    assert await evaluator.teacher_exact_match() == pytest.approx(1 / 3)


async def test_the_exact_match_of_each_row_is_that_of_its_own_teacher() -> None:
    tokenizer = build_tokenizer()
    end = tokenizer.eos_token_id
    rows = [("12", None), ("34", "maths"), ("56", None), ("78", "maths")]
    prompts = [Prompt(i, [1], "", answer, teacher=name) for i, (answer, name) in enumerate(rows)]
    own = GreedyTeacher([[*b"12", end], [*b"56", end]])  # both right
    maths = GreedyTeacher([[*b"12", end], [*b"78", end]])  # the first is wrong
    teachers = Teachers([attached(own), attached(maths, name="maths")])
    evaluator = Evaluator(RunConfig(), prompts, tokenizer, None, teachers, [end])  # type: ignore[arg-type]
    assert await evaluator.teacher_exact_match() == pytest.approx(3 / 4)


def test_the_students_exact_match_ignores_rows_without_an_answer() -> None:
    tokenizer = build_tokenizer()
    evaluator = Evaluator(RunConfig(), [], tokenizer, None, alone(None), [256])  # type: ignore[arg-type]

    def rollout(answer: str | None, said: bytes):  # type: ignore[no-untyped-def]
        completion = replace(ROLLOUTS[0].completion, token_ids=np.array([*said, 256], np.int32))
        return replace(ROLLOUTS[0], prompt=Prompt(1, [1], "", answer), completion=completion)

    assert evaluator._exact_match([rollout("12", b"12"), rollout("12", b"13"), rollout(None, b"x")]) == 0.5
    assert evaluator._exact_match([rollout(" 12", b"12 ")]) == 1.0
    assert evaluator._exact_match([rollout(None, b"x")]) is None
