//! The client commands, against a server that does as the test says, over TCP and Unix sockets.

mod scripted;

use std::{
    io::{self, Cursor, Write},
    time::Duration,
};

use chat_memory::{
    cli::{
        Error,
        args::{
            ChatArgs, ForkArgs, HealthArgs, HistoryArgs, RewindArgs, SessionsArgs, UpdateArgs,
            WatchArgs,
        },
        change,
        chat::{Chat, Lines, Screen},
        client, health, history,
        sessions::{self, Look},
        text::Style,
        watch as watching,
    },
    pb::{
        Cleared, Live, Message, OnDisconnect, Rewound, Role, Session, Skipped, Turn, TurnState,
        watch_response::Event,
    },
};
use clap::Parser;
use scripted::{Scripted, failure, message};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::Code;
use tonic_health::{ServingStatus, pb::health_check_response::ServingStatus as Answer};

/// Longer than anything here takes; a test that waits so long has failed.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Parser)]
enum Program {
    Chat(ChatArgs),
    History(HistoryArgs),
    Health(HealthArgs),
    Sessions(SessionsArgs),
    Watch(WatchArgs),
    Update(UpdateArgs),
    Rewind(RewindArgs),
    Fork(ForkArgs),
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
        if !args.resume || chat.resume().await.unwrap() {
            chat.run().await.unwrap();
        }
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
    let stops: Vec<String> = server
        .state()
        .stops
        .iter()
        .map(|s| s.turn_id.clone())
        .collect();
    assert_eq!(stops, [server.state().chats[0].turn_id.clone()]);
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
        "error: the model did not answer (UNAVAILABLE, MODEL_UNAVAILABLE)\n\
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
    assert_eq!(
        errors,
        "error: its servers died (UNAVAILABLE, TURN_ABANDONED)\n\
         /retry tries it again, and stores it once\n"
    );
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

const LOOK: Look = Look {
    style: Style::PLAIN,
    width: None,
    now_ms: 1_763_910_000_000,
};

/// A session that was active one minute before [`LOOK`].
fn session(id: &str) -> Session {
    Session {
        session_id: id.into(),
        title: format!("about {id}"),
        message_count: 2,
        active_time: Some(prost_types::Timestamp {
            seconds: LOOK.now_ms / 1000 - 60,
            nanos: 0,
        }),
        ..Session::default()
    }
}

async fn sessions_of(server: &Scripted, arguments: &[&str]) -> (String, String) {
    let arguments = [&["sessions"], arguments].concat();
    let Program::Sessions(args) = parse(&server.target, &arguments) else {
        unreachable!()
    };
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    let listed = sessions::print(&args, LOOK, &mut out, &mut errors).await;
    listed.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(out), text(errors))
}

#[tokio::test]
async fn sessions_are_a_table_across_pages_up_to_the_limit() {
    let server = Scripted::on_tcp().await;
    server.state().sessions = ["a", "b", "c", "d", "e"].map(session).into();
    let (printed, errors) = sessions_of(&server, &["--limit", "4"]).await;
    assert_eq!(
        printed,
        "SESSION  TITLE    MESSAGES  ACTIVE     EXPIRES\n\
         a        about a         2  1 min ago  never\n\
         b        about b         2  1 min ago  never\n\
         c        about c         2  1 min ago  never\n\
         d        about d         2  1 min ago  never\n"
    );
    assert!(errors.contains("--all"), "{errors}");
    let sizes: Vec<i32> = server.state().lists.iter().map(|l| l.page_size).collect();
    assert_eq!(sizes, [4, 1]);

    let (printed, errors) = sessions_of(&server, &["--all"]).await;
    assert_eq!(printed.lines().count(), 6);
    assert_eq!(errors, "");
}

