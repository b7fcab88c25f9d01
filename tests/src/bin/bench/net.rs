//! A network card on a tap: round trips between host and guest, and bulk TCP both ways.
//!
//! The tap is in a network namespace of the benchmark's own, so that nobody sees it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use tests::network::{in_private_network, tap, GUEST_ADDRESS};

use ::tests::bench::{Better, Figure, Result, Row, Setup, Target, Vmm, LIMIT};

use crate::rounds::{alternate, row, template};
use crate::Bench;

/// Port numbers of beacon's services.
const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const CHARGEN: u16 = 19;

const TAP: &str = "tap0";
const QUANTITIES: usize = 6;
const MIB: f64 = 1048576.0;
/// How long an answer may take before its datagram counts as lost.
const LOST: Duration = Duration::from_secs(5);

/// Round trips and throughput.
pub fn net(bench: &Bench) -> Result<Vec<Row>> {
    // Errors as text, since they come from another thread.
    let inside =
        in_private_network(|| tap(TAP).map(|()| measure(bench).map_err(|error| error.to_string())));
    match inside.and_then(|made| made) {
        Ok(rows) => Ok(rows?),
        Err(why) => {
            let missing = || Row { minivmm: Figure::Missing(why.clone()), ..rows().remove(0) };
            Ok(vec![missing()])
        }
    }
}

/// Without figures.
fn rows() -> Vec<Row> {
    let time = |what: &str| Row { target: Some(Target::Peers), ..template("net", what, "µs") };
    let rate = |what: &str| Row {
        better: Better::Higher,
        digits: 0,
        target: Some(Target::Peers),
        ..template("net", what, "MiB/s")
    };
    vec![
        time("UDP round trip, median"),
        time("UDP round trip, 99th percentile"),
        time("TCP round trip, median"),
        time("TCP round trip, 99th percentile"),
        rate("TCP into the guest"),
        rate("TCP out of the guest"),
    ]
}

fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let cmdline = format!("virtio=irq ip={GUEST_ADDRESS} ws=2 report=0");
    let setup = Setup { memory_mib: 256, cpus: 1, cmdline, tap: Some(TAP), ..Setup::default() };
    let (trips, bulk) = if bench.quick { (300, 16) } else { (2000, 256) };
    let figures =
        alternate(bench, &[Vmm::Minivmm, Vmm::QemuRom], bench.runs(), QUANTITIES, |vmm| {
            let mut guest = bench.tools.boot(vmm, "net", &setup)?;
            guest.event("ready")?;
            let mut samples = Vec::new();
            for times in [udp_round_trips(trips)?, tcp_round_trips(trips)?] {
                samples.extend([Ok(percentile(&times, 50)), Ok(percentile(&times, 99))]);
            }
            samples.extend([Ok(into_the_guest(bulk)?), Ok(out_of_the_guest(bulk)?)]);
            guest.end()?;
            Ok(samples)
        })?;
    let rows = rows().into_iter().enumerate();
    Ok(rows.map(|(index, template)| row(&figures, index, template)).collect())
}

fn guest_at(port: u16) -> Result<(String, u16)> {
    let (address, _) = GUEST_ADDRESS.split_once('/').ok_or("no prefix")?;
    Ok((address.to_owned(), port))
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(guest_at(port)?)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Times of `count` calls of `trip`, in microseconds, sorted. Some before them do not count.
fn timed(count: u32, mut trip: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for turn in 0..count + count / 10 {
        let begin = Instant::now();
        trip()?;
        if turn >= count / 10 {
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or(f64::NAN)
}

fn udp_round_trips(count: u32) -> Result<Vec<f64>> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(guest_at(ECHO)?)?;
    socket.set_read_timeout(Some(LOST))?;
    let mut answer = [0; 64];
    timed(count, || {
        socket.send(&[7; 64])?;
        socket.recv(&mut answer).map_err(|error| format!("no answer: {error}"))?;
        Ok(())
    })
}

fn tcp_round_trips(count: u32) -> Result<Vec<f64>> {
    let mut stream = connect(ECHO)?;
    let mut answer = [0; 64];
    timed(count, || {
        stream.write_all(&[7; 64])?;
        Ok(stream.read_exact(&mut answer)?)
    })
}

/// Until the guest has taken and acknowledged all of it.
fn into_the_guest(mib: u32) -> Result<f64> {
    let mut stream = connect(DISCARD)?;
    let block = vec![7; 1 << 20];
    let begin = Instant::now();
    for _ in 0..mib {
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut end = [0];
    if stream.read(&mut end)? != 0 {
        return Err("the discard service says something".into());
    }
    Ok(f64::from(mib) / begin.elapsed().as_secs_f64())
}

fn out_of_the_guest(mib: u32) -> Result<f64> {
    let mut stream = connect(CHARGEN)?;
    let mut block = vec![0; 256 << 10];
    let begin = Instant::now();
    let mut bytes = 0;
    while bytes < (mib as usize) << 20 {
        match stream.read(&mut block)? {
            0 => return Err("the guest closed the connection".into()),
            count => bytes += count,
        }
    }
    Ok(bytes as f64 / MIB / begin.elapsed().as_secs_f64())
}
