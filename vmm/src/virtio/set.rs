//! All virtio devices of a machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use devices::bus::{Bus, BusRange};
use devices::metrics::Counter;
use devices::virtio::balloon::{Balloon, PAGE};
use devices::virtio::block::{Block, DiskError, DiskFile};
use devices::virtio::console::Console;
use devices::virtio::mmio::{QuiesceError, SIZE};
use devices::virtio::rng::{HostEntropy, Rng};
use devices::virtio::Handle;
use devices::{BusError, InterruptLine, Payload, PersistError};
use kvm_ioctls::VmFd;

use super::cards::{Card, Cards, Unplugged};
use super::slot::{Counters, Slot, Socket};
use super::{cards, disk, VirtioError};
use crate::acpi::VirtioMmioDevice;
use crate::config::{CacheMode, VmConfig};
use crate::console::ConsoleWriter;
use crate::control::DeviceStats;
use crate::layout;
use crate::memory::{GuestRam, Memory, RamDiscard};

type DiskHandle = Handle<Block<DiskFile>, Memory>;

/// Whether the machine that is made may use its disks at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOwnership {
    /// It is the one that runs on them.
    Owner,
    /// It will be: the VM is still at another process.
    Incoming,
}

/// What the devices are made with.
pub struct VirtioParts<'a> {
    /// Configuration of the VM.
    pub config: &'a VmConfig,
    /// The VM.
    pub vm: &'a VmFd,
    /// Its memory.
    pub ram: &'a GuestRam,
    /// Makes the interrupt line of a GSI.
    pub line: &'a dyn Fn(u32) -> Arc<dyn InterruptLine>,
    /// Where output of the virtio console goes.
    pub console: ConsoleWriter,
    /// Whether disks may be used at once.
    pub disks: DiskOwnership,
}

/// The virtio devices of a machine. They are quiesced until [`VirtioSet::resume`].
#[derive(Default)]
pub struct VirtioSet {
    slots: Vec<Slot>,
    disks: Vec<(DiskHandle, Option<Arc<File>>)>,
    cards: Cards,
    balloon: Option<Handle<Balloon<RamDiscard>, Memory>>,
    console: Option<Handle<Console<ConsoleWriter>, Memory>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counters by name, read when asked.
macro_rules! counters {
    ($metrics:expr, $($field:ident),+) => {{
        let metrics = $metrics;
        Box::new(move || {
            let read = |counter: &Counter| counter.get();
            BTreeMap::from([$((stringify!($field).to_owned(), read(&metrics.$field))),+])
        }) as Counters
    }};
}

impl VirtioSet {
    /// Makes the devices of `parts.config`: disks, cards, then the others, each in the next slot.
    ///
    /// # Errors
    /// The first device that cannot be made.
    pub fn new(parts: VirtioParts<'_>) -> Result<Self, VirtioError> {
        let mut set = Self::default();
        let config = parts.config;
        let memory = parts.ram.memory();
        let socket = |slots: &[Slot]| {
            // As many as there are interrupts for.
            let slot = slots.len() as u32;
            Socket { vm: parts.vm, memory, line: (parts.line)(layout::virtio_gsi(slot)), slot }
        };
        for (index, disk) in config.disks.iter().enumerate() {
            let file = disk::open(disk, &config.disks[..index], parts.disks)?;
            let cached = disk.cache != CacheMode::Writethrough && !disk.readonly;
            let host_file = cached.then(|| file.file());
            let block = Block::new(file, &disk.id, disk.cache.into());
            let counters = counters!(
                block.metrics(),
                reads,
                bytes_read,
                writes,
                bytes_written,
                flushes,
                clears,
                errors,
                unsupported
            );
            let (slot, handle) =
                socket(&set.slots).plug(&disk.id, block, counters, |_| Ok(None))?;
            set.slots.push(slot);
            set.disks.push((handle, host_file));
        }
        for net in &config.nets {
            let Unplugged { card, metrics, port, pin } =
                set.cards.make(net, &config.name, parts.disks)?;
            let counters = counters!(
                metrics,
                rx_frames,
                rx_bytes,
                rx_dropped,
                tx_frames,
                tx_bytes,
                tx_dropped,
                backend_errors,
                announcements,
                announced,
                kept,
                backlogged,
                kept_dropped,
                late,
                early_dropped
            );
            let backend = |card: &Handle<Card, Memory>| cards::backend(card, &port).map(Some);
            let (slot, handle) = socket(&set.slots).plug(&net.id, card, counters, backend)?;
            set.slots.push(slot);
            set.cards.plugged(&net.id, handle, port, pin);
        }
        if config.rng {
            let entropy = HostEntropy::new().map_err(|error| VirtioError::Setup {
                device: "the entropy device (/dev/urandom)".to_owned(),
                error,
            })?;
            let rng = Rng::new(entropy);
            let counters = counters!(rng.metrics(), bytes, source_errors);
            set.slots.push(socket(&set.slots).plug("rng", rng, counters, |_| Ok(None))?.0);
        }
        if let Some(balloon) = config.balloon {
            let balloon = Balloon::new(parts.ram.discarder(), balloon.deflate_on_oom);
            let counters = counters!(
                balloon.metrics(),
                target_pages,
                actual_pages,
                inflated,
                deflated,
                discard_errors
            );
            let (slot, handle) =
                socket(&set.slots).plug("balloon", balloon, counters, |_| Ok(None))?;
            set.slots.push(slot);
            set.balloon = Some(handle);
        }
        if config.virtio_console {
            let console = Console::new(parts.console);
            let counters = counters!(console.metrics(), bytes_out, output_errors, bytes_in);
            let (slot, handle) =
                socket(&set.slots).plug("console", console, counters, |_| Ok(None))?;
            set.slots.push(slot);
            set.console = Some(handle);
        }
        Ok(set)
    }

