//! Callers: how they connect, and how their calls are counted. Knows nothing of what is called.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use hyper_util::rt::TokioIo;
use tokio::{task::JoinSet, time::sleep};
use tonic::transport::{Channel, Endpoint};

use crate::{Result, clock::cpu_us};

/// Connections of one load, at most.
pub const CONNECTIONS: usize = 8;

/// Connects to `127.0.0.1:PORT` or `unix:/path`.
pub async fn connect(address: &str) -> Result<Channel> {
    if let Some(path) = address.strip_prefix("unix:") {
        let path = path.to_owned();
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move {
                tokio::net::UnixStream::connect(path)
                    .await
                    .map(TokioIo::new)
            }
        });
        let endpoint = Endpoint::from_static("http://socket");
        return Ok(endpoint.connect_with_connector(connector).await?);
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.tcp_nodelay(true).connect().await?)
}

/// As many connections as a load uses.
pub async fn connect_all(address: &str) -> Result<Vec<Channel>> {
    let mut channels = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        channels.push(connect(address).await?);
    }
    Ok(channels)
}

/// Counts nanoseconds, to a minute.
pub fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(60_000_000_000, 3)?)
}

/// A call under way.
pub type Calling = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// What is called: `(caller, call)` to one call.
type Call = Arc<dyn Fn(usize, u64) -> Calling + Send + Sync>;

/// Something to be measured beside others.
#[derive(Clone)]
pub struct Target {
    pub name: String,
    /// The process that answers, and the one that it may ask in turn.
    processes: [u32; 2],
    call: Call,
}

impl Target {
    pub fn new(
        name: &str,
        processes: [u32; 2],
        call: impl Fn(usize, u64) -> Calling + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            processes,
            call: Arc::new(call),
        }
    }
}

/// What one load showed.
pub struct Sample {
    pub calls_per_second: f64,
    /// Nanoseconds of a call.
    pub latency: Histogram<u64>,
    /// CPU time of the process that answers, and of the one behind it, in microseconds.
    pub cpu_us_per_call: [f64; 2],
}

const WARMING: u8 = 0;
const COUNTING: u8 = 1;
const STOPPED: u8 = 2;

/// Has this many callers call without a pause, each waiting for its answer; counts after a warm-up.
pub async fn drive(
    target: &Target,
    callers: usize,
    warm_up: Duration,
    length: Duration,
) -> Result<Sample> {
    let phase = Arc::new(AtomicU8::new(WARMING));
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        let (call, phase) = (Arc::clone(&target.call), Arc::clone(&phase));
        tasks.spawn(async move {
            let mut latency = histogram()?;
            for number in 0.. {
                let begin = Instant::now();
                call(caller, number).await?;
                let took = begin.elapsed();
                match phase.load(Ordering::Relaxed) {
                    WARMING => {}
                    COUNTING => latency.saturating_record(took.as_nanos() as u64),
                    _ => break,
                }
            }
            Ok::<_, crate::Failure>(latency)
        });
    }
    sleep(warm_up).await;
    phase.store(COUNTING, Ordering::Relaxed);
    let (cpu_before, begin) = (target.processes.map(cpu_us), Instant::now());
    sleep(length).await;
    phase.store(STOPPED, Ordering::Relaxed);
    let seconds = begin.elapsed().as_secs_f64();
    let cpu_after = target.processes.map(cpu_us);

    let mut latency = histogram()?;
    while let Some(done) = tasks.join_next().await {
        let counted = done?.map_err(|error| format!("{}: {error}", target.name))?;
        latency.add(counted)?;
    }
    let calls = latency.len() as f64;
    Ok(Sample {
        calls_per_second: calls / seconds,
        latency,
        cpu_us_per_call: [0, 1].map(|of| (cpu_after[of] - cpu_before[of]) as f64 / calls),
    })
}

/// Has one caller call all of them in turns, call by call, so that whatever slows the machine slows
/// each alike. Returns the latencies of each, in nanoseconds.
pub async fn alternate(targets: &[Target], calls: u64) -> Result<Vec<Histogram<u64>>> {
    let mut latencies = Vec::new();
    for _ in targets {
        latencies.push(histogram()?);
    }
    let warm_up = calls / 10;
    for number in 0..calls + warm_up {
        for (target, latency) in targets.iter().zip(&mut latencies) {
            let begin = Instant::now();
            (target.call)(0, number)
                .await
                .map_err(|error| format!("{}: {error}", target.name))?;
            if number >= warm_up {
                latency.saturating_record(begin.elapsed().as_nanos() as u64);
            }
        }
    }
    Ok(latencies)
}
