"""Push the student's weights to every rollout server, all or nothing, and prove that they arrived.

    pause ► start ► broadcast (nccl | gloo) ► finish(version) ► resume ► canary

    consumes   the trainer's model at a version
    produces   servers that answer under that version, or WeightSyncError
    waits for  each stage, with a deadline
    unblocked  by the servers; nobody else drives these routes

The canary samples a few completions under the new weights and compares their logprobs with the trainer's
own. It catches garbage (stale, mixed or damaged weights), not the difference of one small step: its
residual is reported as a metric. A failed push is repeated once in full, over a new group.
"""

import asyncio
import logging
import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from services.causal_lm import rope_switch
from services.clients import RolloutClient
from services.config import RunConfig
from services.errors import DistillServeError, StartupError, WeightSyncError
from services.padding import cut_by_padded_tokens, pad_rows, predicting_positions
from services.schemas import RolloutCompletion, RolloutInfo, RolloutSampling
from services.weight_transfer import trainer_engine
from services.weight_transfer.control import WeightControlClient
from services.weight_transfer.rendezvous import listen_on
from trainer.model import compute_dtype_of, evaluating, student_logprobs
from trainer.prompts import Prompt

logger = logging.getLogger(__name__)

_CANARY_NEW_TOKENS = 16
_FLOAT32_TOLERANCE, _HALF_TOLERANCE = 1e-4, 0.05


