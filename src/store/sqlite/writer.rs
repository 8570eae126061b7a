//! The one thread that writes: takes what waits, runs it in one transaction, answers after the
//! commit. Then, and while nobody asks for anything, it tidies up: deletes what is too old, a step in
//! a transaction of its own, and empties the log of what was deleted. Knows transactions and their
//! failures; knows no tables but to prune them.
//!
//! # What a failed commit means
//!
//! SQLite appends a transaction to its log, the commit mark in the last frame, and then calls
//! fsync. "Full" is said when a frame could not be written whole: the mark is not there, so
//! nothing was stored. Any other I/O error of a COMMIT leaves the outcome open: the mark may be in
//! the log although fsync failed. This process goes on as if nothing had been stored, and its next
//! transaction overwrites those frames; but if it dies before, SQLite may find the mark and take
//! the transaction for stored. Errors before the COMMIT mean that nothing was stored.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{BUSY_MS_MAX, Shared, log, tables};
use crate::message::{SessionId, UnixMillis};
use crate::store::{Bells, Error, Result};

/// Jobs of one transaction, at most: bounds how long the first one waits for the others.
const BATCH_JOBS_MAX: usize = 512;
/// Bytes of the jobs of one transaction together, at most, except that one job always goes.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// How often what is too old is looked for.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// How far apart the log is emptied, at least. That takes two syncs and a write of each page in it, and
/// the next commits make the log grow again.
const EMPTY_INTERVAL: Duration = Duration::from_secs(3);
/// How long what is not for a caller waits for others' locks. Writes wait as long.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a job does: inside the transaction, at a moment. It may be done again in another one if the
/// first could not be committed.
pub type Work<T> = Box<dyn Fn(&Connection, UnixMillis) -> Result<T> + Send>;

/// A write that waits for its turn.
pub trait Job: Send {
    /// Its bytes, about.
    fn size(&self) -> usize;
    /// Takes it from its caller; false if that has given up on it, so that it must not run.
    fn claim(&self) -> bool;
    /// Does it, inside the transaction. After an error, what it did must be undone.
    fn run(&mut self, db: &Connection, now_ms: UnixMillis) -> Result<()>;
    /// The worker that its caller waits at.
    fn worker(&self) -> usize;
    /// Tells the caller how it went; `failure` if the transaction failed.
    fn answer(self: Box<Self>, failure: Option<Error>);
}

/// Who decides on a job: the writer, by beginning it, or the caller, by giving it up. Whoever comes
/// first.
#[derive(Clone, Default)]
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    /// Whether nobody had it before.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// A [`Job`] with a result of type `T`.
pub struct Task<T> {
    pub work: Work<T>,
    pub result: Option<Result<T>>,
    pub reply: oneshot::Sender<Result<T>>,
    pub claim: Claim,
    pub size: usize,
    /// Its place in the queue.
    pub room: OwnedSemaphorePermit,
    /// Whom to tell of it.
    pub ring: Option<Ring<T>>,
    /// Where its caller waits.
    pub worker: usize,
}

/// Whose bells ring after a job, and whether they do.
pub struct Ring<T> {
    pub bells: Bells,
    pub session: SessionId,
    pub is_change: fn(&T) -> bool,
}

impl<T: Send> Job for Task<T> {
    fn size(&self) -> usize {
        self.size
    }

    fn claim(&self) -> bool {
        self.claim.take()
    }

    fn worker(&self) -> usize {
        self.worker
    }

    fn run(&mut self, db: &Connection, now_ms: UnixMillis) -> Result<()> {
        let result = (self.work)(db, now_ms);
        let done = result.as_ref().map(|_| ()).map_err(Error::clone);
        self.result = Some(result);
        done
    }

    fn answer(self: Box<Self>, failure: Option<Error>) {
        // It may be stored also where the commit's outcome is unknown.
        if let Some(ring) = self.ring
            && let Some(Ok(done)) = &self.result
            && (ring.is_change)(done)
        {
            ring.bells.ring(&ring.session);
        }
        let not_run = || Err(Error::Unavailable("the write was not begun".to_owned()));
        let result = match failure {
            Some(error) => Err(error),
            None => self.result.unwrap_or_else(not_run),
        };
        // The room is given back first: whoever has the answer finds it free.
        drop(self.room);
        // A caller that is gone needs no answer.
        let _ = self.reply.send(result);
    }
}

