//! Peers that lie while memory follows its guest: it is noticed and named, nothing wrong gets into memory, and an honest
//! connection goes on where the other ended.

use std::io::Write;
use std::time::Instant;

use migration::stream::{RecordType, StreamKind};
use serde_json::Value;
use tests::{number, Host, Migrating, Vm, PATIENCE};

use super::liar::{By, Liar, Lie, Out};
use super::{header, peak, peak_if_alive, MEMORY_KIB};

const GUEST: &str = "ws=16 dirty=4000 pattern=random report=250 pace=0";
/// Silence that a peer may be taken for dead after, short enough to wait for.
const DEAD: [&str; 2] = ["--dead-after", "3s"];
/// Memory does not come by itself before somebody needs it.
const SLOW: [&str; 2] = ["--bandwidth", "16M"];

/// A table of one run and what follows it (section 3.5).
fn run(gfn: u64, pages: u32) -> Vec<u8> {
    [&[1, 0, 0, 0, 0, 0, 0, 0][..], &gfn.to_le_bytes(), &pages.to_le_bytes(), &[0; 4]].concat()
}

fn current(host: &Host) -> Value {
    let asked = host.cli(&["migration", "vm", "--json"]);
    serde_json::from_str::<Value>(&asked.stdout).unwrap_or_default()["current"].clone()
}

#[track_caller]
fn until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline, "it does not come to that");
        std::thread::yield_now();
    }
}

/// Whether somebody says what was wrong, or that a connection was lost, where the one that hung up for it was
/// faster.
fn says(log: &str, words: &str) -> bool {
    log.contains(words) || log.contains("was lost")
}

