"""Whole runs whose rollout servers are killed and started again: the client, the pushes and the loop of train, over servers that
are not vLLM's and a group that carries nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from services.errors import EvaluationError, OutageError, PeerError, WeightsWantedError, WeightSyncError
from services.weight_transfer.channel import Update
from services.weight_transfer.control import WeightControlClient
from tests.scripted_teacher import ScriptedTeacher
from tests.unit.services.clients.fleet import FakeServer, Fleet
from tests.unit.trainer.runs import PROMPTS, opener, run_config
from trainer import train as training
from trainer.session import Session
from trainer.train import train
from trainer.weights import weight_sync
from trainer.weights.snapshot import GivenTokens
from trainer.weights.weight_sync import WeightSync

CANARY: Any = SimpleNamespace(given=GivenTokens([[48]], [[49]]))
NUM_STEPS, NUM_PROMPTS, RESTART_S = 4, 8, 0.5


class NoSender:
    """Tells the servers to come and sends nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def connect(self, tell: Callable[[dict[str, Any]], object], world_size: int) -> None:
        tell({"world_size": world_size})

    def update(self, source: Any) -> Update:
        return Update([], [], [], 1)

    def send(self, source: Any) -> list[str]:
        return []

    def abort(self) -> None:
        pass


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    with ScriptedTeacher().serving() as serving:
        yield serving


