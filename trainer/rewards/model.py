"""In a worker: a sequence-classification model as a reward function."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from services.models.causal_lm import load_tokenizer


class RewardModel:
    """Gives a text the one number of a model's classification head.

    The text is prompt and completion; of a conversation what the model's own chat template makes of both.

    Args:
        name: folder or hub id.
        max_tokens: longer texts lose their beginning; None: what the model has positions for.

    Raises:
        DistillServeError, OSError, ValueError, RuntimeError: it cannot be loaded.
    """

    is_async = False
    parameters, required = ("prompts", "completions"), ("prompts", "completions")

    def __init__(
        self, name: str, *, dtype: str, device: str, batch_size: int, max_tokens: int | None, trust_remote_code: bool
    ) -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        loaded: tuple[Any, dict[str, Any]] = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        self._model, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])[0]
            raise ValueError(f"it holds no {missing}: it is no model that was trained to classify sequences")
        self._model.to(device).eval()
        self._tokenizer = _tokenizer(name, trust_remote_code)
        self._model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._device, self._batch_size = device, batch_size
        self._max_tokens = max_tokens or _longest(self._model, self._tokenizer)

    def call(self, arguments: dict[str, Any]) -> list[float]:
        """The reward of each completion, of whatever length the others are."""
        encoded = [self._encode(*pair) for pair in zip(arguments["prompts"], arguments["completions"], strict=True)]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        rewards = [0.0] * len(encoded)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for index, reward in zip(chosen, self._score([encoded[index] for index in chosen]), strict=True):
                rewards[index] = reward
        return rewards

    def explain(self, error: BaseException) -> str:
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        is_chat = not isinstance(prompt, str)
        text = prompt + completion
        if is_chat:
            text = self._tokenizer.apply_chat_template(text, tokenize=False)
        # A chat template writes the special tokens itself.
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=not is_chat, truncation=self._max_tokens is not None, max_length=self._max_tokens
        )["input_ids"]
        if not ids:
            raise ValueError("a text without tokens cannot be classified")
        return ids

    @torch.inference_mode()
    def _score(self, sequences: list[list[int]]) -> list[float]:
        longest = max(map(len, sequences))
        input_ids = torch.full((len(sequences), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        output = self._model(input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device))
        scores: list[float] = output.logits[:, 0].float().tolist()
        return scores


def _tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, key="reward.functions")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"  # the completion is at the end
    return tokenizer


def _longest(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and 0 < limit < 1 << 30]
    return min(known, default=None)
