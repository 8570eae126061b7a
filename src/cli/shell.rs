//! `chat-memory completions` and `chat-memory man`: the command line's own definition, as a shell and
//! as a reader of manuals want it. Nothing in them is written by hand.

use std::{
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
};

use clap::Command;

use super::{
    Error,
    args::{CompletionsArgs, ManArgs},
    exit_code,
};

/// Prints the completion for a shell.
pub fn completions(args: &CompletionsArgs, command: &mut Command) -> ExitCode {
    // Into memory first: the generators panic where they cannot write, as before a closed pipe.
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    clap_complete::generate(args.shell, command, name, &mut script);
    exit_code(print(&script))
}

/// Prints the manual page of the program, or writes those of all commands into a folder.
pub fn man(args: &ManArgs, command: Command) -> ExitCode {
    exit_code(match &args.out {
        Some(folder) => write_pages(folder, command),
        None => page(command).and_then(|page| print(&page)),
    })
}

fn page(command: Command) -> Result<Vec<u8>, Error> {
    let mut page = Vec::new();
    // As it is when all pages are written: `help` is no command of its own.
    clap_mangen::Man::new(command.disable_help_subcommand(true)).render(&mut page)?;
    Ok(page)
}

fn write_pages(folder: &Path, command: Command) -> Result<ExitCode, Error> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)?;
    Ok(ExitCode::SUCCESS)
}

fn print(text: &[u8]) -> Result<ExitCode, Error> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
