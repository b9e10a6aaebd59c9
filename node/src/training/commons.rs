//! What sampler and trainer share in a room: the sessions, the disk, and the broadcast of versions.
//!
//! ```text
//!  bulk events ─▶ Commons ─▶ Broadcast ──Send, SendChunk──▶ sessions, disk
//!                    │                 ──Keep, Store──────▶ disk ──Done──▶ Broadcast
//!                    └─ Ready(manifest) ─▶ the role: load it
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use chorus_core::Command;
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::bounded::List;
use chorus_protocol::entry::Body;
use chorus_protocol::policy::{Manifest, PolicyId, Version};
use chorus_protocol::rollout::{Bulk, Hello};
use chorus_protocol::{Admitted, NetworkId, NodeId, SecretKey, Verified};
use chorus_rollout::broadcast::{Broadcast, BroadcastEffect, BroadcastFault, BroadcastInput};
use serde_json::{Value, json};

use super::disk::{Disk, Done, Job};
use super::library::Library;
use super::sessions::Sessions;
use crate::driver::{NodeHandle, wall};

/// See the module.
pub(super) struct Commons {
    pub(super) me: NodeId,
    pub(super) key: SecretKey,
    pub(super) network: NetworkId,
    pub(super) policy: PolicyId,
    pub(super) sessions: Sessions,
    pub(super) disk: Disk,
    pub(super) library: Library,
    pub(super) broadcast: Broadcast,
    node: NodeHandle,
    rng: Rng,
    epoch: Instant,
    manifests: BTreeMap<Version, Admitted<Manifest>>,
    /// Chunks on their way out, by the token that says when they have left.
    leaving: BTreeMap<u64, (NodeId, Version, u32)>,
    next_token: u64,
    strikes: u64,
    pub(super) chunk_bytes: (u64, u64),
}

impl Commons {
    #[allow(clippy::too_many_arguments, reason = "the parts of a room, each named by its type")]
    pub(super) fn new(
        key: SecretKey,
        network: NetworkId,
        policy: PolicyId,
        sessions: Sessions,
        disk: Disk,
        library: Library,
        broadcast: Broadcast,
        node: NodeHandle,
        rng: Rng,
        epoch: Instant,
    ) -> Self {
        Self {
            me: key.node_id(),
            key,
            network,
            policy,
            sessions,
            disk,
            library,
            broadcast,
            node,
            rng,
            epoch,
            manifests: BTreeMap::new(),
            leaving: BTreeMap::new(),
            next_token: 0,
            strikes: 0,
            chunk_bytes: (0, 0),
        }
    }

    pub(super) fn is_owner(&self) -> bool {
        self.me == self.policy.owner
    }

    /// Writes an entry into the ledger. Returns whether the node takes it; if not, it has enough to do, and is asked again.
    pub(super) fn append(&self, body: Body) -> bool {
        self.node.try_command(Command::Append(Box::new(body)))
    }

    /// Runs a machine's step with this room's clock and randomness.
    pub(super) fn with<T>(&mut self, work: impl FnOnce(&mut Ctx<'_>) -> T) -> T {
        work(&mut Ctx { now: clock(self.epoch), wall: wall(), rng: &mut self.rng })
    }

    /// Returns the time by this room's clock.
    pub(super) fn now(&self) -> Time {
        clock(self.epoch)
    }

    /// Returns how long a machine's deadline is away.
    pub(super) fn until(&self, deadline: Time) -> std::time::Duration {
        deadline.since(clock(self.epoch))
    }

    /// Tells the broadcast something. Returns the versions that became whole by it.
    #[must_use]
    pub(super) fn tell(&mut self, input: BroadcastInput) -> Vec<Admitted<Manifest>> {
        let mut inputs = VecDeque::from([input]);
        let mut ready = Vec::new();
        while let Some(input) = inputs.pop_front() {
            let mut out = Outbox::new();
            let mut cx = Ctx { now: clock(self.epoch), wall: wall(), rng: &mut self.rng };
            self.broadcast.handle(&mut cx, input, &mut out);
            self.carry_out(out, &mut inputs, &mut ready);
        }
        ready
    }

    /// Does what is due in the broadcast.
    #[must_use]
    pub(super) fn expire(&mut self) -> Vec<Admitted<Manifest>> {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: clock(self.epoch), wall: wall(), rng: &mut self.rng };
        self.broadcast.expire(&mut cx, &mut out);
        let (mut inputs, mut ready) = (VecDeque::new(), Vec::new());
        self.carry_out(out, &mut inputs, &mut ready);
        for input in inputs {
            ready.extend(self.tell(input));
        }
        ready
    }

