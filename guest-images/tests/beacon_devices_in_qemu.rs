//! Beacon's drivers in QEMU's microvm: each works, and sees what it is there to see.
//!
//! Needs `qemu-system-x86_64` and `/dev/kvm`; without them the tests are reported as ignored.
#![allow(clippy::unwrap_used)]

mod qemu;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Arguments;
use serde_json::Value;

use self::qemu::{exclusive, folder, trial, Guest};

fn main() -> std::process::ExitCode {
    let tests = vec![
        trial("a_disk_is_verified_and_measured", a_disk_is_verified_and_measured),
        trial("damage_on_a_disk_is_found_and_named", damage_on_a_disk_is_found_and_named),
        trial("an_error_of_a_disk_is_named", an_error_of_a_disk_is_named),
        trial("lost_interrupts_are_seen", lost_interrupts_are_seen),
        trial("the_network_answers", the_network_answers),
        trial("what_the_network_loses_is_counted", what_the_network_loses_is_counted),
        trial("arp_ping_and_announcements", arp_ping_and_announcements),
        trial("random_bytes_come", random_bytes_come),
        trial("the_balloon_follows", the_balloon_follows),
        trial("everything_survives_a_save", everything_survives_a_save),
        trial("an_attack_goes_on", an_attack_goes_on),
        trial("what_is_missing_is_said", what_is_missing_is_said),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// Where microvm puts the first devices, with its default of two I/O APICs: from the last of 24
/// windows on down. It says so on the command line only without ACPI.
fn windows(count: u64) -> String {
    (24 - count..24)
        .rev()
        .map(|slot| {
            format!(" virtio_mmio.device=512@{:#x}:{}", 0xFEB0_0000 + slot * 512, 24 + slot)
        })
        .collect()
}

/// Starts a guest. QEMU 7.2 loses wide registers in a save on some KVMs: they are not checked.
fn start(folder: &Path, options: &str, arguments: &[&str]) -> Guest {
    let arguments: Vec<String> = ["-global", "virtio-mmio.force-legacy=false"]
        .iter()
        .chain(arguments)
        .map(ToString::to_string)
        .collect();
    let options = format!("ws=2 pace=10 fpu=sse {options}{}", windows(5));
    Guest::start_in(folder.to_owned(), "microvm", 1, &options, &arguments)
}

/// The arguments for a disk that is the file `disk` of the folder.
const DISK: [&str; 4] = [
    "-drive",
    "if=none,id=disk,file=disk,format=raw,discard=unmap",
    "-device",
    "virtio-blk-device,drive=disk,serial=beacon-disk",
];

fn make_disk(folder: &Path, mib: u64) {
    File::create(folder.join("disk")).unwrap().set_len(mib << 20).unwrap();
}

/// Waits for a report that has what is asked for; no counter of errors may be other than zero.
fn wait_until(guest: &mut Guest, what: impl Fn(&dyn Fn(&str) -> u64) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let report = guest.wait_for("report");
        for (key, value) in report.as_object().unwrap() {
            let bad =
                ["errors", "broken", "stuck", "irqs_lost"].iter().any(|end| key.ends_with(end));
            assert!(!bad || *value == 0, "{key} in {report}");
        }
        let field = |key: &str| {
            report[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {report}"))
        };
        if what(&field) {
            return report;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "still {report}");
    }
}

fn a_disk_is_verified_and_measured() {
    let _guard = exclusive();
    for notify in ["poll", "irq"] {
        for (block, op) in [(512, "mixed"), (4096, "read"), (131_072, "write")] {
            let folder = folder("disk");
            make_disk(&folder, 8);
            let options = format!(
                "report=250 virtio={notify} disk=verify disk-bs={block} disk-op={op} disk-ws=1 \
                 disk-rate=max disk-discard=on disk-depth=8"
            );
            let mut guest = start(&folder, &options, &DISK);
            let disk = guest.wait_for("disk");
            assert_eq!((&disk["id"], &disk["sectors"]), (&"beacon-disk".into(), &16384.into()));
            assert_eq!(disk["blocks"], (1 << 20) / block);
            guest.wait_for("disk-ready");
            wait_until(&mut guest, |field| {
                (op == "write" || field("disk_verified") > 4096)
                    && field("disk_flushes") > 1
                    && field("disk_discards") > 1
                    && field("disk_zeroes") > 1
                    && (notify == "poll" || field("disk_irqs") > 10)
            });
            guest.say("disk disk=bench disk-ms=200 disk-depth=32 disk-op=read disk-bs=4096");
            let bench = guest.wait_for("disk-bench");
            assert_eq!((&bench["bs"], &bench["depth"]), (&4096.into(), &32.into()));
            let number = |key: &str| bench[key].as_f64().unwrap();
            assert!(number("iops") > 0.0 && number("mib_per_s") > 0.0, "{bench}");
            assert!(0.0 < number("min_us") && number("min_us") <= number("median_us"), "{bench}");
            assert!(number("p99_us") <= number("max_us"), "{bench}");
            assert_eq!(number("irqs") > 0.0, notify == "irq", "{bench}");
            guest.say("disk disk=verify disk-bs=1024");
            guest.wait_for("disk-ready");
            guest.say("poweroff");
            assert!(guest.end().success());
        }
    }
}

fn damage_on_a_disk_is_found_and_named() {
    let _guard = exclusive();
    let folder = folder("damage");
    make_disk(&folder, 4);
    let options =
        "report=0 disk=verify disk-ws=1 disk-op=read disk-order=sequential disk-rate=5000";
    let mut guest = start(&folder, options, &DISK);
    guest.wait_for("disk-ready");
    let damage = |sector: u64, bytes: &[u8]| {
        let mut disk = File::options().write(true).open(folder.join("disk")).unwrap();
        disk.seek(SeekFrom::Start(sector * 512)).unwrap();
        disk.write_all(bytes).unwrap();
    };
    let sector = |sector: u64| {
        let mut bytes = [0; 512];
        let mut disk = File::open(folder.join("disk")).unwrap();
        disk.seek(SeekFrom::Start(sector * 512)).unwrap();
        disk.read_exact(&mut bytes).unwrap();
        bytes
    };
    let old = sector(803);
    for (bytes, kind) in
        [([0; 512], "zero"), ([7; 512], "torn"), (sector(804), "other-sector"), (old, "stale")]
    {
        damage(803, &bytes);
        let error = guest.wait_for("disk-error");
        assert_eq!((&error["kind"], &error["sector"]), (&kind.into(), &803.into()), "{error}");
        // It is written anew when its turn comes.
        let start = Instant::now();
        while sector(803) == bytes {
            assert!(start.elapsed() < Duration::from_secs(60), "{kind} stays");
        }
    }
    guest.say("spoil 5");
    guest.wait_for("spoil");
    let error = guest.wait_for("disk-error");
    assert_eq!((&error["kind"], &error["sector"]), (&"stale".into(), &40.into()));
    guest.say("report");
    assert_eq!(guest.wait_for("report")["disk_errors"], 5, "each is counted once");
}

fn an_error_of_a_disk_is_named() {
    let _guard = exclusive();
    let folder = folder("error");
    make_disk(&folder, 4);
    let blockdev = r#"{"driver":"raw","node-name":"disk","file":{"driver":"blkdebug",
        "image":{"driver":"file","filename":"disk"},
        "inject-error":[{"event":"read_aio","iotype":"read","errno":5,"sector":88,"once":true}]}}"#;
    let arguments =
        ["-blockdev", blockdev, "-device", "virtio-blk-device,drive=disk,serial=beacon-disk"];
    // One at a time: QEMU merges neighbours, and all of them fail.
    let options =
        "report=0 disk=verify disk-ws=1 disk-op=read disk-order=sequential disk-rate=5000 disk-depth=1";
    let mut guest = start(&folder, options, &arguments);
    let error = guest.wait_for("disk-error");
    assert_eq!((&error["kind"], &error["op"]), (&"status".into(), &"read".into()));
    assert_eq!((&error["sector"], &error["status"]), (&88.into(), &1.into()));
}

