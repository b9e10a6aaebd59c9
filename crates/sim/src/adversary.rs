//! Nodes that mean harm. Each is a whole, honest `Node` whose inputs and effects pass through here.
//!
//! | kind | what it does | what must hold all the same |
//! |---|---|---|
//! | liar | claims twenty times its speed, bids the best score and no wait, answers nonsense | its bids win no more than others' |
//! | silent | bids and accepts like anybody, and never answers | its jobs go to others; it loses its reputation |
//! | equivocator | signs two entries of one number and gives one to each half of its peers | everybody quarantines it |
//! | forger | alters entries of others, signs for another network, sends what nobody can decode | nothing of it is passed on |
//! | replayer | sends old grants, bids, outcomes, beacons and entries again | nothing happens twice |
//! | stale | works, but answers only when its lease is long lost | no such answer is accepted |
//! | flooder | announces jobs without end and sends garbage without end | queues stay in their bounds, others' tasks end |
//!
//! Adversaries keep their keys: nobody here breaks a signature, and no message can claim to come from another connection.

use std::collections::VecDeque;
use std::time::Duration;

use chorus_core::{Effect, Topic};
use chorus_machine::Rng;
use chorus_protocol::beacon::{Beacon, Rank};
use chorus_protocol::capability::{Capability, Rate};
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::job::{JobKind, Requirement, Risk};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::{BeaconId, Hash, JobId, List, NetworkId, SecretKey, Text, Verified, WallTime};
use serde::{Deserialize, Serialize};

use crate::engine::Manner;

/// Frames that a replayer remembers.
const MAX_REMEMBERED: usize = 256;
/// Frames that a replayer sends in one attack.
const REPLAYS: usize = 4;
/// Beacons that a flooder announces in one attack.
const FLOOD_BEACONS: usize = 4;
/// Direct frames that a flooder sends in one attack.
const FLOOD_DIRECTS: usize = 32;
/// By how much a liar multiplies its speed.
const BOAST: f64 = 20.0;
/// By how much a stale sender's answers are late: past every timeout of the requester.
pub const LATE_BY: Duration = Duration::from_millis(6_500);

/// What an adversary does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdversaryKind {
    /// Inflates what it claims and answers nonsense.
    Liar,
    /// Takes work and never answers.
    Silent,
    /// Writes two entries where one belongs.
    Equivocator,
    /// Sends what does not hold.
    Forger,
    /// Sends again what was sent before.
    Replayer,
    /// Answers under leases that it has lost.
    Stale,
    /// Sends without end.
    Flooder,
}

/// Something overheard, to be sent again.
#[derive(Clone, Debug)]
enum Heard {
    Gossip(Topic, Vec<u8>),
    Direct(Vec<u8>),
}

/// What becomes of an effect.
#[derive(Debug)]
pub enum Passed {
    /// It happens.
    Now(Effect),
    /// It happens later.
    Later(Duration, Effect),
    /// It does not happen.
    Never,
}

/// Something that an adversary does of its own accord.
#[derive(Debug)]
pub enum Attack {
    /// It gossips to some of its peers.
    Publish {
        /// Where.
        topic: Topic,
        /// What.
        bytes: Vec<u8>,
        /// To the peers at even places, at odd places, or to all.
        half: Option<bool>,
    },
    /// It sends to a node drawn at random.
    Send {
        /// What.
        bytes: Vec<u8>,
    },
}

/// What an adversary knows of itself when it attacks.
#[derive(Debug)]
pub struct Means<'a> {
    /// Its key.
    pub key: &'a SecretKey,
    /// The network.
    pub network: &'a NetworkId,
    /// Its wall clock.
    pub wall: WallTime,
    /// Its randomness.
    pub rng: &'a mut Rng,
    /// Number and hash of its last entry.
    pub head: Option<(u64, Hash)>,
    /// What it offers.
    pub capability: &'a Capability,
}

/// One adversary.
#[derive(Debug)]
pub struct Adversary {
    kind: AdversaryKind,
    active: bool,
    heard: VecDeque<Heard>,
    attacks: u64,
}

