"""Where trainer and workers meet."""

import socket
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from services.errors import WeightSyncError
from services.weight_transfer.channel import Rendezvous
from services.weight_transfer.rendezvous import await_workers, host_store, join_store, listen_on, own_address
from tests.loopbacks import available_loopbacks


@pytest.mark.parametrize("host", available_loopbacks())
def test_it_listens_on_the_address_alone(host: str) -> None:
    with listen_on(host, 0) as listener:
        assert listener.getsockname()[0] == host
        with socket.create_connection(listener.getsockname()[:2]):
            pass
        assert own_address(host, listener.getsockname()[1]) == host


def test_another_address_of_the_machine_is_not_listened_on() -> None:
    store = host_store("127.0.0.1", 0, 5.0)
    socket.create_connection(("127.0.0.1", store.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))


def test_a_port_that_is_taken_is_an_error_that_names_the_option() -> None:
    with listen_on("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        said = rf"master_address = 127\.0\.0\.1 cannot be listened on \(.*in use\); weight_sync\.master_port = {port}: another"
        with pytest.raises(WeightSyncError, match=said):
            host_store("127.0.0.1", port, 5.0)


@pytest.mark.parametrize("address", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_this_machines_is_an_error_that_names_the_option(address: str) -> None:
    with pytest.raises(
        WeightSyncError, match=rf"weight_sync\.master_address = {address} cannot .*; give an address of this"
    ):
        host_store(address, 0, 5.0)


def rendezvous_at(port: int, **changes: Any) -> Rendezvous:
    return replace(Rendezvous("127.0.0.1", port, 1, 3, 20.0), **changes)


def test_workers_that_were_refused_are_not_waited_for() -> None:
    told: Future[None] = Future()
    told.set_exception(WeightSyncError("connect on http://a answered 401"))
    store = host_store("127.0.0.1", 0, 20.0)
    with pytest.raises(WeightSyncError, match="answered 401"):
        await_workers(store, rendezvous_at(store.port), told)


def test_workers_that_do_not_come_are_said_to_be_missing() -> None:
    store = host_store("127.0.0.1", 0, 20.0)
    said = rf"1 of 2 workers .* came to 127\.0\.0\.1:{store.port} within 0\.2 s; .*master_address"
    join_store(rendezvous_at(store.port))
    with pytest.raises(TimeoutError, match=said):
        await_workers(store, rendezvous_at(store.port, timeout_s=0.2), Future())


def test_workers_of_an_attempt_before_are_not_counted() -> None:
    store = host_store("127.0.0.1", 0, 20.0)
    for _ in range(2):
        join_store(rendezvous_at(store.port, attempt=1))
    with pytest.raises(TimeoutError, match="0 of 2 workers"):
        await_workers(store, rendezvous_at(store.port, attempt=2, timeout_s=0.2), Future())
