"""The pages on the Python interface say of it what is there."""

import inspect
import re
from pathlib import Path

from trainer import DistillationTrainer
from trainer.callbacks.callback import EVENTS
from trainer.callbacks.transformers_callbacks import _KNOWN

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_names_every_argument_and_method() -> None:
    page = (DOCS / "python-api.md").read_text()
    arguments = list(inspect.signature(DistillationTrainer.__init__).parameters)[1:]
    methods = [name for name, _ in inspect.getmembers(DistillationTrainer, inspect.isfunction) if name[0] != "_"]
    rows = " ".join(re.findall(r"^\|([^|]*)\|", page, re.M))
    assert [name for name in arguments if f"`{name}`" not in rows] == []
    assert [name for name in methods if f"`{name}(" not in rows] == []


def test_the_page_names_every_event() -> None:
    page = (DOCS / "python-api.md").read_text()
    assert [event for event in (*EVENTS, *_KNOWN) if f"`{event}`" not in page] == []


def test_every_block_of_python_compiles() -> None:
    for page in ("python-api.md", "from-trl.md"):
        for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            compile(block, page, "exec")
