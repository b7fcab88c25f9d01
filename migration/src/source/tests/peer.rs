//! A destination that lies about memory that is to follow its guest.

use super::*;
use crate::source::peer::{read_continued, read_main, Message};
use crate::stream::session::{Drained, Echo, Payload, Recovered};
use crate::transport::Transport;

const ID: [u8; 16] = [0x11; 16];

fn layout() -> Arc<MemoryLayout> {
    Arc::new(MemoryLayout::new([PageRange::new(Gfn(0), 16).unwrap()]).unwrap())
}

/// What comes to the engine of what `answer` says to `read`.
fn told(
    kind: StreamKind,
    read: impl FnOnce(Arc<dyn Transport>, &mpsc::Sender<Input>),
    answer: impl FnOnce(&mut Out),
) -> Vec<Input> {
    let network = LocalNetwork::new();
    let near = network.connect(Duration::ZERO).unwrap();
    let far = network.accept(Duration::from_secs(10)).unwrap().unwrap();
    let mut out = RecordWriter::new(Stream(Arc::clone(&far)), kind).unwrap();
    out.send(&Hello { id: ID, program: "0.1.0", features: 0 }).unwrap();
    answer(&mut out);
    far.shutdown();
    let (sender, inbox) = mpsc::channel();
    read(near, &sender);
    drop(sender);
    inbox.iter().collect()
}

/// After RECOVER, of a source that has offered two page connections.
fn continued(answer: impl FnOnce(&mut Out)) -> Vec<Input> {
    let read = |transport, inbox: &mpsc::Sender<Input>| {
        read_continued(MigrationId(ID), 2, &layout(), transport, inbox);
    };
    told(StreamKind::Continue, read, answer)
}

fn missing(out: &mut Out, gfn: u64, pages: u64) {
    let mut table = Vec::new();
    crate::stream::encode_runs(&[PageRange::new(Gfn(gfn), pages).unwrap()], &mut table);
    out.write(RecordType::Missing, &[&table]).unwrap();
}

#[track_caller]
fn assert_breach(words: &str, inputs: &[Input]) {
    match inputs {
        [Input::Lost(cause, text)] => {
            assert_eq!(*cause, Cause::Protocol, "{text}");
            assert!(text.contains(words), "{text:?} without {words:?}");
        }
        others => panic!("{} inputs, expected one breach: {words}", others.len()),
    }
}

#[test]
fn what_is_missing_is_named_once_and_in_full() {
    let honest = continued(|out| {
        out.send(&Recovered { pages: 3, connections: 2 }).unwrap();
        missing(out, 3, 2);
        missing(out, 9, 1);
    });
    match &honest[..] {
        [Input::Peer(Message::Recovered { missing, connections: 2 }), Input::Lost(..)] => {
            assert_eq!(missing.count(), 3);
        }
        others => panic!("{} inputs", others.len()),
    }
    let recovered = |pages, connections| Recovered { pages, connections };
    for connections in [0, 3] {
        let inputs = continued(|out| out.send(&recovered(0, connections)).unwrap());
        assert_breach(&format!("{connections} connections"), &inputs);
    }
    let inputs = continued(|out| {
        out.send(&recovered(3, 1)).unwrap();
        missing(out, 3, 2);
        missing(out, 4, 1);
    });
    assert_breach("second time", &inputs);
    let inputs = continued(|out| {
        out.send(&recovered(3, 1)).unwrap();
        missing(out, 3, 4);
    });
    assert_breach("missing pages", &inputs);
    let inputs = continued(|out| {
        out.send(&recovered(3, 1)).unwrap();
        missing(out, 15, 2);
    });
    assert_breach("region", &inputs);
    let inputs = continued(|out| {
        out.send(&recovered(3, 1)).unwrap();
        out.send(&Ready { load_us: 0 }).unwrap();
    });
    assert_breach("MISSING", &inputs);
    let inputs = continued(|out| {
        out.send(&recovered(0, 1)).unwrap();
        out.send(&Ready { load_us: 0 }).unwrap();
    });
    match &inputs[..] {
        [Input::Peer(_), last] => assert_breach("DRAINED", std::slice::from_ref(last)),
        others => panic!("{} inputs", others.len()),
    }
}

/// After OFFER; `last` comes after READY.
fn answered<P: Payload + serde::Serialize>(may_switch: bool, last: &P) -> Vec<Input> {
    let read = |transport, inbox: &mpsc::Sender<Input>| {
        read_main(MigrationId(ID), 1, may_switch, transport, inbox);
    };
    told(StreamKind::Migration, read, |out| {
        out.send(&Accept { token: [1; 16], connections: 1 }).unwrap();
        out.send(&Ready { load_us: 0 }).unwrap();
        out.send(last).unwrap();
    })
}

#[test]
fn memory_is_given_back_and_drained_in_postcopy_only() {
    let echo = Echo { number: 7 };
    let inputs = answered(true, &echo);
    assert!(matches!(inputs[2], Input::Peer(Message::Echo(7))), "{} inputs", inputs.len());
    assert_breach("Echo", &answered(false, &echo)[2..]);
    let drained = Drained {
        demand_pages: 0,
        prepaged_pages: 0,
        pushed_pages: 0,
        zero_pages: 0,
        local_pages: 0,
        duplicate_pages: 0,
        requests: 0,
        drain_us: 0,
        cpu_us: 0,
        latency: Vec::new(),
        blocked: Vec::new(),
    };
    for may_switch in [true, false] {
        // Nothing runs there yet.
        assert_breach("Drained", &answered(may_switch, &drained)[2..]);
    }
}
