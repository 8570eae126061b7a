//! The index of sessions in Redis: which there are, when each was last written to, and which have
//! what metadata. Knows ids, scores and hashes; what a session is, its scripts know.
//!
//! The index is no part of the truth: it lies in a slot of its own, is written a moment after the
//! session, and may be deleted at any time. Every server writes down which sessions it has written
//! to; what others do is found in rounds (`Entries::round`), which one server at a time makes. Who
//! lists sessions looks at each, so that what is wrong in the index costs a look and no more.
//!
//! Metadata are announced to the index before the session gets them, and settled after that, by
//! their version. What was announced is written down: where the call did not come to its end, a
//! round looks at the session and settles it.
//!
//! The score of a session is the time of its last write in ms, and, below that, its length modulo
//! 2,048: so a round sees which lists have changed, with one LLEN each.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, watch};
use tokio::time::{self, Instant};
use tokio_util::task::AbortOnDropHandle;

use super::connection::Failure;
use super::invocation::Invocation;
use super::layout::{IndexKeys, Keys, Scripts, pattern};
use super::router::Connection;
use super::sessions::parse_seen;
use super::{Reply, failure_of_read, unexpected};
use crate::message::{SessionId, UnixMillis, now_ms};
use crate::store::sessions::{LOOKED_AT_MAX, Seen};
use crate::store::{Error, Result};

/// How long a write waits to be entered together with others.
const FLUSH_AFTER: Duration = Duration::from_millis(200);
/// Sessions that wait to be entered, at most. Those beyond are found by the next round.
const NOTED_MAX: usize = 100_000;
/// Keys in one step of a round, and sessions in one command.
const STEP: usize = 1_000;
/// Sessions of which one command asks whether they are there.
const EXISTS_STEP: usize = 100;
/// How many keys a round looks at in a second, unless there are so many that it would take longer
/// than [`ROUND_MAX`].
const ROUND_KEYS_PER_S: u64 = 5_000;
/// How long a round takes, and so how far apart two are: at least this, which bounds what a small
/// store costs…
const ROUND_MIN: Duration = Duration::from_secs(5);
/// …and at most this: what others have written shows within a minute…
const ROUND_MAX: Duration = Duration::from_secs(45);
/// …unless a round would have to look at more keys in a second than this: it takes longer then, and a
/// Redis of any size has no more than some hundredths of a core to spare for it.
const ROUND_KEYS_PER_S_MAX: u64 = 25_000;
/// How long after its start a server makes its first round.
const ROUND_AFTER: Duration = Duration::from_secs(1);
/// How long after an announcement nobody is at work on it any more: more than its call takes with the
/// longest timeout that the program allows, a minute.
const LEFT_AFTER_MS: UnixMillis = 5 * 60 * 1000;
/// How many bits of a score are the length's.
const LENGTH_BITS: u32 = 11;

/// A place in the list: an entry, by which all entries are ordered.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) score: i64,
    pub(super) session: SessionId,
}

impl Entry {
    pub(super) fn active_ms(&self) -> UnixMillis {
        self.score >> LENGTH_BITS
    }
}

fn score(active_ms: UnixMillis, length: i64) -> i64 {
    (active_ms << LENGTH_BITS) | length_bits(length)
}

/// How long a round over so many keys takes.
fn round_period(keys: u64) -> Duration {
    Duration::from_secs(keys / ROUND_KEYS_PER_S)
        .clamp(ROUND_MIN, ROUND_MAX)
        .max(Duration::from_secs(keys / ROUND_KEYS_PER_S_MAX))
}

fn length_bits(length: i64) -> i64 {
    length & ((1 << LENGTH_BITS) - 1)
}

