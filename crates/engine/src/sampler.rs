//! The arithmetic of drawing a token, free of any engine.
//!
//! 1. [`Weights::new`] turns logits into unnormalised probabilities at a temperature.
//! 2. [`uniform`] gives the draw's random number from the request's seed and the token's position.
//! 3. [`Weights::draw`] applies top-k and top-p and picks the token.
//!
//! Only additions, multiplications and comparisons in a fixed order are used (the exponential is a
//! polynomial), so equal logits give equal tokens on every platform.

use crate::Sampling;

/// Tokens per block whose maxima bound the k-th largest weight.
const BLOCK_TOKENS: usize = 64;
/// Logits compared at once.
const LANES: usize = 16;
/// Key of the counter-based generator; a new way of drawing needs a new context.
const DRAW_CONTEXT: &str = "chorus 2026 engine: uniform draw by seed, position and attempt, v1";

/// Returns a number in `[0, 1)` that depends on nothing but its arguments.
///
/// `attempt` is 0 for the first draw at a position and counts the redraws that a grammar forces:
/// with independent draws, "accept if the grammar admits it, else draw again among what it admits"
/// is exactly a draw from the admitted tokens.
pub(crate) fn uniform(seed: u64, position: u32, attempt: u32) -> f64 {
    let mut hasher = blake3::Hasher::new_derive_key(DRAW_CONTEXT);
    hasher.update(&seed.to_le_bytes());
    hasher.update(&position.to_le_bytes());
    hasher.update(&attempt.to_le_bytes());
    let mut bytes = [0u8; 8];
    hasher.finalize_xof().fill(&mut bytes);
    // The top 53 bits fill a double's mantissa exactly.
    (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns the index of the largest logit, the last one among equals, as mistral.rs's own argmax
/// does; `None` if a logit is not a number or none is finite.
pub(crate) fn argmax(logits: &[f32]) -> Option<usize> {
    // Blocks of plain folds, which the compiler turns into vector instructions: this runs over the
    // whole vocabulary for every token.
    let mut max = f32::NEG_INFINITY;
    for block in logits.chunks(BLOCK_TOKENS) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut sane = true;
        let mut chunks = block.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane = if logit > *lane { logit } else { *lane };
                sane &= logit < f32::INFINITY;
            }
        }
        for &logit in chunks.remainder() {
            lanes[0] = lanes[0].max(logit);
            sane &= logit < f32::INFINITY;
        }
        // Not smaller than infinity: infinity itself, or not a number.
        if !sane {
            return None;
        }
        max = lanes.into_iter().fold(max, f32::max);
    }
    if max == f32::NEG_INFINITY { None } else { logits.iter().rposition(|&logit| logit == max) }
}

/// Returns the natural logarithm of the sum of `exp(logit / temperature)`, where `max` is the largest logit: what
/// [`Weights::log_normaliser`] gives, without the weights.
pub(crate) fn log_normaliser(logits: &[f32], max: f32, temperature: f32) -> f64 {
    let scale = temperature.recip();
    let sum = logits.iter().map(|&logit| f64::from(exp_nonpositive((logit - max) * scale))).sum::<f64>();
    f64::from(max) * f64::from(scale) + sum.ln()
}

/// Unnormalised probabilities of every token.
#[derive(Debug)]
pub(crate) struct Weights<'a> {
    weights: &'a [f32],
    sum: f64,
    /// Natural logarithm of the sum of `exp(logit / temperature)`.
    log_normaliser: f64,
}

impl<'a> Weights<'a> {
    /// Computes the weights of `logits`, whose largest is `max`, into `scratch`.
    pub(crate) fn new(logits: &[f32], max: f32, temperature: f32, scratch: &'a mut Vec<f32>) -> Self {
        let scale = temperature.recip();
        scratch.clear();
        scratch.extend(logits.iter().map(|&logit| exp_nonpositive((logit - max) * scale)));
        let sum = scratch.iter().map(|&weight| f64::from(weight)).sum::<f64>();
        let log_normaliser = f64::from(max) * f64::from(scale) + sum.ln();
        Self { weights: scratch, sum, log_normaliser }
    }

    pub(crate) fn log_normaliser(&self) -> f64 {
        self.log_normaliser
    }

