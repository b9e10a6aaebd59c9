//! Where a model comes from, what must hold before it is loaded, and what it is.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    EngineError,
    gguf::{self, GgufHeader},
};

/// A safetensors header is JSON; a hundred thousand tensors fit in this.
const MAX_SAFETENSORS_HEADER_BYTES: u64 = 100 << 20;
const MAX_JSON_BYTES: u64 = 64 << 20;
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// One GGUF file, with its tokenizer and chat template inside.
    Gguf(PathBuf),
    /// A directory in Hugging Face layout: `config.json`, `tokenizer.json`, `*.safetensors`.
    Directory(PathBuf),
    /// A model on the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M-Instruct`; needs a
    /// network the first time.
    Hub(String),
}

impl ModelSource {
    /// Decides what `text` names: an existing file or directory, else a hub model `owner/name`.
    ///
    /// # Errors
    ///
    /// [`EngineError::ModelNotFound`] if it is neither.
    pub fn parse(text: &str) -> Result<Self, EngineError> {
        let path = PathBuf::from(text);
        if path.is_dir() {
            return Ok(Self::Directory(path));
        }
        if path.is_file() {
            return Ok(Self::Gguf(path));
        }
        let is_hub_name = text.split('/').count() == 2
            && !text.ends_with(".gguf")
            && text.split('/').all(|part| {
                !part.is_empty()
                    && !part.starts_with('.')
                    && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            });
        if is_hub_name {
            return Ok(Self::Hub(text.to_owned()));
        }
        Err(EngineError::ModelNotFound { path, reason: "there is no such file".to_owned() })
    }

    /// Returns the name that the model goes by unless the user gives another.
    pub(crate) fn default_name(&self) -> String {
        match self {
            Self::Gguf(path) => stem(path),
            Self::Directory(path) => {
                path.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
            }
            Self::Hub(name) => name.clone(),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Gguf(path) | Self::Directory(path) => path.clone(),
            Self::Hub(name) => PathBuf::from(name),
        }
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}

/// What was found out about a model without loading it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inspection {
    pub(crate) architecture: String,
    pub(crate) quantisation: String,
    pub(crate) context: Option<u32>,
    pub(crate) end_token: Option<u32>,
    pub(crate) has_chat_template: bool,
    /// The files that hold the weights, in name order.
    pub(crate) weights: Vec<PathBuf>,
    pub(crate) bytes: u64,
}

/// Checks that the model is there and whole, as far as that can be told without loading it.
///
/// A hub model is inspected in the local hub cache, and only after it was loaded.
pub(crate) fn inspect(source: &ModelSource) -> Result<Inspection, EngineError> {
    match source {
        ModelSource::Gguf(path) => inspect_gguf(path),
        ModelSource::Directory(path) => inspect_directory(path),
        ModelSource::Hub(name) => match hub_snapshot(name) {
            Some(path) => inspect_directory(&path),
            None => Err(EngineError::HubUnavailable {
                model: name.clone(),
                reason: "it is not in the local cache".to_owned(),
            }),
        },
    }
}

fn inspect_gguf(path: &Path) -> Result<Inspection, EngineError> {
    if !path.is_file() {
        let reason = "there is no such file".to_owned();
        return Err(EngineError::ModelNotFound { path: path.to_owned(), reason });
    }
    let GgufHeader { architecture, context, end_token, has_chat_template, quantisation, .. } = gguf::read_header(path)?;
    Ok(Inspection {
        architecture,
        quantisation,
        context,
        end_token,
        has_chat_template,
        bytes: file_len(path)?,
        weights: vec![path.to_owned()],
    })
}

