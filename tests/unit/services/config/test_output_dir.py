"""What a run finds in its folder: which checkpoint it goes on from, and with which options."""

import json
from pathlib import Path
from typing import Any

import blake3
import pytest

from services.config import RunConfig
from services.config.output_dir import (
    MAY_DIFFER,
    check_output_dir,
    complete_checkpoints,
    find_checkpoint,
    students_in,
)
from services.errors import ConfigError, StartupError
from tests.unit.services.config.commands import COMPLETE, refused, resolved


def config_of(folder: Path, **sections: Any) -> RunConfig:
    given = {"pipeline": {"steps": 9}, **sections}
    return RunConfig(**{**given, "output": {"dir": str(folder), **given.get("output", {})}})


def write(folder: Path, step: int, config: RunConfig | None = None, *, is_complete: bool = True) -> Path:
    """As much of a checkpoint as is looked at before a model is loaded."""
    path = folder / "checkpoints" / f"step-{step}"
    (path / "resume").mkdir(parents=True)
    content = json.dumps({"config": (config or config_of(folder)).model_dump(mode="json"), "step": step}).encode()
    (path / "resume" / "state.json").write_bytes(content)
    if is_complete:
        (path / "resume" / "complete").write_text(blake3.blake3(content).hexdigest())
    return path


def test_a_run_goes_on_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(config_of(tmp_path)) is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    write(tmp_path, 11, is_complete=False)
    (tmp_path / "checkpoints" / ".step-12.part").mkdir()
    (tmp_path / "checkpoints" / "step-x").mkdir()
    assert list(complete_checkpoints(tmp_path)) == [2, 9, 10]
    longer = config_of(tmp_path, pipeline={"steps": 20})
    assert find_checkpoint(longer) == tmp_path / "checkpoints" / "step-10"
    assert check_output_dir(longer) == tmp_path


