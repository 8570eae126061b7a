//! The contract of a store's sessions, rule by rule, on every store. Each rule is a function over a
//! running store, which no other rule uses, and a session; `contract!` at the end makes a test of
//! each.

mod harness;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chat_memory::message::{SessionId, now_ms};
use chat_memory::store::sessions::{
    About, FORK_STEP, Fork, Forked, LOOKED_AT_MAX, ListRecent, Look, Origin, Rewind, Rewound, Seen,
    Update, Upkeep,
};
use chat_memory::store::turns::{Begun, TurnState};
use chat_memory::store::{Append, Bell, Epoch, Error, List, Read, RequestKey, Sequence, Store};
use futures_util::future::join_all;
use harness::stores::{
    Backend, all, batch, expiry, fill, fresh_request, fresh_session, read_all, request, sequences,
    session, texts,
};
use harness::turns::{begin, end, follow, keep, lease, leased};
use harness::wait::{LIMIT, until};
use tokio::time::timeout;

type Shared = Arc<dyn Store>;

/// Long enough for a test that wants it to last.
const HOUR_MS: i64 = 3_600_000;
/// Short enough to wait for, and longer than a few calls take.
const BRIEF_MS: i64 = 1_500;

const PLAIN: Upkeep = Upkeep {
    ttl_ms: None,
    reads_extend: false,
    elements_max: None,
};
const BRIEF: Upkeep = Upkeep {
    ttl_ms: Some(BRIEF_MS),
    ..PLAIN
};
const EXTENDED: Upkeep = Upkeep {
    reads_extend: true,
    ..BRIEF
};
const LONG: Upkeep = Upkeep {
    ttl_ms: Some(HOUR_MS),
    ..PLAIN
};
const FOUR: Upkeep = Upkeep {
    elements_max: Some(4),
    ..PLAIN
};

// Short ways.

async fn look(store: &Shared, s: &SessionId) -> Seen {
    store.look(s, Look::default()).await.unwrap()
}

async fn floor(store: &Shared, s: &SessionId, at: Sequence) -> Sequence {
    let look = Look {
        at,
        ..Look::default()
    };
    store.look(s, look).await.unwrap().floor
}

async fn update(store: &Shared, s: &SessionId, update: Update) -> Option<Seen> {
    store.update_session(s, update).await.unwrap()
}

async fn set_ttl(store: &Shared, s: &SessionId, ttl_ms: Option<i64>) -> Seen {
    let ttl_ms = Some(ttl_ms);
    let changed = Update {
        ttl_ms,
        ..Update::default()
    };
    update(store, s, changed).await.unwrap()
}

fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    pairs.into_iter().map(own).collect()
}

fn after(after: Sequence) -> Rewind {
    Rewind {
        after,
        request: fresh_request(),
        expected_last_sequence: None,
        time_ms: 1_763_910_000_000,
    }
}

async fn rewind(store: &Shared, s: &SessionId, to: Sequence) -> i64 {
    match store.rewind(s, after(to)).await.unwrap() {
        Rewound::Done { count } => count,
        other => panic!("not rewound: {other:?}"),
    }
}

fn to(session: &SessionId, through: Option<Sequence>) -> Fork {
    Fork {
        to: session.clone(),
        through,
    }
}

fn done(forked: Forked) -> Seen {
    match forked {
        Forked::Done(seen) => *seen,
        other => panic!("no fork: {other:?}"),
    }
}

