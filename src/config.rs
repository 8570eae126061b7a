//! Every setting: its flag, its variable, its default, its unit, its consequence. The only reader
//! of the environment.
//!
//! A setting that cannot be parsed does not end the parsing: it is kept with its error, so that
//! [`Serve::check`] can report everything that is wrong at once.

use std::{
    convert::Infallible, fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc,
    time::Duration,
};

use clap::{
    ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    parser::ValueSource,
};

use crate::{
    cli::args::{
        ChatArgs, CompletionsArgs, ForkArgs, HealthArgs, HistoryArgs, ManArgs, RewindArgs,
        SessionsArgs, UpdateArgs, WatchArgs,
    },
    message::{NAME_BYTES_MAX, PAGE_MESSAGES_MAX, check_name},
    model::{
        echo,
        provider::{self, Provider},
        retry,
    },
    secret::Secret,
    store::{redis, sessions::Upkeep},
    telemetry::{self, LogFormat},
};

/// The version and the commit it was built from.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("CHAT_MEMORY_COMMIT"),
    ")"
);

const EXAMPLES: &str = "\
Examples:
  chat-memory                                           # embedded store, no model: try it out
  chat-memory --redis redis://localhost:6379/0          # the Redis that a LangChain app uses
  chat-memory --model-url http://localhost:11434/v1 --model llama3.2
  OPENAI_API_KEY=… chat-memory --model gpt-5-mini
  chat-memory --listen unix:/run/chat-memory.sock --listen 127.0.0.1:50051
  chat-memory chat --session foo                        # talk to it
  chat-memory history --session foo --json              # read what it remembers
  chat-memory sessions                                  # which sessions there are

Every flag has an environment variable, shown beside it; the flag wins.";

const EXPORT_EXAMPLES: &str = "\
Examples:
  Everything in the embedded file, also while a server uses it:
      chat-memory export --database chat-memory.db --output sessions.jsonl
  The sessions of one user, out of Redis:
      chat-memory export --redis redis://localhost:6379/0 --session-prefix ann/ --output ann.jsonl
  From one store to the other:
      chat-memory export --database chat-memory.db | chat-memory import --redis redis://localhost

An export to a file that was interrupted goes on where it was when the same command is run again.
A session that grows meanwhile is exported up to where it was when its turn came.
The exit code is 0 if all is in the file, 1 if not, 2 if the settings are wrong.";

const IMPORT_EXAMPLES: &str = "\
Examples:
  Into Redis:
      chat-memory import --redis redis://localhost:6379/0 --input sessions.jsonl
  Into the embedded file, which no server may use meanwhile:
      chat-memory import --database chat-memory.db --input sessions.jsonl

Safe to repeat: what a session holds already is compared, byte for byte, and only the rest is added.
After an interruption, run the same command again. A session that holds something else is left as it
is, and named. Messages keep their order and get new sequences, from 1 on in an empty session.
The exit code is 0 if all is in the store, 1 if not, 2 if the settings are wrong.";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  chat-memory doctor --redis redis://localhost:6379/0
  chat-memory doctor --redis redis://localhost:6379/0 --json | jq '.findings[]'

Only commands that read are sent: SCAN, TYPE, PTTL, LLEN, MEMORY USAGE, LRANGE; besides, PING, INFO
and in a cluster CLUSTER SLOTS. No text of messages is shown. One message that LangChain cannot read
makes its whole session unreadable for LangChain; chat-memory reads the others, and hands that one out
as bytes.
The exit code is 0 if all is well, 1 if something was found, 2 if it could not run.";

/// A gRPC memory server for LLM chats: keeps each session's messages in Redis or in one file, and
/// runs whole chat turns.
#[derive(Debug, Parser)]
#[command(name = "chat-memory", version = VERSION, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub serve: Serve,
}

