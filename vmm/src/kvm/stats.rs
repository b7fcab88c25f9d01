//! Counters that KVM keeps for a vCPU, by name (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD).
#![allow(unsafe_code)] // one ioctl that kvm-ioctls does not have

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Sizes and offsets of `struct kvm_stats_header` and `struct kvm_stats_desc` (linux/kvm.h).
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
const DESCRIPTOR_OFFSET: usize = 8;
/// More than any kernel has of either.
const MAX_DESCRIPTORS: u32 = 4096;
const MAX_NAME: u32 = 1024;

/// The sum of some counters of a vCPU, readable while it runs.
#[derive(Debug)]
pub struct VcpuCounter {
    file: File,
    offsets: Vec<u64>,
}

impl VcpuCounter {
    /// The counters of these names, those that the kernel has.
    ///
    /// # Errors
    /// As the ioctl: `EINVAL` or `ENOTTY` from kernels before 5.14. As read(2).
    pub fn open(vcpu: &VcpuFd, names: &[&str]) -> io::Result<Self> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or an error.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let field = |bytes: &[u8], at: usize| {
            bytes[at..at + 4].iter().rev().fold(0_u32, |n, byte| n << 8 | u32::from(*byte))
        };
        let (name_bytes, count) = (field(&header, 4), field(&header, 8));
        let (descriptors, data) = (u64::from(field(&header, 16)), u64::from(field(&header, 20)));
        if name_bytes > MAX_NAME || count > MAX_DESCRIPTORS {
            return Err(io::Error::other("the kernel's counters have an unknown form"));
        }
        let mut offsets = Vec::new();
        let mut descriptor = vec![0; DESCRIPTOR_BYTES + name_bytes as usize];
        for index in 0..u64::from(count) {
            let at = descriptors + index * descriptor.len() as u64;
            file.read_exact_at(&mut descriptor, at)?;
            let name = descriptor[DESCRIPTOR_BYTES..].split(|byte| *byte == 0).next();
            if names.iter().any(|wanted| name == Some(wanted.as_bytes())) {
                offsets.push(data + u64::from(field(&descriptor, DESCRIPTOR_OFFSET)));
            }
        }
        match offsets.is_empty() {
            true => Err(io::Error::other(format!("the kernel has none of {names:?}"))),
            false => Ok(Self { file, offsets }),
        }
    }

    /// The sum now.
    ///
    /// # Errors
    /// As read(2).
    pub fn read(&self) -> io::Result<u64> {
        let mut sum = 0_u64;
        for offset in &self.offsets {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, *offset)?;
            sum = sum.wrapping_add(u64::from_ne_bytes(value));
        }
        Ok(sum)
    }
}
