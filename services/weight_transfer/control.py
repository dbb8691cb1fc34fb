"""The control plane of a weight push: vLLM's four-method client protocol over HTTP, for several servers at once.

vLLM's own engines neither carry a version nor know about more than one server, so both are added here: each
server gets its own rank offset at init, and the version at finish. Calls fan out and are all-or-nothing:
the first server that fails makes the call fail, with its name, the stage and the time it took.
"""

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from services.connections import blocking_client, describe
from services.errors import ClientClosedError, WeightSyncError
from services.own_key import OwnKeyAuth


class WeightControlClient:
    """Implements `VLLMWeightSyncClient` for a group of rollout servers.

    Args:
        urls: base URLs of the servers, in rank order.
        world_sizes: worker processes of each server, data parallel included.
        key: bearer token of the servers; None: servers of this machine have made their own.
        stage_timeout_s: deadline of each call.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        urls: list[str],
        world_sizes: list[int],
        key: str | None,
        stage_timeout_s: float,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.urls, self.world_sizes = urls, world_sizes
        self.version: str | None = None
        """What the next finish announces; set before each push."""
        self._http = blocking_client(urls, stage_timeout_s, key, transport, None if key else OwnKeyAuth())
        self._executor = ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="weight-control")

    # ---- vLLM's protocol

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every server joins the trainer's group, behind the ranks of the servers before it."""
        bodies = [{"init_info": {**init_info, "rank_offset": offset}} for offset in self.rank_offsets()]
        self._all("init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Returns when the workers have received and loaded everything."""
        self._all("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self.version
        self._all("finish_weight_update", [{"weight_version": version}] * len(self.urls))

    # ---- around it

    def rank_offsets(self) -> list[int]:
        """1 + the world sizes of the servers before; rank 0 is the trainer."""
        return [1 + sum(self.world_sizes[:index]) for index in range(len(self.urls))]

    def pause(self) -> None:
        """Let running completions end, hold new ones, drop the caches (their keys and values are of old weights)."""
        self._all("pause?mode=wait&clear_cache=true")

    def resume(self) -> None:
        self._all("resume")

    def clear_abandoned_update(self) -> None:
        """Bring every server into a state in which it accepts a new group and a new update, whatever was there before."""
        self._all("v1/weights/clear")

    def close(self) -> None:
        self._http.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _all(self, stage: str, bodies: list[Any] | None = None) -> None:
        self._check_open()
        calls = [
            self._executor.submit(self._call, url, stage, body)
            for url, body in zip(self.urls, bodies or [None] * len(self.urls), strict=True)
        ]
        for call in as_completed(calls):  # what one refuses at once, another may wait for until its deadline
            call.result()

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise ClientClosedError(f"the weight control client of {', '.join(self.urls)} is closed; make a new one")

    def _call(self, url: str, stage: str, body: Any) -> None:
        started = time.monotonic()
        try:
            response = self._http.post(f"{url}/{stage}", json=body)
        except httpx.RequestError as error:
            elapsed = time.monotonic() - started
            said = describe(error, "weight_sync.stage_timeout_s")
            raise WeightSyncError(f"{stage} on {url} failed after {elapsed:.1f} s: it {said}") from error
        if not response.is_success:
            elapsed, status = time.monotonic() - started, response.status_code
            key = "; give its key in DISTILLSERVE_ROLLOUT_KEY" if status in (401, 403) else ""
            raise WeightSyncError(f"{stage} on {url} answered {status} after {elapsed:.1f} s: {_reason(response)}{key}")


def _reason(response: httpx.Response) -> str:
    """The detail of a problem document, or the beginning of what came instead."""
    try:
        return str(response.json()["detail"])
    except (ValueError, TypeError, KeyError):
        return response.text[:300]
