//! A real Linux guest that moves between hosts on networks that only some kernels have: GRE, and Open vSwitch with its
//! datapath in the kernel. In the lab where the processor has no SVM or VMX.
#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::capture::Rarps;
use tests::conversation::Conversation;
use tests::lab::{image, run_suite, LabSuite, Linux};
use tests::network::{GUEST_ADDRESS, HOST_ADDRESS};
use tests::open_vswitch::SCHEMA;
use tests::ping::Pings;
use tests::topology::{Site, Sites, Topology, MAC, MAC_BYTES};

/// How long a guest may take to connect.
const PATIENCE: Duration = Duration::from_secs(60);

const SUITE: LabSuite = LabSuite {
    programs: &[
        "bridge",
        "ip",
        "ovs-appctl",
        "ovs-vsctl",
        "ovs-vswitchd",
        "ovsdb-server",
        "ovsdb-tool",
        "setpriv",
    ],
    modules: &["veth", "vxlan", "ip_gre", "openvswitch", "vport-vxlan"],
    files: &[SCHEMA],
    tests: &[
        ("a_linux_guest_is_followed_through_gre_across_a_router", gre),
        ("a_linux_guest_is_followed_through_open_vswitch_in_the_kernel", open_vswitch),
    ],
};

fn main() -> ExitCode {
    run_suite(SUITE)
}

fn gre() {
    follows(Topology::Gre);
}

fn open_vswitch() {
    follows(Topology::OvsKernel);
}

/// Boots the guest at `site`.
fn boot(site: &Site) -> Linux {
    let card = format!("id=lan,network=blue,mac={MAC}");
    let options = format!(
        "console=ttyS0 quiet panic=-1 modules=button,evdev,virtio_mmio,virtio_net address={GUEST_ADDRESS}"
    );
    let mut command = site.host.command(&["run", "--name", "vm", "--console", "stdio"]);
    command.args(["--memory", "256M", "--net", &card, "--cmdline", &options]);
    command.arg("--kernel").arg(image("vmlinuz")).arg("--initrd").arg(image("initramfs.cpio"));
    site.place.on(move || Linux::start(command)).ready()
}

/// The guest connects to C, and sends back what it gets.
fn converse(guest: &mut Linux, c: &Site) -> Conversation {
    let listener = c.place.on(|| TcpListener::bind((HOST_ADDRESS, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    guest.sh(&format!("mkfifo /tmp/echo; nc {HOST_ADDRESS} {port} <>/tmp/echo >/tmp/echo &"));
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        if let Ok((stream, _)) = listener.accept() {
            break stream;
        }
        assert!(Instant::now() < deadline, "the guest does not connect");
        std::thread::yield_now();
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    Conversation::begin(stream)
}

fn follows(topology: Topology) {
    let sites = Sites::new(topology);
    sites.declare();
    let Sites { a, b, c, .. } = &sites;
    let mut guest = boot(a);
    let conversation = converse(&mut guest, c);
    let pings = c.place.on(Pings::start);
    sites.becomes_known_at(1);
    conversation.goes_on();

    let listen = format!("{}:0", b.address());
    let command = b.host.command(&["receive", "--listen", &listen, "--once", "--console", "stdio"]);
    let next = b.place.on(move || Linux::start(command));
    let (to, host) = (next.listens_at(), Arc::clone(&a.host));
    let rarps = c.place.on(Rarps::begin);
    let report =
        a.place.on(move || host.json(&["migrate", "vm", "--downtime", "300ms", "--to", &to]));
    assert_eq!(report["verdict"], "handed-over", "{report}");
    std::mem::replace(&mut guest, next).ends_well();
    rarps.of(MAC_BYTES, 1);
    sites.becomes_known_at(2);
    conversation.goes_on();
    let pings = pings.finish();
    // Open vSwitch's flows follow its table a moment later; until then frames go where the guest was.
    let most = if topology == Topology::OvsKernel { pings.answered / 2 } else { 0 };
    assert!(pings.answered > 0 && pings.lost <= most, "{pings:?}");
    conversation.end();
    guest.send("poweroff -f");
    guest.ends_well();
    sites.delete();
}
