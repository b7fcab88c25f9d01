//! One run: a guest with traffic that is moved to the other host and back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ::tests::bench::{Result, Tools};
use ::tests::network::{guest, HOST_ADDRESS};
use ::tests::topology::{Site, Sites, Topology};
use serde_json::{json, Value};

use crate::datagrams::{Datagrams, Stream};
use crate::download::{Course, Download, BIN};
use crate::subject::{How, Mode, Moved, Running, Subject};

/// Ports of beacon's services.
const ECHO: u16 = 7;
const CHARGEN: u16 = 19;
/// What the guest does besides.
const LOAD: &str = "ws=32 dirty=1000";
/// What is observed before the order to migrate, and after the end of the migration.
const BEFORE: Duration = Duration::from_millis(1500);
const AFTER: Duration = Duration::from_millis(1500);
/// Receive buffer of a download through Open vSwitch in user space, bytes. Its packet sockets hold some 90 frames of full
/// size (net.core.rmem_default), and beacon, which has no congestion control, fills whatever window it is given.
const SMALL_BUFFER: usize = 32 << 10;
/// Traffic that has just begun comes to rest.
const SETTLE: Duration = Duration::from_millis(300);

/// What a run gave.
#[derive(Debug)]
pub struct Sample {
    /// Datagrams sent from the order until after the migration.
    pub sent: u64,
    /// Of those, not answered.
    pub lost: u64,
    /// When the first and the last of them was sent, ms from the guest's start at its new host, if that can be told.
    pub lost_at_ms: Option<(f64, f64)>,
    /// Of those, answered more than once.
    pub doubled: u64,
    /// What would have been lost in that time as before it.
    pub lost_anyway: f64,
    /// The longest time without an answer from the order on, ms; if that can be told apart, of those that the guest's
    /// standing is a part of.
    pub silence_ms: f64,
    /// The longest of the others, ms, if that can be told apart.
    pub other_silence_ms: Option<f64>,
    /// When it began, ms from the guest's start at its new host; below zero while it was at the old one.
    pub other_silence_at_ms: Option<f64>,
    /// The longest time before it, ms.
    pub silence_before_ms: f64,
    /// How long the guest stood, ms.
    pub gap_ms: f64,
    /// The download; not where connections end as the guest moves.
    pub course: Option<Course>,
    /// How long the guest stood as it moved back under the download, ms.
    pub course_gap_ms: Option<f64>,
    /// What the VMM reported.
    pub reports: Vec<Value>,
}

impl Sample {
    /// Datagrams lost by the move.
    pub fn lost_by_move(&self) -> f64 {
        (self.lost as f64 - self.lost_anyway).max(0.0)
    }

    /// For who waits.
    pub fn summary(&self) -> String {
        let (lost, silence, gap) = (self.lost_by_move(), self.silence_ms, self.gap_ms);
        let other = self.other_silence_ms.zip(self.other_silence_at_ms);
        let other =
            other.map_or(String::new(), |(ms, at)| format!(", another {ms:.1} ms at {at:+.0} ms"));
        let lost_at = self.lost_at_ms.map_or(String::new(), |(first, last)| {
            format!(" (sent at {first:+.1} to {last:+.1} ms)")
        });
        format!(
            "{lost:.0} of {} lost{lost_at}, silence {silence:.1} ms, gap {gap:.1} ms{other}",
            self.sent
        )
    }

    /// All of it.
    pub fn json(&self) -> Value {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        json!({
            "sent": self.sent, "lost": self.lost, "lost_at_ms": self.lost_at_ms, "doubled": self.doubled, "lost_anyway": self.lost_anyway,
            "lost_by_move": self.lost_by_move(), "silence_ms": self.silence_ms,
            "other_silence_ms": self.other_silence_ms, "other_silence_at_ms": self.other_silence_at_ms, "silence_before_ms": self.silence_before_ms, "gap_ms": self.gap_ms,
            "download": self.course.as_ref().map(|course| json!({
                "bin_ms": ms(BIN), "bytes_per_bin": course.bins, "order_bin": course.order,
                "bytes_per_s_before": course.before, "silence_ms": ms(course.silence),
                "back_ms": course.back.map(ms), "gap_ms": self.course_gap_ms,
            })),
            "reports": self.reports,
        })
    }
}

fn address(port: u16) -> Result<SocketAddr> {
    Ok(format!("{}:{port}", guest(port).0).parse()?)
}

/// Waits until the guest answers C, or, where it cannot be reached, does nothing.
fn answers(c: &Site) {
    c.place.on(|| drop(tests::network::connect(ECHO)));
}