/// The writer's state.
pub struct Writer {
    pub db: Connection,
    pub shared: Arc<Shared>,
    pub jobs: UnboundedReceiver<Box<dyn Job>>,
    /// Where answers are given; by the writing thread itself if there are none.
    pub workers: Vec<Handle>,
    /// When it last pruned; `None` if it did not, or left some.
    pub pruned_ms: Option<UnixMillis>,
    /// Whether the log is to be emptied: what was deleted is in there still, or its room is needed.
    pub log_is_stale: bool,
    /// When it last emptied the log, or tried to; `None` if it may at once.
    pub emptied: Option<Instant>,
}

/// Wakes the writing thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// How far a batch has come, for what a panic then means.
enum Stage {
    Open,
    Committing,
}

impl Writer {
    /// Works until the store is dropped and the queue is empty, or until it cannot go on.
    pub fn run(mut self) {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        while let Some(first) = self.next(&mut Context::from_waker(&waker)) {
            let mut batch = Vec::from_iter(first);
            let mut stage = Stage::Open;
            let caught = catch_unwind(AssertUnwindSafe(|| {
                if !batch.is_empty() {
                    self.write(&mut batch, &mut stage)?;
                }
                self.tidy()
            }));
            let fatal = match caught {
                Ok(Ok(())) => None,
                Ok(Err(fatal)) => Some(fatal),
                Err(_) => Some("the writing thread panicked".to_owned()),
            };
            if let Some(reason) = fatal {
                return self.stop(reason, batch, stage);
            }
        }
        // Readers go first: the last connection to close empties the log, and a reader cannot.
        self.shared.close_readers();
        if let Err(error) = self.db.close() {
            tracing::warn!(error = %error.1, "closing the database failed; the next start recovers");
        }
    }

    /// Waits for a job, or until there is something to tidy up. `None` when there will be no more jobs.
    fn next(&mut self, context: &mut Context<'_>) -> Option<Option<Box<dyn Job>>> {
        let end = Instant::now() + self.rest();
        loop {
            // What waits comes before what is too old.
            if let Poll::Ready(job) = self.jobs.poll_recv(context) {
                return job.map(Some);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(None);
            }
            thread::park_timeout(left);
        }
    }

    /// How long there is nothing to do but for callers.
    fn rest(&self) -> Duration {
        match (self.pruned_ms, self.emptied) {
            (None, _) => Duration::ZERO,
            (Some(_), Some(emptied)) if self.log_is_stale => {
                EMPTY_INTERVAL.saturating_sub(emptied.elapsed())
            }
            _ => PRUNE_INTERVAL,
        }
    }

    /// Fails what is queued and what will come.
    fn stop(self, reason: String, batch: Vec<Box<dyn Job>>, stage: Stage) {
        tracing::error!(reason, "the embedded store has stopped: restart the server");
        let Self {
            db,
            shared,
            mut jobs,
            ..
        } = self;
        shared.stop(reason.clone());
        // Rolls back.
        drop(db);
        jobs.close();
        for job in batch {
            job.answer(Some(match stage {
                Stage::Open => Error::Unavailable(reason.clone()),
                Stage::Committing => Error::OutcomeUnknown(reason.clone()),
            }));
        }
        while let Some(job) = jobs.blocking_recv() {
            job.answer(Some(Error::Unavailable(reason.clone())));
        }
    }

