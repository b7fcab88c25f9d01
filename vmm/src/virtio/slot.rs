//! One device in its slot.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use devices::bus::SharedDevice;
use devices::virtio::{Handle, MmioTransport, VirtioControl, VirtioDevice};
use devices::{BusDevice, InterruptLine, Payload, Persist, PersistError};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::worker::{Backend, Kicks, Worker};
use super::VirtioError;
use crate::control::DeviceStats;
use crate::layout;
use crate::memory::Memory;

/// Registers of a device whatever it is.
pub(super) trait Registers: BusDevice + Send {
    fn save_registers(&self, instance: u32) -> Result<Payload, PersistError>;
    fn restore_registers(&mut self, payload: &Payload) -> Result<(), PersistError>;
    /// See [`MmioTransport::rings`].
    fn rings(&self) -> Vec<(u64, u64)>;
}

impl<D: VirtioDevice> Registers for MmioTransport<D, Memory> {
    fn save_registers(&self, instance: u32) -> Result<Payload, PersistError> {
        self.save_payload(instance)
    }

    fn restore_registers(&mut self, payload: &Payload) -> Result<(), PersistError> {
        self.restore_payload(payload)
    }

    fn rings(&self) -> Vec<(u64, u64)> {
        self.rings()
    }
}

/// The device's own counters by name.
pub(super) type Counters = Box<dyn Fn() -> BTreeMap<String, u64> + Send + Sync>;

/// A device in its slot.
pub(super) struct Slot {
    /// Name for a person: that of the disk or card, or the kind of device.
    id: String,
    pub(super) control: Arc<dyn VirtioControl>,
    pub(super) registers: Arc<Mutex<dyn Registers>>,
    pub(super) bus_device: SharedDevice,
    stats: Box<dyn Fn() -> DeviceStats + Send + Sync>,
    pub(super) worker: Mutex<Worker>,
}

/// What a device is put into its slot with.
pub(super) struct Socket<'a> {
    pub(super) vm: &'a VmFd,
    pub(super) memory: &'a Memory,
    pub(super) line: Arc<dyn InterruptLine>,
    pub(super) slot: u32,
}

impl Socket<'_> {
    /// Puts `device` into the slot and starts its thread. It stays quiesced.
    pub(super) fn plug<D>(
        self,
        id: &str,
        device: D,
        counters: Counters,
        backend: impl FnOnce(&Handle<D, Memory>) -> io::Result<Option<Backend>>,
    ) -> Result<(Slot, Handle<D, Memory>), VirtioError>
    where
        D: VirtioDevice + Persist<Error = PersistError>,
    {
        let failed = |error| VirtioError::Setup { device: format!("{} {id}", D::NAME), error };
        let queues = device.queue_sizes().len();
        let kicks = Arc::new(Kicks::new(queues).map_err(failed)?);
        let memory = self.memory.clone();
        let transport = MmioTransport::new(device, memory, self.line, Arc::clone(&kicks) as _);
        let handle = transport.handle();
        let base = layout::virtio_mmio(self.slot);
        let at = IoEventAddress::Mmio(base + MmioTransport::<D, Memory>::NOTIFY_OFFSET);
        for (queue, kick) in kicks.fds() {
            (self.vm.register_ioevent(kick, &at, queue))
                .map_err(|e| failed(io::Error::from_raw_os_error(e.errno())))?;
        }
        let control: Arc<dyn VirtioControl> = Arc::new(handle.clone());
        // It has no request yet: nothing to wait for.
        let _ = control.quiesce(std::time::Instant::now());
        let backend = backend(&handle).map_err(failed)?;
        let name = format!("{}-{id}", D::NAME.trim_start_matches("virtio-"));
        let worker = Worker::start(&name, Arc::clone(&control), kicks, backend).map_err(failed)?;
        let transport = Arc::new(Mutex::new(transport));
        let stats = {
            let (id, slot, handle) = (id.to_owned(), self.slot, handle.clone());
            move || {
                let metrics = handle.metrics();
                DeviceStats {
                    id: id.clone(),
                    kind: D::NAME.to_owned(),
                    slot,
                    notifications: metrics.notifications.get(),
                    interrupts: handle.interrupt().raised.get(),
                    resets: metrics.resets.get(),
                    needs_resets: metrics.needs_resets.get(),
                    early_notifications: metrics.early_notifications.get(),
                    bad_accesses: metrics.bad_accesses.get(),
                    counters: counters(),
                }
            }
        };
        let slot = Slot {
            id: id.to_owned(),
            control,
            registers: Arc::clone(&transport) as _,
            bus_device: transport,
            stats: Box::new(stats),
            worker: Mutex::new(worker),
        };
        Ok((slot, handle))
    }
}

impl Slot {
    /// Name for a person, with the kind of device.
    pub(super) fn name(&self) -> String {
        format!("{} {}", self.control.name(), self.id)
    }

    pub(super) fn stats(&self) -> DeviceStats {
        (self.stats)()
    }
}
