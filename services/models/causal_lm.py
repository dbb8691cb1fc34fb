"""Load a causal language model and take it apart into a body and an output head.

Shared by the teacher's engine and the trainer's model, which both project chunks of positions to the
vocabulary themselves instead of calling the model's own head, whose [positions, vocabulary] logits would
not fit. Left out: generation (vLLM does it) and training (trainer/learner.py).
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from services.errors import StartupError
from services.models.adapters import effective_weight
from services.models.text import TextError, render_messages
from services.process.startup import check_model_folder, hub_hint

# Rows of a half-precision output embedding that are widened to float32 at once.
_WEIGHT_BLOCK_ROWS = 8192

# Texts that tokenizers with one vocabulary cut differently: spaces, case, digits, normalisation, scripts, code.
_PROBE_TEXTS = (
    "The 3 quick foxes: jump(over) {lazy} dogs, naïvely; 12+34=46 — 你好\n\tend",
    "  two  spaces, a trailing one ",
    "DON'T don't I'LL we've",
    "1234567890 3.14159 1,000,000 0x1F",
    "caf\u00e9 cafe\u0301 \ufb01 \u2460 \u00a0\u3000 \u0130",
    "\U0001f469\u200d\U0001f680 \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627 \uc548\ub155",
    "\u3053\u3093\u306b\u3061\u306f",
    "def f(x):\r\n\n\n    return x  # https://example.org/a_b?c=d&e=f%20g",
    "internationalisation Donaudampfschifffahrt antidisestablishmentarianism",
)
# A template that writes today's date must not make of two models two more every day.
_PROBE_TIME = datetime(2024, 7, 26, 12)


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)); softcap(z) = cap * tanh(z / cap)."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] hidden states to [N, V] logits in the weight's dtype; for few positions only."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def float32_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[N, H] hidden states to [N, V] logits that never were anything but float32; for few positions only.

        Logits rounded to bfloat16 have three significant digits: neighbouring candidates become equal.

        Args:
            out: [N, V] float32 that the logits may be written to; on a CPU fresh memory costs a sixth of the product.
        """
        logits = _float32_product(hidden, self.weight, out)
        if self.bias is not None:
            logits += self.bias
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def _float32_product(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """[N, V] = hidden [N, H] @ weight.T in float32, without a float32 copy of the whole weight."""
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    if weight.device.type == "cuda":
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    product = hidden.new_empty((len(hidden), len(weight)), dtype=torch.float32) if out is None else out
    wide = hidden.float()
    for start in range(0, len(weight), _WEIGHT_BLOCK_ROWS):
        block = slice(start, start + _WEIGHT_BLOCK_ROWS)
        product[:, block] = wide @ weight[block].float().t()
    return product


def load_causal_lm(
    model: str,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    init_kwargs: dict[str, Any] | None = None,
    key: str = "model",
) -> PreTrainedModel:
    """Load weights from safetensors only.

    Args:
        model: folder or hub id.
        init_kwargs: further keyword arguments of from_pretrained.
        key: the option that names it, for errors.

    Raises:
        StartupError: the folder does not exist or holds no loadable model, or the model takes no such arguments.
    """
    check_model_folder(key, model)
    try:
        return AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **(init_kwargs or {}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"cannot load the model {model!r}: {_first_line(error)}{hub_hint(model)}") from error
    except (TypeError, AttributeError, ImportError) as error:
        if not init_kwargs:
            raise
        raise StartupError(
            f"cannot load the model {model!r} with the further arguments {', '.join(init_kwargs)}: {_first_line(error)}"
        ) from error


def load_tokenizer(model: str, *, trust_remote_code: bool = False, key: str = "model") -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        model: folder or hub id.
        key: the option that names it, for errors.

    Raises:
        StartupError: there is none.
    """
    check_model_folder(key, model)
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"cannot load the tokenizer of {model!r}: {_first_line(error)}{hub_hint(model)}") from error


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Run the body alone, without a mask, which lets attention take its fastest way.

    Args:
        input_ids: [B, T], padded on the right, where a causal model's tokens do not see it.
        arguments: further ones of the body.

    Returns:
        [B, T, H] states after the final norm; position t predicts token t + 1. At padding they mean nothing.
    """
    return model.get_decoder()(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state


def rope_switch(model: PreTrainedModel) -> int | None:
    """The length past which a sequence, and all others in its batch, get other rotary frequencies (longrope); or None."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    lengths = [p["original_max_position_embeddings"] for p in by_layer_type if p.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def output_head(model: PreTrainedModel, *, check: bool = True) -> OutputHead:
    """The model's output head as tensors, an adapter of it merged, checked against the model's own logits on a probe.

    Raises:
        StartupError: the architecture does something after its head that this project does not know.
    """
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
    scale = 1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0)
    head = OutputHead(effective_weight(linear), linear.bias, scale, getattr(config, "final_logit_softcapping", None))
    if check:
        _check_head(model, head)
    return head


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: OutputHead) -> None:
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % head.weight.shape[0]
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head.logits(hidden_states(model, ids)[0]).float()
    model.train(was_training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    difference = (theirs - ours).abs().max().item() / max(theirs.abs().max().item(), 1.0)
    if not difference <= tolerance:
        raise StartupError(
            f"{type(model).__name__} computes its logits in a way this project does not know (relative difference "
            f"{difference:.2g} on a probe); supported: a linear head with bias, scale and soft cap"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the generation config's, the model config's and the tokenizer's."""
    return _ids_that_end(getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)


def eos_token_ids_on_disk(
    model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> list[int]:
    """What `eos_token_ids` says, without loading weights.

    Raises:
        StartupError: the model has no configuration, or one that transformers does not know.
    """
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:
        generation = None
    config = load_model_config(model, trust_remote_code=trust_remote_code)
    return _ids_that_end(generation, config.get_text_config(), tokenizer)


def load_model_config(model: str, *, trust_remote_code: bool = False, key: str = "model") -> PreTrainedConfig:
    """The configuration of a folder or hub id.

    Args:
        model: folder or hub id.
        key: the option that names it, for errors.

    Raises:
        StartupError: there is none, or one that transformers does not know.
    """
    check_model_folder(key, model)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(
            f"cannot read the configuration of {model!r}: {_first_line(error)}{hub_hint(model)}"
        ) from error


def _ids_that_end(*holders: object) -> list[int]:
    """The end tokens that configurations or a tokenizer name, each of them one, several or none."""
    found: set[int] = set()
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return sorted(found)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token-to-id map and of some probes' encodings; equal for equal tokenizers, whatever the padding."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBE_TEXTS]
    content = [sorted(tokenizer.get_vocab().items()), encoded]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def chat_template_probe(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A fixed conversation as the tokenizer's chat template renders it on a fixed day, or None without a template.

    Raises:
        StartupError: the template fails on it.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "2+2="}]
    try:
        return render_messages(
            "a user's message", messages, tokenizer, add_generation_prompt=True, strftime_now=_PROBE_TIME.strftime
        )
    except TextError as error:
        raise StartupError(f"the tokenizer of {tokenizer.name_or_path!r} cannot be used: {error}") from error


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template's source and of the special tokens that it may use, or None without a template."""
    if tokenizer.chat_template is None:
        return None
    source = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    first = (text.splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in text and "trust_remote_code" not in first:
        return f"{first} Read that code, then pass trust_remote_code = true"
    return first
