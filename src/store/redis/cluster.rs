//! A Redis Cluster: its nodes, which of them has a slot, and what to do when that changes. Knows the
//! place of a key in a command, and not what a command means.
//!
//! A command that a node has refused (MOVED, ASK, TRYAGAIN, CLUSTERDOWN …) was not run: it is sent
//! again, elsewhere or later, within the time of one call to one Redis. A command without an answer
//! may have been run: that is told to the caller, and nothing here sends it again.
//!
//! All nodes are asked over connections of the kind that one Redis has ([`Node`]). The library's own
//! client is not used: it repeats writes by itself.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::{ConnectionLike, PubSub};
use redis::{Cmd, Pipeline, RedisError, RedisFuture, RedisResult, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{self, Instant};
use tokio_util::task::AbortOnDropHandle;

use super::InvalidSettings;
use super::connection::{CONNECTION_WAIT, Failure, Node, Server, explain};
use super::invocation::{Invocation, for_each};
use super::url::{describe, parse_several};
use super::writers::Writers;

/// Where Redis listens if a URL does not say.
const PORT: u16 = 6379;
/// The slots of every cluster.
const SLOTS: u16 = 16_384;
/// How often the map is asked for if nothing asks for it…
const REFRESH_EVERY: Duration = Duration::from_secs(10);
/// …and how far apart two are at least, however many calls ask for it.
const REFRESH_PAUSE: Duration = Duration::from_millis(50);
/// How long a call waits before it tries again what was refused for now.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long a call waits for the connection to one node, before it looks where else to go.
const NODE_WAIT: Duration = Duration::from_millis(250);
/// How long a node may take to tell the map.
const MAP_WAIT: Duration = Duration::from_millis(500);
/// How often a script is loaded for one call: its slot may move while it is loaded.
const LOADS_MAX: usize = 3;

/// The servers of a cluster that a URL names; they name the others.
#[derive(Clone)]
pub(super) struct Seeds {
    addresses: Vec<Place>,
    /// How to speak to each.
    like: Server,
}

/// Host and port.
type Place = (String, u16);

impl Seeds {
    /// `None` if the URL is none of a cluster.
    pub(super) fn parse(
        url: &str,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Option<Self>, InvalidSettings> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Ok(None);
        };
        let one = match scheme {
            "redis-cluster" | "redis" => "redis",
            "rediss-cluster" | "rediss" => "rediss",
            _ => return Ok(None),
        };
        // Each may be a URL of its own: the first says how to speak to all.
        let separator = format!(",{scheme}://");
        let mut parts = rest.split(&separator);
        let mut rest = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let server = part.rsplit_once('@').map_or(part, |(_, server)| server);
            rest = format!("{},{server}", rest.trim_end_matches('/'));
        }
        let servers = rest.rsplit_once('@').map_or(&*rest, |(_, servers)| servers);
        if one == scheme && !servers.contains(',') {
            return Ok(None);
        }
        let several = parse_several(&rest, PORT).map_err(InvalidSettings::Url)?;
        if !matches!(&*several.path, "" | "0") {
            let reason = "a cluster has database 0 only";
            return Err(InvalidSettings::Url(reason.to_owned()));
        }
        let user = rest.rsplit_once('@').map_or("", |(user, _)| user);
        let at = if user.is_empty() { "" } else { "@" };
        let Some((host, port)) = several.servers.first() else {
            return Ok(None);
        };
        let host = match host.contains(':') {
            true => format!("[{host}]"),
            false => host.clone(),
        };
        let like = Server::new(
            &format!("{one}://{user}{at}{host}:{port}"),
            ca_file,
            timeout,
        )?;
        Ok(Some(Self {
            addresses: several.servers,
            like,
        }))
    }

    pub(super) fn describe(&self) -> String {
        format!("Redis Cluster at {}", describe(&self.addresses))
    }

    pub(super) fn timeout(&self) -> Duration {
        self.like.timeout()
    }
}

