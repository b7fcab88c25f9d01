//! The live entropy device.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use tracing::warn;
use vm_memory::GuestMemory;

use super::RngMetrics;
use crate::virtio::ids::device_id;
use crate::virtio::{Context, DeviceError, Progress, VirtioDevice};

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;

/// Most bytes given for one request. A buffer may be longer; the guest is told how much it got.
pub const MAX_REQUEST: usize = 64 << 10;

/// Bytes on their way from the source into guest memory.
const PIECE: usize = 4 << 10;

/// Where random bytes come from.
pub trait EntropySource: Send + 'static {
    /// Fills `bytes`. It does not wait.
    ///
    /// # Errors
    ///
    /// When the source gives nothing; the guest gets what it got before then.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The host kernel's random numbers.
#[derive(Debug)]
pub struct HostEntropy(File);

impl HostEntropy {
    /// Opens `/dev/urandom`.
    ///
    /// # Errors
    ///
    /// When the device is not there or may not be read.
    pub fn new() -> io::Result<Self> {
        Ok(Self(File::open("/dev/urandom")?))
    }
}

impl EntropySource for HostEntropy {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(bytes)
    }
}

/// An entropy device with bytes from `S`.
#[derive(Debug)]
pub struct Rng<S: EntropySource> {
    source: S,
    metrics: Arc<RngMetrics>,
}

impl<S: EntropySource> Rng<S> {
    /// A device that gives bytes of `source`.
    pub fn new(source: S) -> Self {
        Self { source, metrics: Arc::default() }
    }

    /// The counters, readable without the device.
    #[must_use]
    pub fn metrics(&self) -> Arc<RngMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl<S: EntropySource> VirtioDevice for Rng<S> {
    const DEVICE_ID: u32 = device_id::RNG;
    const NAME: &'static str = "virtio-rng";

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        context.serve(index, |chain| {
            // Section 5.4.6: the driver gives buffers to write, of some length.
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                let reason = "a request for entropy has something to read, or nothing to write";
                return Err(DeviceError::Request { index, reason: reason.into() });
            }
            let wanted = chain.writable.len().min(MAX_REQUEST);
            let mut piece = [0; PIECE];
            let mut done = 0;
            while done < wanted {
                let piece = &mut piece[..PIECE.min(wanted - done)];
                if let Err(error) = self.source.fill(piece) {
                    if self.metrics.source_errors.get() == 0 {
                        warn!(%error, "no entropy for the guest");
                    }
                    self.metrics.source_errors.increment();
                    break;
                }
                done += chain.writable.copy_from(done, piece);
            }
            self.metrics.bytes.add(done as u64);
            // At most MAX_REQUEST.
            Ok(done as u32)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::*;
    use crate::virtio::attacks;
    use crate::virtio::test_utils::*;

    #[test]
    fn buffers_are_filled_and_marked() {
        let mut driver = Driver::live(rng(), 0);
        driver.forget_dirty();
        // Across the seam of two regions, and in two buffers.
        let buffers = [(SEAM - 100, 200, WRITE), (DATA, 50, WRITE)];
        assert_eq!(driver.request(0, &buffers), 250);
        let filled = driver.peek(SEAM - 100, 200);
        assert_eq!(filled, (0..200).collect::<Vec<u8>>());
        assert_eq!(driver.peek(DATA, 51), [(200..250).collect(), vec![0]].concat());
        assert_eq!(driver.line.take(), 1);
        assert_eq!(driver.handle.with_device(|rng| rng.metrics().bytes.get()), 250);
        for page in [SEAM - 0x1000, SEAM, DATA] {
            assert!(driver.is_dirty(page), "{page:#x}");
        }
        assert!(!driver.is_dirty(DATA + 0x1000));
        assert!(driver.is_dirty(rings(0)[2]), "the used ring is the device's to write");
    }

    #[test]
    fn a_long_buffer_gets_a_part() {
        let mut driver = Driver::live(rng(), 0);
        let written = driver.request(0, &[(DATA, 0x2_0000, WRITE)]);
        assert_eq!(written as usize, MAX_REQUEST);
        assert_eq!(driver.peek(DATA + MAX_REQUEST as u64, 1), [0]);
    }

    #[test]
    fn a_dry_source_gives_nothing_and_harms_nobody() {
        let mut source = Count::default();
        source.dry_after = Some(5000);
        let mut driver = Driver::live(Rng::new(source), 0);
        assert_eq!(driver.request(0, &[(DATA, 8192, WRITE)]), PIECE as u32);
        assert_eq!(driver.request(0, &[(DATA, 1, WRITE)]), 1);
        assert_eq!(driver.request(0, &[(DATA, 4096, WRITE)]), 0);
        assert_eq!(driver.handle.with_device(|rng| rng.metrics().source_errors.get()), 2);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_buffer_of_the_wrong_direction_breaks_the_device() {
        for buffers in [&[(DATA, 8, 0)][..], &[(DATA, 8, 0), (DATA, 8, WRITE)], &[(DATA, 0, WRITE)]]
        {
            let mut driver = Driver::live(rng(), 0);
            driver.add(0, buffers);
            driver.run(0);
            assert!(driver.needs_reset(), "{buffers:?}");
            assert!(driver.used(0).is_empty());
        }
    }

    #[test]
    fn attacks_on_its_queue_break_only_the_device() {
        attacks::survived(
            rng,
            0,
            |driver| driver.run(0),
            |driver| assert_eq!(driver.request(0, &[(DATA, 64, WRITE)]), 64),
        );
    }

    #[test]
    fn the_host_has_entropy() {
        let mut bytes = [0; 64];
        HostEntropy::new().unwrap().fill(&mut bytes).unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}
