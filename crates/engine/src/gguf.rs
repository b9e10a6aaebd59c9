//! Reads and checks the header of a GGUF file, within bounds.
//!
//! The loaders of candle and mistral.rs trust the file: a damaged length makes them allocate without
//! limit, which ends the whole process, and a missing key makes them panic. So every GGUF file is
//! walked here first. The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! ```text
//!  "GGUF" · version · tensor count · metadata count
//!  metadata: key · type · value …
//!  tensors:  name · dimensions · type · offset …
//!  padding to `general.alignment` · tensor data
//! ```

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use crate::EngineError;

const MAGIC: &[u8; 4] = b"GGUF";
const MAX_METADATA: u64 = 4_096;
const MAX_TENSORS: u64 = 65_536;
const MAX_STRING_BYTES: u64 = 4 << 20;
const MAX_ARRAY_LEN: u64 = 4 << 20;
const MAX_ARRAY_DEPTH: u32 = 2;
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// GGUF architectures that mistral.rs 0.8.1 runs.
pub(crate) const ARCHITECTURES: &[&str] =
    &["llama", "mistral3", "phi2", "phi3", "qwen2", "qwen3", "qwen3moe", "starcoder2"];

/// Tensor types: number, name, weights per block, bytes per block.
const TENSOR_TYPES: &[(u32, &str, u64, u64)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (30, "BF16", 1, 2),
];

/// What the engine needs to know of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GgufHeader {
    pub(crate) architecture: String,
    pub(crate) name: Option<String>,
    pub(crate) context: Option<u32>,
    pub(crate) end_token: Option<u32>,
    pub(crate) has_chat_template: bool,
    /// Type that holds most of the weights of the repeated blocks.
    pub(crate) quantisation: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Integer(u64),
    Text(String),
    Other,
}

/// Why a header was refused; the caller adds the path.
type Refusal = String;

/// Reads the header of the file at `path` and checks that all its tensors lie inside the file.
pub(crate) fn read_header(path: &Path) -> Result<GgufHeader, EngineError> {
    let file = File::open(path).map_err(|error| EngineError::io(path, &error))?;
    let len = file.metadata().map_err(|error| EngineError::io(path, &error))?.len();
    let mut reader = Reader { inner: BufReader::new(file), position: 0, len };
    let header = parse(&mut reader).map_err(|reason| EngineError::ModelCorrupt { path: path.to_owned(), reason })?;
    if !ARCHITECTURES.contains(&header.architecture.as_str()) {
        return Err(EngineError::ModelUnsupported {
            path: path.to_owned(),
            reason: format!(
                "its architecture is {:?}; as GGUF these run: {}. Others run from a Hugging Face \
                 directory with safetensors",
                header.architecture,
                ARCHITECTURES.join(", ")
            ),
        });
    }
    Ok(header)
}

fn parse(reader: &mut Reader<impl Read>) -> Result<GgufHeader, Refusal> {
    if reader.len < 24 {
        return Err(format!("it has only {} bytes", reader.len));
    }
    if &reader.bytes::<4>()? != MAGIC {
        return Err("it does not begin with \"GGUF\"; it is not a GGUF file".to_owned());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("its GGUF version is {version}; 2 and 3 are supported"));
    }
    let tensors = reader.bounded("tensor count", MAX_TENSORS)?;
    let entries = reader.bounded("metadata count", MAX_METADATA)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        metadata.insert(key, value);
    }
    let quantisation = check_tensors(reader, tensors, &metadata)?;
    summarise(&metadata, quantisation)
}

