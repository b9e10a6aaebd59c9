//! What a run showed: figures, the bounds they are held against, and how to run it again.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chorus_core::{TaskAnswer, Topic};
use chorus_machine::Time;
use chorus_protocol::memo::Tally;
use serde::Serialize;

use crate::invariant::Violation;
use crate::world::World;

/// What every figure of the simulator must be read with.
pub const CAVEATS: [&str; 3] = [
    "gossip is a model (hop by hop over a random graph, no IHAVE repair, no time spent in a node) with the connections, the mesh and \
     the copies that swarms of 20 and 50 real nodes had; see crates/sim/src/gossip.rs",
    "network, disk, embedder and engine are models; ledger, beacon, scheduler and their router are the shipped code",
    "every frame is encoded and decoded; a record that was verified once is not verified again (`chorus_protocol::memo`)",
];

/// Elections of a requester after which its bid window should have found its length.
const FIRST_ELECTIONS: usize = 3;

/// How one entry spreads.
#[derive(Clone, Copy, Debug)]
struct Spread {
    published: Time,
    audience: u64,
    accepted: u64,
    reached99: Option<Duration>,
}

/// Everything that is counted while a world runs.
#[derive(Debug, Default)]
pub struct Stats {
    pub(crate) looks: u64,
    pub(crate) records: Tally,
    pub(crate) turns: u64,
    pub(crate) most_effects: u64,
    pub(crate) gossip_copies: u64,
    pub(crate) gossip_deliveries: u64,
    pub(crate) gossip_ignored: u64,
    pub(crate) gossip_rejected: u64,
    pub(crate) direct_frames: u64,
    pub(crate) sends_failed: u64,
    pub(crate) penalties: u64,
    pub(crate) penalties_honest: u64,
    pub(crate) frames_too_large: u64,
    pub(crate) appends_failed: u64,
    pub(crate) crashes: u64,
    pub(crate) engine_crashes: u64,
    pub(crate) attacks: u64,
    pub(crate) tasks_asked: u64,
    pub(crate) tasks_died: u64,
    tasks_answered: u64,
    tasks_failed: BTreeMap<&'static str, u64>,
    elections_ms: Vec<f64>,
    tasks_ms: Vec<f64>,
    spreads: BTreeMap<u32, Spread>,
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

impl Stats {
    pub(crate) fn task_done(&mut self, answer: Option<&TaskAnswer>, error: Option<&'static str>) {
        if let Some(answer) = answer {
            self.tasks_answered += 1;
            self.tasks_ms.push(ms(answer.elapsed));
            let steps = answer.chains.iter().flat_map(|chain| &chain.steps);
            self.elections_ms.extend(steps.map(|step| ms(step.election)));
        }
        if let Some(kind) = error {
            *self.tasks_failed.entry(kind).or_default() += 1;
        }
    }

    pub(crate) fn published(&mut self, frame: u32, topic: Topic, running: u64, honest: bool, now: Time) {
        if topic == Topic::Ledger && honest && running > 1 {
            let spread = Spread { published: now, audience: running - 1, accepted: 0, reached99: None };
            self.spreads.insert(frame, spread);
        }
    }

    pub(crate) fn accepted(&mut self, frame: u32, now: Time) {
        if let Some(spread) = self.spreads.get_mut(&frame) {
            spread.accepted += 1;
            if spread.reached99.is_none() && spread.accepted * 100 >= spread.audience * 99 {
                spread.reached99 = Some(now - spread.published);
            }
        }
    }

    /// Entries published after `from`: how many, how many reached 99 % of the running nodes by gossip alone, and how fast.
    fn spread_after(&self, from: Time) -> (u64, Vec<f64>) {
        let late = self.spreads.values().filter(|spread| spread.published >= from);
        (late.clone().count() as u64, late.filter_map(|spread| spread.reached99).map(ms).collect())
    }
}

/// Median, 99th percentile and greatest of a set of figures.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// How many figures.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

impl Quantiles {
    /// Returns the quantiles of `figures` (nearest rank).
    #[must_use]
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (figures.len() * percent).div_ceil(100).max(1);
            figures.get(rank - 1).copied().unwrap_or(0.0)
        };
        Self { count: figures.len() as u64, p50: rank(50), p99: rank(99), max: rank(100) }
    }
}

