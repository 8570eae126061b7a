//! `chat-memory history`: the messages of a session, for people or as JSON lines. Holds one page
//! at a time, however long the session is.

use std::{
    borrow::Cow,
    io::{self, BufWriter, IsTerminal as _, Write},
    process::ExitCode,
};

use prost_types::{Timestamp, value::Kind};
use serde::Serialize;
use serde_json::{Map, Value};
use tonic::transport::Channel;

use super::{
    Error,
    args::HistoryArgs,
    client, exit_code,
    text::{self, Style},
};
use crate::{
    message::{PAGE_MESSAGES_MAX, SessionId, base64},
    pb::{
        self, GetMessagesRequest, Message, Problem, Role, chat_memory_client::ChatMemoryClient,
        content_part::Part,
    },
};

/// Characters of an address or of JSON that a summary shows, at most.
const SUMMARY_CHARS_MAX: usize = 200;

/// Prints a session to stdout.
pub async fn run(args: HistoryArgs) -> ExitCode {
    let stdout = io::stdout();
    let color = args.color.allowed() && stdout.is_terminal();
    let out = BufWriter::new(stdout);
    exit_code(
        print(&args, Style { color }, out)
            .await
            .map(|()| ExitCode::SUCCESS),
    )
}

/// Prints a session to `out`, page by page.
pub async fn print(args: &HistoryArgs, style: Style, mut out: impl Write) -> Result<(), Error> {
    let client = client::connect_api(&args.target.target).await?;
    let request = GetMessagesRequest {
        last_messages: args
            .last
            .map(|last| i32::try_from(last).unwrap_or(i32::MAX)),
        include_raw: args.raw,
        ..request(&args.session.session)
    };
    let mut pages = Pages::new(client, request);
    while let Some(messages) = pages.next().await? {
        for message in &messages {
            if args.json {
                write_json(&mut out, message)?;
            } else {
                write_message(&mut out, message, style)?;
            }
        }
        // Shows what there is while the next page is on its way, and notices early that the
        // reader has gone.
        out.flush()?;
    }
    Ok(())
}

/// Asks for all of a session, in large pages.
pub(super) fn request(session: &SessionId) -> GetMessagesRequest {
    GetMessagesRequest {
        session_id: session.as_str().to_owned(),
        page_size: PAGE_MESSAGES_MAX as i32,
        ..GetMessagesRequest::default()
    }
}

/// The pages that a request leads to, one after the other.
#[derive(Debug)]
pub struct Pages {
    client: ChatMemoryClient<Channel>,
    /// Asks for the next page; `None` after the last one.
    request: Option<GetMessagesRequest>,
}

impl Pages {
    pub fn new(client: ChatMemoryClient<Channel>, request: GetMessagesRequest) -> Self {
        Self {
            client,
            request: Some(request),
        }
    }

    /// The next page; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<Vec<Message>>, Error> {
        let Some(mut request) = self.request.take() else {
            return Ok(None);
        };
        let answer = self.client.get_messages(client::request(request.clone()));
        let page = answer.await?.into_inner();
        if !page.next_page_token.is_empty() {
            if page.next_page_token == request.page_token {
                return Err(Error::Contract("a page names itself as the next one"));
            }
            request.page_token = page.next_page_token;
            self.request = Some(request);
        }
        Ok(Some(page.messages))
    }
}

/// Writes a message for people: a line of facts, the contents, an empty line.
pub fn write_message(out: &mut impl Write, message: &Message, style: Style) -> io::Result<()> {
    let mut facts = style.bold(format!("#{} {}", message.sequence, role_name(message)));
    for name in [&message.name, &message.tool_call_id] {
        if !name.is_empty() {
            facts += &format!("  {}", text::one_line(name));
        }
    }
    if let Some(time) = &message.create_time {
        facts += &style.dim(format!("  {}", time_for_people(time)));
    }
    if message.interrupted {
        facts += "  [interrupted]";
    }
    writeln!(out, "{facts}")?;

    match message.problem() {
        Problem::Unspecified => {}
        Problem::Unreadable => writeln!(
            out,
            "[unreadable: the {} stored bytes are not a message of a known form; \
             `history --json` shows them]",
            message.raw_size
        )?,
        Problem::TooLarge => writeln!(
            out,
            "[too large for a page: {} bytes are stored; contents are left out]",
            message.raw_size
        )?,
    }
    if !message.reasoning.is_empty() {
        let reasoning = text::plain(&message.reasoning);
        writeln!(out, "{}", style.dim(format!("[reasoning] {reasoning}")))?;
    }
    if message.parts.is_empty() {
        write_text(out, &message.content)?;
    }
    for part in message.parts.iter().filter_map(|part| part.part.as_ref()) {
        match part {
            Part::Text(text) => write_text(out, text)?,
            Part::ImageUrl(image) => writeln!(out, "[image {}]", summary(&image.url))?,
            Part::InlineData(data) => {
                let media_type = summary(&data.media_type);
                writeln!(out, "[{media_type}, {} bytes]", data.data.len())?;
            }
            Part::Json(json) => writeln!(out, "[{}]", summary(json))?,
        }
    }
    for call in &message.tool_calls {
        writeln!(out, "{}", tool_call(call))?;
    }
    writeln!(out)
}

