//! Chat turns: how many a server carries at once, what each costs in memory, and by how much the
//! server delays a token.
//!
//! The model, the server, Redis and this client are processes of their own. The model writes into
//! each token when it said it, by the clock they share; what is measured is when the client has
//! parsed it, so the client's own delay counts too.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hdrhistogram::Histogram;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tonic::transport::Channel;

use crate::{
    Bench, Result,
    children::{Child, Redis},
    clock::{cpu_us, now_ns, rss_kib},
    load::{connect, histogram},
    pb::{ChatRequest, Message, Role, chat_memory_client::ChatMemoryClient, chat_response},
    provider::{MODEL, TOKEN_EVERY},
    report::{Report, Table, micros},
};

/// A token that comes later than this after the model said it breaks the promise.
const LATE: Duration = Duration::from_millis(100);
/// Turns at once, one step after the other until a step is not held.
const STEPS: [usize; 4] = [500, 1_000, 2_000, 3_000];
const STEPS_QUICK: [usize; 1] = [1_000];
/// Turns that begin in a second.
const BEGIN_PER_SECOND: usize = 250;
/// Turns on one connection, at most: fewer than the server allows.
const TURNS_PER_CONNECTION: usize = 100;
/// Turns that warm up the server before its idle memory is read.
const WARM_TURNS: usize = 16;
/// Turns at once when delays are measured.
const DELAY_TURNS: usize = 100;
/// How long one turn may take beyond its own time.
const TURN_PATIENCE: Duration = Duration::from_secs(60);

/// What was seen of tokens.
struct Seen {
    /// From the model to the client, in nanoseconds.
    added: Histogram<u64>,
    /// From the call to the model, plus from the model's first token to the client.
    first: Histogram<u64>,
    late: u64,
    completed: u64,
    failures: Vec<String>,
    counts: bool,
}

impl Seen {
    fn new() -> Result<Self> {
        Ok(Self {
            added: histogram()?,
            first: histogram()?,
            late: 0,
            completed: 0,
            failures: Vec::new(),
            counts: true,
        })
    }

    fn token(&mut self, token: &str, called: u64, received: u64) {
        if !self.counts {
            return;
        }
        let number = |text: &str| text.parse::<u64>().ok();
        let said = match token.strip_prefix('f') {
            Some(first) => {
                let Some((came, said)) = first.split_once(':') else {
                    return self.failures.push(format!("a token says {token:?}"));
                };
                if let (Some(came), Some(said)) = (number(came), number(said)) {
                    let added = came.saturating_sub(called) + received.saturating_sub(said);
                    self.first.saturating_record(added);
                }
                number(said)
            }
            None => number(token),
        };
        let Some(said) = said else {
            return self.failures.push(format!("a token says {token:?}"));
        };
        let added = received.saturating_sub(said);
        self.added.saturating_record(added);
        self.late += u64::from(u128::from(added) > LATE.as_nanos());
    }
}

#[derive(Clone)]
struct Watcher {
    seen: Arc<Mutex<Seen>>,
    running: Arc<AtomicUsize>,
}

