//! The newest part of a running turn's log, in memory: the turn writes without ever waiting, any
//! number of followers read at their own pace, and what is older is in the store. Does no I/O.
//!
//! A follower holds no events, only the number of the last one it took: a slow one costs nothing.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use super::events::{self, Completed, Delta, Event, Line};
use crate::{error::Error, store::turns::Chunk};

/// Events that stay here for followers that are a little behind, once they are in the store.
const RECENT_MAX: usize = 128;

/// How a log has ended.
#[derive(Debug, Clone)]
pub enum End {
    /// The turn is stored.
    Completed {
        number: i64,
        completed: Box<Completed>,
    },
    /// It ended otherwise.
    Failed(Error),
    /// It goes on elsewhere, or its record says how it ended.
    Moved,
}

/// What a follower finds.
pub enum Found {
    Event(i64, Event),
    /// The event is in the store only.
    Older,
    End(End),
}

struct State {
    /// Events that are here. The last one has the number `next - 1`.
    lines: VecDeque<Line>,
    next: i64,
    /// Up to this number, events may be shown before they are in the store.
    reserved: i64,
    /// Pieces beyond that, joined.
    held: Option<Delta>,
    /// The last event that is in the store.
    logged: i64,
    next_chunk: u32,
    /// A chunk that is on its way to the store, and its last event. It stays as it is until it is
    /// known to have arrived: it may have already.
    under_way: Option<(Chunk, i64)>,
    end: Option<End>,
    /// Followers that wait for what comes next.
    waiting: Vec<Waker>,
}

/// The log of one attempt at a turn.
pub struct Log(Mutex<State>);

