"""A chat history for LangChain, kept by a chat-memory server.

    from chat_memory.langchain import ChatMemoryHistory, RunnableWithChatMemory

    chain = RunnableWithChatMemory(
        prompt | model,
        lambda session_id: ChatMemoryHistory(session_id, target="127.0.0.1:50051"),
        input_messages_key="question",
        history_messages_key="history",
    )

`ChatMemoryHistory` takes the place of `RedisChatMessageHistory`: over a server that was pointed at
the same Redis it sees the same sessions, without a migration. `RunnableWithChatMemory` takes the
place of `RunnableWithMessageHistory`, which only logs a failure to store a turn. Ours raises it.

What is added comes back equal, with these exceptions: a message without an id gets one from the
server; empty names, ids and tool call ids come back as None; an empty list of contents comes back
as an empty text. What cannot be sent (a lone surrogate in a text, JSON nested more than 100 deep)
is refused with an error before anything is stored.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
)
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tracers.schemas import Run

from chat_memory._aio import AsyncClient
from chat_memory._client import Client
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._requests import MESSAGES_PER_APPEND_MAX, MESSAGES_PER_PAGE_MAX

__all__ = [
    "ChatMemoryHistory",
    "RunnableWithChatMemory",
    "UnreadableMessage",
    "from_proto",
    "to_proto",
]

_OURS = "chat_memory"
"""The key of `additional_kwargs` under which the server keeps its own facts."""


class UnreadableMessage(ValueError):
    """A stored message is none that LangChain could hold, or is too large for a page (3 MiB)."""

    sequence: int
    """Its sequence in the session."""

    def __init__(self, message: pb.Message) -> None:
        problem = pb.Problem.Name(message.problem)
        super().__init__(
            f"the message with sequence {message.sequence} cannot be read: {problem}, "
            f"{message.raw_size} bytes"
        )
        self.sequence = message.sequence


class ChatMemoryHistory(BaseChatMessageHistory):
    """The messages of one session.

    >>> history = ChatMemoryHistory("demo", target="127.0.0.1:50051")  # doctest: +SKIP
    ... history.add_messages([HumanMessage("hi"), AIMessage("Hello!")])
    ... history.messages

    Making one costs next to nothing: all histories of a target share one connection, which stays
    open for as long as the process lives. Pass a `client` and an `async_client` to decide on that
    yourself.

    With `last_messages`, reading gives only the newest that many messages, less the tool results at
    the front whose call lies outside (a model would refuse them). Without it, all of them.

    Elements that LangChain itself refuses are read where they can be understood (`user` for
    `human`, missing fields). Where they cannot, `unreadable` says what to do: "raise"
    `UnreadableMessage`, the default, or "skip" them.
    """

    def __init__(
        self,
        session_id: str,
        target: str | None = None,
        *,
        last_messages: int | None = None,
        client: Client | None = None,
        async_client: AsyncClient | None = None,
        timeout: float | None = None,
        unreadable: Literal["raise", "skip"] = "raise",
    ) -> None:
        if last_messages is not None and last_messages < 1:
            raise ValueError("last_messages must be 1 or more")
        self.session_id = session_id
        self.last_messages = last_messages
        self._target = target
        self._client = client
        self._async_client = async_client
        self._timeout = timeout
        self._unreadable = unreadable

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages, oldest first."""
        stored = self._sync().messages(
            self.session_id,
            page_size=self._page_size(),
            last_messages=self.last_messages,
            include_raw=True,
            timeout=self._timeout,
        )
        return self._read(list(stored))

    async def aget_messages(self) -> list[BaseMessage]:
        """The messages, oldest first."""
        stored = self._async().messages(
            self.session_id,
            page_size=self._page_size(),
            last_messages=self.last_messages,
            include_raw=True,
            timeout=self._timeout,
        )
        return self._read([message async for message in stored])

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Adds up to 100 messages in one atomic step: all of them are stored, or none."""
        if drafts := _drafts(messages):
            self._sync().append(self.session_id, drafts, timeout=self._timeout)

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Adds up to 100 messages in one atomic step: all of them are stored, or none."""
        if drafts := _drafts(messages):
            await self._async().append(self.session_id, drafts, timeout=self._timeout)

    def clear(self) -> None:
        """Deletes the session."""
        self._sync().clear(self.session_id, timeout=self._timeout)

    async def aclear(self) -> None:
        """Deletes the session."""
        await self._async().clear(self.session_id, timeout=self._timeout)

    def _sync(self) -> Client:
        if self._client is None:
            self._client = _shared(self._target)[0]
        return self._client

    def _async(self) -> AsyncClient:
        if self._async_client is None:
            self._async_client = _shared(self._target)[1]
        return self._async_client

    def _page_size(self) -> int:
        return min(self.last_messages or MESSAGES_PER_PAGE_MAX, MESSAGES_PER_PAGE_MAX)

    def _read(self, stored: list[pb.Message]) -> list[BaseMessage]:
        messages = []
        for message in stored:
            try:
                messages.append(from_proto(message))
            except UnreadableMessage:
                if self._unreadable == "raise":
                    raise
        if self.last_messages is None:
            return messages
        start = 0
        while start < len(messages) and isinstance(messages[start], ToolMessage):
            start += 1
        return messages[start:]


