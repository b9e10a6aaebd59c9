#![allow(clippy::unwrap_used)]

use chorus_machine::Rng;
use chorus_protocol::{SecretKey, Text, WallTime};
use proptest::prelude::*;

use super::*;

fn id(n: u8) -> NodeId {
    SecretKey::from_bytes(&[n; 32]).node_id()
}

fn policy() -> PolicyId {
    PolicyId { owner: id(200), name: Text::truncated("p") }
}

fn offer(price_milli: u32) -> Option<SamplingOffer> {
    Some(SamplingOffer { slots: 4, price_milli, policy: None })
}

/// A trainer's hiring, and a clock.
struct Office {
    hiring: Hiring,
    now: Time,
    rng: Rng,
}

impl Office {
    fn new() -> Self {
        let hiring = Hiring::new(HiringConfig::default(), policy());
        Self { hiring, now: Time::from_millis(1), rng: Rng::from_u64(1) }
    }

    fn tell(&mut self, input: HiringInput) -> Vec<HiringEffect> {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(1), rng: &mut self.rng };
        self.hiring.handle(&mut cx, input, &mut out);
        out.drain().collect()
    }

    /// Lets time pass to the next deadline.
    fn wait(&mut self) -> Vec<HiringEffect> {
        self.now = self.hiring.deadline().expect("something is waited for").max(self.now);
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(1), rng: &mut self.rng };
        self.hiring.expire(&mut cx, &mut out);
        out.drain().collect()
    }

    /// Has a node offer itself, and take the lease that it is handed.
    fn hire(&mut self, n: u8, price_milli: u32) -> JobId {
        let effects = self.tell(HiringInput::Offer { node: id(n), offer: offer(price_milli) });
        let job = submitted(&effects)[0].0;
        assert_eq!(self.tell(HiringInput::Started(job)), [HiringEffect::Hired(id(n))]);
        job
    }

    fn measure(&mut self, needed: f64, tracks: &[(u8, f64)]) -> Vec<HiringEffect> {
        let track = |&(n, rate): &(u8, f64)| Track { node: id(n), rate: Some(rate), reliability: 1.0 };
        self.tell(HiringInput::Measured { needed: Some(needed), tracks: tracks.iter().map(track).collect() })
    }
}

fn submitted(effects: &[HiringEffect]) -> Vec<(JobId, NodeId)> {
    let one = |effect: &HiringEffect| match effect {
        HiringEffect::Submit { job, node, .. } => Some((*job, *node)),
        _ => None,
    };
    effects.iter().filter_map(one).collect()
}

#[test]
fn whoever_asks_for_nothing_is_hired_and_term_after_term() {
    let mut office = Office::new();
    let job = office.hire(1, 0);
    office.now = office.now + Duration::from_secs(58);
    let effects = office.tell(HiringInput::Ended { job, served: true });
    assert_eq!(effects[0], HiringEffect::Dismissed(id(1)));
    let again = submitted(&effects);
    assert!(again.len() == 1 && again[0].0 != job, "the next term is another job");
    // Much more than is needed does not matter: it costs nothing.
    office.tell(HiringInput::Started(again[0].0));
    assert!(office.measure(1.0, &[(1, 1000.0)]).is_empty());
    let more = office.tell(HiringInput::Offer { node: id(2), offer: offer(0) });
    assert_eq!(submitted(&more).len(), 1);
}

#[test]
fn of_those_with_a_price_the_dear_ones_are_not_asked_again() {
    let mut office = Office::new();
    let jobs: Vec<JobId> = [(1, 1_000), (2, 5_000), (3, 2_000)].map(|(n, price)| office.hire(n, price)).into();
    office.now = office.now + Duration::from_secs(50);
    // Two of them do what is needed, with the margin.
    assert!(office.measure(16.0, &[(1, 10.0), (2, 10.0), (3, 10.0)]).is_empty(), "a lease that runs is left to run");
    let ends = |office: &mut Office, at: usize| {
        let effects = office.tell(HiringInput::Ended { job: jobs[at], served: true });
        submitted(&effects).into_iter().map(|(_, node)| node).collect::<Vec<_>>()
    };
    assert_eq!(ends(&mut office, 1), [], "it is the dearest");
    assert_eq!(ends(&mut office, 0), [id(1)]);
    assert_eq!(ends(&mut office, 2), [id(3)]);
    // One is lost: now the dear one is wanted.
    let effects = office.tell(HiringInput::Bar(id(3)));
    assert!(matches!(effects[0], HiringEffect::Withdraw(_)), "{effects:?}");
    assert_eq!(submitted(&effects).into_iter().map(|(_, node)| node).collect::<Vec<_>>(), [id(2)]);
    let effects = office.tell(HiringInput::Offer { node: id(3), offer: offer(0) });
    assert!(effects.is_empty(), "who is barred is not hired for nothing either");
}

