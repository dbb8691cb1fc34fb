"""The page of the teacher's API: complete, readable anywhere, with nothing to fetch."""

import json
import re
import shlex
from html.parser import HTMLParser

import pytest

from services.config import TeacherConfig
from services.teacher.api.docs_page import render
from services.teacher.api.examples import REQUEST_EXAMPLES
from services.teacher.server import create_app


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.blocks: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self._open.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("href", "src", "action")]
        self.ids |= {value or "" for name, value in attributes if name == "id"}
        if tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "pre" in self._open:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def document() -> dict:
    return create_app(TeacherConfig(model="not loaded")).openapi()


@pytest.fixture(scope="module")
def page(document: dict) -> Page:
    return Page(render(document))


def test_it_names_every_route_answer_schema_and_field(page: Page, document: dict) -> None:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path} {operation['summary']}" in page.text
            assert all(status in page.text for status in operation["responses"])
    for name, schema in document["components"]["schemas"].items():
        assert name in page.ids
        for field, what in schema.get("properties", {}).items():
            assert field in page.text
            assert what.get("description", "").replace("`", "") in page.text, field


def test_it_needs_nothing_from_elsewhere_and_no_script(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "form", "object"} & set(page.tags)
    assert "://" not in page.text
    links = {reference for reference in page.references if not reference.startswith("#")}
    assert links == {"openapi.json"}  # relative: right behind every prefix
    assert {reference[1:] for reference in page.references} - {"penapi.json"} <= page.ids


def test_its_examples_are_lines_for_a_shell(page: Page) -> None:
    bodies = []
    for block in page.blocks:
        words = shlex.split(block)
        assert words[:2] == ["curl", "-s"] and re.fullmatch(r"\$TEACHER/[a-z0-9/]+", words[2])
        needs_key = words[2] not in ("$TEACHER/health", "$TEACHER/ready")
        assert ("Authorization: Bearer $KEY" in words) == needs_key
        bodies += [json.loads(words[-1])] if "-d" in words else []
    assert bodies == [example["value"] for example in REQUEST_EXAMPLES.values()]
    assert len(page.blocks) == len(bodies) + 5


def test_what_it_shows_is_text() -> None:
    document = create_app(TeacherConfig(model="not loaded")).openapi() | {
        "info": {"title": "<script>", "description": "a `<b>` & c"}
    }
    html = render(document)
    assert "<script>" not in html and "a <code>&lt;b&gt;</code> &amp; c" in html
