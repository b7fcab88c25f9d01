//! The live network card.

use std::fmt;
use std::io;
use std::sync::Arc;

use tracing::warn;
use vm_memory::GuestMemory;

use super::{NetBackend, NetMetrics, Offloads};
use crate::virtio::ids::device_id;
use crate::virtio::volatile_io::MAX_BUFFERS;
use crate::virtio::{Chain, Context, DeviceError, Progress, VirtioDevice};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Number of the queue of buffers for frames.
pub const RECEIVE: usize = 0;
/// Number of the queue of frames to send.
pub const TRANSMIT: usize = 1;
/// Number of the control queue.
pub const CONTROL: usize = 2;
/// Bytes before each frame.
pub const HEADER: usize = 12;

/// Largest frame with its header: 64 KiB of TCP over Ethernet (section 5.1.6.3.1).
const MAX_FRAME: usize = 65_562;
/// Frames received in one go, before others get a chance at the device's lock.
const BATCH: usize = 256;
/// Offset of num_buffers in the header.
const NUM_BUFFERS: usize = 10;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
pub(super) const F_GUEST_ANNOUNCE: u64 = 1 << 21;

/// What a backend with offloads makes possible.
const OFFLOADS: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN;

const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: MacAddress,
    /// Longest packet that the guest should use, bytes without the Ethernet header, if it is to
    /// be told.
    pub mtu: Option<u16>,
}

/// A network card on `B`.
pub struct Net<B: NetBackend> {
    backend: B,
    pub(super) config: NetConfig,
    pub(super) link_up: bool,
    /// The guest is asked to announce itself to the network.
    pub(super) announce_wanted: bool,
    features: u64,
    /// No frames are read until the guest gives buffers.
    out_of_buffers: bool,
    overflow: Box<[u8]>,
    pub(super) metrics: Arc<NetMetrics>,
}

/// How an attempt to receive a frame ended.
enum Received {
    Frame,
    /// There was one, but not for the guest.
    Dropped,
    /// The backend has none.
    NoFrame,
    /// The guest has no buffers.
    NoBuffers,
}

impl<B: NetBackend> Net<B> {
    /// A card with its link up.
    pub fn new(backend: B, config: NetConfig) -> Self {
        Self::with_metrics(backend, config, Arc::default())
    }

    /// The same with counters that others count in as well.
    pub fn with_metrics(backend: B, config: NetConfig, metrics: Arc<NetMetrics>) -> Self {
        Self {
            backend,
            config,
            link_up: true,
            announce_wanted: false,
            features: 0,
            out_of_buffers: false,
            overflow: vec![0; MAX_FRAME].into_boxed_slice(),
            metrics,
        }
    }

    /// The backend.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Its address.
    #[must_use]
    pub fn mac(&self) -> MacAddress {
        self.config.mac
    }

    /// The counters, readable without the device.
    #[must_use]
    pub fn metrics(&self) -> Arc<NetMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Whether a frame that the backend has would be looked at. If not, waiting for frames is of
    /// no use until the guest notifies of queue [`RECEIVE`].
    #[must_use]
    pub fn wants_frames(&self) -> bool {
        !self.out_of_buffers
    }

    /// Plugs the cable in or out. True when that is a change of the configuration, see
    /// [`change_config`](crate::virtio::Handle::change_config).
    #[must_use]
    pub fn set_link(&mut self, up: bool) -> bool {
        std::mem::replace(&mut self.link_up, up) != up
    }

    /// Whether the cable is in.
    #[must_use]
    pub fn link_is_up(&self) -> bool {
        self.link_up
    }

    /// Asks the guest to announce itself: its switch port has changed. True when the guest can;
    /// that is a change of the configuration. If it cannot, somebody else has to.
    #[must_use]
    pub fn announce(&mut self) -> bool {
        let able = self.has(F_GUEST_ANNOUNCE | F_STATUS | F_CTRL_VQ);
        self.announce_wanted |= able;
        able
    }

    fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Moves frames from the backend to the guest, within
    /// [`with_queues`](crate::virtio::Handle::with_queues): the backend has some.
    ///
    /// # Errors
    ///
    /// When the guest broke the rules of the queue.
    pub fn receive<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        if !context.is_ready(RECEIVE) {
            self.out_of_buffers = true;
            return Ok(Progress::Idle);
        }
        let (mut received, mut given) = (0, 0);
        let progress = loop {
            if context.is_closing() {
                break Progress::Idle;
            }
            if received == BATCH {
                break Progress::More;
            }
            match self.receive_one(context)? {
                Received::Frame => {
                    received += 1;
                    given += 1;
                }
                Received::Dropped => received += 1,
                Received::NoFrame => {
                    self.out_of_buffers = false;
                    break Progress::Idle;
                }
                Received::NoBuffers => {
                    // Only now does anybody wait for a notification.
                    if !context.enable_notification(RECEIVE)? {
                        self.out_of_buffers = true;
                        break Progress::Idle;
                    }
                }
            }
        };
        if given > 0 {
            context.signal(RECEIVE)?;
        }
        Ok(progress)
    }

    fn receive_one<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<Received, DeviceError> {
        let broken = |reason: String| DeviceError::Request { index: RECEIVE, reason };
        let Some(first) = context.pop(RECEIVE)? else { return Ok(Received::NoBuffers) };
        let room = first.writable.len();
        if room < HEADER || !first.readable.is_empty() {
            return Err(broken(format!("a buffer for frames with room for {room} bytes")));
        }
        // Together with the overflow it has to fit into one call: a frame that could not be read
        // would stay, and be tried again for ever.
        let pieces = first.writable.slices().len();
        if pieces >= MAX_BUFFERS {
            return Err(broken(format!("a buffer for frames in {pieces} pieces")));
        }
        let len = match self.backend.read_frame(&first.writable, &mut self.overflow) {
            Ok(len) => len,
            Err(error) => {
                context.undo_pop(RECEIVE, 1)?;
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.backend_error(&error, "cannot receive frames");
                }
                return Ok(Received::NoFrame);
            }
        };
        // All places of the frame: head, and bytes of it there.
        let mut used = vec![(first.head(), len.min(room) as u32)];
        let mut rest = &self.overflow[..len.saturating_sub(room).min(self.overflow.len())];
        // A driver that adds buffers meanwhile does not make more of them than fit into the queue.
        let most = usize::from(context.size(RECEIVE));
        while !rest.is_empty() && used.len() < most && self.features & F_MRG_RXBUF != 0 {
            let Some(more) = context.pop(RECEIVE)? else { break };
            if more.writable.is_empty() || !more.readable.is_empty() {
                return Err(broken("a buffer for frames without room".into()));
            }
            let copied = more.writable.copy_from(0, rest);
            used.push((more.head(), copied as u32));
            rest = &rest[copied..];
        }
        // As many as the queue has entries: no truncation.
        let buffers = used.len() as u16;
        if len < HEADER || !rest.is_empty() || !self.link_up {
            self.metrics.rx_dropped.increment();
            context.undo_pop(RECEIVE, buffers)?;
            return Ok(Received::Dropped);
        }
        let _ = first.writable.copy_from(NUM_BUFFERS, &buffers.to_le_bytes());
        context.push_all(RECEIVE, &used)?;
        self.metrics.rx_frames.increment();
        self.metrics.rx_bytes.add((len - HEADER) as u64);
        Ok(Received::Frame)
    }

    fn transmit<M: GuestMemory>(&mut self, chain: &Chain<'_, M>) -> Result<u32, DeviceError> {
        let len = chain.readable.len();
        if !(HEADER..=MAX_FRAME).contains(&len) || !chain.writable.is_empty() {
            let reason = format!("a frame of {len} bytes with its header");
            return Err(DeviceError::Request { index: TRANSMIT, reason });
        }
        if self.link_up && self.backend.write_frame(&chain.readable).is_ok() {
            self.metrics.tx_frames.increment();
            self.metrics.tx_bytes.add((len - HEADER) as u64);
        } else {
            self.metrics.tx_dropped.increment();
        }
        Ok(0)
    }

    fn backend_error(&self, error: &io::Error, what: &str) {
        if self.metrics.backend_errors.get() == 0 {
            warn!(%error, mac = %self.config.mac, "the backend of a network card {what}");
        }
        self.metrics.backend_errors.increment();
    }
}

impl<B: NetBackend> VirtioDevice for Net<B> {
    const DEVICE_ID: u32 = device_id::NET;
    const NAME: &'static str = "virtio-net";

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, 64]
    }

    fn features(&self) -> u64 {
        let mut features = F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE;
        if self.config.mtu.is_some() {
            features |= F_MTU;
        }
        if self.backend.has_offloads() {
            features |= OFFLOADS;
        }
        features
    }

    /// Section 5.1.4: address, status, number of queue pairs, MTU.
    fn config(&self) -> Vec<u8> {
        let mut status = 0;
        if self.link_up {
            status |= S_LINK_UP;
        }
        if self.announce_wanted {
            status |= S_ANNOUNCE;
        }
        let mut config = self.config.mac.0.to_vec();
        for field in [status, 1, self.config.mtu.unwrap_or(0)] {
            config.extend(field.to_le_bytes());
        }
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        let offloads = Offloads {
            checksum: self.has(F_GUEST_CSUM),
            tso4: self.has(F_GUEST_CSUM | F_GUEST_TSO4),
            tso6: self.has(F_GUEST_CSUM | F_GUEST_TSO6),
            ecn: self.has(F_GUEST_CSUM | F_GUEST_ECN),
        };
        if let Err(error) = self.backend.set_offloads(offloads) {
            self.backend_error(&error, "cannot do what was negotiated");
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.announce_wanted = false;
        self.out_of_buffers = false;
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        match index {
            RECEIVE => self.receive(context),
            TRANSMIT => context.serve(TRANSMIT, |chain| self.transmit(chain)),
            _ => context.serve(CONTROL, |chain| self.control(chain)),
        }
    }
}
