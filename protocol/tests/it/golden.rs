//! The golden vectors of `vectors/`: what the wire looks like, byte for byte, for anybody who writes another implementation, and
//! the alarm that rings when this one changes.
//!
//! `CHORUS_REGENERATE_VECTORS=1 cargo test -p chorus-protocol golden` writes them anew. Nothing else does.

use std::fs;
use std::path::PathBuf;

use chorus_protocol::beacon::{Beacon, Bid, Lease, Rank, Verdict, Work};
use chorus_protocol::capability::{DeviceKind, Rate};
use chorus_protocol::entry::Entry;
use chorus_protocol::job::{Failure, Finish, JobKind, Risk, Role};
use chorus_protocol::message::{BeaconGossip, Direct, Frame, LedgerGossip};
use chorus_protocol::misbehaviour::Charge;
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Hash, List, NodeId, Received, Signable, Text, Verified, WIRE_VERSION, WallTime, codec};
use serde::Serialize;
use serde_json::{Value, json};

use crate::samples;

const REGENERATE: &str = "CHORUS_REGENERATE_VECTORS";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors").join(format!("{name}.json"))
}

/// Compares what this build makes with what is written down, item by item, and returns what is written down.
pub fn check(name: &str, about: &str, items: Vec<Value>) -> Vec<Value> {
    let path = path(name);
    let made = json!({ "about": about, "vectors": items });
    if std::env::var_os(REGENERATE).is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, serde_json::to_string_pretty(&made).unwrap() + "\n").unwrap();
    }
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let written: Value = serde_json::from_str(&text).unwrap();
    let (old, new) = (written["vectors"].as_array().unwrap(), made["vectors"].as_array().unwrap());
    for (old, new) in old.iter().zip(new) {
        for (field, value) in old.as_object().unwrap() {
            assert_eq!(
                Some(value),
                new.get(field),
                "THE WIRE CHANGED: field '{field}' of vector {} in {} is not what this build makes (left: written, right: made). \
                 Nodes of the last release would not understand this build. If that is meant, raise the VERSION of the record or \
                 WIRE_VERSION, tell it in spec/, and write the vectors anew with {REGENERATE}=1.",
                old["name"],
                path.display(),
            );
        }
    }
    assert_eq!(written, made, "THE WIRE CHANGED: {} lacks a vector or has one too many", path.display());
    old.clone()
}

pub fn hex_of(value: &Value, field: &str) -> Vec<u8> {
    hex::decode(value[field].as_str().unwrap()).unwrap()
}

/// `BLAKE3-derive-key(context, len ‖ part ‖ len ‖ part …)`, written out once more so that the crate is not its own witness.
fn derive(context: &str, parts: &[&[u8]]) -> [u8; 32] {
    let input: Vec<u8> =
        parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part].concat()).collect();
    blake3::derive_key(context, &input)
}

fn record<T: Signable + Serialize>(name: &str, secret: u8, record: &Verified<T>) -> Value {
    let bytes = codec::encode(&**record);
    let context = format!("chorus {WIRE_VERSION} {} {} v{}", samples::network(), T::KIND, T::VERSION);
    let digest = derive(&context, &[&bytes]);
    let envelope = codec::encode(&record.to_wire());
    json!({
        "name": name,
        "network": samples::network(),
        "context": context,
        "secret": hex::encode(*samples::key(secret).to_bytes()),
        "author": hex::encode(record.author().as_bytes()),
        "value": **record,
        "bytes": hex::encode(&bytes),
        "digest": hex::encode(digest),
        "signature": hex::encode(samples::key(secret).sign(&digest)),
        "envelope": hex::encode(envelope),
        "hash": hex::encode(derive("chorus record hash v1", &[record.author().as_bytes(), &digest])),
    })
}

/// Compares the vectors of one kind of record, then opens what is written down as if it came from a peer.
fn records<T>(file: &str, about: &str, list: Vec<(&str, u8, Verified<T>)>)
where
    T: Signable + Serialize + PartialEq + std::fmt::Debug,
{
    let made = list.iter().map(|(name, secret, verified)| record(name, *secret, verified)).collect();
    for (written, (_, _, expected)) in check(file, about, made).iter().zip(&list) {
        let received: Received<T> = codec::decode("envelope", &hex_of(written, "envelope"), 64 * 1024).unwrap();
        let verified = received.verify(&samples::network()).unwrap();
        assert_eq!(&*verified, &**expected);
        assert_eq!(verified.hash().as_bytes().as_slice(), hex_of(written, "hash"));
    }
}

