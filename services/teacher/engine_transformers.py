"""The teacher's forward pass: length-sorted padded rows, completion positions only, a chunked head.

Never holds [positions, vocabulary] logits for more than one chunk. Shapes: R rows (completion positions of
all sequences), C rows of a chunk, V vocabulary, K candidates, M support ids.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.causal_lm import (
    chat_template_probe,
    eos_token_ids,
    hidden_states,
    load_causal_lm,
    load_tokenizer,
    output_head,
    tokenizer_fingerprint,
)
from services.config import TeacherConfig
from services.errors import DistillServeError, RequestError, StartupError
from services.padding import cut_by_padded_tokens, pad_rows, predicting_positions
from services.schemas import PROTOCOL_VERSION, TeacherInfo, TeacherScores

# Elements of one chunk of float32 logits: 64 Mi are 256 MiB.
_MAX_CHUNK_ELEMENTS = 64 << 20


@dataclass(frozen=True)
class EncodedSequence:
    """Token ids of prompt and completion; row i scores token_ids[prompt_length + i]."""

    token_ids: list[int]
    prompt_length: int
    support_ids: list[list[int]] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - self.prompt_length


class TransformersEngine:
    """Scores sequences with a transformers causal LM; not thread-safe, one caller at a time.

    Args:
        config: model, dtype, device and the sizes of a forward pass.

    Raises:
        StartupError: the model cannot be loaded or computes its logits in an unknown way.
    """

    def __init__(self, config: TeacherConfig) -> None:
        assert config.model is not None
        self._config = config
        self._device = _device(config.device)
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
        self._head = output_head(self._model)
        self.info = self._describe()

    def _describe(self) -> TeacherInfo:
        config, text_config = self._config, self._model.config.get_text_config()
        vocab = self._head.weight.shape[0]
        limit = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        tokens = tokenizer_fingerprint(self.tokenizer)
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=str(config.model),
            fingerprint=_fingerprint(self._model, tokens, config.dtype),
            vocab_size=min(len(self.tokenizer), vocab),
            padded_vocab_size=vocab,
            tokenizer_fingerprint=tokens,
            eos_token_ids=eos_token_ids(self._model, self.tokenizer),
            chat_template_probe=chat_template_probe(self.tokenizer),
            dtype=config.dtype,
            max_model_len=min(config.max_model_len or limit, limit),
            max_top_k=min(config.max_top_k or vocab, vocab),
            max_tokens_per_request=config.max_tokens_per_request,
            max_sequences_per_request=config.max_sequences_per_request,
            max_answer_mib=config.max_answer_mib,
            temperature_support="any",
        )

    @torch.inference_mode()
    def score(self, sequences: list[EncodedSequence], *, top_k: int, temperature: float) -> TeacherScores:
        """Score every completion row.

        Args:
            sequences: already checked against this engine's limits.
            top_k: K candidates per row, at most the vocabulary.
            temperature: divides the logits before the softmax.

        Raises:
            RequestError: no row to score, or more candidates than the vocabulary has; nothing was computed.
            DistillServeError: the model's logits are not finite.
        """
        _check_scorable(sequences, top_k, self.info.padded_vocab_size)
        offsets = np.concatenate([[0], np.cumsum([s.num_rows for s in sequences])])
        columns = _Columns.empty(int(offsets[-1]), top_k, _support_width(sequences))
        lengths = [len(s.token_ids) for s in sequences]
        for group in cut_by_padded_tokens(lengths, self._config.tokens_per_forward):
            rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in group])
            self._score_group([sequences[i] for i in group], rows, columns, temperature)
        return TeacherScores(
            model=self.info.model,
            fingerprint=self.info.fingerprint,
            temperature=temperature,
            top_k=top_k,
            row_offsets=offsets.astype(np.int64),
            **vars(columns),
        )

    def _score_group(
        self, sequences: list[EncodedSequence], rows: np.ndarray, columns: "_Columns", temperature: float
    ) -> None:
        ids, mask = pad_rows([s.token_ids for s in sequences])
        prompts, lengths = [s.prompt_length for s in sequences], [s.num_rows for s in sequences]
        positions = predicting_positions(prompts, lengths, ids.shape[1])
        hidden = hidden_states(self._model, ids.to(self._device), mask.to(self._device)).flatten(0, 1)
        hidden = hidden[positions.to(self._device)]
        targets = torch.from_numpy(np.concatenate([s.token_ids[s.prompt_length :] for s in sequences])).long()
        support = None
        if columns.support_logprobs is not None:
            support = torch.from_numpy(np.concatenate([np.asarray(s.support_ids) for s in sequences])).long()
        size = max(1, min(self._config.rows_per_head_chunk, _MAX_CHUNK_ELEMENTS // self.info.padded_vocab_size))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = self._head.float32_logits(hidden[part]).div_(temperature)
            columns.fill(rows[part], logits, targets[part], None if support is None else support[part])


@dataclass(frozen=True)
class _Columns:
    """The arrays of an answer, filled chunk by chunk."""

    token_logprobs: np.ndarray  # [R]
    topk_ids: np.ndarray  # [R, K]
    topk_logprobs: np.ndarray  # [R, K]
    tail_logprobs: np.ndarray  # [R]
    entropies: np.ndarray  # [R]
    support_logprobs: np.ndarray | None  # [R, M]
    support_tail_logprobs: np.ndarray | None  # [R]

    @classmethod
    def empty(cls, rows: int, top_k: int, support: int | None) -> "_Columns":
        def floats(*shape: int) -> np.ndarray:
            return np.empty(shape, np.float32)

        return cls(
            token_logprobs=floats(rows),
            topk_ids=np.empty((rows, top_k), np.int32),
            topk_logprobs=floats(rows, top_k),
            tail_logprobs=floats(rows),
            entropies=floats(rows),
            support_logprobs=None if support is None else floats(rows, support),
            support_tail_logprobs=None if support is None else floats(rows),
        )

    def fill(self, rows: np.ndarray, logits: torch.Tensor, targets: torch.Tensor, support: torch.Tensor | None) -> None:
        """Reduce [C, V] float32 logits to the rows of the answer."""
        logprobs = logits.log_softmax(-1)
        if not bool(torch.isfinite(logprobs.amax(-1)).all()):
            raise DistillServeError("the teacher's logits are not finite; its weights or its dtype are not usable")
        targets = targets.to(logits.device)
        self.token_logprobs[rows] = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1).cpu().numpy()
        self.entropies[rows] = -torch.special.xlogy(p := logprobs.exp(), p).sum(-1).cpu().numpy()
        if support is not None:
            assert self.support_logprobs is not None and self.support_tail_logprobs is not None
            support = support.to(logits.device)
            self.support_logprobs[rows] = logprobs.gather(1, support).cpu().numpy()
            self.support_tail_logprobs[rows] = log_mass_outside(logprobs, support).cpu().numpy()
        ids = top_k_ids(logprobs, self.topk_ids.shape[1])
        self.topk_ids[rows] = ids.cpu().numpy()
        self.topk_logprobs[rows] = logprobs.gather(1, ids).cpu().numpy()
        self.tail_logprobs[rows] = log_mass_outside(logprobs, ids).cpu().numpy()


def top_k_ids(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """[C, k] ids by falling logprob; equal logprobs by rising id, which torch.topk does not promise."""
    values, ids = torch.topk(logprobs, min(k + 1, logprobs.shape[1]), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1)
    ids = ids[:, :k]
    if bool(tied.any()):
        ids[tied] = torch.sort(logprobs[tied], dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


def log_mass_outside(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[C] log of the probability of all tokens not in ids [C, K]; -inf when there are none.

    A logsumexp over the complement: log(1 - sum) would lose everything below float32's resolution of 1.
    """
    return logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)


