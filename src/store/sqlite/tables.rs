//! What is in the tables, and the statements that read and change it. Knows SQL; knows neither
//! threads nor transactions: the caller opens those.

use bytes::Bytes;
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, named_params};

use super::turns;
use crate::message::UnixMillis;
use crate::store::{
    Append, Appended, Body, ELEMENT_BYTES_MAX, Element, Epoch, Error, Order, Page,
    REQUEST_MEMORY_MS, Read, RequestKey, Result, Sequence, TOMBSTONE_MS,
};

/// Rows of one kind that one step of [`prune`] deletes, at most.
pub const PRUNE_ROWS_MAX: usize = 500;

/// How long the clear of a session that never had messages is remembered. A turn that runs on it, the
/// first, must not bring it to life afterwards; no turn takes as long.
const FENCE_MS: i64 = 60 * 60 * 1000;

// The greatest sequence in the table counts too: somebody may have added a message by hand.
const SESSION: &str = "
    SELECT number, epoch, max(last_sequence, coalesce(
        (SELECT max(sequence) FROM messages WHERE session = number), 0))
    FROM sessions WHERE key = :key";

const ADD_SESSION: &str = "
    INSERT INTO sessions (key, last_sequence) VALUES (:key, :last_sequence)";

const ADD_EMPTY_SESSION: &str = "
    INSERT INTO sessions (key, last_sequence, forget_ms) VALUES (:key, 0, :forget_ms)";

const ADVANCE_SESSION: &str = "
    UPDATE sessions SET last_sequence = :last_sequence, forget_ms = NULL WHERE number = :session";

const KEEP_SESSION: &str = "
    UPDATE sessions SET forget_ms = :forget_ms WHERE number = :session AND forget_ms < :forget_ms";

const CLEAR_SESSION: &str = "
    UPDATE sessions SET last_sequence = :last_sequence, epoch = epoch + 1, forget_ms = :forget_ms
    WHERE number = :session";

const ADD_MESSAGE: &str = "
    INSERT INTO messages (session, sequence, element) VALUES (?1, ?2, ?3)";

const DELETE_MESSAGES: &str = "DELETE FROM messages WHERE session = :session";

const REQUEST: &str = "
    SELECT fingerprint, first_sequence, count, time_ms FROM requests
    WHERE session = :session AND id = :id AND expires_ms > :now_ms";

// An expired one of the same id may still be there.
const ADD_REQUEST: &str = "
    INSERT OR REPLACE INTO requests
        (session, id, fingerprint, first_sequence, count, time_ms, expires_ms)
    VALUES (:session, :id, :fingerprint, :first_sequence, :count, :time_ms, :expires_ms)";

const DELETE_REQUESTS: &str = "DELETE FROM requests WHERE session = :session";

const PRUNE_REQUESTS: &str = "
    DELETE FROM requests WHERE number IN
        (SELECT number FROM requests ORDER BY number LIMIT :limit) AND expires_ms <= :now_ms";

const PRUNE_SESSIONS: &str = "
    DELETE FROM sessions WHERE number IN
        (SELECT number FROM sessions WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit)
    AND NOT EXISTS (SELECT 1 FROM messages WHERE session = number)
    AND NOT EXISTS (SELECT 1 FROM requests WHERE session = sessions.number)
    AND NOT EXISTS (SELECT 1 FROM turns WHERE session = sessions.number)";

const FIRST_IN_RANGE: &str = "
    SELECT min(sequence) FROM messages
    WHERE session = :session AND sequence > :after AND sequence < :before";

const LAST_IN_RANGE: &str = "
    SELECT max(sequence) FROM messages
    WHERE session = :session AND sequence > :after AND sequence < :before";

const FIRST_OF_NEWEST: &str = "
    SELECT min(sequence) FROM (
        SELECT sequence FROM messages
        WHERE session = :session AND sequence > :after AND sequence < :before
        ORDER BY sequence DESC LIMIT :limit)";

// `length` of a BLOB reads the row's header only, so what is too large is not loaded.
const OLDEST_FIRST: &str = "
    SELECT sequence, length(element), CASE WHEN length(element) <= :bytes_max THEN element END
    FROM messages WHERE session = :session AND sequence > :after AND sequence < :before
    ORDER BY sequence ASC LIMIT :limit";

const NEWEST_FIRST: &str = "
    SELECT sequence, length(element), CASE WHEN length(element) <= :bytes_max THEN element END
    FROM messages WHERE session = :session AND sequence > :after AND sequence < :before
    ORDER BY sequence DESC LIMIT :limit";

// A cleared session has a row and no messages.
const SESSIONS: &str = "
    SELECT key, EXISTS (SELECT 1 FROM messages WHERE session = number)
    FROM sessions WHERE key >= :from ORDER BY key LIMIT :limit";

