//! Frames on their way: gossip, direct messages, connections.

use chorus_core::{Acceptance, Input, NetInput, RunId, Topic};
use chorus_machine::Machine;
use chorus_protocol::NodeId;
use chorus_protocol::message::{Direct, Frame};

use crate::adversary::{Attack, Means};
use crate::mutant::Mutant;
use crate::queue::{Event, HostId, Life};
use crate::world::World;

/// The first byte of a direct frame that belongs to a reconciliation.
const SYNC: u8 = 8;
/// The first byte of a direct frame that is a grant.
pub(crate) const GRANT: u8 = 2;
/// The first byte of a direct frame that is an outcome.
const OUTCOME: u8 = 6;

impl World {
    /// Gossips a frame to a host's peers: to all of them, or to those at even or odd places.
    pub(crate) fn publish(&mut self, index: HostId, topic: Topic, bytes: Vec<u8>, half: Option<bool>) {
        let Some(frame) = self.gossip.publish(index, topic, bytes, self.now) else { return };
        let running = self.hosts.iter().filter(|host| host.is_up()).count() as u64;
        let honest = self.hosts[index as usize].is_honest();
        self.stats.published(frame, topic, running, honest, self.now);
        let peers: Vec<HostId> = self.hosts[index as usize].peers.iter().copied().collect();
        let chosen =
            peers.into_iter().enumerate().filter(|(place, _)| half.is_none_or(|half| half == (place % 2 == 1)));
        self.hop(index, frame, chosen.map(|(_, peer)| peer));
        self.gossip.settle(frame);
    }

    fn hop(&mut self, index: HostId, frame: u32, to: impl Iterator<Item = HostId>) {
        let (links, now) = (&self.links, self.now);
        let reachable = to.filter(|peer| links.reach(index, *peer));
        let sent = self.gossip.hop(frame, index, reachable, now, links, &mut self.rng, &mut self.queue);
        self.hosts[index as usize].traffic.gossip += sent.bytes;
        self.stats.gossip_copies += sent.copies;
    }

    pub(crate) fn arrive_gossip(&mut self, index: HostId, from: HostId, frame: u32) {
        let host = &self.hosts[index as usize];
        let alive = host.is_up() && self.links.reach(from, index) && !host.graylist.contains(&from);
        if let Some((topic, bytes)) = self.gossip.arrive(frame, index, self.now, alive) {
            self.stats.gossip_deliveries += 1;
            let from_id = self.hosts[from as usize].id;
            if let Some(adversary) = &mut self.hosts[index as usize].adversary {
                adversary.hear_gossip(topic, &bytes);
            }
            let input = NetInput::Gossip { token: u64::from(frame), from: from_id, topic, bytes: bytes.to_vec() };
            self.delivering = Some((frame, from));
            self.turn(index, |node, cx, out| node.handle(cx, Input::Net(input), out));
            self.delivering = None;
        }
        self.gossip.settle(frame);
    }

    /// A node says whether a frame may be passed on. Only the frame that it is being given can be meant.
    pub(crate) fn verdict(&mut self, index: HostId, token: u64, acceptance: &Acceptance) {
        let Some((frame, from)) = self.delivering.filter(|(frame, _)| u64::from(*frame) == token) else { return };
        match acceptance {
            Acceptance::Accept => {
                self.stats.accepted(frame, self.now);
                let mesh = std::mem::take(&mut self.hosts[index as usize].mesh);
                self.hop(index, frame, mesh.iter().copied().filter(|peer| *peer != from));
                self.hosts[index as usize].mesh = mesh;
            }
            Acceptance::Ignore => self.stats.gossip_ignored += 1,
            Acceptance::Reject { .. } => {
                self.stats.gossip_rejected += 1;
                let tolerated = self.scenario.gossip.tolerated_rejects;
                let host = self.host(index);
                let rejects = host.rejects.entry(from).or_default();
                *rejects += 1;
                if *rejects >= tolerated {
                    host.graylist.insert(from);
                }
            }
        }
    }

    /// Sends a direct frame. Strangers connect first.
    pub(crate) fn send(&mut self, index: HostId, to: NodeId, bytes: Vec<u8>) {
        let (now, life) = (self.now, self.hosts[index as usize].life);
        let Some(target) = self.monitor.host(&to) else {
            self.queue.push(now, Event::SendFailed { host: index, life, to: index });
            return;
        };
        let len = bytes.len() as u64;
        let traffic = &mut self.hosts[index as usize].traffic;
        *(if bytes.first() == Some(&SYNC) { &mut traffic.sync } else { &mut traffic.jobs }) += len;
        self.stats.direct_frames += 1;
        let connected = self.hosts[index as usize].peers.contains(&target);
        let mut at = now;
        if !connected && (self.is_crowded(index) || self.is_crowded(target)) {
            let at = at + self.links.handshake(&mut self.rng);
            self.queue.push(at, Event::SendFailed { host: index, life, to: target });
            return;
        }
        if !connected {
            at = at + self.links.handshake(&mut self.rng);
            self.queue.push(at, Event::PeerUp { a: index, b: target });
        }
        at = at + self.links.stream(&mut self.rng);
        self.queue.push(at, Event::Direct { host: target, from: index, life, bytes });
    }

