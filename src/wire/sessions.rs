//! Requests on sessions as a whole, and how sessions are shown.

use std::collections::{BTreeMap, HashMap};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use prost_types::Duration;
use sha2::{Digest as _, Sha256};

use super::{Checked, at_least_one, render_element, render_message, render_time};
use crate::{
    message::{Draft, Message, SESSION_ID_BYTES_MAX, SessionId, UnixMillis, Violation, check_name},
    pb,
    sessions::{Portrait, Scene},
    store::{
        Cursor, RequestKey, Sequence,
        sessions::{About, Fork, ListRecent, RecentPage, Rewind, Seen, TTL_MS_MAX, Update},
    },
    turn::{Report, State},
    watch::Notice,
};

/// Bytes of a title at most.
const TITLE_BYTES_MAX: usize = 512;
/// Pairs of metadata at most, and bytes of their keys and values. OpenAI's conversations have the
/// same limits (<https://platform.openai.com/docs/api-reference/conversations>), in characters.
const PAIRS_MAX: usize = 16;
const KEY_BYTES_MAX: usize = 64;
const VALUE_BYTES_MAX: usize = 512;
/// Sessions of a page, if the client does not say, and at most.
const PAGE_SESSIONS_DEFAULT: usize = 50;
const PAGE_SESSIONS_MAX: usize = 1_000;
/// Bytes of a page token's check, which finds mistakes.
const CHECK_BYTES: usize = 12;

/// Takes an `UpdateSessionRequest`.
pub fn parse_update(request: pb::UpdateSessionRequest) -> Checked<(SessionId, Update)> {
    let given = request.session.unwrap_or_default();
    let session = parse_id("session.session_id", given.session_id)?;
    let paths = match request.update_mask {
        Some(mask) if !mask.paths.is_empty() => mask.paths,
        _ => {
            let set = [
                ("title", !given.title.is_empty()),
                ("metadata", !given.metadata.is_empty()),
                ("ttl", given.ttl.is_some()),
            ];
            let set = set.into_iter().filter(|(_, is_set)| *is_set);
            set.map(|(path, _)| path.to_owned()).collect()
        }
    };
    if paths.is_empty() {
        let rule = "must name what to change: title, metadata or ttl";
        return Err(Violation::new("update_mask", rule));
    }
    let mut update = Update::default();
    for path in paths {
        match path.as_str() {
            "title" => {
                check_name("session.title", &given.title, TITLE_BYTES_MAX)?;
                update.title = Some(given.title.clone());
            }
            "metadata" => {
                update.metadata = Some(parse_pairs("session.metadata", &given.metadata)?);
            }
            "ttl" => update.ttl_ms = Some(given.ttl.as_ref().map(parse_ttl).transpose()?),
            other => {
                let rule = format!("must be of title, metadata and ttl; {other:?} is not");
                return Err(Violation::new("update_mask", rule));
            }
        }
    }
    Ok((session, update))
}

fn parse_id(field: &str, id: String) -> Checked<SessionId> {
    SessionId::parse(id).map_err(|violation| Violation::new(field, violation.rule))
}

fn parse_pairs(field: &str, pairs: &HashMap<String, String>) -> Checked<BTreeMap<String, String>> {
    if pairs.len() > PAIRS_MAX {
        let rule = format!("must be at most {PAIRS_MAX} pairs, is {}", pairs.len());
        return Err(Violation::new(field, rule));
    }
    for (key, value) in pairs {
        if key.is_empty() {
            return Err(Violation::new(field, "must not have an empty key"));
        }
        check_name(field, key, KEY_BYTES_MAX)
            .map_err(|violation| Violation::new(field, format!("keys {}", violation.rule)))?;
        check_name(&format!("{field}[{key:?}]"), value, VALUE_BYTES_MAX)?;
    }
    Ok(pairs.clone().into_iter().collect())
}

fn parse_ttl(ttl: &Duration) -> Checked<i64> {
    let is_short = ttl.seconds == 0 && ttl.nanos != 0;
    if !(0..=TTL_MS_MAX / 1000).contains(&ttl.seconds)
        || !(0..1_000_000_000).contains(&ttl.nanos)
        || is_short
    {
        let rule = "must be 1 second to 10 years, or 0 to live for ever";
        return Err(Violation::new("session.ttl", rule));
    }
    Ok(ttl.seconds * 1000 + i64::from(ttl.nanos / 1_000_000))
}