    fn carry_out(
        &mut self,
        mut out: Outbox<BroadcastEffect>,
        inputs: &mut VecDeque<BroadcastInput>,
        ready: &mut Vec<Admitted<Manifest>>,
    ) {
        for effect in out.drain() {
            match effect {
                BroadcastEffect::Send { to, message } => {
                    self.sessions.send(to, &message, None);
                }
                BroadcastEffect::SendChunk { to, version, index } => {
                    let job = self.manifest(version).map(|manifest| Job::Read { to, manifest, index });
                    if job.is_none_or(|job| self.disk.submit(job).is_err()) {
                        self.sessions.send(to, &Bulk::NoChunk { version, index }, None);
                        inputs.push_back(BroadcastInput::NotSent { to, version, index });
                    }
                }
                BroadcastEffect::Keep(manifest) => {
                    self.manifests.insert(manifest.version, manifest.clone());
                    // If there is no place for this, there is none for the chunks, and they are asked for again.
                    let _ = self.disk.submit(Job::Keep(Box::new(manifest)));
                }
                BroadcastEffect::Store { version, index, bytes } => {
                    let job = self.manifest(version).map(|manifest| Job::Store { manifest, index, bytes });
                    if job.is_none_or(|job| self.disk.submit(job).is_err()) {
                        inputs.push_back(BroadcastInput::StoreFailed { version, index });
                    }
                }
                BroadcastEffect::Ready(manifest) => ready.push(manifest),
                BroadcastEffect::Forget(version) => {
                    self.manifests.remove(&version);
                    let _ = self.disk.submit(Job::Forget(version));
                }
                BroadcastEffect::Strike { peer, fault } => self.strike(peer, &fault),
            }
        }
    }

    fn manifest(&self, version: Version) -> Option<Box<Admitted<Manifest>>> {
        self.manifests.get(&version).cloned().map(Box::new)
    }

    fn strike(&mut self, peer: NodeId, fault: &BroadcastFault) {
        self.strikes += 1;
        tracing::warn!(peer = %peer.fmt_short(), %fault, "a neighbour is at fault");
        // What it says of other versions is worth nothing either. It may come back and behave.
        self.sessions.close(peer);
    }

    /// Takes a finished piece of work of the disk, if it is one of the broadcast's.
    pub(super) fn disk_done(&mut self, done: Done) -> Result<Vec<Admitted<Manifest>>, Done> {
        match done {
            Done::Stored { version, index, ok: true } => Ok(self.tell(BroadcastInput::Stored { version, index })),
            Done::Stored { version, index, ok: false } => Ok(self.tell(BroadcastInput::StoreFailed { version, index })),
            Done::Read { to, version, index, bytes } => Ok(self.send_chunk(to, version, index, bytes)),
            other => Err(other),
        }
    }

    fn send_chunk(
        &mut self,
        to: NodeId,
        version: Version,
        index: u32,
        bytes: Option<Vec<u8>>,
    ) -> Vec<Admitted<Manifest>> {
        if let Some(bytes) = bytes.and_then(|bytes| List::new(bytes).ok()) {
            self.chunk_bytes.0 += bytes.len() as u64;
            self.next_token += 1;
            if self.sessions.send(to, &Bulk::Chunk { version, index, bytes }, Some(self.next_token)) {
                self.leaving.insert(self.next_token, (to, version, index));
                return Vec::new();
            }
        } else {
            self.sessions.send(to, &Bulk::NoChunk { version, index }, None);
        }
        self.tell(BroadcastInput::NotSent { to, version, index })
    }

