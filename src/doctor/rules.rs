//! What LangChain can read: `messages_from_dict` of langchain-core 1 after Python's `json.loads`.
//! Does no I/O; its reasons never quote what they are about.
//!
//! A parser of its own, since Python's reads more than JSON (`NaN`, lone surrogates, duplicate keys)
//! and less (whole numbers of more than 4,300 digits, nesting beyond about 1,000).

use std::collections::HashMap;

/// Levels of nesting that Python reads for certain.
const DEPTH_MAX: usize = 990;
/// Digits of a whole number that Python reads.
const DIGITS_MAX: usize = 4300;

/// Why LangChain would fail on a stored element; `Ok` if it reads it.
pub fn check(element: &[u8]) -> Result<(), String> {
    let text = std::str::from_utf8(element).map_err(|_| "is not UTF-8")?;
    let mut parser = Parser { text, at: 0 };
    let value = parser
        .document()
        .map_err(|reason| format!("is not JSON to Python: {reason}"))?;
    message(&value).map_err(str::to_owned)
}

type Fields = HashMap<String, Value>;

enum Value {
    Null,
    Bool(bool),
    Number {
        /// Whether it is a whole number to Python's checks, as 3 and 3.0 are.
        is_whole: bool,
        is_zero: bool,
    },
    Text(String),
    List(Vec<Value>),
    Object(Fields),
}

impl Value {
    fn is_text(&self, expected: &str) -> bool {
        matches!(self, Self::Text(text) if text == expected)
    }
}

type Check = Result<(), &'static str>;

fn message(value: &Value) -> Check {
    let Value::Object(fields) = value else {
        return Err("is no object");
    };
    let Some(kind) = fields.get("type") else {
        return Err("has no `type`");
    };
    let Value::Text(kind) = kind else {
        return Err("has a `type` that is no text");
    };
    let base = match kind.as_str() {
        "human" | "HumanMessageChunk" => "human",
        "ai" | "AIMessageChunk" => "ai",
        "system" | "SystemMessageChunk" => "system",
        "chat" | "ChatMessageChunk" => "chat",
        "function" | "FunctionMessageChunk" => "function",
        "tool" | "ToolMessageChunk" => "tool",
        "remove" => "remove",
        _ => return Err("has a `type` that LangChain does not know"),
    };
    let Some(data) = fields.get("data") else {
        return Err("has no `data`");
    };
    let Value::Object(data) = data else {
        return Err("has a `data` that is no object");
    };
    if data.contains_key("self") {
        return Err("has a `data` field named `self`");
    }
    if data.get("type").is_some_and(|own| !own.is_text(kind)) {
        return Err("has a `data.type` that is not its `type`");
    }
    if base == "remove" {
        removal(data)?;
    } else {
        content(data, base)?;
    }
    for (name, reason) in [
        (
            "additional_kwargs",
            "has `additional_kwargs` that are no object",
        ),
        (
            "response_metadata",
            "has a `response_metadata` that is no object",
        ),
    ] {
        if data
            .get(name)
            .is_some_and(|value| !matches!(value, Value::Object(_)))
        {
            return Err(reason);
        }
    }
    names(data)?;
    match base {
        "ai" => {
            answer(data)?;
            chunk(data, kind == "AIMessageChunk")
        }
        "chat" if !matches!(data.get("role"), Some(Value::Text(_))) => {
            Err("is of the type `chat` and has no `role`")
        }
        "function" if !matches!(data.get("name"), Some(Value::Text(_))) => {
            Err("is of the type `function` and has no `name`")
        }
        "tool" => tool(data),
        _ => Ok(()),
    }
}

fn removal(data: &Fields) -> Check {
    match data.get("id") {
        Some(Value::Text(_) | Value::Number { .. } | Value::Null) => {}
        _ => return Err("is of the type `remove` and has no `id`"),
    }
    let is_empty = match data.get("content") {
        None | Some(Value::Null) => true,
        Some(Value::Text(text)) => text.is_empty(),
        Some(Value::List(items)) => items.is_empty(),
        Some(Value::Object(fields)) => fields.is_empty(),
        Some(Value::Bool(value)) => !value,
        Some(Value::Number { is_zero, .. }) => *is_zero,
    };
    if is_empty {
        Ok(())
    } else {
        Err("is of the type `remove` and has content")
    }
}

