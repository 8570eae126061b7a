//! What a turn promises, with a real HTTP server in the provider's place: tokens as they come, the
//! turn stored in one step before `completed`, nothing stored of a turn that failed.
//! (What the provider's protocol can do to an answer is tested in model.rs.)

mod harness;

use std::{convert::Infallible, sync::Arc, time::Duration};

use chat_memory::{
    model::{Model, provider, retry},
    pb::{self, chat_response::Event},
};
use harness::{
    provider::{Gate, Outcome, Provider, Script},
    redis::{self, Redis},
    server::{
        Options, TestServer, Told, append, chat, clear, contents, get, message, reason, server,
        server_on, server_with, tell, tell_rest, user,
    },
    wait,
};
use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Status};

fn model(provider: &Provider) -> Arc<dyn Model> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
    let settings = provider::Settings {
        url: Some(provider.url()),
        ..provider::Settings::new("test-model")
    };
    let model = provider::Provider::new(settings, |_| None).expect("a model");
    let policy = retry::Policy {
        base: Duration::from_millis(1),
        ..retry::Policy::default()
    };
    Arc::new(retry::Retry::new(Arc::new(model), policy))
}

async fn with_provider() -> (Provider, TestServer) {
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        ..Options::default()
    };
    let server = server_with(options).await;
    (provider, server)
}

/// A turn with an id.
fn named(session: &str, turn_id: &str, content: &str) -> pb::ChatRequest {
    pb::ChatRequest {
        turn_id: turn_id.to_owned(),
        ..chat(session, content)
    }
}

#[tokio::test]
async fn a_turn_streams_its_tokens_and_is_stored_before_it_completes() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::text(["Hel", "lo ", "🎉"]));
    let mut client = server.client().await;
    let mut request = chat("s", "hi");
    request.turn_id = "t1".to_owned();
    let told = tell(&mut client, request).await;

    assert_eq!(told.reason(), "");
    assert_eq!(told.numbers, [1, 2, 3, 4, 5]);
    let started = told.started.as_ref().unwrap();
    assert_eq!(
        (started.turn_id.as_str(), started.model.as_str()),
        ("t1", "test-model")
    );
    assert_eq!(told.text(), "Hello 🎉");
    let completed = told.completed.unwrap();
    assert_eq!(completed.finish_reason(), pb::FinishReason::Stop);
    assert_eq!(completed.usage.unwrap().total_tokens, 10);
    let stored = client
        .get_messages(get("s"))
        .await
        .unwrap()
        .into_inner()
        .messages;
    assert_eq!(stored, completed.messages);
    let texts: Vec<_> = stored
        .iter()
        .map(|m| (m.sequence, m.content.as_str(), m.turn_id.as_str()))
        .collect();
    assert_eq!(texts, [(1, "hi", "t1"), (2, "Hello 🎉", "t1")]);
}

#[tokio::test]
async fn each_token_is_sent_before_the_next_one_exists() {
    let (provider, server) = with_provider().await;
    let gates = [Gate::new(), Gate::new()];
    let script = Script::begin()
        .say("one")
        .wait(&gates[0])
        .say("two")
        .wait(&gates[1]);
    provider.answer(script.finish("stop").done());
    let mut client = server.client().await;
    let mut stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    let mut texts = Vec::new();
    let mut gates = gates.iter();
    while let Some(response) = stream.message().await.unwrap() {
        if let Some(Event::Delta(delta)) = response.event {
            // The provider goes on only after this piece has arrived here.
            texts.push(delta.text);
            if let Some(gate) = gates.next() {
                gate.open();
            }
        }
    }
    assert_eq!(texts, ["one", "two"]);
}

