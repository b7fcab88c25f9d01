//! What the guest `beacon` says: one JSON object per line, and nothing else.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError};
use std::time::Instant;

use serde_json::Value;

use crate::{witness, PATIENCE};

/// Lines that wait for the test. When a test does not look, the console's own bounds apply.
const QUEUE: usize = 4096;
/// Lines shown when a test fails.
const SHOWN: usize = 12;

/// Events that say that something is wrong with the guest.
const ALARMS: [&str; 15] = [
    "corrupt",
    "fpu",
    "timer-stalled",
    "tsc-back",
    "clock-back",
    "exception",
    "error",
    "warning",
    "disk-error",
    "disk-stuck",
    "rng-error",
    "balloon-error",
    "attack-silent",
    "irq-lost",
    "virtio-broken",
];

/// Counters of a report that stay 0 in a healthy guest: those of the guest itself, and, by the ends
/// of their names, those of its devices.
const ERRORS: [&str; 5] = ["errors", "fpu_errors", "timer_stalls", "tsc_back", "clock_back"];
const DEVICE_ERRORS: [&str; 5] = ["_errors", "_stuck", "_broken", "_irqs_lost", "attack_silent"];

/// Counters of a report of a guest that lives: vCPUs, timer, memory, and the checks of registers
/// and memory.
pub(crate) const PROGRESS: [&str; 6] =
    ["tsc", "beats_min", "ticks", "writes", "verified", "fpu_checks"];

enum Piece {
    Line(String),
    /// The output has ended; what came after the last newline.
    End(String),
}

/// A guest's output, read on a thread of its own.
#[derive(Debug)]
pub struct Console {
    /// As the witness knows it.
    number: u64,
    pieces: Receiver<Piece>,
    seen: VecDeque<String>,
    tolerated: Vec<&'static str>,
    /// The first line may be the second half of one.
    begins_within: bool,
    end: Option<String>,
}

