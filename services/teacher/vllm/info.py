"""What a teacher with vLLM's engine says of itself, from the model's files: its weights are in other processes."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from services.config import TeacherConfig
from services.models.causal_lm import (
    chat_template_hash,
    chat_template_probe,
    eos_token_ids_on_disk,
    load_model_config,
    tokenizer_fingerprint,
)
from services.models.fingerprint import model_fingerprint
from services.wire.message import PROTOCOL_VERSION
from services.wire.teacher import TeacherInfo

# Fields of AsyncEngineArgs that say where and how fast vLLM works; replicas may differ in them.
_WITHOUT_EFFECT = {
    "block_size",
    "cpu_offload_gb",
    "data_parallel_size",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_expert_parallel",
    "enable_prefix_caching",
    "enforce_eager",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "seed",
    "served_model_name",
    "shutdown_timeout",
}


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
        fingerprint=model_fingerprint(
            str(config.model), _architecture(config), tokens, _serving(config), config.engine_args.get("download_dir")
        ),
        vocab_size=min(len(tokenizer), vocab_size),
        padded_vocab_size=vocab_size,
        tokenizer_fingerprint=tokens,
        eos_token_ids=eos_token_ids_on_disk(config.model or "", tokenizer, trust_remote_code=config.trust_remote_code),
        chat_template_probe=chat_template_probe(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
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


def _serving(config: TeacherConfig) -> dict[str, Any]:
    """How the logits are computed, as far as it changes them."""
    options = {name: value for name, value in config.engine_args.items() if name not in _WITHOUT_EFFECT}
    return {"engine": "vllm", "dtype": config.dtype, **options}
