//! One direction of a connection: finds the records in what passes, and does what the rules say.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::num::NonZeroU64;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use migration::stream::RecordType;
use rustix::thread::set_current_timer_slack;

use super::connection::{Connection, Flow};
use super::rules::{Action, Passing, RuleId};
use super::{Cut, Edit, On, Shared, Way};

/// Sizes of what the protocol's section 2 lays out, bytes.
const PREAMBLE: usize = 16;
const HEADER: usize = 32;
const ALIGNMENT: u64 = 8;
/// What is read at a time at most, bytes.
const BUFFER: usize = 256 << 10;

/// Where in the stream the next byte is.
#[derive(Debug, Clone, Copy)]
enum Part {
    Preamble,
    Header,
    /// So many bytes of payload and padding are left.
    Body(u64),
    /// It is no stream of records: passes as it is.
    Unknown,
}

/// The record that passes.
#[derive(Debug, Default)]
struct Current {
    number: u16,
    /// Payload and padding.
    size: u64,
    payload: u64,
    /// A byte of the payload that is to be inverted.
    flip: Option<u64>,
    /// It ends here, so many bytes before its end.
    truncate: Option<(u64, Cut)>,
    /// Its bytes, when it is sent twice.
    copy: Option<Vec<u8>>,
}

pub(super) struct Pump {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    way: Way,
    buffer: Vec<u8>,
    /// Up to here it was sent, was looked at, and was read.
    sent: usize,
    seen: usize,
    filled: usize,
    part: Part,
    current: Current,
    rounds: u32,
    out: Out,
    /// The other end is gone: what comes is dropped.
    deaf: bool,
}

/// The connection was cut, or has ended.
struct Over;

impl Pump {
    pub(super) fn new(shared: Arc<Shared>, connection: Arc<Connection>, way: Way) -> Self {
        let link = if way == Way::Forth { &shared.forth } else { &shared.back };
        let shape = link.shape;
        let out = Out::new(Arc::clone(&connection), way, shape);
        Self {
            buffer: vec![0; BUFFER.min(shape.quantum()) + HEADER],
            shared,
            connection,
            way,
            sent: 0,
            seen: 0,
            filled: 0,
            part: Part::Preamble,
            current: Current::default(),
            rounds: 0,
            out,
            deaf: false,
        }
    }

    pub(super) fn run(&mut self) {
        // Sleeps for shaping and delays are to end when they should.
        let _ = set_current_timer_slack(NonZeroU64::new(1));
        let ended = self.pass();
        // What is on its way arrives before the end does.
        self.out.finish();
        if ended.is_ok() && self.connection.flow() == Flow::Passes {
            let (_, to) = self.connection.ends(self.way);
            // Fails when that end is gone.
            let _ = to.shutdown(Shutdown::Write);
        }
        if self.connection.ends_one() {
            let mut state = self.shared.lock();
            state.connections.retain(|one| !Arc::ptr_eq(one, &self.connection));
        }
    }

    /// Until the sender has ended it.
    fn pass(&mut self) -> Result<(), Over> {
        while self.fill()? {
            while self.look()? {}
            self.flush()?;
        }
        Ok(())
    }

