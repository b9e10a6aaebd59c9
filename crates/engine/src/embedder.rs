//! Turns text into vectors with all-MiniLM-L6-v2, the sentence embedder that SEDM uses.
//!
//! 1. The text is tokenised and cut at 256 tokens, the length the model was trained for.
//! 2. BERT (candle) gives a vector for each token.
//! 3. Their mean, over real tokens only, is scaled to length 1: the dot product of two embeddings is
//!    their cosine similarity.
//!
//! The computation runs on a blocking thread, one batch at a time, texts of similar length together
//! so that little is padded.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use tokenizers::{Tokenizer, TruncationParams};
use tokio::sync::Semaphore;

use crate::{
    EngineError, ModelInfo, ModelSource,
    loader::panic_text,
    run::count,
    source::{self, Inspection},
};

/// Numbers in an embedding.
pub const EMBEDDING_DIMENSIONS: usize = 384;
/// A text's direction in meaning, of length 1.
pub type Embedding = [f32; EMBEDDING_DIMENSIONS];

const MAX_TOKENS: usize = 256;
/// Texts computed together.
const BATCH_TEXTS: usize = 16;
/// Texts in one call.
const MAX_TEXTS: usize = 1_024;
/// Bytes of a text that are looked at; 256 tokens of text are far shorter.
const MAX_TEXT_BYTES: usize = 16 << 10;
/// Calls that wait for the one that runs.
const MAX_WAITING: usize = 64;

/// Embeddings of a few texts.
#[derive(Clone, Debug, Default)]
pub struct Embedded {
    /// One embedding a text, in their order.
    pub embeddings: Vec<Embedding>,
    /// Tokens read: what was cut off does not count, the two that the model wants around every text do.
    pub tokens: u32,
}

/// The embedding model.
#[derive(Clone)]
pub struct Embedder {
    inner: Arc<Inner>,
}

struct Inner {
    model: BertModel,
    tokenizer: Tokenizer,
    info: ModelInfo,
    turn: Arc<Semaphore>,
    places: Semaphore,
}

impl std::fmt::Debug for Embedder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedder").field("info", &self.inner.info).finish_non_exhaustive()
    }
}

impl Embedder {
    /// Loads the model from a directory with `config.json`, `tokenizer.json` and
    /// `model.safetensors`.
    ///
    /// # Errors
    ///
    /// Says which file is missing, damaged or of another model.
    pub async fn open(dir: impl Into<PathBuf>) -> Result<Self, EngineError> {
        let dir = dir.into();
        let path = dir.clone();
        let loading = tokio::task::spawn_blocking(move || {
            catch_unwind(AssertUnwindSafe(|| load(&dir)))
                .unwrap_or_else(|panic| Err(corrupt(&dir, panic_text(panic.as_ref()))))
        });
        let inner = loading.await.map_err(|error| corrupt(&path, error))??;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns what the model is.
    #[must_use]
    pub fn info(&self) -> &ModelInfo {
        &self.inner.info
    }

    /// Returns the embedding of each text, in order. An empty text has one too.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidRequest`] for more than 1,024 texts, [`EngineError::Overloaded`] if too
    /// many calls wait.
    pub async fn embed(&self, texts: &[String]) -> Result<Embedded, EngineError> {
        if texts.len() > MAX_TEXTS {
            return Err(EngineError::InvalidRequest {
                reason: format!("{} texts to embed; at most {MAX_TEXTS} at once", texts.len()),
            });
        }
        let overloaded = |_| EngineError::Overloaded { queued: MAX_WAITING, limit: MAX_WAITING };
        let _place = self.inner.places.try_acquire().map_err(overloaded)?;
        let turn = Arc::clone(&self.inner.turn);
        let turn = turn.acquire_owned().await.expect("the semaphore is never closed");
        let inner = Arc::clone(&self.inner);
        let texts: Vec<String> = texts.iter().map(|text| cut(text).to_owned()).collect();
        let failed = |detail: String| EngineError::Inference { detail };
        let computing = tokio::task::spawn_blocking(move || {
            // The turn ends with the computation, even if nobody waits for it any more.
            let _turn = turn;
            catch_unwind(AssertUnwindSafe(|| inner.embed(&texts)))
                .unwrap_or_else(|panic| Err(panic_text(panic.as_ref())))
        });
        computing.await.map_err(|error| failed(error.to_string()))?.map_err(failed)
    }
}

impl Inner {
    fn embed(&self, texts: &[String]) -> Result<Embedded, String> {
        let texts_ref: Vec<&str> = texts.iter().map(String::as_str).collect();
        let encoded = self.tokenizer.encode_batch_fast(texts_ref, true).map_err(|e| e.to_string())?;
        let tokens: Vec<&[u32]> = encoded.iter().map(|encoding| encoding.get_ids()).collect();
        let read = tokens.iter().map(|tokens| tokens.len()).sum();
        let mut by_length: Vec<usize> = (0..tokens.len()).collect();
        by_length.sort_by_key(|&text| tokens[text].len());
        let mut embeddings = vec![[0.0; EMBEDDING_DIMENSIONS]; texts.len()];
        for batch in by_length.chunks(BATCH_TEXTS) {
            let batch_tokens: Vec<&[u32]> = batch.iter().map(|&text| tokens[text]).collect();
            let computed = self.forward(&batch_tokens).map_err(|error| error.to_string())?;
            for (&text, embedding) in batch.iter().zip(computed) {
                embeddings[text] = embedding;
            }
        }
        Ok(Embedded { embeddings, tokens: count(read) })
    }

