//! A provider of models on a loopback port, which answers as a test says: in OpenAI's protocol, or
//! byte by byte in any other. It is a real HTTP server written over TCP, so that it can also do
//! what no server should: cut a connection within a character, or be silent for ever.
//!
//! ```ignore
//! let provider = Provider::start().await;
//! provider.answer(Script::text(["Hel", "lo"]));
//! ask(provider.url()).await;
//! assert_eq!(provider.requests()[0].body["messages"][0]["content"], "Hi");
//! ```
//!
//! Scripts are used in the order in which they were given, one for each request. A request for
//! which there is none gets the one given to [`Provider::always`], or else HTTP 500.

// Every test binary has this module and uses some of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::rules;

/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The server. Stops when it is dropped, and cuts its connections.
pub struct Provider {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Counts the changes of `state`.
    changes: watch::Sender<u64>,
    connections: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    scripts: VecDeque<Script>,
    otherwise: Option<Script>,
    requests: Vec<Request>,
    is_strict: bool,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// By their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// `Null` if it is not JSON.
    pub body: Value,
    /// How the answer to it ended, so far.
    pub outcome: Outcome,
}

/// How far the answer to a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The script is not through.
    Running,
    /// The script is through.
    Finished,
    /// The client left before the script was through.
    ClientLeft,
}

impl Provider {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changes: watch::Sender::new(0),
            connections: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self {
            address,
            shared,
            task,
        }
    }

    /// The base URL of OpenAI's protocol.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers the next request that has no script yet so.
    pub fn answer(&self, script: Script) {
        self.shared.state().scripts.push_back(script);
    }

    /// Answers all requests so for which there is no other script.
    pub fn always(&self, script: Script) {
        self.shared.state().otherwise = Some(script);
    }

    /// Refuses requests whose messages break the protocol's rules, from now on.
    pub fn be_strict(&self) {
        self.shared.state().is_strict = true;
    }

    /// The requests, in the order in which they came.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state().requests.clone()
    }

    pub fn request_count(&self) -> usize {
        self.shared.state().requests.len()
    }

    /// Waits until this many requests have come.
    pub async fn wait_for_requests(&self, count: usize) {
        let what = format!("{count} requests");
        self.wait(&what, |state| state.requests.len() >= count)
            .await;
    }

    /// Waits until the answer to a request (counted from 0) has ended; says how.
    pub async fn wait_for_outcome(&self, index: usize) -> Outcome {
        let what = format!("the end of request {index}");
        let outcome = |state: &State| state.requests.get(index).map(|request| request.outcome);
        self.wait(&what, |state| {
            outcome(state).is_some_and(|outcome| outcome != Outcome::Running)
        })
        .await;
        outcome(&self.shared.state()).expect("the request")
    }

    async fn wait(&self, what: &str, is_so: impl Fn(&State) -> bool) {
        let mut changes = self.shared.changes.subscribe();
        let wait = changes.wait_for(|_| is_so(&self.shared.state()));
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(changed) => drop(changed.expect("the sender lives")),
            Err(_) => panic!("the provider waited in vain for {what}"),
        }
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.task.abort();
        let connections = self.shared.connections.lock().expect("no panic");
        for connection in connections.iter() {
            connection.abort();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changes.send_modify(|count| *count += 1);
        result
    }
}

/// Holds a script at [`Script::wait`] until the test opens it.
#[derive(Clone)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Lets every script pass, from now on.
    pub fn open(&self) {
        self.0.close();
    }
}

/// One answer, step by step.
#[derive(Clone)]
pub struct Script {
    status: u16,
    headers: Vec<(String, String)>,
    steps: Vec<Step>,
    /// Writes at most this many bytes at once, each an HTTP chunk and a TCP packet of its own.
    write_bytes_max: usize,
}

#[derive(Clone)]
enum Step {
    Write(Vec<u8>),
    Pause(Duration),
    Wait(Gate),
    Finish(Finish),
}

#[derive(Clone, Copy)]
enum Finish {
    /// The end of the body, as HTTP has it.
    Proper,
    /// The end of the connection, within the body.
    HangUp,
    /// The same, with a reset.
    Reset,
    /// None, until the client leaves.
    Never,
}

/// Whole answers.
impl Script {
    /// An answer of text, with a finish reason and usage, as OpenAI sends it.
    pub fn text<const N: usize>(texts: [&str; N]) -> Self {
        let mut script = Self::begin();
        for text in texts {
            script = script.say(text);
        }
        script.finish("stop").usage(7, N as u32).done()
    }

