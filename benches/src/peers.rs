//! The two servers that chat-memory is compared with: `hello`, which does nothing, so that it shows
//! the limit of gRPC; and `naive`, which does what an afternoon's work would: a push and an EXPIRE
//! in a script, LRANGE passed through. Each is a process of its own, with the same tonic and the same
//! profile as the server. `hello` has the server's threads, `naive` tokio's default.

use std::{path::Path, thread};

use bytes::Bytes;
use redis::{Script, aio::ConnectionManager};
use tokio::{
    net::{TcpListener, TcpStream, UnixStream},
    runtime::Builder,
    sync::mpsc,
};
use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::{
    Request, Response, Status,
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

use self::pb::{
    LastRequest, LastResponse, PushRequest, PushResponse, SayRequest, SayResponse,
    hello_server::{Hello, HelloServer},
    naive_server::{Naive, NaiveServer},
};
use crate::Result;

/// The generated types of `proto/bench/v1/bench.proto`.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    tonic::include_proto!("bench.v1");
}

/// Seconds that a list of `naive` lives.
const TTL_SECONDS: u32 = 86_400;

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

struct PushIt {
    redis: ConnectionManager,
    push: Script,
}

#[tonic::async_trait]
impl Naive for PushIt {
    async fn push(
        &self,
        request: Request<PushRequest>,
    ) -> std::result::Result<Response<PushResponse>, Status> {
        let request = request.into_inner();
        let mut redis = self.redis.clone();
        let mut script = self.push.key(request.session_id);
        script.arg(request.element.as_ref()).arg(TTL_SECONDS);
        let length = script.invoke_async(&mut redis).await;
        let length = length.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(PushResponse { length }))
    }

    async fn last(
        &self,
        request: Request<LastRequest>,
    ) -> std::result::Result<Response<LastResponse>, Status> {
        let request = request.into_inner();
        let mut command = redis::cmd("LRANGE");
        command
            .arg(request.session_id)
            .arg(0)
            .arg(request.count - 1);
        let elements: redis::RedisResult<Vec<Bytes>> =
            command.query_async(&mut self.redis.clone()).await;
        let elements = elements.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(LastResponse { elements }))
    }
}

/// Serves `hello` until the process is killed, over TCP and a Unix socket, on threads like the server's: one
/// more than cores, with the same scheduling policy, each with a runtime of its own, and connections in
/// turns.
pub fn hello(socket: &Path) -> Result<()> {
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
    crate::ready(&listener.local_addr()?.to_string());
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

/// Serves `naive` until the process is killed.
pub async fn naive(redis: &str) -> Result<()> {
    let client = redis::Client::open(redis)?;
    let naive = PushIt {
        redis: client.get_connection_manager().await?,
        push: Script::new(
            "local length = redis.call('LPUSH', KEYS[1], ARGV[1])\n\
             redis.call('EXPIRE', KEYS[1], ARGV[2])\n\
             return length",
        ),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    crate::ready(&listener.local_addr()?.to_string());
    Server::builder()
        .add_service(NaiveServer::new(naive))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await?;
    Ok(())
}
