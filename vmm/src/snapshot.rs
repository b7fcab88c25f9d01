//! Saving a machine to a file and making one from a file.
//!
//! The file's format is in docs/PROTOCOL.md; its records are written and read by the `migration`
//! crate. Here is what they hold for this VMM, and what is checked before memory is provided.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use devices::Persist;
use migration::snapshot::{
    Blob, BlobSource, PendingSnapshot, SnapshotError, SnapshotReader, SnapshotSource,
};
use migration::stream::{BlobKind, Config, Machine as MachineRecord};

use rustix::fs::{memfd_create, MemfdFlags};

use crate::boot::Image;
use crate::config::VmConfig;
use crate::identity::{decode_config, encode_config, IdentityError, IdentityV1};
use crate::kvm::HostKvm;
use crate::machine::{BootMedia, Machine, StateError};

/// Why a machine was not saved or not restored.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// File or format.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// This host is not one for that machine.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// State.
    #[error(transparent)]
    State(#[from] StateError),
    /// An image out of the file could not be kept.
    #[error("cannot keep the saved {what} in memory: {error}")]
    Image {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The file has no kernel.
    #[error("the saved VM has no kernel: the file was not written by minivmm")]
    NoKernel,
    /// The configuration in the file is not one.
    #[error("the saved configuration is not valid: {0}")]
    Config(String),
}

/// Reads an [`Image`] from its start.
struct ImageReader<'a> {
    image: &'a Image,
    at: u64,
}

impl Read for ImageReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.image.read_at(self.at, buf)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// What a machine is and how it is configured, as it is written to files and peers.
pub(crate) fn records(machine: &Machine) -> Result<(MachineRecord, Config), IdentityError> {
    let mut identity = machine.identity().clone();
    identity.tsc_khz = machine.guest_tsc_khz();
    let identity = identity.save_payload(0)?;
    let config = encode_config(machine.config())?;
    let record = MachineRecord {
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        identity_version: identity.version,
        identity: identity.data,
    };
    Ok((record, Config { version: config.version, data: config.data }))
}

/// Readers of kernel and initrd.
pub(crate) struct MediaReaders<'a> {
    kernel: ImageReader<'a>,
    initrd: Option<ImageReader<'a>>,
}

impl<'a> MediaReaders<'a> {
    pub(crate) fn new(media: &'a BootMedia) -> Self {
        let reader = |image: &'a Image| ImageReader { image, at: 0 };
        Self { kernel: reader(&media.kernel), initrd: media.initrd.as_ref().map(reader) }
    }

    pub(crate) fn blobs(&mut self) -> Vec<BlobSource<'_>> {
        let kernel = (BlobKind::Kernel, &mut self.kernel);
        let initrd = self.initrd.as_mut().map(|reader| (BlobKind::Initrd, reader));
        [Some(kernel), initrd]
            .into_iter()
            .flatten()
            .map(|(kind, reader)| BlobSource { kind, length: reader.image.len(), reader })
            .collect()
    }
}

/// Kernel and initrd out of blobs.
pub(crate) fn media_of(blobs: Vec<Blob>) -> Result<BootMedia, SaveError> {
    let mut kernel = None;
    let mut initrd = None;
    for Blob { kind, data } in blobs {
        let (what, slot) = match kind {
            BlobKind::Kernel => ("kernel", &mut kernel),
            BlobKind::Initrd => ("initrd", &mut initrd),
        };
        *slot = Some(keep(what, &data).map_err(|error| SaveError::Image { what, error })?);
    }
    Ok(BootMedia { kernel: kernel.ok_or(SaveError::NoKernel)?, initrd })
}

/// What is written of a machine that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Memory alone, of a VM that has moved.
    Remains,
}

/// Writes a machine that stands to a temporary file beside `path`; `commit` gives it its name.
pub fn write(machine: &Machine, path: &Path, extent: Extent) -> Result<PendingSnapshot, SaveError> {
    let (record, config) = records(machine)?;
    let mut media = MediaReaders::new(machine.media());
    let source = SnapshotSource {
        machine: record,
        config,
        blobs: media.blobs(),
        memory: machine,
        state: machine,
    };
    let mut progress = |_| match machine.is_ending() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    Ok(match extent {
        Extent::Whole => PendingSnapshot::write(path, source, &mut progress)?,
        Extent::Remains => PendingSnapshot::write_remains(path, source, &mut progress)?,
    })
}

/// A saved machine, checked, whose memory is still in the file.
pub struct Saved {
    /// Its configuration; backends (console, name) may be replaced.
    pub config: VmConfig,
    /// Kernel and initrd for reboots.
    pub media: BootMedia,
    /// CPUID of its vCPUs.
    pub cpuid: Vec<kvm_bindings::CpuId>,
    reader: SnapshotReader,
}

/// Opens `path` and checks that this host can run what is in it.
pub fn open(path: &Path, host: &HostKvm) -> Result<Saved, SaveError> {
    let (header, reader) = SnapshotReader::open(path)?;
    let config =
        decode_config(header.config.version, header.config.data).map_err(IdentityError::from)?;
    config
        .validate(crate::config::HostLimits::detect())
        .map_err(|e| SaveError::Config(e.to_string()))?;
    let identity = IdentityV1::decode(header.machine.identity_version, header.machine.identity)
        .map_err(IdentityError::from)?;
    let cpuid = identity.check(host, &config)?;
    let media = media_of(header.blobs)?;
    Ok(Saved { config, media, cpuid, reader })
}

impl Saved {
    /// What is needed to make the machine, and what loads it afterwards.
    #[must_use]
    pub fn split(self) -> (VmConfig, BootMedia, Vec<kvm_bindings::CpuId>, Loader) {
        (self.config, self.media, self.cpuid, Loader { reader: self.reader })
    }
}

/// Loads memory and state into a machine.
pub struct Loader {
    reader: SnapshotReader,
}

impl Loader {
    /// Fills a fresh machine. On error it must not be run.
    pub fn load(self, machine: &Machine) -> Result<(), SaveError> {
        let sections = self.reader.load_memory(machine)?.sections()?;
        Ok(machine.load_sections(&sections, None)?)
    }
}

/// An image as an anonymous file, so that it is paged like one.
fn keep(what: &'static str, data: &[u8]) -> io::Result<Image> {
    let mut file = File::from(memfd_create("minivmm-image", MemfdFlags::CLOEXEC)?);
    file.write_all(data)?;
    Image::from_file(&format!("(saved {what})"), file)
}
