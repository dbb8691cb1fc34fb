"""What a stage of a push takes, before any worker is asked."""

import json

import pytest
from starlette.requests import Request
from starlette.types import Message

from services.errors import RequestError
from services.rollout import weights
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState

STATE = RolloutState(RolloutSettings("m", "gloo", 1, 1, 1))


def request(stage: str, body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "path": f"/{stage}", "headers": []}, receive)


@pytest.mark.parametrize(
    ("stage", "body"),
    [
        ("update_weights", b"[" * 100_000),
        ("update_weights", b'{"update_info":' * 100_000),
        ("update_weights", b"9" * 5000),
        ("update_weights", b"\xff\xfe\xfd"),
        ("update_weights", b"[]"),
        ("update_weights", b"null"),
        ("update_weights", b"{}"),
        ("start_weight_update", b'{"update_info": {}}'),
        ("finish_weight_update", json.dumps({"weight_version": 1}).encode()),
        ("finish_weight_update", json.dumps({"weight_version": "1", "more": 1}).encode()),
        ("init_weight_transfer_engine", b'{"weight_version": "1"}'),
    ],
    ids=range(11),
)
async def test_what_is_no_body_of_a_stage_is_refused(stage: str, body: bytes) -> None:
    with pytest.raises(RequestError) as error:
        await weights.run_stage(request(stage, body), STATE)
    assert error.value.status == 422 and len(str(error.value)) < 200
