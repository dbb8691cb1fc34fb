"""The one place where text becomes token ids, for the trainer, its evaluation and the teacher.

    encode_prompt       text that something is written behind: ends with its own last token, has one BOS at most
    encode_completion   text behind a prompt: the ids that decode to it there
    render_messages     a conversation as the text that the chat template makes of it

Whoever encodes a completion by itself gets the marks of a new text in front of it ("▁" of SentencePiece, "Ġ" of
add_prefix_space), which no model writes behind "47+85="; whoever encodes both at once gets tokens that reach across.
"""

import re
import reprlib
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Texts that a completion is encoded behind to see what it looks like when it begins no text. The first that does not
# merge with it counts. Behind a letter or digit WordPiece continues a word ("##ing"), which is right inside one only.
_ANCHORS = ("\n", "=", ".", ":", ")", "|", "。")
_ANCHORS_IN_WORDS = ("a", "0", "z")
_MARKS_OF_A_NEW_TEXT = ("▁", "Ġ")


class TextError(ValueError):
    """What cannot become token ids, with its name and the reason; callers make it their own kind of error."""


class TooLongError(TextError):
    """A text of more characters than the tokens that are allowed could ever have."""


def check_is_text(name: str, text: str) -> None:
    """Refuse half a surrogate pair: JSON can spell it, no tokenizer takes it.

    Raises:
        TextError: names `name` and the position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} holds half a surrogate pair at {error.start}, which is no text") from error


def check_can_fit(name: str, text: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that cannot have as few as `max_tokens` tokens, before it is tokenised.

    Tokenising takes hundreds of bytes and microseconds a token, for a text that is refused for its length afterwards.

    Raises:
        TooLongError: names `name`, its characters and how many there may be.
    """
    most = max_tokens * longest_token(tokenizer)
    if len(text) > most:
        raise TooLongError(f"{name} has {len(text)} characters, at most {most} can be {max_tokens} tokens")


