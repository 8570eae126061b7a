//! The service as its clients see it: a real server over TCP and over a Unix socket.
//! (What stores promise is tested in store_contract.rs, what a turn promises in chat.rs.)

mod harness;

use chat_memory::{
    message::{MESSAGE_BYTES_MAX, PAGE_BYTES_MAX},
    pb,
};
use harness::server::{append, chat, clear, contents, fields, get, message, reason, server, user};
use prost::Message as _;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

#[tokio::test]
async fn what_is_appended_is_read_over_tcp_and_over_a_unix_socket() {
    let server = server().await;
    let mut tcp = server.client().await;
    let mut unix = server.unix_client().await;

    let stored = tcp
        .append(append("s", vec![user("one"), user("two")]))
        .await
        .unwrap();
    let stored = stored.into_inner().messages;
    assert_eq!(
        stored.iter().map(|m| m.sequence).collect::<Vec<_>>(),
        [1, 2]
    );
    assert!(
        stored
            .iter()
            .all(|m| m.id.starts_with("cm_") && m.create_time.is_some())
    );

    let read = unix.get_messages(get("s")).await.unwrap().into_inner();
    assert_eq!(read.messages, stored);
    assert_eq!(read.next_page_token, "");
}

#[tokio::test]
async fn every_field_of_a_message_comes_back() {
    let server = server().await;
    let mut client = server.client().await;
    let text = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.to_owned())),
    };
    let part = |part| pb::ContentPart { part: Some(part) };
    let mut question = message(pb::Role::User, "");
    question.id = "q-1".to_owned();
    question.name = "ann".to_owned();
    question.parts = vec![
        part(pb::content_part::Part::Text("look: ".into())),
        part(pb::content_part::Part::ImageUrl(pb::ImageUrl {
            url: "https://example.com/a.png".into(),
            detail: "low".into(),
        })),
        part(pb::content_part::Part::InlineData(pb::InlineData {
            media_type: "image/png".into(),
            data: vec![0, 1, 2].into(),
        })),
        part(pb::content_part::Part::InlineData(pb::InlineData {
            media_type: "application/pdf".into(),
            data: vec![3, 4].into(),
        })),
        part(pb::content_part::Part::Json(
            r#"{"type": "input_audio", "n": 1.0}"#.into(),
        )),
        part(pb::content_part::Part::Text("🎉".into())),
    ];
    question.metadata = Some(prost_types::Struct {
        fields: [("source".to_owned(), text("web"))].into(),
    });
    let mut answer = message(pb::Role::Assistant, "");
    answer.reasoning = "hm".to_owned();
    answer.tool_calls = vec![pb::ToolCall {
        id: "c1".into(),
        name: "add".into(),
        arguments: r#"{"a": 1}"#.into(),
    }];
    answer.usage = Some(pb::Usage {
        input_tokens: 3,
        output_tokens: 4,
        total_tokens: 0,
    });
    let mut result = message(pb::Role::Tool, "");
    result.tool_call_id = "c1".to_owned();
    let mut other = message(pb::Role::Other, "meh");
    other.role_name = "critic".to_owned();
    let given = vec![
        question,
        answer,
        result,
        other,
        message(pb::Role::System, "be kind"),
    ];

    let stored = client
        .append(append("s", given.clone()))
        .await
        .unwrap()
        .into_inner();
    let read = client.get_messages(get("s")).await.unwrap().into_inner();
    assert_eq!(read.messages, stored.messages);
    for (mut read, mut given) in read.messages.into_iter().zip(given) {
        assert_eq!(read.sequence.signum(), 1);
        if given.id.is_empty() {
            read.id.clear();
        }
        read.sequence = 0;
        read.create_time = None;
        if !given.parts.is_empty() {
            given.content = "look: 🎉".to_owned();
        }
        if let Some(usage) = &mut given.usage {
            usage.total_tokens = 7;
        }
        assert_eq!(read, given);
    }
}

