//! Stored bytes ⇄ [`Message`]: the JSON that LangChain's `RedisChatMessageHistory` keeps, read
//! with tolerance and written with care. Does no I/O and knows no store.
//!
//! The format is that of langchain-core's `message_to_dict`, printed by Python's `json.dumps`:
//! `{"type": T, "data": {"content": …, "additional_kwargs": {}, …}}`, ASCII only. What LangChain
//! refuses on reading, this module never writes: one such element makes the whole session
//! unreadable there.
//!
//! Our own facts live under `data.additional_kwargs.chat_memory`, which LangChain keeps when it
//! reads and writes a message, and which its OpenAI client does not send to the model:
//! `create_time` (Unix milliseconds; absent where the id already holds it), `interrupted`,
//! `turn_id`, `metadata`.
//!
//! What LangChain stores and [`Draft`] has no field for goes through `Draft::langchain`, a JSON
//! object with LangChain's own names, and comes back on writing.

use std::{borrow::Cow, collections::HashMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::message::{
    self, Content, Draft, Json, Message, Part, Role, ToolCall, Usage, Violation, time_of_id,
};

/// The key under `additional_kwargs` that holds our own facts.
const OURS: &str = "chat_memory";

/// The key under `additional_kwargs` where providers' reasoning is kept by LangChain's clients.
const REASONING: &str = "reasoning_content";

/// The stored bytes are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stored bytes are not a message")]
pub struct Unreadable;

// ---------------------------------------------------------------------------------------------
// Reading

/// Reads a stored element. Takes linear time and never panics, whatever the bytes.
pub fn decode(bytes: &[u8]) -> Result<Message, Unreadable> {
    let text = std::str::from_utf8(bytes).map_err(|_| Unreadable)?;
    match decode_plain(text) {
        Some(message) => Ok(message),
        None => decode_any(text),
    }
}

/// Reads what most elements are: a text, perhaps an id and what the provider said of the answer, the
/// rest just as `json.dumps` prints what LangChain fills in, and nothing of ours but a turn. `None` for
/// any other; never anything else than [`decode_any`] would read, which takes several times as long.
fn decode_plain(text: &str) -> Option<Message> {
    const KINDS: [(&str, Role); 2] = [("human\"", Role::User), ("ai\"", Role::Assistant)];
    let rest = text.strip_prefix(r#"{"type": ""#)?;
    let mut kinds = KINDS.into_iter();
    let (kind, role) = kinds.find(|(kind, _)| rest.starts_with(kind))?;
    let rest = rest[kind.len()..].strip_prefix(r#", "data": {"content": "#)?;
    let (content, rest) = split_string(rest)?;
    let rest = rest.strip_prefix(r#", "additional_kwargs": {"#)?;
    let (turn_id, rest) = match rest.strip_prefix(r#""chat_memory": {"turn_id": "#) {
        Some(rest) => {
            let (turn_id, rest) = split_string(rest)?;
            (Some(turn_id.into_owned()), rest.strip_prefix("}")?)
        }
        None => (None, rest),
    };
    let rest = rest.strip_prefix(r#"}, "response_metadata": "#)?;
    let (response, rest) = match rest.strip_prefix("{}") {
        Some(rest) => (None, rest),
        None if rest.starts_with('{') => {
            split_json::<&RawValue>(rest).map(|(v, r)| (Some(v), r))?
        }
        None => return None,
    };
    let rest = rest.strip_prefix(r#", "type": ""#)?.strip_prefix(kind)?;
    let rest = rest.strip_prefix(r#", "name": null, "id": "#)?;
    let (id, rest) = match rest.strip_prefix("null") {
        Some(rest) => (None, rest),
        None => split_string(rest).map(|(id, rest)| (Some(id), rest))?,
    };
    // Older writers say so.
    let rest = rest.strip_prefix(r#", "example": false"#).unwrap_or(rest);
    let (usage, rest) = match role {
        Role::Assistant => {
            let rest = rest.strip_prefix(r#", "tool_calls": [], "invalid_tool_calls": []"#)?;
            match rest.strip_prefix(r#", "usage_metadata": "#) {
                Some(rest) => split_usage(rest)?,
                None => (None, rest),
            }
        }
        _ => (None, rest),
    };
    // What is empty has a meaning there.
    if rest != "}}" || content.is_empty() || id.as_ref().is_some_and(|id| id.is_empty()) {
        return None;
    }

    let mut extra = Extra::default();
    if let Some(response) = response {
        extra.add("response_metadata", response.get());
    }
    let create_time_ms = id.as_deref().and_then(time_of_id);
    Some(Message {
        draft: Draft {
            id: id.map(Cow::into_owned),
            usage,
            langchain: extra.into_json(),
            ..Draft::text(role, content)
        },
        create_time_ms,
        interrupted: false,
        turn_id,
    })
}

/// Reads the JSON string that a text begins with, and returns what comes after it. `None` if there is
/// none, or one that UTF-8 cannot hold.
fn split_string(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let inner = text.strip_prefix('"')?;
    let end = memchr::memchr2(b'"', b'\\', inner.as_bytes())?;
    let (shown, rest) = inner.split_at(end);
    if let Some(rest) = rest.strip_prefix('"') {
        let is_odd = |odd, byte| odd | (byte < b' ');
        return (!shown.bytes().fold(false, is_odd)).then_some((Cow::Borrowed(shown), rest));
    }
    split_json::<String>(text).map(|(shown, rest)| (Cow::Owned(shown), rest))
}

/// Reads the JSON value that a text begins with, and returns what comes after it.
fn split_json<'a, T: Deserialize<'a>>(text: &'a str) -> Option<(T, &'a str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter();
    let value = values.next()?.ok()?;
    Some((value, &text[values.byte_offset()..]))
}

/// Reads what is said of usage where a text begins: nothing, or just the counts that there must be.
fn split_usage(text: &str) -> Option<(Option<Usage>, &str)> {
    if let Some(rest) = text.strip_prefix("null") {
        return Some((None, rest));
    }
    let mut rest = text;
    let mut count = |before: &str| -> Option<i64> {
        let number = rest.strip_prefix(before)?;
        let end = number.find(|char: char| !char.is_ascii_digit())?;
        let (digits, after) = number.split_at(end);
        rest = after;
        let is_json = digits == "0" || !digits.starts_with('0');
        digits.parse().ok().filter(|_| is_json)
    };
    let usage = Usage {
        input_tokens: count(r#"{"input_tokens": "#)?,
        output_tokens: count(r#", "output_tokens": "#)?,
        total_tokens: count(r#", "total_tokens": "#)?,
    };
    Some((Some(usage), rest.strip_prefix('}')?))
}

fn decode_any(text: &str) -> Result<Message, Unreadable> {
    let hidden;
    let envelope = match Envelope::parse(text) {
        Some(envelope) => envelope,
        // Python writes numbers that JSON does not have.
        None => {
            hidden = message::hide_non_finite(text);
            Envelope::of(&Object::parse(&hidden).ok_or(Unreadable)?)
        }
    };
    let kind = envelope.kind.and_then(read_text).ok_or(Unreadable)?;
    let data = envelope.data.ok_or(Unreadable)?;

    let role = role_of(&kind, &data);
    let is_assistant = role == Role::Assistant;
    let is_tool = role == Role::Tool;
    let is_chat = kind_of(&role) == "chat";
    let mut extra = Extra::default();
    let mut ours = None;
    if kind != kind_of(&role) {
        extra.add("type", &string(&kind));
    }

    let mut message = Message {
        draft: Draft::text(role, ""),
        create_time_ms: None,
        interrupted: false,
        turn_id: None,
    };
    let draft = &mut message.draft;
    for member in data.last_of_each() {
        let (value, text) = (member.value, member.value.get());
        match &*member.name {
            "type" => {}
            "role" if is_chat => extra.add_if(is_inexact(value), member),
            "content" => {
                let (content, is_exact) = read_content(value);
                let is_list = content == Content::Parts(Vec::new());
                draft.content = content;
                extra.add_if(is_list || !is_exact, member);
            }
            "id" => {
                draft.id = read_label(value);
                extra.add_if(is_inexact(value), member);
            }
            "name" => {
                draft.name = read_label(value);
                extra.add_if(is_inexact(value) || text == "\"\"", member);
            }
            "tool_call_id" if is_tool => {
                draft.tool_call_id = read_label(value);
                extra.add_if(is_inexact(value) || text == "\"\"", member);
            }
            "tool_calls" if is_assistant => {
                draft.tool_calls = read_tool_calls(value);
                let lossy = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
                let mut calls = draft.tool_calls.iter();
                extra.add_if(calls.any(|c| lossy(&c.name) || lossy(&c.id)), member);
            }
            "usage_metadata" if is_assistant => {
                draft.usage = read_usage(value);
                let taken = if draft.usage.is_some() {
                    &USAGE_KEYS[..]
                } else {
                    &[]
                };
                let rest =
                    read_object(value).map_or_else(String::new, |usage| usage.without(taken));
                if !rest.is_empty() {
                    extra.add("usage_metadata", &format!("{{{rest}}}"));
                }
            }
            "additional_kwargs" if text == "{}" => {}
            "additional_kwargs" => {
                let Some(kwargs) = read_object(value) else {
                    extra.add_if(true, member);
                    continue;
                };
                ours = kwargs.get(OURS).and_then(read_object);
                let reasoning = kwargs.get(REASONING).filter(|text| !is_inexact(text));
                let reasoning = reasoning.and_then(read_string);
                let mut taken = &[OURS][..];
                if is_assistant && reasoning.as_ref().is_some_and(|text| !text.is_empty()) {
                    draft.reasoning = reasoning;
                    taken = &[OURS, REASONING];
                }
                let rest = kwargs.without(taken);
                if !rest.is_empty() {
                    extra.add("additional_kwargs", &format!("{{{rest}}}"));
                }
            }
            "response_metadata" if is_empty(text) => {}
            // What every writer adds without meaning anything by it.
            "example" if text == "false" => {}
            "artifact" if is_tool && text == "null" => {}
            "status" if is_tool && text == "\"success\"" => {}
            "invalid_tool_calls" if is_assistant && is_empty(text) => {}
            _ => extra.add_if(true, member),
        }
    }
    let says_nothing = draft.content == Content::Text(String::new());
    if says_nothing && extra.0.is_empty() && may_not_be_empty(draft) {
        // What LangChain left empty may be left empty again.
        extra.add("content", "\"\"");
    }
    if draft.role == Role::Tool {
        // LangChain cannot read a tool message without this; we read it as a result of no call.
        draft.tool_call_id.get_or_insert_default();
    }
    draft.langchain = extra.into_json();

    if let Some(ours) = ours {
        message.create_time_ms = ours
            .get("create_time")
            .and_then(|time| time.get().parse().ok());
        message.interrupted = ours
            .get("interrupted")
            .is_some_and(|flag| flag.get() == "true");
        message.turn_id = ours.get("turn_id").and_then(read_string);
        let metadata = ours
            .get("metadata")
            .filter(|metadata| read_object(metadata).is_some());
        message.draft.metadata = metadata.map(|metadata| Json::from_raw(metadata.to_owned()));
    }
    if message.create_time_ms.is_none() {
        message.create_time_ms = message.draft.id.as_deref().and_then(time_of_id);
    }
    Ok(message)
}

/// Whether a client must give such a message contents.
fn may_not_be_empty(draft: &Draft) -> bool {
    let is_remove = kind_of(&draft.role) == "remove";
    draft.role != Role::Tool && !is_remove && draft.tool_calls.is_empty()
}

/// The keys of `usage_metadata` that [`Usage`] has fields for.
const USAGE_KEYS: [&str; 3] = ["input_tokens", "output_tokens", "total_tokens"];

fn role_of(kind: &str, data: &Object<'_>) -> Role {
    match kind {
        // `user` and `assistant` are not LangChain's, but what scripts write by hand.
        "human" | "HumanMessageChunk" | "user" => Role::User,
        "ai" | "AIMessageChunk" | "assistant" => Role::Assistant,
        "system" | "SystemMessageChunk" => Role::System,
        "tool" | "ToolMessageChunk" => Role::Tool,
        "function" | "FunctionMessageChunk" => Role::Other("function".to_owned()),
        // Chunks of no kind that LangChain has are like any other type that it does not have.
        "chat" | "ChatMessageChunk" => {
            let role = data.get("role").and_then(read_string);
            Role::Other(role.unwrap_or_else(|| "chat".to_owned()))
        }
        other => Role::Other(other.to_owned()),
    }
}

/// The `type` that a role is written with.
fn kind_of(role: &Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "human",
        Role::Assistant => "ai",
        Role::Tool => "tool",
        Role::Other(name) if name == "function" => "function",
        Role::Other(name) if name == "remove" => "remove",
        Role::Other(_) => "chat",
    }
}

/// Reads contents, and whether they are exactly what is written.
fn read_content(value: &RawValue) -> (Content, bool) {
    if let Some(text) = message::read_string(value.get()) {
        return (Content::Text(text.shown.into_owned()), text.is_exact);
    }
    if value.get() == "null" {
        return (Content::Text(String::new()), true);
    }
    let parts = match serde_json::from_str::<Vec<&RawValue>>(value.get()) {
        Ok(parts) => parts.into_iter().map(read_part).collect(),
        Err(_) => vec![Part::Json(Json::from_raw(value.to_owned()))],
    };
    (Content::Parts(parts), true)
}

/// Reads a piece of contents: as what we know if writing it would give the same, as JSON if not.
fn read_part(value: &RawValue) -> Part {
    let known = read_object(value).and_then(|block| known_part(&block));
    match known {
        Some(part) if write_part(&part) == python_style(value.get()) => part,
        _ => Part::Json(Json::from_raw(value.to_owned())),
    }
}

fn known_part(block: &Object<'_>) -> Option<Part> {
    let field = |object: &Object<'_>, key| object.get(key).and_then(read_string);
    match &*block.get("type").and_then(read_text)? {
        "text" => field(block, "text").map(Part::Text),
        "image_url" => {
            let image = block.get("image_url").and_then(read_object)?;
            let url = field(&image, "url")?;
            let detail = field(&image, "detail");
            let inline = url
                .strip_prefix("data:")
                .and_then(|rest| rest.split_once(";base64,"))
                .filter(|_| detail.is_none());
            match inline.and_then(|(kind, data)| Some((kind, BASE64.decode(data).ok()?))) {
                Some((media_type, data)) => Some(Part::InlineData {
                    media_type: media_type.to_owned(),
                    data: data.into(),
                }),
                None => Some(Part::ImageUrl { url, detail }),
            }
        }
        "file" => Some(Part::InlineData {
            media_type: field(block, "mime_type")?,
            data: BASE64.decode(field(block, "data")?).ok()?.into(),
        }),
        _ => None,
    }
}

fn read_tool_calls(value: &RawValue) -> Vec<ToolCall> {
    let calls: Vec<&RawValue> = serde_json::from_str(value.get()).unwrap_or_default();
    calls
        .into_iter()
        .filter_map(read_object)
        .map(|call| {
            let arguments = call.get("args").filter(|args| read_object(args).is_some());
            ToolCall {
                id: call.get("id").and_then(read_label).unwrap_or_default(),
                name: call.get("name").and_then(read_label).unwrap_or_default(),
                arguments: Json::from_raw(arguments.map_or_else(empty_object, RawValue::to_owned)),
            }
        })
        .collect()
}

fn empty_object() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap_or_default()
}

fn read_usage(value: &RawValue) -> Option<Usage> {
    let usage = read_object(value)?;
    let count = |key| usage.get(key).and_then(|count| count.get().parse().ok());
    Some(Usage {
        input_tokens: count("input_tokens")?,
        output_tokens: count("output_tokens")?,
        total_tokens: count("total_tokens")?,
    })
}

/// A text that is absent when empty or null. Numbers, which other writers may leave where LangChain
/// has a text, are taken as their digits.
fn read_label(value: &RawValue) -> Option<String> {
    let label = match read_string(value) {
        Some(text) => text,
        None if value
            .get()
            .starts_with(|first: char| first == '-' || first.is_ascii_digit()) =>
        {
            value.get().to_owned()
        }
        None => return None,
    };
    Some(label).filter(|label| !label.is_empty())
}

fn read_string(value: &RawValue) -> Option<String> {
    read_text(value).map(Cow::into_owned)
}

fn read_text(value: &RawValue) -> Option<Cow<'_, str>> {
    message::read_string(value.get()).map(|text| text.shown)
}

/// Whether this is a text that UTF-8 cannot hold.
fn is_inexact(value: &RawValue) -> bool {
    message::read_string(value.get()).is_some_and(|text| !text.is_exact)
}

fn read_object(value: &RawValue) -> Option<Object<'_>> {
    Object::parse(value.get())
}

fn is_empty(json: &str) -> bool {
    matches!(json, "{}" | "[]" | "null")
}

/// Members of an object that are compared each with each; in larger ones they are looked up, so that
/// an object takes linear time.
const SCANNED_MAX: usize = 32;

/// A JSON object whose values stay as they are written, so that nothing is altered: no number, no
/// order, no nesting.
#[derive(Default)]
struct Object<'a>(Vec<Member<'a>>);

struct Member<'a> {
    /// The key; where UTF-8 cannot hold it, its JSON text.
    name: Cow<'a, str>,
    key: &'a RawValue,
    value: &'a RawValue,
}

impl Member<'_> {
    fn has_lone_surrogate(&self) -> bool {
        self.name == self.key.get()
    }
}

impl<'a> Object<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        // Without an error of serde_json's to make: most values that are tried are none.
        if !text.trim_ascii_start().starts_with('{') {
            return None;
        }
        serde_json::from_str(text).ok()
    }

    /// The value of a key. Of duplicates the last one counts, as in Python.
    fn get(&self, key: &str) -> Option<&'a RawValue> {
        let member = self.0.iter().rev().find(|member| member.name == key);
        member.map(|member| member.value)
    }

    /// Each key once, with the value that counts.
    fn last_of_each(&self) -> impl Iterator<Item = &Member<'a>> {
        let members = &self.0;
        let mut places = HashMap::new();
        if members.len() > SCANNED_MAX {
            places.extend(members.iter().enumerate().map(|(i, m)| (&*m.name, i)));
        }
        let is_last = move |place: usize| {
            let name = &*members[place].name;
            match places.get(name) {
                Some(last) => *last == place,
                None => members[place + 1..].iter().all(|later| later.name != name),
            }
        };
        let members = members.iter().enumerate();
        members.filter_map(move |(place, member)| is_last(place).then_some(member))
    }

    /// The members but those keys, as JSON text without braces.
    fn without(&self, keys: &[&str]) -> String {
        let mut members = Extra::default();
        for member in self.last_of_each() {
            members.add_if(!keys.contains(&&*member.name), member);
        }
        members.0
    }
}

/// The object around a message, with the inner one read in the same pass.
struct Envelope<'a> {
    kind: Option<&'a RawValue>,
    data: Option<Object<'a>>,
}

