//! Between two sockets of this process.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use migration::stream::{RecordReader, RecordType, RecordWriter, StreamKind};

use super::*;

/// Sockets at both ends of a proxy.
struct Ends {
    proxy: Proxy,
    listener: TcpListener,
}

impl Ends {
    fn new(shape: Shape) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        Self { proxy: Proxy::shaped(&target, shape, shape), listener }
    }

    fn connect(&self) -> (TcpStream, TcpStream) {
        let source = TcpStream::connect(self.proxy.address()).unwrap();
        let (destination, _) = self.listener.accept().unwrap();
        (source, destination)
    }
}

/// A stream of these records, with payloads of these lengths.
fn stream(kind: StreamKind, records: &[(RecordType, usize)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = RecordWriter::new(&mut bytes, kind).unwrap();
    for (number, (record_type, length)) in records.iter().enumerate() {
        let payload: Vec<u8> = (0..*length).map(|at| (at + number) as u8).collect();
        writer.write(*record_type, &[&payload]).unwrap();
    }
    bytes
}

fn to_end(mut socket: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    bytes
}

const RECORDS: [(RecordType, usize); 5] = [
    (RecordType::Round, 1),
    (RecordType::Pages, 999_999),
    (RecordType::Echo, 1),
    (RecordType::Round, 1),
    (RecordType::Pages, 300_001),
];

#[test]
fn everything_passes_unchanged_in_both_directions() {
    let far = Shape { bandwidth: Some(1 << 30), latency: Duration::from_millis(1) };
    let noise: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    for shape in [Shape::default(), far] {
        let ends = Ends::new(shape);
        for sent in [&stream(StreamKind::Pages, &RECORDS), &noise] {
            let (mut source, mut destination) = ends.connect();
            thread::scope(|scope| {
                let forth = scope.spawn(|| to_end(destination.try_clone().unwrap()));
                let back = scope.spawn(|| to_end(source.try_clone().unwrap()));
                for mut socket in [&source, &destination] {
                    socket.write_all(sent).unwrap();
                    socket.shutdown(Shutdown::Write).unwrap();
                }
                assert!(forth.join().unwrap() == *sent && back.join().unwrap() == *sent);
            });
            source.flush().unwrap();
            destination.flush().unwrap();
        }
    }
}

#[test]
fn a_record_is_held_with_all_that_follows_and_nothing_that_precedes() {
    let ends = Ends::new(Shape::default());
    let whole = stream(StreamKind::Pages, &RECORDS);
    let second_round = stream(StreamKind::Pages, &RECORDS[..3]).len();
    for after in [false, true] {
        let spot = Spot::new(On::Pages, Way::Forth, RecordType::Round).nth(1);
        let held = ends.proxy.hold(if after { spot.after() } else { spot });
        let (mut source, mut destination) = ends.connect();
        assert!(!held.reached());
        source.write_all(&whole).unwrap();
        held.wait();
        let until =
            if after { stream(StreamKind::Pages, &RECORDS[..4]).len() } else { second_round };
        let mut bytes = vec![0; until];
        destination.read_exact(&mut bytes).unwrap();
        assert!(bytes == whole[..until]);
        destination.set_nonblocking(true).unwrap();
        assert!(destination.read(&mut [0]).is_err(), "something follows");
        destination.set_nonblocking(false).unwrap();
        held.release();
        source.shutdown(Shutdown::Write).unwrap();
        assert!(to_end(destination) == whole[until..]);
    }
}

#[test]
fn a_spot_is_one_record_of_one_connection_in_one_direction() {
    let ends = Ends::new(Shape::default());
    let proxy = &ends.proxy;
    let spot = Spot::new(On::Page(1), Way::Forth, RecordType::Pages).round(1);
    let touched = proxy.edit(spot, Edit::FlipPayload(7));
    let mut last = stream(StreamKind::Pages, &RECORDS);
    let begin = stream(StreamKind::Pages, &RECORDS[..4]).len() + 32;
    for connection in 0..3 {
        let (mut source, mut destination) = ends.connect();
        destination.write_all(&stream(StreamKind::Pages, &RECORDS)).unwrap();
        source.write_all(&stream(StreamKind::Pages, &RECORDS)).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let bytes = to_end(destination);
        if connection == 1 {
            last[begin + 7] ^= 0xff;
        }
        assert!(bytes == last, "connection {connection}");
        if connection == 1 {
            last[begin + 7] ^= 0xff;
        }
        assert_eq!(touched.happened(), connection >= 1);
    }
}

#[test]
fn edits_are_seen_by_a_reader() {
    let read = |edit: Edit| {
        let ends = Ends::new(Shape::default());
        let spot = Spot::new(On::Main, Way::Forth, RecordType::Commit);
        let touched = ends.proxy.edit(spot, edit);
        let (mut source, destination) = ends.connect();
        let records = [(RecordType::Complete, 9), (RecordType::Commit, 1), (RecordType::Done, 0)];
        source.write_all(&stream(StreamKind::Migration, &records)).unwrap();
        touched.wait();
        let mut reader = RecordReader::new(destination, StreamKind::Migration).unwrap();
        assert_eq!(reader.next_record().unwrap().record_type, RecordType::Complete);
        let mut outcome = Vec::new();
        loop {
            match reader.next_record() {
                Ok(record) if record.record_type == RecordType::Done => break outcome.join(" "),
                Ok(record) => outcome.push(format!("{:?}", record.record_type)),
                Err(error) => break error.problem.to_string(),
            }
        }
    };
    assert!(read(Edit::FlipHeader(9)).contains("checksum"));
    assert!(read(Edit::FlipPayload(0)).contains("checksum"));
    assert!(read(Edit::Truncate(Cut::Fin)).contains("ends"));
    assert!(read(Edit::Duplicate).contains("number"));
    assert_eq!(read(Edit::Delay(Duration::from_millis(1))), "Commit");
}

#[test]
fn a_cut_ends_what_it_names_as_it_says() {
    for (how, reset) in [(Cut::Fin, false), (Cut::Reset, true)] {
        let ends = Ends::new(Shape::default());
        let hello = stream(StreamKind::Migration, &[(RecordType::Hello, 1)]);
        let join = stream(StreamKind::Pages, &[(RecordType::Join, 1)]);
        let (mut main, mut other_main) = ends.connect();
        let (mut page, mut other_page) = ends.connect();
        for (from, to, bytes) in
            [(&mut main, &mut other_main, &hello), (&mut page, &mut other_page, &join)]
        {
            from.write_all(bytes).unwrap();
            to.read_exact(&mut vec![0; bytes.len()]).unwrap();
        }
        ends.proxy.cut(On::Main, how);
        for end in [&mut main, &mut other_main] {
            let read = end.read(&mut [0; 9]).map_err(|error| error.kind());
            let expected = if reset { Err(std::io::ErrorKind::ConnectionReset) } else { Ok(0) };
            assert_eq!(read, expected);
        }
        page.write_all(&join[16..]).unwrap();
        other_page.read_exact(&mut vec![0; join.len() - 16]).unwrap();
    }
}

#[test]
fn what_is_stalled_is_swallowed_and_new_connections_are_a_matter_of_their_own() {
    let ends = Ends::new(Shape::default());
    let hello = stream(StreamKind::Migration, &[(RecordType::Hello, 1)]);
    let (mut source, mut destination) = ends.connect();
    source.write_all(&hello).unwrap();
    destination.read_exact(&mut vec![0; hello.len()]).unwrap();
    ends.proxy.stall(On::Main);
    source.write_all(&vec![7; 8 << 20]).unwrap();
    source.shutdown(Shutdown::Write).unwrap();
    destination.set_nonblocking(true).unwrap();
    assert!(destination.read(&mut [0]).is_err(), "something came");

    let (mut source, mut destination) = ends.connect();
    source.write_all(&hello).unwrap();
    destination.read_exact(&mut vec![0; hello.len()]).unwrap();
    ends.proxy.close_door(true);
    let mut source = TcpStream::connect(ends.proxy.address()).unwrap();
    assert!(matches!(source.read(&mut [0]), Ok(0) | Err(_)));
}
