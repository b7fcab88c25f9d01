//! What the disk load writes, what it expects to read, and which request comes next.
//!
//! Each sector of a block that was written carries its own number, a stamp of this boot and a
//! generation that grows with each write; a table in RAM has the generation that each block should
//! have. So a write that a save or a migration lost or took out of its order is noticed when
//! the block is read.
//!
//! ```text
//! offset 0     sector number
//! offset 8     boot stamp << 32 | generation
//! offset 248   mix(word 0 ^ word 1 rotated by 32)
//! offset 504   mix(word at 248)
//! ```

use crate::devices::{DiskMode, DiskOp, DiskOptions, DiskOrder, MAX_DEPTH};
use crate::mix;
use crate::pages::Words;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
const OFFSETS: [u64; 4] = [0, 8, 248, 504];

/// In the table, beside the last generation, which goes on growing: content unknown, because the
/// block was never written or a write of it failed.
const UNKNOWN: u32 = 1 << 31;
/// All zeros, written by the device.
const ZEROED: u32 = 1 << 30;
const GENERATION: u32 = ZEROED - 1;
/// One of so many requests is a discard, and one a write of zeros, if wanted.
const DISCARD_SHARE: u64 = 64;
/// Blocks that are tried when one is in use by another request.
const TRIES: usize = 8;

/// Which write a sector comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The boot, so that what an earlier one left is not taken for ours.
    pub boot: u32,
    /// The write.
    pub generation: u32,
}

fn words(sector: u64, tag: Tag) -> [u64; 4] {
    let second = u64::from(tag.boot) << 32 | u64::from(tag.generation);
    let third = mix(sector ^ second.rotate_left(32));
    [sector, second, third, mix(third)]
}

/// How a sector is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but zeros.
    Zero,
    /// An older write of this boot.
    Stale,
    /// A newer write of this boot.
    Newer,
    /// Another sector.
    OtherSector,
    /// Of another boot.
    OtherBoot,
    /// Anything else.
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
            Self::OtherSector => "other-sector",
            Self::OtherBoot => "other-boot",
            Self::Torn => "torn",
        }
    }
}

/// A sector that does not hold what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The sector.
    pub sector: u64,
    /// How it is wrong.
    pub kind: Kind,
    /// Generation that it should have; 0 if it should be all zeros.
    pub expected: u32,
    /// Generation that it says it has.
    pub found: u32,
    /// Sector that it says it is.
    pub found_sector: u64,
}

/// Stamps all sectors of a buffer.
pub fn stamp(memory: &impl Words, address: u64, bytes: u64, first: u64, tag: Tag) {
    for index in 0..bytes / SECTOR {
        for (offset, word) in OFFSETS.iter().zip(words(first + index, tag)) {
            memory.store(address + index * SECTOR + offset, word);
        }
    }
}

/// Overwrites the stamps of a buffer, so that a read that does not happen is noticed.
pub fn blot(memory: &impl Words, address: u64, bytes: u64) {
    for index in 0..bytes / SECTOR {
        for offset in OFFSETS {
            memory.store(address + index * SECTOR + offset, !0);
        }
    }
}

/// Checks the sectors of a buffer; no tag means all zeros.
///
/// # Errors
/// The first wrong sector.
pub fn check(
    memory: &impl Words,
    address: u64,
    bytes: u64,
    first: u64,
    tag: Option<Tag>,
) -> Result<(), Wrong> {
    for index in 0..bytes / SECTOR {
        let found = OFFSETS.map(|offset| memory.load(address + index * SECTOR + offset));
        let expected = tag.map_or([0; 4], |tag| words(first + index, tag));
        if found != expected {
            return Err(examine(first + index, tag, found));
        }
    }
    Ok(())
}

