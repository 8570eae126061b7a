//! Sessions as a whole: passes arguments to `scripts/{look,update,rewind,fork_*}.lua` and parses what
//! they reply; lists sessions by the [index](super::index), and looks at each; copies them a page at
//! a time. What a change means is in the scripts.

use std::collections::BTreeMap;

use async_trait::async_trait;
use redis::Value;

use super::append::{request_field, stamp};
use super::index::{Entry, hashes};
use super::invocation::Invocation;
use super::layout::Keys;
use super::turns::{parse_state, parse_turn, parse_u32};
use super::{Redis, Reply, SEQUENCE_MAX, failure_of_read, failure_of_write, optional, unexpected};
use crate::message::{SessionId, now_ms};
use crate::store::sessions::{
    About, FORK_STEP, Fork, Forked, LOOKED_AT_MAX, ListRecent, Look, Origin, RecentPage, Rewind,
    Rewound, Seen, SessionStore, Turn, Update,
};
use crate::store::turns::TurnState;
use crate::store::{Bell, Body, Cursor, Epoch, Error, Order, Read, Result, Sequence};

/// Sessions that one round trip of a list looks at.
const LOOK_STEP: usize = 100;
/// Bytes of elements that one step of a fork copies, about: they must come and go within the
/// timeout.
const FORK_BYTES: usize = 3 << 20;
/// How long a copy that is not finished stays.
const COPY_MS: i64 = 60 * 60 * 1000;

#[async_trait]
impl SessionStore for Redis {
    async fn look(&self, session: &SessionId, look: Look) -> Result<Seen> {
        let mut script = self.invocation(&self.scripts.look, session);
        script
            .arg(look.at.clamp(0, SEQUENCE_MAX))
            .arg(u8::from(look.with_request));
        let answer = self.connection().run_repeatable(&script);
        let (answer, active_ms) = tokio::join!(answer, self.index.active_ms(session));
        let (mut seen, _) = parse_seen(Reply::of(answer.map_err(failure_of_read)?)?)?;
        if seen.count > 0 {
            seen.active_ms = active_ms;
        }
        Ok(seen)
    }

    async fn update_session(&self, session: &SessionId, update: Update) -> Result<Option<Seen>> {
        let mut script = self.invocation(&self.scripts.update, session);
        if let Some(title) = &update.title {
            script.arg("title").arg(title);
        }
        if let Some(metadata) = &update.metadata {
            script.arg("metadata").arg(metadata_text(metadata));
        }
        if let Some(ttl_ms) = update.ttl_ms {
            let ttl_ms = ttl_ms.map_or_else(String::new, |ttl_ms| ttl_ms.to_string());
            script.arg("ttl").arg(ttl_ms);
        }
        let changed = self.change(session, update.metadata.as_ref(), &script);
        match changed.await? {
            Ok(seen) => Ok(Some(seen)),
            Err(reply) if reply.word == "empty" => Ok(None),
            Err(reply) => Err(reply.refusal()),
        }
    }

