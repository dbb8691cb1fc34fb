"""The student as FSDP2's root and under DDP, on two processes, against one process that sees everything."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from services.config import RunConfig
from tests.models import save_model
from tests.ranks import leave
from tests.unit.trainer.samples import SAMPLES, batch_of
from trainer.batch import loss_inputs, pack
from trainer.loss import LossTotals, minillm_loss
from trainer.parallel import spread
from trainer.student import Student, load_student
from trainer.teacher_scores import ScoredSample

NUM_RANKS, HOW = 2, ("fsdp2", "ddp")
CONFIG = RunConfig().loss


def totals_of(samples: list[ScoredSample]) -> LossTotals:
    (batch,) = pack(batch_of(samples), CONFIG, 10_000)
    return LossTotals.of(batch.loss_mask, batch.cu_seqlens, 16)


def loss_of(module: nn.Module, samples: list[ScoredSample]) -> Tensor:
    """This rank's part of the loss of SAMPLES."""
    (batch,) = pack(batch_of(samples), CONFIG, 10_000)
    output = module(batch.input_ids, batch.positions, batch.token_ids, batch.support_ids)
    return minillm_loss(loss_inputs(batch, output), CONFIG, totals_of(SAMPLES))[0]


def load(folder: str) -> Student:
    return load_student(RunConfig(student={"model": folder}).student)


def gradients(student: Student) -> dict[str, Tensor]:
    found = {}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def on_one_rank(rank: int, folders: dict[str, str], into: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{into}/rendezvous", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for architecture, folder in folders.items():
        for how in HOW:
            student = load(folder)
            module = spread(student, mesh, how)  # type: ignore[arg-type]
            if how == "fsdp2":
                held = sum(p.to_local().numel() for p in student.parameters() if isinstance(p, DTensor))
                assert held <= 0.6 * sum(p.numel() for p in student.parameters())
            loss = loss_of(module, SAMPLES[rank::NUM_RANKS])
            (NUM_RANKS * loss).backward()  # gradients become means over ranks, and the loss is a sum
            total = loss.detach().clone()
            dist.all_reduce(total)
            found = gradients(student)
            if rank == 0:
                torch.save({"loss": total, "gradients": found}, f"{into}/{architecture}-{how}")
    dist.barrier()
    leave()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ("qwen3", "llama")}  # tied embeddings, and not


@pytest.fixture(scope="module")
def found(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks, which take seconds to start, have left the loss and the gradients of each combination."""
    into = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_one_rank, (folders, str(into)), NUM_RANKS)
    return into


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_two_ranks_have_the_loss_and_the_gradient_of_one(
    architecture: str, how: str, folders: dict[str, str], found: Path
) -> None:
    expected = load(folders[architecture])
    tied = expected.model.get_input_embeddings().weight is expected.model.get_output_embeddings().weight
    assert tied == (architecture == "qwen3")
    loss = loss_of(expected, SAMPLES)
    loss.backward()
    of_ranks = torch.load(found / f"{architecture}-{how}", weights_only=True)
    torch.testing.assert_close(of_ranks["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
    wanted = gradients(expected)
    assert of_ranks["gradients"].keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (of_ranks["gradients"][name] - gradient).abs().max() <= 1e-6 * largest, name
