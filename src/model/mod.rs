//! Who answers: the trait [`Model`], what goes in and out of it. Knows neither gRPC nor any store.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::message::{Draft, Json, ToolCall, Usage};

pub mod echo;
pub mod provider;
pub mod retry;

/// A result of a model.
pub type Result<T> = std::result::Result<T, Error>;

/// The pieces of an answer, in order. See [`Model::answer`].
pub type Pieces = BoxStream<'static, Result<Piece>>;

/// Answers prompts.
#[async_trait]
pub trait Model: Send + Sync + 'static {
    /// Asks for an answer.
    ///
    /// # Contract
    ///
    /// - The pieces come as the provider sends them, not held back.
    /// - A stream ends with exactly one [`Piece::End`], or with an `Err`; nothing follows either.
    ///   A provider whose stream ends without saying that it is complete is an
    ///   [`Error::Broken`].
    /// - Dropping the stream, or the future, stops the request to the provider.
    /// - Errors hold no message text of ours, and no keys.
    async fn answer(&self, prompt: Prompt) -> Result<Pieces>;

    /// The model that answers if a prompt names none.
    fn default_model(&self) -> &str;

    /// What the model is and where, for people, without secrets.
    fn describe(&self) -> String;
}

/// What a model is asked.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The provider's name of the model; the default if `None`.
    pub model: Option<String>,
    /// Instructions that come before the messages.
    pub system: Option<String>,
    /// The conversation, oldest first, the new messages included.
    pub messages: Vec<Draft>,
    /// The tools it may call.
    pub tools: Vec<Tool>,
    /// How to answer.
    pub options: Options,
}

/// A tool that a model may call.
#[derive(Debug, Clone)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// The JSON schema of its arguments: an object.
    pub parameters: Option<Json>,
}

/// How to answer. What is `None` is left to the provider.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub max_output_tokens: Option<u32>,
    pub stop: Vec<String>,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// More of the text. Not empty.
    Text(String),
    /// More of the reasoning. Not empty.
    Reasoning(String),
    /// More of a tool call.
    ToolCall(ToolCallPiece),
    /// The answer is complete.
    End(End),
}

/// A piece of a tool call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCallPiece {
    /// Which of the answer's tool calls, from 0 on.
    pub index: usize,
    /// In the first piece of a call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// In the first piece of a call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of the text of the arguments.
    pub arguments: String,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    pub finish_reason: FinishReason,
    /// `None` if the provider did not say.
    pub usage: Option<Usage>,
    /// The tool calls, whole, in the order of their indices.
    pub tool_calls: Vec<ToolCall>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The provider did not say.
    Unspecified,
    Stop,
    Length,
    ToolCalls,
    ContentFilter,
    Other,
}

/// A failure of a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The provider does not have this model.
    #[error("the provider does not have the model {0:?}")]
    UnknownModel(String),

    /// The provider takes no more requests for now.
    #[error("the provider's rate limit is reached (HTTP 429)")]
    RateLimited { retry_after: Option<Duration> },

    /// The provider cannot be reached, or cannot work for now (HTTP 408, 5xx).
    #[error("the model is unavailable: {reason}")]
    Unavailable {
        reason: String,
        retry_after: Option<Duration>,
    },

    /// The provider does not accept the server's key, or there is none (HTTP 401, 403).
    #[error("the provider refuses the server's credentials: {0}")]
    Unauthorized(String),

    /// The provider refuses the request (other HTTP 4xx): what it says of the reason.
    #[error("the provider refuses the request: {0}")]
    Rejected(String),

    /// The stream of an answer broke: cut, malformed, or ended with an error of the provider. One
    /// whose code is an HTTP status is the failure that this status is.
    #[error("the model's stream broke: {0}")]
    Broken(String),
}

impl Error {
    /// Whether the same request may succeed soon, and when the provider says so.
    pub fn retry(&self) -> Option<Option<Duration>> {
        match self {
            Self::RateLimited { retry_after } | Self::Unavailable { retry_after, .. } => {
                Some(*retry_after)
            }
            Self::Broken(_) => Some(None),
            Self::UnknownModel(_) | Self::Unauthorized(_) | Self::Rejected(_) => None,
        }
    }
}
