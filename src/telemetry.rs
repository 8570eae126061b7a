//! Logs. They hold fields, and never message text.

use std::{io::IsTerminal as _, str::FromStr, time::Duration};

use clap::ValueEnum;
use http::Request;
use tower_http::{
    classify::{GrpcCode, GrpcErrorsAsFailures, GrpcFailureClass, SharedClassifier},
    trace::{MakeSpan, OnFailure, TraceLayer},
};
use tracing::Span;
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt};

/// Other crates whose records may quote what they transport. They are never let through.
const SILENT: [&str; 4] = ["h2", "hyper", "reqwest", "genai"];

/// Takes the setting of what to log.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    let mut parsed = EnvFilter::builder().parse(filter)?;
    for name in SILENT {
        parsed = parsed.add_directive(format!("{name}=off").parse()?);
    }
    Ok(parsed)
}

/// Writes logs to standard error from now on. Does nothing if logs are written already.
pub fn start(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = parse_filter(filter)?;
    let subscriber = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Else a line that cannot be written, as nobody reads stderr any more, ends the thread: the
        // library tells of it on stderr, too.
        .log_internal_errors(false)
        .with_target(false);
    let started = match format {
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
        LogFormat::Auto | LogFormat::Text => {
            let colour = format == LogFormat::Auto && std::io::stderr().is_terminal();
            subscriber.with_ansi(colour).try_init()
        }
    };
    // Only a second start fails, and the first one serves as well.
    drop(started);
    Ok(())
}

/// How to write the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    #[default]
    Auto,
    Text,
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        <Self as ValueEnum>::from_str(text, true)
            .map_err(|_| "must be auto, text or json".to_owned())
    }
}

/// Logs calls: those that failed for reasons of the server's at `warn`, all at `debug`.
pub type CallLog =
    TraceLayer<SharedClassifier<GrpcErrorsAsFailures>, CallSpan, (), (), (), (), LogFailure>;

/// The layer that logs calls, streams to their end.
pub fn call_log() -> CallLog {
    // What the client did wrong, or must expect, is not worth a line each.
    let expected = [
        GrpcCode::InvalidArgument,
        GrpcCode::Aborted,
        GrpcCode::FailedPrecondition,
        GrpcCode::ResourceExhausted,
        GrpcCode::Unimplemented,
        GrpcCode::Cancelled,
        GrpcCode::DeadlineExceeded,
        GrpcCode::NotFound,
    ];
    let classifier = expected.into_iter().fold(
        GrpcErrorsAsFailures::new(),
        GrpcErrorsAsFailures::with_success,
    );
    TraceLayer::new(SharedClassifier::new(classifier))
        .make_span_with(CallSpan)
        .on_request(())
        .on_response(())
        .on_body_chunk(())
        .on_eos(())
        .on_failure(LogFailure)
}

/// Names the method, and nothing of the request.
#[derive(Debug, Clone)]
pub struct CallSpan;

impl<B> MakeSpan<B> for CallSpan {
    fn make_span(&mut self, request: &Request<B>) -> Span {
        tracing::debug_span!("call", method = request.uri().path())
    }
}

/// Logs a failure by its code: its text is the client's.
#[derive(Debug, Clone)]
pub struct LogFailure;

impl OnFailure<GrpcFailureClass> for LogFailure {
    fn on_failure(&mut self, failure: GrpcFailureClass, took: Duration, _span: &Span) {
        let took_ms = took.as_millis();
        match failure {
            GrpcFailureClass::Code(code) => {
                tracing::warn!(code = code.get(), took_ms, "a call failed");
            }
            GrpcFailureClass::Error(error) => tracing::warn!(error, took_ms, "a call broke off"),
        }
    }
}
