//! A device as those see it who drive it: its worker thread, and the machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemory;

use super::device::Shared;
use super::MmioMetrics;
use crate::virtio::ids::status::DRIVER_OK;
use crate::virtio::{Context, DeviceError, Progress, VirtioDevice, VirtioInterrupt};
use crate::{Payload, Persist, PersistError};

/// A device did not come to rest in time. It runs on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device} still had a request under way after {waited:?}: its backend is slow or stuck")]
pub struct QuiesceError {
    /// Name of the kind of device.
    pub device: &'static str,
    /// How long was waited.
    pub waited: Duration,
}

/// Access to a device from beside the guest. Clones are of the same device.
pub struct Handle<D: VirtioDevice, M: GuestMemory> {
    pub(super) shared: Arc<Shared<D, M>>,
}

impl<D: VirtioDevice, M: GuestMemory> Clone for Handle<D, M> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync + 'static> Handle<D, M> {
    /// Lets `work` at the device and its queues, if the driver is set up and the device is not
    /// quiesced: this is for events of the backend.
    ///
    /// An error is the guest's doing: the device then needs a reset, and nothing is given.
    pub fn with_queues<R>(
        &self,
        work: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<R, DeviceError>,
    ) -> Option<R> {
        let shared = &*self.shared;
        let _inside = shared.gate.enter()?;
        let mut core = shared.lock();
        if !core.is_live() {
            return None;
        }
        let core = &mut *core;
        let mut context = Context {
            memory: &shared.memory,
            queues: &mut core.queues,
            interrupt: &shared.interrupt,
            gate: &shared.gate,
        };
        match work(&mut core.device, &mut context) {
            Ok(result) => Some(result),
            Err(error) => {
                core.fail(&error, &shared.interrupt, &shared.metrics);
                None
            }
        }
    }

    /// Lets `look` at the device, whatever state it is in.
    pub fn with_device<R>(&self, look: impl FnOnce(&mut D) -> R) -> R {
        look(&mut self.shared.lock().device)
    }

    /// Changes what the configuration space says; `change` tells whether it did.
    ///
    /// Not while the device is quiesced: the change would be in nobody's state.
    pub fn change_config(&self, change: impl FnOnce(&mut D) -> bool) {
        let mut core = self.shared.lock();
        if change(&mut core.device) {
            core.config_generation = core.config_generation.wrapping_add(1);
            if core.has(DRIVER_OK) {
                self.shared.interrupt.config_change();
            }
        }
    }

    /// Whether the device is quiesced, or about to be.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.shared.gate.is_closing()
    }

    /// Has queue `index` looked at soon, as if the driver had notified of it: its backend has something.
    pub fn look_at(&self, index: usize) {
        self.shared.notifier.notify(index);
    }

    /// The transport's counters.
    #[must_use]
    pub fn metrics(&self) -> &MmioMetrics {
        &self.shared.metrics
    }

    /// The interrupt, with its counters.
    #[must_use]
    pub fn interrupt(&self) -> &VirtioInterrupt {
        &self.shared.interrupt
    }

    fn serve_queue(&self, index: usize) {
        let metrics = &self.shared.metrics;
        let mut looked = false;
        let progress = self.with_queues(|device, context| {
            if !context.is_ready(index) {
                return Ok(Progress::Idle);
            }
            looked = true;
            metrics.notifications.increment();
            device.process_queue(index, context)
        });
        if progress == Some(Progress::More) {
            // Later: other queues, the backend and who waits for the lock have their turn first,
            // however fast the driver is.
            self.shared.notifier.notify(index);
        }
        if !looked && !self.shared.gate.is_closing() {
            metrics.early_notifications.increment();
        }
    }

    /// Has every queue looked at that is ready. It does not wait for the lock: who holds it may be
    /// stuck in a request. Then every queue is looked at, which is too much but harmless.
    fn kick(&self) {
        let core = self.shared.try_lock();
        for index in 0..self.shared.queue_count {
            if core.as_ref().is_none_or(|core| core.queues[index].is_ready()) {
                self.shared.notifier.notify(index);
            }
        }
    }
}

/// Every virtio device, whatever it is: what the machine does with all of them alike.
pub trait VirtioControl: Send + Sync {
    /// Name of the kind of device.
    fn name(&self) -> &'static str;

    /// Number of queues.
    fn queue_count(&self) -> usize;

    /// The driver notified of queue `index`: serves it until it is empty.
    fn process_queue(&self, index: usize);

    /// Lets no new request begin, and waits for none: where several devices are to be quiesced, all
    /// of them can finish at the same time. [`VirtioControl::quiesce`] follows.
    fn begin_quiesce(&self);

    /// Lets no new request begin and waits for the one under way, until `deadline`.
    ///
    /// # Errors
    ///
    /// When it did not end in time; the device then goes on as if nothing had happened.
    fn quiesce(&self, deadline: Instant) -> Result<(), QuiesceError>;

    /// Ends [`VirtioControl::quiesce`]; every queue is looked at again, since notifications of
    /// meanwhile were ignored. It never waits, not even for a request that is stuck. Also after a restore: a notification on its way when the state was
    /// taken is in nobody's state.
    fn resume(&self);

    /// After a restore: one forced notification of the driver, and the edge of whatever was
    /// pending. The driver then looks at all queues of the device.
    fn raise_pending(&self);

    /// Why the device cannot be migrated, where it cannot. Answers also while a request is stuck.
    fn migration_blocker(&self) -> Option<String>;

    /// State of the device itself; that of its registers and queues is the transport's.
    ///
    /// # Errors
    ///
    /// As [`Persist::save_payload`].
    fn save_device(&self, instance: u32) -> Result<Payload, PersistError>;

    /// Restores the device itself, after its transport.
    ///
    /// # Errors
    ///
    /// As [`Persist::restore_payload`].
    fn restore_device(&self, payload: &Payload) -> Result<(), PersistError>;
}

impl<D, M> VirtioControl for Handle<D, M>
where
    D: VirtioDevice + Persist<Error = PersistError>,
    M: GuestMemory + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        D::NAME
    }

    fn queue_count(&self) -> usize {
        self.shared.queue_count
    }

    fn process_queue(&self, index: usize) {
        self.serve_queue(index);
    }

    fn begin_quiesce(&self) {
        self.shared.gate.begin_close();
    }

    fn quiesce(&self, deadline: Instant) -> Result<(), QuiesceError> {
        let start = Instant::now();
        if self.shared.gate.close(deadline) {
            return Ok(());
        }
        self.resume();
        Err(QuiesceError { device: D::NAME, waited: start.elapsed() })
    }

    fn resume(&self) {
        self.shared.gate.open();
        self.kick();
    }

    fn raise_pending(&self) {
        let live = self.shared.lock().is_live();
        if live {
            // Its edge stands for those of all other bits as well.
            self.shared.interrupt.used_buffer();
        } else {
            self.shared.interrupt.raise_pending();
        }
    }

    fn migration_blocker(&self) -> Option<String> {
        self.shared.migration_blocker.clone()
    }

    fn save_device(&self, instance: u32) -> Result<Payload, PersistError> {
        self.shared.lock().device.save_payload(instance)
    }

    fn restore_device(&self, payload: &Payload) -> Result<(), PersistError> {
        self.shared.lock().device.restore_payload(payload)
    }
}