impl Cli {
    /// Takes the command line and the environment; ends the program if that cannot be.
    pub fn parse_all() -> Self {
        let command = without_variables(Self::command(), is_variable_empty);
        let matches = command.clone().get_matches();
        let matches = match variables_of_the_other_store(&matches) {
            Some(is_of_it) => without_variables(command, is_of_it).get_matches(),
            None => matches,
        };
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Takes the variables of these settings for absent.
fn without_variables(command: clap::Command, are_absent: fn(&clap::Arg) -> bool) -> clap::Command {
    command
        .mut_args(|arg| match are_absent(&arg) {
            true => arg.env(None::<&str>),
            false => arg,
        })
        .mut_subcommands(|command| without_variables(command, are_absent))
}

/// An empty variable is how compose files leave a setting out.
fn is_variable_empty(arg: &clap::Arg) -> bool {
    let value = arg.get_env().and_then(std::env::var_os);
    value.is_some_and(|value| value.is_empty())
}

/// A flag wins over a variable, also where it names one store and the variable the other.
fn variables_of_the_other_store(matches: &ArgMatches) -> Option<fn(&clap::Arg) -> bool> {
    let matches = matches
        .subcommand()
        .map_or(matches, |(_, of_command)| of_command);
    let is_flag = |id| {
        matches!(matches.try_contains_id(id), Ok(true))
            && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    match (is_flag("redis"), is_flag("database")) {
        (true, false) => Some(|arg| arg.get_id() == "database"),
        (false, true) => Some(|arg| arg.get_id().as_str().starts_with("redis")),
        _ => None,
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server (the default)
    #[command(after_help = EXAMPLES)]
    Serve(Box<Serve>),
    /// Talk to a session in the terminal
    Chat(ChatArgs),
    /// Print a session's messages
    History(HistoryArgs),
    /// Print a session's messages, then each further one as it comes
    Watch(WatchArgs),
    /// List sessions, the one with the newest activity first
    Sessions(SessionsArgs),
    /// Change a session's title, metadata or time to live
    Update(UpdateArgs),
    /// Delete the messages of a session after a number
    Rewind(RewindArgs),
    /// Copy a session, or its beginning, into a new one
    Fork(ForkArgs),
    /// Ask a server whether it is serving: exit code 0 if it is, 1 if not
    Health(HealthArgs),
    /// Write the sessions of a store to a file or to stdout
    #[command(after_help = EXPORT_EXAMPLES)]
    Export(ExportArgs),
    /// Read sessions into a store, from a file or from stdin
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(ImportArgs),
    /// Look at a LangChain Redis without changing it, and say what is wrong with it
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
    /// Print the completion of commands and flags for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all commands
    Man(ManArgs),
}

/// What to export, and where to.
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub store: StoreArgs,

    /// Write to this file. To stdout if not given
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Only this session. All if neither this nor --session-prefix is given
    #[arg(long, value_name = "ID", conflicts_with = "session_prefix")]
    pub session: Option<String>,

    /// Only sessions whose ids begin with this text
    #[arg(long, value_name = "TEXT")]
    pub session_prefix: Option<String>,
}

/// What to import, and where to.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    pub store: StoreArgs,

    /// Read this file, which `chat-memory export` wrote. Stdin if not given
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

/// What to look at.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub redis: RedisArgs,

    /// Print JSON, for other programs
    #[arg(long)]
    pub json: bool,
}

/// The settings of the server, as given. [`Serve::check`] makes [`Config`] of them.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Where to listen: `IP:PORT`, or `unix:/path/to/socket`. May be given several times, or as a
    /// list with commas. Port 0 takes any free port; the server prints which
    #[arg(
        long,
        env = "CHAT_MEMORY_LISTEN",
        value_name = "ADDRESS",
        value_delimiter = ','
    )]
    #[arg(default_value = "127.0.0.1:50051", help_heading = "Network")]
    listen: Vec<Given<Listen>>,

    /// Allow TCP addresses that other machines can reach. There is no authentication and no TLS
    /// yet: everybody who reaches the address can read and delete every session
    #[arg(long, env = "CHAT_MEMORY_INSECURE", help_heading = "Network")]
    #[arg(value_parser = clap::builder::BoolishValueParser::new())]
    insecure: bool,

    /// Permissions of Unix sockets, in octal. Whoever may write to a socket can use the server
    #[arg(
        long,
        env = "CHAT_MEMORY_UNIX_MODE",
        value_name = "OCTAL",
        default_value = "600"
    )]
    #[arg(help_heading = "Network")]
    unix_mode: Given<Octal>,

    /// Serve metrics for Prometheus at `http://IP:PORT/metrics`. Off if not given. Port 0 takes any
    /// free port; the server prints which
    #[arg(
        long,
        env = "CHAT_MEMORY_METRICS_LISTEN",
        value_name = "ADDRESS",
        help_heading = "Network"
    )]
    metrics_listen: Option<Given<Listen>>,

    #[command(flatten)]
    store: StoreArgs,

    /// How long a session lives after its last write, with all that is kept beside it: seconds, or
    /// with a unit such as `12h` or `30d` (1 second to 10 years). UpdateSession can say otherwise for
    /// one session. Without it, the server sets no expiry, and one that others set stands
    #[arg(long, env = "CHAT_MEMORY_SESSION_TTL", value_name = "TIME")]
    #[arg(help_heading = "Sessions")]
    session_ttl: Option<Given<Period>>,

    /// Let reading a session prolong its life as writing does
    #[arg(
        long,
        env = "CHAT_MEMORY_SESSION_TTL_ON_READ",
        value_name = "BOOL",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    #[arg(value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Sessions")]
    #[arg(action = clap::ArgAction::Set)]
    session_ttl_on_read: bool,

    /// Messages that a session keeps (2 to 100000000): a write that makes more removes the oldest,
    /// whole exchanges only. Without it, all are kept
    #[arg(long, env = "CHAT_MEMORY_MAX_MESSAGES_PER_SESSION", value_name = "N")]
    #[arg(help_heading = "Sessions")]
    max_messages_per_session: Option<Given<usize>>,

    /// The model that answers, by its provider's name, such as `gpt-5-mini`, `claude-sonnet-4-5`,
    /// `gemini-2.5-flash`, or `PROVIDER::NAME`. Its key comes from the provider's usual variable.
    /// Without it the server has no model and repeats what it is told
    #[arg(
        long,
        env = "CHAT_MEMORY_MODEL",
        value_name = "NAME",
        help_heading = "Model"
    )]
    model: Option<String>,

    /// Ask a server that speaks OpenAI's protocol (Ollama, vLLM, llama.cpp, LiteLLM …) at this base
    /// URL, such as `http://localhost:11434/v1`. Needs --model; a key is sent only if
    /// --model-key is set
    #[arg(
        long,
        env = "CHAT_MEMORY_MODEL_URL",
        value_name = "URL",
        help_heading = "Model"
    )]
    model_url: Option<String>,

    /// The key for the model, in place of the provider's usual variable. Better in the variable
    /// than in the flag, which other users of the machine can see
    #[arg(
        long,
        env = "CHAT_MEMORY_MODEL_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    #[arg(help_heading = "Model")]
    model_key: Option<Secret>,

    /// How often to ask a model in all if it fails before its first token in a way that may pass
    /// (1 to 10)
    #[arg(
        long,
        env = "CHAT_MEMORY_MODEL_ATTEMPTS",
        value_name = "N",
        default_value = "4"
    )]
    #[arg(help_heading = "Model")]
    model_attempts: Given<u32>,

    /// Seconds without a byte from the model after which its answer counts as broken (1 to 3600)
    #[arg(
        long,
        env = "CHAT_MEMORY_MODEL_IDLE_SECONDS",
        value_name = "S",
        default_value = "120"
    )]
    #[arg(help_heading = "Model")]
    model_idle_seconds: Given<u64>,

    /// Messages of history that a model is given if the client does not say (1 to 1000). More
    /// cost more tokens
    #[arg(
        long,
        env = "CHAT_MEMORY_HISTORY_MESSAGES",
        value_name = "N",
        default_value = "50"
    )]
    #[arg(help_heading = "Turns")]
    history_messages: Given<usize>,

    /// Seconds that a turn may take (1 to 3600)
    #[arg(
        long,
        env = "CHAT_MEMORY_TURN_SECONDS",
        value_name = "S",
        default_value = "600"
    )]
    #[arg(help_heading = "Turns")]
    turn_seconds: Given<u64>,

    /// Seconds after which the turns of a server that has died are run anew by others (1 to 300). A
    /// server that stalls for longer loses its turns
    #[arg(
        long,
        env = "CHAT_MEMORY_LEASE_SECONDS",
        value_name = "S",
        default_value = "10"
    )]
    #[arg(help_heading = "Turns")]
    lease_seconds: Given<u64>,

    /// How long a turn can be followed and is not run twice, from its end on: seconds, or with a
    /// unit such as `30m`, `24h` or `7d` (1 minute to 30 days). What was asked and said is kept
    /// beside the session as long
    #[arg(
        long,
        env = "CHAT_MEMORY_TURN_RETENTION",
        value_name = "TIME",
        default_value = "24h"
    )]
    #[arg(help_heading = "Turns")]
    turn_retention: Given<Period>,

    /// Run turns whose servers have died although nobody asks for them. With `false`, they run anew
    /// once somebody does
    #[arg(
        long,
        env = "CHAT_MEMORY_ADOPT_TURNS",
        value_name = "BOOL",
        default_value = "true",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    #[arg(value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Turns")]
    #[arg(action = clap::ArgAction::Set)]
    adopt_turns: bool,

    /// Turns that may run at once (1 to 1000000); more are refused with RESOURCE_EXHAUSTED
    #[arg(
        long,
        env = "CHAT_MEMORY_MAX_TURNS",
        value_name = "N",
        default_value = "2000"
    )]
    #[arg(help_heading = "Limits")]
    max_turns: Given<usize>,

    /// Other calls that may be under way at once (1 to 1000000); more are refused with
    /// RESOURCE_EXHAUSTED. Each may hold a few MiB
    #[arg(
        long,
        env = "CHAT_MEMORY_MAX_REQUESTS",
        value_name = "N",
        default_value = "1024"
    )]
    #[arg(help_heading = "Limits")]
    max_requests: Given<usize>,

    /// Threads that serve calls (0 to 1024): 0 for one more than cores. Connections of clients are
    /// spread over them; each has its own to Redis
    #[arg(
        long,
        env = "CHAT_MEMORY_WORKERS",
        value_name = "N",
        default_value = "0"
    )]
    #[arg(help_heading = "Limits")]
    workers: Given<usize>,

    /// Watchers of sessions at once (1 to 1000000); more are refused with RESOURCE_EXHAUSTED
    #[arg(
        long,
        env = "CHAT_MEMORY_MAX_WATCHERS",
        value_name = "N",
        default_value = "20000"
    )]
    #[arg(help_heading = "Limits")]
    max_watchers: Given<usize>,

    /// Calls that one connection may have open at once (1 to 1000000); more wait in the client
    #[arg(
        long,
        env = "CHAT_MEMORY_MAX_STREAMS",
        value_name = "N",
        default_value = "1000"
    )]
    #[arg(help_heading = "Limits")]
    max_streams: Given<u32>,

    /// Seconds of silence after which a connection is probed (1 to 3600)
    #[arg(
        long,
        env = "CHAT_MEMORY_KEEPALIVE_SECONDS",
        value_name = "S",
        default_value = "60"
    )]
    #[arg(help_heading = "Limits")]
    keepalive_seconds: Given<u64>,

    /// Seconds that running calls get to finish after SIGTERM or SIGINT (0 to 3600). Keep it below
    /// the `terminationGracePeriodSeconds` of a pod (30 by default), or Kubernetes cuts them off
    #[arg(
        long,
        env = "CHAT_MEMORY_DRAIN_SECONDS",
        value_name = "S",
        default_value = "20"
    )]
    #[arg(help_heading = "Operation")]
    drain_seconds: Given<u64>,

    /// How to write the log: `auto` is text, in colour on a terminal
    #[arg(
        long,
        env = "CHAT_MEMORY_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "auto"
    )]
    #[arg(help_heading = "Operation")]
    log_format: Given<LogFormat>,

    /// What to log: off, error, warn, info, debug, trace, or filters such as `chat_memory=debug`.
    /// No level logs message text
    #[arg(
        long,
        env = "CHAT_MEMORY_LOG",
        value_name = "FILTER",
        default_value = "info"
    )]
    #[arg(help_heading = "Operation")]
    log: String,
}

