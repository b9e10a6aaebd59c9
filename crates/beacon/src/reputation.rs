//! What this node thinks of the others, from what it saw itself and, with reserve, from what others signed.
//!
//! There is no token and no global score: every node computes its own view.
//!
//! 1. **Track record.** Per executor a Beta posterior over "a lease ends in an accepted result". One's own observations weigh 1,
//!    fade with a half-life, and never exceed a fixed memory, so the newest always counts for a twentieth or more.
//! 2. **Witnesses.** Receipts of other requesters count a fraction each, are capped per requester, and their sum is capped again:
//!    neither one requester nor a crowd of invented ones can make or break anybody. A receipt on oneself counts nothing, nor does
//!    one whose inner half the executor did not sign.
//! 3. **Accusations** of misbehaviour elsewhere (a false rollout, say) count as a receipt with the verdict *invalid* by the accuser,
//!    under the same weight and caps. They are no more than their author's word, and cost it nothing: so they wait in no queue, in
//!    which they could stand in a receipt's way, have a table of their own, and make room for no record by pushing out another.
//! 4. **Pace.** The ratio of the time observed to the time that the capability's own numbers promise, as a geometric mean over
//!    the same evidence. Expected times are the claim times this ratio, so that a boast about speed lasts a few jobs at most.
//!
//! Receipts of others are verified only when somebody asks about their executor: most nodes never elect most others, and a
//! signature costs more than everything else here.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::beacon::{Verdict, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::{Hash, NetworkId, NodeId, Received, Verified, WallTime};

use crate::config::ReputationConfig;

/// Executors of whom a record is kept.
const MAX_RECORDS: usize = 8_192;
/// Requesters whose word on one executor is kept.
const MAX_WITNESSES: usize = 64;
/// Accusers of one executor whose word is kept, beside those that are witnesses too.
const MAX_ACCUSERS: usize = 16;
/// Pieces of evidence against one executor that this node itself has and remembers to have counted.
const MAX_EVIDENCE: usize = 8;
/// Unverified receipts kept per executor: this node's own from before its start, and everybody else's.
const MAX_PENDING: usize = 24;
/// What being overtaken by a rival weighs: it may have been about to finish.
const OVERTAKEN_WEIGHT: f64 = 0.5;
/// Bounds of the ratio of observed to promised time, for one observation.
const MAX_PACE: f64 = 64.0;

/// Evidence of one requester on one executor; all weights fade together.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    successes: f64,
    failures: f64,
    pace_weight: f64,
    /// Sum of the weighted logarithms of observed / promised time.
    pace: f64,
    at: Time,
}

impl Tally {
    fn fade(&mut self, now: Time, half_life: Duration) {
        let halvings = now.since(self.at).as_secs_f64() / half_life.as_secs_f64();
        self.scale((-halvings).exp2());
        self.at = now;
    }

    fn scale(&mut self, by: f64) {
        self.successes *= by;
        self.failures *= by;
        self.pace_weight *= by;
        self.pace *= by;
    }

    fn weight(&self) -> f64 {
        self.successes + self.failures
    }

    /// Adds one observation of `weight`, and fades the older ones so that the sum stays within `cap`.
    fn add(&mut self, sample: Sample, weight: f64, cap: f64) {
        let weight = weight.min(cap);
        let room = cap - weight;
        if self.weight() > room {
            self.scale(room / self.weight());
        }
        if sample.ok {
            self.successes += weight;
        } else {
            self.failures += weight;
        }
        if let Some(ratio) = sample.pace.filter(|ratio| ratio.is_finite() && *ratio > 0.0) {
            self.pace_weight += weight;
            self.pace += weight * ratio.clamp(1.0 / MAX_PACE, MAX_PACE).ln();
        }
    }
}

/// One outcome.
#[derive(Clone, Copy, Debug)]
struct Sample {
    ok: bool,
    pace: Option<f64>,
}

/// A receipt that nobody has checked yet.
#[derive(Clone, Debug)]
struct Pending {
    requester: NodeId,
    work: Received<Work>,
    verdict: Verdict,
    observed_ms: u32,
    /// How much it has faded since it was written.
    weight: f64,
}

