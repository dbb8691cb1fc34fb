"""What programs of others import, wherever the code moves."""

import importlib

import pytest

NAMES = {
    "trainer.loss": [
        "HeadOutput",
        "LossInputs",
        "LossTotals",
        "estimate_reverse_kl",
        "language_model_loss",
        "merge_metrics",
        "minillm_loss",
        "reward_advantages",
        "reward_to_go",
        "support_logprobs",
    ],
    "trainer.lm_head": ["HeadOutput", "support_logprobs"],
    "trainer.train": ["train"],
    "services.config": ["LossConfig", "RunConfig"],
    "services.clients": ["BlockingTeacherClient", "RolloutClient", "TeacherClient"],
    "services.score": ["read_shards"],
    "services.errors": ["DistillServeError", "PeerError"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_public_name_is_where_it_was(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))
