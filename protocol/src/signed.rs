//! The signed envelope, and the ladder a record climbs before it may touch state.
//!
//! What is signed is `BLAKE3-derive-key(context, length ‖ bytes)`, with the length as eight little-endian bytes and
//! `context = "chorus <wire version> <network> <kind> v<version>"`. A record of one network, kind or version can therefore never
//! pass for one of another. Step by step in `spec/signed.md`.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError as BincodeDecodeError, EncodeError};

use crate::bounded::read_bytes;
use crate::codec::{self, DecodeError};
use crate::id::{Hash, NetworkId};
use crate::key::{NodeId, SecretKey};
use crate::memo;

/// A record that is signed by its author.
pub trait Signable: Encode + Decode<()> + 'static {
    /// The record's name in the signing context.
    const KIND: &'static str;
    /// The version of the record's layout; a new layout gets a new number, and so a new context.
    const VERSION: u16;
    /// The most bytes its encoding may have.
    const MAX_BYTES: usize;
}

/// Why a record is not what its envelope says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The signature is not the author's for these bytes, in this network, for this kind and version.
    #[error("the signature on a {kind} is not {author:?}'s in this network; it was altered, or signed for another use")]
    BadSignature {
        /// What the record claims to be.
        kind: &'static str,
        /// Whose record it claims to be.
        author: NodeId,
    },
    /// Properly signed nonsense: the author is to blame, not the messenger.
    #[error("{author:?} signed something that is no valid record: {source}")]
    Malformed {
        /// Who signed it.
        author: NodeId,
        /// What is wrong with it.
        source: DecodeError,
    },
}

impl VerifyError {
    /// Returns the node that is proven to be at fault, if any. A bad signature proves nothing about the named author.
    #[must_use]
    pub fn culprit(&self) -> Option<NodeId> {
        match self {
            Self::BadSignature { .. } => None,
            Self::Malformed { author, .. } => Some(*author),
        }
    }
}

struct Parts<T> {
    author: NodeId,
    signature: [u8; 64],
    bytes: Arc<[u8]>,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Parts<T> {
    fn clone(&self) -> Self {
        Self { author: self.author, signature: self.signature, bytes: Arc::clone(&self.bytes), kind: PhantomData }
    }
}

fn context<T: Signable>(network: &NetworkId) -> String {
    format!("chorus {} {network} {} v{}", crate::WIRE_VERSION, T::KIND, T::VERSION)
}

/// An envelope as it came off the wire or the disk: bounded, but believed in nothing.
pub struct Received<T>(Parts<T>);

impl<T: Signable> Received<T> {
    /// Checks the signature strictly, then decodes the signed bytes.
    ///
    /// # Errors
    /// [`VerifyError`] when the signature does not hold or the bytes are no `T`.
    pub fn verify(self, network: &NetworkId) -> Result<Verified<T>, VerifyError> {
        if let Some(known) = memo::find(&self, network) {
            return Ok(known);
        }
        let digest = Hash::derive(&context::<T>(network), &[&self.0.bytes]);
        if !self.0.author.verify(digest.as_bytes(), &self.0.signature) {
            return Err(VerifyError::BadSignature { kind: T::KIND, author: self.0.author });
        }
        let verified = Verified::from_parts(self.0, digest)?;
        memo::keep(&verified, network);
        Ok(verified)
    }

    /// Decodes without checking the signature, for cheap checks that come before it. Nothing of it may be believed.
    ///
    /// # Errors
    /// [`DecodeError`] when the bytes are no `T`.
    pub fn unverified(&self) -> Result<T, DecodeError> {
        codec::decode::<T>(T::KIND, &self.0.bytes, T::MAX_BYTES)
    }

    /// Decodes without checking the signature: only for what this node itself verified before it wrote it to its own disk.
    ///
    /// # Errors
    /// [`VerifyError::Malformed`] when the bytes are no `T`.
    pub fn trust_own_disk(self, network: &NetworkId) -> Result<Verified<T>, VerifyError> {
        let digest = Hash::derive(&context::<T>(network), &[&self.0.bytes]);
        Verified::from_parts(self.0, digest)
    }
}

impl<T> Received<T> {
    /// Returns who claims to have signed it.
    #[must_use]
    pub fn claimed_author(&self) -> NodeId {
        self.0.author
    }

    pub(crate) fn signature(&self) -> &[u8; 64] {
        &self.0.signature
    }

    /// Returns the envelope's encoding in two parts, one behind the other. The second is what was signed; it is shared, not copied.
    #[must_use]
    pub fn to_parts(&self) -> (Vec<u8>, Arc<[u8]>) {
        let head = (self.0.author, self.0.signature, self.0.bytes.len() as u64);
        (codec::encode(&head), Arc::clone(&self.0.bytes))
    }

