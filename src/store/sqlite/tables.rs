//! What is in the tables, and the statements that read and change it. Knows SQL; knows neither
//! threads nor transactions: the caller opens those.
//!
//! # Rows that nobody sees
//!
//! A session that has expired reads as one that never was. Whoever writes to it then takes its key
//! from its row, and so does [`prune`] before it deletes the first of its messages: such a row has
//! a key that no session has ([`HIDDEN`]). It is deleted in steps, and the session starts anew with
//! another row. The rows of forks that are being copied are hidden too.

use bytes::Bytes;
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, Row, ToSql, named_params};

use super::{sessions, turns};
use crate::message::UnixMillis;
use crate::store::sessions::{NOTICED_WITHIN_MS, Upkeep};
use crate::store::{
    Append, Appended, Body, ELEMENT_BYTES_MAX, Element, Epoch, Error, Order, Page,
    REQUEST_MEMORY_MS, Read, RequestKey, Result, Sequence, TOMBSTONE_MS,
};

/// Rows of one kind that one step of [`prune`] deletes, at most.
pub const PRUNE_ROWS_MAX: usize = 500;

/// Bytes of elements and of turns that one step of [`prune`] deletes, at most, except that the row that
/// reaches it goes whole. As many are written to the log, and other writes wait.
const PRUNE_BYTES_MAX: i64 = 4 << 20;

/// How long the clear of a session that never had messages is remembered. A turn that runs on it, the
/// first, must not bring it to life afterwards; no turn takes as long.
const FENCE_MS: i64 = 60 * 60 * 1000;

/// What the key of a hidden row begins with: a control character, which no session id has.
pub const HIDDEN: char = '\u{1}';

/// How long a session that has expired keeps its key, so that whoever waits for a change of it is
/// told first.
const DEAD_MS: i64 = 2 * NOTICED_WITHIN_MS as i64;

/// The condition that a row of `sessions` has not expired. One with a turn that runs does not: the
/// turn's end is a write, which it waits for.
macro_rules! is_alive {
    () => {
        "(sessions.expires_ms IS NULL OR sessions.expires_ms > :now_ms OR EXISTS (
            SELECT 1 FROM turns
            WHERE session = sessions.number AND state = 'running' AND forget_ms > :now_ms))"
    };
}
pub(super) use is_alive;

/// What [`Session::from_row`] reads. The greatest sequence in the table of messages counts too:
/// somebody may have added one by hand.
macro_rules! session_columns {
    () => {
        "number, key, epoch, max(last_sequence, coalesce(
                (SELECT max(sequence) FROM messages WHERE session = number), 0)) AS last_sequence,
            count, sessions.active_ms AS active_ms, expires_ms, ttl_ms, title, metadata, origin,
            origin_sequence, origin_through"
    };
}
pub(super) use session_columns;

const SESSION: &str = concat!(
    "SELECT ",
    session_columns!(),
    " FROM sessions WHERE key = :key AND ",
    is_alive!()
);

const ADD_SESSION: &str = "
    INSERT INTO sessions (key, last_sequence, forget_ms) VALUES (:key, 0, :forget_ms)";

// It goes as one that has expired: [`PRUNE_SESSIONS`] is never to look at it.
const HIDE_SESSION: &str = "
    UPDATE sessions SET key = char(1) || 'gone ' || number, expires_ms = 0,
        forget_ms = 9223372036854775807
    WHERE key = :key";

const ADVANCE_SESSION: &str = "
    UPDATE sessions SET last_sequence = ?2, count = count + ?3, forget_ms = NULL,
        active_ms = max(active_ms, ?4), expires_ms = ?5
    WHERE number = ?1";

const KEEP_SESSION: &str = "
    UPDATE sessions SET forget_ms = :forget_ms WHERE number = :session AND forget_ms < :forget_ms";

const CLEAR_SESSION: &str = "
    UPDATE sessions SET last_sequence = :last_sequence, count = NULL, epoch = epoch + 1,
        forget_ms = :forget_ms, expires_ms = NULL, ttl_ms = NULL, title = NULL, metadata = NULL,
        origin = NULL, origin_sequence = NULL, origin_through = NULL
    WHERE number = :session";

const ADD_MESSAGE: &str = "
    INSERT INTO messages (session, sequence, element) VALUES (?1, ?2, ?3)";