/// Which node has which slots.
#[derive(Clone, Default)]
struct Map {
    /// First and last slot, and the master; in order.
    ranges: Vec<(u16, u16, Place)>,
}

impl Map {
    fn master(&self, slot: u16) -> Option<&Place> {
        let index = self.ranges.partition_point(|(_, last, _)| *last < slot);
        let (first, _, place) = self.ranges.get(index)?;
        (*first <= slot).then_some(place)
    }

    /// Each master once, with its lowest slot, in the order of these.
    fn masters(&self) -> Vec<(u16, &Place)> {
        let mut masters: Vec<(u16, &Place)> = Vec::new();
        for (first, _, place) in &self.ranges {
            if !masters.iter().any(|(_, known)| *known == place) {
                masters.push((*first, place));
            }
        }
        masters
    }

    /// How the slots are divided, by whichever nodes.
    fn division(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let masters = self.masters();
        for (first, last, place) in &self.ranges {
            let index = masters.iter().position(|(_, known)| *known == place);
            (first, last, index).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Notes that a slot has moved, until the map is asked for anew.
    fn move_slot(&mut self, slot: u16, to: Place) {
        let index = self.ranges.partition_point(|(_, last, _)| *last < slot);
        let mut parts = Vec::with_capacity(3);
        if let Some((first, last, place)) = self.ranges.get(index).cloned()
            && first <= slot
        {
            self.ranges.remove(index);
            if first < slot {
                parts.push((first, slot - 1, place.clone()));
            }
            parts.push((slot, slot, to));
            if slot < last {
                parts.push((slot + 1, last, place));
            }
        } else {
            parts.push((slot, slot, to));
        }
        self.ranges.splice(index..index, parts);
    }

    /// Reads the answer of CLUSTER SLOTS, which came from there.
    fn parse(value: Value, from: &Place) -> Result<Self, String> {
        type Range = (u16, u16, (Option<String>, u16));
        let unreadable = || "the answer of CLUSTER SLOTS cannot be read".to_owned();
        let Value::Array(values) = value else {
            return Err(unreadable());
        };
        let mut map = Self::default();
        for value in values {
            let Value::Array(mut parts) = value else {
                return Err(unreadable());
            };
            // Behind the master come its replicas; behind its port, more of it.
            parts.truncate(3);
            if let Some(Value::Array(master)) = parts.get_mut(2) {
                master.truncate(2);
            }
            let range: RedisResult<Range> =
                redis::from_redis_value(Value::Array(parts)).map_err(RedisError::from);
            let (first, last, (host, port)) = range.map_err(|_| unreadable())?;
            // A node that does not know its own address leaves it out.
            let host = host.filter(|host| !host.is_empty() && host != "?");
            let host = host.unwrap_or_else(|| from.0.clone());
            map.ranges.push((first, last, (host, port)));
        }
        map.ranges.sort_unstable();
        if map.ranges.is_empty() {
            return Err("no node of the cluster has slots".to_owned());
        }
        Ok(map)
    }
}

/// The users' end of the connections to all nodes. When it is dropped, they are closed.
pub(super) struct Cluster {
    shared: Arc<Shared>,
    reachable: watch::Receiver<bool>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

struct Shared {
    seeds: Seeds,
    map: watch::Sender<Map>,
    /// Why there is no map, or none newer.
    trouble: Mutex<String>,
    nodes: Mutex<HashMap<Place, Arc<Node>>>,
    /// Connections for writes that are acknowledged once replicas have them.
    writers: Mutex<HashMap<Place, Arc<Writers>>>,
    /// How many replicas; 0: none need to.
    replicas: u32,
    /// Somebody has seen that the map is old.
    stale: Notify,
}

impl Cluster {
    pub(super) fn start(seeds: Seeds, replicas: u32) -> Self {
        let shared = Arc::new(Shared {
            seeds,
            map: watch::Sender::new(Map::default()),
            trouble: Mutex::new("not connected yet".to_owned()),
            nodes: Mutex::default(),
            writers: Mutex::default(),
            replicas,
            stale: Notify::new(),
        });
        let (sender, reachable) = watch::channel(false);
        let refresher = Arc::clone(&shared);
        let observer = Arc::clone(&shared);
        let tasks = [
            tokio::spawn(async move { refresher.refresh_for_ever().await }),
            tokio::spawn(async move { observer.observe_for_ever(sender).await }),
        ];
        Self {
            shared,
            reachable,
            _tasks: tasks.map(AbortOnDropHandle::new),
        }
    }

    /// Whether any node can be reached: the loss of one is no loss of the others' sessions.
    pub(super) fn reachable(&self) -> watch::Receiver<bool> {
        self.reachable.clone()
    }

    /// Waits for the map and for all masters.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        let mut map = self.shared.map.subscribe();
        let wait = async { map.wait_for(|map| !map.ranges.is_empty()).await.is_ok() };
        if !matches!(time::timeout_at(deadline, wait).await, Ok(true)) {
            return Err(self.shared.trouble().clone());
        }
        let map = self.shared.map.borrow().clone();
        for (_, place) in map.masters() {
            let node = self.shared.node(place)?;
            node.ready(deadline.saturating_duration_since(Instant::now()))
                .await?;
        }
        Ok(())
    }

    /// Opens a connection that is told of what is published: to any master that answers, so that
    /// servers spread over them, or else to the first node that can be connected to.
    pub(super) async fn subscriber(&self) -> Result<PubSub, String> {
        let mut places = self.shared.masters();
        let answering = places.partition_point(|place| self.shared.answers(place));
        if answering > 0 {
            places.swap(0, rand::random_range(0..answering));
        }
        places.extend(self.shared.seeds.addresses.iter().cloned());
        let mut reason = String::new();
        for (host, port) in places {
            match self.shared.seeds.like.node(&host, port)?.subscriber().await {
                Ok(subscriber) => return Ok(subscriber),
                Err(error) => reason = error,
            }
        }
        Err(reason)
    }

    /// Whether replicas must have what is written.
    pub(super) fn waits_for_replicas(&self) -> bool {
        self.shared.replicas > 0
    }

    /// Runs a script once. Takes at most [`CONNECTION_WAIT`] and twice the timeout.
    pub(super) async fn run(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        self.run_in(self.call(), script).await
    }

    /// The same for one whose writes replicas must have.
    pub(super) async fn write(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        let mut call = self.call();
        call.is_write = self.waits_for_replicas();
        self.run_in(call, script).await
    }

    async fn run_in(&self, mut call: Call<'_>, script: &Invocation<'_>) -> Result<Value, Failure> {
        for _ in 1..LOADS_MAX {
            match script.run(&mut call).await {
                Err(error) if call.failure.is_none() && is_no_script(&error) => {}
                answer => return call.end(answer),
            }
        }
        let answer = script.run(&mut call).await;
        call.end(answer)
    }

    /// Runs plain commands that may be run twice, each where its key is. There is no run of a whole
    /// cluster: what is said to be one is always the same.
    pub(super) async fn query(
        &self,
        commands: &Pipeline,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        let run: Arc<str> = "cluster".into();
        match commands.cmd_iter().next() {
            Some(command) if name(command) == b"SCAN" => {
                return Ok((vec![self.scan(command).await?], run));
            }
            Some(command) if name(command) == b"DBSIZE" => {
                let mut sum = 0;
                for value in self.call().broadcast(command).await? {
                    match value {
                        Value::Int(count) => sum += count,
                        other => {
                            return other
                                .extract_error()
                                .map_err(Failure::Refused)
                                .map(|v| (vec![v], run));
                        }
                    }
                }
                return Ok((vec![Value::Int(sum)], run));
            }
            _ => {}
        }
        let mut is_second = false;
        loop {
            let mut call = self.call();
            let answer = commands.query_async(&mut call).await;
            match call.end(answer) {
                Ok(values) => return Ok((values, run)),
                Err(Failure::NoAnswer(_)) if !is_second => is_second = true,
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Runs a script once for each of these keys and arguments. It may be run twice.
    pub(super) async fn run_for_each(
        &self,
        script: &redis::Script,
        calls: &[(Vec<&str>, [&str; 2])],
    ) -> Result<Vec<Value>, Failure> {
        let commands = for_each(script, calls);
        for _ in 1..LOADS_MAX {
            match self.query(&commands).await {
                Err(Failure::Refused(error)) if is_no_script(&error) => {
                    let mut call = self.call();
                    let answer = script.prepare_invoke().load_async(&mut call).await;
                    call.end(answer)?;
                }
                answer => return answer.map(|(values, _)| values),
            }
        }
        self.query(&commands).await.map(|(values, _)| values)
    }

    /// One step of SCAN over all masters, one after the other. A cursor says which, by its lowest
    /// slot; where the slots have been divided anew since, it begins again with the first, and where
    /// only the node is another (or another run of it), with that one. So a key may come twice, and
    /// each that is there all the time comes.
    async fn scan(&self, command: &Cmd) -> Result<Value, Failure> {
        let cursor = command.args_iter().nth(1).map(bytes_of).unwrap_or_default();
        let cursor = String::from_utf8_lossy(cursor).into_owned();
        let call = self.call();
        let map = self.shared.map.borrow().clone();
        let division = map.division().to_string();
        let masters = map.masters();
        let mut position = ("0", 0, "");
        let parts: Vec<&str> = cursor.split('.').collect();
        if let [at, slot, of_run, of_division] = *parts.as_slice()
            && of_division == division
        {
            position = (at, slot.parse().unwrap_or(0), of_run);
        }
        let (at, slot, of_run) = position;
        let index = masters.partition_point(|(lowest, _)| *lowest < slot);
        let Some((lowest, place)) = masters.get(index) else {
            return Err(Failure::NotSent(self.shared.trouble().clone()));
        };
        let mut at = at.to_owned();
        loop {
            let mut step = Cmd::new();
            step.arg("SCAN").arg(&at);
            for argument in command.args_iter().skip(2) {
                step.arg(bytes_of(argument));
            }
            let (value, run) = call.on(place, &step).await?;
            if at != "0" && *run != *of_run {
                "0".clone_into(&mut at);
                continue;
            }
            let mut parts = match value.extract_error().map_err(Failure::Refused)? {
                Value::Array(parts) if parts.len() == 2 => parts,
                other => return Ok(other),
            };
            if let Some(Value::BulkString(next)) = parts.first_mut() {
                let text = String::from_utf8_lossy(next).into_owned();
                let next_master = masters.get(index + 1);
                *next = match (&*text, next_master) {
                    ("0", None) => text,
                    ("0", Some((slot, _))) => format!("0.{slot}..{division}"),
                    _ => format!("{text}.{lowest}.{run}.{division}"),
                }
                .into_bytes();
            }
            return Ok(Value::Array(parts));
        }
    }

    fn call(&self) -> Call<'_> {
        Call {
            shared: &self.shared,
            deadline: Instant::now() + CONNECTION_WAIT + self.shared.seeds.timeout(),
            failure: None,
            is_write: false,
        }
    }
}

impl Shared {
    fn trouble(&self) -> MutexGuard<'_, String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<Place, Arc<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection to a node, which is begun if there is none.
    fn node(&self, place: &Place) -> Result<Arc<Node>, String> {
        let mut nodes = self.nodes();
        if let Some(node) = nodes.get(place) {
            return Ok(Arc::clone(node));
        }
        let server = self.seeds.like.node(&place.0, place.1)?;
        let node = Arc::new(Node::start(server));
        nodes.insert(place.clone(), Arc::clone(&node));
        Ok(node)
    }

    /// The connections to a node for writes.
    fn writers(&self, place: &Place) -> Result<Arc<Writers>, String> {
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writers) = writers.get(place) {
            return Ok(Arc::clone(writers));
        }
        let server = self.seeds.like.node(&place.0, place.1)?;
        let new = Arc::new(Writers::start(&server, self.replicas));
        writers.insert(place.clone(), Arc::clone(&new));
        Ok(new)
    }

    async fn refresh_for_ever(&self) {
        loop {
            if let Err(reason) = self.refresh().await {
                let mut trouble = self.trouble();
                if *trouble != reason {
                    tracing::warn!(
                        redis = self.seeds.describe(),
                        reason,
                        "no map of the cluster"
                    );
                    *trouble = reason;
                }
            }
            time::sleep(REFRESH_PAUSE).await;
            let is_known = !self.map.borrow().ranges.is_empty();
            let every = if is_known {
                REFRESH_EVERY
            } else {
                REFRESH_PAUSE
            };
            let _ = time::timeout(every, self.stale.notified()).await;
        }
    }

    /// The masters that are known, those first that answer.
    fn masters(&self) -> Vec<Place> {
        let known = self.map.borrow().clone();
        let masters = known.masters().into_iter().map(|(_, place)| place.clone());
        let mut masters: Vec<Place> = masters.collect();
        masters.sort_by_cached_key(|place| !self.answers(place));
        masters
    }

    /// Whether there is a connection to a node.
    fn answers(&self, place: &Place) -> bool {
        let node = self.nodes().get(place).cloned();
        node.is_some_and(|node| *node.reachable().borrow())
    }

    /// Asks nodes for the map: the masters that are known, then those of the URL.
    async fn refresh(&self) -> Result<(), String> {
        let mut places = self.masters();
        places.extend(self.seeds.addresses.iter().cloned());
        let mut command = redis::cmd("CLUSTER");
        command.arg("SLOTS");
        let mut reason = String::new();
        for place in places {
            let asked = async {
                let node = self.node(&place)?;
                let answer = node.send(&[(&command, false)], MAP_WAIT).await;
                let (values, _) = answer.map_err(reason_of)?;
                let value = values.into_iter().next().unwrap_or_default();
                Map::parse(
                    value.extract_error().map_err(|error| no_map(&error))?,
                    &place,
                )
            };
            match time::timeout(2 * MAP_WAIT, asked).await {
                Ok(Ok(map)) => {
                    self.take(map);
                    return Ok(());
                }
                Ok(Err(error)) => reason = error,
                Err(_) => "no answer in time".clone_into(&mut reason),
            }
        }
        Err(reason)
    }

    fn take(&self, map: Map) {
        let masters = map.masters();
        self.nodes()
            .retain(|place, _| masters.iter().any(|(_, known)| *known == place));
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        writers.retain(|place, _| masters.iter().any(|(_, known)| *known == place));
        drop(writers);
        for (_, place) in masters {
            let _ = self.node(place);
            if self.replicas > 0 {
                let _ = self.writers(place);
            }
        }
        self.trouble().clear();
        self.map.send_replace(map);
    }

    async fn observe_for_ever(&self, reachable: watch::Sender<bool>) {
        loop {
            let is_known = !self.map.borrow().ranges.is_empty();
            let nodes: Vec<Arc<Node>> = self.nodes().values().cloned().collect();
            let is_reachable = is_known && nodes.iter().any(|node| *node.reachable().borrow());
            reachable.send_if_modified(|was| std::mem::replace(was, is_reachable) != is_reachable);
            time::sleep(RETRY_PAUSE).await;
        }
    }
}

/// Why a node tells no map.
fn no_map(error: &RedisError) -> String {
    let text = explain(error);
    match text.contains("cluster support disabled") {
        true => {
            "this Redis is in no cluster: its URL begins with `redis://`, or `rediss://` with TLS"
                .to_owned()
        }
        false => text,
    }
}

fn reason_of(failure: Failure) -> String {
    match failure {
        Failure::NotSent(reason) | Failure::NoAnswer(reason) => reason,
        Failure::Refused(error) => explain(&error),
    }
}

/// One call: what it sends, it sends until its time is over. The library's scripts and pipelines use
/// it like a connection.
struct Call<'a> {
    shared: &'a Shared,
    deadline: Instant,
    /// Why it has no answer, which the library's errors cannot tell.
    failure: Option<Failure>,
    /// Replicas must have what it writes.
    is_write: bool,
}

/// What a refusal means.
enum Refusal {
    /// The slot is there.
    Moved(Place),
    /// These keys of the slot are there, or are to be made there.
    Ask(Place),
    /// Nobody takes it now.
    Later,
}

impl Call<'_> {
    fn end<T>(&mut self, answer: RedisResult<T>) -> Result<T, Failure> {
        match (answer, self.failure.take()) {
            (Ok(value), _) => Ok(value),
            (Err(_), Some(failure)) => Err(failure),
            (Err(error), None) => Err(Failure::Refused(super::connection::first_of(error))),
        }
    }

    /// Sends a command to one node.
    async fn on(&self, place: &Place, command: &Cmd) -> Result<(Value, Arc<str>), Failure> {
        let node = self.shared.node(place).map_err(Failure::NotSent)?;
        let sent = node.send(&[(command, false)], CONNECTION_WAIT).await;
        let (values, run) = sent.inspect_err(|_| self.shared.stale.notify_one())?;
        Ok((values.into_iter().next().unwrap_or_default(), run))
    }

    /// Sends a command to all masters.
    async fn broadcast(&self, command: &Cmd) -> Result<Vec<Value>, Failure> {
        let map = self.shared.map.borrow().clone();
        let masters = map.masters();
        if masters.is_empty() {
            return Err(Failure::NotSent(self.shared.trouble().clone()));
        }
        let answers = masters
            .into_iter()
            .map(|(_, place)| self.on(place, command));
        let answers = join_all(answers).await.into_iter();
        answers
            .map(|answer| answer.map(|(value, _)| value))
            .collect()
    }

    /// Sends commands, each where its key is, and takes their answers, errors among them.
    async fn route(&self, commands: &[&Cmd]) -> Result<Vec<Value>, Failure> {
        let slots: Vec<u16> = commands.iter().map(|command| slot_of(command)).collect();
        let mut answers: Vec<Option<Value>> = vec![None; commands.len()];
        let mut asked: HashMap<usize, Place> = HashMap::new();
        let mut pending: Vec<usize> = (0..commands.len()).collect();
        loop {
            let mut groups: BTreeMap<Place, Vec<usize>> = BTreeMap::new();
            let mut not_sent = None;
            let mut is_later = false;
            {
                let map = self.shared.map.borrow();
                for index in &pending {
                    match asked.get(index).or_else(|| map.master(slots[*index])) {
                        Some(place) => groups.entry(place.clone()).or_default().push(*index),
                        None => not_sent = Some("no node of the cluster has the slot".to_owned()),
                    }
                }
            }
            if not_sent.is_some() && !self.shared.trouble().is_empty() {
                not_sent = Some(self.shared.trouble().clone());
            }
            let sent = groups.into_iter().map(|(place, indexes)| {
                let of_group = indexes.iter();
                let group: Vec<(&Cmd, bool)> = of_group
                    .map(|index| (commands[*index], asked.contains_key(index)))
                    .collect();
                async move {
                    let answer = if self.is_write {
                        match self.shared.writers(&place) {
                            Ok(writers) => writers.send(&group, NODE_WAIT).await,
                            Err(reason) => Err(Failure::NotSent(reason)),
                        }
                    } else {
                        match self.shared.node(&place) {
                            Ok(node) => node.send(&group, NODE_WAIT).await,
                            Err(reason) => Err(Failure::NotSent(reason)),
                        }
                    };
                    (indexes, answer)
                }
            });
            let mut no_answer = None;
            for (indexes, answer) in join_all(sent).await {
                for index in &indexes {
                    asked.remove(index);
                }
                match answer {
                    Ok((values, _)) => {
                        for (index, value) in indexes.into_iter().zip(values) {
                            match refusal(&value) {
                                Some(Refusal::Moved(to)) => {
                                    let moved = |map: &mut Map| map.move_slot(slots[index], to);
                                    self.shared.map.send_modify(moved);
                                    self.shared.stale.notify_one();
                                }
                                Some(Refusal::Ask(to)) => {
                                    asked.insert(index, to);
                                    // Why nobody has taken it so far says more than the way there.
                                    answers[index].get_or_insert(value);
                                    continue;
                                }
                                Some(Refusal::Later) => is_later = true,
                                None => {}
                            }
                            answers[index] = Some(value);
                        }
                    }
                    Err(Failure::NotSent(reason)) => not_sent = Some(reason),
                    Err(Failure::NoAnswer(reason)) => no_answer = Some(reason),
                    Err(refused) => return Err(refused),
                }
            }
            if let Some(reason) = no_answer {
                self.shared.stale.notify_one();
                return Err(Failure::NoAnswer(reason));
            }
            pending.retain(|index| {
                let answer = answers[*index].as_ref();
                answer.is_none_or(|value| refusal(value).is_some())
            });
            let is_over = Instant::now() >= self.deadline;
            match not_sent {
                Some(reason) if is_over => return Err(Failure::NotSent(reason)),
                _ if is_over || pending.is_empty() => break,
                None if !is_later => {}
                _ => {
                    self.shared.stale.notify_one();
                    time::sleep(RETRY_PAUSE).await;
                }
            }
        }
        let answer = |answer: Option<Value>| answer.unwrap_or_default();
        Ok(answers.into_iter().map(answer).collect())
    }

    /// As the library wants it: its own error in place of a failure, which is kept.
    fn keep<T>(&mut self, failure: Failure) -> RedisResult<T> {
        match failure {
            Failure::Refused(error) => Err(error),
            failure => {
                self.failure = Some(failure);
                Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into())
            }
        }
    }
}

