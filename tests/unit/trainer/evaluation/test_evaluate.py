"""The yardstick itself: reverse KL from a few logprobs, against the whole distributions; whose weights were measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import RunConfig
from services.errors import PeerError, WeightsWantedError
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from tests.models import save_model
from tests.pushing import learner_of
from tests.unit.trainer.attached import CallersLoop, measured, scored, teacher_of
from tests.unit.trainer.generating import Generator, completed
from tests.unit.trainer.samples import batch_of
from trainer import scoring
from trainer.data.prompts import Prompt
from trainer.evaluation import evaluate
from trainer.evaluation.evaluate import Evaluator, ReverseKL
from trainer.evaluation.exact_match import ExactMatch
from trainer.groups import ScoredSample
from trainer.learner import Learner
from trainer.teacher_scores import Support
from trainer.teachers import Teacher, Teachers
from trainer.tiny.pair import build_tokenizer
from trainer.weights.policy_versions import PolicyVersions

VOCAB = 1000
PROMPTS = [Prompt(row, [row + 1, 7, 8 + row], "") for row in range(24)]


async def sampled(
    learner: Learner, teacher: Teacher, top_k: int, *, seed: int = 0, length: int = 12
) -> list[ScoredSample]:
    """Scored completions, sampled at temperature 1."""
    model = learner.student.model
    generator = Generator(model, [3], seed=seed)
    rollouts = await completed(generator, PROMPTS, RolloutSampling(max_new_tokens=length))
    support = Support("teacher_topk", top_k, len(model.lm_head.weight))
    samples, quarantined = await scored(Teachers([teacher]), rollouts, support)
    assert not quarantined
    return samples


@torch.no_grad()
def dense_reverse_kl(student: Any, teacher: Any, samples: list[ScoredSample]) -> float:
    """Mean over tokens of KL(student || teacher) over the whole vocabulary, float64."""
    total, count = 0.0, 0
    for sample in samples:
        ids, first = torch.tensor([sample.rollout.sequence]), len(sample.rollout.prompt.token_ids) - 1
        q, p = (m.double()(ids).logits[0, first:-1].log_softmax(-1) for m in (student, teacher))
        total += float((q.exp() * (q - p)).sum())
        count += len(q)
    student.float(), teacher.float()
    return total / count


def mean_reverse_kl(
    learner: Learner, samples: list[ScoredSample], tokens_per_micro_batch: int
) -> tuple[float, float | None]:
    pipeline = learner.config.pipeline.model_copy(update={"tokens_per_micro_batch": tokens_per_micro_batch})
    learner.config = learner.config.model_copy(update={"pipeline": pipeline})
    found = ReverseKL(learner.reverse_kl(batch_of(samples)))
    return found.mean, found.stderr


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("vocab", "top_k"), [(VOCAB, 16), pytest.param(151_936, 64, marks=pytest.mark.long)])
async def test_the_estimate_is_within_two_standard_errors_of_the_dense_value_on_20_pairs(
    vocab: int, top_k: int, tmp_path: Path
) -> None:
    """Wide initialisations, so that the pairs are nats apart and most of the mass is outside the tokens asked for.

    Their reverse KL hardly differs between positions, so the estimate's own noise is all of its standard error, and an
    honest one leaves one pair in twenty outside of two.
    """
    outside, errors = [], []
    for seed in range(20):
        shape = {"vocab_size": vocab, "initializer_range": 0.05 + 0.05 * (seed % 4), "eos_token_id": 3}
        folders = [save_model(tmp_path / f"{seed}-{side}", "llama", seed=2 * seed + side, **shape) for side in (0, 1)]
        learner = learner_of(folders[0])
        async with teacher_of(folders[1]) as teacher:
            samples = await sampled(learner, teacher, top_k, seed=seed)
        estimate, stderr = mean_reverse_kl(learner, samples, 100)
        dense = dense_reverse_kl(learner.student.model, AutoModelForCausalLM.from_pretrained(folders[1]), samples)
        assert stderr is not None
        errors.append((estimate - dense) / stderr)
        outside += [(s.support_ids != s.rollout.completion.token_ids[:, None]).all(1).mean() for s in samples]
    print([round(error, 2) for error in errors])
    assert np.mean(outside) > 0.5
    assert sum(abs(error) <= 2 for error in errors) >= 18 and max(map(abs, errors)) < 3.5


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 64, 100_000])
async def test_where_the_support_is_the_vocabulary_it_is_the_dense_value(
    tokens_per_micro_batch: int, tmp_path: Path
) -> None:
    folders = [
        save_model(tmp_path / str(s), "qwen3", seed=s, vocab_size=80, pad_token_id=None, initializer_range=0.2)
        for s in (0, 1)
    ]
    learner = learner_of(folders[0])
    async with teacher_of(folders[1]) as teacher:
        samples = await sampled(learner, teacher, 80)
    dense = dense_reverse_kl(learner.student.model, AutoModelForCausalLM.from_pretrained(folders[1]), samples)
    assert dense > 0.1
    assert mean_reverse_kl(learner, samples, tokens_per_micro_batch)[0] == pytest.approx(dense, abs=1e-6)


async def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama", vocab_size=VOCAB, initializer_range=0.2)
    async with teacher_of(folder) as teacher:
        samples = await sampled(learner_of(folder), teacher, 64)
    estimate, stderr = mean_reverse_kl(learner_of(folder), samples, 100)
    assert estimate == pytest.approx(0.0, abs=1e-5) and stderr == pytest.approx(0.0, abs=1e-5)


async def test_the_standard_error_is_that_of_the_mean_over_completions(tmp_path: Path) -> None:
    """Over many evaluations the estimates scatter as widely as each one says."""
    folders = [
        save_model(tmp_path / str(s), "llama", seed=s, vocab_size=80, pad_token_id=None, initializer_range=0.3)
        for s in (0, 1)
    ]
    learner = learner_of(folders[0])
    async with teacher_of(folders[1]) as teacher:
        several = [await sampled(learner, teacher, 8, seed=seed, length=6) for seed in range(40)]
    measured = [mean_reverse_kl(learner, samples, 1000) for samples in several]
    scatter = np.std([estimate for estimate, _ in measured], ddof=1)
    said = np.mean([stderr for _, stderr in measured if stderr is not None])
    assert 0.7 < scatter / said < 1.4
    assert mean_reverse_kl(learner, several[0][:1], 1000)[1] is None


async def test_dropout_has_no_part_in_a_measurement(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama", vocab_size=80, pad_token_id=None, attention_dropout=0.5)
    learner = learner_of(folder, student={"disable_dropout": False})
    async with teacher_of(folder) as teacher:
        samples = await sampled(learner_of(folder), teacher, 79)
    assert learner.student.training
    assert mean_reverse_kl(learner, samples, 1000)[0] == pytest.approx(0.0, abs=1e-5)
    assert learner.student.training


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_model(tmp_path / "m", "qwen3", initializer_range=0.2)


def evaluator(rollouts: Any, teachers: list[Teacher], prompts: list[Prompt], **evaluation: Any) -> Evaluator:
    config = RunConfig(data={"eval_path": "e"}, evaluation={"max_new_tokens": 6, **evaluation})
    versions = PolicyVersions("mine")
    for version in (0, 6, 7):
        versions.set_live(PolicyLabel(version, 1, "mine"))
    return Evaluator(config, CallersLoop(), prompts, build_tokenizer(), rollouts, Teachers(teachers), [256], versions)


async def test_an_evaluation_says_which_weights_it_is_of(folder: str) -> None:
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        rollouts = Generator(learner.student.model, [256], version="7.1@mine")
        found = await measured(evaluator(rollouts, [teacher], PROMPTS), learner, 7)
        assert found.policy_version == 7 and found.exact_match is None and found.teacher_exact_match is None
        assert found.num_prompts == len(PROMPTS) and found.num_quarantined == 0
        for version, reason in (
            ("default", "under the version 'default', which is none"),
            ("7.1@yours", "under the version '7.1@yours', which is none"),
            ("6.1@mine", r"answers under version \[6\] after a push of version 7"),
        ):
            rollouts = Generator(learner.student.model, [256], version=version)
            with pytest.raises(WeightsWantedError, match=reason):
                await measured(evaluator(rollouts, [teacher], PROMPTS), learner, 7)


async def test_a_completion_that_the_teacher_cannot_score_costs_that_completion(tmp_path: Path) -> None:
    """The student's embedding is padded with tokens that the teacher does not have, and its weights are random."""
    ours = save_model(tmp_path / "s", "qwen3", vocab_size=300, initializer_range=0.05)
    theirs = save_model(tmp_path / "t", "qwen3", seed=1)
    learner = learner_of(ours)
    async with teacher_of(theirs) as teacher:
        found = await measured(evaluator(Generator(learner.student.model, [256]), [teacher], PROMPTS), learner, 0)
    assert 0 < found.num_quarantined < len(PROMPTS) and np.isfinite(found.reverse_kl)
    assert found.num_kl_tokens > 0