/// A tool call, on one line.
pub(super) fn tool_call(call: &pb::ToolCall) -> String {
    let name = text::one_line(&call.name);
    let arguments = text::one_line(&call.arguments);
    let id = text::one_line(&call.id);
    format!("[calls the tool {name} with {arguments}; {id}]")
}

fn write_text(out: &mut impl Write, text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let safe = text::plain(text);
    writeln!(out, "{}", safe.strip_suffix('\n').unwrap_or(&safe))
}

fn role_name(message: &Message) -> Cow<'_, str> {
    match message.role() {
        Role::System => "system".into(),
        Role::User => "user".into(),
        Role::Assistant => "assistant".into(),
        Role::Tool => "tool".into(),
        Role::Other => text::one_line(&message.role_name),
        Role::Unspecified => "?".into(),
    }
}

/// `2026-11-23 15:12:00 UTC`.
fn time_for_people(time: &Timestamp) -> String {
    let seconds = Timestamp { nanos: 0, ..*time };
    let rfc3339 = seconds.to_string();
    format!("{} UTC", rfc3339.replace('T', " ").trim_end_matches('Z'))
}

fn summary(text: &str) -> String {
    let safe = text::one_line(text);
    let mut short: String = safe.chars().take(SUMMARY_CHARS_MAX).collect();
    if short.len() < safe.len() {
        short.push('…');
    }
    short
}

/// A message in the API's JSON form, with all fields, under the names of the proto and in its
/// order. Programs rely on it.
#[derive(Debug, Serialize)]
pub(super) struct JsonMessage<'a> {
    sequence: i64,
    id: &'a str,
    role: Value,
    role_name: &'a str,
    content: &'a str,
    parts: Vec<JsonPart<'a>>,
    tool_calls: Vec<JsonToolCall<'a>>,
    tool_call_id: &'a str,
    name: &'a str,
    usage: Option<JsonUsage>,
    create_time: Option<String>,
    interrupted: bool,
    reasoning: &'a str,
    metadata: Option<Value>,
    turn_id: &'a str,
    raw: Option<String>,
    problem: Value,
    raw_size: i64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum JsonPart<'a> {
    Text(&'a str),
    ImageUrl { url: &'a str, detail: &'a str },
    InlineData { media_type: &'a str, data: String },
    Json(&'a str),
}

#[derive(Debug, Serialize)]
struct JsonToolCall<'a> {
    id: &'a str,
    name: &'a str,
    arguments: &'a str,
}

#[derive(Debug, Serialize)]
struct JsonUsage {
    input_tokens: i64,
    output_tokens: i64,
    total_tokens: i64,
}

impl<'a> From<&'a Message> for JsonMessage<'a> {
    fn from(message: &'a Message) -> Self {
        Self {
            sequence: message.sequence,
            id: &message.id,
            role: enum_value(message.role, Role::as_str_name),
            role_name: &message.role_name,
            content: &message.content,
            parts: message.parts.iter().filter_map(json_part).collect(),
            tool_calls: message.tool_calls.iter().map(json_tool_call).collect(),
            tool_call_id: &message.tool_call_id,
            name: &message.name,
            usage: message.usage.map(|usage| JsonUsage {
                input_tokens: usage.input_tokens,
                output_tokens: usage.output_tokens,
                total_tokens: usage.total_tokens,
            }),
            create_time: message.create_time.map(|time| time.to_string()),
            interrupted: message.interrupted,
            reasoning: &message.reasoning,
            metadata: message.metadata.as_ref().map(json_struct),
            turn_id: &message.turn_id,
            raw: (!message.raw.is_empty()).then(|| base64(&message.raw)),
            problem: enum_value(message.problem, Problem::as_str_name),
            raw_size: message.raw_size,
        }
    }
}

/// Writes a message as one line of JSON.
pub fn write_json(out: &mut impl Write, message: &Message) -> io::Result<()> {
    write_line(out, &JsonMessage::from(message))
}

/// Writes something as one line of JSON that cannot command a terminal.
pub(super) fn write_line(out: &mut impl Write, json: &impl Serialize) -> io::Result<()> {
    let line = serde_json::to_string(json)?;
    writeln!(out, "{}", escape_c1(&line))
}

