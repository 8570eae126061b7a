//! What the Redis store promises beyond the contract that all stores share: LangChain's keys, what
//! others may do to them, what a call costs, and what happens when Redis fails. Against real
//! servers, as every promise here is about what Redis does.

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chat_memory::history;
use chat_memory::message::SessionId;
use chat_memory::store::redis::{InvalidSettings, Redis as RedisStore, Settings};
use chat_memory::store::sessions::{
    Fork, Forked, ListRecent, Look, Origin, REWINDS_MAX, Rewind, Rewound, Seen, SessionStore as _,
    Update, Upkeep,
};
use chat_memory::store::turns::{
    BeginTurn, Begun, Chunk, EndTurn, FollowTurn, KeepTurn, Lease, Leased, Stop, TakeTurn, Taken,
    Token, TurnId, TurnState, TurnStore as _,
};
use chat_memory::store::{
    Append, Appended, Body, ELEMENT_BYTES_MAX, Epoch, Error, Order, Page, REQUEST_MEMORY_MS, Read,
    RequestKey, Store as _, TOMBSTONE_MS,
};
use chat_memory::tokens::Tokenizer;
use chat_memory::window::Purpose;
use futures_util::future::join_all;
use harness::failover::Load;
use harness::proxy::{Mode, Proxy};
use harness::redis::{Options, Redis};
use harness::turns;
use redis::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

/// What any call may take with the default timeout, as the store's doc says.
const CALL_MAX: Duration = Duration::from_secs(6);
/// What a condition may take to come true.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the facts outlive the list.
const LINGER_MS: i64 = 3_600_000;

const LIST: &str = "message_store:s";
const FACTS: &str = "{message_store:s}:session";
const REQUESTS: [&str; 2] = [
    "{message_store:s}:requests:0",
    "{message_store:s}:requests:1",
];
const TURNS: &str = "{message_store:s}:turns";
const RUNNING: &str = "{message_store:}:running";

fn session() -> SessionId {
    SessionId::parse("s").unwrap()
}

fn settings(url: impl Into<String>) -> Settings {
    Settings::new(url.into())
}

/// A store on a server, connected.
async fn store_at(url: impl Into<String>) -> RedisStore {
    let store = RedisStore::connect(settings(url)).expect("valid settings");
    store.ready(LIMIT).await.expect("Redis is there");
    store
}

/// One whose acknowledgements mean that a replica has it.
async fn store_that_waits(redis: &Redis) -> RedisStore {
    let settings = Settings {
        wait_replicas: 1,
        ..settings(redis.url())
    };
    let store = RedisStore::connect(settings).expect("valid settings");
    store.ready(LIMIT).await.expect("Redis is there");
    store
}

async fn start() -> (Redis, RedisStore) {
    let redis = Redis::start().await;
    let store = store_at(redis.url()).await;
    (redis, store)
}

fn request(id: &str) -> RequestKey {
    RequestKey::new("append", id, b"body")
}

/// An append of these elements, whose request is named by the first one.
fn appending(elements: &[&str]) -> Append {
    Append {
        elements: elements
            .iter()
            .map(|element| Bytes::copy_from_slice(element.as_bytes()))
            .collect(),
        request: request(elements[0]),
        time_ms: 1_763_910_000_123,
        expected_last_sequence: None,
        expected_epoch: None,
    }
}

async fn append(store: &RedisStore, elements: &[&str]) -> Appended {
    store
        .append(&session(), appending(elements))
        .await
        .expect("append")
}

/// Appends, and is answered the same when it is asked for again.
async fn append_and_repeat(store: &RedisStore, append: Append) {
    let first = store.append(&session(), append.clone()).await.unwrap();
    let second = store.append(&session(), append).await.unwrap();
    assert_eq!(
        second,
        Appended {
            repeated: true,
            ..first
        }
    );
}

const ALL: Read = Read {
    order: Order::OldestFirst,
    after: 0,
    before: None,
    last: None,
    limit: 1_000,
    bytes_max: 3 << 20,
};

async fn read(store: &RedisStore) -> Page {
    store.read(&session(), ALL).await.expect("read")
}

/// What a page holds: `1:a 2:b`.
fn show(page: &Page) -> String {
    let elements: Vec<String> = page
        .elements
        .iter()
        .map(|element| {
            let body = match &element.body {
                Body::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                Body::TooLarge(size) => format!("({size} bytes)"),
            };
            format!("{}:{body}", element.sequence)
        })
        .collect();
    elements.join(" ")
}

/// The index of sessions, which is written a moment after the sessions.
const INDEX: [&str; 6] = [
    "{message_store:}:sessions",
    "{message_store:}:names",
    "{message_store:}:pairs",
    "{message_store:}:pair:",
    "{message_store:}:round",
    "{message_store:}:announced",
];

/// All that a server holds but the index: each key, and its contents as DUMP gives them.
async fn contents(redis: &Redis) -> BTreeMap<String, Vec<u8>> {
    let keys: Vec<String> = redis.command(&["KEYS", "*"]).await;
    let mut contents = BTreeMap::new();
    for key in keys {
        if INDEX.iter().any(|index| key.starts_with(index)) {
            continue;
        }
        let dump = redis.command(&["DUMP", &key]).await;
        contents.insert(key, dump);
    }
    contents
}

async fn keys(redis: &Redis) -> Vec<String> {
    contents(redis).await.into_keys().collect()
}

async fn pttl(redis: &Redis, key: &str) -> i64 {
    redis.command(&["PTTL", key]).await
}

/// Fails unless the number is the expected one, or at most 10 s less (time has passed) or a second more
/// (what goes with the list is never earlier).
#[track_caller]
fn assert_close(found: i64, expected: i64) {
    assert!(
        (expected - 10_000..=expected + 1_000).contains(&found),
        "{found} is not {expected}"
    );
}

/// Waits until a condition holds.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Runs a call, and fails if it takes longer than the store promises.
async fn bounded<T>(call: impl Future<Output = T>) -> T {
    tokio::time::timeout(CALL_MAX + Duration::from_secs(1), call)
        .await
        .expect("a call must end in bounded time")
}

async fn until_reachable(store: &RedisStore, wanted: bool) {
    let mut reachable = store.reachable();
    let wait = reachable.wait_for(|reachable| *reachable == wanted);
    tokio::time::timeout(LIMIT, wait)
        .await
        .unwrap_or_else(|_| panic!("reachable is never {wanted}"))
        .expect("the store lives");
}

// What is kept, and how.

#[tokio::test]
async fn elements_are_kept_where_and_as_langchain_keeps_them() {
    let (redis, store) = start().await;
    let first = r#"{"type": "human", "data": {"content": "h\u00e9"}}"#;
    let written = append(&store, &[first, "b"]).await;
    assert_eq!(
        written,
        Appended {
            first_sequence: 1,
            count: 2,
            time_ms: 1_763_910_000_123,
            repeated: false
        }
    );
    assert_eq!(append(&store, &["c"]).await.first_sequence, 3);

    let list: Vec<String> = redis.command(&["LRANGE", LIST, "0", "-1"]).await;
    assert_eq!(list, ["c", "b", first], "the newest is at index 0");
    let day = (unix_ms(&redis).await / REQUEST_MEMORY_MS) as usize;
    let mut expected = vec![LIST.to_owned(), FACTS.into(), REQUESTS[day % 2].into()];
    expected.sort();
    assert_eq!(keys(&redis).await, expected);
}

async fn unix_ms(redis: &Redis) -> i64 {
    let (seconds, micros): (i64, i64) = redis.command(&["TIME"]).await;
    seconds * 1000 + micros / 1000
}

#[tokio::test]
async fn bytes_come_back_as_they_were_whatever_they_are() {
    let (_redis, store) = start().await;
    let all_bytes: Vec<u8> = (0..=255).collect();
    let elements = vec![
        Bytes::from(all_bytes),
        Bytes::new(),
        Bytes::from(vec![0; 1 << 20]),
    ];
    let mut large = appending(&["x"]);
    large.elements = elements.clone();
    store.append(&session(), large).await.unwrap();
    let page = read(&store).await;
    let found: Vec<Body> = page.elements.into_iter().map(|e| e.body).collect();
    let expected: Vec<Body> = elements.into_iter().map(Body::Bytes).collect();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn an_append_of_more_elements_than_lua_passes_at_once_is_stored_in_order() {
    let (_redis, store) = start().await;
    let mut many = appending(&["x"]);
    many.elements = (1..=10_001).map(|n| Bytes::from(n.to_string())).collect();
    let written = store.append(&session(), many).await.unwrap();
    assert_eq!((written.first_sequence, written.count), (1, 10_001));
    let tail = Read {
        after: 9_998,
        ..ALL
    };
    let page = store.read(&session(), tail).await.unwrap();
    assert_eq!(show(&page), "9999:9999 10000:10000 10001:10001");
}

// What others do to the list.

#[tokio::test]
async fn what_others_push_between_our_appends_gets_the_sequence_of_its_place() {
    let (redis, store) = start().await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs 1"]).await;
    append(&store, &["ours 2"]).await;
    let _: i64 = redis
        .command(&["LPUSH", LIST, "theirs 3", "theirs 4"])
        .await;
    assert_eq!(append(&store, &["ours 5"]).await.first_sequence, 5);
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs 6"]).await;

    let page = read(&store).await;
    assert_eq!(
        show(&page),
        "1:theirs 1 2:ours 2 3:theirs 3 4:theirs 4 5:ours 5 6:theirs 6"
    );
    assert_eq!((page.last_sequence, page.epoch), (6, Epoch(0)));

    let mut conditional = appending(&["ours 7"]);
    conditional.expected_last_sequence = Some(5);
    assert_eq!(
        store.append(&session(), conditional.clone()).await,
        Err(Error::SequenceMismatch {
            expected: 5,
            actual: 6
        })
    );
    conditional.expected_last_sequence = Some(6);
    let written = store.append(&session(), conditional).await.unwrap();
    assert_eq!(written.first_sequence, 7);
}

#[tokio::test]
async fn a_list_that_others_deleted_goes_on_after_the_last_sequence_and_fences_turns() {
    let (redis, store) = start().await;
    append(&store, &["a", "b", "c"]).await;
    let _: i64 = redis.command(&["DEL", LIST]).await;

    let mut fenced = appending(&["of a turn"]);
    fenced.expected_epoch = Some(Epoch(0));
    assert_eq!(
        store.append(&session(), fenced.clone()).await,
        Err(Error::Cleared)
    );
    let page = read(&store).await;
    assert_eq!((show(&page).as_str(), page.last_sequence), ("", 3));
    assert_eq!(page.epoch, Epoch(1));
    assert_eq!(
        store.append(&session(), fenced.clone()).await,
        Err(Error::Cleared)
    );

    assert_eq!(append(&store, &["d"]).await.first_sequence, 4);
    fenced.expected_epoch = Some(Epoch(1));
    assert_eq!(
        store
            .append(&session(), fenced)
            .await
            .unwrap()
            .first_sequence,
        5
    );
}

#[tokio::test]
async fn a_deletion_by_others_forgets_requests_as_ours_does() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let _: i64 = redis.command(&["DEL", LIST]).await;
    let again = append(&store, &["a"]).await;
    assert_eq!((again.first_sequence, again.repeated), (2, false));
    assert!(append(&store, &["a"]).await.repeated);
}

#[tokio::test]
async fn a_list_that_others_deleted_and_refilled_is_recognised_at_any_length() {
    for refilled in 1..=6 {
        let (redis, store) = start().await;
        append(&store, &["a", "b", "c"]).await;
        let _: i64 = redis.command(&["DEL", LIST]).await;
        for index in 1..=refilled {
            let _: i64 = redis
                .command(&["LPUSH", LIST, &format!("new {index}")])
                .await;
        }
        let expected: Vec<String> = (1..=refilled)
            .map(|index| format!("{}:new {index}", 3 + index))
            .collect();
        for _ in 0..2 {
            let page = read(&store).await;
            assert_eq!(show(&page), expected.join(" "), "refilled with {refilled}");
            assert_eq!(page.epoch, Epoch(1));
        }
        let next = append(&store, &["ours"]).await;
        assert_eq!(next.first_sequence, 3 + refilled + 1);
    }
}

#[tokio::test]
async fn sequences_that_only_a_read_has_given_out_are_not_given_out_again() {
    let (redis, store) = start().await;
    let _: i64 = redis.command(&["LPUSH", LIST, "a", "b", "c"]).await;
    assert_eq!(show(&read(&store).await), "1:a 2:b 3:c");
    let _: i64 = redis.command(&["DEL", LIST]).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "d"]).await;
    assert_eq!(show(&read(&store).await), "4:d");
}

#[tokio::test]
async fn changes_that_langchain_never_makes_renumber_once_and_then_rest() {
    let changes: [&[&str]; 5] = [
        &["RPUSH", LIST, "older"],
        &["LSET", LIST, "0", "changed"],
        &["LREM", LIST, "1", "b"],
        &["LTRIM", LIST, "0", "1"],
        &["LPOP", LIST],
    ];
    for change in changes {
        let (redis, store) = start().await;
        append(&store, &["a", "b", "c"]).await;
        let _: Value = redis.command(change).await;
        let page = read(&store).await;
        let first = page.elements[0].sequence;
        assert_eq!(first, 4, "{change:?}");
        assert_eq!(page.epoch, Epoch(1), "{change:?}");
        assert_eq!(read(&store).await, page, "{change:?}");
    }
}

#[tokio::test]
async fn a_session_that_expired_starts_at_1_again_and_leaves_nothing_but_an_epoch_of_a_clear() {
    let (redis, store) = start().await;
    for is_cleared_before in [false, true] {
        append(&store, &["a", "b"]).await;
        if is_cleared_before {
            store.clear(&session()).await.unwrap();
            append(&store, &["a", "b"]).await;
        }
        let _: i64 = redis.command(&["PEXPIRE", LIST, "1000"]).await;
        // This read takes note of the expiry; so would an append.
        let before = read(&store).await;
        eventually("the list expires", async || {
            redis.command::<i64>(&["EXISTS", LIST]).await == 0
        })
        .await;

        if !is_cleared_before {
            eventually("its companions go with it", async || {
                keys(&redis).await.is_empty()
            })
            .await;
        }
        let after = read(&store).await;
        assert_eq!((show(&after).as_str(), after.last_sequence), ("", 0));
        // A turn that ran meanwhile is stored, unless it must not bring back what was cleared.
        assert_eq!(after.epoch != before.epoch, is_cleared_before);
        assert_eq!(read(&store).await, after);
        let again = append(&store, &["a"]).await;
        assert_eq!((again.first_sequence, again.repeated), (1, false));
        assert_eq!(append(&store, &["c"]).await.first_sequence, 2);
        let _: Value = redis.command(&["FLUSHALL"]).await;
    }
}

// Expiry.

#[tokio::test]
async fn without_an_expiry_the_facts_stay_and_requests_go_when_their_day_is_past() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    assert_eq!(pttl(&redis, LIST).await, -1);
    assert_eq!(pttl(&redis, FACTS).await, -1);
    let now = unix_ms(&redis).await;
    let day = now / REQUEST_MEMORY_MS;
    let left = pttl(&redis, REQUESTS[(day % 2) as usize]).await;
    assert_close(
        left,
        (day + 2) * REQUEST_MEMORY_MS + LINGER_MS - now + 1_000,
    );
    assert!(left > REQUEST_MEMORY_MS, "24 hours at least");
}

#[tokio::test]
async fn records_of_the_day_before_yesterday_go_with_the_first_write_of_a_day() {
    for (expiry, how) in [(None, ""), (Some("100000"), "-")] {
        let (redis, store) = start().await;
        append(&store, &["a"]).await;
        if let Some(seconds) = expiry {
            let _: i64 = redis.command(&["EXPIRE", LIST, seconds]).await;
            append(&store, &["of the same day"]).await;
        }
        let day = unix_ms(&redis).await / REQUEST_MEMORY_MS;
        let bucket = REQUESTS[(day % 2) as usize];
        assert_eq!(
            redis.command::<String>(&["HGET", FACTS, "day"]).await,
            format!("{day}{how}")
        );
        // As a session that is written to in the first hour of each second day leaves it.
        let old = format!("{}{how}", day - 2);
        let _: i64 = redis.command(&["HSET", FACTS, "day", &old]).await;
        let _: i64 = redis.command(&["HSET", bucket, "an id of 8", "x"]).await;
        append(&store, &["b"]).await;
        assert_eq!(redis.command::<i64>(&["HLEN", bucket]).await, 1);
        append(&store, &["c"]).await;
        assert_eq!(redis.command::<i64>(&["HLEN", bucket]).await, 2);
        assert!(pttl(&redis, bucket).await > REQUEST_MEMORY_MS);
    }
}

#[tokio::test]
async fn records_that_others_have_deleted_have_an_expiry_again() {
    let (redis, store) = start().await;
    let with_id = |n: usize| format!("{{\"id\": \"cm_{n:014}\"}}");
    for n in 0..3 {
        append(&store, &[&with_id(n)]).await;
    }
    let _: i64 = redis.command(&["DEL", REQUESTS[0], REQUESTS[1]]).await;
    append(&store, &[&with_id(3)]).await;
    let day = (unix_ms(&redis).await / REQUEST_MEMORY_MS) as usize;
    assert!(pttl(&redis, REQUESTS[day % 2]).await > 0);
}

