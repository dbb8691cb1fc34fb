"""How vLLM's server is started: what its command line and environment say, and what must be there."""

import ctypes
import json

import pytest
import torch

from services.config import RunConfig
from services.errors import StartupError
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
