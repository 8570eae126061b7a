//! Sessions as clients see them, on every store: looked at, changed, listed, rewound, forked and
//! watched. (What stores promise of them is tested in session_contract.rs.)

mod harness;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use chat_memory::{
    model::{Model, provider, retry},
    pb::{self, watch_response::Event},
    turn::State,
    watch::{Notice, Watch},
};
use harness::{
    provider::{Gate, Provider, Script},
    server::{
        Client, Options, TestServer, append, chat, clear, contents, fields, get, message, reason,
        server_on, tell, tell_rest, user,
    },
    stores::{self, Backend},
    wait,
};
use prost::Message as _;
use tonic::{Code, Streaming};

/// A server on a store, with a provider for its model.
struct World {
    server: TestServer,
    provider: Provider,
    backend: Box<dyn Backend>,
}

async fn world(backend: impl Backend + 'static, options: Options) -> World {
    let provider = Provider::start().await;
    let options = Options {
        model: model(&provider),
        ..options
    };
    let directory = tempfile::tempdir().unwrap();
    let server = server_on(backend.store(), directory, options).await;
    World {
        server,
        provider,
        backend: Box::new(backend),
    }
}

/// One world on each store.
async fn worlds() -> [World; 2] {
    [
        world(stores::sqlite().await, Options::default()).await,
        world(stores::redis().await, Options::default()).await,
    ]
}

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

fn assistant(content: &str) -> pb::Message {
    message(pb::Role::Assistant, content)
}

async fn look(client: &mut Client, session: &str) -> Result<pb::Session, tonic::Status> {
    let request = pb::GetSessionRequest {
        session_id: session.to_owned(),
    };
    let response = client.get_session(request).await?.into_inner();
    Ok(response.session.expect("a session"))
}

fn update(session: pb::Session, paths: &[&str]) -> pb::UpdateSessionRequest {
    pb::UpdateSessionRequest {
        session: Some(session),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
    }
}

fn rewind(session: &str, after: i64) -> pb::RewindRequest {
    pb::RewindRequest {
        session_id: session.to_owned(),
        after_sequence: Some(after),
        ..Default::default()
    }
}

async fn watch(client: &mut Client, session: &str, after: i64) -> Streaming<pb::WatchResponse> {
    let request = pb::WatchRequest {
        session_id: session.to_owned(),
        after_sequence: after,
        include_raw: false,
    };
    client.watch(request).await.unwrap().into_inner()
}

/// The next event, as a short text.
async fn told(stream: &mut Streaming<pb::WatchResponse>) -> String {
    let next = tokio::time::timeout(wait::LIMIT, stream.message()).await;
    match next.expect("an event in time") {
        Ok(Some(response)) => match response.event.expect("an event") {
            Event::Message(message) => format!("{} {}", message.sequence, message.content),
            Event::Live(live) => format!("live {}", live.last_sequence),
            Event::Turn(turn) => format!("turn {} {:?}", turn.turn_id, turn.state()),
            Event::Rewound(rewound) => format!("rewound {}", rewound.last_sequence),
            Event::Cleared(pb::Cleared {}) => "cleared".to_owned(),
            Event::Skipped(skipped) => format!("skipped {}", skipped.first_sequence),
        },
        Ok(None) => "end".to_owned(),
        Err(status) => reason(&status),
    }
}

async fn told_all(stream: &mut Streaming<pb::WatchResponse>, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    for _ in 0..count {
        texts.push(told(stream).await);
    }
    texts
}

