//! The one error of the service, and the one place that chooses a status for it.
//!
//! Every status carries `google.rpc` details: an `ErrorInfo` with a stable reason, a `BadRequest`
//! where a field is at fault, a `RetryInfo` where a retry helps.

use std::{borrow::Cow, collections::HashMap, time::Duration};

use serde::{Deserialize, Serialize};
use tonic::{Code, Status, body::Body};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{message::Violation, model, store};

/// The domain of our reasons in `ErrorInfo`.
pub const DOMAIN: &str = "chatmemory.v1";

/// When to try again where nothing better is known.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Bytes of an error's message at most, and of the field and the rule in its details: they travel in
/// HTTP headers, where clients accept little.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    InvalidField(#[from] Violation),

    #[error(transparent)]
    Store(#[from] store::Error),

    #[error(transparent)]
    Model(#[from] model::Error),

    /// The id that makes a call safe to repeat was used for another request.
    #[error("{field}: was used for another request within 24 hours")]
    RequestReused { field: &'static str },

    /// The caller's deadline passed. `may_be_stored`: during a write that may have been done.
    #[error("the deadline passed{}", if *.may_be_stored { UNKNOWN } else { "" })]
    DeadlineExceeded { may_be_stored: bool },

    #[error("the session has a running turn: {turn_id}")]
    TurnInProgress { turn_id: String },

    #[error("the session has no turn {turn_id:?}")]
    TurnNotFound { turn_id: String },

    #[error("there is no session {session_id:?}")]
    SessionNotFound { session_id: String },

    #[error("the session {session_id:?} has messages or a running turn already")]
    SessionExists { session_id: String },

    #[error("the session was rewound after {limit} of its messages already")]
    TooManyRewinds { limit: usize },

    #[error("the server has {limit} watchers already")]
    TooManyWatchers { limit: usize },

    #[error(
        "the watcher took nothing for {} seconds; go on after the last message received",
        .limit.as_secs()
    )]
    WatcherTooSlow { limit: Duration },

    /// It was asked to stop, and nothing of it is stored.
    #[error("the turn was stopped before there was an answer, or its answer was discarded")]
    TurnStopped,

    #[error("the servers that ran the turn died, each time it was tried")]
    TurnAbandoned,

    #[error("too many calls wait for their turn on this session")]
    LineFull,

    #[error("no turn of others ended within {} seconds", .limit.as_secs())]
    WaitedTooLong { limit: Duration },

    /// What the record of a failed turn says.
    #[error("{}", .0.message)]
    Recorded(Box<Recorded>),

    #[error("the turn took longer than {} seconds", .limit.as_secs())]
    TurnTooLong { limit: Duration },

    #[error("the answer is longer than {limit} bytes")]
    AnswerTooLarge { limit: usize },

    #[error(
        "the history to give to the model is larger than {limit} bytes; ask for fewer messages"
    )]
    HistoryTooLarge { limit: usize },

    /// What must be in a window is above its `max_tokens`.
    #[error("the newest exchange alone takes {needed} tokens, more than max_tokens: {max_tokens}")]
    WindowTooSmall { needed: usize, max_tokens: usize },

    #[error("the server runs {limit} turns already")]
    TooManyTurns { limit: usize },

    #[error("the server works on {limit} requests already")]
    TooManyRequests { limit: usize },

    #[error("the server is shutting down")]
    ShuttingDown,

    /// A defect of ours. The log says more.
    #[error("internal error")]
    Internal,
}

/// A failure, as it is kept with a turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The number of the gRPC code.
    code: i32,
    reason: String,
    message: String,
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    metadata: HashMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_ms: Option<u64>,
    /// The field at fault, and its rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    field: Option<(String, String)>,
}

impl Recorded {
    /// What is kept of an error.
    pub fn of(error: &Error) -> Self {
        let verdict = error.verdict();
        Self {
            code: verdict.code.into(),
            reason: verdict.reason.into_owned(),
            message: error.to_string(),
            metadata: verdict.metadata,
            retry_ms: verdict.retry.map(|after| after.as_millis() as u64),
            field: error.field().map(|(field, rule)| (field.to_owned(), rule)),
        }
    }
}

const UNKNOWN: &str = "; the write may have been stored: repeat the call with the same id";

const REUSED: &str = "REQUEST_ID_REUSED";

/// What a client is told.
struct Verdict {
    code: Code,
    reason: Cow<'static, str>,
    metadata: HashMap<String, String>,
    retry: Option<Duration>,
}

impl Verdict {
    fn new(code: Code, reason: &'static str) -> Self {
        Self {
            code,
            reason: Cow::Borrowed(reason),
            metadata: HashMap::new(),
            retry: None,
        }
    }

    fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    fn retry(mut self, after: Duration) -> Self {
        self.retry = Some(after);
        self
    }
}

