//! Which faults belong to one walk through memory, and where it goes next.
//!
//! A guest that walks touches page after page at a fixed distance, its *stride*, up or down. Several
//! vCPUs walk at once, so faults are first told apart: each *stream* has its last fault, and a new one
//! belongs to the stream that it continues, or else to the nearest that knows no stride yet. Like
//! read-ahead in Linux (mm/readahead.c), a stream's window doubles with each fault that continues it.
//!
//! What was sent ahead never faults, so a stream's next fault lies *beyond* it: at a multiple of the stride within
//! some slack, or farther, if push has left nothing in between to fault on.

use super::unsent::Unsent;

/// Streams that are kept; the one that was not continued for the longest time goes first.
const MAX_STREAMS: usize = 16;
/// Farthest that two faults may lie apart to suggest a stride, units: 16 MiB of small pages.
const REACH: u64 = 4096;
/// Window of a stream whose stride is confirmed for the first time, pages.
const FIRST_WINDOW: u64 = 8;
/// Largest window, pages: 2 ms at 1 Gbit/s, for which other faults may have to wait.
const MAX_WINDOW: u64 = 64;
/// Steps beyond what was sent ahead at which a fault still continues a stream.
const SLACK: i64 = 16;
/// Steps beyond its window in which push may have sent all of a stream's way, as far as it is looked at.
const MOST_PUSHED: i64 = 128;

/// Where a fault's walk is believed to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heading {
    /// Distance from one touch to the next, units; negative downwards, never 0.
    pub(super) stride: i64,
    /// How many pages are worth sending ahead.
    pub(super) window: u64,
    /// The stream's fault before this one.
    pub(super) before: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    last: u64,
    /// The last unit that was sent ahead.
    end: u64,
    /// 0: one fault, nothing known.
    stride: i64,
    /// 0: the stride is a guess from two faults.
    window: u64,
}

/// The streams, most recent first.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
}

impl Streams {
    /// Takes note of a fault on a unit, which is claimed already. Gives the heading of its stream if it has one.
    /// `wanted`: it was unsent until then. When it was not, push had just sent it and all around it, so that nothing
    /// unsent between two faults says nothing.
    pub(super) fn fault(&mut self, at: u64, wanted: bool, unsent: &Unsent) -> Option<Heading> {
        if self.streams.iter().any(|stream| stream.last == at) {
            return None;
        }
        if let Some(i) =
            self.streams.iter().position(|stream| stream.goes_on_at(at, wanted, unsent))
        {
            let stream = self.streams.remove(i);
            let window = (stream.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
            let stride =
                if stream.stride == 0 { stream.distance(at).signum() } else { stream.stride };
            self.put(Stream { last: at, end: at, stride, window });
            return Some(Heading { stride, window, before: stream.last });
        }
        let near = (0..self.streams.len())
            .filter(|i| self.streams[*i].may_learn_from(at))
            .min_by_key(|i| self.streams[*i].last.abs_diff(at));
        let stride = near.map_or(0, |i| {
            let stream = self.streams.remove(i);
            stream.guess(at)
        });
        self.put(Stream { last: at, end: at, stride, window: 0 });
        None
    }

    /// Takes note of what was sent ahead with a fault, up to `end`.
    pub(super) fn sent_ahead(&mut self, fault: u64, end: u64) {
        if let Some(stream) = self.streams.first_mut().filter(|stream| stream.last == fault) {
            stream.end = end;
        }
    }

    fn put(&mut self, stream: Stream) {
        self.streams.truncate(MAX_STREAMS - 1);
        self.streams.insert(0, stream);
    }
}

impl Stream {
    fn distance(&self, at: u64) -> i64 {
        at as i64 - self.last as i64
    }

    fn goes_on_at(&self, at: u64, wanted: bool, unsent: &Unsent) -> bool {
        let distance = self.distance(at);
        let between = self.last.min(at) + 1..self.last.max(at);
        let nothing_between = || unsent.next(between.clone()).is_none();
        if self.stride == 0 {
            let near = wanted && distance.unsigned_abs() <= MAX_WINDOW;
            return distance.unsigned_abs() == 1 || near && nothing_between();
        }
        if distance.signum() != self.stride.signum() || distance % self.stride != 0 {
            return false;
        }
        let beyond = (at as i64 - self.end as i64) / self.stride;
        beyond <= SLACK || nothing_between() || (beyond <= MOST_PUSHED && self.all_sent(at, unsent))
    }

    /// Whether there was nothing left to fault on in the stream's way from what was sent ahead to `at`.
    fn all_sent(&self, at: u64, unsent: &Unsent) -> bool {
        let mut way = self.end as i64 + self.stride;
        while way != at as i64 {
            if unsent.contains(way as u64) {
                return false;
            }
            way += self.stride;
        }
        true
    }

