"""Errors of the server as exceptions. Knows no channel and no retry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request, and the rule that it breaks."""

    field: str
    """The field's path in the request, such as `messages[0].role`."""
    description: str
    """The rule."""


class ChatMemoryError(Exception):
    """A call failed. Catch a subclass to handle one kind of failure, this class for all of them."""

    code: grpc.StatusCode
    """gRPC's status code."""
    reason: str
    """The server's stable name for what went wrong, such as `STORE_UNAVAILABLE`. Empty if the
    failure did not come from the server (nobody listens, the connection broke, no time left)."""
    message: str
    """What went wrong, for people."""
    metadata: Mapping[str, str]
    """Facts on the failure, by name: what the proto says at the reason."""
    field_violations: tuple[FieldViolation, ...]
    """The fields of the request that are at fault."""
    retry_delay: float | None
    """Seconds after which the server thinks that trying again makes sense."""
    turn_id: str | None
    """The turn that failed, if `chat` did. Another `chat` with this id gets the same turn."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_violations = field_violations
        self.retry_delay = retry_delay
        self.turn_id = None

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.message}"


class InvalidArgument(ChatMemoryError):
    """A rule that the proto states at a field is broken; `field_violations` names the field."""


class Aborted(ChatMemoryError):
    """Somebody else was quicker."""


class SequenceMismatch(Aborted):
    """The session went on: its last sequence is not the one that the call expected."""

    @property
    def last_sequence(self) -> int:
        """The session's real last sequence."""
        return int(self.metadata.get("last_sequence", "0"))


class TurnInProgress(Aborted):
    """The session has a running turn."""

    @property
    def running_turn_id(self) -> str:
        """The id of the turn that runs."""
        return self.metadata.get("turn_id", "")


class SessionCleared(Aborted):
    """The session was cleared while the turn ran, so nothing of the turn was stored."""


class NotFound(ChatMemoryError):
    """There is no such turn, or none runs; or there is no such session."""


class AlreadyExists(ChatMemoryError):
    """The session that was to be made has messages."""


class FailedPrecondition(ChatMemoryError):
    """The call cannot succeed as things are: the store's data or the model's refusal prevent it."""


class ResourceExhausted(ChatMemoryError):
    """A limit was reached."""


class Unavailable(ChatMemoryError):
    """The server, its store or its model cannot be reached. Nothing was stored, unless the reason
    is empty (see `OutcomeUnknown` for what to do then)."""


class OutcomeUnknown(Unavailable):
    """The write may have been stored, or not. Repeat the call with the same `request_id` or
    `turn_id` to learn it; it is never stored twice."""


class DeadlineExceeded(ChatMemoryError):
    """The time ran out. A write may have been stored: repeat it with the same `request_id`."""


class NotImplementedByServer(ChatMemoryError):
    """The server does not know this yet."""


class Unauthenticated(ChatMemoryError):
    """The server wants to know who is calling."""


class PermissionDenied(ChatMemoryError):
    """The caller may not do this."""


class Cancelled(ChatMemoryError):
    """The call was cancelled."""


class InternalError(ChatMemoryError):
    """A defect of the server."""


_BY_REASON: dict[str, type[ChatMemoryError]] = {
    "SEQUENCE_MISMATCH": SequenceMismatch,
    "TURN_IN_PROGRESS": TurnInProgress,
    "SESSION_CLEARED": SessionCleared,
    "OUTCOME_UNKNOWN": OutcomeUnknown,
}

_BY_CODE: dict[grpc.StatusCode, type[ChatMemoryError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServer,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: InternalError,
}

_DETAILS_KEY = "grpc-status-details-bin"


def from_rpc(error: grpc.RpcError) -> ChatMemoryError:
    """The exception for what a stub raised, with the details that the server sent."""
    # What stubs raise is a `grpc.Call` too; `grpc.aio.AioRpcError` has the same three methods.
    call = cast("grpc.Call", error)
    code = call.code() or grpc.StatusCode.UNKNOWN
    reason, facts = "", {}
    violations: list[FieldViolation] = []
    retry_delay: float | None = None
    for detail in _details(call):
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, facts = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_delay = retry.retry_delay.ToNanoseconds() / 1e9
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, ChatMemoryError)
    return kind(
        call.details() or "no details",
        code=code,
        reason=reason,
        metadata=facts,
        field_violations=tuple(violations),
        retry_delay=retry_delay,
    )


def _details(call: grpc.Call) -> list[Any]:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []
