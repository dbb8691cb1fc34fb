"""What cannot start says so in one line with the fix."""

import errno
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from services.cli import main
from services.config import RunConfig
from services.errors import StartupError
from services.models.causal_lm import load_causal_lm, load_model_config, load_tokenizer
from services.process import startup
from services.process.startup import (
    bind,
    check_model_folder,
    check_output_room,
    check_port,
    check_socket_folder,
    check_weights,
    free_port,
    reserve_port,
)
from services.rollout import server
from tests.loopbacks import available_loopbacks
from tests.models import save_model

LOOPBACK = "127.0.0.1"


@pytest.fixture
def taken_port() -> Iterator[int]:
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


@pytest.mark.parametrize(
    "path",
    [
        *(
            "./no-such",
            "/no/such/folder",
            "a/b/c",
            "~/student",
            "no-such/",
            "a/b/",
            "outputs/x",
            "outputs",
            "outputs/a b",
        ),
        *(
            "..",
            "a//b",
            "a--b",
            "a..b",
            "models\\student",
            "a/b.git",
            "my model",
            "-x",
            "a/" + "b" * 97,
            "s3://bucket/m",
        ),
        "",
    ],
)
def test_a_missing_model_folder_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(StartupError) as error:
        check_model_folder("student.model", path)
    assert f"student.model = {path!r}" in str(error.value) and "save_pretrained" in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        check_model_folder("teacher.model", str(tmp_path))
    (tmp_path / "config.json").touch()
    check_model_folder("teacher.model", str(tmp_path))


def test_an_adapter_alone_is_refused_as_a_model_and_beside_one_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(StartupError, match=r"is an adapter without its model; .*--lora\.adapter$"):
        check_model_folder("student.model", str(tmp_path))
    (tmp_path / "config.json").touch()
    check_model_folder("student.model", str(tmp_path))


@pytest.mark.parametrize("files", [["model.safetensors"], ["model-00001-of-00002.safetensors", "pytorch_model.bin"]])
def test_weights_in_safetensors_are_accepted_also_beside_others(files: list[str], tmp_path: Path) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    check_weights("student.model", str(tmp_path))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["pytorch_model.bin"], "only pytorch_model.bin"),
        (["pytorch_model-00001-of-00002.bin", "tokenizer.json"], "only pytorch_model-00001-of-00002.bin"),
        (["model.pt"], "only model.pt"),
        (["model.gguf"], "only model.gguf"),
        (["tokenizer.json"], "no weights at all"),
        ([], "no weights at all"),
    ],
)
def test_a_folder_without_weights_in_safetensors_is_refused(files: list[str], found: str, tmp_path: Path) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    with pytest.raises(StartupError) as error:
        check_weights("student.model", str(tmp_path))
    for part in (f"student.model = {str(tmp_path)!r}: there is {found}, ", "safetensors alone", "save_pretrained"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "role", [["rollout", "--student.model"], ["teacher", "--teacher.engine", "vllm", "--teacher.model"]]
)
def test_pickled_weights_are_refused_before_vllm_starts(
    role: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    port = [f"--{role[0]}.port", str(free_port(LOOPBACK, 0))]
    with pytest.raises(SystemExit) as ended:
        main([*role, str(tmp_path), *port])
    said = capsys.readouterr().err
    assert ended.value.code == 3 and len(said.splitlines()) == 1 and "only pytorch_model.bin" in said


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_is_left_to_the_loader(name: str) -> None:
    check_model_folder("student.model", name)
    check_weights("student.model", name)


@pytest.mark.parametrize(
    "load",
    [load_tokenizer, load_model_config, partial(load_causal_lm, dtype="float32")],
    ids=["tokens", "config", "lm"],
)
def test_a_hub_id_that_cannot_be_loaded_may_have_been_meant_as_a_folder(
    load: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        StartupError, match=r"'ours/studnet'.*; there is no folder 'ours/studnet' here, so it was taken"
    ):
        load("ours/studnet", key="student.model")


def test_a_folder_that_cannot_be_loaded_is_not_called_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError) as error:
        load_causal_lm(str(tmp_path), dtype="float32")
    assert "hub id" not in str(error.value)


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, partial(load_causal_lm, dtype="float32")])
def test_every_loader_names_the_option_of_a_missing_folder(load: Callable[..., object]) -> None:
    with pytest.raises(StartupError, match=r"teacher\.model = '\./none' is no model folder \(it does not exist\)"):
        load("./none", key="teacher.model")


def test_arguments_that_a_model_does_not_take_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    with pytest.raises(StartupError, match="with the further arguments atn_implementation: "):
        load_causal_lm(folder, dtype="float32", init_kwargs={"atn_implementation": "eager"})


def test_the_rollout_command_looks_for_a_hub_id_before_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match="there is no folder 'ours/studnet' here"):
        server.run(RunConfig(student={"model": "ours/studnet"}, rollout={"port": free_port(LOOPBACK, 0)}))


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