impl<'a> Envelope<'a> {
    /// `None` also where the data of an element is no object.
    fn parse(text: &'a str) -> Option<Self> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Envelope<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut kind, mut data) = (None, None);
                while let Some(key) = map.next_key::<&RawValue>()? {
                    match &*name_of(key) {
                        "type" => kind = Some(map.next_value()?),
                        "data" => data = Some(map.next_value()?),
                        _ => drop(map.next_value::<&RawValue>()?),
                    }
                }
                Ok(Envelope { kind, data })
            }
        }
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let envelope = deserializer.deserialize_map(Reader).ok()?;
        deserializer.end().ok()?;
        Some(envelope)
    }

    fn of(object: &Object<'a>) -> Self {
        Self {
            kind: object.get("type"),
            data: object.get("data").and_then(read_object),
        }
    }
}

/// A key; where UTF-8 cannot hold it, its JSON text.
fn name_of(key: &RawValue) -> Cow<'_, str> {
    match message::read_string(key.get()) {
        Some(name) if name.is_exact => name.shown,
        _ => Cow::Borrowed(key.get()),
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Vec<Member<'de>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // As many as a message has.
                let mut members = Vec::with_capacity(8);
                while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
                    let name = name_of(key);
                    members.push(Member { name, key, value });
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Reader).map(Object)
    }
}

