//! The records that are measured: capabilities of as many authors, receipts of fifty authors in chains, and bare signatures.

use std::sync::Arc;

use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::job::JobKind;
use chorus_protocol::message::{Frame, LedgerGossip};
use chorus_protocol::{Hash, JobId, List, NetworkId, SecretKey, Text, Verified, WallTime};
use ed25519_dalek::{Signature, Signer, SigningKey};

use crate::clock::Start;

/// The moment at which everything happens, in milliseconds since 1970.
pub(crate) const WALL: u64 = 1_800_000_000_000;
/// Records of each kind whose rate is measured.
pub(crate) const SAMPLE: u64 = 10_000;
const AUTHORS: u64 = 50;

pub(crate) fn network() -> NetworkId {
    "bench".parse().unwrap()
}

pub(crate) fn key(n: u64) -> SecretKey {
    let mut secret = [7; 32];
    secret[..8].copy_from_slice(&n.to_le_bytes());
    SecretKey::from_bytes(&secret)
}

fn sign(author: &SecretKey, seq: u64, prev: Hash, made: u64, body: Body) -> Verified<Entry> {
    let (wall_time, expires) = (WallTime::from_millis(made), WallTime::from_millis(WALL + 86_400_000));
    Verified::sign(author, &network(), Entry { seq, prev, wall_time, expires, body }).unwrap()
}

pub(crate) fn capabilities() -> Vec<Verified<Entry>> {
    let capability = |n: u64| Capability {
        name: Text::truncated(&format!("node {n}")),
        software: Text::truncated("chorus/0.1.0"),
        models: List::default(),
        devices: List::default(),
        slots: 1,
        skills: List::default(),
        tools: List::default(),
        sampling: None,
    };
    (0..SAMPLE).map(|n| sign(&key(n), 1, Hash::ZERO, WALL, Body::Capability(Arc::new(capability(n))))).collect()
}

/// Receipts of all authors in turn, each in a chain, a millisecond apart.
pub(crate) fn receipts(count: u64) -> Vec<Verified<Entry>> {
    let keys: Vec<SecretKey> = (0..AUTHORS).map(key).collect();
    let mut heads = vec![Hash::ZERO; keys.len()];
    let mut receipt = |n: u64| {
        let author = usize::try_from(n % AUTHORS).unwrap();
        let mut job = [0; 16];
        job[..8].copy_from_slice(&n.to_le_bytes());
        let work = Work {
            job: JobId::from_bytes(job),
            requester: keys[author].node_id(),
            fence: 1,
            kind: JobKind::Answer,
            requirement: Hash::derive("b", &[b"requirement"]),
            output: Hash::derive("b", &[&n.to_le_bytes()]),
            model: Hash::derive("b", &[b"model"]),
            prompt_tokens: 300,
            completion_tokens: 128,
            elapsed_ms: 2_000,
            failure: None,
        };
        let work = Verified::sign(&keys[(author + 1) % keys.len()], &network(), work).unwrap().to_wire();
        let body = Body::Receipt(Box::new(Receipt { work, verdict: Verdict::Accepted, observed_ms: 2_010 }));
        let entry = sign(&keys[author], n / AUTHORS + 1, heads[author], WALL - count + n, body);
        heads[author] = entry.hash();
        entry
    };
    (0..count).map(&mut receipt).collect()
}

/// The bare signature check, as the library offers it: the key is at hand, the message is 32 bytes.
pub(crate) fn bare_rate() -> (f64, f64) {
    let key = SigningKey::from_bytes(&[1; 32]);
    let sign = |n: u64| {
        let hash = Hash::derive("bare", &[&n.to_le_bytes()]);
        (hash, key.sign(hash.as_bytes()))
    };
    let messages: Vec<(Hash, Signature)> = (0..SAMPLE).map(sign).collect();
    let public = key.verifying_key();
    let start = Start::now();
    assert!(messages.iter().all(|(message, signature)| public.verify_strict(message.as_bytes(), signature).is_ok()));
    start.rates(messages.len())
}

/// The records' gossip frames, as they come off the wire.
pub(crate) fn frames(records: &[Verified<Entry>]) -> Vec<Vec<u8>> {
    let sample = records.iter().take(usize::try_from(SAMPLE).unwrap());
    sample.map(|entry| LedgerGossip::Entry(entry.to_wire()).to_bytes().unwrap()).collect()
}
