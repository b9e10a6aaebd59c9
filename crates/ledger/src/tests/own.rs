//! The own chain: on disk before anybody hears of it, and no number twice, whatever breaks.

use proptest::prelude::*;

use super::*;
use crate::AppendError;
use crate::refusal::Refusal;

fn own_entries(net: &Net, n: usize) -> Vec<Verified<Entry>> {
    let me = net.ledger(n).id();
    net.ledger(n).entries().filter(|entry| entry.author() == me).cloned().collect()
}

#[test]
fn nothing_is_said_before_it_is_on_disk() {
    let mut net = Net::new(&[1]);
    net.nodes[0].slow_disk = true;
    for request in 0..10 {
        net.append(0, request, receipt(1, 2, request));
    }
    assert!(net.nodes[0].published.is_empty() && net.nodes[0].appended.is_empty());
    assert_eq!((net.ledger(0).len(), net.ledger(0).stats().pending_appends), (0, 10));
    net.settle(0);
    assert_eq!(net.nodes[0].published.len(), 10);
    assert_eq!(
        net.nodes[0].appended.iter().map(|(request, _)| *request).collect::<Vec<_>>(),
        (0..10).collect::<Vec<_>>()
    );
    // In flight together, and yet one chain.
    let own = own_entries(&net, 0);
    assert_eq!(own.len(), 10);
    assert!(own.windows(2).all(|pair| pair[1].prev == pair[0].hash() && pair[1].seq == pair[0].seq + 1));
    // What was just written is not written a second time.
    assert_eq!(net.nodes[0].writing.len(), 0);
}

#[test]
fn a_disk_that_fails_fails_the_append_and_the_number_is_not_used_again() {
    let mut net = Net::new(&[1]);
    net.nodes[0].slow_disk = true;
    net.append(0, 1, capability("a", 0));
    let batch = net.nodes[0].writing.pop_front().unwrap().batch;
    net.input(0, LedgerInput::PersistFailed { batch, reason: "no room".to_owned() });
    assert_eq!(net.nodes[0].failed, [(1, AppendError::Disk { reason: "no room".to_owned() })]);
    assert!(net.nodes[0].published.is_empty() && net.ledger(0).is_empty());
    net.append(0, 2, capability("b", 0));
    net.settle(0);
    let [first, second] = &net.nodes[0].signed[..] else { panic!() };
    assert!(second.seq > first.seq && second.prev == first.hash());
    assert_eq!(net.ledger(0).capability(&id(1)).unwrap().name.as_str(), "b");
}

#[test]
fn what_others_would_refuse_is_refused_at_once() {
    let mut net = Net::new(&[1]);
    net.append(0, 1, receipt(3, 2, 1));
    net.append(0, 2, capability("big", 8_000));
    assert!(matches!(net.nodes[0].failed[0], (1, AppendError::Refused(Refusal::NotRequester { .. }))));
    // Eight tools of a kilobyte fit; that is the most a capability can hold, so only the queue's bound is left to reach.
    assert_eq!(net.nodes[0].appended.len(), 1);
    net.nodes[0].slow_disk = true;
    for request in 0..257 {
        net.append(0, request, Body::Retire);
    }
    assert_eq!(net.nodes[0].failed.last(), Some(&(256, AppendError::Overloaded { waiting: 256 })));
}

