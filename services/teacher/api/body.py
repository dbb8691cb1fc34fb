"""The body of a score request, from bytes to a TeacherRequest: in UTF-8, and JSON of one meaning only."""

from email.message import Message
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import Headers

from services.config import TeacherConfig
from services.errors import RequestError
from services.strict_json import DuplicateKeyError, JsonError, parse_json
from services.wire.teacher import TeacherRequest

# Of a wrong value, what its problem document repeats.
_SHOWN_CHARACTERS = 80
# Lists and objects that a token may bring along: one of support ids, and in a text its own characters.
_LISTS_PER_TOKEN = 4


def check_headers(headers: Headers) -> None:
    """Refuse a body that does not even say that it is plain JSON.

    Raises:
        RequestError: another media type, none, or a compressed body.
    """
    message = Message()
    message["content-type"] = headers.get("content-type", "")
    media_type = message.get_content_type()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        given = repr(headers.get("content-type", "nothing")[:_SHOWN_CHARACTERS])
        raise _unsupported("content-type", f"content-type says {given}, must be application/json")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        given = repr(coding[:_SHOWN_CHARACTERS])
        raise _unsupported("content-encoding", f"content-encoding says {given}; send the body uncompressed")


def parse_request(body: bytes, config: TeacherConfig) -> TeacherRequest:
    """The request that the bytes spell; takes seconds for the largest bodies.

    Raises:
        RequestError: they spell none; names the field.
    """
    try:
        return TeacherRequest.model_validate(_parse_json(body, config))
    except ValidationError as error:
        raise _invalid(error) from error


def _parse_json(body: bytes, config: TeacherConfig) -> Any:
    # Each of a million empty lists is three bytes here and a hundred in memory.
    lists = body.count(b"[") + body.count(b"{")
    most = _LISTS_PER_TOKEN * (config.max_tokens_per_request + config.max_sequences_per_request)
    if lists > most:
        detail = f"the body holds {lists} lists and objects, no request within the limits has more than {most}"
        raise RequestError(413, "Over a limit", detail, field="body")
    try:
        return parse_json(body)
    except DuplicateKeyError as error:
        raise RequestError(422, "Invalid request", str(error), field=error.key) from error
    except JsonError as error:
        raise _not_json(str(error)) from error


def _not_json(reason: str) -> RequestError:
    return RequestError(400, "Not JSON", f"the body is not JSON in UTF-8: {reason}", field="body")


def _unsupported(field: str, detail: str) -> RequestError:
    return RequestError(415, "Unsupported media type", detail, field=field)


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    value = first["input"]
    shown = value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value
    got = f" (got {repr(shown)[:_SHOWN_CHARACTERS]})" if isinstance(value, str | int | float) else ""
    return RequestError(422, "Invalid request", f"{field}: {first['msg']}{got}", field=field)
