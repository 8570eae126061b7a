//! What only the embedded store promises: whose the file is, what others see in it, how writes
//! share commits, what it forgets when, and how it fails. The contract is in `store_contract.rs`.

mod harness;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread::ThreadId;
use std::time::Duration;

use chat_memory::store::sessions::{
    FORK_STEP, Fork, Forked, ListRecent, Look, NOTICED_WITHIN_MS, Seen, Update, Upkeep,
};
use chat_memory::store::sqlite::{OpenError, Options, Sqlite};
use chat_memory::store::turns::{BeginTurn, Chunk, KeepTurn, Lease, Taken, TurnState};
use chat_memory::store::{
    Append, Epoch, Error, List, REQUEST_MEMORY_MS, Result, SessionStore, Store, TOMBSTONE_MS,
    TurnStore,
};
use futures_util::future::{FutureExt as _, join_all};
#[cfg(target_os = "linux")]
use harness::disk::SmallDisk;
use harness::program::{Program, command};
use harness::stores::{
    all, batch, expiry, fill, fresh_session, read_all, request, sequences, session, texts,
};
use harness::turns::{LONG_MS, begin, end, follow, keep, lease, leased, take};
use harness::wait;
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

/// A directory, and the path of a database in it.
fn place() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("chat-memory.db");
    (directory, path)
}

fn open(path: &Path) -> Sqlite {
    Sqlite::open(path, "").unwrap()
}

fn refusal(path: &Path) -> OpenError {
    Sqlite::open(path, "").err().expect("must be refused")
}

/// What another program sees.
fn numbers(path: &Path, sql: &str) -> i64 {
    let db = Connection::open(path).unwrap();
    db.query_row(sql, [], |row| row.get(0)).unwrap()
}

/// What the store does by itself, it does soon.
async fn until_number(path: &Path, sql: &str, number: i64) {
    let is_so = async || (numbers(path, sql) == number).then_some(());
    wait::until(&format!("{sql} gives {number}"), is_so).await;
}

/// Another program that writes: as long as it does, the store waits.
struct OtherWriter(Connection);

impl OtherWriter {
    fn begin(path: &Path) -> Self {
        let db = Connection::open(path).unwrap();
        db.execute_batch("BEGIN IMMEDIATE").unwrap();
        Self(db)
    }

    fn end(self) {
        self.0.execute_batch("ROLLBACK").unwrap();
    }
}

/// Has many appends wait for the writer at the same time, then lets it go on.
async fn append_together(
    store: &Sqlite,
    path: &Path,
    appends: Vec<(&str, Append)>,
) -> Vec<Result<chat_memory::store::Appended>> {
    let other = OtherWriter::begin(path);
    let appends = appends
        .into_iter()
        .map(async |(id, append)| store.append(&session(id), append).await);
    // In this order: when the second future is first polled, the first has queued all its writes.
    // Unconstrained, because Tokio would make it pause on the way.
    let appends = tokio::task::unconstrained(join_all(appends));
    let (answers, ()) = tokio::join!(biased; appends, async { other.end() });
    answers
}

// The file.

#[tokio::test]
async fn a_file_has_one_server_at_a_time() {
    let (_directory, path) = place();
    let store = open(&path);
    let error = refusal(&path);
    assert!(matches!(error, OpenError::InUse { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        format!(
            "{} is in use by another chat-memory server: a file can have only one",
            path.canonicalize().unwrap().display()
        )
    );
    let s = fresh_session();
    fill(&store, &s, 1).await;
    drop(store);

    let store = open(&path);
    assert_eq!(texts(&read_all(&store, &s).await), ["1"]);
}

/// SQLite's locks keep other programs from removing the log under a running store. A process loses
/// them when it closes any descriptor of the file, and a refused open has had one.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_refused_open_leaves_the_running_store_its_locks() {
    use std::os::unix::fs::MetadataExt as _;
    let (_directory, path) = place();
    let store = open(&path);
    fill(&store, &fresh_session(), 1).await;
    let inode = std::fs::metadata(&path).unwrap().ino();
    let look = || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let is_ours = |line: &&str| line.contains("POSIX") && line.contains(&format!(":{inode} "));
        locks.lines().filter(is_ours).count()
    };
    // While others lock and unlock, a reading of that list can miss a line; it invents none.
    let locks = || (0..20).map(|_| look()).max().unwrap_or_default();
    assert!(locks() > 0, "the store holds no lock");
    refusal(&path);
    // All of them would be lost at once; some come and go with the store's own work.
    assert!(locks() > 0, "the store has lost its locks");
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_has_one_server_under_all_its_names() {
    let (directory, path) = place();
    let other_name = directory.path().join("other-name.db");
    std::os::unix::fs::symlink(&path, &other_name).unwrap();
    let _store = open(&path);
    let error = refusal(&other_name);
    assert!(matches!(error, OpenError::InUse { .. }), "{error:?}");
}

#[tokio::test]
async fn a_closed_file_is_one_file() {
    let (directory, path) = place();
    let store = open(&path);
    fill(&store, &fresh_session(), 3).await;
    read_all(&store, &fresh_session()).await;
    drop(store);
    let names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["chat-memory.db"]);
}

#[cfg(unix)]
#[tokio::test]
async fn only_the_owner_may_read_the_file_and_its_log() {
    use std::os::unix::fs::PermissionsExt as _;
    let (directory, path) = place();
    let store = open(&path);
    fill(&store, &fresh_session(), 1).await;
    let mut count = 0;
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        count += 1;
    }
    assert_eq!(count, 3, "the database, the log and its index");
}

#[test]
fn a_missing_directory_is_named() {
    let (directory, _) = place();
    let missing = directory.path().join("missing");
    let error = refusal(&missing.join("chat-memory.db"));
    assert!(
        matches!(&error, OpenError::DirectoryMissing(path) if *path == missing),
        "{error:?}"
    );
    let error = refusal(directory.path());
    assert!(matches!(error, OpenError::IsDirectory(_)), "{error:?}");
}

#[test]
fn a_file_of_another_program_is_refused_and_left_alone() {
    let (_directory, path) = place();
    for contents in [&b"Dear diary, "[..], &[b'x'; 100_000]] {
        std::fs::write(&path, contents).unwrap();
        let error = refusal(&path);
        assert!(matches!(error, OpenError::Foreign { .. }), "{error:?}");
        assert_eq!(std::fs::read(&path).unwrap(), contents);
    }
    std::fs::remove_file(&path).unwrap();

    for application_id in [0, 42] {
        let db = Connection::open(&path).unwrap();
        db.execute_batch("CREATE TABLE IF NOT EXISTS theirs (a)")
            .unwrap();
        db.pragma_update(None, "application_id", application_id)
            .unwrap();
        drop(db);
        let contents = std::fs::read(&path).unwrap();
        let error = refusal(&path);
        assert!(matches!(error, OpenError::Foreign { .. }), "{error:?}");
        assert_eq!(std::fs::read(&path).unwrap(), contents);
    }
}

