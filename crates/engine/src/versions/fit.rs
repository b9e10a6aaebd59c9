//! What must hold of a version's files beyond what loading them shows.
//!
//! A model whose weights hold a value that is no number loads and answers well until a prompt touches it; a tokenizer with
//! more tokens than the model has rows loads, and the first prompt with such a token fails, or takes the engine's thread
//! down. So every weight and every token id is looked at once, before the version may serve.

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use serde_json::Value;

use crate::{
    EngineError,
    source::{TensorAt, read_json, safetensors_header, safetensors_in},
};

const READ_BYTES: usize = 1 << 20;
/// What llama, qwen and their like call the table that has a row for each token.
const EMBEDDING: &str = "embed_tokens.weight";

/// Checks a directory in Hugging Face layout, and returns how many token ids the model has.
pub(super) fn check(directory: &Path) -> Result<u32, EngineError> {
    let rows = vocabulary(directory)?;
    check_tokens(directory, rows)?;
    for file in safetensors_in(directory)? {
        let tensors = safetensors_header(&file)?;
        let embedding = tensors.iter().find(|tensor| tensor.name.ends_with(EMBEDDING));
        if let Some(&found) = embedding.and_then(|tensor| tensor.shape.first())
            && found != rows
        {
            return Err(corrupt(&file, format!("it embeds {found} tokens, config.json says {rows}")));
        }
        check_finite(&file, &tensors)?;
    }
    u32::try_from(rows).map_err(|_| corrupt(directory, format!("its vocabulary of {rows} is too large")))
}

fn corrupt(path: &Path, reason: String) -> EngineError {
    EngineError::ModelCorrupt { path: path.to_owned(), reason }
}

fn vocabulary(directory: &Path) -> Result<u64, EngineError> {
    let path = directory.join("config.json");
    let missing =
        |what: &str| EngineError::ModelNotFound { path: directory.to_owned(), reason: format!("it has no {what}") };
    let config = read_json(&path)?.ok_or_else(|| missing("config.json"))?;
    let rows = config.get("vocab_size").and_then(Value::as_u64);
    rows.ok_or_else(|| corrupt(&path, "it has no vocab_size".to_owned()))
}

/// Every id that the tokenizer can give must have a row. The other way round rows may be left over: vocabularies are
/// padded to round sizes.
fn check_tokens(directory: &Path, rows: u64) -> Result<(), EngineError> {
    let path = directory.join("tokenizer.json");
    let tokenizer = read_json(&path)?.unwrap_or_default();
    let of_model = match tokenizer.pointer("/model/vocab") {
        Some(Value::Object(vocabulary)) => vocabulary.values().filter_map(Value::as_u64).max(),
        // A unigram model lists its tokens in the order of their ids.
        Some(Value::Array(vocabulary)) => (vocabulary.len() as u64).checked_sub(1),
        _ => None,
    };
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    let of_added = added.and_then(|added| added.iter().filter_map(|token| token.get("id")?.as_u64()).max());
    match of_model.max(of_added) {
        None => Err(corrupt(&path, "it has no tokens".to_owned())),
        Some(largest) if largest >= rows => {
            Err(corrupt(&path, format!("its token {largest} is beyond the model's vocabulary of {rows}")))
        }
        Some(_) => Ok(()),
    }
}

