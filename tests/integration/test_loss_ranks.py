"""A step cut over two real ranks has the gradient of the whole: totals over ranks, DDP's averaging undone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.loss_ranks import AGGREGATIONS, Scale, gradient


@pytest.mark.integration
def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.integration.loss_ranks", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for aggregation in AGGREGATIONS:
        whole = gradient(Scale(), [0, 1, 2, 3, 4], aggregation)
        assert abs(whole) > 1e-3
        assert got[aggregation] == pytest.approx(whole, abs=1e-12)
