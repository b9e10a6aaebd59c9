//! The sampling hook: where a token is chosen, recorded and, if need be, stopped.
//!
//! mistral.rs 0.8.1 has one global generator with a fixed seed and no per-request seed, and its
//! greedy log-probability is that of a *logit*, in base 10. So every request runs mistral.rs
//! greedily with one [`SampleHook`] as its logits processor. For each token mistral.rs
//!
//! 1. calls the hook with the model's raw logits; the hook draws a token and hands back logits that
//!    make the greedy sampler take exactly that one;
//! 2. asks the grammar, if there is one, whether it admits the token. If not, it adds the grammar's
//!    mask to the raw logits and calls the hook a second time, so that what comes out is always
//!    admitted. The second draw at a position uses its own random number, which makes
//!    "draw, else draw among the admitted" equal to drawing among the admitted (`sampler::uniform`).
//!
//! The hook never returns an error and never panics of its own: in a batch, mistral.rs answers one
//! sequence's error by skipping the others' tokens of that step, which corrupts them. Logits that
//! are not numbers, and cancellation, therefore end the sequence by its end token, and the hook
//! remembers why.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Instant,
};

use candle_core::{Device, Storage, Tensor};
use mistralrs::CustomLogitsProcessor;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    Sampling,
    alone::compute_alone,
    sampler::{self, Weights},
};

/// One sampled token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) token: u32,
    /// Natural logarithm of the model's probability; NaN where it was not asked for.
    pub(crate) logprob: f32,
}

/// How the hook chooses.
#[derive(Debug, Clone)]
pub(crate) enum Choice {
    /// Draw as the request wants.
    Draw(Sampling),
    /// Take these tokens in turn, whatever their probability: to score a text or to time decoding.
    Forced(Arc<[u32]>),
}

/// Which log-probabilities are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Logprobs {
    No,
    /// At the temperature that is drawn at; at 1 when greedy.
    AsDrawn,
    /// At temperature 1: the model's own.
    Plain,
}

/// A fault that tests inject into the engine thread.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Tokens until the next panic; negative for none.
    panic_after: AtomicI64,
}

impl Fault {
    pub(crate) fn none() -> Self {
        Self { panic_after: AtomicI64::new(-1) }
    }

    pub(crate) fn panic_after(&self, tokens: u32) {
        self.panic_after.store(i64::from(tokens), Ordering::SeqCst);
    }

    fn strike(&self) {
        if self.panic_after.load(Ordering::Relaxed) < 0 {
            return;
        }
        #[allow(clippy::panic, reason = "the injected fault is a real panic in the engine thread")]
        if self.panic_after.fetch_sub(1, Ordering::SeqCst) == 0 {
            panic!("injected fault");
        }
    }
}

/// What happened to one request so far.
#[derive(Debug, Default)]
struct Record {
    sampled: Vec<Sampled>,
    /// Length of the context at the last call: the same again means a redraw forced by a grammar.
    last_context: usize,
    attempt: u32,
    /// Of the position's first, unmasked logits.
    log_normaliser: f64,
    first: Option<Instant>,
    last: Option<Instant>,
    failure: Option<String>,
    scratch: Vec<f32>,
}

/// A finished or broken-off request, as the hook saw it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sampled: Vec<Sampled>,
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    pub(crate) failure: Option<String>,
}

/// Chooses and records the tokens of one request.
pub(crate) struct SampleHook {
    choice: Choice,
    logprobs: Logprobs,
    end_token: Option<u32>,
    cancelled: AtomicBool,
    fault: Arc<Fault>,
    record: Mutex<Record>,
    /// Whether the thread that computes the model is to do it alone.
    alone: bool,
    /// Free when nobody holds the hook any more; mistral.rs does for as long as it may run the request.
    _slot: Option<OwnedSemaphorePermit>,
}

impl SampleHook {
    pub(crate) fn new(choice: Choice, logprobs: Logprobs, end_token: Option<u32>, fault: Arc<Fault>) -> Self {
        let (cancelled, record) = (AtomicBool::new(false), Mutex::default());
        Self { choice, logprobs, end_token, cancelled, fault, record, alone: false, _slot: None }
    }

    /// Gives the slot back when mistral.rs has let go of the request.
    pub(crate) fn holding(self, slot: OwnedSemaphorePermit) -> Self {
        Self { _slot: Some(slot), ..self }
    }