fn check_finite(path: &Path, tensors: &[TensorAt]) -> Result<(), EngineError> {
    let io = |error: std::io::Error| EngineError::io(path, &error);
    let mut file = BufReader::with_capacity(READ_BYTES, File::open(path).map_err(io)?);
    let mut buffer = vec![0u8; READ_BYTES];
    for tensor in tensors {
        let is_finite: fn(&[u8]) -> bool = match tensor.kind.as_str() {
            "F32" => |bytes| bytes.as_chunks().0.iter().all(|&b| f32::from_le_bytes(b).is_finite()),
            "F64" => |bytes| bytes.as_chunks().0.iter().all(|&b| f64::from_le_bytes(b).is_finite()),
            // An exponent of ones alone is infinity or not a number.
            "F16" => |bytes| bytes.as_chunks().0.iter().all(|&b| u16::from_le_bytes(b) & 0x7c00 != 0x7c00),
            "BF16" => |bytes| bytes.as_chunks().0.iter().all(|&b| u16::from_le_bytes(b) & 0x7f80 != 0x7f80),
            // Whole numbers are always numbers; what they are scaled by is a tensor of floats.
            _ => continue,
        };
        file.seek(SeekFrom::Start(tensor.bytes.start)).map_err(io)?;
        let mut left = tensor.bytes.end - tensor.bytes.start;
        while left > 0 {
            let part = usize::try_from(left).map_or(READ_BYTES, |left| left.min(READ_BYTES));
            file.read_exact(&mut buffer[..part]).map_err(io)?;
            if !is_finite(&buffer[..part]) {
                return Err(corrupt(
                    path,
                    format!("tensor {:?} holds values that are not finite numbers", tensor.name),
                ));
            }
            left -= part as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use crate::testing;

    /// Changes the tiny model's files and returns what is found.
    fn changed(change: impl FnOnce(&Path)) -> Result<u32, String> {
        let dir = tempfile::tempdir().unwrap();
        testing::write_tiny_model(dir.path(), 1).unwrap();
        change(dir.path());
        check(dir.path()).map_err(|error| {
            assert!(matches!(error, EngineError::ModelCorrupt { .. } | EngineError::ModelNotFound { .. }), "{error}");
            error.to_string()
        })
    }

    fn replace(path: &Path, from: &str, to: &str) {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(path, text.replacen(from, to, 1)).unwrap();
    }

    #[test]
    fn a_sound_model_passes() {
        assert_eq!(changed(|_| {}).unwrap(), 260);
    }

    #[test]
    fn one_weight_that_is_no_number_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_tiny_model(dir.path(), 1).unwrap();
        let file = dir.path().join("model.safetensors");
        let whole = std::fs::read(&file).unwrap();
        let tensors = safetensors_header(&file).unwrap();
        for tensor in &tensors {
            for (at, value) in [(tensor.bytes.start, f32::NAN), (tensor.bytes.end - 4, f32::NEG_INFINITY)] {
                let mut bad = whole.clone();
                let at = usize::try_from(at).unwrap();
                bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
                std::fs::write(&file, bad).unwrap();
                let error = check(dir.path()).unwrap_err().to_string();
                assert!(error.contains(&tensor.name), "{error}");
            }
        }
    }

    #[test]
    fn half_precision_is_looked_at_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.safetensors");
        for (kind, good, bad) in [("F16", 0x7bff_u16, 0x7c01_u16), ("BF16", 0x7f7f, 0xff80)] {
            for (value, sound) in [(good, true), (bad, false)] {
                let header = format!(r#"{{"t":{{"dtype":"{kind}","shape":[2],"data_offsets":[0,4]}}}}"#);
                let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
                bytes.extend(header.as_bytes());
                bytes.extend([0, 0]);
                bytes.extend(value.to_le_bytes());
                std::fs::write(&file, bytes).unwrap();
                let found = check_finite(&file, &safetensors_header(&file).unwrap());
                assert_eq!(found.is_ok(), sound, "{kind} {value:x}");
            }
        }
    }

    #[test]
    fn a_tokenizer_and_a_model_of_different_sizes_do_not_fit() {
        let beyond = changed(|dir| replace(&dir.join("tokenizer.json"), "\"id\":3", "\"id\":260")).unwrap_err();
        assert!(beyond.contains("token 260"), "{beyond}");
        let smaller = changed(|dir| replace(&dir.join("config.json"), "\"vocab_size\":260", "\"vocab_size\":259"));
        assert!(smaller.unwrap_err().contains("token 259"));
        let larger = changed(|dir| replace(&dir.join("config.json"), "\"vocab_size\":260", "\"vocab_size\":300"));
        assert!(larger.unwrap_err().contains("it embeds 260 tokens"));
        assert!(changed(|dir| std::fs::write(dir.join("tokenizer.json"), "{}").unwrap()).is_err());
        assert!(changed(|dir| std::fs::remove_file(dir.join("config.json")).unwrap()).is_err());
    }
}
