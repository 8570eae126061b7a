//! Sessions as a whole, in the file: what is said of them, their order, what goes from them.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use rusqlite::{Connection, Row, Rows, named_params};
use serde::Deserialize;

use super::tables::{self, Session, is_alive, session_columns};
use super::{Sqlite, fork, notice, turns};
use crate::message::{SessionId, UnixMillis};
use crate::store::sessions::{
    About, Fork, Forked, LOOKED_AT_MAX, ListRecent, Look, Origin, RecentPage, Rewind, Rewound,
    Seen, SessionStore, Update, Upkeep,
};
use crate::store::{
    Appended, Bell, Cursor, Error, REQUEST_MEMORY_MS, Result, Sequence, TOMBSTONE_MS,
};

/// Elements that one write looks at to trim a session, and so deletes, at most. One that has many
/// more than it may, because the setting is new, is trimmed by its next writes.
const TRIM_LOOKED_AT_MAX: i64 = 1_000;

/// A read extends a session's life if so much of it has gone: a tenth. With less, each read would be
/// a write.
const EXTEND_PART: i64 = 10;

const FIRST: &str = "SELECT min(sequence) FROM messages WHERE session = :session";

const FLOOR: &str = "
    SELECT max(sequence) FROM messages WHERE session = :session AND sequence <= :at";

const LAST: &str = "SELECT max(sequence) FROM messages WHERE session = :session";

const TOUCH: &str = "UPDATE sessions SET expires_ms = :expires_ms WHERE number = :session";

const DESCRIBE: &str = "
    UPDATE sessions SET title = :title, metadata = :metadata, ttl_ms = :ttl_ms,
        expires_ms = :expires_ms
    WHERE number = :session";

const ADD_PAIR: &str = "
    INSERT INTO session_pairs (session, name, value, active_ms) VALUES (?1, ?2, ?3, ?4)";

const MOVE_PAIRS: &str = "
    UPDATE session_pairs SET active_ms =
        (SELECT active_ms FROM sessions WHERE number = :session)
    WHERE session = :session";

const DELETE_PAIRS: &str = "DELETE FROM session_pairs WHERE session = :session";

const REWIND: &str = "DELETE FROM messages WHERE session = :session AND sequence > :after";

const REWOUND: &str = "
    UPDATE sessions SET last_sequence = :last_sequence, count = :count,
        forget_ms =
            CASE WHEN :count = 0 THEN max(coalesce(forget_ms, 0), :forget_ms) ELSE forget_ms END
    WHERE number = :session";

const OLDEST: &str = "
    SELECT sequence, element FROM messages WHERE session = :session ORDER BY sequence LIMIT :limit";

const TRIM: &str = "DELETE FROM messages WHERE session = :session AND sequence < :before";

const TRIMMED: &str = "UPDATE sessions SET count = count - :count WHERE number = :session";

// Each in two parts, those of the time where the walk stands and those before: SQLite seeks by a
// number behind a time only where the time is one, and many sessions may have the same.
const RECENT: [&str; 2] = [
    concat!(
        "SELECT ",
        session_columns!(),
        ", ",
        is_alive!(),
        " AS is_alive FROM sessions
        WHERE forget_ms IS NULL AND active_ms = :active_ms AND number < :number
        ORDER BY number DESC LIMIT :limit"
    ),
    concat!(
        "SELECT ",
        session_columns!(),
        ", ",
        is_alive!(),
        " AS is_alive FROM sessions
        WHERE forget_ms IS NULL AND active_ms < :active_ms AND :number IS NOT NULL
        ORDER BY active_ms DESC, number DESC LIMIT :limit"
    ),
];

