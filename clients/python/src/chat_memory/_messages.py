"""Short ways to write messages. They give the contract's own `Message`, so every other field can
be passed by its name in the proto, or set afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chat_memory._proto.chat_memory_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    ContentPart,
    Message,
    ToolCall,
)


def user(content: str | Sequence[ContentPart], *, id: str = "", name: str = "") -> Message:  # noqa: A002
    """What the person says: a text, or parts (`text_part`, and `ContentPart` for images).

    >>> user("What is on my list?").content
    'What is on my list?'
    """
    message = Message(role=ROLE_USER, id=id, name=name)
    _fill(message, content)
    return message


def assistant(
    content: str | Sequence[ContentPart] = "",
    *,
    tool_calls: Sequence[ToolCall] = (),
    id: str = "",  # noqa: A002
    name: str = "",
) -> Message:
    """What the model answered: a text, calls of tools, or both."""
    message = Message(role=ROLE_ASSISTANT, id=id, name=name, tool_calls=tool_calls)
    _fill(message, content)
    return message


def system(content: str | Sequence[ContentPart], *, id: str = "", name: str = "") -> Message:  # noqa: A002
    """Instructions for the model that are part of the history. (`chat(system_prompt=…)` takes
    instructions that are not stored.)"""
    message = Message(role=ROLE_SYSTEM, id=id, name=name)
    _fill(message, content)
    return message


def tool(
    tool_call_id: str,
    content: str | Sequence[ContentPart],
    *,
    id: str = "",  # noqa: A002
    name: str = "",
) -> Message:
    """The result of the tool call with that id."""
    message = Message(role=ROLE_TOOL, id=id, name=name, tool_call_id=tool_call_id)
    _fill(message, content)
    return message


def tool_call(id: str, name: str, arguments: Mapping[str, Any] | str = "{}") -> ToolCall:  # noqa: A002
    """A tool call. The arguments are an object, or its JSON text.

    >>> tool_call("c1", "add", {"a": 1}).arguments
    '{"a": 1}'
    """
    text = arguments if isinstance(arguments, str) else json.dumps(dict(arguments))
    return ToolCall(id=id, name=name, arguments=text)


def text_part(text: str) -> ContentPart:
    """A text among other parts."""
    return ContentPart(text=text)


def _fill(message: Message, content: str | Sequence[ContentPart]) -> None:
    if isinstance(content, str):
        message.content = content
    else:
        message.parts.extend(content)
