//! The ordinary life of a job, step by step.

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::beacon::Verdict;
use chorus_protocol::capability::{Capability, SamplingOffer};
use chorus_protocol::job::{JobKind, Payload, Requirement};
use chorus_protocol::policy::PolicyId;
use chorus_protocol::{JobId, Text};

use super::harness::{Nature, World};
use crate::testing::{capability, id, skill, spec};
use crate::*;

const SECOND: Duration = Duration::from_secs(1);

fn world(natures: &[Nature]) -> World {
    World::new(1, BeaconConfig::default(), natures)
}

#[test]
fn a_job_is_elected_run_countersigned_and_done() {
    let mut world = world(&[Nature::Honest; 5]);
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(10 * SECOND);
    let done = world.result(1).as_ref().unwrap();
    assert_eq!(done.output.text.as_str(), "4");
    assert_eq!((done.leases, done.score), (1, 1.0));
    assert!(done.election < Duration::from_millis(10), "five bids are all there can be: {:?}", done.election);
    assert_eq!(done.executor, id(1), "tied, it goes to the requester's own node");
    assert!(done.reputation > 0.7);
    let verdicts: Vec<_> = world.receipts.iter().map(|receipt| receipt.verdict).collect();
    assert_eq!(verdicts, [Verdict::Accepted]);
    assert_eq!(world.sent.get("release"), Some(&4), "the four others are released at once");
    assert!(world.penalties.is_empty());
    world.assert_settled(1);
}

#[test]
fn release_frees_slots_at_once() {
    let mut world = world(&[Nature::Honest; 5]);
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(Duration::from_millis(20));
    let free: usize = world.nodes.iter().map(|node| node.executor.free()).sum();
    let reserved: usize = world.nodes.iter().map(|node| node.executor.reserved()).sum();
    assert_eq!((free, reserved), (4, 0));
}

#[test]
fn jobs_handed_in_together_share_the_swarm_without_waiting_for_windows() {
    let mut world = world(&[Nature::Honest; 5]);
    for n in 1..=5 {
        world.submit(0, spec(n, world.now, 10 * SECOND));
    }
    world.run_for(Duration::from_millis(60));
    let leases: Vec<_> = world.nodes[0].requester.leases().collect();
    let nodes: BTreeSet<_> = leases.iter().map(|lease| lease.executor).collect();
    assert_eq!((leases.len(), nodes.len()), (5, 5), "a reservation that comes free goes to the next beacon that waits");
    world.run_for(10 * SECOND);
    world.assert_settled(5);
    assert!(world.done.values().all(|(_, result)| result.is_ok()));
}

#[test]
fn more_jobs_than_slots_wait_for_a_slot_and_all_end_well() {
    let mut world = world(&[Nature::Honest; 3]);
    for n in 1..=12 {
        world.submit(usize::from(n % 3), spec(n, world.now, 20 * SECOND));
    }
    world.run_for(20 * SECOND);
    world.assert_settled(12);
    assert!(world.done.values().all(|(_, result)| result.is_ok()), "{:?}", world.done);
    let last = world.done.values().map(|(at, _)| *at).max().unwrap();
    assert!(last < Time::from_millis(4_000), "four rounds of 0.4 s took until {last}");
}

#[test]
fn the_window_closes_early_at_its_number_of_bids() {
    let config = BeaconConfig { close_at: 2, ..BeaconConfig::default() };
    let mut world = World::new(1, config, &[Nature::Honest; 6]);
    world.delay = (Duration::from_millis(1), Duration::from_millis(100));
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(10 * SECOND);
    let bids = world.events.iter().find_map(|(_, event)| match event.kind {
        JobEventKind::Elected { bids, .. } => Some(bids),
        _ => None,
    });
    assert_eq!(bids, Some(2));
    world.assert_settled(1);
}

