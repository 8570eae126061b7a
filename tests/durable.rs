//! A turn outlives its connection, its server and a retry: real servers on a real Redis, with a real
//! HTTP server in the provider's place, and faults between all of them.

mod harness;

use std::time::{Duration, Instant};

use chat_memory::pb;
use harness::{
    program::Program,
    provider::{Gate, Outcome, Provider, Script},
    proxy::{Half, Mode, Proxy},
    redis::{self, Redis},
    server::{
        Client, Told, append, chat, clear, client, contents, get, message, reason, tcp_channel,
        tell, tell_rest, user,
    },
    wait,
};
use tonic::{Code, Streaming};

/// A Redis that keeps its data, and a provider.
struct World {
    redis: Redis,
    provider: Provider,
}

impl World {
    async fn start() -> Self {
        let redis = Redis::start_with(redis::Options {
            durable: true,
            ..Default::default()
        });
        Self {
            redis: redis.await,
            provider: Provider::start().await,
        }
    }

    /// A server whose turns are taken by others after a second without it.
    fn server(&self) -> Program {
        self.server_at(&self.redis.url())
    }

    fn server_at(&self, redis_url: &str) -> Program {
        self.server_with(redis_url, &[])
    }

    fn server_with(&self, redis_url: &str, flags: &[&str]) -> Program {
        let url = self.provider.url();
        let common = [
            "--listen=127.0.0.1:0",
            "--redis",
            redis_url,
            "--model=test-model",
            "--model-url",
            &url,
            "--lease-seconds=1",
            "--redis-timeout-ms=500",
        ];
        Program::start(&[&common, flags].concat())
    }

    /// What the history holds, as the bytes in Redis say.
    async fn stored(&self, session: &str) -> Vec<serde_json::Value> {
        let key = format!("message_store:{session}");
        let elements: Vec<String> = self.redis.command(&["LRANGE", &key, "0", "-1"]).await;
        let newest_first = elements
            .iter()
            .map(|text| serde_json::from_str(text).unwrap());
        newest_first.rev().collect()
    }

    async fn texts(&self, session: &str) -> Vec<String> {
        let stored = self.stored(session).await;
        let text =
            |element: &serde_json::Value| element["data"]["content"].as_str().map(str::to_owned);
        stored.iter().filter_map(text).collect()
    }
}

/// A server on the embedded file in this directory.
fn on_file(provider: &Provider, directory: &tempfile::TempDir) -> Program {
    let database = directory.path().join("chat.db");
    Program::start(&[
        "--listen=127.0.0.1:0",
        "--database",
        database.to_str().unwrap(),
        "--model=test-model",
        "--model-url",
        &provider.url(),
    ])
}

/// A client of a server that has its store.
async fn ready(program: &Program) -> Client {
    let client = client(tcp_channel(&program.addresses[0]).await);
    wait::until("the server has its store", || {
        let mut client = client.clone();
        async move { client.get_messages(get("probe")).await.ok().map(drop) }
    })
    .await;
    client
}

fn turn(session: &str, turn_id: &str, content: &str) -> pb::ChatRequest {
    pb::ChatRequest {
        turn_id: turn_id.to_owned(),
        ..chat(session, content)
    }
}

fn follow(session: &str, turn_id: &str, resume_after: i64) -> pb::ChatRequest {
    pb::ChatRequest {
        session_id: session.to_owned(),
        turn_id: turn_id.to_owned(),
        resume_after,
        ..Default::default()
    }
}

fn stop(session: &str, turn_id: &str) -> pb::StopChatRequest {
    pb::StopChatRequest {
        session_id: session.to_owned(),
        turn_id: turn_id.to_owned(),
        ..Default::default()
    }
}

/// Takes events until so many deltas have come.
async fn take_deltas(stream: &mut Streaming<pb::ChatResponse>, count: usize) -> Told {
    let mut told = Told::default();
    while told.deltas.len() < count {
        let response = stream.message().await.expect("an event").expect("an event");
        told.take(response);
    }
    told
}

#[tokio::test]
async fn a_turn_is_followed_from_any_event_at_any_server_while_it_runs_and_afterwards() {
    let world = World::start().await;
    let gate = Gate::new();
    let script = Script::begin()
        .say("one ")
        .say("two ")
        .wait(&gate)
        .say("three ");
    world
        .provider
        .answer(script.say("four").finish("stop").usage(3, 4).done());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;

    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    let begun = take_deltas(&mut stream, 2).await;
    assert_eq!(begun.numbers, [1, 2, 3]);
    drop(stream);
    let mut followers = Vec::new();
    for client in [&mut here, &mut there] {
        for after in 0..=3 {
            let stream = client.chat(follow("s", "t", after)).await.unwrap();
            followers.push((
                after,
                tokio::spawn(tell_rest(stream.into_inner(), Told::default())),
            ));
        }
    }
    // The same request follows it too.
    let mut repeated = turn("s", "t", "hi");
    repeated.resume_after = 2;
    let stream = there.chat(repeated.clone()).await.unwrap().into_inner();
    followers.push((2, tokio::spawn(tell_rest(stream, Told::default()))));
    gate.open();

    let pieces = ["one ", "two ", "three ", "four"];
    let check = |after: i64, told: Told| {
        assert_eq!(told.reason(), "", "{after}");
        assert_eq!(told.numbers, (after + 1..=6).collect::<Vec<_>>());
        let from = usize::try_from(after).unwrap().saturating_sub(1);
        assert_eq!(told.text(), pieces[from.min(4)..].concat());
        let completed = told.completed.expect("completed");
        assert_eq!(completed.finish_reason(), pb::FinishReason::Stop);
        assert_eq!(completed.usage.unwrap().output_tokens, 4);
        completed.messages
    };
    let mut messages = Vec::new();
    for (after, follower) in followers {
        messages.push(check(after, follower.await.unwrap()));
    }
    for client in [&mut here, &mut there] {
        for after in 0..=5 {
            messages.push(check(after, tell(client, follow("s", "t", after)).await));
        }
        let nothing = tell(client, follow("s", "t", 6)).await;
        assert!(nothing.numbers.is_empty() && nothing.error.is_none());
    }
    let stored = here
        .get_messages(get("s"))
        .await
        .unwrap()
        .into_inner()
        .messages;
    assert!(messages.iter().all(|messages| *messages == stored));
    assert_eq!(world.provider.request_count(), 1);
    assert_eq!(world.texts("s").await, ["hi", "one two three four"]);

    repeated.messages = vec![user("something else")];
    let other = tell(&mut there, repeated).await;
    assert_eq!(other.reason(), "REQUEST_ID_REUSED");
}

