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

use std::fmt;

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
    let envelope = Object::parse(text).ok_or(Unreadable)?;
    let kind = envelope
        .get("type")
        .and_then(read_string)
        .ok_or(Unreadable)?;
    let data = envelope
        .get("data")
        .and_then(read_object)
        .ok_or(Unreadable)?;

    let role = role_of(&kind, &data);
    let is_assistant = role == Role::Assistant;
    let mut extra = Extra::default();
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
    for (key, value) in data.last_of_each() {
        let text = value.get();
        match key.as_str() {
            "type" | "role" => {}
            "content" => draft.content = read_content(value),
            "id" => draft.id = read_label(value),
            "name" => draft.name = read_label(value),
            "tool_call_id" => draft.tool_call_id = read_label(value),
            "tool_calls" if is_assistant => draft.tool_calls = read_tool_calls(value),
            "usage_metadata" if is_assistant => {
                draft.usage = read_usage(value);
                let details =
                    read_object(value).map_or_else(String::new, |usage| usage.without(&USAGE_KEYS));
                if !details.is_empty() {
                    extra.add("usage_metadata", &format!("{{{details}}}"));
                }
            }
            "additional_kwargs" => {
                let Some(kwargs) = read_object(value) else {
                    extra.add(&key, text);
                    continue;
                };
                let mut taken = vec![OURS];
                if is_assistant && let Some(reasoning) = kwargs.get(REASONING).and_then(read_string)
                {
                    draft.reasoning = Some(reasoning).filter(|text| !text.is_empty());
                    taken.push(REASONING);
                }
                let rest = kwargs.without(&taken);
                if !rest.is_empty() {
                    extra.add(&key, &format!("{{{rest}}}"));
                }
            }
            "response_metadata" if is_empty(text) => {}
            // What every writer adds without meaning anything by it.
            "example" if text == "false" => {}
            "artifact" if text == "null" => {}
            "status" if text == "\"success\"" => {}
            "invalid_tool_calls" if is_empty(text) => {}
            _ => extra.add(&key, text),
        }
    }
    if draft.role == Role::Tool {
        // LangChain cannot read a tool message without this; we read it as a result of no call.
        draft.tool_call_id.get_or_insert_default();
    }
    draft.langchain = extra.into_json();

    let ours = data
        .get("additional_kwargs")
        .and_then(read_object)
        .and_then(|kwargs| kwargs.get(OURS).and_then(read_object));
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

fn read_content(value: &RawValue) -> Content {
    if let Some(text) = read_string(value) {
        return Content::Text(text);
    }
    if value.get() == "null" {
        return Content::Text(String::new());
    }
    match serde_json::from_str::<Vec<&RawValue>>(value.get()) {
        Ok(parts) => Content::Parts(parts.into_iter().map(read_part).collect()),
        Err(_) => Content::Parts(vec![Part::Json(Json::from_raw(value.to_owned()))]),
    }
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
    match field(block, "type")?.as_str() {
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
    let text: Lossy = serde_json::from_str(value.get()).ok()?;
    Some(text.0)
}

fn read_object(value: &RawValue) -> Option<Object<'_>> {
    Object::parse(value.get())
}

fn is_empty(json: &str) -> bool {
    matches!(json, "{}" | "[]" | "null")
}

/// A JSON string. What UTF-8 cannot hold (a lone surrogate, which Python writes) becomes U+FFFD.
struct Lossy(String);

impl<'de> Deserialize<'de> for Lossy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Lossy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E>(self, text: &str) -> Result<Lossy, E> {
                Ok(Lossy(text.to_owned()))
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Lossy, E> {
                Ok(Lossy(String::from_utf8_lossy(bytes).into_owned()))
            }
        }
        // serde_json refuses lone surrogates in strings, but not in bytes.
        deserializer.deserialize_bytes(Reader)
    }
}

