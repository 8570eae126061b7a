//! Turns in the file: the states of [`ledger`], kept in tables, inside the writer's transactions.

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::{Sqlite, tables};
use crate::message::{SessionId, UnixMillis};
use crate::store::ledger::{self, Record, Slot, State, Table};
use crate::store::sessions::{Turn, Upkeep};
use crate::store::turns::{
    BeginTurn, Begun, Chunk, EndTurn, FollowTurn, Followed, KeepTurn, Kept, Stop, StoppedTurn,
    TakeTurn, Taken, Token, TurnId, TurnState, TurnStore,
};
use crate::store::{Appended, Error, Result, Sequence};

/// How long a session that only ever began a turn is remembered besides its turns.
const EMPTY_SESSION_MS: i64 = 60 * 60 * 1000;

// Without the request, which may be large.
const TURN: &str = "
    SELECT id, name, fingerprint, state, token, expires_ms, attempt, tries, reserved, first_chunk,
        next_chunk, stop, outcome, first_sequence, count, time_ms, forget_ms
    FROM turns WHERE session = :session AND id = :id";

const RUNNING: &str = "
    SELECT id FROM turns WHERE session = :session AND state = 'running'
    ORDER BY forget_ms DESC LIMIT 1";

const SET_TURN: &str = "
    INSERT INTO turns
        (session, id, name, fingerprint, state, token, expires_ms, attempt, tries, reserved,
         first_chunk, next_chunk, stop, outcome, first_sequence, count, time_ms, forget_ms)
    VALUES
        (:session, :id, :name, :fingerprint, :state, :token, :expires_ms, :attempt, :tries,
         :reserved, :first_chunk, :next_chunk, :stop, :outcome, :first_sequence, :count, :time_ms,
         :forget_ms)
    ON CONFLICT (session, id) DO UPDATE SET
        state = excluded.state, token = excluded.token, expires_ms = excluded.expires_ms,
        attempt = excluded.attempt, tries = excluded.tries, reserved = excluded.reserved,
        first_chunk = excluded.first_chunk, next_chunk = excluded.next_chunk,
        stop = excluded.stop, outcome = excluded.outcome,
        first_sequence = excluded.first_sequence, count = excluded.count,
        time_ms = excluded.time_ms, forget_ms = excluded.forget_ms";

const FORGET_TURN: &str = "
    DELETE FROM turns WHERE session = :session AND id = :id AND forget_ms <= :now_ms";

const REQUEST: &str = "SELECT request FROM turns WHERE session = :session AND id = :id";

const SET_REQUEST: &str = "
    UPDATE turns SET request = :request WHERE session = :session AND id = :id";

const LINE: &str = "SELECT id, asked_ms FROM turn_line WHERE session = :session ORDER BY place";

const DELETE_LINE: &str = "DELETE FROM turn_line WHERE session = :session";

const ADD_PLACE: &str = "
    INSERT INTO turn_line (session, place, id, asked_ms) VALUES (?1, ?2, ?3, ?4)";

const ADD_CHUNK: &str = "
    INSERT INTO turn_chunks (turn, number, bytes)
    SELECT number, :chunk, :bytes FROM turns WHERE session = :session AND id = :id";

const DELETE_CHUNKS: &str = "
    DELETE FROM turn_chunks WHERE turn =
        (SELECT number FROM turns WHERE session = :session AND id = :id)";

const CHUNKS: &str = "
    SELECT bytes FROM turn_chunks WHERE number >= :from AND number < :next AND turn =
        (SELECT number FROM turns WHERE session = :session AND id = :id)
    ORDER BY number";

const ORPHANS: &str = "
    SELECT sessions.key, turns.id FROM turns JOIN sessions ON sessions.number = turns.session
    WHERE turns.state = 'running' AND turns.expires_ms <= :now_ms
    ORDER BY turns.expires_ms";

// What is pruned, and before each the sizes of the same rows in the same order.
const FORGOTTEN_CHUNKS: &str = "
    SELECT length(bytes) FROM
        (SELECT number FROM turns WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit)
        AS forgotten CROSS JOIN turn_chunks ON turn = forgotten.number
    LIMIT :limit";

const PRUNE_CHUNKS: &str = "
    DELETE FROM turn_chunks WHERE (turn, number) IN
        (SELECT turn, turn_chunks.number FROM
            (SELECT number FROM turns WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit)
            AS forgotten CROSS JOIN turn_chunks ON turn = forgotten.number
        LIMIT :rows)";

