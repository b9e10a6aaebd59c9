//! Random bytes into every decoder: no panic, and no input that takes longer than its length explains.

use std::time::{Duration, Instant};

use chorus_protocol::beacon::{Beacon, Bid, Lease, Receipt, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::codec;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::job::{Output, Payload, Requirement};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Embedding, NodeId, Received};
use proptest::prelude::*;

use crate::{samples, strategies};

/// Far more than any input takes, far less than one that does not end.
const TOO_LONG: Duration = Duration::from_secs(2);
const MAX: usize = Direct::MAX_BYTES;

/// Offers the bytes to every decoder there is. Whatever is accepted must encode to those very bytes.
fn offer(bytes: &[u8]) {
    fn decoder<T: bincode::Encode + bincode::Decode<()>>(bytes: &[u8]) {
        if let Ok(value) = codec::decode::<T>("anything", bytes, MAX) {
            assert_eq!(codec::encode(&value), bytes);
        }
    }
    fn frame<F: Frame>(bytes: &[u8]) {
        if let Ok(frame) = F::from_bytes(bytes) {
            assert_eq!(frame.to_bytes().unwrap(), bytes);
        }
    }
    let start = Instant::now();
    frame::<LedgerGossip>(bytes);
    frame::<BeaconGossip>(bytes);
    frame::<Direct>(bytes);
    decoder::<SyncMessage>(bytes);
    decoder::<Equivocation>(bytes);
    decoder::<Entry>(bytes);
    decoder::<Body>(bytes);
    decoder::<Capability>(bytes);
    decoder::<Receipt>(bytes);
    decoder::<Beacon>(bytes);
    decoder::<Requirement>(bytes);
    decoder::<Embedding>(bytes);
    decoder::<Bid>(bytes);
    decoder::<Lease>(bytes);
    decoder::<Work>(bytes);
    decoder::<Payload>(bytes);
    decoder::<Output>(bytes);
    decoder::<NodeId>(bytes);
    decoder::<Received<Entry>>(bytes);
    decoder::<Received<Bid>>(bytes);
    assert!(start.elapsed() < TOO_LONG, "{} bytes took {:?}", bytes.len(), start.elapsed());
}

/// A valid frame with stretches of it replaced, removed, doubled, or inserted.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let frames: Vec<_> = samples::direct_frames()
        .iter()
        .map(|(_, frame)| frame.to_bytes().unwrap())
        .chain(samples::ledger_frames().iter().map(|(_, frame)| frame.to_bytes().unwrap()))
        .chain([samples::beacon_frame().to_bytes().unwrap()])
        .collect();
    let edit = (any::<prop::sample::Index>(), 0..12usize, prop::collection::vec(interesting(), 0..12));
    (prop::sample::select(frames), prop::collection::vec(edit, 1..4)).prop_map(|(mut bytes, edits)| {
        for (at, cut, insert) in edits {
            let start = at.index(bytes.len().max(1)).min(bytes.len());
            let end = (start + cut).min(bytes.len());
            bytes.splice(start..end, insert);
        }
        bytes
    })
}

/// Bytes, with those that mean something to the codec more often than the rest.
fn interesting() -> impl Strategy<Value = u8> {
    prop_oneof![3 => any::<u8>(), 2 => 0..12u8, 1 => 250..=255u8]
}

proptest! {
    #![proptest_config(strategies::config(2_000))]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        offer(&bytes);
    }

    #[test]
    fn telling_bytes(bytes in prop::collection::vec(interesting(), 0..120)) {
        offer(&bytes);
    }

    #[test]
    fn mutated_frames(bytes in mutated()) {
        offer(&bytes);
    }
}

#[test]
fn a_whole_frame_of_one_byte() {
    for byte in 0..=255 {
        for len in [1, 97, 4 * 1024] {
            offer(&vec![byte; len]);
        }
    }
    for byte in [0, 1, 2, 6, 8, 250, 251, 252, 253, 255] {
        offer(&vec![byte; MAX]);
    }
}

/// Nothing on the wire nests without end, so a decoder needs little stack, even one built without optimisation.
#[test]
fn decoding_needs_little_stack() {
    let frames: Vec<_> = samples::direct_frames().iter().map(|(_, frame)| frame.to_bytes().unwrap()).collect();
    let decode = move || frames.iter().filter(|bytes| Direct::from_bytes(bytes).is_ok()).count();
    let decoded = std::thread::Builder::new().stack_size(192 * 1024).spawn(decode).unwrap().join().unwrap();
    assert_eq!(decoded, samples::direct_frames().len());
}
