//! Honest rollouts pass, forged ones do not, and what convicts convinces a stranger.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use std::sync::Arc;

use chorus_machine::{Rng, WallTime};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::PolicyId;
use chorus_protocol::rollout::{Rollout, RolloutFrame, Segment};
use chorus_protocol::{Hash, NetworkId, SecretKey, Text, Verified};
use chorus_rollout::buffer::{Batch, BatchGroup};

use super::*;
use crate::env::{DEFAULT_LIMIT, Environment, Judge, by_name, training_task_of};
use crate::policy::{END, Policy, PolicyConfig, Sampler, Tokenizer};
use crate::train::{AdamW, AdamWConfig, WarmStart, imitate};

const MEMBERS: u16 = 8;

fn key(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn who(n: u8) -> NodeId {
    key(n).node_id()
}

fn version(n: u8) -> Version {
    Version::from_hash(Hash::from_bytes([n; 32]))
}

fn environment() -> Arc<dyn Environment> {
    by_name("arithmetic-1").unwrap().into()
}

fn judge() -> Judge {
    Judge::new([environment()], DEFAULT_LIMIT)
}

/// Two versions a few steps apart that know what an answer looks like.
fn policies() -> (Policy, Policy) {
    let policy = Policy::random(PolicyConfig::tiny(2, 32), 1).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig { rate: 3e-3, ..AdamWConfig::default() });
    let mut teach = |steps, seed| {
        imitate(&policy, &*environment(), WarmStart { steps, tasks: 16, seed }, &mut optimizer).unwrap();
        policy.copy().unwrap()
    };
    (teach(100, 1), teach(4, 2))
}

/// Draws the rollouts of groups as an honest sampler does.
fn draw(policy: &Policy, version: Version, groups: std::ops::Range<u64>, seed: u64) -> Vec<Rollout> {
    let environment = environment();
    let tasks: Vec<_> = groups
        .flat_map(|group| (0..MEMBERS).map(move |member| (group, member)))
        .map(|(group, member)| (group, member, training_task_of(&*environment, group)))
        .collect();
    let prompts: Vec<Vec<u32>> = tasks.iter().map(|(.., task)| Tokenizer.encode(&task.prompt)).collect();
    let sampler = Sampler { max_tokens: environment.max_tokens(), temperature: 1.0 };
    let samples = sampler.draw(policy, &prompts, &mut Rng::from_u64(seed)).unwrap();
    let rollout = |((group, member, task), (prompt, sample)): (_, (Vec<u32>, crate::policy::Sample))| {
        let task: crate::env::Task = task;
        Rollout {
            group: GroupId(group),
            member,
            environment: Text::new(&environment.name()).unwrap(),
            seed: group,
            prompt: prompt.into(),
            reward: environment.reward(&task, &Tokenizer.decode(&sample.tokens)),
            finish: if sample.tokens.last() == Some(&END) { Finish::Stop } else { Finish::Length },
            completion: sample.tokens,
            log_probs: sample.logprobs.iter().map(|logprob| logprob.min(0.0)).collect(),
            segments: vec![Segment { version, from: 0 }],
        }
    };
    tasks.into_iter().zip(prompts.into_iter().zip(samples)).map(rollout).collect()
}

fn auditor(share: f64) -> (Auditor, Policy, Policy) {
    let (old, new) = policies();
    let mut auditor = Auditor::new(AuditConfig { share, newcomer: 0, ..AuditConfig::default() }, [9; 32]);
    auditor.hold(version(1), old.copy().unwrap());
    auditor.hold(version(2), new.copy().unwrap());
    (auditor, old, new)
}

fn examine(auditor: &mut Auditor, by: NodeId, rollouts: &[Rollout]) -> Vec<Verdict> {
    let rollouts: Vec<(NodeId, &Rollout)> = rollouts.iter().map(|rollout| (by, rollout)).collect();
    auditor.examine(&rollouts, &mut judge()).unwrap()
}