const FORGOTTEN_TURNS: &str = "
    SELECT coalesce(length(request), 0) + coalesce(length(outcome), 0) FROM turns
    WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit";

const PRUNE_TURNS: &str = "
    DELETE FROM turns WHERE number IN
        (SELECT number FROM turns WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit)
    AND NOT EXISTS (SELECT 1 FROM turn_chunks WHERE turn = turns.number)";

const SESSION_CHUNKS: &str = "
    SELECT length(bytes) FROM turns CROSS JOIN turn_chunks ON turn = turns.number
    WHERE session = :session ORDER BY id, turn_chunks.number LIMIT :limit";

const PRUNE_SESSION_CHUNKS: &str = "
    DELETE FROM turn_chunks WHERE (turn, number) IN
        (SELECT turn, turn_chunks.number FROM turns CROSS JOIN turn_chunks ON turn = turns.number
        WHERE session = :session ORDER BY id, turn_chunks.number LIMIT :limit)";

const SESSION_TURNS: &str = "
    SELECT coalesce(length(request), 0) + coalesce(length(outcome), 0) FROM turns
    WHERE session = :session ORDER BY id LIMIT :limit";

const PRUNE_SESSION_TURNS: &str = "
    DELETE FROM turns WHERE number IN
        (SELECT number FROM turns WHERE session = :session ORDER BY id LIMIT :limit)
    AND NOT EXISTS (SELECT 1 FROM turn_chunks WHERE turn = turns.number)";

const DELETE_REWOUND: &str = "
    DELETE FROM turns
    WHERE session = :session AND state = 'completed' AND first_sequence + count - 1 > :after";

// The running one, or else the one that is remembered longest: it ended last.
const LATEST: &str = "
    SELECT id, name, fingerprint, state, token, expires_ms, attempt, tries, reserved, first_chunk,
        next_chunk, stop, outcome, first_sequence, count, time_ms, forget_ms
    FROM turns WHERE session = :session AND forget_ms > :now_ms
    ORDER BY forget_ms DESC, number DESC LIMIT 1";

const MOVE_TURNS: &str = "UPDATE turns SET session = :to WHERE session = :session";

const MOVE_LINE: &str = "UPDATE turn_line SET session = :to WHERE session = :session";

const DELETE_TURNS: &str = "DELETE FROM turns WHERE session = :session";

/// Ends the leases of a server that had the file before: only one has it at a time.
pub const END_LEASES: &str = "
    UPDATE turns SET expires_ms = 0 WHERE state = 'running' AND expires_ms > 0";

/// Deletes what there is of turns that are to be forgotten, at most so many rows of a kind, and bytes.
/// Says whether there may be more.
pub fn prune(
    db: &Connection,
    now_ms: UnixMillis,
    limit: i64,
    bytes_left: &mut i64,
) -> Result<bool> {
    let params = named_params! {":limit": limit, ":now_ms": now_ms};
    let chunks = tables::fitting(db, FORGOTTEN_CHUNKS, params, bytes_left)?;
    let of_chunks = named_params! {":limit": limit, ":now_ms": now_ms, ":rows": chunks};
    db.prepare_cached(PRUNE_CHUNKS)?.execute(of_chunks)?;
    let turns = tables::fitting(db, FORGOTTEN_TURNS, params, bytes_left)?;
    let of_turns = named_params! {":limit": turns, ":now_ms": now_ms};
    db.prepare_cached(PRUNE_TURNS)?.execute(of_turns)?;
    Ok(*bytes_left <= 0 || chunks == limit || turns == limit)
}

/// Deletes all turns of a session.
pub fn clear(db: &Connection, session: i64) -> Result<()> {
    let params = named_params! {":session": session};
    db.prepare_cached(DELETE_TURNS)?.execute(params)?;
    db.prepare_cached(DELETE_LINE)?.execute(params)?;
    Ok(())
}

/// Deletes what there is of the turns of a session, at most so many rows and bytes; says how many rows.
/// If less than that, and bytes are left, that was all.
pub fn prune_session(
    db: &Connection,
    session: i64,
    limit: i64,
    bytes_left: &mut i64,
) -> Result<usize> {
    let mut left = limit;
    for (sizes, prune) in [
        (SESSION_CHUNKS, PRUNE_SESSION_CHUNKS),
        (SESSION_TURNS, PRUNE_SESSION_TURNS),
    ] {
        let params = named_params! {":session": session, ":limit": left};
        let rows = tables::fitting(db, sizes, params, bytes_left)?;
        let params = named_params! {":session": session, ":limit": rows};
        left -= db.prepare_cached(prune)?.execute(params)? as i64;
    }
    Ok((limit - left) as usize)
}

