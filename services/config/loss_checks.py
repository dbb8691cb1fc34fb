"""What of `[loss]` does not fit together, or not with how prompts are completed and which texts there are."""

from typing import TYPE_CHECKING

from services.config.section import refuse_changed

if TYPE_CHECKING:
    from services.config import RunConfig


def check_something_to_learn(config: "RunConfig") -> None:
    loss = config.loss
    if config.learns_rewards:
        return
    if not loss.uses_rkl_advantage and not loss.uses_single_step:
        raise ValueError(
            f"loss.rkl_advantage = {loss.rkl_advantage} (alpha_rkl = {loss.alpha_rkl}) and loss.single_step_decomposition = "
            f"{loss.single_step_decomposition} (alpha_single_step = {loss.alpha_single_step}) leave nothing to learn; "
            "set one of them to true, with a weight above 0, or give reward.functions and loss.alpha_reward"
        )
    if not loss.has_policy_gradient and not loss.uses_single_step:
        raise ValueError(
            "loss.reward_to_go = exclusive with loss.gamma = 0 and no single-step term leaves nothing to learn; use inclusive"
        )


def check_sampled_policy(config: "RunConfig") -> None:
    """Terms that are expectations over the sampled token need it to come from the policy that learns."""
    loss, sampling = config.loss, config.sampling
    if not loss.uses_sampled_tokens and not config.learns_rewards:
        return
    without = "make them equal"
    if loss.uses_single_step and not config.learns_rewards:
        without += ", or set loss.rkl_advantage = false and loss.single_step_estimator = truncated"
    is_cut = sampling.top_p < 1.0 or sampling.top_k > 0
    if loss.kd_temperature != 1.0:
        if sampling.temperature != loss.kd_temperature:
            raise ValueError(
                f"loss.kd_temperature = {loss.kd_temperature} with sampling.temperature = {sampling.temperature}: the policy "
                f"gradient needs the logprobs of the policy that sampled; {without}"
            )
        if is_cut:
            raise ValueError(
                f"loss.kd_temperature = {loss.kd_temperature} needs sampling.top_p = 1 and sampling.top_k = 0 "
                f"(got {sampling.top_p} and {sampling.top_k}): the policy that samples must be the one that learns"
            )
    elif loss.importance_sampling == "none" and (is_cut or sampling.temperature != 1.0):
        raise ValueError(
            f"loss.importance_sampling = none with sampling.temperature = {sampling.temperature}, top_p = {sampling.top_p} and "
            f"top_k = {sampling.top_k}: nothing corrects for the other policy that samples; use tis, or sample at 1, 1 and 0"
        )


def check_student_support(config: "RunConfig") -> None:
    loss, sampling = config.loss, config.sampling
    if loss.support != "student_topk":
        return
    if sampling.top_p < 1.0 or 0 < sampling.top_k < loss.top_k:
        raise ValueError(
            f"loss.support = student_topk with loss.top_k = {loss.top_k} needs the student's whole distribution, but sampling.top_p = "
            f"{sampling.top_p} and sampling.top_k = {sampling.top_k} cut it; sample at 1 and 0, or use teacher_topk"
        )


def refuse_ignored_loss_options(config: "RunConfig") -> None:
    """An option that another one makes meaningless is a mistake.

    Two are spared: rkl_advantage, which is on by default and has no effect at the default gamma = 0, and top_k, on which
    metrics and costs depend in any case.
    """
    loss = config.loss
    has_policy_gradient = loss.has_policy_gradient or config.learns_rewards
    rules: list[tuple[bool, str, list[str]]] = [
        (not loss.uses_rkl_advantage, "the policy-gradient term is off", ["gamma", "reward_to_go"]),
        (
            not has_policy_gradient,
            "the policy-gradient term is silent (off, or loss.gamma = 0 beside the single-step term)",
            ["advantage_clip", "clip_low", "clip_high", "top_entropy_quantile"],
        ),
        (
            loss.uses_rkl_advantage and not loss.has_policy_gradient,
            "loss.gamma = 0 beside the single-step term",
            ["alpha_rkl"],
        ),
        (
            loss.gamma == 0 or not loss.uses_rkl_advantage,
            "loss.gamma = 0 looks at one token, or the policy-gradient term is off",
            ["length_normalization"],
        ),
        (
            not loss.uses_single_step,
            "the single-step term is off",
            ["single_step_divergence", "jsd_beta", "single_step_estimator", "support"],
        ),
        (
            loss.single_step_estimator == "full",
            "loss.single_step_estimator = full looks at every token",
            ["top_k", "support"],
        ),
        (not loss.rkl_advantage, "loss.rkl_advantage = False", ["alpha_rkl"]),
        (not loss.single_step_decomposition, "loss.single_step_decomposition = False", ["alpha_single_step"]),
        (loss.single_step_divergence != "jsd", "loss.single_step_divergence is not jsd", ["jsd_beta"]),
        (
            not loss.uses_sampled_tokens and not config.learns_rewards,
            "no term looks at the sampled token",
            ["importance_sampling", "importance_cap", "icepop_low", "icepop_high"],
        ),
        (loss.importance_sampling != "tis", "loss.importance_sampling is not tis", ["importance_cap"]),
        (loss.importance_sampling != "icepop", "loss.importance_sampling is not icepop", ["icepop_low", "icepop_high"]),
        (not config.reward.functions, "there are no reward.functions", ["alpha_reward"]),
        (
            config.pipeline.updates_per_batch == 1,
            "pipeline.updates_per_batch = 1 never clips the policy ratio",
            ["clip_low", "clip_high"],
        ),
    ]
    for applies, reason, names in rules:
        if applies:
            refuse_changed(loss, "loss", names, reason)


def refuse_ignored_text_options(config: "RunConfig") -> None:
    loss, data = config.loss, config.data
    if (loss.alpha_lm > 0) != (data.lm_path is not None):
        raise ValueError(
            f"loss.alpha_lm = {loss.alpha_lm} with data.lm_path = {data.lm_path!r}: the cross-entropy on texts needs "
            "a weight above 0 and a file; give both or neither"
        )
    if data.lm_path is None:
        reason = "there is no data.lm_path"
        refuse_changed(data, "data", ["text_column", "max_text_tokens"], reason)
        refuse_changed(config.pipeline, "pipeline", ["texts_per_step"], reason)