#[tokio::test]
async fn the_lists_expiry_is_kept_and_the_companions_follow_it() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let day = (unix_ms(&redis).await / REQUEST_MEMORY_MS) as usize;
    let requests = REQUESTS[day % 2];

    let _: i64 = redis.command(&["EXPIRE", LIST, "1000"]).await;
    append(&store, &["b"]).await;
    assert_close(pttl(&redis, LIST).await, 1_000_000);
    assert_close(pttl(&redis, requests).await, 1_000_000);
    assert_close(pttl(&redis, FACTS).await, 1_000_000);

    // LangChain pushes and lets it live longer; a read takes note.
    let _: i64 = redis.command(&["LPUSH", LIST, "c"]).await;
    let _: i64 = redis.command(&["EXPIRE", LIST, "5000"]).await;
    read(&store).await;
    assert_close(pttl(&redis, LIST).await, 5_000_000);
    assert_close(pttl(&redis, requests).await, 5_000_000);
    assert_close(pttl(&redis, FACTS).await, 5_000_000);

    // An expiry that others have changed is noticed without a push, too.
    let _: i64 = redis.command(&["EXPIRE", LIST, "7000"]).await;
    read(&store).await;
    assert_close(pttl(&redis, requests).await, 7_000_000);
    assert_close(pttl(&redis, FACTS).await, 7_000_000);

    // Those of a session that was cleared tell a turn so.
    store.clear(&session()).await.unwrap();
    let _: i64 = redis.command(&["LPUSH", LIST, "d"]).await;
    let _: i64 = redis.command(&["EXPIRE", LIST, "1000"]).await;
    append(&store, &["e"]).await;
    assert_close(pttl(&redis, LIST).await, 1_000_000);
    assert_close(pttl(&redis, FACTS).await, 1_000_000 + LINGER_MS);

    let _: i64 = redis.command(&["PERSIST", LIST]).await;
    append(&store, &["f"]).await;
    assert_eq!(pttl(&redis, LIST).await, -1);
    assert_eq!(pttl(&redis, FACTS).await, -1);
    assert!(pttl(&redis, requests).await > REQUEST_MEMORY_MS - 10_000);
}

#[tokio::test]
async fn a_clear_leaves_one_small_record_without_content_for_30_days() {
    let (redis, store) = start().await;
    append(&store, &["secret 1", "secret 2"]).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "secret 3"]).await;
    assert_eq!(store.clear(&session()).await, Ok(3));

    assert_eq!(keys(&redis).await, [FACTS]);
    let facts: BTreeMap<String, String> = redis.command(&["HGETALL", FACTS]).await;
    let facts: Vec<(&str, &str)> = facts
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        facts,
        [("base", "3"), ("epoch", "1"), ("last", "3"), ("mark", "")]
    );
    assert_close(pttl(&redis, FACTS).await, TOMBSTONE_MS);

    assert_eq!(store.clear(&session()).await, Ok(0), "nothing is left");
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    assert_eq!(append(&store, &["ours"]).await.first_sequence, 5);
    let page = read(&store).await;
    assert_eq!(show(&page), "4:theirs 5:ours");
    assert_eq!(page.epoch, Epoch(2));
}

#[tokio::test]
async fn a_clear_fences_a_turn_on_a_session_that_has_nothing_yet() {
    let (redis, store) = start().await;
    let epoch = read(&store).await.epoch;
    assert!(keys(&redis).await.is_empty(), "a read leaves nothing");
    assert_eq!(store.clear(&session()).await, Ok(0));
    let mut fenced = appending(&["of a turn"]);
    fenced.expected_epoch = Some(epoch);
    assert_eq!(store.append(&session(), fenced).await, Err(Error::Cleared));
    assert_eq!(keys(&redis).await, [FACTS]);
    assert_close(pttl(&redis, FACTS).await, LINGER_MS);
    assert_eq!(append(&store, &["a"]).await.first_sequence, 1);
}

// Requests.

/// The hash that holds the only record, and the record.
async fn only_record(redis: &Redis) -> (usize, Vec<u8>, Vec<u8>) {
    for (bucket, key) in REQUESTS.iter().enumerate() {
        let pairs: Vec<Vec<u8>> = redis.command(&["HGETALL", key]).await;
        if let [field, value] = &pairs[..] {
            return (bucket, field.clone(), value.clone());
        }
    }
    panic!("there is no record");
}

#[tokio::test]
async fn a_request_is_remembered_over_a_change_of_day() {
    let (redis, store) = start().await;
    let with_id = |n: u64| format!(r#"{{"id": "cm_{n:014}"}}"#);
    let (one, two, three) = (with_id(1), with_id(2), with_id(3));
    let first = append(&store, &[&one, &two]).await;
    let (bucket, field, record) = only_record(&redis).await;
    assert_eq!(field.len(), 8);
    assert_eq!(&record[10..], b"1:2");
    let day: String = redis.command(&["HGET", FACTS, "day"]).await;

    // As if it had been written yesterday: in the other bucket, and nothing today.
    let _: Value = redis
        .command(&["RENAME", REQUESTS[bucket], REQUESTS[1 - bucket]])
        .await;
    let yesterday = (day.parse::<i64>().unwrap() - 1).to_string();
    let _: i64 = redis.command(&["HSET", FACTS, "day", &yesterday]).await;
    let repeated = Appended {
        repeated: true,
        ..first
    };
    assert_eq!(append(&store, &[&one, &two]).await, repeated);
    assert_eq!(append(&store, &[&three]).await.first_sequence, 3);
    let today: String = redis.command(&["HGET", FACTS, "day"]).await;
    assert_eq!(today, format!("{day}+"), "yesterday has records");
    assert_eq!(append(&store, &[&one, &two]).await, repeated);
    assert!(append(&store, &[&three]).await.repeated);
    let list: Vec<String> = redis.command(&["LRANGE", LIST, "0", "-1"]).await;
    assert_eq!(list, [three, two, one]);
}

#[tokio::test]
async fn a_request_id_with_another_body_is_refused_and_writes_nothing() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let before = contents(&redis).await;
    let mut other = appending(&["a"]);
    other.request.fingerprint = [7; 16];
    assert_eq!(
        store.append(&session(), other.clone()).await,
        Err(Error::RequestReused)
    );
    assert_eq!(contents(&redis).await, before);
}

#[tokio::test]
async fn a_repeated_request_is_recognised_before_its_conditions() {
    let (_redis, store) = start().await;
    let mut conditional = appending(&["a"]);
    conditional.expected_last_sequence = Some(0);
    conditional.expected_epoch = Some(Epoch(0));
    append_and_repeat(&store, conditional).await;
}

#[tokio::test]
async fn a_hundred_requests_keep_their_compact_encoding() {
    let (redis, store) = start().await;
    for n in 0..100 {
        append(&store, &[&format!("element {n}")]).await;
    }
    for key in REQUESTS {
        if redis.command::<i64>(&["EXISTS", key]).await == 1 {
            let encoding: String = redis.command(&["OBJECT", "ENCODING", key]).await;
            assert!(
                ["listpack", "ziplist"].contains(&encoding.as_str()),
                "{encoding}"
            );
        }
    }
}

#[tokio::test]
async fn two_servers_that_append_the_same_request_at_once_store_it_once() {
    let (redis, one) = start().await;
    let two = store_at(redis.url()).await;
    for n in 0..50 {
        let element = format!("element {n}");
        let elements = [element.as_str()];
        let (a, b) = tokio::join!(append(&one, &elements), append(&two, &elements));
        assert_eq!(a.first_sequence, b.first_sequence);
        assert_ne!(a.repeated, b.repeated);
    }
    assert_eq!(redis.command::<i64>(&["LLEN", LIST]).await, 50);
}

// What a call costs.

/// The commands that reach a server, ours and those of scripts, from now on.
struct Monitor {
    lines: BufReader<tokio::net::TcpStream>,
}

impl Monitor {
    async fn start(redis: &Redis) -> Self {
        let stream = tokio::net::TcpStream::connect(redis.address())
            .await
            .unwrap();
        let mut lines = BufReader::new(stream);
        lines.write_all(b"MONITOR\r\n").await.unwrap();
        let mut monitor = Self { lines };
        assert_eq!(monitor.line().await, "+OK");
        monitor
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        let reading = self.lines.read_line(&mut line);
        tokio::time::timeout(LIMIT, reading).await.unwrap().unwrap();
        line.trim_end().to_owned()
    }

    /// The commands since the last call, without pings and without those that keep the index of
    /// sessions: those of clients, and those of scripts.
    async fn commands(&mut self, redis: &Redis) -> (Vec<String>, Vec<String>) {
        let _: String = redis.command(&["ECHO", "end of monitoring"]).await;
        let (mut of_clients, mut of_scripts) = (Vec::new(), Vec::new());
        loop {
            let line = self.line().await;
            if line.contains("end of monitoring") {
                return (of_clients, of_scripts);
            }
            // `+1700000000.1 [0 lua] "LLEN" "key"`
            let (origin, command) = line.split_once("] ").expect("a monitored command");
            let of_the_index = ["SCAN", "DBSIZE", "EXISTS"];
            let is_of_the_index = of_the_index
                .iter()
                .any(|word| command[1..].starts_with(word))
                || INDEX.iter().any(|key| command.contains(key))
                || command.starts_with("\"LLEN\"") && !origin.ends_with(" lua");
            if is_of_the_index {
                continue;
            }
            if origin.ends_with(" lua") {
                of_scripts.push(command.to_owned());
            } else if !command.starts_with("\"PING\"") && !command.contains("\"CLIENT\"") {
                of_clients.push(command.to_owned());
            }
        }
    }
}

/// How many elements these commands of scripts have read from the list.
fn elements_fetched(commands: &[String]) -> i64 {
    let count = |command: &String| {
        let words: Vec<&str> = command
            .split(' ')
            .map(|word| word.trim_matches('"'))
            .collect();
        match words[..] {
            ["LINDEX", ..] => 1,
            ["LRANGE", _, from, to] => {
                to.parse::<i64>().unwrap() - from.parse::<i64>().unwrap() + 1
            }
            _ => 0,
        }
    };
    commands.iter().map(count).sum()
}

#[tokio::test]
async fn the_newest_are_read_beside_a_script_once_they_are_known_to_be_small() {
    let (redis, store) = start().await;
    let with_id = |n: usize, size: usize| format!("{n:size$} \"id\": \"cm_{n:014}\"}}");
    for n in 1..=3 {
        append(&store, &[&with_id(n, 10)]).await;
    }
    let last = Read {
        last: Some(2),
        ..ALL
    };
    let mut monitor = Monitor::start(&redis).await;
    let mut calls = async || {
        let page = store.read(&session(), last).await.unwrap();
        assert_eq!(page.elements.len(), 2);
        let (of_clients, of_scripts) = monitor.commands(&redis).await;
        let names = of_clients.iter().map(|command| {
            let name = command.split('"').nth(1).unwrap_or_default();
            name.to_owned()
        });
        (
            names.collect::<Vec<_>>().join(" "),
            elements_fetched(&of_scripts),
        )
    };
    const BY_SCRIPT: (&str, i64) = ("EVALSHA", 3);
    // The monitor leaves out LLEN.
    const BESIDE: (&str, i64) = ("MULTI HMGET PTTL LRANGE EXEC", 0);
    fn shown(calls: &(String, i64)) -> (&str, i64) {
        (&calls.0, calls.1)
    }
    calls().await; // Loads the script, and sees that they are small.
    assert_eq!(shown(&calls().await), BESIDE);

    // A large one by this server; then by another, which this one learns from what it has read.
    append(&store, &[&with_id(4, 20_000)]).await;
    calls().await;
    assert_eq!(shown(&calls().await), BY_SCRIPT);
    for n in 5..=6 {
        append(&store, &[&with_id(n, 10)]).await;
    }
    calls().await;
    assert_eq!(shown(&calls().await), BESIDE);
    append(&store_at(redis.url()).await, &[&with_id(7, 20_000)]).await;
    calls().await;
    assert_eq!(shown(&calls().await), BY_SCRIPT);

    // LangChain's, which the script takes note of.
    for n in 8..=9 {
        append(&store, &[&with_id(n, 10)]).await;
    }
    calls().await;
    let theirs = "theirs".repeat(50);
    let _: i64 = redis.command(&["LPUSH", LIST, &theirs]).await;
    calls().await;
    assert_eq!(shown(&calls().await), BESIDE);

    // Something unusual: the transaction is tried once, and not again before something is added.
    let rewind = Rewind {
        after: 9,
        request: request("rewind"),
        expected_last_sequence: None,
        time_ms: 1_763_910_000_123,
    };
    store.rewind(&session(), rewind).await.unwrap();
    append(&store, &[&with_id(10, 10)]).await;
    calls().await;
    assert_eq!(shown(&calls().await), BY_SCRIPT);
    assert_eq!(shown(&calls().await), BY_SCRIPT);
}

#[tokio::test]
async fn a_turn_is_noted_begun_and_read_for_in_one_way_to_redis() {
    let (redis, store) = start().await;
    let element = |n: usize| format!("{{\"id\": \"cm_{n:014}\"}}");
    append(&store, &[&element(1), &element(2)]).await;
    let newest = Read {
        order: Order::NewestFirst,
        limit: 50,
        ..ALL
    };
    // So that they are known to be small.
    store.read(&session(), newest).await.unwrap();
    let begin = async |name: &str, waits: bool| {
        let begin = BeginTurn {
            waits,
            ..turns::begin(name, turns::lease())
        };
        let (turn, token) = (begin.key.id, begin.lease.token);
        let begun = store.begin_turn_and_read(&session(), begin, newest).await;
        let (begun, page) = begun.unwrap();
        assert!(matches!(begun, Begun::Leased(_)), "{begun:?}");
        assert_eq!(redis.command::<i64>(&["ZCARD", RUNNING]).await, 1);
        let end = turns::end(turn, token, &[]);
        store.end_turn(&session(), end).await.unwrap();
        page
    };
    begin("loads the script", false).await;
    let mut monitor = Monitor::start(&redis).await;
    assert_eq!(
        begin("a", false).await,
        Some(store.read(&session(), newest).await.unwrap())
    );
    let (of_clients, _) = monitor.commands(&redis).await;
    let all = of_clients.join("\n");
    assert_eq!(all.matches("MULTI").count(), 2, "{all}");

    // Who waits asks often.
    assert_eq!(begin("b", true).await, None);
    let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(begin("c", false).await, None);
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    let page = begin("d", false).await.unwrap();
    assert_eq!((page.elements.len(), page.last_sequence), (3, 3));
}

#[tokio::test]
async fn an_append_is_one_round_trip_and_so_is_a_read_which_fetches_what_it_returns() {
    let (redis, store) = start().await;
    let elements: Vec<String> = (1..=100).map(|n| format!("element {n}")).collect();
    let elements: Vec<&str> = elements.iter().map(String::as_str).collect();
    append(&store, &elements).await;
    // So that they are known to be small.
    let few = Read {
        order: Order::NewestFirst,
        limit: 2,
        ..ALL
    };
    store.read(&session(), few).await.unwrap();
    let mut monitor = Monitor::start(&redis).await;

    append(&store, &["another"]).await;
    let (of_clients, of_scripts) = monitor.commands(&redis).await;
    assert_eq!(of_clients.len(), 1, "{of_clients:?}");
    assert!(of_clients[0].starts_with("\"EVALSHA\""), "{of_clients:?}");
    assert_eq!(elements_fetched(&of_scripts), 1, "the last one, to compare");
    let facts: Vec<_> = of_scripts.iter().filter(|c| c.contains(FACTS)).collect();
    let is_small = |c: &&String| c.contains("\"last\"") && !c.contains("epoch");
    assert!(
        matches!(facts[..], [_, set] if is_small(&set)),
        "what has changed: {facts:?}"
    );

    for (order, last, limit) in [
        (Order::NewestFirst, None, 20),
        (Order::OldestFirst, None, 20),
        (Order::OldestFirst, Some(20), 100),
        (Order::NewestFirst, None, 1),
    ] {
        let some = Read {
            order,
            last,
            limit,
            ..ALL
        };
        let page = store.read(&session(), some).await.unwrap();
        let (of_clients, of_scripts) = monitor.commands(&redis).await;
        let first = of_clients[0].split(' ').next().unwrap_or_default();
        let is_one = match first {
            "\"EVALSHA\"" => of_clients.len() == 1,
            "\"MULTI\"" => of_clients.len() == 5 && of_clients[4] == "\"EXEC\"",
            _ => false,
        };
        assert!(is_one, "{of_clients:?}");
        let returned = page.elements.len() as i64;
        let to_compare = i64::from(of_clients.len() == 1);
        let fetched = elements_fetched(&of_scripts) + elements_fetched(&of_clients);
        assert_eq!(fetched, returned + to_compare, "{of_scripts:?}");
        let writes = ["HSET", "PERSIST", "PEXPIRE", "UNLINK"];
        let is_write = |command: &&String| writes.iter().any(|write| command.contains(write));
        assert_eq!(of_scripts.iter().find(is_write), None);
    }
}

#[tokio::test]
async fn appends_that_come_at_once_go_together_and_each_comes_to_its_own() {
    const SESSIONS: usize = 60;
    let (redis, store) = start().await;
    let id = |n: usize| SessionId::parse(format!("together {n}")).unwrap();
    let appending = |n: usize, element: &str| Append {
        elements: vec![Bytes::from(format!("{element} {n}"))],
        request: RequestKey::new("append", &format!("{element} {n}"), b"body"),
        time_ms: 1,
        expected_last_sequence: None,
        expected_epoch: None,
    };
    for n in 0..SESSIONS {
        store.append(&id(n), appending(n, "first")).await.unwrap();
    }
    let _: String = redis
        .command(&["SET", "message_store:together 7", "no list"])
        .await;

    let mut monitor = Monitor::start(&redis).await;
    let ids: Vec<SessionId> = (0..SESSIONS).map(id).collect();
    let appends = ids.iter().enumerate().map(|(n, id)| {
        let mut append = match n {
            // Done before.
            8 => appending(n, "first"),
            _ => appending(n, "second"),
        };
        // Somebody else was quicker.
        append.expected_last_sequence = (n == 9).then_some(5);
        if n == 10 {
            append.elements.push(Bytes::from("third"));
        }
        store.append(id, append)
    });
    let answers = join_all(appends).await;
    let (of_clients, _) = monitor.commands(&redis).await;
    assert!(of_clients.len() <= 4, "{} calls", of_clients.len());

    for (n, answer) in answers.into_iter().enumerate() {
        match (n, answer) {
            (7, Err(Error::WrongKeyType { key })) => assert!(key.ends_with("together 7")),
            (8, Ok(appended)) => assert!(appended.repeated && appended.first_sequence == 1),
            (9, Err(Error::SequenceMismatch { expected, actual })) => {
                assert_eq!((expected, actual), (5, 1));
            }
            (10, Ok(appended)) => assert_eq!((appended.first_sequence, appended.count), (2, 2)),
            (_, answer) => assert_eq!(answer.unwrap().first_sequence, 2, "{n}"),
        }
    }
    for (n, id) in ids.iter().enumerate().filter(|(n, _)| *n != 7) {
        let page = store.read(id, ALL).await.unwrap();
        let expected = match n {
            8 | 9 => 1,
            10 => 3,
            _ => 2,
        };
        assert_eq!(page.elements.len(), expected, "{n}");
    }
}

