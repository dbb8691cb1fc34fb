"""A learner on two ranks, spread in every way, against one on a single rank that sees everything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from services.config import RunConfig
from services.models.padding import share_out
from services.wire.batch import TrainingBatch
from tests.models import save_model
from tests.ranks import leave
from tests.unit.trainer.samples import batch_of, sample
from trainer.learner import Learner
from trainer.parallel import load_and_place, load_reference, local, whole
from trainer.ranks.group import Ranks
from trainer.weights.snapshot import GivenTokens

NUM_RANKS, NUM_STEPS = 2, 20
WAYS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "ddp": {"trainer": {"parallelism": "ddp"}},
    "checkpointed": {"student": {"gradient_checkpointing": True}},
    "small_micro_batches": {"pipeline": {"tokens_per_micro_batch": 12, "updates_per_batch": 2}},
    "bfloat16": {"student": {"compute_dtype": "bfloat16"}},
    "rewards": {
        "reward": {"functions": ["m:a", "m:b"], "advantage": "leave_one_out"},
        "loss": {
            **{"gamma": 0.9, "truncated": "mask", "top_entropy_quantile": 0.5},
            **{"alpha_reference_kl": 0.1, "alpha_entropy": 0.01},
        },
        "pipeline": {"tokens_per_micro_batch": 12, "updates_per_batch": 2, "samples_per_prompt": 2},
    },
}
# Of untied embeddings, what differs for them.
OF_UNTIED = ("fsdp2", "ddp")
CANARY = GivenTokens([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15], [16]])


def batches() -> list[TrainingBatch]:
    """Recorded batches: uneven ones, one that leaves a rank without samples, one without any, texts."""
    shapes = [[(3, 5), (1, 1), (7, 2), (2, 9), (4, 4)], [(2, 3)], [], [(2, 6), (5, 1), (1, 8)]]
    windows: list[list[list[int]]] = [[], [[5, 6, 7, 8]], [[9, 10, 11]], [[3, 4], [5, 6, 7, 8, 9]]]
    made = []
    for step in range(NUM_STEPS):
        of_step = shapes[step % len(shapes)]
        samples = [sample(100 * step + i, prompt, length) for i, (prompt, length) in enumerate(of_step)]
        made.append(batch_of(samples, windows[step % len(windows)]))
    return made


def rewarded(batch: TrainingBatch, step: int) -> TrainingBatch:
    """In groups of two, some truncated, with rewards of which some do not apply."""
    random, places = np.random.default_rng(step), np.arange(len(batch))
    rewards = random.normal(0, 2, (len(batch), 2))
    rewards[random.random(rewards.shape) < 0.3] = np.nan
    return replace(batch, groups=places // 2, truncated=places % 4 == 3, rewards=rewards, reward_names=["a", "b"])


def run(folder: str, ranks: Ranks, way: str) -> dict[str, Any]:
    """What twenty steps come to."""
    sections = WAYS[way]
    config = RunConfig(
        **{
            **sections,
            "student": {"model": folder, **sections.get("student", {})},
            "optimizer": {"learning_rate": 1e-3},
            "loss": {"alpha_lm": 0.3, **sections.get("loss", {})},
            "data": {"lm_path": "texts.jsonl"},
        }
    )
    student = load_and_place(config, ranks)
    learner = Learner(config, student, NUM_STEPS, ranks, reference=load_reference(config, ranks))
    num_held = sum(local(p).numel() for p in student.parameters())
    recorded = batches()
    if "reward" in sections:
        recorded = [rewarded(batch, step) for step, batch in enumerate(recorded)]
    steps = [learner.step(batch) for batch in recorded]
    moments = [v for state in learner.optimizer.state.values() for v in state.values() if v.ndim > 0]
    snapshot = learner.snapshot(0, torch.float32, CANARY)
    return {
        "share": num_held / sum(p.numel() for p in student.parameters()),
        "moments": sum(local(m).numel() for m in moments) / num_held,
        "loss": [step.get("loss", 0.0) for step in steps],
        "grad_norm": [step.get("grad_norm", 0.0) for step in steps],
        "metrics": [{k: v for k, v in step.items() if k not in ("train_s", "peak_memory_gib")} for step in steps],
        "weights": {name: whole(p.detach()).clone() for name, p in student.model.named_parameters()},
        "sent": {name: tensor.clone() for name, tensor in snapshot.source} if ranks.index == 0 else {},
        "canary": [torch.from_numpy(part) for part in snapshot.canary_logprobs],
        "reverse_kl": learner.reverse_kl(batches()[0]),
    }


def held(learner: Learner) -> list[torch.Tensor]:
    """All that a step may change on this rank."""
    moments = [v for state in learner.optimizer.state.values() for v in state.values()]
    return [local(t.detach()).clone() for t in (*learner.student.parameters(), *moments)]


def skipped(folder: str, ranks: Ranks, parallelism: str) -> dict[str, Any]:
    """What a step with a gradient that is not finite on one rank changes on this one; and what the next step is."""
    config = RunConfig(student={"model": folder}, trainer={"parallelism": parallelism})
    learner = Learner(config, load_and_place(config, ranks), 9, ranks)
    good = batches()[0]
    lengths = (good.prompt_lengths + good.completion_lengths).tolist()
    (of_rank_1, *_) = share_out(lengths, NUM_RANKS)[1]
    logprobs = good.teacher_token_logprobs.copy()
    logprobs[good.completion(of_rank_1)] = np.nan
    learner.step(good)
    before = held(learner)
    metrics = learner.step(replace(good, teacher_token_logprobs=logprobs))
    is_same = all(map(torch.equal, before, held(learner)))
    num_skipped = metrics["num_skipped_updates"]
    after = learner.step(good)
    return {"is_same": is_same, "num_skipped": num_skipped, "loss": after["loss"], "then": after["num_skipped_updates"]}


def on_one_rank(rank: int, folders: dict[str, str], into: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{into}/rendezvous", rank=rank, world_size=NUM_RANKS)
    ranks = Ranks(rank, NUM_RANKS, rank, NUM_RANKS)
    for architecture, folder in folders.items():
        for way in WAYS if architecture == "qwen3" else OF_UNTIED:
            found = run(folder, ranks, way)
            if rank == 0:
                torch.save(found, f"{into}/{architecture}-{way}")
    for parallelism in ("fsdp2", "ddp"):
        torch.save(skipped(folders["qwen3"], ranks, parallelism), f"{into}/skipped-{parallelism}-{rank}")
    dist.barrier()
    leave()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ("qwen3", "llama")}  # tied embeddings, and not


@pytest.fixture(scope="module")
def found(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks, which take seconds to start, have left what each way came to."""
    into = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_one_rank, (folders, str(into)), NUM_RANKS)
    return into


