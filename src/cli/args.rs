//! The arguments of the client commands. What a value means is checked here, once; the commands
//! get types that have been parsed.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
use http::Uri;

use crate::{config::Period, message::SessionId};

/// The server that a client command talks to if it is not told: what `serve` listens on if it is
/// not told either.
pub const TARGET_DEFAULT: &str = "http://127.0.0.1:50051";

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A TCP address: scheme, host and port, and nothing else.
    Tcp(Uri),
    /// A Unix socket.
    Unix(PathBuf),
}

/// A target that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("must be `host:port`, `http://host:port` or `unix:/path`")]
    Malformed,
    #[error("needs a port, such as `{0}:50051`")]
    PortMissing(String),
    #[error("must be `http://…`: the client commands do not speak TLS")]
    Tls,
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Some(path) = text.strip_prefix("unix:") {
            // gRPC's own notation of an absolute path is `unix:///path`.
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(TargetError::Malformed);
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if text.starts_with("https://") {
            return Err(TargetError::Tls);
        }
        let address = text.strip_prefix("http://").unwrap_or(text);
        let address = address.strip_suffix('/').unwrap_or(address);
        let uri: Uri = format!("http://{address}/")
            .parse()
            .map_err(|_| TargetError::Malformed)?;
        let authority = uri.authority().ok_or(TargetError::Malformed)?;
        let is_bare = authority.as_str() == address && !address.contains('@');
        if !is_bare || authority.host().is_empty() {
            return Err(TargetError::Malformed);
        }
        if authority.host() == address {
            return Err(TargetError::PortMissing(address.to_owned()));
        }
        if authority.port_u16().is_none() {
            return Err(TargetError::Malformed);
        }
        Ok(Self::Tcp(uri))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(uri) => match uri.authority() {
                Some(authority) => write!(f, "http://{authority}"),
                None => write!(f, "{uri}"),
            },
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The server to talk to: the same flag in every client command.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// The server: `host:port`, `http://host:port` or `unix:/path`, as its `--listen` says.
    #[arg(
        long,
        env = "CHAT_MEMORY_TARGET",
        default_value = TARGET_DEFAULT,
        value_name = "ADDRESS"
    )]
    pub target: Target,
}

/// The session to work on: the same flag in every command that needs one.
#[derive(Debug, Clone, Args)]
pub struct SessionArgs {
    /// The session: 1 to 512 bytes of UTF-8 without control characters and without `{` and `}`.
    /// It exists as soon as it holds a message; until then it is empty.
    #[arg(long, value_name = "ID", value_parser = parse_session)]
    pub session: SessionId,
}

fn parse_session(text: &str) -> Result<SessionId, String> {
    // clap names the flag; the field's name would only repeat it.
    SessionId::parse(text).map_err(|violation| violation.rule)
}

/// Whether to write colours.
#[derive(Debug, Clone, Default, Args)]
pub struct ColorArgs {
    /// Turns colours off, if it is not empty (see no-color.org). They are off anyway where the
    /// output is not a terminal.
    #[arg(long, env = "NO_COLOR", hide = true, num_args = 0..=1, require_equals = true,
          default_missing_value = "1")]
    pub no_color: Option<String>,
}

impl ColorArgs {
    /// Whether colours are wanted where there is a terminal to show them.
    pub fn allowed(&self) -> bool {
        self.no_color.as_deref().unwrap_or_default().is_empty()
    }
}

const CHAT_EXAMPLES: &str = "\
Examples:
  Talk, in a terminal:
      chat-memory chat --session foo
  Ask one thing; the answer goes to stdout, all else to stderr:
      echo 'What did I say first?' | chat-memory chat --session foo
  Go on with the answer that was coming in when the terminal died:
      chat-memory chat --session foo --resume
  Over a Unix socket, with another model and little history:
      chat-memory chat --session foo --target unix:/run/chat-memory.sock \\
          --model gpt-5-mini --last-messages 10

In the terminal:
  Ctrl-C stops an answer; what there is of it stays in the session.
  Ctrl-D or /quit leaves. /help names the other commands.

An answer goes on in the server when the terminal dies. If stdin is not a terminal, each line is
one message, an answer stops when this program ends, and the exit code is 1 if one failed. A line that
begins with / is a command there, too: write // where a message begins with /.";

