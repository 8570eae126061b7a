//! Which connection a command takes: to one Redis, or to the node of a cluster that has its slot.
//! Callers need not know which it is, but where one command would have keys of several slots.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use redis::aio::PubSub;
use tokio::sync::watch;

use super::InvalidSettings;
use super::cluster::{Cluster, Seeds};
use super::connection::{Failure, Node, Server, is_read_only};
use super::invocation::Invocation;
use super::writers::Writers;

/// Where Redis is, of whatever kind.
#[derive(Clone)]
pub(super) enum Target {
    One(Server),
    Cluster(Seeds),
}

impl Target {
    /// Reads a URL: `redis-cluster://`, `rediss-cluster://` or several servers make a cluster.
    pub(super) fn new(
        url: &str,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, InvalidSettings> {
        Ok(match Seeds::parse(url, ca_file, timeout)? {
            Some(seeds) => Self::Cluster(seeds),
            None => Self::One(Server::new(url, ca_file, timeout)?),
        })
    }

    /// Where Redis is, without secrets.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::One(server) => server.describe(),
            Self::Cluster(seeds) => seeds.describe(),
        }
    }

    /// How long an answer may take.
    pub(super) fn timeout(&self) -> Duration {
        match self {
            Self::One(server) => server.timeout(),
            Self::Cluster(seeds) => seeds.timeout(),
        }
    }
}

/// The users' end. When it is dropped, the connections are closed.
pub(super) enum Connection {
    One {
        server: Box<Server>,
        node: Node,
        /// If replicas must have what is written.
        writers: Option<Writers>,
    },
    Cluster(Cluster),
}

impl Connection {
    /// Starts to connect, and to keep connected; does not wait for it. Must be called within a
    /// Tokio runtime.
    pub(super) fn start(target: Target, replicas: u32) -> Self {
        match target {
            Target::One(server) => Self::One {
                writers: (replicas > 0).then(|| Writers::start(&server, replicas)),
                node: Node::start(server.clone()),
                server: Box::new(server),
            },
            Target::Cluster(seeds) => Self::Cluster(Cluster::start(seeds, replicas)),
        }
    }

    /// The Redis, if it is one: it runs transactions.
    pub(super) fn one(&self) -> Option<&Node> {
        match self {
            Self::One { node, .. } => Some(node),
            Self::Cluster(_) => None,
        }
    }

    /// Whether one command can have keys of one slot only.
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// Whether replicas must have what is written.
    pub(super) fn waits_for_replicas(&self) -> bool {
        match self {
            Self::One { writers, .. } => writers.is_some(),
            Self::Cluster(cluster) => cluster.waits_for_replicas(),
        }
    }

    /// The Redis, if it is one and all commands, also those that write, take the same connection to it.
    pub(super) fn only(&self) -> Option<&Node> {
        match self {
            Self::One { node, .. } if !self.waits_for_replicas() => Some(node),
            _ => None,
        }
    }

    pub(super) fn reachable(&self) -> watch::Receiver<bool> {
        match self {
            Self::One { node, .. } => node.reachable(),
            Self::Cluster(cluster) => cluster.reachable(),
        }
    }

    /// Opens a connection that is told of what is published. Any node of a cluster is told of all.
    pub(super) async fn subscriber(&self) -> Result<PubSub, String> {
        match self {
            Self::One { server, .. } => server.subscriber().await,
            Self::Cluster(cluster) => cluster.subscriber().await,
        }
    }

    /// Waits for a connection, up to a limit.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), String> {
        match self {
            Self::One { node, .. } => node.ready(limit).await,
            Self::Cluster(cluster) => cluster.ready(limit).await,
        }
    }

    /// Runs a script that may be run twice: if its answer does not come, it is run once more.
    pub(super) async fn run_repeatable(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        match self {
            Self::One { node, .. } => node.run_repeatable(script).await,
            Self::Cluster(cluster) => match cluster.run(script).await {
                Err(Failure::NoAnswer(reason)) => {
                    let second = cluster.run(script).await;
                    // Whatever the second attempt fails from, the first may have arrived.
                    second.map_err(|_| Failure::NoAnswer(reason))
                }
                first => first,
            },
        }
    }

    /// Runs a script once.
    pub(super) async fn run(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        match self {
            Self::One { node, .. } => node.run(script).await,
            Self::Cluster(cluster) => cluster.run(script).await,
        }
    }

    /// Like [`run_repeatable`](Self::run_repeatable), for a script that writes: as many replicas as
    /// are asked for have it then. If they have not, it counts as having no answer.
    pub(super) async fn write_repeatable(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        if let Self::One { writers: None, .. } = self {
            return self.run_repeatable(script).await;
        }
        match self.write(script).await {
            Err(Failure::Refused(error)) if is_read_only(&error) => self.write(script).await,
            Err(Failure::NoAnswer(reason)) => {
                let second = self.write(script).await;
                second.map_err(|_| Failure::NoAnswer(reason))
            }
            first => first,
        }
    }

    /// Like [`run`](Self::run), for a script that writes.
    pub(super) async fn write(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        match self {
            Self::One { node, writers, .. } => match writers {
                Some(writers) => writers.run(script).await,
                None => node.run(script).await,
            },
            Self::Cluster(cluster) => cluster.write(script).await,
        }
    }

    /// Runs plain commands that may be run twice. Says also which run of Redis answered.
    pub(super) async fn query(
        &self,
        commands: &redis::Pipeline,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        match self {
            Self::One { node, .. } => node.query(commands).await,
            Self::Cluster(cluster) => cluster.query(commands).await,
        }
    }

    /// Runs a script once for each of these keys and arguments. It may be run twice.
    pub(super) async fn run_for_each(
        &self,
        script: &redis::Script,
        calls: &[(Vec<&str>, [&str; 2])],
    ) -> Result<Vec<Value>, Failure> {
        match self {
            Self::One { node, .. } => node.run_for_each(script, calls).await,
            Self::Cluster(cluster) => cluster.run_for_each(script, calls).await,
        }
    }
}
