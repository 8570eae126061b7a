//! One run of the simulation: its store, its model, its clients, and what must hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chat_memory::{
    error::Error,
    langchain,
    message::{Draft, Message, Role, SessionId},
    model::{self, End, FinishReason, Model, Piece, Pieces, Prompt},
    store::{
        self, Append, Appended, Bell, Body, Element, Epoch, List, Order, Page, Read, RequestKey,
        Sequence, SessionsPage, Store,
        ledger::{self, Record, Slot, Table},
        sessions::{
            Fork, Forked, ListRecent, Look, RecentPage, Rewind, Rewound, Seen, SessionStore, Update,
        },
        turns::{
            BeginTurn, Begun, Chunk, EndTurn, FollowTurn, Followed, KeepTurn, Kept, Stop,
            StoppedTurn, TakeTurn, Taken, Token, TurnId, TurnState, TurnStore,
        },
    },
    turn::{Ask, Call, Completed, Event, OnConflict, Settings, Turns},
};
use futures_util::stream;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

/// How long a run may take to come to rest once nothing fails any more.
const REST_LIMIT: Duration = Duration::from_secs(120);
/// When a replica is told of orphans: at multiples of this. The replicas ask at random times, which
/// do not follow from the seed; so far apart, they make no difference.
const ORPHANS_EVERY_MS: u64 = 8_000;
/// The clock of the store at the start.
const START_MS: i64 = 1_000_000;

/// What came of a run.
pub struct Found {
    /// The promises that were broken.
    pub faults: Vec<String>,
    pub tally: Tally,
    /// The same for two runs of a seed.
    pub trace: Vec<String>,
}

/// How often what happened.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }

    /// Those that every long simulation must have.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let wanted = [
            "completed",
            "interrupted",
            "failed",
            "taken",
            "lease lost",
            "cleared",
            "late",
            "resumed",
            "seen to the end",
        ];
        wanted
            .map(|what| (what, self.0.get(what).copied().unwrap_or(0)))
            .into_iter()
    }
}

/// What the store keeps.
#[derive(Default)]
struct Db {
    slot: Slot,
    records: BTreeMap<TurnId, Record>,
    requests: BTreeMap<TurnId, Bytes>,
    chunks: BTreeMap<(TurnId, u32), Bytes>,
    messages: BTreeMap<Sequence, Bytes>,
    last_sequence: Sequence,
    epoch: i64,
}

impl Table for Db {
    fn slot(&self) -> store::Result<Slot> {
        Ok(self.slot.clone())
    }

    fn set_slot(&mut self, slot: &Slot) -> store::Result<()> {
        self.slot = slot.clone();
        Ok(())
    }

    fn record(&self, turn: &TurnId) -> store::Result<Option<Record>> {
        Ok(self.records.get(turn).cloned())
    }

    fn set_record(&mut self, record: &Record) -> store::Result<()> {
        self.records.insert(record.turn, record.clone());
        Ok(())
    }

    fn request(&self, turn: &TurnId) -> store::Result<Bytes> {
        Ok(self.requests.get(turn).cloned().unwrap_or_default())
    }

    fn set_request(&mut self, turn: &TurnId, request: Option<&Bytes>) -> store::Result<()> {
        match request {
            Some(request) => drop(self.requests.insert(*turn, request.clone())),
            None => drop(self.requests.remove(turn)),
        }
        Ok(())
    }

    fn add_chunk(&mut self, turn: &TurnId, chunk: &Chunk) -> store::Result<()> {
        self.chunks
            .insert((*turn, chunk.index), chunk.bytes.clone());
        Ok(())
    }

    fn delete_chunks(&mut self, turn: &TurnId) -> store::Result<()> {
        self.chunks.retain(|(of, _), _| of != turn);
        Ok(())
    }

    fn append(&mut self, elements: &[Bytes], time_ms: i64) -> store::Result<Appended> {
        let first_sequence = self.last_sequence + 1;
        for element in elements {
            self.last_sequence += 1;
            self.messages.insert(self.last_sequence, element.clone());
        }
        Ok(Appended {
            first_sequence,
            count: elements.len(),
            time_ms,
            repeated: false,
        })
    }
}

/// An answer of the model.
struct Said {
    text: String,
    is_complete: bool,
}

