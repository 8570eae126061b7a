//! What bells are to ring for that the writing thread does not see: writes of other programs, and
//! sessions that expire. Looks every two seconds while there are bells, through the writing thread:
//! on its connection SQLite counts exactly what others have committed.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, named_params};
use tokio::runtime::Handle;
use tokio::sync::mpsc::WeakUnboundedSender;
use tokio::sync::{Semaphore, oneshot};

use super::writer::{Claim, Job, Task};
use super::{JOB_BYTES, Sqlite};
use crate::message::{SessionId, UnixMillis};
use crate::store::sessions::NOTICED_WITHIN_MS;
use crate::store::{Bells, Result};
use crate::workers;

/// How often to look; with what a look may take, it stays below [`NOTICED_WITHIN_MS`].
const EVERY: Duration = Duration::from_millis(NOTICED_WITHIN_MS * 2 / 5);

const EXPIRED_SINCE: &str = "
    SELECT key FROM sessions WHERE expires_ms > :from_ms AND expires_ms <= :now_ms";

/// What was seen at a look.
struct Noticed {
    /// Changes whenever somebody else has committed something.
    version: i64,
    at_ms: UnixMillis,
    /// Keys of sessions that have expired since the look before.
    expired: Vec<String>,
}

/// Has somebody look, if nobody does. There is nothing to look at without a writing thread, and no
/// way to without a runtime.
pub fn start(store: &Sqlite) {
    let (Some(jobs), Ok(runtime)) = (&store.jobs, Handle::try_current()) else {
        return;
    };
    let mut looking = store
        .looking
        .lock()
        .unwrap_or_else(|held| held.into_inner());
    if looking
        .as_ref()
        .is_some_and(|looking| !looking.is_finished())
    {
        return;
    }
    let look = Look {
        bells: store.shared.bells.clone(),
        jobs: jobs.downgrade(),
        room: store.room.clone(),
        key_prefix: store.key_prefix.clone(),
    };
    *looking = Some(runtime.spawn(look.run()));
}

struct Look {
    bells: Bells,
    /// Does not keep the writing thread.
    jobs: WeakUnboundedSender<Box<dyn Job>>,
    room: Arc<Semaphore>,
    key_prefix: String,
}

impl Look {
    /// Until the store is dropped.
    async fn run(self) {
        // `None` at first and after a failure: then it is not known what has changed.
        let mut before: Option<(i64, UnixMillis)> = None;
        while self.jobs.strong_count() > 0 {
            if !self.bells.is_empty() {
                before = self.look(before).await;
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn look(&self, before: Option<(i64, UnixMillis)>) -> Option<(i64, UnixMillis)> {
        let noticed = self.ask(before.map(|(_, at_ms)| at_ms)).await?;
        match before {
            Some((version, _)) if version == noticed.version => {
                for key in &noticed.expired {
                    let id = key.strip_prefix(&self.key_prefix).map(SessionId::parse);
                    if let Some(Ok(session)) = id {
                        self.bells.ring(&session);
                    }
                }
            }
            _ => self.bells.ring_all(),
        }
        Some((noticed.version, noticed.at_ms))
    }

    /// `None` if that cannot be said now.
    async fn ask(&self, from_ms: Option<UnixMillis>) -> Option<Noticed> {
        let room = self.room.clone();
        let room = room.acquire_many_owned(JOB_BYTES as u32).await.ok()?;
        let (reply, answer) = oneshot::channel();
        let task = Task {
            work: Box::new(move |db, now_ms| notice(db, from_ms, now_ms)),
            result: None,
            reply,
            claim: Claim::default(),
            size: JOB_BYTES,
            room,
            ring: None,
            worker: workers::index(),
        };
        self.jobs.upgrade()?.send(Box::new(task)).ok()?;
        answer.await.ok()?.ok()
    }
}

fn notice(db: &Connection, from_ms: Option<UnixMillis>, now_ms: UnixMillis) -> Result<Noticed> {
    let version = db
        .prepare_cached("PRAGMA data_version")?
        .query_row([], |row| row.get(0))?;
    let mut expired = db.prepare_cached(EXPIRED_SINCE)?;
    let params = named_params! {":from_ms": from_ms.unwrap_or(now_ms), ":now_ms": now_ms};
    let expired = expired.query_map(params, |row| row.get(0))?;
    Ok(Noticed {
        version,
        at_ms: now_ms,
        expired: expired.collect::<rusqlite::Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::tables::tests::plan;

    #[test]
    fn what_has_expired_is_found_by_an_index() {
        let steps = plan(EXPIRED_SINCE);
        let range = "SEARCH sessions USING INDEX sessions_expires (expires_ms>? AND expires_ms<?)";
        assert!(steps.iter().any(|step| step == range), "{steps:#?}");
    }
}
