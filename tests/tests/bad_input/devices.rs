//! Disks, network cards and the like that no VM can have, or not now.

use std::fs::{self, File};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::process::Command;

use rustix::fs::{fcntl_lock, FlockOperation};
use tests::{add, binary, finish, network_namespaces, root, Finished, Host, Need, Suite, Vm};

pub fn add(suite: &mut Suite, kvm: &Need) {
    add!(suite, &[];
        settings_of_devices_that_are_wrong,
        what_only_one_device_can_have,
        config_files_with_wrong_devices,
    );
    add!(suite, &[kvm];
        disks_that_are_none,
        a_disk_that_a_vm_has,
        a_disk_that_something_else_has,
        readers_share_a_disk,
        one_file_as_two_disks,
        commands_for_devices_that_are_not_there,
        sizes_that_a_balloon_cannot_have,
    );
    add!(suite, &[&root(), kvm]; a_disk_that_may_not_be_written);
    add!(suite, &[&root(), &network_namespaces(), kvm];
        taps_that_are_none,
        a_tap_that_is_busy,
        a_tap_that_is_not_permitted,
    );
}

/// Tries to run a VM with `args`.
fn run(host: &Host, args: &[&str]) -> Finished {
    host.cli(&[&["run", "--memory", "64M"], args].concat())
}

fn disk(id: &str, path: &str, more: &str) -> String {
    format!("id={id},path={path}{more}")
}

/// Makes a disk of 1 MiB; gives its path.
fn image(host: &Host, name: &str) -> String {
    File::create(host.path(name)).unwrap().set_len(1 << 20).unwrap();
    host.file(name)
}

/// A VM that waits and has these devices.
fn standing(host: &Host, name: &str, args: &[&str]) -> Vm {
    let vm = host.run("", &[&["--name", name, "--paused"], args].concat());
    host.wait_for_api(name, &vm);
    vm
}

fn disks_that_are_none() {
    let host = Host::new();
    let missing = host.file("disk");
    for more in ["", ",readonly"] {
        let end = run(&host, &["--disk", &disk("root", &missing, more)]);
        end.refused(2, &["disk", &missing, "no such file", "truncate"]);
    }
    let directory = host.root().to_str().unwrap();
    for path in [directory, "/dev/null", "/dev/zero"] {
        let end = run(&host, &["--disk", &disk("root", path, "")]);
        end.refused(2, &[path, "not a disk", "block device"]);
    }
    for size in [0, 1, 511, 513, 1_000_001] {
        let path = host.file("disk");
        File::create(&path).unwrap().set_len(size).unwrap();
        let end = run(&host, &["--disk", &disk("root", &path, "")]);
        end.refused(2, &[&path, &format!("{size} bytes"), "multiple of 512", "truncate"]);
    }
    // The second disk is looked at as well, and nothing stays behind.
    let good = disk("good", &image(&host, "good"), "");
    let bad = disk("bad", "/no/such/disk", "");
    run(&host, &["--disk", &good, "--disk", &bad]).refused(2, &["/no/such/disk"]);
    assert_eq!(host.json(&["list"]), serde_json::json!([]));
}

fn a_disk_that_may_not_be_written() {
    let host = Host::new();
    let path = image(&host, "disk");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    // Root may write to anything, unless that power is taken away.
    let limited = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-dac_override", "--bounding-set=-dac_override"]);
        command.arg(binary()).args(args);
        host.environment(&mut command);
        command
    };
    let arg = disk("root", &path, "");
    let end = finish(limited(&["run", "--memory", "64M", "--disk", &arg]), b"");
    end.refused(2, &[&path, "permission denied", "to write", "`readonly`"]);
    let arg = disk("root", &path, ",readonly");
    let args = ["run", "--memory", "64M", "--name", "vm", "--console", "stdio", "--disk", &arg];
    let mut vm = Vm::start(limited(&args)).ready();
    vm.verify();
}

