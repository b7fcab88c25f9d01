//! Writing a snapshot.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use crate::address::{Gfn, PageRange, PAGE_BYTES};
use crate::page_set::PageSet;
use crate::snapshot::file::{failed, AtomicFile};
use crate::snapshot::{SnapshotError, MAX_SECTIONS, MAX_STATE_BYTES};
use crate::stream::{
    encode_layout, encode_runs, encode_section, BlobChunk, BlobKind, Config, Machine, PageTotals,
    Problem, RecordType, RecordWriter, StreamError, StreamKind, MAX_BLOB_BYTES, MAX_BLOB_CHUNK,
    MAX_RUNS, PAGES_PER_BATCH,
};
use crate::vm::{GuestMemory, Section, VmError, VmState};

/// A blob to be saved: a file, or bytes in memory.
pub struct BlobSource<'a> {
    /// What it is. Each kind may come once.
    pub kind: BlobKind,
    /// Its length, bytes; exactly so many are read.
    pub length: u64,
    /// Where it is read from.
    pub reader: &'a mut dyn Read,
}

/// All that goes into a snapshot. The VM is paused, and stays so until it was written.
pub struct SnapshotSource<'a> {
    /// Identity of the machine.
    pub machine: Machine,
    /// Configuration of the VM.
    pub config: Config,
    /// Kernel and initrd, where a later reboot needs them.
    pub blobs: Vec<BlobSource<'a>>,
    /// Guest memory.
    pub memory: &'a dyn GuestMemory,
    /// Everything else.
    pub state: &'a dyn VmState,
}

/// How far a save is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveProgress {
    /// Populated pages looked at so far.
    pub pages_done: u64,
    /// Populated pages in all.
    pub pages_total: u64,
    /// Bytes written so far.
    pub bytes: u64,
}

/// What a save did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveSummary {
    /// Size of the file, bytes.
    pub file_bytes: u64,
    /// Pages with contents, written.
    pub data_pages: u64,
    /// Populated pages that held only zeros, not written.
    pub zero_pages: u64,
    /// Pages that were never touched, not written.
    pub absent_pages: u64,
}

/// A snapshot that was written, but neither is on the disk nor has its name. Dropping it removes
/// it. The guest may go on before [`PendingSnapshot::commit`].
#[derive(Debug)]
#[must_use = "without commit the snapshot is removed"]
pub struct PendingSnapshot {
    file: AtomicFile,
    summary: SaveSummary,
}

impl PendingSnapshot {
    /// Writes a snapshot of a paused VM to a temporary file beside `path`. `progress` is called
    /// after every record of pages and may end the save.
    ///
    /// # Errors
    /// [`SnapshotError`]; the temporary file is removed, and whatever is at `path` is untouched.
    pub fn write(
        path: &Path,
        source: SnapshotSource<'_>,
        progress: &mut dyn FnMut(SaveProgress) -> ControlFlow<()>,
    ) -> Result<Self, SnapshotError> {
        Self::write_through(path, StreamKind::Snapshot, source, progress, |file| file)
    }

    /// As [`PendingSnapshot::write`], of a VM that runs elsewhere since: memory alone. The file is of another kind than a
    /// snapshot, and cannot be restored. The state is not even taken, since that may write to memory.
    ///
    /// # Errors
    /// As there.
    pub fn write_remains(
        path: &Path,
        source: SnapshotSource<'_>,
        progress: &mut dyn FnMut(SaveProgress) -> ControlFlow<()>,
    ) -> Result<Self, SnapshotError> {
        Self::write_through(path, StreamKind::Remains, source, progress, |file| file)
    }

    /// [`PendingSnapshot::write`] through an adapter of the file, which tests use to make it fail.
    pub(super) fn write_through<W: Write>(
        path: &Path,
        kind: StreamKind,
        source: SnapshotSource<'_>,
        progress: &mut dyn FnMut(SaveProgress) -> ControlFlow<()>,
        adapter: impl FnOnce(File) -> W,
    ) -> Result<Self, SnapshotError> {
        let file = AtomicFile::create(path)?;
        let output = file.file().try_clone().map_err(|error| failed("write", path, error))?;
        let summary = write_snapshot(adapter(output), kind, source, progress)
            .map_err(|stop| stop.at(file.target()))?;
        Ok(Self { file, summary })
    }

    /// Brings the file to the disk and gives it its name, replacing an older one.
    ///
    /// # Errors
    /// [`SnapshotError::File`]; the older file is still there unless only the last step, bringing
    /// the new name to the disk, failed.
    pub fn commit(self) -> Result<SaveSummary, SnapshotError> {
        self.file.commit()?;
        Ok(self.summary)
    }
}

