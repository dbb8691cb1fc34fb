"""The tables of docs/scaling.md, and the same for other models."""

from pathlib import Path

import pytest

from services.config import RunConfig
from services.gpus.cost import report_cost
from services.gpus.memory import GIB
from services.gpus.scaling import main, qwen3
from tests.models import save_model
from tests.unit.services.shapes import QWEN3_0_6B, QWEN3_1_7B

PAGE = Path("docs/scaling.md")


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191), ("14B", 14.768), ("32B", 32.762)],
)
def test_sizes_are_those_of_the_published_models(size: str, billions: float) -> None:
    assert qwen3(size).num_parameters == pytest.approx(billions * 1e9, rel=1e-3)


def test_shapes_are_those_of_other_tests() -> None:
    for size, shape in (("0.6B", QWEN3_0_6B), ("1.7B", QWEN3_1_7B)):
        assert qwen3(size).tensors == shape.tensors and qwen3(size).layer_parameters == shape.layer_parameters


def test_the_page_shows_what_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it does not: put the output of python -m services.gpus.scaling there."""
    assert main([]) == 0
    assert capsys.readouterr().out in PAGE.read_text()


def test_the_page_shows_what_is_logged() -> None:
    config = RunConfig(student={"model": "student"}, rollout={"dtype": "bfloat16"})
    shapes = {"student": qwen3("1.7B")}.get
    lines = report_cost(config, 4, 4, on_gpu=True, available=int(480.2 * GIB), shapes=shapes)
    assert "\n".join(lines) in PAGE.read_text()


def test_other_models_have_tables_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", "qwen3")
    assert main([folder]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith(f"| {folder} |")]
    assert len(rows) == 5 and rows[0].split(" | ")[1:3] == ["one rank: 1", "ddp: 2"]
    assert main([folder, str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"no config.json can be read of {tmp_path / 'nothing'}\n"
