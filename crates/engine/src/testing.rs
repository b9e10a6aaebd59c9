//! Made for tests and benchmarks: a model small enough to load in milliseconds, a way to break the
//! engine for real, and the place of the default models.
//!
//! [`write_tiny_model`] writes a llama of random weights in Hugging Face layout: about 0.8 million
//! weights, 4 layers, one token a byte. It speaks gibberish, but fast, and the same gibberish for
//! the same seed. Its tokenizer is byte-level (`ByteLevel` pre-tokenizer and decoder), without which
//! mistral.rs's grammar engine refuses it.
//!
//! One hidden dimension is held constant through all layers and the output layer uses it as a bias:
//! printable ASCII gets none, everything else (control bytes, halves of UTF-8 characters, the end
//! token) a large negative one. So every answer is readable text of exactly the wanted length, and
//! still every token can be forced by a grammar.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{EngineError, MistralEngine};

const HIDDEN: usize = 128;
const INTERMEDIATE: usize = 352;
const LAYERS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
const CONTEXT: usize = 1024;
const SPECIAL_TOKENS: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"];
const END_TOKEN: usize = 2;
const VOCABULARY: usize = 256 + SPECIAL_TOKENS.len();
/// Value of the constant hidden dimension in every embedding.
const CONSTANT: f32 = 4.0;
/// Output weight on the constant dimension for tokens that are not printable ASCII.
const UNLIKELY: f32 = -12.0;
/// Half-width of the other output weights: logits spread over a few units.
const OUTPUT_SPREAD: f32 = 0.3;
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Writes a tiny model into the directory `dir`, which is made if need be.
///
/// # Errors
///
/// [`EngineError::Io`] if a file cannot be written.
pub fn write_tiny_model(dir: &Path, seed: u64) -> Result<(), EngineError> {
    std::fs::create_dir_all(dir).map_err(|error| EngineError::io(dir, &error))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(|error| EngineError::io(path, &error))
    };
    write("config.json", config().to_string().as_bytes())?;
    write("generation_config.json", json!({ "eos_token_id": END_TOKEN }).to_string().as_bytes())?;
    write("tokenizer.json", tokenizer().to_string().as_bytes())?;
    let tokenizer_config = json!({
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[END_TOKEN],
        "unk_token": SPECIAL_TOKENS[3],
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    write("tokenizer_config.json", tokenizer_config.to_string().as_bytes())?;
    write("model.safetensors", &weights(seed))
}

/// Makes the engine's thread panic, for real, when it is about to sample the `tokens`-th token from
/// now on (0 is the next one).
pub fn panic_after(engine: &MistralEngine, tokens: u32) {
    engine.fault().panic_after(tokens);
}

/// Returns where `scripts/models` puts the models: `$CHORUS_MODELS`, else
/// `${XDG_CACHE_HOME:-$HOME/.cache}/chorus/models`.
#[must_use]
pub fn models_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = set("CHORUS_MODELS") {
        return dir.into();
    }
    let cache = set("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(set("HOME").unwrap_or_default()).join(".cache"), PathBuf::from);
    cache.join("chorus/models")
}

/// Returns the path of a default model's file or directory.
///
/// # Errors
///
/// [`EngineError::ModelNotFound`], which says to run `scripts/models`, if it is not there.
pub fn default_model(name: &str) -> Result<PathBuf, EngineError> {
    let path = models_dir().join(name);
    if path.exists() {
        return Ok(path);
    }
    Err(EngineError::ModelNotFound { path, reason: "it was not fetched yet".to_owned() })
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
        "eos_token_id": END_TOKEN,
    })
}

/// Returns the character that stands for each byte in byte-level tokenizers, as GPT-2 defined it:
/// visible Latin-1 characters stand for themselves, the rest for those from U+0100 on.
fn byte_characters() -> Vec<char> {
    let visible = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..256u32)
        .filter_map(|byte| {
            if visible(byte) {
                return char::from_u32(byte);
            }
            next += 1;
            char::from_u32(next - 1)
        })
        .collect()
}

fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
        vocabulary.insert((*token).to_owned(), json!(id));
    }
    for (byte, character) in byte_characters().into_iter().enumerate() {
        vocabulary.insert(character.to_string(), json!(SPECIAL_TOKENS.len() + byte));
    }
    let added: Vec<Value> = (SPECIAL_TOKENS.iter().enumerate())
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": [],
        },
    })
}

/// Returns the weights as a safetensors file.
fn weights(seed: u64) -> Vec<u8> {
    let mut file = Tensors { random: Random::new(seed), header: Map::new(), data: Vec::new() };
    // A spread of sqrt(3 / inputs) gives outputs of about the inputs' size.
    let spread = |inputs: usize| (3.0 / inputs as f32).sqrt();
    file.matrix(
        "model.embed_tokens.weight",
        VOCABULARY,
        HIDDEN,
        1.0,
        |_, column, value| {
            if column == 0 { CONSTANT } else { value }
        },
    );
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let plain = |_: usize, _: usize, value: f32| value;
        let keeps_constant = |row: usize, _: usize, value: f32| if row == 0 { 0.0 } else { value };
        let hidden = spread(HIDDEN);
        file.ones(&name("input_layernorm"), HIDDEN);
        file.matrix(&name("self_attn.q_proj"), HEADS * HEAD_DIM, HIDDEN, hidden, plain);
        file.matrix(&name("self_attn.k_proj"), KV_HEADS * HEAD_DIM, HIDDEN, hidden, plain);
        file.matrix(&name("self_attn.v_proj"), KV_HEADS * HEAD_DIM, HIDDEN, hidden, plain);
        file.matrix(&name("self_attn.o_proj"), HIDDEN, HIDDEN, hidden, keeps_constant);
        file.ones(&name("post_attention_layernorm"), HIDDEN);
        file.matrix(&name("mlp.gate_proj"), INTERMEDIATE, HIDDEN, hidden, plain);
        file.matrix(&name("mlp.up_proj"), INTERMEDIATE, HIDDEN, hidden, plain);
        let inner = spread(INTERMEDIATE);
        file.matrix(&name("mlp.down_proj"), HIDDEN, INTERMEDIATE, inner, keeps_constant);
    }
    file.ones("model.norm.weight", HIDDEN);
    file.matrix("lm_head.weight", VOCABULARY, HIDDEN, OUTPUT_SPREAD, |row, column, value| {
        let printable = (row.checked_sub(SPECIAL_TOKENS.len())).is_some_and(|byte| (0x20..=0x7e).contains(&byte));
        match (column, printable) {
            (0, true) => 0.0,
            (0, false) => UNLIKELY,
            _ => value,
        }
    });
    file.finish()
}

struct Tensors {
    random: Random,
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Tensors {
    fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
        spread: f32,
        adjust: impl Fn(usize, usize, f32) -> f32,
    ) {
        let begin = self.data.len();
        for row in 0..rows {
            for column in 0..columns {
                let value = adjust(row, column, self.random.next() * spread);
                self.data.extend(value.to_le_bytes());
            }
        }
        self.describe(name, &[rows, columns], begin);
    }

    fn ones(&mut self, name: &str, len: usize) {
        let begin = self.data.len();
        self.data.extend(std::iter::repeat_n(1.0_f32.to_le_bytes(), len).flatten());
        self.describe(name, &[len], begin);
    }

    fn describe(&mut self, name: &str, shape: &[usize], begin: usize) {
        let offsets = [begin, self.data.len()];
        let tensor = json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets });
        self.header.insert(name.to_owned(), tensor);
    }

    fn finish(self) -> Vec<u8> {
        let mut header = Value::Object(self.header).to_string();
        // The data begins at a multiple of 8 bytes.
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(self.data);
        file
    }
}

/// Numbers in -1..1 from BLAKE3's output stream.
struct Random {
    stream: blake3::OutputReader,
}

impl Random {
    fn new(seed: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("chorus 2026 engine: tiny model weights v1");
        hasher.update(&seed.to_le_bytes());
        Self { stream: hasher.finalize_xof() }
    }

    fn next(&mut self) -> f32 {
        let mut bytes = [0u8; 4];
        self.stream.fill(&mut bytes);
        // 24 bits fill a float's mantissa exactly.
        (u32::from_le_bytes(bytes) >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }
}
