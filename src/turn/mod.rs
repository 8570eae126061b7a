//! A chat turn: history and new messages to the model, its answer to all who follow it, both to the
//! store. Knows neither gRPC nor which store and which model it has.
//!
//! A turn is a record in the store and, at the one server that holds its lease, a task. The record
//! outlives the task, and the task its callers.
//!
//! - [`events`]: what happens in a turn, and how it is written down
//! - [`log`]: the newest events, in memory
//! - [`runner`]: one attempt at a turn, from its lease to its end
//! - [`follower`]: reads a turn's events, wherever it runs
//! - [`report`]: how it stands with a turn, for who looks at its session
//! - this file: who runs what; begins, stops and adopts turns
//!
//! # States
//!
//! The record's states and who may move it are in [`crate::store::turns::TurnStore`]. An attempt
//! goes, at its holder:
//!
//! ```text
//! leased → history → asking → storing ─▶ stored            events: started, delta…, completed
//!   │         │         │        │
//!   │         │         │        └─ the store is away: kept here, and tried again until it is
//!   │         │         │           stored, or somebody else took the turn
//!   │         │         ├─ stop: what there is goes to storing, or the turn fails as stopped
//!   │         └─────────┴─ an error: the record says why; nothing enters the history
//!   └─ at any moment: the lease is lost, the session was cleared (nothing is written any more), or
//!      this server dies (the lease runs out and the next attempt begins elsewhere)
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::{Instant, sleep},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    error::{Error, Recorded},
    history::{self, Asked},
    langchain,
    message::{Draft, Message, PAGE_BYTES_MAX, SessionId},
    metrics::{self, Outcome},
    model::{Model, Prompt},
    store::{
        self, Appended, Body, Element, Order, Page, Read, RequestKey, Sequence, Store,
        turns::{
            BeginTurn, Begun, FollowTurn, Lease, Leased, Stop, StoppedTurn, TakeTurn, Taken, Token,
            TurnId, TurnState,
        },
    },
};
use log::{End, Log};

pub use events::{Completed, Delta, Event, Started};
pub use follower::Follower;
pub use report::{Report, State};

pub mod events;
mod follower;
mod log;
mod outcome;
mod report;
mod runner;

/// Numbers of events that a server may use ahead of what it has written to the store's log.
const RESERVE: i64 = 1_000;
/// How often a call in line asks whether it is its turn.
const WAIT_POLL: Duration = Duration::from_millis(100);
/// How long the place of a call that left the line stays for who asks for the same turn at once, as
/// after a connection that broke. Whoever asks in the second half of it keeps the place.
const PLACE_GRACE: Duration = Duration::from_millis(400);
/// How often a stopped turn is looked at.
const STOP_POLL: Duration = Duration::from_millis(30);
/// How long the holder of a turn gets to stop it, before it is taken from it.
const STOP_PATIENCE: Duration = Duration::from_millis(600);
/// How long a stopped turn is waited for in all.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a call waits for a turn whose answer the store has not taken yet.
const STORE_PATIENCE: Duration = Duration::from_secs(3);
/// How often this server looks for turns whose servers have died.
const ADOPT_EVERY: Duration = Duration::from_secs(5);
/// Turns of others that this server looks at each time.
const ADOPT_MAX: usize = 16;
/// Bytes of all answers together that are kept for a store that is away: as much as a server of the
/// smallest kind can spare. 64 of the longest, or tens of thousands of usual ones.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// How often a turn is tried before it counts as failed.
const TRIES_MAX: u32 = 3;

/// What a turn is asked to do.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The new messages.
    pub drafts: Vec<Draft>,
    /// The model, system prompt, tools and options. Its messages are filled in by the turn.
    pub prompt: Prompt,
    /// How much history; if nothing is said, as the settings say.
    pub history: Asked,
    /// Whether the turn stops when nobody follows it any more.
    pub stop_on_disconnect: bool,
}

/// Reads what was asked from its bytes, which are kept with the turn so that another server can run
/// it.
pub type ParseAsk = fn(&[u8]) -> Result<Ask, Error>;

/// A client's call.
#[derive(Debug, Clone)]
pub struct Call {
    pub session: SessionId,
    pub turn_id: String,
    /// Made of the turn id and of all that is asked.
    pub key: RequestKey,
    /// What is asked; `None` to follow a turn that there is already.
    pub request: Option<Bytes>,
    /// How much history it asks for: [`Ask::history`].
    pub history: Asked,
    /// The number of the last event that the client has.
    pub resume_after: i64,
    pub on_conflict: OnConflict,
}

