"""The trainer on one GPU, with random students of real sizes; writes results/trainer.json.

A step is one of `Learner`: 64 samples of 256 to 1024 tokens, bfloat16 products beside float32 masters. Of each student: tokens
a second, the share of the GPU's bfloat16 rate that 6 operations a parameter and token are (MFU), the memory that a step takes
beside what docs/gpu.md computes, and the time of gathering all weights for a push.

A GPU is needed: `make bench ARGS=trainer`. `python -m tests.benchmarks.trainer 0.6B 1.7B` runs some of the sizes.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.gpus.memory import GIB, Sizes
from services.gpus.trainer_memory import Layout, trainer_share
from services.models.shape import ModelShape
from services.weight_transfer.source import CheckpointSource
from tests.benchmarks import results
from tests.gpu.students import DEVICE, PROMPT, QWEN3, batch_of, run_config
from trainer.attention import choose_attention
from trainer.learner import Learner
from trainer.loss.head import support_logprobs
from trainer.parallel import place
from trainer.ranks.group import Ranks
from trainer.student import Student
from trainer.weights.snapshot import GivenTokens

NUM_SAMPLES, SHORTEST, LONGEST, WARM_UP, REPEATS = 64, 256, 1024, 1, 3
PEAK_FLOPS = 990e12
"""Of an H100 and an H200 (SXM) in bfloat16, dense, by their data sheets."""
WAYS = {"checkpointed": (True, "sdpa"), "checkpointed, varlen": (True, "varlen"), "all kept": (False, "sdpa")}


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of some calls, after one that warms up."""
    found = []
    for _ in range(WARM_UP + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[WARM_UP:])


def random_learner(size: str, checkpointing: bool = True, attention: str = "sdpa") -> Learner:
    """One rank, as a run places it, of a model that was never on disk."""
    options = {"gradient_checkpointing": checkpointing, "attn_implementation": attention}
    config, ranks = run_config(size, student=options), Ranks(device=DEVICE)
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3[size], tie_word_embeddings=True))
    if checkpointing:
        model.gradient_checkpointing_enable()
    student = Student(model).train()
    choose_attention(model, attention)  # after the probes of the model, as load_student does
    return Learner(config, place(student, config, ranks), 10, ranks)


def measure(size: str, way: str) -> dict[str, Any]:
    learner = random_learner(size, *WAYS[way])
    step = (LONGEST - SHORTEST) / (NUM_SAMPLES - 1)
    lengths = [round(SHORTEST + index * step) for index in range(NUM_SAMPLES)]
    batch, num_tokens = batch_of(*lengths), sum(lengths)
    torch.cuda.reset_peak_memory_stats()
    step_s = seconds(lambda: learner.step(batch))
    peak = torch.cuda.max_memory_allocated()
    shape, config = ModelShape.from_config(QWEN3[size]), learner.config
    sizes = Sizes(max_model_len=LONGEST, tokens_per_micro_batch=config.pipeline.micro_batch_tokens)
    share = trainer_share(shape, sizes, Layout.of(config, 1, 1, on_gpu=True), config.weight_sync.bucket_bytes)
    given = GivenTokens([[1] * 8] * 2, [[2] * 8] * 2)
    return {
        "size": size,
        "way": way,
        "parameters": shape.num_parameters,
        "tokens": num_tokens,
        "step_s": step_s,
        "tokens_per_s": num_tokens / step_s,
        "mfu": 6 * shape.num_parameters * num_tokens / step_s / PEAK_FLOPS,
        "optimizer_s": optimizer_s(learner),
        "peak_bytes": peak,
        "computed_bytes": share.total,
        "held_bytes": torch.cuda.memory_allocated(),
        "canary_s": seconds(lambda: learner.logprobs(given)),
        "gather_s": seconds(lambda: [None for _ in CheckpointSource(learner.student.model, torch.bfloat16)]),
        "gather_to_host_s": seconds(
            lambda: [tensor.cpu() for _, tensor in CheckpointSource(learner.student.model, torch.bfloat16)], 1
        ),
    }


def optimizer_s(learner: Learner) -> float:
    for parameter in learner.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = seconds(learner.optimizer.step)
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def head(size: str, num_positions: int = 16_384) -> dict[str, Any]:
    """Forward and backward of the output head alone, for as many positions as a micro-batch has tokens."""
    batch = batch_of(num_positions + PROMPT)
    token_ids, support_ids = (torch.from_numpy(x).long().to(DEVICE) for x in (batch.token_ids, batch.support_ids))
    hidden = torch.randn(num_positions, QWEN3[size]["hidden_size"], device=DEVICE, requires_grad=True)
    weight = torch.randn(QWEN3[size]["vocab_size"], hidden.shape[1], device=DEVICE).mul_(0.03).bfloat16()
    weight.requires_grad_()

    def run() -> None:
        output = support_logprobs(hidden, weight, token_ids, support_ids)
        torch.autograd.grad(output.token_logprobs.sum() + output.support_logprobs.sum(), [hidden, weight])

    head_s = seconds(run)
    return {"size": size, "positions": num_positions, "head_s": head_s, "flops": 8 * num_positions * weight.numel()}


def product_flops(dtype: torch.dtype, side: int = 8192) -> float:
    """Operations a second of a product of two random matrices: what this GPU reaches at best."""
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
    return 2 * side**3 / seconds(lambda: [torch.mm(a, b) for _ in range(4)]) * 4


def main(sizes: list[str] | None = None) -> None:
    figures, table = [], Table("student", "way", "step", "tokens/s", "MFU", "memory", "computed", "gather")
    heads = [head(size) for size in sizes or QWEN3]
    rates = {str(dtype).split(".")[1]: product_flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for size in sizes or QWEN3:
        # 4B: 64 GB of weights, gradients and moments leave no room for what is not checkpointed.
        for way in ("checkpointed",) if size == "4B" else WAYS:
            figures.append(figure := measure(size, way))
            gc.collect()
            torch.cuda.empty_cache()
            memory = [f"{figure[name] / GIB:.1f} GiB" for name in ("peak_bytes", "computed_bytes")]
            speed = [f"{figure['step_s']:.2f} s", f"{figure['tokens_per_s']:.0f}", f"{figure['mfu']:.2f}"]
            table.add_row(size, way, *speed, *memory, f"{figure['gather_s']:.2f} s")
            Console().print(figure)
            gpu = torch.cuda.get_device_name(DEVICE)
            results.write("trainer", {"gpu": gpu, "product_flops": rates, "heads": heads, "figures": figures})
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
