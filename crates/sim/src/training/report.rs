//! What a training run showed: figures, the bounds they are held against, and how to run it again.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::rollout::Refusal;
use chorus_rollout::buffer::Batch;
use serde::Serialize;

use super::invariant::Violation;
use super::world::World;
use crate::report::Quantiles;

/// What every figure must be read with.
pub const CAVEATS: [&str; 3] = [
    "links, disks, engines and the learner are models; buffer, samplers and broadcast are the shipped machines",
    "uplinks are shared pipes without priorities; downlinks are not limited",
    "every message is encoded and decoded; a manifest that was verified once is not verified again (`chorus_protocol::memo`)",
];
/// A version that was published so long before the end has no excuse for not having arrived.
const TRAVELS: Duration = Duration::from_secs(10);

/// How one version spreads.
#[derive(Clone, Copy, Debug)]
struct Spread {
    published: Time,
    audience: u64,
    holders: u64,
    reached99: Option<Duration>,
}

/// Everything that is counted while a world runs, besides what became of rollouts.
#[derive(Debug, Default)]
pub(super) struct Stats {
    pub(super) turns: u64,
    pub(super) messages: u64,
    pub(super) lost_messages: u64,
    pub(super) crashes: u64,
    pub(super) frame_bytes: u64,
    pub(super) tokens: u64,
    pub(super) owner_chunks: u64,
    pub(super) kept_over_crash: u64,
    /// What samplers gave up, by reason: begun or not.
    pub(super) given_up: BTreeMap<Refusal, u64>,
    batches: u64,
    lags: Vec<u64>,
    idle_since: Option<Time>,
    idle: Duration,
    spreads: BTreeMap<u64, Spread>,
}

impl Stats {
    /// The learner has nothing to do.
    pub(super) fn idle_from(&mut self, now: Time) {
        self.idle_since.get_or_insert(now);
    }

    /// It has.
    pub(super) fn idle_until(&mut self, now: Time) {
        self.idle += self.idle_since.take().map_or(Duration::ZERO, |since| now - since);
    }

    pub(super) fn learned(&mut self, batch: &Batch) {
        self.batches += 1;
        for (_, lag, _) in batch.groups.iter().flat_map(|group| &group.rollouts) {
            let lag = usize::try_from(*lag).unwrap_or(usize::MAX).min(64);
            self.lags.resize(self.lags.len().max(lag + 1), 0);
            self.lags[lag] += 1;
        }
    }

    pub(super) fn published(&mut self, step: u64, now: Time, audience: u64) {
        let spread = Spread { published: now, audience, holders: 0, reached99: None };
        self.spreads.entry(step).or_insert(spread);
    }

    /// A sampler that had no newer version than of step `before` has one of `step`.
    pub(super) fn arrived(&mut self, before: Option<u64>, step: u64, now: Time) {
        let first = before.map_or(0, |before| before + 1);
        for (_, spread) in self.spreads.range_mut(first..=step.max(first)).filter(|(at, _)| **at <= step) {
            spread.holders += 1;
            if spread.reached99.is_none() && spread.holders * 100 >= spread.audience * 99 {
                spread.reached99 = Some(now - spread.published);
            }
        }
    }
}