/// What the page tokens of a list belong to: the pairs and the prefix that were asked for.
pub struct ListScope(BTreeMap<String, String>, String);

/// Takes a `ListSessionsRequest`.
pub fn parse_list(request: pb::ListSessionsRequest) -> Checked<(ListRecent, ListScope)> {
    check_name("id_prefix", &request.id_prefix, SESSION_ID_BYTES_MAX)?;
    let limit = match request.page_size {
        0 => PAGE_SESSIONS_DEFAULT,
        size => at_least_one("page_size", size)?,
    };
    if limit > PAGE_SESSIONS_MAX {
        let rule = format!("must be at most {PAGE_SESSIONS_MAX}, is {limit}");
        return Err(Violation::new("page_size", rule));
    }
    let metadata = parse_pairs("metadata", &request.metadata)?;
    let scope = ListScope(metadata.clone(), request.id_prefix.clone());
    let cursor = match request.page_token.is_empty() {
        true => None,
        false => Some(scope.open_token(&request.page_token)?),
    };
    let list = ListRecent {
        prefix: request.id_prefix,
        metadata,
        cursor,
        limit,
    };
    Ok((list, scope))
}

impl ListScope {
    /// The token of the page from a cursor on.
    pub fn make_token(&self, cursor: &Cursor) -> String {
        let mut token = self.check(&cursor.0).to_vec();
        token.extend(cursor.0.as_bytes());
        URL_SAFE_NO_PAD.encode(token)
    }

    fn open_token(&self, token: &str) -> Checked<Cursor> {
        let rule = "must be the next_page_token of a page with the same id_prefix and metadata";
        let foreign = || Violation::new("page_token", rule);
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| foreign())?;
        let (check, cursor) = bytes.split_at_checked(CHECK_BYTES).ok_or_else(foreign)?;
        let cursor = std::str::from_utf8(cursor).map_err(|_| foreign())?;
        if check != self.check(cursor) {
            return Err(foreign());
        }
        Ok(Cursor(cursor.to_owned()))
    }

    fn check(&self, cursor: &str) -> [u8; CHECK_BYTES] {
        let Self(metadata, prefix) = self;
        let mut digest = Sha256::new();
        digest.update(b"chat-memory list token 1");
        let pairs = metadata.iter().flat_map(|(key, value)| [key, value]);
        for text in [prefix].into_iter().chain(pairs) {
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text);
        }
        digest.update(cursor);
        let mut check = [0; CHECK_BYTES];
        check.copy_from_slice(&digest.finalize()[..CHECK_BYTES]);
        check
    }
}

/// Takes a `RewindRequest`, its `request_id` aside, of which the key is made.
pub fn parse_rewind(
    request: pb::RewindRequest,
    key: RequestKey,
    time_ms: UnixMillis,
) -> Checked<(SessionId, Rewind)> {
    let session = SessionId::parse(request.session_id)?;
    let after = request.after_sequence;
    let after = after.ok_or_else(|| Violation::new("after_sequence", "is required"))?;
    let expected = request.expected_last_sequence;
    for (field, sequence) in [
        ("after_sequence", Some(after)),
        ("expected_last_sequence", expected),
    ] {
        if sequence.is_some_and(|sequence| sequence < 0) {
            return Err(Violation::new(field, "must be 0 or more"));
        }
    }
    let rewind = Rewind {
        after,
        request: key,
        expected_last_sequence: expected,
        time_ms,
    };
    Ok((session, rewind))
}

/// Takes a `ForkRequest`.
pub fn parse_fork(request: pb::ForkRequest) -> Checked<(SessionId, Fork)> {
    let session = SessionId::parse(request.session_id)?;
    let to = parse_id("new_session_id", request.new_session_id)?;
    if to == session {
        let rule = "must not be the session itself";
        return Err(Violation::new("new_session_id", rule));
    }
    if request.through_sequence.is_some_and(|through| through < 1) {
        return Err(Violation::new("through_sequence", "must be 1 or more"));
    }
    let fork = Fork {
        to,
        through: request.through_sequence,
    };
    Ok((session, fork))
}

