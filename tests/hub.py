"""A model hub on loopback that speaks the HTTP API of huggingface.co as far as an upload needs it, and keeps what it got.

Large files come over the LFS protocol (no Xet storage, as hubs of one's own have none). What it stores it checks itself: sizes,
SHA-256 sums, the metadata of a model card.
"""

import asyncio
import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.responses import StreamingResponse

TOKEN = "hf_standInToken0123456789abcdefABCDEF"
READ_TOKEN = "hf_readOnlyToken0123456789abcdefABCDE"
OWNER = "me"

_REPO_ID_LENGTH = 96


@dataclass
class Repo:
    """A repository: files of each branch, and the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Hub:
    """What the hub holds, and how it fails.

    Attributes:
        faults: status by what is asked ("create", "preupload", "lfs", "commit", "branch", "yaml"), e.g. {"commit": 500};
            "broken" closes the connection in mid-answer, "silent" never answers.
        asked: what was asked, in order.
        left: set to end the silence.
    """

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What is in a branch, but for what the hub itself put there."""
        return {
            name: content for name, content in self.repos[repo].branches[branch].items() if name != ".gitattributes"
        }

    def write(self, repo: str, folder: Path, branch: str = "main") -> Path:
        """The files of a branch, in a folder."""
        for name, content in self.files(repo, branch).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> None:
        self.repos[repo] = Repo(private)
        self.repos[repo].branches["main"].update(files)


@contextmanager
def running_hub() -> Iterator[Hub]:
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(f"http://127.0.0.1:{listener.getsockname()[1]}")
    server = uvicorn.Server(uvicorn.Config(_app(hub), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub
    finally:
        hub.left.set()
        server.should_exit = True
        thread.join()


def _app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.post("/api/repos/create")
    async def create(request: Request) -> Response:
        if (refusal := await _refusal(hub, request, "create")) is not None:
            return refusal
        body = await request.json()
        name = f"{body.get('organization') or OWNER}/{body['name']}"
        if not name.startswith(f"{OWNER}/"):
            return _error(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}"
            )
        if name in hub.repos:
            return JSONResponse({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
        hub.repos[name] = Repo(private=body.get("visibility") == "private")
        return JSONResponse({"url": f"{hub.url}/{name}"})

    @app.get("/api/models/{owner}/{name}")
    async def info(request: Request, owner: str, name: str) -> Response:
        if (refusal := await _refusal(hub, request, "info", read=True)) is not None:
            return refusal
        if (repo := hub.repos.get(f"{owner}/{name}")) is None:
            return _no_repo()
        return JSONResponse({"id": f"{owner}/{name}", "private": repo.private, "sha": "0" * 40, "siblings": []})

    @app.get("/api/models/{owner}/{name}/tree/{revision:path}")
    async def tree(request: Request, owner: str, name: str, revision: str) -> Response:
        if (refusal := await _refusal(hub, request, "tree", read=True)) is not None:
            return refusal
        if (files := _branch(hub, owner, name, revision)) is None:
            return _no_revision(revision)
        return JSONResponse(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    @app.post("/api/models/{owner}/{name}/branch/{branch:path}")
    async def branch(request: Request, owner: str, name: str, branch: str) -> Response:
        if (refusal := await _refusal(hub, request, "branch")) is not None:
            return refusal
        branches = hub.repos[f"{owner}/{name}"].branches
        if branch in branches:
            return _error(409, "Reference already exists")
        branches[branch] = dict(branches["main"])
        return JSONResponse({})

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request) -> Response:
        if (refusal := await _refusal(hub, request, "yaml")) is not None:
            return refusal
        errors = metadata_errors((await request.json())["content"])
        return JSONResponse({"errors": [{"message": one} for one in errors], "warnings": []}, 400 if errors else 200)

    @app.post("/api/models/{owner}/{name}/preupload/{revision:path}")
    async def preupload(request: Request, owner: str, name: str, revision: str) -> Response:
        if (refusal := await _refusal(hub, request, "preupload")) is not None:
            return refusal
        if _branch(hub, owner, name, revision) is None:
            return _no_revision(revision)
        files = (await request.json())["files"]
        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in files
        ]
        return JSONResponse({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, owner: str, name: str) -> Response:
        if (refusal := await _refusal(hub, request, "batch")) is not None:
            return refusal
        answers = []
        for one in (await request.json())["objects"]:
            upload = {"href": f"{hub.url}/lfs/{one['oid']}?signature=secret-of-the-address"}
            actions = {} if one["oid"] in hub.objects else {"actions": {"upload": upload}}
            answers.append({**one, **actions})
        return JSONResponse({"objects": answers, "transfer": "basic"})

    @app.put("/lfs/{oid}")
    async def put(request: Request, oid: str) -> Response:
        if (refusal := await _fault(hub, "lfs")) is not None:
            return refusal
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return _error(400, "the content is not what was announced")
        hub.objects[oid] = content
        return Response()

    @app.post("/api/models/{owner}/{name}/commit/{revision:path}")
    async def commit(request: Request, owner: str, name: str, revision: str) -> Response:
        if (refusal := await _refusal(hub, request, "commit")) is not None:
            return refusal
        if (files := _branch(hub, owner, name, revision)) is None:
            return _no_revision(revision)
        header, *operations = (json.loads(line) for line in (await request.body()).splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        hub.repos[f"{owner}/{name}"].messages.append((revision, header["value"]["summary"]))
        return JSONResponse({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    return app


async def _refusal(hub: Hub, request: Request, what: str, *, read: bool = False) -> Response | None:
    """An error that was asked for, or that of a token that may not do this."""
    fault = await _fault(hub, what)
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if fault is not None:
        return fault
    if token == TOKEN or (read and token == READ_TOKEN):
        return None
    if token == READ_TOKEN:
        return _error(403, "you must use a write token", {"X-Error-Message": "you must use a write token"})
    return _error(401, f"Invalid credentials: {token}", {"X-Error-Message": f"Invalid credentials: {token}"})


async def _fault(hub: Hub, what: str) -> Response | None:
    hub.asked.append(what)
    fault = hub.faults.get(what)
    if fault == "silent":
        await asyncio.to_thread(hub.left.wait)
    if fault == "broken":

        async def torn() -> Any:
            yield b"{"
            raise ConnectionError

        return StreamingResponse(torn(), headers={"content-length": "1000"}, media_type="application/json")
    if fault == "html":
        return Response("<html>a proxy's page</html>", media_type="text/html")
    return _error(fault, "asked for") if isinstance(fault, int) else None


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _no_repo() -> Response:
    return _error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})


def _no_revision(revision: str) -> Response:
    return _error(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})


def _branch(hub: Hub, owner: str, name: str, revision: str) -> dict[str, bytes] | None:
    repo = hub.repos.get(f"{owner}/{name}")
    return None if repo is None else repo.branches.get(revision)


def metadata_errors(card: str) -> list[str]:
    """What huggingface.co refuses in the metadata of a model card."""
    _, header, _ = card.split("---\n", 2)
    data = yaml.safe_load(header)
    errors = []
    base = data.get("base_model")
    if base is not None and (base.count("/") != 1 or len(base) > _REPO_ID_LENGTH or any(c in base for c in " '\"\n")):
        errors.append('"base_model" must be an id of a model')
    if data.get("base_model_relation") not in (None, "finetune", "adapter") or (
        "base_model_relation" in data and base is None
    ):
        errors.append('"base_model_relation" is not allowed')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append('"model-index" lacks a task or a data set')
            if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append('"model-index" has a metric without a number')
    return errors
