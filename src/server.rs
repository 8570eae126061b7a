//! From listeners to a running server, and from a signal to its orderly end. Reads no settings of
//! its own and opens no ports but those it is given.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::{
    body::Body,
    server::NamedService as _,
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::{
    layer::layer_fn,
    util::{MapResponseLayer, option_layer},
};

use crate::{
    config::Listen,
    error, metrics,
    pb::chat_memory_server::ChatMemoryServer,
    service::{self, Limits, Service},
    socket::Socket,
    store::Store,
    telemetry,
    turn::Turns,
    workers::{Place, Workers},
};

/// The descriptors of our proto, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/chatmemory.v1.bin"));

/// Bytes of a request at most. Its messages are at most 3 MiB; the rest is room for the fields
/// around them.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// How long an unanswered probe is waited for before its connection is closed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long connections get to send what they have once nothing runs any more. A client that keeps
/// a health watch open would otherwise hold the server for the whole drain.
const FLUSH_LIMIT: Duration = Duration::from_millis(500);

/// Connections that a worker has not begun to serve, at most; others wait to be accepted.
const ACCEPTED_MAX: usize = 64;

/// The pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// How long aborted turns get to tell their clients.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    /// The file goes when the listener does.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Listens. A Unix socket that a dead server left is replaced; a live one's is not.
    pub async fn bind(address: &Listen, unix_mode: u32) -> io::Result<Self> {
        match address {
            Listen::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Listen::Unix(path) => {
                remove_dead_socket(path).await?;
                let listener = UnixListener::bind(path)?;
                let file = SocketFile(path.clone());
                fs::set_permissions(path, fs::Permissions::from_mode(unix_mode))?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    /// Where it listens, with the port that port 0 became.
    pub fn address(&self) -> io::Result<Listen> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Listen::Tcp),
            Self::Unix(_, SocketFile(path)) => Ok(Listen::Unix(path.clone())),
        }
    }
}

async fn remove_dead_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let text = "the path exists and is not a socket";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => {
            let text = "another server listens on this socket";
            Err(io::Error::new(io::ErrorKind::AddrInUse, text))
        }
    }
}

/// A socket's file, which is removed on drop.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nothing depends on it: a socket that stays is replaced by the next start.
        fs::remove_file(&self.0).ok();
    }
}

/// What a server is made of.
pub struct Parts {
    pub listeners: Vec<Listener>,
    /// Who serves the connections.
    pub workers: Workers,
    pub store: Arc<dyn Store>,
    pub turns: Turns,
    pub limits: Limits,
    /// Calls at once on one connection, at most.
    pub streams_max: u32,
    /// Silence after which a connection is probed.
    pub keepalive: Duration,
    /// How long running calls get to finish.
    pub drain_limit: Duration,
}

/// Serves until `shutdown` is cancelled, then drains: says NOT_SERVING, accepts no connection, lets
/// the calls that run finish within the limit, and ends what is left.
///
/// The caller binds and the caller decides when to stop, so a test can do both.
pub async fn run(parts: Parts, shutdown: CancellationToken) -> io::Result<()> {
    let service = Service::new(Arc::clone(&parts.store), parts.turns.clone(), parts.limits);
    let (reporter, health) = tonic_health::server::health_reporter();
    report(&reporter, &*parts.store).await;
    let memory = ChatMemoryServer::new(service.clone())
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(usize::MAX);
    let others = Routes::new(health).prepare();
    let services = Services { memory, others };

    let stop_accepting = CancellationToken::new();
    let mut serving = JoinSet::new();
    let mut queues = Vec::new();
    for worker in parts.workers.handles() {
        let (queue, accepted) = mpsc::channel(ACCEPTED_MAX);
        queues.push(queue);
        let server = Server::builder()
            .layer(telemetry::call_log())
            .layer(option_layer(metrics::are_on().then(|| layer_fn(Measured))))
            .layer(MapResponseLayer::new(error::complete))
            .max_concurrent_streams(parts.streams_max)
            .http2_keepalive_interval(Some(parts.keepalive))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
        let sockets = ReceiverStream::new(accepted).map(Accepted::open);
        let stop = stop_accepting.clone().cancelled_owned();
        let serve = server.serve_with_incoming_shutdown(services.clone(), sockets, stop);
        serving.spawn_on(serve, worker);
    }
    let workers = Arc::new(parts.workers);
    let mut accepting = JoinSet::new();
    let mut socket_files = Vec::new();
    for listener in parts.listeners {
        let (workers, queues) = (Arc::clone(&workers), queues.clone());
        match listener {
            Listener::Tcp(listener) => {
                let incoming = TcpIncoming::from(listener)
                    .with_nodelay(Some(true))
                    .with_keepalive(Some(parts.keepalive))
                    .map(|stream| stream.and_then(TcpStream::into_std).map(Either::Left));
                accepting.spawn(accept(incoming, workers, queues));
            }
            Listener::Unix(listener, file) => {
                let incoming = UnixListenerStream::new(listener)
                    .map(|stream| stream.and_then(UnixStream::into_std).map(Either::Right));
                socket_files.push(file);
                accepting.spawn(accept(incoming, workers, queues));
            }
        }
    }
    drop(queues);

    let mut reachable = parts.store.reachable();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = reachable.changed() => {
                report(&reporter, &*parts.store).await;
                if changed.is_err() {
                    // The store has stopped watching itself; its last word stands.
                    shutdown.cancelled().await;
                    break;
                }
            }
        }
    }

    tracing::info!(
        turns = parts.turns.running(),
        limit_seconds = parts.drain_limit.as_secs(),
        "draining"
    );
    for name in SERVICES {
        reporter
            .set_service_status(name, ServingStatus::NotServing)
            .await;
    }
    accepting.shutdown().await;
    stop_accepting.cancel();
    service.end_watchers();
    let limit = Instant::now() + parts.drain_limit;
    let finished = async {
        parts.turns.finish().await;
        service.idle().await;
    };
    if timeout_at(limit, finished).await.is_err() {
        tracing::warn!(
            turns = parts.turns.running(),
            "the drain's limit is reached"
        );
        parts.turns.abort();
        timeout(ABORT_LIMIT, service.idle()).await.ok();
    }
    let flushed = async { while serving.join_next().await.is_some() {} };
    timeout(FLUSH_LIMIT, flushed).await.ok();
    Ok(())
}

