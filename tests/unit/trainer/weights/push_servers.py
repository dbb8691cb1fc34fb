"""Rollout servers and both ends of a push to them, without any of it."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from services.clients.rollout_group import RolloutGroup
from services.errors import PeerError, ServerHeldError, WeightSyncError
from services.weight_transfer.channel import GroupLostError, Update
from services.wire.rollout import RolloutCompletion, RolloutInfo, RolloutSampling, VersionSpan
from services.wire.weights import CanaryScores
from tests.pushing import Pushing

URL = "http://rollout"
CPU = torch.device("cpu")
PROMPT = [40, 50]
Attach = Callable[..., Pushing]


@dataclass
class Servers:
    """Rollout servers and both ends of a push to them. `script` says what goes wrong, one entry a push; the canary is scored
    by a second copy of the model."""

    script: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=lambda: [URL])
    events: list[str] = field(default_factory=list)
    asked: list[tuple[list[int], int]] = field(default_factory=list)
    label: str = "default"
    run: str | None = None
    trouble: str = ""
    aborted: threading.Event = field(default_factory=threading.Event)
    num_receiving: int = 0
    group_sizes: list[int] = field(default_factory=list)
    received: dict[str, torch.Tensor] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Whoever holds it keeps a broadcast that was ended from returning."""
    model: Any = None
    answers: dict[str, RolloutInfo] = field(default_factory=dict)
    """What servers say that are asked how they are; those without an entry are silent."""
    gone: dict[str, list[str]] = field(default_factory=dict)
    """Why servers do not answer after a push that failed, one reason a push."""

    def __post_init__(self) -> None:
        self.group = RolloutGroup(list(self.urls), self._say_how_it_is, 5.0)

    async def _say_how_it_is(self, url: str) -> RolloutInfo:
        if url not in self.answers:
            raise PeerError(f"{url} is silent")
        return self.answers[url]

    # ---- the control client

    def control(self, urls: list[str], boot_ids: list[str], world_sizes: list[int], **options: Any) -> "Servers":
        self.world_sizes, self.options = world_sizes, options
        self.boot_ids = dict(zip(urls, boot_ids, strict=True))
        return self

    async def probe(self) -> dict[str, str]:
        self.events.append("probe")
        return {url: self.gone[url].pop(0) for url in self.urls if self.gone.get(url)}

    async def rejoin(self, url: str, boot_id: str, world_size: int) -> None:
        self.events.append(f"rejoin {url} {boot_id}")
        self.urls.append(url)
        self.world_sizes.append(world_size)
        self.boot_ids[url] = boot_id

    def leave_out(self, url: str) -> None:
        self.events.append(f"leave out {url}")
        index = self.urls.index(url)
        del self.urls[index], self.world_sizes[index], self.boot_ids[url]

    def renew(self, url: str, *, renews: bool) -> None:
        self.events.append(f"{'renew' if renews else 'renew no more'} {url}")

    async def hold(self, take_over: bool, on_wait: Any) -> None:
        self.events.append(f"hold {take_over}")

    async def connect(self, rendezvous: dict[str, Any]) -> None:
        self.events.append(f"connect {rendezvous['master_port']}")

    async def pause(self, drain_s: float) -> None:
        self.trouble = self.script.pop(0) if self.script else "works"
        self.events.append("pause")
        self.drain_s = drain_s

    async def start(self) -> None:
        self.events.append("start")

    async def receive(self, update: dict[str, Any]) -> list[Any]:
        self.events.append("receive")
        self.num_receiving += 1
        try:
            return await self._receive()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)  # a request that is given up takes a moment to end
            self.num_receiving -= 1

    async def _receive(self) -> list[Any]:
        if self.trouble == "is taken over":
            raise ServerHeldError("receive on http://rollout: held by the run r2")
        if self.trouble == "fails in a worker":
            raise WeightSyncError("receive on http://rollout answered 500: worker 1: no room")
        if self.trouble == "fails in a worker, later":
            await asyncio.sleep(0.05)
            raise WeightSyncError("receive on http://rollout answered 500: worker 1: no room")
        if self.trouble in ("never answers", "breaks, and never says why"):
            await asyncio.sleep(3600)
        if self.trouble == "breaks":
            await asyncio.sleep(0.05)
            raise WeightSyncError("receive on http://rollout answered 500: worker 0: the trainer is gone")
        return [["a report"]]

    async def finish(self, label: str) -> None:
        self.events.append(f"finish {label}")
        self.model.load_state_dict(self.received)
        self.label = label

    async def score_canary(self, sequences: list[list[int]]) -> list[CanaryScores]:
        self.events.append("canary")
        if self.trouble == "is silent":
            raise WeightSyncError("canary on http://rollout failed")
        shift = {"garbles": 0.02, "garbles a little": 0.002}.get(self.trouble, 0.0)
        scores = [self._score(sequence, shift) for sequence in sequences]
        label = "3.1@yours" if self.trouble == "answers for another run" else self.label
        engines = {
            "has no engine": [],
            "garbles in its second engine": [scores, [[x + 0.02 for x in s] for s in scores]],
        }
        return [CanaryScores(policy_version=label, token_logprobs=engines.get(self.trouble, [scores]))] * len(self.urls)

    @torch.no_grad()
    def _score(self, sequence: list[int], shift: float) -> list[float]:
        logits = self.model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        return (logits.gather(1, torch.tensor(sequence[1:])[:, None]).squeeze(1) + shift).tolist()

    async def resume(self) -> None:
        self.events.append("resume")
        if self.trouble == "does not resume everywhere":
            raise WeightSyncError("resume on http://rollout failed")

    async def release(self) -> None:
        self.events.append("release")

    async def close(self) -> None:
        self.events.append("close")

    # ---- the sender

    def sender(self, *arguments: Any) -> "Sender":
        self.sender_arguments = arguments
        return Sender(self)

    # ---- the data plane

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        self.events.append("sample")
        self.asked += [(prompt, sampling.max_new_tokens) for prompt in prompts]
        tokens = np.arange(60, 60 + min(2, sampling.max_new_tokens), dtype=np.int32)
        spans = [VersionSpan("default", 0, len(tokens))]
        return [
            RolloutCompletion(i, 0, tokens, np.zeros(len(tokens), np.float32), "stop", spans)
            for i in range(len(prompts))
        ]


@dataclass
class Sender:
    servers: Servers
    num_connections: int = 0

    def connect(self, tell: Callable[[dict[str, Any]], object], world_size: int) -> None:
        self.num_connections += 1
        self.servers.group_sizes.append(world_size)
        self.servers.aborted.clear()
        tell({"master_port": self.num_connections})

    def update(self, source: Any) -> Any:
        return Update([], [], [], 1)

    def send(self, source: Any) -> list[str]:
        servers = self.servers
        servers.events.append("send")
        if servers.trouble == "breaks":
            raise RuntimeError("Connection closed by peer\nand a long story")
        if servers.trouble == "breaks without a word":
            raise TimeoutError
        if servers.trouble == "breaks, and never says why":
            raise GroupLostError("Connection closed by peer")
        if servers.trouble in ("fails in a worker", "fails in a worker, later", "never answers", "is taken over"):
            if servers.trouble == "fails in a worker, later":
                raise GroupLostError("Connection closed by peer")  # heard of before the server's own word
            assert servers.aborted.wait(10.0), "nobody ends the broadcast"
            with servers.busy:
                servers.events.append("broadcast ended")
            raise GroupLostError("aborted")
        self.servers.received = dict(source)
        return ["a checksum"]

    def abort(self) -> None:
        self.servers.aborted.set()
