//! The format of an export: lines of JSON, each an object with one field that says what it is.
//!
//! ```text
//! {"chat_memory_export":{"version":1,"store":"SQLite file /data/chat-memory.db","key_prefix":"message_store:","prefix":""}}
//! {"session":{"id":"foo","expires_at_ms":1763910000123,"ttl_ms":86400000,"title":"A story","metadata":{"user":"ann"}}}
//! {"text":"{\"type\": \"human\", …"}      an element that is UTF-8, oldest first
//! {"base64":"/w=="}                       an element that is not
//! {"end":{"id":"foo","elements":2}}
//! {"checkpoint":{"cursor":"…","sessions":1,"elements":2}}
//! {"complete":{"sessions":1,"elements":2}}
//! ```
//!
//! Of a session, only the id is always there: what is not said of it is left out, and older programs
//! wrote no more than the expiry. A session may come more than once: the walk through a Redis that
//! grows may meet it twice.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io::{self, BufRead, Read as _, Write},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};

use crate::{message::UnixMillis, store::ELEMENT_BYTES_MAX};

/// The version of the format that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// Bytes of a line at most: the largest element, each byte written as `\u00XX`, and what is around.
pub const LINE_BYTES_MAX: usize = 6 * ELEMENT_BYTES_MAX + 1024;

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<'a> {
    ChatMemoryExport(Header),
    Session {
        id: String,
        #[serde(flatten)]
        facts: Facts,
    },
    Text(Cow<'a, str>),
    Base64(Cow<'a, str>),
    /// All elements of the session have been written.
    End {
        id: String,
        elements: u64,
    },
    /// An export that was interrupted can go on from here.
    Checkpoint {
        cursor: String,
        #[serde(flatten)]
        totals: Totals,
    },
    /// The last line of an export that was not interrupted.
    Complete(Totals),
}

/// What was exported from where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    pub store: String,
    pub key_prefix: String,
    /// The one session, if only that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// What the session ids begin with.
    pub prefix: String,
}

/// What is kept of a session besides its elements.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// When it expires, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<UnixMillis>,
    /// How long it lives after a write, if that was said of this session; 0 for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<i64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub title: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// What has been written so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub sessions: u64,
    pub elements: u64,
}

impl<'a> Line<'a> {
    /// The line of an element.
    pub fn of_element(element: &'a [u8]) -> Self {
        match std::str::from_utf8(element) {
            Ok(text) => Self::Text(Cow::Borrowed(text)),
            Err(_) => Self::Base64(Cow::Owned(BASE64.encode(element))),
        }
    }

    /// Writes the line with its end.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        out.write_all(b"\n")
    }

    /// Reads a line.
    pub fn parse(line: &[u8]) -> Result<Line<'static>, String> {
        serde_json::from_slice(line).map_err(|error| {
            // serde quotes what it does not know, which may be text of a message.
            format!("is no line of an export (column {})", error.column())
        })
    }
}

/// The bytes of [`Line::Base64`].
pub fn decode(base64: &str) -> Result<Vec<u8>, String> {
    BASE64
        .decode(base64)
        .map_err(|_| "is no valid base64".to_owned())
}

/// Reads the next line into `line`, with its end if it has one; nothing at the end of the input.
pub fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<()> {
    line.clear();
    input
        .take(LINE_BYTES_MAX as u64 + 1)
        .read_until(b'\n', line)?;
    if line.len() > LINE_BYTES_MAX {
        let reason = format!("a line has more than {LINE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(line: &Line<'_>) -> String {
        let mut out = Vec::new();
        line.write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn any_bytes_come_back_as_they_were() {
        let every_byte: Vec<u8> = (0..=255).collect();
        let elements: [&[u8]; 8] = [
            b"",
            b"\0\x1f\x7f\n\r\"\\",
            br#"{"a": "\ud800", "b": NaN}"#,
            "é 会話 🎉 \u{feff}\u{fffd}\u{2028}\u{85}".as_bytes(),
            b"\xff\xfe",
            b"\xed\xa0\x80",
            &every_byte,
            b"123456789012345678901234567890",
        ];
        for element in elements {
            let line = written(&Line::of_element(element));
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            let bytes = match Line::parse(line.as_bytes()).unwrap() {
                Line::Text(text) => text.as_bytes().to_vec(),
                Line::Base64(text) => decode(&text).unwrap(),
                other => panic!("{other:?}"),
            };
            assert_eq!(bytes, element);
        }
    }

    #[test]
    fn every_kind_of_line_is_read_as_it_was_written() {
        let totals = Totals {
            sessions: 3,
            elements: 4,
        };
        for (line, text) in [
            (
                Line::Session {
                    id: "a\"b".to_owned(),
                    facts: Facts::default(),
                },
                r#"{"session":{"id":"a\"b"}}"#,
            ),
            (
                Line::Session {
                    id: "a".to_owned(),
                    facts: Facts {
                        expires_at_ms: Some(5),
                        ttl_ms: Some(0),
                        title: "t".to_owned(),
                        metadata: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
                    },
                },
                r#"{"session":{"id":"a","expires_at_ms":5,"ttl_ms":0,"title":"t","metadata":{"k":"v"}}}"#,
            ),
            (
                Line::End {
                    id: "a".to_owned(),
                    elements: 2,
                },
                r#"{"end":{"id":"a","elements":2}}"#,
            ),
            (
                Line::Checkpoint {
                    cursor: "x/1".to_owned(),
                    totals,
                },
                r#"{"checkpoint":{"cursor":"x/1","sessions":3,"elements":4}}"#,
            ),
            (
                Line::Complete(totals),
                r#"{"complete":{"sessions":3,"elements":4}}"#,
            ),
        ] {
            assert_eq!(written(&line).trim_end(), text);
            assert_eq!(Line::parse(text.as_bytes()), Ok(line));
        }
    }

    #[test]
    fn an_error_does_not_quote_the_line() {
        for line in [r#"{"secret":1}"#, r#"{"text":["secret"]}"#, "secret", ""] {
            let error = Line::parse(line.as_bytes()).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
