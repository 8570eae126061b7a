//! The numbers that the real program gives out about itself.

mod harness;

use std::collections::{BTreeMap, BTreeSet};

use chat_memory::pb;
use harness::{
    program::Program,
    provider::{Gate, Provider, Script},
    redis::{self, Redis},
    server::{Client, Told, append, chat, client, get, tcp_channel, tell, tell_rest, user},
    wait::until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::Code;

/// Not to be found in any number or label.
const SESSION: &str = "session-of-nobody-else";
const TURN: &str = "turn-of-nobody-else";
const TEXT: &str = "text-of-nobody-else";

/// A server that gives out metrics.
fn start(args: &[&str]) -> Program {
    let mut all = vec![
        "--listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
        "--lease-seconds=1",
    ];
    all.extend(args);
    Program::start(&all)
}

fn metrics_address(program: &Program) -> &str {
    let (_, rest) = program.banner.split_once("metrics: http://").unwrap();
    rest.split_once("/metrics").unwrap().0
}

async fn http(address: &str, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

async fn page(program: &Program) -> String {
    let response = http(metrics_address(program), "GET", "/metrics").await;
    let (head, page) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    page.to_owned()
}

/// The value of one line, without its labels' order: `name` or `name{a="b",c="d"}`.
fn value(page: &str, series: &str) -> Option<f64> {
    let key = |text: &str| {
        let (name, labels) = text.split_once('{').unwrap_or((text, ""));
        let labels = labels.trim_end_matches('}').split(',');
        (
            name.to_owned(),
            labels.map(str::to_owned).collect::<BTreeSet<_>>(),
        )
    };
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let mut values = lines.filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        (key(name) == key(series)).then(|| value.parse().unwrap())
    });
    values.next()
}

async fn until_is(program: &Program, series: &str, wanted: impl Fn(f64) -> bool) {
    until(&format!("{series} is as it must be"), async || {
        let page = page(program).await;
        value(&page, series).is_some_and(&wanted).then_some(())
    })
    .await;
}

fn turn(content: &str) -> pb::ChatRequest {
    pb::ChatRequest {
        turn_id: TURN.to_owned(),
        ..chat(SESSION, content)
    }
}

async fn ready(program: &Program) -> Client {
    let client = client(tcp_channel(&program.addresses[0]).await);
    until("the server has its store", || {
        let mut client = client.clone();
        async move { client.get_messages(get(SESSION)).await.ok().map(drop) }
    })
    .await;
    client
}

#[tokio::test]
async fn calls_and_turns_are_counted_and_nothing_of_them_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("test.db");
    let program = start(&["--database", database.to_str().unwrap()]);
    until_is(&program, "chat_memory_store_up", |up| up == 1.0).await;
    let before = page(&program).await;
    for zero in [
        "chat_memory_turns_total{outcome=\"completed\"}",
        "chat_memory_turn_attempts_total",
        "chat_memory_turns_running",
        "chat_memory_kept_answers",
        "chat_memory_followers",
    ] {
        assert_eq!(value(&before, zero), Some(0.0), "{zero}");
    }

    let mut client = ready(&program).await;
    let appended = client.append(append(SESSION, vec![user(TEXT)])).await;
    appended.unwrap();
    let refused = client
        .append(append("", vec![user(TEXT)]))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let told = tell(&mut client, turn(TEXT)).await;
    assert!(told.completed.is_some());

    for one in [
        "chat_memory_requests_total{method=\"Append\",code=\"OK\"}",
        "chat_memory_requests_total{method=\"Append\",code=\"INVALID_ARGUMENT\"}",
        "chat_memory_requests_total{method=\"Chat\",code=\"OK\"}",
        "chat_memory_request_duration_seconds_count{method=\"Chat\"}",
        "chat_memory_turns_total{outcome=\"completed\"}",
        "chat_memory_turn_attempts_total",
        "chat_memory_time_to_first_token_seconds_count",
    ] {
        until_is(&program, one, |count| count == 1.0).await;
    }
    for zero in ["chat_memory_turns_running", "chat_memory_followers"] {
        until_is(&program, zero, |count| count == 0.0).await;
    }
    let after = page(&program).await;
    for secret in [SESSION, TURN, TEXT] {
        assert!(!after.contains(secret), "{secret} is in\n{after}");
    }
    assert!(after.contains("chat_memory_build_info{version="), "{after}");
    assert!(after.contains("store=\"sqlite\""), "{after}");

    let address = metrics_address(&program);
    for (method, path, status) in [("GET", "/", "404"), ("POST", "/metrics", "405")] {
        let response = http(address, method, path).await;
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{response}"
        );
    }
}

