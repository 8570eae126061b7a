//! Random operations on a store and on a model of its contract: both must answer alike. The model
//! is the contract in the plainest form; what it cannot show (races, restarts, time) is tested
//! rule by rule in `store_contract.rs`.
//!
//! A failing case is kept in `store_model.proptest-regressions` and tried first ever after.

mod harness;

use std::cell::Cell;
use std::collections::HashMap;

use bytes::Bytes;
use chat_memory::message::SessionId;
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
}

fn operations() -> impl Strategy<Value = Vec<(usize, Operation)>> {
    prop::collection::vec((0..SESSIONS, operation()), 1..40)
}

fn operation() -> impl Strategy<Value = Operation> {
    let element = prop_oneof![
        8 => prop::collection::vec(any::<u8>(), 0..12),
        1 => prop::collection::vec(any::<u8>(), 1_000..3_000),
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
        prop_oneof![0..40_usize, Just(5_000), Just(usize::MAX)],
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
    ]
}

/// What the contract says about one session.
#[derive(Default)]
struct Model {
    elements: Vec<(Sequence, Bytes)>,
    requests: HashMap<[u8; 16], ([u8; 16], Appended)>,
    last_sequence: Sequence,
    epoch: i64,
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
    fn append(&mut self, append: &Append) -> Vec<Result<Appended>> {
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
        let remembered = (append.request.fingerprint, appended);
        self.requests.insert(append.request.id, remembered);
        vec![Ok(appended)]
    }

    fn clear(&mut self) -> i64 {
        let deleted = self.elements.len() as i64;
        self.elements.clear();
        self.requests.clear();
        self.epoch += 1;
        deleted
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

/// Runs one operation on both, and compares.
async fn step(
    store: &dyn Store,
    session: &SessionId,
    model: &mut Model,
    operation: Operation,
    time_ms: i64,
) {
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
            let right = model.append(&append);
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
    }
}

/// Compares a store with the model, on many random lists of operations.
fn behaves_as_the_model<B: Backend>(start: impl Future<Output = B>) {
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
                let model = &mut models[number];
                step(&*store, &sessions[number], model, operation, time_ms.get()).await;
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

#[test]
fn the_embedded_store_behaves_as_the_model() {
    behaves_as_the_model(harness::stores::sqlite());
}

#[test]
fn the_redis_store_behaves_as_the_model() {
    behaves_as_the_model(harness::stores::redis());
}
