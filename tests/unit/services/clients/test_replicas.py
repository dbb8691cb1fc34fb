"""Which replica is asked, when one leaves, when it is tried again and when it is back; a clock that the test moves."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from services.clients.replicas import Lease, Replicas
from tests.clock import Clock

A, B, C = "http://a", "http://b", "http://c"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Requests that stay under way until the test ends."""
    with ExitStack() as stack:
        yield stack


def three(clock: Clock, *urls: str, **options: Any) -> Replicas:
    return Replicas(list(urls or (A, B, C)), clock=clock, jitter=lambda low, high: high, **options)


def fail(replicas: Replicas, url: str, times: int = 3) -> None:
    others = [u for u in (A, B, C) if u != url]
    for _ in range(times):
        with replicas.lease(others) as lease:
            assert lease.url == url
            replicas.failed(lease, "gone")


def ask(replicas: Replicas) -> str:
    with replicas.lease() as lease:
        replicas.answered(lease)
        return lease.url


def test_the_one_with_the_fewest_requests_in_flight_is_asked(clock: Clock, held: ExitStack) -> None:
    replicas = three(clock)
    requests = [replicas.lease() for _ in range(6)]
    leases = [held.enter_context(request) if i % 3 != 1 else request.__enter__() for i, request in enumerate(requests)]
    assert [lease.url for lease in leases] == [A, B, C, A, B, C]
    for request in requests[1::3]:
        request.__exit__(None, None, None)  # B has answered both of its own
    assert [held.enter_context(replicas.lease()).url for _ in range(3)] == [B, B, A]


def test_idle_replicas_take_turns(clock: Clock) -> None:
    replicas = three(clock)
    assert [ask(replicas) for _ in range(5)] == [A, B, C, A, B]


def test_one_that_was_tried_is_asked_again_only_when_no_other_can_be(clock: Clock) -> None:
    replicas = three(clock)
    with replicas.lease({A, B}) as lease:
        assert lease.url == C
    with replicas.lease({A, B, C}) as lease:
        assert lease.url == A
    assert replicas.has_untried({A, B}) and not replicas.has_untried({A, B, C})


def test_three_failures_in_a_row_eject_and_fewer_do_not(clock: Clock) -> None:
    replicas = three(clock)
    fail(replicas, A, 2)
    assert A in {ask(replicas) for _ in range(3)}  # answered: the row starts anew
    fail(replicas, A, 2)
    assert A in {ask(replicas) for _ in range(3)}
    fail(replicas, A, 3)
    assert {ask(replicas) for _ in range(6)} == {B, C}


def test_an_ejected_one_gets_a_single_request_when_it_is_due_and_is_back_with_its_answer(clock: Clock) -> None:
    replicas = three(clock)
    fail(replicas, A)
    clock.now += 0.99
    assert {ask(replicas) for _ in range(6)} == {B, C}
    clock.now += 0.01
    with replicas.lease() as trial:
        assert trial.url == A
        assert {ask(replicas) for _ in range(6)} == {B, C}  # while the trial is under way
        replicas.answered(trial)
    assert {ask(replicas) for _ in range(6)} == {A, B, C}


def test_the_time_out_doubles_up_to_a_minute_and_starts_anew_after_a_return(clock: Clock) -> None:
    replicas = three(clock)
    fail(replicas, A)
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        clock.now += seconds - 0.01
        assert {ask(replicas) for _ in range(4)} == {B, C}, seconds
        clock.now += 0.01
        fail(replicas, A, 1)
    clock.now += 60
    assert ask(replicas) == A
    fail(replicas, A, 2)
    assert A in {ask(replicas) for _ in range(3)}
    fail(replicas, A, 3)
    clock.now += 1
    assert ask(replicas) == A


def test_one_whose_requests_time_out_is_spared_for_longer_while_another_one_is_in(clock: Clock) -> None:
    replicas = three(clock, A, B)
    for factor in (1, 2, 3, 4, 4):
        with replicas.lease([B]) as lease:
            assert lease.url == A and lease.is_trial == (factor > 1)
            clock.now += 300
            for _ in range(3):
                replicas.failed(lease, "silent")
        clock.now += 300 * factor - 0.01
        assert {ask(replicas) for _ in range(4)} == {B}, factor
        clock.now += 0.01
    with replicas.lease([B]) as lease:
        clock.now += 300
        replicas.failed(lease, "silent")
    clock.now += 60
    fail(replicas, B)
    with replicas.lease([B]) as lease:  # nobody is in any more
        assert lease.url == A and not lease.is_trial


