//! From settings to a server that runs: opens the store, makes the model, binds, says what there
//! is, and waits for a signal.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    num::NonZero,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, Listen, ModelConfig, Problems, Serve, StoreConfig, VERSION},
    metrics::{self, Metrics},
    model::{Model, echo::Echo, provider::Provider, retry::Retry},
    server::{self, Listener, Parts},
    service::{self, Limits},
    store::{
        Store,
        redis::{self, Redis},
        sqlite::{self, Sqlite},
    },
    telemetry::{self, LogFormat},
    turn::{self, Turns},
    workers::{self, Workers},
};

/// The exit code for settings that cannot work, as clap has it.
pub const EXIT_USAGE: u8 = 2;

/// How long what is left on the runtime gets once the server has drained.
const RUNTIME_LIMIT: Duration = Duration::from_millis(200);
/// How long a watcher's caller may take nothing although there is something. Longer than a client
/// that works stalls, and short enough that the dead ones do not pile up.
const WATCHER_PATIENCE: Duration = Duration::from_secs(60);

/// Why a server did not start or did not go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Settings(Problems),
    #[error("{0}")]
    Store(String),
    #[error("cannot run: {0}")]
    Io(#[from] io::Error),
}

/// Runs the server until it is told to stop.
pub fn serve(settings: &Serve) -> ExitCode {
    // One provider for all TLS, named before its first use: two in one program panic then.
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok();
    let outcome = settings
        .check()
        .map_err(Failure::Settings)
        .and_then(|config| run(&config));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Settings(problems)) => {
            let _ = writeln!(io::stderr(), "{problems}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(failure) => {
            let _ = writeln!(io::stderr(), "error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a client command.
pub fn client(work: impl Future<Output = ExitCode>) -> ExitCode {
    // One thread is enough for one connection, and starts sooner.
    match workers::runtime() {
        Ok(runtime) => {
            let code = runtime.block_on(work);
            // A thread that still waits for a line from the terminal is not waited for.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command that works on a store itself.
pub fn tool(work: impl Future<Output = ExitCode>) -> ExitCode {
    // A thread beside the command's own: while that waits for its input or output, the connection
    // to the store is looked after.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: cannot run: {error}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn run(config: &Config) -> Result<(), Failure> {
    // The filter was checked with the other settings.
    telemetry::start(config.log_format, &config.log).ok();
    if let Err(error) = workers::take_turns() {
        // A sandbox may forbid it: all works without.
        tracing::debug!(%error, "the scheduling policy stays as it is");
    }
    // As many as this process may use, by its cgroup, too.
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let workers = match config.workers {
        0 => workers::count_for(cores),
        asked => asked,
    };
    let runtime = workers::runtime()?;
    let outcome = runtime.block_on(run_until_signal(config, workers));
    runtime.shutdown_timeout(RUNTIME_LIMIT);
    outcome
}

async fn run_until_signal(config: &Config, workers: usize) -> Result<(), Failure> {
    let shutdown = shutdown_on_signal()?;
    outlive_file_limit()?;
    let workers = Workers::start(workers)?;
    let model = make_model(&config.model).map_err(Failure::Settings)?;
    let listeners = bind(config).await.map_err(Failure::Settings)?;
    // Before all that counts.
    let metrics = start_metrics(config).await.map_err(Failure::Settings)?;
    let store = open_store(config, workers.handles())?;
    let metrics_at = metrics.as_ref().map(Metrics::address).transpose()?;
    announce(config, &listeners, metrics_at, &*store, &*model)?;
    if let Some(metrics) = metrics {
        tokio::spawn(metrics.serve());
    }

    let turns = Turns::new(
        Arc::clone(&store),
        model,
        service::parse_ask,
        turn::Settings {
            history_messages: config.history_messages,
            turn_limit: config.turn_limit,
            turns_max: config.turns_max,
            lease: config.lease,
            retention: config.turn_retention,
            adopts: config.adopt_turns,
            ..turn::Settings::default()
        },
    );
    let parts = Parts {
        listeners,
        workers,
        store,
        turns,
        limits: Limits {
            requests_max: config.requests_max,
            watchers_max: config.watchers_max,
            watcher_patience: WATCHER_PATIENCE,
        },
        streams_max: config.streams_max,
        keepalive: config.keepalive,
        drain_limit: config.drain_limit,
    };
    server::run(parts, shutdown).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Cancels on the first SIGTERM or SIGINT; exits at once on the second.
fn shutdown_on_signal() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    tokio::spawn(async move {
        for exit_code in [None, Some(1)] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if let Some(code) = exit_code {
                std::process::exit(code);
            }
            token.cancel();
        }
    });
    Ok(shutdown)
}

/// Has a limit to the size of this process' files (`ulimit -f`) fail the write that meets it, as a full
/// disk does. Unless somebody listens for its signal, the kernel ends the process instead.
fn outlive_file_limit() -> io::Result<()> {
    signal(SignalKind::from_raw(libc::SIGXFSZ)).map(drop)
}

/// Binds all addresses, or says all that cannot be bound.
async fn bind(config: &Config) -> Result<Vec<Listener>, Problems> {
    let mut listeners = Vec::with_capacity(config.listen.len());
    let mut problems = Vec::new();
    for address in &config.listen {
        match Listener::bind(address, config.unix_mode).await {
            Ok(listener) => listeners.push(listener),
            Err(error) => problems.push(format!("--listen: {address}: {error}")),
        }
    }
    if problems.is_empty() {
        Ok(listeners)
    } else {
        Err(Problems(problems))
    }
}

/// Listens for who asks for metrics, if that is wanted.
async fn start_metrics(config: &Config) -> Result<Option<Metrics>, Problems> {
    let Some(address) = config.metrics_listen else {
        return Ok(None);
    };
    let store = match config.store {
        StoreConfig::Embedded { .. } => "sqlite",
        StoreConfig::Redis(_) => "redis",
    };
    let started = Metrics::start(address, VERSION, store).await;
    let failed = |error| Problems(vec![format!("--metrics-listen: {address}: {error}")]);
    started.map(Some).map_err(failed)
}

fn open_store(config: &Config, workers: &[Handle]) -> Result<Arc<dyn Store>, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::Store(error.to_string());
    match &config.store {
        StoreConfig::Embedded { path } => {
            let options = sqlite::Options {
                upkeep: config.upkeep,
                workers: workers.to_vec(),
                ..sqlite::Options::default()
            };
            let store = Sqlite::open_with(path, &config.key_prefix, options);
            Ok(Arc::new(store.map_err(|error| failed(&error))?))
        }
        StoreConfig::Redis(settings) => {
            let settings = redis::Settings {
                upkeep: config.upkeep,
                ..settings.clone()
            };
            let store = Redis::connect_for(settings, workers);
            Ok(Arc::new(store.map_err(|error| failed(&error))?))
        }
    }
}

fn make_model(config: &ModelConfig) -> Result<Arc<dyn Model>, Problems> {
    let ModelConfig::Provider {
        settings,
        policy,
        keys,
    } = config
    else {
        return Ok(Arc::new(Echo));
    };
    let provider = Provider::new(settings.clone(), |name| keys(name));
    let provider = provider.map_err(|error| Problems(vec![format!("--model: {error}")]))?;
    Ok(Arc::new(Retry::new(Arc::new(provider), policy.clone())))
}

/// Says what runs where: to people on standard output, to machines in the log.
fn announce(
    config: &Config,
    listeners: &[Listener],
    metrics_at: Option<SocketAddr>,
    store: &dyn Store,
    model: &dyn Model,
) -> io::Result<()> {
    let mut addresses = Vec::with_capacity(listeners.len());
    for listener in listeners {
        addresses.push(listener.address()?);
    }
    let (store, model) = (store.describe(), model.describe());
    let metrics = metrics_at.map(|address| format!("http://{address}{}", metrics::PATH));
    if config.log_format == LogFormat::Json {
        let listening: Vec<String> = addresses.iter().map(Listen::to_string).collect();
        let listening = listening.join(",");
        tracing::info!(
            version = VERSION,
            listening,
            metrics,
            store,
            model,
            "started"
        );
        return Ok(());
    }
    let mut out = io::stdout().lock();
    writeln!(out, "chat-memory {VERSION}")?;
    for address in &addresses {
        writeln!(out, "  listening on {address}")?;
    }
    if let Some(metrics) = metrics {
        writeln!(out, "  metrics: {metrics}")?;
    }
    writeln!(out, "  store: {store}")?;
    writeln!(out, "  model: {model}")?;
    let Some(first) = addresses.first() else {
        return Ok(());
    };
    let program = std::env::args().next();
    let program = program.as_deref().unwrap_or("chat-memory");
    let target = match first {
        Listen::Tcp(_) if *first == Listen::default() => String::new(),
        _ => format!(" --target {first}"),
    };
    let grpcurl = match first {
        Listen::Tcp(address) => address.to_string(),
        Listen::Unix(path) => format!("-unix {}", path.display()),
    };
    writeln!(
        out,
        "\n\
         Try it in another terminal:\n\
         \x20 {program} chat --session foo{target}\n\
         \x20 {program} history --session foo{target}\n\
         \x20 grpcurl -plaintext -d '{{\"session_id\": \"foo\", \"messages\": [{{\"role\": \
         \"ROLE_USER\", \"content\": \"hi\"}}]}}' {grpcurl} chatmemory.v1.ChatMemory/Chat\n\
         Stop it with Ctrl-C.\n"
    )?;
    out.flush()
}