#[derive(Debug, Default)]
struct Record {
    own: Tally,
    witnesses: BTreeMap<NodeId, Tally>,
    /// Those of whom nothing but accusations is known.
    accusers: BTreeMap<NodeId, Tally>,
    /// What this node accused it with.
    evidence: VecDeque<Hash>,
    pending_own: VecDeque<Pending>,
    pending_others: VecDeque<Pending>,
    touched: Time,
}

/// What is known of one executor, ready to be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Successes of the Beta posterior, prior included.
    pub successes: f64,
    /// Failures of the Beta posterior, prior included.
    pub failures: f64,
    /// Observed over promised time; 1 when nothing was observed.
    pub slowdown: f64,
}

impl Standing {
    /// Returns the posterior mean of the probability that a lease ends well, in (0, 1).
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.successes / (self.successes + self.failures)
    }

    /// Returns the logarithm of the odds that a lease ends well: the weight of its voice in a calibrated vote.
    #[must_use]
    pub fn log_odds(&self) -> f64 {
        (self.successes / self.failures).ln()
    }
}

/// The local, decaying view on everybody's track record.
#[derive(Debug)]
pub struct Reputation {
    config: ReputationConfig,
    network: NetworkId,
    me: NodeId,
    records: BTreeMap<NodeId, Record>,
}

impl Reputation {
    /// Makes an empty view.
    #[must_use]
    pub fn new(config: ReputationConfig, network: NetworkId, me: NodeId) -> Self {
        Self { config, network, me, records: BTreeMap::new() }
    }

    /// Records that a lease of this node ended in an accepted result. `pace` is observed over promised time, if known.
    pub fn succeeded(&mut self, executor: NodeId, now: Time, pace: Option<f64>) {
        self.observe(executor, now, Sample { ok: true, pace });
    }

    /// Records that a lease of this node failed by the executor's fault: a crash, silence, a broken engine, a false result.
    pub fn failed(&mut self, executor: NodeId, now: Time) {
        self.observe(executor, now, Sample { ok: false, pace: None });
    }

    /// Records that an overdue executor was overtaken by a rival: half a failure, and at least this slow.
    pub fn overtaken(&mut self, executor: NodeId, now: Time, pace: f64) {
        let ReputationConfig { half_life, memory, .. } = self.config;
        let record = self.record(executor, now);
        record.own.fade(now, half_life);
        record.own.add(Sample { ok: false, pace: Some(pace) }, OVERTAKEN_WEIGHT, memory);
    }

    fn observe(&mut self, executor: NodeId, now: Time, sample: Sample) {
        let ReputationConfig { half_life, memory, .. } = self.config;
        let record = self.record(executor, now);
        record.own.fade(now, half_life);
        record.own.add(sample, 1.0, memory);
    }

    /// Takes note of a receipt from the ledger. Its inner signature is checked when the executor's standing is asked for.
    pub fn witness(&mut self, entry: &Verified<Entry>, now: Time, wall: WallTime) {
        let Body::Receipt(receipt) = &entry.body else { return };
        let (requester, executor) = (entry.author(), receipt.work.claimed_author());
        if requester == executor {
            return;
        }
        let weight = self.freshness(entry, wall);
        let pending = Pending {
            requester,
            work: receipt.work.clone(),
            verdict: receipt.verdict,
            observed_ms: receipt.observed_ms,
            weight,
        };
        let own = requester == self.me;
        let record = self.record(executor, now);
        let queue = if own { &mut record.pending_own } else { &mut record.pending_others };
        if queue.len() >= MAX_PENDING {
            queue.pop_front();
        }
        queue.push_back(pending);
    }

