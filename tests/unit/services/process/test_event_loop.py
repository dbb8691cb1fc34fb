"""Coroutines run for a main thread that computes: their results, their errors, and their end when a signal comes."""

import asyncio
import os
import signal
import threading
import time

import pytest

from services.process.event_loop import EventLoopThread
from services.process.signals import Interrupted, Interruption, handling


async def thread_of(*arguments: int) -> tuple[int, int]:
    await asyncio.sleep(0)
    return sum(arguments), threading.get_ident()


def test_a_result_and_an_error_come_from_one_other_thread() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("a bug")

    with EventLoopThread(Interruption()) as event_loop:
        (total, thread), (_, again) = event_loop.run(thread_of, 1, 2), event_loop.run(thread_of)
        assert total == 3 and thread == again != threading.get_ident()
        with pytest.raises(ZeroDivisionError, match="a bug"):
            event_loop.run(fail)
        assert event_loop.run(thread_of)[0] == 0


def test_what_is_left_is_cancelled_and_waited_for() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("cleaned up")

    async def begin() -> "asyncio.Task[None]":
        task = asyncio.create_task(endless())
        await asyncio.sleep(0)
        return task

    with EventLoopThread(Interruption()) as event_loop:
        task = event_loop.run(begin)
    assert ended == ["cleaned up"] and task.cancelled()


def test_a_signal_cancels_what_is_waited_for_once_and_waits_for_its_end() -> None:
    """It may itself wait while it cleans up, and is not cancelled again there."""
    ended: list[str] = []

    async def signalled() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0.05)
            ended.append("cleaned up")
            raise

    interruption = Interruption()
    interruption.defer()
    started = time.monotonic()
    with handling(interruption.handle, signal.SIGTERM), EventLoopThread(interruption) as event_loop:
        with pytest.raises(Interrupted, match="ended by SIGTERM"):
            event_loop.run(signalled)
        assert ended == ["cleaned up"]
        interruption.end()
        assert event_loop.run(thread_of, 1)[0] == 1  # what closes a run still works
    assert time.monotonic() - started < 30


def test_a_deferred_signal_is_raised_before_anything_is_waited_for() -> None:
    interruption = Interruption()
    interruption.defer()
    interruption.handle(signal.SIGHUP, None)

    async def forever() -> None:
        await asyncio.sleep(60)

    with EventLoopThread(interruption) as event_loop, pytest.raises(Interrupted, match="ended by SIGHUP"):
        event_loop.run(forever)