class Lost:
    """A run and what it trained on.

    Attributes:
        versions: of the completions of each step.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.versions: list[list[int]] = []
        self.before_step: Callable[[int], None] = lambda step: None

    def watch(self, session: Session) -> None:
        step = session.learner.step

        def watched(batch: Any) -> Any:
            self.versions.append(batch.policy_versions.tolist())
            self.before_step(len(self.versions))
            return step(batch)

        self.session = session
        session.learner.step = watched  # type: ignore[method-assign]

    def check_complete(self) -> None:
        assert self.versions == [[version] * NUM_PROMPTS for version in range(NUM_STEPS)]
        asked = [place for server in self.fleet.servers.values() for _, places in server.asked for place in places]
        assert len(asked) >= NUM_STEPS * NUM_PROMPTS


@pytest.fixture
def lost(tiny_model_folder: Any, tmp_path: Path, teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch) -> Any:
    async def canary(self: WeightSync) -> GivenTokens:
        given: GivenTokens = CANARY.given
        return given

    monkeypatch.setattr(weight_sync, "WeightSender", NoSender)
    monkeypatch.setattr(weight_sync, "check_arrival", lambda *_: None)
    monkeypatch.setattr(WeightSync, "canary", canary)
    monkeypatch.setattr(WeightSync, "_check_canary", lambda *_: 0.0)

    def run(hosts: str, disturb: Callable[[Lost], None], **options: Any) -> Lost:
        fleet = Fleet(*hosts, is_managed=False, **options)
        found = Lost(fleet)
        for server in fleet.servers.values():
            server.completion_s, server.is_held, server.boot_id = 0.02, False, server.url
        controls: list[WeightControlClient] = []

        def transported(*arguments: Any, **given: Any) -> WeightControlClient:
            controls.append(WeightControlClient(*arguments, **given, transport=fleet.transport))
            return controls[-1]

        monkeypatch.setattr(weight_sync, "WeightControlClient", transported)

        def prepare(session: Session) -> None:
            client: Any = fleet.client
            client._clock = client.group._clock = time.monotonic
            infos = session.event_loop.run(client.info)
            sync = WeightSync(session.config, torch.device("cpu"), client, infos, PROMPTS[:1], None, "r")
            sync._canary = CANARY
            session.event_loop.run(sync.hold)
            session.weights = session.pipeline._weights = sync
            session.pipeline._client, session.evaluator = client, None
            found.watch(session)
            disturb(found)

        monkeypatch.setattr(training, "open_session", opener(teacher, prepare))
        pipeline = {"steps": NUM_STEPS, "prompts_per_step": NUM_PROMPTS}
        try:
            train(run_config(tiny_model_folder("llama"), tmp_path / "out", pipeline=pipeline))
        finally:
            for control in controls:
                control._lease.close()
        return found

    return run


def restart_later(server: Any) -> None:
    server.kill()
    threading.Timer(RESTART_S, server.restart).start()


def at_completion(number: int, server: Any) -> None:
    """Kill it in the middle of a step, and start it again."""
    seen = []

    def count(content: bytes, token: int, times: int) -> bytes:
        seen.append(token)
        if len(seen) == number:
            restart_later(server)
        return content

    server.spoil = count


@pytest.mark.parametrize("hosts", ["a", "ab"])
@pytest.mark.parametrize("number", [1, 6, 12])
def test_a_server_may_be_killed_in_mid_step(hosts: str, number: int, lost: Any) -> None:
    lost(hosts, lambda run: at_completion(number, run.fleet[hosts[-1]])).check_complete()


@pytest.mark.parametrize("hosts", ["a", "ab"])
def test_a_server_may_be_started_again_while_the_learner_works(hosts: str, lost: Any) -> None:
    def disturb(run: Lost) -> None:
        run.before_step = lambda step: run.fleet["a"].restart() if step == 2 else None

    lost(hosts, disturb).check_complete()


@pytest.mark.parametrize("hosts", ["a", "ab"])
@pytest.mark.parametrize("stage", ["pause", "connect", "start", "receive", "finish", "canary", "resume"])
def test_a_server_may_be_killed_in_each_stage_of_a_push(stage: str, hosts: str, lost: Any) -> None:
    def disturb(run: Lost) -> None:
        server, seen = run.fleet["a"], []

        def kill(name: str) -> None:
            seen.append(name)
            if name == stage and seen.count(name) == (1 if stage == "connect" else 2):
                restart_later(server)

        server.on_stage = kill

    lost(hosts, disturb).check_complete()


def engine_dies_in(stage: str, server: FakeServer, restart: Callable[[], object] = lambda: None) -> None:
    """In the second push; its HTTP server answers on, what needs no engine as if nothing were amiss."""
    answer, seen, has_died = server.answer, [], threading.Event()

    def on_stage(name: str) -> None:
        seen.append(name)
        if name == stage and seen.count(name) == 2:
            has_died.set()
            restart()

    async def answered(request: httpx.Request) -> httpx.Response:
        found = await answer(request)
        if server.life or not has_died.is_set() or request.url.path.endswith(("/hold", "/info")):
            return found
        return httpx.Response(503, json={"title": "Engine dead", "detail": "its log says why"})

    server.on_stage, server.answer = on_stage, answered  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", ["pause", "receive"])
def test_a_server_whose_engine_dies_in_a_push_is_left_out(stage: str, lost: Any) -> None:
    lost("ab", lambda run: engine_dies_in(stage, run.fleet["b"])).check_complete()


def test_a_lone_server_whose_engine_dies_in_a_push_is_waited_for(lost: Any) -> None:
    def disturb(run: Lost) -> None:
        restart = run.fleet["a"].restart
        engine_dies_in("receive", run.fleet["a"], threading.Timer(RESTART_S, restart).start)

    lost("a", disturb).check_complete()


def test_a_lone_server_whose_engine_stays_dead_after_a_push_ends_the_run(lost: Any, tmp_path: Path) -> None:
    with pytest.raises(OutageError, match=r"http://a:1 is not ready: .*answered 503"):
        lost("a", lambda run: engine_dies_in("receive", run.fleet["a"]), outage_s=1.0)
    assert (tmp_path / "out" / "student" / "config.json").exists()


@pytest.mark.parametrize("in_step", [2, NUM_STEPS])
def test_a_push_that_fails_in_an_evaluation_ends_the_run_unless_there_is_no_step_after_it(
    in_step: int, lost: Any
) -> None:
    """The servers wait for one that is whole."""
    runs: list[Lost] = []

    def disturb(run: Lost) -> None:
        runs.append(run)
        has_failed: list[int] = []

        def evaluate(learner: Any, policy_version: int) -> Any:
            if policy_version < in_step:
                raise PeerError("not now")
            has_failed.append(policy_version)
            raise WeightsWantedError("a was started again")

        def fails(stage: str) -> None:
            if stage == "receive" and has_failed:
                raise httpx.ReadTimeout("slow")

        run.fleet["a"].on_stage = fails
        run.session.evaluator = SimpleNamespace(evaluate=evaluate)  # type: ignore[assignment]
        run.session.is_evaluated = lambda step: step == 2  # type: ignore[method-assign]

    with pytest.raises(WeightSyncError if in_step == 2 else EvaluationError, match="receive on http://a:1 failed"):
        lost("a", disturb)
    assert len(runs[0].versions) == in_step


def test_all_servers_may_be_killed_at_once(lost: Any) -> None:
    def disturb(run: Lost) -> None:
        def count(content: bytes, token: int, times: int) -> bytes:
            if len(run.versions) == 2 and run.fleet["b"].life == 0:
                restart_later(run.fleet["a"])
                restart_later(run.fleet["b"])
            return content

        run.fleet["a"].spoil = count

    lost("ab", disturb).check_complete()


def test_servers_that_stay_away_end_the_run_with_the_student_saved(lost: Any, tmp_path: Path) -> None:
    def disturb(run: Lost) -> None:
        run.before_step = lambda step: run.fleet["a"].kill() if step == 2 else None

    with pytest.raises(OutageError, match=r"http://a:1 .*; start it again and run the same command again"):
        lost("a", disturb, outage_s=1.0)
    assert (tmp_path / "out" / "student" / "config.json").exists()


def test_rows_say_how_many_servers_held_the_weights(lost: Any, tmp_path: Path) -> None:
    lost("ab", lambda run: None)
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == NUM_STEPS and all('"num_rollout_servers": 2' in row for row in rows)
