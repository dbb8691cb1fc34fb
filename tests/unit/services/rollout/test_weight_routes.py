"""The stages of a push as a rollout server runs them: whose, in which order, with which deadline, and what is left afterwards."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message
from vllm.v1.engine.exceptions import EngineDeadError

from services.errors import RequestError
from services.rollout import weights
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState

RUN = "a1b2"


@dataclass
class Engine:
    """vLLM's engine client with two data-parallel engines of two workers; `answers` says what a method returns in a worker."""

    calls: list[str] = field(default_factory=list)
    answers: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    version: str = "default"
    wrong: float = 0.0
    generated: list[tuple[list[int], Any, dict[str, Any]]] = field(default_factory=list)

    @property
    def vllm_config(self) -> Any:
        return SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))

    @property
    def engine_core(self) -> "Engine":
        return self

    async def call_utility_all_async(
        self, name: str, method: str, timeout: None, arguments: tuple[Any, ...], _: Any
    ) -> Any:
        assert name == "collective_rpc"
        self.calls.append(method)
        usual = {"problem": None, "changed": False}
        answer = self.answers.get(method, lambda rank: usual)
        found = [[answer(2 * engine + worker) for worker in range(2)] for engine in range(2)]
        return [[await a if asyncio.iscoroutine(a) else a for a in workers] for workers in found]

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def update_weight_version(self, label: str) -> None:
        self.calls.append(f"version {label}")
        self.version = label

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        ids = prompt["prompt_token_ids"]
        self.generated.append((ids, params, options))
        positions = [[], *([9999, token] for token in ids[1:])]  # each position also holds its likeliest token
        ends = [sum(map(len, positions[: i + 1])) for i in range(len(positions))]
        flat = SimpleNamespace(
            token_ids=[token for position in positions for token in position],
            logprobs=[self.wrong] * 99
            if self.wrong
            else [
                -0.1 if token == 9999 else -float(token) - options["data_parallel_rank"]
                for p in positions
                for token in p
            ],
            start_indices=[0, *ends[:-1]],
            end_indices=ends,
        )
        completion = SimpleNamespace(weight_versions=[SimpleNamespace(version=self.version)])
        yield SimpleNamespace(finished=True, prompt_logprobs=flat, outputs=[completion])


