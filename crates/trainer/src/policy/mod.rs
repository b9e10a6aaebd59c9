//! Tiny language models of the llama architecture, in the layout of Hugging Face, which mistral.rs loads as it is.

mod checkpoint;
mod config;
mod model;
mod sample;
mod tokenizer;

pub use checkpoint::{load, save};
pub use config::PolicyConfig;
pub use model::{Cache, Policy};
pub(crate) use model::{MASKED, logprobs_of};
pub use sample::{Sample, Sampler};
pub use tokenizer::{END, Tokenizer, VOCABULARY};
