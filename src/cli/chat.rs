//! `chat-memory chat`: a conversation in a terminal, or in a pipe, through the `Chat` rpc.
//!
//! Lines are read on a thread of their own, for line editing blocks; see [`Lines`]. All else is
//! one loop: read a line, act on it. While an answer streams in, an interrupt ends it.

use std::{
    io::{self, BufRead, IsTerminal as _, Read as _, Write},
    process::ExitCode,
    sync::mpsc as blocking,
    time::Duration,
};

use rustyline::{DefaultEditor, error::ReadlineError};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tonic::{Code, Status, Streaming, transport::Channel};
use ulid::Ulid;

use super::{
    Error,
    args::ChatArgs,
    client::{self, Pauses},
    exit_code,
    history::{self, Pages},
    text::{self, Style},
};
use crate::{
    message::MESSAGE_BYTES_MAX,
    pb::{
        ChatRequest, ChatResponse, ClearRequest, Completed, Delta, FinishReason,
        GetMessagesRequest, GetSessionRequest, Message, OnDisconnect, Role, StopChatRequest, Turn,
        TurnState, chat_memory_client::ChatMemoryClient, chat_response::Event,
    },
};

/// Messages that are shown at the start.
const RECENT_AT_START: i32 = 4;
/// Messages that `/history` shows.
const RECENT_ON_REQUEST: i32 = 20;

/// Tries in a row to go on with an answer whose stream has broken, and the longest pause between two:
/// together some 20 seconds, in which the turns of a server that has died find another one.
const RESUMES_MAX: u32 = 10;
const RESUME_PAUSE_MAX: Duration = Duration::from_secs(4);

const PROMPT: &str = "you> ";
const HOW_TO_LEAVE: &str = "(Ctrl-D or /quit leaves)";

const HELP: &str = "\
/history      shows the last 20 messages of the session
/history N    shows the last N
/history all  shows all
/retry        tries again the message that got no answer
/clear        deletes the session, after asking
/quit         leaves, as does Ctrl-D
//text        sends a message that begins with a slash
Ctrl-C        stops an answer; what there is of it stays in the session";

/// Talks over stdin and stdout: with line editing and prompts if both are a terminal, line by line
/// otherwise.
pub async fn run(args: ChatArgs) -> ExitCode {
    exit_code(talk(&args).await)
}

