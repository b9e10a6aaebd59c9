//! What one election costs in processor time, by the number of nodes that bid, and where it goes.
//!
//! ```text
//! cargo run --release -p chorus-beacon --example election_bench
//! ```
//!
//! Every node is capable and every skill has an embedding, so φ is at its dearest. Each message is encoded and decoded as on the wire.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chorus_beacon::{
    BeaconConfig, Executor, ExecutorEffect, ExecutorInput, JobSpec, Requester, RequesterEffect, RequesterInput,
};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::bounded::{List, Text};
use chorus_protocol::capability::{Capability, ModelOffer, Rate, Skill};
use chorus_protocol::job::{JobKind, Payload, Requirement, Risk, Role, Turn};
use chorus_protocol::message::{Direct, Frame};
use chorus_protocol::{Embedding, Hash, JobId, NetworkId, NodeId, SecretKey, TaskId, WallTime};

const ROUNDS: u32 = 20;
const WALL: WallTime = WallTime::from_millis(1_700_000_000_000);

fn embedding(rng: &mut Rng) -> Option<Embedding> {
    #[allow(clippy::cast_possible_truncation, reason = "a random vector")]
    Embedding::from_f32(&std::array::from_fn(|_| rng.unit() as f32 - 0.5))
}

fn capability(rng: &mut Rng) -> Arc<Capability> {
    let model = ModelOffer {
        name: Text::truncated("model"),
        fingerprint: Hash::ZERO,
        architecture: Text::truncated("llama"),
        quantisation: Text::truncated("Q8_0"),
        context: 4_096,
        prefill: Rate::from_tokens_per_s(500.0),
        decode: Rate::from_tokens_per_s(50.0),
    };
    let skill = Skill { text: Text::truncated("a skill"), tags: List::default(), embedding: embedding(rng) };
    Arc::new(Capability {
        name: Text::default(),
        software: Text::default(),
        models: List::truncated([model]),
        devices: List::default(),
        slots: 1,
        skills: List::truncated([skill]),
        tools: List::default(),
        sampling: None,
    })
}

fn job(n: u32, rng: &mut Rng) -> JobSpec {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&n.to_le_bytes());
    JobSpec {
        job: JobId::from_bytes(id),
        task: TaskId::from_bytes(id),
        kind: JobKind::Answer,
        requirement: Requirement { embedding: embedding(rng), ..Requirement::default() },
        payload: Payload {
            salt: [1; 16],
            turns: List::truncated([Turn { role: Role::User, content: Text::truncated("a question") }]),
            json_schema: None,
            max_tokens: 128,
            temperature_milli: 0,
            top_p_milli: 1_000,
            seed: 0,
            stop: List::default(),
            stream: false,
            policy: None,
        },
        deadline: Time::from_millis(60_000),
        risk: Risk::Low,
        max_leases: 2,
        avoid: Vec::new(),
        only: Default::default(),
    }
}

fn cx(rng: &mut Rng) -> Ctx<'_> {
    Ctx { now: Time::from_millis(1), wall: WALL, rng }
}

/// Times `f` and adds it to `sum`.
fn timed<T>(sum: &mut Duration, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = f();
    *sum += start.elapsed();
    value
}

/// Mean time of announcing, of one node's bid, of taking bids up to the lease, and of turning the late ones away.
fn measure(nodes: u16, network: &NetworkId) -> [Duration; 4] {
    let mut rng = Rng::from_u64(7);
    let mut sums = [Duration::ZERO; 4];
    let me = SecretKey::from_bytes(&[9; 32]);
    let mut requester = Requester::new(BeaconConfig::default(), network.clone(), me.clone());
    let mut members: Vec<(NodeId, Executor)> = Vec::new();
    let (mut asked, mut worked) = (Outbox::new(), Outbox::new());
    for _ in 0..nodes {
        let (key, capability) = (SecretKey::from_bytes(&rng.bytes()), capability(&mut rng));
        let node = key.node_id();
        let known = RequesterInput::Capability { node, capability: Some(Arc::clone(&capability)) };
        requester.handle(&mut cx(&mut rng), known, &mut asked);
        let mut executor = Executor::new(BeaconConfig::default(), network.clone(), key);
        executor.handle(&mut cx(&mut rng), ExecutorInput::Offer { capability, slots: 1 }, &mut worked);
        members.push((node, executor));
    }
    for round in 0..ROUNDS {
        let spec = Box::new(job(round, &mut rng));
        let id = spec.job;
        timed(&mut sums[0], || requester.handle(&mut cx(&mut rng), RequesterInput::Submit(spec), &mut asked));
        let beacon = asked.drain().find_map(|effect| match effect {
            RequesterEffect::Publish(beacon) => Some(beacon),
            _ => None,
        });
        let beacon = beacon.expect("a job that somebody can do is announced");
        let mut bids = Vec::new();
        for (node, executor) in &mut members {
            let input = ExecutorInput::Beacon(beacon.clone());
            timed(&mut sums[1], || executor.handle(&mut cx(&mut rng), input, &mut worked));
            for effect in worked.drain() {
                if let ExecutorEffect::Send { message, .. } = effect {
                    bids.push((*node, message.to_bytes().expect("a bid is small")));
                }
            }
        }
        for (from, bytes) in bids {
            let decided = requester.leases().next().is_some();
            timed(&mut sums[if decided { 3 } else { 2 }], || {
                let message = Direct::from_bytes(&bytes).expect("a bid decodes");
                requester.handle(&mut cx(&mut rng), RequesterInput::Direct { from, message }, &mut asked);
            });
        }
        assert_eq!(requester.leases().count(), 1, "the election is decided");
        requester.handle(&mut cx(&mut rng), RequesterInput::Cancel(id), &mut asked);
        asked.drain();
        for (_, executor) in &mut members {
            let message = Direct::Release { beacon: beacon.id };
            let input = ExecutorInput::Direct { from: me.node_id(), message };
            executor.handle(&mut cx(&mut rng), input, &mut worked);
            worked.drain();
        }
    }
    let [announce, bid, elect, late] = sums.map(|sum| sum / ROUNDS);
    [announce, bid / u32::from(nodes), elect, late]
}

fn main() {
    let network: NetworkId = "bench".parse().expect("a name");
    println!("{:>6} {:>14} {:>14} {:>16} {:>16}", "nodes", "announce", "one bid", "elect (≤8 bids)", "turn away rest");
    for nodes in [5, 100, 1_000] {
        let [announce, bid, elect, late] = measure(nodes, &network);
        println!("{nodes:>6} {announce:>14.1?} {bid:>14.1?} {elect:>16.1?} {late:>16.1?}");
    }
}