impl ConnectionLike for Call<'_> {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        Box::pin(async move {
            let answers = match name(command) {
                b"SCRIPT" => self.broadcast(command).await,
                _ => self.route(&[command]).await,
            };
            match answers {
                Ok(answers) => {
                    let extracted = answers.into_iter().map(Value::extract_error);
                    let answers: Vec<Value> = extracted.collect::<RedisResult<_>>()?;
                    Ok(answers.into_iter().next().unwrap_or_default())
                }
                Err(failure) => self.keep(failure),
            }
        })
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        _offset: usize,
        _count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        Box::pin(async move {
            let commands: Vec<&Cmd> = pipeline.cmd_iter().collect();
            match self.route(&commands).await {
                Ok(answers) => Ok(answers),
                Err(failure) => self.keep(failure),
            }
        })
    }

    fn get_db(&self) -> i64 {
        0
    }
}

fn is_no_script(error: &RedisError) -> bool {
    super::connection::first_of(error.clone()).code() == Some("NOSCRIPT")
}

/// Whether, and how, a node has refused to run a command.
fn refusal(value: &Value) -> Option<Refusal> {
    let Value::ServerError(error) = value else {
        return None;
    };
    // `MOVED 3999 127.0.0.1:6381`
    let place = || {
        let (host, port) = error.details()?.rsplit(' ').next()?.rsplit_once(':')?;
        Some((host.to_owned(), port.parse().ok()?))
    };
    let is_known = |(host, _): &Place| !host.is_empty();
    match error.code() {
        "MOVED" => Some(
            place()
                .filter(is_known)
                .map_or(Refusal::Later, Refusal::Moved),
        ),
        "ASK" => Some(
            place()
                .filter(is_known)
                .map_or(Refusal::Later, Refusal::Ask),
        ),
        "TRYAGAIN" | "CLUSTERDOWN" | "LOADING" | "MASTERDOWN" | "READONLY" => Some(Refusal::Later),
        _ => None,
    }
}

