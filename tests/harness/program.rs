//! The real program as a child process.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use super::wait::LIMIT;

/// The program with these arguments, in an environment without settings.
pub fn command<I>(args: I) -> Command
where
    I: IntoIterator<Item: AsRef<OsStr>>,
{
    let mut command = Command::new(env!("CARGO_BIN_EXE_chat-memory"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CHAT_MEMORY_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub fn run<I>(args: I) -> Output
where
    I: IntoIterator<Item: AsRef<OsStr>>,
{
    command(args).output().expect("the program")
}

/// A server that runs.
pub struct Program {
    child: Child,
    /// What it listens on, without "listening on".
    pub addresses: Vec<String>,
    /// All that it printed before it was ready.
    pub banner: String,
}

impl Program {
    /// A server on an embedded file and a free port.
    pub fn embedded(database: &Path) -> Self {
        let database = database.to_str().expect("a path of UTF-8");
        Self::start(&["--listen", "127.0.0.1:0", "--database", database])
    }

    /// A server with these arguments. Fails if it does not get ready.
    pub fn start(args: &[&str]) -> Self {
        Self::start_as(command(args))
    }

    /// The server that this command starts. Fails if it does not get ready.
    pub fn start_as(command: Command) -> Self {
        Self::start_reading(command, true)
    }

    /// A server with these arguments whose stderr is a pipe that nobody reads any more.
    pub fn start_unread(args: &[&str]) -> Self {
        Self::start_reading(command(args), false)
    }

    fn start_reading(mut command: Command, reads_errors: bool) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        let stdout = child.stdout.take().expect("a pipe");
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    // Keep reading: a full pipe would stop the program.
                    continue;
                }
            }
        });
        // The errors are read too, for the same reason; they are shown if it does not start.
        let mut stderr = child.stderr.take().expect("a pipe");
        let (send_errors, errors) = mpsc::channel();
        if reads_errors {
            std::thread::spawn(move || {
                let mut text = String::new();
                stderr.read_to_string(&mut text).ok();
                send_errors.send(text).ok();
            });
        } else {
            drop(stderr);
        }

        let mut banner = String::new();
        let mut addresses = Vec::new();
        loop {
            match lines.recv_timeout(LIMIT) {
                Ok(line) => {
                    if let Some((_, address)) = line.split_once("listening on ") {
                        addresses.push(address.trim().to_owned());
                    }
                    banner.push_str(&line);
                    banner.push('\n');
                    if line.starts_with("Stop it with") {
                        break;
                    }
                }
                Err(_) => {
                    child.kill().ok();
                    let errors = errors.recv().unwrap_or_default();
                    panic!("the program did not start:\n{banner}\n{errors}");
                }
            }
        }
        Self {
            child,
            addresses,
            banner,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status();
        assert!(status.expect("kill").success());
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the program does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it at once, as a crash does.
    pub fn crash(mut self) {
        self.child.kill().expect("a child");
        self.child.wait().expect("a child");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
