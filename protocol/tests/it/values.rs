//! Single values: limits of texts and lists, ids and their text forms, rates, embeddings, digests.

use chorus_protocol::capability::Rate;
use chorus_protocol::embedding::DIMENSIONS;
use chorus_protocol::entry::{Body, Equivocation, NoProof};
use chorus_protocol::{Embedding, Hash, List, NetworkId, OutOfBounds, Text, Verified, WallTime, codec};
use proptest::prelude::*;

use crate::{samples, strategies};

proptest! {
    #![proptest_config(strategies::config(96))]

    #[test]
    fn texts_hold_what_fits(text in "\\PC{0,40}") {
        match Text::<32>::new(text.clone()) {
            Ok(kept) => prop_assert_eq!(kept.as_str(), text.as_str()),
            Err(error) => prop_assert_eq!(error, OutOfBounds { len: text.len(), max: 32 }),
        }
        let cut = Text::<32>::truncated(&text);
        prop_assert!(text.starts_with(cut.as_str()) && cut.len() <= 32 && cut.len() + 4 > text.len().min(32));
        prop_assert_eq!(codec::decode::<Text<32>>("text", &codec::encode(&cut), 64), Ok(cut));
    }

    #[test]
    fn texts_are_utf8(bytes in prop::collection::vec(any::<u8>(), 0..32)) {
        let mut wire = vec![bytes.len() as u8];
        wire.extend(&bytes);
        let decoded = codec::decode::<Text<32>>("text", &wire, 64).ok().map(Text::into_string);
        prop_assert_eq!(decoded, String::from_utf8(bytes).ok());
    }

    #[test]
    fn lists_hold_what_fits(items in prop::collection::vec(any::<u64>(), 0..12)) {
        let list = List::<u64, 8>::truncated(items.iter().copied());
        prop_assert_eq!(&*list, &items[..items.len().min(8)]);
        prop_assert_eq!(codec::decode::<List<u64, 8>>("list", &codec::encode(&list), 128), Ok(list));
        prop_assert_eq!(List::<u64, 8>::new(items.clone()).is_ok(), items.len() <= 8);
        prop_assert_eq!(codec::decode::<List<u64, 8>>("list", &codec::encode(&items), 128).is_ok(), items.len() <= 8);
    }

    #[test]
    fn lists_of_bytes_are_one_copy(items in prop::collection::vec(any::<u8>(), 0..300)) {
        let list = List::<u8, 300>::new(items.clone()).unwrap();
        let wire = codec::encode(&list);
        prop_assert_eq!(&wire[wire.len() - items.len()..], items.as_slice());
        prop_assert_eq!(codec::decode::<List<u8, 300>>("bytes", &wire, 400).unwrap().into_vec(), items);
    }

    #[test]
    fn hashes_show_and_parse(hash in strategies::hash()) {
        prop_assert_eq!(hash.to_string().parse::<Hash>().unwrap(), hash);
        prop_assert_eq!(hash.to_string().len(), 64);
        prop_assert!(hash.to_string().starts_with(&hash.fmt_short()));
    }

    #[test]
    fn requirements_have_one_digest_each(a in strategies::requirement(), b in strategies::requirement()) {
        prop_assert_eq!(a == b, a.digest() == b.digest());
        prop_assert_eq!(codec::decode("requirement", &codec::encode(&a), 4096), Ok(a));
    }

    #[test]
    fn output_digests_depend_on_text_and_salt_alone(
        output in strategies::output(), other in strategies::output(), salt: [u8; 16], pepper: [u8; 16],
    ) {
        prop_assume!(salt != pepper && output.text != other.text);
        let mut same_text = other.clone();
        same_text.text = output.text.clone();
        prop_assert_eq!(output.digest(&salt), same_text.digest(&salt));
        prop_assert_ne!(output.digest(&salt), output.digest(&pepper));
        prop_assert_ne!(output.digest(&salt), other.digest(&salt));
    }

    #[test]
    fn proofs_convict_their_author_and_nobody_else(proof in strategies::equivocation(), other in strategies::entry()) {
        let author = proof.first.claimed_author();
        prop_assert_eq!(proof.verify(&strategies::network()), Ok(author));
        prop_assert!(proof.verify(&"elsewhere".parse().unwrap()).is_err());
        // An entry of somebody else in place of the second proves nothing.
        let seq = proof.first.clone().verify(&strategies::network()).unwrap().seq;
        let same_number = chorus_protocol::entry::Entry { seq, ..other };
        let stranger = Verified::sign(&samples::key(9), &strategies::network(), same_number).unwrap();
        let mixed = Equivocation { first: proof.first.clone(), second: stranger.to_wire() };
        prop_assert_eq!(mixed.verify(&strategies::network()), Err(NoProof::Compatible));
        // Nor does one entry twice.
        let twice = Equivocation { first: proof.first.clone(), second: proof.first };
        prop_assert_eq!(twice.verify(&strategies::network()), Err(NoProof::Compatible));
    }
}

