"""A learner of an adapter on two ranks, spread in every way, against one on a single rank that sees everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from services.config import RunConfig
from services.errors import ConfigError
from tests.models import save_model
from tests.ranks import leave
from tests.unit.trainer.test_parallel import CANARY, batches, relative
from trainer.learner import Learner
from trainer.lora import trained_parameters
from trainer.parallel import load_and_place, local, whole
from trainer.ranks.group import Ranks

NUM_RANKS, NUM_STEPS = 2, 5
WHOLE: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("qwen3", {}),
    "ddp": ("qwen3", {"trainer": {"parallelism": "ddp"}}),
    "checkpointed": ("qwen3", {"student": {"gradient_checkpointing": True}}),
    "ddp_micro_batches": (
        "qwen3",
        {"trainer": {"parallelism": "ddp"}, "pipeline": {"tokens_per_micro_batch": 12, "updates_per_batch": 2}},
    ),
    "dora": ("qwen3", {"lora": {"use_dora": True}}),
    "head": ("llama", {"lora": WHOLE}),
    "ddp_gpt2": ("gpt2", {"trainer": {"parallelism": "ddp"}}),
    "mixture": ("qwen3_moe", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    "bfloat16": ("qwen3", {"student": {"compute_dtype": "bfloat16"}}),
    "bfloat16_base": ("qwen3", {"student": {"dtype": "bfloat16"}}),
}


def config_of(folder: str, way: str) -> RunConfig:
    sections = WAYS[way][1]
    return RunConfig(
        **{
            **sections,
            "student": {"model": folder, **sections.get("student", {})},
            "lora": {"r": 4, **sections.get("lora", {})},
            "optimizer": {"learning_rate": 5e-3},
            "loss": {"alpha_lm": 0.3},
            "data": {"lm_path": "texts.jsonl"},
        }
    )


def run(folder: str, ranks: Ranks, way: str) -> dict[str, Any]:
    """What some steps come to."""
    config = config_of(folder, way)
    learner = Learner(config, load_and_place(config, ranks), NUM_STEPS, ranks)
    model = learner.student.model
    steps = [learner.step(batch) for batch in batches()[:NUM_STEPS]]
    held = {
        "parameters": sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()),
        "with_gradients": sorted(name for name, p in model.named_parameters() if p.grad is not None),
        "moments": {m.dtype for state in learner.optimizer.state.values() for m in state.values() if m.ndim},
    }
    snapshot = learner.snapshot(0, torch.float32, CANARY)
    state = learner.state()
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    found = {
        "held": held,
        "trained": list(trained_parameters(model)),
        "loss": [step.get("loss", 0.0) for step in steps],
        "grad_norm": [step.get("grad_norm", 0.0) for step in steps],
        "weights": weights,
        "canary": [torch.from_numpy(part) for part in snapshot.canary_logprobs],
    }
    if ranks.index == 0:
        assert snapshot.proof is not None and state.tensors is not None and state.adapter is not None
        found["sent"] = {name: tensor.clone() for name, tensor in snapshot.proof.watching(snapshot.source)}
        snapshot.proof.check()
        found |= {"saved": state.tensors, "adapter": state.adapter}
    return found


def on_one_rank(rank: int, folders: dict[str, str], into: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{into}/rendezvous", rank=rank, world_size=NUM_RANKS)
    ranks = Ranks(rank, NUM_RANKS, rank, NUM_RANKS)
    for way, (architecture, _) in WAYS.items():
        found = run(folders[architecture], ranks, way)
        if rank == 0:
            torch.save(found, f"{into}/{way}")
    dist.barrier()
    leave()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in {architecture for architecture, _ in WAYS.values()}}


@pytest.fixture(scope="module")
def found(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_one_rank, (folders, str(into)), NUM_RANKS)
    return into


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_the_adapter_of_one(way: str, folders: dict[str, str], found: Path) -> None:
    two: dict[str, Any] = torch.load(found / way, weights_only=True)
    folder = folders[WAYS[way][0]]
    one = run(folder, Ranks(), way)
    # In bfloat16 the ranks round sums that one rank makes of other parts.
    tolerance = 0.1 if "bfloat16" in way else 1e-5
    assert two["loss"] == pytest.approx(one["loss"], rel=tolerance, abs=tolerance)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=tolerance)
    assert two["weights"].keys() == one["weights"].keys() and two["trained"] == one["trained"]
    for name, expected in one["weights"].items():
        if name in two["trained"]:
            assert relative(two["weights"][name], expected) <= tolerance, name
        else:  # of the base, the same bits
            assert torch.equal(two["weights"][name], expected), name
    for ours, theirs in zip(two["canary"], one["canary"], strict=True):
        assert (ours - theirs).abs().max() <= (1e-4 if "bfloat16" not in way else 0.05)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_weights_have_neither_gradients_nor_moments_on_a_rank(way: str, found: Path) -> None:
    two: dict[str, Any] = torch.load(found / way, weights_only=False)
    held = two["held"]
    # Those of what is trained stay, zeros, where they are parts of buckets.
    assert held["with_gradients"] == ([] if "ddp" not in way else sorted(two["trained"]))
    assert held["moments"] == {torch.float32}
    assert held["parameters"] == 1.0 if "ddp" in way else held["parameters"] <= 0.6
    assert set(two["adapter"]) == set(two["trained"])
    for name, tensor in two["adapter"].items():
        assert torch.equal(tensor, two["weights"][name]) and tensor.dtype == torch.float32


@pytest.mark.parametrize("way", WAYS)
def test_what_is_sent_is_the_base_with_the_adapter_merged(way: str, folders: dict[str, str], found: Path) -> None:
    two: dict[str, Any] = torch.load(found / way, weights_only=True)
    base = load_file(f"{folders[WAYS[way][0]]}/model.safetensors")
    assert two["sent"].keys() == base.keys() == two["saved"].keys()
    changed = {name for name, tensor in base.items() if not torch.equal(two["sent"][name], tensor.float())}
    adapted = {f"{name.partition('.lora_')[0]}.weight" for name in two["trained"] if ".lora_" in name}
    assert adapted <= changed if "base" not in way else changed
    for name, tensor in two["saved"].items():
        kept = torch.bfloat16 if "base" in way else torch.float32
        assert tensor.dtype == kept and torch.equal(tensor, two["sent"][name].to(kept)), name


def test_recomputed_activations_train_the_same_adapter(found: Path) -> None:
    """Behind a frozen embedding, where nothing before the first layer asks for a gradient."""
    kept, recomputed = (torch.load(found / way, weights_only=True) for way in ("fsdp2", "checkpointed"))
    assert (
        min(norm for norm in kept["grad_norm"] if norm) > 1e-3 and len([n for n in kept["grad_norm"] if n]) == NUM_STEPS
    )
    for name in kept["trained"]:
        assert relative(recomputed["weights"][name], kept["weights"][name]) <= 1e-5, name


def test_weights_in_four_bits_are_not_spread(folders: dict[str, str]) -> None:
    config = RunConfig(student={"model": folders["qwen3"]}, lora={"r": 4, "load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"lora\.load_in_4bit = true with 2 ranks"):
        load_and_place(config, Ranks(0, 2, 0, 2))
