"""Rollout servers that die, come back and take their time, in the virtual time of the running loop."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.clients import RolloutClient
from services.wire.frames import END_OF_STREAM
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutSampling
from tests.servers import rollout_info
from tests.unit.services.clients.answers import frame
from trainer.weights.policy_versions import PolicyVersions

SAMPLING = RolloutSampling(max_new_tokens=4, seed=7)
LABEL = "3.1@run"
NOT_HELD = httpx.Response(409, json={"title": "Not held", "detail": "nobody holds this server"})
Place = tuple[int, int]


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class FakeServer:
    """Completes each prompt with its first id and the seed of the sample, one after the other.

    Attributes:
        completion_s: how long each takes.
        asked: for each request its time, and the first id and seed of each completion that it was for.
        refuse: answers a request, or None.
        spoil: changes the frame of a completion, given its first id and how often that one was asked for.
    """

    url: str
    label: str = LABEL
    boot_id: str = "first"
    is_up: bool = True
    is_silent: bool = False
    is_held: bool = True
    stages: list[str] = field(default_factory=list)
    on_stage: Callable[[str], None] = lambda stage: None
    completion_s: float = 1.0
    asked: list[tuple[float, list[Place]]] = field(default_factory=list)
    polled: list[float] = field(default_factory=list)
    refuse: Callable[[], httpx.Response | None] = lambda: None
    spoil: Callable[[bytes, int, int], bytes] = lambda content, token, times: content
    life: int = 0
    runs: list[str | None] = field(default_factory=list)

    def kill(self) -> None:
        """kill -9: connections break at once, and nothing listens any more."""
        self.is_up = False
        self.life += 1

    def restart(self, label: str = "default") -> None:
        self.life += 1
        self.is_up, self.boot_id, self.label, self.is_held = True, f"boot {self.life}", label, False

    @property
    def num_asked(self) -> int:
        return sum(len(places) for _, places in self.asked)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.001)
        if self.is_silent:
            await asyncio.sleep(request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("silent", request=request)
        if not self.is_up:
            raise httpx.ConnectError("refused", request=request)
        if request.method == "GET":
            self.polled.append(now())
            info = rollout_info(boot_id=self.boot_id, policy_version=self.label)
            return httpx.Response(200, json={} if request.url.path == "/ready" else info.model_dump())
        body = json.loads(request.content)
        if request.url.path.startswith("/v1/weights/"):
            return self._weigh(request, request.url.path.rpartition("/")[2], body)
        if not self.is_held:
            return NOT_HELD
        samples, seed = range(body["samples_per_prompt"]), body["sampling"]["seed"] or 0
        places = [(prompt[0], seed + sample) for prompt in body["prompts"] for sample in samples]
        self.asked.append((now(), places))
        self.runs.append(body["run"])
        if (refusal := self.refuse()) is not None:
            return refusal
        return httpx.Response(200, stream=_Stream(self, request, body, places))

    def _weigh(self, request: httpx.Request, stage: str, body: dict[str, Any]) -> httpx.Response:
        """A stage of a push, as far as a trainer sees it."""
        if stage == "hold":
            self.is_held = True
            return httpx.Response(200, json={"boot_id": self.boot_id})
        self.stages.append(stage)
        self.on_stage(stage)
        if not self.is_up:
            raise httpx.ReadError("connection reset", request=request)
        if not self.is_held:
            return NOT_HELD
        if stage == "finish":
            self.label = body["label"]
        canary = {"policy_version": self.label, "token_logprobs": [[[0.0]]]}
        return httpx.Response(200, json={"receive": {"workers": [{}]}, "canary": canary}.get(stage, {}))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server: FakeServer, request: httpx.Request, body: dict[str, Any], places: list[Place]) -> None:
        self._server, self._request, self._places = server, request, places
        self._num_samples = body["samples_per_prompt"]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        server, life = self._server, self._server.life
        for index, (token, seed) in enumerate(self._places):
            await asyncio.sleep(server.completion_s)
            if server.is_silent:
                await asyncio.sleep(self._request.extensions["timeout"]["read"])
                raise httpx.ReadTimeout("silent", request=self._request)
            if server.life != life:
                raise httpx.ReadError("connection reset", request=self._request)
            prompt, sample = divmod(index, self._num_samples)
            content = frame(prompt, sample, token, seed, version=server.label)
            times = sum((token, seed) in places for _, places in server.asked)
            yield server.spoil(content, token, times)
        yield END_OF_STREAM


class Fleet:
    """Several servers, and a client of them that a run manages."""

    def __init__(self, *hosts: str, is_managed: bool = True, **options: Any) -> None:
        self.servers = {host: FakeServer(f"http://{host}:1") for host in hosts}
        urls = [server.url for server in self.servers.values()]
        self.transport = httpx.MockTransport(lambda request: self.servers[request.url.host].answer(request))
        self.client = RolloutClient(urls, transport=self.transport, clock=now, **({"outage_s": 60.0} | options))
        self.versions = PolicyVersions("run")
        self.versions.set_live(PolicyLabel.parse(LABEL))
        if is_managed:
            self.client.run = "run"
            self.client.group.manage(dict.fromkeys(urls, "first"), self.versions)

    def __getitem__(self, host: str) -> FakeServer:
        return self.servers[host]

    async def generate(self, num_prompts: int, samples: int = 1, **options: Any) -> list[Place]:
        """What comes back: the first id and the seed of each completion."""
        got = await self.client.generate([[10 + i] for i in range(num_prompts)], SAMPLING, samples, **options)
        places = [(10 + c.prompt_index, 7 + c.sample_index) for c in got]
        assert [tuple(c.token_ids.tolist()) for c in got] == places
        return places

    async def push(self, label: str, *hosts: str) -> None:
        """What a push to these servers leaves behind."""
        self.versions.set_live(PolicyLabel.parse(label))
        for host in hosts:
            self[host].label, self[host].is_held = label, True
        self.client.group.pushed({self[host].url: self[host].boot_id for host in hosts})

    async def later(self, seconds: float, act: Callable[[], object]) -> None:
        await asyncio.sleep(seconds)
        act()


def everything(num_prompts: int, samples: int = 1) -> list[Place]:
    return [(10 + prompt, 7 + sample) for prompt in range(num_prompts) for sample in range(samples)]