_clients: dict[str | None, tuple[Client, AsyncClient]] = {}
_clients_lock = threading.Lock()


def _shared(target: str | None) -> tuple[Client, AsyncClient]:
    """The clients of all histories of a target."""
    with _clients_lock:
        clients = _clients.get(target)
        if clients is None:
            clients = _clients[target] = (Client(target), AsyncClient(target))
        return clients


def _drafts(messages: Sequence[BaseMessage]) -> list[pb.Message]:
    if len(messages) > MESSAGES_PER_APPEND_MAX:
        raise ValueError(
            f"{len(messages)} messages are more than the {MESSAGES_PER_APPEND_MAX} that can be "
            "added in one atomic step: add them in several"
        )
    return [to_proto(message) for message in messages]


# -------------------------------------------------------------------------------------------------
# Writing

_ROLES: dict[str, tuple[pb.Role.ValueType, str]] = {
    "human": (pb.ROLE_USER, ""),
    "ai": (pb.ROLE_ASSISTANT, ""),
    "system": (pb.ROLE_SYSTEM, ""),
    "tool": (pb.ROLE_TOOL, ""),
    "function": (pb.ROLE_OTHER, "function"),
    "remove": (pb.ROLE_OTHER, "remove"),
    "HumanMessageChunk": (pb.ROLE_USER, ""),
    "AIMessageChunk": (pb.ROLE_ASSISTANT, ""),
    "SystemMessageChunk": (pb.ROLE_SYSTEM, ""),
    "ToolMessageChunk": (pb.ROLE_TOOL, ""),
    "FunctionMessageChunk": (pb.ROLE_OTHER, "function"),
}

_COUNTS = ("input_tokens", "output_tokens", "total_tokens")