#[tokio::test]
async fn a_file_of_a_newer_version_is_refused_and_left_alone() {
    let (_directory, path) = place();
    drop(open(&path));
    let version = numbers(&path, "PRAGMA user_version");
    let set_version = |version: i64| {
        let db = Connection::open(&path).unwrap();
        db.pragma_update(None, "user_version", version).unwrap();
    };
    set_version(version + 1);
    let contents = std::fs::read(&path).unwrap();
    let error = refusal(&path);
    assert!(
        matches!(error, OpenError::Newer { found, known, .. }
            if (found, known) == (version + 1, version)),
        "{error:?}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), contents);
    set_version(version);
    open(&path);
}

#[test]
fn an_empty_file_becomes_a_database() {
    let (_directory, path) = place();
    std::fs::write(&path, b"").unwrap();
    drop(open(&path));
    drop(open(&path));
}

/// Version 1 is the first schema alone, as its program left it.
#[tokio::test]
async fn a_file_of_version_1_keeps_its_messages_and_takes_turns() {
    let (_directory, path) = place();
    let db = Connection::open(&path).unwrap();
    db.execute_batch(include_str!("../src/store/sqlite/schema.sql"))
        .unwrap();
    db.pragma_update(None, "application_id", i32::from_be_bytes(*b"CMem"))
        .unwrap();
    db.pragma_update(None, "user_version", 1).unwrap();
    db.execute_batch(
        "INSERT INTO sessions (key, last_sequence) VALUES ('s', 2);
         INSERT INTO messages VALUES (1, 1, CAST('a' AS BLOB)), (1, 2, CAST('b' AS BLOB));",
    )
    .unwrap();
    drop(db);

    let store = open(&path);
    let s = session("s");
    assert_eq!(texts(&read_all(&store, &s).await), ["a", "b"]);
    let turn = begin("t", lease());
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    let ended = store.end_turn(&s, end(turn.key.id, turn.lease.token, &["c"]));
    ended.await.unwrap();
    assert_eq!(texts(&read_all(&store, &s).await), ["a", "b", "c"]);
    assert_eq!(numbers(&path, "PRAGMA user_version"), 5);
}

/// Makes a file as an older program left it: the schemas up to a version, and some sessions.
fn older_file(path: &Path, version: i64) -> Connection {
    let db = Connection::open(path).unwrap();
    let schemas = [
        include_str!("../src/store/sqlite/schema.sql"),
        include_str!("../src/store/sqlite/schema_2.sql"),
        include_str!("../src/store/sqlite/schema_3.sql"),
    ];
    for schema in &schemas[..version as usize] {
        db.execute_batch(schema).unwrap();
    }
    db.pragma_update(None, "application_id", i32::from_be_bytes(*b"CMem"))
        .unwrap();
    db.pragma_update(None, "user_version", version).unwrap();
    db.pragma_update(None, "journal_mode", "WAL").unwrap();
    db
}

#[tokio::test]
async fn a_file_of_version_2_lists_its_sessions() {
    const COUNT: usize = 2_500;
    let (_directory, path) = place();
    let db = older_file(&path, 2);
    db.execute_batch(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {COUNT})
         INSERT INTO sessions (key, last_sequence) SELECT 's' || i, 2 FROM n;
         INSERT INTO messages SELECT number, 1, CAST('a' AS BLOB) FROM sessions;
         INSERT INTO messages SELECT number, 2, CAST('b' AS BLOB) FROM sessions;
         INSERT INTO sessions (key, last_sequence, epoch, forget_ms) VALUES ('gone', 2, 1, 9e15);
         INSERT INTO requests (session, id, fingerprint, first_sequence, count, time_ms, expires_ms)
            VALUES (7, x'01', x'01', 1, 2, 1000, 9000000000000);"
    ))
    .unwrap();
    drop(db);

    let store = open(&path);
    let mut list = ListRecent {
        limit: 100,
        ..ListRecent::default()
    };
    let mut found = Vec::new();
    loop {
        let page = store.list_sessions(list.clone()).await.unwrap();
        found.extend(page.sessions);
        match page.next {
            Some(next) => list.cursor = Some(next),
            None => break,
        }
    }
    // One was written to in its last 24 hours; of the others it is not known when.
    let (first, seen) = &found[0];
    assert_eq!((first.as_str(), seen.count), ("s7", 2));
    assert_eq!(seen.active_ms, Some(9_000_000_000_000 - REQUEST_MEMORY_MS));
    assert_eq!(found.len(), COUNT);
    let others: HashSet<_> = found.iter().map(|(session, _)| session).collect();
    assert_eq!(others.len(), COUNT, "one came twice");
    assert!(found[1..].iter().all(|(_, seen)| seen.active_ms.is_none()));
    let seen = store.look(&session("s1"), Look::default()).await.unwrap();
    assert_eq!(
        (seen.count, seen.first_sequence, seen.last_sequence),
        (2, 1, 2)
    );
}

/// Version 3 had the messages of a session side by side.
#[tokio::test]
async fn a_file_of_version_3_keeps_what_there_is() {
    let (_directory, path) = place();
    let db = older_file(&path, 3);
    // The last session was deleted without its messages, as the `sqlite3` tool does it.
    db.execute_batch(
        "PRAGMA foreign_keys = OFF;
         INSERT INTO sessions (key, last_sequence) VALUES ('s', 3), ('t', 2);
         INSERT INTO messages VALUES (1, 3, CAST('s3' AS BLOB)), (2, 2, CAST('t2' AS BLOB)),
            (2, 1, CAST('t1' AS BLOB)), (1, 1, CAST('s1' AS BLOB)), (9, 1, CAST('lost' AS BLOB));",
    )
    .unwrap();
    drop(db);

    let store = open(&path);
    let (s, t) = (session("s"), session("t"));
    let appended = store.append(&s, batch(["s4"])).await.unwrap();
    assert_eq!(appended.first_sequence, 4);
    assert_eq!(texts(&read_all(&store, &s).await), ["s1", "s3", "s4"]);
    assert_eq!(texts(&read_all(&store, &t).await), ["t1", "t2"]);
    assert_eq!(numbers(&path, "SELECT count(*) FROM history"), 5);
    assert_eq!(numbers(&path, "SELECT count(*) FROM messages"), 5);
    let tables = "SELECT count(*) FROM sqlite_schema WHERE name = 'messages_3'";
    assert_eq!(numbers(&path, tables), 0);
    let checks = "SELECT count(*) FROM sqlite_schema
        JOIN pragma_foreign_key_list(sqlite_schema.name) ON type = 'table'
        WHERE name IN ('messages', 'requests')";
    assert_eq!(numbers(&path, checks), 0);
    // What goes with a session still does.
    let cascades = "SELECT count(*) FROM pragma_foreign_key_list('session_pairs')";
    assert_eq!(numbers(&path, cascades), 1);
    assert_eq!(numbers(&path, "PRAGMA user_version"), 5);
}

/// A file of version 3 with this many messages of 300 bytes, in 200 sessions.
fn large_older_file(path: &Path, messages: i64) {
    let db = older_file(path, 3);
    db.execute_batch(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
         INSERT INTO sessions (key, last_sequence) SELECT 's' || i, {messages} / 200 FROM n;
         WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {messages})
         INSERT INTO messages SELECT i % 200 + 1, i / 200 + 1, CAST(hex(zeroblob(150)) AS BLOB)
         FROM n;"
    ))
    .unwrap();
}

/// The version of a file that nobody has open, and how many messages are in it, all of them whole.
fn version_and_messages(path: &Path) -> (i64, i64) {
    let db = Connection::open(path).unwrap();
    let check: String = db
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(check, "ok");
    let whole = "SELECT count(*) FROM messages WHERE length(element) = 300";
    (numbers(path, "PRAGMA user_version"), numbers(path, whole))
}