/// Which Redis. The same flags in every command that uses one.
#[derive(Debug, Clone, Args)]
pub struct RedisArgs {
    /// The Redis that keeps the messages: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://`
    /// for TLS, `redis+unix:///path` for a socket,
    /// `redis-sentinel://[USER:PASSWORD@]HOST[:PORT],…/MASTER[/DB]` for the master that Sentinels
    /// name (theirs: `?sentinel_username=…&sentinel_password=…` at the end),
    /// `redis-cluster://HOST[:PORT],…` or several servers of any scheme of TCP for a cluster;
    /// `rediss-sentinel://` and `rediss-cluster://` with TLS. A password is better in the variable
    /// than in the flag, which other users of the machine can see
    #[arg(
        long,
        env = "CHAT_MEMORY_REDIS",
        value_name = "URL",
        hide_env_values = true
    )]
    #[arg(help_heading = "Store")]
    redis: Option<Secret>,

    /// Trust the certificates in this PEM file, besides the system's, when connecting to Redis
    #[arg(
        long,
        env = "CHAT_MEMORY_REDIS_CA_FILE",
        value_name = "FILE",
        help_heading = "Store"
    )]
    redis_ca_file: Option<PathBuf>,

    /// Milliseconds that Redis gets to answer a command (100 to 60000). A call fails after at most
    /// 2 × (1 s + this)
    #[arg(
        long,
        env = "CHAT_MEMORY_REDIS_TIMEOUT_MS",
        value_name = "MS",
        default_value = "2000"
    )]
    #[arg(help_heading = "Store")]
    redis_timeout_ms: Given<u64>,

    /// Acknowledge a write once so many replicas have it (0 to 10). If fewer have it in a quarter of
    /// the timeout, twice in a row, the outcome is unknown: the master has it, and a failover may lose
    /// it
    #[arg(
        long,
        env = "CHAT_MEMORY_REDIS_WAIT_REPLICAS",
        value_name = "N",
        default_value = "0"
    )]
    #[arg(help_heading = "Store")]
    redis_wait_replicas: Given<u32>,

    /// What comes before the session id in a key. The default is LangChain's
    #[arg(long, env = "CHAT_MEMORY_KEY_PREFIX", value_name = "TEXT")]
    #[arg(default_value = "message_store:", help_heading = "Store")]
    key_prefix: String,
}

