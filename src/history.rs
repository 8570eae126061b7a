//! Reads as much of a session's end as a window needs, and the system messages at its beginning.
//! Knows neither gRPC nor models, nor which store it has.

use crate::{
    error::Error,
    langchain,
    message::{Draft, Message, PAGE_BYTES_MAX, SessionId, Violation},
    store::{self, Body, Element, Order, Page, Read, Sequence, Store},
    tokens::{PRIMING, Tokenizer},
    window::{self, Bounds, Choice, Entry, Purpose, Window},
};

/// Messages at the beginning of a session that are looked at for system messages.
const LEADING_MAX: usize = 16;
/// Messages that are read at once, at least, where nobody says how many are wanted.
const READ_MIN: usize = 64;
/// And at most.
const READ_MAX: usize = 1_000;
/// Messages of a session that are looked at for one window. Each takes at least 4 tokens, so it is
/// more than models take.
pub const MESSAGES_MAX: usize = 10_000;
/// And their stored bytes. Models take far less, but for images.
pub const BYTES_MAX: usize = 16 << 20;
/// Bytes that a token may stand for when it is estimated how much to read. Text takes 4 or 5, and
/// the JSON around it about as much.
const BYTES_PER_TOKEN: usize = 16;
/// Bytes that are read at once, at least.
const READ_BYTES_MIN: usize = 64 << 10;

/// Which window to read.
pub struct Wanted<'a> {
    /// Only messages with a smaller sequence.
    pub before: Option<Sequence>,
    pub bounds: Asked,
    /// Counts the tokens; nobody does if it is `None`.
    pub tokenizer: Option<Tokenizer>,
    /// What is sent to the model besides the history.
    pub besides: Vec<Draft>,
    pub purpose: Purpose<'a>,
    /// What was read of the end of the session already, as [`first_read`] says.
    pub newest: Option<Page>,
    /// What the window's messages may take together, as `weigh` says it of each. What cannot be
    /// weighed is left out.
    pub bytes_max: usize,
    pub weigh: fn(&Element, &Message) -> Option<usize>,
}

/// The bounds that a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Asked {
    pub messages: Option<usize>,
    pub turns: Option<usize>,
    pub tokens: Option<usize>,
}

/// What the window with these bounds begins with reading, where it goes up to the end of the session.
pub fn first_read(bounds: &Asked) -> Read {
    next_read(None, 0, 0, bounds)
}

/// What to read next, before this sequence and after so many messages and bytes.
fn next_read(before: Option<Sequence>, read: usize, bytes_read: usize, bounds: &Asked) -> Read {
    Read {
        order: Order::NewestFirst,
        after: 0,
        before,
        last: None,
        limit: next_limit(read, bounds),
        bytes_max: next_bytes(bytes_read, bounds),
    }
}

/// A window that was read.
#[derive(Debug)]
pub struct History {
    /// Oldest first: the session's first system messages, and the window.
    pub entries: Vec<Entry<Element>>,
    /// The tokens of these, without [`PRIMING`]; 0 if they are not counted.
    pub tokens: usize,
    /// Whether [`Wanted::bytes_max`] made it smaller.
    pub is_cut_by_bytes: bool,
}

/// Reads a window.
///
/// It costs one read for the end of the session, one for its beginning, and further reads while the
/// window may begin before what was read; each is as large as all before it together.
pub async fn read(
    store: &dyn Store,
    session: &SessionId,
    mut wanted: Wanted<'_>,
) -> Result<History, Error> {
    let counter = Counter {
        tokenizer: wanted.tokenizer,
        weigh: wanted.weigh,
    };
    // Newest first.
    let mut newest: Vec<Entry<Element>> = Vec::new();
    let mut leading: Option<Vec<Entry<Element>>> = None;
    let mut bytes_read = 0;
    let mut epoch = None;
    let tokens_besides = counter.count(wanted.besides.clone()).await?;
    loop {
        let page = match wanted.newest.take() {
            Some(page) => page,
            None => {
                let oldest = newest.last().map(|entry| entry.source.sequence);
                let before = oldest.or(wanted.before);
                let read = next_read(before, newest.len(), bytes_read, &wanted.bounds);
                store.read(session, read).await?
            }
        };
        if epoch.is_some_and(|epoch| epoch != page.epoch) {
            return Err(store::Error::Cleared.into());
        }
        epoch = Some(page.epoch);
        let is_whole = !page.more;
        bytes_read += size(&page);
        newest.extend(counter.entries(page.elements).await?);
        newest.reverse();
        let oldest_first = newest;

        let leading = match &mut leading {
            Some(leading) => leading,
            None if is_whole => leading.insert(first_system_messages(&oldest_first)),
            None => {
                let read = Read {
                    order: Order::OldestFirst,
                    after: 0,
                    before: wanted.before,
                    last: None,
                    limit: LEADING_MAX,
                    bytes_max: PAGE_BYTES_MAX,
                };
                let page = store.read(session, read).await?;
                if epoch != Some(page.epoch) {
                    return Err(store::Error::Cleared.into());
                }
                let first = counter.entries(page.elements).await?;
                leading.insert(first_system_messages(&first))
            }
        };
        let sum = |of: fn(&Entry<Element>) -> usize| leading.iter().map(of).sum::<usize>();
        let (leading_tokens, leading_bytes) = (sum(|entry| entry.tokens), sum(|entry| entry.bytes));
        let bounds = Bounds {
            turns: wanted.bounds.turns,
            messages: wanted.bounds.messages,
            tokens: wanted.bounds.tokens,
            tokens_besides: PRIMING + tokens_besides + leading_tokens,
            bytes: wanted.bytes_max.saturating_sub(leading_bytes),
        };
        let is_last = oldest_first.len() >= MESSAGES_MAX || bytes_read >= BYTES_MAX;
        let choice = window::choose(&oldest_first, is_whole, &bounds, wanted.purpose);
        if let Choice::Unclear(_) = choice
            && !is_last
        {
            newest = oldest_first;
            newest.reverse();
            continue;
        }
        if let Purpose::Asking(new) = wanted.purpose {
            window::check_results(&oldest_first, new)?;
        }
        let limit = wanted.bytes_max;
        let window = match choice {
            Choice::Window(window) => window,
            Choice::Unclear(Some(window)) => Window {
                is_cut_by_bytes: bytes_read >= BYTES_MAX,
                ..window
            },
            Choice::Unclear(None) | Choice::TooManyBytes => {
                return Err(Error::HistoryTooLarge { limit });
            }
            Choice::TooManyTokens(needed) => {
                let max_tokens = wanted.bounds.tokens.unwrap_or_default();
                return Err(Error::WindowTooSmall { needed, max_tokens });
            }
        };
        let mut entries = std::mem::take(leading);
        let mut places = window.places.iter().peekable();
        for (place, entry) in oldest_first.into_iter().enumerate() {
            if places.next_if_eq(&&place).is_some() {
                entries.push(entry);
            }
        }
        return Ok(History {
            entries,
            tokens: leading_tokens + window.tokens,
            is_cut_by_bytes: window.is_cut_by_bytes,
        });
    }
}

