//! KVM's dirty log, with manual protection.
#![allow(unsafe_code)] // one ioctl that kvm-ioctls does not have

use std::io;

use kvm_bindings::{kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, KVMIO};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

// Documentation/virt/kvm/api.rst, 4.117 KVM_CLEAR_DIRTY_LOG.
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Why the log could not be cleared.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// The arguments break the rule of 64 pages.
    #[error(
        "dirty log: first page {first} and count {pages} do not fit 64-page words of slot {slot}"
    )]
    Unaligned {
        /// Memory slot.
        slot: u32,
        /// First page.
        first: u64,
        /// Number of pages.
        pages: u32,
    },
    /// The kernel refused.
    #[error("clearing the dirty log of slot {slot}, {pages} pages from {first}: {error}")]
    Ioctl {
        /// Memory slot.
        slot: u32,
        /// First page.
        first: u64,
        /// Number of pages.
        pages: u32,
        /// What it said.
        error: io::Error,
    },
}

/// Clears and write-protects again the pages of `slot` whose bit is set in `bits`; bit 0 is page
/// `first` of the slot. `first` is a multiple of 64; `pages` is too, unless it reaches the end.
pub fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first: u64,
    pages: u32,
    bits: &[u64],
) -> Result<(), DirtyLogError> {
    if first % 64 != 0 || (bits.len() as u64) * 64 < u64::from(pages) {
        return Err(DirtyLogError::Unaligned { slot, first, pages });
    }
    let arg = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr() as *mut _,
        },
    };
    // SAFETY: the kernel reads `pages` bits from the bitmap, which has as many (checked above),
    // and writes nothing to it.
    let rc = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &arg) };
    if rc != 0 {
        return Err(DirtyLogError::Ioctl { slot, first, pages, error: io::Error::last_os_error() });
    }
    Ok(())
}
