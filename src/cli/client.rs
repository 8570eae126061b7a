//! The connection to a server, and its errors in words for people.

use std::{error::Error as StdError, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};
use tonic_types::StatusExt as _;

use super::{args::Target, text};
use crate::pb::chat_memory_client::ChatMemoryClient;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long any call but `Chat` may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a connection with a call on it is tested, and how long the test may take. A model
/// can be silent for minutes; this tells its silence from a server that is gone.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that could not be reached.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot reach chat-memory at {target}: {reason}. Is it running? Start it with `chat-memory`"
)]
pub struct Unreachable {
    target: String,
    reason: String,
    #[source]
    source: tonic::transport::Error,
}

/// Connects to a server.
pub async fn connect(target: &Target) -> Result<Channel, Unreachable> {
    let settings = |uri: Uri| {
        Endpoint::from(uri)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
    };
    let result = match target {
        Target::Tcp(uri) => settings(uri.clone()).connect().await,
        Target::Unix(path) => {
            // The URI only names the server in the requests; no name is looked up.
            let endpoint = settings(Uri::from_static("http://localhost"));
            let path = path.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            endpoint.connect_with_connector(connector).await
        }
    };
    result.map_err(|error| Unreachable {
        target: target.to_string(),
        reason: root_cause(&error),
        source: error,
    })
}

/// Connects to the API of a server.
pub async fn connect_api(target: &Target) -> Result<ChatMemoryClient<Channel>, Unreachable> {
    connect(target).await.map(ChatMemoryClient::new)
}

/// A unary request with a time limit.
pub(super) fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// An error's innermost cause, which is the one that says something: "connection refused", where
/// the outer ones say "transport error".
fn root_cause(error: &dyn StdError) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Whether a call ended so because of the way to the server, the server or its store: the same call
/// may well succeed later, maybe at another server.
pub(super) fn is_broken(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable => true,
        // Where a connection broke, no server has given a reason.
        Code::Unknown | Code::Internal | Code::Cancelled => reason(status).is_none(),
        _ => false,
    }
}

/// The pauses between tries in a row: each twice as long as the one before.
#[derive(Debug)]
pub(super) struct Pauses {
    tries_max: u32,
    pause_max: Duration,
    tries: u32,
}

/// The first pause.
pub(super) const PAUSE_FIRST: Duration = Duration::from_millis(100);

impl Pauses {
    pub(super) fn new(tries_max: u32, pause_max: Duration) -> Self {
        Self {
            tries_max,
            pause_max,
            tries: 0,
        }
    }

    /// The pause before the next try, as long as the server asks for at least; `None` if there were
    /// enough tries.
    pub(super) fn next(&mut self, status: &Status) -> Option<Duration> {
        let pause = PAUSE_FIRST.saturating_mul(2_u32.saturating_pow(self.tries));
        let pause = pause.max(retry_delay(status).unwrap_or_default());
        self.tries += 1;
        (self.tries <= self.tries_max).then_some(pause.min(self.pause_max))
    }

    /// Says that a try went well, so that a later failure is the first of a new row.
    pub(super) fn restart(&mut self) {
        self.tries = 0;
    }
}

/// The stable reason in a status's details.
pub fn reason(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (!info.reason.is_empty()).then_some(info.reason)
}

/// After which time the server thinks that trying again makes sense.
fn retry_delay(status: &Status) -> Option<Duration> {
    let delay = status.get_details_retry_info()?.retry_delay;
    delay.filter(|delay| !delay.is_zero())
}