#[tokio::test]
async fn a_request_is_remembered_whatever_bytes_there_are_in_its_stamp() {
    let (_redis, store) = start().await;
    let element = |n: usize| format!("{{\"id\": \"cm_{n:014}\"}}");
    // The next ones go the short way.
    append(&store, &[&element(0)]).await;
    for count in [1, 2, 3] {
        // Zero bytes in all places of a time.
        for shift in [0, 8, 16, 24, 32, 40] {
            let elements: Vec<String> = (1..=count).map(element).collect();
            let elements: Vec<&str> = elements.iter().map(String::as_str).collect();
            let append = Append {
                time_ms: 1 << shift,
                request: request(&format!("{count} {shift}")),
                ..appending(&elements)
            };
            append_and_repeat(&store, append).await;
        }
    }
}

#[tokio::test]
async fn while_appends_are_under_way_as_many_wait_for_each_other() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = Arc::new(store_at(proxy.redis_url()).await);
    // Redis has the script then.
    append(&store, &["a"]).await;
    let calls = async || redis.command_counts().await["evalsha"];
    let before = calls().await;

    proxy.set(Mode::Delay(Duration::from_millis(200)));
    let mut appends = Vec::new();
    for n in 0..40 {
        let store = Arc::clone(&store);
        appends.push(tokio::spawn(async move {
            let id = SessionId::parse(format!("s{n}")).unwrap();
            store.append(&id, appending(&["b"])).await
        }));
        // It, and the task that sends, have this one thread, too.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    for append in appends {
        append.await.unwrap().unwrap();
    }
    // 1, 1, 2, 4, 8 and 16; then what is left, once one of these is answered.
    assert_eq!(calls().await - before, 7);
}

/// More than are under way at once, several times over: those that wait do not fail in turns.
#[tokio::test]
async fn appends_that_wait_for_others_fail_in_time_when_redis_falls_silent() {
    const APPENDS: usize = 1_000;
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = Arc::new(store_at(proxy.redis_url()).await);
    append(&store, &["a"]).await;
    let all_append = async || {
        let appends = (0..APPENDS).map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let id = SessionId::parse(format!("s{n}")).unwrap();
                bounded(store.append(&id, appending(&["b"]))).await
            })
        });
        let appends: Vec<_> = appends.collect();
        let mut answers = Vec::new();
        for append in appends {
            answers.push(append.await.unwrap());
        }
        answers
    };

    proxy.set(Mode::Silent);
    for answer in all_append().await {
        let is_retriable = matches!(
            answer,
            Err(Error::OutcomeUnknown(_) | Error::Unavailable(_))
        );
        assert!(is_retriable, "{answer:?}");
    }
    proxy.set(Mode::Forward);
    until_reachable(&store, true).await;
    for answer in all_append().await {
        assert_eq!(answer.unwrap().first_sequence, 1);
    }
    for n in 0..APPENDS {
        let list = format!("message_store:s{n}");
        let length: i64 = redis.command(&["LLEN", &list]).await;
        assert_eq!(length, 1, "{list}");
    }
}

#[tokio::test]
async fn others_elements_that_differ_only_in_their_text_are_not_taken_for_those_that_went() {
    let element = |text: &str| {
        format!(
            r#"{{"type": "human", "data": {{"content": "{text}", "additional_kwargs": {{}}, "response_metadata": {{}}, "type": "human", "name": null, "id": null, "example": false}}}}"#
        )
    };
    let filler = "x".repeat(1_000);
    for (one, other) in [
        ("yes".to_owned(), "no!".to_owned()),
        (format!("yes{filler}"), format!("no!{filler}")),
        (format!("{filler}yes"), format!("{filler}no!")),
    ] {
        let (redis, store) = start().await;
        append(&store, &[&element(&one)]).await;
        let _: i64 = redis.command(&["DEL", LIST]).await;
        let _: i64 = redis.command(&["LPUSH", LIST, &element(&other)]).await;
        let page = read(&store).await;
        assert_eq!((page.last_sequence, page.epoch), (2, Epoch(1)), "{one}");
    }
}

#[tokio::test]
async fn a_newest_element_that_others_have_replaced_is_noticed_by_a_read_of_the_newest() {
    let by_id = |n: usize| format!("{{\"id\": \"cm_{n:014}\"}}");
    for (one, other) in [(by_id(1), by_id(2)), ("one".repeat(100), "two".repeat(100))] {
        let (redis, store) = start().await;
        append(&store, &["first", &one]).await;
        let newest = Read {
            order: Order::NewestFirst,
            limit: 2,
            ..ALL
        };
        // So that they are known to be small.
        store.read(&session(), newest).await.unwrap();
        let _: Value = redis.command(&["LSET", LIST, "0", &other]).await;
        let page = store.read(&session(), newest).await.unwrap();
        assert_eq!((page.last_sequence, page.epoch), (4, Epoch(1)), "{one}");
    }
}

#[tokio::test]
async fn a_read_that_runs_out_of_bytes_fetches_one_piece_in_vain_at_most() {
    let (redis, store) = start().await;
    let large = "x".repeat(1_000);
    let elements: Vec<&str> = (0..1_000).map(|_| large.as_str()).collect();
    append(&store, &elements).await;
    let mut monitor = Monitor::start(&redis).await;
    for (bytes_max, returned) in [(1, 1), (5_000, 5), (20_500, 20), (500_999, 500)] {
        for order in [Order::OldestFirst, Order::NewestFirst] {
            let some = Read {
                bytes_max,
                order,
                ..ALL
            };
            let page = store.read(&session(), some).await.unwrap();
            assert_eq!(page.elements.len(), returned);
            assert!(page.more);
            let (_, of_scripts) = monitor.commands(&redis).await;
            let in_vain = elements_fetched(&of_scripts) - 1 - returned as i64;
            assert!((0..8).contains(&in_vain), "{in_vain} of {returned}");
        }
    }
}

#[tokio::test]
async fn the_last_20_of_100_000_cost_what_the_last_20_of_20_cost() {
    let (redis, store) = start().await;
    let small = SessionId::parse("small").unwrap();
    let large = SessionId::parse("large").unwrap();
    let mut client = redis.client().await.unwrap();
    let batch = vec!["element"; 1_000];
    for _ in 0..100 {
        let mut push = redis::cmd("LPUSH");
        push.arg("message_store:large").arg(&batch);
        let _: i64 = push.query_async(&mut client).await.unwrap();
    }
    let mut push = redis::cmd("LPUSH");
    push.arg("message_store:small").arg(&batch[..20]);
    let _: i64 = push.query_async(&mut client).await.unwrap();

    let mut monitor = Monitor::start(&redis).await;
    let last_20 = Read {
        last: Some(20),
        ..ALL
    };
    let mut costs = Vec::new();
    for session in [&small, &large] {
        // Takes note of what others have written.
        store.read(session, last_20).await.unwrap();
        monitor.commands(&redis).await;
        let page = store.read(session, last_20).await.unwrap();
        assert_eq!(page.elements.len(), 20);
        let (of_clients, of_scripts) = monitor.commands(&redis).await;
        costs.push((
            of_clients.len(),
            of_scripts.len(),
            elements_fetched(&of_clients) + elements_fetched(&of_scripts),
        ));
    }
    assert_eq!(costs, [(5, 0, 20); 2], "one transaction");
}

/// A window of so many tokens, and how many messages it has.
async fn read_window(store: &RedisStore, session: &SessionId, max_tokens: usize) -> usize {
    let wanted = history::Wanted {
        before: None,
        bounds: history::Asked {
            tokens: Some(max_tokens),
            ..Default::default()
        },
        tokenizer: Some(Tokenizer::O200k),
        besides: Vec::new(),
        purpose: Purpose::Reading,
        newest: None,
        bytes_max: 3 << 20,
        weigh: |_, _| Some(0),
    };
    let read = history::read(store, session, wanted).await.unwrap();
    read.entries.len()
}

#[tokio::test]
async fn a_window_of_a_million_messages_costs_what_a_window_of_a_hundred_costs() {
    let (redis, store) = start().await;
    let mut client = redis.client().await.unwrap();
    // Each character is a token.
    let text = "a1".repeat(33);
    let stored = |kind: &str| {
        format!(
            r#"{{"type": "{kind}", "data": {{"content": "{text}", "additional_kwargs": {{}}}}}}"#
        )
    };
    let pair = [stored("human"), stored("ai")];
    // LangChain's lists have their newest message first, so this is filled from its end.
    for (name, pairs) in [("small", 50), ("large", 500_000)] {
        let batch = redis::Script::new(
            "local pairs = {}
             for n = 1, 1000 do pairs[2 * n - 1] = ARGV[1] pairs[2 * n] = ARGV[2] end
             local left = tonumber(ARGV[3])
             while left > 0 do
                 local count = math.min(left, 1000)
                 redis.call('LPUSH', KEYS[1], unpack(pairs, 1, 2 * count))
                 left = left - count
             end",
        );
        let key = format!("message_store:{name}");
        let mut filling = batch.key(key);
        filling.arg(&pair[0]).arg(&pair[1]).arg(pairs);
        let _: () = filling.invoke_async(&mut client).await.unwrap();
    }
    let mut monitor = Monitor::start(&redis).await;
    let mut costs = Vec::new();
    for name in ["small", "large"] {
        let session = SessionId::parse(name).unwrap();
        // Takes note of what others have written.
        read_window(&store, &session, 4_000).await;
        monitor.commands(&redis).await;
        let messages = read_window(&store, &session, 4_000).await;
        let (of_clients, of_scripts) = monitor.commands(&redis).await;
        costs.push((
            messages,
            of_clients.len(),
            of_scripts.len(),
            elements_fetched(&of_clients) + elements_fetched(&of_scripts),
        ));
    }
    // The newest 64 messages by one transaction; the first 16, and one to compare, by one script.
    assert_eq!(costs, [(56, 6, costs[0].2, 64 + 16 + 1); 2]);
}

#[tokio::test]
async fn pages_of_any_range_order_and_size_are_what_the_list_says() {
    let (redis, store) = start().await;
    // A base, and elements of all sizes, one of them too large to be handed out.
    append(&store, &["cleared", "cleared"]).await;
    store.clear(&session()).await.unwrap();
    let mut sizes: Vec<usize> = (0..60).map(|n| n * 37 % 101).collect();
    sizes[30] = ELEMENT_BYTES_MAX + 1;
    sizes[31] = ELEMENT_BYTES_MAX;
    let mut client = redis.client().await.unwrap();
    for size in &sizes {
        let mut push = redis::cmd("LPUSH");
        push.arg(LIST).arg("x".repeat(*size));
        let _: i64 = push.query_async(&mut client).await.unwrap();
    }
    let all: Vec<(i64, usize)> = (3..).zip(sizes).collect();
    let newest = 62;

    for order in [Order::OldestFirst, Order::NewestFirst] {
        for (after, before) in [
            (0, None),
            (1, Some(3)),
            (2, Some(4)),
            (10, None),
            (10, Some(33)),
            (31, Some(36)),
            (40, Some(1_000)),
            (61, None),
            (62, None),
            (63, None),
            (i64::MAX, None),
            (0, Some(i64::MIN)),
            (20, Some(10)),
        ] {
            for last in [None, Some(1), Some(20), Some(usize::MAX)] {
                for (limit, bytes_max) in [
                    (1, 0),
                    (1, 3 << 20),
                    (7, 300),
                    (45, 3 << 20),
                    (1_000, 2_000),
                ] {
                    let read = Read {
                        order,
                        after,
                        before,
                        last,
                        limit,
                        bytes_max,
                    };
                    let page = store.read(&session(), read).await.unwrap();
                    check_page(&page, read, &all, newest);
                }
            }
        }
    }
}

/// Compares a page with what the docs of `Read` and `Page` say of it.
fn check_page(page: &Page, read: Read, all: &[(i64, usize)], newest: i64) {
    let end = read.before.unwrap_or(newest + 1);
    let mut range: Vec<(i64, usize)> = all
        .iter()
        .copied()
        .filter(|(sequence, _)| *sequence > read.after && *sequence < end)
        .collect();
    range.reverse();
    range.truncate(read.last.unwrap_or(usize::MAX));
    if read.order == Order::OldestFirst {
        range.reverse();
    }
    let mut expected = Vec::new();
    let mut bytes = 0;
    for (sequence, size) in &range {
        let counted = if *size > ELEMENT_BYTES_MAX { 0 } else { *size };
        bytes += counted;
        let is_full = expected.len() == read.limit || bytes > read.bytes_max;
        if is_full && !expected.is_empty() {
            break;
        }
        expected.push((*sequence, *size, *size > ELEMENT_BYTES_MAX));
    }
    let found: Vec<(i64, usize, bool)> = page
        .elements
        .iter()
        .map(|element| match &element.body {
            Body::Bytes(bytes) => (element.sequence, bytes.len(), false),
            Body::TooLarge(size) => (element.sequence, *size, true),
        })
        .collect();
    assert_eq!(found, expected, "{read:?}");
    assert_eq!(page.more, expected.len() < range.len(), "{read:?}");
    assert_eq!(page.last_sequence, newest);
    assert_eq!(page.before, end);
    // Read again with the range that the page names, the page is the same.
    let in_range = |sequence: i64| sequence > page.after && sequence < page.before;
    let named = all
        .iter()
        .filter(|(sequence, _)| in_range(*sequence))
        .count();
    assert_eq!(named, range.len(), "{read:?}: after {}", page.after);
    assert!(page.after >= read.after);
}

// Turns.

const TOKEN: Token = Token([1; 16]);
const LEASE: Lease = Lease {
    token: TOKEN,
    lease_ms: 30_000,
    retention_ms: 600_000,
    reserve: 100,
};

fn turn(name: &str) -> TurnId {
    RequestKey::new("turn", name, b"body").id
}

fn beginning(name: &str) -> BeginTurn {
    BeginTurn {
        key: RequestKey::new("turn", name, b"body"),
        name: name.to_owned(),
        request: Bytes::from_static(b"secret question"),
        lease: LEASE,
        waits: false,
    }
}

fn chunk(index: u32) -> Option<Chunk> {
    let bytes = Bytes::from_static(b"secret chunk");
    Some(Chunk { index, bytes })
}

fn keeping(name: &str, token: Token) -> KeepTurn {
    KeepTurn {
        turn: turn(name),
        lease: Lease { token, ..LEASE },
        chunk: chunk(0),
        last_event: 1,
    }
}

fn ending(name: &str, token: Token, elements: &[&str]) -> EndTurn {
    EndTurn {
        turn: turn(name),
        token,
        retention_ms: LEASE.retention_ms,
        chunk: chunk(1),
        elements: elements
            .iter()
            .map(|element| Bytes::copy_from_slice(element.as_bytes()))
            .collect(),
        time_ms: 1_763_910_000_123,
        outcome: Bytes::from_static(b"secret outcome"),
    }
}

fn taking(name: &str, token: Token) -> TakeTurn {
    TakeTurn {
        turn: turn(name),
        lease: Lease { token, ..LEASE },
        by_force: false,
        tries_max: 3,
        outcome: Bytes::from_static(b"gave up"),
    }
}

