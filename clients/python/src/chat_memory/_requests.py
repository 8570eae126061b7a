"""Arguments into requests, for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

import grpc

from chat_memory._errors import ChatMemoryError, Unavailable
from chat_memory._messages import user
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._retry import may_go_on, passes

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


def follow_request(session_id: str, turn_id: str, resume_after: int) -> pb.ChatRequest:
    """The request of the events of a turn that there is already."""
    return pb.ChatRequest(session_id=session_id, turn_id=turn_id, resume_after=resume_after)


def stop_request(session_id: str, turn_id: str, discard: bool) -> pb.StopChatRequest:
    """The request to end a turn."""
    return pb.StopChatRequest(session_id=session_id, turn_id=turn_id, discard=discard)


class TurnState:
    """What a stream has shown of its turn so far."""

    turn_id: str
    """The turn's id: `chat` with this id gets this turn again, and does not ask the model anew."""
    started: pb.Started | None
    """The event that began the turn, once it came; the newest, if the turn was run anew."""
    completed: pb.Completed | None
    """The turn's last event, once it came. Question and answer are stored then."""
    event_number: int
    """The number of the last event that came: `resume` goes on after it."""

    def __init__(self, request: pb.ChatRequest) -> None:
        self._request = request
        self._asked_after = request.resume_after
        self.turn_id = request.turn_id
        self.started = None
        self.completed = None
        self.event_number = request.resume_after

    @property
    def answer(self) -> pb.Message | None:
        """The answer as stored, once the turn is completed."""
        if self.completed is None or not self.completed.messages:
            return None
        return self.completed.messages[-1]

    def _take(self, response: pb.ChatResponse) -> Event:
        self.event_number = response.event_number
        # From its first event on, the turn is followed, not begun: what was cleared meanwhile must
        # not come back.
        self._request = follow_request(self._request.session_id, self.turn_id, self.event_number)
        kind = response.WhichOneof("event")
        if kind == "started":
            self.started = response.started
            return response.started
        if kind == "completed":
            self.completed = response.completed
            return response.completed
        # An event of a newer server that this client does not know is an empty delta.
        return response.delta

    @property
    def _is_followed(self) -> bool:
        return not self._request.messages

    @property
    def _is_at_end(self) -> bool:
        """Whether a stream that ends now means that the turn had no more events."""
        return self._is_followed and self.event_number == self._asked_after

    def _may_repeat(self, error: ChatMemoryError) -> bool:
        """Whether the request may be sent again after this failure."""
        return may_go_on(error) if self._is_followed else passes(error)

    def _failed(self, error: ChatMemoryError) -> ChatMemoryError:
        error.turn_id = self.turn_id
        return error

    def _cut(self) -> ChatMemoryError:
        text = "the stream ended before the turn was completed"
        return self._failed(Unavailable(text, code=grpc.StatusCode.UNAVAILABLE))
