"""LangChain and we write to the same sessions at the same time."""

import threading

import grpc
import pytest
from harness import history, pb, until
from langchain_core.messages import AIMessage, HumanMessage


def at_once(*works):
    failures = []

    def run(work):
        try:
            work()
        except BaseException as failure:  # noqa: BLE001: shown by the assertion
            failures.append(failure)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def user(text, **fields):
    return pb.Message(role=pb.ROLE_USER, content=text, **fields)


def test_four_writers_at_once_lose_nothing_and_sequences_rise_strictly(redis, server, session):
    count = 100

    def langchain(name):
        theirs = history(redis, session)
        for number in range(count):
            theirs.add_message(HumanMessage(content=f"{name} {number}"))

    def ours(name):
        for number in range(count):
            server.append(session, user(f"{name} {number}"), request_id=f"{name} {number}")

    at_once(*(lambda n=n: langchain(n) for n in "ab"), *(lambda n=n: ours(n) for n in "cd"))
    messages = server.get(session)
    assert [message.sequence for message in messages] == list(range(1, 4 * count + 1))
    texts = [message.content for message in messages]
    assert [message.content for message in history(redis, session).messages] == texts
    for name in "abcd":
        own = [text for text in texts if text.startswith(name)]
        assert own == [f"{name} {number}" for number in range(count)]


@pytest.mark.parametrize("order", [pb.ORDER_OLDEST_FIRST, pb.ORDER_NEWEST_FIRST])
def test_pages_neither_skip_nor_repeat_while_langchain_pushes(redis, server, session, order):
    theirs = history(redis, session)
    for number in range(50):
        theirs.add_message(HumanMessage(content=str(number)))
    seen, token = [], ""
    while True:
        request = pb.GetMessagesRequest(
            session_id=session, page_size=7, page_token=token, order=order
        )
        page = server.stub.GetMessages(request)
        seen += [message.sequence for message in page.messages]
        token = page.next_page_token
        if not token:
            break
        if len(seen) < 50:
            theirs.add_message(AIMessage(content="meanwhile"))
    expected = list(range(1, len(seen) + 1))
    assert seen == (expected if order == pb.ORDER_OLDEST_FIRST else expected[::-1])
    assert len(seen) >= 50


def test_langchains_clear_while_we_append_repeats_no_sequence(redis, server, session):
    given = []

    def ours():
        for number in range(100):
            given.extend(m.sequence for m in server.append(session, user(str(number))))

    def clears():
        for _ in range(30):
            history(redis, session).clear()

    at_once(ours, clears)
    assert given == sorted(set(given))
    left = [message.sequence for message in server.get(session)]
    assert left == given[len(given) - len(left) :]


def test_after_langchains_clear_the_session_is_empty_and_sequences_go_on(redis, server, session):
    server.append(session, user("a"), user("b"))
    history(redis, session).clear()
    assert not server.get(session)
    (message,) = server.append(session, user("c"))
    assert message.sequence == 3
    assert server.clear(session).deleted_count == 1
    assert history(redis, session).messages == []


def test_a_chat_that_langchain_clears_meanwhile_stores_nothing(redis, server, session):
    server.append(session, user("old"))
    stream = server.chat(session, "hi " * 20_000)
    next(stream)
    history(redis, session).clear()
    try:
        list(stream)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.ABORTED
        assert history(redis, session).messages == []
    else:
        # The turn was stored before the clear, and went with it, or whole after it.
        assert len(history(redis, session).messages) in (0, 2)


def test_a_chat_goes_on_where_langchain_stopped_and_the_other_way_round(redis, server, session):
    theirs = history(redis, session)
    theirs.add_user_message("one")
    theirs.add_ai_message("two")
    *_, completed = server.chat(session, "three")
    assert [message.sequence for message in completed.completed.messages] == [3, 4]
    theirs.add_user_message("five")
    texts = ["one", "two", "three", "You said: three", "five"]
    assert [message.content for message in theirs.messages] == texts
    assert [message.content for message in server.get(session)] == texts


def test_langchains_time_to_live_holds_for_all_our_keys(redis, server, session):
    history(redis, session, ttl=1_000).add_user_message("a")
    server.append(session, user("b"), request_id="r")
    keys = redis.client.keys(f"*{session}*")
    assert len(keys) >= 3
    for key in keys:
        is_record = b":requests:" in key
        assert 0 < redis.client.ttl(key) <= (48 * 3600 if is_record else 1_000), key


def test_a_session_that_expired_leaves_nothing_of_ours_and_starts_anew(redis, server, session):
    server.append(session, user("a"))
    history(redis, session, ttl=1).add_user_message("b")
    server.get(session)
    until("the session expires", lambda: not redis.client.exists(f"message_store:{session}"))
    (message,) = server.append(session, user("c"))
    assert message.sequence >= 1
    assert [message.content for message in history(redis, session).messages] == ["c"]