    /// Picks the token that `uniform` points at among those that `sampling` keeps.
    pub(crate) fn draw(&self, sampling: &Sampling, uniform: f64) -> usize {
        let keeps_all = sampling.top_p >= 1.0 && (sampling.top_k == 0 || sampling.top_k as usize >= self.weights.len());
        if keeps_all {
            let all = self.weights.iter().copied().enumerate();
            return pick(all, uniform * self.sum);
        }
        let kept = self.kept(sampling);
        let mass: f64 = kept.iter().map(|&(_, weight)| f64::from(weight)).sum();
        pick(kept.into_iter(), uniform * mass)
    }

    /// Returns the tokens left by top-k, then top-p, most likely first, lower ids first among equals.
    fn kept(&self, sampling: &Sampling) -> Vec<(usize, f32)> {
        let top_k = match sampling.top_k as usize {
            0 => self.weights.len(),
            k => k.min(self.weights.len()),
        };
        let top_p = f64::from(sampling.top_p).max(0.0);
        // Tokens below (1 - p)/n of the mass hold less than 1 - p together, so they are never in the
        // nucleus. With top-k the nucleus is taken of less mass, and only top-k's own bound holds.
        #[allow(clippy::cast_possible_truncation, reason = "a bound; rounding it is allowed for by whoever uses it")]
        let floor = if top_k < self.weights.len() {
            self.kth_largest_bound(top_k)
        } else {
            ((1.0 - top_p) / self.weights.len() as f64 * self.sum) as f32
        };
        let mut kept: Vec<(usize, f32)> =
            (self.weights.iter().copied().enumerate()).filter(|&(_, weight)| weight > 0.0 && weight >= floor).collect();
        kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        kept.truncate(top_k);
        let mass =
            if top_k < self.weights.len() { kept.iter().map(|&(_, weight)| f64::from(weight)).sum() } else { self.sum };
        let mut cumulated = 0.0;
        let nucleus = kept.iter().take_while(|&&(_, weight)| {
            let wanted = cumulated < top_p * mass;
            cumulated += f64::from(weight);
            wanted
        });
        let len = nucleus.count().max(1);
        kept.truncate(len);
        kept
    }

    /// Returns a number that at least `k` weights reach: the k-th largest of the blocks' maxima.
    fn kth_largest_bound(&self, k: usize) -> f32 {
        let mut maxima: Vec<f32> =
            (self.weights.chunks(BLOCK_TOKENS)).map(|block| block.iter().copied().fold(0.0, f32::max)).collect();
        if maxima.len() < k {
            return 0.0;
        }
        *maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    }
}

/// Returns the first token whose cumulated weight exceeds `target`, the last one with any weight if
/// rounding lets none.
fn pick(tokens: impl Iterator<Item = (usize, f32)>, target: f64) -> usize {
    let mut cumulated = 0.0;
    let mut last = 0;
    for (token, weight) in tokens {
        if weight > 0.0 {
            cumulated += f64::from(weight);
            last = token;
            if cumulated > target {
                break;
            }
        }
    }
    last
}

