//! What a thread has verified before: for simulators, where a thousand nodes verify the same record.
//!
//! Off until a thread asks for it with [`remember`]; a node never does. Verifying is a pure function of the network, the kind and the
//! envelope's bytes, so remembering its result changes what it costs and nothing else. Only what was found good is remembered, and
//! it is found again only by equality of author, signature, signed bytes, kind and network. The nodes of a simulation then share
//! one copy of each record, which is why a thousand ledgers of a thousand entries fit into memory.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::id::NetworkId;
use crate::signed::{Received, Signable, Verified};

/// One remembered record: a `Verified<T>` of its network.
type Slot = (NetworkId, Box<dyn Any>);

#[derive(Default)]
struct Memo {
    /// By eight bytes of the signature; of two records that share them the later one stays.
    slots: BTreeMap<u64, Slot>,
    most: usize,
    hits: u64,
    misses: u64,
}

thread_local! {
    static MEMO: RefCell<Memo> = RefCell::default();
}

/// How often a record was found remembered, and how often it had to be verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Found.
    pub hits: u64,
    /// Verified.
    pub misses: u64,
}

/// Makes this thread remember up to `records` verified records from now on, and forget what it knew; 0 turns it off. Returns the
/// tally since the last call.
pub fn remember(records: usize) -> Tally {
    MEMO.with(|memo| {
        let old = memo.replace(Memo { most: records, ..Memo::default() });
        Tally { hits: old.hits, misses: old.misses }
    })
}

fn slot_of(signature: &[u8; 64]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *signature;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

pub(crate) fn find<T: Signable>(received: &Received<T>, network: &NetworkId) -> Option<Verified<T>> {
    let found = MEMO.try_with(|memo| {
        let mut memo = memo.borrow_mut();
        if memo.most == 0 {
            return None;
        }
        let (of, record) = memo.slots.get(&slot_of(received.signature()))?;
        let record = record.downcast_ref::<Verified<T>>().filter(|record| of == network && record.is_of(received))?;
        let record = record.clone();
        memo.hits += 1;
        Some(record)
    });
    found.ok().flatten()
}

pub(crate) fn keep<T: Signable>(verified: &Verified<T>, network: &NetworkId) {
    // A thread that is about to end has no memo any more, and needs none.
    let _ended = MEMO.try_with(|memo| {
        let mut memo = memo.borrow_mut();
        if memo.most == 0 {
            return;
        }
        if memo.slots.len() >= memo.most {
            memo.slots.clear();
        }
        memo.misses += 1;
        memo.slots.insert(slot_of(verified.signature()), (network.clone(), Box::new(verified.clone())));
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::codec;
    use crate::entry::{Body, Entry};
    use crate::{Hash, SecretKey, VerifyError, WallTime};

    fn network(name: &str) -> NetworkId {
        name.parse().unwrap()
    }

    fn envelope() -> Vec<u8> {
        let (wall_time, expires) = (WallTime::from_millis(1), WallTime::from_millis(2));
        let entry = Entry { seq: 1, prev: Hash::ZERO, wall_time, expires, body: Body::Retire };
        let key = SecretKey::from_bytes(&[7; 32]);
        codec::encode(&Verified::sign(&key, &network("here"), entry).unwrap().to_wire())
    }

    fn received(bytes: &[u8]) -> Received<Entry> {
        codec::decode("entry", bytes, 4_096).unwrap()
    }

    #[test]
    fn what_was_good_is_found_again_and_the_copies_share_one_record() {
        remember(16);
        let (first, second) =
            (received(&envelope()).verify(&network("here")), received(&envelope()).verify(&network("here")));
        assert!(std::ptr::eq(&**first.as_ref().unwrap(), &**second.as_ref().unwrap()));
        assert_eq!(remember(0), Tally { hits: 1, misses: 1 });
    }

    #[test]
    fn an_altered_envelope_is_no_better_for_a_remembered_one() {
        remember(16);
        let good = envelope();
        received(&good).verify(&network("here")).unwrap();
        assert!(matches!(received(&good).verify(&network("there")), Err(VerifyError::BadSignature { .. })));
        for at in 32..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            // Where the length stands an altered byte makes it no envelope at all.
            let Ok(bad) = codec::decode::<Received<Entry>>("entry", &bad, 4_096) else {
                continue;
            };
            assert!(bad.verify(&network("here")).is_err(), "byte {at}");
        }
        remember(0);
    }

    #[test]
    fn nothing_is_remembered_unless_asked_for_and_never_more_than_asked_for() {
        received(&envelope()).verify(&network("here")).unwrap();
        assert_eq!(remember(0), Tally::default());
        remember(1);
        received(&envelope()).verify(&network("here")).unwrap();
        MEMO.with(|memo| assert_eq!(memo.borrow().slots.len(), 1));
        remember(0);
    }
}
