//! What the source says on the main connection, read and checked for its order:
//!
//! ```text
//!   HELLO MACHINE CONFIG LAYOUT OFFER   BLOB*     ANNOUNCE* HASH? STATE* COMPLETE   COMMIT   DONE
//!                                     `- ACCEPT  `- READY                         `- LOADED
//!   with post-copy, after READY:                  ANNOUNCE* (MISSING* ECHO)? MISSING* SWITCH STATE* COMPLETE
//! ```
//!
//! Each part may only begin after this side has sent the record below it. ALIVE and ABORT may
//! come at any time.

use std::collections::HashSet;
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use crate::destination::door::Standing;
use crate::destination::{Input, Stage};
use crate::handover::Cause;
use crate::identity::MigrationId;
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::snapshot::{take_chunk, Blob, MAX_SECTIONS, MAX_STATE_BYTES};
use crate::stream::session::{
    printable, Abort, Alive, Commit, Complete, Done, Echo, FrameWire, Frames, Hello, OfferWire,
    Switch, MAX_CONNECTIONS,
};
use crate::stream::{
    decode_layout, decode_runs, decode_section, BlobChunk, BlobKind, Config, Machine, Problem,
    Record, RecordReader, RecordType, StreamError, MAX_BLOB_BYTES,
};
use crate::transport::{Stream, Transport};
use crate::verify::hash_count;
use crate::vm::{Mode, Offer, Section, MAX_LATE_FRAME};

/// The longest pause that is believed: a cold migration of terabytes.
const MAX_PAUSED: Duration = Duration::from_secs(24 * 3600);
/// Longest time between two signs of life that a source may ask for.
const MAX_DEAD: Duration = Duration::from_secs(60);

/// Hands the offer over, and reads on until the connection ends. `Err` when it did not come as far.
pub(super) fn read_main(
    mut offer: Offer,
    mut records: RecordReader<Stream>,
    transport: &Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
    standing: &Standing,
) -> Result<(), StreamError> {
    offer.peer = transport.peer();
    if let Err(error) = transport.set_timeouts(Some(offer.dead), Some(offer.dead)) {
        return Err(records.error(Problem::Read(error)));
    }
    standing.is_main();
    let stage = Arc::new(Stage::default());
    let mut order = Order::new(&offer, Arc::clone(&stage));
    let first = Input::Offer { offer: Box::new(offer), transport: Arc::clone(transport), stage };
    if inbox.send(first).is_err() {
        transport.shutdown();
        return Ok(());
    }
    let error = loop {
        match order.next(&mut records, inbox) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => break error,
        }
    };
    // Fails when the session has ended.
    let _ = inbox.send(lost(0, &error));
    Ok(())
}

/// The main connection of this number is of no use any more.
fn lost(generation: u32, error: &StreamError) -> Input {
    let (cause, text) = match error.problem {
        Problem::Read(_) | Problem::Truncated => {
            (Cause::Lost, format!("the connection to the source was lost: {}", error.problem))
        }
        _ => (Cause::Protocol, format!("the source broke the protocol: {error}")),
    };
    Input::Lost { generation, cause, text }
}

/// Reads what the source says on a main connection that goes on with post-copy.
pub(super) fn read_continued(
    mut records: RecordReader<Stream>,
    generation: u32,
    inbox: &mpsc::Sender<Input>,
) {
    let mut next = || -> Result<Option<Input>, StreamError> {
        let record = records.next_record()?;
        Ok(match record.record_type {
            RecordType::Alive => {
                let Alive {} = record.decode("ALIVE")?;
                None
            }
            RecordType::Abort => {
                let abort: Abort<'_> = record.decode("ABORT")?;
                let text = format!("the source gave up: {}", printable(abort.text));
                Some(Input::Lost { generation, cause: Cause::PeerAborted, text })
            }
            _ => {
                let Done {} = record.decode("ALIVE, ABORT or DONE")?;
                Some(Input::Done)
            }
        })
    };
    let last = loop {
        match next() {
            Ok(None) => {}
            Ok(Some(last)) => break last,
            Err(error) => break lost(generation, &error),
        }
    };
    // Fails when the session has ended.
    let _ = inbox.send(last);
}

fn malformed(record: &Record<'_>, what: impl Into<String>) -> StreamError {
    let record_type = record.record_type;
    record.error(Problem::Malformed { record_type, what: what.into() })
}

