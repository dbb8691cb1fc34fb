"""`distillserve` with a teacher whose engine a test can hold and break: `python -m ... FOLDER teacher --teacher.model M`.

FOLDER/hold     while it exists, forward passes wait; FOLDER/held says that one does
FOLDER/broken   once it exists, forward passes fail
"""

import sys
import time
from pathlib import Path
from typing import Any

from services.cli import main
from services.teacher.jobs import ScoreItem
from services.teacher.transformers.engine import TransformersEngine


def switch(folder: Path) -> None:
    """Put the switches into every engine of this process."""
    really_forward = TransformersEngine.forward

    def forward(self: TransformersEngine, items: list[ScoreItem]) -> None:
        while (folder / "hold").exists():
            (folder / "held").touch()
            time.sleep(0.01)
        if (folder / "broken").exists():
            raise RuntimeError("the device fell off the bus")
        really_forward(self, items)

    engine: Any = TransformersEngine
    engine.forward = forward


if __name__ == "__main__":
    switch(Path(sys.argv[1]))
    main(sys.argv[2:])