#[test]
fn a_silent_candidate_holds_the_window_to_its_end_and_no_longer() {
    let mut world = world(&[Nature::Honest; 3]);
    world.crash_at(world.now, 2, false);
    world.submit_at(Time::from_millis(5), 0, spec(1, Time::from_millis(5), 10 * SECOND));
    world.run_for(10 * SECOND);
    let election = world.result(1).as_ref().unwrap().election;
    assert_eq!(election, BeaconConfig::default().window);
}

#[test]
fn the_window_learns_how_long_bids_take_over_long_links() {
    let mut world = world(&[Nature::Honest; 8]);
    world.asks_only(0);
    world.crash_at(world.now, 7, false);
    // A beacon and a bid take 50 to 130 ms each, and one candidate says nothing at all.
    world.delay = (Duration::from_millis(50), Duration::from_millis(130));
    for n in 1..=12 {
        world.submit(0, spec(n, world.now, 10 * SECOND));
        world.run_for(3 * SECOND);
    }
    let bids: Vec<usize> = world
        .events
        .iter()
        .filter_map(|(_, event)| match event.kind {
            JobEventKind::Elected { bids, .. } => Some(bids),
            _ => None,
        })
        .collect();
    assert!(bids[0] < 4, "the first window is over before most bids are there: {bids:?}");
    assert!(bids[4..].iter().all(|&bids| bids == 6), "then all six are compared: {bids:?}");
    let slowest = world.done.values().map(|(_, done)| done.as_ref().unwrap().election).max().unwrap();
    assert!(slowest <= BeaconConfig::default().window_max, "{slowest:?}");
    world.assert_settled(12);
}

#[test]
fn a_candidate_that_says_it_is_busy_does_not_hold_the_window() {
    let mut world = world(&[Nature::Honest; 4]);
    world.asks_only(0);
    world.asks_only(1);
    world.submit(1, spec(1, world.now, 10 * SECOND));
    world.run_for(Duration::from_millis(50));
    let busy = world.elected()[0].0;
    world.submit(0, spec(2, world.now, 10 * SECOND));
    world.run_for(10 * SECOND);
    let done = world.result(2).as_ref().unwrap();
    assert!(done.election < Duration::from_millis(10) && done.executor != busy, "{done:?}");
    // With every slot taken the first that comes free is used at once.
    for n in 3..=4 {
        world.submit(1, spec(n, world.now, 10 * SECOND));
    }
    world.run_for(Duration::from_millis(50));
    world.submit(0, spec(5, world.now, 10 * SECOND));
    world.run_for(10 * SECOND);
    let done = world.result(5).as_ref().unwrap();
    assert!(done.election < Duration::from_millis(500), "a run takes 480 ms at most: {:?}", done.election);
    world.assert_settled(5);
}

#[test]
fn the_match_decides_and_a_boast_does_not() {
    for rule in [SelectionRule::Score, SelectionRule::ScoreReputation, SelectionRule::Discounted] {
        let config = BeaconConfig { selection: rule, ..BeaconConfig::default() };
        let mut world = World::new(1, config, &[Nature::Honest, Nature::Boasts, Nature::Honest]);
        world.asks_only(0);
        let mut skilled = capability(1, 4096);
        skilled.skills = chorus_protocol::List::truncated([skill(&["math"], None)]);
        world.offer(2, 1, skilled);
        let requirement =
            Requirement { tags: chorus_protocol::List::truncated([Text::truncated("math")]), ..Requirement::default() };
        for n in 1..=20 {
            world.submit(0, JobSpec { requirement: requirement.clone(), ..spec(n, world.now, 5 * SECOND) });
            world.run_for(SECOND);
        }
        assert!(world.elected().iter().all(|(node, ..)| *node == id(3)), "{rule}: a bid raised its bidder");
        let told = world.events.iter().any(|(_, event)| {
            matches!(event.kind, JobEventKind::Bid { node, score, claimed } if node == id(2) && score == 0.0 && claimed > 1.0)
        });
        assert!(told, "both numbers are shown");
    }
}

