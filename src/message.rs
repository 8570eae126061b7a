//! What a conversation is made of: sessions, messages, their rules and limits. Knows neither gRPC
//! nor any store nor any model, and does no I/O.
//!
//! A value of these types has been checked: code that takes a [`SessionId`] or a [`Draft`] never
//! checks again. [`Violation`]s name the field and the rule that it breaks.

use std::{borrow::Cow, fmt};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD},
};
use serde::de::Visitor;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

/// Bytes of a session id, at most. Redis allows more; a key this long is already odd.
pub const SESSION_ID_BYTES_MAX: usize = 512;
/// Bytes of ids and names inside a message, and of request and turn ids, at most.
pub const NAME_BYTES_MAX: usize = 256;
/// Bytes of the id of a tool call at most. Providers make it, and some keep what they need to go on in it:
/// LiteLLM has Gemini's thought signatures there, of several KiB.
pub const CALL_ID_BYTES_MAX: usize = 16 << 10;
/// Bytes of one message at most, as [`Draft::size`] counts them.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Messages of one batch at most.
pub const BATCH_MESSAGES_MAX: usize = 100;
/// Bytes of the messages of one batch together, at most. Below the 4 MiB that gRPC
/// implementations accept by default, so that the answer, which repeats them, arrives.
pub const BATCH_BYTES_MAX: usize = 3 << 20;
/// Bytes of the new messages of one turn together, at most. With the answer, which comes back in
/// one event with them, it stays below 4 MiB too.
pub const TURN_BYTES_MAX: usize = 2 << 20;
/// Messages of one page at most.
pub const PAGE_MESSAGES_MAX: usize = 1_000;
/// Messages of one page if the caller does not say.
pub const PAGE_MESSAGES_DEFAULT: usize = 100;
/// Bytes of one page at most, as it goes over the wire. Below gRPC's default of 4 MiB.
pub const PAGE_BYTES_MAX: usize = 3 << 20;
/// Bytes of a model's answer at most.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Levels of nesting in JSON that a client sends, at most. LangChain's reader has limits too.
pub const JSON_DEPTH_MAX: usize = 100;
/// Digits of a number in JSON that a client sends, at most. Python reads no longer ones.
pub const JSON_DIGITS_MAX: usize = 4_300;

/// A rule that a field of a request breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub struct Violation {
    /// The field, as a path: `messages[2].tool_calls[0].arguments`.
    pub field: String,
    /// What the field must be.
    pub rule: String,
}

impl Violation {
    pub fn new(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            rule: rule.into(),
        }
    }
}

/// The name of a session: 1 to 512 bytes of UTF-8 without control characters and braces.
///
/// Braces are Redis Cluster's hash tags; without them, every key of a session can share a slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(String);

impl SessionId {
    pub fn parse(text: impl Into<String>) -> Result<Self, Violation> {
        const FIELD: &str = "session_id";
        let text = text.into();
        if text.is_empty() {
            return Err(Violation::new(FIELD, "is required"));
        }
        check_name(FIELD, &text, SESSION_ID_BYTES_MAX)?;
        if text.contains(['{', '}']) {
            return Err(Violation::new(FIELD, "must not contain `{` or `}`"));
        }
        Ok(Self(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a name or an id that a client gave: its length, and that it has no control characters.
pub fn check_name(field: &str, text: &str, bytes_max: usize) -> Result<(), Violation> {
    if text.len() > bytes_max {
        let rule = format!("must be at most {bytes_max} bytes, is {}", text.len());
        return Err(Violation::new(field, rule));
    }
    if text.chars().any(char::is_control) {
        return Err(Violation::new(field, "must not contain control characters"));
    }
    Ok(())
}

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
    /// Any other, by its name.
    Other(String),
}

impl Role {
    /// The role's name, for people.
    pub fn name(&self) -> &str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::Other(name) => name,
        }
    }

    /// The role as a model knows it; `None` if no model does.
    pub fn known(&self) -> Option<Role> {
        match self {
            Self::Other(name) => match name.as_str() {
                "developer" | "system" => Some(Self::System),
                "user" | "human" => Some(Self::User),
                "assistant" | "ai" => Some(Self::Assistant),
                _ => None,
            },
            known => Some(known.clone()),
        }
    }
}

/// What a message says.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// One text; may be empty.
    Text(String),
    /// A list of pieces; may be empty.
    Parts(Vec<Part>),
}

