"""What every section of a run file is made of."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.config import addresses

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, AfterValidator(addresses.checked_host)]
"""A name, an IPv4 address, or an IPv6 one with or without brackets."""
Dtype = Literal["float32", "bfloat16", "float16"]
# Padded tokens of a forward pass where there is room.
DEFAULT_TOKENS = 16384
# Positions that the teacher's head projects at once, and completions in flight, likewise.
DEFAULT_HEAD_ROWS, DEFAULT_NUM_SEQS = 1024, 256


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, the docstring under a field is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def refuse_changed(section: Any, prefix: str, names: list[str], reason: str) -> None:
    """Refuse options that differ from their default although they have no effect.

    Raises:
        ValueError: names the first of them, its value and `reason`.
    """
    for name in names:
        value = getattr(section, name)
        if value != type(section).model_fields[name].default:
            shown = list(value) if isinstance(value, dict) else value  # a table may hold a secret
            raise ValueError(f"{prefix}.{name} = {shown} would be ignored: {reason}; leave it out")