/// Deletes the records of turns that have stored a message after a sequence.
pub fn rewind(db: &Connection, session: i64, after: Sequence) -> Result<()> {
    let params = named_params! {":session": session, ":after": after};
    db.prepare_cached(DELETE_REWOUND)?.execute(params)?;
    Ok(())
}

/// Gives the turns of one session to another, which has none.
pub fn give(db: &Connection, session: i64, to: i64) -> Result<()> {
    let params = named_params! {":session": session, ":to": to};
    db.prepare_cached(MOVE_TURNS)?.execute(params)?;
    db.prepare_cached(MOVE_LINE)?.execute(params)?;
    Ok(())
}

/// The turn that runs on a session.
pub fn running(db: &Connection, session: i64, now_ms: UnixMillis) -> Result<Option<Record>> {
    let params = named_params! {":session": session};
    let running: Option<TurnId> = db
        .prepare_cached(RUNNING)?
        .query_row(params, |row| row.get(0))
        .optional()?;
    match running {
        Some(turn) => known(db, session, &turn, now_ms),
        None => Ok(None),
    }
}

fn known(
    db: &Connection,
    session: i64,
    turn: &TurnId,
    now_ms: UnixMillis,
) -> Result<Option<Record>> {
    let params = named_params! {":session": session, ":id": turn};
    let found = db
        .prepare_cached(TURN)?
        .query_row(params, |row| Ok(read_record(row)))
        .optional()?;
    let record = found.transpose()?;
    Ok(record.filter(|record| now_ms < record.forget_ms))
}

/// The turn that runs on a session, or else the last one whose record is there.
pub fn latest(
    db: &Connection,
    session: i64,
    with_request: bool,
    now_ms: UnixMillis,
) -> Result<Option<Turn>> {
    let record = match running(db, session, now_ms)? {
        Some(record) => Some(record),
        None => {
            let params = named_params! {":session": session, ":now_ms": now_ms};
            let mut statement = db.prepare_cached(LATEST)?;
            let found = statement.query_row(params, |row| Ok(read_record(row)));
            found.optional()?.transpose()?
        }
    };
    let Some(record) = record else {
        return Ok(None);
    };
    let request = match record.state {
        State::Running | State::Failed { .. } if with_request => {
            let params = named_params! {":session": session, ":id": record.turn};
            let mut statement = db.prepare_cached(REQUEST)?;
            let request: Option<Vec<u8>> = statement.query_row(params, |row| row.get(0))?;
            request.map(Bytes::from)
        }
        _ => None,
    };
    Ok(Some(Turn {
        id: record.turn,
        attempt: record.attempt,
        state: record.view(now_ms),
        name: record.name,
        request,
    }))
}

/// The turns of a session.
struct Turns<'a> {
    db: &'a Connection,
    key: &'a str,
    /// `None` if there is no row for the session yet.
    session: Option<i64>,
    upkeep: Upkeep,
    now_ms: UnixMillis,
}

impl<'a> Turns<'a> {
    fn open(db: &'a Connection, key: &'a str, upkeep: Upkeep, now_ms: UnixMillis) -> Result<Self> {
        let session = tables::session(db, key, now_ms)?;
        Ok(Self {
            db,
            key,
            session: session.map(|session| session.number),
            upkeep,
            now_ms,
        })
    }

    fn session(&mut self) -> Result<i64> {
        match self.session {
            Some(session) => Ok(session),
            None => {
                let forget_ms = self.now_ms.saturating_add(EMPTY_SESSION_MS);
                let session = tables::add_session(self.db, self.key, forget_ms, self.now_ms)?;
                self.session = Some(session.number);
                Ok(session.number)
            }
        }
    }
}