    /// An answer that is an HTTP error.
    pub fn error(status: u16, body: Value) -> Self {
        Self::new(status, "application/json").write(body.to_string())
    }

    /// An error with the given message, as OpenAI sends it.
    pub fn refusal(status: u16, code: &str, message: &str) -> Self {
        let error = json!({"message": message, "type": "an_error", "param": null, "code": code});
        Self::error(status, json!({ "error": error }))
    }

    /// Says nothing at all, not even a status, until the client leaves.
    pub fn silence() -> Self {
        Self::new(0, "").end(Finish::Never)
    }

    /// Closes the connection without an answer.
    pub fn no_answer() -> Self {
        Self::new(0, "").end(Finish::Reset)
    }
}

/// The pieces of an answer in OpenAI's protocol.
impl Script {
    /// The beginning, which names the role.
    pub fn begin() -> Self {
        Self::stream().delta(json!({"role": "assistant", "content": ""}))
    }

    /// Nothing yet but the status: for other protocols, with [`Self::event`].
    pub fn stream() -> Self {
        Self::new(200, "text/event-stream")
    }

    pub fn say(self, text: &str) -> Self {
        self.delta(json!({ "content": text }))
    }

    pub fn think(self, text: &str) -> Self {
        self.delta(json!({ "reasoning_content": text }))
    }

    /// The first piece of the tool call with this index.
    pub fn call(self, index: usize, id: &str, name: &str) -> Self {
        let function = json!({"name": name, "arguments": ""});
        let call = json!({"index": index, "id": id, "type": "function", "function": function});
        self.delta(json!({ "tool_calls": [call] }))
    }

    /// More of the arguments of that tool call.
    pub fn arguments(self, index: usize, arguments: &str) -> Self {
        let call = json!({"index": index, "function": {"arguments": arguments}});
        self.delta(json!({ "tool_calls": [call] }))
    }

    pub fn finish(self, reason: &str) -> Self {
        self.choice(json!({}), json!(reason))
    }

    pub fn usage(self, input: u32, output: u32) -> Self {
        let usage = json!({
            "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output,
        });
        self.data(json!({"object": "chat.completion.chunk", "choices": [], "usage": usage}))
    }

    /// The end of the stream, and of the answer.
    pub fn done(self) -> Self {
        self.write("data: [DONE]\n\n").end(Finish::Proper)
    }

    /// An error within the stream.
    pub fn fail(self, message: &str) -> Self {
        self.data(json!({"error": {"message": message, "type": "server_error"}}))
    }

    fn delta(self, delta: Value) -> Self {
        self.choice(delta, Value::Null)
    }

    fn choice(self, delta: Value, reason: Value) -> Self {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": reason});
        self.data(json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [choice],
        }))
    }
}