/// Gathers what has no field of its own.
#[derive(Default)]
struct Extra(String);

impl Extra {
    fn add(&mut self, key: &str, json: &str) {
        push_member(&mut self.0, key, json);
    }

    fn add_if(&mut self, condition: bool, member: &Member<'_>) {
        if condition {
            push_raw_member(&mut self.0, member.key.get(), member.value.get());
        }
    }

    fn into_json(self) -> Option<Json> {
        if self.0.is_empty() {
            return None;
        }
        let object = RawValue::from_string(format!("{{{}}}", self.0)).ok()?;
        Some(Json::from_raw(object))
    }
}

/// Adds a member whose key needs no escapes.
fn push_member(members: &mut String, key: &str, json: &str) {
    push_key(members, key);
    members.push_str(json);
}

/// Begins such a member: its value is to follow.
fn push_key(members: &mut String, key: &str) {
    push_comma(members);
    for piece in ["\"", key, "\": "] {
        members.push_str(piece);
    }
}

fn push_raw_member(members: &mut String, key: &str, json: &str) {
    push_comma(members);
    for piece in [key, ": ", json] {
        members.push_str(piece);
    }
}

/// Between two members; before the first one, there is nothing or an open brace.
fn push_comma(members: &mut String) {
    if !members.is_empty() && !members.ends_with('{') {
        members.push_str(", ");
    }
}

// ---------------------------------------------------------------------------------------------
// Writing

