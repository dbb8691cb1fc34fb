"""The machine's GPUs, which of them a process sees, and a driver that does not fit."""

import os
from pathlib import Path

import pytest

from services import cli
from services.config.command_line import option_help
from services.errors import ConfigError, StartupError
from services.gpus import cards as gpus
from services.gpus.cards import Gpu, check_driver, check_granted, find_gpus, keep_segments_expandable, make_visible
from tests.models import save_model
from tests.unit.services.fake_gpus import UUIDS, forget_gpus, install_gpus, install_torch

GIB = 1 << 30


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that it is put back
    install_gpus(tmp_path, monkeypatch, [24 * GIB, 80 * GIB])


def indices(devices: tuple[str, ...] | None) -> list[int | str]:
    return [gpu.index if isinstance(gpu, Gpu) else gpu for gpu in find_gpus(devices)]


def test_gpus_are_found_by_number_and_by_the_beginning_of_their_uuid() -> None:
    assert find_gpus(("0",)) == (Gpu(0, UUIDS[0], 24 * GIB),)
    assert indices(None) == [0, 1]
    assert indices(("1", "0")) == [1, 0]
    assert indices(("GPU-0a1b",)) == [1]
    assert indices(("7", "GPU-ffff", "MIG-1")) == ["7", "GPU-ffff", "MIG-1"]


def test_a_gpu_that_is_cut_into_parts_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(tmp_path, monkeypatch, [80 * GIB], mig="Enabled")
    assert indices(None) == []


def test_the_cpu_build_of_torch_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch("2.13.0+cpu", monkeypatch)
    assert indices(None) == []


def test_without_nvidia_smi_there_are_no_gpus_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    forget_gpus(monkeypatch)
    assert indices(None) == []


@pytest.mark.parametrize(
    ("granted", "wanted", "seen"),
    [
        (None, "1", "1"),
        (None, " 1, 0", "1,0"),
        (None, "", ""),
        ("0,1", "1", "1"),
        (UUIDS[1], "1", "1"),
        ("1", "GPU-0A1B", "GPU-0a1b"),
        ("0", None, "0"),
        (None, None, None),
    ],
)
def test_a_process_sees_the_devices_of_its_option(
    granted: str | None, wanted: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted or "")
    if granted is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    make_visible("teacher.cuda_devices", wanted)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # numbers are those of nvidia-smi


@pytest.mark.parametrize(("granted", "wanted"), [("1", "0"), ("", "0"), (UUIDS[0], "1"), ("0", "0,1")])
def test_a_gpu_that_the_environment_does_not_grant_is_refused(
    granted: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
    with pytest.raises(ConfigError, match=r"rollout.cuda_devices = .* is not among .* CUDA_VISIBLE_DEVICES = "):
        check_granted("rollout.cuda_devices", wanted)


def test_an_unreadable_environment_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "first")
    with pytest.raises(ConfigError, match=r"^CUDA_VISIBLE_DEVICES = 'first'"):
        check_granted("rollout.cuda_devices", "0")


