"""What servers say of themselves, and clients that repeat it."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from services.models.causal_lm import chat_template_probe, tokenizer_fingerprint
from services.wire.rollout import RolloutInfo
from services.wire.teacher import TeacherInfo

EOS = [256]


def teacher_info(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> TeacherInfo:
    fields = {
        "protocol": 1,
        "model": "the-teacher",
        "fingerprint": "f",
        "vocab_size": len(tokenizer),
        "padded_vocab_size": len(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "eos_token_ids": EOS,
        "chat_template_probe": chat_template_probe(tokenizer),
        "dtype": "float32",
        "max_model_len": 128,
        "max_top_k": len(tokenizer),
        "max_tokens_per_request": 1,
        "max_sequences_per_request": 1,
        "max_answer_mib": 1,
        "temperature_support": "any",
    }
    return TeacherInfo(**{**fields, **changes})


def rollout_info(**changes: Any) -> RolloutInfo:
    fields = {
        "protocol": 1,
        "model": "the-student",
        "boot_id": "b",
        "policy_version": "default",
        "dtype": "float32",
        "max_model_len": 64,
        "vocab_size": 261,
        "max_logprobs": 64,
        "world_size": 1,
        "weight_transfer_backend": "gloo",
    }
    return RolloutInfo(**{**fields, **changes})


class Servers:
    """Stands for either client."""

    def __init__(self, *infos: object, vocabulary: dict[str, int] | None = None) -> None:
        self.infos, self._vocabulary = list(infos), vocabulary
        self.urls = [f"http://server-{index}" for index in range(len(infos))]

    async def wait_ready(self, timeout_s: float, on_wait: object) -> None:
        pass

    async def info(self) -> list[object]:
        return self.infos

    async def vocabulary(self) -> dict[str, int] | None:
        return self._vocabulary
