"""A server that fails as told, to see what the client does then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from chat_memory._proto import chat_memory_pb2 as pb
from chat_memory._proto import chat_memory_pb2_grpc


class Failure:
    """A status with details, as the real server sends them."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        retry_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        self.code = code
        status = status_pb2.Status(
            code=getattr(code_pb2, code.name), message=f"told to fail: {reason}"
        )
        info = error_details_pb2.ErrorInfo(reason=reason, domain="chatmemory.v1", metadata=metadata)
        details = [info]
        if retry_seconds is not None:
            delay = duration_pb2.Duration(nanos=int(retry_seconds * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        self.status = status

    def end(self, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(
            (("grpc-status-details-bin", self.status.SerializeToString()),)
        )
        context.abort(self.code, self.status.message)


class Fake(chat_memory_pb2_grpc.ChatMemoryServicer):
    """Fails each call with the next of `failures`, and succeeds when there are none left. So many
    streams as `ends_early` says end without `completed`."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.fail_after_events = 0
        self.requests: list[Any] = []
        self.cancelled = futures.Future[None]()
        self.wait_for_cancel = False
        self.ends_early = 0

    def _next(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failures:
            self.failures.pop(0).end(context)

    def Append(self, request: Any, context: Any) -> pb.AppendResponse:  # noqa: N802
        self._next(request, context)
        return pb.AppendResponse(messages=request.messages)

    def GetMessages(self, request: Any, context: Any) -> pb.GetMessagesResponse:  # noqa: N802
        self._next(request, context)
        return pb.GetMessagesResponse()

    def Clear(self, request: Any, context: Any) -> pb.ClearResponse:  # noqa: N802
        self._next(request, context)
        return pb.ClearResponse(deleted_count=3)

    def StopChat(self, request: Any, context: Any) -> pb.StopChatResponse:  # noqa: N802
        self._next(request, context)
        return pb.StopChatResponse(turn_id=request.turn_id)

    def GetSession(self, request: Any, context: Any) -> pb.GetSessionResponse:  # noqa: N802
        self._next(request, context)
        return pb.GetSessionResponse()

    def UpdateSession(self, request: Any, context: Any) -> pb.UpdateSessionResponse:  # noqa: N802
        self._next(request, context)
        return pb.UpdateSessionResponse()

    def ListSessions(self, request: Any, context: Any) -> pb.ListSessionsResponse:  # noqa: N802
        self._next(request, context)
        return pb.ListSessionsResponse()

    def Rewind(self, request: Any, context: Any) -> pb.RewindResponse:  # noqa: N802
        self._next(request, context)
        return pb.RewindResponse()

    def Fork(self, request: Any, context: Any) -> pb.ForkResponse:  # noqa: N802
        self._next(request, context)
        return pb.ForkResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[pb.WatchResponse]:  # noqa: N802
        self._next(request, context)
        yield pb.WatchResponse(live=pb.Live(last_sequence=request.after_sequence))

    def Chat(self, request: Any, context: Any) -> Iterator[pb.ChatResponse]:  # noqa: N802
        self.requests.append(request)
        if self.wait_for_cancel:
            context.add_callback(lambda: self.cancelled.set_result(None))
        if self.failures and not self.fail_after_events:
            self.failures.pop(0).end(context)
        if request.resume_after < 1:
            yield pb.ChatResponse(event_number=1, started=pb.Started(turn_id=request.turn_id))
        if request.resume_after < 2:
            yield pb.ChatResponse(event_number=2, delta=pb.Delta(text="he"))
        if self.wait_for_cancel:
            self.cancelled.result(30)
            return
        if self.failures:
            self.failures.pop(0).end(context)
        if self.ends_early > 0:
            self.ends_early -= 1
            return
        if request.resume_after < 3:
            yield pb.ChatResponse(event_number=3, delta=pb.Delta(text="llo"))
        if request.resume_after < 4:
            answer = pb.Message(role=pb.ROLE_ASSISTANT, content="hello")
            completed = pb.Completed(messages=[*request.messages, answer])
            yield pb.ChatResponse(event_number=4, completed=completed)


@contextlib.contextmanager
def fake_server() -> Iterator[tuple[Fake, str]]:
    """The fake, and its target."""
    fake = Fake()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    chat_memory_pb2_grpc.add_ChatMemoryServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(30)
