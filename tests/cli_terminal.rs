//! The client commands as people meet them: the real program, in a terminal and in pipes.

mod scripted;

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    process::{Child, Command, Output, Stdio},
};

use chat_memory::pb::{Live, Session, TurnState, watch_response::Event};
use rexpect::{
    reader::Options,
    session::{PtySession, spawn_with_options},
};
use scripted::Scripted;

const PROGRAM: &str = env!("CARGO_BIN_EXE_chat-memory");
/// Longer than anything here takes; a test that waits so long has failed.
const LIMIT_MS: u64 = 20_000;
const PROMPT: &str = "you> ";

/// The real server, with the model that repeats what it is told.
struct RealServer {
    child: Child,
    target: String,
    _dir: tempfile::TempDir,
}

impl RealServer {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // It may say where it listens on stdout or on stderr.
        let (output, input) = io::pipe().unwrap();
        let child = Command::new(PROGRAM)
            .args(["serve", "--listen", "127.0.0.1:0", "--database"])
            .arg(dir.path().join("chat-memory.db"))
            .stdin(Stdio::null())
            .stdout(input.try_clone().unwrap())
            .stderr(input)
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            target: String::new(),
            _dir: dir,
        };
        let mut lines = BufReader::new(output).lines().map(Result::unwrap);
        let mut before = String::new();
        server.target = loop {
            let Some(line) = lines.next() else {
                panic!("the server ended before it listened: {before}");
            };
            if let Some((_, rest)) = line.split_once("listening on 127.0.0.1:") {
                let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
                break format!("127.0.0.1:{port}");
            }
            before += &(line + "\n");
        };
        // Its output must go somewhere, or it stops when the pipe is full.
        std::thread::spawn(move || lines.for_each(drop));
        server
    }
}

impl Drop for RealServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client command, not started yet, that knows nothing of the environment of the test.
fn client(target: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .args(["--target", target])
        .env_remove("CHAT_MEMORY_TARGET")
        .env_remove("NO_COLOR")
        .env("TERM", "xterm");
    command
}