/// The pieces of any answer.
impl Script {
    fn new(status: u16, content_type: &str) -> Self {
        Self {
            status,
            headers: vec![("content-type".to_owned(), content_type.to_owned())],
            steps: Vec::new(),
            write_bytes_max: usize::MAX,
        }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An event of this JSON.
    pub fn data(self, data: Value) -> Self {
        self.write(format!("data: {data}\n\n"))
    }

    /// An event with a name, as Anthropic sends them.
    pub fn event(self, name: &str, data: Value) -> Self {
        self.write(format!("event: {name}\ndata: {data}\n\n"))
    }

    /// A comment, as it keeps connections open.
    pub fn comment(self, text: &str) -> Self {
        self.write(format!(": {text}\n\n"))
    }

    /// These bytes of the body.
    pub fn write(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.steps.push(Step::Write(bytes.into()));
        self
    }

    /// Nothing for a while.
    pub fn pause(mut self, pause: Duration) -> Self {
        self.steps.push(Step::Pause(pause));
        self
    }

    /// Nothing until the gate is open.
    pub fn wait(mut self, gate: &Gate) -> Self {
        self.steps.push(Step::Wait(gate.clone()));
        self
    }

    /// The proper end of the body, wherever it is.
    pub fn end_early(self) -> Self {
        self.end(Finish::Proper)
    }

    /// The end of the connection, within the body.
    pub fn hang_up(self) -> Self {
        self.end(Finish::HangUp)
    }

    /// A reset of the connection, within the body.
    pub fn reset(self) -> Self {
        self.end(Finish::Reset)
    }

    /// Nothing more, until the client leaves.
    pub fn hang(self) -> Self {
        self.end(Finish::Never)
    }

    /// Writes at most this many bytes at once.
    pub fn in_writes_of(mut self, bytes_max: usize) -> Self {
        self.write_bytes_max = bytes_max;
        self
    }

    fn end(mut self, finish: Finish) -> Self {
        self.steps.push(Step::Finish(finish));
        self
    }

    /// Plays it. An error means that the client has left.
    async fn play(&self, writer: &mut OwnedWriteHalf) -> std::io::Result<Finish> {
        if self.status != 0 {
            let mut head = format!("HTTP/1.1 {} Status\r\n", self.status);
            for (name, value) in &self.headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            head.push_str("connection: close\r\ntransfer-encoding: chunked\r\n\r\n");
            writer.write_all(head.as_bytes()).await?;
        }
        for step in &self.steps {
            match step {
                Step::Write(bytes) => {
                    for bytes in bytes.chunks(self.write_bytes_max) {
                        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
                        chunk.extend_from_slice(bytes);
                        chunk.extend_from_slice(b"\r\n");
                        writer.write_all(&chunk).await?;
                        writer.flush().await?;
                    }
                }
                Step::Pause(pause) => tokio::time::sleep(*pause).await,
                // It is an error once the gate is open: so it is never given out.
                Step::Wait(gate) => drop(gate.0.acquire().await),
                Step::Finish(finish) => return Ok(*finish),
            }
        }
        Ok(Finish::Proper)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        let connection = tokio::spawn(serve(stream, Arc::clone(&shared)));
        shared
            .connections
            .lock()
            .expect("no panic")
            .push(connection);
    }
}

/// Answers one request; each has a connection of its own.
async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    stream.set_nodelay(true).expect("a socket");
    let Some(request) = read_request(&mut stream).await else {
        return;
    };
    let (index, script) = shared.change(|state| {
        let messages = request.body["messages"].as_array().cloned();
        let checked = rules::check(messages.as_deref().unwrap_or_default());
        state.requests.push(request);
        if let (true, Err(rule)) = (state.is_strict, checked) {
            let script = Script::refusal(400, "invalid_request_error", &rule);
            return (state.requests.len() - 1, script);
        }
        let script = state
            .scripts
            .pop_front()
            .or_else(|| state.otherwise.clone())
            .unwrap_or_else(|| Script::refusal(500, "no_script", "the test has no script"));
        (state.requests.len() - 1, script)
    });

    let (mut reader, mut writer) = stream.into_split();
    let client_left = async {
        let mut bytes = [0; 64];
        while reader.read(&mut bytes).await.is_ok_and(|count| count > 0) {}
    };
    let play = async {
        let finish = script.play(&mut writer).await?;
        if let Finish::Never = finish {
            std::future::pending::<()>().await;
        }
        Ok::<Finish, std::io::Error>(finish)
    };
    // The script first: a client that leaves after its last byte has had all of it.
    let finish = tokio::select! {
        biased;
        finish = play => finish.ok(),
        () = client_left => None,
    };
    match finish {
        Some(Finish::Proper) => {
            let _ = writer.write_all(b"0\r\n\r\n").await;
            let _ = writer.shutdown().await;
        }
        Some(Finish::HangUp) => drop(writer.shutdown().await),
        Some(Finish::Reset) => {
            let stream = reader.reunite(writer).expect("the same connection");
            stream.set_zero_linger().expect("a socket");
        }
        Some(Finish::Never) | None => {}
    }
    shared.change(|state| {
        state.requests[index].outcome = match finish {
            Some(_) => Outcome::Finished,
            None => Outcome::ClientLeft,
        };
    });
}

/// Reads a request with a body of known length; `None` if the client leaves before its end.
pub async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    let head_length = loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8(bytes[..head_length].to_vec()).expect("an ASCII head");
    let mut lines = head.split("\r\n");
    let mut request_line = lines.next()?.split(' ');
    let (method, path) = (request_line.next()?, request_line.next()?);
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let body_length: usize = headers
        .get("content-length")
        .map_or(0, |length| length.parse().expect("a length"));
    while bytes.len() < head_length + body_length {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    Some(Request {
        method: method.to_owned(),
        path: path.to_owned(),
        body: serde_json::from_slice(&bytes[head_length..]).unwrap_or_default(),
        headers,
        outcome: Outcome::Running,
    })
}
