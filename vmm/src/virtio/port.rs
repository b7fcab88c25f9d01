//! The tap of a card, and the frames that wait for the guest in front of it.
//!
//! ```text
//!   the guest runs           Open   tap --> guest, behind what waits
//!   its memory follows       Open   tap --> waiting --> guest: it may have no buffers for long
//!   source, guest stopped    Keep   tap --> waiting: for the destination, or for this guest when it goes on
//!   destination, before it   Drop   tap --> nowhere: what a switch floods is at the source too
//! ```
//!
//! Nothing here touches guest memory under the lock: in post-copy that may wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use devices::virtio::net::{FdBackend, MacAddress, NetBackend, NetMetrics, Offloads, HEADER};
use devices::virtio::Buffers;
use vm_memory::bitmap::BitmapSlice;

use super::announce::{nobody, rarp, Announcement, EVERYBODY};

/// Longest frame with its header, bytes.
const MAX_FRAME: usize = 65_562;
/// Header of Ethernet, bytes.
const ETHERNET: usize = 14;
/// Most frames that wait, and their bytes.
const MAX_FRAMES: usize = 16_384;
const MAX_BYTES: usize = 16 << 20;
/// Frames that are taken from the tap in one go.
const BATCH: usize = 256;
/// Frames of before that are thrown away at most as a guest begins: more than the queue of any tap has.
const MAX_STALE: usize = 16_384;

/// Where frames of the tap go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intake {
    Open,
    Keep,
    Drop,
}

/// Rung when a frame was kept.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<u64>,
    ringing: Condvar,
}

impl Bell {
    /// How often it rang.
    pub(super) fn count(&self) -> u64 {
        *lock(&self.rung)
    }

    fn ring(&self) {
        *lock(&self.rung) += 1;
        self.ringing.notify_all();
    }