#[tokio::test]
async fn a_turn_that_nobody_began_is_not_found() {
    let world = World::start().await;
    let server = world.server();
    let mut client = ready(&server).await;
    let status = client.chat(follow("s", "t", 0)).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::NotFound, "TURN_NOT_FOUND")
    );
    let status = client.stop_chat(stop("s", "")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::NotFound, "TURN_NOT_FOUND")
    );
}

#[tokio::test]
async fn the_same_turn_asked_of_two_servers_at_once_asks_the_model_once() {
    let world = World::start().await;
    world.provider.always(Script::text(["fine"]));
    let servers = [world.server(), world.server()];
    let mut clients = Vec::new();
    for server in &servers {
        clients.push(ready(server).await);
    }
    for round in 1..=10 {
        let id = format!("t{round}");
        let calls = (0..8).map(|number| {
            let mut client = clients[number % 2].clone();
            let request = turn("s", &id, "hi");
            tokio::spawn(async move { tell(&mut client, request).await })
        });
        for call in futures_util::future::join_all(calls).await {
            let told = call.unwrap();
            assert_eq!((told.text().as_str(), told.reason().as_str()), ("fine", ""));
            assert_eq!(told.numbers, [1, 2, 3]);
        }
        assert_eq!(world.provider.request_count(), round);
        assert_eq!(world.stored("s").await.len(), 2 * round);
    }
}

#[tokio::test]
async fn a_turn_of_a_killed_server_is_run_anew_for_who_follows_it_elsewhere() {
    let world = World::start().await;
    world
        .provider
        .answer(Script::begin().say("lost ").say("words").hang());
    world.provider.answer(Script::text(["found"]));
    let (first, second) = (world.server(), world.server());
    let mut here = ready(&first).await;
    let mut there = ready(&second).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    let begun = take_deltas(&mut stream, 2).await;
    let last_seen = *begun.numbers.last().unwrap();
    let follower = there.chat(follow("s", "t", 0)).await.unwrap().into_inner();

    first.crash();
    let told = tell_rest(follower, Told::default()).await;
    assert_eq!(told.reason(), "");
    let started = told.started.as_ref().expect("a second start");
    assert_eq!(started.attempt, 2);
    assert!(
        told.numbers.is_sorted_by(|a, b| a < b),
        "{:?}",
        told.numbers
    );
    assert!(told.text().ends_with("found"));
    assert_eq!(world.texts("s").await, ["hi", "found"]);
    assert_eq!(world.provider.request_count(), 2);

    // Whoever was at the dead server goes on where it was, with the new attempt.
    let told = tell(&mut there, follow("s", "t", last_seen)).await;
    assert_eq!(told.started.as_ref().unwrap().attempt, 2);
    assert!(told.numbers[0] > last_seen);
    assert_eq!(told.text(), "found");
}

#[tokio::test]
async fn a_server_that_does_not_look_for_orphans_runs_them_for_who_asks() {
    let world = World::start().await;
    world.provider.answer(Script::begin().say("lost").hang());
    world.provider.answer(Script::text(["found"]));
    let url = world.redis.url();
    let first = world.server();
    let second = world.server_with(&url, &["--adopt-turns=false"]);
    let mut here = ready(&first).await;
    let mut there = ready(&second).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    first.crash();
    let told = tell(&mut there, turn("s", "t", "hi")).await;
    assert_eq!(told.reason(), "");
    assert_eq!(told.started.as_ref().unwrap().attempt, 2);
    assert_eq!(world.texts("s").await, ["hi", "found"]);
    assert_eq!(world.provider.request_count(), 2);
}

#[tokio::test]
async fn a_turn_of_a_killed_server_gets_its_answer_although_nobody_asks() {
    let world = World::start().await;
    world.provider.answer(Script::begin().say("lost").hang());
    world.provider.answer(Script::text(["found"]));
    let (first, second) = (world.server(), world.server());
    let mut here = ready(&first).await;
    let mut there = ready(&second).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    let begun = take_deltas(&mut stream, 1).await;
    assert!(world.stored("s").await.is_empty());
    first.crash();
    // Its limit is the 30 seconds that a turn may be an orphan.
    wait::until("the turn is adopted", || async {
        (world.texts("s").await == ["hi", "found"]).then_some(())
    })
    .await;
    let told = tell(&mut there, follow("s", "t", *begun.numbers.last().unwrap())).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("found", "")
    );
    assert_eq!(told.started.as_ref().unwrap().attempt, 2);
    assert_eq!(told.numbers.len(), 3);
    assert!(told.numbers[0] > *begun.numbers.last().unwrap());
    assert_eq!(world.texts("s").await, ["hi", "found"]);
    assert_eq!(world.provider.request_count(), 2);
}

