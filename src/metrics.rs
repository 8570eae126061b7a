//! Numbers on what the server does, for Prometheus. Without [`Metrics::start`] nothing is counted:
//! every function here then does nothing. Knows no session, no turn and no text, only kinds of
//! things: a label's values are few, whatever clients send.
//!
//! The exporter's own listener is not used: it does not say which port it got, and it runs on
//! crates that we need for nothing else.

use std::{
    collections::BTreeSet, convert::Infallible, io, net::SocketAddr, sync::OnceLock, time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use prost::Message as _;
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, interval, sleep, timeout},
};
use tonic::body::Body;

use crate::server::DESCRIPTORS;

/// Where the page is.
pub const PATH: &str = "/metrics";

/// Scrapers that are served at once, at most.
const SCRAPES_MAX: usize = 8;
/// How long a scrape may take: longer than scrapers wait by default.
const SCRAPE_LIMIT: Duration = Duration::from_secs(15);
/// How often what was measured is put into its buckets. Until then each value takes memory, so that
/// a server that nobody scrapes must do it too.
const SORT_EVERY: Duration = Duration::from_secs(10);
/// How long to wait before a connection is accepted after that has failed (no more files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Upper ends in seconds: from a read of the embedded file to the longest turn.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
    600.0,
];

const REQUESTS: &str = "chat_memory_requests_total";
const REQUEST_SECONDS: &str = "chat_memory_request_duration_seconds";
const TURNS_RUNNING: &str = "chat_memory_turns_running";
const TURNS: &str = "chat_memory_turns_total";
const ATTEMPTS: &str = "chat_memory_turn_attempts_total";
const ADOPTED: &str = "chat_memory_turns_adopted_total";
const KEPT: &str = "chat_memory_kept_answers";
const KEPT_BYTES: &str = "chat_memory_kept_answer_bytes";
const KEPT_DROPPED: &str = "chat_memory_kept_answers_dropped_total";
const FOLLOWERS: &str = "chat_memory_followers";
const FIRST_TOKEN_SECONDS: &str = "chat_memory_time_to_first_token_seconds";
const MODEL_ERRORS: &str = "chat_memory_model_errors_total";
const STORE_UP: &str = "chat_memory_store_up";
const BUILD: &str = "chat_memory_build_info";

/// The counters, with what they say. `docs/metrics.md` repeats all these texts, and a test compares.
const COUNTERS: [(&str, &str); 6] = [
    (
        REQUESTS,
        "Calls that have ended, by method and gRPC code; a stream when it ends",
    ),
    (TURNS, "Turns that ended at this server, by how they ended"),
    (ATTEMPTS, "Attempts at turns that this server has begun"),
    (
        ADOPTED,
        "Turns taken over from servers that let their leases run out",
    ),
    (
        KEPT_DROPPED,
        "Complete answers that were given up because the store did not take them",
    ),
    (
        MODEL_ERRORS,
        "Attempts that failed for a reason of the model's, after all retries",
    ),
];

const GAUGES: [(&str, &str); 6] = [
    (
        TURNS_RUNNING,
        "Turns that this server runs now, kept answers included",
    ),
    (KEPT, "Complete answers that the store has not taken yet"),
    (KEPT_BYTES, "Bytes of the messages of kept answers"),
    (FOLLOWERS, "Calls that follow a turn now"),
    (STORE_UP, "1 if the store can be reached, 0 if not"),
    (
        BUILD,
        "Always 1; the version and the kind of store are in its labels",
    ),
];

const HISTOGRAMS: [(&str, &str); 2] = [
    (
        REQUEST_SECONDS,
        "Seconds from a call's arrival to its end, by method",
    ),
    (
        FIRST_TOKEN_SECONDS,
        "Seconds from the begin of an attempt at a turn to the first piece of its answer",
    ),
];

/// How a turn ended at this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Question and answer are stored.
    Completed,
    /// It was asked to stop.
    Stopped,
    Failed,
    /// Its servers died, and it had its last try.
    Abandoned,
    /// Its session was cleared.
    Cleared,
    /// Another server has it, or may take it.
    Moved,
}

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Completed,
        Self::Stopped,
        Self::Failed,
        Self::Abandoned,
        Self::Cleared,
        Self::Moved,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
            Self::Cleared => "cleared",
            Self::Moved => "moved",
        }
    }
}