async fn begin(store: &RedisStore, begin: BeginTurn) -> Leased {
    match store.begin_turn(&session(), begin).await {
        Ok(Begun::Leased(leased)) => leased,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_turn_on_a_list_that_others_deleted_stores_nothing_and_goes() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    begin(&store, beginning("t")).await;
    store
        .keep_turn(&session(), keeping("t", TOKEN))
        .await
        .unwrap();
    let _: i64 = redis.command(&["DEL", LIST]).await;
    let ended = store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await;
    assert_eq!(ended, Err(Error::Cleared));
    assert_eq!(keys(&redis).await, [FACTS]);
    assert_eq!(show(&read(&store).await), "");

    // A list that others pushed to and deleted during the turn.
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    begin(&store, beginning("t")).await;
    let _: i64 = redis.command(&["DEL", LIST]).await;
    // What begins now finds nothing of the turn before.
    let leased = begin(&store, beginning("u")).await;
    assert_eq!((leased.attempt, leased.first_event), (1, 1));
    let kept = store.keep_turn(&session(), keeping("t", TOKEN)).await;
    assert_eq!(kept, Err(Error::Cleared));
}

#[tokio::test]
async fn nothing_of_turns_stays_after_a_clear() {
    let (redis, store) = start().await;
    begin(&store, beginning("done")).await;
    store
        .end_turn(&session(), ending("done", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    begin(&store, beginning("t")).await;
    store
        .keep_turn(&session(), keeping("t", TOKEN))
        .await
        .unwrap();
    assert_eq!(store.clear(&session()).await, Ok(2));
    assert_eq!(keys(&redis).await, [FACTS, RUNNING]);
    let ended = store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await;
    assert_eq!(ended, Err(Error::Cleared));
    assert_eq!(keys(&redis).await, [FACTS]);
}

#[tokio::test]
async fn the_index_of_running_turns_loses_what_does_not_run_and_keeps_what_does() {
    let (redis, store) = start().await;
    let orphans = async || store.orphaned_turns(10).await.unwrap();
    let age = async || {
        for entry in redis
            .command::<Vec<Vec<u8>>>(&["ZRANGE", RUNNING, "0", "-1"])
            .await
        {
            let mut zadd = redis::cmd("ZADD");
            zadd.arg(RUNNING).arg(1).arg(entry);
            let mut client = redis.client().await.unwrap();
            let _: i64 = zadd.query_async(&mut client).await.unwrap();
        }
    };
    begin(&store, beginning("t")).await;
    assert_eq!(orphans().await, [], "it has just begun");
    age().await;
    let named = [(session(), turn("t"))];
    assert_eq!(orphans().await, named);

    // Somebody has it: later.
    let other = Token([2; 16]);
    let taken = store.take_turn(&session(), taking("t", other)).await;
    assert_eq!(taken, Ok(Taken::Held));
    assert_eq!(orphans().await, []);

    // Another call that is refused leaves it, and leaves none of its own.
    let busy = store.begin_turn(&session(), beginning("u")).await;
    assert!(matches!(busy, Ok(Begun::Busy { .. })), "{busy:?}");
    assert_eq!(redis.command::<i64>(&["ZCARD", RUNNING]).await, 1);
    // The same turn, elsewhere, brings it back.
    let _: i64 = redis.command(&["DEL", RUNNING]).await;
    let mut same = beginning("t");
    same.lease.token = other;
    let exists = store.begin_turn(&session(), same).await;
    assert!(matches!(exists, Ok(Begun::Exists(_))), "{exists:?}");
    age().await;
    assert_eq!(orphans().await, named);

    // Its session is gone.
    let _: i64 = redis.command(&["DEL", TURNS]).await;
    let taken = store.take_turn(&session(), taking("t", other)).await;
    assert_eq!(taken, Ok(Taken::Gone));
    assert!(keys(&redis).await.is_empty());

    // One that its holder has given up is named at once.
    begin(&store, beginning("t")).await;
    let mut keep = keeping("t", TOKEN);
    keep.lease.lease_ms = 0;
    store.keep_turn(&session(), keep).await.unwrap();
    assert_eq!(orphans().await, named);
    let taken = store.take_turn(&session(), taking("t", other)).await;
    let Ok(Taken::Leased(leased)) = taken else {
        panic!("{taken:?}");
    };
    assert_eq!(
        (leased.attempt, leased.first_event, leased.next_chunk),
        (2, 102, 1)
    );
    assert_eq!(&leased.request[..], b"secret question");
    let ended = store.end_turn(&session(), ending("t", TOKEN, &[])).await;
    assert_eq!(ended, Err(Error::LeaseLost));
    store
        .end_turn(&session(), ending("t", other, &[]))
        .await
        .unwrap();
    assert_eq!(redis.command::<i64>(&["EXISTS", RUNNING]).await, 0);
}

#[tokio::test]
async fn old_turns_are_forgotten_by_those_that_begin() {
    let (redis, store) = start().await;
    for number in 0..20 {
        let name = format!("t{number}");
        begin(&store, beginning(&name)).await;
        store
            .keep_turn(&session(), keeping(&name, TOKEN))
            .await
            .unwrap();
        let mut end = ending(&name, TOKEN, &["q", "a"]);
        end.retention_ms = 1;
        store.end_turn(&session(), end).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // `running`, `line`, `first_turn`, `last_turn`; of the last turn its record, its two chunks and
    // its ordinal.
    assert_eq!(redis.command::<i64>(&["HLEN", TURNS]).await, 8);
    let left = pttl(&redis, TURNS).await;
    assert_close(left, LEASE.lease_ms + LEASE.retention_ms);

    // With a list that expires, they go when it does, but not while one runs.
    let _: i64 = redis.command(&["EXPIRE", LIST, "60"]).await;
    begin(&store, beginning("t")).await;
    assert_close(
        pttl(&redis, TURNS).await,
        LEASE.lease_ms + LEASE.retention_ms,
    );
    store
        .end_turn(&session(), ending("t", TOKEN, &["q"]))
        .await
        .unwrap();
    assert_close(pttl(&redis, TURNS).await, 60_000);
    let mut long = beginning("u");
    long.lease.retention_ms = 24 * LINGER_MS;
    begin(&store, long).await;
    assert_close(pttl(&redis, TURNS).await, LINGER_MS);
}

#[tokio::test]
async fn a_redis_without_memory_ends_no_turn_and_one_that_forgot_the_scripts_does() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    begin(&store, beginning("t")).await;
    let before = contents(&redis).await;
    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for elements in [&["q", "a"][..], &[]] {
        let ended = store
            .end_turn(&session(), ending("t", TOKEN, elements))
            .await;
        assert!(matches!(ended, Err(Error::Full(_))), "{ended:?}");
    }
    let kept = store.keep_turn(&session(), keeping("t", TOKEN)).await;
    assert!(matches!(kept, Err(Error::Full(_))), "{kept:?}");
    let begun = store.begin_turn(&session(), beginning("u")).await;
    assert!(matches!(begun, Err(Error::Full(_))), "{begun:?}");
    let follow = FollowTurn {
        turn: turn("t"),
        from_chunk: 0,
        bytes_max: 1,
        is_noted: true,
    };
    let followed = store
        .follow_turn(&session(), follow)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(followed.state, TurnState::Running { is_expired: false });
    assert_eq!(contents(&redis).await, before);

    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    for index in 0..2 {
        let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
        let mut keep = keeping("t", TOKEN);
        keep.chunk = chunk(index);
        store.keep_turn(&session(), keep).await.unwrap();
        let followed = store
            .follow_turn(&session(), follow)
            .await
            .unwrap()
            .unwrap();
        let counts = (followed.chunks.len(), followed.next_chunk, followed.more);
        assert_eq!(counts, (1, 1, index == 1));
    }
    let stopped = store.stop_turn(&session(), None, Stop::Keep).await.unwrap();
    assert_eq!(stopped.unwrap().name, "t");
    let kept = store
        .keep_turn(&session(), keeping("t", TOKEN))
        .await
        .unwrap();
    assert_eq!(kept.stop, Some(Stop::Keep));
    assert!(kept.followed_ms_ago.is_some());
    let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
    let mut end = ending("t", TOKEN, &["q", "a"]);
    end.chunk = chunk(2);
    let first = store.end_turn(&session(), end.clone()).await.unwrap();
    let TurnState::Completed { appended, .. } = &first else {
        panic!("{first:?}");
    };
    assert_eq!((appended.first_sequence, appended.count), (2, 2));
    assert_eq!(store.end_turn(&session(), end).await, Ok(first));
    assert_eq!(show(&read(&store).await), "1:a 2:q 3:a");
}

#[tokio::test]
async fn a_turn_is_told_to_have_completed_once_a_replica_has_it_whoever_asks() {
    let redis = Redis::start().await;
    let replica = redis.start_replica().await;
    let holder = store_at(redis.url()).await;
    let store = store_that_waits(&redis).await;
    begin(&holder, beginning("t")).await;
    let follow = FollowTurn {
        turn: turn("t"),
        from_chunk: 0,
        bytes_max: 1_000,
        is_noted: false,
    };
    let followed = async |store: &RedisStore| {
        let followed = store.follow_turn(&session(), follow).await;
        followed.map(|followed| followed.expect("a turn").state)
    };
    let begun = async || store.begin_turn(&session(), beginning("t")).await;
    let taken = async || store.take_turn(&session(), taking("t", TOKEN)).await;
    let stopped = async || {
        let id = Some(turn("t"));
        let stopped = store.stop_turn(&session(), id, Stop::Keep).await;
        stopped.map(|stopped| stopped.expect("a turn").state)
    };

    replica.pause();
    // What runs is told as it is.
    let running = TurnState::Running { is_expired: false };
    assert_eq!(followed(&store).await, Ok(running));
    let end = ending("t", TOKEN, &["q", "a"]);
    let completed = holder.end_turn(&session(), end).await.unwrap();
    assert_eq!(followed(&holder).await.as_ref(), Ok(&completed));
    let errors = [
        followed(&store).await.unwrap_err(),
        begun().await.unwrap_err(),
        taken().await.unwrap_err(),
        stopped().await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::OutcomeUnknown(_)), "{error}");
    }

    replica.resume();
    eventually("the replica has it", async || {
        followed(&store).await.is_ok()
    })
    .await;
    assert_eq!(followed(&store).await.as_ref(), Ok(&completed));
    assert_eq!(begun().await, Ok(Begun::Exists(completed.clone())));
    assert_eq!(taken().await, Ok(Taken::Ended(completed.clone())));
    assert_eq!(stopped().await, Ok(completed));
    assert_eq!(replica.command::<i64>(&["LLEN", LIST]).await, 2);
}

#[tokio::test]
async fn those_who_wait_have_the_turn_in_order() {
    let (_redis, store) = start().await;
    let waiting = |name| BeginTurn {
        waits: true,
        ..beginning(name)
    };
    let before = async |name| match store.begin_turn(&session(), waiting(name)).await {
        Ok(Begun::Waiting {
            before,
            expired: None,
        }) => before,
        other => panic!("{other:?}"),
    };
    begin(&store, beginning("t")).await;
    assert_eq!(
        (before("u").await, before("v").await, before("u").await),
        (0, 1, 0)
    );
    store
        .end_turn(&session(), ending("t", TOKEN, &[]))
        .await
        .unwrap();
    assert_eq!(before("v").await, 1);
    begin(&store, waiting("u")).await;
    assert_eq!(before("v").await, 0);
    store
        .end_turn(&session(), ending("u", TOKEN, &[]))
        .await
        .unwrap();
    begin(&store, waiting("v")).await;
    store
        .end_turn(&session(), ending("v", TOKEN, &[]))
        .await
        .unwrap();
    let anew = begin(&store, beginning("t")).await;
    assert_eq!(
        (anew.attempt, anew.first_event, anew.next_chunk),
        (2, 101, 0)
    );
}

// Sessions as a whole.

/// A store that does things by itself, on the same server.
async fn store_with(redis: &Redis, upkeep: Upkeep) -> RedisStore {
    let store = RedisStore::connect(Settings {
        upkeep,
        ..settings(redis.url())
    })
    .unwrap();
    store.ready(LIMIT).await.unwrap();
    store
}

fn rewinding(id: &str, after: i64) -> Rewind {
    Rewind {
        after,
        request: RequestKey::new("rewind", id, &after.to_be_bytes()),
        expected_last_sequence: None,
        time_ms: 1,
    }
}

async fn rewind(store: &RedisStore, id: &str, after: i64) -> Rewound {
    store
        .rewind(&session(), rewinding(id, after))
        .await
        .unwrap()
}

async fn look(store: &RedisStore) -> Seen {
    store.look(&session(), Look::default()).await.unwrap()
}

fn human(text: &str) -> String {
    format!(r#"{{"type": "human", "data": {{"content": "{text}"}}}}"#)
}

/// Numbers that look random, the same in each run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: i64) -> i64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end.max(1) as u64) as i64
    }
}

/// What a session must hold: elements with their sequences.
#[derive(Default)]
struct Model {
    elements: Vec<(i64, String)>,
    last: i64,
    elements_max: Option<usize>,
}

impl Model {
    fn push(&mut self, element: String) {
        self.last += 1;
        self.elements.push((self.last, element));
    }

    /// As the contract says it: whole exchanges, and never the newest.
    fn trim(&mut self) {
        let Some(max) = self.elements_max.filter(|max| self.elements.len() > *max) else {
            return;
        };
        let users: Vec<usize> = (0..self.elements.len())
            .filter(|index| self.elements[*index].1.contains("human"))
            .collect();
        let enough = self.elements.len() - max;
        let cut = users
            .iter()
            .find(|index| **index >= enough)
            .or(users.last());
        self.elements.drain(..cut.copied().unwrap_or(0));
    }

    fn show(&self) -> String {
        let show = |(sequence, element): &(i64, String)| format!("{sequence}:{element}");
        self.elements.iter().map(show).collect::<Vec<_>>().join(" ")
    }
}

#[tokio::test]
async fn a_thousand_rewinds_between_everybodys_writes_leave_the_sequences_that_a_model_has() {
    for (seed, elements_max) in [(1, None), (2, Some(25))] {
        let redis = Redis::start().await;
        let upkeep = Upkeep {
            elements_max,
            ..Upkeep::default()
        };
        let store = store_with(&redis, upkeep).await;
        let mut client = redis.client().await.unwrap();
        let mut numbers = Numbers(seed);
        let mut model = Model {
            elements_max,
            ..Model::default()
        };
        let mut rewinds = 0;
        while rewinds < 1_000 {
            let step = model.last;
            let count = 1 + numbers.below(4);
            let new: Vec<String> = (0..count)
                .map(|n| match numbers.below(3) {
                    0 => human(&format!("{step}-{n}")),
                    _ => format!("{step}-{n}"),
                })
                .collect();
            match numbers.below(5) {
                0 | 1 => {
                    let elements: Vec<&str> = new.iter().map(String::as_str).collect();
                    let mut appending = appending(&elements);
                    appending.request = request(&format!("{rewinds} {step}"));
                    appending.expected_last_sequence = Some(model.last);
                    let appended = store.append(&session(), appending).await.unwrap();
                    assert_eq!(appended.first_sequence, model.last + 1);
                    new.into_iter().for_each(|element| model.push(element));
                    model.trim();
                }
                2 => {
                    let mut push = redis::cmd("LPUSH");
                    push.arg(LIST).arg(&new);
                    let _: i64 = push.query_async(&mut client).await.unwrap();
                    new.into_iter().for_each(|element| model.push(element));
                }
                _ => {
                    let after = match numbers.below(50) {
                        0 => 0,
                        _ => (model.last - numbers.below(12)).max(0),
                    };
                    let rewound = rewind(&store, &format!("{rewinds}"), after).await;
                    let before = model.elements.len();
                    model.elements.retain(|(sequence, _)| *sequence <= after);
                    let count = (before - model.elements.len()) as i64;
                    assert_eq!(rewound, Rewound::Done { count });
                    rewinds += 1;
                }
            }
            let page = read(&store).await;
            assert_eq!(show(&page), model.show());
            assert_eq!((page.last_sequence, page.epoch), (model.last, Epoch(0)));

            let all: Vec<(i64, usize)> = model
                .elements
                .iter()
                .map(|(sequence, element)| (*sequence, element.len()))
                .collect();
            let some = Read {
                order: [Order::OldestFirst, Order::NewestFirst][numbers.below(2) as usize],
                after: numbers.below(model.last + 3),
                before: (numbers.below(2) == 0).then(|| numbers.below(model.last + 3)),
                last: (numbers.below(2) == 0).then(|| 1 + numbers.below(9) as usize),
                limit: 1 + numbers.below(12) as usize,
                bytes_max: 1 << 20,
            };
            let page = store.read(&session(), some).await.unwrap();
            check_page(&page, some, &all, model.last);

            let at = numbers.below(model.last + 2);
            let with_floor = Look {
                at,
                with_request: false,
            };
            let seen = store.look(&session(), with_floor).await.unwrap();
            let floor = all.iter().rev().find(|(sequence, _)| *sequence <= at);
            assert_eq!(seen.floor, floor.map_or(0, |(sequence, _)| *sequence));
            assert_eq!(seen.count, all.len() as i64);
            assert_eq!(seen.first_sequence, all.first().map_or(0, |(s, _)| *s));
            assert_eq!(seen.last_sequence, model.last);
        }
    }
}

#[tokio::test]
async fn places_after_which_was_rewound_are_bounded_and_go_with_a_clear() {
    let (redis, store) = start().await;
    append(&store, &["first"]).await;
    for n in 0..REWINDS_MAX {
        let written = append(&store, &[&format!("stays {n}"), "goes"]).await;
        let rewound = rewind(&store, &format!("{n}"), written.first_sequence).await;
        assert_eq!(rewound, Rewound::Done { count: 1 });
    }
    let written = append(&store, &["stays", "goes"]).await;
    let last = written.first_sequence;
    assert_eq!(rewind(&store, "one more", last).await, Rewound::TooMany);
    assert_eq!(look(&store).await.count, REWINDS_MAX as i64 + 3);
    // Where others were rewound, one more costs nothing.
    let rewound = rewind(&store, "merged", last - 2).await;
    assert_eq!(rewound, Rewound::Done { count: 2 });
    append(&store, &["another"]).await;
    store.clear(&session()).await.unwrap();
    assert!(!redis.command::<bool>(&["HEXISTS", FACTS, "gaps"]).await);
    let last = look(&store).await.last_sequence;
    assert_eq!(append(&store, &["next"]).await.first_sequence, last + 1);
}

#[tokio::test]
async fn what_others_push_after_a_rewind_has_the_same_sequences_in_every_read() {
    let (redis, store) = start().await;
    append(&store, &["hi", "ok"]).await;
    append(&store, &["c", "d"]).await;
    let newest = Read {
        last: Some(2),
        ..ALL
    };
    let newest = async || show(&store.read(&session(), newest).await.unwrap());
    assert_eq!(newest().await, "3:c 4:d");
    rewind(&store, "r", 2).await;
    // As many as went, and the last one is as the last one that stayed.
    let _: i64 = redis.command(&["LPUSH", LIST, "hi2", "ok"]).await;
    assert_eq!(newest().await, "5:hi2 6:ok");
    assert_eq!(show(&read(&store).await), "1:hi 2:ok 5:hi2 6:ok");
}

#[tokio::test]
async fn a_list_that_others_deleted_after_a_rewind_is_recognised_too() {
    for refilled in 0..=5 {
        let (redis, store) = start().await;
        append(&store, &["a", "b", "c", "d"]).await;
        rewind(&store, "r", 2).await;
        append(&store, &["e"]).await;
        assert_eq!(show(&read(&store).await), "1:a 2:b 5:e");
        let _: i64 = redis.command(&["DEL", LIST]).await;
        for n in 0..refilled {
            let _: i64 = redis.command(&["LPUSH", LIST, &format!("new {n}")]).await;
        }
        let page = read(&store).await;
        assert_eq!((page.last_sequence, page.epoch), (5 + refilled, Epoch(1)));
        let first = page.elements.first().map(|element| element.sequence);
        assert_eq!(first, (refilled > 0).then_some(6));
    }
}

