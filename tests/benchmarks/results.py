"""What every benchmark shares: where its figures go, and on which machine they were taken."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def write(name: str, content: dict[str, Any]) -> None:
    """Write results/<name>.json: the content after a description of the machine."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "torch": torch.__version__, **content}, indent=2)
    (FOLDER / f"{name}.json").write_text(text + "\n")
