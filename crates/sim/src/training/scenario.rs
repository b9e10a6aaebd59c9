//! A training run as data: one TOML file. Unknown keys are errors. It is told from other scenarios by its key `samplers`.

use std::time::Duration;

use chorus_protocol::policy::PolicyId;
use chorus_protocol::{Text, limits};
use chorus_rollout::buffer::{BufferConfig, Mode};
use chorus_rollout::plan::Plan;
use serde::{Deserialize, Serialize};

use crate::scenario::{MAX_NODES, MAX_SECONDS, ScenarioError};

/// Scenarios that come with the simulator, by name.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("train-calm", include_str!("../../scenarios/training/train-calm.toml")),
    ("train-sequential", include_str!("../../scenarios/training/train-sequential.toml")),
    ("train-churn", include_str!("../../scenarios/training/train-churn.toml")),
    ("train-slow-links", include_str!("../../scenarios/training/train-slow-links.toml")),
    ("train-crash", include_str!("../../scenarios/training/train-crash.toml")),
    ("train-partition", include_str!("../../scenarios/training/train-partition.toml")),
    ("train-storm", include_str!("../../scenarios/training/train-storm.toml")),
];

/// One scenario. Times are in milliseconds of virtual time; a pair of figures is the least and the most that is drawn.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name, as the command line gives it.
    pub name: String,
    /// What it shows, in one sentence.
    pub about: String,
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// Samplers.
    pub samplers: u32,
    /// Virtual seconds to simulate.
    pub seconds: u32,
    /// The trainer.
    #[serde(default)]
    pub learner: Learner,
    /// The samplers.
    #[serde(default)]
    pub sampling: Sampling,
    /// What a version weighs, and how it travels.
    #[serde(default)]
    pub weights: Weights,
    /// How links behave.
    #[serde(default)]
    pub link: Link,
    /// Time until a write is done.
    #[serde(default = "disk_ms")]
    pub disk_ms: [f64; 2],
    /// What goes wrong.
    #[serde(default, rename = "fault")]
    pub faults: Vec<Fault>,
    /// What must hold at the end.
    #[serde(default)]
    pub bounds: Bounds,
}

fn disk_ms() -> [f64; 2] {
    [0.5, 6.0]
}

/// The trainer.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Learner {
    /// Groups in a batch.
    pub batch: usize,
    /// Rollouts in a group.
    pub members: u16,
    /// Every update waits for rollouts of its own weights; `staleness` means nothing then.
    pub sequential: bool,
    /// The bound `S`.
    pub staleness: u32,
    /// How long an update takes.
    pub step_ms: [f64; 2],
    /// How long a checkpoint takes to be written.
    pub checkpoint_ms: [f64; 2],
    /// Updates between two checkpoints, each of which is published.
    pub publish_every: u64,
}

impl Default for Learner {
    fn default() -> Self {
        Self {
            batch: 32,
            members: 8,
            sequential: false,
            staleness: 4,
            step_ms: [1_500.0, 2_500.0],
            checkpoint_ms: [20.0, 200.0],
            publish_every: 1,
        }
    }
}

/// The samplers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Processes start at moments drawn from the first so many milliseconds.
    pub start_within_ms: u64,
    /// Rollouts that one samples at a time.
    pub slots: u16,
    /// Tokens of a rollout.
    pub tokens: [u32; 2],
    /// How long one takes at an ordinary sampler.
    pub rollout_ms: [f64; 2],
    /// Share of samplers that are slow.
    pub slow_share: f64,
    /// They take so many times longer.
    pub slow_factor: f64,
    /// How long a whole version takes to be loaded.
    pub load_ms: [f64; 2],
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            start_within_ms: 1_000,
            slots: 2,
            tokens: [64, 512],
            rollout_ms: [800.0, 3_200.0],
            slow_share: 0.2,
            slow_factor: 2.0,
            load_ms: [50.0, 300.0],
        }
    }
}

/// What a version weighs, and how it travels.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Chunks of a version.
    pub chunks: u32,
    /// What a chunk weighs on the wire. In memory it has one KiB.
    pub chunk_kib: u64,
    /// Neighbours of a node, at most.
    pub neighbours: usize,
}

impl Default for Weights {
    fn default() -> Self {
        Self { chunks: 4, chunk_kib: 1_024, neighbours: 8 }
    }
}

/// How links behave.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// From a node to the middle of the network; a message takes that of both its ends.
    pub access_ms: [f64; 2],
    /// Uplink of an ordinary sampler, in Mbit/s.
    pub uplink_mbit: [f64; 2],
    /// Share of samplers with a slow uplink.
    pub slow_share: f64,
    /// A slow uplink, in Mbit/s.
    pub slow_mbit: f64,
    /// The trainer's uplink, in Mbit/s.
    pub trainer_mbit: f64,
    /// Until a silent peer counts as gone.
    pub detect_ms: f64,
    /// Between two attempts to connect again.
    pub redial_ms: [f64; 2],
}

