"""Pushes to a real vLLM: after each, the server's logprobs are the trainer's, also after a push that broke off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from services.errors import ServerHeldError, WeightSyncError
from services.weight_transfer.gloo import GlooChannel
from services.weight_transfer.source import CheckpointSource
from services.wire.policy_label import PolicyLabel
from tests.integration.attach import (
    PROMPTS,
    SAMPLING,
    BreaksOff,
    attached,
    change,
    differences,
    push_and_compare,
    status,
)
from tests.integration.processes import Server, server
from tests.pushing import Pushing, learner_of

pytestmark = pytest.mark.integration

CASES = [("qwen3", "float32"), ("llama", "float32"), ("qwen3", "bfloat16"), ("llama", "bfloat16")]
LONG = [("llama", "float32"), ("qwen3", "bfloat16")]
NUM_PUSHES = 5
NUM_TRIES = 20


@contextmanager
def serve(architecture: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if (architecture, dtype) == CASES[0]:
        yield request.getfixturevalue("rollout_server")
        return
    model = request.getfixturevalue("models")[architecture]
    arguments = ["--student.model", model, "--rollout.dtype", dtype, "--rollout.max_model_len", "128"]
    with server("rollout", tmp_path / "log", *arguments, "--sampling.max_new_tokens", "16") as running:
        yield running


async def break_off(pushing: Pushing, monkeypatch: pytest.MonkeyPatch, running: Server) -> None:
    """A push of other weights that ends between two layers, twice; the version before is still what the server says."""
    source = BreaksOff(pushing.learner.student.model, pushing.sync.rollout_dtype)
    before = status(running)["policy_version"]
    with monkeypatch.context() as patch:
        patch.setattr(pushing.sync._sender, "_bucket_bytes", 1)
        with pytest.raises(WeightSyncError, match="breaks off"):
            await pushing.push_once(99, source)
        assert status(running)["policy_version"] == before and not status(running)["admits"]
        with pytest.raises(WeightSyncError, match="breaks off"):
            await pushing.push_once(99, source)
    assert status(running)["policy_version"] == "mixed"  # seen when the second attempt cleared what the first left


@pytest.mark.parametrize(
    ("architecture", "dtype"), [pytest.param(*case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES]
)
@pytest.mark.timeout(400)
async def test_server_and_trainer_agree_after_every_push(
    architecture: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    with serve(architecture, dtype, request, tmp_path) as running:
        learner = learner_of(request.getfixturevalue("models")[architecture])
        model = learner.student.model
        async with attached(learner, running.url) as (pushing, client):
            for version in range(NUM_PUSHES):
                change(model)
                if version == 3:
                    await break_off(pushing, monkeypatch, running)
                    change(model)
                metrics = await pushing.push(version)
                completions = await client.generate(PROMPTS, SAMPLING)
                labels = {s.policy_version for c in completions for s in c.policy_versions}
                assert labels == {str(PolicyLabel(version, 1, pushing.versions.run))}
                found = differences(model, completions)
                if dtype == "float32":
                    assert found.max() <= 1e-4
                    assert metrics["canary_residual"] <= 1e-4
                else:
                    assert found.mean() <= 0.02  # rounding of two implementations; a stale head is off by 0.1 and more
            if architecture == "llama" and dtype == "bfloat16":
                await refuse_what_does_not_arrive(pushing, monkeypatch, running)


async def refuse_what_does_not_arrive(pushing: Pushing, monkeypatch: pytest.MonkeyPatch, running: Server) -> None:
    """After steps of 1e-6, which the canary in half precision does not see: a tensor withheld, a stale bucket, a flipped byte."""
    with monkeypatch.context() as patch:
        sent = tamper(patch, lambda buffer: buffer)
        await pushing.push(NUM_PUSHES)
    model = pushing.learner.student.model
    names = [p.name for p in (await pushing.snapshot(NUM_PUSHES)).source.metadata()]
    for trial in range(NUM_TRIES):
        for fault in ("withheld", "stale", "flipped"):
            change(model, 1e-6)
            source = Withholds(model, names[trial % len(names)]) if fault == "withheld" else None
            with monkeypatch.context() as patch:
                if fault != "withheld":
                    tamper(patch, (lambda buffer: sent[0]) if fault == "stale" else flipped(trial))
                said = (
                    "no weights came for"
                    if fault == "withheld"
                    else "did not arrive as they were sent: other checksums"
                )
                with pytest.raises(WeightSyncError, match=said):
                    await pushing.push_once(NUM_PUSHES + 1, source)
            found, before = status(running), f"{NUM_PUSHES}.1@{pushing.versions.run}"
            assert not found["admits"], (fault, trial)
            assert found["policy_version"] in (
                before,
                "mixed",
            )  # mixed, once what the push before has left was discarded
            assert [worker["label"] for worker in found["workers"]] in ([before], [None])
    await pushing.push(NUM_PUSHES + 1)


class Withholds(CheckpointSource):
    """Leaves a parameter out of what it announces and of what it yields."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__(model, torch.bfloat16)
        self._name = name

    def metadata(self) -> list[Any]:
        return [p for p in super().metadata() if p.name != self._name]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (item for item in super().__iter__() if item[0] != self._name)


def tamper(patch: pytest.MonkeyPatch, change_bytes: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Let the first bucket of a push leave the trainer with other bytes; returns what the trainer wanted to send."""
    broadcast, sent = GlooChannel.broadcast, []

    def tampered(channel: GlooChannel, buffer: torch.Tensor) -> None:
        sent.append(buffer.clone())
        broadcast(channel, change_bytes(buffer) if len(sent) == 1 else buffer)

    patch.setattr(GlooChannel, "broadcast", tampered)
    return sent


def flipped(trial: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Another byte in each trial."""

    def flip(buffer: torch.Tensor) -> torch.Tensor:
        copy = buffer.clone()
        copy[trial * 7919 % len(copy)] ^= 1
        return copy

    return flip


async def test_a_second_trainer_is_refused_while_the_first_lives_and_served_when_it_is_gone(
    rollout_server: Server, models: dict[str, str]
) -> None:
    learner, other = learner_of(models["qwen3"]), learner_of(models["qwen3"])
    async with attached(learner, rollout_server.url, run="first", lease_s=2.0) as (pushing, client):
        await push_and_compare(pushing, client, 0)
        with pytest.raises(ServerHeldError, match=r"held by the run first \(output.dir .*--weight_sync.take_over true"):
            async with attached(other, rollout_server.url, run="second"):
                pass
        await push_and_compare(pushing, client, 1)
        async with attached(other, rollout_server.url, run="third", take_over=True) as (taken, its_client):
            await push_and_compare(taken, its_client, 1)
            with pytest.raises(ServerHeldError, match="held by the run third"):
                await pushing.push(2)
            await push_and_compare(taken, its_client, 2)
    assert status(rollout_server)["holder"] is None and status(rollout_server)["admits"]