/// How many messages to read next.
fn next_limit(read: usize, bounds: &Asked) -> usize {
    let more = match (bounds.messages, bounds.turns, bounds.tokens) {
        // The last that many are wanted.
        (Some(messages), None, None) if read < messages => messages - read,
        (Some(messages), ..) if read < messages => (messages - read).min(READ_MIN.max(read)),
        _ => READ_MIN.max(read),
    };
    more.min(READ_MAX)
}

/// And how many bytes.
fn next_bytes(read: usize, bounds: &Asked) -> usize {
    let Some(tokens) = bounds.tokens else {
        return PAGE_BYTES_MAX;
    };
    let about = tokens.saturating_mul(BYTES_PER_TOKEN).max(read);
    about.clamp(READ_BYTES_MIN, PAGE_BYTES_MAX)
}

fn size(page: &Page) -> usize {
    let sizes = page.elements.iter().map(|element| match &element.body {
        Body::Bytes(bytes) => bytes.len(),
        Body::TooLarge(_) => 0,
    });
    sizes.sum()
}

/// The system messages with which a session begins.
fn first_system_messages(first: &[Entry<Element>]) -> Vec<Entry<Element>> {
    let first = first.iter().take(LEADING_MAX);
    first
        .take_while(|entry| entry.is_system() != Some(false))
        .filter(|entry| entry.is_system() == Some(true))
        .cloned()
        .collect()
}

/// Reads and counts, away from the runtime's own threads where it may take long.
#[derive(Clone, Copy)]
struct Counter {
    tokenizer: Option<Tokenizer>,
    weigh: fn(&Element, &Message) -> Option<usize>,
}

impl Counter {
    async fn entries(self, elements: Vec<Element>) -> Result<Vec<Entry<Element>>, Error> {
        let all = move || elements.into_iter().map(|e| self.entry(e)).collect();
        self.run(all).await
    }

    fn entry(self, element: Element) -> Entry<Element> {
        let message = match &element.body {
            Body::Bytes(bytes) => langchain::decode(bytes).ok(),
            Body::TooLarge(_) => None,
        };
        let weighed = message.and_then(|message| {
            let bytes = (self.weigh)(&element, &message)?;
            Some((message, bytes))
        });
        let tokenizer = self.tokenizer;
        Entry {
            tokens: match (&weighed, tokenizer) {
                (Some((message, _)), Some(tokenizer)) => tokenizer.count_message(&message.draft),
                _ => 0,
            },
            bytes: weighed.as_ref().map_or(0, |(_, bytes)| *bytes),
            message: weighed.map(|(message, _)| message),
            source: element,
        }
    }

    async fn count(self, drafts: Vec<Draft>) -> Result<usize, Error> {
        let Some(tokenizer) = self.tokenizer.filter(|_| !drafts.is_empty()) else {
            return Ok(0);
        };
        let all = move || {
            drafts
                .iter()
                .map(|draft| tokenizer.count_message(draft))
                .sum()
        };
        self.run(all).await
    }

    async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        if self.tokenizer.is_none() {
            return Ok(work());
        }
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|_| Error::Internal)
    }
}

impl Asked {
    /// Whether anything is asked for but a number of messages: then tokens are counted.
    pub fn is_counted(&self) -> bool {
        self.turns.is_some() || self.tokens.is_some()
    }

    /// Checks the bounds of a request.
    pub fn parse(
        last_messages: Option<i32>,
        last_turns: Option<i32>,
        max_tokens: Option<i32>,
        messages_max: usize,
    ) -> Result<Self, Violation> {
        let bound = |field: &str, value: Option<i32>, max: usize| {
            let Some(value) = value else { return Ok(None) };
            match usize::try_from(value) {
                Ok(value) if (1..=max).contains(&value) => Ok(Some(value)),
                _ => Err(Violation::new(field, format!("must be 1 to {max}"))),
            }
        };
        Ok(Self {
            messages: bound("last_messages", last_messages, messages_max)?,
            turns: bound("last_turns", last_turns, TURNS_MAX)?,
            tokens: bound("max_tokens", max_tokens, TOKENS_MAX)?,
        })
    }
}

/// Turns that a client may ask for.
const TURNS_MAX: usize = 1_000;
/// Tokens that a client may ask for: twice what the models of today take.
const TOKENS_MAX: usize = 2_000_000;
