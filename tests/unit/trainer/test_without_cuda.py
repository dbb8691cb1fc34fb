"""Where there is no CUDA the trainer never asks it anything: torch's answer would be an error in the middle of a step."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from services.process.startup import free_port


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_snapshots_and_a_saved_student_leave_cuda_alone(
    num_ranks: int, tiny_model_folder: Any, tmp_path: Path
) -> None:
    model, port = tiny_model_folder("qwen3"), free_port("127.0.0.1", 0)
    program = [sys.executable, "-m", "tests.unit.trainer.without_cuda", model, str(tmp_path)]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(num_ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            variables = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            ranks.append(subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [rank.communicate()[1] for rank in ranks]  # a rank whose peer has failed fails as well
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * num_ranks, errors
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(model), tmp_path / "student"))
    assert all(not before[name].equal(after[name]) for name in before)