const RECENT_WITH: [&str; 2] = [
    concat!(
        "SELECT ",
        session_columns!(),
        ", forget_ms IS NULL AND ",
        is_alive!(),
        " AS is_alive FROM session_pairs JOIN sessions ON number = session
        WHERE name = :name AND value = :value AND session_pairs.active_ms = :active_ms
            AND session < :number
        ORDER BY session DESC LIMIT :limit"
    ),
    concat!(
        "SELECT ",
        session_columns!(),
        ", forget_ms IS NULL AND ",
        is_alive!(),
        " AS is_alive FROM session_pairs JOIN sessions ON number = session
        WHERE name = :name AND value = :value AND session_pairs.active_ms < :active_ms
            AND :number IS NOT NULL
        ORDER BY session_pairs.active_ms DESC, session DESC LIMIT :limit"
    ),
];

/// What else a write to a session's elements brings with it.
pub fn written(
    db: &Connection,
    session: &Session,
    last_sequence: Sequence,
    upkeep: &Upkeep,
) -> Result<()> {
    if session.metadata.is_some() {
        let params = named_params! {":session": session.number};
        db.prepare_cached(MOVE_PAIRS)?.execute(params)?;
    }
    if let Some(elements_max) = upkeep.elements_max {
        let added = last_sequence - session.last_sequence;
        let count = match session.count {
            Some(count) => count + added,
            None => {
                let first = one(db, FIRST, session.number)?;
                first.map_or(0, |first| last_sequence - first + 1)
            }
        };
        trim(db, session.number, count - tables::sql_limit(elements_max))?;
    }
    Ok(())
}

/// Deletes the oldest exchanges, so that `excess` elements and no more exchanges than it takes are
/// gone, but not the newest exchange.
fn trim(db: &Connection, session: i64, excess: i64) -> Result<()> {
    if excess <= 0 {
        return Ok(());
    }
    let mut statement = db.prepare_cached(OLDEST)?;
    let params = named_params! {":session": session, ":limit": TRIM_LOOKED_AT_MAX};
    let mut rows = statement.query(params)?;
    let mut before = None;
    let mut place = 0;
    while let Some(row) = rows.next()? {
        let element = row.get_ref(1)?.as_blob().map_err(tables::corrupt)?;
        // The exchange that ends in front of the first question has nothing before it.
        if place > 0 && begins_exchange(element) {
            before = Some(row.get::<_, Sequence>(0)?);
            if place >= excess {
                break;
            }
        }
        place += 1;
    }
    drop(rows);
    if let Some(before) = before {
        let params = named_params! {":session": session, ":before": before};
        let count = db.prepare_cached(TRIM)?.execute(params)?;
        let params = named_params! {":session": session, ":count": count as i64};
        db.prepare_cached(TRIMMED)?.execute(params)?;
    }
    Ok(())
}

