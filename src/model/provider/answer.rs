//! What `genai` streams as [`Pieces`].
//!
//! A known gap: `genai` loses the first event of a stream that begins with a byte-order mark. With
//! OpenAI's protocol that event is the role only; no provider is known to send such a mark.

use std::pin::Pin;
use std::task::{Context as Polling, Poll, ready};

use futures_util::{Stream, StreamExt as _};
use genai::adapter::AdapterKind;
use genai::chat::{self, ChatStream, ChatStreamEvent, StopReason, StreamEnd};
use serde_json::Value;
use tracing::Dispatch;
use tracing::dispatcher::with_default;

use super::failure::{self, Context};
use crate::message::{Json, ToolCall, Usage};
use crate::model::{End, Error, FinishReason, Piece, Pieces, Result, ToolCallPiece};

/// The answer in pieces. Dropping them drops the request.
pub(super) fn pieces(events: ChatStream, context: Context) -> Pieces {
    Answer {
        events: Some(events),
        calls: Calls::default(),
        context,
    }
    .boxed()
}

struct Answer {
    /// `None` after the end and after an error: nothing may follow them, though `genai` would go
    /// on after a malformed event.
    events: Option<ChatStream>,
    calls: Calls,
    context: Context,
}

impl Stream for Answer {
    type Item = Result<Piece>;

    fn poll_next(self: Pin<&mut Self>, polling: &mut Polling<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let Some(events) = &mut this.events else {
                return Poll::Ready(None);
            };
            // `genai` logs what it cannot read, and what the provider says of errors; both can
            // hold text of the conversation. So it has no log.
            let event = with_default(&Dispatch::none(), || events.poll_next_unpin(polling));
            let piece = match ready!(event) {
                Some(Ok(event)) => this.piece(event).transpose(),
                Some(Err(error)) => Some(Err(failure::in_stream(error, &this.context))),
                None => Some(Err(Error::Broken(
                    "it stopped before the answer was complete".to_owned(),
                ))),
            };
            let Some(piece) = piece else {
                continue;
            };
            if matches!(piece, Ok(Piece::End(_)) | Err(_)) {
                this.events = None;
            }
            return Poll::Ready(Some(piece));
        }
    }
}

impl Answer {
    /// The piece that an event is, if any.
    fn piece(&mut self, event: ChatStreamEvent) -> Result<Option<Piece>> {
        let text = |text: String| (!text.is_empty()).then_some(text);
        Ok(match event {
            ChatStreamEvent::Chunk(chunk) => text(chunk.content).map(Piece::Text),
            ChatStreamEvent::ReasoningChunk(chunk) => text(chunk.content).map(Piece::Reasoning),
            ChatStreamEvent::ToolCallChunk(chunk) => {
                let piece = if self.context.sends_increments() {
                    self.calls.add_increment(chunk.tool_call)
                } else {
                    self.calls.add_repetition(chunk.tool_call)
                };
                piece.map(Piece::ToolCall)
            }
            ChatStreamEvent::End(end) => Some(Piece::End(self.end(end)?)),
            ChatStreamEvent::Start
            | ChatStreamEvent::ThoughtSignatureChunk(_)
            | ChatStreamEvent::Heartbeat => None,
        })
    }

    fn end(&mut self, end: StreamEnd) -> Result<End> {
        let reason = end.captured_stop_reason.as_ref();
        // In OpenAI's protocol, there is an end only if the provider says `[DONE]`. Elsewhere,
        // `genai` makes one up if the connection just ends.
        if reason.is_none() && self.context.kind != AdapterKind::OpenAI {
            return Err(Error::Broken(
                "it stopped before the answer was complete".to_owned(),
            ));
        }
        let mut finish_reason = match reason {
            None => FinishReason::Unspecified,
            Some(StopReason::Completed(_) | StopReason::StopSequence(_)) => FinishReason::Stop,
            Some(StopReason::MaxTokens(_)) => FinishReason::Length,
            Some(StopReason::ToolCall(_)) => FinishReason::ToolCalls,
            Some(StopReason::ContentFilter(_)) => FinishReason::ContentFilter,
            Some(StopReason::Other(_)) => FinishReason::Other,
        };
        let usage = end.captured_usage.as_ref().and_then(usage);
        let captured = end.captured_into_tool_calls().unwrap_or_default();
        let calls = std::mem::take(&mut self.calls);
        let tool_calls = calls.finish(captured, finish_reason == FinishReason::Length)?;
        // Gemini, Ollama and OpenAI's newer protocol stop, they say, when they call tools.
        if finish_reason == FinishReason::Stop && !tool_calls.is_empty() {
            finish_reason = FinishReason::ToolCalls;
        }
        Ok(End {
            finish_reason,
            usage,
            tool_calls,
        })
    }
}