#[test]
fn whoever_is_not_in_the_ledger_is_not_elected() {
    let mut world = world(&[Nature::Honest, Nature::Boasts]);
    world.asks_only(0);
    world.requester(0, RequesterInput::Capability { node: id(2), capability: None });
    // The requester must know somebody, or it does not ask at all.
    world.requester(0, RequesterInput::Capability { node: id(9), capability: Some(testing::shared(1)) });
    world.submit(0, spec(1, world.now, 3 * SECOND));
    world.run_for(5 * SECOND);
    assert!(world.elected().is_empty());
    assert!(matches!(world.result(1), Err(JobError::Deadline { .. })));
    world.assert_settled(1);
}

#[test]
fn nodes_to_avoid_are_passed_over_while_others_bid() {
    let mut world = world(&[Nature::Honest; 3]);
    let avoid = vec![id(1), id(2)];
    world.submit(0, JobSpec { avoid: avoid.clone(), ..spec(1, world.now, 10 * SECOND) });
    world.run_for(SECOND);
    assert_eq!(world.elected()[0].0, id(3));
    world.crash_at(world.now, 2, true);
    world.submit_at(world.now + SECOND, 0, JobSpec { avoid, ..spec(2, world.now, 10 * SECOND) });
    world.run_for(10 * SECOND);
    assert!(world.result(2).is_ok(), "avoiding is a wish, not a ban");
}

#[test]
fn a_customer_that_names_who_may_do_it_gets_nobody_else() {
    let mut world = world(&[Nature::Honest; 3]);
    let only = BTreeSet::from([id(3)]);
    world.submit(0, JobSpec { only: only.clone(), ..spec(1, world.now, 10 * SECOND) });
    world.run_for(SECOND);
    assert_eq!((world.elected()[0].0, world.elected().len()), (id(3), 1));
    world.crash_at(world.now, 2, true);
    world.submit_at(world.now + SECOND, 0, JobSpec { only, ..spec(2, world.now, 10 * SECOND) });
    world.run_for(20 * SECOND);
    assert!(world.result(2).is_err(), "two others could, and were not asked");
    world.assert_settled(2);
}

fn sampling(n: u8, now: Time, policy: &PolicyId) -> JobSpec {
    let requirement = Requirement { policy: Some(policy.clone()), ..Requirement::default() };
    let payload = Payload::sampling(policy.clone());
    JobSpec { kind: JobKind::Sample, requirement, payload, max_leases: 1, ..spec(n, now, 30 * SECOND) }
}

#[test]
fn a_lease_to_sample_takes_no_slot_of_an_answer_and_goes_to_who_offers_it() {
    let mut world = world(&[Nature::Honest; 3]);
    let policy = |name| PolicyId { owner: id(1), name: Text::truncated(name) };
    world.asks_only(0);
    let offer = SamplingOffer { slots: 8, price_milli: 0, policy: Some(policy("p")) };
    world.offer(1, 1, Capability { sampling: Some(offer), ..capability(1, 4096) });
    world.offer(2, 0, capability(0, 4096));
    world.run_time = 8 * SECOND;
    world.submit(0, sampling(1, world.now, &policy("p")));
    world.submit(0, spec(2, world.now, 30 * SECOND));
    world.submit(0, sampling(3, world.now, &policy("p")));
    world.submit(0, sampling(4, world.now, &policy("q")));
    world.run_for(4 * SECOND);
    let kinds: Vec<JobKind> = world.nodes[0].requester.leases().map(|lease| lease.kind).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == JobKind::Sample).count(), 1, "one slot for sampling: {kinds:?}");
    assert_eq!(kinds.len(), 2, "and the answer waits for none of it");
    assert!(matches!(world.result(4), Err(JobError::NobodyCan { reason }) if reason.contains('q')));
    world.run_for(30 * SECOND);
    assert!([1, 2, 3].iter().all(|n| world.result(*n).is_ok()), "the second lease comes when the first has ended");
    world.assert_settled(4);
}

