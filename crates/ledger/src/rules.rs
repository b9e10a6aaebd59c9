//! What can be said of an entry without knowing any other: clock, life, and the inner half of a receipt.

use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::limits::{MAX_CLOCK_SKEW_MS, MAX_ENTRY_LIFE_MS, MAX_EVIDENCE_BYTES};
use chorus_protocol::{NetworkId, NodeId, Verified, WallTime};

use crate::refusal::Refusal;

/// The most bytes that evidence may have.
const MAX_EVIDENCE: u64 = MAX_EVIDENCE_BYTES as u64;

/// Checks number, date and life. Cheap: no signature is looked at.
pub(crate) fn check_dates(entry: &Entry, wall: WallTime) -> Result<(), Refusal> {
    if entry.seq == 0 {
        return Err(Refusal::SeqZero);
    }
    let life_ms = entry.expires.as_millis().saturating_sub(entry.wall_time.as_millis());
    if life_ms == 0 || life_ms > MAX_ENTRY_LIFE_MS {
        return Err(Refusal::Life { life_ms });
    }
    let ahead_ms = entry.wall_time.as_millis().saturating_sub(wall.as_millis());
    if ahead_ms > MAX_CLOCK_SKEW_MS {
        return Err(Refusal::FutureDated { ahead_ms });
    }
    if entry.expires <= wall {
        return Err(Refusal::Expired(entry.expires));
    }
    Ok(())
}

/// Checks what an entry says. A receipt's inner signature is verified here, so this costs as much as the envelope did.
pub(crate) fn check_body(entry: &Verified<Entry>, network: &NetworkId) -> Result<(), Refusal> {
    match &entry.body {
        Body::Capability(_) | Body::Retire => Ok(()),
        Body::Receipt(receipt) => check_receipt(entry.author(), receipt, network),
        Body::Policy(notice) if notice.name.is_empty() => Err(Refusal::Nameless),
        Body::Policy(_) => Ok(()),
        Body::Misbehaviour(accusation) if accusation.accused == entry.author() => Err(Refusal::AccusesItself),
        Body::Misbehaviour(accusation) => match accusation.evidence_bytes {
            1..=MAX_EVIDENCE => Ok(()),
            bytes => Err(Refusal::EvidenceSize { bytes }),
        },
    }
}

fn check_receipt(author: NodeId, receipt: &Receipt, network: &NetworkId) -> Result<(), Refusal> {
    let work = receipt.work.clone().verify(network).map_err(Refusal::Work)?;
    if work.requester != author {
        return Err(Refusal::NotRequester { author, requester: work.requester });
    }
    if receipt.verdict == Verdict::Accepted && work.failure.is_some() {
        return Err(Refusal::AcceptedFailure);
    }
    Ok(())
}

/// Returns the executor's half of a receipt that the ledger holds; `None` for an entry of another kind. The signature was
/// verified when the receipt was admitted and is not verified again.
#[must_use]
pub fn receipt_work(entry: &Verified<Entry>, network: &NetworkId) -> Option<Verified<Work>> {
    match &entry.body {
        Body::Receipt(receipt) => receipt.work.clone().trust_own_disk(network).ok(),
        Body::Capability(_) | Body::Retire | Body::Policy(_) | Body::Misbehaviour(_) => None,
    }
}
