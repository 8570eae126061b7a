//! Forks: a session's elements are copied into a hidden row, a few hundred to a job, so that other
//! writes go in between; the last job gives that row its key. A hidden row that nobody goes on with
//! is deleted like a session that has expired.

use rusqlite::{Connection, named_params};

use super::tables::{self, HIDDEN, Session};
use super::{Sqlite, sessions, turns};
use crate::message::{SessionId, UnixMillis};
use crate::store::sessions::{FORK_STEP, Fork, Forked, Look, Upkeep};
use crate::store::{Epoch, Result, Sequence};

/// How long a hidden row stays after its last step. Longer than any two steps are apart.
const HIDDEN_MS: i64 = 60 * 60 * 1000;
/// Bytes that one step copies, at most, except that one element always is. A step is in the way of
/// other writes.
const STEP_BYTES_MAX: usize = 4 << 20;

const ADD_HIDDEN: &str = "
    INSERT INTO sessions (key, last_sequence, expires_ms, forget_ms)
    VALUES (:key, 0, :expires_ms, 9223372036854775807)";

const STEP: &str = "
    SELECT sequence, element FROM messages
    WHERE session = :session AND sequence > :after AND sequence <= :end
    ORDER BY sequence LIMIT :limit";

const ADD_MESSAGE: &str = "
    INSERT INTO messages (session, sequence, element) VALUES (?1, ?2, ?3)";

const KEEP_HIDDEN: &str = "UPDATE sessions SET expires_ms = :expires_ms WHERE number = :session";

const HAS: &str = "SELECT 1 FROM messages WHERE session = :session AND sequence = :sequence";

const HAS_ANY: &str = "SELECT 1 FROM messages WHERE session = :session LIMIT 1";

const MOVE_REQUESTS: &str = "UPDATE requests SET session = :to WHERE session = :session";

const DELETE_SESSION: &str = "DELETE FROM sessions WHERE number = :session";

const SHOW: &str = "
    UPDATE sessions SET key = :key, last_sequence = :last_sequence, epoch = :epoch,
        forget_ms = NULL, active_ms = :now_ms, expires_ms = :expires_ms, title = :title,
        metadata = :metadata, origin = :origin, origin_sequence = :origin_sequence,
        origin_through = :origin_through
    WHERE number = :session";

/// Has what servers that had the file before left of forks be deleted.
pub const END_FORKS: &str = "
    UPDATE sessions SET expires_ms = 0
    WHERE key >= char(1) AND key < char(2) AND expires_ms > 0";

/// What is copied, and how far it is.
#[derive(Clone, Copy)]
struct Copy {
    /// The row to copy, and the epoch it had.
    from: i64,
    epoch: Epoch,
    /// The last sequence to copy.
    end: Sequence,
    /// The last sequence that was copied; 0 at first.
    copied: Sequence,
    /// The hidden row.
    to: i64,
    /// The last sequence in there.
    last: Sequence,
    /// The last sequence of the new session when the copy began: it may have been cleared, and its
    /// sequences are not given twice.
    base: Sequence,
}

/// How it goes on.
enum Next {
    Copy(Copy),
    Ended(Forked),
}

/// What all steps of a fork have in common.
#[derive(Clone)]
struct Plan {
    from: String,
    to: String,
    through: Option<Sequence>,
    key_prefix: String,
    upkeep: Upkeep,
}

pub async fn fork(store: &Sqlite, session: &SessionId, asked: &Fork) -> Result<Forked> {
    let plan = Plan {
        from: store.key(session),
        to: store.key(&asked.to),
        through: asked.through,
        key_prefix: store.key_prefix.clone(),
        upkeep: store.upkeep,
    };
    let is_done = |next: &Next| matches!(next, Next::Ended(Forked::Done(_)));
    let begin = {
        let plan = plan.clone();
        move |db: &Connection, now_ms| begin(db, &plan, now_ms)
    };
    let mut next = store.write(0, begin).await?;
    loop {
        match next {
            Next::Ended(forked) => return Ok(forked),
            Next::Copy(copy) => {
                let step = {
                    let plan = plan.clone();
                    move |db: &Connection, now_ms| step(db, &plan, copy, now_ms)
                };
                let to = &asked.to;
                next = store
                    .write_and_ring(to, is_done, STEP_BYTES_MAX, step)
                    .await?;
            }
        }
    }
}

/// Why the new session cannot be made; [`Forked::Done`] if it was.
fn obstacle(
    db: &Connection,
    plan: &Plan,
    found: Option<&Session>,
    now_ms: UnixMillis,
) -> Result<Option<Forked>> {
    let Some(session) = found else {
        return Ok(None);
    };
    let params = named_params! {":session": session.number};
    let has_elements = db.prepare_cached(HAS_ANY)?.exists(params)?;
    if !has_elements {
        let running = turns::running(db, session.number, now_ms)?;
        return Ok(running.map(|_| Forked::Exists));
    }
    let is_it = session
        .origin
        .as_ref()
        .is_some_and(|origin| origin.key == plan.from && origin.through == plan.through);
    if !is_it {
        return Ok(Some(Forked::Exists));
    }
    let seen = sessions::look(db, &plan.to, &plan.key_prefix, Look::default(), now_ms)?;
    Ok(Some(Forked::Done(Box::new(seen))))
}