async def test_without_a_scored_completion_there_is_no_measurement(folder: str) -> None:
    learner = learner_of(folder)
    async with teacher_of(folder, max_model_len=4) as teacher:
        with pytest.raises(PeerError, match=r"no completion could be scored, the first one because .*tokens"):
            await measured(evaluator(Generator(learner.student.model, [256]), [teacher], PROMPTS), learner, 0)


async def test_each_completion_is_measured_against_its_own_teacher(folder: str, tmp_path: Path) -> None:
    """One teacher is the student itself; the measured distance is that of the rows which the other one scores."""
    other, learner = save_model(tmp_path / "other", "qwen3", seed=5, initializer_range=0.2), learner_of(folder)
    named = [replace(p, teacher="maths" if p.row % 3 == 0 else None) for p in PROMPTS]
    async with teacher_of(folder) as own, teacher_of(other, "maths") as maths:
        mixed = await measured(
            evaluator(Generator(learner.student.model, [256]), [own, maths], named, top_k=261), learner, 0
        )
        # The same completions: the generator's draws are in the order of the prompts.
        rollouts = await completed(Generator(learner.student.model, [256]), named, RolloutSampling(max_new_tokens=6))
        of_maths = [r for r in rollouts if r.prompt.teacher == "maths"]
        support = Support("teacher_topk", 261, 261)
        samples, _ = await scored(Teachers([own, maths]), of_maths, support)
    share = sum(len(s.rollout.completion.token_ids) for s in samples) / mixed.num_kl_tokens
    dense = dense_reverse_kl(learner.student.model, AutoModelForCausalLM.from_pretrained(other), samples)
    assert mixed.reverse_kl == pytest.approx(share * dense, rel=1e-4)


