//! Networks as they are out there: multicast, address translation, IPv6, names, cables that come loose. Each test has network
//! namespaces of its own, see [`Lab`]; without root the tests are skipped, and say so.

use std::time::Duration;

use chorus_tests::netns::{Host, Lab, must, wait_agreement};

const ANY4: [&str; 4] = ["--listen", "/ip4/0.0.0.0/udp/7600/quic-v1", "--listen", "/ip4/0.0.0.0/tcp/7600"];

/// Starts a node that finds others by the given peers alone.
fn node(lab: &Lab, machine: &str, peers: &[&str]) -> Host {
    let mut args = vec!["--no-mdns"];
    args.extend(ANY4);
    args.extend(peers.iter().flat_map(|peer| ["--bootstrap", *peer]));
    lab.node(machine, "", &args)
}

#[test]
fn two_nodes_on_one_link_find_each_other_by_multicast_alone() {
    let Some(mut lab) = Lab::new("mdns") else { return };
    let switch = lab.switch("switch");
    let [one, two] = ["one", "two"].map(|name| {
        let addr = if name == "one" { "10.0.0.1/24" } else { "10.0.0.2/24" };
        let machine = lab.machine_on(&switch, name, addr);
        must(&["-n", &machine, "route", "add", "default", "dev", "eth0"]);
        lab.node(&machine, "", &ANY4)
    });
    let peer = one.wait_peer(&two.id());
    assert_eq!(peer["relayed"], false, "{peer}");
    wait_agreement(&[&one, &two], 2);
}

/// A public node and two homes behind routers that let nothing in. `shunned`: the routers drop what comes from each other, too.
fn two_homes(test: &str, shunned: bool) -> Option<(Lab, [Host; 3])> {
    let mut lab = Lab::new(test)?;
    let internet = lab.switch("internet");
    let public = lab.machine_on(&internet, "public", "11.0.0.1/24");
    let (left, right) = (lab.home(&internet, "left", "11.0.0.2/24"), lab.home(&internet, "right", "11.0.0.3/24"));
    if shunned {
        lab.shun("left", "11.0.0.3");
        lab.shun("right", "11.0.0.2");
    }
    let public = node(&lab, &public, &[]);
    let ticket = public.ticket();
    let left = node(&lab, &left, &[&ticket]);
    // AutoNAT finds out that nobody gets in, and the node asks the public one to be its door: its ticket says so.
    let before = left.ticket();
    left.wait_for("door at the relay", |left| (left.ticket() != before).then_some(()));
    let right = node(&lab, &right, &[&ticket]);
    Some((lab, [public, left, right]))
}

#[test]
fn a_node_behind_a_router_gets_a_door_at_a_relay_by_itself_and_is_reached_through_it() {
    let Some((_lab, [public, left, right])) = two_homes("relay", true) else { return };
    let peer = right.wait_peer(&left.id());
    assert_eq!(peer["relayed"], true, "{peer}");
    wait_agreement(&[&public, &left, &right], 3);
    // Hole punching was tried and failed; the way through the relay stays. The other end's messages go this way too.
    std::thread::sleep(Duration::from_secs(8));
    let peer = left.wait_peer(&right.id());
    assert!(peer["relayed"] == true && peer["rtt_ms"].is_number(), "{peer}");
}

#[test]
fn two_homes_punch_a_direct_way_through_their_routers() {
    let Some((_lab, [public, left, right])) = two_homes("punch", false) else { return };
    right.wait_for("direct way", |right| (right.peer(&left.id())?["relayed"] == false).then_some(()));
    // The relayed connection, under way at first, was closed; what remains is between the routers' outer addresses.
    let direct = |at: &Host, other: &Host, outer: &str| {
        at.wait_for("only the direct way", |at| {
            at.peer(&other.id())?["address"].as_str()?.starts_with(outer).then_some(())
        });
    };
    direct(&right, &left, "/ip4/11.0.0.2/");
    direct(&left, &right, "/ip4/11.0.0.3/");
    wait_agreement(&[&public, &left, &right], 3);
}

