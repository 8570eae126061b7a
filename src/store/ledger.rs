//! The states of turns as plain values and functions: what [`super::turns`] promises, without a
//! place to keep it. A store that has no language of its own for it brings a [`Table`].
//!
//! The Redis store says the same in Lua (`redis/scripts/turns.lua`); one suite tests both.

use bytes::Bytes;

use super::turns::{
    BeginTurn, Begun, Chunk, EndTurn, KeepTurn, Kept, Lease, Leased, PLACE_MS, Stop, StoppedTurn,
    TakeTurn, Taken, Token, TurnId, TurnState, WAITING_MAX,
};
use super::{Appended, Error, Result};
use crate::message::UnixMillis;

/// What is kept of a turn, besides its request and its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub turn: TurnId,
    pub name: String,
    pub fingerprint: [u8; 16],
    pub state: State,
    /// The token of the last lease.
    pub token: Token,
    /// When that lease runs out.
    pub expires_ms: UnixMillis,
    /// Of the whole life of the turn.
    pub attempt: u32,
    /// Attempts since the last `begin_turn`.
    pub tries: u32,
    /// The last number for events that is taken.
    pub reserved: i64,
    /// The log is the chunks from the first on and before the next.
    pub first_chunk: u32,
    pub next_chunk: u32,
    pub stop: Option<Stop>,
    /// When a follower was last noted.
    pub followed_ms: Option<UnixMillis>,
    /// When the record is forgotten.
    pub forget_ms: UnixMillis,
}

/// See [`super::turns::TurnStore`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Running,
    Completed { appended: Appended, outcome: Bytes },
    Failed { outcome: Bytes },
}

/// What a session has besides its records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slot {
    pub running: Option<TurnId>,
    /// Who waits, in order, and when each last asked.
    pub line: Vec<(TurnId, UnixMillis)>,
}

/// Where a session's turns are kept, inside one transaction.
pub trait Table {
    fn slot(&self) -> Result<Slot>;
    fn set_slot(&mut self, slot: &Slot) -> Result<()>;
    /// Forgotten ones included.
    fn record(&self, turn: &TurnId) -> Result<Option<Record>>;
    /// Adds the record or replaces it.
    fn set_record(&mut self, record: &Record) -> Result<()>;
    fn request(&self, turn: &TurnId) -> Result<Bytes>;
    /// `None` deletes it.
    fn set_request(&mut self, turn: &TurnId, request: Option<&Bytes>) -> Result<()>;
    fn add_chunk(&mut self, turn: &TurnId, chunk: &Chunk) -> Result<()>;
    /// Deletes a turn's whole log.
    fn delete_chunks(&mut self, turn: &TurnId) -> Result<()>;
    /// Appends to the session's messages.
    fn append(&mut self, elements: &[Bytes], time_ms: UnixMillis) -> Result<Appended>;
}

impl Record {
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }

    pub fn view(&self, now_ms: UnixMillis) -> TurnState {
        match &self.state {
            State::Running => TurnState::Running {
                is_expired: self.is_expired(now_ms),
            },
            State::Completed { appended, outcome } => TurnState::Completed {
                appended: *appended,
                outcome: outcome.clone(),
            },
            State::Failed { outcome } => TurnState::Failed {
                outcome: outcome.clone(),
            },
        }
    }

    fn is_expired(&self, now_ms: UnixMillis) -> bool {
        self.expires_ms <= now_ms
    }

    fn lease(&mut self, lease: &Lease, now_ms: UnixMillis) {
        self.token = lease.token;
        self.expires_ms = now_ms.saturating_add(lease.lease_ms);
        self.forget_ms = self.expires_ms.saturating_add(lease.retention_ms);
    }

    /// Writes down a new attempt.
    fn start(&mut self, lease: &Lease, now_ms: UnixMillis) {
        self.attempt += 1;
        self.tries += 1;
        self.reserved += lease.reserve;
        self.lease(lease, now_ms);
    }

    fn leased(&self, request: Bytes, lease: &Lease) -> Leased {
        Leased {
            attempt: self.attempt,
            first_event: self.reserved - lease.reserve + 1,
            next_chunk: self.next_chunk,
            name: self.name.clone(),
            fingerprint: self.fingerprint,
            request,
            stop: self.stop,
        }
    }
}