async fn talk(args: &ChatArgs) -> Result<ExitCode, Error> {
    let client = client::connect_api(&args.target.target).await?;
    let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if !is_terminal {
        // Nobody is there to be asked; Ctrl-C ends the program, as it does in any pipe.
        let (_interrupt, interrupts) = mpsc::channel(1);
        let lines = Lines::piped(io::BufReader::new(io::stdin()));
        let screen = Screen::piped(io::stdout(), io::stderr());
        let mut chat = Chat::new(client, args, lines, screen, interrupts);
        if !args.resume || chat.resume().await? {
            chat.run().await?;
        }
        return Ok(if chat.all_answered() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }

    let style = Style {
        color: args.color.allowed(),
    };
    let screen = Screen::terminal(io::stdout(), io::stderr(), style);
    let (interrupt, interrupts) = mpsc::channel(1);
    let mut chat = Chat::new(client, args, Lines::edited()?, screen, interrupts);
    chat.greet(args).await?;
    // From here on, and not only once the task has begun, Ctrl-C does not end the program.
    let mut signals = signal(SignalKind::interrupt()).map_err(Error::Input)?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            // If the channel is full, an interrupt is on its way already.
            let _ = interrupt.try_send(());
        }
    });
    if !args.resume || chat.resume().await? {
        chat.run().await?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What came of asking for a line.
#[derive(Debug)]
pub enum Line {
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// Ctrl-D, or the end of the input.
    End,
    Failed(io::Error),
}

/// What a line is asked for.
#[derive(Debug)]
struct Question {
    prompt: String,
    /// Whether the cursor keys bring the answer back.
    remember: bool,
}

/// Lines of input. A thread of its own reads them, each only when asked for, so that the terminal
/// is left alone while an answer is printed. The thread is never waited for: at the end of the
/// program it may be in a read that nothing ends.
#[derive(Debug)]
pub struct Lines {
    questions: blocking::Sender<Question>,
    answers: mpsc::Receiver<Line>,
}

impl Lines {
    /// Lines from the terminal, with editing. They are remembered while the program runs.
    pub fn edited() -> Result<Self, Error> {
        let editor = DefaultEditor::new();
        let mut editor = editor.map_err(|error| Error::Input(io::Error::other(error)))?;
        Ok(Self::new(move |question| {
            match editor.readline(&question.prompt) {
                Ok(text) => {
                    if question.remember {
                        // Not remembering a line is no reason to lose it.
                        let _ = editor.add_history_entry(&text);
                    }
                    Line::Text(text)
                }
                Err(ReadlineError::Interrupted) => Line::Interrupted,
                Err(ReadlineError::Eof) => Line::End,
                Err(ReadlineError::Io(error)) => Line::Failed(error),
                Err(error) => Line::Failed(io::Error::other(error)),
            }
        }))
    }

    /// Lines as they are, without prompts.
    pub fn piped(mut input: impl BufRead + Send + 'static) -> Self {
        Self::new(move |_| match read_line(&mut input) {
            Ok(Some(text)) => Line::Text(text),
            Ok(None) => Line::End,
            Err(error) => Line::Failed(error),
        })
    }

    fn new(mut read: impl FnMut(Question) -> Line + Send + 'static) -> Self {
        let (questions, asked) = blocking::channel();
        let (answer, answers) = mpsc::channel(1);
        std::thread::spawn(move || {
            for question in asked {
                if answer.blocking_send(read(question)).is_err() {
                    return;
                }
            }
        });
        Self { questions, answers }
    }

    async fn ask(&mut self, prompt: &str, remember: bool) -> Line {
        let question = Question {
            prompt: prompt.to_owned(),
            remember,
        };
        // A thread that is gone has panicked, and has said so on stderr.
        if self.questions.send(question).is_err() {
            return Line::End;
        }
        self.answers.recv().await.unwrap_or(Line::End)
    }

    /// Asks whether something is meant. Whoever leaves says no.
    pub(super) async fn confirm(&mut self, question: &str) -> Result<bool, Error> {
        match self.ask(question, false).await {
            Line::Text(answer) => Ok(matches!(answer.trim(), "y" | "Y" | "yes")),
            Line::Interrupted | Line::End => Ok(false),
            Line::Failed(error) => Err(Error::Input(error)),
        }
    }
}

/// Reads a line of at most the size of a message.
fn read_line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let bytes_max = MESSAGE_BYTES_MAX + "\r\n".len();
    let mut bytes = Vec::new();
    input
        .take(bytes_max as u64 + 1)
        .read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() > bytes_max {
        let rule = format!("a line is longer than a message may be: {MESSAGE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, rule));
    }
    let line = String::from_utf8(bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a line is not UTF-8"))?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(Some(line.strip_suffix('\r').unwrap_or(line).to_owned()))
}

/// Where things are written, and how.
pub struct Screen {
    /// Takes the texts of answers, and what a command was to show.
    answers: Box<dyn Write + Send>,
    /// Takes what accompanies the answers: reasoning, tool calls, remarks.
    asides: Aside,
    errors: Box<dyn Write + Send>,
    style: Style,
}

/// Where asides go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aside {
    /// Between the answers: a person reads both.
    WithAnswers,
    /// To the errors, so that the answers stay clean for the next program.
    WithErrors,
}

impl Screen {
    /// A terminal: all in one place.
    pub fn terminal(
        answers: impl Write + Send + 'static,
        errors: impl Write + Send + 'static,
        style: Style,
    ) -> Self {
        Self {
            answers: Box::new(answers),
            asides: Aside::WithAnswers,
            errors: Box::new(errors),
            style,
        }
    }

    /// A pipe: answers and nothing else in one place, all else in the other.
    pub fn piped(
        answers: impl Write + Send + 'static,
        errors: impl Write + Send + 'static,
    ) -> Self {
        Self {
            answers: Box::new(answers),
            asides: Aside::WithErrors,
            errors: Box::new(errors),
            style: Style::PLAIN,
        }
    }

    /// More of an answer, shown at once.
    fn answer(&mut self, text: &str) -> io::Result<()> {
        self.bytes(text.as_bytes())
    }

    /// More of an aside, shown at once.
    fn aside(&mut self, text: &str) -> io::Result<()> {
        let out = match self.asides {
            Aside::WithAnswers => &mut self.answers,
            Aside::WithErrors => &mut self.errors,
        };
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// An aside of one line.
    pub(super) fn remark(&mut self, text: &str) -> io::Result<()> {
        self.aside(&format!("{}\n", self.style.dim(text)))
    }

    fn error(&mut self, text: &str) -> io::Result<()> {
        self.notice(&format!("error: {text}"))
    }

    /// A line for whoever reads the errors.
    pub(super) fn notice(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.errors, "{text}")?;
        self.errors.flush()
    }

    /// What a command was to show, as it is.
    pub(super) fn bytes(&mut self, shown: &[u8]) -> io::Result<()> {
        self.answers.write_all(shown)?;
        self.answers.flush()
    }

    pub(super) fn style(&self) -> Style {
        self.style
    }

    /// Whether a person reads along, who can be asked.
    fn is_terminal(&self) -> bool {
        self.asides == Aside::WithAnswers
    }
}

/// What a line means.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Say(&'a str),
    /// Show the last that many messages, or all.
    History(Option<i32>),
    Retry,
    Clear,
    Help,
    Quit,
    /// A command that is none, or that does not take what follows it.
    Unknown(&'a str),
}

fn parse(line: &str) -> Input<'_> {
    let trimmed = line.trim();
    if trimmed.is_empty() {
        return Input::Nothing;
    }
    if trimmed.starts_with("//") {
        return Input::Say(&trimmed[1..]);
    }
    if !trimmed.starts_with('/') {
        // Spaces at the edges may mean something to the model.
        return Input::Say(line);
    }
    let (command, rest) = match trimmed.split_once(char::is_whitespace) {
        Some((command, rest)) => (command, rest.trim()),
        None => (trimmed, ""),
    };
    match (command, rest) {
        ("/history", "") => Input::History(Some(RECENT_ON_REQUEST)),
        ("/history", "all") => Input::History(None),
        ("/history", count) => match count.parse() {
            Ok(count) if count >= 1 => Input::History(Some(count)),
            _ => Input::Unknown(trimmed),
        },
        ("/retry", "") => Input::Retry,
        ("/clear", "") => Input::Clear,
        ("/help", "") => Input::Help,
        ("/quit" | "/exit", "") => Input::Quit,
        _ => Input::Unknown(trimmed),
    }
}

