//! What the tests are made of: real servers, real stores, a real HTTP server in the model's place.

// Each test program uses its own part of this.
#![allow(dead_code)]

pub mod cluster;
#[cfg(target_os = "linux")]
pub mod disk;
pub mod failover;
pub mod program;
pub mod provider;
pub mod proxy;
pub mod redis;
pub mod rules;
pub mod sentinel;
pub mod server;
pub mod stores;
pub mod turns;
pub mod wait;
