//! Everything that talks to /dev/kvm.

mod dirty;
mod host;
mod stats;
mod vcpu_state;
mod vm_state;

pub use dirty::{clear_dirty_log, DirtyLogError};
pub use host::{set_dirty_logging, HostKvm, KvmError};
pub use stats::VcpuCounter;
pub use vcpu_state::{host_tsc, msrs_to_save, TscStateV1, VcpuKvm, VcpuStateV1};
pub use vm_state::{ClockStateV1, VmClock, VmKvm, VmStateV1};
