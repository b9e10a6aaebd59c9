//! What a trainer says of its policy in the ledger, and when.

use std::time::{Duration, Instant};

use chorus_protocol::Verified;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::policy::Version;

/// Between two notices of new versions at least: a trainer may publish many a second, and every node hears of each notice.
const PACE: Duration = Duration::from_secs(30);
/// After this long it is said again without any news: half of the hour that an entry of this kind lives.
const RENEW: Duration = Duration::from_secs(30 * 60);

/// Returns whether more versions will come of a policy, by what its owner says.
pub(crate) fn is_trained(entry: &Verified<Entry>) -> Option<bool> {
    match &entry.body {
        Body::Policy(notice) => Some(notice.running),
        _ => None,
    }
}

/// What was said last, and when.
#[derive(Debug, Default)]
pub(super) struct Notices {
    last: Option<(Instant, Version, bool)>,
}

impl Notices {
    /// Returns whether something is to be said. That a run has ended, or goes on again, does not wait.
    pub(super) fn is_due(&self, now: Instant, version: Version, running: bool) -> bool {
        let Some((at, said, ran)) = self.last else { return true };
        let since = now.saturating_duration_since(at);
        ran != running || (said != version && since >= PACE) || since >= RENEW
    }

    /// Notes what was said.
    pub(super) fn said(&mut self, now: Instant, version: Version, running: bool) {
        self.last = Some((now, version, running));
    }
}

#[cfg(test)]
mod tests {
    use chorus_protocol::Hash;

    use super::*;

    #[test]
    fn news_are_paced_and_what_is_old_is_renewed_and_an_end_is_said_at_once() {
        let version = |n| Version::from_hash(Hash::from_bytes([n; 32]));
        let (mut notices, start) = (Notices::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(notices.is_due(start, version(1), true), "the first version");
        notices.said(start, version(1), true);
        assert!(!notices.is_due(after(29), version(2), true));
        assert!(notices.is_due(after(30), version(2), true));
        assert!(!notices.is_due(after(1_799), version(1), true), "nothing is new");
        assert!(notices.is_due(after(1_800), version(1), true), "it would expire");
        assert!(notices.is_due(after(1), version(2), false), "the end");
        notices.said(after(1), version(2), false);
        assert!(!notices.is_due(after(60), version(2), false), "the end is said once");
    }
}