/// What to do when another turn runs on the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    Reject,
    Wait,
    Supersede,
}

/// How turns are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Messages of history if the client does not say.
    pub history_messages: usize,
    /// How long an attempt may take.
    pub turn_limit: Duration,
    /// How many may run at once.
    pub turns_max: usize,
    /// How long a server that says nothing keeps its turns.
    pub lease: Duration,
    /// How long a turn is remembered after its end.
    pub retention: Duration,
    /// Whether this server looks for turns whose servers have died, so that they run although nobody
    /// asks for them.
    pub adopts: bool,
    /// Bytes of answers to keep for a store that is away, all together.
    pub kept_bytes_max: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            history_messages: 50,
            turn_limit: Duration::from_secs(600),
            turns_max: 2000,
            lease: Duration::from_secs(10),
            retention: Duration::from_secs(24 * 60 * 60),
            adopts: true,
            kept_bytes_max: KEPT_BYTES_MAX,
        }
    }
}

/// Runs turns.
#[derive(Clone)]
pub struct Turns(Arc<Shared>);

struct Shared {
    store: Arc<dyn Store>,
    model: Arc<dyn Model>,
    parse: ParseAsk,
    settings: Settings,
    /// The turns that this server has.
    held: Mutex<HashMap<(SessionId, TurnId), Arc<Held>>>,
    permits: Arc<Semaphore>,
    /// Of bytes: what answers may still be kept.
    kept_bytes: Arc<Semaphore>,
    tasks: TaskTracker,
    /// Ends all turns.
    abort: CancellationToken,
    /// Since when the store can be reached; `None` if it could from the start on.
    reachable_since: Mutex<Option<Instant>>,
    /// Ends the task that looks after the turns of others.
    _tending: DropGuard,
}

/// A turn that this server has.
pub(crate) struct Held {
    session: SessionId,
    turn: TurnId,
    name: String,
    fingerprint: [u8; 16],
    log: Log,
    /// How many follow it here.
    followers: watch::Sender<usize>,
    /// Has it look at the store at once.
    poke: Notify,
}

impl Turns {
    /// Must be called within a Tokio runtime.
    pub fn new(
        store: Arc<dyn Store>,
        model: Arc<dyn Model>,
        parse: ParseAsk,
        settings: Settings,
    ) -> Self {
        let stop_tending = CancellationToken::new();
        let is_reachable = *store.reachable().borrow();
        let shared = Arc::new(Shared {
            permits: Arc::new(Semaphore::new(settings.turns_max)),
            kept_bytes: Arc::new(Semaphore::new(settings.kept_bytes_max)),
            store,
            model,
            parse,
            settings,
            held: Mutex::default(),
            tasks: TaskTracker::new(),
            abort: CancellationToken::new(),
            reachable_since: Mutex::new((!is_reachable).then(Instant::now)),
            _tending: stop_tending.clone().drop_guard(),
        });
        let tending = tend(Arc::downgrade(&shared));
        tokio::spawn(stop_tending.run_until_cancelled_owned(tending));
        Self(shared)
    }

