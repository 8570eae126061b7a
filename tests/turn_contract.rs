//! The contract of a store's turns, rule by rule, on every store. Each rule is a function over a
//! running store and a session that nothing else uses; `contract!` at the end makes a test of each.

mod harness;

use std::sync::Arc;

use bytes::Bytes;
use chat_memory::message::SessionId;
use chat_memory::store::turns::{Begun, Chunk, FollowTurn, Stop, TakeTurn, Taken, TurnState};
use chat_memory::store::{Error, RequestKey, Store};
use futures_util::future::join_all;
use harness::stores::{Backend, batch, fresh_session, read_all, texts};
use harness::turns::{begin, brief_lease, end, follow, keep, lease, leased, take};
use harness::wait::until;

type Shared = Arc<dyn Store>;

async fn until_expired(store: &Shared, s: &SessionId, turn: [u8; 16]) {
    until("the lease has run out", async || {
        let followed = store.follow_turn(s, follow(turn)).await.unwrap().unwrap();
        (followed.state == TurnState::Running { is_expired: true }).then_some(())
    })
    .await;
}

async fn a_new_turn_is_leased_and_a_repeat_answers_the_same(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let got = leased(store.begin_turn(&s, first.clone()).await.unwrap());
    assert_eq!((got.attempt, got.first_event, got.next_chunk), (1, 1, 0));
    assert_eq!(got.request, first.request);
    let again = leased(store.begin_turn(&s, first).await.unwrap());
    assert_eq!(again, got);
}

async fn a_turn_id_is_not_for_two_requests(store: Shared, s: SessionId) {
    store.begin_turn(&s, begin("a", lease())).await.unwrap();
    let mut other = begin("a", lease());
    other.key = RequestKey::new("turn", "a", b"other");
    let refused = store.begin_turn(&s, other).await;
    assert_eq!(refused, Err(Error::RequestReused));
}

async fn one_of_sixteen_simultaneous_begins_gets_the_lease(store: Shared, s: SessionId) {
    let calls = (0..16).map(|_| store.begin_turn(&s, begin("a", lease())));
    let mut won = 0;
    for answer in join_all(calls).await {
        match answer.unwrap() {
            Begun::Leased(_) => won += 1,
            other => assert_eq!(
                other,
                Begun::Exists(TurnState::Running { is_expired: false })
            ),
        }
    }
    assert_eq!(won, 1);
}

async fn another_turn_is_told_which_one_runs(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    let busy = store.begin_turn(&s, begin("b", lease())).await.unwrap();
    let (turn, name, is_expired) = (first.key.id, "a".to_owned(), false);
    assert_eq!(
        busy,
        Begun::Busy {
            turn,
            name,
            is_expired
        }
    );
}

async fn a_log_is_in_order_and_each_chunk_once(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    for (index, text) in [(0, "aa"), (0, "aa"), (1, "bb"), (1, "bb"), (2, "cc")] {
        let mut keep = keep(turn, first.lease);
        keep.chunk = Some(Chunk {
            index,
            bytes: Bytes::from(text),
        });
        store.keep_turn(&s, keep).await.unwrap();
    }
    for (from_chunk, bytes_max, expected, more) in [
        (0, 100, vec!["aa", "bb", "cc"], false),
        (0, 4, vec!["aa", "bb"], true),
        (1, 0, vec!["bb"], true),
        (3, 100, vec![], false),
    ] {
        let follow = FollowTurn {
            from_chunk,
            bytes_max,
            ..follow(turn)
        };
        let followed = store.follow_turn(&s, follow).await.unwrap().unwrap();
        assert_eq!(followed.chunks, expected);
        assert_eq!(followed.next_chunk, from_chunk + expected.len() as u32);
        assert_eq!(followed.more, more);
    }
    let unknown = store.follow_turn(&s, follow([7; 16])).await;
    assert_eq!(unknown, Ok(None));
}

async fn a_wrong_token_changes_nothing(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first).await.unwrap();
    let other = lease();
    let kept = store.keep_turn(&s, keep(turn, other)).await;
    assert_eq!(kept, Err(Error::LeaseLost));
    let ended = store.end_turn(&s, end(turn, other.token, &["x"])).await;
    assert_eq!(ended, Err(Error::LeaseLost));
    assert!(read_all(&*store, &s).await.elements.is_empty());
}

async fn an_end_stores_once_and_the_next_turn_can_begin(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    store.append(&s, batch(["between"])).await.unwrap();
    let end = end(first.key.id, first.lease.token, &["q", "r"]);
    let ended = store.end_turn(&s, end.clone()).await.unwrap();
    let TurnState::Completed { appended, .. } = &ended else {
        panic!("{ended:?}");
    };
    assert_eq!((appended.first_sequence, appended.count), (2, 2));
    assert_eq!(store.end_turn(&s, end).await, Ok(ended.clone()));
    assert_eq!(texts(&read_all(&*store, &s).await), ["between", "q", "r"]);
    let again = store.begin_turn(&s, begin("a", lease())).await;
    assert_eq!(again, Ok(Begun::Exists(ended)));
    leased(store.begin_turn(&s, begin("b", lease())).await.unwrap());
}

