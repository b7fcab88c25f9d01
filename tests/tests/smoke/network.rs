//! Network cards on taps.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tests::lab::{image, program, Linux};
use tests::{finish, Host};

use crate::guest::{boot, counter, device_healthy, healthy, measured, until};

/// This end of the tap, and the guest's.
pub const HOST: &str = "10.9.0.1";
/// The guest's address, for `init`.
pub const GUEST: &str = "address=10.9.0.2/24";

/// Longest silence on a connection. Guests stand still for some seconds while they are saved.
const SILENCE: Duration = Duration::from_secs(60);

/// A tap with an address, gone when dropped.
pub struct Tap {
    name: &'static str,
}

impl Tap {
    pub fn new(name: &'static str) -> Self {
        ip(&["tuntap", "add", "dev", name, "mode", "tap"]);
        let tap = Self { name };
        ip(&["address", "add", &format!("{HOST}/24"), "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new(program("ip").unwrap()).args(["link", "del", self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let mut command = Command::new(program("ip").unwrap());
    command.args(arguments);
    finish(command, b"").ok();
}

/// A bridge with an address and taps as its ports, as a switch between hosts is; gone when dropped.
pub struct Switch {
    name: &'static str,
    taps: &'static [&'static str],
}

impl Switch {
    pub fn new(name: &'static str, taps: &'static [&'static str]) -> Self {
        ip(&["link", "add", name, "type", "bridge"]);
        let switch = Self { name, taps };
        for tap in taps {
            ip(&["tuntap", "add", "dev", tap, "mode", "tap"]);
            ip(&["link", "set", tap, "master", name, "up"]);
        }
        ip(&["address", "add", &format!("{HOST}/24"), "dev", name]);
        ip(&["link", "set", name, "up"]);
        switch
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        for name in self.taps.iter().chain([&self.name]) {
            let _ = Command::new(program("ip").unwrap()).args(["link", "del", name]).status();
        }
    }
}

/// Waits for the guest to connect.
fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let (stream, _) = until("a connection", || listener.accept().ok());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    stream.set_write_timeout(Some(SILENCE)).unwrap();
    stream
}

/// `ping` to this end: whether all of it came back.
pub fn ping(guest: &mut Linux, count: u32) -> bool {
    guest.try_sh(&format!("ping -c {count} -W 2 {HOST} >/tmp/ping 2>&1")).0 == 0
}

/// The guest's `stream`, checked as it arrives.
pub struct Stream {
    lines: Arc<AtomicU64>,
    checker: JoinHandle<Result<(), String>>,
}

impl Stream {
    /// Has the guest begin.
    pub fn start(guest: &mut Linux) -> Self {
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        guest.sh(&format!("stream {HOST} {port} &"));
        let stream = BufReader::new(accept(&listener));
        let lines = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lines);
        let check = move || {
            for (expected, line) in stream.lines().enumerate() {
                // It ends with the guest.
                let Ok(line) = line else { return Ok(()) };
                if line != expected.to_string() {
                    return Err(format!("{line:?} came instead of {expected}"));
                }
                counter.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        };
        Self { lines, checker: std::thread::spawn(check) }
    }

    /// Waits until more has arrived.
    pub fn goes_on(&self) {
        let before = self.lines.load(Ordering::SeqCst);
        until("more of the stream", || {
            let ended = self.checker.is_finished();
            assert!(!ended, "the stream ended after {before} lines or more");
            (self.lines.load(Ordering::SeqCst) > before + 600).then_some(())
        });
    }
}

/// One vCPU with a card: ICMP, TCP both ways, and the cable.
pub fn tap() {
    const SIZE: usize = 3 << 20;
    let host = Host::new();
    let _tap = Tap::new("smoke0");
    let card = "id=lan,tap=smoke0,mac=52:54:00:00:00:42,mtu=1400";
    let modules = ",virtio_mmio,virtio_net";
    let mut guest = boot(&host, &image("vmlinux"), &["--net", card], modules, GUEST);
    assert_eq!(guest.sh("cat /sys/class/net/eth0/address"), "52:54:00:00:00:42");
    assert_eq!(guest.number("cat /sys/class/net/eth0/mtu"), 1400);
    assert!(ping(&mut guest, 3), "{}", guest.sh("cat /tmp/ping"));
    // Checksums and segments may be left to the other side (virtio 1.2, section 5.1.3).
    let features = guest.sh("cat /sys/class/net/eth0/device/features");
    for (bit, name) in [(0, "CSUM"), (1, "GUEST_CSUM"), (7, "GUEST_TSO4"), (11, "HOST_TSO4")] {
        assert_eq!(features.as_bytes()[bit], b'1', "{name}: {features}");
    }

    // To the guest and back again, each way alone. Words that tell where they belong.
    let word = |n: u32| n.wrapping_mul(0x9E37_79B1).to_le_bytes();
    let data: Vec<u8> = (0..(SIZE / 4) as u32).flat_map(word).collect();
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mib = SIZE as f64 / f64::from(1 << 20);
    guest.send(&format!("nc {HOST} {port} </dev/null >/tmp/data"));
    let mut to_guest = accept(&listener);
    let begin = Instant::now();
    to_guest.write_all(&data).unwrap();
    drop(to_guest);
    assert_eq!(guest.answer("nc"), (0, String::new()));
    measured("MiB/s by TCP to the guest", mib / begin.elapsed().as_secs_f64());
    guest.send(&format!("nc {HOST} {port} </tmp/data"));
    let mut from_guest = accept(&listener);
    let begin = Instant::now();
    let mut back = Vec::new();
    from_guest.read_to_end(&mut back).unwrap();
    measured("MiB/s by TCP from the guest", mib / begin.elapsed().as_secs_f64());
    drop(from_guest);
    assert_eq!(guest.answer("nc"), (0, String::new()));
    assert!(back == data, "{} bytes came back, and not the same", back.len());
    assert!(counter(&host, "lan", "rx_bytes") > SIZE as u64);
    assert!(counter(&host, "lan", "tx_bytes") > SIZE as u64);

    let carrier = |guest: &mut Linux, wanted: u64| {
        until("a change of the carrier", || {
            (guest.number("cat /sys/class/net/eth0/carrier") == wanted).then_some(())
        });
    };
    host.ok(&["link", "vm", "lan", "down"]);
    carrier(&mut guest, 0);
    assert!(!ping(&mut guest, 1));
    host.ok(&["link", "vm", "lan", "up"]);
    carrier(&mut guest, 1);
    // The guest may wait a second before it uses the card again.
    until("an answer over the plugged cable", || ping(&mut guest, 1).then_some(()));
    device_healthy(&host, "lan");
    healthy(&mut guest);
    guest.send("poweroff -f");
    guest.ends_well();
}
