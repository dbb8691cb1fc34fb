"""The teacher's forward pass: length-sorted padded rows, completion positions only, a chunked head.

Never holds [positions, vocabulary] logits for more than one chunk. Shapes: R rows (completion positions of
all sequences), C rows of a chunk, V vocabulary, K candidates, M support ids.
"""

import sys

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.config import DEFAULT_HEAD_ROWS, DEFAULT_TOKENS, TeacherConfig
from services.errors import StartupError
from services.models.causal_lm import (
    chat_template_hash,
    chat_template_probe,
    eos_token_ids,
    hidden_states,
    load_causal_lm,
    load_tokenizer,
    output_head,
    rope_switch,
    tokenizer_fingerprint,
)
from services.models.fingerprint import model_fingerprint
from services.models.padding import cut_by_padded_tokens, pad_sequences
from services.teacher.jobs import ScoreItem
from services.teacher.transformers.head import ScoringHead
from services.wire.message import PROTOCOL_VERSION
from services.wire.teacher import TeacherInfo

# Threads of a CPU that share less work than this in a forward pass mostly wait for each other, and do more in forward
# passes of their own; more of those than a few wait for Python's lock.
_FLOPS_PER_THREAD = 4e9
_MOST_PARALLEL_FORWARDS = 4
# Padded tokens of a forward pass: fewer run faster on a CPU, whose caches hold no more.
_CPU_TOKENS_PER_FORWARD = 2048


class TransformersEngine:
    """Scores sequences with a transformers causal LM, for at most `parallel_forwards` threads at a time.

    Args:
        config: model, dtype, device and the sizes of a forward pass.

    Raises:
        StartupError: the model cannot be loaded or computes its logits in an unknown way.
    """

    def __init__(self, config: TeacherConfig) -> None:
        assert config.model is not None
        self._config = config
        self._device = _device(config.device)
        usual = _CPU_TOKENS_PER_FORWARD if self._device.type == "cpu" else DEFAULT_TOKENS
        self.tokens_per_forward = config.tokens_per_forward or usual
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            config.model, trust_remote_code=config.trust_remote_code, key="teacher.model"
        )
        self._model: PreTrainedModel = (
            load_causal_lm(
                config.model,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                init_kwargs=config.teacher_model_init_kwargs,
                key="teacher.model",
            )
            .to(self._device)
            .eval()
        )
        self._rope_switch = rope_switch(self._model)
        self.parallel_forwards = self._num_parallel_forwards()
        self._threads_per_forward = max(1, torch.get_num_threads() // self.parallel_forwards)
        output = output_head(self._model)
        self._head = ScoringHead(output, config.rows_per_head_chunk or DEFAULT_HEAD_ROWS)
        self.info = self._describe(len(output.weight))

    def _num_parallel_forwards(self) -> int:
        """More than one for a small model on a CPU, whose code is known to keep no state."""
        config = self._config
        if self._device.type != "cpu" or config.trust_remote_code or config.teacher_model_init_kwargs:
            return 1
        if self._rope_switch is not None:  # which it makes in its own buffers
            return 1
        flops = 2 * self._model.num_parameters() * self.tokens_per_forward
        threads_per_forward = max(1, round(flops / _FLOPS_PER_THREAD))
        return max(1, min(torch.get_num_threads() // threads_per_forward, _MOST_PARALLEL_FORWARDS))

    def _describe(self, vocab: int) -> TeacherInfo:
        config, text_config = self._config, self._model.config.get_text_config()
        limit = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        tokens = tokenizer_fingerprint(self.tokenizer)
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=str(config.model),
            fingerprint=model_fingerprint(
                str(config.model),
                self._model.config,
                tokens,
                {"engine": "transformers", "dtype": config.dtype},
                config.teacher_model_init_kwargs.get("cache_dir"),
            ),
            vocab_size=min(len(self.tokenizer), vocab),
            padded_vocab_size=vocab,
            tokenizer_fingerprint=tokens,
            eos_token_ids=eos_token_ids(self._model, self.tokenizer),
            chat_template_probe=chat_template_probe(self.tokenizer),
            chat_template_hash=chat_template_hash(self.tokenizer),
            dtype=config.dtype,
            max_model_len=min(config.max_model_len or limit, limit),
            max_top_k=min(config.max_top_k or vocab, vocab),
            max_tokens_per_request=config.max_tokens_per_request,
            max_sequences_per_request=config.max_sequences_per_request,
            max_answer_mib=config.max_answer_mib,
            temperature_support="any",
        )

    def forward(self, items: list[ScoreItem]) -> None:
        """One forward pass over sequences of any jobs, whose columns it fills; two where they cannot share one.

        Raises:
            DistillServeError: the model's logits are not finite.
        """
        if self.parallel_forwards > 1:
            torch.set_num_threads(self._threads_per_forward)  # of the thread that calls
        lengths = [len(item.sequence.token_ids) for item in items]
        for group in cut_by_padded_tokens(lengths, sys.maxsize, boundary=self._rope_switch):
            self._forward([items[index] for index in group])

    @torch.inference_mode()
    def _forward(self, items: list[ScoreItem]) -> None:
        sequences = [item.sequence for item in items]
        padded = pad_sequences([s.token_ids for s in sequences], [s.prompt_length for s in sequences])
        hidden = hidden_states(self._model, padded.input_ids.to(self._device)).flatten(0, 1)
        lengths = [s.num_rows for s in sequences]
        positions, targets = padded.positions.to(self._device).split(lengths), padded.token_ids.split(lengths)
        kinds: dict[tuple[int, int | None, float], list[int]] = {}
        for index, item in enumerate(items):
            kinds.setdefault((item.job.top_k, item.job.support_width, item.job.temperature), []).append(index)
        for members in kinds.values():
            of_kind = hidden[torch.cat([positions[i] for i in members])]
            self._score_kind([items[i] for i in members], of_kind, torch.cat([targets[i] for i in members]))

    def _score_kind(self, items: list[ScoreItem], hidden: torch.Tensor, targets: torch.Tensor) -> None:
        """Project and reduce the rows [R, H], and the tokens [R] behind them, of sequences that ask for the same widths and
        temperature."""
        job, sequences = items[0].job, [item.sequence for item in items]
        support = None
        if job.support_width is not None:
            support = torch.from_numpy(np.concatenate([np.asarray(s.support_ids) for s in sequences])).long()
        columns = self._head.score(hidden, targets, support, top_k=job.top_k, temperature=job.temperature)
        start = 0
        for item in items:
            item.job.columns.write(item.rows, columns, slice(start, start + item.sequence.num_rows))
            start += item.sequence.num_rows


def _device(name: str) -> torch.device:
    """The device that `teacher.device` names, seen to work.

    Raises:
        StartupError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StartupError(f"teacher.device = {name!r} cannot be used: {reason}; pass auto, cpu or cuda:N") from error
