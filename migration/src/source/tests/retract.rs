//! A destination that says that memory was given back which nobody spoke of.

use super::*;
use crate::stream::session::{Echo, Join, Joined};
use crate::vm::Mode;

/// Accepts a connection that joins, and takes what comes on it.
fn join(network: &LocalNetwork, kind: StreamKind) {
    let transport = network.accept(Duration::from_secs(10)).unwrap().unwrap();
    let mut records = RecordReader::new(Stream(Arc::clone(&transport)), kind).unwrap();
    let join: Join = records.next_record().unwrap().decode("JOIN").unwrap();
    let mut out = RecordWriter::new(Stream(transport), kind).unwrap();
    out.send(&Joined { index: join.index }).unwrap();
    thread::spawn(move || {
        let vm = SimulatedVm::new(small_layout()).unwrap();
        // Until the source closes it.
        while let Ok((record_type, header)) = records.next_header() {
            if record_type == RecordType::Pages {
                records.read_live_pages(&header, &vm).unwrap();
                continue;
            }
            let record = records.read_record(record_type, &header).unwrap();
            if record_type == RecordType::Echo {
                let echo: Echo = record.decode("ECHO").unwrap();
                out.send(&echo).unwrap();
            }
        }
    });
}

/// After one round of a migration that ends as post-copy: `answers` follow the source's ECHO, which is number 0.
fn retracted(answers: &[u32]) -> (Cause, String) {
    // It says nothing in between, nor anything more.
    let (dead, loaded) = (Duration::from_secs(30), Duration::from_millis(100));
    let timing = Timing { dead, loaded, ..Timing::default() };
    let options = SourceOptions {
        timing,
        mode: Mode::Hybrid,
        downtime: Duration::ZERO,
        limits: Limits { dirty_pages: 0, ..Limits::default() },
        ..SourceOptions::default()
    };
    offer_with(options, |network, records, out, id| {
        hello(out, id);
        out.send(&Accept { token: [1; 16], connections: 1 }).unwrap();
        join(network, StreamKind::Pages);
        join(network, StreamKind::Requests);
        out.send(&Ready { load_us: 0 }).unwrap();
        while records.next_record().is_ok_and(|record| record.record_type != RecordType::Echo) {}
        for number in answers {
            let _ = out.send(&Echo { number: *number });
        }
    })
}

#[test]
fn memory_is_given_back_by_the_answer_of_its_own_number() {
    let (_, text) = retracted(&[0]);
    assert!(text.contains("did not load the state"), "it goes on to the switch: {text}");
    let (cause, text) = retracted(&[1]);
    assert_eq!(cause, Cause::Protocol, "{text}");
    assert!(text.contains("Echo(1)"), "{text}");
}
