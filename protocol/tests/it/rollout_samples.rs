//! Fixed rollouts, manifests and bulk messages.

use chorus_protocol::job::Finish;
use chorus_protocol::misbehaviour::Evidence;
use chorus_protocol::policy::{Manifest, ManifestBuilder, PolicyId, Version};
use chorus_protocol::rollout::{
    Assignment, Bulk, Credit, GroupId, Hello, Refusal, Rollout, RolloutFrame, Segment, Want, WorkReport,
};
use chorus_protocol::{Hash, List, Text, Verified, WallTime};

use crate::samples;

pub fn policy() -> PolicyId {
    PolicyId { owner: samples::key(samples::REQUESTER).node_id(), name: Text::new("adder").unwrap() }
}

fn made() -> WallTime {
    WallTime::from_millis(samples::NOW)
}

/// Two files of 1,500 and 700 bytes (byte `i` is `i mod 251`), in chunks of 1,024.
pub fn manifest() -> Manifest {
    let mut builder = ManifestBuilder::new(1024);
    let bytes: Vec<u8> = (0..1500u32).map(|i| (i % 251) as u8).collect();
    builder.file("model.safetensors").unwrap();
    assert_eq!(builder.write(&bytes).len(), 1);
    builder.file("tokenizer.json").unwrap();
    assert_eq!(builder.write(&bytes[..700]).len(), 1);
    let (manifest, last) = builder.finish(policy(), Some(version(7)), 12, made()).unwrap();
    assert_eq!(last.map(|last| last.len()), Some(152));
    manifest
}

pub fn signed_manifest() -> Verified<Manifest> {
    samples::sign(samples::REQUESTER, manifest())
}

pub fn version(n: u8) -> Version {
    Version::from_hash(Hash::from_bytes([n; 32]))
}

/// A rollout of `tokens` tokens: token `i` is `base + i`, its log-probability `-i / 8`.
pub fn rollout(group: u64, member: u16, tokens: u32, base: u32) -> Rollout {
    #[allow(clippy::cast_precision_loss, reason = "small whole numbers")]
    let log_probs = (0..tokens).map(|i| -(i as f32) / 8.0).collect();
    Rollout {
        group: GroupId(group),
        member,
        environment: Text::new("arithmetic/2").unwrap(),
        seed: group * 1000,
        prompt: (0..5).map(|i| i + 40).collect(),
        completion: (0..tokens).map(|i| base + i).collect(),
        log_probs,
        reward: 0.5,
        finish: if member == 0 { Finish::Stop } else { Finish::Length },
        segments: vec![Segment { version: version(1), from: 0 }],
    }
}

/// Three rollouts of two groups; the last one was swapped under twice.
pub fn rollouts(base: u32) -> Vec<Rollout> {
    let mut third = rollout(9, 0, 6, base);
    third.segments.push(Segment { version: version(2), from: 2 });
    third.segments.push(Segment { version: version(1), from: 5 });
    third.reward = -1.0;
    vec![rollout(3, 0, 4, base), rollout(3, 2, 2, base), third]
}

pub fn frame(base: u32) -> RolloutFrame {
    RolloutFrame::new(policy(), 17, made(), &rollouts(base)).unwrap()
}

pub fn evidence() -> Evidence {
    let frames = List::new(vec![samples::sign(samples::EXECUTOR, frame(100)).to_wire()]).unwrap();
    Evidence { accused: samples::key(samples::EXECUTOR).node_id(), group: GroupId(3), member: 2, frames }
}

pub fn messages() -> Vec<(&'static str, Bulk)> {
    let version = manifest().version;
    let indices = List::new(vec![0, 2, 300]).unwrap();
    let credit = Credit { until: 24, version, step: 12, staleness: 2 };
    let assignment = |want| Assignment {
        group: GroupId(9),
        environment: Text::new("arithmetic/2").unwrap(),
        seed: 9000,
        first: 4,
        members: 4,
        want,
        deadline_ms: 30_000,
    };
    let work = vec![assignment(Want::AtLeast { step: 11 }), assignment(Want::Exactly { version, step: 12 })];
    let refused = vec![(Refusal::Stale, 1), (Refusal::Duplicate, 2)];
    vec![
        (
            "hello",
            Bulk::Hello(Hello {
                policy: policy(),
                serving: Some((version, 12)),
                slots: 8,
                first_unacknowledged: 17,
                boot: 5,
            }),
        ),
        ("assign", Bulk::Assign { credit, work: List::new(work).unwrap() }),
        ("frame", Bulk::Frame(samples::sign(samples::EXECUTOR, frame(100)).to_wire())),
        ("ack", Bulk::Ack { sequence: 17, taken: 3, refused: List::new(refused).unwrap() }),
        ("nack", Bulk::Nack { sequence: 17, reason: Refusal::Full, retry_ms: 250 }),
        (
            "give-up",
            Bulk::GiveUp(
                List::new(vec![WorkReport { group: GroupId(9), member: 1, reason: Refusal::Failed }]).unwrap(),
            ),
        ),
        ("serving", Bulk::Serving { version, step: 12 }),
        ("announce", Bulk::Announce(Box::new(signed_manifest().to_wire()))),
        ("have", Bulk::Have { version, chunks: List::new(vec![0b101]).unwrap() }),
        ("have-one", Bulk::HaveOne { version, index: 1 }),
        ("want-chunks", Bulk::WantChunks { version, indices: indices.clone() }),
        ("cancel", Bulk::Cancel { version, indices }),
        ("chunk", Bulk::Chunk { version, index: 2, bytes: List::new(vec![7; 20]).unwrap() }),
        ("no-chunk", Bulk::NoChunk { version, index: 2 }),
        ("want-evidence", Bulk::WantEvidence { evidence: Hash::from_bytes([0xee; 32]), from: 1_048_576 }),
        (
            "evidence",
            Bulk::Evidence {
                evidence: Hash::from_bytes([0xee; 32]),
                from: 1_048_576,
                total: 1_048_580,
                bytes: List::new(vec![9; 4]).unwrap(),
            },
        ),
    ]
}