    fn forward(&self, batch: &[&[u32]]) -> candle_core::Result<Vec<Embedding>> {
        let longest = batch.iter().map(|tokens| tokens.len()).max().unwrap_or(0).max(1);
        let mut ids = Vec::with_capacity(batch.len() * longest);
        let mut mask = Vec::with_capacity(batch.len() * longest);
        for tokens in batch {
            let padding = longest - tokens.len();
            ids.extend(tokens.iter().copied().chain(std::iter::repeat_n(0, padding)));
            mask.extend(std::iter::repeat_n(1.0_f32, tokens.len()));
            mask.extend(std::iter::repeat_n(0.0_f32, padding));
        }
        let shape = (batch.len(), longest);
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        let mask = Tensor::from_vec(mask, shape, &Device::Cpu)?;
        let hidden = self.model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let mask = mask.unsqueeze(2)?;
        let sums = hidden.broadcast_mul(&mask)?.sum(1)?;
        let means = sums.broadcast_div(&mask.sum(1)?.clamp(1.0, f64::from(u16::MAX))?)?;
        let lengths = means.sqr()?.sum_keepdim(1)?.sqrt()?.clamp(1e-12, f64::MAX)?;
        let rows = means.broadcast_div(&lengths)?.to_vec2::<f32>()?;
        rows.into_iter()
            .map(|row| row.try_into().map_err(|_| candle_core::Error::msg("an embedding of another length")))
            .collect()
    }
}

/// Returns the beginning of a text, ending at a character's end.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn corrupt(path: &Path, reason: impl std::fmt::Display) -> EngineError {
    EngineError::ModelCorrupt { path: path.to_owned(), reason: reason.to_string() }
}

fn load(dir: &Path) -> Result<Inner, EngineError> {
    let Inspection { architecture, quantisation, weights, bytes, .. } =
        source::inspect(&ModelSource::Directory(dir.to_owned()))?;
    let config_path = dir.join("config.json");
    let text = std::fs::read_to_string(&config_path).map_err(|error| EngineError::io(&config_path, &error))?;
    let config: Config = serde_json::from_str(&text).map_err(|error| EngineError::ModelUnsupported {
        path: config_path.clone(),
        reason: format!("it is not a BERT model: {error}"),
    })?;
    if config.hidden_size != EMBEDDING_DIMENSIONS {
        return Err(EngineError::ModelUnsupported {
            path: config_path,
            reason: format!("its embeddings have {} numbers, {EMBEDDING_DIMENSIONS} are needed", config.hidden_size),
        });
    }
    let [file] = weights.as_slice() else {
        return Err(corrupt(dir, format!("it has {} safetensors files, not one", weights.len())));
    };
    let data = std::fs::read(file).map_err(|error| EngineError::io(file, &error))?;
    let fingerprint = *blake3::hash(&data).as_bytes();
    let model = VarBuilder::from_buffered_safetensors(data, DType::F32, &Device::Cpu)
        .and_then(|weights| BertModel::load(weights, &config))
        .map_err(|error| corrupt(file, error))?;
    let tokenizer_path = dir.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&tokenizer_path).map_err(|error| corrupt(&tokenizer_path, error))?;
    let max_length = MAX_TOKENS.min(config.max_position_embeddings);
    tokenizer
        .with_truncation(Some(TruncationParams { max_length, ..TruncationParams::default() }))
        .map_err(|error| corrupt(&tokenizer_path, error))?;
    tokenizer.with_padding(None);
    let info = ModelInfo {
        name: ModelSource::Directory(dir.to_owned()).default_name(),
        fingerprint,
        context: u32::try_from(max_length).unwrap_or(u32::MAX),
        quantisation,
        architecture,
        bytes,
    };
    Ok(Inner { model, tokenizer, info, turn: Arc::new(Semaphore::new(1)), places: Semaphore::new(MAX_WAITING + 1) })
}
