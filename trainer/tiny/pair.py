"""A tiny teacher and student that really can be distilled, made on the spot in about a minute on two CPU cores.

`build_tiny_pair` writes everything that the demo and the integration tests need, with no download:

    output_dir/
      teacher/      Qwen3 weights, config and tokenizer: solves the task
      student/      a smaller Qwen3, same tokenizer: stopped while it still fails on most prompts
      train.jsonl   {"prompt": "47+85=", "answer": "231"}, what both models are trained on
      eval.jsonl    the same kind of rows, held out from both models
      pair.json     recipe, seed, versions, measurements; written last, so it also says "complete"

The task is the sum of two two-digit numbers, answered with its digits reversed: a causal model can then emit each
digit as soon as its carry is known, which makes the task learnable by less than a million parameters.

Left out: a learned vocabulary (every byte is a token, so any text can be encoded, only not briefly), padding inside a
prompt (all prompts are equally long), devices other than the CPU, and distillation itself, which is the service's job.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.errors import OutputError
from services.process.files import write_by_rename
from services.process.folder_lock import lock_folder

# Raise it when the code changes what a recipe and a seed produce, so that cached pairs are rebuilt.
FORMAT_VERSION = 1

NUM_BYTES = 256
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
MAX_CONTEXT_TOKENS = 512
NUM_OPERANDS = 100
PROMPT_LENGTH = len("47+85=")
ANSWER_BYTES = b"0123456789"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Progress = Callable[[str], None]

_PROGRESS_S = 10.0


@dataclass(frozen=True)
class ModelRecipe:
    """Shape and training of one model. Training ends after `num_steps`, or once `stop_accuracy` is reached."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_steps: int
    peak_lr: float
    head_dim: int = 32  # vLLM's CPU attention takes multiples of 32
    batch_size: int = 256
    warmup_steps: int = 20
    label_smoothing: float = 0.0  # share of the target spread evenly over digits and eos
    stop_accuracy: float | None = None
    check_every_steps: int = 5


