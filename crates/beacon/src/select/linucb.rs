//! Symphony-Coord's two-stage selector, with the constants that its authors published.
//!
//! **Stage A** keeps the Top-L bidders by `0.50·sim + 0.35·prior + 0.15·stability`, with
//! `stability = 0.4·(1 − load) + 0.4·(1 − latency) + 0.2·available`.
//!
//! **Stage B** is one LinUCB over all agents. `x = [1, sim, load, latency, reputation, available]`, divided by its norm when that is
//! over 1; `A = λI + Σ x xᵀ`, `b = Σ r x`, `θ = A⁻¹ b`; ranked by `x·θ + β_t √(xᵀ A⁻¹ x)` with
//! `β_t = α √(d ln(1 + t/λ) + 2 ln(1/δ)) + √λ S`. `A⁻¹` is kept by the Sherman-Morrison identity.
//!
//! Faithful, flaws included: β is about 7 where rewards lie in [0, 1], so it explores for ever; one model without per-agent
//! terms sees two agents of equal features as one; nothing is forgotten. `available` is 1, because who is not does not bid.

use chorus_machine::Rng;

use super::{Candidate, Selector, by_value};

/// Features.
const D: usize = 6;
/// Bidders that stage A lets through (Top-L).
const TOP_L: usize = 3;
const LAMBDA: f64 = 1.0;
const ALPHA: f64 = 1.0;
const DELTA: f64 = 0.05;
const S: f64 = 1.0;

type Vector = [f64; D];

/// LinUCB as published.
#[derive(Clone, Debug)]
pub struct LinUcb {
    /// A⁻¹.
    inverse: [Vector; D],
    b: Vector,
    /// Observations so far.
    t: f64,
}

impl Default for LinUcb {
    fn default() -> Self {
        let mut inverse = [[0.0; D]; D];
        for (i, row) in inverse.iter_mut().enumerate() {
            row[i] = 1.0 / LAMBDA;
        }
        Self { inverse, b: [0.0; D], t: 0.0 }
    }
}

impl Selector for LinUcb {
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize> {
        let screened = by_value(candidates, rng, composite);
        let (head, tail) = screened.split_at(TOP_L.min(screened.len()));
        let top: Vec<Candidate> = head.iter().map(|&i| candidates[i].clone()).collect();
        let beta = self.beta();
        let order = by_value(&top, rng, |c| self.upper_bound(c, beta));
        order.into_iter().map(|i| head[i]).chain(tail.iter().copied()).collect()
    }

    fn learn(&mut self, candidate: &Candidate, reward: f64) {
        if !reward.is_finite() {
            return;
        }
        let x = features(candidate);
        let ax = multiply(&self.inverse, &x);
        let denominator = 1.0 + dot(&x, &ax);
        for (row, a) in self.inverse.iter_mut().zip(ax) {
            for (cell, b) in row.iter_mut().zip(ax) {
                *cell -= a * b / denominator;
            }
        }
        for (b, x) in self.b.iter_mut().zip(x) {
            *b += reward.clamp(0.0, 1.0) * x;
        }
        self.t += 1.0;
    }
}

impl LinUcb {
    fn beta(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "six")]
        let d = D as f64;
        ALPHA * (d * (self.t / LAMBDA).ln_1p() + 2.0 * (1.0 / DELTA).ln()).sqrt() + LAMBDA.sqrt() * S
    }

    fn upper_bound(&self, candidate: &Candidate, beta: f64) -> f64 {
        let x = features(candidate);
        let theta = multiply(&self.inverse, &self.b);
        let width = dot(&x, &multiply(&self.inverse, &x)).max(0.0).sqrt();
        dot(&x, &theta) + beta * width
    }
}

/// Stage A's score.
fn composite(c: &Candidate) -> f64 {
    let stability = 0.4 * (1.0 - unit(c.load)) + 0.4 * (1.0 - unit(c.latency_norm)) + 0.2;
    (0.50 * unit(c.score) + 0.35 * unit(c.reputation) + 0.15 * stability).clamp(0.0, 1.0)
}

fn features(c: &Candidate) -> Vector {
    let mut x = [1.0, unit(c.score), unit(c.load), unit(c.latency_norm), unit(c.reputation), 1.0];
    let norm = dot(&x, &x).sqrt();
    if norm > 1.0 {
        x.iter_mut().for_each(|x| *x /= norm);
    }
    x
}

/// Clips to [0, 1], and takes what is not a number for 0.
fn unit(x: f64) -> f64 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) }
}

fn dot(a: &Vector, b: &Vector) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn multiply(m: &[Vector; D], x: &Vector) -> Vector {
    m.map(|row| dot(&row, x))
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::*;

    #[test]
    fn beta_is_the_published_formula() {
        let mut bandit = LinUcb::default();
        assert!((bandit.beta() - (2.0 * 20.0f64.ln()).sqrt() - 1.0).abs() < 1e-12);
        bandit.t = 500.0;
        let expected = (6.0 * 501.0f64.ln() + 2.0 * 20.0f64.ln()).sqrt() + 1.0;
        assert!((bandit.beta() - expected).abs() < 1e-12 && expected > 7.0, "{expected}");
    }

    #[test]
    fn sherman_morrison_keeps_the_inverse() {
        let mut bandit = LinUcb::default();
        let mut a = [[0.0; D]; D];
        for (i, row) in a.iter_mut().enumerate() {
            row[i] = LAMBDA;
        }
        let mut rng = Rng::from_u64(3);
        for _ in 0..300 {
            let mut c = candidate(1, rng.unit(), rng.unit());
            (c.load, c.latency_norm) = (rng.unit(), rng.unit());
            let x = features(&c);
            for i in 0..D {
                for j in 0..D {
                    a[i][j] += x[i] * x[j];
                }
            }
            bandit.learn(&c, rng.unit());
        }
        for i in 0..D {
            let column: Vector = std::array::from_fn(|j| bandit.inverse[j][i]);
            for (j, x) in multiply(&a, &column).into_iter().enumerate() {
                let identity = f64::from(u8::from(i == j));
                assert!((x - identity).abs() < 1e-9, "A·A⁻¹ at {j},{i} is {x}");
            }
        }
    }

    #[test]
    fn it_learns_a_linear_reward_within_the_top_l() {
        let mut rng = Rng::from_u64(5);
        let mut bandit = LinUcb::default();
        let (fast, slow) = (candidate(1, 0.5, 0.5), Candidate { latency_norm: 1.0, ..candidate(2, 0.5, 0.5) });
        let all = [slow, fast];
        let mut wins = 0;
        for step in 0..4_000 {
            let first = bandit.rank(&all, &mut rng)[0];
            bandit.learn(&all[first], [0.0, 1.0][first]);
            wins += usize::from(step >= 2_000 && first == 1);
        }
        assert!(wins > 1_500, "{wins} of the last 2000");
    }

    #[test]
    fn who_is_screened_out_comes_last() {
        let mut rng = Rng::from_u64(1);
        let all = [candidate(1, 0.1, 0.1), candidate(2, 0.9, 0.9), candidate(3, 0.8, 0.9), candidate(4, 0.7, 0.9)];
        assert_eq!(LinUcb::default().rank(&all, &mut rng)[3], 0);
    }
}
