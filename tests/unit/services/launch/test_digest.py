"""What of a role's output is shown, and what is told of its end."""

import logging

import pytest

from services import logs
from services.launch.digest import cause, digest, how_it_ended, last_lines, plain


def line(logger: str, level: int, message: str, form: str = "text") -> str:
    record = logging.getLogger(logger).makeRecord(logger, level, "f", 1, message, (), None)
    logs.add_request_id(record)
    return (logs.json_formatter() if form == "json" else logs.TextFormatter()).format(record)


@pytest.mark.parametrize("form", logs.FORMATS)
@pytest.mark.parametrize(
    ("logger", "level", "is_shown"),
    [
        ("trainer.output.progress", logging.INFO, True),
        ("trainer.session", logging.INFO, False),
        ("trainer.session", logging.WARNING, True),
        ("services.clients.replicas", logging.WARNING, True),
        ("services.teacher.api.service", logging.ERROR, True),
        ("trainer.output.progress", logging.DEBUG, False),
        ("transformers.modeling_utils", logging.WARNING, False),
        ("vllm.engine", logging.ERROR, False),
        ("servicesx", logging.ERROR, False),
    ],
)
def test_progress_and_our_own_warnings_are_shown(logger: str, level: int, is_shown: bool, form: str) -> None:
    expected = (level, "step 3: see (a) [b] {c}") if is_shown else None
    assert digest(line(logger, level, "step 3: see (a) [b] {c}", form), has_panel=False) == expected


def test_beside_a_panel_progress_is_not_repeated_but_warnings_are_shown() -> None:
    assert digest(line("trainer.output.progress", logging.INFO, "step 3"), has_panel=True) is None
    assert digest(line("trainer.output.progress", logging.WARNING, "slow"), has_panel=True) == (logging.WARNING, "slow")


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last):",
        "(EngineCore pid=7) WARNING 11-27 01:02:03 [core.py:9] something",
        "WARNING services.x: no time before it",
        '{"level": "WARNING"}',
        '{"level": "LOUD", "logger": "services.x", "message": "m"}',
        '{"level": "WARNING", "logger": null, "message": "of another program"}',
        '{"level": ["WARNING"], "logger": "services.x", "message": "m"}',
        '{"a":' * 100_000,
        "{not json",
        "[1, 2]",
        "",
    ],
)
def test_what_is_no_log_line_of_ours_is_not_shown(text: str) -> None:
    assert digest(text, has_panel=False) is None


WORKER, CORE = "(Worker pid=11) ERROR 11-27 02:00:00 [x.py:9] ", "(EngineCore pid=9) ERROR 11-27 02:00:01 [core.py:13] "
VLLM_END = [
    f"{WORKER}WorkerProc failed to start.",
    f"{WORKER}Traceback (most recent call last):",
    f'{WORKER}  File "x.py", line 3, in load',
    f"{WORKER}ValueError: 96 heads do not divide by 5",
    f"{CORE}Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace",
    "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace",
    "(APIServer pid=7) Traceback (most recent call last):",
    '(APIServer pid=7)   File "y.py", line 4, in start',
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (["02:00:00 INFO trainer.session: x", "distillserve: cannot read a.jsonl", "bye"], "cannot read a.jsonl"),
        (["KeyError: 'a'", "distillserve: port taken"], "port taken"),
        (VLLM_END, "ValueError: 96 heads do not divide by 5"),
        (["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory.", ""],
         "torch.OutOfMemoryError: CUDA out of memory."),
        (["Traceback (most recent call last):", "KeyboardInterrupt"], "KeyboardInterrupt"),
        (["no Error: here in the middle", "all is well"], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_cause_is_the_error_line_or_else_the_last_exception(tail: list[str], expected: str | None) -> None:
    assert cause(tail) == expected


def test_few_lines_are_repeated_where_one_of_them_says_why() -> None:
    lines = [f"line {n}" for n in range(40)]
    assert last_lines(lines) == lines[-12:]
    assert last_lines([*lines, "Loading weights: 100%|####| 24/24 [00:00<00:00]"]) == lines[-12:]
    known = [*lines, "distillserve: because"]
    assert last_lines(known) == known[-4:]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (2, "exited with code 2"),
        (-11, "was ended by SIGSEGV"),
        (-9, "was ended by SIGKILL, which this run did not send"),
    ],
)
def test_an_exit_code_is_told_in_words(code: int, expected: str) -> None:
    assert how_it_ended(code).startswith(expected)


def test_colours_do_not_hide_the_cause() -> None:
    assert cause(["\x1b[0;36m(EngineCore pid=9)\x1b[0;0m ValueError: too big"]) == "ValueError: too big"


def test_the_rank_that_torch_puts_before_a_traceback_does_not_hide_the_cause() -> None:
    tail = ["[rank1]: Traceback (most recent call last):", "[rank1]: torch.cuda.OutOfMemoryError: CUDA out of memory."]
    assert cause(tail) == "torch.cuda.OutOfMemoryError: CUDA out of memory."


def test_what_is_shown_does_nothing_to_a_terminal_but_appear() -> None:
    assert plain("\x1b[2J\x1b[31mnaïve\x1b[0m\x07\ta\nb\x0e") == "naïve a b "


def test_a_last_line_without_an_end_does_not_fill_the_screen() -> None:
    (shown,) = last_lines(["y" * 100_000])
    assert len(shown) < 500 and shown.endswith("y ...")


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert how_it_ended(-40) == "was ended by signal 40"
