//! Saved VMs: opened with the library, and taken apart to be damaged.

use std::fs;
use std::ops::Range;
use std::path::Path;

use devices::{Payload, Persist};
use migration::simulated::SimulatedVm;
use migration::snapshot::{SnapshotHeader, SnapshotReader};
use migration::stream::End;
use migration::{GuestMemory, PageRange, Section};
use vmm::kvm::{VcpuKvm, VcpuStateV1};

/// A saved VM, with its memory in this process.
pub struct Snapshot {
    /// What comes before the memory.
    pub header: SnapshotHeader,
    memory: SimulatedVm,
    /// The state of all parts.
    pub sections: Vec<Section>,
}

impl Snapshot {
    /// Reads all of a file.
    ///
    /// # Panics
    /// It cannot be restored.
    #[must_use]
    #[track_caller]
    pub fn open(path: &Path) -> Self {
        let (header, reader) = SnapshotReader::open(path).unwrap();
        let memory = SimulatedVm::new(header.layout.clone()).unwrap();
        let sections = reader.load_memory(&memory).unwrap().sections().unwrap();
        Self { header, memory, sections }
    }

    /// What differs in `other`, apart from what time changes by itself.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = vmm::machine::differences(&self.sections, &other.sections).unwrap();
        if self.header != other.header {
            found.push("the header".to_owned());
        }
        let wrong = self.different_words(other);
        if let Some(first) = wrong.first() {
            found.push(format!("{} words of memory, the first at {first:#x}", wrong.len()));
        }
        found
    }

    /// Reads 32 bits of guest memory.
    #[must_use]
    #[track_caller]
    pub fn word(&self, address: u64) -> u32 {
        let range = PageRange::new(migration::Gfn(address >> 12), 1).unwrap();
        let mut page = [0; 4096];
        self.memory.slice(range).unwrap().copy_to(&mut page[..]);
        let at = usize::try_from(address & 0xFFF).unwrap();
        u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
    }

    /// Guest-physical addresses of the 32-bit words that differ, without those in which KVM keeps
    /// the guest's clock.
    fn different_words(&self, other: &Self) -> Vec<u64> {
        let clocks = self.clocks();
        let mut found = Vec::new();
        let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
        for region in self.header.layout.regions() {
            for page in 0..region.pages() {
                let gfn = migration::Gfn(region.start().0 + page);
                let range = PageRange::new(gfn, 1).unwrap();
                self.memory.slice(range).unwrap().copy_to(&mut ours[..]);
                other.memory.slice(range).unwrap().copy_to(&mut theirs[..]);
                if ours == theirs {
                    continue;
                }
                let words = ours.chunks_exact(4).zip(theirs.chunks_exact(4));
                let addresses = (range.gpa().0..).step_by(4);
                let differ = addresses.zip(words).filter(|(_, (a, b))| a != b).map(|(at, _)| at);
                found.extend(differ.filter(|at| !clocks.iter().any(|c| c.contains(at))));
            }
        }
        found
    }

    /// The state of a vCPU.
    #[must_use]
    #[track_caller]
    pub fn vcpu(&self, instance: u32) -> VcpuStateV1 {
        let wanted = |s: &&Section| s.kind == VcpuKvm::KIND && s.instance == instance;
        let Section { kind, version, data, .. } =
            self.sections.iter().find(wanted).unwrap().clone();
        VcpuKvm::decode_payload(&Payload { kind, instance, version, data }).unwrap()
    }

    /// Where KVM writes the time for each vCPU (Documentation/virt/kvm/x86/msr.rst,
    /// MSR_KVM_SYSTEM_TIME_NEW).
    fn clocks(&self) -> Vec<Range<u64>> {
        const SYSTEM_TIME: u32 = 0x4b56_4d01;
        const TIME_INFO: u64 = 32;
        let count = self.sections.iter().filter(|s| s.kind == VcpuKvm::KIND).count();
        let msrs = (0..u32::try_from(count).unwrap()).flat_map(|n| self.vcpu(n).msrs);
        let areas = msrs.filter(|(index, value)| *index == SYSTEM_TIME && value & 1 == 1);
        areas.map(|(_, value)| value & !1..(value & !1) + TIME_INFO).collect()
    }
}