/// What a client may put under `metadata.langchain`, checked: nothing there may make LangChain
/// refuse the message.
pub fn check_extra(path: &str, draft: &Draft) -> Result<(), Violation> {
    let Some(extra) = &draft.langchain else {
        return Ok(());
    };
    let field = format!("{path}.metadata.langchain");
    let broken = |key: &str, rule: &str| Err(Violation::new(format!("{field}.{key}"), rule));
    let Some(object) = Object::parse(extra.as_str()) else {
        return Err(Violation::new(field, "must be an object"));
    };
    let is_assistant = draft.role == Role::Assistant;
    let is_tool = draft.role == Role::Tool;
    let is_chat = kind_of(&draft.role) == "chat";
    let has_example = is_assistant || draft.role == Role::User;
    for member in object.last_of_each() {
        let (key, value) = (&*member.name, member.value);
        if member.has_lone_surrogate() || key.starts_with("__") {
            return broken(key, "is no key that LangChain reads");
        }
        match key {
            "additional_kwargs" => match read_object(value) {
                None => return broken(key, "must be an object"),
                Some(kwargs) if is_assistant && !are_kwargs_readable(&kwargs) => {
                    return broken(key, "must hold `tool_calls` as OpenAI has them");
                }
                Some(_) => {}
            },
            "response_metadata" if read_object(value).is_none() => {
                return broken(key, "must be an object");
            }
            "type" if !is_kind_of(value, &object, &draft.role) => {
                return broken(key, "must be a type of the message's role");
            }
            "content" if read_string(value).is_none() && value.get() != "[]" => {
                return broken(key, "must be a text or []");
            }
            "id" | "name" if read_string(value).is_none() => {
                return broken(key, "must be a text");
            }
            "tool_call_id" if is_tool && read_string(value).is_none() => {
                return broken(key, "must be a text");
            }
            "role" if is_chat && read_string(value).is_none() => {
                return broken(key, "must be a text");
            }
            "example" if has_example && !matches!(value.get(), "true" | "false") => {
                return broken(key, "must be true or false");
            }
            "status" if is_tool && !matches!(value.get(), "\"success\"" | "\"error\"") => {
                return broken(key, "must be \"success\" or \"error\"");
            }
            "usage_metadata" if is_assistant && !is_usage(value, draft.usage.is_some()) => {
                return broken(
                    key,
                    "must be the details of usage: objects of whole numbers",
                );
            }
            "tool_calls" if is_assistant && !is_list(value, is_tool_call) => {
                return broken(key, "must be a list of tool calls");
            }
            "invalid_tool_calls" if is_assistant && !is_list(value, is_invalid_call) => {
                return broken(key, "must be a list of invalid tool calls");
            }
            "tool_call_chunks" if is_assistant && !is_list(value, is_call_chunk) => {
                return broken(key, "must be a list of tool call chunks");
            }
            "chunk_position" if is_assistant && !matches!(value.get(), "\"last\"" | "null") => {
                return broken(key, "must be \"last\" or null");
            }
            "content_blocks" | "dict" | "self" | "text" => return broken(key, "is reserved"),
            _ => {}
        }
    }
    Ok(())
}

/// The id of a call that LangChain keeps as an empty text, where there must be one.
pub fn empty_call_id(extra: Option<&Json>) -> Option<String> {
    let extra = Object::parse(extra?.as_str())?;
    extra
        .get("tool_call_id")
        .and_then(read_string)
        .filter(String::is_empty)
}

fn is_kind_of(value: &RawValue, object: &Object<'_>, role: &Role) -> bool {
    let Some(kind) = read_string(value) else {
        return false;
    };
    let is_unknown_chunk = is_chunk(&kind) && !CHUNKS.contains(&kind.as_str());
    !is_unknown_chunk && kind_of(&role_of(&kind, object)) == kind_of(role)
}

