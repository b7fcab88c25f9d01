//! The live balloon.

use std::io;
use std::sync::Arc;

use tracing::warn;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::BalloonMetrics;
use crate::virtio::ids::device_id;
use crate::virtio::{Chain, Context, DeviceError, Progress, VirtioDevice};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 64;
/// The unit of the balloon, bytes, whatever the page size of the guest.
pub const PAGE: u64 = 4096;

/// Most pages of one request: 64 MiB. Linux sends 256.
const MAX_PAGES: usize = 16 << 10;
/// Page numbers copied from the guest in one go.
const PIECE: usize = 256;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// The guest may take pages out of the balloon when it is short of memory, without asking.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;

/// In the configuration space: pages that the guest says are in the balloon.
const CONFIG_ACTUAL: usize = 4;

/// Gives guest memory back to the host.
pub trait Discard: Send + 'static {
    /// The contents of `len` bytes at guest-physical `gpa` are of no use any more; they read as
    /// zeros afterwards. The range lies in guest memory and consists of whole pages.
    ///
    /// It is a write by the VMM: the implementer marks the pages in the device bitmap, afterwards.
    ///
    /// # Errors
    ///
    /// When the host keeps the memory. The guest does not notice.
    fn discard(&mut self, gpa: u64, len: u64) -> io::Result<()>;
}

/// A balloon that discards through `D`.
#[derive(Debug)]
pub struct Balloon<D: Discard> {
    discard: D,
    deflate_on_oom: bool,
    /// Pages that the host wants in the balloon.
    pub(super) target: u32,
    /// Pages that the guest says are in it.
    pub(super) actual: u32,
    held: bool,
    metrics: Arc<BalloonMetrics>,
}

impl<D: Discard> Balloon<D> {
    /// An empty balloon, that is to stay empty.
    pub fn new(discard: D, deflate_on_oom: bool) -> Self {
        Self { discard, deflate_on_oom, target: 0, actual: 0, held: false, metrics: Arc::default() }
    }

    /// Pages of [`PAGE`] bytes that the host wants in the balloon.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Sets the target, pages. True when it is another: a change of the configuration, see
    /// [`change_config`](crate::virtio::Handle::change_config).
    #[must_use]
    pub fn set_target(&mut self, pages: u32) -> bool {
        let changed = std::mem::replace(&mut self.target, pages) != pages;
        self.show_sizes();
        changed
    }

    /// Has the metrics say what is now.
    pub(super) fn show_sizes(&self) {
        self.metrics.target_pages.set(self.target.into());
        self.metrics.actual_pages.set(self.actual.into());
    }

    /// Pages that the guest says are in the balloon.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.actual
    }

    /// While held, requests wait: memory that is still arriving from another host cannot be
    /// discarded. Whoever ends this has the queues looked at again (`VirtioControl::resume`).
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// The counters, readable without the device.
    #[must_use]
    pub fn metrics(&self) -> Arc<BalloonMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Reads the list of pages of a request, run by run of pages that follow each other.
    fn runs<M: GuestMemory>(
        index: usize,
        memory: &M,
        chain: &Chain<'_, M>,
    ) -> Result<Vec<(u64, u64)>, DeviceError> {
        let broken = |reason: String| DeviceError::Request { index, reason };
        let count = chain.readable.len() / 4;
        if chain.readable.len() % 4 != 0 || count > MAX_PAGES {
            let len = chain.readable.len();
            return Err(broken(format!("a list of {len} bytes is no list of pages")));
        }
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut bytes = [0; 4 * PIECE];
        for first in (0..count).step_by(PIECE) {
            let len = chain.readable.copy_to(4 * first, &mut bytes);
            for number in bytes[..len].chunks_exact(4) {
                let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
                let gpa = u64::from(number) * PAGE;
                if !memory.check_range(GuestAddress(gpa), PAGE as usize, Permissions::Write) {
                    return Err(broken(format!("page {number:#x} is not in memory")));
                }
                match runs.last_mut() {
                    Some((start, len)) if *start + *len == gpa => *len += PAGE,
                    // Linux takes pages from the top.
                    Some((start, len)) if gpa + PAGE == *start => {
                        *start = gpa;
                        *len += PAGE;
                    }
                    _ => runs.push((gpa, PAGE)),
                }
            }
        }
        Ok(runs)
    }

    fn inflate(&mut self, runs: &[(u64, u64)]) {
        for (gpa, len) in runs {
            self.metrics.inflated.add(len / PAGE);
            if let Err(error) = self.discard.discard(*gpa, *len) {
                if self.metrics.discard_errors.get() == 0 {
                    warn!(%error, gpa, len, "memory in the balloon cannot be given back");
                }
                self.metrics.discard_errors.increment();
            }
        }
    }
}