/// Has a turn that stops without followers adopted by the next server, where it has none.
async fn adopt_what_stops_without_followers(provider: &Provider, start: impl Fn() -> Program) {
    provider.always(Script::begin().say("so far").hang());
    let server = start();
    let mut client = ready(&server).await;
    let mut request = turn("s", "t", "hi");
    request.on_disconnect = pb::OnDisconnect::Stop.into();
    let begun = client.chat(request).await.unwrap();
    take_deltas(&mut begun.into_inner(), 1).await;
    server.crash();

    let server = start();
    let mut client = ready(&server).await;
    provider.wait_for_requests(2).await;
    assert_eq!(provider.wait_for_outcome(1).await, Outcome::ClientLeft);
    let told = tell(&mut client, follow("s", "t", 0)).await;
    assert_eq!(told.reason(), "");
    let stored = told.completed.unwrap().messages;
    assert_eq!(
        (stored[1].content.as_str(), stored[1].interrupted),
        ("so far", true)
    );
}

#[tokio::test]
async fn an_adopted_turn_still_stops_without_followers() {
    let world = World::start().await;
    adopt_what_stops_without_followers(&world.provider, || world.server()).await;
}

#[tokio::test]
async fn an_adopted_turn_still_stops_without_followers_on_the_embedded_file() {
    let provider = Provider::start().await;
    let directory = tempfile::tempdir().unwrap();
    let start = || on_file(&provider, &directory);
    adopt_what_stops_without_followers(&provider, start).await;
}

/// Has a turn adopted by the next server, which is then asked something else under its id.
async fn ask_otherwise_of_an_adopter(provider: &Provider, start: impl Fn() -> Program) {
    let gate = Gate::new();
    provider.answer(Script::begin().say("lost").hang());
    let script = Script::begin().say("found").wait(&gate);
    provider.answer(script.finish("stop").done());
    let server = start();
    let mut client = ready(&server).await;
    let begun = client.chat(turn("s", "t", "hi")).await.unwrap();
    take_deltas(&mut begun.into_inner(), 1).await;
    server.crash();

    let server = start();
    let mut client = ready(&server).await;
    provider.wait_for_requests(2).await;
    let other = client.chat(turn("s", "t", "something else")).await;
    let refused = other.expect_err("another request");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(reason(&refused), "REQUEST_ID_REUSED");
    gate.open();
    let told = tell(&mut client, turn("s", "t", "hi")).await;
    assert_eq!((told.text(), told.reason()), ("found".into(), "".into()));
    let other = tell(&mut client, turn("s", "t", "something else")).await;
    assert_eq!(other.reason(), "REQUEST_ID_REUSED");
    assert_eq!(provider.request_count(), 2);
}

#[tokio::test]
async fn an_adopted_turn_answers_no_other_request_than_its_own() {
    let world = World::start().await;
    ask_otherwise_of_an_adopter(&world.provider, || world.server()).await;
}

#[tokio::test]
async fn an_adopted_turn_answers_no_other_request_on_the_embedded_file() {
    let provider = Provider::start().await;
    let directory = tempfile::tempdir().unwrap();
    ask_otherwise_of_an_adopter(&provider, || on_file(&provider, &directory)).await;
}

#[tokio::test]
async fn a_turn_is_not_taken_from_a_server_that_lives_however_long_it_is_silent() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(
        Script::begin()
            .say("slow")
            .wait(&gate)
            .finish("stop")
            .done(),
    );
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    // An orphan that is younger is adopted first: by then the other server has looked at both.
    world.provider.answer(Script::begin().say("lost").hang());
    world.provider.answer(Script::text(["found"]));
    let third = world.server();
    let mut dying = ready(&third).await;
    let mut other = dying.chat(turn("u", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut other, 1).await;
    third.crash();
    wait::until("the orphan is adopted", || async {
        (world.texts("u").await == ["hi", "found"]).then_some(())
    })
    .await;
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "");
    assert_eq!(world.texts("s").await, ["hi", "slow"]);
    let told = tell(&mut there, follow("s", "t", 0)).await;
    assert_eq!(told.started.as_ref().unwrap().attempt, 1);
    assert_eq!(world.provider.request_count(), 3);
}

#[tokio::test]
async fn a_server_that_was_paused_cannot_write_a_turn_that_was_taken_from_it() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(
        Script::begin()
            .say("slow")
            .wait(&gate)
            .finish("stop")
            .done(),
    );
    world.provider.answer(Script::text(["quick"]));
    let (first, second) = (world.server(), world.server());
    let mut here = ready(&first).await;
    let mut there = ready(&second).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    first.signal("STOP");
    let told = tell(&mut there, turn("s", "t", "hi")).await;
    assert!(told.completed.is_some(), "{told:?}");
    gate.open();
    first.signal("CONT");
    // Its own follower learns what was stored.
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "");
    assert_eq!(told.started.as_ref().unwrap().attempt, 2);
    assert_eq!(told.completed.unwrap().messages[1].content, "quick");
    assert_eq!(world.texts("s").await, ["hi", "quick"]);
}

#[tokio::test]
async fn an_answer_is_kept_for_a_store_that_is_away_and_not_asked_for_again() {
    let mut world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(
        Script::begin()
            .say("kept")
            .wait(&gate)
            .finish("stop")
            .done(),
    );
    let server = world.server();
    let mut client = ready(&server).await;
    let mut stream = client
        .chat(turn("s", "t", "hi"))
        .await
        .unwrap()
        .into_inner();
    take_deltas(&mut stream, 1).await;
    world.redis.stop().await;
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.error.as_ref().unwrap().code(), Code::Unavailable);
    assert!(told.completed.is_none());
    world.redis.restart().await;
    let told = wait::until("the turn is delivered", || {
        let mut client = client.clone();
        async move {
            let told = tell(&mut client, turn("s", "t", "hi")).await;
            told.completed.is_some().then_some(told)
        }
    })
    .await;
    assert_eq!(told.text(), "kept");
    assert_eq!(world.texts("s").await, ["hi", "kept"]);
    assert_eq!(world.provider.request_count(), 1);
}

