//! Watches a session: what is in it, then what comes, in order and once, whoever writes it. Knows
//! neither gRPC nor which store it has.
//!
//! A watcher holds no messages but those it is about to give. It reads them from the store at its
//! caller's pace, by their sequences, so that a slow one costs nobody anything; a bell of the store
//! only says when to look. What it tells of beside messages, it finds by comparing what it sees with
//! what it saw before.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    error::Error,
    message::{SessionId, now_ms},
    store::{
        self, Bell, Element, Epoch, Order, Read, Sequence, Store,
        sessions::{Look, Seen},
    },
    turn::{Report, State},
};

/// Messages that are read ahead of the caller, at most, and their bytes: what a watcher whose caller
/// is slow holds.
const AHEAD_MESSAGES_MAX: usize = 64;
const AHEAD_BYTES_MAX: usize = 256 << 10;

/// How often a store that is away is asked again. When it comes back, its bells ring besides.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    Message(Element),
    /// All that was there has been given.
    Live {
        last_sequence: Sequence,
    },
    Turn(Report),
    /// Elements after this sequence were rewound.
    Rewound {
        last_sequence: Sequence,
    },
    /// The session was cleared, deleted by others, or has expired.
    Cleared,
    /// Elements before this sequence went before they could be given.
    Skipped {
        first_sequence: Sequence,
    },
}

/// Watches one session.
pub struct Watch {
    store: Arc<dyn Store>,
    session: SessionId,
    bell: Bell,
    /// The sequence up to which all is given or on its way.
    at: Sequence,
    /// What was seen last; `None` before the first look.
    seen: Option<Sight>,
    is_live: bool,
    /// What to give next.
    ahead: VecDeque<Notice>,
}

/// What is remembered of a look, to see what has changed.
struct Sight {
    epoch: Epoch,
    count: i64,
    turn: Option<Report>,
    /// The session's last sequence when turns were last told of.
    told_at: Sequence,
    /// Whether messages were found rewound since.
    is_rewound: bool,
    expires_ms: Option<i64>,
}

impl Sight {
    /// Whether this state of a turn is one that came after what was seen before. Where the records of
    /// the newest turns go with their messages, an older one is the last again.
    fn is_news(&self, turn: &Report) -> bool {
        let is_known = |known: &Report| (&known.id, known.attempt) == (&turn.id, turn.attempt);
        match turn.state {
            State::Running => true,
            _ if self.turn.as_ref().is_some_and(is_known) => true,
            State::Completed { first_sequence } => first_sequence > self.told_at,
            State::Failed { .. } => !self.is_rewound,
        }
    }
}

/// What a look came to.
enum Looked {
    /// Everything there is.
    AtEnd,
    /// There is more already.
    More,
}

impl Watch {
    /// Watches what comes after a sequence.
    pub fn new(store: Arc<dyn Store>, session: SessionId, after: Sequence) -> Self {
        // Before the first look, so that nothing falls between the two.
        let bell = store.bell(&session);
        Self {
            store,
            session,
            bell,
            at: after,
            seen: None,
            is_live: false,
            ahead: VecDeque::new(),
        }
    }

