"""`[lora]`: train an adapter instead of all weights; fields are named as in peft's LoraConfig."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from services.config.section import Section


class LoraConfig(Section):
    """A LoRA adapter (peft): the student's own weights stay as they are, and low-rank matrices beside them are trained."""

    r: int = Field(0, ge=0)
    """Rank of the adapter's matrices; 0: no adapter, all weights are trained."""
    lora_alpha: int = Field(32, ge=1)
    """What an adapter adds is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before an adapter; needs student.disable_dropout = false."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: "all-linear" (all but the output head), a regular expression that matches whole names, or a
    JSON list of names or endings of names."""
    modules_to_save: list[str] = []
    """Modules that are trained whole and saved with the adapter, as a JSON list of names."""
    bias: Literal["none", "all"] = "none"
    """Which biases are trained as well."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """DoRA: a trained length for each row of an adapted weight beside its low-rank change."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How an adapter begins. true: without effect, A as a linear layer begins and B zero; "gaussian": A from a normal
    distribution and B zero; "orthogonal", and false (random): with an effect from the first push on."""
    peft_kwargs: dict[str, Any] = {}
    """Further fields of peft's LoraConfig, as JSON: exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
    alpha_pattern."""
    adapter: str | None = None
    """Folder of a saved adapter to go on from, e.g. "outputs/run/student/adapter"; student.model stays its base, and r,
    lora_alpha and the modules are to be those that it was trained with."""
    load_in_4bit: bool = False
    """QLoRA: keep the student's own linear weights in four bits (NF4, bitsandbytes); on one rank only."""

    @field_validator("target_modules")
    @classmethod
    def _pattern_alone(cls, given: str | list[str]) -> str | list[str]:
        """The command line makes a list of one text; what is no name in it is a pattern."""
        is_pattern = len(given) == 1 and (given[0] == "all-linear" or not re.fullmatch(r"[\w.-]*", given[0]))
        return given[0] if isinstance(given, list) and is_pattern else given

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained instead of all weights."""
        return self.r > 0