fn lost_interrupts_are_seen() {
    let _guard = exclusive();
    let folder = folder("deaf");
    make_disk(&folder, 4);
    let mut guest = start(&folder, "report=0 virtio=irq disk=verify disk-ws=1", &DISK);
    guest.wait_for("disk-ready");
    guest.say("deafen");
    guest.wait_for("deafen");
    let lost = guest.wait_for("irq-lost");
    assert_eq!((&lost["device"], &lost["lost"]), (&"disk".into(), &1.into()));
    guest.say("report");
    let report = guest.wait_for("report");
    assert_ne!(report["disk_irqs_lost"], 0);
    assert_eq!(report["disk_errors"], 0);
}

/// A port that nobody uses just now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn generated(offset: usize) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

fn the_network_answers() {
    let _guard = exclusive();
    for notify in ["poll", "irq"] {
        let (udp, echo, discard, chargen) = (free_port(), free_port(), free_port(), free_port());
        let user = format!(
            "user,id=net,hostfwd=udp:127.0.0.1:{udp}-:7,hostfwd=tcp:127.0.0.1:{echo}-:7,\
             hostfwd=tcp:127.0.0.1:{discard}-:9,hostfwd=tcp:127.0.0.1:{chargen}-:19"
        );
        let options = format!("report=250 virtio={notify} ip=10.0.2.15/24 gw=10.0.2.2");
        let arguments = ["-netdev", &user, "-device", "virtio-net-device,netdev=net"];
        let mut guest = start(&folder("net"), &options, &arguments);
        assert_eq!(guest.wait_for("net")["mtu"], 1500);
        guest.wait_for("ready");

        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(("127.0.0.1", udp)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut buffer = [0; 2000];
        for length in [1, 100, 1400] {
            socket.send(&vec![length as u8; length]).unwrap();
            assert_eq!(socket.recv(&mut buffer).unwrap(), length);
            assert!(buffer[..length].iter().all(|&byte| byte == length as u8));
        }

        for round in 0..4 {
            let mut stream = TcpStream::connect(("127.0.0.1", echo)).unwrap();
            let sent: Vec<u8> = (0..200_000).map(|offset| generated(offset + round)).collect();
            let mut reader = stream.try_clone().unwrap();
            let copy = sent.clone();
            let writer = std::thread::spawn(move || stream.write_all(&copy).map(|()| stream));
            let mut back = vec![0; sent.len()];
            reader.read_exact(&mut back).unwrap();
            assert!(back == sent, "what came back is something else");
            drop(writer.join().unwrap().unwrap());
        }

        let mut stream = TcpStream::connect(("127.0.0.1", chargen)).unwrap();
        let mut bytes = vec![0; 3 << 20];
        stream.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().enumerate().all(|(offset, &byte)| byte == generated(offset)));
        drop(stream);

        let mut stream = TcpStream::connect(("127.0.0.1", discard)).unwrap();
        stream.write_all(&bytes).unwrap();
        drop(stream);
        wait_until(&mut guest, |field| {
            field("tcp_discarded") == 3 << 20
                && field("tcp_echoed") == 800_000
                && field("tcp_accepted") == 6
                && field("udp_echoes") == 3
                && (notify == "poll") == (field("net_irqs") == 0)
        });
    }
}

