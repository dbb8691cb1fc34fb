"""How vLLM's server is started: what its command line and environment say, and what must be there."""

import ctypes
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from services.config import RunConfig, StudentConfig
from services.config.own_key import OwnKeyAuth, own_key_path
from services.config.passed_on import _RESERVED_ROLLOUT_ARGS, check_rollout_engine_args
from services.errors import StartupError
from services.gpus.options import computed
from services.http.connections import CLIENT_IDLE_S
from services.process.startup import free_port
from services.rollout import server
from services.rollout.middleware import OUR_ROUTES, VLLM_ROUTES, RolloutGuard
from services.rollout.settings import RolloutSettings
from tests.models import save_model
from tests.unit.services.fake_gpus import UUIDS, install_gpus

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
    assert json.loads(option(command, "--weight-transfer-config")) == {"backend": "distillserve_gloo"}
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert (option(command, "--tensor-parallel-size"), option(command, "--data-parallel-size")) == ("1", "1")
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
    fields = {name.removeprefix("--").removeprefix("no-") for name in refused}
    assert fields <= set(_RESERVED_ROLLOUT_ARGS)


def test_a_reserved_flag_is_refused_under_every_name_that_vllm_knows_it_by() -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    known = set()
    for action in parser._actions:
        names = {name.removeprefix("--").removeprefix("no-") for name in action.option_strings}
        if names & set(_RESERVED_ROLLOUT_ARGS):
            known |= names
            for name in action.option_strings:
                for spelling in (name, f"{name}=1", name if name[1] != "-" else f"--{name[2:].replace('-', '_')}"):
                    with pytest.raises(ValueError, match=rf"rollout\.engine_args: {spelling.partition('=')[0]} is ref"):
                        check_rollout_engine_args(["--swap-space", "2", spelling])
    assert set(_RESERVED_ROLLOUT_ARGS) <= known  # none that vLLM has not, or has no longer


@pytest.mark.parametrize("flag", ["--weight-transfer-config.backend", "--weight_transfer_config.backend=nccl"])
def test_a_part_of_a_reserved_table_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=r"weight_sync\.backend says that"):
        check_rollout_engine_args([flag, "nccl"])


def test_what_is_taken_for_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with a word that is no flag"):
        check_rollout_engine_args(["other/model"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hf-overrides", '{"head_dtype": "float32"}'],
        ["--hf-overrides.head_dtype", "float32"],
        ["-dpb", "mp"],
        ["--enable-log-requests"],
        ["--config-format", "hf"],
        ["--swap-space", "-1"],
    ],
)
def test_other_flags_are_passed_on(arguments: list[str]) -> None:
    check_rollout_engine_args(arguments)


def test_weights_are_read_from_safetensors_alone() -> None:
    assert option(server.vllm_command(CONFIG), "--load-format") == "safetensors"


def test_the_environment_carries_the_settings_of_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.vllm_environment(CONFIG).items():
        monkeypatch.setenv(name, value)
    assert RolloutSettings.from_environment() == RolloutSettings.from_config(CONFIG)


def test_what_the_user_sets_wins_except_for_vllms_development_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    environment = server.vllm_environment(CONFIG)
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(("gib", "cache"), [(0.5, 1 << 29), (None, None)])
def test_the_cache_may_be_half_a_gib(
    cuda: bool, gib: float | None, cache: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's environment variable takes whole GiB only, and would win. Unset, it is 1 GiB on a CPU, the rest on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    config = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"kv_cache_gib": gib})})
    command = server.vllm_command(config)
    expected = cache or (None if cuda else 1 << 30)
    found = option(command, "--kv-cache-memory-bytes") if "--kv-cache-memory-bytes" in command else None
    assert found == (None if expected is None else str(expected))
    assert ("--gpu-memory-utilization" in command) == cuda
    assert "VLLM_CPU_KVCACHE_SPACE" not in server.vllm_environment(config)


def test_on_a_shared_gpu_cache_and_utilization_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(tmp_path, monkeypatch, [24 << 30])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = save_model(tmp_path / "model", "qwen3")
    config = RunConfig(student={"model": folder}, teacher={"model": folder}, data={"path": "d"})
    command = server.vllm_command(computed(config, "rollout"))
    assert 0 < float(option(command, "--gpu-memory-utilization")) < 0.5
    assert int(option(command, "--kv-cache-memory-bytes")) > 0 and option(command, "--max-model-len") == "256"
    alone = server.vllm_command(computed(RunConfig(student={"model": folder}), "rollout"))
    assert option(alone, "--gpu-memory-utilization") == "0.9" and "--kv-cache-memory-bytes" not in alone
    settings = RolloutSettings.from_config(config)
    assert settings.gpu_uuids == (UUIDS[0],)


def test_a_sequence_may_be_as_long_as_a_small_cache_holds(tmp_path: Path) -> None:
    """On a CPU too: of a model of 40,960 positions vLLM would ask for a cache of 4.7 GB, and not start."""
    folder = save_model(tmp_path / "model", "qwen3", max_position_embeddings=40_960)
    for sections, expected in (
        ({}, 4096),
        ({"sampling": {"max_new_tokens": 3000}}, 6000),
        ({"data": {"max_prompt_tokens": 100}}, 356),
        ({"rollout": {"max_model_len": 9000}}, 9000),
    ):
        config = computed(RunConfig(**{"student": {"model": folder}} | sections), "rollout")
        assert option(server.vllm_command(config), "--max-model-len") == str(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_rollouts_compute_attention_in_float32(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    config = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"dtype": dtype})})
    assert server.vllm_environment(config).get("TRITON_F32_DEFAULT") == ("ieee" if dtype == "float32" else None)
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert server.vllm_environment(config)["TRITON_F32_DEFAULT"] == "tf32"  # a user's own wish


