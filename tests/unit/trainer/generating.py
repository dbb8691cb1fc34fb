"""Rollout servers that generate with transformers' own forward pass, a token at a time; an oracle for vLLM's place."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, RolloutSampling, VersionSpan
from trainer.data.prompts import Prompt
from trainer.groups import Rollout
from trainer.rollouts import generate_groups
from trainer.weights.policy_versions import PolicyVersions


class Generator:
    """Completes prompts with a model, greedily at temperature 0, else by sampling its whole distribution.

    Args:
        end_token_ids: what ends a completion.
    """

    def __init__(
        self, model: PreTrainedModel, end_token_ids: list[int], version: str = "0.1@mine", seed: int = 0
    ) -> None:
        self._model, self._ends, self.version = model, set(end_token_ids), version
        self._random = torch.Generator().manual_seed(seed)

    def complete(self, prompt: list[int], sampling: RolloutSampling) -> list[int]:
        return self._complete([prompt], sampling)[0]

    @torch.no_grad()
    def _complete(self, prompts: list[list[int]], sampling: RolloutSampling) -> list[list[int]]:
        """Completions of equally long prompts; each step is one forward pass over all of them."""
        ids, has_ended = torch.tensor(prompts), torch.zeros(len(prompts), 1, dtype=torch.bool)
        ends = torch.tensor(sorted(self._ends))
        for _ in range(sampling.max_new_tokens):
            logits = self._model(ids).logits[:, -1].double()
            if sampling.temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                probabilities = (logits / sampling.temperature).softmax(-1)
                new = torch.multinomial(probabilities, 1, generator=self._random)
            ids = torch.cat([ids, new], 1)
            has_ended |= torch.isin(new, ends)
            if has_ended.all():
                break
        return [self._up_to_end(row) for row in ids[:, len(prompts[0]) :].tolist()]

    def _up_to_end(self, ids: list[int]) -> list[int]:
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in self._ends), len(ids))]

    async def generate(
        self, prompts: list[list[int]], sampling: RolloutSampling, *_: Any, on_completion: Any = None, **__: Any
    ) -> list[RolloutCompletion]:
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        completions = []
        for group in by_length.values():
            for index, ids in zip(group, self._complete([prompts[i] for i in group], sampling), strict=True):
                reason = "stop" if ids[-1] in self._ends else "length"
                span = VersionSpan(self.version, 0, len(ids))
                tokens, logprobs = np.array(ids, np.int32), np.zeros(len(ids), np.float32)
                completions.append(RolloutCompletion(index, 0, tokens, logprobs, reason, [span]))
                if on_completion is not None:
                    on_completion(completions[-1])
        return sorted(completions, key=lambda completion: completion.prompt_index)


def live(*labels: str) -> PolicyVersions:
    """The versions of a run that has pushed these labels."""
    versions = PolicyVersions("mine")
    for label in labels:
        versions.set_live(PolicyLabel.parse(label))
    return versions


async def completed(generator: Generator, prompts: list[Prompt], sampling: RolloutSampling) -> list[Rollout]:
    """A rollout of each prompt."""
    client: Any = generator
    groups = await generate_groups(client, prompts, sampling, live(generator.version))
    return [rollout for group in groups for rollout in group.rollouts]
