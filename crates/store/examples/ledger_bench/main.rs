//! What the ledger costs: records verified, admitted and stored a second against the bare signature check; the bytes and the time
//! of a reconciliation; opening with many entries; memory.
//!
//! ```text
//! cargo run --release -p chorus-store --example ledger_bench [entries] [differences] [repetitions] [directory]
//! ```
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark stops at the first surprise")]

mod clock;
mod disk;
mod records;
mod wire;

use chorus_store::Store;
use clock::resident_mib;
use records::{capabilities, frames, network, receipts};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, usual: u64| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(usual);
    let (entries, differences, repetitions) = (number(0, 100_000), number(1, 100), number(2, 7));
    let dir = words.get(3).map_or_else(std::env::temp_dir, Into::into).join("chorus-ledger-bench");
    std::fs::create_dir_all(&dir).unwrap();

    let before = resident_mib();
    let store = Store::open(&dir.join("empty"), &network()).unwrap();
    println!("an open, empty store: {:.1} MiB resident more than without ({before:.1} MiB)", resident_mib() - before);
    drop(store);

    let all = receipts(entries);
    disk::rates("capabilities, each of another author", 1.0, &frames(&capabilities()), &dir, repetitions);
    disk::rates("receipts (two signatures each)", 2.0, &frames(&all), &dir, repetitions);
    wire::reconcile(&all, usize::try_from(differences).unwrap(), false);
    wire::reconcile(&all, usize::try_from(differences).unwrap(), true);
    disk::reopen(all, &dir, repetitions);
    println!("resident at the end: {:.1} MiB", resident_mib());
    let _ = std::fs::remove_dir_all(&dir);
}