    /// Waits for what comes next. An error is one that waiting does not mend.
    pub async fn next(&mut self) -> Result<Notice, Error> {
        loop {
            if let Some(notice) = self.ahead.pop_front() {
                return Ok(notice);
            }
            match self.look().await {
                Ok(Looked::More) => {}
                Ok(Looked::AtEnd) if self.ahead.is_empty() => self.wait().await,
                Ok(Looked::AtEnd) => {}
                Err(store::Error::Unavailable(_)) => {
                    tokio::select! {
                        () = self.bell.rung() => {}
                        () = sleep(RETRY_EVERY) => {}
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until there may be something new: a ring, or the session's expiry.
    async fn wait(&mut self) {
        let expires_ms = self.seen.as_ref().and_then(|seen| seen.expires_ms);
        let expiry = async {
            match expires_ms {
                // A moment later: clocks differ, and the store must have noticed.
                Some(at_ms) => sleep(until_ms(at_ms) + RETRY_EVERY).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.bell.rung() => {}
            () = expiry => {}
        }
    }

    async fn look(&mut self) -> store::Result<Looked> {
        let look = Look {
            at: self.at,
            with_request: false,
        };
        let seen = self.store.look(&self.session, look).await?;
        let turn = seen.turn.as_ref().map(Report::of);
        self.compare(&seen, turn.as_ref());

        if seen.last_sequence <= self.at {
            self.tell_turn(&seen, turn);
            self.tell_live(seen.last_sequence);
            return Ok(Looked::AtEnd);
        }
        let read = Read {
            order: Order::OldestFirst,
            after: self.at,
            before: None,
            last: None,
            limit: AHEAD_MESSAGES_MAX,
            bytes_max: AHEAD_BYTES_MAX,
        };
        let page = self.store.read(&self.session, read).await?;
        if page.epoch != seen.epoch {
            return Ok(Looked::More);
        }
        if let Some(last) = page.elements.last() {
            self.at = last.sequence;
        }
        let messages = page.elements.into_iter().map(Notice::Message);
        self.ahead.extend(messages);
        if page.more {
            return Ok(Looked::More);
        }
        // After its messages, where it has any.
        self.tell_turn(&seen, turn);
        self.tell_live(self.at.max(seen.last_sequence));
        // What came between the two reads has rung.
        Ok(Looked::AtEnd)
    }

    /// Tells what has happened to the session as a whole since the last look.
    fn compare(&mut self, seen: &Seen, turn: Option<&Report>) {
        let before = self.seen.as_ref().map(|before| before.epoch);
        let is_first = before.is_none();
        // An empty session has nothing that could be taken back.
        let had_messages = match &self.seen {
            None => seen.count > 0,
            Some(before) => before.count > 0,
        };
        let mut is_rewound = false;
        // A session whose last sequence has fallen is another one: the old one has expired.
        let is_new_life = seen.last_sequence < self.at && !is_first;
        if before.is_some_and(|epoch| epoch != seen.epoch) || is_new_life {
            self.ahead.push_back(Notice::Cleared);
            self.at = match is_new_life {
                true => seen.first_sequence.max(1) - 1,
                false => self.at.max(seen.first_sequence - 1),
            };
        } else if is_first && seen.last_sequence < self.at {
            self.at = seen.last_sequence;
        } else if self.at > 0 && seen.count > 0 && seen.first_sequence > self.at + 1 {
            let first_sequence = seen.first_sequence;
            self.ahead.push_back(Notice::Skipped { first_sequence });
            self.at = first_sequence - 1;
        } else if had_messages && seen.floor < self.at {
            let last_sequence = seen.floor;
            self.ahead.push_back(Notice::Rewound { last_sequence });
            is_rewound = true;
            // What was rewound has no sequence that will come again.
            self.at = match seen.count {
                0 => seen.last_sequence,
                _ => last_sequence,
            };
        }
        let is_running = turn.is_some_and(|turn| turn.state == State::Running);
        // What is not told yet is compared with what was there when turns were last told of: there
        // may be several looks between.
        let (told, told_at, was_rewound) = match self.seen.take() {
            Some(_) if is_new_life => (None, 0, false),
            Some(before) => (before.turn, before.told_at, before.is_rewound),
            None if is_running => (None, 0, false),
            // One that ended before is no news.
            None => (turn.cloned(), seen.last_sequence, false),
        };
        self.seen = Some(Sight {
            epoch: seen.epoch,
            count: seen.count,
            turn: told,
            told_at,
            is_rewound: is_rewound || was_rewound,
            expires_ms: seen.expires_ms,
        });
        // That a turn runs is told before what it stores.
        if is_running {
            self.tell_turn(seen, turn.cloned());
        }
    }

    fn tell_turn(&mut self, seen: &Seen, turn: Option<Report>) {
        let Some(sight) = &mut self.seen else {
            return;
        };
        if turn != sight.turn
            && let Some(turn) = &turn
            && sight.is_news(turn)
        {
            self.ahead.push_back(Notice::Turn(turn.clone()));
        }
        sight.turn = turn;
        sight.told_at = seen.last_sequence;
        sight.is_rewound = false;
    }

    fn tell_live(&mut self, last_sequence: Sequence) {
        if !self.is_live {
            self.is_live = true;
            self.ahead.push_back(Notice::Live { last_sequence });
        }
    }
}

fn until_ms(at_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(at_ms - now_ms()).unwrap_or(0))
}