/// The index. Its tasks end when it is dropped.
pub(super) struct Index {
    entries: Arc<Entries>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// Names what a call has announced.
pub(super) struct Announced(String);

/// What the tasks work on.
struct Entries {
    connection: Arc<Connection>,
    scripts: Arc<Scripts>,
    prefix: String,
    keys: IndexKeys,
    noted: Mutex<HashMap<SessionId, UnixMillis>>,
    has_noted: Notify,
    /// Somebody waits until what is noted is entered.
    is_awaited: Notify,
    flushes: watch::Sender<Flushes>,
}

/// How often what was noted was entered.
#[derive(Default)]
struct Flushes {
    begun: u64,
    ended: u64,
    /// Why the last one failed, if it did.
    failure: Option<Failure>,
}

impl Index {
    pub(super) fn start(connection: Arc<Connection>, scripts: Arc<Scripts>, prefix: &str) -> Self {
        let entries = Arc::new(Entries {
            connection,
            scripts,
            prefix: prefix.to_owned(),
            keys: IndexKeys::new(prefix),
            noted: Mutex::default(),
            has_noted: Notify::new(),
            is_awaited: Notify::new(),
            flushes: watch::Sender::default(),
        });
        let flusher = Arc::clone(&entries);
        let healer = Arc::clone(&entries);
        let tasks = [
            tokio::spawn(async move { flusher.flush_for_ever().await }),
            tokio::spawn(async move { healer.heal_for_ever().await }),
        ];
        Self {
            entries,
            _tasks: tasks.map(AbortOnDropHandle::new),
        }
    }

    /// Takes note of a write to a session.
    pub(super) fn note(&self, session: &SessionId) {
        let mut noted = self.entries.noted();
        if noted.len() < NOTED_MAX || noted.contains_key(session) {
            noted.insert(session.clone(), now_ms());
            self.entries.has_noted.notify_one();
        }
    }

    /// Waits until what was noted is entered. All who wait share the attempt and what it comes to: were
    /// it one for each, a Redis that hangs would hold the last as long as all of them together.
    pub(super) async fn flush(&self) -> Result<()> {
        let entries = &self.entries;
        if entries.noted().is_empty() {
            return Ok(());
        }
        let mut flushes = entries.flushes.subscribe();
        let (begun, ended) = {
            let flushes = flushes.borrow();
            (flushes.begun, flushes.ended)
        };
        entries.is_awaited.notify_one();
        // One that is under way may have missed a note, and so does not do; but if it fails, the next
        // would, too.
        let has_ended = |flushes: &Flushes| {
            flushes.ended > begun || flushes.ended > ended && flushes.failure.is_some()
        };
        match flushes.wait_for(has_ended).await {
            Ok(flushes) => flushes
                .failure
                .clone()
                .map_or(Ok(()), |failure| Err(failure_of_read(failure))),
            Err(_) => Err(Error::Unavailable("the store is closed".to_owned())),
        }
    }

    /// When a session was last written to, as far as is known.
    pub(super) async fn active_ms(&self, session: &SessionId) -> Option<UnixMillis> {
        let noted = self.entries.noted().get(session).copied();
        if noted.is_some() {
            return noted;
        }
        let scores = self.entries.scores(&[session]).await.ok()?;
        scores.first()?.map(|score| score >> LENGTH_BITS)
    }

