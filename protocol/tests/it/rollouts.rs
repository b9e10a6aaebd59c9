//! Rollout frames, manifests and bulk messages: round trip, every way in which bytes can be wrong, and the golden vectors.

use chorus_protocol::limits::{MAX_CHUNK_BYTES, MAX_CHUNKS};
use chorus_protocol::misbehaviour::Evidence;
use chorus_protocol::policy::{Manifest, ManifestError, PolicyFile};
use chorus_protocol::rollout::{Bulk, FrameError, GroupId, Rollout, RolloutFrame, Segment};
use chorus_protocol::{DecodeError, Hash, List, Signable, Text, Verified, WallTime, codec};
use proptest::prelude::*;
use serde_json::json;

use crate::{golden, rollout_samples as sample, samples, strategies};

const MAX: usize = RolloutFrame::MAX_BYTES;

fn decode(bytes: &[u8]) -> Result<RolloutFrame, DecodeError> {
    codec::decode("rollouts", bytes, MAX)
}

fn rollouts() -> impl Strategy<Value = Vec<Rollout>> {
    let one = (0..6u64, 1..40u32, any::<bool>(), 0..3u8, prop::option::of(1..39u32), -3.0..3.0f32);
    prop::collection::vec(one, 1..30).prop_map(|rows| {
        rows.into_iter()
            .zip(0u16..)
            .map(|((group, tokens, wide, version, swap, reward), member)| {
                let mut rollout = sample::rollout(group, member, tokens, if wide { 70_000 } else { 10 });
                rollout.segments[0].version = sample::version(version);
                if let Some(from) = swap.filter(|from| *from < tokens) {
                    rollout.segments.push(Segment { version: sample::version(version + 1), from });
                }
                rollout.reward = reward;
                rollout
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(strategies::config(256))]

    #[test]
    fn a_frame_gives_back_what_was_put_in(items in rollouts(), at: prop::sample::Index, flip in 1..=255u8) {
        let frame = RolloutFrame::new(sample::policy(), 1, WallTime::from_millis(5), &items).unwrap();
        let bytes = codec::encode(&frame);
        prop_assert_eq!(codec::encoded_len(&frame), bytes.len());
        let back = decode(&bytes).unwrap();
        prop_assert_eq!(&back, &frame);
        let out: Vec<Rollout> = back.rollouts().map(|view| view.to_rollout()).collect();
        prop_assert_eq!(out, items);

        let mut altered = bytes.clone();
        let index = at.index(altered.len());
        altered[index] ^= flip;
        if let Ok(other) = decode(&altered) {
            prop_assert_eq!(codec::encode(&other), altered);
        }
        prop_assert!(decode(&bytes[..at.index(bytes.len())]).is_err());
        prop_assert!(decode(&[bytes.as_slice(), &[flip]].concat()).is_err());
    }

    #[test]
    fn random_bytes_are_no_frame_and_no_message(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(frame) = decode(&bytes) {
            prop_assert_eq!(codec::encode(&frame), bytes.clone());
        }
        if let Ok(message) = Bulk::from_bytes(&bytes) {
            prop_assert_eq!(message.to_bytes().unwrap(), bytes);
        }
    }
}

/// The signature covers every byte: whatever is altered in a signed frame, nobody believes it.
#[test]
fn every_altered_byte_of_a_signed_frame_is_an_error() {
    let signed = Bulk::Frame(samples::sign(samples::EXECUTOR, sample::frame(100)).to_wire()).to_bytes().unwrap();
    for index in 0..signed.len() {
        for flip in [1, 0x80, 0xff] {
            let mut altered = signed.clone();
            altered[index] ^= flip;
            if let Ok(Bulk::Frame(received)) = Bulk::from_bytes(&altered) {
                assert!(received.verify(&samples::network()).is_err(), "byte {index} ^ {flip:#x} is believed");
            }
        }
        assert!(Bulk::from_bytes(&signed[..index]).is_err());
    }
}

#[test]
fn messages_round_trip_and_survive_every_altered_byte() {
    for (name, message) in sample::messages() {
        let bytes = message.to_bytes().unwrap();
        assert_eq!(Bulk::from_bytes(&bytes).unwrap(), message, "{name}");
        let (head, rollouts) = message.to_parts();
        assert_eq!([&head, &rollouts[..]].concat(), bytes, "{name} in parts");
        assert_eq!(rollouts.is_empty(), !matches!(message, Bulk::Frame(_)), "{name}");
        for index in 0..bytes.len() {
            assert!(Bulk::from_bytes(&bytes[..index]).is_err(), "{name} cut to {index}");
            for flip in [1, 0x10, 0xff] {
                let mut altered = bytes.clone();
                altered[index] ^= flip;
                if let Ok(other) = Bulk::from_bytes(&altered) {
                    assert_eq!(other.to_bytes().unwrap(), altered, "{name}, byte {index}");
                    assert_ne!(other, message, "{name}, byte {index}");
                }
            }
        }
    }
}

/// A frame that was built right and then altered where a number stands. Each must be refused for the reason given.
#[test]
fn numbers_that_break_a_rule_are_refused() {
    let good = codec::encode(&sample::frame(100_000));
    let tail = good.len();
    let log_prob = tail - 4;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.25] {
        let mut bytes = good.clone();
        bytes[log_prob..].copy_from_slice(&bad.to_le_bytes());
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("log-probability"), "{bad}: {error}");
    }
    // The same ids in two bytes each would be another frame of the same rollouts: only the narrow one is valid.
    let (narrow, wide) = (codec::encode(&sample::frame(100)).len(), codec::encode(&sample::frame(100_000)).len());
    assert_eq!(wide - narrow, 2 * (2 * 5 + 12));
}

#[test]
fn rollouts_that_make_no_frame_are_named() {
    let build = |items: &[Rollout]| RolloutFrame::new(sample::policy(), 1, WallTime::from_millis(0), items);
    let good = sample::rollout(1, 0, 4, 0);
    let other = |change: &dyn Fn(&mut Rollout)| {
        let mut item = good.clone();
        item.member = 1;
        change(&mut item);
        build(&[good.clone(), item]).unwrap_err()
    };
    assert_eq!(build(&[]).unwrap_err(), FrameError::Invalid("a frame has 1 to 4096 rollouts"));
    assert_eq!(other(&|r| r.seed = 5), FrameError::TwoTasks(GroupId(1)));
    assert_eq!(other(&|r| r.prompt = [1].into()), FrameError::TwoTasks(GroupId(1)));
    assert_eq!(other(&|r| r.member = 0), FrameError::Invalid("a member stands twice"));
    assert_eq!(other(&|r| r.reward = f32::NAN), FrameError::Invalid("a reward is not a finite number"));
    assert!(matches!(other(&|r| r.log_probs[1] = 0.5), FrameError::Invalid(text) if text.contains("log-prob")));
    assert!(matches!(other(&|r| r.completion.clear()), FrameError::Invalid(text) if text.contains("differ in number")));
    assert!(matches!(other(&|r| r.segments.clear()), FrameError::Invalid(text) if text.contains("names no version")));
    let past_the_end = Segment { version: sample::version(2), from: 4 };
    assert!(matches!(other(&|r| r.segments.push(past_the_end)), FrameError::Invalid(text) if text.contains("outside")));
    let same = Segment { version: sample::version(1), from: 2 };
    assert!(matches!(other(&|r| r.segments.push(same)), FrameError::Invalid(text) if text.contains("changes nothing")));
}

/// The promise of the specification, in bytes: at most 9 for a token in rollouts of 64 tokens or more.
#[test]
fn a_token_costs_at_most_nine_bytes() {
    let bytes_per_token = |members: u16, tokens: u32, base: u32| {
        let items: Vec<Rollout> = (0..members).map(|member| sample::rollout(1, member, tokens, base)).collect();
        let frame = RolloutFrame::new(sample::policy(), 1, WallTime::from_millis(samples::NOW), &items).unwrap();
        let sampled = frame.completion_tokens();
        let signed = samples::sign(samples::EXECUTOR, frame);
        let bytes = Bulk::Frame(signed.to_wire()).to_bytes().unwrap().len();
        #[allow(clippy::cast_precision_loss, reason = "small numbers")]
        let ratio = bytes as f64 / sampled as f64;
        ratio
    };
    assert!(bytes_per_token(8, 64, 100_000) <= 9.0, "{}", bytes_per_token(8, 64, 100_000));
    assert!(bytes_per_token(8, 64, 100) <= 7.0, "{}", bytes_per_token(8, 64, 100));
    assert!(bytes_per_token(64, 8, 100_000) <= 11.0, "{}", bytes_per_token(64, 8, 100_000));
    assert!(bytes_per_token(8, 1024, 100_000) <= 8.1, "{}", bytes_per_token(8, 1024, 100_000));
}

#[test]
fn a_manifest_that_lies_is_named() {
    let admit = |n, manifest| Manifest::admit(samples::sign(n, manifest)).map(|_| ());
    let good = sample::manifest();
    assert_eq!(admit(samples::REQUESTER, good.clone()), Ok(()));
    assert!(matches!(admit(samples::EXECUTOR, good.clone()), Err(ManifestError::Stranger { .. })));
    let with = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        admit(samples::REQUESTER, manifest).unwrap_err()
    };
    assert!(matches!(with(&|m| m.version = sample::version(1)), ManifestError::Misnamed { .. }));
    assert!(matches!(with(&|m| m.chunk_bytes = 1000), ManifestError::ChunkSize(1000)));
    assert!(matches!(with(&|m| m.chunk_bytes = u32::MAX), ManifestError::ChunkSize(_)));
    assert!(matches!(with(&|m| m.chunk_bytes = 2048), ManifestError::Sizes { .. }));
    for name in ["", "../key", "a/b", ".hidden", "tokenizer.json", "a\\b", "nul\0"] {
        let files = vec![
            PolicyFile { name: Text::new(name).unwrap(), bytes: 1500 },
            PolicyFile { name: Text::new("tokenizer.json").unwrap(), bytes: 700 },
        ];
        let files = List::new(files).unwrap();
        assert!(matches!(with(&|m| m.files = files.clone()), ManifestError::FileName(_)), "{name:?}");
    }
    // Sizes that overflow do not come out small.
    let huge = |bytes| PolicyFile { name: Text::new(format!("f{bytes}")).unwrap(), bytes };
    let files = List::new(vec![huge(u64::MAX), huge(2201)]).unwrap();
    assert!(matches!(with(&|m| m.files = files.clone()), ManifestError::Sizes { bytes: u64::MAX, .. }));
}