impl Content {
    /// The text, or all texts of the pieces joined.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.iter().filter_map(Part::text).collect(),
        }
    }
}

/// A piece of a message's contents.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    Text(String),
    ImageUrl {
        url: String,
        detail: Option<String>,
    },
    InlineData {
        media_type: String,
        data: bytes::Bytes,
    },
    /// Any other piece, as its JSON.
    Json(Json),
}

impl Part {
    /// The piece's text: of a text, or of JSON that is a bare string.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Json(json) => string_lossy(json.as_str()),
            Self::ImageUrl { .. } | Self::InlineData { .. } => None,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::ImageUrl { url, detail } => url.len() + detail.as_ref().map_or(0, String::len),
            Self::InlineData { media_type, data } => media_type.len() + data.len().div_ceil(3) * 4,
            Self::Json(json) => json.as_str().len(),
        }
    }
}

/// The text of one JSON value, known to be well formed.
#[derive(Debug, Clone)]
pub struct Json(Box<RawValue>);

impl Json {
    /// Takes JSON from a client: well formed and within what Python's reader takes. Like Python's
    /// it may hold lone surrogates as escapes, and `NaN`, `Infinity` and `-Infinity`.
    pub fn parse(field: &str, text: &str) -> Result<Self, Violation> {
        check_json_bounds(field, text)?;
        let raw = RawValue::from_string(text.to_owned())
            .or_else(|error| RawValue::from_string(hide_non_finite(text)).map_err(|_| error))
            .map_err(|error| Violation::new(field, format!("must be JSON: {error}")))?;
        Ok(Self(raw))
    }

    /// Takes JSON as a store or a model holds it.
    pub fn from_raw(raw: Box<RawValue>) -> Self {
        Self(raw)
    }

    /// The text, well formed: with stand-ins for numbers that JSON does not have.
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// The text as clients see it: `NaN`, `Infinity` and `-Infinity` as Python writes them.
    pub fn shown(&self) -> Cow<'_, str> {
        show_non_finite(self.as_str())
    }

    pub fn is_object(&self) -> bool {
        self.as_str().trim_start().starts_with('{')
    }

    pub fn is_string(&self) -> bool {
        self.as_str().trim_start().starts_with('"')
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

fn check_json_bounds(field: &str, text: &str) -> Result<(), Violation> {
    let (mut depth, mut digits) = (0_usize, 0_usize);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        if in_string {
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > JSON_DEPTH_MAX {
            let rule = format!("must be nested at most {JSON_DEPTH_MAX} deep");
            return Err(Violation::new(field, rule));
        }
        if digits > JSON_DIGITS_MAX {
            let rule = format!("must hold numbers of at most {JSON_DIGITS_MAX} digits");
            return Err(Violation::new(field, rule));
        }
    }
    Ok(())
}

/// What Python's `json` writes for numbers that JSON does not have, and the number that stands in
/// for each while the JSON is here. Nobody writes these numbers by chance.
const NON_FINITE: [(&str, &str); 3] = [
    ("NaN", "0e-7777777771"),
    ("Infinity", "1e7777777772"),
    ("-Infinity", "-1e7777777772"),
];
/// What all stand-ins contain.
const STAND_IN: &str = "777777777";

/// Puts the stand-ins where Python wrote numbers that JSON does not have. Takes linear time.
pub fn hide_non_finite(json: &str) -> String {
    swap_tokens(json, |token| {
        let known = NON_FINITE.iter().find(|(name, _)| *name == token);
        known.map_or(token, |(_, stand_in)| stand_in)
    })
}

/// Takes the stand-ins out again.
pub fn show_non_finite(json: &str) -> Cow<'_, str> {
    if !json.contains(STAND_IN) {
        return Cow::Borrowed(json);
    }
    let shown = swap_tokens(json, |token| {
        let known = NON_FINITE.iter().find(|(_, stand_in)| *stand_in == token);
        known.map_or(token, |(name, _)| name)
    });
    Cow::Owned(shown)
}

