//! The real program: flags, signals, restart and crash, on the embedded store.

mod harness;

use std::{
    io::Write as _,
    process::Stdio,
    sync::{Arc, Mutex},
};

use harness::{
    program::{Program, command, run},
    provider::{Provider, Script},
    server::{
        Client, all_messages, append, chat, client, contents, get, tcp_channel, tell, unix_channel,
        user,
    },
    wait,
};

async fn connect(program: &Program) -> Client {
    client(tcp_channel(&program.addresses[0]).await)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn it_says_what_it_is_where_it_listens_and_what_to_do_next() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("x.sock");
    let database = directory.path().join("chat.db");
    let program = Program::start(&[
        "--listen",
        "127.0.0.1:0",
        "--listen",
        &format!("unix:{}", socket.display()),
        "--database",
        database.to_str().unwrap(),
    ]);
    assert_eq!(program.addresses.len(), 2);
    let port: u16 = program.addresses[0]
        .strip_prefix("127.0.0.1:")
        .unwrap()
        .parse()
        .unwrap();
    assert_ne!(port, 0);
    let banner = &program.banner;
    for part in [
        concat!("chat-memory ", env!("CARGO_PKG_VERSION"), " (commit "),
        "chat.db",
        "model: echo",
        "chat --session foo",
        "history --session foo",
        &format!("127.0.0.1:{port} chatmemory.v1.ChatMemory/Chat"),
    ] {
        assert!(banner.contains(part), "{part} is missing in:\n{banner}");
    }

    let mut tcp = connect(&program).await;
    let mut unix = client(unix_channel(&socket).await);
    tell(&mut tcp, chat("foo", "hi")).await;
    assert_eq!(contents(&mut unix, "foo").await, ["hi", "You said: hi"]);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn it_serves_on_when_nobody_reads_its_log() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("chat.db");
    let mut program = Program::start_unread(&[
        "--listen",
        "127.0.0.1:0",
        "--database",
        database.to_str().unwrap(),
        // Each call is a line.
        "--log",
        "debug",
    ]);
    let mut client = connect(&program).await;
    for _ in 0..3 {
        tell(&mut client, chat("foo", "hi")).await;
    }
    assert_eq!(contents(&mut client, "foo").await.len(), 6);
    program.signal("TERM");
    assert!(program.wait().success());
}

