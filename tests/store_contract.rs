//! The contract of a store, rule by rule, on every store. Each rule is a function over a running
//! store and a session that nothing else uses; `contract!` at the end makes a test of each.

mod harness;

use std::sync::Arc;

use bytes::Bytes;
use chat_memory::message::SessionId;
use chat_memory::store::{
    Append, Appended, Body, ELEMENT_BYTES_MAX, Epoch, Error, List, Order, Page, Read, Sequence,
    Store,
};
use futures_util::future::join_all;
use harness::stores::{
    Backend, all, batch, bytes, expiry, fill, fresh_session, read_all, request, sequences, session,
    texts,
};

type Shared = Arc<dyn Store>;

// Appending.

async fn an_append_is_whole_and_in_order(store: Shared, s: SessionId) {
    let first = store.append(&s, batch(["a", "b", "c"])).await.unwrap();
    assert_eq!(
        (first.first_sequence, first.count, first.repeated),
        (1, 3, false)
    );
    let second = store.append(&s, batch(["d", "e"])).await.unwrap();
    assert_eq!((second.first_sequence, second.count), (4, 2));

    let page = read_all(&*store, &s).await;
    assert_eq!(sequences(&page), [1, 2, 3, 4, 5]);
    assert_eq!(texts(&page), ["a", "b", "c", "d", "e"]);
    assert_eq!(page.last_sequence, 5);
    assert_eq!(page.epoch, Epoch(0));
}

async fn an_append_answers_with_its_own_time(store: Shared, s: SessionId) {
    let append = Append {
        time_ms: 1_763_910_000_123,
        ..batch(["a"])
    };
    let appended = store.append(&s, append).await.unwrap();
    assert_eq!(appended.time_ms, 1_763_910_000_123);
}

async fn batches_of_many_writers_stay_together(store: Shared, s: SessionId) {
    const WRITERS: usize = 16;
    const BATCHES: usize = 5;
    const SIZE: usize = 4;
    let write = |writer: usize| {
        let (store, s) = (store.clone(), s.clone());
        tokio::spawn(async move {
            for number in 0..BATCHES {
                let elements = (0..SIZE).map(|part| format!("{writer} {number} {part}"));
                let appended = store.append(&s, batch(elements)).await.unwrap();
                // Reads see every write that was acknowledged.
                let read = Read {
                    after: appended.first_sequence - 1,
                    limit: SIZE,
                    ..all()
                };
                let page = store.read(&s, read).await.unwrap();
                let expected: Vec<_> = (0..SIZE)
                    .map(|part| format!("{writer} {number} {part}"))
                    .collect();
                assert_eq!(texts(&page), expected);
            }
        })
    };
    for done in join_all((0..WRITERS).map(write)).await {
        done.unwrap();
    }

    let page = read_all(&*store, &s).await;
    let count = (WRITERS * BATCHES * SIZE) as i64;
    assert_eq!(sequences(&page), (1..=count).collect::<Vec<_>>());
    let mut next = [0; WRITERS];
    for whole in texts(&page).chunks(SIZE) {
        let writer: usize = whole[0].split(' ').next().unwrap().parse().unwrap();
        let number = next[writer];
        let expected: Vec<_> = (0..SIZE)
            .map(|part| format!("{writer} {number} {part}"))
            .collect();
        assert_eq!(whole, expected);
        next[writer] += 1;
    }
    assert_eq!(next, [BATCHES; WRITERS]);
}

async fn any_bytes_come_back_as_they_were(store: Shared, s: SessionId) {
    let every_byte: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    let elements: Vec<Bytes> = vec![
        Bytes::new(),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"a\0b\0"),
        Bytes::from_static(b"\xff\xfe invalid \xc3"),
        Bytes::from(every_byte),
        Bytes::from(large),
        Bytes::from("Ünïcödé 会話 🎉 \u{feff}"),
        Bytes::from_static(b"12345678901234567890"),
        Bytes::from_static(b"\r\n"),
    ];
    store.append(&s, batch(elements.clone())).await.unwrap();
    let page = read_all(&*store, &s).await;
    let read: Vec<_> = page
        .elements
        .iter()
        .map(|element| bytes(element).clone())
        .collect();
    assert!(read == elements, "an element came back changed");
}

