"""What holds for an option by itself: its range and kind, its section's other names, its help."""

import pytest
from pydantic import ValidationError

from services.config import RunConfig
from tests.unit.services.config.commands import assert_refused

REFUSED = {
    "--loss.gamma 1.5": "loss.gamma ... less than or equal to 1 ... 1.5",
    "--loss.gamma -0.1": "loss.gamma ... greater than or equal to 0 ... -0.1",
    "--loss.gamma much": "loss.gamma ... number ... 'much'",
    "--loss.kd_temperature 0": "loss.kd_temperature ... greater than 0 ... '0'",
    "--loss.top_k 0": "loss.top_k ... greater than or equal to 1",
    "--loss.top_k 2.5": "loss.top_k ... integer ... 2.5",
    "--loss.advantage_clip -1": "loss.advantage_clip ... -1",
    "--loss.importance_cap 0": "loss.importance_cap ... greater than 0",
    "--loss.jsd_beta 1.3 --loss.single_step_divergence jsd": "loss.jsd_beta ... less than or equal to 1",
    "--loss.clip_low 1": "loss.clip_low ... less than 1",
    "--pipeline.updates_per_batch 0": "pipeline.updates_per_batch ... greater than or equal to 1",
    "--sampling.temperature 0": "sampling.temperature ... greater than 0",
    "--sampling.top_p 1.1": "sampling.top_p ... 1.1",
    "--sampling.top_k -1": "sampling.top_k ... -1",
    "--sampling.max_new_tokens 0": "sampling.max_new_tokens ... greater than or equal to 1",
    "--rollout.port 70000": "rollout.port ... 65535 ... 70000",
    "--rollout.kv_cache_gib 0": "rollout.kv_cache_gib ... greater than 0",
    "--rollout.gpu_memory_utilization 1.2": "rollout.gpu_memory_utilization ... 1.2",
    '--teacher_client.accept_different ["vocabulary"]': "teacher_client.accept_different ... 'eos' or 'chat_template'",
    "--pipeline.max_staleness 1": "pipeline.max_staleness ... less than or equal to 0",
    "--pipeline.max_quarantine_rate 1": "pipeline.max_quarantine_rate ... less than 1",
    "--optimizer.learning_rate 0": "optimizer.learning_rate ... greater than 0",
    "--optimizer.learning_rate inf": "optimizer.learning_rate ... finite number ... 'inf'",
    "--optimizer.weight_decay nan": "optimizer.weight_decay ... 'nan'",
    "--optimizer.beta2 1": "optimizer.beta2 ... less than 1",
    "--weight_sync.bucket_mib 0": "weight_sync.bucket_mib ... greater than or equal to 1",
    "--evaluation.kl_budget_mib 0": "evaluation.kl_budget_mib",
    "--seed -1": "seed ... -1",
    "--student.dtype fp32": "student.dtype ... 'bfloat16' ... 'fp32'",
    "--teacher.tokens_per_forward many": "teacher.tokens_per_forward ... integer ... 'many'",
    "--data.shuffle maybe": "data.shuffle ... boolean ... 'maybe'",
    '--output.trackers ["mlflow"]': "output.trackers ... 'wandb' ... 'mlflow'",
    "--output.dir=": "output.dir: String should have at least 1 character (got '') ... Folder of the run",
    "--rollout.host http://10.0.0.5": "rollout.host: 'http://10.0.0.5' must be a host alone",
    "--teacher.host=": "teacher.host: '' is no host ... 127.0.0.1",
    "--rollout_client.request_timeout_s 10": (
        "rollout_client.request_timeout_s ... greater than 10 ... says that it lives"
    ),
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_a_value_out_of_range_or_of_another_kind_is_refused(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(options, expected, capsys)


def test_configs_are_immutable() -> None:
    config = RunConfig()
    for section, name in ((config.loss, "gamma"), (config, "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


@pytest.mark.parametrize("section", [None, *(name for name in RunConfig.model_fields if name != "seed")])
def test_every_section_refuses_unknown_keys(section: str | None) -> None:
    options = {"bogus": 1} if section is None else {section: {"bogus": 1}}
    with pytest.raises(ValidationError, match=r"bogus\s+Extra inputs are not permitted"):
        RunConfig.model_validate(options)


def test_every_option_has_a_help_text() -> None:
    for section, field in RunConfig.model_fields.items():
        for name, option in getattr(field.annotation, "model_fields", {}).items():
            assert option.description, f"{section}.{name} has no docstring"
