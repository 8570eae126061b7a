//! Appends: what `scripts/append.lua` is given, and what it says. Those of many callers that come at
//! the same time go to Redis together, in one call of the script: it costs Redis less to begin one,
//! and this server to be answered once. Nobody waits where nothing is under way.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use redis::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

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

/// Where appends go.
pub(super) struct Appends {
    connection: Arc<Connection>,
    scripts: Arc<Scripts>,
    /// Where all sessions are in one Redis, and nobody waits for replicas.
    together: Option<Together>,
}

struct Together {
    waiting: mpsc::Sender<Waiting>,
    _sender: AbortOnDropHandle<()>,
}

/// A call that waits to be sent. If it is not answered, it was not sent.
struct Waiting {
    call: Arc<Call>,
    answer: oneshot::Sender<std::result::Result<Value, Failure>>,
}

impl Appends {
    pub(super) fn start(connection: Arc<Connection>, scripts: Arc<Scripts>) -> Self {
        let together = connection.only().is_some().then(|| {
            let (waiting, queue) = mpsc::channel(WAITING_MAX);
            let sending = send(Arc::clone(&connection), Arc::clone(&scripts), queue);
            Together {
                waiting,
                _sender: AbortOnDropHandle::new(tokio::spawn(sending)),
            }
        });
        Self {
            connection,
            scripts,
            together,
        }
    }

    /// Appends. Takes at most as long as a call that is repeated once: where it has waited behind
    /// others that failed, it is not.
    pub(super) async fn append(&self, keys: Keys, append: Append) -> Result<Appended> {
        let call = Arc::new(Call { keys, append });
        let answer = match self.append_together(&call).await {
            Some(answer) => answer,
            None => self.append_alone(&call, true).await,
        };
        call.parse(answer.map_err(failure_of_write)?)
    }

    /// Appends together with others; `None` if it is to go by itself.
    async fn append_together(
        &self,
        call: &Arc<Call>,
    ) -> Option<std::result::Result<Value, Failure>> {
        let together = self.together.as_ref().filter(|_| call.is_small())?;
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting {
            call: Arc::clone(call),
            answer,
        };
        together.waiting.try_send(waiting).ok()?;
        Some(match answered.await {
            Ok(Err(Failure::NoAnswer(reason))) => {
                let second = self.append_alone(call, false).await;
                // Whatever the second attempt fails from, the first may have arrived.
                second.map_err(|_| Failure::NoAnswer(reason))
            }
            // It may be that of another append.
            Ok(Err(Failure::Refused(_))) => return None,
            Ok(answer) => answer,
            // The call before it has failed.
            Err(_) => self.append_alone(call, false).await,
        })
    }

    /// Appends by itself; a second time where it may and there is no answer to the first.
    async fn append_alone(
        &self,
        call: &Call,
        may_repeat: bool,
    ) -> std::result::Result<Value, Failure> {
        let script = invocation(&self.scripts.append, &[call]);
        let answer = match may_repeat {
            true => self.connection.write_repeatable(&script).await,
            false => self.connection.write(&script).await,
        };
        answer.map(|value| match value {
            Value::Array(mut values) if values.len() == 1 => values.remove(0),
            other => other,
        })
    }
}

/// Sends what waits, for ever.
async fn send(
    connection: Arc<Connection>,
    scripts: Arc<Scripts>,
    mut queue: mpsc::Receiver<Waiting>,
) {
    let (connection, scripts) = (&*connection, &*scripts);
    let mut waiting = Vec::new();
    let mut under_way = FuturesUnordered::new();
    // Appends in the calls that are under way.
    let mut sent = 0;
    loop {
        let room = TOGETHER_MAX - waiting.len();
        tokio::select! {
            Some(came_to) = under_way.next() => {
                let (count, are_answered): (usize, bool) = came_to;
                sent -= count;
                if !are_answered {
                    // It took its time to fail. Those that wait have waited as long: each tries by
                    // itself.
                    waiting.clear();
                    while queue.try_recv().is_ok() {}
                }
            }
            count = queue.recv_many(&mut waiting, room), if room > 0 => {
                if count == 0 {
                    return;
                }
            }
        }
        let are_enough = !waiting.is_empty() && waiting.len() >= sent.min(ENOUGH);
        if are_enough && under_way.len() < UNDER_WAY_MAX {
            let calls = std::mem::take(&mut waiting);
            let count = calls.len();
            sent += count;
            under_way.push(async move {
                let are_answered = send_together(connection, scripts, calls).await;
                (count, are_answered)
            });
        }
    }
}

/// Sends these, and passes on what each came to. Says whether they were answered.
async fn send_together(connection: &Connection, scripts: &Scripts, calls: Vec<Waiting>) -> bool {
    let appends: Vec<&Call> = calls.iter().map(|waiting| &*waiting.call).collect();
    let script = invocation(&scripts.append, &appends);
    match connection.write(&script).await {
        Ok(Value::Array(values)) if values.len() == calls.len() => {
            for (waiting, value) in calls.into_iter().zip(values) {
                // A caller that is gone needs no answer.
                let _ = waiting.answer.send(Ok(value));
            }
            true
        }
        same => {
            for waiting in calls {
                let _ = waiting.answer.send(same.clone());
            }
            matches!(same, Ok(_) | Err(Failure::Refused(_)))
        }
    }
}

/// The script with these appends.
fn invocation<'a>(script: &'a redis::Script, calls: &[&Call]) -> Invocation<'a> {
    let keys: Vec<&str> = calls.iter().flat_map(|call| call.keys.in_order()).collect();
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
