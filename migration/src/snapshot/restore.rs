//! Reading a snapshot.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::address::PAGE_BYTES;
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::snapshot::file::failed;
use crate::snapshot::{SnapshotError, MAX_SECTIONS, MAX_STATE_BYTES};
use crate::stream::{
    decode_layout, decode_pages, decode_runs, decode_section, BlobChunk, BlobKind, Config, Machine,
    PageTotals, Problem, Record, RecordHeader, RecordReader, RecordType, StreamError, StreamKind,
};
use crate::vm::{DestinationMemory, Section};

/// A blob out of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// What it is.
    pub kind: BlobKind,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// What a snapshot says before any memory is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotHeader {
    /// Identity of the machine.
    pub machine: Machine,
    /// Configuration of the VM.
    pub config: Config,
    /// Kernel and initrd, each at most once.
    pub blobs: Vec<Blob>,
    /// Which page frames there are. A claim: the VMM compares it with its own memory map before
    /// it provides memory.
    pub layout: MemoryLayout,
}

/// A snapshot whose memory is still to be loaded.
#[derive(Debug)]
pub struct SnapshotReader<R = File> {
    records: RecordReader<R>,
    layout: MemoryLayout,
    path: PathBuf,
}

/// A snapshot whose memory was loaded, but not yet its state.
#[derive(Debug)]
#[must_use = "the file is not known to be whole before its sections were read"]
pub struct SnapshotState<R = File> {
    records: RecordReader<R>,
    /// Header of the record after the last one of memory.
    next: (RecordType, RecordHeader),
    totals: PageTotals,
    path: PathBuf,
}

impl SnapshotReader<File> {
    /// Opens a snapshot and reads it up to the layout.
    ///
    /// # Errors
    /// [`SnapshotError::File`], [`SnapshotError::NotAFile`], [`SnapshotError::Remains`], [`SnapshotError::Restore`].
    pub fn open(path: &Path) -> Result<(SnapshotHeader, Self), SnapshotError> {
        // Opening a pipe or a device could block or have effects.
        let metadata = fs::metadata(path).map_err(|error| failed("open", path, error))?;
        if !metadata.is_file() {
            return Err(SnapshotError::NotAFile(path.to_owned()));
        }
        let file = File::open(path).map_err(|error| failed("open", path, error))?;
        Self::from_stream(file, path)
    }
}

impl<R: Read> SnapshotReader<R> {
    /// As [`SnapshotReader::open`], from any stream of bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`SnapshotError::Remains`], [`SnapshotError::Restore`].
    pub fn from_stream(stream: R, path: &Path) -> Result<(SnapshotHeader, Self), SnapshotError> {
        let path = path.to_owned();
        match read_header(stream) {
            Ok((header, records)) => {
                let layout = header.layout.clone();
                Ok((header, Self { records, layout, path }))
            }
            Err(StreamError { problem: Problem::WrongKind { found, .. }, .. })
                if found == StreamKind::Remains as u8 =>
            {
                Err(SnapshotError::Remains(path))
            }
            Err(error) => Err(SnapshotError::Restore { path, error }),
        }
    }

    /// Fills a machine's memory. Memory that is populated beforehand and is not in the snapshot
    /// is zeroed; fresh memory is not touched where the snapshot has nothing.
    ///
    /// # Errors
    /// [`SnapshotError::LayoutDiffers`] before anything is touched, [`SnapshotError::Restore`],
    /// [`SnapshotError::Vm`].
    pub fn load_memory(
        self,
        memory: &dyn DestinationMemory,
    ) -> Result<SnapshotState<R>, SnapshotError> {
        let Self { mut records, layout, path } = self;
        if *memory.layout().as_ref() != layout {
            return Err(SnapshotError::LayoutDiffers {
                saved: describe(&layout),
                here: describe(memory.layout()),
            });
        }
        let mut to_zero = memory.populated()?;
        match load_pages(&mut records, memory, &mut to_zero) {
            Ok((next, totals)) => {
                for run in to_zero.runs() {
                    memory.zero(run)?;
                }
                Ok(SnapshotState { records, next, totals, path })
            }
            Err(error) => Err(SnapshotError::Restore { path, error }),
        }
    }
}

