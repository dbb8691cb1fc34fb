"""What the Compose files promise: no variable needed, no key shown, nothing published, room for vLLM, a right order."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from services.cli import main
from services.config import RunConfig
from tests.unit.deploy.stack import (
    CLONE,
    CPU_FILE,
    GPU_FILE,
    ROLES,
    mounts,
    profile_environment,
    services,
    variables,
)

FILES = [GPU_FILE, CPU_FILE]
GPU, CPU = services(GPU_FILE), services(CPU_FILE)
SERVERS = {"rollout": 8100, "teacher": 8101}
KEYS = {
    "rollout": {"DISTILLSERVE_ROLLOUT_KEY_FILE"},
    "teacher": {"DISTILLSERVE_TEACHER_KEY_FILE"},
    "trainer": {"DISTILLSERVE_ROLLOUT_KEY_FILE", "DISTILLSERVE_TEACHER_KEY_FILE"},
}


def resolved(
    stack: dict, service: str, run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """The options with which a service's role starts."""
    command = list(GPU[service]["command"] if "command" not in stack[service] else stack[service]["command"])
    assert mounts(stack[service])["/app/run.toml"] == run_file and command[0] == "run.toml"
    monkeypatch.chdir(CLONE)
    with pytest.raises(SystemExit) as exit_info:
        main([ROLES[service], run_file, *command[1:], "--dry-run"])
    output = capsys.readouterr()
    assert exit_info.value.code == 0, output.err
    config = RunConfig.model_validate_json(output.out)
    config.require(ROLES[service])
    return config


def devices(config: RunConfig) -> list[str | None]:
    return [config.rollout.cuda_devices, config.teacher.cuda_devices, config.student.cuda_devices]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_empty_environment_is_enough(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"\$\{?\w+", text)) == {"${" + name for name in variables(path)}
    without_default = [name for name, default in variables(path).items() if not default]
    assert not without_default


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_image_is_built_here_by_one_service_that_all_others_wait_for(path: Path) -> None:
    stack = services(path)
    assert [name for name, service in stack.items() if "build" in service] == ["prepare"]
    assert len({service["image"] for service in stack.values()}) == 1
    build = services(GPU_FILE)["prepare"]["build"]
    assert (CLONE / build["context"] / build["dockerfile"]).is_file()


def test_roles_start_one_after_another() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in GPU.items()}
    assert {name: set(wait) for name, wait in waits.items()} == {
        "prepare": set(), "rollout": {"prepare"}, "teacher": {"rollout"}, "trainer": {"rollout", "teacher"},
    }  # fmt: skip
    assert set(CPU["tiny"]["depends_on"]) == {"prepare"} and set(CPU["rollout"]["depends_on"]) == {"tiny"}
    waits["tiny"], waits["rollout on cpu"] = CPU["tiny"]["depends_on"], CPU["rollout"]["depends_on"]
    for wait in waits.values():
        assert all(condition == {"condition": "service_healthy"} for condition in wait.values())
        assert all("healthcheck" in {**GPU, "tiny": CPU["tiny"]}[name] for name in wait)


@pytest.mark.parametrize("service", ROLES)
def test_a_role_has_room_and_a_first_process_and_time_to_end(service: str) -> None:
    role = GPU[service]
    assert role["shm_size"] == "2gb" and role["init"] is True and role["runtime"] == "nvidia"
    assert role["stop_grace_period"] == ("10m" if service == "trainer" else "1m")
    assert CPU[service]["runtime"] == "runc"


def test_a_server_that_dies_is_started_again_a_few_times_and_nothing_else_is() -> None:
    """A trainer told to replace an earlier run would begin anew each time."""
    assert {name: service["restart"] for name, service in GPU.items() if "restart" in service} == dict.fromkeys(
        SERVERS, "on-failure:3"
    )
    assert not any("restart" in service for service in CPU.values())


