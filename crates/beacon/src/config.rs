//! Every number of the beacon that an operator may turn, with its unit and its default.

use std::time::Duration;

use crate::select::SelectionRule;

/// When a second node gets the same job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HedgePolicy {
    /// Never: one lease at a time.
    Never,
    /// When the lease is overdue and the deadline is in danger, or when the executor is plainly a straggler.
    ///
    /// With `e` the expected time of the executor, re-measured from receipts, the hedge is granted at the earlier of
    /// `max(slack, slowdown · e)` after the lease, and `spare · e` before the deadline, but never before the lease is
    /// overdue (`max(slack, e)` after it was granted).
    AtRisk {
        /// An executor that takes this many times its expected time is a straggler.
        slowdown: f64,
        /// A second node is given this many times the expected time before the deadline.
        spare: f64,
        /// No lease is hedged earlier than this after it was granted.
        slack: Duration,
    },
}

/// How fast a reputation forgets, and how much strangers may say about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReputationConfig {
    /// After this long an observation counts half.
    pub half_life: Duration,
    /// Observations of one's own that are remembered at most; older ones fade. 20 is the published moving average of 0.95.
    pub memory: f64,
    /// Weight of an observation that another requester's receipt reports; an own one weighs 1.
    pub witness_weight: f64,
    /// Observations that one other requester's receipts may add up to, before `witness_weight`.
    pub witness_cap: f64,
    /// Observations that all other requesters' receipts may add up to, after `witness_weight`. A crowd of invented
    /// requesters therefore moves nobody further than this many observations of one's own.
    pub crowd_cap: f64,
    /// Successes that a node begins with.
    pub prior_successes: f64,
    /// Failures that a node begins with.
    pub prior_failures: f64,
}

impl Default for ReputationConfig {
    fn default() -> Self {
        Self {
            half_life: Duration::from_secs(30 * 60),
            memory: 20.0,
            witness_weight: 0.25,
            witness_cap: 4.0,
            crowd_cap: 3.0,
            prior_successes: 2.0,
            prior_failures: 1.0,
        }
    }
}

/// The beacon's configuration, of both its sides.
#[derive(Clone, Debug, PartialEq)]
pub struct BeaconConfig {
    /// How long bids are compared at least before the best one gets the lease. Ends early, see `close_at`. 150 ms.
    pub window: Duration,
    /// How long they are compared at most: between the two, as long as answers were seen to need. 600 ms.
    pub window_max: Duration,
    /// Bids at which the window closes early; it also closes when every capable node known has bid. 8.
    pub close_at: usize,
    /// How long a beacon that nobody has bid to stays open: the first bid after the window wins at once, so a slot that
    /// comes free in a busy swarm is used without asking again. Then a new beacon follows. 2 s.
    pub patience: Duration,
    /// How long a job waits for a capable node to appear in the ledger before it fails with `NobodyCan`. 2 s.
    pub grace: Duration,
    /// Pause before the first repeated beacon; doubles with each one that brought nothing. 100 ms.
    pub back_off: Duration,
    /// Longest pause between two beacons. 2 s.
    pub back_off_max: Duration,
    /// Beacons that one job may send. 64.
    pub max_beacons: u32,
    /// Jobs that this node asks for at a time. 256.
    pub max_jobs: usize,
    /// A lease that is not accepted within this time is lost; the grant is repeated once at half of it. 2 s.
    pub accept_timeout: Duration,
    /// An executor that gives no sign of life for this long has lost its lease; it is asked once at half of it. 4 s.
    pub silence_timeout: Duration,
    /// When a second node gets the same job.
    pub hedge: HedgePolicy,
    /// How the executor is chosen among the bidders. `discounted`.
    pub selection: SelectionRule,
    /// The latency that counts as slow when rewards and features are formed. Symphony-Coord has 2 s; answers of language
    /// models on consumer hardware take longer, so 10 s.
    pub latency_scale: Duration,
    /// How reputations are kept.
    pub reputation: ReputationConfig,
    /// How long an executor keeps a slot for a requester it has bid to. 1 s.
    pub hold: Duration,
    /// How often an executor gives a sign of life. 1 s.
    pub heartbeat: Duration,
    /// Beacons that an executor without a free slot remembers, to bid as soon as one comes free. 64.
    pub max_waiting: usize,
}