fn what_the_network_loses_is_counted() {
    let _guard = exclusive();
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    host.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let options = format!("report=250 ip=10.0.2.15/24 udp-to=10.0.2.2:{port} udp-rate=200");
    let arguments = ["-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"];
    let mut guest = start(&folder("loss"), &options, &arguments);
    guest.wait_for("ready");
    let mut buffer = [0; 100];
    let mut swapped = None;
    for _ in 0..300 {
        let (length, from) = host.recv_from(&mut buffer).unwrap();
        let datagram = buffer[..length].to_vec();
        assert_eq!((length, &datagram[..6]), (24, &b"beacon"[..]));
        match u64::from_le_bytes(datagram[8..16].try_into().unwrap()) {
            100..110 => continue,
            150 => {
                host.send_to(&datagram, from).unwrap();
                host.send_to(&datagram, from).unwrap();
            }
            180 => swapped = Some(datagram),
            181 => {
                host.send_to(&datagram, from).unwrap();
                host.send_to(&swapped.take().unwrap(), from).unwrap();
            }
            200 => {
                host.send_to(b"something else", from).unwrap();
                host.send_to(&datagram, from).unwrap();
            }
            _ => drop(host.send_to(&datagram, from).unwrap()),
        }
    }
    let report = wait_until(&mut guest, |field| {
        // From here on nobody answers, and all is lost after a second.
        field("udp_lost") >= 10 && field("udp_replies") == 290
    });
    for (key, expected) in
        [("udp_duplicates", 1), ("udp_reordered", 1), ("udp_strays", 1), ("udp_late", 0)]
    {
        assert_eq!(report[key], expected, "{key} in {report}");
    }
    assert!(report["udp_gap_max_us"].as_f64().unwrap() > 40_000.0, "{report}");
    // The next one answers after it was taken for lost.
    let (length, from) = host.recv_from(&mut buffer).unwrap();
    wait_until(&mut guest, |field| field("udp_lost") >= 11);
    host.send_to(&buffer[..length], from).unwrap();
    wait_until(&mut guest, |field| field("udp_late") == 1 && field("udp_replies") == 291);
}

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    (!((sum & 0xFFFF) + (sum >> 16)) as u16).to_be_bytes()
}