#[cold]
fn examine(sector: u64, tag: Option<Tag>, found: [u64; 4]) -> Wrong {
    let says = Tag { boot: (found[1] >> 32) as u32, generation: found[1] as u32 };
    let whole = words(found[0], says) == found;
    let kind = if found == [0; 4] {
        Kind::Zero
    } else if !whole {
        Kind::Torn
    } else if found[0] != sector {
        Kind::OtherSector
    } else if tag.is_some_and(|tag| tag.boot != says.boot) {
        Kind::OtherBoot
    } else if tag.is_some_and(|tag| says.generation > tag.generation) {
        Kind::Newer
    } else {
        Kind::Stale
    };
    Wrong {
        sector,
        kind,
        expected: tag.map_or(0, |tag| tag.generation),
        found: says.generation,
        found_sector: found[0],
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Read a block; `tag` is what it should hold, if that is known.
    Read {
        /// The block.
        block: u64,
    },
    /// Write a block.
    Write {
        /// The block.
        block: u64,
        /// With this generation.
        generation: u32,
    },
    /// Discard a block.
    Discard {
        /// The block.
        block: u64,
    },
    /// Have the device zero a block.
    Zero {
        /// The block.
        block: u64,
    },
    /// Flush the disk's cache.
    Flush,
}

impl Job {
    /// The block that it is about.
    #[must_use]
    pub const fn block(self) -> Option<u64> {
        match self {
            Self::Read { block }
            | Self::Write { block, .. }
            | Self::Discard { block }
            | Self::Zero { block } => Some(block),
            Self::Flush => None,
        }
    }
}

/// What a block should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nobody knows.
    Unknown,
    /// Zeros.
    Zeros,
    /// Stamps.
    Stamped(Tag),
}

/// What the device can do besides reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Writing.
    pub write: bool,
    /// Discarding.
    pub discard: bool,
    /// Writing zeros.
    pub zero: bool,
}

/// The load on a disk: the requests in flight and the table of generations.
pub struct Load {
    options: DiskOptions,
    able: Abilities,
    boot: u32,
    blocks: u64,
    generations: &'static mut [u32],
    jobs: [Option<Job>; MAX_DEPTH],
    /// Blocks below this were written once.
    populated: u64,
    next: u64,
    random: u64,
}

impl Load {
    /// A load on the first `sectors` of a disk, as far as the options and the table go.
    #[must_use]
    pub fn new(
        options: DiskOptions,
        able: Abilities,
        sectors: u64,
        boot: u32,
        generations: &'static mut [u32],
    ) -> Self {
        let bytes = (options.mib << 20).min(sectors.saturating_mul(SECTOR));
        let blocks = (bytes / options.block).min(generations.len() as u64);
        let mut load = Self {
            options,
            able,
            boot,
            blocks,
            generations,
            jobs: [None; MAX_DEPTH],
            populated: 0,
            next: 0,
            random: u64::from(boot),
        };
        load.forget();
        load
    }

    /// The same table and disk with other options; nothing may be in flight.
    pub fn change(&mut self, options: DiskOptions, sectors: u64) {
        let generations = core::mem::take(&mut self.generations);
        *self = Self::new(options, self.able, sectors, self.boot, generations);
    }

    fn forget(&mut self) {
        self.generations.fill(UNKNOWN);
        self.populated = 0;
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Blocks of the area.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether every block was written once.
    #[must_use]
    pub fn is_populated(&self) -> bool {
        self.populated == self.blocks
    }

    /// Sectors of a block.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.options.block / SECTOR
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.jobs.iter().flatten().count()
    }

    /// A free place for a request within the depth.
    #[must_use]
    pub fn free_slot(&self) -> Option<usize> {
        self.jobs[..self.options.depth].iter().position(Option::is_none)
    }

    /// The request in a place.
    #[must_use]
    pub fn job(&self, slot: usize) -> Option<Job> {
        self.jobs.get(slot).copied().flatten()
    }

    /// Puts a request into a free place.
    pub fn start(&mut self, slot: usize, job: Job) {
        self.jobs[slot] = Some(job);
    }

