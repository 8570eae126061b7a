//! The connection to one Redis: one task makes it, watches it and makes it anew; callers only use it.
//! Knows nothing of what is asked over it, and of no other Redis ([`super::router`] does).
//!
//! Callers never connect. A connection that has died without a word (its peer gone, a firewall that
//! forgot it) is found by a ping each second or by a call without an answer, whichever is first,
//! and is given up at once, with all the calls that wait on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{MultiplexedConnection, PubSub};
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ErrorKind, IntoConnectionInfo as _, RedisConnectionInfo,
    RedisError, Value,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use super::InvalidSettings;
use super::cluster::{key_of, tag_of};
use super::invocation::{Invocation, for_each};
use super::sentinel::Sentinels;
use crate::workers;

/// How long a call waits for a connection when there is none.
pub(super) const CONNECTION_WAIT: Duration = Duration::from_secs(1);
/// How often the connection is tried.
const PING_EVERY: Duration = Duration::from_secs(1);
/// The pause after the first failure to connect; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Commands that wait to be written to the connection, at most; others queue behind them.
const QUEUE_MAX: usize = 1024;
/// How long a connection may be idle before the kernel asks the peer whether it is there. The pings
/// are quicker; this is for connections that only the kernel still holds.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// The oldest Redis that has all that the scripts use.
const VERSION_MIN: (u32, u32) = (6, 2);
/// What a URL may be.
const FORMS: &str = "must be such as `redis://HOST[:PORT][/DB]`, `rediss://…`, `redis+unix:///PATH`, \
    `redis-sentinel://HOST,…/MASTER` or `redis-cluster://HOST,…`";
/// Characters of an error of Redis that are passed on.
const ERROR_CHARS_MAX: usize = 300;

/// Where Redis is and how to speak to it.
#[derive(Clone)]
pub(super) struct Server {
    address: Address,
    handshake: RedisConnectionInfo,
    timeout: Duration,
    /// One of many, which may be a replica: it says itself where the master is.
    is_in_cluster: bool,
}

#[derive(Clone)]
pub(super) enum Address {
    Tcp {
        host: String,
        port: u16,
    },
    Tls {
        host: String,
        port: u16,
        tls: Tls,
    },
    Unix(PathBuf),
    /// Where these say, at the time.
    Sentinels(Sentinels),
}

#[derive(Clone)]
pub(super) struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Address {
    /// A server's, over TCP. With TLS, its certificate must name that host.
    pub(super) fn of(host: &str, port: u16, tls: Option<&TlsConnector>) -> Result<Self, String> {
        let host = host.to_owned();
        Ok(match tls {
            Some(connector) => {
                let name = ServerName::try_from(host.clone()).map_err(|error| error.to_string())?;
                let connector = connector.clone();
                let tls = Tls { connector, name };
                Self::Tls { host, port, tls }
            }
            None => Self::Tcp { host, port },
        })
    }
}

