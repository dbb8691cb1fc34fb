"""A rollout server without a key makes one, which its user's trainers find and nobody else can read."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from services.clients import RolloutClient, TeacherClient
from services.config import own_key
from services.config.keys import key_headers
from services.config.own_key import check_own_key_folder, own_key_path, publish_own_key
from services.errors import StartupError
from tests.unit.services.weight_transfer.controls import control

PORT = 8100


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_file_is_its_users_alone_also_where_an_earlier_one_was_not(home: Path) -> None:
    path = own_key_path(PORT)
    path.parent.mkdir(parents=True)
    path.write_text("an earlier server's")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        key = publish_own_key(PORT)
    finally:
        os.umask(before)
    assert path.read_text() == f"{key}\n" and path.is_relative_to(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert key_headers(key) and publish_own_key(PORT) != key


def test_new_folders_are_closed_to_others(home: Path) -> None:
    check_own_key_folder(PORT)
    assert stat.S_IMODE(own_key_path(PORT).parent.stat().st_mode) == 0o700


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    path = own_key_path(PORT)
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    publish_own_key(PORT)
    assert not path.is_symlink() and not (tmp_path / "elsewhere").exists()


def test_servers_and_machines_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {own_key_path(8100), own_key_path(8101)}
    monkeypatch.setattr(own_key.platform, "node", lambda: "another")
    assert len(found | {own_key_path(8100), own_key_path(8101)}) == 4


def test_no_room_for_the_file_is_one_line_with_the_way_out(home: Path) -> None:
    (home / ".cache").write_text("no folder")
    for call in (check_own_key_folder, publish_own_key):
        with pytest.raises(StartupError, match=r"cannot write one in .*: Not a directory; .*DISTILLSERVE_ROLLOUT_KEY"):
            call(PORT)


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)  # of a container, unknown to the system
    with pytest.raises(StartupError, match="nobody knows this user's home; set HOME, or DISTILLSERVE_ROLLOUT_KEY"):
        publish_own_key(PORT)
    with pytest.raises(StartupError, match="nobody knows this user's home"):
        check_own_key_folder(PORT)


async def sent(url: str, key: str | None = None) -> str | None:
    """The key that weight control sends."""
    seen: list[httpx.Request] = []
    client = control(lambda request: seen.append(request) or httpx.Response(200, json={}), [url], key=key)
    await client.resume()
    await client.close()
    return seen[0].headers.get("authorization")


async def test_a_client_without_a_key_finds_that_of_this_machine_by_the_port() -> None:
    key = publish_own_key(PORT)
    for host in ("127.0.0.1", "localhost", "[::1]", "127.0.0.2"):
        assert await sent(f"http://{host}:{PORT}") == f"Bearer {key}"
    assert await sent(f"http://127.0.0.1:{PORT}", "given") == "Bearer given"
    for url in ("http://127.0.0.1:8102", f"http://10.0.0.5:{PORT}", f"http://localhost.example:{PORT}"):
        assert await sent(url) is None


async def test_a_server_may_start_after_its_trainer_and_start_again() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200)

    async with RolloutClient([f"http://127.0.0.1:{PORT}"], transport=httpx.MockTransport(answer)) as client:
        await client.wait_ready(1.0)
        keys = []
        for _ in range(2):
            keys.append(publish_own_key(PORT))
            await client.wait_ready(1.0)
    assert seen == [None, *(f"Bearer {key}" for key in keys)]


async def test_a_given_key_is_sent_although_there_is_a_file() -> None:
    publish_own_key(PORT)
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: seen.append(request) or httpx.Response(200))
    async with RolloutClient([f"http://127.0.0.1:{PORT}"], key="given", transport=transport) as client:
        await client.wait_ready(1.0)
    assert seen[0].headers["authorization"] == "Bearer given"


async def test_a_teacher_is_never_sent_the_key_of_a_rollout_server() -> None:
    publish_own_key(PORT)
    seen: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: seen.append(request) or httpx.Response(200))
    async with TeacherClient([f"http://127.0.0.1:{PORT}"], transport=transport) as client:
        await client.wait_ready(1.0)
    assert "authorization" not in seen[0].headers


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("two words"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(""),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
async def test_a_file_that_holds_no_key_is_none(spoil: Callable[[Path], object]) -> None:
    publish_own_key(PORT)
    spoil(own_key_path(PORT))
    assert await sent(f"http://127.0.0.1:{PORT}") is None
