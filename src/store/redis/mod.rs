//! The Redis store: LangChain's lists, and beside each a few small keys of our own. Every call is
//! one script, which Redis runs as a whole (besides it, turns note which of them run). Knows no gRPC, no models, and not what the bytes mean.
//!
//! - `scripts/*.lua`: what is kept and what each call does; begin with `keys.lua`
//! - [`layout`]: the names of the keys
//! - [`append`]: passes appends to their script, those of many callers together
//! - [`turns`]: passes arguments to the scripts on turns and parses what they reply
//! - [`sessions`]: the same for sessions as a whole, and how one is copied
//! - [`index`]: which sessions there are, for lists of them
//! - [`watcher`]: notices changes, for those who wait for one
//! - [`connection`]: how Redis is reached, and what happens when it is not
//! - [`router`]: which connection a command takes; [`cluster`]: the nodes of a cluster, and their slots
//! - [`sentinel`]: where the master is that Sentinels watch over; [`url`]: URLs of several servers
//! - [`newest`]: a quicker way to read the newest elements; [`lean`]: of which sessions
//! - [`invocation`]: a script and what it is given
//! - [`writers`]: connections for writes that replicas must have
//! - [`inspect`]: looks at keys as they are, without writing, for people who want to know

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, RedisError, Value};
use tokio::runtime::Handle;
use tokio::sync::watch;

use self::append::Appends;
use self::connection::{Failure, explain};
use self::index::Index;
use self::invocation::Invocation;
use self::layout::{Keys, Scripts, pattern};
use self::lean::{Known, Lean, SMALL_MAX};
use self::newest::{Found, Newest};
use self::router::{Connection, Target};
use self::watcher::Watch;
use super::sessions::Upkeep;
use super::{
    Append, Appended, Body, Cursor, ELEMENT_BYTES_MAX, Element, Epoch, Error, List, Order, Page,
    Read, Result, Sequence, SessionsPage, Store,
};
use crate::message::{SessionId, UnixMillis, now_ms};
use crate::secret::Secret;
use crate::workers;

mod append;
mod cluster;
mod connection;
mod index;
pub mod inspect;
mod invocation;
mod layout;
mod lean;
mod newest;
mod router;
mod sentinel;
mod sessions;
mod turns;
mod url;
mod watcher;
mod writers;

/// LangChain's prefix of keys.
pub const KEY_PREFIX_DEFAULT: &str = "message_store:";
/// How long an answer of Redis may take by default.
pub const TIMEOUT_MS_DEFAULT: u64 = 2_000;

/// Elements that are read by a transaction, at most: 512 KiB if they are small.
const NEWEST_MAX: usize = 64;

/// Sequences above this are no whole numbers to Lua.
const SEQUENCE_MAX: Sequence = 1 << 53;

/// How to reach Redis.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `redis://[user][:password@]host[:port][/database]`, `rediss://…` for TLS, or
    /// `redis+unix:///path[?db=…&user=…&pass=…]`, or
    /// `redis-sentinel://[user:password@]host[:port][,host[:port]…]/master[/database]`, or
    /// `redis-cluster://[user:password@]host[:port][,host[:port]…]`.
    pub url: Secret,
    /// What the keys of sessions begin with. Without braces; not empty with a cluster.
    pub key_prefix: String,
    /// How long Redis may take to accept a connection, and to answer: too short, and a slow answer
    /// counts as none; too long, and callers wait for a Redis that is gone. A page of 3 MiB must
    /// fit into it.
    pub timeout_ms: u64,
    /// Certificates (PEM) to trust besides the system's, for `rediss://`.
    pub ca_file: Option<PathBuf>,
    /// Replicas that must have a write before it is acknowledged. With too few in time, its outcome
    /// is unknown: the master has it, and a failover may lose it.
    pub wait_replicas: u32,
    /// What the store does by itself with sessions.
    pub upkeep: Upkeep,
}

impl Settings {
    /// The defaults, for a URL.
    pub fn new(url: impl Into<Secret>) -> Self {
        Self {
            url: url.into(),
            key_prefix: KEY_PREFIX_DEFAULT.to_owned(),
            timeout_ms: TIMEOUT_MS_DEFAULT,
            ca_file: None,
            wait_replicas: 0,
            upkeep: Upkeep::default(),
        }
    }

    /// Whether a store can be made of these.
    pub fn check(&self) -> std::result::Result<(), InvalidSettings> {
        self.target().map(drop)
    }