def overrides(engine_args: list[str], dtype: str = "bfloat16", float32_head: bool | None = None) -> Any:
    """What vLLM's own parser makes of --hf-overrides."""
    changes = {"engine_args": engine_args, "dtype": dtype, "float32_head": float32_head}
    section = CONFIG.rollout.model_copy(update=changes)
    command = server.vllm_command(CONFIG.model_copy(update={"rollout": section}))
    return make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:]).hf_overrides


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ([], {}),
        (["--hf-overrides", '{"a": 1}'], {"a": 1}),
        (['--hf-overrides={"a": 1}'], {"a": 1}),
        (["--hf_overrides", '{"a": {"b": 2}}', "--max-num-batched-tokens", "9"], {"a": {"b": 2}}),
        (["--hf-overrides.a.b", "2"], {"a": {"b": 2}}),
        (["--hf_overrides.a=2"], {"a": 2}),
        (["--hf-overrides", '{"head_dtype": "model"}'], {"head_dtype": "model"}),
        (["--hf-overrides.head_dtype", "model"], {"head_dtype": "model"}),
    ],
)
def test_a_half_precision_head_is_float32_on_a_gpu_beside_what_the_user_overrides(
    engine_args: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert overrides(engine_args) == {"head_dtype": "float32"} | expected
    assert overrides(engine_args, "float32") == expected
    for flag in ("--quantization", "-q"):
        assert overrides([*engine_args, flag, "fp8"]) == expected  # vLLM refuses it for a quantised head
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overrides(engine_args) == expected  # where it would widen the head at every call


@pytest.mark.parametrize("cuda", [True, False])
def test_a_float32_head_can_be_asked_for_and_refused(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert overrides([], float32_head=True) == {"head_dtype": "float32"}
    assert overrides([], float32_head=False) == {}
    assert overrides([], "float32", float32_head=True) == {}  # it is one already


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


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DISTILLSERVE_ROLLOUT_KEY", "DISTILLSERVE_ROLLOUT_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_key")
async def test_a_server_without_a_key_makes_one_and_lets_nobody_in_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*RolloutSettings.from_config(CONFIG).to_environment().popitem())

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)

    transport = httpx.ASGITransport(RolloutGuard(vllm))
    routes = sorted(VLLM_ROUTES | set(OUR_ROUTES) | {("GET", "/nowhere"), ("POST", "/health")})
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1234") as stranger:
        statuses = {
            route: (await stranger.request(*route)).status_code for route in routes if route != ("GET", "/ready")
        }
    assert {route for route, status in statuses.items() if status != 401} == {("GET", "/health"), ("POST", "/health")}
    async with httpx.AsyncClient(transport=transport, auth=OwnKeyAuth()) as trainer:
        assert (await trainer.get("http://127.0.0.1:1234/metrics")).status_code == 200
        assert (await trainer.get("http://127.0.0.1:1235/metrics")).status_code == 401


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("key", [None, "SENTINEL-0f9"])
def test_a_server_says_where_its_own_key_is_and_shows_none(
    key: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if key is not None:
        monkeypatch.setenv("DISTILLSERVE_ROLLOUT_KEY", key)
    executed: list[list[str]] = []
    monkeypatch.setattr(server.os, "execve", lambda path, command, environment: executed.append(command))
    monkeypatch.setattr(server, "check_libnuma", lambda: None)
    port = free_port("127.0.0.1", 0)
    server.run(RunConfig(student={"model": save_model(tmp_path / "m", "qwen3")}, rollout={"port": port}))
    said = capsys.readouterr().out
    assert len(executed) == 1 and "SENTINEL" not in said + " ".join(executed[0])
    assert said.count(str(own_key_path(port))) == said.count("\n") == (1 if key is None else 0)
