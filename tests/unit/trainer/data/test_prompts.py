"""Bad rows are named by number and reason, and never reach a training step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from services.config import DataConfig
from services.errors import DataError
from tests.tokenizers import FAMILIES
from trainer.data.prompts import Prompt, read_prompts
from trainer.data.stream import RowStream
from trainer.data.text_limits import TextLimits
from trainer.tiny.pair import build_tokenizer

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
    ('{"prompt": null}', "neither `prompt` nor `messages` in the row (found: [])"),
    ('{"prompt": null, "messages": null, "n": 1}', "neither `prompt` nor `messages` in the row (found: ['n'])"),
    ('{"prompt": 7}', "`prompt` must be non-empty text or a list of messages, got 7"),
    ('{"prompt": "ok", "messages": [{"role": "user", "content": "hi"}]}', "both `prompt` and `messages` in the row"),
    ('{"prompt": "ok", "messages": []}', "both `prompt` and `messages` in the row"),
    ('{"prompt": "ok", "prompt": "ko"}', "prompt is given twice in one object"),
    ('{"prompt": "ok", "source": {"page": 1, "page": 2}}', "page is given twice in one object"),
    ('{"prompt": "ok", "score": Infinity}', "Infinity is no JSON number"),
    ('{"prompt": "ok"', "invalid JSON"),
    ('["prompt"]', "expected a JSON object, got list"),
    ("{'prompt': 'ok'}", "invalid JSON"),
    (json.dumps({"prompt": "x" * 21}), "21 tokens, more than the 20"),
    ('{"messages": []}', "`messages`: List should have at least 1 item"),
    ('{"prompt": []}', "`prompt`: List should have at least 1 item"),
    ('{"messages": "hi"}', "`messages`: Input should be a valid list"),
    ('{"messages": ["hi"]}', "`messages.0`: Input should be a valid dictionary"),
    ('{"messages": [{"role": "user"}]}', "`messages.0`: content must be text"),
    ('{"messages": [{"role": "user", "content": null, "tool_calls": []}]}', "`messages.0`: content must be text"),
    ('{"messages": [{"role": "user", "content": 3}]}', "`messages.0.content`: Input should be a valid string (got 3)"),
    ('{"prompt": [{"role": "user", "content": 3}]}', "`prompt.0.content`: Input should be a valid string (got 3)"),
    ('{"messages": [{"content": "hi"}]}', "`messages.0.role`: Field required"),
    ('{"messages": [{"role": "user", "content": "hi"}], "tools": [1]}', "`tools.0`: Input should be a valid dict"),
    ('{"messages": [{"role": "user", "content": "hi"}], "tools": {"a": 1}}', "`tools`: Input should be a valid list"),
    ('{"messages": [{"role": "user", "content": "hi"}], "tools": "{"}', "`tools`: Expecting property name"),
    (
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}',
        "`messages` ends with the assistant, whose turn is the student's to write; leave that message out or pass "
        "--data.last_assistant_turn drop",
    ),
    ('{"prompt": [{"role": "assistant", "content": "yo"}]}', "`prompt` ends with the assistant"),
    ('{"prompt": "ok", "answer": [1]}', "`answer` must be text, got list"),
    ('{"prompt": "ok", "answer": 18.0}', "`answer` must be text, got float 18.0; put it in quotes"),
    ('{"prompt": "ok", "answer": 1e3}', "`answer` must be text, got float 1000.0; put it in quotes"),
    ('{"prompt": "ok", "answer": true}', "`answer` must be text, got bool True; put it in quotes"),
    ('{"prompt": "ok", "answer": NaN}', "NaN is no JSON number"),
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
    assert prompt == Prompt(1, list(b"1+1="), "1+1=", "2", {"source": {"page": 3}}, answer_token_ids=list(b"2"))


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
    reason = "`teacher` must be null or a name in teacher_client.named ('code', 'maths'), got "
    assert f"{path}, row 2: {reason}{type(name).__name__} {name!r}; fix the row" in str(error.value)
    skipping = read_prompts(path, DataConfig(on_bad_row="skip"), TOKENIZER, teachers=["code", "maths"])
    assert [p.row for p in skipping.fitting(MAX_TOKENS)] == [1]
    assert f"(row 2: {reason}" in caplog.text


@pytest.mark.parametrize("value", ["physics", 3, {"school": "x"}, None])
def test_without_named_teachers_their_column_is_like_any_other(value: object, tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "d.jsonl", json.dumps({"prompt": "p", "teacher": value})))
    assert (prompt.teacher, prompt.columns) == (None, {"teacher": value})


def test_an_answer_that_is_a_whole_number_is_its_text(tmp_path: Path) -> None:
    answers = ["0", "-15", "1" * 400]
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


def user(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def write_rows(path: Path, *rows: dict[str, object]) -> str:
    return write(path, *map(json.dumps, rows))


def test_a_prompt_may_be_a_list_of_messages_and_the_messages_have_a_column_of_any_name(tmp_path: Path) -> None:
    rows = {"prompt": [user("a")]}, {"prompt": [user("b")], "chat": None}, {"prompt": None, "chat": [user("c")]}
    path = write_rows(
        tmp_path / "d.jsonl", *rows, {"prompt": "d", "chat": None, "messages": [user("x")], "answer": None}
    )
    prompts = load(path, messages_column="chat")
    assert [p.text for p in prompts] == [f"<|user|>{name}<|assistant|>" for name in "abc"] + ["d"]
    assert [p.columns for p in prompts] == [{}, {}, {}, {"messages": [user("x")]}]
    assert [p.answer for p in prompts] == [None] * 4


def test_the_last_turns_of_the_assistant_are_dropped_when_asked(tmp_path: Path) -> None:
    first = {"messages": [user("a"), assistant("b"), user("c"), assistant("d"), assistant("e")], "answer": "d"}
    path = write_rows(tmp_path / "d.jsonl", first, {"prompt": [user("f"), assistant("g")]}, {"prompt": [user("h")]})
    with pytest.raises(
        DataError, match=r"row 1: `messages` ends with the assistant.* --data\.last_assistant_turn drop"
    ):
        load(path)
    prompts = load(path, last_assistant_turn="drop")
    assert [p.text for p in prompts] == [
        "<|user|>a<|assistant|>b<|endoftext|><|user|>c<|assistant|>",
        "<|user|>f<|assistant|>",
        "<|user|>h<|assistant|>",
    ]
    alone = write_rows(tmp_path / "e.jsonl", {"messages": [assistant("a"), assistant("b")]})
    with pytest.raises(DataError, match="row 1: `messages` holds messages of the assistant alone"):
        load(alone, last_assistant_turn="drop")


def test_a_template_that_goes_on_with_the_last_message_gets_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"messages": [user("a"), assistant("It is ")]})
    (prompt,) = load(path, chat_template_kwargs={"continue_final_message": True})
    assert prompt.text == "<|user|>a<|assistant|>It is "


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": None}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": None}}}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_further_fields_of_messages_reach_the_template_and_nulls_do_not(
    tools: object, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    filled = {"content": None, "tool_calls": None, "tool_call_id": None, "name": None}
    messages = [
        {**filled, "role": "user", "content": "2+3"},
        {**filled, "role": "assistant", "tool_calls": [CALL], "reasoning_content": "sum"},
        {**filled, "role": "tool", "content": "5", "tool_call_id": "t1", "name": "add"},
    ]
    path = write_rows(tmp_path / "d.jsonl", {"messages": messages, "tools": tools, "n": 1})
    (prompt,) = read_prompts(path, DataConfig(), tokenizer).fitting(10_000)
    seen = [json.loads(line) for line in prompt.text.replace("]{", "]\n{").replace("}{", "}\n{").splitlines()]
    assert seen == [
        TOOLS,
        {"role": "user", "content": "2+3"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "sum"},
        {"role": "tool", "content": "5", "tool_call_id": "t1", "name": "add"},
    ]
    assert prompt.columns == {"n": 1}


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_no_tools_are_none_to_a_template(tools: object, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if tools is not none %}tools{% endif %}"
    path = write_rows(tmp_path / "d.jsonl", {"messages": [user("hi")], "tools": tools})
    assert read_prompts(path, DataConfig(), tokenizer).fitting(MAX_TOKENS)[0].text == "hi"


def test_tools_beside_a_text_are_a_column_like_any_other(tmp_path: Path) -> None:
    (prompt,) = load(write_rows(tmp_path / "d.jsonl", {"prompt": "p", "tools": "hammer"}))
    assert (prompt.text, prompt.columns) == ("p", {"tools": "hammer"})


def test_a_bom_is_no_text_and_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt":\r"b"}\n\r\n{"prompt": "c"}\r\n')
    assert [(p.row, p.text) for p in load(str(tmp_path / "d.jsonl"))] == [(1, "a"), (2, "b"), (4, "c")]


class Untouchable:
    """A tokenizer that a text must not reach."""

    chat_template = build_tokenizer().chat_template
    apply_chat_template = build_tokenizer().apply_chat_template
    get_vocab = build_tokenizer().get_vocab  # its longest token has 13 characters

    def __call__(self, *_: object, **__: object) -> None:
        raise AssertionError("tokenised")


@pytest.mark.parametrize("row", [{"prompt": "x" * 131}, {"messages": [user("x" * 131)]}])
def test_a_row_that_cannot_fit_is_bad_before_it_is_tokenised(row: dict[str, object], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", row)
    reason = r"row 1: the prompt has \d+ characters, at most 130 can be 10 tokens"
    for config, limits in [
        (DataConfig(), TextLimits(max_tokens=10)),
        (DataConfig(max_prompt_tokens=10), TextLimits(max_tokens=99)),
        (DataConfig(max_prompt_tokens=10), TextLimits()),
    ]:
        with pytest.raises(DataError, match=reason):
            read_prompts(path, config, Untouchable(), limits=limits)  # type: ignore[arg-type]


def test_a_text_of_megabytes_is_not_tokenised_even_if_nothing_is_known_of_the_student(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"prompt": "x" * 4_000_001})
    with pytest.raises(DataError, match="the prompt has 4000001 characters, more than 4000000; cut it into rows"):
        read_prompts(path, DataConfig(), Untouchable())  # type: ignore[arg-type]


def test_an_answer_is_bounded_by_the_student_alone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"prompt": "p", "answer": "x" * 131})
    read_prompts(path, DataConfig(max_prompt_tokens=1), TOKENIZER, limits=TextLimits(max_tokens=200))
    with pytest.raises(DataError, match="row 1: the answer has 131 characters, at most 130 can be 10 tokens"):
        read_prompts(path, DataConfig(), TOKENIZER, limits=TextLimits(max_tokens=10))


BEYOND = [{"prompt": "p<|user|>"}, {"prompt": "p", "answer": "<|user|>"}, {"messages": [user("p")]}]


@pytest.mark.parametrize("row", BEYOND)
def test_an_id_beyond_the_students_embedding_is_a_bad_row(row: dict[str, object], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"prompt": "fine", "answer": "good"}, row)
    role = TOKENIZER.convert_tokens_to_ids("<|user|>")
    read_prompts(path, DataConfig(), TOKENIZER, limits=TextLimits(vocab_size=262))
    small = TextLimits(vocab_size=role)
    with pytest.raises(
        DataError, match=r"row 2: the (prompt|answer) holds '<\|\w+\|>', token id \d+, beyond the \d+ rows"
    ):
        read_prompts(path, DataConfig(), TOKENIZER, limits=small)
    skipping = read_prompts(path, DataConfig(on_bad_row="skip"), TOKENIZER, limits=small)
    assert list(skipping.skipped) == [2] and len(skipping.prompts) == 1


def test_an_answer_that_cannot_be_told_from_its_prompt_is_a_bad_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"prompt": "what is 中", "answer": "文"})  # one <unk> for both
    with pytest.raises(DataError, match=r"row 1: the tokenizer cannot tell '文' from the prompt.*; fix the row"):
        read_prompts(path, DataConfig(), FAMILIES["t5"]())


@pytest.mark.parametrize("answer", ["132", " 132\n", 132])
def test_the_stripped_answer_is_encoded_behind_its_prompt(answer: object, tmp_path: Path) -> None:
    tokenizer = FAMILIES["always"]()
    rows = {"prompt": "47+85=", "answer": answer}, {"messages": [user("47+85=")], "answer": answer}
    prompts = read_prompts(write_rows(tmp_path / "d.jsonl", *rows), DataConfig(), tokenizer).fitting(100)
    assert [tokenizer.convert_ids_to_tokens(p.answer_token_ids) for p in prompts] == [["1", "3", "2"]] * 2
    assert prompts[0].answer == str(answer)


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


@pytest.mark.parametrize("tokenize_at_start", [0, 10])
def test_the_columns_of_all_rows_are_known_before_any_is_used(tokenize_at_start: int, tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a", "answer": "2", "x": 1}',
        '{"prompt": "b", "y": null, "teacher": "maths"}',
        '{"prompt": "c"}',
    ]
    path = write(tmp_path / "d.jsonl", *rows)
    config = DataConfig(path=path, answer_column="answer", tokenize_at_start=tokenize_at_start)
    assert read_prompts(path, config, TOKENIZER, teachers=["maths"]).columns == {"answer", "x", "y", "teacher"}


def test_a_conversation_is_kept_beside_its_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": chat}), json.dumps({"prompt": "hi"}))
    assert [prompt.messages for prompt in load(path)] == [chat, None]
