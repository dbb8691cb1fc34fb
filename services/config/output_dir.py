"""What a run finds in its folder: nothing, an earlier run that is not to be overwritten, or one that it goes on from.

checkpoints/step-N/resume/state.json is written by trainer/output/checkpoints.py, and the file `complete` beside it last: without
it a folder is a student and no checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blake3

from services.config.passed_on import shown_value
from services.config.roles import takes
from services.config.run import RunConfig
from services.errors import ConfigError, StartupError
from services.strict_json import JsonError, parse_json

# Folders of output.dir that hold students.
_REPLACED = ("student", "checkpoints", ".student.before")

RESUME, STATE, COMPLETE = "resume", "state.json", "complete"
"""In a checkpoint: the folder of what is no student, in it the file of plain values, and the one that says that all is there."""

MAY_DIFFER: Mapping[str, frozenset[str]] = {
    "rollout_client": frozenset({"*"}),
    "rollout": frozenset({"host", "port", "cuda_devices"}),
    "teacher_client": frozenset(
        {
            *("urls", "startup_timeout_s", "request_timeout_s", "outage_s", "named", "accept_different"),
            *("probe_every_steps", "probe_tolerance"),
        }
    ),
    "teacher": frozenset({"host", "port", "cuda_devices"}),
    "trainer": frozenset({"*"}),
    "student": frozenset({"cuda_devices", "gradient_checkpointing", "attn_implementation"}),
    "data": frozenset({"path", "lm_path"}),
    "reward": frozenset({"timeout_s", "startup_timeout_s", "num_workers", "model_device", "model_batch_size"}),
    "optimizer": frozenset({"max_skipped_updates"}),
    "pipeline": frozenset({"steps", "epochs", "tokens_per_micro_batch", "max_quarantine_rate", "min_rollout_servers"}),
    "weight_sync": frozenset({"*"}),
    "evaluation": frozenset({"*"}),
    "output": frozenset({"*"}),
}
"""Options in which a run that goes on may differ from the one before, by section; "*": all. data.path and data.lm_path: the rows
are compared instead. Options that the trainer does not take may differ as well."""

_ADVICE = (
    "addresses, times, ranks, evaluation, output and pipeline.steps may differ, see docs/checkpoints.md; give the others as "
    "they were, or begin anew with --output.overwrite true"
)


def check_output_dir(config: RunConfig, *, is_whole: bool = True) -> Path:
    """Return the run's folder, refusing one that holds what an earlier run has learned, unless this one goes on from it.

    Args:
        is_whole: all options are known; those of a Python program are completed later, and compared then.

    Raises:
        ConfigError: the folder has a summary or a student that nothing can go on from and output.overwrite is off; or the run
            that is there had other options; or this run starts from that student.
        StartupError: the state of a checkpoint cannot be read.
    """
    output, path = config.output, Path(config.output.dir)
    found = (["summary.json"] if (path / "summary.json").exists() else []) + students_in(path)
    goes_on = find_checkpoint(config, is_whole=is_whole) is not None
    if found and not output.overwrite and not goes_on:
        raise ConfigError(
            f"output.dir = {str(path)!r} holds an earlier run ({found[0]}); choose another folder or pass "
            "--output.overwrite true, which replaces it"
        )
    for key, model in (
        ("student.model", config.student.model),
        ("teacher.model", config.teacher.model),
        ("lora.adapter", config.lora.adapter),
    ):
        folder = Path(model or "").resolve()
        replaced = any(folder.is_relative_to((path / name).resolve()) for name in _REPLACED)
        if model and (replaced or folder == path.resolve()):
            raise ConfigError(
                f"{key} = {model!r} lies in output.dir = {str(path)!r}, where this run replaces it; choose another output.dir"
            )
    return path


def students_in(output_dir: Path) -> list[str]:
    """The folders of a run's folder that hold students; one that was killed while it wrote the first checkpoint has left none."""
    return [
        name
        for name in _REPLACED
        if (output_dir / name).exists() and (name != "checkpoints" or any((output_dir / name).glob("step-*")))
    ]


