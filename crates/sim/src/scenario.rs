//! A scenario: everything that decides a run, as data.
//!
//! A scenario is one TOML file. Unknown keys are errors, so that a misspelt fault is not a fault that never happens. Two runs of one
//! scenario with one seed are the same run, event for event.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::adversary::AdversaryKind;
use crate::gossip::GossipParams;
use crate::link::LinkParams;

/// The most nodes of one scenario.
pub const MAX_NODES: u32 = 10_000;
/// The longest scenario, in virtual seconds.
pub const MAX_SECONDS: u32 = 24 * 3_600;

/// Scenarios that come with the simulator, by name.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("small-5", include_str!("../scenarios/small-5.toml")),
    ("calm-1000", include_str!("../scenarios/calm-1000.toml")),
    ("crowd-1000", include_str!("../scenarios/crowd-1000.toml")),
    ("far-bidders", include_str!("../scenarios/far-bidders.toml")),
    ("lossy", include_str!("../scenarios/lossy.toml")),
    ("churn", include_str!("../scenarios/churn.toml")),
    ("partition-heal", include_str!("../scenarios/partition-heal.toml")),
    ("liars", include_str!("../scenarios/liars.toml")),
    ("equivocators", include_str!("../scenarios/equivocators.toml")),
    ("forgers-and-replayers", include_str!("../scenarios/forgers-and-replayers.toml")),
    ("stale-tokens", include_str!("../scenarios/stale-tokens.toml")),
    ("flooders", include_str!("../scenarios/flooders.toml")),
    ("slow-disks-and-skewed-clocks", include_str!("../scenarios/slow-disks-and-skewed-clocks.toml")),
];

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScenarioError {
    /// The file is not a scenario.
    #[error("{name} is not a scenario: {source}")]
    Parse {
        /// Which one.
        name: String,
        /// What is wrong, and where.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("scenario {name}: {field} {problem}")]
    Invalid {
        /// Which one.
        name: String,
        /// The key.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
}

/// One scenario. Times are in milliseconds of virtual time.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name, as the command line gives it.
    pub name: String,
    /// What it shows, in one sentence.
    pub about: String,
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// Nodes, adversaries included.
    pub nodes: u32,
    /// Virtual seconds to simulate at least; the run goes on a little while ledgers still differ, see `bounds.converge_ms`.
    pub seconds: u32,
    /// How links behave.
    #[serde(default)]
    pub link: LinkParams,
    /// How gossip spreads.
    #[serde(default)]
    pub gossip: GossipParams,
    /// What the nodes are.
    #[serde(default)]
    pub swarm: Swarm,
    /// What is asked of them.
    #[serde(default)]
    pub work: Work,
    /// What goes wrong.
    #[serde(default, rename = "fault")]
    pub faults: Vec<Fault>,
    /// Who means harm.
    #[serde(default, rename = "adversary")]
    pub adversaries: Vec<Adversary>,
    /// What must hold at the end.
    #[serde(default)]
    pub bounds: Bounds,
}

/// What the nodes are.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Swarm {
    /// Share of nodes that offer to work; the rest only ask.
    pub workers: f64,
    /// Nodes start at moments drawn from the first so many milliseconds.
    pub start_within_ms: u64,
    /// Different models, one a node.
    pub models: u32,
    /// Different skills, two a node.
    pub skills: u32,
    /// Jobs a node does at a time.
    pub slots: u16,
    /// Slowest and fastest answer, in tokens a second; each node's rate is drawn between them.
    pub tokens_per_s: [f64; 2],
    /// Wall clocks are off by up to this, either way.
    pub skew_ms: u64,
    /// Monotonic clocks run fast or slow by up to this many parts in a million.
    pub drift_ppm: u32,
    /// Time until a write is acknowledged: the fastest and the slowest.
    pub disk_ms: [f64; 2],
    /// Time until a text is embedded: the fastest and the slowest.
    pub embed_ms: [f64; 2],
    /// How long a started process takes to load and measure its model, before it offers it: the fastest and the slowest.
    pub load_ms: [f64; 2],
    /// How long an engine takes to come back after it broke down.
    pub engine_restart_ms: u64,
    /// Mean time between two reconciliations that a node begins.
    pub sync_interval_ms: u64,
    /// The longest that bids are compared; the nodes' own default when absent.
    pub bid_window_max_ms: Option<u64>,
}

impl Default for Swarm {
    fn default() -> Self {
        Self {
            workers: 1.0,
            start_within_ms: 2_000,
            models: 1,
            skills: 8,
            slots: 2,
            tokens_per_s: [20.0, 120.0],
            skew_ms: 0,
            drift_ppm: 0,
            disk_ms: [0.5, 4.0],
            embed_ms: [3.0, 15.0],
            load_ms: [800.0, 3_000.0],
            engine_restart_ms: 2_000,
            sync_interval_ms: 2_000,
            bid_window_max_ms: None,
        }
    }
}