#[tokio::test]
async fn a_migration_that_was_killed_is_made_by_the_next_start() {
    const MESSAGES: i64 = 40_000;
    let (_directory, path) = place();
    large_older_file(&path, MESSAGES);
    let log = path.with_extension("db-wal");
    let mut killed = 0;
    // More and more of it is in the log when it is killed.
    for log_bytes in [1 << 10, 1 << 20, 6 << 20] {
        let mut server = command(["--listen", "127.0.0.1:0", "--database"])
            .arg(&path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let has_written = || {
            let written = std::fs::metadata(&log).map_or(0, |log| log.len());
            (written >= log_bytes).then_some(())
        };
        wait::until("the migration is in the log", async || has_written()).await;
        server.kill().unwrap();
        server.wait().unwrap();
        let (version, messages) = version_and_messages(&path);
        assert_eq!(messages, MESSAGES);
        killed += i32::from(version == 3);
    }
    assert!(killed > 0, "it was too quick each time");

    drop(Program::embedded(&path));
    assert_eq!(version_and_messages(&path), (5, MESSAGES));
}

#[tokio::test]
async fn a_migration_that_finds_no_room_says_so_and_leaves_the_file_as_it_is() {
    const MESSAGES: i64 = 10_000;
    let (_directory, path) = place();
    large_older_file(&path, MESSAGES);
    let options = Options {
        size_bytes_max: Some(5 << 20),
        ..Options::default()
    };
    let refusal = Sqlite::open_with(&path, "", options).err().unwrap();
    let text = refusal.to_string();
    assert!(
        text.contains("chat-memory.db") && text.contains("full"),
        "{text}"
    );
    assert_eq!(version_and_messages(&path), (3, MESSAGES));

    let store = open(&path);
    let read = read_all(&store, &session("s200")).await;
    assert_eq!(read.elements.len() as i64, MESSAGES / 200);
    drop(store);
    assert_eq!(version_and_messages(&path), (5, MESSAGES));
}

/// An older server may have it: nobody brings it to this version meanwhile.
#[tokio::test]
async fn a_file_of_an_older_version_can_be_read_as_it_is() {
    for version in [1, 2, 3] {
        let (_directory, path) = place();
        let db = older_file(&path, version);
        db.execute_batch(
            "INSERT INTO sessions (key, last_sequence) VALUES ('s', 2);
             INSERT INTO messages VALUES (1, 1, CAST('a' AS BLOB)), (1, 2, CAST('b' AS BLOB));",
        )
        .unwrap();
        let store = Sqlite::open_reader(&path, "").unwrap();
        let s = session("s");
        assert_eq!(texts(&read_all(&store, &s).await), ["a", "b"]);
        assert_eq!(expiry(&store, &s).await, None);
        let seen = store.look(&s, Look::default()).await.unwrap();
        assert_eq!(seen.count, 2);
        let list = List {
            prefix: String::new(),
            cursor: None,
            limit: 10,
        };
        assert_eq!(store.sessions(list).await.unwrap().sessions, [s]);
        assert_eq!(numbers(&path, "PRAGMA user_version"), version);
    }
}

#[tokio::test]
async fn prefixes_keep_tenants_apart() {
    let (_directory, path) = place();
    let s = session("s");
    let store = Sqlite::open(&path, "a:").unwrap();
    fill(&store, &s, 2).await;
    drop(store);
    let store = Sqlite::open(&path, "b:").unwrap();
    assert_eq!(read_all(&store, &s).await.last_sequence, 0);
    assert_eq!(store.clear(&s).await, Ok(0));
    drop(store);
    let store = Sqlite::open(&path, "a:").unwrap();
    assert_eq!(read_all(&store, &s).await.last_sequence, 2);
}

#[tokio::test]
async fn what_was_cleared_is_not_in_the_file() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = fresh_session();
    let elements = (0..200).map(|number| format!("a secret {number}").repeat(50));
    store.append(&s, batch(elements)).await.unwrap();
    let is_in_file = || {
        let contents = std::fs::read(&path).unwrap();
        contents.windows(8).any(|bytes| bytes == b"a secret")
    };
    drop(store);
    assert!(is_in_file());

    let store = open(&path);
    store.clear(&s).await.unwrap();
    drop(store);
    assert!(!is_in_file());
}

/// The log has what was written until it is emptied.
#[tokio::test]
async fn what_was_cleared_is_soon_not_in_the_log() {
    let (_directory, path) = place();
    let (store, time) = open_with(&path, MINUTE);
    let [cleared, expired, other] = ["cleared", "expired", "other"].map(session);
    let is_in_files = || {
        [path.clone(), path.with_extension("db-wal")]
            .iter()
            .any(|path| {
                let contents = std::fs::read(path).unwrap();
                contents.windows(8).any(|bytes| bytes == b"a secret")
            })
    };
    let until_gone = async |what: &str| {
        wait::until(what, async || (!is_in_files()).then_some(())).await;
    };
    store.append(&cleared, batch(["a secret"])).await.unwrap();
    // Who reads what was before keeps it there.
    let reader = Connection::open(&path).unwrap();
    reader
        .execute_batch("BEGIN; SELECT * FROM messages")
        .unwrap();
    store.clear(&cleared).await.unwrap();
    fill(&store, &other, 1).await;
    assert!(is_in_files());
    drop(reader);
    until_gone("what was cleared is gone").await;

    store.append(&expired, batch(["a secret"])).await.unwrap();
    assert!(is_in_files());
    time.fetch_add(120_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_gone("what has expired is gone").await;
}

#[tokio::test]
async fn what_was_cleared_before_a_crash_is_soon_not_in_the_log_either() {
    let (_directory, path) = place();
    let store = Sqlite::open(&path, "message_store:").unwrap();
    let s = session("s");
    store.append(&s, batch(["a secret"])).await.unwrap();
    // Who reads what was before keeps it there.
    let reader = Connection::open(&path).unwrap();
    reader
        .execute_batch("BEGIN; SELECT * FROM messages")
        .unwrap();
    store.clear(&s).await.unwrap();
    // What a crash leaves.
    let (_left, left) = place();
    for name in ["db", "db-wal"] {
        std::fs::copy(path.with_extension(name), left.with_extension(name)).unwrap();
    }
    let log = left.with_extension("db-wal");
    let is_in_log = || {
        let contents = std::fs::read(&log).unwrap();
        contents.windows(8).any(|bytes| bytes == b"a secret")
    };
    assert!(is_in_log());
    let store = Sqlite::open(&left, "message_store:").unwrap();
    wait::until("what was cleared is gone", async || {
        (!is_in_log()).then_some(())
    })
    .await;
    drop(store);
}

// Other programs.

#[tokio::test]
async fn other_tools_read_the_file_while_the_store_runs() {
    let (_directory, path) = place();
    let store = Sqlite::open(&path, "message_store:").unwrap();
    let elements = [&b"{\"type\": \"human\"}"[..], b"\xff"];
    store.append(&session("s"), batch(elements)).await.unwrap();

    let db = Connection::open(&path).unwrap();
    let mut history = db
        .prepare("SELECT sequence, element FROM history WHERE key = 'message_store:s' LIMIT 1")
        .unwrap();
    let row: (i64, String) = history
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    assert_eq!(row, (1, "{\"type\": \"human\"}".to_owned()));
    let blob: Vec<u8> = db
        .query_row(
            "SELECT element FROM messages JOIN sessions ON session = number
             WHERE key = 'message_store:s' AND sequence = 2",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(blob, b"\xff");
    assert_eq!(numbers(&path, "SELECT last_sequence FROM sessions"), 2);
}

#[tokio::test]
async fn what_other_tools_change_counts() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    fill(&store, &s, 3).await;

    let db = Connection::open(&path).unwrap();
    db.execute_batch(
        "INSERT INTO messages SELECT number, 7, CAST('by hand' AS BLOB) FROM sessions;
         DELETE FROM messages WHERE sequence = 2;",
    )
    .unwrap();
    let page = read_all(&store, &s).await;
    assert_eq!(texts(&page), ["1", "3", "by hand"]);
    assert_eq!(page.last_sequence, 7);
    let last_two = chat_memory::store::Read {
        last: Some(2),
        ..all()
    };
    let page = store.read(&s, last_two).await.unwrap();
    assert_eq!((sequences(&page), page.after), (vec![3, 7], 2));
    let appended = store.append(&s, batch(["next"])).await.unwrap();
    assert_eq!(appended.first_sequence, 8);

    // Without its newest messages, the session still knows where it was.
    db.execute_batch("DELETE FROM messages").unwrap();
    let appended = store.append(&s, batch(["next"])).await.unwrap();
    assert_eq!(appended.first_sequence, 9);
}

#[tokio::test]
async fn a_session_that_other_tools_deleted_does_not_haunt_the_next() {
    let (_directory, path) = place();
    let store = open(&path);
    fill(&store, &session("secret"), 3).await;
    // As the `sqlite3` tool does it: without looking after references.
    let db = Connection::open(&path).unwrap();
    db.execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM sessions;")
        .unwrap();
    fill(&store, &session("next"), 1).await;
    assert_eq!(texts(&read_all(&store, &session("next")).await), ["1"]);
}

#[tokio::test]
async fn a_file_that_was_moved_away_is_not_written_to() {
    let (directory, path) = place();
    let store = open(&path);
    let s = fresh_session();
    fill(&store, &s, 1).await;
    let mut reachable = store.reachable();
    std::fs::rename(&path, directory.path().join("moved.db")).unwrap();

    let refused = store.append(&s, batch(["lost"])).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    assert!(!*reachable.borrow_and_update());
    let refused = store.append(&s, batch(["lost"])).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let refused = store.read(&s, all()).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
}

// Commits.

#[tokio::test]
async fn appends_that_wait_share_a_commit() {
    const COUNT: usize = 200;
    let (_directory, path) = place();
    let store = open(&path);
    let before = store.commits();
    let names: Vec<_> = (0..COUNT)
        .map(|number| format!("s{}", number % 7))
        .collect();
    let appends = names.iter().map(|name| (&**name, batch(["x"]))).collect();
    let answers = append_together(&store, &path, appends).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(store.commits() - before, 1);
    assert_eq!(numbers(&path, "SELECT count(*) FROM messages"), 200);
}

/// Each page that a commit changes is written whole, to the log and from there to the file.
#[tokio::test]
async fn appends_to_many_sessions_change_few_pages() {
    const SESSIONS: usize = 64;
    // So few that the log is not emptied meanwhile.
    const COMMITS: usize = 12;
    let (_directory, path) = place();
    let store = open(&path);
    let names: Vec<_> = (0..SESSIONS).map(|number| format!("s{number}")).collect();
    for _ in 0..COMMITS {
        let element = || batch(["x".repeat(400)]);
        let appends = names.iter().map(|name| (&**name, element())).collect();
        let answers = append_together(&store, &path, appends).await;
        assert!(answers.iter().all(Result::is_ok));
    }
    let log = std::fs::metadata(path.with_extension("db-wal")).unwrap();
    let pages = log.len() as usize / 4096;
    assert!(
        pages <= SESSIONS * COMMITS / 2,
        "{pages} pages, of which messages would fill {}",
        SESSIONS * COMMITS / 8
    );
}

/// From the writing thread, each answer would wake the runtime by itself.
#[tokio::test]
async fn answers_are_given_by_the_runtime() {
    #[derive(Default)]
    struct Woken(Mutex<Vec<ThreadId>>);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.lock().unwrap().push(std::thread::current().id());
        }
    }

    const COUNT: usize = 20;
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    let other = OtherWriter::begin(&path);
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let append = |_| store.append(&s, batch(["x"]));
    let mut appends: Vec<_> = (0..COUNT).map(append).collect();
    for append in &mut appends {
        let polled = append.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
    }
    other.end();
    // Answers come in the order of the calls.
    store.append(&s, batch(["x"])).await.unwrap();
    for append in appends {
        append.now_or_never().expect("not answered").unwrap();
    }
    let here = std::thread::current().id();
    assert_eq!(*woken.0.lock().unwrap(), [here; COUNT]);
}

