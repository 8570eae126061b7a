//! A TCP proxy on the loopback, which fails as networks do when told to.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to connections, the open ones and the new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Bytes pass.
    Forward,
    /// Bytes pass later, in both directions.
    Delay(Duration),
    /// Half-open: bytes are taken and go nowhere, and nothing comes back. Connecting works. A
    /// connection that has lost bytes so stays silent for ever, whatever the mode becomes.
    Silent,
    /// New connections are closed at once; open ones stay as they are.
    Refuse,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// To the server.
    Requests,
    /// To the client.
    Replies,
}

/// A proxy before a server. It ends when this is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    upstream: String,
    mode: watch::Sender<Mode>,
    /// Changes when all open connections are to be closed.
    cuts: watch::Sender<u64>,
    /// Changes when a half of all open connections is to be closed.
    half_cuts: watch::Sender<Option<Half>>,
    /// The next request that holds these bytes gets no reply: its connection is closed instead.
    unanswered: Mutex<Option<Vec<u8>>>,
    /// How many replies were lost so.
    lost: AtomicUsize,
    /// How many connections were made to this proxy.
    accepted: AtomicUsize,
}

impl Proxy {
    /// Starts a proxy before the server at `upstream` (`127.0.0.1:6379`).
    pub async fn start(upstream: impl Into<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("a bound port");
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            mode: watch::Sender::new(Mode::Forward),
            cuts: watch::Sender::new(0),
            half_cuts: watch::Sender::new(None),
            unanswered: Mutex::new(None),
            lost: AtomicUsize::new(0),
            accepted: AtomicUsize::new(0),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Self {
            address,
            shared,
            task,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The proxy as a Redis URL.
    pub fn redis_url(&self) -> String {
        format!("redis://{}/", self.address)
    }

    pub fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Closes all open connections.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Ends one direction of all open connections, as a peer does that says no more but listens
    /// still. The bytes of that direction go nowhere then; those of the other one pass.
    pub fn half_close(&self, half: Half) {
        self.shared.half_cuts.send_replace(Some(half));
    }

    /// Lets the next request that holds these bytes pass, and closes its connection in place of the
    /// reply. The bytes must come in one piece: take short ones.
    pub fn lose_reply_to(&self, bytes: &[u8]) {
        *self.shared.unanswered.lock().expect("lock") = Some(bytes.to_owned());
    }

    /// How many replies [`Proxy::lose_reply_to`] has lost.
    pub fn lost(&self) -> usize {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// How many connections were made so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        shared.accepted.fetch_add(1, Ordering::SeqCst);
        if *shared.mode.borrow() != Mode::Refuse {
            tokio::spawn(relay(client, shared.clone()));
        }
    }
}

/// Carries one connection until either side closes it or it is cut.
async fn relay(client: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    cuts.mark_unchanged();
    let Ok(server) = TcpStream::connect(&shared.upstream).await else {
        return;
    };
    // The proxy must not be what delays.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // Whether the reply to come is to be lost.
    let losing = watch::Sender::new(false);
    let silent = watch::Sender::new(false);

    let requests = async {
        let half = Half::Requests;
        pump(half, from_client, to_server, &shared, &silent, |bytes| {
            let mut unanswered = shared.unanswered.lock().expect("lock");
            if unanswered.as_ref().is_some_and(|part| holds(bytes, part)) {
                *unanswered = None;
                losing.send_replace(true);
            }
            true
        })
        .await;
    };
    let replies = async {
        let half = Half::Replies;
        pump(half, from_server, to_client, &shared, &silent, |_| {
            let is_lost = *losing.borrow();
            if is_lost {
                shared.lost.fetch_add(1, Ordering::SeqCst);
            }
            !is_lost
        })
        .await;
    };
    tokio::select! {
        () = requests => {}
        () = replies => {}
        _ = cuts.changed() => {}
    }
}

/// Carries bytes in one direction, as the mode says, until the end or until `look` says no.
async fn pump(
    half: Half,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    silent: &watch::Sender<bool>,
    look: impl Fn(&[u8]) -> bool,
) {
    let mut half_cuts = shared.half_cuts.subscribe();
    half_cuts.mark_unchanged();
    let mut is_closed = false;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            Ok(()) = half_cuts.changed() => {
                if *half_cuts.borrow_and_update() == Some(half) {
                    is_closed = true;
                    drop(to.shutdown().await);
                }
                continue;
            }
        };
        let count = match read {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let mode = *shared.mode.borrow();
        if is_closed || *silent.borrow() {
            continue;
        }
        match mode {
            Mode::Forward | Mode::Refuse => {}
            Mode::Delay(pause) => tokio::time::sleep(pause).await,
            Mode::Silent => {
                silent.send_replace(true);
                continue;
            }
        }
        let bytes = &buffer[..count];
        if !look(bytes) || to.write_all(bytes).await.is_err() {
            return;
        }
    }
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