/// Escapes the control characters that JSON allows as they are, for terminals obey them too.
/// Outside of strings JSON has none, so this changes no value.
fn escape_c1(json: &str) -> Cow<'_, str> {
    let is_c1 = |c: char| ('\u{7f}'..='\u{9f}').contains(&c);
    if !json.contains(is_c1) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_c1(c) {
            escaped += &format!("\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// An enum's name in the proto, or its number where this program does not know it.
pub(super) fn enum_value<E: TryFrom<i32>>(number: i32, name: fn(&E) -> &'static str) -> Value {
    match E::try_from(number) {
        Ok(value) => Value::from(name(&value)),
        Err(_) => Value::from(number),
    }
}

fn json_part(part: &pb::ContentPart) -> Option<JsonPart<'_>> {
    Some(match part.part.as_ref()? {
        Part::Text(text) => JsonPart::Text(text),
        Part::ImageUrl(image) => JsonPart::ImageUrl {
            url: &image.url,
            detail: &image.detail,
        },
        Part::InlineData(data) => JsonPart::InlineData {
            media_type: &data.media_type,
            data: base64(&data.data),
        },
        Part::Json(json) => JsonPart::Json(json),
    })
}

fn json_tool_call(call: &pb::ToolCall) -> JsonToolCall<'_> {
    JsonToolCall {
        id: &call.id,
        name: &call.name,
        arguments: &call.arguments,
    }
}

fn json_struct(fields: &prost_types::Struct) -> Value {
    let object: Map<String, Value> = fields
        .fields
        .iter()
        .map(|(name, value)| (name.clone(), json_value(value)))
        .collect();
    Value::Object(object)
}

