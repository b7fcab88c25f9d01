//! What the network card counts.

use crate::metrics::Counter;

/// Counters of one network card. Bytes are those of frames, without the virtio header.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Frames that the guest got.
    pub rx_frames: Counter,
    /// Bytes of them.
    pub rx_bytes: Counter,
    /// Frames for the guest that were dropped: too long for its buffers, or too short for frames.
    pub rx_dropped: Counter,
    /// Frames that the backend took.
    pub tx_frames: Counter,
    /// Bytes of them.
    pub tx_bytes: Counter,
    /// Frames of the guest that the backend refused.
    pub tx_dropped: Counter,
    /// Times that receiving failed, or offloads could not be set.
    pub backend_errors: Counter,
    /// Announcements asked of the guest, and done by it.
    pub announcements: Counter,
}
