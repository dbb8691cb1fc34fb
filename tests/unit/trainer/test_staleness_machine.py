"""The staleness buffer between a producer and a learner, with servers that are slow, die, and miss pushes: in virtual time, in
every order that hypothesis thinks of, no group is too old, lost, or trained twice."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.virtual_time import VirtualLoop
from trainer.staleness_buffer import StalenessBuffer

GROUPS_PER_BATCH, NUM_SERVERS = 3, 3
DELAYS = st.floats(0.01, 100.0)


@dataclass(eq=False)
class Group:
    position: int
    version: int
    born: float


@dataclass(eq=False)
class Server:
    """Samples under the version it holds when it begins, and takes its time."""

    version: int = 0
    delay_s: float = 1.0
    life: int = 0
    """Changes when it is killed; what it works on is lost."""
    misses_pushes: bool = False


@dataclass(eq=False)
class Batch:
    machine: "Machine"
    groups: list[Group]
    dropped: list[Group] = field(default_factory=list)

    def versions(self) -> list[list[int]]:
        return [[group.version] for group in self.groups]

    async def renew(self, places: list[int]) -> None:
        old = [self.groups[place] for place in places]
        fresh = await asyncio.gather(*(self.machine.complete(group.position, is_new=True) for group in old))
        self.dropped += old
        for place, group in zip(places, fresh, strict=True):
            self.groups[place] = group


class Machine(RuleBasedStateMachine):
    """The learner trains when a rule says so; the producer works as far ahead as the buffer lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.servers = [Server() for _ in range(NUM_SERVERS)]
        self.version, self.next_position, self.turn = 0, 0, 0
        self.trained: list[int] = []
        self.num_begun = self.num_stale = 0
        self.producing: asyncio.Task[None] | None = None

    @initialize(max_staleness=st.integers(0, 3))
    def begin(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self.buffer: StalenessBuffer[Batch] = StalenessBuffer(max_staleness)
        self.buffer.weights_live(0)

        async def start() -> None:
            self.producing = asyncio.create_task(self.produce())

        self.run(start())

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def produce(self) -> None:
        while True:
            await self.buffer.slot()
            self.num_begun += 1
            positions = range(self.next_position, self.next_position + GROUPS_PER_BATCH)
            self.next_position = positions.stop
            groups = await asyncio.gather(*(self.complete(position) for position in positions))
            self.buffer.put(Batch(self, list(groups)))

    async def complete(self, position: int, *, is_new: bool = False) -> Group:
        """As the client does: on one server after the other, until one has not died meanwhile.

        Args:
            is_new: of a server that holds the live version.
        """
        loop = asyncio.get_running_loop()
        while True:
            self.turn += 1
            able = [s for s in self.servers if s.version == self.version] if is_new else self.servers
            server = able[self.turn % len(able)] if able else Server(self.version)
            life, version = server.life, server.version
            await asyncio.sleep(server.delay_s)
            if server.life == life:
                return Group(position, version, loop.time())

    @rule(seconds=DELAYS)
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(which=st.integers(0, NUM_SERVERS - 1), seconds=DELAYS)
    def slow_down(self, which: int, seconds: float) -> None:
        self.servers[which].delay_s = seconds

    @rule(which=st.integers(0, NUM_SERVERS - 1))
    def kill_and_replace(self, which: int) -> None:
        """The new one holds the live version, as after a push to it."""
        server = self.servers[which]
        server.life += 1
        server.version = self.version

    @rule(which=st.integers(0, NUM_SERVERS - 1), misses=st.booleans())
    def miss_pushes(self, which: int, misses: bool) -> None:
        self.servers[which].misses_pushes = misses

    @rule()
    def push_once_more(self) -> None:
        """The version that is live, to servers that were started again."""
        self.buffer.weights_live(self.version)

    @rule(patience_s=DELAYS)
    def give_up_waiting(self, patience_s: float) -> None:
        """The learner is called away while it waits: it gets the same batch later."""

        async def wait() -> None:
            getting = asyncio.create_task(self.buffer.get())
            await asyncio.wait({getting}, timeout=patience_s)
            if getting.done():
                self.learn(getting.result())
            else:
                getting.cancel()
                await asyncio.wait({getting})

        self.run(wait())

    @precondition(lambda self: len(self.trained) < 60 * GROUPS_PER_BATCH)
    @rule()
    def train(self) -> None:
        async def step() -> None:
            self.learn(await self.buffer.get())

        self.run(step())

    def learn(self, batch: Batch) -> None:
        for group in batch.groups:
            assert 0 <= self.version - group.version <= self.max_staleness
        self.trained += [group.position for group in batch.groups]
        assert {group.position for group in batch.dropped} <= {group.position for group in batch.groups}
        self.num_stale += len(batch.dropped)
        self.version += 1
        for server in self.servers:
            if not server.misses_pushes:
                server.version = self.version
        self.buffer.weights_live(self.version)

    @invariant()
    def nothing_is_lost_or_trained_twice(self) -> None:
        assert self.trained == list(range(len(self.trained)))

    @invariant()
    def no_more_is_under_way_than_may_be(self) -> None:
        num_steps = len(self.trained) // GROUPS_PER_BATCH
        assert self.num_begun <= num_steps + (getattr(self, "max_staleness", 0) + 1)

    def teardown(self) -> None:
        if self.producing is not None:
            self.producing.cancel()
        self.runner.close()


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStalenessMachine = Machine.TestCase
