//! What must never happen in a training run, checked while it could.
//!
//! | rule | how it is checked |
//! |---|---|
//! | counted once | no group is in two batches of one history of weights, no member twice in a group, no place in a group acknowledged for two rollouts |
//! | within `S` | every rollout of every batch: its oldest version, by the step under which it was published |
//! | nothing acknowledged is lost | a frame is on the trainer's disk when its acknowledgement leaves, and stays there until a checkpoint holds weights that learned from it; after a restart the buffer holds all of it; a batch has the very rollout that was acknowledged, or after a restart another one that is on disk for its place |
//! | only what was sampled | every rollout of every batch is what its sampler's engine says under that version |
//! | whole versions | a version that is called whole, loaded or begun with has every chunk on disk, each with the manifest's hash |
//! | all accounted for | at the end each rollout that was sampled counted, was refused with a reason, died with its sampler, or is under way |
//! | no work without a lease | whoever is given members holds a lease of the trainer at that moment |
//! | bounded turns | no machine wants turn after turn at one moment |
//!
//! A trainer that crashes forgets the updates since its checkpoint; what they used counts again, and only once again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use chorus_machine::Time;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, Refusal, RolloutFrame};
use chorus_protocol::{Hash, NodeId, Verified};
use chorus_rollout::buffer::{Batch, FrameKey};

use super::disk::Disk;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Counted once.
    CountedOnce,
    /// Within `S`.
    WithinStaleness,
    /// Nothing acknowledged is lost.
    NothingAcknowledgedIsLost,
    /// Only what was sampled.
    OnlyWhatWasSampled,
    /// Whole versions.
    WholeVersions,
    /// All accounted for.
    AllAccountedFor,
    /// No work without a lease.
    NoWorkWithoutLease,
    /// Bounded turns.
    BoundedTurns,
}

/// A rule that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// When, in the world's time.
    pub at: Time,
    /// Where: 0 is the trainer.
    pub place: u32,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} broken at {} on node {}: {}", self.rule, self.at, self.place, self.seen)
    }
}

/// A place in a group.
type Slot = (GroupId, u16);

/// A rollout that was acknowledged as counting.
#[derive(Clone, Debug)]
struct Owed {
    key: FrameKey,
    version: Version,
    /// The trainer restarted, and its disk has other frames with a rollout for the same place: each of them is as good, and all but one
    /// may go.
    rivals: Vec<(FrameKey, Version)>,
}

/// Where a frame stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Cut,
    Acknowledged,
    Died,
}

/// A frame that was made.
#[derive(Clone, Copy, Debug)]
struct Cut {
    rollouts: u64,
    hash: Hash,
    fate: Fate,
    /// A frame before it had its number, and was acknowledged.
    again: bool,
}

/// What became of rollouts.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) sampled: u64,
    /// Acknowledged as counting.
    pub(super) counted: u64,
    /// Refused, by reason, as acknowledged.
    pub(super) refused: BTreeMap<Refusal, u64>,
    /// Counted, and then too old before they were used.
    pub(super) went_stale: u64,
    /// Died with the memory or the disk of a sampler.
    pub(super) died: u64,
    /// Frames that were refused for a while, by reason.
    pub(super) nacks: BTreeMap<Refusal, u64>,
}

/// Watches one world.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    staleness: u64,
    batch: usize,
    members: usize,
    pub(super) tally: Tally,
    /// Published versions and their steps.
    versions: BTreeMap<Version, u64>,
    /// Groups that the weights learned from, and the step that they were at.
    trained: BTreeMap<GroupId, u64>,
    frames: BTreeMap<FrameKey, Cut>,
    /// Rollouts that the running trainer took, of frames that it did not acknowledge yet.
    judged: BTreeMap<FrameKey, Vec<(Slot, Version)>>,
    /// Acknowledged, and not learned from.
    owed: BTreeMap<Slot, Owed>,
    /// Learned from since the last checkpoint, by the step that the weights were at.
    spent: BTreeMap<u64, Vec<(Slot, Owed)>>,
    /// How many rollouts of a frame are owed or spent.
    needed: BTreeMap<FrameKey, u64>,
    violation: Option<Violation>,
}