    /// Returns how many bytes were signed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.bytes.len()
    }

    /// Returns whether nothing was signed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.bytes.is_empty()
    }
}

impl<T> Clone for Received<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> PartialEq for Received<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.author == other.0.author && self.0.signature == other.0.signature && self.0.bytes == other.0.bytes
    }
}

impl<T> Eq for Received<T> {}

impl<T> fmt::Debug for Received<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Received({:?}, {} bytes)", self.0.author, self.0.bytes.len())
    }
}

impl<T> Encode for Received<T> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.author.encode(encoder)?;
        self.0.signature.encode(encoder)?;
        self.0.bytes.encode(encoder)
    }
}

impl<C, T: Signable> Decode<C> for Received<T> {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, BincodeDecodeError> {
        let author = NodeId::decode(decoder)?;
        let signature = <[u8; 64]>::decode(decoder)?;
        let bytes = read_bytes(decoder, T::MAX_BYTES, "a signed record is over the limit of its kind")?;
        Ok(Self(Parts { author, signature, bytes, kind: PhantomData }))
    }
}

impl<'de, C, T: Signable> BorrowDecode<'de, C> for Received<T> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, BincodeDecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}

/// A record whose author is certain. Its bytes are the ones that were signed. Copies share it.
pub struct Verified<T>(Arc<Record<T>>);

struct Record<T> {
    parts: Parts<T>,
    hash: Hash,
    value: T,
}

impl<T: Signable> Verified<T> {
    /// Signs a record of one's own.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`] when the record is over the limit of its kind.
    pub fn sign(key: &SecretKey, network: &NetworkId, value: T) -> Result<Self, DecodeError> {
        let bytes = codec::encode(&value);
        if bytes.len() > T::MAX_BYTES {
            return Err(DecodeError::TooLarge { kind: T::KIND, len: bytes.len(), max: T::MAX_BYTES });
        }
        let digest = Hash::derive(&context::<T>(network), &[&bytes]);
        let parts = Parts {
            author: key.node_id(),
            signature: key.sign(digest.as_bytes()),
            bytes: bytes.into(),
            kind: PhantomData,
        };
        let hash = record_hash(&parts.author, digest);
        Ok(Self(Arc::new(Record { parts, hash, value })))
    }

    fn from_parts(parts: Parts<T>, digest: Hash) -> Result<Self, VerifyError> {
        let value = codec::decode::<T>(T::KIND, &parts.bytes, T::MAX_BYTES)
            .map_err(|source| VerifyError::Malformed { author: parts.author, source })?;
        let hash = record_hash(&parts.author, digest);
        Ok(Self(Arc::new(Record { parts, hash, value })))
    }
}

fn record_hash(author: &NodeId, digest: Hash) -> Hash {
    Hash::derive("chorus record hash v1", &[author.as_bytes(), digest.as_bytes()])
}

impl<T> Verified<T> {
    /// Returns who signed it.
    #[must_use]
    pub fn author(&self) -> NodeId {
        self.0.parts.author
    }

    /// Returns the record's hash: of its author, its context and its signed bytes, not of the signature.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.0.hash
    }

    /// Returns how many bytes were signed.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        self.0.parts.bytes.len()
    }

    pub(crate) fn signature(&self) -> &[u8; 64] {
        &self.0.parts.signature
    }

    /// Returns whether this is what became of exactly that envelope.
    pub(crate) fn is_of(&self, received: &Received<T>) -> bool {
        let (mine, other) = (&self.0.parts, &received.0);
        mine.author == other.author && mine.signature == other.signature && mine.bytes == other.bytes
    }

    /// Returns the envelope, to be sent on exactly as it was verified.
    #[must_use]
    pub fn to_wire(&self) -> Received<T> {
        Received(self.0.parts.clone())
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Clone for Verified<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> PartialEq for Verified<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.hash == other.0.hash
    }
}

impl<T> Eq for Verified<T> {}

impl<T: fmt::Debug> fmt::Debug for Verified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified({:?} by {:?}: {:?})", self.0.hash, self.author(), self.0.value)
    }
}

/// A verified record that also passed the rules of the state it is about to enter. Made only by the machine that holds those
/// rules, with [`Admitted::new`] as its last step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted<T>(Verified<T>);

impl<T> Admitted<T> {
    /// Marks a record as admitted. The caller states by this call that every rule of its state was checked.
    #[must_use]
    pub fn new(verified: Verified<T>) -> Self {
        Self(verified)
    }
}

impl<T> Deref for Admitted<T> {
    type Target = Verified<T>;

    fn deref(&self) -> &Verified<T> {
        &self.0
    }
}