#[tokio::test]
async fn a_refused_append_leaves_the_others_of_its_commit_alone() {
    let (_directory, path) = place();
    let store = open(&path);
    let before = store.commits();
    let with_key = |text: &'static str, body: &str| Append {
        request: request("r", body),
        ..batch([text])
    };
    let appends = vec![
        ("s", batch(["a"])),
        (
            "s",
            Append {
                expected_last_sequence: Some(7),
                ..batch(["never"])
            },
        ),
        (
            "s",
            Append {
                expected_epoch: Some(Epoch(1)),
                ..batch(["never"])
            },
        ),
        ("s", with_key("b", "b")),
        ("s", with_key("b", "b")),
        ("s", with_key("never", "never")),
        (
            "s",
            Append {
                expected_last_sequence: Some(2),
                ..batch(["c"])
            },
        ),
    ];
    let answers = append_together(&store, &path, appends).await;
    assert_eq!(store.commits() - before, 1);
    let summary: Vec<_> = answers
        .into_iter()
        .map(|answer| answer.map(|appended| (appended.first_sequence, appended.repeated)))
        .collect();
    let (expected, actual) = (7, 1);
    assert_eq!(
        summary,
        [
            Ok((1, false)),
            Err(Error::SequenceMismatch { expected, actual }),
            Err(Error::Cleared),
            Ok((2, false)),
            Ok((2, true)),
            Err(Error::RequestReused),
            Ok((3, false)),
        ]
    );
    assert_eq!(
        texts(&read_all(&store, &session("s")).await),
        ["a", "b", "c"]
    );
}

/// Makes SQLite fail in the middle of an append, as a defect or a full disk would.
fn fail_on_element(path: &Path, how: &str) {
    let db = Connection::open(path).unwrap();
    db.execute_batch(&format!(
        "CREATE TRIGGER fail BEFORE INSERT ON messages WHEN NEW.element = CAST('fail' AS BLOB)
         BEGIN SELECT RAISE({how}, 'for the test'); END"
    ))
    .unwrap();
}

#[tokio::test]
async fn an_append_that_fails_half_way_is_undone_alone() {
    let (_directory, path) = place();
    let store = open(&path);
    fail_on_element(&path, "FAIL");
    let appends = vec![
        ("s", batch(["a"])),
        ("s", batch(["half", "fail"])),
        ("new", batch(["half", "fail"])),
        ("s", batch(["b"])),
    ];
    let answers = append_together(&store, &path, appends).await;
    let is_ok: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(is_ok, [true, false, false, true]);
    assert_eq!(texts(&read_all(&store, &session("s")).await), ["a", "b"]);
    assert_eq!(numbers(&path, "SELECT count(*) FROM sessions"), 1);
    assert_eq!(numbers(&path, "SELECT count(*) FROM requests"), 2);
}

#[tokio::test]
async fn a_transaction_that_fails_is_an_error_for_all_in_it() {
    let (_directory, path) = place();
    let store = open(&path);
    fail_on_element(&path, "ROLLBACK");
    let appends = vec![
        ("s", batch(["a"])),
        ("s", batch(["fail"])),
        ("s", batch(["b"])),
    ];
    let answers = append_together(&store, &path, appends).await;
    for answer in answers {
        assert!(answer.is_err());
        assert!(!matches!(answer, Err(Error::OutcomeUnknown(_))));
    }
    assert_eq!(numbers(&path, "SELECT count(*) FROM sessions"), 0);
    fill(&store, &session("s"), 2).await;
    assert_eq!(texts(&read_all(&store, &session("s")).await), ["1", "2"]);
}

// Time.

/// A store whose clock stands still until it is set.
fn open_with_clock(path: &Path) -> (Sqlite, Arc<AtomicI64>) {
    open_with(path, Upkeep::default())
}