fn content(data: &Fields, base: &str) -> Check {
    // Where there are blocks, they are the content.
    let blocks = data.get("content_blocks");
    let blocks = blocks.filter(|blocks| matches!(blocks, Value::List(_)));
    match blocks.or_else(|| data.get("content")) {
        // LangChain makes text of whatever a tool gave.
        _ if base == "tool" => Ok(()),
        None => Err("has no `content`"),
        Some(Value::Text(_)) => Ok(()),
        Some(Value::List(items)) => {
            let is_block = |item: &Value| matches!(item, Value::Text(_) | Value::Object(_));
            if items.iter().all(is_block) {
                Ok(())
            } else {
                Err("has a `content` with items that are neither text nor objects")
            }
        }
        Some(_) => Err("has a `content` that is neither text nor a list"),
    }
}

fn names(data: &Fields) -> Check {
    if !matches!(data.get("name"), None | Some(Value::Null | Value::Text(_))) {
        return Err("has a `name` that is no text");
    }
    // A number is made a text.
    if !matches!(
        data.get("id"),
        None | Some(Value::Null | Value::Text(_) | Value::Number { .. })
    ) {
        return Err("has an `id` that is no text");
    }
    Ok(())
}

fn tool(data: &Fields) -> Check {
    match data.get("tool_call_id") {
        Some(Value::Text(_) | Value::Number { .. } | Value::Bool(_)) => {}
        Some(_) => return Err("has a `tool_call_id` that is no text"),
        None => return Err("is of the type `tool` and has no `tool_call_id`"),
    }
    match data.get("status") {
        None => Ok(()),
        Some(status) if status.is_text("success") || status.is_text("error") => Ok(()),
        Some(_) => Err("has a `status` that is neither `success` nor `error`"),
    }
}

fn answer(data: &Fields) -> Check {
    let list = |name: &str| match data.get(name) {
        None => Some(&[] as &[Value]),
        Some(Value::List(items)) => Some(items.as_slice()),
        Some(_) => None,
    };
    for call in list("tool_calls").ok_or("has `tool_calls` that are no list")? {
        let Value::Object(call) = call else {
            return Err("has a tool call that is no object");
        };
        if !matches!(call.get("name"), Some(Value::Text(_))) {
            return Err("has a tool call without a name");
        }
        if !matches!(call.get("args"), Some(Value::Object(_))) {
            return Err("has a tool call whose `args` are no object");
        }
        if !matches!(call.get("id"), Some(Value::Text(_) | Value::Null)) {
            return Err("has a tool call without an `id`");
        }
        only(
            call,
            &["name", "args", "id", "type", "extras"],
            "has a tool call with another field",
        )?;
    }
    let invalid = list("invalid_tool_calls").ok_or("has `invalid_tool_calls` that are no list")?;
    for call in invalid {
        let Value::Object(call) = call else {
            return Err("has an invalid tool call that is no object");
        };
        for name in ["name", "args", "id", "error"] {
            if !matches!(call.get(name), None | Some(Value::Null | Value::Text(_))) {
                return Err("has an invalid tool call with a field that is no text");
            }
        }
        only(
            call,
            &["name", "args", "id", "error", "type"],
            "has an invalid tool call with another field",
        )?;
    }
    usage(data.get("usage_metadata"))
}

fn only(fields: &Fields, names: &[&str], reason: &'static str) -> Check {
    if fields.keys().all(|name| names.contains(&name.as_str())) {
        Ok(())
    } else {
        Err(reason)
    }
}

fn usage(usage: Option<&Value>) -> Check {
    let usage = match usage {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(usage)) => usage,
        Some(_) => return Err("has a `usage_metadata` that is no object"),
    };
    for name in ["input_tokens", "output_tokens", "total_tokens"] {
        match usage.get(name) {
            None => return Err("has a `usage_metadata` in part"),
            Some(number) if is_whole(number) => {}
            Some(_) => return Err("has a `usage_metadata` whose numbers are not whole"),
        }
    }
    for name in ["input_token_details", "output_token_details"] {
        let details = match usage.get(name) {
            None => continue,
            Some(Value::Object(details)) => details,
            Some(_) => return Err("has a `usage_metadata` whose details are no object"),
        };
        let known: &[&str] = match name {
            "input_token_details" => &["audio", "cache_creation", "cache_read"],
            _ => &["audio", "reasoning"],
        };
        if !known
            .iter()
            .all(|name| details.get(*name).is_none_or(is_whole))
        {
            return Err("has a `usage_metadata` whose details are not whole");
        }
    }
    Ok(())
}