const EMBEDDING: &str = "Component i of the embedding is (7 i mod 255) - 127.";

#[test]
fn entries() {
    let about = format!(
        "Signed ledger entries. 'bytes' is what is signed, 'envelope' what travels. {EMBEDDING} The receipt holds the envelope of \
         the first vector of work.json."
    );
    records::<Entry>(
        "entry",
        &about,
        vec![
            ("capability", samples::EXECUTOR, samples::capability_entry()),
            ("retire", samples::EXECUTOR, samples::retire_entry()),
            ("receipt", samples::REQUESTER, samples::receipt_entry()),
            ("policy", samples::REQUESTER, samples::policy_entry()),
            ("misbehaviour", samples::REQUESTER, samples::misbehaviour_entry()),
        ],
    );
}

#[test]
fn beacons() {
    let about = format!("A signed beacon. {EMBEDDING}");
    records::<Beacon>(
        "beacon",
        &about,
        vec![
            ("beacon", samples::REQUESTER, samples::beacon()),
            ("beacon for a sampler", samples::REQUESTER, samples::sampling_beacon()),
        ],
    );
}

#[test]
fn bids() {
    records::<Bid>("bid", "A signed bid.", vec![("bid", samples::EXECUTOR, samples::bid())]);
}

#[test]
fn leases() {
    let about = "A signed lease. The requirement is that of the beacon's vector.";
    records::<Lease>("lease", about, vec![("lease", samples::REQUESTER, samples::lease())]);
}

#[test]
fn works() {
    let about = "The executor's signed half of a receipt. The output's digest is that of digests.json.";
    records::<Work>(
        "work",
        about,
        vec![("done", samples::EXECUTOR, samples::work()), ("failed", samples::EXECUTOR, samples::failed_work())],
    );
}

fn frames<F: Frame + PartialEq + std::fmt::Debug>(file: &str, about: &str, list: &[(&str, F)]) {
    let made = list
        .iter()
        .map(|(name, frame)| json!({ "name": name, "frame": hex::encode(frame.to_bytes().unwrap()) }))
        .collect();
    for (written, (_, expected)) in check(file, about, made).iter().zip(list) {
        assert_eq!(&F::from_bytes(&hex_of(written, "frame")).unwrap(), expected);
    }
}

#[test]
fn ledger_frames() {
    let about = "Frames of the ledger's gossip topic: the capability of entry.json, and two entries of the key of 32 bytes 03 that \
                 share the number 3.";
    frames::<LedgerGossip>("ledger-gossip", about, &samples::ledger_frames());
}

#[test]
fn beacon_frames() {
    let about = "A frame of the beacon's gossip topic: the beacon of beacon.json.";
    frames::<BeaconGossip>("beacon-gossip", about, &[("beacon", samples::beacon_frame())]);
}

#[test]
fn direct_frames() {
    let about = "One direct frame of every kind. Envelopes are those of the records' own vectors; the payload and the output are \
                 those of digests.json; job 0b…0b, beacon be…be, fence 1, session 77.";
    frames::<Direct>("direct", about, &samples::direct_frames());
}

#[test]
fn digests() {
    let (requirement, output, payload) = (samples::requirement(), samples::output(), samples::payload());
    let requirement_bytes = codec::encode(&requirement);
    let (beacon, node) = (samples::beacon().id, samples::key(samples::EXECUTOR).node_id());
    let drawn = derive("chorus beacon draw v1", &[beacon.as_bytes(), node.as_bytes()]);
    let made = vec![
        json!({
            "name": "requirement",
            "context": "chorus requirement v1",
            "value": requirement,
            "bytes": hex::encode(&requirement_bytes),
            "digest": hex::encode(derive("chorus requirement v1", &[&requirement_bytes])),
        }),
        json!({
            "name": "output",
            "context": "chorus output v1",
            "value": output,
            "bytes": hex::encode(codec::encode(&output)),
            "salt": hex::encode(payload.salt),
            "digest": hex::encode(derive("chorus output v1", &[&payload.salt, output.text.as_bytes()])),
        }),
        json!({ "name": "payload", "value": payload, "bytes": hex::encode(codec::encode(&payload)) }),
        json!({
            "name": "draw",
            "context": "chorus beacon draw v1",
            "beacon": hex::encode(beacon.as_bytes()),
            "node": hex::encode(node.as_bytes()),
            "digest": hex::encode(drawn),
            "draw": u32::from_le_bytes(*drawn.first_chunk().unwrap()),
        }),
    ];
    let about =
        format!("Digests that stand in other records, and the private payload. {EMBEDDING} The salt is 16 bytes 5a.");
    let written = check("digests", &about, made);
    assert_eq!(requirement.digest().as_bytes().as_slice(), hex_of(&written[0], "digest"));
    assert_eq!(output.digest(&payload.salt).as_bytes().as_slice(), hex_of(&written[1], "digest"));
    assert_eq!(written[3]["draw"], Rank::of(beacon, node, 0).draw);
}

