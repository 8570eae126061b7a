//! What a store keeps of turns: the trait [`TurnStore`], its contract, and what goes in and out.
//! Knows bytes, tokens and times; does not know what a turn says or who runs it.

use async_trait::async_trait;
use bytes::Bytes;

use super::{Appended, Page, Read, RequestKey, Result};
use crate::message::{SessionId, UnixMillis};

/// How long a call that waits in line ([`BeginTurn::waits`]) keeps its place without asking again,
/// unless somebody takes it out of the line ([`TurnStore::leave_line`]).
pub const PLACE_MS: i64 = 2_000;

/// Calls that may wait in line at one session.
pub const WAITING_MAX: usize = 100;

/// How often a follower that is not with the holder is noted, at most ([`FollowTurn::is_noted`]).
pub const FOLLOWED_EVERY_MS: i64 = 1_000;

/// Keeps turns: which one runs on a session, who holds it, what it was asked, what it said, and how
/// it ended.
///
/// # States
///
/// ```text
///                     begin                      end (completed)
///        (no record) ───────▶ running ─────────────────────────▶ completed
///                            ▲ │  ▲ │  end (failed), or a take
///         take: a new holder │ │  │ │  after the last try
///         and a new attempt  └─┘  │ └──────────────────────────▶ failed
///                                 └───────────────────────────────┘
///                                   begin with the same request
/// ```
///
/// | state | who may move it | what the record holds |
/// |---|---|---|
/// | running | the holder of its token; by `take_turn`, anyone once the lease has run out | the request, the lease, the log |
/// | completed | nobody | the log, what was stored where, how it ended |
/// | failed | `begin_turn` with the same request | the request, the log, why it failed |
///
/// A record is forgotten the given retention after its end, and at once when its session is
/// cleared, by us or by others. A running turn whose record is gone has ended. When a session
/// expires, the turns that have ended are forgotten with it; one that runs goes on, since nobody
/// took back what was accepted, and its messages are the first of a session that starts anew.
///
/// # Contract
///
/// - **One at a time.** A session has at most one running turn. Of any number of calls of
///   `begin_turn` and `take_turn` at the same time, on any replica, one at most gets the lease.
/// - **Fenced.** A lease has a token that its taker made. A call with another token than the
///   record's changes nothing ([`Error::LeaseLost`](super::Error::LeaseLost)), however late it
///   comes; nor does one whose record is gone ([`Error::Cleared`](super::Error::Cleared)). A
///   lease that has run out is still its holder's until somebody takes it.
/// - **Whole or nothing.** Each call is one step. `end_turn` appends the messages, writes the last
///   of the log and ends the turn in the same step.
/// - **Once.** Every call that writes may be repeated as it is, and answers as the first did.
/// - **Order.** The log is chunks, numbered from 0, in the order in which they were written.
/// - **Numbers.** No attempt is given a number for its events (`first_event`) that an earlier
///   attempt may have used: numbers up to `reserved` are taken, logged or not.
/// - **Clock.** Leases run by the store's clock.
#[async_trait]
pub trait TurnStore: Send + Sync + 'static {
    /// Begins a turn on a session that has none, or runs a failed one anew.
    async fn begin_turn(&self, session: &SessionId, begin: BeginTurn) -> Result<Begun>;

    /// Begins a turn, and reads the session right after that if it takes no further way to the store
    /// and back. There is no page where it would, where nothing was begun, or where it cannot be read:
    /// whoever has begun a turn then reads it as everyone else does.
    async fn begin_turn_and_read(
        &self,
        session: &SessionId,
        begin: BeginTurn,
        _read: Read,
    ) -> Result<(Begun, Option<Page>)> {
        Ok((self.begin_turn(session, begin).await?, None))
    }

    /// Takes a turn out of the line, for a call that does not wait any more
    /// ([`BeginTurn::waits`]); but not if the turn was asked for in the last `silent_ms`, for then
    /// another call waits for it.
    async fn leave_line(&self, session: &SessionId, turn: TurnId, silent_ms: i64) -> Result<()>;

    /// Takes a running turn whose lease has run out.
    async fn take_turn(&self, session: &SessionId, take: TakeTurn) -> Result<Taken>;

    /// Extends the lease and adds to the log.
    async fn keep_turn(&self, session: &SessionId, keep: KeepTurn) -> Result<Kept>;

    /// Ends a turn.
    async fn end_turn(&self, session: &SessionId, end: EndTurn) -> Result<TurnState>;

    /// Asks the holder of a running turn to stop it: its next `keep_turn` says so. Returns the turn
    /// as it is then; a turn that has ended stays as it is. `None`: there is no such turn, or no
    /// running one where none was named.
    async fn stop_turn(
        &self,
        session: &SessionId,
        turn: Option<TurnId>,
        stop: Stop,
    ) -> Result<Option<StoppedTurn>>;

    /// Reads a turn's state and a part of its log. `None`: there is no such turn. That it has
    /// completed is as good as [`end_turn`](Self::end_turn)'s answer: while that could not be given
    /// yet, it is an error here, too.
    async fn follow_turn(
        &self,
        session: &SessionId,
        follow: FollowTurn,
    ) -> Result<Option<Followed>>;

    /// Names running turns whose lease may have run out, at most so many. Every one whose lease has
    /// is named within two lease times, unless there are more than `limit`; others may be, until
    /// `take_turn` has looked at them.
    async fn orphaned_turns(&self, limit: usize) -> Result<Vec<(SessionId, TurnId)>>;
}

