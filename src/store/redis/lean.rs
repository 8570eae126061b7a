//! Which sessions had only small elements at their new end when this server last saw it. A hint, to
//! choose a way of reading by: it may be forgotten, and it may be out of date.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::message::SessionId;

/// Elements of at most so many bytes are small: Redis keeps several of them together.
pub(super) const SMALL_MAX: usize = 8 << 10;
/// Sessions that are remembered, at most; 8 bytes each.
const SLOTS: usize = 1 << 14;

/// The hints. Sessions that share a slot displace each other.
pub(super) struct Lean {
    /// A session's hash, and in the lowest bits what is known of it.
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
}

/// What is known of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Nothing = 0,
    /// Its newest elements were small.
    Small = 1,
    /// They were, and it could not be read by that.
    Unusual = 2,
}

impl Lean {
    pub(super) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: RandomState::new(),
        }
    }

    /// Takes note of what was found out.
    pub(super) fn note(&self, session: &SessionId, known: Known) {
        let (slot, hash) = self.slot(session);
        slot.store(hash | known as u64, Ordering::Relaxed);
    }

    /// Takes note of the elements at the new end of a session, unless it is unusual: it is until
    /// something is added to it.
    pub(super) fn note_small(&self, session: &SessionId, are_small: bool) {
        match self.of(session) {
            Known::Unusual => {}
            Known::Small if !are_small => self.note(session, Known::Nothing),
            Known::Nothing if are_small => self.note(session, Known::Small),
            _ => {}
        }
    }

    /// What is known of a session.
    pub(super) fn of(&self, session: &SessionId) -> Known {
        let (slot, hash) = self.slot(session);
        match slot.load(Ordering::Relaxed) ^ hash {
            1 => Known::Small,
            2 => Known::Unusual,
            _ => Known::Nothing,
        }
    }

    fn slot(&self, session: &SessionId) -> (&AtomicU64, u64) {
        let hash = self.hasher.hash_one(session.as_str());
        (&self.slots[(hash >> 2) as usize % SLOTS], hash & !3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_last_counts_until_something_unusual_comes_up() {
        let lean = Lean::new();
        let session = SessionId::parse("s").unwrap();
        let other = SessionId::parse("t").unwrap();
        let known = || (lean.of(&session), lean.of(&other));
        assert_eq!(known(), (Known::Nothing, Known::Nothing));
        lean.note_small(&session, true);
        lean.note_small(&other, false);
        assert_eq!(known(), (Known::Small, Known::Nothing));
        lean.note_small(&session, false);
        assert_eq!(known(), (Known::Nothing, Known::Nothing));
        lean.note_small(&session, true);
        lean.note(&session, Known::Unusual);
        lean.note_small(&session, true);
        assert_eq!(known(), (Known::Unusual, Known::Nothing));
        lean.note(&session, Known::Nothing);
        lean.note_small(&session, true);
        assert_eq!(known(), (Known::Small, Known::Nothing));
    }
}