/// What is asked of the nodes.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Work {
    /// Tasks in all, asked at moments drawn between `from_ms` and `until_ms` by honest nodes drawn among those that run.
    pub tasks: u32,
    /// Only so many nodes ask, the first ones; all when 0.
    pub askers: u32,
    /// The first may be asked now.
    pub from_ms: u64,
    /// The last is asked before.
    pub until_ms: u64,
    /// Share of tasks run as chains with a vote; the others are `direct`.
    pub chains: f64,
    /// Share of tasks that name the model they want.
    pub named_model: f64,
    /// Share of tasks that ask for text while it is made.
    pub stream: f64,
    /// How long a task may take.
    pub deadline_ms: u64,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            tasks: 0,
            askers: 0,
            from_ms: 5_000,
            until_ms: 20_000,
            chains: 0.0,
            named_model: 0.0,
            stream: 0.0,
            deadline_ms: 30_000,
            max_tokens: 64,
        }
    }
}

/// Something that goes wrong at a moment.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// Processes die, and come back after a while with what their disks hold.
    Crash {
        /// When the first dies.
        at_ms: u64,
        /// How many honest nodes, drawn.
        count: u32,
        /// They die at moments drawn from so many milliseconds.
        #[serde(default)]
        within_ms: u64,
        /// How long each stays away; for ever when absent.
        down_ms: Option<u64>,
        /// The machine loses power: writes that nobody waited for are lost too, and neighbours learn of it only by silence.
        #[serde(default)]
        power: bool,
    },
    /// The swarm falls into parts that do not hear each other.
    Partition {
        /// When.
        at_ms: u64,
        /// Share of nodes in the smaller part, drawn.
        share: f64,
        /// How long.
        for_ms: u64,
    },
    /// Wall clocks jump.
    Skew {
        /// When.
        at_ms: u64,
        /// How many honest nodes, drawn.
        count: u32,
        /// By how much; negative is back.
        by_ms: i64,
    },
    /// Disks become slow.
    SlowDisk {
        /// When.
        at_ms: u64,
        /// How many honest nodes, drawn.
        count: u32,
        /// By this factor.
        factor: f64,
        /// How long.
        for_ms: u64,
    },
    /// Disks refuse writes, as when they are full.
    FullDisk {
        /// When.
        at_ms: u64,
        /// How many honest nodes, drawn.
        count: u32,
        /// How long.
        for_ms: u64,
    },
    /// Engines break down in the middle of whatever they do.
    EngineCrash {
        /// When the first breaks down.
        at_ms: u64,
        /// How many honest nodes, drawn.
        count: u32,
        /// They break down at moments drawn from so many milliseconds.
        #[serde(default)]
        within_ms: u64,
    },
}

impl Fault {
    /// Returns when it is over, as far as it has an end.
    #[must_use]
    pub fn over_ms(&self) -> u64 {
        match *self {
            Self::Crash { at_ms, within_ms, down_ms, .. } => at_ms + within_ms + down_ms.unwrap_or(0),
            Self::Partition { at_ms, for_ms, .. }
            | Self::SlowDisk { at_ms, for_ms, .. }
            | Self::FullDisk { at_ms, for_ms, .. } => at_ms + for_ms,
            Self::EngineCrash { at_ms, within_ms, .. } => at_ms + within_ms,
            Self::Skew { at_ms, .. } => at_ms,
        }
    }
}

/// Nodes that mean harm.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Adversary {
    /// What they do.
    pub kind: AdversaryKind,
    /// How many.
    pub count: u32,
    /// They begin now, and behave until then.
    #[serde(default)]
    pub from_ms: u64,
    /// What they do repeatedly, they do so often.
    #[serde(default = "one_second")]
    pub every_ms: u64,
}

fn one_second() -> u64 {
    1_000
}

/// What must hold at the end. Invariants hold always and are not listed here.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// Share of tasks of surviving requesters that end with an answer, at least.
    pub completed: Option<f64>,
    /// From the last entry or the end of the last fault until all honest connected nodes hold equal ledgers, at most.
    pub converge_ms: Option<u64>,
    /// From a job's submission to its first lease, median, at most.
    pub election_p50_ms: Option<f64>,
    /// The same, 99th percentile.
    pub election_p99_ms: Option<f64>,
    /// From an entry's publication until 99 % of the running nodes hold it, median over entries, at most.
    pub spread99_ms: Option<f64>,
    /// Bytes sent by a node in the mean, at most.
    pub bytes_per_node: Option<u64>,
    /// Bids that are compared in an election, in the mean, once a requester has held some; at least.
    pub bids: Option<f64>,
    /// Share of leases granted to adversaries, at most.
    pub adversary_leases: Option<f64>,
    /// Every equivocator is quarantined by every honest connected node.
    pub quarantined: bool,
    /// Results that came under a stale token and were refused, at least: shows that the attack took place.
    pub stale_refused: Option<u64>,
}

