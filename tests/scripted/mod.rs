//! A server that does as the test says: what a message says decides how it is answered. It keeps
//! its messages in a list and what it was asked in others. For tests of clients only.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, Ordering},
    },
};

use chat_memory::pb::{
    AppendRequest, AppendResponse, ChatRequest, ChatResponse, ClearRequest, ClearResponse,
    Completed, Delta, FinishReason, ForkRequest, ForkResponse, GetMessagesRequest,
    GetMessagesResponse, GetSessionRequest, GetSessionResponse, ListSessionsRequest,
    ListSessionsResponse, Message, RewindRequest, RewindResponse, Role, Session, Started,
    StopChatRequest, StopChatResponse, ToolCall, Turn, TurnState, UpdateSessionRequest,
    UpdateSessionResponse, WatchRequest, WatchResponse,
    chat_memory_server::{ChatMemory, ChatMemoryServer},
    chat_response::Event,
    watch_response::Event as WatchEvent,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Notify, mpsc, watch},
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream},
};
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt as _};

/// Messages or sessions of one page at most, so that few of them make many pages.
const PAGE_SIZE: usize = 3;

#[derive(Default)]
pub struct State {
    pub messages: Vec<Message>,
    pub chats: Vec<ChatRequest>,
    pub pages: Vec<GetMessagesRequest>,
    pub stops: Vec<StopChatRequest>,
    /// What the turns ask, by their ids: those that were begun here, and those of the test.
    pub questions: HashMap<String, String>,
    /// The sessions there are; the first one is the one whose messages are kept.
    pub sessions: Vec<Session>,
    pub lists: Vec<ListSessionsRequest>,
    pub updates: Vec<UpdateSessionRequest>,
    pub rewinds: Vec<RewindRequest>,
    pub forks: Vec<ForkRequest>,
    pub watches: Vec<WatchRequest>,
    /// What the calls of `Watch` give, one after the other. One without an error at its end stays
    /// open, and so does one that has no script.
    pub watch_scripts: VecDeque<Vec<Result<WatchEvent, Status>>>,
}

/// The server, as the test sees it.
#[derive(Clone)]
pub struct Scripted {
    state: Arc<Mutex<State>>,
    /// Lets an answer to "step" go on.
    pub step: Arc<Notify>,
    /// Becomes true when the client of an answer to "wait" is gone.
    pub gone: watch::Sender<bool>,
    pub health: tonic_health::server::HealthReporter,
    /// The address of the listener, as `--target` takes it.
    pub target: String,
    _socket_dir: Option<Arc<tempfile::TempDir>>,
}