#[tokio::test]
async fn sessions_as_json_are_one_object_a_line_and_none_is_said_on_stderr() {
    let server = Scripted::on_tcp().await;
    let nobody = (String::new(), "there is no such session\n".to_owned());
    assert_eq!(sessions_of(&server, &["--json"]).await, nobody);
    assert_eq!(sessions_of(&server, &[]).await, nobody);

    server.state().sessions = ["a", "b", "c", "d"].map(session).into();
    let (printed, errors) = sessions_of(&server, &["--json"]).await;
    let ids: Vec<serde_json::Value> = printed
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|session| session["session_id"].clone())
        .collect();
    assert_eq!(ids, ["a", "b", "c", "d"]);
    assert_eq!(errors, "");
}

#[tokio::test]
async fn what_sessions_to_list_is_the_servers_to_choose() {
    let server = Scripted::on_tcp().await;
    let arguments = ["--prefix=ann/", "--metadata=a=1", "--metadata=b=x=y"];
    sessions_of(&server, &arguments).await;
    let state = server.state();
    assert_eq!(state.lists[0].id_prefix, "ann/");
    assert_eq!(state.lists[0].page_size, 50);
    let pairs = [("a", "1"), ("b", "x=y")];
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(state.lists[0].metadata, pairs.into());
}

/// A watch that is going on.
struct Watch {
    printed: Printed,
    errors: Printed,
    end: tokio::task::JoinHandle<Result<(), Error>>,
}

fn watch_of(server: &Scripted, out: Out, arguments: &[&str]) -> Watch {
    let arguments = [&["watch", "--session", "s"], arguments].concat();
    let Program::Watch(args) = parse(&server.target, &arguments) else {
        unreachable!()
    };
    let (printed, errors) = (Printed::new(), Printed::new());
    let screen = match out {
        Out::Terminal => Screen::terminal(printed.clone(), errors.clone(), Style::PLAIN),
        Out::Pipe => Screen::piped(printed.clone(), errors.clone()),
    };
    let end = tokio::spawn(async move { watching::print(&args, screen).await });
    Watch {
        printed,
        errors,
        end,
    }
}

fn numbered(sequence: i64, content: &str) -> Result<Event, tonic::Status> {
    Ok(Event::Message(Message {
        sequence,
        ..message(Role::User, content)
    }))
}

fn live(last_sequence: i64) -> Result<Event, tonic::Status> {
    Ok(Event::Live(Live { last_sequence }))
}

fn turn(state: TurnState) -> Result<Event, tonic::Status> {
    Ok(Event::Turn(Turn {
        turn_id: "t".into(),
        state: state.into(),
        attempt: 1,
        reason: "WHY".into(),
        error: "because".into(),
        ..Turn::default()
    }))
}

#[tokio::test]
async fn a_watch_prints_messages_as_history_does_and_notices_between_them() {
    let server = Scripted::on_tcp().await;
    server.state().watch_scripts = [vec![
        numbered(1, "a"),
        live(1),
        turn(TurnState::Running),
        numbered(2, "b \x1b[2J"),
        turn(TurnState::Completed),
        turn(TurnState::Failed),
        Ok(Event::Rewound(Rewound { last_sequence: 1 })),
        Ok(Event::Skipped(Skipped { first_sequence: 9 })),
        Ok(Event::Cleared(Cleared {})),
        Err(failure(Code::InvalidArgument, "X", "enough")),
    ]]
    .into();
    let notices = [
        "[up to number 1; what comes is new]\n[turn t begins]\n",
        "[turn t is stored]\n[turn t failed: WHY: because]\n\
         [rewound: what came after number 1 is deleted]\n\
         [skipped: messages before number 9 are gone]\n\
         [cleared: the session begins anew]\n",
    ];
    let scripts = server.state().watch_scripts.clone();
    let watch = watch_of(&server, Out::Terminal, &[]);
    assert!(watch.end.await.unwrap().is_err());
    let expected = format!(
        "#1 user\na\n\n{}#2 user\nb ␛[2J\n\n{}",
        notices[0], notices[1]
    );
    assert_eq!(watch.printed.text(), expected);
    assert_eq!(watch.errors.text(), "");

    server.state().watch_scripts = scripts;
    let watch = watch_of(&server, Out::Pipe, &[]);
    assert!(watch.end.await.unwrap().is_err());
    assert_eq!(watch.printed.text(), "#1 user\na\n\n#2 user\nb ␛[2J\n\n");
    assert_eq!(watch.errors.text(), notices.concat());
}