/// The next record, which must be of this type.
fn expect<'a>(
    records: &'a mut RecordReader<Stream>,
    record_type: RecordType,
    expected: &'static str,
) -> Result<Record<'a>, StreamError> {
    let record = records.next_record()?;
    if record.record_type != record_type {
        let found = record.record_type;
        return Err(record.error(Problem::Unexpected { found, expected }));
    }
    Ok(record)
}

/// Reads up to the offer.
pub(super) fn read_offer(records: &mut RecordReader<Stream>) -> Result<Offer, StreamError> {
    let hello: Hello<'_> = records.next_record()?.decode("HELLO")?;
    let id = MigrationId(hello.id);
    let record = expect(records, RecordType::Machine, "MACHINE")?;
    let machine = Machine::decode(record.payload).map_err(|problem| record.error(problem))?;
    let record = expect(records, RecordType::Config, "CONFIG")?;
    let config = Config::decode(record.payload).map_err(|problem| record.error(problem))?;
    let record = expect(records, RecordType::Layout, "LAYOUT")?;
    let layout = decode_layout(record.payload).map_err(|problem| record.error(problem))?;
    let record = records.next_record()?;
    let offer: OfferWire<'_> = record.decode("OFFER")?;
    let mode = match offer.mode {
        1 => Mode::Precopy,
        2 => Mode::Cold,
        3 => Mode::Postcopy,
        4 => Mode::Hybrid,
        other => return Err(malformed(&record, format!("mode {other}"))),
    };
    if mode.may_switch() && offer.verify {
        return Err(malformed(&record, "memory cannot be compared when it follows its guest"));
    }
    if offer.connections == 0 || offer.connections > MAX_CONNECTIONS {
        let what = format!("{} page connections", offer.connections);
        return Err(malformed(&record, what));
    }
    let alive = Duration::from_millis(u64::from(offer.alive_ms));
    let dead = Duration::from_millis(u64::from(offer.dead_ms));
    if alive.is_zero() || dead <= alive || dead > MAX_DEAD {
        let what = format!("signs of life every {alive:?}, dead after {dead:?}");
        return Err(malformed(&record, what));
    }
    let mut blobs: Vec<(BlobKind, u64)> = Vec::new();
    for (kind, length) in &offer.blobs {
        let kind = match kind {
            1 => BlobKind::Kernel,
            2 => BlobKind::Initrd,
            other => return Err(malformed(&record, format!("blob kind {other}"))),
        };
        if *length > MAX_BLOB_BYTES || blobs.iter().any(|(other, _)| *other == kind) {
            return Err(malformed(&record, format!("a second {kind:?}, or {length} bytes of it")));
        }
        blobs.push((kind, *length));
    }
    Ok(Offer {
        id,
        peer: String::new(),
        name: printable(offer.name),
        mode,
        connections: offer.connections,
        verify: offer.verify,
        downtime: Duration::from_micros(offer.downtime_us),
        populated_pages: offer.populated_pages,
        machine,
        config,
        resources: Config { version: offer.resources_version, data: offer.resources.to_vec() },
        layout,
        blobs,
        alive,
        dead,
    })
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Blobs,
    Memory,
    State,
    Commit,
    Done,
}

/// What came so far.
struct Order {
    stage: Arc<Stage>,
    part: Part,
    layout: Arc<MemoryLayout>,
    blobs: Vec<Blob>,
    incomplete: Option<u64>,
    listed: Vec<(BlobKind, u64)>,
    verify: bool,
    may_switch: bool,
    /// What the destination is to have only later. Made as `announced`.
    missing: Option<PageSet>,
    /// Memory was to be given back, which is asked for once.
    retracted: bool,
    /// Pages that can only be missing together; known once it switches to post-copy.
    switch_unit: Option<u64>,
    /// Made when memory is announced: before that the layout is nothing but a claim.
    announced: Option<PageSet>,
    hashes: Option<Vec<u64>>,
    sections: Vec<Section>,
    section_names: HashSet<(String, u32)>,
    section_bytes: u64,
}

impl Order {
    fn new(offer: &Offer, stage: Arc<Stage>) -> Self {
        let layout = Arc::new(offer.layout.clone());
        Self {
            stage,
            part: if offer.blobs.is_empty() { Part::Memory } else { Part::Blobs },
            announced: None,
            layout,
            blobs: Vec::new(),
            incomplete: None,
            listed: offer.blobs.clone(),
            verify: offer.verify,
            may_switch: offer.mode.may_switch(),
            missing: None,
            retracted: false,
            switch_unit: None,
            hashes: None,
            sections: Vec::new(),
            section_names: HashSet::new(),
            section_bytes: 0,
        }
    }