fn a_disk_that_a_vm_has() {
    let host = Host::new();
    let path = image(&host, "disk");
    symlink(&path, host.path("symlink")).unwrap();
    fs::hard_link(&path, host.path("hardlink")).unwrap();
    let vm = standing(&host, "first", &["--disk", &disk("root", &path, "")]);
    let pid = vm.pid().to_string();
    for name in ["disk", "symlink", "hardlink"] {
        let other = host.file(name);
        for more in ["", ",readonly"] {
            let end = run(&host, &["--disk", &disk("data", &other, more)]);
            end.refused(5, &[&other, "in use", "vm first", &pid, "readonly"]);
        }
    }
    // With the VM goes its lock, however it ends.
    vm.kill_9();
    standing(&host, "second", &["--disk", &disk("root", &path, "")]);
}

fn a_disk_that_something_else_has() {
    let host = Host::new();
    let path = image(&host, "disk");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    for more in ["", ",readonly"] {
        let end = run(&host, &["--disk", &disk("root", &path, more)]);
        end.refused(5, &[&path, "locked by another program", "stop that one"]);
    }
    drop(file);
    standing(&host, "vm", &["--disk", &disk("root", &path, "")]);
}

fn readers_share_a_disk() {
    let host = Host::new();
    let path = image(&host, "disk");
    let readonly = disk("root", &path, ",readonly");
    let _first = standing(&host, "first", &["--disk", &readonly]);
    let _second = standing(&host, "second", &["--disk", &readonly]);
    let end = run(&host, &["--disk", &disk("root", &path, "")]);
    end.refused(5, &[&path, "in use", "readonly"]);
    assert_eq!(host.json(&["info", "first"])["config"]["disks"][0]["readonly"], true);
}

fn one_file_as_two_disks() {
    let host = Host::new();
    let path = image(&host, "disk");
    symlink(&path, host.path("symlink")).unwrap();
    fs::hard_link(&path, host.path("hardlink")).unwrap();
    let two = |name: &str, first: &str, second: &str| {
        [disk("a", &path, first), disk("b", &host.file(name), second)]
    };
    for name in ["symlink", "hardlink"] {
        for (first, second) in [("", ""), (",readonly", ""), ("", ",readonly")] {
            let [a, b] = two(name, first, second);
            let end = run(&host, &["--disk", &a, "--disk", &b]);
            end.refused(2, &["disks a and b", "same file", &host.file(name), "readonly"]);
        }
        let [a, b] = two(name, ",readonly", ",readonly");
        standing(&host, name, &["--disk", &a, "--disk", &b]);
    }
}

fn settings_of_devices_that_are_wrong() {
    let host = Host::new();
    let long = "x".repeat(65);
    for (flag, value, words) in [
        ("--disk", "", &["--disk"][..]),
        ("--disk", "/disk.img", &["/disk.img"]),
        ("--disk", "id=root", &["no path", "path=VALUE"]),
        ("--disk", "path=/d", &["no id", "id=VALUE"]),
        ("--disk", "id,path=/d", &["no id"]),
        ("--disk", "id=,path=/d", &["id"]),
        ("--disk", "id=root,path=", &["empty path"]),
        ("--disk", "id=a b,path=/d", &["a b", "[A-Za-z0-9._-]"]),
        ("--disk", &format!("id={long},path=/d"), &[&long]),
        ("--disk", "id=a,path=/d,id=b", &["id twice"]),
        ("--disk", "id=a,path=/d,readonly=maybe", &["readonly=maybe"]),
        ("--disk", "id=a,path=/d,cache=none", &["none", "writeback, writethrough or unsafe"]),
        ("--disk", "id=a,path=/d,format=qcow2", &["format", "readonly and cache"]),
        ("--disk", "id=a,path=/d,", &["--disk"]),
        ("--net", "id=eth0", &["plugged into one thing", "tap=TAP"]),
        ("--net", "tap=tap0", &["no id"]),
        ("--net", "id=eth0,tap=", &["tap"]),
        ("--net", "id=eth0,tap=0123456789abcdef", &["0123456789abcdef", "at most 15"]),
        ("--net", "id=eth0,tap=a/b", &["a/b"]),
        ("--net", "id=eth0,tap=t,mac=52:54", &["52:54", "six bytes"]),
        ("--net", "id=eth0,tap=t,mac=01:00:5e:00:00:01", &["single card", "even"]),
        ("--net", "id=eth0,tap=t,mac=00:00:00:00:00:00", &["single card"]),
        ("--net", "id=eth0,tap=t,mtu=67", &["67", "68 to 65535"]),
        ("--net", "id=eth0,tap=t,mtu=65536", &["65536"]),
        ("--net", "id=eth0,tap=t,queues=2", &["queues", "mac and mtu"]),
        ("--balloon", "size=4G", &["size", "deflate-on-oom"]),
        ("--balloon", "deflate-on-oom=maybe", &["maybe"]),
    ] {
        // A value of its own, even if it is empty.
        let end = host.cli(&["run", &format!("{flag}={value}")]);
        end.refused(2, words);
    }
    let disks: Vec<String> = (0..17).map(|n| format!("--disk=id=d{n},path=/d{n}")).collect();
    let mut args = vec!["run"];
    args.extend(disks.iter().map(String::as_str));
    host.cli(&args).refused(2, &["17 virtio devices", "at most 16"]);
    assert!(host.files().is_empty());
}

