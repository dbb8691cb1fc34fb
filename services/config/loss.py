"""`[loss]`: the MiniLLM objective."""

from typing import Literal, Self

from pydantic import Field, model_validator

from services.config.section import Section


class LossConfig(Section):
    """The MiniLLM objective; formulas and sources in docs/losses.md."""

    rkl_advantage: bool = True
    """Policy-gradient term on the sequence-level reverse KL."""
    single_step_decomposition: bool = True
    """Reverse KL of the next-token distributions as a term of its own."""
    gamma: float = Field(0.0, ge=0, le=1)
    """Discount of future rewards; 0 looks at one token only."""
    length_normalization: bool = True
    """Divide each discounted return by the sum of its discounts."""
    reward_to_go: Literal["auto", "inclusive", "exclusive"] = "auto"
    """Whether a token's own reward is in its advantage; auto: exclusive when the single-step term is on."""
    kd_temperature: float = Field(1.0, gt=0)
    """Divides student and teacher logits before the softmax."""
    single_step_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """Divergence of the single-step term; reverse_kl is MiniLLM's, the others are GKD's."""
    jsd_beta: float = Field(0.5, ge=0, le=1)
    """The teacher's share in the mixture of "jsd"; 0 is forward KL, 1 reverse KL, and near them the gradient almost vanishes."""
    single_step_estimator: Literal["hybrid", "truncated", "full"] = "hybrid"
    """truncated: top_k tokens and a bucket for the rest; hybrid adds sampled tokens for what is inside it; full: every token."""
    support: Literal["teacher_topk", "student_topk"] = "teacher_topk"
    """Whose likeliest tokens the single-step term looks at."""
    top_k: int = Field(32, ge=1)
    """Tokens of the support per position; at most the vocabulary less one."""
    alpha_rkl: float = Field(1.0, ge=0)
    """Weight of the policy-gradient term."""
    alpha_single_step: float = Field(1.0, ge=0)
    """Weight of the single-step term."""
    alpha_reward: float = Field(1.0, ge=0)
    """Weight of the rewards of reward.functions; 0: they are only measured."""
    alpha_entropy: float = Field(0.0, ge=0)
    """Weight of an entropy bonus: the entropy of the student's next-token distributions, which the loss then raises."""
    alpha_reference_kl: float = Field(0.0, ge=0)
    """Weight of the KL to a frozen copy of the student as the run found it, which the trainer then holds as well; GRPO's beta."""
    alpha_lm: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on the texts of data.lm_path (MiniLLM's L_PT)."""
    advantage_clip: float | None = Field(10.0, gt=0)
    """Bound on the absolute advantage; null for exactness."""
    importance_sampling: Literal["none", "tis", "icepop"] = "tis"
    """Correction for the distance between trainer and rollout policy."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest importance ratio of "tis"."""
    icepop_low: float = Field(0.5, ge=0)
    """Tokens with a smaller ratio are dropped by "icepop"."""
    icepop_high: float = Field(5.0, gt=0)
    """Tokens with a larger ratio are dropped by "icepop"."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """With several updates per batch: the policy ratio counts down to 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """With several updates per batch: the policy ratio counts up to 1 + clip_high."""
    top_entropy_quantile: float = Field(1.0, ge=0, le=1)
    """Share of a step's tokens, those where the student's entropy is highest, that the policy gradient looks at (GRPO's option);
    below 1 a step takes one more forward pass."""
    truncated: Literal["train", "mask", "drop"] = "train"
    """Completions that hit max_new_tokens: train on them; mask: only count them in their group of rewards; drop: nowhere."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How token losses become one number; "constant" divides by sequences times max_new_tokens."""

    @property
    def uses_rkl_advantage(self) -> bool:
        return self.rkl_advantage and self.alpha_rkl > 0

    @property
    def uses_single_step(self) -> bool:
        return self.single_step_decomposition and self.alpha_single_step > 0

    @property
    def is_exclusive(self) -> bool:
        """Whether a token's own reward is left to the single-step term (MiniLLM's decomposition, eq. 3)."""
        return self.reward_to_go == "exclusive" or (self.reward_to_go == "auto" and self.uses_single_step)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the teacher's rewards make advantages that are not all zero: with gamma = 0 and exclusive rewards-to-go they are."""
        return self.uses_rkl_advantage and not (self.gamma == 0 and self.is_exclusive)

    @property
    def uses_sampled_tokens(self) -> bool:
        """Whether a term is an expectation over the sampled token, which must then come from the student itself."""
        return self.has_policy_gradient or (self.uses_single_step and self.single_step_estimator == "hybrid")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.icepop_low >= self.icepop_high:
            raise ValueError(f"loss.icepop_low = {self.icepop_low} must be below loss.icepop_high = {self.icepop_high}")
        return self
