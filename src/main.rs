//! The program: parse, start, exit code.

use std::process::ExitCode;

use chat_memory::{
    cli,
    config::{Cli, Command},
    doctor, moving, start,
};

fn main() -> ExitCode {
    let cli = Cli::parse_all();
    match cli.command {
        None => start::serve(&cli.serve),
        Some(Command::Serve(serve)) => start::serve(&serve),
        Some(Command::Chat(args)) => start::client(cli::chat::run(args)),
        Some(Command::History(args)) => start::client(cli::history::run(args)),
        Some(Command::Health(args)) => start::client(cli::health::run(args)),
        Some(Command::Export(args)) => start::tool(moving::exit_code(moving::export::run(&args))),
        Some(Command::Import(args)) => start::tool(moving::exit_code(moving::import::run(&args))),
        Some(Command::Doctor(args)) => start::tool(doctor::run(&args)),
    }
}
