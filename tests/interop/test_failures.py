"""What LangChain reads after servers died or stalled in the middle of a turn: every turn whole, and
once. What its own chain does then is in test_chain.py."""

import signal
import threading

import pytest
from harness import Redis, Server, history, stored, tell, until
from provider import ANSWER, PIECES, Script


@pytest.fixture
def pair(provider):
    """A Redis of its own with two servers. Each takes over the other's turns after a second."""
    redis = Redis()
    provider.script, provider.prompts = Script(), []
    arguments = ["--model-url", provider.url, "--model", "scripted", "--lease-seconds", "1"]
    servers = [Server(redis, *arguments) for _ in range(2)]
    yield redis, *servers
    for server in servers:
        server.end()
    redis.kill()


def begin(server, provider, session):
    """Begins a turn that says its first piece, and the next when the event is set."""
    go = threading.Event()
    provider.script = Script(before={1: lambda: go.wait(20)})
    stream = server.chat(session, "hi", turn_id="t")
    while not (event := next(stream)).delta.text:
        pass
    assert event.delta.text == PIECES[0]
    # The next attempt says all at once.
    provider.script = Script()
    return stream, event, go


def watch(stream):
    """The attempts that a follower was told of, and the text of the last one."""
    attempts, text = [], ""
    for event in stream:
        if event.HasField("started"):
            attempts.append(event.started.attempt)
            text = ""
        text += event.delta.text
    assert event.HasField("completed")
    assert [message.content for message in event.completed.messages] == ["hi", text]
    return attempts, text


def goes_on(redis, server, session):
    """LangChain and we can both go on with the session."""
    history(redis, session).add_user_message("and theirs")
    assert tell(server.chat(session, "and ours")) == (ANSWER, "")
    assert stored(redis, session) == ["hi", ANSWER, "and theirs", "and ours", ANSWER]


def test_a_server_is_killed_in_mid_turn_and_another_finishes_it(pair, provider, session):
    redis, first, second = pair
    _, event, go = begin(first, provider, session)
    follower = second.follow(session, "t")
    assert stored(redis, session) == []
    first.end()
    go.set()
    attempts, text = watch(follower)
    assert (attempts[-1], text) == (2, ANSWER)
    assert stored(redis, session) == ["hi", ANSWER]
    assert [m.type.removesuffix("MessageChunk").lower() for m in history(redis, session).messages] == [
        "human",
        "ai",
    ]
    # Whoever was at the dead server goes on after its last event, or asks the same again.
    resumed = second.follow(session, "t", resume_after=event.event_number)
    assert watch(resumed) == ([2], ANSWER)
    assert watch(second.chat(session, "hi", turn_id="t"))[1] == ANSWER
    assert len(provider.prompts) == 2
    goes_on(redis, second, session)


def test_a_server_is_killed_in_mid_turn_and_nobody_asks(pair, provider, session):
    redis, first, second = pair
    _, _, go = begin(first, provider, session)
    first.end()
    go.set()
    until("the turn is adopted", lambda: stored(redis, session))
    assert stored(redis, session) == ["hi", ANSWER]
    assert len(provider.prompts) == 2
    goes_on(redis, second, session)


def test_a_server_stalls_in_mid_turn_and_comes_back_too_late(pair, provider, session):
    redis, first, second = pair
    stream, _, go = begin(first, provider, session)
    first.child.send_signal(signal.SIGSTOP)
    attempts, text = watch(second.chat(session, "hi", turn_id="t"))
    assert (attempts[-1], text) == (2, ANSWER)
    go.set()
    first.child.send_signal(signal.SIGCONT)
    # Its own client is told what was stored.
    assert watch(stream) == ([2], ANSWER)
    assert stored(redis, session) == ["hi", ANSWER]
    goes_on(redis, first, session)