    pub(crate) fn arrive_direct(&mut self, index: HostId, from: HostId, life: Life, bytes: Vec<u8>) {
        if !self.hosts[index as usize].is_up() || !self.links.reach(from, index) {
            // A dead process resets the stream at once; a cut link says nothing.
            let cut = !self.links.reach(from, index);
            let delay = if cut { self.links.detect() } else { self.links.latency(&mut self.rng) };
            self.queue.push(self.now + delay, Event::SendFailed { host: from, life, to: index });
            return;
        }
        if !self.is_alive(from, life) {
            // The stream died with its sender.
            return;
        }
        self.hear(index, &bytes);
        let from = self.hosts[from as usize].id;
        self.turn(index, |node, cx, out| node.handle(cx, Input::Net(NetInput::Direct { from, bytes }), out));
    }

    /// Shows a direct frame to whoever listens: an adversary, or the monitor of an honest requester.
    fn hear(&mut self, index: HostId, bytes: &[u8]) {
        if let Some(adversary) = &mut self.hosts[index as usize].adversary {
            adversary.hear_direct(bytes);
            return;
        }
        if self.mutant == Mutant::RunsAnything
            && bytes.first() == Some(&GRANT)
            && let Ok(Direct::Grant { lease, .. }) = Direct::from_bytes(bytes)
            && let Ok(lease) = lease.verify(&self.network)
        {
            let run = RunId { job: lease.job, fence: lease.fence, requester: lease.author() };
            self.monitor.on_run(index, self.hosts[index as usize].id, run, self.now);
        }
        if bytes.first() != Some(&OUTCOME) {
            return;
        }
        if let Ok(Direct::Outcome { job, fence, work, .. }) = Direct::from_bytes(bytes) {
            let stale = self.monitor.on_outcome(index, job, fence);
            if stale && self.mutant == Mutant::IgnoresFences {
                self.accept_anyway(index, work);
            }
        }
    }

    pub(crate) fn send_failed(&mut self, index: HostId, life: Life, to: HostId) {
        if self.is_alive(index, life) {
            self.stats.sends_failed += 1;
            let to = self.hosts[to as usize].id;
            self.turn(index, |node, cx, out| node.handle(cx, Input::Net(NetInput::SendFailed { to }), out));
        }
    }

    /// Connects two hosts, if both are there and not connected yet.
    pub(crate) fn connect(&mut self, a: HostId, b: HostId) {
        let up = self.hosts[a as usize].is_up() && self.hosts[b as usize].is_up();
        let crowded = self.is_crowded(a) || self.is_crowded(b);
        if a == b || !up || crowded || !self.links.reach(a, b) || self.hosts[a as usize].peers.contains(&b) {
            return;
        }
        let degree = self.scenario.gossip.degree;
        for (one, other) in [(a, b), (b, a)] {
            let host = self.host(one);
            host.peers.insert(other);
            host.graft(degree);
        }
        for (one, other) in [(a, b), (b, a)] {
            let peer = self.hosts[other as usize].id;
            self.turn(one, |node, cx, out| node.handle(cx, Input::Net(NetInput::PeerUp(peer)), out));
        }
    }

    /// Returns whether a host takes no more connections.
    fn is_crowded(&self, index: HostId) -> bool {
        self.hosts[index as usize].peers.len() >= self.scenario.link.connections as usize
    }

    /// Plans a host's connections with its neighbours.
    pub(crate) fn seek_neighbours(&mut self, index: HostId) {
        for peer in self.hosts[index as usize].neighbours.clone() {
            let at = self.now + self.links.handshake(&mut self.rng);
            self.queue.push(at, Event::PeerUp { a: index, b: peer });
        }
    }

    pub(crate) fn peer_down(&mut self, index: HostId, life: Life, peer: HostId) {
        let degree = self.scenario.gossip.degree;
        if !self.is_alive(index, life) || !self.host(index).peers.remove(&peer) {
            return;
        }
        self.host(index).graft(degree);
        let peer = self.hosts[peer as usize].id;
        self.turn(index, |node, cx, out| node.handle(cx, Input::Net(NetInput::PeerDown(peer)), out));
    }

    /// Lets an adversary do its work, and plans the next time.
    pub(crate) fn attack(&mut self, index: HostId) {
        let mut groups =
            self.scenario.adversaries.iter().flat_map(|group| (0..group.count).map(move |_| group.every_ms));
        if let Some(every) = groups.nth(index as usize) {
            let at = self.now + std::time::Duration::from_millis(every);
            self.queue.push(at, Event::Attack { host: index });
        }
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        let (Some(node), Some(adversary), Some(capability)) = (&host.node, &mut host.adversary, &host.capability)
        else {
            return;
        };
        let mut means = Means {
            key: &host.key,
            network: &self.network,
            wall: host.clock.wall(now),
            rng: &mut host.rng,
            head: node.ledger().head(&host.id),
            capability,
        };
        for attack in adversary.attack(&mut means) {
            self.stats.attacks += 1;
            match attack {
                Attack::Publish { topic, bytes, half } => self.publish(index, topic, bytes, half),
                Attack::Send { bytes } => {
                    let target = usize::try_from(self.rng.below(self.hosts.len() as u64)).unwrap_or(0);
                    if target != index as usize {
                        self.send(index, self.hosts[target].id, bytes);
                    }
                }
            }
        }
    }
}
