//! The arguments of the client commands. What a value means is checked here, once; the commands
//! get types that have been parsed.

use std::{fmt, path::PathBuf, str::FromStr};

use clap::Args;
use http::Uri;

use crate::message::SessionId;

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
  Over a Unix socket, with another model and little history:
      chat-memory chat --session foo --target unix:/run/chat-memory.sock \\
          --model gpt-5-mini --last-messages 10

In the terminal:
  Ctrl-C stops an answer; what there is of it stays in the session.
  Ctrl-D or /quit leaves. /help names the other commands.

If stdin is not a terminal, each line is one message, and the exit code is 1 if an answer failed.";

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
