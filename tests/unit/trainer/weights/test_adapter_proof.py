"""An adapter that is missing in the weights that are sent is seen, however small and however it is lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.errors import WeightSyncError
from services.models import adapters
from services.models.adapters import adapted_modules
from services.weight_transfer.source import CheckpointSource, ParamMeta, WeightSource
from tests.models import save_model
from tests.unit.trainer.adapters import ATTENTION, LINEAR, disturb, learner_of
from tests.unit.trainer.samples import BATCH
from trainer.learner import Learner
from trainer.weights.adapter_proof import AdapterProof

NUM_VERSIONS = 20


class Given(WeightSource):
    """Tensors that are sent as they are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


def sent(learner: Learner, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in CheckpointSource(learner.student.model, dtype)}


def prove(learner: Learner, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Send the tensors, and look for the learner's adapter in them."""
    proof = AdapterProof(learner.student.model, dtype)
    watched = proof.watching(Given(tensors))
    assert watched.metadata() == Given(tensors).metadata()
    assert dict(watched).keys() == tensors.keys()
    proof.check()


def saved(folder: str) -> dict[str, Tensor]:
    """The base, as its folder has it."""
    return load_file(f"{folder}/model.safetensors")


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"use_dora": True}),
    ("llama", {"target_modules": ["lm_head", "embed_tokens", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    ("gpt2", {"bias": "all", "target_modules": LINEAR["gpt2"]}),
    ("phi3", {"target_modules": LINEAR["phi3"], "use_rslora": True}),
    ("qwen3_moe", {"target_modules": ATTENTION}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_what_the_source_yields_has_the_adapter_in_it(
    architecture: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    learner = disturb(learner_of(save_model(tmp_path, architecture), **options))
    prove(learner, sent(learner, dtype), dtype)


@pytest.mark.parametrize("rate", [1e-7, 1e-5, 1e-2])
def test_an_adapter_withheld_from_a_push_is_noticed_20_of_20_times(rate: float, tmp_path: Path) -> None:
    """At each of 20 versions of a run, also at a learning rate at which logprobs hardly move, the merging of one module, of a
    few, or of all of them does nothing."""
    folder = save_model(tmp_path, "qwen3")
    learner = learner_of(folder, rate=rate, r=16)
    modules = list(adapted_modules(learner.student.model))
    base = saved(folder)
    noticed = 0
    for version in range(1, NUM_VERSIONS + 1):
        learner.step(BATCH)
        whole = sent(learner)
        prove(learner, whole)
        withheld = modules if version % 5 == 0 else modules[(version - 1) % len(modules) :: version]
        names = [f"{name}.weight" for name in withheld]
        assert all(not torch.equal(whole[name], base[name]) for name in names)
        with pytest.raises(WeightSyncError, match=rf"the adapter is missing .*{sorted(names)[0]} \(-?0% of it\)"):
            prove(learner, whole | {name: base[name] for name in names})
        noticed += 1
    assert noticed == NUM_VERSIONS


def test_a_source_that_does_not_merge_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(save_model(tmp_path, "qwen3"), steps=1, rate=1e-5)
    monkeypatch.setattr(adapters, "_effective", lambda module, tensors, dtype: tensors["base_layer.weight"].to(dtype))
    with pytest.raises(WeightSyncError, match=r"missing .*\(0% of it\), .* and 10 more"):
        prove(learner, sent(learner))


@pytest.mark.parametrize("scale", [0.0, 2.0, -1.0])
def test_an_adapter_at_another_scale_is_noticed(scale: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    learner = learner_of(folder, steps=1, rate=1e-4)
    whole, base = sent(learner), saved(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    whole[name] = base[name] + scale * (whole[name] - base[name])
    with pytest.raises(WeightSyncError, match=rf"{name} \({scale:.0%} of it\)"):
        prove(learner, whole)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "transformer.h.0.attn.c_attn.bias"])
def test_what_is_trained_whole_has_to_be_what_is_sent(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    if name.endswith("bias"):
        options = {"target_modules": ["c_attn"], "bias": "all"}
    folder = save_model(tmp_path, "gpt2" if name.endswith("bias") else "llama")
    learner = learner_of(folder, steps=1, rate=1e-6, **options)
    with pytest.raises(WeightSyncError, match=f"missing .*: {name}"):
        prove(learner, sent(learner) | {name: saved(folder)[name]})


def test_a_tensor_that_never_comes_is_noticed(tmp_path: Path) -> None:
    learner = learner_of(save_model(tmp_path, "qwen3"))
    whole = sent(learner)
    del whole["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(WeightSyncError, match=r"layers\.0\.self_attn\.q_proj"):
        prove(learner, whole)


def test_a_change_that_bfloat16_cannot_hold_is_not_asked_of_it(tmp_path: Path) -> None:
    """The base of a usual model is exact in bfloat16, and a first small step leaves it where it is."""
    folder = save_model(tmp_path, "qwen3")
    learner = learner_of(folder, steps=1, rate=1e-7)
    with torch.no_grad():
        for module in adapted_modules(learner.student.model).values():
            module.base_layer.weight.copy_(module.base_layer.weight.bfloat16())
    tensors = sent(learner, torch.bfloat16)
    base = learner.student.model.model.layers[0].self_attn.q_proj.base_layer.weight
    moved = tensors["model.layers.0.self_attn.q_proj.weight"].float() != base
    assert 0 < float(moved.float().mean()) < 0.05
    prove(learner, tensors, torch.bfloat16)


def test_the_first_version_has_no_adapter_to_miss_and_is_the_base(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    learner = learner_of(folder)
    tensors = sent(learner)
    prove(learner, tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved(folder).items())