    /// Whether a fault that does not continue the stream says something about its stride: one that
    /// nothing is known of, and one whose guess was a multiple of what it seems to be.
    fn may_learn_from(&self, at: u64) -> bool {
        let distance = self.distance(at);
        distance.unsigned_abs() <= REACH && (self.window == 0 || self.steps_inside(distance))
    }

    fn steps_inside(&self, distance: i64) -> bool {
        distance.signum() == self.stride.signum()
            && distance.unsigned_abs() < self.stride.unsigned_abs()
    }

    fn guess(&self, at: u64) -> i64 {
        let distance = self.distance(at);
        if self.steps_inside(distance) {
            gcd(distance, self.stride)
        } else {
            distance
        }
    }
}

/// Greatest common divisor of two numbers of the same sign, with that sign.
fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::layout::MemoryLayout;
    use crate::page_set::PageSet;
    use crate::{Gfn, PageRange};

    struct Guest {
        unsent: Unsent,
        streams: Streams,
    }

    impl Guest {
        fn new() -> Self {
            let range = PageRange::new(Gfn(0), 1 << 16).unwrap();
            let layout = Arc::new(MemoryLayout::new([range]).unwrap());
            let unsent = Unsent::new(&PageSet::full(&layout), 1);
            Self { unsent, streams: Streams::default() }
        }

        /// Touches a page; claims it and nothing else.
        fn touch(&mut self, at: u64) -> Option<(i64, u64)> {
            assert!(self.unsent.contains(at));
            self.unsent.claim(at..at + 1);
            let heading = self.streams.fault(at, true, &self.unsent);
            heading.map(|heading| (heading.stride, heading.window))
        }
    }

    #[test]
    fn neighbours_are_a_stream_at_once_and_its_window_doubles() {
        let mut guest = Guest::new();
        assert_eq!(guest.touch(100), None);
        assert_eq!(guest.touch(101), Some((1, 8)));
        assert_eq!(guest.touch(102), Some((1, 16)));
        assert_eq!(guest.touch(105), Some((1, 32)));
        guest.streams.sent_ahead(105, 137);
        assert_eq!(guest.touch(160), None, "too far");
        assert_eq!(guest.touch(106), Some((1, 64)), "and the stream is still known");
        assert_eq!(guest.touch(107), Some((1, 64)));
        assert_eq!(guest.touch(9000), None);
        assert_eq!(guest.touch(8999), Some((-1, 8)));
    }

    #[test]
    fn a_stride_needs_three_faults_and_may_be_negative() {
        for stride in [7i64, -7, 500, -500] {
            let mut guest = Guest::new();
            let page = |step: i64| (30_000 + stride * step) as u64;
            assert_eq!(guest.touch(page(0)), None);
            assert_eq!(guest.touch(page(1)), None);
            assert_eq!(guest.touch(page(2)), Some((stride, 8)));
            guest.streams.sent_ahead(page(2), page(10));
            assert_eq!(guest.touch(page(10 + 16)), Some((stride, 16)), "within the slack");
            guest.streams.sent_ahead(page(26), page(42));
            assert_eq!(guest.touch(page(42 + 17)), None, "beyond it");
        }
    }

    #[test]
    fn streams_of_several_vcpus_are_told_apart() {
        let mut guest = Guest::new();
        let mut last = [None; 4];
        for step in 0..3 {
            for (cpu, stride) in [1i64, -1, 7, -300].into_iter().enumerate() {
                last[cpu] = guest.touch((10_000 * (cpu as i64 + 1) + stride * step) as u64);
            }
        }
        assert_eq!(last, [Some((1, 16)), Some((-1, 16)), Some((7, 8)), Some((-300, 8))]);
    }

    #[test]
    fn a_guess_that_was_a_multiple_is_mended() {
        let mut guest = Guest::new();
        for at in [1000, 1006, 1012] {
            guest.touch(at);
        }
        assert_eq!(guest.touch(1014), None, "six was wrong, it seems");
        assert_eq!(guest.touch(1016), Some((2, 8)));
    }

    #[test]
    fn a_fault_beyond_what_push_has_sent_continues_a_stream() {
        let mut guest = Guest::new();
        guest.touch(100);
        guest.touch(101);
        guest.unsent.claim(102..5000);
        assert_eq!(guest.touch(5000), Some((1, 16)));
        let mut guest = Guest::new();
        for at in [100, 107, 114] {
            guest.touch(at);
        }
        for step in 1..100 {
            guest.unsent.claim(114 + 7 * step..115 + 7 * step);
        }
        assert_eq!(guest.touch(114 + 700), Some((7, 16)));
    }
}
