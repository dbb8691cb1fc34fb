"""The body of a request, from the wire to bytes in a bounded time, and from JSON to what it spells."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from services.errors import RequestError, describe_validation_error

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        RequestError: it did not arrive in `timeout_s`, its caller went away, or it is too large.
    """
    parts = []
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                parts.append(part)
    except TimeoutError as error:
        detail = f"the body did not arrive within {timeout_s:g} s (transfer_timeout_s)"
        raise RequestError(408, "Request timeout", detail, field="body") from error
    except ClientDisconnect as error:
        raise caller_gone("the caller went away before its body was complete") from error
    return b"".join(parts)


def caller_gone(detail: str) -> RequestError:
    """Seen by nobody but the metrics."""
    return RequestError(499, "Client closed request", detail)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """What the JSON of a body spells.

    Raises:
        RequestError: it spells none; names the first wrong field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        field, message = describe_validation_error(error)[0]
        raise RequestError(422, "Invalid request", f"{field}: {message}", field=field) from error
