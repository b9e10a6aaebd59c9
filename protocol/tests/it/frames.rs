//! Frames: round trip, and every way in which bytes can be wrong.

use chorus_protocol::job::Payload;
use chorus_protocol::limits::{
    ENVELOPE_OVERHEAD_BYTES, MAX_ENTRY_BYTES, MAX_GOSSIP_BYTES, MAX_OUTPUT_BYTES, MAX_PAYLOAD_BYTES,
    MAX_SYNC_BATCH_BYTES,
};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{DecodeError, List, Text, codec};
use proptest::prelude::*;

use crate::{samples, strategies};

/// What must hold of every frame and its bytes.
fn holds<F: Frame + PartialEq + std::fmt::Debug>(
    frame: &F,
    position: prop::sample::Index,
    flip: u8,
) -> Result<(), TestCaseError> {
    let bytes = frame.to_bytes().unwrap();
    prop_assert_eq!(codec::encoded_len(frame), bytes.len());
    prop_assert_eq!(&F::from_bytes(&bytes).unwrap(), frame);

    // One byte altered: refused, or another value with that very encoding. Never the same value again.
    let mut altered = bytes.clone();
    let index = position.index(altered.len());
    altered[index] ^= flip;
    if let Ok(other) = F::from_bytes(&altered) {
        prop_assert_ne!(&other, frame);
        prop_assert_eq!(other.to_bytes().unwrap(), altered);
    }
    // Cut short anywhere: refused.
    let cut = position.index(bytes.len());
    let error = F::from_bytes(&bytes[..cut]).err();
    prop_assert!(matches!(error, Some(DecodeError::Malformed { .. })), "{:?}", error);
    // Followed by anything: refused, and the error counts what follows.
    let longer = [bytes.as_slice(), &[flip; 3]].concat();
    prop_assert_eq!(F::from_bytes(&longer), Err(DecodeError::Trailing { kind: F::KIND, extra: 3 }));
    Ok(())
}

proptest! {
    #![proptest_config(strategies::config(96))]

    #[test]
    fn ledger_gossip(frame in strategies::ledger_gossip(), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&frame, at, flip)?;
    }

    #[test]
    fn beacon_gossip(frame in strategies::beacon_gossip(), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&frame, at, flip)?;
    }

    #[test]
    fn direct(frame in strategies::direct(), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&frame, at, flip)?;
    }

    #[test]
    fn sync(message in strategies::sync(), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&Direct::Sync(message), at, flip)?;
    }
}