#[tokio::test]
async fn the_model_is_given_system_prompt_history_and_the_new_messages_in_order() {
    let (provider, server) = with_provider().await;
    provider.always(Script::text(["fine"]));
    let mut client = server.client().await;
    let mut history = Vec::new();
    for number in 0..4 {
        history.push(user(&format!("question {number}")));
        history.push(message(pb::Role::Assistant, &format!("answer {number}")));
    }
    client.append(append("s", history)).await.unwrap();
    let mut request = chat("s", "and now?");
    request.system_prompt = "be kind".to_owned();
    // The third is an answer: a history begins with a question.
    request.last_messages = Some(3);
    let told = tell(&mut client, request).await;
    assert_eq!(told.started.unwrap().history_messages, 2);

    let body = &provider.requests()[0].body;
    assert_eq!(body["model"], "test-model");
    let given: Vec<_> = body["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .collect();
    let expected = [
        ("system", "be kind"),
        ("user", "question 3"),
        ("assistant", "answer 3"),
        ("user", "and now?"),
    ];
    assert_eq!(given, expected);
    let stored = contents(&mut client, "s").await;
    assert!(!stored.contains(&"be kind".to_owned()));
    assert_eq!(stored.len(), 10);
}

#[tokio::test]
async fn without_a_window_of_its_own_a_turn_has_the_servers() {
    let (provider, server) = with_provider().await;
    provider.always(Script::text(["fine"]));
    let mut client = server.client().await;
    client
        .append(append("s", vec![user("x"); 60]))
        .await
        .unwrap();
    let told = tell(&mut client, chat("s", "hi")).await;
    assert_eq!(told.started.unwrap().history_messages, 50);
}

#[tokio::test]
async fn reasoning_and_tool_calls_come_through_and_are_stored() {
    let (provider, server) = with_provider().await;
    let script = Script::begin()
        .think("let me ")
        .think("see")
        .call(0, "c1", "add")
        .arguments(0, r#"{"a":"#)
        .arguments(0, "1}");
    provider.answer(script.finish("tool_calls").usage(5, 6).done());
    let mut client = server.client().await;
    let mut request = chat("s", "1+?");
    request.tools = vec![pb::Tool {
        name: "add".into(),
        description: "adds".into(),
        parameters: None,
    }];
    let told = tell(&mut client, request).await;
    let reasoning: String = told
        .deltas
        .iter()
        .map(|delta| delta.reasoning.as_str())
        .collect();
    assert_eq!(reasoning, "let me see");
    let arguments: String = told
        .deltas
        .iter()
        .flat_map(|delta| &delta.tool_calls)
        .map(|call| call.arguments.as_str())
        .collect();
    assert_eq!(arguments, r#"{"a":1}"#);
    let completed = told.completed.expect("the turn completes");
    assert_eq!(completed.finish_reason(), pb::FinishReason::ToolCalls);
    let answer = &completed.messages[1];
    assert_eq!(answer.reasoning, "let me see");
    assert_eq!(
        (
            answer.tool_calls[0].id.as_str(),
            answer.tool_calls[0].name.as_str()
        ),
        ("c1", "add")
    );

    // The result goes on with the call; the model sees both, and not the reasoning.
    provider.answer(Script::text(["2"]));
    let mut result = message(pb::Role::Tool, "2");
    result.tool_call_id = "c1".to_owned();
    let mut request = chat("s", "");
    request.messages = vec![result];
    let told = tell(&mut client, request).await;
    assert_eq!(told.text(), "2");
    let body = &provider.requests()[1].body;
    assert_eq!(body["messages"][1]["tool_calls"][0]["id"], "c1");
    assert_eq!(body["messages"][2]["tool_call_id"], "c1");
    assert!(!body.to_string().contains("let me see"));
}

/// Runs a turn that is to fail; nothing of it may be in the history.
async fn failed(script: Script) -> Told {
    let (provider, server) = with_provider().await;
    provider.always(script);
    let mut client = server.client().await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    let told = tell(&mut client, chat("s", "hi")).await;
    assert!(told.completed.is_none() && told.error.is_some(), "{told:?}");
    assert_eq!(contents(&mut client, "s").await, ["before"]);
    told
}

#[tokio::test]
async fn an_error_in_the_middle_ends_the_stream_and_stores_nothing() {
    let told = failed(Script::begin().say("Hel").fail("the GPU is on fire")).await;
    assert_eq!(told.text(), "Hel");
    assert_eq!(told.reason(), "MODEL_STREAM_BROKEN");
    assert_eq!(told.error.unwrap().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_cut_connection_ends_the_stream_and_stores_nothing() {
    let told = failed(Script::begin().say("Hel").reset()).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("Hel", "MODEL_STREAM_BROKEN")
    );
}

#[tokio::test]
async fn an_answer_that_ends_early_but_cleanly_is_not_taken_for_complete() {
    let told = failed(Script::begin().say("Hel").end_early()).await;
    assert_eq!(told.reason(), "MODEL_STREAM_BROKEN");
}

#[tokio::test]
async fn an_answer_that_ends_in_tool_calls_and_has_none_stores_nothing() {
    let script = Script::begin().say("Hel").finish("tool_calls").done();
    assert_eq!(failed(script).await.reason(), "MODEL_STREAM_BROKEN");
}

#[tokio::test]
async fn a_malformed_chunk_ends_the_stream_and_stores_nothing() {
    let told = failed(
        Script::begin()
            .say("Hel")
            .write("data: {nonsense\n\n")
            .finish("stop")
            .done(),
    )
    .await;
    assert_eq!(told.reason(), "MODEL_STREAM_BROKEN");
}

#[tokio::test]
async fn a_refusal_says_what_the_provider_said() {
    let told = failed(Script::refusal(
        400,
        "context_length_exceeded",
        "too long by 7 tokens",
    ))
    .await;
    let error = told.error.unwrap();
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::FailedPrecondition, "MODEL_REJECTED")
    );
    assert!(
        error.message().contains("too long by 7 tokens"),
        "{}",
        error.message()
    );
}

#[tokio::test]
async fn an_unknown_model_names_the_field() {
    let told = failed(Script::refusal(404, "model_not_found", "no such model")).await;
    let error = told.error.unwrap();
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::InvalidArgument, "UNKNOWN_MODEL")
    );
    assert_eq!(harness::server::fields(&error), ["model"]);
}