/// Rewrites the numbers and names outside strings. The text need not be well formed.
fn swap_tokens(json: &str, swap: impl Fn(&str) -> &str) -> String {
    let bytes = json.as_bytes();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    let mut swapped = String::with_capacity(json.len());
    let mut end = 0;
    while end < bytes.len() {
        let start = end;
        let of_token = is_token(bytes[start]);
        if bytes[start] == b'"' {
            end += 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            end = (end + 1).min(bytes.len());
            swapped.push_str(&json[start..end]);
            continue;
        }
        while end < bytes.len() && bytes[end] != b'"' && is_token(bytes[end]) == of_token {
            end += 1;
        }
        let piece = &json[start..end];
        swapped.push_str(if of_token { swap(piece) } else { piece });
    }
    swapped
}

/// The text of a JSON string. What UTF-8 cannot hold (a lone surrogate, which Python writes)
/// becomes U+FFFD.
pub fn string_lossy(json: &str) -> Option<String> {
    read_string(json).map(|text| text.shown.into_owned())
}

/// What a JSON string says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonText<'a> {
    /// The text, with U+FFFD for what UTF-8 cannot hold.
    pub shown: Cow<'a, str>,
    /// Whether there was nothing such.
    pub is_exact: bool,
}

/// Reads a JSON string, without a copy if it has no escapes. `None` for any other JSON.
pub fn read_string(json: &str) -> Option<JsonText<'_>> {
    let exact = |shown| JsonText {
        shown,
        is_exact: true,
    };
    // Nearly all strings: not even serde_json's error is made for what is no string.
    let inner = json.trim_ascii().strip_prefix('"')?;
    let inner = inner.strip_suffix('"').unwrap_or(json);
    // No early end, so that many bytes are compared at once.
    let is_odd = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
    if !inner.bytes().fold(false, |odd, byte| odd | is_odd(byte)) {
        return Some(exact(Cow::Borrowed(inner)));
    }
    if let Ok(text) = serde_json::from_str(json) {
        return Some(exact(Cow::Owned(text)));
    }
    read_string_lossy(json).map(|text| JsonText {
        shown: Cow::Owned(text),
        is_exact: false,
    })
}

fn read_string_lossy(json: &str) -> Option<String> {
    struct Reader;
    impl Visitor<'_> for Reader {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }

        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<String, E> {
            // A lone surrogate is three bytes, the first of them 0xED.
            let mut text = String::with_capacity(bytes.len());
            for chunk in bytes.utf8_chunks() {
                text.push_str(chunk.valid());
                if chunk.invalid().starts_with(&[0xED]) {
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
            Ok(text)
        }
    }
    // serde_json refuses lone surrogates in strings, but not in bytes.
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let text = serde::Deserializer::deserialize_bytes(&mut deserializer, Reader).ok()?;
    deserializer.end().ok()?;
    Some(text)
}

/// A tool that the model asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// May be empty: some providers give none.
    pub id: String,
    pub name: String,
    /// One JSON object.
    pub arguments: Json,
}

/// Tokens, as the provider counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub input_tokens: i64,
    pub output_tokens: i64,
    pub total_tokens: i64,
}