/// Takes a `WatchRequest`: the session, the sequence, whether to give the bytes.
pub fn parse_watch(request: pb::WatchRequest) -> Checked<(SessionId, Sequence, bool)> {
    let session = SessionId::parse(request.session_id)?;
    if request.after_sequence < 0 {
        return Err(Violation::new("after_sequence", "must be 0 or more"));
    }
    Ok((session, request.after_sequence, request.include_raw))
}

/// Shows a session.
pub fn render_session(session: &SessionId, seen: &Seen) -> pb::Session {
    let About {
        title,
        metadata,
        ttl_ms,
        origin,
    } = seen.about.clone();
    pb::Session {
        session_id: session.to_string(),
        title,
        metadata: metadata.into_iter().collect(),
        ttl: ttl_ms.map(render_duration),
        expire_time: seen.expires_ms.map(render_time),
        message_count: seen.count,
        first_sequence: seen.first_sequence,
        last_sequence: seen.last_sequence,
        first_message_time: None,
        last_message_time: None,
        active_time: seen.active_ms.map(render_time),
        turn: seen
            .turn
            .as_ref()
            .map(|turn| render_turn(&Report::of(turn))),
        origin: origin.map(|origin| pb::Origin {
            session_id: origin.session.to_string(),
            sequence: origin.sequence,
        }),
    }
}

/// Shows a page of sessions.
pub fn render_list(page: &RecentPage, scope: &ListScope) -> pb::ListSessionsResponse {
    let sessions = page.sessions.iter();
    let next = page.next.as_ref();
    pb::ListSessionsResponse {
        sessions: sessions
            .map(|(session, seen)| render_session(session, seen))
            .collect(),
        next_page_token: next.map_or_else(String::new, |next| scope.make_token(next)),
    }
}

/// Shows all there is to know of a session.
pub fn render_portrait(session: &SessionId, portrait: &Portrait) -> pb::Session {
    pb::Session {
        first_message_time: portrait.first_time_ms.map(render_time),
        last_message_time: portrait.last_time_ms.map(render_time),
        turn: portrait.turn.as_ref().map(render_scene),
        ..render_session(session, &portrait.seen)
    }
}

fn render_duration(ms: i64) -> Duration {
    Duration {
        seconds: ms.div_euclid(1000),
        nanos: (ms.rem_euclid(1000) * 1_000_000) as i32,
    }
}

fn render_turn(report: &Report) -> pb::Turn {
    let mut turn = pb::Turn {
        turn_id: report.name.clone(),
        attempt: i32::try_from(report.attempt).unwrap_or(i32::MAX),
        ..Default::default()
    };
    let state = match &report.state {
        State::Running => pb::TurnState::Running,
        State::Completed { first_sequence } => {
            turn.first_sequence = *first_sequence;
            pb::TurnState::Completed
        }
        State::Failed { reason, message } => {
            turn.reason = reason.clone();
            turn.error = message.clone();
            pb::TurnState::Failed
        }
    };
    turn.set_state(state);
    turn
}

fn render_scene(scene: &Scene) -> pb::Turn {
    // Not stored: without sequence and time.
    let render = |draft: &Draft| {
        let message = Message {
            draft: draft.clone(),
            create_time_ms: None,
            interrupted: false,
            turn_id: None,
        };
        render_message(0, message)
    };
    pb::Turn {
        question: scene.question.iter().map(render).collect(),
        partial_answer: scene.said.as_ref().map(render),
        ..render_turn(&scene.report)
    }
}

/// Shows what a watcher is told.
pub fn render_notice(notice: Notice, include_raw: bool) -> pb::WatchResponse {
    use pb::watch_response::Event;
    let event = match notice {
        Notice::Message(element) => Event::Message(render_element(element, include_raw)),
        Notice::Live { last_sequence } => Event::Live(pb::Live { last_sequence }),
        Notice::Turn(report) => Event::Turn(render_turn(&report)),
        Notice::Rewound { last_sequence } => Event::Rewound(pb::Rewound { last_sequence }),
        Notice::Cleared => Event::Cleared(pb::Cleared {}),
        Notice::Skipped { first_sequence } => Event::Skipped(pb::Skipped { first_sequence }),
    };
    pb::WatchResponse { event: Some(event) }
}
