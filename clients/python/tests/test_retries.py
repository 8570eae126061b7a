"""What the client does when a server fails: against a server that fails as told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest
from fake import Failure, Fake, fake_server

import chat_memory
from chat_memory import AsyncClient, Client, Completed, Delta, Started, user

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    with fake_server() as both:
        yield both


def test_a_write_is_repeated_under_one_id_until_its_outcome_is_known(
    fake: tuple[Fake, str],
) -> None:
    server, target = fake
    server.failures = [
        Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.01),
        Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01),
    ]
    with Client(target) as client:
        client.append("s", [user("hi")])
    ids = {request.request_id for request in server.requests}
    assert len(server.requests) == 3
    assert len(ids) == 1
    assert len(ids.pop()) == 36


def test_each_call_has_an_id_of_its_own(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        client.append("s", [user("hi")])
        client.append("s", [user("hi")])
    assert len({request.request_id for request in server.requests}) == 2


def test_the_delay_that_the_server_asks_for_is_kept(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.4)]
    with Client(target) as client:
        start = time.monotonic()
        assert client.clear("s") == 3
    assert time.monotonic() - start >= 0.4


def test_a_delay_beyond_the_deadline_is_not_waited_for(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.9)]
    with Client(target, timeout=0.8) as client:
        start = time.monotonic()
        with pytest.raises(chat_memory.OutcomeUnknown) as caught:
            client.append("s", [user("hi")])
    assert time.monotonic() - start < 0.8
    assert caught.value.retry_delay == pytest.approx(0.9)
    assert len(server.requests) == 1


def test_what_does_not_pass_is_not_repeated(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        for code, reason, kind in [
            (grpc.StatusCode.ABORTED, "SESSION_CLEARED", chat_memory.SessionCleared),
            (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_KEY_TYPE", chat_memory.FailedPrecondition),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL", chat_memory.ResourceExhausted),
            (grpc.StatusCode.INTERNAL, "INTERNAL", chat_memory.InternalError),
            (grpc.StatusCode.DATA_LOSS, "NEW", chat_memory.ChatMemoryError),
        ]:
            server.requests.clear()
            server.failures = [Failure(code, reason, key="k")]
            with pytest.raises(kind) as caught:
                client.append("s", [user("hi")])
            assert (caught.value.reason, caught.value.code) == (reason, code)
            assert caught.value.metadata == {"key": "k"}
            assert len(server.requests) == 1


def test_a_limit_that_frees_itself_is_waited_for(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", 0.01)]
    with Client(target) as client:
        client.get_messages("s")
    assert len(server.requests) == 2


def test_a_turn_is_repeated_under_one_id_before_its_first_event(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, "SHUTTING_DOWN", 0.01)] * 2
    with Client(target) as client:
        assert client.chat("s", "hi").text() == "hello"
    assert len(server.requests) == 3
    assert len({request.turn_id for request in server.requests}) == 1


@pytest.mark.parametrize("reason", ["", "SHUTTING_DOWN", "STORE_UNAVAILABLE", "OUTCOME_UNKNOWN"])
def test_a_stream_that_breaks_off_goes_on_after_its_last_event(
    fake: tuple[Fake, str], reason: str
) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, reason, 0.01)] * 2
    server.fail_after_events = 2
    with Client(target) as client:
        stream = client.chat("s", "hi")
        events = list(stream)
    assert [type(event) for event in events] == [Started, Delta, Delta, Completed]
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "hello"
    assert stream.event_number == 4
    # It is followed, not begun: a turn that was cleared meanwhile must not come back.
    first, *others = server.requests
    assert first.messages
    assert [(list(r.messages), r.turn_id, r.resume_after) for r in others] == [
        ([], stream.turn_id, 2)
    ] * 2


def test_a_stream_that_ends_too_early_goes_on_too(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.ends_early = 1
    with Client(target) as client:
        assert client.chat("s", "hi").text() == "hello"
    assert [request.resume_after for request in server.requests] == [0, 2]


@pytest.mark.parametrize("reason", ["MODEL_STREAM_BROKEN", "MODEL_UNAVAILABLE", "TURN_ABANDONED"])
def test_a_turn_that_failed_is_not_asked_for_again_after_its_first_event(
    fake: tuple[Fake, str], reason: str
) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, reason, 0.01)]
    server.fail_after_events = 2
    with Client(target) as client:
        stream = client.chat("s", "hi")
        with pytest.raises(chat_memory.Unavailable) as caught:
            stream.text()
        assert caught.value.turn_id == stream.turn_id == server.requests[0].turn_id
        assert len(server.requests) == 1
        assert client.chat("s", "hi", turn_id=caught.value.turn_id).text() == "hello"


def test_a_stream_without_retry_raises_what_breaks_it(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        for fail_after_events in (0, 2):
            server.requests.clear()
            server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01)]
            server.fail_after_events = fail_after_events
            stream = client.chat("s", "hi", retry=False)
            with pytest.raises(chat_memory.OutcomeUnknown) as caught:
                stream.text()
            assert len(server.requests) == 1
            assert caught.value.turn_id == stream.turn_id
            assert stream.event_number == fail_after_events
        rest = client.resume("s", stream.turn_id, stream.event_number, retry=False)
        assert [type(event) for event in rest] == [Delta, Completed]


def test_a_stream_goes_on_within_its_time_only(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.2)] * 100
    server.fail_after_events = 2
    with Client(target) as client, pytest.raises(chat_memory.Unavailable):
        client.chat("s", "hi", timeout=1).text()
    assert 2 <= len(server.requests) <= 6


def test_a_turn_is_resumed_after_the_event_that_was_named(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        assert [type(event) for event in client.resume("s", "t", 2)] == [Delta, Completed]
        assert client.resume("s", "t").text() == "hello"
        # There is nothing after the last.
        assert list(client.resume("s", "t", 4)) == []
        server.failures = [Failure(grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND")]
        with pytest.raises(chat_memory.NotFound) as caught:
            client.resume("s", "t").text()
    assert caught.value.turn_id == "t"
    assert [request.resume_after for request in server.requests] == [2, 0, 4, 0]
    assert not any(request.messages for request in server.requests)


def test_a_stop_is_repeated_only_if_it_names_its_turn(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.01)]
        assert client.stop("s", "t", discard=True).turn_id == "t"
        assert [request.discard for request in server.requests] == [True, True]
        server.requests.clear()
        server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.01)]
        with pytest.raises(chat_memory.Unavailable):
            client.stop("s")
        assert len(server.requests) == 1


def test_a_running_turn_is_named(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(grpc.StatusCode.ABORTED, "TURN_IN_PROGRESS", 0.01, turn_id="t9")]
    with Client(target) as client, pytest.raises(chat_memory.TurnInProgress) as caught:
        client.chat("s", "hi").text()
    assert caught.value.running_turn_id == "t9"


def test_nothing_is_sent_before_the_first_event_is_asked_for(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client, client.chat("s", "hi"):
        pass
    assert server.requests == []


def test_closing_a_stream_cancels_it(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.wait_for_cancel = True
    with Client(target) as client:
        with client.chat("s", "hi") as stream:
            assert isinstance(next(stream), Started)
        server.cancelled.result(30)
        assert list(stream) == []


async def test_the_async_client_repeats_in_the_same_way(fake: tuple[Fake, str]) -> None:
    server, target = fake
    async with AsyncClient(target) as client:
        server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01)] * 2
        await client.append("s", [user("hi")])
        assert len({request.request_id for request in server.requests}) == 1
        assert len(server.requests) == 3

        server.requests.clear()
        server.failures = [Failure(UNAVAILABLE, "SHUTTING_DOWN", 0.01)]
        assert await client.chat("s", "hi").text() == "hello"
        assert len({request.turn_id for request in server.requests}) == 1
        assert len(server.requests) == 2

        server.fail_after_events = 2
        server.failures = [Failure(UNAVAILABLE, "MODEL_STREAM_BROKEN", 0.01)]
        with pytest.raises(chat_memory.Unavailable) as caught:
            await client.chat("s", "hi").text()
        assert caught.value.turn_id

        server.requests.clear()
        server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01)] * 2
        server.ends_early = 1
        stream = client.chat("s", "hi")
        kinds = [type(event) async for event in stream]
        assert kinds == [Started, Delta, Delta, Completed]
        assert [request.resume_after for request in server.requests] == [0, 2, 2, 2]
        server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01)]
        with pytest.raises(chat_memory.OutcomeUnknown):
            await client.chat("s", "hi", retry=False).text()

        server.requests.clear()
        assert await client.resume("s", "t", 3).text() == "hello"
        assert [event async for event in client.resume("s", "t", 4)] == []
        server.fail_after_events = 0
        server.failures = [Failure(grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND")]
        with pytest.raises(chat_memory.NotFound):
            await client.resume("s", "t").text()

        server.requests.clear()
        server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.01)] * 2
        assert (await client.stop("s", "t")).turn_id == "t"
        assert len(server.requests) == 3
        server.failures = [Failure(UNAVAILABLE, "STORE_UNAVAILABLE", 0.01)]
        with pytest.raises(chat_memory.Unavailable):
            await client.stop("s")


async def test_closing_an_async_stream_cancels_it(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.wait_for_cancel = True
    async with AsyncClient(target) as client:
        async with client.chat("s", "hi") as stream:
            assert isinstance(await anext(stream), Started)
        await asyncio.wrap_future(server.cancelled)
        assert [event async for event in stream] == []


async def test_cancelling_the_task_that_reads_cancels_the_stream(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.wait_for_cancel = True
    began = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.chat("s", "hi"):
            began.set()

    async with AsyncClient(target) as client:
        task = asyncio.create_task(read(client))
        await asyncio.wait_for(began.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wrap_future(server.cancelled)