@pytest.mark.parametrize(("command", "section"), [("rollout", "rollout"), ("teacher", "teacher"), ("train", "student")])
def test_every_command_sees_the_gpus_of_its_section_before_it_runs(
    command: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    monkeypatch.setitem(cli._COMMANDS, command, lambda config: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    run_file = tmp_path / "run.toml"
    run_file.write_text("student.model = 'm'\nteacher.model = 'm'\ndata.path = 'd'\npipeline.steps = 1\n")
    with pytest.raises(SystemExit) as end:
        cli.main([command, str(run_file), f"--{section}.cuda_devices", "1"])
    assert end.value.code == 0 and seen == ["1"]


def test_up_refuses_what_a_role_would_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli._COMMANDS, "up", lambda config: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    options = ["--student.model", "m", "--teacher.model", "m", "--data.path", "d", "--pipeline.steps", "1"]
    with pytest.raises(SystemExit) as end:
        cli.main(["up", *options, "--student.cuda_devices", "0"])
    assert end.value.code == 2 and "student.cuda_devices = '0' is not among" in capsys.readouterr().err


def up_on_one_gpu(folder: str, *options: str) -> int:
    words = ["--student.model", folder, "--teacher.model", folder, "--data.path", "d", "--pipeline.steps", "1"]
    with pytest.raises(SystemExit) as end:
        cli.main(["up", *words, *options])
    return int(str(end.value.code))


def test_up_shows_what_is_computed_or_refuses_it_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []

    async def run(supervisor: object, wanted_ports: object) -> int:
        started.append(supervisor)
        return 0

    monkeypatch.setattr("services.launch.supervisor.Supervisor.run", run)
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "model", "qwen3")
    assert up_on_one_gpu(folder) == 0 and len(started) == 1
    table = capsys.readouterr().out.splitlines()[:4]
    assert [line.split()[0] for line in table] == ["GPU", "rollout", "teacher", "trainer"]
    assert up_on_one_gpu(folder, "--rollout.kv_cache_gib", "30") == 2 and len(started) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "leave rollout.kv_cache_gib = 30.0 out" in error
    assert up_on_one_gpu(folder, "--weight_sync.backend", "nccl") == 2 and len(started) == 1
    assert "share a GPU" in capsys.readouterr().err


def test_up_asks_no_hub_about_a_model_whose_folder_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_gpus(tmp_path, monkeypatch, [24e9])
    asked: list[object] = []
    monkeypatch.setattr("services.models.shape.hf_hub_download", lambda *words: asked.append(words))
    assert up_on_one_gpu(str(tmp_path / "nothing")) == 3 and asked == []
    assert "is no model folder (it does not exist)" in capsys.readouterr().err


def test_a_bad_option_with_a_long_help_is_refused_in_one_line() -> None:
    assert all("\n" not in text for text in option_help().values())


@pytest.mark.parametrize("theirs", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_unless_the_user_has(theirs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "backend:native")
        if name != theirs:
            monkeypatch.delenv(name)
    keep_segments_expandable()
    expected = None if theirs == "PYTORCH_CUDA_ALLOC_CONF" else "backend:native"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if theirs is None else expected)


NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (builder)\nGCC version: 12.2.0\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "version"
    file.write_text(NVRM.format("570.86.15"))
    monkeypatch.setattr(gpus, "DRIVER_FILE", file)
    return file


@pytest.mark.parametrize(
    "said", [r"\377\376, x, 1, N/A\n", "Failed to initialize NVML, GPU-1, 24000, [N/A]\\n", "\\n\\n,,,\\n", ""]
)
def test_what_nvidia_smi_says_instead_of_gpus_is_none(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpus(tmp_path, monkeypatch, [24e9])
    assert len(gpus.installed_gpus()) == 1
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{said}'\n")
    forget_gpus(monkeypatch)
    assert gpus.installed_gpus() == ()


def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(driver: Path) -> None:
    with pytest.raises(StartupError, match=r"driver 570\.86\.15 is too old .* needs 580\.65\.06 or newer"):
        check_driver(False)
    check_driver(True)


@pytest.mark.parametrize("version", ["580.65.06", "600.1"])
def test_a_new_driver_without_a_gpu_to_use_is_another_matter(driver: Path, version: str) -> None:
    driver.write_text(NVRM.format(version))
    with pytest.raises(StartupError, match=r"torch finds no GPU that it can use.*--gpus all"):
        check_driver(False)


def test_the_cpu_is_used_where_somebody_said_so(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_driver(False)
    with pytest.raises(StartupError, match="BACKEND=cpu make setup"):
        check_driver(False, runs_on_cpu=False)  # vLLM's build for GPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    install_torch("2.13.0+cpu", monkeypatch)
    check_driver(False)
    check_driver(False, runs_on_cpu=False)


def test_a_machine_without_a_driver_runs_on_its_cpu(driver: Path) -> None:
    driver.unlink()
    check_driver(False)