/// What a run showed.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// Its seed in this run.
    pub seed: u64,
    /// Nodes, adversaries included.
    pub nodes: u32,
    /// Of these, adversaries.
    pub adversaries: u32,
    /// Virtual seconds simulated.
    pub virtual_s: f64,
    /// Events that happened.
    pub events: u64,
    /// Turns that nodes took.
    pub turns: u64,
    /// Hash over all events in order.
    pub trace: String,
    /// Tasks asked, answered, failed by kind of error, and ended with the process that asked.
    pub tasks_asked: u64,
    /// See `tasks_asked`.
    pub tasks_answered: u64,
    /// See `tasks_asked`.
    pub tasks_failed: BTreeMap<&'static str, u64>,
    /// See `tasks_asked`.
    pub tasks_died: u64,
    /// Share of tasks with an answer, among those whose requester lived.
    pub completed: f64,
    /// Milliseconds from question to answer.
    pub task_ms: Quantiles,
    /// Jobs announced by honest requesters.
    pub jobs: u64,
    /// Of these, ended with an accepted result.
    pub jobs_accepted: u64,
    /// Milliseconds from a job's submission to its first lease.
    pub election_ms: Quantiles,
    /// Bids compared in an election, in the mean: in the first few of each requester, and in its later ones.
    pub bids_at_first: f64,
    /// See `bids_at_first`.
    pub bids_later: f64,
    /// Leases granted by honest requesters, hedges included.
    pub leases: u64,
    /// Of these, hedges.
    pub hedges: u64,
    /// Of these, lost before a result came.
    pub leases_lost: u64,
    /// Share of leases that went to adversaries.
    pub adversary_leases: f64,
    /// Results that came under a token that no longer stood; none was accepted.
    pub stale_refused: u64,
    /// Milliseconds from the last change until all honest running nodes held equal ledgers; absent if they never did.
    pub converge_ms: Option<f64>,
    /// Entries in an honest ledger at the end.
    pub ledger_entries: u64,
    /// Milliseconds until 99 % of the running nodes had an entry by gossip, over entries published once the swarm stood.
    pub spread99_ms: Quantiles,
    /// Entries over which that was measured, those that gossip alone did not bring to 99 % included.
    pub spread_entries: u64,
    /// Bytes that a node sent, in the mean: in all, and by purpose.
    pub bytes_per_node: u64,
    /// Gossip's part, every copy counted.
    pub gossip_bytes_per_node: u64,
    /// Reconciliation's part.
    pub sync_bytes_per_node: u64,
    /// The part of bids, leases and results.
    pub job_bytes_per_node: u64,
    /// The most that one node sent.
    pub bytes_max: u64,
    /// Gossiped frames that nodes were given, and copies that were sent for it.
    pub gossip_deliveries: u64,
    /// See `gossip_deliveries`.
    pub gossip_copies: u64,
    /// Frames on which the verdict was to ignore, and to reject.
    pub gossip_ignored: u64,
    /// See `gossip_ignored`.
    pub gossip_rejected: u64,
    /// Direct frames sent, and those that could not be delivered.
    pub direct_frames: u64,
    /// See `direct_frames`.
    pub sends_failed: u64,
    /// Penalties that honest nodes asked for against adversaries, and against each other.
    pub penalties: u64,
    /// See `penalties`.
    pub penalties_honest: u64,
    /// Processes killed, engines broken, attacks made.
    pub crashes: u64,
    /// See `crashes`.
    pub engine_crashes: u64,
    /// See `crashes`.
    pub attacks: u64,
    /// Own entries that could not be written.
    pub appends_failed: u64,
    /// Records whose signature was verified, and how often one of them came again and was recognised.
    pub records_verified: u64,
    /// See `records_verified`.
    pub records_recognised: u64,
    /// The invariant that did not hold.
    pub violation: Option<String>,
    /// Bounds of the scenario that did not hold.
    pub missed: Vec<String>,
    /// The line that runs it again.
    pub again: String,
    /// What the figures must be read with.
    pub caveats: [&'static str; 3],
}

/// A run that is over.
#[derive(Debug)]
pub struct Outcome {
    /// What it showed.
    pub report: Report,
    /// The invariant that did not hold.
    pub violation: Option<Violation>,
    /// Events of tasks in words, if they were watched.
    pub watched: Vec<String>,
}

impl Outcome {
    pub(crate) fn of(world: &mut World, (events, trace): (u64, String)) -> Self {
        let violation = world.monitor.violation().cloned();
        let mut report = figures(world, events, trace);
        report.violation = violation.as_ref().map(ToString::to_string);
        report.missed = missed(world, &report);
        Self { report, violation, watched: world.watched.take().unwrap_or_default() }
    }

    /// Returns whether every invariant and every bound held.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.violation.is_none() && self.report.missed.is_empty()
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of a simulation are far below 2^52")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}

#[allow(clippy::cast_precision_loss, reason = "bids are few")]
fn mean<'a>(bids: impl Iterator<Item = &'a usize> + Clone) -> f64 {
    bids.clone().sum::<usize>() as f64 / bids.count().max(1) as f64
}