#[tokio::test]
async fn what_was_read_can_be_appended_as_it_is() {
    let server = server().await;
    let mut client = server.client().await;
    client
        .append(append("a", vec![user("one"), user("two")]))
        .await
        .unwrap();
    let mut request = get("a");
    request.include_raw = true;
    let read = client
        .get_messages(request)
        .await
        .unwrap()
        .into_inner()
        .messages;
    assert!(
        read.iter()
            .all(|m| m.raw_size == m.raw.len() as i64 && m.raw_size > 0)
    );
    let copied = client
        .append(append("b", read.clone()))
        .await
        .unwrap()
        .into_inner()
        .messages;
    for (copy, original) in copied.iter().zip(&read) {
        assert_eq!((&copy.id, &copy.content), (&original.id, &original.content));
        assert!(copy.raw.is_empty());
    }
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_answer_and_stores_nothing() {
    let server = server().await;
    let mut client = server.client().await;
    let mut request = append("s", vec![user("one"), user("two")]);
    request.request_id = "r1".to_owned();
    request.messages[1].id = "own".to_owned();
    let first = client.append(request.clone()).await.unwrap().into_inner();
    client
        .append(append("s", vec![user("three")]))
        .await
        .unwrap();
    let second = client.append(request.clone()).await.unwrap().into_inner();
    assert_eq!(first, second);
    // What only the server gives is ignored in requests, here too.
    let mut with_output = request.clone();
    for (given, stored) in with_output.messages.iter_mut().zip(first.messages.clone()) {
        *given = pb::Message {
            id: given.id.clone(),
            interrupted: true,
            turn_id: "t".to_owned(),
            raw: b"raw".to_vec().into(),
            ..stored
        };
    }
    let third = client.append(with_output).await.unwrap().into_inner();
    assert_eq!(first, third);
    assert_eq!(contents(&mut client, "s").await, ["one", "two", "three"]);

    request.messages[0].content = "other".to_owned();
    let status = client.append(request).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "REQUEST_ID_REUSED")
    );
    assert_eq!(fields(&status), ["request_id"]);
    assert_eq!(contents(&mut client, "s").await.len(), 3);
}

#[tokio::test]
async fn a_condition_that_does_not_hold_stores_nothing_and_says_the_last_sequence() {
    use tonic_types::StatusExt as _;
    let server = server().await;
    let mut client = server.client().await;
    let mut request = append("s", vec![user("one")]);
    request.expected_last_sequence = Some(0);
    client.append(request.clone()).await.unwrap();
    let status = client.append(request).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "SEQUENCE_MISMATCH")
    );
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().metadata["last_sequence"], "1");
    assert_eq!(contents(&mut client, "s").await, ["one"]);
}