/// Checks every tensor's shape, type and place, and returns the type with most weights.
fn check_tensors(
    reader: &mut Reader<impl Read>,
    tensors: u64,
    metadata: &BTreeMap<String, Value>,
) -> Result<String, Refusal> {
    if tensors == 0 {
        return Err("it has no tensors".to_owned());
    }
    let mut furthest = 0u64;
    let mut weights_by_type: BTreeMap<&str, u64> = BTreeMap::new();
    for _ in 0..tensors {
        let name = reader.string()?;
        let dimensions = reader.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(format!("tensor {name:?} has {dimensions} dimensions"));
        }
        let mut elements = 1u64;
        for _ in 0..dimensions {
            elements =
                (elements.checked_mul(reader.u64()?)).ok_or_else(|| format!("tensor {name:?} is impossibly large"))?;
        }
        let kind = reader.u32()?;
        let offset = reader.u64()?;
        let Some(&(_, kind, block, block_bytes)) = TENSOR_TYPES.iter().find(|t| t.0 == kind) else {
            return Err(format!("tensor {name:?} has the unknown type {kind}"));
        };
        if elements == 0 || !elements.is_multiple_of(block) {
            return Err(format!("tensor {name:?} has {elements} weights, not blocks of {block}"));
        }
        let end = (elements / block).checked_mul(block_bytes).and_then(|b| b.checked_add(offset));
        furthest = furthest.max(end.ok_or_else(|| format!("tensor {name:?} is impossibly large"))?);
        if name.starts_with("blk.") {
            *weights_by_type.entry(kind).or_default() += elements;
        }
    }
    let alignment = match metadata.get("general.alignment") {
        Some(&Value::Integer(alignment)) if alignment.is_power_of_two() => alignment,
        Some(_) => return Err("its alignment is not a power of two".to_owned()),
        None => DEFAULT_ALIGNMENT,
    };
    let data = reader.position.next_multiple_of(alignment);
    match data.checked_add(furthest) {
        Some(end) if end <= reader.len => {}
        _ => {
            return Err(format!(
                "it is cut short: its tensors need {furthest} bytes after the first {data}, it has {}",
                reader.len
            ));
        }
    }
    let most = weights_by_type.into_iter().max_by_key(|&(_, weights)| weights);
    Ok(most.map_or("unknown", |(kind, _)| kind).to_owned())
}

fn summarise(metadata: &BTreeMap<String, Value>, quantisation: String) -> Result<GgufHeader, Refusal> {
    let text = |key: &str| match metadata.get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let number = |key: &str| match metadata.get(key) {
        Some(&Value::Integer(number)) => u32::try_from(number).ok(),
        _ => None,
    };
    let architecture = text("general.architecture").ok_or("it names no architecture")?;
    // What mistral.rs takes for granted.
    let block_count = format!("{architecture}.block_count");
    for key in [block_count.as_str(), "tokenizer.ggml.model", "tokenizer.ggml.tokens"] {
        if !metadata.contains_key(key) {
            return Err(format!("its metadata lacks {key:?}"));
        }
    }
    Ok(GgufHeader {
        name: text("general.name"),
        context: number(&format!("{architecture}.context_length")),
        end_token: number("tokenizer.ggml.eos_token_id"),
        has_chat_template: metadata.contains_key("tokenizer.chat_template"),
        quantisation,
        architecture,
    })
}

