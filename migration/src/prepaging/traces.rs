//! Traces for [`super::simulation`]: walks as beacon, the built-in guest, makes them, and recorded ones.

use std::io::{self, BufRead};
use std::num::ParseIntError;
use std::time::Duration;

use super::simulation::Touch;
use crate::address::Gfn;

/// In which order a vCPU touches its pages, as beacon's `pattern=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// Uniformly at random.
    Random,
    /// Nine of ten touches go to a tenth of the pages.
    HotSpot,
    /// Every n-th page, starting one further after each pass.
    Stride(u64),
}

/// vCPUs that touch pages in turn, each its own share of the working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walks {
    /// The order of each vCPU.
    pub pattern: Pattern,
    /// Number of vCPUs, at least 1.
    pub cpus: u64,
    /// First page of the working set, which is contiguous.
    pub first: Gfn,
    /// Pages of the working set, at least one for each vCPU.
    pub pages: u64,
    /// Touches of all vCPUs together.
    pub touches: u64,
    /// Between a touch and the one before it.
    pub think: Duration,
}

/// The touches of such vCPUs. The same every time.
pub fn walks(walks: &Walks) -> Vec<Touch> {
    let Walks { pattern, first, pages, touches, think, .. } = *walks;
    let cpus = walks.cpus.max(1);
    let mut vcpus: Vec<(u64, Walk)> = (0..cpus)
        .map(|cpu| {
            let (start, end) = (pages * cpu / cpus, pages * (cpu + 1) / cpus);
            (first.0 + start, Walk::new(pattern, end - start, cpu))
        })
        .collect();
    (0..touches)
        .map(|touch| {
            let (start, walk) = &mut vcpus[(touch % cpus) as usize];
            Touch { gfn: Gfn(*start + walk.next_page()), think }
        })
        .collect()
}

/// One vCPU's order; the same as `Walk` of guest-images/beacon/src/core/walk.rs.
struct Walk {
    pattern: Pattern,
    pages: u64,
    position: u64,
    /// First page of the current pass of a stride.
    start: u64,
    draws: u64,
    seed: u64,
}

impl Walk {
    fn new(pattern: Pattern, pages: u64, seed: u64) -> Self {
        Self { pattern, pages: pages.max(1), position: 0, start: 0, draws: 0, seed }
    }

