//! The work of each process, as servers and nodes of a cluster are added under one load. Throughput
//! says nothing here, where all processes share the cores; what each of them does for a call does.
//!
//! All layouts run at once, and are loaded one after the other, round by round.

use std::{
    ops::Sub,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::{Streaming, transport::Channel};

use crate::{
    Bench, Result,
    children::{Child, Redis, free_port},
    clock::{busy_us, now_ns, waits, written_bytes},
    load::{CONNECTIONS, connect},
    memory::{append_request, last_request},
    pb::{
        ChatRequest, WatchRequest, WatchResponse, chat_memory_client::ChatMemoryClient,
        watch_response::Event,
    },
    report::{Report, Series, Table, median},
};

/// Servers on one Redis.
const SERVERS: [usize; 3] = [1, 2, 4];
/// Masters of a cluster, with [`CLUSTER_SERVERS`] servers each time.
const NODES: [usize; 3] = [1, 3, 6];
const CLUSTER_SERVERS: usize = 2;
/// Sessions that the calls are spread over.
const SESSIONS: u64 = 2_000;
/// Messages in each to begin with, and messages of a read.
const MESSAGES: usize = 20;
/// Callers at once.
const CALLERS: usize = 32;
/// Watchers of one layout, while it does nothing else.
const WATCHERS: u64 = 500;
/// Slots of a cluster.
const SLOTS: usize = 16_384;
/// What Redis is asked to publish, to see what that costs the nodes of a cluster.
const PUBLISHED: usize = 20_000;
/// How long the nodes of a cluster may take to find each other.
const JOIN_LIMIT: Duration = Duration::from_secs(20);

/// Servers, and the Redis that they share: one, or the masters of a cluster.
struct Layout {
    nodes: Vec<Redis>,
    servers: Vec<Child>,
    clients: Vec<ChatMemoryClient<Channel>>,
    /// Makes request ids of their own for each load.
    loads: u64,
    /// Bytes of all sessions as they were at first.
    filled: f64,
    _folder: TempDir,
}

/// What a Redis has done so far, or in a while.
#[derive(Clone, Copy, Default)]
struct Work {
    cpu_us: f64,
    /// With those of scripts.
    commands: f64,
    bytes_in: f64,
    bytes_out: f64,
    /// To other nodes.
    bus_out: f64,
    /// Messages from other nodes.
    heard: f64,
    /// How often it woke up.
    wakes: f64,
    /// What it holds now.
    memory: f64,
}

impl Sub for Work {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            cpu_us: self.cpu_us - before.cpu_us,
            commands: self.commands - before.commands,
            bytes_in: self.bytes_in - before.bytes_in,
            bytes_out: self.bytes_out - before.bytes_out,
            bus_out: self.bus_out - before.bus_out,
            heard: self.heard - before.heard,
            wakes: self.wakes - before.wakes,
            memory: self.memory - before.memory,
        }
    }
}

/// What each process has done for a load.
struct Sample {
    /// Of each server, in µs.
    servers: Vec<f64>,
    nodes: Vec<Work>,
    calls: f64,
}

impl Sample {
    fn server_us(&self) -> Spread {
        Spread::of(&self.servers, self.calls)
    }

    fn node(&self, of: fn(&Work) -> f64) -> Spread {
        let values: Vec<f64> = self.nodes.iter().map(of).collect();
        Spread::of(&values, self.calls)
    }
}

/// Per call.
struct Spread {
    mean: f64,
    most: f64,
}

impl Spread {
    fn of(values: &[f64], calls: f64) -> Self {
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64 / calls,
            most: values.iter().copied().fold(0.0, f64::max) / calls,
        }
    }
}

/// What is called.
#[derive(Clone, Copy, PartialEq)]
enum Calls {
    /// By turns.
    AppendsAndReads,
    Appends,
    Reads,
    /// With `echo` in the model's place.
    Turns,
}

