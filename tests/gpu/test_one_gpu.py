"""One GPU for all roles: precision, the memory that is computed against the memory that is taken, and pushes over gloo.

Run on a machine with an NVIDIA GPU: `make test ARGS="-m gpu"`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from services.clients import RolloutClient
from services.config import RunConfig, TeacherConfig
from services.gpus.memory import GIB, Share, Sizes, teacher_share
from services.gpus.trainer_memory import Layout, trainer_share
from services.models.shape import read_shape
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from tests.integration.attach import PROMPTS, change
from tests.integration.processes import KEY, server
from tests.models import save_model
from tests.pushing import Pushing
from tests.scoring import score_alone
from trainer.data.prompts import Prompt
from trainer.learner import Learner
from trainer.optimizer import build_optimizer
from trainer.parallel import compute_dtype_of
from trainer.student import load_student
from trainer.weights.weight_sync import WeightSync

pytestmark = pytest.mark.gpu

LENGTH = 1024
# A tenth of Qwen3-0.6B's layers with its widths: what is computed grows with layers and widths alone.
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("wide"), "qwen3", **SHAPE)


def random_ids(num_rows: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (num_rows, LENGTH), device="cuda")


def logprobs(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    positions, flat = torch.arange(ids.numel(), device="cuda"), ids.flatten()
    model.compute_dtype = dtype
    output: Any = model(ids, positions, flat, flat.unsqueeze(-1))
    return output.token_logprobs


def within(measured: int, share: Share) -> bool:
    """Whether the arithmetic is above what was taken, and by no more than half and a CUDA context."""
    return measured <= share.total <= 1.5 * measured + GIB


def test_bfloat16_gradients_on_cuda_are_near_float32_ones(wide: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_student(RunConfig(student={"model": wide}).student, checkpointing=True).to("cuda")
        torch.manual_seed(0)
        logprobs(model, random_ids(2), dtype).mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0).item() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_takes_what_was_computed(wide: str, dtype: str) -> None:
    config, shape = RunConfig(student={"model": wide}), read_shape(wide)
    assert shape is not None
    model = load_student(config.student, checkpointing=True).to("cuda")
    optimizer = build_optimizer(model, config.optimizer)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second has the optimizer's state
        logprobs(model, random_ids(8), getattr(torch, dtype)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layout = Layout(compute_dtype=dtype, rollout_dtype=dtype)
    sizes = Sizes(max_model_len=LENGTH, tokens_per_micro_batch=8 * LENGTH)
    share = trainer_share(shape, sizes, layout, config.weight_sync.bucket_bytes)
    assert within(torch.cuda.max_memory_allocated(), share)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_takes_what_was_computed(wide: str, dtype: str) -> None:
    shape = read_shape(wide)
    assert shape is not None
    torch.cuda.reset_peak_memory_stats()
    config = TeacherConfig(model=wide, dtype=dtype, tokens_per_forward=8 * LENGTH, rows_per_head_chunk=256)
    engine = TransformersEngine(config)
    score_alone(engine, [EncodedSequence(ids.tolist(), 1) for ids in random_ids(8)], top_k=64, temperature=1.0)
    sizes = Sizes(max_model_len=LENGTH, tokens_per_forward=8 * LENGTH, rows_per_head_chunk=256)
    assert within(torch.cuda.max_memory_allocated(), teacher_share(shape, dtype, sizes))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
async def test_server_and_trainer_agree_on_one_card(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """In float32 this is the canary that ends `make train` where attention is TF32; in bfloat16, heads are float32."""
    folder = save_model(tmp_path / "model", "qwen3")
    # All three roles are named, so that the server takes its share and no more.
    run_file = tmp_path / "run.json"
    sections = {"student": {"model": folder}, "teacher": {"model": folder}, "data": {"path": "prompts.jsonl"}}
    run_file.write_text(json.dumps(sections))
    with server("rollout", tmp_path / "log", str(run_file), "--rollout.dtype", dtype) as running:
        config = RunConfig(student={"model": folder}, rollout={"dtype": dtype})
        learner = Learner(config, load_student(config.student).to("cuda"), num_steps=10)
        learner.student.compute_dtype = compute_dtype_of(config, learner.student.device)
        async with RolloutClient([running.url], key=KEY) as client:
            infos = await client.info()
            assert infos[0].gpu_uuids
            canaries = [Prompt(1, ids, "") for ids in PROMPTS[:4]]
            sync = WeightSync(config, learner.student.device, client, infos, canaries, KEY, "a-run")
            await sync.hold()
            for version in range(3):
                change(learner.student)
                assert (await Pushing(sync, learner).push(version))["canary_residual"] <= tolerance
            await sync.close()
