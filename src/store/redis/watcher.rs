//! Rings the bells of a Redis: those of sessions whose scripts publish a change, on one connection
//! for all of them, and those of sessions that others have changed, which it looks for. Knows
//! session ids and keys; does not know who waits, or for what.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use redis::Value;
use redis::aio::{PubSubSink, PubSubStream};
use tokio::sync::Notify;
use tokio::time::{self, Instant};
use tokio_util::task::AbortOnDropHandle;

use super::connection::explain;
use super::invocation::Invocation;
use super::layout::{Keys, Scripts, channel, session_of_channel};
use super::router::{Connection, Target};
use crate::message::SessionId;
use crate::store::{Bell, Bells};

/// How often each session that has a bell is looked at for what others have done, at best: twice
/// within the time that the contract gives, so that one look may fail.
const PEEK_EVERY: Duration = Duration::from_secs(2);
/// Sessions in one look.
const PEEK_STEP: usize = 100;
/// The shortest pause between two looks: so Redis looks at 10,000 sessions in a second at most, which
/// take it some hundredths of that second.
const PEEK_PAUSE_MIN: Duration = Duration::from_millis(10);
/// How long to wait for more bells to come or go, so that one command subscribes to many.
const GATHER: Duration = Duration::from_millis(10);
/// Channels in one command.
const SUBSCRIBE_STEP: usize = 500;
/// How often the connection is tried, and let go of sessions that have no bell any more.
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// How long the connection stays when there are no bells.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// The pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// Notices changes, while there are bells to ring. Ends when it is dropped.
pub(super) struct Watch {
    bells: Bells,
    /// A session has its first bell.
    news: Arc<[Notify; 2]>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Watch {
    pub(super) fn start(
        target: Target,
        connection: Arc<Connection>,
        scripts: Arc<Scripts>,
        prefix: &str,
    ) -> Self {
        let bells = Bells::default();
        let news = Arc::new([Notify::new(), Notify::new()]);
        let listener = Listener {
            target,
            connection: Arc::clone(&connection),
            bells: bells.clone(),
            news: Arc::clone(&news),
            prefix: prefix.to_owned(),
        };
        let peeker = Peeker {
            connection,
            scripts,
            bells: bells.clone(),
            news: Arc::clone(&news),
            prefix: prefix.to_owned(),
        };
        let tasks = [tokio::spawn(listener.listen()), tokio::spawn(peeker.peek())];
        Self {
            bells,
            news,
            _tasks: tasks.map(AbortOnDropHandle::new),
        }
    }

    pub(super) fn bell(&self, session: &SessionId) -> Bell {
        let (bell, is_first) = self.bells.hang(session);
        if is_first {
            for news in &*self.news {
                news.notify_one();
            }
        }
        bell
    }

    /// Rings the bells of a session at once.
    pub(super) fn ring(&self, session: &SessionId) {
        self.bells.ring(session);
    }
}

/// Listens to what scripts publish.
struct Listener {
    target: Target,
    connection: Arc<Connection>,
    bells: Bells,
    news: Arc<[Notify; 2]>,
    prefix: String,
}

impl Listener {
    async fn listen(self) {
        let mut known = String::new();
        loop {
            while self.bells.sessions().is_empty() {
                self.news[0].notified().await;
            }
            let end = match self.connection.subscriber().await {
                Ok(connection) => {
                    let (sink, stream) = connection.split();
                    self.listen_on(sink, stream).await
                }
                Err(reason) => Err(reason),
            };
            if let Err(reason) = end {
                // Until it works again, the peeker is all there is.
                if reason != known {
                    tracing::warn!(redis = self.target.describe(), reason, "cannot subscribe");
                    known = reason;
                }
                time::sleep(PAUSE).await;
            }
        }
    }

    /// Returns when there has been no bell for a while; or why the connection does not work.
    async fn listen_on(
        &self,
        mut sink: PubSubSink,
        mut stream: PubSubStream,
    ) -> Result<(), String> {
        let mut subscribed = HashSet::new();
        let mut idle_since = None;
        let mut tidy = time::interval(TIDY_EVERY);
        loop {
            tokio::select! {
                message = stream.next() => {
                    let message = message.ok_or("the connection was lost")?;
                    let channel = message.get_channel_name().as_bytes();
                    if let Some(session) = session_of_channel(&self.prefix, channel) {
                        self.bells.ring(&session);
                    }
                }
                () = self.news[0].notified() => {
                    time::sleep(GATHER).await;
                    self.subscribe(&mut sink, &mut subscribed).await?;
                }
                _ = tidy.tick() => {
                    self.subscribe(&mut sink, &mut subscribed).await?;
                    self.unsubscribe(&mut sink, &mut subscribed).await?;
                    self.answer(sink.ping::<Value>()).await?;
                    if subscribed.is_empty() {
                        let since: &mut Instant = idle_since.get_or_insert_with(Instant::now);
                        if since.elapsed() > IDLE_MAX {
                            return Ok(());
                        }
                    } else {
                        idle_since = None;
                    }
                }
            }
        }
    }