/// What the provider counted; `None` if it counted nothing.
fn usage(usage: &chat::Usage) -> Option<Usage> {
    let (input, output, total) = (
        usage.prompt_tokens.map(i64::from),
        usage.completion_tokens.map(i64::from),
        usage.total_tokens.map(i64::from),
    );
    input.or(output).or(total)?;
    let (input_tokens, output_tokens) = (input.unwrap_or(0), output.unwrap_or(0));
    Some(Usage {
        input_tokens,
        output_tokens,
        total_tokens: total.unwrap_or(input_tokens + output_tokens),
    })
}

/// The tool calls of an answer, as far as they have come.
#[derive(Debug, Default)]
struct Calls {
    calls: Vec<Call>,
    /// The index that the provider gives to the first call. Some count from 1.
    first_index: usize,
}

#[derive(Debug)]
struct Call {
    id: String,
    name: String,
    arguments: String,
}

impl Call {
    fn is_whole(&self) -> bool {
        serde_json::from_str::<serde::de::IgnoredAny>(&self.arguments).is_ok()
    }
}

impl Calls {
    /// Adds a piece that holds only what is new: OpenAI's protocol.
    ///
    /// The provider says which call it belongs to by an index, which `genai` does not pass on but
    /// for pieces without an id: those get the id `call_<index>`. So a piece with a name begins a
    /// call, unless that call is known; others are joined by the id, by the index, or else to
    /// the last call. (Some providers give every call the index 0, each whole in one piece.)
    fn add_increment(&mut self, piece: chat::ToolCall) -> Option<ToolCallPiece> {
        let arguments = text(piece.fn_arguments);
        match self.place(&piece.call_id, &piece.fn_name, &arguments) {
            Some(index) => {
                self.calls[index].arguments.push_str(&arguments);
                (!arguments.is_empty()).then_some(ToolCallPiece {
                    index,
                    id: None,
                    name: None,
                    arguments,
                })
            }
            None => Some(self.begin(piece.call_id, piece.fn_name, arguments)),
        }
    }

    /// Which known call a piece of OpenAI's protocol belongs to; `None` if it begins one.
    fn place(&mut self, id: &str, name: &str, arguments: &str) -> Option<usize> {
        let last = self.calls.len().checked_sub(1)?;
        let by_id = self
            .calls
            .iter()
            .rposition(|call| !id.is_empty() && call.id == id);
        let index: Option<usize> = id.strip_prefix("call_").and_then(|text| text.parse().ok());
        let by_index = index
            .and_then(|index| index.checked_sub(self.first_index))
            .filter(|place| *place <= last);
        if name.is_empty() {
            if let (None, None, Some(index)) = (by_id, by_index, index) {
                self.first_index = index.saturating_sub(last);
            }
            return Some(by_id.or(by_index).unwrap_or(last));
        }
        // A name again: some providers repeat it in every piece.
        by_id.or(by_index).filter(|place| {
            let call = &self.calls[*place];
            call.name == name && (arguments.is_empty() || !call.is_whole())
        })
    }

    /// Adds a piece that repeats what came before it, or a whole call: all other protocols.
    fn add_repetition(&mut self, piece: chat::ToolCall) -> Option<ToolCallPiece> {
        let grows = piece.fn_arguments.is_string();
        let arguments = text(piece.fn_arguments);
        let known = self.calls.iter().rposition(|call| {
            grows && call.id == piece.call_id && arguments.starts_with(&call.arguments)
        });
        let Some(index) = known else {
            return Some(self.begin(piece.call_id, piece.fn_name, arguments));
        };
        let call = &mut self.calls[index];
        let increment = arguments[call.arguments.len()..].to_owned();
        call.arguments = arguments;
        (!increment.is_empty()).then_some(ToolCallPiece {
            index,
            id: None,
            name: None,
            arguments: increment,
        })
    }

    fn begin(&mut self, id: String, name: String, arguments: String) -> ToolCallPiece {
        let piece = ToolCallPiece {
            index: self.calls.len(),
            id: (!id.is_empty()).then(|| id.clone()),
            name: (!name.is_empty()).then(|| name.clone()),
            arguments: arguments.clone(),
        };
        self.calls.push(Call {
            id,
            name,
            arguments,
        });
        piece
    }

    /// The calls, whole. `captured` is what `genai` has at the end: with some protocols more than
    /// what it streamed. What was streamed is better where it suffices: it is the model's own
    /// text, where the other was parsed and written anew.
    fn finish(self, captured: Vec<chat::ToolCall>, was_cut: bool) -> Result<Vec<ToolCall>> {
        let streamed = self.calls;
        let suffices = captured.len() <= streamed.len() && streamed.iter().all(Call::is_whole);
        let calls = if suffices || captured.is_empty() {
            streamed
        } else {
            let call = |call: chat::ToolCall| Call {
                id: call.call_id,
                name: call.fn_name,
                arguments: text(call.fn_arguments),
            };
            captured.into_iter().map(call).collect()
        };
        calls
            .into_iter()
            .map(|call| {
                let arguments = arguments(&call).ok_or_else(|| {
                    let why = match was_cut {
                        true => "it reached its limit of tokens within",
                        false => "not a JSON object:",
                    };
                    let name = &call.name;
                    Error::Broken(format!("{why} the arguments of the tool call {name:?}"))
                })?;
                Ok(ToolCall {
                    id: call.id,
                    name: call.name,
                    arguments,
                })
            })
            .collect()
    }
}