async fn sessions_with_similar_names_do_not_mix(store: Shared, s: SessionId) {
    let names = [
        "a", "A", "a ", " a", "a:", "a:b", "a%", "a_", "a*", "a?", "[a]", "a'", "a\"", "a\\", "a/",
        "ä", "a\u{308}", "会話", "🎉", "1", "01", "1.0", "NULL",
    ];
    let sessions: Vec<_> = names
        .iter()
        .map(|name| session(&format!("{s}{name}")))
        .chain([session(&"x".repeat(511)), session(&"x".repeat(512))])
        .collect();
    for session in &sessions {
        let append = batch([session.to_string(), format!("{session}!")]);
        let appended = store.append(session, append).await.unwrap();
        assert_eq!(appended.first_sequence, 1, "{session:?}");
    }
    for session in &sessions {
        let page = read_all(&*store, session).await;
        assert_eq!(
            texts(&page),
            [session.to_string(), format!("{session}!")],
            "{session:?}"
        );
    }
    assert_eq!(store.clear(&sessions[0]).await.unwrap(), 2);
    for session in &sessions[1..] {
        assert_eq!(read_all(&*store, session).await.elements.len(), 2);
    }
}

// Clearing.

async fn a_clear_deletes_all_and_says_how_much(store: Shared, s: SessionId) {
    store.append(&s, batch(["a", "b", "c"])).await.unwrap();
    assert_eq!(store.clear(&s).await.unwrap(), 3);
    let page = read_all(&*store, &s).await;
    assert!(page.elements.is_empty());
    assert_eq!(page.last_sequence, 3);
    assert_eq!(store.clear(&s).await.unwrap(), 0);
}

async fn sequences_go_on_after_a_clear(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    store.clear(&s).await.unwrap();
    let appended = store.append(&s, batch(["d", "e"])).await.unwrap();
    assert_eq!(appended.first_sequence, 4);
    let page = read_all(&*store, &s).await;
    assert_eq!(sequences(&page), [4, 5]);
    assert_eq!(page.last_sequence, 5);
    store.clear(&s).await.unwrap();
    store.clear(&s).await.unwrap();
    let appended = store.append(&s, batch(["f"])).await.unwrap();
    assert_eq!(appended.first_sequence, 6);
}

async fn every_clear_raises_the_epoch(store: Shared, s: SessionId) {
    let epoch = async || read_all(&*store, &s).await.epoch;
    fill(&*store, &s, 1).await;
    assert_eq!(epoch().await, Epoch(0));
    store.clear(&s).await.unwrap();
    assert_eq!(epoch().await, Epoch(1));
    store.clear(&s).await.unwrap();
    assert_eq!(epoch().await, Epoch(2));
    fill(&*store, &s, 1).await;
    assert_eq!(epoch().await, Epoch(2));
}

async fn a_clear_fences_the_first_turn_of_a_session_too(store: Shared, s: SessionId) {
    let before = read_all(&*store, &s).await.epoch;
    assert_eq!(store.clear(&s).await.unwrap(), 0);
    let page = read_all(&*store, &s).await;
    assert_eq!(page.last_sequence, 0);
    let append = Append {
        expected_epoch: Some(before),
        ..batch(["too late"])
    };
    let refused = store.append(&s, append.clone()).await;
    assert_eq!(refused, Err(Error::Cleared));

    let append = Append {
        expected_epoch: Some(page.epoch),
        ..append
    };
    let appended = store.append(&s, append).await.unwrap();
    assert_eq!(appended.first_sequence, 1);
}

// Requests.

async fn a_repeated_request_stores_once(store: Shared, s: SessionId) {
    let append = Append {
        request: request("r", "ab"),
        time_ms: 1_763_910_000_000,
        ..batch(["a", "b"])
    };
    let first = store.append(&s, append.clone()).await.unwrap();
    assert!(!first.repeated);
    store.append(&s, batch(["c"])).await.unwrap();

    let later = Append {
        time_ms: 1_763_910_099_999,
        ..append
    };
    let second = store.append(&s, later).await.unwrap();
    assert!(second.repeated);
    assert_eq!((second.first_sequence, second.count), (1, 2));
    assert_eq!(second.time_ms, 1_763_910_000_000, "the first call's time");
    assert_eq!(texts(&read_all(&*store, &s).await), ["a", "b", "c"]);
}