    /// Waits until it has rung more than `count` times, or until `deadline`.
    pub(super) fn wait(&self, count: u64, deadline: Instant) {
        let mut rung = lock(&self.rung);
        while *rung == count {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.ringing.wait_timeout(rung, left);
            rung = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A frame that waits, with its virtio header.
struct Waiting {
    since: Instant,
    bytes: Box<[u8]>,
}

struct Queue {
    intake: Intake,
    frames: VecDeque<Waiting>,
    bytes: usize,
    buffer: Box<[u8]>,
    announcement: Option<Announcement>,
    /// The guest is to be asked to announce itself.
    ask: bool,
}

/// See the head of this file.
pub(super) struct Port {
    tap: OwnedFd,
    mac: MacAddress,
    metrics: Arc<NetMetrics>,
    bell: Arc<Bell>,
    queue: Mutex<Queue>,
    /// Number of frames in the queue, to be seen without its lock.
    waiting: AtomicUsize,
    /// Memory of the guest is still on its way.
    behind: AtomicBool,
    announcing: AtomicBool,
    link_up: AtomicBool,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    pub(super) fn new(
        tap: OwnedFd,
        mac: MacAddress,
        metrics: Arc<NetMetrics>,
        bell: Arc<Bell>,
        intake: Intake,
    ) -> Self {
        let queue = Queue {
            intake,
            frames: VecDeque::new(),
            bytes: 0,
            buffer: vec![0; MAX_FRAME].into_boxed_slice(),
            announcement: None,
            ask: false,
        };
        Self {
            tap,
            mac,
            metrics,
            bell,
            queue: Mutex::new(queue),
            waiting: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
            announcing: AtomicBool::new(false),
            link_up: AtomicBool::new(true),
        }
    }

    pub(super) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    /// Whether frames wait before those of the tap.
    pub(super) fn is_waited_at(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Whether memory of the guest is still on its way: all frames of the tap are to wait in the queue then, where
    /// [`Port::take_in`] puts them.
    pub(super) fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Acquire)
    }

    /// See [`Port::is_behind`].
    pub(super) fn set_behind(&self, behind: bool) {
        self.behind.store(behind, Ordering::Release);
    }

    /// Plugs the cable in or out: nothing is announced without it.
    pub(super) fn set_link(&self, up: bool) {
        self.link_up.store(up, Ordering::Release);
    }

    /// The guest has stopped and may go elsewhere: what comes is kept, and nothing is sent any more.
    pub(super) fn keep(&self) {
        let mut queue = lock(&self.queue);
        queue.intake = Intake::Keep;
        queue.announcement = None;
        queue.ask = false;
    }

    /// The guest is about to run. What came to a destination before was for its source.
    pub(super) fn open(&self) {
        let mut queue = lock(&self.queue);
        if queue.intake == Intake::Drop {
            let mut stale = 0;
            while stale < MAX_STALE && read_into(&self.tap, &mut queue.buffer).is_ok() {
                stale += 1;
            }
            self.metrics.early_dropped.add(stale as u64);
        }
        queue.intake = Intake::Open;
    }

    /// Takes frames from the tap, where its guest does not by itself. Whether waiting for more is of any use.
    pub(super) fn take_in(&self) -> bool {
        for _ in 0..BATCH {
            let mut queue = lock(&self.queue);
            if queue.intake == Intake::Open && !self.is_behind() {
                return false;
            }
            let Ok(len) = read_into(&self.tap, &mut queue.buffer) else { break };
            if queue.intake == Intake::Drop {
                self.metrics.early_dropped.increment();
                continue;
            }
            if queue.intake == Intake::Open {
                self.metrics.backlogged.increment();
            }
            let frame = queue.buffer[..len].into();
            self.push(&mut queue, frame);
        }
        true
    }

    fn push(&self, queue: &mut Queue, bytes: Box<[u8]>) {
        if queue.frames.len() >= MAX_FRAMES || queue.bytes + bytes.len() > MAX_BYTES {
            self.metrics.kept_dropped.increment();
            return;
        }
        queue.bytes += bytes.len();
        queue.frames.push_back(Waiting { since: Instant::now(), bytes });
        self.waiting.store(queue.frames.len(), Ordering::Release);
        self.metrics.kept.increment();
        self.bell.ring();
    }

    fn pop(&self) -> Option<Waiting> {
        let mut queue = lock(&self.queue);
        let frame = queue.frames.pop_front()?;
        queue.bytes -= frame.bytes.len();
        self.waiting.store(queue.frames.len(), Ordering::Release);
        Some(frame)
    }

    /// The next frame for the guest's new host, with its virtio header; all that came until `committed`,
    /// and after that what is for this card alone: the rest comes to the new host by itself.
    pub(super) fn take(&self, committed: Instant) -> Option<Box<[u8]>> {
        loop {
            let frame = self.pop()?;
            let to = frame.bytes.get(HEADER..HEADER + self.mac.0.len());
            if frame.since <= committed || to == Some(&self.mac.0[..]) {
                return Some(frame.bytes);
            }
        }
    }

    /// Has a frame wait for the guest that came from its old host; false for what cannot be one.
    pub(super) fn inject(&self, frame: &[u8]) -> bool {
        if !(HEADER + ETHERNET..=MAX_FRAME).contains(&frame.len()) {
            return false;
        }
        self.metrics.late.increment();
        self.push(&mut lock(&self.queue), frame.into());
        true
    }

    /// Announces the card now from outside of the guest, and the other `times` as they become due.
    pub(super) fn announce(&self, now: Instant, times: usize) {
        let mut queue = lock(&self.queue);
        let announcement = queue.announcement.insert(Announcement::new(now, times));
        if announcement.due(now) {
            self.send_rarp();
        }
        queue.ask = true;
        self.announcing.store(true, Ordering::Release);
    }

    /// Announces the card if that is due. Whether the guest is to be asked to do so itself, and when
    /// there is more to do.
    pub(super) fn tick(&self, now: Instant) -> (bool, Option<Instant>) {
        if !self.announcing.load(Ordering::Acquire) {
            return (false, None);
        }
        let mut queue = lock(&self.queue);
        if let Some(announcement) = &mut queue.announcement {
            // One that is late is no reason for two at once.
            if announcement.due(now) {
                self.send_rarp();
            }
        }
        let next = queue.announcement.and_then(|announcement| announcement.next());
        if next.is_none() {
            queue.announcement = None;
            self.announcing.store(false, Ordering::Release);
        }
        (std::mem::take(&mut queue.ask), next)
    }

    fn send_rarp(&self) {
        if !self.link_up.load(Ordering::Acquire) {
            return;
        }
        for (to, counted) in [(EVERYBODY, true), (nobody(), false)] {
            match rustix::io::write(&self.tap, &rarp(self.mac, to)) {
                Ok(_) if counted => self.metrics.announced.increment(),
                Ok(_) => {}
                Err(error) => {
                    // The next one may get through.
                    tracing::debug!(%error, mac = %self.mac, "a card was not announced");
                    self.metrics.backend_errors.increment();
                }
            }
        }
    }
}

fn read_into(tap: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::io::read(tap, buffer)?)
}

/// How a tap is told what the guest accepts.
pub(super) type SetOffloads = fn(&OwnedFd, Offloads) -> io::Result<()>;

/// A tap as the backend of its card, behind what waits at its port.
pub(super) struct PortBackend {
    tap: FdBackend<SetOffloads>,
    port: Arc<Port>,
}

impl PortBackend {
    pub(super) fn new(tap: FdBackend<SetOffloads>, port: Arc<Port>) -> Self {
        Self { tap, port }
    }
}

impl NetBackend for PortBackend {
    fn has_offloads(&self) -> bool {
        self.tap.has_offloads()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.tap.set_offloads(offloads)
    }

    fn read_frame<B: BitmapSlice>(
        &mut self,
        to: &Buffers<'_, B>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        // Before the look at what waits: once it is false nobody else reads the tap.
        let behind = self.port.is_behind();
        if self.port.is_waited_at() {
            if let Some(frame) = self.port.pop() {
                let copied = to.copy_from(0, &frame.bytes);
                let rest = &frame.bytes[copied..];
                let rest = &rest[..rest.len().min(overflow.len())];
                overflow[..rest.len()].copy_from_slice(rest);
                return Ok(frame.bytes.len());
            }
        }
        if behind {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.tap.read_frame(to, overflow)
    }

    fn write_frame<B: BitmapSlice>(&mut self, from: &Buffers<'_, B>) -> io::Result<()> {
        self.tap.write_frame(from)
    }
}