    /// Runs the batch and as much of what waits as fits, and answers all of it. An error is a
    /// reason why no later batch can succeed; the jobs are then still in `batch`.
    fn write(
        &mut self,
        batch: &mut Vec<Box<dyn Job>>,
        stage: &mut Stage,
    ) -> std::result::Result<(), String> {
        if !self.shared.held.is_in_place() {
            return Err("the database file was moved or deleted".to_owned());
        }
        // Waits while another program writes. No job is claimed before: whoever gives up now has
        // written nothing.
        let begun = self.execute("BEGIN IMMEDIATE");
        self.fill(batch);
        if let Err(error) = begun {
            self.answer(batch, Some(error.into()));
            return Ok(());
        }

        batch.retain(|job| job.claim());
        let failure = self.finish(batch, stage)?;
        if !matches!(failure, Some(Error::Full(_))) {
            self.answer(batch, failure);
            return Ok(());
        }
        // What is in the log may have room in the file.
        self.log_is_stale = true;
        // SQLite gives up a whole transaction for lack of room. One job may ask for more than
        // there is while the others do not.
        while !batch.is_empty() {
            *stage = Stage::Open;
            let failure = match self.execute("BEGIN IMMEDIATE") {
                Ok(()) => self.finish(&mut batch[..1], stage)?,
                Err(error) => Some(error.into()),
            };
            batch.remove(0).answer(failure);
        }
        Ok(())
    }

    /// Runs the jobs in the transaction that was begun, and commits it or rolls it back; says why
    /// it failed. An error is a reason why no later transaction can succeed.
    ///
    /// A savepoint around each job would take a sixth of its time, to be used next to never. So there
    /// is none at first; where a job would have to be undone, all are, and are run again with them.
    fn finish(
        &mut self,
        jobs: &mut [Box<dyn Job>],
        stage: &mut Stage,
    ) -> std::result::Result<Option<Error>, String> {
        let now_ms = (self.shared.clock)();
        let run = self.run_jobs(jobs, now_ms).and_then(|are_whole| {
            if !are_whole {
                self.execute("ROLLBACK")?;
                self.execute("BEGIN IMMEDIATE")?;
                self.run_jobs_apart(jobs, now_ms)?;
            }
            Ok(())
        });
        let done = run.and_then(|()| {
            *stage = Stage::Committing;
            self.commit()
        });
        self.end_transaction()?;
        Ok(done.err())
    }

    /// Rolls back what was not committed.
    fn end_transaction(&self) -> std::result::Result<(), String> {
        if self.db.is_autocommit() {
            return Ok(());
        }
        self.execute("ROLLBACK")
            .map_err(|error| format!("a transaction cannot be rolled back: {error}"))
    }

    /// Answers the batch, in one task of each worker: from this thread each answer would wake its
    /// worker by itself, and would go to its client in a packet of its own.
    fn answer(&self, batch: &mut Vec<Box<dyn Job>>, failure: Option<Error>) {
        let mut jobs = std::mem::take(batch);
        for (index, worker) in self.workers.iter().enumerate() {
            let is_of_worker = |job: &mut Box<dyn Job>| job.worker() == index;
            let answers = Answers {
                jobs: jobs.extract_if(.., is_of_worker).collect(),
                failure: failure.clone(),
            };
            // A runtime that has ended drops the task, and so gives the answers all the same.
            if !answers.jobs.is_empty() {
                worker.spawn(async move { drop(answers) });
            }
        }
        drop(Answers { jobs, failure });
    }

    fn fill(&mut self, batch: &mut Vec<Box<dyn Job>>) {
        let mut bytes: usize = batch.iter().map(|job| job.size()).sum();
        while batch.len() < BATCH_JOBS_MAX && bytes < BATCH_BYTES_MAX {
            let Ok(job) = self.jobs.try_recv() else {
                return;
            };
            bytes += job.size();
            batch.push(job);
        }
    }