impl Adversary {
    /// Makes an adversary that still behaves.
    #[must_use]
    pub fn new(kind: AdversaryKind) -> Self {
        Self { kind, active: false, heard: VecDeque::new(), attacks: 0 }
    }

    /// Returns what it does.
    #[must_use]
    pub fn kind(&self) -> AdversaryKind {
        self.kind
    }

    /// Stops to behave.
    pub fn begin(&mut self) {
        self.active = true;
    }

    /// Returns how its engine treats the work.
    #[must_use]
    pub fn manner(kind: AdversaryKind) -> Manner {
        match kind {
            AdversaryKind::Liar => Manner::Garbage,
            AdversaryKind::Silent => Manner::Nothing,
            _ => Manner::Honest,
        }
    }

    /// Returns what it says that it can do.
    #[must_use]
    pub fn claims(kind: AdversaryKind, mut truth: Capability) -> Capability {
        if kind == AdversaryKind::Liar {
            let boast = |rate: Rate| Rate::from_tokens_per_s(rate.tokens_per_s() * BOAST);
            truth.models = List::truncated(truth.models.into_vec().into_iter().map(|mut model| {
                (model.prefill, model.decode) = (boast(model.prefill), boast(model.decode));
                model
            }));
        }
        truth
    }

    /// Hears a gossiped frame.
    pub fn hear_gossip(&mut self, topic: Topic, bytes: &[u8]) {
        if matches!(self.kind, AdversaryKind::Replayer | AdversaryKind::Forger) {
            self.remember(Heard::Gossip(topic, bytes.to_vec()));
        }
    }

    /// Hears a direct frame.
    pub fn hear_direct(&mut self, bytes: &[u8]) {
        if self.kind == AdversaryKind::Replayer {
            self.remember(Heard::Direct(bytes.to_vec()));
        }
    }

    fn remember(&mut self, heard: Heard) {
        if self.heard.len() >= MAX_REMEMBERED {
            self.heard.pop_front();
        }
        self.heard.push_back(heard);
    }

    /// Lets an effect of its node pass, or not.
    pub fn pass(&mut self, key: &SecretKey, network: &NetworkId, effect: Effect) -> Passed {
        if !self.active {
            return Passed::Now(effect);
        }
        match (self.kind, effect) {
            (AdversaryKind::Liar, Effect::Send { to, bytes }) => {
                Passed::Now(Effect::Send { to, bytes: inflate(key, network, &bytes).unwrap_or(bytes) })
            }
            (AdversaryKind::Stale, Effect::Send { to, bytes }) => match Direct::from_bytes(&bytes) {
                Ok(Direct::Progress { .. }) => Passed::Never,
                Ok(Direct::Outcome { .. }) => Passed::Later(LATE_BY, Effect::Send { to, bytes }),
                _ => Passed::Now(Effect::Send { to, bytes }),
            },
            (_, effect) => Passed::Now(effect),
        }
    }

    /// Does what it does of its own accord.
    pub fn attack(&mut self, means: &mut Means<'_>) -> Vec<Attack> {
        self.active = true;
        self.attacks += 1;
        match self.kind {
            AdversaryKind::Liar | AdversaryKind::Silent | AdversaryKind::Stale => Vec::new(),
            AdversaryKind::Equivocator => self.equivocate(means),
            AdversaryKind::Forger => self.forge(means),
            AdversaryKind::Replayer => self.replay(means.rng),
            AdversaryKind::Flooder => flood(means),
        }
    }

    /// Signs two entries of one number, once.
    fn equivocate(&self, means: &Means<'_>) -> Vec<Attack> {
        let Some((seq, prev)) = means.head.filter(|_| self.attacks == 1) else { return Vec::new() };
        let version = |name: &str, half: bool| {
            let capability = Capability { name: Text::truncated(name), ..means.capability.clone() };
            let entry = Entry {
                seq: seq + 1,
                prev,
                wall_time: means.wall,
                expires: means.wall.plus(Duration::from_secs(3_600)),
                body: Body::Capability(std::sync::Arc::new(capability)),
            };
            let entry = Verified::sign(means.key, means.network, entry).ok()?;
            let bytes = LedgerGossip::Entry(entry.to_wire()).to_bytes().ok()?;
            Some(Attack::Publish { topic: Topic::Ledger, bytes, half: Some(half) })
        };
        version("left", false).into_iter().chain(version("right", true)).collect()
    }