/// Returns `e^x` for `x <= 0` within 3e-6 of its value: `2^n` by the exponent's bits times a
/// polynomial for `2^f`, `|f| <= 1/2`. Below -87 it is 0.
#[allow(clippy::excessive_precision, reason = "the published coefficients, digit by digit")]
fn exp_nonpositive(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    const SMALLEST: f32 = -87.0;
    let t = x.max(SMALLEST) * std::f32::consts::LOG2_E;
    let n = (t + ROUND) - ROUND;
    let f = t - n;
    let p = 0.000_154_035_3_f32;
    let p = p * f + 0.001_333_355_8;
    let p = p * f + 0.009_618_129;
    let p = p * f + 0.055_504_11;
    let p = p * f + 0.240_226_51;
    let p = p * f + std::f32::consts::LN_2;
    let p = p * f + 1.0;
    #[allow(clippy::cast_possible_truncation, reason = "n is whole and in -126..=0")]
    let exponent = (n as i32 + 127) as u32;
    let value = p * f32::from_bits(exponent << 23);
    if x < SMALLEST { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

    use super::*;

    fn draw(logits: &[f32], sampling: &Sampling, position: u32) -> usize {
        let max = logits[argmax(logits).unwrap()];
        let mut scratch = Vec::new();
        let weights = Weights::new(logits, max, sampling.temperature, &mut scratch);
        weights.draw(sampling, uniform(sampling.seed, position, 0))
    }

    fn random_logits(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (uniform(seed, i as u32, 9) * 16.0 - 8.0) as f32).collect()
    }

    #[test]
    fn exponential_is_close_to_the_libms() {
        for step in 0..80_000 {
            let x = -(step as f32) * 1e-3;
            let (ours, theirs) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            assert!((ours - theirs).abs() <= 6e-6 * theirs, "exp({x}): {ours} against {theirs}");
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn log_normaliser_matches_a_plain_log_sum_exp() {
        let logits = random_logits(1_000, 3);
        for temperature in [0.3_f32, 1.0, 1.7] {
            let max = logits[argmax(&logits).unwrap()];
            let mut scratch = Vec::new();
            let ours = Weights::new(&logits, max, temperature, &mut scratch).log_normaliser();
            let plain = logits.iter().map(|&l| (f64::from(l) / f64::from(temperature)).exp()).sum::<f64>().ln();
            assert!((ours - plain).abs() < 1e-4, "{ours} against {plain} at {temperature}");
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0_f32, 1.0, 2.0, -1.0, f32::NEG_INFINITY];
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let sampling = Sampling::seeded(11, 1.0);
        let mut counts = [0u32; 5];
        let draws = 40_000;
        for position in 0..draws {
            counts[draw(&logits, &sampling, position)] += 1;
        }
        assert_eq!(counts[4], 0, "a masked token was drawn");
        for (token, &count) in counts.iter().enumerate().take(4) {
            let expected = f64::from(logits[token]).exp() / total;
            let deviation = (expected * (1.0 - expected) / f64::from(draws)).sqrt();
            let measured = f64::from(count) / f64::from(draws);
            assert!((measured - expected).abs() < 5.0 * deviation, "{token}: {measured} vs {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_keep_what_a_full_sort_keeps() {
        for seed in 0..20 {
            let logits = random_logits(777, seed);
            let max = logits[argmax(&logits).unwrap()];
            for (top_k, top_p) in [(0, 0.9_f32), (40, 1.0), (40, 0.5), (5, 0.99), (777, 0.3), (0, 0.0)] {
                let sampling = Sampling { seed, temperature: 0.8, top_p, top_k };
                let mut scratch = Vec::new();
                let weights = Weights::new(&logits, max, 0.8, &mut scratch);
                let ours: Vec<usize> = weights.kept(&sampling).iter().map(|&(t, _)| t).collect();

                let mut all: Vec<(usize, f32)> = weights.weights.iter().copied().enumerate().collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.truncate(if top_k == 0 { 777 } else { top_k as usize });
                let mass: f64 = all.iter().map(|&(_, w)| f64::from(w)).sum();
                let mut cumulated = 0.0;
                let mut expected = Vec::new();
                for (token, weight) in all {
                    if !expected.is_empty() && cumulated >= f64::from(top_p) * mass {
                        break;
                    }
                    cumulated += f64::from(weight);
                    expected.push(token);
                }
                assert_eq!(ours, expected, "seed {seed}, top_k {top_k}, top_p {top_p}");
            }
        }
    }

    #[test]
    fn draws_depend_on_seed_position_and_attempt_only() {
        assert_eq!(uniform(1, 2, 0), uniform(1, 2, 0));
        assert_ne!(uniform(1, 2, 0), uniform(2, 2, 0));
        assert_ne!(uniform(1, 2, 0), uniform(1, 3, 0));
        assert_ne!(uniform(1, 2, 0), uniform(1, 2, 1));
        let mean = (0..10_000).map(|i| uniform(7, i, 0)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.015, "{mean}");
        assert!((0..10_000).all(|i| (0.0..1.0).contains(&uniform(7, i, 0))));
    }

    #[test]
    fn argmax_refuses_nonsense_and_takes_the_last_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), Some(2));
        assert_eq!(argmax(&[1.0, f32::NAN]), None);
        assert_eq!(argmax(&[1.0, f32::INFINITY]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(argmax(&[]), None);
        for len in [1, 15, 16, 63, 64, 65, 200, 777] {
            let logits = random_logits(len, len as u64);
            let plain = (0..len).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            assert_eq!(argmax(&logits), plain, "{len}");
            for at in 0..len {
                let mut broken = logits.clone();
                broken[at] = f32::NAN;
                assert_eq!(argmax(&broken), None, "{at} of {len}");
            }
        }
    }
}
