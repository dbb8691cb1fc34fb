"""What of `[reward]` does not fit together, or not with how prompts are completed."""

from typing import TYPE_CHECKING

from services.config.section import refuse_changed

if TYPE_CHECKING:
    from services.config import RunConfig


def check_rewards_can_teach(config: "RunConfig") -> None:
    """Refuse rewards whose advantages are all zero."""
    reward, samples = config.reward, config.pipeline.samples_per_prompt
    if not config.learns_rewards:
        return
    if samples == 1 and reward.advantage != "raw":
        raise ValueError(
            f"pipeline.samples_per_prompt = 1 with reward.advantage = {reward.advantage}: a completion is compared with the "
            "others of its prompt, and there are none; sample several, or take raw"
        )
    if not any(reward.function_weights):
        raise ValueError(
            f"reward.weights = {reward.weights} leaves loss.alpha_reward = {config.loss.alpha_reward} without effect; give a "
            "weight, or set loss.alpha_reward = 0 to measure the rewards alone"
        )


def refuse_ignored_reward_options(config: "RunConfig") -> None:
    """An option that another one makes meaningless is a mistake."""
    reward = config.reward
    all_others = [name for name in type(reward).model_fields if name != "functions"]
    of_models = [name for name in all_others if name.startswith("model_")] + ["trust_remote_code"]
    rules: list[tuple[bool, str, list[str]]] = [
        (not reward.functions, "there are no reward.functions", all_others),
        (not reward.models, "no model is among reward.functions", of_models),
        (len(reward.models) == len(reward.functions), "reward.functions are models alone", ["num_workers"]),
        (config.loss.alpha_reward == 0, "loss.alpha_reward = 0 only measures rewards", ["advantage"]),
    ]
    for applies, reason, names in rules:
        if applies:
            refuse_changed(reward, "reward", names, reason)
