//! The state is a function of the set: any order, any repetition, through expiry, compaction and quarantine.

use chorus_protocol::Admitted;
use proptest::prelude::*;

use super::*;
use crate::delta::Delta;
use crate::refusal::Refusal;
use crate::state::State;

/// Three authors; for each a chain of at most twenty entries, each with its kind and hours to live, and the numbers of which a
/// second version exists. An author may train more policies than are kept.
fn universe() -> impl Strategy<Value = Vec<Verified<Entry>>> {
    let chain = proptest::collection::vec((0u8..20, 1u64..6), 1..20);
    let forks = proptest::collection::vec(0usize..60, 0..2);
    proptest::collection::vec((chain, forks), 3).prop_map(|authors| {
        let mut all = Vec::new();
        for (author, (chain, forks)) in (1u8..).zip(authors) {
            let mut prev = Hash::ZERO;
            for (n, (kind, hours)) in chain.iter().enumerate() {
                let body = || match kind {
                    0 => Body::Retire,
                    1..=3 => capability(&format!("node {author} entry {n}"), 0),
                    4..=6 => receipt(author, 9, n as u64),
                    7..=8 => accusation(author, 9, n as u64),
                    name => policy(&format!("policy {name}"), n as u64),
                };
                let seq = n as u64 + 1;
                let canonical = entry(author, seq, prev, START + hours * HOUR, body());
                if forks.contains(&n) {
                    all.push(entry(author, seq, prev, START + hours * HOUR + 1, body()));
                }
                prev = canonical.hash();
                all.push(canonical);
            }
        }
        all
    })
}

fn deliveries() -> impl Strategy<Value = (Vec<Verified<Entry>>, Vec<Verified<Entry>>)> {
    // The same set twice: in two orders, the second with repetitions.
    universe().prop_flat_map(|all| {
        let len = all.len();
        let missing = proptest::collection::vec(any::<bool>(), len);
        missing.prop_flat_map(move |missing| {
            let kept: Vec<_> =
                all.iter().zip(&missing).filter(|(_, missing)| !**missing).map(|(entry, _)| entry.clone()).collect();
            let mut repeated = kept.clone();
            repeated.extend(kept.iter().step_by(2).cloned());
            (Just(kept).prop_shuffle(), Just(repeated).prop_shuffle())
        })
    })
}

fn merged(cfg: &LedgerConfig, entries: &[Verified<Entry>]) -> (State, Delta) {
    let (mut state, mut delta) = (State::new(cfg.clone(), network()), Delta::default());
    for entry in entries {
        let _ = state.merge(Admitted::new(entry.clone()), &mut delta);
    }
    (state, delta)
}