impl Server {
    /// Reads a URL as redis-rs does, and the certificates to trust where it asks for TLS.
    pub(super) fn new(
        url: &str,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, InvalidSettings> {
        if let Some((scheme @ ("redis" | "rediss"), rest)) = url.split_once("-sentinel://") {
            let is_tls = scheme == "rediss";
            let tls = is_tls.then(|| tls_connector(ca_file)).transpose()?;
            let parsed = Sentinels::parse(rest, tls).map_err(InvalidSettings::Url)?;
            return Self::checked(Address::Sentinels(parsed.0), parsed.1, ca_file, timeout);
        }
        if redis::parse_redis_url(url).is_none() {
            return Err(InvalidSettings::Url(FORMS.to_owned()));
        }
        let info = url
            .into_connection_info()
            .map_err(|error| InvalidSettings::Url(explain(&error)))?;
        let address = match info.addr() {
            ConnectionAddr::Tcp(host, port) => Address::Tcp {
                host: host.clone(),
                port: *port,
            },
            ConnectionAddr::TcpTls { insecure: true, .. } => {
                let reason = "`#insecure` is not supported: name the certificate to trust";
                return Err(InvalidSettings::Url(reason.to_owned()));
            }
            ConnectionAddr::TcpTls { host, port, .. } => {
                let name = ServerName::try_from(host.clone())
                    .map_err(|error| InvalidSettings::Url(error.to_string()))?;
                let connector = tls_connector(ca_file)?;
                Address::Tls {
                    host: host.clone(),
                    port: *port,
                    tls: Tls { connector, name },
                }
            }
            ConnectionAddr::Unix(path) => Address::Unix(path.clone()),
            other => {
                let reason = format!("addresses like {other} are not supported");
                return Err(InvalidSettings::Url(reason));
            }
        };
        Self::checked(address, info.redis_settings().clone(), ca_file, timeout)
    }

    fn checked(
        address: Address,
        handshake: RedisConnectionInfo,
        ca_file: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, InvalidSettings> {
        let is_tls = match &address {
            Address::Tls { .. } => true,
            Address::Sentinels(sentinels) => sentinels.is_tls(),
            Address::Tcp { .. } | Address::Unix(_) => false,
        };
        if let (Some(path), false) = (ca_file, is_tls) {
            return Err(InvalidSettings::Certificates {
                path: path.to_owned(),
                reason: "is of use with `rediss` URLs only".to_owned(),
            });
        }
        Ok(Self {
            address,
            handshake: handshake.set_lib_name("chat-memory", env!("CARGO_PKG_VERSION")),
            timeout,
            is_in_cluster: false,
        })
    }

    /// A node of a cluster that this server belongs to.
    pub(super) fn node(&self, host: &str, port: u16) -> Result<Self, String> {
        let tls = match &self.address {
            Address::Tls { tls, .. } => Some(&tls.connector),
            _ => None,
        };
        Ok(Self {
            address: Address::of(host, port, tls)?,
            is_in_cluster: true,
            ..self.clone()
        })
    }

    /// Where Redis is, without secrets.
    pub(super) fn describe(&self) -> String {
        let place = match &self.address {
            Address::Tcp { host, port } => format!("{host}:{port}"),
            Address::Tls { host, port, .. } => format!("{host}:{port} with TLS"),
            Address::Unix(path) => path.display().to_string(),
            Address::Sentinels(sentinels) => sentinels.describe(),
        };
        format!("Redis at {place}, database {}", self.handshake.db())
    }

    /// Connects, logs in, and finds out whether this Redis will do.
    async fn connect(&self) -> Result<Live, String> {
        let stream = self.dial().await?;
        // Whoever waits for an answer limits the wait: a limit of the library's would be a second one.
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUE_MAX);
        let (mut connection, driver) =
            MultiplexedConnection::new_with_config(&self.handshake, stream, config)
                .await
                .map_err(|error| explain(&error))?;

        let broken = CancellationToken::new();
        // The driver ends when Redis closes the connection: that is known at once, without a call.
        let ends = broken.clone().drop_guard();
        let driver = tokio::spawn(async move {
            let _ends = ends;
            driver.await;
        });
        // Held from here on: whoever gives this attempt up ends the driver with it.
        let driver = Arc::new(AbortOnDropHandle::new(driver));
        ping(&mut connection).await?;
        let info = info(&mut connection).await?;
        check_info(&info, self.is_in_cluster)?;
        Ok(Live {
            connection,
            broken,
            run_id: value_of(&info, "run_id").unwrap_or_default().into(),
            _driver: driver,
        })
    }

    /// Opens a connection that is told of what is published.
    pub(super) async fn subscriber(&self) -> Result<PubSub, String> {
        let connecting = async {
            let stream = self.dial().await?;
            let connection = PubSub::new(&self.handshake, stream).await;
            connection.map_err(|error| explain(&error))
        };
        let limit_ms = self.timeout.as_millis();
        time::timeout(self.timeout, connecting)
            .await
            .unwrap_or_else(|_| Err(format!("no connection in {limit_ms} ms")))
    }

    /// How long an answer may take.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    async fn dial(&self) -> Result<Box<dyn Stream>, String> {
        let dialled = match &self.address {
            Address::Sentinels(sentinels) => dial(&sentinels.master(self.timeout).await?).await,
            address => dial(address).await,
        };
        dialled.map_err(|error| error.to_string())
    }
}