/// What pydantic takes for a whole number.
fn is_whole(value: &Value) -> bool {
    match value {
        Value::Number { is_whole, .. } => *is_whole,
        Value::Bool(_) => true,
        Value::Text(text) => text.trim().parse::<i64>().is_ok(),
        _ => false,
    }
}

/// What the pieces of a streamed answer have.
fn chunk(data: &Fields, is_chunk: bool) -> Check {
    match data.get("chunk_position") {
        _ if !is_chunk => {}
        None | Some(Value::Null) => {}
        Some(position) if position.is_text("last") => {}
        Some(_) => return Err("has a `chunk_position` other than `last`"),
    }
    let chunks = match data.get("tool_call_chunks") {
        None => return Ok(()),
        Some(Value::List(chunks)) => chunks,
        Some(_) => return Err("has `tool_call_chunks` that are no list"),
    };
    for chunk in chunks {
        let Value::Object(chunk) = chunk else {
            return Err("has a piece of a tool call that is no object");
        };
        for name in ["name", "args", "id"] {
            if !matches!(chunk.get(name), None | Some(Value::Null | Value::Text(_))) {
                return Err("has a piece of a tool call with a field that is no text");
            }
        }
        if !matches!(chunk.get("index"), None | Some(Value::Null))
            && !chunk.get("index").is_some_and(is_whole)
        {
            return Err("has a piece of a tool call whose `index` is no number");
        }
        only(
            chunk,
            &["name", "args", "id", "index", "type"],
            "has a piece of a tool call with another field",
        )?;
    }
    Ok(())
}

/// Reads what Python's `json.loads` reads.
struct Parser<'a> {
    text: &'a str,
    at: usize,
}

type Parsed<T> = Result<T, &'static str>;

