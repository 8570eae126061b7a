//! A real `redis-server` for a test: its own process, directory and port. Without the program, the
//! tests fail and say so.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ::redis::aio::MultiplexedConnection;
use ::redis::{AsyncConnectionConfig, Value};
use tempfile::TempDir;

use super::wait::until;

/// How long a server may take to start or to stop.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What to start `redis-server` with.
#[derive(Clone, Default)]
pub struct Options {
    /// Keep the data over a restart.
    pub durable: bool,
    /// Ask for this password.
    pub password: Option<String>,
    /// Serve TLS on [`Redis::tls_url`], too.
    pub tls: bool,
    /// Take the certificates from this directory, in place of some of its own for `localhost`.
    pub certificates: Option<PathBuf>,
    /// Further arguments: `["--maxmemory", "4mb"]`.
    pub arguments: Vec<String>,
}

/// A running (or stopped) server. It is killed when this is dropped.
pub struct Redis {
    options: Options,
    directory: TempDir,
    port: u16,
    tls_port: u16,
    child: Option<Child>,
}

impl Redis {
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    pub async fn start_with(options: Options) -> Self {
        let directory = TempDir::new().expect("make a directory");
        if options.tls && options.certificates.is_none() {
            make_certificates(directory.path(), "localhost");
        }
        let mut redis = Self {
            options,
            directory,
            port: 0,
            tls_port: 0,
            child: None,
        };
        // Somebody else may take a free port before the server does: try others.
        for _ in 0..10 {
            redis.port = free_port();
            redis.tls_port = free_port();
            if redis.try_start().await {
                return redis;
            }
        }
        panic!("redis-server does not start:\n{}", redis.log());
    }

    /// The URL over TCP, with the password.
    pub fn url(&self) -> String {
        let password = self.options.password.as_deref();
        let password = password.map_or_else(String::new, |password| format!(":{password}@"));
        format!("redis://{password}{}/", self.address())
    }

