//! Live migration of a guest that works on all its devices.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tests::lab::{ext4, image, Linux};
use tests::{number, Host};

use crate::boot::{in_balloon, random_numbers};
use crate::disk::check_ext4;
use crate::guest::{boot, check, counter, device_healthy, measured, until, LOADER_BOOT_PARAMS};
use crate::network::{ping, Stream, Switch, GUEST};

/// Ports of the switch that the VM moves between.
const TAPS: [&str; 2] = ["smoke2", "smoke3"];
/// What the guest counts, by name.
const COUNTERS: [&str; 4] = ["tick", "copies", "dirtied", "beats"];
/// Between two ticks the guest sleeps that long.
const TICK: Duration = Duration::from_millis(200);

/// Two vCPUs copy files on a disk, stream over TCP, write memory and count while they are migrated:
/// live there, live back over more connections, there again standing, and back and there with memory that follows.
pub fn there_and_back() {
    let host = Host::new();
    let disk = ext4(&host, "disk.img");
    let _switch = Switch::new("smoke-br", &TAPS);
    let disk_flag = format!("id=data,path={disk}");
    let flags = ["--cpus", "2", "--disk", &disk_flag, "--net", "id=lan,tap=smoke2"];
    let flags = [&flags[..], &["--rng", "--balloon"]].concat();
    let modules = ",virtio_mmio,virtio_blk,virtio_net,virtio-rng,virtio_balloon,ext4";
    let cmdline = format!("disk=vda {GUEST}");
    // The kernel travels along: a small one.
    let mut guest = boot(&host, &image("vmlinuz"), &flags, modules, &cmdline);
    check(&mut guest, 2, LOADER_BOOT_PARAMS);
    host.ok(&["balloon", "vm", "32M"]);
    guest.sh("irqs() { awk \"/^ *$1:/ { print \\$(2 + $2) }\" /proc/interrupts; }");
    guest.sh("copy 1 /mnt & dirty 1 & beat 2 & after copies 0 && after dirtied 0 && after beats 0");
    let stream = Stream::start(&mut guest);
    stream.goes_on();
    until("a full balloon", || (in_balloon(&host) == 32 << 20).then_some(()));

    let mut moving = Moving { host, guest, moves: 0 };
    for args in [
        &["--downtime", "300ms", "--verify"][..],
        &["--downtime", "300ms", "--connections", "4"],
        &["--mode", "cold"],
        &["--mode", "postcopy"],
        &["--mode", "hybrid", "--downtime", "1ms"],
    ] {
        moving.migrate(args);
        stream.goes_on();
        moving.works();
    }
    let Moving { host, mut guest, .. } = moving;
    let gap = guest.number("count beat-gap");
    measured("milliseconds between two beats of the guest, at most", gap as f64);
    random_numbers(&mut guest);
    host.ok(&["balloon", "vm", "0"]);
    until("an empty balloon", || (in_balloon(&host) == 0).then_some(()));
    for id in ["data", "lan", "rng", "balloon"] {
        device_healthy(&host, id);
    }
    assert_eq!(counter(&host, "data", "errors"), 0);
    // The power button, and the file system as it is then.
    host.ok(&["stop", "vm", "--timeout", "50"]);
    guest.ends_well();
    check_ext4(&disk);
}

struct Moving {
    host: Host,
    guest: Linux,
    moves: usize,
}

impl Moving {
    /// Migrates the VM to a process with the other tap. Right after it the guest's clocks and counters
    /// are those of a guest that never was anywhere else.
    fn migrate(&mut self, args: &[&str]) {
        self.moves += 1;
        let net = format!("lan={}", TAPS[self.moves % 2]);
        let receive = ["receive", "--listen", "127.0.0.1:0", "--once", "--console", "stdio"];
        let command = self.host.command(&[&receive[..], &["--net", &net]].concat());
        let next = Linux::start(command);
        let to = next.listens_at();
        let counted_before = Counted::of(&mut self.guest);
        let before = Clocks::of(&mut self.guest);

        let begin = Instant::now();
        let report = self.host.json(&[&["migrate", "vm", "--to", &to], args].concat());
        let seconds = begin.elapsed().as_secs_f64();
        assert_eq!(report["verdict"], "handed-over", "{report:#}");
        std::mem::replace(&mut self.guest, next).ends_well();

        let after = Clocks::of(&mut self.guest);
        after.follows(&before);
        let counted = Counted::of(&mut self.guest);
        counted.follows(&counted_before);
        self.measure(&report, seconds);
        let more = COUNTERS.iter().zip(counted.counts);
        let more = more.map(|(name, now)| format!("after {name} {}", now + 1));
        self.guest.sh(&more.collect::<Vec<_>>().join(" && "));
    }

