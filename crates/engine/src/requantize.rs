//! Writes a GGUF file anew with another quantisation.
//!
//! candle has fast kernels for some quantisations only (Q4_1, as SmolLM2 is shipped, is not one), so
//! a model can be made faster at install time. Every metadata entry is kept but the one that names
//! the file's type; of the tensors only the quantised matrices of the repeated blocks change:
//! norms stay f32, and the embedding table, which also is SmolLM2's output layer, stays what it is
//! unless it would grow.
//!
//! The file is written under a temporary name beside its target, flushed to disk, and renamed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use candle_core::{
    Device,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Content, Value},
    },
};

use crate::{EngineError, gguf};

/// A quantisation that can be written; both have fast kernels in candle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantKind {
    /// 8 bits a weight and a scale for 32.
    Q8_0,
    /// 4 bits a weight and a scale for 32.
    Q4_0,
}

impl QuantKind {
    fn dtype(self) -> GgmlDType {
        match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
        }
    }

    /// Returns llama.cpp's number for a file of mostly this type.
    fn file_type(self) -> u32 {
        match self {
            Self::Q8_0 => 7,
            Self::Q4_0 => 2,
        }
    }
}

impl FromStr for QuantKind {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        match text.to_ascii_lowercase().as_str() {
            "q8_0" => Ok(Self::Q8_0),
            "q4_0" => Ok(Self::Q4_0),
            _ => Err(EngineError::InvalidRequest {
                reason: format!("{text:?} is not a quantisation that can be written; q8_0 and q4_0 are"),
            }),
        }
    }
}

/// What [`requantize`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requantized {
    /// Tensors in the file.
    pub tensors: usize,
    /// Tensors written with the new type.
    pub changed: usize,
    /// Bytes of the new file.
    pub bytes: u64,
}

/// Writes the GGUF file `source` to `target` with its blocks' matrices as `kind`.
///
/// It blocks: call it from a thread of its own. It needs memory for both files.
///
/// # Errors
///
/// As for loading `source`; [`EngineError::Io`] if `target` cannot be written.
pub fn requantize(source: &Path, target: &Path, kind: QuantKind) -> Result<Requantized, EngineError> {
    if !source.is_file() {
        let reason = "there is no such file".to_owned();
        return Err(EngineError::ModelNotFound { path: source.to_owned(), reason });
    }
    gguf::read_header(source)?;
    let corrupt =
        |error: candle_core::Error| EngineError::ModelCorrupt { path: source.to_owned(), reason: error.to_string() };
    let file = File::open(source).map_err(|error| EngineError::io(source, &error))?;
    let mut reader = BufReader::new(file);
    let content = Content::read(&mut reader).map_err(corrupt)?;
    let mut tensors = BTreeMap::new();
    let mut changed = 0;
    for name in content.tensor_infos.keys() {
        let old = content.tensor(&mut reader, name, &Device::Cpu).map_err(corrupt)?;
        let new = convert(name, old, kind).map_err(corrupt)?;
        changed += usize::from(new.1);
        tensors.insert(name.clone(), new.0);
    }
    let file_type = Value::U32(kind.file_type());
    let mut metadata: BTreeMap<&str, &Value> =
        content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    metadata.insert("general.file_type", &file_type);
    // candle writes the data at multiples of 32 bytes, whatever the source asked for.
    metadata.remove("general.alignment");
    let bytes = write(target, &metadata, &tensors)?;
    Ok(Requantized { tensors: tensors.len(), changed, bytes })
}

/// Returns the tensor to write, and whether it is a new one.
fn convert(name: &str, old: QTensor, kind: QuantKind) -> candle_core::Result<(QTensor, bool)> {
    let dtype = kind.dtype();
    let rows_fit = old.shape().dims().last().is_some_and(|columns| columns % dtype.block_size() == 0);
    let is_matrix = old.rank() == 2 && rows_fit;
    let grows = dtype.type_size() * old.dtype().block_size() > old.dtype().type_size() * dtype.block_size();
    let wanted = is_matrix && old.dtype() != dtype && (name.starts_with("blk.") || !grows);
    // The embedding table is looked up and, tied, is the output layer: four bits cost most there.
    if !wanted || (!name.starts_with("blk.") && kind == QuantKind::Q4_0) {
        return Ok((old, false));
    }
    let weights = old.dequantize(&Device::Cpu)?;
    Ok((QTensor::quantize(&weights, dtype)?, true))
}