/// Talks to the model in a session, through the server.
#[derive(Debug, Clone, Args)]
#[command(after_help = CHAT_EXAMPLES)]
pub struct ChatArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// The model that answers, by the provider's name for it. The server's own if not given.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Instructions for the model, sent before the history with each message and not stored: at
    /// most 1 MiB. None if not given.
    #[arg(long, value_name = "TEXT")]
    pub system_prompt: Option<String>,

    /// The most messages of history that the model is given: 1 to 1,000. More cost more tokens.
    /// The server's own number (its `--history-messages`) if not given.
    #[arg(long, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub last_messages: Option<u32>,

    /// First go on with the session's last turn: print its answer while it comes, or as it was
    /// stored; if it failed, say why and offer to ask again.
    #[arg(long)]
    pub resume: bool,

    #[command(flatten)]
    pub color: ColorArgs,
}

const HISTORY_EXAMPLES: &str = "\
Examples:
  Read a session:
      chat-memory history --session foo
  Only its last 20 messages:
      chat-memory history --session foo --last 20
  As JSON, one message a line, for other programs:
      chat-memory history --session foo --json | jq -r 'select(.role == \"ROLE_USER\") | .content'
  With the bytes that the store holds:
      chat-memory history --session foo --json --raw | jq -r .raw | base64 --decode

In JSON the fields are named as in the API, and all are there. It is the API's own JSON form: what
is not set is \"\", 0, [] or null, times are RFC 3339, bytes are base64.";

/// Prints the messages of a session, oldest first.
#[derive(Debug, Clone, Args)]
#[command(after_help = HISTORY_EXAMPLES)]
pub struct HistoryArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// Print only the newest that many messages: 1 or more. All if not given; they are read page
    /// by page, so the size of the session does not matter.
    #[arg(long, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    pub last: Option<u32>,

    /// Print JSON lines, one object for each message.
    #[arg(long)]
    pub json: bool,

    /// Also print the bytes that the store holds, as base64 in the field `raw`. Only with `--json`.
    #[arg(long, requires = "json")]
    pub raw: bool,

    #[command(flatten)]
    pub color: ColorArgs,
}

const HEALTH_EXAMPLES: &str = "\
Examples:
  By hand:
      chat-memory health && echo good
  In a Dockerfile:
      HEALTHCHECK --interval=10s CMD [\"chat-memory\", \"health\"]
  As an exec probe in Kubernetes, over a Unix socket:
      exec: { command: [chat-memory, health, --target, unix:/run/chat-memory.sock] }

The exit code is 0 if the answer is SERVING, and 1 otherwise, also if there is no answer in time.";

/// Asks the server whether it serves (`grpc.health.v1.Health/Check`).
#[derive(Debug, Clone, Args)]
#[command(after_help = HEALTH_EXAMPLES)]
pub struct HealthArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    /// The service to ask for. Empty (`--service=`) asks for the server as a whole.
    #[arg(long, default_value = HEALTH_SERVICE_DEFAULT, value_name = "NAME")]
    pub service: String,

    /// Seconds to wait for the answer, the connection included: 1 to 3,600. Keep it below the time
    /// limit of the probe that runs this, or the reason for a failure is lost.
    #[arg(long, default_value_t = 3, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub timeout_seconds: u64,
}

/// Sessions that `sessions` lists if it is not told: what the API gives in a page by default.
const SESSIONS_DEFAULT: u32 = 50;

const SESSIONS_EXAMPLES: &str = "\
Examples:
  The sessions that were active last:
      chat-memory sessions
  Those of one user, all of them:
      chat-memory sessions --prefix ann/ --all
  Those with certain metadata, as JSON, one session a line:
      chat-memory sessions --metadata app=shop --metadata lang=en --json | jq -r .session_id

On a terminal, titles are cut to its width; in a pipe and in JSON nothing is. In JSON the fields are
named as in the API, and all are there; times are absolute.";

/// Lists sessions, the one with the newest activity first.
#[derive(Debug, Clone, Args)]
#[command(after_help = SESSIONS_EXAMPLES)]
pub struct SessionsArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    /// Only sessions whose ids begin with this text.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub prefix: String,

    /// Only sessions whose metadata have this pair. May be given up to 16 times: all must be there.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub metadata: Vec<(String, String)>,

    /// The most sessions to list: 1 or more.
    #[arg(long, value_name = "COUNT", default_value_t = SESSIONS_DEFAULT,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,

    /// List all; they are read page by page.
    #[arg(long, conflicts_with = "limit")]
    pub all: bool,

    /// Print JSON lines, one object for each session.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub color: ColorArgs,
}

/// Takes `key=value`. What keys and values may be is the server's to say.
fn parse_pair(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("must be `key=value`"),
    }
}

