"""What a step holds at the size of real vocabularies: 152 k tokens, completions of 2,048, a model of 20 M parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import save_model

pytestmark = [pytest.mark.integration, pytest.mark.long]


def growth(folder: str, num_completions: int, per_micro_batch: int) -> float:
    """MiB that a process takes at most during its first step, beyond what it held before."""
    command = [sys.executable, "-m", "tests.integration.step_memory", folder]
    command += [str(num_completions), str(per_micro_batch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(f"{num_completions} completions, {per_micro_batch} in a micro-batch, MiB: {figures}")
    assert 19e6 < figures["parameters"] < 21e6
    return figures["peak"] - figures["before"]


@pytest.mark.timeout(1800)
def test_a_step_grows_with_its_micro_batch_and_not_with_the_number_of_its_prompts(tmp_path: Path) -> None:
    """The smallest step has two micro-batches: while the first one runs there is no gradient to add to."""
    shape = {"vocab_size": 152_000, "hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 4096}
    folder = save_model(tmp_path, "qwen3", **shape)
    steps = [growth(folder, num_completions, 1) for num_completions in (2, 4, 8)]
    assert max(steps) <= 1.1 * min(steps), steps
    assert growth(folder, 4, 2) > 1.1 * max(steps)