/// A row of `sessions`.
struct Session {
    number: i64,
    last_sequence: Sequence,
    epoch: Epoch,
}

fn session(db: &Connection, key: &str) -> Result<Option<Session>> {
    let found = db
        .prepare_cached(SESSION)?
        .query_row(named_params! {":key": key}, |row| {
            Ok(Session {
                number: row.get(0)?,
                epoch: Epoch(row.get(1)?),
                last_sequence: row.get(2)?,
            })
        })
        .optional()?;
    Ok(found)
}

/// What an append under this key stored, if that is still remembered.
fn remembered(
    db: &Connection,
    session: i64,
    request: &RequestKey,
    now_ms: UnixMillis,
) -> Result<Option<Appended>> {
    let params = named_params! {":session": session, ":id": request.id, ":now_ms": now_ms};
    let found = db
        .prepare_cached(REQUEST)?
        .query_row(params, |row| {
            let fingerprint: Vec<u8> = row.get(0)?;
            let count: i64 = row.get(2)?;
            let appended = Appended {
                first_sequence: row.get(1)?,
                count: usize::try_from(count)
                    .map_err(|_| rusqlite::Error::IntegralValueOutOfRange(2, count))?,
                time_ms: row.get(3)?,
                repeated: true,
            };
            Ok((fingerprint, appended))
        })
        .optional()?;
    match found {
        Some((fingerprint, _)) if fingerprint != request.fingerprint => Err(Error::RequestReused),
        Some((_, appended)) => Ok(Some(appended)),
        None => Ok(None),
    }
}

pub fn append(db: &Connection, key: &str, append: &Append, now_ms: UnixMillis) -> Result<Appended> {
    let found = session(db, key)?;
    if let Some(session) = &found
        && let Some(appended) = remembered(db, session.number, &append.request, now_ms)?
    {
        return Ok(appended);
    }

    let actual_epoch = found.as_ref().map_or(Epoch(0), |session| session.epoch);
    if append
        .expected_epoch
        .is_some_and(|epoch| epoch != actual_epoch)
    {
        return Err(Error::Cleared);
    }
    let actual = found.as_ref().map_or(0, |session| session.last_sequence);
    if let Some(expected) = append.expected_last_sequence
        && expected != actual
    {
        return Err(Error::SequenceMismatch { expected, actual });
    }

    let (number, appended) = add(db, key, found, &append.elements, append.time_ms)?;
    db.prepare_cached(ADD_REQUEST)?.execute(named_params! {
        ":session": number,
        ":id": append.request.id,
        ":fingerprint": append.request.fingerprint,
        ":first_sequence": appended.first_sequence,
        ":count": appended.count as i64,
        ":time_ms": append.time_ms,
        // By the store's own clock, like every comparison with it.
        ":expires_ms": now_ms.saturating_add(REQUEST_MEMORY_MS),
    })?;
    Ok(appended)
}

/// Adds elements at the end of a session, without conditions.
pub fn add_messages(
    db: &Connection,
    key: &str,
    elements: &[Bytes],
    time_ms: UnixMillis,
) -> Result<Appended> {
    let (_, appended) = add(db, key, session(db, key)?, elements, time_ms)?;
    Ok(appended)
}

/// Adds elements at the end of a session, and the session if there is none. Returns its number.
fn add(
    db: &Connection,
    key: &str,
    found: Option<Session>,
    elements: &[Bytes],
    time_ms: UnixMillis,
) -> Result<(i64, Appended)> {
    let last = found.as_ref().map_or(0, |session| session.last_sequence);
    let last_sequence = last + elements.len() as i64;
    let number = match found {
        Some(session) => {
            let params =
                named_params! {":session": session.number, ":last_sequence": last_sequence};
            db.prepare_cached(ADVANCE_SESSION)?.execute(params)?;
            session.number
        }
        None => {
            let params = named_params! {":key": key, ":last_sequence": last_sequence};
            db.prepare_cached(ADD_SESSION)?.insert(params)?
        }
    };
    let mut add_message = db.prepare_cached(ADD_MESSAGE)?;
    for (element, sequence) in elements.iter().zip(last + 1..) {
        add_message.execute((number, sequence, element.as_ref()))?;
    }
    let appended = Appended {
        first_sequence: last + 1,
        count: elements.len(),
        time_ms,
        repeated: false,
    };
    Ok((number, appended))
}

/// The number of a session's row.
pub fn session_number(db: &Connection, key: &str) -> Result<Option<i64>> {
    Ok(session(db, key)?.map(|session| session.number))
}