#[test]
fn a_notice_of_a_policy_lives_as_a_capability_does_and_an_accusation_as_a_receipt() {
    let mut net = Net::new(&[1, 100]);
    net.link(0, 1);
    net.append(0, 1, policy("adder", 1));
    net.append(0, 2, accusation(1, 2, 1));
    net.append(0, 3, policy("adder", 2));
    net.append(0, 4, policy("", 3));
    net.append(0, 5, accusation(1, 1, 2));
    assert!(matches!(
        net.nodes[0].failed[..],
        [(4, AppendError::Refused(Refusal::Nameless)), (5, AppendError::Refused(Refusal::AccusesItself))]
    ));
    net.run(Duration::from_secs(3));
    let stands = net.ledger(1).policy(&policy_id(1, "adder")).unwrap();
    assert_eq!((stands.expires, net.ledger(1).len()), (wall(START + HOUR), 2));
    assert!(net.ledger(1).policy(&policy_id(100, "adder")).is_none(), "its author is its owner");
    let accused = |event: &LedgerEvent| matches!(event, LedgerEvent::Misbehaviour { .. });
    assert_eq!(net.nodes[1].events.iter().filter(|event| accused(event)).count(), 1);
    net.cut(0, 1);
    net.pass(Duration::from_secs(3_600));
    net.call(1, |ledger, cx, out| ledger.expire(cx, out));
    assert_eq!((net.ledger(1).len(), net.ledger(1).policies().count()), (1, 0));
    net.pass(Duration::from_secs(7 * 24 * 3_600));
    net.call(1, |ledger, cx, out| ledger.expire(cx, out));
    assert!(net.ledger(1).is_empty());
}

#[test]
fn a_capability_outlives_what_it_supersedes() {
    let mut net = Net::with(&[1], LedgerConfig::default());
    net.append(0, 1, capability("long", 0));
    let cfg = LedgerConfig { capability_life: Duration::from_secs(1), ..LedgerConfig::default() };
    net.crash(0, cfg);
    net.append(0, 2, Body::Retire);
    let own = own_entries(&net, 0);
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].body, Body::Retire);
    assert!(own[0].expires >= wall(START + HOUR));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 24 } else { 256 }))]

    #[test]
    fn no_number_is_used_twice_through_crashes_expiry_lost_disks_and_clocks(
        steps in proptest::collection::vec((0u8..8, 0u64..4), 1..40)
    ) {
        let cfg = LedgerConfig {
            capability_life: Duration::from_secs(60),
            receipt_life: Duration::from_secs(90),
            ..LedgerConfig::default()
        };
        let mut net = Net::with(&[1, 100], cfg.clone());
        net.link(0, 1);
        let mut request = 0;
        for (step, amount) in steps {
            match step {
                0 | 1 => net.append(0, { request += 1; request }, receipt(1, 2, request)),
                2 => net.append(0, { request += 1; request }, capability("x", 0)),
                7 => net.append(0, { request += 1; request }, policy(&format!("p{amount}"), request)),
                3 => net.nodes[0].slow_disk = amount % 2 == 0,
                4 => { net.settle(0); net.run(Duration::from_millis(amount * 30_000 + 1)) }
                // Dies; what was not written is gone.
                5 => { net.crash(0, cfg.clone()); net.pass(Duration::from_millis(50)) }
                // Dies, and comes back with an empty disk a little later.
                _ => { net.nodes[0].disk = Disk::default(); net.pass(Duration::from_millis(50)); net.crash(0, cfg.clone()) }
            }
        }
        net.settle(0);
        let mut seqs: Vec<u64> = net.nodes[0].signed.iter().map(|entry| entry.seq).collect();
        let count = seqs.len();
        seqs.sort_unstable();
        seqs.dedup();
        prop_assert_eq!(seqs.len(), count);
        prop_assert!(!net.ledger(1).is_quarantined(&id(1)));
        // Everything acknowledged that has not expired is with the neighbour in the end.
        net.run(Duration::from_secs(10));
        prop_assert!(net.agree());
    }
}

#[test]
fn a_node_that_lost_its_disk_says_so_and_is_not_taken_for_a_fraud() {
    let mut net = Net::new(&[1, 100]);
    net.link(0, 1);
    for n in 0..3 {
        net.append(0, n, receipt(1, 2, n));
    }
    net.append(0, 3, capability("before", 0));
    net.run(Duration::from_secs(3));
    assert!(net.agree() && net.ledger(1).len() == 4);
    net.cut(0, 1);
    net.nodes[0].disk = Disk::default();
    net.crash(0, LedgerConfig::default());
    net.nodes[0].events.clear();
    net.append(0, 4, capability("after", 0));
    net.link(0, 1);
    net.run(Duration::from_secs(3));
    assert!(net.agree() && net.ledger(0).len() == 4);
    assert!(!net.ledger(1).is_quarantined(&id(1)));
    assert_eq!(net.ledger(1).capability(&id(1)).unwrap().name.as_str(), "after");
    let reports = net.nodes[0].events.iter().filter_map(|event| match event {
        LedgerEvent::DuplicateKey { while_running, .. } => Some(*while_running),
        _ => None,
    });
    assert_eq!(reports.collect::<Vec<_>>(), [false; 3]);
}

