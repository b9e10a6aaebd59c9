//! Both machines against peers that send anything at any time, much of it nearly right.
//!
//! Messages are drawn as recipes and made while the machines run, so that they name real beacons, real leases and real salts, and
//! differ from what an honest peer would send in one place or in none.

use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Bid, Lease, Work};
use chorus_protocol::bounded::Text;
use chorus_protocol::job::{Failure, JobKind, Payload};
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, Hash, JobId, NodeId, Received, Signable, Verified, WallTime};
use proptest::prelude::*;

use crate::audit::LeaseAudit;
use crate::testing::{id, key, network, output, payload, shared, spec};
use crate::*;

const SECOND: Duration = Duration::from_secs(1);
const WALL: u64 = 1_700_000_000_000;
/// Ways in which a result can be wrong; 0 is right.
const FLAWS: u8 = 12;

/// A message, as far as it can be drawn beforehand.
#[derive(Clone, Debug)]
enum Recipe {
    Bid { signer: u8, to: u8, numbers: (u16, u16, u16, u32, u32) },
    Busy { free_in_ms: u32 },
    Release,
    Grant { signer: u8, executor: u8, job: u8, fence: u64, deadline: u64 },
    Accept,
    Refuse { failure: Failure, withdraw: bool },
    Progress { index: u32, tokens: u32 },
    Outcome { flaw: u8, failure: Option<Failure> },
    Cancel,
}

#[derive(Clone, Debug)]
struct Step {
    /// Who sends it: the holder of the lease that is meant, or somebody.
    holder: bool,
    node: u8,
    /// Which of the beacons or leases so far is meant, counted from the newest.
    back: usize,
    recipe: Recipe,
    wait_ms: u64,
}

/// A lease as it went out.
#[derive(Clone, Debug)]
struct Granted {
    to: NodeId,
    job: JobId,
    fence: u64,
    requirement: Hash,
    payload: Payload,
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

fn recipe() -> impl Strategy<Value = Recipe> {
    prop_oneof![
        4 => (1u8..6, 1u8..3, any::<(u16, u16, u16, u32, u32)>())
            .prop_map(|(signer, to, numbers)| Recipe::Bid { signer, to, numbers }),
        2 => any::<u32>().prop_map(|free_in_ms| Recipe::Busy { free_in_ms }),
        1 => Just(Recipe::Release),
        3 => (1u8..4, 1u8..4, 1u8..4, 0u64..5, prop_oneof![Just(0), Just(u64::MAX), Just(WALL + 60_000)])
            .prop_map(|(signer, executor, job, fence, deadline)| Recipe::Grant { signer, executor, job, fence, deadline }),
        2 => Just(Recipe::Accept),
        1 => (failure(), any::<bool>()).prop_map(|(failure, withdraw)| Recipe::Refuse { failure, withdraw }),
        2 => any::<(u32, u32)>().prop_map(|(index, tokens)| Recipe::Progress { index, tokens }),
        3 => (0..FLAWS, prop::option::weighted(0.2, failure()))
            .prop_map(|(flaw, failure)| Recipe::Outcome { flaw, failure }),
        1 => Just(Recipe::Cancel),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    (any::<bool>(), 1u8..6, 0usize..4, recipe(), prop_oneof![4 => 0u64..50, 1 => 0u64..3_000])
        .prop_map(|(holder, node, back, recipe, wait_ms)| Step { holder, node, back, recipe, wait_ms })
}

fn signed<T: Signable>(by: u8, value: T) -> Received<T> {
    Verified::sign(&key(by), &network(), value).unwrap().to_wire()
}

fn number_of(node: NodeId) -> u8 {
    (1..10).find(|n| id(*n) == node).unwrap()
}

/// The two machines of node 1, and what they let out so far.
#[derive(Debug)]
struct Siege {
    now: Time,
    rng: Rng,
    requester: Requester,
    executor: Executor,
    audit: LeaseAudit,
    beacons: Vec<BeaconId>,
    granted: Vec<Granted>,
    ended: usize,
    accepted: usize,
}

impl Siege {
    fn new(seed: u64) -> Self {
        let config = BeaconConfig::default;
        let mut siege = Self {
            now: Time::from_millis(1),
            rng: Rng::from_u64(seed),
            requester: Requester::new(config(), network(), key(1)),
            executor: Executor::new(config(), network(), key(1)),
            audit: LeaseAudit::default(),
            beacons: Vec::new(),
            granted: Vec::new(),
            ended: 0,
            accepted: 0,
        };
        siege.executor(ExecutorInput::Offer { capability: shared(2), slots: 2 });
        // Nodes 1 to 3 can; 4 is quarantined; 5 is not in the ledger.
        siege.requester(RequesterInput::Quarantined { node: id(4) });
        for n in 1..5 {
            siege.requester(RequesterInput::Capability { node: id(n), capability: Some(shared(2)) });
        }
        for n in 1..4 {
            siege.requester(RequesterInput::Submit(Box::new(spec(n, siege.now, 20 * SECOND))));
        }
        siege
    }

    fn cx<'a>(now: Time, rng: &'a mut Rng) -> Ctx<'a> {
        Ctx { now, wall: WallTime::from_millis(WALL + now.as_nanos() / 1_000_000), rng }
    }