/// What a training run showed.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// Its seed in this run.
    pub seed: u64,
    /// Samplers.
    pub samplers: u32,
    /// The bound `S`.
    pub staleness: u64,
    /// Virtual seconds simulated.
    pub virtual_s: f64,
    /// Events that happened, turns that machines took, messages sent, and those that broken sessions lost.
    pub events: u64,
    /// See `events`.
    pub turns: u64,
    /// See `events`.
    pub messages: u64,
    /// See `events`.
    pub lost_messages: u64,
    /// Hash over all events in order.
    pub trace: String,
    /// Updates that the weights have at the end.
    pub steps: u64,
    /// Batches that the learner was given; more than `steps` where a crash took some back.
    pub batches: u64,
    /// Updates a virtual minute.
    pub steps_per_min: f64,
    /// Updates relative to the same run without its faults.
    pub steps_share: Option<f64>,
    /// Share of the time in which the learner waited for a batch.
    pub learner_idle: f64,
    /// Rollouts that engines finished.
    pub sampled: u64,
    /// Rollouts that were acknowledged as counting.
    pub counted: u64,
    /// Share of them that counted; what died with its sampler and what is under way is left out.
    pub counted_share: f64,
    /// Refused, by reason.
    pub refused: BTreeMap<Refusal, u64>,
    /// Counted, and too old before they were used.
    pub went_stale: u64,
    /// Died with the memory or the disk of a killed sampler.
    pub died: u64,
    /// Not acknowledged when the run ended.
    pub under_way: u64,
    /// Frames put off, by reason.
    pub put_off: BTreeMap<Refusal, u64>,
    /// What samplers gave up, begun or not, by reason.
    pub given_up: BTreeMap<Refusal, u64>,
    /// Members that went to another sampler, since the trainer last started.
    pub reissued: u64,
    /// Rollouts of batches by how many steps they were behind.
    pub lags: Vec<u64>,
    /// Milliseconds until 99 % of the samplers held a version or a newer one.
    pub spread99_ms: Quantiles,
    /// Versions that had time for that, and did not reach so many.
    pub not_spread: u64,
    /// Versions published.
    pub versions: u64,
    /// Copies of a version that the trainer sent, in the mean.
    pub copies: f64,
    /// Bytes of frames for each sampled token, resent ones included.
    pub bytes_per_token: f64,
    /// Processes killed, and rollouts that the trainer owed when it was restarted.
    pub crashes: u64,
    /// See `crashes`.
    pub kept_over_crash: u64,
    /// The rule that did not hold.
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
    /// The rule that did not hold.
    pub violation: Option<Violation>,
}

#[allow(clippy::cast_precision_loss, reason = "counts of a simulation are far below 2^52")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

impl Outcome {
    pub(super) fn of(world: &World, uncut: u64, calm: Option<u64>, (events, trace): (u64, String)) -> Self {
        let violation = world.monitor.violation().cloned();
        let mut report = figures(world, uncut, calm);
        (report.events, report.trace) = (events, trace);
        report.violation = violation.as_ref().map(ToString::to_string);
        report.missed = missed(world, &report);
        Self { report, violation }
    }

    /// Returns whether every rule and every bound held.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.violation.is_none() && self.report.missed.is_empty()
    }
}

