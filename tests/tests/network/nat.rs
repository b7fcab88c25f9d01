//! A VM behind addresses that are translated: what follows it to another host, and what cannot.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tests::capture::Rarps;
use tests::conversation::exchange;
use tests::network::HOST_ADDRESS;
use tests::numbered::Numbered;
use tests::ping::Pings;
use tests::topology::{Site, Sites, Topology, FORWARDED_CHARGEN, FORWARDED_ECHO, MAC_BYTES};
use tests::{kvm, number, userfaultfd, PATIENCE};

use super::follow::all_of;
use super::*;

/// Datagrams per second, both ways.
const RATE: u64 = 200;
/// How long nothing comes where nothing can.
const SILENCE: Duration = Duration::from_secs(1);

pub fn add(suite: &mut Suite, needs: &[&Need], nft: &Need) {
    let (kvm, userfaultfd) = (kvm(), userfaultfd());
    let needs = [needs, &[nft, &kvm, &userfaultfd]].concat();
    add!(suite, &needs; what_can_follow_a_guest_behind_translated_addresses_does);
}

/// An echo service that remembers who sent.
struct Service {
    port: u16,
    sources: Arc<Mutex<BTreeSet<IpAddr>>>,
}

impl Service {
    fn start() -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let sources = Arc::new(Mutex::new(BTreeSet::new()));
        let seen = Arc::clone(&sources);
        // Ends with the program, since nobody waits for it.
        std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((length, from)) = socket.recv_from(&mut datagram) {
                seen.lock().unwrap().insert(from.ip());
                let _ = socket.send_to(&datagram[..length], from);
            }
        });
        Self { port, sources }
    }

    /// Who sent since the last time.
    fn sources(&self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut *self.sources.lock().unwrap())
    }
}

/// A connection from C to the guest through a host's address; `None` if there is none to be had within `limit`.
fn connect(c: &Site, through: &Site, port: u16, limit: Duration) -> Option<TcpStream> {
    let address: SocketAddr = format!("{}:{port}", through.address()).parse().unwrap();
    let stream = c.place.on(move || TcpStream::connect_timeout(&address, limit)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    Some(stream)
}

/// What the guest generates comes through a connection.
fn download(mut stream: TcpStream) {
    let mut bytes = vec![0; 10_000];
    stream.read_exact(&mut bytes).unwrap();
    let right = |n: usize| (n ^ n >> 8 ^ n >> 16) as u8;
    assert!(bytes.iter().zip(0..).all(|(byte, n)| *byte == right(n)), "something else comes");
}

/// Nothing comes back over a connection any more.
fn is_dead(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let sent = stream.write_all(b"anybody there?");
    sent.is_err() || !stream.read(&mut [0; 100]).is_ok_and(|length| length > 0)
}

fn what_can_follow_a_guest_behind_translated_addresses_does() {
    let sites = Sites::new(Topology::Nat);
    let before = all_of(&sites, true);
    sites.declare();
    let Sites { a, b, c, .. } = &sites;
    let service = c.place.on(Service::start);
    let mut vm = a.run(&format!(
        "ws=8 dirty=2000 pace=0 beat=50 gw={HOST_ADDRESS} udp-to={}:{} udp-rate={RATE}",
        c.address(),
        service.port
    ));
    for (from, to, mode) in [(a, b, "precopy"), (b, a, "postcopy")] {
        // From outside through this host, and from this host itself.
        let mut stream =
            connect(c, from, FORWARDED_ECHO, PATIENCE).expect("the port leads to the guest");
        exchange(&mut stream, 1);
        let pings = from.place.on(Pings::start);
        let through = (from.address(), FORWARDED_ECHO);
        let numbered = c.place.on(move || Numbered::to(through, RATE));
        vm.report_with("answers", |field| field("udp_replies") > 20);
        let pings = pings.finish();
        assert!(pings.answered > 0 && pings.lost == 0, "{pings:?}");
        let tally = numbered.finish();
        assert_eq!((tally.lost, tally.doubled), (0, 0), "{tally:?}");
        let was = service.sources();
        assert_eq!(was, BTreeSet::from([from.address().parse().unwrap()]));

        let rarps = to.place.on(Rarps::begin);
        let report = from.migrate(&mut vm, to, &["--mode", mode]);
        rarps.of(MAC_BYTES, 1);
        println!("{mode}: late frames {}", report["late_frames"]);

        // Its own traffic to the outside has gone on, through the other host's address.
        let seen = number(&vm.report(), "udp_replies");
        // Until they are answered, those of a busy machine's last second count as lost.
        let report = vm.report_with("more answers and none lost", |field| {
            field("udp_replies") > seen + 50 && field("udp_lost") == 0
        });
        assert_eq!(number(&report, "udp_duplicates"), 0, "{report}");
        let now = service.sources();
        assert!(now.contains(&to.address().parse().unwrap()), "{now:?}");
        // It has its address, and is reached from the host that it is on now, and through that.
        let pings = to.place.on(Pings::start);
        let there = connect(c, to, FORWARDED_CHARGEN, PATIENCE);
        download(there.expect("the port leads to the guest there"));
        let through = (to.address(), FORWARDED_ECHO);
        let echoes = number(&vm.report(), "udp_echoes");
        let numbered = c.place.on(move || Numbered::to(through, RATE));
        let answers = vm.report_with("echoes", |field| field("udp_echoes") > echoes + 20);
        let tally = numbered.finish();
        assert_eq!((tally.lost, tally.doubled), (0, 0), "{tally:?}, {answers}");
        let pings = pings.finish();
        assert!(pings.answered > 0 && pings.lost == 0, "{pings:?}");
        // What was made through the old host's address is lost, and nothing new can be.
        assert!(is_dead(stream), "a connection through the old host lives");
        assert!(
            connect(c, from, FORWARDED_CHARGEN, SILENCE).is_none(),
            "the old host still leads to the guest"
        );
        let (known, dev) = to.place.on(|| {
            let table = said(Command::new("bridge").args(["fdb", "show", "br", "mv-blue"]));
            (
                table.lines().find(|line| line.starts_with("52:54:00:0a:00:02")).map(str::to_owned),
                table,
            )
        });
        assert!(known.is_some_and(|line| line.contains("dev mvtap")), "{dev}");
    }
    vm.verify();
    vm.send("poweroff");
    vm.ends_well();
    sites.delete();
    assert_eq!(all_of(&sites, true), before);
}
