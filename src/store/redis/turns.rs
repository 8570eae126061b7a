//! Turns in Redis: passes arguments to `scripts/turn_*.lua` and parses what they reply. What holds
//! is in the scripts; here is only the index of the turns that run, in a key of its own
//! ([`running_key`]).
//!
//! An entry is written before its turn can run and goes after the turn has ended, so that every
//! turn that runs has one. Where one connection takes all, the entry, the script that begins the turn
//! and the commands that read the history are sent together, in this order. Entries that are left over go when
//! [`TurnStore::take_turn`] looks. An entry that others deleted comes back twice in a lease, as long
//! as the turn has a holder.

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, Pipeline, RedisError, Value};

use super::connection::{CONNECTION_WAIT, Failure, Node, is_read_only};
use super::invocation::Invocation;
use super::layout::{Keys, running_key};
use super::{
    ELEMENT_BYTES_MAX, Page, Read, Redis, Reply, failure_of_read, failure_of_write, refused,
    to_lua, unexpected,
};
use crate::message::{SessionId, UnixMillis, now_ms};
use crate::store::turns::{
    BeginTurn, Begun, Chunk, EndTurn, FollowTurn, Followed, KeepTurn, Kept, Leased, Stop,
    StoppedTurn, TakeTurn, Taken, TurnId, TurnState, TurnStore,
};
use crate::store::{Appended, Error, Result};

#[async_trait]
impl TurnStore for Redis {
    async fn begin_turn(&self, session: &SessionId, begin: BeginTurn) -> Result<Begun> {
        let begun = self.begin(session, begin, None).await;
        begun.map(|(begun, _)| begun)
    }

    async fn begin_turn_and_read(
        &self,
        session: &SessionId,
        begin: BeginTurn,
        read: Read,
    ) -> Result<(Begun, Option<Page>)> {
        // Who waits in line asks often, and mostly in vain.
        let read = Some(read).filter(|_| !begin.waits);
        self.begin(session, begin, read).await
    }

    async fn leave_line(&self, session: &SessionId, turn: TurnId, silent_ms: i64) -> Result<()> {
        let mut script = self.invocation(&self.scripts.turn_leave, session);
        script.arg(&turn).arg(silent_ms);
        let reply = self.write(&script).await?;
        match reply.word.as_str() {
            "left" => Ok(()),
            _ => Err(refusal(reply)),
        }
    }

    async fn take_turn(&self, session: &SessionId, take: TakeTurn) -> Result<Taken> {
        let lease = &take.lease;
        let look_ms = now_ms().saturating_add(lease.lease_ms);
        let mut script = self.invocation(&self.scripts.turn_take, session);
        script
            .arg(&take.turn)
            .arg(&lease.token.0)
            .arg(lease.lease_ms)
            .arg(lease.retention_ms)
            .arg(lease.reserve)
            .arg(u8::from(take.by_force))
            .arg(take.tries_max)
            .arg(take.outcome.as_ref());
        let mut reply = self.write(&script).await?;
        let taken = match reply.word.as_str() {
            "leased" => Taken::Leased(parse_leased(&mut reply)?),
            "held" => Taken::Held,
            "ended" => Taken::Ended(parse_state(&mut reply)?),
            "gone" => Taken::Gone,
            _ => return Err(refusal(reply)),
        };
        match taken {
            Taken::Leased(_) | Taken::Held => self.look_at(session, &take.turn, look_ms).await,
            Taken::Ended(_) | Taken::Gone => self.forget(session, &take.turn).await,
        }
        Ok(taken)
    }

