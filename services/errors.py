"""Everything this project raises on purpose, and how it looks on the wire.

    DistillServeError            one line that names field, value, constraint and fix
    ├── ConfigError              a run option is unknown, out of range, missing or contradictory   exit 2
    ├── DataError                a dataset row or file cannot be used                              exit 2
    ├── StartupError             a port is taken, a model is missing, the disk is full             exit 3
    │   └── FolderInUseError     ... another process writes into the output folder
    ├── PeerError                a server answered wrongly, late or not at all                     exit 4
    │   ├── ChangedTeacherError  ... a teacher no longer answers as it did at the start
    │   ├── UnreadableAnswerError ... a server sent what is no answer, say a page of a proxy
    │   ├── ProblemError         ... with an RFC 9457 problem document
    │   ├── WeightsWantedError   ... rollout servers were started again and hold no weights of the run
    │   └── OutageError          ... servers did not answer for longer than the run waits          exit 11
    ├── WeightSyncError          a weight push or its canary failed                                exit 5
    │   ├── ServerHeldError      ... another run holds the rollout server
    │   └── ServerRestartedError ... a rollout server was started again since the run has held it
    ├── EvaluationError          training is complete, but what it is worth was not measured       exit 6
    ├── OutputError              a file of the run cannot be written: the disk is full             exit 7
    ├── RankLostError            another rank of the trainer has ended                             exit 8
    ├── RewardError              a reward function failed, or took too long                        exit 9
    ├── UserCodeError            a callback or function that the user handed in failed             exit 10
    ├── InputError               an argument of a Python client cannot be sent                     exit 2
    ├── ClientClosedError        a Python client was used after its close
    └── RequestError             a request we refuse, answered as a problem document               4xx

Command-line entry points turn a DistillServeError into one line on stderr and its exit code; servers
turn a RequestError into `application/problem+json`. Every other exception is a bug and keeps its traceback.
"""

import re
from typing import Any

from pydantic import ValidationError

PROBLEM_MEDIA_TYPE = "application/problem+json"

ERROR_PREFIX = "distillserve: "
"""How the one line begins with which a command ends that failed."""

# Greedy, and over slashes: a password may hold each of the characters that end a user in a well-formed URL.
_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s'\"]*@")

# Options that hold options of other programs.
_PASSED_ON = ("engine_args", "_kwargs")


class DistillServeError(Exception):
    """Base of all errors a user can act on; `str()` is the one line to show, without the password of any URL in it."""

    exit_code = 1

    def __str__(self) -> str:
        return without_credentials(super().__str__())


class ConfigError(DistillServeError, ValueError):
    """A run option is unknown, out of range, missing, or contradicts another one."""

    exit_code = 2


class DataError(DistillServeError, ValueError):
    """A dataset file or row cannot be used; the message names file, row and reason."""

    exit_code = 2


class StartupError(DistillServeError):
    """A process cannot start: port taken, model folder missing, no space left."""

    exit_code = 3


class FolderInUseError(StartupError):
    """Another process writes into the output folder."""


class PeerError(DistillServeError):
    """Another process of the run answered wrongly, too late, or not at all."""

    exit_code = 4


class ChangedTeacherError(PeerError):
    """A teacher no longer answers as it did at the start of the run.

    Args:
        may_pass: whether a replica of it can answer in its stead.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        self.may_pass = may_pass
        super().__init__(message)


class UnreadableAnswerError(PeerError):
    """A server answered with success, but with something else than was asked for: a page of a proxy, or nothing.

    Attributes:
        said: what it did, as what follows its URL.
    """

    def __init__(self, url: str, problem: str, content: bytes) -> None:
        begins = f"; it begins with {content[:60]!r}" if content else "; it is empty"
        self.said = f"answered with what is {problem}{begins}"
        super().__init__(f"{url} {self.said}")


class ProblemError(PeerError):
    """A peer refused a request with a problem document (RFC 9457)."""

    def __init__(self, url: str, status: int, problem: dict[str, Any]) -> None:
        self.url = url
        self.status = status
        self.problem = problem
        self.retry_after_s: float | None = None
        super().__init__(f"{url} answered {status}: {problem.get('detail') or problem.get('title') or problem}")


class WeightsWantedError(PeerError):
    """The rollout servers that answer were started again: they complete nothing until the run's weights are pushed to them."""


class OutageError(PeerError):
    """Servers did not answer for longer than the run waits."""

    exit_code = 11


class WeightSyncError(DistillServeError):
    """A weight push, or the canary that follows it, failed on a rollout server."""

    exit_code = 5


class ServerHeldError(WeightSyncError):
    """Another run holds a rollout server.

    Args:
        left_s: what is left of the other run's lease, seconds.
    """

    def __init__(self, message: str, left_s: float = 0.0) -> None:
        self.left_s = left_s
        super().__init__(message)


class ServerRestartedError(WeightSyncError):
    """A rollout server was started again, or has forgotten the run that held it."""


class EvaluationError(DistillServeError):
    """A run is complete and its student saved, but an evaluation of it failed."""

    exit_code = 6


class OutputError(DistillServeError):
    """A file of the run cannot be written; what was written before is whole."""

    exit_code = 7


class RankLostError(DistillServeError):
    """Another rank of the trainer has ended, and with it the run."""

    exit_code = 8


class RewardError(DistillServeError):
    """A reward function raised, took too long, or returned what is no reward; names it, and the row where there is one."""

    exit_code = 9


class UserCodeError(DistillServeError):
    """A callback, rollout function or factory that the user handed in failed; what it raised is the cause of this one."""

    exit_code = 10


class InputError(DistillServeError, ValueError):
    """What a caller handed to a Python client cannot be sent; nothing was."""

    exit_code = 2


class ClientClosedError(DistillServeError, RuntimeError):
    """A Python client was asked for something after its close."""


class RequestError(DistillServeError, ValueError):
    """A request this server refuses.

    Args:
        status: HTTP status, 4xx or 503.
        title: short, constant summary of the kind of problem.
        detail: what was wrong with this very request and what would be right.
        field: dotted path of the offending field, when there is one.
        retry_after_s: when trying again makes sense, seconds.
    """

    def __init__(
        self, status: int, title: str, detail: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.status, self.title, self.detail = status, title, detail
        self.field, self.retry_after_s = field, retry_after_s
        super().__init__(detail)


def problem_document(
    status: int, title: str, detail: str, *, request_id: str, field: str | None = None
) -> dict[str, Any]:
    """The one error shape of every route of every server (RFC 9457)."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    if field is not None:
        document["field"] = field
    return document


def describe_validation_error(error: ValidationError) -> list[tuple[str, str]]:
    """(dotted field, what is wrong with which value) for each problem pydantic found."""
    problems = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "(root)"
        message = item["msg"].removeprefix("Value error, ")
        value = item.get("input")
        if any(part.endswith(_PASSED_ON) for part in field.split(".")):  # a secret may be among them
            message += f" (got a {type(value).__name__})"
        elif item["type"] not in ("missing", "value_error") and not isinstance(value, dict):
            message += f" (got {_shorten(repr(value))})"
        problems.append((field, message))
    return problems


def without_credentials(text: str) -> str:
    """The text, with "..." for the user and password of every URL in it."""
    return _CREDENTIALS.sub(r"\1...@", text)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