#[tokio::test]
async fn the_history_survives_a_restart_and_sequences_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("chat.db");
    let mut program = Program::embedded(&database);
    let mut first = connect(&program).await;
    first
        .append(append("s", vec![user("one"), user("two")]))
        .await
        .unwrap();
    let before = first.get_messages(get("s")).await.unwrap().into_inner();
    let mut cleared = append("t", vec![user("gone")]);
    cleared.request_id = "r".to_owned();
    first.append(cleared).await.unwrap();
    first.clear(harness::server::clear("t")).await.unwrap();
    program.signal("TERM");
    assert!(program.wait().success());

    let program = Program::embedded(&database);
    let mut second = connect(&program).await;
    assert_eq!(
        second.get_messages(get("s")).await.unwrap().into_inner(),
        before
    );
    let three = second
        .append(append("s", vec![user("three")]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(three.messages[0].sequence, 3);
    let after_clear = second
        .append(append("t", vec![user("new")]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(after_clear.messages[0].sequence, 2);
}

#[tokio::test]
async fn a_crash_during_appends_loses_nothing_that_was_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("chat.db");
    let mut expected_before = Vec::new();
    for _round in 0..3 {
        let program = Program::embedded(&database);
        let acknowledged = Arc::new(Mutex::new(expected_before.clone()));
        let channel = tcp_channel(&program.addresses[0]).await;
        let mut writers = Vec::new();
        for _ in 0..8 {
            let (mut client, acknowledged) = (client(channel.clone()), Arc::clone(&acknowledged));
            writers.push(tokio::spawn(async move {
                loop {
                    let request = append("s", vec![user("question"), user("answer")]);
                    let Ok(stored) = client.append(request).await else {
                        return;
                    };
                    for message in stored.into_inner().messages {
                        acknowledged
                            .lock()
                            .unwrap()
                            .push((message.sequence, message.id));
                    }
                }
            }));
        }
        wait::until("there are appends to interrupt", || {
            let count = acknowledged.lock().unwrap().len();
            let enough = count >= expected_before.len() + 200;
            async move { enough.then_some(()) }
        })
        .await;
        program.crash();
        for writer in writers {
            writer.await.unwrap();
        }

        let program = Program::embedded(&database);
        let mut reader = connect(&program).await;
        let stored = all_messages(&mut reader, "s").await;
        let stored: Vec<_> = stored.into_iter().map(|m| (m.sequence, m.id)).collect();
        let acknowledged = acknowledged.lock().unwrap().clone();
        for message in &acknowledged {
            assert!(stored.binary_search(message).is_ok(), "{message:?} is lost");
        }
        assert_eq!(stored.len() % 2, 0, "an append is stored by half");
        expected_before = stored;
    }
}

#[test]
fn a_second_server_on_the_same_file_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("chat.db");
    let _first = Program::embedded(&database);
    let second = run([
        "--listen",
        "127.0.0.1:0",
        "--database",
        database.to_str().unwrap(),
    ]);
    assert_eq!(second.status.code(), Some(1));
    let errors = text(&second.stderr);
    assert!(
        errors.contains("another") && errors.contains("chat.db"),
        "{errors}"
    );
    assert_eq!(errors.trim().lines().count(), 1, "{errors}");
}

#[test]
fn an_address_in_use_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let first = Program::embedded(&directory.path().join("1.db"));
    let address = &first.addresses[0];
    let database = directory.path().join("2.db");
    let second = run([
        "--listen",
        address,
        "--database",
        database.to_str().unwrap(),
    ]);
    assert_eq!(second.status.code(), Some(2));
    assert!(text(&second.stderr).contains(address));
    assert!(!database.exists(), "nothing is left behind");
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_live_ones_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", directory.path().join("x.sock").display());
    let start = |name: &str| {
        let database = directory.path().join(name);
        Program::start(&[
            "--listen",
            &listen,
            "--database",
            database.to_str().unwrap(),
        ])
    };
    start("1.db").crash();
    let _second = start("2.db");
    let database = directory.path().join("3.db");
    let third = run([
        "--listen",
        &listen,
        "--database",
        database.to_str().unwrap(),
    ]);
    assert_eq!(third.status.code(), Some(2));
    assert!(text(&third.stderr).contains("another server listens on this socket"));
}

#[test]
fn all_errors_of_the_configuration_are_shown_at_once() {
    let output = command([
        "--listen",
        "0.0.0.0:1",
        "--drain-seconds",
        "x",
        "--model-url",
        "y",
    ])
    .env("CHAT_MEMORY_MAX_TURNS", "0")
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = text(&output.stderr);
    for part in [
        "--insecure",
        "--drain-seconds: \"x\"",
        "--model-url: needs --model",
        "--max-turns: 0",
    ] {
        assert!(errors.contains(part), "{part} is missing in:\n{errors}");
    }
}

#[test]
fn version_names_the_commit_and_help_teaches() {
    let version = text(&run(["--version"]).stdout);
    assert!(version.starts_with(concat!(
        "chat-memory ",
        env!("CARGO_PKG_VERSION"),
        " (commit "
    )));
    let help = text(&run(["--help"]).stdout);
    for part in [
        "CHAT_MEMORY_REDIS",
        "[default: 127.0.0.1:50051]",
        "Examples:",
        "history",
        "health",
    ] {
        assert!(help.contains(part), "{part} is missing in:\n{help}");
    }
}

#[test]
fn every_flag_of_the_server_has_its_variable() {
    let help = text(&run(["serve", "--help"]).stdout);
    // Lines that begin with a flag and its value, and not those that only mention one.
    let flags: Vec<&str> = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--"))
        .filter_map(|line| line.split([' ', '<']).next())
        .filter(|flag| {
            flag.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        })
        .collect();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flags.len() > 15, "{flags:?}");
    for flag in flags {
        let variable = match flag {
            "help" | "version" => continue,
            "log" => "[env: CHAT_MEMORY_LOG=".to_owned(),
            flag => format!(
                "[env: CHAT_MEMORY_{}",
                flag.replace('-', "_").to_uppercase()
            ),
        };
        assert!(help.contains(&variable), "{variable} is missing");
    }
}

