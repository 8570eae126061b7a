//! The Redis store on a Redis Cluster: real nodes, which are lost and come back, and slots that move.
//! They need `redis-server` and `redis-cli`.

mod harness;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use chat_memory::store::redis::{Redis, Settings};
use chat_memory::store::sessions::{Fork, Forked, ListRecent, Rewind, Rewound, SessionStore as _};
use chat_memory::store::{List, Store as _};

use harness::cluster::Cluster;
use harness::failover::Load;
use harness::stores::{batch, fill, fresh_request, read_all, session, texts};
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
        ":",
        "0",
        &"x".repeat(512),
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
        // All keys are there, and the source still has the slot: ASK.
        let name = session(&sessions[0]);
        assert_eq!(stores[0].expiry(&name).await.unwrap(), None);
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