/// Why writing stopped.
#[derive(Debug)]
pub(crate) enum Stop {
    Stream(StreamError),
    Other(SnapshotError),
}

impl Stop {
    pub(super) fn at(self, path: &Path) -> SnapshotError {
        match self {
            Stop::Stream(error) => SnapshotError::Save { path: path.to_owned(), error },
            Stop::Other(error) => error,
        }
    }
}

impl From<StreamError> for Stop {
    fn from(error: StreamError) -> Self {
        Stop::Stream(error)
    }
}

impl From<SnapshotError> for Stop {
    fn from(error: SnapshotError) -> Self {
        Stop::Other(error)
    }
}

impl From<VmError> for Stop {
    fn from(error: VmError) -> Self {
        Stop::Other(error.into())
    }
}

fn content(what: String) -> Stop {
    Stop::Other(SnapshotError::Content(what))
}

pub(super) fn write_snapshot<W: Write>(
    output: W,
    kind: StreamKind,
    source: SnapshotSource<'_>,
    progress: &mut dyn FnMut(SaveProgress) -> ControlFlow<()>,
) -> Result<SaveSummary, Stop> {
    // Before memory is read: taking the state may write to it.
    let sections = match kind {
        StreamKind::Remains => Vec::new(),
        _ => source.state.save_sections()?,
    };
    check_sections(&sections)?;
    let populated = source.memory.populated()?;

    let mut writer = RecordWriter::new(output, kind)?;
    write_control(&mut writer, RecordType::Machine, source.machine.encode())?;
    write_control(&mut writer, RecordType::Config, source.config.encode())?;
    let mut kinds = Vec::new();
    for blob in source.blobs {
        if kinds.contains(&blob.kind) {
            return Err(content(format!("two blobs are of kind {:?}", blob.kind)));
        }
        kinds.push(blob.kind);
        write_blob(&mut writer, blob)?;
    }
    let layout = source.memory.layout();
    write_control(&mut writer, RecordType::Layout, encode_layout(layout))?;

    let mut absent = PageSet::full(layout);
    absent.minus(&populated);
    let zero = write_pages(&mut writer, source.memory, &populated, progress)?;
    write_runs(&mut writer, RecordType::Zero, &zero)?;
    write_runs(&mut writer, RecordType::Absent, &absent)?;

    for section in &sections {
        write_control(&mut writer, RecordType::State, encode_section(section))?;
    }
    let zero_pages = zero.count();
    let totals = PageTotals {
        data: populated.count() - zero_pages,
        zero: zero_pages,
        absent: absent.count(),
    };
    let file_bytes = writer.finish(totals)?;
    Ok(SaveSummary {
        file_bytes,
        data_pages: totals.data,
        zero_pages: totals.zero,
        absent_pages: totals.absent,
    })
}

/// Refuses what a reader would refuse.
pub(crate) fn check_sections(sections: &[Section]) -> Result<(), Stop> {
    let bytes: u64 = sections.iter().map(|section| section.data.len() as u64).sum();
    if sections.len() > MAX_SECTIONS || bytes > MAX_STATE_BYTES {
        return Err(content(format!(
            "{} states of {bytes} bytes; the limits are {MAX_SECTIONS} and {MAX_STATE_BYTES}",
            sections.len()
        )));
    }
    let mut seen = HashSet::new();
    for section in sections {
        if !seen.insert((&section.kind, section.instance)) {
            return Err(content(format!(
                "two states are of {} {}",
                section.kind, section.instance
            )));
        }
    }
    Ok(())
}

fn write_control<W: Write>(
    writer: &mut RecordWriter<W>,
    record_type: RecordType,
    payload: Result<Vec<u8>, Problem>,
) -> Result<(), StreamError> {
    let payload = payload.map_err(|problem| writer.error(problem))?;
    writer.write(record_type, &[&payload])
}

pub(crate) fn write_blob<W: Write>(
    writer: &mut RecordWriter<W>,
    blob: BlobSource<'_>,
) -> Result<(), Stop> {
    let BlobSource { kind, length: total, reader } = blob;
    if total > MAX_BLOB_BYTES {
        return Err(content(format!("{kind:?} of {total} bytes; the limit is {MAX_BLOB_BYTES}")));
    }
    let mut buffer = vec![0; MAX_BLOB_CHUNK.min(total as usize)];
    let mut offset = 0;
    // An empty blob has one empty record.
    loop {
        let length = buffer.len().min((total - offset) as usize);
        let data = &mut buffer[..length];
        reader.read_exact(data).map_err(|error| {
            content(format!("cannot read {kind:?} at byte {offset} of {total}: {error}"))
        })?;
        let chunk = BlobChunk { kind, total, offset, data };
        writer.write(RecordType::Blob, &[&chunk.head(), chunk.data])?;
        offset += length as u64;
        if offset == total {
            return Ok(());
        }
    }
}