def test_a_free_port_is_never_one_that_another_role_took(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("x", LOOPBACK, 0) as one, bind("x", LOOPBACK, 0) as two:
        offered, free = one.getsockname()[1], two.getsockname()[1]
    offers = iter([offered, offered, free])
    really_bind = startup.bind
    monkeypatch.setattr(startup, "bind", lambda section, host, port: really_bind(section, host, port or next(offers)))
    # the preferred port and what the system offers first are both taken by other roles
    assert free_port(LOOPBACK, offered, frozenset({offered})) == free


@pytest.mark.parametrize("host", available_loopbacks())
def test_a_port_is_taken_in_its_own_family(host: str) -> None:
    port = free_port(host, 0)
    with bind("x", host, port) as listener:
        listener.listen()
        assert listener.getsockname()[:2] == (host, port)
        assert free_port(host, port) != port
        with pytest.raises(StartupError, match=rf"teacher\.port = {port} cannot be used on {host}: .*stop the program"):
            check_port("teacher", host, port)


@pytest.mark.parametrize(
    ("found", "family"),
    [
        ([("::1", socket.AF_INET6), ("127.0.0.1", socket.AF_INET)], socket.AF_INET),
        ([("::1", socket.AF_INET6)], socket.AF_INET6),
    ],
)
def test_a_name_of_both_families_is_listened_on_as_vllm_does(
    found: list[tuple[str, socket.AddressFamily]], family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [(kind, socket.SOCK_STREAM, 6, "", (address, 7)) for address, kind in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert startup.socket_address("localhost", 7) == (family, (found[-1][0], 7))


def test_a_host_that_is_not_ours_is_named() -> None:
    for host in ("192.0.2.1", "2001:db8::1", "no-such-host.invalid"):
        with pytest.raises(
            StartupError, match=rf"rollout\.host = '{host}' cannot be listened on: .*an address of this machine"
        ):
            check_port("rollout", host, 0)
    with pytest.raises(StartupError, match=r"host = '192\.0\.2\.1' cannot be listened on"):
        free_port("192.0.2.1", 0)


def test_a_model_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(StartupError, match="is no model folder"):
        check_model_folder("student.model", str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_an_output_folder_that_cannot_be_written_says_why(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, whom no file mode keeps out.
    def refuse(path: Path, **_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(StartupError, match=rf"output\.dir = .*out.* cannot be written: {error.strerror}"):
        check_output_room(tmp_path / "out")


@pytest.mark.parametrize(("free", "fits"), [((1 << 30) - 1, False), (1 << 30, True)])
def test_a_run_needs_one_gibibyte(free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if fits:
        check_output_room(tmp_path)
    else:
        with pytest.raises(StartupError, match=r"1023 MiB left.*at least 1024.*--output\.dir on another disk"):
            check_output_room(tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["teacher", "--teacher.model", "./no-such"], "teacher.model = './no-such'"),
        (
            ["up", "--student.model", "./none", "--teacher.model", "t", "--data.path", "d", "--pipeline.steps", "1"],
            "student.model = './none'",
        ),
    ],
)
def test_the_command_line_ends_with_one_line_and_code_3(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    line = capsys.readouterr().err
    assert exit_info.value.code == 3
    assert line.startswith("distillserve: ") and line.count("\n") == 1 and expected in line


def test_a_teacher_on_a_taken_port_ends_with_one_line_and_code_3(
    taken_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit) as exit_info:
        main(["teacher", "--teacher.model", str(tmp_path), "--teacher.port", str(taken_port)])
    assert exit_info.value.code == 3
    assert f"teacher.port = {taken_port} cannot be used on 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH"])
def test_a_path_too_long_for_sockets_is_refused_with_the_fix(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    short = tempfile.TemporaryDirectory(dir="/tmp")
    fits = f"{short.name}/".ljust(70, "x")
    for folder in (fits, fits + "x"):
        Path(folder).mkdir()
    monkeypatch.setenv(variable, fits)
    check_socket_folder()
    with closing(socket.socket(socket.AF_UNIX)) as probe:  # vLLM's own name in it, of the longest kind that there is
        probe.bind(f"{fits}/{uuid.uuid4()}")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(variable, fits + "x")
    with pytest.raises(StartupError, match=rf"{variable} = .*: 71 bytes, at most 70; run with {variable}=/tmp"):
        check_socket_folder()
    with closing(socket.socket(socket.AF_UNIX)) as probe, pytest.raises(OSError, match="too long"):
        probe.bind(f"{fits}x/{uuid.uuid4()}")
    short.cleanup()


def test_a_port_that_somebody_reserved_or_listens_on_is_not_reserved_again() -> None:
    first = reserve_port("rollout", "127.0.0.1", free_port("127.0.0.1", 0))
    second = reserve_port("rollout", "127.0.0.1", first.port)
    assert second.port != first.port
    port = first.port
    first.release()
    third = reserve_port("rollout", "127.0.0.1", port)
    assert third.port == port
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert reserve_port("rollout", "127.0.0.1", listener.getsockname()[1]).port != listener.getsockname()[1]
    second.release()
    third.release()


def test_a_host_that_is_not_ours_is_named_by_its_option() -> None:
    with pytest.raises(StartupError, match=r"^rollout\.host = '192\.0\.2\.1' cannot be listened on"):
        reserve_port("rollout", "192.0.2.1", 8100)


def test_no_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", _disk_full)
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    with pytest.raises(StartupError, match=r"^TMPDIR = .* cannot be written; free some space"):
        check_socket_folder()


def _disk_full() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
