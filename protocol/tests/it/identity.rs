//! Keys and their text form: known answers, and keys that must not be taken for one.

use chorus_protocol::{NodeId, SecretKey, codec};
use proptest::prelude::*;

use crate::strategies;

/// Secret and DID: the first five from the W3C Credentials Community Group's test vectors for the DID method `key`
/// (`test-vectors/ed25519-x25519.json`), the last from the README of the `did-key-ed25519` package.
const KNOWN_DIDS: [(&str, &str); 6] = [
    (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp",
    ),
    (
        "0000000000000000000000000000000000000000000000000000000000000001",
        "did:key:z6MkjchhfUsD6mmvni8mCdXHw216Xrm9bQe2mBH1P5RDjVJG",
    ),
    (
        "0000000000000000000000000000000000000000000000000000000000000002",
        "did:key:z6MknGc3ocHs3zdPiJbnaaqDi58NGb4pk1Sp9WxWufuXSdxf",
    ),
    (
        "0000000000000000000000000000000000000000000000000000000000000003",
        "did:key:z6MkvqoYXQfDDJRv8L4wKzxYeuKyVZBfi9Qo6Ro8MiLH3kDQ",
    ),
    (
        "0000000000000000000000000000000000000000000000000000000000000004",
        "did:key:z6MkwW6aqMnjgrhJXFUko3NnZPGzVpkNzhYK7yEhnsibmLwL",
    ),
    (
        "4f66b355aa7b0980ff901f2295b9c562ac3061be4df86703eb28c612faae6578",
        "did:key:z6Mkk7yqnGF3YwTrLpqrW6PGsKci7dNqh1CjnvMbzrMerSeL",
    ),
];

/// Every encoding of a point whose order divides 8, the non-canonical ones too.
const SMALL_ORDER: [&str; 14] = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
];

/// The group's order, little-endian.
const ORDER: &str = "edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010";

fn bytes32(hex: &str) -> [u8; 32] {
    hex::decode(hex).unwrap().try_into().unwrap()
}

#[test]
fn dids_are_those_of_the_did_key_method() {
    for (secret, did) in KNOWN_DIDS {
        let id = SecretKey::from_bytes(&bytes32(secret)).node_id();
        assert_eq!(id.to_string(), did);
        assert_eq!(did.parse::<NodeId>(), Ok(id));
        assert_eq!(id.fmt_short(), did["did:key:z6Mk".len()..][..8]);
        assert_eq!(format!("{id:?}"), id.fmt_short());
        assert_eq!(codec::encode(&id), id.as_bytes());
        assert_eq!(serde_json::to_value(id).unwrap(), did);
    }
}

/// RFC 8032, section 7.1, tests 1 to 3.
#[test]
fn signatures_are_those_of_rfc_8032() {
    for (secret, public, message, signature) in [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe2465\
             5141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb0\
             0d291612bb0c00",
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc0\
             27beceea1ec40a",
        ),
    ] {
        let key = SecretKey::from_bytes(&bytes32(secret));
        let message = hex::decode(message).unwrap();
        let signature: [u8; 64] = hex::decode(signature).unwrap().try_into().unwrap();
        assert_eq!(key.node_id().as_bytes(), &bytes32(public));
        assert_eq!(key.sign(&message), signature);
        assert!(key.node_id().verify(&message, &signature));
        assert_eq!(*key.to_bytes(), bytes32(secret));
    }
}

#[test]
fn keys_of_small_order_are_refused() {
    for key in SMALL_ORDER {
        let key = bytes32(key);
        assert!(NodeId::from_bytes(&key).is_err(), "{}", hex::encode(key));
        assert!(codec::decode::<NodeId>("node id", &key, 32).is_err());
    }
}

/// A y-coordinate above the prime names the same point as the one below it, and would give a node a second id.
#[test]
fn keys_that_are_not_canonical_are_refused() {
    let mut aliases = 0;
    for y in 0..19u8 {
        for sign in [0u8, 0x80] {
            let mut canonical = [0; 32];
            canonical[0] = y;
            canonical[31] = sign;
            let mut alias = [0xff; 32];
            alias[0] = y + 0xed;
            alias[31] = 0x7f | sign;
            assert!(NodeId::from_bytes(&alias).is_err(), "{}", hex::encode(alias));
            if NodeId::from_bytes(&canonical).is_ok() {
                // The curve library takes the alias for a good key: the check is ours alone.
                let lax = ed25519_dalek::VerifyingKey::from_bytes(&alias).unwrap();
                assert!(!lax.is_weak());
                aliases += 1;
            }
        }
    }
    assert_eq!(aliases, 20);
    // The largest canonical y is p - 1; it and its neighbours below are judged by decompression alone.
    let mut key = [0xff; 32];
    key[31] = 0x7f;
    let good = (0..0xed).filter(|low| {
        key[0] = *low;
        NodeId::from_bytes(&key).is_ok()
    });
    assert!(good.count() > 50);
}

