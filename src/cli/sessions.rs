//! `chat-memory sessions`: which sessions there are, as a table for people or as JSON lines. Holds
//! one page at a time, however many there are.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, BufWriter, IsTerminal as _, Write},
    process::ExitCode,
};

use prost_types::Timestamp;
use serde::Serialize;
use serde_json::Value;
use terminal_size::{Width, terminal_size_of};
use tonic::transport::Channel;
use unicode_width::UnicodeWidthStr as _;

use super::{
    Error,
    args::{ColorArgs, SessionsArgs},
    client, exit_code,
    history::{self, JsonMessage, enum_value},
    text::{self, Style},
};
use crate::{
    message::now_ms,
    pb::{ListSessionsRequest, Session, Turn, TurnState, chat_memory_client::ChatMemoryClient},
};

/// Sessions of a page at most: what the API allows.
const PAGE_SESSIONS_MAX: u32 = 1_000;
/// Columns that a title keeps on the narrowest terminal: enough to tell it from others.
const TITLE_WIDTH_MIN: usize = 12;
const HEADER: [&str; COLUMNS] = ["SESSION", "TITLE", "MESSAGES", "ACTIVE", "EXPIRES"];
const COLUMNS: usize = 5;
const TITLE: usize = 1;
const MESSAGES: usize = 2;
/// What stands between two columns.
const GAP: &str = "  ";

/// How a table is to look.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub style: Style,
    /// Columns of the terminal; nothing is cut where there is none.
    pub width: Option<usize>,
    /// What "3 min ago" counts from, in milliseconds.
    pub now_ms: i64,
}

impl Look {
    /// As it suits stdout.
    pub(super) fn of_stdout(color: &ColorArgs) -> Self {
        let stdout = io::stdout();
        let is_terminal = stdout.is_terminal();
        let size = terminal_size_of(&stdout).filter(|_| is_terminal);
        Self {
            style: Style {
                color: color.allowed() && is_terminal,
            },
            width: size.map(|(Width(width), _)| usize::from(width)),
            now_ms: now_ms(),
        }
    }
}

/// Lists sessions on stdout.
pub async fn run(args: SessionsArgs) -> ExitCode {
    let look = Look::of_stdout(&args.color);
    let out = BufWriter::new(io::stdout());
    let listed = print(&args, look, out, &mut io::stderr()).await;
    exit_code(listed.map(|()| ExitCode::SUCCESS))
}

/// Lists sessions on `out`, page by page; what there is to say about the list goes to `errors`.
pub async fn print(
    args: &SessionsArgs,
    look: Look,
    mut out: impl Write,
    errors: &mut impl Write,
) -> Result<(), Error> {
    let mut client = client::connect_api(&args.target.target).await?;
    let mut request = ListSessionsRequest {
        id_prefix: args.prefix.clone(),
        metadata: pairs(&args.metadata),
        ..ListSessionsRequest::default()
    };
    let mut table = Table::new(look);
    let mut left = if args.all { u32::MAX } else { args.limit };
    let mut is_empty = true;
    loop {
        request.page_size = left.min(PAGE_SESSIONS_MAX) as i32;
        let (sessions, next) = page(&mut client, &request).await?;
        is_empty &= sessions.is_empty();
        if args.json {
            for session in &sessions {
                write_json(&mut out, session)?;
            }
        } else {
            table.write(&mut out, &sessions)?;
        }
        // Shows what there is while the next page is on its way, and notices early that the reader
        // has gone.
        out.flush()?;
        let Some(next) = next else { break };
        if !args.all {
            left = left.saturating_sub(u32::try_from(sessions.len()).unwrap_or(u32::MAX));
        }
        if left == 0 {
            writeln!(
                errors,
                "there may be more: --limit takes a number, --all lists all"
            )?;
            break;
        }
        request.page_token = next;
    }
    if is_empty {
        writeln!(errors, "there is no such session")?;
    }
    Ok(())
}

