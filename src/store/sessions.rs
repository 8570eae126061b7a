//! What a store keeps of sessions besides their elements: the trait [`SessionStore`], its contract,
//! and what goes in and out. Knows bytes, sequences and times; knows neither gRPC nor what is in
//! the elements.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Bell, Cursor, Epoch, RequestKey, Result, Sequence, turns::TurnId};
use crate::message::{SessionId, UnixMillis};

/// Entries of an index that one call of [`SessionStore::list_sessions`] looks at, at most: it
/// bounds what a filter that few sessions match costs.
pub const LOOKED_AT_MAX: usize = 1_000;

/// Places in a session, at most, after which messages were rewound. Each of them costs every read a
/// little; only who goes back on a thousand different answers of one session meets this.
pub const REWINDS_MAX: usize = 1_000;

/// Elements that one step of a fork copies, at most.
pub const FORK_STEP: usize = 500;

/// How long a session may be told to live, at most: ten years.
pub const TTL_MS_MAX: i64 = 10 * 366 * 24 * 3600 * 1000;

/// How long, at most, other programs' writes can go unnoticed by a [`Bell`].
pub const NOTICED_WITHIN_MS: u64 = 5_000;

/// What a store does by itself with sessions. All replicas on one store should agree on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// How long a session lives after its last write, if nothing else is said of it
    /// ([`About::ttl_ms`]). `None`: the store sets no expiry, and one that others set stands.
    pub ttl_ms: Option<i64>,
    /// Whether a read of its elements counts as a write for that.
    pub reads_extend: bool,
    /// How many elements a session keeps; `None` for all. More are trimmed by whoever writes.
    pub elements_max: Option<usize>,
}

/// Keeps facts on sessions, lists sessions, and changes them as a whole.
///
/// # Contract
///
/// - **One clock.** A session and all that is kept with it expire together. A time to live starts
///   anew with each append, each turn that is stored, and if [`Upkeep::reads_extend`] says so each
///   read. [`About::ttl_ms`] comes before [`Upkeep::ttl_ms`]. An expired session is gone, whether or
///   not its bytes are: it reads as one that never was.
/// - **Trimming.** A write that leaves more than [`Upkeep::elements_max`] elements removes the
///   oldest in the same step: whole exchanges only, that is, up to an element that
///   [`crate::langchain`] writes for a user, and never the newest exchange. Sequences stay. Reads
///   delete nothing.
/// - **Rewind and sequences.** What is rewound is gone; the sequences of what is left stay; those
///   that went are never given again.
/// - **Fork.** Nobody sees a fork before it is whole.
/// - **The list** is by activity, the newest first. It may lag behind others' writes, up to a
///   minute in a store of up to a million keys; not behind writes through this store object. A
///   session without elements is not in it.
#[async_trait]
pub trait SessionStore: Send + Sync + 'static {
    /// What there is to know of a session. A session that is unknown is an empty one: no elements,
    /// the last sequence 0.
    async fn look(&self, session: &SessionId, look: Look) -> Result<Seen>;

    /// Changes what is said of a session. `None`: it has no elements, and nothing is changed.
    async fn update_session(&self, session: &SessionId, update: Update) -> Result<Option<Seen>>;

    /// Lists sessions that have elements, the newest activity first. Looks at no more than about
    /// [`LOOKED_AT_MAX`] entries: a page may be short and still not be the last.
    ///
    /// During a walk over all pages, a session that is not written to comes exactly once, any other
    /// at most once.
    async fn list_sessions(&self, list: ListRecent) -> Result<RecentPage>;

    /// Deletes the elements after a sequence, and the records of turns that have stored any of
    /// them. Once per request key, as [`append`](super::Store::append).
    async fn rewind(&self, session: &SessionId, rewind: Rewind) -> Result<Rewound>;

    /// Copies a session up to a sequence, in bounded steps, into one that has no elements.
    async fn fork(&self, session: &SessionId, fork: Fork) -> Result<Forked>;

    /// A bell that rings after each change of the session's elements or turns, whoever makes it, and
    /// perhaps without one: soon where the change goes through a server on this store, within
    /// [`NOTICED_WITHIN_MS`] where it does not. After the store was away it rings. A bell of a
    /// session to which nothing happens costs little: there may be tens of thousands.
    fn bell(&self, session: &SessionId) -> Bell;
}

