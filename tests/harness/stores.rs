//! Stores to test, and short ways to write to them and read them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use chat_memory::message::{SessionId, UnixMillis};
use chat_memory::store::redis::{Redis, Settings};
use chat_memory::store::sessions::{Look, Upkeep};
use chat_memory::store::sqlite::{self, Sqlite};
use chat_memory::store::{Append, Body, Element, Order, Page, Read, RequestKey, Sequence, Store};
use tempfile::TempDir;

/// A store, with what it needs to run. All of it goes when this is dropped.
#[async_trait]
pub trait Backend: Send {
    /// The store.
    fn store(&self) -> Arc<dyn Store>;

    /// Ends the store and whatever keeps its data, in an orderly way, and starts both again. No
    /// [`Arc`] of the old store may be left.
    async fn restart(&mut self);
}

/// An embedded store, in a directory of its own.
pub async fn sqlite() -> EmbeddedStore {
    sqlite_with(Upkeep::default()).await
}

/// One that does this by itself with sessions.
pub async fn sqlite_with(upkeep: Upkeep) -> EmbeddedStore {
    let directory = TempDir::new().unwrap();
    let store = Some(open_in(&directory, upkeep));
    EmbeddedStore {
        store,
        directory,
        upkeep,
    }
}

pub struct EmbeddedStore {
    /// `None` only during a restart.
    store: Option<Arc<Sqlite>>,
    directory: TempDir,
    upkeep: Upkeep,
}

fn open_in(directory: &TempDir, upkeep: Upkeep) -> Arc<Sqlite> {
    let path = directory.path().join("chat-memory.db");
    let options = sqlite::Options {
        upkeep,
        ..Default::default()
    };
    Arc::new(Sqlite::open_with(&path, "message_store:", options).unwrap())
}

#[async_trait]
impl Backend for EmbeddedStore {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone().unwrap()
    }

    async fn restart(&mut self) {
        let old = self.store.take().unwrap();
        let old = Arc::try_unwrap(old).ok();
        drop(old.expect("the test still holds the store"));
        self.store = Some(open_in(&self.directory, self.upkeep));
    }
}

/// A store on a Redis of its own, which keeps its data over a restart.
pub async fn redis() -> RedisStore {
    redis_with(Upkeep::default()).await
}

/// One that does this by itself with sessions.
pub async fn redis_with(upkeep: Upkeep) -> RedisStore {
    let server = super::redis::Redis::start_with(super::redis::Options {
        durable: true,
        ..Default::default()
    })
    .await;
    let store = Some(connect_to(&server, upkeep).await);
    RedisStore {
        store,
        server,
        upkeep,
    }
}

pub struct RedisStore {
    /// `None` only during a restart.
    store: Option<Arc<Redis>>,
    server: super::redis::Redis,
    upkeep: Upkeep,
}

async fn connect_to(server: &super::redis::Redis, upkeep: Upkeep) -> Arc<Redis> {
    let settings = Settings {
        upkeep,
        ..Settings::new(server.url())
    };
    let store = Redis::connect(settings).unwrap();
    store.ready(super::wait::LIMIT).await.unwrap();
    Arc::new(store)
}

#[async_trait]
impl Backend for RedisStore {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone().unwrap()
    }

    async fn restart(&mut self) {
        self.store = None;
        self.server.stop().await;
        self.server.restart().await;
        self.store = Some(connect_to(&self.server, self.upkeep).await);
    }
}

/// A session that no other test uses.
pub fn fresh_session() -> SessionId {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    session(&format!(
        "test-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ))
}

pub fn session(id: &str) -> SessionId {
    SessionId::parse(id).unwrap()
}

/// The key of a request that no other call uses.
pub fn fresh_request() -> RequestKey {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = format!("fresh-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    request(&id, "")
}

pub fn request(id: &str, body: &str) -> RequestKey {
    RequestKey::new("append", id, body.as_bytes())
}

/// An append without conditions, under a request key of its own.
pub fn batch<E: Into<Bytes>>(elements: impl IntoIterator<Item = E>) -> Append {
    Append {
        elements: elements.into_iter().map(Into::into).collect(),
        request: fresh_request(),
        time_ms: chat_memory::message::now_ms(),
        expected_last_sequence: None,
        expected_epoch: None,
    }
}

/// Appends the texts `1` to `count`, one call each.
pub async fn fill(store: &dyn Store, session: &SessionId, count: usize) {
    for number in 1..=count {
        store
            .append(session, batch([number.to_string()]))
            .await
            .unwrap();
    }
}

/// A read of everything, oldest first.
pub fn all() -> Read {
    Read {
        order: Order::OldestFirst,
        after: 0,
        before: None,
        last: None,
        limit: 100_000,
        bytes_max: usize::MAX,
    }
}

pub async fn read_all(store: &dyn Store, session: &SessionId) -> Page {
    let page = store.read(session, all()).await.unwrap();
    assert!(!page.more, "a read of everything left something out");
    page
}

pub fn sequences(page: &Page) -> Vec<Sequence> {
    page.elements
        .iter()
        .map(|element| element.sequence)
        .collect()
}

pub fn bytes(element: &Element) -> &Bytes {
    match &element.body {
        Body::Bytes(bytes) => bytes,
        Body::TooLarge(size) => panic!("element {} has {size} bytes", element.sequence),
    }
}

/// The elements as texts.
pub fn texts(page: &Page) -> Vec<String> {
    let text = |element| String::from_utf8(bytes(element).to_vec()).unwrap();
    page.elements.iter().map(text).collect()
}

/// When a session will be gone by itself.
pub async fn expiry(store: &dyn Store, session: &SessionId) -> Option<UnixMillis> {
    let seen = store.look(session, Look::default()).await.unwrap();
    seen.expires_ms
}
