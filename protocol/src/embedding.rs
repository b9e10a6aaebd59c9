//! Text embeddings, small enough to be gossiped.

use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError, EncodeError};
use serde::{Serialize, Serializer};

/// Dimensions of all-MiniLM-L6-v2, the embedder that every node of a network shares.
pub const DIMENSIONS: usize = 384;
/// The magnitude of the largest component.
const PEAK: u8 = 127;

/// The direction of a vector of 384 dimensions, quantised to one signed byte each: the component of the largest magnitude becomes
/// ±127, and a value of this type always has one such component. For vectors without a few dominating components, as sentence
/// embedders give them, the cosine of two quantised vectors lies within 0.01 of the exact one.
#[derive(Clone, PartialEq, Eq)]
pub struct Embedding(Box<[i8; DIMENSIONS]>);

impl Embedding {
    /// Quantises a vector of any length but zero. Returns `None` for the zero vector and for anything not finite.
    #[must_use]
    pub fn from_f32(vector: &[f32; DIMENSIONS]) -> Option<Self> {
        let peak = vector.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
        if !peak.is_finite() || peak <= 0.0 || vector.iter().any(|x| x.is_nan()) {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "the quotient lies within ±127")]
        let quantised = vector.map(|x| (x / peak * f32::from(PEAK)).round() as i8);
        Some(Self(Box::new(quantised)))
    }

    /// Returns the cosine of the angle between two embeddings, in [-1, 1]. Integer arithmetic up to the last step, so every
    /// node computes the same number.
    #[must_use]
    pub fn cosine(&self, other: &Self) -> f64 {
        let dot = |a: &[i8; DIMENSIONS], b: &[i8; DIMENSIONS]| -> i32 {
            a.iter().zip(b).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum()
        };
        let (norm_a, norm_b) = (dot(&self.0, &self.0), dot(&other.0, &other.0));
        if norm_a == 0 || norm_b == 0 {
            return 0.0;
        }
        f64::from(dot(&self.0, &other.0)) / (f64::from(norm_a) * f64::from(norm_b)).sqrt()
    }
}

impl std::fmt::Debug for Embedding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Embedding({}, {}, {}, …)", self.0[0], self.0[1], self.0[2])
    }
}

impl Serialize for Embedding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter())
    }
}

impl Encode for Embedding {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.map(i8::cast_unsigned).encode(encoder)
    }
}

impl<C> Decode<C> for Embedding {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes = <[u8; DIMENSIONS]>::decode(decoder)?;
        let vector = bytes.map(u8::cast_signed);
        if vector.iter().map(|x| x.unsigned_abs()).max() != Some(PEAK) {
            return Err(DecodeError::Other("an embedding's largest component is not 127"));
        }
        Ok(Self(Box::new(vector)))
    }
}

impl<'de, C> BorrowDecode<'de, C> for Embedding {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        <Self as Decode<C>>::decode(decoder)
    }
}