impl Monitor {
    /// Makes the monitor of a run with the bound `staleness` and batches of `batch` groups of `members`.
    pub(super) fn new(staleness: u64, batch: usize, members: usize) -> Self {
        Self { staleness, batch, members, ..Self::default() }
    }

    /// Notes that a rule is broken; the first one stays.
    pub(super) fn broken(&mut self, rule: Rule, at: Time, place: u32, seen: String) {
        self.violation.get_or_insert(Violation { rule, at, place, seen });
    }

    pub(super) fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// A version is published.
    pub(super) fn published(&mut self, version: Version, step: u64) {
        self.versions.insert(version, step);
    }

    /// A sampler made a frame. Returns whether it is a new one: one that its disk refused is written again. A number that comes again
    /// belonged to a frame that died before it was on disk, or to one that is settled.
    pub(super) fn cut(&mut self, key: FrameKey, frame: &Verified<RolloutFrame>) -> bool {
        let known = self.frames.get(&key);
        if known.is_some_and(|known| known.hash == frame.hash()) {
            return false;
        }
        let again = known.is_some_and(|known| known.again || known.fate == Fate::Acknowledged);
        let cut = Cut { rollouts: frame.len() as u64, hash: frame.hash(), fate: Fate::Cut, again };
        self.frames.insert(key, cut);
        true
    }

    /// A sampler's process died: what is in no frame on its disk is gone; all of it, if the machine never comes back.
    pub(super) fn sampler_died(&mut self, sampler: NodeId, uncut: u64, disk: &Disk, for_ever: bool) {
        self.tally.died += uncut;
        let all = FrameKey { sampler, sequence: 0 }..=FrameKey { sampler, sequence: u64::MAX };
        for (key, cut) in self.frames.range_mut(all) {
            if cut.fate == Fate::Cut && (for_ever || !disk.frames.contains_key(key)) {
                cut.fate = Fate::Died;
                self.tally.died += cut.rollouts;
            }
        }
    }

    /// The trainer took some of a frame's rollouts, and writes it.
    pub(super) fn judged(&mut self, frame: &RolloutFrame, key: FrameKey, refused: &BTreeSet<Slot>) {
        let all = slots(frame).filter(|(slot, _)| !refused.contains(slot));
        self.judged.insert(key, all.collect());
    }

    /// A frame could not be written: nothing of it was taken.
    pub(super) fn not_written(&mut self, key: &FrameKey) {
        self.judged.remove(key);
    }

    /// An acknowledgement leaves the trainer. `came` is the frame that it answers, unless it answers the disk, and whether some of it
    /// was refused just now.
    pub(super) fn acknowledged(
        &mut self,
        now: Time,
        key: FrameKey,
        (taken, refused): (u32, &[(Refusal, u32)]),
        came: Option<(&Verified<RolloutFrame>, bool)>,
        disk: &Disk,
    ) {
        let judged = self.judged.remove(&key);
        let Some(cut) = self.frames.get(&key).copied() else { return };
        let rollouts = cut.rollouts;
        if taken > 0 && !disk.frames.contains_key(&key) {
            let seen = format!("frame {} of {:?} is acknowledged and not on disk", key.sequence, key.sampler);
            return self.broken(Rule::NothingAcknowledgedIsLost, now, 0, seen);
        }
        if cut.fate == Fate::Acknowledged {
            return;
        }
        let looked_at = judged.is_some() || came.is_some_and(|(_, refused)| refused);
        if cut.again && !looked_at && disk.frames.get(&key).is_none_or(|frame| frame.hash() != cut.hash) {
            let seen = format!("frame {} of {:?} is new, and was taken for an old one", key.sequence, key.sampler);
            return self.broken(Rule::NothingAcknowledgedIsLost, now, 0, seen);
        }
        let sum = u64::from(taken) + refused.iter().map(|(_, many)| u64::from(*many)).sum::<u64>();
        if sum != rollouts {
            let seen = format!("{sum} of {rollouts} rollouts of frame {} are accounted for", key.sequence);
            self.broken(Rule::AllAccountedFor, now, 0, seen);
        }
        self.frames.insert(key, Cut { fate: Fate::Acknowledged, ..cut });
        self.tally.counted += u64::from(taken);
        for (reason, many) in refused {
            *self.tally.refused.entry(*reason).or_default() += u64::from(*many);
        }
        match (judged, came) {
            (Some(slots), _) => slots
                .into_iter()
                .for_each(|(slot, version)| self.owe(now, slot, Owed { key, version, rivals: Vec::new() })),
            // The trainer restarted between the disk and the acknowledgement; what it took is known if it took all.
            (None, Some((frame, _))) if u64::from(taken) == rollouts => {
                let fresh: Vec<_> = slots(frame).filter(|(slot, _)| !self.trained.contains_key(&slot.0)).collect();
                fresh
                    .into_iter()
                    .for_each(|(slot, version)| self.owe(now, slot, Owed { key, version, rivals: Vec::new() }));
            }
            _ => {}
        }
    }

