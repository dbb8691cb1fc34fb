"""A push: its stages, who is asked what when something fails, and what is left behind."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.config import RunConfig
from services.errors import PeerError, ServerHeldError, StartupError, WeightSyncError
from services.models import adapters
from services.wire.rollout import RolloutCompletion, VersionSpan
from tests.pushing import Pushing
from tests.servers import rollout_info
from tests.unit.trainer.adapters import disturb
from tests.unit.trainer.weights.push_servers import CPU, URL, Attach, Servers
from trainer.weights import weight_sync
from trainer.weights.weight_sync import WeightSync


def pushed(label: str) -> list[str]:
    return ["start", "send", "compare", f"finish {label}", "canary", "resume"]


async def test_a_push_is_these_stages_over_one_connection_with_one_canary_sampled_before(attach: Attach) -> None:
    servers = Servers()
    trainer = attach(servers)
    metrics = await trainer.push(0)
    assert metrics["canary_residual"] <= 1e-5 and metrics.keys() == {
        "push_s",
        "canary_s",
        "canary_residual",
        "num_rollout_servers",
    }
    await trainer.push(1)
    assert servers.events.count("receive") == 2  # beside the sending, whichever begins first
    assert [e for e in servers.events if e != "receive"] == [
        *("sample", "pause", "connect 1", *pushed("0.1@mine")),
        *("pause", *pushed("1.1@mine")),
    ]
    assert (
        trainer.versions.oldest(
            [RolloutCompletion(0, 0, np.zeros(1), np.zeros(1), "stop", [VersionSpan("1.1@mine", 0, 1)])]
        )
        == 1
    )


async def test_a_push_and_its_canary_are_timed(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = attach(Servers())
    snapshot = await trainer.snapshot(0)
    monkeypatch.setattr(weight_sync, "time", SimpleNamespace(monotonic=iter([10.0, 12.5, 13.0]).__next__))
    metrics = await trainer.sync.publish(snapshot)
    assert (metrics["push_s"], metrics["canary_s"]) == (2.5, 0.5)


@pytest.mark.parametrize(("given", "port"), [({}, 0), ({"master_port": 29555}, 29555)])
async def test_workers_are_met_at_the_configured_address(given: dict[str, int], port: int, attach: Attach) -> None:
    servers = Servers()
    options = {"master_address": "10.1.2.3", "stage_timeout_s": 7.0, "bucket_mib": 3}
    attach(servers, weight_sync=options | given)
    assert servers.sender_arguments == ("gloo", "10.1.2.3", port, 7.0, 3 << 20, CPU)


async def test_a_later_canary_may_differ_by_what_the_first_one_showed(attach: Attach) -> None:
    """0.002 is rounding at first, and after a first push that showed none it is not."""
    small = "garbles a little"
    trainer = attach(Servers([small] * 2))
    assert [(await trainer.push(version))["canary_residual"] for version in (0, 1)] == pytest.approx(
        [0.002] * 2, rel=0.01
    )
    trainer = attach(Servers(["works", small, small]))
    await trainer.push(0)
    with pytest.raises(WeightSyncError, match=r"by 0\.002, more than 0\.0001 \(float32\)"):
        await trainer.push(1)


async def test_the_servers_are_asked_as_this_run_from_its_hold_on(attach: Attach) -> None:
    servers = Servers()
    trainer = attach(servers, output={"dir": "outputs/x"}, weight_sync={"take_over": True})
    await trainer.sync.hold()
    assert servers.run == "mine" == servers.options["run"] and servers.events == ["hold True"]
    assert servers.options["name"].startswith("output.dir 'outputs/x', process ")


@pytest.mark.parametrize(
    "trouble",
    ["breaks", "breaks without a word", "loses a byte", "garbles", "is silent", "fails in a worker", "has no engine"],
)
async def test_a_failed_push_is_repeated_in_full_over_a_new_connection_under_a_new_label(
    trouble: str, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    servers = Servers([trouble, "works"])
    trainer = attach(servers)
    async with asyncio.timeout(8.0):  # whoever fails first ends the broadcast
        assert (await trainer.push(4))["canary_residual"] <= 1e-5
    assert servers.label == "4.2@mine" and "connect 2" in servers.events
    assert "push of version 4 failed, repeating it in full: " in caplog.text
    assert servers.events.count("sample") == 1 and servers.events.count("resume") == 1  # nobody samples under the first
    with pytest.raises(PeerError, match=r"4\.1@mine"):
        trainer.versions.oldest(
            [RolloutCompletion(0, 0, np.zeros(1), np.zeros(1), "stop", [VersionSpan("4.1@mine", 0, 1)])]
        )


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("breaks", "push of version 4: Connection closed by peer$"),
        ("breaks without a word", "push of version 4: TimeoutError$"),
        ("loses a byte", "http://rollout, worker 0: other bytes"),
        ("fails in a worker", "receive on http://rollout answered 500: worker 1: no room"),
        ("fails in a worker, later", "receive on http://rollout answered 500: worker 1: no room"),
        (
            "answers for another run",
            r"canary of version 4 on http://rollout: it answers under 3\.1@yours, not 4\.2@mine",
        ),
        ("has no engine", r"canary of version 4 on http://rollout: it answers under 4\.2@mine"),
        ("garbles", r"canary of version 4 on http://rollout: .* by 0\.02, more than 0\.01 \(float32\)"),
        ("garbles in its second engine", r"canary of version 4 on http://rollout: .* by 0\.02, more than"),
    ],
)
async def test_a_push_that_fails_twice_stops_the_run(trouble: str, message: str, attach: Attach) -> None:
    servers = Servers([trouble] * 2)
    with pytest.raises(WeightSyncError, match=message):
        await attach(servers).push(4)
    assert "resume" not in servers.events


async def test_servers_that_do_not_say_why_a_broadcast_broke_are_given_up(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sync, "_REASON_S", 0.05)
    servers = Servers(["breaks, and never says why"] * 2)
    with pytest.raises(WeightSyncError, match=r"push of version 4: Connection closed by peer$"):
        await attach(servers).push(4)
    async with asyncio.timeout(5.0):
        while servers.num_receiving:
            await asyncio.sleep(0)
    assert servers.events.count("receive") == 2


async def test_what_one_server_samples_before_another_has_resumed_counts(attach: Attach) -> None:
    trainer = attach(Servers(["does not resume everywhere", "works"]))
    await trainer.push(4)
    for label in ("4.1@mine", "4.2@mine"):
        one = RolloutCompletion(0, 0, np.zeros(1), np.zeros(1), "stop", [VersionSpan(label, 0, 1)])
        assert trainer.versions.oldest([one]) == 4


async def test_bytes_that_did_not_arrive_are_found_before_the_update_is_finished(attach: Attach) -> None:
    servers = Servers(["loses a byte"] * 2)
    with pytest.raises(WeightSyncError):
        await attach(servers).push(4)
    assert servers.events.count("compare") == 2 and not [e for e in servers.events if e.startswith("finish")]


async def test_servers_that_have_the_merged_weights_answer_as_the_student_with_its_adapter(attach: Attach) -> None:
    servers = Servers()
    pushing = attach(servers, lora={"r": 4})
    for version in range(3):
        disturb(pushing.learner)
        metrics = await pushing.push_once(version)
        assert metrics["canary_residual"] <= 1e-5
    assert torch.equal(servers.received["lm_head.weight"], pushing.learner.student.model.lm_head.weight)


async def test_weights_without_the_adapter_are_found_before_the_update_is_finished(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers()
    pushing = attach(servers, lora={"r": 4})
    await pushing.push(0)
    disturb(pushing.learner, scale=1e-6)
    monkeypatch.setattr(adapters, "_effective", lambda module, tensors, dtype: tensors["base_layer.weight"].to(dtype))
    servers.events.clear()
    with pytest.raises(WeightSyncError, match=r"the adapter is missing in the weights that were sent: .* and 10 more"):
        await pushing.push(1)
    assert servers.events.count("send") == 2 and not any(event.startswith("finish") for event in servers.events)


async def test_a_server_that_another_run_has_taken_is_not_pushed_to_again(attach: Attach) -> None:
    servers = Servers(["is taken over"])
    with pytest.raises(ServerHeldError, match="held by the run r2"):
        await attach(servers).push(4)
    assert servers.events.count("pause") == 1


async def hanging(trainer: Pushing, servers: Servers) -> "asyncio.Task[dict[str, float]]":
    """A push whose broadcast is under way and does not end by itself."""
    pushing = asyncio.create_task(trainer.push(4))
    while "send" not in servers.events:
        await asyncio.sleep(0.01)
    return pushing


async def test_a_close_ends_a_push_that_hangs_and_gives_the_servers_back(attach: Attach) -> None:
    servers = Servers(["never answers"])
    trainer = attach(servers)
    pushing = await hanging(trainer, servers)
    assert all(thread.daemon for thread in trainer.sync._threads)  # the process may end without it
    started = time.monotonic()
    pushing.cancel()
    await asyncio.wait({pushing})
    assert servers.num_receiving == 0
    await trainer.sync.close()
    assert pushing.cancelled() and time.monotonic() - started < 5.0 and servers.events[-2:] == ["release", "close"]
    assert not any(thread.is_alive() for thread in trainer.sync._threads)


async def test_a_close_beside_a_push_that_nobody_cancelled_ends_it_too(attach: Attach) -> None:
    servers = Servers(["never answers", "never answers"])
    trainer = attach(servers)
    pushing = await hanging(trainer, servers)
    async with asyncio.timeout(5.0):
        await trainer.sync.close()
    assert "broadcast ended" in servers.events
    pushing.cancel()
    await asyncio.wait({pushing})


async def test_a_close_gives_the_servers_back_when_the_broadcast_has_ended(attach: Attach) -> None:
    servers = Servers(["never answers"])
    trainer = attach(servers)
    pushing = await hanging(trainer, servers)
    with servers.busy:
        pushing.cancel()
        closing = asyncio.create_task(trainer.sync.close())
        await asyncio.wait({pushing, closing}, timeout=0.1)
        assert pushing.cancelled() and "release" not in servers.events
    await closing
    assert servers.events[-3:] == ["broadcast ended", "release", "close"]


async def test_a_broadcast_that_ends_after_its_push_was_cancelled_is_no_error(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    unhandled: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    servers = Servers(["never answers"])
    trainer = attach(servers)
    pushing = await hanging(trainer, servers)
    with servers.busy:
        pushing.cancel()
        await asyncio.wait({pushing})
    await trainer.sync.close()
    assert "broadcast ended" in servers.events and not unhandled


@pytest.mark.alone
async def test_the_loop_answers_while_a_push_is_on_its_way(attach: Attach) -> None:
    servers = Servers(["never answers"])
    trainer = attach(servers)
    pushing = await hanging(trainer, servers)
    lags = []
    for _ in range(5):
        before = time.monotonic()
        await asyncio.sleep(0.01)
        lags.append(time.monotonic() - before - 0.01)
    pushing.cancel()
    await asyncio.wait({pushing})
    await trainer.sync.close()
    assert sorted(lags)[2] < 0.05


async def test_running_completions_have_a_time_of_their_own_to_end(attach: Attach) -> None:
    short, long = Servers(), Servers()
    await attach(short, sampling={"max_new_tokens": 10}, weight_sync={"stage_timeout_s": 7.0}).push(0)
    await attach(long, sampling={"max_new_tokens": 1000}, weight_sync={"stage_timeout_s": 7.0}).push(0)
    assert short.drain_s == 7.0 + 2.5 and long.drain_s == 7.0 + 250.0


@pytest.mark.parametrize(
    ("limit", "num_new", "kept"), [(3, 1, 1), (4, 1, 2), (6, 2, 3), (16, 7, 8), (17, 8, 8), (18, 8, 8), (64, 8, 8)]
)
async def test_a_canary_and_the_token_behind_it_fit_into_the_shortest_server(
    limit: int, num_new: int, kept: int, attach: Attach
) -> None:
    servers = Servers()
    trainer = attach(servers, {"max_model_len": limit})
    trainer.sync._prompts = [list(range(40))]
    await trainer.push(0)
    assert servers.asked == [(list(range(40))[-kept:], num_new)]
    assert kept + num_new < limit


async def test_every_server_is_scored(attach: Attach) -> None:
    servers = Servers(["garbles"] * 2, urls=[URL, "http://far"])
    with pytest.raises(WeightSyncError, match="canary of version 0 on http://rollout"):
        await attach(servers).push(0)
    assert servers.world_sizes == [1, 1] and servers.group_sizes == [3, 3]


@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 1e-2), ("cuda:1", 0.1)])
async def test_a_student_in_half_precision_is_compared_as_such(
    device: str, tolerance: float, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside half-precision rollouts it is so on a GPU, whatever the dtype of a server that others have started."""
    sync = attach(Servers(), {"dtype": "float32"}, rollout={"dtype": "bfloat16"}).sync
    monkeypatch.setattr(sync, "_device", torch.device(device))
    await sync.canary()
    assert sync._canary is not None and sync._canary.tolerance == tolerance