/// Whether an element is one that [`crate::langchain`] writes for a user.
fn begins_exchange(element: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(borrow, rename = "type")]
        kind: std::borrow::Cow<'a, str>,
    }
    // Nearly all elements are told without parsing them.
    match element.strip_prefix(br#"{"type": ""#) {
        Some(rest) if rest.starts_with(br#"human""#) => true,
        Some(rest) if rest.starts_with(br#"ai""#) || rest.starts_with(br#"tool""#) => false,
        _ => serde_json::from_slice::<Kind<'_>>(element).is_ok_and(|it| it.kind == "human"),
    }
}

/// When a session expires if a read now extends its life; `None` if there is no need.
pub fn extension(session: &Session, upkeep: &Upkeep, now_ms: UnixMillis) -> Option<UnixMillis> {
    let ttl_ms = session
        .lifetime_ms(upkeep)
        .filter(|_| upkeep.reads_extend)?;
    let extended_ms = tables::expiry_after(ttl_ms, now_ms)?;
    let gone_ms = extended_ms - session.expires_ms.unwrap_or(extended_ms);
    (gone_ms > ttl_ms / EXTEND_PART).then_some(extended_ms)
}

/// Extends the life of a session that was read.
pub fn touch(db: &Connection, key: &str, upkeep: &Upkeep, now_ms: UnixMillis) -> Result<()> {
    if let Some(session) = tables::session(db, key, now_ms)?
        && let Some(expires_ms) = extension(&session, upkeep, now_ms)
    {
        set_expiry(db, session.number, Some(expires_ms))?;
    }
    Ok(())
}

pub fn expire(db: &Connection, key: &str, at_ms: UnixMillis, now_ms: UnixMillis) -> Result<bool> {
    let Some(session) = tables::session(db, key, now_ms)? else {
        return Ok(false);
    };
    if session.expires_ms.is_none() && one(db, LAST, session.number)?.is_some() {
        set_expiry(db, session.number, Some(at_ms))?;
        return Ok(true);
    }
    Ok(session.expires_ms == Some(at_ms))
}

fn set_expiry(db: &Connection, session: i64, expires_ms: Option<UnixMillis>) -> Result<()> {
    let params = named_params! {":session": session, ":expires_ms": expires_ms};
    db.prepare_cached(TOUCH)?.execute(params)?;
    Ok(())
}

fn one(db: &Connection, statement: &str, session: i64) -> Result<Option<Sequence>> {
    let params = named_params! {":session": session};
    Ok(db
        .prepare_cached(statement)?
        .query_row(params, |row| row.get(0))?)
}

/// The greatest sequence of an element at or before a sequence.
pub fn floor(db: &Connection, session: i64, at: Sequence) -> Result<Option<Sequence>> {
    let params = named_params! {":session": session, ":at": at};
    Ok(db
        .prepare_cached(FLOOR)?
        .query_row(params, |row| row.get(0))?)
}

pub fn look(
    db: &Connection,
    key: &str,
    key_prefix: &str,
    look: Look,
    now_ms: UnixMillis,
) -> Result<Seen> {
    match tables::session(db, key, now_ms)? {
        Some(session) => see(db, session, key_prefix, look, now_ms),
        None => Ok(Seen::default()),
    }
}

fn see(
    db: &Connection,
    session: Session,
    key_prefix: &str,
    look: Look,
    now_ms: UnixMillis,
) -> Result<Seen> {
    let first = one(db, FIRST, session.number)?;
    let newest = one(db, LAST, session.number)?;
    let count = match (first, newest) {
        (Some(first), Some(newest)) => session.count.unwrap_or(newest - first + 1),
        _ => 0,
    };
    let metadata = match &session.metadata {
        Some(json) => serde_json::from_str(json).map_err(tables::corrupt)?,
        None => BTreeMap::new(),
    };
    let origin = session.origin.and_then(|origin| {
        let id = origin.key.strip_prefix(key_prefix)?;
        Some(Origin {
            session: SessionId::parse(id).ok()?,
            sequence: origin.sequence,
        })
    });
    Ok(Seen {
        count,
        first_sequence: first.unwrap_or(0),
        last_sequence: session.last_sequence,
        epoch: session.epoch,
        floor: floor(db, session.number, look.at)?.unwrap_or(0),
        about: About {
            title: session.title.unwrap_or_default(),
            metadata,
            ttl_ms: session.ttl_ms,
            origin,
        },
        expires_ms: session.expires_ms,
        active_ms: (session.active_ms > 0).then_some(session.active_ms),
        turn: turns::latest(db, session.number, look.with_request, now_ms)?,
    })
}

fn update(
    db: &Connection,
    key: &str,
    key_prefix: &str,
    update: &Update,
    upkeep: &Upkeep,
    now_ms: UnixMillis,
) -> Result<Option<Seen>> {
    let Some(mut session) = tables::session(db, key, now_ms)? else {
        return Ok(None);
    };
    if one(db, LAST, session.number)?.is_none() {
        return Ok(None);
    }
    if let Some(title) = &update.title {
        session.title = (!title.is_empty()).then(|| title.clone());
    }
    if let Some(ttl_ms) = update.ttl_ms {
        session.ttl_ms = ttl_ms;
        let lifetime_ms = session.lifetime_ms(upkeep);
        session.expires_ms = lifetime_ms.and_then(|ttl_ms| tables::expiry_after(ttl_ms, now_ms));
    }
    if let Some(metadata) = &update.metadata {
        session.metadata = describe(db, session.number, metadata, session.active_ms)?;
    }
    db.prepare_cached(DESCRIBE)?.execute(named_params! {
        ":session": session.number,
        ":title": session.title,
        ":metadata": session.metadata,
        ":ttl_ms": session.ttl_ms,
        ":expires_ms": session.expires_ms,
    })?;
    see(db, session, key_prefix, Look::default(), now_ms).map(Some)
}

/// Replaces the pairs by which a session is found. Returns them as `sessions.metadata` has them.
pub fn describe(
    db: &Connection,
    session: i64,
    metadata: &BTreeMap<String, String>,
    active_ms: UnixMillis,
) -> Result<Option<String>> {
    delete_pairs(db, session)?;
    let mut add_pair = db.prepare_cached(ADD_PAIR)?;
    for (name, value) in metadata {
        add_pair.execute((session, name, value, active_ms))?;
    }
    let json = serde_json::to_string(metadata).map_err(tables::corrupt)?;
    Ok((!metadata.is_empty()).then_some(json))
}

pub fn delete_pairs(db: &Connection, session: i64) -> Result<()> {
    let params = named_params! {":session": session};
    db.prepare_cached(DELETE_PAIRS)?.execute(params)?;
    Ok(())
}

fn rewind(db: &Connection, key: &str, rewind: &Rewind, now_ms: UnixMillis) -> Result<Rewound> {
    let session = match tables::session(db, key, now_ms)? {
        Some(session) => session,
        // The request is remembered all the same: a repeated one must not delete what came after it.
        None => {
            let forget_ms = now_ms.saturating_add(REQUEST_MEMORY_MS);
            tables::add_session(db, key, forget_ms, now_ms)?
        }
    };
    if let Some(done) = tables::remembered(db, session.number, &rewind.request, now_ms)? {
        let count = done.count as i64;
        return Ok(Rewound::Done { count });
    }
    let actual = session.last_sequence;
    if let Some(expected) = rewind.expected_last_sequence
        && expected != actual
    {
        return Err(Error::SequenceMismatch { expected, actual });
    }
    if let Some(running) = turns::running(db, session.number, now_ms)? {
        return Ok(Rewound::Busy {
            turn: running.turn,
            name: running.name,
        });
    }

    let number = session.number;
    let last_sequence = session.last_sequence;
    let params = named_params! {":session": number, ":after": rewind.after};
    // Counted before: what is left is then known without a walk over it.
    let had = see(db, session, "", Look::default(), now_ms)?.count;
    let count = db.prepare_cached(REWIND)?.execute(params)?;
    turns::rewind(db, number, rewind.after)?;
    db.prepare_cached(REWOUND)?.execute(named_params! {
        ":session": number,
        // Of those that go, some may have been given out by hand, and not been noted.
        ":last_sequence": last_sequence,
        ":count": had - count as i64,
        ":forget_ms": now_ms.saturating_add(match last_sequence {
            0 => REQUEST_MEMORY_MS,
            _ => TOMBSTONE_MS,
        }),
    })?;
    let done = Appended {
        first_sequence: rewind.after,
        count,
        time_ms: rewind.time_ms,
        repeated: false,
    };
    tables::remember(db, number, &rewind.request, &done, now_ms)?;
    Ok(Rewound::Done {
        count: count as i64,
    })
}

/// Where a walk over the list stands: after the session of this number, last active then.
#[derive(Clone, Copy)]
struct Place {
    active_ms: UnixMillis,
    number: i64,
}

impl Place {
    const TOP: Self = Self {
        active_ms: i64::MAX,
        number: i64::MAX,
    };

    /// One that says nothing begins a new walk.
    fn parse(cursor: &Cursor) -> Option<Self> {
        let (active_ms, number) = cursor.0.split_once(' ')?;
        Some(Self {
            active_ms: active_ms.parse().ok()?,
            number: number.parse().ok()?,
        })
    }

    fn cursor(self) -> Cursor {
        Cursor(format!("{} {}", self.active_ms, self.number))
    }
}

/// A session's place only ever rises, with each write: so a walk down the list meets it once at
/// most, and exactly once if nobody writes to it.
fn list(
    db: &Connection,
    list: &ListRecent,
    key_prefix: &str,
    now_ms: UnixMillis,
) -> Result<RecentPage> {
    let mut visit = Visit {
        db,
        list,
        key_prefix,
        key_begin: format!("{key_prefix}{}", list.prefix),
        now_ms,
        place: list
            .cursor
            .as_ref()
            .and_then(Place::parse)
            .unwrap_or(Place::TOP),
        looked_at: 0,
        found: Vec::new(),
    };
    let from = visit.place;
    let mut has_more = false;
    for part in 0..2 {
        let limit = (LOOKED_AT_MAX - visit.looked_at) as i64;
        let (active_ms, number) = (from.active_ms, from.number);
        let common = named_params! {
            ":active_ms": active_ms, ":number": number, ":limit": limit, ":now_ms": now_ms,
        };
        let is_all = match list.metadata.first_key_value() {
            None => {
                let mut statement = db.prepare_cached(RECENT[part])?;
                let mut rows = statement.query(common)?;
                visit.all(&mut rows)?
            }
            Some((name, value)) => {
                let mut statement = db.prepare_cached(RECENT_WITH[part])?;
                let both = [common, named_params! {":name": name, ":value": value}].concat();
                let mut rows = statement.query(&*both)?;
                visit.all(&mut rows)?
            }
        };
        has_more = !is_all || visit.looked_at == LOOKED_AT_MAX;
        if has_more {
            break;
        }
    }
    Ok(RecentPage {
        next: has_more.then(|| visit.place.cursor()),
        sessions: visit.found,
    })
}

/// One page's way down the list.
struct Visit<'a> {
    db: &'a Connection,
    list: &'a ListRecent,
    key_prefix: &'a str,
    /// What the keys of sessions begin with that are wanted.
    key_begin: String,
    now_ms: UnixMillis,
    /// Where it stands.
    place: Place,
    looked_at: usize,
    found: Vec<(SessionId, Seen)>,
}