const DELETE_MESSAGES: &str = "DELETE FROM messages WHERE session = :session";

const REQUEST: &str = "
    SELECT number, expires_ms, fingerprint, first_sequence, count, time_ms FROM requests
    WHERE session = ?1 AND id = ?2";

const ADD_REQUEST: &str = "
    INSERT INTO requests (session, id, fingerprint, first_sequence, count, time_ms, expires_ms)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

const DELETE_REQUEST: &str = "DELETE FROM requests WHERE number = ?1";

const DELETE_REQUESTS: &str = "DELETE FROM requests WHERE session = :session";

// The oldest. Before them may be some from when the clock was ahead, which are not old yet: of those it
// passes over so many, in some 20 ms, which it may take once a minute.
const PRUNE_REQUESTS: &str = "
    DELETE FROM requests WHERE number IN
        (SELECT number FROM
            (SELECT number, expires_ms FROM requests ORDER BY number LIMIT 100000)
        WHERE expires_ms <= :latest_ms LIMIT :limit)
    AND expires_ms <= :now_ms";

const PRUNE_SESSIONS: &str = "
    DELETE FROM sessions WHERE number IN
        (SELECT number FROM sessions WHERE forget_ms <= :now_ms ORDER BY forget_ms LIMIT :limit)
    AND NOT EXISTS (SELECT 1 FROM messages WHERE session = number)
    AND NOT EXISTS (SELECT 1 FROM requests WHERE session = sessions.number)
    AND NOT EXISTS (SELECT 1 FROM turns WHERE session = sessions.number)";

// The hidden ones first: they are to be had at any time.
const EXPIRED: &str = "
    SELECT number, key FROM sessions WHERE expires_ms <= :dead_ms AND NOT EXISTS (
        SELECT 1 FROM turns
        WHERE session = sessions.number AND state = 'running' AND forget_ms > :now_ms)
    ORDER BY expires_ms LIMIT :limit";

// `length` of a BLOB reads the row's header only.
const EXPIRED_MESSAGES: &str = "
    SELECT length(element) FROM messages WHERE session = :session ORDER BY sequence LIMIT :limit";

const PRUNE_EXPIRED_MESSAGES: &str = "
    DELETE FROM messages WHERE session = :session AND sequence IN
        (SELECT sequence FROM messages WHERE session = :session ORDER BY sequence LIMIT :limit)";

const PRUNE_EXPIRED_REQUESTS: &str = "
    DELETE FROM requests WHERE number IN
        (SELECT number FROM requests WHERE session = :session LIMIT :limit)";

const DELETE_SESSION: &str = "DELETE FROM sessions WHERE number = :session";

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
const SESSIONS: &str = concat!(
    "
    SELECT key, EXISTS (SELECT 1 FROM messages WHERE session = number) AND ",
    is_alive!(),
    "
    FROM sessions WHERE key >= :from ORDER BY key LIMIT :limit"
);

/// A row of `sessions`, of one that has not expired.
pub struct Session {
    pub number: i64,
    pub key: String,
    pub epoch: Epoch,
    pub last_sequence: Sequence,
    /// `None`: every sequence from the oldest message to the newest has one.
    pub count: Option<i64>,
    /// 0 if it is not known.
    pub active_ms: UnixMillis,
    pub expires_ms: Option<UnixMillis>,
    pub ttl_ms: Option<i64>,
    pub title: Option<String>,
    /// Pairs, in JSON.
    pub metadata: Option<String>,
    pub origin: Option<Origin>,
}

/// Where a session was copied from.
pub struct Origin {
    pub key: String,
    pub sequence: Sequence,
    /// Up to where it was to be copied.
    pub through: Option<Sequence>,
}