/// All of a run that is shared.
struct State {
    db: Db,
    seed: u64,
    /// For the schedule. What runs beside it has rngs of its own: Tokio does not promise an order.
    rng: StdRng,
    /// Of a hundred store calls, how many meet a fault.
    faulty: u32,
    /// The epoch in which each lease was given, and its turn.
    leases: Vec<(Token, TurnId, i64)>,
    said: BTreeMap<String, Vec<Said>>,
    /// What was shown under each number of a turn.
    shown: BTreeMap<(String, i64), String>,
    /// Turns that somebody was told to be stored.
    promised: BTreeSet<(i64, String)>,
    faults: Vec<String>,
    trace: Vec<String>,
    tally: Tally,
    start: Instant,
}

#[derive(Clone)]
struct World(Arc<Mutex<State>>);

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let faulty = [0, 5, 20][rng.random_range(0..3)];
        Self(Arc::new(Mutex::new(State {
            db: Db::default(),
            seed,
            rng,
            faulty,
            leases: Vec::new(),
            said: BTreeMap::new(),
            shown: BTreeMap::new(),
            promised: BTreeSet::new(),
            faults: Vec::new(),
            trace: Vec::new(),
            tally: Tally::default(),
            start: Instant::now(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn below(&self, limit: u64) -> u64 {
        self.state().rng.random_range(0..limit)
    }

    fn chance(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn ms(&self, limit: u64) -> Duration {
        Duration::from_millis(self.below(limit))
    }

    fn epoch(&self) -> i64 {
        self.state().db.epoch
    }
}

impl State {
    /// An rng for what happens now.
    fn rng_for(&self, what: impl Hash, number: usize) -> StdRng {
        let mut hasher = DefaultHasher::new();
        (self.seed, self.elapsed_ms(), what, number).hash(&mut hasher);
        StdRng::seed_from_u64(hasher.finish())
    }

    fn elapsed_ms(&self) -> i64 {
        self.start.elapsed().as_millis() as i64
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.0.entry(what).or_default() += 1;
    }

    fn note(&mut self, what: impl AsRef<str>) {
        let line = format!("{:>6} ms: {}", self.elapsed_ms(), what.as_ref());
        self.trace.push(line);
    }

    fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            let fault = format!("{} ms: {}", self.elapsed_ms(), what());
            self.faults.push(fault);
        }
    }

    /// Notes a lease: a completed turn never has a new one.
    fn leased(&mut self, token: Token, turn: TurnId, was_completed: bool) {
        if !self.leases.iter().any(|(known, ..)| *known == token) {
            self.check(!was_completed, || "a completed turn runs again".to_owned());
            let epoch = self.db.epoch;
            self.leases.push((token, turn, epoch));
        }
    }

    fn is_completed(&self, turn: &TurnId) -> bool {
        let record = self.db.records.get(turn);
        record.is_some_and(|record| matches!(record.state, ledger::State::Completed { .. }))
    }

    fn end(&mut self, end: &EndTurn, now_ms: i64) -> store::Result<TurnState> {
        let last_sequence = self.db.last_sequence;
        let ended = ledger::end(&mut self.db, end, now_ms);
        if self.db.last_sequence > last_sequence {
            // A lease of an earlier time, or one that somebody took, stores nothing.
            let last = self
                .leases
                .iter()
                .rev()
                .find(|(_, turn, _)| *turn == end.turn);
            let is_last = last
                .is_some_and(|(token, _, epoch)| *token == end.token && *epoch == self.db.epoch);
            self.check(is_last, || "a turn is stored by who lost it".to_owned());
        }
        match &ended {
            Ok(TurnState::Completed { .. }) => self.count("completed"),
            Ok(_) => self.count("failed"),
            Err(_) => {}
        }
        ended
    }
}

/// Whether a replica goes on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gate {
    Open,
    Paused,
    Crashed,
}

/// What a replica reaches the rest of the world through.
#[derive(Clone)]
struct Link {
    world: World,
    gate: watch::Receiver<Gate>,
    replica: usize,
    reachable: watch::Sender<bool>,
}

/// What happens to a store call.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Done,
    NotDone,
    AnswerLost,
    Repeated,
    RepeatedLate,
}

impl Link {
    async fn pass(&self) {
        let mut gate = self.gate.clone();
        let is_open = gate.wait_for(|gate| *gate == Gate::Open).await.is_ok();
        if !is_open {
            std::future::pending::<()>().await;
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        name: &'static str,
        turn: Option<TurnId>,
        is_write: bool,
        step: impl Fn(&mut State, i64) -> store::Result<T> + Send + 'static,
    ) -> store::Result<T> {
        self.pass().await;
        let (fate, delays) = {
            let state = self.world.state();
            let mut rng = state.rng_for((name, turn), self.replica);
            let is_faulty = rng.random_range(0..100) < state.faulty;
            let fates = [
                Fate::NotDone,
                Fate::AnswerLost,
                Fate::Repeated,
                Fate::RepeatedLate,
            ];
            // A begin that is repeated after its answer and a clear begins its turn once more.
            let known = if name == "begin" { 3 } else { 4 };
            let fate = match (is_faulty, is_write) {
                (false, _) => Fate::Done,
                (true, true) => fates[rng.random_range(0..known)],
                (true, false) => Fate::NotDone,
            };
            let delays = [20, 20, 20, 3_000];
            (
                fate,
                delays.map(|limit| Duration::from_millis(rng.random_range(0..limit))),
            )
        };
        let [before, after, late, repeated] = delays;
        sleep(before).await;
        if *self.gate.borrow() != Gate::Open {
            self.world.state().count("late");
            self.pass().await;
            sleep(late).await;
        }
        if fate == Fate::NotDone {
            return Err(store::Error::Unavailable("by the simulation".to_owned()));
        }
        let apply = {
            let replica = self.replica;
            move |state: &mut State| {
                let now_ms = START_MS + state.elapsed_ms();
                let done = step(state, now_ms);
                let verdict = done
                    .as_ref()
                    .err()
                    .map_or("ok".to_owned(), |e| e.to_string());
                state.note(format!("{replica} {name} {fate:?}: {verdict}"));
                if matches!(done, Err(store::Error::LeaseLost)) {
                    state.count("lease lost");
                }
                done
            }
        };
        let mut done = apply(&mut self.world.state());
        if fate == Fate::Repeated {
            done = apply(&mut self.world.state());
        }
        if fate == Fate::RepeatedLate {
            let world = self.world.clone();
            tokio::spawn(async move {
                sleep(repeated).await;
                let _ = apply(&mut world.state());
            });
        }
        sleep(after).await;
        self.pass().await;
        if fate == Fate::AnswerLost {
            return Err(store::Error::OutcomeUnknown("by the simulation".to_owned()));
        }
        done
    }
}

#[async_trait]
impl TurnStore for Link {
    async fn begin_turn(&self, _: &SessionId, begin: BeginTurn) -> store::Result<Begun> {
        self.call("begin", Some(begin.key.id), true, move |state, now_ms| {
            let was_completed = state.is_completed(&begin.key.id);
            let begun = ledger::begin(&mut state.db, &begin, now_ms);
            if let Ok(Begun::Leased(_)) = &begun {
                state.leased(begin.lease.token, begin.key.id, was_completed);
            }
            begun
        })
        .await
    }

    async fn leave_line(&self, _: &SessionId, turn: TurnId, silent_ms: i64) -> store::Result<()> {
        self.call("leave", Some(turn), true, move |state, now_ms| {
            ledger::leave_line(&mut state.db, &turn, silent_ms, now_ms)
        })
        .await
    }

    async fn take_turn(&self, _: &SessionId, take: TakeTurn) -> store::Result<Taken> {
        self.call("take", Some(take.turn), true, move |state, now_ms| {
            let was_completed = state.is_completed(&take.turn);
            let taken = ledger::take(&mut state.db, &take, now_ms);
            if let Ok(Taken::Leased(_)) = &taken {
                state.leased(take.lease.token, take.turn, was_completed);
                state.count("taken");
            }
            taken
        })
        .await
    }

    async fn keep_turn(&self, _: &SessionId, keep: KeepTurn) -> store::Result<Kept> {
        self.call("keep", Some(keep.turn), true, move |state, now_ms| {
            ledger::keep(&mut state.db, &keep, now_ms)
        })
        .await
    }

    async fn end_turn(&self, _: &SessionId, end: EndTurn) -> store::Result<TurnState> {
        self.call("end", Some(end.turn), true, move |state, now_ms| {
            state.end(&end, now_ms)
        })
        .await
    }

    async fn stop_turn(
        &self,
        _: &SessionId,
        turn: Option<TurnId>,
        stop: Stop,
    ) -> store::Result<Option<StoppedTurn>> {
        self.call("stop", turn, true, move |state, now_ms| {
            ledger::stop(&mut state.db, turn, stop, now_ms)
        })
        .await
    }

    async fn follow_turn(
        &self,
        _: &SessionId,
        follow: FollowTurn,
    ) -> store::Result<Option<Followed>> {
        self.call("follow", Some(follow.turn), false, move |state, now_ms| {
            let Some(mut record) = ledger::known(&state.db, &follow.turn, now_ms)? else {
                return Ok(None);
            };
            if follow.is_noted && record.is_running() {
                record.followed_ms = Some(now_ms);
                state.db.set_record(&record)?;
            }
            let from = follow.from_chunk.max(record.first_chunk);
            let mut followed = Followed {
                state: record.view(now_ms),
                chunks: Vec::new(),
                next_chunk: from,
                more: false,
            };
            let mut bytes = 0;
            let range = (follow.turn, from)..(follow.turn, record.next_chunk.max(from));
            for (_, chunk) in state.db.chunks.range(range) {
                bytes += chunk.len();
                if bytes > follow.bytes_max && !followed.chunks.is_empty() {
                    break;
                }
                followed.chunks.push(chunk.clone());
                followed.next_chunk += 1;
            }
            followed.more = followed.next_chunk < record.next_chunk;
            Ok(Some(followed))
        })
        .await
    }

    async fn orphaned_turns(&self, limit: usize) -> store::Result<Vec<(SessionId, TurnId)>> {
        let start = self.world.state().start;
        let elapsed_ms = start.elapsed().as_millis() as u64;
        let next_ms = (elapsed_ms / ORPHANS_EVERY_MS + 1) * ORPHANS_EVERY_MS;
        sleep_until(start + Duration::from_millis(next_ms + self.replica as u64)).await;
        self.call("orphans", None, false, move |state, now_ms| {
            let running = state
                .db
                .records
                .values()
                .filter(|record| record.is_running());
            let orphans = running.filter(|record| record.expires_ms <= now_ms);
            Ok(orphans
                .map(|record| (session(), record.turn))
                .take(limit)
                .collect())
        })
        .await
    }
}

#[async_trait]
impl SessionStore for Link {
    async fn look(&self, _: &SessionId, _: Look) -> store::Result<Seen> {
        unreachable!("no turn looks at sessions")
    }

    async fn update_session(&self, _: &SessionId, _: Update) -> store::Result<Option<Seen>> {
        unreachable!("no turn changes what is said of sessions")
    }

    async fn list_sessions(&self, _: ListRecent) -> store::Result<RecentPage> {
        unreachable!("no turn lists sessions")
    }

    async fn rewind(&self, _: &SessionId, _: Rewind) -> store::Result<Rewound> {
        unreachable!("no turn rewinds")
    }

    async fn fork(&self, _: &SessionId, _: Fork) -> store::Result<Forked> {
        unreachable!("no turn forks")
    }

    fn bell(&self, _: &SessionId) -> Bell {
        unreachable!("no turn watches")
    }
}

#[async_trait]
impl Store for Link {
    async fn append(&self, _: &SessionId, _: Append) -> store::Result<Appended> {
        unreachable!("turns store with their end")
    }

    async fn read(&self, _: &SessionId, read: Read) -> store::Result<Page> {
        self.call("read", None, false, move |state, _| {
            let db = &state.db;
            let before = read.before.unwrap_or(db.last_sequence + 1);
            let in_range = db
                .messages
                .range(read.after + 1..before.max(read.after + 1));
            let mut elements: Vec<_> = in_range
                .map(|(sequence, bytes)| Element {
                    sequence: *sequence,
                    body: Body::Bytes(bytes.clone()),
                })
                .collect();
            if read.order == Order::NewestFirst {
                elements.reverse();
            }
            let more = elements.len() > read.limit;
            elements.truncate(read.limit);
            Ok(Page {
                elements,
                more,
                after: read.after,
                before,
                last_sequence: db.last_sequence,
                epoch: Epoch(db.epoch),
            })
        })
        .await
    }

    async fn clear(&self, _: &SessionId) -> store::Result<i64> {
        self.call("clear", None, false, |state, _| {
            state.count("cleared");
            let cleared = Db {
                last_sequence: state.db.last_sequence,
                epoch: state.db.epoch + 1,
                ..Db::default()
            };
            let before = std::mem::replace(&mut state.db, cleared);
            Ok(before.messages.len() as i64)
        })
        .await
    }

    async fn sessions(&self, _: List) -> store::Result<SessionsPage> {
        unreachable!("no turn lists sessions")
    }

    async fn expire(&self, _: &SessionId, _: i64) -> store::Result<bool> {
        Ok(false)
    }

    fn reachable(&self) -> watch::Receiver<bool> {
        self.reachable.subscribe()
    }

    fn describe(&self) -> String {
        "a simulation".to_owned()
    }
}

#[async_trait]
impl Model for Link {
    async fn answer(&self, prompt: Prompt) -> model::Result<Pieces> {
        self.pass().await;
        let question = prompt.messages.last().map(|draft| draft.content.text());
        let name = question.unwrap_or_default();
        let broken = || model::Error::Broken("by the simulation".to_owned());
        let (nth, pieces, breaks_at) = {
            let mut state = self.world.state();
            let said = state.said.entry(name.clone()).or_default();
            said.push(Said {
                text: String::new(),
                is_complete: false,
            });
            let nth = said.len() - 1;
            let turn = key(&name).id;
            let leases = state.leases.iter().filter(|(_, of, _)| *of == turn).count();
            state.check(nth < leases, || {
                format!(
                    "{name}: the model is asked {} times for {leases} leases",
                    nth + 1
                )
            });
            // A conversation is whole turns: question, answer, question, answer.
            let is_whole = prompt.messages.len() % 2 == 1;
            state.check(is_whole, || {
                format!("{name}: the history holds half a turn")
            });
            let replica = self.replica;
            state.note(format!("{replica} asks {name}"));
            let mut rng = state.rng_for(&*name, nth);
            let breaks = rng.random_range(0..10) == 0;
            let pieces = rng.random_range(1..8);
            let breaks_at = breaks.then(|| rng.random_range(0..pieces));
            (nth, pieces, breaks_at)
        };
        if breaks_at == Some(0) {
            return Err(broken());
        }
        let link = self.clone();
        let pieces = stream::unfold(0, move |index| {
            let (link, name) = (link.clone(), name.clone());
            async move {
                if index > pieces {
                    return None;
                }
                let mut rng = link.world.state().rng_for(&*name, index);
                sleep(Duration::from_millis(rng.random_range(0..300))).await;
                link.pass().await;
                if breaks_at == Some(index) {
                    return Some((Err(broken()), pieces + 1));
                }
                let mut state = link.world.state();
                let said = &mut state.said.get_mut(&name).unwrap()[nth];
                if index == pieces {
                    said.is_complete = true;
                    let end = End {
                        finish_reason: FinishReason::Stop,
                        usage: None,
                        tool_calls: Vec::new(),
                    };
                    return Some((Ok(Piece::End(end)), index + 1));
                }
                let text = format!("{name}/{nth}/{index} ");
                said.text.push_str(&text);
                Some((Ok(Piece::Text(text)), index + 1))
            }
        });
        Ok(Box::pin(pieces))
    }

    fn default_model(&self) -> &str {
        "simulated"
    }

    fn describe(&self) -> String {
        "a simulation".to_owned()
    }
}

struct Replica {
    turns: Turns,
    link: Link,
    gate: watch::Sender<Gate>,
}

impl Replica {
    fn new(world: &World, replica: usize) -> Self {
        let (gate, is_open) = watch::channel(Gate::Open);
        let link = Link {
            world: world.clone(),
            gate: is_open,
            replica,
            reachable: watch::Sender::new(true),
        };
        let settings = Settings {
            turn_limit: Duration::from_secs(30),
            turns_max: 20,
            lease: Duration::from_secs(1),
            ..Settings::default()
        };
        let (store, model) = (Arc::new(link.clone()), Arc::new(link.clone()));
        Self {
            turns: Turns::new(store, model, parse, settings),
            link,
            gate,
        }
    }

    fn is_crashed(&self) -> bool {
        *self.gate.borrow() == Gate::Crashed
    }

    async fn crashed(&self) {
        let mut gate = self.gate.subscribe();
        let _ = gate.wait_for(|gate| *gate == Gate::Crashed).await;
    }
}

fn session() -> SessionId {
    SessionId::parse("s").unwrap()
}

fn key(name: &str) -> RequestKey {
    RequestKey::new("turn", name, name.as_bytes())
}

/// Ends the request of a turn that stops without followers.
const STOPS: &str = " stops";

/// A turn asks its own name.
fn parse(request: &[u8]) -> Result<Ask, Error> {
    let request = str::from_utf8(request).map_err(|_| Error::Internal)?;
    let question = request.trim_end_matches(STOPS);
    Ok(Ask {
        stop_on_disconnect: question != request,
        drafts: vec![Draft::text(Role::User, question)],
        prompt: Prompt {
            model: None,
            system: None,
            messages: Vec::new(),
            tools: Vec::new(),
            options: model::Options::default(),
        },
        history: Default::default(),
    })
}

/// A client that wants a turn, and what it has of it.
struct Client {
    world: World,
    rng: StdRng,
    replicas: Arc<Vec<Replica>>,
    /// It gives up when the session is cleared.
    epoch: i64,
    name: String,
    taken: i64,
    /// What each attempt said.
    attempts: Vec<String>,
    is_done: bool,
}

impl Client {
    fn below(&mut self, limit: u64) -> u64 {
        self.rng.random_range(0..limit)
    }

    async fn run(mut self) {
        let tries = 1 + self.below(5);
        for index in 0..tries {
            if self.world.epoch() != self.epoch || self.is_done {
                return;
            }
            let replicas = Arc::clone(&self.replicas);
            let living: Vec<_> = replicas.iter().filter(|it| !it.is_crashed()).collect();
            let replica = living[self.below(living.len() as u64) as usize];
            let patience = match self.below(100) < 40 {
                true => Duration::from_millis(self.below(1_500)),
                false => REST_LIMIT,
            };
            if index > 0 && self.taken > 0 {
                self.world.state().count("resumed");
            }
            tokio::select! {
                biased;
                () = replica.crashed() => {}
                () = self.talk(&replica.turns) => {}
                () = sleep(patience) => {
                    let world = self.world.clone();
                    world.state().check(patience < REST_LIMIT, || "a call does not end".to_owned());
                }
            }
            let pause = Duration::from_millis(self.below(400));
            sleep(pause).await;
        }
    }

    async fn talk(&mut self, turns: &Turns) {
        let call = {
            let stops = ["", STOPS][usize::from(self.below(100) < 25)];
            let request = Bytes::from(format!("{}{stops}", self.name));
            let conflicts = [OnConflict::Reject, OnConflict::Wait, OnConflict::Supersede];
            Call {
                session: session(),
                turn_id: self.name.clone(),
                key: key(&self.name),
                request: (self.below(100) >= 15).then_some(request),
                history: Default::default(),
                resume_after: self.taken,
                on_conflict: conflicts[self.below(3) as usize],
            }
        };
        let mut follower = match turns.chat(call).await {
            Ok(follower) => follower,
            Err(error) => return self.refused(&error),
        };
        loop {
            let next = follower.next().await;
            if self.world.epoch() != self.epoch {
                return;
            }
            match next {
                Some(Ok((number, event))) => self.see(number, event),
                Some(Err(error)) => return self.refused(&error),
                None => {
                    let is_done = self.is_done;
                    let name = self.name.clone();
                    let mut state = self.world.state();
                    return state.check(is_done, || format!("{name}: its end was not shown"));
                }
            }
        }
    }

    /// Errors that no fault here explains.
    fn refused(&self, error: &Error) {
        let is_odd = matches!(
            error,
            Error::InvalidField(_)
                | Error::RequestReused { .. }
                | Error::AnswerTooLarge { .. }
                | Error::HistoryTooLarge { .. }
                | Error::WindowTooSmall { .. }
                | Error::Internal
                | Error::Store(store::Error::Corrupt(_) | store::Error::RequestReused)
        );
        let name = &self.name;
        let mut state = self.world.state();
        state.note(format!("{name} ends: {error}"));
        state.check(!is_odd, || format!("{name}: {error:?}"));
    }

    fn see(&mut self, number: i64, event: Event) {
        let world = self.world.clone();
        let mut state = world.state();
        let (name, taken) = (self.name.clone(), self.taken);
        state.check(number > taken, || format!("{name}: {number} after {taken}"));
        state.check(!self.is_done, || format!("{name}: {number} after its end"));
        let shown = match &event {
            Event::Started(_) | Event::Delta(_) => format!("{event:?}"),
            Event::Completed(completed) => {
                let texts = completed.messages.iter().map(|(sequence, message)| {
                    (*sequence, message.draft.content.text(), message.interrupted)
                });
                format!("{:?}", texts.collect::<Vec<_>>())
            }
        };
        state.note(format!("{name} shows {number}: {shown}"));
        let known = state
            .shown
            .entry((name.clone(), number))
            .or_insert_with(|| shown.clone());
        let known = known.clone();
        state.check(known == shown, || {
            format!("{name}: {number} is {known} and {shown}")
        });
        self.taken = number;
        match event {
            Event::Started(started) => {
                state.check(started.turn_id == name, || {
                    format!("{name} is {}", started.turn_id)
                });
                self.attempts.push(String::new());
            }
            Event::Delta(delta) => {
                state.check(number == taken + 1, || {
                    format!("{name}: {number} after {taken}")
                });
                match self.attempts.last_mut() {
                    Some(text) => text.push_str(&delta.text),
                    None => state.check(false, || format!("{name}: {number} before its start")),
                }
            }
            Event::Completed(completed) => {
                self.is_done = true;
                self.complete(&mut state, &completed);
            }
        }
    }

    /// What a client saw is what is stored.
    fn complete(&self, state: &mut State, completed: &Completed) {
        let name = &self.name;
        state.count("seen to the end");
        state.promised.insert((self.epoch, name.clone()));
        for (sequence, message) in &completed.messages {
            let bytes = state.db.messages.get(sequence);
            let stored = bytes.and_then(|bytes| langchain::decode(bytes).ok());
            let text = |message: &Message| message.draft.content.text();
            let is_same = stored.as_ref().is_some_and(|stored| {
                text(stored) == text(message) && stored.turn_id == message.turn_id
            });
            state.check(is_same, || format!("{name}: what is shown is not stored"));
        }
        let Some((_, answer)) = completed.messages.last() else {
            return state.check(false, || format!("{name}: nothing is stored"));
        };
        let text = answer.draft.content.text();
        let is_seen = match answer.interrupted {
            // Its holder may have said more than it wrote to the log.
            true => self.attempts.iter().any(|seen| seen.starts_with(&text)),
            false => self.attempts.last() == Some(&text),
        };
        let seen = &self.attempts;
        state.check(is_seen, || {
            format!("{name}: {seen:?} was seen, {text:?} is stored")
        });
    }
}

/// What is stored in the end.
fn check_stored(state: &mut State) {
    let messages: Vec<Message> = state
        .db
        .messages
        .values()
        .map(|bytes| langchain::decode(bytes).unwrap())
        .collect();
    let mut names = BTreeSet::new();
    for pair in messages.chunks(2) {
        let [question, answer] = pair else {
            return state.check(false, || "half a turn is stored".to_owned());
        };
        let name = question.turn_id.clone().unwrap_or_default();
        let text = answer.draft.content.text();
        let is_pair = question.draft.role == Role::User
            && answer.draft.role == Role::Assistant
            && question.draft.content.text() == name
            && answer.turn_id == question.turn_id;
        state.check(is_pair, || {
            format!("{name}: question and answer do not stand together")
        });
        state.check(names.insert(name.clone()), || {
            format!("{name} is stored twice")
        });
        let said = state.said.get(&name);
        let is_said = said.is_some_and(|said| {
            said.iter().any(|said| match answer.interrupted {
                true => !text.is_empty() && said.text.starts_with(&text),
                false => said.is_complete && said.text == text,
            })
        });
        state.check(is_said, || format!("{name}: nobody said {text:?}"));
        if answer.interrupted {
            state.count("interrupted");
        }
    }
    let epoch = state.db.epoch;
    for (of, name) in state.promised.clone() {
        let is_kept = of != epoch || names.contains(&name);
        state.check(is_kept, || format!("{name} was stored and is lost"));
    }
    state.note(format!("stored: {names:?}"));
}

async fn stop(world: World, turns: Turns, name: Option<String>, how: Stop) {
    let turn = name.map(|name| (key(&name).id, name));
    let epoch = world.epoch();
    let stopped = timeout(REST_LIMIT, turns.stop(&session(), turn, how)).await;
    let mut state = world.state();
    match stopped {
        Ok(Ok((name, stored))) if !stored.is_empty() && state.db.epoch == epoch => {
            state.promised.insert((epoch, name));
        }
        Ok(_) => {}
        Err(_) => state.check(false, || "a stop does not end".to_owned()),
    }
}

async fn simulate(seed: u64) -> World {
    let world = World::new(seed);
    let count = 2 + world.below(2) as usize;
    let replicas: Vec<_> = (0..count)
        .map(|index| Replica::new(&world, index))
        .collect();
    let replicas = Arc::new(replicas);
    let mut calls: Vec<(JoinHandle<()>, usize)> = Vec::new();
    // A call that is not a client's is bound to its replica.
    let anywhere = usize::MAX;
    for _ in 0..5 + world.below(10) {
        let index = world.below(count as u64) as usize;
        let replica = &replicas[index];
        let name = format!("t{}.{}", world.below(2), world.epoch());
        match world.below(20) {
            0..9 => {
                let client = Client {
                    world: world.clone(),
                    rng: StdRng::seed_from_u64(world.below(u64::MAX)),
                    replicas: Arc::clone(&replicas),
                    epoch: world.epoch(),
                    name,
                    taken: 0,
                    attempts: Vec::new(),
                    is_done: false,
                };
                calls.push((tokio::spawn(client.run()), anywhere));
            }
            9..11 => {
                let name = world.chance(50).then_some(name);
                let how = match world.chance(70) {
                    true => Stop::Keep,
                    false => Stop::Discard,
                };
                let stop = stop(world.clone(), replica.turns.clone(), name, how);
                calls.push((tokio::spawn(stop), index));
            }
            11 => {
                let link = replica.link.clone();
                let clear = async move { drop(link.clear(&session()).await) };
                calls.push((tokio::spawn(clear), index));
            }
            12..16 => {
                world.state().note(format!("{index} pauses"));
                replica.gate.send_if_modified(|gate| {
                    let is_open = *gate == Gate::Open;
                    if is_open {
                        *gate = Gate::Paused;
                    }
                    is_open
                });
            }
            16..18 => resume(&world, replica),
            // The first replica stays, for the others' turns.
            18 if index > 0 => {
                world.state().note(format!("{index} crashes"));
                replica.gate.send_replace(Gate::Crashed);
            }
            19 if index > 0 => {
                world.state().note(format!("{index} shuts down"));
                replica.turns.abort();
            }
            _ => {}
        }
        let pause = world.ms(700);
        sleep(pause).await;
    }

    world.state().faulty = 0;
    for replica in replicas.iter() {
        resume(&world, replica);
    }
    for (call, index) in calls {
        if index != anywhere && replicas[index].is_crashed() {
            call.abort();
            continue;
        }
        let ended = timeout(REST_LIMIT * 2, call).await;
        let mut state = world.state();
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => state.check(false, || format!("a call panicked: {error}")),
            Err(_) => state.check(false, || "a call does not end".to_owned()),
        }
    }
    let limit = Instant::now() + REST_LIMIT;
    while world.state().db.records.values().any(Record::is_running) {
        if Instant::now() >= limit {
            world
                .state()
                .check(false, || "a turn runs for ever".to_owned());
            break;
        }
        sleep(Duration::from_millis(250)).await;
    }
    // What is late comes now.
    sleep(Duration::from_secs(4)).await;
    check_stored(&mut world.state());
    world
}

fn resume(world: &World, replica: &Replica) {
    world
        .state()
        .note(format!("{} goes on", replica.link.replica));
    replica.gate.send_if_modified(|gate| {
        let is_paused = *gate == Gate::Paused;
        if is_paused {
            *gate = Gate::Open;
        }
        is_paused
    });
}

pub fn run(seed: u64) -> Found {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let world = runtime.block_on(simulate(seed));
    drop(runtime);
    let mut state = world.state();
    // By their times; those of one moment have no order.
    state.trace.sort();
    Found {
        faults: std::mem::take(&mut state.faults),
        tally: std::mem::take(&mut state.tally),
        trace: std::mem::take(&mut state.trace),
    }
}
