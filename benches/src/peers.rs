//! A server that chat-memory is compared with: `naive`, which does what an afternoon's work would: a
//! push and an EXPIRE in a script, LRANGE passed through. A process of its own, with the same tonic and
//! the same profile as the server; threads and allocator are what one has by default. The other one,
//! `hello`, is a program of its own: `bin/chat-memory-hello.rs`.

use bytes::Bytes;
use redis::{Script, aio::ConnectionManager};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use self::pb::{
    LastRequest, LastResponse, PushRequest, PushResponse,
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
