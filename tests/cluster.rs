//! The Redis store on a Redis Cluster: real nodes, which are lost and come back, and slots that move.
//! They need `redis-server` and `redis-cli`.

mod harness;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use chat_memory::pb::{self, watch_response::Event};
use chat_memory::store::redis::{Redis, Settings};
use chat_memory::store::sessions::{Fork, Forked, ListRecent, Rewind, Rewound, SessionStore as _};
use chat_memory::store::turns::TurnStore as _;
use chat_memory::store::{Error, List, Store as _};

use harness::cluster::Cluster;
use harness::failover::Load;
use harness::program::{Program, run};
use harness::provider::{Gate, Provider, Script};
use harness::redis::Redis as Node;
use harness::server::{
    Client, append, chat, client, contents, get, tcp_channel, tell, tell_rest, user,
};
use harness::stores::{batch, fill, fresh_request, read_all, session, texts};
use harness::turns;
use harness::wait::{LIMIT, until};

async fn connect(cluster: &Cluster) -> Arc<Redis> {
    let store = Redis::connect(Settings::new(cluster.url())).unwrap();
    store.ready(LIMIT).await.unwrap();
    Arc::new(store)
}

/// One whose acknowledgements mean that a replica has it.
async fn connect_waiting(cluster: &Cluster) -> Arc<Redis> {
    let settings = Settings {
        wait_replicas: 1,
        ..Settings::new(cluster.url())
    };
    let store = Redis::connect(settings).unwrap();
    store.ready(LIMIT).await.unwrap();
    Arc::new(store)
}