#[test]
fn honest_rollouts_pass_and_every_forgery_has_its_name() {
    let (mut auditor, old, new) = auditor(1.0);
    let honest = draw(&new, version(2), 0..40, 1);
    assert!(examine(&mut auditor, who(1), &honest).iter().all(|verdict| *verdict == Verdict::Honest));
    assert!(examine(&mut auditor, who(1), &honest).iter().all(|verdict| *verdict == Verdict::Repeated));
    assert!(!auditor.has_caught(&who(1)), "a member that comes twice accuses nobody");

    let mut forge = |n: u8, forge: &dyn Fn(&mut Rollout)| {
        let mut forged = draw(&new, version(2), 100..110, u64::from(n));
        forged.iter_mut().for_each(forge);
        let verdicts = examine(&mut auditor, who(n), &forged);
        assert!(auditor.has_caught(&who(n)));
        verdicts
    };
    let all = |verdicts: &[Verdict], right: fn(&Verdict) -> bool| verdicts.iter().all(right);
    let verdicts = forge(2, &|rollout| rollout.reward = 1.0 - rollout.reward);
    assert!(all(&verdicts, |verdict| matches!(verdict, Verdict::WrongReward { .. })));
    let verdicts = forge(3, &|rollout| rollout.prompt = Tokenizer.encode("1+1=").into());
    assert!(verdicts.iter().filter(|verdict| **verdict == Verdict::WrongPrompt).count() >= 72, "{verdicts:?}");
    let verdicts = forge(4, &|rollout| rollout.log_probs[0] -= 0.01);
    assert!(all(&verdicts, |verdict| matches!(verdict, Verdict::Edited(_))));
    let verdicts = forge(5, &|rollout| {
        // The second digit of a number that is not the one that was drawn.
        rollout.completion[0] = if rollout.completion[0] == 49 { 50 } else { 49 };
        let answer = Tokenizer.decode(&rollout.completion);
        rollout.reward = environment().reward(&training_task_of(&*environment(), rollout.seed), &answer);
    });
    assert!(all(&verdicts, |verdict| matches!(verdict, Verdict::Edited(_))), "{verdicts:?}");
    let stale = draw(&old, version(2), 120..130, 6);
    let verdicts = examine(&mut auditor, who(6), &stale);
    let caught =
        verdicts.iter().filter(|verdict| matches!(verdict, Verdict::WrongVersion { fits } if *fits == version(1)));
    assert!(caught.count() >= 76, "{verdicts:?}");
    // The trainer does not hold everything for ever; who names what is gone is struck and not accused.
    let unknown = draw(&old, version(7), 130..131, 7);
    assert_eq!(examine(&mut auditor, who(7), &unknown), vec![Verdict::UnknownVersion; 8]);
    assert!(!auditor.has_caught(&who(7)));
}

#[test]
fn only_a_sample_is_computed_again_until_somebody_is_caught() {
    let (old, new) = policies();
    let config = AuditConfig { share: 0.1, newcomer: 16, ..AuditConfig::default() };
    let chosen = |secret: u8| {
        let mut auditor = Auditor::new(config, [secret; 32]);
        auditor.hold(version(2), new.copy().unwrap());
        let mut chosen = Vec::new();
        for rollout in draw(&new, version(2), 0..50, 1) {
            let before = auditor.tally().recomputed;
            examine(&mut auditor, who(1), &[rollout]);
            chosen.push(auditor.tally().recomputed > before);
        }
        (chosen, auditor)
    };
    let (one, mut auditor) = chosen(1);
    let (other, _) = chosen(2);
    assert!(one[..16].iter().all(|chosen| *chosen), "a newcomer's are all looked at");
    let later = one[16..].iter().filter(|chosen| **chosen).count();
    assert!((20..=60).contains(&later), "{later} of 384");
    assert_ne!(one, other, "another secret, another choice");
    // One that is caught once is looked at in full.
    let mut forged = draw(&new, version(2), 60..61, 3);
    forged[0].reward += 0.5;
    examine(&mut auditor, who(1), &forged);
    let before = auditor.tally().recomputed;
    examine(&mut auditor, who(1), &draw(&old, version(2), 70..75, 4));
    assert_eq!(auditor.tally().recomputed - before, 40);
}