    async fn keep_turn(&self, session: &SessionId, keep: KeepTurn) -> Result<Kept> {
        let lease = &keep.lease;
        let keys = Keys::new(&self.key_prefix, session);
        let mut script = Invocation::new(&self.scripts.turn_keep, &[keys.turns()]);
        script
            .arg(&keep.turn)
            .arg(&lease.token.0)
            .arg(lease.lease_ms)
            .arg(lease.retention_ms)
            .arg(lease.reserve)
            .arg(keep.last_event);
        add_chunk(&mut script, keep.chunk.as_ref());
        let mut reply = self.write(&script).await?;
        if reply.word != "kept" {
            return Err(refusal(reply));
        }
        let kept = Kept {
            stop: parse_stop(&mut reply)?,
            followed_ms_ago: match reply.next() {
                Value::Int(ago_ms) => Some(ago_ms),
                _ => None,
            },
        };
        if reply.number()? == 1 {
            // At once if it is given up: others need not wait.
            let look_ms = now_ms().saturating_add(lease.lease_ms);
            self.look_at(session, &keep.turn, look_ms).await;
        }
        Ok(kept)
    }

    async fn end_turn(&self, session: &SessionId, end: EndTurn) -> Result<TurnState> {
        let mut script = self.invocation(&self.scripts.turn_end, session);
        script
            .arg(&end.turn)
            .arg(&end.token.0)
            .arg(end.retention_ms)
            .arg(end.time_ms)
            .arg(end.outcome.as_ref());
        add_chunk(&mut script, end.chunk.as_ref());
        for element in &end.elements {
            script.arg(element.as_ref());
        }
        let mut reply = self.write(&script).await?;
        let ended = match reply.word.as_str() {
            "ended" => parse_state(&mut reply),
            _ => Err(refusal(reply)),
        };
        if matches!(ended, Ok(_) | Err(Error::Cleared)) {
            self.forget(session, &end.turn).await;
        }
        if matches!(ended, Ok(TurnState::Completed { .. })) {
            self.wrote(session);
        }
        ended
    }

    async fn stop_turn(
        &self,
        session: &SessionId,
        turn: Option<TurnId>,
        stop: Stop,
    ) -> Result<Option<StoppedTurn>> {
        let mut script = self.invocation(&self.scripts.turn_stop, session);
        script
            .arg(turn.as_ref().map_or(&[][..], |turn| turn))
            .arg(match stop {
                Stop::Keep => "keep",
                Stop::Discard => "discard",
            });
        let mut reply = self.write(&script).await?;
        match reply.word.as_str() {
            "turn" => Ok(Some(StoppedTurn {
                turn: parse_turn(&reply.bytes()?)?,
                name: reply.text()?,
                state: parse_state(&mut reply)?,
            })),
            "unknown" => Ok(None),
            _ => Err(refusal(reply)),
        }
    }

    async fn follow_turn(
        &self,
        session: &SessionId,
        follow: FollowTurn,
    ) -> Result<Option<Followed>> {
        let mut script = self.invocation(&self.scripts.turn_follow, session);
        script
            .arg(&follow.turn)
            .arg(follow.from_chunk)
            .arg(to_lua(follow.bytes_max))
            .arg(u8::from(follow.is_noted));
        let answer = self.connection().run_repeatable(&script).await;
        let followed = parse_followed(Reply::of(answer.map_err(failure_of_read)?)?)?;
        let is_completed =
            |followed: &Followed| matches!(followed.state, TurnState::Completed { .. });
        if self.connection().waits_for_replicas() && followed.as_ref().is_some_and(is_completed) {
            // To whoever is told this, the turn is acknowledged: replicas must have it, as at its end.
            return parse_followed(self.write(&script).await?);
        }
        Ok(followed)
    }

