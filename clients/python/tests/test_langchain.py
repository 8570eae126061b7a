"""LangChain's own classes over the real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Redis, Server
from langchain_community.chat_message_histories import RedisChatMessageHistory
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    FunctionMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    SystemMessageChunk,
    ToolMessage,
    ToolMessageChunk,
)
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_openai import ChatOpenAI
from loopback_openai import Provider, loopback_openai
from pydantic import SecretStr

import chat_memory
from chat_memory import Client, assistant, system, user
from chat_memory.langchain import ChatMemoryHistory, RunnableWithChatMemory, UnreadableMessage

CALL = {"name": "add", "args": {"a": 1.0, "b": [1, {"c": None}]}, "id": "c1", "type": "tool_call"}
AWKWARD: dict[str, Any] = {
    "z": 1,
    "a": 1.0,
    "big": 2**70,
    "small": -0.0,
    "tiny": 1e-300,
    "text": 'é 🎉 \x00 \x7f "',
    "deep": [[[{"a": []}]]],
    "none": None,
    "$json": "not ours",
}

MESSAGES: list[BaseMessage] = [
    HumanMessage("hi"),
    HumanMessage("", id="h0"),
    HumanMessage("é 🎉 \n\t\x00\x7f", id="h1", name="ann"),
    HumanMessage("x", additional_kwargs=AWKWARD, response_metadata=AWKWARD, id="h2"),
    HumanMessage(
        [
            "plain",
            {"type": "text", "text": "b"},
            {"type": "text", "text": "cached", "cache_control": {"type": "ephemeral"}},
            {
                "type": "image_url",
                "image_url": {"url": "https://example.com/x.png", "detail": "low"},
            },
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            {"type": "thinking", "thinking": "hm", "signature": "s", "number": 1.0},
        ],
        id="h3",
    ),
    HumanMessage("extra", id="h4", custom=[1, 2.0]),
    SystemMessage("be kind", id="s1"),
    AIMessage("", id="a0"),
    AIMessage("hello", id="a1", additional_kwargs={"refusal": None, "reasoning_content": "hm"}),
    AIMessage(
        "",
        id="a2",
        tool_calls=[CALL, {"name": "now", "args": {}, "id": None, "type": "tool_call"}],
        invalid_tool_calls=[
            {"type": "invalid_tool_call", "id": "c2", "name": "x", "args": "{", "error": "cut"}
        ],
        usage_metadata={
            "input_tokens": 1,
            "output_tokens": 2,
            "total_tokens": 3,
            "input_token_details": {"cache_read": 1},
            "output_token_details": {"reasoning": 2},
        },
        response_metadata={"model_name": "m", "logprobs": None},
    ),
    AIMessageChunk(content="streamed", id="run-1", chunk_position="last"),
    AIMessageChunk(
        content="",
        id="run-2",
        tool_call_chunks=[
            {"name": "add", "args": '{"a": 1}', "id": "c3", "index": 0, "type": "tool_call_chunk"}
        ],
    ),
    ToolMessage("3", tool_call_id="c1", id="t1"),
    ToolMessage(
        "", tool_call_id="c1", id="t2", name="add", status="error", artifact={"rows": [1, 2.0]}
    ),
    FunctionMessage(content="3", name="add", id="f1"),
    ChatMessage(content="meh", role="critic", id="c1"),
    ChatMessage(content="meh", role="user", id="c2"),
    RemoveMessage("m1"),
    HumanMessageChunk(content="x", id="k1"),
    SystemMessageChunk(content="x", id="k2"),
    ToolMessageChunk(content="x", tool_call_id="c1", id="k3"),
    FunctionMessageChunk(content="x", name="f", id="k4"),
    ChatMessageChunk(content="x", role="critic", id="k5"),
]


@pytest.fixture
def history(target: str, session_id: str) -> ChatMemoryHistory:
    return ChatMemoryHistory(session_id, target)


def with_ids_of(messages: list[BaseMessage], read: list[BaseMessage]) -> list[BaseMessage]:
    """The messages, with the server's ids where they had none."""
    return [
        message if message.id else message.model_copy(update={"id": got.id})
        for message, got in zip(messages, read, strict=True)
    ]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.type}-{message.id}")
def test_a_message_comes_back_equal(history: ChatMemoryHistory, message: BaseMessage) -> None:
    history.add_message(message)
    (read,) = history.messages
    (expected,) = with_ids_of([message], [read])
    assert read == expected
    assert type(read) is type(message)
    # For `==` 1 and 1.0 are the same, and the order of keys is nothing; the text tells.
    assert repr(read.content) == repr(expected.content)
    assert repr(read.additional_kwargs) == repr(expected.additional_kwargs)
    assert repr(read.response_metadata) == repr(expected.response_metadata)
    assert read.id


