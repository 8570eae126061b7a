//! Where messages are kept: the trait [`Store`], its contract, and what goes in and out of it.
//! Knows bytes and sequences; knows neither gRPC nor models, nor what is in the bytes.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::message::{SessionId, UnixMillis};

pub mod ledger;
pub mod redis;
pub mod sessions;
pub mod sqlite;
pub mod turns;

pub use bells::{Bell, Bells};
pub use error::Error;
pub use sessions::SessionStore;
pub use turns::TurnStore;

mod bells;
mod error;

/// A result of a store.
pub type Result<T> = std::result::Result<T, Error>;

/// A message's place in its session: 1 for the first. 0 stands before the first.
pub type Sequence = i64;

/// Bytes of a stored element that a store hands out, at most; of a larger one (only other programs
/// write such) it tells the size. The largest message we accept takes 6 MiB when every character
/// is escaped.
pub const ELEMENT_BYTES_MAX: usize = 8 << 20;

/// How long a request id is remembered.
pub const REQUEST_MEMORY_MS: i64 = 24 * 60 * 60 * 1000;

/// How long the last sequence of a cleared session is remembered.
pub const TOMBSTONE_MS: i64 = 30 * 24 * 60 * 60 * 1000;

/// Keeps the elements of sessions: bytes, in order, numbered.
///
/// # Contract
///
/// - **Whole or nothing.** A call that writes does all of it in one step, or none of it. No reader
///   ever sees a part.
/// - **Durable.** When [`append`](Store::append) or [`clear`](Store::clear) returns `Ok`, the
///   result is as durable as the store's configuration makes it (embedded: on disk; Redis: what
///   its persistence settings say).
/// - **Order.** The elements of a session have a total order, the order of their writes; those of
///   one append stand together, in the order given. Reads see every write that was acknowledged
///   before they began.
/// - **Sequences** rise strictly along that order and are never given out twice in the life of a
///   session, whatever is deleted and by whom. They have no gaps within what one append wrote, and
///   elsewhere only where elements were rewound. A session that expired starts at 1 again.
/// - **Once.** Two appends with the same [`RequestKey`] within 24 hours store once, also when they
///   run at the same time, on any replica: the later one gets the first one's [`Appended`], or
///   [`Error::RequestReused`] if its fingerprint differs. A clear forgets them.
/// - **Conditions first.** [`Error::SequenceMismatch`], [`Error::Cleared`],
///   [`Error::RequestReused`] and [`Error::WrongKeyType`] mean that nothing was written. A repeated
///   request is recognised before its conditions are looked at.
/// - **A dropped future** may or may not have written, never a part.
/// - **Unknown outcomes.** Only [`Error::OutcomeUnknown`] leaves open whether a write was stored.
///   The same append may then be repeated under the same [`RequestKey`].
/// - **Bounded.** Every call ends in bounded time, with [`Error::Unavailable`] if need be, and a
///   read costs what it returns, whatever the session's length.
#[async_trait]
pub trait Store: TurnStore + SessionStore {
    /// Adds elements at the end of a session.
    async fn append(&self, session: &SessionId, append: Append) -> Result<Appended>;

    /// Returns a page of a session's elements.
    async fn read(&self, session: &SessionId, read: Read) -> Result<Page>;

    /// Deletes everything kept on a session but its last sequence; says how many elements went.
    async fn clear(&self, session: &SessionId) -> Result<i64>;

    /// Lists sessions that hold elements, in no particular order. A session that is there during the
    /// whole walk, from the first page to the one without [`SessionsPage::next`], comes at least
    /// once; others may come or not.
    ///
    /// The cost of one call is bounded, also where few names match: a page may be empty and still
    /// not be the last. A cursor that means nothing to the store any more (Redis was restarted)
    /// begins a new walk.
    async fn sessions(&self, list: List) -> Result<SessionsPage>;

    /// Lets a session that has elements and no expiry expire at that time. Says whether it does
    /// now: an expiry that somebody else has set stands.
    async fn expire(&self, session: &SessionId, at_ms: UnixMillis) -> Result<bool>;

    /// Whether the store can be reached, and its changes.
    fn reachable(&self) -> watch::Receiver<bool>;