#[tokio::test]
async fn a_rate_limit_before_the_first_token_is_waited_for() {
    let (provider, server) = with_provider().await;
    let refusal = Script::refusal(429, "rate_limit_exceeded", "slow down");
    provider.answer(refusal.clone().header("Retry-After", "0"));
    provider.answer(Script::error(503, serde_json::json!({})));
    provider.answer(Script::text(["at last"]));
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hi")).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("at last", "")
    );
    assert_eq!(provider.request_count(), 3);
    assert_eq!(contents(&mut client, "s").await, ["hi", "at last"]);
}

#[tokio::test]
async fn a_rate_limit_that_lasts_says_when_to_come_back() {
    use tonic_types::StatusExt as _;
    let refusal = Script::refusal(429, "rate_limit_exceeded", "slow down");
    let told = failed(refusal.header("Retry-After", "3600")).await;
    let error = told.error.unwrap();
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::ResourceExhausted, "MODEL_RATE_LIMITED")
    );
    let retry = error.get_error_details().retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(Duration::from_secs(3600)));
}

#[tokio::test]
async fn an_answer_without_usage_completes_without_usage() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::begin().say("hi").finish("stop").done());
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hi")).await;
    let completed = told.completed.unwrap();
    assert_eq!(completed.usage, None);
    assert_eq!(completed.messages[1].usage, None);
}

#[tokio::test]
async fn characters_split_across_chunks_arrive_whole() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::text(["né", "🎉🎊", "会話"]).in_writes_of(1));
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hi")).await;
    assert_eq!(told.text(), "né🎉🎊会話");
    assert_eq!(contents(&mut client, "s").await[1], "né🎉🎊会話");
}

#[tokio::test]
async fn a_turn_asked_for_again_gives_the_stored_answer_and_does_not_ask_the_model() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::text(["first"]));
    provider.always(Script::text(["second"]));
    let mut client = server.client().await;
    let mut request = chat("s", "hi");
    request.turn_id = "t1".to_owned();
    let first = tell(&mut client, request.clone()).await;
    let again = tell(&mut client, request.clone()).await;
    assert_eq!(again.text(), "first");
    assert_eq!(
        again.completed.unwrap().messages,
        first.completed.unwrap().messages
    );
    assert_eq!(provider.request_count(), 1);
    assert_eq!(contents(&mut client, "s").await, ["hi", "first"]);

    request.messages = vec![user("something else")];
    let other = tell(&mut client, request).await;
    let error = other.error.unwrap();
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::InvalidArgument, "REQUEST_ID_REUSED")
    );
    assert_eq!(harness::server::fields(&error), ["turn_id"]);
}

