//! What a page of the working set holds, and how a wrong one is recognised.
//!
//! Each page is stamped in eight words, one per 512 bytes, with its own number and a generation
//! that grows with each rewrite. A table elsewhere in RAM has the generation that each page should
//! have. So a page that a save or a migration lost (zero), brought in an older version (stale), put
//! in a wrong place or mixed from two versions is told from a good one, and from each other.
//!
//! ```text
//! offset 0     generation << 32 | page number      (plain, so that what is found can be named)
//! offset OFFSETS[i]    mix(word 0 + i << 56)
//! ```

use crate::mix;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Where the words of a stamp lie, in bytes; the first and the last word of the page are among them.
pub const OFFSETS: [u64; 8] = [0, 520, 1080, 1544, 2104, 2568, 3128, 4088];

/// Access to guest memory by 64-bit words.
pub trait Words {
    /// Reads the word at a guest physical address.
    fn load(&self, address: u64) -> u64;
    /// Writes the word at a guest physical address.
    fn store(&self, address: u64, value: u64);
}

/// What the `index`-th word of a stamp is.
#[must_use]
pub fn word(page: u64, generation: u32, index: usize) -> u64 {
    let plain = u64::from(generation) << 32 | page & 0xFFFF_FFFF;
    if index == 0 {
        plain
    } else {
        mix(plain ^ (index as u64) << 56)
    }
}

/// Stamps the page at `address`.
pub fn write(memory: &impl Words, address: u64, page: u64, generation: u32) {
    for (index, offset) in OFFSETS.iter().enumerate() {
        memory.store(address + offset, word(page, generation, index));
    }
}

/// How a wrong page is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but zeros: the page was lost.
    Zero,
    /// A whole, older version of the page.
    Stale,
    /// A whole, newer version of the page: the generation table is the one that is old.
    Newer,
    /// A whole stamp of another page.
    OtherPage,
    /// Anything else: words that do not belong together.
    Torn,
}

impl Kind {
    /// The name that the console uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Stale => "stale",
            Self::Newer => "newer",
            Self::OtherPage => "other-page",
            Self::Torn => "torn",
        }
    }
}

/// A page that does not hold what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// How it is wrong.
    pub kind: Kind,
    /// Offset in bytes of the first wrong word.
    pub offset: u64,
    /// What that word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// The first word, which names page and generation if it is whole.
    pub first_word: u64,
}

/// Checks the stamp of the page at `address`.
///
/// # Errors
/// The first difference, and what kind of wrong page it is.
pub fn check(
    memory: &impl Words,
    address: u64,
    page: u64,
    generation: u32,
) -> Result<(), Corruption> {
    let mut good = true;
    for (index, offset) in OFFSETS.iter().enumerate() {
        good &= memory.load(address + offset) == word(page, generation, index);
    }
    if good {
        Ok(())
    } else {
        Err(examine(memory, address, page, generation))
    }
}

#[cold]
fn examine(memory: &impl Words, address: u64, page: u64, generation: u32) -> Corruption {
    let words = OFFSETS.map(|offset| memory.load(address + offset));
    let first =
        (0..words.len()).find(|&i| words[i] != word(page, generation, i)).unwrap_or_default();
    let (found_page, found_generation) = (words[0] & 0xFFFF_FFFF, (words[0] >> 32) as u32);
    let whole = (0..words.len()).all(|i| words[i] == word(found_page, found_generation, i));
    let kind = if words.iter().all(|&word| word == 0) {
        Kind::Zero
    } else if !whole {
        Kind::Torn
    } else if found_page != page {
        Kind::OtherPage
    } else if found_generation < generation {
        Kind::Stale
    } else {
        Kind::Newer
    };
    Corruption {
        kind,
        offset: OFFSETS[first],
        expected: word(page, generation, first),
        found: words[first],
        first_word: words[0],
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::cell::RefCell;

    struct Ram(RefCell<Vec<u8>>);

    impl Words for Ram {
        fn load(&self, address: u64) -> u64 {
            let at = address as usize;
            u64::from_le_bytes(self.0.borrow()[at..at + 8].try_into().unwrap())
        }
        fn store(&self, address: u64, value: u64) {
            let at = address as usize;
            self.0.borrow_mut()[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    fn ram() -> Ram {
        Ram(RefCell::new(vec![0; 2 * PAGE_SIZE as usize]))
    }

    #[test]
    fn stamps_cover_first_and_last_word_and_are_aligned() {
        assert_eq!((OFFSETS[0], OFFSETS[7]), (0, PAGE_SIZE - 8));
        for (index, offset) in OFFSETS.iter().enumerate() {
            assert_eq!(offset % 8, 0);
            assert_eq!(offset / 512, index as u64, "one word per 512 bytes");
        }
    }

    #[test]
    fn a_good_page_passes_and_every_flipped_word_is_found() {
        let ram = ram();
        write(&ram, 4096, 7, 3);
        assert_eq!(check(&ram, 4096, 7, 3), Ok(()));
        for offset in OFFSETS {
            write(&ram, 4096, 7, 3);
            ram.store(4096 + offset, ram.load(4096 + offset) ^ 1);
            let corruption = check(&ram, 4096, 7, 3).unwrap_err();
            assert_eq!((corruption.kind, corruption.offset), (Kind::Torn, offset));
            assert_eq!(corruption.found, corruption.expected ^ 1);
        }
    }

    #[test]
    fn wrong_pages_are_told_apart() {
        let ram = ram();
        let kind = |page, generation| check(&ram, 0, page, generation).unwrap_err().kind;
        assert_eq!(kind(7, 3), Kind::Zero);
        write(&ram, 0, 7, 2);
        assert_eq!(kind(7, 3), Kind::Stale);
        assert_eq!(kind(7, 1), Kind::Newer);
        assert_eq!(kind(8, 2), Kind::OtherPage);
        // Half of an older version.
        write(&ram, 0, 7, 3);
        for (index, offset) in OFFSETS.iter().enumerate().skip(4) {
            ram.store(*offset, word(7, 2, index));
        }
        assert_eq!(kind(7, 3), Kind::Torn);
    }
}