    /// What the store is and where, for people, without secrets.
    fn describe(&self) -> String;
}

/// What to append.
#[derive(Debug, Clone)]
pub struct Append {
    /// At least one, oldest first.
    pub elements: Vec<Bytes>,
    /// Makes the append safe to repeat. Never absent: the server makes one if the client did not.
    pub request: RequestKey,
    /// When the elements were made; remembered with the request.
    pub time_ms: UnixMillis,
    /// Append only if this is the session's last sequence.
    pub expected_last_sequence: Option<Sequence>,
    /// Append only if the session has not been cleared since it had this epoch.
    pub expected_epoch: Option<Epoch>,
}

/// Names a write, so that it happens once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestKey {
    /// The request's id, hashed: 16 bytes, whatever the client's id is.
    pub id: [u8; 16],
    /// What was asked, hashed.
    pub fingerprint: [u8; 16],
}

impl RequestKey {
    /// The key of the request `id` of one `kind` ("append", "turn") with the given body.
    pub fn new(kind: &str, id: &str, body: &[u8]) -> Self {
        let hash = |parts: [&[u8]; 2]| {
            let mut digest = Sha256::new();
            for part in parts {
                digest.update((part.len() as u64).to_be_bytes());
                digest.update(part);
            }
            let mut hash = [0; 16];
            hash.copy_from_slice(&digest.finalize()[..16]);
            hash
        };
        Self {
            id: hash([kind.as_bytes(), id.as_bytes()]),
            fingerprint: hash([kind.as_bytes(), body]),
        }
    }
}

/// What an append stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The sequence of the first element; the others follow without gaps.
    pub first_sequence: Sequence,
    /// How many elements.
    pub count: usize,
    /// The [`Append::time_ms`] of the call that stored them.
    pub time_ms: UnixMillis,
    /// Whether an earlier call had stored them.
    pub repeated: bool,
}

/// Counts how often a session was cleared, by us or by others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Epoch(pub i64);

/// In which order to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    OldestFirst,
    NewestFirst,
}

/// What to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    pub order: Order,
    /// Only greater sequences; 0 for all.
    pub after: Sequence,
    /// Only smaller sequences.
    pub before: Option<Sequence>,
    /// Only the newest so many of those.
    pub last: Option<usize>,
    /// At most so many elements: 1 or more.
    pub limit: usize,
    /// At most so many bytes of elements, except that the first one always comes (or its size, if
    /// it is above [`ELEMENT_BYTES_MAX`]).
    pub bytes_max: usize,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In the order asked for.
    pub elements: Vec<Element>,
    /// Whether the range holds more elements beyond these.
    pub more: bool,
    /// The range that was read, with [`Read::last`] resolved: what lies strictly between `after`
    /// and `before`.
    pub after: Sequence,
    pub before: Sequence,
    /// The session's last sequence; 0 if none was given out yet.
    pub last_sequence: Sequence,
    /// The session's epoch.
    pub epoch: Epoch,
}

/// Which sessions to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// What the session ids begin with; empty for all.
    pub prefix: String,
    /// [`SessionsPage::next`] of the page before; `None` for the first page.
    pub cursor: Option<Cursor>,
    /// About so many names are looked at, and at most a few more returned.
    pub limit: usize,
}

/// Where a listing goes on. Only the store that gave it knows what it means; it stays good over a
/// restart of this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(pub String);

/// A part of the sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionsPage {
    pub sessions: Vec<SessionId>,
    /// Lists among the names looked at that cannot be sessions, because of their names.
    pub unusable: usize,
    /// `None` if this was the last page.
    pub next: Option<Cursor>,
}

/// A stored element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    pub sequence: Sequence,
    pub body: Body,
}

/// What is stored as an element.
#[derive(Clone, PartialEq, Eq)]
pub enum Body {
    /// The bytes.
    Bytes(Bytes),
    /// Only their number: there are more than [`ELEMENT_BYTES_MAX`].
    TooLarge(usize),
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Message text stays out of logs, and so out of Debug.
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Self::TooLarge(size) => write!(f, "TooLarge({size} bytes)"),
        }
    }
}
