//! Random operations on a store and on a model of its contract: both must answer alike. The model
//! is the contract in the plainest form; what it cannot show (races, restarts, time) is tested
//! rule by rule in `store_contract.rs` and `session_contract.rs`.
//!
//! A failing case is kept in `store_model.proptest-regressions` and tried first ever after.

mod harness;

use std::cell::Cell;
use std::collections::HashMap;

use bytes::Bytes;
use chat_memory::message::SessionId;
use chat_memory::store::sessions::{Fork, Forked, Look, Rewind, Rewound, Update, Upkeep};
use chat_memory::store::{
    Append, Appended, Body, Element, Epoch, Error, Order, Page, Read, RequestKey, Result, Sequence,
    Store,
};
use harness::stores::{Backend, fresh_request, fresh_session, request, session};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};

const CASES: u32 = 96;
const SESSIONS: usize = 3;

/// An operation, on one of a few sessions. What refers to the session's state, such as an expected
/// sequence, is said relative to it, so that it often hits.
#[derive(Debug, Clone)]
enum Operation {
    Append {
        elements: Vec<Vec<u8>>,
        /// The id of a request that others use too, and one of two bodies.
        request: Option<(u8, bool)>,
        /// Relative to the last sequence.
        expected_last_sequence: Option<i64>,
        /// Relative to the epoch.
        expected_epoch: Option<i64>,
    },
    Read {
        is_newest_first: bool,
        /// Relative to the last sequence, like `before`; from the start if `None`.
        after: Option<i64>,
        before: Option<i64>,
        last: Option<usize>,
        limit: usize,
        bytes_max: usize,
    },
    Clear,
    Rewind {
        /// Relative to the last sequence.
        after: i64,
        request: Option<(u8, bool)>,
    },
    Fork {
        /// Which of the few sessions.
        to: usize,
        /// Relative to the last sequence.
        through: Option<i64>,
    },
    Look {
        /// Relative to the last sequence.
        at: i64,
    },
    Title {
        title: u8,
    },
    /// As if its time had come.
    Expire,
}

/// What the store trims a session to, in one of the two runs.
const ELEMENTS_MAX: usize = 6;
const QUESTION: &[u8] = br#"{"type": "human", "data": {}}"#;

fn operations() -> impl Strategy<Value = Vec<(usize, Operation)>> {
    prop::collection::vec((0..SESSIONS, operation()), 1..40)
}

fn operation() -> impl Strategy<Value = Operation> {
    let element = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..12),
        // With an id as the server makes it, by which a store may know it.
        6 => any::<u32>().prop_map(|n| format!(r#"{{"id": "cm_{n:014}"}}"#).into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 1_000..3_000),
        3 => Just(QUESTION.to_vec()),
    ];
    let key = || (0..4_u8, prop::bool::weighted(0.8));
    let near = |reach: i64| prop_oneof![3 => Just(0), 1 => -reach..=reach];
    let append = (
        prop::collection::vec(element, 1..5),
        prop::option::of(key()),
        prop::option::weighted(0.2, near(2)),
        prop::option::weighted(0.2, near(1)),
    )
        .prop_map(
            |(elements, request, expected_last_sequence, expected_epoch)| Operation::Append {
                elements,
                request,
                expected_last_sequence,
                expected_epoch,
            },
        );
    let read = (
        any::<bool>(),
        prop::option::of(-12..3_i64),
        prop::option::of(-12..4_i64),
        prop::option::of(0..12_usize),
        prop_oneof![1..8_usize, Just(1_000)],
        prop_oneof![0..100_usize, Just(5_000), Just(usize::MAX)],
    )
        .prop_map(
            |(is_newest_first, after, before, last, limit, bytes_max)| Operation::Read {
                is_newest_first,
                after,
                before,
                last,
                limit,
                bytes_max,
            },
        );
    prop_oneof![
        8 => append,
        8 => read,
        1 => Just(Operation::Clear),
        3 => (-8..2_i64, prop::option::of(key()))
            .prop_map(|(after, request)| Operation::Rewind { after, request }),
        2 => (0..SESSIONS, prop::option::of(-8..2_i64))
            .prop_map(|(to, through)| Operation::Fork { to, through }),
        3 => (-12..3_i64).prop_map(|at| Operation::Look { at }),
        1 => any::<u8>().prop_map(|title| Operation::Title { title }),
        1 => Just(Operation::Expire),
    ]
}

