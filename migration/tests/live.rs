//! Live migrations of a simulated VM, over connections inside this process.
#![allow(clippy::unwrap_used, missing_docs)]

mod live {
    pub mod common;
    mod failures;
    mod frames;
    mod moves;
    mod postcopy;
    mod wishes;
}