    /// Enters a session under metadata besides what it is entered under. Comes before the session
    /// gets them: until [`Index::settle`] or [`Index::take_back`], it is found under both.
    pub(super) async fn announce(
        &self,
        session: &SessionId,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Announced> {
        if metadata.is_empty() {
            return Ok(Announced(String::new()));
        }
        let entries = &self.entries;
        let token = format!("{:032x}", rand::random::<u128>());
        let mut script = entries.invocation(&entries.scripts.index_announce);
        script.arg(session.as_str()).arg(&token).arg(now_ms());
        script.arg(hashes(metadata));
        let answer = entries.connection.run_repeatable(&script).await;
        answer.map_err(failure_of_read)?;
        Ok(Announced(token))
    }

    /// Enters a session under the metadata that it has in that version, and no others but what is
    /// announced. If that fails, a round does it.
    pub(super) async fn settle(
        &self,
        session: &SessionId,
        announced: Announced,
        seen: &Seen,
        version: i64,
    ) {
        let score = score(now_ms(), seen.count);
        let pairs = hashes(&seen.about.metadata);
        let entries = &self.entries;
        let _ = entries
            .settle(session, &announced.0, score, version, &pairs)
            .await;
    }

    /// Takes a session out from under what was announced and what it did not get. If that fails, a
    /// round does it.
    pub(super) async fn take_back(&self, session: &SessionId, announced: Announced) {
        if !announced.0.is_empty() {
            let _ = self.entries.settle(session, &announced.0, 0, 0, &[]).await;
        }
    }

    /// Takes sessions out that were found to be gone, unless they have been written to since.
    pub(super) async fn forget(&self, gone: &[Entry]) -> Result<()> {
        self.entries.forget(gone).await.map_err(failure_of_read)
    }

    /// The sessions that match, all of them, if the smallest set among those that are known to hold
    /// them has at most [`LOOKED_AT_MAX`]; in the order of the list.
    pub(super) async fn few(&self, prefix: &str, pairs: &[String]) -> Result<Option<Vec<Entry>>> {
        let mut commands = redis::pipe();
        let (from, to) = (
            format!("[{prefix}"),
            [b"(", prefix.as_bytes(), b"\xff"].concat(),
        );
        if !prefix.is_empty() {
            commands.cmd("ZLEXCOUNT").arg(&self.entries.keys.names);
            commands.arg(&from).arg(&to);
        }
        for pair in pairs {
            commands.cmd("SCARD").arg(self.key_of_pair(pair));
        }
        if prefix.is_empty() && pairs.is_empty() {
            return Ok(None);
        }
        let counts = integers(self.query(&commands).await?)?;
        let smallest = counts.iter().enumerate().min_by_key(|(_, count)| **count);
        let Some((index, _)) = smallest.filter(|(_, count)| **count <= LOOKED_AT_MAX as i64) else {
            return Ok(None);
        };

        let mut commands = redis::pipe();
        match (prefix.is_empty(), index) {
            (false, 0) => {
                commands.cmd("ZRANGEBYLEX").arg(&self.entries.keys.names);
                commands.arg(&from).arg(&to);
                commands.arg("LIMIT").arg(0).arg(2 * LOOKED_AT_MAX);
            }
            (is_without, index) => {
                let pair = &pairs[index - usize::from(!is_without)];
                commands.cmd("SMEMBERS").arg(self.key_of_pair(pair));
            }
        }
        let value = self.query(&commands).await?.into_iter().next();
        let mut sessions = parse_sessions(value.unwrap_or_default())?;
        sessions.retain(|session| session.as_str().starts_with(prefix));
        let mut entries = Vec::with_capacity(sessions.len());
        for sessions in sessions.chunks(STEP) {
            let scores = self
                .entries
                .scores(&sessions.iter().collect::<Vec<_>>())
                .await;
            for (session, score) in sessions.iter().zip(scores.map_err(failure_of_read)?) {
                entries.extend(score.map(|score| Entry {
                    score,
                    session: session.clone(),
                }));
            }
        }
        entries.sort_unstable_by(|one, other| other.cmp(one));
        Ok(Some(entries))
    }

    /// The next entries of the list, after one, at most so many; fewer only at the end.
    pub(super) async fn after(&self, entry: Option<&Entry>, count: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(count);
        let mut offset = 0;
        loop {
            // Entries with the same score are ordered by name, backwards: those before the entry
            // come again, and are left out. There are as many as writes in one millisecond.
            let mut commands = redis::pipe();
            commands.cmd("ZRANGE").arg(&self.entries.keys.sessions);
            match entry {
                Some(entry) => commands.arg(entry.score),
                None => commands.arg("+inf"),
            };
            commands.arg("-inf").arg("BYSCORE").arg("REV");
            commands.arg("LIMIT").arg(offset).arg(count + 1);
            commands.arg("WITHSCORES");
            let value = self.query(&commands).await?.into_iter().next();
            let found = parse_entries(value.unwrap_or_default())?;
            let is_last = found.len() <= count;
            offset += found.len();
            let is_after = |found: &Entry| entry.is_none_or(|entry| found < entry);
            entries.extend(found.into_iter().filter(is_after));
            if is_last || entries.len() >= count {
                entries.truncate(count);
                return Ok(entries);
            }
        }
    }

    /// Of these, those that are entered under all pairs.
    pub(super) async fn under(&self, pairs: &[String], entries: Vec<Entry>) -> Result<Vec<Entry>> {
        if pairs.is_empty() || entries.is_empty() {
            return Ok(entries);
        }
        let names: Vec<&str> = entries.iter().map(|entry| entry.session.as_str()).collect();
        let mut commands = redis::pipe();
        for pair in pairs {
            commands.cmd("SMISMEMBER").arg(self.key_of_pair(pair));
            commands.arg(&names);
        }
        let mut matches = vec![true; entries.len()];
        for value in self.query(&commands).await? {
            let Value::Array(values) = value else {
                return Err(unexpected(&value));
            };
            for (matches, is_member) in matches.iter_mut().zip(integers(values)?) {
                *matches &= is_member == 1;
            }
        }
        let entries = entries.into_iter().zip(matches);
        Ok(entries
            .filter_map(|(entry, matches)| matches.then_some(entry))
            .collect())
    }

    fn key_of_pair(&self, pair: &str) -> String {
        format!("{}{pair}", self.entries.keys.of_pair)
    }

    async fn query(&self, commands: &redis::Pipeline) -> Result<Vec<Value>> {
        let answer = self.entries.query(commands).await;
        answer.map_err(failure_of_read)
    }
}

/// Metadata as the index knows them.
pub(super) fn hashes(metadata: &BTreeMap<String, String>) -> Vec<String> {
    metadata.iter().map(|(k, v)| hash_of_pair(k, v)).collect()
}

/// A pair of metadata: it need not be taken apart again, and may be long.
fn hash_of_pair(key: &str, value: &str) -> String {
    let mut digest = Sha256::new();
    digest.update((key.len() as u64).to_be_bytes());
    digest.update(key.as_bytes());
    digest.update(value.as_bytes());
    let mut text = String::with_capacity(32);
    for byte in &digest.finalize()[..16] {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Entries {
    fn noted(&self) -> MutexGuard<'_, HashMap<SessionId, UnixMillis>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call of a script on the index.
    fn invocation<'a>(&self, script: &'a redis::Script) -> Invocation<'a> {
        let keys = &self.keys;
        let keys = [&keys.sessions, &keys.names, &keys.pairs, &keys.announced];
        let mut script = Invocation::new(script, &keys);
        script.arg(&self.keys.of_pair);
        script
    }

    fn list(&self, session: &SessionId) -> String {
        format!("{}{session}", self.prefix)
    }

    async fn query(&self, commands: &redis::Pipeline) -> std::result::Result<Vec<Value>, Failure> {
        self.connection
            .query(commands)
            .await
            .map(|(values, _)| values)
    }

    /// The scores of sessions; `None` of one that is not entered.
    async fn scores(
        &self,
        sessions: &[&SessionId],
    ) -> std::result::Result<Vec<Option<i64>>, Failure> {
        let mut commands = redis::pipe();
        commands.cmd("ZMSCORE").arg(&self.keys.sessions);
        for session in sessions {
            commands.arg(session.as_str());
        }
        let values = match self.query(&commands).await?.into_iter().next() {
            Some(Value::Array(values)) => values,
            _ => Vec::new(),
        };
        Ok(values.iter().map(parse_score).collect())
    }

    /// How long lists are; 0 for what is none.
    async fn lengths(&self, sessions: &[SessionId]) -> std::result::Result<Vec<i64>, Failure> {
        let mut commands = redis::pipe();
        commands.ignore_errors();
        for session in sessions {
            commands.cmd("LLEN").arg(self.list(session));
        }
        let length = |value| match value {
            Value::Int(length) => length,
            _ => 0,
        };
        let values = self.query(&commands).await?;
        Ok(values.into_iter().map(length).collect())
    }

    /// Enters sessions, unless they are there with a greater score.
    async fn enter(&self, entries: &[Entry]) -> std::result::Result<(), Failure> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut commands = redis::pipe();
        commands.cmd("ZADD").arg(&self.keys.sessions).arg("GT");
        for entry in entries {
            commands.arg(entry.score).arg(entry.session.as_str());
        }
        commands.cmd("ZADD").arg(&self.keys.names);
        for entry in entries {
            commands.arg(0).arg(entry.session.as_str());
        }
        self.query(&commands).await.map(drop)
    }