fn what_only_one_device_can_have() {
    let host = Host::new();
    let mac = "mac=52:54:00:00:00:01";
    for (args, words) in [
        (["--disk=id=a,path=/x", "--disk=id=a,path=/y"], &["id a", "two devices"][..]),
        (["--disk=id=a,path=/x", "--net=id=a,tap=t"], &["id a", "two devices"]),
        (["--net=id=a,tap=t", "--net=id=a,tap=u"], &["id a", "two devices"]),
        (["--disk=id=a,path=/x", "--disk=id=b,path=/x"], &["disk /x", "two devices"]),
        (["--net=id=a,tap=t", "--net=id=b,tap=t"], &["tap t", "two devices"]),
        (
            [&format!("--net=id=a,tap=t,{mac}"), &format!("--net=id=b,tap=u,{mac}")],
            &["MAC address 52:54:00:00:00:01", "two devices"],
        ),
    ] {
        host.cli(&["run", args[0], args[1]]).refused(2, words);
    }
}

fn config_files_with_wrong_devices() {
    let host = Host::new();
    for (text, words) in [
        ("[[disk]]\nid = \"a\"\n", &["vm.toml:1:", "path"][..]),
        ("[[disk]]\npath = \"/d\"\n", &["vm.toml:1:", "id"]),
        ("[[disk]]\nid = \"a/b\"\npath = \"/d\"\n", &["vm.toml:2:6", "a/b"]),
        ("[[disk]]\nid = \"a\"\npath = \"/d\"\nread-only = true\n", &["vm.toml:4:1", "readonly"]),
        ("[[disk]]\nid = \"a\"\npath = \"/d\"\ncache = \"none\"\n", &["vm.toml:4:", "writeback"]),
        ("[disk]\nid = \"a\"\npath = \"/d\"\n", &["vm.toml:1:", "disk"]),
        ("[[net]]\nid = \"a\"\n", &["vm.toml", "network card a", "tap=TAP"]),
        ("[[net]]\nid = \"a\"\ntap = \"t\"\nmtu = 5\n", &["vm.toml:4:7", "68 to 65535"]),
        ("[[net]]\nid = \"a\"\ntap = \"t\"\nmac = \"x\"\n", &["vm.toml:4:7", "six bytes"]),
        ("[balloon]\nsize = 5\n", &["vm.toml:2:1", "size", "deflate-on-oom"]),
        ("rng = \"yes\"\n", &["vm.toml:1:7", "rng"]),
    ] {
        let path = host.write("vm.toml", text);
        host.cli(&["run", "--config", &path]).refused(2, words);
    }
    let twice = "[[disk]]\nid = \"a\"\npath = \"/x\"\n[[disk]]\nid = \"a\"\npath = \"/y\"\n";
    let path = host.write("vm.toml", twice);
    host.cli(&["run", "--config", &path]).refused(2, &["id a", "two devices"]);
}