#[tokio::test]
async fn a_turn_goes_on_while_its_store_is_away_in_the_middle() {
    let world = World::start().await;
    let proxy = Proxy::start(world.redis.address()).await;
    let gates = [Gate::new(), Gate::new()];
    let script = Script::begin()
        .say("a")
        .wait(&gates[0])
        .say("b")
        .wait(&gates[1])
        .say("c");
    world.provider.answer(script.finish("stop").done());
    let server = world.server_at(&proxy.redis_url());
    let mut client = ready(&server).await;
    let mut stream = client
        .chat(turn("s", "t", "hi"))
        .await
        .unwrap()
        .into_inner();
    take_deltas(&mut stream, 1).await;
    proxy.set(Mode::Refuse);
    proxy.cut();
    gates[0].open();
    take_deltas(&mut stream, 1).await;
    proxy.set(Mode::Forward);
    ready(&server).await;
    gates[1].open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!((told.text().as_str(), told.reason().as_str()), ("c", ""));
    assert_eq!(world.texts("s").await, ["hi", "abc"]);
    let again = tell(&mut client, follow("s", "t", 0)).await;
    assert_eq!((again.text().as_str(), again.numbers.len()), ("abc", 5));
}

#[tokio::test]
async fn a_turn_is_stopped_from_another_server_and_keeps_what_there_is() {
    let world = World::start().await;
    world
        .provider
        .always(Script::begin().say("so far").call(0, "c", "add").hang());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 2).await;
    let stopped = there.stop_chat(stop("s", "")).await.unwrap().into_inner();
    assert_eq!(stopped.turn_id, "t");
    let answer = &stopped.messages[1];
    assert!(answer.interrupted && answer.tool_calls.is_empty());
    assert_eq!(answer.content, "so far");
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.completed.unwrap().messages, stopped.messages);
    // Again, it changes nothing.
    let again = there.stop_chat(stop("s", "t")).await.unwrap().into_inner();
    assert_eq!(again.messages, stopped.messages);

    let mut stream = here.chat(turn("s", "u", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 2).await;
    let mut discard = stop("s", "u");
    discard.discard = true;
    let stopped = there.stop_chat(discard).await.unwrap().into_inner();
    assert!(stopped.messages.is_empty());
    assert_eq!(
        tell_rest(stream, Told::default()).await.reason(),
        "TURN_STOPPED"
    );
    assert_eq!(world.texts("s").await, ["hi", "so far"]);
}

#[tokio::test]
async fn a_turn_of_a_paused_server_is_stopped_without_it() {
    let world = World::start().await;
    world.provider.answer(Script::begin().say("so far").hang());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    // What was said is in the log once another server has it.
    let mut follower = there.chat(follow("s", "t", 0)).await.unwrap().into_inner();
    take_deltas(&mut follower, 1).await;
    servers[0].signal("STOP");
    let stopped = there.stop_chat(stop("s", "t")).await.unwrap().into_inner();
    assert_eq!(stopped.messages[1].content, "so far");
    servers[0].signal("CONT");
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.completed.unwrap().messages, stopped.messages);
    assert_eq!(world.texts("s").await, ["hi", "so far"]);
}

#[tokio::test]
async fn turns_on_one_session_wait_in_line_across_servers_or_take_over() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(
        Script::begin()
            .say("first")
            .wait(&gate)
            .finish("stop")
            .done(),
    );
    world.provider.answer(Script::text(["second"]));
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t1", "1")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let status = there.chat(turn("s", "t2", "2")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "TURN_IN_PROGRESS")
    );
    let mut waiting = turn("s", "t2", "2");
    waiting.on_conflict = pb::OnConflict::Queue.into();
    let mut impatient = tonic::Request::new(turn("s", "t3", "3"));
    impatient.get_mut().on_conflict = pb::OnConflict::Queue.into();
    impatient.set_timeout(Duration::from_millis(300));
    let waiter = tokio::spawn({
        let mut there = there.clone();
        async move { tell(&mut there, waiting).await }
    });
    let status = here.chat(impatient).await.unwrap_err();
    assert!(matches!(
        status.code(),
        Code::DeadlineExceeded | Code::Cancelled
    ));
    gate.open();
    let told = waiter.await.unwrap();
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("second", "")
    );
    assert_eq!(world.texts("s").await, ["1", "first", "2", "second"]);

    world.provider.answer(Script::begin().say("third").hang());
    world.provider.answer(Script::text(["fourth"]));
    let mut stream = here.chat(turn("s", "t4", "3")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let mut superseding = turn("s", "t5", "4");
    superseding.on_conflict = pb::OnConflict::Supersede.into();
    let told = tell(&mut there, superseding).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("fourth", "")
    );
    let stored = world.texts("s").await;
    assert_eq!(stored[4..], ["3", "third", "4", "fourth"]);
}

