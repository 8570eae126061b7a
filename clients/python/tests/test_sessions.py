"""Sessions as a whole: against a server that does as told."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator

import grpc
import pytest
from fake import Failure, Fake, fake_server

import chat_memory
from chat_memory import AsyncClient, Cleared, Client, Live, Message, Rewound, Session, Skipped
from chat_memory._proto import chat_memory_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    with fake_server() as both:
        yield both


def message(sequence: int) -> pb.WatchResponse:
    return pb.WatchResponse(message=Message(sequence=sequence))


def live(last_sequence: int) -> pb.WatchResponse:
    return pb.WatchResponse(live=Live(last_sequence=last_sequence))


def away() -> Failure:
    return Failure(UNAVAILABLE, "SHUTTING_DOWN", 0.01)


async def test_sessions_are_listed_over_all_pages(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.sessions = [Session(session_id=name) for name in "abcde"]
    with Client(target) as client:
        listed = client.list_sessions(id_prefix="x", metadata={"k": "v"}, page_size=2)
        assert [session.session_id for session in listed] == list("abcde")
    assert [request.page_token for request in server.requests] == ["", "2", "4"]
    assert all(
        (request.id_prefix, dict(request.metadata), request.page_size) == ("x", {"k": "v"}, 2)
        for request in server.requests
    )
    async with AsyncClient(target) as client:
        names = [session.session_id async for session in client.list_sessions()]
    assert names == list("abcde")


async def test_an_update_names_what_it_changes(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        client.update_session("s", title="")
        client.update_session("s", metadata={})
        client.update_session("s", title="t", metadata={"k": "v"})
        client.update_session("s", ttl="never")
        client.update_session("s", ttl="default")
        client.update_session("s", ttl=datetime.timedelta(days=30))
    async with AsyncClient(target) as client:
        assert (await client.update_session("s", title="t")).title == "t"
    paths = [list(request.update_mask.paths) for request in server.requests]
    ttl = [["ttl"]] * 3
    assert paths == [["title"], ["metadata"], ["title", "metadata"], *ttl, ["title"]]
    sessions = [request.session for request in server.requests]
    assert (sessions[2].title, dict(sessions[2].metadata)) == ("t", {"k": "v"})
    times = [session.ttl.seconds if session.HasField("ttl") else None for session in sessions[3:6]]
    assert times == [0, None, 30 * 24 * 3600]


async def test_a_rewind_is_repeated_under_one_id(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.failures = [Failure(UNAVAILABLE, "OUTCOME_UNKNOWN", 0.01)]
    with Client(target) as client:
        assert client.rewind("s", 0) == 2
    first, second = server.requests
    assert first == second
    assert first.HasField("after_sequence")
    assert len(first.request_id) == 36
    async with AsyncClient(target) as client:
        assert await client.rewind("s", 3, "mine", stop_turn=True) == 2
    last = server.requests[-1]
    assert (last.after_sequence, last.request_id, last.stop_turn) == (3, "mine", True)


async def test_a_fork_returns_the_new_session(fake: tuple[Fake, str]) -> None:
    server, target = fake
    with Client(target) as client:
        assert client.fork("s", "new").session_id == "new"
    async with AsyncClient(target) as client:
        assert (await client.fork("s", "new", 7)).session_id == "new"
    through = [request.HasField("through_sequence") for request in server.requests]
    assert through == [False, True]
    assert server.requests[1].through_sequence == 7


async def test_what_is_missing_or_in_the_way_is_an_exception_of_its_own(
    fake: tuple[Fake, str],
) -> None:
    server, target = fake
    missing = Failure(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    exists = Failure(grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
    server.failures = [missing, exists, missing]
    with Client(target) as client:
        with pytest.raises(chat_memory.NotFound):
            client.get_session("s")
        with pytest.raises(chat_memory.AlreadyExists) as caught:
            client.fork("s", "new")
        assert caught.value.reason == "SESSION_EXISTS"
        async with AsyncClient(target) as other:
            with pytest.raises(chat_memory.NotFound):
                await other.get_session("s")
        assert client.get_session("s").session_id == "s"
    assert len(server.requests) == 4


Script = list[list[pb.WatchResponse | Failure]]


def broken_watches() -> Script:
    """Watches that break in every way that mends."""
    rewound = pb.WatchResponse(rewound=Rewound(last_sequence=6))
    skipped = pb.WatchResponse(skipped=Skipped(first_sequence=9))
    cleared = pb.WatchResponse(cleared=Cleared())
    too_slow = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW")
    return [
        [message(6), live(6), message(7), away()],
        [live(7), rewound, away()],
        [too_slow],
        [skipped, away()],
        [live(8), message(9), cleared, away()],
        [message(10), live(10)],
    ]


ASKED = [5, 7, 6, 6, 8, 0]
MESSAGES = [6, 7, 9, 10]


def test_a_watch_that_breaks_off_goes_on_after_its_last_message(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.watches = broken_watches()
    with Client(target) as client, client.watch("s", 5) as stream:
        sequences = []
        for event in stream:
            if isinstance(event, Message):
                sequences.append(event.sequence)
            elif event == Live(last_sequence=10):
                break
    assert sequences == MESSAGES
    assert stream.after_sequence == 10
    assert [request.after_sequence for request in server.requests] == ASKED


async def test_an_async_watch_goes_on_too(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.watches = broken_watches()
    async with AsyncClient(target) as client, client.watch("s", 5) as stream:
        sequences = []
        async for event in stream:
            if isinstance(event, Message):
                sequences.append(event.sequence)
            elif event == Live(last_sequence=10):
                break
    assert sequences == MESSAGES
    assert [request.after_sequence for request in server.requests] == ASKED


async def test_a_session_that_began_anew_while_a_watch_was_away_comes_whole(
    fake: tuple[Fake, str],
) -> None:
    server, target = fake
    # A sequence beyond the last counts as the last.
    script: Script = [[message(6), live(6), away()], [live(1)], [message(1), live(1)]]
    expected = [Message(sequence=6), Live(last_sequence=6), Cleared(), Message(sequence=1)]
    server.watches = [*script, *script]
    with Client(target) as client, client.watch("s") as stream:
        assert [next(stream) for _ in expected] == expected
    async with AsyncClient(target) as other, other.watch("s") as others:
        assert [await anext(others) for _ in expected] == expected
    assert [request.after_sequence for request in server.requests] == [0, 6, 0] * 2


def test_a_watch_raises_what_does_not_pass_and_everything_without_retry(
    fake: tuple[Fake, str],
) -> None:
    server, target = fake
    refused = Failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    server.watches = [[refused], [message(1), away()]]
    with Client(target) as client:
        with pytest.raises(chat_memory.InvalidArgument):
            next(client.watch("s"))
        stream = client.watch("s", retry=False)
        next(stream)
        with pytest.raises(chat_memory.Unavailable):
            next(stream)
    assert stream.after_sequence == 1
    assert len(server.requests) == 2


async def test_a_watch_that_is_closed_ends(fake: tuple[Fake, str]) -> None:
    server, target = fake
    server.watches = [[live(0)], [live(0)]]
    with Client(target) as client:
        stream = client.watch("s")
        next(stream)
        stream.close()
        assert list(stream) == []
    async with AsyncClient(target) as client:
        others = client.watch("s")
        await anext(others)
        waiting = asyncio.ensure_future(anext(others, None))
        await asyncio.sleep(0)
        await others.aclose()
        assert await waiting is None
