"""Arguments into requests, for both clients."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Mapping
from typing import ClassVar, Generic, Literal, TypeVar, cast

import grpc
from google.protobuf import duration_pb2

from chat_memory._errors import ChatMemoryError, Unavailable
from chat_memory._messages import user
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._retry import may_go_on, passes

MESSAGES_PER_APPEND_MAX = 100
MESSAGES_PER_PAGE_MAX = 1000

# A turn may take 10 minutes by the server's own limit.
CHAT_SECONDS = 660.0
CALL_SECONDS = 10.0
# The server copies a large session in many steps.
FORK_SECONDS = 600.0

Event = pb.Started | pb.Delta | pb.Completed
"""What a turn's stream consists of."""

WatchEvent = pb.Message | pb.Live | pb.Turn | pb.Rewound | pb.Cleared | pb.Skipped
"""What the stream of a watched session consists of."""

Ttl = datetime.timedelta | Literal["never", "default"]
"""How long a session lives after its last write: a time, for ever, or as the server says."""


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


def update_request(
    session_id: str,
    title: str | None,
    metadata: Mapping[str, str] | None,
    ttl: Ttl | None,
) -> pb.UpdateSessionRequest:
    """The request to change what is given of a session."""
    request = pb.UpdateSessionRequest(session=pb.Session(session_id=session_id))
    if title is not None:
        request.session.title = title
        request.update_mask.paths.append("title")
    if metadata is not None:
        request.session.metadata.update(metadata)
        request.update_mask.paths.append("metadata")
    if ttl is not None:
        if isinstance(ttl, datetime.timedelta):
            request.session.ttl.FromTimedelta(ttl)
        elif ttl == "never":
            request.session.ttl.CopyFrom(duration_pb2.Duration())
        request.update_mask.paths.append("ttl")
    return request


def rewind_request(
    session_id: str,
    after_sequence: int,
    request_id: str | None,
    stop_turn: bool,
    expected_last_sequence: int | None,
) -> pb.RewindRequest:
    """The request, with an id in any case: a retry must not delete what came after the first."""
    return pb.RewindRequest(
        session_id=session_id,
        after_sequence=after_sequence,
        request_id=request_id or str(uuid.uuid4()),
        stop_turn=stop_turn,
        expected_last_sequence=expected_last_sequence,
    )


_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Event = TypeVar("_Event")


class StreamState(Generic[_Request, _Response, _Event]):
    """What a stream has shown so far, and how it goes on if it breaks."""

    _response_type: ClassVar[type]
    _request: _Request
    """What the next call asks for."""
    _is_stale = False
    """Whether the call that runs is not the one to read on."""

    @property
    def _is_over(self) -> bool:
        """Whether all has come."""
        return False

    @property
    def _is_at_end(self) -> bool:
        """Whether a stream that ends now means that there is nothing more."""
        return False

    def _take(self, response: _Response) -> _Event:
        raise NotImplementedError

    def _may_repeat(self, error: ChatMemoryError) -> bool:
        """Whether the request may be sent again after this failure."""
        raise NotImplementedError

    def _broke(self) -> None:
        """Says that the request will be sent again."""

    def _failed(self, error: ChatMemoryError) -> ChatMemoryError:
        return error

    def _cut(self) -> ChatMemoryError:
        raise NotImplementedError


class WatchState(StreamState[pb.WatchRequest, pb.WatchResponse, WatchEvent]):
    """What a stream has shown of a session so far."""

    _response_type = pb.WatchResponse

    after_sequence: int
    """The sequence up to which all has come: `watch` goes on after it."""

    def __init__(self, request: pb.WatchRequest) -> None:
        self._request = request
        self._resumed_after: int | None = None
        self.after_sequence = request.after_sequence

    def _take(self, response: pb.WatchResponse) -> WatchEvent:
        # An event of a newer server that this client does not know is an empty turn.
        event = cast("WatchEvent", getattr(response, response.WhichOneof("event") or "turn"))
        if isinstance(event, pb.Live) and self._resumed_after is not None:
            # A session's last sequence never falls: this is another one, all of which is new.
            self._is_stale = event.last_sequence < self._resumed_after
            self._resumed_after = None
            if self._is_stale:
                event = pb.Cleared()
        if isinstance(event, pb.Message):
            self.after_sequence = event.sequence
        elif isinstance(event, pb.Live | pb.Rewound):
            self.after_sequence = event.last_sequence
        elif isinstance(event, pb.Skipped):
            self.after_sequence = event.first_sequence - 1
        elif isinstance(event, pb.Cleared):
            # The next life of a session may count from 1 on.
            self.after_sequence = 0
        self._request.after_sequence = self.after_sequence
        return event

    def _may_repeat(self, error: ChatMemoryError) -> bool:
        return passes(error) or error.reason == "WATCHER_TOO_SLOW"

    def _broke(self) -> None:
        self._resumed_after = self.after_sequence

    def _cut(self) -> ChatMemoryError:
        return Unavailable("the stream ended", code=grpc.StatusCode.UNAVAILABLE)


class TurnState(StreamState[pb.ChatRequest, pb.ChatResponse, Event]):
    """What a stream has shown of its turn so far."""

    _response_type = pb.ChatResponse

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
    def _is_over(self) -> bool:
        return self.completed is not None

    @property
    def _is_at_end(self) -> bool:
        return self._is_followed and self.event_number == self._asked_after

    def _may_repeat(self, error: ChatMemoryError) -> bool:
        return may_go_on(error) if self._is_followed else passes(error)

    def _failed(self, error: ChatMemoryError) -> ChatMemoryError:
        error.turn_id = self.turn_id
        return error

    def _cut(self) -> ChatMemoryError:
        text = "the stream ended before the turn was completed"
        return self._failed(Unavailable(text, code=grpc.StatusCode.UNAVAILABLE))
