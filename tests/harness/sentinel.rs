//! A Redis master with a replica, and three Sentinels that watch over them, as processes of their
//! own on the loopback.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ::redis::Client;
use tempfile::TempDir;

use super::redis::{Options, Redis, free_port, make_certificates};
use super::wait::until;

/// What the Sentinels call the master.
const MASTER: &str = "mymaster";

/// The servers, of which one is the master at a time, and the Sentinels.
pub struct Watched {
    servers: [Redis; 2],
    sentinels: Vec<Sentinel>,
}

struct Sentinel {
    port: u16,
    child: Child,
    _directory: TempDir,
}

impl Watched {
    /// Starts all of them; returns when the Sentinels know of each other and of the replica.
    pub async fn start() -> Self {
        let options = Options {
            arguments: ["--repl-diskless-sync-delay", "0"]
                .map(str::to_owned)
                .into(),
            ..Options::default()
        };
        let master = Redis::start_with(options.clone()).await;
        let replica = Redis::start_with(options).await;
        let (host, port) = master.address().split_once(':').map(owned).expect("a port");
        replica.command::<()>(&["REPLICAOF", &host, &port]).await;
        // The shortest times that a slow machine keeps: a test must not see failovers that it has
        // not asked for.
        let text = format!(
            "sentinel monitor {MASTER} 127.0.0.1 {port} 2\n\
             sentinel down-after-milliseconds {MASTER} 1000\n\
             sentinel failover-timeout {MASTER} 2000\n"
        );
        let sentinels = (0..3).map(|_| Sentinel::start(&text)).collect();
        let watched = Self {
            servers: [master, replica],
            sentinels,
        };
        watched.settled().await;
        watched
    }

    /// The URL of the master, wherever it is.
    pub fn url(&self) -> String {
        let places: Vec<String> = self.sentinels.iter().map(Sentinel::address).collect();
        format!("redis-sentinel://{}/{MASTER}", places.join(","))
    }

    /// Kills the master, as a crash does; returns when the Sentinels have promoted the replica.
    pub async fn lose_master(&mut self) {
        let lost = self.master().await;
        self.servers[lost].kill();
        until("the replica is promoted", async || {
            (self.master().await != lost).then_some(())
        })
        .await;
        let promoted = &self.servers[1 - lost];
        until("the promoted server is a master", async || {
            let info: String = promoted.try_command(&["INFO", "replication"]).await.ok()?;
            info.contains("role:master").then_some(())
        })
        .await;
    }

    /// Kills the replica.
    pub async fn lose_replica(&mut self) {
        let replica = 1 - self.master().await;
        self.servers[replica].kill();
    }

    /// Starts the server that was lost; returns when it is a replica that has everything.
    pub async fn restore(&mut self) {
        let master = self.master().await;
        let lost = 1 - master;
        self.servers[lost].restart().await;
        // The Sentinels would do so too, but wait for eight seconds first.
        let address = self.servers[master].address();
        let (host, port) = address.split_once(':').expect("a port");
        self.servers[lost]
            .command::<()>(&["REPLICAOF", host, port])
            .await;
        self.settled().await;
    }

    /// Which server is the master, as all Sentinels say.
    async fn master(&self) -> usize {
        until("the Sentinels agree on the master", async || {
            let mut votes = [0; 2];
            for sentinel in &self.sentinels {
                let port = sentinel.master_port().await?;
                let index = self.servers.iter().position(|server| {
                    let address = server.address();
                    address.ends_with(&format!(":{port}"))
                })?;
                votes[index] += 1;
            }
            votes.iter().position(|votes| *votes == 3)
        })
        .await
    }

