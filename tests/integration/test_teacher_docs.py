"""The curl lines of docs/teacher-api.md, sent to a real teacher as curl would."""

import argparse
import re
import shlex
from pathlib import Path

import httpx
import pytest

from tests.integration.processes import KEY, server

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "teacher-api.md"


def curl_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [f"curl {line}" for block in blocks for line in block.replace("\\\n", " ").split("curl ")[1:]]


def send(line: str, url: str) -> httpx.Response:
    """What curl does with the few options that the page uses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d")
    parser.add_argument("-o")
    words = shlex.split(line.replace("$DISTILLSERVE_TEACHER_KEY", KEY).replace("$TEACHER", url))
    options = parser.parse_args(words[1:])
    headers = dict(header.split(": ", 1) for header in options.H)
    method = "GET" if options.d is None else "POST"
    return httpx.request(method, options.url, headers=headers, content=options.d, trust_env=False)


def test_every_curl_line_of_the_page_works_and_every_route_has_one(tmp_path: Path, models: dict[str, str]) -> None:
    with server("teacher", tmp_path / "log", "--teacher.model", models["llama"]) as teacher:
        for line in curl_lines():
            answer = send(line, teacher.url)
            assert answer.status_code == 200, f"{line}: {answer.text}"
        with teacher.client() as client:
            routes = set(client.get("/openapi.json").json()["paths"])
    shown = {path for line in curl_lines() for path in re.findall(r"\$TEACHER(\S*)", line)}
    assert routes | {"/openapi.json", "/docs"} == shown