#[tokio::test]
async fn a_session_says_what_there_is_to_know_of_it() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let missing = look(&mut client, "s").await.unwrap_err();
        assert_eq!(
            (missing.code(), reason(&missing).as_str()),
            (Code::NotFound, "SESSION_NOT_FOUND")
        );

        let messages = vec![user("one"), assistant("two"), user("three")];
        let stored = client.append(append("s", messages)).await.unwrap();
        let stored = stored.into_inner().messages;
        let seen = look(&mut client, "s").await.unwrap();
        assert_eq!(seen.session_id, "s");
        assert_eq!(
            (seen.message_count, seen.first_sequence, seen.last_sequence),
            (3, 1, 3)
        );
        assert_eq!(seen.first_message_time, stored[0].create_time);
        assert_eq!(seen.last_message_time, stored[2].create_time);
        assert!(seen.active_time.is_some() && seen.expire_time.is_none());
        assert_eq!((seen.turn, seen.origin), (None, None));

        client.clear(clear("s")).await.unwrap();
        let gone = look(&mut client, "s").await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound);
    }
}

#[tokio::test]
async fn a_running_turn_and_a_failed_one_say_what_was_asked_and_said() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let gate = Gate::new();
        world
            .provider
            .answer(Script::begin().say("half an ans").wait(&gate).hang_up());
        let mut request = chat("s", "why?");
        request.turn_id = "t".to_owned();
        let mut stream = client.chat(request).await.unwrap().into_inner();
        stream.message().await.unwrap();

        let turn = look(&mut client, "s").await.unwrap().turn.unwrap();
        assert_eq!(
            (turn.turn_id.as_str(), turn.state(), turn.attempt),
            ("t", pb::TurnState::Running, 1)
        );
        assert_eq!(turn.question[0].content, "why?");

        gate.open();
        let told = tell_rest(stream, harness::server::Told::default()).await;
        assert_eq!(told.reason(), "MODEL_STREAM_BROKEN");
        let turn = look(&mut client, "s").await.unwrap().turn.unwrap();
        assert_eq!(turn.state(), pb::TurnState::Failed);
        assert_eq!(turn.reason, "MODEL_STREAM_BROKEN");
        assert!(!turn.error.is_empty());
        assert_eq!(turn.question[0].content, "why?");
        let said = turn.partial_answer.unwrap();
        assert_eq!(
            (said.content.as_str(), said.role()),
            ("half an ans", pb::Role::Assistant)
        );
    }
}

#[tokio::test]
async fn title_metadata_and_time_to_live_are_changed_as_the_mask_says() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let wanted = pb::Session {
            session_id: "s".to_owned(),
            title: "A talk".to_owned(),
            metadata: [("user".to_owned(), "ann".to_owned())].into(),
            ttl: Some(prost_types::Duration {
                seconds: 3600,
                nanos: 0,
            }),
            ..Default::default()
        };
        let missing = client.update_session(update(wanted.clone(), &[])).await;
        assert_eq!(reason(&missing.unwrap_err()), "SESSION_NOT_FOUND");

        client.append(append("s", vec![user("1")])).await.unwrap();
        let response = client.update_session(update(wanted.clone(), &[])).await;
        let all = response.unwrap().into_inner().session.unwrap();
        assert_eq!(
            (&all.title, &all.metadata, &all.ttl),
            (&wanted.title, &wanted.metadata, &wanted.ttl)
        );
        assert!(all.expire_time.is_some());

        // Only what the mask names, also where that empties it.
        let other = pb::Session {
            session_id: "s".to_owned(),
            title: "not this".to_owned(),
            ..Default::default()
        };
        client
            .update_session(update(other.clone(), &["metadata"]))
            .await
            .unwrap();
        let seen = look(&mut client, "s").await.unwrap();
        assert_eq!((seen.title.as_str(), seen.metadata.len()), ("A talk", 0));
        client
            .update_session(update(other, &["ttl"]))
            .await
            .unwrap();
        let seen = look(&mut client, "s").await.unwrap();
        assert_eq!(seen.ttl, None);
    }
}

