"""A step's loss and gradient worked out from raw rows, a sequence and a token at a time, with transformers' own forward pass.

Nothing here packs, pads or names columns with the trainer's code, so columns that change places there show here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models import save_model
from tests.unit.trainer.samples import BATCH, SAMPLES
from tests.unit.trainer.sgd_learners import learner_of
from trainer.teacher_scores import ScoredSample

GAMMA, CAP, TEMPERATURE, LEARNING_RATE = 0.7, 1.5, 1.25, 0.1


def losses_of(model: Any, sample: ScoredSample) -> list[Tensor]:
    """The loss of each token: exclusive returns, capped importance, the hybrid estimate of the reverse KL (docs/losses.md)."""
    prompt, completion = sample.rollout.prompt.token_ids, sample.rollout.completion
    tokens = completion.token_ids.tolist()
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE
    log_q = logits.log_softmax(-1)
    rewards = [float(sample.teacher_token_logprobs[t] - log_q[t, token].detach()) for t, token in enumerate(tokens)]
    losses = []
    for t, token in enumerate(tokens):
        weight = min(CAP, float((log_q[t, token].detach() - float(completion.rollout_logprobs[t])).exp()))
        advantage = sum(GAMMA ** (s - t) * rewards[s] for s in range(t + 1, len(tokens)))
        loss = -weight * advantage * log_q[t, token]
        support = sample.support_ids[t].tolist()
        inside = 0.0 * log_q[t, token]
        for k, candidate in enumerate(support):
            q = log_q[t, candidate]
            loss = loss + q.exp() * (q - float(sample.teacher_support_logprobs[t, k]))
            inside = inside + q.exp()
        tail_ratio = (1 - inside).log() - float(sample.teacher_tail_logprob[t])
        loss = loss + (1 - inside) * tail_ratio
        if token not in support:
            ratio = log_q[t, token] - float(sample.teacher_token_logprobs[t])
            loss = loss + weight * float((ratio - tail_ratio).detach()) * log_q[t, token]
        losses.append(loss)
    return losses


@pytest.mark.parametrize("tokens_per_micro_batch", [10_000, 12])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_step_is_the_loss_of_its_raw_rows(architecture: str, tokens_per_micro_batch: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture, initializer_range=0.2)
    sections: dict[str, Any] = {
        "loss": {
            "gamma": GAMMA,
            "length_normalization": False,
            "advantage_clip": None,
            "importance_cap": CAP,
            "kd_temperature": TEMPERATURE,
        },
        "sampling": {"temperature": TEMPERATURE},
        "optimizer": {"max_grad_norm": 1e9},
        "pipeline": {"tokens_per_micro_batch": tokens_per_micro_batch},
    }
    learner = learner_of(folder, LEARNING_RATE, **sections)
    before = {name: p.detach().clone() for name, p in learner.student.model.named_parameters()}
    metrics = learner.step(BATCH)

    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = [loss for sample in SAMPLES for loss in losses_of(model, sample)]
    expected = torch.stack(losses).sum() / len(losses)
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in learner.student.model.named_parameters():
        gradient = (before[name] - parameter.detach()) / LEARNING_RATE
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * largest, name