impl Default for Link {
    fn default() -> Self {
        Self {
            access_ms: [3.0, 40.0],
            uplink_mbit: [40.0, 200.0],
            slow_share: 0.0,
            slow_mbit: 10.0,
            trainer_mbit: 500.0,
            detect_ms: 3_000.0,
            redial_ms: [200.0, 1_500.0],
        }
    }
}

/// Something that goes wrong at a moment.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// Samplers die, and come back after a while with what their disks hold.
    Crash {
        /// When the first dies.
        at_ms: u64,
        /// How many, drawn.
        count: u32,
        /// They die at moments drawn from so many milliseconds.
        #[serde(default)]
        within_ms: u64,
        /// How long each stays away; for ever when absent.
        down_ms: Option<u64>,
        /// The machine loses power: its neighbours learn of it only by silence.
        #[serde(default)]
        power: bool,
    },
    /// The trainer dies, and comes back with what its disk holds.
    TrainerCrash {
        /// When.
        at_ms: u64,
        /// How long it stays away.
        down_ms: u64,
        /// As of [`Fault::Crash`].
        #[serde(default)]
        power: bool,
    },
    /// The swarm falls into parts that do not hear each other. The trainer stays in the larger one.
    Partition {
        /// When.
        at_ms: u64,
        /// Share of samplers in the smaller part, drawn.
        share: f64,
        /// How long.
        for_ms: u64,
    },
    /// Sessions break, and what is under way on them is lost. Both sides notice at once and connect again.
    BrokenSessions {
        /// When the first breaks.
        at_ms: u64,
        /// How many, drawn among all of samplers with the trainer and with each other.
        count: u32,
        /// They break at moments drawn from so many milliseconds.
        #[serde(default)]
        within_ms: u64,
    },
    /// Disks refuse frames and chunks, as when they are full.
    FullDisk {
        /// When.
        at_ms: u64,
        /// How many samplers, drawn.
        #[serde(default)]
        count: u32,
        /// The trainer's too.
        #[serde(default)]
        trainer: bool,
        /// How long.
        for_ms: u64,
    },
}

impl Fault {
    /// Returns when it sets in, and when it is over as far as it has an end.
    #[must_use]
    pub fn span_ms(&self) -> (u64, u64) {
        match *self {
            Self::Crash { at_ms, within_ms, down_ms, .. } => (at_ms, at_ms + within_ms + down_ms.unwrap_or(0)),
            Self::TrainerCrash { at_ms, down_ms, .. } => (at_ms, at_ms + down_ms),
            Self::Partition { at_ms, for_ms, .. } | Self::FullDisk { at_ms, for_ms, .. } => (at_ms, at_ms + for_ms),
            Self::BrokenSessions { at_ms, within_ms, .. } => (at_ms, at_ms + within_ms),
        }
    }
}

