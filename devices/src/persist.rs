//! How a part of the machine saves and restores itself.
//!
//! Every stateful part has a plain `State` structure beside its live one. A state is frozen once
//! released: a new field is a new structure, a new `VERSION` and a conversion from the old one
//! (`bincode` does not describe itself, so nothing else would be noticed).

use serde::de::DeserializeOwned;
use serde::Serialize;

/// The one `bincode` configuration of this project.
///
/// Little-endian, variable-length integers, and a limit on what one payload may claim, so that a
/// hostile length is refused before memory is allocated.
const BINCODE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<PAYLOAD_LIMIT>,
> = bincode::config::standard().with_limit::<PAYLOAD_LIMIT>();

/// Largest payload of one part, bytes.
pub const PAYLOAD_LIMIT: usize = 16 << 20;

/// The state of one part, ready for a stream or a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Which kind of part: `serial`, `vcpu`, `pit`, ...
    pub kind: String,
    /// Which one of its kind: vCPU number, device slot; 0 where there is only one.
    pub instance: u32,
    /// Version of the state structure.
    pub version: u16,
    /// The encoded state.
    pub data: Vec<u8>,
}

/// Why a payload could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The state could not be encoded.
    #[error("state of {kind} cannot be encoded: {error}")]
    Encode {
        /// Kind of part.
        kind: &'static str,
        /// What the encoder said.
        error: bincode::error::EncodeError,
    },
    /// The bytes are not a state of this kind and version.
    #[error("state of {kind} version {version} is malformed: {error}")]
    Decode {
        /// Kind of part.
        kind: &'static str,
        /// Version that was claimed.
        version: u16,
        /// What the decoder said.
        error: bincode::error::DecodeError,
    },
    /// Bytes are left over.
    #[error("state of {kind} version {version} has {extra} bytes too many")]
    Trailing {
        /// Kind of part.
        kind: &'static str,
        /// Version that was claimed.
        version: u16,
        /// Number of bytes left over.
        extra: usize,
    },
    /// The payload is for another kind of part.
    #[error("state is of {found}, expected {expected}")]
    WrongKind {
        /// Kind that was expected.
        expected: &'static str,
        /// Kind that the payload names.
        found: String,
    },
    /// A value in the state is outside of what the part allows.
    #[error("state of {kind} is invalid: {reason}")]
    Invalid {
        /// Kind of part.
        kind: &'static str,
        /// Which value, and what it may be.
        reason: String,
    },
    /// The encoded state is over [`PAYLOAD_LIMIT`], so that nobody could read it.
    #[error(
        "state of {kind} takes {size} bytes, more than the {PAYLOAD_LIMIT} a payload may have"
    )]
    TooLarge {
        /// Kind of part.
        kind: &'static str,
        /// Encoded size, bytes.
        size: usize,
    },
    /// The payload was written by a program so old that its version is not converted any more.
    #[error(
        "state of {kind} has version {found}, which this program does not convert to {current}"
    )]
    OldVersion {
        /// Kind of part.
        kind: &'static str,
        /// Version that was found.
        found: u16,
        /// Version that this program writes.
        current: u16,
    },
    /// The payload was written by a newer program.
    #[error("state of {kind} has version {found}; this program reads up to {supported}: use a newer minivmm here")]
    UnknownVersion {
        /// Kind of part.
        kind: &'static str,
        /// Version that was found.
        found: u16,
        /// Newest version known here.
        supported: u16,
    },
}

/// A part of the machine that can be saved and restored.
pub trait Persist {
    /// Name of the part's kind in the stream.
    const KIND: &'static str;
    /// Version of `State`.
    const VERSION: u16;
    /// Plain data, apart from the live structure.
    type State: Serialize + DeserializeOwned;
    /// Why saving or restoring failed.
    type Error: From<PersistError>;

    /// Takes the state. The part must not be running.
    fn save(&self) -> Result<Self::State, Self::Error>;

    /// Puts a state into a freshly made part. Values are checked: a state comes from a peer.
    fn restore(&mut self, state: &Self::State) -> Result<(), Self::Error>;

    /// [`Persist::save`], encoded.
    fn save_payload(&self, instance: u32) -> Result<Payload, Self::Error> {
        let state = self.save()?;
        let data = bincode::serde::encode_to_vec(&state, BINCODE)
            .map_err(|error| PersistError::Encode { kind: Self::KIND, error })?;
        // The encoder knows no limit, the decoder does: fail on the side that can still go on.
        if data.len() > PAYLOAD_LIMIT {
            return Err(PersistError::TooLarge { kind: Self::KIND, size: data.len() }.into());
        }
        Ok(Payload { kind: Self::KIND.to_owned(), instance, version: Self::VERSION, data })
    }

