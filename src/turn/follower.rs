//! Reads the events of a turn: from the memory of this server while the turn runs here, from the
//! store otherwise. Changes between the two as often as need be; gives each event once.

use std::{collections::VecDeque, future::poll_fn, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    Call, Held, Turns,
    events::{self, Completed, Event},
    log::{End, Found},
    outcome,
};
use crate::{
    error::Error,
    message::SessionId,
    metrics,
    store::{
        self,
        turns::{FollowTurn, TurnId, TurnState},
    },
};

/// How often the store is asked for news of a turn that runs elsewhere.
const POLL: Duration = Duration::from_millis(100);
/// Bytes of a log that are read at a time.
const READ_BYTES_MAX: usize = 64 << 10;

/// The events of a turn, after those already taken.
pub struct Follower {
    turns: Turns,
    session: SessionId,
    turn: TurnId,
    /// The number of the last event that was taken.
    taken: i64,
    source: Source,
    /// The next chunk to read from the store.
    chunk: u32,
    _counted: metrics::Lasting,
}

enum Source {
    Here(Attached),
    Store {
        events: VecDeque<(i64, Event)>,
    },
    /// All was said.
    Done,
}

/// Counts a follower among those of the turn. While there is one, `on_disconnect: STOP` does not stop
/// it.
struct Attached(Arc<Held>);

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.followers.send_modify(|count| *count -= 1);
    }
}

impl Follower {
    pub(super) fn here(turns: Turns, held: Arc<Held>, taken: i64) -> Self {
        Self {
            session: held.session.clone(),
            turn: held.turn,
            turns,
            taken,
            source: attach(held),
            chunk: 0,
            _counted: metrics::turn_followed(),
        }
    }

    pub(super) fn stored(turns: Turns, call: &Call) -> Self {
        Self {
            turns,
            session: call.session.clone(),
            turn: call.key.id,
            taken: call.resume_after,
            source: read_store(),
            chunk: 0,
            _counted: metrics::turn_followed(),
        }
    }

    /// The next event with its number; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<(i64, Event), Error>> {
        let next = self.find().await.transpose()?;
        match &next {
            Ok((number, Event::Completed(_))) => {
                self.taken = *number;
                self.source = Source::Done;
            }
            Ok((number, _)) => self.taken = *number,
            Err(_) => self.source = Source::Done,
        }
        Some(next)
    }

    async fn find(&mut self) -> Result<Option<(i64, Event)>, Error> {
        loop {
            match &mut self.source {
                Source::Here(Attached(held)) => {
                    match poll_fn(|context| held.log.poll_after(self.taken, context)).await {
                        Found::Event(number, event) => return Ok(Some((number, event))),
                        Found::Older | Found::End(End::Moved) => self.source = read_store(),
                        Found::End(End::Failed(error)) => return Err(error),
                        Found::End(End::Completed { number, completed }) => {
                            return Ok(self.last(number, *completed));
                        }
                    }
                }
                Source::Store { events } => match events.pop_front() {
                    Some((number, event)) if number > self.taken => {
                        return Ok(Some((number, event)));
                    }
                    Some(_) => {}
                    None => {
                        if let Some(last) = self.read().await? {
                            return Ok(last);
                        }
                    }
                },
                Source::Done => return Ok(None),
            }
        }
    }

    fn last(&mut self, number: i64, completed: Completed) -> Option<(i64, Event)> {
        if number <= self.taken {
            self.source = Source::Done;
            return None;
        }
        Some((number, Event::Completed(completed)))
    }

    /// Reads more from the store. `Some` is the end of the events.
    async fn read(&mut self) -> Result<Option<Option<(i64, Event)>>, Error> {
        let held = self.turns.held(&self.session, &self.turn);
        if let Some(held) = held.filter(|held| held.log.has(self.taken)) {
            self.source = attach(held);
            return Ok(None);
        }
        let follow = FollowTurn {
            turn: self.turn,
            from_chunk: self.chunk,
            bytes_max: READ_BYTES_MAX,
            is_noted: true,
        };
        let store = self.turns.store();
        let found = store.follow_turn(&self.session, follow).await?;
        let found = found.ok_or(store::Error::Cleared)?;
        self.chunk = found.next_chunk;
        if !found.chunks.is_empty() || found.more {
            let mut read = VecDeque::new();
            for chunk in &found.chunks {
                read.extend(events::read_chunk(chunk)?);
            }
            self.source = Source::Store { events: read };
            return Ok(None);
        }
        match found.state {
            TurnState::Running { is_expired } => {
                if is_expired {
                    self.turns.adopt(&self.session, self.turn).await?;
                }
                sleep(POLL).await;
                Ok(None)
            }
            TurnState::Completed { appended, outcome } => {
                let outcome: events::Outcome = outcome::read(&outcome)?;
                let stored = self.turns.stored(&self.session, appended).await?;
                let completed = Completed {
                    messages: stored,
                    usage: outcome.usage,
                    finish_reason: outcome.finish_reason,
                };
                Ok(Some(self.last(outcome.event_number, completed)))
            }
            TurnState::Failed { outcome } => {
                Err(Error::Recorded(Box::new(outcome::read(&outcome)?)))
            }
        }
    }
}

fn attach(held: Arc<Held>) -> Source {
    held.followers.send_modify(|count| *count += 1);
    Source::Here(Attached(held))
}

fn read_store() -> Source {
    Source::Store {
        events: VecDeque::new(),
    }
}