impl Scripted {
    pub async fn on_tcp() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let incoming = TcpListenerStream::new(listener);
        Self::start(address.to_string(), None, |router| {
            tokio::spawn(router.serve_with_incoming(incoming));
        })
    }

    pub async fn on_unix() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("s.sock");
        let incoming = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
        let target = format!("unix:{}", path.display());
        Self::start(target, Some(Arc::new(dir)), |router| {
            tokio::spawn(router.serve_with_incoming(incoming));
        })
    }

    fn start(
        target: String,
        socket_dir: Option<Arc<tempfile::TempDir>>,
        serve: impl FnOnce(tonic::transport::server::Router),
    ) -> Self {
        let (health, health_service) = tonic_health::server::health_reporter();
        let scripted = Self {
            state: Arc::default(),
            step: Arc::default(),
            gone: watch::Sender::new(false),
            health,
            target,
            _socket_dir: socket_dir,
        };
        let service = ChatMemoryServer::new(scripted.clone());
        let router = Server::builder().add_service(health_service);
        serve(router.add_service(service));
        scripted
    }

    pub async fn set_health(&self, status: ServingStatus) {
        self.health
            .set_service_status("chatmemory.v1.ChatMemory", status)
            .await;
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Stores messages with these texts, questions and answers in turn.
    pub fn fill(&self, texts: &[&str]) {
        for (index, text) in texts.iter().enumerate() {
            let role = [Role::User, Role::Assistant][index % 2];
            self.store(message(role, text));
        }
    }

    pub fn store(&self, mut message: Message) -> Message {
        let mut state = self.state();
        message.sequence = state.messages.len() as i64 + 1;
        state.messages.push(message.clone());
        message
    }

    /// Makes this the turn of the only session, without messages of its own yet.
    pub fn have_turn(&self, turn_id: &str, state: TurnState, question: &str) {
        let mut kept = self.state();
        kept.questions.insert(turn_id.into(), question.into());
        let asked = match state {
            TurnState::Completed => Vec::new(),
            _ => vec![message(Role::User, question)],
        };
        let turn = Turn {
            turn_id: turn_id.into(),
            state: state.into(),
            attempt: 1,
            question: asked,
            ..Turn::default()
        };
        kept.sessions = vec![Session {
            session_id: "s".into(),
            turn: Some(turn),
            ..Session::default()
        }];
    }

    fn completed(&self, question: &str, answer: Message) -> Event {
        let question = self.store(message(Role::User, question));
        Event::Completed(Completed {
            messages: vec![question, self.store(answer)],
            usage: None,
            finish_reason: FinishReason::Stop.into(),
        })
    }

    /// Answers a turn. `Err` is the status that the stream ends with; `Ok(())` ends it as it is.
    async fn answer(&self, request: &ChatRequest, events: &Events) -> Result<(), Status> {
        let started = Started {
            turn_id: request.turn_id.clone(),
            ..Started::default()
        };
        let question = match request.messages.first() {
            Some(question) => {
                let mut state = self.state();
                let turn_id = request.turn_id.clone();
                state.questions.insert(turn_id, question.content.clone());
                question.content.clone()
            }
            None => match self.state().questions.get(&request.turn_id) {
                Some(question) => question.clone(),
                None => return Err(failure(Code::NotFound, "TURN_NOT_FOUND", "no such turn")),
            },
        };
        let question = question.as_str();
        events.send(Event::Started(started)).await;
        match question {
            "wait" => {
                events.text("waiting").await;
                events.sender.closed().await;
                self.gone.send_replace(true);
            }
            "step" => {
                events.text("one ").await;
                self.step.notified().await;
                events.text("two").await;
                let answer = message(Role::Assistant, "one two");
                events.send(self.completed(question, answer)).await;
            }
            "fail once" => {
                let turn = &request.turn_id;
                let attempts = self
                    .state()
                    .chats
                    .iter()
                    .filter(|c| c.turn_id == *turn)
                    .count();
                if attempts == 1 {
                    let text = "the model did not answer";
                    return Err(failure(Code::Unavailable, "MODEL_UNAVAILABLE", text));
                }
                let answer = message(Role::Assistant, "at last");
                events.send(self.completed(question, answer)).await;
            }
            "break off" => {
                events.text("half an ans").await;
                if request.messages.is_empty() {
                    let text = "its servers died";
                    return Err(failure(Code::Unavailable, "TURN_ABANDONED", text));
                }
            }
            // The way to the turn breaks after each of its first events.
            "lose" => {
                for (number, word) in [(2, "one "), (3, "two "), (4, "three")] {
                    events.text(word).await;
                    if request.resume_after < number && number < 4 {
                        return Err(failure(Code::Unavailable, "TURN_MOVED", "it has moved"));
                    }
                }
                let answer = message(Role::Assistant, "one two three");
                events.send(self.completed(question, answer)).await;
            }
            "think" => {
                for (reasoning, text) in [("hm, ", ""), ("so", ""), ("", "Look\x1b[2J it up")] {
                    let delta = Delta {
                        reasoning: reasoning.into(),
                        text: text.into(),
                        ..Delta::default()
                    };
                    events.send(Event::Delta(delta)).await;
                }
                let call = ToolCall {
                    id: "c1".into(),
                    name: "look".into(),
                    arguments: r#"{"up":true}"#.into(),
                };
                let answer = Message {
                    tool_calls: vec![call],
                    ..message(Role::Assistant, "Look it up")
                };
                events.send(self.completed(question, answer)).await;
            }
            "stored" => {
                let answer = message(Role::Assistant, "said before");
                events.send(self.completed(question, answer)).await;
            }
            _ => {
                let answer = format!("You said: {question}");
                for word in answer.split_inclusive(' ') {
                    events.text(word).await;
                }
                let answer = message(Role::Assistant, &answer);
                events.send(self.completed(question, answer)).await;
            }
        }
        Ok(())
    }
}

pub fn message(role: Role, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
        ..Message::default()
    }
}

fn outcome_unknown() -> Status {
    failure(
        Code::Unavailable,
        "OUTCOME_UNKNOWN",
        "the store did not answer",
    )
}

/// A status as the real server sends it.
pub fn failure(code: Code, reason: &str, text: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, "chatmemory.v1", HashMap::new());
    Status::with_error_details(code, text, details)
}

/// The way to the client of a turn.
struct Events {
    sender: mpsc::Sender<Result<ChatResponse, Status>>,
    /// The number of the last event.
    number: AtomicI64,
    /// Events up to this number are left out.
    resume_after: i64,
}

impl Events {
    async fn send(&self, event: Event) {
        let event_number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        if event_number <= self.resume_after {
            return;
        }
        let response = ChatResponse {
            event_number,
            event: Some(event),
        };
        // A client that is gone needs nothing more.
        let _ = self.sender.send(Ok(response)).await;
    }

    async fn text(&self, text: &str) {
        let delta = Delta {
            text: text.into(),
            ..Delta::default()
        };
        self.send(Event::Delta(delta)).await;
    }
}

#[tonic::async_trait]
impl ChatMemory for Scripted {
    type ChatStream = Pin<Box<dyn Stream<Item = Result<ChatResponse, Status>> + Send>>;

    async fn append(&self, _: Request<AppendRequest>) -> Result<Response<AppendResponse>, Status> {
        Err(Status::unimplemented("not part of the script"))
    }

