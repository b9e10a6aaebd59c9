//! Strings and lists that cannot be longer than their type says, also when a remote wrote them.
//!
//! bincode's own `Vec` and `String` claim a length against one limit for the whole message and allocate it at once. Here a length
//! is compared with the limit of its own type before anything is allocated, and memory is taken only for bytes that are really
//! there: a byte string is copied from the input, a list grows as its elements are decoded.

use std::any::{Any, TypeId};
use std::fmt;
use std::mem;
use std::ops::Deref;

use bincode::de::read::Reader;
use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError, EncodeError};
use serde::Serialize;

/// What a list may reserve before its first element is decoded, in bytes. After that it grows by doubling.
const FIRST_RESERVE_BYTES: usize = 4096;
/// How much is read at a time from a reader that cannot look ahead.
const READ_CHUNK_BYTES: usize = 4096;

/// Something is longer than its type allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} is over the limit of {max}; shorten it")]
pub struct OutOfBounds {
    /// The length that was offered: bytes of a [`Text`], elements of a [`List`].
    pub len: usize,
    /// The most that fits.
    pub max: usize,
}

/// UTF-8 of at most `MAX` bytes.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// Takes a string, or says by how much it is too long.
    ///
    /// # Errors
    /// [`OutOfBounds`] when `text` has more than `MAX` bytes.
    pub fn new(text: impl Into<String>) -> Result<Self, OutOfBounds> {
        let text = text.into();
        if text.len() > MAX {
            return Err(OutOfBounds { len: text.len(), max: MAX });
        }
        Ok(Self(text))
    }

    /// Takes a string and cuts it at the last character boundary that fits.
    #[must_use]
    pub fn truncated(text: &str) -> Self {
        Self(text[..text.floor_char_boundary(MAX)].to_owned())
    }

    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Gives the string back.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }
}

impl<const MAX: usize> Deref for Text<MAX> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const MAX: usize> Encode for Text<MAX> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.encode(encoder)
    }
}

impl<C, const MAX: usize> Decode<C> for Text<MAX> {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes = read_bytes(decoder, MAX, "a text is over its limit")?;
        let text = String::from_utf8(bytes).map_err(|error| DecodeError::Utf8 { inner: error.utf8_error() })?;
        Ok(Self(text))
    }
}

impl<'de, C, const MAX: usize> BorrowDecode<'de, C> for Text<MAX> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}

/// At most `MAX` elements.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const MAX: usize> List<T, MAX> {
    /// Takes a vector, or says by how much it is too long.
    ///
    /// # Errors
    /// [`OutOfBounds`] when `items` has more than `MAX` elements.
    pub fn new(items: Vec<T>) -> Result<Self, OutOfBounds> {
        if items.len() > MAX {
            return Err(OutOfBounds { len: items.len(), max: MAX });
        }
        Ok(Self(items))
    }

    /// Takes the first `MAX` elements.
    pub fn truncated(items: impl IntoIterator<Item = T>) -> Self {
        Self(items.into_iter().take(MAX).collect())
    }

    /// Gives the vector back.
    #[must_use]
    pub fn into_vec(self) -> Vec<T> {
        self.0
    }
}

impl<T, const MAX: usize> Deref for List<T, MAX> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const MAX: usize> IntoIterator for List<T, MAX> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T, const MAX: usize> IntoIterator for &'a List<T, MAX> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: fmt::Debug, const MAX: usize> fmt::Debug for List<T, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: Encode + 'static, const MAX: usize> Encode for List<T, MAX> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.encode(encoder)
    }
}

impl<C, T: Decode<C> + 'static, const MAX: usize> Decode<C> for List<T, MAX> {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        const OVER: &str = "a list is over its limit";
        if TypeId::of::<T>() == TypeId::of::<u8>() {
            let mut bytes: Vec<u8> = read_bytes(decoder, MAX, OVER)?;
            // The safe way to say that a vector of bytes is a vector of T once T is known to be a byte.
            let bytes: &mut dyn Any = &mut bytes;
            return Ok(Self(bytes.downcast_mut::<Vec<T>>().map(mem::take).unwrap_or_default()));
        }
        let len = read_len(decoder, MAX, OVER)?;
        let mut items = Vec::with_capacity(len.min(FIRST_RESERVE_BYTES / size_of::<T>().max(1)));
        for _ in 0..len {
            items.push(T::decode(decoder)?);
        }
        Ok(Self(items))
    }
}

impl<'de, C, T: Decode<C> + 'static, const MAX: usize> BorrowDecode<'de, C> for List<T, MAX> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}

/// Decodes a length, and refuses one above `max` before anybody acts on it.
fn read_len<D: Decoder>(decoder: &mut D, max: usize, over: &'static str) -> Result<usize, DecodeError> {
    let len = <u64 as Decode<D::Context>>::decode(decoder)?;
    usize::try_from(len).ok().filter(|len| *len <= max).ok_or(DecodeError::Other(over))
}

/// Decodes a byte string of at most `max` bytes, copies it once if its reader can look ahead, and allocates for no byte that is not there.
pub(crate) fn read_bytes<T, D>(decoder: &mut D, max: usize, over: &'static str) -> Result<T, DecodeError>
where
    T: for<'a> From<&'a [u8]>,
    D: Decoder,
{
    let len = read_len(decoder, max, over)?;
    decoder.claim_bytes_read(len)?;
    if let Some(bytes) = decoder.reader().peek_read(len) {
        let bytes = T::from(bytes);
        decoder.reader().consume(len);
        return Ok(bytes);
    }
    // Either the input is too short, or its reader cannot look ahead: one chunk at a time finds out.
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let start = bytes.len();
        bytes.resize(len.min(start + READ_CHUNK_BYTES), 0);
        decoder.reader().read(&mut bytes[start..])?;
    }
    Ok(T::from(&bytes))
}