    /// Reads at least one byte; `false` at the end.
    fn fill(&mut self) -> Result<bool, Over> {
        self.buffer.copy_within(self.sent..self.filled, 0);
        self.seen -= self.sent;
        self.filled -= self.sent;
        self.sent = 0;
        loop {
            let (mut from, _) = self.connection.ends(self.way);
            let read = from.read(&mut self.buffer[self.filled..]);
            if self.connection.flow() == Flow::Cut {
                return Err(Over);
            }
            match read {
                Ok(0) => return Ok(false),
                Ok(count) => {
                    self.filled += count;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A reset: the other end learns that it is over.
                Err(_) => return Ok(false),
            }
        }
    }

    /// Looks at the next part of what was read; `false` when there is no more of it.
    fn look(&mut self) -> Result<bool, Over> {
        let there = self.filled - self.seen;
        match self.part {
            Part::Preamble if there >= PREAMBLE => {
                self.preamble();
                self.seen += PREAMBLE;
            }
            Part::Header if there >= HEADER => {
                self.header()?;
            }
            Part::Body(left) if there > 0 || left == 0 => {
                // Bounded by what is in the buffer.
                let step = left.min(there as u64) as usize;
                self.body(left, step)?;
            }
            Part::Unknown if there > 0 => self.seen = self.filled,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn preamble(&mut self) {
        let preamble = &self.buffer[self.seen..self.seen + PREAMBLE];
        let kind = (&preamble[..7] == b"MINIVMM").then_some(preamble[7]);
        self.part = Part::Header;
        let mut state = self.shared.lock();
        match (self.way, kind) {
            (Way::Forth, Some(b'M' | b'C')) => self.connection.is_for(On::Main),
            (Way::Forth, Some(b'R')) => self.connection.is_for(On::Requests),
            (Way::Forth, Some(b'Q')) => self.connection.is_for(On::Query),
            (Way::Forth, Some(b'P')) => {
                self.connection.is_for(On::Page(state.pages));
                state.pages += 1;
            }
            // An answer: the question was seen.
            (Way::Back, Some(_)) => {}
            (_, _) => self.part = Part::Unknown,
        }
    }

    fn header(&mut self) -> Result<(), Over> {
        let at = self.seen;
        let bytes = &self.buffer[at..at + HEADER];
        let number = u16::from_le_bytes([bytes[0], bytes[1]]);
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[8..16]);
        let payload = u64::from_le_bytes(length);
        if number == RecordType::Round as u16 {
            self.rounds += 1;
        }
        let size = payload.next_multiple_of(ALIGNMENT);
        self.current = Current { number, size, payload, ..Current::default() };
        self.apply(false)?;
        let at = self.seen;
        if let Some(copy) = &mut self.current.copy {
            copy.extend_from_slice(&self.buffer[at..at + HEADER]);
        }
        self.seen += HEADER;
        self.part = Part::Body(size);
        Ok(())
    }

    /// Takes `step` of the `left` bytes of a payload, which may be its end.
    fn body(&mut self, left: u64, step: usize) -> Result<(), Over> {
        let begin = self.current.size - left;
        let mut step = step;
        if let Some((until, how)) = self.current.truncate {
            step = step.min((until - begin) as usize);
            if begin + step as u64 == until {
                self.seen += step;
                self.flush()?;
                self.out.finish();
                self.connection.cut(how);
                return Err(Over);
            }
        }
        let range = self.seen..self.seen + step;
        if let Some(at) = self.current.flip.filter(|at| (begin..begin + step as u64).contains(at)) {
            self.buffer[range.start + (at - begin) as usize] ^= 0xff;
        }
        if let Some(copy) = &mut self.current.copy {
            copy.extend_from_slice(&self.buffer[range]);
        }
        self.seen += step;
        let left = left - step as u64;
        self.part = Part::Body(left);
        if left == 0 {
            self.part = Part::Header;
            if let Some(copy) = self.current.copy.take() {
                self.flush()?;
                self.send(&copy)?;
            }
            self.apply(true)?;
        }
        Ok(())
    }

    /// Does what the rules say before or after the current record.
    fn apply(&mut self, after: bool) -> Result<(), Over> {
        let Some(on) = self.connection.on() else { return Ok(()) };
        let number = self.current.number;
        let passing = Passing { on, way: self.way, number, rounds: self.rounds };
        let shared = Arc::clone(&self.shared);
        let met: Vec<(RuleId, Action)> = {
            let mut state = shared.lock();
            let rules = state.rules.iter_mut().enumerate();
            let met = rules.filter_map(|(index, rule)| {
                rule.meets(&passing, after).then_some((RuleId(index), rule.action))
            });
            met.collect()
        };
        for (id, action) in met {
            // What came before is through when somebody is told.
            self.flush()?;
            {
                shared.lock().rules[id.0].reached = true;
                shared.changed.notify_all();
            }
            match action {
                Action::Hold => {
                    let mut state = shared.lock();
                    while !state.rules[id.0].released && self.connection.flow() != Flow::Cut {
                        state = shared.wait(state);
                    }
                    if self.connection.flow() == Flow::Cut {
                        return Err(Over);
                    }
                }
                Action::Edit(edit) => self.edit(edit),
            }
        }
        Ok(())
    }

    fn edit(&mut self, edit: Edit) {
        match edit {
            Edit::FlipHeader(at) => self.buffer[self.seen + at] ^= 0xff,
            Edit::FlipPayload(at) => {
                assert!(at < self.current.payload, "the record has no byte {at}");
                self.current.flip = Some(at);
            }
            Edit::FlipLast => self.current.flip = self.current.payload.checked_sub(1),
            Edit::Truncate(how) => self.current.truncate = Some((self.current.size / 2, how)),
            Edit::Duplicate => self.current.copy = Some(Vec::new()),
            Edit::Delay(time) => thread::sleep(time),
        }
    }

    /// Sends what was looked at.
    fn flush(&mut self) -> Result<(), Over> {
        let (begin, end) = (self.sent, self.seen);
        self.sent = end;
        let bytes = std::mem::take(&mut self.buffer);
        let sent = self.send(&bytes[begin..end]);
        self.buffer = bytes;
        sent
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Over> {
        if bytes.is_empty() || self.deaf {
            return Ok(());
        }
        match self.connection.flow() {
            Flow::Cut => return Err(Over),
            Flow::Swallowed => return Ok(()),
            Flow::Passes => {}
        }
        let link = if self.way == Way::Forth { &self.shared.forth } else { &self.shared.back };
        for piece in bytes.chunks(link.shape.quantum()) {
            let departure = link.departure(piece.len(), Instant::now());
            sleep_until(departure);
            self.deaf |= !self.out.send(piece, departure);
        }
        Ok(())
    }
}

fn sleep_until(time: Instant) {
    let left = time.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        thread::sleep(left);
    }
}

/// Where bytes go: to the socket, or first on their way for a while.
enum Out {
    Direct(Arc<Connection>, Way),
    Far { pieces: Option<SyncSender<(Instant, Vec<u8>)>>, writer: Option<JoinHandle<()>> },
}

impl Out {
    fn new(connection: Arc<Connection>, way: Way, shape: super::Shape) -> Self {
        if shape.latency.is_zero() {
            return Self::Direct(connection, way);
        }
        let (pieces, due): (_, Receiver<(Instant, Vec<u8>)>) = sync_channel(shape.pieces());
        let write = move || {
            let _ = set_current_timer_slack(NonZeroU64::new(1));
            for (departure, piece) in due {
                sleep_until(departure + shape.latency);
                if !write_all(&connection, way, &piece) {
                    return;
                }
            }
        };
        let writer = thread::Builder::new().name("proxy-far".into()).spawn(write).unwrap();
        Self::Far { pieces: Some(pieces), writer: Some(writer) }
    }

    /// `false`: nobody takes it any more.
    fn send(&mut self, piece: &[u8], departure: Instant) -> bool {
        match self {
            Self::Direct(connection, way) => write_all(connection, *way, piece),
            Self::Far { pieces, .. } => {
                pieces.as_ref().is_some_and(|far| far.send((departure, piece.to_vec())).is_ok())
            }
        }
    }

    /// Waits until everything has arrived.
    fn finish(&mut self) {
        if let Self::Far { pieces, writer } = self {
            drop(pieces.take());
            if let Some(writer) = writer.take() {
                writer.join().unwrap();
            }
        }
    }
}

/// `false`: it cannot be written any more.
fn write_all(connection: &Connection, way: Way, mut bytes: &[u8]) -> bool {
    let (_, mut to): (_, &TcpStream) = connection.ends(way);
    while !bytes.is_empty() {
        match connection.flow() {
            Flow::Passes => {}
            Flow::Swallowed => return true,
            Flow::Cut => return false,
        }
        match to.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) => match error.kind() {
                // The receiver takes its time.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted => {}
                _ => return false,
            },
        }
    }
    true
}