/// Counts an attempt at a turn.
pub fn attempt_begun() {
    counter!(ATTEMPTS).increment(1);
}

/// Counts a turn that another server has left.
pub fn turn_adopted() {
    counter!(ADOPTED).increment(1);
}

/// Counts the end of a turn.
pub fn turn_ended(outcome: Outcome) {
    counter!(TURNS, "outcome" => outcome.name()).increment(1);
}

/// Counts a failure of the model by its reason, as `ErrorInfo` has it.
pub fn model_failed(reason: String) {
    counter!(MODEL_ERRORS, "reason" => reason).increment(1);
}

/// Notes how long a turn took to say its first word.
pub fn first_token(took: Duration) {
    histogram!(FIRST_TOKEN_SECONDS).record(took);
}

/// Counts a complete answer that is lost.
pub fn kept_answer_dropped() {
    counter!(KEPT_DROPPED).increment(1);
}

/// Notes whether the store can be reached.
pub fn store_is(reachable: bool) {
    gauge!(STORE_UP).set(if reachable { 1.0 } else { 0.0 });
}

/// Part of a gauge for as long as it lives.
pub struct Lasting(&'static str, f64);

impl Lasting {
    fn new(name: &'static str, value: f64) -> Self {
        gauge!(name).increment(value);
        Self(name, value)
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        gauge!(self.0).decrement(self.1);
    }
}

/// A turn runs here.
pub fn turn_runs() -> Lasting {
    Lasting::new(TURNS_RUNNING, 1.0)
}

/// A call follows a turn.
pub fn turn_followed() -> Lasting {
    Lasting::new(FOLLOWERS, 1.0)
}

/// An answer of so many bytes is kept for the store.
pub fn answer_kept(bytes: usize) -> [Lasting; 2] {
    [
        Lasting::new(KEPT, 1.0),
        Lasting::new(KEPT_BYTES, bytes as f64),
    ]
}

/// The methods of our service, by their paths. Empty until something counts.
static METHODS: OnceLock<BTreeSet<String>> = OnceLock::new();

/// Whether anything is counted.
pub fn are_on() -> bool {
    METHODS.get().is_some()
}

/// Measures a call of the server: all that goes in and comes out passes here.
pub async fn measure<E>(
    path: String,
    answer: impl Future<Output = Result<Response<Body>, E>>,
) -> Result<Response<Body>, E> {
    let Some(methods) = METHODS.get() else {
        return answer.await;
    };
    let method = match methods.contains(&path) {
        true => path.rsplit('/').next().unwrap_or_default().to_owned(),
        false => "other".to_owned(),
    };
    let mut call = Some(RunningCall {
        method,
        since: Instant::now(),
        code: "CANCELLED",
    });
    let response = answer.await?;
    if let Some(code) = code_of(response.headers()) {
        end(&mut call, code);
        return Ok(response);
    }
    // The end of a stream is in its trailers. One that is dropped before was cancelled.
    Ok(response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            if let Some(trailers) = frame.trailers_ref() {
                end(&mut call, code_of(trailers).unwrap_or("UNKNOWN"));
            }
            frame
        }))
    }))
}

fn end(call: &mut Option<RunningCall>, code: &'static str) {
    if let Some(mut call) = call.take() {
        call.code = code;
    }
}

/// A call that has not ended. Counted when it is dropped.
struct RunningCall {
    method: String,
    since: Instant,
    code: &'static str,
}

impl Drop for RunningCall {
    fn drop(&mut self) {
        let method = std::mem::take(&mut self.method);
        histogram!(REQUEST_SECONDS, "method" => method.clone()).record(self.since.elapsed());
        counter!(REQUESTS, "method" => method, "code" => self.code).increment(1);
    }
}

/// The names of the gRPC codes, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

fn code_of(headers: &HeaderMap) -> Option<&'static str> {
    let number: usize = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    Some(CODES.get(number).copied().unwrap_or("UNKNOWN"))
}

