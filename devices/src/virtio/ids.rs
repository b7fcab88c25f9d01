//! Numbers of the virtio specification 1.2 that more than one part needs.

/// Device status bits (section 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up: the device is live.
    pub const DRIVER_OK: u32 = 4;
    /// The negotiated features are settled.
    pub const FEATURES_OK: u32 = 8;
    /// The device met an error that only a reset ends.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Features that belong to the transport, not to a device (section 6).
pub mod features {
    /// A descriptor may refer to a table of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications both ways are suppressed by index.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device is a modern one; a driver that does not take this bit is refused.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device of this crate offers.
    pub const COMMON: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;
}

/// Interrupt status bits (section 4.2.2, InterruptStatus).
pub mod interrupt_status {
    /// A used buffer is there.
    pub const USED_BUFFER: u32 = 1;
    /// The configuration changed, or the device needs a reset.
    pub const CONFIG_CHANGE: u32 = 2;
}

/// Device numbers (section 5).
pub mod device_id {
    /// Network card.
    pub const NET: u32 = 1;
    /// Disk.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Source of entropy.
    pub const RNG: u32 = 4;
    /// Memory balloon.
    pub const BALLOON: u32 = 5;
}
