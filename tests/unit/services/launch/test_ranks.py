"""What a process is told of its rank."""

import pytest

from services.launch import ranks
from services.launch.ranks import with_rank, without_rank

TORCHRUN = {
    **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
    **{"GROUP_WORLD_SIZE": "2", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "ROLE_NAME": "default"},
    **{
        "MASTER_ADDR": "10.0.0.5",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
    },
}


def test_nothing_of_an_outer_torchrun_is_left() -> None:
    others = {"PATH": "/bin", "MY_RANK": "1", "RANKING": "2", "MASTER_ADDRESS": "x"}
    assert without_rank({**others, **TORCHRUN}) == others


def test_a_rank_is_told_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_num_cores", lambda: 7)
    assert with_rank({"PATH": "/bin"}, 1, 2, 1234) == {
        "PATH": "/bin",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
        "OMP_NUM_THREADS": "3",
    }
    assert with_rank({}, 0, 8, 1234)["OMP_NUM_THREADS"] == "1"
    assert with_rank({"OMP_NUM_THREADS": "5"}, 0, 2, 1234)["OMP_NUM_THREADS"] == "5"


def test_a_rank_that_is_alone_is_told_nothing() -> None:
    assert with_rank({"PATH": "/bin"}, 0, 1, 1234) == {"PATH": "/bin"}