#[test]
fn identities() {
    let made = [0, 1, 2, 255].map(|n| {
        let (key, message) = (samples::key(n), b"chorus");
        let id = key.node_id();
        json!({
            "name": format!("key {n}"),
            "secret": hex::encode(*key.to_bytes()),
            "public": hex::encode(id.as_bytes()),
            "did": id.to_string(),
            "short": id.fmt_short(),
            "message": hex::encode(message),
            "signature": hex::encode(key.sign(message)),
        })
    });
    for written in check("identity", "Ed25519 keys, their DIDs, and a signature by each.", made.to_vec()) {
        let id: NodeId = written["did"].as_str().unwrap().parse().unwrap();
        let signature: [u8; 64] = hex_of(&written, "signature").try_into().unwrap();
        assert_eq!(id.as_bytes().as_slice(), hex_of(&written, "public"));
        assert!(id.verify(&hex_of(&written, "message"), &signature));
    }
}

#[test]
fn primitives() {
    fn one<T: bincode::Encode>(name: &str, value: &T) -> Value {
        json!({ "name": name, "bytes": hex::encode(codec::encode(value)) })
    }
    let made = vec![
        one("u8 251", &251u8),
        one("u16 0", &0u16),
        one("u16 250", &250u16),
        one("u16 251", &251u16),
        one("u32 65535", &65_535u32),
        one("u32 65536", &65_536u32),
        one("u64 4294967295", &u64::from(u32::MAX)),
        one("u64 4294967296", &(1u64 << 32)),
        one("u64 18446744073709551615", &u64::MAX),
        one("bool true", &true),
        one("none", &None::<u32>),
        one("some u32 300", &Some(300u32)),
        one("text 'été'", &Text::<8>::new("été").unwrap()),
        one("list of u32 1, 1000", &List::<u32, 4>::new(vec![1, 1000]).unwrap()),
        one("bytes 01 ff", &List::<u8, 4>::new(vec![1, 0xff]).unwrap()),
        one("list of 300 times the text 'a'", &List::<Text<1>, 300>::new(vec![Text::new("a").unwrap(); 300]).unwrap()),
        one("array of 3 bytes", &[1u8, 2, 255]),
        one("wall time 1800000000000", &WallTime::from_millis(samples::NOW)),
        one("rate 61.25 tokens/s", &Rate::from_tokens_per_s(61.25)),
        one("embedding", &samples::embedding()),
        one("result ok u32 7", &Ok::<u32, u32>(7)),
        one("result error u32 7", &Err::<u32, u32>(7)),
    ];
    check("codec", &format!("The codec's primitives. {EMBEDDING}"), made);
}

/// The tag of every variant, so that nobody inserts one.
#[test]
fn tags() {
    fn one<T: bincode::Encode + std::fmt::Debug>(values: Vec<T>) -> Vec<Value> {
        let encoded = |value| json!({ "name": format!("{value:?}"), "bytes": hex::encode(codec::encode(&value)) });
        values.into_iter().map(encoded).collect()
    }
    let text = |text| Text::new(text).unwrap();
    let made = [
        one(vec![JobKind::Plan, JobKind::Answer]),
        one(vec![Risk::Low, Risk::Medium, Risk::High]),
        one(vec![Role::System, Role::User, Role::Assistant]),
        one(vec![Finish::Stop, Finish::Length]),
        one(vec![DeviceKind::Cpu, DeviceKind::Cuda, DeviceKind::Metal, DeviceKind::Remote]),
        one(vec![Verdict::Accepted, Verdict::Failed, Verdict::Superseded, Verdict::Invalid]),
        one(vec![Charge::WrongReward, Charge::WrongPrompt, Charge::WrongVersion, Charge::Edited, Charge::Copied]),
        one(vec![
            Failure::Busy,
            Failure::NoSuchModel,
            Failure::ContextExceeded { prompt_tokens: 9_000, context: 8_192 },
            Failure::Engine(text("out of memory")),
            Failure::InvalidPayload(text("no turns")),
            Failure::StaleLease,
            Failure::Cancelled,
            Failure::Deadline,
            Failure::Leaving,
        ]),
    ];
    check("tags", "Every variant of the small enumerations, in the order of their tags.", made.concat());
}

