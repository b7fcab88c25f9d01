//! Virtual devices: state machines without KVM and without sockets.

pub mod persist;

pub use persist::{Payload, Persist, PersistError};
