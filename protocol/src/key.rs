//! Ed25519 keys. A node's id is its public key, shown as a `did:key` (W3C DID method `key`, multicodec `ed25519-pub`).

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError, EncodeError};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Serialize, Serializer};
use zeroize::Zeroizing;

use crate::id::ParseIdError;

const DID_PREFIX: &str = "did:key:z";
/// Multicodec `ed25519-pub` (0xed) as an unsigned varint.
const MULTICODEC_ED25519: [u8; 2] = [0xed, 0x01];

/// Keys that a thread remembers as checked, one for each value of eleven of their bits. About 400 KiB.
const MEMO_KEYS: usize = 2048;

thread_local! {
    /// Points of keys that passed, so that a result depends on the bytes alone and only its cost on what came before.
    static MEMO: RefCell<Vec<Option<VerifyingKey>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that are no Ed25519 public key in which this house trusts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a usable Ed25519 public key (it does not decompress, is not canonical, or has a small order)")]
pub struct InvalidKey;

/// A node: its Ed25519 public key. A value of this type always decompresses, is never of small order, and is the one encoding of
/// its point, so that a node has one id and no other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// Takes 32 bytes, and checks that they are a key.
    ///
    /// # Errors
    /// [`InvalidKey`] when they are none.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, InvalidKey> {
        checked(bytes).map(|_| Self(*bytes))
    }

    /// Returns the public key's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns ten characters of the DID that tell nodes apart in logs and tables.
    #[must_use]
    pub fn fmt_short(&self) -> String {
        let did = self.to_string();
        // Every Ed25519 DID begins with "did:key:z6Mk"; what follows differs.
        did.get(DID_PREFIX.len() + 3..DID_PREFIX.len() + 11).unwrap_or(&did).to_owned()
    }

    /// Checks a signature strictly: no malleability, no small-order keys.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        checked(&self.0).is_ok_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
    }
}

/// Returns a key's point, if it is one in which this house trusts. Checking costs a square root in the field, about a tenth of a
/// signature, and the same few authors come again and again: what passed is remembered.
fn checked(bytes: &[u8; 32]) -> Result<VerifyingKey, InvalidKey> {
    let slot = usize::from(u16::from_le_bytes([bytes[0], bytes[1]])) % MEMO_KEYS;
    let remembered = MEMO.try_with(|memo| memo.borrow().get(slot).copied().flatten());
    if let Some(key) = remembered.ok().flatten().filter(|key| key.as_bytes() == bytes) {
        return Ok(key);
    }
    let key = VerifyingKey::from_bytes(bytes).map_err(|_| InvalidKey)?;
    if key.is_weak() || !is_canonical(bytes) {
        return Err(InvalidKey);
    }
    // A thread that is about to end has no memo any more, and needs none.
    let _ended = MEMO.try_with(|memo| {
        let mut memo = memo.borrow_mut();
        memo.resize(MEMO_KEYS, None);
        memo[slot] = Some(key);
    });
    Ok(key)
}

/// Returns whether the y-coordinate is below the field's prime, 2^255 - 19 (little-endian, the sign of x in the top bit).
/// Decompression alone takes it modulo the prime, which would give one key two ids.
fn is_canonical(bytes: &[u8; 32]) -> bool {
    bytes[31] & 0x7f != 0x7f || bytes[1..31].iter().any(|byte| *byte != 0xff) || bytes[0] < 0xed
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; 34];
        bytes[..2].copy_from_slice(&MULTICODEC_ED25519);
        bytes[2..].copy_from_slice(&self.0);
        write!(f, "{DID_PREFIX}{}", bs58::encode(bytes).into_string())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fmt_short())
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let error =
            || ParseIdError { what: "node id", text: text.chars().take(80).collect(), expected: "did:key:z6Mk…" };
        let encoded = text.strip_prefix(DID_PREFIX).ok_or_else(error)?;
        let mut bytes = [0; 34];
        let len = bs58::decode(encoded).onto(&mut bytes).map_err(|_| error())?;
        match bytes.split_first_chunk::<2>() {
            Some((&MULTICODEC_ED25519, key)) if len == 34 => {
                let key: &[u8; 32] = key.try_into().map_err(|_| error())?;
                Self::from_bytes(key).map_err(|_| error())
            }
            _ => Err(error()),
        }
    }
}

impl Serialize for NodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Encode for NodeId {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.encode(encoder)
    }
}

impl<C> Decode<C> for NodeId {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes = <[u8; 32]>::decode(decoder)?;
        Self::from_bytes(&bytes).map_err(|_| DecodeError::Other("not a usable Ed25519 public key"))
    }
}

impl<'de, C> BorrowDecode<'de, C> for NodeId {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}

/// A node's secret. Wiped from memory when dropped, and never printed.
#[derive(Clone)]
pub struct SecretKey(SigningKey);

impl SecretKey {
    /// Makes the key from its 32 secret bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(bytes))
    }

    /// Returns the 32 secret bytes, to be written to the key file.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// Returns the id that belongs to this secret.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId(self.0.verifying_key().to_bytes())
    }

    /// Signs a message (Ed25519, deterministic).
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({:?})", self.node_id())
    }
}