/// A connection that no runtime looks after yet.
type Unserved = Either<std::net::TcpStream, std::os::unix::net::UnixStream>;

/// One that has a worker.
struct Accepted {
    stream: Unserved,
    place: Place,
}

impl Accepted {
    /// Has the worker's runtime look after it, within which this is called.
    fn open(self) -> io::Result<Socket<Either<TcpStream, UnixStream>>> {
        let stream = match self.stream {
            Either::Left(stream) => Either::Left(TcpStream::from_std(stream)?),
            Either::Right(stream) => Either::Right(UnixStream::from_std(stream)?),
        };
        Ok(Socket::new(stream).at(self.place))
    }
}

/// Gives each connection that comes in to a worker.
async fn accept(
    incoming: impl Stream<Item = io::Result<Unserved>>,
    workers: Arc<Workers>,
    queues: Vec<mpsc::Sender<Accepted>>,
) {
    let mut incoming = pin!(incoming);
    while let Some(accepted) = incoming.next().await {
        match accepted {
            Ok(stream) => {
                let place = workers.place();
                let queue = &queues[place.worker];
                // None is served any more where this fails.
                queue.send(Accepted { stream, place }).await.ok();
            }
            // The peer is gone already; or there are too many open files, which may last.
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Has the metrics measure each call.
#[derive(Clone)]
struct Measured<S>(S);

impl<S> tower::Service<http::Request<Body>> for Measured<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        Box::pin(metrics::measure(path, self.0.call(request)))
    }
}

/// All services. Ours is called directly: tonic's router, which any number of services can be added to,
/// makes a sixth of the memory allocations of a call.
#[derive(Clone)]
struct Services {
    memory: ChatMemoryServer<Service>,
    others: Routes,
}

impl tower::Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Either<
        <ChatMemoryServer<Service> as tower::Service<http::Request<Body>>>::Future,
        <Routes as tower::Service<http::Request<Body>>>::Future,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        tower::Service::<http::Request<Body>>::poll_ready(&mut self.others, context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        if service == ChatMemoryServer::<Service>::NAME {
            service::note_deadline(&mut request);
            Either::Left(self.memory.call(request))
        } else if service.starts_with(REFLECTION_PREFIX) {
            Either::Right(REFLECTION.clone().call(request))
        } else {
            Either::Right(self.others.call(request))
        }
    }
}

/// What the names of all versions of reflection begin with.
const REFLECTION_PREFIX: &str = "grpc.reflection.";

/// Describes the services to clients such as grpcurl. It is made when somebody first asks: it holds each
/// comment of the proto twice, and most servers are never asked.
static REFLECTION: LazyLock<Routes> = LazyLock::new(|| {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that grpcurl shows the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = builder().build_v1();
    // Clients older than 2023, and some newer ones, ask for v1alpha only.
    let v1alpha = builder().build_v1alpha();
    Routes::new(v1.expect("descriptors that were built with this program"))
        .add_service(v1alpha.expect("descriptors that were built with this program"))
        .prepare()
});

/// The names that health knows: ours, and "" for the server as a whole.
const SERVICES: [&str; 2] = ["", ChatMemoryServer::<Service>::NAME];

async fn report(reporter: &HealthReporter, store: &dyn Store) {
    let reachable = *store.reachable().borrow();
    metrics::store_is(reachable);
    let status = if reachable {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    if reachable {
        tracing::info!(store = store.describe(), "the store can be reached");
    } else {
        tracing::warn!(store = store.describe(), "the store cannot be reached");
    }
    join_all(SERVICES.map(|name| reporter.set_service_status(name, status))).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn the_descriptors_hold_our_service() {
        let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let file = set
            .file
            .iter()
            .find(|file| file.package() == "chatmemory.v1")
            .unwrap();
        assert_eq!(file.service[0].name(), "ChatMemory");
    }
}