    fn target(&self) -> std::result::Result<Target, InvalidSettings> {
        if self.key_prefix.contains(['{', '}']) {
            return Err(InvalidSettings::KeyPrefix);
        }
        if self.timeout_ms == 0 {
            return Err(InvalidSettings::Timeout);
        }
        let timeout = Duration::from_millis(self.timeout_ms);
        let target = Target::new(self.url.expose(), self.ca_file.as_deref(), timeout)?;
        if self.key_prefix.is_empty() && matches!(target, Target::Cluster(_)) {
            return Err(InvalidSettings::NoKeyPrefix);
        }
        Ok(target)
    }
}

/// Why no store can be made of [`Settings`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSettings {
    #[error("the URL of Redis is not valid: {0}")]
    Url(String),
    #[error("the prefix of keys must not contain `{{` or `}}`: Redis Cluster gives them a meaning")]
    KeyPrefix,
    #[error(
        "the prefix of keys must not be empty with a Redis Cluster: it puts the index into one slot"
    )]
    NoKeyPrefix,
    #[error("the timeout must be at least 1 ms")]
    Timeout,
    #[error("the certificates {}: {reason}", .path.display())]
    Certificates { path: PathBuf, reason: String },
}

/// How a worker reaches Redis.
struct Lane {
    connection: Arc<Connection>,
    appends: Arc<Appends>,
}

/// Keeps sessions in Redis.
///
/// A call takes at most 2 × (1 s + timeout), 6 s by default: twice, it waits up to 1 s for a
/// connection and up to the timeout for an answer. An append without an answer is repeated once,
/// under its request key, so it is stored once; [`Appended::repeated`] is then true if the first
/// attempt had arrived. [`begin_turn`](super::TurnStore::begin_turn) and others that also note which
/// turns run take up to three times as long, a list of sessions or a fork that for each page.
///
/// If Redis refuses writes (a full disk, a replica), reads still work as long as it answers them.
pub struct Redis {
    /// One for each worker; a single one where writes wait for replicas.
    lanes: Vec<Lane>,
    scripts: Arc<Scripts>,
    index: Index,
    watch: Watch,
    lean: Lean,
    /// Whether reads start the time to live anew, which `scripts/read.lua` does.
    reads_extend: bool,
    key_prefix: String,
    description: String,
}

impl Redis {
    /// Makes the store and starts to connect; does not wait for Redis to be there. Must be called
    /// within a Tokio runtime.
    pub fn connect(settings: Settings) -> std::result::Result<Self, InvalidSettings> {
        Self::connect_for(settings, &[Handle::current()])
    }

    /// Like [`connect`](Self::connect), for calls from these workers' runtimes, at least one, in the
    /// order of their numbers. Each has connections of its own, unless writes wait for replicas; what
    /// the store does by itself, the first one does.
    pub fn connect_for(
        settings: Settings,
        workers: &[Handle],
    ) -> std::result::Result<Self, InvalidSettings> {
        let target = settings.target()?;
        let description = target.describe();
        let scripts = Arc::new(Scripts::new(settings.upkeep));
        let replicas = settings.wait_replicas;
        // Waiting for replicas takes several connections already.
        let many = if replicas > 0 { 1 } else { workers.len() };
        let lanes: Vec<_> = workers[..many]
            .iter()
            .map(|worker| {
                let _within = worker.enter();
                let connection = Arc::new(Connection::start(target.clone(), replicas));
                let appends = Appends::new(Arc::clone(&connection), Arc::clone(&scripts));
                Lane {
                    connection,
                    appends,
                }
            })
            .collect();
        let connection = Arc::clone(&lanes[0].connection);
        let prefix = settings.key_prefix;
        Ok(Self {
            index: Index::start(Arc::clone(&connection), Arc::clone(&scripts), &prefix),
            watch: Watch::start(target, connection, Arc::clone(&scripts), &prefix),
            lanes,
            lean: Lean::new(),
            reads_extend: settings.upkeep.reads_extend,
            description,
            scripts,
            key_prefix: prefix,
        })
    }

    /// Waits until Redis can be used; [`Error::Unavailable`] says why not, if that takes longer
    /// than the limit.
    pub async fn ready(&self, limit: Duration) -> Result<()> {
        let ready = self.lanes[0].connection.ready(limit).await;
        ready.map_err(Error::Unavailable)
    }

    /// The lane of this worker.
    fn lane(&self) -> &Lane {
        &self.lanes[workers::index() % self.lanes.len()]
    }

