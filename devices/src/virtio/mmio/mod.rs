//! The MMIO transport (virtio 1.2, section 4.2.2).
//!
//! ```text
//! 0x000 MagicValue "virt"   0x038 QueueNum          0x090/094 QueueDriverLow/High
//! 0x004 Version 2           0x044 QueueReady        0x0a0/0a4 QueueDeviceLow/High
//! 0x008 DeviceID            0x050 QueueNotify       0x0ac SHMSel
//! 0x00c VendorID            0x060 InterruptStatus   0x0b0/0b4 SHMLenLow/High
//! 0x010 DeviceFeatures      0x064 InterruptACK      0x0b8/0bc SHMBaseLow/High
//! 0x014 DeviceFeaturesSel   0x070 Status            0x0fc ConfigGeneration
//! 0x020 DriverFeatures      0x080/084 QueueDescLow/High
//! 0x024 DriverFeaturesSel                           0x100 configuration space
//! 0x030 QueueSel   0x034 QueueNumMax
//! ```
//!
//! Registers are 32 bits wide and accessed as such; accesses of other sizes or places change
//! nothing and are counted. The configuration space is accessed as the device likes.

mod core;
mod device;
mod handle;
mod metrics;
mod persist;

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use device::register;
pub use device::{MmioTransport, QueueNotifier, SIZE};
pub use handle::{Handle, QuiesceError, VirtioControl};
pub use metrics::MmioMetrics;
pub use persist::{IndexState, MmioState, QueueState};