#[tokio::test]
async fn settings_come_from_the_environment_too() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("env.db");
    let mut child = command(["serve"])
        .env("CHAT_MEMORY_LISTEN", "127.0.0.1:0")
        .env("CHAT_MEMORY_DATABASE", &database)
        .env("CHAT_MEMORY_LOG_FORMAT", "json")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let started = loop {
        let line = lines.next().expect("a line").unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        if line["message"] == "started" {
            break line;
        }
    };
    assert!(
        started["listening"]
            .as_str()
            .unwrap()
            .starts_with("127.0.0.1:")
    );
    assert!(started["store"].as_str().unwrap().contains("env.db"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn an_empty_variable_leaves_its_setting_out() {
    let help = text(&run(["serve", "--help"]).stdout);
    let mut serve = command(["serve", "--listen", "nowhere"]);
    let mut count = 0;
    for part in help.split("CHAT_MEMORY_").skip(1) {
        let is_name = |byte: &u8| byte.is_ascii_uppercase() || *byte == b'_';
        let length = part.bytes().take_while(|byte| is_name(byte)).count();
        serve.env(format!("CHAT_MEMORY_{}", &part[..length]), "");
        count += 1;
    }
    assert!(count > 15);
    // The one flag that is wrong is all that there is to complain about.
    let errors = text(&serve.output().unwrap().stderr);
    assert_eq!(errors.matches("error: ").count(), 1, "{errors}");
    assert!(errors.contains("--listen: \"nowhere\""), "{errors}");
}

#[tokio::test]
async fn no_message_text_reaches_the_log_at_any_level() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("x.db");
    let log = directory.path().join("log");
    let provider = Provider::start().await;
    let mut child = command(["--listen", "127.0.0.1:0", "--log", "trace"])
        .args(["--model", "m", "--model-url", &provider.url()])
        .args(["--log-format", "json", "--database"])
        .arg(&database)
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let address = wait::until("it listens", || {
        let log = std::fs::read_to_string(&log).unwrap();
        let line = log
            .lines()
            .find(|line| line.contains("\"started\""))
            .map(str::to_owned);
        async move {
            let line: serde_json::Value = serde_json::from_str(&line?).ok()?;
            Some(line["listening"].as_str()?.to_owned())
        }
    })
    .await;
    let mut client = client(tcp_channel(&address).await);
    client
        .append(append("s", vec![user("hush-append")]))
        .await
        .unwrap();
    provider.answer(Script::text(["hush-answer"]));
    assert!(
        tell(&mut client, chat("s", "hush-chat"))
            .await
            .completed
            .is_some()
    );
    // Providers quote what they refuse.
    provider.answer(Script::refusal(400, "bad", "cannot answer hush-quoted"));
    provider.answer(Script::begin().say("hush-part").fail("hush-failed"));
    assert_eq!(
        tell(&mut client, chat("s", "hush-refused")).await.reason(),
        "MODEL_REJECTED"
    );
    assert_eq!(
        tell(&mut client, chat("s", "hush-broken")).await.reason(),
        "MODEL_STREAM_BROKEN"
    );
    client
        .append(append("s{", vec![user("hush-invalid")]))
        .await
        .unwrap_err();
    contents(&mut client, "s").await;
    child.kill().unwrap();
    child.wait().unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    for part in ["started", "MODEL_REJECTED", "a call failed"] {
        assert!(log.contains(part), "{part} is missing in:\n{log}");
    }
    assert!(!log.contains("hush"), "{log}");
}

#[tokio::test]
async fn a_server_of_one_thread_serves_and_drains() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("x.db");
    let mut program = Program::start(&[
        "--workers",
        "1",
        "--listen",
        "127.0.0.1:0",
        "--database",
        database.to_str().unwrap(),
    ]);
    let mut first = connect(&program).await;
    let mut second = connect(&program).await;
    tell(&mut first, chat("s", "hi")).await;
    assert_eq!(contents(&mut second, "s").await, ["hi", "You said: hi"]);
    program.signal("TERM");
    assert!(program.wait().success());
}