/// The page with all numbers, and where it is served.
pub struct Metrics {
    listener: TcpListener,
    page: PrometheusHandle,
}

impl Metrics {
    /// Listens, and counts from now on. Once in a process.
    pub async fn start(address: SocketAddr, version: &str, store: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let page = recorder().map_err(io::Error::other)?;
        for (name, text) in COUNTERS {
            describe_counter!(name, text);
        }
        for (name, text) in GAUGES {
            describe_gauge!(name, text);
        }
        for (name, text) in HISTOGRAMS {
            describe_histogram!(name, text);
        }
        // What is there from the start on, so that the first increase can be seen.
        for name in [ATTEMPTS, ADOPTED, KEPT_DROPPED] {
            counter!(name).increment(0);
        }
        let _ = histogram!(FIRST_TOKEN_SECONDS);
        for outcome in Outcome::ALL {
            counter!(TURNS, "outcome" => outcome.name()).increment(0);
        }
        for name in [TURNS_RUNNING, KEPT, KEPT_BYTES, FOLLOWERS, STORE_UP] {
            gauge!(name).set(0.0);
        }
        gauge!(BUILD, "version" => version.to_owned(), "store" => store.to_owned()).set(1.0);
        METHODS.get_or_init(methods);
        Ok(Self { listener, page })
    }

    /// Where it listens, with the port that port 0 became.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves the page, for ever.
    pub async fn serve(self) {
        let page = self.page.clone();
        let sort = async {
            let mut ticks = interval(SORT_EVERY);
            loop {
                ticks.tick().await;
                page.run_upkeep();
            }
        };
        tokio::join!(self.accept(), sort);
    }

    async fn accept(&self) {
        let scrapes = std::sync::Arc::new(Semaphore::new(SCRAPES_MAX));
        loop {
            let Ok(permit) = scrapes.clone().acquire_owned().await else {
                return;
            };
            let Ok((stream, _)) = self.listener.accept().await else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let page = self.page.clone();
            tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let response = answer(&page, &request);
                    async move { Ok::<_, Infallible>(response) }
                });
                // One request each, so that idle connections take no place.
                let connection = http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                timeout(SCRAPE_LIMIT, connection).await.ok();
                drop(permit);
            });
        }
    }
}

fn recorder() -> Result<PrometheusHandle, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for (name, _) in HISTOGRAMS {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), &SECONDS)?;
    }
    let recorder = builder.build_recorder();
    let page = recorder.handle();
    // Only a second start in one process fails, and the first one counts on.
    metrics::set_global_recorder(recorder).ok();
    Ok(page)
}

fn answer(page: &PrometheusHandle, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, PATH) => (StatusCode::OK, page.render()),
        (_, PATH) => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
        _ => (StatusCode::NOT_FOUND, format!("see {PATH}\n")),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let format = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, format);
    response
}

/// The paths of our methods, as the proto has them.
fn methods() -> BTreeSet<String> {
    let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    let mut paths = BTreeSet::new();
    for file in set
        .file
        .iter()
        .filter(|file| file.package() == "chatmemory.v1")
    {
        for service in &file.service {
            for method in &service.method {
                let (package, service, method) = (file.package(), service.name(), method.name());
                paths.insert(format!("/{package}.{service}/{method}"));
            }
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_methods_are_those_of_the_proto() {
        let methods = methods();
        assert!(
            methods.contains("/chatmemory.v1.ChatMemory/Append"),
            "{methods:?}"
        );
        assert!(!methods.iter().any(|path| path.contains("grpc.")));
    }

    #[test]
    fn a_code_has_its_name_and_nonsense_has_none_of_its_own() {
        let code = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", text.parse().unwrap());
            code_of(&headers)
        };
        for number in 0..17 {
            let name = CODES[number as usize].replace('_', "").to_lowercase();
            let known = format!("{:?}", tonic::Code::from(number)).to_lowercase();
            assert_eq!(name, known);
        }
        assert_eq!(code("14"), Some("UNAVAILABLE"));
        assert_eq!(code("99"), Some("UNKNOWN"));
        assert_eq!(code("secret"), None);
    }
}