impl<R: Read> SnapshotState<R> {
    /// The states, after everything up to the end of the file was read and found whole.
    ///
    /// # Errors
    /// [`SnapshotError::Restore`].
    pub fn sections(self) -> Result<Vec<Section>, SnapshotError> {
        let Self { mut records, next, totals, path } = self;
        read_sections(&mut records, next, totals)
            .map_err(|error| SnapshotError::Restore { path, error })
    }
}

fn describe(layout: &MemoryLayout) -> String {
    layout.regions().map(|range| range.to_string()).collect::<Vec<_>>().join(", ")
}

fn expect<'a, R: Read>(
    records: &'a mut RecordReader<R>,
    record_type: RecordType,
    expected: &'static str,
) -> Result<Record<'a>, StreamError> {
    let record = records.next_record()?;
    if record.record_type != record_type {
        return Err(record.error(Problem::Unexpected { found: record.record_type, expected }));
    }
    Ok(record)
}

fn read_header<R: Read>(stream: R) -> Result<(SnapshotHeader, RecordReader<R>), StreamError> {
    let mut records = RecordReader::new(stream, StreamKind::Snapshot)?;
    let record = expect(&mut records, RecordType::Machine, "MACHINE")?;
    let machine = Machine::decode(record.payload).map_err(|problem| record.error(problem))?;
    let record = expect(&mut records, RecordType::Config, "CONFIG")?;
    let config = Config::decode(record.payload).map_err(|problem| record.error(problem))?;
    let mut blobs: Vec<Blob> = Vec::new();
    // Length of the blob that is being read, until it is complete.
    let mut incomplete: Option<u64> = None;
    let layout = loop {
        let record = records.next_record()?;
        match record.record_type {
            RecordType::Blob => {
                let chunk =
                    BlobChunk::decode(record.payload).map_err(|problem| record.error(problem))?;
                incomplete = take_chunk(&mut blobs, incomplete, chunk)
                    .map_err(|what| record.error(malformed(RecordType::Blob, what)))?;
            }
            RecordType::Layout if incomplete.is_none() => {
                break decode_layout(record.payload).map_err(|problem| record.error(problem))?;
            }
            found => {
                let expected = if incomplete.is_some() { "BLOB" } else { "BLOB or LAYOUT" };
                return Err(record.error(Problem::Unexpected { found, expected }));
            }
        }
    };
    Ok((SnapshotHeader { machine, config, blobs, layout }, records))
}

/// Adds a piece to the blobs; returns the length of the blob if more must follow.
pub(crate) fn take_chunk(
    blobs: &mut Vec<Blob>,
    incomplete: Option<u64>,
    chunk: BlobChunk<'_>,
) -> Result<Option<u64>, String> {
    if incomplete.is_none() {
        if blobs.iter().any(|blob| blob.kind == chunk.kind) {
            return Err(format!("a second {:?}", chunk.kind));
        }
        blobs.push(Blob { kind: chunk.kind, data: Vec::new() });
    }
    let Some(blob) = blobs.last_mut().filter(|blob| blob.kind == chunk.kind) else {
        return Err(format!("{:?} before the one before it is complete", chunk.kind));
    };
    let so_far = blob.data.len() as u64;
    let same_total = incomplete.is_none_or(|total| total == chunk.total);
    let goes_on = !chunk.data.is_empty() || chunk.total == 0;
    if chunk.offset != so_far || !same_total || !goes_on {
        return Err(format!(
            "{} bytes at offset {} of {}, but {so_far} came so far",
            chunk.data.len(),
            chunk.offset,
            chunk.total
        ));
    }
    blob.data.extend_from_slice(chunk.data);
    Ok((blob.data.len() as u64 != chunk.total).then_some(chunk.total))
}

