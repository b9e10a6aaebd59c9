//! The one codec, and the only module that calls bincode.
//!
//! bincode is pinned: the crate is no longer maintained, and its successor does not compile. The format used here (little
//! endian, variable-length integers, no recursion, trailing bytes refused) is written down in `spec/codec.md` and held by the
//! golden vectors in `vectors/`, so another implementation can take its place without anybody on the wire noticing.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{Decode, Encode};

use crate::limits::MAX_DIRECT_BYTES;

/// What a decoder may claim in memory before it has read a byte of it. Element counts are checked against this.
const CLAIM_LIMIT: usize = 2 * MAX_DIRECT_BYTES;

const CONFIG: Configuration<LittleEndian, Varint, Limit<CLAIM_LIMIT>> =
    bincode::config::standard().with_limit::<CLAIM_LIMIT>();

/// Why bytes from a remote are not what they claim to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Longer than this kind of message may be; nothing was decoded.
    #[error("{len} bytes are over the limit of {max} for {kind}")]
    TooLarge {
        /// What was expected.
        kind: &'static str,
        /// How long the bytes are.
        len: usize,
        /// How long they may be.
        max: usize,
    },
    /// Not an encoding of this kind of message.
    #[error("not a valid {kind}: {reason}")]
    Malformed {
        /// What was expected.
        kind: &'static str,
        /// What the decoder stumbled over.
        reason: String,
    },
    /// A valid message followed by something else.
    #[error("{extra} bytes follow a {kind}")]
    Trailing {
        /// What was expected.
        kind: &'static str,
        /// How many bytes follow it.
        extra: usize,
    },
}

/// Encodes a value. Encoding to memory cannot fail for the types of this crate.
#[must_use]
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    // The limit guards decoding; a writer that grows has none. The types of this crate hold no lock, cell or foreign writer,
    // which are the only things that bincode refuses to encode.
    bincode::encode_to_vec(value, bincode::config::standard()).expect("plain data encodes to memory")
}

/// Decodes a value of at most `max` bytes. `kind` names it in the error.
///
/// # Errors
/// [`DecodeError`], without having allocated more than a small multiple of `max`.
pub fn decode<T: Decode<()>>(kind: &'static str, bytes: &[u8], max: usize) -> Result<T, DecodeError> {
    if bytes.len() > max {
        return Err(DecodeError::TooLarge { kind, len: bytes.len(), max });
    }
    let (value, used) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|error| DecodeError::Malformed { kind, reason: error.to_string() })?;
    if used != bytes.len() {
        return Err(DecodeError::Trailing { kind, extra: bytes.len() - used });
    }
    Ok(value)
}