#[test]
fn who_does_not_answer_is_left_alone_for_longer_each_time_and_another_takes_its_place() {
    let mut office = Office::new();
    office.measure(10.0, &[]);
    let first = submitted(&office.tell(HiringInput::Offer { node: id(1), offer: offer(1_000) }));
    office.measure(3.0, &[]);
    assert!(submitted(&office.tell(HiringInput::Offer { node: id(2), offer: offer(2_000) })).is_empty());
    let effects = office.wait();
    assert_eq!(effects[0], HiringEffect::Withdraw(first[0].0), "nobody waits for it longer than for an answer");
    assert_eq!(submitted(&effects)[0].1, id(2));
    // It says no more than that it is away, so nobody was dismissed.
    assert!(!effects.contains(&HiringEffect::Dismissed(id(1))));
    let mut office = Office::new();
    let mut waits = Vec::new();
    let mut job = submitted(&office.tell(HiringInput::Offer { node: id(1), offer: offer(0) }))[0].0;
    for _ in 0..10 {
        assert!(submitted(&office.tell(HiringInput::Ended { job, served: false })).is_empty());
        let began = office.now;
        job = submitted(&office.wait())[0].0;
        waits.push(office.now.since(began));
    }
    assert_eq!(
        (waits[0], waits[1], waits[9]),
        (Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(60))
    );
}

#[test]
fn a_lease_is_given_up_when_nobody_tells_of_its_end() {
    let mut office = Office::new();
    let job = office.hire(1, 0);
    let effects = office.wait();
    assert_eq!(effects, [HiringEffect::Withdraw(job), HiringEffect::Dismissed(id(1))]);
    assert_eq!(office.now, Time::from_millis(1) + Duration::from_secs(65));
}

#[test]
fn who_leaves_is_forgotten_when_its_lease_ends_and_a_stranger_to_the_policy_is_never_asked() {
    let mut office = Office::new();
    let job = office.hire(1, 0);
    assert!(office.tell(HiringInput::Offer { node: id(1), offer: None }).is_empty());
    assert_eq!(office.tell(HiringInput::Ended { job, served: false }), [HiringEffect::Dismissed(id(1))]);
    assert_eq!((office.hiring.view().count(), office.hiring.deadline()), (0, None));
    let other = PolicyId { owner: id(9), name: Text::truncated("p") };
    let only = Some(SamplingOffer { slots: 4, price_milli: 0, policy: Some(other) });
    assert!(office.tell(HiringInput::Offer { node: id(2), offer: only }).is_empty());
}

#[test]
fn when_the_run_ends_everybody_is_let_go() {
    let mut office = Office::new();
    let (a, b) = (office.hire(1, 0), office.hire(2, 7));
    let effects = office.tell(HiringInput::Close);
    for (job, n) in [(a, 1), (b, 2)] {
        assert!(effects.contains(&HiringEffect::Withdraw(job)) && effects.contains(&HiringEffect::Dismissed(id(n))));
    }
    assert!(office.tell(HiringInput::Offer { node: id(3), offer: offer(0) }).is_empty());
    assert_eq!(office.hiring.deadline(), None);
}

proptest! {
    /// Whatever happens: at most one lease a node, as many as are allowed, `Hired` and `Dismissed` in turn, and no deadline that has
    /// passed and brings nothing.
    #[test]
    fn nobody_is_hired_twice_and_nothing_spins(
        steps in prop::collection::vec((0u8..7, 1u8..6, 0u32..3, 0u64..20_000), 1..200),
    ) {
        let mut office = Office::new();
        office.hiring.cfg.most = 3;
        let (mut open, mut hired) = (BTreeMap::<JobId, NodeId>::new(), BTreeSet::<NodeId>::new());
        for (what, n, price, ms) in steps {
            office.now = office.now + Duration::from_millis(ms);
            let job = open.keys().nth(usize::from(n) % open.len().max(1)).copied().unwrap_or_default();
            let input = match what {
                0 => HiringInput::Offer { node: id(n), offer: offer(price * 1_000) },
                1 => HiringInput::Offer { node: id(n), offer: None },
                2 => HiringInput::Started(job),
                3 | 4 => HiringInput::Ended { job, served: what == 3 },
                5 if price == 2 => HiringInput::Bar(id(n)),
                _ => HiringInput::Measured {
                    needed: (price > 0).then(|| f64::from(price) * 10.0),
                    tracks: vec![Track { node: id(n), rate: Some(f64::from(n)), reliability: 0.9 }],
                },
            };
            if matches!(input, HiringInput::Ended { .. }) {
                open.remove(&job);
            }
            let mut effects = office.tell(input);
            if office.hiring.deadline().is_some_and(|at| at <= office.now) {
                effects.extend(office.wait());
                prop_assert!(office.hiring.deadline().is_none_or(|at| at > office.now), "it spins");
            }
            for effect in effects {
                match effect {
                    HiringEffect::Submit { job, node, .. } => {
                        prop_assert!(open.values().all(|other| *other != node), "two leases for one");
                        open.insert(job, node);
                    }
                    HiringEffect::Withdraw(job) => { open.remove(&job); }
                    HiringEffect::Hired(node) => prop_assert!(hired.insert(node)),
                    HiringEffect::Dismissed(node) => prop_assert!(hired.remove(&node)),
                }
            }
            prop_assert!(open.len() <= 3);
        }
    }
}
