//! Proptest strategies for everything that crosses the wire. They are boxed: as nested types they would not fit a stack.

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
    BeaconId, Embedding, Hash, JobId, List, NetworkId, NodeId, Received, SecretKey, Signable, Text, Verified, WallTime,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// So many cases in a development build, and eight times as many in an optimised one.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases: if cfg!(debug_assertions) { cases } else { 8 * cases }, ..ProptestConfig::default() }
}

pub fn network() -> NetworkId {
    "test".parse().unwrap()
}

pub fn secret() -> impl Strategy<Value = SecretKey> {
    any::<[u8; 32]>().prop_map(|bytes| SecretKey::from_bytes(&bytes))
}

pub fn node() -> impl Strategy<Value = NodeId> {
    secret().prop_map(|key| key.node_id())
}

pub fn hash() -> impl Strategy<Value = Hash> {
    any::<[u8; 32]>().prop_map(Hash::from_bytes)
}

pub fn beacon_id() -> impl Strategy<Value = BeaconId> {
    any::<[u8; 16]>().prop_map(BeaconId::from_bytes)
}

pub fn job_id() -> impl Strategy<Value = JobId> {
    any::<[u8; 16]>().prop_map(JobId::from_bytes)
}

/// Integers of every encoded width, so that each form of the variable-length integer is met.
pub fn int() -> impl Strategy<Value = u64> {
    prop_oneof![0..251u64, 251..=0xffffu64, 0x1_0000..=0xffff_ffffu64, 0x1_0000_0000..=u64::MAX]
}

pub fn int32() -> impl Strategy<Value = u32> {
    int().prop_map(|n| n as u32)
}

pub fn int16() -> impl Strategy<Value = u16> {
    int().prop_map(|n| n as u16)
}

pub fn wall() -> impl Strategy<Value = WallTime> {
    int().prop_map(WallTime::from_millis)
}

/// Mostly short texts, some that fill their type to the last byte, some of many-byte characters.
pub fn text<const MAX: usize>() -> BoxedStrategy<Text<MAX>> {
    prop_oneof![
        6 => "\\PC{0,24}".prop_map(|text| Text::truncated(&text)),
        1 => Just(()).prop_map(|()| Text::truncated(&"x".repeat(MAX))),
        1 => Just(()).prop_map(|()| Text::truncated(&"日".repeat(MAX / 3 + 1))),
    ]
    .boxed()
}

/// Texts that stay short, for types whose limit is as large as a message.
pub fn short_text<const MAX: usize>() -> BoxedStrategy<Text<MAX>> {
    "\\PC{0,400}".prop_map(|text| Text::truncated(&text)).boxed()
}

pub fn list<S, const MAX: usize>(item: S, typical: usize) -> impl Strategy<Value = List<S::Value, MAX>>
where
    S: Strategy,
    S::Value: Clone,
{
    vec(item, 0..=typical.min(MAX)).prop_map(|items| List::new(items).unwrap())
}

pub fn bytes<const MAX: usize>(typical: usize) -> impl Strategy<Value = List<u8, MAX>> {
    vec(any::<u8>(), 0..=typical.min(MAX)).prop_map(|items| List::new(items).unwrap())
}

pub fn embedding() -> BoxedStrategy<Embedding> {
    vec(-1.0f32..1.0, DIMENSIONS)
        .prop_map(|v| Embedding::from_f32(&v.try_into().unwrap()))
        .prop_filter_map("the zero vector has no direction", |embedding| embedding)
        .boxed()
}

pub fn rate() -> impl Strategy<Value = Rate> {
    (0.0..5.0e6f64).prop_map(Rate::from_tokens_per_s)
}

pub fn device() -> BoxedStrategy<Device> {
    let kind = prop::sample::select(vec![DeviceKind::Cpu, DeviceKind::Cuda, DeviceKind::Metal, DeviceKind::Remote]);
    (kind, text(), int32()).prop_map(|(kind, name, memory_mib)| Device { kind, name, memory_mib }).boxed()
}