fn bytes_of(argument: redis::Arg<&[u8]>) -> &[u8] {
    match argument {
        redis::Arg::Simple(bytes) => bytes,
        _ => &[],
    }
}

pub(super) fn name(command: &Cmd) -> &[u8] {
    command.args_iter().next().map(bytes_of).unwrap_or_default()
}

/// The slot of a command's first key. All its keys have the same.
fn slot_of(command: &Cmd) -> u16 {
    slot(key_of(command))
}

/// A command's first key.
pub(super) fn key_of(command: &Cmd) -> &[u8] {
    let place = match name(command) {
        b"EVALSHA" => 3,
        b"MEMORY" => 2,
        _ => 1,
    };
    let key = command.args_iter().nth(place).map(bytes_of);
    key.unwrap_or_default()
}

/// The slot of a key.
fn slot(key: &[u8]) -> u16 {
    crc16::State::<crc16::XMODEM>::calculate(tag_of(key)) % SLOTS
}

/// What decides on the slot of a key: what is in its first braces, if anything is.
pub(super) fn tag_of(key: &[u8]) -> &[u8] {
    let tag = || {
        let begin = key.iter().position(|byte| *byte == b'{')? + 1;
        let length = key[begin..].iter().position(|byte| *byte == b'}')?;
        (length > 0).then(|| &key[begin..begin + length])
    };
    tag().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(port: u16) -> Place {
        ("a".to_owned(), port)
    }

    #[test]
    fn several_servers_or_the_scheme_make_a_cluster() {
        let parse = |url| Seeds::parse(url, None, Duration::from_secs(2));
        for url in [
            "redis-cluster://:secret@a:7000,b:7001",
            "redis://:secret@a:7000,b:7001/0",
            "redis://:secret@a:7000,redis://:secret@b:7001",
        ] {
            let seeds = parse(url).ok().unwrap().expect(url);
            assert_eq!(seeds.describe(), "Redis Cluster at a:7000,b:7001");
        }
        assert!(parse("redis://:sec,ret@a:7000/3").ok().unwrap().is_none());
        for url in [
            "redis-cluster://:secret@a/1",
            "redis-cluster://",
            "redis://:secret@a,",
        ] {
            let error = parse(url).err().expect(url).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_slot_that_moves_leaves_the_others_where_they_are() {
        let mut map = Map {
            ranges: vec![(0, 99, place(1)), (100, 199, place(2))],
        };
        let division = map.division();
        map.move_slot(50, place(2));
        map.move_slot(100, place(1));
        map.move_slot(300, place(3));
        for (slot, port) in [
            (0, 1),
            (49, 1),
            (50, 2),
            (51, 1),
            (99, 1),
            (100, 1),
            (101, 2),
            (300, 3),
        ] {
            assert_eq!(map.master(slot), Some(&place(port)), "{slot}");
        }
        assert_eq!(map.master(200), None);
        assert_ne!(map.division(), division);
    }

    #[test]
    fn keys_have_the_slots_that_redis_gives_them() {
        for (key, expected) in [
            ("foo", 12182),
            ("{foo}:x", 12182),
            ("foo{}", 5542),
            ("123456789", 12739),
        ] {
            assert_eq!(slot(key.as_bytes()), expected, "{key}");
        }
    }
}