/// A JSON object whose values stay as they are written, so that nothing is altered: no number, no
/// order, no nesting.
struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Object<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The value of a key. Of duplicates the last one counts, as in Python.
    fn get(&self, key: &str) -> Option<&'a RawValue> {
        let entry = self.0.iter().rev().find(|(name, _)| name == key);
        entry.map(|(_, value)| *value)
    }

    /// Each key once, with the value that counts.
    fn last_of_each(&self) -> Vec<(String, &'a RawValue)> {
        let mut last = std::collections::HashMap::with_capacity(self.0.len());
        for (index, (key, _)) in self.0.iter().enumerate() {
            last.insert(key.as_str(), index);
        }
        let entries = self.0.iter().enumerate();
        let counting = entries.filter(|(index, (key, _))| last[key.as_str()] == *index);
        counting.map(|(_, entry)| entry.clone()).collect()
    }

    /// The members but those keys, as JSON text without braces.
    fn without(&self, keys: &[&str]) -> String {
        let mut members = String::new();
        for (key, value) in self.last_of_each() {
            if !keys.contains(&key.as_str()) {
                push_member(&mut members, &key, value.get());
            }
        }
        members
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((Lossy(key), value)) = map.next_entry()? {
                    members.push((key, value));
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

    fn into_json(self) -> Option<Json> {
        if self.0.is_empty() {
            return None;
        }
        let object = RawValue::from_string(format!("{{{}}}", self.0)).ok()?;
        Some(Json::from_raw(object))
    }
}

fn push_member(members: &mut String, key: &str, json: &str) {
    if !members.is_empty() {
        members.push_str(", ");
    }
    members.push_str(&string(key));
    members.push_str(": ");
    members.push_str(json);
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
    for (key, value) in object.last_of_each() {
        let (of_assistant, of_tool) = (draft.role == Role::Assistant, draft.role == Role::Tool);
        match key.as_str() {
            "additional_kwargs" | "response_metadata" if read_object(value).is_none() => {
                return broken(&key, "must be an object");
            }
            "type" if !is_kind_of(value, &object, &draft.role) => {
                return broken(&key, "must be a type of the message's role");
            }
            "status" if of_tool && !matches!(value.get(), "\"success\"" | "\"error\"") => {
                return broken(&key, "must be \"success\" or \"error\"");
            }
            "usage_metadata" if of_assistant && !is_usage_details(value) => {
                return broken(&key, "must be an object of objects of whole numbers");
            }
            "usage_metadata" if of_assistant && draft.usage.is_none() => {
                return broken(&key, "needs usage");
            }
            "invalid_tool_calls"
                if of_assistant && !is_list_of_calls(value, &INVALID_CALL_KEYS) =>
            {
                return broken(&key, "must be a list of invalid tool calls");
            }
            "tool_call_chunks" if of_assistant && !is_list_of_calls(value, &CALL_CHUNK_KEYS) => {
                return broken(&key, "must be a list of tool call chunks");
            }
            "chunk_position" if of_assistant && !matches!(value.get(), "\"last\"" | "null") => {
                return broken(&key, "must be \"last\" or null");
            }
            "status" | "artifact" if !of_tool => return broken(&key, "is for ROLE_TOOL only"),
            "usage_metadata" | "invalid_tool_calls" | "tool_call_chunks" | "chunk_position"
                if !of_assistant =>
            {
                return broken(&key, "is for ROLE_ASSISTANT only");
            }
            "content" | "content_blocks" | "id" | "name" | "role" | "self" | "text"
            | "tool_call_id" | "tool_calls" => return broken(&key, "is reserved"),
            _ => {}
        }
    }
    Ok(())
}

fn is_kind_of(value: &RawValue, object: &Object<'_>, role: &Role) -> bool {
    let kind = read_string(value).unwrap_or_default();
    kind_of(&role_of(&kind, object)) == kind_of(role)
}

/// What LangChain keeps beside the three counts of [`Usage`]: objects of counts.
fn is_usage_details(value: &RawValue) -> bool {
    let is_count = |count: &RawValue| count.get().parse::<i64>().is_ok();
    let is_counts = |details: &RawValue| {
        let details = read_object(details);
        details.is_some_and(|details| details.0.iter().all(|(_, count)| is_count(count)))
    };
    let usage = read_object(value);
    usage.is_some_and(|usage| usage.0.iter().all(|(_, details)| is_counts(details)))
}

const INVALID_CALL_KEYS: [&str; 7] = ["type", "id", "name", "args", "error", "index", "extras"];
const CALL_CHUNK_KEYS: [&str; 6] = ["type", "id", "name", "args", "index", "extras"];

/// A list of objects with no other keys than these, whose values are texts or null (an index may
/// be a number).
fn is_list_of_calls(value: &RawValue, keys: &[&str]) -> bool {
    let Ok(calls) = serde_json::from_str::<Vec<&RawValue>>(value.get()) else {
        return false;
    };
    calls.into_iter().all(|call| {
        read_object(call).is_some_and(|call| {
            call.0.iter().all(|(key, value)| {
                let text_or_null = value.get() == "null" || read_string(value).is_some();
                let free = matches!(key.as_str(), "index" | "extras");
                keys.contains(&key.as_str()) && (text_or_null || free)
            })
        })
    })
}

/// Writes an element as LangChain writes it.
pub fn encode(message: &Message) -> Bytes {
    let draft = &message.draft;
    let empty = Object(Vec::new());
    let extra_text = draft.langchain.as_ref().map_or("{}", Json::as_str);
    let extra = Object::parse(extra_text).unwrap_or(empty);
    let kind = extra.get("type").and_then(read_string);
    let kind = kind.filter(|kind| is_chunk(kind));
    let kind = string(kind.as_deref().unwrap_or(kind_of(&draft.role)));
    let optional = |text: &Option<String>| text.as_deref().map_or_else(|| "null".into(), string);

    let mut data = String::with_capacity(draft.size() + 256);
    push_member(&mut data, "content", &write_content(&draft.content));
    push_member(
        &mut data,
        "additional_kwargs",
        &write_kwargs(message, &extra),
    );
    let response_metadata = extra.get("response_metadata");
    push_member(
        &mut data,
        "response_metadata",
        &response_metadata.map_or_else(|| "{}".into(), |value| python_style(value.get())),
    );
    push_member(&mut data, "type", &kind);
    push_member(&mut data, "name", &optional(&draft.name));
    push_member(&mut data, "id", &optional(&draft.id));
    match &draft.role {
        Role::Assistant => {
            push_member(
                &mut data,
                "tool_calls",
                &write_tool_calls(&draft.tool_calls),
            );
            let invalid = extra.get("invalid_tool_calls").map_or("[]", RawValue::get);
            push_member(&mut data, "invalid_tool_calls", &python_style(invalid));
            push_member(
                &mut data,
                "usage_metadata",
                &write_usage(draft.usage, &extra),
            );
        }
        Role::Tool => {
            let id = draft.tool_call_id.as_deref().unwrap_or_default();
            push_member(&mut data, "tool_call_id", &string(id));
            let artifact = extra.get("artifact").map_or("null", RawValue::get);
            push_member(&mut data, "artifact", &python_style(artifact));
            let status = extra.get("status").map_or("\"success\"", RawValue::get);
            push_member(&mut data, "status", status);
        }
        Role::Other(name) if kind_of(&draft.role) == "chat" => {
            push_member(&mut data, "role", &string(name));
        }
        Role::System | Role::User | Role::Other(_) => {}
    }
    const WRITTEN: [&str; 7] = [
        "type",
        "additional_kwargs",
        "response_metadata",
        "invalid_tool_calls",
        "usage_metadata",
        "artifact",
        "status",
    ];
    for (key, value) in extra.last_of_each() {
        if !WRITTEN.contains(&key.as_str()) {
            push_member(&mut data, &key, &python_style(value.get()));
        }
    }
    Bytes::from(format!("{{\"type\": {kind}, \"data\": {{{data}}}}}"))
}

fn is_chunk(kind: &str) -> bool {
    kind.ends_with("MessageChunk")
}

fn write_kwargs(message: &Message, extra: &Object<'_>) -> String {
    let given = extra.get("additional_kwargs").and_then(read_object);
    let mut members = String::new();
    for (key, value) in given
        .map(|kwargs| kwargs.last_of_each())
        .unwrap_or_default()
    {
        let ours = key == OURS || (key == REASONING && message.draft.reasoning.is_some());
        if !ours {
            push_member(&mut members, &key, &python_style(value.get()));
        }
    }
    if let Some(reasoning) = &message.draft.reasoning {
        push_member(&mut members, REASONING, &string(reasoning));
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
        push_member(&mut members, OURS, &format!("{{{ours}}}"));
    }
    format!("{{{members}}}")
}

fn write_content(content: &Content) -> String {
    match content {
        Content::Text(text) => string(text),
        Content::Parts(parts) => list(parts.iter().map(write_part)),
    }
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
        return "null".to_owned();
    };
    let mut members = String::new();
    let counts = [usage.input_tokens, usage.output_tokens, usage.total_tokens];
    for (key, count) in USAGE_KEYS.iter().zip(counts) {
        push_member(&mut members, key, &count.to_string());
    }
    if let Some(details) = extra.get("usage_metadata").and_then(read_object) {
        for (key, value) in details.last_of_each() {
            push_member(&mut members, &key, &python_style(value.get()));
        }
    }
    format!("{{{members}}}")
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A string as Python's `json.dumps` prints it: ASCII only.
fn string(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    json.push('"');
    for character in text.chars() {
        match character {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            '\u{8}' => json.push_str("\\b"),
            '\u{c}' => json.push_str("\\f"),
            ' '..='~' => json.push(character),
            _ => push_escaped(&mut json, character),
        }
    }
    json.push('"');
    json
}

fn push_escaped(json: &mut String, character: char) {
    for unit in character.encode_utf16(&mut [0; 2]) {
        json.push_str(&format!("\\u{unit:04x}"));
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
    styled
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements as langchain-core 1.x writes them, one of each kind.
    const ELEMENTS: &[&str] = &[
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
            (Role::User, r#"{"status": "error"}"#),
            (Role::Tool, r#"{"status": "meh"}"#),
            (Role::Assistant, r#"{"invalid_tool_calls": [1]}"#),
            (Role::Assistant, r#"{"chunk_position": 1}"#),
        ] {
            assert!(check(role, extra).is_err(), "{extra}");
        }
    }
}
