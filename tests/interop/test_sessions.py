"""What LangChain sees of sessions that we rewind, fork, list, trim and let expire, and we of its."""

import datetime
import threading

import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from harness import PATIENCE_SECONDS, Server, history, pb, stored, until
from langchain_core.messages import AIMessage, HumanMessage


def fill(redis, session, count):
    """LangChain adds exchanges."""
    theirs = history(redis, session)
    for number in range(1, count + 1):
        theirs.add_messages([HumanMessage(content=f"q{number}"), AIMessage(content=f"a{number}")])


def user(text):
    return pb.Message(role=pb.ROLE_USER, content=text)


def test_langchain_goes_on_after_a_rewind_and_no_sequence_comes_again(redis, server, session):
    fill(redis, session, 3)
    request = pb.RewindRequest(session_id=session, after_sequence=2)
    assert server.stub.Rewind(request).deleted_count == 4
    assert stored(redis, session) == ["q1", "a1"]
    history(redis, session).add_message(HumanMessage(content="other"))
    server.append(session, user("ours"))
    assert stored(redis, session) == ["q1", "a1", "other", "ours"]
    assert [message.sequence for message in server.get(session)] == [1, 2, 7, 8]


def test_langchain_reads_a_fork_and_its_source_as_two_histories(redis, server, session):
    fill(redis, session, 2)
    fork = pb.ForkRequest(
        session_id=session, new_session_id=f"{session}-fork", through_sequence=2
    )
    server.stub.Fork(fork)
    history(redis, f"{session}-fork").add_message(HumanMessage(content="another way"))
    assert stored(redis, session) == ["q1", "a1", "q2", "a2"]
    assert stored(redis, f"{session}-fork") == ["q1", "a1", "another way"]
    assert redis.raw(f"{session}-fork")[:2] == redis.raw(session)[:2]


def test_sessions_that_langchain_makes_turn_up_and_those_it_clears_go(redis, server, session):
    def listed():
        request = pb.ListSessionsRequest(id_prefix=session)
        return [each.session_id for each in server.stub.ListSessions(request).sessions]

    assert listed() == []
    fill(redis, session, 1)
    # Within a minute, says the issue of the list: `until` waits half of it.
    until("the session is listed", lambda: listed() == [session])
    history(redis, session).clear()
    assert listed() == []


def test_a_watcher_is_told_of_what_langchain_does(redis, server, session):
    request = pb.WatchRequest(session_id=session)
    events = server.stub.Watch(request, timeout=PATIENCE_SECONDS)

    def next_event():
        event = next(events)
        kind = event.WhichOneof("event")
        return (event.message.sequence, event.message.content) if kind == "message" else kind

    assert next_event() == "live"
    writer = threading.Thread(target=fill, args=[redis, session, 20])
    writer.start()
    for number in range(1, 21):
        assert next_event() == (2 * number - 1, f"q{number}")
        assert next_event() == (2 * number, f"a{number}")
    writer.join()
    history(redis, session).clear()
    assert next_event() == "cleared"
    history(redis, session).add_message(HumanMessage(content="again"))
    assert next_event() == (41, "again")
    events.cancel()


def test_what_is_trimmed_is_gone_for_langchain_too_and_is_whole_exchanges(redis, session):
    server = Server(redis, "--max-messages-per-session", "5")
    try:
        fill(redis, session, 4)
        # LangChain's own writes are not trimmed; the next one of ours is.
        assert len(stored(redis, session)) == 8
        server.append(session, user("q5"))
        assert stored(redis, session) == ["q3", "a3", "q4", "a4", "q5"]
        assert [message.sequence for message in server.get(session)] == [5, 6, 7, 8, 9]
    finally:
        server.end()


@pytest.mark.parametrize("sets_ttl", ["langchain", "we"])
def test_a_time_to_live_holds_for_the_history_and_all_beside_it(redis, server, session, sets_ttl):
    if sets_ttl == "langchain":
        history(redis, session, ttl=1000).add_message(HumanMessage(content="q"))
    else:
        server.append(session, user("q"))
        ttl = duration_pb2.Duration()
        ttl.FromTimedelta(datetime.timedelta(seconds=1000))
        request = pb.UpdateSessionRequest(
            session=pb.Session(session_id=session, ttl=ttl),
            update_mask=field_mask_pb2.FieldMask(paths=["ttl"]),
        )
        server.stub.UpdateSession(request)
    list(server.chat(session, "hi", turn_id="t"))
    keys = [key for key in redis.client.keys("*") if session.encode() in key]
    assert len(keys) >= 3, keys
    for key in keys:
        assert 0 < redis.client.ttl(key) <= 1001, key