impl<D: Discard> VirtioDevice for Balloon<D> {
    const DEVICE_ID: u32 = device_id::BALLOON;
    const NAME: &'static str = "virtio-balloon";

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        if self.deflate_on_oom {
            F_DEFLATE_ON_OOM
        } else {
            0
        }
    }

    fn config(&self) -> Vec<u8> {
        [self.target.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> bool {
        match (offset, <[u8; 4]>::try_from(data)) {
            (CONFIG_ACTUAL, Ok(bytes)) => {
                self.actual = u32::from_le_bytes(bytes);
                self.show_sizes();
                true
            }
            _ => false,
        }
    }

    fn reset(&mut self) {
        // Without a driver nothing is in the balloon; the host's wish stays.
        self.actual = 0;
        self.show_sizes();
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        if self.held {
            return Ok(Progress::Idle);
        }
        let memory = context.memory;
        context.serve(index, |chain| {
            let runs = Self::runs(index, memory, chain)?;
            match index {
                INFLATE => self.inflate(&runs),
                DEFLATE => {
                    let pages = runs.iter().map(|(_, len)| len / PAGE).sum();
                    self.metrics.deflated.add(pages);
                }
                _ => {}
            }
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::super::test_utils::*;
    use super::*;
    use crate::virtio::attacks;
    use crate::virtio::test_utils::*;

    fn driver() -> Driver<Balloon<Given>> {
        Driver::live(balloon(), 0)
    }

    fn list(driver: &Driver<Balloon<Given>>, pages: &[u32]) -> [(u64, u32, u16); 1] {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        driver.put(DATA, &bytes);
        [(DATA, bytes.len() as u32, 0)]
    }

    #[test]
    fn inflated_pages_are_discarded_in_runs() {
        let mut driver = driver();
        let request = list(&driver, &[0x90, 0x91, 0x92, 0xA0, 0x9F, 0x9E, 0xFF]);
        assert_eq!(driver.request(INFLATE, &request), 0);
        let given = driver.handle.with_device(|balloon| balloon.discard.taken());
        assert_eq!(given, [(0x9_0000, 0x3000), (0x9_E000, 0x3000), (0xF_F000, 0x1000)]);
        assert_eq!(driver.request(DEFLATE, &request), 0);
        driver.handle.with_device(|balloon| {
            assert!(balloon.discard.taken().is_empty());
            let metrics = balloon.metrics();
            assert_eq!((metrics.inflated.get(), metrics.deflated.get()), (7, 7));
        });
    }

    #[test]
    fn the_target_is_configuration() {
        let mut driver = driver();
        driver.line.take();
        driver.handle.change_config(|balloon| balloon.set_target(0x1234));
        driver.handle.change_config(|balloon| balloon.set_target(0x1234));
        assert_eq!(driver.line.take(), 1);
        assert_eq!(u32::from_le_bytes(driver.config(0)), 0x1234);
        driver.set(0x104, 0x77);
        assert_eq!(driver.handle.with_device(|balloon| balloon.actual()), 0x77);
        assert_eq!(u32::from_le_bytes(driver.config(4)), 0x77);
        // The target is not the guest's to set, nor half of a register.
        driver.set(0x100, 1);
        crate::BusDevice::write(&mut driver.transport, 0x104, &[1, 2]);
        assert_eq!(driver.handle.metrics().bad_accesses.get(), 2);
        assert_eq!(driver.handle.with_device(|balloon| balloon.target()), 0x1234);
    }

    #[test]
    fn deflating_on_oom_is_offered_if_wanted() {
        assert_ne!(driver().offered() & F_DEFLATE_ON_OOM, 0);
        let mut driver = Driver::idle(Balloon::new(Given::default(), false));
        assert_eq!(driver.offered() & F_DEFLATE_ON_OOM, 0);
    }

    #[test]
    fn a_page_that_is_not_there_breaks_the_device_and_discards_nothing() {
        for page in [0x100, u32::MAX] {
            let mut driver = driver();
            let request = list(&driver, &[0x90, page]);
            driver.add(INFLATE, &request);
            driver.run(INFLATE);
            assert!(driver.needs_reset(), "{page:#x}");
            assert!(driver.handle.with_device(|balloon| balloon.discard.taken()).is_empty());
        }
    }

    #[test]
    fn a_list_that_is_none_breaks_the_device() {
        for len in [1, 7, 4 * MAX_PAGES as u32 + 4] {
            let mut driver = driver();
            driver.add(INFLATE, &[(DATA, len, 0)]);
            driver.run(INFLATE);
            assert!(driver.needs_reset(), "{len}");
        }
    }

    #[test]
    fn a_failed_discard_is_the_hosts_affair() {
        let mut driver = driver();
        driver.handle.with_device(|balloon| balloon.discard.broken = true);
        let request = list(&driver, &[0x90]);
        driver.request(INFLATE, &request);
        let errors = driver.handle.with_device(|balloon| balloon.metrics().discard_errors.get());
        assert_eq!((errors, driver.needs_reset()), (1, false));
    }

    #[test]
    fn held_requests_wait() {
        let mut driver = driver();
        driver.handle.with_device(|balloon| balloon.hold(true));
        let request = list(&driver, &[0x90]);
        driver.add(INFLATE, &request);
        driver.run(INFLATE);
        assert!(driver.used(INFLATE).is_empty());
        driver.handle.with_device(|balloon| balloon.hold(false));
        driver.run(INFLATE);
        assert_eq!(driver.used(INFLATE).len(), 1);
    }

    #[test]
    fn attacks_on_its_queues_break_only_the_balloon() {
        for queue in [INFLATE, DEFLATE] {
            attacks::survived(
                balloon,
                queue,
                |driver| driver.run(queue),
                |driver| {
                    let request = list(driver, &[0x90]);
                    assert_eq!(driver.request(queue, &request), 0);
                },
            );
        }
    }

    proptest! {
        #[test]
        fn every_page_is_discarded_once_for_each_mention(
            pages in proptest::collection::vec(0x80u32..0xA0, 0..600),
        ) {
            let mut driver = driver();
            let request = list(&driver, &pages);
            driver.request(INFLATE, &request);
            let mut given: Vec<u64> = driver
                .handle
                .with_device(|balloon| balloon.discard.taken())
                .into_iter()
                .flat_map(|(gpa, len)| (0..len / PAGE).map(move |n| gpa / PAGE + n))
                .collect();
            given.sort_unstable();
            let mut want: Vec<u64> = pages.into_iter().map(u64::from).collect();
            want.sort_unstable();
            prop_assert_eq!(given, want);
        }
    }
}
