//! The client commands, against a server that does as the test says, over TCP and Unix sockets.

mod scripted;

use std::{
    io::{self, Cursor, Write},
    time::Duration,
};

use chat_memory::{
    cli::{
        Error,
        args::{ChatArgs, HealthArgs, HistoryArgs},
        chat::{Chat, Lines, Screen},
        client, health, history,
        text::Style,
    },
    pb::Role,
};
use clap::Parser;
use scripted::{Scripted, message};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic_health::{ServingStatus, pb::health_check_response::ServingStatus as Answer};

/// Longer than anything here takes; a test that waits so long has failed.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Parser)]
enum Program {
    Chat(ChatArgs),
    History(HistoryArgs),
    Health(HealthArgs),
}

fn parse(target: &str, arguments: &[&str]) -> Program {
    let arguments = [&["chat-memory"], arguments, &["--target", target]].concat();
    Program::parse_from(arguments)
}

/// What was printed, for others to wait for.
#[derive(Clone)]
struct Printed(watch::Sender<Vec<u8>>);

impl Printed {
    fn new() -> Self {
        Self(watch::Sender::new(Vec::new()))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.borrow().clone()).unwrap()
    }

    async fn wait_for(&self, text: &str) {
        let mut printed = self.0.subscribe();
        let is_there = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).contains(text);
        let waiting = tokio::time::timeout(LIMIT, printed.wait_for(is_there)).await;
        assert!(waiting.is_ok(), "no {text:?} in {:?}", self.text());
    }
}

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .send_modify(|printed| printed.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A conversation that is going on.
struct Talk {
    printed: Printed,
    errors: Printed,
    interrupt: mpsc::Sender<()>,
    /// Tells whether all was answered.
    end: tokio::task::JoinHandle<bool>,
}

/// Where a conversation prints to.
enum Out {
    Terminal,
    Pipe,
}

async fn talk(server: &Scripted, out: Out, arguments: &[&str], lines: &'static str) -> Talk {
    let arguments = [&["chat", "--session", "s"], arguments].concat();
    let Program::Chat(args) = parse(&server.target, &arguments) else {
        unreachable!()
    };
    let client = client::connect_api(&args.target.target).await.unwrap();
    let (printed, errors) = (Printed::new(), Printed::new());
    let screen = match out {
        Out::Terminal => Screen::terminal(printed.clone(), errors.clone(), Style::PLAIN),
        Out::Pipe => Screen::piped(printed.clone(), errors.clone()),
    };
    let (interrupt, interrupts) = mpsc::channel(1);
    let lines = Lines::piped(Cursor::new(lines));
    let mut chat = Chat::new(client, &args, lines, screen, interrupts);
    let end = tokio::spawn(async move {
        if let Out::Terminal = out {
            chat.greet(&args).await.unwrap();
        }
        chat.run().await.unwrap();
        chat.all_answered()
    });
    Talk {
        printed,
        errors,
        interrupt,
        end,
    }
}

impl Talk {
    /// Waits for the end: what was printed, the errors, and whether all was answered.
    async fn finish(self) -> (String, String, bool) {
        let end = tokio::time::timeout(LIMIT, self.end).await;
        let all_answered = end.expect("the conversation does not end").unwrap();
        (self.printed.text(), self.errors.text(), all_answered)
    }
}

async fn history_of(server: &Scripted, arguments: &[&str]) -> String {
    let arguments = [&["history", "--session", "s"], arguments].concat();
    let Program::History(args) = parse(&server.target, &arguments) else {
        unreachable!()
    };
    let mut out = Vec::new();
    history::print(&args, Style::PLAIN, &mut out).await.unwrap();
    String::from_utf8(out).unwrap()
}

async fn health_at(target: &str, arguments: &[&str]) -> Result<Answer, Error> {
    let arguments = [&["health"], arguments].concat();
    let Program::Health(args) = parse(target, &arguments) else {
        unreachable!()
    };
    health::print(&args, &mut io::sink()).await
}

#[tokio::test]
async fn history_is_printed_over_tcp_and_unix_sockets_across_all_pages() {
    for server in [Scripted::on_tcp().await, Scripted::on_unix().await] {
        server.fill(&["a", "b", "c", "d", "e", "f", "g"]);
        let printed = history_of(&server, &[]).await;
        let expected = "#1 user\na\n\n#2 assistant\nb\n\n#3 user\nc\n\n#4 assistant\nd\n\n\
                        #5 user\ne\n\n#6 assistant\nf\n\n#7 user\ng\n\n";
        assert_eq!(printed, expected);
        assert_eq!(server.state().pages.len(), 3);
    }
}

#[tokio::test]
async fn history_prints_only_the_last_messages_if_told() {
    let server = Scripted::on_tcp().await;
    server.fill(&["a", "b", "c", "d", "e"]);
    let printed = history_of(&server, &["--last", "4"]).await;
    assert!(printed.starts_with("#2 assistant\nb\n"), "{printed}");
    assert!(printed.ends_with("#5 user\ne\n\n"), "{printed}");
}

#[tokio::test]
async fn history_of_an_empty_session_is_empty() {
    let server = Scripted::on_tcp().await;
    assert_eq!(history_of(&server, &[]).await, "");
    assert_eq!(history_of(&server, &["--json"]).await, "");
}

#[tokio::test]
async fn history_as_json_is_one_object_a_line_with_the_stored_bytes_only_if_asked() {
    let server = Scripted::on_tcp().await;
    server.fill(&["a\nb", "c", "d", "e"]);
    for (arguments, raw) in [
        (&["--json"][..], serde_json::Value::Null),
        (&["--json", "--raw"], "c3RvcmVk".into()),
    ] {
        let printed = history_of(&server, arguments).await;
        let messages: Vec<serde_json::Value> = printed
            .lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        assert_eq!(messages.len(), 4);
        assert_eq!(messages[0]["content"], "a\nb");
        assert_eq!(messages[3]["sequence"], 4);
        assert!(messages.iter().all(|message| message["raw"] == raw));
    }
}

#[tokio::test]
async fn history_reads_no_further_when_its_reader_has_gone() {
    /// A pipe that nobody reads.
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    let server = Scripted::on_tcp().await;
    server.fill(&["a", "b", "c", "d", "e", "f", "g"]);
    let Program::History(args) = parse(&server.target, &["history", "--session", "s"]) else {
        unreachable!()
    };
    let out = io::BufWriter::new(Gone);
    match history::print(&args, Style::PLAIN, out).await {
        Err(Error::Output(error)) => assert_eq!(error.kind(), io::ErrorKind::BrokenPipe),
        other => panic!("not a broken pipe: {other:?}"),
    }
    assert_eq!(server.state().pages.len(), 1);
}

#[tokio::test]
async fn a_servers_error_is_told_with_code_and_reason() {
    let server = Scripted::on_tcp().await;
    let Program::History(args) = parse(&server.target, &["history", "--session", "broken"]) else {
        unreachable!()
    };
    let error = history::print(&args, Style::PLAIN, io::sink()).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "the store did not answer (UNAVAILABLE, OUTCOME_UNKNOWN)"
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_with_the_cause_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = format!("unix:{}", dir.path().join("none").display());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    for (target, cause) in [(missing, "No such file"), (closed, "Connection refused")] {
        let error = health_at(&target, &[]).await.unwrap_err().to_string();
        let beginning = format!("cannot reach chat-memory at {target}: {cause}");
        assert!(error.starts_with(&beginning), "{error}");
        assert!(error.ends_with("Start it with `chat-memory`"), "{error}");
    }
}

#[tokio::test]
async fn health_tells_serving_from_not_serving_over_tcp_and_unix_sockets() {
    for server in [Scripted::on_tcp().await, Scripted::on_unix().await] {
        let unknown = health_at(&server.target, &[]).await.unwrap_err();
        assert!(unknown.to_string().contains("NOT_FOUND"), "{unknown}");
        server.set_health(ServingStatus::Serving).await;
        let answer = health_at(&server.target, &[]).await.unwrap();
        assert_eq!(answer, Answer::Serving);
        server.set_health(ServingStatus::NotServing).await;
        let answer = health_at(&server.target, &[]).await.unwrap();
        assert_eq!(answer, Answer::NotServing);
        let whole_server = health_at(&server.target, &["--service="]).await.unwrap();
        assert_eq!(whole_server, Answer::Serving);
    }
}

#[tokio::test]
async fn health_gives_up_in_time_on_a_server_that_does_not_answer() {
    // Connections are made by the kernel; nobody ever reads them.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = silent.local_addr().unwrap().to_string();
    let asked = health_at(&target, &["--timeout-seconds", "1"]);
    let answer = tokio::time::timeout(LIMIT, asked).await.expect("in time");
    assert_eq!(
        answer.unwrap_err().to_string(),
        format!("no answer from http://{target} within 1 s")
    );
}

#[tokio::test]
async fn in_a_pipe_each_line_is_a_message_and_only_answers_go_to_stdout() {
    for server in [Scripted::on_tcp().await, Scripted::on_unix().await] {
        let talk = talk(&server, Out::Pipe, &[], "hi\n\nthink\ngröße 🎉").await;
        let (printed, errors, all_answered) = talk.finish().await;
        assert_eq!(
            printed,
            "You said: hi\nLook␛[2J it up\nYou said: größe 🎉\n"
        );
        assert_eq!(
            errors,
            "[reasoning] hm, so\n[calls the tool look with {\"up\":true}; c1]\n"
        );
        assert!(all_answered);
    }
}

#[tokio::test]
async fn the_options_of_a_conversation_go_with_each_turn() {
    let server = Scripted::on_tcp().await;
    let options = ["--model=m", "--system-prompt=be brief", "--last-messages=7"];
    talk(&server, Out::Pipe, &options, "a\nb\n")
        .await
        .finish()
        .await;
    let state = server.state();
    assert_eq!(state.chats.len(), 2);
    for chat in &state.chats {
        assert_eq!(chat.session_id, "s");
        assert_eq!(chat.model, "m");
        assert_eq!(chat.system_prompt, "be brief");
        assert_eq!(chat.last_messages, Some(7));
    }
    assert_ne!(state.chats[0].turn_id, state.chats[1].turn_id);
    assert_eq!(state.chats[0].turn_id.len(), 26, "not a ULID");
}

#[tokio::test]
async fn an_answer_is_shown_while_it_comes() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &[], "step\n").await;
    talk.printed.wait_for("one ").await;
    assert_eq!(talk.printed.text(), "one ");
    server.step.notify_one();
    assert_eq!(talk.finish().await.0, "one two\n");
}