def _support_width(sequences: list[EncodedSequence]) -> int | None:
    support = sequences[0].support_ids
    return None if support is None else len(support[0])


def _fingerprint(model: PreTrainedModel, tokenizer: str, dtype: str) -> str:
    """Hash of the architecture, a probe of the weights, the tokenizer and the dtype; equal for replicas."""
    probe = next(model.parameters()).detach().flatten()[:256].float().cpu().numpy().tobytes()
    architecture = model.config.to_json_string(use_diff=False).encode()
    # The folder's name is in the configuration, and replicas may keep their copies anywhere.
    architecture = architecture.replace(str(model.config.name_or_path).encode(), b"")
    return hashlib.sha256(b"|".join([architecture, probe, tokenizer.encode(), dtype.encode()])).hexdigest()[:16]


def _check_scorable(sequences: list[EncodedSequence], top_k: int, vocabulary: int) -> None:
    if not 1 <= top_k <= vocabulary:
        raise RequestError(
            422, "Over a limit", f"top_k = {top_k} must be between 1 and the vocabulary's {vocabulary}", field="top_k"
        )
    if not sequences:
        raise RequestError(422, "Nothing to score", "sequences is empty; give at least one", field="sequences")
    for index, sequence in enumerate(sequences):
        if sequence.num_rows < 1 or sequence.prompt_length < 1:
            field = f"sequences.{index}.prompt_length"
            raise RequestError(
                422,
                "Nothing to score",
                f"{field} = {sequence.prompt_length} must leave at least one of {len(sequence.token_ids)} tokens on both sides",
                field=field,
            )


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