impl Error {
    /// Chooses the status. Without a wildcard, so that a new error does not compile until someone
    /// has decided.
    fn verdict(&self) -> Verdict {
        use Code::*;
        match self {
            Self::InvalidField(_) => Verdict::new(InvalidArgument, "INVALID_FIELD"),
            Self::Store(error) => match error {
                store::Error::Unavailable(_) => {
                    Verdict::new(Unavailable, "STORE_UNAVAILABLE").retry(RETRY_DELAY)
                }
                store::Error::OutcomeUnknown(_) => {
                    Verdict::new(Unavailable, "OUTCOME_UNKNOWN").retry(RETRY_DELAY)
                }
                store::Error::Full(_) => Verdict::new(ResourceExhausted, "STORE_FULL"),
                store::Error::SequenceMismatch { expected, actual } => {
                    Verdict::new(Aborted, "SEQUENCE_MISMATCH")
                        .with("expected_last_sequence", expected)
                        .with("last_sequence", actual)
                }
                store::Error::Cleared => Verdict::new(Aborted, "SESSION_CLEARED"),
                store::Error::LeaseLost => {
                    Verdict::new(Unavailable, "TURN_MOVED").retry(RETRY_DELAY)
                }
                store::Error::RequestReused => Verdict::new(InvalidArgument, REUSED),
                store::Error::WrongKeyType { key } => {
                    Verdict::new(FailedPrecondition, "WRONG_KEY_TYPE").with("key", key)
                }
                store::Error::Corrupt(_) => Verdict::new(FailedPrecondition, "CORRUPT_STORE"),
            },
            Self::Model(error) => match error {
                model::Error::UnknownModel(name) => {
                    Verdict::new(InvalidArgument, "UNKNOWN_MODEL").with("model", name)
                }
                model::Error::RateLimited { retry_after } => {
                    Verdict::new(ResourceExhausted, "MODEL_RATE_LIMITED")
                        .retry(retry_after.unwrap_or(RETRY_DELAY))
                }
                model::Error::Unavailable { retry_after, .. } => {
                    Verdict::new(Unavailable, "MODEL_UNAVAILABLE")
                        .retry(retry_after.unwrap_or(RETRY_DELAY))
                }
                model::Error::Unauthorized(_) => {
                    Verdict::new(FailedPrecondition, "MODEL_UNAUTHORIZED")
                }
                model::Error::Rejected(_) => Verdict::new(FailedPrecondition, "MODEL_REJECTED"),
                model::Error::Broken(_) => {
                    Verdict::new(Unavailable, "MODEL_STREAM_BROKEN").retry(RETRY_DELAY)
                }
            },
            Self::RequestReused { .. } => Verdict::new(InvalidArgument, REUSED),
            Self::DeadlineExceeded { may_be_stored } => {
                Verdict::new(DeadlineExceeded, "DEADLINE_EXCEEDED")
                    .with("may_be_stored", may_be_stored)
            }
            Self::TurnInProgress { turn_id } => Verdict::new(Aborted, "TURN_IN_PROGRESS")
                .with("turn_id", turn_id)
                .retry(RETRY_DELAY),
            Self::TurnNotFound { turn_id } => {
                Verdict::new(NotFound, "TURN_NOT_FOUND").with("turn_id", turn_id)
            }
            Self::SessionNotFound { session_id } => {
                Verdict::new(NotFound, "SESSION_NOT_FOUND").with("session_id", session_id)
            }
            Self::SessionExists { session_id } => {
                Verdict::new(AlreadyExists, "SESSION_EXISTS").with("session_id", session_id)
            }
            Self::TooManyRewinds { .. } => Verdict::new(ResourceExhausted, "TOO_MANY_REWINDS"),
            Self::TooManyWatchers { .. } => {
                Verdict::new(ResourceExhausted, "TOO_MANY_WATCHERS").retry(RETRY_DELAY)
            }
            Self::WatcherTooSlow { .. } => Verdict::new(ResourceExhausted, "WATCHER_TOO_SLOW"),
            Self::TurnStopped => Verdict::new(Aborted, "TURN_STOPPED"),
            Self::TurnAbandoned => Verdict::new(Unavailable, "TURN_ABANDONED").retry(RETRY_DELAY),
            Self::LineFull => {
                Verdict::new(ResourceExhausted, "TOO_MANY_WAITING").retry(RETRY_DELAY)
            }
            Self::WaitedTooLong { .. } => {
                Verdict::new(Aborted, "TURN_IN_PROGRESS").retry(RETRY_DELAY)
            }
            Self::Recorded(recorded) => Verdict {
                code: recorded.code.into(),
                reason: Cow::Owned(recorded.reason.clone()),
                metadata: recorded.metadata.clone(),
                retry: recorded.retry_ms.map(Duration::from_millis),
            },
            Self::TurnTooLong { .. } => Verdict::new(DeadlineExceeded, "TURN_TOO_LONG"),
            Self::AnswerTooLarge { .. } => Verdict::new(ResourceExhausted, "ANSWER_TOO_LARGE"),
            Self::HistoryTooLarge { .. } => Verdict::new(ResourceExhausted, "HISTORY_TOO_LARGE"),
            Self::WindowTooSmall { needed, max_tokens } => {
                Verdict::new(FailedPrecondition, "WINDOW_TOO_SMALL")
                    .with("needed", needed)
                    .with("max_tokens", max_tokens)
            }
            Self::TooManyTurns { .. } => {
                Verdict::new(ResourceExhausted, "TOO_MANY_TURNS").retry(RETRY_DELAY)
            }
            Self::TooManyRequests { .. } => {
                Verdict::new(ResourceExhausted, "TOO_MANY_REQUESTS").retry(RETRY_DELAY)
            }
            Self::ShuttingDown => Verdict::new(Unavailable, "SHUTTING_DOWN").retry(RETRY_DELAY),
            Self::Internal => Verdict::new(Internal, "INTERNAL"),
        }
    }

