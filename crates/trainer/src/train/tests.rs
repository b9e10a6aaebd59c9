//! The learner against mathematics: gradients by finite differences, sampling against training, resumption, and a policy that learns.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss, clippy::float_cmp)]

use candle_core::Tensor;
use chorus_machine::Rng;

use super::*;
use crate::env::{Environment, Task};
use crate::policy::{END, Policy, PolicyConfig, Sample, Sampler, Tokenizer};

fn policy(seed: u64) -> Policy {
    Policy::random(PolicyConfig::tiny(2, 32), seed).unwrap()
}

fn rows() -> Vec<(Vec<u32>, Vec<u32>)> {
    [("12+34=", "46"), ("7-5=", "2"), ("99+1=", "100")]
        .map(|(prompt, answer)| {
            let mut answer = Tokenizer.encode(answer);
            answer.push(END);
            (Tokenizer.encode(prompt), answer)
        })
        .to_vec()
}

fn loss(policy: &Policy, rows: &[(Vec<u32>, Vec<u32>)]) -> Tensor {
    let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|(prompt, answer)| (&prompt[..], &answer[..])).collect();
    let batch = Batch::new(&rows).unwrap();
    batch.logprobs(policy).unwrap().sum_all().unwrap().neg().unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-3;
    let (policy, rows) = (policy(1), rows());
    let gradients = loss(&policy, &rows).backward().unwrap();
    for (name, weight) in policy.weights() {
        let gradient = gradients.get(weight).unwrap().clone();
        // Along the gradient the loss rises by its length: one number that every entry takes part in.
        let length = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        let original = weight.as_tensor().copy().unwrap();
        let at = |step: f64| {
            weight.set(&(&original + (&gradient * (step / length)).unwrap()).unwrap()).unwrap();
            f64::from(loss(&policy, &rows).to_scalar::<f32>().unwrap())
        };
        let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        weight.set(&original).unwrap();
        assert!((slope / length - 1.0).abs() < 0.03, "{name}: {slope} and not {length}");
    }
}

/// A trajectory drawn from `policy`, as a sampler would hand it over.
fn draw(policy: &Policy, prompts: &[&str], seed: u64) -> Vec<Trajectory> {
    let prompts: Vec<Vec<u32>> = prompts.iter().map(|prompt| Tokenizer.encode(prompt)).collect();
    let sampler = Sampler { max_tokens: 6, temperature: 1.0 };
    let samples = sampler.draw(policy, &prompts, &mut Rng::from_u64(seed)).unwrap();
    let trajectory = |(prompt, sample): (Vec<u32>, Sample)| Trajectory {
        prompt,
        tokens: sample.tokens,
        logprobs: sample.logprobs,
        reward: 0.0,
        lag: 0,
    };
    prompts.into_iter().zip(samples).map(trajectory).collect()
}

/// The logarithms of a trajectory's probabilities as the learner computes them.
fn recompute(policy: &Policy, row: &Trajectory) -> Vec<f32> {
    let batch = Batch::new(&[(&row.prompt, &row.tokens)]).unwrap();
    batch.logprobs(policy).unwrap().to_vec1().unwrap()
}

#[test]
fn a_sampler_with_cache_and_padding_computes_what_the_learner_computes() {
    let policy = policy(2);
    for row in draw(&policy, &["1+1=", "48-7=", "99+100=", "5"], 1) {
        for (drawn, learned) in row.logprobs.iter().zip(recompute(&policy, &row)) {
            assert!((drawn - learned).abs() < 1e-4, "{drawn} and {learned}");
        }
    }
}

#[test]
fn answers_that_share_a_prompts_row_are_read_as_if_each_stood_alone() {
    let policy = policy(2);
    // Of one prompt, of another one, of the first again, and more than a row takes.
    let mut rows = draw(&policy, &[&["1+1="; 5][..], &["48-7="; 3], &["1+1="; 2], &["99+100="; 60]].concat(), 1);
    rows[2].tokens.truncate(1);
    let texts: Vec<(&[u32], &[u32])> = rows.iter().map(|row| (&row.prompt[..], &row.tokens[..])).collect();
    let together: Vec<f32> = Batch::new(&texts).unwrap().logprobs(&policy).unwrap().to_vec1().unwrap();
    let alone: Vec<f32> = rows.iter().flat_map(|row| recompute(&policy, row)).collect();
    assert_eq!(together.len(), alone.len());
    for (together, alone) in together.iter().zip(alone) {
        assert!((together - alone).abs() < 1e-5, "{together} and {alone}");
    }
}

