"""Pushes while rollout servers go and come back: who is left out, who is taken in, and when the run waits or ends."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from services.clients import rollout_group
from services.errors import OutageError, PeerError, ServerHeldError, WeightSyncError
from services.wire.rollout import RolloutCompletion
from tests.servers import rollout_info
from tests.unit.trainer.weights.push_servers import URL, Attach, Servers

FAR = "http://far"
BOTH: dict[str, Any] = {"pipeline": {"min_rollout_servers": 2}, "rollout_client": {"urls": [URL, FAR]}}


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.01)


def two(*script: str, **options: Any) -> Servers:
    return Servers(list(script), urls=[URL, FAR], **options)


async def returned(servers: Servers, url: str = FAR, **info: Any) -> None:
    """A server answers again, as another process unless `info` says otherwise."""
    servers.answers[url] = rollout_info(**{"boot_id": "new"} | info)
    await soon(lambda: url in servers.group.back())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_group, "_FIRST_POLL_S", 0.01)
    monkeypatch.setattr(rollout_group, "_LONGEST_POLL_S", 0.02)


async def test_a_push_is_repeated_at_once_without_a_server_that_is_gone(
    attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    servers = two("fails in a worker", "works", gone={FAR: ["does not answer: refused"]})
    trainer = attach(servers)
    await trainer.sync.hold()
    metrics = await trainer.push(4)
    assert metrics["num_rollout_servers"] == 1 and servers.group_sizes == [3, 2] and servers.label == "4.2@mine"
    assert servers.group.live == [URL] and f"renew no more {FAR}" in servers.events
    assert f"{FAR} is away: it does not answer: refused" in caplog.text
    await servers.group.close()


async def test_servers_that_go_in_a_push_are_not_the_one_failure_that_it_may_have(attach: Attach) -> None:
    servers = two("breaks", "loses a byte", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers)
    assert (await trainer.push(4))["num_rollout_servers"] == 1 and servers.label == "4.3@mine"
    servers.script += ["loses a byte"] * 2
    with pytest.raises(WeightSyncError, match="other bytes"):
        await trainer.push(5)
    await servers.group.close()


async def test_nobody_serves_a_version_of_which_one_server_has_failed_the_canary(attach: Attach) -> None:
    servers = two("garbles", "garbles")
    with pytest.raises(WeightSyncError, match="canary of version 4 on http://rollout"):
        await attach(servers).push(4)
    assert "resume" not in servers.events


async def test_a_server_that_is_back_is_held_anew_and_part_of_the_next_push(attach: Attach) -> None:
    servers = two("breaks", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers)
    await trainer.sync.hold()
    await trainer.push(4)
    await returned(servers, world_size=4)
    servers.events.clear()
    assert (await trainer.push(5))["num_rollout_servers"] == 2
    assert servers.events[0] == f"rejoin {FAR} new" and servers.group_sizes == [3, 2, 6]
    assert servers.group.live == [URL, FAR] and servers.events[-1] == f"renew {FAR}"
    await trainer.push(6)
    assert len(servers.group_sizes) == 3  # one group for as long as nobody goes or comes


async def test_a_server_that_was_away_for_a_moment_between_pushes_is_part_of_the_next_one(attach: Attach) -> None:
    servers = two()
    trainer = attach(servers)
    await trainer.sync.hold()
    await trainer.push(4)
    servers.group.leave(FAR, "cannot be reached")
    servers.answers[FAR] = rollout_info(boot_id=FAR, policy_version="4.1@mine")
    await soon(lambda: FAR in servers.group.live)
    assert (await trainer.push(5))["num_rollout_servers"] == 2 and servers.group_sizes == [3]
    servers.answers.clear()
    servers.group.leave(FAR, "cannot be reached")
    await trainer.push(6)
    servers.answers[FAR] = rollout_info(boot_id=FAR, policy_version="5.1@mine")
    await soon(lambda: FAR in servers.group.back())
    assert (await trainer.push(7))["num_rollout_servers"] == 2 and servers.group_sizes == [3, 2, 3]


async def test_a_lone_server_that_restarts_is_waited_for_by_the_push(attach: Attach) -> None:
    servers = Servers(["breaks", "works"], gone={URL: ["was started again"]})
    trainer = attach(servers)
    await trainer.sync.hold()
    pushing = asyncio.create_task(trainer.push(4))
    await soon(lambda: servers.group.live == [])
    await asyncio.sleep(0.05)
    assert not pushing.done() and servers.events.count("send") == 1
    servers.answers[URL] = rollout_info(boot_id="new")
    assert (await pushing)["num_rollout_servers"] == 1 and servers.label == "4.2@mine"
    assert f"rejoin {URL} new" in servers.events and servers.group.live == [URL]


@pytest.mark.parametrize("boot_id", [URL, "new"], ids=["away", "started again"])
async def test_a_lone_server_that_is_away_at_the_first_canary_is_waited_for(
    boot_id: str, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers()
    generate_on = servers.generate_on

    async def generates(url: str, *arguments: Any) -> list[RolloutCompletion]:
        if url not in servers.answers:
            raise PeerError("connection refused")
        return await generate_on(url, *arguments)

    monkeypatch.setattr(servers, "generate_on", generates)
    trainer = attach(servers)
    await trainer.sync.hold()
    pushing = asyncio.create_task(trainer.push(0))
    await soon(lambda: servers.group.live == [])
    await asyncio.sleep(0.05)
    assert not pushing.done()
    servers.answers[URL] = rollout_info(boot_id=boot_id)
    assert (await pushing)["num_rollout_servers"] == 1 and f"rejoin {URL} {boot_id}" in servers.events
    await servers.group.close()


async def test_a_server_that_answers_and_completes_no_canary_twice_ends_the_run(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, asked = Servers(answers={URL: rollout_info(boot_id=URL)}), []

    async def fails(url: str, *arguments: Any) -> list[RolloutCompletion]:
        asked.append(url)
        raise PeerError(f"{url} answered 500")

    monkeypatch.setattr(servers, "generate_on", fails)
    trainer = attach(servers)
    await trainer.sync.hold()
    with pytest.raises(PeerError, match="answered 500"):
        await trainer.push(0)
    assert asked == [URL, URL]


async def test_a_server_that_is_away_at_the_first_canary_for_too_long_is_an_outage(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers()
    servers.group.outage_s = 0.2

    async def fails(url: str, *arguments: Any) -> list[RolloutCompletion]:
        raise PeerError("connection refused")

    monkeypatch.setattr(servers, "generate_on", fails)
    trainer = attach(servers)
    await trainer.sync.hold()
    with pytest.raises(OutageError, match="the rollout server has not answered for"):
        await trainer.push(0)
    await servers.group.close()


async def test_a_push_waits_for_as_many_servers_as_are_asked_for(attach: Attach) -> None:
    servers = two("breaks", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers, **BOTH)
    pushing = asyncio.create_task(trainer.push(4))
    await soon(lambda: servers.group.live == [URL])
    await asyncio.sleep(0.05)
    assert not pushing.done() and servers.events.count("send") == 1
    servers.answers[FAR] = rollout_info(boot_id="new")
    assert (await pushing)["num_rollout_servers"] == 2


async def test_too_few_servers_for_too_long_are_an_outage(attach: Attach) -> None:
    servers = two("breaks", gone={FAR: ["is gone"]})
    servers.group.outage_s = 0.2
    trainer = attach(servers, **BOTH)
    message = (
        r"fewer than pipeline.min_rollout_servers = 2 rollout servers have answered for 0.2 s \(rollout_client.outage_s\): "
        r"http://far .*; start it again and run the same command again"
    )
    await trainer.sync.hold()
    with pytest.raises(OutageError, match=message):
        await trainer.push(4)
    await servers.group.close()


async def test_a_server_that_is_gone_in_each_push_is_given_up_with_the_outage(attach: Attach) -> None:
    servers = Servers(["breaks"] * 1000, gone={URL: ["is gone"] * 1000})
    trainer = attach(servers, rollout_client={"outage_s": 0.3})
    servers.answers[URL] = rollout_info(boot_id="new")
    async with asyncio.timeout(20.0):
        with pytest.raises(OutageError, match="has not answered for"):
            await trainer.push(4)
    await servers.group.close()


@pytest.mark.parametrize("trouble", ["garbles", "loses a byte", "fails in a worker"])
async def test_a_server_that_is_back_and_fails_its_push_does_not_end_the_run_of_the_others(
    trouble: str, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    servers = two("breaks", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers)
    await trainer.push(4)
    await returned(servers)
    servers.script += [trouble]
    assert (await trainer.push(5))["num_rollout_servers"] == 1 and servers.group.live == [URL]
    assert f"{FAR} is away: it cannot be taken in: " in caplog.text
    await asyncio.sleep(0.1)
    assert servers.group.back() == {}  # this process of it takes no part any more
    servers.answers[FAR] = rollout_info(boot_id="newer")
    await soon(lambda: FAR in servers.group.back())
    assert (await trainer.push(6))["num_rollout_servers"] == 2


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"dtype": "bfloat16"}, "another dtype: bfloat16, not float32"),
        ({"weight_transfer_backend": "nccl"}, "another weight_transfer_backend: nccl, not gloo"),
        ({"vocab_size": 7}, "another vocab_size: 7, not 261"),
        ({"max_model_len": 63}, "a lower max_model_len: 63, below 64"),
        ({"max_logprobs": 1}, "a lower max_logprobs: 1, below 64"),
    ],
)
async def test_a_server_that_comes_back_as_another_one_takes_no_part(
    info: dict[str, Any], said: str, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    servers = two("breaks", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers)
    await trainer.push(4)
    await returned(servers, **info)
    assert (await trainer.push(5))["num_rollout_servers"] == 1
    assert f"{FAR} is away: it was started again with {said}; it takes no part until it is started again" in caplog.text
    assert f"rejoin {FAR} new" not in servers.events
    await servers.group.close()


@pytest.mark.parametrize("error", [ServerHeldError("held by the run r2"), WeightSyncError("hold failed")])
async def test_a_server_that_cannot_be_held_again_costs_the_others_nothing(
    error: Exception, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = two("breaks", "works", gone={FAR: ["is gone"]})
    trainer = attach(servers)
    await trainer.push(4)
    await returned(servers)

    async def refuse(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(servers, "rejoin", refuse)
        assert (await trainer.push(5))["num_rollout_servers"] == 1 and servers.group.live == [URL]
    await soon(lambda: FAR in servers.group.back())
    assert (await trainer.push(6))["num_rollout_servers"] == 2


async def test_the_only_server_in_the_hands_of_another_run_ends_this_one(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(["breaks"], gone={URL: ["was started again"]})
    trainer = attach(servers)
    servers.answers[URL] = rollout_info(boot_id="new")

    async def refuse(*arguments: Any) -> None:
        raise ServerHeldError("held by the run r2")

    monkeypatch.setattr(servers, "rejoin", refuse)
    with pytest.raises(ServerHeldError, match="held by the run r2"):
        await trainer.push(4)
    await servers.group.close()


async def test_a_canary_is_sampled_from_another_server_where_the_first_one_is_away(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, asked = two(), []
    generate_on = servers.generate_on

    async def far_alone(url: str, *arguments: Any) -> list[RolloutCompletion]:
        asked.append(url)
        if url == URL:
            raise PeerError("refused")
        return await generate_on(url, *arguments)

    monkeypatch.setattr(servers, "generate_on", far_alone)
    trainer = attach(servers)
    await trainer.push(0)
    assert asked == [URL, FAR]
    servers = two()
    trainer = attach(servers)
    monkeypatch.setattr(servers, "generate_on", far_alone)
    servers.group.leave(URL, "is gone")
    asked.clear()
    await trainer.sync.canary()
    assert asked == [FAR]
    await servers.group.close()


async def test_a_restart_that_a_renewal_finds_makes_a_server_leave(attach: Attach) -> None:
    servers = two()
    trainer = attach(servers)
    await trainer.sync.hold()
    thread = threading.Thread(target=servers.options["on_restart"], args=(FAR,))
    thread.start()
    thread.join()
    await soon(lambda: servers.group.live == [URL])
    servers.answers[FAR] = rollout_info(boot_id=FAR, policy_version="default")
    await soon(lambda: FAR in servers.group.back())
    await servers.group.close()