#[tokio::test]
async fn a_session_has_one_running_turn() {
    use tonic_types::StatusExt as _;
    let (provider, server) = with_provider().await;
    let gate = Gate::new();
    provider.answer(Script::begin().say("a").wait(&gate).finish("stop").done());
    let mut client = server.client().await;
    let mut request = chat("s", "hi");
    request.turn_id = "running".to_owned();
    let stream = client.chat(request).await.unwrap().into_inner();
    provider.wait_for_requests(1).await;
    let status = client.chat(chat("s", "me too")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "TURN_IN_PROGRESS")
    );
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().metadata["turn_id"], "running");
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert!(told.completed.is_some());
    // The place is free as soon as the client knows that the turn is over.
    provider.always(Script::text(["b"]));
    assert!(
        tell(&mut client, chat("s", "me too"))
            .await
            .completed
            .is_some()
    );
}

#[tokio::test]
async fn a_clear_during_a_turn_lets_nothing_come_back() {
    let (provider, server) = with_provider().await;
    let gate = Gate::new();
    provider.answer(Script::begin().say("a").wait(&gate).finish("stop").done());
    let mut client = server.client().await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    let stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    provider.wait_for_requests(1).await;
    client.clear(clear("s")).await.unwrap();
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "SESSION_CLEARED");
    assert_eq!(contents(&mut client, "s").await.len(), 0);
}

#[tokio::test]
async fn a_turn_whose_client_left_goes_on_and_is_stored() {
    let (provider, server) = with_provider().await;
    let gate = Gate::new();
    provider.answer(
        Script::begin()
            .say("a")
            .wait(&gate)
            .say("b")
            .finish("stop")
            .done(),
    );
    let mut client = server.client().await;
    let mut stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    stream.message().await.unwrap();
    provider.wait_for_requests(1).await;
    drop(stream);
    gate.open();
    let mut reader = server.client().await;
    wait::until("the turn is stored", || {
        let mut reader = reader.clone();
        async move { (contents(&mut reader, "s").await == ["hi", "ab"]).then_some(()) }
    })
    .await;
    let stored = reader
        .get_messages(get("s"))
        .await
        .unwrap()
        .into_inner()
        .messages;
    assert!(!stored[1].interrupted);
}

#[tokio::test]
async fn a_turn_that_is_to_stop_with_its_client_stores_what_there_is() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::begin().say("as far as").call(0, "c1", "add").hang());
    let mut client = server.client().await;
    let mut request = chat("s", "hi");
    request.on_disconnect = pb::OnDisconnect::Stop.into();
    let mut stream = client.chat(request).await.unwrap().into_inner();
    wait_for_text(&mut stream).await;
    drop(stream);
    assert_eq!(provider.wait_for_outcome(0).await, Outcome::ClientLeft);
    let reader = server.client().await;
    let stored = wait::until("the turn is stored", || {
        let mut reader = reader.clone();
        async move {
            let page = reader.get_messages(get("s")).await.unwrap().into_inner();
            (!page.messages.is_empty()).then_some(page.messages)
        }
    })
    .await;
    assert_eq!(
        (stored[0].content.as_str(), stored[0].interrupted),
        ("hi", false)
    );
    assert_eq!(
        (stored[1].content.as_str(), stored[1].interrupted),
        ("as far as", true)
    );
    assert!(stored[1].tool_calls.is_empty());
}

async fn wait_for_text(stream: &mut tonic::Streaming<pb::ChatResponse>) {
    while let Some(response) = stream.message().await.unwrap() {
        if matches!(response.event, Some(Event::Delta(_))) {
            return;
        }
    }
    panic!("the stream ended");
}

