//! Files and peers that say anything.
//!
//! Besides not panicking, and ending in time: memory is provided only for what has come, and a VM runs
//! here only after COMMIT. The same functions are run by the fuzz targets and, on a few inputs, by the
//! ordinary tests (migration/tests/fuzz.rs).

mod answers;
mod files;
mod frames;
mod peer;
mod wire;

pub use answers::{migrated, source};
pub use files::{journal, snapshot};
pub use frames::records;
pub use peer::destination;