fn json_value(value: &prost_types::Value) -> Value {
    /// Below this, a double holds every whole number exactly.
    const EXACT_BELOW: f64 = 9_007_199_254_740_992.0;
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        // A Struct knows only doubles; whole ones were most likely whole numbers.
        Some(Kind::NumberValue(number)) if number.fract() == 0.0 && number.abs() < EXACT_BELOW => {
            Value::from(*number as i64)
        }
        Some(Kind::NumberValue(number)) => Value::from(*number),
        Some(Kind::StringValue(text)) => Value::from(text.as_str()),
        Some(Kind::BoolValue(value)) => Value::from(*value),
        Some(Kind::StructValue(fields)) => json_struct(fields),
        Some(Kind::ListValue(list)) => list.values.iter().map(json_value).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(message: &Message) -> String {
        let mut out = Vec::new();
        write_message(&mut out, message, Style::PLAIN).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn json(message: &Message) -> String {
        let mut out = Vec::new();
        write_json(&mut out, message).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn value(kind: Kind) -> prost_types::Value {
        prost_types::Value { kind: Some(kind) }
    }

    /// A message with every field set.
    fn full() -> Message {
        let part = |part| pb::ContentPart { part: Some(part) };
        let numbers = [0.5, 3.0, 1e300, f64::NAN].map(|number| value(Kind::NumberValue(number)));
        let list = prost_types::ListValue {
            values: numbers.to_vec(),
        };
        let fields = [
            ("list".to_owned(), value(Kind::ListValue(list))),
            ("null".to_owned(), value(Kind::NullValue(0))),
            ("yes".to_owned(), value(Kind::BoolValue(true))),
        ];
        Message {
            sequence: 7,
            id: "cm_1".into(),
            role: Role::Assistant.into(),
            role_name: "narrator".into(),
            content: "see".into(),
            parts: vec![
                part(Part::Text("see".into())),
                part(Part::ImageUrl(pb::ImageUrl {
                    url: "https://example.com/cat.png".into(),
                    detail: "low".into(),
                })),
                part(Part::InlineData(pb::InlineData {
                    media_type: "image/png".into(),
                    data: vec![1, 2, 3].into(),
                })),
                part(Part::Json(r#"{"type":"x"}"#.into())),
            ],
            tool_calls: vec![pb::ToolCall {
                id: "c1".into(),
                name: "add".into(),
                arguments: r#"{"a":1}"#.into(),
            }],
            tool_call_id: "c0".into(),
            name: "bob".into(),
            usage: Some(pb::Usage {
                input_tokens: 1,
                output_tokens: 2,
                total_tokens: 3,
            }),
            create_time: Some(Timestamp {
                seconds: 1_763_910_000,
                nanos: 123_000_000,
            }),
            interrupted: true,
            reasoning: "hm".into(),
            metadata: Some(prost_types::Struct {
                fields: fields.into(),
            }),
            turn_id: "t1".into(),
            raw: "{}".into(),
            problem: Problem::TooLarge.into(),
            raw_size: 2,
        }
    }

    #[test]
    fn a_message_is_shown_with_all_that_a_reader_needs() {
        assert_eq!(
            shown(&full()),
            "#7 assistant  bob  c0  2025-11-23 15:00:00 UTC  [interrupted]\n\
             [too large for a page: 2 bytes are stored; contents are left out]\n\
             [reasoning] hm\n\
             see\n\
             [image https://example.com/cat.png]\n\
             [image/png, 3 bytes]\n\
             [{\"type\":\"x\"}]\n\
             [calls the tool add with {\"a\":1}; c1]\n\n"
        );
    }

    #[test]
    fn no_field_of_a_message_can_command_the_terminal() {
        let evil = || "\x1b]0;x\x07\u{9b}2J\r".to_owned();
        let mut message = full();
        message.role = Role::Other.into();
        for field in [
            &mut message.role_name,
            &mut message.content,
            &mut message.name,
            &mut message.tool_call_id,
            &mut message.reasoning,
            &mut message.id,
            &mut message.turn_id,
        ] {
            *field = evil();
        }
        message.tool_calls = vec![pb::ToolCall {
            id: evil(),
            name: evil(),
            arguments: evil(),
        }];
        let parts = [
            Part::Text(evil()),
            Part::Json(evil()),
            Part::ImageUrl(pb::ImageUrl {
                url: evil(),
                detail: evil(),
            }),
            Part::InlineData(pb::InlineData {
                media_type: evil(),
                data: bytes::Bytes::new(),
            }),
        ];
        let parts = parts.map(|part| pb::ContentPart { part: Some(part) });
        message.parts = parts.into();
        let without_parts = Message {
            parts: Vec::new(),
            ..message.clone()
        };
        for text in [
            shown(&message),
            shown(&without_parts),
            json(&message),
            json(&without_parts),
        ] {
            let control = text.chars().find(|c| c.is_control() && *c != '\n');
            assert_eq!(control, None, "{text:?}");
        }
    }

    #[test]
    fn json_has_every_field_under_its_name_in_the_proto() {
        let expected = concat!(
            r#"{"sequence":7,"id":"cm_1","role":"ROLE_ASSISTANT","role_name":"narrator","#,
            r#""content":"see","parts":[{"text":"see"},"#,
            r#"{"image_url":{"url":"https://example.com/cat.png","detail":"low"}},"#,
            r#"{"inline_data":{"media_type":"image/png","data":"AQID"}},"#,
            r#"{"json":"{\"type\":\"x\"}"}],"#,
            r#""tool_calls":[{"id":"c1","name":"add","arguments":"{\"a\":1}"}],"#,
            r#""tool_call_id":"c0","name":"bob","#,
            r#""usage":{"input_tokens":1,"output_tokens":2,"total_tokens":3},"#,
            r#""create_time":"2025-11-23T15:00:00.123Z","interrupted":true,"reasoning":"hm","#,
            r#""metadata":{"list":[0.5,3,1e+300,null],"null":null,"yes":true},"turn_id":"t1","#,
            r#""raw":"e30=","problem":"PROBLEM_TOO_LARGE","raw_size":2}"#,
            "\n"
        );
        assert_eq!(json(&full()), expected);
    }

    #[test]
    fn json_has_every_field_also_where_nothing_is_set() {
        let json: Value = serde_json::from_str(&json(&Message::default())).unwrap();
        let fields = json.as_object().expect("an object");
        assert_eq!(fields.len(), 18);
        assert_eq!(fields["create_time"], Value::Null);
        assert_eq!(fields["raw"], Value::Null);
        assert_eq!(fields["tool_calls"], Value::Array(Vec::new()));
    }

    #[test]
    fn json_keeps_control_characters_as_escapes() {
        let text = "\x1b\u{9b}\u{7f}é";
        let message = Message {
            content: text.into(),
            ..Message::default()
        };
        let line = json(&message);
        assert!(line.contains(r"\u001b\u009b\u007fé"), "{line}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["content"], text);
    }

    #[test]
    fn an_enum_value_of_a_newer_server_is_given_as_its_number() {
        let message = Message {
            role: 99,
            ..Message::default()
        };
        assert!(json(&message).contains(r#""role":99"#));
        assert!(shown(&message).starts_with("#0 ?"));
    }

    #[test]
    fn long_addresses_and_json_are_shortened() {
        let url = format!("data:image/png;base64,{}", "A".repeat(10_000));
        let part = Part::ImageUrl(pb::ImageUrl {
            url,
            detail: String::new(),
        });
        let message = Message {
            parts: vec![pb::ContentPart { part: Some(part) }],
            ..Message::default()
        };
        let shown = shown(&message);
        assert!(shown.len() < 300, "{shown}");
        assert!(shown.contains("…]"));
    }
}
