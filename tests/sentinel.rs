//! The Redis store behind Sentinels: real ones, with servers that are lost and come back. They need
//! `redis-server`.

mod harness;

use std::sync::Arc;
use std::time::Duration;

use chat_memory::store::redis::{Redis, Settings};
use chat_memory::store::{Error, Store as _};

use harness::failover::Load;
use harness::sentinel::{Guarded, Watched};
use harness::stores::{batch, read_all, session, texts};
use harness::wait::LIMIT;

async fn connect(url: &str) -> Arc<Redis> {
    let store = Redis::connect(Settings::new(url)).unwrap();
    store.ready(LIMIT).await.unwrap();
    Arc::new(store)
}

/// One whose acknowledgements mean that the replica has it.
async fn connect_waiting(url: &str) -> Arc<Redis> {
    let settings = Settings {
        wait_replicas: 1,
        ..Settings::new(url)
    };
    let store = Redis::connect(settings).unwrap();
    store.ready(LIMIT).await.unwrap();
    Arc::new(store)
}

#[tokio::test]
async fn a_sentinel_that_is_not_there_is_passed_over_and_a_name_that_nobody_knows_is_said() {
    let watched = Watched::start().await;
    let url = watched.url();
    let with_a_dead_one = url.replace("redis-sentinel://", "redis-sentinel://127.0.0.1:1,");
    let store = connect(&with_a_dead_one).await;
    store.append(&session("a"), batch(["1"])).await.unwrap();
    assert_eq!(texts(&read_all(&*store, &session("a")).await), ["1"]);

    let unknown = url.replace("/mymaster", "/other");
    let store = Redis::connect(Settings::new(unknown)).unwrap();
    let error = store.ready(Duration::from_secs(3)).await.unwrap_err();
    assert!(
        error.to_string().contains("watches over no such master"),
        "{error}"
    );
}

#[tokio::test]
async fn what_was_acknowledged_is_there_exactly_once_after_five_failovers_under_load() {
    let mut watched = Watched::start().await;
    let url = watched.url();
    let stores = [connect_waiting(&url).await, connect_waiting(&url).await];
    let sessions: Vec<String> = (0..4).map(|number| format!("client-{number}")).collect();
    let load = Load::start(&stores, &sessions);
    for failover in 1..=5 {
        load.progress(100).await;
        let lost = std::time::Instant::now();
        watched.lose_master().await;
        let promoted = lost.elapsed();
        // Nothing is acknowledged before there is a replica again.
        watched.restore().await;
        load.progress(1).await;
        println!(
            "failover {failover}: promoted after {promoted:.1?}, served after {:.1?}",
            lost.elapsed()
        );
    }
    load.progress(100).await;
    let (_, missing) = load.check(&stores[0]).await;
    assert_eq!(missing, 0);
}

#[tokio::test]
async fn a_write_that_no_replica_has_is_not_acknowledged_until_one_has_it() {
    let mut watched = Watched::start().await;
    let store = connect_waiting(&watched.url()).await;
    let id = session("a");
    store.append(&id, batch(["1"])).await.unwrap();

    watched.lose_replica().await;
    let append = batch(["2"]);
    let error = store.append(&id, append.clone()).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown(_)), "{error}");
    // The request is known by now, and still no replica has it.
    let error = store.append(&id, append.clone()).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown(_)), "{error}");

    watched.restore().await;
    let again = store.append(&id, append).await.unwrap();
    assert!(again.repeated);
    assert_eq!(texts(&read_all(&*store, &id).await), ["1", "2"]);
}

#[tokio::test]
async fn sentinels_have_a_password_of_their_own_and_speak_tls_as_the_master_does() {
    let guarded = Guarded::start().await;
    let store = |user: &str, query: &str| {
        let place = &guarded.address;
        Redis::connect(Settings {
            ca_file: Some(guarded.ca_file()),
            ..Settings::new(format!("rediss-sentinel://{user}@{place}/mymaster?{query}"))
        })
        .unwrap()
    };
    for query in [
        "sentinel_password=two",
        "sentinel_username=default&sentinel_password=two",
    ] {
        let store = store(":one", query);
        store.ready(LIMIT).await.unwrap();
        store.append(&session("a"), batch(["1"])).await.unwrap();
        assert!(store.describe().contains("with TLS"));
    }
    for (user, query, expected) in [
        // Neither is given to the other.
        (":one", "sentinel_password=one", "no Sentinel knows"),
        (":one", "", "no Sentinel knows"),
        (":two", "sentinel_password=two", "refused the user name or"),
    ] {
        let error = store(user, query).ready(Duration::from_secs(3)).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(expected), "{user} {query}: {error}");
    }
}