    async fn list_sessions(&self, list: ListRecent) -> Result<RecentPage> {
        self.index.flush().await?;
        let after = list.cursor.map(|cursor| cursor.0.parse()).transpose()?;
        let pairs = hashes(&list.metadata);
        let matches = |entry: &Entry, seen: &Seen| {
            let metadata = &seen.about.metadata;
            entry.session.as_str().starts_with(&list.prefix)
                && list
                    .metadata
                    .iter()
                    .all(|(k, v)| metadata.get(k) == Some(v))
        };
        let limit = list.limit.max(1);

        let few = self.index.few(&list.prefix, &pairs).await?;
        let next = async |at: Option<&Entry>, count| match &few {
            Some(few) => {
                let is_after = |entry: &&Entry| at.is_none_or(|at| *entry < at);
                Ok(few.iter().filter(is_after).take(count).cloned().collect())
            }
            None => self.index.after(at, count).await,
        };
        let is_filtered = !list.prefix.is_empty() || !pairs.is_empty();
        let mut page = RecentPage::default();
        let mut at: Option<Entry> = after;
        let mut looked_at = 0;
        while page.sessions.len() < limit && looked_at < LOOKED_AT_MAX {
            // As many as are missing; where most do not match, more.
            let missing = limit - page.sessions.len();
            let step = if is_filtered && few.is_none() {
                LOOKED_AT_MAX - looked_at
            } else {
                missing.min(LOOKED_AT_MAX - looked_at)
            };
            let entries: Vec<Entry> = next(at.as_ref(), step).await?;
            let (Some(last), is_end) = (entries.last().cloned(), entries.len() < step) else {
                return Ok(page);
            };
            looked_at += entries.len();
            let mut candidates = entries;
            candidates.retain(|entry| entry.session.as_str().starts_with(&list.prefix));
            let candidates = self.index.under(&pairs, candidates).await?;
            at = Some(last);

            let mut gone = Vec::new();
            let mut is_full = false;
            for entries in candidates.chunks(LOOK_STEP.min(missing.max(8))) {
                for (entry, seen) in entries.iter().zip(self.look_at_all(entries).await?) {
                    let Some(mut seen) = seen else {
                        continue;
                    };
                    if is_full {
                        break;
                    }
                    if seen.count == 0 {
                        gone.push(entry.clone());
                    } else if matches(entry, &seen) {
                        seen.active_ms = Some(entry.active_ms());
                        page.sessions.push((entry.session.clone(), seen));
                        if page.sessions.len() == limit {
                            at = Some(entry.clone());
                            is_full = true;
                        }
                    }
                }
                if is_full {
                    break;
                }
            }
            // Others would find them, too: it need not succeed.
            let _ = self.index.forget(&gone).await;
            if is_end && !is_full {
                return Ok(page);
            }
        }
        let is_last = next(at.as_ref(), 1).await?.is_empty();
        page.next = at
            .filter(|_| !is_last)
            .map(|entry| Cursor(entry.to_string()));
        Ok(page)
    }

    async fn rewind(&self, session: &SessionId, rewind: Rewind) -> Result<Rewound> {
        let mut script = self.invocation(&self.scripts.rewind, session);
        script
            .arg(request_field(&rewind.request))
            .arg(&stamp(&rewind.request, rewind.time_ms))
            .arg(rewind.after.clamp(0, SEQUENCE_MAX))
            .arg(optional(rewind.expected_last_sequence));
        let mut reply = self.write(&script).await?;
        match reply.word.as_str() {
            "rewound" => {
                self.wrote(session);
                Ok(Rewound::Done {
                    count: reply.number()?,
                })
            }
            "busy" => Ok(Rewound::Busy {
                turn: parse_turn(&reply.bytes()?)?,
                name: reply.text()?,
            }),
            "too many" => Ok(Rewound::TooMany),
            "reused" => Err(Error::RequestReused),
            "mismatch" => Err(Error::SequenceMismatch {
                expected: rewind.expected_last_sequence.unwrap_or_default(),
                actual: reply.number()?,
            }),
            _ => Err(reply.refusal()),
        }
    }

    async fn fork(&self, session: &SessionId, fork: Fork) -> Result<Forked> {
        let keys = Keys::new(&self.key_prefix, &fork.to);
        let copy = keys.copy(rand::random());
        let forked = self.fork_by(session, &fork, &copy).await;
        if !matches!(forked, Ok(Forked::Done(_) | Forked::Empty)) {
            // It would go by itself, later.
            let mut commands = redis::pipe();
            commands.cmd("UNLINK").arg(&copy);
            let _ = self.connection().query(&commands).await;
        }
        forked
    }

    fn bell(&self, session: &SessionId) -> Bell {
        self.watch.bell(session)
    }
}

