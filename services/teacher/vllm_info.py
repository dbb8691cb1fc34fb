"""What a teacher with vLLM's engine says of itself, from the model's files: its weights are in other processes."""

import hashlib
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from services.causal_lm import (
    chat_template_probe,
    eos_token_ids_on_disk,
    load_model_config,
    tokenizer_fingerprint,
)
from services.config import TeacherConfig
from services.schemas import PROTOCOL_VERSION, TeacherInfo

# Bytes at the end of each file of weights that tell two models with the same configuration apart.
_PROBE_BYTES = 1 << 16


def longest_sequence(config: TeacherConfig) -> int:
    """Tokens that the model has positions for.

    Raises:
        StartupError: the model has no configuration, or one that transformers does not know.
    """
    return getattr(_architecture(config).get_text_config(), "max_position_embeddings", None) or 1 << 20


def _architecture(config: TeacherConfig) -> PreTrainedConfig:
    return load_model_config(config.model or "", trust_remote_code=config.trust_remote_code, key="teacher.model")


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
    tokens = tokenizer_fingerprint(tokenizer)
    return TeacherInfo(
        protocol=PROTOCOL_VERSION,
        model=str(config.model),
        fingerprint=_fingerprint(config, _architecture(config), tokens),
        vocab_size=min(len(tokenizer), vocab_size),
        padded_vocab_size=vocab_size,
        tokenizer_fingerprint=tokens,
        eos_token_ids=eos_token_ids_on_disk(config.model or "", tokenizer, trust_remote_code=config.trust_remote_code),
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


def _fingerprint(config: TeacherConfig, architecture: PreTrainedConfig, tokenizer: str) -> str:
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