#[tokio::test]
async fn a_rewind_happens_once_waits_for_no_turn_and_forgets_those_that_stored_what_went() {
    let (redis, store) = start().await;
    let done = async |name: &str| {
        begin(&store, beginning(name)).await;
        let elements = [format!("q {name}"), format!("a {name}")];
        let elements: Vec<&str> = elements.iter().map(String::as_str).collect();
        let ended = store
            .end_turn(&session(), ending(name, TOKEN, &elements))
            .await;
        assert!(
            matches!(ended, Ok(TurnState::Completed { .. })),
            "{ended:?}"
        );
    };
    done("t1").await;
    done("t2").await;
    done("t3").await;
    begin(&store, beginning("failed")).await;
    let ended = store
        .end_turn(&session(), ending("failed", TOKEN, &[]))
        .await;
    assert!(matches!(ended, Ok(TurnState::Failed { .. })));

    begin(&store, beginning("t4")).await;
    let before = contents(&redis).await;
    let busy = rewind(&store, "r", 3).await;
    let turn_4 = turn("t4");
    assert_eq!(
        busy,
        Rewound::Busy {
            turn: turn_4,
            name: "t4".into()
        }
    );
    assert_eq!(contents(&redis).await, before);
    store
        .end_turn(&session(), ending("t4", TOKEN, &["q t4"]))
        .await
        .unwrap();

    // In the middle of the second turn: it goes, too.
    assert_eq!(rewind(&store, "r", 3).await, Rewound::Done { count: 4 });
    assert_eq!(show(&read(&store).await), "1:q t1 2:a t1 3:q t2");
    let known = async |name: &str| {
        let follow = FollowTurn {
            turn: turn(name),
            from_chunk: 0,
            bytes_max: 1,
            is_noted: false,
        };
        store
            .follow_turn(&session(), follow)
            .await
            .unwrap()
            .is_some()
    };
    assert!(known("t1").await && known("failed").await);
    assert!(!known("t2").await && !known("t3").await && !known("t4").await);
    assert_eq!(look(&store).await.turn.unwrap().name, "failed");

    append(&store, &["next"]).await;
    assert_eq!(rewind(&store, "r", 3).await, Rewound::Done { count: 4 });
    let mut other = rewinding("r", 3);
    other.request.fingerprint = [7; 16];
    let reused = store.rewind(&session(), other).await;
    assert_eq!(reused, Err(Error::RequestReused));
    assert_eq!(show(&read(&store).await), "1:q t1 2:a t1 3:q t2 8:next");

    // To the end of the first turn, which stays; then to nothing.
    rewind(&store, "s", 2).await;
    assert!(known("t1").await);
    rewind(&store, "t", 0).await;
    assert!(!known("t1").await);
    assert_eq!(redis.command::<i64>(&["EXISTS", LIST]).await, 0);
    let seen = look(&store).await;
    assert_eq!(
        (seen.count, seen.last_sequence, seen.epoch),
        (0, 8, Epoch(0))
    );
    done("t5").await;
    assert_eq!(look(&store).await.turn.unwrap().name, "t5");
    assert_eq!(show(&read(&store).await), "9:q t5 10:a t5");
}

#[tokio::test]
async fn a_redis_without_memory_can_be_rewound() {
    let (redis, store) = start().await;
    append(&store, &["a", "b", "c"]).await;
    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(rewind(&store, "r", 1).await, Rewound::Done { count: 2 });
    assert_eq!(rewind(&store, "r", 1).await, Rewound::Done { count: 2 });
    let before = contents(&redis).await;
    let nothing = store.rewind(&session(), rewinding("s", 1)).await;
    assert!(matches!(nothing, Err(Error::Full(_))), "{nothing:?}");
    assert_eq!(contents(&redis).await, before);
    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!(append(&store, &["d"]).await.first_sequence, 4);
}

#[tokio::test]
async fn a_time_to_live_starts_anew_with_each_write_and_holds_for_all_keys() {
    let redis = Redis::start().await;
    let hour = 3_600_000;
    let upkeep = Upkeep {
        ttl_ms: Some(hour),
        ..Upkeep::default()
    };
    let store = store_with(&redis, upkeep).await;
    let age = async || {
        for key in keys(&redis).await {
            let _: i64 = redis.command(&["PEXPIRE", &key, "60000"]).await;
        }
        // What the turn's record says of the list is as old.
        read(&store).await;
    };
    let is_anew = async |of: i64| {
        for key in keys(&redis).await {
            match &*key {
                RUNNING => {}
                TURNS => assert!(pttl(&redis, &key).await > LEASE.retention_ms - 10_000),
                _ => assert_close(pttl(&redis, &key).await, of),
            }
        }
        let expires_ms = look(&store).await.expires_ms.unwrap();
        assert_close(expires_ms - unix_ms(&redis).await, of);
    };
    append(&store, &["a"]).await;
    is_anew(hour).await;
    age().await;
    assert_close(pttl(&redis, LIST).await, 60_000);
    append(&store, &["b"]).await;
    is_anew(hour).await;
    begin(&store, beginning("t")).await;
    age().await;
    store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    is_anew(hour).await;

    // The session's own comes first; 0 is for ever; none is the store's again.
    let set = async |ttl_ms| {
        let update = Update {
            ttl_ms: Some(ttl_ms),
            ..Update::default()
        };
        let seen = store.update_session(&session(), update).await.unwrap();
        assert_eq!(seen.unwrap().about.ttl_ms, ttl_ms);
    };
    set(Some(5 * hour)).await;
    is_anew(5 * hour).await;
    age().await;
    append(&store, &["c"]).await;
    is_anew(5 * hour).await;
    set(Some(0)).await;
    append(&store, &["d"]).await;
    assert_eq!(pttl(&redis, LIST).await, -1);
    assert_eq!(pttl(&redis, FACTS).await, -1);
    assert_eq!(look(&store).await.expires_ms, None);
    set(None).await;
    is_anew(hour).await;

    // Without one of the store's, the expiry that we have set goes, and one of others stands.
    let plain = store_at(redis.url()).await;
    let update = |ttl_ms| Update {
        ttl_ms: Some(ttl_ms),
        ..Update::default()
    };
    let seen = plain.update_session(&session(), update(None)).await;
    assert!(seen.unwrap().unwrap().expires_ms.is_some());
    plain
        .update_session(&session(), update(Some(hour)))
        .await
        .unwrap();
    let seen = plain.update_session(&session(), update(None)).await;
    assert_eq!(seen.unwrap().unwrap().expires_ms, None);
}

#[tokio::test]
async fn reads_extend_a_life_if_asked_but_do_not_write_each_time() {
    let redis = Redis::start().await;
    let upkeep = Upkeep {
        ttl_ms: Some(100_000),
        reads_extend: true,
        ..Upkeep::default()
    };
    let store = store_with(&redis, upkeep).await;
    append(&store, &["a"]).await;
    let mut monitor = Monitor::start(&redis).await;
    read(&store).await;
    let (_, of_scripts) = monitor.commands(&redis).await;
    let is_write = |command: &&String| command.contains("PEXPIRE") || command.contains("HSET");
    assert_eq!(of_scripts.iter().find(is_write), None);

    let _: i64 = redis.command(&["PEXPIRE", LIST, "94000"]).await;
    read(&store).await;
    assert_close(pttl(&redis, LIST).await, 100_000);
    assert!(pttl(&redis, LIST).await > 95_000);
    assert!(pttl(&redis, FACTS).await > 95_000);
    // One that others have made, too.
    let _: i64 = redis.command(&["PERSIST", LIST]).await;
    read(&store).await;
    assert_close(pttl(&redis, LIST).await, 100_000);

    // A read of the newest, again and again, as time goes by.
    let newest = Read {
        last: Some(1),
        ..ALL
    };
    for _ in 0..3 {
        let expires_at = (unix_ms(&redis).await + 94_000).to_string();
        let _: i64 = redis.command(&["PEXPIREAT", LIST, &expires_at]).await;
        let facts = ["HSET", FACTS, "expires_at", &expires_at];
        let _: i64 = redis.command(&facts).await;
        store.read(&session(), newest).await.unwrap();
        assert!(pttl(&redis, LIST).await > 95_000);
    }
}

#[tokio::test]
async fn what_is_said_of_a_session_goes_when_others_delete_it_and_when_it_expires() {
    let (redis, store) = start().await;
    let update = Update {
        title: Some("secret title".into()),
        metadata: Some([("k".to_owned(), "v".to_owned())].into()),
        ttl_ms: Some(Some(3_600_000)),
    };
    let nothing = store.update_session(&session(), update.clone()).await;
    assert_eq!(nothing, Ok(None), "it has no elements");
    assert!(keys(&redis).await.is_empty());
    for ends in ["DEL", "PEXPIRE"] {
        append(&store, &["a"]).await;
        let seen = store.update_session(&session(), update.clone()).await;
        let seen = seen.unwrap().unwrap();
        assert_eq!(seen.about.title, "secret title");
        assert_eq!(look(&store).await.about, seen.about);
        assert_eq!(seen.about.metadata, update.metadata.clone().unwrap());
        match ends {
            "DEL" => redis.command::<i64>(&["DEL", LIST]).await,
            _ => redis.command::<i64>(&["PEXPIRE", LIST, "1"]).await,
        };
        eventually("the list goes", async || {
            redis.command::<i64>(&["EXISTS", LIST]).await == 0
        })
        .await;
        assert_eq!(look(&store).await.about, Default::default());
        for field in ["title", "metadata", "ttl"] {
            assert!(!redis.command::<bool>(&["HEXISTS", FACTS, field]).await);
        }
        append(&store, &["b"]).await;
        assert_eq!(look(&store).await.about, Default::default());
        store.clear(&session()).await.unwrap();
    }
}

#[tokio::test]
async fn trimming_knows_users_by_any_spelling_and_looks_at_a_bounded_number_of_elements() {
    let redis = Redis::start().await;
    let upkeep = Upkeep {
        elements_max: Some(10),
        ..Upkeep::default()
    };
    let store = store_with(&redis, upkeep).await;
    let spelled = r#"{"data":{"content":"\"type\": \"ai\""},"type":"human"}"#;
    let quoting = r#"{"type": "ai", "data": {"content": {"type": "human"}}}"#;
    let broken = r#"{"type":"human""#;
    let mut elements = vec![human("1"), quoting.into(), broken.into(), "x".into()];
    elements.extend([spelled.to_owned(), "y".to_owned()]);
    elements.extend((0..6).map(|n| n.to_string()));
    let elements: Vec<&str> = elements.iter().map(String::as_str).collect();
    // Two too many: the next exchange begins at the fifth.
    append(&store, &elements).await;
    assert_eq!(read(&store).await.elements[0].sequence, 5);
    let list: Vec<String> = redis.command(&["LRANGE", LIST, "0", "-1"]).await;
    assert_eq!((list.len(), list[7].as_str()), (8, spelled));

    // The newest exchange stays, however long it is.
    for n in 0..30 {
        append(&store, &[&format!("of the newest {n}")]).await;
    }
    let page = read(&store).await;
    assert_eq!((page.elements.len(), page.elements[0].sequence), (38, 5));
    append(&store, &[&human("next")]).await;
    assert_eq!(read(&store).await.elements.len(), 1);

    // What is trimmed leaves nothing that outlives the list.
    let _: i64 = redis.command(&["EXPIRE", LIST, "1000"]).await;
    append(&store, &["answer"]).await;
    assert_close(pttl(&redis, FACTS).await, 1_000_000);
    let _: i64 = redis.command(&["PERSIST", LIST]).await;

    // A long exchange of others in between.
    let mut client = redis.client().await.unwrap();
    let mut push = redis::cmd("LPUSH");
    push.arg(LIST).arg(human("long"));
    push.arg(vec!["of a long one"; 5_000]).arg(human("last"));
    let _: i64 = push.query_async(&mut client).await.unwrap();
    let mut monitor = Monitor::start(&redis).await;
    append(&store, &["another"]).await;
    let (_, of_scripts) = monitor.commands(&redis).await;
    let of_negatives = of_scripts
        .iter()
        .filter(|command| command.contains("LRANGE"));
    let looked_at: i64 = elements_fetched(&of_negatives.cloned().collect::<Vec<_>>());
    assert!((1..=1_000).contains(&looked_at), "{looked_at}");
    assert_eq!(show(&read(&store).await).matches("last").count(), 1);
}

#[tokio::test]
async fn a_look_and_a_rewind_cost_the_same_at_any_length() {
    let (redis, store) = start().await;
    let fill = "for i = 1, ARGV[1] / 1000 do local t = {} for j = 1, 1000 do t[j] = 'e' end \
                redis.call('LPUSH', KEYS[1], unpack(t)) end";
    // The script is loaded.
    rewind(&store, "r", 0).await;
    let mut costs = Vec::new();
    for count in [1_000, 1_000_000] {
        let id = SessionId::parse(format!("s{count}")).unwrap();
        let key = format!("message_store:{id}");
        let _: Value = redis
            .command(&["EVAL", fill, "1", &key, &count.to_string()])
            .await;
        store.look(&id, Look::default()).await.unwrap();
        let mut monitor = Monitor::start(&redis).await;
        let at = Look {
            at: count / 2,
            with_request: true,
        };
        let seen = store.look(&id, at).await.unwrap();
        assert_eq!((seen.count, seen.floor), (count, count / 2));
        let looking = monitor.commands(&redis).await;
        let rewound = store.rewind(&id, rewinding("r", count - 10)).await;
        assert_eq!(rewound, Ok(Rewound::Done { count: 10 }));
        let rewinding = monitor.commands(&redis).await;
        costs.push([
            (
                looking.0.len(),
                looking.1.len(),
                elements_fetched(&looking.1),
            ),
            (
                rewinding.0.len(),
                rewinding.1.len(),
                elements_fetched(&rewinding.1),
            ),
        ]);
    }
    assert_eq!(costs[0], costs[1]);
    let [(looks, of_look, fetched), (rewinds, ..)] = costs[0];
    assert_eq!((looks, fetched, rewinds), (1, 1, 1));
    assert!(of_look <= 8, "{of_look}");
}

fn listing(limit: usize) -> ListRecent {
    ListRecent {
        limit,
        ..ListRecent::default()
    }
}

/// Walks over all pages; returns the ids.
async fn walk(store: &RedisStore, mut list: ListRecent) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let page = store.list_sessions(list.clone()).await.unwrap();
        assert!(page.sessions.len() <= list.limit);
        ids.extend(page.sessions.iter().map(|(id, _)| id.to_string()));
        list.cursor = page.next;
        if list.cursor.is_none() {
            return ids;
        }
    }
}

#[tokio::test]
async fn the_index_finds_what_others_make_write_and_delete() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    assert_eq!(walk(&store, listing(10)).await, ["s"], "own writes at once");
    let _: i64 = redis
        .command(&["LPUSH", "message_store:theirs", &human("hi")])
        .await;
    let _: i64 = redis.command(&["SADD", "message_store:no list", "x"]).await;
    eventually("a new list turns up", async || {
        walk(&store, listing(1)).await == ["theirs", "s"]
    })
    .await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    eventually("a write moves a session up", async || {
        walk(&store, listing(1)).await == ["s", "theirs"]
    })
    .await;
    let page = store.list_sessions(listing(1)).await.unwrap();
    let seen = &page.sessions[0].1;
    assert_eq!((seen.count, seen.last_sequence), (2, 2));
    assert_eq!(seen.active_ms, look(&store).await.active_ms);

    let update = Update {
        metadata: Some([("k".to_owned(), "v".to_owned())].into()),
        ..Update::default()
    };
    store.update_session(&session(), update).await.unwrap();
    let _: i64 = redis.command(&["DEL", LIST]).await;
    assert_eq!(walk(&store, listing(1)).await, ["theirs"], "at once");
    let _: i64 = redis.command(&["DEL", "message_store:theirs"]).await;
    eventually("nothing of them stays in the index", async || {
        let mut keys: Vec<String> = redis.command(&["KEYS", "{message_store:}:*"]).await;
        keys.retain(|key| key != INDEX[4]);
        keys.is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_list_can_be_filtered_and_follows_what_is_said() {
    let (_redis, store) = start().await;
    let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        pairs.iter().map(own).collect()
    };
    for n in 0..30 {
        let id = SessionId::parse(format!("{}:{n:02}", ["a", "b*"][n % 2])).unwrap();
        store.append(&id, appending(&["x"])).await.unwrap();
        let update = Update {
            metadata: Some(pairs(&[
                ("parity", ["even", "odd"][n % 2]),
                ("third", &(n % 3).to_string()),
            ])),
            ..Update::default()
        };
        store.update_session(&id, update).await.unwrap();
    }
    let filtered = async |prefix: &str, metadata: &[(&str, &str)]| {
        let list = ListRecent {
            prefix: prefix.to_owned(),
            metadata: pairs(metadata),
            ..listing(4)
        };
        walk(&store, list).await
    };
    assert_eq!(filtered("", &[]).await.len(), 30);
    assert_eq!(
        filtered("b*:1", &[]).await,
        ["b*:19", "b*:17", "b*:15", "b*:13", "b*:11"]
    );
    assert_eq!(filtered("b", &[("third", "0")]).await.len(), 5);
    assert_eq!(filtered("c", &[]).await, [""; 0]);
    let both = [("parity", "odd"), ("third", "1")];
    assert_eq!(
        filtered("", &both).await,
        ["b*:25", "b*:19", "b*:13", "b*:07", "b*:01"]
    );
    assert_eq!(filtered("", &[("parity", "1")]).await, [""; 0]);

    let id = SessionId::parse("b*:07").unwrap();
    let update = Update {
        metadata: Some(pairs(&[("parity", "none")])),
        ..Update::default()
    };
    store.update_session(&id, update).await.unwrap();
    assert_eq!(
        filtered("", &both).await,
        ["b*:25", "b*:19", "b*:13", "b*:01"]
    );
    assert_eq!(filtered("", &[("parity", "none")]).await, ["b*:07"]);
    assert_eq!(filtered("", &[]).await[0], "b*:07");
}

fn metadata(key: &str, value: &str) -> BTreeMap<String, String> {
    [(key.to_owned(), value.to_owned())].into()
}

fn describing(metadata: BTreeMap<String, String>) -> Update {
    Update {
        metadata: Some(metadata),
        ..Update::default()
    }
}

/// The sessions that a list finds by their metadata.
async fn found_by(store: &RedisStore, metadata: BTreeMap<String, String>) -> Vec<String> {
    let list = ListRecent {
        metadata,
        ..listing(10)
    };
    walk(store, list).await
}

/// What there is of metadata in the index: sets of sessions by pair, and what is announced.
async fn entered(redis: &Redis) -> Vec<String> {
    let mut keys: Vec<String> = redis.command(&["KEYS", "{message_store:}:*"]).await;
    keys.retain(|key| key.starts_with(INDEX[3]) || key == INDEX[5]);
    keys
}

#[tokio::test]
async fn of_metadata_that_many_set_at_once_the_last_are_found_and_no_others_stay_in_the_index() {
    let redis = Redis::start().await;
    let stores = [store_at(redis.url()).await, store_at(redis.url()).await];
    let sessions = 60;
    for n in 0..sessions {
        let id = &SessionId::parse(format!("s{n}")).unwrap();
        stores[0].append(id, appending(&["x"])).await.unwrap();
        let updates = (0..6).map(|i| {
            let update = describing(metadata("k", &format!("{n}-{i}")));
            stores[i % 2].update_session(id, update)
        });
        for updated in join_all(updates).await {
            updated.unwrap().unwrap();
        }
        let seen = stores[0].look(id, Look::default()).await.unwrap();
        let found = found_by(&stores[1], seen.about.metadata).await;
        assert_eq!(found, [id.to_string()]);
    }
    assert_eq!(entered(&redis).await.len(), sessions);
}

#[tokio::test]
async fn metadata_that_a_session_did_not_get_leave_the_index() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let update = describing(metadata("k", "v"));
    store.update_session(&session(), update).await.unwrap();
    let of_session = entered(&redis).await;
    assert_eq!(of_session.len(), 1);

    // There is no such session, it has other keys, or Redis takes nothing.
    let other = SessionId::parse("other").unwrap();
    for pair in [metadata("k", "v"), metadata("k", "new")] {
        let nothing = store.update_session(&other, describing(pair)).await;
        assert_eq!(nothing, Ok(None));
        assert_eq!(entered(&redis).await, of_session);
    }
    let _: Value = redis.command(&["SET", "message_store:other", "text"]).await;
    let update = describing(metadata("k", "new"));
    let refused = store.update_session(&other, update).await;
    assert!(matches!(refused, Err(Error::WrongKeyType { .. })));
    assert_eq!(entered(&redis).await, of_session);

    // What the session has stays, although a change that names it is refused.
    let _: i64 = redis.command(&["HSET", FACTS, "base", "x"]).await;
    let mut both = metadata("k", "v");
    both.extend(metadata("l", "new"));
    let refused = store.update_session(&session(), describing(both)).await;
    assert!(matches!(refused, Err(Error::Corrupt(_))));
    assert_eq!(entered(&redis).await, of_session);
    let _: i64 = redis.command(&["HSET", FACTS, "base", "0"]).await;
    assert_eq!(found_by(&store, metadata("k", "v")).await, ["s"]);
}

