//! A VM that moves between hosts in different subnets, and a third host that talks to it meanwhile.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::Arc;
use std::time::Instant;

use tests::network::{connect, GUEST_ADDRESS, HOST_ADDRESS};
use tests::{kvm, Vm, PATIENCE};

use super::*;

/// Moves there and back.
const MOVES: usize = 4;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let kvm = kvm();
    let needs: Vec<&Need> = needs.iter().copied().chain([&kvm]).collect();
    add!(suite, &needs; a_connection_lives_through_moves_across_a_router);
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it.
struct Place {
    thread: String,
    jobs: Sender<Job>,
}

impl Place {
    fn new() -> Self {
        let (jobs, work) = mpsc::channel::<Job>();
        let (told, name) = mpsc::channel();
        std::thread::spawn(move || {
            in_private_network(move || {
                told.send(rustix::thread::gettid().as_raw_nonzero().to_string()).unwrap();
                work.into_iter().for_each(|job| job());
            })
        });
        Self { thread: name.recv_timeout(PATIENCE).unwrap(), jobs }
    }

    /// Does `work` in the namespace.
    #[track_caller]
    fn on<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let (done, result) = mpsc::channel();
        let job = move || drop(done.send(work()));
        self.jobs.send(Box::new(job)).unwrap();
        // Whatever is done there has its own, shorter limit.
        result.recv_timeout(2 * PATIENCE).expect("it failed there")
    }

    /// A wire to the router, on which this host is 10.9.`net`.1.
    fn wire(&self, router: &Self, net: usize) {
        let (here, there) = (self.thread.clone(), format!("to{net}"));
        router.on(move || {
            ip(&["link", "add", &there, "type", "veth", "peer", "name", "eth0", "netns", &here])
                .unwrap();
            ip(&["address", "add", &format!("10.9.{net}.254/24"), "dev", &there]).unwrap();
            ip(&["link", "set", &there, "up"]).unwrap();
        });
        self.on(move || {
            ip(&["address", "add", &format!("10.9.{net}.1/24"), "dev", "eth0"]).unwrap();
            ip(&["link", "set", "eth0", "up"]).unwrap();
            ip(&["route", "add", "default", "via", &format!("10.9.{net}.254")]).unwrap();
        });
    }
}

/// A host of the network `blue` with its namespace.
struct Site {
    place: Place,
    host: Arc<Host>,
    net: usize,
}

impl Site {
    /// Host `net` of three, across the router.
    fn new(router: &Place, net: usize, options: &'static str) -> Self {
        let place = Place::new();
        place.wire(router, net);
        Self { place, host: Arc::new(Host::new()), net }.declare(options)
    }

    fn declare(self, options: &'static str) -> Self {
        let (host, net) = (Arc::clone(&self.host), self.net);
        self.place.on(move || {
            let peers: Vec<String> = (1..=3)
                .filter(|peer| *peer != net)
                .map(|peer| format!("--peer 10.9.{peer}.1"))
                .collect();
            let line = format!(
                "create blue --type vxlan --vni 5001 --local 10.9.{net}.1 {} {options}",
                peers.join(" ")
            );
            network(&host, &line).ok();
        });
        self
    }

    /// Waits for a VM.
    fn receive(&self) -> (Vm, String) {
        let (host, net) = (Arc::clone(&self.host), self.net);
        self.place.on(move || {
            let listen = format!("10.9.{net}.1:0");
            let mut vm = host.launch(&["receive", "--listen", &listen, "--once"]);
            vm.console.may_begin_within_a_line();
            let address = vm.listens_at();
            (vm, address)
        })
    }

    fn migrate(&self, mode: &'static str, address: String) {
        let host = Arc::clone(&self.host);
        self.place.on(move || drop(host.ok(&["migrate", "vm", "--mode", mode, "--to", &address])));
    }
}

/// Sends and checks what comes back, until it is told to stop; counts bytes.
fn converse(mut stream: TcpStream, stop: &AtomicBool, echoed: &AtomicU64) {
    let mut next = 0_u8;
    while !stop.load(Ordering::Acquire) {
        next = next.wrapping_add(1);
        let sent = vec![next; 10_000];
        stream.write_all(&sent).unwrap();
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == sent, "the connection carries something else");
        echoed.fetch_add(back.len() as u64, Ordering::AcqRel);
    }
    stream.shutdown(Shutdown::Both).unwrap();
}

#[track_caller]
fn more_comes(echoed: &AtomicU64) {
    let (before, deadline) = (echoed.load(Ordering::Acquire), Instant::now() + PATIENCE);
    while echoed.load(Ordering::Acquire) < before + 100_000 {
        assert!(Instant::now() < deadline, "the connection stands still");
        std::thread::yield_now();
    }
}

fn a_connection_lives_through_moves_across_a_router() {
    let router = Place::new();
    router.on(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
    let (a, b) = (Site::new(&router, 1, ""), Site::new(&router, 2, ""));
    // The third host, which has an address on the network.
    let c = Site::new(&router, 3, "--address 10.0.0.1/24");
    assert_eq!(HOST_ADDRESS, "10.0.0.1");
    let host = Arc::clone(&a.host);
    let mut vm = a.place.on(move || {
        let cmdline = format!("virtio=irq ip={GUEST_ADDRESS} report=0 ws=2 pace=0");
        host.run(&cmdline, &["--net", "id=net,network=blue"]).ready()
    });
    let (stop, echoed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let stream = c.place.on(|| connect(7));
    let (told, count) = (Arc::clone(&stop), Arc::clone(&echoed));
    let talk = std::thread::spawn(move || converse(stream, &told, &count));
    for moves in 0..MOVES {
        more_comes(&echoed);
        let (from, to) = if moves % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let (next, address) = to.receive();
        from.migrate(["precopy", "postcopy"][moves / 2 % 2], address);
        std::mem::replace(&mut vm, next).ends_well();
    }
    more_comes(&echoed);
    stop.store(true, Ordering::Release);
    talk.join().unwrap();
    // C has learned behind which host the guest is.
    let entries =
        c.place.on(|| said(Command::new("bridge").args(["fdb", "show", "dev", "mx-blue"])));
    assert!(
        entries.lines().any(|line| line.starts_with("52:54:") && line.contains("dst 10.9.1.1")),
        "{entries}"
    );
    vm.verify();
    drop(vm);
    for site in [a, b, c] {
        let host = Arc::clone(&site.host);
        site.place.on(move || {
            // Its tap goes with the process, whose end was waited for.
            network(&host, "delete blue").ok();
            assert!(link("mx-blue").is_null() && link("mv-blue").is_null());
        });
    }
}