    async fn orphaned_turns(&self, limit: usize) -> Result<Vec<(SessionId, TurnId)>> {
        let mut commands = redis::pipe();
        commands.cmd("ZRANGEBYSCORE");
        commands.arg(running_key(&self.key_prefix));
        commands.arg("-inf").arg(now_ms());
        commands.arg("LIMIT").arg(0).arg(to_lua(limit));
        let answer = self.connection().query(&commands).await;
        let (values, _) = answer.map_err(failure_of_read)?;
        let entries = match values.into_iter().next() {
            Some(Value::Array(entries)) => entries,
            other => return Err(unexpected(&other.unwrap_or_default())),
        };
        let mut turns = Vec::with_capacity(entries.len());
        for entry in entries {
            let Value::BulkString(entry) = entry else {
                return Err(unexpected(&entry));
            };
            match parse_entry(&entry) {
                Some(turn) => turns.push(turn),
                // Nobody can look at it: it would be in the way of others for ever.
                None => self.forget_entry(&entry).await,
            }
        }
        Ok(turns)
    }
}

impl Redis {
    async fn begin(
        &self,
        session: &SessionId,
        begin: BeginTurn,
        read: Option<Read>,
    ) -> Result<(Begun, Option<Page>)> {
        let turn = begin.key.id;
        let lease = &begin.lease;
        let look_ms = now_ms().saturating_add(lease.lease_ms);
        let mut script = self.invocation(&self.scripts.turn_begin, session);
        script
            .arg(&turn)
            .arg(&begin.key.fingerprint)
            .arg(&begin.name)
            .arg(begin.request.as_ref())
            .arg(&lease.token.0)
            .arg(lease.lease_ms)
            .arg(lease.retention_ms)
            .arg(lease.reserve)
            .arg(u8::from(begin.waits));
        let (is_new, reply, page) = match self.connection().only() {
            Some(node) => {
                self.note_and_begin(node, session, &turn, look_ms, &script, read)
                    .await?
            }
            None => {
                let is_new = self.note(session, &turn, look_ms).await?;
                (is_new, self.write(&script).await?, None)
            }
        };
        let begun = parse_begun(reply);

        let is_settled = match &begun {
            // An entry that was there may be about to go, as that of an earlier attempt.
            Ok(Begun::Leased(_)) if !is_new => {
                let _ = self.note(session, &turn, look_ms).await;
                false
            }
            Ok(Begun::Leased(_) | Begun::Exists(TurnState::Running { .. })) => false,
            Ok(Begun::Exists(_)) => true,
            // One that was there may be that of another call, which has the lease by now.
            Ok(Begun::Busy { .. } | Begun::Waiting { .. } | Begun::LineFull) => is_new,
            Err(Error::RequestReused) => is_new,
            Err(_) => false,
        };
        if is_settled {
            self.forget(session, &turn).await;
        }
        begun.map(|begun| (begun, page))
    }

    /// Enters a turn into the index, begins it, and reads the session if it may be read so: one way to
    /// Redis and back. Returns whether the entry is new, what the script replied, and the page.
    async fn note_and_begin(
        &self,
        node: &Node,
        session: &SessionId,
        turn: &TurnId,
        look_ms: UnixMillis,
        script: &Invocation<'_>,
        read: Option<Read>,
    ) -> Result<(bool, Reply, Option<Page>)> {
        let note = self.note_command(session, turn, look_ms);
        let mut commands = vec![(&note, false), (script.command(), false)];
        let newest = read.and_then(|read| self.newest(session, &read));
        let (multi, exec) = (redis::cmd("MULTI"), redis::cmd("EXEC"));
        if let Some(newest) = &newest {
            let transaction = [&multi].into_iter().chain(newest).chain([&exec]);
            commands.extend(transaction.map(|command| (command, false)));
        }
        let mut answers = match node.send(&commands, CONNECTION_WAIT).await {
            Ok((answers, _)) => answers.into_iter(),
            Err(Failure::NoAnswer(reason)) => {
                // All of it may be run again. Whatever that fails from, the first may have arrived.
                let again = async {
                    let is_new = self.note(session, turn, look_ms).await?;
                    Ok((is_new, self.write(script).await?, None))
                };
                return again
                    .await
                    .map_err(|_: Error| Error::OutcomeUnknown(reason));
            }
            Err(failure) => return Err(failure_of_write(failure)),
        };
        let noted = parse_noted(answers.next());
        let reply = match answers.next().unwrap_or_default() {
            Value::ServerError(error) => {
                let error = RedisError::from(error);
                // It was not run: Redis does not have it, or is the master no more.
                if error.code() != Some("NOSCRIPT") && !is_read_only(&error) {
                    return Err(refused(&error));
                }
                let is_new = match noted {
                    Ok(is_new) => is_new,
                    Err(_) => self.note(session, turn, look_ms).await?,
                };
                return Ok((is_new, self.write(script).await?, None));
            }
            value => Reply::of(value)?,
        };
        let page = match (read, answers.last()) {
            (Some(read), Some(Value::Array(values))) if newest.is_some() => {
                self.parse_newest(session, read, ELEMENT_BYTES_MAX, values)
            }
            _ => None,
        };
        // It may have begun, and nobody would look for it.
        Ok((noted.map_err(unsure)?, reply, page))
    }