async fn a_request_id_is_not_for_two_requests(store: Shared, s: SessionId) {
    let first = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    let other = Append {
        request: request("r", "b"),
        ..batch(["b"])
    };
    store.append(&s, first).await.unwrap();
    let refused = store.append(&s, other).await;
    assert_eq!(refused, Err(Error::RequestReused));
    assert_eq!(texts(&read_all(&*store, &s).await), ["a"]);
}

async fn fifty_simultaneous_repeats_store_once(store: Shared, s: SessionId) {
    let repeat = |_| {
        let (store, s) = (store.clone(), s.clone());
        let append = Append {
            request: request("r", "ab"),
            ..batch(["a", "b"])
        };
        tokio::spawn(async move { store.append(&s, append).await.unwrap() })
    };
    let answers = join_all((0..50).map(repeat)).await;
    let answers: Vec<_> = answers.into_iter().map(|answer| answer.unwrap()).collect();
    let stored = answers.iter().filter(|answer| !answer.repeated).count();
    assert_eq!(stored, 1);
    for answer in &answers {
        assert_eq!((answer.first_sequence, answer.count), (1, 2));
        assert_eq!(answer.time_ms, answers[0].time_ms, "one time for all");
    }
    assert_eq!(texts(&read_all(&*store, &s).await), ["a", "b"]);
}

async fn a_repeat_is_recognised_before_its_conditions(store: Shared, s: SessionId) {
    let append = Append {
        request: request("r", "a"),
        expected_last_sequence: Some(0),
        expected_epoch: Some(Epoch(0)),
        ..batch(["a"])
    };
    store.append(&s, append.clone()).await.unwrap();
    store.append(&s, batch(["b"])).await.unwrap();
    let again = store.append(&s, append.clone()).await.unwrap();
    assert!(again.repeated);
    assert_eq!(again.first_sequence, 1);

    let other = Append {
        request: request("r", "other"),
        ..append
    };
    let refused = store.append(&s, other).await;
    assert_eq!(refused, Err(Error::RequestReused));
}

async fn a_refused_request_is_not_remembered(store: Shared, s: SessionId) {
    let append = Append {
        request: request("r", "a"),
        expected_last_sequence: Some(7),
        ..batch(["a"])
    };
    assert!(store.append(&s, append.clone()).await.is_err());
    let append = Append {
        expected_last_sequence: None,
        ..append
    };
    assert!(!store.append(&s, append).await.unwrap().repeated);
}

async fn a_clear_forgets_requests(store: Shared, s: SessionId) {
    let append = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    store.append(&s, append.clone()).await.unwrap();
    store.clear(&s).await.unwrap();
    let again = store.append(&s, append).await.unwrap();
    assert_eq!((again.first_sequence, again.repeated), (2, false));
}

async fn a_request_id_belongs_to_its_session(store: Shared, s: SessionId) {
    let other_session = session(&format!("{s}-other"));
    let append = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    store.append(&s, append.clone()).await.unwrap();
    let in_other = store.append(&other_session, append).await.unwrap();
    assert!(!in_other.repeated);
}

// Conditions.

async fn an_append_goes_only_where_it_was_expected_to(store: Shared, s: SessionId) {
    let expecting = |expected| Append {
        expected_last_sequence: Some(expected),
        ..batch(["x"])
    };
    let mismatch = |expected, actual| Err(Error::SequenceMismatch { expected, actual });

    assert_eq!(store.append(&s, expecting(1)).await, mismatch(1, 0));
    store.append(&s, expecting(0)).await.unwrap();
    assert_eq!(store.append(&s, expecting(0)).await, mismatch(0, 1));
    store.append(&s, expecting(1)).await.unwrap();
    store.clear(&s).await.unwrap();
    assert_eq!(store.append(&s, expecting(0)).await, mismatch(0, 2));
    store.append(&s, expecting(2)).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [3]);
}