def test_what_was_read_can_be_added_again(history: ChatMemoryHistory) -> None:
    history.add_messages(MESSAGES)
    first = history.messages
    history.add_messages(first)
    assert history.messages == first + first
    history.clear()
    assert history.messages == []


async def test_the_async_forms_do_the_same(history: ChatMemoryHistory) -> None:
    await history.aadd_messages(MESSAGES)
    read = await history.aget_messages()
    assert read == with_ids_of(MESSAGES, read)
    assert await asyncio.to_thread(lambda: history.messages) == read
    await history.aclear()
    assert await history.aget_messages() == []


def test_langchain_and_we_read_each_other_on_one_redis(redis: Redis, session_id: str) -> None:
    theirs = RedisChatMessageHistory(session_id, url=redis.url)
    ours = ChatMemoryHistory(session_id, redis.target)
    theirs.add_messages(MESSAGES)
    ours.add_messages(MESSAGES)
    read = theirs.messages
    for message in read:
        message.additional_kwargs.pop("chat_memory", None)
    assert read == ours.messages
    assert ours.messages == MESSAGES + with_ids_of(MESSAGES, read[len(MESSAGES) :])
    theirs.clear()
    assert ours.messages == []


def test_all_of_a_batch_is_stored_or_nothing(history: ChatMemoryHistory) -> None:
    history.add_messages([])
    history.add_messages([HumanMessage(str(n)) for n in range(100)])
    with pytest.raises(ValueError, match="101 messages are more than the 100"):
        history.add_messages([HumanMessage("x")] * 101)
    with pytest.raises(chat_memory.InvalidArgument):
        history.add_messages([HumanMessage("x"), HumanMessage("y", id="z" * 300)])
    with pytest.raises(UnicodeEncodeError):
        history.add_messages([HumanMessage("x"), HumanMessage("a lone surrogate: \ud800")])
    with pytest.raises(ValueError, match="role"):
        history.add_messages([ChatMessage(content="x", role="function")])
    assert len(history.messages) == 100


def test_what_is_no_json_of_others_comes_back_too(history: ChatMemoryHistory) -> None:
    odd = {"nan": float("nan"), "infinite": [float("-inf")], "surrogate": "\ud800"}
    history.add_messages([HumanMessage([{"no": "type"}], additional_kwargs=odd)])
    message = history.messages[0]
    assert message.content == [{"no": "type"}]
    assert repr(message.additional_kwargs) == repr(odd)


def test_a_window_gives_the_newest_and_no_result_without_its_call(
    target: str, session_id: str
) -> None:
    calls = AIMessage("", tool_calls=[CALL, {**CALL, "id": "c2"}])
    results = [ToolMessage("3", tool_call_id="c1"), ToolMessage("4", tool_call_id="c2")]
    history = ChatMemoryHistory(session_id, target)
    history.add_messages([HumanMessage("a"), calls, *results, AIMessage("7")])
    for last, first in [(1, "7"), (2, "7"), (3, "7"), (4, ""), (5, "a"), (9, "a")]:
        window = ChatMemoryHistory(session_id, target, last_messages=last).messages
        assert window[0].content == first
    with pytest.raises(ValueError, match="last_messages"):
        ChatMemoryHistory(session_id, target, last_messages=0)


def test_a_long_session_is_read_whole(history: ChatMemoryHistory, target: str) -> None:
    for start in range(0, 2300, 100):
        history.add_messages([HumanMessage(str(n)) for n in range(start, start + 100)])
    assert [message.content for message in history.messages] == [str(n) for n in range(2300)]
    window = ChatMemoryHistory(history.session_id, target, last_messages=1500)
    assert [message.content for message in window.messages] == [str(n) for n in range(800, 2300)]


def test_elements_that_langchain_refuses_are_read_where_possible(
    redis: Redis, session_id: str
) -> None:
    theirs = RedisChatMessageHistory(session_id, url=redis.url)
    for element in ['{"type": "user", "data": {"content": "by hand"}}', "nonsense"]:
        theirs.redis_client.lpush(theirs.key, element)
    with pytest.raises(UnreadableMessage) as caught:
        _ = ChatMemoryHistory(session_id, redis.target).messages
    assert caught.value.sequence == 2
    (read,) = ChatMemoryHistory(session_id, redis.target, unreadable="skip").messages
    assert read == HumanMessage("by hand")


def test_messages_of_other_clients_are_read(target: str, session_id: str) -> None:
    with Client(target) as client:
        client.append(session_id, [system("be kind"), user("hi"), assistant("Hello!")])
        client.chat(session_id, "again").text()
    read = ChatMemoryHistory(session_id, target).messages
    contents = ["be kind", "hi", "Hello!", "again", "You said: again"]
    assert [message.content for message in read] == contents
    assert [message.type for message in read] == ["system", "human", "ai", "human", "ai"]


