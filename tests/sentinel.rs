//! The Redis store behind Sentinels: real ones, with servers that are lost and come back. They need
//! `redis-server`.

mod harness;

use std::sync::Arc;
use std::time::Duration;

use chat_memory::store::Store as _;
use chat_memory::store::redis::{Redis, Settings};

use harness::failover::Load;
use harness::sentinel::Watched;
use harness::stores::{batch, read_all, session, texts};
use harness::wait::LIMIT;

async fn connect(url: &str) -> Arc<Redis> {
    let store = Redis::connect(Settings::new(url)).unwrap();
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
async fn nothing_is_stored_twice_and_service_goes_on_over_five_failovers_under_load() {
    let mut watched = Watched::start().await;
    let url = watched.url();
    let stores = [connect(&url).await, connect(&url).await];
    let sessions: Vec<String> = (0..4).map(|number| format!("client-{number}")).collect();
    let load = Load::start(&stores, &sessions);
    for failover in 1..=5 {
        load.progress(100).await;
        let lost = std::time::Instant::now();
        watched.lose_master().await;
        let promoted = lost.elapsed();
        load.progress(1).await;
        println!(
            "failover {failover}: promoted after {promoted:.1?}, served after {:.1?}",
            lost.elapsed()
        );
        watched.restore().await;
    }
    load.progress(100).await;
    load.check(&stores[0]).await;
}