impl Log {
    /// An empty log, whose first event has the number `first`.
    pub fn new(first: i64, reserve: i64, next_chunk: u32) -> Self {
        Self(Mutex::new(State {
            lines: VecDeque::new(),
            next: first,
            reserved: first + reserve - 1,
            held: None,
            logged: first - 1,
            next_chunk,
            under_way: None,
            end: None,
            waiting: Vec::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is inside stays right when a thread panics: each change is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, event: Event) {
        let mut state = self.state();
        match event {
            Event::Delta(delta) if state.next > state.reserved => match &mut state.held {
                Some(held) => held.join(delta),
                None => state.held = Some(delta),
            },
            event => state.write(event),
        }
    }

    /// What is to be written to the store: the same until [`Log::written`] is called.
    pub fn chunk(&self) -> (Option<Chunk>, i64) {
        let mut state = self.state();
        if state.under_way.is_none() && state.logged < state.next - 1 {
            let new = (state.next - 1 - state.logged) as usize;
            let old = state.lines.len() - new;
            let bytes = events::write_chunk(state.logged + 1, state.lines.iter().skip(old));
            let chunk = Chunk {
                index: state.next_chunk,
                bytes,
            };
            state.under_way = Some((chunk, state.next - 1));
        }
        match &state.under_way {
            Some((chunk, last)) => (Some(chunk.clone()), *last),
            None => (None, state.logged),
        }
    }

    /// Notes that what [`Log::chunk`] gave is in the store, and that `reserve` more events may
    /// follow it.
    pub fn written(&self, reserve: i64) {
        let mut state = self.state();
        if let Some((_, last)) = state.under_way.take() {
            state.logged = last;
            state.next_chunk += 1;
        }
        state.reserved = state.reserved.max(state.logged + reserve);
        if state.next <= state.reserved
            && let Some(held) = state.held.take()
        {
            state.write(Event::Delta(held));
        }
        let unlogged = (state.next - 1 - state.logged) as usize;
        let spare = state.lines.len().saturating_sub(unlogged.max(RECENT_MAX));
        state.lines.drain(..spare);
    }

    /// How many events the store is not known to have.
    pub fn unwritten(&self) -> i64 {
        let state = self.state();
        state.next - 1 - state.logged
    }

    /// Whether a chunk may or may not have arrived at the store.
    pub fn is_under_way(&self) -> bool {
        self.state().under_way.is_some()
    }

    /// Whether a piece waits for the store, so that it has no number yet.
    pub fn is_holding(&self) -> bool {
        self.state().held.is_some()
    }

    /// The number that the last event, which ends the turn, will have.
    pub fn last_number(&self) -> i64 {
        self.state().next
    }

    /// Ends the log; the first end stands.
    pub fn end(&self, end: End) {
        let mut state = self.state();
        state.end.get_or_insert(end);
        state.wake();
    }

    pub fn has_ended(&self) -> bool {
        self.state().end.is_some()
    }

    /// The first event with a greater number, or what else there is; waits while there is nothing.
    pub fn poll_after(&self, taken: i64, context: &mut Context<'_>) -> Poll<Found> {
        let mut state = self.state();
        let found = state.after(taken);
        if found.is_none() {
            let waker = context.waker();
            if !state.waiting.iter().any(|known| known.will_wake(waker)) {
                state.waiting.push(waker.clone());
            }
        }
        found.map_or(Poll::Pending, Poll::Ready)
    }

    /// How it has ended, if it has.
    pub fn ended(&self) -> Option<End> {
        self.state().end.clone()
    }

    /// Whether a follower that has taken so many can go on here.
    pub fn has(&self, taken: i64) -> bool {
        let state = self.state();
        taken + 1 >= state.next - state.lines.len() as i64
    }
}

impl State {
    fn write(&mut self, event: Event) {
        if let Some(line) = Line::of(event) {
            self.lines.push_back(line);
            self.next += 1;
            self.wake();
        }
    }

    fn wake(&mut self) {
        for waker in self.waiting.drain(..) {
            waker.wake();
        }
    }

    /// `None`: there is nothing yet.
    fn after(&self, taken: i64) -> Option<Found> {
        let first = self.next - self.lines.len() as i64;
        let number = taken + 1;
        if number >= self.next {
            return self.end.clone().map(Found::End);
        }
        // Also where this attempt begins after a leap: an earlier one's may come first.
        if number < first {
            return Some(Found::Older);
        }
        let line = &self.lines[(number - first) as usize];
        Some(Found::Event(number, line.event()))
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

    fn all(log: &Log, mut taken: i64) -> Vec<(i64, Event)> {
        let mut events = Vec::new();
        while let Some(Found::Event(number, event)) = log.state().after(taken) {
            taken = number;
            events.push((number, event));
        }
        events
    }

    #[test]
    fn every_follower_gets_every_event_once_and_then_the_end() {
        let log = Log::new(1, 1000, 0);
        log.push(text("a"));
        log.push(text("b"));
        assert_eq!(all(&log, 0), [(1, text("a")), (2, text("b"))]);
        assert_eq!(all(&log, 1), [(2, text("b"))]);
        assert!(log.state().after(2).is_none());
        log.end(End::Moved);
        assert_eq!(all(&log, 1), [(2, text("b"))]);
        assert!(matches!(log.state().after(2), Some(Found::End(End::Moved))));
    }

    #[test]
    fn a_chunk_stays_as_it_is_until_it_is_written() {
        let log = Log::new(1, 1000, 0);
        assert_eq!(log.chunk(), (None, 0));
        log.push(text("a"));
        let first = log.chunk();
        assert_eq!((first.0.as_ref().unwrap().index, first.1), (0, 1));
        log.push(text("b"));
        assert_eq!(log.chunk(), first);
        log.written(1000);
        let (second, last) = log.chunk();
        assert_eq!((second.as_ref().unwrap().index, last), (1, 2));
        assert_eq!(&*second.unwrap().bytes, b"2\n\"b\"\n");
    }

    #[test]
    fn what_is_in_the_store_is_let_go_and_followers_are_sent_there() {
        let log = Log::new(1, 10_000, 0);
        for _ in 0..1_000 {
            log.push(text("x"));
        }
        assert!(log.has(0));
        log.chunk();
        log.written(10_000);
        assert!(matches!(log.state().after(0), Some(Found::Older)));
        assert!(!log.has(0) && log.has(1_000 - RECENT_MAX as i64));
        assert_eq!(all(&log, 1_000 - RECENT_MAX as i64).len(), RECENT_MAX);
    }

    #[test]
    fn beyond_its_reserve_a_turn_joins_what_it_says_until_the_store_has_the_rest() {
        let log = Log::new(1, 2, 0);
        for piece in ["a", "b", "c", "d"] {
            log.push(text(piece));
        }
        assert_eq!(all(&log, 0).len(), 2);
        assert!(log.is_holding());
        log.chunk();
        log.written(2);
        assert_eq!(all(&log, 2), [(3, text("cd"))]);
    }

    #[test]
    fn a_later_attempt_sends_followers_to_the_store_for_what_came_before() {
        let log = Log::new(1001, 1000, 4);
        log.push(text("a"));
        assert!(matches!(log.state().after(7), Some(Found::Older)));
        assert_eq!(all(&log, 1000), [(1001, text("a"))]);
    }
}
