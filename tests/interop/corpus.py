"""Messages of every kind that this LangChain has, with every odd value that it stores."""

import os

from langchain_core import messages as lc

LINE = os.environ["INTEROP_LINE"]
USAGE = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
CALL = {"name": "add", "args": {"a": 1, "b": [1.0, None]}, "id": "c1"}
INVALID = {"name": "add", "args": "{", "id": "c2", "error": "cut"}
CHUNK = {"name": "add", "args": '{"a": 1}', "id": "c1", "index": 0}
if LINE != "0.1":
    CALL["type"] = "tool_call"
    INVALID["type"] = "invalid_tool_call"
    CHUNK["type"] = "tool_call_chunk"

TEXTS = [
    "",
    "hi",
    " \t\r\n\b\f\0\x1f\x7f",
    "é 会話 🎉 \u2028 \ufeff \ufffd",
    "\ud800 lone",
    '"quoted" \\ / NaN {"a": 1}',
    "x" * 100_000,
]
CONTENTS = [
    [],
    [""],
    ["a", "\udfff"],
    [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "extra": 1}],
    [{"type": "text", "text": "\ud83d"}],
    [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
    [{"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}],
    [{"type": "image_url", "image_url": "https://example.com/a.png"}],
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}}],
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}}],
    [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}],
    [{"type": "file", "source_type": "base64", "data": "AAEC", "mime_type": "application/pdf"}],
    [{"type": "file", "file": {"file_id": "f1"}}],
    [{"type": "tool_use", "id": "t", "name": "n", "input": {"a": float("inf")}}],
    [{"type": "thinking", "thinking": "hm", "signature": "s"}],
    [{"type": "nested", "a": {"b": {"c": {"d": [[[[[1]]]]]}}}}],
    [{}, {"no type": 1}, {"type": 5}],
]
VALUES = [
    None,
    True,
    -0.0,
    0.1,
    1e22,
    1e-7,
    1.7976931348623157e308,
    5e-324,
    10**30,
    10**400,
    -(2**63),
    2**53 + 1,
    float("inf"),
    float("-inf"),
    float("nan"),
    "\ud800",
    "$json",
    {"$json": "1"},
    {"": {"a.b": [], "é": {}}},
    [1, [2, [3, [4, []]]]],
    [[]] * 50,
]


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def messages():
    made = [lc.HumanMessage(content=text, id="m") for text in TEXTS]
    made += [lc.AIMessage(content=text, id="m") for text in TEXTS]
    made += [lc.HumanMessage(content=content, id="m") for content in CONTENTS]
    for value in VALUES:
        made.append(lc.HumanMessage(content="x", id="m", additional_kwargs={"value": value}))
        made.append(lc.AIMessage(content="x", id="m", response_metadata={"value": value}))
        call = {**CALL, "args": {"value": value}}
        made.append(lc.AIMessage(content="", id="m", tool_calls=[call]))
    for value in VALUES[:6]:
        made.append(lc.SystemMessage(content="x", id="m", custom=value))
        made.append(lc.ToolMessage(content="x", id="m", tool_call_id="c", artifact={"v": value}))
    made += [
        lc.SystemMessage(content="be kind", id="m", name="root"),
        lc.AIMessage(content="x", id="m", name=""),
        lc.AIMessage(content="x", id="m", usage_metadata=USAGE),
        lc.AIMessage(content="", id="m", tool_calls=[CALL, {**CALL, "id": None, "args": {}}]),
        lc.AIMessage(content="x", id="m", invalid_tool_calls=[INVALID]),
        lc.AIMessage(content="x", id="m", invalid_tool_calls=[dict.fromkeys(INVALID)]),
        lc.AIMessage(content="x", id="m", additional_kwargs={"reasoning_content": "because"}),
        lc.AIMessage(content="x", id="m", additional_kwargs={"reasoning_content": ""}),
        lc.AIMessage(content="x", id="m", additional_kwargs={"reasoning_content": "\ud800"}),
        lc.AIMessage(content="x", id="m", additional_kwargs={"\ud800": 1, "\ud801": 2}),
        lc.AIMessage(content="x", id="m", additional_kwargs={"deep": deep(40)}),
        lc.ToolMessage(content="3", id="m", tool_call_id="c1", name="add"),
        lc.ToolMessage(content="", id="m", tool_call_id=""),
        lc.ToolMessage(content="3", id="m", tool_call_id="\ud800", status="error"),
        lc.FunctionMessage(content="3", id="m", name="add"),
        lc.ChatMessage(content="meh", id="m", role="critic"),
        lc.ChatMessage(content="meh", id="m", role="user"),
        lc.AIMessageChunk(content="hello", id="m"),
        lc.AIMessageChunk(content="", id="m", tool_call_chunks=[CHUNK]),
        lc.AIMessageChunk(content="", id="m", tool_call_chunks=[{**CHUNK, "args": "{"}]),
        lc.AIMessageChunk(content="x", id="m", usage_metadata=USAGE),
        lc.HumanMessageChunk(content="x", id="m"),
        lc.SystemMessageChunk(content="x", id="m"),
        lc.ToolMessageChunk(content="x", id="m", tool_call_id="c"),
        lc.FunctionMessageChunk(content="x", id="m", name="n"),
        lc.ChatMessageChunk(content="x", id="m", role="r"),
        lc.HumanMessage(content="x", id="m", tool_calls=5, status="odd", role="r", artifact=None),
    ]
    if LINE == "1":
        made.append(lc.AIMessageChunk(content="x", id="m", chunk_position="last"))
    if LINE != "0.1":
        details = {**USAGE, "input_token_details": {"cache_read": 1}}
        made.append(lc.AIMessage(content="x", id="m", usage_metadata=details))
        huge = {**USAGE, "input_tokens": 10**30}
        made.append(lc.AIMessage(content="x", id="m", usage_metadata=huge))
        made.append(lc.RemoveMessage(id="m"))
    return made