def test_one_may_be_away_for_many_hours(clock: Clock) -> None:
    replicas = three(clock, A)
    fail(replicas, A, 1100)
    clock.now += 60
    assert replicas.has_untried(())


def test_the_time_out_is_jittered_downwards() -> None:
    clock = Clock()
    replicas = Replicas([A, B], clock=clock, jitter=lambda low, high: low)
    fail(replicas, A)
    clock.now += 0.75
    assert ask(replicas) == A


def test_requests_that_were_under_way_when_it_left_change_nothing(clock: Clock, held: ExitStack) -> None:
    replicas = three(clock, A)
    under_way = [held.enter_context(replicas.lease()) for _ in range(8)]
    for lease in under_way[:3]:
        replicas.failed(lease, "gone")
    (replica,) = replicas._replicas
    left = (replica.ejections, replica.due)
    for lease in under_way[3:7]:
        replicas.failed(lease, "gone")
    replicas.answered(under_way[7])
    assert (replica.ejections, replica.due) == left == (1, 101.0)


def test_a_cancelled_trial_leaves_room_for_the_next(clock: Clock) -> None:
    replicas = three(clock)
    fail(replicas, A)
    clock.now += 1
    for _ in range(2):
        with replicas.lease() as lease:
            assert lease.url == A


def test_when_all_are_out_the_one_that_is_due_first_is_tried(clock: Clock) -> None:
    replicas = three(clock)
    for url in (B, A, C):
        fail(replicas, url)
        clock.now += 0.1
    with replicas.lease() as lease:
        assert lease.url == B
        replicas.failed(lease, "gone")
    with replicas.lease() as lease:
        assert lease.url == A
        replicas.answered(lease)
    assert {ask(replicas) for _ in range(3)} == {A}


def test_when_all_are_out_one_that_hangs_in_its_trial_does_not_hold_up_the_others(
    clock: Clock, held: ExitStack
) -> None:
    replicas = three(clock)
    for url in (A, B, C):
        fail(replicas, url)
        clock.now += 0.1
    assert [held.enter_context(replicas.lease()).url for _ in range(4)] == [A, B, C, A]


def test_one_that_asks_for_rest_is_left_alone_but_not_ejected(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    replicas = three(clock)
    with replicas.lease() as lease:
        replicas.rest(lease, 7.0)
    assert {ask(replicas) for _ in range(4)} == {B, C} and replicas.rest_s() == 0
    clock.now += 7
    assert A in {ask(replicas) for _ in range(3)}
    assert caplog.records == []


def test_rest_is_as_long_as_the_first_needs_and_no_longer_than_is_believed(clock: Clock) -> None:
    replicas = three(clock, A, B, longest_rest_s=50.0)
    for seconds in (1e9, 20.0):
        with replicas.lease() as lease:
            replicas.rest(lease, seconds)
    assert replicas.rest_s() == 20
    clock.now += 45
    assert replicas.rest_s() == 0
    assert ask(replicas) == B
    clock.now += 5
    assert ask(replicas) == A


def test_leaving_and_returning_are_one_line_each(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    replicas = three(clock)
    fail(replicas, A, 3)
    clock.now += 1
    fail(replicas, A, 1)
    clock.now += 2
    ask(replicas)
    assert [record.getMessage() for record in caplog.records] == [
        "http://a is left alone for 1.0 s after 3 failures in a row, the last one: gone",
        "http://a is back after 3.0 s",
    ]


def test_a_lease_ends_however_its_request_ends(clock: Clock) -> None:
    replicas = three(clock, A)
    with pytest.raises(ZeroDivisionError), replicas.lease() as lease:
        assert isinstance(lease, Lease) and lease.replica.num_in_flight == 1
        raise ZeroDivisionError
    assert lease.replica.num_in_flight == 0
