//! Hosts, images and settings that no VM can be made of.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tests::{add, binary, finish, namespaces, root, Finished, Host, Suite};

pub fn add(suite: &mut Suite, kvm: &Result<(), String>) {
    add!(suite, &[&root(), &namespaces()]; kvm_that_is_missing, kvm_that_is_no_kvm);
    add!(suite, &[&root(), kvm]; kvm_that_is_not_permitted);
    add!(suite, &[kvm];
        kernel_that_is_missing,
        kernel_that_is_none,
        kernel_that_is_truncated,
        kernel_that_is_too_big,
        initrd_that_is_missing,
        initrd_that_is_too_big,
        runtime_dir_that_is_too_long,
        pidfile_that_cannot_be_written,
        console_file_that_cannot_be_written,
    );
    add!(suite, &[];
        memory_that_is_not_possible,
        vcpus_that_are_not_possible,
        flags_that_contradict,
        config_files_that_are_wrong,
    );
}

/// Runs the program in a mount namespace of its own, after `script`.
fn behind(host: &Host, script: &str, args: &[&str]) -> Finished {
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "--", "sh", "-ec", &format!("{script}; exec \"$@\""), "sh"]);
    unshare.arg(binary()).args(args);
    host.environment(&mut unshare);
    finish(unshare, b"")
}

fn kvm_that_is_missing() {
    let host = Host::new();
    let end = behind(&host, "mount -t tmpfs tmpfs /dev", &["run"]);
    end.refused(1, &["/dev/kvm does not exist", "modprobe", "firmware"]);
}

fn kvm_that_is_no_kvm() {
    let host = Host::new();
    let end = behind(&host, "mount --bind /dev/null /dev/kvm", &["run"]);
    end.refused(1, &["kvm"]);
}

fn kvm_that_is_not_permitted() {
    let host = Host::new();
    // Where that user may run it.
    let program = host.path("minivmm");
    fs::copy(binary(), &program).unwrap();
    for dir in [host.root(), program.parent().unwrap()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(&program).arg("run");
    command.env_remove("XDG_RUNTIME_DIR");
    let device = File::open("/dev/kvm").unwrap().metadata().unwrap();
    let end = finish(command, b"");
    if device.permissions().mode() & 0o006 == 0 {
        end.refused(1, &["/dev/kvm", "permission denied", "group"]);
    }
}

fn run(host: &Host, args: &[&str]) -> Finished {
    host.cli(&[&["run", "--memory", "64M"], args].concat())
}

fn kernel_that_is_missing() {
    let host = Host::new();
    let path = host.file("kernel");
    run(&host, &["--kernel", &path]).refused(2, &["kernel", &path, "no such file"]);
    let directory = host.root().to_str().unwrap();
    run(&host, &["--kernel", directory]).refused(2, &["kernel", directory, "not a regular file"]);
    assert!(host.files().is_empty());
}

fn kernel_that_is_none() {
    let host = Host::new();
    let not_elf = |at: usize, value: u8| {
        let mut image = guest_images::BEACON.to_vec();
        image[at] = value;
        image
    };
    for (what, contents, words) in [
        ("empty", vec![], &["not a kernel image", "vmlinux", "bzimage"][..]),
        ("text", b"#!/bin/sh\necho hello\n".repeat(1000), &["not a kernel image"]),
        ("zeros", vec![0; 1 << 20], &["not a kernel image"]),
        ("32 bits", not_elf(4, 1), &["not an x86-64"]),
        ("another machine", not_elf(18, 183), &["not an x86-64"]),
        ("no segments", not_elf(56, 0), &["program headers"]),
    ] {
        let path = host.write("kernel", contents);
        let end = run(&host, &["--kernel", &path]);
        end.refused(2, &[&[path.as_str()], words].concat());
        println!("{what}: {}", end.stderr.trim());
    }
}

/// Where the last byte that is loaded ends: what comes after it nobody misses.
fn end_of_segments(elf: &[u8]) -> usize {
    let number = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let headers = (64..).step_by(56).take(usize::from(elf[56]));
    let ends = headers.filter(|at| elf[*at] == 1).map(|at| number(at + 8) + number(at + 32));
    usize::try_from(ends.max().unwrap()).unwrap()
}

fn kernel_that_is_truncated() {
    let host = Host::new();
    let loaded = end_of_segments(guest_images::BEACON);
    for length in [5, 63, 64, 100, 4096, loaded / 2, loaded - 1] {
        let path = host.write("kernel", &guest_images::BEACON[..length]);
        let end = run(&host, &["--kernel", &path]);
        end.refused(2, &[&path, "truncated", &length.to_string()]);
    }
    // A bzImage that has nothing but its first sectors.
    let mut image = vec![0; 1024];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020F_u16.to_le_bytes());
    image[0x236] = 1; // XLF_KERNEL_64
    image[0x1F1] = 4;
    image[0x1F4..0x1F8].copy_from_slice(&100_000_u32.to_le_bytes());
    let path = host.write("kernel", image);
    run(&host, &["--kernel", &path]).refused(2, &[&path, "truncated"]);
}