#[test]
fn the_likeliest_answer_is_the_same_alone_and_beside_others() {
    let policy = policy(3);
    let greedy = Sampler { max_tokens: 8, temperature: 0.0 };
    let prompts: Vec<Vec<u32>> = ["7+5=", "100-99=", "3"].map(|prompt| Tokenizer.encode(prompt)).to_vec();
    let together = greedy.draw(&policy, &prompts, &mut Rng::from_u64(0)).unwrap();
    for (prompt, beside) in prompts.iter().zip(together) {
        let alone = greedy.draw(&policy, std::slice::from_ref(prompt), &mut Rng::from_u64(9)).unwrap();
        assert_eq!(alone[0].tokens, beside.tokens);
    }
}

#[test]
fn drawn_tokens_follow_their_probabilities() {
    let policy = policy(4);
    let first: Vec<(u32, f32)> = (0..8)
        .flat_map(|seed| draw(&policy, &["2+2="; 500], seed))
        .map(|row| (row.tokens[0], row.logprobs[0]))
        .collect();
    let (token, logprob) = first[0];
    let share = first.iter().filter(|(other, _)| *other == token).count() as f64 / first.len() as f64;
    let expected = f64::from(logprob).exp();
    let deviation = (expected * (1.0 - expected) / first.len() as f64).sqrt();
    assert!((share - expected).abs() < 5.0 * deviation, "{share} and not {expected}");
}

#[test]
fn advantages_have_no_mean_and_unit_deviation() {
    let advantages = advantages(&[1.0, 0.0, 0.0, 1.0]);
    assert!(advantages.iter().sum::<f32>().abs() < 1e-6);
    assert!(advantages.iter().all(|advantage| (advantage.abs() - 1.0).abs() < 1e-3));
    assert_eq!(super::advantages(&[0.5; 4]), [0.0; 4]);
}

/// Two answers to one prompt, of which the first is rewarded.
fn pair(policy: &Policy) -> Vec<Trajectory> {
    let mut group = draw(policy, &["2+2=", "2+2="], 5);
    assert_ne!(group[0].tokens, group[1].tokens, "the seed gives two answers");
    group[0].reward = 1.0;
    group
}

fn total(policy: &Policy, row: &Trajectory) -> f32 {
    recompute(policy, row).iter().sum()
}

fn learner(seed: u64, grpo: GrpoConfig) -> Learner {
    let optimizer = AdamWConfig { rate: 1e-3, warm_up: 1, ..AdamWConfig::default() };
    Learner::new(policy(seed), LearnerConfig { grpo, optimizer })
}

#[test]
fn a_step_makes_the_rewarded_answer_likelier_and_the_other_less_so() {
    let mut learner = learner(6, GrpoConfig::default());
    let group = pair(learner.policy());
    let before = [total(learner.policy(), &group[0]), total(learner.policy(), &group[1])];
    let report = learner.step(std::slice::from_ref(&group)).unwrap();
    assert!((report.importance - 1.0).abs() < 1e-3 && report.truncated == 0.0, "fresh rollouts: {report:?}");
    assert!(total(learner.policy(), &group[0]) > before[0]);
    assert!(total(learner.policy(), &group[1]) < before[1]);
}

#[test]
fn a_group_without_a_difference_teaches_nothing() {
    let mut learner = learner(7, GrpoConfig::default());
    let group = draw(learner.policy(), &["2+2="; 4], 1);
    let before = total(learner.policy(), &group[0]);
    let report = learner.step(std::slice::from_ref(&group)).unwrap();
    assert_eq!((report.useful, report.gradient), (0.0, 0.0));
    assert_eq!(total(learner.policy(), &group[0]), before);
}

#[test]
fn importance_is_truncated_and_the_clip_ends_a_second_pass() {
    let mut stale = learner(8, GrpoConfig::default());
    let mut group = pair(stale.policy());
    for row in &mut group {
        // A sampler under which these tokens were ten times rarer.
        row.logprobs.iter_mut().for_each(|logprob| *logprob -= 10_f32.ln());
    }
    let report = stale.step(std::slice::from_ref(&group)).unwrap();
    assert!((report.importance - 10.0).abs() < 0.1, "{report:?}");
    assert_eq!(report.truncated, 1.0);

    let drift = |grpo: GrpoConfig| {
        let mut learner = learner(9, grpo);
        let group = pair(learner.policy());
        let before = total(learner.policy(), &group[0]);
        learner.step(std::slice::from_ref(&group)).unwrap();
        total(learner.policy(), &group[0]) - before
    };
    let open = drift(GrpoConfig { passes: 30, clip_low: 1.0, clip_high: 1e9, ..GrpoConfig::default() });
    let clipped = drift(GrpoConfig { passes: 30, ..GrpoConfig::default() });
    assert!(clipped < open / 2.0, "without the clip {open}, with it {clipped}");
}