#[tokio::test]
async fn a_stored_answer_is_shown_though_it_does_not_stream() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &[], "stored\n").await;
    assert_eq!(talk.finish().await.0, "said before\n");
}

#[tokio::test]
async fn an_interrupt_stops_the_answer_and_the_conversation_goes_on() {
    let server = Scripted::on_tcp().await;
    let mut gone = server.gone.subscribe();
    let talk = talk(&server, Out::Terminal, &[], "wait\nhi\n").await;
    talk.printed.wait_for("waiting").await;
    talk.interrupt.send(()).await.unwrap();
    let noticed = tokio::time::timeout(LIMIT, gone.wait_for(|gone| *gone)).await;
    assert!(
        noticed.is_ok(),
        "the server does not know that the client has gone"
    );
    let (printed, errors, all_answered) = talk.finish().await;
    let end = "waiting\n[stopped]\nYou said: hi\n";
    assert!(printed.ends_with(end), "{printed}");
    assert_eq!(errors, "");
    assert!(all_answered, "stopping is no failure");
}

#[tokio::test]
async fn an_interrupt_before_an_answer_does_not_stop_it() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &[], "hi\n").await;
    // The task has not begun: this thread has not let it.
    talk.interrupt.try_send(()).unwrap();
    assert_eq!(talk.finish().await.0, "You said: hi\n");
}

