//! Columns: numbers of one width, one after the other, little-endian, with no length of their own.
//!
//! How many there are is known from what came before. A column is read only when all its bytes are there, and is copied in one
//! pass, so a token costs no more than its bytes. One that lies in memory as it stands on the wire is written without a copy, so that
//! comparing what was read with what would be written costs a comparison.

use bincode::de::Decoder;
use bincode::de::read::Reader;
use bincode::enc::Encoder;
use bincode::enc::write::Writer;
use bincode::error::{DecodeError, EncodeError};
use bytemuck::Pod;

/// Bytes that are put in order before they go to the writer. A multiple of every width.
const BLOCK_BYTES: usize = 4096;

/// A number of a fixed width.
pub(super) trait Cell: Pod {
    /// Its width in bytes.
    const BYTES: usize;
    /// Writes it into a slice of its width.
    fn put(self, to: &mut [u8]);
    /// Reads it from a slice of its width.
    fn get(from: &[u8]) -> Self;
}

macro_rules! cell {
    ($($number:ty),*) => {$(
        impl Cell for $number {
            const BYTES: usize = size_of::<$number>();

            #[inline]
            fn put(self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_le_bytes());
            }

            #[inline]
            fn get(from: &[u8]) -> Self {
                let mut bytes = [0; size_of::<$number>()];
                bytes.copy_from_slice(from);
                <$number>::from_le_bytes(bytes)
            }
        }
    )*};
}

cell!(u8, u16, u32, u64, f32);

/// Writes numbers as they are.
pub(super) fn write<E: Encoder, C: Cell>(encoder: &mut E, items: &[C]) -> Result<(), EncodeError> {
    if cfg!(target_endian = "little") {
        return encoder.writer().write(bytemuck::cast_slice(items));
    }
    write_as(encoder, items, |item| item)
}

/// Writes what `narrow` makes of each item.
pub(super) fn write_as<E: Encoder, T: Copy, C: Cell>(
    encoder: &mut E,
    items: &[T],
    narrow: impl Fn(T) -> C,
) -> Result<(), EncodeError> {
    let mut block = [0; BLOCK_BYTES];
    for part in items.chunks(BLOCK_BYTES / C::BYTES) {
        let used = &mut block[..part.len() * C::BYTES];
        for (to, item) in used.chunks_exact_mut(C::BYTES).zip(part) {
            narrow(*item).put(to);
        }
        encoder.writer().write(used)?;
    }
    Ok(())
}

/// Reads `count` numbers as they are.
pub(super) fn read<D: Decoder, C: Cell>(decoder: &mut D, count: usize) -> Result<Vec<C>, DecodeError> {
    if cfg!(target_endian = "little") {
        return column(decoder, count, C::BYTES, |bytes| {
            let mut items = vec![C::zeroed(); count];
            bytemuck::cast_slice_mut(&mut items).copy_from_slice(bytes);
            items
        });
    }
    read_as(decoder, count, |item| item)
}

/// Reads `count` numbers and hands back what `widen` makes of each.
pub(super) fn read_as<D: Decoder, C: Cell, T>(
    decoder: &mut D,
    count: usize,
    widen: impl Fn(C) -> T,
) -> Result<Vec<T>, DecodeError> {
    column(decoder, count, C::BYTES, |bytes| bytes.chunks_exact(C::BYTES).map(|cell| widen(C::get(cell))).collect())
}

/// Takes a column's bytes once all of them are there.
fn column<D: Decoder, T>(
    decoder: &mut D,
    count: usize,
    width: usize,
    items: impl FnOnce(&[u8]) -> Vec<T>,
) -> Result<Vec<T>, DecodeError> {
    let len = count.checked_mul(width).ok_or(DecodeError::LimitExceeded)?;
    decoder.claim_bytes_read(len)?;
    let items = items(decoder.reader().peek_read(len).ok_or(DecodeError::UnexpectedEnd { additional: len })?);
    decoder.reader().consume(len);
    Ok(items)
}