@lru_cache(maxsize=8)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Token ids of a text that something is to be written behind.

    Args:
        special: put the tokenizer's own marks in front (a BOS), unless the text begins with them already. False for
            what a chat template rendered, which writes its own. Marks behind a text (EOS, SEP) would end it: they are
            left out, unless the text itself has them.
    """
    ids = _encode(tokenizer, text)
    if not special:
        return ids
    front = _marks(tokenizer).in_front
    written = next(n for n in range(len(front), -1, -1) if ids[:n] == front[len(front) - n :])
    return [*front[: len(front) - written], *ids]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt_text: str, prompt_ids: list[int], completion: str, *, special: bool
) -> list[int]:
    """Token ids of `completion` behind a prompt: what decodes to it there, with no mark of a new text in front.

    Where the tokenizer loses something of every text (it normalises, it puts spaces around punctuation), they decode to
    what the tokenizer makes of both texts in one.

    Args:
        prompt_ids: what `encode_prompt(tokenizer, prompt_text, special=special)` says.

    Raises:
        TextError: there are no such ids, as where one <unk> stands for the end of the one and the start of the other.
    """
    added = _marks(tokenizer).added
    completion_ids: list[int] = []
    # Section by section, because a tokenizer may put its mark in front of each that stands behind an added token.
    for section in _sections(tokenizer, completion):
        if section not in added:
            completion_ids += _encode_section(tokenizer, prompt_text, prompt_ids, section, special=special)
            continue
        completion_ids.append(added[section])
        prompt_text, prompt_ids, special = section, [added[section]], False  # all that the next section depends on
    return completion_ids


def _encode_section(
    tokenizer: PreTrainedTokenizerBase, prompt_text: str, prompt_ids: list[int], text: str, *, special: bool
) -> list[int]:
    joint = encode_prompt(tokenizer, prompt_text + text, special=special)
    before, whole = _decode(tokenizer, prompt_ids), _decode(tokenizer, joint)
    rest = joint[len(prompt_ids) :] if joint[: len(prompt_ids)] == prompt_ids else []
    if rest and _lost_the_space(tokenizer, prompt_text, prompt_ids, before):
        return rest
    found: list[tuple[list[int], str]] = []
    for ids in _candidates(tokenizer, text, rest):
        decoded = _decode(tokenizer, [*prompt_ids, *ids])
        if decoded == before + text:
            return ids
        found.append((ids, decoded))
    # This tokenizer does not give back what was written: not the text itself, or not what is between it and the prompt.
    may_be_marked = _begins_with_space(text)
    for target in (whole, before + whole.removeprefix(before).lstrip()):
        for ids, decoded in found:
            if _equal(decoded, target) and (may_be_marked or not _is_marked(tokenizer, ids)):
                return ids
    raise TextError(
        f"the tokenizer cannot tell {reprlib.repr(text)} from the prompt in front of it, or does not know its characters"
    )


def cut_behind_end(token_ids: list[int], eos_token_ids: Collection[int]) -> list[int]:
    """The ids up to the first end token, which stays: nothing is written behind it."""
    end = next((i for i, token_id in enumerate(token_ids) if token_id in eos_token_ids), len(token_ids))
    return token_ids[: end + 1]


def cut_behind_turn(tokenizer: PreTrainedTokenizerBase, rendered: str) -> str:
    """A rendered turn without the white space that a template writes behind its last special token ("<|im_end|>\\n")."""
    cut = rendered.rstrip()
    return cut if cut.endswith(_marks(tokenizer).special) else rendered


def render_messages(
    name: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, /, **template_kwargs: Any
) -> str:
    """The text that the tokenizer's chat template, which must be there, makes of `messages`.

    Raises:
        TextError: names `name` and, in the template's words, why it refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    except TemplateError as error:  # many templates refuse roles or their order this way
        raise TextError(f"the chat template refuses {name}: {error}") from error
    except Exception as error:  # a template is a program that comes with the model: it may fail in any way
        raise TextError(f"the chat template refuses {name}: {type(error).__name__}: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class _Marks:
    """What is special about texts to one tokenizer."""

    in_front: list[int]
    """What it puts before every text: mostly a BOS or nothing."""
    added: dict[str, int]
    """Tokens that it looks for before anything else, wherever they are, and their ids."""
    special: tuple[str, ...]
    pattern: re.Pattern[str] | None
    """Finds those of `added`."""


@lru_cache(maxsize=8)
def _marks(tokenizer: PreTrainedTokenizerBase) -> _Marks:
    tokens = tokenizer.added_tokens_decoder
    added = {token.content: token_id for token_id, token in tokens.items() if not token.single_word}
    special = {token.content for token in tokens.values() if token.special} | set(tokenizer.all_special_tokens)
    longest_first = map(re.escape, sorted(added, key=len, reverse=True))
    pattern = re.compile(f"({'|'.join(longest_first)})") if added else None
    return _Marks(_marks_in_front(tokenizer), added, tuple(special), pattern)


def _marks_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    plain, whole = (_encode(tokenizer, "a", special=special) for special in (False, True))
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    start = next(starts, None)
    if start is None:
        raise TextError("the tokenizer encodes a text otherwise with its special tokens than without")
    return whole[:start]


def _candidates(tokenizer: PreTrainedTokenizerBase, text: str, behind_prompt: list[int]) -> Iterator[list[int]]:
    """What the text's ids may be, the likeliest first."""
    if behind_prompt:
        yield behind_prompt
    for written in dict.fromkeys((text, text.lstrip())):  # a tokenizer may make one space of these and the prompt's
        alone = _encode(tokenizer, written)
        yield alone
        for anchor in _ANCHORS if behind_prompt else (*_ANCHORS, *_ANCHORS_IN_WORDS):
            front, whole = _encode(tokenizer, anchor), _encode(tokenizer, anchor + written)
            ids = whole[len(front) :]
            if whole[: len(front)] == front and (ids or not alone):
                yield ids


def _sections(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text cut in front of and behind every added token, e.g. "a", "</s>", "b"."""
    pattern = _marks(tokenizer).pattern
    return [section for section in ([text] if pattern is None else pattern.split(text)) if section]


def _lost_the_space(
    tokenizer: PreTrainedTokenizerBase, prompt_text: str, prompt_ids: list[int], decoded_prompt: str
) -> bool:
    """Whether the tokenizer drops the space at a text's end, so that it comes with the first token behind it.

    Not so where an added token takes in the white space behind it.
    """
    ends_with_space = prompt_text[-1:].isspace() and not decoded_prompt[-1:].isspace()
    return ends_with_space and not (prompt_ids and prompt_ids[-1] in tokenizer.added_tokens_decoder)


def _is_marked(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return bool(ids) and tokenizer.convert_ids_to_tokens(ids[0]).startswith(_MARKS_OF_A_NEW_TEXT)


def _begins_with_space(text: str) -> bool:
    """Also where the space only comes about: "´" is a space and an accent to NFKC, and "▁" is one to SentencePiece."""
    return text[0] == "▁" or unicodedata.normalize("NFKC", text[0])[0].isspace()


def _equal(text: str, other: str) -> bool:
    """Up to what normalising both as one text changes: an accent may join the letter in front of it."""
    return unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", other)
