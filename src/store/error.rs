//! What can go wrong in a store. Each variant is a decision for the caller.

use super::Sequence;

/// A failure of a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The store cannot be reached or cannot work. Nothing was written: try again.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),

    /// A write was sent and its answer did not come. It may have been stored: repeat it under the
    /// same request key.
    #[error("the outcome of a write is unknown: {0}")]
    OutcomeUnknown(String),

    /// The store has no room: free some, then try again. Nothing was written.
    #[error("the store is full: {0}")]
    Full(String),

    /// The session's last sequence is not the one expected.
    #[error("the session's last sequence is {actual}, not {expected}")]
    SequenceMismatch {
        expected: Sequence,
        actual: Sequence,
    },

    /// The session was cleared since.
    #[error("the session was cleared meanwhile")]
    Cleared,

    /// The caller's lease of a turn is not the turn's any more: somebody else has it, or has ended
    /// the turn.
    #[error("another server has taken the turn")]
    LeaseLost,

    /// The request id was used for another request.
    #[error("the request id was used for another request")]
    RequestReused,

    /// The session's key holds something that is not a list. Do not try again.
    #[error("the key {key:?} holds a value of another type")]
    WrongKeyType { key: String },

    /// What is stored makes no sense to this version. Do not try again.
    #[error("the store holds what this version cannot read: {0}")]
    Corrupt(String),
}
