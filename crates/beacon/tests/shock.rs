//! The shock model of Symphony-Coord's second experiment, for all five selection rules.
//!
//! Five agents of different price, speed and strength answer 1000 tasks, 70 % of them hard. At task 500 the strongest one fails for
//! good (`unavailable`) or becomes weak (`degraded`), and others become weaker at hard tasks. The rules see what a requester sees:
//! φ (the published match, which the shock barely moves), load, expected latency, and this crate's own reputation.
//!
//! ```text
//! cargo test -p chorus-beacon --test shock -- --nocapture
//! ```
//!
//! prints, per rule and shock: share of tasks solved before the shock / in the first 100 after / in the last 200, cost per solved
//! task, and the mean reward. The seeds are not those on which the default's numbers were chosen.

use std::time::Duration;

use chorus_beacon::select::{Candidate, SelectionRule, reward};
use chorus_beacon::{Reputation, ReputationConfig};
use chorus_machine::{Rng, Time};
use chorus_protocol::{NodeId, SecretKey};

const TASKS: usize = 1_000;
const SHOCK_AT: usize = 500;
const HARD: f64 = 0.7;
const SEEDS: std::ops::Range<u64> = 5_000..5_060;
/// An agent with this load takes no task; each task adds to it, each step fades it.
const FULL: f64 = 0.95;
const LOAD_PER_TASK: f64 = 0.30;
const LOAD_FADE: f64 = 0.88;
/// The latency that counts as slow, in milliseconds, as published.
const SLOW_MS: f64 = 2_000.0;

struct Agent {
    cost: f64,
    base_ms: f64,
    /// Success at simple and at hard tasks.
    success: [f64; 2],
    /// Published match for simple and for hard tasks.
    fit: [f64; 2],
}

/// A to E, as published.
const AGENTS: [Agent; 5] = [
    Agent { cost: 1.00, base_ms: 900.0, success: [0.99, 0.99], fit: [0.80, 0.95] },
    Agent { cost: 0.10, base_ms: 350.0, success: [0.88, 0.18], fit: [0.95, 0.20] },
    Agent { cost: 0.35, base_ms: 550.0, success: [0.92, 0.65], fit: [0.75, 0.75] },
    Agent { cost: 0.22, base_ms: 420.0, success: [0.90, 0.45], fit: [0.85, 0.55] },
    Agent { cost: 0.60, base_ms: 780.0, success: [0.95, 0.85], fit: [0.60, 0.90] },
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shock {
    Unavailable,
    Degraded,
}

impl Shock {
    /// What an agent's success is multiplied by after the shock.
    fn success(self, agent: usize, hard: usize) -> f64 {
        match (self, agent, hard) {
            (Self::Unavailable, 0, _) => 0.0,
            (Self::Unavailable, 4, 1) => 0.30,
            (Self::Unavailable, 2, 1) => 0.50,
            (Self::Unavailable, 3, 1) => 0.60,
            (Self::Degraded, 0, 0) => 0.6,
            (Self::Degraded, 0, 1) => 0.2,
            (Self::Degraded, 4, 1) => 0.40,
            (Self::Degraded, 2, 1) => 0.60,
            _ => 1.0,
        }
    }

    fn fit(self, agent: usize) -> f64 {
        if self == Self::Degraded && agent == 0 { 0.7 } else { 1.0 }
    }
}

/// What came of one rule: shares, cost per solved task, mean reward.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    before: f64,
    just_after: f64,
    last: f64,
    cost: f64,
    solved: f64,
    reward: f64,
}

fn ids() -> [NodeId; 5] {
    [1, 2, 3, 4, 5].map(|n| SecretKey::from_bytes(&[n; 32]).node_id())
}

#[allow(clippy::cast_precision_loss, reason = "counts to a thousand")]
fn share(solved: &[bool]) -> f64 {
    solved.iter().filter(|solved| **solved).count() as f64 / solved.len() as f64
}

