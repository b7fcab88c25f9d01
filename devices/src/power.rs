//! The way from a device to the machine: what a guest asks for that only the machine can do.

/// Receives the guest's requests for reset and power-off.
///
/// The caller is a vCPU in the middle of an access to a device whose lock it holds. Implementations
/// note the request and return; they wait for nothing and call no device.
pub trait PowerRequests: Send + Sync {
    /// The guest asked for a reset of the machine.
    fn reset(&self);

    /// The guest turned the machine off.
    fn power_off(&self);
}
