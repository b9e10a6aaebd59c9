//! What a hostile frame can make a node allocate: measured with a counting allocator, not argued.
//!
//! Every sample frame is cut at every byte, and what follows is replaced by a length that claims the world. Wherever a length
//! stands in any message, some cut falls before it.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, unreachable_pub)]
#![allow(unsafe_code, reason = "an allocator cannot be written without it; it only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use chorus_protocol::beacon::{Beacon, Work};
use chorus_protocol::entry::Entry;
use chorus_protocol::job::{Failure, JobKind, Payload, Role, Turn};
use chorus_protocol::limits::{
    MAX_BEACON_BYTES, MAX_DIRECT_BYTES, MAX_ENTRY_BYTES, MAX_ROLLOUT_FRAME_BYTES, MAX_SMALL_BYTES,
};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::rollout::{Bulk, RolloutFrame};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{List, NodeId, Text, codec};

#[path = "it/rollout_samples.rs"]
#[allow(dead_code, reason = "shared with the other test binary")]
mod rollout_samples;
#[path = "it/samples.rs"]
#[allow(dead_code, reason = "shared with the other test binary")]
mod samples;

/// What decoding may hold at once, beyond twice the bytes it was given: first reservations of nested lists, and the error.
const SLACK: usize = 16 * 1024;

struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn count(more: usize, less: usize) {
    NOW.with(|now| {
        let held = now.get().saturating_add(more).saturating_sub(less);
        now.set(held);
        PEAK.with(|peak| peak.set(peak.get().max(held)));
    });
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Old and new are held together while the bytes move.
        count(new_size, 0);
        let moved = unsafe { System.realloc(pointer, layout, new_size) };
        count(0, layout.size());
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Returns the most bytes held at once by this thread while `work` ran, above what was held before.
fn peak_of<T>(work: impl FnOnce() -> T) -> usize {
    // A thread's memory of checked keys has a fixed size and is there from the first key on.
    let mut any_key = [0; 32];
    any_key[0] = 3;
    assert!(NodeId::from_bytes(&any_key).is_ok());
    let before = NOW.get();
    PEAK.set(before);
    drop(work());
    PEAK.get() - before
}

/// Lengths that lie: a little over, the maxima of this crate's types, and the absurd. In the codec's integer form.
fn claims() -> Vec<Vec<u8>> {
    let small = [250u8].map(|len| vec![len]);
    let medium =
        [255u16, 256, 511, 512, 1_024, 16_384, 61_440, u16::MAX].map(|len| [&[251][..], &len.to_le_bytes()].concat());
    let large = [131_072u32, 1 << 20, 2 << 20, u32::MAX].map(|len| [&[252][..], &len.to_le_bytes()].concat());
    let absurd =
        [1u64 << 40, 1 << 60, u64::MAX / 32 + 1, u64::MAX].map(|len| [&[253][..], &len.to_le_bytes()].concat());
    small.into_iter().chain(medium).chain(large).chain(absurd).collect()
}

/// Every prefix of `bytes`, each followed by every claim and a few bytes to chew on.
fn hostile(bytes: &[u8], mut offer: impl FnMut(&[u8])) {
    for claim in claims() {
        for cut in 0..=bytes.len() {
            for tail in [0, 40] {
                let mut hostile = [&bytes[..cut], &claim].concat();
                hostile.resize(hostile.len() + tail, 1);
                offer(&hostile);
            }
        }
    }
}

fn frames_stay_small<F: Frame>(frame: &F) {
    let bytes = frame.to_bytes().unwrap();
    let mut worst = 0;
    hostile(&bytes, |hostile| {
        let peak = peak_of(|| F::from_bytes(hostile));
        assert!(peak <= 2 * hostile.len() + SLACK, "{} bytes made {} hold {peak}", hostile.len(), F::KIND);
        worst = worst.max(peak);
    });
    assert!(worst > 0, "the allocator counts");
}

fn records_stay_small<T: bincode::Encode + bincode::Decode<()>>(kind: &'static str, record: &T, max: usize) {
    hostile(&codec::encode(record), |hostile| {
        let peak = peak_of(|| codec::decode::<T>(kind, hostile, max));
        assert!(peak <= 2 * hostile.len() + SLACK, "{} bytes made a {kind} hold {peak}", hostile.len());
    });
}

#[test]
fn a_claimed_length_allocates_nothing() {
    for (_, frame) in samples::direct_frames() {
        frames_stay_small(&frame);
    }
    for (_, frame) in samples::ledger_frames() {
        frames_stay_small(&frame);
    }
    frames_stay_small(&samples::beacon_frame());
    for (_, message) in rollout_samples::messages() {
        records_stay_small::<Bulk>(Bulk::KIND, &message, Bulk::MAX_BYTES);
    }
    for base in [100, 100_000] {
        records_stay_small::<RolloutFrame>("rollouts", &rollout_samples::frame(base), MAX_ROLLOUT_FRAME_BYTES);
    }
    records_stay_small::<Entry>("entry", &samples::capability_entry(), MAX_ENTRY_BYTES);
    records_stay_small::<Entry>("entry", &samples::receipt_entry(), MAX_ENTRY_BYTES);
    records_stay_small::<Beacon>("beacon", &samples::beacon(), MAX_BEACON_BYTES);
    records_stay_small::<Work>("work", &samples::failed_work(), MAX_SMALL_BYTES);
}

#[test]
fn a_frame_over_its_limit_allocates_nothing() {
    let bytes = vec![8; MAX_DIRECT_BYTES + 1];
    assert_eq!(peak_of(|| Direct::from_bytes(&bytes)), 0);
    assert_eq!(peak_of(|| LedgerGossip::from_bytes(&bytes)), 0);
    assert_eq!(peak_of(|| BeaconGossip::from_bytes(&bytes)), 0);
}

/// Lists in lists, each full, each element as small on the wire and as large in memory as it can be.
#[test]
fn full_lists_of_next_to_nothing_stay_small() {
    let mut payload: Payload = samples::payload();
    payload.turns = List::new(vec![Turn { role: Role::User, content: Text::default() }; 64]).unwrap();
    payload.stop = List::new(vec![Text::default(); 8]).unwrap();
    let grant = Direct::Grant { lease: samples::lease().to_wire(), payload: Box::new(payload) };

    let mut capability = samples::capability();
    let mut skill = capability.skills[1].clone();
    skill.text = Text::default();
    skill.tags = List::new(vec![Text::default(); 8]).unwrap();
    capability.skills = List::new(vec![skill; 8]).unwrap();
    capability.tools = List::new(vec![capability.tools[0].clone(); 8]).unwrap();
    capability.devices = List::new(vec![capability.devices[0].clone(); 16]).unwrap();
    capability.models = List::new(vec![capability.models[0].clone(); 8]).unwrap();

    let entry = samples::retire_entry().to_wire();
    let items = Direct::Sync(SyncMessage::Items {
        session: 1,
        entries: List::new(vec![entry; 512]).unwrap(),
        proofs: List::new(vec![samples::equivocation(); 16]).unwrap(),
    });
    for bytes in [grant.to_bytes().unwrap(), items.to_bytes().unwrap()] {
        assert!(Direct::from_bytes(&bytes).is_ok());
        let peak = peak_of(|| Direct::from_bytes(&bytes));
        assert!(peak <= 2 * bytes.len() + SLACK, "{} bytes held {peak}", bytes.len());
    }
    let bytes = codec::encode(&capability);
    let peak =
        peak_of(|| codec::decode::<chorus_protocol::capability::Capability>("capability", &bytes, MAX_ENTRY_BYTES));
    assert!(peak <= 2 * bytes.len() + SLACK, "{} bytes held {peak}", bytes.len());
}

/// The largest frames that are accepted cost their own size, a little more, and one copy of a record on its way.
#[test]
fn the_largest_good_frame_costs_little_more_than_itself() {
    let turn = |len| Turn { role: Role::User, content: Text::new("x".repeat(len)).unwrap() };
    let mut payload = samples::payload();
    payload.turns = List::new(vec![turn(131_072), turn(130_000)]).unwrap();
    let grant = Direct::Grant { lease: samples::lease().to_wire(), payload: Box::new(payload) };
    let bytes = grant.to_bytes().unwrap();
    assert!(bytes.len() > 260_000);
    assert!(Direct::from_bytes(&bytes).is_ok());
    let peak = peak_of(|| Direct::from_bytes(&bytes));
    assert!(peak <= bytes.len() + SLACK, "{} bytes held {peak}", bytes.len());

    let failure = Failure::Engine(Text::new("x".repeat(256)).unwrap());
    let mut work = (*samples::work()).clone();
    work.kind = JobKind::Plan;
    work.failure = Some(failure);
    let work = samples::sign(samples::EXECUTOR, work).to_wire();
    let outcome = Direct::Outcome { job: samples::job(), fence: 1, result: Err(Failure::Busy), work };
    let bytes = outcome.to_bytes().unwrap();
    assert!(peak_of(|| Direct::from_bytes(&bytes)) <= 3 * bytes.len());
}
