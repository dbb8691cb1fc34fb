"""docs/lora.md names every option, and its run file is one."""

import re
import tomllib
from pathlib import Path

from services.config import LoraConfig, RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "lora.md").read_text()


def test_the_page_names_every_option() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    assert [name for name in LoraConfig.model_fields if f"`{name}`" not in table] == []


def test_its_run_file_trains_an_adapter() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    config = RunConfig.model_validate(tomllib.loads(text))
    assert config.lora.is_on and config.optimizer.learning_rate == 2e-4