#[test]
fn a_link_without_ipv4_is_enough_and_a_name_leads_as_well_as_a_number() {
    let Some(mut lab) = Lab::new("ipv6") else { return };
    let switch = lab.switch("switch");
    let [host, by_number, by_name] = [("host", "fd00::1/64"), ("number", "fd00::2/64"), ("name", "fd00::3/64")]
        .map(|(name, addr)| lab.machine_on(&switch, name, addr));
    let any6 = ["--no-mdns", "--listen", "/ip6/::/udp/7600/quic-v1", "--listen", "/ip6/::/tcp/7600"];
    let named = "[net]\nexternal = [\"/dns6/swarm.example/udp/7600/quic-v1\"]\n";
    let host = lab.node(&host, named, &[&ANY4[..], &any6].concat());
    lab.hosts(&by_name, "fd00::1 swarm.example\n");
    let by_name = lab.node(&by_name, "", &[&any6[..], &["--bootstrap", &host.offline_ticket()]].concat());
    let address = |guest: &Host, of: &str| guest.wait_peer(of)["address"].as_str().unwrap().to_owned();
    assert!(
        address(&by_name, &host.id()).starts_with("/dns6/swarm.example/udp/7600/"),
        "{:?}",
        by_name.peer(&host.id())
    );
    // A ticket that a node makes of where it listens: numbers.
    let by_number = lab.node(&by_number, "", &[&any6[..], &["--bootstrap", &by_name.ticket()]].concat());
    assert!(address(&by_number, &by_name.id()).starts_with("/ip6/fd00::3/"), "{:?}", by_number.peer(&by_name.id()));
    wait_agreement(&[&host, &by_number, &by_name], 3);
}

#[test]
fn a_machine_whose_address_changes_is_found_again() {
    let Some(mut lab) = Lab::new("move") else { return };
    let switch = lab.switch("switch");
    let [one, two, mover] = [("one", "10.0.0.1/24"), ("two", "10.0.0.2/24"), ("mover", "10.0.0.3/24")]
        .map(|(name, addr)| lab.machine_on(&switch, name, addr));
    let one = node(&lab, &one, &[]);
    let ticket = one.ticket();
    let two = node(&lab, &two, &[&ticket]);
    let moving = node(&lab, &mover, &[&ticket]);
    let id = moving.id();
    let _ = two.wait_peer(&id);
    must(&["-n", &mover, "addr", "del", "10.0.0.3/24", "dev", "eth0"]);
    must(&["-n", &mover, "addr", "add", "10.0.0.4/24", "dev", "eth0"]);
    for friend in [&one, &two] {
        friend.wait_for("the moved peer", |friend| {
            let peer = friend.peer(&id)?;
            peer["address"].as_str()?.starts_with("/ip4/10.0.0.4/").then_some(())
        });
    }
    wait_agreement(&[&one, &two, &moving], 3);
}

#[test]
fn a_loose_cable_parts_the_ledgers_and_mends_them_when_it_is_back() {
    let Some(mut lab) = Lab::new("cut") else { return };
    let switch = lab.switch("switch");
    let [one, two, late] = [("one", "10.0.0.1/24"), ("two", "10.0.0.2/24"), ("late", "10.0.0.4/24")]
        .map(|(name, addr)| lab.machine_on(&switch, name, addr));
    let far = lab.machine("far");
    let plug = lab.plug(&far, "eth0", "10.0.0.3/24", &switch);
    let one = node(&lab, &one, &[]);
    let ticket = one.ticket();
    let two = node(&lab, &two, &[&ticket]);
    let far = node(&lab, &far, &[&ticket]);
    wait_agreement(&[&one, &two, &far], 3);
    must(&["-n", &switch, "link", "set", &plug, "down"]);
    let late = node(&lab, &late, &[&ticket]);
    wait_agreement(&[&one, &two, &late], 4);
    one.wait_for("that the far one is gone", |one| one.peer(&far.id()).is_none().then_some(()));
    let cut_off = far.try_ask(&["status"]).unwrap();
    assert_eq!(cut_off["ledger"]["capabilities"], 3, "the far one could not hear of the fourth: {cut_off}");
    must(&["-n", &switch, "link", "set", &plug, "up"]);
    wait_agreement(&[&one, &two, &late, &far], 4);
}