impl Redis {
    /// Forks a session by a copy under this key.
    async fn fork_by(&self, session: &SessionId, fork: &Fork, copy: &str) -> Result<Forked> {
        let source = self
            .look(
                session,
                Look {
                    at: fork.through.unwrap_or(SEQUENCE_MAX),
                    with_request: false,
                },
            )
            .await?;
        let target = self.look(&fork.to, Look::default()).await?;
        let is_running = matches!(&target.turn, Some(turn) if is_running(turn));
        if target.count > 0 || is_running {
            let of_this_call = self.origin_text(&fork.to).await?;
            return Ok(match of_this_call {
                Some(text) if is_same_fork(&text, session, fork) && target.count > 0 => {
                    Forked::Done(Box::new(target))
                }
                _ => Forked::Exists,
            });
        }
        if source.floor == 0 {
            return Ok(Forked::Empty);
        }

        let mut count = 0;
        let mut read = Read {
            order: Order::OldestFirst,
            after: 0,
            before: Some(source.floor + 1),
            last: None,
            limit: FORK_STEP,
            bytes_max: FORK_BYTES,
        };
        let keys = Keys::new(&self.key_prefix, &fork.to);
        let keys = [&keys.in_order()[..], &[copy]].concat();
        loop {
            // Elements of any size: what is copied need not be understood.
            let page = self.read_page(session, read, usize::MAX).await?;
            if page.epoch != source.epoch {
                return Ok(Forked::Changed);
            }
            let mut script = Invocation::new(&self.scripts.fork_add, &keys);
            script.arg(count).arg(COPY_MS);
            for element in &page.elements {
                let Body::Bytes(bytes) = &element.body else {
                    return Err(Error::Corrupt("an element without bytes".to_owned()));
                };
                script.arg(bytes.as_ref());
                read.after = element.sequence;
                count += 1;
            }
            if page.elements.is_empty() {
                return Ok(Forked::Changed);
            }
            match self.write(&script).await?.word.as_str() {
                "added" => {}
                _ => return Ok(Forked::Changed),
            }
            if !page.more {
                break;
            }
        }
        // What was read is what was there at first, if all of it is there still: sequences that
        // went never come again.
        let now = self
            .look(
                session,
                Look {
                    at: source.floor,
                    with_request: false,
                },
            )
            .await?;
        if (now.epoch, now.first_sequence, now.floor)
            != (source.epoch, source.first_sequence, source.floor)
        {
            return Ok(Forked::Changed);
        }

        let About {
            title, metadata, ..
        } = source.about;
        let mut script = Invocation::new(&self.scripts.fork_end, &keys);
        script
            .arg(count)
            .arg(title)
            .arg(metadata_text(&metadata))
            .arg(origin_text(session, fork, source.floor));
        let metadata = (!metadata.is_empty()).then_some(&metadata);
        match self.change(&fork.to, metadata, &script).await? {
            Ok(seen) => Ok(Forked::Done(Box::new(seen))),
            Err(reply) if reply.word == "exists" => Ok(Forked::Exists),
            Err(reply) if reply.word == "changed" => Ok(Forked::Changed),
            Err(reply) => Err(reply.refusal()),
        }
    }

    /// The fact `origin` as it is.
    async fn origin_text(&self, session: &SessionId) -> Result<Option<String>> {
        let keys = Keys::new(&self.key_prefix, session);
        let mut commands = redis::pipe();
        commands.cmd("HGET").arg(keys.in_order()[1]).arg("origin");
        let answer = self.connection().query(&commands).await;
        match answer.map_err(failure_of_read)?.0.into_iter().next() {
            Some(Value::BulkString(text)) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
            Some(Value::Nil) | None => Ok(None),
            Some(other) => Err(unexpected(&other)),
        }
    }

    /// Runs a script that changes what is said of a session, its metadata to these if they are given.
    /// The session is found by them before it has them, so that it is never missed once it has. Says
    /// how it looks then, or what else the script replied: then nothing was written.
    async fn change(
        &self,
        session: &SessionId,
        metadata: Option<&BTreeMap<String, String>>,
        script: &Invocation<'_>,
    ) -> Result<std::result::Result<Seen, Reply>> {
        let announced = match metadata {
            Some(metadata) => Some(self.index.announce(session, metadata).await?),
            None => None,
        };
        let reply = match self.write(script).await {
            Ok(reply) if reply.word == "seen" => reply,
            refused => {
                // Whether it has them after all, a round finds out.
                let is_known = !matches!(refused, Err(Error::OutcomeUnknown(_)));
                if let Some(announced) = announced.filter(|_| is_known) {
                    self.index.take_back(session, announced).await;
                }
                return refused.map(Err);
            }
        };
        let (mut seen, version) = parse_seen(reply)?;
        seen.active_ms = Some(now_ms());
        self.wrote(session);
        if let Some(announced) = announced {
            self.index.settle(session, announced, &seen, version).await;
        }
        Ok(Ok(seen))
    }