/// The record of a turn, if it is not forgotten.
pub fn known(table: &impl Table, turn: &TurnId, now_ms: UnixMillis) -> Result<Option<Record>> {
    let record = table.record(turn)?;
    Ok(record.filter(|record| now_ms < record.forget_ms))
}

pub fn begin(table: &mut impl Table, begin: &BeginTurn, now_ms: UnixMillis) -> Result<Begun> {
    let turn = begin.key.id;
    let lease = &begin.lease;
    let mut slot = table.slot()?;
    slot.line
        .retain(|(_, asked_ms)| now_ms - asked_ms < PLACE_MS);

    let found = known(table, &turn, now_ms)?;
    if let Some(record) = &found {
        if record.fingerprint != begin.key.fingerprint {
            return Err(Error::RequestReused);
        }
        match record.state {
            State::Running if record.token == lease.token => {
                return Ok(Begun::Leased(record.leased(table.request(&turn)?, lease)));
            }
            State::Running | State::Completed { .. } => {
                return Ok(Begun::Exists(record.view(now_ms)));
            }
            State::Failed { .. } => {}
        }
    }

    let running = match slot.running {
        Some(running) => known(table, &running, now_ms)?.filter(Record::is_running),
        None => None,
    };
    let place = slot.line.iter().position(|(waiting, _)| *waiting == turn);
    if let (Some(other), false) = (&running, begin.waits) {
        return Ok(Begun::Busy {
            turn: other.turn,
            name: other.name.clone(),
            is_expired: other.is_expired(now_ms),
        });
    }
    let before = place.unwrap_or(slot.line.len());
    if begin.waits && (running.is_some() || before > 0) {
        match place {
            Some(place) => slot.line[place].1 = now_ms,
            None if slot.line.len() >= WAITING_MAX => return Ok(Begun::LineFull),
            None => slot.line.push((turn, now_ms)),
        }
        table.set_slot(&slot)?;
        let expired = running.filter(|other| other.is_expired(now_ms));
        return Ok(Begun::Waiting {
            before,
            expired: expired.map(|other| other.turn),
        });
    }

    // What was said before is of no use to anyone once the turn runs anew; its numbers stay taken.
    table.delete_chunks(&turn)?;
    let mut record = match found {
        Some(record) => Record {
            state: State::Running,
            tries: 0,
            first_chunk: record.next_chunk,
            stop: None,
            followed_ms: None,
            ..record
        },
        None => Record {
            turn,
            name: begin.name.clone(),
            fingerprint: begin.key.fingerprint,
            state: State::Running,
            token: lease.token,
            expires_ms: now_ms,
            attempt: 0,
            tries: 0,
            reserved: 0,
            first_chunk: 0,
            next_chunk: 0,
            stop: None,
            followed_ms: None,
            forget_ms: now_ms,
        },
    };
    record.start(lease, now_ms);
    slot.line.retain(|(waiting, _)| *waiting != turn);
    slot.running = Some(turn);
    table.set_record(&record)?;
    table.set_request(&turn, Some(&begin.request))?;
    table.set_slot(&slot)?;
    Ok(Begun::Leased(record.leased(begin.request.clone(), lease)))
}

pub fn leave_line(
    table: &mut impl Table,
    turn: &TurnId,
    silent_ms: i64,
    now_ms: UnixMillis,
) -> Result<()> {
    let mut slot = table.slot()?;
    let is_gone = |(waiting, asked_ms): &(TurnId, UnixMillis)| {
        waiting == turn && now_ms - asked_ms >= silent_ms
    };
    if let Some(place) = slot.line.iter().position(is_gone) {
        slot.line.remove(place);
        table.set_slot(&slot)?;
    }
    Ok(())
}