    /// Makes the thread that computes the model do it alone.
    pub(crate) fn computed_alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }

    /// Makes the next token the end token.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Returns how many tokens were sampled so far.
    pub(crate) fn sampled(&self) -> usize {
        self.record().sampled.len()
    }

    /// Takes what was recorded.
    pub(crate) fn take(&self) -> Outcome {
        let mut record = self.record();
        Outcome {
            sampled: std::mem::take(&mut record.sampled),
            first: record.first,
            last: record.last,
            failure: record.failure.take(),
        }
    }

    /// A panic while the lock is held ends the whole request, and a half-written record is still
    /// good for its timings, so poisoning is ignored.
    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses a token for `logits`, records it, and returns it with the index that a plain argmax
    /// over the same logits would give.
    fn choose(&self, logits: &[f32], context: usize) -> (usize, Option<usize>) {
        let mut record = self.record();
        let now = Instant::now();
        record.first.get_or_insert(now);
        record.last = Some(now);
        let again = record.attempt > 0 && record.last_context == context;
        if again {
            record.sampled.pop();
        } else {
            record.attempt = 0;
            record.last_context = context;
        }
        let largest = sampler::argmax(logits);
        let (token, logprob) = match largest {
            Some(largest) if !self.cancelled.load(Ordering::Relaxed) => self.draw(&mut record, logits, largest, again),
            Some(largest) => (self.end_token.map_or(largest, |token| token as usize), f32::NAN),
            None => {
                record.failure.get_or_insert_with(|| "its logits are not numbers".to_owned());
                (self.end_token.unwrap_or(0) as usize, f32::NAN)
            }
        };
        let token = token.min(logits.len().saturating_sub(1));
        record.attempt += 1;
        let id = u32::try_from(token).unwrap_or(u32::MAX);
        record.sampled.push(Sampled { token: id, logprob });
        (token, largest)
    }

    fn draw(&self, record: &mut Record, logits: &[f32], largest: usize, again: bool) -> (usize, f32) {
        let position = record.sampled.len();
        let sampling = match &self.choice {
            Choice::Draw(sampling) => *sampling,
            Choice::Forced(_) => Sampling::greedy(),
        };
        let temperature = if sampling.is_greedy() { 1.0 } else { sampling.temperature };
        let recorded_at = if self.logprobs == Logprobs::Plain { 1.0 } else { temperature };
        let mut scratch = std::mem::take(&mut record.scratch);
        // The greedy choice without log-probabilities needs no pass over the exponentials.
        let weights = (self.logprobs != Logprobs::No || !sampling.is_greedy())
            .then(|| Weights::new(logits, logits[largest], temperature, &mut scratch));
        if let (Some(weights), false) = (&weights, again) {
            record.log_normaliser = if recorded_at == temperature {
                weights.log_normaliser()
            } else {
                sampler::log_normaliser(logits, logits[largest], recorded_at)
            };
        }
        let token = match (&self.choice, &weights) {
            (Choice::Forced(tokens), _) => tokens.get(position).map_or(largest, |&t| t as usize),
            (Choice::Draw(sampling), Some(weights)) if !sampling.is_greedy() => {
                let position = u32::try_from(position).unwrap_or(u32::MAX);
                weights.draw(sampling, sampler::uniform(sampling.seed, position, record.attempt))
            }
            _ => largest,
        };
        let logprob = match (weights, logits.get(token)) {
            (Some(_), Some(&logit)) => {
                let scaled = f64::from(logit) / f64::from(recorded_at);
                #[allow(clippy::cast_possible_truncation, reason = "rounding is wanted")]
                let logprob = (scaled - record.log_normaliser) as f32;
                logprob.min(0.0)
            }
            _ => f32::NAN,
        };
        record.scratch = scratch;
        (token, logprob)
    }
}