@dataclass
class Server:
    engine: Engine = field(default_factory=Engine)
    state: RolloutState = field(default_factory=lambda: RolloutState(RolloutSettings("m", "gloo", 1, 1, 1)))

    async def post(self, stage: str, body: bytes | None = None, run: str = RUN, **fields: Any) -> Any:
        return await self._ask("POST", stage, json.dumps({"run": run, **fields}).encode() if body is None else body)

    async def status(self) -> Any:
        return await self._ask("GET", "status", b"")

    async def _ask(self, method: str, stage: str, body: bytes) -> Any:
        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        app = SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))
        path = f"/v1/weights/{stage}"
        scope = {"type": "http", "method": method, "path": path, "headers": [], "app": app}
        response = await weights.ROUTES[method, path](Request(scope, receive), self.state)
        return json.loads(bytes(response.body))

    async def hold(self, run: str = RUN, **fields: Any) -> Any:
        return await self.post("hold", run=run, **{"name": "a test", "lease_s": 30.0, **fields})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Held by `RUN`."""
    server = Server()
    await server.hold()
    server.engine.calls.clear()
    yield server
    if server.state.watching is not None:
        server.state.watching.cancel()


async def test_a_push_is_these_calls_in_this_order(server: Server) -> None:
    server.engine.answers["weights_receive"] = lambda rank: {"problem": None, "checksums": [f"of {rank}"]}
    await server.post("pause", drain_s=1.0)
    await server.post("connect", rendezvous={}, timeout_s=7.0)
    assert server.state.timeout_s == 7.0
    await server.post("start")
    answer = await server.post("receive", update={})
    assert [worker["checksums"] for worker in answer["workers"]] == [["of 0"], ["of 1"], ["of 2"], ["of 3"]]
    await server.post("finish", label=f"3.1@{RUN}")
    assert not server.state.admission.is_open  # the canary comes first
    await server.post("resume")
    assert server.state.admission.is_open and server.state.policy_version == f"3.1@{RUN}"
    assert server.engine.calls == [
        "pause wait True",
        "weights_discard",
        "weights_connect",
        "weights_start",
        "weights_receive",
        "version mixed",
        "weights_finish",
        f"version 3.1@{RUN}",
        "resume",
    ]


@pytest.mark.parametrize("stage", ["connect", "pause", "start", "receive", "finish", "canary", "resume", "release"])
async def test_a_run_that_does_not_hold_the_server_is_refused_every_stage(stage: str, server: Server) -> None:
    bodies = {
        "connect": {"rendezvous": {}, "timeout_s": 1.0},
        "pause": {"drain_s": 1.0},
        "receive": {"update": {}},
        "finish": {"label": "1.1@other"},
        "canary": {"sequences": [[1, 2]]},
    }
    with pytest.raises(RequestError, match=f"held by the run {RUN}") as error:
        await server.post(stage, run="other", **bodies.get(stage, {}))
    assert error.value.status == 409 and server.engine.calls == []
    assert server.state.holder.lease is not None and server.state.holder.lease.run == RUN


@pytest.mark.parametrize(
    ("stage", "body", "field"),
    [
        ("receive", b"[" * 100_000, "(root)"),
        ("receive", b'{"update":' * 100_000, "(root)"),
        ("start", b"\xff\xfe\xfd", "(root)"),
        ("start", b"[]", "(root)"),
        ("start", b"{}", "run"),
        ("start", b'{"run": "a1b2", "more": 1}', "more"),
        ("start", b'{"run": "no run id"}', "run"),
        ("receive", b'{"run": "a1b2"}', "update"),
        ("finish", b'{"run": "a1b2", "label": "7"}', "label"),
        ("finish", b'{"run": "a1b2", "label": "7.0@a1b2"}', "label"),
        ("pause", b'{"run": "a1b2", "drain_s": 0}', "drain_s"),
        ("canary", b'{"run": "a1b2", "sequences": [[1]]}', "sequences.0"),
        ("hold", b'{"run": "a1b2", "name": "n", "lease_s": 1e9}', "lease_s"),
    ],
)
async def test_what_is_no_body_of_a_stage_is_refused_by_its_field(
    stage: str, body: bytes, field: str, server: Server
) -> None:
    with pytest.raises(RequestError) as error:
        await server.post(stage, body=body)
    assert (error.value.status, error.value.field) == (422, field)
    assert len(str(error.value)) < 300 and server.engine.calls == []


async def test_a_worker_that_fails_is_named_with_its_stage_and_no_later_call_hears_of_it(server: Server) -> None:
    server.engine.answers["weights_receive"] = lambda rank: {"problem": "RuntimeError: lost" if rank == 2 else None}
    with pytest.raises(RequestError, match="receive failed in worker 2: RuntimeError: lost"):
        await server.post("receive", update={})
    await server.post("connect", rendezvous={}, timeout_s=1.0)


async def test_weights_change_only_while_nobody_samples(server: Server) -> None:
    with pytest.raises(RequestError, match="pause it before its weights change"):
        await server.post("start")
    assert server.engine.calls == []


async def test_an_engine_that_is_paused_is_not_paused_again_until_it_has_run(server: Server) -> None:
    for _ in range(2):
        await server.post("pause", drain_s=1.0)
    assert server.engine.calls == ["pause wait True"]
    await server.post("finish", label=f"1.1@{RUN}")
    await server.post("pause", drain_s=1.0)
    assert server.engine.calls.count("pause wait True") == 2


async def test_what_was_discarded_half_way_has_no_version(server: Server) -> None:
    server.engine.answers["weights_discard"] = lambda rank: {"problem": None, "changed": rank == 3}
    await server.post("connect", rendezvous={}, timeout_s=1.0)
    assert server.state.policy_version == server.engine.version == "mixed"


async def test_a_stage_that_takes_too_long_is_given_up_and_status_names_it_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_ANSWER_S", 0.05)
    server.state.timeout_s = 0.05
    server.engine.answers["weights_receive"] = lambda rank: asyncio.sleep(0.1, {"problem": None})
    receiving = asyncio.create_task(server.post("receive", update={}))
    await asyncio.sleep(0.01)
    status = await server.status()
    assert status["workers"] is None and status["stage"]["name"] == "receive" and status["stage"]["seconds"] < 1
    with pytest.raises(RequestError, match=r"receive: no answer of the engine within 0\.\d s") as error:
        await receiving
    assert error.value.status == 504
    status = await server.status()  # the engine is still at it, and is not asked
    assert status["workers"] is None and status["stage"]["name"] == "receive"
    await asyncio.sleep(0.6)
    assert len((await server.status())["workers"]) == 4


async def test_a_second_stage_waits_for_the_first_and_not_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_ANSWER_S", 0.1)
    server.state.timeout_s = 0.1
    go = asyncio.Event()

    async def slow() -> dict[str, Any]:
        await go.wait()
        return {"problem": None}

    server.engine.answers["weights_receive"] = lambda rank: slow()
    first = asyncio.create_task(server.post("receive", update={}))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(server.post("connect", rendezvous={}, timeout_s=0.1))
    await asyncio.sleep(0.05)
    assert server.engine.calls == ["weights_receive"]
    go.set()
    await asyncio.gather(first, second)
    assert server.engine.calls == ["weights_receive", "weights_discard", "weights_connect"]


async def test_a_dead_engine_is_said_to_be_dead(server: Server) -> None:
    def dead(rank: int) -> None:
        raise EngineDeadError

    server.engine.answers["weights_start"] = dead
    server.state.admission._open.clear()
    with pytest.raises(RequestError, match="the engine of this server has died") as error:
        await server.post("start")
    assert error.value.status == 503


async def test_status_tells_what_the_server_and_its_workers_know(server: Server) -> None:
    server.engine.answers["weights_status"] = lambda rank: {"problem": "once", "label": f"of {rank}"}
    status = await server.status()
    assert status["boot_id"] == server.state.boot_id and status["policy_version"] == "default" and status["admits"]
    assert status["holder"]["run"] == RUN and status["holder"]["name"] == "a test" and status["holder"]["left_s"] > 29
    assert [worker["label"] for worker in status["workers"]] == ["of 0", "of 1", "of 2", "of 3"]
    assert status["stage"] is None and status["in_flight"] == 0


async def test_a_canary_is_scored_before_whatever_waits_in_every_data_parallel_engine(server: Server) -> None:
    server.state.policy_version = server.engine.version = f"4.1@{RUN}"
    answer = await server.post("canary", sequences=[[5, 6, 7], [8, 9]])
    assert answer["policy_version"] == f"4.1@{RUN}"
    assert answer["token_logprobs"] == [[[-6.0, -7.0], [-9.0]], [[-7.0, -8.0], [-10.0]]]
    assert {options["priority"] for *_, options in server.engine.generated} == {-1}
    assert all(params.max_tokens == 1 and params.prompt_logprobs == 0 for _, params, _ in server.engine.generated)


async def test_a_canary_under_another_version_is_an_error(server: Server) -> None:
    server.state.policy_version = f"4.1@{RUN}"
    with pytest.raises(RequestError, match=r"answered under \['default'\], not 4\.1@a1b2"):
        await server.post("canary", sequences=[[5, 6]])


async def test_a_released_server_samples_and_belongs_to_nobody(server: Server) -> None:
    await server.post("pause", drain_s=1.0)
    await server.post("release")
    assert server.state.admission.is_open and server.state.holder.lease is None
    assert server.engine.calls[-3:] == ["weights_discard", "weights_disconnect", "resume"]
    await server.hold("other")


async def test_who_takes_a_server_over_finds_nothing_of_the_run_before(server: Server) -> None:
    await server.post("pause", drain_s=1.0)
    server.engine.calls.clear()
    await server.hold("other", take_over=True)
    assert server.engine.calls == ["weights_discard", "weights_disconnect", "resume"] and server.state.admission.is_open
    server.engine.calls.clear()
    await server.hold("other")
    assert server.engine.calls == []
    await server.hold("third", take_over=True)
    assert server.engine.calls == ["weights_discard", "weights_disconnect"]  # an engine that runs is not resumed


async def test_a_stage_that_waited_while_the_server_changed_hands_is_refused(server: Server) -> None:
    go = asyncio.Event()

    async def slow() -> dict[str, Any]:
        await go.wait()
        return {"problem": None, "changed": False}

    server.engine.answers["weights_receive"] = lambda rank: slow()
    receiving = asyncio.create_task(server.post("receive", update={}))
    await asyncio.sleep(0.01)
    finishing = asyncio.create_task(server.post("finish", label=f"1.1@{RUN}"))
    await asyncio.sleep(0.01)
    taking = asyncio.create_task(server.hold("other", take_over=True))
    await asyncio.sleep(0.01)
    go.set()
    await receiving
    with pytest.raises(RequestError, match="held by the run other"):
        await finishing
    await taking
    assert "weights_finish" not in server.engine.calls


async def test_a_server_that_cannot_be_cleared_for_a_new_holder_is_not_held(server: Server) -> None:
    server.engine.answers["weights_discard"] = lambda rank: {"problem": "stuck", "changed": False}
    with pytest.raises(RequestError, match="hold failed in worker 0: stuck"):
        await server.hold("other", take_over=True)
    assert server.state.holder.lease is None
    del server.engine.answers["weights_discard"]
    await server.hold("other")
    assert server.engine.calls[-2:] == ["weights_discard", "weights_disconnect"]


async def test_weights_that_were_finished_half_way_have_no_name(server: Server) -> None:
    server.engine.answers["weights_finish"] = lambda rank: {"problem": "lost" if rank == 3 else None}
    with pytest.raises(RequestError, match="finish failed in worker 3: lost"):
        await server.post("finish", label=f"5.1@{RUN}")
    await server.post("release")
    assert server.state.policy_version == server.engine.version == "mixed"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
async def test_a_canary_that_is_no_number_is_an_error_of_its_server(wrong: float, server: Server) -> None:
    server.engine.wrong = wrong
    with pytest.raises(RequestError, match="the engine's logprobs are not finite"):
        await server.post("canary", sequences=[[5, 6]])


async def test_a_holder_that_is_gone_in_the_middle_of_a_push_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_WATCH_S", 0.01)
    server = Server()
    await server.hold(lease_s=0.15)
    await server.post("pause", drain_s=1.0)
    await server.post("start")

    async def complete() -> str:
        async with server.state.admission.admitted():
            return server.state.policy_version

    server.engine.answers["weights_discard"] = lambda rank: {"problem": None, "changed": True}
    assert await asyncio.wait_for(complete(), 5.0) == "mixed"
    assert server.state.holder.lease is None and server.engine.calls[-1] == "resume"
    assert server.state.watching is not None
    server.state.watching.cancel()


async def test_a_run_that_lives_is_waited_for_in_the_middle_of_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_WATCH_S", 0.01)
    server = Server()
    await server.hold(lease_s=0.2)
    await server.post("pause", drain_s=1.0)
    for _ in range(6):
        await asyncio.sleep(0.05)
        await server.hold(lease_s=0.2)
    assert not server.state.admission.is_open and server.state.watching is not None
    server.state.watching.cancel()
