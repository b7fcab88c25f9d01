//! What the VMM reads and has not written: states and configurations of a peer or a saved file, kernels
//! and configuration files of a user.
//!
//! The same functions are run by the fuzz targets and, on a few inputs, by the ordinary tests
//! (vmm/tests/fuzz.rs).

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;

use devices::{Payload, Persist};
use rustix::fs::{memfd_create, MemfdFlags};
use vmm::boot::{BootSource, Image};
use vmm::config::{HostLimits, RunOptions};
use vmm::identity::{decode_config, encode_config, IdentityV1};
use vmm::kvm::{VcpuKvm, VmClock, VmKvm};
use vmm::memory::GuestRam;
use vmm::migrate::ResourcesV1;

const HOST: HostLimits = HostLimits { memory: 64 << 30 };
const GUEST_BYTES: u64 = 32 << 20;

/// Decodes a payload; the first byte says of what.
pub fn payloads(bytes: &[u8]) {
    let Some((first, data)) = bytes.split_first() else { return };
    let data = data.to_vec();
    let payload =
        |kind: &str, data| Payload { kind: kind.to_owned(), instance: 0, version: 1, data };
    match first % 8 {
        version @ 0..=3 => {
            let Ok(config) = decode_config(version.into(), data) else { return };
            if config.validate(HOST).is_ok() {
                let again = encode_config(&config).expect("it can be saved");
                assert_eq!(decode_config(again.version, again.data).expect("and read"), config);
            }
        }
        4 => drop(IdentityV1::decode(1, data)),
        5 => drop(ResourcesV1::decode(1, data)),
        6 => drop(VcpuKvm::decode_payload(&payload(VcpuKvm::KIND, data))),
        _ => {
            drop(VmKvm::decode_payload(&payload(VmKvm::KIND, data.clone())));
            let Ok(clock) = VmClock::decode_payload(&payload(VmClock::KIND, data)) else { return };
            let _ = clock.time_away(std::time::Duration::from_secs(1));
        }
    }
}

/// Loads a kernel: all that lands in the guest's memory is where it may be.
pub fn kernel(bytes: &[u8]) {
    let file = || -> std::io::Result<File> {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        file.rewind()?;
        Ok(file)
    };
    let kernel = Image::from_file("a kernel", file().expect("a file")).expect("a file");
    let initrd = Image::embedded("an initrd", b"an initrd");
    let ram = GuestRam::new(GUEST_BYTES, false).expect("memory");
    for again in [false, true] {
        let source = BootSource {
            kernel: &kernel,
            initrd: Some(&initrd),
            cmdline: "console=ttyS0",
            acpi: &[0; 64],
            rsdp: 0xe0000,
            again,
        };
        let _ = source.load(&ram);
    }
}

/// Reads a configuration file.
pub fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(options) = RunOptions::from_toml(&text, Path::new("vm.toml")) else { return };
    let _ = options.finish(HOST, "vm");
}
