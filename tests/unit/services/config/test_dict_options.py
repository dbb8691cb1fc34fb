"""Options that are tables, on the command line."""

import pytest

from services.config import RunConfig
from services.config.dict_options import names_of_tables
from tests.unit.services.config.commands import assert_refused, resolved

REFUSED = {
    "--data.chat_template_kwargs [1]": "data.chat_template_kwargs ... JSON",
    "--data.chat_template_kwargs style=short": (
        "data.chat_template_kwargs.style = 'short' is no JSON ... a text in quotes ... 'style=\"short\"'"
    ),
    "--data.chat_template_kwargs x=NaN": "data.chat_template_kwargs.x = 'NaN' is no JSON",
    "--data.chat_template_kwargs x=1z": "data.chat_template_kwargs.x ... is no JSON",
    "--data.chat_template_kwargs x=": "data.chat_template_kwargs.x ... is no JSON",
    "--data.chat_template_kwargs thinking": "data.chat_template_kwargs takes a JSON object or KEY=VALUE",
    '--data.chat_template_kwargs {"a":1': "data.chat_template_kwargs is no JSON object",
    "--data.chat_template_kwargs a=1,a=2": "data.chat_template_kwargs.a is given twice",
    '--data.chat_template_kwargs {"a":1,"a":2}': "data.chat_template_kwargs.a is given twice",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_what_is_no_json_is_refused_with_its_key(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(options, expected, capsys)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["enable_thinking=false"], {"enable_thinking": False}),
        (["a=1", 'b="x,y=z"', "c=null"], {"a": 1, "b": "x,y=z", "c": None}),
        (['a=[1, {"b": "]"}], "c" = 2.5 ,d={"e": {}}'], {"a": [1, {"b": "]"}], "c": 2.5, "d": {"e": {}}}),
        (['{"a": "x\\\\", "b": {"c": "é"}}', "d=true"], {"a": "x\\", "b": {"c": "é"}, "d": True}),
        (['a="False alarm"'], {"a": "False alarm"}),
        (["{}"], {}),
    ],
)
def test_tables_on_the_command_line_hold_json(
    given: list[str], expected: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for one in given for text in ("--data.chat_template_kwargs", one)]
    found = resolved(capsys, "train", *options)["data"]["chat_template_kwargs"]
    assert found == expected and [type(v) for v in found.values()] == [type(v) for v in expected.values()]


def test_every_table_holds_json(capsys: pytest.CaptureFixture[str]) -> None:
    tables = names_of_tables(RunConfig)
    assert tables == {
        "student.model_init_kwargs",
        "teacher_client.named",
        "teacher.teacher_model_init_kwargs",
        "teacher.engine_args",
        "data.chat_template_kwargs",
        "data.filters",
        "data.more_paths",
        "lora.peft_kwargs",
    }
    # these refuse what the example has
    for name in tables - {"teacher_client.named", "data.more_paths", "lora.peft_kwargs"}:
        engine = ["--teacher.engine", "vllm"] if name == "teacher.engine_args" else []
        section, option = name.split(".")
        found = resolved(capsys, "up", *engine, f"--{name}", "output_attentions=false,n=2")[section][option]
        assert found == {"output_attentions": False, "n": 2}