#[test]
fn two_running_nodes_with_one_key_are_both_told() {
    let mut net = Net::new(&[1, 1, 100]);
    // The two cannot be told apart by their id, so each has its own way to the third.
    net.append(0, 1, capability("one", 0));
    net.pass(Duration::from_secs(5));
    net.append(1, 1, capability("two", 0));
    let [LedgerGossip::Entry(one)] = &net.nodes[0].published[..] else { panic!() };
    let [LedgerGossip::Entry(two)] = &net.nodes[1].published[..] else { panic!() };
    let (one, two) = (one.clone(), two.clone());
    net.input(0, LedgerInput::Gossip { from: id(100), frame: LedgerGossip::Entry(two) });
    net.input(1, LedgerInput::Gossip { from: id(100), frame: LedgerGossip::Entry(one) });
    assert!(matches!(net.nodes[0].events.last(), Some(LedgerEvent::DuplicateKey { while_running: true, .. })));
    // The second started later than the first wrote, so it cannot know whether that was itself.
    assert!(
        !net.nodes[1].events.iter().any(|event| matches!(event, LedgerEvent::DuplicateKey { while_running: true, .. }))
    );
    // The next entry of the first settles it.
    net.append(0, 2, capability("one again", 0));
    let Some(LedgerGossip::Entry(again)) = net.nodes[0].published.last().cloned() else { panic!() };
    net.pass(Duration::from_secs(1));
    net.input(1, LedgerInput::Gossip { from: id(100), frame: LedgerGossip::Entry(again) });
    let told = |event: &LedgerEvent| matches!(event, LedgerEvent::DuplicateKey { .. });
    assert!(net.nodes[1].events.iter().any(told), "{:?}", net.nodes[1].events);
}

#[test]
fn two_nodes_that_use_one_number_are_found_out() {
    // Started in the same millisecond, so that both begin with the same number.
    let mut net = Net::new(&[1, 1, 100]);
    net.append(0, 1, capability("one", 0));
    net.append(1, 1, capability("two", 0));
    let versions = [net.nodes[0].signed[0].clone(), net.nodes[1].signed[0].clone()];
    assert_eq!(versions[0].seq, versions[1].seq);
    for (n, version) in versions.iter().enumerate() {
        net.gossip_entry(2, version);
        net.gossip_entry(1 - n, version);
    }
    for n in 0..3 {
        assert!(net.ledger(n).is_quarantined(&id(1)));
    }
    assert!(
        net.nodes[0].events.iter().any(|event| matches!(event, LedgerEvent::DuplicateKey { while_running: true, .. }))
    );
    net.append(0, 2, capability("three", 0));
    assert!(matches!(net.nodes[0].failed.last(), Some((2, AppendError::Refused(Refusal::Quarantined(_))))));
}

#[test]
fn the_last_number_outlives_its_entry_and_a_clock_that_is_set_back() {
    let cfg = LedgerConfig { receipt_life: Duration::from_secs(1), ..LedgerConfig::default() };
    let mut net = Net::with(&[1], cfg.clone());
    net.append(0, 1, receipt(1, 2, 1));
    let (_, last) = net.nodes[0].appended[0];
    net.run(Duration::from_secs(5));
    assert!(net.ledger(0).is_empty() && net.nodes[0].disk.entries.is_empty());
    net.wall -= HOUR;
    net.crash(0, cfg);
    net.append(0, 2, receipt(1, 2, 2));
    let [first, second] = &net.nodes[0].signed[..] else { panic!() };
    assert_eq!((second.seq, second.prev), (last + 1, first.hash()));
}
