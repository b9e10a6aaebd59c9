//! One admitted request in mistral.rs's hands.
//!
//! What this module knows about mistral.rs 0.8.1:
//!
//! - **On a CPU it mixes up requests that it decodes together.** Sequences of equal length are decoded
//!   as one batch, and `flash_attn_cpu_single_q` (attention/backends/cpu.rs) has one scratch buffer
//!   for the whole batch: every sequence gets the attention of the last one, that is, answers that
//!   depend on, and can repeat, somebody else's prompt. So on a CPU one request runs at a time, and
//!   the next begins when mistral.rs has let go of the one before. It costs nothing: a CPU makes no
//!   more tokens per second from a batch (`examples/engine_bench.rs` measures it).
//! - Dropping the response channel cancels a streaming request at its next piece of text; the hook's
//!   end token does it at the next token.
//! - A streaming request whose last bytes are half a UTF-8 character ends without a last message:
//!   the channel just closes, as it does when the engine thread dies.
//! - When a grammar is complete it admits only the end token of the grammar engine, which is often
//!   another one than the model's (`<|endoftext|>` against `<|im_end|>`), and mistral.rs goes on
//!   until the answer's limit. So these end tokens stop every request.
//! - A request that ends with its very first token is nevertheless run for a second one.
//! - A model has no limit of its own on prompt and answer together, only on each; so the answer is
//!   limited here to what the context leaves.
//! - Asking for a chat template that the model lacks panics; so a plain form is used then.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mistralrs::{Constraint, NormalRequest, Request, RequestMessage, Response, SamplingParams, StopTokens};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    Chunk, EngineError, Finish, Generated, MistralEngine,
    hook::{Choice, SampleHook, Sampled},
    loader::is_out_of_memory,
    prompt::Prompt,
    stream::Answer,
    supervisor::Live,
};

/// End tokens as the grammar engine knows them (toktrie_hf_tokenizers 1.9, `from_tokenizer`).
const GRAMMAR_ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>"];
/// How often, and how long, it is checked whether mistral.rs let go of a request.
const LET_GO_POLL: Duration = Duration::from_millis(1);
const LET_GO_LIMIT: Duration = Duration::from_secs(60);

impl MistralEngine {
    /// Runs one admitted request to its end.
    pub(crate) async fn run(
        &self,
        live: &Arc<Live>,
        run: Run,
        slot: OwnedSemaphorePermit,
        reader: mpsc::Sender<Chunk>,
        cancel: &CancellationToken,
    ) -> Result<Ran, EngineError> {
        let max_tokens = run.max_tokens as usize;
        let hook = SampleHook::new(run.choice, run.logprobs, live.end_token, Arc::clone(self.fault()));
        let hook = Arc::new(hook);
        let held = Held { hook: Arc::clone(&hook), slot: Some(slot) };
        // Room for the whole answer: mistral.rs waits for a full channel, with all its requests.
        let (response, responses) = mpsc::channel(max_tokens + 2);
        let request = normal_request(run.prompt, run.constraint, max_tokens, &run.stops, response, &hook);
        let started = Instant::now();
        if live.loaded.requests.send(Request::Normal(Box::new(request))).await.is_err() {
            return Err(self.crashed(live, "it was dead when a request came"));
        }
        let mut answer = Answer::new(run.stops, reader);
        // What was begun beyond the answer's last token does not count.
        let made = || count(hook.sampled().min(max_tokens));
        let end = follow(responses, &mut answer, &made, cancel).await;
        let finish = match end {
            End::Finished(finish) => finish,
            End::Failed(error) => return Err(error),
            End::Closed => self.silent_end(live, &hook, max_tokens, &mut answer).await?,
        };
        let mut outcome = hook.take();
        // A request that ends with its first token is run for one more, which may be recorded by now.
        let first_was_last = finish == Finish::Stop && answer.pieces() == 1;
        outcome.sampled.truncate(if first_was_last { 1 } else { max_tokens });
        // The slot must not wait for the reader.
        drop((hook, held));
        answer.finish(cancel).await;
        if let Some(detail) = outcome.failure {
            return Err(EngineError::Inference { detail });
        }
        if answer.overran() {
            outcome.sampled.pop();
        }
        Ok(Ran {
            finish: if answer.is_stopped() { Finish::Stop } else { finish },
            text: answer.into_text(),
            sampled: outcome.sampled,
            started,
            first: outcome.first,
            last: outcome.last,
        })
    }

    /// Decides what a channel that closed without a last message means: an answer that ends in half
    /// a character, or a dead engine.
    async fn silent_end(
        &self,
        live: &Arc<Live>,
        hook: &SampleHook,
        max_tokens: usize,
        answer: &mut Answer,
    ) -> Result<Finish, EngineError> {
        let probe = self.tokenise(live, Prompt::Text("a".to_owned())).await;
        if live.is_dead() || probe.is_err() {
            return Err(self.crashed(live, "its thread ended while it held the request"));
        }
        // The last token's piece never came.
        answer.push("", count(hook.sampled()));
        Ok(if hook.sampled() >= max_tokens { Finish::Length } else { Finish::Stop })
    }
}