/// Reads little-endian values and never beyond the file's end.
struct Reader<R> {
    inner: R,
    position: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    fn take(&mut self, bytes: u64) -> Result<(), Refusal> {
        if bytes > self.len - self.position {
            return Err(format!("it ends inside its header, at byte {}", self.len));
        }
        self.position += bytes;
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Refusal> {
        self.take(buffer.len() as u64)?;
        self.inner.read_exact(buffer).map_err(|error| error.to_string())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let mut buffer = [0u8; N];
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, Refusal> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bounded(&mut self, what: &str, limit: u64) -> Result<u64, Refusal> {
        let value = self.u64()?;
        if value > limit {
            return Err(format!("its {what} is {value}, at most {limit} makes sense"));
        }
        Ok(value)
    }

    fn string(&mut self) -> Result<String, Refusal> {
        let len = self.bounded("string length", MAX_STRING_BYTES)?;
        if len > self.len - self.position {
            return Err(format!("it ends inside its header, at byte {}", self.len));
        }
        let mut buffer = vec![0u8; usize::try_from(len).map_err(|error| error.to_string())?];
        self.fill(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer).into_owned())
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, Refusal> {
        Ok(match kind {
            0 | 1 | 7 => Value::Integer(u64::from(self.bytes::<1>()?[0])),
            2 | 3 => Value::Integer(u64::from(u16::from_le_bytes(self.bytes()?))),
            4 | 5 => Value::Integer(u64::from(self.u32()?)),
            6 => {
                self.u32()?;
                Value::Other
            }
            8 => Value::Text(self.string()?),
            9 => {
                if depth >= MAX_ARRAY_DEPTH {
                    return Err("its metadata nests arrays too deep".to_owned());
                }
                let element = self.u32()?;
                let len = self.bounded("array length", MAX_ARRAY_LEN)?;
                for _ in 0..len {
                    self.value(element, depth + 1)?;
                }
                Value::Other
            }
            10 | 11 => Value::Integer(self.u64()?),
            12 => {
                self.u64()?;
                Value::Other
            }
            _ => return Err(format!("its metadata has a value of the unknown type {kind}")),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn text_entry(key: &str, value: &str) -> Vec<u8> {
        [string(key), 8u32.to_le_bytes().to_vec(), string(value)].concat()
    }

    fn number_entry(key: &str, value: u32) -> Vec<u8> {
        [string(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat()
    }

    fn sample(architecture: &str) -> Vec<u8> {
        let entries = [
            text_entry("general.architecture", architecture),
            number_entry(&format!("{architecture}.block_count"), 1),
            number_entry(&format!("{architecture}.context_length"), 77),
            number_entry("tokenizer.ggml.eos_token_id", 2),
            text_entry("tokenizer.ggml.model", "gpt2"),
            text_entry("tokenizer.chat_template", "{{ messages }}"),
            [
                string("tokenizer.ggml.tokens"),
                9u32.to_le_bytes().to_vec(),
                8u32.to_le_bytes().to_vec(),
                1u64.to_le_bytes().to_vec(),
                string("a"),
            ]
            .concat(),
        ];
        let mut file = MAGIC.to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend((entries.len() as u64).to_le_bytes());
        file.extend(entries.concat());
        file.extend(string("blk.0.weight"));
        file.extend(2u32.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        file.extend(8u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend([1u8; 4 * 34]);
        file
    }

    fn read(bytes: &[u8]) -> Result<GgufHeader, EngineError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        read_header(&path)
    }

    #[test]
    fn a_whole_header_is_summarised() {
        let header = read(&sample("llama")).unwrap();
        assert_eq!(header.architecture, "llama");
        assert_eq!(header.context, Some(77));
        assert_eq!(header.end_token, Some(2));
        assert_eq!(header.quantisation, "Q8_0");
        assert!(header.has_chat_template);
    }

    #[test]
    fn every_truncation_is_a_typed_error() {
        let whole = sample("llama");
        for len in 0..whole.len() {
            let error = read(&whole[..len]).unwrap_err();
            assert!(matches!(error, EngineError::ModelCorrupt { .. }), "at {len}: {error}");
        }
    }

    #[test]
    fn no_flipped_byte_panics_or_allocates_without_bound() {
        let whole = sample("llama");
        for at in 0..whole.len() {
            for value in [0x00, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                // Whatever it says, it says so; a damaged byte in a name may well go unnoticed.
                let _ = read(&bytes);
            }
        }
    }

    #[test]
    fn an_unknown_architecture_is_unsupported_not_corrupt() {
        let error = read(&sample("gemma3")).unwrap_err();
        let EngineError::ModelUnsupported { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("gemma3") && reason.contains("llama"), "{reason}");
    }
}