@pytest.mark.parametrize("service", ROLES)
def test_a_role_reads_its_own_keys_from_files_and_no_key_is_written_down(service: str) -> None:
    role = GPU[service]
    given = {name: value for name, value in role["environment"].items() if "KEY" in name}
    assert set(given) == KEYS[service]
    for file in given.values():
        folder = str(Path(file).parent)
        assert (
            Path(file).name == "key"
            and folder in mounts(role)
            and mounts(GPU["prepare"])[folder] == mounts(role)[folder]
        )
        assert f"{mounts(role)[folder]}:{folder}:ro" in role["volumes"]
    assert {target for target in mounts(role) if target.startswith("/keys/")} == {
        str(Path(file).parent) for file in given.values()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_token_is_passed_on_and_never_written_down(path: Path) -> None:
    for service in services(path).values():
        for name, value in service.get("environment", {}).items():
            assert value is None or not re.search("TOKEN|SECRET|PASSWORD|_KEY$", name)


def test_only_the_teacher_is_published_and_on_loopback_alone() -> None:
    assert {name: service["ports"] for name, service in {**GPU, **CPU}.items() if "ports" in service} == {}
    assert GPU["teacher"]["ports"] == ["127.0.0.1:8101:8101"]
    assert not any("ports" in service for name, service in GPU.items() if name != "teacher")


@pytest.mark.parametrize(
    ("stack", "run_file"), [(GPU, "./deploy/runs/qwen3.toml"), (CPU, "./deploy/runs/tiny.toml")], ids=["gpu", "cpu"]
)
def test_every_role_reads_the_same_valid_run_and_finds_the_others(
    stack: dict, run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {service: resolved(stack, service, run_file, capsys, monkeypatch) for service in ROLES}
    config = configs["trainer"]
    for service, port in SERVERS.items():
        section, attached = getattr(configs[service], service), getattr(config, f"{service}_client")
        (url,) = map(urlsplit, attached.urls)
        assert (url.hostname, url.port, section.port, section.host) == (service, port, port, "0.0.0.0")
        assert GPU[service]["healthcheck"]["test"][-1] == str(port)
        assert devices(configs[service]) == devices(config)  # by which a role knows with whom it shares a GPU
        assert configs[service].weight_sync_backend() == config.weight_sync_backend()
    assert config.weight_sync.master_address == "trainer" and config.weight_sync_backend() == "gloo"
    assert config.output.dir.startswith("outputs/") and mounts(GPU["trainer"])["/app/outputs"] == "./outputs"


def test_several_gpus_are_a_profile_with_nccl(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(profile_environment()) <= set(variables(GPU_FILE))
    stack = services(GPU_FILE, profile_environment())
    config, *others = (resolved(stack, role, "./deploy/runs/qwen3.toml", capsys, monkeypatch) for role in ROLES)
    assert len(set(devices(config))) == 3 and config.weight_sync_backend() == "nccl"
    assert all(devices(other) == devices(config) for other in others)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_mounted_is_in_a_new_clone_but_for_the_results(path: Path) -> None:
    for service in services(path).values():
        for target, source in mounts(service).items():
            if source.startswith("."):
                assert target == "/app/outputs" or (CLONE / source).exists(), source
        # In the short form Docker makes what is missing, as root.
        short = [volume for volume in service.get("volumes", []) if isinstance(volume, str)]
        assert all(not volume.startswith(".") or ":/app/outputs" in volume for volume in short)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_the_containers_run_is_in_the_image(path: Path) -> None:
    for service in services(path).values():
        words = service.get("entrypoint", []) + service.get("healthcheck", {}).get("test", [])
        for word in words:
            if word.startswith("/app/"):
                assert (CLONE / word.removeprefix("/app/")).is_file(), word


def test_the_tiny_pair_is_where_its_run_looks_for_it() -> None:
    assert CPU["tiny"]["entrypoint"][-2:] == ["distillserve", "tiny"]  # by default in outputs/tiny-pair
    for service in ("tiny", *ROLES):
        assert (
            mounts({**GPU.get(service, {}), **CPU[service]} if service != "trainer" else GPU[service])["/app/outputs"]
            == "./outputs"
        )


def test_every_variable_is_in_the_documentation() -> None:
    text = (CLONE / "docs" / "deployment.md").read_text()
    named = set(variables(GPU_FILE)) | {name for name, value in GPU["trainer"]["environment"].items() if value is None}
    assert len(named) > 9 and not [name for name in named if f"`{name}`" not in text]
