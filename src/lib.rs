//! chat-memory: a gRPC memory server for LLM chats.
//!
//! The modules, in the order in which to read them:

pub mod cli;
pub mod config;
pub mod doctor;
pub mod error;
pub mod history;
pub mod langchain;
pub mod message;
pub mod metrics;
pub mod model;
pub mod moving;
pub mod secret;
pub mod server;
pub mod service;
pub mod sessions;
pub mod socket;
pub mod start;
pub mod store;
pub mod telemetry;
pub mod tokens;
pub mod turn;
pub mod watch;
pub mod window;
pub mod wire;
pub mod workers;

/// The generated types of `proto/chatmemory/v1/chat_memory.proto`.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    tonic::include_proto!("chatmemory.v1");
}
