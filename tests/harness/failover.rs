//! Clients that append while servers are lost, and what must hold afterwards.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chat_memory::message::now_ms;
use chat_memory::store::redis::Redis;
use chat_memory::store::{Append, Error, Store as _};
use tokio::task::JoinHandle;

use super::stores::{read_all, request, session, texts};
use super::wait::{LIMIT, until};

/// Clients that append to a session each, one message after the other, each with its request id,
/// repeated until it is acknowledged.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Vec<Arc<AtomicU64>>,
    clients: Vec<JoinHandle<Client>>,
}

struct Client {
    session: String,
    acknowledged: Vec<String>,
    /// Calls that ended without an outcome.
    unknown: usize,
}

impl Load {
    pub fn start(stores: &[Arc<Redis>], sessions: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged: Vec<Arc<AtomicU64>> = sessions.iter().map(|_| Arc::default()).collect();
        let mut clients = Vec::new();
        for ((name, store), count) in sessions
            .iter()
            .zip(stores.iter().cycle())
            .zip(&acknowledged)
        {
            let (store, name) = (Arc::clone(store), name.clone());
            let client = append_until(store, name, stop.clone(), count.clone());
            clients.push(tokio::spawn(client));
        }
        Self {
            stop,
            acknowledged,
            clients,
        }
    }

    pub fn acknowledged(&self) -> u64 {
        let counts = self.acknowledged.iter();
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Waits until so many more have been acknowledged. Says how long that took.
    pub async fn progress(&self, count: u64) -> Duration {
        let (since, goal) = (Instant::now(), self.acknowledged() + count);
        until("clients make progress", async || {
            (self.acknowledged() >= goal).then_some(())
        })
        .await;
        since.elapsed()
    }

    /// Waits until each client has so many more acknowledged.
    pub async fn progress_of_all(&self, count: u64) {
        let load = |of: &Arc<AtomicU64>| of.load(Ordering::Relaxed);
        let goals: Vec<u64> = self
            .acknowledged
            .iter()
            .map(|of| load(of) + count)
            .collect();
        until("each client makes progress", async || {
            let mut counts = self.acknowledged.iter().zip(&goals);
            counts.all(|(of, goal)| load(of) >= *goal).then_some(())
        })
        .await;
    }

    /// Ends the load, and checks that each message is there at most once, and that those are there
    /// that were acknowledged. Says how many were, and how many of them are missing.
    pub async fn check(self, store: &Redis) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut count, mut missing, mut unknown) = (0, 0, 0);
        for client in self.clients {
            let ended = tokio::time::timeout(2 * LIMIT, client).await;
            let client = ended.expect("a client ends").expect("a client");
            let stored = texts(&read_all(store, &session(&client.session)).await);
            let mut times: HashMap<&str, usize> = HashMap::new();
            for text in &stored {
                *times.entry(text).or_default() += 1;
            }
            let twice: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
            assert!(twice.is_empty(), "stored more than once: {twice:?}");
            let is_missing = |text: &&String| !times.contains_key(text.as_str());
            missing += client.acknowledged.iter().filter(is_missing).count();
            count += client.acknowledged.len();
            unknown += client.unknown;
            let number = |text: &String| {
                let (number, _) = text.split_once(' ').expect("a number first");
                number.parse::<u64>().expect("a number")
            };
            assert!(stored.is_sorted_by_key(number), "stored in another order");
        }
        println!("{count} acknowledged, {unknown} calls without an outcome, {missing} lost");
        (count, missing)
    }
}

async fn append_until(
    store: Arc<Redis>,
    name: String,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
) -> Client {
    let id = session(&name);
    let mut client = Client {
        session: name.clone(),
        acknowledged: Vec::new(),
        unknown: 0,
    };
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // With an id as the server makes them, as the elements of most appends have it.
        let text = format!(r#"{number} "id": "cm_{number:014}""#);
        let append = Append {
            elements: vec![text.clone().into()],
            request: request(&format!("{name}/{number}"), &text),
            time_ms: now_ms(),
            expected_last_sequence: None,
            expected_epoch: None,
        };
        loop {
            match store.append(&id, append.clone()).await {
                Ok(_) => break,
                Err(Error::OutcomeUnknown(_)) => client.unknown += 1,
                Err(Error::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{name}: {error}"),
            }
        }
        client.acknowledged.push(text);
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    client
}