async fn exactly_one_of_twenty_contenders_wins(store: Shared, s: SessionId) {
    fill(&*store, &s, 2).await;
    let contend = |number: usize| {
        let (store, s) = (store.clone(), s.clone());
        let append = Append {
            expected_last_sequence: Some(2),
            ..batch([format!("{number} a"), format!("{number} b")])
        };
        tokio::spawn(async move { store.append(&s, append).await })
    };
    let mut winners = Vec::new();
    let contenders = join_all((0..20).map(contend)).await;
    for (number, answer) in contenders.into_iter().enumerate() {
        match answer.unwrap() {
            Ok(appended) => {
                assert_eq!(appended.first_sequence, 3);
                winners.push(number);
            }
            Err(error) => {
                let (expected, actual) = (2, 4);
                assert_eq!(error, Error::SequenceMismatch { expected, actual });
            }
        }
    }
    let [winner] = winners[..] else {
        panic!("{winners:?} won");
    };
    let expected = [
        "1".into(),
        "2".into(),
        format!("{winner} a"),
        format!("{winner} b"),
    ];
    assert_eq!(texts(&read_all(&*store, &s).await), expected);
}

async fn a_clear_fences_whoever_began_before(store: Shared, s: SessionId) {
    let expecting = |epoch| Append {
        expected_epoch: Some(Epoch(epoch)),
        ..batch(["x"])
    };
    store.append(&s, expecting(0)).await.unwrap();
    store.append(&s, expecting(0)).await.unwrap();
    store.clear(&s).await.unwrap();
    let refused = store.append(&s, expecting(0)).await;
    assert_eq!(refused, Err(Error::Cleared));
    assert!(read_all(&*store, &s).await.elements.is_empty());
    store.append(&s, expecting(1)).await.unwrap();
    assert_eq!(sequences(&read_all(&*store, &s).await), [3]);
}

// Reading.

async fn an_unknown_session_reads_as_empty(store: Shared, s: SessionId) {
    let empty = |after, before| Page {
        elements: Vec::new(),
        more: false,
        after,
        before,
        last_sequence: 0,
        epoch: Epoch(0),
    };
    assert_eq!(store.read(&s, all()).await, Ok(empty(0, 1)));
    let read = Read {
        after: 3,
        before: Some(9),
        last: Some(2),
        order: Order::NewestFirst,
        ..all()
    };
    assert_eq!(store.read(&s, read).await, Ok(empty(3, 9)));
}

/// Reads the range page by page, as a caller does.
async fn page_through(store: &dyn Store, s: &SessionId, first: Read) -> Vec<Sequence> {
    let mut seen = Vec::new();
    let mut read = first;
    loop {
        let page = store.read(s, read).await.unwrap();
        assert!(page.elements.len() <= read.limit);
        let Some(end) = page.elements.last() else {
            assert!(!page.more, "more, but nothing comes");
            return seen;
        };
        seen.extend(sequences(&page));
        if !page.more {
            return seen;
        }
        (read.after, read.before) = match read.order {
            Order::OldestFirst => (end.sequence, Some(page.before)),
            Order::NewestFirst => (page.after, Some(end.sequence)),
        };
        read.last = None;
    }
}

async fn pages_of_every_size_cover_all_exactly_once(store: Shared, s: SessionId) {
    const COUNT: i64 = 12;
    store
        .append(&s, batch((1..=COUNT).map(|number| number.to_string())))
        .await
        .unwrap();
    for limit in 1..=COUNT as usize + 1 {
        for last in [None, Some(5), Some(100)] {
            let first = last.map_or(1, |last| (COUNT - last as i64 + 1).max(1));
            let mut expected: Vec<_> = (first..=COUNT).collect();
            let read = Read {
                limit,
                last,
                ..all()
            };
            assert_eq!(page_through(&*store, &s, read).await, expected, "{read:?}");

            let read = Read {
                order: Order::NewestFirst,
                ..read
            };
            expected.reverse();
            assert_eq!(page_through(&*store, &s, read).await, expected, "{read:?}");
        }
    }
}