pub fn model() -> BoxedStrategy<ModelOffer> {
    (text(), hash(), text(), text(), int32(), rate(), rate())
        .prop_map(|(name, fingerprint, architecture, quantisation, context, prefill, decode)| ModelOffer {
            name,
            fingerprint,
            architecture,
            quantisation,
            context,
            prefill,
            decode,
        })
        .boxed()
}

pub fn skill() -> BoxedStrategy<Skill> {
    (text(), list(text(), 8), option::of(embedding()))
        .prop_map(|(text, tags, embedding)| Skill { text, tags, embedding })
        .boxed()
}

pub fn tool() -> BoxedStrategy<Tool> {
    (text(), text(), text()).prop_map(|(name, description, schema)| Tool { name, description, schema }).boxed()
}

/// Capabilities that fit an entry: each list is short, though every element may be full.
pub fn capability() -> BoxedStrategy<Capability> {
    let lists = (list(model(), 3), list(device(), 3), list(skill(), 3), list(tool(), 3));
    (text(), text(), int16(), lists, option::of(sampling_offer()))
        .prop_map(|(name, software, slots, (models, devices, skills, tools), sampling)| Capability {
            name,
            software,
            models,
            devices,
            slots,
            skills,
            tools,
            sampling,
        })
        .boxed()
}

pub fn policy_id() -> impl Strategy<Value = PolicyId> {
    (secret(), text()).prop_map(|(key, name)| PolicyId { owner: key.node_id(), name })
}

pub fn sampling_offer() -> impl Strategy<Value = SamplingOffer> {
    (int16(), int32(), option::of(policy_id())).prop_map(|(slots, price_milli, policy)| SamplingOffer {
        slots,
        price_milli,
        policy,
    })
}

pub fn job_kind() -> impl Strategy<Value = JobKind> {
    prop::sample::select(vec![JobKind::Plan, JobKind::Answer, JobKind::Sample])
}

pub fn requirement() -> BoxedStrategy<Requirement> {
    (option::of(embedding()), list(text(), 8), option::of(text()), option::of(text()), int32(), option::of(policy_id()))
        .prop_map(|(embedding, tags, model, tool, min_context, policy)| Requirement {
            embedding,
            tags,
            model,
            tool,
            min_context,
            policy,
        })
        .boxed()
}

pub fn failure() -> BoxedStrategy<Failure> {
    prop_oneof![
        Just(Failure::Busy),
        Just(Failure::NoSuchModel),
        (int32(), int32()).prop_map(|(prompt_tokens, context)| Failure::ContextExceeded { prompt_tokens, context }),
        text().prop_map(Failure::Engine),
        text().prop_map(Failure::InvalidPayload),
        Just(Failure::StaleLease),
        Just(Failure::Cancelled),
        Just(Failure::Deadline),
        Just(Failure::Leaving),
    ]
    .boxed()
}

pub fn beacon() -> BoxedStrategy<Beacon> {
    let risk = prop::sample::select(vec![Risk::Low, Risk::Medium, Risk::High]);
    let rank = (int16(), int32()).prop_map(|(score_milli, draw)| Rank { score_milli, draw });
    (beacon_id(), job_id(), job_kind(), requirement(), risk, wall(), wall(), int32(), int16(), rank)
        .prop_map(|(id, job, kind, requirement, risk, made, deadline, window_ms, executors, invited)| Beacon {
            id,
            job,
            kind,
            requirement,
            risk,
            made,
            deadline,
            window_ms,
            executors,
            invited,
        })
        .boxed()
}

pub fn bid() -> BoxedStrategy<Bid> {
    (beacon_id(), node(), int16(), int16(), int16(), int32(), int32())
        .prop_map(|(beacon, requester, score_milli, active, slots, expected_ms, hold_ms)| Bid {
            beacon,
            requester,
            score_milli,
            active,
            slots,
            expected_ms,
            hold_ms,
        })
        .boxed()
}

