//! Generated types ⇄ domain, page tokens, and the codec of requests. With [`crate::service`], the
//! only code that sees generated types.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use prost::Message as _;
use prost_types::{Struct, Value as StructValue, value::Kind};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use tonic::{
    Status,
    codec::{BufferSettings, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::{
    error,
    history::{self, Asked, History},
    langchain,
    message::{
        BATCH_MESSAGES_MAX, Content, Draft, Json, MESSAGE_BYTES_MAX, Message, NAME_BYTES_MAX,
        PAGE_BYTES_MAX, PAGE_MESSAGES_DEFAULT, PAGE_MESSAGES_MAX, Part, Role, SessionId, ToolCall,
        Usage, Violation, check_batch, check_name, show_non_finite,
    },
    model, pb,
    store::{Body, Element, Order, Page, Read, Sequence},
    tokens::{PRIMING, Tokenizer},
};

pub mod sessions;

type Checked<T> = Result<T, Violation>;

// ---------------------------------------------------------------------------------------------
// Messages

/// Takes the messages of a request, which may have so many bytes together.
pub fn parse_messages(messages: Vec<pb::Message>, bytes_max: usize) -> Checked<Vec<Draft>> {
    if messages.len() > BATCH_MESSAGES_MAX {
        let rule = format!(
            "must be at most {BATCH_MESSAGES_MAX} messages, is {}",
            messages.len()
        );
        return Err(Violation::new("messages", rule));
    }
    let mut drafts = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        drafts.push(parse_message(&format!("messages[{index}]"), message)?);
    }
    check_batch(&drafts, bytes_max)?;
    Ok(drafts)
}

fn parse_message(path: &str, message: pb::Message) -> Checked<Draft> {
    let role = parse_role(path, message.role, message.role_name)?;
    let content = if message.parts.is_empty() {
        Content::Text(message.content)
    } else {
        let parts = message.parts.into_iter().enumerate();
        let parts = parts.map(|(index, part)| parse_part(&format!("{path}.parts[{index}]"), part));
        Content::Parts(parts.collect::<Checked<_>>()?)
    };
    let mut tool_calls = Vec::with_capacity(message.tool_calls.len());
    for (index, call) in message.tool_calls.into_iter().enumerate() {
        let field = format!("{path}.tool_calls[{index}].arguments");
        let text = if call.arguments.trim().is_empty() {
            "{}"
        } else {
            &call.arguments
        };
        let arguments = Json::parse(&field, text)?;
        if !arguments.is_object() {
            return Err(Violation::new(field, "must be a JSON object"));
        }
        tool_calls.push(ToolCall {
            id: call.id,
            name: call.name,
            arguments,
        });
    }
    let usage = message.usage.map(|usage| Usage {
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        total_tokens: match usage.total_tokens {
            0 => usage.input_tokens.saturating_add(usage.output_tokens),
            total => total,
        },
    });
    let (metadata, langchain) = parse_metadata(path, message.metadata)?;
    let draft = Draft {
        id: not_empty(message.id),
        role,
        content,
        tool_calls,
        tool_call_id: not_empty(message.tool_call_id)
            .or_else(|| langchain::empty_call_id(langchain.as_ref())),
        name: not_empty(message.name),
        usage,
        reasoning: not_empty(message.reasoning),
        metadata,
        langchain,
    };
    let draft = draft.check(path)?;
    langchain::check_extra(path, &draft)?;
    Ok(draft)
}

fn not_empty(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn parse_role(path: &str, role: i32, role_name: String) -> Checked<Role> {
    let field = || format!("{path}.role");
    let role = match pb::Role::try_from(role) {
        Ok(pb::Role::System) => Role::System,
        Ok(pb::Role::User) => Role::User,
        Ok(pb::Role::Assistant) => Role::Assistant,
        Ok(pb::Role::Tool) => Role::Tool,
        Ok(pb::Role::Other) => return Ok(Role::Other(role_name)),
        Ok(pb::Role::Unspecified) => return Err(Violation::new(field(), "is required")),
        Err(_) => return Err(Violation::new(field(), format!("{role} is not a role"))),
    };
    if !role_name.is_empty() {
        let rule = "is for ROLE_OTHER only";
        return Err(Violation::new(format!("{path}.role_name"), rule));
    }
    Ok(role)
}

fn parse_part(path: &str, part: pb::ContentPart) -> Checked<Part> {
    use pb::content_part::Part as Given;
    match part.part {
        None => Err(Violation::new(path, "must have exactly one part set")),
        Some(Given::Text(text)) => Ok(Part::Text(text)),
        Some(Given::ImageUrl(image)) if image.url.is_empty() => Err(Violation::new(
            format!("{path}.image_url.url"),
            "is required",
        )),
        Some(Given::ImageUrl(image)) => Ok(Part::ImageUrl {
            url: image.url,
            detail: not_empty(image.detail),
        }),
        Some(Given::InlineData(data)) => {
            let field = format!("{path}.inline_data.media_type");
            check_name(&field, &data.media_type, NAME_BYTES_MAX)?;
            let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b',' | b'"' | b';');
            let halves = data.media_type.split_once('/');
            let is_media_type = data.media_type.bytes().all(allowed)
                && halves.is_some_and(|(kind, form)| !kind.is_empty() && !form.is_empty());
            if !is_media_type {
                return Err(Violation::new(field, "must be a media type: type/subtype"));
            }
            if data.data.is_empty() {
                return Err(Violation::new(
                    format!("{path}.inline_data.data"),
                    "is required",
                ));
            }
            Ok(Part::InlineData {
                media_type: data.media_type,
                data: data.data,
            })
        }
        Some(Given::Json(text)) => {
            let field = format!("{path}.json");
            let json = Json::parse(&field, &text)?;
            if !json.is_object() && !json.is_string() {
                let rule = "must be a JSON object or a JSON string";
                return Err(Violation::new(field, rule));
            }
            Ok(Part::Json(json))
        }
    }
}

/// Splits a message's metadata into the client's own and what is LangChain's.
fn parse_metadata(path: &str, metadata: Option<Struct>) -> Checked<(Option<Json>, Option<Json>)> {
    const LANGCHAIN: &str = "langchain";
    let Some(mut metadata) = metadata else {
        return Ok((None, None));
    };
    let field = format!("{path}.metadata");
    let langchain = match metadata.fields.remove(LANGCHAIN) {
        Some(value) => {
            let field = format!("{field}.{LANGCHAIN}");
            Some(Json::parse(&field, &value_to_json(&field, &value)?)?)
        }
        None => None,
    };
    let own = if metadata.fields.is_empty() {
        None
    } else {
        Some(parse_struct(&field, metadata)?)
    };
    Ok((own, langchain))
}

/// Takes from messages of a request what is ignored there, so that it is no part of what is asked.
pub fn drop_output(messages: &mut [pb::Message]) {
    for message in messages {
        message.sequence = 0;
        message.create_time = None;
        message.interrupted = false;
        message.turn_id.clear();
        message.raw.clear();
        message.problem = 0;
        message.raw_size = 0;
    }
}

/// Shows a stored element. With `include_raw`, its bytes too.
pub fn render_element(element: Element, include_raw: bool) -> pb::Message {
    let bytes = match element.body {
        Body::Bytes(bytes) => bytes,
        Body::TooLarge(size) => return too_large(element.sequence, size),
    };
    let size = bytes.len();
    let mut message = match langchain::decode(&bytes) {
        Ok(message) => render_message(element.sequence, message),
        Err(langchain::Unreadable) => pb::Message {
            sequence: element.sequence,
            role: pb::Role::Other.into(),
            problem: pb::Problem::Unreadable.into(),
            ..Default::default()
        },
    };
    if include_raw || message.problem() == pb::Problem::Unreadable {
        message.raw_size = size as i64;
        message.raw = bytes;
    }
    if message.encoded_len() + ENTRY_OVERHEAD <= PAGE_BYTES_MAX {
        return message;
    }
    message.raw.clear();
    message.raw_size = size as i64;
    message.problem = pb::Problem::TooLarge.into();
    if message.encoded_len() + ENTRY_OVERHEAD <= PAGE_BYTES_MAX {
        return message;
    }
    too_large(element.sequence, size)
}

/// Bytes that a message in a list takes besides its own, at most: tag, length, and the page token.
const ENTRY_OVERHEAD: usize = 256;
/// Bytes of its tag and its length, at most.
const MESSAGE_OVERHEAD: usize = 20;
/// Bytes that the messages of a window may take.
pub const WINDOW_BYTES_MAX: usize = PAGE_BYTES_MAX - ENTRY_OVERHEAD;

/// Bytes of the messages in the answer of a write, at most: what gRPC's clients take by default is 4 MiB,
/// and something is around them.
const STORED_BYTES_MAX: usize = (4 << 20) - (64 << 10);

/// Shows messages that were just stored. Where an answer has no room for all, the largest are named and
/// left out: an answer that the client cannot take would be one that cannot be had by asking again, too.
pub fn render_stored(messages: impl IntoIterator<Item = (Sequence, Message)>) -> Vec<pb::Message> {
    let shown = messages.into_iter();
    let mut shown: Vec<_> = shown
        .map(|(sequence, message)| render_message(sequence, message))
        .collect();
    let size = |message: &pb::Message| message.encoded_len() + MESSAGE_OVERHEAD;
    let mut bytes: usize = shown.iter().map(size).sum();
    while bytes > STORED_BYTES_MAX
        && let Some(largest) = shown.iter_mut().max_by_key(|message| size(message))
    {
        bytes -= size(largest);
        let whole = std::mem::take(largest);
        *largest = pb::Message {
            id: whole.id,
            role: whole.role,
            role_name: whole.role_name,
            create_time: whole.create_time,
            ..too_large(whole.sequence, 0)
        };
        bytes += size(largest);
    }
    shown
}

fn too_large(sequence: Sequence, size: usize) -> pb::Message {
    pb::Message {
        sequence,
        role: pb::Role::Other.into(),
        problem: pb::Problem::TooLarge.into(),
        raw_size: size as i64,
        ..Default::default()
    }
}

/// Shows a message.
pub fn render_message(sequence: Sequence, message: Message) -> pb::Message {
    let draft = message.draft;
    let (role, role_name) = match draft.role {
        Role::System => (pb::Role::System, String::new()),
        Role::User => (pb::Role::User, String::new()),
        Role::Assistant => (pb::Role::Assistant, String::new()),
        Role::Tool => (pb::Role::Tool, String::new()),
        Role::Other(name) => (pb::Role::Other, name),
    };
    let (content, parts) = match draft.content {
        Content::Text(text) => (text, Vec::new()),
        Content::Parts(parts) => (
            parts.iter().filter_map(Part::text).collect(),
            parts.into_iter().map(render_part).collect(),
        ),
    };
    let tool_calls = draft.tool_calls.into_iter().map(|call| pb::ToolCall {
        id: call.id,
        name: call.name,
        arguments: call.arguments.shown().into_owned(),
    });
    let mut metadata = draft
        .metadata
        .as_ref()
        .map(json_to_struct)
        .unwrap_or_default();
    if let Some(langchain) = &draft.langchain {
        let langchain = json_to_value(langchain.as_str(), 0);
        metadata.fields.insert("langchain".to_owned(), langchain);
    }
    pb::Message {
        sequence,
        id: draft.id.unwrap_or_default(),
        role: role.into(),
        role_name,
        content,
        parts,
        tool_calls: tool_calls.collect(),
        tool_call_id: draft.tool_call_id.unwrap_or_default(),
        name: draft.name.unwrap_or_default(),
        usage: draft.usage.map(render_usage),
        create_time: message.create_time_ms.map(render_time),
        interrupted: message.interrupted,
        reasoning: draft.reasoning.unwrap_or_default(),
        metadata: Some(metadata).filter(|metadata| !metadata.fields.is_empty()),
        turn_id: message.turn_id.unwrap_or_default(),
        ..Default::default()
    }
}

fn render_part(part: Part) -> pb::ContentPart {
    use pb::content_part::Part as Shown;
    let shown = match part {
        Part::Text(text) => Shown::Text(text),
        Part::ImageUrl { url, detail } => Shown::ImageUrl(pb::ImageUrl {
            url,
            detail: detail.unwrap_or_default(),
        }),
        Part::InlineData { media_type, data } => {
            Shown::InlineData(pb::InlineData { media_type, data })
        }
        Part::Json(json) => Shown::Json(json.shown().into_owned()),
    };
    pb::ContentPart { part: Some(shown) }
}

pub fn render_usage(usage: Usage) -> pb::Usage {
    pb::Usage {
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        total_tokens: usage.total_tokens,
    }
}

fn render_time(time_ms: i64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time_ms.div_euclid(1000),
        nanos: (time_ms.rem_euclid(1000) * 1_000_000) as i32,
    }
}

