//! Moving sessions between stores, and the doctor: the real program on real stores.

mod harness;

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    time::Duration,
};

use bytes::Bytes;
use chat_memory::{
    message::now_ms,
    store::{
        List, Store,
        redis::{Redis as RedisStore, Settings},
        sessions::{About, ListRecent, Look, Update},
        sqlite::Sqlite,
    },
};
use harness::{
    program::{Program, command, run},
    redis::Redis,
    server,
    stores::{all, batch, bytes, expiry, fill, read_all, session, texts},
    wait::{LIMIT, until},
};
use serde_json::Value;

const PREFIX: &str = "message_store:";

/// Elements that JSON, UTF-8 or a careless program would change.
fn odd_elements() -> Vec<Bytes> {
    let every_byte: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    vec![
        Bytes::new(),
        Bytes::from_static(b"\xff\xfe invalid \xc3"),
        Bytes::from_static(b"\xed\xa0\x80"),
        Bytes::from_static(br#"{"type": "human", "data": {"content": "\ud800"}}"#),
        Bytes::from_static(br#"{"a": NaN, "b": -Infinity, "a": 1.10, "c": 1E400}"#),
        Bytes::from("9".repeat(5_000)),
        Bytes::from(format!("{}{}", "[".repeat(10_000), "]".repeat(10_000))),
        Bytes::from("Ünïcödé 会話 🎉 \u{feff}\u{fffd}\u{2028}\u{85}\r\n\t\0\u{7f}\"\\"),
        Bytes::from(every_byte),
        Bytes::from(large),
        Bytes::from("é".repeat(1 << 19)),
        Bytes::new(),
    ]
}

/// Session ids that patterns, SQL or shells would take for something else.
fn odd_names() -> Vec<String> {
    let names = [
        "a",
        "A",
        "*",
        "?",
        "[a-z]",
        "\\",
        "%",
        "_",
        "'",
        "\"",
        "a/b:c",
        "会話",
        "🎉",
        " ",
        "-x",
        "x".repeat(512).leak(),
    ];
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn embedded(path: &Path) -> [String; 2] {
    ["--database".to_owned(), path.to_str().unwrap().to_owned()]
}

fn on(redis: &Redis) -> [String; 2] {
    ["--redis".to_owned(), redis.url()]
}

/// Runs `chat-memory COMMAND STORE… MORE…`.
fn moving(name: &str, store: &[String], more: &[&str]) -> Output {
    let args = std::iter::once(name)
        .chain(store.iter().map(String::as_str))
        .chain(more.iter().copied());
    run(args)
}

fn succeeded(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    errors
}

async fn connect(redis: &Redis) -> RedisStore {
    let store = RedisStore::connect(Settings::new(redis.url())).unwrap();
    store.ready(LIMIT).await.unwrap();
    store
}

/// Everything in a store.
async fn contents(store: &dyn Store) -> BTreeMap<String, Vec<Bytes>> {
    let mut contents = BTreeMap::new();
    let mut cursor = None;
    loop {
        let list = List {
            prefix: String::new(),
            cursor,
            limit: 100,
        };
        let page = store.sessions(list).await.unwrap();
        for session in page.sessions {
            let page = read_all(store, &session).await;
            let elements = page.elements.iter().map(|element| bytes(element).clone());
            contents.insert(session.to_string(), elements.collect());
        }
        cursor = page.next;
        if cursor.is_none() {
            return contents;
        }
    }
}

/// An embedded store with odd elements under odd names.
async fn odd_store(path: &Path) -> BTreeMap<String, Vec<Bytes>> {
    let store = Sqlite::open(path, PREFIX).unwrap();
    for name in odd_names() {
        fill(&store, &session(&name), 3).await;
    }
    store
        .append(&session("odd"), batch(odd_elements()))
        .await
        .unwrap();
    // What was cleared is no session.
    fill(&store, &session("cleared"), 2).await;
    store.clear(&session("cleared")).await.unwrap();
    contents(&store).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_survives_the_way_to_redis_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("1.db"), directory.path().join("2.db"));
    let file = directory.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let redis = Redis::start().await;
    let before = odd_store(&first).await;
    assert_eq!(before.len(), odd_names().len() + 1);

    succeeded(&moving("export", &embedded(&first), &["--output", file]));
    let said = succeeded(&moving("import", &on(&redis), &["--input", file]));
    assert!(
        said.contains("imported 17 sessions: 60 messages added, 0 were"),
        "{said}"
    );
    assert!(contents(&connect(&redis).await).await == before);

    // Through pipes, this time.
    let exported = moving("export", &on(&redis), &[]);
    succeeded(&exported);
    std::fs::write(file, &exported.stdout).unwrap();
    succeeded(&moving("import", &embedded(&second), &["--input", file]));
    let store = Sqlite::open(&second, PREFIX).unwrap();
    assert!(contents(&store).await == before);
    let page = store.read(&session("a"), all()).await.unwrap();
    assert_eq!(harness::stores::sequences(&page), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_repeated_adds_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("1.db"), directory.path().join("2.db"));
    let file = directory.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let redis = Redis::start().await;
    let before = odd_store(&first).await;
    succeeded(&moving("export", &embedded(&first), &["--output", file]));
    for store in [on(&redis), embedded(&second)] {
        succeeded(&moving("import", &store, &["--input", file]));
        if store[0] == "--redis" {
            // As after more than 24 hours, when no request is remembered.
            for name in before.keys() {
                let key = format!("{{{PREFIX}{name}}}:requests");
                let _: i64 = redis
                    .command(&["DEL", &format!("{key}:0"), &format!("{key}:1")])
                    .await;
            }
        }
        let said = succeeded(&moving("import", &store, &["--input", file]));
        assert!(
            said.contains("0 messages added, 60 were there already"),
            "{said}"
        );
    }
    assert!(contents(&connect(&redis).await).await == before);
    assert!(contents(&Sqlite::open(&second, PREFIX).unwrap()).await == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_session_or_those_with_a_prefix_can_be_chosen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let redis = Redis::start().await;
    let from_redis = connect(&redis).await;
    {
        let embedded = Sqlite::open(&path, PREFIX).unwrap();
        for name in ["ann*/1", "ann*/2", "annx/3", "bob"] {
            fill(&embedded, &session(name), 1).await;
            fill(&from_redis, &session(name), 1).await;
        }
    }
    for store in [embedded(&path), on(&redis)] {
        for (choice, expected) in [
            (vec![], vec!["ann*/1", "ann*/2", "annx/3", "bob"]),
            (vec!["--session-prefix", "ann*"], vec!["ann*/1", "ann*/2"]),
            (vec!["--session-prefix", "nobody"], vec![]),
            (vec!["--session", "ann*/2"], vec!["ann*/2"]),
        ] {
            let output = moving("export", &store, &choice);
            succeeded(&output);
            let mut names: Vec<String> = lines(&output.stdout)
                .iter()
                .filter_map(|line| Some(line["session"]["id"].as_str()?.to_owned()))
                .collect();
            names.sort();
            assert_eq!(names, expected, "{choice:?}");
        }
        let missing = moving("export", &store, &["--session", "nobody"]);
        assert_eq!(missing.status.code(), Some(1));
    }
}

fn lines(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// An import whose input the test writes.
fn import_from_pipe(store: &[String]) -> Child {
    let args = std::iter::once("import").chain(store.iter().map(String::as_str));
    command(args)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_was_killed_goes_on_and_stores_everything_once() {
    const MESSAGES: usize = 2_500;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let redis = Redis::start().await;
    let before = {
        let store = Sqlite::open(&path, PREFIX).unwrap();
        let numbers = (0..MESSAGES).map(|number| format!("message {number}"));
        store.append(&session("s"), batch(numbers)).await.unwrap();
        fill(&store, &session("t"), 2).await;
        contents(&store).await
    };
    let exported = moving("export", &embedded(&path), &[]).stdout;

    for part in [3, 2] {
        let mut child = import_from_pipe(&on(&redis));
        let mut input = child.stdin.take().unwrap();
        input.write_all(&exported[..exported.len() / part]).unwrap();
        input.flush().unwrap();
        until("some messages are there", || async {
            let length: i64 = redis.command(&["LLEN", "message_store:s"]).await;
            (length as usize > MESSAGES / (part + 2)).then_some(())
        })
        .await;
        child.kill().unwrap();
        child.wait().unwrap();
        let length: i64 = redis.command(&["LLEN", "message_store:s"]).await;
        assert!((length as usize) < MESSAGES, "it was killed too late");
    }

    let file = directory.path().join("out.jsonl");
    std::fs::write(&file, &exported).unwrap();
    let file = file.to_str().unwrap();
    let said = succeeded(&moving("import", &on(&redis), &["--input", file]));
    assert!(!said.contains(" 0 were there already"), "{said}");
    assert!(contents(&connect(&redis).await).await == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_was_interrupted_goes_on_in_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let (path, second) = (directory.path().join("1.db"), directory.path().join("2.db"));
    let before = {
        let store = Sqlite::open(&path, PREFIX).unwrap();
        for number in 0..450 {
            fill(&store, &session(&format!("s{number}")), 1).await;
        }
        contents(&store).await
    };
    let file = directory.path().join("out.jsonl");
    let output = ["--output", file.to_str().unwrap()];
    succeeded(&moving("export", &embedded(&path), &output));
    let whole = std::fs::read(&file).unwrap();
    let text = std::str::from_utf8(&whole).unwrap();
    let second_checkpoint = text.rfind("{\"checkpoint\"").unwrap();

    // Cut off anywhere: before the first checkpoint, within a line, behind the last one.
    for length in [
        0,
        10,
        200,
        second_checkpoint - 7,
        second_checkpoint + 3,
        whole.len() - 5,
    ] {
        std::fs::write(&file, &whole[..length]).unwrap();
        if length == 10 {
            // What is no export is not written over.
            let refused = moving("export", &embedded(&path), &output);
            assert_eq!(refused.status.code(), Some(1));
            continue;
        }
        let said = succeeded(&moving("export", &embedded(&path), &output));
        assert!(
            said.contains("exported 450 sessions with 450 messages"),
            "{said}"
        );
        assert!(std::fs::read(&file).unwrap() == whole, "cut at {length}");
    }
    let refused = moving("export", &embedded(&path), &output);
    assert_eq!(refused.status.code(), Some(1), "a whole export stays");

    let input = ["--input", output[1]];
    std::fs::write(&file, &whole[..second_checkpoint]).unwrap();
    let partly = moving("import", &embedded(&second), &input);
    let said = String::from_utf8_lossy(&partly.stderr).into_owned();
    assert_eq!(partly.status.code(), Some(1), "{said}");
    assert!(said.contains("the export was interrupted"), "{said}");
    std::fs::write(&file, &whole).unwrap();
    succeeded(&moving("import", &embedded(&second), &input));
    assert!(contents(&Sqlite::open(&second, PREFIX).unwrap()).await == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_holds_something_else_is_refused_and_the_others_are_imported() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let file = directory.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let redis = Redis::start().await;
    {
        let store = Sqlite::open(&path, PREFIX).unwrap();
        for name in ["begun", "other", "longer", "new"] {
            fill(&store, &session(name), 3).await;
        }
        // Another key type is found by the store itself.
        fill(&store, &session("typed"), 1).await;
    }
    succeeded(&moving("export", &embedded(&path), &["--output", file]));
    let store = connect(&redis).await;
    fill(&store, &session("begun"), 2).await;
    store
        .append(&session("other"), batch(["1", "!"]))
        .await
        .unwrap();
    fill(&store, &session("longer"), 5).await;
    let _: () = redis.command(&["SET", "message_store:typed", "x"]).await;

    let output = moving("import", &on(&redis), &["--input", file]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("session \"other\": refused: it holds other messages"),
        "{said}"
    );
    assert!(said.contains("the first one that differs is 2"), "{said}");
    assert!(said.contains("session \"typed\": refused"), "{said}");
    assert!(
        said.contains("imported 3 sessions: 4 messages added"),
        "{said}"
    );
    let text = async |name: &str| texts(&read_all(&store, &session(name)).await);
    assert_eq!(text("begun").await, ["1", "2", "3"]);
    assert_eq!(text("other").await, ["1", "!"]);
    assert_eq!(text("longer").await, ["1", "2", "3", "4", "5"]);
    assert_eq!(text("new").await, ["1", "2", "3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_goes_from_redis_to_redis() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let (from, to) = (Redis::start().await, Redis::start().await);
    for (name, ttl) in [("a", "100000"), ("b", "0"), ("gone", "100000")] {
        let key = format!("{PREFIX}{name}");
        let _: i64 = from.command(&["LPUSH", &key, "1", "2"]).await;
        if ttl != "0" {
            let _: i64 = from.command(&["EXPIRE", &key, ttl]).await;
        }
    }
    succeeded(&moving("export", &on(&from), &["--output", file]));
    // One of them expires before the import.
    let text = std::fs::read_to_string(file).unwrap();
    let gone = text.lines().find(|line| line.contains("\"gone\"")).unwrap();
    let past = format!(
        r#"{{"session":{{"id":"gone","expires_at_ms":{}}}}}"#,
        now_ms() - 1
    );
    std::fs::write(file, text.replace(gone, &past)).unwrap();

    let said = succeeded(&moving("import", &on(&to), &["--input", file]));
    assert!(said.contains("1 sessions have expired since"), "{said}");
    let ttl = async |key: &str| to.command::<i64>(&["TTL", key]).await;
    assert!((99_000..=100_000).contains(&ttl("message_store:a").await));
    assert!((99_000..).contains(&ttl("{message_store:a}:session").await));
    assert_eq!(ttl("message_store:b").await, -1);
    assert_eq!(ttl("message_store:gone").await, -2);

    // An expiry that was set meanwhile stands.
    let _: i64 = to.command(&["EXPIRE", "message_store:a", "50"]).await;
    succeeded(&moving("import", &on(&to), &["--input", file]));
    assert!((1..=50).contains(&ttl("message_store:a").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expiry_goes_from_file_to_file_and_to_redis() {
    let directory = tempfile::tempdir().unwrap();
    let [from, to, out] = ["1.db", "2.db", "out.jsonl"].map(|name| directory.path().join(name));
    let out = out.to_str().unwrap();
    let at_ms = now_ms() + 100_000_000;
    let store = Sqlite::open(&from, PREFIX).unwrap();
    for name in ["a", "b", "gone"] {
        fill(&store, &session(name), 2).await;
    }
    assert_eq!(store.expire(&session("a"), at_ms).await, Ok(true));
    // It is in the file still, and yet no session.
    assert_eq!(store.expire(&session("gone"), now_ms()).await, Ok(true));
    drop(store);

    succeeded(&moving("export", &embedded(&from), &["--output", out]));
    let redis = Redis::start().await;
    for target in [embedded(&to), on(&redis)] {
        succeeded(&moving("import", &target, &["--input", out]));
    }
    let stores: [Box<dyn Store>; 2] = [
        Box::new(Sqlite::open(&to, PREFIX).unwrap()),
        Box::new(connect(&redis).await),
    ];
    for store in stores {
        let told = expiry(&*store, &session("a")).await;
        assert!(told.is_some_and(|told| told.abs_diff(at_ms) < 1_000));
        assert_eq!(expiry(&*store, &session("b")).await, None);
        let names: Vec<_> = contents(&*store).await.into_keys().collect();
        assert_eq!(names, ["a", "b"]);
    }
}

/// What is said of a session, and when it ends.
async fn said_of(store: &dyn Store, name: &str) -> (About, Option<i64>) {
    let seen = store.look(&session(name), Look::default()).await.unwrap();
    (seen.about, seen.expires_ms)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_a_session_goes_with_it_and_stands_where_it_is_said_already() {
    const TTL_MS: i64 = 100_000_000;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let metadata = BTreeMap::from([("user".to_owned(), "Ann \"\u{1F600}".to_owned())]);
    let told = |title: &str, ttl_ms| Update {
        title: Some(title.to_owned()),
        metadata: Some(metadata.clone()),
        ttl_ms: Some(Some(ttl_ms)),
    };
    let redis = Redis::start().await;
    let sources: [(_, Box<dyn Store>); 2] = [
        (
            embedded(&path("from.db")),
            Box::new(Sqlite::open(&path("from.db"), PREFIX).unwrap()),
        ),
        (on(&redis), Box::new(connect(&redis).await)),
    ];
    for (number, (from, store)) in sources.into_iter().enumerate() {
        for name in ["lives", "for ever", "nothing", "known", "ends", "longer"] {
            fill(&*store, &session(name), 2).await;
        }
        for (name, update) in [
            ("lives", told("A story", TTL_MS)),
            ("for ever", told("", 0)),
            ("known", told("Here", TTL_MS)),
            ("ends", told("Here", TTL_MS)),
            ("longer", told("Here", TTL_MS)),
        ] {
            let told = store.update_session(&session(name), update).await;
            assert!(told.unwrap().is_some());
        }
        drop(store);
        let out = path("out.jsonl");
        let _ = std::fs::remove_file(&out);
        let out = out.to_str().unwrap();
        succeeded(&moving("export", &from, &["--output", out]));

        let redis = Redis::start().await;
        let file = path(&format!("{number}.db"));
        for to in [embedded(&file), on(&redis)] {
            let open = async || {
                let store: Box<dyn Store> = match to[0].as_str() {
                    "--redis" => Box::new(connect(&redis).await),
                    _ => Box::new(Sqlite::open(&file, PREFIX).unwrap()),
                };
                store
            };
            let store = open().await;
            for name in ["known", "ends", "longer"] {
                fill(&*store, &session(name), 2).await;
            }
            let there = Update {
                title: Some("There".to_owned()),
                ttl_ms: Some(Some(0)),
                ..Update::default()
            };
            let known = session("known");
            store.update_session(&known, there).await.unwrap();
            let ends_ms = now_ms() + 5_000_000;
            assert!(store.expire(&session("ends"), ends_ms).await.unwrap());
            store
                .append(&session("longer"), batch(["3"]))
                .await
                .unwrap();
            drop(store);

            succeeded(&moving("import", &to, &["--input", out]));
            let is_in = |at_ms: Option<i64>, left_ms: i64| {
                at_ms.is_some_and(|at_ms| at_ms.abs_diff(now_ms() + left_ms) < 60_000)
            };
            let about = |title: &str, ttl_ms| About {
                title: title.to_owned(),
                metadata: metadata.clone(),
                ttl_ms,
                origin: None,
            };
            let store = open().await;
            for (name, expected, left_ms) in [
                ("lives", about("A story", Some(TTL_MS)), Some(TTL_MS)),
                ("for ever", about("", Some(0)), None),
                ("nothing", About::default(), None),
                ("known", about("There", Some(0)), None),
                ("ends", about("Here", None), Some(5_000_000)),
                ("longer", about("Here", None), None),
            ] {
                let (about, expires_ms) = said_of(&*store, name).await;
                assert_eq!(about, expected, "{name} from {from:?} in {to:?}");
                match left_ms {
                    Some(left_ms) => assert!(is_in(expires_ms, left_ms), "{name}: {expires_ms:?}"),
                    None => assert_eq!(expires_ms, None, "{name}"),
                }
            }
            // They are found by it.
            let list = ListRecent {
                metadata: metadata.clone(),
                limit: 10,
                ..ListRecent::default()
            };
            let found = store.list_sessions(list).await.unwrap();
            assert_eq!(found.sessions.len(), 5);

            // A repetition starts no life anew and takes nothing back.
            let renamed = Update {
                title: Some("Renamed".to_owned()),
                ..Update::default()
            };
            let lives = session("lives");
            store.update_session(&lives, renamed).await.unwrap();
            let before = said_of(&*store, "lives").await;
            drop(store);
            succeeded(&moving("import", &to, &["--input", out]));
            let (about, expires_ms) = said_of(&*open().await, "lives").await;
            assert_eq!((&about, about.title.as_str()), (&before.0, "Renamed"));
            // Redis tells how long is left, whatever the time.
            assert!(expires_ms.unwrap().abs_diff(before.1.unwrap()) < 100);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_a_server_uses_can_be_exported_but_not_imported_into() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let program = Program::embedded(&path);
    let mut client = server::client(server::tcp_channel(&program.addresses[0]).await);
    let append = |number: usize| server::append("s", vec![server::user(&number.to_string())]);
    client.append(append(0)).await.unwrap();
    let writing = tokio::spawn(async move {
        for number in 1..300 {
            client.append(append(number)).await.unwrap();
        }
    });
    let mut sizes = Vec::new();
    while !writing.is_finished() || sizes.len() < 2 {
        let store = embedded(&path);
        let output = tokio::task::spawn_blocking(move || moving("export", &store, &[]))
            .await
            .unwrap();
        succeeded(&output);
        let lines = lines(&output.stdout);
        let contents: Vec<String> = lines
            .iter()
            .filter_map(|line| {
                let element: Value = serde_json::from_str(line["text"].as_str()?).unwrap();
                Some(element["data"]["content"].as_str().unwrap().to_owned())
            })
            .collect();
        let expected: Vec<_> = (0..contents.len()).map(|n| n.to_string()).collect();
        assert_eq!(contents, expected);
        assert!(!contents.is_empty());
        sizes.push(contents.len());
    }
    writing.await.unwrap();

    let refused = moving("import", &embedded(&path), &[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("in use by another chat-memory"), "{said}");

    // What a crash leaves in the log beside the file is exported, too.
    program.crash();
    let exported = moving("export", &embedded(&path), &[]);
    succeeded(&exported);
    let end = lines(&exported.stdout).pop().unwrap();
    assert_eq!(end["complete"]["elements"], 300);

    let missing = directory.path().join("missing.db");
    let refused = moving("export", &embedded(&missing), &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(!missing.exists(), "an export makes no file");
}

/// Runs the program and returns the most memory that it had, in KiB.
fn memory_kib(args: &[&str]) -> u64 {
    let mut child = command(args).stderr(Stdio::null()).spawn().unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut most = 0;
    loop {
        // The high-water mark only ever rises, so the last look tells.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(mark) = mark {
            let kib = mark.trim().trim_end_matches(" kB").parse().unwrap();
            most = u64::max(most, kib);
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{args:?}");
            return most;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_a_hundred_thousand_messages_takes_little_memory() {
    const MESSAGES: usize = 100_000;
    const ELEMENT_BYTES: usize = 800;
    const LIMIT_KIB: u64 = 56 << 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let database = path.to_str().unwrap();
    let file = directory.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let redis = Redis::start().await;
    let mut client = redis.client().await.unwrap();
    for from in (0..MESSAGES).step_by(1_000) {
        let mut push = ::redis::cmd("LPUSH");
        push.arg("message_store:s");
        for number in from..from + 1_000 {
            push.arg(format!("{number:0ELEMENT_BYTES$}"));
        }
        push.exec_async(&mut client).await.unwrap();
    }
    let url = redis.url();
    let took = memory_kib(&["export", "--redis", &url, "--output", file]);
    assert!((1..LIMIT_KIB).contains(&took), "export: {took} KiB");
    let took = memory_kib(&["import", "--database", database, "--input", file]);
    assert!((1..LIMIT_KIB).contains(&took), "import: {took} KiB");
    let took = memory_kib(&["import", "--redis", &url, "--input", file]);
    assert!(
        (1..LIMIT_KIB).contains(&took),
        "repeated import: {took} KiB"
    );

    let store = Sqlite::open(&path, PREFIX).unwrap();
    let page = read_all(&store, &session("s")).await;
    assert_eq!(page.elements.len(), MESSAGES);
    for (number, element) in page.elements.iter().enumerate() {
        assert_eq!(
            bytes(element),
            format!("{number:0ELEMENT_BYTES$}").as_bytes()
        );
    }
    assert_eq!(
        redis.command::<i64>(&["LLEN", "message_store:s"]).await,
        100_000
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_no_export_is_refused_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    let header = r#"{"chat_memory_export":{"version":1,"store":"x","key_prefix":"","prefix":""}}"#;
    let file = directory.path().join("in.jsonl");
    for (text, line) in [
        ("hello\n".to_owned(), 1),
        ("{\"text\":\"secret\"}\n".to_owned(), 1),
        (header.replace("\"version\":1", "\"version\":2") + "\n", 1),
        (format!("{header}\n{{\"text\":\"secret\"}}\n"), 2),
        (
            format!("{header}\n{{\"session\":{{\"id\":\"a{{b\"}}}}\n"),
            2,
        ),
        (
            format!("{header}\n{{\"session\":{{\"id\":\"a\",\"ttl_ms\":-1}}}}\n"),
            2,
        ),
        (
            format!("{header}\n{{\"session\":{{\"id\":\"a\"}}}}\n{{\"base64\":\"*\"}}\n"),
            3,
        ),
        (
            format!(
                "{header}\n{{\"session\":{{\"id\":\"a\"}}}}\n{{\"end\":{{\"id\":\"a\",\"elements\":1}}}}\n"
            ),
            3,
        ),
    ] {
        std::fs::write(&file, &text).unwrap();
        let output = moving(
            "import",
            &embedded(&path),
            &["--input", file.to_str().unwrap()],
        );
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains(&format!("line {line} of the input")),
            "{said}"
        );
        assert!(!said.contains("secret"), "{said}");
    }
    let output = moving("import", &embedded(&path), &[]);
    assert_eq!(output.stderr, b"error: the input is empty\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        contents(&Sqlite::open(&path, PREFIX).unwrap())
            .await
            .is_empty()
    );
}

// The doctor.

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_what_is_wrong_and_only_reads() {
    let redis = Redis::start().await;
    let good = r#"{"type": "human", "data": {"content": "secret", "type": "human"}}"#;
    let bad = [
        r#"{"type": "user", "data": {"content": "secret"}}"#,
        r#"{"type": "human", "data": {"content": null}}"#,
        "secret",
    ];
    let push = async |key: &str, element: &str| {
        let _: i64 = redis.command(&["LPUSH", key, element]).await;
    };
    for _ in 0..3 {
        push("message_store:good", good).await;
    }
    push("message_store:bad", good).await;
    for element in bad {
        push("message_store:bad", element).await;
    }
    let mut raw = ::redis::cmd("LPUSH");
    raw.arg("message_store:bytes").arg(b"\xff secret");
    raw.exec_async(&mut redis.client().await.unwrap())
        .await
        .unwrap();
    push("message_store:{user}:1", good).await;
    push(&format!("{PREFIX}{}", "x".repeat(513)), good).await;
    push("message_store:a\nb", good).await;
    push("other:key", "secret").await;
    let _: () = redis
        .command(&["SET", "message_store:text", "secret"])
        .await;
    let _: i64 = redis
        .command(&["EXPIRE", "message_store:good", "5000"])
        .await;
    // Our own keys are no findings.
    let _: i64 = redis
        .command(&["HSET", "{message_store:good}:session", "base", "0"])
        .await;
    let _: i64 = redis
        .command(&["HSET", "{message_store:good}:turns", "running", ""])
        .await;
    let _: i64 = redis
        .command(&["ZADD", "{message_store:}:running", "1", "turn"])
        .await;
    let _: () = redis.command(&["CONFIG", "RESETSTAT"]).await;

    let output = moving("doctor", &on(&redis), &["--json"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    let table = moving("doctor", &on(&redis), &[]);
    assert_eq!(table.status.code(), Some(1));
    for text in [&output.stdout, &output.stderr, &table.stdout, &table.stderr] {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains("secret"), "{text}");
    }

    let statistics: String = redis.command(&["INFO", "commandstats"]).await;
    let harmless = [
        "scan",
        "type",
        "pttl",
        "llen",
        "memory|usage",
        "lrange",
        "ping",
        "info",
        "client|setinfo",
        "hello",
        "select",
        "config|resetstat",
        // Redis 6 counts subcommands together.
        "memory",
        "client",
        "config",
    ];
    for line in statistics
        .lines()
        .filter(|line| line.starts_with("cmdstat_"))
    {
        let name = line["cmdstat_".len()..].split(':').next().unwrap();
        assert!(harmless.contains(&name), "{line}");
    }

    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (name, number) in [
        ("sessions", 6),
        ("messages", 11),
        ("unreadable_messages", 4),
        ("unreadable_sessions", 2),
        ("wrong_type_keys", 1),
        ("brace_keys", 1),
        ("invalid_id_keys", 2),
        ("expiring_sessions", 1),
        ("memory_unknown_sessions", 0),
        ("findings_omitted", 0),
    ] {
        assert_eq!(report[name], number, "{name}: {report:#}");
    }
    assert!(report["memory_bytes_estimate"].as_u64().unwrap() > 500);
    let findings = report["findings"].as_array().unwrap();
    let of = |key: &str| -> Vec<String> {
        let mut found: Vec<_> = findings
            .iter()
            .filter(|finding| finding["key"] == *key)
            .map(|finding| format!("{} {}", finding["position"], finding["reason"]))
            .collect();
        found.sort();
        found
    };
    assert_eq!(
        of("message_store:bad"),
        [
            "2 \"has a `type` that LangChain does not know\"",
            "3 \"has a `content` that is neither text nor a list\"",
            "4 \"is not JSON to Python: a value was expected\"",
        ]
    );
    assert_eq!(of("message_store:bytes"), ["1 \"is not UTF-8\""]);
    assert_eq!(of("message_store:text"), ["null \"holds a string\""]);
    assert!(of("message_store:good").is_empty());
    assert_eq!(findings.len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_says_when_all_is_well_and_when_it_cannot_look() {
    let redis = Redis::start().await;
    let element = r#"{"type": "ai", "data": {"content": "x"}}"#;
    let _: i64 = redis.command(&["LPUSH", "message_store:a", element]).await;
    let output = moving("doctor", &on(&redis), &[]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("All is well.\n"), "{text}");

    assert_eq!(moving("doctor", &[], &[]).status.code(), Some(2));
    let wrong = ["--redis".to_owned(), "ftp://x".to_owned()];
    assert_eq!(moving("doctor", &wrong, &[]).status.code(), Some(2));
    let nobody = ["--redis".to_owned(), "redis://127.0.0.1:1".to_owned()];
    assert_eq!(moving("doctor", &nobody, &[]).status.code(), Some(2));
}

#[test]
fn progress_is_shown_on_a_terminal_and_nowhere_else() {
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = (
        directory.path().join("1.db"),
        directory.path().join("in.jsonl"),
    );
    let header = r#"{"chat_memory_export":{"version":1,"store":"x","key_prefix":"","prefix":""}}"#;
    let text = [
        header,
        r#"{"session":{"id":"a"}}"#,
        r#"{"text":"1"}"#,
        r#"{"end":{"id":"a","elements":1}}"#,
        r#"{"complete":{"sessions":1,"elements":1}}"#,
    ];
    std::fs::write(&file, text.join("\n") + "\n").unwrap();
    let mut program = command(["import", "--database"]);
    program.arg(&path).arg("--input").arg(&file);
    let mut terminal = rexpect::session::spawn_command(program, Some(20_000)).unwrap();
    terminal
        .exp_string("% imported 0 sessions, added 0 messages")
        .unwrap();
    terminal
        .exp_string("imported 1 sessions: 1 messages added, 0 were there already")
        .unwrap();
    terminal.exp_eof().unwrap();

    let output = moving(
        "import",
        &embedded(&path),
        &["--input", file.to_str().unwrap()],
    );
    let said = succeeded(&output);
    assert_eq!(
        said,
        "imported 1 sessions: 0 messages added, 1 were there already\n"
    );
}

#[test]
fn settings_that_cannot_work_are_refused_as_the_server_refuses_them() {
    for (name, args, problem) in [
        ("export", ["--redis", "ftp://x"], "--redis: "),
        ("import", ["--key-prefix", "{x}"], "--key-prefix: "),
        (
            "export",
            ["--redis-timeout-ms", "1"],
            "--redis-timeout-ms: ",
        ),
        ("export", ["--session", "a{b"], "--session: "),
    ] {
        let output = run([name, args[0], args[1]]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(problem), "{said}");
    }
    // A flag wins over the variable of the other store; of two variables, neither does.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("1.db");
    drop(Sqlite::open(&path, PREFIX).unwrap());
    let [flag, file] = embedded(&path);
    let output = command(["export", &flag, &file])
        .env("CHAT_MEMORY_REDIS", "rediss://127.0.0.1:1")
        .env("CHAT_MEMORY_REDIS_CA_FILE", "missing.pem")
        .output();
    succeeded(&output.unwrap());
    let nobody = ["--redis", "redis://127.0.0.1:1"];
    let output = command(["export", nobody[0], nobody[1], "--key-prefix", "{"])
        .env("CHAT_MEMORY_DATABASE", &path)
        .output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(!said.contains("choose one of them"), "{said}");
    let output = command(["export"])
        .env("CHAT_MEMORY_REDIS", nobody[1])
        .env("CHAT_MEMORY_DATABASE", &path)
        .output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains("CHAT_MEMORY_DATABASE): there is"), "{said}");

    for name in ["export", "import", "doctor"] {
        let help = run([name, "--help"]);
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(
            help.contains("Examples:") && help.contains("CHAT_MEMORY_REDIS"),
            "{help}"
        );
    }
}
