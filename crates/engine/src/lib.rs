//! Language models behind one trait.
//!
//! A node asks an [`Engine`] for text and gets it streamed, with the tokens' natural-log
//! probabilities, or gets a typed [`EngineError`] that says whether another node should be asked.
//! Two engines implement the trait: [`MistralEngine`] runs a model in this process with mistral.rs,
//! [`OpenAiEngine`] forwards to any OpenAI-compatible endpoint (llama.cpp, vLLM, Ollama, a cloud).
//! [`Embedder`] turns text into 384 numbers with all-MiniLM-L6-v2.
//!
//! ```text
//!  generate ─▶ admission ─▶ tokenise ─▶ fits the context? ─▶ slot ─▶ mistral.rs (engine thread)
//!              (bounded)                     │ no                     │  ▲ logits
//!                 │ full                     ▼                        │  │ chosen token
//!                 ▼                   ContextExceeded                 ▼  │
//!             Overloaded                                       sampling hook: seed, position
//!                                                                     │
//!  tokens ◀── chunks (coalesced, stop strings held back) ◀────────────┘
//!                     channel closed early ─▶ supervisor: Crashed, restart, verify
//! ```
//!
//! What it promises:
//!
//! 1. *Reproducible.* The same weights, prompt and [`Sampling`] give the same tokens on the same
//!    machine, alone or beside other requests: every draw is keyed by the request's seed and the
//!    token's position, and the prefix cache is off (`loader` says why).
//! 2. *Bounded.* Requests running, requests waiting, prompt bytes, context and stream are limited.
//! 3. *Supervised.* A panic in the engine thread fails the requests it held with
//!    [`EngineError::Crashed`] and the engine is restarted; the next request works.
//!
//! [`VersionedEngine`] serves a policy under training: it loads each new version beside the one that serves, and swaps them
//! while requests run (`versions` says how).
//!
//! mistral.rs and candle types do not appear in this API.
//!
//! # Threads
//!
//! candle and mistral.rs compute on rayon pools whose size is read once per process from the
//! environment variable `RAYON_NUM_THREADS`; each loaded model also has a small tokio runtime sized
//! by `TOKIO_WORKER_THREADS`. A library cannot set them safely once threads run, so whoever starts
//! the process does: [`thread_env`] gives the variables for a wanted number of threads.

mod admission;
mod alone;
mod api;
mod calibrate;
mod embedder;
mod error;
mod gguf;
mod hook;
mod loader;
mod mistral;
mod openai;
mod prompt;
mod requantize;
mod run;
mod sampler;
mod source;
mod sse;
mod stream;
mod supervisor;
pub mod testing;
#[cfg(test)]
mod tests;
mod versions;

pub use api::{
    Calibration, ChatMessage, Chunk, Engine, Finish, GenerateRequest, Generated, Load, ModelInfo, Role, Sampling,
};
pub use embedder::{EMBEDDING_DIMENSIONS, Embedded, Embedder, Embedding};
pub use error::EngineError;
pub use mistral::{MistralConfig, MistralEngine};
pub use openai::{OpenAiConfig, OpenAiEngine};
pub use requantize::{QuantKind, Requantized, requantize};
pub use source::ModelSource;
pub use versions::{MAX_RETIRED, Order, SampleRequest, SampledRollout, Swap, VersionedConfig, VersionedEngine};

/// Returns the environment variables that limit a process to `threads` computing threads; set them
/// before the process starts (five nodes on one small machine: one thread each).
#[must_use]
pub fn thread_env(threads: usize) -> [(&'static str, String); 2] {
    let threads = threads.max(1).to_string();
    [("RAYON_NUM_THREADS", threads.clone()), ("TOKIO_WORKER_THREADS", threads)]
}
