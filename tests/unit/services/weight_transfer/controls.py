"""A weight control client over a network of the test's own."""

from collections.abc import Callable
from typing import Any

import httpx

from services.weight_transfer.control import WeightControlClient


def control(answer: Callable[[httpx.Request], Any] | None, urls: list[str], **options: Any) -> WeightControlClient:
    """Of servers with 2, 1 and 4 workers.

    Args:
        answer: to a request, at once or later; None: over the real network.
    """
    given: dict[str, Any] = {
        "run": "r1",
        "name": "a test",
        "key": "k",
        "stage_timeout_s": 5.0,
        "lease_s": 30.0,
    } | options
    transport = None if answer is None else httpx.MockTransport(answer)
    boot_ids = given.pop("boot_ids", [f"of {url.removeprefix('http://')}" for url in urls])
    return WeightControlClient(urls, boot_ids, [2, 1, 4][: len(urls)], transport=transport, **given)
