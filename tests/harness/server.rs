//! A server inside the test's process, on a free port and on a Unix socket, and its clients.

use std::{path::PathBuf, sync::Arc, time::Duration};

use chat_memory::{
    config::Listen,
    model::{Model, echo::Echo},
    pb::{self, chat_memory_client::ChatMemoryClient},
    server::{self, Listener, Parts},
    service,
    store::{Store, sqlite::Sqlite},
    turn::{self, Turns},
    workers::Workers,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tonic_types::StatusExt as _;

pub type Client = ChatMemoryClient<Channel>;

/// What a server is to be like.
pub struct Options {
    pub model: Arc<dyn Model>,
    pub turns_max: usize,
    pub requests_max: usize,
    pub watchers_max: usize,
    pub watcher_patience: Duration,
    pub turn_limit: Duration,
    pub drain_limit: Duration,
    pub lease: Duration,
    pub kept_bytes_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: Arc::new(Echo),
            turns_max: 100,
            requests_max: 100,
            watchers_max: 100,
            watcher_patience: Duration::from_secs(60),
            turn_limit: Duration::from_secs(60),
            drain_limit: Duration::from_secs(10),
            lease: turn::Settings::default().lease,
            kept_bytes_max: turn::Settings::default().kept_bytes_max,
        }
    }
}

pub struct TestServer {
    pub tcp: String,
    pub socket: PathBuf,
    pub store: Arc<dyn Store>,
    pub turns: Turns,
    pub shutdown: CancellationToken,
    pub running: JoinHandle<std::io::Result<()>>,
    pub directory: tempfile::TempDir,
}

/// A server with an embedded store of its own and the echo model.
pub async fn server() -> TestServer {
    server_with(Options::default()).await
}

/// A server with an embedded store of its own.
pub async fn server_with(options: Options) -> TestServer {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("test.db");
    let store = Sqlite::open(&path, "message_store:").expect("a store");
    server_on(Arc::new(store), directory, options).await
}

/// A server on a store.
pub async fn server_on(
    store: Arc<dyn Store>,
    directory: tempfile::TempDir,
    options: Options,
) -> TestServer {
    let socket = directory.path().join("test.sock");
    let addresses = [
        Listen::Tcp(([127, 0, 0, 1], 0).into()),
        Listen::Unix(socket.clone()),
    ];
    let mut listeners = Vec::new();
    for address in &addresses {
        listeners.push(Listener::bind(address, 0o600).await.expect("an address"));
    }
    let tcp = listeners[0].address().expect("an address").to_string();
    let turns = Turns::new(
        Arc::clone(&store),
        options.model,
        service::parse_ask,
        turn::Settings {
            turn_limit: options.turn_limit,
            turns_max: options.turns_max,
            lease: options.lease,
            kept_bytes_max: options.kept_bytes_max,
            ..turn::Settings::default()
        },
    );
    let parts = Parts {
        listeners,
        workers: Workers::start(2).expect("threads"),
        store: Arc::clone(&store),
        turns: turns.clone(),
        limits: service::Limits {
            requests_max: options.requests_max,
            watchers_max: options.watchers_max,
            watcher_patience: options.watcher_patience,
        },
        streams_max: 1000,
        keepalive: Duration::from_secs(60),
        drain_limit: options.drain_limit,
    };
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(server::run(parts, shutdown.clone()));
    TestServer {
        tcp,
        socket,
        store,
        turns,
        shutdown,
        running,
        directory,
    }
}

impl TestServer {
    pub async fn channel(&self) -> Channel {
        tcp_channel(&self.tcp).await
    }

    pub async fn client(&self) -> Client {
        client(self.channel().await)
    }

    pub async fn unix_client(&self) -> Client {
        client(unix_channel(&self.socket).await)
    }
}

pub async fn tcp_channel(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    endpoint.connect().await.expect("a connection")
}

pub async fn unix_channel(path: &std::path::Path) -> Channel {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint
        .connect_with_connector(connector)
        .await
        .expect("a connection")
}