    /// Runs the jobs. False if one failed that may have changed something, so that all of it is to
    /// be rolled back. An error is one of the whole transaction.
    fn run_jobs(&mut self, jobs: &mut [Box<dyn Job>], now_ms: UnixMillis) -> Result<bool> {
        for job in jobs {
            let changes = self.db.total_changes();
            if let Err(error) = job.run(&self.db, now_ms) {
                // A full disk, for one, can end the whole transaction.
                if self.db.is_autocommit() {
                    return Err(error);
                }
                // Half a statement is not counted.
                let is_of_sqlite = matches!(
                    error,
                    Error::Unavailable(_) | Error::Full(_) | Error::Corrupt(_)
                );
                if is_of_sqlite || self.db.total_changes() != changes {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Runs each job so that its failure is its own. An error is one of the whole transaction.
    fn run_jobs_apart(&mut self, jobs: &mut [Box<dyn Job>], now_ms: UnixMillis) -> Result<()> {
        for job in jobs {
            self.execute("SAVEPOINT job")?;
            if let Err(error) = job.run(&self.db, now_ms) {
                if self.db.is_autocommit() {
                    return Err(error);
                }
                self.execute("ROLLBACK TO job")?;
            }
            self.execute("RELEASE job")?;
        }
        Ok(())
    }

    /// Does a part of what nobody waits for, if it is time to. An error is a reason why no later
    /// transaction can succeed.
    fn tidy(&mut self) -> std::result::Result<(), String> {
        let now_ms = (self.shared.clock)();
        let is_recent = |pruned_ms: UnixMillis| {
            u128::from(now_ms.abs_diff(pruned_ms)) < PRUNE_INTERVAL.as_millis()
        };
        if !self.pruned_ms.is_some_and(is_recent) {
            self.prune(now_ms)?;
        }
        self.log_is_stale |= self.shared.cleared.swap(false, Ordering::Relaxed);
        let is_recent = |emptied: Instant| emptied.elapsed() < EMPTY_INTERVAL;
        if self.log_is_stale && !self.emptied.is_some_and(is_recent) {
            self.empty_log();
        }
        Ok(())
    }

    /// Deletes a part of what is too old. What fails is tried again when it is time to prune again.
    fn prune(&mut self, now_ms: UnixMillis) -> std::result::Result<(), String> {
        let pruned = self.with_patience(|| {
            self.execute("BEGIN IMMEDIATE")?;
            let changes = self.db.total_changes();
            let pruned = tables::prune(&self.db, now_ms)?;
            if self.db.total_changes() != changes {
                self.commit()?;
            }
            Ok(pruned)
        });
        self.end_transaction()?;
        match pruned {
            Ok(pruned) => {
                self.pruned_ms = (!pruned.has_more).then_some(now_ms);
                self.log_is_stale |= pruned.messages;
            }
            Err(error) => {
                tracing::warn!(%error, "what is too old could not be deleted; in a minute again");
                self.pruned_ms = Some(now_ms);
                // Perhaps for lack of room, which callers are to find: at once.
                self.log_is_stale = true;
                self.emptied = None;
            }
        }
        Ok(())
    }

    /// Takes the log into the file, and empties it. While others read what is older, that must wait.
    fn empty_log(&mut self) {
        let held_up = self.with_patience(|| {
            let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
            Ok(self.db.query_row(checkpoint, [], |row| row.get(0))?)
        });
        self.log_is_stale = held_up.unwrap_or_else(|error| {
            tracing::warn!(%error, "the log could not be emptied; soon again");
            true
        });
        self.emptied = Some(Instant::now());
    }

    /// Does what no caller waits for.
    fn with_patience<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.db.busy_timeout(PATIENCE)?;
        let done = work();
        self.db.busy_timeout(Duration::from_millis(BUSY_MS_MAX))?;
        done
    }

    fn commit(&self) -> Result<()> {
        match log::gathered(&self.db, || self.execute("COMMIT")) {
            Ok(()) => {
                self.shared.commits.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::SystemIoFailure) => {
                Err(Error::OutcomeUnknown(error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn execute(&self, sql: &str) -> rusqlite::Result<()> {
        self.db.prepare_cached(sql)?.execute([])?;
        Ok(())
    }
}

/// The jobs of a batch that are to be told how it went.
struct Answers {
    jobs: Vec<Box<dyn Job>>,
    failure: Option<Error>,
}

impl Drop for Answers {
    fn drop(&mut self) {
        for job in self.jobs.drain(..) {
            job.answer(self.failure.clone());
        }
    }
}
