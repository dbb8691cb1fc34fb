"""What tests of the clients share."""

import asyncio
from types import SimpleNamespace

import pytest

from services.clients import base


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that sleeping advances, also that of readiness, and what was slept."""
    fake = SimpleNamespace(now=100.0, waits=[], monotonic=lambda: fake.now)
    really_sleep = asyncio.sleep

    async def sleep(delay: float) -> None:
        fake.now += max(delay, 1e-6)  # a rest below its resolution would be waited for again and again
        fake.waits.append(delay)
        await really_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(base, "time", fake)
    return fake


@pytest.fixture
def waits(clock: SimpleNamespace) -> list[float]:
    """Seconds that the code under test wanted to sleep; it does not."""
    asked: list[float] = clock.waits
    return asked