#[test]
fn every_prefix_of_every_sample_is_refused() {
    for (name, frame) in samples::direct_frames() {
        let bytes = frame.to_bytes().unwrap();
        for cut in 0..bytes.len() {
            assert!(Direct::from_bytes(&bytes[..cut]).is_err(), "{name} cut to {cut} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn an_oversized_frame_is_refused_before_it_is_decoded() {
    let bytes = vec![0; MAX_GOSSIP_BYTES + 1];
    let too_large = |kind| DecodeError::TooLarge { kind, len: bytes.len(), max: MAX_GOSSIP_BYTES };
    assert_eq!(LedgerGossip::from_bytes(&bytes), Err(too_large(LedgerGossip::KIND)));
    assert_eq!(BeaconGossip::from_bytes(&bytes), Err(too_large(BeaconGossip::KIND)));
    let bytes = vec![0; Direct::MAX_BYTES + 1];
    let error = Direct::from_bytes(&bytes).unwrap_err();
    assert_eq!(error, DecodeError::TooLarge { kind: "direct frame", len: bytes.len(), max: Direct::MAX_BYTES });
    assert_eq!(error.to_string(), "1048577 bytes are over the limit of 1048576 for direct frame");
}

/// A payload of exactly `len` bytes when encoded.
fn payload_of(len: usize) -> Payload {
    let mut payload = samples::payload();
    payload.turns = List::default();
    let turn = |size| chorus_protocol::job::Turn {
        role: chorus_protocol::job::Role::User,
        content: Text::new("x".repeat(size)).unwrap(),
    };
    let (first, mut last) = (120_000, 100_000);
    for _ in 0..3 {
        payload.turns = List::new(vec![turn(first), turn(last)]).unwrap();
        last = last + len - codec::encoded_len(&payload);
    }
    payload.turns = List::new(vec![turn(first), turn(last)]).unwrap();
    assert_eq!(codec::encoded_len(&payload), len);
    payload
}

#[test]
fn a_payload_may_fill_its_limit_and_not_one_byte_more() {
    let grant = |len| Direct::Grant { lease: samples::lease().to_wire(), payload: Box::new(payload_of(len)) };
    // 120,000 bytes and the rest, each below the limit of one turn.
    let len = 240_000;
    assert_eq!(Direct::from_bytes(&grant(len).to_bytes().unwrap()), Ok(grant(len)));

    let mut large = payload_of(len);
    let mut turns = large.turns.clone().into_vec();
    turns.push(turns[0].clone());
    large.turns = List::new(turns).unwrap();
    let frame = Direct::Grant { lease: samples::lease().to_wire(), payload: Box::new(large) };
    let refused = |result: Result<(), DecodeError>| {
        assert!(matches!(result, Err(DecodeError::TooLarge { kind: "payload", max: MAX_PAYLOAD_BYTES, .. })));
    };
    refused(frame.to_bytes().map(drop));
    // A peer that does not check what it sends is refused all the same.
    refused(Direct::from_bytes(&codec::encode(&frame)).map(drop));
}

#[test]
fn the_largest_output_fits_its_limit_and_its_frame() {
    let mut output = samples::output();
    output.text = Text::new("x".repeat(131_072)).unwrap();
    output.prompt_tokens = u32::MAX;
    output.completion_tokens = u32::MAX;
    assert!(codec::encoded_len(&output) <= MAX_OUTPUT_BYTES);
    let frame = Direct::Outcome {
        job: samples::job(),
        fence: u64::MAX,
        result: Ok(Box::new(output)),
        work: samples::work().to_wire(),
    };
    assert_eq!(Direct::from_bytes(&frame.to_bytes().unwrap()), Ok(frame));
}

#[test]
fn full_batches_and_proofs_fit_their_frames() {
    let entry = MAX_ENTRY_BYTES + ENVELOPE_OVERHEAD_BYTES;
    // A gossiped proof is two entries and a tag.
    assert!(2 * entry < MAX_GOSSIP_BYTES);
    // A batch that was filled up to the limit, and then one entry more.
    assert!(MAX_SYNC_BATCH_BYTES + entry + 64 < Direct::MAX_BYTES);
}

#[test]
fn an_unknown_variant_is_named_in_the_error() {
    let error = Direct::from_bytes(&[10]).unwrap_err();
    assert_eq!(error.to_string(), "not a valid direct frame: there is no variant 10 in this version");
}

#[test]
fn integers_must_be_written_in_their_shortest_form() {
    let frame = Direct::Sync(SyncMessage::Same { session: 5 });
    assert_eq!(frame.to_bytes().unwrap(), [8, 1, 5]);
    for longer in [
        &[8, 1, 251, 5, 0][..],
        &[8, 1, 252, 5, 0, 0, 0],
        &[8, 1, 253, 5, 0, 0, 0, 0, 0, 0, 0],
        &[251, 8, 0, 1, 5],
        &[8, 252, 1, 0, 0, 0, 5],
    ] {
        assert_eq!(Direct::from_bytes(longer), Err(DecodeError::NotCanonical { kind: Direct::KIND }), "{longer:?}");
    }
    // 254 announces 128 bits and 255 nothing at all; no field has either.
    assert!(matches!(Direct::from_bytes(&[8, 1, 254]), Err(DecodeError::Malformed { .. })));
    assert!(matches!(Direct::from_bytes(&[8, 1, 255]), Err(DecodeError::Malformed { .. })));
}

#[test]
fn lengths_over_the_limit_of_their_type_are_refused() {
    // Want { session: 0, ids: 513 of them }.
    let mut bytes = vec![8, 3, 0, 251, 1, 2];
    bytes.extend([0; 513 * 32]);
    let error = Direct::from_bytes(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "not a valid direct frame: a list is over its limit");
    // Progress with 16,385 bytes of text.
    let mut bytes = vec![5];
    bytes.extend([0; 16 + 3]);
    bytes.extend([251, 1, 0x40]);
    bytes.extend([b'x'; 16_385]);
    let error = Direct::from_bytes(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "not a valid direct frame: a text is over its limit");
}
