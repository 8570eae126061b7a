//! A server that does as the test says: what a message says decides how it is answered. It keeps
//! its messages in a list and what it was asked in others. For tests of clients only.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use chat_memory::pb::{
    AppendRequest, AppendResponse, ChatRequest, ChatResponse, ClearRequest, ClearResponse,
    Completed, Delta, FinishReason, GetMessagesRequest, GetMessagesResponse, Message, OnDisconnect,
    Role, Started, StopChatRequest, StopChatResponse, ToolCall,
    chat_memory_server::{ChatMemory, ChatMemoryServer},
    chat_response::Event,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Notify, mpsc, watch},
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream},
};
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt as _};

/// Messages of one page at most, so that few messages make many pages.
const PAGE_SIZE: usize = 3;

#[derive(Default)]
pub struct State {
    pub messages: Vec<Message>,
    pub chats: Vec<ChatRequest>,
    pub pages: Vec<GetMessagesRequest>,
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

    fn completed(&self, request: &ChatRequest, answer: Message) -> Event {
        let question = self.store(request.messages[0].clone());
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
        events.send(Event::Started(started)).await;
        let question = request.messages[0].content.as_str();
        match question {
            "wait" => {
                events.text("waiting").await;
                events.sender.closed().await;
                assert_eq!(request.on_disconnect(), OnDisconnect::Stop);
                self.gone.send_replace(true);
            }
            "step" => {
                events.text("one ").await;
                self.step.notified().await;
                events.text("two").await;
                let answer = message(Role::Assistant, "one two");
                events.send(self.completed(request, answer)).await;
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
                    return Err(outcome_unknown());
                }
                let answer = message(Role::Assistant, "at last");
                events.send(self.completed(request, answer)).await;
            }
            "break off" => events.text("half an ans").await,
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
                events.send(self.completed(request, answer)).await;
            }
            "stored" => {
                let answer = message(Role::Assistant, "said before");
                events.send(self.completed(request, answer)).await;
            }
            _ => {
                let answer = format!("You said: {question}");
                for word in answer.split_inclusive(' ') {
                    events.text(word).await;
                }
                let answer = message(Role::Assistant, &answer);
                events.send(self.completed(request, answer)).await;
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
    let mut details = ErrorDetails::new();
    details.set_error_info("OUTCOME_UNKNOWN", "chatmemory.v1", HashMap::new());
    Status::with_error_details(Code::Unavailable, "the store did not answer", details)
}

/// The way to the client of a turn.
struct Events {
    sender: mpsc::Sender<Result<ChatResponse, Status>>,
}

impl Events {
    async fn send(&self, event: Event) {
        let response = ChatResponse {
            event: Some(event),
            ..ChatResponse::default()
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
        let first = match request.last_messages {
            Some(last) => count.saturating_sub(last as usize),
            None => 0,
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

    type WatchStream =
        Pin<Box<dyn Stream<Item = Result<chat_memory::pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        _request: Request<chat_memory::pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn get_session(
        &self,
        _request: Request<chat_memory::pb::GetSessionRequest>,
    ) -> Result<Response<chat_memory::pb::GetSessionResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn update_session(
        &self,
        _request: Request<chat_memory::pb::UpdateSessionRequest>,
    ) -> Result<Response<chat_memory::pb::UpdateSessionResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn list_sessions(
        &self,
        _request: Request<chat_memory::pb::ListSessionsRequest>,
    ) -> Result<Response<chat_memory::pb::ListSessionsResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn rewind(
        &self,
        _request: Request<chat_memory::pb::RewindRequest>,
    ) -> Result<Response<chat_memory::pb::RewindResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn fork(
        &self,
        _request: Request<chat_memory::pb::ForkRequest>,
    ) -> Result<Response<chat_memory::pb::ForkResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn stop_chat(
        &self,
        _: Request<StopChatRequest>,
    ) -> Result<Response<StopChatResponse>, Status> {
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
        let events = Events { sender };
        let scripted = self.clone();
        tokio::spawn(async move {
            if let Err(status) = scripted.answer(&request, &events).await {
                let _ = events.sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}