async def test_what_is_held_at_once_is_bounded_whatever_the_number_of_completions(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, learner = save_model(tmp_path / "other", "qwen3", seed=5, initializer_range=0.2), learner_of(folder)
    held: list[int] = []
    score = scoring.score_rollouts

    async def counting(teachers: Teachers, rollouts: list[Any], **options: Any) -> Any:
        held.append(sum(len(r.completion.token_ids) for r in rollouts))
        return await score(teachers, rollouts, **options)

    monkeypatch.setattr(scoring, "score_rollouts", counting)
    async with teacher_of(other) as teacher:
        whole = await measured(evaluator(Generator(learner.student.model, [256]), [teacher], PROMPTS), learner, 0)
        monkeypatch.setattr(evaluate, "_PART_BYTES", 20 * 261 * 8)  # 20 rows of the whole vocabulary
        parts = await measured(evaluator(Generator(learner.student.model, [256]), [teacher], PROMPTS), learner, 0)
    assert held[0] == sum(held[1:]) == whole.num_kl_tokens and len(held) > 3 and max(held[1:]) <= 20
    assert parts.reverse_kl == pytest.approx(whole.reverse_kl, rel=1e-6)
    assert parts.reverse_kl_stderr == pytest.approx(whole.reverse_kl_stderr, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "vocab", "max_top_k", "size"),
    [
        (None, 261, None, 261),
        (None, 2000, None, 64),
        (None, 2000, 20, 20),
        (100, 261, None, 100),
        (999, 261, None, 261),
    ],
)
async def test_how_many_logprobs_are_asked_for(
    given: int | None, vocab: int, max_top_k: int | None, size: int, tmp_path: Path
) -> None:
    async with teacher_of(save_model(tmp_path / "m", "qwen3", vocab_size=vocab), max_top_k=max_top_k) as teacher:
        asking = evaluator(None, [teacher], PROMPTS, **({} if given is None else {"top_k": given}))
        support = asking._support(vocab)
    assert (support.size, support.has_tail) == (size, size < vocab)


