"""The short form of `make soak`."""

from pathlib import Path

import pytest

from tests.soak import soak

NUM_KILLS = 4


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_of_which_parts_are_killed_ends_as_one_that_is_left_alone(tmp_path: Path) -> None:
    result = soak(tmp_path, NUM_KILLS, steps=240, seed=0, chance_seed=1)
    assert len(result["kills"]) == NUM_KILLS
