//! Append and GetMessages, beside what they are compared with.
//!
//! All contestants run at once, each with clients of its own, and are loaded one after the other,
//! round by round: what slows the machine for a while slows each of them. A figure is the median
//! over the rounds of the ratio within a round.

use std::{path::Path, process::Command, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use serde::Deserialize;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{
    Bench, Result,
    children::{Child, Redis},
    load::{Sample, Target, alternate, connect, connect_all, drive},
    pb::{
        AppendRequest, AppendResponse, GetMessagesRequest, Message, Role,
        chat_memory_client::ChatMemoryClient,
    },
    peers::pb::{
        LastRequest, PushRequest, SayRequest, hello_client::HelloClient, naive_client::NaiveClient,
    },
    report::{Report, Series, Table, median, micros},
};

/// Bytes of the text of a message.
pub const CONTENT_BYTES: usize = 300;
/// Callers at once, where nothing else is said.
pub const CALLERS: usize = 64;
/// Messages in the sessions that are read.
const LONG: usize = 10_000;
/// Sessions of that length, so that callers do not all read the same one.
const LONG_SESSIONS: usize = 8;
/// Messages that are read of them.
const LAST: i32 = 50;
/// Messages in a short session.
const SHORT: usize = 20;
/// Short sessions that an append goes to in turns, so that they stay short.
const SHORT_SESSIONS: u64 = 1_000;

const PREFIX: &str = "message_store:";

/// The names of the contestants.
const HELLO: &str = "hello";
const HELLO_SOCKET: &str = "hello, Unix socket";
const NAIVE: &str = "naive";
const OURS: &str = "chat-memory";
const SOCKET: &str = "chat-memory, Unix socket";
const EMBEDDED: &str = "chat-memory, embedded";

/// All processes and clients.
pub struct Stage {
    pub redis: Redis,
    hello: Child,
    naive: Child,
    server: Child,
    embedded: Child,
    clients: Clients,
    /// Of an Append.
    sizes: (usize, usize),
    _folder: TempDir,
}

struct Clients {
    hello: Vec<HelloClient<Channel>>,
    hello_socket: Vec<HelloClient<Channel>>,
    naive: Vec<NaiveClient<Channel>>,
    ours: Vec<ChatMemoryClient<Channel>>,
    socket: Vec<ChatMemoryClient<Channel>>,
    embedded: Vec<ChatMemoryClient<Channel>>,
}

fn text() -> String {
    "x".repeat(CONTENT_BYTES)
}

/// What LangChain stores for such a message.
pub fn langchain_element() -> String {
    format!(
        "{{\"type\": \"human\", \"data\": {{\"content\": \"{}\", \"additional_kwargs\": {{}}, \
         \"response_metadata\": {{}}, \"type\": \"human\", \"name\": null, \"id\": null}}}}",
        text()
    )
}

/// One message, to be stored once however often it is sent.
pub fn append_request(session: String, request_id: String) -> AppendRequest {
    AppendRequest {
        session_id: session,
        messages: vec![Message {
            role: Role::User.into(),
            content: text(),
            ..Message::default()
        }],
        request_id,
        expected_last_sequence: None,
    }
}

pub fn last_request(session: String, count: i32) -> GetMessagesRequest {
    GetMessagesRequest {
        session_id: session,
        last_messages: Some(count),
        ..GetMessagesRequest::default()
    }
}

impl Stage {
    pub async fn new(bench: &Bench) -> Result<Self> {
        // Beside the program: where files are on a disk.
        let folder = bench.program.parent().unwrap_or(Path::new("."));
        let folder = tempfile::tempdir_in(folder)?;
        let redis = Redis::start(&[])?;
        let hello_socket = folder.path().join("hello");
        let hello_socket = hello_socket.to_str().ok_or("a path that is not UTF-8")?;
        let hello = Child::hello(folder.path(), hello_socket)?;
        let naive = Child::role("naive", folder.path(), &["--redis", &redis.url()])?;
        let socket = format!("unix:{}", folder.path().join("socket").display());
        let quiet = ["--log", "warn"];
        let listen = ["--listen", "127.0.0.1:0"];
        let url = redis.url();
        let arguments = [listen, ["--listen", &socket], ["--redis", &url], quiet];
        let server = Child::server(&bench.program, folder.path(), &arguments.concat())?;
        let database = folder.path().join("embedded.db");
        let database = database.to_str().ok_or("a path that is not UTF-8")?;
        let arguments = [listen, ["--database", database], quiet];
        let embedded = Child::server(&bench.program, folder.path(), &arguments.concat())?;

        let of = async |address: &str| -> Result<Vec<ChatMemoryClient<Channel>>> {
            let channels = connect_all(address).await?;
            Ok(channels.into_iter().map(ChatMemoryClient::new).collect())
        };
        let say_to = async |address: &str| -> Result<Vec<HelloClient<Channel>>> {
            let channels = connect_all(address).await?;
            Ok(channels.into_iter().map(HelloClient::new).collect())
        };
        let to_naive = connect_all(naive.tcp()?).await?;
        let clients = Clients {
            hello: say_to(hello.tcp()?).await?,
            hello_socket: say_to(&format!("unix:{hello_socket}")).await?,
            naive: to_naive.into_iter().map(NaiveClient::new).collect(),
            ours: of(server.tcp()?).await?,
            socket: of(&socket).await?,
            embedded: of(embedded.tcp()?).await?,
        };

        let request = append_request("size-0-0".to_owned(), "size-0-0-0000".to_owned());
        let request_bytes = request.encoded_len();
        let answer: AppendResponse = clients.ours[0].clone().append(request).await?.into_inner();
        Ok(Self {
            redis,
            hello,
            naive,
            server,
            embedded,
            clients,
            sizes: (request_bytes, answer.encoded_len()),
            _folder: folder,
        })
    }

    fn hello(&self, name: &str) -> Target {
        let clients = match name {
            HELLO_SOCKET => self.clients.hello_socket.clone(),
            _ => self.clients.hello.clone(),
        };
        let (request, answer) = self.sizes;
        let say = SayRequest {
            answer_bytes: answer as u32,
            filling: Bytes::from(vec![b'x'; request - 6]),
        };
        Target::new(
            name,
            [self.hello.id(), self.redis.id()],
            move |caller, _| {
                let mut client = clients[caller % clients.len()].clone();
                let say = say.clone();
                Box::pin(async move {
                    client.say(say).await?;
                    Ok(())
                })
            },
        )
    }

    /// Pushes to `SESSION`, or to the key that `key` makes of caller and call.
    fn push(&self, key: impl Fn(usize, u64) -> String + Send + Sync + 'static) -> Target {
        let clients = self.clients.naive.clone();
        let element = Bytes::from(langchain_element());
        Target::new(
            NAIVE,
            [self.naive.id(), self.redis.id()],
            move |caller, call| {
                let mut client = clients[caller % clients.len()].clone();
                let request = PushRequest {
                    session_id: key(caller, call),
                    element: element.clone(),
                };
                Box::pin(async move {
                    client.push(request).await?;
                    Ok(())
                })
            },
        )
    }

    fn read_naive(&self, count: i32) -> Target {
        let clients = self.clients.naive.clone();
        Target::new(
            NAIVE,
            [self.naive.id(), self.redis.id()],
            move |caller, _| {
                let mut client = clients[caller % clients.len()].clone();
                let request = LastRequest {
                    session_id: format!("{PREFIX}{}", long_session(caller)),
                    count: count.into(),
                };
                Box::pin(async move {
                    let answer = client.last(request).await?.into_inner();
                    expect(answer.elements.len(), count)
                })
            },
        )
    }

    fn append(
        &self,
        name: &str,
        session: impl Fn(usize, u64) -> String + Send + Sync + 'static,
    ) -> Target {
        let (clients, process) = match name {
            SOCKET => (&self.clients.socket, self.server.id()),
            EMBEDDED => (&self.clients.embedded, self.embedded.id()),
            _ => (&self.clients.ours, self.server.id()),
        };
        let clients = clients.clone();
        // Each load is new, whatever came before.
        let load = crate::clock::now_ns();
        let loads = Arc::new(std::sync::atomic::AtomicU64::new(load));
        Target::new(name, [process, self.redis.id()], move |caller, call| {
            let mut client = clients[caller % clients.len()].clone();
            let number = loads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let request = append_request(session(caller, call), format!("{number:032x}"));
            Box::pin(async move {
                client.append(request).await?;
                Ok(())
            })
        })
    }

    fn read(
        &self,
        name: &str,
        count: i32,
        session: impl Fn(usize, u64) -> String + Send + Sync + 'static,
    ) -> Target {
        let clients = match name {
            SOCKET => &self.clients.socket,
            EMBEDDED => &self.clients.embedded,
            _ => &self.clients.ours,
        };
        let process = match name {
            EMBEDDED => self.embedded.id(),
            _ => self.server.id(),
        };
        let clients = clients.clone();
        Target::new(name, [process, self.redis.id()], move |caller, call| {
            let mut client = clients[caller % clients.len()].clone();
            let request = last_request(session(caller, call), count);
            Box::pin(async move {
                let answer = client.get_messages(request).await?.into_inner();
                expect(answer.messages.len(), count)
            })
        })
    }

    /// Appends, of callers with a session each.
    pub fn append_alone(&self) -> Target {
        self.append(OURS, |caller, _| format!("append-alone-{caller}"))
    }

    /// Reads of the last 50 of long sessions, which are made first.
    pub fn read_alone(&self) -> Result<Target> {
        for caller in 0..LONG_SESSIONS {
            self.fill(&long_session(caller), LONG)?;
        }
        Ok(self.read(OURS, LAST, |caller, _| long_session(caller)))
    }

    pub fn server_id(&self) -> u32 {
        self.server.id()
    }

    /// Where files may be until the end.
    pub fn folder(&self) -> &Path {
        self._folder.path()
    }

    /// Fills a list as LangChain would have, but quickly.
    fn fill(&self, session: &str, length: usize) -> Result<()> {
        let mut connection = self.redis.connect()?;
        let element = langchain_element();
        let key = format!("{PREFIX}{session}");
        for first in (0..length).step_by(1_000) {
            let mut command = redis::cmd("LPUSH");
            command.arg(&key);
            for _ in first..length.min(first + 1_000) {
                command.arg(&element);
            }
            command.exec(&mut connection)?;
        }
        Ok(())
    }
}

fn long_session(caller: usize) -> String {
    format!("long-{}", caller % LONG_SESSIONS)
}

fn expect(count: usize, wanted: i32) -> Result<()> {
    if count == wanted as usize {
        Ok(())
    } else {
        Err(format!("{count} messages in place of {wanted}").into())
    }
}

/// How long to load.
struct Times {
    rounds: u64,
    warm_up: Duration,
    length: Duration,
}

impl Times {
    fn of(bench: &Bench) -> Self {
        if bench.quick {
            Self {
                rounds: 3,
                warm_up: Duration::from_millis(200),
                length: Duration::from_millis(800),
            }
        } else {
            Self {
                rounds: 7,
                warm_up: Duration::from_millis(500),
                length: Duration::from_secs(2),
            }
        }
    }

    /// How long so many targets take, in milliseconds.
    fn total_ms(&self, targets: usize) -> u64 {
        self.rounds * targets as u64 * (self.warm_up + self.length).as_millis() as u64
    }
}

/// Loads all of them, round by round: the samples of each.
async fn side_by_side(
    bench: &Bench,
    what: &str,
    targets: &[Target],
    callers: usize,
) -> Result<Vec<Vec<Sample>>> {
    let times = Times::of(bench);
    let bar = bench.bar(what, times.total_ms(targets.len()));
    let mut samples: Vec<Vec<Sample>> = targets.iter().map(|_| Vec::new()).collect();
    for _ in 0..times.rounds {
        for (target, samples) in targets.iter().zip(&mut samples) {
            samples.push(drive(target, callers, times.warm_up, times.length).await?);
            bar.inc((times.warm_up + times.length).as_millis() as u64);
        }
    }
    bar.finish_and_clear();
    Ok(samples)
}

/// What each round gives for two contestants.
fn ratios(over: &[Sample], under: &[Sample], of: impl Fn(&Sample) -> f64) -> Vec<f64> {
    over.iter().zip(under).map(|(a, b)| of(a) / of(b)).collect()
}

fn rate(sample: &Sample) -> f64 {
    sample.calls_per_second
}

fn each(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Vec<f64> {
    samples.iter().map(of).collect()
}

fn load_table(title: &str, targets: &[Target], samples: &[Vec<Sample>]) -> Result<Table> {
    let mut table = Table::new(
        title,
        &[
            "what",
            "calls/s",
            "from",
            "to",
            "p50",
            "p99",
            "p99.9",
            "CPU per call: server",
            "Redis",
        ],
    );
    for (target, samples) in targets.iter().zip(samples) {
        let rates = each(samples, rate);
        let cpu = |of: fn(&Sample) -> f64| format!("{:.1} µs", median(&each(samples, of)));
        let mut latency = crate::load::histogram()?;
        for sample in samples {
            latency.add(&sample.latency)?;
        }
        let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let most = rates.iter().copied().fold(0.0, f64::max);
        table.row(vec![
            target.name.clone(),
            format!("{:.0}", median(&rates)),
            format!("{least:.0}"),
            format!("{most:.0}"),
            micros(latency.value_at_quantile(0.5)),
            micros(latency.value_at_quantile(0.99)),
            micros(latency.value_at_quantile(0.999)),
            cpu(|sample| sample.cpu_us_per_call[0]),
            cpu(|sample| sample.cpu_us_per_call[1]),
        ]);
    }
    Ok(table)
}

/// Append at 64 callers and at one, over TCP, a socket and on the file.
pub async fn append(bench: &Bench, report: &mut Report) -> Result<()> {
    let stage = Stage::new(bench).await?;
    let own = |name: &str| {
        let name = name.to_owned();
        move |caller: usize, _: u64| format!("append-{name}-{caller}")
    };
    let targets = [
        stage.hello(HELLO),
        stage.push(own("naive")),
        stage.append(OURS, own("tcp")),
        stage.append(SOCKET, own("socket")),
        stage.append(EMBEDDED, own("embedded")),
        stage.hello(HELLO_SOCKET),
    ];
    let samples = side_by_side(bench, "append", &targets, CALLERS).await?;
    let [hello, naive, ours, socket, embedded, hello_socket] = &samples[..] else {
        return Err("six contestants".into());
    };
    report.spread("append_vs_hello", ratios(ours, hello, rate));
    report.spread("append_vs_naive", ratios(ours, naive, rate));
    report.spread("embedded_append_vs_hello", ratios(embedded, hello, rate));
    report.spread("uds_vs_tcp", ratios(socket, ours, rate));
    report.spread("hello_uds_vs_tcp", ratios(hello_socket, hello, rate));
    report.spread(
        "server_cpu_us_append",
        each(ours, |sample| sample.cpu_us_per_call[0]),
    );
    report.spread(
        "server_cpu_append_vs_naive",
        ratios(ours, naive, |sample| sample.cpu_us_per_call[0]),
    );
    let title = "Append, 300-byte messages, 64 callers on 8 connections";
    report.table(load_table(title, &targets, &samples)?);
    // The charts have the servers over TCP, and ours over all it has.
    report.series(percentiles(&targets[..5], &samples[..5])?);

    let calls = if bench.quick { 1_500 } else { 6_000 };
    let bar = bench.bar("append, one caller", 5);
    let mut p50s: Vec<Vec<f64>> = targets.iter().map(|_| Vec::new()).collect();
    for _ in 0..5 {
        let latencies = alternate(&targets, calls / 5).await?;
        for (p50s, latency) in p50s.iter_mut().zip(&latencies) {
            p50s.push(latency.value_at_quantile(0.5) as f64);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let against = |index: usize| -> Vec<f64> {
        p50s[index]
            .iter()
            .zip(&p50s[1])
            .map(|(a, b)| a / b)
            .collect()
    };
    report.spread("append_p50_vs_naive", against(2));
    let mut table = Table::new("Append, one caller", &["what", "p50", "against naive"]);
    for (index, target) in targets.iter().enumerate() {
        let ratio = format!("{:.2}", median(&against(index)));
        table.row(vec![
            target.name.clone(),
            micros(median(&p50s[index]) as u64),
            ratio,
        ]);
    }
    report.table(table);

    callers(bench, report, &targets[..5]).await
}

fn percentiles(targets: &[Target], samples: &[Vec<Sample>]) -> Result<Series> {
    let mut series = Series::new("latency", "percentile of Append", "milliseconds");
    for (target, samples) in targets.iter().zip(samples) {
        let mut latency = crate::load::histogram()?;
        for sample in samples {
            latency.add(&sample.latency)?;
        }
        // Each step halves what is left, so that the tail has its room.
        let points = (0..14).map(|step| {
            let quantile = 1.0 - 0.5_f64.powi(step);
            (
                f64::from(step),
                latency.value_at_quantile(quantile) as f64 / 1e6,
            )
        });
        series.line(&target.name, points.skip(1).collect());
    }
    Ok(series)
}

/// Throughput against the number of callers.
async fn callers(bench: &Bench, report: &mut Report, targets: &[Target]) -> Result<()> {
    let times = Times::of(bench);
    let steps: &[usize] = if bench.quick {
        &[1, 16, 64]
    } else {
        &[1, 2, 4, 8, 16, 32, 64, 128, 256]
    };
    let bar = bench.bar("append, by callers", (steps.len() * targets.len()) as u64);
    let mut series = Series::new("callers", "callers", "thousand Appends per second");
    let mut lines: Vec<Vec<(f64, f64)>> = targets.iter().map(|_| Vec::new()).collect();
    for step in steps {
        for (target, line) in targets.iter().zip(&mut lines) {
            let sample = drive(target, *step, times.warm_up, times.length).await?;
            line.push((*step as f64, sample.calls_per_second / 1e3));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for (target, line) in targets.iter().zip(lines) {
        series.line(&target.name, line);
    }
    report.series(series);
    Ok(())
}

/// GetMessages of the last 50 of 10,000.
pub async fn get(bench: &Bench, report: &mut Report) -> Result<()> {
    let stage = Stage::new(bench).await?;
    for session in 0..LONG_SESSIONS {
        stage.fill(&long_session(session), LONG)?;
    }
    let long = |caller: usize, _: u64| long_session(caller);
    let targets = [
        stage.read_naive(LAST),
        stage.read(OURS, LAST, long),
        stage.read(SOCKET, LAST, long),
    ];
    let samples = side_by_side(bench, "get the last 50", &targets, CALLERS).await?;
    report.spread("get50_vs_naive", ratios(&samples[1], &samples[0], rate));
    let cpu = |sample: &Sample| sample.cpu_us_per_call[0];
    report.spread("server_cpu_us_get50", each(&samples[1], cpu));
    report.spread(
        "server_cpu_get50_vs_naive",
        ratios(&samples[1], &samples[0], cpu),
    );
    let title = "GetMessages, the last 50 of 10,000, 64 callers on 8 connections";
    report.table(load_table(title, &targets, &samples)?);
    Ok(())
}

/// What length costs: the last 20, and an Append, of sessions from 20 to 1,000,000 messages.
pub async fn lengths(bench: &Bench, report: &mut Report) -> Result<()> {
    let stage = Stage::new(bench).await?;
    let lengths: &[usize] = if bench.quick {
        &[SHORT, 1_000, 100_000]
    } else {
        &[SHORT, 100, 1_000, 10_000, 100_000, 1_000_000]
    };
    let bar = bench.bar("filling", lengths.len() as u64 + 1);
    for length in lengths {
        stage.fill(&format!("length-{length}"), *length)?;
        bar.inc(1);
    }
    for session in 0..SHORT_SESSIONS {
        stage.fill(&format!("short-{session}"), SHORT)?;
    }
    bar.finish_and_clear();

    // LangChain reads whole lists: before anything is appended to them.
    let is_read = |length: &usize| *length <= LONG;
    let read: Vec<usize> = lengths.iter().copied().filter(is_read).collect();
    let runs_python = bench.runs_python();
    let python = runs_python.then(|| python(bench, &stage.redis, &read));
    let python = python.transpose()?;

    let reads: Vec<Target> = lengths
        .iter()
        .map(|length| {
            let session = format!("length-{length}");
            stage.read(OURS, SHORT as i32, move |_, _| session.clone())
        })
        .collect();
    let appends: Vec<Target> = lengths
        .iter()
        .map(|length| match *length {
            SHORT => stage.append(OURS, |_, call| format!("short-{}", call % SHORT_SESSIONS)),
            length => stage.append(OURS, move |_, _| format!("length-{length}")),
        })
        .collect();

    let (rounds, calls) = if bench.quick { (3, 300) } else { (7, 600) };
    let bar = bench.bar("by length", rounds * 2);
    let mut table = Table::new(
        "One caller, by the length of the session (p50)",
        &["messages", "GetMessages, last 20", "Append"],
    );
    let mut medians = Vec::new();
    for (targets, figure) in [(&reads, "get20_flat"), (&appends, "append_flat")] {
        let mut p50s: Vec<Vec<f64>> = lengths.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            let latencies = alternate(targets, calls).await?;
            for (p50s, latency) in p50s.iter_mut().zip(&latencies) {
                p50s.push(latency.value_at_quantile(0.5) as f64 / 1e3);
            }
            bar.inc(1);
        }
        let longest = p50s.last().ok_or("no lengths")?;
        let flat = longest.iter().zip(&p50s[0]).map(|(a, b)| a / b);
        report.spread(figure, flat.collect());
        medians.push(p50s.iter().map(|p50s| median(p50s)).collect::<Vec<_>>());
    }
    bar.finish_and_clear();
    let mut series = Series::new("length", "messages in the session", "microseconds");
    for (name, medians) in ["GetMessages, last 20", "Append"].iter().zip(&medians) {
        let points = lengths.iter().map(|length| *length as f64);
        series.line(name, points.zip(medians.iter().copied()).collect());
    }
    for (index, length) in lengths.iter().enumerate() {
        let cell = |row: usize| format!("{:.0} µs", medians[row][index]);
        table.row(vec![length.to_string(), cell(0), cell(1)]);
    }

    if let Some(python) = &python {
        let points = read.iter().map(|length| {
            let took = python.reads.get(&length.to_string()).copied();
            (*length as f64, took.unwrap_or(f64::NAN))
        });
        series.line("LangChain, messages", points.collect());
        one_caller(bench, report, &stage, python).await?;
    }
    report.table(table);
    report.series(series);
    Ok(())
}

/// What `benches/peers.py` says, in microseconds.
#[derive(Debug, Deserialize)]
struct Python {
    append: f64,
    agents_append: f64,
    agents_last50: f64,
    reads: std::collections::HashMap<String, f64>,
    versions: std::collections::BTreeMap<String, String>,
}

fn python(bench: &Bench, redis: &Redis, lengths: &[usize]) -> Result<Python> {
    let bar = bench.bar("Python's libraries", 25);
    let output = Command::new(&bench.python)
        .args([
            "benches/peers.py",
            &redis.url(),
            &format!("{PREFIX}length-"),
        ])
        .arg(CONTENT_BYTES.to_string())
        .args(lengths.iter().map(usize::to_string))
        .output()?;
    bar.finish_and_clear();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// One caller's view of the libraries that it could use in place of the server.
async fn one_caller(
    bench: &Bench,
    report: &mut Report,
    stage: &Stage,
    python: &Python,
) -> Result<()> {
    let session = format!("length-{LONG}");
    if !bench.quick {
        let targets = [
            stage.append(OURS, |_, _| "one-caller".to_owned()),
            stage.read(OURS, LAST, move |_, _| session.clone()),
        ];
        let latencies = alternate(&targets, 2_000).await?;
        let p50 = |index: usize| micros(latencies[index].value_at_quantile(0.5));
        let long = python
            .reads
            .get(&LONG.to_string())
            .copied()
            .unwrap_or(f64::NAN);
        let mut table = Table::new(
            "One caller, beside the libraries of Python (p50)",
            &["what", "append a message", "last 50 of 10,000"],
        );
        table.row(vec![
            "chat-memory, from Rust over gRPC".to_owned(),
            p50(0),
            p50(1),
        ]);
        let us = |us: f64| micros((us * 1e3) as u64);
        table.row(vec![
            "LangChain, RedisChatMessageHistory (reads all)".to_owned(),
            us(python.append),
            us(long),
        ]);
        table.row(vec![
            "OpenAI Agents SDK, RedisSession".to_owned(),
            us(python.agents_append),
            us(python.agents_last50),
        ]);
        let versions = python.versions.iter();
        let versions: Vec<String> = versions.map(|(name, is)| format!("{name} {is}")).collect();
        table.note(versions.join(", "));
        report.table(table);
    }
    Ok(())
}

/// Redis by its own tool.
pub fn redis_itself(bench: &Bench, report: &mut Report) -> Result<()> {
    let redis = Redis::start(&[])?;
    let mut connection = redis.connect()?;
    let element = langchain_element();
    let mut fill = redis::cmd("RPUSH");
    fill.arg("long");
    for _ in 0..1_000 {
        fill.arg(&element);
    }
    fill.exec(&mut connection)?;
    let script = "local l = redis.call('LPUSH', KEYS[1], ARGV[1]) \
                  redis.call('EXPIRE', KEYS[1], 86400) return l";
    let commands: [(&str, Vec<&str>); 3] = [
        ("LPUSH", vec!["LPUSH", "list", &element]),
        (
            "a script that pushes and expires",
            vec!["EVAL", script, "1", "scripted", &element],
        ),
        ("LRANGE of the last 50", vec!["LRANGE", "long", "0", "49"]),
    ];
    let calls = if bench.quick { "30000" } else { "200000" };
    let title = "Redis itself (redis-benchmark, 50 connections, no pipelining)";
    let mut table = Table::new(title, &["what", "calls/s", "p50", "p99"]);
    let bar = bench.bar("redis-benchmark", commands.len() as u64);
    for (name, command) in commands {
        let output = Command::new("redis-benchmark")
            .args([
                "-p",
                &redis.port.to_string(),
                "-n",
                calls,
                "-c",
                "50",
                "--csv",
            ])
            .args(command)
            .output()?;
        let output = String::from_utf8(output.stdout)?;
        // The last line: name, calls/s, mean, least, p50, p95, p99, most; the latter in ms.
        let line = output.lines().last().unwrap_or_default();
        let numbers: Vec<&str> = line
            .rsplit(',')
            .map(|cell| cell.trim_matches('"'))
            .collect();
        let number = |from_end: usize| -> Result<f64> {
            let cell = numbers
                .get(from_end)
                .ok_or("redis-benchmark says nothing")?;
            Ok(cell.parse()?)
        };
        table.row(vec![
            name.to_owned(),
            format!("{:.0}", number(6)?),
            micros((number(3)? * 1e6) as u64),
            micros((number(1)? * 1e6) as u64),
        ]);
        bar.inc(1);
    }
    bar.finish_and_clear();
    report.table(table);
    Ok(())
}

/// What the server takes when it does nothing, and how long it takes to begin.
pub async fn footprint(bench: &Bench, report: &mut Report) -> Result<()> {
    let rounds = if bench.quick { 5 } else { 15 };
    let bar = bench.bar("start and idle", rounds);
    let redis = Redis::start(&[])?;
    let (mut start_ms, mut idle_mib) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let folder = tempfile::tempdir()?;
        let arguments = [["--listen", "127.0.0.1:0"], ["--redis", &redis.url()]];
        let begin = std::time::Instant::now();
        let server = Child::server(&bench.program, folder.path(), &arguments.concat())?;
        let mut client = ChatMemoryClient::new(connect(server.tcp()?).await?);
        client
            .get_messages(last_request("start".to_owned(), 1))
            .await?;
        start_ms.push(begin.elapsed().as_secs_f64() * 1e3);
        if round < 3 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            idle_mib.push(crate::clock::rss_kib(server.id()) as f64 / 1024.0);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    report.spread("start_ms", start_ms);
    report.spread("idle_rss_mib", idle_mib);
    let size = std::fs::metadata(&bench.program)?.len();
    report.figure("binary_mib", size as f64 / f64::from(1 << 20));
    Ok(())
}

/// What a message takes in Redis, with all that is kept besides it.
pub async fn memory(bench: &Bench, report: &mut Report) -> Result<()> {
    const MESSAGES: u64 = 100;
    const SESSIONS: u64 = 200;
    let stage = Stage::new(bench).await?;
    let used = || -> Result<u64> {
        let info: String = stage.redis.query(redis::cmd("INFO").arg("memory"))?;
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"));
        Ok(line.ok_or("no used_memory")?.trim().parse()?)
    };
    let raw = langchain_element().len() as f64;
    let mut table = Table::new(
        "Bytes of Redis per message, in sessions of 100",
        &[
            "appended",
            "bytes per message",
            "against LangChain's element",
        ],
    );
    for (how, batch) in [
        ("one by one, each with a request id", 1),
        ("by two, as turns are", 2),
    ] {
        let bar = bench.bar("memory", SESSIONS);
        let before = used()?;
        for session in 0..SESSIONS {
            let mut client = stage.clients.ours[0].clone();
            for call in 0..MESSAGES / batch {
                let id = format!("{session:016x}{call:016x}");
                let mut request = append_request(format!("memory-{batch}-{session:04}"), id);
                request.messages = vec![request.messages[0].clone(); batch as usize];
                client.append(request).await?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let bytes = (used()? - before) as f64 / (SESSIONS * MESSAGES) as f64;
        let name = match batch {
            1 => "memory_per_message_vs_raw",
            _ => "memory_per_message_vs_raw_by_two",
        };
        report.figure(name, bytes / raw);
        table.row(vec![
            how.to_owned(),
            format!("{bytes:.0}"),
            format!("{:.2}", bytes / raw),
        ]);
    }
    table.note(format!("LangChain's own element has {raw:.0} bytes."));
    report.table(table);
    Ok(())
}