    async fn forget(&self, gone: &[Entry]) -> std::result::Result<(), Failure> {
        for gone in gone.chunks(STEP) {
            let mut script = self.invocation(&self.scripts.index_forget);
            for entry in gone {
                script.arg(entry.session.as_str()).arg(entry.score);
            }
            self.connection.run_repeatable(&script).await?;
        }
        Ok(())
    }

    /// Enters a session under these pairs, unless others of a later version are entered, and closes an
    /// announcement.
    async fn settle(
        &self,
        session: &SessionId,
        token: &str,
        score: i64,
        version: i64,
        pairs: &[String],
    ) -> std::result::Result<(), Failure> {
        let mut script = self.invocation(&self.scripts.index_settle);
        script.arg(session.as_str()).arg(token).arg(score);
        script.arg(version).arg(pairs);
        self.connection.run_repeatable(&script).await.map(drop)
    }

    async fn flush_for_ever(&self) {
        loop {
            let has_waited = async {
                self.has_noted.notified().await;
                time::sleep(FLUSH_AFTER).await;
            };
            tokio::select! {
                () = self.is_awaited.notified() => {}
                () = has_waited => {}
            }
            self.flushes.send_modify(|flushes| flushes.begun += 1);
            let failure = self.flush().await.err();
            if let Some(failure) = &failure {
                // The notes are kept. A round finds them, too.
                tracing::debug!(?failure, "sessions were not entered into the index");
                self.has_noted.notify_one();
            }
            self.flushes.send_modify(|flushes| {
                flushes.ended += 1;
                flushes.failure = failure;
            });
        }
    }

