//! `hello`, a server that does nothing, so that it shows the limit of gRPC here. It has the server's
//! tonic, profile, threads and allocator; the last is why it is a program of its own.
//!
//! `chat-memory-hello SOCKET`

use std::{error::Error, thread};

use bytes::Bytes;
use tokio::{
    net::{TcpStream, UnixStream},
    runtime::Builder,
    sync::mpsc,
};
use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, service::Routes, transport::Server};

use self::pb::{
    SayRequest, SayResponse,
    hello_server::{Hello, HelloServer},
};

/// The generated types of `proto/bench/v1/bench.proto`.
#[allow(missing_docs, clippy::all)]
mod pb {
    tonic::include_proto!("bench.v1");
}

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

struct SayIt;

#[tonic::async_trait]
impl Hello for SayIt {
    async fn say(
        &self,
        request: Request<SayRequest>,
    ) -> std::result::Result<Response<SayResponse>, Status> {
        static FILLING: [u8; 64 << 10] = [b'x'; 64 << 10];
        let length = (request.get_ref().answer_bytes as usize).min(FILLING.len());
        let filling = Bytes::from_static(&FILLING[..length]);
        Ok(Response::new(SayResponse { filling }))
    }
}

/// Serves until the process is killed, over TCP and a Unix socket, on threads like the server's: one more
/// than cores, with the same scheduling policy, each with a runtime of its own, and connections in turns.
fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).ok_or("where is the socket?")?;
    take_turns();
    let (mut tcp, mut unix) = (Vec::new(), Vec::new());
    for _ in 0..=thread::available_parallelism()?.get() {
        let (queue, accepted) = mpsc::unbounded_channel();
        tcp.push(queue);
        let of_tcp = UnboundedReceiverStream::new(accepted).map(TcpStream::from_std);
        let (queue, accepted) = mpsc::unbounded_channel();
        unix.push(queue);
        let of_unix = UnboundedReceiverStream::new(accepted).map(UnixStream::from_std);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let routes = Routes::new(HelloServer::new(SayIt));
        let server = move || Server::builder().add_routes(routes.clone());
        thread::spawn(move || {
            runtime.block_on(async {
                tokio::join!(
                    server().serve_with_incoming(of_tcp),
                    server().serve_with_incoming(of_unix)
                )
            })
        });
    }
    let unix_listener = std::os::unix::net::UnixListener::bind(socket)?;
    thread::spawn(move || -> Result<()> {
        for (number, stream) in unix_listener.incoming().enumerate() {
            let stream = stream?;
            stream.set_nonblocking(true)?;
            unix[number % unix.len()].send(stream)?;
        }
        Ok(())
    });
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    println!("  listening on {address}\nStop it with Ctrl-C.");
    for (number, stream) in listener.incoming().enumerate() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        tcp[number % tcp.len()].send(stream)?;
    }
    Ok(())
}

/// Asks for the scheduling policy of the server's threads. Where that is forbidden, it is to the server.
fn take_turns() {
    #[cfg(target_os = "linux")]
    {
        let parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: it keeps nothing of what it is given.
        unsafe {
            libc::pthread_setschedparam(libc::pthread_self(), libc::SCHED_BATCH, &parameters)
        };
    }
}
