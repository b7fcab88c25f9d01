//! The control API of a VM: HTTP/1.1 and JSON over a Unix socket, as docs/openapi.yaml says.
//!
//! ```text
//! accept (thread "api", tokio) --> one task per connection --> router --> blocking pool --> Control
//!                                                                |
//!                                      events?follow=true <-- EventLog (no thread held)
//! ```
//!
//! Whoever can connect may do everything: the socket's mode and its directory are the access
//! control. Clients are still not trusted to be well-behaved: connections, followers, header and
//! body sizes and the time to send them are all bounded ([`Limits`]).

mod client;
mod error;
mod routes;
mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::VmStatus;

pub use client::{Client, ClientError, EventStream, LOOK_AGAIN, LOOK_UP};
pub use error::ErrorReply;
pub use routes::ROUTES;
pub use server::{serve, serve_with, ApiHandle, Limits};

/// Largest request body, bytes.
pub const MAX_BODY: usize = 64 << 10;

/// Body of `PUT /v1/vm/save`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// File to write; absolute, since the VM's current directory is not the caller's.
    pub path: PathBuf,
    /// End the VM when it is saved, instead of letting it go on.
    #[serde(default)]
    pub then_stop: bool,
    /// Of a VM that has moved by post-copy and lost its new host: write the memory that is here, which is no VM.
    #[serde(default)]
    pub incomplete: bool,
}

/// Body of `PUT /v1/vm/balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// Memory that the balloon is to take from the guest, bytes; whole pages of 4 KiB.
    pub target_bytes: u64,
}

/// Body of `PUT /v1/vm/link`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkRequest {
    /// Id of the network card.
    pub card: String,
    /// Whether its cable is plugged in.
    pub up: bool,
}

/// Body of `PUT /v1/vm/console-size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSizeRequest {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// Query of `GET /v1/vm/events`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventsQuery {
    /// Only events with a higher number.
    pub after: u64,
    /// Go on with new events until the VM ends.
    pub follow: bool,
}

/// Answer to a command that returns nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// Life of the VM right after the command.
    pub status: VmStatus,
}
