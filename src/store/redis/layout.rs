//! Which keys a session has in Redis, and the scripts that know what is in them. Does no I/O.

use redis::Script;

use super::to_lua;
use crate::message::SessionId;
use crate::store::sessions::{REWINDS_MAX, Upkeep};
use crate::store::turns::{FOLLOWED_EVERY_MS, PLACE_MS, WAITING_MAX};
use crate::store::{REQUEST_MEMORY_MS, TOMBSTONE_MS};

/// How long the facts of a session that was cleared outlive its list, in ms, and a turn that runs
/// the list's expiry: longer than any turn runs (at most an hour), so that a turn finds out that its
/// session was cleared, and is stored although the list has expired.
const LINGER_MS: i64 = 60 * 60 * 1000;

/// Elements that a write looks at, at most, to find where an exchange begins: two hundred times as
/// many as an exchange with a few tool calls has.
const TRIM_LOOKED_AT_MAX: usize = 1_000;

/// The names of what is kept beside a list.
const COMPANIONS: [&str; 4] = ["session", "requests:0", "requests:1", "turns"];

/// The keys of a session, in the order of the scripts' `KEYS`. `scripts/keys.lua` says what they
/// hold.
///
/// They share a slot of a cluster: the list's name is the others' hash tag. That is why neither a
/// prefix nor a session id may contain braces; it also keeps one session's companions from being
/// another's list.
pub(super) struct Keys {
    /// One after the other.
    text: String,
    /// Where each of them ends.
    ends: [usize; 5],
}

impl Keys {
    pub(super) fn new(prefix: &str, session: &SessionId) -> Self {
        let session = session.as_str();
        let list = prefix.len() + session.len();
        let mut text = String::with_capacity(5 * (list + 16));
        text.extend([prefix, session]);
        let mut ends = [list; 5];
        for (end, name) in ends[1..].iter_mut().zip(COMPANIONS) {
            text.extend(["{", prefix, session, "}:", name]);
            *end = text.len();
        }
        Self { text, ends }
    }

    pub(super) fn in_order(&self) -> [&str; 5] {
        let mut begin = 0;
        self.ends.map(|end| {
            let key = &self.text[begin..end];
            begin = end;
            key
        })
    }

    /// Where the session's turns are.
    pub(super) fn turns(&self) -> &str {
        &self.text[self.ends[3]..]
    }

    /// The list in which a copy is made before it becomes this session's: in the same slot, and no
    /// session's name.
    pub(super) fn copy(&self, random: u128) -> String {
        format!("{{{}}}:fork:{random:032x}", self.in_order()[0])
    }
}

/// Whether a key is such a list.
pub fn is_copy(key: &[u8]) -> bool {
    let mark = b"}:fork:";
    key.starts_with(b"{") && key.windows(mark.len()).any(|part| part == mark)
}

/// The channel on which the scripts tell of changes of a session.
pub(super) fn channel(prefix: &str, session: &SessionId) -> String {
    format!("{{{prefix}{session}}}:changed")
}

/// The session of such a channel.
pub(super) fn session_of_channel(prefix: &str, channel: &[u8]) -> Option<SessionId> {
    let channel = std::str::from_utf8(channel).ok()?;
    let session = channel.strip_prefix('{')?.strip_prefix(prefix)?;
    SessionId::parse(session.strip_suffix("}:changed")?).ok()
}

/// The keys of the index of all sessions, in one slot of their own, so that no script has both one
/// of these and a session's. As with [`running_key`], no session has such a name. Without a prefix,
/// they share no slot: a cluster is not used so.
pub(super) struct IndexKeys {
    /// A sorted set: each session, with its score.
    pub(super) sessions: String,
    /// A sorted set: each session, with the same score, so that they are in the order of their names.
    pub(super) names: String,
    /// A hash: the pairs of each session whose metadata were set, hashed, and their version.
    pub(super) pairs: String,
    /// A hash: the pairs that calls are about to give each session.
    pub(super) announced: String,
    /// What the names of sets begin with that hold the sessions that have a pair, hashed.
    pub(super) of_pair: String,
    /// There while a server brings the index up to date, and until another may do so again.
    pub(super) round: String,
}

impl IndexKeys {
    pub(super) fn new(prefix: &str) -> Self {
        let key = |name: &str| format!("{{{prefix}}}:{name}");
        Self {
            sessions: key("sessions"),
            names: key("names"),
            pairs: key("pairs"),
            announced: key("announced"),
            of_pair: key("pair:"),
            round: key("round"),
        }
    }
}

/// The key that names the turns that run, of all sessions: a sorted set, each turn with the time (ms)
/// to look whether somebody has it still. It lies in a slot of its own, so that no script has it; no
/// session has its name, for the session in it would have none.
pub(super) fn running_key(prefix: &str) -> String {
    format!("{{{prefix}}}:running")
}

/// The pattern of SCAN that matches what begins with this text, whatever is in it.
pub(super) fn pattern(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for character in prefix.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '^' | '-' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('*');
    pattern
}

