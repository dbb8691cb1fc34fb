"""Push the student's weights to every rollout server that there is, all or nothing, and prove that they arrived.

    pause ► start ► broadcast (nccl | gloo) ► compare checksums ► finish ► canary ► resume

    consumes   a snapshot of the student's weights
    produces   servers that answer under that version, or WeightSyncError
    waits for  each stage, with a deadline
    unblocked  by the servers; they take these calls from the run that holds them alone

A failed push is repeated once in full, over a new group. Servers that are gone are left out of it, those that are back taken in
(services/clients/rollout_group.py).
"""

import asyncio
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from services.clients import RolloutClient
from services.config import RunConfig
from services.errors import DistillServeError, PeerError, ServerHeldError, StartupError, WeightSyncError
from services.weight_transfer.channel import GroupLostError
from services.weight_transfer.control import WeightControlClient
from services.weight_transfer.sender import WeightSender, check_arrival
from services.weight_transfer.source import WeightSource
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutInfo, RolloutSampling
from services.wire.weights import CanaryScores
from trainer.data.prompts import Prompt
from trainer.weights.canary import NEW_TOKENS, PROMPT_TOKENS, RENEWED_AFTER, Canary
from trainer.weights.policy_versions import PolicyVersions
from trainer.weights.snapshot import GivenTokens, WeightSnapshot

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# What a completion in flight may take a token, with many others beside it, before a pause gives up on it.
_DRAIN_S_PER_TOKEN = 0.25
# A worker that fails is heard of twice: its end of the group closes, and its server says why, a moment later.
_REASON_S = 10.0
# What a broken broadcast may take to notice it.
_ABORT_S = 10.0


