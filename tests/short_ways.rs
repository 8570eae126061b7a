//! Appends and reads of the newest have a short way in Redis for the plain case
//! (`scripts/append_plain.lua`, `newest.rs`), and must come to the same as the whole scripts:
//! random calls and acts of others on two sessions of one Redis, by a store that takes the short way
//! and by one that never does. Answers and keys must be alike.
//!
//! So must those of `scripts/turn_keep.lua`, which stands alone for speed, and of the functions of
//! `scripts/turns.lua` that it repeats: random records of turns in two keys.

mod harness;

use std::collections::BTreeMap;

use bytes::Bytes;
use chat_memory::message::SessionId;
use chat_memory::store::redis::{Redis as RedisStore, Settings};
use chat_memory::store::sessions::{Rewind, SessionStore as _, Upkeep};
use chat_memory::store::{Append, Order, Read, RequestKey, Store as _};
use harness::redis::Redis;
use harness::stores::bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const CASES: u32 = 100;
/// Named so that no key holds the other's name.
const SHORT: &str = "short";
const WHOLE: &str = "whole";

#[derive(Debug, Clone)]
enum Act {
    /// Of elements that have an id of the server or have none, under one of a few requests or a
    /// new one.
    Append {
        elements: Vec<(bool, u8)>,
        request: Option<(u8, bool)>,
    },
    /// The newest so many, of at most so many bytes.
    Read {
        is_newest_first: bool,
        last: Option<usize>,
        limit: usize,
        bytes_max: usize,
    },
    Clear,
    Rewind(i64),
    /// A command of others.
    Others(Vec<&'static str>),
    /// LangChain deletes the list, and adds the newest of it again.
    Refill(usize),
    /// The newest record is from yesterday.
    DayBefore,
}

fn act() -> impl Strategy<Value = Act> {
    let others = |command: &[&'static str]| Just(Act::Others(command.to_vec()));
    prop_oneof![
        30 => (
            prop::collection::vec((prop::bool::weighted(0.9), any::<u8>()), 1..4),
            prop::option::weighted(0.3, (0..4_u8, prop::bool::weighted(0.8))),
        )
            .prop_map(|(elements, request)| Act::Append { elements, request }),
        12 => (any::<bool>(), prop::option::of(1..6_usize), 1..6_usize, 0..200_usize).prop_map(
            |(is_newest_first, last, limit, bytes_max)| Act::Read {
                is_newest_first,
                last,
                limit,
                bytes_max,
            }
        ),
        1 => Just(Act::Clear),
        1 => (0..4_i64).prop_map(Act::Rewind),
        2 => others(&["LPUSH", "K", "theirs"]),
        1 => others(&["DEL", "K"]),
        1 => others(&["LPOP", "K"]),
        1 => others(&["RPOP", "K"]),
        1 => others(&["LSET", "K", "0", "changed"]),
        1 => others(&["EXPIRE", "K", "100000"]),
        1 => others(&["DEL", "{K}:requests:0", "{K}:requests:1"]),
        1 => others(&["PERSIST", "K"]),
        1 => others(&["DEL", "{K}:session"]),
        1 => (0..4_usize).prop_map(Act::Refill),
        2 => Just(Act::DayBefore),
    ]
}

async fn do_it(store: &RedisStore, redis: &Redis, id: &str, act: &Act, time_ms: i64) -> String {
    let session = SessionId::parse(id).unwrap();
    let list = format!("message_store:{id}");
    let key = |kind: &str, request: Option<(u8, bool)>| match request {
        Some((n, body)) => RequestKey::new(kind, &n.to_string(), &[body.into()]),
        None => RequestKey::new(kind, &time_ms.to_string(), b""),
    };
    match act {
        Act::Append { elements, request } => {
            let element = |(index, (has_id, n)): (usize, &(bool, u8))| match has_id {
                true => format!(r#"{{"n": {n}, "id": "cm_{time_ms:013}{index:01}"}}"#),
                false => format!("without {n}"),
            };
            let append = Append {
                elements: elements
                    .iter()
                    .enumerate()
                    .map(|element_of| Bytes::from(element(element_of)))
                    .collect(),
                request: key("append", *request),
                time_ms,
                expected_last_sequence: None,
                expected_epoch: None,
            };
            format!("{:?}", store.append(&session, append).await)
        }
        Act::Read {
            is_newest_first,
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
                after: 0,
                // Says nothing, and makes it no read of the newest.
                before: (id == WHOLE).then_some(1 << 50),
                last: *last,
                limit: *limit,
                bytes_max: *bytes_max,
            };
            let mut page = store.read(&session, read).await.unwrap();
            page.before = page.before.min(page.last_sequence + 1);
            let elements: Vec<_> = page
                .elements
                .iter()
                .map(|e| (e.sequence, bytes(e)))
                .collect();
            format!("{page:?} {elements:?}")
        }
        Act::Clear => format!("{:?}", store.clear(&session).await),
        Act::Rewind(after) => {
            let rewind = Rewind {
                after: *after,
                request: key("rewind", None),
                expected_last_sequence: None,
                time_ms,
            };
            format!("{:?}", store.rewind(&session, rewind).await)
        }
        Act::Others(command) => {
            let command: Vec<String> = command
                .iter()
                .map(|part| part.replace('K', &list))
                .collect();
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            format!(
                "{:?}",
                redis.try_command::<redis::Value>(&command).await.is_ok()
            )
        }
        Act::Refill(count) => {
            let newest = if *count == 0 {
                "0".to_owned()
            } else {
                format!("{}", count - 1)
            };
            let elements: Vec<String> = redis.command(&["LRANGE", &list, "0", &newest]).await;
            let _: i64 = redis.command(&["DEL", &list]).await;
            for element in elements.iter().rev() {
                let _: i64 = redis.command(&["LPUSH", &list, element]).await;
            }
            String::new()
        }
        Act::DayBefore => {
            let facts = format!("{{{list}}}:session");
            let day: Option<String> = redis.command(&["HGET", &facts, "day"]).await;
            let Some(day) = day else { return String::new() };
            let how = if day.ends_with('-') { "-" } else { "" };
            let day: i64 = day.trim_end_matches(['+', '-']).parse().unwrap();
            // Its records, and those of the day before that are gone.
            let [today, other] =
                [day, day + 1].map(|day| format!("{{{list}}}:requests:{}", day % 2));
            if redis.command::<i64>(&["EXISTS", &today]).await == 1 {
                let _: redis::Value = redis.command(&["RENAME", &today, &other]).await;
            }
            let before = format!("{}{how}", day - 1);
            let _: i64 = redis.command(&["HSET", &facts, "day", &before]).await;
            String::new()
        }
    }
}

/// All keys of a session and what is in them; whether they expire.
async fn kept(redis: &Redis, id: &str) -> BTreeMap<String, (Vec<u8>, bool)> {
    let mut kept = BTreeMap::new();
    let keys: Vec<String> = redis
        .command(&["KEYS", &format!("*message_store:{id}*")])
        .await;
    for key in keys {
        let dump: Vec<u8> = redis.command(&["DUMP", &key]).await;
        let expires = redis.command::<i64>(&["PTTL", &key]).await >= 0;
        let kind: String = redis.command(&["TYPE", &key]).await;
        let contents = match kind.as_str() {
            "hash" => {
                let mut pairs: BTreeMap<Vec<u8>, Vec<u8>> = redis.command(&["HGETALL", &key]).await;
                // By Redis' clock, which goes on between the two.
                if let Some(at) = pairs.get_mut(b"expires_at".as_slice())
                    && !at.is_empty()
                {
                    *at = b"some time".to_vec();
                }
                format!("{pairs:?}").into_bytes()
            }
            _ => dump,
        };
        kept.insert(key.replace(id, "ID"), (contents, expires));
    }
    kept
}

#[test]
fn the_short_way_comes_to_the_same_as_the_whole_script() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (redis, short, whole) = runtime.block_on(async {
        let redis = Redis::start().await;
        let connect = async |upkeep| {
            let mut settings = Settings::new(redis.url());
            settings.upkeep = upkeep;
            let store = RedisStore::connect(settings).unwrap();
            store
                .ready(std::time::Duration::from_secs(20))
                .await
                .unwrap();
            store
        };
        let short = connect(Upkeep::default()).await;
        // A server that may have to trim takes the whole way.
        let whole = connect(Upkeep {
            elements_max: Some(1_000_000),
            ..Upkeep::default()
        })
        .await;
        (redis, short, whole)
    });
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    };
    let acts = prop::collection::vec(act(), 1..30);
    let outcome = TestRunner::new(config).run(&acts, |acts| {
        runtime.block_on(async {
            let _: redis::Value = redis.command(&["FLUSHALL"]).await;
            // No server looks at one of the two by itself meanwhile.
            let round = "{message_store:}:round";
            let _: redis::Value = redis.command(&["SET", round, "", "EX", "600"]).await;
            for (step, act) in acts.iter().enumerate() {
                // Zero bytes in it, which texts of C end at.
                let time_ms = 0x0190_0000_0000 + step as i64;
                let one = do_it(&short, &redis, SHORT, act, time_ms).await;
                let other = do_it(&whole, &redis, WHOLE, act, time_ms).await;
                prop_assert_eq!(one, other, "step {}", step);
                let (one, other) = (kept(&redis, SHORT).await, kept(&redis, WHOLE).await);
                prop_assert_eq!(one, other, "after step {}", step);
            }
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    // Otherwise this would show nothing.
    let calls = runtime.block_on(redis.command_counts());
    let of = |name: &str| calls.get(name).copied().unwrap_or(0);
    assert!(
        of("time") < of("evalsha") * 19 / 20,
        "the short way asks for no time"
    );
    assert!(of("exec") > 100, "only the short way has transactions");
}

/// What `turn_keep.lua` does, by the functions of `turns.lua`.
const KEEP: &str = "
    local values, refusal = fields(ARGV[1])
    if not values then
      return refusal
    end
    local now = clock()
    local record = known(values[1], now)
    if not record then
      return { 'cleared' }
    end
    if record.token ~= ARGV[2] or record.state ~= 'running' then
      return { 'lease lost' }
    end
    record.reserved = math.max(record.reserved, ARGV[6] + ARGV[5])
    lease_to(record, ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), now)
    local is_due = now - (record.indexed_ms or 0) >= ARGV[3] / 2
    if is_due then
      record.indexed_ms = now
    end
    local others = {}
    add_chunk(ARGV[1], record, ARGV[7], ARGV[8], others)
    write(ARGV[1], record, others, now)
    local followed = record.followed_ms and now - record.followed_ms or ''
    return { 'kept', record.stop, followed, is_due and 1 or 0 }";

/// Makes a record, of which those times are told from now on, in both keys; has it kept both ways; and
/// tells what came of each. In one script, so that hardly any time goes by; times to 100 ms.
const BOTH: &str = "
    local function near(ms)
      return math.floor((ms + 50) / 100)
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local record = cjson.decode(ARGV[1])
    for name, value in pairs(record) do
      record[name] = string.sub(name, -3) == '_ms' and now + value or value
    end
    local told = {}
    for index, keep in ipairs({ alone, by_all }) do
      local key = KEYS[index]
      redis.call('HSET', key, 'turn', cmsgpack.pack(record))
      if ARGV[2] ~= '' then
        redis.call('PEXPIRE', key, ARGV[2])
      end
      local reply = keep({ key, 'session', '', '', key }, { unpack(ARGV, 3) })
      local kept = cmsgpack.unpack(redis.call('HGET', key, 'turn'))
      local names = {}
      for name, value in pairs(kept) do
        kept[name] = string.sub(name, -3) == '_ms' and near(value - now) or value
        names[#names + 1] = name
      end
      table.sort(names)
      reply[3] = type(reply[3]) == 'number' and near(reply[3]) or reply[3]
      told[index] = { reply, near(redis.call('PTTL', key)), redis.call('HLEN', key) - 1,
        redis.call('HGET', key, 'turnchunk:3') or '' }
      for _, name in ipairs(names) do
        table.insert(told[index], name)
        table.insert(told[index], kept[name])
      end
    end
    return told";

/// A record, how long its key lives, and the arguments of the script.
fn kept_turn() -> impl Strategy<Value = (serde_json::Value, Option<i64>, Vec<String>)> {
    let record = (
        prop::sample::select(vec!["mine", "mine", "mine", "another"]),
        prop::sample::select(vec!["running", "running", "running", "completed", "failed"]),
        prop::sample::select(vec!["", "keep", "discard"]),
        prop::sample::select(vec![-1_000, 7_000, 70_000, 700_000]),
        prop::option::of(prop::sample::select(vec![-3_000, -300, 0])),
        prop::option::of(prop::sample::select(vec![-90_000, -8_000, 0])),
        prop::option::of(prop::sample::select(vec![-5_000, 5_000, 5_000_000])),
        0..200_i64,
    )
        .prop_map(
            |(token, state, stop, forget, followed, indexed, until, reserved)| {
                let mut record = serde_json::json!({
                    "token": token, "state": state, "stop": stop, "forget_ms": forget,
                    "expires_ms": 0, "reserved": reserved, "first_chunk": 1, "next_chunk": 3,
                });
                for (name, value) in [
                    ("followed_ms", followed),
                    ("indexed_ms", indexed),
                    ("list_until_ms", until),
                ] {
                    if let Some(value) = value {
                        record[name] = value.into();
                    }
                }
                record
            },
        );
    let life = prop::option::of(prop::sample::select(vec![900, 90_000, 9_000_000]));
    let arguments = (
        prop::sample::select(vec![2_000, 20_000]),
        prop::sample::select(vec![0, 40_000, 8_000_000]),
        0..100_i64,
        0..200_i64,
        prop::sample::select(vec!["", "2", "3", "4"]),
    )
        .prop_map(|(lease, retention, reserve, last, index)| {
            let numbers = [lease, retention, reserve, last].map(|number| number.to_string());
            let mut arguments = vec!["turn".to_owned(), "mine".to_owned()];
            arguments.extend(numbers);
            arguments.extend([index.to_owned(), "bytes".to_owned()]);
            arguments
        });
    (record, life, arguments)
}

#[test]
fn the_script_that_keeps_a_turn_comes_to_the_same_as_the_functions_of_all() {
    let both = redis::Script::new(&format!(
        "local LINGER_MS, PLACE_MS, WAITING_MAX, FOLLOWED_EVERY_MS = 3600000, 0, 0, 0\n\
         local function alone(KEYS, ARGV)\n{}\nend\n\
         local function by_all(KEYS, ARGV)\n{}{}{}{KEEP}\nend\n{BOTH}",
        include_str!("../src/store/redis/scripts/turn_keep.lua"),
        include_str!("../src/store/redis/scripts/keys.lua"),
        include_str!("../src/store/redis/scripts/base.lua"),
        include_str!("../src/store/redis/scripts/turns.lua"),
    ));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (redis, client) = runtime.block_on(async {
        let redis = Redis::start().await;
        let client = redis.client().await.unwrap();
        (redis, client)
    });
    let config = Config {
        cases: 10 * CASES,
        failure_persistence: None,
        ..Config::default()
    };
    let kept = std::cell::Cell::new(0);
    let outcome = TestRunner::new(config).run(&kept_turn(), |(record, life, arguments)| {
        let mut client = client.clone();
        let told: [redis::Value; 2] = runtime.block_on(async {
            let _: redis::Value = redis.command(&["FLUSHALL"]).await;
            let life = life.map_or(String::new(), |life: i64| life.to_string());
            let mut call = both.key("alone");
            call.key("by_all").arg(record.to_string()).arg(life);
            let told: (redis::Value, redis::Value) = call
                .arg(&arguments)
                .invoke_async(&mut client)
                .await
                .unwrap();
            told.into()
        });
        kept.set(kept.get() + i32::from(format!("{told:?}").contains("kept")));
        prop_assert_eq!(&told[0], &told[1]);
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    // Otherwise this would show little.
    assert!(kept.get() > 2 * CASES as i32, "{} are kept", kept.get());
}
