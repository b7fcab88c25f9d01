//! Disks that are full, and saved VMs that are damaged or do not fit here.

use std::fs;
use std::path::Path;
use std::process::Command;

use tests::{add, binary, namespaces, root, Host, Records, Snapshot, Suite, Vm};
use vmm::identity::IdentityV1;

pub fn add(suite: &mut Suite, kvm: &Result<(), String>) {
    add!(suite, &[kvm, &root(), &namespaces()]; a_full_disk_keeps_the_old_file_and_the_vm);
    add!(suite, &[kvm];
        a_file_that_is_none_is_refused,
        a_truncated_file_is_refused,
        a_corrupted_file_is_refused,
        a_file_of_another_version_is_refused,
        a_file_with_parts_missing_is_refused,
        a_file_of_another_cpu_is_refused,
        a_console_file_is_not_emptied_unasked,
    );
}

fn a_full_disk_keeps_the_old_file_and_the_vm() {
    let host = Host::new();
    let disk = host.file("disk");
    fs::create_dir(&disk).unwrap();
    // The VM alone sees the small disk.
    let mut unshare = Command::new("unshare");
    let script = format!("mount -t tmpfs -o size=12m tmpfs {disk}; exec \"$@\"");
    unshare.args(["-m", "--", "sh", "-ec", &script, "sh"]).arg(binary());
    unshare.args(["run", "--name", "vm", "--memory", "64M", "--console", "stdio"]);
    unshare.args(["--cmdline", "ws=8 dirty=1000 report=100 pace=0"]);
    host.environment(&mut unshare);
    let mut vm = Vm::start(unshare).ready();
    let pid = vm.pid();
    let inside = |file: &str| format!("/proc/{pid}/root{disk}/{file}");
    let old = inside("vm.snapshot");
    fs::write(&old, "the old file").unwrap();
    let filler = inside("filler");
    fs::write(&filler, vec![1; 6 << 20]).unwrap();
    let files = || fs::read_dir(inside("")).unwrap().count();

    let path = format!("{disk}/vm.snapshot");
    let before = vm.console.event("report");
    for args in [&["save", "vm", &path][..], &["save", "vm", &path, "--stop"]] {
        let end = host.cli(args);
        end.refused(1, &[&path, "not saved", "untouched", "no space left"]);
        assert_eq!(fs::read_to_string(&old).unwrap(), "the old file");
        assert_eq!(files(), 2, "the temporary file is gone");
        assert_eq!(host.json(&["info", "vm"])["status"], "running");
    }
    fs::remove_file(&filler).unwrap();
    host.ok(&["save", "vm", &path]);
    let restored = Snapshot::open(Path::new(&old));
    assert_eq!(restored.header.blobs.len(), 1);
    vm.goes_on_after_pauses(3, &before);
    vm.verify();
}

fn a_console_file_is_not_emptied_unasked() {
    let host = Host::new();
    let (log, saved) = (host.file("log"), host.file("saved"));
    let console = format!("file:{log}");
    let run = ["run", "--name", "vm", "--memory", "64M", "--paused", "--console", &console];
    let mut vm = Vm::start(host.command(&run));
    host.wait_for_api("vm", &vm);
    host.ok(&["save", "vm", &saved, "--stop"]);
    vm.ends_well();
    fs::write(&log, "what was there").unwrap();
    host.cli(&["restore", &saved]).refused(2, &[&log, "--console"]);
    assert_eq!(fs::read_to_string(&log).unwrap(), "what was there");
}

/// Saves a small VM of 2 vCPUs.
fn save(host: &Host) -> Vec<u8> {
    let mut vm = host.run("ws=2 dirty=1000 report=100 pace=0", &["--cpus", "2"]).ready();
    host.ok(&["save", "vm", &host.file("good"), "--stop"]);
    vm.ends_well();
    fs::read(host.path("good")).unwrap()
}

/// Nothing runs and nothing is left of a VM whose file was refused.
fn refuse(host: &Host, file: &str, code: i32, words: &[&str]) {
    let end = host.cli(&["restore", file, "--name", "vm"]);
    end.refused(code, &[&[file], words].concat());
    assert_eq!(end.stdout, "", "no guest ran: {end:#?}");
    assert_eq!(host.json(&["list"]), serde_json::json!([]));
}

fn a_file_that_is_none_is_refused() {
    let host = Host::new();
    let missing = host.file("missing");
    refuse(&host, &missing, 1, &["no such file"]);
    for (contents, words) in [
        (&b""[..], &["incomplete"][..]),
        (b"MINIVMM", &["incomplete"]),
        (b"#!/bin/sh\necho this is not a saved VM\n", &["not"]),
        (guest_images::BEACON, &["not"]),
    ] {
        let file = host.write("file", contents);
        refuse(&host, &file, 1, words);
    }
    refuse(&host, host.root().to_str().unwrap(), 1, &["not a regular file"]);
}

