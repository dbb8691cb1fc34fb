"""One server, one run: who is refused, for how long, and by what the holder is known."""

import pytest

from services.errors import RequestError
from services.rollout.holder import Holder
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held(clock: Clock) -> Holder:
    """By the run "first", for 30 s."""
    holder = Holder(clock)
    assert holder.hold("first", "output.dir 'a'", 30.0)
    return holder


def test_a_second_run_is_refused_with_the_first_ones_name_the_rest_of_its_lease_and_the_way_to_take_over(
    held: Holder, clock: Clock
) -> None:
    clock.now += 12.0
    with pytest.raises(
        RequestError, match=r"held by the run first \(output.dir 'a', since .*--weight_sync.take_over true"
    ) as e:
        held.hold("second", "b", 30.0)
    assert e.value.status == 409 and e.value.retry_after_s == pytest.approx(18.0)
    held.check("first")


def test_a_lease_that_is_renewed_goes_on(held: Holder, clock: Clock) -> None:
    clock.now += 29.0
    assert not held.hold("first", "output.dir 'a'", 30.0)
    clock.now += 29.0
    with pytest.raises(RequestError):
        held.hold("second", "b", 30.0)


def test_a_silent_run_is_replaced_and_refused_when_it_wakes(held: Holder, clock: Clock) -> None:
    clock.now += 30.0
    held.check("first")  # nobody wants the server
    assert held.hold("second", "b", 5.0)
    with pytest.raises(RequestError, match=r"held by the run second \(b, since .*\), which took it from the run first"):
        held.check("first")
    with pytest.raises(RequestError, match="held by the run second"):
        held.hold("first", "output.dir 'a'", 30.0)


def test_a_server_is_taken_over_on_purpose_from_a_run_that_lives(held: Holder) -> None:
    assert held.hold("second", "b", 30.0, take_over=True)
    with pytest.raises(RequestError, match="which took it from the run first"):
        held.check("first")


def test_nobody_holds_a_server_that_was_released_or_has_just_started(held: Holder) -> None:
    held.release()
    for holder in (held, Holder()):
        with pytest.raises(
            RequestError, match=r"the run first does not hold this rollout server: nobody does. The server was started"
        ):
            holder.check("first")
        assert holder.left_s == 0
    assert held.hold("second", "b", 30.0)


@pytest.mark.parametrize(
    ("holder", "run", "is_given"),
    [
        ("3f9c2a1b-1_beef", "3f9c2a1b-2_c0de", True),
        ("3f9c2a1b-9_beef", "3f9c2a1b-10_beef", True),
        ("3f9c2a1b-2_beef", "3f9c2a1b-1_c0de", False),
        ("3f9c2a1b-2_beef", "3f9c2a1b-2_c0de", False),  # of a copy of its folder
        ("3f9c2a1b-1_beef", "3f9c2a1c-2_beef", False),
        ("3f9c2a1b", "3f9c2a1b-2_c0de", False),
        ("3f9c2a1b-x_beef", "3f9c2a1b-2_c0de", False),
        ("-1_beef", "-2_c0de", False),
    ],
)
def test_a_later_attempt_of_the_holders_run_need_not_wait(holder: str, run: str, is_given: bool) -> None:
    server = Holder(Clock())
    server.hold(holder, "a", 30.0)
    if is_given:
        assert server.hold(run, "a", 30.0)
        server.check(run)
        return
    with pytest.raises(RequestError, match="held by the run"):
        server.hold(run, "a", 30.0)
