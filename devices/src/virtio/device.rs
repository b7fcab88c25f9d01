//! What a virtio device is to its transport.

use vm_memory::GuestMemory;

use super::gate::Gate;
use super::queue::{Chain, QueueError, VirtQueue};
use super::VirtioInterrupt;

/// Requests served in one go, before others get a chance at the device's lock.
const BATCH_REQUESTS: usize = 256;
/// Bytes moved after which the driver hears of what is done although more is waiting, so that it
/// can work while the device does.
const BATCH_BYTES: usize = 128 << 10;

/// What the guest did wrong. Its device stops and waits for a reset; everything else goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// With a queue.
    #[error("queue {index}: {error}")]
    Queue {
        /// Number of the queue.
        index: usize,
        /// What is wrong with it.
        error: QueueError,
    },
    /// With a request of the device's own protocol.
    #[error("queue {index}: {reason}")]
    Request {
        /// Number of the queue.
        index: usize,
        /// What is wrong with the request.
        reason: String,
    },
}

/// A device behind a virtio transport.
///
/// All methods are called with the device's lock held; none of them waits for a guest.
pub trait VirtioDevice: Send + 'static {
    /// Its number in section 5 of the specification.
    const DEVICE_ID: u32;
    /// Its name in messages.
    const NAME: &'static str;

    /// Largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered, those of the transport excepted.
    fn features(&self) -> u64;

    /// The configuration space as the guest reads it now.
    fn config(&self) -> Vec<u8>;

    /// The guest writes to the configuration space. False when nothing there can be written like
    /// that; nothing has changed then.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) -> bool {
        false
    }

    /// The driver is set up, with these features; also after a restore.
    fn activate(&mut self, _features: u64) {}

    /// The driver, or the machine, is gone: forget what it set.
    fn reset(&mut self) {}

    /// The driver put something into queue `index`, which is ready.
    ///
    /// # Errors
    ///
    /// When the guest broke the rules; nothing else is an error of this method.
    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError>;

    /// Why this device cannot be migrated, where it cannot. Asked once, when it is put behind its
    /// transport.
    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

/// Whether a device has left something undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left to do until the next notification.
    Idle,
    /// There is more: call again.
    More,
}

/// What a device works with.
pub struct Context<'a, M: GuestMemory> {
    /// Guest memory.
    pub memory: &'a M,
    /// All queues of the device, ready or not.
    pub queues: &'a mut [VirtQueue],
    /// The device's interrupt.
    pub interrupt: &'a VirtioInterrupt,
    pub(super) gate: &'a Gate,
}

impl<'a, M: GuestMemory> Context<'a, M> {
    /// The next chain of queue `index`.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::pop`].
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain<'a, M>>, DeviceError> {
        self.queues[index].pop(self.memory).map_err(|error| DeviceError::Queue { index, error })
    }

    /// Gives a chain back.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::push`].
    pub fn push(&mut self, index: usize, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queues[index]
            .push(self.memory, head, written)
            .map_err(|error| DeviceError::Queue { index, error })
    }

    /// Gives several chains (head, bytes written) back, which the driver sees all at once.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::push_all`].
    pub fn push_all(&mut self, index: usize, chains: &[(u16, u32)]) -> Result<(), DeviceError> {
        self.queues[index]
            .push_all(self.memory, chains)
            .map_err(|error| DeviceError::Queue { index, error })
    }

    /// Takes back the last `chains` calls of [`Context::pop`]: they will come again.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::undo_pop`].
    pub fn undo_pop(&mut self, index: usize, chains: u16) -> Result<(), DeviceError> {
        self.queues[index].undo_pop(chains).map_err(|error| DeviceError::Queue { index, error })
    }

    /// Entries of queue `index`.
    #[must_use]
    pub fn size(&self, index: usize) -> u16 {
        self.queues.get(index).map_or(0, VirtQueue::size)
    }

    /// Whether queue `index` is there and set up.
    #[must_use]
    pub fn is_ready(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(VirtQueue::is_ready)
    }

    /// Raises the interrupt if the driver wants to hear of what was given back.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::wants_interrupt`].
    pub fn signal(&mut self, index: usize) -> Result<(), DeviceError> {
        let wanted = self.queues[index]
            .wants_interrupt(self.memory)
            .map_err(|error| DeviceError::Queue { index, error })?;
        if wanted {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks for a notification of the next chain. True when there is one already.
    ///
    /// # Errors
    ///
    /// As [`VirtQueue::enable_notification`].
    pub fn enable_notification(&mut self, index: usize) -> Result<bool, DeviceError> {
        self.queues[index]
            .enable_notification(self.memory)
            .map_err(|error| DeviceError::Queue { index, error })
    }

    /// Whether the device is being quiesced: finish the request at hand and return.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.gate.is_closing()
    }

    /// Serves all chains of queue `index` by `serve`, which gives the number of bytes written.
    ///
    /// # Errors
    ///
    /// Those of `serve`, and those of the queue.
    pub fn serve(
        &mut self,
        index: usize,
        mut serve: impl FnMut(&Chain<'a, M>) -> Result<u32, DeviceError>,
    ) -> Result<Progress, DeviceError> {
        // Requests in all; of them those that the driver was not told of, and their bytes.
        let (mut served, mut untold, mut untold_bytes) = (0, 0, 0);
        self.queues[index]
            .disable_notification(self.memory)
            .map_err(|error| DeviceError::Queue { index, error })?;
        loop {
            while served < BATCH_REQUESTS && !self.is_closing() {
                let Some(chain) = self.pop(index)? else { break };
                let written = serve(&chain)?;
                self.push(index, chain.head(), written)?;
                served += 1;
                untold += 1;
                untold_bytes += chain.readable.len() + chain.writable.len();
                if untold_bytes >= BATCH_BYTES {
                    self.signal(index)?;
                    (untold, untold_bytes) = (0, 0);
                }
            }
            if untold > 0 {
                self.signal(index)?;
                (untold, untold_bytes) = (0, 0);
            }
            // Whoever reopens a closed gate has every queue looked at again; until then the
            // driver's notifications are welcome.
            if !self.enable_notification(index)? || self.is_closing() {
                return Ok(Progress::Idle);
            }
            if served >= BATCH_REQUESTS {
                return Ok(Progress::More);
            }
        }
    }
}