#[test]
fn chunks_are_known_by_size_and_hash() {
    let manifest = sample::manifest();
    assert_eq!(manifest.total_bytes(), 2200);
    assert_eq!([0, 1, 2, 3].map(|i| manifest.chunk_len(i)), [Some(1024), Some(1024), Some(152), None]);
    assert_eq!(manifest.chunk_len(u32::MAX), None);
    let bytes: Vec<u8> = (0..1024u32).map(|i| (i % 251) as u8).collect();
    assert!(manifest.is_chunk(0, &bytes));
    assert!(!manifest.is_chunk(1, &bytes) && !manifest.is_chunk(9, &bytes) && !manifest.is_chunk(0, &bytes[1..]));
}

#[test]
fn the_largest_manifest_and_chunk_fit() {
    let mut manifest = sample::manifest();
    manifest.chunks = List::new(vec![Hash::from_bytes([0xff; 32]); MAX_CHUNKS]).unwrap();
    manifest.files =
        List::new(vec![PolicyFile { name: Text::new("x".repeat(128)).unwrap(), bytes: u64::MAX }; 64]).unwrap();
    manifest.policy.name = Text::new("x".repeat(64)).unwrap();
    let signed: Verified<Manifest> = samples::sign(samples::REQUESTER, manifest);
    let bytes = Bulk::Announce(Box::new(signed.to_wire())).to_bytes().unwrap();
    match Bulk::from_bytes(&bytes).unwrap() {
        Bulk::Announce(received) => assert!(received.verify(&samples::network()).is_ok()),
        other => panic!("{other:?}"),
    }
    let bytes = List::new(vec![1; MAX_CHUNK_BYTES]).unwrap();
    let chunk = Bulk::Chunk { version: sample::version(1), index: u32::MAX, bytes };
    assert_eq!(Bulk::from_bytes(&chunk.to_bytes().unwrap()).unwrap(), chunk);
}