/// What the contract says about one session.
#[derive(Default)]
struct Model {
    elements: Vec<(Sequence, Bytes)>,
    requests: HashMap<[u8; 16], ([u8; 16], Appended)>,
    /// Of rewinds, and how many elements went.
    rewinds: HashMap<[u8; 16], ([u8; 16], i64)>,
    last_sequence: Sequence,
    epoch: i64,
    title: String,
    /// Which session it was copied from, and up to where it was to be.
    origin: Option<(usize, Option<Sequence>)>,
}

impl Model {
    fn recall(&self, request: &RequestKey) -> Result<Option<Appended>> {
        match self.requests.get(&request.id) {
            None => Ok(None),
            Some((fingerprint, _)) if *fingerprint != request.fingerprint => {
                Err(Error::RequestReused)
            }
            Some((_, appended)) => Ok(Some(Appended {
                repeated: true,
                ..*appended
            })),
        }
    }

    /// All answers that are right: where two conditions fail, either may be named.
    fn append(&mut self, append: &Append, upkeep: &Upkeep) -> Vec<Result<Appended>> {
        match self.recall(&append.request) {
            Err(error) => return vec![Err(error)],
            Ok(Some(appended)) => return vec![Ok(appended)],
            Ok(None) => {}
        }
        let actual = self.last_sequence;
        let mut refusals = Vec::new();
        if let Some(expected) = append.expected_last_sequence
            && expected != actual
        {
            refusals.push(Err(Error::SequenceMismatch { expected, actual }));
        }
        if append
            .expected_epoch
            .is_some_and(|epoch| epoch != Epoch(self.epoch))
        {
            refusals.push(Err(Error::Cleared));
        }
        if !refusals.is_empty() {
            return refusals;
        }

        let appended = Appended {
            first_sequence: actual + 1,
            count: append.elements.len(),
            time_ms: append.time_ms,
            repeated: false,
        };
        for element in &append.elements {
            self.last_sequence += 1;
            self.elements.push((self.last_sequence, element.clone()));
        }
        if let Some(elements_max) = upkeep.elements_max {
            self.trim(elements_max);
        }
        let remembered = (append.request.fingerprint, appended);
        self.requests.insert(append.request.id, remembered);
        vec![Ok(appended)]
    }

    fn trim(&mut self, elements_max: usize) {
        let excess = self.elements.len().saturating_sub(elements_max);
        let places = self.elements.iter().enumerate().skip(1);
        let questions = places.filter(|(_, (_, element))| element.as_ref() == QUESTION);
        let questions: Vec<_> = questions.map(|(place, _)| place).collect();
        let enough = questions.iter().find(|place| **place >= excess);
        if excess > 0
            && let Some(place) = enough.or(questions.last())
        {
            self.elements.drain(..place);
        }
    }

    fn clear(&mut self) -> i64 {
        let deleted = self.elements.len() as i64;
        *self = Self {
            last_sequence: self.last_sequence,
            epoch: self.epoch + 1,
            ..Self::default()
        };
        deleted
    }

    fn rewind(&mut self, rewind: &Rewind) -> Result<Rewound> {
        let (fingerprint, count) = match self.rewinds.get(&rewind.request.id) {
            Some(known) => *known,
            None => {
                let before = self.elements.len();
                self.elements
                    .retain(|(sequence, _)| *sequence <= rewind.after);
                let known = (
                    rewind.request.fingerprint,
                    (before - self.elements.len()) as i64,
                );
                self.rewinds.insert(rewind.request.id, known);
                known
            }
        };
        match fingerprint == rewind.request.fingerprint {
            true => Ok(Rewound::Done { count }),
            false => Err(Error::RequestReused),
        }
    }

    /// The greatest sequence of an element at or before a sequence.
    fn floor(&self, at: Sequence) -> Sequence {
        let held = self.elements.iter().map(|(sequence, _)| *sequence);
        held.filter(|sequence| *sequence <= at).max().unwrap_or(0)
    }