class WeightSync:
    """Owns the transfer group and the version numbers.

    Args:
        device: of the student.
        client: the rollout servers' data plane; its completions are those of this run from `hold` on.
        canary_prompts: a few prompts of the dataset.
        key: the rollout servers' key.
        run: id of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        client: RolloutClient,
        infos: list[RolloutInfo],
        canary_prompts: list[Prompt],
        key: str | None,
        run: str,
    ) -> None:
        self._config, self._device, self._client = config, device, client
        self._infos = dict(zip(client.urls, infos, strict=True))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._prompts = [p.token_ids for p in canary_prompts]
        self.versions = PolicyVersions(run)
        sync = config.weight_sync
        self._control = WeightControlClient(
            client.urls,
            [info.boot_id for info in infos],
            [info.world_size for info in infos],
            run=run,
            name=f"output.dir {config.output.dir!r}, process {os.getpid()} on {platform.node()}",
            key=key,
            stage_timeout_s=sync.stage_timeout_s,
            lease_s=sync.lease_s,
            on_restart=self._hear_of_restart,
        )
        self._check_backends()
        self._sender = WeightSender(
            config.weight_sync_backend(),
            sync.master_address,
            sync.master_port or 0,
            sync.stage_timeout_s,
            sync.bucket_bytes,
            device,
        )
        self._connected = False
        self._rejoining: set[str] = set()  # servers that have not been part of a push since they came back
        self._canary: Canary | None = None
        self._num_checked = 0  # pushes that the canary's tokens have checked
        self._threads: list[threading.Thread] = []

    def _check_backends(self) -> None:
        backend = self._config.weight_sync_backend()
        for url, info in self._infos.items():
            if info.weight_transfer_backend != backend:
                raise StartupError(
                    f"{url} receives weights over {info.weight_transfer_backend}, this trainer would send over {backend}; "
                    "start both with the same weight_sync.backend"
                )
        if len({info.dtype for info in self._infos.values()}) > 1:
            raise StartupError("the rollout servers run in different dtypes; start them with the same rollout.dtype")
        if backend == "nccl":
            self._check_own_card()

    def _check_own_card(self) -> None:
        """nccl connects cards, each of them once; by UUID, for numbers mean something else in every process."""
        fix = "leave weight_sync.backend out on both sides, or pass gloo"
        device = self._device
        if device.type != "cuda":
            raise StartupError(f"weight_sync.backend = nccl needs the trainer on a GPU, it is on {device.type}; {fix}")
        ours = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).lower().removeprefix('gpu-')}"
        for url, info in self._infos.items():
            if ours in info.gpu_uuids:
                raise StartupError(
                    f"weight_sync.backend = nccl, but {url} runs on this trainer's card {ours}, and nccl connects different "
                    f"ones; give student.cuda_devices another GPU, or {fix}"
                )

    @property
    def rollout_dtype(self) -> torch.dtype:
        """Of the weights that the servers take."""
        found: torch.dtype = getattr(torch, self._an_info.dtype)
        return found

    @property
    def _an_info(self) -> RolloutInfo:
        """Of any server: they are of one dtype."""
        return next(iter(self._infos.values()))

    async def hold(self, on_wait: Callable[[str, float], None] | None = None) -> None:
        """Make the servers this run's own.

        Args:
            on_wait: told of a server that another run holds, and for how many seconds it is waited for.

        Raises:
            ServerHeldError: a run that lives holds one of them.
            WeightSyncError: a server cannot be asked.
        """
        await self._control.hold(take_over=self._config.weight_sync.take_over, on_wait=on_wait)
        self._client.run, self._loop = self.versions.run, asyncio.get_running_loop()
        group = self._client.group
        group.manage(self._control.boot_ids, self.versions)
        group.on_leave, group.on_return = (partial(self._control.renew, renews=renews) for renews in (False, True))

    def _hear_of_restart(self, url: str) -> None:
        """In the thread of the lease."""
        if self._loop is not None:
            leave = partial(self._client.group.leave, url, "was started again", needs_weights=True)
            with suppress(RuntimeError):  # the run is over
                self._loop.call_soon_threadsafe(leave)

    async def canary(self) -> GivenTokens:
        """What the next push is checked with: sampled from the first server before the first push, and anew every
        `RENEWED_AFTER` pushes, since what the student wrote then may be what it would not write any more."""
        if self._canary is None:
            compute_dtype = self._config.compute_dtype(on_gpu=self._device.type == "cuda")
            dtypes = self._an_info.dtype, compute_dtype
            self._canary = Canary(self._config.weight_sync, await self._first_canary(), dtypes)
        elif self._num_checked >= RENEWED_AFTER:
            with suppress(DistillServeError):  # the push will say what is wrong with the server
                self._canary.given, self._num_checked = await self._sample_canary(), 0
        return self._canary.given

    async def publish(self, snapshot: WeightSnapshot) -> dict[str, float]:
        """Make a version live on every server that there is, or raise.

        Args:
            snapshot: with the logprobs of `canary`.

        Returns:
            seconds of the push and of the canary, the canary's residual, and the number of servers.

        Raises:
            ServerHeldError: another run has taken a server over.
            OutageError: fewer than `pipeline.min_rollout_servers` answered for `rollout_client.outage_s`.
            WeightSyncError: the push, or its canary, failed twice although every server answered.
        """
        has_failed, first_failed = False, math.inf
        while True:
            await self._gather_servers()
            try:
                return await self._publish_once(snapshot)
            except ServerHeldError:
                raise
            except DistillServeError as error:
                now = time.monotonic()
                first_failed = min(first_failed, now)
                if await self._drop_servers(error):
                    if now - first_failed > self._config.rollout_client.outage_s:
                        raise self._client.group.outage(self._config.pipeline.min_rollout_servers) from error
                    continue
                if has_failed:
                    raise
                has_failed = True
                logger.warning("push of version %d failed, repeating it in full: %s", snapshot.version, error)

    async def _gather_servers(self) -> None:
        """Leave out the servers that are away and take in those that are back, once there are enough.

        Raises:
            OutageError: there are too few for too long.
            ServerHeldError: another run holds the only one there is.
        """
        group, control, least = self._client.group, self._control, self._config.pipeline.min_rollout_servers
        while True:
            await group.some_for_a_push(least)
            live = group.live
            for url in [url for url in control.urls if url not in live]:
                control.leave_out(url)
                self._disconnect()
            as_they_were = {url: self._infos[url] for url in live if url not in control.urls}
            for url, info in (as_they_were | group.back()).items():
                await self._rejoin(url, info)
            if len(control.urls) >= least:
                return

    async def _rejoin(self, url: str, info: RolloutInfo) -> None:
        group, control = self._client.group, self._control
        if (misfit := _misfit(self._infos[url], info)) is not None:
            group.refuse(url, info.boot_id, misfit)
            return
        try:
            await control.rejoin(url, info.boot_id, info.world_size)
        except ServerHeldError as error:
            if not control.urls:
                raise
            group.leave(url, f"is not to be had: {error}")
        except WeightSyncError as error:
            group.leave(url, f"cannot be held: {error}")
        else:
            self._infos[url] = info
            self._rejoining.add(url)
            self._disconnect()

    async def _drop_servers(self, error: DistillServeError) -> bool:
        """Find out who is to blame for a push that failed: those that are gone, else those that had just come back.

        Returns:
            whether the push may do without them.

        Raises:
            ServerHeldError: another run has taken a server over.
        """
        group, control = self._client.group, self._control
        gone = await control.probe()
        for url, reason in gone.items():
            group.leave(url, reason, needs_weights=True)
        if gone:
            logger.info("the push is repeated without %s: %s", ", ".join(gone), error)
            return True
        new = [url for url in control.urls if url in self._rejoining]
        if len(new) == len(control.urls):
            return False
        for url in new:
            group.refuse(url, control.boot_ids[url], f"cannot be taken in: {error}")
        return bool(new)

    async def _publish_once(self, snapshot: WeightSnapshot) -> dict[str, float]:
        canary = self._canary
        assert canary is not None, "a snapshot has the logprobs of a canary"
        label = self.versions.next_label(snapshot.version)
        started = time.monotonic()
        try:
            # Before the workers are made to meet: data-parallel engines take steps together until they are paused.
            await self._control.pause(self._drain_s())
            if not self._connected:
                await self._connect()
            await self._control.start()
            await self._send_proven(snapshot)
            await self._control.finish(str(label))
            sent = time.monotonic()
            scored = await self._control.score_canary(canary.given.sequences)
            residual = self._check_canary(label, canary, snapshot.canary_logprobs, scored)
            self._num_checked += 1
            self.versions.set_live(label)  # one server may sample before another has resumed
            await self._control.resume()
            self._client.group.pushed(self._control.boot_ids)
            self._rejoining.clear()
        except BaseException as error:
            self._disconnect()
            if isinstance(error, RuntimeError | ValueError | OSError) and not isinstance(error, DistillServeError):
                # torch reports a lost peer as a RuntimeError
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise WeightSyncError(f"push of version {snapshot.version}: {reason}") from error
            raise
        return {
            "push_s": sent - started,
            "canary_s": time.monotonic() - sent,
            "canary_residual": residual,
            "num_rollout_servers": len(self._control.urls),
        }

    def _drain_s(self) -> float:
        """How long completions in flight may take to end before a push."""
        return self._config.weight_sync.stage_timeout_s + _DRAIN_S_PER_TOKEN * self._config.longest_completion()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()

        def tell(rendezvous: dict[str, Any]) -> None:
            asyncio.run_coroutine_threadsafe(self._control.connect(rendezvous), loop).result()

        world_size = 1 + sum(self._control.world_sizes)
        await self._in_thread(lambda: self._sender.connect(tell, world_size))
        self._connected = True

    async def _send_proven(self, snapshot: WeightSnapshot) -> None:
        """Send; where an adapter is trained, see it in what was sent."""
        if (proof := snapshot.proof) is None:
            await self._send(snapshot.source)
        else:
            await self._send(proof.watching(snapshot.source))
            proof.check()

    async def _send(self, source: WeightSource) -> None:
        """Broadcast, and compare what every worker got; whichever end fails first, the other does not wait for it."""
        update = await self._in_thread(lambda: self._sender.update(source))
        receiving = asyncio.create_task(self._control.receive(await asyncio.to_thread(asdict, update)))
        receiving.add_done_callback(self._abort_if_failed)
        try:
            checksums = await self._in_thread(lambda: self._sender.send(source))
            reports = await receiving
        except (GroupLostError, TimeoutError, WeightSyncError) as error:
            # Where a worker has failed its server says so, and why; else it says that the trainer is gone.
            self._sender.abort()
            await asyncio.wait({receiving}, timeout=_REASON_S)
            receiving.cancel()
            if receiving.done() and (said := receiving.exception()) is not None:
                raise said from error
            raise
        except BaseException:
            self._sender.abort()
            receiving.cancel()
            await asyncio.wait({receiving})
            raise
        await asyncio.to_thread(check_arrival, update, checksums, reports, self._control.urls)

    def _abort_if_failed(self, receiving: asyncio.Task[Any]) -> None:
        if receiving.cancelled() or receiving.exception() is not None:
            self._sender.abort()

    async def _first_canary(self) -> GivenTokens:
        """Sample it; servers that are away are waited for, as by a push.

        Raises:
            OutageError: too few have answered for `rollout_client.outage_s`.
            PeerError, WeightSyncError: servers that answer do not complete the prompts, twice.
        """
        group, began, has_failed = self._client.group, time.monotonic(), False
        while True:
            try:
                return await self._sample_canary()
            except PeerError as error:
                is_there = all([await group.check(url) for url in self._control.urls])
                if is_there and has_failed:
                    raise
                if time.monotonic() - began > self._config.rollout_client.outage_s:
                    raise group.outage(self._config.pipeline.min_rollout_servers) from error
                has_failed |= is_there
            await self._gather_servers()

    async def _sample_canary(self) -> GivenTokens:
        """Complete a few prompts on the first server that does it, under the weights that it holds."""
        limit = min(info.max_model_len for info in self._infos.values())
        num_new = min(NEW_TOKENS, max(1, (limit - 1) // 2))  # a canary is scored, and one token follows it
        kept = min(PROMPT_TOKENS, limit - 1 - num_new)
        prompts = [ids[-kept:] for ids in self._prompts]
        first, *others = self._client.group.live or self._control.urls
        try:
            return await self._sample_on(first, prompts, num_new)
        except (PeerError, WeightSyncError) as error:
            for url in others:
                with suppress(PeerError, WeightSyncError):
                    return await self._sample_on(url, prompts, num_new)
            raise error

    async def _sample_on(self, url: str, prompts: list[list[int]], num_new: int) -> GivenTokens:
        sampling, patience = RolloutSampling(max_new_tokens=num_new), self._drain_s()
        try:
            async with asyncio.timeout(patience):  # a server says that it lives for as long as it takes
                completions = await self._client.generate_on(url, prompts, sampling)
        except TimeoutError as error:
            raise WeightSyncError(
                f"{url} took longer than {patience:.0f} s to complete {len(prompts)} prompts"
            ) from error
        return GivenTokens(prompts, [c.token_ids.tolist() for c in completions])

    def _check_canary(
        self, label: PolicyLabel, canary: Canary, ours: list[np.ndarray], scored: list[CanaryScores]
    ) -> float:
        """The largest residual of all data-parallel engines of all servers."""
        residuals = []
        for url, scores in zip(self._control.urls, scored, strict=True):
            where = f"version {label.version} on {url}"
            if scores.policy_version != str(label) or not scores.token_logprobs:
                raise WeightSyncError(f"canary of {where}: it answers under {scores.policy_version}, not {label}")
            for theirs in scores.token_logprobs:
                residuals.append(canary.residual(ours, theirs))
                canary.check(residuals[-1], where)
        canary.calibrate(max(residuals))
        return max(residuals)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of blocking work in a thread that does not keep the process alive, on the model's device there."""
        done: Future[Result] = Future()
        done.set_running_or_notify_cancel()  # who is cancelled meanwhile does not take the thread's place to answer

        def run() -> None:
            try:
                self._choose_device()
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name="weight-push", daemon=True)
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        thread.start()
        return await asyncio.wrap_future(done)

    def _choose_device(self) -> None:
        """A new thread's device is 0 and its stream waits for nothing: without this, weights from before the optimizer's step
        may be packed."""
        device = self._device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.synchronize(device)

    def _disconnect(self) -> None:
        self._sender.abort()
        self._connected = False

    async def close(self) -> None:
        """End a push that is under way, leave the group, and give the servers back."""
        self._disconnect()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, _ABORT_S)
        await self._control.release()
        await self._control.close()


def _misfit(before: RolloutInfo, now: RolloutInfo) -> str | None:
    """Why a server that is back is not what it was, as what follows its URL; None where it is."""
    for name in ("protocol", "dtype", "weight_transfer_backend", "vocab_size"):
        ours, theirs = getattr(before, name), getattr(now, name)
        if theirs != ours:
            return f"was started again with another {name}: {theirs}, not {ours}"
    for name in ("max_model_len", "max_logprobs"):
        ours, theirs = getattr(before, name), getattr(now, name)
        if theirs < ours:
            return f"was started again with a lower {name}: {theirs}, below {ours}"
    return None