#[tokio::test]
async fn a_page_of_sessions_fits_into_an_answer() {
    const SESSIONS: usize = 350;
    let pairs = (0..16).map(|n| (format!("{n:064}"), "x".repeat(512)));
    let pairs: HashMap<_, _> = pairs.collect();
    for world in worlds().await {
        let mut client = world.server.client().await;
        for n in 0..SESSIONS {
            let id = format!("{n:03}");
            client.append(append(&id, vec![user("hi")])).await.unwrap();
            let session = pb::Session {
                session_id: id,
                title: "x".repeat(512),
                metadata: pairs.clone(),
                ..Default::default()
            };
            let request = update(session, &["title", "metadata"]);
            client.update_session(request).await.unwrap();
        }
        let mut request = pb::ListSessionsRequest {
            page_size: 1_000,
            ..Default::default()
        };
        let mut ids = BTreeSet::new();
        loop {
            let page = client.list_sessions(request.clone()).await.unwrap();
            let page = page.into_inner();
            let bytes = page.encoded_len();
            assert!(bytes <= 3 << 20, "{bytes} bytes");
            for session in page.sessions {
                assert!(ids.insert(session.session_id));
            }
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        assert_eq!(ids.len(), SESSIONS);
    }
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let world = world(stores::sqlite().await, Options::default()).await;
    let mut client = world.server.client().await;
    let named = |id: &str| pb::Session {
        session_id: id.to_owned(),
        ..Default::default()
    };
    let long = pb::Session {
        title: "x".repeat(513),
        ..named("s")
    };
    let pairs: HashMap<_, _> = (0..17).map(|n| (n.to_string(), String::new())).collect();
    let many = pb::Session {
        metadata: pairs.clone(),
        ..named("s")
    };
    let short = pb::Session {
        ttl: Some(prost_types::Duration {
            seconds: 0,
            nanos: 1,
        }),
        ..named("s")
    };
    for (request, field) in [
        (update(named(""), &["title"]), "session.session_id"),
        (update(named("s"), &[]), "update_mask"),
        (update(named("s"), &["message_count"]), "update_mask"),
        (update(named("s"), &[&"x".repeat(100_000)]), "update_mask"),
        (update(long, &["title"]), "session.title"),
        (update(many, &["metadata"]), "session.metadata"),
        (update(short, &["ttl"]), "session.ttl"),
    ] {
        let status = client.update_session(request).await.unwrap_err();
        assert_eq!(fields(&status), [field]);
        assert_eq!(reason(&status), "INVALID_FIELD");
    }

    let list = pb::ListSessionsRequest::default;
    for (request, field) in [
        (
            pb::ListSessionsRequest {
                page_size: 1001,
                ..list()
            },
            "page_size",
        ),
        (
            pb::ListSessionsRequest {
                page_token: "nonsense".to_owned(),
                ..list()
            },
            "page_token",
        ),
        (
            pb::ListSessionsRequest {
                metadata: pairs,
                ..list()
            },
            "metadata",
        ),
    ] {
        let status = client.list_sessions(request).await.unwrap_err();
        assert_eq!(fields(&status), [field]);
    }

    let mut no_sequence = rewind("s", 0);
    no_sequence.after_sequence = None;
    let status = client.rewind(no_sequence).await.unwrap_err();
    assert_eq!(fields(&status), ["after_sequence"]);
    let status = client.rewind(rewind("s", -1)).await.unwrap_err();
    assert_eq!(fields(&status), ["after_sequence"]);

    for (to, through, field) in [
        ("", None, "new_session_id"),
        ("s", None, "new_session_id"),
        ("t", Some(0), "through_sequence"),
    ] {
        let request = pb::ForkRequest {
            session_id: "s".to_owned(),
            new_session_id: to.to_owned(),
            through_sequence: through,
        };
        let status = client.fork(request).await.unwrap_err();
        assert_eq!(fields(&status), [field]);
    }
}

#[tokio::test]
async fn sessions_are_listed_newest_first_in_pages() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        for id in ["a/1", "b/1", "a/2", "b/2", "a/3"] {
            client.append(append(id, vec![user("1")])).await.unwrap();
            // Another millisecond, by the store's clock.
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        client.append(append("b/1", vec![user("2")])).await.unwrap();

        let ask = |prefix: &str, token: String| pb::ListSessionsRequest {
            page_size: 2,
            page_token: token,
            id_prefix: prefix.to_owned(),
            metadata: HashMap::new(),
        };
        for (prefix, expected) in [
            ("", vec!["b/1", "a/3", "b/2", "a/2", "a/1"]),
            ("a/", vec!["a/3", "a/2", "a/1"]),
            ("c", vec![]),
        ] {
            let mut listed = Vec::new();
            let mut token = String::new();
            loop {
                let response = client.list_sessions(ask(prefix, token)).await.unwrap();
                let page = response.into_inner();
                assert!(page.sessions.len() <= 2);
                listed.extend(page.sessions.into_iter().map(|session| session.session_id));
                token = page.next_page_token;
                if token.is_empty() {
                    break;
                }
            }
            assert_eq!(listed, expected, "{prefix:?}");
        }

        let first = client.list_sessions(ask("", String::new())).await.unwrap();
        let foreign = ask("a/", first.into_inner().next_page_token);
        let status = client.list_sessions(foreign).await.unwrap_err();
        assert_eq!(fields(&status), ["page_token"]);
    }
}

