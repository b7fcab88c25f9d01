//! A fixed pseudo-random permutation of 0..n without a table.

use crate::mix;

const ROUNDS: u64 = 4;

/// A permutation of `0..n`: a balanced Feistel network over the next even power of two, walked
/// along its cycle until the value is in range (Black and Rogaway, "Ciphers with arbitrary finite
/// domains", 2002). A multiplicative permutation would be cheaper, but its image of a linear walk
/// is a fixed stride, which is just what a pre-paging predictor looks for.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
}

impl Permutation {
    /// A permutation of `0..n`.
    #[must_use]
    pub const fn new(n: u64) -> Self {
        let bits = if n <= 1 { 0 } else { 64 - (n - 1).leading_zeros() };
        Self { n, half_bits: bits.div_ceil(2) }
    }

    /// Where `index` goes; `index` must be below n.
    #[must_use]
    pub fn apply(&self, index: u64) -> u64 {
        let mut value = index;
        loop {
            value = self.encrypt(value);
            // The network is a bijection, so the cycle returns into range at `index` at the latest.
            if value < self.n || index >= self.n {
                return value;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits & mask, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(right ^ (round << 60)) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_bijection_for_every_size() {
        for n in (1..70).chain([255, 256, 257, 4096, 5000]) {
            let permutation = Permutation::new(n);
            let mut seen = vec![false; n as usize];
            for index in 0..n {
                let image = permutation.apply(index) as usize;
                assert!(!seen[image], "{image} twice in 0..{n}");
                seen[image] = true;
            }
        }
    }

    #[test]
    fn neighbours_are_scattered() {
        let permutation = Permutation::new(4096);
        let mut strides = std::collections::HashSet::new();
        for index in 0..4095 {
            strides.insert(permutation.apply(index + 1) as i64 - permutation.apply(index) as i64);
        }
        assert!(strides.len() > 2000, "only {} different strides", strides.len());
    }
}