    async fn flush(&self) -> std::result::Result<(), Failure> {
        let noted: Vec<(SessionId, UnixMillis)> = {
            let noted = self.noted();
            noted
                .iter()
                .map(|(session, ms)| (session.clone(), *ms))
                .collect()
        };
        for noted in noted.chunks(STEP) {
            let sessions: Vec<SessionId> =
                noted.iter().map(|(session, _)| session.clone()).collect();
            let lengths = self.lengths(&sessions).await?;
            let entries: Vec<Entry> = noted
                .iter()
                .zip(lengths)
                .filter(|(_, length)| *length > 0)
                .map(|((session, active_ms), length)| Entry {
                    score: score(*active_ms, length),
                    session: session.clone(),
                })
                .collect();
            self.enter(&entries).await?;
            let mut left = self.noted();
            for (session, active_ms) in noted {
                if left.get(session) == Some(active_ms) {
                    left.remove(session);
                }
            }
        }
        Ok(())
    }

    async fn heal_for_ever(&self) {
        // Whoever has only a few calls to make leaves it to the servers.
        time::sleep(ROUND_AFTER).await;
        loop {
            let wait = match self.round().await {
                Ok(wait) => wait,
                Err(failure) => {
                    tracing::debug!(?failure, "the index of sessions was not brought up to date");
                    ROUND_MIN
                }
            };
            time::sleep(wait).await;
        }
    }