    /// Alters what it heard, signs for another network, and sends noise.
    fn forge(&self, means: &mut Means<'_>) -> Vec<Attack> {
        let mut attacks = Vec::new();
        let heard: Vec<Heard> = self.heard.iter().cloned().collect();
        if let Some(Heard::Gossip(topic, mut bytes)) = means.rng.pick(&heard).cloned() {
            let at = usize::try_from(means.rng.below(bytes.len() as u64)).unwrap_or(0);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << means.rng.below(8);
            }
            attacks.push(Attack::Publish { topic, bytes, half: None });
        }
        let elsewhere: Option<NetworkId> = "elsewhere".parse().ok();
        let entry = Entry {
            seq: 1_000_000 + self.attacks,
            prev: Hash::ZERO,
            wall_time: means.wall,
            expires: means.wall.plus(Duration::from_secs(60)),
            body: Body::Retire,
        };
        let foreign = elsewhere.and_then(|network| Verified::sign(means.key, &network, entry).ok());
        if let Some(bytes) = foreign.and_then(|entry| LedgerGossip::Entry(entry.to_wire()).to_bytes().ok()) {
            attacks.push(Attack::Publish { topic: Topic::Ledger, bytes, half: None });
        }
        attacks.push(Attack::Send { bytes: means.rng.bytes::<64>().to_vec() });
        attacks
    }

    fn replay(&self, rng: &mut Rng) -> Vec<Attack> {
        let heard: Vec<Heard> = self.heard.iter().cloned().collect();
        let drawn = (0..REPLAYS).filter_map(|_| rng.pick(&heard).cloned()).collect::<Vec<_>>();
        let again = |heard| match heard {
            Heard::Gossip(topic, bytes) => Attack::Publish { topic, bytes, half: None },
            Heard::Direct(bytes) => Attack::Send { bytes },
        };
        drawn.into_iter().map(again).collect()
    }
}

/// Turns a bid into the best bid there is.
fn inflate(key: &SecretKey, network: &NetworkId, bytes: &[u8]) -> Option<Vec<u8>> {
    let Ok(Direct::Bid(bid)) = Direct::from_bytes(bytes) else { return None };
    let bid = bid.verify(network).ok()?;
    let better = chorus_protocol::beacon::Bid { score_milli: 1_000, active: 0, expected_ms: 1, ..(*bid).clone() };
    Direct::Bid(Verified::sign(key, network, better).ok()?.to_wire()).to_bytes().ok()
}

/// Announces jobs that nobody will ever be given, and sends garbage.
fn flood(means: &mut Means<'_>) -> Vec<Attack> {
    let mut attacks = Vec::new();
    for _ in 0..FLOOD_BEACONS {
        let beacon = Beacon {
            id: BeaconId::from_bytes(means.rng.bytes()),
            job: JobId::from_bytes(means.rng.bytes()),
            kind: JobKind::Answer,
            requirement: Requirement::default(),
            risk: Risk::Low,
            made: means.wall,
            deadline: means.wall.plus(Duration::from_secs(30)),
            window_ms: 150,
            executors: 1,
            invited: Rank::default(),
        };
        let signed = Verified::sign(means.key, means.network, beacon).ok();
        if let Some(bytes) = signed.and_then(|beacon| BeaconGossip(beacon.to_wire()).to_bytes().ok()) {
            attacks.push(Attack::Publish { topic: Topic::Beacon, bytes, half: None });
        }
    }
    for _ in 0..FLOOD_DIRECTS {
        attacks.push(Attack::Send { bytes: means.rng.bytes::<256>().to_vec() });
    }
    attacks
}