impl CustomLogitsProcessor for SampleHook {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        self.fault.strike();
        // It is the engine's thread that asks, here and nowhere else.
        if self.alone {
            compute_alone();
        }
        let (token, largest, len) = {
            let (storage, layout) = logits.storage_and_layout();
            let all = match &*storage {
                Storage::Cpu(storage) => storage.as_slice::<f32>()?,
                _ => candle_core::bail!("logits are not on the CPU"),
            };
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!("logits are not contiguous");
            };
            let (token, largest) = self.choose(&all[start..end], context.len());
            (token, largest, end - start)
        };
        if largest == Some(token) {
            return Ok(logits.clone());
        }
        let mut chosen = vec![0.0_f32; len];
        if let Some(logit) = chosen.get_mut(token) {
            *logit = 1.0;
        }
        Tensor::from_vec(chosen, len, &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn hook(choice: Choice) -> SampleHook {
        SampleHook::new(choice, Logprobs::AsDrawn, Some(0), Arc::new(Fault::none()))
    }

    fn chosen(hook: &SampleHook, logits: &[f32], context: usize) -> usize {
        let tensor = Tensor::new(logits, &Device::Cpu).unwrap();
        let out = hook.apply(&tensor, &vec![0; context]).unwrap().to_vec1::<f32>().unwrap();
        sampler::argmax(&out).unwrap()
    }

    #[test]
    fn what_it_hands_back_makes_the_greedy_sampler_take_its_choice() {
        let logits = [0.1_f32, 0.2, 0.15, 0.0];
        let hook = hook(Choice::Draw(Sampling::seeded(5, 1.0)));
        for step in 0..200 {
            let token = chosen(&hook, &logits, 10 + step);
            assert_eq!(hook.record().sampled[step].token as usize, token);
        }
        let seen: std::collections::BTreeSet<u32> = hook.take().sampled.iter().map(|s| s.token).collect();
        assert_eq!(seen.len(), 4, "a flat distribution must show all its tokens");
    }

    #[test]
    fn plain_probabilities_are_those_at_temperature_1_whatever_is_drawn_at() {
        let logits = [3.0_f32, 2.0, 1.0];
        let normaliser = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        for temperature in [0.0, 0.5, 1.0, 2.0] {
            let choice = Choice::Draw(Sampling::seeded(3, temperature));
            let hook = SampleHook::new(choice, Logprobs::Plain, Some(0), Arc::new(Fault::none()));
            for step in 0..20 {
                chosen(&hook, &logits, 1 + step);
            }
            for Sampled { token, logprob } in hook.take().sampled {
                let expected = f64::from(logits[token as usize]) - normaliser;
                assert!((f64::from(logprob) - expected).abs() < 1e-5, "at {temperature}: {logprob} for {expected}");
            }
        }
    }

    #[test]
    fn a_redraw_replaces_the_token_and_keeps_the_unmasked_probability() {
        let raw = [3.0_f32, 2.0, 1.0];
        let masked = [f32::NEG_INFINITY, f32::NEG_INFINITY, 1.0];
        let hook = hook(Choice::Draw(Sampling::greedy()));
        assert_eq!(chosen(&hook, &raw, 7), 0);
        assert_eq!(chosen(&hook, &masked, 7), 2);
        assert_eq!(chosen(&hook, &raw, 8), 0);
        let sampled = hook.take().sampled;
        let normaliser = raw.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        assert_eq!(sampled.iter().map(|s| s.token).collect::<Vec<_>>(), [2, 0]);
        assert!((f64::from(sampled[0].logprob) - (1.0 - normaliser)).abs() < 1e-5);
        assert!((f64::from(sampled[1].logprob) - (3.0 - normaliser)).abs() < 1e-5);
    }

    #[test]
    fn drawing_then_redrawing_under_a_mask_is_drawing_under_the_mask() {
        let raw = [1.0_f32, 0.5, 0.0, -0.5];
        let admitted = [1, 3];
        let masked: Vec<f32> = (0..4).map(|i| if admitted.contains(&i) { raw[i] } else { f32::NEG_INFINITY }).collect();
        let hook = hook(Choice::Draw(Sampling::seeded(1, 1.0)));
        let draws = 30_000;
        let mut third = 0u32;
        for step in 0..draws {
            let mut token = chosen(&hook, &raw, step + 1);
            if !admitted.contains(&token) {
                token = chosen(&hook, &masked, step + 1);
            }
            assert!(admitted.contains(&token));
            third += u32::from(token == 3);
        }
        let expected = (-0.5_f64).exp() / ((-0.5_f64).exp() + 0.5_f64.exp());
        let measured = f64::from(third) / draws as f64;
        let deviation = (expected * (1.0 - expected) / draws as f64).sqrt();
        assert!((measured - expected).abs() < 5.0 * deviation, "{measured} against {expected}");
    }

    #[test]
    fn nonsense_and_cancellation_end_the_sequence_without_an_error() {
        let broken = hook(Choice::Draw(Sampling::seeded(1, 1.0)));
        assert_eq!(chosen(&broken, &[5.0, 4.0], 3), 0);
        let tensor = Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).unwrap();
        assert!(broken.apply(&tensor, &[1, 2, 3, 4]).is_ok());
        assert!(broken.take().failure.is_some());

        let cancelled = hook(Choice::Draw(Sampling::greedy()));
        assert_eq!(chosen(&cancelled, &[1.0, 9.0], 3), 1);
        cancelled.cancel();
        assert_eq!(chosen(&cancelled, &[1.0, 9.0], 4), 0, "the end token");
    }
}