    fn read(&self, read: &Read) -> Page {
        let before = read.before.unwrap_or(self.last_sequence + 1);
        let mut range: Vec<_> = self
            .elements
            .iter()
            .filter(|(sequence, _)| *sequence > read.after && *sequence < before)
            .collect();
        let mut after = read.after;
        if let Some(last) = read.last
            && range.len() > last
        {
            let left_out = range.len() - last;
            after = range[left_out - 1].0;
            range.drain(..left_out);
        }
        if read.order == Order::NewestFirst {
            range.reverse();
        }
        let mut elements = Vec::new();
        let mut bytes = 0;
        for (sequence, element) in &range {
            bytes += element.len();
            let is_first = elements.is_empty();
            if elements.len() == read.limit || (bytes > read.bytes_max && !is_first) {
                break;
            }
            elements.push(Element {
                sequence: *sequence,
                body: Body::Bytes(element.clone()),
            });
        }
        Page {
            more: elements.len() < range.len(),
            elements,
            after,
            before,
            last_sequence: self.last_sequence,
            epoch: Epoch(self.epoch),
        }
    }
}

/// What becomes of a fork, and its model.
fn fork(models: &mut [Model], from: usize, to: usize, through: Option<Sequence>) -> &'static str {
    if !models[to].elements.is_empty() {
        return match models[to].origin == Some((from, through)) {
            true => "done",
            false => "exists",
        };
    }
    let end = models[from].floor(through.unwrap_or(Sequence::MAX));
    if end == 0 {
        return "empty";
    }
    let title = models[from].title.clone();
    let elements = models[from].elements.iter();
    let elements: Vec<_> = elements
        .filter(|(sequence, _)| *sequence <= end)
        .cloned()
        .collect();
    let copy = &mut models[to];
    for (_, element) in elements {
        copy.last_sequence += 1;
        copy.elements.push((copy.last_sequence, element));
    }
    (copy.title, copy.origin) = (title, Some((from, through)));
    "done"
}

/// Runs one operation on both, and compares.
async fn step(
    store: &dyn Store,
    sessions: &[SessionId],
    models: &mut [Model],
    number: usize,
    operation: Operation,
    time_ms: i64,
    upkeep: &Upkeep,
) {
    let session = &sessions[number];
    let model = &mut models[number];
    let key = |(id, body): (u8, bool)| request(&id.to_string(), if body { "1" } else { "2" });
    let context = format!("{operation:?} on {session}");
    match operation {
        Operation::Append {
            elements,
            request,
            expected_last_sequence,
            expected_epoch,
        } => {
            let append = Append {
                elements: elements.into_iter().map(Bytes::from).collect(),
                request: request.map_or_else(fresh_request, key),
                time_ms,
                expected_last_sequence: expected_last_sequence
                    .map(|offset| model.last_sequence + offset),
                expected_epoch: expected_epoch.map(|offset| Epoch(model.epoch + offset)),
            };
            let right = model.append(&append, upkeep);
            let answer = store.append(session, append).await;
            assert!(right.contains(&answer), "{context}\n{answer:?}\n{right:?}");
        }
        Operation::Read {
            is_newest_first,
            after,
            before,
            last,
            limit,
            bytes_max,
        } => {
            let order = match is_newest_first {
                true => Order::NewestFirst,
                false => Order::OldestFirst,
            };
            let read = Read {
                order,
                after: after.map_or(0, |offset| (model.last_sequence + offset).max(0)),
                before: before.map(|offset| (model.last_sequence + offset).max(0)),
                last,
                limit,
                bytes_max,
            };
            let right = model.read(&read);
            let mut answer = store.read(session, read).await.unwrap();
            // Where no element stands between, a store may resolve `last` to another sequence.
            let is_between = |sequence| {
                let (low, high) = (answer.after.min(right.after), answer.after.max(right.after));
                low < sequence && sequence <= high
            };
            let mut held = model.elements.iter().map(|(sequence, _)| *sequence);
            if answer.after >= read.after && !held.any(is_between) {
                answer.after = right.after;
            }
            assert_eq!(answer, right, "{context}");
        }
        Operation::Clear => {
            let answer = store.clear(session).await;
            assert_eq!(answer, Ok(model.clear()), "{context}");
        }
        Operation::Rewind { after, request } => {
            let key = |(id, body): (u8, bool)| {
                RequestKey::new("rewind", &[id].escape_ascii().to_string(), &[body.into()])
            };
            let rewind = Rewind {
                after: (model.last_sequence + after).max(0),
                request: request.map_or_else(fresh_request, key),
                expected_last_sequence: None,
                time_ms,
            };
            let answer = store.rewind(session, rewind).await;
            assert_eq!(answer, model.rewind(&rewind), "{context}");
        }
        Operation::Fork { to, through } => {
            let through = through.map(|offset| (model.last_sequence + offset).max(1));
            let asked = Fork {
                to: sessions[to].clone(),
                through,
            };
            let right = fork(models, number, to, through);
            let answer = match store.fork(session, asked).await.unwrap() {
                Forked::Done(seen) => {
                    assert_eq!(seen.count, models[to].elements.len() as i64, "{context}");
                    "done"
                }
                Forked::Empty => "empty",
                Forked::Exists => "exists",
                Forked::Changed => "changed",
            };
            assert_eq!(answer, right, "{context}");
        }
        Operation::Look { at } => {
            let at = (model.last_sequence + at).max(0);
            let look = Look {
                at,
                with_request: false,
            };
            let seen = store.look(session, look).await.unwrap();
            let first = model.elements.first().map_or(0, |(sequence, _)| *sequence);
            assert_eq!(
                (seen.count, seen.first_sequence, seen.last_sequence),
                (model.elements.len() as i64, first, model.last_sequence),
                "{context}"
            );
            assert_eq!(
                (seen.floor, seen.epoch),
                (model.floor(at), Epoch(model.epoch)),
                "{context}"
            );
            // What is said of a session without elements nobody asks for.
            if !model.elements.is_empty() {
                let origin = seen.about.origin.map(|origin| origin.session);
                let right = model.origin.map(|(from, _)| sessions[from].clone());
                assert_eq!(
                    (&seen.about.title, origin),
                    (&model.title, right),
                    "{context}"
                );
            }
        }
        Operation::Title { title } => {
            let title = title.to_string();
            let update = Update {
                title: Some(title.clone()),
                ..Update::default()
            };
            let seen = store.update_session(session, update).await.unwrap();
            assert_eq!(seen.is_some(), !model.elements.is_empty(), "{context}");
            if seen.is_some() {
                model.title = title;
            }
        }
        Operation::Expire => {
            let answer = store.expire(session, 1_000).await;
            assert_eq!(answer, Ok(!model.elements.is_empty()), "{context}");
            if !model.elements.is_empty() {
                *model = Model::default();
            }
        }
    }
}

