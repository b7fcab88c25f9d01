//! A guest with every device at work, and the host's side of its network.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

use serde_json::Value;

use crate::beacon::PROGRESS;
use crate::network::{bridge, connect, GUEST_ADDRESS, HOST_ADDRESS};
use crate::{number, Host, Vm};

/// beacon's TCP echo.
const ECHO: u16 = 7;
/// Counters of the devices that go on, and never start again.
const DEVICES: [&str; 7] = [
    "disk_reads",
    "disk_writes",
    "disk_verified",
    "net_rx_frames",
    "net_tx_frames",
    "udp_replies",
    "rng_requests",
];

/// What a VM is busy with: memory that is written and verified, a disk that is verified, datagrams to an echo
/// service on the host and back, a TCP connection from the host, random numbers, a balloon.
#[derive(Debug)]
pub struct Traffic {
    stream: TcpStream,
    sent: u8,
}

impl Traffic {
    /// The ports of the switch that the VM's card `net` can be at.
    pub const TAPS: [&str; 2] = ["tap0", "tap1"];

    /// Starts the VM `vm` with `cpus` vCPUs and the disk `disk` (as `--disk` takes it) at the first port of a
    /// switch that is made. Its drivers wait for interrupts or poll (`notify`, `irq` or `poll`). To be called in a
    /// private network.
    #[track_caller]
    pub fn start(host: &Host, notify: &str, cpus: &str, disk: &str) -> (Self, Vm) {
        bridge(&Self::TAPS).unwrap();
        let service = UdpSocket::bind((HOST_ADDRESS, 0)).unwrap();
        let port = service.local_addr().unwrap().port();
        // Ends with the program, since nobody waits for it.
        std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((length, from)) = service.recv_from(&mut datagram) {
                // The tap may be without a VM just now.
                let _ = service.send_to(&datagram[..length], from);
            }
        });
        // It reports when asked: reports of all devices are long, and a serial port is slow.
        let options = format!(
            "ws=8 dirty=4000 pattern=random report=0 pace=0 beat=50 virtio={notify} disk=verify \
             disk-ws=4 disk-rate=3000 disk-depth=16 rng=on balloon=on ip={GUEST_ADDRESS} \
             udp-to={HOST_ADDRESS}:{port} udp-rate=500"
        );
        let net = format!("id=net,tap={}", Self::TAPS[0]);
        let devices = ["--disk", disk, "--net", &net, "--rng", "--balloon"];
        let mut vm =
            host.run(&options, &[&["--memory", "128M", "--cpus", cpus][..], &devices].concat());
        vm.console.event("disk-ready");
        let traffic = Self { stream: connect(ECHO), sent: 0 };
        Self::at_work(&mut vm);
        (traffic, vm)
    }

    /// The arguments of a destination where the VM's card is at this port of the switch.
    #[must_use]
    pub fn at(port: usize) -> [String; 2] {
        ["--net".to_owned(), format!("net={}", Self::TAPS[port])]
    }

    /// The guest has rebooted, and knows nothing of the connection: makes another.
    #[track_caller]
    pub fn reconnect(&mut self) {
        self.stream = connect(ECHO);
    }

    /// Waits until all devices work; the report that says so.
    #[track_caller]
    pub fn at_work(vm: &mut Vm) -> Value {
        vm.report_with("work", |field| DEVICES.iter().all(|name| field(name) > 0))
    }

    /// Everything has gone on since `before`, the connection included.
    #[track_caller]
    pub fn goes_on_after(&mut self, vm: &mut Vm, before: &Value) -> Value {
        let devices = DEVICES.map(|name| (name, number(before, name)));
        let guest = PROGRESS.map(|name| (name, number(before, name)));
        let report = vm.report_with("more of everything", |field| {
            let devices_go_on = devices.iter().all(|(name, old)| {
                assert!(field(name) >= *old, "{name} began anew, after {before}");
                field(name) > old + 5
            });
            devices_go_on && guest.iter().all(|(name, old)| field(name) > *old)
        });
        self.sent = self.sent.wrapping_add(1);
        let sent = vec![self.sent; 20_000];
        self.stream.write_all(&sent).unwrap();
        let mut back = vec![0; sent.len()];
        self.stream.read_exact(&mut back).unwrap();
        assert!(back == sent, "the connection carries something else");
        report
    }
}
