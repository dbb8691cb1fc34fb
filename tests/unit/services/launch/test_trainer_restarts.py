"""`up` lets the trainer go on from its checkpoint. Small scripts are in the place of the roles; kills and signals are real."""

import os
import signal
import time
from pathlib import Path

import pytest

from services.config import RunConfig
from services.errors import ConfigError, OutageError, RankLostError
from services.gpus.advice import updated
from services.launch.role_starter import RESUME
from tests.unit.services.launch.roles import starts, state, until
from tests.unit.services.launch.up_process import KILLED, SAVES, Up, logs, quick

CHECKPOINT = """
os.makedirs(f"{folder}/out/checkpoints/step-1/resume", exist_ok=True)
touch("out/checkpoints/step-1/resume/complete")
"""


@pytest.mark.parametrize(
    ("dies", "why"),
    [
        ("os.kill(os.getpid(), 9)", f"the trainer {KILLED}"),
        (f"die({OutageError.exit_code}, 'distillserve: no teacher')", "the trainer failed: no teacher"),
    ],
)
def test_a_trainer_that_is_killed_goes_on_from_its_checkpoint(
    dies: str, why: str, config: RunConfig, tmp_path: Path
) -> None:
    run = Up(quick(config, restart_trainer=2), tmp_path, {"trainer": {1: CHECKPOINT + dies}})
    run.wait_until_started("trainer-0", 2)
    assert run.finish() == 0
    (_, first, _, lock), (_, second, _, same) = starts(tmp_path, "trainer-0")
    assert (first, second) == ([], list(RESUME)) and lock == same and lock.isdecimal()
    assert [line for line in run.lines() if line.startswith("trainer | starting")] == [
        "trainer | starting (usually 15 to 40 s)",
        f"trainer | starting again (1 of 2) in 0.1 s: {why}",
        "trainer | starting again (1 of 2) from its newest checkpoint (usually 15 to 40 s), its log is trainer.2.log",
    ]
    assert {"trainer.log", "trainer.2.log"} < set(logs(tmp_path))
    for role in ("rollout", "teacher"):
        assert len(starts(tmp_path, f"{role}-{getattr(config, role).port}")) == 1


def test_a_trainer_without_a_checkpoint_of_this_run_begins_once_more_as_it_did(
    config: RunConfig, tmp_path: Path
) -> None:
    """One of an earlier run that this one replaces is none."""
    earlier = tmp_path / "out" / "checkpoints" / "step-9" / "resume" / "complete"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    os.utime(earlier, (time.time() - 60, time.time() - 60))
    half = "os.makedirs(f'{folder}/out/checkpoints/step-10/resume')\n"
    anew = updated(config, "output", overwrite=True)
    run = Up(quick(anew, restart_trainer=2), tmp_path, {"trainer": {1: half + "os.kill(os.getpid(), 9)"}})
    run.wait_until_started("trainer-0", 2)
    assert run.finish() == 0 and [start[1] for start in starts(tmp_path, "trainer-0")] == [[], []]
    assert any("starting again (1 of 2) as it began (usually" in line for line in run.lines())


def test_a_trainer_is_not_started_again_unless_that_is_asked_for(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config), tmp_path, {"trainer": {1: "os.kill(os.getpid(), 9)"}})
    assert run.end() == 137 and len(starts(tmp_path, "trainer-0")) == 1


def test_a_trainer_that_goes_on_dying_ends_the_run(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config, restart_trainer=1), tmp_path, {"trainer": dict.fromkeys((1, 2), "os.kill(os.getpid(), 9)")})
    assert run.end() == 137 and len(starts(tmp_path, "trainer-0")) == 2
    assert f"up      | the trainer {KILLED}, after 1 restart; ending the others" in run.lines()
    assert run.lines()[-2].endswith("out/logs/trainer.2.log")


@pytest.mark.parametrize("act", ["die(1)", f"die({ConfigError.exit_code})", "die(143)", "os.kill(os.getpid(), 15)"])
def test_a_trainer_that_failed_by_itself_or_was_asked_to_end_is_not_started_again(
    act: str, config: RunConfig, tmp_path: Path
) -> None:
    run = Up(quick(config, restart_trainer=3), tmp_path, {"trainer": {1: act}})
    run.end()
    assert len(starts(tmp_path, "trainer-0")) == 1 and not any("again" in line for line in run.lines())


def test_a_trainer_that_is_killed_before_it_trains_is_not_started_again(config: RunConfig, tmp_path: Path) -> None:
    """There is nothing to go on from."""
    run = Up(
        quick(config, restart_trainer=3),
        tmp_path,
        {"trainer": {1: "os.remove(f'{folder}/out/config.json'); os.kill(os.getpid(), 9)"}},
    )
    assert run.end() == 137 and len(starts(tmp_path, "trainer-0")) == 1


LOSES = f"""
def lose(*_): touch("signalled")
signal.signal(signal.SIGTERM, lose)
if rank == 1:
    wait_for("trainer-0.starts"); os.kill(os.getpid(), 9)
time.sleep(3.0); touch("noticed"); sys.exit({RankLostError.exit_code})
"""


