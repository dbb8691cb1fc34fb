"""Text in its context: property tests over the families of tokenizers, and the cases that each family is known for."""

import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerBase

from services.models.text import (
    TextError,
    TooLongError,
    check_can_fit,
    cut_behind_end,
    cut_behind_turn,
    encode_completion,
    encode_prompt,
    longest_token,
)
from tests.tokenizers import FAMILIES, built_anew

FAITHFUL = ["gpt2", "bare", "llama3", "opt", "roberta", "spaced", "llama2", "mistral", "always", "gemma", "bytes"]
"""Families that give a text back as it was written, but for what they put in front."""
LOSSY = sorted({*FAMILIES} - {*FAITHFUL})

WORDS = [
    "47+85=",
    "132",
    "The",
    "dog",
    "ing",
    "play",
    "  ",
    " ",
    "\n",
    "\n\n",
    "\t",
    ".",
    ", ",
    "'t",
    "=",
    "(",
    "0",
    "a",
    "H",
]
FOREIGN = ["é", "e\u0301", "ﬁ", "´", "Å", "你好", "世界。", "가", "мир", "🙂", "\u200b", "\u00a0", "ß", "\u0301"]


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    pieced = st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)
    any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=8)
    return pieced | st.tuples(pieced, any_text).map("".join)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def nfkc(text: str) -> str:
    """An accent may stand by itself behind a prompt and with its letter in the whole."""
    return unicodedata.normalize("NFKC", text)


def nothing_but_accents(text: str) -> bool:
    """xlnet drops them: of such a text nothing is left."""
    return all(unicodedata.combining(char) or char.isspace() for char in unicodedata.normalize("NFKD", text))


def specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


@pytest.mark.parametrize("family", FAITHFUL)
def test_a_completion_is_what_decodes_to_it_behind_its_prompt(family: str) -> None:
    tokenizer = FAMILIES[family]()
    pieces = [*WORDS, *FOREIGN, *specials(tokenizer)]

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(texts(pieces), texts(pieces), st.booleans())
    def check(prompt: str, completion: str, special: bool) -> None:
        prompt_ids = encode_prompt(tokenizer, prompt, special=special)
        ids = encode_completion(tokenizer, prompt, prompt_ids, completion, special=special)
        assert decode(tokenizer, [*prompt_ids, *ids]) == decode(tokenizer, prompt_ids) + completion

    check()


@pytest.mark.parametrize("family", LOSSY)
def test_what_is_lost_of_every_text_is_lost_of_a_completion_too_and_no_more(family: str) -> None:
    tokenizer = FAMILIES[family]()
    unknown = tokenizer.unk_token_id

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(texts([*WORDS, *FOREIGN]), texts([*WORDS, *FOREIGN]))
    def check(prompt: str, completion: str) -> None:
        prompt_ids = encode_prompt(tokenizer, prompt, special=True)
        whole = encode_prompt(tokenizer, prompt + completion, special=True)
        alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
        assume(prompt_ids and (unknown is None or unknown not in [*prompt_ids, *whole, *alone]))
        assume(completion.isspace() or not nothing_but_accents(completion))
        assume(not (prompt[-1].isspace() and completion[0] in "´¨¯¸"))  # a space and an accent to NFKC
        ids = encode_completion(tokenizer, prompt, prompt_ids, completion, special=True)
        decoded = decode(tokenizer, [*prompt_ids, *ids])
        assert nfkc(decoded) in map(nfkc, (decode(tokenizer, whole), decode(tokenizer, prompt_ids) + completion))
        if ids and not completion[0].isspace() and not prompt[-1].isspace() and completion[0] not in "´\u0301":
            assert not tokenizer.convert_ids_to_tokens(ids[0]).startswith(("▁", "Ġ"))

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_its_own_tokens_and_one_bos_at_most(family: str) -> None:
    tokenizer = FAMILIES[family]()
    front = {"llama3": "<|begin_of_text|>", "opt": "</s>", "roberta": "<s>", "bert": "[CLS]", "gemma": "<bos>"}
    front |= dict.fromkeys(["llama2", "mistral", "always"], "<s>")
    mark = front.get(family, "")
    bos = [tokenizer.convert_tokens_to_ids(mark)] if mark else []
    for text in ("the fox", "the fox ", "the fox" + (tokenizer.eos_token or "")):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, text, special=True) == [*bos, *plain]
        assert encode_prompt(tokenizer, text, special=False) == plain
        written = tokenizer(mark + text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, mark + text, special=True) == written
        assert written[: len(bos)] == bos and written.count(bos[0] if bos else -1) == plain.count(
            bos[0] if bos else -1
        ) + len(bos)