    fn connection(&self) -> &Connection {
        &self.lane().connection
    }

    /// Reads a page; of elements above `element_max` bytes only the size.
    async fn read_page(&self, session: &SessionId, read: Read, element_max: usize) -> Result<Page> {
        let order = match read.order {
            Order::OldestFirst => "oldest first",
            Order::NewestFirst => "newest first",
        };
        let mut script = self.invocation(&self.scripts.read, session);
        script
            .arg(order)
            .arg(read.after.clamp(0, SEQUENCE_MAX))
            .arg(optional(
                read.before.map(|before| before.clamp(0, SEQUENCE_MAX)),
            ))
            .arg(optional(read.last.map(to_lua)))
            .arg(to_lua(read.limit.max(1)))
            .arg(to_lua(read.bytes_max))
            .arg(to_lua(element_max));
        let answer = self.connection().run_repeatable(&script).await;
        let mut reply = Reply::of(answer.map_err(failure_of_read)?)?;
        if reply.word != "page" {
            return Err(reply.refusal());
        }

        let last_sequence = reply.number()?;
        let epoch = Epoch(reply.number()?);
        let after = reply.number()?.max(read.after);
        let more = reply.number()? == 1;
        let step = match read.order {
            Order::OldestFirst => 1,
            Order::NewestFirst => -1,
        };
        let mut sequences = parse_runs(reply.list()?, step)?.into_iter();
        let mut elements = Vec::new();
        for value in reply.list()? {
            let body = match value {
                Value::BulkString(bytes) => Body::Bytes(Bytes::from(bytes)),
                Value::Int(size) => Body::TooLarge(usize::try_from(size).unwrap_or(usize::MAX)),
                other => return Err(unexpected(&other)),
            };
            let sequence = sequences
                .next()
                .ok_or_else(|| Error::Corrupt("a script left out a sequence".to_owned()))?;
            elements.push(Element { sequence, body });
        }
        if newest_of(&read).is_some() {
            self.lean.note_small(session, are_small(&elements));
        }
        Ok(Page {
            elements,
            more,
            after,
            before: read.before.unwrap_or(last_sequence + 1),
            last_sequence,
            epoch,
        })
    }

    /// Reads a page of the newest elements by a transaction, which copies them less often than a
    /// script does, but knows no limit of bytes: only for sessions whose newest elements were small
    /// when they were last seen. `None` if that does not do.
    async fn read_newest(
        &self,
        session: &SessionId,
        read: Read,
        element_max: usize,
    ) -> Result<Option<Page>> {
        let (Some(node), Some(newest)) = (self.connection().one(), self.newest(session, &read))
        else {
            return Ok(None);
        };
        let mut commands = redis::pipe();
        commands.atomic();
        for command in newest {
            commands.add_command(command);
        }
        match node.query(&commands).await {
            Ok((answers, _)) => Ok(self.parse_newest(session, read, element_max, answers)),
            // Whatever it is, the other way finds it, too, and says it.
            Err(Failure::Refused(_)) => {
                Ok(self.parse_newest(session, read, element_max, Vec::new()))
            }
            Err(failure) => Err(failure_of_read(failure)),
        }
    }

    /// The commands of a transaction that reads the newest elements, if they may be read so.
    fn newest(&self, session: &SessionId, read: &Read) -> Option<[Cmd; 4]> {
        let wanted = newest_of(read)?;
        let may_be_read = !self.reads_extend && self.lean.of(session) == Known::Small;
        may_be_read.then(|| newest::commands(&Keys::new(&self.key_prefix, session), wanted))
    }

    /// Reads the answers to these. `None` if it must be read another way.
    fn parse_newest(
        &self,
        session: &SessionId,
        read: Read,
        element_max: usize,
        answers: Vec<Value>,
    ) -> Option<Page> {
        let Newest {
            last,
            epoch,
            length,
            elements: newest,
        } = match newest::read(answers, now_ms()) {
            Found::Plain(newest) => newest,
            Found::Changed => return None,
            Found::Unusual => {
                self.lean.note(session, Known::Unusual);
                return None;
            }
        };
        let body = |bytes: Vec<u8>| match bytes.len() > element_max {
            true => Body::TooLarge(bytes.len()),
            false => Body::Bytes(Bytes::from(bytes)),
        };
        let elements = newest.into_iter().zip((0..=last).rev());
        let mut elements: Vec<_> = elements
            .map(|(bytes, sequence)| Element {
                sequence,
                body: body(bytes),
            })
            .collect();
        self.lean.note_small(session, are_small(&elements));
        if read.order == Order::OldestFirst {
            elements.reverse();
        }
        // As read.lua counts: a size takes no room, and the first always comes.
        let mut bytes = 0;
        let past_limit = elements.iter().enumerate().position(|(place, element)| {
            if let Body::Bytes(body) = &element.body {
                bytes += body.len();
            }
            place > 0 && bytes > read.bytes_max
        });
        elements.truncate(past_limit.unwrap_or(elements.len()));
        let range = read.last.map_or(length, |last| to_lua(last).min(length));
        Some(Page {
            more: range > to_lua(elements.len()),
            elements,
            after: read.last.map_or(0, |count| (last - to_lua(count)).max(0)),
            before: last + 1,
            last_sequence: last,
            epoch,
        })
    }