fn begin(db: &Connection, plan: &Plan, now_ms: UnixMillis) -> Result<Next> {
    let to = tables::session(db, &plan.to, now_ms)?;
    if let Some(ended) = obstacle(db, plan, to.as_ref(), now_ms)? {
        return Ok(Next::Ended(ended));
    }
    let Some(from) = tables::session(db, &plan.from, now_ms)? else {
        return Ok(Next::Ended(Forked::Empty));
    };
    let through = plan.through.unwrap_or(Sequence::MAX);
    let Some(end) = sessions::floor(db, from.number, through)? else {
        return Ok(Next::Ended(Forked::Empty));
    };
    let base = to.map_or(0, |to| to.last_sequence);
    let key = format!("{HIDDEN}fork {:032x}", rand::random::<u128>());
    let params = named_params! {":key": key, ":expires_ms": now_ms.saturating_add(HIDDEN_MS)};
    let hidden = db.prepare_cached(ADD_HIDDEN)?.insert(params)?;
    Ok(Next::Copy(Copy {
        from: from.number,
        epoch: from.epoch,
        end,
        copied: 0,
        to: hidden,
        last: base,
        base,
    }))
}

/// Gives a fork up.
fn drop_copy(db: &Connection, copy: &Copy, ended: Forked) -> Result<Next> {
    let params = named_params! {":session": copy.to, ":expires_ms": 0};
    db.prepare_cached(KEEP_HIDDEN)?.execute(params)?;
    Ok(Next::Ended(ended))
}

fn step(db: &Connection, plan: &Plan, mut copy: Copy, now_ms: UnixMillis) -> Result<Next> {
    let from = tables::session(db, &plan.from, now_ms)?;
    let has = |sequence: Sequence| -> Result<bool> {
        let params = named_params! {":session": copy.from, ":sequence": sequence};
        Ok(db.prepare_cached(HAS)?.exists(params)?)
    };
    // A rewind takes the last one with it, trimming those that were copied last.
    let unchanged = from.filter(|from| (from.number, from.epoch) == (copy.from, copy.epoch));
    let from = match unchanged {
        Some(from) if has(copy.end)? && (copy.copied == 0 || has(copy.copied)?) => from,
        _ => return drop_copy(db, &copy, Forked::Changed),
    };

    let mut statement = db.prepare_cached(STEP)?;
    let mut rows = statement.query(named_params! {
        ":session": copy.from,
        ":after": copy.copied,
        ":end": copy.end,
        ":limit": FORK_STEP as i64,
    })?;
    let mut add_message = db.prepare_cached(ADD_MESSAGE)?;
    let mut bytes = 0;
    while bytes < STEP_BYTES_MAX
        && let Some(row) = rows.next()?
    {
        let element = row.get_ref(1)?.as_blob().map_err(tables::corrupt)?;
        copy.last += 1;
        add_message.execute((copy.to, copy.last, element))?;
        copy.copied = row.get(0)?;
        bytes += element.len();
    }
    drop(rows);
    if copy.copied < copy.end {
        let expires_ms = now_ms.saturating_add(HIDDEN_MS);
        let params = named_params! {":session": copy.to, ":expires_ms": expires_ms};
        db.prepare_cached(KEEP_HIDDEN)?.execute(params)?;
        return Ok(Next::Copy(copy));
    }
    show(db, plan, &copy, &from, now_ms)
}

/// Gives the copy, which is whole, its key.
fn show(
    db: &Connection,
    plan: &Plan,
    copy: &Copy,
    from: &Session,
    now_ms: UnixMillis,
) -> Result<Next> {
    let to = tables::session(db, &plan.to, now_ms)?;
    if let Some(ended) = obstacle(db, plan, to.as_ref(), now_ms)? {
        return drop_copy(db, copy, ended);
    }
    let epoch = to.as_ref().map_or(Epoch(0), |to| to.epoch);
    let last = to.as_ref().map_or(0, |to| to.last_sequence);
    if last != copy.base {
        // It was written to and cleared meanwhile, or has expired.
        return drop_copy(db, copy, Forked::Exists);
    }
    match to {
        // What is remembered of the new session stays: it only gets another row.
        Some(to) => {
            turns::give(db, to.number, copy.to)?;
            let params = named_params! {":session": to.number, ":to": copy.to};
            db.prepare_cached(MOVE_REQUESTS)?.execute(params)?;
            let params = named_params! {":session": to.number};
            db.prepare_cached(DELETE_SESSION)?.execute(params)?;
        }
        None => tables::hide(db, &plan.to)?,
    }
    let metadata = match &from.metadata {
        Some(json) => {
            let pairs = serde_json::from_str(json).map_err(tables::corrupt)?;
            sessions::describe(db, copy.to, &pairs, now_ms)?
        }
        None => None,
    };
    let lifetime_ms = plan.upkeep.ttl_ms;
    db.prepare_cached(SHOW)?.execute(named_params! {
        ":session": copy.to,
        ":key": plan.to,
        ":last_sequence": copy.last,
        ":epoch": epoch.0,
        ":now_ms": now_ms,
        ":expires_ms": lifetime_ms.and_then(|ttl_ms| tables::expiry_after(ttl_ms, now_ms)),
        ":title": from.title,
        ":metadata": metadata,
        ":origin": plan.from,
        ":origin_sequence": copy.end,
        ":origin_through": plan.through,
    })?;
    let seen = sessions::look(db, &plan.to, &plan.key_prefix, Look::default(), now_ms)?;
    Ok(Next::Ended(Forked::Done(Box::new(seen))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::tables::tests::plan;

    #[test]
    fn every_statement_goes_by_an_index() {
        for statement in [
            STEP,
            KEEP_HIDDEN,
            HAS,
            HAS_ANY,
            MOVE_REQUESTS,
            DELETE_SESSION,
            SHOW,
            END_FORKS,
        ] {
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
}
