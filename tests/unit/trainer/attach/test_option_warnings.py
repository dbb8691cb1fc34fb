"""What a run says at its start of options that seldom do what was wanted."""

import pytest

from services.config import RunConfig
from trainer.attach.option_warnings import warn_of_options


def warnings(caplog: pytest.LogCaptureFixture, **sections: dict[str, object]) -> list[str]:
    caplog.clear()
    warn_of_options(RunConfig.model_validate(sections))
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def test_the_defaults_need_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog) == []


def test_bfloat16_master_weights_are_warned_of_with_the_figures(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warnings(caplog, student={"dtype": "bfloat16"})
    for text in (
        "student.dtype = bfloat16",
        "3 % of the weights move at optimizer.learning_rate = 1e-5",
        "0.4 % at 1e-6",
    ):
        assert text in line


@pytest.mark.parametrize(
    ("beta", "said"),
    [
        (0.0, None),
        (0.01, "0.0099 of that of forward_kl"),
        (0.099, "forward_kl"),
        (0.1, None),
        (0.5, None),
        (0.9, None),
        (0.901, "reverse_kl"),
        (0.99, "0.0099 of that of reverse_kl"),
        (1.0, None),
    ],
)
def test_a_jsd_near_an_end_is_warned_of(beta: float, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    found = warnings(caplog, loss={"single_step_divergence": "jsd", "jsd_beta": beta})
    if said is None:
        assert found == []
    else:
        assert len(found) == 1 and said in found[0] and f"loss.jsd_beta = {beta}" in found[0]


def test_a_frozen_base_in_bfloat16_loses_no_steps(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog, student={"dtype": "bfloat16"}, lora={"r": 4}) == []


@pytest.mark.parametrize(("teacher", "said"), [("base", 1), ("m", 1), ("other", 0), (None, 0)])
def test_a_teacher_of_the_students_own_model_is_said_to_be_a_second_copy(
    teacher: str | None, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    warn_of_options(RunConfig.model_validate({"student": {"model": "m"}, "teacher": {"model": teacher}}))
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == said
    assert all("m: its server is a process of its own and holds a second copy of it" in line for line in found)