/// One lie, and what is said of it by the end that it was told to. Then all is honest, and ends well.
#[track_caller]
fn one_lie(kind: StreamKind, by: By, words: &str, args: &[&str], lie: Lie) {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(GUEST, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let (had_source, had_destination) = (peak(&source), peak(&destination));
    let liar = Liar::to(&to, kind, by, 1, lie);
    let dead: &[&str] = if args.contains(&DEAD[0]) { &[] } else { &DEAD };
    let args = [&["--mode", "postcopy", "--json"][..], dead, args].concat();
    let migrating = Migrating::start(&a, &liar.address(), &args);
    until(|| liar.is_done());
    if args.contains(&"off") {
        until(|| current(&a)["interruptions"].as_u64() > Some(0));
        a.ok(&["migrate-set", "vm", "--push", "on"]);
    }
    // It may have ended by now.
    let grown = peak_if_alive(&source).unwrap_or(had_source) - had_source;
    assert!(grown < MEMORY_KIB, "{words}: the source grew by {grown} KiB");
    let finished = migrating.end();
    if finished.code == Some(1) {
        // It was told before the guest moved.
        assert!(finished.stdout.contains("running-here"), "{words}: {finished:#?}");
        source.verify();
        // Nothing keeps it: not even state that waited for a page.
        destination.end();
        let all = [source.log(), destination.log(), finished.stdout].concat();
        assert!(says(&all, words) && !all.contains("panicked"), "{words}: {all}");
        return;
    }
    assert_eq!(finished.code, Some(0), "{words}: {finished:#?}, {}", destination.log());
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert!(report["postcopy"]["incomplete"].is_null(), "{words}: {report}");
    let told: &Vm = match by {
        By::Source => &destination,
        By::Destination => &source,
    };
    assert!(says(&told.log(), words), "{words}: {}", told.log());
    assert!(!told.log().contains("panicked"), "{}", told.log());
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
    // The guest's memory is all that it may have: no payload is kept.
    let grown = peak_if_alive(&destination).unwrap_or(had_destination) - had_destination;
    assert!(grown < MEMORY_KIB, "{words}: the destination grew by {grown} KiB");
}

/// The first PAGES of a connection becomes something else.
fn instead_of_pages(record_type: RecordType, then: impl FnOnce()) -> bool {
    let wanted = record_type == RecordType::Pages;
    if wanted {
        then();
    }
    wanted
}

pub fn a_destination_outlives_a_source_that_lies_after_the_switch() {
    let pushed: [(&str, Lie); 7] = [
        ("come a second time", |record_type, payload, out| {
            instead_of_pages(record_type, || {
                out.write(record_type, payload);
                out.write(record_type, payload);
            })
        }),
        ("is not within one region", |record_type, payload, out| {
            instead_of_pages(record_type, || {
                let mut payload = payload.to_vec();
                payload[8..16].copy_from_slice(&(1_u64 << 39).to_le_bytes());
                out.write(record_type, &payload);
            })
        }),
        ("checksum", |record_type, payload, out| {
            instead_of_pages(record_type, || unchecked(out, payload, 2))
        }),
        ("checksum", |record_type, payload, out| {
            instead_of_pages(record_type, || unchecked(out, payload, 0))
        }),
        ("come a second time", |record_type, payload, out| {
            // What came is then to be zeros.
            instead_of_pages(record_type, || {
                out.write(record_type, payload);
                out.write(RecordType::Zero, &[&[1, 0, 0, 0, 0, 0, 0, 0], &payload[8..24]].concat());
            })
        }),
        ("PAGES or ZERO", |record_type, _, out| {
            instead_of_pages(record_type, || out.write(RecordType::Round, &[0]))
        }),
        ("bytes of data", |record_type, payload, out| {
            instead_of_pages(record_type, || out.write(record_type, &payload[..payload.len() - 1]))
        }),
    ];
    for (words, lie) in pushed {
        one_lie(StreamKind::Pages, By::Source, words, &[], lie);
    }
    one_lie(
        StreamKind::Requests,
        By::Source,
        "come a second time",
        &[],
        |record_type, payload, out| {
            instead_of_pages(record_type, || {
                out.write(record_type, payload);
                out.write(record_type, payload);
            })
        },
    );
    // It is alive, and one answer never comes. What goes out before anybody asks does.
    one_lie(
        StreamKind::Requests,
        By::Source,
        "does not answer requests",
        &["--push", "off", "--prepaging", "off"],
        |record_type, _, out| record_type == RecordType::Pages && out.count > 4,
    );
    one_lie(
        StreamKind::Migration,
        By::Source,
        "said that it is done",
        &SLOW,
        |record_type, payload, out| {
            let commit = record_type == RecordType::Commit;
            if commit {
                out.write(record_type, payload);
                out.write(RecordType::Done, &[]);
            }
            commit
        },
    );
}

/// A REQUEST becomes something else.
fn instead_of_request(record_type: RecordType, then: impl FnOnce()) -> bool {
    let wanted = record_type == RecordType::Request;
    if wanted {
        then();
    }
    wanted
}

/// PAGES whose checksum is none, or wrong.
fn unchecked(out: &mut Out, payload: &[u8], flags: u16) {
    let mut head = header(RecordType::Pages as u16, flags, payload.len() as u64);
    head[16..24].copy_from_slice(&out.count.to_le_bytes());
    let checksum = crc32c::crc32c(&head[..28]);
    head[28..].copy_from_slice(&checksum.to_le_bytes());
    let padding = vec![0; payload.len().next_multiple_of(8) - payload.len()];
    let _ = out.socket.write_all(&[&head[..], payload, &padding].concat());
}

pub fn a_source_outlives_a_destination_that_lies_after_the_switch() {
    let asked: [(&str, Lie); 3] = [
        ("is not within one region", |record_type, _, out| {
            instead_of_request(record_type, || out.write(record_type, &run(1 << 39, 1)))
        }),
        ("REQUEST must follow", |record_type, payload, out| {
            instead_of_request(record_type, || out.write(RecordType::Missing, payload))
        }),
        ("must be 1 to 64", |record_type, payload, out| {
            instead_of_request(record_type, || {
                out.write(record_type, &[&65_u32.to_le_bytes(), &payload[4..]].concat());
            })
        }),
    ];
    for (words, lie) in asked {
        one_lie(StreamKind::Requests, By::Destination, words, &SLOW, lie);
    }
    // Whether the guest runs there has to be asked.
    let nonsense: Lie = |record_type, _, out| {
        let resumed = record_type == RecordType::Resumed;
        if resumed {
            out.write(RecordType::Loaded, &[0]);
        }
        resumed
    };
    let words = "once each must follow";
    one_lie(StreamKind::Migration, By::Destination, words, &[], nonsense);
    // It has not, and the pages that it lacks are nowhere else.
    let early: Lie = |record_type, payload, out| {
        let resumed = record_type == RecordType::Resumed;
        if resumed {
            out.write(record_type, payload);
            out.write(RecordType::Drained, &[0; 11]);
        }
        resumed
    };
    let args = ["--push", "off"];
    one_lie(StreamKind::Migration, By::Destination, "it has all and lacks", &args, early);
    // It has them all and never says so, and is not dead.
    let silent: Lie = |record_type, _, _| record_type == RecordType::Drained;
    let args = ["--dead-after", "1s"];
    one_lie(StreamKind::Migration, By::Destination, "does not say that it has it", &args, silent);
}

/// Its kernel is loaded again, into memory of which a page never comes.
pub fn a_guest_that_reboots_without_its_memory_can_be_ended() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run("ws=8 dirty=0 verify=off report=0 pace=0", &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    // Where the ACPI tables are, which the guest has read.
    const TABLES: std::ops::Range<u64> = 0xe0..0x100;
    let lie: Lie = |record_type, payload, _| {
        let gfn = || u64::from_le_bytes(payload[8..16].try_into().unwrap());
        record_type == RecordType::Request && TABLES.contains(&gfn())
    };
    let liar = Liar::to(&to, StreamKind::Requests, By::Destination, 1, lie);
    let args = ["--mode", "postcopy", "--push", "off", "--prepaging", "off", "--dead-after", "60s"];
    let migrating = Migrating::start(&a, &liar.address(), &args);
    until(|| current(&b)["phase"] == "draining");
    destination.ask("reboot", "reboot");
    until(|| liar.is_done());
    assert_eq!(b.cli(&["kill", "vm"]).code, Some(0));
    let ended = destination.end();
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    // Its source is told, and keeps nothing for it.
    let finished = migrating.end();
    assert_eq!(finished.code, Some(8), "{finished:#?}");
    assert!(finished.stdout.contains("the guest ended"), "{finished:#?}");
    source.ends_well();
}

/// What is asked for again and again costs time, and nothing else.
pub fn floods_of_requests_are_answered_once() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(GUEST, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let had = peak(&source);
    let liar =
        Liar::to(&to, StreamKind::Requests, By::Destination, 1, |record_type, payload, out| {
            if record_type != RecordType::Request {
                return false;
            }
            for _ in 0..20_000 {
                out.write(record_type, payload);
            }
            true
        });
    let args = ["--mode", "postcopy", "--json", "--prepaging", "off"];
    let mut migrating = Migrating::start(&a, &liar.address(), &args);
    // Its process ends with the migration.
    let mut most = had;
    until(|| {
        most = most.max(peak_if_alive(&source).unwrap_or(0));
        migrating.is_over()
    });
    let finished = migrating.end();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    let there = &report["postcopy"]["destination"];
    assert_eq!(number(there, "duplicate_pages"), 0, "{report}");
    assert_eq!(number(&report["postcopy"], "interruptions"), 0, "{report}");
    let grown = most - had;
    assert!(grown < MEMORY_KIB, "it grew by {grown} KiB");
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

/// An end that never comes to its senses: both can be ended, and neither makes anything up.
pub fn a_peer_that_always_lies_pauses_postcopy_and_both_ends_can_be_ended() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(GUEST, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let twice: Lie = |record_type, payload, out| {
        instead_of_pages(record_type, || {
            out.write(record_type, payload);
            out.write(record_type, payload);
        })
    };
    let liar = Liar::to(&to, StreamKind::Pages, By::Source, u32::MAX, twice);
    // Pages that the guest does not use come by push alone, which never gets far.
    let args = ["--mode", "postcopy", "--bandwidth", "1M", "--prepaging", "off"];
    let migrating = Migrating::start(&a, &liar.address(), &[&args[..], &DEAD].concat());
    until(|| current(&b)["phase"] == "draining" && current(&a)["interruptions"].as_u64() > Some(2));
    until(|| current(&b)["note"].as_str().is_some_and(|note| says(note, "come a second time")));
    // So that it stays interrupted.
    drop(liar);
    until(|| current(&a)["interrupted"] == true);
    assert!(number(&current(&b), "missing_pages") > 0);
    source.terminate();
    assert_eq!(migrating.end().code, Some(8));
    source.ends_well();
    let _ = b.cli(&["kill", "vm"]);
    destination.end();
    assert!(!destination.log().contains("panicked"), "{}", destination.log());
}