    /// Brings the index up to date with what others have done, unless another server does, or has
    /// just done so. Says when to try again.
    ///
    /// It costs Redis a SCAN over all keys and an LLEN for each list, and a look at each session with
    /// facts whose list others have changed: at 200,000 lists, some 3 % of
    /// the time of its core; from a million keys on it is slower, not dearer. To an eviction by least recent use, these are
    /// uses. A list that was replaced by one of the same length is not seen to have changed.
    async fn round(&self) -> std::result::Result<Duration, Failure> {
        let mut commands = redis::pipe();
        commands.cmd("DBSIZE");
        let count = match self.query(&commands).await?.first() {
            Some(Value::Int(count)) => u64::try_from(*count).unwrap_or(0),
            _ => 0,
        };
        let period = round_period(count);
        let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
        let mut commands = redis::pipe();
        commands.cmd("SET").arg(&self.keys.round).arg("");
        commands.arg("NX").arg("PX").arg(period_ms);
        commands.cmd("PTTL").arg(&self.keys.round);
        let values = self.query(&commands).await?;
        if !matches!(values.first(), Some(Value::Okay)) {
            let left = match values.get(1) {
                Some(Value::Int(left @ 0..)) => Duration::from_millis(left.unsigned_abs()),
                _ => ROUND_MIN,
            };
            return Ok(left + Duration::from_millis(rand::random_range(1..100)));
        }

        let began = Instant::now();
        let steps = u32::try_from(count / STEP as u64)
            .unwrap_or(u32::MAX)
            .max(1);
        // Nine parts of ten: half of that for the lists, and half for what is entered.
        let pause = period.mul_f64(0.45) / steps;
        let found = self.find_new(pause).await?;
        let mut commands = redis::pipe();
        commands.cmd("ZCARD").arg(&self.keys.sessions);
        // A list may be found twice while Redis changes its table of keys: then the next round sees
        // that some are gone.
        if self.query(&commands).await?.first() != Some(&Value::Int(found)) {
            self.find_gone(pause).await?;
        }
        self.find_left().await?;
        Ok(period.saturating_sub(began.elapsed()) + Duration::from_millis(10))
    }

    /// Enters sessions that others have made or written to. Says how many lists there are.
    async fn find_new(&self, pause: Duration) -> std::result::Result<i64, Failure> {
        let mut count = 0;
        let pattern = pattern(&self.prefix);
        let mut cursor = "0".to_owned();
        loop {
            let began = Instant::now();
            let mut commands = redis::pipe();
            commands.cmd("SCAN").arg(&cursor).arg("MATCH").arg(&pattern);
            commands.arg("COUNT").arg(STEP).arg("TYPE").arg("list");
            let value = self.query(&commands).await?.into_iter().next();
            let Ok((next, keys)) = super::inspect::parse_scan(value.unwrap_or_default()) else {
                return Ok(count);
            };
            let session = |key: Vec<u8>| {
                let id = key.get(self.prefix.len()..)?.to_vec();
                SessionId::parse(String::from_utf8(id).ok()?).ok()
            };
            let sessions: Vec<SessionId> = keys.into_iter().filter_map(session).collect();
            for sessions in sessions.chunks(STEP) {
                let lengths = self.lengths(sessions).await?;
                let scores = self.scores(&sessions.iter().collect::<Vec<_>>()).await?;
                let now = now_ms();
                let mut entries = Vec::new();
                for ((session, length), known) in sessions.iter().zip(lengths).zip(scores) {
                    let is_known =
                        known.is_some_and(|score| length_bits(score) == length_bits(length));
                    count += i64::from(length > 0);
                    if length > 0 && !is_known {
                        entries.push(Entry {
                            score: score(now, length),
                            session: session.clone(),
                        });
                    }
                }
                self.enter(&entries).await?;
                self.look_at_changed(&entries).await?;
            }
            if next == "0" {
                return Ok(count);
            }
            cursor = next;
            time::sleep_until(began + pause).await;
        }
    }