    fn requester(&mut self, input: RequesterInput) {
        let mut out = Outbox::new();
        self.audit.input(&input);
        self.requester.handle(&mut Self::cx(self.now, &mut self.rng), input, &mut out);
        self.note(&mut out);
    }

    fn executor(&mut self, input: ExecutorInput) {
        let mut out = Outbox::new();
        self.executor.handle(&mut Self::cx(self.now, &mut self.rng), input, &mut out);
        assert!(self.executor.runs().count() + self.executor.reserved() <= self.executor.slots());
        // Its engine is as quick as can be with every other run, and never done with the others.
        let run = |effect| match effect {
            ExecutorEffect::Run { run, .. } if run.fence % 2 == 0 => Some(run),
            _ => None,
        };
        for run in out.drain().filter_map(run).collect::<Vec<_>>() {
            self.executor(ExecutorInput::Done { run, result: Ok(output("4")) });
        }
    }

    fn note(&mut self, out: &mut Outbox<RequesterEffect>) {
        for effect in out.drain() {
            self.audit.effect(&effect, self.now).unwrap();
            match effect {
                RequesterEffect::Publish(beacon) => self.beacons.push(beacon.id),
                RequesterEffect::Send { to, message: Direct::Grant { lease, payload } } => {
                    assert!(to != id(4) && to != id(5), "a lease for somebody who must not have one");
                    let lease = lease.verify(&network()).unwrap();
                    let (job, fence, requirement) = (lease.job, lease.fence, lease.requirement);
                    self.granted.push(Granted { to, job, fence, requirement, payload: *payload });
                }
                RequesterEffect::Done { result, .. } => {
                    self.ended += 1;
                    self.accepted += usize::from(result.is_ok());
                }
                _ => {}
            }
        }
    }

