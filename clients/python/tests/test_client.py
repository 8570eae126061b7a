"""The client against the real server."""

from __future__ import annotations

import asyncio
import threading

import pytest
from conftest import Server
from loopback_openai import Provider

import chat_memory
from chat_memory import (
    AsyncClient,
    ChatMemoryError,
    Client,
    Completed,
    Delta,
    Started,
    _channel,
    assistant,
    system,
    tool,
    tool_call,
    user,
)


def test_messages_come_back_as_they_were_given(target: str, session_id: str) -> None:
    given = [
        system("Be kind."),
        user("What is 1 + 2?", id="mine", name="ann"),
        assistant(tool_calls=[tool_call("c1", "add", {"a": 1, "b": 2})]),
        tool("c1", "3", name="add"),
        assistant([chat_memory.text_part("It is "), chat_memory.text_part("3.")]),
    ]
    with Client(target) as client:
        stored = client.append(session_id, given)
        read = list(client.messages(session_id))
    assert read == stored
    assert [message.sequence for message in read] == [1, 2, 3, 4, 5]
    assert [message.role for message in read] == [message.role for message in given]
    assert (read[1].id, read[1].name, read[1].content) == ("mine", "ann", "What is 1 + 2?")
    assert read[2].tool_calls[0].arguments == '{"a": 1, "b": 2}'
    assert (read[3].tool_call_id, read[3].content) == ("c1", "3")
    assert read[4].content == "It is 3."


def test_a_session_is_read_page_by_page_in_either_direction(target: str, session_id: str) -> None:
    with Client(target) as client:
        for start in range(0, 250, 50):
            client.append(session_id, [user(str(n)) for n in range(start, start + 50)])
        page = client.get_messages(session_id, page_size=20)
        assert len(page.messages) == 20
        assert page.next_page_token
        everything = [message.content for message in client.messages(session_id, page_size=70)]
        assert everything == [str(n) for n in range(250)]
        backwards = [message.content for message in client.messages(session_id, newest_first=True)]
        assert backwards == everything[::-1]
        last = [message.content for message in client.messages(session_id, last_messages=120)]
        assert last == everything[-120:]
        middle = client.messages(session_id, after_sequence=10, before_sequence=13)
        assert [message.sequence for message in middle] == [11, 12]


def test_a_repeated_request_id_stores_nothing_more(target: str, session_id: str) -> None:
    with Client(target) as client:
        first = client.append(session_id, [user("once")], request_id="r1")
        assert client.append(session_id, [user("once")], request_id="r1") == first
        assert len(list(client.messages(session_id))) == 1
        with pytest.raises(chat_memory.InvalidArgument) as caught:
            client.append(session_id, [user("twice")], request_id="r1")
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_a_condition_on_the_last_sequence_is_kept(target: str, session_id: str) -> None:
    with Client(target) as client:
        client.append(session_id, [user("a")], expected_last_sequence=0)
        with pytest.raises(chat_memory.SequenceMismatch) as caught:
            client.append(session_id, [user("b")], expected_last_sequence=0)
        assert caught.value.last_sequence == 1
        assert isinstance(caught.value, chat_memory.Aborted)
        client.append(session_id, [user("b")], expected_last_sequence=1)


def test_clear_says_how_many_messages_went(target: str, session_id: str) -> None:
    with Client(target) as client:
        client.append(session_id, [user("a"), assistant("b")])
        assert client.clear(session_id) == 2
        assert client.clear(session_id) == 0
        assert not client.get_messages(session_id).messages


def test_an_error_names_the_field_and_its_rule(target: str) -> None:
    with Client(target) as client, pytest.raises(chat_memory.InvalidArgument) as caught:
        client.clear("{braces}")
    error = caught.value
    assert (error.code.name, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert [violation.field for violation in error.field_violations] == ["session_id"]
    assert "must not contain" in error.field_violations[0].description
    assert str(error).startswith("INVALID_FIELD: session_id")


def test_a_turn_streams_its_events_and_is_stored(target: str, session_id: str) -> None:
    with Client(target) as client:
        stream = client.chat(session_id, "Say it.")
        events = list(stream)
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Completed)
        deltas = [event.text for event in events if isinstance(event, Delta)]
        assert len(deltas) == len(events) - 2
        assert "".join(deltas) == "You said: Say it."
        assert events[0].turn_id == stream.turn_id
        assert stream.event_number == len(events)
        assert stream.answer == client.get_messages(session_id).messages[-1]


