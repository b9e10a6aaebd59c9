//! Tests of the whole crate against real engines: mistral.rs on the tiny model, and once on the
//! default models.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use std::path::Path;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    ChatMessage, Engine, EngineError, GenerateRequest, Generated, MistralConfig, MistralEngine, ModelSource, Sampling,
    testing,
};

mod default_models;
mod faults;
mod generate;
mod openai;
mod reproducible;

const SEED: u64 = 7;

/// An engine on a tiny model, with the directory that holds it.
struct Tiny {
    engine: MistralEngine,
    dir: TempDir,
}

impl Tiny {
    async fn open() -> Self {
        Self::open_with(|_| {}).await
    }

    async fn open_with(change: impl FnOnce(&mut MistralConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        testing::write_tiny_model(dir.path(), SEED).unwrap();
        let mut config = config(dir.path());
        change(&mut config);
        let engine = MistralEngine::open(config).await.unwrap();
        Self { engine, dir }
    }

    async fn generate(&self, request: GenerateRequest) -> Result<Generated, EngineError> {
        run(&self.engine, request).await
    }
}

fn config(path: &Path) -> MistralConfig {
    MistralConfig::new(ModelSource::parse(path.to_str().unwrap()).unwrap())
}

fn ask(text: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest::new(vec![ChatMessage::user(text)], max_tokens)
}

fn sampled(text: &str, max_tokens: u32, seed: u64) -> GenerateRequest {
    GenerateRequest { sampling: Sampling::seeded(seed, 1.0), ..ask(text, max_tokens) }
}

async fn run(engine: &dyn Engine, request: GenerateRequest) -> Result<Generated, EngineError> {
    let (sender, _) = mpsc::channel(1);
    engine.generate(request, sender, CancellationToken::new()).await
}

/// Generates and returns the answer with the pieces that were streamed.
async fn stream(engine: &dyn Engine, request: GenerateRequest) -> (Result<Generated, EngineError>, Vec<String>) {
    let (sender, mut receiver) = mpsc::channel::<crate::Chunk>(4);
    let reading = async {
        let mut pieces = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            pieces.push(chunk.text);
        }
        pieces
    };
    tokio::join!(engine.generate(request, sender, CancellationToken::new()), reading)
}
