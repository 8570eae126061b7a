//! Moving sessions between stores: `export` writes them as lines of JSON, `import` reads them back.
//! Works on the stores themselves, without a server. Knows elements as bytes and not what they mean.
//!
//! - [`lines`]: the format
//! - [`export`], [`import`]: the two ways
//! - [`progress`]: what a person at a terminal sees

use std::{
    io::{self, Write as _},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    config::{Problems, StoreConfig},
    start::EXIT_USAGE,
    store::{self, Store, redis::Redis, sqlite::OpenError, sqlite::Sqlite},
};

pub mod export;
pub mod import;
pub mod lines;
pub mod progress;

/// How long to wait for Redis at the start, when the address may be wrong.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a store may be away before a command gives up: a restart takes seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first pause between two attempts; it doubles up to the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Why a command ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Settings(#[from] Problems),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{0}; run the same command again to go on")]
    Store(#[from] store::Error),
    #[error("cannot write the output: {0}")]
    Output(#[source] io::Error),
    #[error("cannot read the input: {0}")]
    Input(#[source] io::Error),
    #[error("line {line} of the input: {reason}")]
    Malformed { line: u64, reason: String },
    #[error("{0}")]
    Refused(String),
}

/// Turns a command's result into its exit code, and says on stderr what went wrong.
pub async fn exit_code(work: impl Future<Output = Result<ExitCode, Failure>>) -> ExitCode {
    match work.await {
        Ok(code) => code,
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

/// Opens a store. For reading only, an embedded file may be in use by a server.
async fn open(
    (config, key_prefix): &(StoreConfig, String),
    is_read_only: bool,
) -> Result<Arc<dyn Store>, Failure> {
    match config {
        StoreConfig::Embedded { path } if is_read_only => {
            Ok(Arc::new(Sqlite::open_reader(path, key_prefix)?))
        }
        StoreConfig::Embedded { path } => Ok(Arc::new(Sqlite::open(path, key_prefix)?)),
        StoreConfig::Redis(settings) => {
            let store = Redis::connect(settings.clone());
            let store = store.map_err(|error| Failure::Refused(error.to_string()))?;
            store.ready(CONNECT_LIMIT).await?;
            Ok(Arc::new(store))
        }
    }
}

/// Calls a store again while it is away, up to a limit. For calls that are safe to repeat.
async fn patiently<T, F>(mut call: impl FnMut() -> F) -> store::Result<T>
where
    F: Future<Output = store::Result<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut pause = PAUSE_MIN;
    loop {
        match call().await {
            Err(store::Error::Unavailable(_) | store::Error::OutcomeUnknown(_))
                if Instant::now() < deadline => {}
            result => return result,
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Whether an error concerns one session, so that others can go on.
fn is_of_one_session(error: &store::Error) -> bool {
    match error {
        store::Error::SequenceMismatch { .. }
        | store::Error::Cleared
        | store::Error::LeaseLost
        | store::Error::RequestReused
        | store::Error::WrongKeyType { .. }
        | store::Error::Corrupt(_) => true,
        store::Error::Unavailable(_) | store::Error::OutcomeUnknown(_) | store::Error::Full(_) => {
            false
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
