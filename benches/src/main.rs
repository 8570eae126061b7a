//! Measures chat-memory beside what it is compared with. `scripts/bench` builds and runs it.
//!
//! - [`load`][]: callers
//! - [`memory`]: Append and GetMessages, footprint, bytes
//! - [`peers`]: a server that it is compared with; another is `bin/chat-memory-hello.rs`
//! - [`turns`]: chat turns
//! - [`scale`]: more servers, more nodes of a cluster
//! - [`provider`]: the model of those turns
//! - [`flame`]: where the server's time goes
//! - [`children`], [`clock`]: processes, their time and memory
//! - [`report`]: what comes out; [`page`]: the page that is made of it

use std::{
    error::Error,
    io::{self, Write as _},
    path::PathBuf,
    process::{Command, ExitCode},
};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use report::Report;

mod children;
mod clock;
mod flame;
mod load;
mod memory;
mod page;
mod peers;
mod provider;
mod report;
mod scale;
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

    /// Write docs/benchmarks.md and its charts anew, from this run; or with --from, from an earlier
    /// one
    #[arg(long)]
    write_docs: bool,

    /// Measure nothing: take what an earlier run wrote
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,

    /// A Python that has LangChain and the OpenAI Agents SDK
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/python/bin/python"
    )]
    python: PathBuf,

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
    /// Append: throughput and latency, beside plain tonic and a naive server
    Append,
    /// GetMessages of the last 50 of 10,000, beside a naive server
    Get,
    /// What the length of a session costs, up to 1,000,000 messages; Python's libraries
    Lengths,
    /// Redis by its own tool
    Redis,
    /// Bytes of Redis per message
    Memory,
    /// Idle memory, time to the first answer, size of the program
    Footprint,
    /// Chat turns: how many at once, their memory, the delay added to a token
    Turns,
    /// The work of each process, with more servers and more nodes of a cluster
    Scale,
    /// Flame graphs of Append and GetMessages into docs/benchmarks; only when it is named
    Flame,
}

/// The other processes that this program can be.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    /// The model of the turns.
    Provider,
    /// A server that chat-memory is compared with.
    Naive,
}

/// How to measure.
pub struct Bench {
    pub quick: bool,
    pub program: PathBuf,
    pub turns: Vec<usize>,
    pub python: PathBuf,
}

impl Bench {
    /// Whether Python's libraries can be measured.
    pub fn runs_python(&self) -> bool {
        let is_there = self.python.exists();
        if !is_there {
            eprintln!(
                "{} is missing: no libraries of Python",
                self.python.display()
            );
        }
        is_there
    }

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
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    use tokio::runtime::Builder;
    let on_one_thread = || Builder::new_current_thread().enable_all().build();
    let on_all_threads = || Builder::new_multi_thread().enable_all().build();
    match cli.role {
        Some(Role::Provider) => return on_one_thread()?.block_on(provider::run()),
        // As tokio has it by default, and so a server of an afternoon.
        Some(Role::Naive) => return on_all_threads()?.block_on(peers::naive(&cli.redis)),
        None => {}
    }
    if let Some(from) = &cli.from {
        let report: Report = serde_json::from_slice(&std::fs::read(from)?)?;
        print_figures(&report);
        return if cli.write_docs {
            page::write(&report)
        } else {
            Ok(())
        };
    }

    let bench = Bench {
        quick: cli.quick,
        program: cli.program,
        turns: cli.turns,
        python: cli.python,
    };
    let mut report = Report {
        machine: machine(&bench)?,
        ..Report::default()
    };
    let parts = match &cli.parts[..] {
        [] => Part::value_variants(),
        parts => parts,
    };
    if parts.contains(&Part::Flame) && !cli.parts.is_empty() {
        on_all_threads()?.block_on(flame::draw(&bench))?;
    }
    for part in parts {
        let (bench, report) = (&bench, &mut report);
        match part {
            Part::Append => on_all_threads()?.block_on(memory::append(bench, report))?,
            Part::Get => on_all_threads()?.block_on(memory::get(bench, report))?,
            Part::Lengths => on_all_threads()?.block_on(memory::lengths(bench, report))?,
            Part::Redis => memory::redis_itself(bench, report)?,
            Part::Memory => on_all_threads()?.block_on(memory::memory(bench, report))?,
            Part::Footprint => on_all_threads()?.block_on(memory::footprint(bench, report))?,
            // Tokens come one by one: a second thread would only be woken in vain.
            Part::Turns => on_one_thread()?.block_on(turns::run(bench, report))?,
            Part::Scale => on_all_threads()?.block_on(scale::run(bench, report))?,
            // Its program is another one.
            Part::Flame => continue,
        }
        // What is measured stays, whatever happens to the next part.
        if let Some(folder) = cli.json.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&cli.json, serde_json::to_string_pretty(report)?)?;
    }
    print_figures(&report);
    if cli.write_docs {
        page::write(&report)
    } else {
        Ok(())
    }
}

fn print_figures(report: &Report) {
    println!();
    for figure in &report.figures {
        println!("figure {} {:.3}", figure.name, figure.value);
    }
}

/// What the run is on.
fn machine(bench: &Bench) -> Result<Vec<String>> {
    let first_line = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .map_err(|error| format!("{program}: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    let cores = std::thread::available_parallelism()?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let program = bench.program.to_str().ok_or("a path that is not UTF-8")?;
    Ok(vec![
        first_line(program, &["--version"])?,
        first_line("redis-server", &["--version"])?,
        first_line("rustc", &["--version"]).unwrap_or_default(),
        first_line("uname", &["-srm"])?,
        format!("{cores} cores, shared by clients, server, model and Redis"),
        format!("load of the machine before the run: {load}"),
        match bench.quick {
            true => "a quick run: an impression, not a result".to_owned(),
            false => "a full run".to_owned(),
        },
    ])
}