/// A page, and the token of the next one.
async fn page(
    client: &mut ChatMemoryClient<Channel>,
    request: &ListSessionsRequest,
) -> Result<(Vec<Session>, Option<String>), Error> {
    let answer = client.list_sessions(client::request(request.clone()));
    let page = answer.await?.into_inner();
    let next = page.next_page_token;
    if !next.is_empty() && next == request.page_token {
        return Err(Error::Contract("a page names itself as the next one"));
    }
    Ok((page.sessions, (!next.is_empty()).then_some(next)))
}

/// Pairs of metadata as the API has them. Of a key that is given twice, the last counts.
pub(super) fn pairs(given: &[(String, String)]) -> HashMap<String, String> {
    given.iter().cloned().collect()
}

/// A table that is written piece by piece.
pub(super) struct Table {
    look: Look,
    /// How wide each column is so far: a later page can need more.
    widths: [usize; COLUMNS],
    has_header: bool,
}

impl Table {
    pub(super) fn new(look: Look) -> Self {
        Self {
            look,
            widths: HEADER.map(str::len),
            has_header: false,
        }
    }

    pub(super) fn write(&mut self, out: &mut impl Write, sessions: &[Session]) -> io::Result<()> {
        if sessions.is_empty() {
            return Ok(());
        }
        let rows: Vec<[String; COLUMNS]> =
            sessions.iter().map(|session| self.row(session)).collect();
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.width());
            }
        }
        self.fit();
        if !self.has_header {
            self.has_header = true;
            let header = self.line(&HEADER.map(str::to_owned));
            writeln!(out, "{}", self.look.style.bold(header))?;
        }
        for row in &rows {
            writeln!(out, "{}", self.line(row))?;
        }
        Ok(())
    }

    /// Makes titles as narrow as the terminal asks for. Ids are left whole: who reads one wants to
    /// use it.
    fn fit(&mut self) {
        let Some(width) = self.look.width else { return };
        let total: usize = self.widths.iter().sum::<usize>() + GAP.len() * (COLUMNS - 1);
        let too_wide = total.saturating_sub(width);
        let narrowed = self.widths[TITLE].saturating_sub(too_wide);
        self.widths[TITLE] = self.widths[TITLE].min(narrowed.max(TITLE_WIDTH_MIN));
    }

    fn row(&self, session: &Session) -> [String; COLUMNS] {
        let now_ms = self.look.now_ms;
        [
            text::one_line(&session.session_id).into_owned(),
            text::one_line(&session.title).into_owned(),
            session.message_count.to_string(),
            session
                .active_time
                .as_ref()
                .map_or_else(String::new, |time| past(time, now_ms)),
            match &session.expire_time {
                Some(time) => future(time, now_ms),
                None => "never".to_owned(),
            },
        ]
    }

    fn line(&self, row: &[String; COLUMNS]) -> String {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(self.widths).enumerate() {
            let cell = match index {
                TITLE => text::cut(cell, width),
                _ => cell.into(),
            };
            let padding = " ".repeat(width.saturating_sub(cell.width()));
            match index {
                MESSAGES => line += &format!("{padding}{cell}"),
                _ => line += &format!("{cell}{padding}"),
            }
            line += GAP;
        }
        line.trim_end().to_owned()
    }
}

/// "3 min ago".
fn past(time: &Timestamp, now_ms: i64) -> String {
    match amount(now_ms / 1000 - time.seconds) {
        // Clocks differ: what seems to come has just been.
        None => "just now".to_owned(),
        Some(amount) => format!("{amount} ago"),
    }
}

/// "in 3 days".
fn future(time: &Timestamp, now_ms: i64) -> String {
    match amount(time.seconds - now_ms / 1000) {
        None => "now".to_owned(),
        Some(amount) => format!("in {amount}"),
    }
}

/// Seconds in the largest unit that fits; nothing for none.
fn amount(seconds: i64) -> Option<String> {
    const UNITS: [(i64, &str); 4] = [(24 * 3_600, "day"), (3_600, "h"), (60, "min"), (1, "s")];
    let (size, unit) = UNITS.into_iter().find(|(size, _)| seconds >= *size)?;
    let count = seconds / size;
    let plural = if unit == "day" && count > 1 { "s" } else { "" };
    Some(format!("{count} {unit}{plural}"))
}

