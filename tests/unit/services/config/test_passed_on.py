"""What is passed on to transformers, vLLM and chat templates: what is refused in it, and that no secret is shown."""

from pathlib import Path

import pytest

from tests.unit.services.config.commands import COMPLETE, assert_refused, assert_taken, refused

SECRET = "hf_abcdefgh"


REFUSED = {
    '--student.model_init_kwargs {"dtype":"bfloat16"}': "model_init_kwargs.dtype = 'bfloat16' ... student.dtype",
    '--student.model_init_kwargs torch_dtype="auto"': "model_init_kwargs.torch_dtype = 'auto' ... student.dtype",
    '--teacher.teacher_model_init_kwargs dtype="bfloat16"': (
        "teacher.teacher_model_init_kwargs.dtype = 'bfloat16' is refused ... teacher.dtype says that"
    ),
    "--teacher.teacher_model_init_kwargs trust_remote_code=true": (
        "trust_remote_code = True is refused ... teacher.trust_remote_code says that"
    ),
    "--student.model_init_kwargs use_safetensors=false": "use_safetensors = False ... leave it out",
    '--student.model_init_kwargs revision="v1"': "revision = 'v1' is refused ... name its folder",
    '--student.model_init_kwargs device_map="auto"': "device_map = 'auto' is refused ... student.cuda_devices",
    '--teacher.teacher_model_init_kwargs device_map="auto"': (
        "device_map = 'auto' is refused ... teacher.device ... teacher.engine = vllm ... teacher.tensor_parallel_size"
    ),
    '--teacher.engine_args {"kv_cache_memory_bytes":1}': (
        "teacher.engine_args.kv_cache_memory_bytes ... teacher.kv_cache_gib"
    ),
    '--teacher.engine vllm --teacher.engine_args {"max_logprobs":5}': (
        "teacher.engine_args.max_logprobs = 5 is refused ... teacher.max_top_k says that"
    ),
    '--teacher.engine vllm --teacher.engine_args {"logprobs_mode":"raw_logits"}': (
        "engine_args.logprobs_mode = 'raw_logits' is refused ... leave it out"
    ),
    '--rollout.engine_args ["--dtype","half"]': "rollout.engine_args: --dtype is refused ... rollout.dtype",
    '--rollout.engine_args ["--max_model_len=9"]': "--max_model_len is refused ... rollout.max_model_len",
    '--rollout.engine_args ["--max-model","9"]': "--max-model is refused ... rollout.max_model_len",
    '--rollout.engine_args ["-tp=2"]': "-tp is refused ... rollout.tensor_parallel_size says that",
    '--rollout.engine_args ["-dp","2"]': "-dp is refused ... rollout.data_parallel_size says that",
    '--rollout.engine_args ["-asc=2"]': "-asc is refused ... its boot id tells a restart ... several servers",
    '--rollout.engine_args ["--no-trust-remote-code"]': "refused ... student.trust_remote_code says that",
    '--data.chat_template_kwargs a="false"': "a = 'false' is a text ... write false without quotes",
    '--data.chat_template_kwargs {"a":{"b":["None"]}}': "chat_template_kwargs.a.b.0 = 'None' ... write null",
    "--data.chat_template_kwargs tokenize=true": "chat_template_kwargs.tokenize = True is refused",
    "--data.chat_template_kwargs add_generation_prompt=false": "add_generation_prompt = False is refused",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_arguments_with_an_option_of_their_own_or_of_no_effect_are_refused(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(options, expected, capsys)


def test_a_text_for_true_or_false_is_refused_in_a_run_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("[data.chat_template_kwargs]\nenable_thinking = 'False'\n")
    assert "data.chat_template_kwargs.enable_thinking = 'False' is a text" in refused(capsys, "train", str(run_file))


@pytest.mark.parametrize(
    "options",
    [
        '--student.model_init_kwargs attn_implementation="eager"',
        '--rollout.engine_args ["--enable-prefix-caching","--enforce-eager","--compilation-config","{}","-q=fp8"]',
        "--teacher.engine vllm --teacher.engine_args pipeline_parallel_size=2",
    ],
)
def test_other_arguments_are_passed_on(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_taken(options, capsys)


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
    assert expected in line and SECRET not in line


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
    assert expected in line and SECRET not in line