impl Layout {
    async fn start(bench: &Bench, nodes: Vec<Redis>, url: &str, servers: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let arguments = ["--listen=127.0.0.1:0", "--log=warn", "--redis", url];
        let mut layout = Self {
            nodes,
            servers: Vec::new(),
            clients: Vec::new(),
            loads: now_ns(),
            filled: 0.0,
            _folder: folder,
        };
        for _ in 0..servers {
            let server = Child::server(&bench.program, layout._folder.path(), &arguments)?;
            layout.servers.push(server);
        }
        // As many in all, whatever the number of servers: what each of them carries stays the same.
        for server in layout.servers.iter().cycle().take(CONNECTIONS) {
            let channel = connect(server.tcp()?).await?;
            layout.clients.push(ChatMemoryClient::new(channel));
        }
        let memory = |works: Vec<Work>| works.iter().map(|work| work.memory).sum::<f64>();
        let before = memory(layout.work()?);
        let mut client = layout.clients[0].clone();
        for session in 0..SESSIONS {
            let mut request = append_request(name(session), format!("fill-{session}"));
            request.messages = vec![request.messages[0].clone(); MESSAGES];
            client.append(request).await?;
        }
        layout.filled = memory(layout.work()?) - before;
        Ok(layout)
    }

    async fn on_one(bench: &Bench, servers: usize) -> Result<Self> {
        let redis = Redis::start(&[])?;
        let url = redis.url();
        Self::start(bench, vec![redis], &url, servers).await
    }

    async fn on_cluster(bench: &Bench, nodes: usize) -> Result<Self> {
        let nodes = cluster(nodes)?;
        let places: Vec<String> = nodes
            .iter()
            .map(|node| format!("127.0.0.1:{}", node.port))
            .collect();
        let url = format!("redis-cluster://{}", places.join(","));
        Self::start(bench, nodes, &url, CLUSTER_SERVERS).await
    }

    fn work(&self) -> Result<Vec<Work>> {
        self.nodes.iter().map(work).collect()
    }

    /// Has [`CALLERS`] make so many calls in all, each of them over all connections by turns.
    async fn load(&mut self, calls: Calls, count: u64) -> Result<Sample> {
        let next = Arc::new(AtomicU64::new(0));
        let load = self.loads;
        self.loads += count;
        let before = self.work()?;
        let busy = |server: &Child| busy_us(server.id());
        let busy_before: Vec<f64> = self.servers.iter().map(busy).collect();
        let mut tasks = JoinSet::new();
        for _ in 0..CALLERS {
            let (clients, next) = (self.clients.clone(), Arc::clone(&next));
            tasks.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok::<_, crate::Failure>(());
                    }
                    let client = &mut clients[number as usize % clients.len()].clone();
                    // Half of the calls of each connection append, and all sessions have their turns.
                    let step = number / clients.len() as u64;
                    // A session has one turn at a time.
                    let session = match calls {
                        Calls::Turns => number,
                        _ => number / 2,
                    };
                    let session = name(session.wrapping_mul(2_654_435_761) % SESSIONS);
                    let is_append = calls == Calls::Appends
                        || calls == Calls::AppendsAndReads && step.is_multiple_of(2);
                    if calls == Calls::Turns {
                        turn(client, session).await?;
                    } else if is_append {
                        let id = format!("{:032x}", load + number);
                        client.append(append_request(session, id)).await?;
                    } else {
                        let request = last_request(session, MESSAGES as i32);
                        client.get_messages(request).await?;
                    }
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        let busy_after = self.servers.iter().map(busy);
        let servers = busy_after
            .zip(busy_before)
            .map(|(after, before)| after - before);
        let servers = servers.collect();
        // What the calls have left to do: entries of the index are written 200 ms later.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let after = self.work()?;
        let nodes = after.into_iter().zip(before);
        Ok(Sample {
            servers,
            nodes: nodes.map(|(after, before)| after - before).collect(),
            calls: count as f64,
        })
    }

    async fn watch(&self) -> Result<Vec<Streaming<WatchResponse>>> {
        let mut streams = Vec::new();
        for session in 0..WATCHERS {
            let mut client = self.clients[session as usize % self.clients.len()].clone();
            let request = WatchRequest {
                session_id: name(session),
                after_sequence: MESSAGES as i64,
                include_raw: false,
            };
            let mut stream = client.watch(request).await?.into_inner();
            while let Some(response) = stream.message().await? {
                if matches!(response.event, Some(Event::Live(_))) {
                    break;
                }
            }
            streams.push(stream);
        }
        Ok(streams)
    }
}

fn name(session: u64) -> String {
    format!("scale-{session:05}")
}