def test_all_ranks_start_again_together_when_one_of_them_is_killed(config: RunConfig, tmp_path: Path) -> None:
    ranks = updated(config, "trainer", num_processes=2)
    of_second = "if not os.path.exists(f'{folder}/noticed'): touch('early')\nwait_for('enough')"
    run = Up(quick(ranks, restart_trainer=1), tmp_path, {"trainer": {1: CHECKPOINT + LOSES, 2: of_second}})
    for rank in (0, 1):
        run.wait_until_started(f"trainer-{rank}", 2)
    assert run.finish() == 0
    assert not (tmp_path / "early").exists() and not (tmp_path / "signalled").exists()
    of_ranks = [starts(tmp_path, f"trainer-{rank}") for rank in (0, 1)]
    (first, second), (again, too) = [[start[2] for start in both] for both in zip(*of_ranks, strict=True)]
    assert first == second != again == too  # the port at which they find each other
    assert all(both[1][1] == list(RESUME) for both in of_ranks)
    assert any(f"in 0.1 s: the trainer's rank 1 {KILLED}" in line for line in run.lines())
    assert {"trainer-1.log", "trainer-1.2.log"} < set(logs(tmp_path))


IS_KILLED_WHILE_IT_SAVES = """
if rank == 0:
    wait_for("trainer-1.starts")
    os.makedirs(f"{folder}/out/checkpoints/.step-2.part")
    os.kill(os.getpid(), 9)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_a_checkpoint_that_a_killed_rank_0_was_writing_is_not_waited_for(config: RunConfig, tmp_path: Path) -> None:
    ranks = updated(config, "trainer", num_processes=2)
    acts = {"trainer": {1: CHECKPOINT + IS_KILLED_WHILE_IT_SAVES}}
    run = Up(quick(ranks, restart_trainer=1), tmp_path, acts)
    run.wait_until_started("trainer-0", 2)
    assert run.finish() == 0


def test_a_rank_that_failed_by_its_options_is_not_mended_by_a_start_although_the_other_has_only_lost_it(
    config: RunConfig, tmp_path: Path
) -> None:
    acts = f"if rank == 1: time.sleep(0.3); sys.exit(2)\nsys.exit({RankLostError.exit_code})"
    ranks = updated(config, "trainer", num_processes=2)
    run = Up(quick(ranks, restart_trainer=3), tmp_path, {"trainer": {1: acts}})
    assert run.end() == 2 and len(starts(tmp_path, "trainer-0")) == 1


def test_a_server_may_die_while_the_trainer_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    acts = {"trainer": {1: "wait_for('die'); os.kill(os.getpid(), 9)"}}
    run = Up(quick(config, restart_trainer=1, restart_backoff_s=0.5), tmp_path, acts)
    (tmp_path / "die").touch()
    run.wait_until_said("trainer | starting again")
    run.kill(f"rollout-{config.rollout.port}")
    run.wait_until_said("rollout | ready again")
    run.wait_until_started("trainer-0", 2)
    assert run.finish() == 0


def test_a_trainer_whose_servers_were_away_for_too_long_says_so_itself(config: RunConfig, tmp_path: Path) -> None:
    """Although one of them dies once more in that moment."""
    acts = {
        "rollout": {1: "when('failed', lambda: os.kill(os.getpid(), 9))"},
        "trainer": {
            1: f"touch('failed'); time.sleep(0.1); die({OutageError.exit_code}, 'distillserve: away for 300 s')"
        },
    }
    run = Up(quick(config), tmp_path, acts)
    assert run.end() == OutageError.exit_code
    assert run.lines()[-1] == "up      | the trainer failed: away for 300 s"


def test_ctrl_c_in_the_trainer_s_pause_does_not_start_it_again(config: RunConfig, tmp_path: Path) -> None:
    acts = {"trainer": {1: "os.kill(os.getpid(), 9)"}}
    run = Up(quick(config, restart_trainer=1, restart_backoff_s=60.0), tmp_path, acts)
    run.wait_until_said("trainer | starting again")
    run.interrupt()
    assert len(starts(tmp_path, "trainer-0")) == 1


def test_ctrl_c_once_the_trainer_was_started_again_lets_it_save(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config, restart_trainer=1), tmp_path, {"trainer": {1: "os.kill(os.getpid(), 9)", 2: SAVES}})
    run.wait_until_said("its log is trainer.2.log")
    run.wait_until_started("trainer-0", 2)
    time.sleep(0.2)  # its handler of the signal
    run.interrupt()
    assert (tmp_path / "saved").exists()
    assert any("saving the student first" in line for line in run.lines())


def test_ctrl_c_while_ranks_end_that_have_lost_one_leaves_no_orphan(config: RunConfig, tmp_path: Path) -> None:
    stays = "if rank == 1: wait_for('trainer-0.starts'); os.kill(os.getpid(), 9)\ntime.sleep(600)"
    ranks = updated(config, "trainer", num_processes=2)
    run = Up(quick(ranks, restart_trainer=1), tmp_path, {"trainer": {1: stays}})
    run.wait_until_said("trainer | starting again")
    run.interrupt()
    assert len(starts(tmp_path, "trainer-0")) == 1


def test_what_was_started_again_does_not_outlive_an_up_that_is_killed(config: RunConfig, tmp_path: Path) -> None:
    run = Up(quick(config, restart_trainer=1), tmp_path, {"trainer": {1: "wait_for('die'); os.kill(os.getpid(), 9)"}})
    run.kill(f"rollout-{config.rollout.port}")
    run.wait_until_said("rollout | ready again")
    (tmp_path / "die").touch()
    run.wait_until_started("trainer-0", 2)
    run.process.kill()
    run.process.wait()
    again = [starts(tmp_path, name)[1][0] for name in ("trainer-0", f"rollout-{config.rollout.port}")]
    for _ in until(10.0):
        if all(state(pid) == "Z" for pid in again):
            break
    for file in tmp_path.glob("*.pids"):  # the scripts' own children, which a real server ends itself
        for pid in map(int, file.read_text().split()):
            if state(pid) != "Z":
                os.kill(pid, signal.SIGKILL)