    /// Waits until there is a replica, up to date, that all Sentinels could promote.
    async fn settled(&self) {
        let master = self.master().await;
        until("the replica is in sync", async || {
            let server = &self.servers[master];
            let info: String = server.try_command(&["INFO", "replication"]).await.ok()?;
            let replica = &self.servers[1 - master];
            let of_replica: String = replica.try_command(&["INFO", "replication"]).await.ok()?;
            (info.contains("state=online") && of_replica.contains("master_link_status:up"))
                .then_some(())
        })
        .await;
        until(
            "each Sentinel knows all others and the replica",
            async || {
                for sentinel in &self.sentinels {
                    if !sentinel.is_settled().await? {
                        return None;
                    }
                }
                Some(())
            },
        )
        .await;
    }
}

/// A master with the password `one`, and a Sentinel with the password `two`, both with TLS.
pub struct Guarded {
    _master: Redis,
    _sentinel: Sentinel,
    /// Host and port of the Sentinel's TLS.
    pub address: String,
    certificates: TempDir,
}

impl Guarded {
    pub async fn start() -> Self {
        let certificates = TempDir::new().expect("make a directory");
        make_certificates(certificates.path(), "127.0.0.1");
        let options = Options {
            password: Some("one".to_owned()),
            tls: true,
            certificates: Some(certificates.path().to_owned()),
            ..Options::default()
        };
        let master = Redis::start_with(options).await;
        let place = master.tls_address().replace(':', " ");
        let (port, directory) = (free_port(), certificates.path().display());
        let sentinel = Sentinel::start(&format!(
            "tls-port {port}\ntls-auth-clients no\ntls-replication yes\n\
             tls-ca-cert-file {directory}/ca.pem\n\
             tls-cert-file {directory}/server.pem\n\
             tls-key-file {directory}/server.key\n\
             requirepass two\n\
             sentinel monitor {MASTER} {place} 1\n\
             sentinel auth-pass {MASTER} one\n"
        ));
        Self {
            _master: master,
            _sentinel: sentinel,
            address: format!("127.0.0.1:{port}"),
            certificates,
        }
    }

    /// The certificate that signed theirs.
    pub fn ca_file(&self) -> PathBuf {
        self.certificates.path().join("ca.pem")
    }
}

fn owned((host, port): (&str, &str)) -> (String, String) {
    (host.to_owned(), port.to_owned())
}

impl Sentinel {
    /// Starts one whose configuration has these lines.
    fn start(lines: &str) -> Self {
        let directory = TempDir::new().expect("make a directory");
        let port = free_port();
        let config = directory.path().join("sentinel.conf");
        let text = format!("port {port}\nbind 127.0.0.1\n{lines}");
        fs::write(&config, text).expect("write the configuration");
        let log = File::create(directory.path().join("log")).expect("make the log");
        let child = Command::new("redis-server")
            .arg(&config)
            .arg("--sentinel")
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need the program `redis-server`");
        Self {
            port,
            child,
            _directory: directory,
        }
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    async fn ask<T: ::redis::FromRedisValue>(&self, words: &[&str]) -> Option<T> {
        let client = Client::open(format!("redis://{}", self.address())).expect("a URL");
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        let mut command = ::redis::cmd("SENTINEL");
        command.arg(words).query_async(&mut connection).await.ok()
    }

    async fn master_port(&self) -> Option<u16> {
        let address: (String, u16) = self.ask(&["GET-MASTER-ADDR-BY-NAME", MASTER]).await?;
        Some(address.1)
    }

    /// Whether it knows two other Sentinels and a replica that is up.
    async fn is_settled(&self) -> Option<bool> {
        type Facts = std::collections::HashMap<String, String>;
        let master: Facts = self.ask(&["MASTER", MASTER]).await?;
        let replicas: Vec<Facts> = self.ask(&["REPLICAS", MASTER]).await?;
        let is_up = |replica: &Facts| replica.get("flags").is_some_and(|flags| flags == "slave");
        Some(
            master
                .get("num-other-sentinels")
                .is_some_and(|count| count == "2")
                && master.get("flags").is_some_and(|flags| flags == "master")
                && replicas.iter().any(is_up),
        )
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