    /// Lets time pass, and both machines do what falls due, when it falls due.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..100_000 {
            let due = chorus_machine::earliest(self.requester.deadline(), self.executor.deadline());
            let Some(due) = due.filter(|due| *due <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(due);
            let (mut asked, mut worked) = (Outbox::new(), Outbox::new());
            self.requester.expire(&mut Self::cx(self.now, &mut self.rng), &mut asked);
            self.executor.expire(&mut Self::cx(self.now, &mut self.rng), &mut worked);
            self.note(&mut asked);
        }
        panic!("time stands still at {}", self.now);
    }

    /// Makes the message and lets both machines have it. Returns whether it was a result that must not be taken.
    fn deliver(&mut self, step: Step) -> bool {
        let beacon = nth_newest(&self.beacons, step.back).copied().unwrap_or_default();
        let lease = nth_newest(&self.granted, step.back).cloned().unwrap_or(Granted {
            to: id(2),
            job: JobId::from_bytes([1; 16]),
            fence: 1,
            requirement: Hash::ZERO,
            payload: payload(true),
        });
        let from = if step.holder { lease.to } else { id(step.node) };
        let (job, fence) = (lease.job, lease.fence);
        let mut false_result = false;
        let message = match step.recipe {
            Recipe::Bid { signer, to, numbers } => {
                Direct::Bid(bid(if step.holder { step.node } else { signer }, to, beacon, numbers))
            }
            Recipe::Busy { free_in_ms } => Direct::Busy { beacon, free_in_ms },
            Recipe::Release => Direct::Release { beacon },
            Recipe::Grant { signer, executor, job, fence, deadline } => grant(signer, executor, job, fence, deadline),
            Recipe::Accept => Direct::Accept { job, fence },
            Recipe::Refuse { failure, withdraw } => {
                Direct::Refuse { job, fence: if withdraw { 0 } else { fence }, failure }
            }
            Recipe::Progress { index, tokens } => Direct::Progress { job, fence, index, tokens, text: Text::default() },
            Recipe::Outcome { flaw, failure } => {
                false_result = flaw != 0 || failure.is_some() || from != lease.to;
                outcome(&lease, flaw, failure)
            }
            Recipe::Cancel => Direct::Cancel { job, fence },
        };
        let from = if matches!(message, Direct::Bid(_)) { id(step.node) } else { from };
        self.executor(ExecutorInput::Direct { from, message: message.clone() });
        self.requester(RequesterInput::Direct { from, message });
        false_result
    }
}

fn nth_newest<T>(items: &[T], back: usize) -> Option<&T> {
    items.iter().rev().nth(back)
}

fn bid(signer: u8, to: u8, beacon: BeaconId, n: (u16, u16, u16, u32, u32)) -> Received<Bid> {
    let (score_milli, active, slots, expected_ms, hold_ms) = n;
    signed(signer, Bid { beacon, requester: id(to), score_milli, active, slots, expected_ms, hold_ms })
}

fn grant(signer: u8, executor: u8, job: u8, fence: u64, deadline: u64) -> Direct {
    let lease = Lease {
        job: JobId::from_bytes([job; 16]),
        beacon: BeaconId::default(),
        executor: id(executor),
        fence,
        kind: JobKind::Answer,
        requirement: Hash::ZERO,
        deadline: WallTime::from_millis(deadline),
    };
    Direct::Grant { lease: signed(signer, lease), payload: Box::new(payload(true)) }
}

