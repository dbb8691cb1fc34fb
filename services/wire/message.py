"""What every message over HTTP has in common: the protocol's version, token ids, and that unknown fields are refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

PROTOCOL_VERSION = 1
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
# A list is given up at its first wrong item: one error object for each of a million items would cost gigabytes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
# Unknown keys that are reported one by one; more are refused as a whole, for the same reason.
_MAX_UNKNOWN_KEYS = 16


class WireModel(BaseModel):
    """Base of everything that arrives over HTTP: unknown fields are refused, not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, data: Any) -> Any:
        limit = len(cls.model_fields) + _MAX_UNKNOWN_KEYS
        if isinstance(data, dict) and len(data) > limit:
            raise ValueError(f"an object with {len(data)} keys, only {len(cls.model_fields)} are known")
        return data