fn write(
    target: &Path,
    metadata: &BTreeMap<&str, &Value>,
    tensors: &BTreeMap<String, QTensor>,
) -> Result<u64, EngineError> {
    let temporary = temporary_beside(target);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, *value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let written = (|| {
        let mut writer = BufWriter::new(File::create(&temporary)?);
        gguf_file::write(&mut writer, &metadata, &tensors).map_err(std::io::Error::other)?;
        writer.flush()?;
        let file = writer.get_ref();
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&temporary, target)?;
        Ok(bytes)
    })();
    written.map_err(|error: std::io::Error| {
        // Nothing half made may stay; that it cannot be removed changes nothing.
        drop(std::fs::remove_file(&temporary));
        EngineError::io(target, &error)
    })
}

fn temporary_beside(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    target.with_file_name(name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use candle_core::Tensor;

    fn write_sample(path: &Path) {
        let matrix = Tensor::randn(0f32, 1f32, (64, 96), &Device::Cpu).unwrap();
        let q4_1 = QTensor::quantize(&matrix, GgmlDType::Q4_1).unwrap();
        let q8_0 = QTensor::quantize(&matrix, GgmlDType::Q8_0).unwrap();
        let norm = QTensor::quantize(&Tensor::ones(96, candle_core::DType::F32, &Device::Cpu).unwrap(), GgmlDType::F32);
        let norm = norm.unwrap();
        let text = |t: &str| Value::String(t.to_owned());
        let architecture = text("llama");
        let count = Value::U32(1);
        let model = text("gpt2");
        let tokens = Value::Array(vec![text("a"), text("b")]);
        let file_type = Value::U32(3);
        let metadata = [
            ("general.architecture", &architecture),
            ("llama.block_count", &count),
            ("tokenizer.ggml.model", &model),
            ("tokenizer.ggml.tokens", &tokens),
            ("general.file_type", &file_type),
        ];
        let tensors = [("token_embd.weight", &q8_0), ("blk.0.attn_q.weight", &q4_1), ("blk.0.attn_norm.weight", &norm)];
        let mut file = File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    fn tensors(path: &Path) -> (Content, BTreeMap<String, QTensor>) {
        let mut reader = BufReader::new(File::open(path).unwrap());
        let content = Content::read(&mut reader).unwrap();
        let tensors = (content.tensor_infos.keys())
            .map(|name| (name.clone(), content.tensor(&mut reader, name, &Device::Cpu).unwrap()))
            .collect();
        (content, tensors)
    }

    #[test]
    fn blocks_change_type_and_everything_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
        write_sample(&source);
        for (kind, name, error) in [(QuantKind::Q8_0, "Q8_0", 0.02), (QuantKind::Q4_0, "Q4_0", 0.6)] {
            let done = requantize(&source, &target, kind).unwrap();
            assert_eq!((done.tensors, done.changed), (3, 1));
            assert_eq!(done.bytes, std::fs::metadata(&target).unwrap().len());
            assert_eq!(gguf::read_header(&target).unwrap().quantisation, name);

            let ((before, old), (after, new)) = (tensors(&source), tensors(&target));
            let mut keys: Vec<_> = before.metadata.keys().collect();
            let mut kept: Vec<_> = after.metadata.keys().collect();
            keys.sort();
            kept.sort();
            assert_eq!(keys, kept);
            assert_eq!(after.metadata["general.file_type"].to_u32().unwrap(), kind.file_type());
            for (name, old) in &old {
                let (a, b) = (old.dequantize(&Device::Cpu).unwrap(), new[name].dequantize(&Device::Cpu).unwrap());
                let worst = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                let worst = worst.to_scalar::<f32>().unwrap();
                let allowed = if name.contains("attn_q") { error } else { 0.0 };
                assert!(worst <= allowed, "{name} differs by {worst}");
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "a temporary file was left");
    }

    #[test]
    fn bad_sources_and_targets_are_typed_errors() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
        let missing = requantize(&source, &target, QuantKind::Q8_0).unwrap_err();
        assert!(matches!(missing, EngineError::ModelNotFound { .. }), "{missing}");
        write_sample(&source);
        let nowhere = requantize(&source, &dir.path().join("x/b.gguf"), QuantKind::Q8_0).unwrap_err();
        assert!(matches!(nowhere, EngineError::Io { .. }), "{nowhere}");
        std::fs::write(&source, b"GGUF, but not really").unwrap();
        let corrupt = requantize(&source, &target, QuantKind::Q8_0).unwrap_err();
        assert!(matches!(corrupt, EngineError::ModelCorrupt { .. }), "{corrupt}");
        assert!("q5_k".parse::<QuantKind>().is_err());
    }
}
