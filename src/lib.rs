//! chat-memory: a gRPC memory server for LLM chats.

pub mod error;
pub mod langchain;
pub mod message;
pub mod model;
pub mod service;
pub mod store;
pub mod turn;
pub mod window;
pub mod wire;

/// The generated types of `proto/chatmemory/v1/chat_memory.proto`.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    tonic::include_proto!("chatmemory.v1");
}