/// Where messages are kept. The same flags in every command that opens a store.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    #[command(flatten)]
    redis: RedisArgs,

    /// The file that keeps the messages if there is no --redis [default: chat-memory.db]
    #[arg(
        long,
        env = "CHAT_MEMORY_DATABASE",
        value_name = "FILE",
        help_heading = "Store"
    )]
    database: Option<PathBuf>,
}

impl RedisArgs {
    /// What [`Command::Doctor`] needs: there must be a Redis.
    pub fn check(&self) -> Result<redis::Settings, Problems> {
        let mut problems = Problems(Vec::new());
        let settings = self.check_into(&mut problems);
        if settings.is_none() {
            problems.add("--redis: is required".to_owned());
        }
        match settings {
            Some(settings) if problems.0.is_empty() => Ok(settings),
            _ => Err(problems),
        }
    }

    /// The settings, if a Redis is named.
    fn check_into(&self, problems: &mut Problems) -> Option<redis::Settings> {
        let timeout_ms = problems.take("--redis-timeout-ms", &self.redis_timeout_ms, 100..=60_000);
        let wait_replicas =
            problems.take("--redis-wait-replicas", &self.redis_wait_replicas, 0..=10);
        if let Err(violation) = check_name("--key-prefix", &self.key_prefix, NAME_BYTES_MAX) {
            problems.add(violation.to_string());
        } else if self.key_prefix.contains(['{', '}']) {
            problems.add("--key-prefix: must not contain `{` or `}`".to_owned());
        }
        let Some(url) = &self.redis else {
            if self.redis_ca_file.is_some() {
                problems.add("--redis-ca-file: needs --redis".to_owned());
            }
            if wait_replicas > 0 {
                problems.add("--redis-wait-replicas: needs --redis".to_owned());
            }
            return None;
        };
        let settings = redis::Settings {
            key_prefix: self.key_prefix.clone(),
            timeout_ms,
            wait_replicas,
            ca_file: self.redis_ca_file.clone(),
            ..redis::Settings::new(url.clone())
        };
        // Told above, in the flag's own words.
        match settings.check() {
            Ok(()) | Err(redis::InvalidSettings::KeyPrefix | redis::InvalidSettings::Timeout) => {}
            Err(redis::InvalidSettings::NoKeyPrefix) => problems.add(
                "--key-prefix: must not be empty with a Redis Cluster: it puts the index into one slot"
                    .to_owned(),
            ),
            Err(error @ redis::InvalidSettings::Certificates { .. }) => {
                problems.add(format!("--redis-ca-file: {error}"));
            }
            Err(error) => problems.add(format!("--redis: {error}")),
        }
        Some(settings)
    }
}