#[tokio::test]
async fn the_callers_deadline_ends_its_stream_and_not_the_turn() {
    let (provider, server) = with_provider().await;
    let gate = Gate::new();
    let script = Script::begin().say("a").wait(&gate).say("b");
    provider.answer(script.finish("stop").done());
    let mut client = server.client().await;
    let mut request = tonic::Request::new(named("s", "t1", "hi"));
    request.set_timeout(Duration::from_millis(300));
    let stream = client.chat(request).await.unwrap().into_inner();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.error.unwrap().code(), Code::DeadlineExceeded);
    gate.open();
    let told = tell(&mut client, named("s", "t1", "hi")).await;
    assert_eq!((told.text().as_str(), told.reason().as_str()), ("ab", ""));
    assert_eq!(contents(&mut client, "s").await, ["hi", "ab"]);
    assert_eq!(provider.request_count(), 1);
}

/// A call over HTTP/2 as it is, for tonic's client keeps deadlines itself. Its body comes late.
async fn ask_late(server: &TestServer, request: &pb::ChatRequest, timeout: &str) -> Status {
    let (body, late) = tokio::sync::mpsc::channel(1);
    let frames = ReceiverStream::new(late).map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)));
    let call = http::Request::post(format!(
        "http://{}/chatmemory.v1.ChatMemory/Chat",
        server.tcp
    ))
    .header("content-type", "application/grpc")
    .header("te", "trailers")
    .header("grpc-timeout", timeout)
    .body(StreamBody::new(frames))
    .unwrap();
    let socket = TokioIo::new(TcpStream::connect(&server.tcp).await.unwrap());
    let client = hyper::client::conn::http2::handshake(TokioExecutor::new(), socket);
    let (mut client, connection) = client.await.unwrap();
    tokio::spawn(connection);
    let answer = client.send_request(call);
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let bytes = Bytes::from([&[0], &length[..], &message[..]].concat());
    let send = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        body.send(bytes).await.unwrap();
        drop(body);
    };
    let (answer, ()) = tokio::join!(answer, send);
    Status::from_header_map(answer.unwrap().headers()).expect("an error")
}

#[tokio::test]
async fn the_callers_deadline_counts_from_the_head_of_the_call_and_has_its_details() {
    let (provider, server) = with_provider().await;
    provider.answer(Script::begin().say("a").hang());
    let mut client = server.client().await;
    let mut stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    wait_for_text(&mut stream).await;
    let queued = pb::ChatRequest {
        on_conflict: pb::OnConflict::Queue.into(),
        ..chat("s", "then")
    };
    let status = ask_late(&server, &queued, "2S").await;
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        "{status:?}"
    );
}

#[tokio::test]
async fn a_turn_has_its_limits_in_time_and_size() {
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        turn_limit: Duration::from_millis(300),
        ..Options::default()
    };
    let server = server_with(options).await;
    provider.answer(Script::begin().say("a").hang());
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hi")).await;
    assert_eq!(told.reason(), "TURN_TOO_LONG");

    let (provider, server) = with_provider().await;
    let mut script = Script::begin();
    for _ in 0..17 {
        script = script.say(&"x".repeat(64 << 10));
    }
    provider.answer(script.finish("stop").done());
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hi")).await;
    assert_eq!(told.reason(), "ANSWER_TOO_LARGE");
    assert_eq!(contents(&mut client, "s").await.len(), 0);
}

#[tokio::test]
async fn more_turns_at_once_than_allowed_are_told_to_come_back() {
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        turns_max: 1,
        ..Options::default()
    };
    let server = server_with(options).await;
    provider.answer(Script::begin().say("a").hang());
    let mut client = server.client().await;
    let _running = client.chat(chat("s", "hi")).await.unwrap();
    let status = client.chat(chat("t", "hi")).await.unwrap_err();
    assert_eq!(reason(&status), "TOO_MANY_TURNS");
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_neither_model_nor_store() {
    let (provider, server) = with_provider().await;
    let mut script = Script::begin();
    for _ in 0..10 {
        script = script.say(&"x".repeat(64 << 10));
    }
    provider.answer(script.finish("stop").done());
    let mut client = server.client().await;
    let stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    assert_eq!(provider.wait_for_outcome(0).await, Outcome::Finished);
    let reader = server.client().await;
    wait::until("the turn is stored", || {
        let mut reader = reader.clone();
        async move { (contents(&mut reader, "s").await.len() == 2).then_some(()) }
    })
    .await;
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.text().len(), 640 << 10);
    assert!(told.completed.is_some());
}