def complete_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run's folder by step, the oldest first."""
    found = {}
    for path in (output_dir / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and (path / RESUME / COMPLETE).is_file():
            found[int(number)] = path
    return dict(sorted(found.items()))


def find_checkpoint(config: RunConfig, *, is_whole: bool = True) -> Path | None:
    """The checkpoint that a run goes on from: the newest complete one of an unfinished run, or what output.resume and
    output.resume_step ask for. None: the run begins.

    Args:
        is_whole: as of `check_output_dir`.

    Raises:
        ConfigError: there is none although one is asked for, or its run had other options.
        StartupError: its state cannot be read.
    """
    output, path = config.output, Path(config.output.dir)
    is_asked = output.resume or output.resume_step is not None
    if output.overwrite or ((path / "summary.json").exists() and not is_asked):
        return None
    checkpoints = complete_checkpoints(path)
    step = max(checkpoints, default=None) if output.resume_step is None else output.resume_step
    if step is None or step not in checkpoints:
        if not is_asked:
            return None
        there = ", ".join(map(str, checkpoints)) or "none"
        what = "output.resume = True" if output.resume_step is None else f"output.resume_step = {output.resume_step}"
        raise ConfigError(
            f"{what}: output.dir = {str(path)!r} holds no such checkpoint, complete are those of steps: {there}; leave the option "
            "out to begin"
        )
    state = read_state(checkpoints[step])
    if is_whole:
        check_same_options(config, state, checkpoints[step])
    if config.pipeline.steps == step and (path / "summary.json").exists():
        raise ConfigError(
            f"output.dir = {str(path)!r} holds a complete run of pipeline.steps = {step}; raise that to train on, or begin anew "
            "with --output.overwrite true"
        )
    if config.pipeline.steps is not None and config.pipeline.steps < step:
        raise ConfigError(
            f"pipeline.steps = {config.pipeline.steps} is below the {step} steps of {checkpoints[step]}; raise it, or go on from an "
            "earlier checkpoint with output.resume_step"
        )
    return checkpoints[step]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        StartupError: they cannot be read.
    """
    path, marker = checkpoint / RESUME / STATE, checkpoint / RESUME / COMPLETE
    try:
        content, expected = path.read_bytes(), marker.read_bytes()
        if blake3.blake3(content).hexdigest().encode() != expected:
            raise unusable(path, f"its checksum is not the one in {marker.name!r} beside it")
        state = parse_json(content)
    except (OSError, JsonError) as error:
        raise unusable(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise unusable(path, "it holds no config")
    return state


def unusable(path: Path, reason: str) -> StartupError:
    """The error of a file of a checkpoint that is not as it was written."""
    folder = path if path.parent.name == "checkpoints" else next(p for p in path.parents if p.name.startswith("step-"))
    return StartupError(
        f"{path} is not as it was written: {reason}; remove {folder} to go on from the checkpoint before it, or begin anew with "
        "--output.overwrite true"
    )


def check_same_options(config: RunConfig, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on under other options than those of MAY_DIFFER.

    Raises:
        ConfigError: names every option that differs, and its values.
    """
    defaults, now = json.loads(RunConfig().model_dump_json()), json.loads(config.model_dump_json())
    folder_before = (state["config"].get("output") or {}).get("dir", defaults["output"]["dir"])
    differing = []
    for section, options in now.items():
        before = state["config"].get(section, defaults[section])
        if not isinstance(options, dict):
            differing += [] if options == before else [f"{section} was {before!r} and is {options!r}"]
            continue
        for name, value in options.items():
            was = before.get(name, defaults[section][name]) if isinstance(before, dict) else None
            is_same = was == value or _in_folder(was, folder_before) == _in_folder(value, config.output.dir)
            if not is_same and not _may_differ(section, name):
                key = f"{section}.{name}"
                differing.append(
                    f"{key} differs" if _is_private(name, was, value) else f"{key} was {was!r} and is {value!r}"
                )
    if differing:
        raise ConfigError(f"{checkpoint} is of a run with other options: {'; '.join(differing)}; {_ADVICE}")


def _may_differ(section: str, name: str) -> bool:
    names = MAY_DIFFER.get(section, frozenset())
    return "*" in names or name in names or not takes("train", section, name)


def _in_folder(value: Any, folder: str) -> Any:
    """A value whose paths in the run's folder are told from there: the folder may have been moved."""
    if isinstance(value, dict):
        return {_in_folder(key, folder): _in_folder(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [_in_folder(part, folder) for part in value]
    if isinstance(value, str) and Path(value).is_relative_to(folder):
        return Path("output.dir"), Path(value).relative_to(folder)
    return value


def _is_private(name: str, *values: Any) -> bool:
    """Whether a value is long, or may be a secret."""
    return any(isinstance(value, dict) for value in values) or not shown_value(name, "")