async def test_with_embeddings_of_two_sizes_one_token_is_outside(tmp_path: Path) -> None:
    async with teacher_of(save_model(tmp_path / "m", "qwen3", vocab_size=261)) as teacher:
        support = evaluator(None, [teacher], PROMPTS)._support(300)
    assert (support.size, support.has_tail) == (260, True)


class Says:
    """Rollout servers that complete each prompt with given ids, at temperature 0 with others than at 1.

    Attributes:
        reasons: what the completion of a prompt ends with, where it is not "stop".
    """

    def __init__(self, greedy: list[list[int]], version: str = "7.1@mine") -> None:
        self.greedy, self.version, self.reasons = greedy, version, dict[int, str]()

    async def generate(
        self, prompts: list[list[int]], sampling: RolloutSampling, *_: Any, on_completion: Any, **__: Any
    ) -> None:
        for index, prompt in enumerate(prompts):
            ids = self.greedy[prompt[0] - 1] if sampling.temperature == 0 else [50, 256]
            tokens, logprobs = np.array(ids, np.int32), np.full(len(ids), -1.0, np.float32)
            reason: Any = self.reasons.get(index, "stop")
            spans = [VersionSpan(self.version, 0, len(ids))]
            on_completion(RolloutCompletion(index, 0, tokens, logprobs, reason, spans))


def graded(count: int, without_answer: int = 0) -> list[Prompt]:
    """Prompts 1, 2, ... whose answer is always 7; behind them some without an answer."""
    answers = ["7"] * count + [None] * without_answer
    return [Prompt(row, [row, 61], "", answer=answer) for row, answer in enumerate(answers, 1)]


async def test_exact_match_is_the_share_of_rows_with_an_answer_that_greedy_decoding_answers(folder: str) -> None:
    right, wrong, endless, foreign_end = [55, 256], [56, 256], [55] * 6, [55, 257]
    rollouts = Says([right, wrong, endless, right, foreign_end, right])
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        found = await measured(evaluator(rollouts, [teacher], graded(5, without_answer=1)), learner, 7)
    assert found.exact_match == 2 / 5 and found.num_prompts == 6 and found.num_answers == 5