    /// A message has left.
    pub(super) fn sent(&mut self, token: u64) -> Vec<Admitted<Manifest>> {
        match self.leaving.remove(&token) {
            Some((to, version, index)) => self.tell(BroadcastInput::Sent { to, version, index }),
            None => Vec::new(),
        }
    }

    /// A neighbour is there and speaks of this policy.
    pub(super) fn peer_up(&mut self, node: NodeId) -> Vec<Admitted<Manifest>> {
        self.tell(BroadcastInput::PeerUp(node))
    }

    /// A neighbour is gone.
    pub(super) fn peer_down(&mut self, node: NodeId) -> Vec<Admitted<Manifest>> {
        self.leaving.retain(|_, (to, _, _)| *to != node);
        self.tell(BroadcastInput::PeerDown(node))
    }

    /// Publishes a version whose files are on disk. One that is published already, because an update changed no weight, is not published
    /// again: the trainer's credit says which step it stands for.
    pub(super) fn publish(&mut self, manifest: Manifest) -> Result<(), String> {
        if self.manifests.contains_key(&manifest.version) {
            return Ok(());
        }
        let signed = Verified::sign(&self.key, &self.network, manifest).map_err(|error| error.to_string())?;
        let admitted = Manifest::admit(signed.clone()).map_err(|error| error.to_string())?;
        self.manifests.insert(admitted.version, admitted.clone());
        self.disk.submit(Job::Keep(Box::new(admitted))).map_err(|_| "the disk does not keep up".to_owned())?;
        // The owner's own version needs no loading.
        let _ = self.tell(BroadcastInput::Publish(signed));
        Ok(())
    }

    /// Gives the broadcast what is on disk. Returns the newest version that is whole.
    pub(super) fn resume(&mut self, found: Vec<(Verified<Manifest>, Vec<u32>)>) -> Option<Admitted<Manifest>> {
        for (manifest, chunks) in found {
            let Ok(admitted) = Manifest::admit(manifest.clone()) else { continue };
            self.manifests.insert(admitted.version, admitted);
            // What this makes ready is what is returned below.
            let _ = self.tell(BroadcastInput::Resume { manifest, chunks });
        }
        self.broadcast.newest_whole().cloned()
    }

    /// Says hello to a node that is no trainer.
    pub(super) fn greet(&mut self, node: NodeId) {
        let hello = Hello { policy: self.policy.clone(), serving: None, slots: 0, first_unacknowledged: 1, boot: 0 };
        if self.sessions.must_greet(node) {
            self.sessions.send(node, &Bulk::Hello(hello), None);
        }
    }

    /// Returns what everybody's status holds.
    pub(super) fn status(&self) -> Value {
        let weights = self.broadcast.status();
        let version = |(version, step): (Version, u64)| json!({ "version": version, "step": step });
        let arriving = weights
            .arriving
            .map(|(version, step, have, of)| json!({ "version": version, "step": step, "chunks": have, "of": of }));
        let connected = self.sessions.connected();
        json!({
            "policy": self.policy.to_string(),
            "name": self.policy.name,
            "owner": self.policy.owner,
            "whole": weights.whole.map(version),
            "arriving": arriving,
            "weights_wait_for": weights.awaits.to_string(),
            "connected": connected.map(|(node, way)| json!({ "node": node, "way": format!("{way:?}") })).collect::<Vec<_>>(),
            "chunks_sent": weights.sent,
            "chunks_wasted": weights.wasted,
            "strikes": self.strikes,
        })
    }
}

fn clock(epoch: Instant) -> Time {
    Time::from_nanos(u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
}
