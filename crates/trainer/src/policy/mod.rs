//! Tiny language models of the llama architecture, in the layout of Hugging Face, which mistral.rs loads as it is.

mod checkpoint;
mod config;
mod fused;
mod model;
mod sample;
mod tokenizer;

pub use checkpoint::{load, save};
pub use config::PolicyConfig;
pub(crate) use fused::logprobs_of;
pub(crate) use model::MASKED;
pub use model::{Cache, Policy};
pub use sample::{Sample, Sampler};
pub use tokenizer::{END, Tokenizer, VOCABULARY};
