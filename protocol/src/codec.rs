//! The one codec, and the only module that calls bincode.
//!
//! bincode is pinned: the crate is no longer maintained, and its successor does not compile. The format used here (little
//! endian, variable-length integers, no recursion, trailing bytes refused) is written down in `spec/codec.md` and held by the
//! golden vectors in `vectors/`, so another implementation can take its place without anybody on the wire noticing.
//!
//! Every value has exactly one encoding. bincode by itself accepts an integer in a longer form than it needs; [`decode`] does not,
//! because two encodings of one record would be two hashes of one record.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::enc::write::Writer;
use bincode::error::EncodeError;
use bincode::{Decode, Encode};

use crate::limits::MAX_BULK_BYTES;

/// What a whole message may claim from the decoder. The second belt: the first is that each [`crate::Text`], [`crate::List`] and
/// [`crate::Received`] compares its length with its own limit and allocates only for bytes that are there.
const CLAIM_LIMIT: usize = 2 * MAX_BULK_BYTES;

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
    /// A valid message, but not written in its one shortest form.
    #[error("a {kind} is not in its shortest form; every integer must take as few bytes as it can")]
    NotCanonical {
        /// What was expected.
        kind: &'static str,
    },
}

/// Encodes a value. Encoding to memory cannot fail for the types of this crate.
#[must_use]
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    // The limit guards decoding; a writer that grows has none. The types of this crate hold no lock, cell or foreign writer,
    // which are the only things that bincode refuses to encode.
    bincode::encode_to_vec(value, bincode::config::standard()).expect("plain data encodes to memory")
}

/// Returns how many bytes [`encode`] would make, without making them.
#[must_use]
pub fn encoded_len<T: Encode>(value: &T) -> usize {
    let mut count = Count(0);
    bincode::encode_into_writer(value, &mut count, bincode::config::standard()).expect("counting cannot fail");
    count.0
}

/// Decodes a value of at most `max` bytes. `kind` names it in the error.
///
/// # Errors
/// [`DecodeError`], without having allocated more than a small multiple of the bytes that are there.
pub fn decode<T: Encode + Decode<()>>(kind: &'static str, bytes: &[u8], max: usize) -> Result<T, DecodeError> {
    if bytes.len() > max {
        return Err(DecodeError::TooLarge { kind, len: bytes.len(), max });
    }
    let (value, used): (T, usize) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|error| DecodeError::Malformed { kind, reason: reason(&error) })?;
    if used != bytes.len() {
        return Err(DecodeError::Trailing { kind, extra: bytes.len() - used });
    }
    if bincode::encode_into_writer(&value, Same(bytes), bincode::config::standard()).is_err() {
        return Err(DecodeError::NotCanonical { kind });
    }
    Ok(value)
}

/// Says in words what bincode says in its own terms.
fn reason(error: &bincode::error::DecodeError) -> String {
    use bincode::error::DecodeError as Error;
    match error {
        Error::UnexpectedEnd { .. } => "it ends too early".to_owned(),
        Error::LimitExceeded => "it claims more than a message may hold".to_owned(),
        Error::UnexpectedVariant { found, .. } => format!("there is no variant {found} in this version"),
        Error::Utf8 { .. } => "a text is not UTF-8".to_owned(),
        Error::Other(text) => (*text).to_owned(),
        other => other.to_string(),
    }
}

/// Counts what is written.
struct Count(usize);

impl Writer for Count {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0 += bytes.len();
        Ok(())
    }
}

/// Compares what is written with what was read, and copies nothing.
struct Same<'a>(&'a [u8]);

impl Writer for Same<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0 = self.0.strip_prefix(bytes).ok_or(EncodeError::UnexpectedEnd)?;
        Ok(())
    }
}
