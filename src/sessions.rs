//! Sessions as a whole: looks at them, changes them, rewinds and forks them, over a store and its
//! turns. Knows neither gRPC nor which store it has.

use std::sync::Arc;

use crate::{
    error::Error,
    langchain,
    message::{Draft, SessionId, UnixMillis},
    store::{
        Body, Order, Read, Store,
        sessions::{
            Fork, Forked, ListRecent, Look, REWINDS_MAX, RecentPage, Rewind, Rewound, Seen, Update,
        },
        turns::Stop,
    },
    turn::{Report, State, Turns},
};

/// How often a turn that is in the way of a rewind is stopped, at most: others may begin new ones.
const STOPS_MAX: usize = 5;

/// Sessions of one store.
#[derive(Clone)]
pub struct Sessions {
    store: Arc<dyn Store>,
    turns: Turns,
}

/// All there is to know of a session.
#[derive(Debug, Clone, PartialEq)]
pub struct Portrait {
    pub seen: Seen,
    /// When its oldest and its newest message were stored, as far as they say.
    pub first_time_ms: Option<UnixMillis>,
    pub last_time_ms: Option<UnixMillis>,
    pub turn: Option<Scene>,
}

/// All there is to know of a turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    pub report: Report,
    /// What was asked, unless the turn has completed.
    pub question: Vec<Draft>,
    /// What had been said when it failed.
    pub said: Option<Draft>,
}

impl Sessions {
    pub fn new(store: Arc<dyn Store>, turns: Turns) -> Self {
        Self { store, turns }
    }

    /// Looks at a session closely.
    pub async fn get(&self, session: &SessionId) -> Result<Portrait, Error> {
        let look = Look {
            with_request: true,
            ..Look::default()
        };
        let seen = self.store.look(session, look).await?;
        if seen.count == 0 && seen.turn.is_none() {
            return Err(not_found(session));
        }
        let turn = match &seen.turn {
            None => None,
            Some(turn) => {
                let report = Report::of(turn);
                let question = match &turn.request {
                    Some(request) => self.turns.question(request)?,
                    None => Vec::new(),
                };
                let said = match report.state {
                    State::Failed { .. } => Some(self.turns.said(session, turn.id).await?),
                    State::Running | State::Completed { .. } => None,
                };
                Some(Scene {
                    report,
                    question,
                    said: said.filter(|said| *said != Draft::text(said.role.clone(), "")),
                })
            }
        };
        Ok(Portrait {
            first_time_ms: self.time(session, Order::OldestFirst, &seen).await?,
            last_time_ms: self.time(session, Order::NewestFirst, &seen).await?,
            seen,
            turn,
        })
    }

    /// When the first message in this order was stored, if it says so.
    async fn time(
        &self,
        session: &SessionId,
        order: Order,
        seen: &Seen,
    ) -> Result<Option<UnixMillis>, Error> {
        if seen.count == 0 {
            return Ok(None);
        }
        let read = Read {
            order,
            after: 0,
            before: None,
            last: None,
            limit: 1,
            bytes_max: 0,
        };
        let page = self.store.read(session, read).await?;
        Ok(page
            .elements
            .first()
            .and_then(|element| match &element.body {
                Body::Bytes(bytes) => langchain::decode(bytes).ok()?.create_time_ms,
                Body::TooLarge(_) => None,
            }))
    }

    /// Changes what is said of a session.
    pub async fn update(&self, session: &SessionId, update: Update) -> Result<Seen, Error> {
        let seen = self.store.update_session(session, update).await?;
        seen.ok_or_else(|| not_found(session))
    }

    pub async fn list(&self, list: ListRecent) -> Result<RecentPage, Error> {
        Ok(self.store.list_sessions(list).await?)
    }

    /// Deletes the messages after a sequence; says how many. A turn that runs is in the way, or is
    /// stopped and dropped.
    pub async fn rewind(
        &self,
        session: &SessionId,
        rewind: Rewind,
        stops_turn: bool,
    ) -> Result<i64, Error> {
        for stops in 0.. {
            let rewound = self.store.rewind(session, rewind).await;
            match rewound.map_err(|error| Error::of_write(error, "request_id"))? {
                Rewound::Done { count } => return Ok(count),
                Rewound::Busy { turn, name } if stops_turn && stops < STOPS_MAX => {
                    let stopped = self
                        .turns
                        .stop(session, Some((turn, name)), Stop::Discard)
                        .await;
                    match stopped {
                        // It has ended meanwhile, or is gone with its session.
                        Ok(_) | Err(Error::TurnNotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Rewound::Busy { name, .. } => return Err(Error::TurnInProgress { turn_id: name }),
                Rewound::TooMany => break,
            }
        }
        Err(Error::TooManyRewinds { limit: REWINDS_MAX })
    }

    /// Copies a session into a new one.
    pub async fn fork(&self, session: &SessionId, fork: Fork) -> Result<Seen, Error> {
        let to = fork.to.clone();
        match self.store.fork(session, fork).await? {
            Forked::Done(seen) => Ok(*seen),
            Forked::Empty => Err(not_found(session)),
            Forked::Exists => Err(Error::SessionExists {
                session_id: to.to_string(),
            }),
            Forked::Changed => Err(crate::store::Error::Cleared.into()),
        }
    }
}

fn not_found(session: &SessionId) -> Error {
    Error::SessionNotFound {
        session_id: session.to_string(),
    }
}