#[tokio::test]
async fn a_watch_as_json_is_one_object_a_line_named_after_its_event() {
    let server = Scripted::on_tcp().await;
    server.state().watch_scripts = [vec![
        numbered(1, "a"),
        live(1),
        turn(TurnState::Running),
        Ok(Event::Cleared(Cleared {})),
    ]]
    .into();
    let watch = watch_of(&server, Out::Pipe, &["--json"]);
    watch.printed.wait_for("cleared").await;
    let lines: Vec<serde_json::Value> = watch
        .printed
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["message"]["content"], "a");
    assert_eq!(lines[1], serde_json::json!({"live": {"last_sequence": 1}}));
    assert_eq!(lines[2]["turn"]["state"], "TURN_STATE_RUNNING");
    assert_eq!(lines[3], serde_json::json!({"cleared": {}}));
    assert_eq!(watch.errors.text(), "");
    watch.end.abort();
}

#[tokio::test]
async fn a_watch_that_breaks_goes_on_behind_the_last_message_and_says_so() {
    let server = Scripted::on_tcp().await;
    let away = || {
        Err(failure(
            Code::Unavailable,
            "SHUTTING_DOWN",
            "the server stops",
        ))
    };
    server.state().watch_scripts = [
        vec![numbered(6, "a"), live(6), numbered(7, "b"), away()],
        vec![Ok(Event::Rewound(Rewound { last_sequence: 6 })), away()],
        vec![Err(failure(
            Code::ResourceExhausted,
            "WATCHER_TOO_SLOW",
            "slow",
        ))],
        vec![numbered(8, "c"), Ok(Event::Cleared(Cleared {})), away()],
        vec![numbered(9, "d"), live(9)],
    ]
    .into();
    let watch = watch_of(&server, Out::Pipe, &["--after", "5"]);
    watch.errors.wait_for("[up to number 9").await;
    let contents: Vec<String> = watch.printed.text().lines().map(str::to_owned).collect();
    let contents = contents.iter().filter(|line| line.len() == 1);
    assert_eq!(contents.collect::<Vec<_>>(), ["a", "b", "c", "d"]);
    let after: Vec<i64> = server
        .state()
        .watches
        .iter()
        .map(|w| w.after_sequence)
        .collect();
    assert_eq!(after, [5, 7, 6, 6, 0]);
    let errors = watch.errors.text();
    let said = "the server stops (UNAVAILABLE, SHUTTING_DOWN)\ngoing on after number 7 in 0.1 s\n";
    assert!(errors.contains(said), "{errors}");
    watch.end.abort();
}

#[tokio::test]
async fn a_watch_tells_when_the_session_has_begun_anew_while_it_was_away() {
    let server = Scripted::on_tcp().await;
    let away = || {
        Err(failure(
            Code::Unavailable,
            "SHUTTING_DOWN",
            "the server stops",
        ))
    };
    server.state().watch_scripts = [
        vec![numbered(6, "a"), live(6), away()],
        // A number beyond the last counts as the last.
        vec![live(2)],
        vec![numbered(1, "b"), numbered(2, "c"), live(2)],
    ]
    .into();
    let watch = watch_of(&server, Out::Terminal, &[]);
    watch.printed.wait_for("[up to number 2").await;
    let printed = watch.printed.text();
    let end = "[cleared: the session begins anew]\n#1 user\nb\n\n#2 user\nc\n\n\
               [up to number 2; what comes is new]\n";
    assert!(printed.ends_with(end), "{printed}");
    watch.end.abort();
}

#[tokio::test]
async fn a_watch_of_what_is_new_begins_behind_the_last_message() {
    let server = Scripted::on_tcp().await;
    server.state().watch_scripts = [vec![live(0)], vec![live(7)]].into();
    let watch = watch_of(&server, Out::Terminal, &["--new"]);
    watch.printed.wait_for("[no message yet]").await;
    watch.end.abort();
    server.state().sessions = vec![Session {
        last_sequence: 7,
        ..session("s")
    }];
    let watch = watch_of(&server, Out::Terminal, &["--new"]);
    watch.printed.wait_for("[up to number 7").await;
    watch.end.abort();
    let after: Vec<i64> = server
        .state()
        .watches
        .iter()
        .map(|w| w.after_sequence)
        .collect();
    assert_eq!(after, [0, 7]);
}