/// A message as a client gives it: all but what the server adds. Make one with [`Draft::check`].
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// The client's id, if it chose one.
    pub id: Option<String>,
    pub role: Role,
    pub content: Content,
    pub tool_calls: Vec<ToolCall>,
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
    pub usage: Option<Usage>,
    pub reasoning: Option<String>,
    /// The client's own facts: a JSON object.
    pub metadata: Option<Json>,
    /// What LangChain keeps with the message and what has no field here: a JSON object.
    pub langchain: Option<Json>,
}

impl Draft {
    /// A message of nothing but a role and a text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self {
            id: None,
            role,
            content: Content::Text(text.into()),
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            usage: None,
            reasoning: None,
            metadata: None,
            langchain: None,
        }
    }

    /// Checks the rules of a message, as the proto states them. `path` is where it stands in the
    /// request: `messages[3]`.
    pub fn check(self, path: &str) -> Result<Self, Violation> {
        let field = |name: &str| format!("{path}.{name}");
        let names = [
            ("id", &self.id, NAME_BYTES_MAX),
            ("name", &self.name, NAME_BYTES_MAX),
            ("tool_call_id", &self.tool_call_id, CALL_ID_BYTES_MAX),
        ];
        for (name, value, bytes_max) in names {
            if let Some(value) = value {
                check_name(&field(name), value, bytes_max)?;
            }
        }

        let is_assistant = self.role == Role::Assistant;
        if !is_assistant && !self.tool_calls.is_empty() {
            return Err(Violation::new(
                field("tool_calls"),
                "is for ROLE_ASSISTANT only",
            ));
        }
        if !is_assistant && self.usage.is_some() {
            return Err(Violation::new(field("usage"), "is for ROLE_ASSISTANT only"));
        }
        if !is_assistant && self.reasoning.is_some() {
            return Err(Violation::new(
                field("reasoning"),
                "is for ROLE_ASSISTANT only",
            ));
        }
        match (&self.role, &self.tool_call_id) {
            (Role::Tool, None) => {
                return Err(Violation::new(
                    field("tool_call_id"),
                    "is required with ROLE_TOOL",
                ));
            }
            (Role::Tool, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                return Err(Violation::new(
                    field("tool_call_id"),
                    "is for ROLE_TOOL only",
                ));
            }
        }
        self.check_other_role(path)?;
        for (index, call) in self.tool_calls.iter().enumerate() {
            let call_path = format!("{path}.tool_calls[{index}]");
            if call.name.is_empty() {
                return Err(Violation::new(format!("{call_path}.name"), "is required"));
            }
            check_name(&format!("{call_path}.name"), &call.name, NAME_BYTES_MAX)?;
            check_name(&format!("{call_path}.id"), &call.id, CALL_ID_BYTES_MAX)?;
        }
        if let Some(usage) = self.usage {
            let counts = [usage.input_tokens, usage.output_tokens, usage.total_tokens];
            if counts.iter().any(|count| *count < 0) {
                return Err(Violation::new(field("usage"), "must not be negative"));
            }
        }

        let is_remove = matches!(&self.role, Role::Other(name) if name == "remove");
        let may_be_empty = self.role == Role::Tool || is_remove || self.langchain.is_some();
        let says_nothing = match &self.content {
            Content::Text(text) => text.is_empty(),
            Content::Parts(parts) => parts.is_empty(),
        };
        if says_nothing && self.tool_calls.is_empty() && !may_be_empty {
            return Err(Violation::new(
                field("content"),
                "is required where there are neither parts nor tool_calls",
            ));
        }
        if self.size() > MESSAGE_BYTES_MAX {
            let rule = format!(
                "must be at most {MESSAGE_BYTES_MAX} bytes, is {}",
                self.size()
            );
            return Err(Violation::new(path, rule));
        }
        Ok(self)
    }

    fn check_other_role(&self, path: &str) -> Result<(), Violation> {
        let Role::Other(role_name) = &self.role else {
            return Ok(());
        };
        let field = format!("{path}.role_name");
        if role_name.is_empty() {
            return Err(Violation::new(field, "is required with ROLE_OTHER"));
        }
        check_name(&field, role_name, NAME_BYTES_MAX)?;
        if role_name == "function" && self.name.is_none() {
            let rule = "is required with the role `function`";
            return Err(Violation::new(format!("{path}.name"), rule));
        }
        if role_name == "remove" {
            if self.id.is_none() {
                let rule = "is required with the role `remove`";
                return Err(Violation::new(format!("{path}.id"), rule));
            }
            if self.content != Content::Text(String::new()) {
                let rule = "must be empty with the role `remove`";
                return Err(Violation::new(format!("{path}.content"), rule));
            }
        }
        Ok(())
    }

    /// The message's size in bytes: its texts, and data as base64.
    pub fn size(&self) -> usize {
        let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let json = |json: &Option<Json>| json.as_ref().map_or(0, |json| json.as_str().len());
        let content = match &self.content {
            Content::Text(text) => text.len(),
            Content::Parts(parts) => parts.iter().map(Part::size).sum(),
        };
        let calls: usize = self
            .tool_calls
            .iter()
            .map(|call| call.id.len() + call.name.len() + call.arguments.as_str().len())
            .sum();
        let names = [&self.id, &self.tool_call_id, &self.name, &self.reasoning];
        content
            + calls
            + names.into_iter().map(optional).sum::<usize>()
            + json(&self.metadata)
            + json(&self.langchain)
    }
}

