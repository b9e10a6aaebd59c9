//! Knights and knaves: knights tell the truth, knaves lie, and their statements decide who is who.
//!
//! People are letters. `A:Bn B:A=C C:Ak?` reads: A says "B is a knave", B says "A and C are of one kind", C says "A is a knight". The
//! answer names each in order: `knk`. Every puzzle has exactly one solution.

use chorus_machine::Rng;

use super::{Environment, Task};

/// People at most; every assignment is tried to make sure that there is one solution.
const MAX_PEOPLE: u32 = 6;
/// Puzzles that are drawn before one with exactly one solution is found. About one in three has.
const MAX_DRAWS: u32 = 1_000;

/// Puzzles of 2 to 6 people.
#[derive(Clone, Copy, Debug)]
pub struct Knights {
    people: usize,
}

/// What somebody says.
#[derive(Clone, Copy, Debug)]
enum Statement {
    /// "This one is a knight" (or not).
    Is(usize, bool),
    /// "These two are of one kind" (or not).
    Alike(usize, usize, bool),
}

impl Statement {
    /// `knights` has a bit for each knight.
    fn holds(self, knights: u32) -> bool {
        let is = |who: usize| knights >> who & 1 == 1;
        match self {
            Self::Is(who, knight) => is(who) == knight,
            Self::Alike(a, b, alike) => (is(a) == is(b)) == alike,
        }
    }

    fn draw(rng: &mut Rng, speaker: usize, people: usize) -> Self {
        let others: Vec<usize> = (0..people).filter(|who| *who != speaker).collect();
        let first = rng.pick(&others).copied().unwrap_or(0);
        let rest: Vec<usize> = (0..people).filter(|who| *who != first).collect();
        let second = rng.pick(&rest).copied().unwrap_or(0);
        match rng.chance(0.5) {
            true => Self::Is(first, rng.chance(0.5)),
            false => Self::Alike(first.min(second), first.max(second), rng.chance(0.5)),
        }
    }

    fn text(self) -> String {
        match self {
            Self::Is(who, knight) => format!("{}{}", letter(who), kind(knight)),
            Self::Alike(a, b, true) => format!("{}={}", letter(a), letter(b)),
            Self::Alike(a, b, false) => format!("{}#{}", letter(a), letter(b)),
        }
    }
}

fn letter(who: usize) -> char {
    char::from(b"ABCDEF"[who])
}

fn kind(knight: bool) -> char {
    if knight { 'k' } else { 'n' }
}

/// Returns the assignments under which knights, and only they, speak the truth.
fn solutions(statements: &[Statement]) -> Vec<u32> {
    let consistent = |knights: &u32| {
        statements.iter().enumerate().all(|(who, statement)| statement.holds(*knights) == (knights >> who & 1 == 1))
    };
    (0..1_u32 << statements.len()).filter(consistent).collect()
}

impl Knights {
    /// Makes the environment; `None` when there are not 2 to 6 people.
    #[must_use]
    pub fn new(people: u32) -> Option<Self> {
        (2..=MAX_PEOPLE).contains(&people).then_some(Self { people: people as usize })
    }

    fn draw(&self, rng: &mut Rng) -> (Vec<Statement>, u32) {
        for _ in 0..MAX_DRAWS {
            let statements: Vec<_> = (0..self.people).map(|who| Statement::draw(rng, who, self.people)).collect();
            if let [only] = solutions(&statements)[..] {
                return (statements, only);
            }
        }
        // "The next one is a knave", from all but the last, who says that the first is a knave: not reached in practice, and
        // judged by its first solution all the same.
        let statements: Vec<_> = (0..self.people).map(|who| Statement::Is((who + 1) % self.people, false)).collect();
        let first = solutions(&statements).first().copied().unwrap_or(0);
        (statements, first)
    }
}

impl Environment for Knights {
    fn name(&self) -> String {
        format!("knights-{}", self.people)
    }

    fn task(&self, seed: u64) -> Task {
        let (statements, knights) = self.draw(&mut Rng::from_u64(seed));
        let said: Vec<String> =
            statements.iter().enumerate().map(|(who, said)| format!("{}:{}", letter(who), said.text())).collect();
        let solution = (0..self.people).map(|who| kind(knights >> who & 1 == 1)).collect();
        Task { seed, prompt: format!("{}?", said.join(" ")), solution }
    }

    fn reward(&self, task: &Task, answer: &str) -> f32 {
        f32::from(u8::from(answer.trim() == task.solution))
    }

    fn max_tokens(&self) -> usize {
        self.people + 2
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn puzzles_have_one_solution_and_it_is_the_one_given() {
        for people in 2..=MAX_PEOPLE {
            let environment = Knights::new(people).unwrap();
            let mut kinds = std::collections::BTreeSet::new();
            for seed in 0..200 {
                let (statements, knights) = environment.draw(&mut Rng::from_u64(seed));
                assert_eq!(solutions(&statements), [knights]);
                kinds.insert(environment.task(seed).solution);
            }
            assert!(kinds.len() > 2, "the answers differ: {kinds:?}");
        }
    }

    #[test]
    fn statements_read_as_they_are_meant() {
        // A calls B a knave; B calls A and B alike. If A is a knight, B is a knave, and B's claim is false, as it must be.
        let statements = [Statement::Is(1, false), Statement::Alike(0, 1, true)];
        assert_eq!(solutions(&statements), [0b01]);
        assert_eq!(statements.map(Statement::text), ["Bn", "A=B"]);
    }
}