#[test]
fn a_signature_has_one_form() {
    let key = SecretKey::from_bytes(&[7; 32]);
    let signature = key.sign(b"message");
    assert!(key.node_id().verify(b"message", &signature));
    // s + L is the same scalar: accepted by lax verifiers.
    let mut malleable = signature;
    let mut carry = 0u16;
    for (byte, add) in malleable[32..].iter_mut().zip(bytes32(ORDER)) {
        carry += u16::from(*byte) + u16::from(add);
        *byte = (carry & 0xff) as u8;
        carry >>= 8;
    }
    assert_eq!(carry, 0);
    assert!(!key.node_id().verify(b"message", &malleable));
    // R is the identity and s = k a: whoever owns the key can make it, and lax verifiers accept it.
    let mut own = [0; 64];
    own[0] = 1;
    own[32..].copy_from_slice(&bytes32("d4c5323131ff9683cfb3d30197c786c9043f1052d6c2d5293f19d6f36b911104"));
    let lax = ed25519_dalek::VerifyingKey::from_bytes(key.node_id().as_bytes()).unwrap();
    let accepted = ed25519_dalek::Verifier::verify(&lax, b"message", &ed25519_dalek::Signature::from_bytes(&own));
    assert!(accepted.is_ok());
    assert!(!key.node_id().verify(b"message", &own));
    // R of small order, with any s.
    for r in SMALL_ORDER {
        let mut weak = signature;
        weak[..32].copy_from_slice(&bytes32(r));
        assert!(!key.node_id().verify(b"message", &weak));
        weak[32..].fill(0);
        assert!(!key.node_id().verify(b"message", &weak));
    }
}

#[test]
fn text_that_is_no_did_is_refused() {
    let did = KNOWN_DIDS[0].1;
    let key = NodeId::from_bytes(&bytes32(SMALL_ORDER[0]));
    assert_eq!(
        key.unwrap_err().to_string(),
        "not a usable Ed25519 public key (it does not decompress, is not canonical, or has a small order)"
    );
    let base58 = |bytes: &[u8]| format!("did:key:z{}", bs58::encode(bytes).into_string());
    let of_key = |prefix: &[u8], key: &str| base58(&[prefix, &bytes32(key)].concat());
    for bad in [
        String::new(),
        "did:key:z".to_owned(),
        did.replace("did:key:", "did:web:"),
        did.replace("did:key:z", "did:key:u"),
        did.to_uppercase(),
        did[..did.len() - 1].to_owned(),
        format!("{did}1"),
        format!("{did} "),
        did.replacen('z', "z1", 1),
        did.replace('k', "0"),
        // X25519 instead of Ed25519, a key of small order, and a key of 33 bytes.
        of_key(&[0xec, 0x01], KNOWN_DIDS[5].0),
        of_key(&[0xed, 0x01], SMALL_ORDER[4]),
        base58(&[0xed; 35]),
        format!("did:key:z{}", "6Mk".repeat(100_000)),
    ] {
        let error = bad.parse::<NodeId>().unwrap_err();
        assert_eq!(error.expected, "did:key:z6Mk…");
        assert!(error.text.chars().count() <= 80);
    }
}

#[test]
fn a_secret_is_never_printed() {
    let secret = SecretKey::from_bytes(&bytes32(KNOWN_DIDS[5].0));
    assert_eq!(format!("{secret:?}"), "SecretKey(k7yqnGF3)");
}

proptest! {
    #![proptest_config(strategies::config(128))]

    #[test]
    fn ids_survive_text_and_wire(id in strategies::node()) {
        prop_assert_eq!(id.to_string().parse::<NodeId>(), Ok(id));
        prop_assert_eq!(codec::decode("node id", &codec::encode(&id), 32), Ok(id));
    }

    #[test]
    fn bytes_are_a_key_or_an_error(bytes: [u8; 32]) {
        if let Ok(id) = NodeId::from_bytes(&bytes) {
            let point = ed25519_dalek::VerifyingKey::from_bytes(&bytes).unwrap();
            prop_assert!(!point.is_weak());
            prop_assert_eq!(id.as_bytes(), &bytes);
        }
    }
}

/// A thread remembers the keys it has checked, by eleven of their bits. Keys that share them do not pass for one another.
#[test]
fn remembering_keys_changes_no_verdict() {
    let slot = |id: &NodeId| u16::from_le_bytes([id.as_bytes()[0], id.as_bytes()[1]]) % 2048;
    let mut by_slot = std::collections::BTreeMap::new();
    let (one, other) = (0..=u16::MAX)
        .find_map(|n| {
            let mut secret = [0; 32];
            secret[..2].copy_from_slice(&n.to_le_bytes());
            let key = SecretKey::from_bytes(&secret);
            let id = key.node_id();
            by_slot.insert(slot(&id), key.clone()).map(|earlier| (earlier, key))
        })
        .unwrap();
    assert_ne!(one.node_id(), other.node_id());
    for _ in 0..3 {
        for (signer, stranger) in [(&one, &other), (&other, &one)] {
            let signature = signer.sign(b"mine");
            assert!(signer.node_id().verify(b"mine", &signature));
            assert!(!stranger.node_id().verify(b"mine", &signature));
            assert_eq!(NodeId::from_bytes(signer.node_id().as_bytes()), Ok(signer.node_id()));
        }
        // Bytes that share the slot and are no key are refused, whatever was remembered there.
        let mut bad = *one.node_id().as_bytes();
        bad[2..].fill(0xff);
        let refused = (0..32).filter(|low| {
            bad[2] = *low;
            NodeId::from_bytes(&bad).is_err()
        });
        assert!(refused.count() > 4, "about half of all bytes are no point");
    }
}