async fn turn(client: &mut ChatMemoryClient<Channel>, session: String) -> Result<()> {
    let request = ChatRequest {
        session_id: session,
        messages: append_request(String::new(), String::new()).messages,
        last_messages: Some(MESSAGES as i32),
        ..ChatRequest::default()
    };
    let mut stream = client.chat(request).await?.into_inner();
    while stream.message().await?.is_some() {}
    Ok(())
}

/// The masters of a cluster, which know each other.
fn cluster(count: usize) -> Result<Vec<Redis>> {
    let mut nodes = Vec::new();
    let mut buses = Vec::new();
    for _ in 0..count {
        let bus = free_port()?.to_string();
        nodes.push(Redis::start(&[
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            &bus,
        ])?);
        buses.push(bus);
    }
    for (index, node) in nodes.iter().enumerate() {
        let mut own = redis::cmd("CLUSTER");
        own.arg("ADDSLOTS");
        for slot in SLOTS * index / count..SLOTS * (index + 1) / count {
            own.arg(slot);
        }
        node.query::<()>(&own)?;
        let mut epoch = redis::cmd("CLUSTER");
        node.query::<()>(epoch.arg("SET-CONFIG-EPOCH").arg(index + 1))?;
        let mut meet = redis::cmd("CLUSTER");
        meet.arg("MEET").arg("127.0.0.1").arg(node.port);
        if index > 0 {
            nodes[0].query::<()>(meet.arg(&buses[index]))?;
        }
    }
    let begin = Instant::now();
    let known = format!("cluster_known_nodes:{count}\r\n");
    for node in &nodes {
        loop {
            let info: String = node.query(redis::cmd("CLUSTER").arg("INFO"))?;
            if info.contains("cluster_state:ok") && info.contains(&known) {
                break;
            }
            if begin.elapsed() > JOIN_LIMIT {
                return Err("the nodes of a cluster do not find each other".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(nodes)
}

fn work(node: &Redis) -> Result<Work> {
    let mut connection = node.connect()?;
    let info: String = redis::cmd("INFO").query(&mut connection)?;
    let is_in_cluster = info.contains("cluster_enabled:1");
    let of_cluster: String = match is_in_cluster {
        true => redis::cmd("CLUSTER").arg("INFO").query(&mut connection)?,
        false => String::new(),
    };
    let number = |text: &str, name: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok())
            .unwrap_or(0.0)
    };
    let bytes_out = number(&info, "total_net_output_bytes");
    Ok(Work {
        cpu_us: 1e6 * (number(&info, "used_cpu_user") + number(&info, "used_cpu_sys")),
        commands: number(&info, "total_commands_processed"),
        bytes_in: number(&info, "total_net_input_bytes"),
        bytes_out,
        // It writes to clients and to other nodes, and nothing else.
        bus_out: written_bytes(node.id()) - bytes_out,
        heard: number(&of_cluster, "cluster_stats_messages_publish_received"),
        wakes: waits(node.id()),
        memory: number(&info, "used_memory"),
    })
}

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let (rounds, calls) = if bench.quick { (2, 3_000) } else { (3, 6_000) };
    let layouts = (SERVERS.len() + NODES.len()) as u64;
    let bar = bench.bar("scale", layouts * (1 + rounds) + 4);
    let mut on_one = Vec::new();
    for servers in SERVERS {
        on_one.push(Layout::on_one(bench, servers).await?);
        bar.inc(1);
    }
    let mut on_clusters = Vec::new();
    for nodes in NODES {
        on_clusters.push(Layout::on_cluster(bench, nodes).await?);
        bar.inc(1);
    }

    let mut of_one: Vec<Vec<Sample>> = SERVERS.iter().map(|_| Vec::new()).collect();
    let mut of_clusters: Vec<Vec<Sample>> = NODES.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (layout, samples) in on_one.iter_mut().zip(&mut of_one) {
            samples.push(layout.load(Calls::AppendsAndReads, calls).await?);
            bar.inc(1);
        }
        for (layout, samples) in on_clusters.iter_mut().zip(&mut of_clusters) {
            samples.push(layout.load(Calls::AppendsAndReads, calls).await?);
            bar.inc(1);
        }
    }
    let kinds = costs(&mut on_one[0], &mut on_clusters[0], calls, &bar).await?;
    let constant = constants(&on_one[0], &on_clusters).await?;
    bar.finish_and_clear();

    let mut chart = Series::new(
        "scale",
        "servers, or nodes of a cluster",
        "work of each, where one alone has 1",
    );
    servers(report, &mut chart, &of_one);
    nodes(report, &mut chart, &of_clusters);
    let ideal = (1..=6).map(|count| (f64::from(count), 1.0 / f64::from(count)));
    chart.line("an equal share", ideal.collect());
    report.series(chart);
    report.scaling(kinds);
    what_does_not_split(report, &on_clusters, &of_clusters, constant)
}

