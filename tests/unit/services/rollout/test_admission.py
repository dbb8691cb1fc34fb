"""While weights change nobody is let in, and nobody is lost."""

import asyncio

import pytest

from services.errors import RequestError
from services.rollout.admission import Admission


async def test_what_is_in_flight_ends_before_the_gate_is_closed_and_what_comes_waits_until_it_opens() -> None:
    admission, order = Admission(), []
    leave = asyncio.Event()

    async def complete(name: str) -> None:
        async with admission.admitted():
            order.append(f"{name} in")
            await leave.wait()
        order.append(f"{name} out")

    first = asyncio.create_task(complete("first"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(admission.close(10.0))
    await asyncio.sleep(0)
    second = asyncio.create_task(complete("second"))
    await asyncio.sleep(0.01)
    assert order == ["first in"] and not closing.done() and not admission.is_open
    leave.set()
    await closing
    assert order == ["first in", "first out"] and admission.in_flight == 0
    await asyncio.sleep(0.01)
    assert order[-1] == "first out"
    admission.open()
    await asyncio.gather(first, second)
    assert order == ["first in", "first out", "second in", "second out"]


async def test_a_gate_that_opens_and_closes_at_once_lets_nobody_slip_through() -> None:
    admission, inside = Admission(), []

    async def complete() -> None:
        async with admission.admitted():
            inside.append(admission.is_open)

    await admission.close(1.0)
    waiting = asyncio.create_task(complete())
    await asyncio.sleep(0.01)
    admission.open()
    await admission.close(1.0)
    await asyncio.sleep(0.01)
    assert inside == []
    admission.open()
    await waiting
    assert inside == [True]


async def test_completions_that_do_not_end_in_time_are_counted_and_the_gate_opens_again() -> None:
    admission = Admission()
    async with admission.admitted(), admission.admitted():
        with pytest.raises(RequestError, match="2 completions were still in flight 0 s after the pause") as error:
            await admission.close(0.01)
    assert error.value.status == 504 and admission.is_open


async def test_one_that_fails_or_is_cancelled_is_no_longer_in_flight() -> None:
    admission = Admission()
    with pytest.raises(ValueError):
        async with admission.admitted():
            raise ValueError

    async def stay() -> None:
        async with admission.admitted():
            await asyncio.sleep(60)

    task = asyncio.create_task(stay())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    await admission.close(1.0)
