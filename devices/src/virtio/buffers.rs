//! The guest's buffers of one request, as a device reads and writes them.

use vm_memory::bitmap::BitmapSlice;
use vm_memory::VolatileSlice;

/// Scattered pieces of guest memory, taken as one run of bytes.
///
/// The guest may change them at any time: what is decided by a value is decided by a copy of it.
/// Every write is marked in the device bitmap after it.
#[derive(Debug, Clone)]
pub struct Buffers<'m, B: BitmapSlice> {
    slices: Vec<VolatileSlice<'m, B>>,
    len: usize,
}

impl<'m, B: BitmapSlice> Buffers<'m, B> {
    /// No buffers.
    #[must_use]
    pub fn new() -> Self {
        Self { slices: Vec::new(), len: 0 }
    }

    /// Adds a piece at the end. The caller bounds the sum of the lengths.
    pub(super) fn push(&mut self, slice: VolatileSlice<'m, B>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, none of them empty.
    #[must_use]
    pub fn slices(&self) -> &[VolatileSlice<'m, B>] {
        &self.slices
    }

    /// The bytes from `offset` on, at most `len` of them.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        let mut part = Self::new();
        let (mut skip, mut left) = (offset, len);
        for slice in &self.slices {
            let start = skip.min(slice.len());
            skip -= start;
            let take = left.min(slice.len() - start);
            left -= take;
            // Both ends lie inside of the slice, so that there is no error to see.
            if let Ok(piece) = slice.subslice(start, take) {
                part.push(piece);
            }
            if left == 0 {
                break;
            }
        }
        part
    }

    /// Copies bytes from `offset` on into `data`. Gives how many there were.
    #[must_use]
    pub fn copy_to(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.part(offset, data.len()).slices {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` to `offset`. Gives how many bytes there was room for.
    #[must_use]
    pub fn copy_from(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.part(offset, data.len()).slices {
            let piece = &data[done..done + slice.len()];
            slice.copy_from(piece);
            done += piece.len();
        }
        done
    }

    /// A copy of `N` bytes at `offset`, where there are as many.
    #[must_use]
    pub fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.copy_to(offset, &mut bytes) == N).then_some(bytes)
    }
}

impl<B: BitmapSlice> Default for Buffers<'_, B> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

    use super::*;

    proptest! {
        #[test]
        fn scattered_bytes_are_one_run(
            lengths in proptest::collection::vec(0usize..9, 0..8),
            offset in 0usize..70,
            len in 0usize..70,
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mut buffers = Buffers::new();
            for (index, len) in lengths.iter().enumerate() {
                let gpa = GuestAddress(index as u64 * 16);
                for slice in memory.get_slices(gpa, *len, Permissions::ReadWrite).unwrap() {
                    buffers.push(slice.unwrap());
                }
            }
            let total: usize = lengths.iter().sum();
            prop_assert_eq!(buffers.len(), total);
            let all: Vec<u8> = (0..total as u8).collect();
            prop_assert_eq!(buffers.copy_from(0, &all), total);

            let want = &all[offset.min(total)..(offset + len).min(total)];
            let part = buffers.part(offset, len);
            prop_assert_eq!(part.len(), want.len());
            let mut read = vec![0; len];
            let done = part.copy_to(0, &mut read);
            prop_assert_eq!(&read[..done], want);
            let done = buffers.copy_to(offset, &mut read);
            prop_assert_eq!(&read[..done], want);

            let new = vec![0xFF; len];
            prop_assert_eq!(buffers.copy_from(offset, &new), want.len());
            let mut now = vec![0; total];
            prop_assert_eq!(buffers.copy_to(0, &mut now), total);
            let mut expected = all.clone();
            expected[offset.min(total)..(offset + len).min(total)].fill(0xFF);
            prop_assert_eq!(now, expected);
            prop_assert_eq!(buffers.array::<4>(total).is_none(), true);
        }
    }
}
