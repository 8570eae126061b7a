"""Windows beside LangChain's own `trim_messages(strategy="last", start_on="human",
include_system=True)`, with the same count of tokens: where they differ, docs/windows.md says why, and
these are the only differences."""

import random

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from harness import history, pb
from langchain_core.messages import (
    AIMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)

PROMPT = 3
HISTORIES = 300


def count(message):
    """Each word is a token, and so are the role and a tool's name and arguments."""
    calls = getattr(message, "tool_calls", None) or []
    return 3 + 1 + len(message.content.split()) + len(calls) * (3 + 1 + 1)


def tokens(messages):
    return sum(count(message) for message in messages)


def trim(messages, max_tokens):
    return trim_messages(
        messages,
        max_tokens=max_tokens,
        token_counter=tokens,
        strategy="last",
        start_on="human",
        include_system=True,
    )


def generate(chance):
    """A history with all that LangChain's agents leave behind."""
    words = lambda: " ".join(["word"] * chance.randint(1, 12))  # noqa: E731
    messages = [SystemMessage(words()) for _ in range(chance.choice([0, 0, 1, 1, 1, 2]))]
    is_odd = chance.random() < 0.4
    for number in range(chance.randint(0, 12)):
        messages += [HumanMessage(words()) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        for step in range(chance.choice([0, 0, 1, 2])):
            ids = [f"c{number}.{step}.{index}" for index in range(chance.randint(1, 3))]
            calls = [{"name": "tool", "args": {}, "id": id} for id in ids]
            messages.append(AIMessage(chance.choice(["", words()]), tool_calls=calls))
            if is_odd and chance.random() < 0.3:
                ids.pop(chance.randrange(len(ids)))
            messages += [ToolMessage(words(), tool_call_id=id) for id in ids]
        messages += [AIMessage(words()) for _ in range(chance.choice([1, 1, 1, 0, 2]))]
        if is_odd:
            odd = [
                AIMessage(""),
                SystemMessage(words()),
                FunctionMessage(words(), name="tool"),
                ToolMessage(words(), tool_call_id="nobody"),
            ]
            messages += chance.sample(odd, chance.choice([0, 0, 1, 2]))
    for number, message in enumerate(messages):
        message.id = str(number)
    return messages


def spoken(messages):
    """Without what says nothing and what no model knows."""
    return [
        message
        for message in messages
        if not isinstance(message, FunctionMessage)
        and (message.content or getattr(message, "tool_calls", None))
    ]


def clean(messages):
    """Without what no provider takes: the first difference."""
    kept, index = [], 0
    said = spoken(messages)
    while index < len(said):
        message, index = said[index], index + 1
        if isinstance(message, ToolMessage):
            continue
        waiting, results = [call["id"] for call in getattr(message, "tool_calls", None) or []], []
        while waiting and index < len(said) and isinstance(said[index], ToolMessage):
            if said[index].tool_call_id in waiting:
                waiting.remove(said[index].tool_call_id)
                results.append(said[index])
            index += 1
        if not waiting:
            kept += [message, *results]
    return kept


def newest_exchange(messages):
    """From the first message of the newest question on."""
    start = len(messages)
    for index in reversed(range(len(messages))):
        if isinstance(messages[index], HumanMessage):
            start = index
            if index == 0 or not isinstance(messages[index - 1], HumanMessage):
                break
    return messages[start:]


def needed(error):
    """What a window that was refused needs."""
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            assert info.reason == "WINDOW_TOO_SMALL"
            return int(info.metadata["needed"])
    raise AssertionError("no details")


def test_windows_are_langchains_but_for_what_the_document_names(redis, server):
    chance = random.Random(5)
    found = {"same": 0, "broken tool exchanges": 0, "system messages": 0, "newest exchange": 0}
    for number in range(HISTORIES):
        session = f"windows {number}"
        messages = generate(chance)
        if not messages:
            continue
        theirs = history(redis, session)
        theirs.add_messages(messages)
        budget = chance.randint(10, PROMPT + tokens(messages) + 10)

        sendable = clean(messages)
        first = next(
            (i for i, message in enumerate(sendable) if not isinstance(message, SystemMessage)),
            len(sendable),
        )
        leading, rest = sendable[:first], sendable[first:]
        newest = [m for m in newest_exchange(spoken(messages)) if m in sendable]
        must = PROMPT + tokens(leading) + tokens(newest)
        trimmed = [message.id for message in trim(messages, budget - PROMPT)]
        try:
            request = pb.GetMessagesRequest(session_id=session, max_tokens=budget)
            window = server.stub.GetMessages(request)
        except grpc.RpcError as error:
            # The third difference: LangChain gives what is left without the newest exchange.
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert needed(error) == must > budget
            found["newest exchange"] += 1
            continue
        assert must <= budget

        ids = [message.id for message in window.messages]
        own = [message for message in messages if message.id in ids]
        assert window.token_count == (PROMPT + tokens(own) if own else 0)
        # The second difference: all system messages at the beginning, where LangChain has one.
        expected = leading + trim(rest, budget - PROMPT - tokens(leading))
        assert ids == [message.id for message in expected], messages
        if ids == trimmed:
            found["same"] += 1
        elif len(sendable) < len(messages):
            found["broken tool exchanges"] += 1
        else:
            assert len(leading) > 1, (ids, trimmed)
            found["system messages"] += 1
    print(found)
    assert found["same"] > HISTORIES // 3
    assert min(found.values()) > 2, found


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_count_questions(redis, server, turns):
    session = f"turns {turns}"
    questions = [message for n in range(4) for message in (HumanMessage(f"q{n}"), AIMessage(f"a{n}"))]
    history(redis, session).add_messages(questions)
    window = server.stub.GetMessages(pb.GetMessagesRequest(session_id=session, last_turns=turns))
    texts = [message.content for message in window.messages]
    assert texts == [message.content for message in questions[-2 * turns :]]
