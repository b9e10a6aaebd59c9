//! What is pushed: judged once, refused with a reason, and passed on only if it holds.

use chorus_protocol::VerifyError;
use chorus_protocol::job::Failure;
use chorus_protocol::limits::{MAX_CLOCK_SKEW_MS, MAX_ENTRY_LIFE_MS};

use super::*;
use crate::refusal::Refusal;

fn sign(author: u8, seq: u64, wall_time: u64, expires: u64, body: Body) -> Verified<Entry> {
    let entry = Entry { seq, prev: Hash::ZERO, wall_time: wall(wall_time), expires: wall(expires), body };
    Verified::sign(&key(author), &network(), entry).unwrap()
}

fn reason(acceptance: Acceptance) -> Refusal {
    match acceptance {
        Acceptance::Reject { reason } => reason,
        other => panic!("{other:?} is no rejection"),
    }
}

#[test]
fn a_good_entry_is_accepted_once() {
    let mut net = Net::new(&[100]);
    let good = sign(1, 1, START, START + HOUR, capability("a", 0));
    assert_eq!(net.gossip_entry(0, &good), Acceptance::Accept);
    assert_eq!(net.gossip_entry(0, &good), Acceptance::Ignore);
    assert_eq!(net.ledger(0).capability(&id(1)).map(|found| found.name.as_str()), Some("a"));
    assert_eq!(net.ledger(0).head(&id(1)), Some((1, good.hash())));
    assert_eq!(net.ledger(0).get(&good.hash()), Some(&good));
    assert!(matches!(&net.nodes[0].events[..], [LedgerEvent::Capability { capability: Some(_), .. }]));
    assert_eq!(net.nodes[0].disk.entries.len(), 1);
    let stats = net.ledger(0).stats();
    assert_eq!((stats.entries, stats.capabilities, stats.admitted, stats.passed_over), (1, 1, 1, 1));
}

#[test]
fn what_no_honest_node_passes_on_is_rejected() {
    let mut net = Net::new(&[100]);
    let zero = sign(1, 0, START, START + HOUR, Body::Retire);
    assert_eq!(reason(net.gossip_entry(0, &zero)), Refusal::SeqZero);
    let endless = sign(1, 1, START, START + MAX_ENTRY_LIFE_MS + 1, Body::Retire);
    assert_eq!(reason(net.gossip_entry(0, &endless)), Refusal::Life { life_ms: MAX_ENTRY_LIFE_MS + 1 });
    let backwards = sign(1, 1, START, START, Body::Retire);
    assert_eq!(reason(net.gossip_entry(0, &backwards)), Refusal::Life { life_ms: 0 });
    let other: NetworkId = "other".parse().unwrap();
    let entry =
        Entry { seq: 1, prev: Hash::ZERO, wall_time: wall(START), expires: wall(START + HOUR), body: Body::Retire };
    let foreign = Verified::sign(&key(1), &other, entry).unwrap();
    assert!(matches!(reason(net.gossip_entry(0, &foreign)), Refusal::Invalid(VerifyError::BadSignature { .. })));
    assert_eq!(net.ledger(0).len(), 0);
    assert_eq!(net.ledger(0).stats().refused, 4);
    assert!(net.nodes[0].disk.entries.is_empty());
}

#[test]
fn clocks_and_time_are_nobodys_fault() {
    let mut net = Net::new(&[100]);
    let ahead = sign(1, 1, START + MAX_CLOCK_SKEW_MS + 1, START + HOUR, Body::Retire);
    assert_eq!(net.gossip_entry(0, &ahead), Acceptance::Ignore);
    assert_eq!(net.ledger(0).stats().future_dated, 1);
    let late = sign(1, 2, START - HOUR, START, Body::Retire);
    assert_eq!(net.gossip_entry(0, &late), Acceptance::Ignore);
    assert_eq!(net.ledger(0).len(), 0);
    let within = sign(1, 3, START + MAX_CLOCK_SKEW_MS, START + HOUR, Body::Retire);
    assert_eq!(net.gossip_entry(0, &within), Acceptance::Accept);
}

#[test]
fn a_receipt_must_be_its_requesters_and_its_inner_half_must_hold() {
    let mut net = Net::new(&[100]);
    let receipt_of = |work: Work, executor: u8, verdict| {
        let work = Verified::sign(&key(executor), &network(), work).unwrap().to_wire();
        Body::Receipt(Box::new(Receipt { work, verdict, observed_ms: 5 }))
    };
    let stolen = sign(1, 1, START, START + HOUR, receipt_of(work(id(3), 1), 2, Verdict::Accepted));
    assert_eq!(reason(net.gossip_entry(0, &stolen)), Refusal::NotRequester { author: id(1), requester: id(3) });

    let failed = Work { failure: Some(Failure::Busy), ..work(id(1), 1) };
    let rosy = sign(1, 1, START, START + HOUR, receipt_of(failed.clone(), 2, Verdict::Accepted));
    assert_eq!(reason(net.gossip_entry(0, &rosy)), Refusal::AcceptedFailure);
    let other: NetworkId = "other".parse().unwrap();
    let forged = Verified::sign(&key(2), &other, work(id(1), 1)).unwrap().to_wire();
    let body = Body::Receipt(Box::new(Receipt { work: forged, verdict: Verdict::Accepted, observed_ms: 5 }));
    let forged = sign(1, 1, START, START + HOUR, body);
    assert!(matches!(reason(net.gossip_entry(0, &forged)), Refusal::Work(VerifyError::BadSignature { .. })));

    let honest = sign(1, 1, START, START + HOUR, receipt_of(failed, 2, Verdict::Failed));
    assert_eq!(net.gossip_entry(0, &honest), Acceptance::Accept);
    let [LedgerEvent::Receipt { entry }] = &net.nodes[0].events[..] else { panic!("{:?}", net.nodes[0].events) };
    let inner = crate::receipt_work(entry, &network()).unwrap();
    assert_eq!((inner.author(), inner.failure.clone()), (id(2), Some(Failure::Busy)));
}