fn arp_ping_and_announcements() {
    let _guard = exclusive();
    let wire = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (ours, theirs) = (wire.local_addr().unwrap().port(), free_port());
    let socket = format!("socket,id=net,udp=127.0.0.1:{ours},localaddr=127.0.0.1:{theirs}");
    let arguments = [
        "-netdev",
        &socket,
        "-device",
        "virtio-net-device,netdev=net,mac=52:54:00:00:00:07,host_mtu=1400",
    ];
    let mut guest = start(&folder("wire"), "report=0 virtio=irq ip=10.9.8.7/24", &arguments);
    assert_eq!(guest.wait_for("net")["mtu"], 1400);
    guest.wait_for("ready");
    wire.connect(("127.0.0.1", theirs)).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mac = [0x52, 0x54, 0, 0, 0, 7];
    let mut frame = [0; 2000];
    let mut receive = |kind: [u8; 2], to: [u8; 6]| loop {
        let length = wire.recv(&mut frame).unwrap();
        if frame[..6] == to && frame[6..12] == mac && frame[12..14] == kind {
            return frame[..length].to_vec();
        }
    };

    let arp = [
        &[0xFF; 6][..],
        &HOST_MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &HOST_MAC,
        &[10, 9, 8, 1, 0, 0, 0, 0, 0, 0, 10, 9, 8, 7],
    ]
    .concat();
    wire.send(&arp).unwrap();
    let reply = receive([8, 6], HOST_MAC);
    assert_eq!(reply[20..32], [&[0, 2][..], &mac, &[10, 9, 8, 7]].concat()[..]);

    let mut icmp = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1][..], &[0x5A; 56]].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut ip = vec![0x45, 0, 0, 84, 0, 1, 0, 0, 64, 1, 0, 0, 10, 9, 8, 1, 10, 9, 8, 7];
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    wire.send(&[&mac[..], &HOST_MAC, &[8, 0], &ip, &icmp].concat()).unwrap();
    let reply = receive([8, 0], HOST_MAC);
    assert_eq!((reply[34], &reply[38..98]), (0, &icmp[4..64]), "an echo reply");

    guest.monitor("announce_self");
    let gratuitous = receive([8, 6], [0xFF; 6]);
    assert_eq!(
        (&gratuitous[28..32], &gratuitous[38..42]),
        (&[10, 9, 8, 7][..], &[10, 9, 8, 7][..])
    );
    assert_eq!(guest.wait_for("announce")["count"], 1);
    guest.say("report");
    assert_ne!(guest.wait_for("report")["net_announces_acked"], 0);
}

