//! Windows through the service: what GetMessages gives and what Chat gives to the model.
//! (Which messages make a window is tested in window.rs, what reading one costs in redis.rs.)

mod harness;

use std::sync::Arc;

use chat_memory::{
    model::provider as models,
    pb::{self, GetMessagesRequest},
};
use harness::{
    provider::{Provider, Script},
    server::{
        Client, Options, TestServer, append, chat, contents, fields, get, message, reason, server,
        server_with, tell, user,
    },
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

fn window(session: &str, last_turns: Option<i32>, max_tokens: Option<i32>) -> GetMessagesRequest {
    GetMessagesRequest {
        last_turns,
        max_tokens,
        ..get(session)
    }
}

fn answer(text: &str) -> pb::Message {
    message(pb::Role::Assistant, text)
}

fn call(id: &str) -> pb::Message {
    pb::Message {
        tool_calls: vec![pb::ToolCall {
            id: id.to_owned(),
            name: "add".to_owned(),
            arguments: "{}".to_owned(),
        }],
        ..answer("")
    }
}

fn result(id: &str) -> pb::Message {
    pb::Message {
        tool_call_id: id.to_owned(),
        ..message(pb::Role::Tool, "1")
    }
}

async fn fill(client: &mut Client, session: &str, messages: Vec<pb::Message>) {
    for batch in messages.chunks(100) {
        client
            .append(append(session, batch.to_vec()))
            .await
            .unwrap();
    }
}

async fn read(client: &mut Client, request: GetMessagesRequest) -> pb::GetMessagesResponse {
    let response = client.get_messages(request).await;
    response.unwrap().into_inner()
}

fn sequences(response: &pb::GetMessagesResponse) -> Vec<i64> {
    response.messages.iter().map(|m| m.sequence).collect()
}

/// The numbers that a status carries.
fn numbers(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let metadata = details.error_info().unwrap().metadata.clone();
    (metadata["needed"].clone(), metadata["max_tokens"].clone())
}

#[tokio::test]
async fn a_window_of_a_long_session_has_its_first_system_messages_and_whole_exchanges() {
    let server = server().await;
    let mut client = server.client().await;
    let mut messages = vec![message(pb::Role::System, "be kind"); 2];
    for number in 0..100 {
        messages.push(user(&format!("question {number}")));
        messages.push(call("c"));
        messages.push(result("c"));
        messages.push(answer("yes"));
    }
    fill(&mut client, "s", messages).await;

    let found = read(&mut client, window("s", Some(2), None)).await;
    let newest = [395, 396, 397, 398, 399, 400, 401, 402];
    assert_eq!(sequences(&found), [&[1, 2][..], &newest[..]].concat());
    assert_eq!(found.tokenizer, "o200k_base");
    // 3, the role, the text; a call is its name, its arguments and 3 more.
    let (system, question, call, result, yes) =
        (3 + 1 + 2, 3 + 1 + 3, 3 + 1 + 5, 3 + 1 + 1, 3 + 1 + 1);
    let exchange = question + call + result + yes;
    assert_eq!(found.token_count, 3 + 2 * system + 2 * exchange);
    assert_eq!(found.next_page_token, "");

    // The same by tokens, and not with one less.
    let tokens = i32::try_from(found.token_count).unwrap();
    let by_tokens = read(&mut client, window("s", None, Some(tokens))).await;
    assert_eq!(by_tokens, found);
    let less = read(&mut client, window("s", None, Some(tokens - 1))).await;
    assert_eq!(sequences(&less), [&[1, 2][..], &newest[4..]].concat());

    // The smallest bound decides.
    let mut both = window("s", Some(50), Some(tokens));
    both.last_messages = Some(7);
    assert_eq!(
        sequences(&read(&mut client, both.clone()).await),
        sequences(&less)
    );
    both.last_messages = Some(1);
    assert_eq!(sequences(&read(&mut client, both).await), sequences(&less));
    let all = read(&mut client, window("s", Some(1_000), Some(2_000_000))).await;
    assert_eq!(sequences(&all), (1..=402).collect::<Vec<_>>());

    // As it was before a message.
    let mut earlier = window("s", Some(1), None);
    earlier.before_sequence = Some(7);
    earlier.model = "gpt-4".to_owned();
    let earlier = read(&mut client, earlier).await;
    assert_eq!(sequences(&earlier), [1, 2, 3, 4, 5, 6]);
    assert_eq!(earlier.tokenizer, "cl100k_base");
    let nothing = read(&mut client, window("nobody", Some(1), None)).await;
    assert_eq!((nothing.messages.len(), nothing.token_count), (0, 0));

    // Without these bounds it is a page as ever.
    let mut page = get("s");
    page.last_messages = Some(2);
    let page = read(&mut client, page).await;
    assert_eq!(sequences(&page), [401, 402]);
    assert_eq!((page.token_count, page.tokenizer.as_str()), (0, ""));
}

#[tokio::test]
async fn a_newest_exchange_above_the_budget_is_refused_with_the_numbers() {
    let server = server().await;
    let mut client = server.client().await;
    let system = message(pb::Role::System, "be kind");
    fill(
        &mut client,
        "s",
        vec![system, user("hello"), answer("hello")],
    )
    .await;
    let status = client
        .get_messages(window("s", None, Some(18)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(reason(&status), "WINDOW_TOO_SMALL");
    assert_eq!(numbers(&status), ("19".to_owned(), "18".to_owned()));
    let found = read(&mut client, window("s", None, Some(19))).await;
    assert_eq!(found.token_count, 19);
}

#[tokio::test]
async fn a_window_fits_into_a_response() {
    let server = server().await;
    let mut client = server.client().await;
    let data = pb::InlineData {
        media_type: "image/png".to_owned(),
        data: vec![0; 700_000].into(),
    };
    let large = pb::Message {
        parts: vec![pb::ContentPart {
            part: Some(pb::content_part::Part::InlineData(data)),
        }],
        ..user("")
    };
    for _ in 0..3 {
        fill(&mut client, "s", vec![large.clone(), answer("small")]).await;
    }
    let mut request = window("s", Some(10), None);
    assert_eq!(
        sequences(&read(&mut client, request.clone()).await),
        [1, 2, 3, 4, 5, 6]
    );
    request.include_raw = true;
    assert_eq!(sequences(&read(&mut client, request).await), [5, 6]);
    // One question of five large messages is too large for any.
    for _ in 0..5 {
        fill(&mut client, "t", vec![large.clone()]).await;
    }
    let status = client.get_messages(window("t", Some(1), None)).await;
    let status = status.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "HISTORY_TOO_LARGE")
    );
}

#[tokio::test]
async fn bad_bounds_and_what_no_window_has_are_named() {
    let server = server().await;
    let mut client = server.client().await;
    let with = |change: fn(&mut GetMessagesRequest)| {
        let mut request = window("s", Some(1), None);
        change(&mut request);
        request
    };
    let bad = [
        (with(|r| r.last_turns = Some(0)), "last_turns"),
        (with(|r| r.last_turns = Some(1_001)), "last_turns"),
        (with(|r| r.max_tokens = Some(0)), "max_tokens"),
        (with(|r| r.max_tokens = Some(2_000_001)), "max_tokens"),
        (with(|r| r.last_messages = Some(0)), "last_messages"),
        (with(|r| r.last_messages = Some(10_001)), "last_messages"),
        (with(|r| r.page_size = 1), "page_size"),
        (with(|r| r.page_token = "x".into()), "page_token"),
        (with(|r| r.after_sequence = Some(1)), "after_sequence"),
        (with(|r| r.before_sequence = Some(0)), "before_sequence"),
        (with(|r| r.order = 2), "order"),
        (with(|r| r.order = 9), "order"),
        (with(|r| r.model = "\n".into()), "model"),
        (
            with(|r| (r.last_turns, r.model) = (None, "m".into())),
            "model",
        ),
    ];
    for (request, field) in bad {
        let status = client.get_messages(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert_eq!(fields(&status), [field]);
    }
    let bad = [
        ((Some(0), None), "last_turns"),
        ((Some(1_001), None), "last_turns"),
        ((None, Some(-1)), "max_tokens"),
        ((None, Some(2_000_001)), "max_tokens"),
    ];
    for ((last_turns, max_tokens), field) in bad {
        let request = pb::ChatRequest {
            last_turns,
            max_tokens,
            ..chat("s", "hi")
        };
        let status = client.chat(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert_eq!(fields(&status), [field]);
    }
}

async fn with_strict_provider() -> (Provider, TestServer) {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
    let provider = Provider::start().await;
    provider.be_strict();
    let settings = models::Settings {
        url: Some(provider.url()),
        ..models::Settings::new("test-model")
    };
    let model = models::Provider::new(settings, |_| None).expect("a model");
    let options = Options {
        model: Arc::new(model),
        ..Options::default()
    };
    let server = server_with(options).await;
    (provider, server)
}

/// The texts that the model was given last.
fn given(provider: &Provider) -> Vec<String> {
    let requests = provider.requests();
    let messages = requests.last().unwrap().body["messages"].clone();
    let texts = messages.as_array().unwrap().iter();
    texts
        .map(|message| message["content"].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[tokio::test]
async fn a_turn_has_its_window_and_says_what_it_takes() {
    let (provider, server) = with_strict_provider().await;
    provider.always(Script::text(["fine"]));
    let mut client = server.client().await;
    let mut messages = vec![message(pb::Role::System, "be kind")];
    for number in 0..60 {
        messages.extend([user(&number.to_string()), answer("ok")]);
    }
    fill(&mut client, "s", messages).await;
    let mut request = chat("s", "hello");
    request.last_turns = Some(1);
    let started = tell(&mut client, request.clone()).await.started.unwrap();
    assert_eq!(given(&provider), ["be kind", "59", "ok", "hello"]);
    assert_eq!(
        (started.history_messages, started.history_tokens),
        (3, 6 + 5 + 5)
    );
    assert_eq!(started.tokenizer, "o200k_base");

    // Prompt, system prompt, the first message and the new one take 20; an exchange 10.
    request.last_turns = None;
    request.system_prompt = "be short".to_owned();
    request.max_tokens = Some(3 + 6 + 6 + 5 + 19);
    request.model = "gpt-4".to_owned();
    let started = tell(&mut client, request.clone()).await.started.unwrap();
    assert_eq!(
        given(&provider),
        ["be short", "be kind", "hello", "fine", "hello"]
    );
    assert_eq!(
        (started.history_tokens, started.tokenizer.as_str()),
        (16, "cl100k_base")
    );

    // With less than what must be sent, nothing is.
    let (asked, stored) = (
        provider.request_count(),
        contents(&mut client, "s").await.len(),
    );
    request.max_tokens = Some(19);
    let told = tell(&mut client, request.clone()).await;
    let error = told.error.unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert_eq!(reason(&error), "WINDOW_TOO_SMALL");
    assert_eq!(numbers(&error), ("20".to_owned(), "19".to_owned()));
    assert_eq!(provider.request_count(), asked);
    assert_eq!(contents(&mut client, "s").await.len(), stored);
    request.max_tokens = Some(20);
    let started = tell(&mut client, request).await.started.unwrap();
    assert_eq!((started.history_messages, started.history_tokens), (1, 6));

    // Without a window by turns or tokens, nothing is counted.
    let started = tell(&mut client, chat("s", "hello")).await.started.unwrap();
    assert_eq!(
        (started.history_tokens, started.tokenizer.as_str()),
        (0, "")
    );
    // Of the newest 50 messages, and the first.
    assert_eq!(started.history_messages, 51);
}

#[tokio::test]
async fn results_that_do_not_fit_their_calls_are_refused_before_the_model_is_asked() {
    let (provider, server) = with_strict_provider().await;
    let mut client = server.client().await;
    let both = pb::Message {
        tool_calls: [call("a").tool_calls, call("b").tool_calls].concat(),
        ..answer("")
    };
    fill(&mut client, "s", vec![user("hello"), both]).await;
    let request = |messages: Vec<pb::Message>| pb::ChatRequest {
        messages,
        ..chat("s", "")
    };
    let bad = [
        (vec![user("and"), result("a"), result("b")], "messages[1]"),
        (vec![result("a"), user("and"), result("b")], "messages[2]"),
        (vec![result("a"), user("and")], "messages"),
        (vec![result("a")], "messages"),
    ];
    for (messages, field) in bad {
        let told = tell(&mut client, request(messages)).await;
        let error = told.error.expect(field);
        assert_eq!(error.code(), Code::InvalidArgument, "{field}");
        assert_eq!(
            (reason(&error), fields(&error)),
            ("INVALID_FIELD".into(), vec![field.into()])
        );
    }
    assert_eq!(provider.request_count(), 0);
    assert_eq!(contents(&mut client, "s").await.len(), 2);

    // A result that was appended before counts; what follows the others may be anything.
    fill(&mut client, "s", vec![result("b")]).await;
    provider.answer(Script::text(["fine"]));
    let told = tell(&mut client, request(vec![result("a"), user("and")])).await;
    assert_eq!((told.text(), told.reason()), ("fine".into(), String::new()));
    assert_eq!(given(&provider), ["hello", "", "1", "1", "and"]);
}

#[tokio::test]
async fn a_long_chat_with_tools_never_sends_what_a_provider_refuses() {
    let (provider, server) = with_strict_provider().await;
    let mut client = server.client().await;
    let calls = |turn: usize, count: usize| {
        let mut script = Script::begin();
        for index in 0..count {
            script = script.call(index, &format!("c{turn}.{index}"), "add");
            script = script.arguments(index, "{}");
        }
        script.finish("tool_calls").done()
    };
    let (mut cut, mut asked) = (0, 0);
    for turn in 0..500_usize {
        let bounds = |mut request: pb::ChatRequest| {
            request.max_tokens = (turn % 4 != 3).then(|| 60 + (turn as i32 * 7) % 90);
            request.last_turns = (turn % 3 == 0).then_some(1 + turn as i32 % 4);
            request.last_messages = (turn % 5 == 0).then_some(1 + turn as i32 % 9);
            request
        };
        let count = turn % 4;
        let mut request = bounds(chat("s", &format!("question {turn}")));
        for step in 0..=usize::from(turn % 7 == 0) {
            let ids = (0..count).map(|index| format!("c{turn}{step}.{index}"));
            provider.answer(match count {
                0 => Script::text(["the answer"]),
                _ => calls(turn * 10 + step, count),
            });
            let told = tell(&mut client, request.clone()).await;
            assert_eq!(told.reason(), "", "turn {turn}: {:?}", told.error);
            asked += 1;
            cut += usize::from((told.started.unwrap().history_messages as usize) < turn);
            let results = ids.map(|id| result(&id)).collect::<Vec<_>>();
            if results.is_empty() {
                break;
            }
            request = bounds(chat("s", ""));
            request.max_tokens = None;
            request.messages = results;
        }
        // Some clients never bring the results, and some turns are stopped before them.
        if count == 0 || turn % 6 == 5 {
            continue;
        }
        provider.answer(Script::text(["done"]));
        let told = tell(&mut client, request).await;
        assert_eq!(told.reason(), "", "turn {turn}: {:?}", told.error);
        asked += 1;
    }
    assert_eq!(provider.request_count(), asked);
    assert!(cut > 400, "{cut} histories were cut");
}