fn is_count(value: &RawValue) -> bool {
    let digits = value.get().strip_prefix('-').unwrap_or(value.get());
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// What LangChain keeps beside the three counts of [`Usage`], or all of it where a count is more
/// than [`Usage`] can hold.
fn is_usage(value: &RawValue, has_counts: bool) -> bool {
    const COUNTS: [&str; 4] = ["audio", "cache_creation", "cache_read", "reasoning"];
    let Some(usage) = read_object(value) else {
        return false;
    };
    let is_whole = |key: &&str| usage.get(key).is_some_and(is_count);
    let are_details = |value: &RawValue| {
        let details = read_object(value);
        details.is_some_and(|details| {
            let mut members = details.0.iter();
            members.all(|member| {
                let must_count = COUNTS.contains(&&*member.name);
                !member.has_lone_surrogate() && (!must_count || is_count(member.value))
            })
        })
    };
    (has_counts || USAGE_KEYS.iter().all(is_whole))
        && usage.0.iter().all(|member| match &*member.name {
            "input_token_details" | "output_token_details" => are_details(member.value),
            _ => !member.has_lone_surrogate(),
        })
}

/// LangChain makes tool calls of what OpenAI's client left in `additional_kwargs`, and then checks
/// what it has made.
fn are_kwargs_readable(kwargs: &Object<'_>) -> bool {
    let calls = kwargs.get("tool_calls").map(RawValue::get);
    let calls = calls.and_then(|calls| serde_json::from_str::<Vec<&RawValue>>(calls).ok());
    let is_readable = |call: &RawValue| {
        let Some(call) = read_object(call) else {
            return true;
        };
        let Some(function) = call.get("function").and_then(read_object) else {
            return true;
        };
        let arguments = function.get("arguments").and_then(read_string);
        let is_text = |value: &RawValue| read_string(value).is_some();
        call.get("id").is_none_or(is_text_or_null)
            && function.get("name").is_some_and(is_text)
            && arguments.is_some_and(|text| text.is_empty() || text.trim().starts_with('{'))
    };
    calls.unwrap_or_default().into_iter().all(is_readable)
}

fn is_list(value: &RawValue, is_item: fn(&Object<'_>) -> bool) -> bool {
    let items: Option<Vec<&RawValue>> = serde_json::from_str(value.get()).ok();
    items.is_some_and(|items| {
        let mut objects = items.into_iter().map(read_object);
        objects.all(|object| object.is_some_and(|object| is_item(&object)))
    })
}

fn is_text_or_null(value: &RawValue) -> bool {
    value.get() == "null" || read_string(value).is_some()
}

fn is_tool_call(call: &Object<'_>) -> bool {
    call.0.iter().all(|member| match &*member.name {
        "name" => read_string(member.value).is_some(),
        "args" => read_object(member.value).is_some(),
        "id" | "type" => is_text_or_null(member.value),
        _ => false,
    }) && ["name", "args", "id"]
        .iter()
        .all(|key| call.get(key).is_some())
}

const INVALID_CALL_KEYS: [&str; 4] = ["name", "args", "id", "error"];
const CALL_CHUNK_KEYS: [&str; 4] = ["name", "args", "id", "index"];

fn is_invalid_call(call: &Object<'_>) -> bool {
    call.0.iter().all(|member| {
        let is_known = member.name == "type" || INVALID_CALL_KEYS.contains(&&*member.name);
        is_known && is_text_or_null(member.value)
    })
}

fn is_call_chunk(chunk: &Object<'_>) -> bool {
    chunk.0.iter().all(|member| match &*member.name {
        "index" => member.value.get() == "null" || is_count(member.value),
        "type" | "name" | "args" | "id" => is_text_or_null(member.value),
        _ => false,
    })
}

/// Calls as they are given, with `null` for what is not: langchain-core 0.1 needs every key.
fn write_calls(calls: Option<&RawValue>, keys: &[&str]) -> String {
    let calls: Vec<&RawValue> = calls
        .and_then(|calls| serde_json::from_str(calls.get()).ok())
        .unwrap_or_default();
    list(calls.into_iter().filter_map(read_object).map(|call| {
        let mut members = call.without(&[]);
        for key in keys {
            if call.get(key).is_none() {
                push_member(&mut members, key, "null");
            }
        }
        python_style(&format!("{{{members}}}"))
    }))
}

/// Writes an element as LangChain writes it.
pub fn encode(message: &Message) -> Bytes {
    let draft = &message.draft;
    let extra = draft.langchain.as_ref();
    let extra = extra.and_then(|extra| Object::parse(extra.as_str()));
    let extra = extra.unwrap_or_default();
    let kind = extra.get("type").and_then(read_string);
    let kind = kind.filter(|kind| CHUNKS.contains(&kind.as_str()));
    let kind = kind.as_deref().unwrap_or(kind_of(&draft.role));
    // A text of LangChain's that ours only shows: it stands for as long as ours is unchanged.
    let exact = |key: &str, shown: &str| {
        let value = extra.get(key)?;
        (read_string(value)? == shown).then(|| python_style(value.get()))
    };
    let push_required = |json: &mut String, key: &str, text: &str| {
        push_key(json, key);
        match exact(key, text) {
            Some(exact) => json.push_str(&exact),
            None => push_string(json, text),
        }
    };
    let push_optional = |json: &mut String, key: &str, text: &Option<String>| match text {
        Some(text) => push_required(json, key, text),
        None => push_member(json, key, exact(key, "").as_deref().unwrap_or("null")),
    };

    // Nearly all elements fit into it: what is beside the texts has 130 to 200 bytes.
    let mut json = String::with_capacity(draft.size() + 256);
    json.push('{');
    push_key(&mut json, "type");
    push_string(&mut json, kind);
    push_key(&mut json, "data");
    json.push('{');
    match &draft.content {
        Content::Text(text) if text.is_empty() && is_list_given(&extra) => {
            push_member(&mut json, "content", "[]");
        }
        Content::Text(text) => push_required(&mut json, "content", text),
        Content::Parts(parts) => {
            push_member(&mut json, "content", &list(parts.iter().map(write_part)));
        }
    }
    push_key(&mut json, "additional_kwargs");
    push_kwargs(&mut json, message, &extra);
    let response_metadata = extra.get("response_metadata");
    let response_metadata = response_metadata.map(|value| python_style(value.get()));
    let response_metadata = response_metadata.as_deref().unwrap_or("{}");
    push_member(&mut json, "response_metadata", response_metadata);
    push_key(&mut json, "type");
    push_string(&mut json, kind);
    push_optional(&mut json, "name", &draft.name);
    push_optional(&mut json, "id", &draft.id);
    match &draft.role {
        Role::Assistant => {
            let exact_calls = extra.get("tool_calls");
            let exact_calls = exact_calls.filter(|c| read_tool_calls(c) == draft.tool_calls);
            let calls = exact_calls.map(|calls| python_style(calls.get()));
            let calls = calls.unwrap_or_else(|| write_tool_calls(&draft.tool_calls));
            push_member(&mut json, "tool_calls", &calls);
            let invalid = write_calls(extra.get("invalid_tool_calls"), &INVALID_CALL_KEYS);
            push_member(&mut json, "invalid_tool_calls", &invalid);
            let usage = write_usage(draft.usage, &extra);
            push_member(&mut json, "usage_metadata", &usage);
        }
        Role::Tool => {
            let id = draft.tool_call_id.as_deref().unwrap_or_default();
            push_required(&mut json, "tool_call_id", id);
            let artifact = extra.get("artifact").map_or("null", RawValue::get);
            push_member(&mut json, "artifact", &python_style(artifact));
            let status = extra.get("status").map_or("\"success\"", RawValue::get);
            push_member(&mut json, "status", &python_style(status));
        }
        Role::Other(name) if kind_of(&draft.role) == "chat" => {
            push_required(&mut json, "role", name);
        }
        Role::System | Role::User | Role::Other(_) => {}
    }
    let written: &[&str] = match &draft.role {
        Role::Assistant => &["tool_calls", "invalid_tool_calls", "usage_metadata"],
        Role::Tool => &["tool_call_id", "artifact", "status"],
        Role::Other(_) if kind_of(&draft.role) == "chat" => &["role"],
        Role::System | Role::User | Role::Other(_) => &[],
    };
    const ALWAYS_WRITTEN: [&str; 6] = [
        "type",
        "content",
        "additional_kwargs",
        "response_metadata",
        "name",
        "id",
    ];
    for member in extra.last_of_each() {
        let key = &*member.name;
        if ALWAYS_WRITTEN.contains(&key) || written.contains(&key) {
            continue;
        }
        let value = match key {
            "tool_call_chunks" if draft.role == Role::Assistant => {
                write_calls(Some(member.value), &CALL_CHUNK_KEYS)
            }
            _ => python_style(member.value.get()),
        };
        push_raw_member(&mut json, &python_style(member.key.get()), &value);
    }
    json.push_str("}}");
    Bytes::from(json)
}

fn is_list_given(extra: &Object<'_>) -> bool {
    extra.get("content").is_some_and(|list| list.get() == "[]")
}

/// The chunks that LangChain reads.
const CHUNKS: [&str; 6] = [
    "HumanMessageChunk",
    "AIMessageChunk",
    "SystemMessageChunk",
    "ToolMessageChunk",
    "FunctionMessageChunk",
    "ChatMessageChunk",
];

fn is_chunk(kind: &str) -> bool {
    kind.ends_with("MessageChunk")
}

fn push_kwargs(json: &mut String, message: &Message, extra: &Object<'_>) {
    let given = extra.get("additional_kwargs").and_then(read_object);
    json.push('{');
    if let Some(given) = given {
        let ours = match &message.draft.reasoning {
            Some(_) => &[OURS, REASONING][..],
            None => &[OURS],
        };
        json.push_str(&python_style(&given.without(ours)));
    }
    if let Some(reasoning) = &message.draft.reasoning {
        push_key(json, REASONING);
        push_string(json, reasoning);
    }

    let mut ours = String::new();
    let time_in_id = message.draft.id.as_deref().and_then(time_of_id);
    if let Some(time) = message.create_time_ms
        && time_in_id != Some(time)
    {
        push_member(&mut ours, "create_time", &time.to_string());
    }
    if message.interrupted {
        push_member(&mut ours, "interrupted", "true");
    }
    if let Some(turn_id) = &message.turn_id {
        push_member(&mut ours, "turn_id", &string(turn_id));
    }
    if let Some(metadata) = &message.draft.metadata {
        push_member(&mut ours, "metadata", &python_style(metadata.as_str()));
    }
    if !ours.is_empty() {
        push_member(json, OURS, &format!("{{{ours}}}"));
    }
    json.push('}');
}

fn write_part(part: &Part) -> String {
    match part {
        Part::Text(text) => format!("{{\"type\": \"text\", \"text\": {}}}", string(text)),
        Part::ImageUrl { url, detail } => {
            let mut image = String::new();
            push_member(&mut image, "url", &string(url));
            if let Some(detail) = detail {
                push_member(&mut image, "detail", &string(detail));
            }
            format!("{{\"type\": \"image_url\", \"image_url\": {{{image}}}}}")
        }
        // The form that every version of LangChain's chat models understands for images.
        Part::InlineData { media_type, data } if media_type.starts_with("image/") => {
            let url = format!("data:{media_type};base64,{}", message::base64(data));
            let url = string(&url);
            format!("{{\"type\": \"image_url\", \"image_url\": {{\"url\": {url}}}}}")
        }
        Part::InlineData { media_type, data } => {
            let data = message::base64(data);
            let media_type = string(media_type);
            format!(
                "{{\"type\": \"file\", \"source_type\": \"base64\", \"data\": \"{data}\", \
                 \"mime_type\": {media_type}}}"
            )
        }
        Part::Json(json) => python_style(json.as_str()),
    }
}

fn write_tool_calls(calls: &[ToolCall]) -> String {
    list(calls.iter().map(|call| {
        let id = Some(call.id.as_str()).filter(|id| !id.is_empty());
        format!(
            "{{\"name\": {}, \"args\": {}, \"id\": {}, \"type\": \"tool_call\"}}",
            string(&call.name),
            python_style(call.arguments.as_str()),
            id.map_or_else(|| "null".to_owned(), string),
        )
    }))
}

fn write_usage(usage: Option<Usage>, extra: &Object<'_>) -> String {
    let Some(usage) = usage else {
        // More than ours can hold, or nothing.
        let given = extra.get("usage_metadata");
        return given.map_or_else(|| "null".to_owned(), |usage| python_style(usage.get()));
    };
    let mut members = String::new();
    let counts = [usage.input_tokens, usage.output_tokens, usage.total_tokens];
    for (key, count) in USAGE_KEYS.iter().zip(counts) {
        push_member(&mut members, key, &count.to_string());
    }
    let details = extra.get("usage_metadata").and_then(read_object);
    let details = details.map_or_else(String::new, |details| details.without(&USAGE_KEYS));
    if !details.is_empty() {
        members.push_str(", ");
        members.push_str(&python_style(&details));
    }
    format!("{{{members}}}")
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A string as Python's `json.dumps` prints it: ASCII only.
fn string(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    push_string(&mut json, text);
    json
}

fn push_string(json: &mut String, text: &str) {
    json.push('"');
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        match character {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            '\u{8}' => json.push_str("\\b"),
            '\u{c}' => json.push_str("\\f"),
            ' '..='~' => {
                let plain = plain_bytes(rest.as_bytes());
                json.push_str(&rest[..plain]);
                rest = &rest[plain..];
                continue;
            }
            _ => push_escaped(json, character),
        }
        rest = &rest[character.len_utf8()..];
    }
    json.push('"');
}

/// How many bytes at the beginning stand for themselves in JSON. Looked at in pieces, each as a whole:
/// that is a few instructions for a piece, where each byte by itself takes as many.
fn plain_bytes(text: &[u8]) -> usize {
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
    let pieces = text.chunks_exact(16);
    let plain_pieces = pieces.take_while(|piece| {
        let plain = piece.iter().map(is_plain);
        plain.fold(true, |all, plain| all & plain)
    });
    let whole = plain_pieces.count() * 16;
    let rest = text[whole..].iter();
    whole + rest.take_while(|byte| is_plain(byte)).count()
}

fn push_escaped(json: &mut String, character: char) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for unit in character.encode_utf16(&mut [0; 2]) {
        json.push_str("\\u");
        for shift in [12, 8, 4, 0] {
            json.push(DIGITS[usize::from(*unit >> shift) & 15].into());
        }
    }
}

/// Well-formed JSON as Python's `json.dumps` spaces it: `", "` and `": "`, ASCII only. Numbers and
/// escapes stay as they are written.
fn python_style(json: &str) -> String {
    let mut styled = String::with_capacity(json.len() + json.len() / 8);
    let mut in_string = false;
    let mut escaped = false;
    for character in json.chars() {
        if in_string {
            if character.is_ascii() && character != '\u{7f}' {
                styled.push(character);
            } else {
                push_escaped(&mut styled, character);
            }
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
            continue;
        }
        match character {
            '"' => {
                in_string = true;
                styled.push(character);
            }
            ',' => styled.push_str(", "),
            ':' => styled.push_str(": "),
            ' ' | '\t' | '\n' | '\r' => {}
            _ => styled.push(character),
        }
    }
    match message::show_non_finite(&styled) {
        Cow::Borrowed(_) => styled,
        Cow::Owned(shown) => shown,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::TestCaseError;

    use super::*;

    /// Elements as langchain-core 1.x writes them, one of each kind.
    const ELEMENTS: &[&str] = &[
        r#"{"type": "ai", "data": {"content": "a\nb", "additional_kwargs": {"chat_memory": {"turn_id": "t"}}, "response_metadata": {"model_name": "m"}, "type": "ai", "name": null, "id": "cm_ZqTAp6-7kR3_xY", "tool_calls": [], "invalid_tool_calls": [], "usage_metadata": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}}}"#,
        r#"{"type": "human", "data": {"content": "hi", "additional_kwargs": {}, "response_metadata": {}, "type": "human", "name": null, "id": null}}"#,
        r#"{"type": "system", "data": {"content": "be kind \u00e9 \ud83c\udf89 \u007f \n", "additional_kwargs": {}, "response_metadata": {}, "type": "system", "name": "root", "id": "s1"}}"#,
        r#"{"type": "ai", "data": {"content": "", "additional_kwargs": {"refusal": null, "reasoning_content": "hm"}, "response_metadata": {"created": 1700000000, "logprob": -0.10, "big": 123456789012345678901234567890}, "type": "ai", "name": null, "id": "run-1", "tool_calls": [{"name": "add", "args": {"a": 1.0, "b": [1, 2]}, "id": "c1", "type": "tool_call"}, {"name": "now", "args": {}, "id": null, "type": "tool_call"}], "invalid_tool_calls": [{"type": "invalid_tool_call", "id": "c2", "name": "x", "args": "{", "error": "cut"}], "usage_metadata": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "input_token_details": {"cache_read": 1}}}}"#,
        r#"{"type": "AIMessageChunk", "data": {"content": "hello", "additional_kwargs": {}, "response_metadata": {}, "type": "AIMessageChunk", "name": null, "id": "run-2", "tool_calls": [], "invalid_tool_calls": [], "usage_metadata": null, "tool_call_chunks": [], "chunk_position": "last"}}"#,
        r#"{"type": "tool", "data": {"content": "3", "additional_kwargs": {}, "response_metadata": {}, "type": "tool", "name": "add", "id": null, "tool_call_id": "c1", "artifact": {"rows": [1]}, "status": "error"}}"#,
        r#"{"type": "function", "data": {"content": "3", "additional_kwargs": {}, "response_metadata": {}, "type": "function", "name": "add", "id": null}}"#,
        r#"{"type": "chat", "data": {"content": "meh", "additional_kwargs": {}, "response_metadata": {}, "type": "chat", "name": null, "id": null, "role": "critic"}}"#,
        r#"{"type": "remove", "data": {"content": "", "additional_kwargs": {}, "response_metadata": {}, "type": "remove", "name": null, "id": "m1"}}"#,
        r#"{"type": "human", "data": {"content": ["a", {"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": "low"}}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}}, {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}], "additional_kwargs": {}, "response_metadata": {}, "type": "human", "name": null, "id": null, "custom": [1]}}"#,
    ];

    #[test]
    fn what_must_be_escaped_in_a_string_is_wherever_it_stands() {
        for (character, escaped) in [
            ("\"", "\\\""),
            ("\\", "\\\\"),
            ("\n", "\\n"),
            ("\u{7f}", "\\u007f"),
            ("é", "\\u00e9"),
            ("🎉", "\\ud83c\\udf89"),
        ] {
            for (before, after) in (0..40).flat_map(|before| [(before, 0), (before, 40)]) {
                let (before, after) = ("x".repeat(before), " ~".repeat(after));
                let text = format!("{before}{character}{after}");
                assert_eq!(string(&text), format!("\"{before}{escaped}{after}\""));
            }
        }
    }

    #[test]
    fn of_an_element_the_last_type_and_data_count_however_their_keys_are_written() {
        let text_of = |json: &str| decode(json.as_bytes()).map(|m| m.draft.content.text());
        let data = r#"{"content": "hi"}"#;
        for json in [
            format!(r#"{{"type": "human", "data": {data}}}"#),
            format!(
                r#"{{"data": {{"content": "old"}}, "type": "ai", "type": "human", "data": {data}}}"#
            ),
            format!(
                r#"{{"data": 1, "\u0074ype": "human", "d\u0061ta": {data}, "other": [1, {{}}]}}"#
            ),
        ] {
            assert_eq!(text_of(&json).as_deref(), Ok("hi"), "{json}");
        }
        for json in [
            format!(r#"{{"type": "human", "data": {data}, "data": 1}}"#),
            format!(r#"{{"type": "human", "data": {data}}} 1"#),
            format!(r#"{{"type": 1, "data": {data}}}"#),
        ] {
            assert_eq!(text_of(&json), Err(Unreadable), "{json}");
        }
    }

    #[test]
    fn what_langchain_wrote_is_written_again_to_the_byte() {
        for element in ELEMENTS {
            let message = decode(element.as_bytes()).expect(element);
            assert_eq!(
                std::str::from_utf8(&encode(&message)).unwrap(),
                *element,
                "{message:?}"
            );
        }
    }

    #[test]
    fn a_message_of_ours_reads_back_as_it_was() {
        let draft = Draft {
            metadata: Some(Json::parse("m", r#"{"k": [1, "é"]}"#).unwrap()),
            reasoning: Some("because".into()),
            ..Draft::text(Role::Assistant, "tokens \u{0}\u{1f}\"\\ 🎉")
        };
        let mut message = Message::new(draft, "own".into(), 1_763_910_000_123);
        message.interrupted = true;
        message.turn_id = Some("t1".into());
        let bytes = encode(&message);
        assert!(bytes.is_ascii());
        let mut read = decode(&bytes).unwrap();
        assert_eq!(
            read.draft.metadata.as_ref().unwrap().as_str(),
            r#"{"k": [1, "\u00e9"]}"#
        );
        read.draft.metadata = message.draft.metadata.clone();
        assert_eq!(read, message);
    }

    #[test]
    fn an_id_of_ours_holds_the_time_so_that_nothing_else_need_be_stored() {
        let session = message::SessionId::parse("s").unwrap();
        let id = message::make_id(&session, "r", 0, 1_763_910_000_123);
        let message = Message::new(Draft::text(Role::User, "hi"), id, 1_763_910_000_123);
        let bytes = encode(&message);
        assert!(
            !bytes
                .windows(OURS.len())
                .any(|part| part == OURS.as_bytes())
        );
        assert_eq!(decode(&bytes).unwrap(), message);
    }

    #[test]
    fn of_a_key_that_stands_twice_the_last_counts_however_many_there_are() {
        for others in [0, 2 * SCANNED_MAX] {
            let keys = (0..others).map(|key| format!(r#""k{key}": 0, "#));
            let json = format!(
                r#"{{"a": 1, "\u0062": 2, {}"b": 3, "a": 4}}"#,
                keys.collect::<String>()
            );
            let object = Object::parse(&json).unwrap();
            let counting: Vec<_> = object
                .last_of_each()
                .map(|m| (&*m.name, m.value.get()))
                .collect();
            assert_eq!(counting.len(), others + 2);
            assert_eq!(counting[others..], [("b", "3"), ("a", "4")]);
        }
    }

    #[test]
    fn odd_elements_are_read_and_broken_ones_are_said_to_be() {
        for odd in [
            r#"{"type":"human","data":{"content":"é raw"}}"#,
            r#"{"data":{"content":null,"type":"ai"},"type":"ai"}"#,
            r#"{"type":"user","data":{"content":7,"id":5}}"#,
            r#"{"type":"poem","data":{}}"#,
            r#"{"type":"human","data":{"content":"\ud800 lone"}}"#,
            r#"{"type":"tool","data":{"content":"x"}}"#,
            r#"{"type":"ai","data":{"content":"x","tool_calls":[{"args":"text"},7],"usage_metadata":{"input_tokens":1}}}"#,
            r#"{"type":"human","type":"ai","data":{"content":"a","content":"b"}}"#,
        ] {
            let message = decode(odd.as_bytes()).expect(odd);
            encode(&message);
        }
        let nested = format!(
            r#"{{"type":"human","data":{{"content":[{}{}]}}}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        assert!(decode(nested.as_bytes()).is_ok());
        for broken in [
            &b""[..],
            b"hello",
            b"{\"type\":\"human\"}",
            b"{\"type\":7,\"data\":{}}",
            b"\xff\xfe",
            b"[]",
            b"{\"type\":\"human\",\"data\":{\"content\":\"a\"}",
        ] {
            assert_eq!(decode(broken), Err(Unreadable), "{broken:?}");
        }
    }

    #[test]
    fn many_duplicate_keys_take_linear_time() {
        let members: Vec<String> = (0..200_000).map(|n| format!("\"k{n}\":1")).collect();
        let element = format!(
            r#"{{"type":"human","data":{{"content":"x",{}}}}}"#,
            members.join(",")
        );
        assert!(decode(element.as_bytes()).is_ok());
    }

    #[test]
    fn extras_that_langchain_would_refuse_are_refused() {
        let check = |role: Role, extra: &str| {
            let mut draft = Draft::text(role, "x");
            draft.tool_call_id = (draft.role == Role::Tool).then(|| "c".into());
            draft.langchain = Some(Json::parse("x", extra).unwrap());
            check_extra("m", &draft)
        };
        assert!(check(Role::User, r#"{"additional_kwargs": {"a": 1}, "extra": 1}"#).is_ok());
        assert!(check(Role::Tool, r#"{"status": "error"}"#).is_ok());
        for (role, extra) in [
            (Role::User, r#"[]"#),
            (Role::User, r#"{"additional_kwargs": null}"#),
            (Role::User, r#"{"type": "ai"}"#),
            (Role::User, r#"{"self": 1}"#),
            (Role::User, r#"{"type": "PoemMessageChunk"}"#),
            (Role::Other("x".into()), r#"{"type": "PoemMessageChunk"}"#),
            (Role::User, r#"{"example": null}"#),
            (Role::User, r#"{"content": {}}"#),
            (Role::User, r#"{"\ud800": 1}"#),
            (Role::User, r#"{"name": 5}"#),
            (Role::Tool, r#"{"status": "meh"}"#),
            (Role::Assistant, r#"{"invalid_tool_calls": [{"index": 1}]}"#),
            (Role::Assistant, r#"{"tool_call_chunks": [{"index": 1.5}]}"#),
            (
                Role::Assistant,
                r#"{"usage_metadata": {"input_tokens": 1}}"#,
            ),
            (
                Role::Assistant,
                r#"{"additional_kwargs": {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}}"#,
            ),
            (Role::Assistant, r#"{"invalid_tool_calls": [1]}"#),
            (Role::Assistant, r#"{"chunk_position": 1}"#),
        ] {
            assert!(check(role, extra).is_err(), "{extra}");
        }
    }

    #[test]
    fn what_json_cannot_hold_comes_back_to_the_byte() {
        let data = r#""additional_kwargs": {}, "response_metadata": {}, "#;
        for element in [
            format!(
                r#"{{"type": "human", "data": {{"content": "\ud800 NaN", {data}"type": "human", "name": null, "id": "\udfff"}}}}"#
            ),
            format!(
                r#"{{"type": "human", "data": {{"content": [], {data}"type": "human", "name": "", "id": "a"}}}}"#
            ),
            format!(
                r#"{{"type": "human", "data": {{"content": "", {data}"type": "human", "name": null, "id": "a", "role": NaN, "status": -Infinity}}}}"#
            ),
            format!(
                r#"{{"type": "tool", "data": {{"content": "x", {data}"type": "tool", "name": null, "id": "a", "tool_call_id": "", "artifact": [NaN, 1e400, 123456789012345678901], "status": "success"}}}}"#
            ),
            format!(
                r#"{{"type": "ai", "data": {{"content": "", {data}"type": "ai", "name": null, "id": "a", "tool_calls": [{{"name": "\ud800", "args": {{"x": Infinity, "\ud800": 1}}, "id": null, "type": "tool_call"}}], "invalid_tool_calls": [], "usage_metadata": {{"input_tokens": 100000000000000000000, "output_tokens": 1, "total_tokens": 2}}}}}}"#
            ),
        ] {
            let message = decode(element.as_bytes()).expect(&element);
            assert_eq!(encode(&message), element.as_bytes());
            assert_eq!(check_extra("m", &message.draft), Ok(()), "{element}");
        }
        let clash = r#"{"type": "human", "data": {"content": "x", "additional_kwargs": {"\ud800": 1, "\ud801": 2}}}"#;
        let extra = decode(clash.as_bytes()).unwrap().draft.langchain.unwrap();
        assert_eq!(
            extra.as_str(),
            r#"{"additional_kwargs": {"\ud800": 1, "\ud801": 2}}"#
        );
    }

    #[test]
    fn a_lone_surrogate_is_shown_as_one_replacement_character() {
        let shown = |json: &str| message::string_lossy(json).unwrap();
        assert_eq!(
            shown(r#""a\ud800\ud83c\udf89\udfff\udfffb""#),
            "a\u{fffd}🎉\u{fffd}\u{fffd}b"
        );
    }

    #[test]
    fn an_exact_text_gives_way_when_the_shown_one_was_changed() {
        let element = br#"{"type": "human", "data": {"content": "\ud800", "name": "\ud801"}}"#;
        let mut message = decode(element).unwrap();
        message.draft.content = Content::Text("edited".into());
        message.draft.name = Some("else".into());
        let written = encode(&message);
        let read = decode(&written).unwrap();
        assert_eq!(read.draft.content, message.draft.content);
        assert_eq!(read.draft.name, message.draft.name);
    }

    #[test]
    fn every_shape_that_could_cost_more_than_linear_time_is_read_at_a_large_size() {
        // A quadratic reader would take minutes here.
        const COUNT: usize = 200_000;
        let data = |fields: String| format!(r#"{{"type":"ai","data":{{"content":"x",{fields}}}}}"#);
        let many = |piece: &str| vec![piece; COUNT].join(",");
        for element in [
            data(format!(
                r#""deep":{}NaN{}"#,
                "[".repeat(COUNT),
                "]".repeat(COUNT)
            )),
            data(format!(
                r#""deep":{}1{}"#,
                r#"{"a":"#.repeat(COUNT),
                "}".repeat(COUNT)
            )),
            data(many(r#""same":1"#)),
            data(format!(r#""additional_kwargs":{{{}}}"#, many(r#""k":NaN"#))),
            data(format!(
                r#""tool_calls":[{}]"#,
                many(r#"{"name":"n","args":{}}"#)
            )),
            data(format!(
                r#""content":[{}]"#,
                many(r#"{"type":"text","text":"\ud800"}"#)
            )),
            data(format!(r#""big":{}"#, "9".repeat(COUNT))),
            data(format!(r#""quotes":"{}"#, r#"\""#.repeat(COUNT))),
            "[".repeat(COUNT),
            "\"".repeat(COUNT),
            "N".repeat(COUNT),
        ] {
            if let Ok(message) = decode(element.as_bytes()) {
                encode(&message);
            }
        }
    }

    /// An element as it is printed, with these inside.
    fn plain(
        kind: &str,
        content: &str,
        kwargs: &str,
        response: &str,
        id: &str,
        end: &str,
    ) -> String {
        format!(
            "{{\"type\": \"{kind}\", \"data\": {{\"content\": {content}, \
             \"additional_kwargs\": {{{kwargs}}}, \"response_metadata\": {response}, \
             \"type\": \"{kind}\", \"name\": null, \"id\": {id}{end}}}}}"
        )
    }

    const NO_EXAMPLE: &str = r#", "example": false"#;
    const NO_CALLS: &str = r#", "tool_calls": [], "invalid_tool_calls": []"#;

    #[test]
    fn plain_elements_are_read_the_short_way_as_the_long_one() {
        let usage = r#"{"input_tokens": 10, "output_tokens": 0, "total_tokens": 10}"#;
        let ends = [
            ("human", String::new()),
            ("human", NO_EXAMPLE.to_owned()),
            ("ai", NO_CALLS.to_owned()),
            (
                "ai",
                format!(r#"{NO_EXAMPLE}{NO_CALLS}, "usage_metadata": null"#),
            ),
            ("ai", format!(r#"{NO_CALLS}, "usage_metadata": {usage}"#)),
        ];
        let contents = [r#""hi""#, r#""a\n\ud83c\udf89 \" \u00e9""#, r#""é""#];
        let turns = ["", r#""chat_memory": {"turn_id": "t\u00e9"}"#];
        let responses = ["{}", r#"{"model_name": "m", "a": [1.0, {"b": "\u00e9"}]}"#];
        let ids = ["null", r#""a""#, r#""cm_ZqTAp6-7kR3_xY""#, r#""\u00e9""#];
        for (kind, end) in &ends {
            for content in contents {
                for n in 0..16 {
                    let (turn, response, id) = (turns[n & 1], responses[n >> 1 & 1], ids[n >> 2]);
                    let element = plain(kind, content, turn, response, id, end);
                    let message = decode_plain(&element).expect(&element);
                    assert_eq!(Ok(message), decode_any(&element), "{element}");
                }
            }
        }
    }

    #[test]
    fn whatever_else_is_read_the_long_way() {
        let human = |content, kwargs, id, end| plain("human", content, kwargs, "{}", id, end);
        let hi = r#""hi""#;
        let with_usage = |usage| {
            let end = format!(r#"{NO_CALLS}, "usage_metadata": {usage}"#);
            plain("ai", hi, "", "{}", "null", &end)
        };
        for element in [
            plain("system", hi, "", "{}", "null", ""),
            plain("ai", hi, "", "{}", "null", ""),
            plain("human", hi, "", "[]", "null", ""),
            plain("human", hi, "", "{1}", "null", ""),
            plain("human", hi, "", "{}", "null", "").replacen("human", "ai", 1),
            with_usage(r#"{"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "a": {}}"#),
            with_usage(r#"{"input_tokens": 1, "output_tokens": 02, "total_tokens": 3}"#),
            with_usage(r#"{"input_tokens": 1, "output_tokens": 2}"#),
            with_usage(r#"{"input_tokens": -1, "output_tokens": 2, "total_tokens": 3}"#),
            with_usage(r#"{"input_tokens": 1.0, "output_tokens": 2, "total_tokens": 3}"#),
            with_usage(
                r#"{"input_tokens": 1, "output_tokens": 2, "total_tokens": 9223372036854775808}"#,
            ),
            human(hi, "", "null", r#", "example": true"#),
            human(hi, "", "null", NO_CALLS),
            human(hi, "", "null", "}"),
            human(hi, "", r#""""#, ""),
            human(hi, "", "nul", ""),
            human(hi, r#""other": 1"#, "null", ""),
            human(
                hi,
                r#""chat_memory": {"turn_id": "t", "interrupted": true}"#,
                "null",
                "",
            ),
            human(hi, r#""chat_memory": {"turn_id": 1}"#, "null", ""),
            human(r#""""#, "", "null", ""),
            human(r#""\ud800""#, "", "null", ""),
            human(r#""\x""#, "", "null", ""),
            human("\"\n\"", "", "null", ""),
            human("[]", "", "null", ""),
            human(hi, "", "null", "") + " ",
            human(hi, "", "null", "").replace(": ", ":"),
        ] {
            assert_eq!(decode_plain(&element), None, "{element}");
        }
    }

    /// An element with some bytes removed, replaced or put in.
    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let pieces = prop::sample::select(vec![
            "",
            "\"",
            "\\",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "null",
            "NaN",
            "-Infinity",
            "\\ud800",
            "1e999",
            "é",
            "\"type\":",
            "\u{0}",
        ]);
        let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..4_usize, pieces), 0..6);
        (prop::sample::select(ELEMENTS), edits).prop_map(|(element, edits)| {
            let mut bytes = element.as_bytes().to_vec();
            for (place, removed, piece) in edits {
                let at = place.index(bytes.len() + 1);
                let end = (at + removed).min(bytes.len());
                bytes.splice(at..end, piece.bytes());
            }
            bytes
        })
    }

    fn check_any(bytes: &[u8]) -> Result<(), TestCaseError> {
        if let Ok(text) = std::str::from_utf8(bytes)
            && let Some(message) = decode_plain(text)
        {
            prop_assert_eq!(Ok(message), decode_any(text));
        }
        let Ok(message) = decode(bytes) else {
            return Ok(());
        };
        check_extra("m", &message.draft).ok();
        let written = encode(&message);
        prop_assert!(written.is_ascii());
        // Writing settles: what was written once is written the same again.
        let again = decode(&written).expect("what we write, we read");
        prop_assert_eq!(encode(&again), written);
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2_000, ..Default::default() })]

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            check_any(&bytes)?;
        }

        #[test]
        fn no_damaged_element_makes_the_reader_panic(bytes in mutated()) {
            check_any(&bytes)?;
        }
    }
}