/// Names a turn within its session: its id, hashed ([`RequestKey::id`]).
pub type TurnId = [u8; 16];

/// A fencing token: names one lease. Random, made by who asks for the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 16]);

impl Token {
    /// One that nobody has.
    pub fn new() -> Self {
        Self(rand::random())
    }
}

impl Default for Token {
    fn default() -> Self {
        Self::new()
    }
}

/// A lease to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub token: Token,
    /// How long it lasts unless it is extended.
    pub lease_ms: i64,
    /// How long the record stays once nobody extends the lease any more.
    pub retention_ms: i64,
    /// How many numbers of events the holder may use before it writes to the log.
    pub reserve: i64,
}

/// How to begin a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeginTurn {
    /// The turn's id and what was asked, hashed.
    pub key: RequestKey,
    /// The turn's id, for people: those whose turn has to wait are told it.
    pub name: String,
    /// What was asked, for whoever runs the turn anew.
    pub request: Bytes,
    pub lease: Lease,
    /// Whether to wait in line while another turn runs. The caller asks again, with the same turn
    /// and more often than each [`PLACE_MS`], and has the turn once the line before it is gone.
    pub waits: bool,
}

/// What became of [`TurnStore::begin_turn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// The caller has the lease.
    Leased(Leased),
    /// The turn runs or has completed.
    Exists(TurnState),
    /// Another turn runs on the session.
    Busy {
        turn: TurnId,
        name: String,
        /// Whether its lease has run out.
        is_expired: bool,
    },
    /// The caller waits in line, so many before it, the running turn not counted. `turn` is the
    /// running one if there is one whose lease has run out.
    Waiting {
        before: usize,
        expired: Option<TurnId>,
    },
    /// [`WAITING_MAX`] calls wait already.
    LineFull,
}

/// A turn to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leased {
    /// 1 for the first attempt of a turn.
    pub attempt: u32,
    /// The number of the attempt's first event.
    pub first_event: i64,
    /// The index of the next chunk of the log.
    pub next_chunk: u32,
    pub name: String,
    /// Of what was asked ([`RequestKey::fingerprint`]).
    pub fingerprint: [u8; 16],
    pub request: Bytes,
    /// Whether it is to be stopped.
    pub stop: Option<Stop>,
}

/// How to take a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeTurn {
    pub turn: TurnId,
    pub lease: Lease,
    /// Take it also if its lease has not run out, and whatever the number of tries.
    pub by_force: bool,
    /// How often a turn is tried in all, from its `begin_turn` on. One whose lease runs out in the
    /// last try fails.
    pub tries_max: u32,
    /// What is noted of a turn that fails so.
    pub outcome: Bytes,
}

/// What became of [`TurnStore::take_turn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// The caller has the lease.
    Leased(Leased),
    /// Somebody else has it still.
    Held,
    /// The turn has ended, perhaps by this call, after its last try.
    Ended(TurnState),
    /// There is no such turn.
    Gone,
}

/// A chunk of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub index: u32,
    pub bytes: Bytes,
}

/// How to keep a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepTurn {
    pub turn: TurnId,
    /// [`Lease::lease_ms`] from now on; 0 gives the turn up for others to take.
    pub lease: Lease,
    /// What to add to the log.
    pub chunk: Option<Chunk>,
    /// The number of the last event so far; [`Lease::reserve`] more are then taken.
    pub last_event: i64,
}

/// What the holder is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Whether the turn is to be stopped.
    pub stop: Option<Stop>,
    /// How long ago a follower at another replica was noted, in ms.
    pub followed_ms_ago: Option<i64>,
}

/// How to stop a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Store the question and what there is of the answer.
    Keep,
    /// Store nothing.
    Discard,
}

/// How to end a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndTurn {
    pub turn: TurnId,
    pub token: Token,
    /// How long the record stays.
    pub retention_ms: i64,
    /// What to add to the log.
    pub chunk: Option<Chunk>,
    /// The turn's elements to append, oldest first; none: the turn has failed.
    pub elements: Vec<Bytes>,
    /// When the elements were made.
    pub time_ms: UnixMillis,
    /// How the turn ended, for who asks later.
    pub outcome: Bytes,
}

/// A turn that was asked to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoppedTurn {
    pub turn: TurnId,
    pub name: String,
    pub state: TurnState,
}

/// What to read of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FollowTurn {
    pub turn: TurnId,
    /// Chunks from this one on; those before may be gone.
    pub from_chunk: u32,
    /// Chunks of so many bytes at most, except that one always comes if there is one.
    pub bytes_max: usize,
    /// Whether the holder of the turn is to know that somebody follows it. A store that serves one
    /// server only takes no note.
    pub is_noted: bool,
}

/// What was read of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    pub state: TurnState,
    pub chunks: Vec<Bytes>,
    /// The index after the last of these chunks; where to go on.
    pub next_chunk: u32,
    /// Whether the log holds more than these now.
    pub more: bool,
}

/// How it stands with a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TurnState {
    Running {
        /// Whether its lease has run out.
        is_expired: bool,
    },
    Completed {
        /// Where its messages are.
        appended: Appended,
        outcome: Bytes,
    },
    Failed {
        outcome: Bytes,
    },
}
