//! What this node says of itself in the ledger: measured where it can be measured.

use std::fs;

use chorus_engine::{Calibration, ModelInfo};
use chorus_protocol::capability::{Capability, Device, DeviceKind, ModelOffer, Rate, SamplingOffer, Skill};
use chorus_protocol::{Embedding, Hash, List, NodeId, Text};

use crate::config::{Config, EngineKind};
use crate::training::{self, Purpose};

/// Puts the capability together. `embeddings` belong to the configured skills, in their order.
pub(crate) fn build(
    config: &Config,
    me: NodeId,
    models: &[(ModelInfo, Option<Calibration>)],
    embeddings: &[Option<Embedding>],
) -> Capability {
    let skills = config.skills.iter().enumerate().map(|(index, skill)| Skill {
        text: Text::truncated(&skill.text),
        tags: List::truncated(skill.tags.iter().map(|tag| Text::truncated(&tag.to_lowercase()))),
        embedding: embeddings.get(index).cloned().flatten(),
    });
    let slots = if models.is_empty() { 0 } else { config.engine.slots };
    Capability {
        name: Text::truncated(&config.name),
        software: Text::truncated(concat!("chorus/", env!("CARGO_PKG_VERSION"))),
        models: List::truncated(models.iter().map(|(info, speed)| offer(info, speed.as_ref()))),
        devices: List::truncated([device(config.engine.kind)]),
        slots,
        skills: List::truncated(skills),
        tools: List::default(),
        sampling: sampling(config, me),
    }
}

/// A node that samples offers itself to the trainer of its policy, unless it only keeps versions.
fn sampling(config: &Config, me: NodeId) -> Option<SamplingOffer> {
    let policy = match training::purpose(config, me).ok().flatten()? {
        Purpose::Policy(policy) if policy.owner == me => return None,
        Purpose::Policy(policy) => Some(policy),
        Purpose::Anybody => None,
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "its bounds were checked")]
    let price_milli = (config.sampler.price * 1_000.0).round() as u32;
    let offer = SamplingOffer { slots: config.sampler.slots, price_milli, policy };
    (offer.slots > 0).then_some(offer)
}

fn offer(info: &ModelInfo, speed: Option<&Calibration>) -> ModelOffer {
    ModelOffer {
        name: Text::truncated(&info.name),
        fingerprint: Hash::from_bytes(info.fingerprint),
        architecture: Text::truncated(&info.architecture),
        quantisation: Text::truncated(&info.quantisation),
        context: info.context,
        prefill: Rate::from_tokens_per_s(speed.map_or(0.0, |speed| f64::from(speed.prefill_tokens_per_s))),
        decode: Rate::from_tokens_per_s(speed.map_or(0.0, |speed| f64::from(speed.decode_tokens_per_s))),
    }
}

/// The processor that runs the model.
fn device(engine: EngineKind) -> Device {
    if engine == EngineKind::Openai {
        return Device { kind: DeviceKind::Remote, name: Text::truncated("OpenAI-compatible server"), memory_mib: 0 };
    }
    let kind = if cfg!(feature = "cuda") {
        DeviceKind::Cuda
    } else if cfg!(feature = "metal") {
        DeviceKind::Metal
    } else {
        DeviceKind::Cpu
    };
    Device { kind, name: Text::truncated(&processor_name()), memory_mib: memory_mib() }
}

fn processor_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}

/// Memory that was free at start, which is what a model has.
fn memory_mib() -> u32 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().trim_end_matches(" kB").parse::<u64>().ok());
    u32::try_from(kib.unwrap_or(0) / 1024).unwrap_or(u32::MAX)
}