#[tokio::test]
async fn a_failed_turn_says_why_to_all_and_runs_again_under_its_id() {
    let world = World::start().await;
    world
        .provider
        .answer(Script::begin().say("half").fail("the GPU is on fire"));
    world.provider.answer(Script::text(["whole"]));
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let told = tell(&mut here, turn("s", "t", "hi")).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("half", "MODEL_STREAM_BROKEN")
    );
    assert!(world.stored("s").await.is_empty());
    let followed = tell(&mut there, follow("s", "t", 0)).await;
    assert_eq!(
        (followed.text(), followed.numbers.clone()),
        (told.text(), told.numbers)
    );
    let (error, first) = (followed.error.unwrap(), told.error.unwrap());
    assert_eq!(
        (error.code(), error.message()),
        (first.code(), first.message())
    );
    assert_eq!(reason(&error), "MODEL_STREAM_BROKEN");
    let again = tell(&mut there, turn("s", "t", "hi")).await;
    assert_eq!(
        (again.text().as_str(), again.reason().as_str()),
        ("whole", "")
    );
    assert_eq!(again.started.as_ref().unwrap().attempt, 2);
    assert!(again.numbers[0] > *followed.numbers.last().unwrap());
    assert_eq!(world.texts("s").await, ["hi", "whole"]);
}

#[tokio::test]
async fn a_clear_at_another_server_ends_a_turn_and_leaves_nothing_of_it() {
    let world = World::start().await;
    let gate = Gate::new();
    world
        .provider
        .answer(Script::begin().say("a").wait(&gate).finish("stop").done());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    there.clear(clear("s")).await.unwrap();
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "SESSION_CLEARED");
    assert!(world.stored("s").await.is_empty());
    let status = there.chat(follow("s", "t", 0)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn a_tool_result_needs_its_call() {
    let world = World::start().await;
    world.provider.answer(
        Script::begin()
            .call(0, "c1", "add")
            .finish("tool_calls")
            .done(),
    );
    world.provider.answer(Script::text(["done"]));
    let server = world.server();
    let mut client = ready(&server).await;
    let result = |id: &str| {
        let mut result = message(pb::Role::Tool, "2");
        result.tool_call_id = id.to_owned();
        let mut request = chat("s", "");
        request.messages = vec![result];
        request
    };
    let told = tell(&mut client, result("c1")).await;
    assert_eq!(told.reason(), "INVALID_FIELD");
    let error = told.error.unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(
        harness::server::fields(&error),
        ["messages[0].tool_call_id"]
    );
    assert_eq!(world.provider.request_count(), 0);
    tell(&mut client, chat("s", "1+1")).await;
    let told = tell(&mut client, result("c2")).await;
    assert_eq!(told.reason(), "INVALID_FIELD");
    let told = tell(&mut client, result("c1")).await;
    assert_eq!((told.text().as_str(), told.reason().as_str()), ("done", ""));
    let told = tell(&mut client, result("c1")).await;
    assert_eq!(told.reason(), "INVALID_FIELD");
    assert_eq!(world.stored("s").await.len(), 4);
}

#[tokio::test]
async fn appends_of_others_during_a_turn_stand_before_it() {
    let world = World::start().await;
    let gate = Gate::new();
    world
        .provider
        .answer(Script::begin().say("a").wait(&gate).finish("stop").done());
    let server = world.server();
    let mut client = ready(&server).await;
    let mut stream = client
        .chat(turn("s", "t", "hi"))
        .await
        .unwrap()
        .into_inner();
    take_deltas(&mut stream, 1).await;
    client
        .append(append("s", vec![user("meanwhile")]))
        .await
        .unwrap();
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.completed.unwrap().messages[0].sequence, 2);
    assert_eq!(contents(&mut client, "s").await, ["meanwhile", "hi", "a"]);
}

/// A script that says "kept" and goes on when the gate is open.
fn held_by(gate: &Gate) -> Script {
    let script = Script::begin().say("kept").wait(gate);
    script.finish("stop").done()
}

/// Asks for a turn until it is delivered whole.
async fn deliver(client: &Client, request: pb::ChatRequest) -> Told {
    wait::until("the turn is delivered", || {
        let (mut client, request) = (client.clone(), request.clone());
        async move {
            let told = tell(&mut client, request).await;
            told.completed.is_some().then_some(told)
        }
    })
    .await
}

#[tokio::test]
async fn a_turn_is_stored_once_over_connections_that_delay_or_are_half_closed() {
    #[derive(Debug, Clone, Copy)]
    enum Fault {
        Delay(u64),
        HalfClose(Half),
    }
    let world = World::start().await;
    let proxy = Proxy::start(world.redis.address()).await;
    let server = world.server_at(&proxy.redis_url());
    let mut client = ready(&server).await;
    let faults = [
        Fault::Delay(50),
        // Longer than the server waits for Redis: nothing is known of any write.
        Fault::Delay(600),
        Fault::HalfClose(Half::Requests),
        Fault::HalfClose(Half::Replies),
    ];
    for (index, fault) in faults.into_iter().enumerate() {
        let session = format!("s{index}");
        let gate = Gate::new();
        world.provider.answer(held_by(&gate));
        let request = turn(&session, "t", "hi");
        let mut stream = client.chat(request.clone()).await.unwrap().into_inner();
        take_deltas(&mut stream, 1).await;
        let accepted = proxy.accepted();
        match fault {
            Fault::Delay(ms) => proxy.set(Mode::Delay(Duration::from_millis(ms))),
            Fault::HalfClose(half) => proxy.half_close(half),
        }
        gate.open();
        let told = tell_rest(stream, Told::default()).await;
        if told.completed.is_some() {
            // Not through the proxy: it is there by now.
            assert_eq!(world.texts(&session).await, ["hi", "kept"], "{fault:?}");
        } else {
            let error = told.error.expect("an end");
            assert_eq!(error.code(), Code::Unavailable, "{fault:?}: {error}");
        }
        proxy.set(Mode::Forward);
        if let Fault::HalfClose(_) = fault {
            assert!(proxy.accepted() > accepted, "{fault:?}: nothing happened");
        }
        let told = deliver(&client, request).await;
        assert_eq!(told.text(), "kept", "{fault:?}");
        assert_eq!(world.texts(&session).await, ["hi", "kept"], "{fault:?}");
        assert_eq!(world.provider.request_count(), index + 1, "{fault:?}");
    }
}