pub fn client(channel: Channel) -> Client {
    // The limits are the server's to keep: what it sends must fit into the default of 4 MiB.
    ChatMemoryClient::new(channel).max_encoding_message_size(usize::MAX)
}

// What requests are made of.

pub fn message(role: pb::Role, content: &str) -> pb::Message {
    pb::Message {
        role: role.into(),
        content: content.to_owned(),
        ..Default::default()
    }
}

pub fn user(content: &str) -> pb::Message {
    message(pb::Role::User, content)
}

pub fn append(session: &str, messages: Vec<pb::Message>) -> pb::AppendRequest {
    pb::AppendRequest {
        session_id: session.to_owned(),
        messages,
        ..Default::default()
    }
}

pub fn get(session: &str) -> pb::GetMessagesRequest {
    pb::GetMessagesRequest {
        session_id: session.to_owned(),
        ..Default::default()
    }
}

pub fn clear(session: &str) -> pb::ClearRequest {
    pb::ClearRequest {
        session_id: session.to_owned(),
    }
}

pub fn chat(session: &str, content: &str) -> pb::ChatRequest {
    pb::ChatRequest {
        session_id: session.to_owned(),
        messages: vec![user(content)],
        ..Default::default()
    }
}

/// All messages of a session, page by page.
pub async fn all_messages(client: &mut Client, session: &str) -> Vec<pb::Message> {
    let mut messages = Vec::new();
    let mut request = get(session);
    request.page_size = 1_000;
    loop {
        let page = client.get_messages(request.clone()).await.expect("a page");
        let page = page.into_inner();
        messages.extend(page.messages);
        if page.next_page_token.is_empty() {
            return messages;
        }
        request.page_token = page.next_page_token;
    }
}

/// The contents of a session.
pub async fn contents(client: &mut Client, session: &str) -> Vec<String> {
    let page = client.get_messages(get(session)).await.expect("a page");
    let messages = page.into_inner().messages;
    messages
        .into_iter()
        .map(|message| message.content)
        .collect()
}

/// The reason that a status carries.
pub fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    details
        .error_info()
        .map(|info| info.reason.clone())
        .unwrap_or_default()
}

/// The fields that a status names.
pub fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details
        .bad_request()
        .map(|request| request.field_violations.clone());
    let violations = violations.unwrap_or_default();
    violations
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

/// All that a turn sent, and how it ended.
#[derive(Debug, Default)]
pub struct Told {
    pub numbers: Vec<i64>,
    pub started: Option<pb::Started>,
    pub deltas: Vec<pb::Delta>,
    pub completed: Option<pb::Completed>,
    pub error: Option<Status>,
}

impl Told {
    pub fn text(&self) -> String {
        self.deltas
            .iter()
            .map(|delta| delta.text.as_str())
            .collect()
    }

    pub fn take(&mut self, response: pb::ChatResponse) {
        use pb::chat_response::Event;
        self.numbers.push(response.event_number);
        match response.event.expect("an event") {
            Event::Started(started) => self.started = Some(started),
            Event::Delta(delta) => self.deltas.push(delta),
            Event::Completed(completed) => self.completed = Some(completed),
        }
    }

    /// The error's reason; "" if there was none.
    pub fn reason(&self) -> String {
        self.error.as_ref().map(reason).unwrap_or_default()
    }
}

/// Runs a turn to its end.
pub async fn tell(client: &mut Client, request: pb::ChatRequest) -> Told {
    match client.chat(request).await {
        Ok(response) => tell_rest(response.into_inner(), Told::default()).await,
        Err(error) => Told {
            error: Some(error),
            ..Told::default()
        },
    }
}

pub async fn tell_rest(mut stream: Streaming<pb::ChatResponse>, mut told: Told) -> Told {
    loop {
        match stream.message().await {
            Ok(Some(response)) => told.take(response),
            Ok(None) => return told,
            Err(error) => {
                told.error = Some(error);
                return told;
            }
        }
    }
}