const WATCH_EXAMPLES: &str = "\
Examples:
  All messages of a session, and then each further one as it comes:
      chat-memory watch --session foo
  Only what comes from now on, for another program:
      chat-memory watch --session foo --new --json | jq -r '.message.content // empty'
  Go on where an earlier watch was:
      chat-memory watch --session foo --after 12

Ctrl-C ends it. If the connection breaks, it goes on by itself behind the last message, and says so
on stderr; after a row of failures it gives up, with exit code 1.
Notices (turns, rewinds, clears) are lines between the messages on a terminal, and go to stderr in
a pipe. In JSON each line is an object with one field, named as in the API: message, live, turn,
rewound, cleared or skipped.";

/// Prints the messages of a session, then each further one as it comes, whoever writes it.
#[derive(Debug, Clone, Args)]
#[command(after_help = WATCH_EXAMPLES)]
pub struct WatchArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// Only messages with a greater number: 0 or more.
    #[arg(long, value_name = "NUMBER", default_value_t = 0,
          value_parser = clap::value_parser!(i64).range(0..))]
    pub after: i64,

    /// Only what comes from now on.
    #[arg(long, conflicts_with = "after")]
    pub new: bool,

    /// Print JSON lines, one object for each message and each notice.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub color: ColorArgs,
}

const REWIND_EXAMPLES: &str = "\
Examples:
  Look, then drop what came after message 12, so that the talk can go another way from there:
      chat-memory history --session foo --last 10
      chat-memory rewind --session foo --after 12
  In a script, also while an answer comes in:
      chat-memory rewind --session foo --after 12 --stop-turn --yes

It cannot be undone; `chat-memory fork` makes a copy first. On a terminal it says how many messages
would go, and asks; elsewhere it needs --yes.";

/// Deletes the messages of a session after a number.
#[derive(Debug, Clone, Args)]
#[command(after_help = REWIND_EXAMPLES)]
pub struct RewindArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// The number of the last message that stays, as `history` shows it; 0 deletes all.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i64).range(0..))]
    pub after: i64,

    /// Stop a turn that runs, and drop its answer. Without it, a running turn is in the way.
    #[arg(long)]
    pub stop_turn: bool,

    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

const FORK_EXAMPLES: &str = "\
Examples:
  Copy a session:
      chat-memory fork --session foo --to bar
  Copy its beginning, and go another way from there:
      chat-memory fork --session foo --to bar --through 12
      chat-memory chat --session bar

Title and metadata come along, turns and the time to live do not. Safe to repeat.";

/// Copies a session, or its beginning, into a new one.
#[derive(Debug, Clone, Args)]
#[command(after_help = FORK_EXAMPLES)]
pub struct ForkArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// The new session, which must not have messages yet.
    #[arg(long, value_name = "ID", value_parser = parse_session)]
    pub to: SessionId,

    /// The number of the last message to copy: 1 or more. All if not given.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i64).range(1..))]
    pub through: Option<i64>,
}

const UPDATE_EXAMPLES: &str = "\
Examples:
  Name a session:
      chat-memory update --session foo --title 'Trip to Rome'
  Say what it belongs to, in place of all that was said before:
      chat-memory update --session foo --metadata app=shop --metadata user=ann
  Let it go 30 days after its last message:
      chat-memory update --session foo --ttl 30d

Prints the session as it is then.";

/// Changes the title, the metadata or the time to live of a session.
#[derive(Debug, Clone, Args)]
#[command(after_help = UPDATE_EXAMPLES)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)
    .args(["title", "metadata", "clear_metadata", "ttl"])))]
pub struct UpdateArgs {
    #[command(flatten)]
    pub target: TargetArgs,

    #[command(flatten)]
    pub session: SessionArgs,

    /// The title; empty for none.
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,

    /// A pair of the metadata. May be given up to 16 times; they replace all that were there.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub metadata: Vec<(String, String)>,

    /// Drop all metadata.
    #[arg(long, conflicts_with = "metadata")]
    pub clear_metadata: bool,

    /// How long it lives after its last write: seconds, or with a unit such as `12h` or `30d`;
    /// `never` lets it live for ever, `default` leaves it to the server.
    #[arg(long, value_name = "TIME")]
    pub ttl: Option<Ttl>,

    #[command(flatten)]
    pub color: ColorArgs,
}

/// How long a session is to live after its last write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// As the server says.
    Default,
    /// For ever.
    Never,
    For(Duration),
}