impl Table for Turns<'_> {
    fn slot(&self) -> Result<Slot> {
        let params = named_params! {":session": self.session};
        let running = self
            .db
            .prepare_cached(RUNNING)?
            .query_row(params, |row| row.get(0))
            .optional()?;
        let mut line = self.db.prepare_cached(LINE)?;
        let line = line.query_map(params, |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(Slot {
            running,
            line: line.collect::<rusqlite::Result<_>>()?,
        })
    }

    /// The running turn is the one whose record says so.
    fn set_slot(&mut self, slot: &Slot) -> Result<()> {
        let session = self.session()?;
        if self.slot()?.line == slot.line {
            return Ok(());
        }
        let params = named_params! {":session": session};
        self.db.prepare_cached(DELETE_LINE)?.execute(params)?;
        let mut add_place = self.db.prepare_cached(ADD_PLACE)?;
        for (place, (turn, asked_ms)) in (0_i64..).zip(&slot.line) {
            add_place.execute((session, place, turn, asked_ms))?;
        }
        Ok(())
    }

    fn record(&self, turn: &TurnId) -> Result<Option<Record>> {
        let params = named_params! {":session": self.session, ":id": turn};
        let found = self
            .db
            .prepare_cached(TURN)?
            .query_row(params, |row| Ok(read_record(row)))
            .optional()?;
        found.transpose()
    }

    fn set_record(&mut self, record: &Record) -> Result<()> {
        let session = self.session()?;
        let (state, appended, outcome) = match &record.state {
            State::Running => ("running", None, None),
            State::Completed { appended, outcome } => {
                ("completed", Some(*appended), Some(outcome.as_ref()))
            }
            State::Failed { outcome } => ("failed", None, Some(outcome.as_ref())),
        };
        if record.attempt == 1 {
            // A forgotten one of the same id may still be there.
            let params = named_params! {
                ":session": session, ":id": record.turn, ":now_ms": self.now_ms,
            };
            self.db.prepare_cached(FORGET_TURN)?.execute(params)?;
        }
        self.db.prepare_cached(SET_TURN)?.execute(named_params! {
            ":session": session,
            ":id": record.turn,
            ":name": record.name,
            ":fingerprint": record.fingerprint,
            ":state": state,
            ":token": record.token.0,
            ":expires_ms": record.expires_ms,
            ":attempt": record.attempt,
            ":tries": record.tries,
            ":reserved": record.reserved,
            ":first_chunk": record.first_chunk,
            ":next_chunk": record.next_chunk,
            ":stop": record.stop.map(|stop| match stop {
                Stop::Keep => "keep",
                Stop::Discard => "discard",
            }),
            ":outcome": outcome,
            ":first_sequence": appended.map(|appended| appended.first_sequence),
            ":count": appended.map(|appended| appended.count as i64),
            ":time_ms": appended.map(|appended| appended.time_ms),
            ":forget_ms": record.forget_ms,
        })?;
        tables::keep_session(self.db, session, record.forget_ms)
    }

    fn request(&self, turn: &TurnId) -> Result<Bytes> {
        let params = named_params! {":session": self.session, ":id": turn};
        let mut statement = self.db.prepare_cached(REQUEST)?;
        let request: Option<Vec<u8>> = statement.query_row(params, |row| row.get(0))?;
        Ok(request.unwrap_or_default().into())
    }

    fn set_request(&mut self, turn: &TurnId, request: Option<&Bytes>) -> Result<()> {
        let request = request.map(Bytes::as_ref);
        let params = named_params! {":session": self.session, ":id": turn, ":request": request};
        self.db.prepare_cached(SET_REQUEST)?.execute(params)?;
        Ok(())
    }

    fn add_chunk(&mut self, turn: &TurnId, chunk: &Chunk) -> Result<()> {
        self.db.prepare_cached(ADD_CHUNK)?.execute(named_params! {
            ":session": self.session,
            ":id": turn,
            ":chunk": chunk.index,
            ":bytes": chunk.bytes.as_ref(),
        })?;
        Ok(())
    }

    fn delete_chunks(&mut self, turn: &TurnId) -> Result<()> {
        let params = named_params! {":session": self.session, ":id": turn};
        self.db.prepare_cached(DELETE_CHUNKS)?.execute(params)?;
        Ok(())
    }

    fn append(&mut self, elements: &[Bytes], time_ms: UnixMillis) -> Result<Appended> {
        // Its turn runs, so it is there.
        let session = tables::session(self.db, self.key, self.now_ms)?.ok_or(Error::Cleared)?;
        tables::add(
            self.db,
            &session,
            elements,
            time_ms,
            &self.upkeep,
            self.now_ms,
        )
    }
}