fn kernel_that_is_too_big() {
    let host = Host::new();
    // Its first segment that is loaded gets a size in memory of 1 GiB and of nearly 2^64.
    let header = |at: usize| 64 + 56 * at;
    let segment = (0..8)
        .find(|at| guest_images::BEACON[header(*at)..header(*at) + 4] == [1, 0, 0, 0])
        .unwrap();
    for size in [1_u64 << 30, u64::MAX - 5] {
        let mut image = guest_images::BEACON.to_vec();
        let at = header(segment) + 40;
        image[at..at + 8].copy_from_slice(&size.to_le_bytes());
        let path = host.write("kernel", image);
        run(&host, &["--kernel", &path]).refused(2, &[&path, "too big", "more memory"]);
    }
}

fn initrd_that_is_missing() {
    let host = Host::new();
    let (kernel, initrd) = (host.write("kernel", guest_images::BEACON), host.file("initrd"));
    let end = run(&host, &["--kernel", &kernel, "--initrd", &initrd]);
    end.refused(2, &["initrd", &initrd, "no such file"]);
}

fn initrd_that_is_too_big() {
    let host = Host::new();
    let (kernel, initrd) = (host.write("kernel", guest_images::BEACON), host.file("initrd"));
    // Too big for the memory, for all memory below 3 GiB, and for any memory: nothing is read.
    for size in [64 << 20, 5 << 30, 1 << 42] {
        File::create(&initrd).unwrap().set_len(size).unwrap();
        let end = run(&host, &["--kernel", &kernel, "--initrd", &initrd]);
        end.refused(2, &["initrd", &initrd, "too big", "more memory", &size.to_string()]);
    }
}

fn runtime_dir_that_is_too_long() {
    let host = Host::new();
    let long = host.path(&"long".repeat(25));
    fs::create_dir(&long).unwrap();
    let mut command = host.command(&["run", "--name", "vm"]);
    command.env("MINIVMM_RUNTIME_DIR", &long);
    let length = (long.to_str().unwrap().len() + "/vm.sock".len()).to_string();
    let words = ["socket", &length, "107", "--name", "MINIVMM_RUNTIME_DIR"];
    finish(command, b"").refused(2, &words);
    assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
}

fn pidfile_that_cannot_be_written() {
    let host = Host::new();
    let path = host.file("no/such/directory");
    run(&host, &["--console", "socket", "--pidfile", &path]).refused(1, &["pidfile", &path]);
    // Nothing stays behind.
    assert_eq!(host.json(&["list"]), serde_json::json!([]));
}

fn console_file_that_cannot_be_written() {
    let host = Host::new();
    let path = host.file("no/such/directory");
    run(&host, &["--console", &format!("file:{path}")]).refused(1, &["console", &path]);
}