async fn paging_is_steady_while_others_append(store: Shared, s: SessionId) {
    const BEFORE: usize = 20;
    fill(&*store, &s, BEFORE).await;
    let writer = {
        let (store, s) = (store.clone(), s.clone());
        tokio::spawn(async move { fill(&*store, &s, 60).await })
    };
    let mut is_done = false;
    while !is_done {
        // One round more after the writer's end.
        is_done = writer.is_finished();
        for limit in [1, 3, 7] {
            let read = Read { limit, ..all() };
            let oldest_first = page_through(&*store, &s, read).await;
            let count = oldest_first.len() as i64;
            assert!(count >= BEFORE as i64);
            assert_eq!(oldest_first, (1..=count).collect::<Vec<_>>());

            let read = Read {
                order: Order::NewestFirst,
                ..read
            };
            let mut newest_first = page_through(&*store, &s, read).await;
            newest_first.reverse();
            let count = newest_first.len() as i64;
            assert_eq!(newest_first, (1..=count).collect::<Vec<_>>());
        }
    }
    writer.await.unwrap();
    assert_eq!(read_all(&*store, &s).await.elements.len(), BEFORE + 60);
}

async fn more_tells_whether_there_is_more(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    for order in [Order::OldestFirst, Order::NewestFirst] {
        for (limit, more) in [(1, true), (2, true), (3, false), (4, false)] {
            let read = Read {
                limit,
                order,
                ..all()
            };
            let page = store.read(&s, read).await.unwrap();
            assert_eq!(page.elements.len(), limit.min(3));
            assert_eq!(page.more, more, "{read:?}");
        }
        // The range's end counts, not the session's.
        let read = Read {
            after: 1,
            before: Some(3),
            limit: 1,
            order,
            ..all()
        };
        let page = store.read(&s, read).await.unwrap();
        assert_eq!((sequences(&page), page.more), (vec![2], false));
    }
}

async fn a_page_tells_the_range_it_stands_for(store: Shared, s: SessionId) {
    fill(&*store, &s, 9).await;
    for (after, before, last, expected) in [
        (0, None, None, (0, 10)),
        (4, None, None, (4, 10)),
        (0, Some(7), None, (0, 7)),
        (0, None, Some(3), (6, 10)),
        (2, Some(8), Some(3), (4, 8)),
        (5, Some(8), Some(3), (5, 8)),
        (0, None, Some(9), (0, 10)),
        (0, None, Some(1_000_000), (0, 10)),
    ] {
        for order in [Order::OldestFirst, Order::NewestFirst] {
            let read = Read {
                after,
                before,
                last,
                order,
                ..all()
            };
            let page = store.read(&s, read).await.unwrap();
            assert_eq!((page.after, page.before), expected, "{read:?}");
            assert_eq!(page.last_sequence, 9);
            let mut read_sequences = sequences(&page);
            read_sequences.sort_unstable();
            let in_range: Vec<_> = (page.after + 1..page.before).collect();
            assert_eq!(read_sequences, in_range, "{read:?}");
        }
    }
}

async fn the_last_ones_are_found_after_a_clear(store: Shared, s: SessionId) {
    fill(&*store, &s, 4).await;
    store.clear(&s).await.unwrap();
    fill(&*store, &s, 3).await;
    let last = async |last| {
        let read = Read {
            last: Some(last),
            ..all()
        };
        sequences(&store.read(&s, read).await.unwrap())
    };
    assert_eq!(last(2).await, [6, 7]);
    assert_eq!(last(3).await, [5, 6, 7]);
    assert_eq!(last(5).await, [5, 6, 7]);
}