#[tokio::test]
async fn a_watch_that_is_refused_ends_with_the_reason() {
    let server = Scripted::on_tcp().await;
    let refused = failure(Code::ResourceExhausted, "TOO_MANY_WATCHERS", "too many");
    server.state().watch_scripts = [vec![Err(refused)]].into();
    let end = watch_of(&server, Out::Pipe, &[]).end.await.unwrap();
    let error = end.unwrap_err().to_string();
    assert_eq!(error, "too many (RESOURCE_EXHAUSTED, TOO_MANY_WATCHERS)");
    assert_eq!(server.state().watches.len(), 1);
}

#[tokio::test]
async fn an_answer_whose_stream_breaks_goes_on_after_its_last_event() {
    let server = Scripted::on_tcp().await;
    for out in [Out::Pipe, Out::Terminal] {
        server.state().chats.clear();
        let (printed, errors, all_answered) =
            talk(&server, out, &[], "lose\n").await.finish().await;
        assert!(printed.ends_with("one two three\n"), "{printed}");
        assert_eq!(errors, "");
        assert!(all_answered);
        let state = server.state();
        let after: Vec<i64> = state.chats.iter().map(|chat| chat.resume_after).collect();
        assert_eq!(after, [0, 2, 3]);
        let turns = state.chats.iter().map(|chat| &chat.turn_id);
        assert!(turns.clone().all(|turn| turn == &state.chats[0].turn_id));
        assert!(
            state.chats[1].messages.is_empty(),
            "it begins the turn again"
        );
    }
}

#[tokio::test]
async fn a_turn_outlives_a_terminal_and_ends_with_a_pipe() {
    let server = Scripted::on_tcp().await;
    talk(&server, Out::Pipe, &[], "hi\n").await.finish().await;
    talk(&server, Out::Terminal, &[], "hi\n")
        .await
        .finish()
        .await;
    let state = server.state();
    let told: Vec<OnDisconnect> = state.chats.iter().map(|c| c.on_disconnect()).collect();
    assert_eq!(told, [OnDisconnect::Stop, OnDisconnect::Continue]);
}

#[tokio::test]
async fn a_running_answer_is_shown_from_its_start_and_the_conversation_goes_on() {
    let server = Scripted::on_tcp().await;
    server.have_turn("t1", TurnState::Running, "step");
    let talk = talk(&server, Out::Pipe, &["--resume"], "hi\n").await;
    talk.printed.wait_for("one ").await;
    assert_eq!(talk.errors.text(), "[asked] step\n");
    server.step.notify_one();
    let (printed, _, all_answered) = talk.finish().await;
    assert_eq!(printed, "one two\nYou said: hi\n");
    assert!(all_answered);
    let state = server.state();
    assert_eq!(state.chats[0].turn_id, "t1");
    assert_eq!(
        (state.chats[0].messages.len(), state.chats[0].resume_after),
        (0, 0)
    );
}

#[tokio::test]
async fn an_answer_that_is_complete_is_shown_and_said_to_be() {
    let server = Scripted::on_tcp().await;
    server.have_turn("t1", TurnState::Completed, "stored");
    let talk = talk(&server, Out::Pipe, &["--resume"], "").await;
    let (printed, errors, all_answered) = talk.finish().await;
    assert_eq!(printed, "said before\n");
    assert_eq!(errors, "[this answer was complete already]\n");
    assert!(all_answered);
}

#[tokio::test]
async fn without_a_turn_there_is_nothing_to_go_on_with() {
    let server = Scripted::on_tcp().await;
    let talk = talk(&server, Out::Pipe, &["--resume"], "hi\n").await;
    let (printed, errors, all_answered) = talk.finish().await;
    assert_eq!(printed, "You said: hi\n");
    assert!(errors.contains("no turn is remembered"), "{errors}");
    assert!(all_answered);
}

