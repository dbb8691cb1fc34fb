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
from trainer.model import evaluating, student_logprobs
from trainer.prompts import Prompt

logger = logging.getLogger(__name__)

_CANARY_NEW_TOKENS = 16
# Half precision: vLLM and transformers round in different places, so single tokens differ by more.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}


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
            if self._engine is None:
                self._engine = self._connect()
            self._control.version = str(version)
            self._control.pause()
            self._engine.send_weights()
            self._control.resume()
        except (RuntimeError, ValueError, OSError) as error:  # torch reports a lost peer as a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WeightSyncError(f"push of version {version}: {reason}") from error

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
        residual = float(differences.max() if self.rollout_dtype == "float32" else differences.mean())
        tolerance = self._config.weight_sync.canary_tolerance or _TOLERANCE[self.rollout_dtype]
        if not residual <= tolerance:
            raise WeightSyncError(
                f"canary of version {version} on {url}: its logprobs differ from the trainer's by {residual:.2g}, more than "
                f"{tolerance:g} ({self.rollout_dtype}); the server holds other weights than the trainer sent"
            )
        return residual

    @torch.no_grad()
    def _differences(self, prompts: list[list[int]], completions: list[RolloutCompletion]) -> np.ndarray:
        """[N] absolute differences between the server's and the trainer's logprobs of the sampled tokens."""
        sequences = [[*prompt, *c.token_ids.tolist()] for prompt, c in zip(prompts, completions, strict=True)]
        limit, switch = self._config.pipeline.tokens_per_micro_batch, rope_switch(self._model)
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
        output = student_logprobs(self._model, ids, where, token_ids, token_ids.unsqueeze(-1), temperature=1.0)
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