pub fn lease() -> BoxedStrategy<Lease> {
    (job_id(), beacon_id(), node(), int(), job_kind(), hash(), wall())
        .prop_map(|(job, beacon, executor, fence, kind, requirement, deadline)| Lease {
            job,
            beacon,
            executor,
            fence,
            kind,
            requirement,
            deadline,
        })
        .boxed()
}

pub fn work() -> BoxedStrategy<Work> {
    ((job_id(), node(), int(), job_kind(), hash(), hash()), (hash(), int32(), int32(), int32(), option::of(failure())))
        .prop_map(|((job, requester, fence, kind, requirement, output), rest)| {
            let (model, prompt_tokens, completion_tokens, elapsed_ms, failure) = rest;
            Work {
                job,
                requester,
                fence,
                kind,
                requirement,
                output,
                model,
                prompt_tokens,
                completion_tokens,
                elapsed_ms,
                failure,
            }
        })
        .boxed()
}

/// A record with the signature of somebody.
pub fn signed<S>(record: S) -> impl Strategy<Value = Verified<S::Value>>
where
    S: Strategy,
    S::Value: Signable,
{
    (secret(), record).prop_map(|(key, value)| Verified::sign(&key, &network(), value).unwrap())
}

pub fn envelope<S>(record: S) -> impl Strategy<Value = Received<S::Value>>
where
    S: Strategy,
    S::Value: Signable,
{
    signed(record).prop_map(|verified| verified.to_wire())
}

pub fn receipt() -> BoxedStrategy<Receipt> {
    let verdict = prop::sample::select(vec![Verdict::Accepted, Verdict::Failed, Verdict::Superseded, Verdict::Invalid]);
    (envelope(work()), verdict, int32())
        .prop_map(|(work, verdict, observed_ms)| Receipt { work, verdict, observed_ms })
        .boxed()
}

pub fn version() -> impl Strategy<Value = Version> {
    hash().prop_map(Version::from_hash)
}

pub fn policy_notice() -> BoxedStrategy<PolicyNotice> {
    (text(), version(), int(), list(text(), 4), any::<bool>())
        .prop_map(|(name, version, step, environments, running)| PolicyNotice {
            name,
            version,
            step,
            environments,
            running,
        })
        .boxed()
}

pub fn misbehaviour() -> BoxedStrategy<Misbehaviour> {
    use Charge::{Copied, Edited, WrongPrompt, WrongReward, WrongVersion};
    let charge = prop::sample::select(vec![WrongReward, WrongPrompt, WrongVersion, Edited, Copied]);
    (node(), (node(), text()), version(), charge, hash(), int())
        .prop_map(|(accused, (owner, name), version, charge, evidence, evidence_bytes)| Misbehaviour {
            accused,
            policy: PolicyId { owner, name },
            version,
            charge,
            evidence,
            evidence_bytes,
        })
        .boxed()
}

pub fn body() -> BoxedStrategy<Body> {
    prop_oneof![
        capability().prop_map(|capability| Body::Capability(std::sync::Arc::new(capability))),
        Just(Body::Retire),
        receipt().prop_map(|receipt| Body::Receipt(Box::new(receipt))),
        policy_notice().prop_map(|notice| Body::Policy(Box::new(notice))),
        misbehaviour().prop_map(|accusation| Body::Misbehaviour(Box::new(accusation))),
    ]
    .boxed()
}

pub fn entry() -> BoxedStrategy<Entry> {
    (int(), hash(), wall(), wall(), body())
        .prop_map(|(seq, prev, wall_time, expires, body)| Entry { seq, prev, wall_time, expires, body })
        .boxed()
}

/// Two entries of one author under one number.
pub fn equivocation() -> BoxedStrategy<Equivocation> {
    (secret(), entry(), entry())
        .prop_filter_map("equal entries prove nothing", |(key, first, mut second)| {
            second.seq = first.seq;
            let sign = |entry| Verified::sign(&key, &network(), entry).unwrap();
            Equivocation::new(&sign(first), &sign(second)).ok()
        })
        .boxed()
}