fn open_with(path: &Path, upkeep: Upkeep) -> (Sqlite, Arc<AtomicI64>) {
    let time = Arc::new(AtomicI64::new(1_763_910_000_000));
    let options = Options {
        clock: {
            let time = time.clone();
            Arc::new(move || time.load(Ordering::SeqCst))
        },
        upkeep,
        ..Options::default()
    };
    let store = Sqlite::open_with(path, "", options).unwrap();
    (store, time)
}

#[tokio::test]
async fn a_request_is_remembered_for_a_day() {
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let s = session("s");
    let append = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    store.append(&s, append.clone()).await.unwrap();

    time.fetch_add(REQUEST_MEMORY_MS - 1, Ordering::SeqCst);
    let other = Append {
        request: request("r", "other"),
        ..batch(["other"])
    };
    let reused = store.append(&s, other.clone()).await;
    assert_eq!(reused, Err(Error::RequestReused));
    assert!(store.append(&s, append.clone()).await.unwrap().repeated);

    time.fetch_add(1, Ordering::SeqCst);
    assert!(!store.append(&s, other.clone()).await.unwrap().repeated);
    let repeated = store.append(&s, other).await.unwrap();
    assert_eq!((repeated.first_sequence, repeated.repeated), (2, true));
}

#[tokio::test]
async fn forgotten_requests_leave_the_file_in_bounded_steps() {
    const COUNT: usize = 1_200;
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let s = session("s");
    join_all((0..COUNT).map(async |_| store.append(&s, batch(["x"])).await.unwrap())).await;
    let requests = "SELECT count(*) FROM requests";
    assert_eq!(numbers(&path, requests), COUNT as i64);

    let before = store.commits();
    time.fetch_add(REQUEST_MEMORY_MS, Ordering::SeqCst);
    fill(&store, &s, 1).await;
    until_number(&path, requests, 1).await;
    // One of its own, and three of 500 rows at most.
    assert_eq!(store.commits() - before, 4);
    assert_eq!(read_all(&store, &s).await.elements.len(), COUNT + 1);
}

#[tokio::test]
async fn requests_of_a_clock_that_was_ahead_do_not_keep_the_others() {
    const WEEK_MS: i64 = 7 * 24 * 3_600_000;
    const AHEAD: usize = 600;
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let s = session("s");
    time.fetch_add(WEEK_MS, Ordering::SeqCst);
    join_all((0..AHEAD).map(async |_| store.append(&s, batch(["x"])).await.unwrap())).await;
    time.fetch_sub(WEEK_MS, Ordering::SeqCst);
    for _ in 0..10 {
        fill(&store, &s, 1).await;
    }
    time.fetch_add(REQUEST_MEMORY_MS, Ordering::SeqCst);
    fill(&store, &s, 1).await;
    until_number(&path, "SELECT count(*) FROM requests", AHEAD as i64 + 1).await;
}

#[tokio::test]
async fn a_cleared_session_is_forgotten_after_a_month() {
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let [cleared, used, kept] = ["cleared", "used", "kept"].map(session);
    for session in [&cleared, &used, &kept] {
        fill(&store, session, 3).await;
    }
    store.clear(&cleared).await.unwrap();
    store.clear(&used).await.unwrap();
    fill(&store, &used, 1).await;

    let a_while = |ms| time.fetch_add(ms, Ordering::SeqCst);
    a_while(TOMBSTONE_MS - 1);
    fill(&store, &kept, 1).await;
    assert_eq!(read_all(&store, &cleared).await.last_sequence, 3);
    // Looked for once a minute.
    a_while(60_000);
    fill(&store, &kept, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 2).await;
    let page = read_all(&store, &cleared).await;
    assert_eq!((page.last_sequence, page.epoch), (0, Epoch(0)));
    assert_eq!(
        numbers(&path, "SELECT count(forget_ms) FROM sessions"),
        0,
        "what has messages again is not looked at again"
    );
    assert_eq!(read_all(&store, &used).await.last_sequence, 4);
    assert_eq!(texts(&read_all(&store, &used).await), ["1"]);
    fill(&store, &cleared, 1).await;
    assert_eq!(sequences(&read_all(&store, &cleared).await), [1]);
}

#[tokio::test]
async fn the_clear_of_a_session_without_messages_is_remembered_for_an_hour() {
    const HOUR_MS: i64 = 3_600_000;
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let [s, other] = ["s", "other"].map(session);
    store.clear(&s).await.unwrap();
    time.fetch_add(HOUR_MS - 1, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    assert_eq!(read_all(&store, &s).await.epoch, Epoch(1));
    // Looked for once a minute.
    time.fetch_add(60_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 1).await;
    assert_eq!(read_all(&store, &s).await.epoch, Epoch(0));
}

// Turns.

/// Adds chunks to the log of a running turn.
async fn say(store: &Sqlite, s: &chat_memory::message::SessionId, turn: &BeginTurn, count: u32) {
    for index in 0..count {
        let chunk = Some(Chunk {
            index,
            bytes: format!("a secret {index}").into(),
        });
        let keep = KeepTurn {
            chunk,
            ..keep(turn.key.id, turn.lease)
        };
        store.keep_turn(s, keep).await.unwrap();
    }
}

fn rows_of_turns(path: &Path) -> [i64; 3] {
    ["turns", "turn_chunks", "turn_line"]
        .map(|table| numbers(path, &format!("SELECT count(*) FROM {table}")))
}

/// A file has one server: whoever held a lease is gone when the next one opens it.
#[tokio::test]
async fn leases_end_when_the_file_is_opened_anew() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    let turn = begin("t", lease());
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    say(&store, &s, &turn, 2).await;
    assert_eq!(store.orphaned_turns(10).await.unwrap(), []);
    let held = store.take_turn(&s, take(turn.key.id, lease())).await;
    assert_eq!(held, Ok(Taken::Held));
    drop(store);

    let store = open(&path);
    let orphans = store.orphaned_turns(10).await.unwrap();
    assert_eq!(orphans, [(s.clone(), turn.key.id)]);
    let taken = store.take_turn(&s, take(turn.key.id, lease())).await;
    let Ok(Taken::Leased(taken)) = taken else {
        panic!("not taken: {taken:?}");
    };
    assert_eq!((taken.attempt, taken.next_chunk), (2, 2));
    assert_eq!(taken.request, turn.request);
    let late = store.keep_turn(&s, keep(turn.key.id, turn.lease)).await;
    assert_eq!(late, Err(Error::LeaseLost));
}

#[tokio::test]
async fn orphans_of_other_prefixes_do_not_crowd_out_ours() {
    let (_directory, path) = place();
    for prefix in ["other:", "ours:"] {
        let store = Sqlite::open(&path, prefix).unwrap();
        for id in ["1", "2", "3"] {
            store
                .begin_turn(&session(id), begin("t", lease()))
                .await
                .unwrap();
        }
    }
    let store = Sqlite::open(&path, "ours:").unwrap();
    let orphans = store.orphaned_turns(2).await.unwrap();
    assert_eq!(orphans.len(), 2);
    assert_eq!(store.orphaned_turns(10).await.unwrap().len(), 3);
}

#[tokio::test]
async fn clear_leaves_no_row_of_a_turn() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    let turn = begin("t", lease());
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    say(&store, &s, &turn, 3).await;
    let waiting = BeginTurn {
        waits: true,
        ..begin("next", lease())
    };
    store.begin_turn(&s, waiting).await.unwrap();
    assert_eq!(rows_of_turns(&path), [1, 3, 1]);

    store.clear(&s).await.unwrap();
    assert_eq!(rows_of_turns(&path), [0, 0, 0]);
    assert_eq!(store.follow_turn(&s, follow(turn.key.id)).await, Ok(None));
    drop(store);
    let contents = std::fs::read(&path).unwrap();
    assert!(!contents.windows(8).any(|bytes| bytes == b"a secret"));
}

