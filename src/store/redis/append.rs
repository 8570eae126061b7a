//! Appends: what `scripts/append.lua` is given, and what it says. Those of many callers that come at
//! the same time go to Redis together, in one call of the script: it costs Redis less to begin one,
//! and this server to be answered once. Nobody waits where nothing is under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use redis::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::connection::Failure;
use super::invocation::Invocation;
use super::layout::{Keys, Scripts};
use super::router::Connection;
use super::{Reply, failure_of_write, optional};
use crate::message::{ID_BYTES, ID_PREFIX, UnixMillis, now_ms};
use crate::store::{Append, Appended, Error, REQUEST_MEMORY_MS, RequestKey, Result};

/// Bytes of a stamp: what was asked, and when.
const STAMP_BYTES: usize = 10;
/// How far from the end of an element its id is looked for, in bytes.
const MARK_WITHIN: usize = 512;

/// Appends in one call of the script, at most. Redis does nothing else meanwhile: half a millisecond
/// if all are plain.
const TOGETHER_MAX: usize = 32;
/// Appends that are worth a call of their own while others are under way. Fewer wait until there are as
/// many as are under way, so that where Redis is near a few large calls go, and where it is far away
/// nobody waits long for those before.
const ENOUGH: usize = 16;
/// Calls of the script that are under way at once from a worker, at most: so many callers at most do not
/// know what came of theirs when a connection dies, and begin again one by one.
const UNDER_WAY_MAX: usize = 8;
/// Appends of a worker that wait to be sent, at most; others go by themselves.
const WAITING_MAX: usize = 1_024;
/// Bytes and elements of an append that goes with others, at most. A larger one goes by itself, so
/// that nobody waits for it.
const SHARED_BYTES_MAX: usize = 16 << 10;
const SHARED_ELEMENTS_MAX: usize = 100;

/// An append to a session.
struct Call {
    keys: Keys,
    append: Append,
}

/// Where the appends of a worker go.
pub(super) struct Appends {
    connection: Arc<Connection>,
    scripts: Arc<Scripts>,
    runtime: Handle,
    /// Whether appends may go together: all sessions are in one Redis, and nobody waits for replicas.
    are_gathered: bool,
    queue: Mutex<Queue>,
}

/// Appends that wait for those that are under way.
#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// Calls of the script that are under way.
    calls: usize,
    /// Appends in them.
    sent: usize,
    /// Appends in the one that began last: others are about if there were several.
    last: usize,
    /// A task is about to send what waits by then.
    is_awake: bool,
}

/// A call that waits to be sent. If it is not answered, it was not sent.
struct Waiting {
    call: Arc<Call>,
    answer: oneshot::Sender<Answer>,
}

type Answer = std::result::Result<Value, Failure>;

/// How an append begins.
enum Begun {
    /// Nobody else is about: it goes by itself, at once.
    Alone(UnderWay),
    Together(oneshot::Receiver<Answer>),
}

/// A call of the script, with so many appends. When it ends, what waits goes.
struct UnderWay {
    appends: Arc<Appends>,
    count: usize,
    /// It ended without an answer.
    has_failed: bool,
}

impl Queue {
    /// Whether it is time to send. Whenever something waits, something is under way, after which this
    /// is asked again.
    fn is_due(&self) -> bool {
        let are_enough = self.waiting.len() >= self.sent.clamp(1, ENOUGH);
        are_enough && self.calls < UNDER_WAY_MAX && !self.is_awake
    }

    fn begin(&mut self, count: usize) {
        self.calls += 1;
        self.sent += count;
        self.last = count;
    }

    fn end(&mut self, count: usize) {
        self.calls -= 1;
        self.sent -= count;
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut queue = self.appends.queue();
        queue.end(self.count);
        if self.has_failed {
            // It took its time. Those that wait have waited as long: each tries by itself.
            let waiting = std::mem::take(&mut queue.waiting);
            drop(queue);
            drop(waiting);
        } else {
            self.appends.wake(queue);
        }
    }
}

impl Appends {
    /// Those of the worker that this is called within.
    pub(super) fn new(connection: Arc<Connection>, scripts: Arc<Scripts>) -> Arc<Self> {
        Arc::new(Self {
            are_gathered: connection.only().is_some(),
            connection,
            scripts,
            runtime: Handle::current(),
            queue: Mutex::default(),
        })
    }

    /// Appends. Takes at most as long as a call that is repeated once: where it has waited behind
    /// others that failed, it is not.
    pub(super) async fn append(self: &Arc<Self>, keys: Keys, append: Append) -> Result<Appended> {
        let call = Arc::new(Call { keys, append });
        let answer = match self.begin(&call) {
            Some(begun) => self.finish(&call, begun).await,
            None => self.append_alone(&call, true).await,
        };
        call.parse(answer.map_err(failure_of_write)?)
    }