# -------------------------------------------------------------------------------------------------
# The chain of the notebooks


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with loopback_openai() as provider:
        yield provider


@pytest.fixture
def steps(provider: Provider) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "You are a kind assistant."),
            MessagesPlaceholder("history"),
            ("human", "{question}"),
        ]
    )
    model = ChatOpenAI(base_url=provider.url, api_key=SecretStr("none"), model="m", max_retries=0)
    return prompt | model


def restart(server: Server) -> None:
    """Starts it, and waits until the shared connection is there again."""
    server.start()
    with Client(server.target, timeout=20) as client:
        client.get_messages("s")


def config(session_id: str) -> Any:
    return {"configurable": {"session_id": session_id}}


@pytest.mark.parametrize("kind", [RunnableWithMessageHistory, RunnableWithChatMemory])
def test_the_notebooks_flow_works_with_one_line_changed(
    kind: type[RunnableWithMessageHistory],
    steps: Runnable[Any, Any],
    provider: Provider,
    target: str,
    session_id: str,
) -> None:
    chain = kind(
        steps,
        lambda session_id: ChatMemoryHistory(session_id, target),
        input_messages_key="question",
        history_messages_key="history",
    )
    answer = chain.invoke({"question": "one"}, config(session_id))
    assert answer.content == "You said: one"
    chunks = list(chain.stream({"question": "two"}, config(session_id)))
    assert len(chunks) > 2
    expected = ["You are a kind assistant.", "one", "You said: one", "two"]
    assert provider.contents() == expected

    async def on() -> None:
        await chain.ainvoke({"question": "three"}, config(session_id))
        chunks = [chunk async for chunk in chain.astream({"question": "four"}, config(session_id))]
        assert len(chunks) > 2

    asyncio.run(on())
    read = ChatMemoryHistory(session_id, target).messages
    assert [str(message.content).strip() for message in read] == [
        text for word in ("one", "two", "three", "four") for text in (word, f"You said: {word}")
    ]
    assert [message.type for message in read[:4]] == ["human", "ai", "human", "AIMessageChunk"]
    chain.batch([{"question": "five"}, {"question": "six"}], config(session_id))
    assert len(ChatMemoryHistory(session_id, target).messages) == 12


def test_the_same_chat_needs_no_chain(target: str, session_id: str) -> None:
    with Client(target) as client:
        for question in ("one", "two"):
            stream = client.chat(session_id, question, system_prompt="You are a kind assistant.")
            assert stream.text() == f"You said: {question}"
    assert len(ChatMemoryHistory(session_id, target).messages) == 4


@pytest.mark.parametrize("form", ["invoke", "stream", "batch", "transform"])
async def test_a_turn_that_could_not_be_stored_is_an_error(
    form: str, steps: Runnable[Any, Any], own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    histories: list[ChatMemoryHistory] = []

    def history(session_id: str) -> ChatMemoryHistory:
        histories.append(ChatMemoryHistory(session_id, own_server.target, timeout=0.5))
        return histories[-1]

    def chain(kind: type[RunnableWithMessageHistory]) -> RunnableWithMessageHistory:
        def stop(value: Any) -> Any:
            own_server.kill()
            return value

        return kind(
            steps | stop,
            history,
            input_messages_key="question",
            history_messages_key="history",
        )

    def call(chain: RunnableWithMessageHistory) -> None:
        question = {"question": "one"}
        if form == "invoke":
            chain.invoke(question, config("s"))
        elif form == "stream":
            list(chain.stream(question, config("s")))
        elif form == "batch":
            chain.batch([question], config("s"))
        else:
            list(chain.transform(iter([question]), config("s")))

    async def acall(chain: RunnableWithMessageHistory) -> None:
        question = {"question": "one"}
        if form == "invoke":
            await chain.ainvoke(question, config("s"))
        elif form == "stream":
            [chunk async for chunk in chain.astream(question, config("s"))]
        elif form == "batch":
            await chain.abatch([question], config("s"))
        else:

            async def questions() -> Any:
                yield question

            [chunk async for chunk in chain.atransform(questions(), config("s"))]

    with caplog.at_level(logging.WARNING):
        await asyncio.to_thread(call, chain(RunnableWithMessageHistory))
    assert "Error in RootListenersTracer" in caplog.text

    restart(own_server)
    with pytest.raises(chat_memory.Unavailable):
        await asyncio.to_thread(call, chain(RunnableWithChatMemory))
    restart(own_server)
    with pytest.raises(chat_memory.Unavailable):
        await acall(chain(RunnableWithChatMemory))
    restart(own_server)
    assert histories[-1].messages == []
