//! Whether weights that somebody brought are those of the policy: names, shapes, type, numbers.
//!
//! A safetensors file is the length of a JSON header (8 bytes, little-endian), the header, and the numbers. It is read piece by piece,
//! so what is examined never has to fit into memory, and nothing is believed that was not looked at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

/// The shape of each weight.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// The longest header.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// A part of the header that is no weight.
const METADATA: &str = "__metadata__";

/// Why weights are not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum WeightsError {
    /// The file cannot be read.
    #[error("what came cannot be read from disk: {0}; send it again")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error(
        "what came is no safetensors file: {0}; write it with the safetensors library, or as scripts/python/chorus_trainer.py does"
    )]
    Format(String),
    /// A weight is not there.
    #[error("the weight '{0}' is missing; send all that GET /v1/training/weights has")]
    Missing(String),
    /// A weight is too much.
    #[error("the policy has no weight '{0}'; send only those that GET /v1/training/weights has, tied ones once")]
    Unknown(String),
    /// A weight is of another type.
    #[error("'{name}' is of the type {dtype}; convert it to float32 (F32)")]
    Type { name: String, dtype: String },
    /// A weight is of another shape.
    #[error(
        "'{name}' has the shape {given:?} and must have {wanted:?}; the policy's config.json cannot change during a run"
    )]
    Shape { name: String, given: Vec<usize>, wanted: Vec<usize> },
    /// A weight is no number, or so large that nothing computed with it is one.
    #[error(
        "'{0}' holds something that is infinite or no number; begin again from GET /v1/training/weights, with a lower learning rate"
    )]
    NotANumber(String),
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Examines a file.
pub(super) fn check(path: &Path, shapes: &Shapes) -> Result<(), WeightsError> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let total = file.get_ref().metadata()?.len();
    let (begin, entries) = header(&mut file, total)?;
    if let Some(name) = shapes.keys().find(|name| !entries.contains_key(*name)) {
        return Err(WeightsError::Missing(name.clone()));
    }
    for (name, entry) in &entries {
        let wanted = shapes.get(name).ok_or_else(|| WeightsError::Unknown(name.clone()))?;
        if entry.dtype != "F32" {
            return Err(WeightsError::Type { name: name.clone(), dtype: entry.dtype.clone() });
        }
        if entry.shape != *wanted {
            return Err(WeightsError::Shape { name: name.clone(), given: entry.shape.clone(), wanted: wanted.clone() });
        }
    }
    lie_side_by_side(&entries, total - begin)?;
    for (name, entry) in &entries {
        let (from, to) = entry.data_offsets;
        file.seek(SeekFrom::Start(begin + from))?;
        if !is_sound(&mut file, (to - from) / 4)? {
            return Err(WeightsError::NotANumber(name.clone()));
        }
    }
    Ok(())
}

/// Returns where the numbers begin, and what the header says of each weight.
fn header(file: &mut impl Read, total: u64) -> Result<(u64, BTreeMap<String, Entry>), WeightsError> {
    let wrong = |why: &str| WeightsError::Format(why.to_owned());
    let mut length = [0; 8];
    if total < 8 {
        return Err(wrong("it ends before its header"));
    }
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > total - 8 {
        return Err(wrong("its header is longer than it may be, or than the file"));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text)?;
    let parse =
        |error: serde_json::Error| WeightsError::Format(format!("its header is not JSON as it should be: {error}"));
    let mut values: BTreeMap<String, Value> = serde_json::from_slice(&text).map_err(parse)?;
    values.remove(METADATA);
    let entry = |(name, value): (String, Value)| Ok((name, serde_json::from_value(value).map_err(parse)?));
    Ok((8 + length, values.into_iter().map(entry).collect::<Result<_, WeightsError>>()?))
}

/// Checks that the weights lie one beside the other, each with its size, and that there is nothing else.
fn lie_side_by_side(entries: &BTreeMap<String, Entry>, bytes: u64) -> Result<(), WeightsError> {
    let mut spans: Vec<(u64, u64, u64)> = entries
        .values()
        .map(|entry| (entry.data_offsets.0, entry.data_offsets.1, 4 * entry.shape.iter().product::<usize>() as u64))
        .collect();
    spans.sort_unstable();
    let mut end = 0;
    for (from, to, size) in spans {
        if from != end || to.checked_sub(from) != Some(size) {
            return Err(WeightsError::Format(
                "its weights do not lie one beside the other with their sizes".to_owned(),
            ));
        }
        end = to;
    }
    if end == bytes {
        return Ok(());
    }
    Err(WeightsError::Format(format!("its header tells of {end} bytes of numbers, and {bytes} came")))
}

/// Says whether so many numbers are finite, and their squares' sum too, as the policy wants it.
fn is_sound(file: &mut impl Read, count: u64) -> io::Result<bool> {
    let mut squares = 0.0_f64;
    let mut number = [0; 4];
    for _ in 0..count {
        file.read_exact(&mut number)?;
        squares += f64::from(f32::from_le_bytes(number)).powi(2);
    }
    Ok(squares <= f64::from(f32::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn shapes() -> Shapes {
        BTreeMap::from([("norm".to_owned(), vec![2]), ("wide".to_owned(), vec![2, 3])])
    }

    fn header_of_both() -> Value {
        json!({
            "__metadata__": { "format": "pt" },
            "wide": { "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] },
            "norm": { "dtype": "F32", "shape": [2], "data_offsets": [24, 32] },
        })
    }

    fn file(header: &Value, numbers: &[f32]) -> Vec<u8> {
        let header = header.to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes
    }

    fn verdict(bytes: &[u8]) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, bytes).unwrap();
        check(&path, &shapes()).map_err(|error| error.to_string())
    }

    fn refused(bytes: &[u8], word: &str) {
        let error = verdict(bytes).unwrap_err();
        assert!(error.contains(word), "'{word}' is not in: {error}");
    }

    #[test]
    fn the_policys_own_weights_are_taken() {
        verdict(&file(&header_of_both(), &[0.5; 8])).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let changed = |change: &dyn Fn(&mut Value)| {
            let mut header = header_of_both();
            change(&mut header);
            file(&header, &[0.5; 8])
        };
        refused(&changed(&|header| drop(header.as_object_mut().unwrap().remove("norm"))), "'norm' is missing");
        refused(&changed(&|header| header["lm_head"] = header["norm"].clone()), "no weight 'lm_head'");
        refused(&changed(&|header| header["norm"]["dtype"] = json!("BF16")), "convert it to float32");
        refused(&changed(&|header| header["wide"]["shape"] = json!([3, 2])), "must have [2, 3]");
        refused(&changed(&|header| header["norm"]["data_offsets"] = json!([0, 8])), "side");
        refused(&changed(&|header| header["wide"]["data_offsets"] = json!([24, 0])), "side");
        refused(&changed(&|header| header["norm"] = json!(3)), "not JSON as it should be");
        for poison in [f32::NAN, f32::INFINITY, 1e30] {
            refused(&file(&header_of_both(), &[0.5, 0.5, poison, 0.5, 0.5, 0.5, 0.5, 0.5]), "'wide' holds");
        }
    }

    #[test]
    fn what_is_cut_short_or_lies_of_its_length_is_no_file() {
        let whole = file(&header_of_both(), &[0.5; 8]);
        for length in 0..whole.len() {
            assert!(verdict(&whole[..length]).is_err(), "{length}");
        }
        refused(&[&whole[..], &[0; 4]].concat(), "and 36 came");
        refused(&[&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(), "header is longer");
        refused(b"not weights at all", "no safetensors");
    }
}