    /// Pages of [`PAGE_SIZE`], oldest first; a token is the index of the first message.
    async fn get_messages(
        &self,
        request: Request<GetMessagesRequest>,
    ) -> Result<Response<GetMessagesResponse>, Status> {
        let request = request.into_inner();
        if request.session_id == "broken" {
            return Err(outcome_unknown());
        }
        let mut state = self.state();
        let count = state.messages.len();
        let after = request.after_sequence.unwrap_or(0);
        let older = |message: &&Message| message.sequence <= after;
        let first = match request.last_messages {
            Some(last) => count.saturating_sub(last as usize),
            None => state.messages.iter().filter(older).count(),
        };
        let from = request.page_token.parse().unwrap_or(first);
        let to = count.min(from + PAGE_SIZE.min(request.page_size as usize));
        let mut messages = state.messages[from..to].to_vec();
        if request.include_raw {
            for message in &mut messages {
                message.raw = "stored".into();
                message.raw_size = 6;
            }
        }
        state.pages.push(request);
        let next = (to < count).then(|| to.to_string());
        Ok(Response::new(GetMessagesResponse {
            messages,
            next_page_token: next.unwrap_or_default(),
            ..Default::default()
        }))
    }

    async fn clear(&self, _: Request<ClearRequest>) -> Result<Response<ClearResponse>, Status> {
        let deleted_count = self.state().messages.drain(..).count() as i64;
        Ok(Response::new(ClearResponse { deleted_count }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut state = self.state();
        state.watches.push(request.into_inner());
        let script = state.watch_scripts.pop_front().unwrap_or_default();
        let stays_open = script.last().is_none_or(Result::is_ok);
        let events = script
            .into_iter()
            .map(|event| event.map(|event| WatchResponse { event: Some(event) }));
        let events = tokio_stream::iter(events);
        Ok(Response::new(if stays_open {
            Box::pin(events.chain(tokio_stream::pending()))
        } else {
            Box::pin(events)
        }))
    }

    async fn get_session(
        &self,
        _: Request<GetSessionRequest>,
    ) -> Result<Response<GetSessionResponse>, Status> {
        let session = self.state().sessions.first().cloned();
        if session.is_none() {
            let text = "there is no such session";
            return Err(failure(Code::NotFound, "SESSION_NOT_FOUND", text));
        }
        Ok(Response::new(GetSessionResponse { session }))
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        let request = request.into_inner();
        self.state().updates.push(request.clone());
        Ok(Response::new(UpdateSessionResponse {
            session: request.session,
        }))
    }

    /// Pages of [`PAGE_SIZE`]; a token is the index of the first session.
    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        let count = state.sessions.len();
        let from = request.page_token.parse().unwrap_or(0);
        let to = count.min(from + PAGE_SIZE.min(request.page_size as usize));
        let sessions = state.sessions[from..to].to_vec();
        state.lists.push(request);
        let next = (to < count).then(|| to.to_string());
        Ok(Response::new(ListSessionsResponse {
            sessions,
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn rewind(
        &self,
        request: Request<RewindRequest>,
    ) -> Result<Response<RewindResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.rewinds.push(request.clone());
        let count = state.messages.len();
        let after = request.after_sequence.unwrap_or(0);
        state.messages.retain(|message| message.sequence <= after);
        let deleted_count = (count - state.messages.len()) as i64;
        Ok(Response::new(RewindResponse { deleted_count }))
    }

    async fn fork(&self, request: Request<ForkRequest>) -> Result<Response<ForkResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.forks.push(request.clone());
        if request.new_session_id == "taken" {
            let text = "the new session has messages";
            return Err(failure(Code::AlreadyExists, "SESSION_EXISTS", text));
        }
        let through = request.through_sequence.unwrap_or(i64::MAX);
        let copied = state.messages.iter().filter(|m| m.sequence <= through);
        let session = Session {
            session_id: request.new_session_id,
            message_count: copied.count() as i64,
            ..Session::default()
        };
        Ok(Response::new(ForkResponse {
            session: Some(session),
        }))
    }

    async fn stop_chat(
        &self,
        request: Request<StopChatRequest>,
    ) -> Result<Response<StopChatResponse>, Status> {
        self.state().stops.push(request.into_inner());
        Ok(Response::new(StopChatResponse::default()))
    }

    async fn chat(
        &self,
        request: Request<ChatRequest>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        let request = request.into_inner();
        self.state().chats.push(request.clone());
        if request.model == "no-such-model" {
            let mut details = ErrorDetails::new();
            details.set_error_info("UNKNOWN_MODEL", "chatmemory.v1", HashMap::new());
            let message = "model: is not known";
            let code = Code::InvalidArgument;
            return Err(Status::with_error_details(code, message, details));
        }
        let (sender, responses) = mpsc::channel(8);
        let events = Events {
            sender,
            number: AtomicI64::new(0),
            resume_after: request.resume_after,
        };
        let scripted = self.clone();
        tokio::spawn(async move {
            if let Err(status) = scripted.answer(&request, &events).await {
                let _ = events.sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}
