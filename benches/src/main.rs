//! Measures chat-memory beside what it is compared with. `scripts/bench` builds and runs it.
//!
//! - [`load`]: callers
//! - [`peers`]: the servers that it is compared with
//! - [`turns`]: chat turns
//! - [`provider`]: the model of those turns
//! - [`children`], [`clock`]: processes, their time and memory
//! - [`report`]: what comes out

use std::{
    error::Error,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

mod children;
mod clock;
mod load;
mod peers;
mod provider;
mod report;
mod turns;

/// The generated types of the server's contract.
#[allow(missing_docs, clippy::all)]
mod pb {
    tonic::include_proto!("chatmemory.v1");
}

type Failure = Box<dyn Error + Send + Sync>;
type Result<T> = std::result::Result<T, Failure>;

/// Measures chat-memory beside what it is compared with, on this machine.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench")]
struct Cli {
    /// What to measure; everything if nothing is named
    #[arg(value_enum)]
    parts: Vec<Part>,

    /// Fewer and shorter rounds: an impression, not a result
    #[arg(long)]
    quick: bool,

    /// How many turns at once, in place of the usual steps
    #[arg(long, value_name = "N", value_delimiter = ',')]
    turns: Vec<usize>,

    /// The server to measure
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/release/chat-memory"
    )]
    program: PathBuf,

    /// Where to write the JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/results.json")]
    json: PathBuf,

    /// What this process is, besides the one that measures
    #[arg(long, hide = true)]
    role: Option<Role>,

    /// The Redis of that process
    #[arg(long, hide = true, default_value = "")]
    redis: String,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Chat turns: how many at once, their memory, the delay added to a token
    Turns,
}

/// The other processes that this program can be.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    /// The model of the turns.
    Provider,
    /// The servers that chat-memory is compared with.
    Peers,
}

/// How to measure.
pub struct Bench {
    pub quick: bool,
    pub program: PathBuf,
    pub turns: Vec<usize>,
}

impl Bench {
    /// A bar that says how far a measurement has come.
    pub fn bar(&self, what: &str, length: u64) -> ProgressBar {
        let bar = ProgressBar::new(length);
        let template = "{msg:24} {wide_bar} {elapsed} of about {duration}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(std::time::Duration::from_millis(500));
        bar
    }
}

/// Tells whoever started this process that it listens.
fn ready(address: &str) {
    let mut out = io::stdout().lock();
    // If nobody reads it, nobody waits for it.
    let _ = writeln!(out, "  listening on {address}\nStop it with Ctrl-C.");
    let _ = out.flush();
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let work = async {
        match cli.role {
            Some(Role::Provider) => provider::run().await,
            Some(Role::Peers) => peers::run(&cli.redis).await,
            None => measure(cli).await,
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(work))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(cli: Cli) -> Result<()> {
    let bench = Bench {
        quick: cli.quick,
        program: cli.program,
        turns: cli.turns,
    };
    let mut report = report::Report::default();
    let parts = match &cli.parts[..] {
        [] => Part::value_variants(),
        parts => parts,
    };
    for part in parts {
        match part {
            Part::Turns => turns::run(&bench, &mut report).await?,
        }
    }
    println!();
    for figure in &report.figures {
        println!("figure {} {:.4}", figure.name, figure.value);
    }
    if let Some(folder) = cli.json.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&cli.json, serde_json::to_string_pretty(&report)?)?;
    Ok(())
}
