"""What shows no sign of life is named, with who waits for it; what is dead ends the run, and what is slow does not."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.config import RunConfig
from services.errors import DistillServeError
from services.process.event_loop import EventLoopThread
from services.process.signals import Interrupted, Interruption, handling
from services.process.waiting import WAITS, Wait, Waits, on_behalf_of, waiting_for
from trainer import watchdog
from trainer.watchdog import Watchdog, watching


def looks(dog: Watchdog, seconds: float) -> None:
    """So many seconds pass, with a look at each."""
    for _ in range(round(seconds)):
        dog.look(1.0)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "trainer.watchdog"]


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def dog(waits: Waits) -> Watchdog:
    return Watchdog(dead_s=300.0, waits=waits)


def test_a_long_wait_is_told_with_growing_intervals(
    dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    wait = waits.add(Wait("step 12", "completions of http://a:1", "completions"))
    wait.alive("14 of 32 have come")
    looks(dog, 59)
    assert lines(caplog) == []
    looks(dog, 600)
    assert [line.split(" s ")[0] for line in lines(caplog)] == [
        f"step 12 has waited {seconds}" for seconds in (60, 120, 240, 480)
    ]
    expected = "step 12 has waited 60 s for completions of http://a:1 without a sign of life: 14 of 32 have come"
    assert lines(caplog)[0] == expected


def test_a_sign_of_life_begins_a_wait_anew(dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    wait = waits.add(Wait("step 1", "scores of http://a:1", "scores"))
    for _ in range(20):
        looks(dog, 50)
        wait.alive()
    assert lines(caplog) == []


@pytest.mark.parametrize("comes_at_once", [True, False])
def test_what_usually_takes_long_is_told_later(
    comes_at_once: bool, dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    wait = waits.add(Wait("step 1", "completions of http://a:1", "completions"))
    looks(dog, 50)
    if comes_at_once:
        wait.has_come = True
    else:
        wait.alive("1 of 2 have come")
        looks(dog, 1)
    waits.remove(wait)
    waits.add(Wait("step 2", "completions of http://a:1", "completions"))
    waits.add(Wait("step 2", "scores of http://b:1", "scores"))
    looks(dog, 149)
    assert [line.split(" without")[0] for line in lines(caplog)] == [
        f"step 2 has waited {seconds} s for scores of http://b:1" for seconds in (60, 120)
    ]
    looks(dog, 2)
    assert "step 2 has waited 150 s for completions" in lines(caplog)[-1]


def test_what_failed_says_nothing_of_how_long_it_usually_takes(
    dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    wait = waits.add(Wait("step 1", "scores of http://a:1", "scores"))
    looks(dog, 50)
    waits.remove(wait)
    waits.add(Wait("step 1", "scores of http://a:1", "scores"))
    looks(dog, 61)
    assert len(lines(caplog)) == 1


def test_of_many_that_wait_for_the_same_one_speaks(
    dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(16):
        waits.add(Wait("step 3", "scores of http://a:1", "scores"))
        looks(dog, 1)
    looks(dog, 100)
    assert len(lines(caplog)) == 1


def test_nobody_was_silent_while_this_process_was_suspended(
    dog: Watchdog, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    dead: list[str] = []
    waits.add(Wait("the run", "rank 1 on node2", "ranks", on_dead=dead.append))
    looks(dog, 50)
    dog.look(100_000.0)
    assert lines(caplog) == [] and dead == []


def test_what_is_dead_is_told_once_and_what_is_slow_never(dog: Watchdog, waits: Waits) -> None:
    dead: list[str] = []
    waits.add(Wait("the run", "rank 1 on node2", "ranks", on_dead=dead.append))
    waits.add(Wait("step 1", "scores of http://a:1", "scores"))
    looks(dog, 299)
    assert dead == []
    looks(dog, 1000)
    assert dead == ["rank 1 on node2 has shown no sign of life for 300 s (trainer.watchdog_s)"]


def test_a_wait_that_fails_has_not_come() -> None:
    with waiting_for("scores", "scores") as good:
        assert not good.has_come
    with pytest.raises(ZeroDivisionError), waiting_for("scores", "scores") as bad:
        raise ZeroDivisionError
    assert good.has_come and not bad.has_come and {good, bad}.isdisjoint(WAITS.now())


async def test_who_waits_is_known_in_tasks_that_are_begun_on_their_behalf() -> None:
    async def work() -> list[tuple[str, str]]:
        with waiting_for("scores of http://a:1", "scores"):
            await asyncio.sleep(0)
            return [(wait.who, wait.what) for wait in WAITS.now()]

    with on_behalf_of("step 7"):
        task = asyncio.create_task(work())
    assert ("step 7", "scores of http://a:1") in await task
    assert all(wait.what != "scores of http://a:1" for wait in WAITS.now())
    assert ("the run", "scores of http://a:1") in await work()


# ------------------------------------------------------------------------------------- the event loop


@pytest.fixture
def stuck() -> Iterator[Callable[[], Any]]:
    """A coroutine function that keeps its loop until the test is over."""
    over = threading.Event()

    async def blocks_the_loop() -> None:
        over.wait(60.0)

    yield blocks_the_loop
    over.set()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.02)
    return RunConfig(trainer={"watchdog_s": 0.4})


@pytest.mark.alone
def test_a_loop_that_a_callback_keeps_ends_the_run_and_names_the_callback(
    fast: RunConfig, stuck: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    interruption = Interruption()
    interruption.defer()
    started = time.monotonic()
    dead = r"the event loop of the pipeline has shown no sign of life for .* does not return"
    with pytest.raises(DistillServeError, match=dead), watching(fast, interruption) as event_loop:
        with pytest.raises(DistillServeError, match=dead):
            event_loop.run(stuck)
        interruption.end()
        event_loop.run(asyncio.sleep, 0.0)  # what closes the run does not wait for it either
    assert time.monotonic() - started < 10.0
    assert any("the run has waited" in line and "event loop" in line for line in lines(caplog))


@pytest.mark.alone
def test_who_trains_meanwhile_ends_at_the_next_micro_batch(fast: RunConfig, stuck: Callable[[], Any]) -> None:
    interruption = Interruption()
    interruption.defer()
    with pytest.raises(DistillServeError, match="does not return"), watching(fast, interruption) as event_loop:
        event_loop.call_soon(lambda: stuck().send(None))
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            interruption.check()
            time.sleep(0.01)


@pytest.mark.alone
def test_a_loop_that_turns_lives_however_long_its_coroutines_wait(fast: RunConfig) -> None:
    with watching(fast, Interruption()) as event_loop:
        event_loop.run(asyncio.sleep, 1.5)


@pytest.mark.alone
def test_the_users_own_function_may_keep_the_loop_as_long_as_it_may_take(fast: RunConfig) -> None:
    async def keeps_the_loop() -> None:
        time.sleep(1.0)

    with watching(fast, Interruption(), slowest_call_s=30.0) as event_loop:
        event_loop.run(keeps_the_loop)


@pytest.mark.alone
def test_ctrl_c_works_beside_the_watchdog_also_where_the_loop_is_stuck(
    fast: RunConfig, stuck: Callable[[], Any]
) -> None:
    interruption = Interruption()
    interruption.defer()
    started = time.monotonic()
    with (
        handling(interruption.handle, signal.SIGINT),
        pytest.raises((Interrupted, DistillServeError)),
        watching(fast, interruption) as event_loop,
    ):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        event_loop.run(stuck)
    assert time.monotonic() - started < 10.0


def test_nothing_is_watched_after_the_end(fast: RunConfig) -> None:
    before = len(WAITS.now())
    with watching(fast, Interruption()) as event_loop:
        event_loop.run(asyncio.sleep, 0.0)
        assert len(WAITS.now()) == before + 1
    assert len(WAITS.now()) == before and isinstance(event_loop, EventLoopThread)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