#[tokio::test]
async fn a_fork_that_comes_to_nothing_leaves_no_metadata_in_the_index() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let slow = store_at(proxy.redis_url()).await;
    let store = store_at(redis.url()).await;
    append(&store, &["a"]).await;
    let update = describing(metadata("k", "v"));
    store.update_session(&session(), update).await.unwrap();
    let of_session = entered(&redis).await;

    proxy.set(Mode::Delay(Duration::from_millis(200)));
    let (session, new) = (session(), SessionId::parse("new").unwrap());
    let forking = slow.fork(&session, forking("new", None));
    let others = async {
        eventually("it is announced", async || {
            redis.command::<i64>(&["SCARD", &of_session[0]]).await == 2
        })
        .await;
        store.append(&new, appending(&["theirs"])).await.unwrap();
    };
    let (forked, ()) = tokio::join!(forking, others);
    assert_eq!(forked, Ok(Forked::Exists));
    let members: Vec<String> = redis.command(&["SMEMBERS", &of_session[0]]).await;
    assert_eq!(members, ["s"]);
    assert_eq!(entered(&redis).await, of_session);
}

#[tokio::test]
async fn what_a_server_announced_and_never_settled_is_settled_by_a_round() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let update = describing(metadata("k", "v"));
    store.update_session(&session(), update).await.unwrap();
    let of_session = entered(&redis).await;
    let pair = of_session[0].strip_prefix(INDEX[3]).unwrap();

    // One died before it had written anything, of a session that is none; one after it had.
    let gone = "00112233445566778899aabbccddeeff";
    let set = format!("{}{gone}", INDEX[3]);
    let _: i64 = redis.command(&["SADD", &set, "gone", "s"]).await;
    let _: i64 = redis.command(&["DEL", INDEX[2]]).await;
    for (id, open) in [
        ("gone", format!("a1:1000:{gone}")),
        ("s", format!("a2:1000:{gone} a3:2000:{gone},{pair}")),
    ] {
        let _: i64 = redis.command(&["HSET", INDEX[5], id, &open]).await;
    }
    eventually("nothing is announced any more", async || {
        redis.command::<i64>(&["EXISTS", INDEX[5]]).await == 0
    })
    .await;
    assert_eq!(entered(&redis).await, of_session);
    let known: Vec<String> = redis.command(&["HKEYS", INDEX[2]]).await;
    assert_eq!(known, ["s"]);
    assert_eq!(found_by(&store, metadata("k", "v")).await, ["s"]);
}

#[tokio::test]
async fn an_update_whose_reply_is_lost_for_good_is_found_by_what_it_may_have_set() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    append(&store, &["a"]).await;
    // Redis knows the script: what is lost is the answer to running it.
    let update = describing(metadata("k", "v"));
    store.update_session(&session(), update).await.unwrap();
    proxy.set(Mode::Refuse);
    proxy.lose_reply_to(b"precious");
    let update = describing(metadata("k", "precious"));
    let result = bounded(store.update_session(&session(), update)).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
    proxy.set(Mode::Forward);
    store.ready(LIMIT).await.unwrap();
    assert_eq!(found_by(&store, metadata("k", "precious")).await, ["s"]);
}

#[tokio::test]
async fn metadata_of_the_version_before_are_found_until_they_are_changed() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let update = describing(metadata("k", "old"));
    store.update_session(&session(), update).await.unwrap();
    // It has numbered them by the server's clock, and kept no number with the session.
    let before = entered(&redis).await;
    let known: String = redis.command(&["HGET", INDEX[2], "s"]).await;
    let old = format!("{} {}", unix_ms(&redis).await - 1_000, &known[14..]);
    let _: i64 = redis.command(&["HSET", INDEX[2], "s", &old]).await;
    let _: i64 = redis.command(&["HDEL", FACTS, "version"]).await;
    assert_eq!(found_by(&store, metadata("k", "old")).await, ["s"]);

    let update = describing(metadata("k", "new"));
    store.update_session(&session(), update).await.unwrap();
    assert_eq!(found_by(&store, metadata("k", "new")).await, ["s"]);
    assert_eq!(found_by(&store, metadata("k", "old")).await, [""; 0]);
    let after = entered(&redis).await;
    assert_eq!((after.len(), after == before), (1, false));
}

/// Makes `count` lists and their entries in the index, `same` of them at a time with one score; and
/// keeps servers from bringing the index up to date.
async fn make_sessions(redis: &Redis, count: usize, same: usize) {
    let make = "for i = ARGV[1], ARGV[2] do local id = string.format('s%06d', i) \
                redis.call('LPUSH', 'message_store:' .. id, 'x') \
                redis.call('ZADD', KEYS[1], (1700000000000 + math.floor(i / ARGV[3])) * 2048 + 1, id) \
                redis.call('ZADD', KEYS[2], 0, id) end";
    let _: Value = redis.command(&["SET", INDEX[4], "", "PX", "3600000"]).await;
    for from in (1..=count).step_by(20_000) {
        let to = (from + 19_999).min(count).to_string();
        let (from, same) = (from.to_string(), same.to_string());
        let command = ["EVAL", make, "2", INDEX[0], INDEX[1], &from, &to, &same];
        let _: Value = redis.command(&command).await;
    }
}

#[tokio::test]
async fn a_walk_finds_each_session_once_also_where_many_were_written_in_one_millisecond() {
    let redis = Redis::start().await;
    make_sessions(&redis, 5_000, 2_300).await;
    let store = store_at(redis.url()).await;
    for limit in [1_000, 77] {
        let ids = walk(&store, listing(limit)).await;
        let expected: Vec<String> = (1..=5_000).rev().map(|n| format!("s{n:06}")).collect();
        assert_eq!(ids, expected);
    }
    // A prefix that many have, by the walk over all; and the cost of one call is bounded.
    let list = ListRecent {
        prefix: "s001".into(),
        ..listing(100)
    };
    assert_eq!(walk(&store, list.clone()).await.len(), 1_000);
    let rare = ListRecent {
        prefix: "s00".into(),
        metadata: [("no".to_owned(), "such".to_owned())].into(),
        ..listing(100)
    };
    assert_eq!(walk(&store, rare).await, [""; 0]);

    // Sessions that are written to during a walk come once at most, the others exactly once.
    let mut numbers = Numbers(3);
    let mut list = listing(100);
    let mut found = Vec::new();
    let mut written = std::collections::HashSet::new();
    loop {
        let page = store.list_sessions(list.clone()).await.unwrap();
        found.extend(page.sessions.iter().map(|(id, _)| id.to_string()));
        for _ in 0..20 {
            let id = format!("s{:06}", 1 + numbers.below(5_000));
            let session = SessionId::parse(id.clone()).unwrap();
            let mut appending = appending(&["more"]);
            appending.request = request(&numbers.0.to_string());
            store.append(&session, appending).await.unwrap();
            written.insert(id);
        }
        list.cursor = page.next;
        if list.cursor.is_none() {
            break;
        }
    }
    let unique: std::collections::HashSet<&String> = found.iter().collect();
    assert_eq!(unique.len(), found.len(), "none comes twice");
    for n in 1..=5_000 {
        let id = format!("s{n:06}");
        assert!(written.contains(&id) || unique.contains(&id), "{id}");
    }
}

#[tokio::test]
async fn a_page_of_a_list_costs_what_is_on_it_however_many_sessions_there_are() {
    let mut costs = Vec::new();
    for count in [100, 200_000] {
        let redis = Redis::start().await;
        make_sessions(&redis, count, 1).await;
        let store = store_at(redis.url()).await;
        let mut of_pages = Vec::new();
        let first = store.list_sessions(listing(50)).await.unwrap();
        let second = ListRecent {
            cursor: first.next.clone(),
            ..listing(25)
        };
        // The first looks take note of what others have made, and load the script.
        store.list_sessions(second.clone()).await.unwrap();
        for list in [listing(50), second] {
            let before = redis.command_counts().await;
            let page = store.list_sessions(list.clone()).await.unwrap();
            assert_eq!(page.sessions.len(), list.limit);
            let after = redis.command_counts().await;
            let cost: BTreeMap<String, i64> = after
                .into_iter()
                .map(|(name, calls)| (name.clone(), calls - before.get(&name).unwrap_or(&0)))
                .filter(|(_, calls)| *calls > 0)
                .collect();
            assert!(!cost.contains_key("scan") && !cost.contains_key("keys"));
            of_pages.push(cost);
        }
        costs.push(of_pages);
    }
    assert_eq!(costs[0], costs[1]);
    assert_eq!(costs[0][0]["evalsha"], 50, "{:?}", costs[0][0]);
    assert!(costs[0][0]["zrange"] <= 2, "{:?}", costs[0][0]);
}

// Bells.

/// Waits until a bell has rung and a condition holds.
async fn rings_until(bell: &mut chat_memory::store::Bell, mut holds: impl AsyncFnMut() -> bool) {
    let ringing = async {
        loop {
            bell.rung().await;
            if holds().await {
                return;
            }
        }
    };
    let limit = LIMIT;
    tokio::time::timeout(limit, ringing)
        .await
        .expect("it rings");
}

/// Waits until a bell has not rung for longer than the store takes to look for changes.
async fn until_quiet(bell: &mut chat_memory::store::Bell) {
    let end = Instant::now() + LIMIT;
    let looked_twice = Duration::from_secs(4);
    while tokio::time::timeout(looked_twice, bell.rung())
        .await
        .is_ok()
    {
        assert!(Instant::now() < end, "it rings for ever");
    }
}

async fn subscribers(redis: &Redis) -> i64 {
    let channel = format!("{{{LIST}}}:changed");
    let (_, count): (String, i64) = redis.command(&["PUBSUB", "NUMSUB", &channel]).await;
    count
}

#[tokio::test]
async fn a_bell_rings_for_what_is_published_and_what_others_do_and_is_quiet_otherwise() {
    let (redis, store) = start().await;
    let other = store_at(redis.url()).await;
    append(&store, &["a"]).await;
    let mut bell = store.bell(&session());
    let mut second = store.bell(&session());
    eventually("it subscribes", async || subscribers(&redis).await == 1).await;
    until_quiet(&mut bell).await;
    until_quiet(&mut second).await;

    let _: i64 = redis
        .command(&["PUBLISH", "{message_store:s}:changed", ""])
        .await;
    rings_until(&mut bell, async || true).await;
    second.rung().await;

    let mut monitor = Monitor::start(&redis).await;
    append(&other, &["b"]).await;
    begin(&other, beginning("t")).await;
    other
        .end_turn(&session(), ending("t", TOKEN, &["q"]))
        .await
        .unwrap();
    rewind(&other, "r", 2).await;
    let (_, of_scripts) = monitor.commands(&redis).await;
    let published = of_scripts
        .iter()
        .filter(|command| command.contains("PUBLISH"));
    assert_eq!(published.count(), 4);
    rings_until(&mut bell, async || read(&store).await.elements.len() == 2).await;

    until_quiet(&mut bell).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    rings_until(&mut bell, async || read(&store).await.elements.len() == 3).await;
    until_quiet(&mut bell).await;
    let _: i64 = redis.command(&["PEXPIRE", LIST, "1"]).await;
    rings_until(&mut bell, async || read(&store).await.elements.is_empty()).await;

    drop((bell, second));
    eventually("it unsubscribes", async || subscribers(&redis).await == 0).await;
}

#[tokio::test]
async fn a_bell_rings_for_a_change_that_was_seen_and_taken_back_between_two_looks() {
    let (redis, store) = start().await;
    let mut bell = store.bell(&session());
    eventually("it subscribes", async || subscribers(&redis).await == 1).await;
    until_quiet(&mut bell).await;
    // Seen by somebody, and gone again before the store looks once more.
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    assert_eq!(read(&store).await.elements.len(), 1);
    let _: i64 = redis.command(&["DEL", LIST]).await;
    rings_until(&mut bell, async || read(&store).await.elements.is_empty()).await;
}

#[tokio::test]
async fn ten_thousand_idle_bells_share_a_connection_and_few_commands() {
    const BELLS: usize = 10_000;
    let (redis, store) = start().await;
    let clients = async || -> usize {
        let list: String = redis.command(&["CLIENT", "LIST"]).await;
        // The command's own connection is the test's.
        list.lines().count() - 1
    };
    let before = clients().await;
    let bells: Vec<_> = (0..BELLS)
        .map(|number| store.bell(&SessionId::parse(format!("idle-{number}")).unwrap()))
        .collect();
    eventually("all are subscribed", async || {
        let channels: Vec<String> = redis.command(&["PUBSUB", "CHANNELS"]).await;
        channels.len() == BELLS
    })
    .await;
    assert_eq!(clients().await, before + 1);

    // Three looks at each session take three hundred scripts, and next to nothing else.
    let looks = 3 * BELLS as i64 / 100;
    let of_server = |counts: &BTreeMap<String, i64>, name: &str| *counts.get(name).unwrap_or(&0);
    let start = redis.command_counts().await;
    eventually("each is looked at three times", async || {
        let now = redis.command_counts().await;
        of_server(&now, "evalsha") - of_server(&start, "evalsha") >= looks
    })
    .await;
    let now = redis.command_counts().await;
    let scripts = of_server(&now, "evalsha") - of_server(&start, "evalsha");
    assert!(scripts <= 2 * looks, "{scripts}");
    for name in ["subscribe", "unsubscribe", "publish", "scan"] {
        let calls = of_server(&now, name) - of_server(&start, name);
        assert!(calls <= 10, "{name}: {calls}");
    }
    drop(bells);
}

#[tokio::test]
async fn bells_ring_after_redis_was_away() {
    let mut redis = Redis::start_with(Options {
        durable: true,
        ..Options::default()
    })
    .await;
    let store = store_at(redis.url()).await;
    append(&store, &["a"]).await;
    let mut bell = store.bell(&session());
    eventually("it subscribes", async || subscribers(&redis).await == 1).await;
    until_quiet(&mut bell).await;
    redis.kill();
    until_reachable(&store, false).await;
    redis.restart().await;
    rings_until(&mut bell, async || true).await;
    eventually("it subscribes again", async || {
        subscribers(&redis).await == 1
    })
    .await;
}

#[tokio::test]
async fn without_the_right_to_publish_writes_succeed_and_bells_ring_for_what_is_found() {
    let redis = Redis::start().await;
    let rules = "ACL SETUSER alice on >pass ~* +@all resetchannels";
    let rules: Vec<&str> = rules.split(' ').collect();
    let _: Value = redis.command(&rules).await;
    let at = format!("redis://alice:pass@{}", redis.address());
    let (store, other) = (store_at(at.clone()).await, store_at(at).await);
    append(&store, &["a"]).await;
    let mut bell = store.bell(&session());
    until_quiet(&mut bell).await;
    assert_eq!(append(&other, &["b"]).await.first_sequence, 2);
    rings_until(&mut bell, async || read(&store).await.elements.len() == 2).await;
    until_quiet(&mut bell).await;
    begin(&other, beginning("t")).await;
    rings_until(&mut bell, async || look(&store).await.turn.is_some()).await;
}

