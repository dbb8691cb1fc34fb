"""`[lora]`: what does not fit together is refused in a line; and which model `teacher.model = "base"` is."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.config import RunConfig, StudentConfig, TeacherConfig
from tests.unit.services.config.commands import refused, resolved

PATTERN = "lora.target_modules = '(' is no regular expression"


def reason(**sections: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        RunConfig(**sections)
    (problem,) = raised.value.errors()
    return str(problem["msg"])


def test_without_a_rank_there_is_no_adapter() -> None:
    assert not RunConfig().lora.is_on and RunConfig(lora={"r": 16}).lora.is_on


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": []}, "names no modules"),
        ({"target_modules": ""}, "names no modules"),
        ({"target_modules": ["q_proj", ""]}, "names no modules"),
        ({"target_modules": "("}, PATTERN),
        ({"modules_to_save": [""]}, "has an empty name"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "both name 'lm_head'"),
        ({"lora_dropout": 0.1}, "student.disable_dropout = True contradict each other"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "needs an even rank, but lora.r = 3"),
        ({"peft_kwargs": {"r": 3}}, "lora.peft_kwargs.r is refused: lora.r says that"),
        ({"peft_kwargs": {"task_type": "X"}}, "it is set by itself"),
        ({"peft_kwargs": {"target_parameters": ["experts"]}}, "fused parameters"),
        ({"peft_kwargs": {"bogus": 1}}, "what may be passed on is exclude_modules"),
        ({"peft_kwargs": {"layer_replication": [[0, 1]]}}, "what may be passed on is exclude_modules"),
        ({"load_in_4bit": True, "use_dora": True}, "use_dora = True is not supported"),
    ],
)
def test_options_of_an_adapter_that_contradict_each_other(options: dict[str, Any], said: str) -> None:
    found = reason(lora={"r": 8, **options})
    assert said in found and "\n" not in found and "; " in found


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"trainer": {"num_processes": 2}}, "trainer.num_processes = 2: weights of four bits"),
        ({"trainer": {"cpu_offload": True}}, "trainer.cpu_offload = True"),
        ({"student": {"compute_dtype": "bfloat16"}}, "computes in student.dtype = float32"),
    ],
)
def test_four_bits_are_of_one_rank_and_one_dtype(sections: dict[str, Any], said: str) -> None:
    assert said in reason(lora={"r": 8, "load_in_4bit": True}, **sections)


@pytest.mark.parametrize("name", ["lora_alpha", "target_modules", "adapter", "load_in_4bit", "use_dora", "peft_kwargs"])
def test_options_of_an_adapter_that_is_off_are_refused(name: str) -> None:
    values = {"lora_alpha": 3.0, "target_modules": ["x"], "adapter": "x", "peft_kwargs": {"layers_pattern": "h"}}
    assert f"lora.{name} = " in (found := reason(lora={name: values.get(name, True)})) and "lora.r = 0" in found


@pytest.mark.parametrize(
    "options",
    [
        *({"r": value} for value in (-1, 1.5, "x", None, [1], float("nan"))),
        *({"lora_alpha": value} for value in (0, -1, "x", None, float("inf"))),
        *({"lora_dropout": value} for value in (-0.1, 1.0, "x")),
        *({"target_modules": value} for value in (3, None, {"a": 1}, [1])),
        *({"modules_to_save": value} for value in ("lm_head", None, [1])),
        *({"bias": value} for value in ("lora_only", "", None)),
        *({"init_lora_weights": value} for value in ("pissa", "olora", "eva", None, [1])),
        *({"peft_kwargs": value} for value in ("x", None, [1])),
    ],
)
def test_values_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="lora"):
        RunConfig.model_validate({"lora": {"r": 8, **options}})


def test_modules_are_given_as_a_pattern_or_a_list_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def targets(*words: str) -> Any:
        return resolved(capsys, "train", "--lora.r", "8", *words)["lora"]["target_modules"]

    assert targets() == "all-linear"
    assert targets("--lora.target_modules", r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
    assert targets("--lora.target_modules", '["q_proj", "v_proj"]') == ["q_proj", "v_proj"]
    found = resolved(capsys, "train", "--lora.r", "8", "--lora.peft_kwargs", 'exclude_modules=["o_proj"]')["lora"]
    assert found["peft_kwargs"] == {"exclude_modules": ["o_proj"]}
    for given, expected in (("gaussian", "gaussian"), ("false", False), ("true", True)):
        assert resolved(capsys, "train", "--lora.r", "8", "--lora.init_lora_weights", given)["lora"][
            "init_lora_weights"
        ] == (expected)


def test_what_is_trained_is_float32_but_beside_four_bits() -> None:
    dtypes = {"student": {"dtype": "bfloat16"}}
    assert RunConfig(**dtypes).master_dtype() == "bfloat16"
    assert RunConfig(**dtypes, lora={"r": 4}).master_dtype() == "float32"
    quantised = RunConfig(**dtypes, lora={"r": 4, "load_in_4bit": True})
    assert quantised.master_dtype() == quantised.compute_dtype(on_gpu=True) == "bfloat16"
    assert (
        RunConfig(lora={"r": 4, "load_in_4bit": True}, rollout={"dtype": "bfloat16"}).compute_dtype(on_gpu=True)
        == "float32"
    )


# ---------------------------------------------------------------------------------------------- the base as the teacher


def test_the_base_is_the_model_of_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (
        {"student": {"model": "m"}, "teacher": {"model": "base"}},
        {"student": StudentConfig(model="m"), "teacher": TeacherConfig(model="base", dtype="float16")},
    ):
        assert RunConfig(**given).teacher.model == "m"
    run_file = tmp_path / "run.toml"
    run_file.write_text('[student]\nmodel = "m"\n[teacher]\nmodel = "base"\ndtype = "float16"\n')
    found = resolved(capsys, "teacher", str(run_file))["teacher"]
    assert (found["model"], found["dtype"]) == ("m", "float16")
    assert resolved(capsys, "up", str(run_file))["teacher"]["model"] == "m"
    assert resolved(capsys, "train", str(run_file), "--student.model", "other")["teacher"]["model"] == "other"


def test_a_folder_of_the_name_base_is_named_with_a_dot() -> None:
    assert RunConfig(student={"model": "m"}, teacher={"model": "./base"}).teacher.model == "./base"


@pytest.mark.parametrize("student", [{}, {"model": ""}, {"model": None}])
def test_a_base_without_a_student_is_refused(student: dict[str, Any]) -> None:
    assert "teacher.model = base is the model of student.model" in reason(student=student, teacher={"model": "base"})


def test_the_teacher_of_a_command_line_alone_has_no_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the teacher's own folder" in refused(capsys, "teacher", "--teacher.model", "base")


@pytest.mark.parametrize("text", ['"x"', "[1]", "null", "3"])
def test_sections_that_are_none_are_refused_as_before(text: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"teacher": json.loads(text), "student": {"model": "m"}})
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"teacher": {"model": "base"}, "student": json.loads(text)})