#[test]
fn nobody_in_the_ledger_is_said_soon_and_says_what_is_missing() {
    let mut world = world(&[Nature::Honest; 2]);
    let requirement = Requirement { model: Some(Text::truncated("giant")), ..Requirement::default() };
    world.submit(0, JobSpec { requirement, ..spec(1, world.now, 60 * SECOND) });
    world.run_for(5 * SECOND);
    let Err(JobError::NobodyCan { reason }) = world.result(1) else { panic!("{:?}", world.done) };
    assert!(reason.contains("giant"));
    let (at, _) = world.done[&JobId::from_bytes([1; 16])];
    assert!(at <= Time::from_millis(2_100));
    assert!(!world.sent.contains_key("bid"), "nothing was announced");
}

#[test]
fn a_node_that_appears_within_the_grace_is_used() {
    let mut world = world(&[Nature::Honest; 2]);
    world.asks_only(0);
    world.asks_only(1);
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(SECOND);
    world.offer(1, 1, capability(1, 4096));
    world.run_for(10 * SECOND);
    assert!(world.result(1).is_ok());
}

#[test]
fn cancelling_stops_the_run_and_frees_the_slot() {
    let mut world = world(&[Nature::Honest; 3]);
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(Duration::from_millis(100));
    assert_eq!(world.nodes.iter().map(|node| node.executor.runs().count()).sum::<usize>(), 1);
    world.requester(0, RequesterInput::Cancel(JobId::from_bytes([1; 16])));
    assert_eq!(world.result(1).as_ref().map(|_| ()), Err(&JobError::Cancelled));
    world.run_for(Duration::from_millis(20));
    world.assert_settled(1);
}

#[test]
fn too_many_jobs_are_refused_at_the_counter() {
    let config = BeaconConfig { max_jobs: 2, ..BeaconConfig::default() };
    let mut world = World::new(1, config, &[Nature::Honest; 2]);
    for n in 1..=3 {
        world.submit(0, spec(n, world.now, 10 * SECOND));
    }
    assert_eq!(world.result(3).as_ref().map(|_| ()), Err(&JobError::Overloaded { limit: 2 }));
    // The same id again while it runs is the same job.
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(10 * SECOND);
    world.assert_settled(3);
}

#[test]
fn a_payload_too_large_for_a_lease_is_refused_before_anybody_is_asked() {
    let mut world = world(&[Nature::Honest; 2]);
    let mut job = spec(1, world.now, 10 * SECOND);
    let turn = chorus_protocol::job::Turn {
        role: chorus_protocol::job::Role::User,
        content: Text::new("x".repeat(131_000)).unwrap(),
    };
    job.payload.turns = chorus_protocol::List::truncated([turn.clone(), turn.clone(), turn]);
    world.submit(0, job);
    let Err(JobError::Refused(failure)) = world.result(1) else { panic!("{:?}", world.done) };
    assert!(failure.to_string().contains("shorten"), "{failure}");
    assert!(world.events.is_empty());
}

#[test]
fn clocks_that_differ_do_not_matter() {
    let mut world = world(&[Nature::Honest; 2]);
    world.asks_only(0);
    // The executor's clock is 25 s ahead, the job has 5 s: by wall clock it were over.
    world.nodes[1].skew_ms = 25_000;
    world.submit(0, spec(1, world.now, 5 * SECOND));
    world.run_for(5 * SECOND);
    assert!(world.result(1).is_ok(), "{:?}", world.done);
}

#[test]
fn status_can_name_what_is_waited_for() {
    let mut world = world(&[Nature::Honest; 2]);
    world.submit(0, spec(1, world.now, 10 * SECOND));
    world.run_for(Duration::from_millis(100));
    let job = world.nodes[0].requester.jobs().next().unwrap();
    assert!(job.waiting_for.contains(&id(1).fmt_short()), "{}", job.waiting_for);
}

