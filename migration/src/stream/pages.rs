//! Payloads that name runs of pages: PAGES, ZERO and ABSENT. See the picture in [`crate::stream`].

use crate::address::{ClaimedRange, PageRange, PAGE_BYTES, PAGE_SIZE};
use crate::layout::MemoryLayout;
use crate::stream::error::Problem;
use crate::stream::format::{u32_at, u64_at, RecordType};

/// Most pages in one PAGES record: 2 MiB of data, a huge page.
pub const MAX_PAGES_PER_RECORD: u64 = 512;
/// Pages that are written together where pages go one by one: what a bandwidth cap lets through at a time.
pub(crate) const PAGES_PER_BATCH: u64 = 256;
/// Most runs in one ZERO or ABSENT record.
pub const MAX_RUNS: usize = 65536;

/// Most runs in one REQUEST record.
pub const MAX_REQUEST_RUNS: usize = 64;

/// Count and reserved field before the runs, bytes.
pub(crate) const TABLE_HEAD_BYTES: usize = 8;
/// One run, bytes.
pub(crate) const RUN_BYTES: usize = 16;

pub(crate) const MAX_PAGES_BYTES: u64 = TABLE_HEAD_BYTES as u64
    + MAX_PAGES_PER_RECORD * RUN_BYTES as u64
    + MAX_PAGES_PER_RECORD * PAGE_SIZE;
pub(crate) const MAX_RUNS_BYTES: u64 = (TABLE_HEAD_BYTES + MAX_RUNS * RUN_BYTES) as u64;
pub(crate) const MAX_REQUEST_BYTES: u64 = (TABLE_HEAD_BYTES + MAX_REQUEST_RUNS * RUN_BYTES) as u64;

/// Writes the table of runs into `table`, whose old contents are lost. No run may have more than
/// `u32::MAX` pages; a longer one is split.
pub fn encode_runs(runs: &[PageRange], table: &mut Vec<u8>) {
    table.clear();
    table.resize(TABLE_HEAD_BYTES, 0);
    let mut count = 0u32;
    for piece in runs.iter().flat_map(|run| run.chunks(u64::from(u32::MAX))) {
        table.extend_from_slice(&piece.start().0.to_le_bytes());
        // The low four bytes are the count of pages, the high four the reserved field.
        table.extend_from_slice(&piece.pages().to_le_bytes());
        count += 1;
    }
    table[0..4].copy_from_slice(&count.to_le_bytes());
}

/// Reads the count of a table of runs.
///
/// # Errors
/// [`Problem::Malformed`] when there are none, or more than the record type may have.
pub(crate) fn decode_count(
    record_type: RecordType,
    head: &[u8; TABLE_HEAD_BYTES],
) -> Result<usize, Problem> {
    let limit = match record_type {
        RecordType::Pages => MAX_PAGES_PER_RECORD as usize,
        RecordType::Request => MAX_REQUEST_RUNS,
        _ => MAX_RUNS,
    };
    let count = u32_at(head, 0) as usize;
    if count == 0 || count > limit {
        return Err(malformed(record_type, format!("{count} runs, must be 1 to {limit}")));
    }
    if u32_at(head, 4) != 0 {
        return Err(Problem::Reserved("a table of runs"));
    }
    Ok(count)
}

/// Reads the runs after the count, and checks each against the layout.
pub(crate) fn decode_table(table: &[u8], layout: &MemoryLayout) -> Result<Vec<PageRange>, Problem> {
    let mut runs = Vec::with_capacity(table.len() / RUN_BYTES);
    for run in table.chunks_exact(RUN_BYTES) {
        if u32_at(run, 12) != 0 {
            return Err(Problem::Reserved("a run of pages"));
        }
        let claim = ClaimedRange { gfn: u64_at(run, 0), pages: u64::from(u32_at(run, 8)) };
        runs.push(claim.check(layout)?);
    }
    Ok(runs)
}

fn decode_head<'a>(
    record_type: RecordType,
    payload: &'a [u8],
    layout: &MemoryLayout,
) -> Result<(Vec<PageRange>, &'a [u8]), Problem> {
    let too_short = || malformed(record_type, "too short for its table of runs".to_owned());
    let (head, rest) = payload.split_first_chunk().ok_or_else(too_short)?;
    let count = decode_count(record_type, head)?;
    let (table, data) = rest.split_at_checked(count * RUN_BYTES).ok_or_else(too_short)?;
    Ok((decode_table(table, layout)?, data))
}

/// The runs of a ZERO or ABSENT record, each within the layout. Whether they overlap is for the
/// caller to see: later rounds of a live migration send pages again.
///
/// # Errors
/// [`Problem::Malformed`], [`Problem::Reserved`], [`Problem::Range`].
pub fn decode_runs(
    record_type: RecordType,
    payload: &[u8],
    layout: &MemoryLayout,
) -> Result<Vec<PageRange>, Problem> {
    let (runs, rest) = decode_head(record_type, payload, layout)?;
    if !rest.is_empty() {
        let what = format!("{} bytes after its table of runs", rest.len());
        return Err(malformed(record_type, what));
    }
    Ok(runs)
}

/// The runs of a PAGES record, each within the layout, and their data one after the other.
///
/// # Errors
/// As [`decode_runs`].
pub fn decode_pages<'a>(
    payload: &'a [u8],
    layout: &MemoryLayout,
) -> Result<(Vec<PageRange>, &'a [u8]), Problem> {
    let (runs, data) = decode_head(RecordType::Pages, payload, layout)?;
    // The record's own limit of length then bounds the number of pages.
    let pages: u64 = runs.iter().map(|run| run.pages()).sum();
    if data.len() != pages as usize * PAGE_BYTES {
        let what = format!("{} bytes of data for {pages} pages", data.len());
        return Err(malformed(RecordType::Pages, what));
    }
    Ok((runs, data))
}

fn malformed(record_type: RecordType, what: String) -> Problem {
    Problem::Malformed { record_type, what }
}