#[tokio::test]
async fn forgotten_turns_leave_the_file_in_bounded_steps() {
    const CHUNKS: u32 = 600;
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let [s, other] = ["s", "other"].map(session);
    let turn = begin("t", lease());
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    say(&store, &s, &turn, CHUNKS).await;
    let end = end(turn.key.id, turn.lease.token, &["answer"]);
    store.end_turn(&s, end).await.unwrap();

    time.fetch_add(LONG_MS - 1, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    assert_eq!(rows_of_turns(&path), [1, i64::from(CHUNKS), 0]);
    let followed = store.follow_turn(&s, follow(turn.key.id)).await.unwrap();
    let state = followed.unwrap().state;
    assert!(matches!(state, TurnState::Completed { .. }), "{state:?}");

    // Looked for once a minute.
    let before = store.commits();
    time.fetch_add(60_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_number(&path, "SELECT count(*) FROM turns", 0).await;
    // One of its own, and two of 500 rows at most.
    assert_eq!(store.commits() - before, 3);
    assert_eq!(rows_of_turns(&path), [0, 0, 0]);
    assert_eq!(texts(&read_all(&store, &s).await), ["answer"]);
}

/// A session that only ever had a turn goes with it, and who waited there is no hindrance.
#[tokio::test]
async fn a_session_without_messages_stays_as_long_as_its_turns() {
    const WEEK_MS: i64 = 7 * 24 * 3_600_000;
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let [s, other] = ["s", "other"].map(session);
    let long = Lease {
        retention_ms: WEEK_MS,
        ..lease()
    };
    store.begin_turn(&s, begin("t", long)).await.unwrap();
    let waiting = BeginTurn {
        waits: true,
        ..begin("next", lease())
    };
    store.begin_turn(&s, waiting).await.unwrap();
    let forget_ms = numbers(&path, "SELECT forget_ms FROM turns");
    assert_eq!(numbers(&path, "SELECT forget_ms FROM sessions"), forget_ms);

    time.store(forget_ms - 60_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    assert_eq!(rows_of_turns(&path), [1, 0, 1]);
    time.store(forget_ms, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 1).await;
    assert_eq!(rows_of_turns(&path), [0, 0, 0]);
    fill(&store, &s, 1).await;
    assert_eq!(sequences(&read_all(&store, &s).await), [1]);
}

/// Else a turn could show what another session's said.
#[tokio::test]
async fn a_turn_that_other_tools_deleted_does_not_haunt_the_next() {
    let (_directory, path) = place();
    let store = open(&path);
    let turn = begin("t", lease());
    let secret = session("secret");
    leased(store.begin_turn(&secret, turn.clone()).await.unwrap());
    say(&store, &secret, &turn, 3).await;
    // As the `sqlite3` tool does it: without looking after references.
    let db = Connection::open(&path).unwrap();
    db.execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM turns;")
        .unwrap();

    let s = session("next");
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    say(&store, &s, &turn, 1).await;
    let followed = store.follow_turn(&s, follow(turn.key.id)).await.unwrap();
    assert_eq!(followed.unwrap().chunks, ["a secret 0"]);
}

// Sessions.

const MINUTE: Upkeep = Upkeep {
    ttl_ms: Some(60_000),
    reads_extend: false,
    elements_max: None,
};

#[tokio::test]
async fn an_expired_session_leaves_the_file_in_bounded_steps() {
    let (_directory, path) = place();
    let (store, time) = open_with(&path, MINUTE);
    let [s, other] = ["s", "other"].map(session);
    let turn = begin("t", lease());
    leased(store.begin_turn(&s, turn.clone()).await.unwrap());
    say(&store, &s, &turn, 3).await;
    let end = end(turn.key.id, turn.lease.token, &["answer"]);
    store.end_turn(&s, end).await.unwrap();
    let elements = (0..1_200).map(|number| format!("a secret {number}"));
    store.append(&s, batch(elements)).await.unwrap();
    let metadata = Some([("a".to_owned(), "b".to_owned())].into());
    let said = Update {
        metadata,
        ..Update::default()
    };
    store.update_session(&s, said).await.unwrap().unwrap();

    // To the millisecond.
    time.fetch_add(59_999, Ordering::SeqCst);
    assert_eq!(read_all(&store, &s).await.elements.len(), 1_201);
    time.fetch_add(1, Ordering::SeqCst);
    assert_eq!(read_all(&store, &s).await.elements.len(), 0);
    // Looked for once a minute, and a while after whoever waits was told.
    let before = store.commits();
    time.fetch_add(60_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 1).await;
    // One of its own, and three of 500 rows at most.
    assert_eq!(store.commits() - before, 4);
    assert_eq!(numbers(&path, "SELECT count(*) FROM messages"), 1);
    assert_eq!(rows_of_turns(&path), [0, 0, 0]);
    assert_eq!(numbers(&path, "SELECT count(*) FROM session_pairs"), 0);
    assert_eq!(numbers(&path, "SELECT count(*) FROM requests"), 1);
    drop(store);
    let contents = std::fs::read(&path).unwrap();
    assert!(!contents.windows(8).any(|bytes| bytes == b"a secret"));
}

/// What goes is overwritten, in the log first: so much at a time that others can write meanwhile.
#[tokio::test]
async fn large_messages_that_expire_leave_the_file_in_bounded_steps() {
    let (_directory, path) = place();
    let (store, time) = open_with(&path, MINUTE);
    let [s, other] = ["s", "other"].map(session);
    for _ in 0..12 {
        let element = vec![b'x'; 2 << 20];
        store.append(&s, batch([element])).await.unwrap();
    }
    let before = store.commits();
    time.fetch_add(120_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 1).await;
    // One of its own, and six of 4 MiB; one more finds that no more is left.
    assert_eq!(store.commits() - before, 8);
}

/// Also after the last write, and from the start.
#[tokio::test]
async fn what_has_expired_goes_although_nobody_writes() {
    let (_directory, path) = place();
    let (store, _) = open_with(&path, MINUTE);
    let s = session("s");
    store.append(&s, batch(vec!["x"; 1_200])).await.unwrap();
    drop(store);
    let options = Options {
        clock: Arc::new(|| 1_763_910_120_000),
        ..Options::default()
    };
    let _store = Sqlite::open_with(&path, "", options).unwrap();
    until_number(&path, "SELECT count(*) FROM sessions", 0).await;
    assert_eq!(numbers(&path, "SELECT count(*) FROM messages"), 0);
}

/// Deleting takes room in the log at first.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn writes_go_on_and_what_has_expired_goes_on_a_disk_that_is_nearly_full() {
    let Some(disk) = SmallDisk::mount("40m") else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let path = disk.path().join("chat-memory.db");
    let (store, _) = open_with(&path, MINUTE);
    let [s, other] = ["s", "other"].map(session);
    for _ in 0..14 {
        let element = vec![b'x'; 1 << 20];
        store.append(&s, batch([element])).await.unwrap();
    }
    drop(store);
    // So that 6 MiB are left.
    std::fs::write(disk.path().join("filler"), vec![0; 19 << 20]).unwrap();
    let (store, time) = open_with(&path, MINUTE);
    // A minute after each try that failed.
    let expired = async || {
        time.fetch_add(60_000, Ordering::SeqCst);
        fill(&store, &other, 1).await;
        let rows = "SELECT count(*) FROM messages WHERE length(element) > 1000";
        (numbers(&path, rows) == 0).then_some(())
    };
    wait::until("what has expired is gone", expired).await;
}

/// Else what is left of it would be seen.
#[tokio::test]
async fn a_clock_that_is_set_back_brings_back_no_part_of_a_session() {
    let (_directory, path) = place();
    let (store, time) = open_with(&path, MINUTE);
    let [s, other] = ["s", "other"].map(session);
    store.append(&s, batch(vec!["x"; 1_200])).await.unwrap();
    time.fetch_add(120_000, Ordering::SeqCst);
    fill(&store, &other, 1).await;
    let rows = "SELECT count(*) <= 701 FROM messages";
    until_number(&path, rows, 1).await;
    time.fetch_sub(120_000, Ordering::SeqCst);
    assert_eq!(read_all(&store, &s).await.elements.len(), 0);
    let seen = store.look(&s, Look::default()).await.unwrap();
    assert_eq!(seen, Seen::default());
}

#[tokio::test]
async fn a_session_that_starts_anew_shows_nothing_of_the_old_one() {
    let (_directory, path) = place();
    let (store, time) = open_with(&path, MINUTE);
    let s = session("s");
    store.append(&s, batch(vec!["old"; 1_200])).await.unwrap();
    time.fetch_add(60_000, Ordering::SeqCst);
    for number in 1..=6 {
        let appended = store.append(&s, batch(["new"])).await.unwrap();
        assert_eq!(appended.first_sequence, number);
        let held = texts(&read_all(&store, &s).await);
        assert_eq!(held, vec!["new"; number as usize]);
        let list = List {
            prefix: String::new(),
            cursor: None,
            limit: 10,
        };
        let page = store.sessions(list).await.unwrap();
        assert_eq!((page.sessions, page.unusable), (vec![s.clone()], 0));
        time.fetch_add(30_000, Ordering::SeqCst);
    }
    assert_eq!(numbers(&path, "SELECT count(*) FROM sessions"), 1);
}

#[tokio::test]
async fn a_read_is_a_write_once_in_a_while_only() {
    let (_directory, path) = place();
    let upkeep = Upkeep {
        reads_extend: true,
        ..MINUTE
    };
    let (store, time) = open_with(&path, upkeep);
    let s = session("s");
    fill(&store, &s, 1).await;
    let before = store.commits();
    for _ in 0..100 {
        read_all(&store, &s).await;
        time.fetch_add(60, Ordering::SeqCst);
    }
    assert_eq!(store.commits(), before);
    // A tenth of its life is gone, and it is not more than that behind.
    time.fetch_add(1, Ordering::SeqCst);
    read_all(&store, &s).await;
    fill(&store, &session("other"), 1).await;
    let expires_ms = expiry(&store, &s).await.unwrap();
    assert_eq!(expires_ms, time.load(Ordering::SeqCst) + 60_000);
}

/// The elements of a session that was never trimmed go a part at a time: a write is not held up.
#[tokio::test]
async fn a_session_that_has_far_too_much_is_trimmed_by_its_next_writes() {
    let (_directory, path) = place();
    let s = session("s");
    let elements = (0..2_500).map(|number| match number % 2 {
        0 => r#"{"type": "human", "data": {}}"#,
        _ => r#"{"type": "ai", "data": {}}"#,
    });
    let store = open(&path);
    store.append(&s, batch(elements)).await.unwrap();
    drop(store);
    let upkeep = Upkeep {
        elements_max: Some(100),
        ..Upkeep::default()
    };
    let (store, _) = open_with(&path, upkeep);
    let mut counts = Vec::new();
    for _ in 0..4 {
        store.append(&s, batch(["x"])).await.unwrap();
        let seen = store.look(&s, Look::default()).await.unwrap();
        assert_eq!(read_all(&store, &s).await.elements.len() as i64, seen.count);
        counts.push(seen.count);
    }
    assert_eq!(counts, [1_503, 506, 99, 100]);
}

#[tokio::test]
async fn other_writes_go_in_between_the_steps_of_a_fork() {
    let (_directory, path) = place();
    let store = open(&path);
    let [s, copy, other] = ["s", "copy", "other"].map(session);
    let count = 4 * FORK_STEP;
    store.append(&s, batch(vec!["x"; count])).await.unwrap();
    let before = store.commits();
    let fork = Fork {
        to: copy.clone(),
        through: None,
    };
    let forked = store.fork(&s, fork);
    let write = async {
        fill(&store, &other, 1).await;
        // It was not held up until the whole is there.
        let seen = store.look(&copy, Look::default()).await.unwrap();
        assert_eq!(seen.count, 0);
    };
    let (forked, ()) = tokio::join!(biased; forked, write);
    assert!(matches!(forked, Ok(Forked::Done(_))), "{forked:?}");
    assert!(
        store.commits() - before >= 5,
        "{}",
        store.commits() - before
    );
}

#[tokio::test]
async fn what_a_crash_leaves_of_a_fork_is_seen_by_nobody_and_deleted() {
    let (_directory, path) = place();
    let (store, time) = open_with_clock(&path);
    let s = session("s");
    store
        .append(&s, batch(vec!["x"; 3 * FORK_STEP]))
        .await
        .unwrap();
    // A fork whose caller goes away after its first steps.
    let fork = Fork {
        to: session("copy"),
        through: None,
    };
    let mut forked = Box::pin(store.fork(&s, fork));
    let rows = || numbers(&path, "SELECT count(*) FROM messages");
    let steps = async {
        while rows() <= 3 * FORK_STEP as i64 {
            assert!((&mut forked).now_or_never().is_none(), "it has ended");
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(harness::wait::LIMIT, steps)
        .await
        .expect("no step was made");
    drop(forked);
    drop(store);

    let (store, _) = open_with_clock(&path);
    let list = ListRecent {
        limit: 10,
        ..ListRecent::default()
    };
    assert_eq!(store.list_sessions(list).await.unwrap().sessions.len(), 1);
    let list = List {
        prefix: String::new(),
        cursor: None,
        limit: 10,
    };
    let page = store.sessions(list).await.unwrap();
    assert_eq!((page.sessions, page.unusable), (vec![s.clone()], 0));
    time.fetch_add(60_000, Ordering::SeqCst);
    fill(&store, &s, 1).await;
    until_number(&path, "SELECT count(*) FROM sessions", 1).await;
    assert_eq!(rows(), 3 * FORK_STEP as i64 + 1);
}

#[tokio::test]
async fn the_list_keeps_to_its_prefix() {
    let (_directory, path) = place();
    let metadata = || Some([("a".to_owned(), "b".to_owned())].into());
    for prefix in ["a:", "b:", ""] {
        let store = Sqlite::open(&path, prefix).unwrap();
        fill(&store, &session("s"), 1).await;
        let said = Update {
            metadata: metadata(),
            ..Update::default()
        };
        store.update_session(&session("s"), said).await.unwrap();
    }
    let store = Sqlite::open(&path, "a:").unwrap();
    for metadata in [None, metadata()] {
        let list = ListRecent {
            metadata: metadata.unwrap_or_default(),
            limit: 10,
            ..ListRecent::default()
        };
        let page = store.list_sessions(list).await.unwrap();
        let found: Vec<_> = page.sessions.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(found, ["s"]);
    }
}

#[tokio::test]
async fn bells_ring_for_what_other_tools_change() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    fill(&store, &s, 1).await;
    let mut bell = store.bell(&s);
    let db = Connection::open(&path).unwrap();
    for sequence in 2..4 {
        // What it rings for at first, it rings for without knowing.
        while tokio::time::timeout(Duration::from_millis(NOTICED_WITHIN_MS), bell.rung())
            .await
            .is_ok()
        {}
        let add = "INSERT INTO messages SELECT number, ?1, CAST('by hand' AS BLOB) FROM sessions";
        db.execute(add, [sequence]).unwrap();
        tokio::time::timeout(harness::wait::LIMIT, bell.rung())
            .await
            .expect("no ring");
        assert_eq!(read_all(&store, &s).await.last_sequence, sequence);
    }
}

#[tokio::test]
async fn a_store_with_bells_closes_its_file() {
    let (directory, path) = place();
    let store = open(&path);
    let s = session("s");
    let bell = store.bell(&s);
    fill(&store, &s, 1).await;
    drop(store);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    drop(bell);
}

/// Those who look with SQLite's own tools see neither what is gone nor what is not there yet.
#[tokio::test]
async fn the_view_for_people_shows_what_there_is() {
    let (_directory, path) = place();
    let store = open(&path);
    fill(&store, &session("s"), 2).await;
    fill(&store, &session("expired"), 2).await;
    assert_eq!(store.expire(&session("expired"), 1_000).await, Ok(true));
    let db = Connection::open(&path).unwrap();
    db.execute_batch(
        "INSERT INTO sessions (key, last_sequence) VALUES (char(1) || 'fork', 0);
         INSERT INTO messages SELECT number, 1, x'61' FROM sessions WHERE key = char(1) || 'fork';",
    )
    .unwrap();
    assert_eq!(numbers(&path, "SELECT count(*) FROM history"), 2);
    assert_eq!(
        numbers(&path, "SELECT count(*) FROM history WHERE key = 's'"),
        2
    );
}

// Failures.

#[tokio::test]
async fn a_write_that_cannot_begin_in_time_is_not_made() {
    let (_directory, path) = place();
    let options = Options {
        call_time_max: Duration::from_millis(50),
        ..Options::default()
    };
    let store = Sqlite::open_with(&path, "", options).unwrap();
    let other = OtherWriter::begin(&path);
    let s = session("s");
    let refused = store.append(&s, batch(["late"])).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let refused = store.clear(&s).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    // Reads go on meanwhile, and so they do when the other program is done.
    assert_eq!(read_all(&store, &s).await.last_sequence, 0);
    other.end();
    drop(store);

    let store = open(&path);
    assert_eq!(read_all(&store, &s).await.last_sequence, 0);
}

#[tokio::test]
async fn a_write_whose_caller_went_away_before_it_began_is_not_made() {
    let (_directory, path) = place();
    let store = open(&path);
    let s = session("s");
    let other = OtherWriter::begin(&path);
    let append = store.append(&s, batch(["dropped"])).now_or_never();
    assert_eq!(append, None);
    other.end();
    fill(&store, &s, 1).await;
    assert_eq!(texts(&read_all(&store, &s).await), ["1"]);
}

#[tokio::test]
async fn a_write_that_does_not_end_in_time_may_be_repeated() {
    let (_directory, path) = place();
    // The writer looks at the clock inside its transaction; there it is held up.
    let (closed, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let options = Options {
        clock: {
            let path = path.clone();
            Arc::new(move || {
                let other = Connection::open(&path).unwrap();
                other.busy_timeout(Duration::ZERO).unwrap();
                if other.execute_batch("BEGIN IMMEDIATE").is_err() {
                    // Returns when the other end is dropped.
                    let _ = gate.lock().unwrap().recv();
                }
                1_763_910_000_000
            })
        },
        call_time_max: Duration::from_secs(1),
        ..Options::default()
    };
    let store = Sqlite::open_with(&path, "", options).unwrap();
    // Opens before the store is dropped, which waits for its writer, also if the test fails.
    let closed = closed;
    let s = session("s");
    let append = Append {
        request: request("r", "a"),
        ..batch(["a"])
    };
    let unknown = store.append(&s, append.clone()).await;
    assert!(
        matches!(unknown, Err(Error::OutcomeUnknown(_))),
        "{unknown:?}"
    );
    drop(closed);
    let repeated = store.append(&s, append).await.unwrap();
    assert!(repeated.repeated);
    assert_eq!(texts(&read_all(&store, &s).await), ["a"]);
}

#[tokio::test]
async fn a_defect_in_the_writer_is_not_silent() {
    let (_directory, path) = place();
    let is_broken = Arc::new(AtomicBool::new(false));
    let options = Options {
        clock: {
            let is_broken = is_broken.clone();
            Arc::new(move || {
                assert!(!is_broken.load(Ordering::SeqCst), "for the test");
                1_763_910_000_000
            })
        },
        ..Options::default()
    };
    let store = Sqlite::open_with(&path, "", options).unwrap();
    let s = session("s");
    fill(&store, &s, 1).await;
    assert!(*store.reachable().borrow());

    is_broken.store(true, Ordering::SeqCst);
    let appends = (0..5).map(async |_| store.append(&s, batch(["x"])).await);
    for answer in join_all(appends).await {
        assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
    }
    assert!(!*store.reachable().borrow());
    is_broken.store(false, Ordering::SeqCst);
    let refused = store.clear(&s).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let refused = store.read(&s, all()).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    drop(store);

    assert_eq!(texts(&read_all(&open(&path), &s).await), ["1"]);
}

#[tokio::test]
async fn a_full_store_says_so_and_goes_on_when_there_is_room() {
    let (_directory, path) = place();
    let options = Options {
        size_bytes_max: Some(1 << 20),
        ..Options::default()
    };
    let store = Sqlite::open_with(&path, "", options).unwrap();
    let [small, large] = ["small", "large"].map(session);
    fill(&store, &small, 1).await;
    let mut stored = 0;
    let refused = loop {
        match store.append(&large, batch([vec![b'x'; 100_000]])).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Full(_)), "{refused:?}");
    assert!((5..=10).contains(&stored), "{stored}");
    assert_eq!(read_all(&store, &large).await.last_sequence, stored);
    assert_eq!(read_all(&store, &large).await.elements.len() as i64, stored);
    // What still fits goes in, also beside what does not.
    let appends = vec![
        ("small", batch(["2"])),
        ("large", batch([vec![b'x'; 100_000]])),
        ("small", batch(["3"])),
    ];
    let answers = append_together(&store, &path, appends).await;
    let is_ok: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(is_ok, [true, false, true]);
    assert!(*store.reachable().borrow());

    assert_eq!(store.clear(&large).await, Ok(stored));
    let appended = store
        .append(&large, batch([vec![b'x'; 100_000]]))
        .await
        .unwrap();
    assert_eq!(appended.first_sequence, stored + 1);
    assert_eq!(texts(&read_all(&store, &small).await), ["1", "2", "3"]);
}

/// SQLite undoes a statement that finds no room, and lets the transaction go on. What was stored before
/// it is to be in the commit.
#[cfg(target_os = "linux")]
#[test]
fn a_statement_that_finds_no_room_takes_nothing_else_with_it() {
    let Some(disk) = SmallDisk::mount("8m") else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let path = disk.path().join("chat-memory.db");
    drop(open(&path));
    // As the store opens it, with a small cache: pages go to the log before the commit.
    let flags = OpenFlags::default();
    let db = Connection::open_with_flags_and_vfs(&path, flags, "chat-memory").unwrap();
    db.execute_batch("PRAGMA cache_size = 10; BEGIN IMMEDIATE")
        .unwrap();
    let add = "INSERT INTO messages VALUES (1, ?1, randomblob(300))";
    for sequence in 0..2_000 {
        db.execute(add, [sequence]).unwrap();
    }
    let filler = disk.fill();
    // Looks at all of them.
    drop(db.execute(
        "UPDATE messages SET sequence = -1 WHERE element = x'00'",
        [],
    ));
    drop(filler);
    let stored = match db.execute_batch("COMMIT") {
        Ok(()) => 2_000,
        Err(_) => 0,
    };
    assert_eq!(numbers(&path, "SELECT count(*) FROM messages"), stored);
    let db = Connection::open(&path).unwrap();
    let checked = db.query_row("PRAGMA integrity_check", [], |row| row.get(0));
    assert_eq!(checked, Ok("ok".to_owned()));
}
