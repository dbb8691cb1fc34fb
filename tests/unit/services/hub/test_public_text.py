"""What is published of what a user typed: no folder of the machine, no key, no markup."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hub.public_text import code_span, is_hub_id, public_name, public_text, public_value, toml_value

KEYS = [
    "hf_abcdefghijklmnopqrstuvwxyz",
    "sk-proj-abcdefghijklmnop",
    "ghp_abcdefghijklmnopqrst",
    "github_pat_11ABCDEFG0abcdefghij",
    "glpat-abcdefghijklmnop",
    "xoxb-123456789012-abcdef",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/home/me/models/my student", "my student"),
        ("./student", "student"),
        ("../a/b/", "b"),
        ("~/models/x", "x"),
        ("outputs/pair/student", "student"),
        ("https://me:secret@example.com/data.jsonl", "https://...@example.com/data.jsonl"),
        ("https://example.com/data.jsonl?token=abc#frag", "https://example.com/data.jsonl?..."),
        ("rewards/maths.py:score", "maths.py:score"),
        ("a\nb\x00c\u202ed", "a b c d"),
        ("模型/é", "é"),
        ("\ud800x", "?x"),
        ("", ""),
    ],
)
def test_a_path_is_its_last_name_and_a_hub_id_is_itself(name: str, expected: str) -> None:
    assert public_name(name) == expected


def test_a_folder_that_is_called_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "student").mkdir(parents=True)
    assert is_hub_id("models/student")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/student") and public_name("models/student") == "student"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("text", ["{}", "key={} end", "Bearer {}", "https://x.com/{}/y", '"{}"'])
def test_no_key_is_in_a_text(key: str, text: str) -> None:
    assert key not in public_text(text.format(key)) and "..." in public_text(text.format(key))


@pytest.mark.parametrize("text", ["no /home/me/secret/file.txt here", "'/srv/a b/c'", "file:///srv/x/y", "(~me/x/y)"])
def test_no_folder_is_in_a_text(text: str) -> None:
    public = public_text(text)
    assert not any(folder in public for folder in ("home", "secret", "srv", "~me", "x/"))


def test_ordinary_words_stay_as_they_are() -> None:
    text = "a/b ratio 1/2, and/or; task_id sk-1 https://example.com/a/b"
    assert public_text(text) == text


def test_everything_in_a_value_is_public() -> None:
    value = {"/etc/secret/a.jsonl": [1, None, True, {"x": "/home/me/b.jsonl"}]}
    assert public_value(value) == {"a.jsonl": [1, None, True, {"x": "b.jsonl"}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b", "`a\\|b`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("", "` `"), ("<b>", "`<b>`")],
)
def test_a_code_span_holds_any_text(text: str, expected: str) -> None:
    assert code_span(text) == expected


values = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=6,
)


@given(values)
def test_toml_of_a_public_value_is_read_back_as_it_is(value: object) -> None:
    public = public_value(value)
    assert tomllib.loads(f"x = {toml_value(public)}")["x"] == public