    /// Enters a turn into the index, to be looked at from that time on, unless it is there. Says
    /// whether it was not.
    async fn note(&self, session: &SessionId, turn: &TurnId, look_ms: UnixMillis) -> Result<bool> {
        let mut commands = redis::pipe();
        commands.add_command(self.note_command(session, turn, look_ms));
        // An entry alone begins nothing, so that no answer leaves nothing open.
        let values = self.index(&commands).await.map_err(failure_of_read)?;
        parse_noted(values.into_iter().next())
    }

    fn note_command(&self, session: &SessionId, turn: &TurnId, look_ms: UnixMillis) -> Cmd {
        let mut command = redis::cmd("ZADD");
        command.arg(running_key(&self.key_prefix));
        command.arg("NX").arg(look_ms).arg(entry(session, turn));
        command
    }

    /// Has a turn looked at from that time on. If that fails, it is looked at in vain, or entered by
    /// a later call.
    async fn look_at(&self, session: &SessionId, turn: &TurnId, look_ms: UnixMillis) {
        let mut commands = redis::pipe();
        commands.cmd("ZADD").arg(running_key(&self.key_prefix));
        commands.arg(look_ms).arg(entry(session, turn));
        let _ = self.index(&commands).await;
    }

    /// Takes a turn out of the index. If that fails, it is looked at in vain, and then goes.
    async fn forget(&self, session: &SessionId, turn: &TurnId) {
        self.forget_entry(&entry(session, turn)).await;
    }

    async fn forget_entry(&self, entry: &[u8]) {
        let mut commands = redis::pipe();
        commands.cmd("ZREM").arg(running_key(&self.key_prefix));
        commands.arg(entry);
        let _ = self.index(&commands).await;
    }

    async fn index(&self, commands: &Pipeline) -> std::result::Result<Vec<Value>, Failure> {
        let (values, _) = self.connection().query(commands).await?;
        Ok(values)
    }
}

/// Whether an entry is new.
fn parse_noted(answer: Option<Value>) -> Result<bool> {
    match answer.unwrap_or_default() {
        Value::Int(added) => Ok(added == 1),
        Value::ServerError(error) => Err(refused(&error.into())),
        other => Err(unexpected(&other)),
    }
}

/// What it means for a turn that it could not be noted.
fn unsure(error: Error) -> Error {
    match error {
        Error::Unavailable(reason) => Error::OutcomeUnknown(reason),
        other => other,
    }
}

/// A turn in the index.
fn entry(session: &SessionId, turn: &TurnId) -> Vec<u8> {
    [turn, session.as_str().as_bytes()].concat()
}

/// `None` for what is no entry.
fn parse_entry(entry: &[u8]) -> Option<(SessionId, TurnId)> {
    let (turn, session) = entry.split_first_chunk::<16>()?;
    let session = String::from_utf8(session.to_vec()).ok()?;
    Some((SessionId::parse(session).ok()?, *turn))
}

