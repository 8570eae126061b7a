"""When a call is tried again. Knows no channel: it decides, the clients wait and call."""

from __future__ import annotations

import random
import time

import grpc

from chat_memory._errors import ChatMemoryError

# The first pause, doubled from one attempt to the next up to the longest.
PAUSE_FIRST_SECONDS = 0.05
PAUSE_LONGEST_SECONDS = 2.0
# A stream may take many minutes. If it did not even begin after this long, its caller should know.
RETRY_SECONDS_MAX = 30.0

# A turn that failed so is over: to follow it once more tells the same again. Only its request runs
# it anew, which is the caller's to decide: text that was shown cannot be taken back.
_TURN_FAILED = frozenset(
    {"MODEL_RATE_LIMITED", "MODEL_STREAM_BROKEN", "MODEL_UNAVAILABLE", "TURN_ABANDONED"}
)


class Attempts:
    """The attempts of one call, all within its time.

    Only for calls that carry an id, or that may be repeated for another reason: an attempt that
    failed may have been carried out.
    """

    def __init__(self, timeout: float) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + timeout
        self._pause = PAUSE_FIRST_SECONDS

    def succeeded(self) -> None:
        """Says that the call went on, so that a later failure is the first of a new row."""
        self._started = time.monotonic()
        self._pause = PAUSE_FIRST_SECONDS

    def time_left(self) -> float:
        """Seconds that the next attempt may take."""
        return max(self._deadline - time.monotonic(), 0.0)

    def pause_after(self, error: ChatMemoryError) -> float | None:
        """Seconds to wait before the next attempt; None if the time would run out."""
        pause = max(self._pause * random.uniform(0.5, 1.0), error.retry_delay or 0.0)
        self._pause = min(self._pause * 2, PAUSE_LONGEST_SECONDS)
        next_attempt = time.monotonic() + pause
        if next_attempt >= min(self._deadline, self._started + RETRY_SECONDS_MAX):
            return None
        return pause


def passes(error: ChatMemoryError) -> bool:
    """Whether the same call may well succeed a moment later."""
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    # A limit that frees itself; the server says so by a delay. (TOO_MANY_REQUESTS, for one.)
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_delay is not None


def may_go_on(error: ChatMemoryError) -> bool:
    """Whether a turn may well go on although a stream of it failed so: what broke is the way to it,
    its server or the store."""
    return passes(error) and error.reason not in _TURN_FAILED