pub fn turn() -> BoxedStrategy<Turn> {
    let role = prop::sample::select(vec![Role::System, Role::User, Role::Assistant]);
    (role, short_text()).prop_map(|(role, content)| Turn { role, content }).boxed()
}

pub fn payload() -> BoxedStrategy<Payload> {
    (
        (any::<[u8; 16]>(), list(turn(), 6), option::of(short_text()), int32(), int32()),
        (int32(), int(), list(text(), 8), any::<bool>(), option::of(policy_id())),
    )
        .prop_map(|((salt, turns, json_schema, max_tokens, temperature_milli), rest)| {
            let (top_p_milli, seed, stop, stream, policy) = rest;
            Payload { salt, turns, json_schema, max_tokens, temperature_milli, top_p_milli, seed, stop, stream, policy }
        })
        .boxed()
}

pub fn output() -> BoxedStrategy<Output> {
    let finish = prop::sample::select(vec![Finish::Stop, Finish::Length]);
    (short_text(), int32(), int32(), finish, hash())
        .prop_map(|(text, prompt_tokens, completion_tokens, finish, model)| Output {
            text,
            prompt_tokens,
            completion_tokens,
            finish,
            model,
        })
        .boxed()
}

pub fn sync() -> BoxedStrategy<SyncMessage> {
    prop_oneof![
        (int(), hash(), bytes(600)).prop_map(|(session, digest, frame)| SyncMessage::Open { session, digest, frame }),
        int().prop_map(|session| SyncMessage::Same { session }),
        (int(), bytes(600)).prop_map(|(session, frame)| SyncMessage::Reply { session, frame }),
        (int(), list(hash(), 20)).prop_map(|(session, ids)| SyncMessage::Want { session, ids }),
        (int(), list(envelope(entry()), 3), list(equivocation(), 2))
            .prop_map(|(session, entries, proofs)| SyncMessage::Items { session, entries, proofs }),
        int().prop_map(|session| SyncMessage::Abort { session }),
    ]
    .boxed()
}

pub fn ledger_gossip() -> BoxedStrategy<LedgerGossip> {
    prop_oneof![envelope(entry()).prop_map(LedgerGossip::Entry), equivocation().prop_map(LedgerGossip::Equivocation),]
        .boxed()
}

pub fn beacon_gossip() -> BoxedStrategy<BeaconGossip> {
    envelope(beacon()).prop_map(BeaconGossip).boxed()
}

pub fn direct() -> BoxedStrategy<Direct> {
    let result = prop_oneof![output().prop_map(|output| Ok(Box::new(output))), failure().prop_map(Err)];
    prop_oneof![
        envelope(bid()).prop_map(Direct::Bid),
        beacon_id().prop_map(|beacon| Direct::Release { beacon }),
        (envelope(lease()), payload()).prop_map(|(lease, payload)| Direct::Grant { lease, payload: Box::new(payload) }),
        (job_id(), int()).prop_map(|(job, fence)| Direct::Accept { job, fence }),
        (job_id(), int(), failure()).prop_map(|(job, fence, failure)| Direct::Refuse { job, fence, failure }),
        (job_id(), int(), int32(), int32(), short_text())
            .prop_map(|(job, fence, index, tokens, text)| { Direct::Progress { job, fence, index, tokens, text } }),
        (job_id(), int(), result, envelope(work())).prop_map(|(job, fence, result, work)| Direct::Outcome {
            job,
            fence,
            result,
            work
        }),
        (job_id(), int()).prop_map(|(job, fence)| Direct::Cancel { job, fence }),
        sync().prop_map(Direct::Sync),
        (beacon_id(), int32()).prop_map(|(beacon, free_in_ms)| Direct::Busy { beacon, free_in_ms }),
    ]
    .boxed()
}