#[test]
fn reputation_and_pace_follow_what_happened() {
    let mut world = world(&[Nature::Honest, Nature::Honest]);
    world.asks_only(0);
    for n in 1..=8 {
        world.submit(0, spec(n, world.now, 10 * SECOND));
        world.run_for(2 * SECOND);
    }
    let now = world.now;
    let standing = world.nodes[0].requester.standing(id(2), now);
    assert!(standing.mean() > 0.85 && standing.log_odds() > 1.7, "{standing:?}");
    // Promised: 4 tokens read at 500/s, 2 written at 50/s: 48 ms. Taken: 400 ms.
    assert!(standing.slowdown > 4.0 && standing.slowdown < 9.0, "{standing:?}");
}

/// Node 0 asks, all others work; the first `skilled` of them carry the tag that is asked for.
fn crowd(workers: usize, skilled: usize) -> (World, Requirement) {
    let mut world = world(&vec![Nature::Honest; workers + 1]);
    world.asks_only(0);
    let math = || chorus_protocol::List::truncated([Text::truncated("math")]);
    let mut capable = capability(1, 4096);
    capable.skills = chorus_protocol::List::truncated([skill(&["math"], None)]);
    for node in 1..=skilled {
        world.offer(node, 1, capable.clone());
    }
    (world, Requirement { tags: math(), ..Requirement::default() })
}

#[test]
fn a_small_swarm_is_asked_whole_and_of_a_large_one_the_best() {
    for (workers, skilled, bids) in [(24, 3, 24), (60, 24, 24), (60, 5, 24), (60, 40, 24)] {
        let (mut world, requirement) = crowd(workers, skilled);
        world.submit(0, JobSpec { requirement, ..spec(1, world.now, 10 * SECOND) });
        world.run_for(10 * SECOND);
        assert_eq!(world.sent.get("bid"), Some(&bids), "{skilled} of {workers}");
        assert_eq!(world.sent.get("busy"), None);
        let done = world.result(1).as_ref().unwrap();
        assert_eq!(done.leases, 1);
        assert!(done.score == 1.0 || skilled < 24, "all who were invited carry the tag");
        assert!(done.election < Duration::from_millis(20), "{:?}", done.election);
        world.assert_settled(1);
    }
}

#[test]
fn equals_are_invited_in_turn() {
    let (mut world, _) = crowd(60, 0);
    let mut bidders = BTreeSet::new();
    for n in 1..=8 {
        world.submit(0, spec(n, world.now, 5 * SECOND));
        world.run_for(SECOND);
    }
    bidders.extend(world.events.iter().filter_map(|(_, event)| match event.kind {
        JobEventKind::Bid { node, .. } => Some(node),
        _ => None,
    }));
    assert!(bidders.len() > 40, "eight draws of 24 among 60 leave out few: {}", bidders.len());
}

#[test]
fn when_the_invited_are_busy_or_silent_more_are_invited() {
    let (mut world, requirement) = crowd(60, 24);
    for n in 1..=24 {
        world.submit(0, JobSpec { requirement: requirement.clone(), ..spec(n, world.now, 10 * SECOND) });
        world.run_for(Duration::from_millis(8));
    }
    let job = JobSpec { requirement: requirement.clone(), ..spec(25, world.now, 10 * SECOND) };
    world.submit(0, job);
    world.run_for(10 * SECOND);
    let done = world.result(25).as_ref().unwrap();
    assert_eq!(done.score, 0.0, "all who carry the tag were busy");
    assert!(done.election < Duration::from_millis(30), "they said so: {:?}", done.election);
    // Now they are dead, and nobody knows.
    for node in 1..=24 {
        world.crash_at(world.now, node, false);
    }
    world.run_for(Duration::from_millis(1));
    world.submit(0, JobSpec { requirement, ..spec(26, world.now, 10 * SECOND) });
    world.run_for(10 * SECOND);
    let done = world.result(26).as_ref().unwrap();
    let most = BeaconConfig::default().window_max * 2;
    assert!(done.score == 0.0 && done.election < most, "{:?}", done.election);
    world.assert_settled(26);
}