fn read_record(row: &Row<'_>) -> Result<Record> {
    let corrupt = || Error::Corrupt("a turn in the database".to_owned());
    let outcome = || -> Result<Bytes> {
        let outcome: Option<Vec<u8>> = row.get("outcome")?;
        Ok(outcome.unwrap_or_default().into())
    };
    let state: String = row.get("state")?;
    let state = match state.as_str() {
        "running" => State::Running,
        "completed" => {
            let count: i64 = row.get("count")?;
            State::Completed {
                appended: Appended {
                    first_sequence: row.get("first_sequence")?,
                    count: usize::try_from(count).map_err(|_| corrupt())?,
                    time_ms: row.get("time_ms")?,
                    repeated: false,
                },
                outcome: outcome()?,
            }
        }
        "failed" => State::Failed {
            outcome: outcome()?,
        },
        _ => return Err(corrupt()),
    };
    let stop: Option<String> = row.get("stop")?;
    Ok(Record {
        turn: row.get("id")?,
        name: row.get("name")?,
        fingerprint: row.get("fingerprint")?,
        state,
        token: Token(row.get("token")?),
        expires_ms: row.get("expires_ms")?,
        attempt: row.get("attempt")?,
        tries: row.get("tries")?,
        reserved: row.get("reserved")?,
        first_chunk: row.get("first_chunk")?,
        next_chunk: row.get("next_chunk")?,
        stop: stop.map(|stop| match stop.as_str() {
            "discard" => Stop::Discard,
            _ => Stop::Keep,
        }),
        followed_ms: None,
        forget_ms: row.get("forget_ms")?,
    })
}

fn follow(
    db: &Connection,
    key: &str,
    follow: &FollowTurn,
    now_ms: UnixMillis,
) -> Result<Option<Followed>> {
    let turns = Turns::open(db, key, Upkeep::default(), now_ms)?;
    let Some(record) = ledger::known(&turns, &follow.turn, now_ms)? else {
        return Ok(None);
    };
    let from = follow.from_chunk.max(record.first_chunk);
    let mut followed = Followed {
        state: record.view(now_ms),
        chunks: Vec::new(),
        next_chunk: from,
        more: false,
    };
    if from >= record.next_chunk {
        return Ok(Some(followed));
    }
    let mut statement = db.prepare_cached(CHUNKS)?;
    let params = named_params! {
        ":session": turns.session,
        ":id": follow.turn,
        ":from": from,
        ":next": record.next_chunk,
    };
    let mut rows = statement.query(params)?;
    let mut bytes_left = follow.bytes_max;
    while let Some(row) = rows.next()? {
        let bytes: Vec<u8> = row.get(0)?;
        if !followed.chunks.is_empty() && bytes.len() > bytes_left {
            break;
        }
        bytes_left = bytes_left.saturating_sub(bytes.len());
        followed.chunks.push(bytes.into());
        followed.next_chunk += 1;
    }
    followed.more = followed.next_chunk < record.next_chunk;
    Ok(Some(followed))
}

fn size_of(chunk: Option<&Chunk>) -> usize {
    chunk.map_or(0, |chunk| chunk.bytes.len())
}

#[async_trait]
impl TurnStore for Sqlite {
    async fn begin_turn(&self, session: &SessionId, begin: BeginTurn) -> Result<Begun> {
        let key = self.key(session);
        let upkeep = self.upkeep;
        let size = begin.name.len() + begin.request.len();
        let is_begun = |begun: &Begun| matches!(begun, Begun::Leased(_));
        self.write_and_ring(session, is_begun, size, move |db, now_ms| {
            ledger::begin(&mut Turns::open(db, &key, upkeep, now_ms)?, &begin, now_ms)
        })
        .await
    }

    async fn leave_line(&self, session: &SessionId, turn: TurnId, silent_ms: i64) -> Result<()> {
        let key = self.key(session);
        let upkeep = self.upkeep;
        self.write(0, move |db, now_ms| {
            let mut turns = Turns::open(db, &key, upkeep, now_ms)?;
            ledger::leave_line(&mut turns, &turn, silent_ms, now_ms)
        })
        .await
    }

    async fn take_turn(&self, session: &SessionId, take: TakeTurn) -> Result<Taken> {
        let key = self.key(session);
        let upkeep = self.upkeep;
        let is_changed = |taken: &Taken| matches!(taken, Taken::Leased(_) | Taken::Ended(_));
        let size = take.outcome.len();
        self.write_and_ring(session, is_changed, size, move |db, now_ms| {
            ledger::take(&mut Turns::open(db, &key, upkeep, now_ms)?, &take, now_ms)
        })
        .await
    }