    /// Takes note of a write to a session that was acknowledged.
    fn wrote(&self, session: &SessionId) {
        self.index.note(session);
        self.watch.ring(session);
    }

    fn invocation<'a>(&self, script: &'a redis::Script, session: &SessionId) -> Invocation<'a> {
        let keys = Keys::new(&self.key_prefix, session);
        Invocation::new(script, &keys.in_order())
    }
}

#[async_trait]
impl Store for Redis {
    async fn append(&self, session: &SessionId, append: Append) -> Result<Appended> {
        let is_large = |element: &Bytes| element.len() > SMALL_MAX;
        let has_large = append.elements.iter().any(is_large);
        let keys = Keys::new(&self.key_prefix, session);
        let appended = self.lane().appends.append(keys, append).await?;
        if !appended.repeated {
            self.wrote(session);
            if has_large || self.lean.of(session) == Known::Unusual {
                self.lean.note(session, Known::Nothing);
            }
        }
        Ok(appended)
    }

    async fn read(&self, session: &SessionId, read: Read) -> Result<Page> {
        let element_max = ELEMENT_BYTES_MAX;
        match self.read_newest(session, read, element_max).await? {
            Some(page) => Ok(page),
            None => self.read_page(session, read, element_max).await,
        }
    }

    async fn clear(&self, session: &SessionId) -> Result<i64> {
        let script = self.invocation(&self.scripts.clear, session);
        // Not repeated: a second clear would count nothing.
        let answer = self.connection().write(&script).await;
        let mut reply = Reply::of(answer.map_err(failure_of_write)?)?;
        match reply.word.as_str() {
            "cleared" => {
                self.watch.ring(session);
                reply.number()
            }
            _ => Err(reply.refusal()),
        }
    }

    /// One SCAN. The cursor is Redis' own, with the run of Redis that it belongs to: another run
    /// walks in another order.
    async fn sessions(&self, list: List) -> Result<SessionsPage> {
        let cursor = list.cursor.unwrap_or(Cursor(String::new()));
        let (run_id, mut position) = cursor.0.split_once('/').unwrap_or(("", "0"));
        let pattern = pattern(&format!("{}{}", self.key_prefix, list.prefix));
        loop {
            let mut commands = redis::pipe();
            commands
                .cmd("SCAN")
                .arg(position)
                .arg("MATCH")
                .arg(&pattern)
                .arg("COUNT")
                .arg(list.limit.max(1))
                .arg("TYPE")
                .arg("list");
            let answer = self.connection().query(&commands).await;
            let (values, answered_by) = answer.map_err(failure_of_read)?;
            if position != "0" && *answered_by != *run_id {
                position = "0";
                continue;
            }
            let (next, keys) = inspect::parse_scan(values.into_iter().next().unwrap_or_default())?;
            let mut page = SessionsPage {
                sessions: Vec::with_capacity(keys.len()),
                unusable: 0,
                next: (next != "0").then(|| Cursor(format!("{answered_by}/{next}"))),
            };
            for key in keys.into_iter().filter(|key| !inspect::is_copy(key)) {
                let id = key.get(self.key_prefix.len()..).unwrap_or_default();
                let id = String::from_utf8(id.to_vec()).ok();
                match id.and_then(|id| SessionId::parse(id).ok()) {
                    Some(session) => page.sessions.push(session),
                    None => page.unusable += 1,
                }
            }
            return Ok(page);
        }
    }

    async fn expire(&self, session: &SessionId, at_ms: UnixMillis) -> Result<bool> {
        let mut script = self.invocation(&self.scripts.expire, session);
        script.arg(at_ms);
        let answer = self.connection().write_repeatable(&script).await;
        let mut reply = Reply::of(answer.map_err(failure_of_write)?)?;
        match reply.word.as_str() {
            "expires" => Ok(reply.number()? == 1),
            _ => Err(reply.refusal()),
        }
    }

