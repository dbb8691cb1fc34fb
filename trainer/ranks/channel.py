"""How rank 0 tells the other ranks what to do, and how each end learns that the other is gone.

One connection (TCP, with a key that only the ranks know) from every other rank to rank 0. A rank waits for its next call in a
socket, not in a collective, which has a deadline and keeps a GPU busy; and the kernel closes a socket when its process dies,
however it dies, so that this is heard of at once. Calls are a name and a document of bytes; nothing is pickled.
"""

import json
import logging
import os
import platform
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
import torch.distributed as dist

from services.config.addresses import is_loopback
from services.errors import OutputError, RankLostError, StartupError
from services.process.startup import socket_address
from services.process.waiting import WAITS, Wait
from trainer.ranks.group import Ranks, is_of_ranks

logger = logging.getLogger(__name__)

# What ranks that have met already may take to connect.
_CONNECT_S = 60.0
# A rank that fails for want of another may be heard of before that one.
_CAUSE_S = 2.0
# Between two signs of life of a rank whose main thread computes, or waits for the others.
_PULSE_S = 5.0
_END = "end"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Call:
    name: str
    document: bytes


class Followers:
    """Rank 0's end of the connections to all other ranks.

    Args:
        on_lost: those who are told once, in another thread, when a rank has ended or failed.
        on_signal: told, in another thread, of a signal that another rank got.
    """

    def __init__(
        self, ranks: Ranks, on_lost: Callable[[RankLostError], None], on_signal: Callable[[int], None]
    ) -> None:
        self.on_lost, self._on_signal = [on_lost], on_signal
        self._lock = threading.Lock()
        self._is_over = False
        self._said: dict[int, tuple[bool, str]] = {}  # by rank: whether it is a cause, and what
        self._lost = threading.Event()
        self._written: queue.SimpleQueue[tuple[int, str, str | None]] = queue.SimpleQueue()  # rank, folder, problem
        self._connections = _accept(ranks)
        self._pulses: list[Wait] = []
        for rank, (connection, where) in self._connections.items():
            name = f"rank {rank} on {where}"
            pulse = WAITS.add(Wait("the run", name, "ranks", on_dead=partial(self._note, rank, True)))
            self._pulses.append(pulse)
            arguments = (rank, connection, name, pulse)
            threading.Thread(target=self._listen, args=arguments, name=f"rank-{rank}", daemon=True).start()

    @property
    def lost(self) -> RankLostError | None:
        """Which rank is gone, and why."""
        with self._lock:
            # A cause before what followed from it; a rank that says nothing was killed.
            said = sorted(self._said.items(), key=lambda entry: not entry[1][0])
        return RankLostError(said[0][1][1]) if said else None

    def send(self, name: str, document: bytes = b"") -> None:
        """Call all ranks.

        Raises:
            RankLostError: one of them is gone.
        """
        try:
            for connection, _ in self._connections.values():
                connection.send_bytes(name.encode())
                connection.send_bytes(document)
        except OSError as error:
            raise self.cause() from error

    def cause(self) -> RankLostError:
        """Why a collective has failed: which rank was lost, once that is known."""
        if self._lost.wait(_CAUSE_S):
            time.sleep(_CAUSE_S / 4)  # for the cause, where what followed from it was faster
        return self.lost or RankLostError("a collective of the ranks failed, though all of them live")

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """A collective that fails inside the block fails for the rank that was lost.

        Raises:
            RankLostError: in its place.
        """
        try:
            yield
        except RuntimeError as error:
            if is_of_ranks(error):
                raise self.cause() from error
            raise

    def wait_for_parts(self, folder: str) -> None:
        """Wait until every other rank has said that it has written its part of a checkpoint.

        Raises:
            OutputError: one could not; names it.
            RankLostError: one is gone.
        """
        waiting = set(self._connections)
        while waiting:
            rank, where, problem = self._written.get()
            if self.lost is not None:
                raise self.lost
            if where == folder and problem is not None:
                raise OutputError(
                    f"rank {rank} on {self._connections[rank][1]}: {problem}; ranks on several machines need output.dir on a file "
                    "system that they share"
                )
            waiting -= {rank} if where == folder else set()

    def end(self) -> None:
        """Let the other ranks end in order."""
        self._is_over = True
        for pulse in self._pulses:
            WAITS.remove(pulse)
        for connection, _ in self._connections.values():
            try:
                connection.send_bytes(_END.encode())
            except OSError:
                logger.debug("a rank was gone before it was told to end")

    def _listen(self, rank: int, connection: Connection, name: str, pulse: Wait) -> None:
        try:
            while True:
                said = json.loads(connection.recv_bytes())
                pulse.alive()
                if "signal" in said:
                    self._on_signal(said["signal"])
                elif "written" in said:
                    self._written.put((rank, said["written"], said["problem"]))
                elif "failed" in said:
                    self._note(rank, said["is_cause"], f"{name} failed: {said['failed']}")
        except (EOFError, OSError):
            self._note(rank, True, f"{name} was killed, or lost its connection")
        finally:
            WAITS.remove(pulse)

    def _note(self, rank: int, is_cause: bool, text: str) -> None:
        if self._is_over:
            return
        with self._lock:
            self._said.setdefault(rank, (is_cause, text))
            is_first = len(self._said) == 1 and not self._lost.is_set()
        self._written.put((rank, "", None))  # who waits for parts looks at who is lost
        if is_first:
            self._lost.set()
            error = self.cause()
            for tell in self.on_lost:
                tell(error)


