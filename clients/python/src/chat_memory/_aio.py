"""The client for asyncio. The same calls as `_client`, awaited."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
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

if TYPE_CHECKING:
    from chat_memory._proto.chat_memory_pb2_grpc import ChatMemoryAsyncStub

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)
_Asked = TypeVar("_Asked")
_Answered = TypeVar("_Answered")
_Event = TypeVar("_Event")


_Call: TypeAlias = "grpc.aio.UnaryStreamCall[_Asked, _Answered]"


class _Method(Protocol[_Request, _Response]):
    def __call__(
        self, request: _Request, *, timeout: float | None = None
    ) -> Awaitable[_Response]: ...


class AsyncClient:
    """A connection to a chat-memory server, for asyncio. `Client` says more.

    >>> async with AsyncClient("127.0.0.1:50051") as client:  # doctest: +SKIP
    ...     await client.append("demo", [user("hi"), assistant("Hello!")])
    ...     async for message in client.messages("demo"):
    ...         print(message.content)
    ...     print(await client.chat("demo", "What did I say?").text())

    A client may be made anywhere and used by several event loops; each loop has a connection of its
    own, which the clients of one target share.
    """

    def __init__(self, target: str | None = None, *, timeout: float = CALL_SECONDS) -> None:
        self._target = _channel.Target.parse(target)
        self._timeout = timeout
        self._stubs: dict[asyncio.AbstractEventLoop, ChatMemoryAsyncStub] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Gives the running loop's connection back; the last client of a target closes it. Safe to
        repeat."""
        self._closed = True
        if self._stubs.pop(asyncio.get_running_loop(), None) is not None:
            await _channel.give_back_aio(self._target)

    async def append(
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
        return list((await self._call(self._open().Append, request, timeout)).messages)

    async def get_messages(
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
        return await self._call(self._open().GetMessages, request, timeout)

    async def messages(
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
    ) -> AsyncGenerator[pb.Message, None]:
        """Iterates over all messages, page by page. `timeout` is for one page."""
        token = ""
        while True:
            page = await self.get_messages(
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
            for message in page.messages:
                yield message
            token = page.next_page_token
            if not token:
                return

    async def clear(self, session_id: str, *, timeout: float | None = None) -> int:
        """Deletes a session, and returns how many messages went.

        It may be repeated, so it is tried again like a read; the number is then that of the last
        attempt.
        """
        request = pb.ClearRequest(session_id=session_id)
        return (await self._call(self._open().Clear, request, timeout)).deleted_count

    async def get_session(self, session_id: str, *, timeout: float | None = None) -> pb.Session:
        """Returns what there is to know of a session, its messages aside: title, metadata, expiry,
        counts, and the turn that runs or ran last. Raises `NotFound` if there is no such session.
        """
        request = pb.GetSessionRequest(session_id=session_id)
        return (await self._call(self._open().GetSession, request, timeout)).session

    async def update_session(
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
        return (await self._call(self._open().UpdateSession, request, timeout)).session

    async def list_sessions(
        self,
        *,
        id_prefix: str = "",
        metadata: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[pb.Session, None]:
        """Iterates over all sessions that have messages, the one with the newest activity first,
        page by page. With `metadata`, only those that have all these pairs. `timeout` is for one
        page.
        """
        request = pb.ListSessionsRequest(
            id_prefix=id_prefix, metadata=metadata, page_size=page_size
        )
        while True:
            page = await self._call(self._open().ListSessions, request, timeout)
            for session in page.sessions:
                yield session
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def rewind(
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
        return (await self._call(self._open().Rewind, request, timeout)).deleted_count

    async def fork(
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
        return (await self._call(self._open().Fork, request, timeout)).session

    def watch(
        self,
        session_id: str,
        after_sequence: int = 0,
        *,
        include_raw: bool = False,
        retry: bool = True,
    ) -> AsyncWatchStream:
        """Streams a session's messages, whoever writes them: those after `after_sequence`, then a
        `Live`, then each further one as it arrives, with notices of turns, rewinds and clears
        between them. See `AsyncWatchStream`.

        With `retry=False`, the stream raises every failure in place of going on by itself.
        """
        request = pb.WatchRequest(
            session_id=session_id, after_sequence=after_sequence, include_raw=include_raw
        )

        def start(request: pb.WatchRequest, _: float) -> _Call[pb.WatchRequest, pb.WatchResponse]:
            return self._open().Watch(request)

        return AsyncWatchStream(start, request, retry)

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
    ) -> AsyncChatStream:
        """Runs a turn: the server asks the model, with the session's history, and stores question
        and answer. Returns the stream of its events; see `AsyncChatStream`.

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
    ) -> AsyncChatStream:
        """Follows a turn that was begun before, here or elsewhere, while it runs and after it has
        ended: the events after number `resume_after`, or all of them. The stream of a turn that has
        none after it is empty.

        The stream raises `NotFound` if there is no such turn, or it is forgotten.
        """
        request = _requests.follow_request(session_id, turn_id, resume_after)
        return self._stream(request, timeout, retry)

    async def stop(
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
        return await self._call(self._open().StopChat, request, timeout, may_repeat=bool(turn_id))

    def _stream(self, request: pb.ChatRequest, timeout: float, retry: bool) -> AsyncChatStream:
        def start(
            request: pb.ChatRequest, seconds: float
        ) -> _Call[pb.ChatRequest, pb.ChatResponse]:
            return self._open().Chat(request, timeout=seconds)

        return AsyncChatStream(start, request, timeout, retry)

    def _open(self) -> ChatMemoryAsyncStub:
        if self._closed:
            raise ValueError("the client is closed")
        loop = asyncio.get_running_loop()
        stub = self._stubs.get(loop)
        if stub is None:
            for other in [other for other in self._stubs if other.is_closed()]:
                del self._stubs[other]
            stub = self._stubs[loop] = ChatMemoryStub(_channel.take_aio(self._target))
        return stub

    async def _call(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        timeout: float | None,
        may_repeat: bool = True,
    ) -> _Response:
        attempts = Attempts(self._timeout if timeout is None else timeout)
        while True:
            try:
                return await method(request, timeout=attempts.time_left())
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            pause = attempts.pause_after(error) if may_repeat and passes(error) else None
            if pause is None:
                raise error
            await asyncio.sleep(pause)


class _AsyncStream(StreamState[_Asked, _Answered, _Event]):
    """A stream that goes on by itself when it breaks off."""

    def _begin(
        self,
        start: Callable[[_Asked, float], _Call[_Asked, _Answered]],
        timeout: float,
        retry: bool,
    ) -> None:
        self._start = start
        self._timeout = timeout
        self._retry = retry
        self._attempts: Attempts | None = None
        self._call: _Call[_Asked, _Answered] | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Event:
        if self._closed or self._is_over:
            raise StopAsyncIteration
        if self._is_stale:
            self._is_stale = False
            if self._call is not None:
                self._call.cancel()
            self._call = None
        try:
            response = await self._next()
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled():
                # The stream was closed by another task, this one was not cancelled.
                raise StopAsyncIteration from None
            self._cancel()
            raise
        return self._take(response)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels the stream. Safe to repeat."""
        self._cancel()

    def _cancel(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def _next(self) -> _Answered:
        attempts = self._attempts = self._attempts or Attempts(self._timeout)
        while True:
            if self._call is None:
                self._call = self._start(self._request, attempts.time_left())
            try:
                response = await self._call.read()
                if isinstance(response, self._response_type):
                    attempts.succeeded()
                    return cast("_Answered", response)
                if self._closed or self._is_at_end:
                    self._cancel()
                    raise StopAsyncIteration
                error = self._cut()
            except grpc.RpcError as failure:
                error = from_rpc(failure)
            if self._closed:
                raise StopAsyncIteration
            may_repeat = self._retry and self._may_repeat(error)
            pause = attempts.pause_after(error) if may_repeat else None
            if pause is None:
                self._cancel()
                raise self._failed(error)
            self._call = None
            self._broke()
            await asyncio.sleep(pause)
            if self._closed:
                raise StopAsyncIteration


class AsyncChatStream(TurnState, _AsyncStream[pb.ChatRequest, pb.ChatResponse, Event]):
    """The events of one turn, to be read with `async for`. `ChatStream` says more.

    >>> async for event in client.chat("demo", "hi"):  # doctest: +SKIP
    ...     match event:
    ...         case Delta(text=text):
    ...             print(text, end="")
    ...         case Completed():
    ...             print("\\nstored")

    `aclose` cancels the stream, and so do leaving an `async with` block and cancelling the task
    that waits for an event.
    """

    def __init__(
        self,
        start: Callable[[pb.ChatRequest, float], _Call[pb.ChatRequest, pb.ChatResponse]],
        request: pb.ChatRequest,
        timeout: float,
        retry: bool,
    ) -> None:
        super().__init__(request)
        self._begin(start, timeout, retry)

    async def text(self) -> str:
        """Reads the stream to its end, and returns the text of the stored answer."""
        async for _ in self:
            pass
        if self.answer is None:
            raise self._cut()
        return self.answer.content


class AsyncWatchStream(WatchState, _AsyncStream[pb.WatchRequest, pb.WatchResponse, WatchEvent]):
    """What a watched session holds and what comes, to be read with `async for`. `WatchStream` says
    more.

    >>> async with client.watch("demo") as events:  # doctest: +SKIP
    ...     async for event in events:
    ...         if isinstance(event, Message):
    ...             print(event.content)

    `aclose` ends it, and so do leaving the `async with` block and cancelling the task that waits
    for an event.
    """

    def __init__(
        self,
        start: Callable[[pb.WatchRequest, float], _Call[pb.WatchRequest, pb.WatchResponse]],
        request: pb.WatchRequest,
        retry: bool,
    ) -> None:
        super().__init__(request)
        self._begin(start, math.inf, retry)


def _is_cancelled() -> bool:
    """Whether the running task itself was asked to end. Python 3.10 does not say: then yes."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return cancelling is None or cancelling() > 0
