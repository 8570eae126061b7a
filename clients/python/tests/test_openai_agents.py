"""The SDK's own session tests (tests/memory/test_session.py of openai-agents), and ours."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    RunConfig,
    Runner,
    Session,
    SessionSettings,
    SQLiteSession,
    set_tracing_disabled,
)
from agents.items import TResponseInputItem
from conftest import Redis
from langchain_community.chat_message_histories import RedisChatMessageHistory
from loopback_openai import Provider, loopback_openai
from openai import AsyncOpenAI

from chat_memory import ROLE_OTHER, Aborted, Client, Message, assistant, user
from chat_memory.openai_agents import ChatMemorySession

set_tracing_disabled(True)

Items = list[TResponseInputItem]


@pytest.fixture
async def session(target: str, session_id: str) -> AsyncIterator[ChatMemorySession]:
    session = ChatMemorySession(session_id, target)
    yield session
    await session.close()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with loopback_openai() as provider:
        yield provider


@pytest.fixture
def agent(provider: Provider) -> Agent[Any]:
    client = AsyncOpenAI(base_url=provider.url, api_key="none", max_retries=0)
    return Agent(name="test", model=OpenAIChatCompletionsModel("m", client))


async def run(method: str, agent: Agent[Any], text: Any, session: Any, **more: Any) -> Any:
    if method == "run":
        return await Runner.run(agent, text, session=session, **more)
    if method == "run_sync":
        return await asyncio.to_thread(
            lambda: Runner.run_sync(agent, text, session=session, **more)
        )
    result = Runner.run_streamed(agent, text, session=session, **more)
    async for _ in result.stream_events():
        pass
    return result


def test_it_is_a_session(target: str) -> None:
    assert isinstance(ChatMemorySession("s", target), Session)


@pytest.mark.parametrize("method", ["run", "run_sync", "run_streamed"])
async def test_an_agent_remembers(
    method: str, agent: Agent[Any], session: ChatMemorySession, provider: Provider
) -> None:
    first = await run(method, agent, "one", session)
    assert str(first.final_output).strip() == "You said: one"
    await run(method, agent, "two", session)
    texts = [
        content if isinstance(content, str) else content[0]["text"]
        for content in (message["content"] for message in provider.requests[-1]["messages"])
    ]
    assert [text.strip() for text in texts] == ["one", "You said: one", "two"]


async def test_items_are_those_that_sqlite_would_give(
    agent: Agent[Any], session: ChatMemorySession
) -> None:
    sqlite = SQLiteSession("s")
    for text in ("one", "two"):
        await run("run", agent, text, sqlite)
    items = await sqlite.get_items()
    await session.add_items(items)
    assert await session.get_items() == items
    sqlite.close()


async def test_sessions_are_apart(target: str, session_id: str) -> None:
    one, two = ChatMemorySession(session_id, target), ChatMemorySession(session_id + "2", target)
    await one.add_items([{"role": "user", "content": "Session 1 message"}])
    await two.add_items(
        [
            {"role": "user", "content": "Session 2 message 1"},
            {"role": "user", "content": "Session 2 message 2"},
        ]
    )
    assert await two.pop_item() == {"role": "user", "content": "Session 2 message 2"}
    assert await one.get_items() == [{"role": "user", "content": "Session 1 message"}]
    assert await two.get_items() == [{"role": "user", "content": "Session 2 message 1"}]
    await one.close()
    await two.close()


async def test_items_are_popped_from_the_end_until_none_is_left(session: ChatMemorySession) -> None:
    assert await session.pop_item() is None
    items: Items = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there!"},
        {"role": "user", "content": "How are you?"},
    ]
    await session.add_items(items)
    assert len(await session.get_items()) == 3
    assert await session.pop_item() == items[2]
    assert await session.get_items() == items[:2]
    await session.add_items([items[2]])
    assert await session.get_items(limit=2) == items[1:]
    for item in reversed(items):
        assert await session.pop_item() == item
    assert await session.pop_item() is None
    assert await session.get_items() == []
    await session.add_items(items)
    assert await session.get_items() == items
    await session.clear_session()
    assert await session.get_items() == []


async def test_a_limit_gives_the_newest_items_in_order(session: ChatMemorySession) -> None:
    items: Items = [{"role": "user", "content": f"Message {n}"} for n in range(6)]
    await session.add_items(items)
    assert await session.get_items() == items
    for limit in (1, 2, 4, 6, 10):
        assert await session.get_items(limit=limit) == items[-limit:]
    assert await session.get_items(limit=0) == []
    assert await session.get_items(limit=-1) == []


async def test_the_settings_hold_a_limit_that_an_explicit_one_overrides(
    target: str, session_id: str
) -> None:
    assert ChatMemorySession(session_id, target).session_settings == SessionSettings()
    session = ChatMemorySession(session_id, target, session_settings=SessionSettings(limit=3))
    items: Items = [{"role": "user", "content": f"Message {n}"} for n in range(5)]
    await session.add_items(items)
    assert await session.get_items() == items[-3:]
    assert await session.get_items(limit=2) == items[-2:]
    assert await session.get_items(limit=10) == items
    await session.close()


async def test_a_run_may_override_the_limit(
    agent: Agent[Any], session: ChatMemorySession, provider: Provider
) -> None:
    items: Items = [{"role": "user", "content": f"Turn {n}"} for n in range(10)]
    await session.add_items(items)
    settings = RunConfig(session_settings=SessionSettings(limit=2))
    await run("run", agent, "New question", session, run_config=settings)
    assert provider.contents() == ["Turn 8", "Turn 9", "New question"]


async def test_a_callback_may_choose_the_input(
    agent: Agent[Any], session: ChatMemorySession, provider: Provider
) -> None:
    await session.add_items(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    )

    def only_of_users(history: Items, new: Items) -> Items:
        return [item for item in history if item.get("role") == "user"] + new

    chosen = RunConfig(session_input_callback=only_of_users)
    given = [{"role": "user", "content": "What is your name?"}]
    await run("run", agent, given, session, run_config=chosen)
    assert provider.contents() == ["Hello", "What is your name?"]
    assert len(await session.get_items()) == 4


async def test_every_kind_of_item_comes_back_as_it_was(session: ChatMemorySession) -> None:
    items: list[Any] = [
        {"role": "user", "content": 'こんにちは 😊👍 O\'Reilly "DROP TABLE sessions;" \x00'},
        {"role": "user", "content": ""},
        {"role": "user", "content": "lone \ud800 surrogate"},
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "look"},
                {"type": "input_image", "detail": "auto", "image_url": "https://example.com/x.png"},
            ],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"},
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "add",
            "arguments": '{"a":1.0,  "b":2}',
            "status": "completed",
        },
        {"type": "function_call", "call_id": "call_2", "name": "add", "arguments": "{cut"},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "4"}],
        },
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "n": 2**70, "f": 1.0},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "It is 3.", "annotations": []}],
        },
    ]
    await session.add_items(items)
    assert repr(await session.get_items()) == repr(items)
    for item in reversed(items):
        assert await session.pop_item() == item


async def test_other_clients_see_the_conversation(redis: Redis, session_id: str) -> None:
    session = ChatMemorySession(session_id, redis.target)
    items: list[Any] = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1, "b": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    await session.add_items(items)
    read = RedisChatMessageHistory(session_id, url=redis.url).messages
    assert [message.type for message in read] == ["human", "ai", "tool", "ai"]
    assert read[1].model_dump()["tool_calls"][0]["args"] == {"a": 1, "b": 2}
    assert await session.pop_item() == items[-1]
    assert len(RedisChatMessageHistory(session_id, url=redis.url).messages) == 3
    with Client(redis.target) as client:
        client.append(session_id, [user("And 2 + 3?"), assistant("5")])
    theirs: list[Any] = [
        {"role": "user", "content": "And 2 + 3?"},
        {"role": "assistant", "content": "5"},
    ]
    assert await session.get_items() == items[:3] + theirs
    await session.close()


async def test_more_items_than_a_page_are_read_past_the_markers_of_older_versions(
    session: ChatMemorySession, target: str, session_id: str
) -> None:
    items: Items = [{"role": "user", "content": str(n)} for n in range(250)]
    await session.add_items(items)
    with Client(target) as client:
        for sequence in range(250, 220, -1):
            marker = Message(role=ROLE_OTHER, role_name="chat_memory_pop")
            marker.metadata["openai_agents_pops"] = str(sequence)
            marker.metadata.get_or_create_struct("langchain")
            client.append(session_id, [marker])
    assert await session.get_items() == items[:-30]
    assert await session.get_items(limit=1) == [items[-31]]
    assert await session.pop_item() == items[-31]
    assert await session.get_items() == items[:-31]
    with Client(target) as client:
        # What the markers took back went with them.
        assert client.get_messages(session_id, last_messages=1).messages[0].sequence == 219


async def test_a_pop_deletes_for_everybody(target: str, session_id: str) -> None:
    session = ChatMemorySession(session_id, target)
    await session.add_items([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    await session.pop_item()
    with Client(target) as client:
        assert [message.content for message in client.messages(session_id)] == ["a"]
    await session.close()


async def test_no_item_is_popped_twice(target: str, session_id: str) -> None:
    sessions = [ChatMemorySession(session_id, target) for _ in range(4)]
    items: Items = [{"role": "user", "content": str(n)} for n in range(12)]
    await sessions[0].add_items(items)

    async def pop_three(session: ChatMemorySession) -> Items:
        return [item for item in [await session.pop_item() for _ in range(3)] if item]

    popped = await asyncio.gather(*(pop_three(session) for session in sessions))
    contents = sorted(int(str(item.get("content"))) for one in popped for item in one)
    assert contents == list(range(12))
    assert await sessions[0].get_items() == []
    for session in sessions:
        await session.close()


async def test_nothing_that_is_added_during_pops_is_lost(target: str, session_id: str) -> None:
    adder, *poppers = [ChatMemorySession(session_id, target) for _ in range(3)]
    added, popped = 100, []

    async def add() -> None:
        for number in range(added):
            await adder.add_items([{"role": "user", "content": str(number)}])

    async def pop(session: ChatMemorySession) -> None:
        for _ in range(30):
            with contextlib.suppress(Aborted):
                item = await session.pop_item()
                popped.extend([item] if item else [])

    await asyncio.gather(add(), *(pop(session) for session in poppers))
    left = await adder.get_items()
    contents = sorted(int(str(item.get("content"))) for item in [*popped, *left])
    assert contents == list(range(added))
    for session in (adder, *poppers):
        await session.close()


async def test_threads_with_loops_of_their_own_may_add_at_once(
    session: ChatMemorySession,
) -> None:
    items: Items = [{"role": "user", "content": f"Message {n}"} for n in range(10)]

    def add(item: TResponseInputItem) -> None:
        asyncio.run(session.add_items([item]))

    with concurrent.futures.ThreadPoolExecutor(5) as executor:
        await asyncio.gather(
            *(asyncio.get_running_loop().run_in_executor(executor, add, item) for item in items)
        )
    contents = {item.get("content") for item in await session.get_items()}
    assert contents == {item.get("content") for item in items}
