//! The machine at both ends of a migration: held by the engine and given away; made for a VM that
//! comes, and started.

use std::sync::atomic::Ordering;
use std::sync::TryLockError;
use std::thread;
use std::time::{Duration, Instant};

use migration::{DestinationVm, Gfn, LateFrames, Section, SourceVm, VmError};
use serde_json::json;

use super::{lock, Machine, MachineError};
use crate::control::VmStatus;
use crate::gate::Target;

/// How long a request of the guest is waited for before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

impl Machine {
    /// Stops the guest for the engine, until [`Machine::release`] or for good. An operator's pause
    /// and resume meanwhile only change what release does. A request of the guest (reset, power-off)
    /// that is on its way is waited for: it is in this process only.
    pub(super) fn hold(&self, deadline: Instant) -> Result<(), MachineError> {
        loop {
            let life = lock(&self.life);
            if self.held.load(Ordering::Acquire) {
                return Ok(());
            }
            let was_running = self.status() == VmStatus::Running;
            self.pause_held(deadline)?;
            if !self.context.requested.load(Ordering::SeqCst) {
                self.operator_paused.store(!was_running, Ordering::Release);
                self.held.store(true, Ordering::Release);
                self.virtio.cards().keep();
                return Ok(());
            }
            if was_running {
                // The gate stays closed until the request was served.
                self.resume_held()?;
            }
            drop(life);
            // Whoever ends the VM waits for the engine.
            let ends = self.context.ends.load(Ordering::SeqCst);
            if ends || Instant::now() >= deadline {
                return Err(MachineError::Busy);
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Ends [`Machine::hold`]: the guest goes on, unless an operator wants it paused.
    pub fn release(&self) -> Result<(), MachineError> {
        // Nobody else takes it: who has not does not wait for a save.
        if !self.is_held() {
            return Ok(());
        }
        let _life = lock(&self.life);
        if !self.held.load(Ordering::Acquire) {
            return Ok(());
        }
        self.virtio.cards().open();
        if !self.operator_paused.load(Ordering::Acquire) {
            self.resume_held()?;
            self.virtio.cards().announce_again();
        }
        self.held.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether the engine holds the guest.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Whether an operator wants the held guest paused.
    #[must_use]
    pub fn operator_paused(&self) -> bool {
        self.operator_paused.load(Ordering::Acquire)
    }

    /// Notes an operator's wish about a guest that the engine holds. False when it does not.
    pub(super) fn wish(&self, paused: bool) -> bool {
        let held = self.is_held();
        if held {
            self.operator_paused.store(paused, Ordering::Release);
            self.events.push("wish", json!({ "paused": paused }));
        }
        held
    }

    /// A guest that is migrated here waits for an operator to resume it.
    pub fn arrive_paused(&self) {
        self.arrives_paused.store(true, Ordering::Release);
    }

    /// What changes the machine cannot be done while its state may be on its way already.
    pub(super) fn check_not_held(&self) -> Result<(), MachineError> {
        match self.is_held() {
            true => Err(MachineError::Held),
            false => Ok(()),
        }
    }

    /// Why the VM cannot be migrated or saved now: memory that is still on its way, or a device.
    #[must_use]
    pub fn migration_blocker(&self) -> Option<String> {
        if self.is_draining() {
            return Some("a part of its memory is still on the host that it came from".to_owned());
        }
        self.virtio.migration_blocker()
    }

    /// Announces the guest to the network: it is at another port of a switch than it was.
    pub fn announce_move(&self) {
        let cards = self.virtio.cards();
        if !cards.is_empty() {
            cards.announce_move();
            self.events.push("announced", json!({ "cards": cards.len() }));
        }
    }

    /// Whether a part of the guest's memory is still at its source.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

impl SourceVm for Machine {
    fn first_pages(&self, sections: &[Section]) -> Vec<Gfn> {
        Machine::first_pages(self, sections)
    }

    fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    fn write_counts(&self) -> Option<Vec<u64>> {
        self.vcpus.iter().map(|vcpu| vcpu.write_faults()).collect()
    }

    fn throttle(&self, run: &[f64]) {
        self.throttle.set(&self.vcpus, run);
    }

    fn flush_disks(&self) -> Result<(), VmError> {
        for file in self.virtio.files_to_flush() {
            file.sync_data().map_err(|error| VmError::Os {
                what: "flushing the cache of a disk".to_owned(),
                error,
            })?;
        }
        Ok(())
    }

    fn late_frames(&self) -> Option<&dyn LateFrames> {
        let cards = self.virtio.cards();
        (!cards.is_empty()).then_some(cards as _)
    }

    fn release_ownership(&self) -> Result<(), VmError> {
        // All of them before the first is given up.
        self.flush_disks()?;
        self.virtio.release_disks().map_err(|error| VmError::Other(error.to_string()))
    }

    fn reclaim_ownership(&self) -> Result<(), VmError> {
        self.virtio.take_disks().map_err(|error| VmError::Other(error.to_string()))
    }
}

impl DestinationVm for Machine {
    fn load_state(&self, sections: &[Section], paused: Instant) -> Result<(), VmError> {
        Machine::load_sections(self, sections, Some(paused.elapsed()))
            .map_err(|error| VmError::Other(error.to_string()))
    }

    fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Release);
        self.virtio.hold_balloon(draining);
        self.virtio.cards().set_behind(draining);
    }

    fn freeze(&self, frozen: bool) -> bool {
        let _life = match self.life.try_lock() {
            Ok(life) => life,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Who holds it may wait for memory, or for a vCPU that does.
            Err(TryLockError::WouldBlock) => return false,
        };
        self.frozen.store(frozen, Ordering::Release);
        self.events.push(if frozen { "frozen" } else { "thawed" }, serde_json::Value::Null);
        if self.status() == VmStatus::Running {
            if frozen {
                self.context.gate.set(Target::Park);
                self.kick();
            } else {
                self.let_run();
            }
        }
        true
    }

    fn late_frame(&self, card: u16, bytes: &[u8]) -> Result<(), VmError> {
        match self.virtio.cards().inject(card, bytes) {
            true => Ok(()),
            false => Err(VmError::Other(format!(
                "{} bytes for network card {card} of {}",
                bytes.len(),
                self.virtio.cards().len()
            ))),
        }
    }

    fn take_ownership(&self) -> Result<(), VmError> {
        self.reclaim_ownership()
    }

    fn start(&self, run: bool) -> Result<(), VmError> {
        self.set_created();
        self.virtio.cards().open();
        if run && !self.arrives_paused.load(Ordering::Acquire) {
            Machine::resume(self).map_err(|error| VmError::Other(error.to_string()))?;
        }
        self.announce_move();
        Ok(())
    }
}