/// The rounds of a value, each against the first layout's in the same round.
fn against_first(samples: &[Vec<Sample>], index: usize, of: fn(&Sample) -> f64) -> Vec<f64> {
    let first = samples[0].iter().map(of);
    let own = samples[index].iter().map(of);
    own.zip(first).map(|(own, first)| own / first).collect()
}

fn middle(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    median(&samples.iter().map(of).collect::<Vec<_>>())
}

fn servers(report: &mut Report, chart: &mut Series, samples: &[Vec<Sample>]) {
    let mut table = Table::new(
        "One load, more servers on one Redis",
        &[
            "servers",
            "CPU of each server per call",
            "of the busiest",
            "against one",
            "an equal share",
            "CPU of Redis per call",
            "commands of Redis per call",
        ],
    );
    let mut points = Vec::new();
    for (index, count) in SERVERS.iter().enumerate() {
        let ratios = against_first(samples, index, |sample| sample.server_us().mean);
        let ratio = median(&ratios);
        points.push((*count as f64, ratio));
        let of = &samples[index];
        table.row(vec![
            count.to_string(),
            format!("{:.1} µs", middle(of, |sample| sample.server_us().mean)),
            format!("{:.1} µs", middle(of, |sample| sample.server_us().most)),
            format!("{ratio:.2}"),
            format!("{:.2}", 1.0 / *count as f64),
            format!(
                "{:.1} µs",
                middle(of, |sample| sample.node(|work| work.cpu_us).mean)
            ),
            format!(
                "{:.1}",
                middle(of, |sample| sample.node(|work| work.commands).mean)
            ),
        ]);
        if index > 0 {
            report.spread(&format!("scale_work_per_server_{count}"), ratios);
        }
    }
    chart.line("servers: CPU", points);
    report.scaling(table);
}

fn nodes(report: &mut Report, chart: &mut Series, samples: &[Vec<Sample>]) {
    let mut table = Table::new(
        "One load, more masters of a cluster",
        &[
            "masters",
            "commands of each per call",
            "of the busiest",
            "against one",
            "CPU of each per call",
            "of the busiest",
            "against one",
            "an equal share",
            "wake-ups of all per call",
            "bytes in and out of each per call",
            "bytes between nodes, per call and node",
        ],
    );
    let (mut commands, mut cpu) = (Vec::new(), Vec::new());
    for (index, count) in NODES.iter().enumerate() {
        let of_commands = against_first(samples, index, |sample| {
            sample.node(|work| work.commands).mean
        });
        let of_cpu = against_first(samples, index, |sample| {
            sample.node(|work| work.cpu_us).mean
        });
        let of = &samples[index];
        let imbalance = middle(of, |sample| {
            let commands = sample.node(|work| work.commands);
            commands.most / commands.mean
        });
        commands.push((*count as f64, median(&of_commands)));
        cpu.push((*count as f64, median(&of_cpu)));
        let both = |work: &Work| work.bytes_in + work.bytes_out;
        table.row(vec![
            count.to_string(),
            format!(
                "{:.2}",
                middle(of, |sample| sample.node(|work| work.commands).mean)
            ),
            format!(
                "{:.2}",
                middle(of, |sample| sample.node(|work| work.commands).most)
            ),
            format!("{:.2}", median(&of_commands)),
            format!(
                "{:.1} µs",
                middle(of, |sample| sample.node(|work| work.cpu_us).mean)
            ),
            format!(
                "{:.1} µs",
                middle(of, |sample| sample.node(|work| work.cpu_us).most)
            ),
            format!("{:.2}", median(&of_cpu)),
            format!("{:.2}", 1.0 / *count as f64),
            format!(
                "{:.2}",
                middle(of, |sample| sample.node(|work| work.wakes).mean) * *count as f64
            ),
            format!("{:.0}", middle(of, |sample| sample.node(both).mean)),
            format!(
                "{:.0}",
                middle(of, |sample| sample.node(|work| work.bus_out).mean)
            ),
        ]);
        if index > 0 {
            report.spread(&format!("scale_work_per_node_{count}"), of_commands);
            report.spread(&format!("scale_cpu_per_node_{count}"), of_cpu);
            report.figure(&format!("scale_busiest_node_{count}"), imbalance);
        }
    }
    chart.line("nodes: commands", commands);
    chart.line("nodes: CPU", cpu);
    report.scaling(table);
}