    /// Decodes a payload of this kind. Parts with older versions override this to convert them.
    fn decode_payload(payload: &Payload) -> Result<Self::State, PersistError> {
        if payload.kind != Self::KIND {
            return Err(PersistError::WrongKind {
                expected: Self::KIND,
                found: payload.kind.clone(),
            });
        }
        if payload.version < Self::VERSION {
            return Err(PersistError::OldVersion {
                kind: Self::KIND,
                found: payload.version,
                current: Self::VERSION,
            });
        }
        if payload.version > Self::VERSION {
            return Err(PersistError::UnknownVersion {
                kind: Self::KIND,
                found: payload.version,
                supported: Self::VERSION,
            });
        }
        let (state, used) =
            bincode::serde::decode_from_slice(&payload.data, BINCODE).map_err(|error| {
                PersistError::Decode { kind: Self::KIND, version: payload.version, error }
            })?;
        if used != payload.data.len() {
            return Err(PersistError::Trailing {
                kind: Self::KIND,
                version: payload.version,
                extra: payload.data.len() - used,
            });
        }
        Ok(state)
    }

    /// [`Persist::restore`] from an encoded state.
    fn restore_payload(&mut self, payload: &Payload) -> Result<(), Self::Error> {
        let state = Self::decode_payload(payload)?;
        self.restore(&state)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
    struct PartState {
        number: u32,
        bytes: Vec<u8>,
    }

    struct Part(PartState);

    impl Persist for Part {
        const KIND: &'static str = "part";
        const VERSION: u16 = 3;
        type State = PartState;
        type Error = PersistError;

        fn save(&self) -> Result<PartState, PersistError> {
            Ok(self.0.clone())
        }

        fn restore(&mut self, state: &PartState) -> Result<(), PersistError> {
            self.0 = state.clone();
            Ok(())
        }
    }

    fn part() -> Part {
        Part(PartState { number: 0x1234_5678, bytes: vec![1, 2, 3] })
    }

    #[test]
    fn a_saved_state_restores() {
        let payload = part().save_payload(7).unwrap();
        assert_eq!((payload.kind.as_str(), payload.instance, payload.version), ("part", 7, 3));
        let mut other = Part(PartState { number: 0, bytes: Vec::new() });
        other.restore_payload(&payload).unwrap();
        assert_eq!(other.0, part().0);
    }

    #[test]
    fn the_encoding_is_frozen() {
        // 0xFC announces a 32-bit integer, then the length of the bytes.
        let payload = part().save_payload(0).unwrap();
        assert_eq!(payload.data, [0xFC, 0x78, 0x56, 0x34, 0x12, 3, 1, 2, 3]);
    }

    #[test]
    fn another_kind_is_refused() {
        let payload = Payload { kind: "serial".into(), ..part().save_payload(0).unwrap() };
        let error = part().restore_payload(&payload).unwrap_err();
        assert_eq!(error.to_string(), "state is of serial, expected part");
    }

    #[test]
    fn another_version_is_refused() {
        let saved = part().save_payload(0).unwrap();
        let newer = Payload { version: 4, ..saved.clone() };
        assert!(matches!(
            part().restore_payload(&newer),
            Err(PersistError::UnknownVersion { found: 4, supported: 3, .. })
        ));
        let older = Payload { version: 2, ..saved };
        assert!(matches!(
            part().restore_payload(&older),
            Err(PersistError::OldVersion { found: 2, current: 3, .. })
        ));
    }

    #[test]
    fn bytes_too_many_or_too_few_are_refused() {
        let mut payload = part().save_payload(0).unwrap();
        payload.data.push(0);
        assert!(matches!(
            part().restore_payload(&payload),
            Err(PersistError::Trailing { extra: 1, .. })
        ));
        for length in 0..payload.data.len() - 1 {
            let short = Payload { data: payload.data[..length].to_vec(), ..payload.clone() };
            assert!(matches!(part().restore_payload(&short), Err(PersistError::Decode { .. })));
        }
    }

    #[test]
    fn a_hostile_length_is_refused() {
        // A vector that claims 2^64 - 1 bytes, then one just over the limit.
        for length in [u64::MAX, PAYLOAD_LIMIT as u64 + 1] {
            let mut data = vec![0, 0xFD];
            data.extend(length.to_le_bytes());
            let payload = Payload { kind: "part".into(), instance: 0, version: 3, data };
            assert!(matches!(part().restore_payload(&payload), Err(PersistError::Decode { .. })));
        }
    }

    #[test]
    fn a_state_that_nobody_could_read_is_not_written() {
        let part = Part(PartState { number: 0, bytes: vec![0; PAYLOAD_LIMIT] });
        assert!(matches!(part.save_payload(0), Err(PersistError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let payload = Payload { kind: "part".into(), instance: 0, version: 3, data };
            let _ = part().restore_payload(&payload);
        }
    }
}
