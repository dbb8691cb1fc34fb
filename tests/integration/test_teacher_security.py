"""The teacher as a real process and whom it does not trust: callers without the key, and the model's folder."""

import json
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from services.config import TeacherConfig
from services.errors import PROBLEM_MEDIA_TYPE
from services.http.guard import OPEN_PATHS
from services.process.startup import free_port
from services.teacher.server import create_app
from tests.integration.processes import KEY, Server, command, environment, server
from tests.models import save_model

pytestmark = pytest.mark.integration


def routes() -> list[tuple[str, str]]:
    """(method, path) of every route of the application, documentation included, and of some that there are not."""
    app = create_app(TeacherConfig(model="not loaded"))
    found = {(method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods or ()}
    documented = {(method.upper(), path) for path, item in app.openapi()["paths"].items() for method in item}
    assert documented <= found and {("GET", "/docs"), ("GET", "/openapi.json")} <= found
    unknown = {("GET", "/"), ("POST", "/v1/completions"), ("DELETE", "/v1/teacher/info"), ("GET", "/health/x")}
    odd = {
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/HEALTH"),
        ("GET", "/ready%00"),
        ("GET", "/health/../docs"),
    }
    return sorted(found | unknown | odd)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-API-Key": KEY},
        {"Cookie": f"Authorization=Bearer {KEY}"},
    ],
)
def test_no_route_answers_without_the_key_except_health_and_readiness(
    headers: dict[str, str], teacher_server: Server
) -> None:
    with httpx.Client(base_url=teacher_server.url, headers=headers, trust_env=False) as client:
        for method, path in routes():
            response = client.request(method, f"{path}?key={KEY}&authorization=Bearer%20{KEY}")
            if path in OPEN_PATHS:
                assert response.status_code in (200, 405), path
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE and KEY not in response.text


def test_no_route_answers_a_web_page(teacher_server: Server) -> None:
    for key in (f"Bearer {KEY}", ""):
        headers = {"Origin": teacher_server.url, "Authorization": key}
        with httpx.Client(base_url=teacher_server.url, headers=headers, trust_env=False) as client:
            for method, path in [*routes(), ("OPTIONS", "/v1/teacher/logprobs")]:
                response = client.request(method, path)
                assert response.status_code == 403, (method, path)
                assert "access-control-allow-origin" not in response.headers


def test_load_balancers_may_ask_with_head(teacher_server: Server) -> None:
    with httpx.Client(base_url=teacher_server.url, trust_env=False) as client:
        for path in OPEN_PATHS:
            response = client.head(path)
            assert (response.status_code, response.content) == (200, b"")
            assert client.get(path).status_code == 200  # the connection is still in step


def test_with_the_key_every_route_answers(teacher_server: Server) -> None:
    """So that the walk above means something."""
    with teacher_server.client() as client:
        statuses = {path: client.request(method, path).status_code for method, path in routes() if method == "GET"}
    known = ("/docs", "/openapi.json", "/metrics", "/v1/teacher/info", "/v1/teacher/vocabulary")
    assert {statuses[path] for path in known} == {200}


# -------------------------------------------------------------------------------- what ends at the start


def refused(*options: str, key: str = KEY) -> str:
    """The one line that a teacher says which does not start."""
    port = ("--teacher.port", str(free_port("127.0.0.1", 0)))
    run = subprocess.run(
        command("teacher", *port, *options),
        env={**environment(), "DISTILLSERVE_TEACHER_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode in (2, 3), run.stderr
    *before, last = re.split(r"[\r\n]+", run.stderr.strip())
    assert last.startswith("distillserve: ") and "Traceback" not in run.stderr
    assert not [line for line in before if line.startswith("distillserve: ")]
    return last


def test_beyond_loopback_it_needs_a_key(tmp_path: Path) -> None:
    said = refused("--teacher.host", "0.0.0.0", "--teacher.model", str(tmp_path), key="")
    assert "teacher.host = '0.0.0.0'" in said and "DISTILLSERVE_TEACHER_KEY is not set" in said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder."""
    return Path(save_model(tmp_path / "model", "qwen3"))


def canary(folder: Path, name: str) -> Path:
    """A file that exists once the code `name` of the folder has run."""
    return folder / f"{name}-has-run"


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_code(folder: Path, name: str, base: str) -> None:
    """A module whose import leaves its mark, with a class that works."""
    mark = f"pathlib.Path({str(canary(folder, name))!r}).touch()"
    lines = ("import pathlib", f"from transformers import {base}", mark, f"class Custom({base}):", "    pass", "")
    (folder / f"{name}.py").write_text("\n".join(lines))


def test_a_pickle_in_the_place_of_the_weights_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary(folder, "pickle"))))
    said = refused("--teacher.model", str(folder))
    assert "cannot load the model" in said and "safetensors" in said and not canary(folder, "pickle").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # it would have worked
    assert canary(folder, "pickle").exists()


def test_code_that_a_model_cannot_do_without_is_asked_about(folder: Path) -> None:
    add_code(folder, "configuration", "Qwen3Config")
    change(folder / "config.json", model_type="unheard-of", auto_map={"AutoConfig": "configuration.Custom"})
    said = refused("--teacher.model", str(folder))
    assert "Read that code, then pass trust_remote_code = true" in said
    assert not canary(folder, "configuration").exists()


def test_code_beside_a_model_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    add_code(folder, "modeling", "Qwen3ForCausalLM")
    add_code(folder, "tokenization", "PreTrainedTokenizerFast")
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization.Custom"]})
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary(folder, "pickle"))))

    def marks() -> set[str]:
        return {path.name.removesuffix("-has-run") for path in folder.glob("*-has-run")}

    with server("teacher", tmp_path / "1.log", "--teacher.model", str(folder)) as running, running.client() as client:
        body = {"sequences": [{"token_ids": [5, 6], "prompt_length": 1}], "top_k": 1}
        assert client.post("/v1/teacher/logprobs", json=body).status_code == 200
        assert marks() == set()
    with server("teacher", tmp_path / "2.log", "--teacher.model", str(folder), "--teacher.trust_remote_code", "true"):
        assert marks() == {"modeling", "tokenization"}