/// Opens a stream to one server, whose address is known.
pub(super) async fn dial(address: &Address) -> std::io::Result<Box<dyn Stream>> {
    Ok(match address {
        Address::Tcp { host, port } => Box::new(dial_tcp(host, *port).await?),
        Address::Tls { host, port, tls } => {
            let stream = dial_tcp(host, *port).await?;
            Box::new(tls.connector.connect(tls.name.clone(), stream).await?)
        }
        Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Address::Sentinels(_) => return Err(std::io::ErrorKind::Unsupported.into()),
    })
}

async fn dial_tcp(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE / 3);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(KEEPALIVE))?;
    // A connection that is given up must not deliver what it still holds: a write that arrives
    // long after its repetition could undo a clear.
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(stream)
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

fn tls_connector(ca_file: Option<&Path>) -> Result<TlsConnector, InvalidSettings> {
    let mut roots = rustls::RootCertStore::empty();
    // Some certificates of a system are often unreadable; what counts is what is left.
    let of_system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(of_system.certs);
    if let Some(path) = ca_file {
        let invalid = |reason: String| InvalidSettings::Certificates {
            path: path.to_owned(),
            reason,
        };
        let mut count = 0;
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| invalid(error.to_string()))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| invalid(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| invalid(error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(invalid("holds no certificate".to_owned()));
        }
    }
    if roots.is_empty() {
        let reason = "`rediss://` needs certificates to trust, and the system has none";
        return Err(InvalidSettings::Url(reason.to_owned()));
    }
    // The provider is named, so that nothing depends on what `main` installs.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| InvalidSettings::Url(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Asks for any answer. Redis refuses a ping to some users (NOPERM) and with a full disk (MISCONF),
/// where reads still work: these are answers too.
async fn ping(connection: &mut MultiplexedConnection) -> Result<(), String> {
    match redis::cmd("PING").exec_async(connection).await {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.code(), Some("NOPERM" | "MISCONF")) => Ok(()),
        Err(error) => Err(explain(&error)),
    }
}

/// What Redis says about itself; nothing if this user may not ask.
async fn info(connection: &mut MultiplexedConnection) -> Result<String, String> {
    let mut text = String::new();
    for section in ["server", "replication"] {
        let mut command = redis::cmd("INFO");
        match command.arg(section).query_async::<String>(connection).await {
            Ok(lines) => text.push_str(&lines),
            Err(error) if error.code() == Some("NOPERM") => {}
            Err(error) => return Err(explain(&error)),
        }
    }
    Ok(text)
}

fn value_of<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

/// Whether this Redis will do.
fn check_info(info: &str, is_in_cluster: bool) -> Result<(), String> {
    // Valkey says `redis_version:7.2.4`, too.
    if let Some(version) = value_of(info, "redis_version") {
        let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
        let found: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if found < VERSION_MIN {
            let (major, minor) = VERSION_MIN;
            return Err(format!(
                "this is Redis {version}, and {major}.{minor} or later is needed"
            ));
        }
    }
    // Valkey has a name of its own. A node would show its own sessions only, and refuse the others'.
    let mode = value_of(info, "redis_mode").or_else(|| value_of(info, "server_mode"));
    if !is_in_cluster && mode == Some("cluster") {
        return Err(
            "this Redis is a node of a cluster: its URL begins with `redis-cluster://`, or \
             `rediss-cluster://` with TLS"
                .to_owned(),
        );
    }
    // After a failover, the address may lead to the old master for a while.
    if !is_in_cluster && value_of(info, "role") == Some("slave") {
        return Err("this Redis is a replica, which cannot be written to".to_owned());
    }
    Ok(())
}

