//! Looks at the keys of a Redis as they are. Sends only commands that read: SCAN, TYPE, PTTL, LLEN,
//! MEMORY USAGE, LRANGE, besides what any connection does. Knows no sessions and not what the bytes
//! mean.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use redis::Value;

use super::connection::Failure;
pub use super::layout::is_copy;
use super::layout::pattern;
use super::router::Connection;
use super::{InvalidSettings, Settings, failure_of_read, unexpected};
use crate::store::{Error, Result};

/// A connection that only reads.
pub struct Inspector {
    connection: Connection,
    pattern: String,
    description: String,
    /// The run of Redis that the cursors belong to.
    run_id: OnceLock<Arc<str>>,
}

/// What is known of a key without its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Redis' name of the type; `none` if the key went meanwhile.
    pub kind: String,
    /// How many elements, if it is a list.
    pub length: i64,
    /// `None` if it does not expire.
    pub expires_in_ms: Option<i64>,
    /// What Redis estimates that it takes, with the key; `None` if it does not tell.
    pub bytes: Option<i64>,
}

impl Inspector {
    /// Starts to connect. Must be called within a Tokio runtime.
    pub fn connect(settings: &Settings) -> std::result::Result<Self, InvalidSettings> {
        let target = settings.target()?;
        Ok(Self {
            description: target.describe(),
            connection: Connection::start(target, 0),
            pattern: pattern(&settings.key_prefix),
            run_id: OnceLock::new(),
        })
    }

    /// Waits until Redis answers, up to a limit.
    pub async fn ready(&self, limit: Duration) -> Result<()> {
        let ready = self.connection.ready(limit).await;
        ready.map_err(Error::Unavailable)
    }

    /// Where Redis is, without secrets.
    pub fn describe(&self) -> &str {
        &self.description
    }

    /// Keys with the prefix: one step of SCAN, from `cursor` (`0` at first), and where to go on
    /// (`0` after the last). A key may come twice.
    pub async fn keys(&self, cursor: &str, count: usize) -> Result<(String, Vec<Vec<u8>>)> {
        let mut commands = redis::pipe();
        commands.cmd("SCAN").arg(cursor);
        commands.arg("MATCH").arg(&self.pattern);
        commands.arg("COUNT").arg(count);
        let mut values = self.query(&commands).await?.into_iter();
        parse_scan(values.next().unwrap_or_default())
    }

    /// What is known of a key.
    pub async fn facts(&self, key: &[u8]) -> Result<Facts> {
        let mut commands = redis::pipe();
        commands.ignore_errors();
        commands.cmd("TYPE").arg(key);
        commands.cmd("PTTL").arg(key);
        commands.cmd("LLEN").arg(key);
        commands.cmd("MEMORY").arg("USAGE").arg(key);
        let values = self.query(&commands).await?;
        let [kind, left, length, bytes] = values.as_slice() else {
            return Err(Error::Corrupt("Redis left out an answer".to_owned()));
        };
        let kind = match kind {
            Value::SimpleString(kind) => kind.clone(),
            Value::ServerError(error) => return Err(Error::Unavailable(error.to_string())),
            other => return Err(unexpected(other)),
        };
        let number = |value: &Value| match value {
            Value::Int(number) => Some(*number),
            _ => None,
        };
        Ok(Facts {
            kind,
            length: number(length).unwrap_or(0),
            expires_in_ms: number(left).filter(|left| *left >= 0),
            bytes: number(bytes),
        })
    }

    /// The elements of a list from `first` on, the oldest being 1, at most `count`. Others' pushes
    /// at the head do not move them.
    pub async fn elements(&self, key: &[u8], first: i64, count: i64) -> Result<Vec<Vec<u8>>> {
        let mut commands = redis::pipe();
        commands.cmd("LRANGE").arg(key);
        commands.arg(-(first + count - 1)).arg(-first);
        let value = self.query(&commands).await?.into_iter().next();
        let Some(Value::Array(values)) = value else {
            return Err(unexpected(&value.unwrap_or_default()));
        };
        let mut elements = Vec::with_capacity(values.len());
        for value in values.into_iter().rev() {
            match value {
                Value::BulkString(bytes) => elements.push(bytes),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(elements)
    }

    async fn query(&self, commands: &redis::Pipeline) -> Result<Vec<Value>> {
        let answer = self.connection.query(commands).await;
        let (values, run_id) = answer.map_err(|failure| match failure {
            Failure::Refused(error) if error.code() == Some("WRONGTYPE") => Error::WrongKeyType {
                key: "one that was a list".to_owned(),
            },
            failure => failure_of_read(failure),
        })?;
        if *self.run_id.get_or_init(|| Arc::clone(&run_id)) != run_id {
            let reason = "Redis was restarted meanwhile: begin again";
            return Err(Error::Unavailable(reason.to_owned()));
        }
        Ok(values)
    }
}

/// The answer of SCAN: where to go on, and the keys.
pub(super) fn parse_scan(value: Value) -> Result<(String, Vec<Vec<u8>>)> {
    let parts = match value {
        Value::Array(parts) => <[Value; 2]>::try_from(parts),
        other => return Err(unexpected(&other)),
    };
    let Ok([Value::BulkString(cursor), Value::Array(values)]) = parts else {
        return Err(Error::Corrupt("the answer of SCAN".to_owned()));
    };
    let mut keys = Vec::with_capacity(values.len());
    for value in values {
        match value {
            Value::BulkString(key) => keys.push(key),
            other => return Err(unexpected(&other)),
        }
    }
    Ok((String::from_utf8_lossy(&cursor).into_owned(), keys))
}
