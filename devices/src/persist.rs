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
        if payload.version != Self::VERSION {
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