@pytest.mark.parametrize(
    ("family", "prompt", "completion", "tokens"),
    [
        ("gpt2", "the", " dog", ["Ġdog"]),
        ("gpt2", "the ", "dog", ["d", "o", "g"]),  # the prompt's space stays the prompt's
        ("spaced", "x=", "the", ["the"]),
        ("spaced", "x", " the", ["Ġthe"]),
        ("roberta", "<|im_start|>", "the", ["the"]),
        ("llama2", "x=", "the", ["the"]),
        ("llama2", "x", " the", ["▁the"]),
        ("mistral", "x=", "the", ["the"]),
        ("always", "<|im_start|>", "the", ["the"]),
        ("always", "x=", "the<|im_end|>the", ["the", "<|im_end|>", "the"]),
        ("always", "x=", "\x01", ["<0x01>"]),
        ("bert", "2+2=", "the", ["the"]),  # behind punctuation a word is no piece of one
        ("bert", "x ", "the", ["the"]),
        ("bert", "th", "e", ["##e"]),  # inside of a word it is
        ("bert", "th", "[SEP]e", ["[SEP]", "e"]),  # behind a special token nothing of what is before it counts
        ("xlnet", "<|im_start|>", "ﬁve", ["f", "i", "v", "e"]),  # not given back as written, and no "▁" all the same
    ],
)
def test_known_cases(family: str, prompt: str, completion: str, tokens: list[str]) -> None:
    tokenizer = FAMILIES[family]()
    prompt_ids = encode_prompt(tokenizer, prompt, special=True)
    ids = encode_completion(tokenizer, prompt, prompt_ids, completion, special=True)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_an_empty_completion_has_no_tokens() -> None:
    assert encode_completion(FAMILIES["llama2"](), "x", [1, 2], "", special=True) == []


def test_unknown_characters_that_become_one_token_with_the_prompts_are_refused() -> None:
    tokenizer = built_anew("t5")
    with pytest.raises(TextError, match=r"the tokenizer cannot tell '文' from the prompt"):
        encode_completion(tokenizer, "中", encode_prompt(tokenizer, "中", special=True), "文", special=True)
    ids = encode_completion(tokenizer, "x", encode_prompt(tokenizer, "x", special=True), "文", special=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<unk>"]


def test_a_token_that_swallows_the_space_behind_it_swallows_none_of_the_completion() -> None:
    tokenizer = built_anew("always")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|user|>", rstrip=True, special=True)]})
    prompt_ids = encode_prompt(tokenizer, "<|user|>\n", special=False)
    assert tokenizer.convert_ids_to_tokens(prompt_ids) == ["<|user|>"]
    for completion, tokens in (("the", ["the"]), (" the", ["▁the"])):
        ids = encode_completion(tokenizer, "<|user|>\n", prompt_ids, completion, special=False)
        assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_an_accent_that_joins_the_prompts_letter_is_encoded_beside_others_that_are_normalised() -> None:
    tokenizer = FAMILIES["qwen"]()
    prompt_ids = encode_prompt(tokenizer, "a", special=True)
    ids = encode_completion(tokenizer, "a", prompt_ids, "\u0301 e\u0301", special=True)
    assert decode(tokenizer, ids) == "\u0301 é"


def test_a_space_that_the_tokenizer_drops_from_the_prompts_end_comes_with_the_completion() -> None:
    tokenizer = built_anew("t5")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    prompt_ids = encode_prompt(tokenizer, "x= ", special=True)
    assert prompt_ids == encode_prompt(tokenizer, "x=", special=True)
    whole = tokenizer("x= the", add_special_tokens=False)["input_ids"]
    assert [*prompt_ids, *encode_completion(tokenizer, "x= ", prompt_ids, "the", special=True)] == whole


def test_a_token_for_whole_words_is_not_cut_out_of_a_longer_one() -> None:
    tokenizer = built_anew("gpt2")
    tokenizer.add_tokens([AddedToken("dog", single_word=True)])
    prompt_ids = encode_prompt(tokenizer, "a ", special=True)
    for completion in ("dogs", "dog"):
        expected = tokenizer(completion)["input_ids"]
        assert encode_completion(tokenizer, "a ", prompt_ids, completion, special=True) == expected


@pytest.mark.parametrize(
    ("ids", "ends", "kept"),
    [([1, 2, 3, 2], [2], [1, 2]), ([1, 2, 3], [3, 2], [1, 2]), ([1, 3], [2], [1, 3]), ([1], [], [1]), ([], [2], [])],
)
def test_ids_are_cut_behind_the_first_end_token(ids: list[int], ends: list[int], kept: list[int]) -> None:
    assert cut_behind_end(ids, ends) == kept


def test_white_space_behind_the_last_special_token_of_a_turn_is_cut() -> None:
    tokenizer = FAMILIES["qwen"]()
    assert cut_behind_turn(tokenizer, "yes\n<|im_end|>\n\n ") == "yes\n<|im_end|>"
    assert cut_behind_turn(tokenizer, "yes<|im_end|>\n.\n") == "yes<|im_end|>\n.\n"
    assert cut_behind_turn(tokenizer, "yes\n") == "yes\n"
    assert cut_behind_turn(FAMILIES["bare"](), "yes\n") == "yes\n"


def test_a_text_is_bounded_by_the_longest_token() -> None:
    tokenizer = FAMILIES["bytes"]()
    assert longest_token(tokenizer) == len("<|endoftext|>")
    check_can_fit("x", "a" * 26, 2, tokenizer)
    with pytest.raises(TooLongError, match="x has 27 characters, at most 26 can be 2 tokens"):
        check_can_fit("x", "a" * 27, 2, tokenizer)
