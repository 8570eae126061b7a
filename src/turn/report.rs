//! How it stands with a turn, for who looks at its session. Reads the record; does not run anything.

use crate::{
    error::{Error, Recorded},
    store::{
        Sequence,
        sessions::Turn,
        turns::{TurnId, TurnState},
    },
};

use super::outcome;

/// How it stands with a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub id: TurnId,
    pub name: String,
    /// Which attempt it is in, or ended in.
    pub attempt: u32,
    pub state: State,
}

/// The states that are told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Running,
    Completed {
        first_sequence: Sequence,
    },
    /// Why, as the error's stable reason and for people.
    Failed {
        reason: String,
        message: String,
    },
}

impl Report {
    pub fn of(turn: &Turn) -> Self {
        let state = match &turn.state {
            TurnState::Running { .. } => State::Running,
            TurnState::Completed { appended, .. } => State::Completed {
                first_sequence: appended.first_sequence,
            },
            TurnState::Failed { outcome } => {
                let error = match outcome::read::<Recorded>(outcome) {
                    Ok(recorded) => Error::Recorded(Box::new(recorded)),
                    Err(error) => error,
                };
                State::Failed {
                    reason: error.reason().into_owned(),
                    message: error.to_string(),
                }
            }
        };
        Self {
            id: turn.id,
            name: turn.name.clone(),
            attempt: turn.attempt,
            state,
        }
    }
}