/// Runs a client command in pipes.
fn piped(target: &str, arguments: &[&str], input: &str) -> Output {
    let mut child = client(target, arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Written on the side: the program stops reading while nobody reads what it prints.
    std::thread::scope(|scope| {
        scope.spawn(move || match stdin.write_all(input.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result.unwrap(),
        });
        child.wait_with_output().unwrap()
    })
}

fn stdout_of(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// Begins a conversation in a terminal of its own, without colours.
fn chat(target: &str) -> PtySession {
    in_terminal(target, &["chat", "--session", "s"])
}

/// Begins a client command in a terminal of its own, without colours.
fn in_terminal(target: &str, arguments: &[&str]) -> PtySession {
    let mut command = client(target, arguments);
    command.env("NO_COLOR", "1");
    let options = Options::new()
        .timeout_ms(Some(LIMIT_MS))
        .strip_ansi_escape_codes(true);
    spawn_with_options(command, options).unwrap()
}

/// Presses keys, without the one that ends a line.
fn press(terminal: &mut PtySession, keys: &str) {
    terminal.send(keys).unwrap();
    terminal.flush().unwrap();
}

/// A text as rexpect reads it: it takes each byte for a letter.
fn as_read(text: &str) -> String {
    text.bytes().map(char::from).collect()
}

/// Waits for the end of a conversation, which must be a good one.
fn expect_end(terminal: &mut PtySession) {
    terminal.exp_eof().unwrap();
    let status = format!("{:?}", terminal.process().wait().unwrap());
    let is_good = status.starts_with("Exited(") && status.ends_with(", 0)");
    assert!(is_good, "ended with {status}");
}

#[test]
fn a_conversation_in_a_terminal_is_answered_stored_shown_and_cleared() {
    let server = RealServer::start();
    let mut terminal = chat(&server.target);
    terminal
        .exp_string("session s on http://127.0.0.1:")
        .unwrap();
    terminal.exp_string("no messages yet").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("hi there").unwrap();
    terminal.exp_string("You said: hi there").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("/history").unwrap();
    terminal.exp_string("#1 user").unwrap();
    terminal.exp_string("#2 assistant").unwrap();
    terminal.exp_string("You said: hi there").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("/clear").unwrap();
    terminal.exp_string("[y/N] ").unwrap();
    terminal.send_line("y").unwrap();
    terminal.exp_string("2 messages deleted").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("/quit").unwrap();
    expect_end(&mut terminal);
}

#[test]
fn letters_of_many_bytes_are_edited_whole() {
    let server = RealServer::start();
    let mut terminal = chat(&server.target);
    terminal.exp_string(PROMPT).unwrap();
    // Backspace takes the last of them away, two steps left and `x` go between the others.
    press(&mut terminal, "größe会話🎉\x7f");
    press(&mut terminal, "\x1b[D\x1b[Dx\r");
    terminal
        .exp_string(&as_read("You said: größex会話"))
        .unwrap();
    terminal.exp_string(PROMPT).unwrap();
    // The arrow key brings the line back.
    press(&mut terminal, "\x1b[A!\r");
    terminal
        .exp_string(&as_read("You said: größex会話!"))
        .unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_control('d').unwrap();
    expect_end(&mut terminal);
}

#[test]
fn ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_leave() {
    let server = RealServer::start();
    let mut terminal = chat(&server.target);
    terminal.exp_string(PROMPT).unwrap();
    press(&mut terminal, "never sent");
    terminal.exp_string("never sent").unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("(Ctrl-D or /quit leaves)").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("sent").unwrap();
    terminal.exp_string("You said: sent").unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_control('d').unwrap();
    expect_end(&mut terminal);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_during_an_answer_stops_it_and_the_conversation_goes_on() {
    let server = Scripted::on_tcp().await;
    let target = server.target.clone();
    let mut gone = server.gone.subscribe();
    let conversation = tokio::task::spawn_blocking(move || {
        let mut terminal = chat(&target);
        terminal.exp_string(PROMPT).unwrap();
        for _ in 0..2 {
            terminal.send_line("wait").unwrap();
            terminal.exp_string("waiting").unwrap();
            terminal.send_control('c').unwrap();
            terminal.exp_string("[stopped]").unwrap();
            terminal.exp_string(PROMPT).unwrap();
        }
        terminal.send_line("still there?").unwrap();
        terminal.exp_string("You said: still there?").unwrap();
        terminal.exp_string(PROMPT).unwrap();
        terminal.send_control('d').unwrap();
        expect_end(&mut terminal);
    });
    conversation.await.unwrap();
    gone.wait_for(|gone| *gone).await.unwrap();
}

#[test]
fn a_pipe_gets_the_answers_and_nothing_else() {
    let server = RealServer::start();
    let output = piped(&server.target, &["chat", "--session", "s"], "hi\ngröße\n");
    assert_eq!(stdout_of(&output), "You said: hi\nYou said: größe\n");
    assert_eq!(output.stderr, b"", "{output:?}");
    assert!(output.status.success());

    let output = piped(&server.target, &["history", "--session", "s", "--json"], "");
    let contents: Vec<String> = stdout_of(&output)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|message| message["content"].as_str().unwrap().to_owned())
        .collect();
    let expected = ["hi", "You said: hi", "größe", "You said: größe"];
    assert_eq!(contents, expected);
    assert!(output.status.success());
}

#[test]
fn a_failed_turn_in_a_pipe_is_told_by_the_exit_code() {
    let server = RealServer::start();
    let arguments = ["chat", "--session", "s", "--model", "no-such-model"];
    let output = piped(&server.target, &arguments, "hi\n");
    assert_eq!(stdout_of(&output), "");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.starts_with("error: "), "{errors}");
    assert!(errors.contains("UNKNOWN_MODEL"), "{errors}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn history_ends_quietly_when_its_reader_goes() {
    let server = RealServer::start();
    let line = "x".repeat(10_000) + "\n";
    let output = piped(
        &server.target,
        &["chat", "--session", "s"],
        &line.repeat(20),
    );
    assert!(output.status.success(), "{output:?}");

    let mut child = client(&server.target, &["history", "--session", "s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first_line = String::new();
    let mut reader = BufReader::with_capacity(64, child.stdout.take().unwrap());
    reader.read_line(&mut first_line).unwrap();
    // More is on its way than a pipe holds.
    drop(reader);
    let output = child.wait_with_output().unwrap();
    assert!(first_line.starts_with("#1 user"), "{first_line}");
    assert_eq!(output.stderr, b"", "{output:?}");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn health_answers_by_exit_code() {
    let server = RealServer::start();
    let output = piped(&server.target, &["health"], "");
    assert_eq!(stdout_of(&output), "SERVING\n");
    assert_eq!(output.status.code(), Some(0));

    let target = server.target.clone();
    drop(server);
    let output = piped(&target, &["health"], "");
    assert_eq!(stdout_of(&output), "");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("cannot reach chat-memory"), "{errors}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_session_that_cannot_be_is_refused_before_anything_is_sent() {
    let output = piped("127.0.0.1:1", &["history", "--session", "a{b}"], "");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("must not contain `{` or `}`"), "{errors}");
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_ran_when_the_terminal_died_goes_on_in_another() {
    let server = Scripted::on_tcp().await;
    server.have_turn("t1", TurnState::Running, "step");
    let step = server.step.clone();
    let target = server.target.clone();
    let conversation = tokio::task::spawn_blocking(move || {
        let mut terminal = in_terminal(&target, &["chat", "--session", "s", "--resume"]);
        terminal.exp_string("[asked] step").unwrap();
        terminal.exp_string("one ").unwrap();
        step.notify_one();
        terminal.exp_string("two").unwrap();
        terminal.exp_string(PROMPT).unwrap();
        terminal.send_line("hi").unwrap();
        terminal.exp_string("You said: hi").unwrap();
        terminal.exp_string(PROMPT).unwrap();
        terminal.send_control('d').unwrap();
        expect_end(&mut terminal);
    });
    conversation.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_failed_is_asked_again_after_a_question() {
    let server = Scripted::on_tcp().await;
    server.have_turn("t1", TurnState::Failed, "hi");
    let target = server.target.clone();
    let conversation = tokio::task::spawn_blocking(move || {
        let mut terminal = in_terminal(&target, &["chat", "--session", "s", "--resume"]);
        terminal.exp_string("the last turn failed").unwrap();
        terminal.exp_string("ask again? [y/N] ").unwrap();
        terminal.send_line("y").unwrap();
        terminal.exp_string("You said: hi").unwrap();
        terminal.exp_string(PROMPT).unwrap();
        terminal.send_control('d').unwrap();
        expect_end(&mut terminal);

        let arguments = ["chat", "--session", "s", "--resume"];
        let output = piped(&target, &arguments, "");
        assert_eq!(stdout_of(&output), "");
        assert_eq!(output.status.code(), Some(1));
    });
    conversation.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewind_asks_in_a_terminal_and_refuses_in_a_pipe() {
    let server = Scripted::on_tcp().await;
    server.fill(&["a", "b", "c"]);
    server.state().sessions = vec![Session {
        message_count: 3,
        first_sequence: 1,
        last_sequence: 3,
        ..Session::default()
    }];
    let target = server.target.clone();
    let arguments = ["rewind", "--session", "s", "--after", "1"];
    let rewinds = tokio::task::spawn_blocking(move || {
        let output = piped(&target, &arguments, "y\n");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("--yes"), "{errors}");
        assert_eq!(output.status.code(), Some(1));

        let mut terminal = in_terminal(&target, &arguments);
        let question = "delete 2 messages of the session s after number 1? [y/N] ";
        terminal.exp_string(question).unwrap();
        terminal.send_line("y").unwrap();
        terminal.exp_string("2 messages deleted").unwrap();
        expect_end(&mut terminal);
    });
    rewinds.await.unwrap();
    assert_eq!(server.state().rewinds.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_fit_the_terminal_and_have_colours_only_there_and_if_wanted() {
    let server = Scripted::on_tcp().await;
    server.state().sessions = vec![Session {
        session_id: "s".into(),
        title: "t".repeat(100),
        ..Session::default()
    }];
    let target = server.target.clone();
    let lists = tokio::task::spawn_blocking(move || {
        let shown = |no_color: &str| {
            // The terminal has no size until it gets one.
            let script = "stty cols 60 rows 20 && exec \"$0\" sessions --target \"$1\"";
            let mut command = Command::new("sh");
            command.args(["-c", script, PROGRAM, &target]);
            command.env("NO_COLOR", no_color).env("TERM", "xterm");
            let options = Options::new().timeout_ms(Some(LIMIT_MS));
            let mut terminal = spawn_with_options(command, options).unwrap();
            terminal.exp_eof().unwrap()
        };
        let plain = shown("1");
        let lines: Vec<&str> = plain.lines().collect();
        assert!(lines[1].contains(&as_read("ttt…  ")), "{plain}");
        let columns = lines[1].replace(&as_read("…"), ".").trim_end().len();
        assert!(columns <= 60, "{plain}");
        assert!(!plain.contains('\x1b'), "{plain}");
        assert!(shown("").contains("\x1b[1mSESSION"));

        let output = piped(&target, &["sessions"], "");
        assert!(stdout_of(&output).contains(&"t".repeat(100)));
        assert!(!stdout_of(&output).contains('\x1b'));
        assert!(output.status.success());
    });
    lists.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_watch() {
    let server = Scripted::on_tcp().await;
    server.state().watch_scripts = [vec![Ok(Event::Live(Live { last_sequence: 0 }))]].into();
    let target = server.target.clone();
    let watching = tokio::task::spawn_blocking(move || {
        let mut terminal = in_terminal(&target, &["watch", "--session", "s"]);
        terminal.exp_string("[no message yet]").unwrap();
        terminal.send_control('c').unwrap();
        terminal.exp_eof().unwrap();
        let status = format!("{:?}", terminal.process().wait().unwrap());
        assert!(status.contains("SIGINT"), "ended with {status}");
    });
    watching.await.unwrap();
}

#[test]
fn every_command_has_a_manual_page_and_completes_its_flags() {
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man1");
    run(&["man", "--out", folder.to_str().unwrap()]);
    let page = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    assert_eq!(page("chat-memory.1"), run(&["man"]));
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        for (command, flag) in [
            ("serve", "session-ttl"),
            ("chat", "resume"),
            ("watch", "new"),
            ("sessions", "prefix"),
            ("update", "clear-metadata"),
            ("rewind", "stop-turn"),
            ("fork", "through"),
            ("man", "out"),
        ] {
            assert!(
                script.contains(command) && script.contains(flag),
                "{shell} {flag}"
            );
            // In roff, a minus is escaped.
            let flag = flag.replace('-', "\\-");
            assert!(
                page(&format!("chat-memory-{command}.1")).contains(&flag),
                "{flag}"
            );
        }
    }
    assert!(page("chat-memory-sessions.1").contains("Examples:"));
}

#[test]
fn sessions_are_listed_named_forked_rewound_and_watched_on_the_real_server() {
    let server = RealServer::start();
    let run = |arguments: &[&str], input: &str| {
        let output = piped(&server.target, arguments, input);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        stdout_of(&output).to_owned()
    };
    run(&["chat", "--session", "s"], "hi\nthere\n");
    let said = run(&["update", "--session", "s", "--title", "größe"], "");
    assert!(said.contains("größe"), "{said}");
    let said = run(
        &["fork", "--session", "s", "--to", "copy", "--through", "2"],
        "",
    );
    assert_eq!(said, "the session copy has 2 messages now\n");
    let said = run(&["rewind", "--session", "s", "--after", "3", "--yes"], "");
    assert_eq!(said, "1 message deleted\n");
    let listed: Vec<(String, i64)> = run(&["sessions", "--json"], "")
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|session| {
            let id = session["session_id"].as_str().unwrap().to_owned();
            (id, session["message_count"].as_i64().unwrap())
        })
        .collect();
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(listed.contains(&("s".to_owned(), 3)), "{listed:?}");
    assert!(listed.contains(&("copy".to_owned(), 2)), "{listed:?}");

    let arguments = ["watch", "--session", "copy", "--after", "1", "--json"];
    let mut watch = client(&server.target, &arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().starts_with(r#"{"message":{"sequence":2,"#));
    assert_eq!(next(), r#"{"live":{"last_sequence":2}}"#);
    run(&["chat", "--session", "copy"], "more\n");
    let messages =
        std::iter::from_fn(|| Some(next())).filter(|line| line.starts_with("{\"message\""));
    let contents: Vec<serde_json::Value> = messages
        .take(2)
        .map(|line| serde_json::from_str::<serde_json::Value>(&line).unwrap())
        .map(|event| event["message"]["content"].clone())
        .collect();
    assert_eq!(contents, ["more", "You said: more"]);
    watch.kill().unwrap();
    watch.wait().unwrap();
}
