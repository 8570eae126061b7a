//! The threads that serve calls. Each has a runtime of its own, and serves the connections that it is
//! given. Knows nothing of what is served.
//!
//! A call is read, asks the store, and is answered on one thread, by connections that this thread
//! alone looks after. On a runtime of many threads, the parts of a call wake one thread after another,
//! which costs more than what they do (`docs/benchmarks.md`).

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

/// How long a thread waits at its end for work that cannot be interrupted.
const END_LIMIT: Duration = Duration::from_millis(200);

/// How often a worker wakes with nothing to do.
const TICK: Duration = Duration::from_secs(4);

thread_local! {
    static INDEX: Cell<usize> = const { Cell::new(0) };
}

/// Which worker this thread is, from 0 on. 0 also where it is none.
pub fn index() -> usize {
    INDEX.get()
}

/// How many workers are worth having on so many cores: one more, so that there is one to run while
/// another waits for the core that it ran on before.
pub fn count_for(cores: usize) -> usize {
    cores + 1
}

/// Asks the kernel for throughput, for this thread and those that it starts: who is woken waits for a
/// turn on its core, in place of taking it at once from a client or from Redis, which would have gone on
/// to the next call (`docs/benchmarks.md`). A policy that was chosen for the process stays as it is.
pub fn take_turns() -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let (mut policy, mut parameters) = (0, libc::sched_param { sched_priority: 0 });
        // SAFETY: both are given what they ask for, and keep nothing of it.
        let code = unsafe {
            let this = libc::pthread_self();
            match libc::pthread_getschedparam(this, &mut policy, &mut parameters) {
                0 if policy == libc::SCHED_OTHER => {
                    libc::pthread_setschedparam(this, libc::SCHED_BATCH, &parameters)
                }
                code => code,
            }
        };
        if code != 0 {
            return Err(io::Error::from_raw_os_error(code));
        }
    }
    Ok(())
}

/// A runtime of one thread.
pub fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Sets a timer, again and again. A runtime wakes itself, by a system call, for each timer that is due
/// before all those that it had when it last slept, and so for the time limit of each write to the file if
/// it had none. That limit is longer than this.
async fn tick() {
    loop {
        tokio::time::sleep(TICK).await;
    }
}

/// The workers of a server. When they are dropped, their threads end.
pub struct Workers {
    handles: Vec<Handle>,
    /// One for each worker, and one for each connection that it has.
    places: Vec<Arc<()>>,
    stop: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

/// A connection's place at a worker, for as long as it is kept.
pub struct Place {
    pub worker: usize,
    _counted: Arc<()>,
}

impl Workers {
    /// Starts so many, at least one: the first is the runtime that this is called within.
    pub fn start(count: usize) -> io::Result<Self> {
        let mut workers = Self {
            handles: vec![Handle::current()],
            places: (0..count.max(1)).map(|_| Arc::default()).collect(),
            stop: CancellationToken::new(),
            threads: Vec::new(),
        };
        for index in 1..count {
            let runtime = runtime()?;
            workers.handles.push(runtime.handle().clone());
            let stopped = workers.stop.clone();
            let thread = thread::Builder::new().name(format!("worker-{index}"));
            workers.threads.push(thread.spawn(move || {
                INDEX.set(index);
                runtime.block_on(stopped.cancelled());
                runtime.shutdown_timeout(END_LIMIT);
            })?);
        }
        for worker in &workers.handles {
            worker.spawn(tick());
        }
        Ok(workers)
    }

    /// The workers' runtimes.
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }

    /// A place for a connection, where there are fewest. Calls are not looked at: one that is open is
    /// taken to be used.
    pub fn place(&self) -> Place {
        let places = self.places.iter().enumerate();
        let fewest = places.min_by_key(|(_, counted)| Arc::strong_count(counted));
        let (worker, counted) = fewest.expect("there is at least one worker");
        Place {
            worker,
            _counted: Arc::clone(counted),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_worker_is_a_thread_that_knows_its_number_and_the_first_is_this_one() {
        let workers = Workers::start(3).unwrap();
        let this = thread::current().id();
        let mut seen = Vec::new();
        for handle in workers.handles() {
            let task = handle.spawn(async { (index(), thread::current().id()) });
            seen.push(task.await.unwrap());
        }
        assert_eq!(
            seen.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert_eq!(seen[0].1, this);
        assert!(seen[1].1 != this && seen[2].1 != this && seen[1].1 != seen[2].1);
    }

    #[tokio::test]
    async fn connections_go_where_there_are_fewest() {
        let workers = Workers::start(3).unwrap();
        let mut places: Vec<_> = (0..6).map(|_| workers.place()).collect();
        let of = |places: &[Place]| places.iter().map(|place| place.worker).collect::<Vec<_>>();
        assert_eq!(of(&places), [0, 1, 2, 0, 1, 2]);
        // Those of the second worker close.
        places.retain(|place| place.worker != 1);
        places.extend((0..3).map(|_| workers.place()));
        assert_eq!(of(&places[4..]), [1, 1, 0]);
    }

    #[tokio::test]
    async fn work_ends_with_the_workers() {
        let workers = Workers::start(2).unwrap();
        let task = workers.handles()[1].spawn(std::future::pending::<()>());
        drop(workers);
        assert!(task.await.unwrap_err().is_cancelled());
    }
}
