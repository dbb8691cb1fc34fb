"""A command takes, shows and checks the options of its role, whatever a run file holds for the others."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from services.cli import main
from services.config import RunConfig
from services.config.roles import _TAKEN, NEW_NAMES, Role, takes, takes_section
from tests.unit.services.config.commands import refused, resolved

SERVERS = ("rollout", "teacher")


def options() -> list[tuple[str, str]]:
    """Section and name of every option in a section."""
    return [(section, name) for section in RunConfig.model_fields if section != "seed" for name in names_in(section)]


def names_in(section: str) -> Iterable[str]:
    kind: Any = RunConfig.model_fields[section].annotation
    return kind.model_fields.keys()


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_every_option_is_of_a_role_and_the_roles_name_no_other() -> None:
    roles = [role for role in get_args(Role) if role != "up"]
    assert [one for one in options() if one[0] != "up" and not any(takes(role, *one) for role in roles)] == []
    assert not any(takes_section(role, "up") for role in roles)  # of `up` itself
    named = {(section, name) for taken in _TAKEN.values() for section, names in taken.items() for name in names}
    assert named <= set(options())
    assert {section for taken in _TAKEN.values() for section in taken} == set(RunConfig.model_fields)


@pytest.mark.parametrize("command", get_args(Role))
def test_help_shows_what_the_command_takes_and_nothing_else(
    command: Role, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = help_of(command, capsys, monkeypatch)
    shown = {word.removeprefix("--") for word in said.split() if word.startswith("--") and "." in word}
    examples = {word.removeprefix("--") for word in said.split("examples:")[1].split() if word.startswith("--")}
    taken = {f"{section}.{name}" for section, name in options() if takes(command, section, name)}
    assert shown == taken and {name for name in examples if "." in name} <= taken
    for section in RunConfig.model_fields:
        assert (f"\n{section} options:\n" in said) == (section != "seed" and takes_section(command, section))


def test_the_help_of_a_server_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert help_of("teacher", capsys, monkeypatch).count("\n") < 150
    assert help_of("rollout", capsys, monkeypatch).count("\n") < 150


@pytest.mark.parametrize("words", [["--loss.gamma", "0.5"], ["--loss.gamma=0.5"], ["run.toml", "--loss.gamma", "0.5"]])
def test_an_option_of_another_role_is_refused_with_the_commands_that_take_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "teacher", *words)
    assert "--loss.gamma is an option of `distillserve up` and `distillserve train`" in said
    assert "leave it out of `distillserve teacher`" in said and "0.5" not in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["teacher", "--loss", '{"gamma": 1}'], "--loss is an option of `distillserve up` and `distillserve train`"),
        (
            ["teacher", "--rollout", '{"dtype": "bfloat16"}'],
            "--rollout.dtype is an option of `distillserve up`, `distillserve rollout` and `distillserve train`",
        ),
        (["rollout", "--seed", "1"], "--seed is an option of `distillserve up` and `distillserve train`"),
        (["rollout", "--teacher.model", "m"], "`distillserve up`, `distillserve teacher` and `distillserve train`"),
        (["train", "--rollout.engine_args", "[]"], "--rollout.engine_args is an option of `distillserve up`"),
        (["teacher", "--lose.gamma", "1"], "--lose.gamma is not an option; did you mean --loss.gamma?"),
    ],
)
def test_what_a_command_does_not_take_is_refused_however_it_is_given(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, *words)


@pytest.mark.parametrize(("old", "new"), NEW_NAMES.items())
def test_a_moved_option_is_refused_with_its_new_name(
    old: str, new: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section, name = old.split(".")
    run_file.write_text(f"[{section}]\n{name} = 20\n")
    for command in get_args(Role):
        assert f"{old} is now {new}\n" in refused(capsys, command, str(run_file))
        others = "" if command in ("up", "train") else ", an option of `distillserve up` and `distillserve train`"
        assert f"--{old} is now --{new}{others}\n" in refused(capsys, command, f"--{old}", "20")
        assert f"{old} is now {new}\n" in refused(capsys, command, f"--{section}", f'{{"{name}": 20}}')
    assert name not in names_in(section)


def test_the_moved_options_are_those_of_the_clients() -> None:
    both = {"urls", "startup_timeout_s", "request_timeout_s", "outage_s"}
    of_teachers = both | {"protocol", "named", "accept_different"}
    expected = {f"rollout.{name}" for name in both} | {f"teacher.{name}" for name in of_teachers}
    assert set(NEW_NAMES) == expected
    assert {tuple(new.split(".")) for new in NEW_NAMES.values()} <= set(options())


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("rollout", "student.model = 'm'"),
        ("teacher", "teacher.model = 'm'"),
        ("train", "student.model = 'm'\ndata.path = 'd'\npipeline.steps = 1"),
    ],
)
def test_a_role_needs_no_option_of_the_others(
    command: Role, content: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(content)
    RunConfig.model_validate(resolved(capsys, command, str(run_file))).require(command)


@pytest.mark.parametrize(
    ("command", "faults"),
    [
        (
            "teacher",
            "loss.gamma = 7\nloss.bogus = 1\noptimizer = 3\ndata.shuffle = 'x'\nrollout.dtype = 'half'\nseed = -1\n"
            "student.model = 5\nrollout_client.urls = ['nowhere']\nsampling.max_new_tokens = 0",
        ),
        (
            "rollout",
            "loss.gamma = 7\npipeline.steps = 'x'\nteacher.port = 0\nstudent.dtype = 'half'\ndata.shuffle = 'x'\n"
            "teacher_client.outage_s = -1\nweight_sync.lease_s = 0",
        ),
        ("train", "rollout.engine_args = 5\nrollout.kv_cache_gib = -1\nteacher.max_body_mib = 0"),
    ],
)
def test_what_is_wrong_for_another_role_in_a_run_file_does_not_stop_this_one(
    command: str, faults: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(faults)
    found = resolved(capsys, command, str(run_file))
    assert (found["loss"]["gamma"], found["teacher"]["port"], found["rollout"]["engine_args"]) == (0.0, 8101, [])
    assert refused(capsys, "up", str(run_file), "--dry-run")


@pytest.mark.parametrize(
    ("command", "fault", "expected"),
    [
        ("teacher", "teacher.port = 0", "teacher.port: "),
        ("teacher", "teacher.bogus = 1", "teacher.bogus is not an option"),
        ("teacher", "bogus.port = 1", "bogus is not an option"),
        ("teacher", "student.cuda_devices = 'first'", "student.cuda_devices = 'first'"),
        ("rollout", "evaluation.max_new_tokens = 0", "evaluation.max_new_tokens: "),
        ("rollout", "student = 3", "student: "),
        ("train", "teacher.bogus = 1", "teacher.bogus is not an option"),  # who knows for whom it was meant
        ("train", "rollout.port = 0", "rollout.port: "),
    ],
)
def test_what_is_wrong_for_the_role_itself_stops_it(
    command: str, fault: str, expected: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(fault)
    assert expected in refused(capsys, command, str(run_file), "--dry-run")


@pytest.mark.parametrize(
    ("words", "contradicted_by"),
    [
        (["teacher", "--teacher.max_top_k", "8"], {"loss": {"top_k": 32}}),
        (["teacher", "--teacher.port", "8100"], {"rollout": {"port": 8100}}),
        (["rollout", "--rollout.port", "8101"], {"teacher": {"port": 8101}}),
        (["rollout", "--weight_sync.backend", "gloo"], {"weight_sync": {"master_address": "::"}}),
        (["teacher", "--teacher.dtype", "bfloat16"], {"rollout": {"host": "fe80::1%eth0"}}),
        (["rollout", "--rollout.dtype", "bfloat16"], {"teacher": {"tensor_parallel_size": 2}}),
        (["train", "--rollout.dtype", "bfloat16"], {"teacher": {"engine_args": {"seed": 1}}}),
    ],
)
def test_a_contradiction_stops_only_who_minds_it(
    words: list[str], contradicted_by: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *option = words
    path = tmp_path / "run.json"
    path.write_text(json.dumps(contradicted_by))
    assert resolved(capsys, command, str(path), *option)
    assert refused(capsys, "up", str(path), *option, "--dry-run")


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (["rollout", "--rollout.max_model_len", "64"], "sampling.max_new_tokens = 64", "rollout.max_model_len = 64"),
        (["rollout", "--weight_sync.backend", "nccl"], "{student,rollout}.cuda_devices = '0'", "nccl cannot connect"),
        (["train", "--loss.top_k", "16"], "teacher.max_top_k = 8", "teacher.max_top_k = 8"),
        (["train", "--sampling.max_new_tokens", "64"], "rollout.max_model_len = 64", "rollout.max_model_len = 64"),
    ],
)
def test_a_contradiction_between_command_line_and_run_file_stops_who_minds_it(
    words: list[str], content: str, expected: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *option = words
    both = [content.replace("{student,rollout}", name) for name in ("student", "rollout")]
    run_file.write_text("\n".join(dict.fromkeys(both)))
    assert expected in refused(capsys, command, str(run_file), *option, "--dry-run")


@pytest.mark.parametrize("command", SERVERS)
def test_a_server_reads_from_the_file_what_the_others_take_of_its_gpu(
    command: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, dict[str, Any]] = {
        "student": {"model": "s", "gradient_checkpointing": False, "dtype": "bfloat16"},
        "rollout": {"max_num_seqs": 7, "dtype": "bfloat16"},
        "rollout_client": {"urls": ["http://a:1"]},
        "teacher": {"model": "t", "tokens_per_forward": 77},
        "teacher_client": {"urls": ["http://b:1"]},
        "data": {"path": "d", "max_prompt_tokens": 9},
        "sampling": {"max_new_tokens": 5},
        "pipeline": {"prompts_per_step": 3, "tokens_per_micro_batch": 11},
    }
    path = run_file.with_suffix(".json")
    path.write_text(json.dumps(given))
    found = resolved(capsys, command, str(path))
    assert {name: {option: found[name][option] for option in section} for name, section in given.items()} == given
