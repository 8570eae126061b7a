"""What LangChain's own chain does when things go wrong, and what Chat does. Each case is run in
both; the table in docs/langchain.md is made of what came out (INTEROP_UPDATE=1 writes it)."""

import asyncio
import contextlib
import os
import threading

import grpc
import pytest
from harness import ROOT, Redis, Server, history, pb, stored, tell, until
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory
from provider import ANSWER, Script

DOCUMENT = ROOT / "docs/langchain.md"
BEGIN, END = "<!-- chain: begin -->", "<!-- chain: end -->"
ROWS = {}


class Model(BaseChatModel):
    """A chat model in the process of the chain."""

    script: object
    prompts: list = []

    @property
    def _llm_type(self):
        return "scripted"

    def _stream(self, messages, stop=None, run_manager=None, **options):
        self.prompts.append(messages)
        for piece in self.script.pieces():
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))

    def _generate(self, messages, stop=None, run_manager=None, **options):
        whole = None
        for chunk in self._stream(messages):
            whole = chunk if whole is None else whole + chunk
        return ChatResult(generations=[whole])


class Chain:
    def __init__(self, redis, session, script):
        prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("past"), ("human", "{text}")])
        self.model = Model(script=script, prompts=[])
        self.config = {"configurable": {"session_id": session}}
        self.runnable = RunnableWithMessageHistory(
            prompt | self.model,
            lambda name: history(redis, name),
            input_messages_key="text",
            history_messages_key="past",
        )

    def stream(self, text):
        return self.runnable.stream({"text": text}, config=self.config)

    def astream(self, text):
        return self.runnable.astream({"text": text}, config=self.config)


@pytest.fixture(scope="module")
def mortal():
    """A Redis that a test may kill."""
    redis = Redis(durable=True)
    yield redis
    redis.kill()


@pytest.fixture(scope="module")
def chatting(mortal, provider):
    program = Server(mortal, "--model-url", provider.url, "--model", "scripted")
    yield program
    program.end()


def drain(stream):
    """The text of a chain, and its error, or None."""
    text = ""
    try:
        for chunk in stream:
            text += chunk.content
    except Exception as error:  # noqa: BLE001: any error is an outcome
        return text, error
    return text, None