#[tokio::test]
async fn a_conversation_goes_another_way_after_a_rewind() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        for (question, answer) in [("one?", "one."), ("two?", "two."), ("three?", "three.")] {
            world.provider.answer(Script::text([answer]));
            let told = tell(&mut client, chat("s", question)).await;
            assert_eq!(told.reason(), "");
        }
        let response = client.rewind(rewind("s", 2)).await.unwrap();
        assert_eq!(response.into_inner().deleted_count, 4);
        world.provider.answer(Script::text(["zwei."]));
        let told = tell(&mut client, chat("s", "zwei?")).await;
        assert_eq!(told.started.unwrap().history_messages, 2);
        let page = client.get_messages(get("s")).await.unwrap().into_inner();
        let shown: Vec<_> = page
            .messages
            .iter()
            .map(|m| (m.sequence, m.content.as_str()))
            .collect();
        assert_eq!(
            shown,
            [(1, "one?"), (2, "one."), (7, "zwei?"), (8, "zwei.")]
        );
    }
}

#[tokio::test]
async fn a_running_turn_is_in_the_way_of_a_rewind_unless_it_is_to_stop() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        client
            .append(append("s", vec![user("0"), assistant("0")]))
            .await
            .unwrap();
        let gate = Gate::new();
        world.provider.answer(
            Script::begin()
                .say("some")
                .wait(&gate)
                .finish("stop")
                .done(),
        );
        let mut request = chat("s", "hi");
        request.turn_id = "t".to_owned();
        let mut stream = client.chat(request).await.unwrap().into_inner();
        stream.message().await.unwrap();

        let status = client.rewind(rewind("s", 1)).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Aborted, "TURN_IN_PROGRESS")
        );
        assert_eq!(contents(&mut client, "s").await, ["0", "0"]);

        let mut forced = rewind("s", 1);
        forced.stop_turn = true;
        let response = client.rewind(forced).await.unwrap();
        assert_eq!(response.into_inner().deleted_count, 1);
        let told = tell_rest(stream, harness::server::Told::default()).await;
        assert_eq!(told.reason(), "TURN_STOPPED");
        assert_eq!(contents(&mut client, "s").await, ["0"]);
        gate.open();
    }
}