/// Reads PAGES, ZERO and ABSENT until every page was named once; takes out of `to_zero` the pages
/// that were filled. Returns the header of the record after them.
fn load_pages<R: Read>(
    records: &mut RecordReader<R>,
    memory: &dyn DestinationMemory,
    to_zero: &mut PageSet,
) -> Result<((RecordType, RecordHeader), PageTotals), StreamError> {
    let layout = Arc::clone(memory.layout());
    let mut named = PageSet::empty(&layout);
    let mut totals = PageTotals::default();
    loop {
        let (record_type, header) = records.next_header()?;
        let count = match record_type {
            RecordType::Pages => &mut totals.data,
            RecordType::Zero => &mut totals.zero,
            RecordType::Absent => &mut totals.absent,
            RecordType::State | RecordType::End => {
                check_all_named(&layout, &named).map_err(|problem| records.error(problem))?;
                return Ok(((record_type, header), totals));
            }
            found => {
                let expected = "PAGES, ZERO, ABSENT, STATE or END";
                return Err(records.error(Problem::Unexpected { found, expected }));
            }
        };
        let record = records.read_record(record_type, &header)?;
        let (runs, mut data) = match record_type {
            RecordType::Pages => decode_pages(record.payload, &layout),
            _ => decode_runs(record_type, record.payload, &layout).map(|runs| (runs, &[][..])),
        }
        .map_err(|problem| record.error(problem))?;
        for run in runs {
            let fresh = named.insert(run).map_err(|error| record.error(error))?;
            if fresh != run.pages() {
                return Err(record.error(Problem::DuplicatePages(run)));
            }
            *count += run.pages();
            if record_type == RecordType::Pages {
                let (mine, rest) = data.split_at(run.pages() as usize * PAGE_BYTES);
                data = rest;
                memory.fill(run, mine).map_err(|error| record.error(error))?;
                to_zero.remove(run).map_err(|error| record.error(error))?;
            }
        }
    }
}

fn check_all_named(layout: &Arc<MemoryLayout>, named: &PageSet) -> Result<(), Problem> {
    let mut missing = PageSet::full(layout);
    missing.minus(named);
    let first = missing.runs().next();
    match first {
        Some(first) => Err(Problem::MissingPages { pages: missing.count(), first }),
        None => Ok(()),
    }
}

fn read_sections<R: Read>(
    records: &mut RecordReader<R>,
    first: (RecordType, RecordHeader),
    pages: PageTotals,
) -> Result<Vec<Section>, StreamError> {
    let mut sections: Vec<Section> = Vec::new();
    let mut seen = HashSet::new();
    let mut bytes = 0;
    let (mut record_type, mut header) = first;
    while record_type == RecordType::State {
        let record = records.read_record(record_type, &header)?;
        bytes += record.payload.len() as u64;
        if sections.len() == MAX_SECTIONS || bytes > MAX_STATE_BYTES {
            let what = format!("more than {MAX_SECTIONS} states or {MAX_STATE_BYTES} bytes");
            return Err(record.error(malformed(RecordType::State, what)));
        }
        let section = decode_section(record.payload).map_err(|problem| record.error(problem))?;
        if !seen.insert((section.kind.clone(), section.instance)) {
            let what = format!("a second state of {} {}", section.kind, section.instance);
            return Err(record.error(malformed(RecordType::State, what)));
        }
        sections.push(section);
        (record_type, header) = records.next_header()?;
    }
    if record_type != RecordType::End {
        let problem = Problem::Unexpected { found: record_type, expected: "STATE or END" };
        return Err(records.error(problem));
    }
    let end = records.read_end(&header)?;
    let totals = [
        ("data pages", end.data_pages, pages.data),
        ("zero pages", end.zero_pages, pages.zero),
        ("absent pages", end.absent_pages, pages.absent),
    ];
    for (what, claimed, counted) in totals {
        if claimed != counted {
            return Err(records.error(Problem::Totals { what, claimed, counted }));
        }
    }
    Ok(sections)
}

fn malformed(record_type: RecordType, what: String) -> Problem {
    Problem::Malformed { record_type, what }
}
