"""One GPU for all roles: the memory that a teacher takes against what is computed, and pushes over gloo.

Run on a machine with an NVIDIA GPU: `make test ARGS="-m gpu"`.
"""

import json
from pathlib import Path

import pytest
import torch

from services.clients import RolloutClient
from services.config import TeacherConfig
from services.gpus.memory import GIB, Share, Sizes, teacher_share
from services.models.shape import read_shape
from services.teacher.jobs import EncodedSequence
from services.teacher.transformers.engine import TransformersEngine
from tests.gpu.students import VOCABULARY, learner_of, save_random
from tests.integration.attach import PROMPTS, change
from tests.integration.processes import KEY, server
from tests.models import save_model
from tests.pushing import Pushing
from tests.scoring import score_alone
from trainer.data.prompts import Prompt
from trainer.weights.weight_sync import WeightSync

pytestmark = pytest.mark.gpu

LENGTH = 1024


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers of Qwen3-0.6B: what is computed grows with layers and widths alone."""
    return save_random(tmp_path_factory.mktemp("wide"), "0.6B", num_hidden_layers=4)


def random_ids(num_rows: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (num_rows, LENGTH), device="cuda")


def within(measured: int, share: Share) -> bool:
    """Whether the arithmetic is above what was taken, and by no more than half and a CUDA context."""
    return measured <= share.total <= 1.5 * measured + GIB


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
        learner = learner_of(folder, rollout={"dtype": dtype})
        async with RolloutClient([running.url], key=KEY) as client:
            infos = await client.info()
            assert infos[0].gpu_uuids
            canaries = [Prompt(1, ids, "") for ids in PROMPTS[:4]]
            sync = WeightSync(learner.config, learner.ranks.device, client, infos, canaries, KEY, "a-run")
            await sync.hold()
            for version in range(3):
                change(learner.student)
                assert (await Pushing(sync, learner).push(version))["canary_residual"] <= tolerance
            await sync.close()