/// A conversation: its lines in, its answers out.
pub struct Chat {
    client: ChatMemoryClient<Channel>,
    /// What all turns have in common.
    template: ChatRequest,
    lines: Lines,
    screen: Screen,
    /// Each one ends the answer that is streaming in.
    interrupts: mpsc::Receiver<()>,
    /// The last turn, if it got no answer. Tried again under the same `turn_id`, it cannot be
    /// stored twice.
    unanswered: Option<ChatRequest>,
    failed_turns: u64,
}

/// How a turn ended.
enum TurnEnd {
    Completed,
    Stopped,
    Failed(Status),
}

impl Chat {
    pub fn new(
        client: ChatMemoryClient<Channel>,
        args: &ChatArgs,
        lines: Lines,
        screen: Screen,
        interrupts: mpsc::Receiver<()>,
    ) -> Self {
        let template = ChatRequest {
            session_id: args.session.session.as_str().to_owned(),
            model: args.model.clone().unwrap_or_default(),
            system_prompt: args.system_prompt.clone().unwrap_or_default(),
            last_messages: args
                .last_messages
                .map(|count| i32::try_from(count).unwrap_or(i32::MAX)),
            // A terminal that dies can come back to its answer (`--resume`); Ctrl-C stops one by a
            // call of its own. A pipe that ends does not want the rest.
            on_disconnect: match screen.is_terminal() {
                true => OnDisconnect::Continue.into(),
                false => OnDisconnect::Stop.into(),
            },
            ..ChatRequest::default()
        };
        Self {
            client,
            template,
            lines,
            screen,
            interrupts,
            unanswered: None,
            failed_turns: 0,
        }
    }