#[test]
fn a_broken_link_is_an_equivocation_and_a_sound_one_is_not() {
    let network = strategies::network();
    let sign = |entry| Verified::sign(&samples::key(1), &network, entry).unwrap();
    let first = sign(samples::plain_entry(1, Hash::ZERO));
    let second = sign(samples::plain_entry(2, first.hash()));
    let broken = sign(samples::plain_entry(2, Hash::ZERO));
    let third = sign(samples::plain_entry(3, Hash::ZERO));
    assert_eq!(Equivocation::new(&first, &second), Err(NoProof::Compatible));
    assert_eq!(Equivocation::new(&first, &broken).unwrap().verify(&network), Ok(first.author()));
    assert_eq!(Equivocation::new(&broken, &first).unwrap().verify(&network), Ok(first.author()));
    // Between the first and the third stands a second that this pair does not show.
    assert_eq!(Equivocation::new(&first, &third), Err(NoProof::Compatible));
    // The largest number has no successor.
    let last = sign(samples::plain_entry(u64::MAX, Hash::ZERO));
    let zero = sign(samples::plain_entry(0, Hash::ZERO));
    assert_eq!(Equivocation::new(&last, &zero), Err(NoProof::Compatible));
}

#[test]
fn network_names_are_plain() {
    for good in ["a", "chorus-1", &"x".repeat(32)] {
        assert_eq!(good.parse::<NetworkId>().unwrap().as_str(), good);
    }
    for bad in ["", "Chorus", "a b", "a/b", "ü", &"x".repeat(33)] {
        let error = bad.parse::<NetworkId>().unwrap_err();
        assert_eq!(error.to_string(), format!("'{bad}' is not a network name: 1 to 32 characters of a-z, 0-9 and -"));
    }
}

#[test]
fn rates_are_thousandths_and_never_a_surprise() {
    assert_eq!(codec::encode(&Rate::from_tokens_per_s(61.25)), [251, 0x42, 0xef]);
    for (rate, kept) in [(0.0004, 0.0), (0.0005, 0.001), (-3.0, 0.0), (1e300, 4_294_967.295)] {
        assert!((Rate::from_tokens_per_s(rate).tokens_per_s() - kept).abs() < 1e-9, "{rate}");
    }
    for rate in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(Rate::from_tokens_per_s(rate), Rate::default());
    }
}

#[test]
fn wall_times_saturate() {
    use std::time::Duration;
    let (early, late) = (WallTime::from_millis(1), WallTime::from_millis(5));
    assert_eq!((late.since(early), early.since(late)), (Duration::from_millis(4), Duration::ZERO));
    assert_eq!(late.plus(Duration::MAX), WallTime::from_millis(u64::MAX));
}

/// Vectors whose components are sums of twelve uniform draws: near enough to the bell curve of an embedder's output.
fn bell() -> impl Strategy<Value = [f32; DIMENSIONS]> {
    prop::collection::vec(prop::array::uniform12(-0.5f32..0.5), DIMENSIONS)
        .prop_map(|rows| std::array::from_fn(|i| rows[i].iter().sum()))
}

proptest! {
    #![proptest_config(strategies::config(32))]

    #[test]
    fn cosines_survive_quantisation(a in bell(), noise in bell(), mix in 0.0f32..1.0) {
        let b: [f32; DIMENSIONS] = std::array::from_fn(|i| a[i] * mix + noise[i] * (1.0 - mix));
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let exact = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
        let (a, b) = (Embedding::from_f32(&a).unwrap(), Embedding::from_f32(&b).unwrap());
        prop_assert!((a.cosine(&b) - exact).abs() < 0.01, "{} is not {exact}", a.cosine(&b));
        prop_assert!((a.cosine(&a) - 1.0).abs() < 1e-12);
        prop_assert_eq!(a.cosine(&b).to_bits(), b.cosine(&a).to_bits());
        prop_assert_eq!(codec::decode("embedding", &codec::encode(&a), DIMENSIONS), Ok(a));
    }
}

#[test]
fn what_has_no_direction_is_no_embedding() {
    let mut vector = [0.0f32; DIMENSIONS];
    assert_eq!(Embedding::from_f32(&vector), None);
    vector[7] = f32::NAN;
    assert_eq!(Embedding::from_f32(&vector), None);
    vector[7] = f32::INFINITY;
    assert_eq!(Embedding::from_f32(&vector), None);
    vector[7] = f32::MIN_POSITIVE / 4.0;
    let tiny = Embedding::from_f32(&vector).unwrap();
    assert_eq!(codec::encode(&tiny)[7], 127);

    // On the wire, only what `from_f32` can make is one.
    for (largest, good) in [(0i8, false), (126, false), (127, true), (-127, true), (-128, false)] {
        let mut wire = [0u8; DIMENSIONS];
        wire[3] = largest.cast_unsigned();
        assert_eq!(codec::decode::<Embedding>("embedding", &wire, DIMENSIONS).is_ok(), good, "{largest}");
    }
}

#[test]
fn what_is_shown_never_holds_the_salt_or_raw_vectors() {
    let payload = serde_json::to_value(samples::payload()).unwrap();
    assert!(payload.get("salt").is_none() && payload.get("turns").is_some());
    let entry = serde_json::to_value(&*samples::capability_entry()).unwrap();
    assert!(entry["body"]["capability"]["skills"][0].get("embedding").is_none());
    let all = [
        samples::capability_entry(),
        samples::retire_entry(),
        samples::receipt_entry(),
        samples::policy_entry(),
        samples::misbehaviour_entry(),
    ];
    assert_eq!(all.map(|entry| entry.body.kind()), Body::KINDS);
}
