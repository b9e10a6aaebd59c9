//! What a rollout frame costs: bytes a token, and tokens a second through each step between a sampler and a buffer, on one core.
//!
//! `cargo run --release -p chorus-rollout --example rollout_bench`
#![allow(clippy::cast_precision_loss, clippy::print_stdout, reason = "a benchmark prints ratios")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use chorus_protocol::job::Finish;
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, GroupId, Rollout, RolloutFrame, Segment};
use chorus_protocol::{Hash, NetworkId, SecretKey, Signable, Text, Verified, WallTime, codec};

const TIME: Duration = Duration::from_millis(400);

fn rollouts(groups: u64, members: u16, tokens: u32, base: u32) -> Vec<Rollout> {
    let one = |group: u64, member: u16| Rollout {
        group: GroupId(group),
        member,
        environment: Text::truncated("arithmetic"),
        seed: group,
        prompt: (0..16).collect(),
        completion: (0..tokens).map(|token| base + token).collect(),
        log_probs: (0..tokens).map(|token| -(token as f32) / 100.0).collect(),
        reward: 1.0,
        finish: Finish::Stop,
        segments: vec![Segment { version: Version::from_hash(Hash::from_bytes([1; 32])), from: 0 }],
    };
    (0..groups).flat_map(|group| (0..members).map(move |member| one(group, member))).collect()
}

/// Tokens a second, in millions, of the fastest round: what else runs on the machine slows rounds down and never speeds one up.
fn rate(tokens: usize, mut work: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < TIME {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    tokens as f64 / best / 1e6
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let network: NetworkId = "bench".parse()?;
    let key = SecretKey::from_bytes(&[7; 32]);
    let policy = PolicyId { owner: key.node_id(), name: Text::truncated("bench") };
    println!(
        "Millions of sampled tokens a second, on one core, fastest round. Bytes a token are those of the signed message."
    );
    println!(
        "{:>8} {:>7} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "rollouts", "tokens", "ids", "bytes/tok", "build", "encode", "decode", "sign", "message", "receive", "copy out"
    );
    for (groups, members, tokens, base) in [
        (1, 8, 64, 100_000),
        (8, 8, 64, 100_000),
        (64, 8, 8, 100_000),
        (8, 8, 256, 100),
        (8, 8, 256, 100_000),
        (8, 8, 2048, 100_000),
    ] {
        let items = rollouts(groups, members, tokens, base);
        let frame = RolloutFrame::new(policy.clone(), 1, WallTime::from_millis(1_800_000_000_000), &items)?;
        let sampled = frame.completion_tokens();
        let bytes = codec::encode(&frame);
        let signed = Verified::sign(&key, &network, frame.clone())?;
        let message = Bulk::Frame(signed.to_wire());
        let wire = message.to_bytes()?;
        let columns = [
            rate(sampled, || {
                black_box(RolloutFrame::new(policy.clone(), 1, WallTime::from_millis(0), black_box(&items)).ok());
            }),
            rate(sampled, || {
                black_box(codec::encode(black_box(&frame)));
            }),
            rate(sampled, || {
                black_box(codec::decode::<RolloutFrame>("rollouts", black_box(&bytes), RolloutFrame::MAX_BYTES).ok());
            }),
            rate(sampled, || {
                black_box(Verified::sign(&key, &network, black_box(&frame).clone()).ok());
            }),
            rate(sampled, || {
                black_box(black_box(&message).to_bytes().ok());
            }),
            // Everything that the trainer does with a message: decode, check the signature, decode the frame.
            rate(sampled, || {
                if let Ok(Bulk::Frame(received)) = Bulk::from_bytes(black_box(&wire)) {
                    black_box(received.verify(&network).ok());
                }
            }),
            rate(sampled, || {
                frame.rollouts().for_each(|view| drop(black_box(view.to_rollout())));
            }),
        ];
        let ids = if base > 65_535 { "u32" } else { "u16" };
        let ratio = wire.len() as f64 / sampled as f64;
        print!("{:>8} {tokens:>7} {ids:>6} {ratio:>9.2}", items.len());
        columns.iter().for_each(|rate| print!(" {rate:>9.1}"));
        println!();
    }
    Ok(())
}
