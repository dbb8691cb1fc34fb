"""`make soak`: a whole run of the tiny pair whose parts are killed at random moments, beside the same run left alone.

    starts     distillserve up, with evaluations in between and a checkpoint every few steps
    kills      a rollout server, the teacher or a rank of the trainer (kill -9), each chosen at random, some steps after the last
    compares   with the undisturbed run: as many steps, the bound on the held-out prompts, a journal without a lost or doubled
               group, no sample of another version than its step's

Writes soak.json into tests/benchmarks/results and the picture of docs/operations.md, where it is asked to (--write).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.process.files import write_by_rename
from tests.integration.processes import PROGRAMS, pids_of_role
from trainer.checkpoint.journal import read_journal
from trainer.tiny.pair import build_tiny_pair

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tests" / "benchmarks" / "results" / "soak.json"
PICTURE = ROOT / "docs" / "soak.png"
ROLES = tuple(PROGRAMS)
# Between the return of a part and the next kill, most steps; a share of the kills comes while something is being started again.
_CALM_STEPS = 16
_STARTING_SHARE = 0.25
_POLL_S = 0.1
_STUCK_S = 600.0

OPTIONS = (
    *("--evaluation.every_steps", "20", "--output.save_every_steps", "5", "--output.trackers", "[]"),
    *("--up.restart_servers", "1000", "--up.restart_trainer", "1000", "--up.restart_backoff_s", "0.05"),
)


@dataclass(frozen=True)
class Kill:
    """One kill -9.

    Attributes:
        step: the last one that was written down before it.
        at_s: seconds since the start of the run.
        back_s: until the next step was written down; None: that was not waited for before the next kill.
    """

    role: str
    step: int
    at_s: float
    back_s: float | None


class Run:
    """A run of `up` from outside: what it has written, and its processes."""

    def __init__(self, pair: Path, output: Path, steps: int, seed: int, options: Sequence[str]) -> None:
        self.output, self._began = output, time.monotonic()
        words = [
            *("up", str(ROOT / "deploy" / "runs" / "tiny.toml"), "--seed", str(seed), "--pipeline.steps", str(steps)),
            *("--student.model", str(pair / "student"), "--teacher.model", str(pair / "teacher")),
            *("--data.path", str(pair / "train.jsonl"), "--data.eval_path", str(pair / "eval.jsonl")),
            *("--output.dir", str(output), *OPTIONS, *options),
        ]
        self._log = output.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def is_running(self) -> bool:
        return self.process.poll() is None

    def step(self) -> int:
        """The last step that is written down; 0 before the first."""
        return max((row["step"] for row in rows(self.output / "metrics.jsonl") if "num_steps" in row), default=0)

    def wait_for_step(self, step: int) -> bool:
        """Whether it was reached before the run ended.

        Raises:
            RuntimeError: nothing was trained for ten minutes.
        """
        deadline = time.monotonic() + _STUCK_S
        while self.is_running() and self.step() < step:
            if time.monotonic() > deadline:
                raise RuntimeError(f"step {step} did not come within {_STUCK_S:.0f} s; see {self._log.name}")
            time.sleep(_POLL_S)
        return self.is_running()

    def end(self) -> int:
        """Its exit code, once it is over."""
        code = self.process.wait()
        self._log.close()
        return code


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def disturb(run: Run, num_kills: int, last_step: int, chance: random.Random) -> Iterator[Kill]:
    """Kill parts of a run, each time another few steps on, as long as there are steps left."""
    roles = [ROLES[i % len(ROLES)] for i in range(num_kills)]
    chance.shuffle(roles)
    for number, role in enumerate(roles):
        # The steps that are left are shared among the kills that are left.
        share = max(1, (last_step - run.step()) // (num_kills - number))
        if not run.wait_for_step(run.step() + chance.randint(1, min(_CALM_STEPS, share))):
            return
        time.sleep(chance.uniform(0.0, 1.0))  # at any moment of a step
        pids = pids_of_role(run.process.pid, role)
        while not pids and run.is_running():
            time.sleep(_POLL_S)
            pids = pids_of_role(run.process.pid, role)
        step, at_s = run.step(), run.seconds
        if pids:
            os.kill(chance.choice(pids), signal.SIGKILL)
        if is_waited_for := chance.random() >= _STARTING_SHARE:
            run.wait_for_step(step + 1)
        yield Kill(role, step, at_s, run.seconds - at_s if is_waited_for else None)


def outcome(run: Run, code: int, steps: int) -> dict[str, Any]:
    """What a run has come to.

    Raises:
        AssertionError: it has lost something.
    """
    assert code == 0, f"exit code {code}; see the end of {run.output.with_suffix('.log')}"
    summary = json.loads((run.output / "summary.json").read_text())
    metrics = rows(run.output / "metrics.jsonl")
    trained = [row["step"] for row in metrics if "num_steps" in row]
    assert summary["steps"] == steps and trained == list(range(1, steps + 1)), (summary["steps"], trained)
    journal = read_journal(run.output)
    journal.check(journal.attempts[0]["run"], steps)
    used = [group[0] for row in journal.steps for group in row["groups"] + row["dropped"]]
    assert sorted(used) == list(range(len(used))), "a prompt was lost or used twice"
    assert all(row["staleness"] == 0 for row in metrics if "num_steps" in row), (
        "a sample of another version was trained on"
    )
    curve = [(row["step"], row["eval_reverse_kl"]) for row in metrics if "eval_reverse_kl" in row]
    return {"wall_s": run.seconds, "curve": curve} | {side: summary[side] for side in ("before", "after")}


def check_bounds(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """The bounds of `make train`, and no worse than the undisturbed run by more than chance.

    Raises:
        AssertionError: a bound was missed.
    """
    before, after = found["before"], found["after"]
    assert before["exact_match"] <= 0.3 and after["exact_match"] >= 0.9, (before, after)
    assert after["reverse_kl"] <= before["reverse_kl"] / 10, (before, after)
    difference = after["reverse_kl"] - alone["after"]["reverse_kl"]
    stderr = (after["reverse_kl_stderr"] ** 2 + alone["after"]["reverse_kl_stderr"] ** 2) ** 0.5
    print(f"final reverse KL: {difference:+.4f} beside the undisturbed run, standard error {stderr:.4f}")


def draw(found: dict[str, Any], alone: dict[str, Any], kills: list[Kill], picture: Path) -> None:
    """Both curves of the held-out reverse KL, with a line for each kill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    colours = dict(zip(ROLES, ("tab:orange", "tab:purple", "tab:red"), strict=True))
    for role, colour in colours.items():
        steps = [kill.step for kill in kills if kill.role == role]
        axes.vlines(steps, 0, 1, transform=axes.get_xaxis_transform(), color=colour, lw=0.9, alpha=0.6)
        axes.plot([], [], color=colour, label=f"{role} killed ({len(steps)})")
    axes.semilogy(*zip(*alone["curve"], strict=True), "o-", color="tab:gray", label="undisturbed")
    axes.semilogy(*zip(*found["curve"], strict=True), "o-", color="tab:blue", label=f"{len(kills)} kills")
    axes.set(xlabel="step", ylabel="held-out reverse KL, nats a token")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def soak(
    folder: Path, num_kills: int, steps: int, seed: int, chance_seed: int, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Both runs, in a folder of their own; returns what is written down of them.

    Args:
        options: further ones of `up`.

    Raises:
        AssertionError: the disturbed run has lost something, or has missed a bound.
    """
    pair = folder / "pair"
    build_tiny_pair(pair, seed=seed)
    calm = Run(pair, folder / "undisturbed", steps, seed, options)
    alone = outcome(calm, calm.end(), steps)
    print(f"undisturbed: {steps} steps in {alone['wall_s']:.0f} s", flush=True)
    run, kills = Run(pair, folder / "disturbed", steps, seed, options), []
    try:
        for kill in disturb(run, num_kills, steps, random.Random(chance_seed)):
            kills.append(kill)
            back = "" if kill.back_s is None else f", a step further after {kill.back_s:.1f} s"
            print(f"{kill.at_s:7.1f} s  step {kill.step:3d}  {kill.role} killed{back}", flush=True)
    except BaseException:
        run.process.terminate()
        raise
    found = outcome(run, run.end(), steps)
    assert len(kills) == num_kills, f"the run was over after {len(kills)} of {num_kills} kills"
    check_bounds(found, alone)
    return {"kills": [asdict(kill) for kill in kills], "undisturbed": alone, "disturbed": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Further options are those of `distillserve up`: --rollout.num_servers 2 --trainer.num_processes 2",
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0, help="of the pair and the run")
    parser.add_argument("--chance", type=int, default=0, help="seed of who is killed when")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "soak", help="of the runs; must not exist")
    parser.add_argument("--write", action="store_true", help="write soak.json and the picture of the docs")
    given, options = parser.parse_known_args()
    given.folder.mkdir(parents=True)
    result = soak(given.folder, given.kills, given.steps, given.seed, given.chance, options)
    if given.write:
        write_by_rename(RESULT, (json.dumps(result, indent=2) + "\n").encode())
        kills = [Kill(**kill) for kill in result["kills"]]
        draw(result["disturbed"], result["undisturbed"], kills, PICTURE)


if __name__ == "__main__":
    main()
