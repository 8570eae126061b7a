//! A Redis Cluster of three masters, as processes of their own on the loopback.

use std::path::PathBuf;
use std::process::Command;

use ::redis::{Value, from_redis_value};
use tempfile::TempDir;

use super::redis::{Options, Redis, make_certificates};
use super::wait::until;

/// The nodes. Which of them are masters changes.
pub struct Cluster {
    pub nodes: Vec<Redis>,
    /// Where all nodes have their certificates, if they speak TLS.
    certificates: Option<TempDir>,
}

impl Cluster {
    /// Masters with a replica each. Returns when each knows all others and every replica is up to
    /// date.
    pub async fn start() -> Self {
        Self::start_with(6, None).await
    }

    /// Masters only, which serve on when one of them is lost.
    pub async fn without_replicas() -> Self {
        Self::start_with(3, None).await
    }

    /// Masters only, which speak TLS among each other, and with clients too.
    pub async fn with_tls() -> Self {
        let certificates = TempDir::new().expect("make a directory");
        make_certificates(certificates.path(), "127.0.0.1");
        Self::start_with(3, Some(certificates)).await
    }

    async fn start_with(count: usize, certificates: Option<TempDir>) -> Self {
        let directory = certificates.as_ref().map(|one| one.path().to_owned());
        let mut nodes = Vec::new();
        for _ in 0..count {
            let mut arguments = vec![
                ["--cluster-enabled", "yes"],
                // The shortest that a slow machine keeps: a test must not see failovers that it
                // has not asked for.
                ["--cluster-node-timeout", "1500"],
                ["--cluster-replica-validity-factor", "0"],
                ["--repl-diskless-sync-delay", "0"],
                // Without a replica, the others must serve on.
                [
                    "--cluster-require-full-coverage",
                    if count > 3 { "yes" } else { "no" },
                ],
            ];
            if directory.is_some() {
                arguments.push(["--tls-cluster", "yes"]);
            }
            let arguments = arguments.concat().into_iter().map(str::to_owned).collect();
            let options = Options {
                arguments,
                tls: directory.is_some(),
                certificates: directory.clone(),
                ..Options::default()
            };
            nodes.push(Redis::start_with(options).await);
        }
        let cluster = Self {
            nodes,
            certificates,
        };
        let mut create = Command::new("redis-cli");
        if let Some(ca_file) = cluster.ca_file() {
            create.arg("--tls").arg("--cacert").arg(ca_file);
        }
        create.args(["--cluster", "create"]).args(cluster.places());
        let replicas = (count / 3 - 1).to_string();
        create.args(["--cluster-replicas", &replicas, "--cluster-yes"]);
        let output = create
            .output()
            .expect("these tests need the program `redis-cli`");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        );
        cluster.settled().await;
        cluster
    }

    /// Host and port of each node, as clients are to use them.
    fn places(&self) -> Vec<String> {
        let place = |node: &Redis| match &self.certificates {
            Some(_) => node.tls_address(),
            None => node.address(),
        };
        self.nodes.iter().map(place).collect()
    }

    /// A URL with some of the nodes.
    pub fn url(&self) -> String {
        let scheme = match &self.certificates {
            Some(_) => "rediss-cluster",
            None => "redis-cluster",
        };
        format!("{scheme}://{}", self.places()[..3].join(","))
    }

    /// The certificate that signed those of the nodes.
    pub fn ca_file(&self) -> Option<PathBuf> {
        let certificates = self.certificates.as_ref()?;
        Some(certificates.path().join("ca.pem"))
    }

    /// The names of sessions, one on each master, and which node that is.
    pub async fn session_on_each_master(&self) -> Vec<(usize, String)> {
        let mut found: Vec<(usize, String)> = Vec::new();
        for number in 0.. {
            let name = format!("session-{number}");
            let slot = self.slot(&format!("message_store:{name}")).await;
            let node = self.master(slot).await;
            if !found.iter().any(|(known, _)| *known == node) {
                found.push((node, name));
            }
            if found.len() == 3 {
                break;
            }
        }
        found
    }

    /// The slot of a key, as Redis says.
    pub async fn slot(&self, key: &str) -> u16 {
        self.nodes[0].command(&["CLUSTER", "KEYSLOT", key]).await
    }

    /// The master of a slot, as all nodes say that can be asked.
    pub async fn master(&self, slot: u16) -> usize {
        until("the nodes agree on the master of a slot", async || {
            let mut masters = Vec::new();
            for node in &self.nodes {
                let Some(port) = master_port(node, slot).await else {
                    continue;
                };
                let has_port = |node: &Redis| node.address().ends_with(&format!(":{port}"));
                masters.push(self.nodes.iter().position(has_port)?);
            }
            masters.dedup();
            (masters.len() == 1).then(|| masters[0])
        })
        .await
    }

    /// Kills the master of a slot, as a crash does; returns which node that was when all others say
    /// that a replica is promoted.
    pub async fn lose_master(&mut self, slot: u16) -> usize {
        let lost = self.master(slot).await;
        self.nodes[lost].kill();
        until("a replica is promoted", async || {
            (self.master(slot).await != lost).then_some(())
        })
        .await;
        lost
    }

    /// Starts a node that was lost; returns when it is a replica that has everything.
    pub async fn restore(&mut self, lost: usize) {
        self.nodes[lost].restart().await;
        self.settled().await;
    }

    /// Runs `redis-cli --cluster …` to its end.
    pub fn cli(&self, words: &[&str]) -> std::process::Child {
        let mut command = Command::new("redis-cli");
        command.arg("--cluster").args(words);
        command.stdout(std::process::Stdio::null());
        command.spawn().expect("redis-cli")
    }

    async fn settled(&self) {
        let count = self.nodes.len();
        until("the cluster is whole", async || {
            let mut replicas = 0;
            for node in &self.nodes {
                let info: String = node.try_command(&["CLUSTER", "INFO"]).await.ok()?;
                let is_ok = info.contains("cluster_state:ok")
                    && info.contains("cluster_slots_fail:0")
                    && info.contains("cluster_slots_pfail:0")
                    && info.contains(&format!("cluster_known_nodes:{count}\r\n"));
                let nodes: String = node.try_command(&["CLUSTER", "NODES"]).await.ok()?;
                let info: String = node.try_command(&["INFO", "replication"]).await.ok()?;
                replicas += usize::from(info.contains("master_link_status:up"));
                if !is_ok || nodes.contains("fail") {
                    return None;
                }
            }
            (replicas == count - 3).then_some(())
        })
        .await;
    }
}

async fn master_port(node: &Redis, slot: u16) -> Option<u16> {
    // What comes after the port, and after the first node, differs from version to version.
    let first = |values: Vec<Value>, count| Value::Array(values.into_iter().take(count).collect());
    let ranges: Vec<Vec<Value>> = node.try_command(&["CLUSTER", "SLOTS"]).await.ok()?;
    ranges.into_iter().find_map(|range| {
        let range = from_redis_value(first(range, 3)).ok()?;
        let (begin, end, node): (u16, u16, Vec<Value>) = range;
        let (_, port): (String, u16) = from_redis_value(first(node, 2)).ok()?;
        (begin <= slot && slot <= end).then_some(port)
    })
}
