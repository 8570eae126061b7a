//! The newest elements of a session, by plain commands in one transaction: Lua would copy each element
//! twice and hash all its bytes. What common.lua does with a session that others have touched is not
//! done here: such a session is left to read.lua.

use redis::{Cmd, Value};

use super::layout::Keys;
use crate::message::{ID_PREFIX, UnixMillis};
use crate::store::{Epoch, Sequence};

/// The commands that read so many of the newest elements, and what must be known of the session.
pub(super) fn commands(keys: &Keys, wanted: usize) -> [Cmd; 4] {
    let [list, facts, ..] = keys.in_order();
    let mut known = redis::cmd("HMGET");
    known.arg(facts);
    known.arg(&["mark", "last", "base", "expires_at", "epoch", "gaps"]);
    let mut length = redis::cmd("LLEN");
    length.arg(list);
    let mut left = redis::cmd("PTTL");
    left.arg(list);
    let mut newest = redis::cmd("LRANGE");
    newest.arg(list).arg(0).arg(wanted.saturating_sub(1));
    [known, length, left, newest]
}

/// What these commands found.
pub(super) enum Found {
    /// Nobody else has touched the session since its last element, and it has no gaps.
    Plain(Newest),
    /// Others have added something, of which read.lua takes note.
    Changed,
    /// Anything else: it may be so until somebody adds something.
    Unusual,
}

pub(super) struct Newest {
    pub(super) last: Sequence,
    pub(super) epoch: Epoch,
    /// How many elements the session has.
    pub(super) length: i64,
    /// Newest first.
    pub(super) elements: Vec<Vec<u8>>,
}

/// Reads the answers. They came about now.
pub(super) fn read(answers: Vec<Value>, now_ms: UnixMillis) -> Found {
    let Ok(
        [
            Value::Array(facts),
            Value::Int(length),
            Value::Int(left),
            Value::Array(newest),
        ],
    ) = <[Value; 4]>::try_from(answers)
    else {
        return Found::Unusual;
    };
    let [mark, numbers @ .., Value::Nil] = &facts[..] else {
        // It has gaps, or is none.
        return Found::Unusual;
    };
    let number = |place: usize| match numbers.get(place) {
        Some(Value::BulkString(digits)) => std::str::from_utf8(digits).ok()?.parse::<i64>().ok(),
        _ => None,
    };
    let epoch = match numbers.get(3) {
        Some(Value::Nil) => Some(0),
        _ => number(3),
    };
    let (Value::BulkString(mark), Some(last), Some(base), Some(epoch)) =
        (mark, number(0), number(1), epoch)
    else {
        return Found::Unusual;
    };
    if length > last.saturating_sub(base) {
        return Found::Changed;
    }
    let is_kept = match number(2) {
        None => left == -1,
        Some(at) => left >= 0 && now_ms.saturating_add(left).abs_diff(at) <= 1_000,
    };
    let elements = newest.into_iter().map(|element| match element {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    });
    let elements: Option<Vec<_>> = elements.collect();
    match elements {
        Some(elements)
            if is_kept
                && length == last.saturating_sub(base)
                && elements
                    .first()
                    .is_some_and(|newest| has_mark(newest, mark)) =>
        {
            Found::Plain(Newest {
                last,
                epoch: Epoch(epoch),
                length,
                elements,
            })
        }
        _ => Found::Unusual,
    }
}

/// Whether an element is known by this mark, as common.lua says it.
fn has_mark(element: &[u8], mark: &[u8]) -> bool {
    if mark.starts_with(ID_PREFIX.as_bytes()) {
        return memchr::memmem::find(element, mark).is_some();
    }
    !mark.is_empty() && fingerprint(element).as_bytes() == mark
}

/// The fingerprint that common.lua makes.
fn fingerprint(element: &[u8]) -> String {
    let mut digest = sha1_smol::Sha1::new();
    digest.update(element.len().to_string().as_bytes());
    digest.update(b":");
    digest.update(
        element
            .get(32..)
            .map_or(&[], |rest| &rest[..rest.len().min(128)]),
    );
    digest.update(&element[element.len().saturating_sub(160)..]);
    let mut hash = digest.digest().to_string();
    hash.truncate(16);
    hash
}