async def test_the_teachers_exact_match_is_that_of_each_rows_own_and_is_measured_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str | None, list[int], frozenset[int]]] = []

    async def count(teacher: Teacher, prompts: list[Prompt], rule: ExactMatch) -> int:
        asked.append((teacher.name, [prompt.row for prompt in prompts], rule.end_token_ids))
        return 1 if teacher.name is None else 2

    monkeypatch.setattr(evaluate, "count_teacher_matches", count)
    prompts = [replace(p, teacher="maths" if p.row % 2 == 0 else None) for p in graded(5, without_answer=1)]
    learner = learner_of(folder)
    async with teacher_of(folder) as own, teacher_of(folder, "maths") as maths:
        own = replace(own, info=own.info.model_copy(update={"eos_token_ids": [258]}))
        measuring = evaluator(Says([[55, 256]] * 6), [own, maths], prompts)
        first, second = [await measured(measuring, learner, 7) for _ in range(2)]
    assert first.teacher_exact_match == second.teacher_exact_match == 3 / 5
    assert asked[0] == (None, [1, 3, 5], {258, 256}) and asked[1][:2] == ("maths", [2, 4]) and len(asked) == 2


async def test_the_first_of_several_reasons_is_told(folder: str) -> None:
    rollouts = Says([[55, 256]] * 3)
    rollouts.reasons = {0: "abort", 1: "abort", 2: "abort"}
    generate = rollouts.generate

    async def one_without_tokens(*asked: Any, on_completion: Any, **_: Any) -> None:
        def arrive(c: RolloutCompletion) -> None:
            on_completion(c if c.prompt_index != 1 else replace(c, token_ids=c.token_ids[:0], finish_reason="stop"))

        await generate(*asked, on_completion=arrive)

    rollouts.generate = one_without_tokens  # type: ignore[method-assign]
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        with pytest.raises(PeerError, match=r"no prompt could be completed, the first one because .*gave up on it"):
            await measured(evaluator(rollouts, [teacher], graded(0, without_answer=3)), learner, 7)


@pytest.mark.parametrize("given_up", [{1: "abort"}, {0: "abort", 1: "abort", 2: "abort"}], ids=["one", "all"])
async def test_what_a_server_gives_up_on_is_not_counted_as_wrong(given_up: dict[int, str], folder: str) -> None:
    rollouts = Says([[55, 256]] * 3)
    rollouts.reasons = given_up
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        with pytest.raises(WeightsWantedError, match="gave up on"):
            await measured(evaluator(rollouts, [teacher], graded(3)), learner, 7)


@pytest.mark.parametrize("spoilt", [{"token_ids": []}, {"rollout_logprobs": [np.nan, -1.0]}], ids=["no token", "nan"])
async def test_a_completion_that_a_server_has_spoilt_is_no_wrong_answer(
    spoilt: dict[str, list[Any]], folder: str
) -> None:
    rollouts = Says([[55, 256]] * 4)
    generate = rollouts.generate

    async def spoils(prompts: Any, sampling: RolloutSampling, *more: Any, on_completion: Any, **_: Any) -> None:
        def arrive(c: RolloutCompletion) -> None:
            is_hit = sampling.temperature == 0 and c.prompt_index in (0, 2)
            arrays = {name: np.array(values, getattr(c, name).dtype) for name, values in spoilt.items()}
            on_completion(replace(c, **arrays) if is_hit else c)  # type: ignore[arg-type]

        await generate(prompts, sampling, *more, on_completion=arrive)

    rollouts.generate = spoils  # type: ignore[method-assign]
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        found = await measured(evaluator(rollouts, [teacher], graded(4)), learner, 7)
    assert (found.exact_match, found.num_answers, found.num_quarantined) == (1.0, 2, 2)


def test_the_standard_error_worked_by_hand() -> None:
    """Mean 12 / 6; what completions are off by: -1, -1 and 2 nats; sqrt(6 * 3 / 2) / 6."""
    assert ReverseKL([(3.0, 2), (1.0, 1), (8.0, 3)]).stderr == pytest.approx(0.5)
    assert ReverseKL([(3.0, 2), (1.0, 2)]).stderr == pytest.approx(0.5)


async def test_the_number_of_prompts_is_bounded_by_the_option(folder: str) -> None:
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        found = await measured(
            evaluator(Generator(learner.student.model, [256]), [teacher], PROMPTS, num_prompts=5), learner, 0
        )
    assert found.num_prompts == 5
