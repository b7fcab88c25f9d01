//! How long pages were waited for where QEMU's guest has gone, by QEMU's own trace events.
//!
//! Its destination logs `postcopy_page_req_add` when the thread that has read a page fault is about to ask for the page, and
//! `postcopy_page_req_del` when the page has been put in, whichever way it came. That is what minivmm's latency is, too. (QEMU's
//! blocktime is of vCPU threads only, and 0 where KVM's own workers fault in their place.)
//!
//! Two lines of a log for each fault: some microseconds beside the hundreds that it takes.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use ::tests::bench::Result;
use migration::histogram::Histogram;

const ASKED: &str = "postcopy_page_req_add";
const PUT_IN: &str = "postcopy_page_req_del";

/// The log of a destination.
#[derive(Debug)]
pub struct FaultTrace {
    path: PathBuf,
}

impl FaultTrace {
    /// In a folder, in place of one that was there.
    pub fn new(folder: &Path) -> Result<Self> {
        let path = folder.join("qemu-faults.log");
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(Self { path }),
        }
    }

    /// What makes QEMU write it. One that was built without traces in its log says so, and writes nothing.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            ["-trace", ASKED, "-trace", PUT_IN, "-msg", "timestamp=on", "-D"]
                .map(Into::into)
                .into();
        arguments.push(self.path.clone().into());
        arguments
    }

    /// The waits that are over, nanoseconds.
    pub fn waits(&self) -> Result<Histogram> {
        match std::fs::read_to_string(&self.path) {
            Ok(log) => Ok(waits(&log)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Histogram::default()),
            Err(error) => Err(format!("cannot read {}: {error}", self.path.display()).into()),
        }
    }
}

fn waits(log: &str) -> Histogram {
    let mut open = HashMap::new();
    let mut waits = Histogram::default();
    for (micros, event, page) in log.lines().filter_map(line) {
        match event {
            ASKED => drop(open.insert(page, micros)),
            PUT_IN => {
                if let Some(since) = open.remove(page) {
                    waits.add(micros.saturating_sub(since) * 1000);
                }
            }
            _ => {}
        }
    }
    waits
}

/// When, which event, which page: `THREAD@SECONDS.MICROSECONDS:EVENT new page req 0xADDRESS total N`.
fn line(line: &str) -> Option<(u64, &str, &str)> {
    let (time, text) = line.split_once('@')?.1.split_once(':')?;
    let (seconds, micros) = time.split_once('.')?;
    let micros = seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?;
    let mut words = text.split_whitespace();
    Some((micros, words.next()?, words.find(|word| word.starts_with("0x"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_waited_for_from_the_request_until_it_is_in() {
        let log = "\
8931@1795867283.999900:postcopy_page_req_add new page req 0x7f0000001000 total 1
8931@1795867283.999950:postcopy_page_req_add new page req 0x7f0000002000 total 2
8932@1795867284.000200:postcopy_page_req_del resolved page req 0x7f0000001000 total 1
qemu-system-x86_64: a warning
8931@1795867284.000201:object_dynamic_cast_assert 0x7f0000002000
8932@1795867284.000300:postcopy_page_req_del resolved page req 0x7f0000003000 total 1
8931@1795867284.000400:postcopy_page_req_add new page req 0x7f0000004000 total 2
8932@1795867284.000950:postcopy_page_req_del resolved page req 0x7f0000002000 total 1
";
        let waits = waits(log);
        assert_eq!((waits.count(), waits.buckets()[18], waits.buckets()[19]), (2, 1, 1));
    }
}