#[tokio::test]
async fn a_fork_is_a_session_of_its_own() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let messages = vec![user("1"), assistant("2"), user("3"), assistant("4")];
        client.append(append("s", messages)).await.unwrap();
        let fork = pb::ForkRequest {
            session_id: "s".to_owned(),
            new_session_id: "f".to_owned(),
            through_sequence: Some(2),
        };
        let made = client.fork(fork.clone()).await.unwrap().into_inner();
        let made = made.session.unwrap();
        assert_eq!((made.session_id.as_str(), made.message_count), ("f", 2));
        let origin = made.origin.clone().unwrap();
        assert_eq!((origin.session_id.as_str(), origin.sequence), ("s", 2));

        let again = client.fork(fork).await.unwrap().into_inner();
        assert_eq!(again.session.unwrap().message_count, 2);

        client
            .append(append("f", vec![user("other")]))
            .await
            .unwrap();
        assert_eq!(contents(&mut client, "f").await, ["1", "2", "other"]);
        assert_eq!(contents(&mut client, "s").await, ["1", "2", "3", "4"]);
        let whole = |to: &str, from: &str| pb::ForkRequest {
            session_id: from.to_owned(),
            new_session_id: to.to_owned(),
            through_sequence: None,
        };
        let status = client.fork(whole("f", "s")).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::AlreadyExists, "SESSION_EXISTS")
        );
        let status = client.fork(whole("g", "none")).await.unwrap_err();
        assert_eq!(reason(&status), "SESSION_NOT_FOUND");
    }
}

#[tokio::test]
async fn a_watcher_is_told_what_is_there_then_what_comes() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let mut empty = watch(&mut client, "s", 0).await;
        assert_eq!(told(&mut empty).await, "live 0");
        client
            .append(append("s", vec![user("a"), user("b")]))
            .await
            .unwrap();
        assert_eq!(told_all(&mut empty, 2).await, ["1 a", "2 b"]);

        let mut late = watch(&mut client, "s", 1).await;
        assert_eq!(told_all(&mut late, 2).await, ["2 b", "live 2"]);
        client.append(append("s", vec![user("c")])).await.unwrap();
        client
            .append(append("other", vec![user("x")]))
            .await
            .unwrap();
        for stream in [&mut empty, &mut late] {
            assert_eq!(told(stream).await, "3 c");
        }

        world.provider.answer(Script::text(["yes"]));
        let mut request = chat("s", "d");
        request.turn_id = "t".to_owned();
        tell(&mut client, request).await;
        let mut events = Vec::new();
        while events.last().map(String::as_str) != Some("turn t Completed") {
            events.push(told(&mut late).await);
        }
        // Whether the start is told of depends on how soon the turn ended.
        events.retain(|event| event != "turn t Running");
        assert_eq!(events, ["4 d", "5 yes", "turn t Completed"]);
    }
}

#[tokio::test]
async fn a_watcher_is_told_of_rewinds_and_clears() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let messages = (1..=5).map(|n| user(&n.to_string())).collect();
        client.append(append("s", messages)).await.unwrap();
        let mut stream = watch(&mut client, "s", 4).await;
        assert_eq!(told_all(&mut stream, 2).await, ["5 5", "live 5"]);
        client.rewind(rewind("s", 2)).await.unwrap();
        assert_eq!(told(&mut stream).await, "rewound 2");
        client.append(append("s", vec![user("new")])).await.unwrap();
        assert_eq!(told(&mut stream).await, "6 new");
        client.clear(clear("s")).await.unwrap();
        assert_eq!(told(&mut stream).await, "cleared");
        client
            .append(append("s", vec![user("after")]))
            .await
            .unwrap();
        assert_eq!(told(&mut stream).await, "7 after");
    }
}

#[tokio::test]
async fn a_turn_that_ended_before_is_no_news_to_a_watcher_after_a_rewind() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        for turn_id in ["t1", "t2"] {
            world.provider.answer(Script::text(["yes"]));
            let request = pb::ChatRequest {
                turn_id: turn_id.to_owned(),
                ..chat("s", "hi")
            };
            tell(&mut client, request).await;
        }
        let mut stream = watch(&mut client, "s", 4).await;
        assert_eq!(told(&mut stream).await, "live 4");
        client.rewind(rewind("s", 2)).await.unwrap();
        assert_eq!(told(&mut stream).await, "rewound 2");
        client
            .append(append("s", vec![user("next")]))
            .await
            .unwrap();
        assert_eq!(told(&mut stream).await, "5 next");
    }
}