/// Checks a batch: how many messages, and how large together.
pub fn check_batch(drafts: &[Draft], bytes_max: usize) -> Result<(), Violation> {
    const FIELD: &str = "messages";
    if drafts.is_empty() {
        return Err(Violation::new(FIELD, "is required"));
    }
    let size: usize = drafts.iter().map(Draft::size).sum();
    if size > bytes_max {
        let rule = format!("must be at most {bytes_max} bytes together, is {size}");
        return Err(Violation::new(FIELD, rule));
    }
    Ok(())
}

/// A moment, in milliseconds since 1970-01-01 UTC.
pub type UnixMillis = i64;

/// The moment it is now.
pub fn now_ms() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// The prefix of message ids that the server makes.
///
/// (Not `msg_`: LangChain sends ids that begin so to OpenAI as OpenAI's own.)
pub const ID_PREFIX: &str = "cm_";
/// Bytes of a message id that the server makes: the prefix, and 84 bits as 14 characters of URL-safe
/// base64. Half of them are the time at which the message was created, in milliseconds since 1970, up
/// to the year 2109. The id is in every element: a ULID would take 12 bytes more.
pub const ID_BYTES: usize = ID_PREFIX.len() + 14;
/// Bits of each half.
const ID_HALF: u32 = 42;

/// Makes the id of a message that the client gave none, of the time and of what makes the message
/// unique. The same arguments give the same id, so a repeated request can be answered without having
/// kept the first answer.
pub fn make_id(session: &SessionId, request: &str, index: usize, time_ms: UnixMillis) -> String {
    let mut digest = Sha256::new();
    for text in [session.as_str(), request] {
        digest.update((text.len() as u64).to_be_bytes());
        digest.update(text);
    }
    digest.update((index as u64).to_be_bytes());
    let hash = digest.finalize();
    let half = |bytes: [u8; 8]| u128::from(u64::from_be_bytes(bytes) & ((1 << ID_HALF) - 1));
    let time = half(time_ms.max(0).to_be_bytes());
    let unique = half(std::array::from_fn(|place| hash[place]));
    // Left in its bytes, where base64 begins; what comes after it is nothing.
    let bits = (time << ID_HALF | unique) << (u128::BITS - 2 * ID_HALF);
    let mut id = String::with_capacity(ID_PREFIX.len() + 22);
    id.push_str(ID_PREFIX);
    URL_SAFE_NO_PAD.encode_string(bits.to_be_bytes(), &mut id);
    id.truncate(ID_BYTES);
    id
}