impl Watcher {
    fn new() -> Result<Self> {
        Ok(Self {
            seen: Arc::new(Mutex::new(Seen::new()?)),
            running: Arc::default(),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs one turn to its end, and notes each token.
async fn turn(
    mut client: ChatMemoryClient<Channel>,
    session: String,
    tokens: u32,
    watcher: Watcher,
) {
    let limit = TOKEN_EVERY * tokens + TURN_PATIENCE;
    let ran = timeout(limit, follow(&mut client, session, tokens, &watcher)).await;
    let mut seen = watcher.seen();
    match ran {
        Ok(Ok(())) => seen.completed += 1,
        Ok(Err(error)) => seen.failures.push(error.to_string()),
        Err(_) => seen.failures.push("a turn does not end".to_owned()),
    }
}

async fn follow(
    client: &mut ChatMemoryClient<Channel>,
    session: String,
    tokens: u32,
    watcher: &Watcher,
) -> Result<()> {
    let request = ChatRequest {
        session_id: session,
        messages: vec![Message {
            role: Role::User.into(),
            content: "Count the nanoseconds.".to_owned(),
            ..Message::default()
        }],
        model: format!("{MODEL}{tokens}"),
        ..ChatRequest::default()
    };
    let called = now_ns();
    let mut events = client.chat(request).await?.into_inner();
    let mut heard = 0;
    let mut is_complete = false;
    while let Some(event) = events.message().await? {
        let received = now_ns();
        match event.event {
            Some(chat_response::Event::Delta(delta)) => {
                if heard == 0 {
                    watcher.running.fetch_add(1, Ordering::Relaxed);
                }
                let mut seen = watcher.seen();
                for token in delta.text.split_ascii_whitespace() {
                    seen.token(token, called, received);
                    heard += 1;
                }
            }
            Some(chat_response::Event::Completed(completed)) => {
                is_complete = completed.messages.len() == 2;
            }
            _ => {}
        }
    }
    watcher.running.fetch_sub(1, Ordering::Relaxed);
    if !is_complete || heard != tokens {
        return Err(format!("{heard} of {tokens} tokens; complete: {is_complete}").into());
    }
    Ok(())
}

/// The processes of one measurement.
struct Stage {
    redis: Redis,
    provider: Child,
    server: Child,
    clients: Vec<ChatMemoryClient<Channel>>,
    _folder: tempfile::TempDir,
}

impl Stage {
    async fn new(bench: &Bench, turns: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let redis = Redis::start(&[])?;
        let provider = Child::role("provider", folder.path(), &[])?;
        let url = format!("http://{}/v1", provider.tcp()?);
        let turns_max = (turns * 2).to_string();
        let arguments = [
            ["--listen", "127.0.0.1:0"],
            ["--redis", &redis.url()],
            ["--model-url", &url],
            ["--model", "tokens-20"],
            ["--max-turns", &turns_max],
            ["--log", "warn"],
        ];
        let server = Child::server(&bench.program, folder.path(), &arguments.concat())?;
        let count = turns.div_ceil(TURNS_PER_CONNECTION).max(8);
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(ChatMemoryClient::new(connect(server.tcp()?).await?));
        }
        Ok(Self {
            redis,
            provider,
            server,
            clients,
            _folder: folder,
        })
    }

    fn client(&self, index: usize) -> ChatMemoryClient<Channel> {
        self.clients[index % self.clients.len()].clone()
    }

    /// A few turns at once, to their end.
    async fn warm_up(&self) -> Result<()> {
        let watcher = Watcher::new()?;
        let turns = (0..WARM_TURNS).map(|index| {
            turn(
                self.client(index),
                format!("warm-{index}"),
                20,
                watcher.clone(),
            )
        });
        futures_util::future::join_all(turns).await;
        let seen = watcher.seen();
        match seen.failures.first() {
            Some(failure) => Err(format!("a turn failed: {failure}").into()),
            None => Ok(()),
        }
    }

    /// CPU time of server, Redis, model and this process, in microseconds.
    fn cpu(&self) -> [u64; 4] {
        let client = std::process::id();
        [
            self.server.id(),
            self.redis.id(),
            self.provider.id(),
            client,
        ]
        .map(cpu_us)
    }
}

/// What one step showed.
pub struct Held {
    turns: usize,
    is_held: bool,
    kib_per_turn: f64,
}

/// Both measurements.
pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    held(bench, report).await?;
    delays(bench, report).await
}

/// As many turns at once as the server holds.
async fn held(bench: &Bench, report: &mut Report) -> Result<()> {
    let steps = match &bench.turns[..] {
        [] if bench.quick => &STEPS_QUICK[..],
        [] => &STEPS[..],
        steps => steps,
    };
    let mut table = Table::new(
        "Chat turns at once, 20 tokens/s each",
        &[
            "turns",
            "tokens/s",
            "p50",
            "p99",
            "p99.9",
            "longest",
            "later than 100 ms",
            "stored",
            "KiB per turn",
            "log writes per turn and s",
            "µs of CPU per token: server",
            "Redis",
            "model",
            "client",
        ],
    );
    let mut best: Option<Held> = None;
    for turns in steps {
        let held = step(bench, *turns, &mut table).await?;
        let goes_on = held.is_held;
        // The memory of the largest step says most, also if it was not held.
        report.figure("turn_kib", held.kib_per_turn);
        if held.is_held {
            best = Some(held);
        }
        if !goes_on {
            break;
        }
    }
    report.figure("turns_held", best.map_or(0.0, |held| held.turns as f64));
    report.table(table);
    Ok(())
}

async fn step(bench: &Bench, turns: usize, table: &mut Table) -> Result<Held> {
    let window = Duration::from_secs(if bench.quick { 5 } else { 15 });
    let ramp = Duration::from_secs(turns.div_ceil(BEGIN_PER_SECOND) as u64);
    let settle = Duration::from_secs(2);
    let life = ramp + settle * 2 + window;
    let tokens = (life.as_millis() / TOKEN_EVERY.as_millis()) as u32;
    let bar = bench.bar(&format!("{turns} turns"), life.as_secs() + 3);

    let stage = Stage::new(bench, turns).await?;
    stage.warm_up().await?;
    sleep(Duration::from_secs(1)).await;
    let idle_kib = rss_kib(stage.server.id());
    bar.inc(3);

    let watcher = Watcher::new()?;
    let mut tasks = tokio::task::JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / BEGIN_PER_SECOND as u32);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let begin = Instant::now();
    for index in 0..turns {
        ticks.tick().await;
        let session = format!("held-{index}");
        tasks.spawn(turn(stage.client(index), session, tokens, watcher.clone()));
        if index % BEGIN_PER_SECOND == 0 {
            bar.inc(1);
        }
    }
    sleep(settle).await;
    let all_running = watcher.running.load(Ordering::Relaxed);

    let scripts_before = stage.redis.scripts_run()?;
    let cpu_before = stage.cpu();
    let heard_before = watcher.seen().added.len();
    let window_begin = Instant::now();
    let mut peak_kib = 0;
    while window_begin.elapsed() < window {
        sleep(Duration::from_millis(500)).await;
        peak_kib = peak_kib.max(rss_kib(stage.server.id()));
        bar.set_position(3 + begin.elapsed().as_secs());
    }
    let seconds = window_begin.elapsed().as_secs_f64();
    let scripts = stage.redis.scripts_run()? - scripts_before;
    let cpu_after = stage.cpu();
    let heard = watcher.seen().added.len() - heard_before;

    while tasks.join_next().await.is_some() {}
    let stored = stored(&stage.redis, turns)?;
    bar.finish_and_clear();

    let seen = watcher.seen();
    let kib_per_turn = peak_kib.saturating_sub(idle_kib) as f64 / turns as f64;
    let mut row = vec![
        turns.to_string(),
        format!("{:.0}", heard as f64 / seconds),
        micros(seen.added.value_at_quantile(0.5)),
        micros(seen.added.value_at_quantile(0.99)),
        micros(seen.added.value_at_quantile(0.999)),
        micros(seen.added.max()),
        seen.late.to_string(),
        format!("{stored}"),
        format!("{kib_per_turn:.1}"),
        format!("{:.2}", scripts as f64 / seconds / turns as f64),
    ];
    for (after, before) in cpu_after.iter().zip(cpu_before) {
        row.push(format!("{:.1}", (after - before) as f64 / heard as f64));
    }
    table.row(row);
    for failure in seen.failures.iter().take(3) {
        table.note(format!("{turns} turns: {failure}"));
    }
    let all = turns as u64;
    Ok(Held {
        turns,
        is_held: seen.late == 0
            && seen.failures.is_empty()
            && seen.completed == all
            && stored == turns
            && all_running == turns,
        kib_per_turn,
    })
}

/// How many of the sessions hold question and answer.
fn stored(redis: &Redis, turns: usize) -> Result<usize> {
    let mut connection = redis.connect()?;
    let mut whole = 0;
    for first in (0..turns).step_by(500) {
        let mut commands = redis::pipe();
        for index in first..turns.min(first + 500) {
            commands
                .cmd("LLEN")
                .arg(format!("message_store:held-{index}"));
        }
        let lengths: Vec<usize> = commands.query(&mut connection)?;
        whole += lengths.iter().filter(|length| **length == 2).count();
    }
    Ok(whole)
}

/// The delay that the server adds to a model, while 100 turns run and begin.
async fn delays(bench: &Bench, report: &mut Report) -> Result<()> {
    let rounds = if bench.quick { 2 } else { 5 };
    let window = Duration::from_secs(if bench.quick { 4 } else { 10 });
    let bar = bench.bar("delays", rounds * (window.as_secs() + 2));
    let mut table = Table::new(
        "Delay that is added to a token, 100 turns at once",
        &[
            "round",
            "tokens",
            "p50",
            "p99",
            "p99.9",
            "first: turns",
            "first: p50",
            "first: p99",
        ],
    );
    let (mut firsts, mut first_p99s) = (Vec::new(), Vec::new());
    let (mut p50s, mut p99s) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let stage = Stage::new(bench, DELAY_TURNS).await?;
        stage.warm_up().await?;
        let watcher = Watcher::new()?;
        watcher.seen().counts = false;
        let (stop, stopped) = watch::channel(false);
        let mut callers = tokio::task::JoinSet::new();
        for index in 0..DELAY_TURNS {
            let (client, watcher, stopped) =
                (stage.client(index), watcher.clone(), stopped.clone());
            callers.spawn(async move {
                // So that turns begin all the time.
                sleep(TOKEN_EVERY * 60 * index as u32 / DELAY_TURNS as u32).await;
                while !*stopped.borrow() {
                    turn(
                        client.clone(),
                        format!("delay-{index}"),
                        60,
                        watcher.clone(),
                    )
                    .await;
                }
            });
        }
        // All have begun by then.
        sleep(TOKEN_EVERY * 70).await;
        watcher.seen().counts = true;
        sleep(window).await;
        watcher.seen().counts = false;
        stop.send_replace(true);
        while callers.join_next().await.is_some() {}
        bar.inc(window.as_secs() + 2);

        let seen = watcher.seen();
        if let Some(failure) = seen.failures.first() {
            return Err(format!("a turn failed: {failure}").into());
        }
        let (first, first_p99) = (
            seen.first.value_at_quantile(0.5),
            seen.first.value_at_quantile(0.99),
        );
        let p99 = seen.added.value_at_quantile(0.99);
        table.row(vec![
            round.to_string(),
            seen.added.len().to_string(),
            micros(seen.added.value_at_quantile(0.5)),
            micros(p99),
            micros(seen.added.value_at_quantile(0.999)),
            seen.first.len().to_string(),
            micros(first),
            micros(first_p99),
        ]);
        firsts.push(first as f64 / 1e3);
        first_p99s.push(first_p99 as f64 / 1e3);
        p50s.push(seen.added.value_at_quantile(0.5) as f64 / 1e3);
        p99s.push(p99 as f64 / 1e3);
    }
    bar.finish_and_clear();
    report.spread("first_token_added_us", firsts);
    report.spread("first_token_added_us_p99", first_p99s);
    report.spread("token_added_us_p50", p50s);
    report.spread("token_added_us_p99", p99s);
    report.table(table);
    Ok(())
}