#[tokio::test]
async fn a_call_that_its_client_leaves_is_cancelled_and_an_unknown_method_has_no_name() {
    let provider = Provider::start().await;
    provider.answer(Script::begin().say("so far").hang());
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("test.db");
    let program = start(&[
        "--database",
        database.to_str().unwrap(),
        "--model=test-model",
        "--model-url",
        &provider.url(),
    ]);
    let mut client = ready(&program).await;
    let mut stream = client.chat(turn(TEXT)).await.unwrap().into_inner();
    until_is(&program, "chat_memory_turns_running", |count| count == 1.0).await;
    until_is(&program, "chat_memory_followers", |count| count == 1.0).await;
    stream.message().await.unwrap();
    drop(stream);
    let cancelled = "chat_memory_requests_total{method=\"Chat\",code=\"CANCELLED\"}";
    until_is(&program, cancelled, |count| count == 1.0).await;
    until_is(&program, "chat_memory_followers", |count| count == 0.0).await;

    let stop = pb::StopChatRequest {
        session_id: SESSION.to_owned(),
        ..Default::default()
    };
    client.stop_chat(stop).await.unwrap();
    let stopped = "chat_memory_turns_total{outcome=\"stopped\"}";
    until_is(&program, stopped, |count| count == 1.0).await;
    until_is(&program, "chat_memory_turns_running", |count| count == 0.0).await;

    let mut grpc = tonic::client::Grpc::new(tcp_channel(&program.addresses[0]).await);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/chatmemory.v1.ChatMemory/NoSuchMethod");
    let codec = tonic_prost::ProstCodec::<pb::ClearRequest, pb::ClearResponse>::default();
    let request = tonic::Request::new(pb::ClearRequest::default());
    let refused = grpc.unary(request, path, codec).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let unknown = "chat_memory_requests_total{method=\"other\",code=\"UNIMPLEMENTED\"}";
    until_is(&program, unknown, |count| count == 1.0).await;
    assert!(!page(&program).await.contains("NoSuchMethod"));
}

#[tokio::test]
async fn an_answer_is_counted_as_kept_until_the_store_is_back() {
    let mut redis = Redis::start_with(redis::Options {
        durable: true,
        ..Default::default()
    })
    .await;
    let provider = Provider::start().await;
    let gate = Gate::new();
    let script = Script::begin().say("kept").wait(&gate);
    provider.answer(script.finish("stop").done());
    let program = start(&[
        "--redis",
        &redis.url(),
        "--redis-timeout-ms=500",
        "--model=test-model",
        "--model-url",
        &provider.url(),
    ]);
    let mut client = ready(&program).await;
    let mut stream = client.chat(turn(TEXT)).await.unwrap().into_inner();
    stream.message().await.unwrap();
    redis.stop().await;
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.error.unwrap().code(), Code::Unavailable);
    until_is(&program, "chat_memory_kept_answers", |count| count == 1.0).await;
    until_is(&program, "chat_memory_kept_answer_bytes", |bytes| {
        bytes > 100.0
    })
    .await;
    until_is(&program, "chat_memory_store_up", |up| up == 0.0).await;

    redis.restart().await;
    for zero in [
        "chat_memory_kept_answers",
        "chat_memory_kept_answer_bytes",
        "chat_memory_turns_running",
    ] {
        until_is(&program, zero, |value| value == 0.0).await;
    }
    until_is(&program, "chat_memory_store_up", |up| up == 1.0).await;
    let page = page(&program).await;
    for (series, wanted) in [
        ("chat_memory_turns_total{outcome=\"completed\"}", 1.0),
        ("chat_memory_kept_answers_dropped_total", 0.0),
    ] {
        assert_eq!(value(&page, series), Some(wanted), "{series}");
    }
    assert!(!page.contains("kept\""), "{page}");
}

#[tokio::test]
async fn the_document_names_all_metrics_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("test.db");
    // A port that nobody listens on.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", free.local_addr().unwrap());
    drop(free);
    let program = start(&[
        "--database",
        database.to_str().unwrap(),
        "--model=test-model",
        "--model-url",
        &url,
        "--model-attempts=1",
    ]);
    let mut client = ready(&program).await;
    let told = tell(&mut client, turn(TEXT)).await;
    assert_eq!(told.reason(), "MODEL_UNAVAILABLE");
    let failed = "chat_memory_model_errors_total{reason=\"MODEL_UNAVAILABLE\"}";
    until_is(&program, failed, |count| count == 1.0).await;

    let page = page(&program).await;
    let mut shown: BTreeMap<&str, [&str; 2]> = BTreeMap::new();
    for (index, what) in ["# TYPE ", "# HELP "].iter().enumerate() {
        for line in page.lines().filter_map(|line| line.strip_prefix(what)) {
            let (name, text) = line.split_once(' ').unwrap();
            shown.entry(name).or_default()[index] = text;
        }
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let document = std::fs::read_to_string(path).unwrap();
    let rows = document
        .lines()
        .filter(|line| line.starts_with("| `chat_memory_"));
    let mut documented = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row
            .split('|')
            .map(|cell| cell.trim().trim_matches('`'))
            .collect();
        documented.insert(cells[1], [cells[2], cells[5]]);
        let unit = ["_seconds", "_bytes"]
            .into_iter()
            .find(|unit| cells[1].ends_with(unit));
        let unit = unit.map_or("", |unit| &unit[1..]);
        assert_eq!(cells[3], unit, "the unit of {}", cells[1]);
        for label in cells[4].split(", ").filter(|label| !label.is_empty()) {
            let label = label.trim_matches('`');
            let named = format!("{label}=\"");
            let series = page.lines().filter(|line| line.starts_with(cells[1]));
            assert!(series.clone().count() > 0 && series.clone().all(|line| line.contains(&named)));
        }
    }
    assert_eq!(documented, shown);
}

#[tokio::test]
async fn no_port_is_open_for_metrics_unless_one_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::embedded(&directory.path().join("test.db"));
    assert!(!program.banner.contains("metrics:"), "{}", program.banner);
    // The port of the service serves no page either.
    let mut stream = TcpStream::connect(&program.addresses[0]).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = Vec::new();
    // HTTP/1 is not its language: it hangs up, in one way or another.
    stream.read_to_end(&mut response).await.ok();
    assert!(!String::from_utf8_lossy(&response).contains("chat_memory_"));
    assert_eq!(program.addresses.len(), 1);
}
