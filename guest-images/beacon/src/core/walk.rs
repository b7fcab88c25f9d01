//! The orders in which a vCPU writes its pages.

use crate::config::Pattern;
use crate::mix;

/// An endless sequence of page indices below `pages`.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    pattern: Pattern,
    pages: u64,
    stride: u64,
    position: u64,
    /// First page of the current pass of a stride.
    start: u64,
    draws: u64,
    seed: u64,
}

impl Walk {
    /// A sequence over `0..pages` (at least one page). `seed` makes the random patterns of
    /// different vCPUs differ.
    #[must_use]
    pub const fn new(pattern: Pattern, pages: u64, stride: u64, seed: u64) -> Self {
        let pages = if pages == 0 { 1 } else { pages };
        Self { pattern, pages, stride: stride % pages, position: 0, start: 0, draws: 0, seed }
    }

    /// The next page index.
    pub fn next_page(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let page = self.position;
                self.position = if page + 1 == self.pages { 0 } else { page + 1 };
                page
            }
            Pattern::Random => self.draw() % self.pages,
            Pattern::Hotspot => {
                let hot = (self.pages / 10).max(1);
                if hot == self.pages || self.draw() % 10 < 9 {
                    self.draw() % hot
                } else {
                    hot + self.draw() % (self.pages - hot)
                }
            }
            Pattern::Stride => {
                let page = self.position;
                self.position += self.stride.max(1);
                if self.position >= self.pages {
                    self.start = (self.start + 1) % self.stride.max(1);
                    self.position = self.start;
                }
                page
            }
        }
    }

    fn draw(&mut self) -> u64 {
        self.draws += 1;
        mix(self.seed << 48 ^ self.draws)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pattern: Pattern, pages: u64, stride: u64, n: usize) -> Vec<u64> {
        let mut walk = Walk::new(pattern, pages, stride, 1);
        (0..n).map(|_| walk.next_page()).collect()
    }

    #[test]
    fn sequential_wraps() {
        assert_eq!(take(Pattern::Sequential, 3, 7, 5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn stride_visits_every_page_once_per_round() {
        assert_eq!(take(Pattern::Stride, 7, 3, 8), [0, 3, 6, 1, 4, 2, 5, 0]);
        let mut round = take(Pattern::Stride, 100, 9, 100);
        round.sort_unstable();
        assert!(round.iter().copied().eq(0..100));
        // A stride that is a multiple of the size must not stand still outside the range.
        assert!(take(Pattern::Stride, 4, 8, 100).iter().all(|&page| page < 4));
    }

    #[test]
    fn random_covers_and_hotspot_prefers() {
        let draws = take(Pattern::Random, 64, 1, 4096);
        assert!((0..64).all(|page| draws.contains(&page)));
        let draws = take(Pattern::Hotspot, 100, 1, 10_000);
        let hot = draws.iter().filter(|&&page| page < 10).count();
        assert!((8_700..9_300).contains(&hot), "{hot} of 10000 in the hot tenth");
        assert!(draws.iter().all(|&page| page < 100));
        assert!(take(Pattern::Hotspot, 1, 1, 10).iter().all(|&page| page == 0));
    }
}