async fn a_failed_turn_runs_anew_above_its_numbers(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    let mut keep = keep(turn, first.lease);
    (keep.chunk, keep.last_event) = (
        Some(Chunk {
            index: 0,
            bytes: "old".into(),
        }),
        50,
    );
    store.keep_turn(&s, keep).await.unwrap();
    store
        .end_turn(&s, end(turn, first.lease.token, &[]))
        .await
        .unwrap();
    let got = leased(store.begin_turn(&s, begin("a", lease())).await.unwrap());
    assert_eq!((got.attempt, got.first_event, got.next_chunk), (2, 151, 1));
    let followed = store.follow_turn(&s, follow(turn)).await.unwrap().unwrap();
    assert!(followed.chunks.is_empty());
}

async fn an_expired_lease_can_be_taken_by_one_and_fences_the_old(store: Shared, s: SessionId) {
    let first = begin("a", brief_lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    until_expired(&store, &s, turn).await;
    until("the turn is named an orphan", async || {
        let orphans = store.orphaned_turns(100).await.unwrap();
        orphans.contains(&(s.clone(), turn)).then_some(())
    })
    .await;
    let takes = (0..16).map(|_| store.take_turn(&s, take(turn, lease())));
    let mut won = 0;
    for answer in join_all(takes).await {
        match answer.unwrap() {
            Taken::Leased(got) => {
                won += 1;
                assert_eq!((got.attempt, &got.request), (2, &first.request));
            }
            other => assert_eq!(other, Taken::Held),
        }
    }
    assert_eq!(won, 1);
    let kept = store.keep_turn(&s, keep(turn, first.lease)).await;
    assert_eq!(kept, Err(Error::LeaseLost));
    let ended = store
        .end_turn(&s, end(turn, first.lease.token, &["x"]))
        .await;
    assert_eq!(ended, Err(Error::LeaseLost));
    assert!(read_all(&*store, &s).await.elements.is_empty());
    let by_force = TakeTurn {
        by_force: true,
        ..take(turn, lease())
    };
    let taken = store.take_turn(&s, by_force).await.unwrap();
    assert!(matches!(taken, Taken::Leased(_)), "{taken:?}");
}

async fn the_last_try_fails_the_turn(store: Shared, s: SessionId) {
    let first = begin("a", brief_lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    until_expired(&store, &s, first.key.id).await;
    let take = TakeTurn {
        tries_max: 1,
        ..take(first.key.id, lease())
    };
    let outcome = take.outcome.clone();
    let taken = store.take_turn(&s, take).await;
    assert_eq!(taken, Ok(Taken::Ended(TurnState::Failed { outcome })));
}

async fn an_expired_lease_is_its_holders_until_taken(store: Shared, s: SessionId) {
    let mut first = begin("a", brief_lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    until_expired(&store, &s, turn).await;
    first.lease.lease_ms = harness::turns::LONG_MS;
    store.keep_turn(&s, keep(turn, first.lease)).await.unwrap();
    let held = store.take_turn(&s, take(turn, lease())).await;
    assert_eq!(held, Ok(Taken::Held));
    first.lease.lease_ms = 0;
    store.keep_turn(&s, keep(turn, first.lease)).await.unwrap();
    let taken = store.take_turn(&s, take(turn, lease())).await.unwrap();
    assert!(matches!(taken, Taken::Leased(_)), "{taken:?}");
}

async fn a_stop_reaches_the_holder(store: Shared, s: SessionId) {
    assert_eq!(store.stop_turn(&s, None, Stop::Keep).await, Ok(None));
    let first = begin("a", lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    for stop in [Stop::Keep, Stop::Discard] {
        let stopped = store.stop_turn(&s, None, stop).await.unwrap().unwrap();
        assert_eq!(stopped.turn, first.key.id);
        let kept = store
            .keep_turn(&s, keep(first.key.id, first.lease))
            .await
            .unwrap();
        assert_eq!(kept.stop, Some(stop));
    }
}

async fn a_clear_removes_turns(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    store.clear(&s).await.unwrap();
    let kept = store.keep_turn(&s, keep(turn, first.lease)).await;
    assert_eq!(kept, Err(Error::Cleared));
    let ended = store
        .end_turn(&s, end(turn, first.lease.token, &["x"]))
        .await;
    assert_eq!(ended, Err(Error::Cleared));
    assert!(read_all(&*store, &s).await.elements.is_empty());
    assert_eq!(store.follow_turn(&s, follow(turn)).await, Ok(None));
    let got = leased(store.begin_turn(&s, begin("a", lease())).await.unwrap());
    assert_eq!(got.attempt, 1);
}

/// Makes a test of each rule for one store: a function of `harness::stores`.
macro_rules! contract {
    ($backend:ident) => {
        mod $backend {
            use super::*;

            rules! { $backend:
                a_new_turn_is_leased_and_a_repeat_answers_the_same,
                a_turn_id_is_not_for_two_requests,
                one_of_sixteen_simultaneous_begins_gets_the_lease,
                another_turn_is_told_which_one_runs,
                a_log_is_in_order_and_each_chunk_once,
                a_wrong_token_changes_nothing,
                an_end_stores_once_and_the_next_turn_can_begin,
                a_failed_turn_runs_anew_above_its_numbers,
                an_expired_lease_can_be_taken_by_one_and_fences_the_old,
                the_last_try_fails_the_turn,
                an_expired_lease_is_its_holders_until_taken,
                a_stop_reaches_the_holder,
                a_clear_removes_turns,
            }
        }
    };
}

macro_rules! rules {
    ($backend:ident: $($rule:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let backend = harness::stores::$backend().await;
                super::$rule(backend.store(), fresh_session()).await;
            }
        )*
    };
}

contract!(sqlite);
contract!(redis);
