"""What LangChain writes, we read and write again; what we write, LangChain reads."""

import json
import math

import corpus
import grpc
import pytest
from conftest import LINE
from corpus import CALL, CHUNK, INVALID, USAGE, deep
from harness import history, pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core import messages as lc
from langchain_core.messages import message_to_dict

SETTINGS = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MESSAGES = corpus.messages()
ROLES = {"human": pb.ROLE_USER, "ai": pb.ROLE_ASSISTANT, "system": pb.ROLE_SYSTEM}
ROLES.update({"tool": pb.ROLE_TOOL, "function": pb.ROLE_OTHER, "chat": pb.ROLE_OTHER})
ROLES.update({"remove": pb.ROLE_OTHER, "AIMessageChunk": pb.ROLE_ASSISTANT})
ROLES.update({"HumanMessageChunk": pb.ROLE_USER, "SystemMessageChunk": pb.ROLE_SYSTEM})
ROLES.update({"ToolMessageChunk": pb.ROLE_TOOL, "FunctionMessageChunk": pb.ROLE_OTHER})
ROLES.update({"ChatMessageChunk": pb.ROLE_OTHER})


def as_langchain_sees(message):
    """Text, in which NaN is equal to itself."""
    fields = message_to_dict(message)
    data = fields["data"]
    if LINE == "0.1":
        # What later versions add, 0.1 keeps as extra fields.
        if fields["type"] in ("ai", "AIMessageChunk"):
            for call in data["tool_calls"] + data["invalid_tool_calls"]:
                call.pop("type", None)
        for key in ("usage_metadata", "artifact", "status"):
            if data.get(key) in (None, "success"):
                data.pop(key, None)
    # Where we keep our own facts, such as when it was appended.
    data["additional_kwargs"].pop("chat_memory", None)
    if data.get("example") is False:
        del data["example"]
    return json.dumps(fields, sort_keys=True)