/// All weights in one line.
fn weights(policy: &Policy) -> Vec<f32> {
    policy.weights().values().flat_map(|weight| weight.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

#[test]
fn a_batch_with_something_that_is_no_number_is_skipped_and_the_next_one_teaches() {
    let mut learner = learner(10, GrpoConfig::default());
    let clean = pair(learner.policy());
    let before = weights(learner.policy());
    let spoil: [fn(&mut Trajectory); 3] =
        [|row| row.reward = f32::NAN, |row| row.logprobs[0] = f32::NEG_INFINITY, |row| row.reward = f32::INFINITY];
    for (count, spoil) in (1..).zip(spoil) {
        let mut group = clean.clone();
        spoil(&mut group[0]);
        let error = learner.step(&[group]).unwrap_err();
        assert!(error.is_skippable() && error.to_string().contains("no number"), "{error}");
        assert_eq!((weights(learner.policy()), learner.steps(), learner.skipped()), (before.clone(), 0, count));
    }
    learner.step(&[clean]).unwrap();
    assert_eq!((learner.steps(), learner.skipped()), (1, 3));
    assert_ne!(weights(learner.policy()), before);
}

#[test]
fn a_later_pass_that_fails_takes_the_earlier_ones_back() {
    let grpo = GrpoConfig { passes: 3, ..GrpoConfig::default() };
    // A rate at which the first pass throws the weights out of what single precision can hold.
    let optimizer = AdamWConfig { rate: 1e30, warm_up: 1, ..AdamWConfig::default() };
    let mut learner = Learner::new(policy(10), LearnerConfig { grpo, optimizer });
    let group = pair(learner.policy());
    let before = weights(learner.policy());
    assert!(learner.step(&[group]).unwrap_err().is_skippable());
    assert_eq!((weights(learner.policy()), learner.skipped()), (before, 1));
}

#[test]
fn micro_batches_add_up_to_the_whole_batch() {
    let run = |micro_batch: usize| {
        let grpo = GrpoConfig { micro_batch, kl: 0.1, ..GrpoConfig::default() };
        // A larger epsilon: otherwise AdamW makes whole steps of gradients that are nothing but rounding.
        let optimizer = AdamWConfig { rate: 1e-3, warm_up: 1, epsilon: 1e-4, ..AdamWConfig::default() };
        let mut learner = Learner::new(policy(20), LearnerConfig { grpo, optimizer });
        let mut group = draw(learner.policy(), &["2+2="; 7], 5);
        group.iter_mut().enumerate().for_each(|(at, row)| row.reward = (at % 3) as f32 / 2.0);
        let others = draw(learner.policy(), &["17-9="; 4], 6).into_iter().enumerate();
        let others = others.map(|(at, row)| Trajectory { reward: (at % 2) as f32, ..row }).collect();
        let reports: Vec<StepReport> =
            (0..3).map(|_| learner.step(&[group.clone(), Vec::clone(&others)]).unwrap()).collect();
        (weights(learner.policy()), reports)
    };
    let (whole, reports) = run(0);
    for size in [1, 3, 100] {
        let (parts, others) = run(size);
        let apart = whole.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-5, "micro-batches of {size} end {apart} away");
        for (a, b) in reports.iter().zip(&others) {
            assert!((a.gradient / b.gradient - 1.0).abs() < 1e-4, "{a:?} {b:?}");
            assert!((a.importance - b.importance).abs() < 1e-5 && (a.kl - b.kl).abs() < 1e-6, "{a:?} {b:?}");
        }
    }
}

#[test]
fn divergence_from_the_reference_is_estimated_and_held_down() {
    let drift = |kl: f64| {
        let mut learner = learner(21, GrpoConfig { kl, ..GrpoConfig::default() });
        let group = pair(learner.policy());
        let before = total(learner.policy(), &group[0]);
        let mut last = StepReport::default();
        for step in 0..40 {
            last = learner.step(std::slice::from_ref(&group)).unwrap();
            assert!(last.kl >= 0.0 && (step > 0 || last.kl < 1e-6), "nothing has moved at the first step: {last:?}");
        }
        (total(learner.policy(), &group[0]) - before, last.kl)
    };
    let (free, none) = drift(0.0);
    let (held, some) = drift(3.0);
    assert_eq!(none, 0.0);
    assert!(some > 0.0 && held > 0.0 && held < free / 2.0, "free {free}, held {held} at {some} nats");
}

#[test]
fn the_estimate_of_the_divergence_is_right_on_average() {
    let (policy, reference) = (policy(22), policy(23));
    let rows: Vec<Trajectory> = (0..20).flat_map(|seed| draw(&policy, &["2+2="; 200], seed)).collect();
    let first = |policy: &Policy, token: u32| {
        let batch = Batch::new(&[(&rows[0].prompt, &[token])]).unwrap();
        f64::from(batch.logprobs(policy).unwrap().to_vec1::<f32>().unwrap()[0])
    };
    let exact: f64 =
        (0..264).map(|token| first(&policy, token).exp() * (first(&policy, token) - first(&reference, token))).sum();
    let estimates = rows.iter().map(|row| {
        let log = first(&reference, row.tokens[0]) - first(&policy, row.tokens[0]);
        log.exp() - log - 1.0
    });
    let mean = estimates.sum::<f64>() / rows.len() as f64;
    assert!((mean / exact - 1.0).abs() < 0.1, "{mean} and not {exact}");
}

/// The least that can be learned: answer with the letter that was shown.
#[derive(Debug)]
struct Echo;

impl Environment for Echo {
    fn name(&self) -> String {
        "echo-1".to_owned()
    }

    fn task(&self, seed: u64) -> Task {
        let letter = if seed % 2 == 0 { "a" } else { "b" };
        Task { seed, prompt: format!("{}{letter}:", seed % 100), solution: letter.to_owned() }
    }

    fn reward(&self, task: &Task, answer: &str) -> f32 {
        f32::from(u8::from(answer == task.solution))
    }

    fn max_tokens(&self) -> usize {
        2
    }
}

/// A policy that knows letters but not which one is asked for.
fn warm(seed: u64) -> Policy {
    let policy = policy(seed);
    let mut optimizer = AdamW::new(AdamWConfig { rate: 3e-3, ..AdamWConfig::default() });
    // A few steps at a time: the step at which it begins to answer at all is not the same everywhere.
    for round in 0..100 {
        imitate(&policy, &Echo, WarmStart { steps: 4, tasks: 16, seed: seed + round }, &mut optimizer).unwrap();
        if evaluate(&policy, &Echo, 64, 1.0).unwrap() > 0.2 {
            break;
        }
    }
    policy
}

fn train(learner: &mut Learner, steps: u64) {
    for step in learner.steps()..steps {
        let rollouts = roll_out(learner.policy(), &Echo, Round { groups: 8, members: 8, seed: 1 }, step).unwrap();
        learner.step(&rollouts).unwrap();
    }
}

#[test]
fn rewards_alone_teach_a_policy_to_answer() {
    let optimizer = AdamWConfig { rate: 3e-3, ..AdamWConfig::default() };
    let mut learner = Learner::new(warm(11), LearnerConfig { optimizer, ..LearnerConfig::default() });
    let before = evaluate(learner.policy(), &Echo, 64, 1.0).unwrap();
    train(&mut learner, 120);
    let after = evaluate(learner.policy(), &Echo, 64, 1.0).unwrap();
    assert!(before < 0.6 && after > 0.95, "from {before} to {after}");
}

#[test]
fn a_resumed_run_goes_on_exactly_where_it_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("policy");
    // The reference that the divergence is measured from must come along.
    let config = LearnerConfig { grpo: GrpoConfig { kl: 0.1, ..GrpoConfig::default() }, ..LearnerConfig::default() };
    let mut through = Learner::new(warm(12), config);
    train(&mut through, 6);
    let mut first = Learner::new(warm(12), config);
    train(&mut first, 3);
    first.save(&at).unwrap();
    first.save(&at).unwrap();
    let mut second = Learner::resume(&at).unwrap();
    assert_eq!(second.steps(), 3);
    train(&mut second, 6);
    for (name, weight) in through.policy().weights() {
        let values = |policy: &Policy| policy.weights()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(), values(second.policy()), "{name}");
    }
    // The old checkpoint serves when the process died between taking it away and putting the new one in its place.
    std::fs::rename(&at, directory.path().join("policy.old")).unwrap();
    assert_eq!(Learner::resume(&at).unwrap().steps(), 3);
    std::fs::write(directory.path().join("policy.old/optimizer.safetensors"), b"rubbish").unwrap();
    assert!(Learner::resume(&at).is_err());
}