#[tokio::test]
async fn a_turn_is_told_of_also_behind_more_messages_than_are_read_at_once() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let session = stores::session("s");
        let mut watch = Watch::new(Arc::clone(&world.server.store), session, 0);
        let live = watch.next().await.unwrap();
        assert_eq!(live, Notice::Live { last_sequence: 0 });
        // All of it comes before the watcher looks again.
        let many = vec![user("x"); 100];
        client.append(append("s", many)).await.unwrap();
        world.provider.answer(Script::text(["yes"]));
        tell(&mut client, chat("s", "hi")).await;

        let mut messages = 0;
        let ended = loop {
            let next = tokio::time::timeout(wait::LIMIT, watch.next()).await;
            match next.expect("a notice in time").unwrap() {
                Notice::Message(_) => messages += 1,
                other => break other,
            }
        };
        assert_eq!(messages, 102);
        let Notice::Turn(report) = ended else {
            panic!("{ended:?}")
        };
        let first_sequence = 101;
        assert_eq!(report.state, State::Completed { first_sequence });
    }
}

#[tokio::test]
async fn every_message_comes_once_and_in_order_while_many_write() {
    const WRITERS: usize = 4;
    const EACH: usize = 60;
    for world in worlds().await {
        let mut client = world.server.client().await;
        let mut streams = Vec::new();
        for after in [0, 0, 0, 10] {
            streams.push((after, watch(&mut client, "s", after).await));
        }
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let mut client = world.server.client().await;
            writers.push(tokio::spawn(async move {
                for number in 0..EACH {
                    let messages = vec![user(&format!("{writer}.{number}")); 1 + number % 3];
                    client.append(append("s", messages)).await.unwrap();
                }
            }));
        }
        for writer in writers {
            writer.await.unwrap();
        }
        let seen = look(&mut client, "s").await.unwrap();
        for (after, stream) in &mut streams {
            let mut sequences = Vec::new();
            while sequences.last() != Some(&seen.last_sequence) {
                let event = told(stream).await;
                if let Some((sequence, _)) = event.split_once(' ')
                    && let Ok(sequence) = sequence.parse::<i64>()
                {
                    sequences.push(sequence);
                }
            }
            // One that asked for more than there was begins with what came first.
            let first = sequences[0];
            assert!(first == 1 || *after == 10);
            let expected: Vec<_> = (first..=seen.last_sequence).collect();
            assert_eq!(sequences, expected);
        }
    }
}

#[tokio::test]
async fn under_clears_and_rewinds_all_that_stays_comes_once_and_nothing_comes_twice() {
    for world in worlds().await {
        let mut client = world.server.client().await;
        let mut stream = watch(&mut client, "s", 0).await;
        let mut writers = Vec::new();
        for writer in 0..3 {
            let mut client = world.server.client().await;
            writers.push(tokio::spawn(async move {
                for number in 0..60 {
                    let text = format!("{writer}.{number}");
                    client.append(append("s", vec![user(&text)])).await.unwrap();
                    let last = look(&mut client, "s").await.map(|seen| seen.last_sequence);
                    match (writer, number % 20) {
                        (0, 19) => drop(client.clear(clear("s")).await.unwrap()),
                        (1, 10) => {
                            let to = last.unwrap_or(0) - 2;
                            client.rewind(rewind("s", to.max(0))).await.unwrap();
                        }
                        _ => {}
                    }
                }
            }));
        }
        for writer in writers {
            writer.await.unwrap();
        }
        let end = client.append(append("s", vec![user("end")])).await.unwrap();
        let end = end.into_inner().messages[0].sequence;

        let mut given = std::collections::BTreeMap::new();
        while !given.contains_key(&end) {
            let event = told(&mut stream).await;
            let (first, text) = event.split_once(' ').unwrap_or((&event, ""));
            if let Ok(sequence) = first.parse::<i64>() {
                let newest = given.last_key_value().map_or(0, |(sequence, _)| *sequence);
                assert!(sequence > newest, "{sequence} after {newest}");
                given.insert(sequence, text.to_owned());
            }
        }
        let page = client.get_messages(get("s")).await.unwrap().into_inner();
        assert!(page.next_page_token.is_empty() && !page.messages.is_empty());
        for message in page.messages {
            assert_eq!(given.get(&message.sequence), Some(&message.content));
        }
    }
}

