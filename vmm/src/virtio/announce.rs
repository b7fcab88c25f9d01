//! Telling the network where a guest is now: frames that carry its address as their source, so that switches
//! learn its port. RARP requests (RFC 903), as QEMU and others send them: nobody answers, and they need no IP address.

use std::time::{Duration, Instant};

use devices::virtio::net::{MacAddress, HEADER};
use rustix::rand::{getrandom, GetRandomFlags};

/// When a guest is announced after it has moved. The first ones may be lost in a switch whose port just came up;
/// Linux may take a second to tell a bridge of that. The last one comes when the old host's bridge, which is held to have
/// the guest for a second, is free to learn again.
const SCHEDULE: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(300),
    Duration::from_millis(550),
    Duration::from_millis(1050),
    Duration::from_millis(1550),
];

/// Most times that a guest is announced.
pub(super) const TIMES: usize = SCHEDULE.len();

/// Shortest Ethernet frame without its checksum, bytes.
const SHORTEST: usize = 60;

/// An announcement under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announcement {
    began: Instant,
    done: usize,
    times: usize,
}

impl Announcement {
    /// One that is made `times` times, at most [`TIMES`], the first time now.
    pub(super) fn new(began: Instant, times: usize) -> Self {
        Self { began, done: 0, times: times.min(TIMES) }
    }

    /// When the next one is due; `None` after the last.
    pub(super) fn next(&self) -> Option<Instant> {
        let after = SCHEDULE[..self.times].get(self.done)?;
        Some(self.began + *after)
    }

    /// Whether one is due; it counts as done then.
    pub(super) fn due(&mut self, now: Instant) -> bool {
        let due = self.next().is_some_and(|at| at <= now);
        self.done += usize::from(due);
        due
    }
}

/// To everybody.
pub(super) const EVERYBODY: MacAddress = MacAddress([0xff; 6]);

/// To a group that was never named before, and that nobody is in. A switch that keeps what it did with a frame for the next
/// ones that are like it, and learns from these only now and then, as Open vSwitch does, has to look at such a one: where the guest
/// has been a few seconds ago, it would take the others for more of the same.
pub(super) fn nobody() -> MacAddress {
    let mut group = [0; 6];
    // So few come whole or not at all (getrandom(2)); without them it is a group that may have been named.
    let _ = getrandom(&mut group, GetRandomFlags::empty());
    // Locally administered, of a group (IEEE 802).
    group[0] |= 3;
    MacAddress(group)
}

/// The frame that announces a card, behind an empty virtio header.
pub(super) fn rarp(mac: MacAddress, to: MacAddress) -> [u8; HEADER + SHORTEST] {
    let mut frame = [0; HEADER + SHORTEST];
    let mut at = HEADER;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&to.0);
    put(&mac.0);
    put(&0x8035u16.to_be_bytes());
    // Ethernet, IPv4, lengths of their addresses, request.
    put(&[0, 1, 8, 0, 6, 4, 0, 3]);
    put(&mac.0);
    put(&[0; 4]);
    put(&mac.0);
    frame
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_made_at_once_and_then_as_scheduled() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut announcement = Announcement::new(start, TIMES);
        for millis in [0, 50, 150, 300, 550, 1050, 1550] {
            assert_eq!(announcement.next(), Some(after(millis)));
            assert!(millis == 0 || !announcement.due(after(millis - 1)));
            assert!(announcement.due(after(millis)));
        }
        assert_eq!(announcement.next(), None);
        assert!(!announcement.due(after(10_000)));
        assert!(Announcement::new(start, 1).due(start));
    }

    #[test]
    fn the_frame_is_a_broadcast_of_the_card() {
        let mac = MacAddress([2, 1, 2, 3, 4, 5]);
        let frame = rarp(mac, EVERYBODY);
        assert_eq!(frame[..HEADER], [0; HEADER]);
        let frame = &frame[HEADER..];
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac.0);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac.0, "sender");
        assert_eq!(frame[32..38], mac.0, "target");
    }

    #[test]
    fn nobody_is_always_another_group() {
        let groups: std::collections::HashSet<_> = (0..100).map(|_| nobody().0).collect();
        assert_eq!(groups.len(), 100);
        assert!(groups.iter().all(|group| group[0] & 3 == 3 && *group != EVERYBODY.0));
    }
}