#[tokio::test]
async fn clear_says_how_many_and_sequences_go_on() {
    let server = server().await;
    let mut client = server.client().await;
    client
        .append(append("s", vec![user("one"), user("two")]))
        .await
        .unwrap();
    assert_eq!(
        client
            .clear(clear("s"))
            .await
            .unwrap()
            .into_inner()
            .deleted_count,
        2
    );
    assert_eq!(
        client
            .clear(clear("s"))
            .await
            .unwrap()
            .into_inner()
            .deleted_count,
        0
    );
    let stored = client
        .append(append("s", vec![user("three")]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stored.messages[0].sequence, 3);
}

#[tokio::test]
async fn pages_in_both_directions_cover_everything_once_while_others_append() {
    let server = server().await;
    let mut client = server.client().await;
    for number in 0..25 {
        client
            .append(append("s", vec![user(&number.to_string())]))
            .await
            .unwrap();
    }
    for (order, expected) in [
        (pb::Order::OldestFirst, (1..=25).collect::<Vec<i64>>()),
        (pb::Order::NewestFirst, (1..=25).rev().collect()),
    ] {
        let mut request = get("s");
        request.order = order.into();
        request.page_size = 4;
        request.before_sequence = Some(26);
        let mut sequences = Vec::new();
        loop {
            let page = client
                .get_messages(request.clone())
                .await
                .unwrap()
                .into_inner();
            assert!(page.messages.len() <= 4);
            sequences.extend(page.messages.iter().map(|message| message.sequence));
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
            client
                .append(append("s", vec![user("meanwhile")]))
                .await
                .unwrap();
        }
        assert_eq!(sequences, expected);
    }
}

#[tokio::test]
async fn a_window_of_the_last_messages_comes_oldest_first_and_stays_fixed_over_its_pages() {
    let server = server().await;
    let mut client = server.client().await;
    for number in 1..=10 {
        client
            .append(append("s", vec![user(&number.to_string())]))
            .await
            .unwrap();
    }
    let mut request = get("s");
    request.last_messages = Some(5);
    let page = client
        .get_messages(request.clone())
        .await
        .unwrap()
        .into_inner();
    let sequences: Vec<_> = page
        .messages
        .iter()
        .map(|message| message.sequence)
        .collect();
    assert_eq!(
        (sequences, page.next_page_token.as_str()),
        (vec![6, 7, 8, 9, 10], "")
    );

    request.page_size = 3;
    let first = client
        .get_messages(request.clone())
        .await
        .unwrap()
        .into_inner();
    client.append(append("s", vec![user("11")])).await.unwrap();
    request.page_token = first.next_page_token;
    let second = client.get_messages(request).await.unwrap().into_inner();
    let sequences: Vec<_> = second
        .messages
        .iter()
        .map(|message| message.sequence)
        .collect();
    assert_eq!(
        (sequences, second.next_page_token.as_str()),
        (vec![9, 10], "")
    );
}

#[tokio::test]
async fn a_page_is_never_above_its_byte_limit() {
    let server = server().await;
    let mut client = server.client().await;
    // The first takes three times its size in the store, and the second as much again on the wire
    // with its stored bytes.
    for text in ["é".repeat(MESSAGE_BYTES_MAX / 2), "x".repeat(600_000)] {
        let session = &text[..2];
        for _ in 0..5 {
            client
                .append(append(session, vec![user(&text)]))
                .await
                .unwrap();
        }
        for include_raw in [false, true] {
            let mut request = get(session);
            request.include_raw = include_raw;
            let mut sequences = Vec::new();
            loop {
                let page = client
                    .get_messages(request.clone())
                    .await
                    .unwrap()
                    .into_inner();
                assert!(
                    page.encoded_len() <= PAGE_BYTES_MAX,
                    "{}",
                    page.encoded_len()
                );
                sequences.extend(page.messages.iter().map(|message| message.sequence));
                assert!(page.messages.iter().all(|message| message.content == text));
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            assert_eq!(sequences, [1, 2, 3, 4, 5]);
        }
    }
}

#[tokio::test]
async fn an_element_that_cannot_be_read_comes_with_its_bytes_and_a_flag_among_the_others() {
    use chat_memory::{message::SessionId, store};
    let server = server().await;
    let mut client = server.client().await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    let junk = store::Append {
        elements: vec![(&b"\xff{junk"[..]).into()],
        request: store::RequestKey::new("test", "junk", b""),
        time_ms: 1,
        expected_last_sequence: None,
        expected_epoch: None,
    };
    server
        .store
        .append(&SessionId::parse("s").unwrap(), junk)
        .await
        .unwrap();
    client
        .append(append("s", vec![user("after")]))
        .await
        .unwrap();
    let read = client
        .get_messages(get("s"))
        .await
        .unwrap()
        .into_inner()
        .messages;
    assert_eq!(read[0].content, "before");
    assert_eq!(
        (read[1].problem(), &read[1].raw[..]),
        (pb::Problem::Unreadable, &b"\xff{junk"[..])
    );
    assert_eq!((read[2].sequence, read[2].content.as_str()), (3, "after"));
}

#[tokio::test]
async fn ids_of_tool_calls_may_be_as_long_as_providers_make_them() {
    let server = server().await;
    let mut client = server.client().await;
    let exchange = |id: String| {
        let mut call = message(pb::Role::Assistant, "");
        call.tool_calls = vec![pb::ToolCall {
            id: id.clone(),
            name: "f".into(),
            ..Default::default()
        }];
        let mut result = message(pb::Role::Tool, "x");
        result.tool_call_id = id;
        append("s", vec![user("q"), call, result])
    };
    let longest = "i".repeat(16 << 10);
    client.append(exchange(longest.clone())).await.unwrap();
    let read = client.get_messages(get("s")).await.unwrap().into_inner();
    assert_eq!(read.messages[1].tool_calls[0].id, longest);
    assert_eq!(read.messages[2].tool_call_id, longest);
    let longer = client.append(exchange(longest + "i")).await.unwrap_err();
    assert_eq!(fields(&longer), ["messages[1].tool_calls[0].id"]);
}

/// Each bad request with the field that its error must name.
fn bad_requests() -> Vec<(pb::AppendRequest, &'static str)> {
    let one = |message: pb::Message| append("s", vec![message]);
    let long_name = "n".repeat(257);
    let mut three_mib_and_one = vec![user(&"x".repeat(MESSAGE_BYTES_MAX)); 3];
    three_mib_and_one.push(user("x"));
    let mut bad = vec![
        (append("", vec![user("x")]), "session_id"),
        (append(&"x".repeat(513), vec![user("x")]), "session_id"),
        (append("a\u{7}b", vec![user("x")]), "session_id"),
        (append("a{b}", vec![user("x")]), "session_id"),
        (append("s", vec![]), "messages"),
        (append("s", vec![user("x"); 101]), "messages"),
        (append("s", three_mib_and_one), "messages"),
        (one(message(pb::Role::Unspecified, "x")), "messages[0].role"),
        (one(user("")), "messages[0].content"),
        (
            one(message(pb::Role::Tool, "x")),
            "messages[0].tool_call_id",
        ),
        (one(user(&"x".repeat(MESSAGE_BYTES_MAX + 1))), "messages[0]"),
    ];
    let mut with = |change: &dyn Fn(&mut pb::AppendRequest), field| {
        let mut request = append("s", vec![user("fine"), user("x")]);
        change(&mut request);
        bad.push((request, field));
    };
    with(&|r| r.request_id = long_name.clone(), "request_id");
    with(
        &|r| r.expected_last_sequence = Some(-1),
        "expected_last_sequence",
    );
    with(&|r| r.messages[1].id = long_name.clone(), "messages[1].id");
    with(&|r| r.messages[1].name = "a\nb".into(), "messages[1].name");
    with(&|r| r.messages[1].role = 99, "messages[1].role");
    with(
        &|r| r.messages[1].role_name = "x".into(),
        "messages[1].role_name",
    );
    with(
        &|r| r.messages[1].tool_call_id = "x".into(),
        "messages[1].tool_call_id",
    );
    with(
        &|r| r.messages[1].tool_calls = vec![pb::ToolCall::default()],
        "messages[1].tool_calls",
    );
    with(
        &|r| r.messages[1].reasoning = "x".into(),
        "messages[1].reasoning",
    );
    with(
        &|r| r.messages[1].usage = Some(pb::Usage::default()),
        "messages[1].usage",
    );
    with(
        &|r| r.messages[1].parts = vec![pb::ContentPart::default()],
        "messages[1].parts[0]",
    );
    bad
}

#[tokio::test]
async fn a_bad_append_names_its_field_and_stores_nothing() {
    let server = server().await;
    let mut client = server.client().await;
    for (request, field) in bad_requests() {
        let status = client.append(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert_eq!(reason(&status), "INVALID_FIELD");
        assert_eq!(fields(&status), [field]);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    assert_eq!(contents(&mut client, "s").await.len(), 0);
}

#[tokio::test]
async fn a_bad_read_names_its_field() {
    let server = server().await;
    let mut client = server.client().await;
    for number in 0..3 {
        client
            .append(append("s", vec![user(&number.to_string())]))
            .await
            .unwrap();
    }
    let mut request = get("s");
    request.page_size = 1;
    let token = client
        .get_messages(request)
        .await
        .unwrap()
        .into_inner()
        .next_page_token;
    let with = |change: &dyn Fn(&mut pb::GetMessagesRequest)| {
        let mut request = get("s");
        change(&mut request);
        request
    };
    let bad = [
        (with(&|r| r.session_id.clear()), "session_id"),
        (with(&|r| r.page_size = -1), "page_size"),
        (with(&|r| r.page_size = 1001), "page_size"),
        (with(&|r| r.last_messages = Some(0)), "last_messages"),
        (with(&|r| r.last_messages = Some(-5)), "last_messages"),
        (with(&|r| r.after_sequence = Some(-1)), "after_sequence"),
        (with(&|r| r.before_sequence = Some(0)), "before_sequence"),
        (with(&|r| r.order = 9), "order"),
        (with(&|r| r.page_token = "made up".into()), "page_token"),
        (
            with(&|r| (r.session_id, r.page_token) = ("t".into(), token.clone())),
            "page_token",
        ),
        (
            with(&|r| (r.order, r.page_token) = (2, token.clone())),
            "page_token",
        ),
    ];
    for (request, field) in bad {
        let status = client.get_messages(request).await.expect_err(field);
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
}

#[tokio::test]
async fn a_bad_turn_names_its_field_and_stores_nothing() {
    let server = server().await;
    let mut client = server.client().await;
    let with = |change: &dyn Fn(&mut pb::ChatRequest)| {
        let mut request = chat("s", "hi");
        change(&mut request);
        request
    };
    let options = |options| move |r: &mut pb::ChatRequest| r.options = Some(options);
    let temperature = pb::ModelOptions {
        temperature: Some(f64::NAN),
        ..Default::default()
    };
    let tokens = pb::ModelOptions {
        max_output_tokens: Some(0),
        ..Default::default()
    };
    let bad = [
        (
            with(&|r| r.session_id = "{".into()),
            Code::InvalidArgument,
            "session_id",
        ),
        (
            with(&|r| r.messages.clear()),
            Code::InvalidArgument,
            "messages",
        ),
        (
            with(&|r| r.messages[0].role = 3),
            Code::InvalidArgument,
            "messages[0].role",
        ),
        (
            with(&|r| r.turn_id = "x".repeat(300)),
            Code::InvalidArgument,
            "turn_id",
        ),
        (
            with(&|r| r.last_messages = Some(0)),
            Code::InvalidArgument,
            "last_messages",
        ),
        (
            with(&|r| r.resume_after = -1),
            Code::InvalidArgument,
            "resume_after",
        ),
        (
            with(&|r| r.tools = vec![pb::Tool::default()]),
            Code::InvalidArgument,
            "tools[0].name",
        ),
        (
            with(&|r| options(temperature.clone())(r)),
            Code::InvalidArgument,
            "options.temperature",
        ),
        (
            with(&|r| options(tokens.clone())(r)),
            Code::InvalidArgument,
            "options.max_output_tokens",
        ),
        (
            with(&|r| r.on_conflict = 9),
            Code::InvalidArgument,
            "on_conflict",
        ),
        (
            with(&|r| r.on_disconnect = 9),
            Code::InvalidArgument,
            "on_disconnect",
        ),
    ];
    for (request, code, field) in bad {
        let status = client.chat(request).await.expect_err(field);
        assert_eq!(
            (status.code(), fields(&status)),
            (code, vec![field.to_owned()])
        );
    }
    assert_eq!(contents(&mut client, "s").await.len(), 0);
}

#[tokio::test]
async fn what_was_stored_is_answered_however_large_it_is() {
    let server = server().await;
    let mut client = server.client().await;
    // As large as a request may be. The answer has a sequence, an id and a time besides.
    let number = prost_types::Value {
        kind: Some(prost_types::value::Kind::NumberValue(0.0)),
    };
    let list = prost_types::ListValue {
        values: vec![number; 170_000],
    };
    let value = prost_types::Value {
        kind: Some(prost_types::value::Kind::ListValue(list)),
    };
    let mut large = user("large");
    large.metadata = Some(prost_types::Struct {
        fields: [("n".to_owned(), value)].into(),
    });
    let mut request = append("s", vec![large.clone(), large, user("small")]);
    request.request_id = "r".to_owned();
    let room = (4 << 20) - request.encoded_len();
    request.messages[2].content = "x".repeat(room - 100);
    for _ in 0..2 {
        let stored = client.append(request.clone()).await.unwrap().into_inner();
        let problems: Vec<_> = stored.messages.iter().map(pb::Message::problem).collect();
        let left_out = problems
            .iter()
            .filter(|problem| **problem == pb::Problem::TooLarge);
        assert_eq!(left_out.count(), 1, "{problems:?}");
        for (sequence, message) in (1..).zip(&stored.messages) {
            assert_eq!(message.sequence, sequence);
            assert!(message.create_time.is_some() && !message.id.is_empty());
        }
        assert_eq!(stored.messages[2].content, request.messages[2].content);
    }
}

#[tokio::test]
async fn a_request_over_the_receive_limit_is_refused_with_details() {
    let server = server().await;
    let mut client = server.client().await;
    let request = append("s", vec![user(&"x".repeat(5 << 20))]);
    let status = client.append(request).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "REQUEST_TOO_LARGE"),
        "{status:?}"
    );
    assert_eq!(contents(&mut client, "s").await.len(), 0);
}

/// A client that sends bytes as they are.
async fn send_raw(
    server: &harness::server::TestServer,
    method: &str,
    bytes: &[u8],
) -> tonic::Status {
    #[derive(Clone, Default)]
    struct Raw;
    impl tonic::codec::Codec for Raw {
        type Encode = Vec<u8>;
        type Decode = ();
        type Encoder = Self;
        type Decoder = Self;
        fn encoder(&mut self) -> Self {
            Self
        }
        fn decoder(&mut self) -> Self {
            Self
        }
    }
    impl tonic::codec::Encoder for Raw {
        type Item = Vec<u8>;
        type Error = tonic::Status;
        fn encode(
            &mut self,
            item: Vec<u8>,
            buffer: &mut tonic::codec::EncodeBuf<'_>,
        ) -> Result<(), tonic::Status> {
            bytes::BufMut::put_slice(buffer, &item);
            Ok(())
        }
    }
    impl tonic::codec::Decoder for Raw {
        type Item = ();
        type Error = tonic::Status;
        fn decode(
            &mut self,
            buffer: &mut tonic::codec::DecodeBuf<'_>,
        ) -> Result<Option<()>, tonic::Status> {
            let length = bytes::Buf::remaining(buffer);
            bytes::Buf::advance(buffer, length);
            Ok(Some(()))
        }
    }
    let mut grpc = tonic::client::Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    let path = format!("/chatmemory.v1.ChatMemory/{method}")
        .parse()
        .unwrap();
    let outcome = grpc.unary(Request::new(bytes.to_vec()), path, Raw).await;
    outcome.expect_err("must be refused")
}

#[tokio::test]
async fn bytes_that_are_no_request_are_the_clients_fault_and_name_the_field() {
    let server = server().await;
    let status = send_raw(&server, "GetMessages", b"\x0a\x02\xc3\x28").await;
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "MALFORMED_REQUEST"),
        "{status:?}"
    );
    assert_eq!(fields(&status), ["session_id"]);
    // AppendRequest { session_id: "s", messages: [{ content: "\xff" }] }
    let status = send_raw(&server, "Append", b"\x0a\x01s\x12\x03\x2a\x01\xff").await;
    assert_eq!(fields(&status), ["messages.content"], "{status:?}");
    let status = send_raw(&server, "Append", b"\xff\xff\xff").await;
    assert_eq!(reason(&status), "MALFORMED_REQUEST");
    let status = send_raw(&server, "Nothing", b"").await;
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unimplemented, "NOT_IMPLEMENTED")
    );
}

