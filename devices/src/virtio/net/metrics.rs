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
    /// Frames that announced the guest from outside of it (RARP).
    pub announced: Counter,
    /// Frames that were kept for the guest while it could not take them.
    pub kept: Counter,
    /// Of those, frames of the tap that came while memory of the guest was still on its way.
    pub backlogged: Counter,
    /// Frames that were not: too many, or too many bytes.
    pub kept_dropped: Counter,
    /// Frames that reached the guest's old host, and came from there.
    pub late: Counter,
    /// Frames that came before the guest did: its old host had them too.
    pub early_dropped: Counter,
}
