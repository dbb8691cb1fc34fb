"""JSON that means one thing, or nothing."""

import pytest

from services.strict_json import DuplicateKeyError, JsonError, parse_json, without_bom


@pytest.mark.parametrize("text", ['{"a": [1, -2.5, null, "é"]}', '\r{"a":\r[1, -2.5, null, "é"]}\r\n'])
def test_a_text_and_its_utf8_are_the_same_value(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == {"a": [1, -2.5, None, "é"]}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'])
def test_a_key_that_is_given_twice_is_named(text: str) -> None:
    with pytest.raises(DuplicateKeyError, match=r"^a is given twice in one object; give it once$") as caught:
        parse_json(text)
    assert caught.value.key == "a"


def test_a_long_key_is_not_repeated_in_full() -> None:
    key = "k" * 1000
    with pytest.raises(DuplicateKeyError) as caught:
        parse_json(f'{{"{key}": 1, "{key}": 2}}')
    assert len(str(caught.value)) < 150 and caught.value.key == "k" * 80


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is no JSON number"),
        ("[Infinity]", "Infinity is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "4300 digits"),
        (b'"\xff"', "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
    ],
)
def test_what_is_no_json_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        parse_json(text)


def test_a_bom_is_taken_off_the_front_alone() -> None:
    bom = b"\xef\xbb\xbf"
    assert without_bom(bom + b"a" + bom) == b"a" + bom
    assert without_bom(b"a") == b"a"