class Leader:
    """Another rank's end of its connection to rank 0.

    Args:
        on_end: told, in another thread, when rank 0 has said that it is over, or has ended (`is_lost`).
    """

    def __init__(self, ranks: Ranks, on_end: Callable[[], None]) -> None:
        self._connection = _connect(ranks)
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._on_end = on_end
        self._telling = threading.Lock()  # from several threads
        self.is_lost = False
        self._is_over = threading.Event()
        threading.Thread(target=self._listen, name="rank-0", daemon=True).start()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def next(self) -> Call | None:
        """Wait for the next call; None: there is none, in order or because rank 0 is gone (`is_lost`)."""
        return self._calls.get()

    def tell_signal(self, number: int) -> None:
        """This rank got a signal: rank 0 decides what comes of it."""
        self._tell({"signal": number})

    def tell_failure(self, text: str, *, is_cause: bool) -> None:
        """This rank ends.

        Args:
            is_cause: not because another one has failed.
        """
        self._tell({"failed": text, "is_cause": is_cause})

    def _beat(self) -> None:
        while not self._is_over.wait(_PULSE_S):
            self._tell({"alive": True})

    def tell_written(self, folder: str, problem: str | None) -> None:
        """This rank has written its part of a checkpoint.

        Args:
            problem: why it could not.
        """
        self._tell({"written": folder, "problem": problem})

    def _tell(self, content: dict[str, Any]) -> None:
        try:
            with self._telling:
                self._connection.send_bytes(json.dumps(content).encode())
        except OSError:
            logger.debug("rank 0 is gone and is not told: %s", content)

    def _listen(self) -> None:
        try:
            while (name := self._connection.recv_bytes().decode()) != _END:
                self._calls.put(Call(name, self._connection.recv_bytes()))
        except (EOFError, OSError):
            self.is_lost = True
        self._is_over.set()
        self._calls.put(None)
        self._on_end()


def _accept(ranks: Ranks) -> dict[int, tuple[Connection, str]]:
    """The connections of all other ranks, and the machines that they are on, in the order of the ranks.

    Raises:
        StartupError: this machine cannot be reached at MASTER_ADDR, or a rank has not come.
    """
    key, accepted = secrets.token_bytes(_KEY_BYTES), Future[dict[int, tuple[Connection, str]]]()
    try:
        listener = Listener((_own_address(), 0), "AF_INET", backlog=ranks.count, authkey=key)
    except OSError as error:
        raise StartupError(
            f"MASTER_ADDR = {_host()} is no address of the machine on which rank 0 runs: {error.strerror}; start rank 0 there"
        ) from error

    def accept() -> None:
        found = {}
        try:
            for _ in range(ranks.count - 1):
                connection = listener.accept()
                rank, where = json.loads(connection.recv_bytes())
                found[rank] = (connection, where)
            accepted.set_result(dict(sorted(found.items())))
        except Exception as error:
            accepted.set_exception(error)

    threading.Thread(target=accept, name="accept-ranks", daemon=True).start()
    _meet(listener.address[1], key)
    try:
        return accepted.result(_CONNECT_S)
    except Exception as error:
        raise StartupError(f"not all ranks have connected to {_host()}: {type(error).__name__} {error}") from error
    finally:
        listener.close()


def _connect(ranks: Ranks) -> Connection:
    port, key = _meet()
    address = (_host(), port)
    try:
        connection = Client(address, "AF_INET", authkey=key)
        connection.send_bytes(json.dumps([ranks.index, platform.node()]).encode())
    except OSError as error:
        raise StartupError(
            f"rank {ranks.index} cannot connect to rank 0 at {address[0]}:{port}: {error.strerror}; MASTER_ADDR must be an "
            "address of rank 0's machine"
        ) from error
    return connection


def _meet(port: int = 0, key: bytes = bytes(_KEY_BYTES)) -> tuple[int, bytes]:
    """Port and key of rank 0, on all ranks."""
    values = torch.tensor([port, *key])
    dist.broadcast(values, 0)
    port, *found = values.tolist()
    return port, bytes(found)


def _host() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _own_address() -> str:
    """Where rank 0 listens: MASTER_ADDR; or everywhere, where this machine alone takes its own name for the loopback."""
    _, (address, *_) = socket_address(_host(), 0)
    return "0.0.0.0" if is_loopback(address) and not is_loopback(_host()) else address
