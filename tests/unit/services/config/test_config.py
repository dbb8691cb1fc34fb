"""A wrong config is refused before anything is loaded, with key, value, constraint and fix."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from services.cli import main
from services.config import (
    RunConfig,
    TeacherConfig,
    check_output_dir,
)
from services.config.dict_options import names_of_tables
from services.errors import ConfigError

RUNS = Path(__file__).parents[4] / "deploy" / "runs"
COMPLETE = ["--student.model", "m", "--teacher.model", "t", "--data.path", "d.jsonl", "--pipeline.steps", "1"]

NO_SINGLE_STEP = ["--loss.single_step_decomposition", "false"]
MATHS = '{"maths": ["http://a:1"]}'

# (arguments after a complete command line, what the one line on stderr must contain)
BAD_OPTIONS = [
    (["--loss.gamma", "1.5"], ["loss.gamma", "1.5", "less than or equal to 1"]),
    (["--loss.gamma", "-0.1"], ["loss.gamma", "-0.1", "greater than or equal to 0"]),
    (["--loss.gamma", "much"], ["loss.gamma", "'much'", "number"]),
    (["--loss.kd_temperature", "0"], ["loss.kd_temperature", "'0'", "greater than 0"]),
    (["--loss.top_k", "0"], ["loss.top_k", "greater than or equal to 1"]),
    (["--loss.top_k", "2.5"], ["loss.top_k", "2.5", "integer"]),
    (["--loss.advantage_clip", "-1"], ["loss.advantage_clip", "-1"]),
    (["--loss.importance_cap", "0"], ["loss.importance_cap", "greater than 0"]),
    (["--loss.icepop_low", "6"], ["loss.icepop_low = 6", "below loss.icepop_high = 5"]),
    (
        ["--loss.rkl_advantage", "false", "--loss.single_step_decomposition", "false"],
        ["loss.rkl_advantage", "loss.single_step_decomposition", "set one of them to true"],
    ),
    (
        ["--loss.kd_temperature", "2"],
        ["loss.kd_temperature = 2", "sampling.temperature = 1", "make them equal", "truncated"],
    ),
    # hybrid is off here, and truncated would not help
    ([*NO_SINGLE_STEP, "--loss.kd_temperature", "2"], ["loss.kd_temperature = 2", "sampled; make them equal\n"]),
    (["--loss.advantage_clip", "1"], ["loss.advantage_clip = 1.0 would be ignored", "silent"]),
    (["--loss.alpha_rkl", "2"], ["loss.alpha_rkl = 2.0 would be ignored", "loss.gamma = 0"]),
    (["--loss.length_normalization", "false"], ["loss.length_normalization = False", "looks at one token"]),
    (["--pipeline.updates_per_batch", "2", "--loss.clip_low", "0.1"], ["loss.clip_low = 0.1", "silent"]),
    (
        ["--loss.support", "student_topk", "--sampling.top_p", "0.9"],
        ["loss.support = student_topk", "sampling.top_p = 0.9", "use teacher_topk"],
    ),
    (["--loss.support", "student_topk", "--sampling.top_k", "5"], ["loss.top_k = 32", "top_k = 5"]),
    (
        ["--loss.kd_temperature", "2", "--sampling.temperature", "2", "--sampling.top_p", "0.9"],
        ["loss.kd_temperature = 2", "sampling.top_p", "0.9"],
    ),
    # hybrid is an expectation over the sampled token too, so switching the policy gradient off is not enough
    (["--loss.kd_temperature", "2", "--loss.rkl_advantage", "false"], ["sampling.temperature = 1", "truncated"]),
    (["--sampling.temperature", "0.7", "--loss.importance_sampling", "none"], ["nothing corrects", "0.7", "use tis"]),
    (["--sampling.top_k", "5", "--loss.importance_sampling", "none"], ["nothing corrects", "top_k = 5"]),
    (["--loss.alpha_rkl", "0", "--loss.alpha_single_step", "0"], ["leave nothing to learn", "alpha_rkl = 0"]),
    ([*NO_SINGLE_STEP, "--loss.reward_to_go", "exclusive"], ["nothing to learn", "loss.gamma = 0", "use inclusive"]),
    (["--loss.rkl_advantage", "false", "--loss.gamma", "1"], ["loss.gamma = 1.0 would be ignored", "term is off"]),
    (["--loss.alpha_rkl", "0", "--loss.advantage_clip", "1"], ["loss.advantage_clip = 1.0 would be ignored"]),
    ([*NO_SINGLE_STEP, "--loss.single_step_estimator", "truncated"], ["loss.single_step_estimator = truncated would"]),
    ([*NO_SINGLE_STEP, "--loss.support", "student_topk"], ["loss.support = student_topk would be ignored"]),
    (["--loss.single_step_estimator", "full", "--loss.top_k", "5"], ["loss.top_k = 5 would be ignored", "every token"]),
    (["--loss.rkl_advantage", "false", "--loss.alpha_rkl", "2"], ["loss.alpha_rkl = 2.0", "rkl_advantage = False"]),
    ([*NO_SINGLE_STEP, "--loss.alpha_single_step", "2"], ["loss.alpha_single_step = 2.0 would be ignored"]),
    (["--loss.jsd_beta", "0.3"], ["loss.jsd_beta = 0.3 would be ignored", "is not jsd"]),
    (["--loss.jsd_beta", "1.3", "--loss.single_step_divergence", "jsd"], ["loss.jsd_beta", "less than or equal to 1"]),
    (["--loss.importance_sampling", "none", "--loss.importance_cap", "3"], ["importance_cap = 3.0", "is not tis"]),
    (["--loss.icepop_high", "3"], ["loss.icepop_high = 3.0 would be ignored", "is not icepop"]),
    (
        [*["--loss.rkl_advantage", "false", "--loss.single_step_estimator", "truncated"], "--loss.importance_cap", "3"],
        ["loss.importance_cap = 3.0 would be ignored", "no term looks at the sampled token"],
    ),
    (["--loss.clip_low", "0.1", "--loss.gamma", "0.5"], ["clip_low = 0.1 would be ignored", "updates_per_batch = 1"]),
    (["--loss.clip_low", "1"], ["loss.clip_low", "less than 1"]),
    (["--loss.alpha_reward", "2"], ["loss.alpha_reward = 2.0 would be ignored", "no rewards besides the teacher"]),
    (["--loss.alpha_lm", "0.5"], ["loss.alpha_lm = 0.5", "data.lm_path = None", "give both or neither"]),
    (["--data.lm_path", "t.jsonl"], ["loss.alpha_lm = 0.0", "data.lm_path = 't.jsonl'"]),
    (["--data.max_text_tokens", "64"], ["data.max_text_tokens = 64 would be ignored", "no data.lm_path"]),
    (["--pipeline.texts_per_step", "4"], ["pipeline.texts_per_step = 4 would be ignored"]),
    (["--pipeline.updates_per_batch", "0"], ["pipeline.updates_per_batch", "greater than or equal to 1"]),
    (["--loss.support", "student_topk", "--loss.top_k", "99"], ["loss.top_k = 99", "rollout.max_logprobs = 64"]),
    (["--sampling.temperature", "0"], ["sampling.temperature", "greater than 0"]),
    (["--sampling.top_p", "1.1"], ["sampling.top_p", "1.1"]),
    (["--sampling.top_k", "-1"], ["sampling.top_k", "-1"]),
    (["--sampling.max_new_tokens", "0"], ["sampling.max_new_tokens", "greater than or equal to 1"]),
    (
        ["--rollout.max_model_len", "64", "--sampling.max_new_tokens", "64"],
        ["max_new_tokens = 64", "rollout.max_model_len = 64", "lower the one or raise the other"],
    ),
    (["--rollout.port", "70000"], ["rollout.port", "70000", "65535"]),
    (["--rollout.port", "8101"], ["rollout.port and teacher.port are both 8101", "different ports"]),
    (["--rollout.cuda_devices", "first"], ["rollout.cuda_devices = 'first'", "no GPU", "nvidia-smi -L"]),
    (["--teacher.cuda_devices", "0,GPU-12"], ["teacher.cuda_devices = '0,GPU-12'", "mixes numbers and UUIDs"]),
    (
        ["--rollout.cuda_devices", "0", "--rollout.tensor_parallel_size", "2"],
        ["rollout.tensor_parallel_size = 2", "rollout.cuda_devices = '0'", "name more, or lower it"],
    ),
    (
        ["--rollout.cuda_devices", "0,1", "--rollout.tensor_parallel_size", "2", "--rollout.data_parallel_size", "3"],
        ["tensor_parallel_size = 2 and rollout.data_parallel_size = 3 need 6 GPUs", "name more, or lower it"],
    ),
    (
        ["--teacher.engine_args", '{"kv_cache_memory_bytes": 1}'],
        ["teacher.engine_args.kv_cache_memory_bytes", "teacher.kv_cache_gib"],
    ),
    (
        ["--student.dtype", "bfloat16", "--student.compute_dtype", "float32"],
        ["student.compute_dtype = float32", "student.dtype = bfloat16"],
    ),
    (["--rollout.kv_cache_gib", "0"], ["rollout.kv_cache_gib", "greater than 0"]),
    (["--rollout.gpu_memory_utilization", "1.2"], ["rollout.gpu_memory_utilization", "1.2"]),
    (["--teacher.max_top_k", "8"], ["loss.top_k = 32", "teacher.max_top_k = 8"]),
    (
        ["--teacher_client.accept_different", '["vocabulary"]'],
        ["teacher_client.accept_different", "'eos' or 'chat_template'"],
    ),
    (
        ["--teacher_client.protocol", "vllm"],
        ["teacher_client.protocol = vllm without teacher_client.urls", "give their URLs"],
    ),
    (
        ["--teacher_client.named", '{"maths": []}'],
        ["teacher_client.named.maths = [] has no server", "leave the name out"],
    ),
    (["--teacher_client.named", '["http://a:1"]'], ["teacher_client.named", "JSON"]),
    (["--teacher_client.named", '{"maths": "http://a:1"}'], ["teacher_client.named.maths", "list", "'http://a:1'"]),
    (
        ["--teacher_client.named", '{"maths": ["http://a:1", "http://b:2/"], "code": ["http://c:3", "http://b:2"]}'],
        ["teacher_client.named.code and teacher_client.named.maths both name http://b:2", "give each its own server"],
    ),
    (
        ["--teacher_client.named", MATHS, "--teacher_client.urls", '["http://a:1/"]'],
        ["teacher_client.named.maths and teacher_client.urls both name http://a:1"],
    ),
    (
        ["--data.teacher_column", "tutor"],
        ["data.teacher_column = tutor would be ignored", "teacher_client.named names no"],
    ),
    (
        ["--teacher_client.named", MATHS, "--data.teacher_column", "answer"],
        ["data.teacher_column = answer is also the column of data.answer_column", "a column of its own"],
    ),
    (
        ["--teacher_client.named", MATHS, "--data.prompt_column", "teacher"],
        ["teacher_column = teacher", "data.prompt_column"],
    ),
    (
        ["--teacher_client.named", MATHS, "--data.teacher_column", "messages"],
        ["teacher_column = messages", "data.messages_column"],
    ),
    (["--data.answer_column", "prompt"], ["data.answer_column = prompt is also the column of data.prompt_column"]),
    (["--data.messages_column", "prompt"], ["data.messages_column = prompt", "data.prompt_column"]),
    (["--data.prompt_column", "tools"], ["data.prompt_column = tools is also the column of a conversation's tools"]),
    (["--data.answer_column", "tools"], ["data.answer_column = tools", "a column of its own"]),
    (
        ["--data.last_assistant_turn", "drop", "--data.chat_template_kwargs", '{"continue_final_message": true}'],
        ["data.last_assistant_turn = drop would be ignored", "continue_final_message"],
    ),
    (["--teacher.tensor_parallel_size", "2"], ["tensor_parallel_size = 2 would be ignored", "engine = transformers"]),
    (["--teacher.engine_args", '{"seed": 1}'], ["teacher.engine_args", "would be ignored", "engine = transformers"]),
    (
        ["--teacher.engine", "vllm", "--teacher.device", "cpu"],
        ["teacher.device = cpu would be", "teacher.engine = vllm"],
    ),
    (
        ["--teacher.engine", "vllm", "--teacher.engine_args", '{"max_logprobs": 5}'],
        ["teacher.engine_args.max_logprobs = 5 is refused", "teacher.max_top_k says that"],
    ),
    (
        ["--teacher.engine", "vllm", "--teacher.engine_args", '{"logprobs_mode": "raw_logits"}'],
        ["engine_args.logprobs_mode = 'raw_logits' is refused", "leave it out"],
    ),
    (["--pipeline.epochs", "2"], ["pipeline.steps = 1", "pipeline.epochs = 2", "give one of them"]),
    (["--pipeline.max_staleness", "1"], ["pipeline.max_staleness", "less than or equal to 0"]),
    (["--pipeline.max_quarantine_rate", "1"], ["pipeline.max_quarantine_rate", "less than 1"]),
    (["--optimizer.warmup_steps", "5"], ["optimizer.warmup_steps = 5", "pipeline.steps = 1", "fewer steps"]),
    (["--optimizer.learning_rate", "0"], ["optimizer.learning_rate", "greater than 0"]),
    (["--optimizer.beta2", "1"], ["optimizer.beta2", "less than 1"]),
    (["--data.chat_template_kwargs", "[1]"], ["data.chat_template_kwargs", "JSON"]),
    (["--weight_sync.bucket_mib", "0"], ["weight_sync.bucket_mib", "greater than or equal to 1"]),
    (["--evaluation.kl_budget_mib", "0"], ["evaluation.kl_budget_mib"]),
    (["--seed", "-1"], ["seed", "-1"]),
    (["--optimizer.learning_rate", "inf"], ["optimizer.learning_rate", "'inf'", "finite number"]),
    (["--optimizer.weight_decay", "nan"], ["optimizer.weight_decay", "'nan'"]),
    (["--optimizer.max_grad_norm", "inf"], ["optimizer.max_grad_norm", "'inf'", "finite number"]),
    (
        ["--evaluation.max_new_tokens", "90", "--rollout.max_model_len", "90", "--sampling.max_new_tokens", "9"],
        ["= 90"],
    ),
    (["--student.dtype", "fp32"], ["student.dtype", "'fp32'", "'bfloat16'"]),
    (["--teacher.tokens_per_forward", "many"], ["teacher.tokens_per_forward", "'many'", "integer"]),
    (["--data.shuffle", "maybe"], ["data.shuffle", "'maybe'", "boolean"]),
    (["--loss", "3"], ["loss", "3", "dictionary"]),
    (["--output.trackers", '["mlflow"]'], ["output.trackers", "'mlflow'", "'wandb'"]),
    (["--student.dtype", "float16"], ["student.dtype = float16", "underflow", "use float32"]),
    (
        ["--optimizer.schedule", "constant", "--optimizer.min_lr_ratio", "0.1"],
        ["optimizer.min_lr_ratio = 0.1 would be ignored", "optimizer.schedule = constant"],
    ),
    (["--teacher_client.urls", '["10.0.0.5:8101"]'], ["teacher_client.urls: '10.0.0.5:8101' must begin with http://"]),
    (["--rollout_client.urls", '["https://a", "b:1"]'], ["rollout_client.urls: 'b:1' must begin with http://"]),
    (["--teacher_client.named", 'maths=["a:1"]'], ["teacher_client.named.maths: 'a:1' must begin with http://"]),
    (
        ["--rollout_client.urls", '["http://a:1/", "http://a:1"]'],
        ["rollout_client.urls names http://a:1 twice", "once"],
    ),
    (["--rollout_client.urls", '["http://a", "HTTP://A:80/"]'], ["rollout_client.urls names http://a twice", "once"]),
    (
        ["--rollout_client.urls", '["http://a:1/v1"]'],
        ["rollout_client.urls: 'http://a:1/v1' has the path '/v1'", "leave it out"],
    ),
    (["--rollout_client.urls", '["http://a:1/students"]'], ["has the path '/students'", "leave it out"]),
    (
        ["--rollout_client.urls", "http://me:s3cret@a:1"],
        ["rollout_client.urls: 'http://...@a:1' has a user or password"],
    ),
    (["--teacher.url", "http://me:s3cret@a:1"], ["--teacher.url is not an option", "--teacher_client.urls"]),
    (
        ["--teacher_client.named", '{"maths": "http://me:s3cret@a:1"}'],
        ["teacher_client.named.maths", "(got 'http://...@a:1')"],
    ),
    (
        ["--teacher_client.named", '{"maths": ["http://a:99999"]}'],
        ["teacher_client.named.maths: 'http://a:99999' has the port '99999'"],
    ),
    (
        ["--rollout_client.urls", '["http://[0::1]:1"]', "--teacher_client.urls", '["http://[::1]:1"]'],
        ["teacher_client.urls and rollout_client.urls both name http://[::1]:1", "give each its own server"],
    ),
    (["--output.dir", ""], ["output.dir: String should have at least 1 character (got '')", "Folder of the run"]),
    (["--rollout.host", "http://10.0.0.5"], ["rollout.host: 'http://10.0.0.5' must be a host alone"]),
    (["--teacher.host", ""], ["teacher.host: '' is no host", "127.0.0.1"]),
    (["--rollout.host", "fe80::1%eth0"], ["rollout.host = fe80::1%eth0", "vLLM"]),
    (["--weight_sync.master_address", "::"], ["weight_sync.master_address = ::", "give one of this machine"]),
    (
        ["--weight_sync.master_address", "[::1]", "--weight_sync.backend", "nccl"],
        ["weight_sync.master_address = ::1", "weight_sync.backend = gloo"],
    ),
    (
        ["--student.model_init_kwargs", '{"dtype": "bfloat16"}'],
        ["model_init_kwargs.dtype = 'bfloat16'", "student.dtype"],
    ),
    (
        ["--student.model_init_kwargs", 'torch_dtype="auto"'],
        ["model_init_kwargs.torch_dtype = 'auto'", "student.dtype"],
    ),
    (
        ["--teacher.teacher_model_init_kwargs", 'dtype="bfloat16"'],
        ["teacher.teacher_model_init_kwargs.dtype = 'bfloat16' is refused", "teacher.dtype says that"],
    ),
    (
        ["--teacher.teacher_model_init_kwargs", "trust_remote_code=true"],
        ["trust_remote_code = True is refused", "teacher.trust_remote_code says that"],
    ),
    (["--student.model_init_kwargs", "use_safetensors=false"], ["use_safetensors = False", "leave it out"]),
    (["--student.model_init_kwargs", 'revision="v1"'], ["revision = 'v1' is refused", "name its folder"]),
    (["--student.model_init_kwargs", 'device_map="auto"'], ["device_map = 'auto' is refused", "student.cuda_devices"]),
    (
        ["--teacher.teacher_model_init_kwargs", 'device_map="auto"'],
        ["device_map = 'auto' is refused", "teacher.device", "teacher.engine = vllm", "teacher.tensor_parallel_size"],
    ),
    (
        ["--rollout.float32_head", "true", "--rollout.engine_args", '["--quantization=fp8"]'],
        ["rollout.float32_head = True with --quantization=fp8 in rollout.engine_args", "leave one of the two out"],
    ),
    (
        ["--teacher.engine", "vllm", "--teacher.float32_head", "true", "--teacher.engine_args", 'quantization="fp8"'],
        ["teacher.float32_head = True with quantization in teacher.engine_args", "leave one of the two out"],
    ),
    (["--teacher.float32_head", "false"], ["teacher.float32_head = False would be ignored", "engine = transformers"]),
    (["--rollout.engine_args", '["--dtype", "half"]'], ["rollout.engine_args: --dtype is refused", "rollout.dtype"]),
    (["--rollout.engine_args", '["--max_model_len=9"]'], ["--max_model_len is refused", "rollout.max_model_len"]),
    (["--rollout.engine_args", '["--max-model", "9"]'], ["--max-model is refused", "rollout.max_model_len"]),
    (["--rollout.engine_args", '["-tp=2"]'], ["-tp is refused", "rollout.tensor_parallel_size says that"]),
    (["--rollout.engine_args", '["-dp", "2"]'], ["-dp is refused", "rollout.data_parallel_size says that"]),
    (["--rollout.engine_args", '["-asc=2"]'], ["-asc is refused", "its boot id tells a restart", "several servers"]),
    (
        ["--rollout_client.request_timeout_s", "10"],
        ["rollout_client.request_timeout_s", "greater than 10", "says that it lives"],
    ),
    (["--rollout.engine_args", '["--no-trust-remote-code"]'], ["refused", "student.trust_remote_code says that"]),
    (["--data.chat_template_kwargs", "enable_thinking=no"], ["data.chat_template_kwargs.enable_thinking = 'no' is no"]),
    (["--data.chat_template_kwargs", "style=short"], ["'style=\"short\"'", "a text in quotes"]),
    (["--data.chat_template_kwargs", "x=NaN"], ["data.chat_template_kwargs.x = 'NaN' is no JSON"]),
    (["--data.chat_template_kwargs", "x=1 2"], ["data.chat_template_kwargs.x", "is no JSON"]),
    (["--data.chat_template_kwargs", "x="], ["data.chat_template_kwargs.x", "is no JSON"]),
    (["--data.chat_template_kwargs", "thinking"], ["data.chat_template_kwargs takes a JSON object or KEY=VALUE"]),
    (["--data.chat_template_kwargs", '{"a": 1'], ["data.chat_template_kwargs is no JSON object"]),
    (["--data.chat_template_kwargs", "a=1,a=2"], ["data.chat_template_kwargs.a is given twice"]),
    (["--data.chat_template_kwargs", '{"a": 1, "a": 2}'], ["data.chat_template_kwargs.a is given twice"]),
    (["--data.chat_template_kwargs", 'a="false"'], ["a = 'false' is a text", "write false without quotes"]),
    (["--data.chat_template_kwargs", '{"a": {"b": ["None"]}}'], ["chat_template_kwargs.a.b.0 = 'None'", "write null"]),
    (["--data.chat_template_kwargs", "tokenize=true"], ["chat_template_kwargs.tokenize = True is refused"]),
    (["--data.chat_template_kwargs", "add_generation_prompt=false"], ["add_generation_prompt = False is refused"]),
    (["--loss.top_k"], ["--loss.top_k", "expected one argument", "distillserve up --help"]),
    (["--loss.gama", "0.5"], ["--loss.gama is not an option", "did you mean --loss.gamma?"]),
    (["--los.gamma=0.5"], ["--los.gamma=0.5 is not an option", "did you mean --loss.gamma?"]),
    (["run.toml", "left-over"], ["'left-over'", "too many"]),
]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command line prints; exit code 2."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv))
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS, ids=[" ".join(o) for o, _ in BAD_OPTIONS])
def test_a_bad_option_is_refused_in_one_line(
    options: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "up", *COMPLETE, *options, "--dry-run")
    assert line.startswith("distillserve: ") and line.count("\n") == 1
    for text in expected:
        assert text in line


SECRET = "hf_abcdefgh"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student.model_init_kwargs", f'token="{SECRET}"'], "student.model_init_kwargs.token is refused"),
        (["--student.model_init_kwargs", f"token={SECRET}"], "student.model_init_kwargs.token is no JSON"),
        (["--student.model_init_kwargs", f'{{"use_auth_token": "{SECRET}"}}'], "use_auth_token is refused"),
        (["--teacher.teacher_model_init_kwargs", f'token="{SECRET}"'], "teacher_model_init_kwargs.token is refused"),
        (["--teacher.engine_args", f'hf_token="{SECRET}"'], "teacher.engine_args.hf_token is refused"),
        (["--teacher.engine", "vllm", "--teacher.engine_args", f'hf_token="{SECRET}"'], "hf_token is refused"),
        (["--teacher.engine_args", f'proxy="{SECRET}"'], "teacher.engine_args = ['proxy'] would be ignored"),
        (["--rollout.engine_args", f'["--api-key", "{SECRET}"]'], "rollout.engine_args: --api-key is refused"),
        (["--rollout.engine_args", f'["--api_key={SECRET}"]'], "set DISTILLSERVE_ROLLOUT_KEY in the environment"),
        (["--rollout.engine_args", f'["--hf-token={SECRET}"]'], "set HF_TOKEN in the environment"),
    ],
)
def test_a_secret_is_refused_and_not_shown(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "up", *COMPLETE, *options, "--dry-run")
    assert expected in line and SECRET not in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            f'[teacher]\nengine_args = \'{{"hf_token": "{SECRET}"}}\'',
            "teacher.engine_args: Input should be a valid dict",
        ),
        (
            f'[rollout]\nengine_args = "--api-key {SECRET}"',
            "rollout.engine_args: Input should be a valid list (got a str)",
        ),
        (
            f'[rollout]\nengine_args = [["--api-key", "{SECRET}"]]',
            "rollout.engine_args.0: Input should be a valid string",
        ),
        (
            f"[student]\nmodel_init_kwargs = ['token={SECRET}']",
            "student.model_init_kwargs: Input should be a valid dict",
        ),
    ],
)
def test_a_secret_in_a_run_file_is_not_shown_where_it_is_of_the_wrong_kind(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(content)
    line = refused(capsys, "up", str(run_file), *COMPLETE, "--dry-run")
    assert expected in line and SECRET not in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["enable_thinking=false"], {"enable_thinking": False}),
        (["a=1", 'b="x,y=z"', "c=null"], {"a": 1, "b": "x,y=z", "c": None}),
        (['a=[1, {"b": "]"}], "c" = 2.5 ,d={"e": {}}'], {"a": [1, {"b": "]"}], "c": 2.5, "d": {"e": {}}}),
        (['{"a": "x\\\\", "b": {"c": "é"}}', "d=true"], {"a": "x\\", "b": {"c": "é"}, "d": True}),
        (['a="False alarm"'], {"a": "False alarm"}),
        (["{}"], {}),
    ],
)
def test_tables_on_the_command_line_hold_json(
    given: list[str], expected: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for one in given for text in ("--data.chat_template_kwargs", one)]
    with pytest.raises(SystemExit):
        main(["train", *options, "--dry-run"])
    found = json.loads(capsys.readouterr().out)["data"]["chat_template_kwargs"]
    assert found == expected and [type(v) for v in found.values()] == [type(v) for v in expected.values()]


def test_every_table_holds_json(capsys: pytest.CaptureFixture[str]) -> None:
    tables = names_of_tables(RunConfig)
    assert tables == {
        "student.model_init_kwargs",
        "teacher_client.named",
        "teacher.teacher_model_init_kwargs",
        "teacher.engine_args",
        "data.chat_template_kwargs",
    }
    for name in tables - {"teacher_client.named"}:
        engine = ["--teacher.engine", "vllm"] if name == "teacher.engine_args" else []
        with pytest.raises(SystemExit):
            main(["up", *engine, f"--{name}", "output_attentions=false,n=2", "--dry-run"])
        section, option = name.split(".")
        assert json.loads(capsys.readouterr().out)[section][option] == {"output_attentions": False, "n": 2}


def test_a_text_for_true_or_false_is_refused_in_a_run_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[data.chat_template_kwargs]\nenable_thinking = 'False'\n")
    assert "data.chat_template_kwargs.enable_thinking = 'False' is a text" in refused(capsys, "train", str(run_file))


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer.schedule", "linear", "--optimizer.min_lr_ratio", "0.1"],
        ["--evaluation.every_steps", "5", "--data.eval_path", "e.jsonl"],
        ["--student.dtype", "bfloat16"],
        ["--rollout.dtype", "float16", "--teacher.dtype", "float16"],
        ["--student.model_init_kwargs", 'attn_implementation="eager"'],
        [
            "--rollout.engine_args",
            '["--enable-prefix-caching", "--enforce-eager", "--compilation-config", "{}", "-q=fp8"]',
        ],
        ["--teacher.engine", "vllm", "--teacher.engine_args", "pipeline_parallel_size=2"],
        [],  # gamma = 0 beside the single-step term: the silent advantage is documented, not refused
        [*NO_SINGLE_STEP, "--loss.top_k", "1"],  # metrics and the size of the teacher's answers still follow top_k
        ["--loss.single_step_divergence", "jsd", "--loss.jsd_beta", "0"],
        ["--loss.kd_temperature", "2", "--sampling.temperature", "2"],
        ["--loss.kd_temperature", "2", *["--loss.rkl_advantage", "false", "--loss.single_step_estimator", "truncated"]],
        ["--sampling.temperature", "0.7"],  # tis corrects for it
        ["--pipeline.updates_per_batch", "2", "--loss.clip_low", "0.1", "--loss.gamma", "0.5"],
        # truncated beside a silent advantage: nothing looks at the sampled token
        ["--loss.kd_temperature", "2", "--loss.single_step_estimator", "truncated"],
        ["--sampling.top_k", "5", *["--loss.single_step_estimator", "truncated", "--sampling.temperature", "0.7"]],
        ["--loss.support", "student_topk", "--sampling.top_k", "40"],
        ["--loss.single_step_estimator", "full", "--teacher.max_top_k", "300"],
        ["--loss.alpha_lm", "0.5", "--data.lm_path", "t.jsonl"],
        ["--teacher_client.named", MATHS, "--data.teacher_column", "tutor"],
        ["--teacher_client.named", MATHS, "--teacher_client.urls", '["http://b:1"]'],
        ["--teacher_client.named", MATHS, "--teacher_client.protocol", "vllm"],  # every row may name one
        ["--data.prompt_column", "teacher"],  # a column like any other without teacher_client.named
    ],
)
def test_combinations_that_mean_something_are_taken(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["up", *COMPLETE, *options, "--dry-run"])
    assert exit_info.value.code == 0, capsys.readouterr().err


def test_an_unknown_command_is_refused_and_the_known_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "teach")
    assert line.count("\n") == 1
    for text in ("'teach'", "'teacher'", "'rollout'", "distillserve --help"):
        assert text in line


def test_an_abbreviated_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--loss.gam" in refused(capsys, "train", "--loss.gam", "1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[loss]\ngama = 0.5", ["loss.gama is not an option", "did you mean loss.gamma?"]),
        ("[los]\ngamma = 0.5", ["los is not an option", "did you mean loss?"]),
        ("[loss]\ngamma = 3", ["loss.gamma", "3"]),
        ("[loss]\ngamma = 'x'\n[teacher]\nport = 0", ["loss.gamma", "teacher.port"]),
        ("loss = 3", ["loss", "3", "dictionary"]),
        ("[student]\nmodel = 7", ["student.model", "7", "string"]),
        ("[loss]\ngamma = nan", ["loss.gamma", "nan"]),
        ("[loss\n", ["run.toml", "line 1"]),
    ],
)
def test_a_bad_run_file_is_refused_in_one_line(
    content: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(content)
    line = refused(capsys, "train", str(run_file))
    assert line.startswith("distillserve: ") and line.count("\n") == 1
    for text in expected:
        assert text in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"loss": {"gama": 1}}', "did you mean loss.gamma?"),
        (b'{"sampling": {"top_p": 0}}', "sampling.top_p"),
        (b"{", "run.json"),
        (b"[1]", "run.json"),
        (b"null", "run.json"),
        (b"\xff\xfe", "run.json"),
        (b'{"seed": 1, "seed": 2}', "run.json: seed is given twice"),
        (b'{"loss": {"gamma": 0.5, "gamma": 0.9}}', "run.json: gamma is given twice"),
        (b'{"loss": {"gamma": NaN}}', "run.json: NaN is no JSON number"),
    ],
)
def test_a_bad_json_run_file_is_refused_in_one_line(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.json"
    run_file.write_bytes(content)
    line = refused(capsys, "train", str(run_file))
    assert line.count("\n") == 1 and expected in line


@pytest.mark.parametrize(
    ("name", "content"), [("run.toml", "[loss]\r\ngamma = 0.25\r\n"), ("run.json", '{"loss": {"gamma": 0.25}}')]
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_run_file_may_begin_with_a_bom(
    bom: bytes, name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(bom + content.encode())
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / name), "--dry-run"])
    assert json.loads(capsys.readouterr().out)["loss"]["gamma"] == 0.25


def test_a_missing_run_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'no-such.toml' does not exist" in refused(capsys, "train", "no-such.toml")


@pytest.mark.parametrize(
    ("role", "left_out"),
    [("rollout", "student.model"), ("teacher", "teacher.model"), ("train", "data.path"), ("up", "pipeline.steps")],
)
def test_what_a_role_needs_is_asked_for_by_name(role: str, left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = zip(COMPLETE[::2], COMPLETE[1::2], strict=True)
    given = [] if role in ("rollout", "teacher") else [pair for pair in pairs if pair[0] != f"--{left_out}"]
    line = refused(capsys, role, *(text for pair in given for text in pair))
    assert f"{left_out} is required by `distillserve {role}`" in line and f"--{left_out}" in line


@pytest.mark.parametrize("role", ["train", "up"])
@pytest.mark.parametrize("option", ["every_steps", "num_prompts", "max_new_tokens"])
def test_options_of_an_evaluation_that_there_is_not_are_refused(
    role: Literal["train", "up"], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, role, *COMPLETE, f"--evaluation.{option}", "5")
    assert f"evaluation.{option} = 5 would be ignored: there is no data.eval_path" in line
    config = RunConfig(
        student={"model": "m"},
        teacher={"model": "t"},
        data={"path": "d", "eval_path": "e"},
        pipeline={"steps": 1},
        evaluation={option: 5},
    )
    config.require(role)


def test_the_command_line_wins_over_the_run_file_and_the_file_over_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[loss]\ngamma = 0.25\ntop_k = 7\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", str(run_file), "--loss.gamma", "0.5", "--dry-run"])
    assert exit_info.value.code == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert (loss["gamma"], loss["top_k"], loss["aggregation"]) == (0.5, 7, "token_mean")


def test_a_resolved_config_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(loss={"advantage_clip": None, "gamma": 0.5}, rollout_client={"urls": ["http://a:1"]})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "config.json"), "--dry-run"])
    assert RunConfig.model_validate_json(capsys.readouterr().out) == config


@pytest.mark.parametrize("run_file", sorted(RUNS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_run_files_parse(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["up", str(run_file), "--dry-run"])
    assert exit_info.value.code == 0, capsys.readouterr().err


def test_named_teachers_are_a_table_of_a_run_file_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text('[teacher_client.named]\nmaths = ["http://a:1", "http://a:2"]\ncode = ["http://b:1"]\n')
    with pytest.raises(SystemExit):
        main(["train", str(run_file), "--teacher_client.named", '{"code": ["http://c:1"]}', "--dry-run"])
    named = json.loads(capsys.readouterr().out)["teacher_client"]["named"]
    assert named == {"maths": ["http://a:1", "http://a:2"], "code": ["http://c:1"]}


def test_configs_are_immutable() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.loss.gamma = 0.5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("section", [None, *(name for name in RunConfig.model_fields if name != "seed")])
def test_every_section_refuses_unknown_keys(section: str | None) -> None:
    options = {"bogus": 1} if section is None else {section: {"bogus": 1}}
    with pytest.raises(ValidationError, match=r"bogus\s+Extra inputs are not permitted"):
        RunConfig.model_validate(options)


def test_a_section_given_as_json_is_merged_with_dotted_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--loss", '{"gamma": 0.25, "top_k": 7}', "--loss.top_k", "9", "--dry-run"])
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert (loss["gamma"], loss["top_k"]) == (0.25, 9)


def test_null_on_the_command_line_takes_an_option_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[loss]\nadvantage_clip = 3.0\n")
    with pytest.raises(SystemExit):
        main(["train", str(run_file), "--loss.gamma", "1", "--loss.advantage_clip", "null", "--dry-run"])
    assert json.loads(capsys.readouterr().out)["loss"]["advantage_clip"] is None


def test_the_environment_sets_no_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("seed", "SEED", "DISTILLSERVE_SEED"):
        monkeypatch.setenv(name, "7")
    with pytest.raises(SystemExit):
        main(["train", "--dry-run"])
    assert json.loads(capsys.readouterr().out)["seed"] == 0


@pytest.mark.parametrize("command", ["teacher", "rollout"])
def test_a_public_server_without_a_key_does_not_start(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"DISTILLSERVE_{command.upper()}_KEY"
    monkeypatch.delenv(name, raising=False)
    model = {"teacher": "--teacher.model", "rollout": "--student.model"}[command]
    line = refused(capsys, command, model, "m", f"--{command}.host", "0.0.0.0")
    for text in (f"{command}.host = '0.0.0.0'", name, "127.0.0.1"):
        assert text in line


@pytest.mark.parametrize("urls", [[], ["http://a:1/", "http://b:2"]])
def test_servers_are_found_at_their_urls_or_at_host_and_port(urls: list[str]) -> None:
    config = RunConfig(
        rollout={"host": "0.0.0.0", "port": 9},
        rollout_client={"urls": urls},
        teacher={"host": "0.0.0.0", "port": 8},
        teacher_client={"urls": [f"{url.rstrip('/')}0" for url in urls]},
    )
    assert config.rollout_urls() == (["http://a:1", "http://b:2"] if urls else ["http://127.0.0.1:9"])
    assert config.teacher_urls() == (["http://a:10", "http://b:20"] if urls else ["http://127.0.0.1:8"])
    for host, url in (("::1", "[::1]"), ("[0:0::1]", "[::1]"), ("::", "[::1]"), ("LocalHost", "localhost")):
        assert TeacherConfig(host=host, port=9).url() == f"http://{url}:9"


@pytest.mark.parametrize("left", ["summary.json", "student", "checkpoints", ".student.before"])
def test_what_a_run_has_learned_is_not_overwritten(left: str, tmp_path: Path) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(ConfigError, match=rf"holds an earlier run \({left}\).*output\.overwrite"):
        check_output_dir(RunConfig(output={"dir": str(tmp_path)}))
    assert check_output_dir(RunConfig(output={"dir": str(tmp_path), "overwrite": True})) == tmp_path


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_does_not_replace_the_model_it_starts_from(role: str, tmp_path: Path) -> None:
    output = {"dir": str(tmp_path), "overwrite": True}
    for model in (tmp_path, tmp_path / "student", tmp_path / "checkpoints" / "step-3"):
        with pytest.raises(ConfigError, match=rf"{role}\.model = .* lies in output\.dir"):
            check_output_dir(RunConfig(output=output, **{role: {"model": str(model)}}))
    check_output_dir(RunConfig(output=output, **{role: {"model": str(tmp_path / "students")}}))


def test_up_refuses_a_finished_run_before_it_starts_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "summary.json").touch()
    options = {"--student.model": tmp_path, "--teacher.model": tmp_path, "--data.path": "d", "--pipeline.steps": 1}
    argv = [str(text) for pair in options.items() for text in pair]
    line = refused(capsys, "up", *argv, "--output.dir", str(tmp_path))
    assert f"output.dir = '{tmp_path}'" in line and "--output.overwrite true" in line
    files = [path.name for path in tmp_path.iterdir() if path.name != ".lock"]
    assert sorted(files) == ["config.json", "summary.json"]


@pytest.mark.parametrize(
    ("student", "rollout", "expected"),
    [
        ("1", "0", "nccl"),
        ("0", "0", "gloo"),
        ("0,1", "1,2", "gloo"),
        (None, "0", "gloo"),
        ("", "0", "gloo"),
        ("GPU-8932f937", "GPU-0a1b2c3d", "nccl"),
        ("GPU-8932f937", "GPU-8932F937-d72c", "gloo"),
        ("GPU-8932f937", "0", "gloo"),  # nobody can tell without that machine's driver
        ("MIG-1", "MIG-2", "gloo"),
    ],
)
def test_auto_takes_nccl_only_between_different_gpus(student: str | None, rollout: str, expected: str) -> None:
    config = RunConfig(student={"cuda_devices": student}, rollout={"cuda_devices": rollout})
    assert config.weight_sync_backend() == expected


@pytest.mark.parametrize(("student", "rollout"), [("0", "0"), ("1,0", "2,1"), ("GPU-8932f937", "GPU-8932f937-d72c")])
def test_nccl_on_one_card_is_refused(student: str, rollout: str) -> None:
    sections = {"student": {"cuda_devices": student}, "rollout": {"cuda_devices": rollout}}
    with pytest.raises(
        ValueError, match=r"nccl cannot connect the trainer and the rollout server on one card.*different GPUs"
    ):
        RunConfig(**sections, weight_sync={"backend": "nccl"})
    RunConfig(**sections, weight_sync={"backend": "gloo"})


def test_every_option_has_a_help_text() -> None:
    for section, field in RunConfig.model_fields.items():
        for name, option in getattr(field.annotation, "model_fields", {}).items():
            assert option.description, f"{section}.{name} has no docstring"


def test_help_answers_within_two_seconds_of_work() -> None:
    """By the processor's clock: a machine that is busy with other things is no fault of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "services.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    for role in ("up", "rollout", "teacher", "train", "score", "tiny"):
        assert f"    {role} " in done.stdout


def test_contracts_clients_and_help_load_no_model_library() -> None:
    code = (
        "import sys, services.config, services.wire.rollout, services.wire.teacher, services.wire.weights, services.clients\n"
        "import services.score.command, services.cli\n"
        "try: services.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stderr.strip() == "[]"
    assert "--loss.gamma" in done.stdout and "examples:" in done.stdout