    /// Takes note of an accusation from the ledger: it counts as an invalid result that the accuser reports. This node's own counts
    /// as seen by itself, each piece of evidence once.
    pub fn accused(&mut self, entry: &Verified<Entry>, now: Time, wall: WallTime) {
        let Body::Misbehaviour(accusation) = &entry.body else { return };
        let (accuser, accused) = (entry.author(), accusation.accused);
        let no_room = self.records.len() >= MAX_RECORDS && !self.records.contains_key(&accused);
        if accuser == accused || no_room {
            return;
        }
        let (config, own, weight) = (self.config, accuser == self.me, self.freshness(entry, wall));
        let record = self.record(accused, now);
        let sample = Sample { ok: false, pace: None };
        if !own {
            let tally = record.accuser(accuser);
            tally.fade(now, config.half_life);
            tally.add(sample, weight, config.witness_cap);
        } else if !record.evidence.contains(&accusation.evidence) {
            if record.evidence.len() >= MAX_EVIDENCE {
                record.evidence.pop_front();
            }
            record.evidence.push_back(accusation.evidence);
            record.own.fade(now, config.half_life);
            record.own.add(sample, weight, config.memory);
        }
    }

    /// Returns how much of an entry's weight has not faded since it was written.
    fn freshness(&self, entry: &Entry, wall: WallTime) -> f64 {
        let age = wall.since(entry.wall_time).as_secs_f64() / self.config.half_life.as_secs_f64();
        (-age).exp2()
    }

    /// Returns what is known of an executor at `now`. `capability` is what its pace is measured against.
    pub fn standing(&mut self, executor: NodeId, capability: Option<&Capability>, now: Time) -> Standing {
        let config = self.config;
        let Some(record) = self.records.get_mut(&executor) else {
            return Standing { successes: config.prior_successes, failures: config.prior_failures, slowdown: 1.0 };
        };
        record.settle(executor, &self.network, &config, capability, now);
        let mut sum = record.own;
        sum.fade(now, config.half_life);
        let crowd = record.crowd(&config, now);
        Standing {
            successes: config.prior_successes + sum.successes + crowd.successes,
            failures: config.prior_failures + sum.failures + crowd.failures,
            // One observation's worth of belief in the claim itself.
            slowdown: ((sum.pace + crowd.pace) / (sum.pace_weight + crowd.pace_weight + 1.0)).exp(),
        }
    }

    /// Returns how many executors have a record.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Returns whether nobody has a record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    fn record(&mut self, executor: NodeId, now: Time) -> &mut Record {
        if self.records.len() >= MAX_RECORDS && !self.records.contains_key(&executor) {
            // What this node saw itself is the last to go.
            let least = self.records.iter().min_by_key(|(_, r)| (r.own.weight() > 0.0, r.touched)).map(|(id, _)| *id);
            if let Some(least) = least {
                self.records.remove(&least);
            }
        }
        let record = self.records.entry(executor).or_default();
        record.touched = now;
        record
    }
}

impl Record {
    /// Verifies the receipts that wait and counts them.
    fn settle(
        &mut self,
        executor: NodeId,
        network: &NetworkId,
        config: &ReputationConfig,
        capability: Option<&Capability>,
        now: Time,
    ) {
        for pending in self.pending_own.drain(..) {
            if let Some(sample) = pending.sample(executor, network, capability) {
                self.own.fade(now, config.half_life);
                self.own.add(sample, pending.weight, config.memory);
            }
        }
        for pending in self.pending_others.drain(..) {
            let Some(sample) = pending.sample(executor, network, capability) else { continue };
            if self.witnesses.len() >= MAX_WITNESSES && !self.witnesses.contains_key(&pending.requester) {
                let least = self.witnesses.iter().min_by_key(|(_, tally)| tally.at).map(|(id, _)| *id);
                if let Some(least) = least {
                    self.witnesses.remove(&least);
                }
            }
            // One cap for all that one node says.
            let accused = self.accusers.remove(&pending.requester).unwrap_or_default();
            let tally = self.witnesses.entry(pending.requester).or_insert(accused);
            tally.fade(now, config.half_life);
            tally.add(sample, pending.weight, config.witness_cap);
        }
    }

    /// Returns where the accusations of a node are added up.
    fn accuser(&mut self, accuser: NodeId) -> &mut Tally {
        if self.witnesses.contains_key(&accuser) {
            return self.witnesses.entry(accuser).or_default();
        }
        if self.accusers.len() >= MAX_ACCUSERS && !self.accusers.contains_key(&accuser) {
            let least = self.accusers.iter().min_by_key(|(_, tally)| tally.at).map(|(id, _)| *id);
            if let Some(least) = least {
                self.accusers.remove(&least);
            }
        }
        self.accusers.entry(accuser).or_default()
    }