#[tokio::test]
async fn every_call_works_wherever_its_session_lies() {
    let cluster = Cluster::start().await;
    let store = connect(&cluster).await;

    // All keys of a session lie in one slot, whatever its id.
    for id in [
        "a",
        "a:b",
        "ann/1 2",
        "*[x]?\\",
        "(\u{1F600})\"'",
        "ü",
        "\u{202e}\u{feff} \u{e9}e\u{301}",
        "会話/🧑‍🚀",
        ":",
        "0",
        " ",
        "-1",
        "message_store:a",
        ":session",
        "a:requests:0",
        &"x".repeat(512),
        &"\u{1F600}".repeat(128),
    ] {
        let id = session(id);
        store.append(&id, batch(["1", "2"])).await.unwrap();
        assert_eq!(texts(&read_all(&*store, &id).await), ["1", "2"]);
        let list = format!("message_store:{id}");
        let slot = cluster.slot(&list).await;
        for name in [
            "session",
            "requests:0",
            "requests:1",
            "turns",
            "fork:0",
            "changed",
        ] {
            assert_eq!(
                cluster.slot(&format!("{{{list}}}:{name}")).await,
                slot,
                "{id} {name}"
            );
        }
    }
    assert_eq!(
        cluster.slot("{message_store:}:sessions").await,
        cluster.slot("{message_store:}:running").await
    );
    // Nothing else was made, at any node, and each key lies where its node says.
    for node in &cluster.nodes {
        let keys: Vec<String> = node.command(&["KEYS", "*"]).await;
        for key in keys {
            let own = key.strip_prefix('{').and_then(|key| key.rsplit_once("}:"));
            let list = own.map_or(key.as_str(), |(list, _)| list);
            assert!(list.starts_with("message_store:"), "{key}");
            assert_eq!(cluster.slot(&key).await, cluster.slot(list).await, "{key}");
        }
    }

    // Sessions on all nodes are found, by both ways to list them.
    let names: BTreeSet<String> = (0..60).map(|number| format!("many-{number:02}")).collect();
    for name in &names {
        fill(&*store, &session(name), 3).await;
    }
    let mut found = BTreeSet::new();
    let mut cursor = None;
    loop {
        let list = List {
            prefix: "many-".to_owned(),
            limit: 5,
            cursor,
        };
        let page = store.sessions(list).await.unwrap();
        found.extend(page.sessions.iter().map(ToString::to_string));
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(found, names);
    let list = ListRecent {
        prefix: "many-".to_owned(),
        limit: 100,
        ..ListRecent::default()
    };
    let page = store.list_sessions(list).await.unwrap();
    let listed: BTreeSet<String> = page.sessions.iter().map(|(id, _)| id.to_string()).collect();
    assert_eq!(listed, names);

    // A fork into every node; a rewind; a clear.
    for number in 0..6 {
        let to = session(&format!("fork-{number}"));
        let fork = Fork {
            to: to.clone(),
            through: Some(2),
        };
        let forked = store.fork(&session("many-00"), fork).await.unwrap();
        assert!(matches!(forked, Forked::Done(_)), "{forked:?}");
        assert_eq!(texts(&read_all(&*store, &to).await), ["1", "2"]);
    }
    let rewind = Rewind {
        after: 1,
        request: fresh_request(),
        time_ms: 1,
        expected_last_sequence: None,
    };
    let rewound = store.rewind(&session("many-00"), rewind).await.unwrap();
    assert!(matches!(rewound, Rewound::Done { count: 2 }), "{rewound:?}");
    assert_eq!(store.clear(&session("many-01")).await.unwrap(), 3);

    // A bell rings for what another server does, and for what LangChain does.
    let other = connect(&cluster).await;
    let id = session("many-02");
    let mut bell = store.bell(&id);
    other.append(&id, batch(["4"])).await.unwrap();
    tokio::time::timeout(LIMIT, bell.rung()).await.unwrap();
}

#[tokio::test]
async fn what_was_acknowledged_is_there_exactly_once_after_five_failovers_under_load() {
    let mut cluster = Cluster::start().await;
    let stores = [
        connect_waiting(&cluster).await,
        connect_waiting(&cluster).await,
    ];
    let sessions: Vec<String> = (0..4).map(|number| format!("client-{number}")).collect();
    let slot = cluster
        .slot(&format!("message_store:{}", sessions[0]))
        .await;
    let load = Load::start(&stores, &sessions);
    for failover in 1..=5 {
        load.progress_of_all(20).await;
        let killed = Instant::now();
        let lost = cluster.lose_master(slot).await;
        let promoted = killed.elapsed();
        // Nothing is acknowledged before there is a replica again.
        cluster.restore(lost).await;
        load.progress_of_all(1).await;
        println!(
            "failover {failover}: promoted after {promoted:.1?}, all served after {:.1?}",
            killed.elapsed()
        );
    }
    load.progress_of_all(20).await;
    let (_, missing) = load.check(&stores[0]).await;
    assert_eq!(missing, 0);
}

#[tokio::test]
async fn what_a_replica_has_is_acknowledged_without_memory_and_to_followers_and_nothing_else() {
    let cluster = Cluster::start().await;
    let holder = connect(&cluster).await;
    let store = connect_waiting(&cluster).await;
    let sessions = cluster.session_on_each_master().await;
    let replicas: Vec<&Node> = (0..cluster.nodes.len())
        .filter(|node| sessions.iter().all(|(master, _)| master != node))
        .map(|node| &cluster.nodes[node])
        .collect();
    let lease = turns::lease();
    let key = turns::begin("t", lease).key.id;
    for (master, name) in &sessions {
        let id = session(name);
        let append = batch(["1", "2"]);
        store.append(&id, append.clone()).await.unwrap();
        let memory = async |bytes: &str| {
            let words = ["CONFIG", "SET", "maxmemory", bytes];
            cluster.nodes[*master].command::<()>(&words).await;
        };
        memory("1").await;
        assert!(store.append(&id, append).await.unwrap().repeated);
        assert_eq!(store.clear(&id).await, Ok(2));
        memory("0").await;

        turns::leased(
            holder
                .begin_turn(&id, turns::begin("t", lease))
                .await
                .unwrap(),
        );
        replicas.iter().for_each(|replica| replica.pause());
        let end = turns::end(key, lease.token, &["q", "a"]);
        let completed = holder.end_turn(&id, end).await.unwrap();
        let followed = store.follow_turn(&id, turns::follow(key)).await;
        assert!(
            matches!(followed, Err(Error::OutcomeUnknown(_))),
            "{followed:?}"
        );
        replicas.iter().for_each(|replica| replica.resume());
        let followed = until("a replica has it", async || {
            store.follow_turn(&id, turns::follow(key)).await.ok()
        })
        .await;
        assert_eq!(followed.unwrap().state, completed);
    }
}

#[tokio::test]
async fn slots_may_move_under_load() {
    let cluster = Cluster::start().await;
    let stores = [connect(&cluster).await, connect(&cluster).await];
    let sessions: Vec<String> = (0..4).map(|number| format!("client-{number}")).collect();
    let slot = cluster
        .slot(&format!("message_store:{}", sessions[0]))
        .await;
    let load = Load::start(&stores, &sessions);
    load.progress_of_all(20).await;

    // The slot of the first session goes round all masters, and some of its neighbours with it.
    for _ in 0..3 {
        let from = cluster.master(slot).await;
        let mut to = 0;
        for other in 0..=16_u16 {
            to = cluster.master(other * 1_000).await;
            if to != from {
                break;
            }
        }
        let id = async |node: usize| -> String {
            cluster.nodes[node].command(&["CLUSTER", "MYID"]).await
        };
        let (from_id, to_id) = (id(from).await, id(to).await);
        let number = slot.to_string();
        let (source, target) = (&cluster.nodes[from], &cluster.nodes[to]);
        target
            .command::<()>(&["CLUSTER", "SETSLOT", &number, "IMPORTING", &from_id])
            .await;
        source
            .command::<()>(&["CLUSTER", "SETSLOT", &number, "MIGRATING", &to_id])
            .await;
        let address = target.address();
        let (host, port) = address.split_once(':').unwrap();
        loop {
            let keys: Vec<String> = source
                .command(&["CLUSTER", "GETKEYSINSLOT", &number, "100"])
                .await;
            if keys.is_empty() {
                break;
            }
            let mut migrate = vec!["MIGRATE", host, port, "", "0", "5000", "KEYS"];
            migrate.extend(keys.iter().map(String::as_str));
            source.command::<()>(&migrate).await;
        }
        // All keys are there, and the source still has the slot: ASK. What has one key only needs no
        // other that may not be there.
        let name = session(&sessions[0]);
        let keep = turns::keep(turns::begin("t", turns::lease()).key.id, turns::lease());
        let kept = stores[0].keep_turn(&name, keep).await;
        assert_eq!(kept, Err(Error::Cleared), "there is no such turn");
        let owner = ["CLUSTER", "SETSLOT", &number, "NODE", &to_id];
        target.command::<()>(&owner).await;
        source.command::<()>(&owner).await;
        for node in &cluster.nodes {
            let _ = node.try_command::<()>(&owner).await;
        }
        load.progress_of_all(20).await;
    }
    let reshard = {
        let any = cluster.nodes[0].address();
        let from: String = cluster.nodes[cluster.master(slot).await]
            .command(&["CLUSTER", "MYID"])
            .await;
        let to = until("there is another master", async || {
            let other = cluster.master((slot + 8_192) % 16_384).await;
            Some(
                cluster.nodes[other]
                    .command::<String>(&["CLUSTER", "MYID"])
                    .await,
            )
        })
        .await;
        (any, from, to)
    };
    let (any, from, to) = reshard;
    if from != to {
        let words = [
            "reshard",
            &any,
            "--cluster-from",
            &from,
            "--cluster-to",
            &to,
            "--cluster-slots",
            "100",
            "--cluster-yes",
        ];
        let mut child = cluster.cli(&words);
        until("the slots have moved", || {
            let ended = child.try_wait().expect("redis-cli");
            async move { ended }
        })
        .await;
    }
    load.progress_of_all(20).await;
    let (_, missing) = load.check(&stores[0]).await;
    assert_eq!(missing, 0);
}

#[tokio::test]
async fn a_write_waits_for_a_slot_that_is_half_moved_and_is_not_made_if_that_takes_too_long() {
    let cluster = Cluster::without_replicas().await;
    let settings = Settings {
        timeout_ms: 200,
        ..Settings::new(cluster.url())
    };
    let store = Redis::connect(settings).unwrap();
    store.ready(LIMIT).await.unwrap();
    let id = session("a");
    store.append(&id, batch(["1"])).await.unwrap();

    let list = "message_store:a";
    let slot = cluster.slot(list).await;
    let from = cluster.master(slot).await;
    let to = (from + 1) % 3;
    let (source, target) = (&cluster.nodes[from], &cluster.nodes[to]);
    let slot = slot.to_string();
    let from_id: String = source.command(&["CLUSTER", "MYID"]).await;
    let to_id: String = target.command(&["CLUSTER", "MYID"]).await;
    let importing = ["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id];
    target.command::<()>(&importing).await;
    let migrating = ["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id];
    source.command::<()>(&migrating).await;
    let address = target.address();
    let (host, port) = address.split_once(':').unwrap();
    let migrate = async |key: &str| {
        let migrate = ["MIGRATE", host, port, key, "0", "5000"];
        source.command::<()>(&migrate).await;
    };
    migrate(list).await;
    let append = batch(["2"]);
    let error = store.append(&id, append.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert!(error.to_string().contains("TRYAGAIN"), "{error}");
    // Others are served meanwhile.
    let other = session("b");
    store.append(&other, batch(["1"])).await.unwrap();

    // One with more time is tried until all is there.
    let refused = async || -> Vec<String> {
        let mut counts = Vec::new();
        for node in [source, target] {
            let info: String = node.command(&["INFO", "errorstats"]).await;
            counts.extend(
                info.lines()
                    .filter(|line| line.contains("TRYAGAIN"))
                    .map(str::to_owned),
            );
        }
        counts
    };
    let before = refused().await;
    let patient = connect(&cluster).await;
    let waiting = {
        let (id, append) = (id.clone(), append.clone());
        tokio::spawn(async move { patient.append(&id, append).await })
    };
    until("the slot is found half moved once more", async || {
        (refused().await != before).then_some(())
    })
    .await;
    let keys = ["CLUSTER", "GETKEYSINSLOT", &slot, "100"];
    for key in source.command::<Vec<String>>(&keys).await {
        migrate(&key).await;
    }
    let owner = ["CLUSTER", "SETSLOT", &slot, "NODE", &to_id];
    target.command::<()>(&owner).await;
    source.command::<()>(&owner).await;
    assert!(!waiting.await.unwrap().unwrap().repeated);
    assert_eq!(texts(&read_all(&store, &id).await), ["1", "2"]);
}

fn program(cluster: &Cluster, flags: &[&str]) -> Program {
    let url = cluster.url();
    Program::start(&[&["--listen=127.0.0.1:0", "--redis", &url], flags].concat())
}

/// A client of a server that has its store.
async fn ready(program: &Program) -> Client {
    let client = client(tcp_channel(&program.addresses[0]).await);
    until("the server has its store", || {
        let mut client = client.clone();
        async move { client.get_messages(get("probe")).await.ok().map(drop) }
    })
    .await;
    client
}

/// The next events of a watcher, up to one that is wanted.
async fn watched_until(stream: &mut tonic::Streaming<pb::WatchResponse>, wanted: &str) {
    loop {
        let next = tokio::time::timeout(LIMIT, stream.message()).await;
        let next = next.unwrap_or_else(|_| panic!("nothing of {wanted:?}"));
        let told = match next.unwrap().unwrap().event.unwrap() {
            Event::Message(message) => message.content,
            Event::Live(_) => "live".to_owned(),
            Event::Turn(turn) => format!("{} {:?}", turn.turn_id, turn.state()),
            other => panic!("{other:?}"),
        };
        if told == wanted {
            return;
        }
    }
}

#[tokio::test]
async fn turns_and_watchers_are_served_by_all_servers_wherever_a_session_lies() {
    let cluster = Cluster::without_replicas().await;
    let provider = Provider::start().await;
    let url = provider.url();
    let flags = [
        "--model=test-model",
        "--model-url",
        &url,
        "--lease-seconds=1",
    ];
    let (first, second) = (program(&cluster, &flags), program(&cluster, &flags));
    let (mut here, mut there) = (ready(&first).await, ready(&second).await);
    let sessions = cluster.session_on_each_master().await;

    for (node, name) in &sessions {
        let request = pb::WatchRequest {
            session_id: name.clone(),
            ..Default::default()
        };
        let mut watcher = there.watch(request).await.unwrap().into_inner();
        watched_until(&mut watcher, "live").await;

        // A turn, followed from its start at the other server while it runs.
        let gate = Gate::new();
        let script = Script::begin().say("one ").say("two ").wait(&gate);
        provider.answer(script.say("three").finish("stop").done());
        let mut request = chat(name, "hi");
        request.turn_id = "t".to_owned();
        let asked = here.chat(request).await.unwrap().into_inner();
        let follow = pb::ChatRequest {
            session_id: name.clone(),
            turn_id: "t".to_owned(),
            ..Default::default()
        };
        let mut followed = there.chat(follow.clone()).await.unwrap().into_inner();
        let mut told = harness::server::Told::default();
        while told.deltas.len() < 2 {
            told.take(followed.message().await.unwrap().unwrap());
        }
        gate.open();
        let told = tell_rest(followed, told).await;
        assert_eq!(
            (told.text(), told.reason()),
            ("one two three".into(), String::new())
        );
        assert_eq!(told.numbers, [1, 2, 3, 4, 5]);
        let asked = tell_rest(asked, Default::default()).await;
        assert_eq!(asked.completed, told.completed);
        let mut rest = follow;
        rest.resume_after = 3;
        assert_eq!(tell(&mut there, rest).await.text(), "three");
        assert_eq!(contents(&mut there, name).await, ["hi", "one two three"]);
        watched_until(&mut watcher, "t Completed").await;

        // What another server appends, and what LangChain pushes.
        here.append(append(name, vec![user("ours")])).await.unwrap();
        watched_until(&mut watcher, "ours").await;
        let theirs = r#"{"type": "human", "data": {"content": "theirs", "type": "human"}}"#;
        let list = format!("message_store:{name}");
        cluster.nodes[*node]
            .command::<i64>(&["LPUSH", &list, theirs])
            .await;
        watched_until(&mut watcher, "theirs").await;
    }

    // Turns of a server that dies get their answers at the other, although nobody asks.
    for (_, name) in &sessions {
        provider.answer(Script::begin().say("lost").hang());
        let mut stream = here.chat(chat(name, "again")).await.unwrap().into_inner();
        let mut told = harness::server::Told::default();
        while told.deltas.is_empty() {
            told.take(stream.message().await.unwrap().unwrap());
        }
    }
    provider.always(Script::text(["found"]));
    first.crash();
    for (_, name) in &sessions {
        until("the turn is adopted", || {
            let mut there = there.clone();
            async move {
                let texts = contents(&mut there, name).await;
                texts
                    .ends_with(&["again".to_owned(), "found".to_owned()])
                    .then_some(())
            }
        })
        .await;
    }
    assert_eq!(provider.request_count(), 9);
}

#[tokio::test]
async fn a_watcher_finds_another_node_to_listen_at_than_those_that_the_url_names() {
    let mut cluster = Cluster::without_replicas().await;
    let sessions = cluster.session_on_each_master().await;
    let (lost, _) = sessions[0];
    let (kept, name) = &sessions[1];
    let url = format!("redis-cluster://{}", cluster.nodes[lost].address());
    let store = Redis::connect(Settings::new(url)).unwrap();
    store.ready(LIMIT).await.unwrap();
    cluster.nodes[lost].kill();
    let _bell = store.bell(&session(name));
    let channel = format!("{{message_store:{name}}}:changed");
    until("the server listens at a node that is left", async || {
        for node in [*kept, sessions[2].0] {
            let channels: Vec<String> = cluster.nodes[node].command(&["PUBSUB", "CHANNELS"]).await;
            if channels.contains(&channel) {
                return Some(());
            }
        }
        None
    })
    .await;
}

#[tokio::test]
async fn sessions_move_between_a_file_and_all_nodes_of_a_cluster() {
    let cluster = Cluster::without_replicas().await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let moving = |words: &[&str]| {
        let output = run(words);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words:?}: {errors}");
        output.stdout
    };
    let names: BTreeSet<String> = (0..60).map(|number| format!("moved-{number:02}")).collect();
    let (file, database) = (path("sessions.jsonl"), path("first.db"));
    {
        let store = chat_memory::store::sqlite::Sqlite::open(database.as_ref(), "message_store:");
        let store = store.unwrap();
        for name in &names {
            let elements = ["\"1\"", r#"{"type": "human", "data": {"content": "2"}}"#];
            store.append(&session(name), batch(elements)).await.unwrap();
        }
    }
    let url = cluster.url();
    moving(&["export", "--database", &database, "--output", &file]);
    moving(&["import", "--redis", &url, "--input", &file]);
    let store = connect(&cluster).await;
    for node in &cluster.nodes {
        assert!(
            node.command::<u64>(&["DBSIZE"]).await > 0,
            "a node has none"
        );
    }
    for name in &names {
        assert_eq!(read_all(&*store, &session(name)).await.elements.len(), 2);
    }

    // Each session comes back once, with all its lines, from whichever node.
    let sessions = |text: &[u8]| {
        let text = String::from_utf8(text.to_vec()).unwrap();
        let is_of_a_session = |line: &&str| {
            ["{\"session", "{\"text", "{\"end"]
                .iter()
                .any(|kind| line.starts_with(kind))
        };
        let lines = text.lines().filter(is_of_a_session).map(str::to_owned);
        let lines: Vec<String> = lines.collect();
        let mut sessions: Vec<String> = lines.chunks(4).map(|lines| lines.concat()).collect();
        sessions.sort();
        sessions
    };
    let first = sessions(&std::fs::read(&file).unwrap());
    assert_eq!(first.len(), 60);
    let again = moving(&["export", "--redis", &url]);
    assert_eq!(sessions(&again), first);

    let report = run(["doctor", "--redis", &url, "--json"]);
    assert_eq!(report.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    for (name, number) in [
        ("sessions", 60),
        ("messages", 120),
        ("unreadable_messages", 60),
        ("unreadable_sessions", 60),
        ("wrong_type_keys", 0),
        ("memory_unknown_sessions", 0),
    ] {
        assert_eq!(report[name], number, "{name}: {report:#}");
    }
}

/// A plain client would be given a third of the sessions, and no word of the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_of_the_other_kind_is_refused_with_the_one_to_use() {
    let cluster = Cluster::without_replicas().await;
    let alone = harness::redis::Redis::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sessions.jsonl");
    std::fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap().to_owned();

    let node = cluster.nodes[0].url();
    let of_a_cluster = format!("redis-cluster://{}", alone.address());
    let mut commands = Vec::new();
    for (url, hint) in [(&node, "`redis-cluster://`"), (&of_a_cluster, "`redis://`")] {
        for words in [
            vec!["export"],
            vec!["import", "--input", &file],
            vec!["doctor"],
        ] {
            let words = [words, vec!["--redis", url]].concat();
            let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
            commands.push((tokio::task::spawn_blocking(|| run(words)), hint));
        }
    }
    for (url, hint) in [(&node, "`redis-cluster://`"), (&of_a_cluster, "`redis://`")] {
        let program = Program::start(&["--listen", "127.0.0.1:0", "--redis", url]);
        let mut client = client(tcp_channel(&program.addresses[0]).await);
        let refused = client.append(append("a", vec![user("hi")])).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        assert!(refused.message().contains(hint), "{refused}");
    }
    for (command, hint) in commands {
        let output = command.await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{said}");
        assert!(said.contains(hint), "{said}");
    }
}

#[tokio::test]
async fn a_cluster_with_tls_is_served_by_all_its_nodes() {
    let cluster = Cluster::with_tls().await;
    let trusting = Settings {
        ca_file: cluster.ca_file(),
        ..Settings::new(cluster.url())
    };
    let store = Redis::connect(trusting.clone()).unwrap();
    store.ready(LIMIT).await.unwrap();
    let other = Redis::connect(trusting).unwrap();
    for (_, name) in cluster.session_on_each_master().await {
        let id = session(&name);
        let mut bell = store.bell(&id);
        other.append(&id, batch(["1"])).await.unwrap();
        tokio::time::timeout(LIMIT, bell.rung()).await.unwrap();
        assert_eq!(texts(&read_all(&store, &id).await), ["1"]);
    }
}
