//! `chat-memory import`: sessions from lines into a store. What a session holds already is compared
//! with the lines, and only what is missing is appended; so an import can be repeated, and goes on
//! after an interruption. Holds one page of one session and one batch at a time.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader},
    process::ExitCode,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{
    Failure,
    lines::{self, Facts, Line, VERSION, read_line},
    open, patiently,
    progress::Progress,
};
use crate::{
    config::ImportArgs,
    message::{
        BATCH_BYTES_MAX, BATCH_MESSAGES_MAX, PAGE_BYTES_MAX, PAGE_MESSAGES_MAX, SessionId, now_ms,
    },
    store::{
        self, Append, Body, ELEMENT_BYTES_MAX, Element, Epoch, Order, Read, RequestKey, Sequence,
        Store,
        sessions::{Look, TTL_MS_MAX, Update},
    },
};

/// Runs the command.
pub async fn run(args: &ImportArgs) -> Result<ExitCode, Failure> {
    let settings = args.store.check()?;
    let (input, whole): (Box<dyn BufRead + Send>, _) = match &args.input {
        None => (Box::new(BufReader::new(io::stdin())), None),
        Some(path) => {
            let named = |error: io::Error| {
                Failure::Refused(format!("cannot read {}: {error}", path.display()))
            };
            let file = File::open(path).map_err(named)?;
            let whole = file.metadata().map_err(named)?.len();
            (Box::new(BufReader::new(file)), Some(whole))
        }
    };
    let store = open(&settings, false).await?;
    let import = Import {
        store: &*store,
        current: Current::None,
        counts: Counts::default(),
        progress: Progress::new(),
    };
    import.run(input, whole).await
}

/// What was done.
#[derive(Debug, Default)]
struct Counts {
    sessions: u64,
    added: u64,
    present: u64,
    refused: u64,
    expired: u64,
}

/// The session that the lines are of.
enum Current {
    None,
    /// Its lines are passed over: it was refused, or has expired.
    Skipped {
        id: String,
        elements: u64,
    },
    Taken(Box<Target>),
}

struct Import<'a> {
    store: &'a dyn Store,
    current: Current,
    counts: Counts,
    progress: Progress,
}