def test_a_repeated_turn_id_gets_the_stored_answer(target: str, session_id: str) -> None:
    with Client(target) as client:
        first = client.chat(session_id, user("hi"), turn_id="t1")
        assert first.text() == "You said: hi"
        again = client.chat(session_id, user("hi"), turn_id="t1")
        assert again.text() == "You said: hi"
        assert again.answer == first.answer
        assert len(client.get_messages(session_id).messages) == 2


def test_a_turn_is_resumed_and_followed_by_many(asking: tuple[Server, Provider]) -> None:
    server, provider = asking
    with Client(server.target) as client:
        provider.hold()
        with client.chat("s", "hi all", turn_id="t") as stream:
            assert isinstance(next(stream), Started)
            assert next(stream) == Delta(text="You ")
        followers = [client.resume("s", "t", after) for after in (0, 1, 2)]
        assert isinstance(next(followers[0]), Started)
        assert next(followers[1]) == Delta(text="You ")
        provider.let_go()
        for follower in followers:
            assert follower.text() == "You said: hi all "
        assert len(provider.requests) == 1
        last = followers[0].event_number
        assert [type(event) for event in client.resume("s", "t", last - 1)] == [Completed]
        assert list(client.resume("s", "t", last)) == []
        with pytest.raises(chat_memory.NotFound) as caught:
            client.resume("s", "other").text()
        assert (caught.value.reason, caught.value.turn_id) == ("TURN_NOT_FOUND", "other")


def test_a_turn_is_stopped_and_keeps_its_answer_or_not(asking: tuple[Server, Provider]) -> None:
    server, provider = asking
    with Client(server.target) as client:
        provider.hold()
        for turn_id, name, discard in [("t", "", False), ("u", "u", True)]:
            stream = client.chat("s", "hi", turn_id=turn_id)
            assert isinstance(next(stream), Started)
            assert next(stream) == Delta(text="You ")
            stopped = client.stop("s", name, discard)
            assert stopped.turn_id == turn_id
            if discard:
                assert list(stopped.messages) == []
                with pytest.raises(chat_memory.Aborted) as caught:
                    stream.text()
                assert caught.value.reason == "TURN_STOPPED"
            else:
                assert [message.content for message in stopped.messages] == ["hi", "You "]
                assert stopped.messages[1].interrupted
                assert stream.text() == "You "
        assert client.stop("s", "t").messages == client.get_messages("s").messages
        with pytest.raises(chat_memory.NotFound):
            client.stop("s")


def test_a_stream_goes_on_over_a_server_that_dies(asking: tuple[Server, Provider]) -> None:
    server, provider = asking
    with Client(server.target) as client:
        provider.hold()
        stream = client.chat("s", "hi")
        events = [next(stream), next(stream)]
        server.kill()
        provider.let_go()
        restart = threading.Timer(0.3, server.start)
        restart.start()
        events += stream
        restart.join()
        attempts = [event.attempt for event in events if isinstance(event, Started)]
        assert attempts == [1, 2]
        assert stream.started == events[[type(e) for e in events].index(Started, 1)]
        assert stream.answer is not None
        assert stream.answer.content == "You said: hi "
        contents = [message.content for message in client.messages("s")]
        assert contents == ["hi", "You said: hi "]


async def test_the_async_client_resumes_and_stops(asking: tuple[Server, Provider]) -> None:
    server, provider = asking
    async with AsyncClient(server.target) as client:
        provider.hold()
        stream = client.chat("s", "hi", turn_id="t")
        events = [await anext(stream), await anext(stream)]
        server.kill()
        provider.let_go()
        restart = threading.Timer(0.3, server.start)
        restart.start()
        events += [event async for event in stream]
        restart.join()
        attempts = [event.attempt for event in events if isinstance(event, Started)]
        assert attempts == [1, 2]
        assert await client.resume("s", "t").text() == "You said: hi "
        stopped = await client.stop("s", "t")
        assert [message.content for message in stopped.messages] == ["hi", "You said: hi "]
        with pytest.raises(chat_memory.NotFound):
            await client.resume("s", "other").text()
        with pytest.raises(chat_memory.NotFound):
            await client.stop("s")


def test_a_server_is_reached_by_every_form_of_target(server: Server, session_id: str) -> None:
    tcp = next(address for address in server.addresses if address.startswith("127."))
    for target in (server.target, tcp, f"http://{tcp}", f"http://{tcp}/"):
        with Client(target) as client:
            client.append(session_id, [user("hi")])
    assert len(Client(server.target).get_messages(session_id).messages) == 4


