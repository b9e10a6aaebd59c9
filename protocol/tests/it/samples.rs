//! Fixed records and frames: the golden vectors are made of them, and so are the hostile variations.

use chorus_protocol::beacon::{Beacon, Bid, Lease, Rank, Receipt, Verdict, Work};
use chorus_protocol::capability::{Capability, Device, DeviceKind, ModelOffer, Rate, SamplingOffer, Skill, Tool};
use chorus_protocol::embedding::DIMENSIONS;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::job::{Failure, Finish, JobKind, Output, Payload, Requirement, Risk, Role, Turn};
use chorus_protocol::message::{BeaconGossip, Direct, LedgerGossip};
use chorus_protocol::misbehaviour::{Charge, Misbehaviour};
use chorus_protocol::policy::{PolicyId, PolicyNotice, Version};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{
    BeaconId, Embedding, Hash, JobId, List, NetworkId, SecretKey, Signable, Text, Verified, WallTime,
};

/// Who asks.
pub const REQUESTER: u8 = 1;
/// Who works.
pub const EXECUTOR: u8 = 2;
/// 2027-01-15, 08:00:00 UTC.
pub const NOW: u64 = 1_800_000_000_000;

pub fn network() -> NetworkId {
    "test".parse().unwrap()
}

/// The key of node `n`: 32 bytes of that number.
pub fn key(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

pub fn sign<T: Signable>(n: u8, value: T) -> Verified<T> {
    Verified::sign(&key(n), &network(), value).unwrap()
}

fn text<const MAX: usize>(text: &str) -> Text<MAX> {
    Text::new(text).unwrap()
}

fn wall(after_ms: u64) -> WallTime {
    WallTime::from_millis(NOW + after_ms)
}

pub fn job() -> JobId {
    JobId::from_bytes([0x0b; 16])
}

fn beacon_id() -> BeaconId {
    BeaconId::from_bytes([0xbe; 16])
}

/// A saw tooth: component `i` is `(7 i mod 255) - 127`, so the largest magnitude is 127 and nothing is rounded.
pub fn embedding() -> Embedding {
    #[allow(clippy::cast_precision_loss, reason = "small whole numbers")]
    Embedding::from_f32(&std::array::from_fn::<f32, DIMENSIONS, _>(|i| (i * 7 % 255) as f32 - 127.0)).unwrap()
}

pub fn capability() -> Capability {
    Capability {
        name: text("étude"),
        software: text("chorus 0.1.0"),
        models: List::new(vec![ModelOffer {
            name: text("SmolLM2-135M-Instruct"),
            fingerprint: Hash::from_bytes([0xf0; 32]),
            architecture: text("llama"),
            quantisation: text("Q8_0"),
            context: 8192,
            prefill: Rate::from_tokens_per_s(412.5),
            decode: Rate::from_tokens_per_s(61.25),
        }])
        .unwrap(),
        devices: List::new(vec![Device { kind: DeviceKind::Cpu, name: text("2 cores"), memory_mib: 16_384 }]).unwrap(),
        slots: 2,
        skills: List::new(vec![
            Skill {
                text: text("solves puzzles step by step"),
                tags: List::new(vec![text("logic"), text("dates")]).unwrap(),
                embedding: Some(embedding()),
            },
            Skill { text: text("counts"), tags: List::default(), embedding: None },
        ])
        .unwrap(),
        tools: List::new(vec![Tool {
            name: text("clock"),
            description: text("tells the time"),
            schema: text("{\"type\":\"object\"}"),
        }])
        .unwrap(),
        sampling: Some(SamplingOffer { slots: 8, price_milli: 250, policy: None }),
    }
}

/// An entry that says nothing but its place in the chain.
pub fn plain_entry(seq: u64, prev: Hash) -> Entry {
    Entry { seq, prev, wall_time: wall(seq.min(9)), expires: wall(3_600_000), body: Body::Retire }
}

pub fn capability_entry() -> Verified<Entry> {
    let body = Body::Capability(std::sync::Arc::new(capability()));
    sign(EXECUTOR, Entry { seq: 1, prev: Hash::ZERO, wall_time: wall(0), expires: wall(86_400_000), body })
}

pub fn retire_entry() -> Verified<Entry> {
    sign(EXECUTOR, plain_entry(2, capability_entry().hash()))
}

pub fn receipt_entry() -> Verified<Entry> {
    let receipt = Receipt { work: work().to_wire(), verdict: Verdict::Accepted, observed_ms: 2_345 };
    let body = Body::Receipt(Box::new(receipt));
    sign(REQUESTER, Entry { seq: 1, prev: Hash::ZERO, wall_time: wall(3_000), expires: wall(86_400_000), body })
}

pub fn policy_entry() -> Verified<Entry> {
    let notice = PolicyNotice {
        name: text("adder"),
        version: Version::from_hash(Hash::from_bytes([0x71; 32])),
        step: 300,
        environments: List::new(vec![text("arithmetic-2"), text("knights-3")]).unwrap(),
        running: true,
    };
    let (prev, body) = (receipt_entry().hash(), Body::Policy(Box::new(notice)));
    sign(REQUESTER, Entry { seq: 2, prev, wall_time: wall(4_000), expires: wall(3_604_000), body })
}

pub fn misbehaviour_entry() -> Verified<Entry> {
    let accusation = Misbehaviour {
        accused: key(EXECUTOR).node_id(),
        policy: PolicyId { owner: key(REQUESTER).node_id(), name: text("adder") },
        version: Version::from_hash(Hash::from_bytes([0x71; 32])),
        charge: Charge::WrongReward,
        evidence: Hash::from_bytes([0xee; 32]),
        evidence_bytes: 70_000,
    };
    let (prev, body) = (policy_entry().hash(), Body::Misbehaviour(Box::new(accusation)));
    sign(REQUESTER, Entry { seq: 3, prev, wall_time: wall(5_000), expires: wall(86_400_000), body })
}

pub fn equivocation() -> Equivocation {
    let (one, other) = (plain_entry(3, Hash::ZERO), plain_entry(3, Hash::from_bytes([1; 32])));
    Equivocation::new(&sign(3, one), &sign(3, other)).unwrap()
}

pub fn requirement() -> Requirement {
    Requirement {
        embedding: Some(embedding()),
        tags: List::new(vec![text("logic")]).unwrap(),
        model: Some(text("SmolLM2-135M-Instruct")),
        tool: None,
        min_context: 2_048,
        policy: None,
    }
}

/// Somebody looks for a sampler.
pub fn sampling_beacon() -> Verified<Beacon> {
    let policy = PolicyId { owner: key(REQUESTER).node_id(), name: text("arithmetic") };
    let requirement = Requirement { policy: Some(policy), ..Requirement::default() };
    sign(REQUESTER, Beacon { kind: JobKind::Sample, requirement, ..(*beacon()).clone() })
}

pub fn beacon() -> Verified<Beacon> {
    sign(
        REQUESTER,
        Beacon {
            id: beacon_id(),
            job: job(),
            kind: JobKind::Answer,
            requirement: requirement(),
            risk: Risk::Medium,
            made: wall(0),
            deadline: wall(30_000),
            window_ms: 250,
            executors: 1,
            invited: Rank { score_milli: 700, draw: 1 << 31 },
        },
    )
}

pub fn bid() -> Verified<Bid> {
    sign(
        EXECUTOR,
        Bid {
            beacon: beacon_id(),
            requester: key(REQUESTER).node_id(),
            score_milli: 875,
            active: 1,
            slots: 2,
            expected_ms: 2_400,
            hold_ms: 1_000,
        },
    )
}

pub fn lease() -> Verified<Lease> {
    sign(
        REQUESTER,
        Lease {
            job: job(),
            beacon: beacon_id(),
            executor: key(EXECUTOR).node_id(),
            fence: 1,
            kind: JobKind::Answer,
            requirement: requirement().digest(),
            deadline: wall(30_000),
        },
    )
}

pub fn work() -> Verified<Work> {
    sign(
        EXECUTOR,
        Work {
            job: job(),
            requester: key(REQUESTER).node_id(),
            fence: 1,
            kind: JobKind::Answer,
            requirement: requirement().digest(),
            output: output().digest(&payload().salt),
            model: Hash::from_bytes([0xf0; 32]),
            prompt_tokens: 40,
            completion_tokens: 12,
            elapsed_ms: 2_300,
            failure: None,
        },
    )
}

pub fn failed_work() -> Verified<Work> {
    let mut failed = (*work()).clone();
    failed.output = Hash::ZERO;
    failed.completion_tokens = 0;
    failed.failure = Some(Failure::ContextExceeded { prompt_tokens: 9_000, context: 8_192 });
    sign(EXECUTOR, failed)
}

pub fn payload() -> Payload {
    let turn = |role, content| Turn { role, content: text(content) };
    Payload {
        salt: [0x5a; 16],
        turns: List::new(vec![
            turn(Role::System, "Answer with one word."),
            turn(Role::User, "What day is the day after 28 February 2027?"),
        ])
        .unwrap(),
        json_schema: Some(text("{\"type\":\"string\"}")),
        max_tokens: 128,
        temperature_milli: 700,
        top_p_milli: 950,
        seed: 0x0123_4567_89ab_cdef,
        stop: List::new(vec![text("\n\n")]).unwrap(),
        stream: true,
        policy: None,
    }
}

pub fn output() -> Output {
    Output {
        text: text("1 March 2027"),
        prompt_tokens: 40,
        completion_tokens: 12,
        finish: Finish::Stop,
        model: Hash::from_bytes([0xf0; 32]),
    }
}

pub fn sync_messages() -> Vec<(&'static str, SyncMessage)> {
    let session = 77;
    let frame = List::new((0..40).collect()).unwrap();
    let entries = List::new(vec![capability_entry().to_wire(), retire_entry().to_wire()]).unwrap();
    vec![
        ("sync open", SyncMessage::Open { session, digest: Hash::from_bytes([0xd1; 32]), frame }),
        ("sync same", SyncMessage::Same { session }),
        ("sync reply", SyncMessage::Reply { session, frame: List::new(vec![0x61, 0, 0, 2]).unwrap() }),
        (
            "sync want",
            SyncMessage::Want {
                session,
                ids: List::new(vec![capability_entry().hash(), retire_entry().hash()]).unwrap(),
            },
        ),
        ("sync items", SyncMessage::Items { session, entries, proofs: List::new(vec![equivocation()]).unwrap() }),
        ("sync abort", SyncMessage::Abort { session }),
    ]
}

/// One direct frame of every kind, and of every kind of reconciliation message.
pub fn direct_frames() -> Vec<(&'static str, Direct)> {
    let (job, fence) = (job(), 1);
    let failure = Failure::Busy;
    let mut frames = vec![
        ("bid", Direct::Bid(bid().to_wire())),
        ("release", Direct::Release { beacon: beacon_id() }),
        ("grant", Direct::Grant { lease: lease().to_wire(), payload: Box::new(payload()) }),
        ("accept", Direct::Accept { job, fence }),
        ("refuse", Direct::Refuse { job, fence, failure }),
        ("progress", Direct::Progress { job, fence, index: 3, tokens: 300, text: text("1 March") }),
        ("outcome", Direct::Outcome { job, fence, result: Ok(Box::new(output())), work: work().to_wire() }),
        (
            "outcome of a failure",
            Direct::Outcome {
                job,
                fence,
                result: Err(Failure::ContextExceeded { prompt_tokens: 9_000, context: 8_192 }),
                work: failed_work().to_wire(),
            },
        ),
        ("cancel", Direct::Cancel { job, fence }),
    ];
    frames.extend(sync_messages().into_iter().map(|(name, message)| (name, Direct::Sync(message))));
    frames.push(("busy", Direct::Busy { beacon: beacon_id(), free_in_ms: 1_500 }));
    frames
}

pub fn ledger_frames() -> Vec<(&'static str, LedgerGossip)> {
    vec![
        ("entry", LedgerGossip::Entry(capability_entry().to_wire())),
        ("equivocation", LedgerGossip::Equivocation(equivocation())),
    ]
}

pub fn beacon_frame() -> BeaconGossip {
    BeaconGossip(beacon().to_wire())
}