def row(case, there, here):
    """A row of the table: what came out, and the test that saw it."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    ROWS[case] = (there, here, test)


def test_the_model_fails_in_mid_stream(mortal, chatting, provider, session):
    text, error = drain(Chain(mortal, session, Script(break_at=2)).stream("hi"))
    assert error is not None and text
    assert stored(mortal, session) == []

    ours = f"{session}-ours"
    provider.script, provider.prompts = Script(break_at=2), []
    text, why = tell(chatting.chat(ours, "hi", turn_id="t"))
    assert text and why == "MODEL_STREAM_BROKEN"
    assert stored(mortal, ours) == []
    provider.script = Script()
    assert tell(chatting.chat(ours, "hi", turn_id="t")) == (ANSWER, "")
    assert stored(mortal, ours) == ["hi", ANSWER]
    assert len(provider.prompts) == 2
    row(
        "the model fails in mid-stream",
        "an exception; nothing is stored, the question is lost",
        "`MODEL_STREAM_BROKEN`; nothing is stored; the same request again stores the turn, once",
    )


def test_the_client_leaves_in_mid_stream(mortal, chatting, provider, session):
    def leave_after(count, name):
        stream = Chain(mortal, name, Script()).stream("hi")
        for _ in range(count):
            next(stream)
        stream.close()
        return stored(mortal, name)

    assert leave_after(1, f"{session}-1") == []
    # The answer is cut, and nothing says so.
    assert leave_after(3, f"{session}-3") == ["hi", "one two "]
    [cut] = [m for m in history(mortal, f"{session}-3").messages if m.type != "human"]
    assert not (cut.response_metadata or cut.additional_kwargs)

    async def leave_a_task(name):
        chain = Chain(mortal, name, Script())
        async with contextlib.aclosing(chain.astream("hi")) as stream:
            for _ in range(3):
                await anext(stream)

    asyncio.run(leave_a_task(f"{session}-async"))
    assert stored(mortal, f"{session}-async") == []

    ours = f"{session}-ours"
    gone = threading.Event()
    provider.script, provider.prompts = Script(before={2: lambda: gone.wait(20)}), []
    call = chatting.chat(ours, "hi", turn_id="t")
    while not (event := next(call)).delta.text:
        pass
    call.cancel()
    gone.set()
    until("the turn is stored", lambda: stored(mortal, ours) == ["hi", ANSWER])
    # And it goes on where it was left.
    rest, why = tell(chatting.follow(ours, "t", resume_after=event.event_number))
    assert (event.delta.text + rest, why) == (ANSWER, "")
    assert len(provider.prompts) == 1
    row(
        "the client leaves in mid-stream",
        "nothing is stored; or, from the second piece on, a cut answer as if it were whole",
        "the turn goes on and is stored whole; it can be followed from where it was left",
    )


def test_redis_dies_in_mid_stream(mortal, chatting, provider, session):
    text, error = drain(Chain(mortal, session, Script(before={2: mortal.kill})).stream("hi"))
    mortal.start()
    left = stored(mortal, session)
    assert (text, error, left) == (ANSWER, None, [])

    ours = f"{session}-ours"
    until("the server is back", lambda: back(chatting))
    provider.script, provider.prompts = Script(before={2: mortal.kill}), []
    text, why = tell(chatting.chat(ours, "hi", turn_id="t"))
    assert text == ANSWER and why in ("STORE_UNAVAILABLE", "OUTCOME_UNKNOWN")
    mortal.start()
    until("the server is back", lambda: back(chatting))
    provider.script = Script()
    assert tell(chatting.chat(ours, "hi", turn_id="t")) == (ANSWER, "")
    assert stored(mortal, ours) == ["hi", ANSWER]
    assert len(provider.prompts) == 1
    row(
        "Redis dies in mid-stream",
        "the whole answer and no error; the turn is lost",
        "an error in place of `completed`; the answer is kept, and stored once when Redis is back; "
        "the model is asked once",
    )


def back(server):
    try:
        return server.get("probe") is not None
    except grpc.RpcError:
        return False


def full(redis, yes=True):
    redis.client.config_set("maxmemory-policy", "noeviction")
    redis.client.config_set("maxmemory", "1" if yes else "0")


def test_the_second_write_of_a_turn_fails(mortal, chatting, provider, session, monkeypatch):
    chain = Chain(mortal, session, Script())
    client = type(mortal.client)
    push = client.lpush

    def push_once(self, *arguments):
        result = push(self, *arguments)
        full(mortal)
        return result

    monkeypatch.setattr(client, "lpush", push_once)
    text, error = drain(chain.stream("hi"))
    monkeypatch.undo()
    full(mortal, False)
    assert (text, error) == (ANSWER, None)
    assert stored(mortal, session) == ["hi"]

    ours = f"{session}-ours"
    provider.script, provider.prompts = Script(before={3: lambda: full(mortal)}), []
    text, why = tell(chatting.chat(ours, "hi", turn_id="t"))
    assert why == "STORE_FULL"
    assert stored(mortal, ours) == []
    full(mortal, False)
    provider.script = Script()
    assert tell(chatting.chat(ours, "hi", turn_id="t")) == (ANSWER, "")
    assert stored(mortal, ours) == ["hi", ANSWER]
    assert len(provider.prompts) == 1
    row(
        "Redis is full after the first write of a turn",
        "no error; half a turn is stored: the question without its answer",
        "there is one write: `STORE_FULL`, nothing is stored; the answer is kept, and stored when "
        "there is room; the model is asked once",
    )


def test_two_turns_at_once(mortal, chatting, provider, session, monkeypatch):
    barrier = threading.Barrier(2, timeout=20)
    client = type(mortal.client)
    push = client.lpush

    def push_together(self, *arguments):
        # As it can happen: each is a command of its own.
        barrier.wait()
        return push(self, *arguments)

    monkeypatch.setattr(client, "lpush", push_together)
    chains = [Chain(mortal, session, Script(before={1: barrier.wait})) for _ in range(2)]
    threads = [threading.Thread(target=drain, args=[chain.stream("hi")]) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert stored(mortal, session) == ["hi", "hi", ANSWER, ANSWER]
    assert [len(chain.model.prompts[0]) for chain in chains] == [1, 1]

    ours = f"{session}-ours"
    go = threading.Event()
    provider.script = Script(before={2: lambda: go.wait(20)})
    first = chatting.chat(ours, "first")
    next(first)
    assert tell(chatting.chat(ours, "second")) == ("", "TURN_IN_PROGRESS")
    go.set()
    assert tell(first)[1] == ""
    assert stored(mortal, ours) == ["first", ANSWER]
    # Or, if they want to, the second waits for the first.
    go.clear()
    first = chatting.chat(ours, "third")
    next(first)
    second = chatting.chat(ours, "fourth", on_conflict=pb.ON_CONFLICT_QUEUE)
    go.set()
    assert [tell(first), tell(second)] == [(ANSWER, ""), (ANSWER, "")]
    assert stored(mortal, ours)[2:] == ["third", ANSWER, "fourth", ANSWER]
    assert len(provider.prompts[-1]) == 5
    row(
        "two turns at once on a session",
        "both run, blind to each other, and may be stored interleaved",
        "the second is refused, `TURN_IN_PROGRESS`, or waits until it sees the first's answer",
    )


def test_a_turn_is_tried_again(mortal, chatting, provider, session):
    chain = Chain(mortal, session, Script())
    for _ in range(2):
        assert drain(chain.stream("hi")) == (ANSWER, None)
    assert stored(mortal, session) == ["hi", ANSWER] * 2

    ours = f"{session}-ours"
    provider.script, provider.prompts = Script(), []
    for _ in range(2):
        assert tell(chatting.chat(ours, "hi", turn_id="t"))[1] == ""
    assert stored(mortal, ours) == ["hi", ANSWER]
    assert len(provider.prompts) == 1
    row(
        "a turn is sent again",
        "stored twice, the model asked twice",
        "the same `turn_id`: stored once, the model asked once",
    )


def test_the_session_is_cleared_while_a_turn_runs(mortal, chatting, provider, session):
    def clear(name):
        return lambda: history(mortal, name).clear()

    history(mortal, session).add_user_message("old")
    assert drain(Chain(mortal, session, Script(before={2: clear(session)})).stream("hi"))[1] is None
    assert stored(mortal, session) == ["hi", ANSWER]

    ours = f"{session}-ours"
    chatting.append(ours, pb.Message(role=pb.ROLE_USER, content="old"))
    provider.script = Script(before={2: clear(ours)})
    assert tell(chatting.chat(ours, "hi"))[1] == "SESSION_CLEARED"
    assert stored(mortal, ours) == []
    row(
        "the session is cleared while a turn runs",
        "the turn is stored in the cleared session",
        "`SESSION_CLEARED`; the session stays empty",
    )


def test_the_fiftieth_turn(mortal, chatting, provider, session):
    chain = Chain(mortal, session, Script())
    for _ in range(50):
        drain(chain.stream("hi"))
    there = len(chain.model.prompts[-1])

    ours = f"{session}-ours"
    provider.script, provider.prompts = Script(), []
    for _ in range(50):
        assert tell(chatting.chat(ours, "hi", last_messages=10))[1] == ""
    here = len(provider.prompts[-1])
    assert there == 99 and here <= 11
    row(
        "the fiftieth turn",
        f"sends {there} messages to the model, all there are",
        f"sends {here} with `last_messages` 10",
    )


def test_what_is_known_of_a_message(mortal, chatting, provider, session):
    drain(Chain(mortal, session, Script()).stream("hi"))
    for element in mortal.raw(session):
        assert not any(word in element for word in (b"time", b"sequence", b"chat_memory"))

    ours = f"{session}-ours"
    provider.script = Script()
    assert tell(chatting.chat(ours, "hi", turn_id="t"))[1] == ""
    messages = chatting.get(ours)
    assert [message.sequence for message in messages] == [1, 2]
    assert all(message.HasField("create_time") and message.id for message in messages)
    assert [message.turn_id for message in messages] == ["t", "t"]
    row(
        "what is known of each message",
        "no time, no sequence",
        "its time, sequence, id and turn",
    )


def test_the_table_in_the_document_is_what_came_out():
    assert len(ROWS) == 9, "it is made of all cases: run the whole file"
    lines = ["| case | `RunnableWithMessageHistory` | `Chat` | shown by |", "|---|---|---|---|"]
    lines += [f"| {case} | {there} | {here} | `{test}` |" for case, (there, here, test) in ROWS.items()]
    table = "\n".join(lines)
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("INTEROP_UPDATE"):
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
        return
    assert written.strip() == table, "out of date: INTEROP_UPDATE=1 scripts/test-interop 1"