#[test]
fn copies_are_found_by_their_number_and_honest_agreement_is_not() {
    let (mut auditor, _, new) = auditor(0.0);
    // Few prompts, asked again and again, so that honest answers agree all the time.
    let honest: Vec<Rollout> = (0..250).flat_map(|seed| draw(&new, version(2), 0..8, seed)).collect();
    let mut found = 0;
    for (at, rollout) in honest.iter().enumerate() {
        let rollout = Rollout { group: GroupId(at as u64 + 1_000), ..rollout.clone() };
        let verdicts = examine(&mut auditor, who(at as u8 % 3 + 1), &[rollout]);
        found += usize::from(verdicts != [Verdict::Honest]);
    }
    assert_eq!(found, 0, "of {} honest rollouts", honest.len());
    // Samples once for each group and delivers that eight times.
    let caught = (0..100).position(|group| {
        let mut lazy = draw(&new, version(2), 5_000 + group..5_001 + group, group);
        for member in 1..lazy.len() {
            lazy[member] = Rollout { member: lazy[member].member, ..lazy[0].clone() };
        }
        examine(&mut auditor, who(9), &lazy).contains(&Verdict::Copied)
    });
    assert!(caught.is_some_and(|groups| groups < 30), "after {caught:?} groups");
}

#[test]
fn nobody_can_put_an_honest_sampler_under_suspicion_by_lies_about_an_answer() {
    let (mut auditor, _, new) = auditor(0.0);
    for group in 0..200 {
        let mut bait = draw(&new, version(2), group..group + 1, group);
        // The likeliest answer, said to be next to impossible.
        bait.iter_mut().flat_map(|rollout| &mut rollout.log_probs).for_each(|logprob| *logprob = -20.0);
        examine(&mut auditor, who(1), &bait);
        let honest = draw(&new, version(2), group..group + 1, group + 1_000);
        assert_eq!(examine(&mut auditor, who(2), &honest), vec![Verdict::Honest; 8]);
    }
}

fn batch(groups: &[Vec<Rollout>], sampler: NodeId) -> Batch {
    let group = |rollouts: &Vec<Rollout>| BatchGroup {
        id: rollouts[0].group,
        environment: rollouts[0].environment.clone(),
        seed: rollouts[0].seed,
        rollouts: rollouts.iter().map(|rollout| (sampler, 3, Arc::new(rollout.clone()))).collect(),
    };
    Batch { step: 5, groups: groups.iter().map(group).collect() }
}

#[test]
fn a_batch_becomes_trajectories_without_what_is_struck() {
    let (mut auditor, _, new) = auditor(1.0);
    let mut groups: Vec<Vec<Rollout>> = (0..3).map(|group| draw(&new, version(2), group..group + 1, group)).collect();
    groups[1][4].reward += 1.0;
    // An environment that the judge cannot ask.
    groups[2].iter_mut().for_each(|rollout| rollout.environment = Text::new("nowhere-1").unwrap());
    let admission = auditor.admit(&batch(&groups, who(1)), &mut judge()).unwrap();
    assert_eq!(admission.groups.iter().map(Vec::len).collect::<Vec<_>>(), [8, 7, 0]);
    assert_eq!(auditor.tally().groups_failed, 2);
    let (row, rollout) = (&admission.groups[0][0], &groups[0][0]);
    assert_eq!((&row.tokens, row.reward, row.lag), (&rollout.completion, rollout.reward, 3));
    let wrong: Vec<_> = admission.findings.iter().filter(|finding| finding.verdict.accuses()).collect();
    assert_eq!((wrong.len(), wrong[0].group, wrong[0].member), (1, GroupId(1), 4));
    let unjudged = |finding: &&Finding| matches!(finding.verdict, Verdict::Unjudged(JudgeError::Unknown(_)));
    assert_eq!(admission.findings.iter().filter(unjudged).count(), 8);
}

fn network() -> NetworkId {
    "test".parse().unwrap()
}

fn signed(by: u8, sequence: u64, rollouts: &[Rollout]) -> Verified<RolloutFrame> {
    let policy = PolicyId { owner: who(100), name: Text::new("p").unwrap() };
    let frame = RolloutFrame::new(policy, sequence, WallTime::from_millis(1), rollouts).unwrap();
    Verified::sign(&key(by), &network(), frame).unwrap()
}

