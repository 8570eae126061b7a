//! `chat-memory export`: sessions out of a store, as lines. Holds one page of one session at a time.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Seek as _, SeekFrom, Write},
    path::Path,
    process::ExitCode,
};

use super::{
    Failure,
    lines::{Facts, Header, Line, Totals, VERSION, read_line},
    open, patiently,
    progress::Progress,
};
use crate::{
    config::{ExportArgs, Problems},
    message::{PAGE_BYTES_MAX, PAGE_MESSAGES_MAX, SessionId},
    store::{Body, Cursor, List, Order, Read, Store, sessions::Look},
};

/// Names that one step of the listing looks at: what is done again after an interruption.
const LIST_NAMES_MAX: usize = 200;

/// Runs the command.
pub async fn run(args: &ExportArgs) -> Result<ExitCode, Failure> {
    let session = parse_session(args.session.as_deref())?;
    let settings = args.store.check()?;
    let store = open(&settings, true).await?;
    let header = Header {
        version: VERSION,
        store: store.describe(),
        key_prefix: settings.1,
        session: args.session.clone(),
        prefix: args.session_prefix.clone().unwrap_or_default(),
    };
    let (out, cursor, totals) = match &args.output {
        None => (Output::stdout(), None, Totals::default()),
        Some(path) => Output::file(path, &header)?,
    };
    let mut export = Export {
        store: &*store,
        out,
        totals,
        problems: 0,
        progress: Progress::new(),
    };
    if cursor.is_none() {
        export.write(&Line::ChatMemoryExport(header.clone()))?;
    }
    match &session {
        Some(session) => {
            if !export.session(session).await? {
                let reason = format!("there is no session {:?}", session.as_str());
                return Err(Failure::Refused(reason));
            }
        }
        None => export.all(&header.prefix, cursor).await?,
    }
    export.finish()
}

fn parse_session(id: Option<&str>) -> Result<Option<SessionId>, Failure> {
    let parsed = id.map(SessionId::parse).transpose();
    parsed.map_err(|violation| {
        Failure::Settings(Problems(vec![format!("--session: {}", violation.rule)]))
    })
}

struct Export<'a> {
    store: &'a dyn Store,
    out: Output,
    totals: Totals,
    /// Sessions that are not in the output as a whole.
    problems: u64,
    progress: Progress,
}

