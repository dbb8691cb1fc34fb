"""Where there is no CUDA the trainer never asks it anything: torch's answer would be an error in the middle of a step."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_a_step_a_snapshot_and_a_saved_student_leave_cuda_alone(tiny_model_folder: Any, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.unit.trainer.without_cuda", tiny_model_folder("qwen3"), str(tmp_path)]
    done = subprocess.run(program, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "student" / "model.safetensors").exists()
