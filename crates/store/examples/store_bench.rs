//! What the disk costs: entries verified, admitted and stored a second against the bare signature check; opening with many
//! entries; memory.
//!
//! ```text
//! cargo run --release -p chorus-store --example store_bench [entries] [repetitions] [directory]
//! ```
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark stops at the first surprise")]

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use chorus_ledger::{Ledger, LedgerConfig, LedgerEffect, LedgerInput, PersistBatch};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::job::JobKind;
use chorus_protocol::message::{Frame, LedgerGossip};
use chorus_protocol::{Hash, JobId, List, NetworkId, SecretKey, Text, Verified, WallTime};
use chorus_store::{Batch, Durability, Store, StoreHandle, SubmitError};
use ed25519_dalek::{Signature, Signer, SigningKey};

const WALL: u64 = 1_800_000_000_000;
const SAMPLE: u64 = 10_000;
const QUEUE: usize = 1_024;

fn network() -> NetworkId {
    "bench".parse().unwrap()
}

fn key(n: u64) -> SecretKey {
    let mut secret = [7; 32];
    secret[..8].copy_from_slice(&n.to_le_bytes());
    SecretKey::from_bytes(&secret)
}

fn sign(author: &SecretKey, seq: u64, prev: Hash, body: Body) -> Verified<Entry> {
    let (wall_time, expires) = (WallTime::from_millis(WALL), WallTime::from_millis(WALL + 3_600_000));
    Verified::sign(author, &network(), Entry { seq, prev, wall_time, expires, body }).unwrap()
}

fn capabilities() -> Vec<Verified<Entry>> {
    let capability = |n: u64| Capability {
        name: Text::truncated(&format!("node {n}")),
        software: Text::truncated("chorus/0.1.0"),
        models: List::default(),
        devices: List::default(),
        slots: 1,
        skills: List::default(),
        tools: List::default(),
    };
    (0..SAMPLE).map(|n| sign(&key(n), 1, Hash::ZERO, Body::Capability(Box::new(capability(n))))).collect()
}

/// Receipts of fifty authors in turn, each in a chain.
fn receipts(count: u64) -> Vec<Verified<Entry>> {
    let keys: Vec<SecretKey> = (0..50).map(key).collect();
    let mut heads = [Hash::ZERO; 50];
    let mut receipt = |n: u64| {
        let author = usize::try_from(n % 50).unwrap();
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
        let work = Verified::sign(&keys[(author + 1) % 50], &network(), work).unwrap().to_wire();
        let body = Body::Receipt(Box::new(Receipt { work, verdict: Verdict::Accepted, observed_ms: 2_010 }));
        let entry = sign(&keys[author], n / 50 + 1, heads[author], body);
        heads[author] = entry.hash();
        entry
    };
    (0..count).map(&mut receipt).collect()
}