    fn measure(&self, report: &Value, seconds: f64) {
        let which = format!("move {}, {}", self.moves, report["mode"].as_str().unwrap());
        measured(&format!("{which}: seconds"), seconds);
        let rounds = report["rounds"].as_array().unwrap().len();
        measured(&format!("{which}: live rounds"), rounds as f64);
        measured(&format!("{which}: pages"), number(report, "data_pages") as f64);
        let pause = number(&report["pause"], "total_us") as f64 / 1e3;
        measured(&format!("{which}: milliseconds of pause"), pause);
    }

    /// What the guest does is right and goes on, on both CPUs, and its kernel has nothing to complain
    /// of.
    fn works(&mut self) {
        let guest = &mut self.guest;
        let errors = "cat /run/copy-errors /run/dirty-errors /run/beat-errors 2>/dev/null; true";
        assert_eq!(guest.sh(errors), "");
        check(guest, 2, LOADER_BOOT_PARAMS);
        for cpu in 0..2 {
            works_on(guest, cpu);
        }
        assert!(ping(guest, 2), "{}", guest.sh("cat /tmp/ping"));
    }
}

/// The CPU runs what it is to run, and gets its timer's interrupts and those by which the other one
/// wakes it.
fn works_on(guest: &mut Linux, cpu: u64) {
    assert_eq!(guest.number(&format!("on {cpu} awk '{{ print $39 }}' /proc/self/stat")), cpu);
    // A program that goes to another CPU is woken there.
    let (other, mask) = (1 - cpu, 1 << cpu);
    guest.sh(&format!(
        "timer=$(irqs LOC {cpu}) woken=$(irqs RES {cpu}); \
         until [ $(irqs LOC {cpu}) -gt $timer ] && [ $(irqs RES {cpu}) -gt $woken ]; do \
         on {other} taskset {mask} true; done"
    ));
}

/// What the guest has counted at a moment between two readings of its clock, in nanoseconds.
struct Counted {
    from: u64,
    counts: [u64; COUNTERS.len()],
    to: u64,
}

impl Counted {
    fn of(guest: &mut Linux) -> Self {
        let counts = COUNTERS.map(|name| format!("count {name}")).join("; ");
        let text = guest.sh(&format!("monotonic; {counts}; monotonic"));
        let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
        let counts = std::array::from_fn(|index| numbers[index + 1]);
        Self { from: numbers[0], counts, to: numbers[COUNTERS.len() + 1] }
    }

    /// Fails if a counter has fallen, or there were more ticks than fit between the two.
    fn follows(&self, before: &Self) {
        for ((name, then), now) in COUNTERS.iter().zip(before.counts).zip(self.counts) {
            assert!(now >= then, "{name}: {now} after {then}");
        }
        let fit = Duration::from_nanos(self.to - before.from).as_nanos() / TICK.as_nanos() + 1;
        let ticks = self.counts[0] - before.counts[0];
        assert!(u128::from(ticks) <= fit, "{ticks} ticks where {fit} fit");
    }
}

/// What the guest's clocks say, and this end's before and after they were asked.
struct Clocks {
    /// Nanoseconds.
    monotonic: u64,
    asked: [Instant; 2],
    /// How far the guest's wall clock may be ahead of this one's, at least and at most, microseconds.
    ahead: [i128; 2],
}

impl Clocks {
    fn of(guest: &mut Linux) -> Self {
        /// Readings of the wall clock: the quickest one counts.
        const READINGS: usize = 3;
        let begin = Instant::now();
        let monotonic = guest.number("monotonic");
        let asked = [begin, Instant::now()];
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i128;
        let mut ahead = [i128::MIN, i128::MAX];
        for _ in 0..READINGS {
            let before = now();
            let guests = i128::from(guest.number("realtime"));
            let after = now();
            ahead = [ahead[0].max(guests - after), ahead[1].min(guests - before)];
        }
        Self { monotonic, asked, ahead }
    }

    /// Fails unless as much time has gone by for the guest as here, and its wall clock is as far from
    /// this one's as it was.
    fn follows(&self, before: &Self) {
        /// A clock's rate as the guest measured it, and the other one's.
        const RATE: f64 = 0.001;
        /// A process of a busy machine may stand between two readings of clocks, seconds.
        const SLACK: f64 = 0.1;
        assert!(self.monotonic > before.monotonic, "{} after {}", self.monotonic, before.monotonic);
        let lived = Duration::from_nanos(self.monotonic - before.monotonic).as_secs_f64();
        let least = (self.asked[0] - before.asked[1]).as_secs_f64();
        let most = (self.asked[1] - before.asked[0]).as_secs_f64();
        let range = least * (1. - RATE) - SLACK..=most * (1. + RATE) + SLACK;
        assert!(range.contains(&lived), "{lived} s for the guest, {least} to {most} s here");
        let slack = ((most * RATE + SLACK) * 1e6) as i128;
        let overlap =
            self.ahead[0] - slack <= before.ahead[1] && before.ahead[0] - slack <= self.ahead[1];
        assert!(
            overlap,
            "its wall clock was {:?} µs ahead of this one's, now {:?}",
            before.ahead, self.ahead
        );
    }
}