/// A question, as it is stored.
fn question(text: impl std::fmt::Display) -> String {
    format!(r#"{{"type": "human", "data": {{"content": "{text}"}}}}"#)
}

fn answer(text: impl std::fmt::Display) -> String {
    format!(r#"{{"type": "ai", "data": {{"content": "{text}"}}}}"#)
}

/// Until the clock has moved on, so that what comes is later than what was.
async fn a_moment() {
    let from_ms = now_ms();
    until("the clock moves", async || {
        (now_ms() > from_ms + 20).then_some(())
    })
    .await;
}

async fn until_gone(store: &Shared, s: &SessionId) {
    until("the session has expired", async || {
        (look(store, s).await.count == 0).then_some(())
    })
    .await;
}

/// Runs a whole turn that stores these.
async fn turn(store: &Shared, s: &SessionId, id: &str, elements: &[&'static str]) {
    let begin = begin(id, lease());
    leased(store.begin_turn(s, begin.clone()).await.unwrap());
    let end = end(begin.key.id, begin.lease.token, elements);
    store.end_turn(s, end).await.unwrap();
}

/// All pages of a list.
async fn listed(store: &Shared, list: ListRecent) -> Vec<SessionId> {
    let mut list = list;
    let mut sessions = Vec::new();
    loop {
        let page = store.list_sessions(list.clone()).await.unwrap();
        assert!(page.sessions.len() <= list.limit);
        sessions.extend(page.sessions.into_iter().map(|(session, _)| session));
        match page.next {
            Some(next) => list.cursor = Some(next),
            None => return sessions,
        }
    }
}

fn by(limit: usize) -> ListRecent {
    ListRecent {
        limit,
        ..ListRecent::default()
    }
}

// Looking.

async fn an_unknown_session_is_an_empty_one(store: Shared, s: SessionId) {
    assert_eq!(look(&store, &s).await, Seen::default());
    assert_eq!(floor(&store, &s, 7).await, 0);
}

async fn a_look_says_what_there_is(store: Shared, s: SessionId) {
    let before_ms = now_ms();
    fill(&*store, &s, 3).await;
    let seen = look(&store, &s).await;
    let active_ms = seen.active_ms.unwrap();
    assert!((before_ms..=now_ms()).contains(&active_ms), "{active_ms}");
    let expected = Seen {
        count: 3,
        first_sequence: 1,
        last_sequence: 3,
        active_ms: seen.active_ms,
        ..Seen::default()
    };
    assert_eq!(seen, expected);
    for (at, expected) in [(0, 0), (1, 1), (3, 3), (4, 3)] {
        assert_eq!(floor(&store, &s, at).await, expected, "at {at}");
    }
    a_moment().await;
    fill(&*store, &s, 1).await;
    assert!(look(&store, &s).await.active_ms.unwrap() > active_ms);
}

async fn a_look_shows_the_turn_that_runs_or_else_the_last(store: Shared, s: SessionId) {
    turn(&store, &s, "first", &["q", "a"]).await;
    let seen = look(&store, &s).await.turn.unwrap();
    assert_eq!(
        (&*seen.name, seen.attempt, seen.request),
        ("first", 1, None)
    );
    assert!(matches!(seen.state, TurnState::Completed { .. }));

    a_moment().await;
    let second = begin("second", lease());
    leased(store.begin_turn(&s, second.clone()).await.unwrap());
    let with_request = Look {
        with_request: true,
        ..Look::default()
    };
    let seen = store.look(&s, with_request).await.unwrap().turn.unwrap();
    assert_eq!((seen.id, &*seen.name), (second.key.id, "second"));
    assert_eq!(seen.state, TurnState::Running { is_expired: false });
    assert_eq!(seen.request.as_ref(), Some(&second.request));
    assert_eq!(look(&store, &s).await.turn.unwrap().request, None);

    a_moment().await;
    let end = end(second.key.id, second.lease.token, &[]);
    store.end_turn(&s, end).await.unwrap();
    let seen = store.look(&s, with_request).await.unwrap().turn.unwrap();
    assert_eq!(
        (seen.id, seen.request),
        (second.key.id, Some(second.request))
    );
    assert!(matches!(seen.state, TurnState::Failed { .. }));
}

async fn the_floor_of_what_was_rewound_is_what_is_left(store: Shared, s: SessionId) {
    fill(&*store, &s, 5).await;
    rewind(&store, &s, 2).await;
    fill(&*store, &s, 2).await;
    for (at, expected) in [(1, 1), (2, 2), (3, 2), (5, 2), (6, 6), (7, 7), (100, 7)] {
        assert_eq!(floor(&store, &s, at).await, expected, "at {at}");
    }
    let seen = look(&store, &s).await;
    assert_eq!(
        (seen.count, seen.first_sequence, seen.last_sequence),
        (4, 1, 7)
    );
}

// Changing.

async fn an_update_changes_what_it_names_only(store: Shared, s: SessionId) {
    fill(&*store, &s, 1).await;
    let metadata = pairs([("user", "ann"), ("ключ", "é '\"%_")]);
    let title = "A title, é 会話".to_owned();
    let both = Update {
        title: Some(title.clone()),
        metadata: Some(metadata.clone()),
        ttl_ms: None,
    };
    let mut about = About {
        title,
        metadata,
        ttl_ms: None,
        origin: None,
    };
    assert_eq!(update(&store, &s, both).await.unwrap().about, about);
    about.ttl_ms = Some(HOUR_MS);
    assert_eq!(set_ttl(&store, &s, Some(HOUR_MS)).await.about, about);
    about.metadata = pairs([("other", "")]);
    let other = Update {
        metadata: Some(about.metadata.clone()),
        ..Update::default()
    };
    assert_eq!(update(&store, &s, other).await.unwrap().about, about);
    about.title = String::new();
    let untitled = Update {
        title: Some(String::new()),
        ..Update::default()
    };
    let seen = update(&store, &s, untitled).await.unwrap();
    assert_eq!((seen.about.clone(), seen.count), (about, 1));
    let mut again = look(&store, &s).await;
    assert!(is_same(again.expires_ms, seen.expires_ms));
    again.expires_ms = seen.expires_ms;
    assert_eq!(again, seen);
}

async fn a_session_without_elements_cannot_be_changed(store: Shared, s: SessionId) {
    let titled = Update {
        title: Some("title".to_owned()),
        ..Update::default()
    };
    assert_eq!(update(&store, &s, titled.clone()).await, None);
    assert_eq!(look(&store, &s).await, Seen::default());
    fill(&*store, &s, 1).await;
    store.clear(&s).await.unwrap();
    assert_eq!(update(&store, &s, titled).await, None);
    assert_eq!(look(&store, &s).await.about, About::default());
}

async fn a_clear_leaves_nothing_that_was_said_of_a_session(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    let all = Update {
        title: Some("title".to_owned()),
        metadata: Some(pairs([("a", "b")])),
        ttl_ms: Some(Some(HOUR_MS)),
    };
    update(&store, &s, all).await.unwrap();
    store.clear(&s).await.unwrap();
    for count in [0, 1] {
        let seen = look(&store, &s).await;
        assert_eq!((seen.count, seen.about), (count, About::default()));
        assert_eq!(seen.last_sequence, 3 + count);
        assert_eq!(seen.first_sequence, 4 * count);
        assert_eq!(
            (seen.epoch, seen.expires_ms, seen.turn),
            (Epoch(1), None, None)
        );
        if count == 0 {
            fill(&*store, &s, 1).await;
        }
    }
    let wanted = ListRecent {
        metadata: pairs([("a", "b")]),
        ..by(10)
    };
    assert_eq!(listed(&store, wanted).await, []);
}

// Time to live.

/// Whether two expiries are the same. Redis tells how much is left, so what is told of one moves by
/// a millisecond or so.
fn is_same(one: Option<i64>, other: Option<i64>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.abs_diff(other) <= 5,
        (one, other) => one == other,
    }
}

async fn a_time_to_live_starts_anew_with_each_write_and_not_with_a_read(
    store: Shared,
    s: SessionId,
) {
    fill(&*store, &s, 1).await;
    assert_eq!(look(&store, &s).await.expires_ms, None);
    let before_ms = now_ms();
    let mut expires_ms = set_ttl(&store, &s, Some(HOUR_MS)).await.expires_ms.unwrap();
    // Redis has its own clock and so has this test; they are of one machine.
    let about = before_ms + HOUR_MS - 1_000..=now_ms() + HOUR_MS + 1_000;
    assert!(about.contains(&expires_ms), "{expires_ms}");
    let told = expiry(&*store, &s).await;
    assert!(is_same(told, Some(expires_ms)), "{told:?} {expires_ms}");

    a_moment().await;
    read_all(&*store, &s).await;
    let seen = look(&store, &s).await;
    assert!(is_same(seen.expires_ms, Some(expires_ms)), "{seen:?}");
    for write in 0..3 {
        a_moment().await;
        match write {
            0 => fill(&*store, &s, 1).await,
            1 => turn(&store, &s, "turn", &["q", "a"]).await,
            _ => drop(set_ttl(&store, &s, Some(HOUR_MS)).await),
        }
        let next_ms = look(&store, &s).await.expires_ms.unwrap();
        assert!(
            next_ms >= expires_ms + 20,
            "{write}: {expires_ms} {next_ms}"
        );
        expires_ms = next_ms;
    }
}

async fn a_sessions_own_time_to_live_comes_before_the_stores(store: Shared, s: SessionId) {
    fill(&*store, &s, 1).await;
    let is_about = |seen: &Seen, ttl_ms: i64| {
        let left_ms = seen.expires_ms.unwrap() - now_ms();
        assert!(
            (ttl_ms - 30_000..=ttl_ms + 1_000).contains(&left_ms),
            "{left_ms}"
        );
    };
    is_about(&look(&store, &s).await, HOUR_MS);
    is_about(&set_ttl(&store, &s, Some(2 * HOUR_MS)).await, 2 * HOUR_MS);
    fill(&*store, &s, 1).await;
    is_about(&look(&store, &s).await, 2 * HOUR_MS);

    let for_ever = set_ttl(&store, &s, Some(0)).await;
    assert_eq!(
        (for_ever.expires_ms, for_ever.about.ttl_ms),
        (None, Some(0))
    );
    fill(&*store, &s, 1).await;
    assert_eq!(look(&store, &s).await.expires_ms, None);
    is_about(&set_ttl(&store, &s, None).await, HOUR_MS);
}

async fn an_expired_session_is_as_one_that_never_was(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    turn(&store, &s, "turn", &["q", "a"]).await;
    let said = Update {
        title: Some("title".to_owned()),
        metadata: Some(pairs([("a", "b")])),
        ttl_ms: Some(Some(BRIEF_MS)),
    };
    update(&store, &s, said).await.unwrap();
    until_gone(&store, &s).await;

    let seen = look(&store, &s).await;
    assert_eq!(
        (seen.last_sequence, seen.first_sequence, seen.floor),
        (0, 0, 0)
    );
    assert_eq!(
        (seen.about, seen.expires_ms, seen.turn),
        (About::default(), None, None)
    );
    let page = read_all(&*store, &s).await;
    assert_eq!((page.elements.len(), page.last_sequence), (0, 0));
    assert_eq!(expiry(&*store, &s).await, None);
    assert_eq!(store.expire(&s, now_ms() + HOUR_MS).await, Ok(false));
    assert_eq!(update(&store, &s, Update::default()).await, None);
    let id = begin("turn", lease()).key.id;
    assert_eq!(store.follow_turn(&s, follow(id)).await, Ok(None));
    assert_eq!(rewind(&store, &s, 0).await, 0);
    let fork = store.fork(&s, to(&fresh_session(), None)).await;
    assert_eq!(fork, Ok(Forked::Empty));
    let list = List {
        prefix: String::new(),
        cursor: None,
        limit: 100,
    };
    assert_eq!(store.sessions(list).await.unwrap().sessions, []);
    until("it has left the list", async || {
        listed(&store, by(10)).await.is_empty().then_some(())
    })
    .await;

    let appended = store.append(&s, batch(["anew"])).await.unwrap();
    assert_eq!((appended.first_sequence, appended.repeated), (1, false));
    assert_eq!(texts(&read_all(&*store, &s).await), ["anew"]);
    let seen = look(&store, &s).await;
    assert_eq!(
        (seen.about, seen.expires_ms, seen.turn),
        (About::default(), None, None)
    );
    assert_eq!(
        (seen.count, seen.first_sequence, seen.last_sequence),
        (1, 1, 1)
    );
}

async fn a_request_of_an_expired_session_counts_no_more(store: Shared, s: SessionId) {
    let append = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    store.append(&s, append.clone()).await.unwrap();
    until_gone(&store, &s).await;
    let again = store.append(&s, append).await.unwrap();
    assert_eq!((again.first_sequence, again.repeated), (1, false));
}

async fn reads_extend_a_life_if_they_are_to(store: Shared, s: SessionId) {
    fill(&*store, &s, 1).await;
    let until_ms = now_ms() + 3 * BRIEF_MS;
    until("three lives have gone by", async || {
        let page = read_all(&*store, &s).await;
        assert_eq!(page.elements.len(), 1, "it has expired while it was read");
        (now_ms() > until_ms).then_some(())
    })
    .await;
    // A look does not.
    until_gone(&store, &s).await;
}

async fn reads_extend_no_life_unless_they_are_to(store: Shared, s: SessionId) {
    fill(&*store, &s, 1).await;
    until("it expires while it is read", async || {
        let page = read_all(&*store, &s).await;
        page.elements.is_empty().then_some(())
    })
    .await;
}

async fn an_expiry_does_not_tear_a_turn(store: Shared, s: SessionId) {
    store.append(&s, batch(["before"])).await.unwrap();
    let first = begin("a", lease());
    leased(store.begin_turn(&s, first.clone()).await.unwrap());
    let until_ms = now_ms() + 2 * BRIEF_MS;
    until("its life is over", async || {
        (now_ms() > until_ms).then_some(())
    })
    .await;

    store
        .keep_turn(&s, keep(first.key.id, first.lease))
        .await
        .unwrap();
    let busy = store.begin_turn(&s, begin("b", lease())).await.unwrap();
    assert!(matches!(busy, Begun::Busy { .. }), "{busy:?}");
    let ended = store
        .end_turn(&s, end(first.key.id, first.lease.token, &["q", "a"]))
        .await
        .unwrap();
    let TurnState::Completed { appended, .. } = ended else {
        panic!("{ended:?}");
    };
    // With what was before or without it; the turn is whole, and the session lives.
    let page = read_all(&*store, &s).await;
    let held = texts(&page);
    assert!(
        held == ["before", "q", "a"] || held == ["q", "a"],
        "{held:?}"
    );
    let q = page.elements[held.len() - 2].sequence;
    assert_eq!((appended.first_sequence, appended.count), (q, 2));
    assert!(look(&store, &s).await.expires_ms.unwrap() > now_ms());
}

async fn an_expiry_is_set_once(store: Shared, s: SessionId) {
    let at_ms = now_ms() + HOUR_MS;
    assert_eq!(store.expire(&s, at_ms).await, Ok(false));
    assert_eq!(expiry(&*store, &s).await, None);
    fill(&*store, &s, 1).await;
    assert_eq!(store.expire(&s, at_ms).await, Ok(true));
    let is_set = |expiry: Option<i64>| expiry.is_some_and(|at| at.abs_diff(at_ms) < 1_000);
    assert!(is_set(expiry(&*store, &s).await));
    assert_eq!(store.expire(&s, at_ms + HOUR_MS).await, Ok(false));
    // The store sets none, so the one that was set stands.
    fill(&*store, &s, 1).await;
    assert!(is_set(expiry(&*store, &s).await));
}

// Trimming.

async fn trimming_takes_whole_exchanges_and_never_the_newest(store: Shared, s: SessionId) {
    for number in 0..3 {
        let exchange = [question(number), answer(number)];
        store.append(&s, batch(exchange)).await.unwrap();
    }
    let page = read_all(&*store, &s).await;
    assert_eq!(
        (sequences(&page), page.last_sequence),
        (vec![3, 4, 5, 6], 6)
    );
    let seen = look(&store, &s).await;
    assert_eq!(
        (seen.count, seen.first_sequence, seen.epoch),
        (4, 3, Epoch(0))
    );

    // Three more: the exchange of 3 and 4 goes for the first, that of 5 and 6 for the second.
    for (element, left) in [
        (question("long"), vec![5, 6, 7]),
        (answer("1"), vec![5, 6, 7, 8]),
        (answer("2"), vec![7, 8, 9]),
        (answer("3"), vec![7, 8, 9, 10]),
        // The newest exchange is too large by itself.
        (answer("4"), vec![7, 8, 9, 10, 11]),
        (answer("5"), vec![7, 8, 9, 10, 11, 12]),
        (question("next"), vec![13]),
    ] {
        store.append(&s, batch([element])).await.unwrap();
        assert_eq!(sequences(&read_all(&*store, &s).await), left);
        let seen = look(&store, &s).await;
        assert_eq!(
            (seen.count, seen.first_sequence),
            (left.len() as i64, left[0])
        );
    }
}

async fn what_has_no_question_is_not_trimmed(store: Shared, s: SessionId) {
    for number in 1..=7 {
        store.append(&s, batch([answer(number)])).await.unwrap();
    }
    assert_eq!(look(&store, &s).await.count, 7);
    // What stands before the first question goes with the first exchange that goes.
    store.append(&s, batch([question(1)])).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [8]);
}

async fn a_turn_trims_and_a_batch_is_trimmed_too(store: Shared, s: SessionId) {
    let many = (0..50).flat_map(|number| [question(number), answer(number)]);
    let appended = store.append(&s, batch(many)).await.unwrap();
    assert_eq!((appended.first_sequence, appended.count), (1, 100));
    assert_eq!(sequences(&read_all(&*store, &s).await), [97, 98, 99, 100]);
    let elements = [
        r#"{"type": "human", "data": {}}"#,
        r#"{"type": "ai", "data": {}}"#,
    ];
    turn(&store, &s, "turn", &elements).await;
    assert_eq!(sequences(&read_all(&*store, &s).await), [99, 100, 101, 102]);
}

async fn a_rewound_session_is_trimmed_by_what_it_has(store: Shared, s: SessionId) {
    let exchange = |number: i32| batch([question(number), answer(number)]);
    for number in 0..2 {
        store.append(&s, exchange(number)).await.unwrap();
    }
    rewind(&store, &s, 2).await;
    store.append(&s, exchange(2)).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [1, 2, 5, 6]);
    store.append(&s, exchange(3)).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [5, 6, 7, 8]);
    store.append(&s, exchange(4)).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [7, 8, 9, 10]);
    assert_eq!(look(&store, &s).await.count, 4);
}