impl FromStr for Ttl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" => Ok(Self::Default),
            "never" => Ok(Self::Never),
            _ => match text.parse()? {
                // To the API, none at all means for ever.
                Period(Duration::ZERO) => Err("must be 1 second or more, or `never`".to_owned()),
                Period(time) => Ok(Self::For(time)),
            },
        }
    }
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  bash:
      chat-memory completions bash > ~/.local/share/bash-completion/completions/chat-memory
  zsh, in a folder of $fpath:
      chat-memory completions zsh > ~/.zfunc/_chat-memory
  fish:
      chat-memory completions fish > ~/.config/fish/completions/chat-memory.fish";

/// Prints the completion of this program's commands and flags for a shell.
#[derive(Debug, Clone, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: clap_complete::Shell,
}

const MAN_EXAMPLES: &str = "\
Examples:
  Read it:
      chat-memory man | man -l -
  Install a page for the program and one for each command:
      chat-memory man --out ~/.local/share/man/man1";

/// Prints the manual page of this program, or writes those of all its commands.
#[derive(Debug, Clone, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub struct ManArgs {
    /// Write the page of the program and one for each command into this folder, which is made if it
    /// is not there. The page of the program to stdout if not given.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// The service that `health` asks for if it is not told.
pub const HEALTH_SERVICE_DEFAULT: &str = "chatmemory.v1.ChatMemory";

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    enum Program {
        Chat(ChatArgs),
        History(HistoryArgs),
        Health(HealthArgs),
    }

    fn refusal(arguments: &[&str]) -> String {
        let arguments = ["chat-memory"].iter().chain(arguments);
        Program::try_parse_from(arguments)
            .expect_err("must be refused")
            .to_string()
    }

    #[test]
    fn the_definitions_are_sound() {
        Program::command().debug_assert();
    }

    #[test]
    fn a_target_is_an_address_a_url_or_a_unix_socket() {
        for (text, shown) in [
            ("127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://localhost:1", "http://localhost:1"),
            ("http://localhost:1/", "http://localhost:1"),
            ("[::1]:50051", "http://[::1]:50051"),
            ("unix:/run/x.sock", "unix:/run/x.sock"),
            ("unix:x.sock", "unix:x.sock"),
            ("unix:///run/x.sock", "unix:/run/x.sock"),
        ] {
            let target: Target = text.parse().expect(text);
            assert_eq!(target.to_string(), shown);
            assert_eq!(shown.parse(), Ok(target));
        }
    }

    #[test]
    fn a_target_that_cannot_be_used_is_refused_with_the_reason() {
        let malformed = TargetError::Malformed;
        for (text, error) in [
            ("", malformed.clone()),
            ("unix:", malformed.clone()),
            ("a b:1", malformed.clone()),
            ("ftp://host:1", malformed.clone()),
            ("host:1/path", malformed.clone()),
            ("host:1?x", malformed.clone()),
            ("user@host:1", malformed.clone()),
            (":50051", malformed.clone()),
            ("host:70000", malformed.clone()),
            ("host:", malformed),
            ("host", TargetError::PortMissing("host".into())),
            ("https://host:1", TargetError::Tls),
        ] {
            assert_eq!(text.parse::<Target>(), Err(error), "{text}");
        }
    }

    #[test]
    fn a_session_is_required_and_checked() {
        assert!(refusal(&["chat"]).contains("--session <ID>"));
        let refused = refusal(&["history", "--session", "a{b"]);
        assert!(refused.contains("must not contain `{` or `}`"), "{refused}");
        assert!(refused.contains("--session"), "{refused}");
    }

    #[test]
    fn raw_needs_json_and_counts_have_limits() {
        assert!(refusal(&["history", "--session", "s", "--raw"]).contains("--json"));
        for arguments in [
            ["history", "--session", "s", "--last", "0"],
            ["chat", "--session", "s", "--last-messages", "1001"],
            ["health", "--service", "", "--timeout-seconds", "0"],
        ] {
            assert!(refusal(&arguments).contains("is not in"), "{arguments:?}");
        }
    }

    #[test]
    fn health_asks_for_chat_memory_unless_told() {
        let parse = |arguments: &[&str]| match Program::parse_from(arguments) {
            Program::Health(args) => args,
            other => panic!("not health: {other:?}"),
        };
        let args = parse(&["chat-memory", "health"]);
        assert_eq!(args.service, "chatmemory.v1.ChatMemory");
        assert_eq!(args.timeout_seconds, 3);
        assert_eq!(parse(&["chat-memory", "health", "--service="]).service, "");
    }

    #[test]
    fn no_color_counts_unless_it_is_empty() {
        for (value, allowed) in [(None, true), (Some(""), true), (Some("0"), false)] {
            let args = ColorArgs {
                no_color: value.map(str::to_owned),
            };
            assert_eq!(args.allowed(), allowed, "{value:?}");
        }
    }
}