fn figures(world: &World, events: u64, trace: String) -> Report {
    let (stats, monitor) = (&world.stats, &world.monitor);
    let nodes = u64::from(world.scenario.nodes).max(1);
    let sum = |part: fn(&crate::host::Traffic) -> u64| {
        world.hosts.iter().map(|host| part(&host.traffic)).sum::<u64>() / nodes
    };
    let (spread_entries, spreads) = stats.spread_after(world.settled_at());
    let an_honest_node = world.hosts.iter().find(|host| host.is_honest() && host.is_up());
    let name = &world.scenario.name;
    Report {
        scenario: name.clone(),
        seed: world.seed,
        nodes: world.scenario.nodes,
        adversaries: world.scenario.adversaries.iter().map(|group| group.count).sum(),
        virtual_s: (world.now - Time::ZERO).as_secs_f64(),
        events,
        turns: stats.turns,
        trace,
        tasks_asked: stats.tasks_asked,
        tasks_answered: stats.tasks_answered,
        tasks_failed: stats.tasks_failed.clone(),
        tasks_died: stats.tasks_died,
        completed: share(stats.tasks_answered, stats.tasks_asked - stats.tasks_died),
        task_ms: Quantiles::of(stats.tasks_ms.clone()),
        jobs: monitor.jobs.len() as u64,
        jobs_accepted: monitor.jobs_accepted(),
        election_ms: Quantiles::of(stats.elections_ms.clone()),
        bids_at_first: mean(monitor.bids.values().flat_map(|bids| bids.iter().take(FIRST_ELECTIONS))),
        bids_later: mean(monitor.bids.values().flat_map(|bids| bids.iter().skip(FIRST_ELECTIONS))),
        leases: monitor.leases_granted,
        hedges: monitor.hedges,
        leases_lost: monitor.leases_lost,
        adversary_leases: share(monitor.leases_to_adversaries, monitor.leases_granted.max(1)),
        stale_refused: monitor.stale_refused,
        converge_ms: world.convergence().map(ms),
        ledger_entries: an_honest_node.and_then(|host| host.node.as_ref()).map_or(0, |node| node.ledger().len() as u64),
        spread99_ms: Quantiles::of(spreads),
        spread_entries,
        bytes_per_node: sum(crate::host::Traffic::total),
        gossip_bytes_per_node: sum(|traffic| traffic.gossip),
        sync_bytes_per_node: sum(|traffic| traffic.sync),
        job_bytes_per_node: sum(|traffic| traffic.jobs),
        bytes_max: world.hosts.iter().map(|host| host.traffic.total()).max().unwrap_or(0),
        gossip_deliveries: stats.gossip_deliveries,
        gossip_copies: stats.gossip_copies,
        gossip_ignored: stats.gossip_ignored,
        gossip_rejected: stats.gossip_rejected,
        direct_frames: stats.direct_frames,
        sends_failed: stats.sends_failed,
        penalties: stats.penalties,
        penalties_honest: stats.penalties_honest,
        crashes: stats.crashes,
        engine_crashes: stats.engine_crashes,
        attacks: stats.attacks,
        appends_failed: stats.appends_failed,
        records_verified: stats.records.misses,
        records_recognised: stats.records.hits,
        violation: None,
        missed: Vec::new(),
        again: format!("chorus-sim run {name} --seed {}", world.seed),
        caveats: CAVEATS,
    }
}

/// Returns the bounds that did not hold, in words.
fn missed(world: &World, report: &Report) -> Vec<String> {
    let bounds = &world.scenario.bounds;
    let mut missed = Vec::new();
    let mut at_most = |what: &str, figure: f64, bound: Option<f64>| {
        if let Some(bound) = bound.filter(|bound| figure > *bound) {
            missed.push(format!("{what} is {figure:.1}, and {bound:.1} is the most"));
        }
    };
    at_most("election_p50_ms", report.election_ms.p50, bounds.election_p50_ms);
    at_most("election_p99_ms", report.election_ms.p99, bounds.election_p99_ms);
    at_most("adversary_leases", report.adversary_leases, bounds.adversary_leases);
    #[allow(clippy::cast_precision_loss, reason = "bytes of a simulation are far below 2^52")]
    at_most("bytes_per_node", report.bytes_per_node as f64, bounds.bytes_per_node.map(|bytes| bytes as f64));
    #[allow(clippy::cast_precision_loss, reason = "a bound of milliseconds")]
    at_most("converge_ms", report.converge_ms.unwrap_or(f64::INFINITY), bounds.converge_ms.map(|ms| ms as f64));
    if let Some(bound) = bounds.spread99_ms {
        // An entry that gossip alone did not bring to 99 % took for ever, as far as this bound goes.
        let lost = report.spread_entries - report.spread99_ms.count;
        let figure = if lost > report.spread_entries / 2 { f64::INFINITY } else { report.spread99_ms.p50 };
        at_most("spread99_ms", figure, Some(bound));
    }
    if let Some(bound) = bounds.bids.filter(|bound| report.bids_later < *bound) {
        missed.push(format!("bids is {:.1}, and {bound:.1} is the least", report.bids_later));
    }
    if let Some(bound) = bounds.completed.filter(|bound| report.completed < *bound) {
        missed.push(format!("completed is {:.3}, and {bound:.3} is the least", report.completed));
    }
    if let Some(bound) = bounds.stale_refused.filter(|bound| report.stale_refused < *bound) {
        missed.push(format!("stale_refused is {}, and {bound} is the least", report.stale_refused));
    }
    if bounds.quarantined && world.unconvicted() > 0 {
        missed.push(format!("{} convictions of equivocators are missing", world.unconvicted()));
    }
    missed
}