fn random_bytes_come() {
    let _guard = exclusive();
    for notify in ["poll", "irq"] {
        let options = format!("report=250 virtio={notify} rng=on");
        let mut guest = start(&folder("rng"), &options, &["-device", "virtio-rng-device"]);
        wait_until(&mut guest, |field| {
            field("rng_requests") > 5 && field("rng_bytes") == 64 * field("rng_requests")
        });
    }
}

fn the_balloon_follows() {
    let _guard = exclusive();
    for notify in ["poll", "irq"] {
        let options = format!("report=250 virtio={notify} balloon=on balloon-pool=8");
        let mut guest = start(&folder("balloon"), &options, &["-device", "virtio-balloon-device"]);
        assert_eq!(guest.wait_for("balloon")["pool_pages"], 2048);
        guest.wait_for("ready");
        for (mib, pages) in [(124, 1024), (126, 512), (128, 0), (121, 1792)] {
            guest.monitor(&format!("balloon {mib}"));
            let done = guest.wait_for("balloon-done");
            assert_eq!((&done["wanted"], &done["actual"]), (&pages.into(), &pages.into()));
        }
        // More than there is.
        guest.monitor("balloon 64");
        assert_eq!(guest.wait_for("balloon-done")["actual"], 2048);
        wait_until(&mut guest, |field| {
            field("balloon_actual") == 2048
                && field("balloon_inflated") == 1024 + 1792 + 256
                && field("balloon_deflated") == 1024
        });
    }
}

fn everything_survives_a_save() {
    let _guard = exclusive();
    for notify in ["poll", "irq"] {
        let folder = folder("save");
        make_disk(&folder, 4);
        let options = format!(
            "report=250 virtio={notify} disk=verify disk-ws=2 disk-rate=3000 disk-depth=8 rng=on \
             ip=10.0.2.15/24"
        );
        let mut arguments =
            vec!["-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"];
        arguments.extend(["-device", "virtio-rng-device"]);
        arguments.extend(DISK);
        let mut guest = start(&folder, &options, &arguments);
        guest.wait_for("disk-ready");
        let before = wait_until(&mut guest, |field| field("disk_verified") > 100);
        guest.monitor("migrate \"exec:cat > state\"");
        // The folder of the first one goes away with it.
        let second = self::folder("restore");
        let start_of_wait = Instant::now();
        while !guest.monitor("info migrate").contains("completed") {
            assert!(start_of_wait.elapsed() < Duration::from_secs(60));
        }
        for name in ["state", "disk"] {
            std::fs::copy(folder.join(name), second.join(name)).unwrap();
        }
        drop(guest);
        arguments.extend(["-incoming", "exec:cat state"]);
        let mut guest = start(&second, &options, &arguments);
        // Most likely the rest of a line.
        guest.skip_line();
        let number = |report: &Value, key: &str| report[key].as_u64().unwrap();
        let keys = ["disk_verified", "disk_writes", "disk_flushes", "rng_requests"];
        let old: BTreeMap<_, _> = keys.iter().map(|key| (*key, number(&before, key))).collect();
        wait_until(&mut guest, |field| {
            keys.iter().all(|key| field(key) > old[key] + 10 * u64::from(*key != "disk_flushes"))
        });
    }
}

fn an_attack_goes_on() {
    let _guard = exclusive();
    let folder = folder("attack");
    make_disk(&folder, 4);
    let mut guest = start(&folder, "report=250 attack=1", &DISK);
    wait_until(&mut guest, |field| {
        field("attack_misdeeds") > 1000
            && field("attack_good") > 20
            && field("attack_needs_reset") > 0
    });
    guest.say("report");
    assert_eq!(guest.wait_for("report")["attack_silent"], 0);
}

fn what_is_missing_is_said() {
    let _guard = exclusive();
    let mut guest = start(&folder("missing"), "rng=on ip=10.0.0.1/8", &[]);
    for device in ["net", "rng"] {
        let error = guest.wait_for("error");
        assert_eq!((&error["device"], &error["text"]), (&device.into(), &"no such device".into()));
    }
    guest.wait_for("ready");
}
