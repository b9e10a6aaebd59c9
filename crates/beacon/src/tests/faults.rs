//! What goes wrong, and what the customer notices of it.

use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::JobId;
use chorus_protocol::beacon::Verdict;
use chorus_protocol::job::Failure;
use chorus_protocol::message::Direct;

use super::harness::{Nature, World};
use crate::testing::{capability, id, payload, spec};
use crate::*;

const SECOND: Duration = Duration::from_secs(1);

/// Node 0 asks only; the others work.
fn world(natures: &[Nature]) -> World {
    let mut world = World::new(1, BeaconConfig::default(), natures);
    world.asks_only(0);
    world
}

/// Makes node 1 the first choice and node 2 the second, by their skill.
fn prefer_node_1(world: &mut World) -> JobSpec {
    let math = || chorus_protocol::List::truncated([chorus_protocol::Text::truncated("math")]);
    let mut skilled = capability(1, 4096);
    skilled.skills = chorus_protocol::List::truncated([testing::skill(&["math"], None)]);
    world.offer(1, 1, skilled);
    let mut job = spec(1, world.now, 20 * SECOND);
    job.requirement.tags = math();
    job
}

#[test]
fn a_crash_moves_the_job_to_the_next_bidder_at_once() {
    let mut world = world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.crash_at(world.now + Duration::from_millis(200), 1, true);
    world.run_for(20 * SECOND);
    let nodes: Vec<_> = world.elected().into_iter().map(|(node, ..)| node).collect();
    assert_eq!(nodes, [id(2), id(3)]);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!((done.executor, done.leases), (id(3), 2));
    assert!(done.elapsed < Duration::from_millis(800), "{:?}", done.elapsed);
    world.assert_settled(1);
}