impl Default for BeaconConfig {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(150),
            window_max: Duration::from_millis(600),
            close_at: 8,
            patience: Duration::from_secs(2),
            grace: Duration::from_secs(2),
            back_off: Duration::from_millis(100),
            back_off_max: Duration::from_secs(2),
            max_beacons: 64,
            max_jobs: 256,
            accept_timeout: Duration::from_secs(2),
            silence_timeout: Duration::from_secs(4),
            hedge: HedgePolicy::AtRisk { slowdown: 4.0, spare: 1.5, slack: Duration::from_secs(1) },
            selection: SelectionRule::default(),
            latency_scale: Duration::from_secs(10),
            reputation: ReputationConfig::default(),
            hold: Duration::from_secs(1),
            heartbeat: Duration::from_secs(1),
            max_waiting: 64,
        }
    }
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("beacon.{field}: {problem}")]
pub struct ConfigError {
    /// Which number.
    pub field: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: &'static str,
}

impl BeaconConfig {
    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first number that does not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let reputation = &self.reputation;
        let rules = [
            (!self.window.is_zero(), "window", "must be longer than zero"),
            (self.window_max >= self.window, "window_max", "must not be shorter than window"),
            (self.patience >= self.window_max, "patience", "must not be shorter than window_max"),
            (
                self.patience <= Duration::from_secs(30),
                "patience",
                "must not exceed 30 s, the age at which beacons die",
            ),
            (
                self.hold > self.window_max,
                "hold",
                "must be longer than window_max, or every reservation lapses before it is used",
            ),
            (self.hold <= Duration::from_secs(60), "hold", "must not exceed 60 s"),
            (self.close_at > 0, "close_at", "must be at least 1"),
            (self.max_beacons > 0, "max_beacons", "must be at least 1"),
            (self.max_jobs > 0, "max_jobs", "must be at least 1"),
            (!self.back_off.is_zero(), "back_off", "must be longer than zero"),
            (self.back_off_max >= self.back_off, "back_off_max", "must not be shorter than back_off"),
            (!self.accept_timeout.is_zero(), "accept_timeout", "must be longer than zero"),
            (!self.heartbeat.is_zero(), "heartbeat", "must be longer than zero"),
            (self.silence_timeout > self.heartbeat * 2, "silence_timeout", "must be over twice the heartbeat"),
            (!self.latency_scale.is_zero(), "latency_scale", "must be longer than zero"),
            (!reputation.half_life.is_zero(), "reputation.half_life", "must be longer than zero"),
            (positive(reputation.memory), "reputation.memory", "must be positive"),
            (reputation.witness_weight >= 0.0, "reputation.witness_weight", "must not be negative"),
            (reputation.witness_cap >= 0.0, "reputation.witness_cap", "must not be negative"),
            (reputation.crowd_cap >= 0.0, "reputation.crowd_cap", "must not be negative"),
            (positive(reputation.prior_successes), "reputation.prior_successes", "must be positive"),
            (positive(reputation.prior_failures), "reputation.prior_failures", "must be positive"),
            (self.hedge_is_sound(), "hedge", "slowdown and spare must be at least 1"),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, field, problem)) => Err(ConfigError { field, problem }),
            None => Ok(()),
        }
    }

    fn hedge_is_sound(&self) -> bool {
        match self.hedge {
            HedgePolicy::Never => true,
            HedgePolicy::AtRisk { slowdown, spare, .. } => slowdown >= 1.0 && spare >= 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_sound() {
        assert_eq!(BeaconConfig::default().validate(), Ok(()));
    }

    #[test]
    fn a_hold_that_lapses_before_the_window_closes_is_named() {
        let config = BeaconConfig { hold: Duration::from_millis(600), ..BeaconConfig::default() };
        assert_eq!(config.validate().map_err(|e| e.field), Err("hold"));
        let config = BeaconConfig {
            hedge: HedgePolicy::AtRisk { slowdown: f64::NAN, spare: 2.0, slack: Duration::ZERO },
            ..BeaconConfig::default()
        };
        assert_eq!(config.validate().map_err(|e| e.field), Err("hedge"));
    }
}
