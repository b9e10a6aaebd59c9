//! The envelope: what is believed, and what is not.

use bincode::de::{Decode, Decoder};
use bincode::enc::write::Writer;
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError as BincodeDecodeError, EncodeError};
use chorus_protocol::beacon::{Beacon, Bid, Lease, Work};
use chorus_protocol::entry::Entry;
use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_SMALL_BYTES};
use chorus_protocol::{Admitted, DecodeError, NetworkId, Received, SecretKey, Signable, Verified, VerifyError, codec};
use proptest::prelude::*;

use crate::{samples, strategies};

/// More than any envelope of this crate.
const ENVELOPE_MAX: usize = 64 * 1024;

fn open<T: Signable>(envelope: &[u8]) -> Result<Received<T>, DecodeError> {
    codec::decode("envelope", envelope, ENVELOPE_MAX)
}

/// What must hold of every signed record.
fn holds<T>(verified: &Verified<T>, at: prop::sample::Index, flip: u8) -> Result<(), TestCaseError>
where
    T: Signable + PartialEq + std::fmt::Debug,
{
    let network = strategies::network();
    let envelope = codec::encode(&verified.to_wire());
    prop_assert!(envelope.len() <= verified.encoded_len() + ENVELOPE_OVERHEAD_BYTES);
    let received = open::<T>(&envelope).unwrap();
    prop_assert_eq!(received.claimed_author(), verified.author());
    prop_assert_eq!(received.len(), verified.encoded_len());
    let again = received.clone().verify(&network).unwrap();
    prop_assert_eq!(&*again, &**verified);
    prop_assert_eq!(again.hash(), verified.hash());
    prop_assert_eq!(again.author(), verified.author());
    // What is passed on is what came, to the byte.
    prop_assert_eq!(codec::encode(&again.to_wire()), envelope.clone());
    prop_assert_eq!(received.clone().trust_own_disk(&network).unwrap().hash(), verified.hash());

    // In another network it is nobody's.
    let elsewhere: NetworkId = "test-2".parse().unwrap();
    prop_assert_eq!(received.verify(&elsewhere).unwrap_err().culprit(), None);

    // One byte altered, anywhere: not even an envelope, or not signed by whom it names.
    let mut altered = envelope;
    let index = at.index(altered.len());
    altered[index] ^= flip;
    if let Ok(received) = open::<T>(&altered) {
        let error = received.verify(&network).err();
        prop_assert!(matches!(error, Some(VerifyError::BadSignature { .. })), "{:?}", error);
    }
    Ok(())
}

proptest! {
    #![proptest_config(strategies::config(64))]

    #[test]
    fn entries(record in strategies::signed(strategies::entry()), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&record, at, flip)?;
    }

    #[test]
    fn beacons(record in strategies::signed(strategies::beacon()), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&record, at, flip)?;
    }

    #[test]
    fn bids(record in strategies::signed(strategies::bid()), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&record, at, flip)?;
    }

    #[test]
    fn leases(record in strategies::signed(strategies::lease()), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&record, at, flip)?;
    }

    #[test]
    fn works(record in strategies::signed(strategies::work()), at: prop::sample::Index, flip in 1..=255u8) {
        holds(&record, at, flip)?;
    }

    #[test]
    fn equal_records_have_equal_hashes(a in strategies::bid(), b in strategies::bid(), one: [u8; 32], other: [u8; 32]) {
        prop_assume!(a != b && one != other);
        let network = strategies::network();
        let sign = |key: &[u8; 32], bid: &Bid| {
            Verified::sign(&SecretKey::from_bytes(key), &network, bid.clone()).unwrap()
        };
        prop_assert_eq!(sign(&one, &a).hash(), sign(&one, &a).hash());
        prop_assert_ne!(sign(&one, &a).hash(), sign(&one, &b).hash());
        prop_assert_ne!(sign(&one, &a).hash(), sign(&other, &a).hash());
    }
}

/// Every single bit of an envelope, not only a drawn one.
#[test]
fn no_bit_of_an_envelope_may_change() {
    let envelope = codec::encode(&samples::bid().to_wire());
    for bit in 0..envelope.len() * 8 {
        let mut altered = envelope.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        if let Ok(received) = open::<Bid>(&altered) {
            let error = received.verify(&samples::network()).unwrap_err();
            assert_eq!(error.culprit(), None, "bit {bit}: nobody is to blame for what anybody could have altered");
        }
    }
}

/// A record of one kind is no record of another, though the envelopes look alike.
#[test]
fn kinds_do_not_pass_for_one_another() {
    fn refused<T: Signable + std::fmt::Debug>(envelopes: &[(&str, Vec<u8>)]) {
        for (kind, envelope) in envelopes {
            let verdict = open::<T>(envelope).map(|received| received.verify(&samples::network()));
            match verdict {
                Ok(Ok(_)) => assert_eq!(*kind, T::KIND),
                Ok(Err(error)) => {
                    assert_ne!(*kind, T::KIND);
                    assert!(matches!(error, VerifyError::BadSignature { kind, .. } if kind == T::KIND));
                }
                // Too long for the smaller kind.
                Err(error) => {
                    assert_ne!(*kind, T::KIND);
                    assert!(matches!(error, DecodeError::Malformed { .. }), "{error}");
                }
            }
        }
    }
    let envelopes = [
        (Entry::KIND, codec::encode(&samples::retire_entry().to_wire())),
        (Beacon::KIND, codec::encode(&samples::beacon().to_wire())),
        (Bid::KIND, codec::encode(&samples::bid().to_wire())),
        (Lease::KIND, codec::encode(&samples::lease().to_wire())),
        (Work::KIND, codec::encode(&samples::work().to_wire())),
    ];
    refused::<Entry>(&envelopes);
    refused::<Beacon>(&envelopes);
    refused::<Bid>(&envelopes);
    refused::<Lease>(&envelopes);
    refused::<Work>(&envelopes);
}

