//! Models of providers keep their contract, whatever the provider does: asked over real
//! connections, of a provider on a loopback port.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use chat_memory::message::{Content, Draft, Json, Part, Role, ToolCall, Usage};
use chat_memory::model::provider::{Provider, Settings};
use chat_memory::model::retry::{Policy, Retry};
use chat_memory::model::{
    End, Error, FinishReason, Model, Options, Piece, Pieces, Prompt, Result, Tool, ToolCallPiece,
};
use futures_util::StreamExt as _;
use harness::provider::{self, Gate, Outcome, Script};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::Barrier;

mod harness;

/// Asks at the server's URL.
fn model(server: &provider::Provider) -> Provider {
    model_named(server, "test-model")
}

fn model_named(server: &provider::Provider, name: &str) -> Provider {
    let settings = Settings {
        url: Some(server.url()),
        ..Settings::new(name)
    };
    Provider::new(settings, no_keys).expect("good settings")
}

/// Asks the server in the protocol of the model's provider.
fn native_model(server: &provider::Provider, name: &str) -> Provider {
    let settings = Settings {
        native_url: Some(server.url()),
        ..Settings::new(name)
    };
    Provider::new(settings, |_| Some("sk-native".to_owned())).expect("good settings")
}

fn no_keys(variable: &str) -> Option<String> {
    panic!("{variable} was looked up")
}

fn prompt(text: &str) -> Prompt {
    Prompt {
        model: None,
        system: None,
        messages: vec![Draft::text(Role::User, text)],
        tools: Vec::new(),
        options: Options::default(),
    }
}

/// Everything that comes, to the end of the stream.
async fn collect(pieces: Pieces) -> Vec<Result<Piece>> {
    let all = pieces.collect();
    tokio::time::timeout(Duration::from_secs(20), all)
        .await
        .expect("an end of the stream")
}

/// Everything that comes for a prompt, be it an error before the stream.
async fn ask(model: &dyn Model, prompt: Prompt) -> Vec<Result<Piece>> {
    match model.answer(prompt).await {
        Ok(pieces) => collect(pieces).await,
        Err(error) => vec![Err(error)],
    }
}

/// What a script comes to.
async fn outcome_of(script: Script) -> Vec<Result<Piece>> {
    let server = provider::Provider::start().await;
    server.answer(script);
    ask(&model(&server), prompt("hi")).await
}

/// The error that a script comes to, and how many pieces came before it.
async fn failure_of(script: Script) -> (usize, Error) {
    let mut outcome = outcome_of(script).await;
    let last = outcome.pop().expect("something");
    (outcome.len(), last.expect_err("an error at the end"))
}

fn text(text: &str) -> Result<Piece> {
    Ok(Piece::Text(text.to_owned()))
}

fn end(outcome: &[Result<Piece>]) -> End {
    match outcome.last() {
        Some(Ok(Piece::End(end))) => end.clone(),
        other => panic!("no end: {other:?}"),
    }
}

fn call_piece(
    index: usize,
    id: Option<&str>,
    name: Option<&str>,
    arguments: &str,
) -> Result<Piece> {
    Ok(Piece::ToolCall(ToolCallPiece {
        index,
        id: id.map(str::to_owned),
        name: name.map(str::to_owned),
        arguments: arguments.to_owned(),
    }))
}

fn call(id: &str, name: &str, arguments: &str) -> ToolCall {
    ToolCall {
        id: id.to_owned(),
        name: name.to_owned(),
        arguments: Json::parse("arguments", arguments).expect("JSON"),
    }
}

