//! The live console.

use std::io::Write;
use std::sync::Arc;

use tracing::warn;
use vm_memory::GuestMemory;

use super::ConsoleMetrics;
use crate::virtio::ids::device_id;
use crate::virtio::{Chain, Context, DeviceError, Progress, VirtioDevice};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 64;
/// Number of the queue of buffers for input.
pub const RECEIVE: usize = 0;
/// Number of the queue of output.
pub const TRANSMIT: usize = 1;

/// Most bytes that the guest may send in one request. Linux sends a page.
const MAX_OUTPUT: usize = 1 << 20;
/// Bytes on their way from guest memory to the output.
const PIECE: usize = 4 << 10;

const F_SIZE: u64 = 1 << 0;

/// A console with output to `W`.
pub struct Console<W: Write + Send + 'static> {
    output: W,
    pub(super) columns: u16,
    pub(super) rows: u16,
    input_wanted: Option<Box<dyn Fn() + Send>>,
    /// Somebody may have bytes that were refused.
    input_waits: bool,
    metrics: Arc<ConsoleMetrics>,
}

impl<W: Write + Send + 'static> Console<W> {
    /// A console of no known size.
    pub fn new(output: W) -> Self {
        Self {
            output,
            columns: 0,
            rows: 0,
            input_wanted: None,
            input_waits: true,
            metrics: Arc::default(),
        }
    }

    /// Has `callback` called when bytes that were refused would be taken now.
    ///
    /// It is called with the device locked: it wakes the thread that has the bytes, no more.
    pub fn on_input_wanted(&mut self, callback: impl Fn() + Send + 'static) {
        self.input_wanted = Some(Box::new(callback));
    }

    /// Tells the guest its size. True when it is another: a change of the configuration, see
    /// [`change_config`](crate::virtio::Handle::change_config).
    #[must_use]
    pub fn resize(&mut self, columns: u16, rows: u16) -> bool {
        let before = (self.columns, self.rows);
        (self.columns, self.rows) = (columns, rows);
        before != (columns, rows)
    }

    /// The output.
    pub fn output_mut(&mut self) -> &mut W {
        &mut self.output
    }

    /// The counters, readable without the device.
    #[must_use]
    pub fn metrics(&self) -> Arc<ConsoleMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Puts bytes into the guest's buffers, within
    /// [`with_queues`](crate::virtio::Handle::with_queues). Gives how many there was room for.
    ///
    /// After a result below `bytes.len()`, and where there is no driver yet, the callback of
    /// [`Console::on_input_wanted`] is called as soon as there is room.
    ///
    /// # Errors
    ///
    /// When the guest broke the rules of the queue.
    pub fn receive<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        bytes: &[u8],
    ) -> Result<usize, DeviceError> {
        let mut done = 0;
        if context.is_ready(RECEIVE) {
            while done < bytes.len() {
                let Some(chain) = context.pop(RECEIVE)? else {
                    // The notification is wanted only by who waits for buffers.
                    if context.enable_notification(RECEIVE)? {
                        continue;
                    }
                    break;
                };
                if chain.writable.is_empty() || !chain.readable.is_empty() {
                    let reason = "a buffer for input has something to read, or no room".into();
                    return Err(DeviceError::Request { index: RECEIVE, reason });
                }
                let copied = chain.writable.copy_from(0, &bytes[done..]);
                done += copied;
                // At most a chain, which is below 4 GiB.
                context.push(RECEIVE, chain.head(), copied as u32)?;
            }
            if done > 0 {
                context.signal(RECEIVE)?;
            }
        }
        self.input_waits = done < bytes.len();
        self.metrics.bytes_in.add(done as u64);
        Ok(done)
    }

    fn transmit<M: GuestMemory>(&mut self, chain: &Chain<'_, M>) -> Result<u32, DeviceError> {
        if chain.readable.len() > MAX_OUTPUT {
            let reason = format!("{} bytes of output in one request", chain.readable.len());
            return Err(DeviceError::Request { index: TRANSMIT, reason });
        }
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < chain.readable.len() {
            let len = chain.readable.copy_to(done, &mut piece);
            done += len;
            match self.output.write_all(&piece[..len]) {
                Ok(()) => self.metrics.bytes_out.add(len as u64),
                Err(error) => return Ok(self.output_lost(&error)),
            }
        }
        if let Err(error) = self.output.flush() {
            return Ok(self.output_lost(&error));
        }
        Ok(0)
    }

    /// The guest does not notice. Gives what a request of output gives: nothing was written.
    fn output_lost(&self, error: &std::io::Error) -> u32 {
        if self.metrics.output_errors.get() == 0 {
            warn!(%error, "output of the virtio console is lost");
        }
        self.metrics.output_errors.increment();
        0
    }
}