#[test]
fn golden_evidence() {
    let evidence = sample::evidence();
    let bytes = evidence.to_bytes().unwrap();
    let made = json!({
        "name": "evidence",
        "bytes": hex::encode(&bytes),
        "hash": hex::encode(Evidence::hash(&bytes).as_bytes()),
    });
    let about = "Evidence against the key of 32 bytes 02: the frame of bulk.json, group 3, member 2.";
    let written = golden::check("evidence", about, vec![made]);
    assert_eq!(Evidence::from_bytes(&golden::hex_of(&written[0], "bytes")).unwrap(), evidence);
    for cut in 0..bytes.len() {
        assert!(Evidence::from_bytes(&bytes[..cut]).is_err(), "cut to {cut}");
    }
}

#[test]
fn golden_messages() {
    let vectors = sample::messages()
        .iter()
        .map(|(name, message)| json!({ "name": name, "bytes": hex::encode(message.to_bytes().unwrap()) }))
        .collect();
    let about = "Bulk messages, one of each. The manifest lists files of 1,500 and 700 bytes (byte i is i mod 251) in chunks of \
                 1,024. Token i of a rollout is 100 + i, its log-probability -i / 8.";
    for (written, (name, message)) in golden::check("bulk", about, vectors).iter().zip(sample::messages()) {
        assert_eq!(Bulk::from_bytes(&golden::hex_of(written, "bytes")).unwrap(), message, "{name}");
    }
}

#[test]
fn golden_versions() {
    let manifest = sample::manifest();
    let vectors = vec![json!({
        "name": "two files",
        "value": manifest,
        "bytes": hex::encode(codec::encode(&manifest)),
        "version": manifest.version,
    })];
    let about = "A manifest and the version that its last three fields hash to. The files are those of bulk.json.";
    golden::check("manifest", about, vectors);
}

#[test]
fn golden_frames() {
    let vectors = [("narrow", 100), ("wide", 100_000)]
        .map(|(name, base)| json!({ "name": name, "bytes": hex::encode(codec::encode(&sample::frame(base))) }))
        .to_vec();
    let about = "Frames of the same three rollouts, with token ids that fit into two bytes and with some that do not. Token i of a \
                 completion is 100 + i and 100,000 + i, its log-probability -i / 8.";
    for (written, base) in golden::check("rollouts", about, vectors).iter().zip([100, 100_000]) {
        assert_eq!(decode(&golden::hex_of(written, "bytes")).unwrap(), sample::frame(base));
    }
}