/// The scripts, each with its prelude.
pub(super) struct Scripts {
    pub(super) append: Script,
    pub(super) read: Script,
    pub(super) clear: Script,
    pub(super) expire: Script,
    pub(super) look: Script,
    pub(super) update: Script,
    pub(super) rewind: Script,
    pub(super) fork_add: Script,
    pub(super) fork_end: Script,
    pub(super) peek: Script,
    pub(super) index_announce: Script,
    pub(super) index_settle: Script,
    pub(super) index_forget: Script,
    pub(super) turn_begin: Script,
    pub(super) turn_leave: Script,
    pub(super) turn_take: Script,
    pub(super) turn_keep: Script,
    pub(super) turn_end: Script,
    pub(super) turn_stop: Script,
    pub(super) turn_follow: Script,
}

impl Scripts {
    pub(super) fn new(upkeep: Upkeep) -> Self {
        let or_nil = |number: Option<i64>| number.map_or("nil".to_owned(), |n| n.to_string());
        let limits = format!(
            "local REQUEST_MEMORY_MS, TOMBSTONE_MS, LINGER_MS = \
             {REQUEST_MEMORY_MS}, {TOMBSTONE_MS}, {LINGER_MS}\n\
             local TRIM_LOOKED_AT_MAX, REWINDS_MAX = {TRIM_LOOKED_AT_MAX}, {REWINDS_MAX}\n\
             local TTL_MS, READS_EXTEND, ELEMENTS_MAX = {}, {}, {}\n",
            or_nil(upkeep.ttl_ms),
            upkeep.reads_extend,
            or_nil(upkeep.elements_max.map(to_lua)),
        );
        let base = concat!(
            include_str!("scripts/keys.lua"),
            include_str!("scripts/base.lua")
        );
        let common = [base, include_str!("scripts/common.lua")].concat();
        // In one function all that only some appends need.
        let append = Script::new(&format!(
            "{limits}{}local function whole_way()\n{common}{}end\n{}",
            include_str!("scripts/append_plain.lua"),
            include_str!("scripts/append_whole.lua"),
            include_str!("scripts/append.lua"),
        ));
        let common = format!("{limits}{common}");
        let script = |body: &str| Script::new(&format!("{common}{body}"));
        let of_turns = format!(
            "local PLACE_MS, WAITING_MAX, FOLLOWED_EVERY_MS = \
             {PLACE_MS}, {WAITING_MAX}, {FOLLOWED_EVERY_MS}\n{}",
            include_str!("scripts/turns.lua")
        );
        let turn_script = |body: &str| Script::new(&format!("{common}{of_turns}{body}"));
        // Those that look at the turns only.
        let light_script = |body: &str| Script::new(&format!("{limits}{base}{of_turns}{body}"));
        let seen = include_str!("scripts/seen.lua");
        let telling_script = |body: &str| Script::new(&format!("{common}{of_turns}{seen}{body}"));
        let index = include_str!("scripts/index.lua");
        let index_script = |body: &str| Script::new(&[index, body].concat());
        Self {
            append,
            read: script(include_str!("scripts/read.lua")),
            clear: script(include_str!("scripts/clear.lua")),
            expire: script(include_str!("scripts/expire.lua")),
            look: telling_script(include_str!("scripts/look.lua")),
            update: telling_script(include_str!("scripts/update.lua")),
            rewind: turn_script(include_str!("scripts/rewind.lua")),
            fork_add: Script::new(include_str!("scripts/fork_add.lua")),
            fork_end: telling_script(include_str!("scripts/fork_end.lua")),
            peek: Script::new(include_str!("scripts/peek.lua")),
            index_announce: index_script(include_str!("scripts/index_announce.lua")),
            index_settle: index_script(include_str!("scripts/index_settle.lua")),
            index_forget: index_script(include_str!("scripts/index_forget.lua")),
            turn_begin: turn_script(include_str!("scripts/turn_begin.lua")),
            turn_leave: light_script(include_str!("scripts/turn_leave.lua")),
            turn_take: light_script(include_str!("scripts/turn_take.lua")),
            turn_keep: Script::new(&format!(
                "local LINGER_MS = {LINGER_MS}\n{}",
                include_str!("scripts/turn_keep.lua")
            )),
            turn_end: turn_script(include_str!("scripts/turn_end.lua")),
            turn_stop: light_script(include_str!("scripts/turn_stop.lua")),
            turn_follow: light_script(include_str!("scripts/turn_follow.lua")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_langchains_name_and_its_companions_have_it_as_their_hash_tag() {
        let session = SessionId::parse("a:b").unwrap();
        let keys = Keys::new("message_store:", &session);
        assert_eq!(
            keys.in_order(),
            [
                "message_store:a:b",
                "{message_store:a:b}:session",
                "{message_store:a:b}:requests:0",
                "{message_store:a:b}:requests:1",
                "{message_store:a:b}:turns",
            ]
        );
        assert_eq!(running_key("message_store:"), "{message_store:}:running");
        let channel = channel("message_store:", &session);
        assert_eq!(channel, "{message_store:a:b}:changed");
        let back = session_of_channel("message_store:", channel.as_bytes());
        assert_eq!(back, Some(session));
        assert_eq!(session_of_channel("other:", channel.as_bytes()), None);
    }
}