    fn owe(&mut self, now: Time, slot: Slot, owed: Owed) {
        *self.needed.entry(owed.key).or_default() += 1;
        let twice = self.owed.insert(slot, owed).is_some();
        if twice || self.trained.contains_key(&slot.0) {
            let seen = format!("member {} of group {} was acknowledged for two rollouts", slot.1, slot.0.0);
            self.broken(Rule::CountedOnce, now, 0, seen);
        }
    }

    /// What was taken is too old now, and is sampled anew.
    pub(super) fn went_stale(&mut self, slot: Slot) {
        self.tally.went_stale += 1;
        if let Some(owed) = self.owed.remove(&slot) {
            self.release(owed.key);
        }
        for slots in self.judged.values_mut() {
            slots.retain(|(other, _)| *other != slot);
        }
    }

    fn release(&mut self, key: FrameKey) {
        if let Some(many) = self.needed.get_mut(&key) {
            *many -= 1;
            if *many == 0 {
                self.needed.remove(&key);
            }
        }
    }

    /// The trainer deletes frames. What has a rival is owed by that one from then on.
    pub(super) fn forgotten(&mut self, now: Time, keys: &[FrameKey]) {
        let spent = self.spent.values_mut().flatten().map(|(_, owed)| owed);
        for owed in self.owed.values_mut().chain(spent) {
            owed.rivals.retain(|(rival, _)| !keys.contains(rival));
            if keys.contains(&owed.key)
                && let Some((rival, version)) = owed.rivals.pop()
            {
                *self.needed.entry(rival).or_default() += 1;
                owed.version = version;
                let before = std::mem::replace(&mut owed.key, rival);
                self.needed.entry(before).and_modify(|many| *many -= 1);
            }
        }
        self.needed.retain(|_, many| *many > 0);
        if let Some(key) = keys.iter().find(|key| self.needed.contains_key(key)) {
            let seen =
                format!("frame {} of {:?} is deleted, and no checkpoint learned from it", key.sequence, key.sampler);
            self.broken(Rule::NothingAcknowledgedIsLost, now, 0, seen);
        }
    }

    /// The learner gets a batch. `says` is what an engine with a version says to a place in a group.
    pub(super) fn batch(&mut self, now: Time, batch: &Batch, says: impl Fn(Slot, Version) -> Vec<u32>) {
        let problem = self.look_at(batch, says);
        if let Some((rule, seen)) = problem {
            self.broken(rule, now, 0, format!("batch of step {}: {seen}", batch.step));
        }
        for group in &batch.groups {
            self.trained.insert(group.id, batch.step);
            for (_, _, rollout) in &group.rollouts {
                if let Some(owed) = self.owed.remove(&(group.id, rollout.member)) {
                    self.spent.entry(batch.step).or_default().push(((group.id, rollout.member), owed));
                }
            }
        }
    }