impl Session {
    /// Of a row that begins with the columns of [`session_columns`]. By their places: to look for
    /// their names takes as long as to find the row.
    pub fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let origin: Option<String> = row.get(10)?;
        Ok(Self {
            number: row.get(0)?,
            key: row.get(1)?,
            epoch: Epoch(row.get(2)?),
            last_sequence: row.get(3)?,
            count: row.get(4)?,
            active_ms: row.get(5)?,
            expires_ms: row.get(6)?,
            ttl_ms: row.get(7)?,
            title: row.get(8)?,
            metadata: row.get(9)?,
            origin: match origin {
                Some(key) => Some(Origin {
                    key,
                    sequence: row.get(11)?,
                    through: row.get(12)?,
                }),
                None => None,
            },
        })
    }

    /// How long it lives after a write: 0 for ever, `None` if nothing is said of that.
    pub fn lifetime_ms(&self, upkeep: &Upkeep) -> Option<i64> {
        self.ttl_ms.or(upkeep.ttl_ms)
    }

    /// When it expires if it is written to now.
    fn next_expiry(&self, upkeep: &Upkeep, now_ms: UnixMillis) -> Option<UnixMillis> {
        match self.lifetime_ms(upkeep) {
            // One that others have set stands. A turn may have kept the session beyond it; what it
            // has stored is not to be gone at once.
            None => self.expires_ms.filter(|at_ms| *at_ms > now_ms),
            Some(ttl_ms) => expiry_after(ttl_ms, now_ms),
        }
    }
}

/// When a session that lives so long from now on expires.
pub fn expiry_after(ttl_ms: i64, now_ms: UnixMillis) -> Option<UnixMillis> {
    (ttl_ms > 0).then(|| now_ms.saturating_add(ttl_ms))
}

/// The row of a session, unless it has expired.
pub fn session(db: &Connection, key: &str, now_ms: UnixMillis) -> Result<Option<Session>> {
    let mut statement = db.prepare_cached(SESSION)?;
    let found = statement.query_row((key, now_ms), Session::from_row);
    Ok(found.optional()?)
}

/// What an append under this key stored, if that is still remembered. If not, nothing is left of it
/// afterwards.
pub fn remembered(
    db: &Connection,
    session: i64,
    request: &RequestKey,
    now_ms: UnixMillis,
) -> Result<Option<Appended>> {
    let found = db
        .prepare_cached(REQUEST)?
        .query_row((session, request.id), |row| {
            let count: i64 = row.get(4)?;
            let appended = Appended {
                first_sequence: row.get(3)?,
                count: usize::try_from(count)
                    .map_err(|_| rusqlite::Error::IntegralValueOutOfRange(4, count))?,
                time_ms: row.get(5)?,
                repeated: true,
            };
            let (number, expires_ms): (i64, UnixMillis) = (row.get(0)?, row.get(1)?);
            let fingerprint: Vec<u8> = row.get(2)?;
            Ok((number, expires_ms, fingerprint, appended))
        })
        .optional()?;
    match found {
        None => Ok(None),
        Some((number, expires_ms, ..)) if expires_ms <= now_ms => {
            db.prepare_cached(DELETE_REQUEST)?.execute([number])?;
            Ok(None)
        }
        Some((_, _, fingerprint, _)) if fingerprint != request.fingerprint => {
            Err(Error::RequestReused)
        }
        Some((.., appended)) => Ok(Some(appended)),
    }
}

/// Remembers what a request has done, after [`remembered`] knew nothing of it.
pub fn remember(
    db: &Connection,
    session: i64,
    request: &RequestKey,
    done: &Appended,
    now_ms: UnixMillis,
) -> Result<()> {
    // By the store's own clock, like every comparison with it.
    let expires_ms = now_ms.saturating_add(REQUEST_MEMORY_MS);
    db.prepare_cached(ADD_REQUEST)?.execute((
        session,
        request.id,
        request.fingerprint,
        done.first_sequence,
        done.count as i64,
        done.time_ms,
        expires_ms,
    ))?;
    Ok(())
}

pub fn append(
    db: &Connection,
    key: &str,
    append: &Append,
    upkeep: &Upkeep,
    now_ms: UnixMillis,
) -> Result<Appended> {
    let found = session(db, key, now_ms)?;
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

    let session = match found {
        Some(session) => session,
        None => add_session(db, key, now_ms, now_ms)?,
    };
    let appended = add(
        db,
        &session,
        &append.elements,
        append.time_ms,
        upkeep,
        now_ms,
    )?;
    remember(db, session.number, &append.request, &appended, now_ms)?;
    Ok(appended)
}