async fn ranges_may_be_empty_or_reach_beyond(store: Shared, s: SessionId) {
    fill(&*store, &s, 3).await;
    for order in [Order::OldestFirst, Order::NewestFirst] {
        let range = async |after, before| {
            let read = Read {
                after,
                before,
                order,
                ..all()
            };
            let page = store.read(&s, read).await.unwrap();
            assert!(!page.more, "{read:?}");
            assert_eq!(page.last_sequence, 3);
            let mut found = sequences(&page);
            found.sort_unstable();
            found
        };
        assert!(range(3, None).await.is_empty());
        assert!(range(4, None).await.is_empty());
        assert!(range(i64::MAX, None).await.is_empty());
        assert!(range(0, Some(1)).await.is_empty());
        assert!(range(0, Some(0)).await.is_empty());
        assert!(range(0, Some(-5)).await.is_empty());
        assert!(range(1, Some(2)).await.is_empty());
        assert!(range(2, Some(2)).await.is_empty());
        assert!(range(3, Some(1)).await.is_empty());
        assert_eq!(range(0, Some(2)).await, [1]);
        assert_eq!(range(2, None).await, [3]);
        assert_eq!(range(1, Some(3)).await, [2]);
        assert_eq!(range(0, Some(4)).await, [1, 2, 3]);
        assert_eq!(range(0, Some(i64::MAX)).await, [1, 2, 3]);
    }
}

async fn a_page_stops_at_its_bytes(store: Shared, s: SessionId) {
    let elements = [10, 10, 10, 50, 0, 0].map(|size| vec![b'x'; size]);
    store.append(&s, batch(elements)).await.unwrap();
    let page_of = async |order, after, bytes_max| {
        let read = Read {
            order,
            after,
            bytes_max,
            ..all()
        };
        let page = store.read(&s, read).await.unwrap();
        (sequences(&page), page.more)
    };
    use Order::{NewestFirst, OldestFirst};
    assert_eq!(page_of(OldestFirst, 0, 30).await, (vec![1, 2, 3], true));
    assert_eq!(page_of(OldestFirst, 0, 29).await, (vec![1, 2], true));
    assert_eq!(page_of(OldestFirst, 0, 79).await, (vec![1, 2, 3], true));
    let whole = (vec![1, 2, 3, 4, 5, 6], false);
    assert_eq!(page_of(OldestFirst, 0, 80).await, whole);
    assert_eq!(page_of(NewestFirst, 0, 60).await, (vec![6, 5, 4, 3], true));
    // The first one always comes.
    assert_eq!(page_of(OldestFirst, 0, 0).await, (vec![1], true));
    assert_eq!(page_of(OldestFirst, 3, 1).await, (vec![4], true));
    assert_eq!(page_of(NewestFirst, 3, 0).await, (vec![6, 5], true));
}

async fn what_is_too_large_comes_as_its_size(store: Shared, s: SessionId) {
    let elements = [ELEMENT_BYTES_MAX, ELEMENT_BYTES_MAX + 1, 1].map(|size| vec![b'x'; size]);
    for element in elements {
        store.append(&s, batch([element])).await.unwrap();
    }
    for order in [Order::OldestFirst, Order::NewestFirst] {
        let read = Read {
            order,
            limit: 1,
            // Even so: it stands for itself, and is the first.
            bytes_max: 1,
            ..all()
        };
        assert_eq!(page_through(&*store, &s, read).await.len(), 3);

        let page = store.read(&s, Read { order, ..all() }).await.unwrap();
        for element in &page.elements {
            match element.sequence {
                1 => assert_eq!(bytes(element).len(), ELEMENT_BYTES_MAX),
                2 => assert_eq!(element.body, Body::TooLarge(ELEMENT_BYTES_MAX + 1)),
                _ => assert_eq!(bytes(element).len(), 1),
            }
        }
        assert_eq!(page.elements.len(), 3);
    }
    assert_eq!(store.clear(&s).await.unwrap(), 3);
}

// Restarting.

async fn a_restart_keeps_everything(backend: &mut impl Backend, s: SessionId) {
    let store = backend.store();
    let append = Append {
        request: request("r", "ab"),
        ..batch(["a", "b"])
    };
    fill(&*store, &s, 2).await;
    store.clear(&s).await.unwrap();
    let first = store.append(&s, append.clone()).await.unwrap();
    let before = read_all(&*store, &s).await;
    drop(store);

    backend.restart().await;
    let store = backend.store();
    assert_eq!(read_all(&*store, &s).await, before);
    let again = store.append(&s, append).await.unwrap();
    let repeated = Appended {
        repeated: true,
        ..first
    };
    assert_eq!(again, repeated);
    let next = store.append(&s, batch(["c"])).await.unwrap();
    assert_eq!(next.first_sequence, 5);
}