fn add_chunk(script: &mut Invocation<'_>, chunk: Option<&Chunk>) {
    match chunk {
        Some(chunk) => script.arg(chunk.index).arg(chunk.bytes.as_ref()),
        None => script.arg("").arg(""),
    };
}

fn parse_begun(mut reply: Reply) -> Result<Begun> {
    match reply.word.as_str() {
        "leased" => Ok(Begun::Leased(parse_leased(&mut reply)?)),
        "exists" => Ok(Begun::Exists(parse_state(&mut reply)?)),
        "busy" => Ok(Begun::Busy {
            turn: parse_turn(&reply.bytes()?)?,
            name: reply.text()?,
            is_expired: reply.number()? == 1,
        }),
        "waiting" => Ok(Begun::Waiting {
            before: usize::try_from(reply.number()?).map_err(|_| corrupt())?,
            expired: match reply.bytes()? {
                turn if turn.is_empty() => None,
                turn => Some(parse_turn(&turn)?),
            },
        }),
        "line full" => Ok(Begun::LineFull),
        _ => Err(refusal(reply)),
    }
}

fn parse_followed(mut reply: Reply) -> Result<Option<Followed>> {
    match reply.word.as_str() {
        "turn" => {}
        "unknown" => return Ok(None),
        _ => return Err(refusal(reply)),
    }
    let state = parse_state(&mut reply)?;
    let next_chunk = parse_u32(&mut reply)?;
    let more = reply.number()? == 1;
    let mut chunks = Vec::new();
    for value in reply.list()? {
        match value {
            Value::BulkString(bytes) => chunks.push(Bytes::from(bytes)),
            other => return Err(unexpected(&other)),
        }
    }
    Ok(Some(Followed {
        state,
        chunks,
        next_chunk,
        more,
    }))
}

fn parse_leased(reply: &mut Reply) -> Result<Leased> {
    Ok(Leased {
        attempt: parse_u32(reply)?,
        first_event: reply.number()?,
        next_chunk: parse_u32(reply)?,
        name: reply.text()?,
        fingerprint: reply.bytes()?.try_into().map_err(|_| corrupt())?,
        request: reply.bytes()?.into(),
        stop: parse_stop(reply)?,
    })
}

pub(super) fn parse_state(reply: &mut Reply) -> Result<TurnState> {
    let mut state = reply.reply()?;
    match state.word.as_str() {
        "running" => Ok(TurnState::Running {
            is_expired: state.number()? == 1,
        }),
        "completed" => Ok(TurnState::Completed {
            appended: Appended {
                first_sequence: state.number()?,
                count: usize::try_from(state.number()?).map_err(|_| corrupt())?,
                time_ms: state.text()?.parse().map_err(|_| corrupt())?,
                repeated: false,
            },
            outcome: state.bytes()?.into(),
        }),
        "failed" => Ok(TurnState::Failed {
            outcome: state.bytes()?.into(),
        }),
        _ => Err(corrupt()),
    }
}

fn parse_stop(reply: &mut Reply) -> Result<Option<Stop>> {
    match reply.text()?.as_str() {
        "" => Ok(None),
        "keep" => Ok(Some(Stop::Keep)),
        "discard" => Ok(Some(Stop::Discard)),
        _ => Err(corrupt()),
    }
}

pub(super) fn parse_turn(bytes: &[u8]) -> Result<TurnId> {
    bytes.try_into().map_err(|_| corrupt())
}

pub(super) fn parse_u32(reply: &mut Reply) -> Result<u32> {
    u32::try_from(reply.number()?).map_err(|_| corrupt())
}

fn corrupt() -> Error {
    Error::Corrupt("the record of a turn".to_owned())
}

/// The error that a script on turns may return.
fn refusal(reply: Reply) -> Error {
    match reply.word.as_str() {
        "reused" => Error::RequestReused,
        "cleared" => Error::Cleared,
        "lease lost" => Error::LeaseLost,
        _ => reply.refusal(),
    }
}
