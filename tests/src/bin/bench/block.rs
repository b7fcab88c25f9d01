//! A disk in a file that the host has in its page cache, with cache=writeback: requests of the
//! guest's, as fast as it can.
//!
//! The file is on a tmpfs where there is one: what a file system takes for a write (ext4 here 10 to
//! 130 µs, by what it did before) hides what the VMMs take.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use ::tests::bench::{Better, Result, Row, Setup, Target, Vmm};
use tempfile::NamedTempFile;

use crate::rounds::{alternate, row, template};
use crate::Bench;

const DISK_MIB: usize = 256;
/// Block size in KiB and requests in flight.
const LOADS: [(u32, u32); 4] = [(4, 1), (4, 32), (128, 1), (128, 32)];
const OPERATIONS: [&str; 2] = ["read", "write"];

/// IOPS of small blocks, throughput of large ones, by interrupt and by polling.
pub fn block(bench: &Bench) -> Result<Vec<Row>> {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { memory } else { &bench.tools.data };
    // Removed at the end.
    let file = NamedTempFile::with_prefix_in("minivmm-bench-disk-", folder)?;
    fill(file.as_file())?;
    let disk = file.path();
    let ms = if bench.quick { 200 } else { 500 };
    let mut rows = Vec::new();
    for virtio in ["irq", "poll"] {
        let cmdline =
            format!("virtio={virtio} disk=bench disk-ms=20 disk-ws={DISK_MIB} ws=2 report=0");
        let setup = Setup {
            memory_mib: 256,
            cpus: 1,
            cmdline,
            disk: Some(disk.to_owned()),
            ..Setup::default()
        };
        let vmms = [Vmm::Minivmm, Vmm::QemuRom, Vmm::QemuUring];
        let quantities = LOADS.len() * OPERATIONS.len();
        let figures = alternate(bench, &vmms, bench.runs(), quantities, |vmm| {
            let mut guest = bench.tools.boot(vmm, "block", &setup)?;
            guest.event("disk-bench")?;
            let mut samples = Vec::new();
            for (kib, depth) in LOADS {
                for op in OPERATIONS {
                    let bs = kib << 10;
                    guest.say(&format!(
                        "disk disk=bench disk-ws={DISK_MIB} disk-ms={ms} disk-bs={bs} \
                         disk-depth={depth} disk-op={op}"
                    ))?;
                    let result = guest.event("disk-bench")?.event;
                    if result["errors"] != 0 {
                        return Err(result.to_string().into());
                    }
                    let key = if kib == 4 { "iops" } else { "mib_per_s" };
                    samples.push(result[key].as_f64().ok_or_else(|| result.to_string()));
                }
            }
            guest.end()?;
            Ok(samples)
        })?;
        let kinds = LOADS.into_iter().flat_map(|load| OPERATIONS.map(|op| (load, op)));
        for (index, ((kib, depth), op)) in kinds.enumerate() {
            let what = format!("{op}, {kib} KiB, depth {depth}, {virtio}");
            let unit = if kib == 4 { "IOPS" } else { "MiB/s" };
            rows.push(row(
                &figures,
                index,
                Row {
                    better: Better::Higher,
                    digits: 0,
                    target: Some(Target::Peers),
                    ..template("block", what, unit)
                },
            ));
        }
    }
    Ok(rows)
}

/// Makes it a file without holes, all of it in the page cache.
fn fill(mut file: &File) -> Result<()> {
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    for _ in 0..DISK_MIB {
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}