    /// What ACPI says of `devices` virtio devices.
    #[must_use]
    pub fn acpi(devices: usize) -> Vec<VirtioMmioDevice> {
        let describe = |slot: u8| VirtioMmioDevice {
            uid: slot,
            // Below 4 GiB: no truncation.
            base: layout::virtio_mmio(slot.into()) as u32,
            size: SIZE as u32,
            gsi: layout::virtio_gsi(slot.into()),
        };
        (0..).take(devices).map(describe).collect()
    }

    /// Number of devices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Puts the registers of all devices on `bus`.
    ///
    /// # Errors
    /// Something else is there.
    pub fn attach(&self, bus: &mut Bus) -> Result<(), BusError> {
        for (index, slot) in (0..).zip(&self.slots) {
            let base = layout::virtio_mmio(index);
            let range = BusRange { name: "virtio-mmio", base, size: SIZE };
            bus.insert(range, Arc::clone(&slot.bus_device))?;
        }
        Ok(())
    }

    /// Brings all devices to rest, or none.
    ///
    /// # Errors
    /// A request did not end by `deadline`; all devices go on.
    pub fn quiesce(&self, deadline: Instant) -> Result<(), QuiesceError> {
        self.slots.iter().for_each(|slot| slot.control.begin_quiesce());
        for slot in &self.slots {
            if let Err(error) = slot.control.quiesce(deadline) {
                self.slots.iter().for_each(|slot| slot.control.resume());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets the devices work: every interrupt is raised and every queue looked at once, since what
    /// was on its way when the machine stopped is in nobody's state.
    pub fn resume(&self) {
        for slot in &self.slots {
            slot.control.raise_pending();
            slot.control.resume();
        }
    }

    /// Ends the threads of the devices.
    pub fn stop(&self) {
        self.slots.iter().for_each(|slot| lock(&slot.worker).stop());
    }

    /// The first device that cannot be migrated or saved, and why.
    #[must_use]
    pub fn migration_blocker(&self) -> Option<String> {
        self.slots.iter().find_map(|slot| {
            slot.control.migration_blocker().map(|why| format!("{}: {why}", slot.name()))
        })
    }

    /// Whether there is a device in slot `instance` with state of this kind.
    #[must_use]
    pub fn has_section(&self, kind: &str, instance: u32) -> bool {
        let slot = self.slots.get(instance as usize);
        slot.is_some_and(|slot| kind == REGISTERS || kind == slot.control.name())
    }

    /// State of all devices, which are quiesced: registers, then the device, slot by slot.
    ///
    /// # Errors
    /// See [`PersistError`].
    pub fn save(&self) -> Result<Vec<Payload>, PersistError> {
        let mut all = Vec::with_capacity(2 * self.slots.len());
        for (instance, slot) in (0..).zip(&self.slots) {
            all.push(lock(&slot.registers).save_registers(instance)?);
            all.push(slot.control.save_device(instance)?);
        }
        Ok(all)
    }

    /// Where the rings of all devices are in guest memory: guest-physical address and length, bytes.
    #[must_use]
    pub fn rings(&self) -> Vec<(u64, u64)> {
        self.slots.iter().flat_map(|slot| lock(&slot.registers).rings()).collect()
    }

    /// Restores all devices from what `find` gives for a kind and a slot.
    ///
    /// # Errors
    /// Those of `find`; with kind and slot, those of the device.
    pub fn load<E>(
        &self,
        find: impl Fn(&'static str, u32) -> Result<Payload, E>,
        failed: impl Fn(&'static str, u32, PersistError) -> E,
    ) -> Result<(), E> {
        self.load_registers(&find, &failed)?;
        for (instance, slot) in (0..).zip(&self.slots) {
            let kind = slot.control.name();
            let payload = find(kind, instance)?;
            slot.control.restore_device(&payload).map_err(|e| failed(kind, instance, e))?;
        }
        self.cards.restored();
        Ok(())
    }

    /// As [`VirtioSet::load`], of the registers alone: what a reset of the machine takes away. What
    /// the host set (cables, the balloon's target) stays.
    ///
    /// # Errors
    /// As [`VirtioSet::load`].
    pub fn load_registers<E>(
        &self,
        find: impl Fn(&'static str, u32) -> Result<Payload, E>,
        failed: impl Fn(&'static str, u32, PersistError) -> E,
    ) -> Result<(), E> {
        for (instance, slot) in (0..).zip(&self.slots) {
            let payload = find(REGISTERS, instance)?;
            let restored = lock(&slot.registers).restore_registers(&payload);
            restored.map_err(|e| failed(REGISTERS, instance, e))?;
        }
        Ok(())
    }

    /// Counters of all devices. Takes no lock of a device.
    #[must_use]
    pub fn stats(&self) -> Vec<DeviceStats> {
        self.slots.iter().map(Slot::stats).collect()
    }

    /// Has the console's input, if its driver is there; how much of it was taken then.
    #[must_use]
    pub fn console_input(&self, bytes: &[u8]) -> Option<usize> {
        self.console.as_ref()?.with_queues(|console, context| console.receive(context, bytes))
    }

    /// Has `callback` called when refused console input would be taken.
    pub fn on_console_input_wanted(&self, callback: impl Fn() + Send + 'static) {
        if let Some(console) = &self.console {
            console.with_device(|console| console.on_input_wanted(callback));
        }
    }

    /// Tells the guest the size of its console. False where there is no virtio console.
    pub fn resize_console(&self, columns: u16, rows: u16) -> bool {
        let Some(console) = &self.console else { return false };
        console.change_config(|console| console.resize(columns, rows));
        true
    }

    /// Sets the memory that the balloon is to take, bytes. False where there is no balloon.
    pub fn set_balloon(&self, bytes: u64) -> bool {
        let Some(balloon) = &self.balloon else { return false };
        // Guest memory ends far below 2^44 bytes.
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        balloon.change_config(|balloon| balloon.set_target(pages));
        true
    }

    /// While held, the balloon's requests wait.
    pub fn hold_balloon(&self, held: bool) {
        let Some(balloon) = &self.balloon else { return };
        balloon.with_device(|balloon| balloon.hold(held));
        if !held {
            devices::virtio::VirtioControl::resume(balloon);
        }
    }

    /// Plugs the cable of card `id` in or out. False where there is no such card.
    pub fn set_link(&self, id: &str, up: bool) -> bool {
        self.cards.set_link(id, up)
    }

    /// The network cards.
    #[must_use]
    pub fn cards(&self) -> &Cards {
        &self.cards
    }

    /// Files of disks that the host may not have written yet, to be flushed beside the devices.
    #[must_use]
    pub fn files_to_flush(&self) -> Vec<Arc<File>> {
        self.disks.iter().filter_map(|(_, file)| file.clone()).collect()
    }

    /// Makes this process the owner of all disks, after a hand-over.
    ///
    /// # Errors
    /// Another process still owns one.
    pub fn take_disks(&self) -> Result<(), DiskError> {
        self.disks
            .iter()
            .try_for_each(|(disk, _)| disk.with_device(|block| block.backend_mut().take_owner()))
    }

    /// Gives all disks up, after a hand-over.
    ///
    /// # Errors
    /// The kernel refuses to unlock.
    pub fn release_disks(&self) -> Result<(), DiskError> {
        self.disks
            .iter()
            .try_for_each(|(disk, _)| disk.with_device(|block| block.backend_mut().release_owner()))
    }
}

/// Kind of the state of a device's registers.
const REGISTERS: &str = "virtio-mmio";