    /// Returns what all other requesters say together, discounted and capped.
    fn crowd(&self, config: &ReputationConfig, now: Time) -> Tally {
        let mut sum = Tally { at: now, ..Tally::default() };
        for tally in self.witnesses.values().chain(self.accusers.values()) {
            let mut tally = *tally;
            tally.fade(now, config.half_life);
            sum.successes += tally.successes;
            sum.failures += tally.failures;
            sum.pace += tally.pace;
            sum.pace_weight += tally.pace_weight;
        }
        sum.scale(config.witness_weight);
        if sum.weight() > config.crowd_cap {
            sum.scale(config.crowd_cap / sum.weight());
        }
        sum
    }
}

impl Pending {
    /// Returns what the receipt says, or `None` when it says nothing about the executor's merit, or is not what it claims.
    fn sample(&self, executor: NodeId, network: &NetworkId, capability: Option<&Capability>) -> Option<Sample> {
        let work = self.work.clone().verify(network).ok()?;
        if work.author() != executor || work.requester != self.requester {
            return None;
        }
        match self.verdict {
            Verdict::Accepted if work.failure.is_none() => {
                let observed = Duration::from_millis(u64::from(self.observed_ms));
                let pace = capability.and_then(|c| promised(c, &work)).and_then(|promised| pace(observed, promised));
                Some(Sample { ok: true, pace })
            }
            Verdict::Failed if work.failure.as_ref().is_some_and(|f| f.is_executors_fault()) => {
                Some(Sample { ok: false, pace: None })
            }
            Verdict::Invalid => Some(Sample { ok: false, pace: None }),
            Verdict::Accepted | Verdict::Failed | Verdict::Superseded => None,
        }
    }
}

