"""A reward worker: the process in which functions of the user run, apart from the trainer, which can kill it.

process.py starts it. It reads lines of JSON from its standard input, and writes others (documents.py).

    ► {"functions": [[module, name], ...]} or {"model": {...}}, "overlapping": bool
    ◄ {"importing": 0}, {"importing": 1}, ...  {"ready": [...]} or {"failed": "why"}
    ► {"id": 7, "function": 0, "arguments": {...}, "count": 4}
    ◄ {"id": 7, "rewards": [...]} or {"id": 7, "error": "why", "sample": 2 or null}
"""

import asyncio
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

from services.process.parent import end_with_parent
from trainer.rewards.documents import decode, encode
from trainer.rewards.functions import (
    NotARewardError,
    RewardFunction,
    TrainerState,
    awaited,
    checked_rewards,
    describe,
)

Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    """Load what the first request says, then answer calls until there are no more."""
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)
    requests, answer = _take_streams()
    sys.argv = [sys.argv[0]]
    setup = _read(requests)
    if setup is None:
        return
    sys.path.insert(0, os.getcwd())
    functions = _load(setup, answer)
    if functions is None:
        return
    if setup["overlapping"]:
        asyncio.run(_serve_overlapping(functions, requests, answer))
    else:
        _serve(functions, requests, answer)


def _take_streams() -> tuple[BinaryIO, Answer]:
    """The two ends of the pipes; what functions read is empty, and what they print goes to standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        try:
            answers.write(encode(document))
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody listens any more

    return requests, answer


def _read(requests: BinaryIO) -> Any:
    """The next request; None when there are no more."""
    line = requests.readline()
    return decode(line) if line.endswith(b"\n") else None


def _load(setup: dict[str, Any], answer: Answer) -> list[Any] | None:
    functions: list[Any] = []
    try:
        if "model" in setup:
            answer({"importing": 0})
            from trainer.rewards.model import RewardModel

            functions.append(RewardModel(**setup["model"]))
        else:
            for index, (module, name) in enumerate(setup["functions"]):
                answer({"importing": index})
                functions.append(RewardFunction.load(module, name))
    except SystemExit as error:
        answer({"failed": f"its module calls sys.exit({error.code if error.code is not None else ''})"})
        return None
    except BaseException as error:
        answer({"failed": describe(error)})
        return None
    kinds = [{"is_async": one.is_async, "parameters": one.parameters, "required": one.required} for one in functions]
    answer({"ready": kinds})
    return functions


def _serve(functions: list[Any], requests: BinaryIO, answer: Answer) -> None:
    home = os.getcwd()
    while (request := _read(requests)) is not None:
        function = functions[request["function"]]
        try:
            returned = function.call(_arguments(request))
            if inspect.isawaitable(returned):  # of a function that does not look like an async one
                returned = asyncio.run(awaited(returned))
            outcome = {"rewards": checked_rewards(returned, request["count"])}
        except BaseException as error:
            outcome = _failed(function, error)
        answer({"id": request["id"], **outcome})
        with suppress(OSError):
            os.chdir(home)


async def _serve_overlapping(functions: list[Any], requests: BinaryIO, answer: Answer) -> None:
    async def call(request: dict[str, Any]) -> None:
        function = functions[request["function"]]
        try:
            outcome = {"rewards": checked_rewards(await function.call(_arguments(request)), request["count"])}
        except BaseException as error:
            outcome = _failed(function, error)
        answer({"id": request["id"], **outcome})

    calls: set[asyncio.Task[None]] = set()
    while (request := await asyncio.to_thread(_read, requests)) is not None:
        task = asyncio.create_task(call(request))
        calls.add(task)
        task.add_done_callback(calls.discard)
    os._exit(0)  # whoever still waits for an answer of a server would keep this process


def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = request["arguments"]
    return arguments | {"trainer_state": TrainerState(**arguments["trainer_state"])}


def _failed(function: Any, error: BaseException) -> dict[str, Any]:
    if isinstance(error, NotARewardError):
        return {"error": str(error), "sample": error.sample}
    return {"error": function.explain(error), "sample": None}
