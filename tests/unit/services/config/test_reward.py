"""Options of rewards that contradict each other, what is learned or how prompts are completed, or that would be ignored."""

import shlex
from typing import Any

import pytest

from services.config.reward import RewardConfig, split_function
from tests.unit.services.config.commands import COMPLETE, assert_reads, refused, resolved

FUNCTION = """--reward.functions '["m:f"]' --pipeline.samples_per_prompt 4"""
MODEL = """--reward.functions '["org/model"]' --pipeline.samples_per_prompt 4"""
TEACHERLESS = "--loss.rkl_advantage false --loss.single_step_decomposition false"

REFUSED = {
    """--reward.functions '["m:f"]'""": (
        "pipeline.samples_per_prompt = 1 with reward.advantage = group: ... sample several, or take raw"
    ),
    """--reward.functions '["m:f"]' --reward.advantage leave_one_out""": "reward.advantage = leave_one_out: ... take raw",
    f"{FUNCTION} --reward.weights '[1.0, 2.0]'": (
        "reward.weights = [1.0, 2.0] has 2 weights for the 1 of reward.functions; give as many"
    ),
    f"{FUNCTION} --reward.weights '[0]'": "reward.weights = [0.0] leaves loss.alpha_reward = 1.0 without effect",
    """--reward.functions '["m:f", "m:f"]'""": "reward.functions names 'm:f' twice",
    """--reward.functions '[" "]'""": "reward.functions[0] = ' ' names nothing",
    "--reward.timeout_s 5": "reward.timeout_s = 5.0 would be ignored: there are no reward.functions",
    "--reward.advantage raw": "reward.advantage = raw would be ignored: there are no reward.functions",
    f"{FUNCTION} --reward.model_dtype bfloat16": "reward.model_dtype = bfloat16 would be ignored: no model is among",
    f"{FUNCTION} --reward.trust_remote_code true": "reward.trust_remote_code = True would be ignored: no model",
    f"{MODEL} --reward.num_workers 4": "reward.num_workers = 4 would be ignored: reward.functions are models alone",
    f"{FUNCTION} --loss.alpha_reward 0 --reward.advantage raw": "reward.advantage = raw would be ignored ... only measures",
    f"{FUNCTION} --loss.alpha_reward 0 {TEACHERLESS}": "leave nothing to learn",
    TEACHERLESS: "leave nothing to learn; ... or give reward.functions",
    f"{FUNCTION} --reward.weights '[1e999]'": "reward.weights",
    f"{FUNCTION} --reward.num_workers 0": "reward.num_workers",
    f"{FUNCTION} --reward.timeout_s 0": "reward.timeout_s",
    # a policy gradient on rewards needs the policy that sampled, as one on the teacher's does
    f"{FUNCTION} {TEACHERLESS} --loss.kd_temperature 2": "loss.kd_temperature = 2.0 ... make them equal\n",
    f"{FUNCTION} --loss.importance_sampling none --sampling.top_k 5 --loss.single_step_estimator truncated": (
        "top_k = 5: nothing corrects"
    ),
    "--loss.top_entropy_quantile 0.2": "loss.top_entropy_quantile = 0.2 would be ignored ... silent",
    "--loss.top_entropy_quantile 1.5 --loss.gamma 1": "loss.top_entropy_quantile",
    "--loss.alpha_entropy -1": "loss.alpha_entropy",
    "--loss.alpha_reference_kl -1": "loss.alpha_reference_kl",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_rewards_that_contradict_the_run_are_refused(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_reads(refused(capsys, "up", *COMPLETE, *shlex.split(options), "--dry-run"), expected)


@pytest.mark.parametrize(
    "options",
    [
        FUNCTION,
        MODEL,
        f"{FUNCTION} {TEACHERLESS}",
        f"{FUNCTION} {TEACHERLESS} --loss.advantage_clip 1 --loss.importance_cap 3 --loss.alpha_reward 2",
        f"{FUNCTION} {TEACHERLESS} --pipeline.updates_per_batch 2 --loss.clip_low 0.1 --loss.top_entropy_quantile 0.2",
        f"{FUNCTION} --loss.alpha_reward 0",
        """--reward.functions '["m:f"]' --loss.alpha_reward 0""",
        """--reward.functions '["m:f"]' --reward.advantage raw""",
        """--reward.functions '["m:f", "org/model"]' --reward.weights '[1, -2]' --pipeline.samples_per_prompt 2""",
        "--loss.alpha_entropy 0.01 --loss.alpha_reference_kl 0.04",
        "--loss.gamma 1 --loss.top_entropy_quantile 0",
    ],
)
def test_rewards_alone_beside_the_teacher_or_only_measured_are_taken(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolved(capsys, "up", *COMPLETE, *shlex.split(options))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m:f", ("m", "f")),
        ("a.b.c:Class.method", ("a.b.c", "Class.method")),
        ("./dir with space/rewards.py:f", ("./dir with space/rewards.py", "f")),
        ("/a:b/rewards.py:f", ("/a:b/rewards.py", "f")),
        ("belöhnung:größe", ("belöhnung", "größe")),
        ("org/model", None),
        ("./folder", None),
        ("rewards.f", None),
        ("m:", None),
        (":f", None),
        ("a/b:f", None),
        ("m:f()", None),
    ],
)
def test_a_function_is_told_from_a_model_by_its_colon(text: str, expected: tuple[str, str] | None) -> None:
    assert split_function(text) == expected


def test_metrics_call_a_function_by_its_last_part_unless_two_have_it() -> None:
    functions: list[Any] = ["m:a", "n:a", "n:b", "org/model", "./models/other/", "/x/y.py:c"]
    assert RewardConfig(functions=functions).names == ["m:a", "n:a", "b", "model", "other", "c"]
