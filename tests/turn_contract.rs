//! The contract of a store's turns, rule by rule, on every store. Each rule is a function over a
//! running store and a session that nothing else uses; `contract!` at the end makes a test of each.

mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chat_memory::message::SessionId;
use chat_memory::store::turns::{
    BeginTurn, Begun, Chunk, FOLLOWED_EVERY_MS, FollowTurn, PLACE_MS, Stop, TakeTurn, Taken,
    TurnState, WAITING_MAX,
};
use chat_memory::store::{Error, List, Order, Read, RequestKey, Store};
use futures_util::future::join_all;
use harness::stores::{Backend, batch, fresh_session, read_all, texts};
use harness::turns::{LONG_MS, begin, brief_lease, end, follow, keep, lease, leased, take};
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
    assert_eq!(got.fingerprint, first.key.fingerprint);
    let again = leased(store.begin_turn(&s, first).await.unwrap());
    assert_eq!(again, got);
}

/// What comes with a turn is the session as it is then, or nothing.
async fn a_page_that_comes_with_a_turn_is_what_a_read_gives(store: Shared, s: SessionId) {
    let newest = Read {
        order: Order::NewestFirst,
        after: 0,
        before: None,
        last: None,
        limit: 3,
        bytes_max: 1_000,
    };
    for name in ["a", "b", "c"] {
        store.append(&s, batch([name, "with"])).await.unwrap();
        let begin = begin(name, lease());
        let (turn, token) = (begin.key.id, begin.lease.token);
        let (begun, page) = store.begin_turn_and_read(&s, begin, newest).await.unwrap();
        assert!(matches!(begun, Begun::Leased(_)), "{begun:?}");
        let read = store.read(&s, newest).await.unwrap();
        assert_eq!(page.unwrap_or_else(|| read.clone()), read);
        store
            .end_turn(&s, end(turn, token, &["q", "r"]))
            .await
            .unwrap();
    }
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
                assert_eq!(got.fingerprint, first.key.fingerprint);
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

/// A call that waits in line.
fn waiting(id: &str) -> BeginTurn {
    BeginTurn {
        waits: true,
        ..begin(id, lease())
    }
}

async fn calls_that_wait_get_their_turns_in_the_order_in_which_they_came(
    store: Shared,
    s: SessionId,
) {
    let mut running = begin("a", lease());
    store.begin_turn(&s, running.clone()).await.unwrap();
    let mut line = ["b", "c", "d"].map(waiting).to_vec();
    for (before, call) in line.iter().enumerate() {
        let asked = store.begin_turn(&s, call.clone()).await;
        let expired = None;
        assert_eq!(asked, Ok(Begun::Waiting { before, expired }));
    }
    while !line.is_empty() {
        // While the turn runs and once it has ended, whoever asks first.
        let stored = end(running.key.id, running.lease.token, &["x"]);
        for has_ended in [false, true] {
            if has_ended {
                store.end_turn(&s, stored.clone()).await.unwrap();
            }
            for (before, call) in line.iter().enumerate().skip(1).rev() {
                let asked = store.begin_turn(&s, call.clone()).await;
                let expired = None;
                assert_eq!(asked, Ok(Begun::Waiting { before, expired }));
            }
            let first = store.begin_turn(&s, line[0].clone()).await.unwrap();
            if has_ended {
                assert_eq!(leased(first).attempt, 1);
            } else {
                let expired = None;
                assert_eq!(first, Begun::Waiting { before: 0, expired });
            }
        }
        running = line.remove(0);
    }
}

async fn only_so_many_calls_wait_in_line(store: Shared, s: SessionId) {
    store.begin_turn(&s, begin("a", lease())).await.unwrap();
    let line: Vec<BeginTurn> = (0..=WAITING_MAX)
        .map(|number| waiting(&number.to_string()))
        .collect();
    // All ask anew until no place is lost meanwhile.
    until("the line is full", async || {
        let calls = line.iter().map(|call| store.begin_turn(&s, call.clone()));
        let (mut have_a_place, mut is_full) = (0, 0);
        for answer in join_all(calls).await {
            match answer.unwrap() {
                Begun::Waiting { before, .. } if before < WAITING_MAX => have_a_place += 1,
                Begun::LineFull => is_full += 1,
                other => panic!("{other:?}"),
            }
        }
        (have_a_place == WAITING_MAX && is_full == 1).then_some(())
    })
    .await;
    let busy = store.begin_turn(&s, begin("b", lease())).await.unwrap();
    assert!(matches!(busy, Begun::Busy { .. }), "{busy:?}");
}

async fn a_place_in_line_is_lost_unless_its_call_asks_again(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    let (lost, kept) = (waiting("b"), waiting("c"));
    let began = Instant::now();
    store.begin_turn(&s, lost.clone()).await.unwrap();
    let behind = store.begin_turn(&s, kept.clone()).await;
    let (before, expired) = (1, None);
    assert_eq!(behind, Ok(Begun::Waiting { before, expired }));
    until("the place before it is lost", async || {
        let asked = store.begin_turn(&s, kept.clone()).await.unwrap();
        let (before, expired) = (0, None);
        (asked == Begun::Waiting { before, expired }).then_some(())
    })
    .await;
    assert!(began.elapsed() >= Duration::from_millis(PLACE_MS as u64));
    // Who lost it stands at the end.
    let again = store.begin_turn(&s, lost).await;
    let (before, expired) = (1, None);
    assert_eq!(again, Ok(Begun::Waiting { before, expired }));
    let end = end(first.key.id, first.lease.token, &["x"]);
    store.end_turn(&s, end).await.unwrap();
    leased(store.begin_turn(&s, kept).await.unwrap());
}

async fn who_leaves_the_line_makes_room_unless_its_turn_is_asked_for_again(
    store: Shared,
    s: SessionId,
) {
    let nobody = begin("nobody", lease()).key.id;
    store.leave_line(&s, nobody, 0).await.unwrap();
    let first = begin("a", lease());
    store.begin_turn(&s, first.clone()).await.unwrap();
    let line = ["b", "c", "d"].map(waiting);
    let place = async |index: usize| {
        let asked = store.begin_turn(&s, line[index].clone()).await.unwrap();
        let Begun::Waiting { before, .. } = asked else {
            panic!("{asked:?}");
        };
        before
    };
    for index in 0..line.len() {
        assert_eq!(place(index).await, index);
    }
    let leaving = line[1].key.id;
    store.leave_line(&s, leaving, LONG_MS).await.unwrap();
    store.leave_line(&s, nobody, 0).await.unwrap();
    assert_eq!(place(2).await, 2);
    for _ in 0..2 {
        store.leave_line(&s, leaving, 0).await.unwrap();
        assert_eq!([place(0).await, place(2).await], [0, 1]);
    }
    assert_eq!(place(1).await, 2);
    // One that runs stands in no line.
    store.leave_line(&s, first.key.id, 0).await.unwrap();
    let end = end(first.key.id, first.lease.token, &["x"]);
    store.end_turn(&s, end).await.unwrap();
    store.leave_line(&s, line[0].key.id, 0).await.unwrap();
    leased(store.begin_turn(&s, line[2].clone()).await.unwrap());
}

async fn a_call_in_line_is_told_of_a_running_turn_whose_lease_has_run_out(
    store: Shared,
    s: SessionId,
) {
    let first = begin("a", brief_lease());
    let turn = first.key.id;
    store.begin_turn(&s, first).await.unwrap();
    until_expired(&store, &s, turn).await;
    let asked = store.begin_turn(&s, waiting("b")).await;
    let (before, expired) = (0, Some(turn));
    assert_eq!(asked, Ok(Begun::Waiting { before, expired }));
}

async fn an_ended_turn_is_forgotten_after_its_retention_and_its_id_is_free(
    store: Shared,
    s: SessionId,
) {
    let mut other = begin("a", lease());
    other.key = RequestKey::new("turn", "a", b"other");
    for elements in [&["q", "r"][..], &[]] {
        let first = begin("a", lease());
        let turn = first.key.id;
        let got = leased(store.begin_turn(&s, first.clone()).await.unwrap());
        assert_eq!((got.attempt, got.first_event, got.next_chunk), (1, 1, 0));
        let mut end = end(turn, first.lease.token, elements);
        (end.retention_ms, end.chunk) = (
            50,
            Some(Chunk {
                index: 0,
                bytes: "said".into(),
            }),
        );
        store.end_turn(&s, end.clone()).await.unwrap();
        until("the turn is forgotten", async || {
            let followed = store.follow_turn(&s, follow(turn)).await.unwrap();
            followed.is_none().then_some(())
        })
        .await;
        let stopped = store.stop_turn(&s, Some(turn), Stop::Keep).await;
        assert_eq!(stopped, Ok(None));
        let late = store.end_turn(&s, end).await;
        assert_eq!(late, Err(Error::Cleared));
    }
    // Also for another request; and nothing of the old log is left.
    let turn = other.key.id;
    let got = leased(store.begin_turn(&s, other).await.unwrap());
    assert_eq!((got.attempt, got.first_event, got.next_chunk), (1, 1, 0));
    let followed = store.follow_turn(&s, follow(turn)).await.unwrap().unwrap();
    assert!(followed.chunks.is_empty());
    assert_eq!(texts(&read_all(&*store, &s).await), ["q", "r"]);
}

async fn a_running_turn_that_nobody_keeps_is_forgotten_too(store: Shared, s: SessionId) {
    // It is forgotten by itself, not with all turns of the session.
    let other = begin("z", lease());
    store.begin_turn(&s, other.clone()).await.unwrap();
    store
        .end_turn(&s, end(other.key.id, other.lease.token, &[]))
        .await
        .unwrap();
    let mut brief = brief_lease();
    brief.retention_ms = 1;
    let first = begin("a", brief);
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    until("the turn is forgotten", async || {
        let followed = store.follow_turn(&s, follow(turn)).await.unwrap();
        followed.is_none().then_some(())
    })
    .await;
    let taken = store.take_turn(&s, take(turn, lease())).await;
    assert_eq!(taken, Ok(Taken::Gone));
    let ended = store.end_turn(&s, end(turn, brief.token, &["x"])).await;
    assert_eq!(ended, Err(Error::Cleared));
    assert!(read_all(&*store, &s).await.elements.is_empty());
    leased(store.begin_turn(&s, begin("b", lease())).await.unwrap());
}

async fn turns_of_two_sessions_do_not_disturb_each_other(store: Shared, s: SessionId) {
    let other = fresh_session();
    let (here, there) = (begin("a", lease()), begin("a", lease()));
    let turn = here.key.id;
    for (session, call, text) in [(&s, &here, "here"), (&other, &there, "there")] {
        leased(store.begin_turn(session, call.clone()).await.unwrap());
        let mut keep = keep(turn, call.lease);
        keep.chunk = Some(Chunk {
            index: 0,
            bytes: text.into(),
        });
        store.keep_turn(session, keep).await.unwrap();
    }
    let asked = store.begin_turn(&other, waiting("b")).await;
    let (before, expired) = (0, None);
    assert_eq!(asked, Ok(Begun::Waiting { before, expired }));

    store.stop_turn(&s, None, Stop::Keep).await.unwrap();
    let foreign = store.keep_turn(&s, keep(turn, there.lease)).await;
    assert_eq!(foreign, Err(Error::LeaseLost));
    let end_here = end(turn, here.lease.token, &["q"]);
    store.end_turn(&s, end_here).await.unwrap();
    store.clear(&s).await.unwrap();
    assert_eq!(store.follow_turn(&s, follow(turn)).await, Ok(None));

    let kept = store.keep_turn(&other, keep(turn, there.lease)).await;
    assert_eq!(kept.unwrap().stop, None);
    let followed = store.follow_turn(&other, follow(turn)).await;
    assert_eq!(followed.unwrap().unwrap().chunks, ["there"]);
    let end_there = end(turn, there.lease.token, &["r"]);
    store.end_turn(&other, end_there).await.unwrap();
    assert_eq!(texts(&read_all(&*store, &other).await), ["r"]);
    assert!(read_all(&*store, &s).await.elements.is_empty());
}

async fn a_stop_leaves_an_ended_turn_as_it_is(store: Shared, s: SessionId) {
    let first = begin("a", lease());
    let turn = first.key.id;
    for (elements, attempt) in [(&[][..], 1), (&["q", "r"][..], 2)] {
        let lease = lease();
        let got = leased(store.begin_turn(&s, begin("a", lease)).await.unwrap());
        // A stop of the attempt before is not one of this.
        assert_eq!((got.attempt, got.stop), (attempt, None));
        let state = store.end_turn(&s, end(turn, lease.token, elements)).await;
        let state = state.unwrap();
        for stop in [Stop::Keep, Stop::Discard] {
            assert_eq!(store.stop_turn(&s, None, stop).await, Ok(None));
            let stopped = store.stop_turn(&s, Some(turn), stop).await;
            let stopped = stopped.unwrap().unwrap();
            assert_eq!((stopped.turn, stopped.name.as_str()), (turn, "a"));
            assert_eq!(stopped.state, state);
            let followed = store.follow_turn(&s, follow(turn)).await.unwrap().unwrap();
            assert_eq!(followed.state, state);
        }
    }
    assert_eq!(texts(&read_all(&*store, &s).await), ["q", "r"]);
}

async fn a_session_without_messages_is_not_listed_for_its_turns(store: Shared, s: SessionId) {
    let is_listed = async || {
        let mut cursor = None;
        loop {
            let list = List {
                prefix: s.as_str().to_owned(),
                cursor,
                limit: 100,
            };
            let page = store.sessions(list).await.unwrap();
            if page.sessions.contains(&s) {
                return true;
            }
            cursor = page.next;
            if cursor.is_none() {
                return false;
            }
        }
    };
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    store.begin_turn(&s, waiting("b")).await.unwrap();
    assert!(!is_listed().await);
    store
        .end_turn(&s, end(turn, first.lease.token, &[]))
        .await
        .unwrap();
    assert!(!is_listed().await);
    let again = begin("a", lease());
    store.begin_turn(&s, again.clone()).await.unwrap();
    let end = end(turn, again.lease.token, &["q"]);
    store.end_turn(&s, end).await.unwrap();
    assert!(is_listed().await);
}

/// Not in the suite: a store that serves one server only takes no note.
#[tokio::test]
async fn a_noted_follower_is_told_to_the_holder_in_redis() {
    let backend = harness::stores::redis().await;
    let (store, s) = (backend.store(), fresh_session());
    let first = begin("a", lease());
    let turn = first.key.id;
    store.begin_turn(&s, first.clone()).await.unwrap();
    let followed_ms_ago = async || {
        let kept = store.keep_turn(&s, keep(turn, first.lease)).await;
        kept.unwrap().followed_ms_ago
    };
    let noted = FollowTurn {
        is_noted: true,
        ..follow(turn)
    };
    store.follow_turn(&s, follow(turn)).await.unwrap();
    assert_eq!(followed_ms_ago().await, None);
    store.follow_turn(&s, noted).await.unwrap();
    until("the note is old", async || {
        store.follow_turn(&s, follow(turn)).await.unwrap();
        let ago_ms = followed_ms_ago().await.expect("a note");
        (ago_ms > FOLLOWED_EVERY_MS).then_some(())
    })
    .await;
    let asked = Instant::now();
    store.follow_turn(&s, noted).await.unwrap();
    let ago_ms = followed_ms_ago().await.expect("a note");
    assert!(
        ago_ms as u128 <= asked.elapsed().as_millis() + 1,
        "{ago_ms}"
    );
    // What follows a turn that has ended changes nothing.
    let end = end(turn, first.lease.token, &["q"]);
    let ended = store.end_turn(&s, end).await.unwrap();
    let followed = store.follow_turn(&s, noted).await.unwrap().unwrap();
    assert_eq!(followed.state, ended);
}

/// Makes a test of each rule for one store: a function of `harness::stores`.
macro_rules! contract {
    ($backend:ident) => {
        mod $backend {
            use super::*;

            rules! { $backend:
                a_new_turn_is_leased_and_a_repeat_answers_the_same,
                a_page_that_comes_with_a_turn_is_what_a_read_gives,
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
                calls_that_wait_get_their_turns_in_the_order_in_which_they_came,
                only_so_many_calls_wait_in_line,
                a_place_in_line_is_lost_unless_its_call_asks_again,
                who_leaves_the_line_makes_room_unless_its_turn_is_asked_for_again,
                a_call_in_line_is_told_of_a_running_turn_whose_lease_has_run_out,
                an_ended_turn_is_forgotten_after_its_retention_and_its_id_is_free,
                a_running_turn_that_nobody_keeps_is_forgotten_too,
                turns_of_two_sessions_do_not_disturb_each_other,
                a_stop_leaves_an_ended_turn_as_it_is,
                a_session_without_messages_is_not_listed_for_its_turns,
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