    /// What a block should hold now.
    #[must_use]
    pub fn content(&self, block: u64) -> Content {
        match self.generations[block as usize] {
            entry if entry & UNKNOWN != 0 => Content::Unknown,
            entry if entry & ZEROED != 0 => Content::Zeros,
            generation => Content::Stamped(Tag { boot: self.boot, generation }),
        }
    }

    /// The stamp of a write.
    #[must_use]
    pub fn tag(&self, generation: u32) -> Tag {
        Tag { boot: self.boot, generation }
    }

    /// The next request, unless all that would be next is in use.
    pub fn pick(&mut self) -> Option<Job> {
        if self.blocks == 0 {
            return None;
        }
        if self.options.mode == DiskMode::Bench {
            let block = self.pick_block();
            return Some(if self.wants_write() {
                Job::Write { block, generation: 1 }
            } else {
                Job::Read { block }
            });
        }
        if self.able.write && self.populated < self.blocks {
            let block = self.populated;
            self.populated += 1;
            return Some(self.write(block));
        }
        let block = self.pick_free_block()?;
        if !self.able.write {
            return Some(Job::Read { block });
        }
        if self.options.discard {
            match self.random() % DISCARD_SHARE {
                0 if self.able.discard => return Some(Job::Discard { block }),
                1 if self.able.zero => return Some(Job::Zero { block }),
                _ => (),
            }
        }
        let unknown = self.content(block) == Content::Unknown;
        Some(if unknown || self.wants_write() { self.write(block) } else { Job::Read { block } })
    }

    fn write(&self, block: u64) -> Job {
        let generation = (self.generations[block as usize] + 1) & GENERATION;
        Job::Write { block, generation }
    }

    fn wants_write(&mut self) -> bool {
        self.able.write
            && match self.options.op {
                DiskOp::Read => false,
                DiskOp::Write => true,
                DiskOp::Mixed => self.random() & 1 == 0,
            }
    }

    fn pick_free_block(&mut self) -> Option<u64> {
        for _ in 0..TRIES {
            let block = self.pick_block();
            if !self.in_use(block) {
                return Some(block);
            }
        }
        None
    }

    fn pick_block(&mut self) -> u64 {
        match self.options.order {
            DiskOrder::Random => self.random() % self.blocks,
            DiskOrder::Sequential => {
                let block = self.next;
                self.next = (self.next + 1) % self.blocks;
                block
            }
        }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }

    fn in_use(&self, block: u64) -> bool {
        self.jobs.iter().flatten().any(|job| job.block() == Some(block))
    }

    /// Takes a request out; `good` as the device says.
    pub fn finish(&mut self, slot: usize, good: bool) -> Option<Job> {
        let job = self.jobs.get_mut(slot)?.take()?;
        if let (DiskMode::Verify, Some(block)) = (self.options.mode, job.block()) {
            let entry = &mut self.generations[block as usize];
            match job {
                // A write that failed may be there in part, now or later.
                Job::Write { generation, .. } => {
                    *entry = generation | if good { 0 } else { UNKNOWN }
                }
                Job::Zero { .. } if good => *entry = *entry & GENERATION | ZEROED,
                Job::Zero { .. } | Job::Discard { .. } => *entry |= UNKNOWN,
                Job::Read { .. } | Job::Flush => (),
            }
        }
        Some(job)
    }

    /// A block was found wrong: have it written anew, so that it is counted once.
    pub fn distrust(&mut self, block: u64) {
        self.generations[block as usize] |= UNKNOWN;
    }

    /// Expects a later write than there was, for tests of what notices; false where nothing was
    /// written.
    pub fn spoil(&mut self, block: u64) -> bool {
        let busy = self.in_use(block);
        match self.generations.get_mut(block as usize) {
            Some(generation) if !busy && *generation & (UNKNOWN | ZEROED) == 0 => {
                *generation += 1;
                true
            }
            _ => false,
        }
    }

    /// Everything in flight is gone: the device was reset.
    pub fn abandon(&mut self) {
        for slot in 0..MAX_DEPTH {
            self.finish(slot, false);
        }
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
