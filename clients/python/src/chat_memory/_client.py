"""The client for code without an event loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Protocol, TypeVar

import grpc
from typing_extensions import Self

from chat_memory import _channel, _requests
from chat_memory._errors import from_rpc
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._proto.chat_memory_pb2_grpc import ChatMemoryStub
from chat_memory._requests import (
    CALL_SECONDS,
    CHAT_SECONDS,
    FORK_SECONDS,
    Event,
    StreamState,
    Ttl,
    TurnState,
    WatchEvent,
    WatchState,
)
from chat_memory._retry import Attempts, passes

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)
_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")
_Event = TypeVar("_Event")


class _Call(Protocol[_Response]):
    """What a stub's stream is."""

    def __next__(self) -> _Response: ...

    def cancel(self) -> object: ...


class _Method(Protocol[_Request, _Response]):
    """What a stub's method is."""

    def __call__(self, request: _Request, *, timeout: float | None = None) -> _Response: ...


class Client:
    """A connection to a chat-memory server.

    >>> with Client("127.0.0.1:50051") as client:  # doctest: +SKIP
    ...     client.append("demo", [user("hi"), assistant("Hello!")])
    ...     for message in client.messages("demo"):
    ...         print(message.content)
    ...     print(client.chat("demo", "What did I say?").text())

    `target` is `host:port`, `http://host:port`, `https://host:port` or `unix:/path`; without one,
    `$CHAT_MEMORY_TARGET` or `127.0.0.1:50051`. Clients of one target share one connection, so
    making a client is cheap; it connects with its first call. A client may be used by many threads.

    Calls raise `ChatMemoryError`. Failures that pass (a server that restarts, a store that is away)
    are tried again within the call's time, `timeout` seconds: every write carries an id, so that it
    is never stored twice.
    """

    def __init__(self, target: str | None = None, *, timeout: float = CALL_SECONDS) -> None:
        self._target = _channel.Target.parse(target)
        self._timeout = timeout
        self._stub: ChatMemoryStub | None = ChatMemoryStub(_channel.take(self._target))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the connection back; the last client of a target closes it. Safe to repeat."""
        if self._stub is not None:
            self._stub = None
            _channel.give_back(self._target)

    def append(
        self,
        session_id: str,
        messages: Iterable[pb.Message],
        request_id: str | None = None,
        expected_last_sequence: int | None = None,
        *,
        timeout: float | None = None,
    ) -> list[pb.Message]:
        """Adds 1 to 100 messages in one atomic step, and returns them as stored.

        The client makes a `request_id` if you give none; give your own to be able to repeat the
        call after your process died. With `expected_last_sequence`, the messages are stored only if
        nobody else appended since; otherwise `SequenceMismatch`.
        """
        request = _requests.append_request(session_id, messages, request_id, expected_last_sequence)
        return list(self._call(self._open().Append, request, timeout).messages)

    def get_messages(
        self,
        session_id: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        newest_first: bool = False,
        last_messages: int | None = None,
        last_turns: int | None = None,
        max_tokens: int | None = None,
        after_sequence: int | None = None,
        before_sequence: int | None = None,
        include_raw: bool = False,
        model: str = "",
        timeout: float | None = None,
    ) -> pb.GetMessagesResponse:
        """Returns one page: its `messages`, and the `next_page_token` if there are more.

        `last_messages=20` is the usual way to read the end of a session; it costs the same however
        long the session is.

        With `last_turns` or `max_tokens` it is a window instead: the end of the session as a model
        accepts it, on one page, with its `token_count` as the tokenizer of `model` counts.
        `WINDOW_TOO_SMALL` says that the newest exchange alone takes more.
        """
        request = _requests.page_request(
            session_id,
            page_size=page_size,
            page_token=page_token,
            newest_first=newest_first,
            last_messages=last_messages,
            last_turns=last_turns,
            max_tokens=max_tokens,
            after_sequence=after_sequence,
            before_sequence=before_sequence,
            include_raw=include_raw,
            model=model,
        )
        return self._call(self._open().GetMessages, request, timeout)

    def messages(
        self,
        session_id: str,
        *,
        page_size: int = 0,
        newest_first: bool = False,
        last_messages: int | None = None,
        after_sequence: int | None = None,
        before_sequence: int | None = None,
        include_raw: bool = False,
        timeout: float | None = None,
    ) -> Iterator[pb.Message]:
        """Iterates over all messages, page by page. `timeout` is for one page."""
        token = ""
        while True:
            page = self.get_messages(
                session_id,
                page_size=page_size,
                page_token=token,
                newest_first=newest_first,
                last_messages=last_messages,
                after_sequence=after_sequence,
                before_sequence=before_sequence,
                include_raw=include_raw,
                timeout=timeout,
            )
            yield from page.messages
            token = page.next_page_token
            if not token:
                return

    def clear(self, session_id: str, *, timeout: float | None = None) -> int:
        """Deletes a session, and returns how many messages went.

        It may be repeated, so it is tried again like a read; the number is then that of the last
        attempt.
        """
        request = pb.ClearRequest(session_id=session_id)
        return self._call(self._open().Clear, request, timeout).deleted_count

    def get_session(self, session_id: str, *, timeout: float | None = None) -> pb.Session:
        """Returns what there is to know of a session, its messages aside: title, metadata, expiry,
        counts, and the turn that runs or ran last. Raises `NotFound` if there is no such session.
        """
        request = pb.GetSessionRequest(session_id=session_id)
        return self._call(self._open().GetSession, request, timeout).session

    def update_session(
        self,
        session_id: str,
        *,
        title: str | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl: Ttl | None = None,
        timeout: float | None = None,
    ) -> pb.Session:
        """Changes what is given, and returns the session as it is then. `metadata` replaces all
        pairs; `ttl` is a time, `"never"` (it lives for ever) or `"default"` (as the server says).
        Raises `NotFound` if the session has no messages.
        """
        request = _requests.update_request(session_id, title, metadata, ttl)
        return self._call(self._open().UpdateSession, request, timeout).session

    def list_sessions(
        self,
        *,
        id_prefix: str = "",
        metadata: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> Iterator[pb.Session]:
        """Iterates over all sessions that have messages, the one with the newest activity first,
        page by page. With `metadata`, only those that have all these pairs. `timeout` is for one
        page.
        """
        request = pb.ListSessionsRequest(
            id_prefix=id_prefix, metadata=metadata, page_size=page_size
        )
        while True:
            page = self._call(self._open().ListSessions, request, timeout)
            yield from page.sessions
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def rewind(
        self,
        session_id: str,
        after_sequence: int,
        request_id: str | None = None,
        stop_turn: bool = False,
        expected_last_sequence: int | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Deletes the messages after a sequence (0: all), so that the conversation can go another
        way from there, and returns how many went. Their sequences are not given again.

        Raises `TurnInProgress` while a turn runs, unless `stop_turn` is set: that stops it and
        drops its answer. The client makes a `request_id` if you give none, so a retry deletes
        nothing that came after the first attempt.

        `expected_last_sequence` makes it conditional: `SequenceMismatch` if the session's
        `last_sequence` is another one.
        """
        request = _requests.rewind_request(
            session_id, after_sequence, request_id, stop_turn, expected_last_sequence
        )
        return self._call(self._open().Rewind, request, timeout).deleted_count

    def fork(
        self,
        session_id: str,
        new_session_id: str,
        through_sequence: int | None = None,
        *,
        timeout: float = FORK_SECONDS,
    ) -> pb.Session:
        """Copies a session, or its beginning up to a sequence, into a new one, and returns that.

        Raises `AlreadyExists` if the new session has messages, unless the same call made it before.
        """
        request = pb.ForkRequest(
            session_id=session_id,
            new_session_id=new_session_id,
            through_sequence=through_sequence,
        )
        return self._call(self._open().Fork, request, timeout).session

    def watch(
        self,
        session_id: str,
        after_sequence: int = 0,
        *,
        include_raw: bool = False,
        retry: bool = True,
    ) -> WatchStream:
        """Streams a session's messages, whoever writes them: those after `after_sequence`, then a
        `Live`, then each further one as it arrives, with notices of turns, rewinds and clears
        between them. See `WatchStream`.

        With `retry=False`, the stream raises every failure in place of going on by itself.
        """
        request = pb.WatchRequest(
            session_id=session_id, after_sequence=after_sequence, include_raw=include_raw
        )
        method = self._open().Watch

        def start(request: pb.WatchRequest, _: float) -> _Call[pb.WatchResponse]:
            return method(request)

        return WatchStream(start, request, retry)

    def chat(
        self,
        session_id: str,
        messages: str | pb.Message | Iterable[pb.Message],
        *,
        turn_id: str | None = None,
        model: str = "",
        system_prompt: str = "",
        last_messages: int | None = None,
        last_turns: int | None = None,
        max_tokens: int | None = None,
        tools: Iterable[pb.Tool] = (),
        options: pb.ModelOptions | None = None,
        on_conflict: pb.OnConflict.ValueType = pb.ON_CONFLICT_UNSPECIFIED,
        on_disconnect: pb.OnDisconnect.ValueType = pb.ON_DISCONNECT_UNSPECIFIED,
        retry: bool = True,
        timeout: float = CHAT_SECONDS,
    ) -> ChatStream:
        """Runs a turn: the server asks the model, with the session's history, and stores question
        and answer. Returns the stream of its events; see `ChatStream`.

        `messages` is what is new: a text, a message, or several (results of tools). Keep the
        stream's `turn_id`, or give one: after a failure, `chat` with the same id and arguments
        gets the same turn again, and `resume` goes on with it where it was.

        With `retry=False`, the stream raises every failure in place of going on by itself.
        """
        request = _requests.chat_request(
            session_id,
            messages,
            turn_id=turn_id,
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
        return self._stream(request, timeout, retry)

    def resume(
        self,
        session_id: str,
        turn_id: str,
        resume_after: int = 0,
        *,
        retry: bool = True,
        timeout: float = CHAT_SECONDS,
    ) -> ChatStream:
        """Follows a turn that was begun before, here or elsewhere, while it runs and after it has
        ended: the events after number `resume_after`, or all of them. The stream of a turn that has
        none after it is empty.

        The stream raises `NotFound` if there is no such turn, or it is forgotten.
        """
        request = _requests.follow_request(session_id, turn_id, resume_after)
        return self._stream(request, timeout, retry)

    def stop(
        self,
        session_id: str,
        turn_id: str = "",
        discard: bool = False,
        *,
        timeout: float | None = None,
    ) -> pb.StopChatResponse:
        """Ends a turn, the running one if none is named, wherever it runs. Returns its `turn_id`
        and the `messages` that were stored: question and answer as far as it went, marked as
        `interrupted`; none with `discard`. A turn that has ended stays as it is.

        Raises `NotFound` if there is no such turn. Tried again only if the turn is named: another
        one may run by then.
        """
        request = _requests.stop_request(session_id, turn_id, discard)
        return self._call(self._open().StopChat, request, timeout, may_repeat=bool(turn_id))

    def _stream(self, request: pb.ChatRequest, timeout: float, retry: bool) -> ChatStream:
        method = self._open().Chat

        def start(request: pb.ChatRequest, seconds: float) -> _Call[pb.ChatResponse]:
            return method(request, timeout=seconds)

        return ChatStream(start, request, timeout, retry)

    def _open(self) -> ChatMemoryStub:
        if self._stub is None:
            raise ValueError("the client is closed")
        return self._stub

    def _call(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        timeout: float | None,
        may_repeat: bool = True,
    ) -> _Response:
        attempts = Attempts(self._timeout if timeout is None else timeout)
        while True:
            try:
                return method(request, timeout=attempts.time_left())
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            pause = attempts.pause_after(error) if may_repeat and passes(error) else None
            if pause is None:
                raise error
            time.sleep(pause)


class _Stream(StreamState[_Asked, _Answered, _Event]):
    """A stream that goes on by itself when it breaks off."""

    def _begin(
        self, start: Callable[[_Asked, float], _Call[_Answered]], timeout: float, retry: bool
    ) -> None:
        self._start = start
        self._timeout = timeout
        self._retry = retry
        self._attempts: Attempts | None = None
        self._call: _Call[_Answered] | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Event:
        if self._closed or self._is_over:
            raise StopIteration
        if self._is_stale:
            self._is_stale = False
            if self._call is not None:
                self._call.cancel()
            self._call = None
        attempts = self._attempts = self._attempts or Attempts(self._timeout)
        while True:
            if self._call is None:
                self._call = self._start(self._request, attempts.time_left())
            try:
                response = next(self._call)
            except StopIteration:
                if self._closed or self._is_at_end:
                    self.close()
                    raise
                error = self._cut()
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            else:
                attempts.succeeded()
                return self._take(response)
            if self._closed:
                raise StopIteration
            may_repeat = self._retry and self._may_repeat(error)
            pause = attempts.pause_after(error) if may_repeat else None
            if pause is None:
                self.close()
                raise self._failed(error)
            self._call = None
            self._broke()
            time.sleep(pause)
            if self._closed:
                raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the stream, also from another thread. Safe to repeat."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()


class ChatStream(TurnState, _Stream[pb.ChatRequest, pb.ChatResponse, Event]):
    """The events of one turn: a `Started`, any number of `Delta`s, one `Completed`.

    >>> for event in client.chat("demo", "hi"):  # doctest: +SKIP
    ...     match event:
    ...         case Delta(text=text):
    ...             print(text, end="")
    ...         case Completed():
    ...             print("\\nstored")

    The call is made when the first event is asked for. If the stream breaks off (the connection,
    the server or the store fails), it goes on after the last event that came, with the same turn,
    for as long as `timeout` and tries of half a minute allow. A server that takes the turn over
    runs it anew: then another `Started` comes, and the text before it is void. What the turn itself
    fails with is raised.

    `close` cancels the stream, and so does leaving a `with` block. What becomes of the turn then is
    up to `on_disconnect`: by default it goes on and is stored.
    """

    def __init__(
        self,
        start: Callable[[pb.ChatRequest, float], _Call[pb.ChatResponse]],
        request: pb.ChatRequest,
        timeout: float,
        retry: bool,
    ) -> None:
        super().__init__(request)
        self._begin(start, timeout, retry)

    def text(self) -> str:
        """Reads the stream to its end, and returns the text of the stored answer."""
        for _ in self:
            pass
        if self.answer is None:
            raise self._cut()
        return self.answer.content


class WatchStream(WatchState, _Stream[pb.WatchRequest, pb.WatchResponse, WatchEvent]):
    """What a watched session holds and what comes: `Message`, `Live`, `Turn`, `Rewound`, `Cleared`
    and `Skipped`, as the proto says.

    >>> with client.watch("demo") as events:  # doctest: +SKIP
    ...     for event in events:
    ...         if isinstance(event, Message):
    ...             print(event.content)

    It ends only when it is closed, by `close` or by leaving the `with` block. If it breaks off (the
    connection, the server or the store fails), it goes on after the last message that came, with
    another `Live`; if that fails for half a minute, it raises. `after_sequence` is where another
    `watch` goes on.
    """

    def __init__(
        self,
        start: Callable[[pb.WatchRequest, float], _Call[pb.WatchResponse]],
        request: pb.WatchRequest,
        retry: bool,
    ) -> None:
        super().__init__(request)
        self._begin(start, math.inf, retry)
