//! Host memory that is there.
//!
//! Where the host is a VM itself, its free memory may have been given back to its own hypervisor (free page
//! reporting), and first touch then costs a multiple, now for one subject and now for another. So
//! as much as the guest has is touched and freed right before each measured copy: the kernel gives out
//! first what was freed last.

use ::tests::bench::Result;
use vmm::memory::{GuestRam, PAGE_SIZE};

/// Touches and frees so many bytes.
pub fn warm(bytes: u64) -> Result<()> {
    let ram = GuestRam::new(bytes.next_multiple_of(PAGE_SIZE), false)?;
    for region in ram.regions() {
        for page in 0..region.len / PAGE_SIZE {
            ram.slice(region.gpa + page * PAGE_SIZE, 1)?.copy_from(&[1_u8]);
        }
    }
    Ok(())
}
