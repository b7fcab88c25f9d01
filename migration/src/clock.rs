//! CPU time of this process.

use std::time::Duration;

use rustix::time::{clock_gettime, ClockId};

/// CPU time that this process has used, all threads together.
pub(crate) fn process_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
