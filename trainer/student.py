"""The student: the body of a causal LM and its output head in one forward pass, so that sharding, autocast and hooks see all of it.

Sequences run as padded rows (services/models/padding.py). Only positions that predict a completion token reach the head.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from services.config import StudentConfig
from services.models.causal_lm import hidden_states, load_causal_lm, output_head, rope_switch
from trainer.attention import choose_attention, pack_rows, packs
from trainer.dropout import disable_dropout
from trainer.loss.head import HeadOutput, support_logprobs


class Student(nn.Module):
    """A causal LM as the loss needs it.

    Args:
        model: with master weights. In which dtype its body computes is for trainer/parallel.py to say; the head is computed in
            float32 at least, as the teacher's and the rollout server's are.

    Attributes:
        vocab_size: rows of the output head, padding included.
        rope_switch: length at which all rotary frequencies change (`services.models.causal_lm.rope_switch`), or None.

    Raises:
        StartupError: the model computes its logits in an unknown way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = len(output_head(model).weight)  # refuses an unknown head now, not at the first step
        self.rope_switch = rope_switch(model)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        token_ids: Tensor,
        support_ids: Tensor,
        temperature: float = 1.0,
        lengths: Tensor | None = None,
        entropy_gradient: bool = False,
    ) -> HeadOutput:
        """Logprobs at packed completion positions.

        Args:
            input_ids: [B, T], padded on the right.
            positions: [N] into the B * T hidden states.
            token_ids: [N].
            support_ids: [N, K].
            temperature: divides the logits.
            lengths: [B] of the sequences; needed where attention takes packed rows.
            entropy_gradient: whether the entropy carries a gradient.

        Returns:
            [N], [N, K], [N] and [N] in float32 at least.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids}
        if packs(self.model):
            assert lengths is not None, "without lengths, padding cannot be told from tokens"
            arguments, where = pack_rows(input_ids, lengths)
            positions = where[positions]
        hidden = hidden_states(self.model, **arguments).flatten(0, 1)[positions]
        head = output_head(self.model, check=False)
        return support_logprobs(
            hidden,
            head.weight,
            token_ids,
            support_ids,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            entropy_gradient=entropy_gradient,
        )


def load_student(config: StudentConfig, *, checkpointing: bool | None = None) -> Student:
    """The student with master weights in `config.dtype`, ready to train.

    Args:
        checkpointing: recompute activations in the backward pass; default: where the config says so.

    Raises:
        ConfigError: student.attn_implementation cannot be had.
        StartupError: the model cannot be loaded, computes its logits in an unknown way, or keeps a dropout.
    """
    assert config.model is not None
    model = load_causal_lm(
        config.model,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        init_kwargs=config.model_init_kwargs,
        key="student.model",
    )
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing if checkpointing is None else checkpointing:
        model.gradient_checkpointing_enable()
    student = Student(model).train()
    if config.attn_implementation is not None:  # after the probes of the model, which are made where it was loaded
        choose_attention(model, config.attn_implementation)
    return student