    /// Those of these sessions that are gone. Mostly none is, and one command says so.
    async fn missing(&self, entries: &[Entry]) -> std::result::Result<Vec<Entry>, Failure> {
        // In a cluster, one command cannot ask for several.
        if !self.connection.is_cluster() {
            let mut commands = redis::pipe();
            commands.cmd("EXISTS");
            for entry in entries {
                commands.arg(self.list(&entry.session));
            }
            let count = i64::try_from(entries.len()).unwrap_or(i64::MAX);
            if self.query(&commands).await?.first() == Some(&Value::Int(count)) {
                return Ok(Vec::new());
            }
        }
        let mut commands = redis::pipe();
        for entry in entries {
            commands.cmd("EXISTS").arg(self.list(&entry.session));
        }
        let found = self.query(&commands).await?;
        let is_gone = |(_, found): &(&Entry, Value)| *found == Value::Int(0);
        let missing = entries.iter().zip(found).filter(is_gone);
        Ok(missing.map(|(entry, _)| entry.clone()).collect())
    }

    /// Takes sessions out that are gone.
    async fn find_gone(&self, pause: Duration) -> std::result::Result<(), Failure> {
        let mut cursor = "0".to_owned();
        loop {
            let began = Instant::now();
            let mut commands = redis::pipe();
            commands.cmd("ZSCAN").arg(&self.keys.sessions).arg(&cursor);
            commands.arg("COUNT").arg(STEP);
            let value = self.query(&commands).await?.into_iter().next();
            let Some(Value::Array(parts)) = value else {
                return Ok(());
            };
            let Ok([Value::BulkString(next), entries]) = <[Value; 2]>::try_from(parts) else {
                return Ok(());
            };
            let entries = parse_entries(entries).unwrap_or_default();
            let mut gone = Vec::new();
            for entries in entries.chunks(EXISTS_STEP) {
                gone.extend(self.missing(entries).await?);
            }
            self.forget(&gone).await?;
            if next == b"0" {
                return Ok(());
            }
            cursor = String::from_utf8_lossy(&next).into_owned();
            time::sleep_until(began + pause).await;
        }
    }

    /// Looks at those that have facts. With the message that has changed the list, others may have let it
    /// live longer, as LangChain does, and tell nobody: what is beside it must not go before it.
    async fn look_at_changed(&self, changed: &[Entry]) -> std::result::Result<(), Failure> {
        if changed.is_empty() {
            return Ok(());
        }
        let mut commands = redis::pipe();
        commands.ignore_errors();
        for entry in changed {
            let keys = Keys::new(&self.prefix, &entry.session);
            let [_, facts, ..] = keys.in_order();
            commands.cmd("EXISTS").arg(facts);
        }
        let have_facts = self.query(&commands).await?;
        for (entry, has_facts) in changed.iter().zip(have_facts) {
            if has_facts == Value::Int(1) {
                // One that does not make sense is told to whoever asks for it.
                match self.look(&entry.session).await {
                    Ok(_) | Err(Failure::Refused(_)) => {}
                    Err(failure) => return Err(failure),
                }
            }
        }
        Ok(())
    }

    /// Looks at a session, and so takes note of what others have done to it.
    async fn look(&self, session: &SessionId) -> std::result::Result<Value, Failure> {
        let keys = Keys::new(&self.prefix, session);
        let mut script = Invocation::new(&self.scripts.look, &keys.in_order());
        script.arg(0).arg(0);
        self.connection.run_repeatable(&script).await
    }