/// Adds elements at the end of a session, without conditions.
pub fn add(
    db: &Connection,
    session: &Session,
    elements: &[Bytes],
    time_ms: UnixMillis,
    upkeep: &Upkeep,
    now_ms: UnixMillis,
) -> Result<Appended> {
    let last = session.last_sequence;
    let count = elements.len() as i64;
    let expires_ms = session.next_expiry(upkeep, now_ms);
    db.prepare_cached(ADVANCE_SESSION)?.execute((
        session.number,
        last + count,
        count,
        now_ms,
        expires_ms,
    ))?;
    let mut add_message = db.prepare_cached(ADD_MESSAGE)?;
    for (element, sequence) in elements.iter().zip(last + 1..) {
        add_message.execute((session.number, sequence, element.as_ref()))?;
    }
    sessions::written(db, session, last + count, upkeep)?;
    Ok(Appended {
        first_sequence: last + 1,
        count: elements.len(),
        time_ms,
        repeated: false,
    })
}

/// Takes the key from the row that has it, if there is one.
pub fn hide(db: &Connection, key: &str) -> Result<()> {
    let params = named_params! {":key": key};
    db.prepare_cached(HIDE_SESSION)?.execute(params)?;
    Ok(())
}

/// Adds a session without messages, to be forgotten at a time unless it gets some.
pub fn add_session(
    db: &Connection,
    key: &str,
    forget_ms: UnixMillis,
    now_ms: UnixMillis,
) -> Result<Session> {
    // It may be there, expired.
    hide(db, key)?;
    let params = named_params! {":key": key, ":forget_ms": forget_ms};
    db.prepare_cached(ADD_SESSION)?.execute(params)?;
    let gone = || Error::Corrupt("a session that was added is not there".to_owned());
    session(db, key, now_ms)?.ok_or_else(gone)
}

/// Has a session that is to be forgotten stay until then at least. [`prune`] would look in vain at
/// one that has turns, each time, and not at those behind it.
pub fn keep_session(db: &Connection, session: i64, forget_ms: UnixMillis) -> Result<()> {
    let params = named_params! {":session": session, ":forget_ms": forget_ms};
    db.prepare_cached(KEEP_SESSION)?.execute(params)?;
    Ok(())
}

pub fn clear(db: &Connection, key: &str, now_ms: UnixMillis) -> Result<i64> {
    let session = match session(db, key, now_ms)? {
        Some(session) => session,
        None => add_session(db, key, now_ms, now_ms)?,
    };
    let (number, last_sequence) = (session.number, session.last_sequence);
    let by_session = named_params! {":session": number};
    let deleted = db.prepare_cached(DELETE_MESSAGES)?.execute(by_session)?;
    db.prepare_cached(DELETE_REQUESTS)?.execute(by_session)?;
    turns::clear(db, number)?;
    sessions::delete_pairs(db, number)?;
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

/// What a step of [`prune`] has done.
pub struct Pruned {
    /// Whether it may have left some.
    pub has_more: bool,
    /// Whether messages were deleted.
    pub messages: bool,
}

/// Deletes what is too old to count; a bounded number of rows and bytes, the oldest first.
pub fn prune(db: &Connection, now_ms: UnixMillis) -> Result<Pruned> {
    let limit = PRUNE_ROWS_MAX as i64;
    let mut bytes_left = PRUNE_BYTES_MAX;
    let requests = db.prepare_cached(PRUNE_REQUESTS)?.execute(named_params! {
        ":limit": limit,
        ":now_ms": now_ms,
        ":latest_ms": now_ms.saturating_add(REQUEST_MEMORY_MS),
    })?;
    let has_more_turns = turns::prune(db, now_ms, limit, &mut bytes_left)?;
    let sessions = db
        .prepare_cached(PRUNE_SESSIONS)?
        .execute(named_params! {":limit": limit, ":now_ms": now_ms})?;
    let mut pruned = prune_expired(db, now_ms, &mut bytes_left)?;
    pruned.has_more |= has_more_turns || [requests, sessions].contains(&PRUNE_ROWS_MAX);
    Ok(pruned)
}

/// How many of the rows whose sizes a statement gives may go in this step.
pub fn fitting(
    db: &Connection,
    sizes: &str,
    params: &[(&str, &dyn ToSql)],
    bytes_left: &mut i64,
) -> Result<i64> {
    let mut statement = db.prepare_cached(sizes)?;
    let mut rows = statement.query(params)?;
    let mut count = 0;
    while *bytes_left > 0
        && let Some(row) = rows.next()?
    {
        *bytes_left -= row.get::<_, i64>(0)?;
        count += 1;
    }
    Ok(count)
}

/// Deletes what there is of sessions that have expired, about as many rows.
fn prune_expired(db: &Connection, now_ms: UnixMillis, bytes_left: &mut i64) -> Result<Pruned> {
    let mut expired = db.prepare_cached(EXPIRED)?;
    let rows = expired.query_map(
        named_params! {
            ":dead_ms": now_ms.saturating_sub(DEAD_MS),
            ":now_ms": now_ms,
            ":limit": PRUNE_ROWS_MAX as i64,
        },
        |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)),
    )?;
    let rows: Vec<_> = rows.collect::<rusqlite::Result<_>>()?;
    let mut left = PRUNE_ROWS_MAX;
    let mut pruned = Pruned {
        has_more: true,
        messages: false,
    };
    for (number, key) in rows {
        // Nobody is to see a part of it, also should the clock be set back.
        if !key.starts_with(HIDDEN) {
            hide(db, &key)?;
        }
        let params = named_params! {":session": number, ":limit": left as i64};
        let rows = fitting(db, EXPIRED_MESSAGES, params, bytes_left)?;
        pruned.messages |= rows > 0;
        for (statement, rows) in [
            (PRUNE_EXPIRED_MESSAGES, rows),
            (PRUNE_EXPIRED_REQUESTS, left as i64 - rows),
        ] {
            let params = named_params! {":session": number, ":limit": rows};
            left -= db.prepare_cached(statement)?.execute(params)?;
        }
        left -= turns::prune_session(db, number, left as i64, bytes_left)?;
        if left == 0 || *bytes_left <= 0 {
            return Ok(pruned);
        }
        sessions::delete_pairs(db, number)?;
        db.prepare_cached(DELETE_SESSION)?
            .execute(named_params! {":session": number})?;
        left -= 1;
        if left == 0 {
            return Ok(pruned);
        }
    }
    pruned.has_more = false;
    Ok(pruned)
}