#[test]
fn a_crash_that_nobody_reports_is_noticed_by_silence() {
    let mut world = world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.crash_at(world.now + Duration::from_millis(200), 1, false);
    world.run_for(20 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!(done.executor, id(3));
    assert!(done.elapsed < 6 * SECOND, "{:?}", done.elapsed);
    world.assert_settled(1);
}

#[test]
fn a_broken_engine_a_forger_and_a_mute_are_replaced_and_remembered() {
    for (nature, verdict) in
        [(Nature::Broken, Some(Verdict::Failed)), (Nature::Forges, Some(Verdict::Invalid)), (Nature::Mute, None)]
    {
        let mut world = world(&[Nature::Honest, nature, Nature::Honest]);
        let job = prefer_node_1(&mut world);
        world.submit(0, job);
        world.run_for(20 * SECOND);
        let done = world.result(1).as_ref().unwrap();
        assert_eq!((done.executor, done.output.text.as_str()), (id(3), "4"), "{nature:?}");
        let now = world.now;
        assert!(world.nodes[0].requester.standing(id(2), now).mean() < 0.6, "{nature:?}");
        assert!(world.receipts.iter().any(|r| Some(r.verdict) == verdict) || verdict.is_none(), "{nature:?}");
        assert_eq!(world.penalties.contains(&(id(2), Fault::InvalidResult)), nature == Nature::Forges);
    }
}

#[test]
fn a_single_node_gets_a_second_chance_and_no_third() {
    let mut world = world(&[Nature::Honest, Nature::Broken]);
    world.submit(0, spec(1, world.now, 20 * SECOND));
    world.run_for(20 * SECOND);
    assert_eq!(world.nodes[1].started, 2);
    assert!(matches!(world.result(1), Err(JobError::Exhausted { leases: 2, last: Failure::Engine(_) })));
    world.assert_settled(1);
}

#[test]
fn leases_are_counted_against_the_job_s_bound() {
    let mut world = world(&[Nature::Honest, Nature::Broken, Nature::Broken, Nature::Broken, Nature::Broken]);
    world.submit(0, JobSpec { max_leases: 3, ..spec(1, world.now, 20 * SECOND) });
    world.run_for(20 * SECOND);
    assert!(matches!(world.result(1), Err(JobError::Exhausted { leases: 3, .. })), "{:?}", world.done);
    assert_eq!(world.elected().len(), 3);
}

#[test]
fn one_picky_executor_does_not_end_a_job_and_two_do() {
    let mut one = world(&[Nature::Honest, Nature::Picky, Nature::Honest]);
    let job = prefer_node_1(&mut one);
    one.submit(0, job);
    one.run_for(20 * SECOND);
    assert!(one.result(1).is_ok());
    let mut two = world(&[Nature::Honest, Nature::Picky, Nature::Picky]);
    two.submit(0, spec(1, two.now, 20 * SECOND));
    two.run_for(20 * SECOND);
    assert!(matches!(two.result(1), Err(JobError::Refused(Failure::InvalidPayload(_)))));
}

#[test]
fn a_straggler_gets_a_rival_under_an_id_of_its_own() {
    let mut world = world(&[Nature::Honest, Nature::Slow, Nature::Honest]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(1_500));
    let leases: Vec<LeaseView> = world.nodes[0].requester.leases().collect();
    assert_eq!(leases.len(), 2);
    let job = JobId::from_bytes([1; 16]);
    assert!(leases.iter().any(|l| l.lease == job && !l.hedge && l.executor == id(2)));
    assert!(leases.iter().any(|l| l.lease == hedge_id(job) && l.hedge && l.executor == id(3)));
    world.run_for(20 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!(done.executor, id(3));
    assert!(done.elapsed < 2 * SECOND, "{:?}", done.elapsed);
    world.assert_settled(1);
    let now = world.now;
    let (slow, fast) = (world.nodes[0].requester.standing(id(2), now), world.nodes[0].requester.standing(id(3), now));
    assert!(slow.slowdown > 1.3 && slow.mean() < fast.mean(), "{slow:?} {fast:?}");
}

#[test]
fn without_hedging_the_straggler_is_waited_for() {
    let config = BeaconConfig { hedge: HedgePolicy::Never, ..BeaconConfig::default() };
    let mut world = World::new(1, config, &[Nature::Honest, Nature::Slow, Nature::Honest]);
    world.asks_only(0);
    let job = prefer_node_1(&mut world);
    world.submit(0, JobSpec { deadline: world.now + 90 * SECOND, ..job });
    world.run_for(90 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!((done.executor, done.leases), (id(2), 1));
}

#[test]
fn a_loser_that_finishes_late_gets_a_receipt_that_says_superseded() {
    let mut world = world(&[Nature::Honest, Nature::Slow, Nature::Honest]);
    world.run_time = Duration::from_millis(30);
    // Three seconds against thirty milliseconds; cancellations do not arrive.
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(500));
    let lease = world.nodes[0].requester.leases().next().unwrap();
    world.requester(0, RequesterInput::PeerDown(id(2)));
    // The executor has not noticed: its result comes after all.
    world.complete(1, RunId { job: lease.lease, fence: lease.fence, requester: id(1) });
    world.run_for(20 * SECOND);
    let verdicts: Vec<_> = world.receipts.iter().map(|receipt| receipt.verdict).collect();
    assert_eq!(world.result(1).as_ref().unwrap().executor, id(3), "a result under a stale token is refused");
    assert!(verdicts.contains(&Verdict::Superseded) && verdicts.contains(&Verdict::Accepted), "{verdicts:?}");
}

#[test]
fn the_requester_gone_its_runs_stop() {
    let mut world = world(&[Nature::Honest; 3]);
    world.submit(0, spec(1, world.now, 20 * SECOND));
    world.run_for(Duration::from_millis(100));
    world.crash_at(world.now, 0, true);
    world.run_for(Duration::from_millis(10));
    assert!(world.nodes[1..].iter().all(|node| node.executor.free() == 1));
}

#[test]
fn a_leaving_executor_hands_its_job_back_at_once() {
    let mut world = world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(100));
    world.executor(1, ExecutorInput::Drain);
    world.run_for(20 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!(done.executor, id(3));
    assert!(done.elapsed < SECOND, "{:?}", done.elapsed);
    let now = world.now;
    assert!(world.nodes[0].requester.standing(id(2), now).mean() > 0.6, "leaving is no failure");
    world.assert_settled(1);
}

#[test]
fn a_quarantined_holder_loses_its_lease() {
    let mut world = world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(100));
    world.requester(0, RequesterInput::Quarantined { node: id(2) });
    world.run_for(20 * SECOND);
    assert_eq!(world.result(1).as_ref().unwrap().executor, id(3));
    world.assert_settled(1);
}

#[test]
fn a_grant_that_cannot_be_sent_goes_to_the_next() {
    let mut world = world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.delay = (Duration::from_millis(10), Duration::from_millis(10));
    while world.elected().is_empty() {
        world.run_for(Duration::from_millis(1));
    }
    world.requester(0, RequesterInput::SendFailed { to: id(2) });
    world.run_for(20 * SECOND);
    assert!(world.result(1).is_ok());
    assert!(world.elected().iter().any(|(node, ..)| *node == id(3)));
    // Once there was a sign of life, one failed message is not the end of the run: its executor is asked, and answers.
    let mut world = self::world(&[Nature::Honest; 3]);
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(200));
    world.requester(0, RequesterInput::SendFailed { to: id(2) });
    world.run_for(20 * SECOND);
    assert_eq!(world.result(1).as_ref().unwrap().executor, id(2));
}

