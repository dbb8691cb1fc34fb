"""What the student can do on held-out prompts, under the weights the rollout servers hold.

    exact_match           share of rows with an `answer` that the student answers exactly, greedily (exact_match.py); of those
                          whose completion a rollout server has not spoilt
    teacher_exact_match   the same of each row's own teacher, by the same rule
    reverse_kl            mean over tokens of KL(student || teacher), nats, along completions sampled at temperature 1

The reverse KL needs a few of the teacher's logprobs at each position, whatever the vocabulary: the terms of its likeliest
tokens and of the bucket of all others, plus a correction at sampled tokens outside, which makes it unbiased (docs/losses.md,
"hybrid"). Its standard error comes from the differences between completions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from services.clients import RolloutClient
from services.clients.teacher_requests import cut_by_rows
from services.config import RunConfig
from services.errors import PeerError, WeightsWantedError
from services.process.event_loop import EventLoopThread
from services.wire.rollout import RolloutSampling
from services.wire.teacher import BYTES_PER_CANDIDATE
from trainer.batch import collect
from trainer.data.prompts import Prompt
from trainer.evaluation.exact_match import ExactMatch, count_teacher_matches
from trainer.groups import PromptGroup, Rollout
from trainer.learner import Learner
from trainer.rollouts import generate_groups
from trainer.scoring import Scoring
from trainer.teacher_scores import Support
from trainer.teachers import Teachers
from trainer.weights.policy_versions import PolicyVersions

# What is asked of the teachers by default: enough for most of the mass of a real model, or everything.
_TOP_K, _SMALL_VOCABULARY = 64, 1024
# Teachers' logprobs that are held at once: completions are scored and measured in parts of this size.
_PART_BYTES = 64 << 20


@dataclass(frozen=True)
class Evaluation:
    policy_version: int
    """Of the weights that answered."""
    exact_match: float | None
    teacher_exact_match: float | None
    reverse_kl: float
    reverse_kl_stderr: float | None
    """None with a single completion."""
    num_prompts: int
    num_kl_tokens: int
    num_quarantined: int
    """Completions that count nowhere: a rollout server spoilt them, or the teacher's rows for them are unusable."""
    num_answers: int | None = None
    """Usable completions of prompts that have an answer, of which exact_match is a share; None: nobody counted."""