@pytest.mark.parametrize("parallelism", ["fsdp2", "ddp"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_both(parallelism: str, found: Path) -> None:
    of_ranks = [torch.load(found / f"skipped-{parallelism}-{rank}", weights_only=True) for rank in range(NUM_RANKS)]
    assert all(side["is_same"] and side["num_skipped"] == 1 and side["then"] == 0 for side in of_ranks)
    assert of_ranks[0] == of_ranks[1] and np.isfinite(of_ranks[0]["loss"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("architecture", "way"), [*(("qwen3", way) for way in WAYS), *(("llama", way) for way in OF_UNTIED)]
)
def test_two_ranks_train_the_student_of_one(architecture: str, way: str, folders: dict[str, str], found: Path) -> None:
    two: dict[str, Any] = torch.load(found / f"{architecture}-{way}", weights_only=True)
    one = run(folders[architecture], Ranks(), way)
    # In bfloat16 the ranks round sums that one rank makes of other parts.
    tolerance = 1e-5 if way != "bfloat16" else 2e-2
    assert two["loss"] == pytest.approx(one["loss"], rel=tolerance, abs=tolerance)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=tolerance)
    for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=10 * tolerance, abs=10 * tolerance)
    assert two["weights"].keys() == one["weights"].keys()
    for name, expected in one["weights"].items():
        assert relative(two["weights"][name], expected) <= tolerance, name
    # What is sent are the weights, and the canary is what they say.
    assert two["sent"].keys() == one["sent"].keys()
    for name, sent in two["sent"].items():
        assert torch.equal(sent, two["weights"][name]), name
    for ours, theirs in zip(two["canary"], one["canary"], strict=True):
        assert (ours - theirs).abs().max() <= (1e-4 if way != "bfloat16" else 0.05)
    assert [n for _, n in two["reverse_kl"]] == [n for _, n in one["reverse_kl"]]
    sums = [[total for total, _ in side["reverse_kl"]] for side in (two, one)]
    assert sums[0] == pytest.approx(sums[1], rel=10 * tolerance, abs=10 * tolerance)
    assert two["moments"] == 2.0
    assert two["share"] == 1.0 if way == "ddp" else two["share"] <= 0.6
