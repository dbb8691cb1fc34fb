"""GPUs of several ranks of the trainer, and of several rollout servers."""

from typing import Any

import pytest

from services.config import RunConfig
from services.errors import ConfigError
from services.gpus.memory import GIB
from tests.unit.services.gpus.planning import planned, run
from tests.unit.services.shapes import QWEN3_0_6B

RANKS: dict[str, dict[str, Any]] = {
    "student": {"cuda_devices": "0,1,2,3"},
    "rollout": {"cuda_devices": "4"},
    "teacher": {"cuda_devices": "4"},
    "trainer": {"num_processes": 4},
}


@pytest.fixture
def five_gpus(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(*[24 * GIB] * 5)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def trainers(config: RunConfig, role: str | None = None) -> list[int]:
    """Parameters on each GPU of the trainer, in parts of 64 of the student's."""
    shares = [gpu.shares.get("trainer") for gpu in planned(config, role).gpus]
    return [round(share.parameters * 64 / 4 / QWEN3_0_6B.num_parameters) for share in shares if share is not None]


@pytest.mark.parametrize(
    ("trainer", "parts"),
    [
        ({"num_processes": 4}, [16, 16, 16, 16]),
        ({"num_processes": 2}, [32, 32]),
        ({"num_processes": 4, "shard_degree": 2}, [32, 32, 32, 32]),
        ({"num_processes": 4, "parallelism": "ddp"}, [64, 64, 64, 64]),
        ({"num_processes": 4, "cpu_offload": True}, [0, 0, 0, 0]),
    ],
)
def test_each_rank_has_a_gpu_and_its_part_of_the_student(trainer: Any, parts: list[int], five_gpus: None) -> None:
    for role in (None, "trainer"):
        assert trainers(run(**RANKS | {"trainer": trainer}), role) == parts


def test_ranks_that_torchrun_started_are_those_of_its_environment(
    five_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert trainers(run(**RANKS), "trainer") == [32, 32]
    assert trainers(run(**RANKS | {"trainer": {"shard_degree": 8}}), "trainer") == [8, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"^LOCAL_WORLD_SIZE = 6 in the environment needs 6 GPUs"):
        planned(run(**RANKS), "trainer")
    monkeypatch.delenv("WORLD_SIZE")
    assert trainers(run(**RANKS), "trainer") == [16, 16, 16, 16]


def test_a_rank_without_a_gpu_of_its_own_is_refused(five_gpus: None) -> None:
    names = r"student.cuda_devices = '0,1' names 2; give it more with student.cuda_devices, or ask for less$"
    for role in (None, "trainer"):
        with pytest.raises(ConfigError, match=rf"^trainer.num_processes = 4 needs 4 GPUs, {names}"):
            planned(run(**RANKS | {"student": {"cuda_devices": "0,1"}}), role)
        with pytest.raises(ConfigError, match=r"^trainer.num_processes = 6 needs 6 GPUs, the trainer sees 5;"):
            planned(run(trainer={"num_processes": 6}), role)
    planned(run(**RANKS | {"student": {"cuda_devices": "0,1"}}), "rollout")  # the trainer will be told


@pytest.mark.parametrize(
    ("total", "trainer", "advice"),
    [
        (8 * GIB, {"num_processes": 4, "parallelism": "ddp"}, "set trainer.parallelism = fsdp2"),
        (8 * GIB, {"num_processes": 4, "shard_degree": 1}, "leave trainer.shard_degree = 1 out"),
        (6 * GIB, {"num_processes": 2}, "set trainer.num_processes = 3, a GPU each"),
        (
            6 * GIB,
            {"num_processes": 2, "parallelism": "ddp"},
            "set trainer.num_processes = 3 and trainer.parallelism = fsdp2, a GPU each",
        ),
        (3.6 * GIB, {"num_processes": 4}, "set trainer.cpu_offload = true"),
        (3.6 * GIB, {"num_processes": 4, "cpu_offload": True, "shard_degree": 1}, None),
    ],
)
def test_ranks_that_do_not_fit_are_told_how_to_spread_the_student(
    total: float, trainer: dict[str, Any], advice: str | None, gpus: Any
) -> None:
    gpus(*[total] * 4, 80e9)
    config = run(**RANKS | {"trainer": trainer})
    if advice is None:
        planned(config, "trainer")
        return
    with pytest.raises(ConfigError) as error:
        planned(config, "trainer")
    assert advice in str(error.value)


def test_several_rollout_servers_have_gpus_one_after_another(gpus: Any) -> None:
    gpus(*[80e9] * 4)
    several = {"num_servers": 2, "tensor_parallel_size": 2}
    roles = [list(gpu.shares) for gpu in planned(run(rollout=several)).gpus]
    assert roles == [["rollout", "teacher", "trainer"], ["rollout"], ["rollout"], ["rollout"]]
    assert list(planned(run(rollout=several | {"cuda_devices": "2,3"}), "rollout").gpus[0].shares) == ["rollout"]
    with pytest.raises(
        ConfigError,
        match=r"rollout.num_servers times tensor_parallel_size needs 4 GPUs, rollout.cuda_devices = '2,3' names 2;",
    ):
        planned(run(rollout=several | {"cuda_devices": "2,3"}))