    /// Settles what was announced by calls that did not come to their end. Mostly there is none.
    async fn find_left(&self) -> std::result::Result<(), Failure> {
        let mut cursor = "0".to_owned();
        loop {
            let mut commands = redis::pipe();
            commands.cmd("HSCAN").arg(&self.keys.announced).arg(&cursor);
            commands.arg("COUNT").arg(STEP);
            let value = self.query(&commands).await?.into_iter().next();
            let Ok((next, fields)) = super::inspect::parse_scan(value.unwrap_or_default()) else {
                return Ok(());
            };
            for field in fields.chunks_exact(2) {
                let [session, announced] = [0, 1].map(|n| String::from_utf8_lossy(&field[n]));
                let Ok(session) = SessionId::parse(session) else {
                    continue;
                };
                for token in announced.split(' ').filter_map(token_of_left) {
                    self.settle_by_look(&session, token).await?;
                }
            }
            if next == "0" {
                return Ok(());
            }
            cursor = next;
        }
    }

    /// Closes an announcement, and enters the session under the metadata that it has.
    async fn settle_by_look(
        &self,
        session: &SessionId,
        token: &str,
    ) -> std::result::Result<(), Failure> {
        let value = self.look(session).await?;
        match Reply::of(value).and_then(parse_seen) {
            Ok((seen, version)) if seen.count > 0 => {
                let entered = self.scores(&[session]).await?.into_iter().flatten().next();
                let score = entered.unwrap_or_else(|| score(now_ms(), seen.count));
                let pairs = hashes(&seen.about.metadata);
                self.settle(session, token, score, version, &pairs).await
            }
            _ => self.settle(session, token, 0, 0, &[]).await,
        }
    }
}

/// The token of an announcement, as `scripts/index.lua` keeps them, if nobody is at work on it.
fn token_of_left(announced: &str) -> Option<&str> {
    let (token, rest) = announced.split_once(':')?;
    let (at_ms, _) = rest.split_once(':')?;
    let at_ms: UnixMillis = at_ms.parse().ok()?;
    (at_ms.saturating_add(LEFT_AFTER_MS) < now_ms()).then_some(token)
}

fn parse_score(value: &Value) -> Option<i64> {
    let Value::BulkString(text) = value else {
        return None;
    };
    // A double without a fraction: Redis writes large ones as 3.5e+15.
    let score: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    #[expect(clippy::cast_possible_truncation, reason = "below 2^53")]
    Some(score as i64)
}

/// Sessions and their scores, alternating. What is no session's name is left out.
fn parse_entries(value: Value) -> Result<Vec<Entry>> {
    let Value::Array(values) = value else {
        return Err(unexpected(&value));
    };
    let entry = |pair: &[Value]| {
        let [Value::BulkString(name), score] = pair else {
            return None;
        };
        Some(Entry {
            score: parse_score(score)?,
            session: SessionId::parse(String::from_utf8(name.clone()).ok()?).ok()?,
        })
    };
    Ok(values.chunks(2).filter_map(entry).collect())
}

fn parse_sessions(value: Value) -> Result<Vec<SessionId>> {
    let Value::Array(values) = value else {
        return Err(unexpected(&value));
    };
    let session = |value| match value {
        Value::BulkString(name) => SessionId::parse(String::from_utf8(name).ok()?).ok(),
        _ => None,
    };
    Ok(values.into_iter().filter_map(session).collect())
}

fn integers(values: Vec<Value>) -> Result<Vec<i64>> {
    let number = |value| match value {
        Value::Int(number) => Ok(number),
        other => Err(unexpected(&other)),
    };
    values.into_iter().map(number).collect()
}

impl std::str::FromStr for Entry {
    type Err = Error;

    /// Reads a cursor.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once(' ').and_then(|(score, session)| {
            let session = SessionId::parse(session).ok()?;
            Some(Entry {
                score: score.parse().ok()?,
                session,
            })
        });
        parts.ok_or_else(|| Error::Corrupt("a cursor".to_owned()))
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.score, self.session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_takes_longer_with_more_keys_and_never_looks_at_too_many_in_a_second() {
        for (keys, seconds) in [
            (0, 5),
            (100_000, 20),
            (1_000_000, 45),
            (2_000_000, 80),
            (400_000_000, 16_000),
        ] {
            assert_eq!(round_period(keys), Duration::from_secs(seconds), "{keys}");
        }
    }
}
