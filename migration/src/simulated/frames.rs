//! Network cards of a simulated VM: what reaches them while the guest runs it has; what comes while it
//! stands is kept.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::vm::{LateFrame, LateFrames, VmError};

use super::SimulatedVm;

/// Cards of each VM, where it has any.
const CARDS: u16 = 2;

#[derive(Default)]
pub(super) struct Cards {
    inner: Mutex<Inner>,
    arrived: Condvar,
}

#[derive(Default)]
struct Inner {
    present: bool,
    kept: VecDeque<(Instant, LateFrame)>,
    received: Vec<LateFrame>,
    of_the_pause: Vec<LateFrame>,
}

impl Cards {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn present(&self) -> Option<&dyn LateFrames> {
        self.lock().present.then_some(self as _)
    }

    /// The guest stands.
    pub(super) fn keep(&self) {
        let mut inner = self.lock();
        let now = Instant::now();
        let frames = std::mem::take(&mut inner.of_the_pause);
        inner.kept.extend(frames.into_iter().map(|frame| (now, frame)));
    }

    /// The guest goes on, and has what was kept.
    pub(super) fn open(&self) {
        let mut inner = self.lock();
        let kept: Vec<_> = inner.kept.drain(..).map(|(_, frame)| frame).collect();
        inner.received.extend(kept);
    }

    pub(super) fn late(&self, card: u16, bytes: &[u8]) -> Result<(), VmError> {
        if card >= CARDS || bytes.is_empty() {
            let what = format!("{} bytes for card {card} of {CARDS}", bytes.len());
            return Err(VmError::Other(what));
        }
        self.lock().received.push(LateFrame { card, bytes: bytes.to_vec() });
        Ok(())
    }
}

impl LateFrames for Cards {
    fn take(&self, committed: Instant, deadline: Instant) -> Vec<LateFrame> {
        let mut inner = self.lock();
        loop {
            let kept: Vec<_> = inner.kept.drain(..).collect();
            // A broadcast comes to the other host by itself.
            let wanted = kept.into_iter().filter(|(at, frame)| {
                *at <= committed || frame.bytes.first().is_some_and(|byte| *byte != 0xff)
            });
            let wanted: Vec<_> = wanted.map(|(_, frame)| frame).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if !wanted.is_empty() || left.is_zero() {
                return wanted;
            }
            let waited = self.arrived.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl SimulatedVm {
    /// The VM has network cards.
    pub fn add_cards(&self) {
        self.cards.lock().present = true;
    }

    /// A frame comes to this VM's host.
    pub fn frame_comes(&self, card: u16, bytes: &[u8]) {
        let frame = LateFrame { card, bytes: bytes.to_vec() };
        let running = self.is_running();
        let mut inner = self.cards.lock();
        match running {
            true => inner.received.push(frame),
            false => inner.kept.push_back((Instant::now(), frame)),
        }
        self.cards.arrived.notify_all();
    }

    /// These frames will come in the next pause.
    pub fn frames_of_the_pause(&self, frames: &[(u16, &[u8])]) {
        let frames = frames.iter().map(|(card, b)| LateFrame { card: *card, bytes: b.to_vec() });
        self.cards.lock().of_the_pause = frames.collect();
    }

    /// What the guest has received, in order.
    pub fn received(&self) -> Vec<LateFrame> {
        self.cards.lock().received.clone()
    }
}