/// What one call of each kind takes, on one Redis and on a cluster of one master.
async fn costs(
    one: &mut Layout,
    cluster: &mut Layout,
    calls: u64,
    bar: &indicatif::ProgressBar,
) -> Result<Table> {
    let mut table = Table::new(
        "One call",
        &[
            "call",
            "Redis",
            "CPU of the server",
            "CPU of Redis",
            "commands of Redis",
            "bytes into Redis",
            "bytes out of Redis",
            "bytes kept",
        ],
    );
    for (what, kind) in [
        ("Append of 300 bytes", Calls::Appends),
        ("GetMessages, the last 20", Calls::Reads),
        ("Chat with `echo`, 20 of history", Calls::Turns),
    ] {
        for (name, layout) in [("one", &mut *one), ("cluster of one", &mut *cluster)] {
            // Unmeasured: the first of a kind loads its scripts.
            layout.load(kind, calls / 10).await?;
            let sample = layout.load(kind, calls).await?;
            let node = |of: fn(&Work) -> f64| sample.node(of).mean;
            table.row(vec![
                what.to_owned(),
                name.to_owned(),
                format!(
                    "{:.1} µs",
                    sample.servers.iter().sum::<f64>() / sample.calls
                ),
                format!("{:.1} µs", node(|work| work.cpu_us)),
                format!("{:.1}", node(|work| work.commands)),
                format!("{:.0}", node(|work| work.bytes_in)),
                format!("{:.0}", node(|work| work.bytes_out)),
                format!("{:.0}", node(|work| work.memory).max(0.0)),
            ]);
        }
        bar.inc(1);
    }
    let bytes = one.filled / SESSIONS as f64;
    table.note(format!(
        "A session of {MESSAGES} such messages, appended in one call, takes {bytes:.0} bytes without \
         its entry in the index."
    ));
    table.note(
        "Redis' share has the entry in the index of sessions, which servers write 200 ms later, and \
         commands in scripts."
            .to_owned(),
    );
    Ok(table)
}

/// What nodes do in a second without calls: commands of each on average, of the busiest, and µs of
/// CPU of each; of the one Redis, then of each cluster.
struct Constant {
    idle: Vec<(f64, f64, f64)>,
    watched: Vec<(f64, f64, f64)>,
}

async fn constants(one: &Layout, clusters: &[Layout]) -> Result<Constant> {
    const SECONDS: u64 = 10;
    let layouts: Vec<&Layout> = std::iter::once(one).chain(clusters).collect();
    let count = async || -> Result<Vec<(f64, f64, f64)>> {
        let mut before = Vec::new();
        for layout in &layouts {
            before.push(layout.work()?);
        }
        tokio::time::sleep(Duration::from_secs(SECONDS)).await;
        let mut rates = Vec::new();
        for (layout, before) in layouts.iter().zip(before) {
            let after = layout.work()?.into_iter().zip(before);
            let done: Vec<Work> = after.map(|(after, before)| after - before).collect();
            let commands: Vec<f64> = done.iter().map(|work| work.commands).collect();
            let cpu_us: Vec<f64> = done.iter().map(|work| work.cpu_us).collect();
            let commands = Spread::of(&commands, SECONDS as f64);
            let cpu_us = Spread::of(&cpu_us, SECONDS as f64).mean;
            rates.push((commands.mean, commands.most, cpu_us));
        }
        Ok(rates)
    };
    let idle = count().await?;
    let mut watchers = Vec::new();
    for layout in &layouts {
        watchers.extend(layout.watch().await?);
    }
    let watched = count().await?;
    Ok(Constant { idle, watched })
}