/// A session in the API's JSON form, with all fields, under the names of the proto and in its
/// order. Programs rely on it.
#[derive(Debug, Serialize)]
struct JsonSession<'a> {
    session_id: &'a str,
    title: &'a str,
    metadata: BTreeMap<&'a str, &'a str>,
    ttl: Option<String>,
    expire_time: Option<String>,
    message_count: i64,
    first_sequence: i64,
    last_sequence: i64,
    first_message_time: Option<String>,
    last_message_time: Option<String>,
    active_time: Option<String>,
    turn: Option<JsonTurn<'a>>,
    origin: Option<JsonOrigin<'a>>,
}

/// A turn in the same form.
#[derive(Debug, Serialize)]
pub(super) struct JsonTurn<'a> {
    turn_id: &'a str,
    state: Value,
    attempt: i32,
    reason: &'a str,
    error: &'a str,
    first_sequence: i64,
    question: Vec<JsonMessage<'a>>,
    partial_answer: Option<JsonMessage<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonOrigin<'a> {
    session_id: &'a str,
    sequence: i64,
}

impl<'a> From<&'a Turn> for JsonTurn<'a> {
    fn from(turn: &'a Turn) -> Self {
        Self {
            turn_id: &turn.turn_id,
            state: enum_value(turn.state, TurnState::as_str_name),
            attempt: turn.attempt,
            reason: &turn.reason,
            error: &turn.error,
            first_sequence: turn.first_sequence,
            question: turn.question.iter().map(JsonMessage::from).collect(),
            partial_answer: turn.partial_answer.as_ref().map(JsonMessage::from),
        }
    }
}

