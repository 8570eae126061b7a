"""The client for asyncio. The same calls as `_client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from typing_extensions import Self

from chat_memory import _channel, _requests
from chat_memory._errors import from_rpc
from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._proto.chat_memory_pb2_grpc import ChatMemoryStub
from chat_memory._requests import CALL_SECONDS, CHAT_SECONDS, Event, TurnState
from chat_memory._retry import Attempts, passes

if TYPE_CHECKING:
    from chat_memory._proto.chat_memory_pb2_grpc import ChatMemoryAsyncStub

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


_Call: TypeAlias = "grpc.aio.UnaryStreamCall[pb.ChatRequest, pb.ChatResponse]"


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
        def start(request: pb.ChatRequest, seconds: float) -> _Call:
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


class AsyncChatStream(TurnState):
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
        start: Callable[[pb.ChatRequest, float], _Call],
        request: pb.ChatRequest,
        timeout: float,
        retry: bool,
    ) -> None:
        super().__init__(request)
        self._start = start
        self._timeout = timeout
        self._retry = retry
        self._attempts: Attempts | None = None
        self._call: _Call | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._closed or self.completed is not None:
            raise StopAsyncIteration
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

    async def text(self) -> str:
        """Reads the stream to its end, and returns the text of the stored answer."""
        async for _ in self:
            pass
        if self.answer is None:
            raise self._cut()
        return self.answer.content

    def _cancel(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def _next(self) -> pb.ChatResponse:
        attempts = self._attempts = self._attempts or Attempts(self._timeout)
        while True:
            if self._call is None:
                self._call = self._start(self._request, attempts.time_left())
            try:
                response = await self._call.read()
                if isinstance(response, pb.ChatResponse):
                    attempts.succeeded()
                    return response
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
            await asyncio.sleep(pause)
            if self._closed:
                raise StopAsyncIteration


def _is_cancelled() -> bool:
    """Whether the running task itself was asked to end. Python 3.10 does not say: then yes."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return cancelling is None or cancelling() > 0