#[tokio::test]
async fn more_calls_at_once_than_allowed_are_told_to_come_back() {
    let options = harness::server::Options {
        requests_max: 0,
        ..Default::default()
    };
    // A limit of none at all is no setting that the program takes; it shows the answer.
    let server = harness::server::server_with(options).await;
    let mut client = server.client().await;
    let status = client.get_messages(get("s")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "TOO_MANY_REQUESTS")
    );
}

#[tokio::test]
async fn health_and_both_reflections_answer() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let server = server().await;
    let mut health = HealthClient::new(server.channel().await);
    for service in ["", "chatmemory.v1.ChatMemory"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, 1, "{service}");
    }
    use tonic_reflection::pb::{v1, v1alpha};
    let mut reflection =
        v1::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap();
    assert!(format!("{answer:?}").contains("chatmemory.v1.ChatMemory"));
    let mut reflection =
        v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
    };
    let answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap();
    assert!(format!("{answer:?}").contains("chatmemory.v1.ChatMemory"));
}

#[tokio::test]
async fn a_deadline_in_the_past_is_honoured() {
    let server = server().await;
    let mut client = server.client().await;
    let mut request = Request::new(get("s"));
    request
        .metadata_mut()
        .insert("grpc-timeout", "0n".parse().unwrap());
    let status = client.get_messages(request).await.unwrap_err();
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status:?}"
    );
}