@dataclass(frozen=True)
class PairRecipe:
    """Everything but the seed that decides what `build_tiny_pair` writes."""

    teacher: ModelRecipe = field(
        default_factory=lambda: ModelRecipe(
            hidden_size=160,
            num_layers=2,
            num_heads=5,
            intermediate_size=640,
            num_steps=280,
            peak_lr=3e-3,
            # Bounds the teacher's confidence: reverse KL to a teacher that is sure to e-15 is mostly gradient noise.
            label_smoothing=0.05,
        )
    )
    student: ModelRecipe = field(
        default_factory=lambda: ModelRecipe(
            hidden_size=96,
            num_layers=3,
            num_heads=3,
            intermediate_size=384,
            num_steps=300,
            peak_lr=2e-3,
            stop_accuracy=0.2,
        )
    )
    num_eval_prompts: int = 1000
    num_probe_prompts: int = 1000
    min_teacher_exact_match: float = 0.99

    def fingerprint(self) -> str:
        """Hash of the recipe and of this file's format version."""
        content = json.dumps([FORMAT_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class TinyPair:
    """Where a finished pair lies, and the share of held-out prompts that each model answers exactly (greedily)."""

    teacher: Path
    student: Path
    train_data: Path
    eval_data: Path
    teacher_exact_match: float
    student_exact_match: float


@dataclass(frozen=True)
class Row:
    """One prompt and its right answer; the field names are the keys in the jsonl files."""

    prompt: str
    answer: str


def build_tiny_pair(
    output_dir: Path,
    *,
    seed: int = 0,
    recipe: PairRecipe | None = None,
    on_progress: Progress = print,
) -> TinyPair:
    """Build the pair under `output_dir`, or return at once the one that the same recipe and seed left there.

    Raises RuntimeError when the teacher ends below `recipe.min_teacher_exact_match`.
    """
    recipe = recipe or PairRecipe()
    record_path = output_dir / "pair.json"
    record = _matching_record(record_path, recipe, seed)
    if record is None:
        record = _build_alone(output_dir, recipe, seed, on_progress)
    return TinyPair(
        teacher=output_dir / "teacher",
        student=output_dir / "student",
        train_data=output_dir / "train.jsonl",
        eval_data=output_dir / "eval.jsonl",
        teacher_exact_match=record["teacher_exact_match"],
        student_exact_match=record["student_exact_match"],
    )


def _build_alone(output_dir: Path, recipe: PairRecipe, seed: int, on_progress: Progress) -> dict:
    """Build the pair unless another process does so meanwhile, which is waited for."""
    record_path = output_dir / "pair.json"

    def waits(holder: str) -> None:
        on_progress(f"waiting for {holder}, which works in {output_dir}")

    with lock_folder(output_dir, "--output", "`distillserve tiny`", on_wait=waits):
        if (record := _matching_record(record_path, recipe, seed)) is not None:
            return record
        try:
            # The old record goes first: a build that dies half-way must not leave it beside new weights.
            record_path.unlink(missing_ok=True)
            record = _build(output_dir, recipe, seed, on_progress)
        except (OSError, SafetensorError) as error:  # a disk that is full says so through both
            raise OutputError(f"--output = {str(output_dir)!r} cannot be written: {error}; free some space") from error
        write_by_rename(record_path, (json.dumps(record, indent=2) + "\n").encode())
    return record


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: token id = byte value, special tokens from 256 on, no bos or eos added."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS_TOKEN, PAD_TOKEN, *ROLE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def addition_rows() -> list[Row]:
    """All 10,000 sums, operands zero-padded to two digits, the sum's digits reversed: 47+85= -> 231."""
    operands = range(NUM_OPERANDS)
    return [Row(f"{a:02d}+{b:02d}=", str(a + b)[::-1]) for a in operands for b in operands]


def split_rows(rows: Sequence[Row], num_eval: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle by `seed`; return (train, eval), disjoint and together all of `rows`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[index] for index in order]
    return shuffled[num_eval:], shuffled[:num_eval]


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> torch.Tensor:
    """[B, T] token ids of prompt, answer and eos, padded on the right."""
    texts = [row.prompt + row.answer + EOS_TOKEN for row in rows]
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]


@torch.no_grad()
def exact_match(model: Qwen3ForCausalLM, token_ids: torch.Tensor) -> float:
    """Share of rows that greedy decoding would answer exactly, eos included.

    One forward over the right answers is enough: greedy decoding leaves the right answer exactly where the arg max
    first differs from it.
    """
    logits, targets = _answer_logits(model, token_ids)
    is_right = (logits.argmax(-1) == targets) | (targets == model.config.pad_token_id)
    return is_right.all(dim=-1).float().mean().item()


def train_model(
    name: str,
    recipe: ModelRecipe,
    tokenizer: PreTrainedTokenizerFast,
    token_ids: torch.Tensor,
    probe_ids: torch.Tensor,
    seed: int,
    on_progress: Progress,
) -> Qwen3ForCausalLM:
    """Train a new model on `token_ids` [B, T]; `probe_ids` are the rows on which progress and stopping are judged."""
    model = _new_model(recipe, tokenizer, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    spoke = -math.inf
    for step in range(1, recipe.num_steps + 1):
        batch = token_ids[torch.randint(len(token_ids), (recipe.batch_size,), generator=generator)]
        loss = _train_step(model, optimizer, batch, _learning_rate(recipe, step), recipe.label_smoothing)
        if time.monotonic() - spoke >= _PROGRESS_S:
            on_progress(f"{name}: step {step}/{recipe.num_steps}, loss {loss:.3f}")
            spoke = time.monotonic()
        if step % recipe.check_every_steps and step != recipe.num_steps:
            continue
        accuracy = exact_match(model, probe_ids)
        if recipe.stop_accuracy is not None and accuracy >= recipe.stop_accuracy:
            break
    return model


def _build(output_dir: Path, recipe: PairRecipe, seed: int, on_progress: Progress) -> dict:
    """Write data and models; return the content of pair.json."""
    started_s = time.monotonic()
    tokenizer = build_tokenizer()
    train_rows, eval_rows = split_rows(addition_rows(), recipe.num_eval_prompts, seed)
    _write_rows(output_dir / "train.jsonl", train_rows)
    _write_rows(output_dir / "eval.jsonl", eval_rows)
    train_ids, eval_ids = encode_rows(tokenizer, train_rows), encode_rows(tokenizer, eval_rows)
    # Stopping is judged on training rows, so that the held-out ones decide nothing.
    probe_ids = train_ids[: recipe.num_probe_prompts]
    scores = {}
    for offset, (name, model_recipe) in enumerate((("teacher", recipe.teacher), ("student", recipe.student))):
        model = train_model(name, model_recipe, tokenizer, train_ids, probe_ids, 2 * seed + offset, on_progress)
        scores[f"{name}_exact_match"] = exact_match(model, eval_ids)
        on_progress(f"{name}: held-out exact match {scores[f'{name}_exact_match']:.3f}")
        model.save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
    if scores["teacher_exact_match"] < recipe.min_teacher_exact_match:
        raise RuntimeError(
            f"teacher_exact_match is {scores['teacher_exact_match']:.3f}, below min_teacher_exact_match="
            f"{recipe.min_teacher_exact_match}: raise teacher.num_steps or try another seed than {seed}"
        )
    return {
        "fingerprint": recipe.fingerprint(),
        "seed": seed,
        **scores,
        "seconds": round(time.monotonic() - started_s, 1),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
        "recipe": asdict(recipe),
    }


def _new_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        # The default base is for long contexts. On ten tokens most of its frequencies would hardly turn.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # The default of 0.02 is for wide models; at this width it costs several times the steps.
        initializer_range=recipe.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _answer_logits(model: Qwen3ForCausalLM, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, A, V] logits, [B, A] targets) of the answer positions, eos included; the targets' padding is pad ids."""
    targets = token_ids[:, PROMPT_LENGTH:]
    output = model(input_ids=token_ids[:, :-1], logits_to_keep=targets.shape[1], use_cache=False)
    return output.logits, targets


def _train_step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    token_ids: torch.Tensor,
    learning_rate: float,
    label_smoothing: float,
) -> float:
    logits, targets = _answer_logits(model, token_ids)
    logprobs = logits.log_softmax(-1)
    # Smoothing over the whole vocabulary would make 250 bytes as good as a wrong digit, and a student that still
    # gets digits wrong would learn to answer with any byte at all.
    target_logprobs = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    alphabet = torch.tensor([*ANSWER_BYTES, model.config.eos_token_id])
    score = (1 - label_smoothing) * target_logprobs + label_smoothing * logprobs[..., alphabet].mean(-1)
    loss = -score[targets != model.config.pad_token_id].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _learning_rate(recipe: ModelRecipe, step: int) -> float:
    """Linear warm-up, times a cosine that reaches zero after the last step; `step` counts from 1."""
    warmup = min(1.0, step / recipe.warmup_steps)
    return recipe.peak_lr * warmup * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.num_steps))


def _byte_characters() -> list[str]:
    """The printable stand-in that the byte-level pre-tokenizer uses for each of the 256 bytes, in byte order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {ord(character): character for character in characters if ord(character) < NUM_BYTES}
    # Unprintable bytes have stand-ins from U+0100 on, given out in byte order.
    unprintable = (byte for byte in range(NUM_BYTES) if byte not in by_byte)
    by_byte |= dict(zip(unprintable, characters[len(by_byte) :], strict=True))
    return [by_byte[byte] for byte in range(NUM_BYTES)]


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def _matching_record(path: Path, recipe: PairRecipe, seed: int) -> dict | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if (record["fingerprint"], record["seed"]) == (recipe.fingerprint(), seed) else None