class Evaluator:
    """Holds what every evaluation of a run shares.

    Args:
        event_loop: where the servers are asked.
        prompts: held out.
        end_token_ids: what ends a completion of the student.
        versions: those that this run has pushed.
    """

    def __init__(
        self,
        config: RunConfig,
        event_loop: EventLoopThread,
        prompts: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        rollout_client: RolloutClient,
        teachers: Teachers,
        end_token_ids: list[int],
        versions: PolicyVersions,
    ) -> None:
        self._config, self._event_loop = config, event_loop
        self._prompts = prompts[: config.evaluation.num_prompts]
        self._graded = [prompt for prompt in self._prompts if prompt.answer is not None]
        self._rollouts, self._teachers = rollout_client, teachers
        self._tokenizer, self._end_token_ids = tokenizer, end_token_ids
        self._versions = versions
        self._teacher_exact_match: float | None = None

    def evaluate(self, learner: Learner, policy_version: int) -> Evaluation:
        """Measure the student; the rollout servers must hold its weights as `policy_version`.

        Raises:
            WeightsWantedError: a rollout server answers under another version, or was stopped.
            PeerError: a server failed, or no completion could be scored.
        """
        run = self._event_loop.run
        sampled = run(self._complete, self._prompts, 1.0, policy_version)
        measured = self._reverse_kl(learner, sampled)
        greedy = run(self._complete, self._graded, 0.0, policy_version) if self._graded else []
        answers = [rollout for group in greedy for rollout in group.rollouts]
        if self._teacher_exact_match is None:  # it does not change
            self._teacher_exact_match = run(self._measure_teacher)
        return Evaluation(
            policy_version=policy_version,
            exact_match=self._student_exact_match(answers),
            teacher_exact_match=self._teacher_exact_match,
            reverse_kl=measured.mean,
            reverse_kl_stderr=measured.stderr,
            num_prompts=len(self._prompts),
            num_kl_tokens=measured.num_tokens,
            num_quarantined=sum(len(group.quarantined) for group in (*sampled, *greedy)),
            num_answers=len(answers),
        )

    def _reverse_kl(self, learner: Learner, groups: list[PromptGroup]) -> "ReverseKL":
        """Score and measure part after part, so that memory does not grow with the number of completions."""
        scoring = Scoring(self._teachers, self._support(learner.student.vocab_size), temperature=1.0)
        measured = ReverseKL()
        for part in _parts(groups, scoring.support.size):
            self._event_loop.run(scoring.score, part)
            measured.parts += learner.reverse_kl(collect(part))
            for group in part:
                group.samples.clear()
        if not measured.parts:
            raise PeerError(f"no completion could be scored, the first one because {_first_reason(groups)}")
        return measured

    async def _complete(self, prompts: list[Prompt], temperature: float, policy_version: int) -> list[PromptGroup]:
        """A completion of each prompt, at least one of them usable, and none that a server has given up on."""
        length = self._config.evaluation_max_new_tokens()
        sampling = RolloutSampling(max_new_tokens=length, temperature=temperature)
        groups = await generate_groups(self._rollouts, prompts, sampling, self._versions)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        given_up = sum(q.completion.finish_reason == "abort" for group in groups for q in group.quarantined)
        if not rollouts:
            kind = WeightsWantedError if given_up else PeerError
            raise kind(f"no prompt could be completed, the first one because {_first_reason(groups)}")
        if given_up:  # they would count as wrong answers
            raise WeightsWantedError(
                f"a rollout server gave up on {given_up} of {len(prompts)} prompts; it was stopped"
            )
        self._versions.check((r.completion for r in rollouts), policy_version)
        return groups

    def _support(self, vocab: int) -> Support:
        """As many of the teacher's tokens as are asked for and every teacher returns; all of them in a small vocabulary."""
        vocabs = {vocab, *(teacher.info.padded_vocab_size for teacher in self._teachers)}
        # Where embeddings differ in size one token stays outside, so that both sides have a tail.
        most = vocab if len(vocabs) == 1 else min(vocabs) - 1
        limit = min(teacher.info.max_top_k for teacher in self._teachers)
        wanted = self._config.evaluation.top_k or (most if most <= _SMALL_VOCABULARY else _TOP_K)
        return Support("teacher_topk", min(wanted, most, limit), vocab)

    def _student_exact_match(self, answers: list[Rollout]) -> float | None:
        if not answers:
            return None
        rule = self._rule()
        return sum(rule.matches(r.prompt, r.completion.token_ids.tolist()) for r in answers) / len(answers)

    async def _measure_teacher(self) -> float | None:
        if not self._graded:
            return None
        matches = 0
        for teacher, places in self._teachers.split(self._graded):
            rule = self._rule(teacher.info.eos_token_ids)
            matches += await count_teacher_matches(teacher, [self._graded[place] for place in places], rule)
        return matches / len(self._graded)

    def _rule(self, more_end_token_ids: list[int] | None = None) -> ExactMatch:
        ends = [*(more_end_token_ids or []), *self._end_token_ids]
        return ExactMatch(self._tokenizer, ends, self._config.evaluation_max_new_tokens())


@dataclass
class ReverseKL:
    """Reverse KL per token of completions that the model sampled at temperature 1, nats.

    Attributes:
        parts: for each completion its sum over the tokens, and their number.
    """

    parts: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.parts)

    @property
    def mean(self) -> float:
        return sum(total for total, _ in self.parts) / self.num_tokens

    @property
    def stderr(self) -> float | None:
        """That of a ratio of sums over independent completions, which differ in length as well; None with one."""
        count, mean = len(self.parts), self.mean
        if count == 1:
            return None
        squares = sum((total - mean * length) ** 2 for total, length in self.parts)
        return math.sqrt(squares * count / (count - 1)) / self.num_tokens


def _parts(groups: list[PromptGroup], top_k: int) -> Iterator[list[PromptGroup]]:
    """Groups whose rows of `top_k` logprobs are held at once."""
    rows = [sum(len(rollout.completion.token_ids) for rollout in group.rollouts) for group in groups]
    for part in cut_by_rows(rows, max(1, _PART_BYTES // (top_k * BYTES_PER_CANDIDATE))):
        yield groups[part]


def _first_reason(groups: list[PromptGroup]) -> str:
    return next((item.reason for group in groups for item in group.quarantined), "there is none")