#[tokio::test]
async fn a_failed_turn_is_told_and_tried_again_under_the_same_id() {
    let server = Scripted::on_tcp().await;
    let lines = "fail once\n/retry\n/retry\nhi\n";
    let talk = talk(&server, Out::Pipe, &[], lines).await;
    let (printed, errors, all_answered) = talk.finish().await;
    assert_eq!(printed, "at last\nYou said: hi\n");
    assert_eq!(
        errors,
        "error: the store did not answer (UNAVAILABLE, OUTCOME_UNKNOWN)\n\
         /retry tries it again, and stores it once\n\
         there is nothing to retry\n"
    );
    assert!(!all_answered);
    let state = server.state();
    let ids: Vec<&str> = state.chats.iter().map(|chat| &*chat.turn_id).collect();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[1], ids[2]);
    assert_eq!(state.chats[0], state.chats[1]);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_a_failure_on_a_line_of_its_own() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &[], "break off\nhi\n").await;
    let (printed, errors, all_answered) = talk.finish().await;
    assert_eq!(printed, "half an ans\nYou said: hi\n");
    assert!(errors.contains("before the answer was stored"), "{errors}");
    assert!(!all_answered);
}

#[tokio::test]
async fn clearing_asks_first_and_says_how_many_messages_went() {
    let server = Scripted::on_tcp().await;
    server.fill(&["a", "b", "c"]);
    for refusal in ["/clear\nn\n", "/clear\n\n", "/clear\n"] {
        let talk = talk(&server, Out::Pipe, &[], refusal).await;
        assert_eq!(talk.finish().await.1, "nothing was deleted\n");
        assert_eq!(server.state().messages.len(), 3);
    }
    let talk = talk(&server, Out::Pipe, &[], "/clear\ny\n").await;
    assert_eq!(talk.finish().await.1, "3 messages deleted\n");
    assert!(server.state().messages.is_empty());
}