#[test]
fn a_run_whose_executor_cannot_be_asked_either_is_lost_without_waiting_for_its_silence() {
    let mut world = world(&[Nature::Honest; 3]);
    world.run_time = 8 * SECOND;
    let job = prefer_node_1(&mut world);
    world.submit(0, job);
    world.run_for(Duration::from_millis(200));
    assert!(world.nodes[0].requester.leases().all(|lease| lease.confirmed && lease.executor == id(2)));
    let grants = |world: &World| world.sent.get("grant").copied().unwrap_or(0);
    let (before, failed_at) = (grants(&world), world.now);
    // Its machine is gone; the first message that finds out is any.
    world.crash_at(world.now, 1, false);
    world.requester(0, RequesterInput::SendFailed { to: id(2) });
    world.requester(0, RequesterInput::SendFailed { to: id(2) });
    assert_eq!(grants(&world), before, "a burst of failures at one moment is one sign");
    world.run_for(BeaconConfig::default().back_off);
    assert_eq!(grants(&world), before + 1, "it is asked where the run stands");
    world.requester(0, RequesterInput::SendFailed { to: id(2) });
    assert_eq!(world.elected().last().map(|(node, ..)| *node), Some(id(3)));
    assert!(world.now < failed_at + SECOND, "and not after {:?} of silence", BeaconConfig::default().silence_timeout);
    let now = world.now;
    assert!(world.nodes[0].requester.standing(id(2), now).mean() > 0.6, "a broken link is not its fault");
}

#[test]
fn a_bid_that_cannot_be_sent_keeps_no_slot() {
    let mut world = world(&[Nature::Honest; 2]);
    world.submit(0, spec(1, world.now, 20 * SECOND));
    while world.nodes[1].executor.reserved() == 0 {
        world.run_for(Duration::from_micros(100));
    }
    world.executor(1, ExecutorInput::SendFailed { to: id(3) });
    assert_eq!(world.nodes[1].executor.reserved(), 1, "somebody else's link");
    world.executor(1, ExecutorInput::SendFailed { to: id(1) });
    assert_eq!(world.nodes[1].executor.free(), 1);
    world.run_for(20 * SECOND);
    assert!(world.result(1).is_ok(), "the bid arrived all the same, and the grant finds the slot free");
    world.assert_settled(1);
}

