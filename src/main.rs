//! The program: parse, start, exit code.

use std::process::ExitCode;

use chat_memory::{
    cli,
    config::{Cli, Command},
    doctor, moving, start,
};
use clap::CommandFactory as _;

/// Faster than C's with many small pieces on several threads (`docs/benchmarks.md`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse_all();
    match cli.command {
        None => start::serve(&cli.serve),
        Some(Command::Serve(serve)) => start::serve(&serve),
        Some(Command::Chat(args)) => start::client(cli::chat::run(args)),
        Some(Command::History(args)) => start::client(cli::history::run(args)),
        Some(Command::Watch(args)) => start::client(cli::watch::run(args)),
        Some(Command::Sessions(args)) => start::client(cli::sessions::run(args)),
        Some(Command::Update(args)) => start::client(cli::change::update(args)),
        Some(Command::Rewind(args)) => start::client(cli::change::rewind(args)),
        Some(Command::Fork(args)) => start::client(cli::change::fork(args)),
        Some(Command::Health(args)) => start::client(cli::health::run(args)),
        Some(Command::Export(args)) => start::tool(moving::exit_code(moving::export::run(&args))),
        Some(Command::Import(args)) => start::tool(moving::exit_code(moving::import::run(&args))),
        Some(Command::Doctor(args)) => start::tool(doctor::run(&args)),
        Some(Command::Completions(args)) => cli::shell::completions(&args, &mut Cli::command()),
        Some(Command::Man(args)) => cli::shell::man(&args, Cli::command()),
    }
}