/// The first error of several commands', as it is when a command is sent alone.
pub(super) fn first_of(error: RedisError) -> RedisError {
    let errors = error.clone().into_server_errors();
    match errors.as_deref() {
        Some([(_, first), ..]) => first.clone().into(),
        _ => error,
    }
}

/// Says what went wrong, without what was sent.
pub(super) fn explain(error: &RedisError) -> String {
    let text = match (error.kind(), error.code(), error.detail()) {
        (ErrorKind::AuthenticationFailed, ..) => {
            "Redis refused the user name or the password".to_owned()
        }
        (_, Some(code), Some(detail)) => format!("{code} {detail}"),
        _ if error.is_timeout() => "no answer in time".to_owned(),
        _ => error.to_string(),
    };
    text.chars().take(ERROR_CHARS_MAX).collect()
}

/// Whether a replica refused a write.
pub(super) fn is_read_only(error: &RedisError) -> bool {
    // Redis 6 wraps the errors of commands in scripts into one of its own, hence not the code.
    explain(error).contains("READONLY ")
}

/// A connection in use.
#[derive(Clone)]
struct Live {
    connection: MultiplexedConnection,
    /// Cancelled when it turns out not to work any more, by whoever notices first.
    broken: CancellationToken,
    /// Names this run of Redis: another one after each restart. Empty if it is not told.
    run_id: Arc<str>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

/// What there is now.
enum State {
    Connected(Live),
    /// Why not.
    Disconnected(String),
}

/// Why a call has no result.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// It was never sent.
    NotSent(String),
    /// It was sent, and its answer did not come.
    NoAnswer(String),
    /// Redis answered with an error.
    Refused(RedisError),
}

/// The users' end of the connection. When it is dropped, the connection is closed.
pub(super) struct Node {
    state: watch::Receiver<State>,
    reachable: watch::Receiver<bool>,
    timeout: Duration,
    _stop: DropGuard,
}

impl Node {
    /// Starts to connect, and to keep connected; does not wait for it. Must be called within a
    /// Tokio runtime.
    pub(super) fn start(target: Server) -> Self {
        let (state_sender, state) =
            watch::channel(State::Disconnected("not connected yet".to_owned()));
        let (reachable_sender, reachable) = watch::channel(false);
        let timeout = target.timeout;
        let stop = CancellationToken::new();
        let supervisor = supervise(target, state_sender, reachable_sender);
        tokio::spawn(stop.clone().run_until_cancelled_owned(supervisor));
        Self {
            state,
            reachable,
            timeout,
            _stop: stop.drop_guard(),
        }
    }

    pub(super) fn reachable(&self) -> watch::Receiver<bool> {
        self.reachable.clone()
    }