    /// Whether every turn so far got its answer.
    pub fn all_answered(&self) -> bool {
        self.failed_turns == 0
    }

    /// Says where we are, and shows the last few messages.
    pub async fn greet(&mut self, args: &ChatArgs) -> Result<(), Error> {
        let session = text::one_line(&self.template.session_id).into_owned();
        let server = args.target.target.to_string();
        self.screen
            .remark(&format!("session {session} on {server}; /help helps"))?;
        if args.resume {
            // Its last exchange comes anyway.
            return Ok(());
        }
        let request = GetMessagesRequest {
            last_messages: Some(RECENT_AT_START),
            ..history::request(&args.session.session)
        };
        let mut recent = Vec::new();
        let mut pages = Pages::new(self.client.clone(), request);
        loop {
            match pages.next().await {
                Ok(Some(page)) => recent.extend(page),
                Ok(None) => break,
                // The store may be back before the first message.
                Err(Error::Status(status)) => {
                    return Ok(self.screen.error(&client::describe(&status))?);
                }
                Err(error) => return Err(error),
            }
        }
        let (Some(first), Some(last)) = (recent.first(), recent.last()) else {
            return Ok(self.screen.remark("it has no messages yet\n")?);
        };
        let is_all = first.sequence == 1 || recent.len() < RECENT_AT_START as usize;
        let facts = if is_all {
            format!("it has {}:\n", messages(recent.len() as i64))
        } else {
            let last = last.sequence;
            format!("its last messages, up to number {last} (/history all shows all):\n")
        };
        self.screen.remark(&facts)?;
        self.show(&recent)
    }

    /// Goes on with the session's last turn: prints its answer, or says why there is none. Tells
    /// whether the conversation is to go on.
    pub async fn resume(&mut self) -> Result<bool, Error> {
        let session_id = &self.template.session_id;
        let request = client::request(GetSessionRequest {
            session_id: session_id.clone(),
        });
        let turn = match self.client.get_session(request).await {
            Ok(answer) => answer.into_inner().session.and_then(|session| session.turn),
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(status.into()),
        };
        let Some(turn) = turn else {
            self.screen
                .remark("[there is no answer to go on with: no turn is remembered]")?;
            return Ok(true);
        };
        if turn.state() == TurnState::Failed {
            return self.resume_failed(turn).await;
        }
        for question in &turn.question {
            let question = text::plain(&question.content);
            self.screen.remark(&format!("[asked] {question}"))?;
        }
        let follow = ChatRequest {
            session_id: session_id.clone(),
            turn_id: turn.turn_id.clone(),
            ..ChatRequest::default()
        };
        self.turn(follow).await?;
        if turn.state() == TurnState::Completed && self.all_answered() {
            self.screen.remark("[this answer was complete already]")?;
        }
        Ok(self.screen.is_terminal() || self.all_answered())
    }