fn inspect_directory(path: &Path) -> Result<Inspection, EngineError> {
    let missing =
        |what: &str| EngineError::ModelNotFound { path: path.to_owned(), reason: format!("it has no {what}") };
    if !path.is_dir() {
        let reason = "there is no such directory".to_owned();
        return Err(EngineError::ModelNotFound { path: path.to_owned(), reason });
    }
    let config = read_json(&path.join("config.json"))?.ok_or_else(|| missing("config.json"))?;
    read_json(&path.join("tokenizer.json"))?.ok_or_else(|| missing("tokenizer.json"))?;
    let tokenizer_config = read_json(&path.join("tokenizer_config.json"))?;
    let generation = read_json(&path.join("generation_config.json"))?;
    let weights = safetensors_in(path)?;
    if weights.is_empty() {
        return Err(missing("*.safetensors file"));
    }
    let mut bytes = 0;
    let mut by_type: BTreeMap<String, u64> = BTreeMap::new();
    for file in &weights {
        bytes += file_len(file)?;
        for tensor in safetensors_header(file)? {
            *by_type.entry(tensor.kind).or_default() += tensor.bytes.end - tensor.bytes.start;
        }
    }
    let end_token = [generation.as_ref(), Some(&config)]
        .into_iter()
        .flatten()
        .filter_map(|json| json.get("eos_token_id"))
        .find_map(|id| id.as_u64().or_else(|| id.as_array()?.first()?.as_u64()))
        .and_then(|id| u32::try_from(id).ok());
    let has_template = tokenizer_config.is_some_and(|json| json.get("chat_template").is_some());
    Ok(Inspection {
        architecture: config.get("model_type").and_then(Value::as_str).unwrap_or("unknown").to_owned(),
        quantisation: by_type
            .into_iter()
            .max_by_key(|(_, bytes)| *bytes)
            .map_or_else(|| "unknown".to_owned(), |(kind, _)| kind),
        context: config
            .get("max_position_embeddings")
            .and_then(Value::as_u64)
            .and_then(|context| u32::try_from(context).ok()),
        end_token,
        has_chat_template: has_template || path.join("chat_template.jinja").is_file(),
        weights,
        bytes,
    })
}

pub(crate) fn safetensors_in(path: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let entries = std::fs::read_dir(path).map_err(|error| EngineError::io(path, &error))?;
    let mut weights: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    weights.sort();
    Ok(weights)
}

/// Returns the JSON in a file, `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, EngineError> {
    if !path.is_file() {
        return Ok(None);
    }
    let corrupt = |reason: String| EngineError::ModelCorrupt { path: path.to_owned(), reason };
    if file_len(path)? > MAX_JSON_BYTES {
        return Err(corrupt(format!("it is larger than {MAX_JSON_BYTES} bytes")));
    }
    let bytes = std::fs::read(path).map_err(|error| EngineError::io(path, &error))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| corrupt(format!("it is not JSON: {error}")))
}

/// One tensor of a safetensors file.
#[derive(Debug)]
pub(crate) struct TensorAt {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) shape: Vec<u64>,
    /// Where its bytes lie in the file.
    pub(crate) bytes: Range<u64>,
}

/// Reads a safetensors header (<https://github.com/huggingface/safetensors>), checks it against the file's length, and
/// returns the tensors in the order of their bytes.
pub(crate) fn safetensors_header(path: &Path) -> Result<Vec<TensorAt>, EngineError> {
    let corrupt = |reason: String| EngineError::ModelCorrupt { path: path.to_owned(), reason };
    let io = |error: std::io::Error| corrupt(format!("it cannot be read: {error}"));
    let len = file_len(path)?;
    let mut file = File::open(path).map_err(|error| EngineError::io(path, &error))?;
    if len < 8 {
        return Err(corrupt(format!("it has only {len} bytes")));
    }
    let mut header_len = [0u8; 8];
    file.read_exact(&mut header_len).map_err(io)?;
    let header_len = u64::from_le_bytes(header_len);
    if header_len > MAX_SAFETENSORS_HEADER_BYTES || header_len > len - 8 {
        return Err(corrupt("its header is longer than the file; it is cut short or not safetensors".to_owned()));
    }
    let mut header = vec![0u8; usize::try_from(header_len).map_err(|e| corrupt(e.to_string()))?];
    file.read_exact(&mut header).map_err(io)?;
    let header: BTreeMap<String, Value> =
        serde_json::from_slice(&header).map_err(|error| corrupt(format!("its header: {error}")))?;
    let data = 8 + header_len;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, tensor) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let offset = |at: usize| tensor.get("data_offsets")?.get(at)?.as_u64();
        let (Some(begin), Some(end)) = (offset(0), offset(1)) else {
            return Err(corrupt(format!("tensor {name:?} has no offsets")));
        };
        if begin > end || end > len - data {
            return Err(corrupt(format!("it is cut short: tensor {name:?} ends at byte {end} of {}", len - data)));
        }
        let kind = tensor.get("dtype").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        let shape = tensor.get("shape").and_then(Value::as_array);
        let shape = shape.map(|shape| shape.iter().filter_map(Value::as_u64).collect()).unwrap_or_default();
        tensors.push(TensorAt { name, kind, shape, bytes: data + begin..data + end });
    }
    tensors.sort_by_key(|tensor| tensor.bytes.start);
    Ok(tensors)
}

