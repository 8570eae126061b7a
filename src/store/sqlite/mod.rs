//! The embedded store: one SQLite file, for a server that runs without Redis. Knows neither gRPC
//! nor models, nor what is in the elements.
//!
//! In reading order: [`open`] takes the file and brings it to this version (`schema.sql`, then
//! `schema_2.sql` to `schema_5.sql`), [`tables`] holds the statements, [`turns`] those of turns,
//! [`sessions`] those of sessions as a whole and [`fork`] those that copy one; [`writer`] is the one
//! thread that writes, many writes to a commit, through [`log`], and [`notice`] looks for what it does
//! not see; this file puts them together, and nearly all waiting is in it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task;
use tokio::time::{Instant, timeout_at};

use super::sessions::Upkeep;
use super::{
    Append, Appended, Bells, Cursor, Error, List, Page, Read, Result, SessionsPage, Store,
};
use crate::message::{SessionId, UnixMillis, now_ms};
use crate::workers;
use open::Held;
use writer::{Claim, Job, Ring, Task, Work, Writer};

pub use open::OpenError;

mod fork;
mod log;
mod notice;
mod open;
mod sessions;
mod tables;
mod turns;
mod writer;

/// How long a connection waits while another program (one of SQLite's tools) writes.
const BUSY_MS_MAX: u64 = 5_000;
/// Reads at a time, at most. Each has a connection with a cache of 2 MiB.
const READERS_MAX: usize = 4;
/// Bytes that wait to be written, at most; further calls wait for room.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// What a job takes of those besides its elements: bounds the number of jobs.
const JOB_BYTES: usize = 1 << 10;

/// Tells the time, in milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> UnixMillis + Send + Sync>;

/// What can be set about the store.
#[derive(Clone)]
pub struct Options {
    /// By which the store forgets requests and cleared sessions.
    pub clock: Clock,
    /// How long a call may take, waiting included.
    pub call_time_max: Duration,
    /// How large the file may grow, the log beside it (64 MiB) not counted; as far as the disk
    /// goes if `None`.
    pub size_bytes_max: Option<u64>,
    /// What the store does by itself with sessions.
    pub upkeep: Upkeep,
    /// The runtimes of the workers that call it, in the order of their numbers; the one that it is
    /// opened within, if none is named.
    pub workers: Vec<Handle>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clock: Arc::new(now_ms),
            call_time_max: Duration::from_secs(10),
            size_bytes_max: None,
            upkeep: Upkeep::default(),
            workers: Vec::new(),
        }
    }
}

/// The store of one SQLite file.
///
/// An acknowledged write is on the disk (write-ahead log, `synchronous = FULL`). The file has one
/// server at a time; SQLite's own tools can read and write it meanwhile.
///
/// Dropping the store writes what is queued, empties the log into the file and closes it; that
/// blocks for as long as it takes.
pub struct Sqlite {
    shared: Arc<Shared>,
    /// To the writing thread, which ends when this is dropped. `None` if there is none.
    jobs: Option<mpsc::UnboundedSender<Box<dyn Job>>>,
    /// Room in the queue, in bytes.
    room: Arc<Semaphore>,
    /// Turns to read.
    turns: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
    key_prefix: String,
    call_time_max: Duration,
    upkeep: Upkeep,
    /// Who looks for what bells are to ring for; nobody before there is one.
    looking: Mutex<Option<task::JoinHandle<()>>>,
}

/// What the store, its writing thread and its reads share.
struct Shared {
    /// Connections that no read uses just now.
    readers: Mutex<Vec<Connection>>,
    reachable: watch::Sender<bool>,
    /// Why the writing thread has stopped before its time.
    stopped: OnceLock<String>,
    clock: Clock,
    commits: AtomicU64,
    /// Whether something was cleared or rewound since the writing thread last looked: it is in the log
    /// still. By itself, so that a job that has it does not keep the file.
    cleared: Arc<AtomicBool>,
    bells: Bells,
    /// Fields drop in this order: the file is let go after the last connection to it is closed.
    held: Held,
}

impl Shared {
    fn stop(&self, reason: String) {
        // The first reason stands.
        let _ = self.stopped.set(reason);
        self.reachable.send_replace(false);
    }

    fn stopped(&self) -> Error {
        let reason = self
            .stopped
            .get()
            .map_or("closed, or open for reading only", String::as_str);
        Error::Unavailable(format!("the embedded store has stopped: {reason}"))
    }

    fn close_readers(&self) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.clear();
    }

    /// Runs a read on a connection of its own. Blocks.
    fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        if self.stopped.get().is_some() {
            return Err(self.stopped());
        }
        let lock = || self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = lock().pop();
        let reader = match idle {
            Some(reader) => reader,
            None => open::open_reader(&self.held)?,
        };
        let result = work(&reader);
        // After an error of SQLite, the connection is closed instead: a new one may do better.
        if matches!(result, Ok(_) | Err(Error::RequestReused)) {
            lock().push(reader);
        }
        result
    }
}

