"""A key is checked where it is read, and no error shows it."""

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.cli import main
from services.clients import BlockingTeacherClient, RolloutClient, TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.config.keys import Secrets, key_headers, make_key, require_key_beyond_loopback, reveal
from services.errors import ConfigError, InputError
from tests.unit.services.config.commands import refused
from tests.unit.services.weight_transfer.controls import control

KEY = "SENTINEL-0f9"
NAMES = {"rollout_key": "DISTILLSERVE_ROLLOUT_KEY", "teacher_key": "DISTILLSERVE_TEACHER_KEY"}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES.values():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.mark.parametrize("attribute", NAMES)
@pytest.mark.parametrize("around", ["", "\n", " ", "\r\n", "\t"])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_key_comes_from_its_variable_or_its_file_without_what_is_around_it(
    attribute: str, around: str, in_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_bytes((around + KEY + around).encode())
    if in_file:
        monkeypatch.setenv(f"{NAMES[attribute]}_FILE", str(path))
    else:
        monkeypatch.setenv(NAMES[attribute], around + KEY + around)
    found = Secrets()
    assert reveal(getattr(found, attribute)) == KEY
    assert [name for name in NAMES if getattr(found, name) is not None] == [attribute]
    assert KEY not in repr(found) + repr(getattr(found, attribute))


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES.values():
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(f"{name}_FILE", "")
    assert Secrets().rollout_key is None and Secrets().teacher_key is None


BAD_KEYS = {
    "two words": (f"{KEY} {KEY}", "white space at character 13 of 25"),
    "two lines": (f"{KEY}\n{KEY}\n", "white space at character 13"),
    "not ASCII": (f"{KEY}é", "no printable ASCII character at character 13"),
    "a control character": (f"\x1b{KEY}", "no printable ASCII character at character 1 "),
    "white space alone": (" \n", "is empty"),
    "too long": (KEY * 1000, "longer than 4,096 characters"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_KEYS.values(), ids=BAD_KEYS)
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("attribute", NAMES)
def test_what_is_no_key_is_one_line_that_names_its_place_alone(
    bad: str, reason: str, in_file: bool, attribute: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = NAMES[attribute] + ("_FILE" if in_file else "")
    path = tmp_path / "key"
    path.write_bytes(bad.encode())
    monkeypatch.setenv(name, str(path) if in_file else bad)
    with pytest.raises(ConfigError) as error:
        getattr(Secrets(), attribute)
    line = str(error.value)
    assert name in line and reason in line and "SENTINEL" not in line and "\n" not in line
    assert not in_file or str(path) in line


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfekey", b"a\0b"])
def test_a_file_without_a_key_is_refused(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ConfigError, match=r"DISTILLSERVE_TEACHER_KEY_FILE = .*key' (is empty|has no printable)"):
        _ = Secrets().teacher_key


def test_a_file_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        monkeypatch.setenv("DISTILLSERVE_ROLLOUT_KEY_FILE", str(path))
        with pytest.raises(ConfigError, match=f"DISTILLSERVE_ROLLOUT_KEY_FILE = '{path}' cannot be read: {reason}"):
            _ = Secrets().rollout_key


def test_a_pipe_is_refused_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key is read more than once; a shell's <(...) would give it once and then nothing, for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY_FILE", str(tmp_path / name))
        with pytest.raises(ConfigError, match="cannot be read: it is a pipe; name a file"):
            _ = Secrets().teacher_key


def test_variable_and_file_exclude_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILLSERVE_ROLLOUT_KEY", KEY)
    monkeypatch.setenv("DISTILLSERVE_ROLLOUT_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="are both set; unset one") as error:
        _ = Secrets().rollout_key
    assert KEY not in str(error.value)
    assert Secrets().teacher_key is None  # the other server's is nobody's concern here


@pytest.mark.parametrize("command", ["teacher", "rollout"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_server_with_a_bad_key_does_not_start(
    command: str,
    host: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"DISTILLSERVE_{command.upper()}_KEY"
    monkeypatch.setenv(name, f"{KEY} ")
    monkeypatch.setenv(f"{name}_FILE", "elsewhere")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                command,
                {"teacher": "--teacher.model", "rollout": "--student.model"}[command],
                "m",
                f"--{command}.host",
                host,
            ]
        )
    said = capsys.readouterr()
    assert ended.value.code == 2 and name in said.err and KEY not in said.err + said.out
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("name", NAMES.values())
def test_a_trainer_with_a_bad_key_does_not_start(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(name, f"{KEY} {KEY}")
    options = ["--student.model", "m", "--data.path", "d", "--pipeline.steps", "1", "--output.dir", str(tmp_path)]
    said = refused(capsys, "train", *options)
    assert said.startswith(f"distillserve: {name} has white space") and KEY not in said


@pytest.mark.parametrize("client", [TeacherClient, BlockingTeacherClient, RolloutClient, VllmTeacherClient])
def test_a_client_sends_a_stripped_key_and_refuses_what_is_none(client: type) -> None:
    with pytest.raises(InputError, match="key has white space at character 13") as error:
        client(["http://a:1"], key=f"{KEY} {KEY}")
    assert KEY not in str(error.value)
    with pytest.raises(InputError, match="key is a bytes"):
        client(["http://a:1"], key=KEY.encode())
    made = client(["http://a:1"], key=f"{KEY}\n")
    inner = getattr(made, "_client", made)
    assert inner._http.headers["Authorization"] == f"Bearer {KEY}"
    if inner is not made:
        made.close()


async def test_weight_control_sends_a_stripped_key_and_refuses_what_is_none() -> None:
    with pytest.raises(InputError, match="key has white space"):
        control(None, ["http://a:1"], key=f"{KEY} {KEY}")
    client = control(None, ["http://a:1"], key=f"{KEY}\n")
    assert client._http.headers["Authorization"] == f"Bearer {KEY}"
    await client.close()


def test_made_keys_are_keys_and_differ() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key_headers(key) == {"Authorization": f"Bearer {key}"} and len(key) >= 32 for key in made)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_listening_beyond_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"DISTILLSERVE_TEACHER_KEY is not set.*DISTILLSERVE_TEACHER_KEY_FILE"):
        require_key_beyond_loopback("teacher", host, None)


@pytest.mark.parametrize("command", ["teacher", "rollout"])
def test_a_public_server_without_a_key_does_not_start(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"DISTILLSERVE_{command.upper()}_KEY"
    model = {"teacher": "--teacher.model", "rollout": "--student.model"}[command]
    line = refused(capsys, command, model, "m", f"--{command}.host", "0.0.0.0")
    for text in (f"{command}.host = '0.0.0.0'", name, "127.0.0.1"):
        assert text in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_loopback_needs_none(host: str) -> None:
    require_key_beyond_loopback("teacher", host, None)


def test_a_key_opens_the_world_and_an_empty_one_does_not() -> None:
    require_key_beyond_loopback("teacher", "0.0.0.0", SecretStr("k"))
    with pytest.raises(ConfigError, match="is not set"):
        require_key_beyond_loopback("teacher", "0.0.0.0", SecretStr(""))


def test_a_file_of_somebody_else_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY_FILE", str(path))
    with pytest.raises(ConfigError, match="cannot be read: Permission denied; name a file"):
        _ = Secrets().teacher_key
