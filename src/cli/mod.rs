//! The client commands: `chat`, `history`, `watch`, `sessions` and the like. They know the server by
//! its gRPC API alone, as any other client does; no store, no model.
//!
//! Text of messages reaches a terminal only through [`text`], so that what somebody stored cannot
//! send commands to the terminal of who reads it.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

pub mod args;
pub mod change;
pub mod chat;
pub mod client;
pub mod health;
pub mod history;
pub mod sessions;
pub mod shell;
pub mod text;
pub mod watch;

/// Why a client command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection.
    #[error(transparent)]
    Unreachable(#[from] client::Unreachable),
    /// The server answered with an error, or its answer was lost.
    #[error("{}", client::describe(.0))]
    Status(#[from] Box<tonic::Status>),
    /// No answer in time.
    #[error("no answer from {target} within {seconds} s")]
    TimedOut { target: String, seconds: u64 },
    /// The server answered something that the API rules out.
    #[error("the server's answer is against the contract: {0}")]
    Contract(&'static str),
    /// Something would be deleted, and nobody is there to be asked.
    #[error("{what} would be deleted; --yes says that they shall")]
    Unasked { what: String },
    /// The input cannot be read.
    #[error("cannot read the input: {0}")]
    Input(#[source] io::Error),
    /// The output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// Turns a command's result into its exit code, and says on stderr what went wrong. A reader that
/// went away (`| head`) has what it wanted: that is no failure.
fn exit_code(result: Result<ExitCode, Error>) -> ExitCode {
    let error = match result {
        Ok(code) => return code,
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Err(error) => error,
    };
    // If stderr is gone too, the exit code has to do.
    let _ = writeln!(io::stderr(), "error: {error}");
    ExitCode::FAILURE
}
