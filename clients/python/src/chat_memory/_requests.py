"""Arguments into requests, for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from chat_memory._errors import ChatMemoryError, Unavailable
from chat_memory._messages import user
from chat_memory._proto import chat_memory_pb2 as pb

MESSAGES_PER_APPEND_MAX = 100
MESSAGES_PER_PAGE_MAX = 1000

# A turn may take 10 minutes by the server's own limit.
CHAT_SECONDS = 660.0
CALL_SECONDS = 10.0

Event = pb.Started | pb.Delta | pb.Completed
"""What a turn's stream consists of."""


def append_request(
    session_id: str,
    messages: Iterable[pb.Message],
    request_id: str | None,
    expected_last_sequence: int | None,
) -> pb.AppendRequest:
    """The request, with an id in any case: it is what makes a retry safe."""
    return pb.AppendRequest(
        session_id=session_id,
        messages=messages,
        request_id=request_id or str(uuid.uuid4()),
        expected_last_sequence=expected_last_sequence,
    )


def page_request(
    session_id: str,
    *,
    page_size: int,
    page_token: str,
    newest_first: bool,
    last_messages: int | None,
    last_turns: int | None,
    max_tokens: int | None,
    after_sequence: int | None,
    before_sequence: int | None,
    include_raw: bool,
    model: str,
) -> pb.GetMessagesRequest:
    """The request of one page."""
    return pb.GetMessagesRequest(
        session_id=session_id,
        page_size=page_size,
        page_token=page_token,
        order=pb.ORDER_NEWEST_FIRST if newest_first else pb.ORDER_OLDEST_FIRST,
        last_messages=last_messages,
        last_turns=last_turns,
        max_tokens=max_tokens,
        after_sequence=after_sequence,
        before_sequence=before_sequence,
        include_raw=include_raw,
        model=model,
    )


def chat_request(
    session_id: str,
    messages: str | pb.Message | Iterable[pb.Message],
    *,
    turn_id: str | None,
    model: str,
    system_prompt: str,
    last_messages: int | None,
    last_turns: int | None,
    max_tokens: int | None,
    tools: Iterable[pb.Tool],
    options: pb.ModelOptions | None,
    on_conflict: pb.OnConflict.ValueType,
    on_disconnect: pb.OnDisconnect.ValueType,
) -> pb.ChatRequest:
    """The request of a turn, with an id in any case."""
    if isinstance(messages, str):
        messages = [user(messages)]
    elif isinstance(messages, pb.Message):
        messages = [messages]
    return pb.ChatRequest(
        session_id=session_id,
        messages=messages,
        turn_id=turn_id or str(uuid.uuid4()),
        model=model,
        system_prompt=system_prompt,
        last_messages=last_messages,
        last_turns=last_turns,
        max_tokens=max_tokens,
        tools=tools,
        options=options,
        on_conflict=on_conflict,
        on_disconnect=on_disconnect,
    )


class TurnState:
    """What a stream has shown of its turn so far."""

    turn_id: str
    """The turn's id: `chat` with this id gets this turn again, and does not ask the model anew."""
    started: pb.Started | None
    """The turn's first event, once it came."""
    completed: pb.Completed | None
    """The turn's last event, once it came. Question and answer are stored then."""
    event_number: int
    """The number of the last event that came."""

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.started = None
        self.completed = None
        self.event_number = 0

    @property
    def answer(self) -> pb.Message | None:
        """The answer as stored, once the turn is completed."""
        if self.completed is None or not self.completed.messages:
            return None
        return self.completed.messages[-1]

    def _take(self, response: pb.ChatResponse) -> Event:
        self.event_number = response.event_number
        kind = response.WhichOneof("event")
        if kind == "started":
            self.started = response.started
            return response.started
        if kind == "completed":
            self.completed = response.completed
            return response.completed
        # An event of a newer server that this client does not know is an empty delta.
        return response.delta

    def _failed(self, error: ChatMemoryError) -> ChatMemoryError:
        error.turn_id = self.turn_id
        return error

    def _cut(self) -> ChatMemoryError:
        return self._failed(Unavailable("the stream ended before the turn was completed"))
