//! The frozen state of a transport: registers and queues.

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use super::core::may_be_status;
use super::MmioTransport;
use crate::virtio::ids::{features, interrupt_status, status};
use crate::virtio::queue::ClaimedRings;
use crate::virtio::{VirtQueue, VirtioDevice};
use crate::{Persist, PersistError};

/// State of a virtio-mmio transport, version 1: the registers by their names in the specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// DeviceID, to be compared.
    pub device_id: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// QueueSel.
    pub queue_select: u32,
    /// Status.
    pub status: u32,
    /// Features that the driver chose.
    pub driver_features: u64,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The queues, by number.
    pub queues: Vec<QueueState>,
}

/// State of a queue. Addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// QueueNum, entries.
    pub size: u32,
    /// QueueDesc.
    pub descriptors: u64,
    /// QueueDriver.
    pub available: u64,
    /// QueueDevice.
    pub used: u64,
    /// How far the queue is served; absent while it is not ready.
    pub indices: Option<IndexState>,
}

/// How far a queue is served. Indices count modulo 2^16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexState {
    /// Next entry of the available ring to look at.
    pub next_available: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
    /// `next_used` at the last decision about an interrupt (EVENT_IDX); absent before the first.
    pub signalled_used: Option<u16>,
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync + 'static> MmioTransport<D, M> {
    /// Where the rings of queues that are ready are in guest memory: guest-physical address and length, bytes
    /// (virtio 1.2, section 2.7).
    #[must_use]
    pub fn rings(&self) -> Vec<(u64, u64)> {
        let core = self.shared.lock();
        let ready = core.queues.iter().filter(|queue| queue.indices().is_some());
        let rings = ready.map(|queue| &queue.claimed).flat_map(|rings| {
            let size = u64::from(rings.size);
            [
                (rings.descriptors, 16 * size),
                (rings.available, 6 + 2 * size),
                (rings.used, 6 + 8 * size),
            ]
        });
        rings.collect()
    }

    fn queue_from(
        index: usize,
        max_size: u16,
        saved: &QueueState,
        event_idx: bool,
        memory: &M,
    ) -> Result<VirtQueue, PersistError> {
        let invalid = |reason: String| PersistError::Invalid {
            kind: Self::KIND,
            reason: format!("{} queue {index}: {reason}", D::NAME),
        };
        let mut queue = VirtQueue::new(max_size);
        queue.claimed = ClaimedRings {
            size: saved.size,
            descriptors: saved.descriptors,
            available: saved.available,
            used: saved.used,
        };
        if let Some(indices) = saved.indices {
            queue.enable(memory, event_idx).map_err(|error| invalid(error.to_string()))?;
            let held = indices.next_available.wrapping_sub(indices.next_used);
            if u32::from(held) > saved.size {
                return Err(invalid(format!("{held} chains under way in {} entries", saved.size)));
            }
            queue.set_indices((indices.next_available, indices.next_used, indices.signalled_used));
        }
        Ok(queue)
    }
}

impl<D: VirtioDevice, M: GuestMemory + Send + Sync + 'static> Persist for MmioTransport<D, M> {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u16 = 1;
    type State = MmioState;
    type Error = PersistError;

    /// The device is quiesced.
    fn save(&self) -> Result<MmioState, PersistError> {
        let core = self.shared.lock();
        let queues = core
            .queues
            .iter()
            .map(|queue| QueueState {
                size: queue.claimed.size,
                descriptors: queue.claimed.descriptors,
                available: queue.claimed.available,
                used: queue.claimed.used,
                indices: queue.indices().map(|(next_available, next_used, signalled_used)| {
                    IndexState { next_available, next_used, signalled_used }
                }),
            })
            .collect();
        Ok(MmioState {
            device_id: D::DEVICE_ID,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            status: core.status,
            driver_features: core.driver_features,
            interrupt_status: self.shared.interrupt.status(),
            config_generation: core.config_generation,
            queues,
        })
    }

    /// All of the state is checked before any of it is used. The device itself is reset, and told
    /// of its features if it was live; its own state is restored after this.
    fn restore(&mut self, state: &MmioState) -> Result<(), PersistError> {
        let invalid = |reason: String| PersistError::Invalid {
            kind: Self::KIND,
            reason: format!("{}: {reason}", D::NAME),
        };
        let mut core = self.shared.lock();
        if state.device_id != D::DEVICE_ID {
            let reason = format!("the saved device has number {}", state.device_id);
            return Err(invalid(reason));
        }
        if state.queues.len() != core.queues.len() {
            let (saved, here) = (state.queues.len(), core.queues.len());
            return Err(invalid(format!("{saved} queues were saved, {here} are here")));
        }
        let missing = state.driver_features & !core.offered_features();
        let settled = state.status & status::FEATURES_OK != 0;
        if settled && (missing != 0 || state.driver_features & features::VERSION_1 == 0) {
            return Err(invalid(format!(
                "the guest uses features {:#x}, of which {missing:#x} are not offered here: \
                 configure the device as it was",
                state.driver_features
            )));
        }
        if !may_be_status(state.status & !status::DEVICE_NEEDS_RESET) {
            let reason = format!("no driver sets status {:#x}", state.status);
            return Err(invalid(reason));
        }
        if !settled && state.queues.iter().any(|queue| queue.indices.is_some()) {
            return Err(invalid("a queue is ready before features are settled".into()));
        }
        if state.interrupt_status
            & !(interrupt_status::USED_BUFFER | interrupt_status::CONFIG_CHANGE)
            != 0
        {
            let reason = format!("interrupt status {:#x} has unknown bits", state.interrupt_status);
            return Err(invalid(reason));
        }
        let event_idx = state.driver_features & features::RING_EVENT_IDX != 0;
        let queues = state
            .queues
            .iter()
            .zip(&core.queues)
            .enumerate()
            .map(|(index, (saved, here))| {
                Self::queue_from(index, here.max_size(), saved, event_idx, &self.shared.memory)
            })
            .collect::<Result<Vec<_>, _>>()?;

        core.reset();
        core.queues = queues;
        core.status = state.status;
        core.driver_features = state.driver_features;
        core.config_generation = state.config_generation;
        if core.has(status::DRIVER_OK) {
            core.device.activate(state.driver_features);
        }
        self.shared.interrupt.set_status(state.interrupt_status);
        drop(core);
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        Ok(())
    }
}
