"""How clients are built, and what they make of servers that are not what was asked for; over real sockets."""

import ast
import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from services.clients import BlockingTeacherClient, RolloutClient, TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.errors import ConfigError, PeerError, WeightSyncError
from services.http.connections import CLIENT_IDLE_S, NAME_GRACE_S, SERVER_IDLE_S, async_client
from services.process.startup import free_port
from tests.certificates import server_context, write_certificate
from tests.loopbacks import available_loopbacks
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.services.weight_transfer.controls import control

ROOT = Path(__file__).parents[4]
HTTP_200 = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def answering(answer: bytes, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[str]:
    """HOST:PORT of a server that says `answer` to whatever it is sent, and hangs up."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        spoken = tls.wrap_socket(connection, server_side=True) if tls else connection
                        spoken.recv(1 << 16)
                        spoken.sendall(answer)
                        spoken.close()
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"[{host}]:{listener.getsockname()[1]}" if ":" in host else f"{host}:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def opens_connections(call: ast.Call) -> bool:
    """Whether it is a function of httpx that takes the environment's proxies unless it is told otherwise."""
    names = {"Client", "AsyncClient", "get", "post", "put", "patch", "delete", "head", "options", "request", "stream"}
    function = call.func
    return (
        isinstance(function, ast.Attribute)
        and function.attr in names
        and isinstance(function.value, ast.Name)
        and function.value.id == "httpx"
    )


def test_one_place_builds_the_clients() -> None:
    """Every other one would forget what this one knows: no proxies, certificates, idle times."""
    builders, imports = set(), set()
    for path in [*ROOT.glob("services/**/*.py"), *ROOT.glob("trainer/**/*.py")]:
        tree = ast.parse(path.read_text())
        builders |= {path.name for call in calls(tree) if opens_connections(call)}
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            others = {"requests", "aiohttp", "urllib3", "urllib.request", "http.client", "websockets"}
            if isinstance(node, ast.ImportFrom) and node.module == "httpx":
                imports.add(path.name)
            imports |= {path.name for module in modules if module in others}
    assert builders == {"connections.py"} and imports == set()


def test_the_tests_own_clients_leave_the_proxies_alone_too() -> None:
    forgetful = [
        f"{path.name}:{call.lineno}"
        for path in ROOT.glob("tests/**/*.py")
        for call in calls(ast.parse(path.read_text()))
        if opens_connections(call) and not {"transport", "trust_env"} & {keyword.arg for keyword in call.keywords}
    ]
    assert forgetful == []


NONSENSE = {
    "an unreachable proxy": ("http://127.0.0.1:9", ""),
    "no URL": ("http://[nonsense", "[::1"),
    "a scheme of an extra": ("socks5://127.0.0.1:9", "example.org"),
    "no such scheme": ("nonsense://", "*.["),
}


@pytest.fixture(params=NONSENSE)
def proxies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable that names proxies, in both spellings."""
    proxy, exceptions = NONSENSE[request.param]
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, exceptions if name == "no_proxy" else proxy)


async def test_no_client_takes_the_environments_proxies(proxies: None) -> None:
    with answering(HTTP_200) as place:
        for kind in (TeacherClient, VllmTeacherClient, RolloutClient):
            async with kind([f"http://{place}"]) as client:
                await client.wait_ready(0.0)
        async with async_client([], 5.0) as plain:
            assert (await plain.get(f"http://{place}/ready")).is_success


def test_no_client_for_threads_does_either(proxies: None) -> None:
    with answering(HTTP_200) as place, BlockingTeacherClient([f"http://{place}"]) as client:
        client.wait_ready(0.0)


def test_no_netrc_adds_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    teacher = ScriptedTeacher()
    with teacher.serving(), BlockingTeacherClient([teacher.url]) as client:
        client.info()
    assert teacher.keys == {None}


def test_idle_connections_are_closed_by_the_client_first() -> None:
    assert 2 * CLIENT_IDLE_S <= SERVER_IDLE_S
    client = async_client([], 1.0)
    transport: Any = client._transport
    assert transport._pool._keepalive_expiry == CLIENT_IDLE_S


# ------------------------------------------------------------------------------------------- TLS


def test_a_server_is_trusted_by_the_certificates_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(HTTP_200, server_context(tmp_path)) as place, BlockingTeacherClient([f"https://{place}"]) as client:
        with pytest.raises(PeerError, match=r"its certificate is not trusted.*SSL_CERT_FILE"):
            client.wait_ready(60.0)
        monkeypatch.setenv("SSL_CERT_FILE", str(write_certificate(tmp_path)))
        with BlockingTeacherClient([f"https://{place}"]) as knowing:
            knowing.wait_ready(60.0)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SSL_CERT_FILE", "{}/none.pem", "SSL_CERT_FILE = .*none.pem' in the environment cannot be used: No such file"),
        ("SSL_CERT_FILE", "{}/text", "no certificates in PEM form; correct it or unset it"),
        ("SSL_CERT_DIR", "{}/none", "SSL_CERT_DIR = .*none' in the environment is no folder"),
    ],
)
def test_certificates_that_are_not_there_are_named_where_they_count(
    name: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("hello")
    monkeypatch.setenv(name, value.format(tmp_path))
    with pytest.raises(ConfigError, match=said):
        TeacherClient(["http://h", "https://h"])
    TeacherClient(["http://h"])


# ------------------------------------------------------------------------------------------- servers that are no servers


REDIRECT = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://me:s3cret@other/\r\nContent-Length: 0\r\n\r\n"
STRANGERS = {
    "another program": (
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "it is not a distillserve teacher server",
    ),
    "a key": (
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
        "wants a key; give it in DISTILLSERVE_TEACHER_KEY",
    ),
    "no entry": (
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        "wants a key; give it in DISTILLSERVE_TEACHER_KEY",
    ),
    "a redirect": (REDIRECT, "points to https://...@other/; give the URL of the server itself in teacher_client.urls"),
    "no HTTP": (b"-ERR unknown\r\n\r\n", "(speaks no HTTP|no HTTP is spoken there)"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02F", "speaks TLS: give it with https://"),
    "not what it says": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", "DecodingError"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_what_no_wait_will_change_is_not_waited_for(stranger: str) -> None:
    answer, said = STRANGERS[stranger]
    with answering(answer) as place:
        async with asyncio.timeout(20.0), TeacherClient([f"http://{place}"]) as client:
            with pytest.raises(PeerError, match=f"^http://{place} .*{said}") as caught:
                await client.wait_ready(600.0)
            with pytest.raises(PeerError, match=f"^http://{place}") as refused:
                await client.score([([1, 2], 1)], top_k=1)
    assert "s3cret" not in str(caught.value) + str(refused.value)


@pytest.mark.parametrize("said", [b"-ERR unknown command\r\n", b"SSH-2.0-OpenSSH_9.9\r\n"])
async def test_a_port_of_another_protocol_is_not_waited_for(said: bytes) -> None:
    """Its client only sees that the connection ends, as it does at a proxy whose server is still starting."""
    with answering(said) as place:
        async with asyncio.timeout(20.0), TeacherClient([f"http://{place}"]) as client:
            with pytest.raises(
                PeerError, match=f"http://{place} speaks no HTTP .*{said[:8].decode()}.*teacher_client.urls"
            ):
                await client.wait_ready(600.0)


async def test_a_proxy_whose_server_is_to_come_is_waited_for() -> None:
    with answering(b"") as place:
        async with TeacherClient([f"http://{place}"]) as client:
            with pytest.raises(PeerError, match=r"is not ready after 1 s: it cannot be reached: .*disconnected"):
                await client.wait_ready(1.0)


async def test_a_server_that_takes_connections_and_answers_nothing_is_slow_and_the_option_named_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with asyncio.timeout(8.0), RolloutClient([url]) as client:
            with pytest.raises(PeerError, match=r"is not ready after 1 s: it is connected but slow: ") as error:
                await client.wait_ready(1.0)
    assert str(error.value).count("rollout_client.startup_timeout_s") == 1 and "look at its log" in str(error.value)


async def test_tls_where_http_is_expected_is_not_waited_for(tmp_path: Path) -> None:
    with answering(HTTP_200, server_context(tmp_path)) as place:
        async with asyncio.timeout(20.0), RolloutClient([f"http://{place}"]) as client:
            with pytest.raises(
                PeerError, match=f"http://{place} speaks TLS: give it with https://; correct rollout_client.urls"
            ):
                await client.wait_ready(600.0)


async def test_http_where_tls_is_expected_is_not_waited_for() -> None:
    with answering(HTTP_200) as place:
        async with asyncio.timeout(20.0), RolloutClient([f"https://{place}"]) as client:
            with pytest.raises(PeerError, match=f"https://{place} cannot be reached: no TLS .* is it http://"):
                await client.wait_ready(600.0)
            with pytest.raises(PeerError, match="no TLS"):
                await client.info()


async def test_one_server_that_is_wrong_is_found_while_others_start() -> None:
    with answering(STRANGERS["another program"][0]) as stranger:
        starting = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}"
        async with asyncio.timeout(20.0), TeacherClient([starting, f"http://{stranger}"]) as client:
            with pytest.raises(PeerError, match=f"http://{stranger} .*is not a distillserve teacher server"):
                await client.wait_ready(600.0)


async def test_a_server_of_another_kind_is_named(waits: list[float]) -> None:
    async with TeacherClient(["http://a"], transport=httpx.MockTransport(lambda _: httpx.Response(404))) as client:
        with pytest.raises(PeerError, match="http://a/v1/teacher/info answered 404: it is not a distillserve teacher"):
            await client.info()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_key_is_said_to_be_the_key(status: int) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json={"detail": "no"}))
    async with RolloutClient(["http://a"], transport=transport) as client:
        with pytest.raises(
            PeerError, match=f"answered {status}: no; it wants a key; give it in DISTILLSERVE_ROLLOUT_KEY"
        ):
            await client.info()
    with pytest.raises(WeightSyncError, match="give its key in DISTILLSERVE_ROLLOUT_KEY"):
        await control(transport.handler, ["http://a"]).resume()


# ------------------------------------------------------------------------------------------- names


def unresolved(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no name") from socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def undecided(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("later") from socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize(("handler", "patience_s"), [(unresolved, NAME_GRACE_S), (undecided, 600.0)])
async def test_a_name_that_does_not_resolve_is_not_waited_for_as_long_as_a_model(
    handler: Callable[[httpx.Request], httpx.Response], patience_s: float, clock: SimpleNamespace
) -> None:
    """A container's name is known once it starts; a resolver that cannot tell may later."""
    clock.now = 0.0
    client = RolloutClient(["http://a"], transport=httpx.MockTransport(handler))
    with pytest.raises(PeerError, match=f"http://a is not ready after {patience_s:.0f} s: it cannot be reached"):
        await client.wait_ready(600.0)
    assert patience_s < clock.now < patience_s + 1


async def test_a_name_that_was_never_right_is_no_outage(clock: SimpleNamespace) -> None:
    options: dict[str, Any] = {"outage_s": 300.0, "clock": clock.monotonic}
    client = TeacherClient(["http://a"], transport=httpx.MockTransport(unresolved), **options)
    with pytest.raises(
        PeerError, match=r"no teacher has answered for 20 s .*http://a cannot be reached: no such host name"
    ):
        await client.score([([1, 2], 1)], top_k=1)


async def test_a_name_that_is_lost_is_an_outage(clock: SimpleNamespace) -> None:
    """A server that is moved to another machine has none for a while."""

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200) if request.url.path == "/ready" else unresolved(request)

    options: dict[str, Any] = {"outage_s": 300.0, "clock": clock.monotonic}
    client = TeacherClient(["http://a"], transport=httpx.MockTransport(handler), **options)
    await client.wait_ready(1.0)
    with pytest.raises(PeerError, match="no teacher has answered for 300 s"):
        await client.score([([1, 2], 1)], top_k=1)