/// When a message with this id was created, if the server made the id.
pub fn time_of_id(id: &str) -> Option<UnixMillis> {
    let made = id.strip_prefix(ID_PREFIX)?.as_bytes();
    // One that holds nothing makes these characters whole bytes.
    let mut padded = [b'A'; ID_BYTES - ID_PREFIX.len() + 1];
    let (used, _) = padded.split_at_mut(ID_BYTES - ID_PREFIX.len());
    if used.len() != made.len() {
        return None;
    }
    used.copy_from_slice(made);
    let mut bytes = [0; 12];
    URL_SAFE_NO_PAD.decode_slice(padded, &mut bytes).ok()?;
    let head = u64::from_be_bytes(std::array::from_fn(|place| bytes[place]));
    i64::try_from(head >> (u64::BITS - ID_HALF)).ok()
}

/// A message as a session holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Its contents. `draft.id` is `None` only if another program stored it so.
    pub draft: Draft,
    /// When the server stored it; `None` if another program did.
    pub create_time_ms: Option<UnixMillis>,
    /// The answer was stopped before its end.
    pub interrupted: bool,
    /// The turn that stored it.
    pub turn_id: Option<String>,
}

impl Message {
    /// A message that the server stores now.
    pub fn new(mut draft: Draft, id: String, create_time_ms: UnixMillis) -> Self {
        draft.id.get_or_insert(id);
        Self {
            draft,
            create_time_ms: Some(create_time_ms),
            interrupted: false,
            turn_id: None,
        }
    }
}

/// The messages of one append, as they are stored under its request id at that moment. The same
/// arguments give the same messages.
pub fn stored_messages(
    session: &SessionId,
    request_id: &str,
    drafts: Vec<Draft>,
    time_ms: UnixMillis,
) -> Vec<Message> {
    let drafts = drafts.into_iter().enumerate();
    let stored = drafts.map(|(index, draft)| {
        let id = make_id(session, request_id, index, time_ms);
        Message::new(draft, id, time_ms)
    });
    stored.collect()
}

