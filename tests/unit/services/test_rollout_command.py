"""How vLLM's server is started: what its command line and environment say, and what must be there."""

import ctypes
import json

import pytest
import torch
from vllm import envs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from services.config import RunConfig, StudentConfig
from services.connections import CLIENT_IDLE_S
from services.errors import StartupError
from services.passed_on import _RESERVED_ROLLOUT_ARGS, check_rollout_engine_args
from services.rollout import server
from services.rollout.settings import RolloutSettings

CONFIG = RunConfig(
    student={"model": "m"},
    rollout={"port": 1234, "dtype": "bfloat16", "engine_args": ["--swap-space", "2"], "kv_cache_gib": 0.5},
)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_line_says_what_the_run_says() -> None:
    command = server.vllm_command(CONFIG)
    assert option(command, "--model") == "m" and option(command, "--port") == "1234"
    assert option(command, "--dtype") == "bfloat16"
    assert json.loads(option(command, "--weight-transfer-config")) == {"backend": "gloo"}
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert "--max-model-len" not in command and "--trust-remote-code" not in command
    assert command[-2:] == ["--swap-space", "2"]


def test_idle_connections_outlast_those_of_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both ends close while a request is on its way; vLLM reads its own when it starts."""
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "1")
    monkeypatch.setattr("os.environ", server.vllm_environment(CONFIG))
    assert envs.environment_variables["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]() >= 2 * CLIENT_IDLE_S


def test_every_flag_that_the_command_line_sets_is_refused_among_the_users_own() -> None:
    config = CONFIG.model_copy(update={"student": StudentConfig(model="m", trust_remote_code=True)})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_model_len": 9})})
    flags = {word for word in server.vllm_command(config)[:-2] if word.startswith("--")}
    assert {"--model", "--max-model-len", "--trust-remote-code", "--logprobs-mode"} < flags
    for flag in flags - {"--enforce-eager"}:  # which does what it says, on a GPU
        with pytest.raises(ValueError, match=f"rollout.engine_args: {flag} is refused"):
            check_rollout_engine_args(["--swap-space", "2", flag])


def test_no_flag_of_vllm_is_refused_for_being_short() -> None:
    """A flag's beginning is refused as what vLLM completes it to, unless vLLM knows it as it is."""
    flags = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    refused = set()
    for flag in flags:
        try:
            check_rollout_engine_args([flag])
        except ValueError:
            refused.add(flag)
    own = {"--model", "--config", "--host", "--port", "--dtype", "--seed", "--middleware", "--api-key", "--hf-token"}
    assert own <= refused
    fields = {name.removeprefix("--").removeprefix("no-") for name in refused - {"-tp"}}
    assert fields <= set(_RESERVED_ROLLOUT_ARGS)


def test_the_environment_carries_the_settings_of_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.vllm_environment(CONFIG).items():
        monkeypatch.setenv(name, value)
    assert RolloutSettings.from_environment() == RolloutSettings.from_config(CONFIG)


def test_what_the_user_sets_wins_except_what_the_weight_push_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    environment = server.vllm_environment(CONFIG)
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG" and environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(("cuda", "cache"), [(False, ["--kv-cache-memory-bytes", str(1 << 29)]), (True, [])])
def test_the_cache_on_cpu_may_be_half_a_gib(cuda: bool, cache: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's environment variable takes whole GiB only, and would win."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    command = server.vllm_command(CONFIG)
    at = command.index("--kv-cache-memory-bytes") if cache else len(command)
    assert command[at : at + 2] == cache and "VLLM_CPU_KVCACHE_SPACE" not in server.vllm_environment(CONFIG)


@pytest.mark.parametrize("cuda", [True, False])
def test_only_without_a_gpu_is_compiling_switched_off(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert ("TORCHDYNAMO_DISABLE" in server.vllm_environment(CONFIG)) == (not cuda)
    assert ("--enforce-eager" in server.vllm_command(CONFIG)) == (not cuda)


def test_a_missing_system_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(StartupError, match="apt install libnuma1"):
        server.check_libnuma()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server.check_libnuma()