// Forks.

fn forking(to: &str, through: Option<i64>) -> Fork {
    Fork {
        to: SessionId::parse(to).unwrap(),
        through,
    }
}

#[tokio::test]
async fn a_fork_holds_the_same_bytes_and_is_made_once() {
    let (redis, store) = start().await;
    let all_bytes: Vec<u8> = (0..=255).collect();
    let mut many = appending(&["x"]);
    many.elements = (1..=1_200).map(|n| Bytes::from(n.to_string())).collect();
    many.elements[3] = Bytes::from(all_bytes);
    many.elements[5] = Bytes::from(vec![b'x'; ELEMENT_BYTES_MAX + 1]);
    store.append(&session(), many).await.unwrap();
    rewind(&store, "r", 1_100).await;
    append(&store, &["next"]).await;
    let update = Update {
        title: Some("title".into()),
        metadata: Some([("k".to_owned(), "v".to_owned())].into()),
        ttl_ms: Some(Some(3_600_000)),
    };
    store.update_session(&session(), update).await.unwrap();

    let fork = forking("new", None);
    let Ok(Forked::Done(seen)) = store.fork(&session(), fork.clone()).await else {
        panic!("no fork");
    };
    assert_eq!(
        (seen.count, seen.first_sequence, seen.last_sequence),
        (1_101, 1, 1_101)
    );
    assert_eq!(seen.about.title, "title");
    let origin = Origin {
        session: session(),
        sequence: 1_201,
    };
    assert_eq!(seen.about.origin, Some(origin));
    assert_eq!((seen.about.ttl_ms, seen.expires_ms), (None, None));
    let of = async |key: &str| -> Vec<Vec<u8>> { redis.command(&["LRANGE", key, "0", "-1"]).await };
    assert!(
        of(LIST).await == of("message_store:new").await,
        "the bytes differ"
    );
    let list = ListRecent {
        metadata: [("k".to_owned(), "v".to_owned())].into(),
        ..listing(10)
    };
    assert_eq!(walk(&store, list).await, ["new", "s"]);

    // The same call again, also when the source has gone on; another call is another.
    append(&store, &["more"]).await;
    let again = store.fork(&session(), fork.clone()).await.unwrap();
    let Forked::Done(again) = again else {
        panic!("{again:?}");
    };
    assert_eq!((again.count, again.about), (1_101, seen.about));
    let other = store.fork(&session(), forking("new", Some(2))).await;
    assert_eq!(other, Ok(Forked::Exists));
    let itself = store.fork(&session(), forking("s", None)).await;
    assert_eq!(itself, Ok(Forked::Exists));
    let nothing = SessionId::parse("nothing").unwrap();
    let empty = store.fork(&nothing, forking("newer", None)).await;
    assert_eq!(empty, Ok(Forked::Empty));
    // Into one that has expired, but whose facts are there still.
    let old = SessionId::parse("old").unwrap();
    store.append(&old, appending(&["x"])).await.unwrap();
    store.clear(&old).await.unwrap();
    store.append(&old, appending(&["y"])).await.unwrap();
    let _: i64 = redis
        .command(&["PEXPIRE", "message_store:old", "1000"])
        .await;
    store.look(&old, Look::default()).await.unwrap();
    eventually("it expires", async || {
        redis.command::<i64>(&["EXISTS", "message_store:old"]).await == 0
    })
    .await;
    let anew = store.fork(&session(), forking("old", Some(1))).await;
    let Ok(Forked::Done(anew)) = anew else {
        panic!("{anew:?}");
    };
    assert_eq!(
        (anew.first_sequence, anew.about.title.as_str()),
        (1, "title")
    );
    // Up to a sequence that was rewound.
    let part = store.fork(&session(), forking("part", Some(1_150))).await;
    assert!(
        matches!(&part, Ok(Forked::Done(seen)) if seen.count == 1_100),
        "{part:?}"
    );
    let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
    assert!(!keys(&redis).await.iter().any(|key| key.contains("fork")));
}

#[tokio::test]
async fn a_fork_of_a_session_that_changes_meanwhile_is_given_up() {
    for change in ["clear", "rewind", "trim"] {
        let redis = Redis::start().await;
        let proxy = Proxy::start(redis.address()).await;
        let slow = store_at(proxy.redis_url()).await;
        let store = store_at(redis.url()).await;
        let mut many = appending(&["x"]);
        many.elements = (1..=3_000)
            .map(|n| Bytes::from(human(&n.to_string())))
            .collect();
        store.append(&session(), many).await.unwrap();
        proxy.set(Mode::Delay(Duration::from_millis(100)));
        let session = session();
        let forking = slow.fork(&session, forking("new", None));
        let changing = async {
            eventually("a part is copied", async || {
                keys(&redis).await.iter().any(|key| key.contains(":fork:"))
            })
            .await;
            assert_eq!(
                redis.command::<i64>(&["EXISTS", "message_store:new"]).await,
                0
            );
            match change {
                "clear" => drop(store.clear(&session).await.unwrap()),
                "rewind" => drop(rewind(&store, "r", 2_999).await),
                _ => {
                    let upkeep = Upkeep {
                        elements_max: Some(2_999),
                        ..Upkeep::default()
                    };
                    append(&store_with(&redis, upkeep).await, &["more"]).await;
                }
            }
        };
        let (forked, ()) = tokio::join!(forking, changing);
        assert_eq!(forked, Ok(Forked::Changed), "{change}");
        assert!(!keys(&redis).await.iter().any(|key| key.contains("new")));
    }
}

// What Redis refuses.

#[tokio::test]
async fn a_key_of_another_type_is_named_and_left_alone() {
    let fill: [&[&str]; 3] = [&["SET", "value"], &["HSET", "f", "v"], &["ZADD", "1", "m"]];
    let (redis, store) = start().await;
    for key in [LIST, FACTS, REQUESTS[0], REQUESTS[1], TURNS] {
        for words in fill {
            let is_own_type = key != LIST && words[0] == "HSET";
            if is_own_type {
                continue;
            }
            let _: Value = redis.command(&["FLUSHALL"]).await;
            append(&store, &["a"]).await;
            let _: i64 = redis.command(&["DEL", key]).await;
            let command = [&[words[0], key], &words[1..]].concat();
            let _: Value = redis.command(&command).await;
            let before = contents(&redis).await;

            let refused = Error::WrongKeyType {
                key: key.to_owned(),
            };
            let result = store.clear(&session()).await;
            assert_eq!(result, Err(refused.clone()), "{command:?}");
            if !REQUESTS.contains(&key) {
                let result = store.end_turn(&session(), ending("t", TOKEN, &["b"])).await;
                assert_eq!(result, Err(refused.clone()), "{command:?}");
            }
            if key == TURNS {
                let result = store.keep_turn(&session(), keeping("t", TOKEN)).await;
                assert_eq!(result, Err(refused.clone()), "{command:?}");
                assert_eq!(contents(&redis).await, before);
                continue;
            }
            let result = store.append(&session(), appending(&["b"])).await;
            assert_eq!(result, Err(refused.clone()), "{command:?}");
            if !REQUESTS.contains(&key) {
                let result = store.read(&session(), ALL).await;
                assert_eq!(result, Err(refused), "{command:?}");
            }
            assert_eq!(contents(&redis).await, before);
        }
    }
}

#[tokio::test]
async fn facts_that_make_no_sense_are_reported_and_left_alone() {
    let (redis, store) = start().await;
    for (field, value) in [
        ("base", "x"),
        ("base", "9"),
        ("base", "-1"),
        ("epoch", ""),
        ("gaps", "x"),
        ("gaps", ""),
        ("gaps", "\u{1}"),
    ] {
        let _: Value = redis.command(&["FLUSHALL"]).await;
        append(&store, &["a"]).await;
        let _: i64 = redis.command(&["HSET", FACTS, field, value]).await;
        let before = contents(&redis).await;
        let result = store.append(&session(), appending(&["b"])).await;
        assert!(matches!(result, Err(Error::Corrupt(_))), "{result:?}");
        let result = store.read(&session(), ALL).await;
        assert!(matches!(result, Err(Error::Corrupt(_))), "{result:?}");
        assert_eq!(contents(&redis).await, before);
    }
}

#[tokio::test]
async fn a_redis_without_memory_stores_nothing_and_can_be_read_and_cleared() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    let before = contents(&redis).await;
    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;

    let result = store.append(&session(), appending(&["b"])).await;
    assert!(matches!(result, Err(Error::Full(_))), "{result:?}");
    assert_eq!(contents(&redis).await, before);
    let unseen = SessionId::parse("unseen").unwrap();
    let result = store.append(&unseen, appending(&["b"])).await;
    assert!(matches!(result, Err(Error::Full(_))), "{result:?}");
    assert_eq!(contents(&redis).await, before);

    assert!(
        append(&store, &["a"]).await.repeated,
        "it was stored before"
    );
    assert_eq!(show(&read(&store).await), "1:a 2:theirs");
    let last: String = redis.command(&["HGET", FACTS, "last"]).await;
    assert_eq!(last, "2", "the read has taken note of what it gave out");
    assert_eq!(store.clear(&session()).await, Ok(2));
    assert_eq!(keys(&redis).await, [FACTS]);

    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!(append(&store, &["b"]).await.first_sequence, 3);
}

#[tokio::test]
async fn without_memory_what_a_replica_has_is_acknowledged_and_nothing_else() {
    let redis = Redis::start().await;
    let replica = redis.start_replica().await;
    let store = store_that_waits(&redis).await;
    append(&store, &["a", "b", "c"]).await;
    let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;

    assert!(append(&store, &["a", "b", "c"]).await.repeated);
    assert_eq!(rewind(&store, "r", 1).await, Rewound::Done { count: 2 });
    let result = store.append(&session(), appending(&["d"])).await;
    assert!(matches!(result, Err(Error::Full(_))), "{result:?}");
    assert_eq!(replica.command::<i64>(&["LLEN", LIST]).await, 1);
    assert_eq!(store.clear(&session()).await, Ok(1));
    assert_eq!(replica.command::<i64>(&["LLEN", LIST]).await, 0);

    replica.pause();
    let result = store.clear(&session()).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_redis_that_refuses_writes_can_be_read() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    let before = contents(&redis).await;
    let _: Value = redis
        .command(&["CONFIG", "SET", "min-replicas-to-write", "1"])
        .await;

    let result = store.append(&session(), appending(&["b"])).await;
    let Err(Error::Unavailable(reason)) = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("NOREPLICAS"), "{reason}");
    let result = store.clear(&session()).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    assert_eq!(show(&read(&store).await), "1:a 2:theirs");
    assert_eq!(contents(&redis).await, before);
}

#[tokio::test]
async fn scripts_that_redis_has_forgotten_are_loaded_again() {
    let (redis, store) = start().await;
    for n in 1..=3 {
        let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
        assert_eq!(
            append(&store, &[&format!("element {n}")])
                .await
                .first_sequence,
            n
        );
        let _: Value = redis.command(&["SCRIPT", "FLUSH"]).await;
        assert_eq!(read(&store).await.last_sequence, n);
    }
}

#[tokio::test]
async fn a_master_that_became_a_replica_is_left_until_it_is_a_master_again() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let _: Value = redis.command(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let result = bounded(store.append(&session(), appending(&["b"]))).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    until_reachable(&store, false).await;
    let _: Value = redis.command(&["REPLICAOF", "NO", "ONE"]).await;
    until_reachable(&store, true).await;
    assert_eq!(append(&store, &["b"]).await.first_sequence, 2);
}

// When Redis or the network fails.

#[tokio::test]
async fn a_redis_that_dies_is_unavailable_and_comes_back_by_itself() {
    let mut redis = Redis::start_with(Options {
        durable: true,
        ..Options::default()
    })
    .await;
    let store = store_at(redis.url()).await;
    append(&store, &["a"]).await;

    redis.kill();
    until_reachable(&store, false).await;
    let result = bounded(store.append(&session(), appending(&["b"]))).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    let result = bounded(store.read(&session(), ALL)).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    let result = bounded(store.clear(&session())).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");

    redis.restart().await;
    until_reachable(&store, true).await;
    assert_eq!(append(&store, &["b"]).await.first_sequence, 2);
    assert!(append(&store, &["a"]).await.repeated);
    assert_eq!(show(&read(&store).await), "1:a 2:b");
}

/// What is open after a call that held the appends of many callers is each one's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_go_together_are_stored_once_each_although_replies_and_redis_are_lost() {
    let mut redis = Redis::start_with(Options {
        durable: true,
        ..Options::default()
    })
    .await;
    let proxy = Proxy::start(redis.address()).await;
    let store = Arc::new(store_at(proxy.redis_url()).await);
    let sessions: Vec<String> = (0..48).map(|n| format!("s{n}")).collect();
    let load = Load::start(&[Arc::clone(&store)], &sessions);
    for round in 1..=4 {
        let before = load.acknowledged();
        load.progress_of_all(10).await;
        let calls = redis.command_counts().await["evalsha"] as u64;
        let appended = load.acknowledged() - before;
        assert!(calls * 2 < appended, "{calls} calls for {appended} appends");
        proxy.lose_reply_to(b"EVALSHA");
        harness::wait::until("a reply is lost", async || {
            (proxy.lost() == round).then_some(())
        })
        .await;
        redis.kill();
        redis.restart().await;
    }
    load.progress_of_all(10).await;
    let (count, missing) = load.check(&store).await;
    assert!(count >= 5 * 10 * sessions.len());
    assert_eq!(missing, 0);
}

#[tokio::test]
async fn a_store_starts_without_redis_and_finds_it_later() {
    let mut redis = Redis::start().await;
    redis.stop().await;
    let store = RedisStore::connect(settings(redis.url())).unwrap();
    assert!(!*store.reachable().borrow());
    let ready = store.ready(Duration::from_millis(500)).await;
    let Err(Error::Unavailable(reason)) = &ready else {
        panic!("{ready:?}");
    };
    assert!(reason.contains("refused"), "{reason}");
    redis.restart().await;
    store.ready(LIMIT).await.expect("it is there now");
    assert!(*store.reachable().borrow());
    assert_eq!(append(&store, &["a"]).await.first_sequence, 1);
}

#[tokio::test]
async fn a_connection_that_died_in_silence_is_found_and_replaced() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    append(&store, &["a"]).await;

    proxy.set(Mode::Silent);
    let result = bounded(store.append(&session(), appending(&["b"]))).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
    let result = bounded(store.read(&session(), ALL)).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    until_reachable(&store, false).await;

    proxy.set(Mode::Forward);
    until_reachable(&store, true).await;
    assert!(!append(&store, &["b"]).await.repeated);
    assert_eq!(show(&read(&store).await), "1:a 2:b");
}

#[tokio::test]
async fn a_connection_that_dies_in_silence_while_nobody_calls_is_found_by_pings() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    proxy.set(Mode::Silent);
    until_reachable(&store, false).await;
    proxy.set(Mode::Forward);
    until_reachable(&store, true).await;
}

#[tokio::test]
async fn a_cut_connection_is_replaced_without_a_caller_noticing() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    for n in 1..=5 {
        proxy.cut();
        assert_eq!(
            append(&store, &[&format!("element {n}")])
                .await
                .first_sequence,
            n
        );
        proxy.cut();
        assert_eq!(read(&store).await.last_sequence, n);
    }
    assert!(proxy.accepted() > 5);
}

#[tokio::test]
async fn an_append_whose_reply_is_lost_is_stored_once_and_succeeds() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    append(&store, &["a"]).await;

    proxy.lose_reply_to(b"precious");
    let written = append(&store, &["precious"]).await;
    assert_eq!(proxy.lost(), 1);
    assert_eq!((written.first_sequence, written.count), (2, 1));
    let list: Vec<String> = redis.command(&["LRANGE", LIST, "0", "-1"]).await;
    assert_eq!(list, ["precious", "a"]);
}

#[tokio::test]
async fn an_append_whose_reply_is_lost_for_good_is_of_unknown_outcome_and_can_be_repeated() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    append(&store, &["a"]).await;

    proxy.set(Mode::Refuse);
    proxy.lose_reply_to(b"precious");
    let result = bounded(store.append(&session(), appending(&["precious"]))).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
    assert_eq!(proxy.lost(), 1);

    proxy.set(Mode::Forward);
    store.ready(LIMIT).await.unwrap();
    let written = append(&store, &["precious"]).await;
    assert_eq!((written.first_sequence, written.repeated), (2, true));
    assert_eq!(redis.command::<i64>(&["LLEN", LIST]).await, 2);
}

#[tokio::test]
async fn a_repetition_that_redis_refuses_leaves_the_outcome_unknown() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    append(&store, &["a"]).await;
    // Redis forgets the record and runs out of memory between the two attempts: the second one
    // cannot say what became of the first.
    proxy.lose_reply_to(b"precious");
    proxy.set(Mode::Delay(Duration::from_millis(50)));
    let session = session();
    let appending = store.append(&session, appending(&["precious"]));
    let spoiling = async {
        eventually("the first attempt arrives", async || {
            redis.command::<i64>(&["LLEN", LIST]).await == 2
        })
        .await;
        let _: i64 = redis.command(&["DEL", REQUESTS[0], REQUESTS[1]]).await;
        let _: Value = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    };
    let (result, ()) = tokio::join!(bounded(appending), spoiling);
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_clear_whose_reply_is_lost_is_of_unknown_outcome() {
    let redis = Redis::start().await;
    let proxy = Proxy::start(redis.address()).await;
    let store = store_at(proxy.redis_url()).await;
    // Redis knows the script: what is lost is the answer to running it.
    store.clear(&session()).await.unwrap();
    append(&store, &["a"]).await;
    proxy.lose_reply_to(b"EVALSHA");
    let result = bounded(store.clear(&session())).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
    assert_eq!(proxy.lost(), 1);
    assert_eq!(redis.command::<i64>(&["EXISTS", LIST]).await, 0);
}