/// A result under a lease, right but for one flaw.
fn outcome(lease: &Granted, flaw: u8, failure: Option<Failure>) -> Direct {
    let mut text = output("4");
    let mut work = Work {
        job: lease.job,
        requester: id(1),
        fence: lease.fence,
        kind: JobKind::Answer,
        requirement: lease.requirement,
        output: text.digest(&lease.payload.salt),
        model: text.model,
        prompt_tokens: text.prompt_tokens,
        completion_tokens: text.completion_tokens,
        elapsed_ms: 5,
        failure: None,
    };
    let (mut signer, mut fence) = (number_of(lease.to), lease.fence);
    match flaw {
        1 => text.text = Text::truncated("5"),
        2 => work.job = JobId::from_bytes([77; 16]),
        3 => work.requester = id(2),
        4 => work.fence += 1,
        5 => work.requirement = Hash::ZERO,
        6 => work.model = Hash::ZERO,
        7 => work.completion_tokens += 1,
        8 => signer = 5,
        9 => fence += 1,
        10 => work.kind = JobKind::Plan,
        11 => work.failure = Some(Failure::Busy),
        _ => {}
    }
    let result = match failure {
        None => Ok(Box::new(text)),
        Some(failure) => {
            (work.output, work.failure) = (Hash::ZERO, Some(failure.clone()));
            Err(failure)
        }
    };
    Direct::Outcome { job: lease.job, fence, result, work: signed(signer, work) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any message of anybody is handled without a panic; leases and tokens stay sound (the audit sees to it); only a flawless result
    /// of the holder is taken; and every job still ends once.
    #[test]
    fn nothing_that_peers_send_breaks_either_machine(steps in prop::collection::vec(step(), 0..150), seed in any::<u64>()) {
        let mut siege = Siege::new(seed);
        for step in steps {
            siege.pass(Duration::from_millis(step.wait_ms));
            let before = siege.accepted;
            let shown = format!("{step:?}");
            let false_result = siege.deliver(step);
            prop_assert!(!false_result || siege.accepted == before, "a false result was taken: {}", shown);
        }
        siege.pass(60 * SECOND);
        prop_assert_eq!(siege.ended, 3);
        prop_assert_eq!(siege.requester.deadline(), None);
        // Runs of forged but well-signed leases may last for a day; leaving frees their slots at once.
        siege.executor(ExecutorInput::Drain);
        prop_assert_eq!(siege.executor.free(), 2);
    }
}

/// The recipes do reach what they are meant to reach.
#[test]
fn a_flawless_result_is_taken_and_each_flaw_is_not() {
    for flaw in 0..FLAWS {
        let mut siege = Siege::new(1);
        let step = |recipe| Step { holder: true, node: 2, back: 0, recipe, wait_ms: 0 };
        siege.deliver(step(Recipe::Bid { signer: 2, to: 1, numbers: (1_000, 0, 2, 5, 1_000) }));
        siege.pass(Duration::from_millis(200));
        assert_eq!(siege.granted.len(), 1, "the window has closed");
        siege.deliver(step(Recipe::Outcome { flaw, failure: None }));
        assert_eq!(siege.accepted, usize::from(flaw == 0), "flaw {flaw}");
    }
}

/// An election that was opened for a rival must not outlive the lease that made it needless.
#[test]
fn a_bench_an_open_election_and_a_lost_lease_never_make_three_leases() {
    let mut siege = Siege::new(1);
    siege.requester(RequesterInput::Capability { node: id(6), capability: Some(shared(2)) });
    let bid = |siege: &mut Siege, node: u8, beacon: usize| {
        let back = siege.beacons.len() - 1 - beacon;
        let recipe = Recipe::Bid { signer: node, to: 1, numbers: (1_000, 0, 2, 5, 1_000) };
        siege.deliver(Step { holder: false, node, back, recipe, wait_ms: 0 });
    };
    let answer = |siege: &mut Siege, recipe| {
        siege.deliver(Step { holder: true, node: 2, back: 0, recipe, wait_ms: 0 });
    };
    // The third job's beacon is number 2, its call for a rival number 3.
    bid(&mut siege, 2, 2);
    siege.pass(Duration::from_millis(200));
    answer(&mut siege, Recipe::Accept);
    siege.pass(Duration::from_millis(1_400));
    assert_eq!((siege.granted.len(), siege.beacons.len()), (1, 4), "it is overdue, and a rival is sought");
    // A late bid to the first beacon fills the bench; then the lease is lost.
    bid(&mut siege, 3, 2);
    answer(&mut siege, Recipe::Refuse { failure: Failure::Engine(Text::default()), withdraw: false });
    assert_eq!(siege.granted.len(), 2, "the bench steps in");
    answer(&mut siege, Recipe::Accept);
    // The next one is overdue too, and gets its rival from the bench; then somebody answers the old call for a rival.
    bid(&mut siege, 1, 2);
    siege.pass(Duration::from_millis(1_500));
    assert_eq!(siege.granted.len(), 3);
    bid(&mut siege, 6, 3);
    siege.pass(Duration::from_millis(300));
    let job = JobId::from_bytes([3; 16]);
    let leases: Vec<LeaseView> = siege.requester.leases().filter(|lease| lease.job == job).collect();
    assert_eq!((leases.len(), siege.granted.len()), (2, 3));
}

/// `Busy` shortens the wait for those who said it and for nobody else, and takes nobody's right to bid.
#[test]
fn a_busy_answer_counts_once_for_a_candidate_and_never_for_a_stranger() {
    let mut siege = Siege::new(1);
    let say = |siege: &mut Siege, node: u8, recipe| {
        siege.deliver(Step { holder: false, node, back: 0, recipe, wait_ms: 0 });
    };
    let busy = Recipe::Busy { free_in_ms: 0 };
    let bid = |node| Recipe::Bid { signer: node, to: 1, numbers: (1_000, 0, 2, 5, 1_000) };
    // Nodes 1, 2 and 3 are candidates. A quarantined one and one that is not in the ledger say it, and one says it twice.
    for node in [4, 5, 2, 2] {
        say(&mut siege, node, busy.clone());
    }
    say(&mut siege, 3, bid(3));
    assert!(siege.granted.is_empty(), "node 1 has not answered");
    say(&mut siege, 1, busy.clone());
    assert_eq!(siege.granted.iter().map(|lease| lease.to).collect::<Vec<_>>(), [id(3)], "now all have");
    // After its bid, `Busy` takes nothing back; after `Busy`, a bid counts, and wins at once where all others are busy.
    let mut siege = Siege::new(1);
    say(&mut siege, 2, bid(2));
    say(&mut siege, 2, busy.clone());
    siege.pass(Duration::from_millis(200));
    assert_eq!(siege.granted.len(), 1);
    let mut siege = Siege::new(1);
    for node in 1..4 {
        say(&mut siege, node, busy.clone());
    }
    siege.pass(Duration::from_millis(20));
    say(&mut siege, 2, bid(2));
    assert_eq!(siege.granted.iter().map(|lease| lease.to).collect::<Vec<_>>(), [id(2)]);
}

/// What comes too late costs no signature check, and is answered with a release.
#[test]
fn bids_that_cannot_win_are_turned_away_unverified() {
    let mut siege = Siege::new(1);
    let forged = |siege: &mut Siege, from: u8, beacon: BeaconId| {
        // Node 9 signed it, whoever sends it.
        let message = Direct::Bid(bid(9, 1, beacon, (1_000, 0, 2, 5, 1_000)));
        let mut out = Outbox::new();
        let input = RequesterInput::Direct { from: id(from), message };
        siege.requester.handle(&mut Siege::cx(siege.now, &mut siege.rng), input, &mut out);
        out.drain()
            .map(|effect| match effect {
                RequesterEffect::Send { to, message } => format!("{} to {}", message.kind(), number_of(to)),
                RequesterEffect::Penalise { peer, .. } => format!("penalty for {}", number_of(peer)),
                other => format!("{other:?}"),
            })
            .collect::<Vec<_>>()
    };
    let open = siege.beacons[0];
    assert_eq!(forged(&mut siege, 2, open), ["penalty for 2"], "a bid to an open election is verified");
    assert_eq!(forged(&mut siege, 2, BeaconId::from_bytes([7; 16])), ["release to 2"], "nobody announced that");
    for node in 1..4 {
        siege.deliver(Step {
            holder: false,
            node,
            back: siege.beacons.len() - 1,
            recipe: Recipe::Bid { signer: node, to: 1, numbers: (1_000, 0, 2, 5, 1_000) },
            wait_ms: 0,
        });
    }
    assert_eq!(siege.granted.len(), 1, "all candidates have bid");
    assert_eq!(forged(&mut siege, 5, open), ["release to 5"], "it is decided, and a stranger is no candidate");
}