    /// Says why a turn failed, and asks again if that is wanted: as a new turn, for the settings of
    /// the old one are not known here, and nothing of it is in the history.
    async fn resume_failed(&mut self, turn: Turn) -> Result<bool, Error> {
        for question in &turn.question {
            let question = text::plain(&question.content);
            self.screen.remark(&format!("[asked] {question}"))?;
        }
        if let Some(said) = turn.partial_answer.filter(|said| !said.content.is_empty()) {
            let said = text::plain(&said.content);
            self.screen
                .remark(&format!("[said before it failed] {said}"))?;
        }
        let (reason, error) = (text::one_line(&turn.reason), text::one_line(&turn.error));
        self.failed_turns += 1;
        self.screen
            .error(&format!("the last turn failed: {error} ({reason})"))?;
        if !self.screen.is_terminal() || turn.question.is_empty() {
            return Ok(self.screen.is_terminal());
        }
        let request = ChatRequest {
            messages: turn.question,
            turn_id: Ulid::generate().to_string(),
            ..self.template.clone()
        };
        if self.lines.confirm("ask again? [y/N] ").await? {
            self.turn(request).await?;
        } else {
            self.unanswered = Some(request);
        }
        Ok(true)
    }

    /// Reads and answers until the input ends.
    pub async fn run(&mut self) -> Result<(), Error> {
        loop {
            let line = match self.lines.ask(PROMPT, true).await {
                Line::Text(line) => line,
                Line::Interrupted => {
                    self.screen.remark(HOW_TO_LEAVE)?;
                    continue;
                }
                Line::End => return Ok(()),
                Line::Failed(error) => return Err(Error::Input(error)),
            };
            match parse(&line) {
                Input::Nothing => {}
                Input::Say(text) => {
                    let request = ChatRequest {
                        messages: vec![Message {
                            role: Role::User.into(),
                            content: text.to_owned(),
                            ..Message::default()
                        }],
                        turn_id: Ulid::generate().to_string(),
                        ..self.template.clone()
                    };
                    self.turn(request).await?;
                }
                Input::Retry => match self.unanswered.take() {
                    Some(request) => self.turn(request).await?,
                    None => self.screen.remark("there is nothing to retry")?,
                },
                Input::History(count) => self.show_history(count).await?,
                Input::Clear => self.clear().await?,
                Input::Help => self.screen.aside(&format!("{HELP}\n"))?,
                Input::Quit => return Ok(()),
                Input::Unknown(command) => {
                    let command = text::one_line(command);
                    self.screen.remark(&format!(
                        "{command} is no command; /help lists them, //… sends such a text"
                    ))?;
                }
            }
        }
    }

    /// Runs a turn, and says how it ended.
    async fn turn(&mut self, request: ChatRequest) -> Result<(), Error> {
        // What was pressed before this turn does not mean it.
        while self.interrupts.try_recv().is_ok() {}
        self.unanswered = None;
        let mut answer = Answer::default();
        let end = tokio::select! {
            // An answer that is complete is not stopped any more.
            biased;
            end = stream_turn(&mut self.client, &request, &mut answer, &mut self.screen) => end?,
            Some(()) = self.interrupts.recv() => TurnEnd::Stopped,
        };
        if matches!(end, TurnEnd::Stopped) {
            let stop = client::request(StopChatRequest {
                session_id: request.session_id.clone(),
                turn_id: request.turn_id.clone(),
                discard: false,
            });
            if let Err(status) = self.client.stop_chat(stop).await
                // The turn has not begun.
                && status.code() != Code::NotFound
            {
                answer.finish_line(&mut self.screen)?;
                let status = client::describe(&status);
                self.screen
                    .error(&format!("the answer goes on, it was not stopped: {status}"))?;
            }
        }
        answer.finish_line(&mut self.screen)?;
        match end {
            TurnEnd::Completed => {}
            TurnEnd::Stopped => self.screen.remark("[stopped]")?,
            TurnEnd::Failed(status) => {
                self.failed_turns += 1;
                self.screen.error(&client::describe(&status))?;
                // To follow a turn that has failed would only tell the same again.
                if request.messages.is_empty() && !may_go_on(&status) {
                    return Ok(());
                }
                if may_retry(&status) {
                    self.screen
                        .remark("/retry tries it again, and stores it once")?;
                }
                self.unanswered = Some(request);
            }
        }
        Ok(())
    }

