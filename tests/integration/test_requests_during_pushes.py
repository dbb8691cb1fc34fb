"""Completions are asked for without pause while weights change: none is lost, none hangs, each is of the version it names."""

import asyncio
import itertools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.clients import RolloutClient
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion
from tests.integration.attach import PROMPTS, SAMPLING, attached, change, differences
from tests.integration.processes import server
from tests.pushing import Pushing, learner_of

pytestmark = [pytest.mark.integration, pytest.mark.long]

NUM_PUSHES, NUM_CLIENTS = 20, 4
LONGEST_WAIT_S = 60.0

State = dict[str, torch.Tensor]


async def ask(client: RolloutClient, pushed: asyncio.Event) -> list[RolloutCompletion]:
    """The answers to requests that follow one another until all pushes are done."""
    completions: list[RolloutCompletion] = []
    while not pushed.is_set():
        async with asyncio.timeout(LONGEST_WAIT_S):
            answer = await client.generate(PROMPTS, SAMPLING)
        assert [c.prompt_index for c in answer] == list(range(len(PROMPTS)))
        completions += answer
    return completions


def copy_of(model: PreTrainedModel) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


async def push_all(pushing: Pushing, pushed: asyncio.Event) -> list[State]:
    """The weights of versions 1 to NUM_PUSHES."""
    versions, model = [], pushing.learner.student.model
    for version in range(1, NUM_PUSHES + 1):
        change(model)
        versions.append(copy_of(model))
        assert (await pushing.push(version))["canary_residual"] <= 1e-4
    pushed.set()
    return versions


def version_of(completion: RolloutCompletion) -> int:
    """All of its tokens have one version."""
    (span,) = completion.policy_versions
    assert (span.start, span.end) == (0, len(completion.token_ids))
    return PolicyLabel.parse(span.policy_version).version


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("option", ["tensor_parallel_size", "data_parallel_size"])
async def test_no_request_is_lost_or_mislabelled_during_twenty_pushes(
    option: str, models: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    arguments = ["--student.model", models["qwen3"], "--rollout.max_model_len", "128", f"--rollout.{option}", "2"]
    with server("rollout", tmp_path / "log", *arguments, "--sampling.max_new_tokens", "16") as running:
        learner = learner_of(models["qwen3"])
        async with attached(learner, running.url) as (pushing, client):
            initial = copy_of(learner.student.model)
            await pushing.push(0)
            pushed = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                asking = [group.create_task(ask(client, pushed)) for _ in range(NUM_CLIENTS)]
                all_pushes = group.create_task(push_all(pushing, pushed))
    weights = [initial, *all_pushes.result()]
    model = learner.student.model
    by_version: dict[int, list[RolloutCompletion]] = {}
    for completion in itertools.chain.from_iterable(task.result() for task in asking):
        by_version.setdefault(version_of(completion), []).append(completion)
    by_version.pop(0, None)  # the next push may begin before anything is asked
    assert by_version.keys() == set(range(1, NUM_PUSHES + 1))
    for version, completions in by_version.items():
        model.load_state_dict(weights[version])
        assert differences(model, completions).max() <= 1e-4, version
    model.load_state_dict(weights[2])
    assert differences(model, by_version[1]).mean() > 1e-2  # one push changes enough for that to show