    async fn keep_turn(&self, session: &SessionId, keep: KeepTurn) -> Result<Kept> {
        let key = self.key(session);
        let upkeep = self.upkeep;
        self.write(size_of(keep.chunk.as_ref()), move |db, now_ms| {
            ledger::keep(&mut Turns::open(db, &key, upkeep, now_ms)?, &keep, now_ms)
        })
        .await
    }

    async fn end_turn(&self, session: &SessionId, end: EndTurn) -> Result<TurnState> {
        let key = self.key(session);
        let elements: usize = end.elements.iter().map(Bytes::len).sum();
        let size = size_of(end.chunk.as_ref()) + elements + end.outcome.len();
        let upkeep = self.upkeep;
        self.write_and_ring(
            session,
            |_| true,
            size,
            move |db, now_ms| {
                ledger::end(&mut Turns::open(db, &key, upkeep, now_ms)?, &end, now_ms)
            },
        )
        .await
    }

    async fn stop_turn(
        &self,
        session: &SessionId,
        turn: Option<TurnId>,
        stop: Stop,
    ) -> Result<Option<StoppedTurn>> {
        let key = self.key(session);
        let upkeep = self.upkeep;
        self.write(0, move |db, now_ms| {
            ledger::stop(
                &mut Turns::open(db, &key, upkeep, now_ms)?,
                turn,
                stop,
                now_ms,
            )
        })
        .await
    }

    async fn follow_turn(
        &self,
        session: &SessionId,
        asked: FollowTurn,
    ) -> Result<Option<Followed>> {
        let key = self.key(session);
        let clock = self.shared.clock.clone();
        self.query(move |db| tables::in_snapshot(db, || follow(db, &key, &asked, clock())))
            .await
    }

    async fn orphaned_turns(&self, limit: usize) -> Result<Vec<(SessionId, TurnId)>> {
        let clock = self.shared.clock.clone();
        let prefix = self.key_prefix.clone();
        self.query(move |db| {
            let mut statement = db.prepare_cached(ORPHANS)?;
            let mut rows = statement.query(named_params! {":now_ms": clock()})?;
            let mut orphans = Vec::new();
            while orphans.len() < limit
                && let Some(row) = rows.next()?
            {
                let key: String = row.get(0)?;
                // The file may hold sessions of other prefixes.
                let id = key.strip_prefix(&prefix);
                if let Some(Ok(session)) = id.map(SessionId::parse) {
                    orphans.push((session, row.get(1)?));
                }
            }
            Ok(orphans)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::tables::tests::plan;

    /// A statement that scanned a table, or sorted more than a session's running turns, would cost
    /// what is stored, not what is asked.
    #[test]
    fn every_statement_goes_by_an_index() {
        let statements = [
            TURN,
            RUNNING,
            FORGET_TURN,
            REQUEST,
            SET_REQUEST,
            LINE,
            DELETE_LINE,
            ADD_CHUNK,
            DELETE_CHUNKS,
            CHUNKS,
            ORPHANS,
            FORGOTTEN_TURNS,
            PRUNE_TURNS,
            SESSION_CHUNKS,
            PRUNE_SESSION_CHUNKS,
            SESSION_TURNS,
            PRUNE_SESSION_TURNS,
            DELETE_REWOUND,
            LATEST,
            MOVE_TURNS,
            MOVE_LINE,
            DELETE_TURNS,
            END_LEASES,
        ];
        for statement in statements {
            let steps = plan(statement);
            assert!(
                steps.iter().any(|step| step.starts_with("SEARCH")),
                "{statement}\n{steps:#?}"
            );
            let is_scan = |step: &String| step.starts_with("SCAN");
            assert!(!steps.iter().any(is_scan), "{statement}\n{steps:#?}");
        }
    }

    /// Walks the turns that its inner LIMIT lets through, and of those the chunks that the outer does.
    #[test]
    fn pruning_the_logs_goes_along_the_keys() {
        for statement in [FORGOTTEN_CHUNKS, PRUNE_CHUNKS] {
            let steps = plan(statement);
            for search in [
                "SEARCH turns USING COVERING INDEX turns_forget",
                "SEARCH turn_chunks",
            ] {
                let is_search = |step: &String| step.starts_with(search);
                assert!(steps.iter().any(is_search), "{steps:#?}");
            }
            let is_bad =
                |step: &String| step.starts_with("SCAN turn") || step.contains("TEMP B-TREE");
            assert!(!steps.iter().any(is_bad), "{steps:#?}");
        }
    }
}