/// The arguments of a whole call, if they are a JSON object. No arguments at all are the empty
/// one: so some models call tools without parameters.
fn arguments(call: &Call) -> Option<Json> {
    let text = match call.arguments.trim() {
        "" => "{}",
        text => text,
    };
    let json = Json::parse("arguments", text).ok()?;
    (json.is_object() && !call.name.is_empty()).then_some(json)
}

/// Arguments as text. `genai` has them as a text while they come, and parsed when they are whole.
fn text(arguments: Value) -> String {
    match arguments {
        Value::String(text) => text,
        Value::Null => String::new(),
        whole => whole.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(id: &str, name: &str, arguments: &str) -> chat::ToolCall {
        chat::ToolCall {
            call_id: id.to_owned(),
            fn_name: name.to_owned(),
            fn_arguments: Value::String(arguments.to_owned()),
            thought_signatures: None,
        }
    }

    /// Adds the pieces of OpenAI's protocol; says what the calls are in the end.
    fn joined(pieces: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
        let mut calls = Calls::default();
        for (id, name, arguments) in pieces {
            calls.add_increment(piece(id, name, arguments));
        }
        let calls = calls.finish(Vec::new(), false).expect("whole calls");
        let parts = |call: ToolCall| (call.id, call.name, call.arguments.as_str().to_owned());
        calls.into_iter().map(parts).collect()
    }

    fn call(id: &str, name: &str, arguments: &str) -> (String, String, String) {
        (id.to_owned(), name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn interleaved_pieces_are_joined_by_their_index() {
        let pieces = [
            ("a", "add", ""),
            ("b", "sub", ""),
            ("call_0", "", r#"{"x":"#),
            ("call_1", "", r#"{"y":"#),
            ("call_0", "", "1}"),
            ("call_1", "", "2}"),
        ];
        let calls = [
            call("a", "add", r#"{"x":1}"#),
            call("b", "sub", r#"{"y":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
    }

    #[test]
    fn an_index_may_count_from_one() {
        let pieces = [
            ("a", "add", ""),
            ("call_1", "", r#"{"x":1}"#),
            ("b", "add", ""),
            ("call_2", "", r#"{"x":2}"#),
        ];
        let calls = [
            call("a", "add", r#"{"x":1}"#),
            call("b", "add", r#"{"x":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
    }

    #[test]
    fn whole_calls_that_share_an_index_stay_apart() {
        // Without ids: both are `call_0` to `genai`.
        let pieces = [
            ("call_0", "add", r#"{"x":1}"#),
            ("call_0", "add", r#"{"x":2}"#),
        ];
        let calls = [
            call("call_0", "add", r#"{"x":1}"#),
            call("call_0", "add", r#"{"x":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
    }

    #[test]
    fn a_repeated_name_begins_no_new_call() {
        let pieces = [
            ("a", "add", ""),
            ("a", "add", r#"{"x":"#),
            ("call_0", "add", "1"),
            ("", "", "}"),
            ("a", "add", ""),
        ];
        assert_eq!(joined(&pieces), [call("a", "add", r#"{"x":1}"#)]);
    }

    #[test]
    fn a_call_without_arguments_has_an_empty_object() {
        assert_eq!(joined(&[("a", "now", "")]), [call("a", "now", "{}")]);
    }

    #[test]
    fn pieces_that_repeat_what_came_before_give_what_is_new() {
        let mut calls = Calls::default();
        let mut add = |id, arguments| {
            let piece = calls.add_repetition(piece(id, "add", arguments))?;
            Some((piece.index, piece.id, piece.arguments))
        };
        assert_eq!(add("a", ""), Some((0, Some("a".into()), String::new())));
        assert_eq!(add("a", "{"), Some((0, None, "{".into())));
        assert_eq!(add("a", "{"), None);
        assert_eq!(add("a", "{}"), Some((0, None, "}".into())));
        assert_eq!(add("b", "{"), Some((1, Some("b".into()), "{".into())));
    }

    #[test]
    fn a_call_that_was_not_streamed_is_in_the_end() {
        let mut whole = piece("a", "add", "");
        whole.fn_arguments = serde_json::json!({"x": 1});
        let calls = Calls::default().finish(vec![whole], false).expect("whole");
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].arguments.as_str(), r#"{"x":1}"#);
    }

    #[test]
    fn arguments_that_are_no_object_break_the_answer_without_being_repeated() {
        for arguments in ["[1]", "secret", r#"{"secret":"#, "\"secret\""] {
            let mut calls = Calls::default();
            calls.add_increment(piece("a", "add", arguments));
            let error = calls.finish(Vec::new(), false).expect_err("must break");
            let text = error.to_string();
            assert!(matches!(error, Error::Broken(_)), "{text}");
            assert!(
                text.contains("\"add\"") && !text.contains("secret"),
                "{text}"
            );
        }
    }
}