    /// `127.0.0.1` and the port, for a proxy.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.path("redis.sock").display())
    }

    pub fn tls_url(&self) -> String {
        format!("rediss://localhost:{}/", self.tls_port)
    }

    /// `127.0.0.1` and the port of TLS.
    pub fn tls_address(&self) -> String {
        format!("127.0.0.1:{}", self.tls_port)
    }

    /// The certificate that signed the server's.
    pub fn ca_file(&self) -> PathBuf {
        let of_its_own = || self.directory.path().to_owned();
        let directory = self.options.certificates.clone();
        directory.unwrap_or_else(of_its_own).join("ca.pem")
    }

    /// Starts a replica of this server, which asks for no password; returns when it has everything.
    pub async fn start_replica(&self) -> Self {
        let at_once = ["CONFIG", "SET", "repl-diskless-sync-delay", "0"];
        self.command::<()>(&at_once).await;
        let replica = Self::start().await;
        let port = self.port.to_string();
        replica
            .command::<()>(&["REPLICAOF", "127.0.0.1", &port])
            .await;
        until("the replica is in sync", async || {
            let mut commands = ::redis::pipe();
            // A write for WAIT to be about, which leaves nothing behind.
            commands.cmd("PUBLISH").arg("any").arg("").ignore();
            commands.cmd("WAIT").arg(1).arg(100);
            let mut client = self.client().await.expect("a connection");
            let (count,): (i64,) = commands.query_async(&mut client).await.expect("a count");
            (count == 1).then_some(())
        })
        .await;
        replica
    }

    /// Ends the server in good order, if it runs.
    pub async fn stop(&mut self) {
        self.signal("TERM");
        let ended = Instant::now() + LIMIT;
        if let Some(mut child) = self.child.take() {
            while child.try_wait().expect("wait for redis-server").is_none() {
                assert!(Instant::now() < ended, "redis-server does not stop");
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// Ends the server as a crash does, if it runs.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill redis-server");
            child.wait().expect("wait for redis-server");
        }
    }

    /// Starts the server again, at the same address, after [`Redis::stop`] or [`Redis::kill`].
    pub async fn restart(&mut self) {
        self.kill();
        let ended = Instant::now() + LIMIT;
        while !self.try_start().await {
            assert!(
                Instant::now() < ended,
                "redis-server does not start again:\n{}",
                self.log()
            );
        }
    }

    /// Stops the process: it is there, and does nothing.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// Runs a command, as another client. Panics if the answer is an error.
    pub async fn command<T: ::redis::FromRedisValue>(&self, words: &[&str]) -> T {
        self.try_command(words)
            .await
            .unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub async fn try_command<T: ::redis::FromRedisValue>(
        &self,
        words: &[&str],
    ) -> ::redis::RedisResult<T> {
        let mut command = ::redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        command.query_async(&mut self.client().await?).await
    }

    /// How often each command was run, ours and those of scripts.
    pub async fn command_counts(&self) -> BTreeMap<String, i64> {
        let stats: String = self.command(&["INFO", "commandstats"]).await;
        let count = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            let calls = rest.split(',').next()?.parse().ok()?;
            Some((name.to_owned(), calls))
        };
        let mut counts: BTreeMap<String, i64> = stats.lines().filter_map(count).collect();
        // Of connections, and of this count.
        for name in [
            "ping",
            "info",
            "hello",
            "select",
            "client|setinfo",
            "client",
        ] {
            counts.remove(name);
        }
        counts
    }

    /// Another client's connection.
    pub async fn client(&self) -> ::redis::RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(LIMIT))
            .set_response_timeout(Some(LIMIT));
        ::redis::Client::open(self.url())?
            .get_multiplexed_async_connection_with_config(&config)
            .await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Whether a server now runs on the port.
    async fn try_start(&mut self) -> bool {
        let log = File::create(self.path("log")).expect("make the log");
        let mut command = Command::new("redis-server");
        command
            .current_dir(self.directory.path())
            .args(["--port", &self.port.to_string()])
            .args(["--bind", "127.0.0.1"])
            .args(["--unixsocket", "redis.sock"])
            .args(["--save", ""])
            .args([
                "--appendonly",
                if self.options.durable { "yes" } else { "no" },
            ])
            .args(["--appendfsync", "always"])
            .args(&self.options.arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null());
        if let Some(password) = &self.options.password {
            command.args(["--requirepass", password]);
        }
        if self.options.tls {
            let ca_file = self.ca_file();
            command
                .args(["--tls-port", &self.tls_port.to_string()])
                .args(["--tls-auth-clients", "no"])
                .arg("--tls-cert-file")
                .arg(ca_file.with_file_name("server.pem"))
                .arg("--tls-key-file")
                .arg(ca_file.with_file_name("server.key"))
                .arg("--tls-ca-cert-file")
                .arg(ca_file);
        }
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("these tests need the program `redis-server` (6.2 or later): {error}")
        });
        self.child = Some(child);

        let ended = Instant::now() + LIMIT;
        while Instant::now() < ended {
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("look at redis-server").is_some() {
                self.child = None;
                return false;
            }
            // Only if the port is this process's: another's server would answer as well.
            let pid = child.id();
            if let Ok(info) = self.try_command::<String>(&["INFO", "server"]).await
                && info.contains(&format!("process_id:{pid}\r\n"))
                && matches!(
                    self.try_command::<Value>(&["PING"]).await,
                    Ok(Value::SimpleString(_))
                )
            {
                return true;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.kill();
        false
    }

    fn signal(&self, name: &str) {
        let Some(child) = &self.child else {
            return;
        };
        let status = Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .expect("run kill");
        assert!(status.success(), "kill -s {name}");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("find a free port");
    listener.local_addr().expect("a bound port").port()
}

/// An authority of its own, and a certificate of a name signed by it: `ca.pem`, `server.pem` and
/// `server.key`.
pub fn make_certificates(directory: &Path, name: &str) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    let write = |file: &str, text: String| {
        fs::write(directory.join(file), text).expect("write a certificate");
    };
    let ca_key = KeyPair::generate().expect("make a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("no names");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).expect("sign");
    write("ca.pem", ca_certificate.pem());

    let issuer = Issuer::new(ca, ca_key);
    let server_key = KeyPair::generate().expect("make a key");
    let mut server = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    // The name of the authority would make it one that has signed itself, to OpenSSL.
    server.distinguished_name.push(DnType::CommonName, name);
    let server_certificate = server.signed_by(&server_key, &issuer).expect("sign");
    write("server.pem", server_certificate.pem());
    write("server.key", server_key.serialize_pem());
}
