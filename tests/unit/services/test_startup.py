"""FAULTS 28: what cannot start says so in one line with the fix."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.errors import StartupError
from services.startup import bind, check_model_folder, check_output_room, check_port, free_port

LOOPBACK = "127.0.0.1"


@pytest.fixture
def taken_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_named_with_the_option(taken_port: int) -> None:
    with pytest.raises(StartupError) as error:
        check_port("teacher", LOOPBACK, taken_port)
    assert f"teacher.port = {taken_port}" in str(error.value)
    assert "Address already in use" in str(error.value) and "--teacher.port" in str(error.value)


def test_a_bound_port_is_ours(taken_port: int) -> None:
    with bind("teacher", LOOPBACK, 0) as listener:
        assert listener.getsockname()[1] not in (0, taken_port)


def test_the_preferred_port_is_taken_when_free(taken_port: int) -> None:
    with bind("x", LOOPBACK, 0) as listener:
        free = listener.getsockname()[1]
    assert free_port(LOOPBACK, free) == free
    assert free_port(LOOPBACK, free, frozenset({free})) != free
    assert free_port(LOOPBACK, taken_port) not in (0, taken_port)
    assert free_port(LOOPBACK, 0) > 0


@pytest.mark.parametrize("path", ["./no-such", "/no/such/folder", "a/b/c"])
def test_a_missing_model_folder_is_named(path: str) -> None:
    with pytest.raises(StartupError) as error:
        check_model_folder("student.model", path)
    assert f"student.model = {path!r}" in str(error.value) and "save_pretrained" in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        check_model_folder("teacher.model", str(tmp_path))
    (tmp_path / "config.json").touch()
    check_model_folder("teacher.model", str(tmp_path))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_is_left_to_the_loader(name: str) -> None:
    check_model_folder("student.model", name)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StartupError, match=r"output\.dir = .*out.* cannot be written"):
        check_output_room(tmp_path / "out")


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(StartupError, match="has 5 MiB left on its disk"):
        check_output_room(tmp_path / "out")
    monkeypatch.undo()
    check_output_room(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