    /// Reads one record; `false` when none may follow.
    fn next(
        &mut self,
        records: &mut RecordReader<Stream>,
        inbox: &mpsc::Sender<Input>,
    ) -> Result<bool, StreamError> {
        let record = records.next_record()?;
        let unexpected = |expected| {
            let found = record.record_type;
            record.error(Problem::Unexpected { found, expected })
        };
        let input = match (record.record_type, self.part) {
            (RecordType::Alive, _) => {
                let Alive {} = record.decode("ALIVE")?;
                return Ok(true);
            }
            (RecordType::Abort, _) => {
                let abort: Abort<'_> = record.decode("ABORT")?;
                let _ = inbox.send(Input::Aborted(printable(abort.text)));
                return Ok(false);
            }
            (RecordType::Blob, Part::Blobs) if self.stage.reached(Stage::ACCEPTED) => {
                match self.blob(&record)? {
                    true => Input::Blobs(std::mem::take(&mut self.blobs)),
                    false => return Ok(true),
                }
            }
            (_, Part::Blobs) => return Err(unexpected("the listed BLOBs, after ACCEPT")),
            (RecordType::Announce, Part::Memory) if self.stage.reached(Stage::READY) => {
                self.announce(&record)?;
                return Ok(true);
            }
            (RecordType::Missing | RecordType::Echo | RecordType::Switch, Part::Memory)
                if self.may_switch
                    && self.switch_unit.is_none()
                    && self.stage.reached(Stage::READY) =>
            {
                match self.postcopy(&record)? {
                    Some(input) => input,
                    None => return Ok(true),
                }
            }
            (
                RecordType::Hash | RecordType::State | RecordType::Complete,
                Part::Memory | Part::State,
            ) if self.stage.reached(Stage::READY) => {
                if self.part == Part::Memory && record.record_type == RecordType::Hash {
                    self.hash(&record)?;
                    return Ok(true);
                }
                self.part = Part::State;
                if self.verify != self.hashes.is_some() {
                    return Err(unexpected("HASH in verify mode, and only then"));
                }
                match record.record_type {
                    RecordType::State => {
                        self.section(&record)?;
                        return Ok(true);
                    }
                    RecordType::Complete => {
                        let complete: Complete = record.decode("COMPLETE")?;
                        if complete.sections as usize != self.sections.len() {
                            let what = format!(
                                "{} states, {} came",
                                complete.sections,
                                self.sections.len()
                            );
                            return Err(malformed(&record, what));
                        }
                        self.part = Part::Commit;
                        let sections = std::mem::take(&mut self.sections);
                        // A claim that no clock here can tell is none.
                        let paused = Duration::from_micros(complete.paused_us);
                        let now = Instant::now();
                        let paused = now.checked_sub(paused.min(MAX_PAUSED)).unwrap_or(now);
                        let missing = self.missing.take();
                        let missing = self.switch_unit.zip(missing);
                        Input::State { sections, hashes: self.hashes.take(), paused, missing }
                    }
                    _ => return Err(unexpected("STATE or COMPLETE")),
                }
            }
            (RecordType::Commit, Part::Commit) if self.stage.reached(Stage::LOADED) => {
                let commit: Commit = record.decode("COMMIT")?;
                self.part = Part::Done;
                Input::Commit { run: commit.run }
            }
            (RecordType::Frames, Part::Done) => {
                let frames: Frames<'_> = record.decode("FRAMES")?;
                let Some(vm) = self.stage.running.get() else {
                    return Err(unexpected("DONE, or FRAMES after RESUMED"));
                };
                if frames.frames.len() > Frames::MOST {
                    return Err(malformed(&record, format!("{} frames", frames.frames.len())));
                }
                for FrameWire { card, bytes } in frames.frames {
                    let taken = match bytes.len() <= MAX_LATE_FRAME {
                        true => vm.late_frame(card, bytes).map_err(|error| error.to_string()),
                        false => Err(format!("a frame of {} bytes", bytes.len())),
                    };
                    taken.map_err(|what| malformed(&record, what))?;
                }
                return Ok(true);
            }
            (RecordType::Done, Part::Done) => {
                let Done {} = record.decode("DONE")?;
                let _ = inbox.send(Input::Done);
                return Ok(false);
            }
            (_, Part::Memory) => {
                return Err(unexpected("ANNOUNCE, HASH, STATE or COMPLETE, after READY"));
            }
            (_, Part::State) => return Err(unexpected("STATE or COMPLETE")),
            (_, Part::Commit) => return Err(unexpected("COMMIT, after LOADED")),
            (_, Part::Done) => return Err(unexpected("FRAMES or DONE")),
        };
        Ok(inbox.send(input).is_ok())
    }