    fn reachable(&self) -> watch::Receiver<bool> {
        self.lanes[0].connection.reachable()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

/// How many of the newest elements are asked for, if nothing else is, and they are few.
fn newest_of(read: &Read) -> Option<usize> {
    let wanted = match (read.order, read.last) {
        (Order::OldestFirst, last) => last.filter(|last| *last <= read.limit)?,
        (Order::NewestFirst, last) => last.unwrap_or(usize::MAX).min(read.limit),
    };
    let is_newest = read.after <= 0 && read.before.is_none();
    (is_newest && (1..=NEWEST_MAX).contains(&wanted)).then_some(wanted)
}

fn are_small(elements: &[Element]) -> bool {
    elements.iter().all(|element| match &element.body {
        Body::Bytes(bytes) => bytes.len() <= SMALL_MAX,
        Body::TooLarge(_) => false,
    })
}

/// The sequences of a page: the first of each run, and how many there are in it.
fn parse_runs(runs: Vec<Value>, step: i64) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    for run in runs.chunks(2) {
        let &[Value::Int(first), Value::Int(count)] = run else {
            return Err(unexpected(run.first().unwrap_or(&Value::Nil)));
        };
        sequences.extend((0..count).map(|index| first + index * step));
    }
    Ok(sequences)
}

/// A number as the scripts take it: empty if there is none.
fn optional(number: Option<i64>) -> String {
    number.map_or_else(String::new, |number| number.to_string())
}

fn to_lua(number: usize) -> i64 {
    i64::try_from(number).map_or(SEQUENCE_MAX, |number| number.min(SEQUENCE_MAX))
}

fn failure_of_read(failure: Failure) -> Error {
    match failure {
        Failure::NotSent(reason) | Failure::NoAnswer(reason) => Error::Unavailable(reason),
        Failure::Refused(error) => refused(&error),
    }
}

fn failure_of_write(failure: Failure) -> Error {
    match failure {
        Failure::NotSent(reason) => Error::Unavailable(reason),
        Failure::NoAnswer(reason) => Error::OutcomeUnknown(reason),
        // The scripts can fail only at their first write: nothing was written.
        Failure::Refused(error) => refused(&error),
    }
}

fn refused(error: &RedisError) -> Error {
    let text = explain(error);
    // Redis 6 wraps the errors of commands in scripts into one of its own, hence not the code.
    if text.contains("OOM command not allowed") {
        return Error::Full(text);
    }
    Error::Unavailable(text)
}

/// What a script returned: a word, and what belongs to it.
struct Reply {
    word: String,
    values: std::vec::IntoIter<Value>,
}

impl Reply {
    fn of(value: Value) -> Result<Self> {
        let Value::Array(values) = value else {
            return Err(unexpected(&value));
        };
        let mut reply = Self {
            word: String::new(),
            values: values.into_iter(),
        };
        reply.word = reply.text()?;
        Ok(reply)
    }

    /// A reply within this one.
    fn reply(&mut self) -> Result<Self> {
        Self::of(self.next())
    }

    fn next(&mut self) -> Value {
        self.values.next().unwrap_or_default()
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        match self.next() {
            Value::BulkString(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    fn number(&mut self) -> Result<i64> {
        match self.next() {
            Value::Int(number) => Ok(number),
            other => Err(unexpected(&other)),
        }
    }

    fn list(&mut self) -> Result<Vec<Value>> {
        match self.next() {
            Value::Array(values) => Ok(values),
            other => Err(unexpected(&other)),
        }
    }

    /// The error that every script may return.
    fn refusal(mut self) -> Error {
        let key = match self.text() {
            Ok(key) => key,
            Err(error) => return error,
        };
        match self.word.as_str() {
            "wrong type" => Error::WrongKeyType { key },
            "corrupt" => Error::Corrupt(format!("the key {key:?}")),
            word => Error::Corrupt(format!("a script returned {word:?}")),
        }
    }
}

/// Names the kind of a value only: the value may hold message text.
fn unexpected(value: &Value) -> Error {
    let kind = match value {
        Value::Nil => "nothing",
        Value::Int(_) => "a number",
        Value::BulkString(_) => "a string",
        Value::Array(_) => "a list",
        _ => "something else",
    };
    Error::Corrupt(format!("a script returned {kind} where it must not"))
}
