//! What an operator may set.

use std::time::Duration;

use chorus_protocol::limits::MAX_ENTRY_LIFE_MS;

/// Bounds and periods of a ledger. Every limit exists so that nobody else can decide how much memory this node uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerConfig {
    /// Entries in the set, of all authors together. At the limit new entries are passed over until others expire.
    /// Default 200,000.
    pub max_entries: usize,
    /// Bytes of all entries together, as encoded. Default 128 MiB.
    pub max_bytes: usize,
    /// Receipts of one author; the newest stay. Default 4,096.
    pub max_entries_per_author: usize,
    /// Accusations of one author; the newest stay. Default 256.
    pub max_accusations_per_author: usize,
    /// Superseded entries of one author that are kept whole, so that a second version of one can be *proven*. Default 8.
    pub max_superseded_per_author: usize,
    /// Superseded entries of one author of which only the hash is kept, so that a second version is still *refused*. Default 32.
    pub max_traces_per_author: usize,
    /// Bytes of superseded entries of all authors together. Default 8 MiB.
    pub max_superseded_bytes: usize,
    /// Authors remembered as frauds. Default 4,096.
    pub max_quarantined: usize,
    /// Mean time between two reconciliations that this node begins; each is drawn within a quarter of it. Default 2 s.
    pub sync_interval: Duration,
    /// How long a reconciliation may wait for its neighbour's next message. Default 10 s.
    pub sync_timeout: Duration,
    /// How long own capabilities, and own notices of policies, live. Renew at half of it. Default 1 hour.
    pub capability_life: Duration,
    /// How long own receipts and accusations live, and so how long reputation remembers. Default 7 days.
    pub receipt_life: Duration,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            max_entries: 200_000,
            max_bytes: 128 << 20,
            max_entries_per_author: 4_096,
            max_accusations_per_author: 256,
            max_superseded_per_author: 8,
            max_traces_per_author: 32,
            max_superseded_bytes: 8 << 20,
            max_quarantined: 4_096,
            sync_interval: Duration::from_secs(2),
            sync_timeout: Duration::from_secs(10),
            capability_life: Duration::from_secs(3_600),
            receipt_life: Duration::from_secs(7 * 24 * 3_600),
        }
    }
}

/// A setting with which no ledger can work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Zero where something must fit or pass.
    #[error("ledger.{field} is 0; set it above 0")]
    Zero {
        /// The setting.
        field: &'static str,
    },
    /// Other nodes refuse entries that live longer.
    #[error("ledger.{field} is over 30 days, which other nodes refuse; shorten it")]
    TooLong {
        /// The setting.
        field: &'static str,
    },
}

impl LedgerConfig {
    /// Checks that a ledger can work with these settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that cannot stand.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("max_entries", self.max_entries),
            ("max_bytes", self.max_bytes),
            ("max_entries_per_author", self.max_entries_per_author),
            ("max_accusations_per_author", self.max_accusations_per_author),
            ("max_quarantined", self.max_quarantined),
        ];
        let spans = [
            ("sync_interval", self.sync_interval),
            ("sync_timeout", self.sync_timeout),
            ("capability_life", self.capability_life),
            ("receipt_life", self.receipt_life),
        ];
        let zero = sizes.iter().find(|(_, n)| *n == 0).map(|(field, _)| *field);
        let zero = zero.or_else(|| spans.iter().find(|(_, span)| span.is_zero()).map(|(field, _)| *field));
        if let Some(field) = zero {
            return Err(ConfigError::Zero { field });
        }
        let longest = Duration::from_millis(MAX_ENTRY_LIFE_MS);
        match spans[2..].iter().find(|(_, span)| *span > longest) {
            Some((field, _)) => Err(ConfigError::TooLong { field }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_nonsense_is_named() {
        assert_eq!(LedgerConfig::default().validate(), Ok(()));
        let none = LedgerConfig { max_entries: 0, ..LedgerConfig::default() };
        assert_eq!(none.validate(), Err(ConfigError::Zero { field: "max_entries" }));
        let long = LedgerConfig { receipt_life: Duration::from_secs(31 * 86_400), ..LedgerConfig::default() };
        assert_eq!(long.validate(), Err(ConfigError::TooLong { field: "receipt_life" }));
    }
}