def test_a_run_that_was_killed_in_its_first_checkpoint_has_left_nothing_to_replace(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-2.part" / "resume").mkdir(parents=True)
    assert check_output_dir(config_of(tmp_path)) == tmp_path and students_in(tmp_path) == []
    write(tmp_path, 2, is_complete=False)
    with pytest.raises(ConfigError, match=r"holds an earlier run \(checkpoints\)"):
        check_output_dir(config_of(tmp_path))


def test_which_one_can_be_chosen(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
    assert find_checkpoint(config_of(tmp_path, output={"resume_step": 2})) == tmp_path / "checkpoints" / "step-2"
    message = r"output\.resume_step = 3: .* complete are those of steps: 2, 4; leave the option out"
    with pytest.raises(ConfigError, match=message):
        check_output_dir(config_of(tmp_path, output={"resume_step": 3}))


def test_who_asks_to_go_on_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.resume = True: .* complete are those of steps: none"):
        check_output_dir(config_of(tmp_path / "nothing", output={"resume": True}))


def test_who_asks_to_replace_a_run_does_not_go_on(tmp_path: Path) -> None:
    write(tmp_path, 2)
    assert find_checkpoint(config_of(tmp_path, output={"overwrite": True})) is None


def test_a_complete_run_goes_on_where_that_is_asked_for_and_more_steps_are(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    (tmp_path / "summary.json").touch()
    longer = {"pipeline": {"steps": 12}}
    with pytest.raises(ConfigError, match=r"holds an earlier run \(summary\.json\)"):
        check_output_dir(config_of(tmp_path, **longer))
    with pytest.raises(ConfigError, match=r"holds a complete run of pipeline\.steps = 9; raise that"):
        check_output_dir(config_of(tmp_path, output={"resume": True}))
    assert find_checkpoint(config_of(tmp_path, output={"resume": True}, **longer)) == path


def test_every_option_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    write(tmp_path, 2)
    changed = config_of(tmp_path, loss={"gamma": 0.5}, optimizer={"learning_rate": 1.0}, sampling={"temperature": 0.7})
    with pytest.raises(ConfigError) as raised:
        check_output_dir(changed)
    said = str(raised.value)
    assert "optimizer.learning_rate was 1e-05 and is 1.0" in said and "sampling.temperature was 1.0 and is 0.7" in said
    assert "loss.gamma was" in said and "may differ" in said and "--output.overwrite true" in said


def test_what_may_be_a_secret_is_named_without_its_value(tmp_path: Path) -> None:
    write(tmp_path, 2)
    changed = config_of(tmp_path, student={"model_init_kwargs": {"some_key": "hush"}})
    with pytest.raises(ConfigError, match=r"student\.model_init_kwargs differs;") as raised:
        check_output_dir(changed)
    assert "hush" not in str(raised.value)


def test_options_that_may_differ_exist_and_are_the_trainers() -> None:
    for section, names in MAY_DIFFER.items():
        known: Any = RunConfig.model_fields[section].annotation
        assert names == {"*"} or names <= set(known.model_fields)


def test_an_option_that_was_added_since_has_been_at_its_default(tmp_path: Path) -> None:
    path = write(tmp_path, 2) / "resume"
    state = json.loads((path / "state.json").read_text())
    del state["config"]["sampling"]["temperature"], state["config"]["lora"]
    content = json.dumps(state).encode()
    (path / "state.json").write_bytes(content)
    (path / "complete").write_text(blake3.blake3(content).hexdigest())
    assert find_checkpoint(config_of(tmp_path)) is not None
    with pytest.raises(ConfigError, match=r"sampling\.temperature was 1\.0 and is 0\.5"):
        find_checkpoint(config_of(tmp_path, sampling={"temperature": 0.5}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"config": 3}', b'{"a": 1, "a": 2}'])
def test_a_state_that_is_none_is_refused_by_its_file(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, 2) / "resume"
    (path / "state.json").write_bytes(content)
    with pytest.raises(StartupError, match="its checksum is not the one in 'complete'"):
        check_output_dir(config_of(tmp_path))
    (path / "complete").write_text(blake3.blake3(content).hexdigest())
    with pytest.raises(StartupError, match=rf"{path / 'state.json'} is not as it was written"):
        check_output_dir(config_of(tmp_path))


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"pipeline\.steps = 4 is below the 5 steps"):
        check_output_dir(config_of(tmp_path, pipeline={"steps": 4}))


@pytest.mark.parametrize("command", ["up", "train"])
def test_resume_is_short_for_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = COMPLETE if command == "up" else [word for word in COMPLETE if word not in ("--teacher.model", "t")]
    assert resolved(capsys, command, *words)["output"]["resume"] is False
    assert resolved(capsys, command, *words, "--resume")["output"]["resume"] is True
    assert "output.overwrite = true replaces the run" in refused(
        capsys, command, *words, "--resume", "--output.overwrite", "true", "--dry-run"
    )


def test_the_best_of_no_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*COMPLETE, "--output.keep_best", "true", "--output.save_every_steps", "0", "--dry-run"]
    assert "output.save_every_steps = 0 makes none; set it above 0" in refused(capsys, "up", *words)


def paths_in(folder: str) -> dict[str, Any]:
    student = {"model": f"{folder}/models/student"}
    reward = {"functions": [f"{folder}/models/reward-0", "rewards.py:f"]}
    data = {"eval_path": f"{folder}/data/eval_dataset.jsonl", "more_paths": {f"{folder}/data/more": 2.0}}
    return {"student": student, "reward": reward, "data": data, "pipeline": {"steps": 9, "samples_per_prompt": 2}}


def test_paths_in_the_folder_of_a_run_move_with_it(tmp_path: Path) -> None:
    write(tmp_path, 2, RunConfig(**paths_in("before/out"), output={"dir": "before/out"}))
    assert find_checkpoint(config_of(tmp_path, **paths_in(str(tmp_path)))) == tmp_path / "checkpoints" / "step-2"
    with pytest.raises(ConfigError, match=r"student\.model was 'before/out/models/student' and is 'out/mod") as raised:
        find_checkpoint(config_of(tmp_path, **paths_in("out")))  # which is not this folder
    for option in ("data.eval_path", "data.more_paths", "reward.functions"):
        assert option in str(raised.value)


def test_a_name_that_is_no_path_is_the_same_in_every_folder(tmp_path: Path) -> None:
    given = {"student": {"model": "Qwen/Qwen3-0.6B"}, "pipeline": {"steps": 9}}
    write(tmp_path, 2, RunConfig(**given, output={"dir": "."}))
    assert find_checkpoint(config_of(tmp_path, **given)) is not None
    with pytest.raises(ConfigError, match=r"student\.model was 'Qwen/Qwen3-0\.6B' and is 'Qwen/Qwen3-1\.7B'"):
        find_checkpoint(config_of(tmp_path, **given | {"student": {"model": "Qwen/Qwen3-1.7B"}}))