impl Export<'_> {
    async fn all(&mut self, prefix: &str, mut cursor: Option<Cursor>) -> Result<(), Failure> {
        loop {
            let list = List {
                prefix: prefix.to_owned(),
                cursor,
                limit: LIST_NAMES_MAX,
            };
            let page = patiently(|| self.store.sessions(list.clone())).await?;
            if page.unusable > 0 {
                self.problem(&format!(
                    "{} lists have names that no session can have: not exported",
                    page.unusable
                ));
            }
            for session in &page.sessions {
                self.session(session).await?;
            }
            cursor = page.next;
            let Some(next) = &cursor else {
                return Ok(());
            };
            self.write(&Line::Checkpoint {
                cursor: next.0.clone(),
                totals: self.totals,
            })?;
        }
    }

    /// Writes a session as far as it goes now; false if there is nothing of it.
    async fn session(&mut self, session: &SessionId) -> Result<bool, Failure> {
        let facts = self.facts(session).await?;
        let mut read = Read {
            order: Order::OldestFirst,
            after: 0,
            before: None,
            last: None,
            limit: PAGE_MESSAGES_MAX,
            bytes_max: PAGE_BYTES_MAX,
        };
        let id = session.to_string();
        let mut elements = 0;
        let mut epoch = None;
        loop {
            let page = match patiently(|| self.store.read(session, read)).await {
                Ok(page) => page,
                Err(error) if super::is_of_one_session(&error) => {
                    self.problem(&format!("session {id:?}: {error}"));
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if epoch.is_none() && page.elements.is_empty() {
                return Ok(false);
            }
            if epoch.is_none() {
                // What is added from now on is not waited for.
                read.before = Some(page.last_sequence + 1);
                epoch = Some(page.epoch);
                let id = id.clone();
                let facts = facts.clone();
                self.write(&Line::Session { id, facts })?;
            } else if epoch != Some(page.epoch) {
                self.problem(&format!("session {id:?}: was cleared meanwhile"));
                break;
            }

            let mut is_broken = false;
            for element in &page.elements {
                match &element.body {
                    Body::Bytes(bytes) => self.write(&Line::of_element(bytes))?,
                    Body::TooLarge(size) => {
                        self.problem(&format!(
                            "session {id:?}: message {} has {size} bytes, more than can be moved: \
                             exported up to it",
                            element.sequence
                        ));
                        is_broken = true;
                        break;
                    }
                }
                elements += 1;
                self.totals.elements += 1;
                read.after = element.sequence;
            }
            let Totals { sessions, elements } = self.totals;
            self.progress.show(None, || {
                format!("exported {sessions} sessions, {elements} messages")
            });
            if is_broken || !page.more {
                break;
            }
        }
        if epoch.is_some() {
            self.totals.sessions += 1;
            self.write(&Line::End { id, elements })?;
        }
        Ok(true)
    }

    /// What is kept of a session besides its elements; nothing, and a problem, if that cannot be read.
    async fn facts(&mut self, session: &SessionId) -> Result<Facts, Failure> {
        match patiently(|| self.store.look(session, Look::default())).await {
            Ok(seen) => Ok(Facts {
                expires_at_ms: seen.expires_ms,
                ttl_ms: seen.about.ttl_ms,
                title: seen.about.title,
                metadata: seen.about.metadata,
            }),
            Err(error) if super::is_of_one_session(&error) => {
                self.problem(&format!(
                    "session {:?}: its expiry, title and metadata are not exported: {error}",
                    session.as_str()
                ));
                Ok(Facts::default())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self, line: &Line<'_>) -> Result<(), Failure> {
        line.write(&mut self.out).map_err(Failure::Output)
    }

    fn problem(&mut self, text: &str) {
        self.problems += 1;
        self.progress.say(&format!("warning: {text}"));
    }

    fn finish(mut self) -> Result<ExitCode, Failure> {
        let Totals { sessions, elements } = self.totals;
        self.write(&Line::Complete(self.totals))?;
        self.out.finish().map_err(Failure::Output)?;
        let text = format!("exported {sessions} sessions with {elements} messages");
        self.progress.say(&text);
        Ok(if self.problems == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Where the lines go.
enum Output {
    Stdout(BufWriter<io::Stdout>),
    File(BufWriter<File>),
}

impl Output {
    fn stdout() -> Self {
        Self::Stdout(BufWriter::new(io::stdout()))
    }

    /// Opens a new file, or one that an interrupted export of the same has left: cuts it after the
    /// last checkpoint, and says where to go on.
    fn file(path: &Path, header: &Header) -> Result<(Self, Option<Cursor>, Totals), Failure> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        {
            // Chats are private.
            use std::os::unix::fs::OpenOptionsExt as _;
            options.mode(0o600);
        }
        let named = |error: io::Error| {
            Failure::Refused(format!("cannot write {}: {error}", path.display()))
        };
        let mut file = options.open(path).map_err(named)?;
        if file.try_lock().is_err() {
            let reason = format!("another export writes {}", path.display());
            return Err(Failure::Refused(reason));
        }
        let (length, cursor, totals) = match resume(&file, header).map_err(named)? {
            Found::Nothing => (0, None, Totals::default()),
            Found::Checkpoint(length, cursor, totals) => (length, Some(cursor), totals),
            Found::Other(what) => {
                return Err(Failure::Refused(format!(
                    "{} {what}: name another file, or remove it",
                    path.display()
                )));
            }
        };
        file.set_len(length).map_err(named)?;
        file.seek(SeekFrom::End(0)).map_err(named)?;
        Ok((Self::File(BufWriter::new(file)), cursor, totals))
    }

    /// Leaves nothing behind in memory; a file is then on the disk.
    fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        match self {
            Self::Stdout(_) => Ok(()),
            Self::File(file) => file.get_ref().sync_all(),
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(out) => out.write(bytes),
            Self::File(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(out) => out.flush(),
            Self::File(out) => out.flush(),
        }
    }
}

/// What a file holds already.
enum Found {
    /// Nothing, or an export that has not come to its first checkpoint.
    Nothing,
    /// So many bytes up to the last checkpoint.
    Checkpoint(u64, Cursor, Totals),
    /// Something that must not be written over.
    Other(&'static str),
}

fn resume(file: &File, header: &Header) -> io::Result<Found> {
    let mut input = BufReader::new(file);
    let mut line = Vec::new();
    read_line(&mut input, &mut line)?;
    if line.is_empty() {
        return Ok(Found::Nothing);
    }
    match Line::parse(&line) {
        Ok(Line::ChatMemoryExport(found)) if found == *header => {}
        Ok(Line::ChatMemoryExport(_)) => return Ok(Found::Other("holds another export")),
        _ => return Ok(Found::Other("holds something else than an export")),
    }
    let mut found = Found::Nothing;
    let mut length = line.len() as u64;
    loop {
        read_line(&mut input, &mut line)?;
        if !line.ends_with(b"\n") {
            return Ok(found);
        }
        length += line.len() as u64;
        // The lines of elements, which are the long ones, are not parsed.
        if line.starts_with(b"{\"c") {
            match Line::parse(&line) {
                Ok(Line::Checkpoint { cursor, totals }) => {
                    found = Found::Checkpoint(length, Cursor(cursor), totals);
                }
                Ok(Line::Complete(_)) => return Ok(Found::Other("holds a whole export")),
                _ => return Ok(Found::Other("holds something else than an export")),
            }
        }
    }
}
