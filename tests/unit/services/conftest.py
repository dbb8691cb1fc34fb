"""What tests of the clients share."""

import asyncio

import pytest


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the code under test wanted to sleep; it does not."""
    asked: list[float] = []
    really_sleep = asyncio.sleep

    async def record(delay: float) -> None:
        asked.append(delay)
        await really_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    return asked
