//! The registers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vm_memory::GuestMemory;

use super::core::{Core, StatusWrite};
use super::{Handle, MmioMetrics};
use crate::virtio::gate::Gate;
use crate::virtio::{VirtioDevice, VirtioInterrupt};
use crate::{BusDevice, InterruptLine};

/// Bytes of address space that one device takes.
pub const SIZE: u64 = 0x1000;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// 2: the modern interface.
const VERSION: u32 = 2;
/// "mVMM": any value will do, drivers look at the device number.
const VENDOR: u32 = 0x4D4D_566D;
const CONFIG_SPACE: u64 = 0x100;
/// What a register about a shared memory region says that does not exist.
const NO_REGION: u32 = u32::MAX;

pub(crate) mod register {
    pub(crate) const MAGIC: u64 = 0x000;
    pub(crate) const VERSION: u64 = 0x004;
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const VENDOR_ID: u64 = 0x00C;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(crate) const QUEUE_NUM: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(crate) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(crate) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(crate) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(crate) const QUEUE_DEVICE_LOW: u64 = 0x0A0;
    pub(crate) const QUEUE_DEVICE_HIGH: u64 = 0x0A4;
    pub(crate) const SHM_SEL: u64 = 0x0AC;
    pub(crate) const SHM_LEN_LOW: u64 = 0x0B0;
    pub(crate) const SHM_BASE_HIGH: u64 = 0x0BC;
    pub(crate) const CONFIG_GENERATION: u64 = 0x0FC;
}
use register as reg;

/// The way from a notification that reached the registers to the thread that serves the queue.
///
/// Where the hypervisor passes notifications on by itself (an ioeventfd at
/// [`MmioTransport::NOTIFY_OFFSET`]) this is for the exceptions, and for the kicks after quiescing.
pub trait QueueNotifier: Send + Sync {
    /// Queue `index` wants to be looked at. The caller holds the device's lock: note it and return.
    fn notify(&self, index: usize);
}

/// What the transport and its handles share.
pub(super) struct Shared<D, M> {
    core: Mutex<Core<D>>,
    pub(super) gate: Gate,
    pub(super) interrupt: VirtioInterrupt,
    pub(super) memory: M,
    pub(super) notifier: Arc<dyn QueueNotifier>,
    pub(super) metrics: MmioMetrics,
    pub(super) queue_count: usize,
    pub(super) migration_blocker: Option<String>,
}

impl<D, M> Shared<D, M> {
    pub(super) fn lock(&self) -> MutexGuard<'_, Core<D>> {
        // What a panic left is plain values, each checked where it is used.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same without waiting.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Core<D>>> {
        match self.core.try_lock() {
            Ok(core) => Some(core),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// The registers of one virtio device.
pub struct MmioTransport<D: VirtioDevice, M: GuestMemory> {
    pub(super) shared: Arc<Shared<D, M>>,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync + 'static> MmioTransport<D, M> {
    /// Where the guest writes the number of a queue to notify of it: 4 bytes.
    pub const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

    /// Registers of `device` after power-on.
    pub fn new(
        device: D,
        memory: M,
        line: Arc<dyn InterruptLine>,
        notifier: Arc<dyn QueueNotifier>,
    ) -> Self {
        let core = Core::new(device);
        let shared = Shared {
            queue_count: core.queues.len(),
            migration_blocker: core.device.migration_blocker(),
            core: Mutex::new(core),
            gate: Gate::default(),
            interrupt: VirtioInterrupt::new(line),
            memory,
            notifier,
            metrics: MmioMetrics::default(),
        };
        Self {
            shared: Arc::new(shared),
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        }
    }

    /// The device, for who drives it.
    #[must_use]
    pub fn handle(&self) -> Handle<D, M> {
        Handle { shared: Arc::clone(&self.shared) }
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        // In the guest's interrupt handler: no lock.
        if offset == reg::INTERRUPT_STATUS {
            return Some(self.shared.interrupt.status());
        }
        let core = self.shared.lock();
        let queue = core.queues.get(self.queue_select as usize);
        Some(match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => D::DEVICE_ID,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => match self.device_features_select {
                0 => core.offered_features() as u32,
                1 => (core.offered_features() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            reg::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.is_ready())),
            reg::STATUS => core.status,
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => NO_REGION,
            reg::CONFIG_GENERATION => core.config_generation,
            _ => return None,
        })
    }

    /// False when nothing was changed since nothing may be changed like that.
    fn write_register(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::QUEUE_SEL => self.queue_select = value,
            reg::SHM_SEL => {}
            reg::INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            reg::QUEUE_NOTIFY => self.notify(value),
            reg::DRIVER_FEATURES => return self.write_driver_features(value),
            reg::STATUS => return self.write_status(value),
            reg::QUEUE_READY => return self.write_queue_ready(value),
            _ => return self.write_queue_register(offset, value),
        }
        true
    }

