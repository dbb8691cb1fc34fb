"""Bad rows are named by number and reason, and never reach a training step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from services.config import DataConfig
from services.errors import DataError
from trainer.prompts import Prompt, read_prompts
from trainer.stream import RowStream
from trainer.tiny_pair import build_tokenizer

TOKENIZER = build_tokenizer()
MAX_TOKENS = 20


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def load(path: str, **options: object) -> list[Prompt]:
    return read_prompts(path, DataConfig(path=path, **options), TOKENIZER).fitting(MAX_TOKENS)  # type: ignore[arg-type]


BAD_ROWS = [
    ('{"text": "hello"}', "neither `prompt` nor `messages`"),
    ('{"prompt": ""}', "non-empty text"),
    ('{"prompt": null}', "non-empty text, got None"),
    ('{"prompt": 7}', "non-empty text, got 7"),
    ('{"prompt": "ok"', "invalid JSON"),
    ('["prompt"]', "expected a JSON object, got list"),
    ("{'prompt': 'ok'}", "invalid JSON"),
    (json.dumps({"prompt": "x" * 21}), "21 tokens, more than the 20"),
    ('{"messages": []}', "`messages` must be a non-empty list"),
    ('{"messages": "hi"}', "`messages` must be a non-empty list"),
    ('{"messages": [{"role": "user"}]}', "`messages` must be a non-empty list"),
    ('{"messages": [{"role": "user", "content": 3}]}', "`messages` must be a non-empty list"),
    ('{"prompt": "ok", "answer": [1]}', "`answer` must be text, got list"),
    ('{"prompt": "ok", "answer": true}', "`answer` must be text, got bool True; put it in quotes"),
    ('{"prompt": "ok", "answer": NaN}', "`answer` must be text, got float nan"),
    ('{"prompt": "ok", "answer": -1e999}', "`answer` must be text, got float -inf"),
    ("[" * 100_000, "invalid JSON"),
    ('{"prompt": "ok", "n": ' + "1" * 5000 + "}", "invalid JSON"),  # more digits than Python converts
    (r'{"prompt": "a\ud800"}', "`prompt` holds half a surrogate pair at 1"),
    (r'{"prompt": "ok", "answer": "\ud800"}', "`answer` holds half a surrogate pair at 0"),
    (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "`messages` holds half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS)
def test_a_bad_row_stops_the_run_with_its_number_and_reason(line: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"prompt": "fine"}', "", line)
    with pytest.raises(DataError) as error:
        load(path)
    assert f"{path}, row 3: " in str(error.value)
    assert reason in str(error.value)
    assert "--data.on_bad_row skip" in str(error.value)


def test_bad_rows_are_skipped_counted_and_named_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "d.jsonl", '{"prompt": "a"}', *(line for line, _ in BAD_ROWS), '{"prompt": "b"}')
    with caplog.at_level(logging.WARNING):
        prompts = load(path, on_bad_row="skip")
    assert [(p.row, p.text) for p in prompts] == [(1, "a"), (len(BAD_ROWS) + 2, "b")]
    assert f"skipped {len(BAD_ROWS)} of {len(BAD_ROWS) + 2} rows (row 2: neither" in caplog.text


def _empty(path: Path) -> None:
    path.touch()


def _blank_lines(path: Path) -> None:
    path.write_text("\n \n")


def _not_utf8(path: Path) -> None:
    path.write_bytes(b'{"prompt": "\xff"}')


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_empty, "no usable row"),
        (_blank_lines, "no usable row"),
        (_not_utf8, "UTF-8"),
        (lambda _: None, "No such file"),
    ],
)
def test_a_file_without_rows_is_refused(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=reason):
        load(str(tmp_path / "d.jsonl"))


def test_a_file_with_bad_rows_only_is_refused_although_they_may_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row"):
        load(write(tmp_path / "d.jsonl", "{}"), on_bad_row="skip")


def test_text_is_tokenized_and_other_columns_ride_along(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"question": "1+1=", "answer": 2, "source": {"page": 3}}')
    (prompt,) = load(path, prompt_column="question")
    assert prompt == Prompt(1, list(b"1+1="), "1+1=", "2", {"source": {"page": 3}})


def test_a_row_names_its_teacher_or_none(tmp_path: Path) -> None:
    rows = ['{"prompt": "p", "tutor": "maths", "n": 1}', '{"prompt": "p", "tutor": null}', '{"prompt": "p"}']
    config = DataConfig(teacher_column="tutor")
    prompts = read_prompts(write(tmp_path / "d.jsonl", *rows), config, TOKENIZER, teachers=["code", "maths"])
    found = [(p.teacher, p.columns) for p in prompts.fitting(MAX_TOKENS)]
    assert found == [("maths", {"n": 1}), (None, {}), (None, {})]


@pytest.mark.parametrize("name", ["physics", "", "Maths", 3, True, ["maths"], {"maths": 1}])
def test_a_row_of_a_teacher_that_the_run_does_not_have_is_bad(
    name: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "d.jsonl", '{"prompt": "p"}', json.dumps({"prompt": "p", "teacher": name}))
    with pytest.raises(DataError) as error:
        read_prompts(path, DataConfig(), TOKENIZER, teachers=["code", "maths"])
    reason = "`teacher` must be null or a name in teacher.named ('code', 'maths'), got "
    assert f"{path}, row 2: {reason}{type(name).__name__} {name!r}; fix the row" in str(error.value)
    skipping = read_prompts(path, DataConfig(on_bad_row="skip"), TOKENIZER, teachers=["code", "maths"])
    assert [p.row for p in skipping.fitting(MAX_TOKENS)] == [1]
    assert f"(row 2: {reason}" in caplog.text


@pytest.mark.parametrize("value", ["physics", 3, {"school": "x"}, None])
def test_without_named_teachers_their_column_is_like_any_other(value: object, tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "d.jsonl", json.dumps({"prompt": "p", "teacher": value})))
    assert (prompt.teacher, prompt.columns) == (None, {"teacher": value})


def test_an_answer_that_is_a_number_is_its_text(tmp_path: Path) -> None:
    answers = ["0", "-1.5", "1" * 400]
    path = write(tmp_path / "d.jsonl", *(f'{{"prompt": "p", "answer": {answer}}}' for answer in answers))
    assert [p.answer for p in load(path)] == answers


def test_messages_go_through_the_chat_template_with_its_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    (prompt,) = load(path)
    assert prompt.text == "<|user|>hi<|assistant|>"
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert len(prompt.token_ids) == 4  # two role tokens and two bytes: special tokens are not spelled out
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if thinking %}!{% endif %}"
    config = DataConfig(chat_template_kwargs={"thinking": True})
    assert read_prompts(path, config, tokenizer).fitting(MAX_TOKENS)[0].text == "hi!"


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    path = write(tmp_path / "d.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(DataError, match="needs a chat template"):
        read_prompts(path, DataConfig(), tokenizer).fitting(MAX_TOKENS)


REFUSING_TEMPLATES = [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[0].name.upper() }}", "has no attribute 'name'"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
    ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError"),
]


@pytest.mark.parametrize(("template", "reason"), REFUSING_TEMPLATES)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_messages_that_a_chat_template_refuses_are_a_bad_row(
    on_bad_row: str, template: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    path = write(tmp_path / "d.jsonl", '{"prompt": "fine"}', '{"messages": [{"role": "user", "content": "hi"}]}')
    config = DataConfig(on_bad_row=on_bad_row)  # type: ignore[arg-type]
    if on_bad_row == "stop":
        with pytest.raises(DataError, match=f"row 2: the chat template refuses `messages`: .*{reason}"):
            read_prompts(path, config, tokenizer).fitting(MAX_TOKENS)
    else:
        assert [p.row for p in read_prompts(path, config, tokenizer).fitting(MAX_TOKENS)] == [1]
        assert "skipped 1 of 2 rows (row 2: the chat template refuses" in caplog.text


def test_the_tighter_of_both_length_limits_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"prompt": "1234567"}')
    assert len(load(path, max_prompt_tokens=7)[0].token_ids) == 7
    with pytest.raises(DataError, match="7 tokens, more than the 6"):
        load(path, max_prompt_tokens=6)
    with pytest.raises(DataError, match="7 tokens, more than the 5"):
        read_prompts(path, DataConfig(max_prompt_tokens=7), TOKENIZER).fitting(5)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(row, [row], str(row)) for row in range(count)]


def rows(stream: RowStream, count: int) -> list[int]:
    return [p.row for p in stream.take(count)]


def test_every_epoch_holds_every_prompt_once_in_a_new_order() -> None:
    stream = RowStream(numbered(50), seed=3, shuffle=True)
    epochs = [rows(stream, 50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_epochs_and_cutting_changes_no_order() -> None:
    whole, cut = (RowStream(numbered(7), seed=0, shuffle=True) for _ in range(2))
    assert rows(whole, 20) == [row for _ in range(4) for row in rows(cut, 5)]


def test_the_order_follows_from_the_seed() -> None:
    first, same, other = (rows(RowStream(numbered(50), seed=s, shuffle=True), 50) for s in (1, 1, 2))
    assert first == same != other


def test_order_is_the_files_without_shuffling() -> None:
    assert rows(RowStream(numbered(3), seed=0, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_position_continues_where_another_stream_was() -> None:
    stream = RowStream(numbered(10), seed=0, shuffle=True)
    stream.take(13)
    resumed = RowStream(numbered(10), seed=0, shuffle=True)
    resumed.position = stream.position
    assert rows(resumed, 9) == rows(stream, 9)
