//! Connections for writes that are acknowledged only once replicas have them. WAIT lets its
//! connection do nothing else meanwhile: so these are few of their own, and reads, pings and locks on
//! the connection that all share do not wait behind them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use redis::aio::ConnectionLike;
use redis::{Cmd, Pipeline, RedisFuture, RedisResult, Value};

use super::connection::{CONNECTION_WAIT, Copied, Failure, Node, Server};
use super::invocation::Invocation;

/// Connections to one Redis: as many writes are on their way to replicas at once, and more wait.
const CONNECTIONS: usize = 8;
/// The part of the timeout that replicas get: an answer in time must come also to a write that waits
/// behind others.
const PART_OF_TIMEOUT: u32 = 4;

/// Connections to one Redis, for writes.
pub(super) struct Writers {
    nodes: Vec<Node>,
    next: AtomicUsize,
    copied: Copied,
}

impl Writers {
    pub(super) fn start(server: &Server, replicas: u32) -> Self {
        Self {
            nodes: (0..CONNECTIONS)
                .map(|_| Node::start(server.clone()))
                .collect(),
            next: AtomicUsize::new(0),
            copied: Copied {
                replicas,
                limit: server.timeout() / PART_OF_TIMEOUT,
            },
        }
    }

    /// Sends commands; the answers come when replicas have what they wrote.
    pub(super) async fn send(
        &self,
        commands: &[(&Cmd, bool)],
        limit: Duration,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        let node = self.node();
        node.send_until(commands, limit, Some(&self.copied)).await
    }

    /// Runs a script once.
    pub(super) async fn run(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        let mut write = Write {
            node: self.node(),
            copied: &self.copied,
            failure: None,
        };
        let answer = script.run(&mut write).await;
        match write.failure {
            Some(failure) => Err(failure),
            None => answer.map_err(Failure::Refused),
        }
    }

    fn node(&self) -> &Node {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        &self.nodes[next % self.nodes.len()]
    }
}

/// One write. The library's scripts use it like a connection.
struct Write<'a> {
    node: &'a Node,
    copied: &'a Copied,
    failure: Option<Failure>,
}

impl ConnectionLike for Write<'_> {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        Box::pin(async move {
            let is_script = super::cluster::name(command) == b"EVALSHA";
            let copied = is_script.then_some(self.copied);
            let commands = [(command, false)];
            match self
                .node
                .send_until(&commands, CONNECTION_WAIT, copied)
                .await
            {
                Ok((values, _)) => values
                    .into_iter()
                    .next()
                    .unwrap_or_default()
                    .extract_error(),
                Err(failure) => {
                    self.failure = Some(failure);
                    Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into())
                }
            }
        })
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        _: &'a Pipeline,
        _: usize,
        _: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        // Scripts have none.
        let unsupported = std::io::Error::from(std::io::ErrorKind::Unsupported);
        Box::pin(std::future::ready(RedisResult::Err(unsupported.into())))
    }

    fn get_db(&self) -> i64 {
        0
    }
}