#[test]
fn evidence_convinces_a_stranger_and_convicts_nobody_who_is_honest() {
    let (old, new) = policies();
    let check = |evidence: &Evidence| {
        let weights = |known: &Version| {
            [(version(1), &old), (version(2), &new)].iter().find(|(v, _)| v == known).map(|(_, p)| *p)
        };
        evidence.check(&network(), &mut judge(), weights, Tolerance::default())
    };
    let mut rollouts = draw(&new, version(2), 0..1, 1);
    rollouts[1].reward = 0.25;
    rollouts[2].log_probs[0] -= 0.1;
    let stale = draw(&old, version(2), 1..2, 2);
    rollouts.push(stale[0].clone());
    let frame = signed(1, 1, &rollouts);
    let against = |group, member| Evidence::new(who(1), (GroupId(group), member), std::slice::from_ref(&frame));
    assert!(matches!(check(&against(0, 0)), Err(EvidenceError::Nothing { .. })));
    assert!(matches!(check(&against(0, 1)).unwrap(), Verdict::WrongReward { .. }));
    assert!(matches!(check(&against(0, 2)).unwrap(), Verdict::Edited(_)));
    assert!(matches!(check(&against(1, 0)).unwrap(), Verdict::Edited(_)));
    assert!(matches!(check(&against(5, 0)), Err(EvidenceError::Missing(_))));
    let stranger = Evidence { accused: who(2), ..against(0, 1) };
    assert!(matches!(check(&stranger), Err(EvidenceError::Missing(_))), "the frame is another's");
    let other: NetworkId = "other".parse().unwrap();
    let foreign = against(0, 1).check(&other, &mut judge(), |_| None, Tolerance::default());
    assert!(matches!(foreign, Err(EvidenceError::Frame(_))), "signed for another network");
}

#[test]
fn evidence_of_copies_leaves_nothing_out() {
    let (_, new) = policies();
    let lazy = |group: u64| {
        let mut rollouts = draw(&new, version(2), group..group + 1, group);
        for member in 1..rollouts.len() {
            rollouts[member] = Rollout { member: rollouts[member].member, ..rollouts[0].clone() };
        }
        rollouts
    };
    let frames: Vec<_> = (1..=40).map(|sequence| signed(3, sequence, &lazy(sequence))).collect();
    let check = |frames: &[Verified<RolloutFrame>]| {
        let last = frames.last().unwrap().rollouts().last().unwrap();
        let evidence = Evidence::new(who(3), (last.group(), last.member()), frames);
        evidence.check(&network(), &mut judge(), |_| Some(&new), Tolerance::default())
    };
    assert_eq!(check(&frames).unwrap(), Verdict::Copied);
    let chosen: Vec<_> = frames.iter().step_by(2).cloned().collect();
    assert!(matches!(check(&chosen), Err(EvidenceError::Gap(_))));
    let honest: Vec<_> = (1..=40).map(|n| signed(3, n, &draw(&new, version(2), n..n + 1, n))).collect();
    assert!(matches!(check(&honest), Err(EvidenceError::Nothing { .. })));
}

#[test]
fn the_tolerance_is_what_honest_rollouts_keep_to_with_a_margin() {
    let distance = |n: u16| Distance { token: f32::from(n) * 1e-6, mean: f32::from(n) * 5e-7 };
    let honest: Vec<Distance> = (0..1_000).map(distance).collect();
    let tolerance = Tolerance::calibrate(&honest);
    assert!(
        (tolerance.token - 8.0 * 999e-6).abs() < 1e-5 && (tolerance.mean - 4.0 * 999e-6).abs() < 1e-5,
        "{tolerance:?}"
    );
    assert!(honest.iter().all(|distance| tolerance.holds(*distance)));
    assert!(!tolerance.holds(Distance::between(&[-1.0, f32::NAN], &[-1.0, -1.0])));
    assert_eq!(Tolerance::calibrate(&[]), Tolerance { token: 2e-5, mean: 2e-5 });
}