fn memory_that_is_not_possible() {
    let host = Host::new();
    for (size, words) in [
        ("0", &["0", "too small", "at least 16 MiB"][..]),
        ("15M", &["too small", "at least 16 MiB"]),
        ("67108865", &["67108865", "multiple of 4 KiB", "67112960"]),
        ("1048576G", &["more than this host has", "use at most"]),
        ("99999999999999999999", &["2^64"]),
        ("-1", &["-1"]),
        ("lots", &["\"lots\" is not a size", "512M"]),
        ("", &["is not a size"]),
        ("1.5G", &["is not a size"]),
    ] {
        let end = host.cli(&["run", &format!("--memory={size}")]);
        end.refused(2, words);
    }
    let end = host.cli(&["run", "--hugepages", "--memory", "17M"]);
    end.refused(2, &["multiple of 2 MiB", "18 MiB", "--hugepages"]);
    let end = host.cli(&["run", "--hugepages", "1G", "--memory", "1G"]);
    end.refused(2, &["huge pages of 1 GiB", "post-copy", "2 MiB"]);
    let end = host.cli(&["run", "--hugepages=some"]);
    end.refused(2, &["\"some\"", "--hugepages=2M"]);
}

fn vcpus_that_are_not_possible() {
    let host = Host::new();
    for count in ["0", "65", "256", "1000000", "-1", "two", "1.5"] {
        let end = host.cli(&["run", &format!("--cpus={count}")]);
        end.refused(2, &[count, "1 to 64"]);
    }
    for model in ["486", "x86-64-v9", "host,avx", "host,+nonsense"] {
        let end = host.cli(&["run", "--cpu", model]);
        end.refused(2, &["cpu"]);
    }
}

fn flags_that_contradict() {
    let host = Host::new();
    let (file, initrd) = (host.file("file"), host.write("initrd", "x"));
    let console = format!("file:{file}");
    let log = format!("info:{file}");
    for (args, words) in [
        (&["--initrd", &initrd][..], &["--initrd", "--kernel"][..]),
        (&["--console", &console, "--pidfile", &file], &["console", "pidfile", &file]),
        (&["--console", &console, "--log", &log], &["console", "log", &file]),
        (&["--pidfile", &file, "--log", &log], &["pidfile", "log", &file]),
        (&["--name", "a", "--name", "b"], &["--name"]),
        (&["--name", "a/b"], &["a/b", "[A-Za-z0-9._-]"]),
        (&["--name", "../x"], &["../x"]),
        (&["--name", ""], &["empty"]),
        (&["--console", "tty"], &["stdio, pty, socket"]),
        (&["--on-reboot", "explode"], &["restart", "exit"]),
        (&["--log", "loud"], &["loud", "warn"]),
        (&["--frobnicate"], &["--frobnicate"]),
    ] {
        host.cli(&[&["run"], args].concat()).refused(2, words);
    }
    let end = host.cli(&["restore", &file, "--console", &console]);
    end.refused(2, &["saved VM", "console", &file]);
    assert_eq!(host.files(), ["initrd"], "nothing was made");
}

fn config_files_that_are_wrong() {
    let host = Host::new();
    for (text, words) in [
        ("cpus = 2\nmemroy = \"1G\"\n", &["vm.toml:2:1", "memroy", "memory"][..]),
        ("cpus = 2\n\ncpus = 3\n", &["vm.toml:3:1", "duplicate"]),
        ("cpus = 99\n", &["vm.toml:1:8", "cpus", "1 to 64"]),
        ("cpus = \"two\"\n", &["vm.toml:1:8", "cpus"]),
        ("\n[memory]\nsize = \"lots\"\n", &["vm.toml:3:8", "memory.size", "lots", "512M"]),
        ("[memory]\nhugepages = 1\n", &["vm.toml:2:13", "memory.hugepages"]),
        ("name = \"web\n", &["vm.toml:1:"]),
        ("= 5\n", &["vm.toml:1:1"]),
        ("console = \"tty\"\n", &["vm.toml:1:11", "console", "stdio"]),
    ] {
        let path = host.write("vm.toml", text);
        host.cli(&["run", "--config", &path]).refused(2, words);
    }
    let path = host.write("vm.toml", b"cpus = 2\n# \xFF\xFE\n");
    host.cli(&["run", "--config", &path]).refused(2, &["vm.toml:2:3", "utf-8"]);
    let path = host.write("vm.toml", "#".repeat(2 << 20));
    host.cli(&["run", "--config", &path]).refused(2, &["vm.toml", "1048576 bytes"]);
    let path = host.file("missing.toml");
    host.cli(&["run", "--config", &path]).refused(2, &[&path, "no such file"]);
}