impl Scenario {
    /// Reads a scenario. `name` is used in errors only.
    ///
    /// # Errors
    /// [`ScenarioError`] with the line, or with the key that makes no sense.
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text)
            .map_err(|source| ScenarioError::Parse { name: name.to_owned(), source: Box::new(source) })?;
        scenario.validate()?;
        Ok(scenario)
    }

    /// Returns a scenario that comes with the simulator.
    #[must_use]
    pub fn built_in(name: &str) -> Option<Self> {
        let (_, text) = BUILT_IN.iter().find(|(known, _)| *known == name)?;
        Some(Self::parse(name, text).expect("a test parses every built-in scenario"))
    }

    /// Checks that the values make sense together.
    ///
    /// # Errors
    /// [`ScenarioError::Invalid`] names the first that does not.
    pub fn validate(&self) -> Result<(), ScenarioError> {
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let rising = |[low, high]: [f64; 2]| low >= 0.0 && low <= high && high.is_finite();
        let adversaries: u64 = self.adversaries.iter().map(|group| u64::from(group.count)).sum();
        let end_ms = u64::from(self.seconds) * 1_000;
        let rules = [
            ((1..=MAX_NODES).contains(&self.nodes), "nodes", "must lie between 1 and 10000"),
            ((1..=MAX_SECONDS).contains(&self.seconds), "seconds", "must lie between 1 and 86400"),
            (adversaries < u64::from(self.nodes), "adversary", "must leave at least one honest node"),
            (share(self.link.loss) && self.link.loss < 1.0, "link.loss", "must lie between 0 and 1"),
            (share(self.link.jitter), "link.jitter", "must lie between 0 and 1"),
            (self.gossip.degree > 0, "gossip.degree", "must be at least 1"),
            (self.gossip.peers >= self.gossip.degree, "gossip.peers", "must not be below gossip.degree"),
            (share(self.swarm.workers), "swarm.workers", "must lie between 0 and 1"),
            (self.swarm.models > 0, "swarm.models", "must be at least 1"),
            (self.swarm.skills > 0, "swarm.skills", "must be at least 1"),
            (self.swarm.slots > 0, "swarm.slots", "must be at least 1"),
            (
                self.swarm.tokens_per_s[0] > 0.0 && rising(self.swarm.tokens_per_s),
                "swarm.tokens_per_s",
                "must rise from above 0",
            ),
            (rising(self.swarm.disk_ms), "swarm.disk_ms", "must rise from 0 or above"),
            (rising(self.swarm.embed_ms), "swarm.embed_ms", "must rise from 0 or above"),
            (rising(self.swarm.load_ms), "swarm.load_ms", "must rise from 0 or above"),
            (self.swarm.drift_ppm < 1_000_000, "swarm.drift_ppm", "must be below a million"),
            (share(self.work.chains), "work.chains", "must lie between 0 and 1"),
            (share(self.work.named_model), "work.named_model", "must lie between 0 and 1"),
            (share(self.work.stream), "work.stream", "must lie between 0 and 1"),
            (self.work.from_ms <= self.work.until_ms, "work.until_ms", "must not lie before work.from_ms"),
            (self.work.tasks == 0 || self.work.until_ms <= end_ms, "work.until_ms", "must not lie after the end"),
            (self.work.deadline_ms > 0, "work.deadline_ms", "must be above 0"),
            (self.faults.iter().all(|fault| fault.over_ms() <= end_ms), "fault", "must be over before the end"),
            (self.adversaries.iter().all(|group| group.every_ms > 0), "adversary.every_ms", "must be above 0"),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, field, problem)) => {
                Err(ScenarioError::Invalid { name: self.name.clone(), field, problem: problem.to_owned() })
            }
        }
    }

    /// Returns how long it runs at least.
    #[must_use]
    pub fn duration(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_scenario_parses_and_has_its_name() {
        for (name, text) in BUILT_IN {
            let scenario = Scenario::parse(name, text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(&scenario.name, name);
        }
    }

    #[test]
    fn a_misspelt_key_is_an_error_everywhere() {
        let base = "name='x'\nabout='x'\nseed=1\nnodes=2\nseconds=5\n";
        assert!(Scenario::parse("x", base).is_ok());
        for wrong in [
            "noodles=1",
            "[link]\nlatency=3",
            "[[fault]]\nkind='crash'\nat_ms=1\ncount=1\ndwon_ms=3",
            "[[fault]]\nkind='earthquake'\nat_ms=1",
            "[[adversary]]\nkind='liar'\ncuont=1",
            "[bounds]\nconverge=3",
        ] {
            assert!(Scenario::parse("x", &format!("{base}{wrong}")).is_err(), "{wrong} was taken");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_named() {
        let base = "name='x'\nabout='x'\nseed=1\nnodes=2\nseconds=5\n";
        for (wrong, field) in [
            ("[[adversary]]\nkind='liar'\ncount=2", "adversary"),
            ("[[fault]]\nkind='partition'\nat_ms=4000\nfor_ms=4000\nshare=0.5", "fault"),
            ("[link]\nloss=1.5", "link.loss"),
            ("[gossip]\npeers=2\ndegree=3", "gossip.peers"),
        ] {
            match Scenario::parse("x", &format!("{base}{wrong}")) {
                Err(ScenarioError::Invalid { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{wrong}: {other:?}"),
            }
        }
    }
}