impl Parser<'_> {
    fn document(&mut self) -> Parsed<Value> {
        let value = self.value(0)?;
        self.space();
        if self.at == self.text.len() {
            Ok(value)
        } else {
            Err("there is something behind it")
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn takes(&mut self, word: &str) -> bool {
        let is_next = self.text.as_bytes()[self.at..].starts_with(word.as_bytes());
        if is_next {
            self.at += word.len();
        }
        is_next
    }

    fn value(&mut self, depth: usize) -> Parsed<Value> {
        if depth > DEPTH_MAX {
            return Err("it is nested too deeply");
        }
        self.space();
        match self.peek() {
            None => Err("it ends too early"),
            Some(b'"') => Ok(Value::Text(self.string()?)),
            Some(b'{') => self.object(depth),
            Some(b'[') => self.list(depth),
            Some(_) if self.takes("null") => Ok(Value::Null),
            Some(_) if self.takes("true") => Ok(Value::Bool(true)),
            Some(_) if self.takes("false") => Ok(Value::Bool(false)),
            Some(_) if self.takes("NaN") || self.takes("Infinity") || self.takes("-Infinity") => {
                Ok(Value::Number {
                    is_whole: false,
                    is_zero: false,
                })
            }
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => Err("a value was expected"),
        }
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Parsed<Value> {
        let start = self.at;
        self.takes("-");
        if self.takes("0") {
            // A digit behind it does not belong to the number, and fails as what follows.
        } else {
            match self.digits() {
                0 => return Err("a number was expected"),
                digits if digits > DIGITS_MAX => self.is_float_ahead()?,
                _ => {}
            }
        }
        let is_integer = !self.is_float();
        if self.peek() == Some(b'.') {
            let dot = self.at;
            self.at += 1;
            if self.digits() == 0 {
                self.at = dot;
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            let exponent = self.at;
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                self.at = exponent;
            }
        }
        let number = self.text[start..self.at].parse::<f64>();
        let number = number.unwrap_or(f64::NAN);
        // Beyond this, pydantic takes no float for a whole number.
        let is_small = number.abs() < 9.2e18;
        Ok(Value::Number {
            is_whole: is_integer || is_small && number.fract() == 0.0,
            is_zero: number == 0.0,
        })
    }

    fn is_float(&self) -> bool {
        matches!(self.peek(), Some(b'.' | b'e' | b'E'))
    }

    /// A float may have any number of digits.
    fn is_float_ahead(&self) -> Parsed<()> {
        if self.is_float() {
            Ok(())
        } else {
            Err("a whole number has more than 4,300 digits")
        }
    }

    fn string(&mut self) -> Parsed<String> {
        self.at += 1;
        let mut string = String::new();
        loop {
            let rest = &self.text[self.at..];
            let end = rest.find(|c| c == '"' || c == '\\' || c < ' ');
            let Some(end) = end else {
                return Err("a string does not end");
            };
            string.push_str(&rest[..end]);
            self.at += end + 1;
            match rest.as_bytes()[end] {
                b'"' => return Ok(string),
                b'\\' => string.push(self.escape()?),
                _ => return Err("a string holds a control character"),
            }
        }
    }

    fn escape(&mut self) -> Parsed<char> {
        let byte = self.peek().ok_or("a string does not end")?;
        self.at += 1;
        Ok(match byte {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let digits = self.text.as_bytes().get(self.at..self.at + 4);
                let digits = digits.ok_or("a string does not end")?;
                if !digits.iter().all(u8::is_ascii_hexdigit) {
                    return Err("a string holds an invalid escape");
                }
                let digits = std::str::from_utf8(digits).unwrap_or_default();
                self.at += 4;
                // Halves of pairs are no characters here. No name or word that counts has any.
                let code = u32::from_str_radix(digits, 16).unwrap_or_default();
                char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            _ => return Err("a string holds an invalid escape"),
        })
    }

    fn list(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.takes("]") {
            return Ok(Value::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            if self.takes("]") {
                return Ok(Value::List(items));
            }
            if !self.takes(",") {
                return Err("a list does not end");
            }
        }
    }

    fn object(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let mut fields = Fields::new();
        self.space();
        if self.takes("}") {
            return Ok(Value::Object(fields));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err("a name was expected");
            }
            let name = self.string()?;
            self.space();
            if !self.takes(":") {
                return Err("a colon was expected");
            }
            // Of fields with one name, the last one counts.
            fields.insert(name, self.value(depth + 1)?);
            self.space();
            if self.takes("}") {
                return Ok(Value::Object(fields));
            }
            if !self.takes(",") {
                return Err("an object does not end");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts, and whether `messages_from_dict([json.loads(text)])` of langchain-core 1 read them.
    const MEASURED: &str = include_str!("../../tests/data/langchain_reads.json");

    #[test]
    fn the_verdict_is_that_of_the_real_langchain() {
        let measured: Vec<(String, bool)> = serde_json::from_str(MEASURED).unwrap();
        let wrong: Vec<_> = measured
            .iter()
            .filter(|(text, is_read)| check(text.as_bytes()).is_ok() != *is_read)
            .map(|(text, is_read)| (text, is_read, check(text.as_bytes())))
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    fn with_extra(extra: &str) -> Vec<u8> {
        format!(r#"{{"type":"human","data":{{"content":"x","extra":{extra}}}}}"#).into_bytes()
    }

    #[test]
    fn pythons_own_limits_hold() {
        assert!(check(&with_extra(&"9".repeat(4300))).is_ok());
        assert!(check(&with_extra(&"9".repeat(4301))).is_err());
        assert!(check(&with_extra(&format!("{}.0", "9".repeat(4301)))).is_ok());
        let nested = |depth| with_extra(&format!("{}{}", "[".repeat(depth), "]".repeat(depth)));
        assert!(check(&nested(900)).is_ok());
        assert!(check(&nested(5_000)).is_err());
        assert!(check(&nested(1_000_000)).is_err());
        assert!(check(b"{\"type\":\"human\",\"data\":{\"content\":\"\xff\"}}").is_err());
    }

    #[test]
    fn a_reason_never_quotes_the_message() {
        for text in [
            r#"{"type":"secret"}"#,
            r#"{"type":"human","data":{"content":"x","name":["secret"]}}"#,
            "secret",
            r#"{"secret":"#,
        ] {
            let reason = check(text.as_bytes()).unwrap_err();
            assert!(!reason.contains("secret"), "{reason}");
        }
    }
}