/// Returns the time that a capability's own numbers promise for work of that many tokens.
#[must_use]
pub fn promised(capability: &Capability, work: &Work) -> Option<Duration> {
    let model = capability.models.iter().find(|offer| offer.fingerprint == work.model)?;
    let decode = model.decode.tokens_per_s();
    if decode <= 0.0 {
        return None;
    }
    let prefill = model.prefill.tokens_per_s().max(decode);
    let seconds = f64::from(work.prompt_tokens) / prefill + f64::from(work.completion_tokens) / decode;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Returns observed over promised time; `None` when nothing was promised.
#[must_use]
pub fn pace(observed: Duration, promised: Duration) -> Option<f64> {
    (!promised.is_zero()).then(|| observed.as_secs_f64() / promised.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use chorus_protocol::JobId;
    use chorus_protocol::beacon::Receipt;
    use chorus_protocol::job::{Failure, JobKind};
    use chorus_protocol::misbehaviour::{Charge, Misbehaviour};
    use chorus_protocol::policy::{PolicyId, Version};

    use super::*;
    use crate::testing::{capability, id, key, network};

    const NOW: Time = Time::from_millis(1_000_000);
    const WALL: WallTime = WallTime::from_millis(1_700_000_000_000);

    fn view() -> Reputation {
        Reputation::new(ReputationConfig::default(), network(), id(1))
    }

    /// A receipt of requester `r` on executor `e`, whose inner half `signer` signed.
    fn receipt(r: u8, e: u8, signer: u8, verdict: Verdict, observed_ms: u32) -> Verified<Entry> {
        let failed = verdict == Verdict::Failed;
        let work = Work {
            job: JobId::from_bytes([observed_ms.to_le_bytes()[0]; 16]),
            requester: id(r),
            fence: 1,
            kind: JobKind::Answer,
            requirement: Hash::ZERO,
            output: Hash::ZERO,
            model: Hash::from_bytes([7; 32]),
            prompt_tokens: 500,
            completion_tokens: 50,
            elapsed_ms: observed_ms,
            failure: failed.then(|| Failure::Engine(Default::default())),
        };
        let work = Verified::sign(&key(signer), &network(), work).unwrap().to_wire();
        let _ = e;
        let body = Body::Receipt(Box::new(Receipt { work, verdict, observed_ms }));
        let entry = Entry { seq: 1, prev: Hash::ZERO, wall_time: WALL, expires: WALL, body };
        Verified::sign(&key(r), &network(), entry).unwrap()
    }

    fn mean(view: &mut Reputation, node: NodeId, now: Time) -> f64 {
        view.standing(node, Some(&capability(1, 4096)), now).mean()
    }

    #[test]
    fn own_outcomes_move_it_and_time_takes_it_back() {
        let mut view = view();
        let fresh = mean(&mut view, id(2), NOW);
        for _ in 0..10 {
            view.failed(id(2), NOW);
        }
        let low = mean(&mut view, id(2), NOW);
        assert!(low < 0.2, "{low}");
        let later = NOW + ReputationConfig::default().half_life * 10;
        assert!((mean(&mut view, id(2), later) - fresh).abs() < 0.01);
    }

    #[test]
    fn a_long_good_record_does_not_hide_a_fall() {
        let mut view = view();
        for _ in 0..1_000 {
            view.succeeded(id(2), NOW, None);
        }
        assert!(mean(&mut view, id(2), NOW) > 0.94);
        for _ in 0..20 {
            view.failed(id(2), NOW);
        }
        assert!(mean(&mut view, id(2), NOW) < 0.45);
    }

    #[test]
    fn a_crowd_of_invented_requesters_moves_nobody_further_than_its_cap() {
        let cap = ReputationConfig::default().crowd_cap;
        let mut view = view();
        for _ in 0..20 {
            view.succeeded(id(2), NOW, None);
        }
        let before = view.standing(id(2), None, NOW);
        for r in 10..110 {
            for n in 0..10 {
                view.witness(&receipt(r, 2, 2, Verdict::Invalid, n), NOW, WALL);
            }
            view.standing(id(2), None, NOW);
        }
        let after = view.standing(id(2), None, NOW);
        assert!(after.failures - before.failures <= cap + 1e-9);
        assert!(after.mean() > 0.8, "{}", after.mean());
    }

    #[test]
    fn one_requester_counts_no_more_than_its_cap() {
        let config = ReputationConfig::default();
        let mut view = view();
        for n in 0..200 {
            view.witness(&receipt(10, 2, 2, Verdict::Failed, n), NOW, WALL);
            view.standing(id(2), None, NOW);
        }
        let after = view.standing(id(2), None, NOW);
        let moved = after.failures - config.prior_failures;
        assert!(moved > 0.0 && moved <= config.witness_cap * config.witness_weight + 1e-9, "{moved}");
    }

    #[test]
    fn self_dealing_and_unsigned_halves_count_nothing() {
        let mut view = view();
        let fresh = view.standing(id(2), None, NOW);
        view.witness(&receipt(2, 2, 2, Verdict::Accepted, 1), NOW, WALL);
        assert!(view.is_empty(), "a receipt on oneself is not even kept");
        // The entry says requester 10, the inner half names requester 11.
        let stolen = receipt(11, 2, 2, Verdict::Accepted, 1);
        let Body::Receipt(inner) = &stolen.body else { unreachable!() };
        let entry =
            Entry { seq: 1, prev: Hash::ZERO, wall_time: WALL, expires: WALL, body: Body::Receipt(inner.clone()) };
        view.witness(&Verified::sign(&key(10), &network(), entry).unwrap(), NOW, WALL);
        assert_eq!(view.standing(id(2), None, NOW), fresh);
    }

    /// Accusation `n` of node `e` by node `r`.
    fn accusation(r: u8, e: u8, n: u8) -> Verified<Entry> {
        let body = Body::Misbehaviour(Box::new(Misbehaviour {
            accused: id(e),
            policy: PolicyId { owner: id(r), name: Default::default() },
            version: Version::default(),
            charge: Charge::WrongReward,
            evidence: Hash::from_bytes([n; 32]),
            evidence_bytes: 1,
        }));
        let entry = Entry { seq: 1, prev: Hash::ZERO, wall_time: WALL, expires: WALL, body };
        Verified::sign(&key(r), &network(), entry).unwrap()
    }

    #[test]
    fn an_accusation_counts_as_an_invalid_result_and_one_accuser_no_more_than_its_cap() {
        let config = ReputationConfig::default();
        let (mut told, mut seen) = (view(), view());
        told.accused(&accusation(10, 2, 0), NOW, WALL);
        seen.witness(&receipt(10, 2, 2, Verdict::Invalid, 1), NOW, WALL);
        assert_eq!(told.standing(id(2), None, NOW), seen.standing(id(2), None, NOW));
        for n in 0..100 {
            told.accused(&accusation(10, 2, n), NOW, WALL);
            told.witness(&receipt(10, 2, 2, Verdict::Invalid, u32::from(n)), NOW, WALL);
        }
        let moved = told.standing(id(2), None, NOW).failures - config.prior_failures;
        assert!(
            moved <= config.witness_cap * config.witness_weight + 1e-9,
            "accusations and receipts share it: {moved}"
        );
    }

    #[test]
    fn a_crowd_of_accusers_moves_nobody_further_than_its_cap_and_silences_no_witness() {
        let config = ReputationConfig::default();
        let mut view = view();
        for r in 10..14 {
            view.witness(&receipt(r, 2, 2, Verdict::Accepted, 1), NOW, WALL);
        }
        for r in 20..220 {
            view.accused(&accusation(r, 2, 0), NOW, WALL);
        }
        let after = view.standing(id(2), None, NOW);
        assert!(after.failures - config.prior_failures <= config.crowd_cap + 1e-9, "{after:?}");
        assert!(after.successes > config.prior_successes, "the witnesses are still heard: {after:?}");
        assert_eq!(view.records[&id(2)].accusers.len(), MAX_ACCUSERS);
    }

    #[test]
    fn an_own_accusation_counts_in_full_and_once() {
        let mut view = view();
        for _ in 0..3 {
            view.accused(&accusation(1, 2, 7), NOW, WALL);
        }
        view.accused(&accusation(2, 2, 1), NOW, WALL);
        let standing = view.standing(id(2), None, NOW);
        assert!((standing.failures - ReputationConfig::default().prior_failures - 1.0).abs() < 1e-9, "{standing:?}");
        view.accused(&accusation(1, 2, 8), NOW, WALL);
        assert!(view.standing(id(2), None, NOW).failures > standing.failures, "other evidence is another fault");
    }

    #[test]
    fn a_boast_about_speed_lasts_a_few_jobs() {
        let mut view = view();
        // Promised: 500 / 500 + 50 / 50 = 2 s. Observed: 16 s.
        let node = capability(1, 4096);
        for n in 0..3 {
            view.witness(&receipt(10, 2, 2, Verdict::Accepted, 16_000 + n), NOW, WALL);
        }
        let told = view.standing(id(2), Some(&node), NOW).slowdown;
        assert!(told > 1.5 && told < 4.0, "strangers are heard with reserve: {told}");
        for _ in 0..5 {
            view.succeeded(id(2), NOW, Some(8.0));
        }
        let seen = view.standing(id(2), Some(&node), NOW).slowdown;
        assert!(seen > 5.0 && seen <= 8.0, "{seen}");
    }

    #[test]
    fn own_receipts_from_before_a_restart_count_in_full() {
        let mut view = view();
        for n in 0..5 {
            view.witness(&receipt(1, 2, 2, Verdict::Failed, n), NOW, WALL);
        }
        let standing = view.standing(id(2), None, NOW);
        assert!((standing.failures - 6.0).abs() < 1e-9, "{standing:?}");
    }

    #[test]
    fn records_are_bounded_and_own_ones_stay() {
        let mut view = view();
        view.failed(id(2), Time::ZERO);
        let half = receipt(3, 4, 4, Verdict::Accepted, 1);
        for n in 0..(MAX_RECORDS + 10) as u64 {
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&n.to_le_bytes());
            seed[31] = 0xee;
            let node = chorus_protocol::SecretKey::from_bytes(&seed).node_id();
            view.record(node, NOW);
        }
        view.witness(&half, NOW, WALL);
        assert!(view.len() <= MAX_RECORDS);
        assert!(view.records.contains_key(&id(2)));
    }
}