/// Writes a session as one line of JSON.
fn write_json(out: &mut impl Write, session: &Session) -> io::Result<()> {
    let time = |time: &Option<Timestamp>| time.as_ref().map(Timestamp::to_string);
    let metadata = session.metadata.iter();
    let json = JsonSession {
        session_id: &session.session_id,
        title: &session.title,
        metadata: metadata.map(|(key, value)| (&**key, &**value)).collect(),
        ttl: session.ttl.as_ref().map(prost_types::Duration::to_string),
        expire_time: time(&session.expire_time),
        message_count: session.message_count,
        first_sequence: session.first_sequence,
        last_sequence: session.last_sequence,
        first_message_time: time(&session.first_message_time),
        last_message_time: time(&session.last_message_time),
        active_time: time(&session.active_time),
        turn: session.turn.as_ref().map(JsonTurn::from),
        origin: session.origin.as_ref().map(|origin| JsonOrigin {
            session_id: &origin.session_id,
            sequence: origin.sequence,
        }),
    };
    history::write_line(out, &json)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_763_910_000_000;

    fn at(seconds_ago: i64) -> Option<Timestamp> {
        Some(Timestamp {
            seconds: NOW_MS / 1000 - seconds_ago,
            nanos: 0,
        })
    }

    fn table(width: Option<usize>, pages: &[Vec<Session>]) -> String {
        let look = Look {
            style: Style::PLAIN,
            width,
            now_ms: NOW_MS,
        };
        let mut out = Vec::new();
        let mut table = Table::new(look);
        for page in pages {
            table.write(&mut out, page).unwrap();
        }
        String::from_utf8(out).unwrap()
    }

    fn session(id: &str, title: &str) -> Session {
        Session {
            session_id: id.into(),
            title: title.into(),
            message_count: 12,
            active_time: at(200),
            expire_time: at(-3 * 24 * 3_600),
            ..Session::default()
        }
    }

    #[test]
    fn a_table_is_as_wide_as_its_contents_where_there_is_no_terminal() {
        let long = "x".repeat(200);
        let printed = table(None, &[vec![session("a", &long), session("größe", "会話")]]);
        let lines: Vec<&str> = printed.lines().collect();
        assert!(lines[0].starts_with("SESSION  TITLE   "), "{printed}");
        assert!(lines[1].contains(&long), "{printed}");
        let columns = lines.iter().skip(1).map(|line| {
            let end = line.find("12  3 min ago  in 3 days").unwrap();
            line[..end].width()
        });
        assert_eq!(columns.collect::<Vec<_>>(), [9 + 202 + 6; 2]);
    }

    #[test]
    fn titles_are_cut_to_the_width_of_the_terminal_and_ids_are_not() {
        let id = "i".repeat(30);
        let rows = vec![session(&id, &"会話".repeat(40)), session("b", "short")];
        let printed = table(Some(80), &[rows]);
        let lines: Vec<&str> = printed.lines().collect();
        assert!(lines[1].starts_with(&format!("{id}  会話")), "{printed}");
        assert!(lines[1].contains('…'), "{printed}");
        assert!(lines.iter().all(|line| line.width() <= 80), "{printed}");
        assert!(lines[2].contains("short "), "{printed}");
    }

    #[test]
    fn a_later_page_has_the_columns_of_the_first_and_no_header() {
        let printed = table(
            None,
            &[vec![session("long-one", "t")], vec![session("b", "t")]],
        );
        let lines: Vec<&str> = printed.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1].find("12"), lines[2].find("12"), "{printed}");
    }

    #[test]
    fn times_are_told_in_the_largest_unit_that_fits() {
        for (seconds, shown) in [
            (-5, "just now"),
            (0, "just now"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (3_599, "59 min ago"),
            (7_200, "2 h ago"),
            (24 * 3_600, "1 day ago"),
            (400 * 24 * 3_600, "400 days ago"),
        ] {
            assert_eq!(past(&at(seconds).unwrap(), NOW_MS), shown);
        }
        assert_eq!(future(&at(-90).unwrap(), NOW_MS), "in 1 min");
        assert_eq!(future(&at(90).unwrap(), NOW_MS), "now");
    }

    #[test]
    fn a_session_that_lives_for_ever_and_one_never_seen_active_say_so() {
        let session = Session {
            session_id: "a".into(),
            ..Session::default()
        };
        assert!(table(None, &[vec![session]]).ends_with("0          never\n"));
    }

    #[test]
    fn no_field_of_a_session_can_command_the_terminal() {
        let evil = session("a\x1b[2J\n", "\u{9b}2J\r");
        let mut json = Vec::new();
        write_json(&mut json, &evil).unwrap();
        for text in [
            table(Some(60), &[vec![evil]]),
            String::from_utf8(json).unwrap(),
        ] {
            let control = text.chars().find(|c| c.is_control() && *c != '\n');
            assert_eq!(control, None, "{text:?}");
        }
    }

    #[test]
    fn json_has_every_field_under_its_name_in_the_proto() {
        let full = Session {
            session_id: "a".into(),
            title: "t".into(),
            metadata: HashMap::from([("k".into(), "v".into())]),
            ttl: Some(prost_types::Duration {
                seconds: 60,
                nanos: 0,
            }),
            expire_time: at(0),
            message_count: 1,
            first_sequence: 2,
            last_sequence: 3,
            first_message_time: at(0),
            last_message_time: at(0),
            active_time: at(0),
            turn: Some(Turn {
                turn_id: "t1".into(),
                state: TurnState::Failed.into(),
                attempt: 1,
                reason: "R".into(),
                error: "e".into(),
                first_sequence: 0,
                question: Vec::new(),
                partial_answer: None,
            }),
            origin: Some(crate::pb::Origin {
                session_id: "o".into(),
                sequence: 4,
            }),
        };
        let mut out = Vec::new();
        write_json(&mut out, &full).unwrap();
        let expected = concat!(
            r#"{"session_id":"a","title":"t","metadata":{"k":"v"},"ttl":"60s","#,
            r#""expire_time":"2025-11-23T15:00:00Z","message_count":1,"first_sequence":2,"#,
            r#""last_sequence":3,"first_message_time":"2025-11-23T15:00:00Z","#,
            r#""last_message_time":"2025-11-23T15:00:00Z","active_time":"2025-11-23T15:00:00Z","#,
            r#""turn":{"turn_id":"t1","state":"TURN_STATE_FAILED","attempt":1,"reason":"R","#,
            r#""error":"e","first_sequence":0,"question":[],"partial_answer":null},"#,
            r#""origin":{"session_id":"o","sequence":4}}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
