//! Measures a loaded model's speed, for the capability that a node signs.
//!
//! Three runs, when the requests before them are done:
//!
//! 1. A few tokens page the weights in and give a first idea of the speed.
//! 2. A short prompt, then as many tokens as fit in the time: the decoding speed.
//! 3. A prompt as long as fits in the time by what 1. took, and one token: the prompt's speed.
//!
//! The tokens are forced, so that neither an early end nor the text matters.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mistralrs::Constraint;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    Calibration, EngineError, MistralEngine,
    hook::{Choice, Logprobs},
    run::{Ran, Run},
    supervisor::Live,
};

const SHORT_PROMPT_TOKENS: usize = 8;
const WARM_UP_TOKENS: u32 = 3;
const MAX_PROMPT_TOKENS: usize = 64;
const MAX_DECODE_TOKENS: u32 = 64;
/// How long the second run decodes, and the third is meant to take.
const RUN_LIMIT: Duration = Duration::from_millis(700);
const TEXT: &str = "The lighthouse keeper counted the ships that passed in the night and wrote their \
    names in a book, one line for each, until the morning came and the lamp could rest. Then he \
    slept, and the ships went on without him, over the grey water, to places he had never seen.";

/// Measures the engine.
pub(crate) async fn measure(engine: &MistralEngine) -> Result<Calibration, EngineError> {
    let started = Instant::now();
    let live = engine.live().await?;
    let mut tokens = engine.tokenize(TEXT).await?;
    let room = (live.info.context as usize).saturating_sub(MAX_DECODE_TOKENS as usize + 1);
    tokens.truncate(room.clamp(1, MAX_PROMPT_TOKENS));
    let short = &tokens[..tokens.len().min(SHORT_PROMPT_TOKENS)];

    let never = CancellationToken::new();
    let warm_up = run(engine, &live, short, WARM_UP_TOKENS, &never).await?;
    let per_prompt_token = warm_up.durations().0 / u32::try_from(short.len()).unwrap_or(1);

    let alarm = CancellationToken::new();
    let decoded = {
        let ring = alarm.clone();
        let ringing = tokio::spawn(async move {
            tokio::time::sleep(RUN_LIMIT).await;
            ring.cancel();
        });
        let decoded = run(engine, &live, short, MAX_DECODE_TOKENS, &alarm).await;
        ringing.abort();
        decoded?
    };
    // A model so slow that the alarm came before its second token was timed well by the warm-up.
    let decoded = if decoded.sampled.len() < 2 { &warm_up } else { &decoded };

    let fit = RUN_LIMIT.as_secs_f64() / per_prompt_token.as_secs_f64().max(1e-6);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped next")]
    let fit = (fit as usize).clamp(short.len(), tokens.len());
    let prompted = run(engine, &live, &tokens[..fit], 1, &never).await?;
    Ok(Calibration {
        prefill_tokens_per_s: rate(fit, prompted.durations().0),
        decode_tokens_per_s: rate(decoded.sampled.len().saturating_sub(1), decoded.durations().1),
        took: started.elapsed(),
    })
}

fn rate(tokens: usize, time: Duration) -> f32 {
    if time.is_zero() { 0.0 } else { tokens as f32 / time.as_secs_f32() }
}

async fn run(
    engine: &MistralEngine,
    live: &Arc<Live>,
    prompt: &[u32],
    max_tokens: u32,
    cancel: &CancellationToken,
) -> Result<Ran, EngineError> {
    let run = Run {
        prompt: prompt.to_vec(),
        max_tokens,
        choice: Choice::Forced(prompt.iter().copied().cycle().take(max_tokens as usize).collect()),
        logprobs: Logprobs::No,
        constraint: Constraint::None,
        stops: Vec::new(),
        text: true,
    };
    let (nobody, _) = mpsc::channel(1);
    let slot = engine.slot().await?;
    engine.run(live, run, slot, nobody, cancel).await
}