// ---------------------------------------------------------------------------------------------
// JSON ⇄ Struct

/// Levels of nesting that a rendered Struct has at most; deeper values go as JSON text. Protobuf
/// decoders refuse messages nested about 100 deep, and each level here is three of theirs.
const STRUCT_DEPTH_MAX: usize = 16;

/// The key of an object that holds a value as JSON text, for what a Struct cannot hold exactly.
const EXACT: &str = "$json";

/// Takes a Struct as JSON.
pub fn parse_struct(field: &str, fields: Struct) -> Checked<Json> {
    let value = StructValue {
        kind: Some(Kind::StructValue(fields)),
    };
    Json::parse(field, &value_to_json(field, &value)?)
}

fn value_to_json(field: &str, value: &StructValue) -> Checked<String> {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Ok("null".to_owned()),
        Some(Kind::BoolValue(flag)) => Ok(flag.to_string()),
        Some(Kind::StringValue(text)) => Ok(quote(text)),
        Some(Kind::NumberValue(number)) if !number.is_finite() => {
            Err(Violation::new(field, "must hold finite numbers only"))
        }
        Some(Kind::NumberValue(number)) => Ok(number_to_json(*number)),
        Some(Kind::ListValue(list)) => {
            let items = list.values.iter().map(|item| value_to_json(field, item));
            Ok(format!(
                "[{}]",
                items.collect::<Checked<Vec<_>>>()?.join(", ")
            ))
        }
        Some(Kind::StructValue(fields)) => {
            if let Some(text) = exact_text(fields) {
                Json::parse(field, text)?;
                return Ok(text.to_owned());
            }
            let mut members = Vec::with_capacity(fields.fields.len());
            for (key, value) in &fields.fields {
                members.push(format!("{}: {}", quote(key), value_to_json(field, value)?));
            }
            Ok(format!("{{{}}}", members.join(", ")))
        }
    }
}