impl<W: Write + Send + 'static> VirtioDevice for Console<W> {
    const DEVICE_ID: u32 = device_id::CONSOLE;
    const NAME: &'static str = "virtio-console";

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    /// Section 5.3.4: columns, rows, number of ports, emergency output; the last two are not
    /// offered.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[0..2].copy_from_slice(&self.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.rows.to_le_bytes());
        config
    }

    fn reset(&mut self) {
        self.input_waits = true;
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        if index == TRANSMIT {
            return context.serve(TRANSMIT, |chain| self.transmit(chain));
        }
        // Buffers for input. Who has input is called, and calls `receive`.
        if std::mem::take(&mut self.input_waits) {
            if let Some(input_wanted) = &self.input_wanted {
                input_wanted();
            }
        }
        Ok(Progress::Idle)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::test_utils::*;
    use super::*;
    use crate::virtio::attacks;
    use crate::virtio::test_utils::*;

    #[test]
    fn what_the_guest_sends_comes_out() {
        let mut driver = driver();
        driver.put(DATA, b"hello, world\n");
        assert_eq!(driver.request(TRANSMIT, &[(DATA, 5, 0), (DATA + 5, 8, 0)]), 0);
        driver.put(DATA, &[b'x'; 10_000]);
        assert_eq!(driver.request(TRANSMIT, &[(DATA, 10_000, 0)]), 0);
        driver.handle.with_device(|console| {
            assert_eq!(console.output.len(), 10_013);
            assert_eq!(&console.output[..14], b"hello, world\nx");
            assert_eq!(console.metrics().bytes_out.get(), 10_013);
        });
    }

    #[test]
    fn input_fills_buffers_and_the_rest_waits() {
        let mut driver = driver();
        let calls = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&calls);
        driver.handle.with_device(|console| {
            console.on_input_wanted(move || {
                counter.fetch_add(1, Ordering::SeqCst);
            });
        });
        driver.run(RECEIVE);
        assert_eq!(calls.load(Ordering::SeqCst), 1, "whoever waited for a driver");
        let first = driver.add(RECEIVE, &[(DATA, 4, WRITE)]);
        let second = driver.add(RECEIVE, &[(DATA + 4, 2, WRITE), (DATA + 0x100, 4, WRITE)]);
        driver.run(RECEIVE);
        assert_eq!(calls.load(Ordering::SeqCst), 1, "nobody waits");

        driver.forget_dirty();
        assert_eq!(receive(&driver, b"abcdefgh"), Some(8));
        assert_eq!(driver.used(RECEIVE), [(first, 4), (second, 4)]);
        assert_eq!(
            (driver.peek(DATA, 6), driver.peek(DATA + 0x100, 3)),
            (b"abcdef".to_vec(), b"gh\0".to_vec())
        );
        assert!(driver.is_dirty(DATA));
        assert_eq!(driver.line.take(), 1);

        driver.run(RECEIVE);
        assert_eq!(calls.load(Ordering::SeqCst), 1, "everything was taken");

        assert_eq!(receive(&driver, b"ij"), Some(0));
        let third = driver.add(RECEIVE, &[(DATA, 64, WRITE)]);
        driver.run(RECEIVE);
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        assert_eq!(receive(&driver, b"ij"), Some(2));
        assert_eq!(driver.used(RECEIVE), [(third, 2)]);
    }

    #[test]
    fn without_a_driver_nothing_is_taken() {
        let driver = Driver::idle(Console::new(Vec::new()));
        assert_eq!(receive(&driver, b"a"), None);
    }

    #[test]
    fn a_resize_is_a_change_of_the_configuration() {
        let mut driver = driver();
        driver.line.take();
        driver.handle.change_config(|console| console.resize(132, 43));
        assert_eq!((driver.line.take(), driver.config::<4>(0)), (1, [132, 0, 43, 0]));
        driver.handle.change_config(|console| console.resize(132, 43));
        assert_eq!(driver.line.take(), 0);
    }

    #[test]
    fn a_broken_output_costs_bytes_only() {
        let mut driver = Driver::live(Console::new(Broken), 0);
        assert_eq!(driver.request(TRANSMIT, &[(DATA, 5, 0)]), 0);
        let lost = driver.handle.with_device(|console| console.metrics().output_errors.get());
        assert_eq!((lost, driver.needs_reset()), (1, false));
    }

    #[test]
    fn attacks_on_its_queues_break_only_the_console() {
        let make = || Console::new(Vec::new());
        attacks::survived(
            make,
            RECEIVE,
            |driver| {
                driver.run(RECEIVE);
                let _ = receive(driver, b"typed");
            },
            |driver| {
                let head = driver.add(RECEIVE, &[(DATA, 64, WRITE)]);
                assert_eq!(receive(driver, b"typed"), Some(5));
                assert_eq!(driver.used(RECEIVE), [(head, 5)]);
            },
        );
        attacks::survived(
            make,
            TRANSMIT,
            |driver| driver.run(TRANSMIT),
            |driver| assert_eq!(driver.request(TRANSMIT, &[(DATA, 64, 0)]), 0),
        );
    }

    #[test]
    fn bad_buffers_break_the_device() {
        for buffers in [&[(DATA, 4, 0)][..], &[(DATA, 4, 0), (DATA, 4, WRITE)]] {
            let mut driver = driver();
            driver.add(RECEIVE, buffers);
            assert_eq!(receive(&driver, b"a"), None);
            assert!(driver.needs_reset(), "{buffers:?}");
        }
        let mut driver = driver();
        driver.add(TRANSMIT, &[(0, SEAM as u32, 0), (0, SEAM as u32 + 1, 0)]);
        driver.run(TRANSMIT);
        assert!(driver.needs_reset());
    }
}