/// Whoever pages while others write meets each element at its sequence, in order, and none twice.
async fn pages_stay_stable_while_a_session_is_trimmed(store: Shared, s: SessionId) {
    const ROUNDS: i64 = 60;
    let is_done = AtomicBool::new(false);
    let write = async {
        for round in 0..ROUNDS {
            let exchange = [question(2 * round + 1), answer(2 * round + 2)];
            store.append(&s, batch(exchange)).await.unwrap();
        }
        is_done.store(true, Ordering::SeqCst);
    };
    let read = async {
        let mut last = 0;
        while last < 2 * ROUNDS {
            let read = Read {
                after: last,
                limit: 3,
                ..all()
            };
            let was_done = is_done.load(Ordering::SeqCst);
            let page = store.read(&s, read).await.unwrap();
            assert!(
                !page.elements.is_empty() || !was_done,
                "nothing after {last}"
            );
            for (sequence, text) in sequences(&page).into_iter().zip(texts(&page)) {
                assert!(sequence > last, "{sequence} after {last}");
                let said = format!("\"{sequence}\"");
                assert!(text.contains(&said), "{sequence} holds {text}");
                last = sequence;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, async { tokio::join!(write, read) })
        .await
        .unwrap();
}

// Rewinding.

async fn a_rewind_deletes_what_is_after_it_once(store: Shared, s: SessionId) {
    fill(&*store, &s, 5).await;
    let asked = after(3);
    assert_eq!(
        store.rewind(&s, asked).await,
        Ok(Rewound::Done { count: 2 })
    );
    let page = read_all(&*store, &s).await;
    assert_eq!(
        (texts(&page), page.last_sequence),
        (vec!["1".into(), "2".into(), "3".into()], 5)
    );
    let appended = store.append(&s, batch(["x", "y"])).await.unwrap();
    assert_eq!((appended.first_sequence, appended.count), (6, 2));

    assert_eq!(
        store.rewind(&s, asked).await,
        Ok(Rewound::Done { count: 2 })
    );
    assert_eq!(sequences(&read_all(&*store, &s).await), [1, 2, 3, 6, 7]);
    let reused = Rewind {
        request: RequestKey {
            fingerprint: [1; 16],
            ..asked.request
        },
        ..asked
    };
    assert_eq!(store.rewind(&s, reused).await, Err(Error::RequestReused));

    // At the end, and beyond it, there is nothing to delete.
    for to in [7, 8, 1_000] {
        assert_eq!(rewind(&store, &s, to).await, 0);
    }
    assert_eq!(rewind(&store, &s, 6).await, 1);
    assert_eq!(rewind(&store, &s, 4).await, 1);
    assert_eq!(rewind(&store, &s, 1).await, 2);
    let next = store.append(&s, batch(["z"])).await.unwrap();
    assert_eq!(next.first_sequence, 8);
    assert_eq!(sequences(&read_all(&*store, &s).await), [1, 8]);
    assert_eq!(look(&store, &s).await.count, 2);
}

async fn pages_of_a_rewound_session_go_over_the_gap(store: Shared, s: SessionId) {
    fill(&*store, &s, 6).await;
    rewind(&store, &s, 3).await;
    fill(&*store, &s, 3).await;
    for (from, before, last, expected) in [
        (0, None, None, vec![1, 2, 3, 7, 8, 9]),
        (2, Some(8), None, vec![3, 7]),
        (3, None, None, vec![7, 8, 9]),
        (4, None, None, vec![7, 8, 9]),
        (6, None, None, vec![7, 8, 9]),
        (0, Some(6), None, vec![1, 2, 3]),
        (0, None, Some(4), vec![3, 7, 8, 9]),
        (0, Some(8), Some(2), vec![3, 7]),
        (0, Some(7), Some(1), vec![3]),
    ] {
        let read = Read {
            after: from,
            before,
            last,
            ..all()
        };
        let page = store.read(&s, read).await.unwrap();
        assert_eq!(sequences(&page), expected, "{read:?}");
    }
}

async fn all_of_a_session_can_be_rewound(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    assert_eq!(rewind(&store, &s, 0).await, 3);
    let seen = look(&store, &s).await;
    assert_eq!(
        (seen.count, seen.first_sequence, seen.last_sequence),
        (0, 0, 3)
    );
    assert_eq!(floor(&store, &s, 3).await, 0);
    assert_eq!(listed(&store, by(10)).await, []);
    assert_eq!(update(&store, &s, Update::default()).await, None);
    let next = Append {
        expected_last_sequence: Some(3),
        // It was not cleared.
        expected_epoch: Some(Epoch(0)),
        ..batch(["next"])
    };
    assert_eq!(store.append(&s, next).await.unwrap().first_sequence, 4);
    assert_eq!(sequences(&read_all(&*store, &s).await), [4]);
    assert_eq!(look(&store, &s).await.count, 1);
    assert_eq!(listed(&store, by(10)).await, [s]);
}

async fn a_rewind_can_be_bound_to_the_last_sequence(store: Shared, s: SessionId) {
    fill(&*store, &s, 4).await;
    let expecting = |expected, to| Rewind {
        expected_last_sequence: Some(expected),
        ..after(to)
    };
    let mismatch = |expected| {
        let actual = 4;
        Err(Error::SequenceMismatch { expected, actual })
    };
    assert_eq!(store.rewind(&s, expecting(3, 2)).await, mismatch(3));
    assert_eq!(look(&store, &s).await.count, 4);
    let asked = expecting(4, 2);
    let done = Ok(Rewound::Done { count: 2 });
    assert_eq!(store.rewind(&s, asked).await, done);
    // The last sequence that was given out stays the last, and a repeated call is recognised first.
    assert_eq!(
        store.rewind(&s, expecting(4, 1)).await,
        Ok(Rewound::Done { count: 1 })
    );
    fill(&*store, &s, 1).await;
    assert_eq!(store.rewind(&s, asked).await, done);
}

async fn a_repeated_rewind_of_an_empty_session_deletes_nothing(store: Shared, s: SessionId) {
    let asked = after(0);
    assert_eq!(
        store.rewind(&s, asked).await,
        Ok(Rewound::Done { count: 0 })
    );
    fill(&*store, &s, 2).await;
    assert_eq!(
        store.rewind(&s, asked).await,
        Ok(Rewound::Done { count: 0 })
    );
    assert_eq!(sequences(&read_all(&*store, &s).await), [1, 2]);
}

async fn a_session_is_not_rewound_while_a_turn_runs(store: Shared, s: SessionId) {
    fill(&*store, &s, 2).await;
    let done_before = after(2);
    store.rewind(&s, done_before).await.unwrap();
    let first = begin("a", lease());
    leased(store.begin_turn(&s, first.clone()).await.unwrap());
    let busy = Rewound::Busy {
        turn: first.key.id,
        name: "a".to_owned(),
    };
    let asked = after(1);
    assert_eq!(store.rewind(&s, asked).await, Ok(busy));
    // A repeated request is recognised all the same.
    let repeated = store.rewind(&s, done_before).await;
    assert_eq!(repeated, Ok(Rewound::Done { count: 0 }));
    assert_eq!(look(&store, &s).await.count, 2);
    let end = end(first.key.id, first.lease.token, &[]);
    store.end_turn(&s, end).await.unwrap();
    assert_eq!(
        store.rewind(&s, asked).await,
        Ok(Rewound::Done { count: 1 })
    );
}

async fn the_turns_that_stored_what_was_rewound_are_forgotten(store: Shared, s: SessionId) {
    for id in ["kept", "cut", "gone"] {
        turn(&store, &s, id, &["q", "a"]).await;
    }
    // Between the question and the answer of the second.
    assert_eq!(rewind(&store, &s, 3).await, 3);
    for (id, is_kept) in [("kept", true), ("cut", false), ("gone", false)] {
        let turn = begin(id, lease()).key.id;
        let followed = store.follow_turn(&s, follow(turn)).await.unwrap();
        assert_eq!(followed.is_some(), is_kept, "{id}");
    }
    let again = leased(store.begin_turn(&s, begin("gone", lease())).await.unwrap());
    assert_eq!(again.attempt, 1);
}

async fn rewinds_and_appends_at_the_same_time_are_whole(store: Shared, s: SessionId) {
    fill(&*store, &s, 10).await;
    let appends = (0..10).map(async |_| store.append(&s, batch(["x", "y"])).await.unwrap());
    let rewinds = (0..10).map(async |_| rewind(&store, &s, 5).await);
    let (appended, rewound) = tokio::join!(join_all(appends), join_all(rewinds));
    let mut given: Vec<_> = appended.iter().map(|one| one.first_sequence).collect();
    given.sort_unstable();
    assert_eq!(
        given,
        (0..10).map(|number| 11 + 2 * number).collect::<Vec<_>>()
    );
    let left = read_all(&*store, &s).await.elements.len() as i64;
    assert_eq!(left + rewound.iter().sum::<i64>(), 30);
    assert_eq!(look(&store, &s).await.count, left);
}

// Forking.

async fn a_fork_is_whole_from_the_first_moment(store: Shared, s: SessionId) {
    let count = 2 * FORK_STEP + 200;
    for part in 0..count / 100 {
        let elements = (1..=100).map(|number| (100 * part + number).to_string());
        store.append(&s, batch(elements)).await.unwrap();
    }
    let copy = fresh_session();
    let is_done = AtomicBool::new(false);
    let fork = async {
        let forked = store.fork(&s, to(&copy, None)).await.unwrap();
        is_done.store(true, Ordering::SeqCst);
        forked
    };
    let watch = async {
        while !is_done.load(Ordering::SeqCst) {
            let page = read_all(&*store, &copy).await;
            let held = page.elements.len();
            assert!(held == 0 || held == count, "a part is seen: {held}");
            assert_eq!(page.last_sequence, held as i64);
            let seen = look(&store, &copy).await.count;
            assert!(seen == 0 || seen == count as i64, "a part is seen: {seen}");
            let listed = listed(&store, by(10)).await;
            assert!(listed.iter().all(|session| [&s, &copy].contains(&session)));
        }
    };
    let (forked, ()) = tokio::join!(fork, watch);
    assert_eq!(done(forked).count, count as i64);
    let page = read_all(&*store, &copy).await;
    let expected: Vec<_> = (1..=count).map(|number| number.to_string()).collect();
    assert_eq!(texts(&page), expected);
    assert_eq!(sequences(&page), (1..=count as i64).collect::<Vec<_>>());
}

async fn a_fork_takes_what_is_said_of_a_session_and_leaves_it_alone(store: Shared, s: SessionId) {
    turn(&store, &s, "turn", &["1", "2"]).await;
    fill(&*store, &s, 3).await;
    let said = Update {
        title: Some("title".to_owned()),
        metadata: Some(pairs([("a", "b"), ("c", "d")])),
        ttl_ms: Some(Some(HOUR_MS)),
    };
    let mut about = update(&store, &s, said).await.unwrap().about;
    let before = look(&store, &s).await;
    let copy = fresh_session();
    let forked = done(store.fork(&s, to(&copy, Some(3))).await.unwrap());

    about.ttl_ms = None;
    about.origin = Some(Origin {
        session: s.clone(),
        sequence: 3,
    });
    assert_eq!((&forked.about, forked.expires_ms), (&about, None));
    assert_eq!(
        (forked.count, forked.first_sequence, forked.last_sequence),
        (3, 1, 3)
    );
    assert!(forked.active_ms.is_some() && forked.turn.is_none());
    assert_eq!(texts(&read_all(&*store, &copy).await), ["1", "2", "1"]);
    let after = look(&store, &s).await;
    assert!(
        after
            .expires_ms
            .unwrap()
            .abs_diff(before.expires_ms.unwrap())
            <= 2
    );
    let expires_ms = before.expires_ms;
    assert_eq!(
        Seen {
            expires_ms,
            ..after
        },
        before
    );
    let wanted = ListRecent {
        metadata: pairs([("a", "b")]),
        ..by(10)
    };
    assert_eq!(listed(&store, wanted).await.len(), 2);

    // It goes its own way.
    fill(&*store, &copy, 1).await;
    assert_eq!(sequences(&read_all(&*store, &copy).await), [1, 2, 3, 4]);
    assert_eq!(look(&store, &s).await.count, 5);
    store.clear(&s).await.unwrap();
    assert_eq!(look(&store, &copy).await.count, 4);
    store.clear(&copy).await.unwrap();
    assert_eq!(look(&store, &copy).await.about, About::default());
}

async fn a_fork_of_a_rewound_session_has_no_gaps(store: Shared, s: SessionId) {
    fill(&*store, &s, 4).await;
    rewind(&store, &s, 2).await;
    fill(&*store, &s, 2).await;
    // Up to a sequence that was rewound, and up to one beyond the end.
    for (through, origin, expected) in [
        (Some(4), 2, vec!["1", "2"]),
        (Some(5), 5, vec!["1", "2", "1"]),
        (Some(100), 6, vec!["1", "2", "1", "2"]),
        (None, 6, vec!["1", "2", "1", "2"]),
    ] {
        let copy = fresh_session();
        let forked = done(store.fork(&s, to(&copy, through)).await.unwrap());
        assert_eq!(forked.about.origin.unwrap().sequence, origin);
        let page = read_all(&*store, &copy).await;
        assert_eq!(texts(&page), expected);
        assert_eq!(
            sequences(&page),
            (1..=expected.len() as i64).collect::<Vec<_>>()
        );
    }
}

async fn a_repeated_fork_is_the_first_one(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    let copy = fresh_session();
    let first = done(store.fork(&s, to(&copy, None)).await.unwrap());
    fill(&*store, &s, 1).await;
    let again = done(store.fork(&s, to(&copy, None)).await.unwrap());
    assert_eq!((again.count, again.about), (3, first.about));
    fill(&*store, &copy, 1).await;
    let again = done(store.fork(&s, to(&copy, None)).await.unwrap());
    assert_eq!(again.count, 4);

    // Not by another call.
    let other = fresh_session();
    fill(&*store, &other, 1).await;
    for (from, through) in [(&s, Some(3)), (&other, None)] {
        let forked = store.fork(from, to(&copy, through)).await;
        assert_eq!(forked, Ok(Forked::Exists));
    }
    assert_eq!(look(&store, &copy).await.count, 4);
}

async fn forks_at_the_same_time_make_one(store: Shared, s: SessionId) {
    let elements = (0..2 * FORK_STEP).map(|number| number.to_string());
    store.append(&s, batch(elements)).await.unwrap();
    let copy = fresh_session();
    let forks = (0..4).map(|_| store.fork(&s, to(&copy, None)));
    for forked in join_all(forks).await {
        assert_eq!(done(forked.unwrap()).count, 2 * FORK_STEP as i64);
    }
    assert_eq!(read_all(&*store, &copy).await.elements.len(), 2 * FORK_STEP);
    assert_eq!(listed(&store, by(10)).await.len(), 2);
}

async fn a_fork_needs_something_to_copy_and_a_free_place(store: Shared, s: SessionId) {
    let copy = fresh_session();
    let forked = store.fork(&s, to(&copy, None)).await;
    assert_eq!(forked, Ok(Forked::Empty));
    fill(&*store, &s, 2).await;
    rewind(&store, &s, 0).await;
    assert_eq!(store.fork(&s, to(&copy, None)).await, Ok(Forked::Empty));
    fill(&*store, &s, 2).await;
    // The first one there has the sequence 3.
    assert_eq!(store.fork(&s, to(&copy, Some(2))).await, Ok(Forked::Empty));
    assert_eq!(store.fork(&s, to(&s, None)).await, Ok(Forked::Exists));

    let first = begin("a", lease());
    leased(store.begin_turn(&copy, first.clone()).await.unwrap());
    assert_eq!(store.fork(&s, to(&copy, None)).await, Ok(Forked::Exists));
    let end = end(first.key.id, first.lease.token, &[]);
    store.end_turn(&copy, end).await.unwrap();
    assert_eq!(
        done(store.fork(&s, to(&copy, None)).await.unwrap()).count,
        2
    );
}

async fn a_fork_into_a_cleared_session_gives_no_sequence_twice(store: Shared, s: SessionId) {
    fill(&*store, &s, 2).await;
    let copy = fresh_session();
    fill(&*store, &copy, 3).await;
    store.clear(&copy).await.unwrap();
    let forked = done(store.fork(&s, to(&copy, None)).await.unwrap());
    assert_eq!((forked.count, forked.epoch), (2, Epoch(1)));
    assert_eq!(sequences(&read_all(&*store, &copy).await), [4, 5]);
}

/// A fork of what is cleared or rewound meanwhile is whole or not there.
async fn a_change_of_what_is_copied_leaves_no_half_fork(store: Shared, s: SessionId) {
    let count = 3 * FORK_STEP as i64;
    for round in 0..6 {
        let elements = (0..count).map(|number| number.to_string());
        let appended = store.append(&s, batch(elements)).await.unwrap();
        let copy = fresh_session();
        let change = async {
            match round % 2 {
                0 => store.clear(&s).await.unwrap(),
                _ => rewind(&store, &s, appended.first_sequence + count / 2).await,
            }
        };
        let both = async { tokio::join!(store.fork(&s, to(&copy, None)), change) };
        let (forked, _) = timeout(LIMIT, both).await.unwrap();
        let held = read_all(&*store, &copy).await.elements.len() as i64;
        match forked.unwrap() {
            Forked::Done(seen) => assert_eq!((held, seen.count), (seen.count, held)),
            Forked::Empty | Forked::Changed => assert_eq!(held, 0),
            Forked::Exists => panic!("the new session exists"),
        }
        store.clear(&s).await.unwrap();
    }
}

// Listing.

async fn the_list_is_by_activity(store: Shared, s: SessionId) {
    let sessions: Vec<_> = (0..5)
        .map(|number| session(&format!("{s}-{number}")))
        .collect();
    for session in &sessions {
        fill(&*store, session, 2).await;
        a_moment().await;
    }
    let mut expected: Vec<_> = sessions.iter().rev().cloned().collect();
    for limit in [1, 2, 5, 6, 1_000] {
        assert_eq!(
            listed(&store, by(limit)).await,
            expected,
            "pages of {limit}"
        );
    }
    fill(&*store, &sessions[1], 1).await;
    a_moment().await;
    turn(&store, &sessions[3], "turn", &["q", "a"]).await;
    expected.sort_by_key(|one| match one {
        one if *one == sessions[3] => 0,
        one if *one == sessions[1] => 1,
        _ => 2,
    });
    assert_eq!(listed(&store, by(2)).await, expected);
    // Each with what there is to know of it.
    let page = store.list_sessions(by(10)).await.unwrap();
    for (session, seen) in page.sessions {
        assert_eq!(seen, look(&store, &session).await);
    }
}

async fn the_list_leaves_out_what_has_no_elements(store: Shared, s: SessionId) {
    let [cleared, rewound, begun, expired, kept] =
        ["cleared", "rewound", "begun", "expired", "kept"]
            .map(|name| session(&format!("{s}{name}")));
    for session in [&cleared, &rewound, &expired, &kept] {
        fill(&*store, session, 2).await;
    }
    store.clear(&cleared).await.unwrap();
    store.clear(&session(&format!("{s}never"))).await.unwrap();
    rewind(&store, &rewound, 0).await;
    store.begin_turn(&begun, begin("t", lease())).await.unwrap();
    set_ttl(&store, &expired, Some(BRIEF_MS)).await;
    until("it has left the list", async || {
        (listed(&store, by(2)).await == [kept.clone()]).then_some(())
    })
    .await;
}

async fn a_prefix_is_taken_as_it_is(store: Shared, s: SessionId) {
    let prefixes = [
        "a",
        "A",
        "a%",
        "a_",
        "a*",
        "a?",
        "[a]",
        "a[",
        "a\\",
        "a'",
        "a\"",
        "ä",
        "a\u{308}",
        "会話",
        "🎉",
        "a b",
        "a:",
        "\u{10ffff}",
    ];
    let name = |prefix: &str, rest: &str| session(&format!("{s}{prefix}{rest}"));
    let mut sessions = Vec::new();
    for prefix in prefixes {
        for rest in ["", "x", "%"] {
            sessions.push(name(prefix, rest));
        }
    }
    for session in &sessions {
        store.append(session, batch(["1"])).await.unwrap();
    }
    for prefix in prefixes {
        let prefix = format!("{s}{prefix}");
        let wanted = ListRecent {
            prefix: prefix.clone(),
            ..by(7)
        };
        let found = listed(&store, wanted).await;
        let expected: HashSet<_> = sessions
            .iter()
            .filter(|session| session.as_str().starts_with(&prefix))
            .cloned()
            .collect();
        assert_eq!(found.len(), expected.len(), "{prefix}: {found:?}");
        assert_eq!(found.into_iter().collect::<HashSet<_>>(), expected);
    }
}

async fn metadata_are_compared_whole(store: Shared, s: SessionId) {
    let all = [
        pairs([("user", "ann"), ("team", "red")]),
        pairs([("user", "ann"), ("team", "blue")]),
        pairs([("user", "anna")]),
        pairs([("user", "")]),
        pairs([("team", "ann")]),
        pairs([]),
    ];
    let sessions: Vec<_> = (0..all.len())
        .map(|number| session(&format!("{s}-{number}")))
        .collect();
    for (session, metadata) in sessions.iter().zip(&all) {
        fill(&*store, session, 1).await;
        let said = Update {
            metadata: Some(metadata.clone()),
            ..Update::default()
        };
        update(&store, session, said).await.unwrap();
    }
    for wanted in [
        pairs([]),
        pairs([("user", "ann")]),
        pairs([("team", "red")]),
        pairs([("team", "red"), ("user", "ann")]),
        pairs([("team", "red"), ("user", "anna")]),
        pairs([("user", "")]),
        pairs([("user", "an")]),
        pairs([("ann", "user")]),
    ] {
        let list = ListRecent {
            metadata: wanted.clone(),
            ..by(1)
        };
        let found: HashSet<_> = listed(&store, list).await.into_iter().collect();
        let has_all = |metadata: &BTreeMap<String, String>| {
            wanted
                .iter()
                .all(|(name, value)| metadata.get(name) == Some(value))
        };
        let expected: HashSet<_> = sessions
            .iter()
            .zip(&all)
            .filter(|(_, metadata)| has_all(metadata))
            .map(|(session, _)| session.clone())
            .collect();
        assert_eq!(found, expected, "{wanted:?}");
    }

    // What is said anew counts, and the order is by activity here too.
    let ann = ListRecent {
        metadata: pairs([("user", "ann")]),
        ..by(10)
    };
    a_moment().await;
    fill(&*store, &sessions[0], 1).await;
    assert_eq!(
        listed(&store, ann.clone()).await,
        [sessions[0].clone(), sessions[1].clone()]
    );
    let other = Update {
        metadata: Some(pairs([("user", "bob")])),
        ..Update::default()
    };
    update(&store, &sessions[0], other).await.unwrap();
    assert_eq!(listed(&store, ann).await, [sessions[1].clone()]);
}

/// Whoever walks over the list while others write, make and clear sessions meets each quiet session
/// once, and no other twice.
async fn a_walk_over_the_list_meets_each_quiet_session_once(store: Shared, s: SessionId) {
    const QUIET: usize = 40;
    const BUSY: usize = 20;
    let name = |kind: &str, number: usize| session(&format!("{s}-{kind}-{number}"));
    for number in 0..QUIET.max(BUSY) {
        // Mixed, so that all pages have some of both.
        for (kind, count) in [("quiet", QUIET), ("busy", BUSY)] {
            if number < count {
                fill(&*store, &name(kind, number), 1).await;
            }
        }
    }
    let is_done = AtomicBool::new(false);
    let churn = async {
        let mut round = 0;
        while !is_done.load(Ordering::SeqCst) {
            let busy = name("busy", round % BUSY);
            match round % 5 {
                0 => drop(store.clear(&busy).await.unwrap()),
                1 => fill(&*store, &name("new", round), 1).await,
                _ => fill(&*store, &busy, 1).await,
            }
            round += 1;
        }
    };
    let walk = async {
        for limit in [1, 3, 7, 50] {
            let mut met: HashMap<SessionId, usize> = HashMap::new();
            for session in listed(&store, by(limit)).await {
                *met.entry(session).or_default() += 1;
            }
            for (session, times) in &met {
                assert_eq!(*times, 1, "{session} in pages of {limit}");
            }
            for number in 0..QUIET {
                let quiet = name("quiet", number);
                assert!(met.contains_key(&quiet), "{quiet} in pages of {limit}");
            }
        }
        is_done.store(true, Ordering::SeqCst);
    };
    timeout(LIMIT, async { tokio::join!(churn, walk) })
        .await
        .unwrap();
}

/// One call looks at a bounded number of sessions, and the walk ends all the same.
async fn a_walk_that_finds_little_ends(store: Shared, s: SessionId) {
    let count = LOOKED_AT_MAX + 100;
    let names: Vec<_> = (0..count)
        .map(|number| session(&format!("{s}-{number}")))
        .collect();
    for part in names.chunks(100) {
        join_all(
            part.iter()
                .map(|session| store.append(session, batch(["1"]))),
        )
        .await;
    }
    let wanted = ListRecent {
        prefix: format!("{s}-x"),
        ..by(10)
    };
    let first = store.list_sessions(wanted.clone()).await.unwrap();
    assert_eq!(first.sessions, []);
    assert_eq!(listed(&store, wanted).await, []);
    let oldest = ListRecent {
        prefix: format!("{s}-0"),
        ..by(10)
    };
    assert_eq!(listed(&store, oldest).await, [names[0].clone()]);
    assert_eq!(listed(&store, by(1_000)).await.len(), count);
}

// Bells.

async fn hears(bell: &mut Bell, what: &str) {
    timeout(LIMIT, bell.rung())
        .await
        .unwrap_or_else(|_| panic!("no ring after {what}"));
}

/// Until it has not rung for so long that what it rang for is over.
async fn quiet(bell: &mut Bell) {
    while timeout(Duration::from_millis(50), bell.rung())
        .await
        .is_ok()
    {}
}

async fn every_bell_rings_after_each_change(store: Shared, s: SessionId) {
    let (mut bell, mut other) = (store.bell(&s), store.bell(&s));
    let first = begin("a", lease());
    let changes = ["append", "begin", "end", "rewind", "clear", "fork"];
    let from = fresh_session();
    fill(&*store, &from, 1).await;
    for change in changes {
        quiet(&mut bell).await;
        quiet(&mut other).await;
        match change {
            "append" => fill(&*store, &s, 2).await,
            "begin" => drop(store.begin_turn(&s, first.clone()).await.unwrap()),
            "end" => {
                let end = end(first.key.id, first.lease.token, &[]);
                drop(store.end_turn(&s, end).await.unwrap());
            }
            "rewind" => drop(rewind(&store, &s, 1).await),
            "clear" => drop(store.clear(&s).await.unwrap()),
            _ => drop(store.fork(&from, to(&s, None)).await.unwrap()),
        }
        hears(&mut bell, change).await;
        hears(&mut other, change).await;
    }
}

async fn no_ring_is_lost_once_a_bell_hangs(store: Shared, s: SessionId) {
    for number in 1..=50 {
        let mut bell = store.bell(&s);
        fill(&*store, &s, 1).await;
        hears(&mut bell, "an append").await;
        assert_eq!(look(&store, &s).await.last_sequence, number);
    }
}

/// What a bell has rung for can be read.
async fn a_bell_rings_after_the_change_and_not_before(store: Shared, s: SessionId) {
    const COUNT: i64 = 200;
    let mut bell = store.bell(&s);
    let write = async {
        for _ in 0..COUNT {
            store.append(&s, batch(["x"])).await.unwrap();
        }
    };
    let watch = async {
        let mut last = 0;
        while last < COUNT {
            hears(&mut bell, "an append").await;
            last = look(&store, &s).await.last_sequence;
        }
    };
    tokio::join!(write, watch);
}

async fn a_bell_rings_when_a_session_expires(store: Shared, s: SessionId) {
    fill(&*store, &s, 1).await;
    let mut bell = store.bell(&s);
    let watch = async {
        loop {
            bell.rung().await;
            if look(&store, &s).await.count == 0 {
                break;
            }
        }
    };
    timeout(LIMIT, watch)
        .await
        .expect("no ring after the expiry");
}

async fn many_quiet_bells_hang_at_the_same_time(store: Shared, s: SessionId) {
    let name = |number: usize| session(&format!("{s}-{number}"));
    let bells: Vec<_> = (0..10_000)
        .map(|number| store.bell(&name(number)))
        .collect();
    let mut bell = store.bell(&name(7));
    fill(&*store, &name(7), 1).await;
    hears(&mut bell, "an append").await;
    drop(bells);
}

/// Makes a test of each rule for one store: a function of `harness::stores`, which is told what the
/// store does by itself with sessions.
macro_rules! contract {
    ($backend:ident, $start:ident) => {
        mod $backend {
            use super::*;

            rules! { $start:
                PLAIN => an_unknown_session_is_an_empty_one,
                PLAIN => a_look_says_what_there_is,
                PLAIN => a_look_shows_the_turn_that_runs_or_else_the_last,
                PLAIN => the_floor_of_what_was_rewound_is_what_is_left,
                PLAIN => an_update_changes_what_it_names_only,
                PLAIN => a_session_without_elements_cannot_be_changed,
                PLAIN => a_clear_leaves_nothing_that_was_said_of_a_session,
                PLAIN => a_time_to_live_starts_anew_with_each_write_and_not_with_a_read,
                LONG => a_sessions_own_time_to_live_comes_before_the_stores,
                PLAIN => an_expired_session_is_as_one_that_never_was,
                BRIEF => a_request_of_an_expired_session_counts_no_more,
                EXTENDED => reads_extend_a_life_if_they_are_to,
                BRIEF => reads_extend_no_life_unless_they_are_to,
                BRIEF => an_expiry_does_not_tear_a_turn,
                PLAIN => an_expiry_is_set_once,
                FOUR => trimming_takes_whole_exchanges_and_never_the_newest,
                FOUR => what_has_no_question_is_not_trimmed,
                FOUR => a_turn_trims_and_a_batch_is_trimmed_too,
                FOUR => a_rewound_session_is_trimmed_by_what_it_has,
                FOUR => pages_stay_stable_while_a_session_is_trimmed,
                PLAIN => a_rewind_deletes_what_is_after_it_once,
                PLAIN => pages_of_a_rewound_session_go_over_the_gap,
                PLAIN => all_of_a_session_can_be_rewound,
                PLAIN => a_rewind_can_be_bound_to_the_last_sequence,
                PLAIN => a_repeated_rewind_of_an_empty_session_deletes_nothing,
                PLAIN => a_session_is_not_rewound_while_a_turn_runs,
                PLAIN => the_turns_that_stored_what_was_rewound_are_forgotten,
                PLAIN => rewinds_and_appends_at_the_same_time_are_whole,
                PLAIN => a_fork_is_whole_from_the_first_moment,
                PLAIN => a_fork_takes_what_is_said_of_a_session_and_leaves_it_alone,
                PLAIN => a_fork_of_a_rewound_session_has_no_gaps,
                PLAIN => a_repeated_fork_is_the_first_one,
                PLAIN => forks_at_the_same_time_make_one,
                PLAIN => a_fork_needs_something_to_copy_and_a_free_place,
                PLAIN => a_fork_into_a_cleared_session_gives_no_sequence_twice,
                PLAIN => a_change_of_what_is_copied_leaves_no_half_fork,
                PLAIN => the_list_is_by_activity,
                PLAIN => the_list_leaves_out_what_has_no_elements,
                PLAIN => a_prefix_is_taken_as_it_is,
                PLAIN => metadata_are_compared_whole,
                PLAIN => a_walk_over_the_list_meets_each_quiet_session_once,
                PLAIN => a_walk_that_finds_little_ends,
                PLAIN => every_bell_rings_after_each_change,
                PLAIN => no_ring_is_lost_once_a_bell_hangs,
                PLAIN => a_bell_rings_after_the_change_and_not_before,
                BRIEF => a_bell_rings_when_a_session_expires,
                PLAIN => many_quiet_bells_hang_at_the_same_time,
            }
        }
    };
}

macro_rules! rules {
    ($start:ident: $($upkeep:ident => $rule:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let backend = harness::stores::$start($upkeep).await;
                super::$rule(backend.store(), fresh_session()).await;
            }
        )*
    };
}

contract!(sqlite, sqlite_with);
contract!(redis, redis_with);