    /// Begins an append as others allow it; `None` if it has nothing to do with others.
    fn begin(self: &Arc<Self>, call: &Arc<Call>) -> Option<Begun> {
        if !self.are_gathered || !call.is_small() {
            return None;
        }
        let mut queue = self.queue();
        if queue.calls == 0 && queue.last <= 1 && queue.waiting.is_empty() {
            queue.begin(1);
            return Some(Begun::Alone(self.under_way(1)));
        }
        if queue.waiting.len() >= WAITING_MAX {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        let call = Arc::clone(call);
        queue.waiting.push(Waiting { call, answer });
        self.wake(queue);
        Some(Begun::Together(answered))
    }

    /// Waits for what came of it; a second attempt it makes by itself.
    async fn finish(&self, call: &Call, begun: Begun) -> Answer {
        let first = match begun {
            Begun::Alone(mut under_way) => {
                let answer = self.append_alone(call, false).await;
                under_way.has_failed = has_failed(&answer);
                Ok(answer)
            }
            Begun::Together(answered) => answered.await,
        };
        match first {
            Ok(Err(Failure::NoAnswer(reason))) => {
                let second = self.append_alone(call, false).await;
                // Whatever the second attempt fails from, the first may have arrived.
                second.map_err(|_| Failure::NoAnswer(reason))
            }
            // It may be that of another append, or say that the master is elsewhere by now.
            Ok(Err(Failure::Refused(_))) => self.append_alone(call, true).await,
            Ok(answer) => answer,
            // The call before it has failed.
            Err(_) => self.append_alone(call, false).await,
        }
    }

    /// Appends by itself; a second time where it may and there is no answer to the first.
    async fn append_alone(&self, call: &Call, may_repeat: bool) -> Answer {
        let script = invocation(&self.scripts.append, [call].into_iter());
        let answer = match may_repeat {
            true => self.connection.write_repeatable(&script).await,
            false => self.connection.write(&script).await,
        };
        answer.map(|value| match value {
            Value::Array(mut values) if values.len() == 1 => values.remove(0),
            other => other,
        })
    }

    /// Sends what waits, if it is time: in a task, so that those go with it who come until then.
    fn wake(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>) {
        if queue.is_due() {
            queue.is_awake = true;
            drop(queue);
            self.runtime.spawn(Arc::clone(self).send());
        }
    }

    /// Sends what waits, and passes on what each came to.
    async fn send(self: Arc<Self>) {
        let (calls, mut under_way) = {
            let mut queue = self.queue();
            queue.is_awake = false;
            let count = queue.waiting.len().min(TOGETHER_MAX);
            queue.begin(count);
            let calls: Vec<_> = queue.waiting.drain(..count).collect();
            (calls, self.under_way(count))
        };
        if calls.is_empty() {
            // The call before them has failed.
            return;
        }
        let appends = calls.iter().map(|waiting| &*waiting.call);
        let script = invocation(&self.scripts.append, appends);
        let answer = self.connection.write(&script).await;
        under_way.has_failed = has_failed(&answer);
        // What waits goes first: Redis has something to do while these are answered.
        drop(under_way);
        match answer {
            Ok(Value::Array(values)) if values.len() == calls.len() => {
                for (waiting, value) in calls.into_iter().zip(values) {
                    // A caller that is gone needs no answer.
                    let _ = waiting.answer.send(Ok(value));
                }
            }
            same => {
                for waiting in calls {
                    let _ = waiting.answer.send(same.clone());
                }
            }
        }
    }

    fn under_way(self: &Arc<Self>, count: usize) -> UnderWay {
        UnderWay {
            appends: Arc::clone(self),
            count,
            has_failed: false,
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether Redis has said nothing.
fn has_failed(answer: &Answer) -> bool {
    matches!(answer, Err(Failure::NotSent(_) | Failure::NoAnswer(_)))
}

/// The script with these appends.
fn invocation<'a, 'c>(
    script: &'a redis::Script,
    calls: impl Iterator<Item = &'c Call> + Clone,
) -> Invocation<'a> {
    let keys: Vec<&str> = calls
        .clone()
        .flat_map(|call| call.keys.in_order())
        .collect();
    let mut script = Invocation::new(script, &keys);
    script.arg(now_ms().div_euclid(REQUEST_MEMORY_MS));
    for Call { append, .. } in calls {
        let mut conditions = String::new();
        if append.expected_last_sequence.is_some() || append.expected_epoch.is_some() {
            let last = optional(append.expected_last_sequence);
            let epoch = optional(append.expected_epoch.map(|epoch| epoch.0));
            conditions = format!("{last},{epoch}");
        }
        let mark = append.elements.last().and_then(|last| mark_of(last));
        script
            .arg(request_field(&append.request))
            .arg(&stamp(&append.request, append.time_ms))
            .arg(mark.unwrap_or_default())
            .arg(conditions)
            .arg(append.elements.len());
        for element in &append.elements {
            script.arg(element.as_ref());
        }
    }
    script
}

impl Call {
    fn is_small(&self) -> bool {
        let elements = &self.append.elements;
        let bytes: usize = elements.iter().map(Bytes::len).sum();
        elements.len() <= SHARED_ELEMENTS_MAX && bytes <= SHARED_BYTES_MAX
    }

    fn parse(&self, value: Value) -> Result<Appended> {
        let append = &self.append;
        if let Value::Int(first_sequence) = value {
            return Ok(Appended {
                first_sequence,
                count: append.elements.len(),
                time_ms: append.time_ms,
                repeated: false,
            });
        }
        let mut reply = Reply::of(value)?;
        match reply.word.as_str() {
            "repeated" => parse_record(&reply.bytes()?),
            "reused" => Err(Error::RequestReused),
            "cleared" => Err(Error::Cleared),
            "mismatch" => Err(Error::SequenceMismatch {
                expected: append.expected_last_sequence.unwrap_or_default(),
                actual: reply.number()?,
            }),
            _ => Err(reply.refusal()),
        }
    }
}

/// The name of a request's record, as `scripts/keys.lua` draws it.
pub(super) fn request_field(request: &RequestKey) -> &[u8] {
    &request.id[..8]
}

/// What a request's record begins with.
pub(super) fn stamp(request: &RequestKey, time_ms: UnixMillis) -> [u8; STAMP_BYTES] {
    let mut stamp = [0; STAMP_BYTES];
    stamp[..4].copy_from_slice(&request.fingerprint[..4]);
    stamp[4..].copy_from_slice(&time_ms.to_be_bytes()[2..]);
    stamp
}

/// Reads the record of a request that was done before.
fn parse_record(record: &[u8]) -> Result<Appended> {
    let parse = || {
        let (stamp, numbers) = record.split_at_checked(STAMP_BYTES)?;
        let numbers = std::str::from_utf8(numbers).ok()?;
        let (first, count) = numbers.split_once(':').unwrap_or((numbers, "1"));
        Some(Appended {
            first_sequence: first.parse().ok()?,
            count: count.parse().ok()?,
            time_ms: stamp[4..]
                .iter()
                .fold(0, |n, byte| n << 8 | i64::from(*byte)),
            repeated: true,
        })
    };
    parse().ok_or_else(|| Error::Corrupt("the record of a request".to_owned()))
}

/// What an element is known by, if the server made its id: the id. It is looked for near the end,
/// where it stands unless much comes after it; scripts know any other element by a fingerprint.
fn mark_of(element: &[u8]) -> Option<&[u8]> {
    const BEFORE: &[u8] = b"\"id\": \"";
    let tail = &element[element.len().saturating_sub(MARK_WITHIN)..];
    let has_id = |at: &usize| {
        let rest = &tail[at + BEFORE.len()..];
        rest.len() > ID_BYTES
            && rest.starts_with(ID_PREFIX.as_bytes())
            && rest[ID_PREFIX.len()..ID_BYTES]
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte))
            && rest[ID_BYTES] == b'"'
    };
    let places = tail.windows(BEFORE.len()).enumerate().rev();
    let mut found = places.filter(|(_, part)| *part == BEFORE).map(|(at, _)| at);
    let start = found.find(has_id)? + BEFORE.len();
    Some(&tail[start..start + ID_BYTES])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_known_by_the_id_that_the_server_made() {
        let id = "cm_ZqTAp6-7kR3_xY";
        let known = |text: String| mark_of(text.as_bytes()).map(<[u8]>::to_vec);
        let of_user = format!(r#"{{"content": "a", "name": null, "id": "{id}"}}"#);
        let of_model = format!(r#"{{"id": "{id}", "tool_calls": [{{"id": "call_1"}}]}}"#);
        for element in [of_user, of_model.clone()] {
            assert_eq!(known(element), Some(id.into()));
        }
        for other in [
            String::new(),
            r#"{"id": null}"#.to_owned(),
            r#"{"id": "run-0"}"#.to_owned(),
            // Not as the server makes them, broken off, or a text that speaks of one.
            format!(r#"{{"id": "{id}0"}}"#),
            r#"{"id": "cm_ZqTAp6-7kR3 xY"}"#.to_owned(),
            format!(r#"{{"id": "{id}"#),
            format!(r#"{{"content": "\"id\": \"{id}\""}}"#),
            format!("{of_model}{}", " ".repeat(MARK_WITHIN)),
        ] {
            assert_eq!(known(other.clone()), None, "{other}");
        }
    }
}