    fn look_at(&self, batch: &Batch, says: impl Fn(Slot, Version) -> Vec<u32>) -> Option<(Rule, String)> {
        if batch.groups.len() != self.batch {
            return Some((Rule::CountedOnce, format!("{} groups", batch.groups.len())));
        }
        for group in &batch.groups {
            let id = group.id.0;
            if let Some(step) = self.trained.get(&group.id) {
                return Some((Rule::CountedOnce, format!("group {id} was used at step {step}")));
            }
            let members: BTreeSet<u16> = group.rollouts.iter().map(|(_, _, rollout)| rollout.member).collect();
            if members.len() != self.members || group.rollouts.len() != self.members {
                return Some((Rule::CountedOnce, format!("group {id} has members {members:?}")));
            }
            for (sampler, lag, rollout) in &group.rollouts {
                let slot = (group.id, rollout.member);
                let versions: Vec<Version> = rollout.segments.iter().map(|segment| segment.version).collect();
                let step = versions.iter().map(|version| self.versions.get(version).copied()).min().flatten();
                let Some(step) = step else {
                    return Some((Rule::WithinStaleness, format!("{slot:?} is of a version that was never published")));
                };
                if batch.step.checked_sub(step) != Some(*lag) || *lag > self.staleness {
                    return Some((Rule::WithinStaleness, format!("{slot:?} is of step {step}, with lag {lag}")));
                }
                if says(slot, versions[0]) != rollout.completion {
                    return Some((Rule::OnlyWhatWasSampled, format!("{slot:?} is not what {sampler:?} sampled")));
                }
                if let Some(owed) = self.owed.get(&slot).filter(|owed| owed.rivals.is_empty())
                    && (owed.key.sampler != *sampler || owed.version != versions[0])
                {
                    let seen = format!("{slot:?} was acknowledged to {:?} and is {sampler:?}'s", owed.key.sampler);
                    return Some((Rule::NothingAcknowledgedIsLost, seen));
                }
            }
        }
        None
    }

    /// A checkpoint of that step is on disk.
    pub(super) fn checkpointed(&mut self, step: u64) {
        let later = self.spent.split_off(&step);
        for (_, owed) in std::mem::replace(&mut self.spent, later).into_values().flatten() {
            self.release(owed.key);
        }
    }

    /// The trainer died: what it learned since the checkpoint on its disk never was.
    pub(super) fn trainer_died(&mut self, step: u64) {
        self.checkpointed(step);
        self.judged.clear();
        self.trained.retain(|_, at| *at < step);
        self.owed.extend(std::mem::take(&mut self.spent).into_values().flatten());
    }

    /// The trainer is back with so many rollouts. Returns how many it owes.
    pub(super) fn restored(&mut self, now: Time, held: usize, disk: &Disk) -> u64 {
        if let Some((slot, owed)) = self.owed.iter().find(|(_, owed)| !disk.frames.contains_key(&owed.key)) {
            let seen = format!("{slot:?} was acknowledged, and frame {} is not on disk", owed.key.sequence);
            self.broken(Rule::NothingAcknowledgedIsLost, now, 0, seen);
        }
        let all =
            disk.frames.iter().flat_map(|(key, frame)| slots(frame).map(move |(slot, version)| (*key, slot, version)));
        for (key, slot, version) in all {
            if let Some(owed) = self.owed.get_mut(&slot)
                && owed.key != key
                && !owed.rivals.contains(&(key, version))
            {
                owed.rivals.push((key, version));
            }
        }
        if held < self.owed.len() {
            let seen = format!("{} rollouts were acknowledged, and {held} are held after the restart", self.owed.len());
            self.broken(Rule::NothingAcknowledgedIsLost, now, 0, seen);
        }
        self.owed.len() as u64
    }

    /// Rollouts in frames that are neither acknowledged nor gone.
    pub(super) fn under_way(&self) -> u64 {
        self.frames.values().filter(|cut| cut.fate == Fate::Cut).map(|cut| cut.rollouts).sum()
    }

    /// Looks at the sums, once nothing happens any more. `uncut` rollouts are in no frame yet.
    pub(super) fn check_sums(&mut self, now: Time, uncut: u64) {
        let tally = &self.tally;
        let refused: u64 = tally.refused.values().sum();
        let known = tally.counted + refused + tally.died + uncut + self.under_way();
        if known != tally.sampled {
            let seen = format!("{} rollouts were sampled, and {known} are accounted for: {tally:?}", tally.sampled);
            self.broken(Rule::AllAccountedFor, now, 0, seen);
        }
    }
}

fn slots(frame: &RolloutFrame) -> impl Iterator<Item = (Slot, Version)> + '_ {
    frame.rollouts().map(|view| {
        let first = view.segments().next().map(|segment| segment.version).unwrap_or_default();
        ((view.group(), view.member()), first)
    })
}