pub fn take(table: &mut impl Table, take: &TakeTurn, now_ms: UnixMillis) -> Result<Taken> {
    let Some(mut record) = known(table, &take.turn, now_ms)? else {
        return Ok(Taken::Gone);
    };
    if !record.is_running() {
        return Ok(Taken::Ended(record.view(now_ms)));
    }
    if record.token != take.lease.token {
        if !record.is_expired(now_ms) && !take.by_force {
            return Ok(Taken::Held);
        }
        if record.tries >= take.tries_max && !take.by_force {
            record.state = State::Failed {
                outcome: take.outcome.clone(),
            };
            record.forget_ms = now_ms.saturating_add(take.lease.retention_ms);
            table.set_record(&record)?;
            leave(table, &take.turn)?;
            return Ok(Taken::Ended(record.view(now_ms)));
        }
        record.start(&take.lease, now_ms);
        table.set_record(&record)?;
    }
    let request = table.request(&take.turn)?;
    Ok(Taken::Leased(record.leased(request, &take.lease)))
}

pub fn keep(table: &mut impl Table, keep: &KeepTurn, now_ms: UnixMillis) -> Result<Kept> {
    let mut record = known(table, &keep.turn, now_ms)?.ok_or(Error::Cleared)?;
    if record.token != keep.lease.token || !record.is_running() {
        return Err(Error::LeaseLost);
    }
    add_chunk(table, &mut record, keep.chunk.as_ref())?;
    record.reserved = record.reserved.max(keep.last_event + keep.lease.reserve);
    record.lease(&keep.lease, now_ms);
    table.set_record(&record)?;
    Ok(Kept {
        stop: record.stop,
        followed_ms_ago: record.followed_ms.map(|followed_ms| now_ms - followed_ms),
    })
}

pub fn end(table: &mut impl Table, end: &EndTurn, now_ms: UnixMillis) -> Result<TurnState> {
    let mut record = known(table, &end.turn, now_ms)?.ok_or(Error::Cleared)?;
    if record.token != end.token {
        return Err(Error::LeaseLost);
    }
    if !record.is_running() {
        return Ok(record.view(now_ms));
    }
    add_chunk(table, &mut record, end.chunk.as_ref())?;
    let outcome = end.outcome.clone();
    record.state = if end.elements.is_empty() {
        State::Failed { outcome }
    } else {
        let appended = table.append(&end.elements, end.time_ms)?;
        table.set_request(&end.turn, None)?;
        State::Completed { appended, outcome }
    };
    record.forget_ms = now_ms.saturating_add(end.retention_ms);
    table.set_record(&record)?;
    leave(table, &end.turn)?;
    Ok(record.view(now_ms))
}

pub fn stop(
    table: &mut impl Table,
    turn: Option<TurnId>,
    stop: Stop,
    now_ms: UnixMillis,
) -> Result<Option<StoppedTurn>> {
    let turn = match turn {
        Some(turn) => Some(turn),
        None => table.slot()?.running,
    };
    let found = match turn {
        Some(turn) => known(table, &turn, now_ms)?,
        None => None,
    };
    let Some(mut record) = found else {
        return Ok(None);
    };
    if record.is_running() && record.stop != Some(stop) {
        record.stop = Some(stop);
        table.set_record(&record)?;
    }
    Ok(Some(StoppedTurn {
        turn: record.turn,
        state: record.view(now_ms),
        name: record.name,
    }))
}

/// Adds to the log, unless an earlier call has.
fn add_chunk(table: &mut impl Table, record: &mut Record, chunk: Option<&Chunk>) -> Result<()> {
    let Some(chunk) = chunk else {
        return Ok(());
    };
    if chunk.index == record.next_chunk {
        table.add_chunk(&record.turn, chunk)?;
        record.next_chunk += 1;
    }
    Ok(())
}

/// Makes room for the next turn.
fn leave(table: &mut impl Table, turn: &TurnId) -> Result<()> {
    let mut slot = table.slot()?;
    if slot.running == Some(*turn) {
        slot.running = None;
        table.set_slot(&slot)?;
    }
    Ok(())
}