impl StoreArgs {
    /// Which store, and what its keys begin with.
    pub fn check(&self) -> Result<(StoreConfig, String), Problems> {
        let mut problems = Problems(Vec::new());
        let store = self.check_into(&mut problems);
        if problems.0.is_empty() {
            Ok((store, self.redis.key_prefix.clone()))
        } else {
            Err(problems)
        }
    }

    fn check_into(&self, problems: &mut Problems) -> StoreConfig {
        let Some(settings) = self.redis.check_into(problems) else {
            let default = || PathBuf::from("chat-memory.db");
            return StoreConfig::Embedded {
                path: self.database.clone().unwrap_or_else(default),
            };
        };
        if self.database.is_some() {
            problems
                .add("--redis and --database (CHAT_MEMORY_REDIS and CHAT_MEMORY_DATABASE): there is one \
                 store, choose one of them".to_owned());
        }
        StoreConfig::Redis(settings)
    }
}

/// The settings of the server, checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: Vec<Listen>,
    pub unix_mode: u32,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    pub store: StoreConfig,
    pub upkeep: Upkeep,
    pub key_prefix: String,
    pub model: ModelConfig,
    pub history_messages: usize,
    pub turn_limit: Duration,
    pub lease: Duration,
    pub turn_retention: Duration,
    pub adopt_turns: bool,
    pub turns_max: usize,
    pub requests_max: usize,
    /// Threads that serve calls; 0 for one more than cores.
    pub workers: usize,
    pub watchers_max: usize,
    pub streams_max: u32,
    pub keepalive: Duration,
    pub drain_limit: Duration,
    pub log_format: LogFormat,
    pub log: String,
}