impl Sqlite {
    /// Opens the file, or creates it. `key_prefix` comes before each session id in the file, as it
    /// does in Redis: stores with different prefixes can follow each other in one file.
    pub fn open(path: &Path, key_prefix: &str) -> std::result::Result<Self, OpenError> {
        Self::open_with(path, key_prefix, Options::default())
    }

    /// Opens a file to read it only, whether or not a server uses it at the same time. Every write
    /// fails.
    pub fn open_reader(path: &Path, key_prefix: &str) -> std::result::Result<Self, OpenError> {
        let options = Options::default();
        let (held, reader) = open::open_shared(path)?;
        let shared = Arc::new(Shared {
            readers: Mutex::new(vec![reader]),
            reachable: watch::Sender::new(true),
            stopped: OnceLock::new(),
            clock: options.clock,
            commits: AtomicU64::new(0),
            cleared: Arc::default(),
            bells: Bells::default(),
            held,
        });
        Ok(Self {
            shared,
            jobs: None,
            room: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            turns: Arc::new(Semaphore::new(READERS_MAX)),
            writer: None,
            key_prefix: key_prefix.to_owned(),
            call_time_max: options.call_time_max,
            upkeep: options.upkeep,
            looking: Mutex::default(),
        })
    }

    /// Opens the file, or creates it, with other settings than the default ones.
    pub fn open_with(
        path: &Path,
        key_prefix: &str,
        options: Options,
    ) -> std::result::Result<Self, OpenError> {
        let held = Held::take(path)?;
        let db = open::open_writer(&held, options.size_bytes_max)?;
        let shared = Arc::new(Shared {
            readers: Mutex::default(),
            reachable: watch::Sender::new(true),
            stopped: OnceLock::new(),
            clock: options.clock,
            commits: AtomicU64::new(0),
            cleared: Arc::default(),
            bells: Bells::default(),
            held,
        });
        let (jobs, queue) = mpsc::unbounded_channel();
        let mut workers = options.workers;
        if workers.is_empty() {
            workers.extend(Handle::try_current());
        }
        let writer = Writer {
            db,
            shared: shared.clone(),
            jobs: queue,
            workers,
            pruned_ms: None,
            // A server that died may have left what it had cleared.
            log_is_stale: true,
            emptied: None,
        };
        let writer = std::thread::Builder::new()
            .name("sqlite-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| OpenError::Failed {
                path: path.to_owned(),
                reason: format!("no thread can be started: {error}"),
            })?;
        Ok(Self {
            shared,
            jobs: Some(jobs),
            room: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            turns: Arc::new(Semaphore::new(READERS_MAX)),
            writer: Some(writer),
            key_prefix: key_prefix.to_owned(),
            call_time_max: options.call_time_max,
            upkeep: options.upkeep,
            looking: Mutex::default(),
        })
    }

    /// How many transactions were committed since the file was opened. Far fewer than writes when
    /// many come at a time.
    pub fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Relaxed)
    }

    fn key(&self, session: &SessionId) -> String {
        format!("{}{session}", self.key_prefix)
    }

    /// Has the writing thread do something, and waits for the commit.
    async fn write<T: Send + 'static>(
        &self,
        size: usize,
        work: impl Fn(&Connection, UnixMillis) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.submit(size, Box::new(work), None).await
    }

    /// The same, and rings the session's bells after the commit if it has changed something.
    async fn write_and_ring<T: Send + 'static>(
        &self,
        session: &SessionId,
        is_change: fn(&T) -> bool,
        size: usize,
        work: impl Fn(&Connection, UnixMillis) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let ring = Ring {
            bells: self.shared.bells.clone(),
            session: session.clone(),
            is_change,
        };
        self.submit(size, Box::new(work), Some(ring)).await
    }

    /// Has the writing thread do something small that nobody waits for, if there is room for it.
    fn leave(&self, work: impl Fn(&Connection, UnixMillis) -> Result<()> + Send + 'static) {
        let room = self.room.clone().try_acquire_many_owned(JOB_BYTES as u32);
        if let (Some(jobs), Ok(room)) = (&self.jobs, room) {
            let task = Task {
                work: Box::new(work) as Work<()>,
                result: None,
                reply: oneshot::channel().0,
                claim: Claim::default(),
                size: JOB_BYTES,
                room,
                ring: None,
                worker: workers::index(),
            };
            // One that has stopped says so to those who wait.
            let _ = jobs.send(Box::new(task));
        }
    }

    async fn submit<T: Send + 'static>(
        &self,
        size: usize,
        work: Work<T>,
        ring: Option<Ring<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.call_time_max;
        let size = JOB_BYTES + size;
        let places = size.min(QUEUE_BYTES_MAX) as u32;
        let waiting = timeout_at(deadline, self.room.clone().acquire_many_owned(places));
        let Ok(Ok(room)) = waiting.await else {
            let reason = "too many writes wait for the disk";
            return Err(Error::Unavailable(reason.to_owned()));
        };

        let (reply, answer) = oneshot::channel();
        let claim = Claim::default();
        let task = Task {
            work,
            result: None,
            reply,
            claim: claim.clone(),
            size,
            room,
            ring,
            worker: workers::index(),
        };
        let Some(jobs) = &self.jobs else {
            return Err(self.shared.stopped());
        };
        if jobs.send(Box::new(task)).is_err() {
            return Err(self.shared.stopped());
        }

        // A caller that goes away, by dropping the future, gives the job up as well.
        let given_up = GiveUp(claim);
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            // The writing thread answers each job it takes; so this one it did not.
            Ok(Err(_)) => Err(self.shared.stopped()),
            Err(_) if given_up.0.take() => Err(Error::Unavailable(format!(
                "the write could not begin within {:?}",
                self.call_time_max
            ))),
            Err(_) => Err(Error::OutcomeUnknown(format!(
                "the write did not end within {:?}",
                self.call_time_max
            ))),
        }
    }

    /// Reads in a thread that may block.
    async fn query<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let deadline = Instant::now() + self.call_time_max;
        let too_late = || {
            let limit = self.call_time_max;
            Error::Unavailable(format!("the read did not end within {limit:?}"))
        };
        let waiting = timeout_at(deadline, self.turns.clone().acquire_owned());
        let Ok(Ok(turn)) = waiting.await else {
            return Err(too_late());
        };
        let shared = self.shared.clone();
        let reading = tokio::task::spawn_blocking(move || {
            // Not given back before the read has ended, whether or not somebody waits for it.
            let _turn = turn;
            shared.read(work)
        });
        match timeout_at(deadline, reading).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(Error::Unavailable(format!("the read broke off: {error}"))),
            Err(_) => Err(too_late()),
        }
    }
}

