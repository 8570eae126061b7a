//! The real program on a real Redis: it starts without one, comes and goes with it, and shares a
//! session with other servers and with whoever else writes to the list.

mod harness;

use std::time::{Duration, Instant};

use harness::{
    program::{Program, run},
    redis::Redis,
    server::{
        Client, append, chat, clear, client, contents, fields, get, reason, tcp_channel, tell, user,
    },
    wait,
};
use tonic::Code;

/// The bound that the README states for the timeout used here, and some room for a busy machine.
const BOUND: Duration = Duration::from_secs(10);

fn start(redis: &Redis) -> Program {
    Program::start(&["--listen", "127.0.0.1:0", "--redis", &redis.url()])
}

async fn connect(program: &Program) -> Client {
    client(tcp_channel(&program.addresses[0]).await)
}

/// Waits until the server answers reads.
async fn ready(program: &Program) -> Client {
    let client = connect(program).await;
    wait::until("the server has its store", || {
        let mut client = client.clone();
        async move { client.get_messages(get("probe")).await.ok().map(drop) }
    })
    .await;
    client
}

fn is_healthy(program: &Program) -> bool {
    run(["health", "--target", &program.addresses[0]])
        .status
        .success()
}

async fn until_healthy(program: &Program, wanted: bool) {
    wait::until("health follows the store", || async {
        (is_healthy(program) == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_session_is_langchains_list_under_langchains_key() {
    let redis = Redis::start().await;
    let program = start(&redis);
    let mut client = ready(&program).await;
    assert!(
        program.banner.contains("store: Redis at"),
        "{}",
        program.banner
    );
    let langchain = r#"{"type": "human", "data": {"content": "from LangChain", "additional_kwargs": {}, "response_metadata": {}, "type": "human", "name": null, "id": null}}"#;
    let _: i64 = redis
        .command(&["LPUSH", "message_store:foo", langchain])
        .await;
    client
        .append(append("foo", vec![user("from us")]))
        .await
        .unwrap();
    let told = tell(&mut client, chat("foo", "hi")).await;
    assert_eq!(told.started.unwrap().history_messages, 2);
    assert_eq!(
        contents(&mut client, "foo").await,
        ["from LangChain", "from us", "hi", "You said: hi"]
    );
    let elements: Vec<String> = redis
        .command(&["LRANGE", "message_store:foo", "0", "-1"])
        .await;
    assert_eq!(elements.len(), 4);
    assert!(elements[0].starts_with(r#"{"type": "ai", "data": {"content": "You said: hi", "#));
    assert_eq!(elements[3], langchain);

    assert_eq!(
        client
            .clear(clear("foo"))
            .await
            .unwrap()
            .into_inner()
            .deleted_count,
        4
    );
    let keys: Vec<String> = redis.command(&["KEYS", "*"]).await;
    assert_eq!(keys, ["{message_store:foo}:session"]);
}

#[tokio::test]
async fn it_starts_without_redis_and_says_so_until_there_is_one() {
    let mut redis = Redis::start().await;
    redis.stop().await;
    let program = start(&redis);
    assert!(!is_healthy(&program));
    let mut client = connect(&program).await;
    let began = Instant::now();
    let status = client
        .append(append("s", vec![user("x")]))
        .await
        .unwrap_err();
    assert!(began.elapsed() < BOUND);
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "STORE_UNAVAILABLE")
    );
    redis.restart().await;
    until_healthy(&program, true).await;
    client.append(append("s", vec![user("x")])).await.unwrap();
}

#[tokio::test]
async fn when_redis_goes_away_calls_fail_in_time_and_all_is_well_when_it_is_back() {
    let mut redis = Redis::start().await;
    let program = start(&redis);
    let mut client = ready(&program).await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    redis.kill();
    let began = Instant::now();
    for _ in 0..2 {
        let status = client.get_messages(get("s")).await.unwrap_err();
        assert_eq!(reason(&status), "STORE_UNAVAILABLE");
        let told = tell(&mut client, chat("s", "hi")).await;
        assert_eq!(told.reason(), "STORE_UNAVAILABLE");
    }
    assert!(began.elapsed() < 4 * BOUND);
    until_healthy(&program, false).await;
    redis.restart().await;
    until_healthy(&program, true).await;
    client
        .append(append("s", vec![user("after")]))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_redis_that_falls_silent_is_noticed_and_an_append_is_safe_to_repeat() {
    let redis = Redis::start().await;
    let program = start(&redis);
    let mut client = ready(&program).await;
    client
        .append(append("s", vec![user("before")]))
        .await
        .unwrap();
    redis.pause();
    let mut request = append("s", vec![user("perhaps")]);
    request.request_id = "r1".to_owned();
    let began = Instant::now();
    let status = client.append(request.clone()).await.unwrap_err();
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "OUTCOME_UNKNOWN")
    );
    assert!(
        status.message().contains("may have been stored"),
        "{}",
        status.message()
    );
    until_healthy(&program, false).await;
    redis.resume();
    until_healthy(&program, true).await;
    let stored = client.append(request).await.unwrap().into_inner();
    assert_eq!(stored.messages[0].sequence, 2);
    assert_eq!(contents(&mut client, "s").await, ["before", "perhaps"]);
}

#[tokio::test]
async fn one_request_sent_to_two_servers_at_once_is_stored_once() {
    let redis = Redis::start().await;
    let (one, two) = (start(&redis), start(&redis));
    let (one, two) = (ready(&one).await, ready(&two).await);
    for round in 0..20 {
        let mut request = append("s", vec![user("a"), user("b")]);
        request.request_id = format!("r{round}");
        let mut calls = Vec::new();
        for client in [&one, &two, &one, &two] {
            let (mut client, request) = (client.clone(), request.clone());
            calls.push(tokio::spawn(async move { client.append(request).await }));
        }
        let mut answers = Vec::new();
        for call in calls {
            answers.push(call.await.unwrap().unwrap().into_inner());
        }
        assert!(
            answers.iter().all(|answer| *answer == answers[0]),
            "{answers:#?}"
        );
    }
    let length: i64 = redis.command(&["LLEN", "message_store:s"]).await;
    assert_eq!(length, 40);
}

#[tokio::test]
async fn a_key_of_another_type_is_named_and_left_alone() {
    let redis = Redis::start().await;
    let program = start(&redis);
    let mut client = ready(&program).await;
    let _: String = redis.command(&["SET", "message_store:s", "text"]).await;
    let status = client
        .append(append("s", vec![user("x")]))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "WRONG_KEY_TYPE")
    );
    assert!(status.message().contains("message_store:s"));
    assert!(client.get_messages(get("s")).await.is_err());
    assert!(client.clear(clear("s")).await.is_err());
    let keys: Vec<String> = redis.command(&["KEYS", "*"]).await;
    assert_eq!(keys, ["message_store:s"]);
}

#[tokio::test]
async fn a_turn_that_cannot_be_stored_does_not_complete_and_can_be_asked_for_again() {
    use harness::provider::{Gate, Provider, Script};
    let mut redis = Redis::start().await;
    let provider = Provider::start().await;
    let program = Program::start(&[
        "--listen",
        "127.0.0.1:0",
        "--redis",
        &redis.url(),
        "--model-url",
        &provider.url(),
        "--model",
        "m",
    ]);
    let mut client = ready(&program).await;
    let gate = Gate::new();
    provider.answer(
        Script::begin()
            .say("lost")
            .wait(&gate)
            .finish("stop")
            .done(),
    );
    let mut request = chat("s", "hi");
    request.turn_id = "t1".to_owned();
    let stream = client.chat(request.clone()).await.unwrap().into_inner();
    provider.wait_for_requests(1).await;
    redis.kill();
    gate.open();
    let told = harness::server::tell_rest(stream, Default::default()).await;
    assert!(told.completed.is_none());
    assert_eq!(told.error.unwrap().code(), Code::Unavailable);

    redis.restart().await;
    until_healthy(&program, true).await;
    provider.answer(Script::text(["kept"]));
    let told = tell(&mut client, request).await;
    assert_eq!(told.text(), "kept");
    assert_eq!(contents(&mut client, "s").await, ["hi", "kept"]);
}

#[tokio::test]
async fn a_page_token_of_another_session_is_refused_on_redis_too() {
    let redis = Redis::start().await;
    let program = start(&redis);
    let mut client = ready(&program).await;
    client
        .append(append("a", vec![user("1"), user("2")]))
        .await
        .unwrap();
    let mut request = get("a");
    request.page_size = 1;
    let token = client
        .get_messages(request.clone())
        .await
        .unwrap()
        .into_inner()
        .next_page_token;
    request.page_token = token;
    let page = client
        .get_messages(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(page.messages[0].content, "2");
    request.session_id = "b".to_owned();
    assert_eq!(
        fields(&client.get_messages(request).await.unwrap_err()),
        ["page_token"]
    );
}

/// The server's connections to Redis, and the last command of each.
async fn of_server(redis: &Redis) -> Vec<(String, String)> {
    let clients: String = redis.command(&["CLIENT", "LIST"]).await;
    let field = |line: &str, name: &str| {
        let mut fields = line.split(' ');
        let value = fields.find_map(|field| field.strip_prefix(name));
        value.unwrap_or_default().to_owned()
    };
    let of_line = |line: &str| (field(line, "id="), field(line, "cmd="));
    let all = clients.lines().map(of_line);
    all.filter(|(_, command)| command != "client|list")
        .collect()
}

#[tokio::test]
async fn each_worker_has_a_connection_to_redis_and_all_of_them_come_back() {
    let mut redis = Redis::start().await;
    let url = redis.url();
    let arguments = ["--workers", "3", "--redis", &url];
    let program = Program::start(&[&arguments[..], &["--listen", "127.0.0.1:0"]].concat());
    ready(&program).await;
    // Two for each worker.
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(connect(&program).await);
    }
    let append_by_all = async |text: &str| {
        let mut calls = Vec::new();
        for client in &clients {
            let (mut client, text) = (client.clone(), text.to_owned());
            calls.push(tokio::spawn(async move {
                client.append(append("s", vec![user(&text)])).await
            }));
        }
        for call in calls {
            call.await.unwrap().unwrap();
        }
    };
    wait::until("each connection has appended", || async {
        append_by_all("first").await;
        let connections = of_server(&redis).await;
        let appended = connections.iter().filter(|(_, last)| last == "evalsha");
        (connections.len() == 3 && appended.count() == 3).then_some(())
    })
    .await;

    let length = async || -> i64 { redis.command(&["LLEN", "message_store:s"]).await };
    let before = length().await;
    for (id, _) in of_server(&redis).await {
        let _: i64 = redis.command(&["CLIENT", "KILL", "ID", &id]).await;
    }
    append_by_all("second").await;
    assert_eq!(length().await, before + 6);

    redis.restart().await;
    wait::until("all connections are back", || async {
        (of_server(&redis).await.len() == 3).then_some(())
    })
    .await;
    append_by_all("third").await;
    for client in &clients {
        let contents = contents(&mut client.clone(), "s").await;
        assert!(contents.ends_with(&["third"; 6].map(str::to_owned)));
    }
}