/// Adds a session without messages, to be forgotten at a time unless it gets some.
pub fn add_empty_session(db: &Connection, key: &str, forget_ms: UnixMillis) -> Result<i64> {
    let params = named_params! {":key": key, ":forget_ms": forget_ms};
    Ok(db.prepare_cached(ADD_EMPTY_SESSION)?.insert(params)?)
}

/// Has a session that is to be forgotten stay until then at least. [`prune`] would look in vain at
/// one that has turns, each time, and not at those behind it.
pub fn keep_session(db: &Connection, session: i64, forget_ms: UnixMillis) -> Result<()> {
    let params = named_params! {":session": session, ":forget_ms": forget_ms};
    db.prepare_cached(KEEP_SESSION)?.execute(params)?;
    Ok(())
}

pub fn clear(db: &Connection, key: &str, now_ms: UnixMillis) -> Result<i64> {
    let (number, last_sequence) = match session(db, key)? {
        Some(session) => (session.number, session.last_sequence),
        None => {
            let params = named_params! {":key": key, ":last_sequence": 0};
            (db.prepare_cached(ADD_SESSION)?.insert(params)?, 0)
        }
    };
    let by_session = named_params! {":session": number};
    let deleted = db.prepare_cached(DELETE_MESSAGES)?.execute(by_session)?;
    db.prepare_cached(DELETE_REQUESTS)?.execute(by_session)?;
    turns::clear(db, number)?;
    let memory_ms = match last_sequence {
        0 => FENCE_MS,
        _ => TOMBSTONE_MS,
    };
    db.prepare_cached(CLEAR_SESSION)?.execute(named_params! {
        ":session": number,
        ":last_sequence": last_sequence,
        ":forget_ms": now_ms.saturating_add(memory_ms),
    })?;
    Ok(deleted as i64)
}

/// Deletes what is too old to count; a bounded number of rows, the oldest first. Says whether
/// there may be more.
pub fn prune(db: &Connection, now_ms: UnixMillis) -> Result<bool> {
    let limit = PRUNE_ROWS_MAX as i64;
    let requests = db
        .prepare_cached(PRUNE_REQUESTS)?
        .execute(named_params! {":limit": limit, ":now_ms": now_ms})?;
    let has_more_turns = turns::prune(db, now_ms, limit)?;
    let sessions = db
        .prepare_cached(PRUNE_SESSIONS)?
        .execute(named_params! {":limit": limit, ":now_ms": now_ms})?;
    Ok(has_more_turns || [requests, sessions].contains(&PRUNE_ROWS_MAX))
}

pub fn read(db: &Connection, key: &str, read: &Read) -> Result<Page> {
    in_snapshot(db, || page(db, key, read))
}

