//! Sums and differences: `48+7=` is answered by `55`.

use chorus_machine::Rng;

use super::{Environment, Task};

/// Digits of an operand at most.
const MAX_DIGITS: u32 = 6;

/// Addition and subtraction of numbers with up to `digits` digits. Differences are never negative.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic {
    digits: u32,
}

impl Arithmetic {
    /// Makes the environment; `None` when `digits` is not 1 to 6.
    #[must_use]
    pub fn new(digits: u32) -> Option<Self> {
        (1..=MAX_DIGITS).contains(&digits).then_some(Self { digits })
    }
}

impl Environment for Arithmetic {
    fn name(&self) -> String {
        format!("arithmetic-{}", self.digits)
    }

    fn task(&self, seed: u64) -> Task {
        let mut rng = Rng::from_u64(seed);
        let bound = 10_u64.pow(self.digits);
        let (a, b) = (rng.below(bound), rng.below(bound));
        let (prompt, value) = match rng.chance(0.5) {
            true => (format!("{a}+{b}="), a + b),
            false => (format!("{}-{}=", a.max(b), a.min(b)), a.abs_diff(b)),
        };
        Task { seed, prompt, solution: value.to_string() }
    }

    fn reward(&self, task: &Task, answer: &str) -> f32 {
        f32::from(u8::from(answer.trim() == task.solution))
    }

    fn max_tokens(&self) -> usize {
        self.digits as usize + 2
    }
}
