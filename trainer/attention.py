"""Attention over packed sequences: the flash attention that torch brings along, for GPUs, as "varlen" for transformers.

A packed row holds sequence after sequence without padding; a flash attention is told where they end. Those of transformers
("flash_attention_2" and the like) need a package of their own, this one none. On a CPU there is none of them, and padded rows
are what sdpa takes its fastest way with.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from services.errors import ConfigError

VARLEN = "varlen"


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Let a model compute its attention in another way.

    Raises:
        ConfigError: transformers does not know it, a package is missing, or the model needs what it cannot do.
    """
    AttentionInterface.register(VARLEN, attend_packed)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
    text = model.config.get_text_config()
    if name == VARLEN and getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(
            f"student.attn_implementation = {name!r} knows no soft cap of attention logits, which {type(model).__name__} has; "
            'take "sdpa" or "eager"'
        )
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"student.attn_implementation = {name!r} cannot be had: {reason}") from error
    for module in model.modules():  # the parts of a model may have configurations of their own (trainer/dropout.py)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def packs(model: PreTrainedModel) -> bool:
    """Whether its attention takes packed rows."""
    name = str(model.config.get_text_config()._attn_implementation)
    return name == VARLEN or name.startswith("flash_attention")


def pack_rows(input_ids: Tensor, lengths: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Padded rows as one packed row.

    Args:
        input_ids: [B, T], padded on the right.
        lengths: [B] int64 of the sequences, at least 1 each.

    Returns:
        arguments of a decoder; and [B * T] int64, where in the packed row each place of the padded ones is, wrong at padding.
    """
    num_rows, longest = input_ids.shape
    places = torch.arange(longest, device=input_ids.device)
    is_token = places < lengths.unsqueeze(1)
    ends = lengths.cumsum(0)
    where = (ends - lengths).unsqueeze(1) + places
    cu_seqlens = nn.functional.pad(ends, (1, 0)).to(torch.int32)
    arguments = {
        "input_ids": input_ids[is_token].unsqueeze(0),
        "position_ids": places.expand(num_rows, longest)[is_token].unsqueeze(0),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return arguments, where.flatten()


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        query: [1, heads, T, D] of the packed row; key and value [1, key heads, T, D].
        kwargs: "cu_seq_lens_q" [B + 1] int32 and "max_length_q", of `pack_rows`.

    Raises:
        ConfigError: the model has attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise ConfigError(f'student.attn_implementation = "{VARLEN}" knows no attention sinks; take "eager"')
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
    assert isinstance(found, Tensor)  # the logsumexps are not asked for
    return found.unsqueeze(0), None