#[tokio::test]
async fn a_watcher_survives_a_redis_that_restarts() {
    let mut server = harness::redis::Redis::start_with(harness::redis::Options {
        durable: true,
        ..Default::default()
    })
    .await;
    let settings = chat_memory::store::redis::Settings::new(server.url());
    let store = chat_memory::store::redis::Redis::connect(settings).unwrap();
    store.ready(wait::LIMIT).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let memory = server_on(Arc::new(store), directory, Options::default()).await;
    let mut client = memory.client().await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    let mut stream = watch(&mut client, "s", 0).await;
    assert_eq!(told_all(&mut stream, 2).await, ["1 before", "live 1"]);

    server.stop().await;
    server.restart().await;
    // Written by another program, perhaps before the server is connected again.
    let element = r#"{"type": "human", "data": {"content": "by others", "type": "human"}}"#;
    let () = server.command(&["LPUSH", "message_store:s", element]).await;
    assert_eq!(told(&mut stream).await, "2 by others");
    let () = server.command(&["DEL", "message_store:s"]).await;
    assert_eq!(told(&mut stream).await, "cleared");
}

#[tokio::test]
async fn a_watcher_that_takes_nothing_is_sent_away_and_goes_on_later() {
    let options = Options {
        watcher_patience: Duration::from_millis(200),
        ..Options::default()
    };
    let world = world(stores::sqlite().await, options).await;
    let mut client = world.server.client().await;
    // More than the windows and buffers on the way hold.
    let large = "x".repeat(500_000);
    for _ in 0..20 {
        client
            .append(append("s", vec![user(&large)]))
            .await
            .unwrap();
    }
    let mut stream = watch(&mut client, "s", 0).await;
    // Not taking anything is what is tested: the server has to notice.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut last = 0;
    let end = loop {
        match stream.message().await {
            Ok(Some(response)) => match response.event.unwrap() {
                Event::Message(message) => {
                    assert_eq!(message.sequence, last + 1);
                    last = message.sequence;
                }
                other => panic!("{other:?}"),
            },
            Ok(None) => panic!("the stream has ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(
        (end.code(), reason(&end).as_str()),
        (Code::ResourceExhausted, "WATCHER_TOO_SLOW")
    );
    assert!(last < 20);
    let mut stream = watch(&mut client, "s", last).await;
    for sequence in last + 1..=20 {
        assert!(told(&mut stream).await.starts_with(&format!("{sequence} ")));
    }
}

#[tokio::test]
async fn watchers_are_counted_and_sent_away_at_the_end() {
    let options = Options {
        watchers_max: 1,
        ..Options::default()
    };
    let world = world(stores::sqlite().await, options).await;
    let mut client = world.server.client().await;
    let mut stream = watch(&mut client, "s", 0).await;
    assert_eq!(told(&mut stream).await, "live 0");
    let request = pb::WatchRequest {
        session_id: "t".to_owned(),
        ..Default::default()
    };
    let status = client.watch(request.clone()).await.unwrap_err();
    assert_eq!(reason(&status), "TOO_MANY_WATCHERS");
    drop(stream);
    let mut stream = wait::until("the first watcher has gone", || {
        let mut client = client.clone();
        let request = request.clone();
        async move { client.watch(request).await.ok() }
    })
    .await
    .into_inner();
    assert_eq!(told(&mut stream).await, "live 0");

    world.server.shutdown.cancel();
    assert_eq!(told(&mut stream).await, "SHUTTING_DOWN");
    world.server.running.await.unwrap().unwrap();
    drop(world.backend);
}