    /// Begins a turn, or follows the one of that id. Dropping the follower does not end the turn,
    /// unless its first call asked for that.
    pub async fn chat(&self, call: Call) -> Result<Follower, Error> {
        let shared = &self.0;
        let waits_until = Instant::now() + shared.settings.turn_limit;
        let token = Token::new();
        let mut place: Option<oneshot::Sender<()>> = None;
        loop {
            if let Some(held) = self.held(&call.session, &call.key.id) {
                if call.request.is_some() && held.fingerprint != call.key.fingerprint {
                    return Err(Error::RequestReused { field: "turn_id" });
                }
                if held.log.has_ended() {
                    // Its answer is kept here until the store takes it.
                    self.wait_until_stored(&held).await?;
                    continue;
                }
                return Ok(Follower::here(self.clone(), held, call.resume_after));
            }
            let Some(request) = &call.request else {
                return self.follow(&call).await;
            };
            if shared.tasks.is_closed() {
                return Err(Error::ShuttingDown);
            }
            let Ok(permit) = shared.permits.clone().try_acquire_owned() else {
                let limit = shared.settings.turns_max;
                let found = self.follow(&call).await;
                return found.map_err(|error| match error {
                    Error::TurnNotFound { .. } => Error::TooManyTurns { limit },
                    other => other,
                });
            };
            // A caller that goes away must not keep a place in line, also if it has one by this.
            if call.on_conflict == OnConflict::Wait {
                place.get_or_insert_with(|| self.hold_place(&call));
            }
            // Nor must it leave a lease that nobody has: this runs on.
            let beginning = self
                .clone()
                .begin(call.clone(), request.clone(), token, permit);
            let begun = shared.tasks.spawn(beginning).await;
            let begun = begun.map_err(|_| Error::Internal)??;
            if !matches!(begun, Begun::Waiting { .. })
                && let Some(place) = place.take()
            {
                place.send(()).ok();
            }
            match begun {
                Begun::Leased(_) => {}
                Begun::Exists(_) => return Ok(Follower::stored(self.clone(), &call)),
                Begun::Busy {
                    turn,
                    name,
                    is_expired,
                } => {
                    if is_expired {
                        self.adopt(&call.session, turn).await?;
                    }
                    if call.on_conflict != OnConflict::Supersede {
                        return Err(Error::TurnInProgress { turn_id: name });
                    }
                    match self
                        .stop(&call.session, Some((turn, name)), Stop::Keep)
                        .await
                    {
                        Ok(_) | Err(Error::TurnNotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Begun::Waiting { expired, .. } => {
                    if let Some(turn) = expired {
                        self.adopt(&call.session, turn).await?;
                    }
                    if Instant::now() >= waits_until {
                        let limit = shared.settings.turn_limit;
                        return Err(Error::WaitedTooLong { limit });
                    }
                    sleep(WAIT_POLL).await;
                }
                Begun::LineFull => return Err(Error::LineFull),
            }
        }
    }

    /// Has the call's turn taken out of the line if what is returned is dropped unused: if the call
    /// ends, in whatever way, without its turn.
    fn hold_place(&self, call: &Call) -> oneshot::Sender<()> {
        let (place, is_used) = oneshot::channel();
        let (turns, session, turn) = (self.clone(), call.session.clone(), call.key.id);
        tokio::spawn(async move {
            if is_used.await.is_err() {
                sleep(PLACE_GRACE).await;
                let silent_ms = to_ms(PLACE_GRACE / 2);
                // If that fails, the place is lost a little later.
                let left = turns.0.store.leave_line(&session, turn, silent_ms);
                left.await.ok();
            }
        });
        place
    }

    /// Waits a little for a turn that has ended to be stored.
    async fn wait_until_stored(&self, held: &Held) -> Result<(), Error> {
        held.poke.notify_one();
        let patience_ends = Instant::now() + STORE_PATIENCE;
        while self.held(&held.session, &held.turn).is_some() {
            if Instant::now() >= patience_ends {
                return match held.log.ended() {
                    Some(End::Failed(error)) => Err(error),
                    _ => Err(Error::Internal),
                };
            }
            sleep(STOP_POLL).await;
        }
        Ok(())
    }

    /// Follows a turn that the store knows.
    async fn follow(&self, call: &Call) -> Result<Follower, Error> {
        let follow = look(call.key.id);
        let found = self.0.store.follow_turn(&call.session, follow).await?;
        if found.is_none() {
            let turn_id = call.turn_id.clone();
            return Err(Error::TurnNotFound { turn_id });
        }
        Ok(Follower::stored(self.clone(), call))
    }

    async fn begin(
        self,
        call: Call,
        request: Bytes,
        token: Token,
        permit: OwnedSemaphorePermit,
    ) -> Result<Begun, Error> {
        let lease = self.0.lease(token);
        let begin = BeginTurn {
            key: call.key,
            name: call.turn_id.clone(),
            request,
            lease,
            waits: call.on_conflict == OnConflict::Wait,
        };
        let read = history::first_read(&self.0.bounds(call.history));
        let begun = self.0.store.begin_turn_and_read(&call.session, begin, read);
        let begun = begun.await;
        let (begun, newest) = begun.map_err(|error| Error::of_write(error, "turn_id"))?;
        if let Begun::Leased(leased) = &begun {
            self.run(Run {
                session: call.session,
                turn: call.key.id,
                leased: leased.clone(),
                lease,
                permit: Mutex::new(Some(permit)),
                newest: Mutex::new(newest),
            });
        }
        Ok(begun)
    }

    /// Has a task run what was leased.
    fn run(&self, run: Run) {
        let held = Arc::new(Held {
            session: run.session.clone(),
            turn: run.turn,
            name: run.leased.name.clone(),
            fingerprint: run.leased.fingerprint,
            log: Log::new(
                run.leased.first_event,
                run.lease.reserve,
                run.leased.next_chunk,
            ),
            followers: watch::Sender::new(0),
            poke: Notify::new(),
        });
        let key = (run.session.clone(), run.turn);
        lock(&self.0.held).insert(key, Arc::clone(&held));
        metrics::attempt_begun();
        let runner = runner::Runner::new(Arc::clone(&self.0), held, run);
        self.0.tasks.spawn(runner.run());
    }

    /// Takes a turn whose lease has run out, and runs it here, if this server may.
    pub(crate) async fn adopt(&self, session: &SessionId, turn: TurnId) -> Result<(), Error> {
        let shared = &self.0;
        if shared.tasks.is_closed() || !shared.has_settled() {
            return Ok(());
        }
        let Ok(permit) = shared.permits.clone().try_acquire_owned() else {
            return Ok(());
        };
        self.take(session, turn, Some(permit)).await
    }

    /// As a task: a caller that goes away must not leave a lease that nobody has.
    async fn take(
        &self,
        session: &SessionId,
        turn: TurnId,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Error> {
        let taking = self.clone().take_and_run(session.clone(), turn, permit);
        let taken = self.0.tasks.spawn(taking).await;
        taken.map_err(|_| Error::Internal)?
    }

    /// Takes a turn and runs it here; without a permit, by force, and only to end it.
    async fn take_and_run(
        self,
        session: SessionId,
        turn: TurnId,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Error> {
        let lease = self.0.lease(Token::new());
        let abandoned = outcome::write(&Recorded::of(&Error::TurnAbandoned));
        let take = TakeTurn {
            turn,
            lease,
            by_force: permit.is_none(),
            tries_max: TRIES_MAX,
            outcome: abandoned.clone(),
        };
        let taken = self.0.store.take_turn(&session, take).await?;
        if matches!(&taken, Taken::Ended(TurnState::Failed { outcome }) if *outcome == abandoned) {
            metrics::turn_ended(Outcome::Abandoned);
        }
        if let Taken::Leased(leased) = taken {
            tracing::info!(attempt = leased.attempt, "a turn is taken over here");
            if permit.is_some() {
                metrics::turn_adopted();
            }
            self.run(Run {
                session,
                turn,
                leased,
                lease,
                permit: Mutex::new(permit),
                newest: Mutex::default(),
            });
        }
        Ok(())
    }

    /// Stops a turn, or the one that runs, and returns its id and what was stored of it.
    pub async fn stop(
        &self,
        session: &SessionId,
        turn: Option<(TurnId, String)>,
        stop: Stop,
    ) -> Result<(String, Vec<(Sequence, Message)>), Error> {
        let id = turn.as_ref().map(|(id, _)| *id);
        let found = self.0.store.stop_turn(session, id, stop).await?;
        let Some(StoppedTurn {
            turn,
            name,
            mut state,
        }) = found
        else {
            let turn_id = turn.map(|(_, name)| name).unwrap_or_default();
            return Err(Error::TurnNotFound { turn_id });
        };
        if let Some(held) = self.held(session, &turn) {
            held.poke.notify_one();
        }
        let asked_at = Instant::now();
        let mut is_seized = false;
        loop {
            match state {
                TurnState::Running { .. } => {}
                TurnState::Completed { appended, .. } => {
                    return Ok((name, self.stored(session, appended).await?));
                }
                TurnState::Failed { .. } => return Ok((name, Vec::new())),
            }
            if asked_at.elapsed() >= STOP_LIMIT {
                let reason = format!("the turn did not end within {STOP_LIMIT:?}");
                return Err(store::Error::Unavailable(reason).into());
            }
            if asked_at.elapsed() >= STOP_PATIENCE && !is_seized {
                // Its holder is dead or stalls: it is ended from here, with what is in its log.
                is_seized = true;
                self.take(session, turn, None).await?;
            }
            sleep(STOP_POLL).await;
            let found = self.0.store.follow_turn(session, look(turn)).await?;
            state = found.ok_or(store::Error::Cleared)?.state;
        }
    }

    /// What was asked of a turn, from its request's bytes.
    pub fn question(&self, request: &[u8]) -> Result<Vec<Draft>, Error> {
        Ok((self.0.parse)(request)?.drafts)
    }

    /// What the last attempt at a turn has said, as far as it is in its log.
    pub async fn said(&self, session: &SessionId, turn: TurnId) -> Result<Draft, Error> {
        let answer = runner::read_answer(&*self.0.store, session, turn).await?;
        Ok(answer.draft())
    }

    /// Takes no more turns and waits for the running ones to end.
    pub async fn finish(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Takes no more turns and gives the running ones up, for other servers to run.
    pub fn abort(&self) {
        self.0.tasks.close();
        self.0.abort.cancel();
    }

    /// The model that answers if a turn names none.
    pub fn default_model(&self) -> &str {
        self.0.model.default_model()
    }

    /// How many turns run now.
    pub fn running(&self) -> usize {
        lock(&self.0.held).len()
    }

    pub(crate) fn held(&self, session: &SessionId, turn: &TurnId) -> Option<Arc<Held>> {
        let key = (session.clone(), *turn);
        lock(&self.0.held).get(&key).cloned()
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &*self.0.store
    }

    /// The stored messages of a turn.
    pub(crate) async fn stored(
        &self,
        session: &SessionId,
        appended: Appended,
    ) -> Result<Vec<(Sequence, Message)>, Error> {
        let mut messages = Vec::with_capacity(appended.count);
        let end = appended.first_sequence + appended.count as Sequence;
        while messages.len() < appended.count {
            let next = appended.first_sequence + messages.len() as Sequence;
            let read = Read {
                order: Order::OldestFirst,
                after: next - 1,
                before: Some(end),
                last: None,
                limit: appended.count - messages.len(),
                bytes_max: PAGE_BYTES_MAX,
            };
            let page = self.0.store.read(session, read).await?;
            if page.elements.is_empty() {
                // Somebody deleted them since.
                return Err(store::Error::Cleared.into());
            }
            for element in &page.elements {
                let message = read_message(element).ok_or(Error::Internal)?;
                messages.push((element.sequence, message));
            }
        }
        Ok(messages)
    }
}

/// A turn to run here.
struct Run {
    session: SessionId,
    turn: TurnId,
    leased: Leased,
    lease: Lease,
    /// Given back when it is `None`; never there for a turn that only has to be ended.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    /// What was read of the history when it was leased, for the runner to take.
    newest: Mutex<Option<Page>>,
}

impl Shared {
    /// How much history a turn gets that asks for this.
    fn bounds(&self, asked: Asked) -> Asked {
        if asked != Asked::default() {
            return asked;
        }
        Asked {
            messages: Some(self.settings.history_messages),
            ..asked
        }
    }

    fn lease(&self, token: Token) -> Lease {
        Lease {
            token,
            lease_ms: to_ms(self.settings.lease),
            retention_ms: to_ms(self.settings.retention),
            reserve: RESERVE,
        }
    }

    /// Whether the store could be reached for as long as a lease lasts. After it was away, the
    /// holders of turns get this long to come back before their turns are taken from them.
    fn has_settled(&self) -> bool {
        match *lock(&self.reachable_since) {
            Some(since) => since.elapsed() >= self.settings.lease,
            None => true,
        }
    }
}

/// Looks after what others leave: notes when the store comes back, and adopts orphaned turns.
async fn tend(shared: Weak<Shared>) {
    let Some(mut reachable) = shared.upgrade().map(|shared| shared.store.reachable()) else {
        return;
    };
    loop {
        let pause = ADOPT_EVERY.mul_f64(rand::random_range(0.6..1.0));
        let changed = tokio::time::timeout(pause, reachable.changed()).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        match changed {
            Ok(Ok(())) => {
                *lock(&shared.reachable_since) = Some(Instant::now());
                continue;
            }
            // The store has stopped watching itself.
            Ok(Err(_)) => sleep(pause).await,
            Err(_) => {}
        }
        if shared.settings.adopts && shared.has_settled() && *shared.store.reachable().borrow() {
            let turns = Turns(shared);
            match turns.0.store.orphaned_turns(ADOPT_MAX).await {
                Ok(orphans) => {
                    for (session, turn) in orphans {
                        if let Err(error) = turns.adopt(&session, turn).await {
                            tracing::warn!(reason = &*error.reason(), "cannot adopt a turn");
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "cannot look for orphaned turns"),
            }
        }
    }
}

/// Asks for a turn's state only.
fn look(turn: TurnId) -> FollowTurn {
    FollowTurn {
        turn,
        from_chunk: u32::MAX,
        bytes_max: 0,
        is_noted: false,
    }
}

fn to_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside stays right when a thread panics: each change is one step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_message(element: &Element) -> Option<Message> {
    match &element.body {
        Body::Bytes(bytes) => langchain::decode(bytes).ok(),
        Body::TooLarge(_) => None,
    }
}