    /// A record about memory that comes later.
    fn postcopy(&mut self, record: &Record<'_>) -> Result<Option<Input>, StreamError> {
        let missing = self.missing.get_or_insert_with(|| PageSet::empty(&self.layout));
        match record.record_type {
            RecordType::Missing => {
                let runs = decode_runs(RecordType::Missing, record.payload, &self.layout)
                    .map_err(|problem| record.error(problem))?;
                for run in runs {
                    missing.insert(run).map_err(|error| record.error(error))?;
                }
                Ok(None)
            }
            RecordType::Echo => {
                let echo: Echo = record.decode("ECHO")?;
                if std::mem::replace(&mut self.retracted, true) {
                    return Err(malformed(record, "memory is given back once before the pause"));
                }
                Ok(Some(Input::Retract { pages: missing.clone(), number: echo.number }))
            }
            _ => {
                let switch: Switch = record.decode("SWITCH")?;
                let (what, claimed, counted) = ("missing pages", switch.pages, missing.count());
                if claimed != counted {
                    return Err(record.error(Problem::Totals { what, claimed, counted }));
                }
                self.switch_unit = Some(u64::from(switch.unit));
                Ok(None)
            }
        }
    }

    /// Takes a piece of a blob; `true` when all blobs are complete.
    fn blob(&mut self, record: &Record<'_>) -> Result<bool, StreamError> {
        let chunk = BlobChunk::decode(record.payload).map_err(|problem| record.error(problem))?;
        let at = match self.incomplete {
            Some(_) => self.blobs.len() - 1,
            None => self.blobs.len(),
        };
        if self.listed.get(at) != Some(&(chunk.kind, chunk.total)) {
            let what = format!("{:?} of {} bytes was not offered", chunk.kind, chunk.total);
            return Err(malformed(record, what));
        }
        self.incomplete = take_chunk(&mut self.blobs, self.incomplete, chunk)
            .map_err(|what| malformed(record, what))?;
        let done = self.incomplete.is_none() && self.blobs.len() == self.listed.len();
        if done {
            self.part = Part::Memory;
        }
        Ok(done)
    }

    fn announce(&mut self, record: &Record<'_>) -> Result<(), StreamError> {
        let runs = decode_runs(RecordType::Announce, record.payload, &self.layout)
            .map_err(|problem| record.error(problem))?;
        let announced = self.announced.get_or_insert_with(|| PageSet::empty(&self.layout));
        for run in &runs {
            let fresh = announced.insert(*run).map_err(|error| record.error(error))?;
            if fresh != run.pages() {
                return Err(record.error(Problem::DuplicatePages(*run)));
            }
        }
        Ok(())
    }

    fn hash(&mut self, record: &Record<'_>) -> Result<(), StreamError> {
        let count = hash_count(&self.layout);
        if !self.verify || self.hashes.is_some() || record.payload.len() as u64 != count * 8 {
            let what = format!("{} bytes of hashes, expected {count} once", record.payload.len());
            return Err(malformed(record, what));
        }
        let hash = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        self.hashes = Some(record.payload.chunks_exact(8).map(hash).collect());
        Ok(())
    }

    fn section(&mut self, record: &Record<'_>) -> Result<(), StreamError> {
        self.section_bytes += record.payload.len() as u64;
        if self.sections.len() == MAX_SECTIONS || self.section_bytes > MAX_STATE_BYTES {
            let what = format!("more than {MAX_SECTIONS} states or {MAX_STATE_BYTES} bytes");
            return Err(malformed(record, what));
        }
        let section = decode_section(record.payload).map_err(|problem| record.error(problem))?;
        if !self.section_names.insert((section.kind.clone(), section.instance)) {
            let what = format!("a second state of {} {}", section.kind, section.instance);
            return Err(malformed(record, what));
        }
        self.sections.push(section);
        Ok(())
    }
}