/// Gives the session a turn that has failed, and what it had said.
fn have_failed_turn(server: &Scripted) {
    server.have_turn("t1", TurnState::Failed, "hi");
    let mut state = server.state();
    let turn = state.sessions[0].turn.as_mut().unwrap();
    turn.reason = "MODEL_STREAM_BROKEN".into();
    turn.error = "the model broke off".into();
    turn.partial_answer = Some(message(Role::Assistant, "You sa"));
}

#[tokio::test]
async fn why_a_turn_failed_is_told_and_it_is_asked_again_only_if_wanted() {
    let server = Scripted::on_tcp().await;
    have_failed_turn(&server);
    for (lines, chats) in [("n\n", 0), ("", 0), ("y\n", 1), ("n\n/retry\n", 2)] {
        let talk = talk(&server, Out::Terminal, &["--resume"], lines).await;
        let (printed, errors, _) = talk.finish().await;
        assert!(
            printed.contains("[asked] hi\n[said before it failed] You sa\n"),
            "{printed}"
        );
        assert_eq!(
            errors,
            "error: the last turn failed: the model broke off (MODEL_STREAM_BROKEN)\n"
        );
        assert_eq!(server.state().chats.len(), chats, "{lines:?}");
    }
    let state = server.state();
    assert_eq!(state.chats[0].messages[0].content, "hi");
    assert_ne!(state.chats[0].turn_id, "t1");
}

#[tokio::test]
async fn in_a_pipe_a_turn_that_failed_ends_the_conversation() {
    let server = Scripted::on_tcp().await;
    have_failed_turn(&server);
    let talk = talk(&server, Out::Pipe, &["--resume"], "y\n").await;
    let (printed, errors, all_answered) = talk.finish().await;
    assert_eq!(printed, "");
    assert!(
        errors.contains("the model broke off (MODEL_STREAM_BROKEN)"),
        "{errors}"
    );
    assert!(!all_answered);
    assert!(server.state().chats.is_empty());
}

async fn rewind_of(
    server: &Scripted,
    arguments: &[&str],
    lines: Option<&'static str>,
) -> Result<String, Error> {
    let arguments = [&["rewind", "--session", "s"], arguments].concat();
    let Program::Rewind(args) = parse(&server.target, &arguments) else {
        unreachable!()
    };
    let lines = lines.map(|lines| Lines::piped(Cursor::new(lines)));
    let mut out = Vec::new();
    change::rewind_on(&args, lines, &mut out).await?;
    Ok(String::from_utf8(out).unwrap())
}

/// Stores five messages, and a session that says so.
fn have_five_messages(server: &Scripted) {
    server.fill(&["a", "b", "c", "d", "e"]);
    server.state().sessions = vec![Session {
        message_count: 5,
        first_sequence: 1,
        last_sequence: 5,
        ..session("s")
    }];
}

#[tokio::test]
async fn a_rewind_asks_first_and_says_how_many_messages_went() {
    let server = Scripted::on_tcp().await;
    have_five_messages(&server);
    for refusal in ["n\n", "\n", ""] {
        let said = rewind_of(&server, &["--after=3"], Some(refusal)).await;
        assert_eq!(said.unwrap(), "nothing was deleted\n");
    }
    let said = rewind_of(&server, &["--after=5"], None).await;
    assert_eq!(said.unwrap(), "there is no message after number 5\n");
    assert!(server.state().rewinds.is_empty());
    assert!(
        server.state().pages.is_empty(),
        "it reads messages to count them"
    );
    let said = rewind_of(&server, &["--after=3"], Some("y\n")).await;
    assert_eq!(said.unwrap(), "2 messages deleted\n");
    let state = server.state();
    assert_eq!(state.rewinds[0].after_sequence, Some(3));
    assert_eq!(state.rewinds[0].request_id.len(), 26, "not a ULID");
    assert!(!state.rewinds[0].stop_turn);
}