    /// Subscribes to the sessions that have a bell and are not subscribed to, and rings them: nobody
    /// knows what has happened before.
    async fn subscribe(
        &self,
        sink: &mut PubSubSink,
        subscribed: &mut HashSet<SessionId>,
    ) -> Result<(), String> {
        let mut new = self.bells.sessions();
        new.retain(|session| !subscribed.contains(session));
        for sessions in new.chunks(SUBSCRIBE_STEP) {
            let channels = self.channels(sessions);
            self.answer(sink.subscribe(&channels)).await?;
            for session in sessions {
                self.bells.ring(session);
            }
            subscribed.extend(sessions.iter().cloned());
        }
        Ok(())
    }

    async fn unsubscribe(
        &self,
        sink: &mut PubSubSink,
        subscribed: &mut HashSet<SessionId>,
    ) -> Result<(), String> {
        let has_none = |session: &&SessionId| !self.bells.has(session);
        let old: Vec<SessionId> = subscribed.iter().filter(has_none).cloned().collect();
        for sessions in old.chunks(SUBSCRIBE_STEP) {
            let channels = self.channels(sessions);
            self.answer(sink.unsubscribe(&channels)).await?;
            for session in sessions {
                subscribed.remove(session);
            }
        }
        Ok(())
    }

    fn channels(&self, sessions: &[SessionId]) -> Vec<String> {
        let channel = |session| channel(&self.prefix, session);
        sessions.iter().map(channel).collect()
    }

    async fn answer<T>(
        &self,
        answer: impl Future<Output = redis::RedisResult<T>>,
    ) -> Result<T, String> {
        match time::timeout(self.target.timeout(), answer).await {
            Ok(answer) => answer.map_err(|error| explain(&error)),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }
}

/// Looks for what others have done.
struct Peeker {
    connection: Arc<Connection>,
    scripts: Arc<Scripts>,
    bells: Bells,
    news: Arc<[Notify; 2]>,
    prefix: String,
}

impl Peeker {
    async fn peek(self) {
        // How each session looked the last time. One that was not looked at has its bell rung: so
        // have all after a failure.
        let mut looks: HashMap<SessionId, Vec<u8>> = HashMap::new();
        loop {
            let sessions = self.bells.sessions();
            if sessions.is_empty() {
                looks.clear();
                self.news[1].notified().await;
                continue;
            }
            looks.retain(|session, _| self.bells.has(session));
            let began = Instant::now();
            let steps = u32::try_from(sessions.len().div_ceil(PEEK_STEP)).unwrap_or(u32::MAX);
            let pause = (PEEK_EVERY / steps).max(PEEK_PAUSE_MIN);
            for (step, sessions) in (1..).zip(sessions.chunks(PEEK_STEP)) {
                match self.look_at(sessions).await {
                    Some(found) => {
                        for (session, look) in sessions.iter().zip(found) {
                            if looks.get(session) != Some(&look) {
                                self.bells.ring(session);
                                looks.insert(session.clone(), look);
                            }
                        }
                    }
                    None => looks.clear(),
                }
                time::sleep_until(began + pause * step).await;
            }
        }
    }

    async fn look_at(&self, sessions: &[SessionId]) -> Option<Vec<Vec<u8>>> {
        if self.connection.is_cluster() {
            return self.look_at_each(sessions).await;
        }
        let keys: Vec<Keys> = sessions
            .iter()
            .map(|session| Keys::new(&self.prefix, session))
            .collect();
        let keys = keys.iter().flat_map(|keys| {
            let [list, facts, .., turns] = keys.in_order();
            [list, facts, turns]
        });
        let script = Invocation::new(&self.scripts.peek, &keys.collect::<Vec<_>>());
        let Ok(Value::Array(looks)) = self.connection.run(&script).await else {
            return None;
        };
        let bytes = |look| match look {
            Value::BulkString(look) => Some(look),
            _ => None,
        };
        looks.into_iter().map(bytes).collect()
    }

    /// In a cluster, one script cannot look at sessions of several slots.
    async fn look_at_each(&self, sessions: &[SessionId]) -> Option<Vec<Vec<u8>>> {
        let keys: Vec<Keys> = sessions
            .iter()
            .map(|session| Keys::new(&self.prefix, session))
            .collect();
        let call = |keys: &'_ Keys| {
            let [list, facts, .., turns] = keys.in_order();
            (
                vec![list.to_owned(), facts.to_owned(), turns.to_owned()],
                ["", ""],
            )
        };
        let calls: Vec<_> = keys.iter().map(call).collect();
        let calls: Vec<(Vec<&str>, [&str; 2])> = calls
            .iter()
            .map(|(keys, arguments)| (keys.iter().map(String::as_str).collect(), *arguments))
            .collect();
        let looks = self.connection.run_for_each(&self.scripts.peek, &calls);
        let look = |look| match look {
            Value::Array(looks) => match looks.into_iter().next() {
                Some(Value::BulkString(look)) => Some(look),
                _ => None,
            },
            _ => None,
        };
        looks.await.ok()?.into_iter().map(look).collect()
    }
}