/// How closely to look at a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// Which sequence [`Seen::floor`] is wanted for.
    pub at: Sequence,
    /// Whether [`Turn::request`] is wanted. It may be large.
    pub with_request: bool,
}

/// A session as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub count: i64,
    /// The sequence of the oldest element; 0 if there is none.
    pub first_sequence: Sequence,
    /// The last sequence given out.
    pub last_sequence: Sequence,
    pub epoch: Epoch,
    /// The greatest sequence of an element at or before [`Look::at`]; 0 if there is none. If it is
    /// not [`Look::at`] itself and that is not below `first_sequence`, the difference was rewound.
    pub floor: Sequence,
    pub about: About,
    /// When the session will be gone by itself.
    pub expires_ms: Option<UnixMillis>,
    /// When it was last written to, as far as the store has noticed.
    pub active_ms: Option<UnixMillis>,
    /// The turn that runs, or else the last one whose record is there.
    pub turn: Option<Turn>,
}

/// What is said of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    pub title: String,
    pub metadata: BTreeMap<String, String>,
    /// How long it lives after its last write; 0 for ever; `None`: as [`Upkeep::ttl_ms`] says.
    pub ttl_ms: Option<i64>,
    pub origin: Option<Origin>,
}

/// Where a session was copied from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    pub session: SessionId,
    /// The last sequence there that was copied.
    pub sequence: Sequence,
}

/// How it stands with a turn, for who looks at its session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    pub id: TurnId,
    pub name: String,
    pub attempt: u32,
    pub state: super::turns::TurnState,
    /// What was asked, if [`Look::with_request`] and the turn has not completed.
    pub request: Option<Bytes>,
}

/// What to change of a session; `None` leaves a thing as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    pub title: Option<String>,
    pub metadata: Option<BTreeMap<String, String>>,
    /// [`About::ttl_ms`]; the expiry is set anew from now on.
    pub ttl_ms: Option<Option<i64>>,
}

/// Which sessions to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListRecent {
    /// What the session ids begin with; empty for all.
    pub prefix: String,
    /// Pairs that the metadata must have, all of them.
    pub metadata: BTreeMap<String, String>,
    /// [`RecentPage::next`] of the page before.
    pub cursor: Option<Cursor>,
    /// 1 or more.
    pub limit: usize,
}

/// A part of the sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecentPage {
    pub sessions: Vec<(SessionId, Seen)>,
    /// `None` if this was the last page.
    pub next: Option<Cursor>,
}

/// How to rewind a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewind {
    /// Elements with a greater sequence go.
    pub after: Sequence,
    pub request: RequestKey,
    /// Rewind only if this is the session's last sequence.
    pub expected_last_sequence: Option<Sequence>,
    /// The caller's time, remembered with the request.
    pub time_ms: UnixMillis,
}

/// What became of [`SessionStore::rewind`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rewound {
    /// So many elements went, now or by an earlier call.
    Done { count: i64 },
    /// A turn runs on the session; nothing was changed.
    Busy { turn: TurnId, name: String },
    /// [`REWINDS_MAX`] is reached; nothing was changed.
    TooMany,
}

/// How to fork a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fork {
    /// The new session.
    pub to: SessionId,
    /// Elements up to this sequence; all if `None`.
    pub through: Option<Sequence>,
}

/// What became of [`SessionStore::fork`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forked {
    /// The new session, now or by an earlier call with the same session and the same `through`.
    Done(Box<Seen>),
    /// The session to copy has no elements up to there.
    Empty,
    /// The new session has elements, or a turn runs on it.
    Exists,
    /// The session to copy was cleared, rewound or trimmed while it was copied.
    Changed,
}
