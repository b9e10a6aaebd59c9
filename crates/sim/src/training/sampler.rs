//! A sampler's shell: the machine, its engine, its spool.

use chorus_protocol::job::Finish;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{Bulk, Rollout, RolloutFrame, Segment};
use chorus_protocol::{Hash, Verified};
use chorus_rollout::broadcast::BroadcastInput;
use chorus_rollout::buffer::FrameKey;
use chorus_rollout::sampler::{Sampler, SamplerConfig, SamplerEffect, SamplerInput};

use super::disk::{Op, draw_ms};
use super::host::{Process, Role, Sampling, broadcast, rollout_time};
use super::invariant::Rule;
use super::session::{Place, pair};
use super::world::{Event, Item, World};

/// Tokens of a prompt.
const PROMPT: u32 = 24;
/// Token ids lie below: two bytes each on the wire.
const VOCABULARY: u32 = 32_000;

fn machine(process: &mut Process) -> Option<&mut Sampler> {
    match &mut process.role {
        Role::Sampler(sampling) => Some(&mut sampling.sampler),
        Role::Trainer(_) => None,
    }
}

/// What an engine with these weights says to this task: a function of nothing else.
pub(super) fn completion(version: Version, seed: u64, member: u16, [least, most]: [u32; 2]) -> Vec<u32> {
    let parts: [&[u8]; 3] = [version.as_hash().as_bytes(), &seed.to_le_bytes(), &member.to_le_bytes()];
    let hash = Hash::derive("chorus simulated rollout", &parts);
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&hash.as_bytes()[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    let (first, stride) = (word(0) % VOCABULARY, word(4) % VOCABULARY);
    let tokens = least + word(8) % (most - least + 1);
    (0..tokens).map(|at| (first + at.wrapping_mul(stride) % VOCABULARY) % VOCABULARY).collect()
}

fn rollout(item: Item, tokens: [u32; 2]) -> Rollout {
    let completion = completion(item.version, item.seed, item.member, tokens);
    Rollout {
        group: item.group,
        member: item.member,
        environment: item.environment,
        seed: item.seed,
        prompt: (0..PROMPT).collect(),
        log_probs: completion.iter().map(|token| f32::from(u8::try_from(token % 256).unwrap_or(0)) / -100.0).collect(),
        completion,
        reward: 1.0,
        finish: Finish::Stop,
        segments: vec![Segment { version: item.version, from: 0 }],
    }
}

impl World {
    /// Starts a sampler with what its disk holds.
    pub(super) fn start_sampler(&mut self, place: Place) {
        let cfg = SamplerConfig::new(self.policy.clone(), self.scenario.sampling.slots);
        let host = &self.hosts[place as usize];
        let frames = host.disk.read_frames(&self.network);
        let spool: Vec<_> = frames.iter().map(found).collect();
        let sampler = Sampler::new(cfg, self.network.clone(), host.key.clone(), &spool);
        let role = Role::Sampler(Box::new(Sampling { sampler, serving: None, loading: None, uncut: 0 }));
        let broadcast = broadcast(&self.network, &self.policy, host.id);
        let resume = host.disk.resume();
        self.hosts[place as usize].process = Some(Process { broadcast, role, wake: None });
        for (manifest, chunks) in resume {
            self.broadcast(place, Some(BroadcastInput::Resume { manifest, chunks }));
        }
        self.contacts(place).into_iter().for_each(|peer| self.dial(pair(place, peer)));
    }

    /// Lets a sampler take a turn, and carries out what it wants.
    pub(super) fn sampler(&mut self, place: Place, input: Option<SamplerInput>) {
        for effect in self.turn(place, machine, input) {
            self.sampler_effect(place, effect);
        }
        self.plan_wake(place);
    }

    fn sampler_effect(&mut self, place: Place, effect: SamplerEffect) {
        let sampler = self.hosts[place as usize].id;
        match effect {
            SamplerEffect::Send(message) => {
                self.send(place, 0, &message);
            }
            SamplerEffect::Start { group, member, environment, seed, version } => {
                self.begin(place, Item { group, member, environment, seed, version });
            }
            SamplerEffect::Refresh { version, .. } => self.broadcast(place, Some(BroadcastInput::Prefer(version))),
            SamplerEffect::Persist { sequence, frame } => {
                let key = FrameKey { sampler, sequence };
                // It comes again when the disk refused it.
                if self.monitor.cut(key, &frame) {
                    self.stats.tokens += frame.completion_tokens() as u64;
                    if let Some(sampling) = self.hosts[place as usize].sampling() {
                        sampling.uncut = sampling.uncut.saturating_sub(frame.len() as u64);
                    }
                }
                self.ask_disk(place, Op::Frame { key, frame });
            }
            SamplerEffect::Load(sequence) => self.ask_disk(place, Op::Load(FrameKey { sampler, sequence })),
            SamplerEffect::Forget(sequence) => self.ask_disk(place, Op::Delete(vec![FrameKey { sampler, sequence }])),
            SamplerEffect::Counted { .. } => {}
            SamplerEffect::Lost { rollouts, reason } => {
                *self.stats.given_up.entry(reason).or_default() += u64::from(rollouts);
            }
        }
    }

    /// The engine begins a member.
    fn begin(&mut self, place: Place, item: Item) {
        let serving = self.hosts[place as usize].sampling().and_then(|sampling| sampling.serving);
        if serving.map(|(version, _)| version) != Some(item.version) {
            let seen = format!("it begins with {:?} and serves {serving:?}", item.version);
            self.monitor.broken(Rule::WholeVersions, self.now, place, seen);
        }
        let host = &mut self.hosts[place as usize];
        let after = rollout_time(&self.scenario, host);
        self.queue.push(self.now + after, Event::Sampled { place, life: host.life, item: Box::new(item) });
    }

    pub(super) fn sampled(&mut self, place: Place, life: u32, item: Item) {
        if !self.is_alive(place, life) {
            return;
        }
        if let Some(sampling) = self.hosts[place as usize].sampling() {
            sampling.uncut += 1;
        }
        self.monitor.tally.sampled += 1;
        let rollout = rollout(item, self.scenario.sampling.tokens);
        self.sampler(place, Some(SamplerInput::Sampled(rollout)));
    }

    /// A version is whole on disk: load it, if it is newer than what is served or loaded.
    pub(super) fn load(&mut self, place: Place, version: Version, step: u64) {
        let Some(sampling) = self.hosts[place as usize].sampling() else { return };
        let newest = sampling.serving.into_iter().chain(sampling.loading).map(|(_, step)| step).max();
        if newest.is_some_and(|newest| newest >= step) {
            return;
        }
        sampling.loading = Some((version, step));
        let host = &mut self.hosts[place as usize];
        let after = draw_ms(self.scenario.sampling.load_ms, &mut host.rng);
        self.queue.push(self.now + after, Event::Loaded { place, life: host.life, version });
    }

    pub(super) fn loaded(&mut self, place: Place, life: u32, version: Version) {
        if !self.is_alive(place, life) {
            return;
        }
        let Some(sampling) = self.hosts[place as usize].sampling() else { return };
        let Some((_, step)) = sampling.loading.filter(|(loading, _)| *loading == version) else { return };
        sampling.loading = None;
        sampling.serving = Some((version, step));
        self.sampler(place, Some(SamplerInput::Serving { version, step }));
    }

    pub(super) fn frame_spooled(&mut self, place: Place, key: FrameKey, taken: bool) {
        let sequence = key.sequence;
        let input = if taken { SamplerInput::Persisted(sequence) } else { SamplerInput::PersistFailed(sequence) };
        self.sampler(place, Some(input));
    }

    pub(super) fn frame_loaded(&mut self, place: Place, key: FrameKey) {
        let frame = self.hosts[place as usize].disk.frames.get(&key).cloned();
        self.sampler(place, Some(SamplerInput::Loaded { sequence: key.sequence, frame }));
    }

    pub(super) fn trainer_session(&mut self, place: Place, up: bool) {
        self.sampler(place, Some(if up { SamplerInput::Connected } else { SamplerInput::Disconnected }));
    }

    pub(super) fn sampler_hears(&mut self, place: Place, message: Bulk) {
        self.sampler(place, Some(SamplerInput::Message(message)));
    }
}

fn found(frame: &Verified<RolloutFrame>) -> (u64, usize, u32) {
    (frame.sequence(), frame.encoded_len(), u32::try_from(frame.len()).unwrap_or(u32::MAX))
}
