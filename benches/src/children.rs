//! The processes that are measured, as children on the loopback: Redis, the server, and the roles
//! of this program. Each ends when it is dropped.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child as Process, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::Result;

/// How long a process may take to answer for the first time.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A process that listens.
pub struct Child {
    process: Process,
    /// What it listens on: `127.0.0.1:PORT`, or `unix:/path`.
    pub addresses: Vec<String>,
}

impl Child {
    /// Starts a process that says "listening on ADDRESS" and then a line with "Stop it with".
    fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        let mut process = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .map_err(|error| format!("{:?}: {error}", command.get_program()))?;
        let stdout = process.stdout.take().ok_or("no pipe")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut addresses = Vec::new();
        for line in lines.by_ref() {
            let line = line?;
            if let Some((_, address)) = line.split_once("listening on ") {
                addresses.push(address.trim().to_owned());
            }
            if line.starts_with("Stop it with") {
                // Somebody must read on: a full pipe would stop it.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(Self { process, addresses });
            }
        }
        process.kill().ok();
        process.wait().ok();
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        Err(format!("{:?} did not start:\n{log}", command.get_program()).into())
    }

    /// A server, with these arguments.
    pub fn server(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CHAT_MEMORY_")) {
            command.env_remove(name);
        }
        command.args(arguments);
        Self::start(command, folder.join("server.log"))
    }

    /// This program in another role.
    pub fn role(role: &str, folder: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--role", role]).args(arguments);
        Self::start(command, folder.join(format!("{role}.log")))
    }

    /// The program `hello`, which is built beside this one.
    pub fn hello(folder: &Path, socket: &str) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("chat-memory-hello");
        let mut command = Command::new(program);
        command.arg(socket);
        Self::start(command, folder.join("hello.log"))
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The first address that is TCP.
    pub fn tcp(&self) -> Result<&str> {
        let is_tcp = |address: &&String| !address.starts_with("unix:");
        let address = self.addresses.iter().find(is_tcp);
        Ok(address.ok_or("it does not listen on TCP")?)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A Redis with a directory of its own, which writes no files unless asked to.
pub struct Redis {
    process: Process,
    pub port: u16,
    _folder: TempDir,
}

impl Redis {
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
            .args(["--save", "", "--appendonly", "no", "--loglevel", "warning"])
            .args(["--enable-debug-command", "local"])
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(File::create(folder.path().join("log"))?)
            .spawn()
            .map_err(|error| format!("redis-server: {error}"))?;
        let redis = Self {
            process,
            port,
            _folder: folder,
        };
        let begin = Instant::now();
        while redis.query::<String>(&redis::cmd("PING")).is_err() {
            if begin.elapsed() > START_LIMIT {
                return Err("redis-server does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(redis)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn connect(&self) -> Result<redis::Connection> {
        Ok(redis::Client::open(self.url())?.get_connection()?)
    }

    pub fn query<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> Result<T> {
        Ok(command.query(&mut self.connect()?)?)
    }

    /// How many scripts were run so far.
    pub fn scripts_run(&self) -> Result<u64> {
        let stats: String = self.query(redis::cmd("INFO").arg("commandstats"))?;
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
        let calls = line.and_then(|rest| rest.split(',').next()?.parse().ok());
        Ok(calls.unwrap_or(0))
    }
}

/// A port that was free a moment ago: Redis cannot take port 0.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}
