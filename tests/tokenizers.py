"""The families of tokenizers, built on the spot: small, but trained, and with all parts that the real ones have.

FAMILIES["llama2"]()   a PreTrainedTokenizerFast, built once a process; do not change it

family       model       what is special about it
gpt2         byte BPE    one special token, which is BOS and EOS; no pad, no chat template
bare         byte BPE    no special token at all
qwen         byte BPE    normalises to NFC, digits one by one, no BOS
llama3       byte BPE    BOS by post-processor, which its chat template writes too
opt          byte BPE    BOS by post-processor, and the BOS is the EOS
roberta      byte BPE    a space in front of every text, <s> and </s> around it
spaced       byte BPE    a space in front of every text, nothing around it
llama2       BPE         "▁" in front of every section by normalizer, byte fallback, BOS
mistral      BPE         "▁" in front of the text alone, byte fallback, BOS
always       BPE         "▁" in front of every section between special tokens, byte fallback, BOS and EOS
gemma        BPE         "▁" for spaces, none in front, byte fallback, BOS
t5           Unigram     NFKC, runs of spaces become one, EOS behind, no BOS; what it does not know is <unk>
xlnet        Unigram     NFKD without accents, <sep><cls> behind
bert         WordPiece   lower case, no accents, [CLS] and [SEP] around it, no EOS
bytes        bytes       that of the tiny pair: no merges
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.tiny.pair import build_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind; the fox does!",
    "Question: what is 47 + 85? Answer: 132. And 2+2=4, 10 * 12 = 120, 3.14 is about pi.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3\n\tif x == 'y': pass",
    "Ein naïver Café-Besuch kostet fünf Euro — déjà vu, señor Ångström?",
    "こんにちは世界。今日は良い天気ですね。 你好，世界！ 安녕하세요 세계",
    "Привет, мир! Как дела? Ответ: сорок два.",
    "the answer is yes. the answer is no. user and assistant and system. Hello, World! hello, world!",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z abcdefghijklmnopqrstuvwxyz zyxwvutsrqponmlkjihgfedcba",
] * 3

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
_TURNS = ["<|im_start|>", "<|im_end|>"]
_DIGITS = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")


def _byte_bpe(
    specials: Sequence[str],
    *,
    prefix_space: bool = False,
    split: pre_tokenizers.PreTokenizer | None = None,
    normalizer: Any = None,
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.pre_tokenizer = byte_level if split is None else pre_tokenizers.Sequence([split, byte_level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500 + len(specials),
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece_bpe(specials: Sequence[str], normalizer: Any, pre_tokenizer: Any, *, strips: bool) -> Tokenizer:
    """BPE over characters with "▁" for the space and a token for each byte of what it has not seen."""
    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=450, limit_alphabet=120, show_progress=False)
    learning.train_from_iterator(TEXTS, trainer)
    learnt = json.loads(learning.to_str())["model"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*tokens, *learnt["vocab"]])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return tokenizer


def _unigram(specials: Sequence[str], *normalizing: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([*normalizing, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(specials), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, before: Sequence[str], behind: Sequence[str]) -> None:
    """What the tokenizer adds by itself to a text."""
    marks = [(token, tokenizer.token_to_id(token)) for token in {*before, *behind}]
    single = " ".join([*before, "$A", *behind])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)


def _fast(tokenizer: Tokenizer, *, chat: str | None = None, **tokens: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **tokens)


def _gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return _fast(_byte_bpe([end]), bos_token=end, eos_token=end)


def _bare() -> PreTrainedTokenizerFast:
    return _fast(_byte_bpe([]))


def _qwen() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<|endoftext|>", *_TURNS], split=_DIGITS, normalizer=normalizers.NFC())
    return _fast(tokenizer, chat=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=_TURNS)


def _llama3() -> PreTrainedTokenizerFast:
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = _byte_bpe(specials, split=_DIGITS)
    _around(tokenizer, ["<|begin_of_text|>"], [])
    return _fast(
        tokenizer,
        chat=LLAMA3_CHAT,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        extra_special_tokens=specials[2:],
    )


def _opt() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<pad>", "</s>"])
    _around(tokenizer, ["</s>"], [])
    return _fast(tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def _roberta() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<s>", "<pad>", "</s>", *_TURNS], prefix_space=True)
    _around(tokenizer, ["<s>"], ["</s>"])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return _fast(tokenizer, chat=CHATML, extra_special_tokens=_TURNS, **marks)


def _spaced() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<|endoftext|>", *_TURNS], prefix_space=True)
    return _fast(tokenizer, chat=CHATML, eos_token="<|endoftext|>", extra_special_tokens=_TURNS)


def _llama2() -> PreTrainedTokenizerFast:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"], normalizer, None, strips=True)
    _around(tokenizer, ["<s>"], [])
    return _fast(tokenizer, chat=LLAMA2_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _mistral() -> PreTrainedTokenizerFast:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"], None, metaspace, strips=True)
    _around(tokenizer, ["<s>"], [])
    return _fast(tokenizer, chat=LLAMA2_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _always() -> PreTrainedTokenizerFast:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>", "<pad>", *_TURNS], None, metaspace, strips=True)
    _around(tokenizer, ["<s>"], ["</s>"])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _fast(tokenizer, chat=CHATML, extra_special_tokens=_TURNS, **marks)


def _gemma() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *_TURNS]
    tokenizer = _sentencepiece_bpe(specials, normalizers.Replace(" ", "▁"), None, strips=False)
    _around(tokenizer, ["<bos>"], [])
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _fast(tokenizer, chat="{{ bos_token }}" + CHATML, extra_special_tokens=_TURNS, **marks)


def _t5() -> PreTrainedTokenizerFast:
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"], normalizers.NFKC())
    _around(tokenizer, [], ["</s>"])
    return _fast(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _xlnet() -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", *_TURNS]
    tokenizer = _unigram(specials, normalizers.NFKD(), normalizers.StripAccents())
    _around(tokenizer, [], ["<sep>", "<cls>"])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    marks |= {"cls_token": "<cls>", "sep_token": "<sep>"}
    return _fast(tokenizer, chat=CHATML, extra_special_tokens=_TURNS, **marks)


def _bert() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    _around(tokenizer, ["[CLS]"], ["[SEP]"])
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return _fast(tokenizer, unk_token="[UNK]", pad_token="[PAD]", **marks)


def _bytes() -> PreTrainedTokenizerFast:
    return build_tokenizer()


_BUILDERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    build.__name__.removeprefix("_"): build
    for build in (
        _gpt2,
        _bare,
        _qwen,
        _llama3,
        _opt,
        _roberta,
        _spaced,
        _llama2,
        _mistral,
        _always,
        _gemma,
        _t5,
        _xlnet,
        _bert,
        _bytes,
    )
}
FAMILIES = {family: cache(build) for family, build in _BUILDERS.items()}


def built_anew(family: str) -> PreTrainedTokenizerBase:
    """One that may be changed."""
    return _BUILDERS[family]()
