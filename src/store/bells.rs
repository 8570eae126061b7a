//! Bells: how who waits for a change of a session is woken. Knows session ids only; does not know
//! how a store notices changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::message::SessionId;

/// The bells of one store: one for each session that somebody waits for, however many do.
#[derive(Clone, Default)]
pub struct Bells(Arc<Mutex<HashMap<SessionId, Rope>>>);

/// What rings the bells of one session.
struct Rope {
    ring: watch::Sender<()>,
    /// How many [`Bell`]s hang on it.
    count: usize,
}

/// Rings after a change of a session. Rings that nobody has heard yet count as one.
pub struct Bell {
    bells: Bells,
    session: SessionId,
    rung: watch::Receiver<()>,
}

impl Bells {
    /// Hangs up one more bell. Says whether it is the session's first.
    pub fn hang(&self, session: &SessionId) -> (Bell, bool) {
        let mut ropes = self.ropes();
        let rope = ropes.entry(session.clone()).or_insert_with(|| Rope {
            ring: watch::Sender::new(()),
            count: 0,
        });
        rope.count += 1;
        let bell = Bell {
            bells: self.clone(),
            session: session.clone(),
            rung: rope.ring.subscribe(),
        };
        (bell, rope.count == 1)
    }

    /// Rings the bells of a session. Says whether there are any.
    pub fn ring(&self, session: &SessionId) -> bool {
        match self.ropes().get(session) {
            Some(rope) => {
                rope.ring.send_replace(());
                true
            }
            None => false,
        }
    }

    /// Rings all bells.
    pub fn ring_all(&self) {
        for rope in self.ropes().values() {
            rope.ring.send_replace(());
        }
    }

    /// The sessions that have bells, in no particular order.
    pub fn sessions(&self) -> Vec<SessionId> {
        self.ropes().keys().cloned().collect()
    }

    /// Whether there is no bell.
    pub fn is_empty(&self) -> bool {
        self.ropes().is_empty()
    }

    /// Whether the session has a bell.
    pub fn has(&self, session: &SessionId) -> bool {
        self.ropes().contains_key(session)
    }

    fn ropes(&self) -> MutexGuard<'_, HashMap<SessionId, Rope>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bell {
    /// Waits until it rings, or has rung since this last returned.
    pub async fn rung(&mut self) {
        // The rope stays as long as a bell hangs on it.
        let _ = self.rung.changed().await;
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let mut ropes = self.bells.ropes();
        if let Some(rope) = ropes.get_mut(&self.session) {
            rope.count -= 1;
            if rope.count == 0 {
                ropes.remove(&self.session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    fn session(id: &str) -> SessionId {
        SessionId::parse(id).unwrap()
    }

    #[tokio::test]
    async fn a_bell_rings_for_its_session_only_and_remembers_one_ring() {
        let bells = Bells::default();
        let (mut a, is_first) = bells.hang(&session("a"));
        assert!(is_first);
        let (mut other, is_first) = bells.hang(&session("a"));
        assert!(!is_first);
        let (mut b, _) = bells.hang(&session("b"));

        assert!(bells.ring(&session("a")) && bells.ring(&session("a")));
        a.rung().await;
        other.rung().await;
        let not_again = timeout(std::time::Duration::ZERO, a.rung()).await;
        assert!(not_again.is_err(), "two rings that nobody heard are one");
        let not_its_own = timeout(std::time::Duration::ZERO, b.rung()).await;
        assert!(not_its_own.is_err());
        bells.ring_all();
        b.rung().await;
    }

    #[tokio::test]
    async fn a_session_is_forgotten_with_its_last_bell() {
        let bells = Bells::default();
        let (a, _) = bells.hang(&session("a"));
        let (b, _) = bells.hang(&session("a"));
        drop(a);
        assert!(bells.has(&session("a")));
        drop(b);
        assert!(bells.sessions().is_empty() && !bells.ring(&session("a")));
    }
}