#[tokio::test]
async fn an_answer_is_stored_once_although_the_store_is_lost_again_while_it_is_kept() {
    let mut world = World::start().await;
    let proxy = Proxy::start(world.redis.address()).await;
    let gate = Gate::new();
    world.provider.answer(Script::text(["earlier"]));
    world.provider.answer(held_by(&gate));
    let server = world.server_at(&proxy.redis_url());
    let mut client = ready(&server).await;
    // Redis has the script that ends turns from then on: no write is lost for want of it.
    tell(&mut client, chat("other", "hi")).await;
    let request = turn("s", "t", "hi");
    let mut stream = client.chat(request.clone()).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    proxy.set(Mode::Refuse);
    proxy.cut();
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.error.unwrap().code(), Code::Unavailable);
    assert!(world.stored("s").await.is_empty());

    // It comes back, takes the answer, and is gone before it can say so. Then it is asked again.
    for _ in 0..3 {
        proxy.lose_reply_to(b"\"kept\"");
        let lost = proxy.lost();
        proxy.set(Mode::Forward);
        wait::until("a write is not answered", || async {
            (proxy.lost() > lost).then_some(())
        })
        .await;
        proxy.set(Mode::Refuse);
        proxy.cut();
        assert_eq!(world.texts("s").await, ["hi", "kept"]);
        world.redis.stop().await;
        world.redis.restart().await;
    }
    proxy.set(Mode::Forward);
    let told = deliver(&client, request).await;
    assert_eq!(told.text(), "kept");
    assert_eq!(world.texts("s").await, ["hi", "kept"]);
    assert_eq!(world.provider.request_count(), 2);
}

#[tokio::test]
async fn an_answer_is_kept_for_a_full_redis_and_stored_when_there_is_room() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(held_by(&gate));
    let server = world.server();
    let mut client = ready(&server).await;
    let request = turn("s", "t", "hi");
    let mut stream = client.chat(request.clone()).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let memory = async |bytes: &str| {
        let words = ["CONFIG", "SET", "maxmemory", bytes];
        world.redis.command::<()>(&words).await;
    };
    memory("1").await;
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert!(told.completed.is_none());
    let error = told.error.unwrap();
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::ResourceExhausted, "STORE_FULL")
    );
    let told = tell(&mut client, request.clone()).await;
    assert_eq!(told.reason(), "STORE_FULL");
    assert!(world.stored("s").await.is_empty());
    memory("0").await;
    let told = deliver(&client, request).await;
    assert_eq!(told.text(), "kept");
    assert_eq!(world.texts("s").await, ["hi", "kept"]);
    assert_eq!(world.provider.request_count(), 1);
}

#[tokio::test]
async fn a_turn_is_completed_for_nobody_before_a_replica_has_it() {
    let world = World::start().await;
    let replica = world.redis.start_replica().await;
    let gate = Gate::new();
    world.provider.answer(held_by(&gate));
    let url = world.redis.url();
    let servers = [(); 2].map(|()| world.server_with(&url, &["--redis-wait-replicas=1"]));
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let request = turn("s", "t", "hi");
    let mut stream = here.chat(request.clone()).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let mut follower = there.chat(follow("s", "t", 0)).await.unwrap().into_inner();
    take_deltas(&mut follower, 1).await;

    replica.pause();
    gate.open();
    let asked_again = tell(&mut there, request.clone());
    for told in [
        tell_rest(follower, Told::default()).await,
        tell_rest(stream, Told::default()).await,
        asked_again.await,
    ] {
        assert!(told.completed.is_none());
        let error = told.error.unwrap();
        assert_eq!(
            (error.code(), reason(&error).as_str()),
            (Code::Unavailable, "OUTCOME_UNKNOWN")
        );
    }

    replica.resume();
    for client in [&here, &there] {
        assert_eq!(deliver(client, request.clone()).await.text(), "kept");
    }
    let elements: i64 = replica.command(&["LLEN", "message_store:s"]).await;
    assert_eq!(elements, 2);
    assert_eq!(world.texts("s").await, ["hi", "kept"]);
    assert_eq!(world.provider.request_count(), 1);
}

#[tokio::test]
async fn a_turn_that_stops_without_followers_counts_those_at_other_servers() {
    let world = World::start().await;
    // Says something every 100 ms for ever, as far as this test goes.
    let mut script = Script::begin();
    for _ in 0..300 {
        script = script.say("x").pause(Duration::from_millis(100));
    }
    world.provider.answer(script.hang());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut request = turn("s", "t", "hi");
    request.on_disconnect = pb::OnDisconnect::Stop.into();
    let mut stream = here.chat(request).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let mut follower = there.chat(follow("s", "t", 0)).await.unwrap().into_inner();
    take_deltas(&mut follower, 1).await;
    drop(stream);
    // Six seconds: longer than the grace, and than a follower counts after it was noted.
    take_deltas(&mut follower, 60).await;
    assert!(world.stored("s").await.is_empty());
    drop(follower);
    wait::until("the turn is stopped", || async {
        (world.stored("s").await.len() == 2).then_some(())
    })
    .await;
    let answer = &world.stored("s").await[1]["data"];
    assert_eq!(
        answer["additional_kwargs"]["chat_memory"]["interrupted"],
        true
    );
    assert!(answer["content"].as_str().unwrap().len() >= 60);
    assert_eq!(
        world.provider.wait_for_outcome(0).await,
        Outcome::ClientLeft
    );
}