#[tokio::test]
async fn the_history_command_shows_the_last_messages_or_all_of_them() {
    let server = Scripted::on_tcp().await;
    server.fill(&["a", "b", "c", "d", "e"]);
    let count = |printed: &str| printed.matches('#').count();
    for (lines, shown) in [
        ("/history all\n", 5),
        ("/history 4\n", 4),
        ("/history\n", 5),
    ] {
        let (printed, errors, _) = talk(&server, Out::Pipe, &[], lines).await.finish().await;
        assert_eq!(count(&printed), shown, "{lines}");
        assert!(printed.ends_with("#5 user\ne\n\n"), "{printed}");
        assert_eq!(errors, "");
    }
    assert!(server.state().chats.is_empty());
}

#[tokio::test]
async fn a_conversation_begins_with_where_it_is_and_what_was_said_last() {
    let server = Scripted::on_tcp().await;
    let (printed, ..) = talk(&server, Out::Terminal, &[], "").await.finish().await;
    let begin = format!("session s on http://{}", server.target);
    assert!(printed.starts_with(&begin), "{printed}");
    assert!(printed.contains("no messages yet"), "{printed}");

    server.fill(&["a", "evil \x1b[2J"]);
    let (printed, ..) = talk(&server, Out::Terminal, &[], "").await.finish().await;
    assert!(printed.contains("it has 2 messages"), "{printed}");
    assert!(printed.contains("#2 assistant\nevil ␛[2J\n"), "{printed}");

    server.fill(&["c", "d", "e"]);
    let (printed, ..) = talk(&server, Out::Terminal, &[], "").await.finish().await;
    assert!(printed.contains("up to number 5"), "{printed}");
    assert!(printed.contains("#5 user\ne\n"), "{printed}");
}

#[tokio::test]
async fn what_is_no_command_is_not_sent_and_says_so() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &[], "/clean\n//clean\n/quit\nhi\n").await;
    let (printed, errors, _) = talk.finish().await;
    assert!(errors.starts_with("/clean is no command"), "{errors}");
    assert_eq!(printed, "You said: /clean\n");
}

#[tokio::test]
async fn colours_set_off_what_is_not_the_answer() {
    let server = Scripted::on_tcp().await;
    server.store(message(Role::User, "a"));
    let Program::History(args) = parse(&server.target, &["history", "--session", "s"]) else {
        unreachable!()
    };
    let mut out = Vec::new();
    let style = Style { color: true };
    history::print(&args, style, &mut out).await.unwrap();
    assert_eq!(out, b"\x1b[1m#1 user\x1b[0m\na\n\n");
}
