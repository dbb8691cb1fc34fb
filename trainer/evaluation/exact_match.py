"""Whether a model answers a prompt exactly: one rule for the student, who generates, and the teacher, who only scores.

    A completion matches when it ends by itself and its text, without white space around it, is the answer without white
    space around it: as it is written in the file, or as the tokenizer gives it back.

What a teacher would generate greedily is found from scores alone. A draft of what is still missing is scored; as far as
the draft's tokens are the likeliest ones, greedy decoding yields them, and where one is not, it yields the likeliest
instead. So each round settles at least one token, mostly all of them, and a completion that can no longer become the
answer is given up. (The draft decides how many rounds it takes, never what comes out.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from services.clients.teacher import RefusedSequenceError
from services.models.text import TextError, encode_completion, encode_prompt
from trainer.data.prompts import Prompt, PromptRows
from trainer.teachers import Teacher

# A byte-level decoder's sign for a character of which the last bytes are still to come.
_INCOMPLETE = "\ufffd"
# Repetitions of a token that are drafted at once.
_REPETITIONS = 32


class ExactMatch:
    """The rule.

    Args:
        end_token_ids: what ends a completion, what is likely to first.
        max_new_tokens: longest completion, the end token included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], max_new_tokens: int) -> None:
        self._tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self._end = [*end_token_ids][:1]
        self.end_token_ids = frozenset(end_token_ids)
        self._special = frozenset(tokenizer.all_special_ids)

    def matches(self, prompt: Prompt, token_ids: Sequence[int]) -> bool:
        """Whether a completion of a prompt with an answer is the answer; special tokens in it count as no text."""
        kept = self._before_end(token_ids)
        ended = len(kept) < min(len(token_ids), self.max_new_tokens)
        return ended and self._text(kept).strip() in self._answers(prompt)

    def can_match(self, prompt: Prompt, token_ids: Sequence[int]) -> bool:
        """Whether a completion that begins with these tokens, none of which ends it, may still become the answer.

        White space is left out: some decoders write or drop it only when they see what follows. They may also take back
        characters for the sign of an incomplete one, so that nothing is ruled out for an answer that holds that sign.
        """
        begun = _squashed(self._text(token_ids).rstrip(_INCOMPLETE))
        return len(token_ids) < self.max_new_tokens and any(
            _squashed(answer).startswith(begun) or _INCOMPLETE in answer for answer in self._answers(prompt)
        )

    def draft(self, prompt: Prompt, token_ids: Sequence[int]) -> list[int]:
        """What probably follows these tokens in a completion that is the answer; at least one token."""
        room = self.max_new_tokens - len(token_ids)
        end = self._end
        expected = prompt.answer_token_ids
        if list(token_ids) == expected[: len(token_ids)]:
            return [*expected[len(token_ids) :], *end][:room]
        said, answer = self._text(token_ids).lstrip(), (prompt.answer or "").strip()
        rest = answer.removeprefix(said) if answer.startswith(said) else ""
        if not rest:
            is_repeating = len(token_ids) > 1 and token_ids[-1] == token_ids[-2]
            return ([token_ids[-1]] * _REPETITIONS if is_repeating else end)[:room]
        try:
            before, text = [*prompt.token_ids, *token_ids], prompt.text + self._text(token_ids)
            return [*encode_completion(self._tokenizer, text, before, rest, special=False), *end][:room]
        except TextError:
            return end

    def _before_end(self, token_ids: Sequence[int]) -> Sequence[int]:
        place = next((i for i, token in enumerate(token_ids) if token in self.end_token_ids), len(token_ids))
        return token_ids[:place]

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _answers(self, prompt: Prompt) -> set[str]:
        """As written, and as the tokenizer gives it back: behind the prompt, where it may continue a word, and by itself."""
        assert prompt.answer is not None
        written = prompt.answer.strip()
        forms = (prompt.answer_token_ids, encode_prompt(self._tokenizer, written, special=False))
        # A special token (what stands for unknown characters is one) has no text: the rest would be half an answer.
        whole = [form for form in forms if not self._special.intersection(form)]
        return {written, *(text for form in whole if (text := self._text(form).strip()))}


def _squashed(text: str) -> str:
    return "".join(text.split())


@dataclass
class _Greedy:
    """A completion as greedy decoding has it so far."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> tuple[list[int], int]:
        before = [*self.prompt.token_ids, *self.token_ids]
        return [*before, *self.draft], len(before)

    def extend(self, likeliest: list[int]) -> None:
        """Add the tokens that are settled, given the likeliest one at every token of the draft."""
        same = next((i for i, token in enumerate(self.draft) if token != likeliest[i]), len(self.draft))
        self.token_ids += likeliest[: same + 1]


async def count_teacher_matches(teacher: Teacher, prompts: list[Prompt], rule: ExactMatch) -> int:
    """How many of these prompts, all of which have answers, greedy decoding of the teacher would answer.

    A teacher that refuses a draft, because it does not have one of its tokens, cannot give that answer.

    Raises:
        PeerError: the teacher cannot be asked.
    """
    waiting = [_Greedy(prompt) for prompt in prompts]
    matches = 0
    while waiting:
        for greedy in waiting:
            greedy.draft = rule.draft(greedy.prompt, greedy.token_ids)
        refused: set[int] = set()

        def on_refused(index: int, error: RefusedSequenceError, refused: set[int] = refused) -> None:
            refused.add(index)

        scores = await teacher.score([greedy.sequence for greedy in waiting], top_k=1, on_refused=on_refused)
        undecided = []
        for index, greedy in enumerate(waiting):
            if index in refused:
                continue
            greedy.extend(scores.topk_ids[scores.row_offsets[index] : scores.row_offsets[index + 1], 0].tolist())
            if not rule.end_token_ids.isdisjoint(greedy.token_ids):
                matches += rule.matches(greedy.prompt, greedy.token_ids)
            elif rule.can_match(greedy.prompt, greedy.token_ids):
                undecided.append(greedy)
        waiting = undecided
    return matches


def check_answers(rows: PromptRows, end_token_ids: Sequence[int], max_new_tokens: int) -> PromptRows:
    """The rows without those whose answer no completion can be.

    Raises:
        DataError: there is one, unless data.on_bad_row is "skip".
    """

    def reason(prompt: Prompt) -> str | None:
        if prompt.answer is None:
            return None
        if not end_token_ids:
            return (
                "it has an answer, but neither the student's tokenizer nor its configuration names an end token, so that no "
                "completion would ever end with it; set eos_token in the tokenizer, or leave the answer out"
            )
        if inside := set(end_token_ids).intersection(prompt.answer_token_ids):
            return (
                f"the answer holds the end token {min(inside)}, where every completion ends; take it out of the answer"
            )
        needed = len(prompt.answer_token_ids) + 1
        if needed > max_new_tokens:
            return (
                f"the answer and its end are {needed} tokens, more than the {max_new_tokens} of evaluation.max_new_tokens; "
                "shorten the answer or raise that option"
            )
        return None

    return rows.without(reason)