#[tokio::test]
async fn arguments_that_only_python_can_hold_do_not_end_the_conversation() {
    let server = provider::Provider::start().await;
    server.answer(Script::text(["ok"]));
    let mut question = prompt("and now?");
    let mut answer = Draft::text(Role::Assistant, "");
    answer.tool_calls = vec![call("c1", "f", r#"{"a": Infinity}"#)];
    let mut result = Draft::text(Role::Tool, "done");
    result.tool_call_id = Some("c1".to_owned());
    question
        .messages
        .splice(0..0, [prompt("hi").messages.remove(0), answer, result]);
    let outcome = ask(&model(&server), question).await;
    assert!(outcome.iter().all(Result::is_ok), "{outcome:?}");
    let sent = &server.requests()[0].body["messages"][1]["tool_calls"][0]["function"]["arguments"];
    let sent: serde_json::Value = serde_json::from_str(sent.as_str().unwrap()).unwrap();
    assert_eq!(sent["json"], r#"{"a": Infinity}"#);
}

// Answers.

#[tokio::test]
async fn an_answer_comes_in_its_pieces_and_ends_once() {
    let outcome = outcome_of(Script::text(["Hel", "lo"])).await;
    let usage = Usage {
        input_tokens: 7,
        output_tokens: 2,
        total_tokens: 9,
    };
    let end = Piece::End(End {
        finish_reason: FinishReason::Stop,
        usage: Some(usage),
        tool_calls: Vec::new(),
    });
    assert_eq!(outcome, [text("Hel"), text("lo"), Ok(end)]);
}

#[tokio::test]
async fn a_piece_arrives_while_the_provider_still_works() {
    let server = provider::Provider::start().await;
    let gate = Gate::new();
    server.answer(
        Script::begin()
            .say("a")
            .wait(&gate)
            .say("b")
            .finish("stop")
            .done(),
    );
    let mut pieces = model(&server).answer(prompt("hi")).await.expect("a stream");
    assert_eq!(pieces.next().await, Some(text("a")));
    gate.open();
    assert_eq!(pieces.next().await, Some(text("b")));
    assert!(matches!(pieces.next().await, Some(Ok(Piece::End(_)))));
    assert_eq!(pieces.next().await, None);
}

#[tokio::test]
async fn usage_is_asked_for_and_absent_if_the_provider_gives_none() {
    let server = provider::Provider::start().await;
    server.answer(Script::begin().say("a").finish("stop").done());
    let outcome = ask(&model(&server), prompt("hi")).await;
    assert_eq!(end(&outcome).usage, None);
    let body = &server.requests()[0].body;
    assert_eq!(body["stream_options"], json!({"include_usage": true}));
    assert_eq!(body["stream"], json!(true));
}

#[tokio::test]
async fn finish_reasons_are_told_apart() {
    for (reason, expected) in [
        ("stop", FinishReason::Stop),
        ("length", FinishReason::Length),
        ("content_filter", FinishReason::ContentFilter),
        ("a new one", FinishReason::Other),
    ] {
        let outcome = outcome_of(Script::begin().say("a").finish(reason).done()).await;
        assert_eq!(end(&outcome).finish_reason, expected, "{reason}");
    }
    let outcome = outcome_of(Script::begin().say("a").done()).await;
    assert_eq!(end(&outcome).finish_reason, FinishReason::Unspecified);
}

#[tokio::test]
async fn reasoning_is_kept_apart_from_the_text() {
    let script = Script::begin().think("hm").say("a").finish("stop").done();
    let outcome = outcome_of(script).await;
    assert_eq!(outcome[0], Ok(Piece::Reasoning("hm".to_owned())));
    assert_eq!(outcome[1], text("a"));
}

#[tokio::test]
async fn two_interleaved_tool_calls_are_joined_by_their_index() {
    let script = Script::begin()
        .call(0, "call_a", "add")
        .call(1, "call_b", "sub")
        .arguments(0, r#"{"x": "#)
        .arguments(1, r#"{"y""#)
        .arguments(0, "1}")
        .arguments(1, ": 2}")
        .finish("tool_calls")
        .usage(1, 1)
        .done();
    let outcome = outcome_of(script).await;
    let pieces = [
        call_piece(0, Some("call_a"), Some("add"), ""),
        call_piece(1, Some("call_b"), Some("sub"), ""),
        call_piece(0, None, None, r#"{"x": "#),
        call_piece(1, None, None, r#"{"y""#),
        call_piece(0, None, None, "1}"),
        call_piece(1, None, None, ": 2}"),
    ];
    assert_eq!(outcome[..6], pieces);
    let end = end(&outcome);
    assert_eq!(end.finish_reason, FinishReason::ToolCalls);
    let calls = [
        call("call_a", "add", r#"{"x": 1}"#),
        call("call_b", "sub", r#"{"y": 2}"#),
    ];
    assert_eq!(end.tool_calls, calls);
}

#[tokio::test]
async fn an_answer_that_calls_tools_says_so_even_if_the_provider_says_stop() {
    let script = Script::begin().call(0, "a", "now").finish("stop").done();
    let end = end(&outcome_of(script).await);
    assert_eq!(end.finish_reason, FinishReason::ToolCalls);
    assert_eq!(end.tool_calls, [call("a", "now", "{}")]);
}

/// An event with these pieces of tool calls.
fn calls_event(pieces: Value) -> Value {
    json!({"choices": [{"index": 0, "delta": {"tool_calls": pieces}, "finish_reason": null}]})
}

#[tokio::test]
async fn calls_without_an_index_come_through_as_they_came() {
    // As Gemini's OpenAI endpoint and proxies for it send them: whole, some without an id.
    let function = |name: &str, arguments: &str| json!({"name": name, "arguments": arguments});
    let script = Script::begin()
        .data(calls_event(json!([
            {"id": "a", "type": "function", "function": function("add", r#"{"x": 1}"#)},
            {"id": "", "type": "function", "function": function("add", r#"{"x": 2}"#)},
        ])))
        .data(calls_event(
            json!([{"index": null, "function": function("now", "{}")}]),
        ))
        .finish("tool_calls")
        .done();
    let outcome = outcome_of(script).await;
    let pieces = [
        call_piece(0, Some("a"), Some("add"), r#"{"x": 1}"#),
        call_piece(1, Some("call_1"), Some("add"), r#"{"x": 2}"#),
        call_piece(2, Some("call_2"), Some("now"), "{}"),
    ];
    assert_eq!(outcome[..3], pieces);
    let end = end(&outcome);
    assert_eq!(end.finish_reason, FinishReason::ToolCalls);
    let calls = [
        call("a", "add", r#"{"x": 1}"#),
        call("call_1", "add", r#"{"x": 2}"#),
        call("call_2", "now", "{}"),
    ];
    assert_eq!(end.tool_calls, calls);
}

#[tokio::test]
async fn arguments_go_to_the_call_of_their_index_in_whatever_order_calls_begin() {
    let script = Script::begin()
        .call(1, "b", "sub")
        .call(0, "a", "add")
        .arguments(1, r#"{"y": 2}"#)
        .arguments(0, r#"{"x": "#)
        .arguments(0, "1}")
        .finish("tool_calls")
        .done();
    let outcome = outcome_of(script).await;
    let calls = [
        call("b", "sub", r#"{"y": 2}"#),
        call("a", "add", r#"{"x": 1}"#),
    ];
    assert_eq!(end(&outcome).tool_calls, calls);
    assert_eq!(outcome[3], call_piece(1, None, None, r#"{"x": "#));
}

#[tokio::test]
async fn arguments_of_a_call_that_did_not_begin_break_the_answer() {
    let script = Script::begin()
        .call(0, "a", "add")
        .arguments(2, "{}")
        .finish("tool_calls")
        .done();
    assert_broken(failure_of(script).await, 1);
}

#[tokio::test]
async fn an_answer_that_ends_in_tool_calls_and_has_none_is_broken() {
    let nothing = Script::begin().finish("tool_calls").done();
    assert_broken(failure_of(nothing).await, 0);
    let text = Script::begin().say("a").finish("tool_calls").done();
    assert_broken(failure_of(text).await, 1);
    let server = provider::Provider::start().await;
    server.answer(anthropic_end(anthropic_text(), "tool_use"));
    let mut outcome = ask(&native_model(&server, "claude-sonnet-4-5"), prompt("hi")).await;
    let error = outcome.pop().expect("something").expect_err("no end");
    assert!(matches!(error, Error::Broken(_)), "{error}");
}

#[tokio::test]
async fn arguments_that_are_no_json_object_break_the_answer() {
    for arguments in [r#"{"secret": "#, r#"["secret"]"#, "secret"] {
        let script = Script::begin()
            .call(0, "a", "add")
            .arguments(0, arguments)
            .finish("tool_calls")
            .done();
        let (pieces, error) = failure_of(script).await;
        assert_eq!(pieces, 2);
        let message = error.to_string();
        assert!(matches!(error, Error::Broken(_)), "{message}");
        assert!(message.contains("not a JSON object"), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }
}

#[tokio::test]
async fn characters_that_are_split_across_packets_arrive_whole() {
    let script = Script::text(["日本語 – ", "🎉é"]).in_writes_of(1);
    let outcome = outcome_of(script).await;
    assert_eq!(outcome[..2], [text("日本語 – "), text("🎉é")]);
}

#[tokio::test]
async fn comments_and_foreign_line_ends_are_no_text() {
    let script = Script::begin()
        .comment("OPENROUTER PROCESSING")
        .write("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\r\n\r\n")
        .comment("keep-alive")
        .say("b")
        .finish("stop")
        .done();
    let outcome = outcome_of(script).await;
    assert_eq!(outcome[..2], [text("a"), text("b")]);
    assert_eq!(outcome.len(), 3);
}

#[tokio::test]
async fn a_byte_order_mark_does_not_disturb_the_answer() {
    // The first event of OpenAI's protocol is only the role.
    let script = Script::stream()
        .write("\u{feff}data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\"}}]}\n\n")
        .say("a")
        .finish("stop")
        .done();
    let outcome = outcome_of(script).await;
    assert_eq!(outcome[0], text("a"));
    assert_eq!(end(&outcome).finish_reason, FinishReason::Stop);
}

// Broken answers.

fn assert_broken(pieces_and_error: (usize, Error), pieces_before: usize) {
    let (pieces, error) = pieces_and_error;
    assert!(matches!(error, Error::Broken(_)), "{error}");
    assert_eq!(pieces, pieces_before, "{error}");
}

#[tokio::test]
async fn a_cut_connection_breaks_the_answer() {
    assert_broken(failure_of(Script::begin().say("a").hang_up()).await, 1);

    // A reset may overtake what was sent before it; so the client has it first.
    let server = provider::Provider::start().await;
    let gate = Gate::new();
    server.answer(Script::begin().say("a").wait(&gate).reset());
    let mut pieces = model(&server).answer(prompt("hi")).await.expect("a stream");
    assert_eq!(pieces.next().await, Some(text("a")));
    gate.open();
    let outcome = collect(pieces).await;
    assert_eq!(outcome.len(), 1);
    assert!(matches!(outcome[0], Err(Error::Broken(_))), "{outcome:?}");
}

#[tokio::test]
async fn a_clean_end_within_the_answer_breaks_it() {
    assert_broken(failure_of(Script::begin().say("a").end_early()).await, 1);
    assert_broken(failure_of(Script::begin().end_early()).await, 0);
    assert_broken(failure_of(Script::stream().end_early()).await, 0);
    // Within an event.
    let script = Script::begin()
        .say("a")
        .write("data: {\"choices\"")
        .end_early();
    assert_broken(failure_of(script).await, 1);
    // Within a character.
    let script = Script::begin()
        .write(&b"data: {\"x\":\"\xf0\x9f"[..])
        .end_early();
    assert_broken(failure_of(script).await, 0);
}

#[tokio::test]
async fn an_answer_that_is_no_stream_is_broken() {
    let body = json!({"choices": [{"message": {"content": "hello"}}]});
    assert_broken(failure_of(Script::error(200, body)).await, 0);
}

#[tokio::test]
async fn nothing_follows_a_malformed_event() {
    let script = Script::begin()
        .say("a")
        .write("data: {\"secret\n\n")
        .say("b")
        .finish("stop")
        .done();
    let (pieces, error) = failure_of(script).await;
    assert!(!error.to_string().contains("secret"), "{error}");
    assert_broken((pieces, error), 1);
}

#[tokio::test]
async fn an_error_of_the_provider_within_the_stream_breaks_the_answer() {
    let script = Script::begin().say("a").fail("out of\nmemory").done();
    let (pieces, error) = failure_of(script).await;
    assert_eq!(pieces, 1);
    let words = "the provider reports: out of memory".to_owned();
    assert_eq!(error, Error::Broken(words));
}

#[tokio::test]
async fn an_error_within_the_stream_whose_code_is_an_http_status_is_what_that_status_is() {
    let failed = |code: Value| {
        let error = json!({"error": {"message": "not\nso", "code": code}});
        failure_of(Script::begin().data(error).done())
    };
    let unavailable = Error::Unavailable {
        reason: "HTTP 503".to_owned(),
        retry_after: None,
    };
    for (code, expected) in [
        (json!(400), Error::Rejected("not so".to_owned())),
        (json!("422"), Error::Rejected("not so".to_owned())),
        (json!(401), Error::Unauthorized("HTTP 401".to_owned())),
        (json!(404), Error::UnknownModel("test-model".to_owned())),
        (json!("429"), Error::RateLimited { retry_after: None }),
        (json!(503), unavailable),
    ] {
        assert_eq!(failed(code.clone()).await.1, expected, "{code}");
    }
    for code in [
        json!(null),
        json!("server_error"),
        json!(200),
        json!(307),
        json!(1301),
        json!(-400),
        json!(400.5),
        json!({"code": 400}),
    ] {
        let broken = Error::Broken("the provider reports: not so".to_owned());
        assert_eq!(failed(code.clone()).await.1, broken, "{code}");
    }
}

#[tokio::test]
async fn a_provider_that_falls_silent_is_given_up() {
    let server = provider::Provider::start().await;
    server.answer(Script::begin().say("a").hang());
    server.answer(Script::silence());
    let settings = Settings {
        url: Some(server.url()),
        idle_timeout: Duration::from_millis(300),
        ..Settings::new("m")
    };
    let model = Provider::new(settings, no_keys).expect("good settings");

    let begun = ask(&model, prompt("hi")).await;
    assert_eq!(begun[0], text("a"));
    let silence = "nothing came for 0.3 s".to_owned();
    assert_eq!(begun[1..], [Err(Error::Broken(silence))]);
    assert_eq!(server.wait_for_outcome(0).await, Outcome::ClientLeft);

    let silent = ask(&model, prompt("hi")).await;
    let reason = "no answer within 0.3 s".to_owned();
    let retry_after = None;
    assert_eq!(
        silent,
        [Err(Error::Unavailable {
            reason,
            retry_after
        })]
    );
    assert_eq!(server.wait_for_outcome(1).await, Outcome::ClientLeft);
}

#[tokio::test]
async fn bytes_of_any_kind_keep_a_slow_answer_alive() {
    let server = provider::Provider::start().await;
    let mut script = Script::begin();
    for _ in 0..8 {
        script = script.pause(Duration::from_millis(100)).comment("wait");
    }
    server.answer(script.say("a").finish("stop").done());
    let settings = Settings {
        url: Some(server.url()),
        idle_timeout: Duration::from_millis(500),
        ..Settings::new("m")
    };
    let model = Provider::new(settings, no_keys).expect("good settings");
    let outcome = ask(&model, prompt("hi")).await;
    assert_eq!(outcome[0], text("a"));
}

#[tokio::test]
async fn dropping_the_pieces_stops_the_request() {
    let server = provider::Provider::start().await;
    server.answer(Script::begin().say("a").hang());
    let mut pieces = model(&server).answer(prompt("hi")).await.expect("a stream");
    assert_eq!(pieces.next().await, Some(text("a")));
    drop(pieces);
    assert_eq!(server.wait_for_outcome(0).await, Outcome::ClientLeft);
}

// Refusals.

#[tokio::test]
async fn a_rate_limit_says_when_to_come_back() {
    let limited = || Script::refusal(429, "rate_limit_exceeded", "slow down");
    let (_, error) = failure_of(limited().header("retry-after", "7")).await;
    let retry_after = Some(Duration::from_secs(7));
    assert_eq!(error, Error::RateLimited { retry_after });

    let (_, error) = failure_of(limited()).await;
    assert_eq!(error, Error::RateLimited { retry_after: None });

    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
    let (_, error) = failure_of(limited().header("retry-after", &date)).await;
    let Error::RateLimited {
        retry_after: Some(wait),
    } = error
    else {
        panic!("{error:?}");
    };
    assert!((90..=100).contains(&wait.as_secs()), "{wait:?}");
}

#[tokio::test]
async fn a_provider_that_cannot_work_is_unavailable() {
    for status in [408, 500, 502, 503, 529] {
        let script = Script::refusal(status, "x", "oh").header("retry-after", "3");
        let (_, error) = failure_of(script).await;
        let expected = Error::Unavailable {
            reason: format!("HTTP {status}"),
            retry_after: Some(Duration::from_secs(3)),
        };
        assert_eq!(error, expected);
    }
}

#[tokio::test]
async fn a_provider_that_is_not_there_is_unavailable() {
    let server = provider::Provider::start().await;
    let model_of_none = model(&server);
    drop(server);
    let outcome = ask(&model_of_none, prompt("hi")).await;
    let [Err(Error::Unavailable { reason, .. })] = &outcome[..] else {
        panic!("{outcome:?}");
    };
    assert!(
        reason.contains("refused") || reason.contains("reset"),
        "{reason}"
    );

    let (_, error) = failure_of(Script::no_answer()).await;
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn what_a_provider_says_of_a_key_is_not_repeated() {
    for status in [401, 403] {
        let script = Script::refusal(status, "invalid_api_key", "wrong key sk-sec…ret");
        let (_, error) = failure_of(script).await;
        assert_eq!(error, Error::Unauthorized(format!("HTTP {status}")));
    }
}

#[tokio::test]
async fn a_model_that_the_provider_does_not_have_is_named() {
    for script in [
        Script::refusal(404, "model_not_found", "there is no such model"),
        Script::error(404, json!({"detail": "Not Found"})),
        Script::refusal(400, "model_not_found", "there is no such model"),
    ] {
        let (_, error) = failure_of(script).await;
        assert_eq!(error, Error::UnknownModel("test-model".to_owned()));
    }
}

#[tokio::test]
async fn a_refused_request_says_why_in_the_providers_words() {
    let script = Script::refusal(400, "context_length_exceeded", "too many\ntokens");
    let (_, error) = failure_of(script).await;
    assert_eq!(error, Error::Rejected("too many tokens".to_owned()));

    let (_, error) = failure_of(Script::refusal(422, "x", &"é".repeat(5_000))).await;
    assert_eq!(error, Error::Rejected("é".repeat(500)));
}

#[tokio::test]
async fn a_redirect_takes_no_conversation_elsewhere() {
    let elsewhere = provider::Provider::start().await;
    elsewhere.always(Script::text(["stolen"]));
    let script = Script::error(307, json!({})).header("location", &elsewhere.url());
    let (_, error) = failure_of(script).await;
    assert!(
        matches!(&error, Error::Rejected(why) if why.contains("redirect")),
        "{error}"
    );
    assert_eq!(elsewhere.request_count(), 0);
}

// Requests.

/// The body of the request that a prompt becomes in OpenAI's protocol.
async fn body_of(prompt: Prompt) -> Value {
    let server = provider::Provider::start().await;
    server.answer(Script::text(["ok"]));
    let outcome = ask(&model(&server), prompt).await;
    end(&outcome);
    server.requests()[0].body.clone()
}

#[tokio::test]
async fn a_conversation_is_sent_in_its_order_and_without_reasoning() {
    let mut answer = Draft::text(Role::Assistant, "let me see");
    answer.reasoning = Some("SECRET THOUGHT".to_owned());
    answer.tool_calls = vec![call("c1", "add", r#"{"x":1}"#), call("c2", "now", "{}")];
    let result = |id: &str, text: &str| {
        let mut draft = Draft::text(Role::Tool, text);
        draft.tool_call_id = Some(id.to_owned());
        draft
    };
    let other = |name: &str| Draft::text(Role::Other(name.to_owned()), name);
    let prompt = Prompt {
        system: Some("be kind".to_owned()),
        messages: vec![
            Draft::text(Role::System, "be brief"),
            Draft::text(Role::User, "1+1?"),
            answer,
            result("c1", "2"),
            result("c2", "noon"),
            Draft::text(Role::Assistant, ""),
            other("developer"),
            other("human"),
            other("ai"),
            other("chat"),
            other("function"),
            Draft::text(Role::User, "thanks"),
        ],
        ..prompt("")
    };
    let body = body_of(prompt).await;
    let function = |name: &str, arguments: &str| json!({"name": name, "arguments": arguments});
    let calls = json!([
        {"type": "function", "id": "c1", "function": function("add", r#"{"x":1}"#)},
        {"type": "function", "id": "c2", "function": function("now", "{}")},
    ]);
    let expected = json!([
        {"role": "system", "content": "be kind"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "let me see", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        {"role": "system", "content": "developer"},
        {"role": "user", "content": "human"},
        {"role": "assistant", "content": "ai"},
        {"role": "user", "content": "thanks"},
    ]);
    assert_eq!(body["messages"], expected);
    assert!(!body.to_string().contains("SECRET"));
}

#[tokio::test]
async fn images_and_data_are_sent_and_pieces_that_no_model_knows_are_left_out() {
    let text = |text: &str| Part::Text(text.to_owned());
    let image = |url: &str| Part::ImageUrl {
        url: url.to_owned(),
        detail: None,
    };
    let with_parts = |parts| Draft {
        content: Content::Parts(parts),
        ..Draft::text(Role::User, "")
    };
    let unknown = Json::parse("part", r#"{"type":"thinking","thinking":"SECRET"}"#).expect("JSON");
    let prompt = Prompt {
        messages: vec![
            with_parts(vec![text("a"), text("b")]),
            with_parts(vec![
                text("look"),
                image("https://example.com/cat.png"),
                image("data:image/gif;base64,R0lGOD"),
                Part::InlineData {
                    media_type: "image/png".to_owned(),
                    data: bytes::Bytes::from_static(b"png"),
                },
                Part::Json(unknown),
            ]),
        ],
        ..prompt("")
    };
    let body = body_of(prompt).await;
    let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
    let expected = json!([
        {"role": "user", "content": "ab"},
        {"role": "user", "content": [
            {"type": "text", "text": "look"},
            image("https://example.com/cat.png"),
            image("data:image/gif;base64,R0lGOD"),
            image("data:image/png;base64,cG5n"),
        ]},
    ]);
    assert_eq!(body["messages"], expected);
}

#[tokio::test]
async fn tools_and_options_are_sent_and_what_is_not_set_is_left_to_the_provider() {
    let schema = r#"{"type":"object","properties":{"x":{"type":"integer"}}}"#;
    let asked = Prompt {
        tools: vec![
            Tool {
                name: "add".to_owned(),
                description: Some("adds".to_owned()),
                parameters: Some(Json::parse("parameters", schema).expect("JSON")),
            },
            Tool {
                name: "now".to_owned(),
                description: None,
                parameters: None,
            },
        ],
        options: Options {
            temperature: Some(0.5),
            top_p: Some(0.25),
            max_output_tokens: Some(64),
            stop: vec!["END".to_owned()],
        },
        ..prompt("hi")
    };
    let body = body_of(asked).await;
    assert_eq!(body["temperature"], json!(0.5));
    assert_eq!(body["top_p"], json!(0.25));
    assert_eq!(body["max_tokens"], json!(64));
    assert_eq!(body["stop"], json!(["END"]));
    let tools = &body["tools"];
    assert_eq!(tools[0]["type"], "function");
    assert_eq!(tools[0]["function"]["name"], "add");
    assert_eq!(tools[0]["function"]["description"], "adds");
    let schema: Value = serde_json::from_str(schema).expect("JSON");
    assert_eq!(tools[0]["function"]["parameters"], schema);
    let no_parameters = json!({"type": "object", "properties": {}});
    assert_eq!(tools[1]["function"]["parameters"], no_parameters);
    assert!(tools[1]["function"]["description"].is_string());

    let body = body_of(prompt("hi")).await;
    let mut fields: Vec<&String> = body.as_object().expect("an object").keys().collect();
    fields.sort();
    assert_eq!(fields, ["messages", "model", "stream", "stream_options"]);
}

#[tokio::test]
async fn a_url_is_asked_for_any_model_by_the_name_as_it_is() {
    let server = provider::Provider::start().await;
    server.always(Script::text(["ok"]));
    let names = [
        "claude-sonnet-4-5",
        "gemini-2.5-flash",
        "anthropic::claude-sonnet-4-5",
        "meta-llama/Llama-3:free",
        "phi-4-mini-high",
        "gpt-5",
        "a name with ünusual ? characters",
    ];
    for name in names {
        let by_default = model_named(&server, name);
        end(&ask(&by_default, prompt("hi")).await);
        let asked = Prompt {
            model: Some(name.to_owned()),
            ..prompt("hi")
        };
        end(&ask(&model(&server), asked).await);
    }
    let requests = server.requests();
    assert_eq!(requests.len(), 2 * names.len());
    for (request, name) in requests
        .iter()
        .zip(names.iter().flat_map(|name| [name, name]))
    {
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("POST", "/v1/chat/completions")
        );
        assert_eq!(request.body["model"], json!(name));
        assert_eq!(request.body["reasoning_effort"], Value::Null);
        assert_eq!(request.headers.get("authorization"), None);
    }
}

#[tokio::test]
async fn a_url_keeps_its_query_and_gets_the_key() {
    let server = provider::Provider::start().await;
    server.answer(Script::text(["ok"]));
    let settings = Settings {
        url: Some(format!("{}/deployments/a/?api-version=1", server.url())),
        api_key: Some("sk-1".into()),
        ..Settings::new("m")
    };
    let model = Provider::new(settings, no_keys).expect("good settings");
    end(&ask(&model, prompt("hi")).await);
    let request = &server.requests()[0];
    assert_eq!(
        request.path,
        "/v1/deployments/a/chat/completions?api-version=1"
    );
    assert_eq!(request.headers["authorization"], "Bearer sk-1");
}

// Protocols of their own.

fn anthropic_text() -> Script {
    let start = json!({"type": "message_start", "message": {
        "id": "msg_1", "role": "assistant", "content": [],
        "usage": {"input_tokens": 5, "output_tokens": 1}}});
    let delta = |text: &str| {
        let delta = json!({"type": "text_delta", "text": text});
        json!({"type": "content_block_delta", "index": 0, "delta": delta})
    };
    Script::stream()
        .event("message_start", start)
        .event(
            "content_block_start",
            json!({"index": 0, "content_block": {"type": "text", "text": ""}}),
        )
        .event("ping", json!({"type": "ping"}))
        .event("content_block_delta", delta("Hel"))
        .event("content_block_delta", delta("lo"))
        .event("content_block_stop", json!({"index": 0}))
}

fn anthropic_end(script: Script, reason: &str) -> Script {
    script
        .event(
            "message_delta",
            json!({"delta": {"stop_reason": reason}, "usage": {"output_tokens": 3}}),
        )
        .event("message_stop", json!({"type": "message_stop"}))
}

#[tokio::test]
async fn anthropics_own_protocol_is_spoken() {
    let server = provider::Provider::start().await;
    let model = native_model(&server, "claude-sonnet-4-5");
    let script = anthropic_text()
        .event(
            "content_block_start",
            json!({"index": 1, "content_block": {
                "type": "tool_use", "id": "toolu_1", "name": "add", "input": {}}}),
        )
        .event(
            "content_block_delta",
            json!({"index": 1, "delta": {"type": "input_json_delta", "partial_json": "{\"x\": "}}),
        )
        .event(
            "content_block_delta",
            json!({"index": 1, "delta": {"type": "input_json_delta", "partial_json": "1}"}}),
        )
        .event("content_block_stop", json!({"index": 1}));
    server.answer(anthropic_end(script, "tool_use"));
    let mut image = Draft::text(Role::User, "");
    let url = "https://example.com/cat".to_owned();
    image.content = Content::Parts(vec![Part::ImageUrl { url, detail: None }]);
    let asked = Prompt {
        system: Some("be kind".to_owned()),
        messages: vec![image],
        ..prompt("")
    };
    let outcome = ask(&model, asked).await;
    let pieces = [
        text("Hel"),
        text("lo"),
        call_piece(0, Some("toolu_1"), Some("add"), ""),
        call_piece(0, None, None, r#"{"x": "#),
        call_piece(0, None, None, "1}"),
    ];
    assert_eq!(outcome[..5], pieces);
    let end = end(&outcome);
    assert_eq!(end.finish_reason, FinishReason::ToolCalls);
    assert_eq!(end.tool_calls, [call("toolu_1", "add", r#"{"x": 1}"#)]);
    let usage = end.usage.expect("usage");
    assert_eq!((usage.input_tokens, usage.output_tokens), (5, 3));

    let request = &server.requests()[0];
    assert_eq!(request.path, "/v1/messages");
    assert_eq!(request.headers["x-api-key"], "sk-native");
    assert_eq!(request.body["model"], "claude-sonnet-4-5");
    assert!(request.body["system"].to_string().contains("be kind"));
    let source = &request.body["messages"][0]["content"][0]["source"];
    assert_eq!(source["url"], "https://example.com/cat");
}

#[tokio::test]
async fn results_of_parallel_calls_are_one_message_to_anthropic() {
    let server = provider::Provider::start().await;
    server.answer(anthropic_end(anthropic_text(), "end_turn"));
    let mut answer = Draft::text(Role::Assistant, "");
    answer.tool_calls = vec![call("c1", "add", "{}"), call("c2", "add", "{}")];
    let result = |id: &str| {
        let mut draft = Draft::text(Role::Tool, id);
        draft.tool_call_id = Some(id.to_owned());
        draft
    };
    let asked = Prompt {
        messages: vec![
            Draft::text(Role::User, "hi"),
            answer,
            result("c1"),
            result("c2"),
        ],
        ..prompt("")
    };
    end(&ask(&native_model(&server, "claude-sonnet-4-5"), asked).await);
    let messages = server.requests()[0].body["messages"].clone();
    assert_eq!(messages.as_array().map(Vec::len), Some(3));
    assert_eq!(messages[2]["content"].as_array().map(Vec::len), Some(2));
}

fn gemini_text(text: &str) -> Value {
    json!({"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}}]})
}

#[tokio::test]
async fn geminis_own_protocol_is_spoken() {
    let server = provider::Provider::start().await;
    let call_of = |x: i32| json!({"functionCall": {"name": "add", "args": {"x": x}}});
    let last = json!({
        "candidates": [{
            "content": {"role": "model", "parts": [call_of(1), call_of(2)]},
            "finishReason": "STOP"}],
        "usageMetadata": {
            "promptTokenCount": 4, "candidatesTokenCount": 2, "totalTokenCount": 6},
    });
    server.answer(
        Script::stream()
            .data(gemini_text("Hel"))
            .data(gemini_text("lo"))
            .data(last),
    );
    let outcome = ask(&native_model(&server, "gemini-2.5-flash"), prompt("hi")).await;
    assert_eq!(outcome[..2], [text("Hel"), text("lo")]);
    assert_eq!(outcome.len(), 5, "{outcome:?}");
    let end = end(&outcome);
    assert_eq!(end.finish_reason, FinishReason::ToolCalls);
    assert_eq!(end.usage.map(|usage| usage.total_tokens), Some(6));
    let arguments: Vec<&str> = end
        .tool_calls
        .iter()
        .map(|call| call.arguments.as_str())
        .collect();
    assert_eq!(arguments, [r#"{"x":1}"#, r#"{"x":2}"#]);
    let ids: Vec<&str> = end.tool_calls.iter().map(|call| call.id.as_str()).collect();
    assert_ne!(ids[0], ids[1]);

    let request = &server.requests()[0];
    assert_eq!(
        request.path,
        "/v1/models/gemini-2.5-flash:streamGenerateContent?alt=sse"
    );
    assert_eq!(request.headers["x-goog-api-key"], "sk-native");
}

#[tokio::test]
async fn a_clean_end_within_the_answer_breaks_it_in_every_protocol() {
    let server = provider::Provider::start().await;
    let ollama = json!({"message": {"role": "assistant", "content": "Hel"}, "done": false});
    for (name, script, pieces) in [
        ("claude-sonnet-4-5", anthropic_text(), 2),
        (
            "gemini-2.5-flash",
            Script::stream().data(gemini_text("Hel")),
            1,
        ),
        ("gpt-4o", Script::begin().say("Hel"), 1),
        (
            "gpt-5",
            Script::stream().data(json!({"type": "response.output_text.delta", "delta": "Hel"})),
            1,
        ),
        ("llama3", Script::stream().write(format!("{ollama}\n")), 1),
    ] {
        server.answer(script.end_early());
        let outcome = ask(&native_model(&server, name), prompt("hi")).await;
        assert_eq!(outcome.len(), pieces + 1, "{name}: {outcome:?}");
        let last = outcome.last().expect("something");
        assert!(matches!(last, Err(Error::Broken(_))), "{name}: {last:?}");
    }
}

#[tokio::test]
async fn openais_newer_protocol_is_spoken() {
    let server = provider::Provider::start().await;
    let item = json!({"type": "function_call", "call_id": "c1", "name": "add", "arguments": ""});
    let usage = json!({"input_tokens": 4, "output_tokens": 2, "total_tokens": 6});
    let response = json!({
        "id": "resp_1", "object": "response", "model": "gpt-5", "status": "completed",
        "created_at": 1, "output": [], "usage": usage});
    server.answer(
        Script::stream()
            .data(json!({"type": "response.output_text.delta", "delta": "Hel"}))
            .data(json!({"type": "response.output_item.added", "output_index": 1, "item": item}))
            .data(json!({"type": "response.function_call_arguments.delta",
                         "output_index": 1, "delta": "{\"x\": "}))
            .data(json!({"type": "response.function_call_arguments.delta",
                         "output_index": 1, "delta": "1}"}))
            .data(json!({"type": "response.completed", "response": response})),
    );
    let outcome = ask(&native_model(&server, "gpt-5"), prompt("hi")).await;
    let pieces = [
        text("Hel"),
        call_piece(0, Some("c1"), Some("add"), r#"{"x": "#),
        call_piece(0, None, None, "1}"),
    ];
    assert_eq!(outcome[..3], pieces);
    assert_eq!(end(&outcome).tool_calls, [call("c1", "add", r#"{"x": 1}"#)]);
    assert_eq!(server.requests()[0].path, "/v1/responses");
    // Nothing is left with the provider that the session's owner cannot delete.
    assert_eq!(server.requests()[0].body["store"], json!(false));
}

#[tokio::test]
async fn a_provider_keeps_its_place_and_key_whatever_model_a_prompt_names() {
    let server = provider::Provider::start().await;
    server.always(anthropic_end(anthropic_text(), "end_turn"));
    let model = native_model(&server, "claude-sonnet-4-5");
    for (name, sent) in [
        ("gpt-4o", true),
        ("openai::gpt-4o", false),
        ("a/../b", false),
    ] {
        let asked = Prompt {
            model: Some(name.to_owned()),
            ..prompt("hi")
        };
        let before = server.request_count();
        let outcome = ask(&model, asked).await;
        assert_eq!(server.request_count() > before, sent, "{name}: {outcome:?}");
        if !sent {
            assert_eq!(outcome, [Err(Error::UnknownModel(name.to_owned()))]);
        }
    }
    let request = &server.requests()[0];
    assert_eq!(request.path, "/v1/messages");
    assert_eq!(request.body["model"], "gpt-4o");
}

// Logs.

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// One thread, so that the subscriber of this thread sees all that happens.
#[tokio::test(flavor = "current_thread")]
async fn no_text_of_a_conversation_is_logged() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    tracing::info!("the log works");

    let server = provider::Provider::start().await;
    for script in [
        Script::text(["SECRET"]),
        Script::refusal(400, "x", "SECRET"),
        Script::begin().say("SECRET").fail("SECRET"),
        Script::begin().write("data: {\"SECRET\n\n").end_early(),
        Script::begin()
            .write(&b"data: SECRET \xff\n\n"[..])
            .end_early(),
        Script::begin().say("SECRET").hang_up(),
    ] {
        server.answer(script);
        ask(&model(&server), prompt("SECRET")).await;
    }
    for event in ["error", "an unknown one"] {
        server.answer(anthropic_text().event(event, json!({"x": "SECRET"})));
        ask(
            &native_model(&server, "claude-sonnet-4-5"),
            prompt("SECRET"),
        )
        .await;
    }
    server.answer(Script::stream().data(json!({"type": 1, "x": "SECRET"})));
    ask(&native_model(&server, "gpt-5"), prompt("SECRET")).await;
    server.answer(Script::stream().data(json!({"error": {"message": "SECRET"}})));
    ask(&native_model(&server, "gemini-2.5-flash"), prompt("SECRET")).await;

    let log = String::from_utf8(log.0.lock().expect("no panic").clone()).expect("text");
    assert!(log.contains("the log works"));
    let line = log.lines().find(|line| line.contains("SECRET"));
    assert_eq!(line, None);
    assert!(!log.contains("sk-native"));
}

// Retries.

fn impatient() -> Policy {
    Policy {
        base: Duration::from_millis(1),
        ..Policy::default()
    }
}

fn retrying(server: &provider::Provider, policy: Policy) -> Retry {
    Retry::new(Arc::new(model(server)), policy)
}

#[tokio::test]
async fn a_failure_before_the_first_piece_is_tried_again() {
    for failure in [
        Script::refusal(429, "x", "slow down"),
        Script::refusal(503, "x", "oh"),
        Script::begin().end_early(),
        Script::begin().fail("oh"),
        Script::no_answer(),
    ] {
        let server = provider::Provider::start().await;
        server.answer(failure.clone());
        server.answer(failure);
        server.answer(Script::text(["Hel", "lo"]));
        let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
        assert_eq!(outcome[..2], [text("Hel"), text("lo")]);
        assert_eq!(outcome.len(), 3);
        let requests = server.requests();
        assert_eq!(requests.len(), 3);
        assert_eq!(requests[0].body, requests[2].body);
    }
}

#[tokio::test]
async fn a_failure_after_the_first_piece_is_not_tried_again() {
    let server = provider::Provider::start().await;
    server.answer(Script::begin().say("a").fail("oh"));
    server.answer(Script::text(["b"]));
    let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
    assert_eq!(outcome[0], text("a"));
    assert!(
        matches!(outcome[1..], [Err(Error::Broken(_))]),
        "{outcome:?}"
    );
    assert_eq!(server.request_count(), 1);
}

#[tokio::test]
async fn attempts_are_counted() {
    let server = provider::Provider::start().await;
    server.always(Script::refusal(500, "x", "oh"));
    let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
    assert!(
        matches!(outcome[..], [Err(Error::Unavailable { .. })]),
        "{outcome:?}"
    );
    assert_eq!(server.request_count(), 4);
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    for status in [400, 401, 404] {
        let error = json!({"error": {"message": "no", "code": status}});
        for refusal in [
            Script::refusal(status, "x", "no"),
            Script::begin().data(error),
        ] {
            let server = provider::Provider::start().await;
            server.always(refusal);
            let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
            assert_eq!(outcome.len(), 1);
            assert_eq!(server.request_count(), 1, "{status}");
        }
    }
}

#[tokio::test]
async fn a_provider_that_says_when_is_asked_then() {
    let server = provider::Provider::start().await;
    server.answer(Script::refusal(429, "x", "slow down").header("retry-after", "1"));
    server.answer(Script::text(["a"]));
    let begun = Instant::now();
    let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
    assert_eq!(outcome[0], text("a"));
    assert!(begun.elapsed() >= Duration::from_secs(1));

    server.answer(Script::refusal(429, "x", "slow down").header("retry-after", "31"));
    let outcome = ask(&retrying(&server, impatient()), prompt("hi")).await;
    let retry_after = Some(Duration::from_secs(31));
    assert_eq!(outcome, [Err(Error::RateLimited { retry_after })]);
    assert_eq!(server.request_count(), 3);
}

#[tokio::test]
async fn dropping_a_retry_asks_no_more() {
    let server = provider::Provider::start().await;
    server.always(Script::silence());
    let model = Arc::new(retrying(&server, impatient()));
    let asked = tokio::spawn({
        let model = Arc::clone(&model);
        async move { model.answer(prompt("hi")).await.is_ok() }
    });
    server.wait_for_requests(1).await;
    asked.abort();
    assert_eq!(server.wait_for_outcome(0).await, Outcome::ClientLeft);
    assert_eq!(server.request_count(), 1);
}

#[tokio::test]
async fn connections_are_kept_for_as_many_prompts_as_were_asked_at_once() {
    const AT_ONCE: usize = 16;
    const ROUNDS: usize = 10;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = Settings {
        url: Some(format!("http://{}/v1", listener.local_addr().unwrap())),
        ..Settings::new("test-model")
    };
    let model = Provider::new(settings, no_keys).expect("good settings");
    let connections = Arc::new(AtomicUsize::new(0));
    let serving = tokio::spawn({
        let (connections, all) = (Arc::clone(&connections), Arc::new(Barrier::new(AT_ONCE)));
        async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Ordering::Relaxed);
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    while provider::read_request(&mut stream).await.is_some() {
                        all.wait().await;
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                                       content-length: 14\r\n\r\ndata: [DONE]\n\n";
                        stream.write_all(answer).await.unwrap();
                    }
                });
            }
        }
    });
    for _ in 0..ROUNDS {
        let asked = (0..AT_ONCE).map(|_| ask(&model, prompt("hi")));
        for outcome in futures_util::future::join_all(asked).await {
            end(&outcome);
        }
    }
    // A connection that is free a moment too late is made anew.
    let made = connections.load(Ordering::Relaxed);
    assert!(made < 3 * AT_ONCE, "{made} connections");
    serving.abort();
}