async fn a_restart_keeps_the_memory_of_a_clear(backend: &mut impl Backend, s: SessionId) {
    let store = backend.store();
    fill(&*store, &s, 3).await;
    store.clear(&s).await.unwrap();
    drop(store);

    backend.restart().await;
    let store = backend.store();
    let page = read_all(&*store, &s).await;
    assert_eq!((page.last_sequence, page.epoch), (3, Epoch(1)));
    let appended = store.append(&s, batch(["d"])).await.unwrap();
    assert_eq!(appended.first_sequence, 4);
}

// Listing.

/// All sessions whose ids begin with this, sorted; each once.
async fn listed(store: &dyn Store, prefix: &str, limit: usize) -> Vec<String> {
    let mut names = std::collections::BTreeSet::new();
    let mut cursor = None;
    loop {
        let list = List {
            prefix: prefix.to_owned(),
            cursor,
            limit,
        };
        let page = store.sessions(list).await.unwrap();
        names.extend(page.sessions.iter().map(|session| session.to_string()));
        cursor = page.next;
        if cursor.is_none() {
            return names.into_iter().collect();
        }
    }
}

async fn a_listing_holds_every_session_whatever_the_size_of_its_pages(store: Shared, s: SessionId) {
    let mut expected: Vec<_> = (0..57).map(|number| format!("{s}/{number}")).collect();
    expected.sort();
    for name in &expected {
        fill(&*store, &session(name), 1).await;
    }
    fill(&*store, &session("another"), 1).await;
    for limit in [1, 2, 7, 56, 57, 58, 1000] {
        let names = listed(&*store, &format!("{s}/"), limit).await;
        assert_eq!(names, expected, "{limit}");
        assert_eq!(listed(&*store, "", limit).await.len(), 58);
    }
}

async fn a_prefix_is_a_text_and_no_pattern(store: Shared, s: SessionId) {
    let marks = [
        "*", "?", "[a-z]", "]", "[^x]", "\\", "\\*", "%", "_", "a", "A", "ä", "会", "🎉", "-", "^",
    ];
    for mark in marks {
        fill(&*store, &session(&format!("{s}{mark}1")), 1).await;
    }
    for mark in marks {
        let prefix = format!("{s}{mark}");
        let mut expected: Vec<_> = marks
            .iter()
            .filter(|other| other.starts_with(mark))
            .map(|other| format!("{s}{other}1"))
            .collect();
        expected.sort();
        assert_eq!(listed(&*store, &prefix, 3).await, expected, "{mark}");
    }
    assert!(listed(&*store, "no such session", 3).await.is_empty());
}

async fn a_cleared_session_is_not_listed_until_it_is_filled_again(store: Shared, s: SessionId) {
    fill(&*store, &s, 2).await;
    store.clear(&s).await.unwrap();
    assert!(listed(&*store, s.as_str(), 10).await.is_empty());
    fill(&*store, &s, 1).await;
    assert_eq!(listed(&*store, s.as_str(), 10).await, [s.to_string()]);
}

