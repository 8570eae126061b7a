//! What happens in a turn, and how it is written down: a chunk of the log is lines of JSON, one an
//! event, after a line with the number of its first event. Does no I/O.

use std::{borrow::Cow, io::Write as _};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    message::{Message, Usage},
    model::{FinishReason, ToolCallPiece},
    store::{Error as StoreError, Sequence},
};

/// What happens in a turn.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Started(Started),
    Delta(Delta),
    /// The turn is stored. Not part of the log: the record says it.
    Completed(Completed),
}

/// An attempt at a turn has begun.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    pub turn_id: String,
    pub model: String,
    pub history_messages: usize,
    /// Their tokens, if they were counted, and by which tokenizer.
    #[serde(default)]
    pub history_tokens: usize,
    #[serde(default)]
    pub tokenizer: Cow<'static, str>,
    /// 1 for the first. What an earlier one said is void.
    pub attempt: u32,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Delta {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallPiece>,
}

impl Delta {
    /// Adds what comes next.
    pub fn join(&mut self, next: Delta) {
        self.text.push_str(&next.text);
        self.reasoning.push_str(&next.reasoning);
        for call in next.tool_calls {
            let known = self
                .tool_calls
                .iter_mut()
                .find(|known| known.index == call.index);
            match known {
                Some(known) => known.arguments.push_str(&call.arguments),
                None => self.tool_calls.push(call),
            }
        }
    }
}

/// A turn is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// The messages as stored, with their sequences.
    pub messages: Vec<(Sequence, Message)>,
    pub usage: Option<Usage>,
    pub finish_reason: FinishReason,
}

/// How a turn completed, as its record says it; where its messages are, the store knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The number of the last event.
    pub event_number: i64,
    pub finish_reason: FinishReason,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A line of the log: an event in as little memory as it takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// Nearly all lines: a piece of text.
    Text(Box<str>),
    Started {
        started: Box<Started>,
    },
    Delta(Box<Delta>),
}

impl Line {
    /// `None` for what is not part of the log.
    pub fn of(event: Event) -> Option<Self> {
        Some(match event {
            Event::Started(started) => Self::Started {
                started: Box::new(started),
            },
            Event::Delta(delta) if delta.reasoning.is_empty() && delta.tool_calls.is_empty() => {
                Self::Text(delta.text.into())
            }
            Event::Delta(delta) => Self::Delta(Box::new(delta)),
            Event::Completed(_) => return None,
        })
    }

    pub fn event(&self) -> Event {
        match self {
            Self::Text(text) => Event::Delta(Delta {
                text: String::from(&**text),
                ..Delta::default()
            }),
            Self::Started { started } => Event::Started((**started).clone()),
            Self::Delta(delta) => Event::Delta((**delta).clone()),
        }
    }
}

/// Makes a chunk of lines.
pub fn write_chunk<'a>(first: i64, lines: impl Iterator<Item = &'a Line>) -> Bytes {
    let mut chunk = Vec::new();
    // Memory takes all that is written, and these types have nothing that JSON cannot say.
    let _ = writeln!(chunk, "{first}");
    for line in lines {
        let _ = serde_json::to_writer(&mut chunk, line);
        chunk.push(b'\n');
    }
    Bytes::from(chunk)
}

/// Reads a chunk: its events with their numbers.
pub fn read_chunk(chunk: &[u8]) -> Result<Vec<(i64, Event)>, Error> {
    let text = std::str::from_utf8(chunk).map_err(|_| corrupt())?;
    let mut lines = text.lines();
    let first = lines.next().and_then(|line| line.parse::<i64>().ok());
    let first = first.ok_or_else(corrupt)?;
    (first..)
        .zip(lines)
        .map(|(number, line)| {
            let line: Line = serde_json::from_str(line).map_err(|_| corrupt())?;
            Ok((number, line.event()))
        })
        .collect()
}

fn corrupt() -> Error {
    StoreError::Corrupt("the log of a turn".to_owned()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Event {
        Event::Delta(Delta {
            text: text.to_owned(),
            ..Delta::default()
        })
    }

    #[test]
    fn a_chunk_is_read_as_it_was_written() {
        let started = Event::Started(Started {
            turn_id: "t".to_owned(),
            model: "m".to_owned(),
            history_messages: 3,
            history_tokens: 4,
            tokenizer: "o200k_base".into(),
            attempt: 2,
        });
        let call = Event::Delta(Delta {
            tool_calls: vec![ToolCallPiece {
                index: 1,
                id: Some("c".to_owned()),
                name: None,
                arguments: "{\n".to_owned(),
            }],
            reasoning: "why".to_owned(),
            ..Delta::default()
        });
        let events = [started, text("a\nb \"\u{2028}🎉"), call, text("")];
        let lines: Vec<_> = events.iter().cloned().filter_map(Line::of).collect();
        let chunk = write_chunk(7, lines.iter());
        let expected: Vec<_> = (7..).zip(events).collect();
        assert_eq!(read_chunk(&chunk).unwrap(), expected);
    }

    #[test]
    fn a_piece_of_text_costs_little_more_than_itself() {
        let line = Line::of(text(" word")).unwrap();
        assert_eq!(serde_json::to_string(&line).unwrap(), "\" word\"");
        assert!(size_of::<Line>() <= 24);
    }

    #[test]
    fn nonsense_is_an_error() {
        for chunk in ["", "x\n", "1\nnonsense\n", "1\n5\n"] {
            assert!(read_chunk(chunk.as_bytes()).is_err(), "{chunk:?}");
        }
    }

    #[test]
    fn pieces_of_one_call_are_joined() {
        let piece = |index, arguments: &str| Delta {
            tool_calls: vec![ToolCallPiece {
                index,
                id: None,
                name: None,
                arguments: arguments.to_owned(),
            }],
            ..Delta::default()
        };
        let mut delta = piece(0, "a");
        delta.join(piece(0, "b"));
        delta.join(piece(1, "c"));
        let arguments: Vec<_> = delta
            .tool_calls
            .iter()
            .map(|c| c.arguments.as_str())
            .collect();
        assert_eq!(arguments, ["ab", "c"]);
    }
}