fn bare_rate() -> (f64, f64) {
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

/// A moment on both clocks.
struct Start(Instant, f64);

impl Start {
    fn now() -> Self {
        Self(Instant::now(), processor_s())
    }

    /// Returns so many things a second: on the wall, and of processor time.
    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn rates(&self, count: usize) -> (f64, f64) {
        (count as f64 / self.0.elapsed().as_secs_f64(), count as f64 / (processor_s() - self.1))
    }
}

fn batch(batch: PersistBatch, durability: Durability) -> Batch {
    let PersistBatch { puts, deletes, marks, proofs, pardons, .. } = batch;
    Batch { puts, deletes, marks, proofs, pardons, records: Vec::new(), durability }
}

/// From encoded frames to the last completion of the disk.
fn stored_rate(frames: &[Vec<u8>], dir: &Path, durability: Durability) -> (f64, f64) {
    let path = dir.join("rate");
    let _ = std::fs::remove_dir_all(&path);
    let store = Store::open(&path, &network()).unwrap();
    let (tx, rx) = mpsc::channel();
    let writer = StoreHandle::spawn(store, QUEUE, Box::new(move |done| tx.send(done).unwrap())).unwrap();
    let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(999_999));
    let (mut rng, mut out, mut batches) = (Rng::from_u64(1), Outbox::new(), 0);
    let from = key(999_998).node_id();
    let start = Start::now();
    for frame in frames {
        let mut cx = Ctx { now: Time::ZERO, wall: WallTime::from_millis(WALL), rng: &mut rng };
        let frame = LedgerGossip::from_bytes(frame).unwrap();
        ledger.handle(&mut cx, LedgerInput::Gossip { from, frame }, &mut out);
        for effect in out.drain() {
            let LedgerEffect::Persist(persist) = effect else { continue };
            batches += 1;
            let (id, mut waiting) = (persist.batch, batch(persist, durability));
            while let Err(SubmitError::Full(again)) = writer.submit(id, waiting) {
                waiting = *again;
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
    for _ in 0..batches {
        rx.recv().unwrap().result.unwrap();
    }
    let rates = start.rates(frames.len());
    assert_eq!(ledger.len(), frames.len());
    rates
}

fn spread(name: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    println!(
        "{name:<58} {median:>12.3} {unit} (of {}: {:.3} to {:.3})",
        values.len(),
        values[0],
        values[values.len() - 1]
    );
}

/// Processor time that this process has used, in seconds, with the threads that have ended, as Linux gives it (to 10 ms). On a
/// machine that is busy with other things it says more than the clock on the wall.
fn processor_s() -> f64 {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // What follows the command's name: the state is field 3, user and system time are fields 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Resident memory of this process in MiB, as Linux gives it.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let entries = words.first().and_then(|word| word.parse().ok()).unwrap_or(100_000);
    let repetitions: u64 = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(7);
    let dir = words.get(2).map_or_else(std::env::temp_dir, Into::into).join("chorus-store-bench");
    std::fs::create_dir_all(&dir).unwrap();

    let before = resident_mib();
    let store = Store::open(&dir.join("empty"), &network()).unwrap();
    println!("an open, empty store: {:.1} MiB resident more than without ({before:.1} MiB)", resident_mib() - before);
    drop(store);

    let frames = |entries: &[Verified<Entry>]| -> Vec<Vec<u8>> {
        let sample = entries.iter().take(usize::try_from(SAMPLE).unwrap());
        sample.map(|entry| LedgerGossip::Entry(entry.to_wire()).to_bytes().unwrap()).collect()
    };
    let all = receipts(entries);
    for (name, per_entry, frames) in
        [("capabilities", 1.0, frames(&capabilities())), ("receipts (two signatures each)", 2.0, frames(&all))]
    {
        let (mut bare, mut relaxed, mut synced) = (vec![], vec![], vec![]);
        for _ in 0..repetitions {
            bare.push(bare_rate());
            relaxed.push(stored_rate(&frames, &dir, Durability::Relaxed));
            synced.push(stored_rate(&frames, &dir, Durability::Synced));
        }
        println!("{name}:");
        let wall = |rates: &[(f64, f64)]| rates.iter().map(|rates| rates.0).collect();
        spread("  bare verify_strict", "signatures/s", wall(&bare));
        spread("  decoded, verified, admitted, stored", "entries/s", wall(&relaxed));
        spread("  the same, each acknowledged by the disk itself", "entries/s", wall(&synced));
        let pairs = |rates: &[(f64, f64)], pick: fn(&(f64, f64)) -> f64| {
            rates.iter().zip(&bare).map(|(rates, bare)| pick(rates) * per_entry / pick(bare)).collect()
        };
        spread("  stored: signatures against bare, by the clock", "", pairs(&relaxed, |rates| rates.0));
        spread("  stored: signatures against bare, by processor time", "", pairs(&relaxed, |rates| rates.1));
        spread("  stored and synced, by the clock", "", pairs(&synced, |rates| rates.0));
        spread("  stored and synced, by processor time", "", pairs(&synced, |rates| rates.1));
    }

    let path = dir.join("reopen");
    let _ = std::fs::remove_dir_all(&path);
    let store = Store::open(&path, &network()).unwrap();
    for chunk in all.chunks(1_000) {
        store.apply(&Batch { puts: chunk.to_vec(), ..Batch::default() }).unwrap();
    }
    drop(store);
    let count = all.len();
    drop(all);
    let (mut opened, mut loaded, mut restored, mut processor) = (vec![], vec![], vec![], vec![]);
    for _ in 0..repetitions {
        let (start, busy) = (Instant::now(), processor_s());
        let store = Store::open(&path, &network()).unwrap();
        opened.push(start.elapsed().as_secs_f64());
        let found = store.load().unwrap();
        assert_eq!(found.entries.len(), count);
        loaded.push(start.elapsed().as_secs_f64());
        let mut ledger = Ledger::new(LedgerConfig::default(), network(), key(999_999));
        let proofs = found.proofs.into_iter().map(|(_, proof)| proof).collect();
        ledger.restore(WallTime::from_millis(WALL), found.entries, proofs, found.marks);
        restored.push(start.elapsed().as_secs_f64());
        processor.push(processor_s() - busy);
        assert_eq!(ledger.len(), count);
    }
    println!("a store of {count} receipts:");
    spread("  opened after", "s", opened);
    spread("  and loaded after", "s", loaded);
    spread("  and the ledger's state restored after", "s", restored);
    spread("  processor time of all that, all threads", "s", processor);
    println!("resident at the end: {:.1} MiB", resident_mib());
    let _ = std::fs::remove_dir_all(&dir);
}