    /// A failure of a write that the request's field `id_field` makes safe to repeat.
    pub fn of_write(error: store::Error, id_field: &'static str) -> Self {
        match error {
            store::Error::RequestReused => Self::RequestReused { field: id_field },
            other => Self::Store(other),
        }
    }

    /// The stable reason, as `ErrorInfo` has it. It holds nothing of what the client sent.
    pub fn reason(&self) -> Cow<'static, str> {
        self.verdict().reason
    }

    /// The field at fault, and its rule.
    fn field(&self) -> Option<(&str, String)> {
        match self {
            Self::InvalidField(violation) => Some((&violation.field, violation.rule.clone())),
            Self::Model(error @ model::Error::UnknownModel(_)) => {
                Some(("model", error.to_string()))
            }
            Self::RequestReused { field } => Some((field, self.to_string())),
            Self::Recorded(recorded) => {
                let (field, rule) = recorded.field.as_ref()?;
                Some((field, rule.clone()))
            }
            _ => None,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let verdict = error.verdict();
        let mut message = error.to_string();
        if matches!(error, Error::Store(store::Error::OutcomeUnknown(_))) {
            message.push_str(UNKNOWN);
        }
        let cut = |text: &str| text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned();

        let mut details = ErrorDetails::new();
        details.set_error_info(verdict.reason.clone(), DOMAIN, verdict.metadata);
        if let Some((field, rule)) = error.field() {
            details.add_bad_request_violation(cut(field), cut(&rule));
        }
        if let Some(after) = verdict.retry {
            details.set_retry_info(Some(after));
        }
        Status::with_error_details(verdict.code, cut(&message), details)
    }
}

/// A request that could not be decoded. prost names the message and the field.
pub fn malformed_request(error: &prost::DecodeError) -> Status {
    let text = error.to_string();
    let mut details = ErrorDetails::new();
    details.set_error_info("MALFORMED_REQUEST", DOMAIN, HashMap::new());
    // "failed to decode Protobuf message: Message.content: AppendRequest.messages: invalid string
    // value: data is not UTF-8 encoded": the innermost field comes first.
    let mut path = Vec::new();
    for part in text.split(": ").skip(1) {
        match part.split_once('.') {
            Some((_, field)) if !part.contains(' ') => path.insert(0, field),
            _ => break,
        }
    }
    if !path.is_empty() {
        let rule = text.rsplit(": ").next().unwrap_or_default();
        details.add_bad_request_violation(path.join("."), rule);
    }
    Status::with_error_details(Code::InvalidArgument, text, details)
}

/// Completes the statuses that are not ours (a request over the receive limit, an unknown method)
/// with details, for every error is to carry them.
pub fn complete(mut response: http::Response<Body>) -> http::Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    if status.code() == Code::Ok || !status.details().is_empty() {
        return response;
    }
    // tonic says OUT_OF_RANGE for a message over its limit.
    let too_large =
        status.code() == Code::OutOfRange && status.message().contains("message length too large");
    let (code, reason) = match status.code() {
        Code::OutOfRange if too_large => (Code::ResourceExhausted, "REQUEST_TOO_LARGE"),
        Code::Unimplemented => (Code::Unimplemented, "NOT_IMPLEMENTED"),
        Code::Internal => (Code::Internal, "INTERNAL"),
        code => (code, "MALFORMED_REQUEST"),
    };
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    let message = status.message().trim_start_matches("Error, ");
    let status = Status::with_error_details(code, message, details);
    for name in ["grpc-status", "grpc-message"] {
        response.headers_mut().remove(name);
    }
    if let Err(error) = status.add_header(response.headers_mut()) {
        tracing::error!(%error, "cannot render a status");
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_names_the_field_the_rule_and_the_reason() {
        let status = Status::from(Error::from(Violation::new(
            "page_size",
            "must be 1 or more",
        )));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "page_size: must be 1 or more");
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("INVALID_FIELD", DOMAIN)
        );
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "page_size");
        assert_eq!(violations[0].description, "must be 1 or more");
    }

    #[test]
    fn an_unknown_outcome_says_what_to_do() {
        let error = store::Error::OutcomeUnknown("connection reset".into());
        let status = Status::from(Error::from(error));
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("may have been stored"));
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "OUTCOME_UNKNOWN");
        assert!(details.retry_info().is_some());
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let error = Error::from(model::Error::Rejected("é".repeat(MESSAGE_BYTES_MAX)));
        let status = Status::from(error);
        assert!(status.message().len() <= MESSAGE_BYTES_MAX);
    }
}
