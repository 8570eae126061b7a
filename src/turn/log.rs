//! The way of a turn's events to its client: the turn writes without ever waiting, the client
//! takes at its own pace.
//!
//! What a client has not taken yet is held in memory: an answer's worth at most, since pieces that
//! wait are joined.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::collections::VecDeque;

use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Delta, Event};
use crate::error::Error;

/// Events that wait before further pieces of text are joined to the last one.
const SEPARATE_EVENTS_MAX: usize = 64;

#[derive(Default)]
struct State {
    waiting: VecDeque<Event>,
    /// How many events the follower has taken.
    taken: i64,
    storing: bool,
    end: Option<Result<(), Error>>,
}

struct Log {
    state: Mutex<State>,
    changed: Notify,
    abandoned: CancellationToken,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn's end of the log.
pub(super) struct Writer(Arc<Log>);

/// The client's end of the log: the events of a turn, from the first on.
pub struct Follower {
    log: Arc<Log>,
    /// Tells the turn when the client has left.
    _abandons: DropGuard,
}

pub(super) fn new() -> (Writer, Follower) {
    let abandoned = CancellationToken::new();
    let log = Arc::new(Log {
        state: Mutex::default(),
        changed: Notify::new(),
        abandoned: abandoned.clone(),
    });
    let follower = Follower {
        log: Arc::clone(&log),
        _abandons: abandoned.drop_guard(),
    };
    (Writer(log), follower)
}

impl Writer {
    pub fn push(&self, event: Event) {
        if self.0.abandoned.is_cancelled() {
            return;
        }
        let mut state = self.0.state();
        let crowded = state.waiting.len() >= SEPARATE_EVENTS_MAX;
        match (state.waiting.back_mut(), event) {
            (Some(Event::Delta(last)), Event::Delta(delta)) if crowded => join(last, delta),
            (_, event) => state.waiting.push_back(event),
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// Ends the log, with a last event or with an error.
    pub fn end(&self, outcome: Result<Option<Event>, Error>) {
        let mut state = self.0.state();
        let end = outcome.map(|event| state.waiting.extend(event));
        state.end = Some(end);
        drop(state);
        self.0.changed.notify_one();
    }

    /// Notes that the turn is being written to the store.
    pub fn storing(&self) {
        self.0.state().storing = true;
    }

    pub fn is_storing(&self) -> bool {
        self.0.state().storing
    }

    /// Waits until the client has left.
    pub async fn abandoned(&self) {
        self.0.abandoned.cancelled().await;
    }
}

impl Drop for Writer {
    /// A turn that panicked must not leave its client waiting.
    fn drop(&mut self) {
        if self.0.state().end.is_none() {
            self.end(Err(Error::Internal));
        }
    }
}

impl Follower {
    /// The next event with its number, which counts from 1; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<(i64, Event), Error>> {
        loop {
            {
                let mut state = self.log.state();
                if let Some(event) = state.waiting.pop_front() {
                    state.taken += 1;
                    return Some(Ok((state.taken, event)));
                }
                match &mut state.end {
                    None => {}
                    Some(end) => return std::mem::replace(end, Ok(())).err().map(Err),
                }
            }
            self.log.changed.notified().await;
        }
    }
}

fn join(last: &mut Delta, delta: Delta) {
    last.text.push_str(&delta.text);
    last.reasoning.push_str(&delta.reasoning);
    for call in delta.tool_calls {
        let known = last
            .tool_calls
            .iter_mut()
            .find(|known| known.index == call.index);
        match known {
            Some(known) => known.arguments.push_str(&call.arguments),
            None => last.tool_calls.push(call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Event {
        Event::Delta(Delta {
            text: text.to_owned(),
            ..Delta::default()
        })
    }

    #[tokio::test]
    async fn events_come_in_order_and_then_the_end() {
        let (writer, mut follower) = new();
        writer.push(text("a"));
        assert_eq!(follower.next().await, Some(Ok((1, text("a")))));
        writer.push(text("b"));
        writer.end(Err(Error::ShuttingDown));
        assert_eq!(follower.next().await, Some(Ok((2, text("b")))));
        assert_eq!(follower.next().await, Some(Err(Error::ShuttingDown)));
        assert_eq!(follower.next().await, None);
    }

    #[tokio::test]
    async fn what_a_slow_client_has_not_taken_is_joined_and_nothing_is_lost() {
        let (writer, mut follower) = new();
        for _ in 0..100_000 {
            writer.push(text("x"));
        }
        assert_eq!(writer.0.state().waiting.len(), SEPARATE_EVENTS_MAX);
        writer.end(Ok(None));
        let (mut length, mut last_number) = (0, 0);
        while let Some(event) = follower.next().await {
            let (number, event) = event.unwrap();
            assert_eq!(number, last_number + 1);
            last_number = number;
            if let Event::Delta(delta) = event {
                length += delta.text.len();
            }
        }
        assert_eq!(length, 100_000);
    }

    #[tokio::test]
    async fn a_turn_that_vanishes_ends_its_log_with_an_error() {
        let (writer, mut follower) = new();
        drop(writer);
        assert_eq!(follower.next().await, Some(Err(Error::Internal)));
    }
}
