//! The shape of a policy: `config.json` as Hugging Face writes it for the llama architecture.

use serde::{Deserialize, Serialize};

use super::tokenizer::{END, VOCABULARY};

/// Base of the rotary embedding. Texts are short: with the usual 10,000 most of a narrow head's planes hardly turn over a whole text,
/// and a policy takes many times as long to learn which place to look at.
const ROPE_THETA: f64 = 20.0;
/// Longest sequence.
const MAX_PLACES: usize = 256;
/// Width of a head.
const HEAD: usize = 16;

/// The numbers that decide a policy's shape. Serialised they are the `config.json` of a llama with tied embeddings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyConfig {
    /// Always `["LlamaForCausalLM"]`.
    pub architectures: Vec<String>,
    /// Always `llama`.
    pub model_type: String,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated linear unit.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values; as many as attention heads.
    pub num_key_value_heads: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Epsilon of the root-mean-square norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Always `silu`.
    pub hidden_act: String,
    /// Always true: the embedding is the output matrix too.
    pub tie_word_embeddings: bool,
    /// First token of a text; the tiny policies have none of their own and use the end.
    pub bos_token_id: u32,
    /// Last token of a text.
    pub eos_token_id: u32,
    /// Always `float32`.
    pub torch_dtype: String,
    /// Always false.
    pub attention_bias: bool,
    /// Always false.
    pub mlp_bias: bool,
}

impl PolicyConfig {
    /// Returns the shape of a byte-level policy with so many layers of this width, a multiple of 32: `(2, 96)` has a quarter of a
    /// million weights, `(4, 128)` has 0.8 million.
    #[must_use]
    pub fn tiny(layers: usize, width: usize) -> Self {
        Self {
            architectures: vec!["LlamaForCausalLM".to_owned()],
            model_type: "llama".to_owned(),
            vocab_size: VOCABULARY,
            hidden_size: width,
            intermediate_size: width * 8 / 3 / 32 * 32,
            num_hidden_layers: layers,
            num_attention_heads: (width / HEAD).max(1),
            num_key_value_heads: (width / HEAD).max(1),
            max_position_embeddings: MAX_PLACES,
            rms_norm_eps: 1e-5,
            rope_theta: ROPE_THETA,
            hidden_act: "silu".to_owned(),
            tie_word_embeddings: true,
            bos_token_id: END,
            eos_token_id: END,
            torch_dtype: "float32".to_owned(),
            attention_bias: false,
            mlp_bias: false,
        }
    }

    /// Returns the width of a head.
    #[must_use]
    pub const fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}
