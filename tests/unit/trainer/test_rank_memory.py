"""What a rank is computed to take (services/gpus/trainer_memory.py), against the tensors of a model that trains."""

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.config import LoraConfig, RunConfig
from services.gpus import trainer_memory
from services.gpus.memory import Sizes
from services.gpus.trainer_memory import Layout, trainer_share
from services.models.shape import ModelShape
from tests.ranks import leave
from trainer import student as student_module
from trainer.lora import add_adapter
from trainer.loss import head as lm_head
from trainer.loss.head import support_logprobs
from trainer.optimizer import build_optimizer
from trainer.parallel import _add_up_gradients, delay_reduction, keeps_gradients, spread
from trainer.student import Student

NUM_RANKS, NUM_TOKENS = 2, 16
# 10 million parameters and 100; vocabularies that two ranks cannot share evenly.
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8_003,
}
LARGE = SMALL | {"num_hidden_layers": 11, "hidden_size": 768, "intermediate_size": 2304, "vocab_size": 32_003}
ONE = Layout(compute_dtype="float32", checkpointing=False)
TWO = replace(ONE, num_ranks=2, num_local_ranks=2)
LAYOUTS = {
    "one rank": ONE,
    "fsdp2": replace(TWO, shard_degree=2),
    "fsdp2, bfloat16": replace(TWO, shard_degree=2, compute_dtype="bfloat16"),
    "ddp": TWO,
    "ddp, bfloat16": replace(TWO, compute_dtype="bfloat16"),
    "adapter": replace(ONE, adapter_rank=16),
    "adapter, fsdp2": replace(TWO, shard_degree=2, adapter_rank=16),
    "adapter, ddp, bfloat16": replace(
        TWO, compute_dtype="bfloat16", adapter_rank=16, adapter_targets=("q_proj", "up_proj")
    ),
}
TIED = {"tied": True, "untied": False}


def spread_as(layout: Layout, student: Student) -> None:
    if not layout.is_gathered:
        _add_up_gradients(student)
        return
    groups = (layout.num_ranks // layout.shard_degree, layout.shard_degree)
    mesh = init_device_mesh("cpu", groups, mesh_dim_names=("replicate", "shard"))
    spread(student, mesh if groups[0] > 1 else mesh["shard"], getattr(torch, layout.compute_dtype))


class Live(TorchDispatchMode):
    """Counts what is allocated inside, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, is_new=True)
        self.peak = max(self.peak, sum(self._known.values()))
        return result

    def _note(self, tensor: Any, *, is_new: bool) -> None:
        if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes() if is_new else 0
            weakref.finalize(storage, self._known.pop, storage._cdata)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, of which some are parts of one another."""
    of_rank = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in of_rank)}.values())


def peak_of(run: Callable[[], object]) -> int:
    """Bytes at most of what was allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measured(layout: Layout, config: dict[str, Any], profiled: bool) -> dict[str, int]:
    """What a step of training allocates on this rank; profiled, also at its fullest moment with two micro-batches, unless gloo
    scatters gradients, which it copies."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, 0.01)
    if layout.adapter_rank:
        targets = "all-linear" if layout.adapter_targets is None else list(layout.adapter_targets)
        add_adapter(model, LoraConfig(r=layout.adapter_rank, target_modules=targets))
    student = Student(model).train()
    if layout.is_gathered or layout.num_ranks > 1:
        spread_as(layout, student)
    head: list[int] = []

    def measuring(hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
        root = (p for name, p in student.named_parameters() if ".layers." not in name)
        head.append(held([hidden]) + (held(root) if layout.is_gathered else 0))
        with Live() as live:
            inputs = [t.detach().requires_grad_(t.requires_grad) for t in (hidden, weight)]
            support_logprobs(*inputs, *args, **options).token_logprobs.sum().backward()
        head[0] += live.peak
        return support_logprobs(hidden, weight, *args, **options)

    ids = torch.arange(NUM_TOKENS)

    def micro_batch(is_last: bool) -> None:
        delay_reduction(student, is_last)
        student(ids.unsqueeze(0), ids, ids, ids.unsqueeze(-1)).token_logprobs.sum().backward()

    student_module.support_logprobs = measuring
    micro_batch(is_last=True)
    optimizer = build_optimizer(student, RunConfig().optimizer)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    found = {
        "parameters": held(student.parameters()),
        "gradients": held(gradients),
        "optimizer": held(moments),
        "head": head[0],
    }
    if profiled and layout.shard_degree == 1:
        student_module.support_logprobs = support_logprobs
        kept = keeps_gradients(student)
        optimizer.zero_grad(set_to_none=not kept)
        found["fullest"] = peak_of(lambda: (micro_batch(is_last=False), micro_batch(is_last=True)))
        found["fullest"] += held(gradients) if kept else 0
    return found


def on_one_rank(rank: int, config: dict[str, Any], profiled: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    found = {
        f"{name}, {tied}": measured(layout, config | {"tie_word_embeddings": TIED[tied]}, profiled)
        for name, layout in LAYOUTS.items()
        for tied in TIED
    }
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.barrier()
    leave()


@dataclass(frozen=True)
class Found:
    """A model, and of each rank what it took in each layout."""

    config: dict[str, Any]
    of_ranks: list[dict[str, dict[str, int]]]


@pytest.fixture(scope="module", params=["small", pytest.param("large", marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ranks")
    is_large = request.param == "large"
    config = LARGE if is_large else SMALL
    mp.spawn(on_one_rank, (config, is_large, str(folder)), NUM_RANKS)
    return Found(config, [json.loads((folder / str(rank)).read_text()) for rank in range(NUM_RANKS)])


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_takes_what_was_computed(name: str, tied: str, found: Found) -> None:
    shape = ModelShape.from_config(found.config | {"tie_word_embeddings": TIED[tied]})
    sizes = Sizes(max_model_len=NUM_TOKENS, tokens_per_micro_batch=NUM_TOKENS)
    share = trainer_share(shape, sizes, LAYOUTS[name], 0)
    _, in_a_step = trainer_memory._step_bytes(shape, sizes, LAYOUTS[name])
    computed = {**asdict(share), "fullest": share.gradients + in_a_step}
    for of_rank in found.of_ranks:
        for part, taken in of_rank[f"{name}, {tied}"].items():
            if part == "fullest" and LAYOUTS[name].adapter_rank:  # layers that are frozen save a little less
                assert 0.98 * taken <= computed[part] <= 1.1 * taken, part
            else:
                # Of the buckets of ddp, old ones go one after another.
                assert computed[part] == pytest.approx(taken, rel=0.03 if part == "fullest" else 0.02), part


def test_tiles_of_logits_are_as_large_as_in_the_head() -> None:
    assert trainer_memory._TILE == (lm_head.CHUNK_TOKENS, lm_head.MAX_TILE_ELEMENTS)
    assert trainer_memory._GPU_TILE == (lm_head.GPU_CHUNK_TOKENS, lm_head.GPU_TILE_ELEMENTS)