#[tokio::test]
async fn a_drain_lets_a_turn_finish_and_takes_no_new_one() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let (provider, server) = with_provider().await;
    let gate = Gate::new();
    provider.answer(
        Script::begin()
            .say("a")
            .wait(&gate)
            .say("b")
            .finish("stop")
            .done(),
    );
    let mut client = server.client().await;
    let mut health = HealthClient::new(server.channel().await);
    let mut watch = health
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    let stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    provider.wait_for_requests(1).await;

    server.shutdown.cancel();
    let changed = tokio::time::timeout(wait::LIMIT, watch.message()).await;
    let changed = changed.expect("health changes at once");
    assert_eq!(changed.unwrap().unwrap().status, 2, "NOT_SERVING");
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(
        (told.text().as_str(), told.completed.is_some()),
        ("ab", true)
    );
    let ended = tokio::time::timeout(wait::LIMIT, server.running).await;
    ended
        .expect("an open watch does not hold the server")
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_drain_has_a_limit_and_tells_the_clients() {
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        drain_limit: Duration::from_millis(100),
        ..Options::default()
    };
    let server = server_with(options).await;
    provider.answer(Script::begin().say("a").hang());
    let mut client = server.client().await;
    let stream = client.chat(chat("s", "hi")).await.unwrap().into_inner();
    provider.wait_for_requests(1).await;
    server.shutdown.cancel();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "SHUTTING_DOWN");
    tokio::time::timeout(wait::LIMIT, server.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn echo_answers_without_a_model_and_knows_no_other() {
    let server = server().await;
    let mut client = server.client().await;
    let told = tell(&mut client, chat("s", "hello there")).await;
    assert_eq!(told.text(), "You said: hello there");
    let mut request = chat("s", "hi");
    request.model = "gpt-5".to_owned();
    let told = tell(&mut client, request).await;
    assert_eq!(told.reason(), "UNKNOWN_MODEL");
    assert_eq!(contents(&mut client, "s").await.len(), 2);
}

#[tokio::test]
async fn answers_that_are_kept_for_a_store_that_is_away_have_a_limit_together() {
    let mut redis = Redis::start_with(redis::Options {
        durable: true,
        ..Default::default()
    })
    .await;
    let settings = chat_memory::store::redis::Settings {
        timeout_ms: 500,
        ..chat_memory::store::redis::Settings::new(redis.url())
    };
    let store = chat_memory::store::redis::Redis::connect(settings).unwrap();
    store.ready(wait::LIMIT).await.unwrap();
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        lease: Duration::from_secs(1),
        kept_bytes_max: 2_000,
        ..Options::default()
    };
    let server = server_on(Arc::new(store), tempfile::tempdir().unwrap(), options).await;
    let mut client = server.client().await;

    let gate = Gate::new();
    let long = "long ".repeat(1_000);
    let mut streams = Vec::new();
    for (count, (session, answer)) in [("a", "short"), ("b", &long)].into_iter().enumerate() {
        let script = Script::begin().wait(&gate).say(answer);
        provider.answer(script.finish("stop").done());
        let call = client.chat(named(session, "t", "hi")).await.unwrap();
        streams.push(call.into_inner());
        provider.wait_for_requests(count + 1).await;
    }
    redis.stop().await;
    gate.open();
    for stream in streams {
        let told = tell_rest(stream, Told::default()).await;
        assert_eq!(told.reason(), "STORE_UNAVAILABLE");
    }
    wait::until("only the short one is kept", async || {
        (server.turns.running() == 1).then_some(())
    })
    .await;

    provider.always(Script::text(["again"]));
    redis.restart().await;
    for (session, answer) in [("a", "short"), ("b", "again")] {
        let told = wait::until("the turn completes", || {
            let mut client = client.clone();
            async move {
                let told = tell(&mut client, named(session, "t", "hi")).await;
                told.completed.is_some().then_some(told)
            }
        })
        .await;
        let messages = told.completed.unwrap().messages;
        assert_eq!(messages[1].content, answer, "{session}");
        assert_eq!(contents(&mut client, session).await, ["hi", answer]);
    }
    assert_eq!(provider.request_count(), 3);
}