impl Report {
    /// What was asked and what came of it.
    fn fmt_work(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tasks_asked: asked, tasks_answered: answered, tasks_died: died, tasks_failed: failed, .. } = self;
        let completed = self.completed * 100.0;
        writeln!(
            f,
            "  tasks      {asked} asked, {answered} answered, {died} died with their requester, failed {failed:?}"
        )?;
        writeln!(f, "  completed  {completed:.1} % of the tasks whose requester lived")?;
        writeln!(f, "  answer     {}", self.task_ms)?;
        writeln!(f, "  election   {}", self.election_ms)?;
        writeln!(f, "             {:.1} bids compared at first, {:.1} later", self.bids_at_first, self.bids_later)?;
        let Self { leases, jobs, jobs_accepted, hedges, leases_lost: lost, stale_refused: stale, .. } = self;
        writeln!(f, "  leases     {leases} for {jobs} jobs ({jobs_accepted} accepted), {hedges} hedges, {lost} lost")?;
        let share = self.adversary_leases * 100.0;
        writeln!(f, "             {share:.1} % to adversaries, {stale} stale results refused")
    }

    /// What it took, and what went wrong.
    fn fmt_traffic(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let converged = self.converge_ms.map_or("never".to_owned(), |ms| format!("{ms:.0} ms after the last change"));
        writeln!(f, "  ledgers    {} entries, equal {converged}", self.ledger_entries)?;
        writeln!(f, "  spread     99 % by gossip, {} entries: {}", self.spread_entries, self.spread99_ms)?;
        let (all, most) = (self.bytes_per_node, self.bytes_max);
        let (gossip, sync, jobs) = (self.gossip_bytes_per_node, self.sync_bytes_per_node, self.job_bytes_per_node);
        writeln!(f, "  bytes/node {all} (gossip {gossip}, sync {sync}, jobs {jobs}), most {most}")?;
        let Self {
            gossip_deliveries: given, gossip_copies: copies, direct_frames: direct, sends_failed: failed, ..
        } = self;
        let (ignored, rejected) = (self.gossip_ignored, self.gossip_rejected);
        writeln!(
            f,
            "  frames     {given} gossip deliveries of {copies} copies ({ignored} ignored, {rejected} rejected)"
        )?;
        writeln!(f, "             {direct} direct ({failed} failed)")?;
        let Self { crashes, engine_crashes: engines, attacks, penalties, penalties_honest, appends_failed, .. } = self;
        writeln!(
            f,
            "  trouble    {crashes} crashes, {engines} engine crashes, {attacks} attacks, {appends_failed} appends failed"
        )?;
        writeln!(f, "             {penalties} penalties for adversaries, {penalties_honest} between honest nodes")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scenario, seed, nodes, adversaries, virtual_s, events, turns, .. } = self;
        writeln!(f, "{scenario} · seed {seed} · {nodes} nodes ({adversaries} adversaries) · {virtual_s:.1} virtual s")?;
        self.fmt_work(f)?;
        self.fmt_traffic(f)?;
        writeln!(f, "  trace      {events} events, {turns} turns, {}", self.trace.get(..16).unwrap_or(&self.trace))?;
        let (verified, recognised) = (self.records_verified, self.records_recognised);
        writeln!(f, "  signatures {verified} records verified, {recognised} recognised as verified before")?;
        for caveat in self.caveats {
            writeln!(f, "  note       {caveat}")?;
        }
        if let Some(violation) = &self.violation {
            writeln!(f, "  VIOLATION  {violation}\n  again with {}", self.again)?;
        }
        for missed in &self.missed {
            writeln!(f, "  MISSED     {missed}\n  again with {}", self.again)?;
        }
        Ok(())
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms of {}", self.p50, self.p99, self.max, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let q = Quantiles::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((q.count, q.p50, q.p99, q.max), (200, 100.0, 198.0, 200.0));
        let none = Quantiles::of(Vec::new());
        assert_eq!((none.count, none.max), (0, 0.0));
    }
}