async fn a_session_that_stays_is_listed_while_others_come_and_go(store: Shared, s: SessionId) {
    let mut steady: Vec<_> = (0..40)
        .map(|number| format!("{s} steady {number}"))
        .collect();
    steady.sort();
    for name in &steady {
        fill(&*store, &session(name), 1).await;
    }
    let mut names = std::collections::BTreeSet::new();
    let mut cursor = None;
    for number in 0.. {
        let come = session(&format!("{s} {number}"));
        fill(&*store, &come, 1).await;
        if number % 2 == 0 {
            store.clear(&come).await.unwrap();
        }
        let list = List {
            prefix: format!("{s} steady"),
            cursor,
            limit: 3,
        };
        let page = store.sessions(list).await.unwrap();
        names.extend(page.sessions.iter().map(|session| session.to_string()));
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(names.into_iter().collect::<Vec<_>>(), steady);
}

async fn a_listing_begun_before_a_restart_ends_after_it(backend: &mut impl Backend, s: SessionId) {
    let store = backend.store();
    let mut expected: Vec<_> = (0..40).map(|number| format!("{s}/{number}")).collect();
    expected.sort();
    for name in &expected {
        fill(&*store, &session(name), 1).await;
    }
    let list = |cursor| List {
        prefix: String::new(),
        cursor,
        limit: 5,
    };
    let mut page = store.sessions(list(None)).await.unwrap();
    let mut names: std::collections::BTreeSet<_> = page.sessions.into_iter().collect();
    drop(store);

    backend.restart().await;
    let store = backend.store();
    while let Some(cursor) = page.next {
        page = store.sessions(list(Some(cursor))).await.unwrap();
        names.extend(page.sessions);
    }
    let names: Vec<_> = names.iter().map(SessionId::to_string).collect();
    assert_eq!(names, expected);
}

async fn an_expiry_is_kept_or_refused_but_never_changed(store: Shared, s: SessionId) {
    let at_ms = chat_memory::message::now_ms() + 3_600_000;
    assert!(!store.expire(&s, at_ms).await.unwrap(), "nothing is there");
    fill(&*store, &s, 2).await;
    assert_eq!(expiry(&*store, &s).await, None);
    if store.expire(&s, at_ms).await.unwrap() {
        let first = expiry(&*store, &s).await.unwrap();
        assert!(first.abs_diff(at_ms) < 10_000, "{first} is not {at_ms}");
        assert!(!store.expire(&s, at_ms * 2).await.unwrap());
        let second = expiry(&*store, &s).await.unwrap();
        assert!(second.abs_diff(at_ms) < 10_000, "{second} is not {at_ms}");
    } else {
        assert_eq!(expiry(&*store, &s).await, None);
    }
    assert_eq!(read_all(&*store, &s).await.elements.len(), 2);
}

// The tests.

async fn is_reachable_and_describes_itself(store: Shared, _: SessionId) {
    assert!(*store.reachable().borrow());
    assert!(!store.describe().is_empty());
}

/// Makes a test of each rule for one store: a function of `harness::stores`.
macro_rules! contract {
    ($backend:ident) => {
        mod $backend {
            use super::*;

            rules! { $backend:
                an_append_is_whole_and_in_order,
                an_append_answers_with_its_own_time,
                batches_of_many_writers_stay_together,
                any_bytes_come_back_as_they_were,
                sessions_with_similar_names_do_not_mix,
                a_clear_deletes_all_and_says_how_much,
                sequences_go_on_after_a_clear,
                every_clear_raises_the_epoch,
                a_clear_fences_the_first_turn_of_a_session_too,
                a_repeated_request_stores_once,
                a_request_id_is_not_for_two_requests,
                fifty_simultaneous_repeats_store_once,
                a_repeat_is_recognised_before_its_conditions,
                a_refused_request_is_not_remembered,
                a_clear_forgets_requests,
                a_request_id_belongs_to_its_session,
                an_append_goes_only_where_it_was_expected_to,
                exactly_one_of_twenty_contenders_wins,
                a_clear_fences_whoever_began_before,
                an_unknown_session_reads_as_empty,
                pages_of_every_size_cover_all_exactly_once,
                paging_is_steady_while_others_append,
                more_tells_whether_there_is_more,
                a_page_tells_the_range_it_stands_for,
                the_last_ones_are_found_after_a_clear,
                ranges_may_be_empty_or_reach_beyond,
                a_page_stops_at_its_bytes,
                what_is_too_large_comes_as_its_size,
                a_listing_holds_every_session_whatever_the_size_of_its_pages,
                a_prefix_is_a_text_and_no_pattern,
                a_cleared_session_is_not_listed_until_it_is_filled_again,
                a_session_that_stays_is_listed_while_others_come_and_go,
                an_expiry_is_kept_or_refused_but_never_changed,
                is_reachable_and_describes_itself,
            }

            restart_rules! { $backend:
                a_restart_keeps_everything,
                a_restart_keeps_the_memory_of_a_clear,
                a_listing_begun_before_a_restart_ends_after_it,
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

macro_rules! restart_rules {
    ($backend:ident: $($rule:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let mut backend = harness::stores::$backend().await;
                super::$rule(&mut backend, fresh_session()).await;
            }
        )*
    };
}

contract!(sqlite);
contract!(redis);
