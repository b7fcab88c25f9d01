//! Save and restore of a guest that works on all its devices.

use std::thread;
use std::time::{Duration, Instant};

use tests::lab::{ext4, image, Linux};
use tests::Host;

use crate::boot::{in_balloon, random_numbers};
use crate::disk::check_ext4;
use crate::guest::{boot, counter, device_healthy, healthy, measured, until};
use crate::network::{ping, Stream, Tap, GUEST};

/// What the guest's clocks say: the counter lies between two readings of the uptime.
struct Clocks {
    before: f64,
    cycles: u64,
    after: f64,
}

fn clocks(guest: &mut Linux) -> Clocks {
    let text = guest.sh("clocks");
    let mut words = text.split_whitespace();
    let mut word = || words.next().unwrap_or_else(|| panic!("clocks: {text:?}"));
    let (before, cycles, after) = (word(), word(), word());
    Clocks {
        before: before.parse().unwrap(),
        cycles: cycles.parse().unwrap(),
        after: after.parse().unwrap(),
    }
}

/// Two vCPUs copy files on a disk, stream over TCP and count while they are saved; the VM is away for
/// a while.
pub fn save_and_restore() {
    /// How long the VM does not exist: time that its clocks must not contain.
    const AWAY: Duration = Duration::from_secs(5);
    /// Of /proc/uptime, seconds, twice.
    const RESOLUTION: f64 = 0.02;
    /// Between the TSC's frequency as it was measured and as it is.
    const RATE: f64 = 0.001;

    let host = Host::new();
    let file = host.file("saved.vm");
    let disk = ext4(&host, "disk.img");
    let _tap = Tap::new("smoke1");
    let disk_flag = format!("id=data,path={disk}");
    let flags = ["--cpus", "2", "--disk", &disk_flag, "--net", "id=lan,tap=smoke1"];
    let flags = [&flags[..], &["--rng", "--balloon"]].concat();
    let modules = ",virtio_mmio,virtio_blk,virtio_net,virtio-rng,virtio_balloon,ext4";
    let cmdline = format!("disk=vda {GUEST}");
    let mut guest = boot(&host, &image("vmlinux"), &flags, modules, &cmdline);
    let mhz = guest.sh("dmesg | sed -n 's/.*tsc: Detected \\([0-9.]*\\) MHz.*/\\1/p'");
    let hertz = mhz.parse::<f64>().unwrap() * 1e6;
    host.ok(&["balloon", "vm", "32M"]);
    guest.sh("copy 1 /mnt & dirty 2 & after copies 0 && after dirtied 0");
    let stream = Stream::start(&mut guest);
    stream.goes_on();
    until("a full balloon", || (in_balloon(&host) == 32 << 20).then_some(()));
    let begin = Instant::now();
    let old = clocks(&mut guest);
    let counters = ["tick", "copies", "dirtied"];
    let counted_before = counters.map(|name| guest.number(&format!("count {name}")));
    let wall = guest.number("date +%s");
    host.ok(&["save", "vm", &file, "--stop"]);
    guest.ends_well();

    // Not to wait for something: the passing of time is what is tested.
    thread::sleep(AWAY);

    let command = host.command(&["restore", &file, "--console", "stdio"]);
    let mut guest = Linux::start(command);
    let new = clocks(&mut guest);
    let lived = (begin.elapsed() - AWAY).as_secs_f64();

    // Uptime went on, without the time away.
    assert!(new.before >= old.after, "uptime {} after {}", new.before, old.after);
    assert!(
        new.after - old.before <= lived + RESOLUTION,
        "{} s in {lived} s",
        new.after - old.before
    );
    assert!(guest.number("date +%s") >= wall);
    // So did the TSC, in step.
    assert!(new.cycles > old.cycles, "TSC {} after {}", new.cycles, old.cycles);
    let counted = (new.cycles - old.cycles) as f64 / hertz;
    let (least, most) = (new.before - old.after, new.after - old.before);
    let range = least * (1. - RATE) - RESOLUTION..=most * (1. + RATE) + RESOLUTION;
    assert!(range.contains(&counted), "TSC counted {counted} s, the clock {least}..{most} s");
    measured("seconds of guest time across the restore", most);
    measured("seconds that the TSC counted", counted);

    // Work goes on, and nothing of it is wrong.
    let begin = Instant::now();
    stream.goes_on();
    measured("seconds until more came by TCP", begin.elapsed().as_secs_f64());
    for (name, before) in counters.iter().zip(counted_before) {
        guest.sh(&format!("after {name} {}", before + 1));
        measured(&format!("seconds until more of {name}"), begin.elapsed().as_secs_f64());
    }
    let errors = guest.sh("cat /run/copy-errors /run/dirty-errors 2>/dev/null; true");
    assert_eq!(errors, "");
    assert!(ping(&mut guest, 3), "{}", guest.sh("cat /tmp/ping"));
    random_numbers(&mut guest);
    assert_eq!(in_balloon(&host), 32 << 20);
    host.ok(&["balloon", "vm", "0"]);
    until("an empty balloon", || (in_balloon(&host) == 0).then_some(()));
    assert_eq!(guest.number("nproc"), 2);
    for id in ["data", "lan", "rng", "balloon"] {
        device_healthy(&host, id);
    }
    assert_eq!(counter(&host, "data", "errors"), 0);
    healthy(&mut guest);
    guest.send("poweroff -f");
    guest.ends_well();
    check_ext4(&disk);
}
