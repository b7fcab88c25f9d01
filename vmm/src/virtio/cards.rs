//! The network cards of a machine: what is done with all of them when their guest moves.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use devices::virtio::net::{
    FdBackend, MacAddress, Net, NetConfig as CardConfig, NetMetrics, RECEIVE,
};
use devices::virtio::{Handle, Progress};
use migration::{LateFrame, LateFrames};

use super::announce::TIMES;
use super::backlog::Backlog;
use super::port::{Bell, Intake, Port, PortBackend, SetOffloads};
use super::worker::Backend;
use super::{tap, DiskOwnership, VirtioError};
use crate::config::NetConfig;
use crate::memory::Memory;
use crate::network::{self, Pin};

/// Most bytes of frames that are taken in one go.
const TAKE_BYTES: usize = 128 << 10;

pub(super) type Card = Net<PortBackend>;

struct Plugged {
    id: String,
    handle: Handle<Card, Memory>,
    port: Arc<Port>,
    /// While memory of the guest is still on its way.
    backlog: Mutex<Option<Backlog>>,
    /// Its entry in the forwarding table of the bridge that it is plugged into.
    pin: Option<Pin>,
}

/// All cards, in the order of the configuration.
#[derive(Default)]
pub struct Cards {
    cards: Vec<Plugged>,
    bell: Arc<Bell>,
}

/// A card on its tap, not yet in its slot.
pub(super) struct Unplugged {
    pub(super) card: Card,
    pub(super) metrics: Arc<NetMetrics>,
    pub(super) port: Arc<Port>,
    pub(super) pin: Option<Pin>,
}

impl Cards {
    /// Makes the card of `config` on its tap, which is made too unless it is there. `vm` is the VM's name.
    pub(super) fn make(
        &self,
        config: &NetConfig,
        vm: &str,
        ownership: DiskOwnership,
    ) -> Result<Unplugged, VirtioError> {
        let failed =
            |error| VirtioError::Setup { device: format!("network card {}", config.id), error };
        let (tap, pin) = match config.attachment.tap() {
            Some(tap) => (tap::open(tap)?, None),
            None => network::make_tap(config, vm, tap::make)?,
        };
        let second = tap.try_clone().map_err(failed)?;
        let metrics = Arc::<NetMetrics>::default();
        let mac = MacAddress(config.mac.0);
        let intake = match ownership {
            DiskOwnership::Owner => Intake::Open,
            DiskOwnership::Incoming => Intake::Drop,
        };
        let bell = Arc::clone(&self.bell);
        let port = Arc::new(Port::new(second, mac, Arc::clone(&metrics), bell, intake));
        let backend = FdBackend::new(tap, Some(tap::set_offloads as SetOffloads));
        let backend = PortBackend::new(backend, Arc::clone(&port));
        let card = CardConfig { mac, mtu: config.mtu };
        let card = Net::with_metrics(backend, card, Arc::clone(&metrics));
        Ok(Unplugged { card, metrics, port, pin })
    }

    pub(super) fn plugged(
        &mut self,
        id: &str,
        handle: Handle<Card, Memory>,
        port: Arc<Port>,
        pin: Option<Pin>,
    ) {
        let backlog = Mutex::default();
        self.cards.push(Plugged { id: id.to_owned(), handle, port, backlog, pin });
    }