def plain(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(value):
    """A value of a Struct, as Python has it."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        fields = value.struct_value.fields
        if list(fields) == ["$json"]:
            return json.loads(fields["$json"].string_value)
        return {key: shown(fields[key]) for key in fields}
    if kind == "list_value":
        return [shown(item) for item in value.list_value.values]
    if kind == "null_value":
        return None
    plain_value = getattr(value, kind)
    # A Struct has one kind of number. What is whole there is an integer; floats that a double shows
    # as whole are given as `$json`, if they are not too large or negative zero.
    if kind == "number_value" and plain_value.is_integer() and abs(plain_value) <= 2**53:
        is_negative_zero = plain_value == 0 and math.copysign(1, plain_value) < 0
        return plain_value if is_negative_zero else int(plain_value)
    return plain_value


def same(left, right):
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def check_fields(stored, ours):
    """Every field of ours says what LangChain stored."""
    data = stored["data"]
    assert ours.role == ROLES[stored["type"]]
    assert ours.problem == pb.PROBLEM_UNSPECIFIED
    assert ours.id == data["id"]
    assert ours.name == (data["name"] or "")
    content = data["content"]
    if isinstance(content, str):
        assert ours.content == plain(content)
        assert not ours.parts
    else:
        assert len(ours.parts) == len(content)
        texts = [b if isinstance(b, str) else b.get("text", "") for b in content]
        is_text = [isinstance(b, str) or b.get("type") == "text" for b in content]
        for part, block, text, whether in zip(ours.parts, content, texts, is_text):
            if part.WhichOneof("part") == "json":
                assert same(json.loads(part.json), block)
            elif whether:
                assert part.text == text
    langchain = {}
    if "langchain" in ours.metadata.fields:
        langchain = shown(ours.metadata.fields["langchain"])
    kwargs = dict(langchain.get("additional_kwargs", {}))
    if ours.reasoning:
        kwargs["reasoning_content"] = ours.reasoning
    assert same(kwargs, data["additional_kwargs"])
    assert same(langchain.get("response_metadata", {}), data["response_metadata"])
    if ours.role == pb.ROLE_ASSISTANT:
        assert len(ours.tool_calls) == len(data["tool_calls"])
        for call, theirs in zip(ours.tool_calls, data["tool_calls"]):
            assert (call.id, call.name) == (theirs["id"] or "", theirs["name"])
            assert same(json.loads(call.arguments), theirs["args"])
        assert same(langchain.get("invalid_tool_calls", []), data["invalid_tool_calls"])
        usage = data.get("usage_metadata")
        if usage and ours.HasField("usage"):
            counts = (ours.usage.input_tokens, ours.usage.output_tokens, ours.usage.total_tokens)
            assert counts == tuple(usage[key] for key in USAGE)
        elif usage:
            assert same(langchain["usage_metadata"], usage)
    if ours.role == pb.ROLE_TOOL:
        assert ours.tool_call_id == plain(data["tool_call_id"])
        assert same(langchain.get("artifact"), data.get("artifact"))
    if stored["type"] == "chat":
        assert ours.role_name == data["role"]


def check_both_ways(redis, server, session, message):
    theirs = history(redis, session)
    theirs.add_message(message)
    (stored,) = redis.raw(session)
    (ours,) = server.get(session)
    assert ours.raw == stored
    check_fields(json.loads(stored), ours)
    server.append(f"{session}-copy", ours)
    (first,) = theirs.messages
    (second,) = history(redis, f"{session}-copy").messages
    assert type(first) is type(second)
    assert as_langchain_sees(first) == as_langchain_sees(second)


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_a_message_of_langchains_is_read_in_full_and_is_equal_when_appended_again(
    redis, server, session, number
):
    assert len(MESSAGES) >= 80
    check_both_ways(redis, server, session, MESSAGES[number])


any_text = st.text(st.characters(), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(any_text.filter(lambda key: key != "chat_memory"), values, max_size=3)
blocks = any_text | objects | objects.map(lambda block: {**block, "type": "text", "text": "x"})
contents = any_text | st.lists(blocks, max_size=3)
common = {
    "content": contents,
    "id": st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20),
    "additional_kwargs": objects,
    "response_metadata": objects,
}
calls = st.lists(
    st.builds(lambda args: {**CALL, "args": args}, objects), max_size=2
)
theirs = st.one_of(
    st.builds(lc.HumanMessage, **common),
    st.builds(lc.SystemMessage, **common),
    st.builds(lc.AIMessage, **common, tool_calls=calls),
    st.builds(lc.ToolMessage, **common, tool_call_id=st.just("c1"), artifact=values),
    st.builds(lc.ChatMessage, **common, role=st.sampled_from(["critic", "user", "x y"])),
)


@SETTINGS
@given(message=theirs)
def test_any_message_that_langchain_writes_is_read_and_is_equal_when_appended_again(
    redis, server, message
):
    redis.client.delete("message_store:random", "message_store:random-copy")
    check_both_ways(redis, server, "random", message)


utf8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
name = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | utf8,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(utf8, inner, max_size=3),
    max_leaves=8,
)
KEYS = """additional_kwargs response_metadata type status artifact usage_metadata content name id role
    invalid_tool_calls tool_call_chunks chunk_position tool_calls tool_call_id example self text
    content_blocks dict lc_kwargs copy json anything __class__""".split()
awkward = st.one_of(
    json_values,
    st.sampled_from(
        [[], {}, [{}], [INVALID], [CHUNK], [CALL], USAGE, "last", "error", "", 5, None, True]
        + ["AIMessageChunk", "HumanMessageChunk", "RemoveMessageChunk", "ai", "human", "chat"]
        + [{"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}]
        + [{"tool_calls": [{"id": 5, "function": {"name": "f", "arguments": "{}"}}]}]
        + [{"$json": text} for text in ("NaN", '"\\ud800"', "9" * 5_000, '{"\\ud800": 1}')]
    ),
)


def struct(fields):
    made = pb.Message().metadata
    made.update(fields)
    return made


parts = st.one_of(
    st.builds(lambda text: pb.ContentPart(text=text), utf8),
    st.builds(lambda value: pb.ContentPart(json=json.dumps(value)), json_values),
    st.builds(lambda url: pb.ContentPart(image_url=pb.ImageUrl(url=url)), utf8),
)


@st.composite
def our_messages(draw):
    """Mostly with the fields of the role, so that many are accepted."""
    role = draw(st.sampled_from([1, 2, 3, 3, 4, 5]))
    is_strict = draw(st.integers(0, 3)) > 0
    message = pb.Message(role=role, id=draw(name), name=draw(name), content=draw(utf8) or "x")
    if role == pb.ROLE_OTHER or not is_strict:
        names = ["chat", "function", "remove", "HumanMessageChunk", "ai", "critic", ""]
        message.role_name = draw(st.sampled_from(names))
    if message.role_name == "remove":
        message.content = ""
    if role == pb.ROLE_TOOL or not is_strict:
        message.tool_call_id = draw(st.sampled_from(["c1", "é", ""]))
    if role == pb.ROLE_ASSISTANT or not is_strict:
        arguments = ["", "{}", '{"a": NaN}', '{"a": {}}'] + ([] if is_strict else ["[]", "null"])
        for text in draw(st.lists(st.sampled_from(arguments), max_size=2)):
            message.tool_calls.append(pb.ToolCall(id=draw(name), name="f", arguments=text))
        if draw(st.booleans()):
            message.usage.input_tokens = draw(st.integers(0 if is_strict else -1, 9))
    if draw(st.booleans()) and message.role_name != "remove":
        some = draw(st.lists(parts, max_size=2))
        message.parts.extend(part for part in some if not is_strict or is_taken(part))
    if draw(st.booleans()):
        message.metadata.update({"own": draw(json_values)})
    if draw(st.booleans()):
        known = st.dictionaries(st.sampled_from(KEYS), awkward, min_size=1, max_size=2)
        message.metadata.update({"langchain": draw(known)})
    return message


def is_taken(part):
    if part.WhichOneof("part") == "json":
        return isinstance(json.loads(part.json), (dict, str))
    return part.WhichOneof("part") == "text" or part.image_url.url != ""


ours = our_messages()


@settings(SETTINGS, max_examples=400)
@given(message=ours)
def test_any_message_that_we_accept_is_read_by_langchain(redis, server, message):
    if LINE == "0.1" and message.role_name == "remove":
        return  # It has no such message.
    check_accepted(redis, server, message)


def check_accepted(redis, server, message):
    redis.client.delete("message_store:random")
    try:
        (stored,) = server.append("random", message)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        return False
    (read,) = history(redis, "random").messages
    if isinstance(read.content, str):
        assert plain(read.content) == stored.content
    return True


ALL_ROLES = [("", pb.ROLE_USER), ("", pb.ROLE_ASSISTANT), ("", pb.ROLE_TOOL)]
ALL_ROLES += [("critic", pb.ROLE_OTHER), ("remove", pb.ROLE_OTHER)]
AWKWARD = [None, True, 5, 1.5, "", "x", "last", "success", "HumanMessageChunk", "AIMessageChunk"]
AWKWARD += [[], {}, [5], [{}], {"a": 1}, {"a": None}, [INVALID], [CHUNK], [CALL], USAGE]
AWKWARD += [[{**INVALID, "index": 1}], [{**CHUNK, "index": 1.5}], [{**CHUNK, "foo": 1}]]
AWKWARD += [{"input_token_details": {"audio": value}} for value in (1, 1.5, None, "x")]
AWKWARD += [{**USAGE, "output_token_details": None}, "PoemMessageChunk"]


@pytest.mark.parametrize("key", KEYS)
def test_each_known_key_with_each_wrong_value_is_normalised_or_refused(redis, server, key):
    for role_name, role in ALL_ROLES:
        if LINE == "0.1" and role_name == "remove":
            continue
        for value in AWKWARD:
            message = pb.Message(
                role=role,
                role_name=role_name,
                id="m",
                name="n",
                content="" if role_name == "remove" else "x",
                tool_call_id="c" if role == pb.ROLE_TOOL else "",
                metadata=struct({"langchain": {key: value}}),
            )
            check_accepted(redis, server, message)


def test_what_cannot_be_stored_again_is_refused_by_its_field(server, session):
    deep_text = json.dumps(deep(101))
    for field, message in [
        ("messages[0].parts[0].json", {"parts": [pb.ContentPart(json=deep_text)]}),
        ("messages[0].metadata.langchain", {"metadata": struct({"langchain": {"x": {"$json": deep_text}}})}),
        ("messages[0].metadata.langchain", {"metadata": struct({"langchain": {"x": {"$json": "9" * 4301}}})}),
        ("messages[0].tool_calls[0].arguments", {"role": 3, "tool_calls": [pb.ToolCall(name="f", arguments="[]")]}),
    ]:
        with pytest.raises(grpc.RpcError) as error:
            server.append(session, pb.Message(**{"role": 2, "content": "x", **message}))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details().startswith(field), error.value.details()


def test_elements_that_langchain_cannot_read_are_shown_with_their_bytes(redis, server, session):
    broken = [b"", b"junk", b"\xff\xfe", b'{"type": "human"}', b"[" * 100_000, b'{"type": "human", "data": {']
    odd = [b'{"type":"user","data":{"content":7}}', b'{"type":"poem","data":{"content":null}}']
    odd.append(b'{"type":"human","data":{"content":"x","d":' + b"[" * 5_000 + b"NaN" + b"]" * 5_000 + b"}}")
    for element in broken + odd:
        redis.client.lpush(f"message_store:{session}", element)
    messages = server.get(session)
    assert [message.raw for message in messages] == broken + odd
    problems = [message.problem == pb.PROBLEM_UNREADABLE for message in messages]
    assert problems == [True] * len(broken) + [False] * len(odd)


def test_what_we_write_is_the_message_that_langchain_has_for_it(redis, server, session):
    image = pb.ImageUrl(url="https://example.com/a.png", detail="low")
    data = pb.InlineData(media_type="image/png", data=b"\0\1\2")
    file = pb.InlineData(media_type="application/pdf", data=b"\0\1\2")
    calls = [pb.ToolCall(id="c1", name="add", arguments='{"a": 1.0}'), pb.ToolCall(name="now")]
    given = [
        pb.Message(role=pb.ROLE_SYSTEM, content="be kind", id="a", name="root"),
        pb.Message(role=pb.ROLE_USER, content='é 🎉 \0 "\\', id="b"),
        pb.Message(
            role=pb.ROLE_USER,
            id="c",
            parts=[
                pb.ContentPart(text="look"),
                pb.ContentPart(image_url=image),
                pb.ContentPart(inline_data=data),
                pb.ContentPart(inline_data=file),
                pb.ContentPart(json='{"type":"odd","x":[1e400]}'),
                pb.ContentPart(json='"bare"'),
            ],
        ),
        pb.Message(
            role=pb.ROLE_ASSISTANT,
            id="d",
            reasoning="because",
            tool_calls=calls,
            usage=pb.Usage(input_tokens=3, output_tokens=4),
        ),
        pb.Message(role=pb.ROLE_TOOL, id="e", tool_call_id="c1", content="", name="add"),
        pb.Message(role=pb.ROLE_OTHER, role_name="critic", id="f", content="meh"),
        pb.Message(role=pb.ROLE_OTHER, role_name="function", id="g", name="add", content="3"),
        pb.Message(
            role=pb.ROLE_ASSISTANT,
            id="h",
            content="x",
            metadata=struct({"langchain": {"type": "AIMessageChunk", "extra": {"a": 1}}}),
        ),
    ]
    server.append(session, *given)
    blocks = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}},
        {"type": "file", "source_type": "base64", "data": "AAEC", "mime_type": "application/pdf"},
        {"type": "odd", "x": [float("inf")]},
        "bare",
    ]
    kinds = {} if LINE == "0.1" else {"type": "tool_call"}
    calls = [{"name": "add", "args": {"a": 1.0}, "id": "c1", **kinds}]
    calls.append({"name": "now", "args": {}, "id": None, **kinds})
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    expected = [
        lc.SystemMessage(content="be kind", id="a", name="root"),
        lc.HumanMessage(content='é 🎉 \0 "\\', id="b"),
        lc.HumanMessage(content=blocks, id="c"),
        lc.AIMessage(
            content="",
            id="d",
            additional_kwargs={"reasoning_content": "because"},
            tool_calls=calls,
            usage_metadata=usage,
        ),
        lc.ToolMessage(content="", id="e", tool_call_id="c1", name="add"),
        lc.ChatMessage(content="meh", id="f", role="critic"),
        lc.FunctionMessage(content="3", id="g", name="add"),
        lc.AIMessageChunk(content="x", id="h", extra={"a": 1}),
    ]
    read = history(redis, session).messages
    assert [type(message) for message in read] == [type(message) for message in expected]
    for one, other in zip(read, expected):
        assert as_langchain_sees(one) == as_langchain_sees(other)


def test_our_own_facts_survive_langchains_read_and_add(redis, server, session):
    own = struct({"own": {"k": [1, "é"]}})
    server.append(session, pb.Message(role=pb.ROLE_USER, content="a", id="a", metadata=own))
    list(server.chat(session, "b", turn_id="t"))
    copy = history(redis, f"{session}-copy")
    for message in history(redis, session).messages:
        copy.add_message(message)
    for before, after in zip(server.get(session), server.get(f"{session}-copy")):
        for message in (before, after):
            message.ClearField("raw")
            message.ClearField("raw_size")
        assert before == after
        assert after.HasField("create_time")


def test_the_deepest_json_that_we_take_is_read_by_langchain(redis, server, session):
    text = json.dumps(deep(99))
    extra = struct({"langchain": {"extra": {"$json": json.dumps(deep(90))}}})
    server.append(
        session,
        pb.Message(role=pb.ROLE_USER, parts=[pb.ContentPart(json=f'{{"x": {text}}}')]),
        pb.Message(
            role=pb.ROLE_ASSISTANT,
            tool_calls=[pb.ToolCall(name="f", arguments=f'{{"x": {text}}}')],
            metadata=extra,
        ),
    )
    assert len(history(redis, session).messages) == 2
