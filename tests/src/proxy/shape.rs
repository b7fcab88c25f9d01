//! A link of some bandwidth and latency.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bytes that take the link in one piece.
const QUANTUM: usize = 16 << 10;
/// Bytes that pass in one piece where there is no limit.
const WHOLE: usize = 256 << 10;
/// How far behind its rate the link may fall, because a sleep was too long, and catch up.
const CATCH_UP: Duration = Duration::from_millis(2);

/// What one direction of a link is like. All connections share it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bytes per second.
    pub bandwidth: Option<u64>,
    /// From the first byte's departure to its arrival, in addition to what the bandwidth asks for.
    pub latency: Duration,
}

impl Shape {
    /// What a socket before the link should hold: enough to keep it busy, too little to hide it.
    pub(super) fn window(self) -> Option<usize> {
        self.bandwidth.map(|rate| {
            let in_flight = rate as f64 * self.latency.as_secs_f64() * 2.0;
            (in_flight as usize).clamp(128 << 10, 8 << 20)
        })
    }

    /// Pieces that may be on their way at a time.
    pub(super) fn pieces(self) -> usize {
        let in_flight = match self.bandwidth {
            Some(rate) => rate as f64 * self.latency.as_secs_f64(),
            None => 16_f64 * (1 << 20) as f64,
        };
        in_flight as usize / self.quantum() + 64
    }

    /// Most bytes in one piece.
    pub(super) fn quantum(self) -> usize {
        if self.bandwidth.is_some() {
            QUANTUM
        } else {
            WHOLE
        }
    }
}

/// One direction of a link.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) shape: Shape,
    /// When the last byte that took it is through.
    busy_until: Mutex<Option<Instant>>,
}

impl Link {
    pub(super) fn new(shape: Shape) -> Self {
        Self { shape, busy_until: Mutex::new(None) }
    }

    /// When the last of `bytes` that come at `now` has left.
    pub(super) fn departure(&self, bytes: usize, now: Instant) -> Instant {
        let Some(rate) = self.shape.bandwidth else { return now };
        let mut busy_until = self.busy_until.lock().unwrap();
        let begin = busy_until.map_or(now, |until| until.max(now - CATCH_UP));
        let end = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
        *busy_until = Some(end);
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bandwidth_is_kept_however_late_the_sender_wakes() {
        let link = Link::new(Shape { bandwidth: Some(125_000_000), latency: Duration::ZERO });
        let begin = Instant::now();
        let mut now = begin;
        let late = Duration::from_micros(70);
        for _ in 0..1000 {
            now = now.max(link.departure(QUANTUM, now)) + late;
        }
        let ideal = Duration::from_secs_f64(1000.0 * QUANTUM as f64 / 125e6);
        let taken = now - begin;
        assert!(taken >= ideal && taken < ideal + Duration::from_millis(1), "{taken:?}");
    }

    #[test]
    fn an_idle_link_saves_nothing_up() {
        let link = Link::new(Shape { bandwidth: Some(1_000_000), latency: Duration::ZERO });
        let begin = Instant::now();
        link.departure(1000, begin);
        let later = begin + Duration::from_secs(5);
        let end = link.departure(1_000_000, later);
        assert!(end >= later + Duration::from_secs(1) - CATCH_UP);
    }
}