    fn next_page(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let page = self.position;
                self.position = (page + 1) % self.pages;
                page
            }
            Pattern::Random => self.draw() % self.pages,
            Pattern::HotSpot => {
                let hot = (self.pages / 10).max(1);
                if hot == self.pages || self.draw() % 10 < 9 {
                    self.draw() % hot
                } else {
                    hot + self.draw() % (self.pages - hot)
                }
            }
            Pattern::Stride(stride) => {
                let stride = (stride % self.pages).max(1);
                let page = self.position;
                self.position += stride;
                if self.position >= self.pages {
                    self.start = (self.start + 1) % stride;
                    self.position = self.start;
                }
                page
            }
        }
    }

    fn draw(&mut self) -> u64 {
        self.draws += 1;
        mix(self.seed << 48 ^ self.draws)
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// In which order a guest first touched its pages after it had moved.
#[derive(Debug, Clone, Copy)]
pub struct Recorded {
    /// What it is called in tables.
    pub name: &'static str,
    /// Pages of memory that the guest had. The simulator is given all of them as unsent, also those that the guest never wrote.
    pub memory_pages: u64,
    /// For [`read`]; its first line says what the guest was.
    pub text: &'static str,
}

/// Beacon with its walks over 8 MiB, and a Linux guest. Made by the program `record-traces` of the crate `tests`.
pub const RECORDED: [Recorded; 5] = [
    recorded("sequential", 32, include_str!("recorded/sequential.trace")),
    recorded("stride", 32, include_str!("recorded/stride.trace")),
    recorded("hot-spot", 32, include_str!("recorded/hotspot.trace")),
    recorded("random", 32, include_str!("recorded/random.trace")),
    recorded("Linux", 128, include_str!("recorded/linux.trace")),
];

const fn recorded(name: &'static str, memory_mib: u64, text: &'static str) -> Recorded {
    Recorded { name, memory_pages: (memory_mib << 20) / 4096, text }
}

/// Why a recorded trace was refused.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It could not be read.
    #[error("the trace could not be read: {0}")]
    Read(#[from] io::Error),
    /// A line is neither `GFN [MICROSECONDS]` nor `±STEP[xTIMES]`.
    #[error("line {line} of the trace, {text:?}, is neither `GFN [MICROSECONDS]` nor `+STEP` or `-STEP`, maybe with `xTIMES`: {why}")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// The line.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}

/// Most touches of a recorded trace.
const MAX_TOUCHES: usize = 1 << 24;

/// Reads a recorded trace: a touch a line, `GFN [MICROSECONDS]`, or touches at a distance from the one before (at first
/// from 0), `+STEP` or `-STEP`, so many times if `xTIMES` follows, without a time of the guest's own. The page frame is decimal, or hexadecimal after
/// `0x`; the time is the guest's own since the touch before, 0 if it is missing. Empty lines and what follows a `#`
/// are skipped.
///
/// # Errors
/// See [`TraceError`].
pub fn read(trace: impl BufRead) -> Result<Vec<Touch>, TraceError> {
    let mut touches = Vec::new();
    for (i, line) in trace.lines().enumerate() {
        let text = line?;
        let mut fields = text.split('#').next().unwrap_or_default().split_whitespace();
        let Some(first) = fields.next() else { continue };
        let more = match first.starts_with(['+', '-']) {
            true => steps(first, &mut touches),
            false => touch(first, fields.next()).map(|touch| touches.push(touch)),
        };
        more.map_err(|why| TraceError::Line { line: i + 1, text: text.clone(), why })?;
    }
    Ok(touches)
}

fn touch(gfn: &str, micros: Option<&str>) -> Result<Touch, String> {
    let number = |text| number(text).map_err(|why| why.to_string());
    let think = Duration::from_micros(number(micros.unwrap_or("0"))?);
    Ok(Touch { gfn: Gfn(number(gfn)?), think })
}

fn steps(text: &str, touches: &mut Vec<Touch>) -> Result<(), String> {
    let (step, times) = text.split_once('x').unwrap_or((text, "1"));
    let step: i64 = step.parse().map_err(|why: ParseIntError| why.to_string())?;
    let times: usize = times.parse().map_err(|why: ParseIntError| why.to_string())?;
    if times > MAX_TOUCHES - touches.len().min(MAX_TOUCHES) {
        return Err(format!("more than {MAX_TOUCHES} touches"));
    }
    let mut at = touches.last().map_or(0, |touch| touch.gfn.0);
    for _ in 0..times {
        at = at.checked_add_signed(step).ok_or("no page frame is there")?;
        touches.push(Touch { gfn: Gfn(at), think: Duration::ZERO });
    }
    Ok(())
}

fn number(text: &str) -> Result<u64, ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pages(pattern: Pattern, cpus: u64, pages: u64, touches: u64) -> Vec<u64> {
        let first = Gfn(100);
        let think = Duration::ZERO;
        let trace = walks(&Walks { pattern, cpus, first, pages, touches, think });
        trace.iter().map(|touch| touch.gfn.0).collect()
    }

    /// The figures are those of beacon's own tests.
    #[test]
    fn walks_are_those_of_beacon() {
        assert_eq!(pages(Pattern::Sequential, 1, 3, 5), [100, 101, 102, 100, 101]);
        assert_eq!(
            pages(Pattern::Stride(3), 1, 7, 8),
            [100, 103, 106, 101, 104, 102, 105, 100],
            "every page once, then again"
        );
        let hot = pages(Pattern::HotSpot, 1, 100, 10_000).iter().filter(|gfn| **gfn < 110).count();
        assert!((8_700..9_300).contains(&hot), "{hot} of 10000 in the hot tenth");
        assert!(pages(Pattern::Random, 1, 64, 4096).iter().all(|gfn| (100..164).contains(gfn)));
    }

    #[test]
    fn vcpus_take_turns_on_their_own_shares() {
        assert_eq!(pages(Pattern::Sequential, 2, 7, 6), [100, 103, 101, 104, 102, 105]);
    }

    #[test]
    fn a_recorded_trace_is_read() {
        let text = "# recorded\n0x1f 20\n\n7  # no time\n";
        let touch = |gfn, micros| Touch { gfn: Gfn(gfn), think: Duration::from_micros(micros) };
        assert_eq!(read(text.as_bytes()).unwrap(), [touch(0x1f, 20), touch(7, 0)]);
        let error = read("7 1\n8 soon\n".as_bytes()).unwrap_err();
        assert!(error.to_string().starts_with("line 2 of the trace, \"8 soon\""), "{error}");
        assert!(read("0xgg\n".as_bytes()).is_err());
        assert!(read("-1\n".as_bytes()).is_err());
        let steps = read("+3\n+2x2\n-1\n9 5\n+1\n".as_bytes()).unwrap();
        let gfns: Vec<u64> = steps.iter().map(|touch| touch.gfn.0).collect();
        assert_eq!(gfns, [3, 5, 7, 6, 9, 10]);
        for bad in ["+1x", "+x2", "+1x99999999999", "+3\n-2x2\n"] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