    /// Looks at sessions; `None` of one that cannot be looked at, as its keys are no session's.
    async fn look_at_all(&self, entries: &[Entry]) -> Result<Vec<Option<Seen>>> {
        let keys: Vec<Keys> = entries
            .iter()
            .map(|entry| Keys::new(&self.key_prefix, &entry.session))
            .collect();
        let calls: Vec<_> = keys
            .iter()
            .map(|keys| (keys.in_order().to_vec(), ["0", "0"]))
            .collect();
        let answer = self
            .connection()
            .run_for_each(&self.scripts.look, &calls)
            .await;
        let values = answer.map_err(failure_of_read)?;
        let seen = |value| match parse_seen(Reply::of(value)?) {
            Ok((seen, _)) => Ok(Some(seen)),
            Err(Error::WrongKeyType { .. } | Error::Corrupt(_)) => Ok(None),
            Err(error) => Err(error),
        };
        values.into_iter().map(seen).collect()
    }

    pub(super) async fn write(&self, script: &Invocation<'_>) -> Result<Reply> {
        let answer = self.connection().write_repeatable(script).await;
        Reply::of(answer.map_err(failure_of_write)?)
    }
}

fn is_running(turn: &Turn) -> bool {
    matches!(turn.state, TurnState::Running { .. })
}

/// Metadata as they are kept: a JSON object; empty if there are none.
fn metadata_text(metadata: &BTreeMap<String, String>) -> String {
    if metadata.is_empty() {
        return String::new();
    }
    serde_json::to_string(metadata).unwrap_or_default()
}

/// An origin as it is kept: the last sequence that was copied, the one that was asked for or `-`,
/// and the session.
fn origin_text(session: &SessionId, fork: &Fork, sequence: Sequence) -> String {
    format!("{sequence} {} {session}", asked_for(fork))
}

fn asked_for(fork: &Fork) -> String {
    fork.through
        .map_or_else(|| "-".to_owned(), |through| through.to_string())
}

fn is_same_fork(origin: &str, session: &SessionId, fork: &Fork) -> bool {
    let asked = format!("{} {session}", asked_for(fork));
    origin
        .split_once(' ')
        .is_some_and(|(_, rest)| rest == asked)
}

fn parse_origin(text: &str) -> Option<Origin> {
    let mut parts = text.splitn(3, ' ');
    let sequence = parts.next()?.parse().ok()?;
    let session = SessionId::parse(parts.nth(1)?).ok()?;
    Some(Origin { session, sequence })
}

/// Reads what `scripts/seen.lua` draws; besides, the version of the metadata.
pub(super) fn parse_seen(mut reply: Reply) -> Result<(Seen, i64)> {
    if reply.word != "seen" {
        return Err(reply.refusal());
    }
    let corrupt = || Error::Corrupt("what is said of a session".to_owned());
    let mut seen = Seen {
        count: reply.number()?,
        first_sequence: reply.number()?,
        last_sequence: reply.number()?,
        epoch: Epoch(reply.number()?),
        floor: reply.number()?,
        ..Seen::default()
    };
    seen.about.title = reply.text()?;
    let metadata = reply.bytes()?;
    if !metadata.is_empty() {
        seen.about.metadata = serde_json::from_slice(&metadata).map_err(|_| corrupt())?;
    }
    let ttl = reply.text()?;
    if !ttl.is_empty() {
        seen.about.ttl_ms = Some(ttl.parse().map_err(|_| corrupt())?);
    }
    let origin = reply.text()?;
    if !origin.is_empty() {
        seen.about.origin = Some(parse_origin(&origin).ok_or_else(corrupt)?);
    }
    if let Value::Int(expires_ms) = reply.next() {
        seen.expires_ms = Some(expires_ms);
    }
    if let Value::Array(values) = reply.next() {
        seen.turn = Some(parse_last_turn(values)?);
    }
    Ok((seen, reply.number()?))
}

fn parse_last_turn(values: Vec<Value>) -> Result<Turn> {
    // A turn begins with its id, which is no text.
    let mut reply = Reply {
        word: String::new(),
        values: values.into_iter(),
    };
    let id = parse_turn(&reply.bytes()?)?;
    let name = reply.text()?;
    let attempt = parse_u32(&mut reply)?;
    let state = parse_state(&mut reply)?;
    let request = reply.bytes()?;
    Ok(Turn {
        id,
        name,
        attempt,
        state,
        request: (!request.is_empty()).then(|| request.into()),
    })
}