/// The keys from `from` on, in their order, at most `limit`; each with whether it has messages.
pub fn sessions(db: &Connection, from: &str, limit: usize) -> Result<Vec<(String, bool)>> {
    let mut statement = db.prepare_cached(SESSIONS)?;
    let params = named_params! {":from": from, ":limit": sql_limit(limit)};
    let rows = statement.query_map(params, |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Shows all statements of a read the same state. After an error of SQLite, the connection may be
/// left inside the snapshot and is of no further use.
pub fn in_snapshot<T>(db: &Connection, read: impl FnOnce() -> Result<T>) -> Result<T> {
    db.prepare_cached("BEGIN")?.execute([])?;
    let result = read();
    db.prepare_cached("COMMIT")?.execute([])?;
    result
}

fn page(db: &Connection, key: &str, read: &Read) -> Result<Page> {
    let found = session(db, key)?;
    let last_sequence = found.as_ref().map_or(0, |session| session.last_sequence);
    let mut page = Page {
        elements: Vec::new(),
        more: false,
        after: read.after,
        before: read.before.unwrap_or(last_sequence + 1),
        last_sequence,
        epoch: found.as_ref().map_or(Epoch(0), |session| session.epoch),
    };
    let Some(session) = found else {
        return Ok(page);
    };
    if let Some(last) = read.last {
        page.after = after_of_newest(db, session.number, &page, last)?;
    }

    let mut statement = db.prepare_cached(match read.order {
        Order::OldestFirst => OLDEST_FIRST,
        Order::NewestFirst => NEWEST_FIRST,
    })?;
    let mut rows = statement.query(named_params! {
        ":session": session.number,
        ":after": page.after,
        ":before": page.before,
        ":bytes_max": ELEMENT_BYTES_MAX as i64,
        // One more, to know whether there is more.
        ":limit": sql_limit(read.limit.saturating_add(1)),
    })?;
    let mut bytes_read: usize = 0;
    while let Some(row) = rows.next()? {
        if page.elements.len() == read.limit {
            page.more = true;
            break;
        }
        let body = match row.get_ref(2)?.as_blob_or_null().map_err(corrupt)? {
            Some(bytes) => {
                bytes_read += bytes.len();
                if bytes_read > read.bytes_max && !page.elements.is_empty() {
                    page.more = true;
                    break;
                }
                Body::Bytes(Bytes::copy_from_slice(bytes))
            }
            None => {
                let length: i64 = row.get(1)?;
                Body::TooLarge(usize::try_from(length).map_err(corrupt)?)
            }
        };
        let sequence = row.get(0)?;
        page.elements.push(Element { sequence, body });
    }
    Ok(page)
}

/// The sequence after which the newest `last` elements of the page's range stand.
fn after_of_newest(db: &Connection, session: i64, page: &Page, last: usize) -> Result<Sequence> {
    let one = |mut statement: CachedStatement<'_>| -> Result<Option<Sequence>> {
        let params =
            named_params! {":session": session, ":after": page.after, ":before": page.before};
        Ok(statement.query_row(params, |row| row.get(0))?)
    };
    let first = one(db.prepare_cached(FIRST_IN_RANGE)?)?;
    let newest = one(db.prepare_cached(LAST_IN_RANGE)?)?;
    let (Some(first), Some(newest)) = (first, newest) else {
        return Ok(page.after);
    };
    if last == 0 {
        return Ok(newest);
    }
    // The range cannot hold more elements than sequences: often that saves the walk.
    let last = sql_limit(last);
    if newest - first < last {
        return Ok(page.after);
    }
    let params = named_params! {
        ":session": session,
        ":after": page.after,
        ":before": page.before,
        ":limit": last,
    };
    let mut statement = db.prepare_cached(FIRST_OF_NEWEST)?;
    let first_of_newest: Sequence = statement.query_row(params, |row| row.get(0))?;
    if first_of_newest == first {
        return Ok(page.after);
    }
    Ok(first_of_newest - 1)
}

fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn corrupt(error: impl std::fmt::Display) -> Error {
    Error::Corrupt(error.to_string())
}

impl From<rusqlite::Error> for Error {
    /// The error of a statement. That of a COMMIT is judged where it happens.
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let text = error.to_string();
        match error {
            rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DiskFull => Self::Full(text),
                // A constraint that fails is a table that somebody changed to what we never make.
                ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::TypeMismatch
                | ErrorCode::ConstraintViolation => Self::Corrupt(text),
                _ => Self::Unavailable(text),
            },
            // A value or a column that is not what the schema says.
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::QueryReturnedNoRows => Self::Corrupt(text),
            _ => Self::Unavailable(text),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn plan(statement: &str) -> Vec<String> {
        let db = Connection::open_in_memory().unwrap();
        for migration in crate::store::sqlite::open::MIGRATIONS {
            db.execute_batch(migration).unwrap();
        }
        let mut explain = db
            .prepare(&format!("EXPLAIN QUERY PLAN {statement}"))
            .unwrap();
        // Without values for its parameters: the plan does not depend on them.
        let mut rows = explain.raw_query();
        let mut steps = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            steps.push(row.get(3).unwrap());
        }
        steps
    }

    /// A statement that scanned a table, or sorted, would cost what is stored, not what is read.
    #[test]
    fn every_statement_goes_by_an_index() {
        let statements = [
            SESSION,
            ADVANCE_SESSION,
            KEEP_SESSION,
            CLEAR_SESSION,
            DELETE_MESSAGES,
            REQUEST,
            DELETE_REQUESTS,
            PRUNE_SESSIONS,
            FIRST_IN_RANGE,
            LAST_IN_RANGE,
            OLDEST_FIRST,
            NEWEST_FIRST,
        ];
        for statement in statements {
            let steps = plan(statement);
            assert!(
                steps.iter().any(|step| step.starts_with("SEARCH")),
                "{statement}\n{steps:#?}"
            );
            for step in &steps {
                let is_bad = step.starts_with("SCAN") || step.contains("TEMP B-TREE");
                assert!(!is_bad, "{statement}\n{steps:#?}");
            }
        }
    }

    /// These walk a part of a table that their LIMIT bounds.
    #[test]
    fn a_bounded_walk_goes_along_the_key() {
        let steps = plan(SESSIONS);
        let range = "SEARCH sessions USING COVERING INDEX sqlite_autoindex_sessions_1 (key>?)";
        assert!(steps.iter().any(|step| step == range), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));

        let steps = plan(FIRST_OF_NEWEST);
        let range = "SEARCH messages USING PRIMARY KEY (session=? AND sequence>? AND sequence<?)";
        assert!(steps.iter().any(|step| step == range), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));

        let steps = plan(PRUNE_REQUESTS);
        let by_number = "SEARCH requests USING INTEGER PRIMARY KEY (rowid=?)";
        assert!(steps.iter().any(|step| step == by_number), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));
    }
}