    fn write_driver_features(&self, value: u32) -> bool {
        let mut core = self.shared.lock();
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            // There are none; a driver that clears them all is right.
            _ => return value == 0,
        };
        if !core.may_negotiate() {
            return false;
        }
        let kept = core.driver_features & !(u64::from(u32::MAX) << shift);
        core.driver_features = kept | u64::from(value) << shift;
        true
    }

    fn write_status(&mut self, value: u32) -> bool {
        let mut core = self.shared.lock();
        match core.write_status(value) {
            StatusWrite::Refused => return false,
            StatusWrite::Accepted => {}
            StatusWrite::Live => {
                // A driver that notified too early was ignored: look now.
                for index in 0..core.queues.len() {
                    if core.queues[index].is_ready() {
                        self.shared.notifier.notify(index);
                    }
                }
            }
            StatusWrite::Reset => {
                self.shared.metrics.resets.increment();
                // Under the lock: nobody can raise it for the device of before any more.
                self.shared.interrupt.set_status(0);
                drop(core);
                self.device_features_select = 0;
                self.driver_features_select = 0;
                self.queue_select = 0;
            }
        }
        true
    }

    fn write_queue_ready(&self, value: u32) -> bool {
        let mut core = self.shared.lock();
        let index = self.queue_select as usize;
        let Some(queue) = core.queues.get_mut(index) else { return false };
        match (value, queue.is_ready()) {
            (0, _) => queue.disable(),
            (1, false) if core.may_set_up() => {
                if let Err(error) = core.enable_queue(index, &self.shared.memory) {
                    core.fail(&error, &self.shared.interrupt, &self.shared.metrics);
                }
            }
            _ => return false,
        }
        true
    }

    fn write_queue_register(&self, offset: u64, value: u32) -> bool {
        let mut core = self.shared.lock();
        let may_set_up = core.may_set_up();
        let queue = match core.queues.get_mut(self.queue_select as usize) {
            Some(queue) if may_set_up && !queue.is_ready() => queue,
            _ => return false,
        };
        let rings = &mut queue.claimed;
        match offset {
            reg::QUEUE_NUM => rings.size = value,
            reg::QUEUE_DESC_LOW => set_low(&mut rings.descriptors, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut rings.descriptors, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut rings.available, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut rings.available, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut rings.used, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut rings.used, value),
            _ => return false,
        }
        true
    }

    fn notify(&self, value: u32) {
        let core = self.shared.lock();
        let index = value as usize;
        if core.is_live() && core.queues.get(index).is_some_and(|queue| queue.is_ready()) {
            self.shared.notifier.notify(index);
        } else {
            self.shared.metrics.early_notifications.increment();
        }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.shared.lock().device.config();
        data.fill(0);
        if let Some(there) = config.get(offset..) {
            let len = there.len().min(data.len());
            data[..len].copy_from_slice(&there[..len]);
        }
    }

    fn bad_access(&self) {
        self.shared.metrics.bad_accesses.increment();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> 32 << 32 | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = u64::from(*address as u32) | u64::from(value) << 32;
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync + 'static> BusDevice for MmioTransport<D, M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Some(at), Ok(_)) = (offset.checked_sub(CONFIG_SPACE), u32::try_from(offset)) {
            return self.read_config(at as usize, data);
        }
        let value = if data.len() == 4 { self.read_register(offset) } else { None };
        match value {
            Some(value) => data.copy_from_slice(&value.to_le_bytes()),
            None => {
                data.fill(0);
                self.bad_access();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let accepted = if let Some(at) = offset.checked_sub(CONFIG_SPACE) {
            // Inside of SIZE: no truncation.
            self.shared.lock().device.write_config(at as usize, data)
        } else {
            match <[u8; 4]>::try_from(data) {
                Ok(bytes) => self.write_register(offset, u32::from_le_bytes(bytes)),
                Err(_) => false,
            }
        };
        if !accepted {
            self.bad_access();
        }
    }
}