    /// Number of cards.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cards.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cards.is_empty()
    }

    /// Plugs the cable of card `id` in or out. False where there is no such card.
    pub(super) fn set_link(&self, id: &str, up: bool) -> bool {
        let Some(card) = self.cards.iter().find(|card| card.id == id) else { return false };
        card.port.set_link(up);
        card.handle.change_config(|card| card.set_link(up));
        true
    }

    /// The state of the cards was restored: their ports are to know of it.
    pub(super) fn restored(&self) {
        for card in &self.cards {
            card.port.set_link(card.handle.with_device(|card| card.link_is_up()));
        }
    }

    /// The guest has stopped and may be given away: from now on frames for it are kept.
    pub fn keep(&self) {
        for card in &self.cards {
            card.port.keep();
            // Its thread may have given up waiting for the tap.
            card.handle.look_at(RECEIVE);
        }
    }

    /// The guest is about to run here. It gets what was kept; what came to a destination before is
    /// dropped, because the source had it as well.
    pub fn open(&self) {
        self.cards.iter().for_each(|card| card.port.open());
    }

    /// Memory of the guest is still on its way, or all of it is there: until then frames wait beside the taps, whose
    /// queues are short, however long the guest or a card's thread waits for a page.
    pub fn set_behind(&self, behind: bool) {
        for Plugged { id, handle, port, backlog, .. } in &self.cards {
            let mut backlog = backlog.lock().unwrap_or_else(PoisonError::into_inner);
            // One that is there ends first.
            *backlog = None;
            port.set_behind(behind);
            if behind {
                let look = handle.clone();
                let started = Backlog::start(id, Arc::clone(port), move || look.look_at(RECEIVE));
                match started {
                    Ok(started) => *backlog = Some(started),
                    Err(error) => {
                        tracing::warn!(%error, card = id, "no thread for frames that wait for memory");
                        port.set_behind(false);
                    }
                }
            }
            handle.look_at(RECEIVE);
        }
    }

    /// Announces all cards to the network, now and on a schedule: the guest is at another port of a switch.
    pub fn announce_move(&self) {
        self.announce(TIMES);
    }

    /// Announces all cards once: the guest has been silent.
    pub fn announce_again(&self) {
        self.announce(1);
    }

    fn announce(&self, times: usize) {
        let now = Instant::now();
        for card in &self.cards {
            card.port.announce(now, times);
            card.handle.look_at(RECEIVE);
        }
    }

    /// Gives the guest a frame that came to its old host. False where there is no such card, or that is no frame.
    #[must_use]
    pub fn inject(&self, card: u16, frame: &[u8]) -> bool {
        let Some(card) = self.cards.get(usize::from(card)) else { return false };
        let taken = card.port.inject(frame);
        card.handle.look_at(RECEIVE);
        taken
    }
}

impl LateFrames for Cards {
    fn hold(&self, held: bool) {
        for Plugged { id, pin, .. } in &self.cards {
            let Some(Err(error)) = pin.as_ref().map(|pin| pin.set(held)) else { continue };
            // Without it, what is sent here by who does not know better is lost as on any network.
            tracing::info!(%error, held, card = id, "the bridge's entry for a card stays as it is");
        }
    }

    fn take(&self, committed: Instant, deadline: Instant) -> Vec<LateFrame> {
        loop {
            let rung = self.bell.count();
            let mut taken = Vec::new();
            let mut bytes = 0;
            for (index, card) in (0..).zip(&self.cards) {
                while bytes < TAKE_BYTES {
                    let Some(frame) = card.port.take(committed) else { break };
                    bytes += frame.len();
                    taken.push(LateFrame { card: index, bytes: frame.into_vec() });
                }
            }
            if !taken.is_empty() || Instant::now() >= deadline {
                return taken;
            }
            self.bell.wait(rung, deadline);
        }
    }
}

/// What the card's thread does beside its queues: frames of the tap, and announcements.
pub(super) fn backend(card: &Handle<Card, Memory>, port: &Arc<Port>) -> io::Result<Backend> {
    let fd = port.tap().as_fd().try_clone_to_owned()?;
    let ready = {
        let (handle, port) = (card.clone(), Arc::clone(port));
        move || {
            if port.is_behind() {
                // Another thread reads the tap, and tells of it.
                return false;
            }
            let received = handle.with_queues(|card, context| {
                // Frames that are left make the tap readable again, but not those that wait before it: the
                // guest's own have their turn.
                let more = card.receive(context)? == Progress::More;
                if more && port.is_waited_at() {
                    handle.look_at(RECEIVE);
                }
                Ok(more || card.wants_frames())
            });
            // Without a driver, or while the machine stands: a notification follows when that changes.
            received.unwrap_or_else(|| port.take_in())
        }
    };
    let timer = {
        let (card, port) = (card.clone(), Arc::clone(port));
        move |now| {
            let (ask, next) = port.tick(now);
            if ask {
                card.change_config(Net::announce);
            }
            next
        }
    };
    Ok(Backend { fd, queue: RECEIVE, ready: Box::new(ready), timer: Box::new(timer) })
}