impl Import<'_> {
    async fn run(
        mut self,
        mut input: Box<dyn BufRead + Send>,
        whole: Option<u64>,
    ) -> Result<ExitCode, Failure> {
        let mut line = Vec::new();
        let (mut number, mut bytes) = (0, 0);
        let mut is_complete = false;
        loop {
            read_line(&mut input, &mut line).map_err(Failure::Input)?;
            // A line without its end was cut off; an export ends with a whole one.
            if !line.ends_with(b"\n") {
                break;
            }
            number += 1;
            bytes += line.len() as u64;
            let malformed = |reason: String| Failure::Malformed {
                line: number,
                reason,
            };
            let parsed = Line::parse(&line).map_err(malformed)?;
            if number == 1 && !matches!(parsed, Line::ChatMemoryExport(_)) {
                return Err(malformed("is not the first line of an export".to_owned()));
            }
            is_complete = matches!(parsed, Line::Complete(_));
            self.take(parsed, &malformed).await?;
            let Counts {
                sessions, added, ..
            } = self.counts;
            self.progress.show(whole.map(|whole| (bytes, whole)), || {
                format!("imported {sessions} sessions, added {added} messages")
            });
        }
        if bytes == 0 && line.is_empty() {
            return Err(Failure::Refused("the input is empty".to_owned()));
        }
        // The export was interrupted in this session: what there is of it counts.
        self.end(None).await?;
        self.finish(is_complete)
    }

    async fn take(
        &mut self,
        line: Line<'_>,
        malformed: &(dyn Fn(String) -> Failure + Sync),
    ) -> Result<(), Failure> {
        match line {
            Line::ChatMemoryExport(header) if header.version != VERSION => {
                let version = header.version;
                let reason = format!("has the version {version}; this program knows {VERSION}");
                Err(malformed(reason))
            }
            Line::ChatMemoryExport(_) | Line::Checkpoint { .. } | Line::Complete(_) => {
                // Only an export that went on after an interruption begins a session anew.
                self.end(None).await
            }
            Line::Session { id, facts } => {
                self.end(None).await?;
                let session = SessionId::parse(id).map_err(|v| malformed(v.to_string()))?;
                if !(0..=TTL_MS_MAX).contains(&facts.ttl_ms.unwrap_or(0)) {
                    return Err(malformed(
                        "has a ttl_ms that no session can have".to_owned(),
                    ));
                }
                self.begin(session, facts);
                Ok(())
            }
            Line::Text(text) => {
                let element = Bytes::from(text.into_owned());
                self.element(element, malformed).await
            }
            Line::Base64(text) => {
                let element = lines::decode(&text).map_err(malformed)?;
                self.element(Bytes::from(element), malformed).await
            }
            Line::End { id, elements } => {
                let (found, count) = match &self.current {
                    Current::None => ("", 0),
                    Current::Skipped { id, elements } => (id.as_str(), *elements),
                    Current::Taken(target) => (target.session.as_str(), target.elements),
                };
                if (found, count) != (id.as_str(), elements) {
                    return Err(malformed("ends a session that it does not fit".to_owned()));
                }
                self.end(Some(())).await
            }
        }
    }

    fn begin(&mut self, session: SessionId, facts: Facts) {
        if facts.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms()) {
            self.counts.expired += 1;
            self.current = Current::Skipped {
                id: session.to_string(),
                elements: 0,
            };
            return;
        }
        self.current = Current::Taken(Box::new(Target {
            session,
            facts,
            elements: 0,
            present: 0,
            added: 0,
            held: VecDeque::new(),
            after: 0,
            has_more: true,
            epoch: None,
            last: 0,
            batch: Vec::new(),
            batch_bytes: 0,
        }));
    }

    async fn element(
        &mut self,
        element: Bytes,
        malformed: &(dyn Fn(String) -> Failure + Sync),
    ) -> Result<(), Failure> {
        let target = match &mut self.current {
            Current::None => return Err(malformed("belongs to no session".to_owned())),
            Current::Skipped { elements, .. } => {
                *elements += 1;
                return Ok(());
            }
            Current::Taken(target) => target,
        };
        target.elements += 1;
        let taken = target.take(self.store, element).await;
        self.judge(taken)
    }

    /// Ends the session, if there is one; `whole` if all its lines were there.
    async fn end(&mut self, whole: Option<()>) -> Result<(), Failure> {
        if let Current::Taken(target) = &mut self.current {
            let ended = target.end(self.store, whole.is_some()).await;
            self.judge(ended)?;
        }
        if let Current::Taken(target) = std::mem::replace(&mut self.current, Current::None) {
            self.counts.sessions += 1;
            self.counts.present += target.present;
            self.counts.added += target.added;
        }
        Ok(())
    }

    /// Passes a failure on, unless it is one of this session only: then the session is passed over.
    fn judge(&mut self, result: Result<(), Stop>) -> Result<(), Failure> {
        let reason = match result {
            Ok(()) => return Ok(()),
            Err(Stop::Differs(reason)) => reason,
            Err(Stop::Store(
                error @ (store::Error::SequenceMismatch { .. } | store::Error::Cleared),
            )) => format!("somebody else writes to it: {error}"),
            Err(Stop::Store(error)) if super::is_of_one_session(&error) => error.to_string(),
            Err(Stop::Store(error)) => return Err(error.into()),
        };
        if let Current::Taken(target) = &self.current {
            let id = target.session.to_string();
            self.counts.refused += 1;
            self.counts.present += target.present;
            self.counts.added += target.added;
            let elements = target.elements;
            self.progress
                .say(&format!("session {id:?}: refused: {reason}"));
            self.current = Current::Skipped { id, elements };
        }
        Ok(())
    }

    fn finish(mut self, is_complete: bool) -> Result<ExitCode, Failure> {
        let Counts {
            sessions,
            added,
            present,
            refused,
            expired,
        } = self.counts;
        let mut text = format!(
            "imported {sessions} sessions: {added} messages added, {present} were there already"
        );
        if expired > 0 {
            text += &format!("; {expired} sessions have expired since the export");
        }
        if refused > 0 {
            text += &format!("; {refused} sessions refused");
        }
        self.progress.say(&text);
        if !is_complete {
            self.progress
                .say("warning: the input ends before its end: the export was interrupted");
        }
        Ok(if refused == 0 && is_complete {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Why a session does not go on.
enum Stop {
    Differs(String),
    Store(store::Error),
}

impl From<store::Error> for Stop {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

/// A session of the store while its lines come.
struct Target {
    session: SessionId,
    facts: Facts,
    /// Lines of elements so far.
    elements: u64,
    /// Those that the store held already, and those that were added.
    present: u64,
    added: u64,
    /// Elements of the store that are not compared yet, and whether there are more behind them.
    held: VecDeque<Element>,
    has_more: bool,
    /// The last sequence that was read.
    after: Sequence,
    /// What the store must still be like when something is appended.
    epoch: Option<Epoch>,
    last: Sequence,
    /// What is to be appended next.
    batch: Vec<Bytes>,
    batch_bytes: usize,
}

impl Target {
    async fn take(&mut self, store: &dyn Store, element: Bytes) -> Result<(), Stop> {
        if element.len() > ELEMENT_BYTES_MAX {
            return Err(Stop::Differs(format!(
                "message {} of the input has more than {ELEMENT_BYTES_MAX} bytes",
                self.elements
            )));
        }
        if self.held.is_empty() && self.has_more {
            self.read(store).await?;
        }
        if let Some(held) = self.held.pop_front() {
            if held.body != Body::Bytes(element) {
                return Err(Stop::Differs(format!(
                    "it holds other messages than the input: the first one that differs is {}",
                    held.sequence
                )));
            }
            self.present += 1;
            return Ok(());
        }
        let is_full = self.batch.len() == BATCH_MESSAGES_MAX
            || self.batch_bytes + element.len() > BATCH_BYTES_MAX;
        if is_full {
            self.append(store).await?;
        }
        self.batch_bytes += element.len();
        self.batch.push(element);
        Ok(())
    }

    async fn end(&mut self, store: &dyn Store, is_whole: bool) -> Result<(), Stop> {
        self.append(store).await?;
        if self.held.is_empty() && self.has_more {
            self.read(store).await?;
        }
        if is_whole && self.elements > 0 {
            self.describe(store).await?;
        }
        Ok(())
    }

    /// Says of the session what the input says of it and nobody has said of it yet.
    async fn describe(&self, store: &dyn Store) -> Result<(), Stop> {
        let Facts {
            expires_at_ms,
            ttl_ms,
            title,
            metadata,
        } = &self.facts;
        if self.facts == Facts::default() {
            return Ok(());
        }
        let seen = patiently(|| store.look(&self.session, Look::default())).await?;
        // A session that has gone on since lives as its writers have it.
        let lives_on =
            self.held.is_empty() && seen.about.ttl_ms.is_none() && seen.expires_ms.is_none();
        let has_title = !seen.about.title.is_empty() || title.is_empty();
        let has_metadata = !seen.about.metadata.is_empty() || metadata.is_empty();
        let update = Update {
            title: (!has_title).then(|| title.clone()),
            metadata: (!has_metadata).then(|| metadata.clone()),
            ttl_ms: ttl_ms.filter(|_| lives_on).map(Some),
        };
        if update != Update::default() {
            patiently(|| store.update_session(&self.session, update.clone())).await?;
        }
        // With a time to live of its own, that starts now.
        if let (Some(at_ms), None) = (*expires_at_ms, ttl_ms)
            && lives_on
        {
            patiently(|| store.expire(&self.session, at_ms)).await?;
        }
        Ok(())
    }

    /// Reads the next elements that the store holds.
    async fn read(&mut self, store: &dyn Store) -> Result<(), Stop> {
        let read = Read {
            order: Order::OldestFirst,
            after: self.after,
            before: None,
            last: None,
            limit: PAGE_MESSAGES_MAX,
            bytes_max: PAGE_BYTES_MAX,
        };
        let page = patiently(|| store.read(&self.session, read)).await?;
        if self.epoch.is_some_and(|epoch| epoch != page.epoch) {
            return Err(store::Error::Cleared.into());
        }
        self.epoch = Some(page.epoch);
        self.last = page.last_sequence;
        self.has_more = page.more;
        if let Some(last) = page.elements.last() {
            self.after = last.sequence;
        }
        self.held = page.elements.into();
        Ok(())
    }

    /// Appends the batch, if the session is still as it was read.
    async fn append(&mut self, store: &dyn Store) -> Result<(), Stop> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let elements = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let append = Append {
            request: self.request(&elements),
            elements,
            time_ms: now_ms(),
            expected_last_sequence: Some(self.last),
            expected_epoch: self.epoch,
        };
        let appended = patiently(|| store.append(&self.session, append.clone())).await?;
        self.last = appended.first_sequence + appended.count as Sequence - 1;
        self.added += appended.count as u64;
        Ok(())
    }

    /// The same for the same elements at the same place: an append whose answer was lost is stored
    /// once, also by another run of the command.
    fn request(&self, elements: &[Bytes]) -> RequestKey {
        let mut body = Sha256::new();
        for element in elements {
            body.update((element.len() as u64).to_be_bytes());
            body.update(element);
        }
        let body = body.finalize();
        let epoch = self.epoch.map_or(0, |epoch| epoch.0);
        let id = format!("{epoch} {}", self.last);
        let mut id = id.into_bytes();
        id.extend_from_slice(&body);
        RequestKey::new("import", &crate::moving::hex(&id), &body)
    }
}
