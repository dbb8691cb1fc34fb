"""Where trainer and workers meet."""

import socket

import pytest

from services.weight_transfer.rendezvous import listen_on, own_address
from tests.loopbacks import available_loopbacks


@pytest.mark.parametrize("host", available_loopbacks())
def test_it_listens_on_the_address_alone(host: str) -> None:
    with listen_on(host, 0) as listener:
        assert listener.getsockname()[0] == host
        with socket.create_connection(listener.getsockname()[:2]):
            pass
        assert own_address(host, listener.getsockname()[1]) == host


def test_an_address_that_a_translating_network_gives_is_listened_for_on_all() -> None:
    with listen_on("192.0.2.1", 0) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_port_that_is_in_use_is_an_error() -> None:
    with listen_on("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        listen_on("127.0.0.1", first.getsockname()[1])


def test_a_name_that_there_is_not_is_an_error() -> None:
    with pytest.raises(socket.gaierror):
        listen_on("no-such-host.invalid", 0)