def to_proto(message: BaseMessage) -> pb.Message:
    """The message as the server takes it.

    What the contract has no field for goes into `metadata.langchain`, which the server stores as
    LangChain itself would, and hands out to every other client.
    """
    dumped = message_to_dict(message)
    kind: str = dumped["type"]
    data: dict[str, Any] = dict(dumped["data"])
    data.pop("type", None)
    if kind in ("chat", "ChatMessageChunk"):
        role, role_name = pb.ROLE_OTHER, data.pop("role")
        if role_name in ("function", "remove"):
            raise ValueError(f"a chat message cannot have the role {role_name!r}")
    elif kind in _ROLES:
        role, role_name = _ROLES[kind]
    else:
        raise ValueError(f"messages of type {kind!r} cannot be stored: LangChain cannot read them")

    given = pb.Message(role=role, role_name=role_name)
    given.id = data.pop("id", None) or ""
    given.name = data.pop("name", None) or ""
    content = data.pop("content")
    if isinstance(content, str):
        given.content = content
    else:
        given.parts.extend(_part(block) for block in content)

    if role == pb.ROLE_TOOL:
        given.tool_call_id = data.pop("tool_call_id")
        if data.get("artifact") is None:
            data.pop("artifact", None)
        if data.get("status") == "success":
            del data["status"]
    if role == pb.ROLE_ASSISTANT:
        for call in data.pop("tool_calls", ()):
            arguments = json.dumps(call["args"])
            given.tool_calls.add(id=call["id"] or "", name=call["name"], arguments=arguments)
        usage = data.pop("usage_metadata", None)
        if usage is not None:
            given.usage.CopyFrom(pb.Usage(**{key: usage[key] for key in _COUNTS}))
            details = {key: value for key, value in usage.items() if key not in _COUNTS}
            if details:
                data["usage_metadata"] = details
        if not data.get("invalid_tool_calls"):
            data.pop("invalid_tool_calls", None)

    for key in ("additional_kwargs", "response_metadata"):
        value = data.pop(key, None) or {}
        kept = {name: fact for name, fact in value.items() if name != _OURS}
        if kept:
            data[key] = kept
    if kind.endswith("Chunk"):
        data["type"] = kind
    # An empty message is taken only with something of LangChain's, if only an empty object.
    # The JSON text goes as it is: a Struct would make floats of all numbers, and forget the order.
    if data or not (given.content or given.parts):
        given.metadata.get_or_create_struct("langchain")["$json"] = json.dumps(data)
    return given


def _part(block: str | dict[Any, Any]) -> pb.ContentPart:
    if isinstance(block, dict) and list(block) == ["type", "text"] and block["type"] == "text":
        text = block["text"]
        if isinstance(text, str):
            return pb.ContentPart(text=text)
    return pb.ContentPart(json=json.dumps(block))


# -------------------------------------------------------------------------------------------------
# Reading


def from_proto(message: pb.Message) -> BaseMessage:
    """The message as LangChain has it. Best given a message that was read with `include_raw`: then
    it is what LangChain itself makes of the stored bytes, less the server's own facts (they are
    the fields `create_time`, `interrupted`, `turn_id` and `metadata` of the message given)."""
    if message.problem:
        raise UnreadableMessage(message)
    if message.raw:
        try:
            (read,) = messages_from_dict([json.loads(message.raw)])
        except Exception:
            # Hand-written elements and the like: LangChain refuses them, the server does not.
            return _from_fields(message)
        read.additional_kwargs.pop(_OURS, None)
        return read
    return _from_fields(message)


def _from_fields(message: pb.Message) -> BaseMessage:
    content: str | list[str | dict[Any, Any]] = message.content
    if message.parts:
        content = [_block(part) for part in message.parts]
    facts: dict[str, Any] = {
        "content": content,
        "id": message.id or None,
        "name": message.name or None,
    }
    if message.reasoning:
        facts["additional_kwargs"] = {"reasoning_content": message.reasoning}
    if message.role == pb.ROLE_USER:
        return HumanMessage(**facts)
    if message.role == pb.ROLE_SYSTEM:
        return SystemMessage(**facts)
    if message.role == pb.ROLE_TOOL:
        return ToolMessage(tool_call_id=message.tool_call_id, **facts)
    if message.role == pb.ROLE_ASSISTANT:
        if message.HasField("usage"):
            facts["usage_metadata"] = {key: getattr(message.usage, key) for key in _COUNTS}
        calls = [
            {"name": call.name, "args": json.loads(call.arguments or "{}"), "id": call.id or None}
            for call in message.tool_calls
        ]
        return AIMessage(tool_calls=calls, **facts)
    if message.role_name == "function" and message.name:
        return FunctionMessage(**facts)
    if message.role_name == "remove" and message.id:
        return RemoveMessage(id=message.id)
    return ChatMessage(role=message.role_name or "chat", **facts)