#[tokio::test]
async fn a_stopped_process_is_unavailable_and_what_it_got_is_stored_once() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    redis.pause();
    let result = bounded(store.append(&session(), appending(&["b"]))).await;
    assert!(
        matches!(result, Err(Error::OutcomeUnknown(_))),
        "{result:?}"
    );
    let result = bounded(store.read(&session(), ALL)).await;
    assert!(matches!(result, Err(Error::Unavailable(_))), "{result:?}");
    until_reachable(&store, false).await;
    redis.resume();
    until_reachable(&store, true).await;
    assert_eq!(append(&store, &["b"]).await.first_sequence, 2);
    assert_eq!(show(&read(&store).await), "1:a 2:b");
}

#[tokio::test]
async fn lists_of_sessions_that_are_asked_for_at_once_all_fail_in_time_when_redis_hangs() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    redis.pause();
    let lists = (0..20).map(|_| bounded(store.list_sessions(listing(10))));
    for listed in join_all(lists).await {
        assert!(matches!(listed, Err(Error::Unavailable(_))), "{listed:?}");
    }
    redis.resume();
    until_reachable(&store, true).await;
    let listed = join_all((0..20).map(|_| walk(&store, listing(10)))).await;
    assert!(listed.iter().all(|ids| ids == &["s"]), "{listed:?}");
}

#[tokio::test]
async fn callers_that_give_up_leave_the_connection_usable() {
    let (_redis, store) = start().await;
    let session = session();
    for n in 0..200 {
        let element = format!("element {n}");
        let call = store.append(&session, appending(&[&element]));
        // Polled once: it is sent, and then dropped.
        let _ = tokio::time::timeout(Duration::ZERO, call).await;
    }
    let page = read(&store).await;
    let sequences: Vec<i64> = page.elements.iter().map(|e| e.sequence).collect();
    let expected: Vec<i64> = (1..=page.last_sequence).collect();
    assert_eq!(sequences, expected);
    assert!(*store.reachable().borrow());
}

// Where Redis is, and who may use it.

async fn reason_of(settings: Settings) -> String {
    let store = RedisStore::connect(settings).expect("valid settings");
    let ready = store.ready(Duration::from_secs(3)).await;
    let Err(Error::Unavailable(reason)) = ready else {
        panic!("{ready:?}");
    };
    assert!(!reason.contains("wrong-secret"), "{reason}");
    reason
}

#[tokio::test]
async fn passwords_users_and_databases_are_used_and_refusals_are_clear() {
    let redis = Redis::start_with(Options {
        password: Some("right".into()),
        ..Options::default()
    })
    .await;
    let at = |user: &str| format!("redis://{user}{}", redis.address());

    let reason = reason_of(settings(at(""))).await;
    assert!(reason.contains("NOAUTH"), "{reason}");
    let reason = reason_of(settings(at(":wrong-secret@"))).await;
    assert_eq!(reason, "Redis refused the user name or the password");
    let reason = reason_of(settings(at(":right@") + "/99")).await;
    assert!(reason.contains("DB index is out of range"), "{reason}");

    let rules = "ACL SETUSER alice on >pass~ ~message_store:* ~{message_store:* +@all -info -ping";
    let rules: Vec<&str> = rules.split(' ').collect();
    let _: Value = redis.command(&rules).await;
    let alice = store_at(at("alice:pass~@")).await;
    assert_eq!(append(&alice, &["a"]).await.first_sequence, 1);
    assert_eq!(
        alice.describe(),
        format!("Redis at {}, database 0", redis.address())
    );

    let other_prefix = Settings {
        key_prefix: "other:".into(),
        ..settings(at("alice:pass~@"))
    };
    let store = RedisStore::connect(other_prefix).unwrap();
    let result = store.append(&session(), appending(&["a"])).await;
    let Err(Error::Unavailable(reason)) = &result else {
        panic!("{result:?}");
    };
    assert!(
        reason.contains("NOPERM") || reason.contains("key"),
        "{reason}"
    );

    let elsewhere = store_at(at(":right@") + "/3").await;
    assert_eq!(read(&elsewhere).await.last_sequence, 0);
    assert_eq!(append(&elsewhere, &["b"]).await.first_sequence, 1);
    assert_eq!(show(&read(&alice).await), "1:a");
}

#[tokio::test]
async fn a_unix_socket_and_another_prefix_work() {
    let redis = Redis::start().await;
    let store = RedisStore::connect(Settings {
        key_prefix: "tenant:".into(),
        ..settings(redis.unix_url())
    })
    .unwrap();
    append(&store, &["a"]).await;
    let list: Vec<String> = redis.command(&["LRANGE", "tenant:s", "0", "-1"]).await;
    assert_eq!(list, ["a"]);
    assert!(store.describe().ends_with("/redis.sock, database 0"));
}

#[tokio::test]
async fn tls_works_with_a_trusted_certificate_and_with_no_other() {
    let redis = Redis::start_with(Options {
        tls: true,
        ..Options::default()
    })
    .await;
    let trusting = Settings {
        ca_file: Some(redis.ca_file()),
        ..settings(redis.tls_url())
    };
    let store = RedisStore::connect(trusting.clone()).unwrap();
    store.ready(LIMIT).await.unwrap();
    append(&store, &["a"]).await;
    assert_eq!(show(&read(&store).await), "1:a");
    assert!(store.describe().contains("with TLS"));

    let by_address = Settings {
        url: redis.tls_url().replace("localhost", "127.0.0.1").into(),
        ..trusting.clone()
    };
    let reason = reason_of(by_address).await;
    assert!(reason.contains("certificate"), "{reason}");

    // Only where the system has certificates can the store be made without naming one.
    match RedisStore::connect(settings(redis.tls_url())) {
        Ok(_) => {
            let reason = reason_of(settings(redis.tls_url())).await;
            assert!(reason.contains("certificate"), "{reason}");
        }
        Err(error) => assert!(matches!(error, InvalidSettings::Url(_)), "{error}"),
    }

    let plain = Settings {
        url: redis.url().into(),
        ..trusting
    };
    let error = RedisStore::connect(plain).err();
    assert!(matches!(error, Some(InvalidSettings::Certificates { .. })));
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_at_once() {
    let refused = |change: fn(&mut Settings)| {
        let mut settings = settings("redis://localhost");
        change(&mut settings);
        RedisStore::connect(settings).err()
    };
    assert!(refused(|_| {}).is_none());
    assert_eq!(
        refused(|settings| settings.key_prefix = "{tenant}:".into()),
        Some(InvalidSettings::KeyPrefix)
    );
    assert!(refused(|settings| settings.key_prefix = String::new()).is_none());
    let without_prefix = refused(|settings| {
        settings.url = "redis-cluster://localhost".into();
        settings.key_prefix = String::new();
    });
    assert_eq!(without_prefix, Some(InvalidSettings::NoKeyPrefix));
    assert_eq!(
        refused(|settings| settings.timeout_ms = 0),
        Some(InvalidSettings::Timeout)
    );
    let missing = refused(|settings| {
        settings.url = "rediss://localhost".into();
        settings.ca_file = Some("/does/not/exist".into());
    });
    assert!(matches!(
        missing,
        Some(InvalidSettings::Certificates { .. })
    ));
}

#[tokio::test]
async fn an_entry_that_is_none_leaves_the_index_of_running_turns_and_hides_no_other() {
    let (redis, store) = start().await;
    let mut given_up = beginning("t");
    given_up.lease.lease_ms = 0;
    begin(&store, given_up).await;
    for nonsense in ["short", "sixteen bytes id", "sixteen bytes id{braces}"] {
        let _: i64 = redis.command(&["ZADD", RUNNING, "1", nonsense]).await;
    }
    assert_eq!(redis.command::<i64>(&["ZCARD", RUNNING]).await, 4);
    eventually("the orphan is named", async || {
        store.orphaned_turns(10).await.unwrap() == [(session(), turn("t"))]
    })
    .await;
    assert_eq!(redis.command::<i64>(&["ZCARD", RUNNING]).await, 1);
}

#[tokio::test]
async fn an_index_of_running_turns_that_others_deleted_comes_back_while_turns_run() {
    let (redis, store) = start().await;
    let mut brief = beginning("t");
    brief.lease.lease_ms = 400;
    begin(&store, brief.clone()).await;
    let _: i64 = redis.command(&["DEL", RUNNING]).await;
    let mut keep = keeping("t", TOKEN);
    keep.lease = brief.lease;
    let mut keeps = 0;
    eventually("the entry is back", async || {
        store.keep_turn(&session(), keep.clone()).await.unwrap();
        keeps += 1;
        redis.command::<i64>(&["ZCARD", RUNNING]).await == 1
    })
    .await;
    assert!(keeps > 1, "not with each keep");
    // Its holder dies.
    eventually("the orphan is named", async || {
        store.orphaned_turns(10).await.unwrap() == [(session(), turn("t"))]
    })
    .await;
}

#[tokio::test]
async fn turns_go_with_a_list_whose_expiry_others_shorten_after_their_end() {
    let (redis, store) = start().await;
    begin(&store, beginning("t")).await;
    store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    assert_close(
        pttl(&redis, TURNS).await,
        LEASE.lease_ms + LEASE.retention_ms,
    );
    let _: i64 = redis.command(&["EXPIRE", LIST, "60"]).await;
    read(&store).await;
    assert_close(pttl(&redis, TURNS).await, 60_000);
    let _: i64 = redis.command(&["EXPIRE", LIST, "30"]).await;
    append(&store, &["b"]).await;
    assert_close(pttl(&redis, TURNS).await, 30_000);

    // Where others let the list live longer, they come along.
    let _: i64 = redis.command(&["EXPIRE", LIST, "90"]).await;
    read(&store).await;
    assert_close(pttl(&redis, TURNS).await, 90_000);

    // While a turn runs, they stay for it.
    let _: i64 = redis.command(&["PERSIST", LIST]).await;
    begin(&store, beginning("u")).await;
    let _: i64 = redis.command(&["EXPIRE", LIST, "20"]).await;
    read(&store).await;
    let left = pttl(&redis, TURNS).await;
    assert!(left > 60_000, "{left}");
}

/// As it is once a list has expired, whose facts outlive it.
async fn expire_list(redis: &Redis) {
    let past = (unix_ms(redis).await - 1).to_string();
    let _: i64 = redis.command(&["HSET", FACTS, "expires_at", &past]).await;
    let _: i64 = redis.command(&["DEL", LIST]).await;
}

#[tokio::test]
async fn a_list_that_expired_and_was_begun_anew_by_others_tears_no_turn() {
    let (redis, store) = start().await;
    append(&store, &["a", "b", "c"]).await;
    begin(&store, beginning("old")).await;
    store
        .end_turn(&session(), ending("old", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    let _: i64 = redis.command(&["EXPIRE", LIST, "1000"]).await;
    begin(&store, beginning("t")).await;
    let before = read(&store).await;
    expire_list(&redis).await;
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;

    let ended = store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    assert!(matches!(ended, TurnState::Completed { .. }), "{ended:?}");
    let after = read(&store).await;
    assert_eq!(show(&after), "6:theirs 7:q 8:a");
    assert_eq!(after.epoch, before.epoch);
    // What an older one has stored is gone.
    assert_eq!(begin(&store, beginning("old")).await.attempt, 1);
}

#[tokio::test]
async fn a_turn_whose_messages_have_gone_with_the_list_is_told_to_nobody() {
    let (redis, store) = start().await;
    begin(&store, beginning("t")).await;
    store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    let follow = || FollowTurn {
        turn: turn("t"),
        from_chunk: 0,
        bytes_max: usize::MAX,
        is_noted: false,
    };
    let told = store.follow_turn(&session(), follow()).await.unwrap();
    assert!(told.is_some());
    let _: i64 = redis.command(&["DEL", LIST]).await;
    assert_eq!(store.follow_turn(&session(), follow()).await, Ok(None));
    assert_eq!(redis.command::<i64>(&["EXISTS", TURNS]).await, 1);
}

#[tokio::test]
async fn a_rewind_of_an_expired_session_leaves_nothing_without_an_expiry() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    let _: i64 = redis.command(&["EXPIRE", LIST, "1000"]).await;
    read(&store).await;
    expire_list(&redis).await;
    for id in ["r", "s"] {
        assert_eq!(rewind(&store, id, 0).await, Rewound::Done { count: 0 });
        for key in keys(&redis).await {
            assert!(pttl(&redis, &key).await > 0, "{key}");
        }
    }
}

#[tokio::test]
async fn what_is_beside_a_list_comes_along_when_others_let_it_live_longer() {
    let (redis, store) = start().await;
    append(&store, &["a"]).await;
    begin(&store, beginning("t")).await;
    let ending = ending("t", TOKEN, &["q", "a"]);
    store.end_turn(&session(), ending).await.unwrap();
    let _: i64 = redis.command(&["EXPIRE", LIST, "100"]).await;
    read(&store).await;
    let day = (unix_ms(&redis).await / REQUEST_MEMORY_MS) as usize;
    let beside = [FACTS, TURNS, REQUESTS[day % 2]];
    for key in beside {
        assert_close(pttl(&redis, key).await, 100_000);
    }
    // What this server has written is entered before it lists.
    store.list_sessions(listing(10)).await.unwrap();
    // As LangChain does with each message. Nobody asks for the session.
    let _: i64 = redis.command(&["LPUSH", LIST, "theirs"]).await;
    let _: i64 = redis.command(&["EXPIRE", LIST, "500"]).await;
    for key in beside {
        eventually("it lives as long", async || {
            pttl(&redis, key).await > 400_000
        })
        .await;
    }
    // What is LangChain's alone stays so.
    let _: i64 = redis.command(&["LPUSH", "message_store:t", "theirs"]).await;
    eventually("it is entered", async || {
        redis.command::<i64>(&["ZCARD", INDEX[0]]).await == 2
    })
    .await;
    assert_eq!(
        redis
            .command::<i64>(&["EXISTS", "{message_store:t}:session"])
            .await,
        0
    );
}

#[tokio::test]
async fn what_is_beside_a_list_does_not_go_before_it() {
    let redis = Redis::start().await;
    let upkeep = Upkeep {
        ttl_ms: Some(60_000),
        ..Upkeep::default()
    };
    let store = store_with(&redis, upkeep).await;
    begin(&store, beginning("t")).await;
    store
        .end_turn(&session(), ending("t", TOKEN, &["q", "a"]))
        .await
        .unwrap();
    let day = (unix_ms(&redis).await / REQUEST_MEMORY_MS) as usize;
    for n in 0..4 {
        append(&store, &[&n.to_string()]).await;
        for key in [FACTS, TURNS, REQUESTS[day % 2]] {
            let left = pttl(&redis, key).await;
            let left_of_list = pttl(&redis, LIST).await;
            assert!(left >= left_of_list, "{key}: {left} of {left_of_list}");
        }
        // As time goes by: less than what makes a difference.
        for key in [LIST, FACTS, TURNS, REQUESTS[day % 2]] {
            let left = (pttl(&redis, key).await - 700).to_string();
            let _: i64 = redis.command(&["PEXPIRE", key, &left]).await;
        }
    }
}

#[tokio::test]
async fn an_expiry_during_a_turn_does_not_tear_it() {
    for is_cleared_before in [false, true] {
        let (redis, store) = start().await;
        append(&store, &["a", "b"]).await;
        if is_cleared_before {
            // Then the facts outlive the list.
            store.clear(&session()).await.unwrap();
            append(&store, &["c"]).await;
        }
        begin(&store, beginning("old")).await;
        store
            .end_turn(&session(), ending("old", TOKEN, &["q", "a"]))
            .await
            .unwrap();
        begin(&store, beginning("t")).await;
        let _: i64 = redis.command(&["PEXPIRE", LIST, "300"]).await;
        read(&store).await;
        store
            .keep_turn(&session(), keeping("t", TOKEN))
            .await
            .unwrap();
        eventually("the list expires", async || {
            redis.command::<i64>(&["EXISTS", LIST]).await == 0
        })
        .await;
        let follow = |name| FollowTurn {
            turn: turn(name),
            from_chunk: 0,
            bytes_max: usize::MAX,
            is_noted: false,
        };
        if is_cleared_before {
            // A read notes the expiry, and is no clear either.
            assert_eq!(read(&store).await.last_sequence, 0);
        }
        let mut keep = keeping("t", TOKEN);
        keep.chunk = chunk(1);
        store.keep_turn(&session(), keep).await.unwrap();

        let mut end = ending("t", TOKEN, &["q2", "a2"]);
        end.chunk = chunk(2);
        let ended = store.end_turn(&session(), end.clone()).await.unwrap();
        let TurnState::Completed { appended, .. } = &ended else {
            panic!("{ended:?}");
        };
        assert_eq!((appended.first_sequence, appended.count), (1, 2));
        assert_eq!(store.end_turn(&session(), end).await, Ok(ended.clone()));
        assert_eq!(show(&read(&store).await), "1:q2 2:a2");
        let followed = store
            .follow_turn(&session(), follow("t"))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((followed.state, followed.chunks.len()), (ended.clone(), 3));
        let repeated = store.begin_turn(&session(), beginning("t")).await;
        assert_eq!(repeated, Ok(Begun::Exists(ended)));

        // Its messages are gone, so its record is.
        let forgotten = store.follow_turn(&session(), follow("old")).await;
        assert_eq!(forgotten, Ok(None));
        assert_eq!(begin(&store, beginning("old")).await.attempt, 1);
        // List and facts live on; the turns as long as their records, and with the list.
        assert_eq!(pttl(&redis, LIST).await, -1);
        let _: i64 = redis.command(&["EXPIRE", LIST, "60"]).await;
        store
            .end_turn(&session(), ending("old", TOKEN, &["q", "a"]))
            .await
            .unwrap();
        for key in [LIST, TURNS] {
            assert_close(pttl(&redis, key).await, 60_000);
        }
    }
}
