"""A conversation as rows and requests hold it, for a chat template."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.strict_json import parse_json
from services.wire.message import WireModel


class ChatMessage(BaseModel):
    """One message of a conversation. Further fields (reasoning_content, name, ...) are the chat template's to read."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, protected_namespaces=())

    role: str
    """What the chat template knows: mostly system, user, assistant, tool."""
    content: str | None = None
    """Text; null or absent beside tool_calls."""
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    """What the assistant calls, as the chat template takes it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content must be text; it may be absent beside tool_calls alone")
        return self

    def for_template(self) -> dict[str, Any]:
        """Its fields; null, with which datasets fill up what a message does not have, is absent."""
        return {name: value for name, value in self if value is not None}


def _parse_tools(tools: Any) -> Any:
    """A list as JSON text is that list: columns of datasets have one type each, the parameters of tools have not."""
    tools = parse_json(tools) if isinstance(tools, str) else tools
    return None if tools == [] else tools


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]
Tools = Annotated[
    Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None,
    BeforeValidator(_parse_tools, json_schema_input_type=list[dict[str, Any]] | str | None),
]


class Conversation(WireModel):
    """What a chat template renders."""

    messages: Messages = Field(min_length=1)
    tools: Tools = None