/// A request in mistral.rs's terms.
pub(crate) struct Run {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) choice: Choice,
    pub(crate) logprobs: bool,
    pub(crate) constraint: Constraint,
    pub(crate) stops: Vec<String>,
}

/// A request that ran.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) finish: Finish,
    pub(crate) text: String,
    pub(crate) sampled: Vec<Sampled>,
    pub(crate) started: Instant,
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
}

impl Ran {
    /// Time until the first token, and from the first to the last.
    pub(crate) fn durations(&self) -> (Duration, Duration) {
        match (self.first, self.last) {
            (Some(first), Some(last)) => (first - self.started, last - first),
            _ => (self.started.elapsed(), Duration::ZERO),
        }
    }

    pub(crate) fn into_generated(self, live: &Live, prompt_tokens: u32, logprobs: bool) -> Generated {
        let (prefill, decode) = self.durations();
        Generated {
            text: self.text,
            token_ids: self.sampled.iter().map(|sampled| sampled.token).collect(),
            logprobs: if logprobs { self.sampled.iter().map(|sampled| sampled.logprob).collect() } else { Vec::new() },
            prompt_tokens,
            completion_tokens: count(self.sampled.len()),
            finish: self.finish,
            model: live.info.clone(),
            prefill,
            decode,
        }
    }
}

/// A request in mistral.rs's hands, with its slot. Dropping it ends the generation, and the slot is
/// free when mistral.rs has let go of the request: it holds the hook as long as it may run it.
struct Held {
    hook: Arc<SampleHook>,
    slot: Option<OwnedSemaphorePermit>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.hook.cancel();
        let hook = Arc::downgrade(&self.hook);
        let Some(slot) = self.slot.take() else { return };
        // Without a runtime the whole engine is going away.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let since = Instant::now();
                while hook.strong_count() > 0 && since.elapsed() < LET_GO_LIMIT {
                    tokio::time::sleep(LET_GO_POLL).await;
                }
                drop(slot);
            });
        }
    }
}

/// How the responses ended.
enum End {
    Finished(Finish),
    Failed(EngineError),
    Closed,
}

/// Takes the engine's responses until the last one, or until the caller cancels. `made` counts the tokens so far.
async fn follow(
    mut responses: mpsc::Receiver<Response>,
    answer: &mut Answer,
    made: &(dyn Fn() -> u32 + Sync),
    cancel: &CancellationToken,
) -> End {
    loop {
        let waiting = answer.offer();
        let response = tokio::select! {
            biased;
            () = cancel.cancelled() => return End::Finished(Finish::Cancelled),
            response = responses.recv() => response,
            () = answer.room(), if waiting => continue,
        };
        let Some(response) = response else { return End::Closed };
        match response {
            Response::CompletionChunk(chunk) => {
                let Some(choice) = chunk.choices.into_iter().next() else { continue };
                answer.push(&choice.text, made());
                match choice.finish_reason.as_deref() {
                    None => {}
                    Some("length") => return End::Finished(Finish::Length),
                    Some("canceled") => return End::Finished(Finish::Cancelled),
                    Some(_) => return End::Finished(Finish::Stop),
                }
            }
            Response::ValidationError(error) => return End::Failed(refused(&error.to_string())),
            Response::CompletionModelError(detail, _) => return End::Failed(failed(detail)),
            Response::InternalError(error) => return End::Failed(failed(error.to_string())),
            _ => return End::Failed(failed("an answer of the wrong kind".to_owned())),
        }
    }
}

fn refused(reason: &str) -> EngineError {
    match reason.strip_prefix("Invalid grammar.") {
        Some(reason) => EngineError::InvalidSchema { reason: reason.trim().to_owned() },
        None => EngineError::InvalidRequest { reason: reason.to_owned() },
    }
}

fn failed(detail: String) -> EngineError {
    if is_out_of_memory(&detail) {
        return EngineError::OutOfMemory { detail };
    }
    EngineError::Inference { detail }
}

fn normal_request(
    prompt: Vec<u32>,
    constraint: Constraint,
    max_tokens: usize,
    stops: &[String],
    response: mpsc::Sender<Response>,
    hook: &Arc<SampleHook>,
) -> NormalRequest {
    let messages = RequestMessage::CompletionTokens(prompt);
    let params = sampling_params(max_tokens, stops);
    NormalRequest {
        is_streaming: true,
        constraint,
        logits_processors: Some(vec![hook.clone()]),
        ..NormalRequest::new_simple(messages, params, response, 0, None, None)
    }
}

/// Greedy, so that the hook's choice is what comes out; mistral.rs takes no temperature for 1.
fn sampling_params(max_tokens: usize, stops: &[String]) -> SamplingParams {
    SamplingParams {
        temperature: Some(0.0),
        max_len: Some(max_tokens),
        stop_toks: Some(StopTokens::Seqs(stops.iter().cloned().chain(GRAMMAR_ENDS.map(str::to_owned)).collect())),
        ..SamplingParams::neutral()
    }
}

pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
