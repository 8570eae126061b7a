//! A Redis Cluster of three masters with a replica each, as processes of their own on the loopback.

use std::process::Command;

use super::redis::{Options, Redis, free_port};
use super::wait::until;

/// The nodes. Which of them are masters changes.
pub struct Cluster {
    pub nodes: Vec<Redis>,
}

impl Cluster {
    /// Starts all nodes; returns when each knows all others and every replica is up to date.
    pub async fn start() -> Self {
        let mut nodes = Vec::new();
        for _ in 0..6 {
            let bus = free_port().to_string();
            let arguments = [
                ["--cluster-enabled", "yes"],
                ["--cluster-port", &bus],
                // The shortest that a slow machine keeps: a test must not see failovers that it
                // has not asked for.
                ["--cluster-node-timeout", "1500"],
                ["--cluster-replica-validity-factor", "0"],
                ["--repl-diskless-sync-delay", "0"],
            ];
            let arguments = arguments.concat().into_iter().map(str::to_owned).collect();
            let options = Options {
                arguments,
                ..Options::default()
            };
            nodes.push(Redis::start_with(options).await);
        }
        let mut create = Command::new("redis-cli");
        create.args(["--cluster", "create"]);
        create.args(nodes.iter().map(Redis::address));
        create.args(["--cluster-replicas", "1", "--cluster-yes"]);
        let output = create
            .output()
            .expect("these tests need the program `redis-cli`");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        let cluster = Self { nodes };
        cluster.settled().await;
        cluster
    }

    /// A URL with some of the nodes.
    pub fn url(&self) -> String {
        let places: Vec<String> = self.nodes.iter().take(3).map(Redis::address).collect();
        format!("redis-cluster://{}", places.join(","))
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
        until("the cluster is whole", async || {
            let mut replicas = 0;
            for node in &self.nodes {
                let info: String = node.try_command(&["CLUSTER", "INFO"]).await.ok()?;
                let is_ok = info.contains("cluster_state:ok")
                    && info.contains("cluster_slots_fail:0")
                    && info.contains("cluster_slots_pfail:0")
                    && info.contains("cluster_known_nodes:6");
                let nodes: String = node.try_command(&["CLUSTER", "NODES"]).await.ok()?;
                let info: String = node.try_command(&["INFO", "replication"]).await.ok()?;
                replicas += usize::from(info.contains("master_link_status:up"));
                if !is_ok || nodes.contains("fail") {
                    return None;
                }
            }
            (replicas == 3).then_some(())
        })
        .await;
    }
}

async fn master_port(node: &Redis, slot: u16) -> Option<u16> {
    type Node = (String, u16, String, ::redis::Value);
    let ranges: Vec<::redis::Value> = node.try_command(&["CLUSTER", "SLOTS"]).await.ok()?;
    ranges.into_iter().find_map(|range| {
        let ::redis::Value::Array(mut parts) = range else {
            return None;
        };
        parts.truncate(3);
        let parts = ::redis::Value::Array(parts);
        let (first, last, node): (u16, u16, Node) = ::redis::from_redis_value(parts).ok()?;
        (first <= slot && slot <= last).then_some(node.1)
    })
}