/// Where messages are kept.
#[derive(Debug, Clone)]
pub enum StoreConfig {
    Embedded { path: PathBuf },
    Redis(redis::Settings),
}

/// Who answers.
#[derive(Clone)]
pub enum ModelConfig {
    Echo,
    Provider {
        settings: provider::Settings,
        policy: retry::Policy,
        /// Looks a provider's usual variable up.
        keys: KeyLookup,
    },
}

/// Looks up the value of an environment variable that holds a provider's key.
pub type KeyLookup = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

impl fmt::Debug for ModelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Echo => f.write_str("Echo"),
            Self::Provider { settings, .. } => write!(f, "Provider({:?})", settings.model),
        }
    }
}

/// Threads at most: more than machines have cores, and few enough to start.
const WORKERS_MAX: usize = 1_024;

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.0 {
            writeln!(f, "error: {problem}")?;
        }
        write!(f, "\nFor more information, try 'chat-memory --help'.")
    }
}

impl Serve {
    /// Checks every setting; says everything that is wrong.
    pub fn check(&self) -> Result<Config, Problems> {
        let mut problems = Problems(Vec::new());
        let listen = self.check_listen(&mut problems);
        let metrics_listen = self.check_metrics_listen(&mut problems);
        let unix_mode = problems.take("--unix-mode", &self.unix_mode, Octal(0)..=Octal(0o777));
        let store = self.store.check_into(&mut problems);
        let model = self.check_model(&mut problems);
        if let Err(error) = telemetry::parse_filter(&self.log) {
            problems.add(format!("--log: {error}"));
        }
        let seconds = Duration::from_secs;
        let config = Config {
            listen,
            unix_mode: unix_mode.0,
            metrics_listen,
            store,
            upkeep: self.check_upkeep(&mut problems),
            key_prefix: self.store.redis.key_prefix.clone(),
            model,
            history_messages: problems.take(
                "--history-messages",
                &self.history_messages,
                1..=PAGE_MESSAGES_MAX,
            ),
            turn_limit: seconds(problems.take("--turn-seconds", &self.turn_seconds, 1..=3600)),
            lease: seconds(problems.take("--lease-seconds", &self.lease_seconds, 1..=300)),
            turn_retention: problems
                .take(
                    "--turn-retention",
                    &self.turn_retention,
                    Period(Duration::from_secs(60))..=Period(Duration::from_secs(30 * 24 * 3600)),
                )
                .0,
            adopt_turns: self.adopt_turns,
            turns_max: problems.take("--max-turns", &self.max_turns, 1..=1_000_000),
            requests_max: problems.take("--max-requests", &self.max_requests, 1..=1_000_000),
            workers: problems.take("--workers", &self.workers, 0..=WORKERS_MAX),
            watchers_max: problems.take("--max-watchers", &self.max_watchers, 1..=1_000_000),
            streams_max: problems.take("--max-streams", &self.max_streams, 1..=1_000_000),
            keepalive: seconds(problems.take(
                "--keepalive-seconds",
                &self.keepalive_seconds,
                1..=3600,
            )),
            drain_limit: seconds(problems.take("--drain-seconds", &self.drain_seconds, 0..=3600)),
            log_format: problems.parsed("--log-format", &self.log_format),
            log: self.log.clone(),
        };
        if problems.0.is_empty() {
            Ok(config)
        } else {
            Err(problems)
        }
    }

    fn check_upkeep(&self, problems: &mut Problems) -> Upkeep {
        // Ten years, as they are counted where they are read and told.
        let periods = Period(Duration::from_secs(1))..=Period(Duration::from_secs(10 * 31_557_600));
        let ttl = self.session_ttl.as_ref();
        let ttl = ttl.map(|ttl| problems.take("--session-ttl", ttl, periods));
        let elements_max = self
            .max_messages_per_session
            .as_ref()
            .map(|max| problems.take("--max-messages-per-session", max, 2..=100_000_000));
        Upkeep {
            ttl_ms: ttl.map(|ttl| i64::try_from(ttl.0.as_millis()).unwrap_or(i64::MAX)),
            reads_extend: self.session_ttl_on_read,
            elements_max,
        }
    }

    fn check_listen(&self, problems: &mut Problems) -> Vec<Listen> {
        let mut addresses = Vec::with_capacity(self.listen.len());
        for given in &self.listen {
            let Ok(address) = &given.parsed else {
                problems.parsed("--listen", given);
                continue;
            };
            if let Listen::Tcp(socket) = address {
                self.check_reach("--listen", *socket, problems);
            }
            addresses.push(address.clone());
        }
        addresses
    }

