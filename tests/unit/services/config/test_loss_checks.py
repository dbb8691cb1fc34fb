"""Options of the loss that contradict each other or what is sampled, or that would be ignored."""

import pytest

from tests.unit.services.config.commands import assert_refused, assert_taken

REFUSED = {
    "--loss.icepop_low 6": "loss.icepop_low = 6 ... below loss.icepop_high = 5",
    "--loss.rkl_advantage false --loss.single_step_decomposition false": (
        "loss.rkl_advantage ... loss.single_step_decomposition ... set one of them to true"
    ),
    "--loss.kd_temperature 2": "loss.kd_temperature = 2 ... sampling.temperature = 1 ... make them equal ... truncated",
    # hybrid is off here, and truncated would not help
    "--loss.single_step_decomposition false --loss.kd_temperature 2": (
        "loss.kd_temperature = 2 ... sampled; make them equal\n"
    ),
    "--loss.advantage_clip 1": "loss.advantage_clip = 1.0 would be ignored ... silent",
    "--loss.alpha_rkl 2": "loss.alpha_rkl = 2.0 would be ignored ... loss.gamma = 0",
    "--loss.length_normalization false": "loss.length_normalization = False ... looks at one token",
    "--pipeline.updates_per_batch 2 --loss.clip_low 0.1": "loss.clip_low = 0.1 ... silent",
    "--loss.support student_topk --sampling.top_p 0.9": (
        "loss.support = student_topk ... sampling.top_p = 0.9 ... use teacher_topk"
    ),
    "--loss.support student_topk --sampling.top_k 5": "loss.top_k = 32 ... top_k = 5",
    "--loss.kd_temperature 2 --sampling.temperature 2 --sampling.top_p 0.9": (
        "loss.kd_temperature = 2 ... sampling.top_p ... 0.9"
    ),
    # hybrid is an expectation over the sampled token too, so switching the policy gradient off is not enough
    "--loss.kd_temperature 2 --loss.rkl_advantage false": "sampling.temperature = 1 ... truncated",
    "--sampling.temperature 0.7 --loss.importance_sampling none": "0.7 ... nothing corrects ... use tis",
    "--sampling.top_k 5 --loss.importance_sampling none": "top_k = 5 ... nothing corrects",
    "--loss.alpha_rkl 0 --loss.alpha_single_step 0": "alpha_rkl = 0 ... leave nothing to learn",
    "--loss.single_step_decomposition false --loss.reward_to_go exclusive": (
        "loss.gamma = 0 ... nothing to learn ... use inclusive"
    ),
    "--loss.rkl_advantage false --loss.gamma 1": "loss.gamma = 1.0 would be ignored ... term is off",
    "--loss.alpha_rkl 0 --loss.advantage_clip 1": "loss.advantage_clip = 1.0 would be ignored",
    "--loss.single_step_decomposition false --loss.single_step_estimator truncated": (
        "loss.single_step_estimator = truncated would"
    ),
    "--loss.single_step_decomposition false --loss.support student_topk": (
        "loss.support = student_topk would be ignored"
    ),
    "--loss.single_step_estimator full --loss.top_k 5": "loss.top_k = 5 would be ignored ... every token",
    "--loss.rkl_advantage false --loss.alpha_rkl 2": "loss.alpha_rkl = 2.0 ... rkl_advantage = False",
    "--loss.single_step_decomposition false --loss.alpha_single_step 2": (
        "loss.alpha_single_step = 2.0 would be ignored"
    ),
    "--loss.jsd_beta 0.3": "loss.jsd_beta = 0.3 would be ignored ... is not jsd",
    "--loss.importance_sampling none --loss.importance_cap 3": "importance_cap = 3.0 ... is not tis",
    "--loss.icepop_high 3": "loss.icepop_high = 3.0 would be ignored ... is not icepop",
    "--loss.rkl_advantage false --loss.single_step_estimator truncated --loss.importance_cap 3": (
        "loss.importance_cap = 3.0 would be ignored ... no term looks at the sampled token"
    ),
    "--loss.clip_low 0.1 --loss.gamma 0.5": "clip_low = 0.1 would be ignored ... updates_per_batch = 1",
    "--loss.alpha_reward 2": "loss.alpha_reward = 2.0 would be ignored ... no reward.functions",
    "--loss.alpha_lm 0.5": "loss.alpha_lm = 0.5 ... data.lm_path = None ... give both or neither",
    "--data.lm_path t.jsonl": "loss.alpha_lm = 0.0 ... data.lm_path = 't.jsonl'",
    "--data.max_text_tokens 64": "data.max_text_tokens = 64 would be ignored ... no data.lm_path",
    "--pipeline.texts_per_step 4": "pipeline.texts_per_step = 4 would be ignored",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_a_loss_that_contradicts_itself_is_refused(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(options, expected, capsys)


@pytest.mark.parametrize(
    "options",
    [
        "",  # gamma = 0 beside the single-step term: the silent advantage is documented, not refused
        # metrics and the size of the teacher's answers still follow top_k
        "--loss.single_step_decomposition false --loss.top_k 1",
        "--loss.single_step_divergence jsd --loss.jsd_beta 0",
        "--loss.kd_temperature 2 --sampling.temperature 2",
        "--loss.kd_temperature 2 --loss.rkl_advantage false --loss.single_step_estimator truncated",
        "--sampling.temperature 0.7",  # tis corrects for it
        "--pipeline.updates_per_batch 2 --loss.clip_low 0.1 --loss.gamma 0.5",
        # truncated beside a silent advantage: nothing looks at the sampled token
        "--loss.kd_temperature 2 --loss.single_step_estimator truncated",
        "--sampling.top_k 5 --loss.single_step_estimator truncated --sampling.temperature 0.7",
        "--loss.support student_topk --sampling.top_k 40",
        "--loss.alpha_lm 0.5 --data.lm_path t.jsonl",
    ],
)
def test_combinations_that_mean_something_are_taken(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_taken(options, capsys)
