//! The world looks at itself: bounds of queues, overdue tasks, whether ledgers agree, and what must hold at the end.

use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::Hash;

use crate::adversary::AdversaryKind;
use crate::host::Host;
use crate::invariant::Invariant;
use crate::queue::Event;
use crate::world::{LOOK_EVERY, World};

/// Queues are looked at every so many looks.
const BOUNDS_EVERY: u64 = 10;
/// Own entries that may wait for the disk (the ledger's own limit).
const MAX_PENDING_APPENDS: usize = 256;
/// Received entries that may wait for verification.
const MAX_INBOX: usize = 16_384;
/// Batches that may wait for the disk.
const MAX_DISK_WAITING: usize = 65_536;
/// Effects that one turn may have: one for every node, and then some.
const MAX_EFFECTS: u64 = 65_536;

impl World {
    pub(crate) fn look(&mut self) {
        self.stats.looks += 1;
        self.monitor.check_due(self.now);
        if self.stats.looks.is_multiple_of(BOUNDS_EVERY) {
            self.check_bounds();
        }
        self.compare_ledgers();
        self.queue.push(self.now + LOOK_EVERY, Event::Look);
    }

    fn check_bounds(&mut self) {
        let (max_jobs, now) = (self.config.beacon.max_jobs, self.now);
        let broken = self
            .hosts
            .iter()
            .filter(|host| host.is_honest())
            .find_map(|host| over_bounds(host, max_jobs).map(|seen| (host.index, seen)));
        if let Some((host, seen)) = broken {
            self.monitor.broken(Invariant::BoundedQueues, now, host, seen);
        }
        if self.stats.most_effects > MAX_EFFECTS {
            let seen = format!("a turn had {} effects", self.stats.most_effects);
            self.monitor.broken(Invariant::BoundedQueues, now, 0, seen);
        }
    }

    /// Honest nodes that run and are in one piece: those whose ledgers should agree.
    fn comparable(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter().filter(|host| host.is_honest() && host.is_up())
    }

    fn compare_ledgers(&mut self) {
        let mut digests = self.comparable().filter_map(|host| host.node.as_ref()).map(|node| node.ledger().digest());
        let first: Option<Hash> = digests.next();
        let equal = first.is_some() && self.links.is_whole() && digests.all(|digest| Some(digest) == first);
        drop(digests);
        if equal {
            self.equal_since.get_or_insert(self.now);
        } else {
            self.equal_since = None;
        }
    }

    /// Returns how long it took until all ledgers were equal, after the last thing that changed one; `None` if they differ.
    pub(crate) fn convergence(&self) -> Option<Duration> {
        self.equal_since.map(|since| since - self.last_change)
    }

    /// What must hold when everything has come to rest.
    pub(crate) fn check_at_end(&mut self) {
        let now = self.now;
        let holders: Vec<usize> = self.comparable().map(|host| host.index as usize).collect();
        // Equal digests are equal sets, so one of them speaks for all; otherwise everybody is asked about itself.
        let agreed = self.equal_since.is_some();
        for &author in &holders {
            let holder = &self.hosts[if agreed { holders[0] } else { author }];
            let Some(node) = &holder.node else { continue };
            let wall = holder.clock.wall(now);
            self.monitor.check_holds(self.hosts[author].index, holder.index, node.ledger(), wall, now);
        }
        for &holder in holders.iter().take(if agreed { 1 } else { holders.len() }) {
            if let Some(node) = &self.hosts[holder].node {
                self.monitor.check_forged(self.hosts[holder].index, node.ledger(), now);
            }
        }
    }

    /// Returns how many pairs of an honest node that runs and an equivocator are without a conviction.
    pub(crate) fn unconvicted(&self) -> usize {
        let is_equivocator = |host: &&Host| {
            host.adversary.as_ref().is_some_and(|adversary| adversary.kind() == AdversaryKind::Equivocator)
        };
        let frauds: Vec<_> = self.hosts.iter().filter(is_equivocator).map(|host| host.id).collect();
        let ledgers = self.comparable().filter_map(|host| host.node.as_ref()).map(|node| node.ledger());
        ledgers.map(|ledger| frauds.iter().filter(|fraud| !ledger.is_quarantined(fraud)).count()).sum()
    }

    /// Returns when the swarm had found itself, so that a new entry could be expected to reach everybody.
    pub(crate) fn settled_at(&self) -> Time {
        let loaded = Duration::from_secs_f64(self.scenario.swarm.load_ms[1] / 1_000.0);
        Time::from_millis(self.scenario.swarm.start_within_ms) + loaded + Duration::from_secs(1)
    }
}

fn over_bounds(host: &Host, max_jobs: usize) -> Option<String> {
    let node = host.node.as_ref()?;
    let ledger = node.ledger().stats();
    let (executor, requester) = (node.executor(), node.requester());
    let slots = host.capability.as_ref().map_or(0, |capability| usize::from(capability.slots));
    let taken = executor.runs().count() + executor.reserved();
    let rules = [
        (ledger.pending_appends, MAX_PENDING_APPENDS, "own entries wait for the disk"),
        (ledger.inbox, MAX_INBOX, "entries wait for verification"),
        (host.disk.waiting(), MAX_DISK_WAITING, "batches wait for the disk"),
        (requester.jobs().count(), max_jobs, "jobs are under way"),
        (taken, slots, "slots are taken"),
        (host.engine.active(), slots, "runs are under way"),
    ];
    let over = rules.into_iter().find(|(count, most, _)| count > most);
    over.map(|(count, most, what)| format!("{count} {what}, and {most} may"))
}
