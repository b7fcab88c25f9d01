//! A peer that lies at one point: the real program behind it, and a record changed on its way.

use std::io::BufReader;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;

use migration::stream::{RecordReader, RecordType, RecordWriter, StreamError, StreamKind};

/// Who lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Source,
    Destination,
}

/// Where records go on.
pub struct Out {
    pub records: RecordWriter<TcpStream>,
    /// For what is no good record.
    pub socket: TcpStream,
    /// Records that went on over this connection.
    pub count: u64,
}

impl Out {
    pub fn write(&mut self, record_type: RecordType, payload: &[u8]) {
        self.count += 1;
        // The other end may have had enough.
        let _ = self.records.write(record_type, &[payload]);
    }
}

/// Does what it likes instead of letting a record pass, and says whether that was a lie; `false`: it passes.
pub type Lie = fn(RecordType, &[u8], &mut Out) -> bool;

/// What the threads share.
struct Shared {
    target: String,
    kind: StreamKind,
    by: By,
    lie: Lie,
    left: AtomicU32,
    ending: AtomicBool,
}

/// Stands between source and destination, and is honest about everything else. Ends when dropped; connections last as
/// long as their ends.
pub struct Liar {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Liar {
    /// In front of `target`; tells `lie` so many times on connections of `kind`.
    pub fn to(target: &str, kind: StreamKind, by: By, times: u32, lie: Lie) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            kind,
            by,
            lie,
            left: AtomicU32::new(times),
            ending: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for socket in listener.incoming() {
                if accepting.ending.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                thread::spawn(move || between(socket.unwrap(), &shared));
            }
        });
        Self { shared, address }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Whether it has told all its lies.
    pub fn is_done(&self) -> bool {
        self.shared.left.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
    }
}

/// One connection, until it ends.
fn between(source: TcpStream, shared: &Arc<Shared>) {
    let Ok(destination) = TcpStream::connect(&shared.target) else { return };
    source.set_nodelay(true).unwrap();
    destination.set_nodelay(true).unwrap();
    let mut preamble = [0; 8];
    while !matches!(source.peek(&mut preamble), Ok(0 | 8) | Err(_)) {
        thread::yield_now();
    }
    let lies = preamble[7] == shared.kind as u8;
    let (from, to) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
    let answers = thread::spawn({
        let shared = Arc::clone(shared);
        move || pass(from, to, &shared, lies && shared.by == By::Destination)
    });
    pass(source, destination, shared, lies && shared.by == By::Source);
    answers.join().unwrap();
}

/// One direction of a connection.
fn pass(from: TcpStream, to: TcpStream, shared: &Shared, lies: bool) {
    if lies {
        // Whatever ends it has ended the connection.
        let _ = records(&from, &to, shared);
    } else {
        let _ = std::io::copy(&mut &from, &mut &to);
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn records(from: &TcpStream, to: &TcpStream, shared: &Shared) -> Result<(), StreamError> {
    let socket = to.try_clone().unwrap();
    let mut records = RecordReader::new(BufReader::new(from), shared.kind)?;
    let out = RecordWriter::new(to.try_clone().unwrap(), shared.kind)?;
    let mut out = Out { records: out, socket, count: 0 };
    loop {
        let record = records.next_record()?;
        let left = shared.left.load(Ordering::Relaxed);
        if left > 0 && (shared.lie)(record.record_type, record.payload, &mut out) {
            shared.left.store(left - 1, Ordering::Relaxed);
        } else {
            out.write(record.record_type, record.payload);
        }
    }
}
