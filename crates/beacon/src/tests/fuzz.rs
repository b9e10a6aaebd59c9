//! Random faults and random messages: what must hold always.

use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Bid, Lease, Work};
use chorus_protocol::bounded::Text;
use chorus_protocol::job::{Failure, JobKind};
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, Hash, JobId, NodeId, Received, Signable, Verified, WallTime};
use proptest::prelude::*;

use super::harness::{Nature, World};
use crate::testing::{id, key, network, output, payload, spec};
use crate::*;

const SECOND: Duration = Duration::from_secs(1);

fn natures() -> impl Strategy<Value = Vec<Nature>> {
    let one = prop_oneof![
        4 => Just(Nature::Honest),
        1 => Just(Nature::Boasts),
        1 => Just(Nature::Mute),
        1 => Just(Nature::Broken),
        1 => Just(Nature::Forges),
        1 => Just(Nature::Slow),
        1 => Just(Nature::Picky),
    ];
    prop::collection::vec(one, 1..7)
}

fn rules() -> impl Strategy<Value = SelectionRule> {
    prop::sample::select(SelectionRule::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every job ends exactly once, by its deadline, and every slot is free again, whatever the network and the nodes do. The
    /// harness checks slots, and the audit leases and tokens, after every step.
    #[test]
    fn every_job_ends_once_and_nothing_leaks(
        seed in any::<u64>(),
        natures in natures(),
        rule in rules(),
        loss in 0.0..0.4f64,
        doubling in 0.0..0.5f64,
        delay_ms in 0u64..400,
        run_ms in 0u64..3_000,
        jobs in prop::collection::vec((0u64..4_000, 0usize..7, 200u64..15_000, 0u32..6), 1..12),
        crashes in prop::collection::vec((0u64..8_000, 0usize..7, any::<bool>()), 0..3),
    ) {
        let config = BeaconConfig { selection: rule, ..BeaconConfig::default() };
        let mut world = World::new(seed, config, &natures);
        (world.loss, world.doubling, world.run_time) = (loss, doubling, Duration::from_millis(run_ms));
        world.delay = (Duration::ZERO, Duration::from_millis(delay_ms));
        let count = world.nodes.len();
        let mut asked = Vec::new();
        for (n, &(at, node, deadline, max_leases)) in (1u8..).zip(&jobs) {
            let at = Time::from_millis(1 + at);
            let job = JobSpec { max_leases, ..spec(n, at, Duration::from_millis(deadline)) };
            asked.push((node % count, job.job, job.deadline));
            world.submit_at(at, node % count, job);
        }
        for &(at, node, told) in &crashes {
            world.crash_at(Time::from_millis(1 + at), node % count, told);
        }
        world.run_until(Time::from_millis(120_000));
        for (node, job, deadline) in asked {
            if let Some((at, result)) = world.done.get(&job) {
                prop_assert!(*at <= deadline);
                if let Ok(done) = result {
                    prop_assert_eq!(done.output.text.as_str(), "4", "a forged text was accepted");
                    prop_assert!(done.leases <= jobs.len() as u32 + 6);
                }
            } else {
                prop_assert!(!world.nodes[node].alive, "a job of a living requester never ended");
            }
        }
        for node in world.nodes.iter().filter(|node| node.alive) {
            prop_assert_eq!(node.requester.jobs().count(), 0);
            prop_assert_eq!(node.requester.deadline(), None);
            prop_assert_eq!(node.executor.free(), node.executor.slots());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    /// Same seed, same world, same history: nothing depends on addresses or on hash order.
    #[test]
    fn the_same_seed_gives_the_same_history(seed in any::<u64>(), natures in natures()) {
        let history = || {
            let mut world = World::new(seed, BeaconConfig::default(), &natures);
            (world.loss, world.doubling) = (0.1, 0.1);
            for n in 1..=4 {
                world.submit(0, spec(n, world.now, 10 * SECOND));
            }
            world.run_for(30 * SECOND);
            format!("{:?}", world.events)
        };
        prop_assert_eq!(history(), history());
    }
}

#[test]
fn with_a_tenth_of_all_messages_lost_nearly_all_jobs_end_well() {
    let (mut well, mut all) = (0, 0);
    for seed in 0..40 {
        let mut world = World::new(seed, BeaconConfig::default(), &[Nature::Honest; 5]);
        (world.loss, world.doubling) = (0.1, 0.1);
        for n in 1..=5 {
            world.submit_at(Time::from_millis(u64::from(n) * 300), 0, spec(n, Time::ZERO, 30 * SECOND));
        }
        world.run_for(40 * SECOND);
        all += world.done.len();
        well += world.done.values().filter(|(_, result)| result.is_ok()).count();
    }
    assert_eq!(all, 200);
    assert!(well >= 198, "{well} of {all}");
}

/// A small world of ids, so that random messages hit what exists.
fn node() -> impl Strategy<Value = u8> {
    1u8..5
}

fn job() -> impl Strategy<Value = JobId> {
    prop_oneof![
        (1u8..4).prop_map(|n| JobId::from_bytes([n; 16])),
        (1u8..4).prop_map(|n| hedge_id(JobId::from_bytes([n; 16]))),
    ]
}

fn fence() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..4, Just(u64::MAX), (0u64..4).prop_map(|n| (1_700_000_000_001 << 20) + n)]
}

fn failure() -> impl Strategy<Value = Failure> {
    prop::sample::select(vec![
        Failure::Busy,
        Failure::NoSuchModel,
        Failure::ContextExceeded { prompt_tokens: 9, context: 4 },
        Failure::Engine(Text::default()),
        Failure::InvalidPayload(Text::default()),
        Failure::StaleLease,
        Failure::Cancelled,
        Failure::Deadline,
        Failure::Leaving,
    ])
}

fn signed<T: Signable>(by: u8, value: T) -> Received<T> {
    Verified::sign(&key(by), &network(), value).unwrap().to_wire()
}

fn message() -> impl Strategy<Value = Direct> {
    let beacon = || prop::sample::select(vec![BeaconId::from_bytes([0; 16]), BeaconId::from_bytes([1; 16])]);
    prop_oneof![
        (node(), node(), beacon(), any::<(u16, u16, u16, u32, u32)>()).prop_map(|(by, to, beacon, n)| {
            let bid = Bid {
                beacon,
                requester: id(to),
                score_milli: n.0,
                active: n.1,
                slots: n.2,
                expected_ms: n.3,
                hold_ms: n.4,
            };
            Direct::Bid(signed(by, bid))
        }),
        beacon().prop_map(|beacon| Direct::Release { beacon }),
        (node(), node(), job(), beacon(), fence(), any::<u64>()).prop_map(|(by, to, job, beacon, fence, deadline)| {
            let lease = Lease {
                job,
                beacon,
                executor: id(to),
                fence,
                kind: JobKind::Answer,
                requirement: Hash::ZERO,
                deadline: WallTime::from_millis(deadline),
            };
            Direct::Grant { lease: signed(by, lease), payload: Box::new(payload(true)) }
        }),
        (job(), fence()).prop_map(|(job, fence)| Direct::Accept { job, fence }),
        (job(), fence(), failure()).prop_map(|(job, fence, failure)| Direct::Refuse { job, fence, failure }),
        (job(), fence(), any::<(u32, u32)>()).prop_map(|(job, fence, (index, tokens))| Direct::Progress {
            job,
            fence,
            index,
            tokens,
            text: Text::default()
        }),
        (node(), node(), job(), fence(), prop::option::of(failure()), any::<u32>()).prop_map(
            |(by, to, job, fence, failure, n)| {
                let result = match failure.clone() {
                    None => Ok(Box::new(output("4"))),
                    Some(failure) => Err(failure),
                };
                let work = Work {
                    job,
                    requester: id(to),
                    fence,
                    kind: JobKind::Answer,
                    requirement: Hash::ZERO,
                    output: Hash::ZERO,
                    model: Hash::ZERO,
                    prompt_tokens: n,
                    completion_tokens: n,
                    elapsed_ms: n,
                    failure,
                };
                Direct::Outcome { job, fence, result, work: signed(by, work) }
            }
        ),
        (job(), fence()).prop_map(|(job, fence)| Direct::Cancel { job, fence }),
    ]
}

fn step() -> impl Strategy<Value = (NodeId, Direct, u64)> {
    (node(), message(), prop_oneof![4 => 0u64..50, 1 => 0u64..5_000]).prop_map(|(n, message, ms)| (id(n), message, ms))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Both machines are total: any message of anybody at any time is handled, and jobs still end.
    #[test]
    fn random_messages_never_panic_and_never_win(steps in prop::collection::vec(step(), 0..120), seed in any::<u64>()) {
        let mut rng = Rng::from_u64(seed);
        let mut requester = Requester::new(BeaconConfig::default(), network(), key(1));
        let mut executor = Executor::new(BeaconConfig::default(), network(), key(1));
        let mut audit = audit::LeaseAudit::default();
        let mut now = Time::from_millis(1);
        let mut setup = vec![RequesterInput::Quarantined { node: id(4) }];
        setup.extend((1..5).map(|n| RequesterInput::Capability { node: id(n), capability: Some(testing::shared(2)) }));
        setup.extend((1..4).map(|n| RequesterInput::Submit(Box::new(spec(n, now, 20 * SECOND)))));
        let inputs = setup.into_iter().map(|input| (input, None, 0));
        let inputs = inputs.chain(steps.into_iter().map(|(from, message, ms)| {
            (RequesterInput::Direct { from, message: message.clone() }, Some((from, message)), ms)
        }));
        let offer = ExecutorInput::Offer { capability: testing::shared(2), slots: 2 };
        let (mut asked, mut worked, mut ended) = (Outbox::new(), Outbox::new(), 0);
        let mut cx = Ctx { now, wall: WallTime::from_millis(1_700_000_000_000), rng: &mut rng };
        executor.handle(&mut cx, offer, &mut worked);
        for (input, other, ms) in inputs {
            now = now + Duration::from_millis(ms);
            let wall = WallTime::from_millis(1_700_000_000_000 + now.as_nanos() / 1_000_000);
            let mut cx = Ctx { now, wall, rng: &mut rng };
            audit.input(&input);
            requester.expire(&mut cx, &mut asked);
            executor.expire(&mut cx, &mut worked);
            // What was due before this input is judged before it.
            requester.handle(&mut cx, input, &mut asked);
            if let Some((from, message)) = other {
                executor.handle(&mut cx, ExecutorInput::Direct { from, message }, &mut worked);
            }
            for effect in asked.drain() {
                if let RequesterEffect::Done { result, .. } = &effect {
                    ended += 1;
                    prop_assert!(result.is_err(), "nobody has done the work");
                }
                let late = audit.effect(&effect, now);
                prop_assert!(late.is_ok() || format!("{late:?}").contains("after its deadline"), "{:?}", late);
            }
            for effect in worked.drain() {
                if let ExecutorEffect::Run { run, .. } = effect {
                    let done = ExecutorInput::Done { run, result: Ok(output("4")) };
                    let mut ignored = Outbox::new();
                    executor.handle(&mut cx, done, &mut ignored);
                }
            }
            prop_assert!(executor.runs().count() + executor.reserved() <= executor.slots());
        }
        let mut cx = Ctx { now: now + 60 * SECOND, wall: WallTime::from_millis(1_700_000_200_000), rng: &mut rng };
        requester.expire(&mut cx, &mut asked);
        executor.expire(&mut cx, &mut worked);
        ended += asked.drain().filter(|effect| matches!(effect, RequesterEffect::Done { .. })).count();
        prop_assert_eq!(ended, 3);
        prop_assert_eq!(requester.deadline(), None);
        prop_assert_eq!(executor.free(), 2);
    }
}
