//! What a node is told once, at its start.

use std::time::Duration;

use chorus_beacon::BeaconConfig;
use chorus_ledger::LedgerConfig;
use chorus_protocol::NetworkId;
use chorus_scheduler::SchedulerConfig;

/// Everything that a [`crate::Node`] needs to know before its first input.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The swarm it belongs to.
    pub network: NetworkId,
    /// How the ledger is kept and spread.
    pub ledger: LedgerConfig,
    /// How elections are held.
    pub beacon: BeaconConfig,
    /// How tasks are run.
    pub scheduler: SchedulerConfig,
    /// How often the node says again what it can do, so that its capability does not expire while it lives.
    pub announce_every: Duration,
}

impl NodeConfig {
    /// Returns the defaults for a network.
    #[must_use]
    pub fn new(network: NetworkId) -> Self {
        Self {
            network,
            ledger: LedgerConfig::default(),
            beacon: BeaconConfig::default(),
            scheduler: SchedulerConfig::default(),
            announce_every: Duration::from_secs(20 * 60),
        }
    }
}