#[tokio::test]
async fn a_stop_takes_effect_soon_at_whichever_server_it_is_asked_for() {
    let world = World::start().await;
    world.provider.always(Script::begin().say("so far").hang());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    for (index, is_elsewhere) in [true, false, true, false].into_iter().enumerate() {
        let id = format!("t{index}");
        let mut stream = here.chat(turn("s", &id, "hi")).await.unwrap().into_inner();
        take_deltas(&mut stream, 1).await;
        // By then it is in the log, and the holder has no reason of its own to look at the store.
        let mut follower = there.chat(follow("s", &id, 0)).await.unwrap().into_inner();
        take_deltas(&mut follower, 1).await;
        let asked = Instant::now();
        let stopper = if is_elsewhere { &mut there } else { &mut here };
        let stopped = stopper.stop_chat(stop("s", "")).await.unwrap().into_inner();
        let told = tell_rest(stream, Told::default()).await;
        let took = asked.elapsed();
        assert_eq!(stopped.turn_id, id);
        assert_eq!(told.completed.unwrap().messages, stopped.messages);
        // The promise is a second; the limit leaves room for a slow machine.
        println!("stopped after {took:?}, elsewhere: {is_elsewhere}");
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert_eq!(
            world.provider.wait_for_outcome(index).await,
            Outcome::ClientLeft
        );
    }
}

#[tokio::test]
async fn a_client_that_vanishes_without_a_word_finds_its_turn_where_it_left_it() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(held_by(&gate));
    let server = world.server();
    let mut direct = ready(&server).await;
    let proxy = Proxy::start(server.addresses[0].clone()).await;
    let mut vanishing = client(tcp_channel(&proxy.address().to_string()).await);
    let request = turn("s", "t", "hi");
    let mut stream = vanishing.chat(request.clone()).await.unwrap().into_inner();
    let begun = take_deltas(&mut stream, 1).await;
    // No end of a connection is seen on either side, and no byte any more.
    proxy.set(Mode::Silent);
    gate.open();
    wait::until("the turn is stored", || async {
        (world.texts("s").await == ["hi", "kept"]).then_some(())
    })
    .await;
    let last_seen = *begun.numbers.last().unwrap();
    let resumed = pb::ChatRequest {
        resume_after: last_seen,
        ..request
    };
    let told = tell(&mut direct, resumed).await;
    assert_eq!(told.numbers, [last_seen + 1]);
    assert_eq!(told.completed.unwrap().messages[1].content, "kept");
    assert_eq!(world.provider.request_count(), 1);
}

/// Waits until so many calls stand in line at a session.
async fn until_in_line(world: &World, session: &str, count: usize) {
    let key = format!("{{message_store:{session}}}:turns");
    wait::until("the calls stand in line", || async {
        let bytes: usize = world.redis.command(&["HSTRLEN", &key, "line"]).await;
        // A turn's hashed id, and when it last asked.
        (bytes == count * 24).then_some(())
    })
    .await;
}

fn queued(session: &str, turn_id: &str, content: &str) -> pb::ChatRequest {
    pb::ChatRequest {
        on_conflict: pb::OnConflict::Queue.into(),
        ..turn(session, turn_id, content)
    }
}

#[tokio::test]
async fn calls_that_wait_at_two_servers_run_in_the_order_in_which_they_came() {
    let world = World::start().await;
    let gate = Gate::new();
    world.provider.answer(held_by(&gate));
    for answer in ["first", "second", "third"] {
        world.provider.answer(Script::text([answer]));
    }
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "0")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let mut waiters = Vec::new();
    for (index, client) in [&there, &here, &there].into_iter().enumerate() {
        let mut client = client.clone();
        let number = (index + 1).to_string();
        let request = queued("s", &format!("q{number}"), &number);
        waiters.push(tokio::spawn(
            async move { tell(&mut client, request).await },
        ));
        until_in_line(&world, "s", index + 1).await;
    }
    gate.open();
    let mut texts = Vec::new();
    for waiter in waiters {
        let told = waiter.await.unwrap();
        assert_eq!(told.reason(), "");
        texts.push(told.text());
    }
    assert_eq!(texts, ["first", "second", "third"]);
    assert_eq!(
        world.texts("s").await,
        ["0", "kept", "1", "first", "2", "second", "3", "third"]
    );
}

#[tokio::test]
async fn a_call_that_goes_away_leaves_the_line() {
    let world = World::start().await;
    world.provider.always(Script::begin().say("so far").hang());
    let server = world.server();
    let mut client = ready(&server).await;
    let mut stream = client
        .chat(turn("s", "t", "hi"))
        .await
        .unwrap()
        .into_inner();
    take_deltas(&mut stream, 1).await;
    let mut waiting = client.clone();
    let waiter = tokio::spawn(async move { waiting.chat(queued("s", "q", "then")).await });
    until_in_line(&world, "s", 1).await;
    waiter.abort();
    // Nobody else asks, so nobody else finds that it asks no more.
    until_in_line(&world, "s", 0).await;
}