fn figures(world: &World, uncut: u64, calm: Option<u64>) -> Report {
    let (stats, tally) = (&world.stats, &world.monitor.tally);
    let seconds = world.scenario.duration().as_secs_f64();
    let steps = world.steps();
    let refused: u64 = tally.refused.values().sum();
    let good = tally.counted.saturating_sub(tally.went_stale);
    let idle = stats.idle + stats.idle_since.map_or(Duration::ZERO, |since| world.now - since);
    let reached = stats.spreads.values().filter_map(|spread| spread.reached99);
    let due = stats.spreads.values().filter(|spread| spread.published + TRAVELS <= world.now);
    let versions = stats.spreads.len() as u64;
    let name = &world.scenario.name;
    #[allow(clippy::cast_precision_loss, reason = "steps are few")]
    let steps_per_min = steps as f64 * 60.0 / seconds;
    Report {
        scenario: name.clone(),
        seed: world.seed,
        samplers: world.scenario.samplers,
        staleness: world.scenario.staleness(),
        virtual_s: (world.now - Time::ZERO).as_secs_f64(),
        events: 0,
        turns: stats.turns,
        messages: stats.messages,
        lost_messages: stats.lost_messages,
        trace: String::new(),
        steps,
        batches: stats.batches,
        steps_per_min,
        steps_share: calm.map(|calm| ratio(steps, calm)),
        learner_idle: idle.as_secs_f64() / seconds,
        sampled: tally.sampled,
        counted: tally.counted,
        counted_share: ratio(good, good + refused + tally.went_stale),
        refused: tally.refused.clone(),
        went_stale: tally.went_stale,
        died: tally.died,
        under_way: world.monitor.under_way() + uncut,
        put_off: tally.nacks.clone(),
        given_up: stats.given_up.clone(),
        reissued: world.reissued(),
        lags: stats.lags.clone(),
        spread99_ms: Quantiles::of(reached.map(|time| time.as_secs_f64() * 1_000.0).collect()),
        not_spread: due.filter(|spread| spread.reached99.is_none()).count() as u64,
        versions,
        copies: ratio(stats.owner_chunks, versions * u64::from(world.scenario.weights.chunks)),
        bytes_per_token: ratio(stats.frame_bytes, stats.tokens),
        crashes: stats.crashes,
        kept_over_crash: stats.kept_over_crash,
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
    let mut hold = |what: &str, figure: f64, least: Option<f64>, most: Option<f64>| {
        if let Some(least) = least.filter(|least| figure < *least) {
            missed.push(format!("{what} is {figure:.3}, and {least:.3} is the least"));
        }
        if let Some(most) = most.filter(|most| figure > *most) {
            missed.push(format!("{what} is {figure:.3}, and {most:.3} is the most"));
        }
    };
    #[allow(clippy::cast_precision_loss, reason = "counts of a simulation are far below 2^52")]
    let float = |many: u64| many as f64;
    let refused = |reason| report.refused.get(&reason).copied().unwrap_or(0);
    let full = refused(Refusal::Full) + report.put_off.get(&Refusal::Full).copied().unwrap_or(0);
    // Versions that never arrived took for ever, as far as this bound goes.
    let spread = if report.not_spread * 2 > report.versions { f64::INFINITY } else { report.spread99_ms.p50 };
    hold("steps_per_min", report.steps_per_min, bounds.steps_per_min, None);
    hold("steps_share", report.steps_share.unwrap_or(1.0), bounds.steps_share, None);
    hold("counted", report.counted_share, bounds.counted, None);
    hold("spread99_ms", spread, None, bounds.spread99_ms);
    hold("bytes_per_token", report.bytes_per_token, None, bounds.bytes_per_token);
    hold("copies", report.copies, None, bounds.copies);
    hold("refused_full", float(full), None, bounds.refused_full.map(float));
    let stale = refused(Refusal::Stale) + report.went_stale;
    hold("refused_stale", float(stale), None, bounds.refused_stale.map(float));
    hold("kept_over_crash", float(report.kept_over_crash), bounds.kept_over_crash.map(float), None);
    missed
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scenario, seed, samplers, staleness, virtual_s, .. } = self;
        writeln!(f, "{scenario} · seed {seed} · {samplers} samplers · S = {staleness} · {virtual_s:.1} virtual s")?;
        let Self { steps, batches, steps_per_min: pace, versions, .. } = self;
        let share = self.steps_share.map_or(String::new(), |share| format!(", {share:.2} of the calm run"));
        let idle = self.learner_idle * 100.0;
        writeln!(
            f,
            "  learner    {steps} updates of {batches} batches, {pace:.1} a minute{share}; waited {idle:.1} %"
        )?;
        let Self { sampled, counted, died, under_way, went_stale, refused, .. } = self;
        let share = self.counted_share * 100.0;
        writeln!(f, "  rollouts   {sampled} sampled, {counted} counted ({share:.2} %), {under_way} under way")?;
        writeln!(f, "             {died} died with their samplers, refused {refused:?}, too old later {went_stale}")?;
        let Self { put_off, given_up, reissued, lags, .. } = self;
        writeln!(f, "             frames put off {put_off:?}, given up {given_up:?}, {reissued} went to another")?;
        writeln!(f, "  lag        {lags:?}")?;
        let Self { not_spread, copies, bytes_per_token, .. } = self;
        writeln!(f, "  versions   {versions}, to 99 % {} ({not_spread} never)", self.spread99_ms)?;
        writeln!(
            f,
            "  wire       {copies:.2} copies of a version from the trainer, {bytes_per_token:.2} bytes a token"
        )?;
        let Self { crashes, kept_over_crash, lost_messages, messages, .. } = self;
        writeln!(f, "  trouble    {crashes} crashes, {lost_messages} of {messages} messages lost with their session")?;
        writeln!(f, "             {kept_over_crash} rollouts kept over the trainer's crash")?;
        let trace = self.trace.get(..16).unwrap_or(&self.trace);
        writeln!(f, "  trace      {} events, {} turns, {trace}", self.events, self.turns)?;
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
