"""How often and after which pause a process is started again, in virtual time; which ends are mended by it."""

import signal

import pytest

from services import errors
from services.launch.restarts import HEALTHY_S, RestartPolicy, mends_server, mends_trainer


def test_pauses_double_up_to_a_minute_and_then_no_start_follows() -> None:
    policy = RestartPolicy(9, 1.0)
    assert [policy.backoff_s(0.0) for _ in range(10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60, None]
    assert policy.backoff_s(1e9) is None and str(policy) == "9 of 9"


def test_the_first_pause_is_the_option_s() -> None:
    policy = RestartPolicy(3, 0.25)
    assert [policy.backoff_s(0.0), policy.backoff_s(0.0)] == [0.25, 0.5]


def test_with_no_start_again_allowed_the_first_end_is_the_last() -> None:
    assert RestartPolicy(0, 1.0, HEALTHY_S).backoff_s(1e9) is None


@pytest.mark.parametrize(("lived_s", "pause"), [(HEALTHY_S - 1, None), (HEALTHY_S, 1.0)])
def test_a_long_time_of_health_begins_a_new_count(lived_s: float, pause: float | None) -> None:
    policy = RestartPolicy(2, 1.0, HEALTHY_S)
    assert [policy.backoff_s(0.0), policy.backoff_s(0.0)] == [1.0, 2.0]
    policy.is_healthy(100.0)
    assert policy.backoff_s(100.0 + lived_s) == pause


def test_a_process_that_never_worked_again_is_not_healthy_however_long_it_took() -> None:
    policy = RestartPolicy(2, 1.0, HEALTHY_S)
    policy.is_healthy(0.0)
    assert [policy.backoff_s(1.0), policy.backoff_s(9e9), policy.backoff_s(9e99)] == [1.0, 2.0, None]


def test_without_a_time_of_health_every_start_again_counts() -> None:
    policy = RestartPolicy(2, 1.0)
    for expected in (1.0, 2.0, None):
        policy.is_healthy(0.0)
        assert policy.backoff_s(1e12) == expected


def test_a_large_limit_is_no_error() -> None:
    policy = RestartPolicy(5000, 60.0)
    assert {policy.backoff_s(0.0) for _ in range(5000)} == {60.0}


CODES = {
    name: error.exit_code
    for name, error in vars(errors).items()
    if isinstance(error, type) and issubclass(error, errors.DistillServeError)
}


def test_a_server_that_failed_by_its_options_is_not_started_again() -> None:
    assert {name for name, code in CODES.items() if not mends_server(code)} == {
        *("ConfigError", "DataError", "InputError", "StartupError", "FolderInUseError")
    }
    assert all(map(mends_server, (0, 1, 137, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV)))


def test_a_trainer_goes_on_after_what_is_not_its_own_fault() -> None:
    assert {name for name, code in CODES.items() if mends_trainer(code)} == {"RankLostError", "OutageError"}
    killed = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
    assert all(mends_trainer(-number) for number in killed)
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert not any(mends_trainer(code) for number in asked for code in (-number, 128 + number))
    assert not mends_trainer(0) and not mends_trainer(1)