/// Runs one guest.
pub fn sample(
    tools: &Arc<Tools>,
    sites: &Sites,
    topology: Topology,
    subject: Subject,
    how: How,
    rate: u64,
) -> Result<Sample> {
    if topology == Topology::Nat {
        return behind_translation(tools, sites, subject, how, rate);
    }
    let Sites { a, b, c, .. } = sites;
    let mut running = subject.boot(tools, a, how, LOAD)?;
    answers(c);
    let (moved, stream, begin, end) = under_datagrams(&mut running, sites, rate)?;
    let (sent, lost, doubled) = stream.between(moved.order, end);
    let (sent_before, lost_before, _) = stream.between(begin, moved.order);

    let (silence, other, other_at, lost_at) = match moved.stood {
        Some(stood) => {
            let [(silence, _), (other, at)] = stream.silences(moved.order, end, stood);
            let from_start = |at: Instant| {
                let after = at.saturating_duration_since(stood.1).as_secs_f64();
                let before = stood.1.saturating_duration_since(at).as_secs_f64();
                (after - before) * 1e3
            };
            let lost_at = stream.lost_at(moved.order, end);
            let lost_at = lost_at.map(|(first, last)| (from_start(first), from_start(last)));
            (silence, Some(other), Some(from_start(at)), lost_at)
        }
        None => (stream.silence(moved.order, end), None, None, None),
    };

    let from = address(CHARGEN)?;
    let buffer = (topology == Topology::Ovs).then_some(SMALL_BUFFER);
    let start = move || Download::start(from, buffer).map_err(|error| error.to_string());
    let download = c.place.on(start)?;
    sleep(SETTLE + BEFORE);
    let back = running.migrate(b, a)?;
    sleep(AFTER);
    let course = download.finish(back.order)?;
    running.guest.ask("verify", "verified")?;
    let report = running.guest.ask("report", "report")?;
    if report["net_irqs_lost"] != 0 {
        return Err(format!("an interrupt of the card was lost: {report}").into());
    }
    running.guest.end()?;
    Ok(Sample {
        sent,
        lost,
        lost_at_ms: lost_at,
        doubled,
        lost_anyway: lost_before as f64 * sent as f64 / sent_before.max(1) as f64,
        silence_ms: silence.as_secs_f64() * 1e3,
        other_silence_ms: other.map(|other| other.as_secs_f64() * 1e3),
        other_silence_at_ms: other_at,
        silence_before_ms: stream.silence(begin, moved.order).as_secs_f64() * 1e3,
        gap_ms: moved.gap_ms,
        course: Some(course),
        course_gap_ms: Some(back.gap_ms),
        reports: vec![moved.report, back.report],
    })
}

/// Moves the guest from A to B; the stream, and between when and when it is looked at.
fn under_datagrams(
    running: &mut Running,
    sites: &Sites,
    rate: u64,
) -> Result<(Moved, Stream, Instant, Instant)> {
    let to = address(ECHO)?;
    let stream =
        sites.c.place.on(move || Datagrams::start(to, rate).map_err(|error| error.to_string()))?;
    sleep(SETTLE);
    let begin = Instant::now();
    sleep(BEFORE);
    sites.b.forget_flows();
    let moved = running.migrate(&sites.a, &sites.b)?;
    sleep(AFTER);
    let end = Instant::now();
    Ok((moved, stream.finish()?, begin, end))
}

/// The datagrams are the guest's own, to C: nothing that comes to the old host's address finds the guest. Its
/// counters tell.
fn behind_translation(
    tools: &Arc<Tools>,
    sites: &Sites,
    subject: Subject,
    how: How,
    rate: u64,
) -> Result<Sample> {
    let Sites { a, b, c, .. } = sites;
    let port = c.place.on(|| echo_service().map_err(|error| error.to_string()))?;
    let options = format!("{LOAD} gw={HOST_ADDRESS} udp-to={}:{port} udp-rate={rate}", c.address());
    let mut running = subject.boot(tools, a, how, &options)?;
    sleep(SETTLE);
    running.guest.ask("mark", "mark")?;
    let begin = running.guest.ask("report", "report")?;
    sleep(BEFORE);
    let before = running.guest.ask("report", "report")?;
    running.guest.ask("mark", "mark")?;
    let moved = running.migrate(a, b)?;
    sleep(AFTER);
    let after = running.guest.ask("report", "report")?;
    running.guest.end()?;
    let number =
        |report: &Value, name: &str| report[name].as_u64().ok_or(format!("no {name} in {report}"));
    let passed = |name: &str, from: &Value, to: &Value| -> Result<u64> {
        Ok(number(to, name)?.saturating_sub(number(from, name)?))
    };
    let ms = |report: &Value| -> Result<f64> {
        Ok(report["udp_gap_max_us"].as_f64().ok_or("no gap")? / 1e3)
    };
    let sent = passed("udp_sent", &before, &after)?;
    let sent_before = passed("udp_sent", &begin, &before)?;
    let lost_before = passed("udp_lost", &begin, &before)?;
    Ok(Sample {
        sent,
        lost: passed("udp_lost", &before, &after)?,
        lost_at_ms: None,
        doubled: passed("udp_duplicates", &before, &after)?,
        lost_anyway: lost_before as f64 * sent as f64 / sent_before.max(1) as f64,
        silence_ms: ms(&after)?,
        other_silence_ms: None,
        other_silence_at_ms: None,
        silence_before_ms: ms(&before)?,
        gap_ms: moved.gap_ms,
        course: None,
        course_gap_ms: None,
        reports: vec![moved.report],
    })
}

/// An echo service at C; it ends with the program.
fn echo_service() -> Result<u16> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let port = socket.local_addr()?.port();
    std::thread::spawn(move || {
        let mut datagram = [0; 2000];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
    Ok(port)
}

/// The highest rate up to `wanted`, halved as often as needed, at which a guest that stays loses nothing.
pub fn sustained(tools: &Arc<Tools>, sites: &Sites, wanted: u64) -> Result<u64> {
    const LEAST: u64 = 100;
    let how = How { mode: Mode::Precopy, bandwidth: None, own_wire: false };
    let running = Subject::Minivmm.boot(tools, &sites.a, how, LOAD)?;
    answers(&sites.c);
    let mut rate = wanted;
    loop {
        let to = address(ECHO)?;
        let stream = sites
            .c
            .place
            .on(move || Datagrams::start(to, rate).map_err(|error| error.to_string()))?;
        let begin = Instant::now();
        sleep(SETTLE + BEFORE);
        let end = Instant::now();
        let (sent, lost, _) = stream.finish()?.between(begin, end);
        eprintln!("without a migration, {rate}/s: {lost} of {sent} lost");
        if lost == 0 {
            running.guest.end()?;
            return Ok(rate);
        }
        rate /= 2;
        if rate < LEAST {
            return Err(format!("the guest loses datagrams at {LEAST}/s").into());
        }
    }
}