/// A status in words: its message, code and reason, then a line for each field at fault and for
/// when to try again. Safe for a terminal.
pub fn describe(status: &Status) -> String {
    let message = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    let mut described = text::one_line(&message).into_owned();
    // Where no server answered, the message is only "transport error" or the like.
    if let Some(source) = status.source() {
        let cause = root_cause(source);
        if !message.contains(&cause) {
            described += &format!(": {}", text::one_line(&cause));
        }
    }
    match reason(status) {
        Some(reason) => {
            let reason = text::one_line(&reason).into_owned();
            described += &format!(" ({}, {reason})", code_name(status.code()));
        }
        None => described += &format!(" ({})", code_name(status.code())),
    }
    let violations = status
        .get_details_bad_request()
        .map(|details| details.field_violations)
        .unwrap_or_default();
    for violation in violations {
        let field = text::one_line(&violation.field);
        let rule = text::one_line(&violation.description);
        // Most often the message says the same already.
        if !(described.contains(&*field) && described.contains(&*rule)) {
            described += &format!("\n  {field}: {rule}");
        }
    }
    if let Some(delay) = retry_delay(status) {
        described += &format!("\n  try again in {:.1} s", delay.as_secs_f64());
    }
    described
}

/// The name of a status code as gRPC's documents spell it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_status_is_described_with_its_code_reason_fields_and_delay() {
        let mut details = ErrorDetails::new();
        details
            .set_error_info("INVALID_FIELD", "chatmemory.v1", HashMap::new())
            .add_bad_request_violation("messages[0].role", "is required")
            .set_retry_info(Some(Duration::from_millis(1_500)));
        let status =
            Status::with_error_details(Code::InvalidArgument, "the request is bad", details);
        assert_eq!(
            describe(&status),
            "the request is bad (INVALID_ARGUMENT, INVALID_FIELD)\n  \
             messages[0].role: is required\n  try again in 1.5 s"
        );
    }

    #[test]
    fn pauses_grow_up_to_a_limit_and_end_unless_a_try_went_well() {
        let status = Status::unavailable("away");
        let mut pauses = Pauses::new(4, Duration::from_millis(300));
        let ms = |pauses: &mut Pauses| pauses.next(&status).map(|pause| pause.as_millis());
        assert_eq!([(); 2].map(|()| ms(&mut pauses)), [Some(100), Some(200)]);
        pauses.restart();
        let row = [(); 5].map(|()| ms(&mut pauses));
        assert_eq!(row, [Some(100), Some(200), Some(300), Some(300), None]);

        let mut details = ErrorDetails::new();
        details.set_retry_info(Some(Duration::from_millis(250)));
        let status = Status::with_error_details(Code::Unavailable, "away", details);
        let pause = Pauses::new(1, Duration::from_secs(1)).next(&status);
        assert_eq!(pause, Some(Duration::from_millis(250)));
    }

    #[test]
    fn a_call_is_broken_where_no_server_gave_a_reason_or_it_is_away() {
        let with_reason = |code| {
            let mut details = ErrorDetails::new();
            details.set_error_info("WHY", "chatmemory.v1", HashMap::new());
            Status::with_error_details(code, "", details)
        };
        for code in [Code::Unavailable, Code::Unknown, Code::Internal] {
            assert!(is_broken(&Status::new(code, "")), "{code:?}");
        }
        assert!(is_broken(&with_reason(Code::Unavailable)));
        for code in [Code::Internal, Code::Aborted, Code::InvalidArgument] {
            assert!(!is_broken(&with_reason(code)), "{code:?}");
        }
    }

    #[test]
    fn a_field_that_the_message_names_already_is_not_repeated() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("session_id", "is required");
        let message = "session_id: is required";
        let status = Status::with_error_details(Code::InvalidArgument, message, details);
        assert_eq!(
            describe(&status),
            "session_id: is required (INVALID_ARGUMENT)"
        );
    }

    #[test]
    fn a_status_without_message_and_details_still_says_something() {
        let status = Status::new(Code::Unavailable, "");
        assert_eq!(
            describe(&status),
            "The service is currently unavailable (UNAVAILABLE)"
        );
    }

    #[test]
    fn what_a_server_says_cannot_command_the_terminal() {
        let status = Status::new(Code::Internal, "a\x1b[2J\nb");
        assert_eq!(describe(&status), "a␛[2J b (INTERNAL)");
    }
}