#[test]
fn a_lost_grant_is_repeated_and_a_lost_outcome_is_too() {
    let mut world = world(&[Nature::Honest; 2]);
    world.submit(0, spec(1, world.now, 20 * SECOND));
    world.run_for(Duration::from_millis(200));
    // From here on everything is lost, the outcome among it; later the link is whole again.
    world.loss = 1.0;
    world.run_for(Duration::from_millis(800));
    assert_eq!(world.nodes[1].executor.runs().count(), 0, "it is done, and has said so to nobody");
    world.loss = 0.0;
    world.run_for(20 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!((done.leases, world.nodes[1].started), (1, 1), "asked again, it repeats its answer instead of its work");
}

#[test]
fn a_doubled_or_stale_grant_starts_nothing() {
    let mut world = world(&[Nature::Honest; 2]);
    let sign = |fence: u64, job: u8| {
        let lease = chorus_protocol::beacon::Lease {
            job: JobId::from_bytes([job; 16]),
            beacon: Default::default(),
            executor: id(2),
            fence,
            kind: chorus_protocol::job::JobKind::Answer,
            requirement: chorus_protocol::Hash::ZERO,
            deadline: chorus_protocol::WallTime::from_millis(1_700_000_060_000),
        };
        let lease = chorus_protocol::Verified::sign(&testing::key(1), &testing::network(), lease);
        Direct::Grant { lease: lease.unwrap().to_wire(), payload: Box::new(payload(false)) }
    };
    let grant = |world: &mut World, message: Direct| {
        world.executor(1, ExecutorInput::Direct { from: id(1), message });
        let runs: Vec<u64> = world.nodes[1].executor.runs().map(|run| run.fence).collect();
        (runs, world.nodes[1].started)
    };
    assert_eq!(grant(&mut world, sign(5, 1)), (vec![5], 1), "without a reservation, but a slot is free");
    assert_eq!(grant(&mut world, sign(5, 1)), (vec![5], 1), "doubled");
    assert_eq!(grant(&mut world, sign(4, 1)), (vec![5], 1), "stale");
    assert_eq!(grant(&mut world, sign(9, 2)), (vec![5], 1), "no slot is free");
    assert_eq!(grant(&mut world, sign(6, 1)), (vec![6], 2), "newer, it takes the older one's slot");
    let job = JobId::from_bytes([1; 16]);
    world.executor(1, ExecutorInput::Direct { from: id(1), message: Direct::Cancel { job, fence: 6 } });
    assert_eq!(grant(&mut world, sign(6, 1)), (vec![], 2), "cancelled");
    // A cancellation that overtakes its grant.
    let job = JobId::from_bytes([3; 16]);
    world.executor(1, ExecutorInput::Direct { from: id(1), message: Direct::Cancel { job, fence: 7 } });
    assert_eq!(grant(&mut world, sign(7, 3)), (vec![], 2));
    // Somebody else's lease, sent on.
    world.executor(1, ExecutorInput::Direct { from: id(3), message: sign(8, 4) });
    assert_eq!(world.penalties, [(id(3), Fault::WrongParty("lease"))]);
}

#[test]
fn a_run_ends_at_its_deadline_on_both_sides() {
    let mut world = world(&[Nature::Honest, Nature::Slow]);
    world.submit(0, spec(1, world.now, 3 * SECOND));
    let start = world.now;
    world.run_for(5 * SECOND);
    let (at, result) = &world.done[&JobId::from_bytes([1; 16])];
    assert_eq!(*at, start + 3 * SECOND);
    let Err(JobError::Deadline { waiting_for, .. }) = result else { panic!("{result:?}") };
    assert!(waiting_for.contains(&id(2).fmt_short()));
    world.assert_settled(1);
}

#[test]
fn a_beacon_is_answered_once_for_as_long_as_its_copies_pass_for_current() {
    let mut world = world(&[Nature::Honest; 2]);
    world.nodes[0].alive = false;
    // Made by a clock that is as far ahead as is borne, about a job that is over in a second.
    let made = 1_700_000_000_000 + 59_000;
    let beacon = chorus_protocol::beacon::Beacon {
        id: chorus_protocol::BeaconId::from_bytes([1; 16]),
        job: JobId::from_bytes([1; 16]),
        kind: chorus_protocol::job::JobKind::Answer,
        requirement: Default::default(),
        risk: Default::default(),
        made: chorus_protocol::WallTime::from_millis(made),
        deadline: chorus_protocol::WallTime::from_millis(made + 1_000),
        window_ms: 100,
        executors: 1,
        invited: Default::default(),
    };
    let beacon = chorus_protocol::Verified::sign(&testing::key(1), &testing::network(), beacon).unwrap();
    for _ in 0..95 {
        world.executor(1, ExecutorInput::Beacon(beacon.clone()));
        world.run_for(SECOND);
    }
    assert_eq!(world.sent.get("bid"), Some(&1));
}

#[test]
fn a_flood_of_beacons_reserves_one_slot_at_a_time_and_then_nothing() {
    let mut world = world(&[Nature::Honest; 2]);
    world.nodes[0].alive = false;
    for n in 0..2_000u32 {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        let beacon = chorus_protocol::beacon::Beacon {
            id: chorus_protocol::BeaconId::from_bytes(bytes),
            job: JobId::from_bytes(bytes),
            kind: chorus_protocol::job::JobKind::Answer,
            requirement: Default::default(),
            risk: Default::default(),
            made: chorus_protocol::WallTime::from_millis(1_700_000_000_000),
            deadline: chorus_protocol::WallTime::from_millis(1_700_000_600_000),
            window_ms: 30_000,
            executors: 1,
            invited: Default::default(),
        };
        let beacon = chorus_protocol::Verified::sign(&testing::key(9), &testing::network(), beacon);
        world.executor(1, ExecutorInput::Beacon(beacon.unwrap()));
    }
    world.run_for(20 * SECOND);
    let bids = world.sent.get("bid").copied().unwrap_or(0);
    assert!(bids <= 17, "its share of the queue and no more: {bids}");
    assert_eq!(world.nodes[1].executor.free(), 1);
    assert!(world.now > Time::ZERO);
}
