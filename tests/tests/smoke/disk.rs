//! Disks with a file system.

use std::fs;
use std::process::Command;

use tests::lab::{ext4, image, program, Linux};
use tests::{finish, Host};

use crate::guest::{boot, check, counter, device_healthy, healthy, LOADER_PVH};

/// Fails unless the file system is whole and was unmounted, or needs no more than one does whose machine was switched off: its
/// journal, and the list of files that were being cut or removed (Documentation/filesystems/ext4/orphan.rst). A commit may
/// fall between the two steps of cutting a file.
pub fn check_ext4(path: &str) {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program("e2fsck").unwrap());
        command.args(arguments).arg(path);
        finish(command, b"")
    };
    // Without -f it does that and nothing more (e2fsck(8): 1, corrected).
    let replayed = run(&["-p"]);
    assert!(matches!(replayed.code, Some(0 | 1)), "{replayed:#?}");
    run(&["-f", "-n"]).ok();
}

/// Two vCPUs with a disk and one that is read-only: what was written and synced is there after a
/// reboot.
pub fn reboot() {
    let host = Host::new();
    let (disk, fixed) = (ext4(&host, "disk.img"), ext4(&host, "fixed.img"));
    let fixed_before = fs::read(&fixed).unwrap();
    let (disk_flag, fixed_flag) =
        (format!("id=data,path={disk}"), format!("id=fixed,path={fixed},readonly"));
    let flags = ["--cpus", "2", "--disk", &disk_flag, "--disk", &fixed_flag];
    let modules = ",virtio_mmio,virtio_blk,ext4";
    let mut guest = boot(&host, &image("vmlinux"), &flags, modules, "disk=vda");
    check(&mut guest, 2, LOADER_PVH);
    for (name, id) in [("vda", "data"), ("vdb", "fixed")] {
        assert_eq!(guest.sh(&format!("echo \"$(cat /sys/block/{name}/serial)\"")), id);
        assert_eq!(guest.number(&format!("cat /sys/block/{name}/size")), 64 << 11);
    }
    read_only(&mut guest);

    guest.sh("dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null && sync");
    let sum = guest.sh("md5sum </mnt/file");
    // Written, and read again.
    guest.sh("copy 1 /mnt & after copies 1 && kill $!");
    assert_eq!(guest.sh("cat /run/copy-errors 2>/dev/null; touch /tmp/before"), "");
    assert!(counter(&host, "data", "bytes_written") > 8 << 20);
    assert!(counter(&host, "data", "flushes") > 0);
    guest.send("reboot -f");
    guest.wait_ready();

    assert_eq!(host.json(&["stats", "vm"])["reboots"], 1);
    check(&mut guest, 2, LOADER_PVH);
    assert_ne!(guest.try_sh("test -e /tmp/before").0, 0, "memory was not started afresh");
    assert_eq!(guest.sh("md5sum </mnt/file"), sum);
    guest.sh("rm /mnt/copy-* && umount /mnt");
    for id in ["data", "fixed"] {
        device_healthy(&host, id);
        assert_eq!(counter(&host, id, "errors"), 0);
    }
    healthy(&mut guest);
    guest.send("poweroff -f");
    guest.ends_well();
    check_ext4(&disk);
    assert!(fs::read(&fixed).unwrap() == fixed_before, "a read-only disk was written");
}

/// The disk can be read, and not be written in any way.
fn read_only(guest: &mut Linux) {
    assert_eq!(guest.number("cat /sys/block/vdb/ro"), 1);
    let write = "dd if=/dev/urandom of=/dev/vdb bs=4k count=1 conv=fsync 2>&1";
    let (status, why) = guest.try_sh(write);
    assert_ne!(status, 0, "{why}");
    // A mount that asks for more than there is gets what there is.
    guest.sh("mkdir /run/fixed && mount -t ext4 -o rw /dev/vdb /run/fixed 2>/dev/null");
    assert_ne!(guest.try_sh("mount -o remount,rw /run/fixed 2>&1").0, 0);
    assert_ne!(guest.try_sh("touch /run/fixed/file 2>&1").0, 0);
    guest.sh("umount /run/fixed");
}