fn exact_text(fields: &Struct) -> Option<&str> {
    match fields.fields.get(EXACT)?.kind.as_ref()? {
        Kind::StringValue(text) if fields.fields.len() == 1 => Some(text),
        _ => None,
    }
}

/// A whole number without a fraction, anything else in the shortest form that reads back the same.
fn number_to_json(number: f64) -> String {
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0; // 2^53
    let is_negative_zero = number == 0.0 && number.is_sign_negative();
    if number.fract() == 0.0 && number.abs() <= WHOLE_MAX && !is_negative_zero {
        return format!("{}", number as i64);
    }
    serde_json::Value::from(number).to_string()
}

fn json_to_struct(json: &Json) -> Struct {
    match json_to_value(json.as_str(), 0).kind {
        Some(Kind::StructValue(fields)) => fields,
        _ => Struct::default(),
    }
}

fn json_to_value(json: &str, depth: usize) -> StructValue {
    let kind = exact_kind(json, depth).unwrap_or_else(|| {
        let text = StructValue {
            kind: Some(Kind::StringValue(show_non_finite(json).into_owned())),
        };
        Kind::StructValue(Struct {
            fields: [(EXACT.to_owned(), text)].into(),
        })
    });
    StructValue { kind: Some(kind) }
}

/// The value as a Struct holds it, or `None` if that would not be exact.
fn exact_kind(json: &str, depth: usize) -> Option<Kind> {
    match json.bytes().next()? {
        b'n' => Some(Kind::NullValue(0)),
        b't' => Some(Kind::BoolValue(true)),
        b'f' => Some(Kind::BoolValue(false)),
        b'"' => serde_json::from_str(json).ok().map(Kind::StringValue),
        b'[' if depth < STRUCT_DEPTH_MAX => {
            let items: Vec<&RawValue> = serde_json::from_str(json).ok()?;
            let values = items
                .into_iter()
                .map(|item| json_to_value(item.get(), depth + 1));
            Some(Kind::ListValue(prost_types::ListValue {
                values: values.collect(),
            }))
        }
        b'{' if depth < STRUCT_DEPTH_MAX => {
            // A map refuses duplicate keys no more than a Struct does: it keeps the last one.
            let members: std::collections::BTreeMap<String, &RawValue> =
                serde_json::from_str(json).ok()?;
            if members.len() == 1 && members.contains_key(EXACT) {
                return None;
            }
            let fields = members
                .into_iter()
                .map(|(key, value)| (key, json_to_value(value.get(), depth + 1)));
            Some(Kind::StructValue(Struct {
                fields: fields.collect(),
            }))
        }
        b'[' | b'{' => None,
        _ => {
            let number: f64 = json.parse().ok()?;
            (number.is_finite() && number_to_json(number) == json)
                .then_some(Kind::NumberValue(number))
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Pages

/// A checked `GetMessagesRequest`.
#[derive(Debug, Clone)]
pub struct PageRequest {
    pub session: SessionId,
    pub read: Read,
    pub include_raw: bool,
    scope: Scope,
}

/// What a page token belongs to: it is no use for another session, order or range.
#[derive(Debug, Clone)]
struct Scope {
    session: SessionId,
    order: Order,
    after: Sequence,
    before: Option<Sequence>,
    last: Option<usize>,
}

/// A checked `GetMessagesRequest` that asks for a window.
#[derive(Debug, Clone)]
pub struct WindowRequest {
    pub session: SessionId,
    pub before: Option<Sequence>,
    pub bounds: Asked,
    /// The model whose tokens count; empty for the default.
    pub model: String,
    pub include_raw: bool,
}

/// What a `GetMessagesRequest` asks for.
#[derive(Debug, Clone)]
pub enum MessagesRequest {
    Page(PageRequest),
    Window(WindowRequest),
}

/// Takes a `GetMessagesRequest`.
pub fn parse_messages_request(request: pb::GetMessagesRequest) -> Checked<MessagesRequest> {
    if request.last_turns.is_some() || request.max_tokens.is_some() {
        return parse_window_request(request).map(MessagesRequest::Window);
    }
    if !request.model.is_empty() {
        let rule = "is for windows only: with last_turns or max_tokens";
        return Err(Violation::new("model", rule));
    }
    parse_page_request(request).map(MessagesRequest::Page)
}

fn parse_window_request(request: pb::GetMessagesRequest) -> Checked<WindowRequest> {
    let session = SessionId::parse(request.session_id)?;
    let not_for_windows = [
        ("page_size", request.page_size != 0),
        ("page_token", !request.page_token.is_empty()),
        ("order", request.order == i32::from(pb::Order::NewestFirst)),
        ("after_sequence", request.after_sequence.is_some()),
    ];
    for (field, is_set) in not_for_windows {
        if is_set {
            let rule = "is not for windows: without last_turns and max_tokens only";
            return Err(Violation::new(field, rule));
        }
    }
    parse_order(request.order)?;
    check_name("model", &request.model, NAME_BYTES_MAX)?;
    Ok(WindowRequest {
        session,
        before: parse_before(request.before_sequence)?,
        bounds: Asked::parse(
            request.last_messages,
            request.last_turns,
            request.max_tokens,
            history::MESSAGES_MAX,
        )?,
        model: request.model,
        include_raw: request.include_raw,
    })
}

fn parse_order(order: i32) -> Checked<Order> {
    match pb::Order::try_from(order) {
        Ok(pb::Order::Unspecified | pb::Order::OldestFirst) => Ok(Order::OldestFirst),
        Ok(pb::Order::NewestFirst) => Ok(Order::NewestFirst),
        Err(_) => Err(Violation::new("order", format!("{order} is not an order"))),
    }
}

fn parse_before(before: Option<i64>) -> Checked<Option<Sequence>> {
    if before.is_some_and(|before| before < 1) {
        return Err(Violation::new("before_sequence", "must be 1 or more"));
    }
    Ok(before)
}

fn parse_page_request(request: pb::GetMessagesRequest) -> Checked<PageRequest> {
    let session = SessionId::parse(request.session_id)?;
    let order = parse_order(request.order)?;
    let last = match request.last_messages {
        None => None,
        Some(last) => Some(at_least_one("last_messages", last)?),
    };
    let after = request.after_sequence.unwrap_or(0);
    if after < 0 {
        return Err(Violation::new("after_sequence", "must be 0 or more"));
    }
    let before = parse_before(request.before_sequence)?;
    let limit = match request.page_size {
        0 => last.map_or(PAGE_MESSAGES_DEFAULT, |last| last.min(PAGE_MESSAGES_MAX)),
        size => at_least_one("page_size", size)?,
    };
    if limit > PAGE_MESSAGES_MAX {
        let rule = format!("must be at most {PAGE_MESSAGES_MAX}, is {limit}");
        return Err(Violation::new("page_size", rule));
    }

    let scope = Scope {
        session: session.clone(),
        order,
        after,
        before,
        last,
    };
    let mut read = Read {
        order,
        after,
        before,
        last,
        limit,
        bytes_max: PAGE_BYTES_MAX,
    };
    if !request.page_token.is_empty() {
        // The token holds the range that is left; `last` was resolved by the first page.
        (read.after, read.before) = scope.open_token(&request.page_token)?;
        read.last = None;
    }
    Ok(PageRequest {
        session,
        read,
        include_raw: request.include_raw,
        scope,
    })
}

fn at_least_one(field: &str, number: i32) -> Checked<usize> {
    match usize::try_from(number) {
        Ok(number) if number >= 1 => Ok(number),
        _ => Err(Violation::new(field, "must be 1 or more")),
    }
}

/// Shows a page, as much of it as fits into [`PAGE_BYTES_MAX`].
pub fn render_page(request: &PageRequest, page: Page) -> pb::GetMessagesResponse {
    let mut messages = Vec::with_capacity(page.elements.len());
    let mut size = ENTRY_OVERHEAD;
    let mut more = page.more;
    for element in page.elements {
        let message = render_element(element, request.include_raw);
        size += message.encoded_len() + MESSAGE_OVERHEAD;
        if size > PAGE_BYTES_MAX && !messages.is_empty() {
            more = true;
            break;
        }
        messages.push(message);
    }
    let next_page_token = match messages.last() {
        Some(last) if more => {
            let is_window = request.scope.last.is_some();
            let (after, before) = match request.read.order {
                // What is appended meanwhile belongs to the pages to come, unless the range ends
                // before it or the window was fixed.
                Order::OldestFirst if is_window => (last.sequence, Some(page.before)),
                Order::OldestFirst => (last.sequence, request.read.before),
                Order::NewestFirst => (page.after, Some(last.sequence)),
            };
            request.scope.make_token(after, before)
        }
        _ => String::new(),
    };
    pb::GetMessagesResponse {
        messages,
        next_page_token,
        ..Default::default()
    }
}

/// How to weigh the messages of a window: what they take in a response. `None` for one that does
/// not fit into it in full.
pub fn weigh(include_raw: bool) -> fn(&Element, &Message) -> Option<usize> {
    fn of(message: pb::Message) -> Option<usize> {
        let is_whole = message.problem() == pb::Problem::Unspecified;
        is_whole.then(|| message.encoded_len() + MESSAGE_OVERHEAD)
    }
    match include_raw {
        true => |element, _| of(render_element(element.clone(), true)),
        false => |element, message| of(render_message(element.sequence, message.clone())),
    }
}

/// Shows a window.
pub fn render_window(
    include_raw: bool,
    window: History,
    tokenizer: Tokenizer,
) -> pb::GetMessagesResponse {
    let is_empty = window.entries.is_empty();
    let elements = window.entries.into_iter().map(|entry| entry.source);
    pb::GetMessagesResponse {
        messages: elements
            .map(|element| render_element(element, include_raw))
            .collect(),
        token_count: if is_empty {
            0
        } else {
            (PRIMING + window.tokens) as i64
        },
        tokenizer: tokenizer.name().to_owned(),
        ..Default::default()
    }
}

/// Bytes of a token's check. It is no secret: a made-up token reads what the caller may read
/// anyway. It is there so that a mistake is noticed.
const CHECK_BYTES: usize = 12;

impl Scope {
    fn make_token(&self, after: Sequence, before: Option<Sequence>) -> String {
        let mut token = Vec::with_capacity(16 + CHECK_BYTES);
        token.extend(after.to_be_bytes());
        token.extend(before.unwrap_or(0).to_be_bytes());
        token.extend(self.check(after, before));
        URL_SAFE_NO_PAD.encode(token)
    }

    fn open_token(&self, token: &str) -> Checked<(Sequence, Option<Sequence>)> {
        let rule = "must be the next_page_token of a page of this session, order and range";
        let foreign = || Violation::new("page_token", rule);
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| foreign())?;
        let (range, check) = bytes.split_at_checked(16).ok_or_else(foreign)?;
        let number = |bytes: &[u8]| {
            bytes
                .iter()
                .fold(0, |number, byte| number << 8 | i64::from(*byte))
        };
        let after = number(&range[..8]);
        let before = Some(number(&range[8..])).filter(|before| *before != 0);
        if check != self.check(after, before) {
            return Err(foreign());
        }
        Ok((after, before))
    }

    fn check(&self, after: Sequence, before: Option<Sequence>) -> [u8; CHECK_BYTES] {
        let order = match self.order {
            Order::OldestFirst => 1,
            Order::NewestFirst => 2,
        };
        let last = self.last.map_or(0, |last| last as i64);
        let mut digest = Sha256::new();
        digest.update(b"chat-memory page token 1");
        for number in [
            order,
            self.after,
            self.before.unwrap_or(0),
            last,
            after,
            before.unwrap_or(0),
        ] {
            digest.update(number.to_be_bytes());
        }
        digest.update(self.session.as_str());
        let mut check = [0; CHECK_BYTES];
        check.copy_from_slice(&digest.finalize()[..CHECK_BYTES]);
        check
    }
}

// ---------------------------------------------------------------------------------------------
// Chat

/// Tools of one request at most.
const TOOLS_MAX: usize = 128;
/// Stop texts of one request at most.
const STOP_MAX: usize = 16;

/// Takes the tools of a request.
pub fn parse_tools(tools: Vec<pb::Tool>) -> Checked<Vec<model::Tool>> {
    if tools.len() > TOOLS_MAX {
        let rule = format!("must be at most {TOOLS_MAX}, is {}", tools.len());
        return Err(Violation::new("tools", rule));
    }
    let size: usize = tools.iter().map(prost::Message::encoded_len).sum();
    if size > MESSAGE_BYTES_MAX {
        let rule = format!("must be at most {MESSAGE_BYTES_MAX} bytes together, is {size}");
        return Err(Violation::new("tools", rule));
    }
    let mut parsed = Vec::with_capacity(tools.len());
    for (index, tool) in tools.into_iter().enumerate() {
        let field = format!("tools[{index}].name");
        if tool.name.is_empty() {
            return Err(Violation::new(field, "is required"));
        }
        check_name(&field, &tool.name, NAME_BYTES_MAX)?;
        let field = format!("tools[{index}].parameters");
        parsed.push(model::Tool {
            name: tool.name,
            description: not_empty(tool.description),
            parameters: match tool.parameters {
                None => None,
                Some(parameters) => Some(parse_struct(&field, parameters)?),
            },
        });
    }
    Ok(parsed)
}

/// Takes the options of a request.
pub fn parse_options(options: Option<pb::ModelOptions>) -> Checked<model::Options> {
    let Some(options) = options else {
        return Ok(model::Options::default());
    };
    let ranges = [
        ("options.temperature", options.temperature, 2.0),
        ("options.top_p", options.top_p, 1.0),
    ];
    for (field, value, max) in ranges {
        if value.is_some_and(|value| !(0.0..=max).contains(&value)) {
            return Err(Violation::new(field, format!("must be 0 to {max}")));
        }
    }
    let max_output_tokens = match options.max_output_tokens {
        None => None,
        Some(tokens) => Some(at_least_one("options.max_output_tokens", tokens)? as u32),
    };
    if options.stop.len() > STOP_MAX {
        let rule = format!("must be at most {STOP_MAX}, is {}", options.stop.len());
        return Err(Violation::new("options.stop", rule));
    }
    if options.stop.iter().any(String::is_empty) {
        return Err(Violation::new(
            "options.stop",
            "must not hold an empty text",
        ));
    }
    Ok(model::Options {
        temperature: options.temperature,
        top_p: options.top_p,
        max_output_tokens,
        stop: options.stop,
    })
}

pub fn render_finish_reason(reason: model::FinishReason) -> pb::FinishReason {
    match reason {
        model::FinishReason::Unspecified => pb::FinishReason::Unspecified,
        model::FinishReason::Stop => pb::FinishReason::Stop,
        model::FinishReason::Length => pb::FinishReason::Length,
        model::FinishReason::ToolCalls => pb::FinishReason::ToolCalls,
        model::FinishReason::ContentFilter => pb::FinishReason::ContentFilter,
        model::FinishReason::Other => pb::FinishReason::Other,
    }
}

// ---------------------------------------------------------------------------------------------
// The codec

/// Bytes that a call's buffer for answers begins with. A stream keeps its buffer as long as it
/// lives, and what it sends is small: tonic's default of 8 KiB would be a seventh of what a running
/// turn takes.
const ENCODE_BYTES: usize = 512;
/// And its buffer for requests: most are small.
const DECODE_BYTES: usize = 1024;
/// Bytes that are gathered before they are sent: tonic's default.
const YIELD_BYTES: usize = 32 << 10;

/// prost's codec, but a request that cannot be decoded is the client's fault and not ours:
/// INVALID_ARGUMENT, where tonic's own says INTERNAL.
#[derive(Debug)]
pub struct Codec<Out, In>(std::marker::PhantomData<(Out, In)>);

impl<Out, In> Default for Codec<Out, In> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<Out, In> tonic::codec::Codec for Codec<Out, In>
where
    Out: prost::Message + Send + 'static,
    In: prost::Message + Default + Send + 'static,
{
    type Encode = Out;
    type Decode = In;
    type Encoder = SizedEncoder<Out>;
    type Decoder = CheckedDecoder<In>;

    fn encoder(&mut self) -> Self::Encoder {
        SizedEncoder(std::marker::PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder(std::marker::PhantomData)
    }
}

/// Encodes one type of answer.
#[derive(Debug)]
pub struct SizedEncoder<Out>(std::marker::PhantomData<Out>);

impl<Out: prost::Message> Encoder for SizedEncoder<Out> {
    type Item = Out;
    type Error = Status;

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(ENCODE_BYTES, YIELD_BYTES)
    }

    fn encode(&mut self, message: Out, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // All at once: a page would outgrow the buffer, and be copied, half a dozen times.
        buffer.reserve(message.encoded_len());
        message.encode_raw(buffer);
        Ok(())
    }
}

/// Decodes one type of request.
#[derive(Debug)]
pub struct CheckedDecoder<In>(std::marker::PhantomData<In>);

impl<In: prost::Message + Default> Decoder for CheckedDecoder<In> {
    type Item = In;
    type Error = Status;

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(DECODE_BYTES, YIELD_BYTES)
    }

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<In>, Status> {
        match In::decode(buffer) {
            Ok(message) => Ok(Some(message)),
            Err(error) => Err(error::malformed_request(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(message: pb::Message) -> Checked<Draft> {
        parse_messages(vec![message], MESSAGE_BYTES_MAX).map(|mut drafts| drafts.remove(0))
    }

    fn user(content: &str) -> pb::Message {
        pb::Message {
            role: pb::Role::User.into(),
            content: content.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_struct_gives_back_every_json_value_exactly() {
        let deep = "[".repeat(40) + &"]".repeat(40);
        for json in [
            r#"{"a": 1, "b": [true, null, "x"], "c": -2.5}"#,
            r#"{"big": 123456789012345678901234567890}"#,
            r#"{"float": 1.0, "minus": -0, "odd": 0.10, "small": 1e-7}"#,
            r#"{"lone": "\ud800"}"#,
            r#"{"$json": "1"}"#,
            &format!(r#"{{"deep": {deep}}}"#),
        ] {
            let value = json_to_value(json, 0);
            assert_eq!(value_to_json("f", &value).as_deref(), Ok(json));
        }
    }

    #[test]
    fn a_number_that_is_none_is_refused() {
        let mut message = user("hi");
        let value = StructValue {
            kind: Some(Kind::NumberValue(f64::NAN)),
        };
        message.metadata = Some(Struct {
            fields: [("n".to_owned(), value)].into(),
        });
        assert_eq!(parse(message).unwrap_err().field, "messages[0].metadata");
    }

    #[test]
    fn parts_and_calls_are_checked_by_their_path() {
        let mut message = user("");
        message.parts = vec![pb::ContentPart { part: None }];
        assert_eq!(
            parse(message.clone()).unwrap_err().field,
            "messages[0].parts[0]"
        );
        message.parts[0].part = Some(pb::content_part::Part::Json("[1]".into()));
        assert_eq!(
            parse(message).unwrap_err().field,
            "messages[0].parts[0].json"
        );
        let mut message = user("");
        message.role = pb::Role::Assistant.into();
        message.tool_calls = vec![pb::ToolCall {
            name: "add".into(),
            arguments: "[1]".into(),
            ..Default::default()
        }];
        assert_eq!(
            parse(message).unwrap_err().to_string(),
            "messages[0].tool_calls[0].arguments: must be a JSON object"
        );
    }

    #[test]
    fn a_role_that_is_none_is_refused() {
        for (role, rule) in [
            (0, "is required"),
            (77, "77 is not a role"),
            (-1, "-1 is not a role"),
        ] {
            let mut message = user("hi");
            message.role = role;
            assert_eq!(
                parse(message).unwrap_err(),
                Violation::new("messages[0].role", rule)
            );
        }
    }

    #[test]
    fn a_page_token_is_of_use_for_its_own_session_order_and_range_only() {
        let request = |session: &str, token: &str| pb::GetMessagesRequest {
            session_id: session.to_owned(),
            page_token: token.to_owned(),
            ..Default::default()
        };
        let scope = parse_page_request(request("a", "")).unwrap().scope;
        let token = scope.make_token(7, None);
        let next = parse_page_request(request("a", &token)).unwrap();
        assert_eq!((next.read.after, next.read.before), (7, None));
        assert!(parse_page_request(request("b", &token)).is_err());
        let mut other_order = request("a", &token);
        other_order.order = pb::Order::NewestFirst.into();
        assert!(parse_page_request(other_order).is_err());
        let mut other_range = request("a", &token);
        other_range.after_sequence = Some(1);
        assert!(parse_page_request(other_range).is_err());
        for made_up in [
            "x",
            "====",
            &"A".repeat(38),
            &token[1..],
            &format!("{token}A"),
        ] {
            assert!(
                parse_page_request(request("a", made_up)).is_err(),
                "{made_up}"
            );
        }
    }

    #[test]
    fn an_element_too_large_for_a_page_is_named_and_left_out() {
        let element = |bytes: Vec<u8>| Element {
            sequence: 3,
            body: Body::Bytes(bytes.into()),
        };
        let text = "x".repeat(PAGE_BYTES_MAX);
        let json = format!(r#"{{"type": "human", "data": {{"content": "{text}"}}}}"#);
        let message = render_element(element(json.clone().into_bytes()), false);
        assert_eq!(message.problem(), pb::Problem::TooLarge);
        assert_eq!((message.sequence, message.content.len()), (3, 0));
        let half = "x".repeat(PAGE_BYTES_MAX / 2);
        let json = format!(r#"{{"type": "human", "data": {{"content": "{half}"}}}}"#);
        let message = render_element(element(json.clone().into_bytes()), true);
        assert_eq!(message.problem(), pb::Problem::TooLarge);
        assert_eq!(message.content.len(), half.len());
        assert_eq!(
            (message.raw.len(), message.raw_size),
            (0, json.len() as i64)
        );
        let message = render_element(element(b"junk".to_vec()), false);
        assert_eq!(message.problem(), pb::Problem::Unreadable);
        assert_eq!(&message.raw[..], b"junk");
    }

    #[test]
    fn a_request_that_cannot_be_decoded_names_its_field() {
        // AppendRequest { session_id: "\xff" }
        let error = pb::AppendRequest::decode(&b"\x0a\x01\xff"[..]).unwrap_err();
        let status = error::malformed_request(&error);
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        let details = tonic_types::StatusExt::get_error_details(&status);
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "session_id"
        );
    }
}