class WeightSync:
    """Owns the transfer group and the version numbers.

    Args:
        model: the trainer's student.
        client: the rollout servers' data plane, for the canary.
        canary_prompts: a few prompts of the dataset.
        key: the rollout servers' key.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        client: RolloutClient,
        infos: list[RolloutInfo],
        canary_prompts: list[Prompt],
        key: str | None,
    ) -> None:
        self._config, self._model, self._client, self._infos = config, model, client, infos
        self._prompts = [p.token_ids for p in canary_prompts]
        self._compute_dtype = compute_dtype_of(config, model.device)
        self._control = WeightControlClient(
            client.urls, [info.world_size for info in infos], key, config.weight_sync.stage_timeout_s
        )
        self._engine: Any = None
        self._check_backends()

    def _check_backends(self) -> None:
        backend = self._config.weight_sync_backend()
        for url, info in zip(self._client.urls, self._infos, strict=True):
            if info.weight_transfer_backend != backend:
                raise StartupError(
                    f"{url} receives weights over {info.weight_transfer_backend}, this trainer would send over {backend}; "
                    "start both with the same weight_sync.backend"
                )
        if len({info.dtype for info in self._infos}) > 1:
            raise StartupError("the rollout servers run in different dtypes; start them with the same rollout.dtype")
        if backend == "nccl":
            self._check_own_card()

    def _check_own_card(self) -> None:
        """nccl connects cards, each of them once; by UUID, for numbers mean something else in every process."""
        fix = "leave weight_sync.backend out on both sides, or pass gloo"
        device = self._model.device
        if device.type != "cuda":
            raise StartupError(f"weight_sync.backend = nccl needs the trainer on a GPU, it is on {device.type}; {fix}")
        ours = f"GPU-{str(torch.cuda.get_device_properties(device).uuid).lower().removeprefix('gpu-')}"
        for url, info in zip(self._client.urls, self._infos, strict=True):
            if ours in info.gpu_uuids:
                raise StartupError(
                    f"weight_sync.backend = nccl, but {url} runs on this trainer's card {ours}, and nccl connects different "
                    f"ones; give student.cuda_devices another GPU, or {fix}"
                )

    @property
    def rollout_dtype(self) -> str:
        return self._infos[0].dtype

    async def push(self, version: int) -> dict[str, float]:
        """Make `version` live everywhere, or raise.

        Returns:
            seconds of the push and of the canary, and the canary's residual.

        Raises:
            WeightSyncError: the push, or its canary, failed twice.
        """
        try:
            return await self._push_once(version)
        except DistillServeError as error:
            logger.warning("push of version %d failed, repeating it in full: %s", version, error)
        self._disconnect()
        return await self._push_once(version)

    async def _push_once(self, version: int) -> dict[str, float]:
        started = time.monotonic()
        # The control plane is synchronous, as vLLM's engines are; the canary below needs the event loop.
        await asyncio.to_thread(self._send, version)
        sent = time.monotonic()
        residual = await self._run_canary(version)
        return {"push_s": sent - started, "canary_s": time.monotonic() - sent, "canary_residual": residual}

    def _send(self, version: int) -> None:
        try:
            self._choose_device()
            if self._engine is None:
                self._engine = self._connect()
            self._control.version = str(version)
            self._control.pause()
            self._engine.send_weights()
            self._control.resume()
        except (RuntimeError, ValueError, OSError) as error:  # torch reports a lost peer as a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WeightSyncError(f"push of version {version}: {reason}") from error

    def _choose_device(self) -> None:
        """In the thread that pushes: a new thread's device is 0, and nccl packs on streams of its own, which wait for
        nothing: without this, weights from before the optimizer's step may go out."""
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.synchronize(device)

    def _connect(self) -> Any:
        self._control.clear_abandoned_update()
        sync = self._config.weight_sync
        with listen_on(sync.master_address, 0) as probe:  # a port that is free where the rendezvous will be
            port = probe.getsockname()[1]
        return trainer_engine.build(
            self._config.weight_sync_backend(),
            self._control,
            self._model,
            dtype=getattr(torch, self.rollout_dtype),
            address=sync.master_address,
            port=port,
            world_size=1 + sum(self._control.world_sizes),
            timeout_s=sync.stage_timeout_s,
            bucket_bytes=sync.bucket_bytes,
        )

    async def _run_canary(self, version: int) -> float:
        residuals = []
        for url, info in zip(self._client.urls, self._infos, strict=True):
            num_new = min(_CANARY_NEW_TOKENS, info.max_model_len // 2)
            prompts = [ids[num_new - info.max_model_len :] for ids in self._prompts]
            completions = await self._client.generate_on(url, prompts, RolloutSampling(max_new_tokens=num_new))
            check_version(url, completions, version)
            differences = await asyncio.to_thread(self._differences, prompts, completions)
            residuals.append(self._check_residual(url, version, differences))
        return max(residuals)

    def _check_residual(self, url: str, version: int, differences: np.ndarray) -> float:
        # Half precision on either side rounds in other places, so single tokens differ by more.
        dtypes = (self.rollout_dtype, str(self._compute_dtype).removeprefix("torch."))
        half = next((dtype for dtype in dtypes if dtype != "float32"), None)
        residual = float(differences.mean() if half else differences.max())
        tolerance = self._config.weight_sync.canary_tolerance or (_HALF_TOLERANCE if half else _FLOAT32_TOLERANCE)
        if not residual <= tolerance:
            raise WeightSyncError(
                f"canary of version {version} on {url}: its logprobs differ from the trainer's by {residual:.2g}, more than "
                f"{tolerance:g} ({half or 'float32'}); the server holds other weights than the trainer sent"
            )
        return residual

    @torch.no_grad()
    def _differences(self, prompts: list[list[int]], completions: list[RolloutCompletion]) -> np.ndarray:
        """[N] absolute differences between the server's and the trainer's logprobs of the sampled tokens."""
        sequences = [[*prompt, *c.token_ids.tolist()] for prompt, c in zip(prompts, completions, strict=True)]
        limit, switch = self._config.pipeline.micro_batch_tokens, rope_switch(self._model)
        found = []
        with evaluating(self._model):
            for group in cut_by_padded_tokens(list(map(len, sequences)), limit, boundary=switch):
                answered = [completions[index] for index in group]
                ours = self._token_logprobs([sequences[index] for index in group], answered)
                found.append(np.abs(ours - np.concatenate([c.rollout_logprobs for c in answered])))
        return np.concatenate(found)

    def _token_logprobs(self, sequences: list[list[int]], completions: list[RolloutCompletion]) -> np.ndarray:
        """[N] the trainer's logprobs of the tokens of completions, which `sequences` end with."""
        input_ids, device = pad_rows(sequences), self._model.device
        lengths = [len(c.token_ids) for c in completions]
        prompt_lengths = [len(s) - length for s, length in zip(sequences, lengths, strict=True)]
        positions = predicting_positions(prompt_lengths, lengths, input_ids.shape[1])
        token_ids = torch.from_numpy(np.concatenate([c.token_ids for c in completions])).long().to(device)
        ids, where = input_ids.to(device), positions.to(device)
        support = token_ids.unsqueeze(-1)
        output = student_logprobs(
            self._model, ids, where, token_ids, support, temperature=1.0, compute_dtype=self._compute_dtype
        )
        return output.token_logprobs.float().cpu().numpy()

    def _disconnect(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def close(self) -> None:
        """Leave the group; the servers that still live are told to leave it too."""
        self._disconnect()
        try:
            self._control.clear_abandoned_update()
        except WeightSyncError as error:  # the next trainer clears what is left
            logger.debug("%s", error)
        self._control.close()


def check_version(url: str, completions: list[RolloutCompletion], version: int) -> None:
    """Every token must have been sampled under `version`.

    Raises:
        WeightSyncError: the server answers under another version.
    """
    seen = {span.policy_version for c in completions for span in c.policy_versions}
    if seen != {str(version)}:
        raise WeightSyncError(f"{url} answers under version {sorted(seen)} after a push of version {version}")
