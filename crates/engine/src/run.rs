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
//! - A request that does not stream is answered once, at its end, and its text begins without white space. Nothing of it
//!   is decoded before. So a request for tokens alone, whose text nobody reads, does not stream.
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
    alone::MAX_SMALL_BYTES,
    hook::{Choice, Logprobs, SampleHook, Sampled},
    loader::is_out_of_memory,
    prompt::Prompt,
    stream::Answer,
    supervisor::Live,
};

/// End tokens as the grammar engine knows them (toktrie_hf_tokenizers 1.9, `from_tokenizer`).
const GRAMMAR_ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>"];

impl MistralEngine {
    /// Runs one admitted request to its end.
    pub(crate) async fn run(
        &self,
        live: &Arc<Live>,
        mut run: Run,
        slot: OwnedSemaphorePermit,
        reader: mpsc::Sender<Chunk>,
        cancel: &CancellationToken,
    ) -> Result<Ran, EngineError> {
        let max_tokens = run.max_tokens as usize;
        let hook = SampleHook::new(run.choice.clone(), run.logprobs, live.end_token, Arc::clone(self.fault()));
        let alone = live.loaded.on_cpu && live.info.bytes <= MAX_SMALL_BYTES;
        let hook = Arc::new(hook.computed_alone(alone).holding(slot));
        let held = Held(Arc::clone(&hook));
        // Room for the whole answer: mistral.rs waits for a full channel, with all its requests.
        let (response, responses) = mpsc::channel(if run.text { max_tokens + 2 } else { 2 });
        let request = normal_request(&mut run, response, &hook);
        let started = Instant::now();
        if live.loaded.requests.send(Request::Normal(Box::new(request))).await.is_err() {
            return Err(self.crashed(live, "it was dead when a request came"));
        }
        let mut answer = Answer::new(run.stops, reader);
        // What was begun beyond the answer's last token does not count.
        let made = || count(hook.sampled().min(max_tokens));
        let end = follow(responses, &mut answer, &made, cancel).await;
        let (finish, exactly) = match end {
            End::Finished(finish) => (finish, None),
            End::Done(finish, tokens) => (finish, Some(tokens)),
            End::Failed(error) => return Err(error),
            End::Closed => (self.silent_end(live, &hook, max_tokens, &mut answer).await?, None),
        };
        let mut outcome = hook.take();
        // A request that ends with its first token is run for one more, which may be recorded by now.
        let first_was_last = finish == Finish::Stop && answer.pieces() == 1;
        outcome.sampled.truncate(exactly.unwrap_or(if first_was_last { 1 } else { max_tokens }));
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
    pub(crate) logprobs: Logprobs,
    pub(crate) constraint: Constraint,
    pub(crate) stops: Vec<String>,
    /// Whether anybody reads the text. If not, only the model's own end tokens end the answer.
    pub(crate) text: bool,
}

impl Run {
    /// A request in token ids, answered in token ids, with the model's own log-probabilities.
    pub(crate) fn of_tokens(prompt: Vec<u32>, max_tokens: u32, choice: Choice) -> Self {
        Self {
            prompt,
            max_tokens,
            choice,
            logprobs: Logprobs::Plain,
            constraint: Constraint::None,
            stops: Vec::new(),
            text: false,
        }
    }
}

/// Reads no text.
pub(crate) fn nobody() -> mpsc::Sender<Chunk> {
    mpsc::channel(1).0
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

/// A request in mistral.rs's hands. Dropping it ends the generation at the next token. The slot is free when mistral.rs
/// has dropped the hook too.
struct Held(Arc<SampleHook>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// How the responses ended.
enum End {
    Finished(Finish),
    /// All at once, with so many tokens.
    Done(Finish, usize),
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
                if let Some(reason) = choice.finish_reason.as_deref() {
                    return End::Finished(finish(reason));
                }
            }
            Response::CompletionDone(done) => {
                let reason = done.choices.first().map_or("stop", |choice| choice.finish_reason.as_str());
                return End::Done(finish(reason), done.usage.completion_tokens);
            }
            Response::ValidationError(error) => return End::Failed(refused(&error.to_string())),
            Response::CompletionModelError(detail, _) => return End::Failed(failed(detail)),
            Response::InternalError(error) => return End::Failed(failed(error.to_string())),
            _ => return End::Failed(failed("an answer of the wrong kind".to_owned())),
        }
    }
}

/// Reads mistral.rs's word for why an answer ended.
fn finish(reason: &str) -> Finish {
    match reason {
        "length" => Finish::Length,
        "canceled" => Finish::Cancelled,
        _ => Finish::Stop,
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

fn normal_request(run: &mut Run, response: mpsc::Sender<Response>, hook: &Arc<SampleHook>) -> NormalRequest {
    let messages = RequestMessage::CompletionTokens(std::mem::take(&mut run.prompt));
    let params = sampling_params(run);
    NormalRequest {
        is_streaming: run.text,
        constraint: std::mem::replace(&mut run.constraint, Constraint::None),
        logits_processors: Some(vec![hook.clone()]),
        ..NormalRequest::new_simple(messages, params, response, 0, None, None)
    }
}

/// Greedy, so that the hook's choice is what comes out; mistral.rs takes no temperature for 1.
fn sampling_params(run: &Run) -> SamplingParams {
    let stops = || run.stops.iter().cloned().chain(GRAMMAR_ENDS.map(str::to_owned)).collect();
    SamplingParams {
        temperature: Some(0.0),
        max_len: Some(run.max_tokens as usize),
        stop_toks: run.text.then(|| StopTokens::Seqs(stops())),
        ..SamplingParams::neutral()
    }
}

pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