/// Reads a page. Says also whether the session is to be kept alive for it.
pub fn read(
    db: &Connection,
    key: &str,
    read: &Read,
    upkeep: &Upkeep,
    now_ms: UnixMillis,
) -> Result<(Page, bool)> {
    in_snapshot(db, || {
        let found = session(db, key, now_ms)?;
        let is_due = found
            .as_ref()
            .is_some_and(|session| sessions::extension(session, upkeep, now_ms).is_some());
        Ok((page(db, found, read)?, is_due))
    })
}

/// The keys from `from` on, in their order, at most `limit`; each with whether it has messages.
/// Hidden ones have none.
pub fn sessions(
    db: &Connection,
    from: &str,
    limit: usize,
    now_ms: UnixMillis,
) -> Result<Vec<(String, bool)>> {
    let mut statement = db.prepare_cached(SESSIONS)?;
    let params = named_params! {":from": from, ":limit": sql_limit(limit), ":now_ms": now_ms};
    let rows = statement.query_map(params, |row| {
        let key: String = row.get(0)?;
        let has_messages: bool = row.get(1)?;
        let is_hidden = key.starts_with(HIDDEN);
        Ok((key, has_messages && !is_hidden))
    })?;
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

fn page(db: &Connection, found: Option<Session>, read: &Read) -> Result<Page> {
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

pub fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub fn corrupt(error: impl std::fmt::Display) -> Error {
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
            HIDE_SESSION,
            ADVANCE_SESSION,
            KEEP_SESSION,
            CLEAR_SESSION,
            DELETE_MESSAGES,
            REQUEST,
            DELETE_REQUEST,
            DELETE_REQUESTS,
            PRUNE_SESSIONS,
            EXPIRED,
            EXPIRED_MESSAGES,
            PRUNE_EXPIRED_MESSAGES,
            PRUNE_EXPIRED_REQUESTS,
            DELETE_SESSION,
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
        let range = "SEARCH sessions USING INDEX sqlite_autoindex_sessions_1 (key>?)";
        assert!(steps.iter().any(|step| step == range), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));

        let steps = plan(FIRST_OF_NEWEST);
        let range = "SEARCH messages USING COVERING INDEX sqlite_autoindex_messages_1 \
                     (session=? AND sequence>? AND sequence<?)";
        assert!(steps.iter().any(|step| step == range), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));

        let steps = plan(PRUNE_REQUESTS);
        let by_number = "SEARCH requests USING INTEGER PRIMARY KEY (rowid=?)";
        assert!(steps.iter().any(|step| step == by_number), "{steps:#?}");
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")));
    }
}