    fn check_metrics_listen(&self, problems: &mut Problems) -> Option<SocketAddr> {
        match problems.parsed("--metrics-listen", self.metrics_listen.as_ref()?) {
            Listen::Tcp(socket) => {
                self.check_reach("--metrics-listen", socket, problems);
                Some(socket)
            }
            Listen::Unix(_) => {
                problems.add("--metrics-listen: must be IP:PORT".to_owned());
                None
            }
        }
    }

    /// An address that other machines can reach must be asked for.
    fn check_reach(&self, flag: &str, socket: SocketAddr, problems: &mut Problems) {
        if !socket.ip().is_loopback() && !self.insecure {
            problems.add(format!(
                "{flag}: {socket} can be reached by other machines, and there is no \
                 authentication and no TLS yet; if the network is closed to all but trusted \
                 clients, say so with --insecure"
            ));
        }
    }

    fn check_model(&self, problems: &mut Problems) -> ModelConfig {
        let attempts = problems.take("--model-attempts", &self.model_attempts, 1..=10);
        let idle = problems.take("--model-idle-seconds", &self.model_idle_seconds, 1..=3600);
        let (model, url) = (self.model.as_deref(), self.model_url.as_deref());
        match (model, url) {
            (None, Some(_)) => problems.add("--model-url: needs --model".to_owned()),
            (None, None) if self.model_key.is_some() => {
                problems.add("--model-key: needs --model".to_owned());
            }
            _ => {}
        }
        let Some(model) = model else {
            return ModelConfig::Echo;
        };
        if model == echo::NAME && url.is_none() {
            return ModelConfig::Echo;
        }
        let settings = provider::Settings {
            url: url.map(str::to_owned),
            api_key: self.model_key.clone(),
            idle_timeout: Duration::from_secs(idle),
            ..provider::Settings::new(model)
        };
        let keys: KeyLookup = Arc::new(|name| std::env::var(name).ok());
        if let Err(error) = Provider::new(settings.clone(), |name| keys(name)) {
            problems.add(format!("--model: {error}"));
        }
        ModelConfig::Provider {
            settings,
            policy: retry::Policy {
                attempts_max: attempts,
                ..retry::Policy::default()
            },
            keys,
        }
    }
}

impl Problems {
    fn add(&mut self, problem: String) {
        self.0.push(problem);
    }

    /// The value that was given; its default, and a problem, if it cannot be parsed.
    fn parsed<T: Clone + Default>(&mut self, flag: &str, given: &Given<T>) -> T {
        match &given.parsed {
            Ok(value) => value.clone(),
            Err(error) => {
                self.add(format!("{flag}: {:?}: {error}", given.text));
                T::default()
            }
        }
    }

    /// The same, and a problem if it is out of its range.
    fn take<T>(&mut self, flag: &str, given: &Given<T>, range: std::ops::RangeInclusive<T>) -> T
    where
        T: Clone + Default + PartialOrd + fmt::Display,
    {
        let value = self.parsed(flag, given);
        if given.parsed.is_ok() && !range.contains(&value) {
            let (start, end) = range.into_inner();
            self.add(format!("{flag}: {value}: must be {start} to {end}"));
        }
        value
    }
}

/// A setting as it was given, parsed or not.
#[derive(Debug, Clone)]
pub struct Given<T> {
    text: String,
    parsed: Result<T, String>,
}

impl<T: FromStr<Err: fmt::Display>> FromStr for Given<T> {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self {
            text: text.to_owned(),
            parsed: text.parse().map_err(|error: T::Err| error.to_string()),
        })
    }
}

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self::Tcp(([127, 0, 0, 1], 50051).into())
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err("a Unix socket needs a path: unix:/path/to/socket".to_owned());
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let text = text.strip_prefix("http://").unwrap_or(text);
        let text = text.replacen("localhost:", "127.0.0.1:", 1);
        let address = text.parse().map(Self::Tcp);
        address.map_err(|_| "must be IP:PORT or unix:/path/to/socket".to_owned())
    }
}

/// A length of time: seconds, or numbers with units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Default)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(seconds) = text.parse() {
            return Ok(Self(Duration::from_secs(seconds)));
        }
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|_| "must be seconds, or a time with a unit such as 90s, 30m, 24h".to_owned())
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number written in octal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Default)]
pub struct Octal(u32);

impl FromStr for Octal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = u32::from_str_radix(text, 8);
        number
            .map(Self)
            .map_err(|_| "must be an octal number such as 660".to_owned())
    }
}

