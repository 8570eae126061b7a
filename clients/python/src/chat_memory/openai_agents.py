"""A session for the OpenAI Agents SDK, kept by a chat-memory server.

    from agents import Agent, Runner
    from chat_memory.openai_agents import ChatMemorySession

    session = ChatMemorySession("demo", target="127.0.0.1:50051")
    await Runner.run(Agent(name="Assistant"), "My name is Ann.", session=session)

Each item is one message of the session, so other clients see the conversation: what people and
models say as user and assistant messages, function calls as tool calls, their outputs as tool
results. The item itself is kept beside that, as its JSON text, and comes back as it was. Messages
of other clients appear as user, assistant and system items; results of tools whose calls were not
made by the SDK are left out.

Limits:

- `pop_item` deletes its message from the session, for all clients. The server has no condition for
  that: what another client adds at the same moment goes with it, and its message may be what goes.
  Pops alone never take one item twice.
- An item takes its size twice, as a message and as JSON, except for plain texts. A message is at
  most 1 MiB.
- More than 100 items are added in several steps of up to 100; a failure between two leaves the
  first ones stored. Up to 100 items of together at most 2 MiB are added in one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import grpc
from agents.items import TResponseInputItem
from agents.memory.session_settings import SessionSettings, resolve_session_limit

from chat_memory._aio import AsyncClient
from chat_memory._errors import Aborted, NotFound, SequenceMismatch
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._requests import MESSAGES_PER_APPEND_MAX, MESSAGES_PER_PAGE_MAX

__all__ = ["ChatMemorySession"]

_ITEM = "openai_agents_item"
"""The key of `metadata` that holds an item's JSON text."""

_POPS = "openai_agents_pops"
"""The key of `metadata` that makes a message a marker: the sequence that it takes back. Older
versions stored markers where this one deletes."""

_POP_ROLE = "chat_memory_pop"

_BATCH_BYTES_MAX = 2 * 1024 * 1024

# A pop that loses against others this often in a row fails.
_POP_ATTEMPTS_MAX = 20


class ChatMemorySession:
    """The items of one session: the SDK's `Session` protocol.

    All clients, processes and replicas may use a session at once: items that are added together
    stay together. Do not pop while others add.

    Without a `client`, the session opens one for `target`; `close` gives it back. A session may be
    used by several event loops.
    """

    session_id: str
    """The session's id."""
    session_settings: SessionSettings | None
    """Its `limit` counts where `get_items` is called without one."""

    def __init__(
        self,
        session_id: str,
        target: str | None = None,
        *,
        client: AsyncClient | None = None,
        session_settings: SessionSettings | None = None,
    ) -> None:
        self.session_id = session_id
        self.session_settings = session_settings or SessionSettings()
        self._owned = AsyncClient(target) if client is None else None
        self._client: AsyncClient = client or cast("AsyncClient", self._owned)

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The newest `limit` items, oldest first; all of them without a limit."""
        limit = resolve_session_limit(limit, self.session_settings)
        if limit is not None and limit <= 0:
            return []
        return [item for _, item in reversed(await self._newest(limit))]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Adds items at the end: up to 100 in one atomic step."""
        batch: list[pb.Message] = []
        size = 0
        # All items are converted before the first is stored.
        for message in [_to_proto(item) for item in items]:
            message_size = message.ByteSize()
            if len(batch) == MESSAGES_PER_APPEND_MAX or (
                batch and size + message_size > _BATCH_BYTES_MAX
            ):
                await self._client.append(self.session_id, batch)
                batch, size = [], 0
            batch.append(message)
            size += message_size
        if batch:
            await self._client.append(self.session_id, batch)

    async def pop_item(self) -> TResponseInputItem | None:
        """Deletes the newest item, and returns it; None if there is none.

        Messages after it that are no items go too. Of two that pop at once, each gets an item of
        its own, and nothing that others add meanwhile goes. Raises `TurnInProgress` while the
        server runs a turn on the session.
        """
        for _ in range(_POP_ATTEMPTS_MAX):
            try:
                session = await self._client.get_session(self.session_id)
            except NotFound:
                return None
            items = await self._newest(1)
            if not items:
                return None
            sequence, item = items[0]
            try:
                deleted = await self._client.rewind(
                    self.session_id,
                    sequence - 1,
                    expected_last_sequence=session.last_sequence,
                )
            except SequenceMismatch:
                # Somebody has added an item: that is the newest now.
                continue
            if deleted:
                return item
            # Nothing was left to delete: somebody else has popped it.
        text = "others changed the session each time"
        raise Aborted(text, code=grpc.StatusCode.ABORTED)

    async def clear_session(self) -> None:
        """Deletes the session."""
        await self._client.clear(self.session_id)

    async def close(self) -> None:
        """Gives the connection back, if the session opened it."""
        if self._owned is not None:
            await self._owned.close()

    async def _newest(self, limit: int | None) -> list[tuple[int, TResponseInputItem]]:
        """The newest items with their sequences, newest first.

        Markers come before what they take back in this order, so one pass is enough.
        """
        popped: set[int] = set()
        items: list[tuple[int, TResponseInputItem]] = []
        page_size = MESSAGES_PER_PAGE_MAX if limit is None else limit + 10
        token = ""
        # By pages and not by `messages`: `Runner.run_sync` uses an event loop again after it ended
        # its asynchronous generators, which makes Python warn of any other.
        while True:
            page = await self._client.get_messages(
                self.session_id,
                page_size=min(page_size, MESSAGES_PER_PAGE_MAX),
                page_token=token,
                newest_first=True,
            )
            for message in page.messages:
                if message.role == pb.ROLE_OTHER and message.role_name == _POP_ROLE:
                    popped.add(_popped_by(message))
                    continue
                if message.sequence in popped:
                    continue
                item = _to_item(message)
                if item is None:
                    continue
                items.append((message.sequence, item))
                if len(items) == limit:
                    return items
            token = page.next_page_token
            if not token:
                return items


