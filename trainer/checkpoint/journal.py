"""`journal.jsonl`: which prompts a run has used, for what, and in which attempt; so that none is lost and none used twice.

{"attempt": 2, "run": "3f9c2a1b", "from_step": 20, "time": ...}            a process has started to work on the run
{"step": 21, "attempt": 2, "prompts": [640, 672], "texts": [0, 0],         a step is trained
 "groups": [[640, 17, [20], 4], ...],                                      position, row, versions, samples
 "dropped": [[651, 3, "the teacher ..."], ...],                            position, row, reason
 "stale": [[655, 9], ...]}                                                 position, row, where any were too old and made again

A position is that of trainer/data/stream.py: every prompt of a run has one of its own. `prompts` and `texts` are the positions
before and after the step. Of a row that is left out of the data its position is in no list.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import StartupError
from services.strict_json import JsonError, parse_json
from trainer.data.stream import RowStream
from trainer.groups import PromptGroup

NAME = "journal.jsonl"


def used(
    prompts: tuple[int, int],
    texts: tuple[int, int],
    positions: Sequence[int],
    groups: Sequence[PromptGroup],
    stale: Sequence[PromptGroup] = (),
) -> dict[str, Any]:
    """What a step's row says of the data.

    Args:
        prompts, texts: positions before and after the step.
        positions: of the step's prompts, by place.
        groups: as they were trained on; a prompt without any of them has been lost, and one without a sample is dropped.
        stale: which were too old to be trained on; of the same prompts there are others among `groups`.
    """
    kept = [group for group in groups if group.samples]
    dropped = [group for group in groups if not group.samples]
    renewed = {"stale": [[positions[group.place], group.prompt.row] for group in stale]} if stale else {}
    return renewed | {
        "prompts": list(prompts),
        "texts": list(texts),
        "groups": [
            [
                positions[group.place],
                group.prompt.row,
                sorted({sample.rollout.policy_version for sample in group.samples}),
                len(group.samples),
            ]
            for group in kept
        ],
        "dropped": [
            [
                positions[group.place],
                group.prompt.row,
                group.quarantined[0].reason if group.quarantined else "no completion came",
            ]
            for group in dropped
        ],
    }


@dataclass(frozen=True)
class Journal:
    """The rows of a journal: of attempts, and of steps."""

    path: Path
    attempts: list[Mapping[str, Any]]
    steps: list[Mapping[str, Any]]

    def check(
        self,
        run: str,
        last_step: int,
        prompts: RowStream[Any] | None = None,
        *,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        """Find out whether every prompt up to a step was used, or dropped for a reason, exactly once and in order.

        Args:
            run: id of the run.
            last_step: rows of later steps are not looked at.
            prompts: the stream, which says of a position without a group whether its row is left out.
            positions: where the last step has ended.

        Raises:
            StartupError: names the first step with which something is wrong.
        """
        if not any(row.get("run") == run for row in self.attempts):
            raise self._unusable(f"it is of another run than {run}")
        steps = [row for row in self.steps if row["step"] <= last_step]
        numbers = [row["step"] for row in steps]
        if numbers != list(range(1, last_step + 1)):
            missing = sorted(set(range(1, last_step + 1)) - set(numbers))
            twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
            raise self._unusable(f"steps {missing} are missing, {twice} are there twice")
        ends = {"prompts": 0, "texts": 0}
        for row in steps:
            try:
                ends = self._check_step(row, ends, prompts)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise self._unusable(f"step {row['step']} is no row of a step ({error!r})") from error
        if positions is not None and ends != positions:
            raise self._unusable(f"step {last_step} ends at {ends}, the checkpoint of it at {positions}")

    def _check_step(
        self, row: Mapping[str, Any], ends: dict[str, int], prompts: RowStream[Any] | None
    ) -> dict[str, int]:
        """Where the step ends, of which the row is, and before which the data was at `ends`."""
        step = row["step"]
        if "prompts" not in row:
            raise self._unusable(f"step {step} does not say which prompts it has used")
        (start, after), (start_of_texts, after_texts) = row["prompts"], row["texts"]
        places = [group[0] for group in row["groups"]] + [group[0] for group in row["dropped"]]
        if start != ends["prompts"] or after < start or start_of_texts != ends["texts"]:
            raise self._unusable(f"step {step} goes on from prompt {start}, the one before ended at {ends['prompts']}")
        if len(set(places)) != len(places) or not all(start <= place < after for place in places):
            raise self._unusable(f"step {step} has used a prompt twice, or one of another step")
        if prompts is not None:
            rows = {place for place in range(start, after) if prompts.at(place) is not None}
            if rows != set(places):
                raise self._unusable(
                    f"step {step} has lost the prompts {sorted(rows - set(places))}, or used {sorted(set(places) - rows)}, "
                    "which are left out"
                )
        return {"prompts": after, "texts": after_texts}

    def _unusable(self, reason: str) -> StartupError:
        return StartupError(
            f"{self.path} is not as it was written: {reason}; go on from a checkpoint before that with --output.resume_step, or "
            "begin anew with --output.overwrite true"
        )


def read_journal(folder: Path) -> Journal:
    """The journal in a run's folder; a last line that is not whole is left out.

    Raises:
        StartupError: it is not there, or another line is no row.
    """
    path = folder / NAME
    attempts: list[Mapping[str, Any]] = []
    steps: list[Mapping[str, Any]] = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what is behind the last line break is not whole
        for number, line in enumerate(lines, 1):
            row = parse_json(line)
            numbered = {name for name, value in row.items() if type(value) is int} if isinstance(row, dict) else set()
            if "step" in numbered:
                steps.append(row)
            elif {"attempt", "from_step"} <= numbered:
                attempts.append(row)
            else:
                raise StartupError(
                    f"{path}, line {number} is no row of a journal; begin anew with --output.overwrite true"
                )
    except OSError as error:
        raise StartupError(
            f"{path} cannot be read: {error.strerror}; without it a run cannot go on, begin anew with --output.overwrite true"
        ) from error
    except JsonError as error:
        raise StartupError(f"{path}, line {number}: {error}; begin anew with --output.overwrite true") from error
    return Journal(path, attempts, steps)


def attempt_row(run: str, attempt: int, from_step: int, time: str) -> bytes:
    """The line of an attempt that begins."""
    return json.dumps({"attempt": attempt, "run": run, "from_step": from_step, "time": time}).encode()