/// Pages on their way to the file. They are copied once, into a buffer that is used again, for
/// two reasons: the checksum must be of the very bytes that are written, and a page is then tested
/// for zeros, checksummed and written from the processor's cache.
struct PageBatch {
    runs: Vec<PageRange>,
    data: Vec<u8>,
    filled: usize,
    table: Vec<u8>,
}

impl PageBatch {
    fn new() -> Self {
        Self {
            runs: Vec::new(),
            data: vec![0; PAGES_PER_BATCH as usize * PAGE_BYTES],
            filled: 0,
            table: Vec::new(),
        }
    }

    /// Where the next page goes.
    fn slot(&mut self) -> &mut [u8] {
        &mut self.data[self.filled..self.filled + PAGE_BYTES]
    }

    /// Takes the page in [`PageBatch::slot`] in; returns whether the batch is full. `run` is the
    /// run of populated pages that it is from: where a region of memory touches the next one, a
    /// new run begins, and no run of the record may go on from one to the other.
    fn take(&mut self, gfn: Gfn, run: PageRange) -> bool {
        match self.runs.last_mut() {
            Some(last) if last.end() == gfn && run.start() != gfn => {
                *last = PageRange::trusted(last.start(), last.pages() + 1);
            }
            _ => self.runs.push(PageRange::trusted(gfn, 1)),
        }
        self.filled += PAGE_BYTES;
        self.filled == self.data.len()
    }

    /// Writes what was taken in.
    fn flush<W: Write>(&mut self, writer: &mut RecordWriter<W>) -> Result<(), StreamError> {
        if !self.runs.is_empty() {
            encode_runs(&self.runs, &mut self.table);
            writer.write(RecordType::Pages, &[&self.table, &self.data[..self.filled]])?;
            self.runs.clear();
            self.filled = 0;
        }
        Ok(())
    }
}

/// Writes the populated pages that hold anything; returns the others.
fn write_pages<W: Write>(
    writer: &mut RecordWriter<W>,
    memory: &dyn GuestMemory,
    populated: &PageSet,
    progress: &mut dyn FnMut(SaveProgress) -> ControlFlow<()>,
) -> Result<PageSet, Stop> {
    let pages_total = populated.count();
    let mut pages_done = 0;
    let mut zero = PageSet::empty(populated.layout());
    let mut batch = PageBatch::new();
    for run in populated.runs() {
        for chunk in run.chunks(PAGES_PER_BATCH) {
            let slice = memory.slice(chunk)?;
            for page in 0..chunk.pages() {
                let gfn = Gfn(chunk.start().0 + page);
                slice
                    .subslice(page as usize * PAGE_BYTES, PAGE_BYTES)
                    .map_err(|error| content(format!("page frame {gfn} is unreadable: {error}")))?
                    .copy_to(batch.slot());
                if is_zero(batch.slot()) {
                    zero.insert(PageRange::trusted(gfn, 1)).map_err(VmError::from)?;
                } else if batch.take(gfn, run) {
                    batch.flush(writer)?;
                }
            }
            pages_done += chunk.pages();
            let done = SaveProgress { pages_done, pages_total, bytes: writer.bytes() };
            if progress(done).is_break() {
                return Err(SnapshotError::Cancelled.into());
            }
        }
    }
    batch.flush(writer)?;
    Ok(zero)
}

/// Whether a page holds only zeros. The standard library compares with memcmp(3), which uses the
/// widest vectors that the processor has and stops at the first difference.
fn is_zero(page: &[u8]) -> bool {
    static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    page == ZEROS
}

/// Writes a set of pages as records of runs.
pub(crate) fn write_runs<W: Write>(
    writer: &mut RecordWriter<W>,
    record_type: RecordType,
    pages: &PageSet,
) -> Result<(), StreamError> {
    let mut table = Vec::new();
    let mut runs = pages.runs().peekable();
    while runs.peek().is_some() {
        let batch: Vec<_> = runs.by_ref().take(MAX_RUNS).collect();
        encode_runs(&batch, &mut table);
        writer.write(record_type, &[&table])?;
    }
    Ok(())
}