def _block(part: pb.ContentPart) -> str | dict[Any, Any]:
    kind = part.WhichOneof("part")
    if kind == "text":
        return {"type": "text", "text": part.text}
    if kind == "image_url":
        image = {"url": part.image_url.url}
        if part.image_url.detail:
            image["detail"] = part.image_url.detail
        return {"type": "image_url", "image_url": image}
    if kind == "inline_data":
        data = base64.b64encode(part.inline_data.data).decode()
        return {
            "type": "file",
            "source_type": "base64",
            "data": data,
            "mime_type": part.inline_data.media_type,
        }
    block = json.loads(part.json)
    return block if isinstance(block, (str, dict)) else json.dumps(block)


# -------------------------------------------------------------------------------------------------
# The chain

_FAILURES = "chat_memory_failures"
"""The key of `configurable` under which a call's failures are gathered."""


class RunnableWithChatMemory(RunnableWithMessageHistory):
    """`RunnableWithMessageHistory` that raises if the turn could not be stored.

    LangChain stores a turn in a callback that runs when the chain has ended, and its callback
    manager logs what callbacks raise ("Error in RootListenersTracer.on_chain_end callback") and
    goes on: the caller gets the whole answer, no error, and the turn is lost. This class takes the
    same arguments, remembers what storing raised, and raises it once the answer is there, from
    `invoke`, `stream`, `batch`, `transform` and their async forms; a stream raises it at its end,
    after the last chunk.
    """

    def _exit_history(self, run: Run, config: RunnableConfig) -> None:
        try:
            super()._exit_history(run, config)
        except Exception as failure:
            config["configurable"].get(_FAILURES, []).append(failure)
            raise

    async def _aexit_history(self, run: Run, config: RunnableConfig) -> None:
        try:
            await super()._aexit_history(run, config)
        except Exception as failure:
            config["configurable"].get(_FAILURES, []).append(failure)
            raise

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002, D102
        failures: list[Exception] = []
        output = super().invoke(input, _watched(config, failures), **kwargs)
        _raise_first(failures)
        return output

    async def ainvoke(  # noqa: D102
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        failures: list[Exception] = []
        output = await super().ainvoke(input, _watched(config, failures), **kwargs)
        _raise_first(failures)
        return output

    def batch(self, inputs: Any, config: Any = None, **kwargs: Any) -> list[Any]:  # noqa: D102
        failures: list[Exception] = []
        outputs = super().batch(inputs, _watched_each(config, failures), **kwargs)
        _raise_first(failures)
        return outputs

    async def abatch(self, inputs: Any, config: Any = None, **kwargs: Any) -> list[Any]:  # noqa: D102
        failures: list[Exception] = []
        outputs = await super().abatch(inputs, _watched_each(config, failures), **kwargs)
        _raise_first(failures)
        return outputs

    def stream(  # noqa: D102
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        failures: list[Exception] = []
        yield from super().stream(input, _watched(config, failures), **kwargs)
        _raise_first(failures)

    async def astream(  # noqa: D102
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        failures: list[Exception] = []
        async for chunk in super().astream(input, _watched(config, failures), **kwargs):
            yield chunk
        _raise_first(failures)

    def transform(  # noqa: D102
        self,
        input: Iterator[Any],  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        failures: list[Exception] = []
        yield from super().transform(input, _watched(config, failures), **kwargs)
        _raise_first(failures)

    async def atransform(  # noqa: D102
        self,
        input: AsyncIterator[Any],  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        failures: list[Exception] = []
        async for chunk in super().atransform(input, _watched(config, failures), **kwargs):
            yield chunk
        _raise_first(failures)


def _watched(config: RunnableConfig | None, failures: list[Exception]) -> RunnableConfig:
    """The configuration, with a place for failures: it reaches the callbacks of this call only."""
    given: RunnableConfig = config or {}
    return {**given, "configurable": {**given.get("configurable", {}), _FAILURES: failures}}


def _watched_each(
    config: RunnableConfig | list[RunnableConfig] | None, failures: list[Exception]
) -> RunnableConfig | list[RunnableConfig]:
    if isinstance(config, list):
        return [_watched(one, failures) for one in config]
    return _watched(config, failures)


def _raise_first(failures: list[Exception]) -> None:
    if failures:
        raise failures[0]