    /// Waits for a connection, up to a limit.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), String> {
        self.live(limit).await.map(|_| ())
    }

    /// Runs a script that may be run twice: if its answer does not come, it is run once more, on a
    /// new connection. Takes at most twice [`CONNECTION_WAIT`] and the timeout.
    pub(super) async fn run_repeatable(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        match self.run(script).await {
            // Refused before its first write: its place is elsewhere by now, which the next
            // connection finds out.
            Err(Failure::Refused(error)) if is_read_only(&error) => self.run(script).await,
            Err(Failure::NoAnswer(reason)) => {
                let second = self.run(script).await;
                // Whatever the second attempt fails from, the first may have arrived.
                second.map_err(|_| Failure::NoAnswer(reason))
            }
            first => first,
        }
    }

    /// Runs a script once. Takes at most [`CONNECTION_WAIT`] and the timeout.
    pub(super) async fn run(&self, script: &Invocation<'_>) -> Result<Value, Failure> {
        let live = self.live(CONNECTION_WAIT).await.map_err(Failure::NotSent)?;
        let mut connection = live.connection.clone();
        // The answer includes loading the script, if Redis does not have it. NOSCRIPT means that
        // nothing was run, so that running it again after that is safe.
        self.settle(&live, script.run(&mut connection)).await
    }

    /// Waits for an answer, and gives the connection up if it does not come.
    async fn settle<T>(
        &self,
        live: &Live,
        answer: impl Future<Output = redis::RedisResult<T>>,
    ) -> Result<T, Failure> {
        match time::timeout(self.timeout, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Parse) => {
                live.broken.cancel();
                Err(Failure::NoAnswer(explain(&error)))
            }
            Ok(Err(error)) => {
                if is_read_only(&error) {
                    // The master has become a replica: look for the new one.
                    live.broken.cancel();
                }
                Err(Failure::Refused(error))
            }
            Err(_) => {
                live.broken.cancel();
                let limit_ms = self.timeout.as_millis();
                Err(Failure::NoAnswer(format!("no answer in {limit_ms} ms")))
            }
        }
    }

    /// Sends commands, some of them with ASKING before, and takes their answers, errors among them.
    /// Says also which run of Redis answered. Waits so long for a connection.
    pub(super) async fn send(
        &self,
        commands: &[(&redis::Cmd, bool)],
        limit: Duration,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        self.send_until(commands, limit, None).await
    }

    /// Sends commands; where it says so, there is no answer before replicas have what was written.
    pub(super) async fn send_until(
        &self,
        commands: &[(&redis::Cmd, bool)],
        limit: Duration,
        copied: Option<&Copied>,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        let live = self.live(limit).await.map_err(Failure::NotSent)?;
        let mut connection = live.connection.clone();
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        for (command, asks) in commands {
            if *asks {
                pipeline.cmd("ASKING");
            }
            pipeline.add_command((*command).clone());
            if let Some(copied) = copied {
                copied.add_to(&mut pipeline, command, *asks);
            }
        }
        let answer = pipeline.query_async::<Vec<Value>>(&mut connection);
        let mut values = self.settle(&live, answer).await?.into_iter();
        let mut answers = Vec::with_capacity(commands.len());
        for (_, asks) in commands {
            if *asks {
                values.next();
            }
            let answer = values.next().unwrap_or_default();
            if let Value::ServerError(error) = &answer
                && is_read_only(&error.clone().into())
            {
                live.broken.cancel();
            }
            if let Some(copied) = copied {
                let is_refused = matches!(answer, Value::ServerError(_));
                let result = copied.check(&mut values, *asks);
                // What was refused was not written: nothing had to be copied.
                if !is_refused {
                    result.map_err(Failure::NoAnswer)?;
                }
            }
            answers.push(answer);
        }
        Ok((answers, live.run_id))
    }

    /// Runs plain commands that may be run twice: twice, like a script, if the answer does not come.
    /// Says also which run of Redis answered.
    pub(super) async fn query(
        &self,
        commands: &redis::Pipeline,
    ) -> Result<(Vec<Value>, Arc<str>), Failure> {
        let mut is_second = false;
        loop {
            let live = self.live(CONNECTION_WAIT).await.map_err(Failure::NotSent)?;
            let mut connection = live.connection.clone();
            let answer = async {
                let answer = commands.query_async(&mut connection).await;
                answer.map_err(first_of)
            };
            match self.settle(&live, answer).await {
                Ok(values) => return Ok((values, live.run_id)),
                Err(Failure::NoAnswer(_)) if !is_second => is_second = true,
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Runs a script once for each of these keys and arguments, in one round trip. It may be run
    /// twice.
    pub(super) async fn run_for_each(
        &self,
        script: &redis::Script,
        calls: &[(Vec<&str>, [&str; 2])],
    ) -> Result<Vec<Value>, Failure> {
        let commands = &for_each(script, calls);
        let mut answer = self.query(commands).await;
        if let Err(Failure::Refused(error)) = &answer
            && error.code() == Some("NOSCRIPT")
        {
            let live = self.live(CONNECTION_WAIT).await.map_err(Failure::NotSent)?;
            let mut connection = live.connection.clone();
            let invocation = script.prepare_invoke();
            self.settle(&live, invocation.load_async(&mut connection))
                .await?;
            answer = self.query(commands).await;
        }
        answer.map(|(values, _)| values)
    }

    /// A connection that is not known to be broken; or why there was none within the limit.
    async fn live(&self, limit: Duration) -> Result<Live, String> {
        // As a rule there is one.
        if let State::Connected(live) = &*self.state.borrow()
            && !live.broken.is_cancelled()
        {
            return Ok(live.clone());
        }
        let mut state = self.state.clone();
        let is_usable = |state: &State| match state {
            State::Connected(live) => !live.broken.is_cancelled(),
            State::Disconnected(_) => false,
        };
        // Both a passed limit and the end of the supervisor leave the state to be looked at.
        let _ = time::timeout(limit, state.wait_for(is_usable)).await;
        match &*self.state.borrow() {
            State::Connected(live) if !live.broken.is_cancelled() => Ok(live.clone()),
            State::Connected(_) => Err("the connection was lost".to_owned()),
            State::Disconnected(reason) => Err(reason.clone()),
        }
    }
}

/// Writes what has no meaning. Redis refuses SET when it is out of memory, but not to a script that has
/// written, as PERSIST counts even where it changes nothing.
const MARK: &str = "redis.call('PERSIST', KEYS[1]) return redis.call('SET', KEYS[1], '', 'PX', 1)";

/// How many replicas must have what was written, and how long they get.
#[derive(Clone)]
pub(super) struct Copied {
    pub(super) replicas: u32,
    pub(super) limit: Duration,
}

impl Copied {
    /// WAIT is about what its connection has written. A script that finds its request done writes
    /// nothing, though what it wrote the first time, over another connection, may not be copied yet:
    /// a write of no meaning comes between, which the replicas get after all that was before it.
    fn add_to(&self, pipeline: &mut redis::Pipeline, command: &redis::Cmd, asks: bool) {
        let mark = [b"{", tag_of(key_of(command)), b"}:wait"].concat();
        if asks {
            pipeline.cmd("ASKING");
        }
        pipeline.cmd("EVAL").arg(MARK).arg(1).arg(mark);
        let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        pipeline.cmd("WAIT").arg(self.replicas).arg(limit_ms.max(1));
    }

    /// Reads the answers to these.
    fn check(&self, values: &mut impl Iterator<Item = Value>, asks: bool) -> Result<(), String> {
        if asks {
            values.next();
        }
        let (mark, count) = (values.next(), values.next());
        match (mark, count) {
            (Some(Value::Okay), Some(Value::Int(count))) if count >= i64::from(self.replicas) => {
                Ok(())
            }
            (Some(Value::Okay), Some(Value::Int(count))) => Err(format!(
                "stored at the master, but {count} of {} replicas have it",
                self.replicas
            )),
            _ => Err("stored at the master; whether replicas have it is not known".to_owned()),
        }
    }
}

/// Keeps a connection, for ever.
async fn supervise(target: Server, state: watch::Sender<State>, reachable: watch::Sender<bool>) {
    let mut pause = PAUSE_MIN;
    loop {
        let attempt = time::timeout(target.timeout, target.connect()).await;
        let connected = attempt.unwrap_or_else(|_| {
            let limit_ms = target.timeout.as_millis();
            Err(format!("no connection in {limit_ms} ms"))
        });
        match connected {
            Ok(live) => {
                tracing::info!(redis = target.describe(), "connected");
                let since = Instant::now();
                // In this order: whoever finds it connected finds it reachable.
                reachable.send_replace(true);
                state.send_replace(State::Connected(live.clone()));
                let reason = watch_over(live, target.timeout).await;
                tracing::warn!(redis = target.describe(), reason, "connection lost");
                state.send_replace(State::Disconnected(reason));
                reachable.send_replace(false);
                pause = PAUSE_MIN;
                if since.elapsed() > PING_EVERY {
                    // It had worked for a while: try at once.
                    continue;
                }
            }
            Err(reason) => {
                let is_news =
                    !matches!(&*state.borrow(), State::Disconnected(known) if *known == reason);
                if is_news {
                    let worker = workers::index();
                    tracing::warn!(redis = target.describe(), worker, reason, "cannot connect");
                }
                state.send_replace(State::Disconnected(reason));
            }
        }
        time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Returns when a connection does not work any more, and why.
async fn watch_over(live: Live, timeout: Duration) -> String {
    let Live {
        mut connection,
        broken,
        _driver,
        ..
    } = live;
    let pings = async {
        let mut ticks = time::interval(PING_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match time::timeout(timeout, ping(&mut connection)).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => return reason,
                Err(_) => return format!("no answer in {} ms", timeout.as_millis()),
            }
        }
    };
    let reason = tokio::select! {
        () = broken.cancelled() => "the connection was lost".to_owned(),
        reason = pings => reason,
    };
    // No call may begin on it; those that wait for an answer learn now that none will come.
    broken.cancel();
    _driver.abort();
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Result<Server, InvalidSettings> {
        Server::new(url, None, Duration::from_secs(2))
    }

    #[test]
    fn a_target_is_described_without_its_user_and_its_password() {
        for (url, described) in [
            (
                "redis://alice:secret@localhost/3",
                "Redis at localhost:6379, database 3",
            ),
            (
                "redis://:secret@[::1]:7000",
                "Redis at ::1:7000, database 0",
            ),
            (
                "redis+unix:///run/redis.sock?db=2&user=alice&pass=secret",
                "Redis at /run/redis.sock, database 2",
            ),
            (
                "redis-sentinel://:secret@a:1,b:2/mymaster/4",
                "Redis at the master mymaster of Sentinels at a:1,b:2, database 4",
            ),
        ] {
            assert_eq!(target(url).ok().unwrap().describe(), described);
        }
    }

    #[test]
    fn a_url_that_makes_no_sense_is_refused_without_repeating_it() {
        for url in [
            "",
            "secret",
            "http://:secret@localhost",
            "redis://:secret@localhost/first",
            "redis://:secret@0.0.0.0",
            "rediss://:secret@localhost#insecure",
            "redis-sentinel://:secret@localhost",
            "rediss-sentinel://:secret@localhost",
            "http-sentinel://:secret@localhost/mymaster",
        ] {
            let error = target(url).err().expect(url).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn versions_and_roles_are_told_apart() {
        assert_eq!(check_info("", false), Ok(()));
        let valkey = "server_name:valkey\r\nvalkey_version:8.0.1\r\nredis_version:7.2.4\r\n";
        assert_eq!(check_info(valkey, false), Ok(()));
        assert_eq!(
            check_info("redis_version:6.2.0\r\nrole:master\r\n", false),
            Ok(())
        );
        assert_eq!(
            check_info("redis_version:6.0.16\r\n", false),
            Err("this is Redis 6.0.16, and 6.2 or later is needed".to_owned())
        );
        assert!(check_info("redis_version:7.0.15\r\nrole:slave\r\n", false).is_err());
        for mode in ["redis_mode:cluster\r\n", "server_mode:cluster\r\n"] {
            let refused = check_info(mode, false).unwrap_err();
            assert!(refused.contains("redis-cluster://"), "{refused}");
            assert_eq!(check_info(mode, true), Ok(()));
        }
        assert_eq!(check_info("redis_mode:standalone\r\n", false), Ok(()));
    }
}