impl Console {
    /// Reads `output`. `head` is what an earlier console had of the first line.
    pub fn new(mut output: impl Read + Send + 'static, head: &str) -> Self {
        let (sender, pieces) = sync_channel(QUEUE);
        let mut line = head.as_bytes().to_vec();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let number = witness::new_console();
        let read = move || {
            let mut buffer = [0; 4096];
            let mut wanted = true;
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                for byte in &buffer[..count] {
                    if *byte != b'\n' {
                        line.push(*byte);
                        continue;
                    }
                    let line = text(&std::mem::take(&mut line));
                    // Beats are the witness' alone, also when nobody looks at the rest any more.
                    if !is_beat(number, &line) && wanted {
                        wanted = sender.send(Piece::Line(line)).is_ok();
                    }
                }
            }
            let _ = sender.send(Piece::End(text(&line)));
        };
        std::thread::Builder::new().name("console".into()).spawn(read).unwrap();
        Self {
            number,
            pieces,
            seen: VecDeque::new(),
            tolerated: Vec::new(),
            begins_within: false,
            end: None,
        }
    }

    /// Allows the output to begin in the middle of a line, whose rest is left out.
    pub fn may_begin_within_a_line(&mut self) {
        self.begins_within = true;
    }

    /// Does not fail at events of this kind.
    pub fn tolerate(&mut self, event: &'static str) {
        self.tolerated.push(event);
    }

    /// The next event; `None` at the end of the output.
    ///
    /// # Panics
    /// Nothing comes for [`PATIENCE`], a line is not JSON, or it says that the guest found
    /// something wrong (unless tolerated).
    #[track_caller]
    pub fn next_event(&mut self) -> Option<Value> {
        self.next_before(Instant::now() + PATIENCE)
            .unwrap_or_else(|| panic!("nothing came for {PATIENCE:?}"))
    }

    /// As [`Console::next`]; `None` at the deadline.
    #[track_caller]
    fn next_before(&mut self, deadline: Instant) -> Option<Option<Value>> {
        if self.end.is_some() {
            return Some(None);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.pieces.recv_timeout(left) {
                Ok(Piece::Line(line)) => line,
                Ok(Piece::End(tail)) => {
                    self.end = Some(tail);
                    return Some(None);
                }
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("the reading thread ended"),
            };
            if let Some(how) = witness::ran_twice(self.number) {
                panic!("{how}");
            }
            let first = std::mem::take(&mut self.begins_within);
            if self.seen.len() == SHOWN {
                self.seen.pop_front();
            }
            self.seen.push_back(line);
            let line = &self.seen[self.seen.len() - 1];
            match serde_json::from_str::<Value>(line) {
                Ok(event) if event.is_object() => {
                    self.check(&event);
                    return Some(Some(event));
                }
                _ if first => {}
                _ => panic!("not a JSON object: {line:?}"),
            }
        }
    }

    #[track_caller]
    fn check(&self, event: &Value) {
        let kind = event["event"].as_str().unwrap_or_default();
        let alarm = ALARMS.iter().any(|alarm| *alarm == kind && !self.tolerated.contains(alarm));
        let is_error = |name: &str| {
            ERRORS.contains(&name) || DEVICE_ERRORS.iter().any(|end| name.ends_with(end))
        };
        let mut counters = event.as_object().into_iter().flatten();
        let bad = counters.find(|(name, value)| {
            kind == "report"
                && is_error(name)
                && **value != 0
                && !self.tolerated.contains(&name.as_str())
        });
        assert!(!alarm && bad.is_none(), "the guest found an error: {event}");
    }

    /// The first event that `wanted` says yes to; those before it are skipped.
    ///
    /// # Panics
    /// It does not come within [`PATIENCE`]; see also [`Console::next`].
    #[track_caller]
    pub fn find(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_before(deadline) {
                Some(Some(event)) if wanted(&event) => return event,
                Some(Some(_)) => {}
                Some(None) => panic!("ended before {what}"),
                None => panic!("no {what} within {PATIENCE:?}"),
            }
        }
    }

    /// The next event of a kind.
    #[track_caller]
    pub fn event(&mut self, kind: &str) -> Value {
        self.find(kind, |event| event["event"] == kind)
    }

    /// The guest's boot and the number of its last beat here.
    #[must_use]
    pub fn last_beat(&self) -> Option<(u64, u64)> {
        witness::last_beat(self.number)
    }

    /// How the guest of this console ran twice, if it did.
    #[must_use]
    pub fn ran_twice(&self) -> Option<String> {
        witness::ran_twice(self.number)
    }

    /// Reads to the end; gives what came after the last newline.
    #[track_caller]
    pub fn to_end(&mut self) -> String {
        while self.next_event().is_some() {}
        if let Some(how) = self.ran_twice() {
            panic!("{how}");
        }
        self.end.clone().unwrap_or_default()
    }

    /// The last lines.
    fn log(&self) -> String {
        let mut text: String = self.seen.iter().map(|line| format!("  {line}\n")).collect();
        if let Some(end) = &self.end {
            text += &format!("  {end}<end>\n");
        }
        text
    }
}

/// Takes a line to the witness if it is a beat.
fn is_beat(console: u64, line: &str) -> bool {
    const BEAT: &str = "{\"event\":\"beat\",";
    if !line.starts_with(BEAT) {
        return false;
    }
    let Ok(beat) = serde_json::from_str::<Value>(line) else { return false };
    match (beat["boot"].as_u64(), beat["n"].as_u64()) {
        (Some(boot), Some(number)) => witness::beat(console, boot, number),
        _ => return false,
    }
    true
}

/// A number of an event.
#[must_use]
#[track_caller]
pub fn number(event: &Value, name: &str) -> u64 {
    event[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {event}"))
}

/// Whether `after` is a report of the guest that gave `before`, some time later, in which all that
/// it does has gone on ([`PROGRESS`]).
#[must_use]
#[track_caller]
pub fn goes_on(before: &Value, after: &Value) -> bool {
    PROGRESS.iter().all(|name| number(after, name) > number(before, name))
}

impl Drop for Console {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the guest's last lines:\n{}", self.log());
        }
    }
}