/// The scheduling policies of all threads, and how many threads there are.
#[cfg(target_os = "linux")]
fn policies(program: &Program) -> (Vec<String>, usize) {
    let threads = std::fs::read_dir(format!("/proc/{}/task", program.id())).unwrap();
    let policy = |thread: std::fs::DirEntry| {
        let counts = std::fs::read_to_string(thread.path().join("stat")).unwrap();
        // The name of the thread, in brackets, may hold anything.
        let (_, fields) = counts.rsplit_once(") ").unwrap();
        fields.split(' ').nth(38).unwrap().to_owned()
    };
    let mut policies: Vec<_> = threads.map(|thread| policy(thread.unwrap())).collect();
    let count = policies.len();
    policies.sort();
    policies.dedup();
    (policies, count)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn threads_take_turns_with_others_unless_a_policy_was_chosen_for_them() {
    const SCHED_BATCH: &str = "3";
    const SCHED_IDLE: &str = "5";
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("x.db");
    let program = Program::embedded(&database);
    let mut client = connect(&program).await;
    tell(&mut client, chat("s", "hi")).await;
    let (found, count) = policies(&program);
    assert_eq!(found, [SCHED_BATCH]);
    // A worker for each core and one more, and the thread that writes the file.
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(count >= cores + 2, "{count} threads on {cores} cores");
    program.crash();

    let mut command = std::process::Command::new("chrt");
    command.args(["--idle", "0", env!("CARGO_BIN_EXE_chat-memory")]);
    command.args(["--listen", "127.0.0.1:0", "--database"]);
    command.arg(&database);
    let program = Program::start_as(command);
    assert_eq!(policies(&program).0, [SCHED_IDLE]);
}

#[tokio::test]
async fn sigterm_drains_and_a_second_signal_ends_it_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Program::embedded(&directory.path().join("x.db"));
    program.signal("TERM");
    assert!(program.wait().success());

    // A provider that never answers holds the drain.
    let provider = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", provider.local_addr().unwrap());
    let database = directory.path().join("y.db");
    let database = database.to_str().unwrap();
    let mut program = Program::start(&[
        "--listen",
        "127.0.0.1:0",
        "--database",
        database,
        "--model-url",
        &url,
        "--model",
        "m",
    ]);
    let mut client = connect(&program).await;
    let _stream = client.chat(chat("s", "hi")).await.unwrap();
    let _connection = provider.accept().await.unwrap();
    program.signal("TERM");
    wait::until("it drains", || {
        let address = program.addresses[0].clone();
        async move {
            tokio::net::TcpStream::connect(address)
                .await
                .is_err()
                .then_some(())
        }
    })
    .await;
    program.signal("TERM");
    assert_eq!(program.wait().code(), Some(1));
}

#[test]
fn health_tells_a_probe_by_its_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Program::embedded(&directory.path().join("x.db"));
    let target = program.addresses[0].clone();
    assert!(run(["health", "--target", &target]).status.success());
    program.signal("TERM");
    program.wait();
    assert_eq!(run(["health", "--target", &target]).status.code(), Some(1));
}

#[test]
fn chat_and_history_work_through_pipes() {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::embedded(&directory.path().join("x.db"));
    let target = &program.addresses[0];
    let mut chat = command(["chat", "--session", "foo", "--target", target])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin
        .take()
        .unwrap()
        .write_all("hello\nagain\n".as_bytes())
        .unwrap();
    let output = chat.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = text(&output.stdout);
    assert!(
        said.contains("You said: hello") && said.contains("You said: again"),
        "{said}"
    );

    let history = run(["history", "--session", "foo", "--json", "--target", target]);
    let lines: Vec<serde_json::Value> = text(&history.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let contents: Vec<_> = lines
        .iter()
        .map(|line| line["content"].as_str().unwrap())
        .collect();
    assert_eq!(
        contents,
        ["hello", "You said: hello", "again", "You said: again"]
    );
}
