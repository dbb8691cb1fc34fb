"""What a teacher with vLLM's engine says of itself, from the model's files: its weights are in other processes."""

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from services.causal_lm import chat_template_probe, end_token_ids, tokenizer_fingerprint
from services.config import TeacherConfig
from services.errors import StartupError
from services.schemas import PROTOCOL_VERSION, TeacherInfo

# Bytes at the end of each file of weights that tell two models with the same configuration apart.
_PROBE_BYTES = 1 << 16


def model_config(config: TeacherConfig) -> Any:
    """The model's transformers configuration.

    Raises:
        StartupError: there is none, or one that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(config.model or "", trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(f"cannot read the configuration of {config.model!r}: {reason}") from error


def longest_sequence(model_config: Any) -> int:
    """Tokens that the model has positions for."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def describe(
    config: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_model_len: int,
    scores_support_ids: bool,
) -> TeacherInfo:
    """What `GET /v1/teacher/info` answers.

    Args:
        vocab_size: rows of the output embedding.
        max_model_len: longest sequence that vLLM scores.
        scores_support_ids: whether its model runner scores tokens of the caller's choice.
    """
    architecture, tokens = model_config(config), tokenizer_fingerprint(tokenizer)
    return TeacherInfo(
        protocol=PROTOCOL_VERSION,
        model=str(config.model),
        fingerprint=_fingerprint(config, architecture, tokens),
        vocab_size=min(len(tokenizer), vocab_size),
        padded_vocab_size=vocab_size,
        tokenizer_fingerprint=tokens,
        eos_token_ids=end_token_ids(_generation_config(config), architecture.get_text_config(), tokenizer),
        chat_template_probe=chat_template_probe(tokenizer),
        dtype=config.dtype,
        max_model_len=max_model_len,
        max_top_k=min(config.max_top_k or vocab_size, vocab_size),
        max_tokens_per_request=config.max_tokens_per_request,
        max_sequences_per_request=config.max_sequences_per_request,
        max_answer_mib=config.max_answer_mib,
        temperature_support="one",
        engine="vllm",
        scores_support_ids=scores_support_ids,
        computes_entropies=False,
    )


def _generation_config(config: TeacherConfig) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(config.model or "")
    except OSError:
        return None


def _fingerprint(config: TeacherConfig, architecture: Any, tokenizer: str) -> str:
    """Hash of the architecture, a probe of the files of weights, the tokenizer, dtype and vLLM's options."""
    described = architecture.to_json_string(use_diff=False).encode()
    # The folder's name is in the configuration, and replicas may keep their copies anywhere.
    described = described.replace(str(architecture.name_or_path).encode(), b"")
    options = repr(sorted(config.engine_args.items())).encode()
    digest = hashlib.sha256(b"|".join([b"vllm", described, tokenizer.encode(), config.dtype.encode(), options]))
    for path in sorted(Path(config.model or "").glob("*.safetensors")):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _PROBE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
