//! What `genai` streams as [`Pieces`].
//!
//! A known gap: `genai` loses the first event of a stream that begins with a byte-order mark. With
//! OpenAI's protocol that event is the role only; no provider is known to send such a mark.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Polling, Poll, ready};

use futures_util::{Stream, StreamExt as _};
use genai::adapter::AdapterKind;
use genai::chat::{
    self, ChatFrameSink, ChatStream, ChatStreamEvent, FrameCtx, RawFrameRef, StopReason, StreamEnd,
};
use serde_json::Value;
use tracing::Dispatch;
use tracing::dispatcher::with_default;

use super::failure::{self, Context};
use crate::message::{Json, ToolCall, Usage};
use crate::model::{End, Error, FinishReason, Piece, Pieces, Result, ToolCallPiece};

/// The answer in pieces. Dropping them drops the request.
pub(super) fn pieces(events: ChatStream, increments: Arc<Increments>, context: Context) -> Pieces {
    Answer {
        events: Some(events),
        increments,
        ready: VecDeque::new(),
        calls: Calls::default(),
        context,
    }
    .boxed()
}

struct Answer {
    /// `None` after the end and after an error: nothing may follow them, though `genai` would go
    /// on after a malformed event.
    events: Option<ChatStream>,
    increments: Arc<Increments>,
    /// What comes next.
    ready: VecDeque<Result<Piece>>,
    calls: Calls,
    context: Context,
}

impl Stream for Answer {
    type Item = Result<Piece>;