/// Compares a store with the model, on many random lists of operations.
fn behaves_as_the_model<B: Backend>(start: impl Future<Output = B>, upkeep: Upkeep) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let backend = runtime.block_on(start);
    let store = backend.store();
    let time_ms = Cell::new(1_763_910_000_000);
    let config = Config {
        cases: CASES,
        source_file: Some(file!()),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource(
            "proptest-regressions",
        ))),
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&operations(), |operations| {
        let case = fresh_session();
        runtime.block_on(async {
            let sessions: Vec<_> = (0..SESSIONS)
                .map(|number| session(&format!("{case}-{number}")))
                .collect();
            let mut models: Vec<Model> = sessions.iter().map(|_| Model::default()).collect();
            for (number, operation) in operations {
                time_ms.set(time_ms.get() + 1);
                let time_ms = time_ms.get();
                step(
                    &*store,
                    &sessions,
                    &mut models,
                    number,
                    operation,
                    time_ms,
                    &upkeep,
                )
                .await;
            }
            // At the end all of it is still as it should be.
            for (session, model) in sessions.iter().zip(&models) {
                let all = harness::stores::all();
                assert_eq!(store.read(session, all).await, Ok(model.read(&all)));
            }
        });
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

const TRIMMED: Upkeep = Upkeep {
    ttl_ms: None,
    reads_extend: false,
    elements_max: Some(ELEMENTS_MAX),
};

#[test]
fn the_embedded_store_behaves_as_the_model() {
    behaves_as_the_model(harness::stores::sqlite(), Upkeep::default());
}

#[test]
fn the_redis_store_behaves_as_the_model() {
    behaves_as_the_model(harness::stores::redis(), Upkeep::default());
}

#[test]
fn the_embedded_store_trims_as_the_model() {
    behaves_as_the_model(harness::stores::sqlite_with(TRIMMED), TRIMMED);
}

#[test]
fn the_redis_store_trims_as_the_model() {
    behaves_as_the_model(harness::stores::redis_with(TRIMMED), TRIMMED);
}