impl Visit<'_> {
    /// Looks at rows until it has enough. Says whether it has looked at all.
    fn all(&mut self, rows: &mut Rows<'_>) -> Result<bool> {
        while let Some(row) = rows.next()? {
            self.one(row)?;
            if self.found.len() >= self.list.limit.max(1) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn one(&mut self, row: &Row<'_>) -> Result<()> {
        let session = Session::from_row(row)?;
        self.looked_at += 1;
        self.place = Place {
            active_ms: session.active_ms,
            number: session.number,
        };
        let is_alive: bool = row.get("is_alive")?;
        if !is_alive || !session.key.starts_with(&self.key_begin) {
            return Ok(());
        }
        // Other programs' keys may be no session's.
        let Ok(id) = SessionId::parse(&session.key[self.key_prefix.len()..]) else {
            return Ok(());
        };
        let seen = see(
            self.db,
            session,
            self.key_prefix,
            Look::default(),
            self.now_ms,
        )?;
        let has = |(name, value)| seen.about.metadata.get(name) == Some(value);
        if seen.count > 0 && self.list.metadata.iter().all(has) {
            self.found.push((id, seen));
        }
        Ok(())
    }
}

#[async_trait]
impl SessionStore for Sqlite {
    async fn look(&self, session: &SessionId, asked: Look) -> Result<Seen> {
        let key = self.key(session);
        let prefix = self.key_prefix.clone();
        let clock = self.shared.clock.clone();
        self.query(move |db| tables::in_snapshot(db, || look(db, &key, &prefix, asked, clock())))
            .await
    }

    async fn update_session(&self, session: &SessionId, asked: Update) -> Result<Option<Seen>> {
        let key = self.key(session);
        let prefix = self.key_prefix.clone();
        let upkeep = self.upkeep;
        self.write(0, move |db, now_ms| {
            update(db, &key, &prefix, &asked, &upkeep, now_ms)
        })
        .await
    }

    async fn list_sessions(&self, asked: ListRecent) -> Result<RecentPage> {
        let prefix = self.key_prefix.clone();
        let clock = self.shared.clock.clone();
        self.query(move |db| tables::in_snapshot(db, || list(db, &asked, &prefix, clock())))
            .await
    }

    /// Any number of times: [`Rewound::TooMany`] does not come.
    async fn rewind(&self, session: &SessionId, asked: Rewind) -> Result<Rewound> {
        let key = self.key(session);
        let is_done = |rewound: &Rewound| matches!(rewound, Rewound::Done { .. });
        let cleared = self.shared.cleared.clone();
        self.write_and_ring(session, is_done, 0, move |db, now_ms| {
            let rewound = rewind(db, &key, &asked, now_ms)?;
            if matches!(rewound, Rewound::Done { count: 1.. }) {
                cleared.store(true, Ordering::Relaxed);
            }
            Ok(rewound)
        })
        .await
    }

    async fn fork(&self, session: &SessionId, asked: Fork) -> Result<Forked> {
        fork::fork(self, session, &asked).await
    }

    fn bell(&self, session: &SessionId) -> Bell {
        let (bell, _) = self.shared.bells.hang(session);
        notice::start(self);
        bell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::tables::tests::plan;

    /// A statement that scanned a table, or sorted, would cost what is stored, not what is asked.
    #[test]
    fn every_statement_goes_by_an_index() {
        let statements = [
            FIRST,
            FLOOR,
            LAST,
            TOUCH,
            DESCRIBE,
            MOVE_PAIRS,
            DELETE_PAIRS,
            REWIND,
            REWOUND,
            OLDEST,
            TRIM,
            TRIMMED,
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

    /// Both parts of a place are looked up: many sessions may have one time.
    #[test]
    fn a_walk_over_the_list_begins_where_it_stands() {
        let sessions = "SEARCH sessions USING INDEX sessions_active";
        let pairs = "SEARCH session_pairs USING COVERING INDEX session_pairs_active";
        for (statement, range) in [
            (RECENT[0], format!("{sessions} (active_ms=? AND number<?)")),
            (RECENT[1], format!("{sessions} (active_ms<?)")),
            (
                RECENT_WITH[0],
                format!("{pairs} (name=? AND value=? AND active_ms=? AND session<?)"),
            ),
            (
                RECENT_WITH[1],
                format!("{pairs} (name=? AND value=? AND active_ms<?)"),
            ),
        ] {
            let steps = plan(statement);
            assert!(steps.contains(&range), "{steps:#?}");
            assert!(
                !steps.iter().any(|step| step.contains("TEMP B-TREE")),
                "{steps:#?}"
            );
        }
    }

    #[test]
    fn a_question_is_told_from_other_elements() {
        for (element, is_question) in [
            (r#"{"type": "human", "data": {}}"#, true),
            (r#"{"type":"human","data":{"content":"x"}}"#, true),
            (r#"{"data": {"type": "ai"}, "type": "\u0068uman"}"#, true),
            (r#"{"type": "ai", "data": {"type": "human"}}"#, false),
            (r#"{"data": {"type": "human"}}"#, false),
            (r#"{"type": 1}"#, false),
            ("human", false),
            ("", false),
        ] {
            assert_eq!(
                begins_exchange(element.as_bytes()),
                is_question,
                "{element}"
            );
        }
    }
}