/// Frames that every implementation must refuse, and what this one says of them.
#[test]
fn rejected() {
    let same = Direct::Sync(SyncMessage::Same { session: 5 }).to_bytes().unwrap();
    let list_len = |bytes: &[u8]| [&[8, 3, 0][..], bytes].concat();
    let refuse = Direct::Refuse { job: samples::job(), fence: 1, failure: Failure::Engine(Text::new("ab").unwrap()) };
    let mut not_utf8 = refuse.to_bytes().unwrap();
    not_utf8.pop();
    not_utf8.push(0xff);
    let mut small_order = Direct::Bid(samples::bid().to_wire()).to_bytes().unwrap();
    small_order[1..33].copy_from_slice(Hash::ZERO.as_bytes());
    let mut alias = small_order.clone();
    alias[1..33].fill(0xff);
    alias[32] = 0x7f;
    let mut bool_two =
        Direct::Grant { lease: samples::lease().to_wire(), payload: Box::new(samples::payload()) }.to_bytes().unwrap();
    *bool_two.last_mut().unwrap() = 2;
    let made: Vec<Value> = [
        ("nothing at all", vec![], "it ends too early"),
        ("an unknown frame", vec![10], "there is no variant 10 in this version"),
        ("a frame cut short", same[..2].to_vec(), "it ends too early"),
        ("a frame and one byte", [same.as_slice(), &[0]].concat(), "1 bytes follow a direct frame"),
        ("an integer longer than it must be", vec![8, 1, 251, 5, 0], "not in its shortest form"),
        ("a tag longer than it must be", vec![251, 8, 0, 1, 5], "not in its shortest form"),
        ("an integer of 128 bits", [&[8, 1, 254][..], &[1; 16]].concat(), "not a valid direct frame"),
        ("a reserved integer prefix", vec![8, 1, 255], "not a valid direct frame"),
        ("a list of 513 ids", list_len(&[251, 1, 2]), "a list is over its limit"),
        ("a list of 2^60 ids", list_len(&[253, 0, 0, 0, 0, 0, 0, 0, 16]), "a list is over its limit"),
        ("a list of 512 ids with none there", list_len(&[251, 0, 2]), "it ends too early"),
        ("a text that is not UTF-8", not_utf8, "a text is not UTF-8"),
        ("a truth value of 2", bool_two, "not a valid direct frame"),
        ("an author of small order", small_order, "not a usable Ed25519 public key"),
        ("an author whose y is above the prime", alias, "not a usable Ed25519 public key"),
    ]
    .into_iter()
    .map(|(name, frame, why)| json!({ "name": name, "frame": hex::encode(frame), "why": why }))
    .collect();
    let about = "Direct frames that must be refused. 'why' is part of what this implementation says; others may say it their way.";
    for written in check("rejected", about, made) {
        let error = Direct::from_bytes(&hex_of(&written, "frame")).unwrap_err().to_string();
        assert!(error.contains(written["why"].as_str().unwrap()), "{}: {error}", written["name"]);
    }
}

/// No vector that nobody compares.
#[test]
fn every_file_is_compared() {
    if std::env::var_os(REGENERATE).is_some() {
        return; // The other tests are still writing.
    }
    let mut names: Vec<_> = fs::read_dir(path("x").parent().unwrap())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "beacon-gossip.json",
            "beacon.json",
            "bid.json",
            "bulk.json",
            "codec.json",
            "digests.json",
            "direct.json",
            "entry.json",
            "evidence.json",
            "identity.json",
            "lease.json",
            "ledger-gossip.json",
            "manifest.json",
            "rejected.json",
            "rollouts.json",
            "tags.json",
            "work.json",
        ]
    );
}
