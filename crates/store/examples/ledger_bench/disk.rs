//! What the disk costs: records stored a second, and opening with many of them.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use chorus_ledger::{Ledger, LedgerConfig, LedgerEffect, LedgerInput, PersistBatch};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::entry::Entry;
use chorus_protocol::message::{Frame, LedgerGossip};
use chorus_protocol::{Verified, WallTime};
use chorus_store::{Batch, Durability, Store, StoreHandle, SubmitError};

use crate::clock::{Start, processor_s, spread};
use crate::records::{WALL, bare_rate, key, network};

const QUEUE: usize = 1_024;

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

/// Prints how many records a second are decoded, verified, admitted and stored, against the bare signature check in the same run.
pub(crate) fn rates(name: &str, signatures: f64, frames: &[Vec<u8>], dir: &Path, repetitions: u64) {
    let (mut bare, mut relaxed, mut synced) = (vec![], vec![], vec![]);
    for _ in 0..repetitions {
        bare.push(bare_rate());
        relaxed.push(stored_rate(frames, dir, Durability::Relaxed));
        synced.push(stored_rate(frames, dir, Durability::Synced));
    }
    println!("{name}:");
    let wall = |rates: &[(f64, f64)]| rates.iter().map(|rates| rates.0).collect();
    spread("  bare verify_strict", "signatures/s", wall(&bare));
    spread("  decoded, verified, admitted, stored", "entries/s", wall(&relaxed));
    spread("  the same, each acknowledged by the disk itself", "entries/s", wall(&synced));
    let pairs = |rates: &[(f64, f64)], pick: fn(&(f64, f64)) -> f64| {
        rates.iter().zip(&bare).map(|(rates, bare)| pick(rates) * signatures / pick(bare)).collect()
    };
    spread("  stored: signatures against bare, by the clock", "", pairs(&relaxed, |rates| rates.0));
    spread("  stored: signatures against bare, by processor time", "", pairs(&relaxed, |rates| rates.1));
    spread("  stored and synced, by the clock", "", pairs(&synced, |rates| rates.0));
    spread("  stored and synced, by processor time", "", pairs(&synced, |rates| rates.1));
}

/// Prints how long a store with these records takes to open, to load, and to become a ledger again.
pub(crate) fn reopen(all: Vec<Verified<Entry>>, dir: &Path, repetitions: u64) {
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
}