/// Gives a job up when dropped, unless the writer has begun it.
struct GiveUp(Claim);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.take();
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // Its panics are caught and told in there.
            let _ = writer.join();
        }
    }
}

#[async_trait]
impl Store for Sqlite {
    async fn append(&self, session: &SessionId, append: Append) -> Result<Appended> {
        let key = self.key(session);
        let size = append.elements.iter().map(|element| element.len()).sum();
        let upkeep = self.upkeep;
        let is_new = |appended: &Appended| !appended.repeated;
        self.write_and_ring(session, is_new, size, move |db, now_ms| {
            tables::append(db, &key, &append, &upkeep, now_ms)
        })
        .await
    }

    async fn read(&self, session: &SessionId, read: Read) -> Result<Page> {
        let key = self.key(session);
        let clock = self.shared.clock.clone();
        let upkeep = self.upkeep;
        let reading = {
            let key = key.clone();
            move |db: &Connection| tables::read(db, &key, &read, &upkeep, clock())
        };
        let (page, is_due) = self.query(reading).await?;
        if is_due {
            self.leave(move |db, now_ms| sessions::touch(db, &key, &upkeep, now_ms));
        }
        Ok(page)
    }

    async fn clear(&self, session: &SessionId) -> Result<i64> {
        let key = self.key(session);
        let cleared = self.shared.cleared.clone();
        self.write_and_ring(
            session,
            |_| true,
            0,
            move |db, now_ms| {
                cleared.store(true, Ordering::Relaxed);
                tables::clear(db, &key, now_ms)
            },
        )
        .await
    }

    /// In the order of the names. The cursor is the key that comes next.
    async fn sessions(&self, list: List) -> Result<SessionsPage> {
        let prefix = format!("{}{}", self.key_prefix, list.prefix);
        let from = list
            .cursor
            .map_or_else(|| prefix.clone(), |cursor| cursor.0);
        let limit = list.limit.max(1);
        let clock = self.shared.clock.clone();
        let rows = self
            .query(move |db| tables::sessions(db, &from, limit, clock()))
            .await?;

        let mut page = SessionsPage {
            sessions: Vec::new(),
            unusable: 0,
            next: None,
        };
        if rows.len() == limit
            && let Some((last, _)) = rows.last()
        {
            // Nothing stands between a text and the same text with this behind it.
            page.next = Some(Cursor(format!("{last}\0")));
        }
        for (key, has_messages) in rows {
            // The keys that begin with the prefix stand together.
            if !key.starts_with(&prefix) {
                page.next = None;
                break;
            }
            if has_messages {
                match SessionId::parse(&key[self.key_prefix.len()..]) {
                    Ok(session) => page.sessions.push(session),
                    Err(_) => page.unusable += 1,
                }
            }
        }
        Ok(page)
    }

    async fn expire(&self, session: &SessionId, at_ms: UnixMillis) -> Result<bool> {
        let key = self.key(session);
        self.write(0, move |db, now_ms| {
            sessions::expire(db, &key, at_ms, now_ms)
        })
        .await
    }

    /// False once the writing thread had to stop: the file was moved away, or a defect. A full or
    /// busy disk is an error of the calls that meet it.
    fn reachable(&self) -> watch::Receiver<bool> {
        self.shared.reachable.subscribe()
    }

    fn describe(&self) -> String {
        format!("SQLite file {}", self.shared.held.path.display())
    }
}