async def test_the_canary_is_sampled_anew_as_the_student_moves_on(attach: Attach) -> None:
    servers = Servers()
    pushing = attach(servers)
    for version in range(2 * weight_sync.RENEWED_AFTER + 1):
        await pushing.push(version)
    sampled = [servers.events[:i].count("resume") for i, event in enumerate(servers.events) if event == "sample"]
    assert sampled == [0, weight_sync.RENEWED_AFTER, 2 * weight_sync.RENEWED_AFTER]


async def test_a_canary_that_cannot_be_sampled_anew_stays_for_the_next_push(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushing = attach(Servers())
    monkeypatch.setattr(weight_sync, "RENEWED_AFTER", 1)
    before = await pushing.sync.canary()
    await pushing.push(0)

    async def is_away(*arguments: Any) -> list[RolloutCompletion]:
        raise PeerError("connection refused")

    monkeypatch.setattr(pushing.sync._client, "generate_on", is_away)
    assert (await pushing.push(1))["canary_residual"] < 1e-4
    assert await pushing.sync.canary() is before


def test_weights_are_sent_in_the_servers_dtype(attach: Attach) -> None:
    assert attach(Servers(), {"dtype": "bfloat16"}).sync.rollout_dtype == torch.bfloat16


def test_servers_of_different_dtypes_are_refused(folder: str) -> None:
    infos = [rollout_info(boot_id="a"), rollout_info(boot_id="b", dtype="bfloat16")]
    client = SimpleNamespace(urls=[URL, "http://other"])
    with pytest.raises(StartupError, match="different dtypes"):
        WeightSync(RunConfig(), CPU, client, infos, [], None, "mine")  # type: ignore[arg-type]


def test_both_ends_must_mean_the_same_backend(attach: Attach) -> None:
    with pytest.raises(StartupError, match=r"over nccl, this trainer would send over gloo.*weight_sync\.backend"):
        attach(Servers(), {"weight_transfer_backend": "nccl"})


CARD = "8932f937-d72c-4106-c12f-20bd9faed9f6"


def on_cuda(monkeypatch: pytest.MonkeyPatch, uuid: str) -> Any:
    """GPU 1, and a torch that knows that card."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    return torch.device("cuda:1")


@pytest.mark.parametrize("uuid", [CARD, CARD.upper(), f"GPU-{CARD}"])
def test_nccl_to_a_server_on_the_trainers_own_card_is_refused(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = RunConfig(weight_sync={"backend": "nccl"}), on_cuda(monkeypatch, uuid)
    monkeypatch.setattr(weight_sync, "WeightSender", lambda *arguments: None)
    infos = [
        rollout_info(boot_id=card, weight_transfer_backend="nccl", gpu_uuids=[f"GPU-{card}"])
        for card in (CARD[::-1].lower(), CARD)
    ]
    client = SimpleNamespace(urls=["http://far", URL])
    with pytest.raises(StartupError, match=rf"{URL} runs on this trainer's card GPU-{CARD}.*give student.cuda_devices"):
        WeightSync(config, device, client, infos, [], None, "mine")  # type: ignore[arg-type]
    WeightSync(config, device, SimpleNamespace(urls=["http://far"]), infos[:1], [], None, "mine")  # type: ignore[arg-type]


def test_nccl_from_a_cpu_is_refused() -> None:
    config = RunConfig(weight_sync={"backend": "nccl"})
    client, infos = SimpleNamespace(urls=[URL]), [rollout_info(weight_transfer_backend="nccl")]
    with pytest.raises(StartupError, match="needs the trainer on a GPU, it is on cpu"):
        WeightSync(config, CPU, client, infos, [], None, "mine")  # type: ignore[arg-type]


async def test_what_runs_in_a_thread_is_on_the_models_device_and_waits_for_the_optimizer(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, int]] = []
    sync = attach(Servers()).sync
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda d, name=name: calls.append((name, d, threading.get_ident())))
    monkeypatch.setattr(sync, "_device", on_cuda(monkeypatch, CARD))
    await sync._in_thread(lambda: calls.append(("work", None, threading.get_ident())))
    assert [name for name, *_ in calls] == ["set_device", "synchronize", "work"]
    assert {device for _, device, _ in calls[:2]} == {torch.device("cuda:1")}
    assert len({thread for *_, thread in calls}) == 1 and calls[0][2] != threading.get_ident()
