//! What the ledger costs: entries verified and admitted a second against the bare signature check, and the bytes and the time
//! of a reconciliation.
//!
//! ```text
//! cargo run --release -p chorus-ledger --example ledger_bench [entries] [differences] [repetitions]
//! ```
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark stops at the first surprise")]

use std::collections::VecDeque;
use std::time::Instant;

use chorus_ledger::{Ledger, LedgerConfig, LedgerEffect, LedgerInput};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::job::JobKind;
use chorus_protocol::limits::ENVELOPE_OVERHEAD_BYTES;
use chorus_protocol::message::{Direct, Frame, LedgerGossip};
use chorus_protocol::{Hash, JobId, List, NetworkId, NodeId, SecretKey, Text, Verified, WallTime};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

const WALL: u64 = 1_800_000_000_000;
const AUTHORS: u8 = 50;

fn key(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn network() -> NetworkId {
    "bench".parse().unwrap()
}

fn receipt(requester: u8, n: u64) -> Body {
    let mut job = [0; 16];
    job[..8].copy_from_slice(&n.to_le_bytes());
    let work = Work {
        job: JobId::from_bytes(job),
        requester: key(requester).node_id(),
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
    let work = Verified::sign(&key(requester % AUTHORS + 1), &network(), work).unwrap().to_wire();
    Body::Receipt(Box::new(Receipt { work, verdict: Verdict::Accepted, observed_ms: 2_010 }))
}

fn capability(n: u64) -> Body {
    Body::Capability(Box::new(Capability {
        name: Text::truncated(&format!("node {n}")),
        software: Text::truncated("chorus/0.1.0"),
        models: List::default(),
        devices: List::default(),
        slots: 1,
        skills: List::default(),
        tools: List::default(),
    }))
}

/// Receipts of all authors in turn, a millisecond apart.
fn receipts(count: u64) -> Vec<Verified<Entry>> {
    let mut heads = vec![Hash::ZERO; usize::from(AUTHORS) + 1];
    (0..count)
        .map(|n| {
            let author = u8::try_from(n % u64::from(AUTHORS) + 1).unwrap();
            let head = &mut heads[usize::from(author)];
            let wall_time = WallTime::from_millis(WALL - 1_000_000 + n);
            let expires = WallTime::from_millis(WALL + 86_400_000);
            let entry =
                Entry { seq: n / u64::from(AUTHORS) + 1, prev: *head, wall_time, expires, body: receipt(author, n) };
            let entry = Verified::sign(&key(author), &network(), entry).unwrap();
            *head = entry.hash();
            entry
        })
        .collect()
}

fn capabilities(count: u64) -> Vec<Verified<Entry>> {
    (0..count)
        .map(|n| {
            let mut secret = [7; 32];
            secret[..8].copy_from_slice(&n.to_le_bytes());
            let (wall_time, expires) = (WallTime::from_millis(WALL), WallTime::from_millis(WALL + 3_600_000));
            let entry = Entry { seq: 1, prev: Hash::ZERO, wall_time, expires, body: capability(n) };
            Verified::sign(&SecretKey::from_bytes(&secret), &network(), entry).unwrap()
        })
        .collect()
}

/// The bare signature check, as the library offers it: the key is at hand, the message is 32 bytes.
fn bare_rate(count: usize) -> f64 {
    let key = SigningKey::from_bytes(&[1; 32]);
    let messages: Vec<([u8; 32], Signature)> = (0..count)
        .map(|n| Hash::derive("bare", &[&n.to_le_bytes()]))
        .map(|hash| (*hash.as_bytes(), key.sign(hash.as_bytes())))
        .collect();
    let public: VerifyingKey = key.verifying_key();
    let start = Instant::now();
    assert!(messages.iter().all(|(message, signature)| public.verify_strict(message, signature).is_ok()));
    rate(count, start)
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn rate(count: usize, start: Instant) -> f64 {
    count as f64 / start.elapsed().as_secs_f64()
}

/// Gossips encoded frames into a fresh ledger; every one must be admitted.
fn admit_rate(frames: &[Vec<u8>]) -> f64 {
    let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(200));
    let (mut rng, mut out) = (Rng::from_u64(1), Outbox::new());
    let from = key(201).node_id();
    let start = Instant::now();
    for frame in frames {
        let mut cx = Ctx { now: Time::ZERO, wall: WallTime::from_millis(WALL), rng: &mut rng };
        let frame = LedgerGossip::from_bytes(frame).unwrap();
        ledger.handle(&mut cx, LedgerInput::Gossip { from, frame }, &mut out);
        out.drain();
    }
    assert_eq!(ledger.len(), frames.len());
    rate(frames.len(), start)
}

fn spread(name: &str, unit: &str, mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    println!(
        "{name:<52} {median:>12.3} {unit} (of {}: {:.3} to {:.3})",
        values.len(),
        values[0],
        values[values.len() - 1]
    );
    median
}

/// Two ledgers and a wire between them.
struct Pair {
    ledgers: [Ledger; 2],
    ids: [NodeId; 2],
    rngs: [Rng; 2],
    queue: VecDeque<(usize, Direct)>,
    now: Time,
    messages: usize,
    bytes: usize,
}

impl Pair {
    fn new(left: Vec<Verified<Entry>>, right: Vec<Verified<Entry>>) -> Self {
        let ledger = |n: u8, entries| {
            let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(n));
            ledger.restore(WallTime::from_millis(WALL), entries, Vec::new(), Vec::new());
            ledger
        };
        Self {
            ledgers: [ledger(200, left), ledger(201, right)],
            ids: [200, 201].map(|n| key(n).node_id()),
            rngs: [Rng::from_u64(1), Rng::from_u64(2)],
            queue: VecDeque::new(),
            now: Time::from_millis(1),
            messages: 0,
            bytes: 0,
        }
    }

    fn call(&mut self, n: usize, input: Option<LedgerInput>) {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(WALL), rng: &mut self.rngs[n] };
        match input {
            Some(input) => self.ledgers[n].handle(&mut cx, input, &mut out),
            None => self.ledgers[n].expire(&mut cx, &mut out),
        }
        for effect in out.drain() {
            if let LedgerEffect::Send { message, .. } = effect {
                self.queue.push_back((n, Direct::Sync(message)));
            }
        }
    }

    fn deliver(&mut self) {
        loop {
            if let Some((from, message)) = self.queue.pop_front() {
                let bytes = message.to_bytes().unwrap();
                self.messages += 1;
                self.bytes += bytes.len();
                let Direct::Sync(message) = Direct::from_bytes(&bytes).unwrap() else { continue };
                let id = self.ids[from];
                self.call(1 - from, Some(LedgerInput::Sync { from: id, message }));
            } else if let Some(due) = (0..2).find(|n| self.ledgers[*n].deadline().is_some_and(|at| at <= self.now)) {
                self.call(due, None);
            } else {
                break;
            }
        }
    }

    /// Lets one of the two notice the other, and runs until nothing is under way.
    fn meet(&mut self, n: usize) {
        let other = self.ids[1 - n];
        self.call(n, Some(LedgerInput::PeerUp(other)));
        self.now = self.now + std::time::Duration::from_millis(400);
        self.deliver();
        self.call(n, Some(LedgerInput::PeerDown(other)));
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn reconcile(all: &[Verified<Entry>], differences: usize, recent: bool) {
    let step = all.len() / differences;
    let differs = |n: usize| if recent { n + differences >= all.len() } else { n % step == step / 2 };
    let without = |side: usize| {
        let kept = all.iter().enumerate().filter(|(n, _)| !differs(*n) || n / step.max(1) % 2 == side);
        kept.map(|(_, entry)| entry.clone()).collect::<Vec<_>>()
    };
    let missing = all.iter().enumerate().filter(|(n, _)| differs(*n)).map(|(_, entry)| entry);
    let difference: usize = missing.map(|entry| entry.encoded_len() + ENVELOPE_OVERHEAD_BYTES).sum();
    let mut pair = Pair::new(without(0), without(1));
    let start = Instant::now();
    pair.meet(0);
    let elapsed = start.elapsed();
    assert_eq!(pair.ledgers[0].digest(), pair.ledgers[1].digest());
    let place = if recent { "the newest" } else { "scattered over all" };
    println!(
        "reconcile {} entries, {differences} differ, {place}: {} bytes in {} messages = {:.2} x the difference ({difference} bytes), {:.1} ms of processor",
        all.len(),
        pair.bytes,
        pair.messages,
        pair.bytes as f64 / difference as f64,
        elapsed.as_secs_f64() * 1e3
    );
    let (bytes, messages, start) = (pair.bytes, pair.messages, Instant::now());
    for _ in 0..100 {
        pair.meet(0);
    }
    println!(
        "reconcile {} equal entries: {} bytes in {} messages, {:.1} us of processor",
        all.len(),
        (pair.bytes - bytes) / 100,
        (pair.messages - messages) / 100,
        start.elapsed().as_secs_f64() * 1e6 / 100.0
    );
}

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let entries = numbers.first().copied().unwrap_or(100_000);
    let differences = usize::try_from(numbers.get(1).copied().unwrap_or(100)).unwrap();
    let repetitions = numbers.get(2).copied().unwrap_or(7);
    const SAMPLE: u64 = 5_000;

    println!("signing {entries} receipts");
    let all = receipts(entries);
    let frame = |entry: &Verified<Entry>| LedgerGossip::Entry(entry.to_wire()).to_bytes().unwrap();
    let receipt_frames: Vec<_> = all.iter().take(usize::try_from(SAMPLE).unwrap()).map(frame).collect();
    let capability_frames: Vec<_> = capabilities(SAMPLE).iter().map(frame).collect();

    let (mut bare, mut one, mut two, mut one_ratio, mut two_ratio) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..repetitions {
        let reference = bare_rate(usize::try_from(SAMPLE).unwrap());
        let (capability, receipt) = (admit_rate(&capability_frames), admit_rate(&receipt_frames));
        bare.push(reference);
        one.push(capability);
        two.push(receipt);
        one_ratio.push(capability / reference);
        two_ratio.push(2.0 * receipt / reference);
    }
    spread("bare verify_strict", "signatures/s", bare);
    spread("capabilities decoded, verified, admitted", "entries/s", one);
    spread("receipts (two signatures each)", "entries/s", two);
    spread("capabilities: signatures against bare", "", one_ratio);
    spread("receipts: signatures against bare", "", two_ratio);

    reconcile(&all, differences, false);
    reconcile(&all, differences, true);

    let start = Instant::now();
    let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(200));
    ledger.restore(WallTime::from_millis(WALL), all.clone(), Vec::new(), Vec::new());
    println!("restore {} entries into the state: {:.0} ms", all.len(), start.elapsed().as_secs_f64() * 1e3);
}
