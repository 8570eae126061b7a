//! `chat-memory doctor`: looks at a Redis that LangChain uses, without changing it, and says what
//! there is and what is wrong with it. Holds a few elements at a time, and never shows their text.
//!
//! [`rules`] knows what LangChain can read.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use serde::Serialize;

use crate::{
    config::DoctorArgs,
    message::{SESSION_ID_BYTES_MAX, SessionId},
    moving::progress::Progress,
    start::EXIT_USAGE,
    store::{
        self, ELEMENT_BYTES_MAX,
        redis::inspect::{self, Inspector},
    },
};

pub mod rules;

/// How long to wait for Redis.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Names that one step of the walk looks at.
const NAMES_MAX: usize = 200;
/// Elements that are read at a time, at most.
const PIECE_ELEMENTS_MAX: i64 = 500;
/// Bytes that a piece should have. It is guessed from the elements before: Redis cannot be told.
const PIECE_BYTES: i64 = 2 << 20;
/// Findings that are named; the others are counted.
const FINDINGS_MAX: usize = 1_000;
/// Findings that the table shows.
const FINDINGS_SHOWN_MAX: usize = 20;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("error: {0}")]
    Store(#[from] store::Error),
    #[error("error: --redis: {0}")]
    Redis(#[from] store::redis::InvalidSettings),
    #[error("{0}")]
    Settings(#[from] crate::config::Problems),
    #[error("error: cannot write the report: {0}")]
    Output(#[from] io::Error),
}

/// Runs the command.
pub async fn run(args: &DoctorArgs) -> ExitCode {
    match examine(args).await {
        Ok(report) if report.is_well() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(failure) => {
            // If stderr is gone too, the exit code has to do.
            let _ = writeln!(io::stderr(), "{failure}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

async fn examine(args: &DoctorArgs) -> Result<Report, Failure> {
    let settings = args.redis.check()?;
    let inspector = Inspector::connect(&settings)?;
    inspector.ready(CONNECT_LIMIT).await?;
    let mut doctor = Doctor {
        report: Report {
            redis: inspector.describe().to_owned(),
            key_prefix: settings.key_prefix,
            ..Report::default()
        },
        inspector,
        progress: Progress::new(),
    };
    doctor.walk().await?;
    doctor.progress.clear();
    let report = doctor.report;
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(io::Error::from)? + "\n"
    } else {
        report.table()
    };
    io::stdout().write_all(text.as_bytes())?;
    io::stdout().flush()?;
    Ok(report)
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Report {
    redis: String,
    key_prefix: String,
    /// Lists with the prefix. A key may count twice if the table of keys grows meanwhile.
    sessions: u64,
    messages: u64,
    /// Elements that LangChain cannot read, and the sessions that are unreadable to it by them.
    unreadable_messages: u64,
    unreadable_sessions: u64,
    /// Elements that are too large for us to hand out.
    too_large_messages: u64,
    wrong_type_keys: u64,
    /// Lists whose names we do not take.
    brace_keys: u64,
    invalid_id_keys: u64,
    /// What Redis' MEMORY USAGE gives for the lists, which it estimates from a few elements.
    memory_bytes_estimate: u64,
    /// Lists of which Redis did not tell.
    memory_unknown_sessions: u64,
    expiring_sessions: u64,
    expires_in_seconds_min: Option<i64>,
    expires_in_seconds_max: Option<i64>,
    findings: Vec<Finding>,
    findings_omitted: u64,
}

/// What is wrong with a key or an element.
#[derive(Debug, Serialize)]
struct Finding {
    kind: &'static str,
    key: String,
    /// Of the element in its list, the oldest being 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<i64>,
    reason: String,
}

struct Doctor {
    inspector: Inspector,
    report: Report,
    progress: Progress,
}

impl Doctor {
    async fn walk(&mut self) -> Result<(), Failure> {
        let mut cursor = "0".to_owned();
        loop {
            let (next, keys) = self.inspector.keys(&cursor, NAMES_MAX).await?;
            for key in &keys {
                self.key(key).await?;
            }
            if next == "0" {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn key(&mut self, key: &[u8]) -> Result<(), Failure> {
        let facts = self.inspector.facts(key).await?;
        // An empty prefix also matches what we keep beside the lists.
        let is_ours = key.starts_with(b"{") && facts.kind != "list" || inspect::is_copy(key);
        if facts.kind == "none" || is_ours {
            return Ok(());
        }
        if facts.kind != "list" {
            self.report.wrong_type_keys += 1;
            self.find("wrong_type", key, None, format!("holds a {}", facts.kind));
            return Ok(());
        }

        self.report.sessions += 1;
        match facts.bytes.and_then(|bytes| u64::try_from(bytes).ok()) {
            Some(bytes) => self.report.memory_bytes_estimate += bytes,
            None => self.report.memory_unknown_sessions += 1,
        }
        if let Some(left_ms) = facts.expires_in_ms {
            let seconds = left_ms / 1000;
            let report = &mut self.report;
            report.expiring_sessions += 1;
            report.expires_in_seconds_min = Some(
                report
                    .expires_in_seconds_min
                    .map_or(seconds, |min| min.min(seconds)),
            );
            report.expires_in_seconds_max = report.expires_in_seconds_max.max(Some(seconds));
        }
        self.name(key);
        self.elements(key, facts.length, facts.bytes).await
    }

    /// Checks whether the name is one of a session.
    fn name(&mut self, key: &[u8]) {
        let id = &key[self.report.key_prefix.len()..];
        if id.contains(&b'{') || id.contains(&b'}') {
            self.report.brace_keys += 1;
            let reason = "a session id must not contain `{` or `}`".to_owned();
            self.find("braces", key, None, reason);
            return;
        }
        let Ok(id) = std::str::from_utf8(id) else {
            self.report.invalid_id_keys += 1;
            let reason = "a session id must be UTF-8".to_owned();
            self.find("invalid_id", key, None, reason);
            return;
        };
        if let Err(violation) = SessionId::parse(id) {
            self.report.invalid_id_keys += 1;
            let reason = match id.len() {
                length if length > SESSION_ID_BYTES_MAX => violation.rule,
                _ => format!("a session id {}", violation.rule),
            };
            self.find("invalid_id", key, None, reason);
        }
    }

    async fn elements(
        &mut self,
        key: &[u8],
        length: i64,
        bytes: Option<i64>,
    ) -> Result<(), Failure> {
        let mut element_bytes = bytes.unwrap_or(0) / length.max(1);
        let mut is_readable = true;
        let mut first = 1;
        while first <= length {
            let count = (PIECE_BYTES / element_bytes.max(1)).clamp(1, PIECE_ELEMENTS_MAX);
            let count = count.min(length - first + 1);
            let elements = match self.inspector.elements(key, first, count).await {
                Ok(elements) => elements,
                // Somebody has put something else there meanwhile.
                Err(store::Error::WrongKeyType { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            if elements.is_empty() {
                break;
            }
            for (element, position) in elements.iter().zip(first..) {
                self.report.messages += 1;
                if let Err(reason) = rules::check(element) {
                    is_readable = false;
                    self.report.unreadable_messages += 1;
                    self.find("unreadable", key, Some(position), reason);
                }
                if element.len() > ELEMENT_BYTES_MAX {
                    self.report.too_large_messages += 1;
                    let reason = format!(
                        "has {} bytes; chat-memory hands out at most {ELEMENT_BYTES_MAX}",
                        element.len()
                    );
                    self.find("too_large", key, Some(position), reason);
                }
            }
            let sum: usize = elements.iter().map(Vec::len).sum();
            element_bytes = (sum / elements.len()) as i64;
            first += elements.len() as i64;
            let (sessions, messages) = (self.report.sessions, self.report.messages);
            self.progress.show(None, || {
                format!("looked at {sessions} sessions, {messages} messages")
            });
        }
        self.report.unreadable_sessions += u64::from(!is_readable);
        Ok(())
    }

    fn find(&mut self, kind: &'static str, key: &[u8], position: Option<i64>, reason: String) {
        if self.report.findings.len() == FINDINGS_MAX {
            self.report.findings_omitted += 1;
            return;
        }
        self.report.findings.push(Finding {
            kind,
            key: String::from_utf8_lossy(key).into_owned(),
            position,
            reason,
        });
    }
}

impl Report {
    fn is_well(&self) -> bool {
        self.findings.is_empty()
    }

    /// The report for people.
    fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{name:<44} {value}");
        };
        row("Redis", self.redis.clone());
        row("Prefix of keys", format!("{:?}", self.key_prefix));
        row("Sessions", self.sessions.to_string());
        row("Messages", self.messages.to_string());
        row(
            "Messages that LangChain cannot read",
            self.unreadable_messages.to_string(),
        );
        row(
            "Sessions that LangChain cannot read for that",
            self.unreadable_sessions.to_string(),
        );
        row(
            "Messages too large to hand out",
            self.too_large_messages.to_string(),
        );
        row("Keys of another type", self.wrong_type_keys.to_string());
        row("Keys with braces", self.brace_keys.to_string());
        row(
            "Keys whose id breaks another rule",
            self.invalid_id_keys.to_string(),
        );
        row("Memory", self.memory());
        row("Sessions that expire", self.expiry());

        for finding in self.findings.iter().take(FINDINGS_SHOWN_MAX) {
            let key = finding.key.escape_debug();
            let place = finding
                .position
                .map_or_else(String::new, |position| format!(", message {position}"));
            let _ = write!(
                text,
                "\n{}: \"{key}\"{place}: {}",
                finding.kind, finding.reason
            );
        }
        let shown = self.findings.len().min(FINDINGS_SHOWN_MAX);
        let more = (self.findings.len() - shown) as u64 + self.findings_omitted;
        if more > 0 {
            let _ = write!(
                text,
                "\n… and {more} more; --json names up to {FINDINGS_MAX}"
            );
        }
        text.push_str(if self.is_well() {
            "\nAll is well.\n"
        } else {
            "\n"
        });
        text
    }

    fn memory(&self) -> String {
        if self.memory_unknown_sessions == self.sessions && self.sessions > 0 {
            return "unknown: this user may not ask for it".to_owned();
        }
        let mib = self.memory_bytes_estimate as f64 / f64::from(1 << 20);
        format!("about {mib:.1} MiB (Redis estimates it from a few messages of each)")
    }

    fn expiry(&self) -> String {
        match (self.expires_in_seconds_min, self.expires_in_seconds_max) {
            (Some(min), Some(max)) => {
                format!("{}, in {min} to {max} s", self.expiring_sessions)
            }
            _ => "none".to_owned(),
        }
    }
}