fn a_truncated_file_is_refused() {
    let host = Host::new();
    let whole = save(&host);
    let length = whole.len();
    // In the preamble, in a header, in each part, in the last record, at its last byte.
    let cuts = [15, 16, 40, 100, length / 8, length / 4, length / 2, length * 3 / 4];
    for cut in cuts.into_iter().chain([length - 5000, length - 100, length - 9, length - 1]) {
        let file = host.write("file", &whole[..cut]);
        refuse(&host, &file, 1, &["cannot be restored", "incomplete", "another copy"]);
    }
    let file = host.write("file", [&whole[..], b"\0"].concat());
    refuse(&host, &file, 1, &["cannot be restored"]);
    host.restore(&host.file("good"), &[]).verify();
}

fn a_corrupted_file_is_refused() {
    let host = Host::new();
    let whole = save(&host);
    let length = whole.len();
    let parts = (1..12).map(|part| length * part / 12);
    let edges = [3, 9, 13, 18, 24, 33, 50, length - 200, length - 40, length - 20];
    let mut passed = Vec::new();
    for at in parts.chain(edges) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let file = host.write("file", bytes);
        let end = host.cli(&["restore", &file, "--name", "vm"]);
        if end.code != Some(1) || !end.stdout.is_empty() || !end.stderr.contains(&file) {
            passed.push((at, end));
        }
    }
    assert!(passed.is_empty(), "of {length} bytes: {passed:#?}");
}

fn a_file_of_another_version_is_refused() {
    let host = Host::new();
    save(&host);
    let path = host.path("file");
    for version in [0, 2, 999] {
        let mut records = Records::read(&host.path("good"));
        records.set_version(version);
        records.write(&path);
        refuse(&host, &host.file("file"), 1, &["version", &version.to_string()]);
    }
    // Of a part: the version is in the payload, after the name of the part and its number.
    let mut records = Records::read(&host.path("good"));
    let state = records.payload(Records::STATE);
    assert_eq!(state[..7], *b"\x04vcpu\0\x01");
    state[6] = 9;
    records.write(&path);
    let end = host.cli(&["restore", &host.file("file")]);
    end.refused(1, &["vcpu", "version 9"]);
    let mut records = Records::read(&host.path("good"));
    records.payload(Records::CONFIG)[0] = 7;
    records.write(&path);
    let end = host.cli(&["restore", &host.file("file")]);
    end.refused(1, &["config", "version 7"]);
}

fn a_file_with_parts_missing_is_refused() {
    let host = Host::new();
    save(&host);
    for (record, words) in [
        (Records::MACHINE, &["cannot be restored", "machine must follow"][..]),
        (Records::CONFIG, &["cannot be restored", "config must follow"]),
        (Records::STATE, &["vcpu 0"]),
    ] {
        let mut records = Records::read(&host.path("good"));
        records.remove(record);
        records.write(&host.path("file"));
        let end = host.cli(&["restore", &host.file("file")]);
        end.refused(1, words);
        assert_eq!(end.stdout, "", "no guest ran: {end:#?}");
    }
    // A state that is there, and shorter than it says.
    let mut records = Records::read(&host.path("good"));
    let state = records.payload(Records::STATE);
    state.truncate(state.len() - 100);
    records.write(&host.path("file"));
    refuse(&host, &host.file("file"), 1, &["state"]);
    // Unchanged it is good: what was refused was not the way it was written.
    Records::read(&host.path("good")).write(&host.path("file"));
    assert!(fs::read(host.path("good")).unwrap() == fs::read(host.path("file")).unwrap());
}

fn a_file_of_another_cpu_is_refused() {
    let host = Host::new();
    save(&host);
    type Change = fn(&mut IdentityV1);
    let changes: [(&str, Change, &[&str]); 4] = [
        (
            "features that no CPU has all of",
            |identity| {
                for entry in identity.cpuid.iter_mut().flatten() {
                    if (entry.function, entry.index) == (7, 0) {
                        entry.ebx = u32::MAX;
                    }
                }
            },
            &["this cpu lacks", "leaf 7.0 ebx bit", "--cpu"],
        ),
        (
            "another vendor",
            |identity| {
                for entry in identity.cpuid.iter_mut().flatten() {
                    if entry.function == 0 {
                        entry.ebx = u32::from_le_bytes(*b"Cyri");
                        entry.edx = u32::from_le_bytes(*b"xIns");
                        entry.ecx = u32::from_le_bytes(*b"tead");
                    }
                }
            },
            &["cpu vendor", "cyrixinstead"],
        ),
        (
            "another number of vCPUs",
            |identity| drop(identity.cpuid.pop()),
            &["cpuid for 1 vcpus", "configuration 2"],
        ),
        ("no CPUID at all", |identity| identity.cpuid.clear(), &["cpuid for 0 vcpus"]),
    ];
    for (what, change, words) in changes {
        let mut records = Records::read(&host.path("good"));
        records.change_identity(change);
        records.write(&host.path("file"));
        let end = host.cli(&["restore", &host.file("file")]);
        end.refused(1, &[&["this host cannot run the saved machine"], words].concat());
        println!("{what}: {}", end.stderr.trim());
    }
    // The identity that was not changed still fits: the way of changing it is not what is seen.
    let mut records = Records::read(&host.path("good"));
    records.change_identity(|_| {});
    records.write(&host.path("file"));
    assert!(fs::read(host.path("good")).unwrap() == fs::read(host.path("file")).unwrap());
}