/// Bytes that an author signs as a record without their being one.
#[derive(Debug)]
struct Forged<T>(Vec<u8>, std::marker::PhantomData<T>);

impl<T> Encode for Forged<T> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        encoder.writer().write(&self.0)
    }
}

impl<C, T> Decode<C> for Forged<T> {
    fn decode<D: Decoder<Context = C>>(_: &mut D) -> Result<Self, BincodeDecodeError> {
        Err(BincodeDecodeError::Other("never decoded"))
    }
}

impl<T: Signable> Signable for Forged<T> {
    const KIND: &'static str = T::KIND;
    const VERSION: u16 = T::VERSION;
    const MAX_BYTES: usize = T::MAX_BYTES;
}

/// A lease as its next version might be: the same bytes, another context.
struct NextLease(Lease);

impl Encode for NextLease {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.0.encode(encoder)
    }
}

impl<C> Decode<C> for NextLease {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, BincodeDecodeError> {
        Lease::decode(decoder).map(Self)
    }
}

impl Signable for NextLease {
    const KIND: &'static str = Lease::KIND;
    const VERSION: u16 = Lease::VERSION + 1;
    const MAX_BYTES: usize = Lease::MAX_BYTES;
}

#[test]
fn versions_do_not_pass_for_one_another() {
    let envelope = codec::encode(&samples::lease().to_wire());
    let next = samples::sign(samples::REQUESTER, NextLease((*samples::lease()).clone()));
    let refused = open::<NextLease>(&envelope).unwrap().verify(&samples::network());
    assert!(matches!(refused, Err(VerifyError::BadSignature { kind: "lease", .. })));
    let refused = open::<Lease>(&codec::encode(&next.to_wire())).unwrap().verify(&samples::network());
    assert!(matches!(refused, Err(VerifyError::BadSignature { kind: "lease", .. })));
}

#[test]
fn signed_nonsense_convicts_its_author() {
    let good = codec::encode(&*samples::bid());
    let mut bad_key = good.clone();
    bad_key[16..48].fill(0);
    let mut long_integer = good.clone();
    assert_eq!(long_integer[51], 1, "active");
    long_integer.splice(51..52, [251, 1, 0]);
    for (bytes, why) in [
        (good[..good.len() - 1].to_vec(), "it ends too early"),
        ([good.as_slice(), &[0]].concat(), "1 bytes follow a bid"),
        (bad_key, "not a usable Ed25519 public key"),
        (long_integer, "not in its shortest form"),
        (Vec::new(), "it ends too early"),
    ] {
        let bytes_signed = bytes.len();
        let forged = samples::sign(samples::EXECUTOR, Forged::<Bid>(bytes, std::marker::PhantomData));
        let received = open::<Bid>(&codec::encode(&forged.to_wire())).unwrap();
        assert_eq!(received.is_empty(), bytes_signed == 0);
        let error = received.clone().verify(&samples::network()).unwrap_err();
        assert_eq!(error.culprit(), Some(forged.author()));
        assert!(error.to_string().contains(why), "{error}");
        assert!(received.trust_own_disk(&samples::network()).is_err());
    }
    // The same bytes, whole, are a bid.
    let whole = samples::sign(samples::EXECUTOR, Forged::<Bid>(good, std::marker::PhantomData));
    let received = open::<Bid>(&codec::encode(&whole.to_wire())).unwrap();
    assert_eq!(received.verify(&samples::network()), Ok(samples::bid()));
}

#[test]
fn an_envelope_over_the_limit_of_its_kind_is_refused() {
    let envelope = |len: usize| {
        let mut bytes = samples::key(1).node_id().as_bytes().to_vec();
        bytes.extend([0; 64]);
        bytes.push(251);
        bytes.extend((len as u16).to_le_bytes());
        bytes.extend(vec![0; len]);
        bytes
    };
    assert_eq!(open::<Bid>(&envelope(MAX_SMALL_BYTES)).unwrap().len(), MAX_SMALL_BYTES);
    let error = open::<Bid>(&envelope(MAX_SMALL_BYTES + 1)).unwrap_err();
    assert_eq!(error.to_string(), "not a valid envelope: a signed record is over the limit of its kind");

    let too_much = Forged::<Bid>(vec![0; MAX_SMALL_BYTES + 1], std::marker::PhantomData);
    let error = Verified::sign(&samples::key(1), &samples::network(), too_much).unwrap_err();
    assert_eq!(error, DecodeError::TooLarge { kind: "bid", len: MAX_SMALL_BYTES + 1, max: MAX_SMALL_BYTES });
}

/// A replayed envelope is the same record, so whoever keeps hashes can tell; and another valid signature of its author (a signer
/// is free to draw another nonce) does not make a second record of it.
#[test]
fn the_hash_does_not_cover_the_signature() {
    let bid = samples::bid();
    let mut envelope = codec::encode(&bid.to_wire());
    envelope[40] ^= 1;
    let resigned = open::<Bid>(&envelope).unwrap().trust_own_disk(&samples::network()).unwrap();
    assert_eq!(resigned.hash(), bid.hash());
    assert_ne!(resigned.to_wire(), bid.to_wire());
    assert_eq!(Admitted::new(bid.clone()).hash(), bid.hash());
}