def _popped_by(marker: pb.Message) -> int:
    """The sequence that a marker takes back; 0, which is none, if it does not say."""
    text = marker.metadata.fields[_POPS].string_value
    return int(text) if text.isdecimal() else 0


_ROLES = {
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_SYSTEM,
}


def _to_proto(item: TResponseInputItem) -> pb.Message:
    fields = cast("Mapping[str, Any]", item)
    kind = fields.get("type")
    call_id = fields.get("call_id")
    if fields.get("role") in _ROLES:
        message = pb.Message(role=_ROLES[fields["role"]], content=_text(fields.get("content")))
    elif kind == "function_call" and _is_object(fields.get("arguments")):
        message = pb.Message(role=pb.ROLE_ASSISTANT)
        message.tool_calls.add(
            id=str(call_id or ""), name=str(fields["name"]), arguments=fields["arguments"]
        )
    elif kind == "function_call_output" and isinstance(call_id, str) and call_id:
        content = _text(fields.get("output"))
        message = pb.Message(role=pb.ROLE_TOOL, tool_call_id=call_id, content=content)
    else:
        # Reasoning, calls of hosted tools, and what is still to come: of the model, without a text.
        message = pb.Message(role=pb.ROLE_ASSISTANT)
    if _plain_item(message) != item:
        # ASCII, so that it can hold whatever a Python text can.
        message.metadata[_ITEM] = json.dumps(item)
    if not message.content:
        # What allows a message to be empty; see `Message.content` in the proto.
        message.metadata.get_or_create_struct("langchain")
    return message


def _to_item(message: pb.Message) -> TResponseInputItem | None:
    """The item; None for a message that the SDK has no item for."""
    if _ITEM in message.metadata:
        try:
            return cast("TResponseInputItem", json.loads(str(message.metadata[_ITEM])))
        except ValueError:
            return None
    return _plain_item(message)


def _plain_item(message: pb.Message) -> TResponseInputItem | None:
    """The item of a message that has a role and a text, and nothing else of importance."""
    if message.problem or not message.content:
        return None
    names = {
        pb.ROLE_USER: "user",
        pb.ROLE_ASSISTANT: "assistant",
        pb.ROLE_SYSTEM: "system",
    }
    role = names.get(message.role)
    if role is None:
        return None
    return cast("TResponseInputItem", {"role": role, "content": message.content})


def _text(content: Any) -> str:
    """What there is of text in an item's content or output. A lone surrogate, which no protobuf
    text can hold, becomes a question mark; the item's JSON keeps it."""
    if isinstance(content, list):
        blocks = [block.get("text") for block in content if isinstance(block, dict)]
        content = "".join(text for text in blocks if isinstance(text, str))
    if not isinstance(content, str):
        return ""
    return content.encode("utf-8", "replace").decode("utf-8")


def _is_object(arguments: Any) -> bool:
    try:
        return isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except ValueError:
        return False