# ------------------------------------------------------------------------------------------- slow is not unreachable


SLOW = [
    (httpx.ReadTimeout, "is connected but slow: no answer within 7 s .*; raise {}"),
    (httpx.WriteTimeout, "is connected but takes nothing of the request within 7 s .*; raise {}"),
    (httpx.PoolTimeout, "is not asked: all 256 connections of this client are in use for 7 s .*raise {}"),
    (httpx.ConnectTimeout, "cannot be reached: no connection within 7 s .*host, port and the firewalls"),
]


@pytest.mark.parametrize(("error", "said"), SLOW)
async def test_what_ran_out_of_time_is_said_with_the_option_to_raise(
    error: type[httpx.TransportError], said: str, waits: list[float]
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error("")

    transport = httpx.MockTransport(handler)
    how = r".* \(GET, 2 tries in \d+\.\d s\)"
    for kind, url in ((TeacherClient, "http://a/v1/teacher/info"), (RolloutClient, "http://a/v1/rollouts/info")):
        option = f"{url.split('/')[4].removesuffix('s')}_client.request_timeout_s .*timeout_s"
        async with kind(["http://a"], timeout_s=7.0, attempts=2, transport=transport) as client:
            with pytest.raises(PeerError, match=f"^{url} .*{said.format(option)}{how}"):
                await client.info()
    # A server has time to say itself that its stage was too long.
    longer = said.replace("7 s", "(7|27) s").format("weight_sync.stage_timeout_s")
    with pytest.raises(WeightSyncError, match=f"resume on http://a failed after .* {longer}"):
        await control(handler, ["http://a"], stage_timeout_s=7.0).resume()
    async with TeacherClient(["http://a"], timeout_s=7.0, outage_s=0.0, transport=transport) as client:
        with pytest.raises(
            PeerError, match=f"http://a {said.format('teacher_client.request_timeout_s .*--timeout-s')}"
        ):
            await client.score([([1, 2], 1)], top_k=1)


async def test_a_server_that_is_connected_to_and_silent_is_not_called_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with TeacherClient([url], timeout_s=0.2, attempts=1) as client:
            with pytest.raises(PeerError, match=f"{url}/v1/teacher/info is connected but slow: no answer within 0.2 s"):
                await client.info()


async def test_nothing_that_listens_is_said_to_be_that() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}"
    async with TeacherClient([url], attempts=1) as client:
        with pytest.raises(
            PeerError, match=rf"{url}/v1/teacher/info cannot be reached: nothing listens there .*\(GET, 1 try"
        ):
            await client.info()


# ------------------------------------------------------------------------------------------- IPv6


@pytest.mark.parametrize("host", available_loopbacks())
async def test_a_client_reaches_an_address_of_either_family(host: str) -> None:
    with answering(HTTP_200, host=host) as place:
        async with RolloutClient([f"http://{place}"]) as client:
            await client.wait_ready(0.0)
        await control(None, [f"http://{place}"]).resume()