fn run(rule: SelectionRule, shock: Shock, priced: bool, seed: u64) -> Score {
    let mut rng = Rng::from_u64(seed);
    let mut selector = rule.selector();
    let network = "shock".parse().expect("a name");
    let mut reputation =
        Reputation::new(ReputationConfig::default(), network, SecretKey::from_bytes(&[9; 32]).node_id());
    let (ids, mut load) = (ids(), [0.0f64; 5]);
    let (mut solved, mut rewards, mut spent) = (Vec::new(), 0.0, 0.0);
    for task in 0..TASKS {
        let now = Time::from_millis(task as u64 * 1_000);
        let hard = usize::from(rng.chance(HARD));
        let shocked = |factor: f64| if task >= SHOCK_AT { factor } else { 1.0 };
        let latency = |agent: usize, load: f64| AGENTS[agent].base_ms * (1.0 + 1.2 * load);
        let free: Vec<usize> = (0..5).filter(|&agent| load[agent] < FULL).collect();
        let mut candidates = Vec::new();
        for &agent in &free {
            let expected = latency(agent, load[agent]);
            candidates.push(Candidate {
                node: ids[agent],
                score: AGENTS[agent].fit[hard] * shocked(shock.fit(agent)),
                load: load[agent],
                latency: Duration::from_secs_f64(expected / 1_000.0),
                latency_norm: (expected / SLOW_MS).min(1.0),
                reputation: reputation.standing(ids[agent], None, now).mean(),
                is_self: false,
                bucket: hard as u64,
            });
        }
        let chosen = selector.rank(&candidates, &mut rng)[0];
        let agent = free[chosen];
        let chance = AGENTS[agent].success[hard] * shocked(shock.success(agent, hard)) * (1.0 - 0.05 * load[agent]);
        let ok = rng.chance(chance);
        let taken = latency(agent, load[agent]) * (0.92 + 0.16 * rng.unit());
        let cost = if priced { AGENTS[agent].cost } else { 0.0 };
        let gained = reward(ok, taken / SLOW_MS, cost);
        selector.learn(&candidates[chosen], gained);
        match ok {
            true => reputation.succeeded(ids[agent], now, None),
            false => reputation.failed(ids[agent], now),
        }
        load[agent] += LOAD_PER_TASK;
        load.iter_mut().for_each(|load| *load *= LOAD_FADE);
        solved.push(ok);
        rewards += gained;
        spent += AGENTS[agent].cost;
    }
    #[allow(clippy::cast_precision_loss, reason = "counts to a thousand")]
    let tasks = TASKS as f64;
    Score {
        before: share(&solved[..SHOCK_AT]),
        just_after: share(&solved[SHOCK_AT..SHOCK_AT + 100]),
        last: share(&solved[TASKS - 200..]),
        cost: spent / (share(&solved) * tasks),
        solved: share(&solved),
        reward: rewards / tasks,
    }
}

fn mean(rule: SelectionRule, shock: Shock, priced: bool) -> Score {
    let mut sum = Score::default();
    #[allow(clippy::cast_precision_loss, reason = "a few dozen")]
    let weight = 1.0 / SEEDS.count() as f64;
    for seed in SEEDS {
        let score = run(rule, shock, priced, seed);
        sum.before += weight * score.before;
        sum.just_after += weight * score.just_after;
        sum.last += weight * score.last;
        sum.cost += weight * score.cost;
        sum.solved += weight * score.solved;
        sum.reward += weight * score.reward;
    }
    sum
}

/// Means of both shocks.
fn table(priced: bool) -> Vec<(SelectionRule, Score)> {
    let what = if priced { "latency and cost" } else { "latency" };
    println!(
        "\nreward shaped by {what}, {} seeds; before / first 100 after / last 200 / cost per solved",
        SEEDS.count()
    );
    println!("{:<18} {:^26} {:^26} {:>7} {:>7}", "rule", "unavailable", "degraded", "solved", "reward");
    let mut rows = Vec::new();
    for rule in SelectionRule::ALL {
        let [a, b] = [Shock::Unavailable, Shock::Degraded].map(|shock| mean(rule, shock, priced));
        let cell = |s: Score| format!("{:.3}/{:.3}/{:.3}/{:.2}", s.before, s.just_after, s.last, s.cost);
        let both = Score {
            solved: (a.solved + b.solved) / 2.0,
            reward: (a.reward + b.reward) / 2.0,
            cost: (a.cost + b.cost) / 2.0,
            last: (a.last + b.last) / 2.0,
            ..a
        };
        println!("{:<18} {:^26} {:^26} {:>7.3} {:>7.3}", rule.name(), cell(a), cell(b), both.solved, both.reward);
        rows.push((rule, both));
    }
    rows
}

#[test]
fn the_default_rule_wins_the_shock_model() {
    for priced in [true, false] {
        let rows = table(priced);
        let of = |rule| rows.iter().find(|(name, _)| *name == rule).expect("all rules are there").1;
        let default = of(SelectionRule::default());
        for (rule, other) in &rows {
            if *rule != SelectionRule::default() {
                assert!(
                    default.reward > other.reward,
                    "{rule} earns {} and the default {}",
                    other.reward,
                    default.reward
                );
                assert!(
                    default.last > other.last - 0.01,
                    "{rule} recovers better: {} against {}",
                    other.last,
                    default.last
                );
            }
        }
    }
}
