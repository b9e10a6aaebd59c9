//! Frames that the trainer has not acknowledged: on disk, a few of them in memory.

use std::collections::{BTreeMap, BTreeSet};

use chorus_machine::{Outbox, Time, earliest};
use chorus_protocol::Verified;
use chorus_protocol::rollout::{Bulk, RolloutFrame};

use super::SamplerEffect;

/// Where a frame stands.
#[derive(Debug)]
enum Place {
    /// On its way to the disk.
    Writing(Verified<RolloutFrame>),
    /// The disk did not take it; once more at that time.
    Unwritten(Verified<RolloutFrame>, Time),
    /// On disk, and still at hand.
    Ready(Verified<RolloutFrame>),
    /// On disk alone.
    Stored,
    /// On its way from the disk.
    Loading,
    /// Sent on this connection.
    Sent,
    /// The trainer did not take it; once more at that time.
    Refused(Time),
}

#[derive(Debug)]
struct Entry {
    place: Place,
    bytes: usize,
    rollouts: u32,
}

#[derive(Debug)]
pub(super) struct Spool {
    entries: BTreeMap<u64, Entry>,
    next: u64,
    bytes: usize,
    /// Frames that count against the window: sent, or on their way from the disk.
    flying: BTreeSet<u64>,
}

impl Spool {
    pub(super) fn new(found: &[(u64, usize, u32)]) -> Self {
        let entry = |(sequence, bytes, rollouts): &(u64, usize, u32)| {
            (*sequence, Entry { place: Place::Stored, bytes: *bytes, rollouts: *rollouts })
        };
        let entries: BTreeMap<u64, Entry> = found.iter().map(entry).collect();
        let next = entries.last_key_value().map_or(1, |(sequence, _)| sequence + 1);
        let bytes = entries.values().map(|entry| entry.bytes).sum();
        Self { entries, next, bytes, flying: BTreeSet::new() }
    }

    pub(super) fn first_unacknowledged(&self) -> u64 {
        self.entries.first_key_value().map_or(self.next, |(sequence, _)| *sequence)
    }

    /// The trainer has settled all before `first`: numbers go on from there, should this node have lost its own count.
    pub(super) fn trainer_has(&mut self, first: u64) {
        self.next = self.next.max(first);
    }

    pub(super) fn next_sequence(&self) -> u64 {
        self.next
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }

    pub(super) fn disk_failed(&self) -> bool {
        self.entries.values().any(|entry| matches!(entry.place, Place::Unwritten(..)))
    }

    pub(super) fn write(&mut self, sequence: u64, frame: Verified<RolloutFrame>, rollouts: usize) {
        let bytes = frame.encoded_len();
        self.bytes += bytes;
        self.next = sequence + 1;
        let rollouts = u32::try_from(rollouts).unwrap_or(u32::MAX);
        self.entries.insert(sequence, Entry { place: Place::Writing(frame), bytes, rollouts });
    }

    pub(super) fn persisted(&mut self, sequence: u64) {
        if let Some(entry) = self.entries.get_mut(&sequence)
            && let Place::Writing(frame) = &entry.place
        {
            entry.place = Place::Ready(frame.clone());
        }
    }

    pub(super) fn persist_failed(&mut self, sequence: u64, again: Time) {
        if let Some(entry) = self.entries.get_mut(&sequence)
            && let Place::Writing(frame) = &entry.place
        {
            entry.place = Place::Unwritten(frame.clone(), again);
        }
    }

    /// Takes a frame from the disk. Returns how many rollouts are lost when it is not there any more.
    pub(super) fn loaded(&mut self, sequence: u64, frame: Option<Verified<RolloutFrame>>) -> Option<u32> {
        let entry = self.entries.get_mut(&sequence).filter(|entry| matches!(entry.place, Place::Loading))?;
        self.flying.remove(&sequence);
        match frame {
            Some(frame) => {
                entry.place = Place::Ready(frame);
                None
            }
            None => self.remove(sequence),
        }
    }

    pub(super) fn load_failed(&mut self, sequence: u64, again: Time) {
        if self.entries.get(&sequence).is_some_and(|entry| matches!(entry.place, Place::Loading)) {
            self.retry(sequence, again);
        }
    }

    pub(super) fn acknowledged(&mut self, sequence: u64) -> bool {
        self.remove(sequence).is_some()
    }

    /// Returns how many rollouts were in it.
    pub(super) fn remove(&mut self, sequence: u64) -> Option<u32> {
        let entry = self.entries.remove(&sequence)?;
        self.flying.remove(&sequence);
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        Some(entry.rollouts)
    }

    pub(super) fn drop_oldest(&mut self) -> Option<(u64, u32)> {
        let sequence = *self.entries.first_key_value()?.0;
        self.remove(sequence).map(|rollouts| (sequence, rollouts))
    }

    pub(super) fn retry(&mut self, sequence: u64, at: Time) {
        self.flying.remove(&sequence);
        if let Some(entry) = self.entries.get_mut(&sequence) {
            entry.place = Place::Refused(at);
        }
    }

    /// What was sent on the old connection may not have come.
    pub(super) fn reconnect(&mut self) {
        self.flying.clear();
        for entry in self.entries.values_mut() {
            if matches!(entry.place, Place::Sent | Place::Refused(_) | Place::Loading) {
                entry.place = Place::Stored;
            }
        }
    }

    pub(super) fn retry_at(&self) -> Option<Time> {
        let times = self.entries.values().map(|entry| match &entry.place {
            Place::Unwritten(_, at) | Place::Refused(at) => Some(*at),
            _ => None,
        });
        times.fold(None, earliest)
    }

    /// Writes again what the disk refused, and sends in order while the window has room; no window while there is no connection.
    pub(super) fn pump(&mut self, now: Time, window: Option<usize>, out: &mut Outbox<SamplerEffect>) {
        let mut room = window.unwrap_or(0).saturating_sub(self.flying.len());
        for (sequence, entry) in &mut self.entries {
            match &entry.place {
                Place::Unwritten(frame, at) if *at <= now => {
                    out.push(SamplerEffect::Persist { sequence: *sequence, frame: frame.clone() });
                    entry.place = Place::Writing(frame.clone());
                }
                Place::Refused(at) if *at <= now => entry.place = Place::Stored,
                _ => {}
            }
            match &entry.place {
                Place::Ready(frame) if room > 0 => {
                    out.push(SamplerEffect::Send(Bulk::Frame(frame.to_wire())));
                    entry.place = Place::Sent;
                }
                Place::Stored if room > 0 => {
                    out.push(SamplerEffect::Load(*sequence));
                    entry.place = Place::Loading;
                }
                // While the trainer is away, frames need no memory.
                Place::Ready(_) if window.is_none() => {
                    entry.place = Place::Stored;
                    continue;
                }
                _ => continue,
            }
            room -= 1;
            self.flying.insert(*sequence);
        }
    }
}