/// The base64 text of data, as messages hold it.
pub fn base64(data: &[u8]) -> String {
    BASE64.encode(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule_of(result: Result<Draft, Violation>) -> String {
        result.expect_err("must be refused").to_string()
    }

    #[test]
    fn a_json_string_is_read_and_said_to_be_exact_or_not() {
        let read = |json| read_string(json).map(|text| (text.shown.into_owned(), text.is_exact));
        let exact = |text: &str| Some((text.to_owned(), true));
        assert_eq!(read(r#""""#), exact(""));
        assert_eq!(read(r#""plain é 🎉""#), exact("plain é 🎉"));
        assert_eq!(read(" \"spaced\"\n"), exact("spaced"));
        assert_eq!(read(r#""a\"b\\\u00e9\ud83c\udf89""#), exact("a\"b\\é🎉"));
        assert_eq!(
            read(r#""\ud800 lone""#),
            Some(("\u{fffd} lone".to_owned(), false))
        );
        for other in [
            "null", "7", "{}", "[\"a\"]", "", "\"", "\"a", "a\"", "\"a\"b\"", r#""\""#,
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn a_session_id_follows_the_rules_at_their_edges() {
        assert!(SessionId::parse("x".repeat(512)).is_ok());
        assert!(SessionId::parse("Ünïcödé 会話 🎉:/#*?[a]").is_ok());
        for (bad, rule) in [
            (String::new(), "session_id: is required"),
            (
                "x".repeat(513),
                "session_id: must be at most 512 bytes, is 513",
            ),
            (
                "a\nb".into(),
                "session_id: must not contain control characters",
            ),
            (
                "a\u{85}b".into(),
                "session_id: must not contain control characters",
            ),
            ("a{b".into(), "session_id: must not contain `{` or `}`"),
            ("}".into(), "session_id: must not contain `{` or `}`"),
        ] {
            let violation = SessionId::parse(bad).expect_err(rule);
            assert_eq!(violation.to_string(), rule);
        }
    }

    #[test]
    fn a_message_of_exactly_the_limit_passes_and_one_byte_more_does_not() {
        let fits = Draft::text(Role::User, "x".repeat(MESSAGE_BYTES_MAX));
        assert!(fits.check("messages[0]").is_ok());
        let over = Draft::text(Role::User, "x".repeat(MESSAGE_BYTES_MAX + 1));
        assert_eq!(
            rule_of(over.check("messages[0]")),
            "messages[0]: must be at most 1048576 bytes, is 1048577"
        );
    }

    #[test]
    fn fields_belong_to_their_roles() {
        let call = ToolCall {
            id: "c1".into(),
            name: "add".into(),
            arguments: Json::parse("arguments", "{}").unwrap(),
        };
        let mut user = Draft::text(Role::User, "hi");
        user.tool_calls.push(call.clone());
        assert_eq!(
            rule_of(user.check("m")),
            "m.tool_calls: is for ROLE_ASSISTANT only"
        );
        let tool = Draft::text(Role::Tool, "3");
        assert_eq!(
            rule_of(tool.check("m")),
            "m.tool_call_id: is required with ROLE_TOOL"
        );
        let mut assistant = Draft::text(Role::Assistant, "");
        assert_eq!(
            rule_of(assistant.clone().check("m")),
            "m.content: is required where there are neither parts nor tool_calls"
        );
        assistant.tool_calls.push(call);
        assert!(assistant.check("m").is_ok());
        assert_eq!(
            rule_of(Draft::text(Role::Other(String::new()), "x").check("m")),
            "m.role_name: is required with ROLE_OTHER"
        );
    }

    #[test]
    fn json_from_a_client_is_bounded_and_well_formed() {
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(Json::parse("f", &nested(JSON_DEPTH_MAX)).is_ok());
        assert!(Json::parse("f", &nested(JSON_DEPTH_MAX + 1)).is_err());
        assert!(Json::parse("f", &nested(100_000)).is_err());
        for broken in [
            "",
            "{",
            "nan",
            "[Nan]",
            "[NaNNaN]",
            "[+Infinity]",
            "\"NaN",
            "[1] 2",
        ] {
            assert!(Json::parse("f", broken).is_err(), "{broken}");
        }
        for pythons in [
            r#"{"a": [NaN, -Infinity, Infinity], "b": "NaN\""}"#,
            r#""\ud800""#,
        ] {
            assert_eq!(Json::parse("f", pythons).unwrap().shown(), pythons);
        }
        assert!(Json::parse("f", &"9".repeat(JSON_DIGITS_MAX)).is_ok());
        assert!(Json::parse("f", &"9".repeat(JSON_DIGITS_MAX + 1)).is_err());
        let big = Json::parse("f", "123456789012345678901234567890").unwrap();
        assert_eq!(big.as_str(), "123456789012345678901234567890");
    }

    #[test]
    fn a_made_id_is_the_same_for_the_same_request_and_holds_its_time() {
        let session = SessionId::parse("s").unwrap();
        let id = make_id(&session, "r", 0, 1_763_910_000_123);
        assert_eq!(id, make_id(&session, "r", 0, 1_763_910_000_123));
        assert_ne!(id, make_id(&session, "r", 1, 1_763_910_000_123));
        assert_ne!(id, make_id(&session, "q", 0, 1_763_910_000_123));
        assert_eq!(time_of_id(&id), Some(1_763_910_000_123));
        assert_eq!(id.len(), ID_BYTES);
        for other in [
            "run-123",
            "cm_",
            &id[..16],
            &format!("{id}A"),
            "cm_ZqTAp6 7kR3_xY",
        ] {
            assert_eq!(time_of_id(other), None, "{other}");
        }
        for (time_ms, held) in [(0, 0), (-5, 0), ((1 << 42) - 1, (1 << 42) - 1)] {
            let id = make_id(&session, "r", 0, time_ms);
            assert_eq!(time_of_id(&id), Some(held));
        }
    }
}