#[tokio::test]
async fn a_turn_supersedes_the_running_one_while_others_wait_in_line() {
    let world = World::start().await;
    world.provider.answer(Script::begin().say("cut").hang());
    world.provider.always(Script::text(["whole"]));
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let mut there = ready(&servers[1]).await;
    let mut stream = here.chat(turn("s", "t", "0")).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let mut waiters = Vec::new();
    for (index, client) in [&there, &here].into_iter().enumerate() {
        let mut client = client.clone();
        let request = queued("s", &format!("q{index}"), &format!("q{index}"));
        waiters.push(tokio::spawn(
            async move { tell(&mut client, request).await },
        ));
        until_in_line(&world, "s", index + 1).await;
    }
    let mut superseding = turn("s", "now", "now");
    superseding.on_conflict = pb::OnConflict::Supersede.into();
    let told = tell(&mut there, superseding).await;
    assert_eq!(
        (told.text().as_str(), told.reason().as_str()),
        ("whole", "")
    );
    let told = tell_rest(stream, Told::default()).await;
    assert!(told.completed.unwrap().messages[1].interrupted);
    // One in line may get its turn first, and is superseded then as well. Nothing of it is stored in
    // part, and the others get theirs in order.
    let mut expected = vec!["0 cut", "now whole"];
    for (waiter, pair) in waiters.into_iter().zip(["q0 whole", "q1 whole"]) {
        let told = waiter.await.unwrap();
        match told.reason().as_str() {
            "" => expected.push(pair),
            reason => assert_eq!(reason, "TURN_STOPPED"),
        }
    }
    let stored = world.texts("s").await;
    let mut pairs: Vec<String> = stored.chunks(2).map(|pair| pair.join(" ")).collect();
    assert_eq!(pairs[0], expected[0]);
    let place = |pair| pairs.iter().position(|known| known == pair);
    assert!(
        place("q0 whole") < place("q1 whole") || place("q1 whole").is_none(),
        "{pairs:?}"
    );
    pairs.sort();
    expected.sort();
    assert_eq!(pairs, expected);
}

#[tokio::test]
async fn twenty_followers_at_two_servers_get_the_same_events() {
    let world = World::start().await;
    let gate = Gate::new();
    let mut script = Script::begin().say("begun ").think("so").wait(&gate);
    for number in 0..200 {
        script = script.say(&format!("{number} "));
        if number % 20 == 0 {
            script = script.pause(Duration::from_millis(20));
        }
    }
    script = script.call(0, "c", "add").arguments(0, "{\"a\": 1}");
    world
        .provider
        .answer(script.finish("tool_calls").usage(1, 2).done());
    let servers = [world.server(), world.server()];
    let mut here = ready(&servers[0]).await;
    let there = ready(&servers[1]).await;
    let stream = here.chat(turn("s", "t", "hi")).await.unwrap().into_inner();
    let mut streams = vec![stream];
    for index in 0..20 {
        let mut client = [&here, &there][index % 2].clone();
        let stream = client.chat(follow("s", "t", 0)).await.unwrap();
        streams.push(stream.into_inner());
    }
    let followers = streams.into_iter().map(|mut stream| {
        tokio::spawn(async move {
            let mut events = Vec::new();
            while let Some(event) = stream.message().await.unwrap() {
                events.push(event);
            }
            events
        })
    });
    let followers: Vec<_> = followers.collect();
    gate.open();
    let mut seen = Vec::new();
    for follower in followers {
        seen.push(follower.await.unwrap());
    }
    let numbers: Vec<i64> = seen[0].iter().map(|event| event.event_number).collect();
    assert_eq!(numbers, (1..=numbers.len() as i64).collect::<Vec<_>>());
    assert!(numbers.len() > 200, "{}", numbers.len());
    for (index, events) in seen.iter().enumerate() {
        assert_eq!(events, &seen[0], "follower {index}");
    }
    assert_eq!(world.provider.request_count(), 1);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_answer_is_kept_for_a_full_disk_and_stored_when_there_is_room() {
    let Some(disk) = harness::disk::SmallDisk::mount("8m") else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let provider = Provider::start().await;
    let gate = Gate::new();
    let script = Script::begin().say(&"kept ".repeat(20_000)).wait(&gate);
    provider.answer(script.finish("stop").done());
    let database = disk.path().join("chat.db");
    let server = Program::start(&[
        "--listen=127.0.0.1:0",
        "--database",
        database.to_str().unwrap(),
        "--model=test-model",
        "--model-url",
        &provider.url(),
    ]);
    let mut connected = ready(&server).await;
    let request = turn("s", "t", "hi");
    let mut stream = connected.chat(request.clone()).await.unwrap().into_inner();
    take_deltas(&mut stream, 1).await;
    let filler = disk.fill();
    gate.open();
    let told = tell_rest(stream, Told::default()).await;
    assert_eq!(told.reason(), "STORE_FULL");
    let told = tell(&mut connected, request.clone()).await;
    assert_eq!(told.reason(), "STORE_FULL");
    assert!(contents(&mut connected, "s").await.is_empty());
    drop(filler);
    let told = deliver(&connected, request).await;
    assert_eq!(told.text(), "kept ".repeat(20_000));
    assert_eq!(contents(&mut connected, "s").await, ["hi", &told.text()]);
    assert_eq!(provider.request_count(), 1);
}

#[tokio::test]
async fn a_turn_is_adopted_by_the_next_server_on_the_embedded_file() {
    let provider = Provider::start().await;
    provider.answer(Script::begin().say("lost").hang());
    provider.answer(Script::text(["found"]));
    let directory = tempfile::tempdir().unwrap();
    let server = on_file(&provider, &directory);
    let mut connected = ready(&server).await;
    let mut stream = connected
        .chat(turn("s", "t", "hi"))
        .await
        .unwrap()
        .into_inner();
    let begun = take_deltas(&mut stream, 1).await;
    assert!(matches!(begun.started, Some(ref started) if started.attempt == 1));
    server.crash();
    let server = on_file(&provider, &directory);
    let mut connected = ready(&server).await;
    let told = tell(&mut connected, follow("s", "t", 0)).await;
    assert_eq!(told.reason(), "");
    assert_eq!(told.completed.unwrap().messages[1].content, "found");
    assert_eq!(contents(&mut connected, "s").await, ["hi", "found"]);
}