#[tokio::test]
async fn a_rewind_that_nobody_can_be_asked_for_needs_to_be_meant() {
    let server = Scripted::on_tcp().await;
    have_five_messages(&server);
    let refused = rewind_of(&server, &["--after=3"], None).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "2 messages of the session s after number 3 would be deleted; --yes says that they shall"
    );
    assert!(server.state().rewinds.is_empty());
    let said = rewind_of(&server, &["--after=3", "--yes", "--stop-turn"], None).await;
    assert_eq!(said.unwrap(), "2 messages deleted\n");
    assert!(server.state().rewinds[0].stop_turn);
}

#[tokio::test]
async fn a_rewind_counts_messages_where_their_numbers_have_gaps() {
    let server = Scripted::on_tcp().await;
    have_five_messages(&server);
    server.state().messages.remove(3);
    server.state().sessions[0].message_count = 4;
    let refused = rewind_of(&server, &["--after=2"], None).await.unwrap_err();
    assert!(
        refused.to_string().starts_with("2 messages of"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_fork_says_what_it_copied_and_an_existing_session_is_left_alone() {
    let server = Scripted::on_tcp().await;
    have_five_messages(&server);
    let fork = async |arguments: &[&str]| {
        let arguments = [&["fork", "--session", "s"], arguments].concat();
        let Program::Fork(args) = parse(&server.target, &arguments) else {
            unreachable!()
        };
        let mut out = Vec::new();
        change::fork_on(&args, &mut out).await?;
        Ok::<_, Error>(String::from_utf8(out).unwrap())
    };
    let said = fork(&["--to=new", "--through=1"]).await.unwrap();
    assert_eq!(said, "the session new has 1 message now\n");
    let refused = fork(&["--to=taken"]).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the new session has messages (ALREADY_EXISTS, SESSION_EXISTS)"
    );
    let state = server.state();
    let through: Vec<Option<i64>> = state.forks.iter().map(|f| f.through_sequence).collect();
    assert_eq!(through, [Some(1), None]);
}

#[tokio::test]
async fn an_update_names_what_it_changes_and_nothing_else() {
    let server = Scripted::on_tcp().await;
    for (arguments, paths) in [
        (&["--title="][..], &["title"][..]),
        (&["--title=x", "--metadata=k=v"], &["title", "metadata"]),
        (&["--clear-metadata"], &["metadata"]),
        (&["--ttl=never"], &["ttl"]),
        (&["--ttl=default"], &["ttl"]),
        (&["--ttl=30d"], &["ttl"]),
    ] {
        let arguments = [&["update", "--session", "s"], arguments].concat();
        let Program::Update(args) = parse(&server.target, &arguments) else {
            unreachable!()
        };
        let mut out = Vec::new();
        change::update_on(&args, LOOK, &mut out).await.unwrap();
        assert!(String::from_utf8(out).unwrap().starts_with("SESSION"));
        let update = server.state().updates.last().unwrap().clone();
        assert_eq!(update.update_mask.unwrap().paths, paths);
    }
    let state = server.state();
    let sent: Vec<&Session> = state.updates.iter().flat_map(|u| &u.session).collect();
    assert_eq!(sent[1].title, "x");
    assert_eq!(sent[1].metadata["k"], "v");
    assert!(sent[2].metadata.is_empty());
    let ttl: Vec<Option<i64>> = sent.iter().map(|s| s.ttl.map(|ttl| ttl.seconds)).collect();
    assert_eq!(ttl[3..], [Some(0), None, Some(30 * 24 * 3_600)]);
}

#[test]
fn an_update_needs_a_change_and_pairs_need_a_key() {
    for arguments in [
        &["update", "--session=s"][..],
        &["update", "--session=s", "--metadata==v"],
        &["update", "--session=s", "--metadata=k"],
        &[
            "update",
            "--session=s",
            "--metadata=k=v",
            "--clear-metadata",
        ],
        &["update", "--session=s", "--ttl=0"],
        &["sessions", "--all", "--limit=3"],
        &["watch", "--session=s", "--new", "--after=3"],
        &["fork", "--session=s", "--to=a{b"],
    ] {
        let refused = Program::try_parse_from([&["chat-memory"], arguments].concat());
        assert!(refused.is_err(), "{arguments:?}");
    }
}
