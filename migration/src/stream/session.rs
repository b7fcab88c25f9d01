//! Payloads of the records of a live migration. `docs/PROTOCOL.md`, sections 5 to 9, explains them.
//!
//! Strings and bytes borrow from the payload when they are decoded, as in `control`.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::control::{as_bytes, decode, encode};
use super::error::{Problem, StreamError};
use super::format::RecordType;
use super::reader::Record;
use super::writer::RecordWriter;

/// Which record a structure is the payload of.
pub(crate) trait Payload {
    const TYPE: RecordType;
}

macro_rules! payloads {
    ($($(#[$doc:meta])* $name:ident $(<$life:lifetime>)? = $type:ident {
        $($(#[$attribute:meta])* $field:ident: $kind:ty,)*
    })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
            pub(crate) struct $name $(<$life>)? {
                $($(#[$attribute])* pub(crate) $field: $kind,)*
            }
            impl $(<$life>)? Payload for $name $(<$life>)? {
                const TYPE: RecordType = RecordType::$type;
            }
        )*
    };
}

payloads! {
    Hello<'a> = Hello {
        id: [u8; 16],
        program: &'a str,
        features: u64,
    }
    OfferWire<'a> = Offer {
        name: &'a str,
        mode: u16,
        connections: u16,
        verify: bool,
        downtime_us: u64,
        populated_pages: u64,
        alive_ms: u32,
        dead_ms: u32,
        resources_version: u16,
        #[serde(borrow, serialize_with = "as_bytes")]
        resources: &'a [u8],
        blobs: Vec<(u16, u64)>,
    }
    Accept = Accept {
        token: [u8; 16],
        connections: u16,
    }
    Refuse<'a> = Refuse {
        #[serde(borrow)]
        reasons: Vec<&'a str>,
    }
    Ready = Ready {
        load_us: u64,
    }
    Join = Join {
        id: [u8; 16],
        role: u16,
        index: u16,
        token: [u8; 16],
    }
    Joined = Joined {
        index: u16,
    }
    Recover = Recover {
        token: [u8; 16],
        connections: u16,
    }
    Recovered = Recovered {
        pages: u64,
        connections: u16,
    }
    Round = Round {
        number: u32,
    }
    Echo = Echo {
        number: u32,
    }
    Sync = Sync {
        pages: u64,
    }
    Complete = Complete {
        sections: u32,
        paused_us: u64,
    }
    Switch = Switch {
        pages: u64,
        unit: u32,
    }
    Loaded = Loaded {
        load_us: u64,
    }
    Commit = Commit {
        run: bool,
    }
    Resumed = Resumed {
        load_us: u64,
        own_us: u64,
        resume_us: u64,
        cpu_us: u64,
    }
    Frames<'a> = Frames {
        #[serde(borrow)]
        frames: Vec<FrameWire<'a>>,
    }
    Done = Done {}
    Drained<'a> = Drained {
        demand_pages: u64,
        prepaged_pages: u64,
        pushed_pages: u64,
        zero_pages: u64,
        local_pages: u64,
        duplicate_pages: u64,
        requests: u64,
        drain_us: u64,
        cpu_us: u64,
        latency: Vec<u64>,
        #[serde(borrow)]
        blocked: Vec<(&'a str, u64)>,
    }
    Abort<'a> = Abort {
        reason: u16,
        text: &'a str,
    }
    Alive = Alive {}
    Query = Query {
        id: [u8; 16],
        side: u16,
        reclaim: bool,
        token: [u8; 16],
    }
    VerdictWire = Verdict {
        verdict: u16,
    }
}

/// A frame in FRAMES.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FrameWire<'a> {
    pub(crate) card: u16,
    #[serde(borrow, serialize_with = "as_bytes")]
    pub(crate) bytes: &'a [u8],
}

impl Frames<'_> {
    /// Most frames in a record.
    pub(crate) const MOST: usize = 1024;
    /// Most bytes of frames in a record.
    pub(crate) const MOST_BYTES: usize = 256 << 10;
}

/// Ability in HELLO of a destination: it takes FRAMES.
pub(crate) const FEATURE_FRAMES: u64 = 1 << 0;

/// Role of a connection for pages in JOIN.
pub(crate) const ROLE_PAGES: u16 = 1;
/// Role of the connection for requests.
pub(crate) const ROLE_REQUESTS: u16 = 2;
/// Most page connections.
pub(crate) const MAX_CONNECTIONS: u16 = 64;
/// Most reasons in REFUSE, and the longest, bytes.
pub(crate) const MAX_REASONS: usize = 64;
pub(crate) const MAX_REASON_BYTES: usize = 1000;

/// The start of a text that has at most `limit` bytes.
pub(crate) fn shortened(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A peer's text as a person may be shown it: with no control character, which could steer a terminal
/// or begin a line of its own.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

impl<W: Write> RecordWriter<W> {
    /// Writes the record of a structure.
    pub(crate) fn send<T: Payload + Serialize>(&mut self, value: &T) -> Result<(), StreamError> {
        let payload = encode(T::TYPE, value).map_err(|problem| self.error(problem))?;
        self.write(T::TYPE, &[&payload])
    }
}

impl<'a> Record<'a> {
    /// The structure of this record, which must be of its type.
    pub(crate) fn decode<T: Payload + Deserialize<'a>>(
        &self,
        expected: &'static str,
    ) -> Result<T, StreamError> {
        if self.record_type != T::TYPE {
            let found = self.record_type;
            return Err(self.error(Problem::Unexpected { found, expected }));
        }
        decode(T::TYPE, self.payload).map_err(|problem| self.error(problem))
    }
}