fn commands_for_devices_that_are_not_there() {
    let host = Host::new();
    let _vm = standing(&host, "vm", &["--disk", &disk("root", &image(&host, "disk"), "")]);
    host.cli(&["balloon", "vm", "16M"]).refused(5, &["no balloon", "--balloon"]);
    host.cli(&["link", "vm", "eth0", "down"]).refused(5, &["no network card eth0", "none"]);
    // A disk has no cable.
    host.cli(&["link", "vm", "root", "down"]).refused(5, &["no network card root"]);
    host.cli(&["link", "vm", "eth0", "sideways"]).refused(2, &["sideways", "up, down"]);
    host.cli(&["balloon", "vm", "lots"]).refused(2, &["\"lots\" is not a size"]);
    host.cli(&["balloon", "nobody", "16M"]).refused(4, &["nobody"]);
    host.cli(&["link", "nobody", "eth0", "up"]).refused(4, &["nobody"]);
}

fn sizes_that_a_balloon_cannot_have() {
    let host = Host::new();
    let _vm = standing(&host, "vm", &["--balloon"]);
    for size in ["4095", "4097", "1", "65M", "16T", "18446744073709547520"] {
        let words = ["whole pages of 4 KiB", "67108864 bytes of memory"];
        host.cli(&["balloon", "vm", size]).refused(2, &words);
    }
    let target = || {
        let devices = host.json(&["stats", "vm"])["devices"].clone();
        devices[0]["counters"]["target_pages"].as_u64().unwrap()
    };
    assert_eq!(target(), 0, "nothing of it was used");
    for (size, pages) in [("64M", 16384), ("4096", 1), ("0", 0)] {
        host.ok(&["balloon", "vm", size]);
        assert_eq!(target(), pages);
    }
}

/// The program with `args`, in a network namespace of its own, after `script`.
fn beside(host: &Host, script: &str, args: &[&str]) -> Command {
    let mut unshare = Command::new("unshare");
    unshare.args(["-n", "--", "sh", "-ec", &format!("{script}; exec \"$@\""), "sh"]);
    unshare.arg(binary()).args(["run", "--memory", "64M"]).args(args);
    host.environment(&mut unshare);
    unshare
}

fn taps_that_are_none() {
    let host = Host::new();
    let card = ["--net", "id=eth0,tap=tap0"];
    let end = finish(beside(&host, "true", &card), b"");
    end.refused(2, &["no tap interface tap0", "ip tuntap add dev tap0 mode tap"]);
    for script in [
        "ip link add tap0 type bridge",
        "ip tuntap add dev tap0 mode tun",
        "ip tuntap add dev tap0 mode tap multi_queue",
    ] {
        let end = finish(beside(&host, script, &card), b"");
        end.refused(2, &["interface tap0 is not a tap", "ip tuntap add"]);
    }
    let end = finish(beside(&host, "true", &["--net", "id=eth0,tap=lo"]), b"");
    end.refused(2, &["interface lo is not a tap"]);
}

fn a_tap_that_is_busy() {
    let host = Host::new();
    // The first VM in the background, without a hand on the pipes of the second.
    let script = "ip tuntap add dev tap0 mode tap; \
                  \"$1\" run --memory 64M --name first --paused --console socket \
                  --net id=eth0,tap=tap0 </dev/null >/dev/null 2>&1 & \
                  until \"$1\" info first >/dev/null 2>&1; do kill -0 $!; done";
    let end = finish(beside(&host, script, &["--net", "id=eth0,tap=tap0"]), b"");
    host.ok(&["kill", "first"]);
    end.refused(5, &["tap tap0 is in use", "a tap of its own"]);
}

fn a_tap_that_is_not_permitted() {
    let host = Host::new();
    // Root without its powers over networks, and a tap that belongs to another user.
    let limited = "ip tuntap add dev tap0 mode tap user 65534; \
                   exec setpriv --inh-caps=-net_admin --bounding-set=-net_admin \"$@\"";
    let end = finish(beside(&host, limited, &["--net", "id=eth0,tap=tap0"]), b"");
    end.refused(2, &["no permission", "tap0", "user $user"]);
}
