"""What a rank costs, in lines; and ranks that a machine has no memory for."""

from typing import Any

import pytest

from services.config import RunConfig
from services.errors import ConfigError
from services.gpus import cost
from services.gpus.cost import report_cost
from services.gpus.memory import GIB, Sizes
from services.gpus.trainer_memory import Layout, trainer_share
from services.models.shape import ModelShape
from tests.unit.services.shapes import QWEN3_0_6B

PARAMETERS_GIB = QWEN3_0_6B.num_parameters / GIB
ENOUGH = 1 << 50


def report(num_ranks: int, *, on_gpu: bool = False, available: int = ENOUGH, **sections: Any) -> list[str]:
    config = RunConfig(**{"student": {"model": "student"}, "rollout": {"dtype": "bfloat16"}, **sections})
    shapes = {"student": QWEN3_0_6B}.get
    return report_cost(config, num_ranks, num_ranks, on_gpu=on_gpu, available=available, shapes=shapes)


def test_a_line_says_what_each_rank_holds() -> None:
    micro_batch = {"pipeline": {"tokens_per_micro_batch": 4096}}
    of_rank, of_machine = report(2, on_gpu=True, **micro_batch)
    layout = Layout(num_ranks=2, num_local_ranks=2, shard_degree=2)
    share = trainer_share(QWEN3_0_6B, Sizes(4096, tokens_per_micro_batch=4096), layout, 64 << 20)
    part = 2 * PARAMETERS_GIB
    assert of_rank == (
        f"each of 2 ranks: parameters {part:.2f} GiB, gradients {part:.2f}, optimizer {2 * part:.2f}, "
        f"head {share.head / GIB:.2f}, activations {share.activations / GIB:.2f} on its GPU; computed"
    )
    assert of_machine == (
        f"this machine's memory: at least {8 * PARAMETERS_GIB:.1f} GiB are needed, {ENOUGH / GIB:.1f} are available"
    )
    assert report(1, **micro_batch)[0].startswith(f"the trainer: parameters {4 * PARAMETERS_GIB:.2f} GiB, gradients")
    assert "GPU" not in report(1, **micro_batch)[0]


def test_what_a_tiny_student_takes_is_not_told_as_nothing() -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    tiny = ModelShape.from_config(sizes | {"num_key_value_heads": 2, "tie_word_embeddings": True})
    part = 4 * tiny.num_parameters / 2**20
    few = RunConfig(student={"model": "tiny"}, sampling={"max_new_tokens": 8}, rollout={"max_model_len": 64})
    of_rank, of_machine = report_cost(few, 1, 1, on_gpu=False, available=ENOUGH, shapes={"tiny": tiny}.get)
    assert of_rank.startswith(
        f"the trainer: parameters {part:.2f} MiB, gradients {part:.2f}, optimizer {2 * part:.2f}, head "
    )
    assert "at least 0.1 GiB" in of_machine


def test_what_is_offloaded_is_said_to_be_on_the_machine() -> None:
    of_rank, of_machine = report(4, on_gpu=True, trainer={"cpu_offload": True})
    kept, passing, _ = of_rank.split("; ")
    assert kept.endswith(f"optimizer {2 * PARAMETERS_GIB:.2f} in this machine's memory")
    assert passing.startswith("head ") and passing.endswith(" on its GPU")
    assert f"at least {20 * PARAMETERS_GIB:.1f} GiB" in of_machine


def test_a_micro_batch_is_no_larger_than_a_ranks_part_of_a_step() -> None:
    few = {"prompts_per_step": 4}
    assert report(2, pipeline=few)[0] == report(2, pipeline=few | {"tokens_per_micro_batch": 2 * 4096})[0]
    assert report(2, pipeline=few)[0] != report(2, pipeline={"prompts_per_step": 8})[0]


def test_micro_batches_that_a_cpu_may_have_no_room_for_are_mentioned() -> None:
    kept = int(20 * PARAMETERS_GIB * GIB)
    *_, last = report(2, available=kept + GIB)
    assert last.startswith("full micro-batches would take ") and "pipeline.tokens_per_micro_batch = 16384" in last
    assert len(report(2, available=kept + GIB, on_gpu=True)) == 2


@pytest.mark.parametrize(
    ("num_ranks", "on_gpu", "trainer", "units", "advice"),
    [
        (2, False, {"parallelism": "ddp"}, "36", "set trainer.parallelism = fsdp2"),
        (2, False, {"shard_degree": 1}, "36", "leave trainer.shard_degree out"),
        (4, True, {"cpu_offload": True}, "20", "set trainer.cpu_offload = false"),
        (2, False, {}, "20", "take a smaller student.model, a machine with more memory, or more machines"),
        (1, True, {}, "4", "take a smaller student.model, a machine with more memory, or more machines"),
    ],
)
def test_ranks_that_need_more_than_there_is_are_refused(
    num_ranks: int, on_gpu: bool, trainer: dict[str, Any], units: str, advice: str
) -> None:
    """What they need is in units of a parameter's bytes."""
    needed = int(units) * QWEN3_0_6B.num_parameters
    report(num_ranks, on_gpu=on_gpu, trainer=trainer, available=needed)
    with pytest.raises(ConfigError) as error:
        report(num_ranks, on_gpu=on_gpu, trainer=trainer, available=needed - 1)
    who, phase = ("the trainer needs", "load") if num_ranks == 1 else (f"{num_ranks} ranks need", "train")
    number = f"{needed / GIB:.1f}"
    assert str(error.value) == (
        f"{who} at least {number} GiB of this machine's memory to {phase} student, but {number} are available; {advice}"
    )


def test_a_machine_that_says_nothing_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(student={"model": "student"})
    for left, refused in ((None, False), (1 << 20, True)):
        monkeypatch.setattr(cost, "available_bytes", lambda left=left: left)
        if refused:
            with pytest.raises(ConfigError):
                report_cost(config, 2, 2, on_gpu=False, shapes={"student": QWEN3_0_6B}.get)
        else:
            _, line = report_cost(config, 2, 2, on_gpu=False, shapes={"student": QWEN3_0_6B}.get)
            assert line.endswith("GiB are needed")


def test_a_student_whose_shape_cannot_be_read_costs_nothing_known() -> None:
    assert report_cost(RunConfig(student={"model": "other"}), 2, 2, on_gpu=False, shapes={}.get) == []