fn what_does_not_split(
    report: &mut Report,
    clusters: &[Layout],
    samples: &[Vec<Sample>],
    constant: Constant,
) -> Result<()> {
    const COLUMNS: usize = 11;
    let mut table = Table::new(
        "What does not fall with more masters",
        &[
            "masters",
            "commands/s of each without calls",
            "of the busiest",
            "CPU of each",
            "with 500 watchers",
            "of the busiest",
            "CPU of each",
            "messages from other nodes per Append, at each",
            "CPU of one at its receiver",
            "at its sender",
            "its bytes",
        ],
    );
    let row = |name: &str, index: usize| {
        let (idle, watched) = (constant.idle[index], constant.watched[index]);
        let mut row = vec![name.to_owned()];
        for (mean, most, cpu_us) in [idle, watched] {
            row.push(format!("{mean:.0}"));
            row.push(format!("{most:.0}"));
            row.push(format!("{:.1} %", cpu_us / 1e4));
        }
        row
    };
    let mut plain = row("one Redis, no cluster, one server", 0);
    plain.resize(COLUMNS, String::new());
    table.row(plain);
    for (index, (layout, count)) in clusters.iter().zip(NODES).enumerate() {
        let mut row = row(&count.to_string(), index + 1);
        let heard = middle(&samples[index], |sample| {
            2.0 * sample.node(|work| work.heard).mean
        });
        row.push(format!("{heard:.2}"));
        if count == 1 {
            row.resize(COLUMNS, String::new());
        } else {
            let (sender, receiver, bytes) = publish(&layout.nodes)?;
            row.push(format!("{receiver:.1} µs"));
            row.push(format!("{sender:.1} µs"));
            row.push(format!("{bytes:.0}"));
            report.figure(&format!("scale_bus_receiver_us_{count}"), receiver);
            report.figure(&format!("scale_bus_bytes_{count}"), bytes);
        }
        table.row(row);
    }
    let index = clusters.last().ok_or("no cluster")?;
    let mut bytes = 0.0;
    for key in ["{message_store:}:sessions", "{message_store:}:names"] {
        for node in &index.nodes {
            let mut usage = redis::cmd("MEMORY");
            // Another node answers MOVED.
            let usage = usage.arg("USAGE").arg(key).arg("SAMPLES").arg(0);
            bytes += node
                .query::<Option<f64>>(usage)
                .ok()
                .flatten()
                .unwrap_or(0.0);
        }
    }
    let bytes = bytes / SESSIONS as f64;
    report.figure("scale_index_bytes_per_session", bytes);
    table.note(format!(
        "The index of sessions takes {bytes:.0} bytes for each session with a name of 11 bytes, all \
         of them at the master of its slot."
    ));
    report.scaling(table);
    Ok(())
}

/// What a published message costs the node that it is sent to and each other one, in µs of their CPU
/// for one message to one node; and its bytes.
fn publish(nodes: &[Redis]) -> Result<(f64, f64, f64)> {
    let before: Vec<Work> = nodes.iter().map(work).collect::<Result<_>>()?;
    let mut connection = nodes[0].connect()?;
    for _ in 0..PUBLISHED / 100 {
        let mut pipeline = redis::pipe();
        for _ in 0..100 {
            pipeline
                .cmd("PUBLISH")
                .arg("{message_store:scale-00000}:changed")
                .arg("");
        }
        pipeline.exec(&mut connection)?;
    }
    let heard = |works: &[Work]| works[1..].iter().map(|work| work.heard).sum::<f64>();
    let others = (nodes.len() - 1) as f64;
    let begin = Instant::now();
    loop {
        let now: Vec<Work> = nodes.iter().map(work).collect::<Result<_>>()?;
        if heard(&now) - heard(&before) >= PUBLISHED as f64 * others {
            break;
        }
        if begin.elapsed() > JOIN_LIMIT {
            return Err("not all nodes have heard what was published".into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let after: Vec<Work> = nodes.iter().map(work).collect::<Result<_>>()?;
    let done: Vec<Work> = after.into_iter().zip(before).map(|(a, b)| a - b).collect();
    let sent = PUBLISHED as f64 * others;
    let received: f64 = done[1..].iter().map(|work| work.cpu_us).sum();
    Ok((
        done[0].cpu_us / sent,
        received / sent,
        done[0].bus_out / sent,
    ))
}