#[test]
fn the_latest_capability_wins_and_retirement_takes_it_back() {
    let mut net = Net::new(&[100]);
    let first = sign(1, 1, START, START + HOUR, capability("first", 0));
    let third = sign(1, 3, START, START + HOUR, capability("third", 0));
    let retired = sign(1, 5, START, START + HOUR, Body::Retire);
    assert_eq!(net.gossip_entry(0, &third), Acceptance::Accept);
    assert_eq!(net.gossip_entry(0, &first), Acceptance::Ignore);
    assert_eq!(net.ledger(0).capability(&id(1)).unwrap().name.as_str(), "third");
    assert_eq!(net.gossip_entry(0, &retired), Acceptance::Accept);
    assert!(net.ledger(0).capability(&id(1)).is_none());
    assert_eq!(net.ledger(0).len(), 1);
    assert!(matches!(net.nodes[0].events.last(), Some(LedgerEvent::Capability { capability: None, .. })));
}

#[test]
fn a_capability_expires_by_the_wall_clock_and_somebody_is_told() {
    let mut net = Net::new(&[100]);
    net.gossip_entry(0, &sign(1, 1, START, START + 2_500, capability("a", 0)));
    net.run(Duration::from_secs(2));
    assert!(net.ledger(0).capability(&id(1)).is_some());
    net.run(Duration::from_secs(1));
    assert!(net.ledger(0).capability(&id(1)).is_none());
    assert!(matches!(net.nodes[0].events.last(), Some(LedgerEvent::Capability { capability: None, .. })));
    assert!(net.nodes[0].disk.entries.is_empty());
    assert_eq!(net.ledger(0).deadline(), None);
}

#[test]
fn two_entries_of_one_number_quarantine_their_author_on_every_node_that_hears_of_it() {
    let mut net = Net::new(&[100, 101, 102]);
    for (a, b) in [(0, 1), (1, 2)] {
        net.link(a, b);
    }
    net.run(Duration::from_secs(1));
    let one = sign(1, 1, START, START + HOUR, capability("one", 0));
    let two = sign(1, 1, START, START + HOUR, capability("two", 0));
    net.gossip = false;
    net.gossip_entry(0, &one);
    net.gossip_entry(1, &one);
    net.gossip_entry(2, &one);
    net.gossip = true;
    // The second version is not passed on; the proof is.
    assert_eq!(net.gossip_entry(0, &two), Acceptance::Ignore);
    assert!(matches!(net.nodes[0].published.last(), Some(LedgerGossip::Equivocation(_))));
    assert_eq!(net.nodes[1].judged.last(), Some(&Acceptance::Accept));
    for n in 0..2 {
        assert!(net.ledger(n).is_quarantined(&id(1)));
        assert!(net.ledger(n).capability(&id(1)).is_none());
        assert_eq!(net.ledger(n).len(), 0);
        assert_eq!(net.nodes[n].disk.proofs.len(), 1);
        assert!(net.nodes[n].disk.entries.is_empty());
        assert!(net.nodes[n].events.iter().any(|event| matches!(event, LedgerEvent::Quarantined { .. })));
    }
    // The third hears of it by reconciliation, if gossip does not reach it.
    net.run(Duration::from_secs(10));
    assert!(net.ledger(2).is_quarantined(&id(1)) && net.agree());
    // Nothing of a fraud is believed again, also after a restart.
    net.crash(0, LedgerConfig::default());
    assert_eq!(net.gossip_entry(0, &one), Acceptance::Ignore);
    assert!(net.ledger(0).is_quarantined(&id(1)) && net.agree());
}

#[test]
fn nodes_with_different_proofs_of_one_fraud_agree() {
    let mut net = Net::new(&[100, 101]);
    let version = |n: u64| sign(1, 1, START, START + HOUR + n, Body::Retire);
    for (node, versions) in [(0, [1, 2]), (1, [3, 4])] {
        for n in versions {
            net.gossip_entry(node, &version(n));
        }
    }
    assert_ne!(net.ledger(0).proof(&id(1)), net.ledger(1).proof(&id(1)));
    assert!(net.agree());
}

#[test]
fn a_broken_link_is_a_proof_too() {
    let mut net = Net::new(&[100]);
    let first = sign(1, 1, START, START + HOUR, capability("a", 0));
    let entry = Entry {
        seq: 2,
        prev: Hash::derive("t", &[b"something else"]),
        wall_time: wall(START),
        expires: wall(START + HOUR),
        body: Body::Retire,
    };
    let second = Verified::sign(&key(1), &network(), entry).unwrap();
    net.gossip_entry(0, &second);
    net.gossip_entry(0, &first);
    assert!(net.ledger(0).is_quarantined(&id(1)));
}

#[test]
fn a_pair_that_proves_nothing_is_rejected_and_convicts_nobody() {
    let mut net = Net::new(&[100]);
    let chain = chain(1, 2);
    let frame = LedgerGossip::Equivocation(Equivocation { first: chain[0].to_wire(), second: chain[1].to_wire() });
    net.input(0, LedgerInput::Gossip { from: id(200), frame });
    assert!(matches!(reason(net.nodes[0].judged.pop().unwrap()), Refusal::NoProof(_)));
    assert_eq!(net.ledger(0).quarantined().count(), 0);
}