fn file_len(path: &Path) -> Result<u64, EngineError> {
    let metadata = std::fs::metadata(path).map_err(|error| EngineError::io(path, &error))?;
    Ok(metadata.len())
}

/// Returns the newest snapshot of a hub model in the local cache.
fn hub_snapshot(name: &str) -> Option<PathBuf> {
    let cache = mistralrs::core::hf_hub_cache_dir()?;
    snapshot_in(&cache, name)
}

fn snapshot_in(cache: &Path, name: &str) -> Option<PathBuf> {
    let model = cache.join(format!("models--{}", name.replace('/', "--")));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let snapshot = model.join("snapshots").join(revision.trim());
    snapshot.is_dir().then_some(snapshot)
}

/// Returns BLAKE3 of one weights file, or BLAKE3 of the files' hashes in name order.
pub(crate) fn fingerprint(weights: &[PathBuf]) -> Result<[u8; 32], EngineError> {
    if let [only] = weights {
        return hash_file(only);
    }
    let mut all = blake3::Hasher::new();
    for file in weights {
        all.update(&hash_file(file)?);
    }
    Ok(*all.finalize().as_bytes())
}

fn hash_file(path: &Path) -> Result<[u8; 32], EngineError> {
    let mut file = File::open(path).map_err(|error| EngineError::io(path, &error))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; HASH_CHUNK_BYTES];
    loop {
        match file.read(&mut buffer).map_err(|error| EngineError::io(path, &error))? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            read => hasher.update(&buffer[..read]),
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use crate::testing;

    #[test]
    fn text_names_a_file_a_directory_a_hub_model_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, b"x").unwrap();
        let parse = |text: &str| ModelSource::parse(text);
        assert_eq!(parse(file.to_str().unwrap()).unwrap(), ModelSource::Gguf(file.clone()));
        assert_eq!(parse(dir.path().to_str().unwrap()).unwrap(), ModelSource::Directory(dir.path().to_owned()));
        assert_eq!(
            parse("HuggingFaceTB/SmolLM2-135M").unwrap(),
            ModelSource::Hub("HuggingFaceTB/SmolLM2-135M".to_owned())
        );
        for nothing in ["/no/such/file.gguf", "models/missing.gguf", "./a/b", "../a", "x", "a//b"] {
            let error = parse(nothing).unwrap_err();
            assert!(matches!(error, EngineError::ModelNotFound { .. }), "{nothing}: {error}");
        }
    }

    #[test]
    fn a_directory_is_inspected_and_its_damages_are_named() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_tiny_model(dir.path(), 1).unwrap();
        let source = ModelSource::Directory(dir.path().to_owned());
        let inspection = inspect(&source).unwrap();
        assert_eq!(inspection.architecture, "llama");
        assert_eq!(inspection.quantisation, "F32");
        assert!(inspection.has_chat_template);

        let weights = dir.path().join("model.safetensors");
        let whole = std::fs::read(&weights).unwrap();
        for len in [0, 7, 100, whole.len() - 1] {
            std::fs::write(&weights, &whole[..len]).unwrap();
            let error = inspect(&source).unwrap_err();
            assert!(matches!(error, EngineError::ModelCorrupt { .. }), "at {len}: {error}");
        }
        std::fs::remove_file(&weights).unwrap();
        assert!(matches!(inspect(&source).unwrap_err(), EngineError::ModelNotFound { .. }));
        std::fs::write(dir.path().join("config.json"), b"{").unwrap();
        assert!(matches!(inspect(&source).unwrap_err(), EngineError::ModelCorrupt { .. }));
    }

    #[test]
    fn the_fingerprint_follows_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, b"one").unwrap();
        std::fs::write(&b, b"two").unwrap();
        assert_eq!(fingerprint(std::slice::from_ref(&a)).unwrap(), *blake3::hash(b"one").as_bytes());
        let both = fingerprint(&[a.clone(), b.clone()]).unwrap();
        std::fs::write(&b, b"tow").unwrap();
        assert_ne!(fingerprint(&[a, b]).unwrap(), both);
    }

    #[test]
    fn a_hub_model_is_found_in_the_hubs_cache_layout() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(snapshot_in(cache.path(), "o/n"), None);
        let model = cache.path().join("models--o--n");
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::create_dir_all(model.join("snapshots/abc")).unwrap();
        std::fs::write(model.join("refs/main"), "abc\n").unwrap();
        assert_eq!(snapshot_in(cache.path(), "o/n"), Some(model.join("snapshots/abc")));
    }
}