    fn poll_next(self: Pin<&mut Self>, polling: &mut Polling<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(piece) = this.ready.pop_front() {
                if matches!(piece, Ok(Piece::End(_)) | Err(_)) {
                    this.events = None;
                    this.ready.clear();
                }
                return Poll::Ready(Some(piece));
            }
            let Some(events) = &mut this.events else {
                return Poll::Ready(None);
            };
            // `genai` logs what it cannot read, and what the provider says of errors; both can
            // hold text of the conversation. So it has no log.
            let event = with_default(&Dispatch::none(), || events.poll_next_unpin(polling));
            // They may have come without an event.
            for increment in this.increments.take() {
                let piece = this.calls.add_increment(increment).transpose();
                this.ready
                    .extend(piece.map(|piece| piece.map(Piece::ToolCall)));
            }
            let event = match event {
                Poll::Pending if !this.ready.is_empty() => continue,
                event => ready!(event),
            };
            let piece = match event {
                Some(Ok(event)) => this.piece(event).transpose(),
                Some(Err(error)) => Some(Err(failure::in_stream(error, &this.context))),
                None => Some(Err(Error::Broken(
                    "it stopped before the answer was complete".to_owned(),
                ))),
            };
            this.ready.extend(piece);
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
            // Taken from the stream as it came: see `Increments`.
            ChatStreamEvent::ToolCallChunk(_) if self.context.sends_increments() => None,
            ChatStreamEvent::ToolCallChunk(chunk) => self
                .calls
                .add_repetition(chunk.tool_call)
                .map(Piece::ToolCall),
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
        if finish_reason == FinishReason::ToolCalls && tool_calls.is_empty() {
            let why = "it says that it calls tools, and calls none";
            return Err(Error::Broken(why.to_owned()));
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

/// What a stream of OpenAI's protocol says of tool calls, as it came. `genai` does not pass on the
/// index, which says to which call a piece belongs, and leaves out pieces without one, which
/// Gemini's endpoint of that protocol sends, and proxies for it.
#[derive(Default)]
pub(super) struct Increments(Mutex<Vec<Increment>>);

/// A piece of a tool call that holds only what is new.
#[derive(Debug, Default)]
struct Increment {
    index: Option<u64>,
    id: Option<String>,
    /// Empty if it has none.
    name: String,
    arguments: String,
}

impl ChatFrameSink for Increments {
    fn on_frame(&self, _: &FrameCtx, frame: RawFrameRef<'_>) {
        if !frame.data.contains("tool_calls") {
            return;
        }
        // What is no JSON, `genai` reports.
        let data: Value = serde_json::from_str(frame.data).unwrap_or_default();
        let pieces = data.pointer("/choices/0/delta/tool_calls");
        let pieces = pieces.and_then(Value::as_array).into_iter().flatten();
        let mut increments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        increments.extend(pieces.map(|piece| {
            let id = piece["id"].as_str().filter(|id| !id.is_empty());
            Increment {
                index: piece["index"].as_u64(),
                id: id.map(str::to_owned),
                name: text(piece["function"]["name"].clone()),
                arguments: text(piece["function"]["arguments"].clone()),
            }
        }));
    }
}

impl Increments {
    /// What has come since the last time.
    fn take(&self) -> Vec<Increment> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The tool calls of an answer, as far as they have come.
#[derive(Debug, Default)]
struct Calls {
    calls: Vec<Call>,
}

#[derive(Debug)]
struct Call {
    /// The provider's number for it. Some count from 1, some give all the same or none.
    index: Option<u64>,
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
    /// Adds a piece that holds only what is new: OpenAI's protocol. One with a name begins a call,
    /// unless it goes on with one.
    fn add_increment(&mut self, piece: Increment) -> Result<Option<ToolCallPiece>> {
        if let Some(index) = self.place(&piece) {
            let arguments = piece.arguments;
            self.calls[index].arguments.push_str(&arguments);
            return Ok((!arguments.is_empty()).then_some(ToolCallPiece {
                index,
                id: None,
                name: None,
                arguments,
            }));
        }
        if !piece.name.is_empty() {
            // Its result must name it.
            let id = piece
                .id
                .unwrap_or_else(|| format!("call_{}", self.calls.len()));
            return Ok(Some(self.begin(
                piece.index,
                id,
                piece.name,
                piece.arguments,
            )));
        }
        match piece.arguments.is_empty() {
            true => Ok(None),
            false => Err(Error::Broken(
                "a piece of a tool call belongs to none that has begun".to_owned(),
            )),
        }
    }

    /// Which known call a piece of OpenAI's protocol belongs to: by its id, else by its index; with
    /// neither, to the last.
    fn place(&self, piece: &Increment) -> Option<usize> {
        let is_near = |call: &Call| piece.index.is_none() || call.index == piece.index;
        let by_id = piece.id.as_ref().and_then(|id| {
            let is_it = |call: &Call| call.id == *id && is_near(call);
            self.calls.iter().rposition(is_it)
        });
        // Some providers give every piece an id of its own.
        let goes_by_index = match piece.name.is_empty() {
            true => piece.id.is_none() || piece.index.is_some(),
            false => piece.id.is_none(),
        };
        let by_index = || self.calls.iter().rposition(is_near);
        let place = by_id.or_else(|| by_index().filter(|_| goes_by_index))?;
        // Some repeat the name in every piece; some give all calls one index, each whole in a piece.
        let call = &self.calls[place];
        let goes_on = piece.name.is_empty()
            || piece.name == call.name && (piece.arguments.is_empty() || !call.is_whole());
        goes_on.then_some(place)
    }

    /// Adds a piece that repeats what came before it, or a whole call: all other protocols.
    fn add_repetition(&mut self, piece: chat::ToolCall) -> Option<ToolCallPiece> {
        let grows = piece.fn_arguments.is_string();
        let arguments = text(piece.fn_arguments);
        let known = self.calls.iter().rposition(|call| {
            grows && call.id == piece.call_id && arguments.starts_with(&call.arguments)
        });
        let Some(index) = known else {
            return Some(self.begin(None, piece.call_id, piece.fn_name, arguments));
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

    fn begin(
        &mut self,
        index: Option<u64>,
        id: String,
        name: String,
        arguments: String,
    ) -> ToolCallPiece {
        let piece = ToolCallPiece {
            index: self.calls.len(),
            id: (!id.is_empty()).then(|| id.clone()),
            name: (!name.is_empty()).then(|| name.clone()),
            arguments: arguments.clone(),
        };
        self.calls.push(Call {
            index,
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
                index: None,
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

    fn increment(index: Option<u64>, id: &str, name: &str, arguments: &str) -> Increment {
        Increment {
            index,
            id: (!id.is_empty()).then(|| id.to_owned()),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    /// Adds the pieces of OpenAI's protocol; says what the calls are in the end.
    fn joined(pieces: &[(Option<u64>, &str, &str, &str)]) -> Vec<(String, String, String)> {
        let mut calls = Calls::default();
        for (index, id, name, arguments) in pieces {
            let added = calls.add_increment(increment(*index, id, name, arguments));
            added.expect("a call for the piece");
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
            (Some(0), "a", "add", ""),
            (Some(1), "b", "sub", ""),
            (Some(0), "", "", r#"{"x":"#),
            (Some(1), "", "", r#"{"y":"#),
            (Some(0), "", "", "1}"),
            (Some(1), "", "", "2}"),
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
            (Some(1), "a", "add", ""),
            (Some(1), "", "", r#"{"x":1}"#),
            (Some(2), "b", "add", ""),
            (Some(2), "", "", r#"{"x":2}"#),
        ];
        let calls = [
            call("a", "add", r#"{"x":1}"#),
            call("b", "add", r#"{"x":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
    }

    #[test]
    fn calls_that_share_an_index_stay_apart() {
        // Whole, without ids.
        let pieces = [
            (Some(0), "", "add", r#"{"x":1}"#),
            (Some(0), "", "add", r#"{"x":2}"#),
        ];
        let calls = [
            call("call_0", "add", r#"{"x":1}"#),
            call("call_1", "add", r#"{"x":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
        // In pieces, with ids at the beginning, and in all pieces.
        for ids in [["", ""], ["a", "b"]] {
            let pieces = [
                (Some(0), "a", "add", ""),
                (Some(0), ids[0], "", r#"{"x":1}"#),
                (Some(0), "b", "add", ""),
                (Some(0), ids[1], "", r#"{"x":2}"#),
            ];
            let calls = [
                call("a", "add", r#"{"x":1}"#),
                call("b", "add", r#"{"x":2}"#),
            ];
            assert_eq!(joined(&pieces), calls);
        }
    }

    #[test]
    fn calls_that_share_an_id_stay_apart_by_their_index() {
        let pieces = [
            (Some(0), "a", "add", ""),
            (Some(1), "a", "add", ""),
            (Some(0), "a", "", r#"{"x":1}"#),
            (Some(1), "a", "", r#"{"x":2}"#),
        ];
        let calls = [
            call("a", "add", r#"{"x":1}"#),
            call("a", "add", r#"{"x":2}"#),
        ];
        assert_eq!(joined(&pieces), calls);
    }

    #[test]
    fn a_repeated_name_begins_no_new_call() {
        let pieces = [
            (Some(0), "a", "add", ""),
            (Some(0), "a", "add", r#"{"x":"#),
            (Some(0), "", "add", "1"),
            (None, "", "", "}"),
            (Some(0), "a", "add", ""),
        ];
        assert_eq!(joined(&pieces), [call("a", "add", r#"{"x":1}"#)]);
    }

    #[test]
    fn a_piece_that_belongs_to_no_call_is_an_error_unless_it_says_nothing() {
        for (index, id) in [(Some(1), ""), (Some(1), "a"), (None, "b")] {
            let mut calls = Calls::default();
            let begun = calls.add_increment(increment(Some(0), "a", "add", ""));
            assert!(matches!(begun, Ok(Some(_))), "{begun:?}");
            assert_eq!(calls.add_increment(increment(index, id, "", "")), Ok(None));
            let added = calls.add_increment(increment(index, id, "", "{}"));
            assert!(matches!(added, Err(Error::Broken(_))), "{added:?}");
        }
    }

    #[test]
    fn a_call_without_arguments_has_an_empty_object() {
        let pieces = [(Some(0), "a", "now", "")];
        assert_eq!(joined(&pieces), [call("a", "now", "{}")]);
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
            let added = calls.add_increment(increment(Some(0), "a", "add", arguments));
            added.expect("a piece");
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