/// Everything that can be seen of a state, and what it would do next.
fn view(state: &State) -> impl PartialEq + std::fmt::Debug {
    (
        state.items().digest(),
        state.entries().map(Verified::hash).collect::<Vec<_>>(),
        state
            .authors()
            .iter()
            .map(|(id, author)| {
                let (floors, policies) = (author.floor, author.policies.clone());
                let past = author.past.keys().copied().collect::<Vec<_>>();
                (*id, author.capability.clone(), floors, policies, author.accusations.clone(), past)
            })
            .collect::<Vec<_>>(),
        state.convictions().keys().copied().collect::<Vec<_>>(),
        (state.len(), state.bytes(), state.past_bytes(), state.next_expiry()),
        (state.capability_count(), state.policy_and_accusation_count()),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 48 } else { 512 }))]

    #[test]
    fn order_and_repetition_do_not_matter_at_any_time((first, second) in deliveries()) {
        let cfg = LedgerConfig::default();
        let ((mut a, _), (mut b, _)) = (merged(&cfg, &first), merged(&cfg, &second));
        prop_assert_eq!(view(&a), view(&b));
        for hours in 0..7 {
            a.expire(wall(START + hours * HOUR), &mut Delta::default());
            b.expire(wall(START + hours * HOUR), &mut Delta::default());
            prop_assert_eq!(view(&a), view(&b), "after {} hours", hours);
        }
        // Whatever was remembered of entries that are gone must be gone too.
        a.expire(wall(START + 8 * HOUR), &mut Delta::default());
        prop_assert_eq!(a.authors().len(), 0);
        prop_assert_eq!((a.len(), a.bytes(), a.past_bytes(), a.next_expiry()), (0, 0, 0, None));
        prop_assert_eq!((a.capability_count(), a.policy_and_accusation_count()), (0, (0, 0)));
    }

    #[test]
    fn two_states_that_exchange_their_sets_become_one((first, second) in deliveries(), cut in 0usize..20) {
        let cfg = LedgerConfig::default();
        let (first, second) = (&first[..cut.min(first.len())], &second[cut.min(second.len())..]);
        let ((mut a, _), (mut b, _)) = (merged(&cfg, first), merged(&cfg, second));
        // A contradiction may show only when the sets meet; its proof then travels in the second exchange.
        for _ in 0..3 {
            for (from, to) in [(true, false), (false, true)] {
                let (from, to) = if from && !to { (&a, &mut b) } else { (&b, &mut a) };
                let mut delta = Delta::default();
                for (id, proof) in from.convictions() {
                    to.convict(*id, proof.clone(), &mut delta);
                }
                for entry in from.entries() {
                    let _ = to.merge(Admitted::new(entry.clone()), &mut delta);
                }
            }
        }
        prop_assert_eq!(a.items().digest(), b.items().digest());
        prop_assert_eq!(
            a.entries().map(Verified::hash).collect::<Vec<_>>(),
            b.entries().map(Verified::hash).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_restart_at_any_point_changes_nothing((first, _) in deliveries(), at in 0usize..20, hours in 0u64..6) {
        // One ledger runs through, the other is restored from what it wrote, half way.
        let mut net = Net::new(&[100, 101]);
        let at = at.min(first.len());
        for (n, entry) in first.iter().enumerate() {
            if n == at {
                net.pass(Duration::from_secs(hours * 3_600));
                net.call(0, |ledger, cx, out| ledger.expire(cx, out));
                net.call(1, |ledger, cx, out| ledger.expire(cx, out));
                net.crash(1, LedgerConfig::default());
            }
            net.gossip_entry(0, entry);
            net.gossip_entry(1, entry);
        }
        prop_assert_eq!(snapshot(net.ledger(0)), snapshot(net.ledger(1)));
        for _ in 0..8 {
            net.pass(Duration::from_secs(3_600));
            net.call(0, |ledger, cx, out| ledger.expire(cx, out));
            net.call(1, |ledger, cx, out| ledger.expire(cx, out));
            prop_assert_eq!(snapshot(net.ledger(0)), snapshot(net.ledger(1)));
        }
        // Nothing of what expired stays on the disk.
        prop_assert!(net.nodes[1].disk.entries.is_empty(), "{:?}", net.nodes[1].disk.entries.keys());
        prop_assert!(net.nodes[0].disk.marks.is_empty() && net.nodes[1].disk.marks.is_empty());
    }
}

#[test]
fn of_an_authors_receipts_the_newest_stay_in_any_order() {
    let cfg = LedgerConfig { max_entries_per_author: 5, ..LedgerConfig::default() };
    let chain = chain(1, 20);
    let mut backwards = chain.clone();
    backwards.reverse();
    let mut mixed = chain.clone();
    mixed.rotate_left(11);
    for order in [&chain, &backwards, &mixed] {
        let (state, _) = merged(&cfg, order);
        assert_eq!(state.entries().map(|entry| entry.seq).collect::<Vec<_>>(), [16, 17, 18, 19, 20]);
    }
}

#[test]
fn at_the_bound_the_set_grows_no_more_but_capabilities_are_still_replaced() {
    let cfg = LedgerConfig { max_entries: 3, ..LedgerConfig::default() };
    let first = entry(2, 1, Hash::ZERO, START + HOUR, capability("old", 0));
    let (mut state, mut delta) = merged(&cfg, &[&chain(1, 2)[..], std::slice::from_ref(&first)].concat());
    let refused = state.merge(Admitted::new(chain(3, 1).remove(0)), &mut delta);
    assert_eq!(refused, Err(Refusal::Full));
    let second = entry(2, 2, first.hash(), START + HOUR, capability("new", 0));
    assert_eq!(state.merge(Admitted::new(second), &mut delta), Ok(()));
    assert_eq!(state.len(), 3);
}

#[test]
fn superseded_entries_are_kept_whole_then_as_a_trace_then_not_at_all() {
    let cfg = LedgerConfig { max_superseded_per_author: 2, max_traces_per_author: 3, ..LedgerConfig::default() };
    let (mut state, mut delta) = merged(&cfg, &[]);
    let mut prev = Hash::ZERO;
    for seq in 1..=10 {
        let next = entry(1, seq, prev, START + HOUR, capability(&format!("v{seq}"), 0));
        prev = next.hash();
        state.merge(Admitted::new(next), &mut delta).unwrap();
    }
    let past: Vec<_> =
        state.author(&id(1)).unwrap().past.iter().map(|(seq, past)| (*seq, past.wire.is_some())).collect();
    assert_eq!(past, [(5, false), (6, false), (7, false), (8, true), (9, true)]);
    assert_eq!(state.len(), 1);
    // Of 8 a second version is proven, of 6 it is refused without proof.
    let fork = |seq| entry(1, seq, Hash::derive("t", &[b"elsewhere"]), START + HOUR, Body::Retire);
    assert_eq!(state.merge(Admitted::new(fork(6)), &mut delta), Err(Refusal::ContradictsTrace(id(1))));
    assert_eq!(state.merge(Admitted::new(fork(8)), &mut delta), Err(Refusal::Equivocates(id(1))));
    assert_eq!(state.len(), 0);
    assert_eq!(state.proof(&id(1)).unwrap().verify(&network()), Ok(id(1)));
}

#[test]
fn the_table_of_frauds_is_bounded_and_nodes_agree_on_who_is_in_it() {
    let cfg = LedgerConfig { max_quarantined: 3, ..LedgerConfig::default() };
    let pair = |author| [Body::Retire, capability("x", 0)].map(|body| entry(author, 1, Hash::ZERO, START + HOUR, body));
    let all: Vec<_> = (1..8).flat_map(pair).collect();
    let mut backwards = all.clone();
    backwards.reverse();
    let ((a, _), (b, _)) = (merged(&cfg, &all), merged(&cfg, &backwards));
    assert_eq!(a.convictions().len(), 3);
    assert_eq!(a.convictions().keys().collect::<Vec<_>>(), b.convictions().keys().collect::<Vec<_>>());
}

/// Entries of author 1 in one chain, each living an hour.
fn chain_of(bodies: Vec<Body>) -> Vec<Verified<Entry>> {
    let mut chain: Vec<Verified<Entry>> = Vec::new();
    for (body, seq) in bodies.into_iter().zip(1..) {
        let prev = chain.last().map_or(Hash::ZERO, Verified::hash);
        chain.push(entry(1, seq, prev, START + HOUR, body));
    }
    chain
}

fn names(state: &State) -> Vec<String> {
    let author = state.author(&id(1));
    let notices = author.iter().flat_map(|author| author.standing_policies());
    notices.map(|entry| format!("{}", entry.seq)).collect()
}

#[test]
fn of_an_authors_policies_the_latest_of_eight_names_stand_in_any_order() {
    // Ten names twice, the first one said anew at the end.
    let mut bodies: Vec<Body> =
        (0..2).flat_map(|round| (0..10).map(move |name| policy(&format!("p{name}"), round))).collect();
    bodies.push(policy("p0", 2));
    let forwards = chain_of(bodies);
    let mut backwards = forwards.clone();
    backwards.reverse();
    let mut mixed = forwards.clone();
    mixed.rotate_left(7);
    let views = [&forwards, &backwards, &mixed].map(|order| {
        let (state, _) = merged(&LedgerConfig::default(), order);
        assert_eq!(names(&state), ["21", "14", "15", "16", "17", "18", "19", "20"], "p0 and p3 to p9");
        format!("{:?}", view(&state))
    });
    assert!(views[0] == views[1] && views[1] == views[2]);
}

#[test]
fn a_policy_is_told_when_it_changes_and_when_it_goes_and_leaving_does_not_take_it_back() {
    let chain = chain_of(vec![policy("a", 1), policy("a", 2), Body::Retire, policy("b", 1)]);
    let (mut state, mut delta) = merged(&LedgerConfig::default(), &chain);
    let told = |delta: &Delta| -> Vec<(String, Option<u64>)> {
        let told = delta.events.iter().filter_map(|event| match event {
            LedgerEvent::Policy { policy, stands } => Some((policy.name.to_string(), stands.as_ref().map(|e| e.seq))),
            _ => None,
        });
        told.collect()
    };
    assert_eq!(told(&delta), [("a".into(), Some(1)), ("a".into(), Some(2)), ("b".into(), Some(4))]);
    assert_eq!(names(&state), ["2", "4"]);
    delta.events.clear();
    state.expire(wall(START + HOUR), &mut delta);
    assert_eq!(told(&delta), [("a".into(), None), ("b".into(), None)]);
    assert_eq!(names(&state), [""; 0]);
    // Neither does what was replaced come back.
    let (mut state, mut delta) = merged(&LedgerConfig::default(), &chain[1..]);
    assert_eq!(state.merge(Admitted::new(chain[0].clone()), &mut delta), Err(Refusal::Superseded));
    let fork = entry(1, 1, Hash::ZERO, START + HOUR, policy("a", 7));
    assert_eq!(state.merge(Admitted::new(fork), &mut delta), Err(Refusal::Equivocates(id(1))));
    assert_eq!(state.policy_and_accusation_count(), (0, 0));
}

#[test]
fn accusations_have_a_bound_of_their_own_and_push_out_no_receipt() {
    let cfg = LedgerConfig { max_accusations_per_author: 3, max_entries_per_author: 2, ..LedgerConfig::default() };
    let mut bodies: Vec<Body> = (0..2).map(|n| receipt(1, 2, n)).collect();
    bodies.extend((0..6).map(|n| accusation(1, 9, n)));
    let forwards = chain_of(bodies);
    let mut backwards = forwards.clone();
    backwards.reverse();
    for order in [&forwards, &backwards] {
        let (state, _) = merged(&cfg, order);
        assert_eq!(state.entries().map(|entry| entry.seq).collect::<Vec<_>>(), [1, 2, 6, 7, 8]);
        assert_eq!(state.policy_and_accusation_count(), (0, 3));
    }
}
