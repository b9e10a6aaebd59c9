//! The shell around every node's part in the broadcast.

use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Admitted, List, policy::Manifest};
use chorus_rollout::broadcast::{Broadcast, BroadcastEffect, BroadcastInput};

use super::disk::Op;
use super::host::Process;
use super::invariant::Rule;
use super::session::Place;
use super::world::{Event, Mutant, World};

fn machine(process: &mut Process) -> Option<&mut Broadcast> {
    Some(&mut process.broadcast)
}

impl World {
    /// Lets a node's broadcast take a turn, and carries out what it wants.
    pub(super) fn broadcast(&mut self, place: Place, input: Option<BroadcastInput>) {
        for effect in self.turn(place, machine, input) {
            match effect {
                BroadcastEffect::Send { to, message } => {
                    self.send(place, self.places[&to], &message);
                }
                BroadcastEffect::SendChunk { to, version, index } => {
                    let to = self.places[&to];
                    self.ask_disk(place, Op::Read { to, version, index });
                }
                BroadcastEffect::Keep(manifest) => {
                    if self.mutant == Mutant::ServesEarly {
                        self.whole(place, &manifest);
                    }
                    self.ask_disk(place, Op::Manifest((*manifest).clone()));
                }
                BroadcastEffect::Store { version, index, bytes } => {
                    self.ask_disk(place, Op::Chunk { version, index, bytes: bytes.into_vec() });
                }
                BroadcastEffect::Ready(manifest) => self.whole(place, &manifest),
                BroadcastEffect::Forget(version) => self.ask_disk(place, Op::Forget(version)),
                BroadcastEffect::Strike { peer, fault } => {
                    let seen = format!("it strikes {peer:?}, which is honest: {fault}");
                    self.monitor.broken(Rule::WholeVersions, self.now, place, seen);
                }
            }
        }
        self.plan_wake(place);
    }

    /// A version is called whole: it must be, and is loaded.
    fn whole(&mut self, place: Place, manifest: &Admitted<Manifest>) {
        let (version, step) = (manifest.version, manifest.step);
        let host = &mut self.hosts[place as usize];
        if !host.disk.is_whole(version) {
            let seen = format!("{version:?} is called whole, and is not");
            self.monitor.broken(Rule::WholeVersions, self.now, place, seen);
        }
        if place > 0 {
            let before = host.whole.replace(host.whole.map_or(step, |before| before.max(step)));
            self.stats.arrived(before, step, self.now);
            self.load(place, version, step);
        }
    }

    /// A message about weights, from whoever is a neighbour.
    pub(super) fn weights_come(&mut self, place: Place, from: Place, message: Bulk) {
        let from = self.hosts[from as usize].id;
        self.broadcast(place, Some(BroadcastInput::Message { from, message }));
    }

    pub(super) fn neighbour(&mut self, place: Place, peer: Place, up: bool) {
        let peer = self.hosts[peer as usize].id;
        let input = if up { BroadcastInput::PeerUp(peer) } else { BroadcastInput::PeerDown(peer) };
        self.broadcast(place, Some(input));
    }

    pub(super) fn chunk_stored(&mut self, place: Place, version: Version, index: u32, taken: bool) {
        let input = match taken {
            true => BroadcastInput::Stored { version, index },
            false => BroadcastInput::StoreFailed { version, index },
        };
        self.broadcast(place, Some(input));
    }

    /// A chunk was read: it leaves, and the machine hears of it whatever became of it.
    pub(super) fn chunk_read(&mut self, place: Place, to: Place, version: Version, index: u32) {
        let found = self.hosts[place as usize].disk.chunks.get(&(version, index)).cloned();
        let Some(bytes) = found.and_then(|bytes| List::new(bytes).ok()) else {
            // It was deleted between the effect and the disk.
            let _ = self.send(place, to, &Bulk::NoChunk { version, index });
            let to = self.hosts[to as usize].id;
            return self.broadcast(place, Some(BroadcastInput::NotSent { to, version, index }));
        };
        let message = Bulk::Chunk { version, index, bytes };
        if place == 0 {
            self.stats.owner_chunks += 1;
        }
        let at = self.send(place, to, &message).unwrap_or(self.now);
        let life = self.hosts[place as usize].life;
        self.queue.push(at, Event::Left { place, life, chunk: (to, version, index) });
    }

    pub(super) fn left(&mut self, place: Place, life: u32, (to, version, index): (Place, Version, u32)) {
        if self.is_alive(place, life) {
            let to = self.hosts[to as usize].id;
            self.broadcast(place, Some(BroadcastInput::Sent { to, version, index }));
        }
    }
}
