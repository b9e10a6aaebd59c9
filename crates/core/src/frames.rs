//! Frames: bytes from the network become inputs of the right machine, and messages become bytes.

use chorus_beacon::{ExecutorInput, RequesterInput};
use chorus_ledger::LedgerInput;
use chorus_machine::{Ctx, Outbox};
use chorus_protocol::beacon::Beacon;
use chorus_protocol::limits::{MAX_BEACON_AGE_MS, MAX_CLOCK_SKEW_MS};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::{NodeId, Verified};

use crate::io::{Acceptance, Effect, NodeEvent, Topic};
use crate::node::{Node, Route};

impl Node {
    pub(crate) fn on_gossip(
        &mut self,
        cx: &mut Ctx<'_>,
        token: u64,
        from: NodeId,
        topic: Topic,
        bytes: &[u8],
        out: &mut Outbox<Effect>,
    ) {
        match topic {
            Topic::Ledger => match LedgerGossip::from_bytes(bytes) {
                Ok(frame) => self.judge(cx, LedgerInput::Gossip { from, frame }, token, out),
                Err(error) => reject(token, error.to_string(), out),
            },
            Topic::Beacon => match self.beacon_from(cx, bytes) {
                Ok(Some(beacon)) => {
                    out.push(Effect::Validate { token, acceptance: Acceptance::Accept });
                    self.route(Route::Executor(ExecutorInput::Beacon(beacon)));
                }
                Ok(None) => out.push(Effect::Validate { token, acceptance: Acceptance::Ignore }),
                Err(reason) => reject(token, reason, out),
            },
        }
    }

    /// Decodes and verifies a beacon. `None` is a beacon that breaks no rule but is of no use: stale, or of a quarantined node.
    fn beacon_from(&self, cx: &Ctx<'_>, bytes: &[u8]) -> Result<Option<Verified<Beacon>>, String> {
        let BeaconGossip(received) = BeaconGossip::from_bytes(bytes).map_err(|error| error.to_string())?;
        let beacon = received.verify(&self.config.network).map_err(|error| error.to_string())?;
        let (now, made) = (cx.wall.as_millis(), beacon.made.as_millis());
        if made > now.saturating_add(MAX_CLOCK_SKEW_MS) {
            return Err(format!("a beacon of {:?} is dated in the future", beacon.author()));
        }
        let stale = now > made.saturating_add(MAX_BEACON_AGE_MS) || beacon.deadline < cx.wall;
        let useless = stale || self.ledger.is_quarantined(&beacon.author());
        Ok((!useless).then_some(beacon))
    }

    pub(crate) fn on_direct(&mut self, from: NodeId, bytes: &[u8], out: &mut Outbox<Effect>) {
        match Direct::from_bytes(bytes) {
            Ok(message) => self.deliver(from, message),
            Err(error) => out.push(Effect::Penalise { peer: from, reason: error.to_string() }),
        }
    }

    /// Gives a direct message to the machine that speaks this part of the protocol.
    fn deliver(&mut self, from: NodeId, message: Direct) {
        let route = match message {
            Direct::Sync(message) => Route::Ledger(LedgerInput::Sync { from, message }),
            Direct::Bid(_)
            | Direct::Busy { .. }
            | Direct::Accept { .. }
            | Direct::Refuse { .. }
            | Direct::Progress { .. }
            | Direct::Outcome { .. } => Route::Requester(RequesterInput::Direct { from, message }),
            Direct::Release { .. } | Direct::Grant { .. } | Direct::Cancel { .. } => {
                Route::Executor(ExecutorInput::Direct { from, message })
            }
        };
        self.route(route);
    }

    pub(crate) fn send(&mut self, to: NodeId, message: Direct, out: &mut Outbox<Effect>) {
        if to == self.me {
            self.deliver(to, message);
            return;
        }
        match message.to_bytes() {
            Ok(bytes) => out.push(Effect::Send { to, bytes }),
            Err(error) => {
                too_large(message.kind(), &error, out);
                self.send_failed(to);
            }
        }
    }

    pub(crate) fn publish_ledger(&mut self, frame: &LedgerGossip, out: &mut Outbox<Effect>) {
        publish(Topic::Ledger, frame, out);
    }

    pub(crate) fn publish_beacon(&mut self, beacon: &Verified<Beacon>, out: &mut Outbox<Effect>) {
        publish(Topic::Beacon, &BeaconGossip(beacon.to_wire()), out);
    }
}

fn publish<F: Frame>(topic: Topic, frame: &F, out: &mut Outbox<Effect>) {
    match frame.to_bytes() {
        Ok(bytes) => out.push(Effect::Publish { topic, bytes }),
        Err(error) => too_large(F::KIND, &error, out),
    }
}

fn too_large(what: &'static str, error: &chorus_protocol::DecodeError, out: &mut Outbox<Effect>) {
    let len = match error {
        chorus_protocol::DecodeError::TooLarge { len, .. } => *len,
        _ => 0,
    };
    out.push(Effect::Event(NodeEvent::FrameTooLarge { what, len }));
}

fn reject(token: u64, reason: String, out: &mut Outbox<Effect>) {
    out.push(Effect::Validate { token, acceptance: Acceptance::Reject { reason } });
}