impl fmt::Display for Octal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:o}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> Result<Config, Problems> {
        let args = std::iter::once("chat-memory").chain(flags.iter().copied());
        Cli::try_parse_from(args).expect("flags").serve.check()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_flags_everything_has_its_default() {
        let config = check(&[]).unwrap();
        assert_eq!(config.listen, [Listen::default()]);
        assert!(
            matches!(config.store, StoreConfig::Embedded { path } if path == *"chat-memory.db")
        );
        assert!(matches!(config.model, ModelConfig::Echo));
        assert_eq!(config.key_prefix, "message_store:");
        assert_eq!(config.metrics_listen, None);
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let problems = check(&[
            "--listen=0.0.0.0:1",
            "--listen=nowhere",
            "--redis=ftp://x",
            "--database=x.db",
            "--drain-seconds=soon",
            "--max-turns=0",
            "--model-url=http://localhost/v1",
            "--log-format=xml",
            "--unix-mode=999",
            "--session-ttl=0",
        ])
        .unwrap_err();
        let text = problems.to_string();
        for flag in [
            "--listen: 0.0.0.0:1",
            "--listen: \"nowhere\"",
            "--redis: ",
            "--redis and --database",
            "--drain-seconds: \"soon\"",
            "--max-turns: 0: must be 1 to 1000000",
            "--model-url: needs --model",
            "--log-format: \"xml\": must be auto, text or json",
            "--unix-mode: \"999\"",
            "--session-ttl: 0s: must be 1s to 10years",
        ] {
            assert!(text.contains(flag), "{flag} is missing in:\n{text}");
        }
        assert_eq!(problems.0.len(), 10, "{text}");
    }

    #[test]
    fn what_is_wrong_with_a_redis_is_said_of_its_flag() {
        let needless = ["--redis-ca-file=x.pem", "--redis-wait-replicas=1"];
        for (flags, problems) in [
            (&needless[..1], &["--redis-ca-file: needs --redis"][..]),
            (&needless[1..], &["--redis-wait-replicas: needs --redis"]),
            (
                &["--redis=rediss://localhost", "--redis-ca-file=/missing.pem"],
                &["--redis-ca-file: the certificates /missing.pem: "],
            ),
            (&["--redis=localhost:6379"], &["--redis: ", "`redis://HOST"]),
            (&["--redis=foo"], &["--redis: ", "`redis-cluster://"]),
            (
                &["--redis=http://localhost"],
                &["--redis: ", "`redis+unix://"],
            ),
        ] {
            let text = check(flags).unwrap_err().to_string();
            for problem in problems {
                assert!(text.contains(problem), "{problem} is missing in:\n{text}");
            }
        }
    }

    #[test]
    fn only_a_cluster_needs_a_prefix_of_keys() {
        for cluster in ["redis-cluster://a", "redis://a,b"] {
            let redis = format!("--redis={cluster}");
            assert!(check(&[&redis]).is_ok());
            let problems = check(&[&redis, "--key-prefix="]).unwrap_err();
            let said = &problems.0[..];
            let rule = "--key-prefix: must not be empty with a Redis Cluster";
            assert!(matches!(said, [one] if one.starts_with(rule)), "{said:?}");
        }
        assert!(check(&["--redis=redis://a", "--key-prefix="]).is_ok());
        assert!(check(&["--key-prefix="]).is_ok());
    }

    #[test]
    fn a_public_address_needs_to_be_asked_for() {
        assert!(check(&["--listen=0.0.0.0:50051"]).is_err());
        assert!(check(&["--listen=[::]:50051"]).is_err());
        assert!(check(&["--listen=0.0.0.0:50051", "--insecure"]).is_ok());
        assert!(check(&["--listen=127.0.0.1:0,unix:/tmp/x.sock,[::1]:0"]).is_ok());
        assert!(check(&["--metrics-listen=0.0.0.0:9464"]).is_err());
        assert!(check(&["--metrics-listen=unix:/tmp/x.sock"]).is_err());
        assert!(check(&["--metrics-listen=0.0.0.0:9464", "--insecure"]).is_ok());
        assert!(check(&["--metrics-listen=127.0.0.1:0"]).is_ok());
    }

    #[test]
    fn a_secret_does_not_print() {
        let config = check(&["--redis=redis://user:hunter2@localhost"]).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
        let args = ["chat-memory", "--redis=redis://user:hunter2@localhost"];
        let cli = Cli::try_parse_from(args).unwrap();
        assert!(!format!("{cli:?}").contains("hunter2"));
    }
}
