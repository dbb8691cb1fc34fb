"""The processes in which rewards are computed, and who is asked what.

    functions       reward.num_workers processes; each has one call at a time, which is the completions of one prompt
    async functions one process, in which all calls overlap
    models          one process each

Every call has a deadline, at which its process is killed. A process that is gone is replaced at the next call.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.clients.base import all_or_first_error
from services.config import RewardConfig
from services.config.reward import split_function
from services.errors import ConfigError, RewardError, StartupError
from services.process.startup import check_model_folder
from trainer.rewards.process import WorkerEndedError, WorkerProcess


@dataclass(frozen=True)
class RewardCall:
    """One function on the completions of one prompt.

    Attributes:
        function: index in reward.functions.
        arguments: keyword arguments, of which the function gets those it takes.
        row: of the data, for errors.
        samples: of each completion its number among those of the prompt, for errors.
    """

    function: int
    arguments: dict[str, Any]
    row: int
    samples: Sequence[int]


class _Lane:
    """Processes that have loaded the same.

    Args:
        setup: what they load, as worker.py takes it.
        indices: in reward.functions, of their functions.
        size: calls at a time, each in a process of its own; None: all calls in one process.
    """

    def __init__(self, config: RewardConfig, setup: dict[str, Any], indices: list[int], size: int | None) -> None:
        self._config, self._setup, self._indices = config, setup | {"overlapping": size is None}, indices
        self._places = None if size is None else asyncio.Semaphore(size)
        self._size = size or 1
        self._starting = asyncio.Lock()
        self._idle: list[WorkerProcess] = []
        self._all: set[WorkerProcess] = set()

    async def start(self) -> list[dict[str, Any]]:
        """The first process; what its functions are.

        Raises:
            ConfigError: a function cannot be imported, or a model not be loaded.
        """
        worker = await self._take()
        self._idle.append(worker)
        return worker.ready

    async def fill(self) -> None:
        """The other processes."""
        self._idle.extend(await all_or_first_error([self._take() for _ in range(self._size)]))

    async def call(self, local: int, call: RewardCall) -> dict[str, Any]:
        """The answer of function number `local` of these processes.

        Raises:
            TimeoutError: the deadline has passed.
            WorkerEndedError: the process ended.
        """
        request = {"function": local, "arguments": call.arguments, "count": len(call.samples)}
        if self._places is None:
            async with self._starting:
                worker = await self._take()
                self._idle.append(worker)
            return await self._ask(worker, request)
        async with self._places:
            worker = await self._take()
            answer = await self._ask(worker, request)
            self._idle.append(worker)
            return answer

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self._all))
        self._all.clear()

    async def _ask(self, worker: WorkerProcess, request: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await worker.ask(request)
        except BaseException as error:
            # Without waiting for its end: those whose calls it takes along must not be heard of first.
            if self._places is not None or isinstance(error, TimeoutError):
                worker.kill()
            raise

    async def _take(self) -> WorkerProcess:
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await self._end(worker)
        return await self._start()

    async def _start(self) -> WorkerProcess:
        limit, worker = self._config.startup_timeout_s, await WorkerProcess.start()
        self._all.add(worker)
        try:
            async with asyncio.timeout(limit):
                await worker.load(self._setup)
        except BaseException as error:
            await self._end(worker)
            index = self._indices[worker.importing]
            what = f"reward.functions[{index}] = {self._config.functions[index]!r} cannot be loaded: "
            if isinstance(error, TimeoutError):
                raise ConfigError(
                    f"{what}it takes more than reward.startup_timeout_s = {limit:g} s; raise that"
                ) from error
            if isinstance(error, WorkerEndedError):
                raise ConfigError(f"{what}the process that imports it {error}") from error
            if isinstance(error, ValueError):
                raise ConfigError(
                    f"{what}{error}; {_FIX[split_function(self._config.functions[index]) is None]}"
                ) from error
            raise
        return worker

    async def _end(self, worker: WorkerProcess) -> None:
        worker.kill()
        await worker.close()
        self._all.discard(worker)


_FIX = {
    False: 'a function is given as "module:function" or "file.py:function", found from the current folder or Python\'s path',
    True: 'give a folder or hub id of a sequence-classification model, or a function as "module:function"',
}


class RewardPool:
    """Calls reward.functions in processes of their own; used in one event loop.

    Attributes:
        required: of each function the keyword arguments without which it cannot be called.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._lanes: list[_Lane] = []
        self._places: dict[int, tuple[_Lane, int]] = {}
        self.required: list[list[str]] = [[] for _ in config.functions]

    async def start(self) -> None:
        """Import every function and load every model once.

        Raises:
            ConfigError: one cannot be; names it.
        """
        parts = {index: split_function(one) for index, one in enumerate(self._config.functions)}
        functions = {index: part for index, part in parts.items() if part is not None}
        models = [index for index, part in parts.items() if part is None]
        for index in models:
            _check_model(index, self._config.functions[index])
        starting = [self._start_model(index) for index in models]
        await all_or_first_error(starting + ([self._start_functions(functions)] if functions else []))

    async def _start_model(self, index: int) -> None:
        config = self._config
        model = {
            "name": config.functions[index],
            "dtype": config.model_dtype,
            "device": config.model_device,
            "batch_size": config.model_batch_size,
            "max_tokens": config.model_max_tokens,
            "trust_remote_code": config.trust_remote_code,
        }
        lane = self._lane({"model": model}, [index], 1)
        await lane.start()
        self._places[index] = lane, 0

    async def _start_functions(self, functions: dict[int, tuple[str, str]]) -> None:
        setup, indices = {"functions": list(functions.values())}, list(functions)
        plain = self._lane(setup, indices, self._config.num_workers)
        kinds = await plain.start()
        overlapping = self._lane(setup, indices, None) if any(kind["is_async"] for kind in kinds) else None
        for local, (index, kind) in enumerate(zip(indices, kinds, strict=True)):
            self.required[index] = kind["required"]
            self._places[index] = (overlapping if overlapping is not None and kind["is_async"] else plain), local
        if overlapping is not None:
            await overlapping.start()
        if all(kind["is_async"] for kind in kinds):
            await plain.close()
        else:
            await plain.fill()

    def _lane(self, setup: dict[str, Any], indices: list[int], size: int | None) -> _Lane:
        self._lanes.append(_Lane(self._config, setup, indices, size))
        return self._lanes[-1]

    async def call(self, call: RewardCall) -> list[float | None]:
        """The rewards of the completions; None where the function does not apply.

        Raises:
            RewardError: the function failed, took too long, or returned something else.
        """
        lane, local = self._places[call.function]
        of_row = f"for the {len(call.samples)} completions of row {call.row}"
        who = f"reward.functions: {self._config.functions[call.function]}"
        try:
            answer = await lane.call(local, call)
        except TimeoutError as error:
            raise RewardError(
                f"{who} has not answered within reward.timeout_s = {self._config.timeout_s:g} s {of_row}; make it faster, or "
                "raise reward.timeout_s"
            ) from error
        except WorkerEndedError as error:
            raise RewardError(f"{who}: its process {error} when it was called {of_row}") from error
        except (TypeError, ValueError) as error:
            raise RewardError(f"{who} cannot be given the columns of row {call.row}: {error}") from error
        if "rewards" in answer:
            rewards: list[float | None] = answer["rewards"]
            return rewards
        if answer["sample"] is not None:
            raise RewardError(
                f"{who} {answer['error']} to sample {call.samples[answer['sample']]} of row {call.row}; a reward is a finite "
                "number of at most 1e30, or None where it does not apply"
            )
        raise RewardError(f"{who} {answer['error']} {of_row}")

    async def close(self) -> None:
        """End all processes; afterwards they are gone."""
        await asyncio.gather(*(lane.close() for lane in self._lanes))


def _check_model(index: int, model: str) -> None:
    try:
        check_model_folder(f"reward.functions[{index}]", model)
    except StartupError as error:
        raise ConfigError(f'{error}; a function is given as "module:function"') from error