@pytest.mark.parametrize(
    "target", ["", "host", "host:", ":1", "http://host", "ftp://host:1", "host:x", "unix:", "a:1/b"]
)
def test_a_target_that_is_none_is_refused_at_once(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        Client(target)


def test_the_target_may_come_from_the_environment(
    target: str, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_MEMORY_TARGET", target)
    with Client() as client:
        client.append(session_id, [user("hi")])


def test_clients_of_a_target_share_one_channel_and_the_last_one_closes_it(target: str) -> None:
    key = next((key for key in _channel._channels if key[1].address == target), None)
    before = _channel._channels[key].users if key else 0
    first, second = Client(target), Client(f"unix:{target.removeprefix('unix:')}")
    entry = next(e for key, e in _channel._channels.items() if key[1].address == target)
    assert entry.users == before + 2
    first.close()
    first.close()
    assert entry.users == before + 1
    with pytest.raises(ValueError, match="closed"):
        first.clear("x")
    assert second.clear("x") == 0
    second.close()
    assert entry.users == before


def test_one_client_serves_many_threads(target: str, session_id: str) -> None:
    with Client(target) as client:
        threads = [
            threading.Thread(target=lambda: client.append(session_id, [user("x"), user("y")]))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        contents = "".join(message.content for message in client.messages(session_id))
    assert contents == "xy" * 20


async def test_the_async_client_does_the_same(target: str, session_id: str) -> None:
    async with AsyncClient(target) as client:
        await client.append(session_id, [user("hi"), assistant("Hello!")])
        page = await client.get_messages(session_id, last_messages=1)
        assert [message.content for message in page.messages] == ["Hello!"]
        stream = client.chat(session_id, "again")
        events = [event async for event in stream]
        assert isinstance(events[-1], Completed)
        assert await client.chat(session_id, "and again").text() == "You said: and again"
        contents = [message.content async for message in client.messages(session_id, page_size=2)]
        assert contents[::2] == ["hi", "again", "and again"]
        assert await client.clear(session_id) == 6
        with pytest.raises(chat_memory.InvalidArgument):
            await client.clear("{}")
    with pytest.raises(ValueError, match="closed"):
        await client.clear(session_id)


async def test_many_calls_run_at_once(target: str, session_id: str) -> None:
    async with AsyncClient(target) as client:
        await asyncio.gather(*(client.append(session_id, [user("x")]) for _ in range(50)))
        sequences = [message.sequence async for message in client.messages(session_id)]
    assert sequences == list(range(1, 51))


def test_an_async_client_may_be_used_by_one_loop_after_the_other(
    target: str, session_id: str
) -> None:
    client = AsyncClient(target)
    for _ in range(3):
        asyncio.run(client.append(session_id, [user("x")]))

    async def count() -> int:
        number = len([message async for message in client.messages(session_id)])
        await client.close()
        return number

    assert asyncio.run(count()) == 3
    loops = [key[2] for key in _channel._aio_channels if key[1].address == target]
    assert len([loop for loop in loops if not loop.is_closed()]) == 0


def test_a_call_waits_for_a_server_that_restarts(own_server: Server) -> None:
    with Client(own_server.target, timeout=20) as client:
        client.append("s", [user("before")])
        own_server.kill()
        restart = threading.Timer(0.5, own_server.start)
        restart.start()
        client.append("s", [user("after")])
        restart.join()
        assert [message.content for message in client.messages("s")] == ["before", "after"]


def test_a_server_that_is_not_there_is_unavailable_within_the_time() -> None:
    with Client("unix:/nowhere/at/all", timeout=0.5) as client:
        with pytest.raises(chat_memory.Unavailable) as caught:
            client.append("s", [user("x")])
        with pytest.raises(chat_memory.Unavailable):
            client.chat("s", "x", timeout=0.3).text()
    assert caught.value.reason == ""


def test_a_window_says_its_tokens_and_is_refused_where_it_is_too_small(
    target: str, session_id: str
) -> None:
    with Client(target) as client:
        client.append(session_id, [user("hello"), user("hello")])
        window = client.get_messages(session_id, last_turns=1, model="gpt-4")
        assert [message.content for message in window.messages] == ["hello", "hello"]
        assert (window.token_count, window.tokenizer) == (13, "cl100k_base")
        with pytest.raises(ChatMemoryError) as refused:
            client.get_messages(session_id, max_tokens=12)
        assert refused.value.reason == "WINDOW_TOO_SMALL"
        with client.chat(session_id, "hello", max_tokens=1000, last_turns=1) as stream:
            for _ in stream:
                pass
        assert stream.started is not None
        assert stream.started.history_messages == 2
        assert stream.started.history_tokens == 10