    async fn show_history(&mut self, count: Option<i32>) -> Result<(), Error> {
        let request = GetMessagesRequest {
            session_id: self.template.session_id.clone(),
            page_size: 100,
            last_messages: count,
            ..GetMessagesRequest::default()
        };
        while self.interrupts.try_recv().is_ok() {}
        let mut pages = Pages::new(self.client.clone(), request);
        loop {
            let page = tokio::select! {
                page = pages.next() => page,
                Some(()) = self.interrupts.recv() => return Ok(self.screen.remark("[stopped]")?),
            };
            match page {
                Ok(Some(messages)) => self.show(&messages)?,
                Ok(None) => return Ok(()),
                Err(Error::Status(status)) => {
                    return Ok(self.screen.error(&client::describe(&status))?);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn show(&mut self, messages: &[Message]) -> Result<(), Error> {
        let mut shown = Vec::new();
        for message in messages {
            history::write_message(&mut shown, message, self.screen.style)?;
        }
        Ok(self.screen.bytes(&shown)?)
    }

    async fn clear(&mut self) -> Result<(), Error> {
        let session = text::one_line(&self.template.session_id).into_owned();
        let question = format!("delete all messages of the session {session}? [y/N] ");
        if !self.lines.confirm(&question).await? {
            return Ok(self.screen.remark("nothing was deleted")?);
        }
        let request = client::request(ClearRequest {
            session_id: self.template.session_id.clone(),
        });
        match self.client.clear(request).await {
            Ok(response) => {
                // Its question belongs to what was deleted.
                self.unanswered = None;
                let count = messages(response.into_inner().deleted_count);
                Ok(self.screen.remark(&format!("{count} deleted"))?)
            }
            Err(status) => Ok(self.screen.error(&client::describe(&status))?),
        }
    }
}

/// `1 message`, `2 messages`.
pub(super) fn messages(count: i64) -> String {
    match count {
        1 => "1 message".to_owned(),
        count => format!("{count} messages"),
    }
}

/// Whether the same turn may well succeed if it is tried again.
fn may_retry(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable
        | Code::Aborted
        | Code::ResourceExhausted
        | Code::DeadlineExceeded
        | Code::Cancelled
        // A connection that broke has no code of the server's.
        | Code::Unknown => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

/// Whether a turn goes on although a stream of it ended so: what broke is the way to it, its server
/// or the store, not the turn.
fn may_go_on(status: &Status) -> bool {
    /// With these, the turn itself has failed.
    const TURN_FAILED: [&str; 3] = ["MODEL_UNAVAILABLE", "MODEL_STREAM_BROKEN", "TURN_ABANDONED"];
    let has_failed = client::reason(status).is_some_and(|reason| TURN_FAILED.contains(&&*reason));
    client::is_broken(status) && !has_failed
}

/// Runs a turn and prints its answer as it comes. If its stream breaks, goes on after the last event.
async fn stream_turn(
    client: &mut ChatMemoryClient<Channel>,
    request: &ChatRequest,
    answer: &mut Answer,
    screen: &mut Screen,
) -> Result<TurnEnd, Error> {
    let mut request = request.clone();
    let mut pauses = Pauses::new(RESUMES_MAX, RESUME_PAUSE_MAX);
    loop {
        let status = match client.chat(request.clone()).await {
            Ok(response) => {
                let events = response.into_inner();
                match print_events(events, &mut request, &mut pauses, answer, screen).await? {
                    None => return Ok(TurnEnd::Completed),
                    Some(status) => status,
                }
            }
            Err(status) => status,
        };
        // One that has not begun is tried again by whoever asked.
        let is_followed = request.messages.is_empty();
        let pause = pauses.next(&status);
        let Some(pause) = pause.filter(|_| is_followed && may_go_on(&status)) else {
            return Ok(TurnEnd::Failed(status));
        };
        // A short pause mends most of it, and nobody need know.
        if pause > client::PAUSE_FIRST {
            let (status, seconds) = (client::describe(&status), pause.as_secs_f64());
            answer.interject(&format!("[{status}; going on in {seconds:.1} s]"), screen)?;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Prints the events of a stream. Returns how it broke, or nothing if the turn has completed. From the
/// first event on, the request is to follow the turn, not to begin it: what was cleared meanwhile must
/// not come back.
async fn print_events(
    mut events: Streaming<ChatResponse>,
    request: &mut ChatRequest,
    pauses: &mut Pauses,
    answer: &mut Answer,
    screen: &mut Screen,
) -> Result<Option<Status>, Error> {
    loop {
        let response = match events.message().await {
            Ok(Some(response)) => response,
            Ok(None) => {
                let status = Status::unavailable("the stream ended before the answer was stored");
                return Ok(Some(status));
            }
            Err(status) => return Ok(Some(status)),
        };
        pauses.restart();
        *request = ChatRequest {
            session_id: std::mem::take(&mut request.session_id),
            turn_id: std::mem::take(&mut request.turn_id),
            resume_after: response.event_number,
            ..ChatRequest::default()
        };
        match response.event {
            Some(Event::Started(started)) if started.attempt > 1 => {
                if answer.has_begun() {
                    answer.finish_line(screen)?;
                    screen.remark("[the answer begins anew]")?;
                }
                *answer = Answer::default();
            }
            // An event that this program does not know is for others.
            None | Some(Event::Started(_)) => {}
            Some(Event::Delta(delta)) => answer.delta(&delta, screen)?,
            Some(Event::Completed(completed)) => {
                answer.completed(&completed, screen)?;
                return Ok(None);
            }
        }
    }
}

/// What of an answer is on the screen.
#[derive(Debug, Default)]
struct Answer {
    /// Some of its text.
    text_shown: bool,
    /// An unfinished line, and what it is of.
    open_line: Option<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Text,
    Reasoning,
}

impl Answer {
    fn has_begun(&self) -> bool {
        self.text_shown || self.open_line.is_some()
    }

    /// Says something while the answer is not complete. In a pipe, the text stays as it is.
    fn interject(&mut self, remark: &str, screen: &mut Screen) -> io::Result<()> {
        if screen.is_terminal() || self.open_line == Some(Piece::Reasoning) {
            self.finish_line(screen)?;
        }
        screen.remark(remark)
    }

    fn delta(&mut self, delta: &Delta, screen: &mut Screen) -> io::Result<()> {
        if !delta.reasoning.is_empty() {
            if self.open_line != Some(Piece::Reasoning) {
                self.finish_line(screen)?;
                screen.aside(&screen.style.dim("[reasoning] "))?;
            }
            let reasoning = text::plain(&delta.reasoning);
            screen.aside(&screen.style.dim(&reasoning))?;
            self.open_line = Some(Piece::Reasoning);
        }
        if !delta.text.is_empty() {
            self.text(&delta.text, screen)?;
        }
        // Tool calls come in pieces; `completed` has them whole.
        Ok(())
    }

    fn text(&mut self, text: &str, screen: &mut Screen) -> io::Result<()> {
        if self.open_line == Some(Piece::Reasoning) {
            self.finish_line(screen)?;
        }
        let safe = text::plain(text);
        screen.answer(&safe)?;
        self.text_shown = true;
        // A text of nothing but carriage returns leaves the line as it is.
        if !safe.is_empty() {
            self.open_line = (!safe.ends_with('\n')).then_some(Piece::Text);
        }
        Ok(())
    }

    fn completed(&mut self, completed: &Completed, screen: &mut Screen) -> io::Result<()> {
        let answers = || {
            let messages = completed.messages.iter();
            messages.filter(|message| message.role() == Role::Assistant)
        };
        // The stored answer of a turn that was complete already comes without deltas.
        if !self.text_shown {
            for answer in answers().filter(|answer| !answer.content.is_empty()) {
                self.text(&answer.content, screen)?;
            }
        }
        self.finish_line(screen)?;
        for call in answers().flat_map(|answer| &answer.tool_calls) {
            screen.remark(&history::tool_call(call))?;
        }
        let note = match completed.finish_reason() {
            FinishReason::Length => Some("[cut off: the answer reached its limit]"),
            FinishReason::ContentFilter => Some("[the provider held the rest back]"),
            FinishReason::Unspecified
            | FinishReason::Stop
            | FinishReason::ToolCalls
            | FinishReason::Other => None,
        };
        if let Some(note) = note {
            screen.remark(note)?;
        }
        if answers().any(|answer| answer.interrupted) {
            screen.remark("[interrupted]")?;
        }
        Ok(())
    }

    /// Ends the unfinished line, if there is one, where it was begun.
    fn finish_line(&mut self, screen: &mut Screen) -> io::Result<()> {
        match self.open_line.take() {
            Some(Piece::Text) => screen.answer("\n"),
            Some(Piece::Reasoning) => screen.aside("\n"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_line_is_a_message_unless_it_begins_with_a_slash() {
        assert_eq!(parse("hi /clear"), Input::Say("hi /clear"));
        assert_eq!(parse("  indented "), Input::Say("  indented "));
        assert_eq!(parse("//etc/hosts"), Input::Say("/etc/hosts"));
        assert_eq!(parse(" \t"), Input::Nothing);
    }

    #[test]
    fn commands_are_known_by_their_whole_name() {
        for (line, input) in [
            ("/history", Input::History(Some(RECENT_ON_REQUEST))),
            ("/history 5", Input::History(Some(5))),
            (" /history  all ", Input::History(None)),
            ("/history 0", Input::Unknown("/history 0")),
            (
                "/history 99999999999",
                Input::Unknown("/history 99999999999"),
            ),
            ("/retry", Input::Retry),
            ("/clear", Input::Clear),
            ("/clear now", Input::Unknown("/clear now")),
            ("/clearing", Input::Unknown("/clearing")),
            ("/help", Input::Help),
            ("/quit", Input::Quit),
            ("/", Input::Unknown("/")),
        ] {
            assert_eq!(parse(line), input, "{line}");
        }
    }

    #[test]
    fn piped_lines_end_at_newlines_and_keep_their_letters() {
        let mut input = Cursor::new("größe\r\n\n会話 🎉");
        let mut lines = Vec::new();
        while let Some(line) = read_line(&mut input).unwrap() {
            lines.push(line);
        }
        assert_eq!(lines, ["größe", "", "会話 🎉"]);
    }

    #[test]
    fn a_line_of_a_messages_size_is_read_and_a_longer_one_is_refused() {
        let longest = "x".repeat(MESSAGE_BYTES_MAX) + "\r\n";
        let line = read_line(&mut Cursor::new(longest)).unwrap();
        assert_eq!(line.map(|line| line.len()), Some(MESSAGE_BYTES_MAX));
        let endless = io::BufReader::new(io::repeat(b'x'));
        let refused = read_line(&mut { endless }).unwrap_err().to_string();
        assert!(refused.contains("longer than a message"), "{refused}");
    }

    #[test]
    fn a_line_that_is_not_utf8_is_refused() {
        let refused = read_line(&mut Cursor::new(b"\xff\n")).unwrap_err();
        assert_eq!(refused.to_string(), "a line is not UTF-8");
    }
}