/// What must hold at the end. Invariants hold always and are not listed here.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// Updates a virtual minute, at least.
    pub steps_per_min: Option<f64>,
    /// Updates relative to the same run without its faults, at least.
    pub steps_share: Option<f64>,
    /// Share of sampled rollouts that counted, at least. What died with its sampler and what is under way is left out.
    pub counted: Option<f64>,
    /// From publication until 99 % of the samplers that run hold a version or a newer one, median, at most.
    pub spread99_ms: Option<f64>,
    /// Bytes of frames for each token that was sampled, resent ones included, at most.
    pub bytes_per_token: Option<f64>,
    /// Copies of a version that the trainer sends, in the mean, at most.
    pub copies: Option<f64>,
    /// Rollouts refused because there was no room, at most.
    pub refused_full: Option<u64>,
    /// Rollouts refused because they came too late for `S`, at most.
    pub refused_stale: Option<u64>,
    /// Frames that were on the trainer's disk, and not learned from, when it crashed; at least. Shows that the crash hit something.
    pub kept_over_crash: Option<u64>,
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
        let end_ms = u64::from(self.seconds) * 1_000;
        let (learner, sampling, link) = (&self.learner, &self.sampling, &self.link);
        let rules = [
            ((1..MAX_NODES).contains(&self.samplers), "samplers", "must lie between 1 and 9999"),
            ((1..=MAX_SECONDS).contains(&self.seconds), "seconds", "must lie between 1 and 86400"),
            (rising(learner.step_ms), "learner.step_ms", "must rise from 0 or above"),
            (rising(learner.checkpoint_ms), "learner.checkpoint_ms", "must rise from 0 or above"),
            (
                (1..=self.staleness() + 1).contains(&learner.publish_every),
                "learner.publish_every",
                "must lie between 1 and S + 1, or the learner waits for ever",
            ),
            (sampling.slots > 0, "sampling.slots", "must be at least 1"),
            (
                (1..=sampling.tokens[1]).contains(&sampling.tokens[0]) && sampling.tokens[1] <= 8_192,
                "sampling.tokens",
                "must rise from 1 to 8192 at most",
            ),
            (rising(sampling.rollout_ms), "sampling.rollout_ms", "must rise from 0 or above"),
            (rising(sampling.load_ms), "sampling.load_ms", "must rise from 0 or above"),
            (share(sampling.slow_share), "sampling.slow_share", "must lie between 0 and 1"),
            (sampling.slow_factor >= 1.0, "sampling.slow_factor", "must be at least 1"),
            ((1..=4_096).contains(&self.weights.chunks), "weights.chunks", "must lie between 1 and 4096"),
            (self.weights.neighbours >= 3, "weights.neighbours", "must be at least 3"),
            (rising(link.access_ms), "link.access_ms", "must rise from 0 or above"),
            (link.uplink_mbit[0] > 0.0 && rising(link.uplink_mbit), "link.uplink_mbit", "must rise from above 0"),
            (share(link.slow_share), "link.slow_share", "must lie between 0 and 1"),
            (link.slow_mbit > 0.0 && link.trainer_mbit > 0.0, "link.slow_mbit", "and trainer_mbit must be above 0"),
            (rising(link.redial_ms), "link.redial_ms", "must rise from 0 or above"),
            (rising(self.disk_ms), "disk_ms", "must rise from 0 or above"),
            (self.faults.iter().all(|fault| fault.span_ms().1 <= end_ms), "fault", "must be over before the end"),
        ];
        let problem =
            rules.into_iter().find(|(holds, ..)| !holds).map(|(_, field, problem)| (field, problem.to_owned()));
        let problem = problem.or_else(|| {
            let owner = chorus_protocol::SecretKey::from_bytes(&[1; 32]).node_id();
            let policy = PolicyId { owner, name: Text::truncated("sim") };
            self.buffer_config(policy).validate().err().map(|error| ("learner", error.to_string()))
        });
        match problem {
            None => Ok(()),
            Some((field, problem)) => Err(ScenarioError::Invalid { name: self.name.clone(), field, problem }),
        }
    }

    /// Returns the trainer's settings.
    #[must_use]
    pub fn buffer_config(&self, policy: PolicyId) -> BufferConfig {
        let mode = match &self.learner {
            Learner { sequential: true, .. } => Mode::Sequential,
            Learner { staleness, .. } => Mode::Streaming { staleness: *staleness },
        };
        let environments = vec![(Text::truncated("arithmetic"), 2), (Text::truncated("sokoban"), 1)];
        BufferConfig {
            batch: self.learner.batch,
            members: self.learner.members,
            ..BufferConfig::new(policy, mode, Plan { seed: 5, environments })
        }
    }

    /// Returns the bound `S`: 0 in the sequential mode.
    #[must_use]
    pub fn staleness(&self) -> u64 {
        if self.learner.sequential { 0 } else { u64::from(self.learner.staleness) }
    }

    /// Returns what a chunk in memory weighs on the wire, at most one that can be sent.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        (self.weights.chunk_kib * 1_024).min(limits::MAX_CHUNK_BYTES as u64)
    }

    /// Returns the same run without its faults, if it has any.
    #[must_use]
    pub fn without_faults(&self) -> Option<Self> {
        (!self.faults.is_empty()).then(|| Self { faults: Vec::new(), ..self.clone() })
    }

    /// Returns how long it runs.
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
    fn misspelt_keys_and_values_that_make_no_sense_are_named() {
        let base = "name='x'\nabout='x'\nseed=1\nsamplers=2\nseconds=5\n";
        assert!(Scenario::parse("x", base).is_ok());
        assert!(Scenario::parse("x", &format!("{base}[learner]\nstalenes=3")).is_err());
        for (wrong, field) in [
            ("[learner]\nbatch=0", "learner"),
            ("[learner]\npublish_every=9", "learner.publish_every"),
            ("[[fault]]\nkind='trainer-crash'\nat_ms=4000\ndown_ms=4000", "fault"),
            ("[sampling]\ntokens=[9, 3]", "sampling.tokens"),
        ] {
            match Scenario::parse("x", &format!("{base}{wrong}")) {
                Err(ScenarioError::Invalid { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{wrong}: {other:?}"),
            }
        }
    }
}