/// How records and what is in them are encoded.
const BINCODE: bincode::config::Configuration = bincode::config::standard();
const PREAMBLE: usize = 16;
const HEADER: usize = 32;
/// Flag "the payload has a checksum".
const CHECKSUM: u16 = 2;

/// A saved VM as bytes, record by record (docs/PROTOCOL.md).
pub struct Records {
    preamble: Vec<u8>,
    /// Type, flags and payload of each.
    records: Vec<(u16, u16, Vec<u8>)>,
}

impl Records {
    /// The machine's identity.
    pub const MACHINE: u16 = 1;
    /// The configuration.
    pub const CONFIG: u16 = 2;
    /// State of a part.
    pub const STATE: u16 = 0x20;
    const END: u16 = 0xFF;

    /// Reads a file that is whole.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[PREAMBLE..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let u16_at = |at: usize| u16::from_le_bytes(rest[at..at + 2].try_into().unwrap());
            let length = u64::from_le_bytes(rest[8..16].try_into().unwrap());
            let length = usize::try_from(length).unwrap();
            let payload = rest[HEADER..HEADER + length].to_vec();
            records.push((u16_at(0), u16_at(2), payload));
            rest = &rest[(HEADER + length).next_multiple_of(8)..];
        }
        Self { preamble: bytes[..PREAMBLE].to_vec(), records }
    }

    /// Changes the version of the protocol.
    pub fn set_version(&mut self, version: u16) {
        self.preamble[8..10].copy_from_slice(&version.to_le_bytes());
        let checksum = crc32c::crc32c(&self.preamble[..12]);
        self.preamble[12..].copy_from_slice(&checksum.to_le_bytes());
    }

    /// The payload of the first record of a type.
    #[track_caller]
    pub fn payload(&mut self, record_type: u16) -> &mut Vec<u8> {
        self.records.iter_mut().find(|record| record.0 == record_type).map(|r| &mut r.2).unwrap()
    }

    /// Leaves out the first record of a type.
    #[track_caller]
    pub fn remove(&mut self, record_type: u16) {
        let at = self.records.iter().position(|record| record.0 == record_type).unwrap();
        self.records.remove(at);
    }

    /// Writes the file with right lengths, numbers, checksums and totals.
    pub fn write(&self, path: &Path) {
        let mut bytes = self.preamble.clone();
        let mut digest = crc32c::crc32c(&bytes[..12]);
        for (sequence, (record_type, flags, payload)) in (0_u64..).zip(&self.records) {
            let mut payload = payload.clone();
            if *record_type == Self::END {
                let (mut end, _): (End, usize) =
                    bincode::serde::decode_from_slice(&payload, BINCODE).unwrap();
                (end.records, end.bytes, end.digest) = (sequence, bytes.len() as u64, digest);
                payload = bincode::serde::encode_to_vec(end, BINCODE).unwrap();
            }
            let checksum = if flags & CHECKSUM == 0 { 0 } else { crc32c::crc32c(&payload) };
            let mut header = Vec::with_capacity(HEADER);
            header.extend_from_slice(&record_type.to_le_bytes());
            header.extend_from_slice(&flags.to_le_bytes());
            header.extend_from_slice(&checksum.to_le_bytes());
            header.extend_from_slice(&(payload.len() as u64).to_le_bytes());
            header.extend_from_slice(&sequence.to_le_bytes());
            header.extend_from_slice(&[0; 4]);
            digest = crc32c::crc32c_append(digest, &header);
            header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&payload);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        fs::write(path, bytes).unwrap();
    }

    /// Replaces the identity of the machine by what `change` makes of it.
    pub fn change_identity(&mut self, change: impl FnOnce(&mut vmm::identity::IdentityV1)) {
        let payload = self.payload(Self::MACHINE);
        type Wire = (String, u16, Vec<u8>);
        let ((program, version, data), _): (Wire, usize) =
            bincode::serde::decode_from_slice(payload, BINCODE).unwrap();
        let mut identity = vmm::identity::IdentityV1::decode(version, data).unwrap();
        change(&mut identity);
        let changed: Wire = (program, version, identity.save_payload(0).unwrap().data);
        *payload = bincode::serde::encode_to_vec(changed, BINCODE).unwrap();
    }
}
