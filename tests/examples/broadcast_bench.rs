//! How fast a version of 64 MiB reaches its workers, when its owner's uplink carries 100 Mbit/s: one worker, eight that pass chunks
//! on, and eight that do not. Whole processes in network namespaces, the uplink shaped by `tbf`; needs root.
//!
//! Run it with `scripts/bench broadcast`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::path::Path;
use std::time::{Duration, Instant};

use chorus_tests::netns::{Host, Lab, shape};
use chorus_tests::wait_for;
use chorus_trainer::policy::{Policy, PolicyConfig, save};
use serde_json::Value;

/// Layers and width of a policy of a little over 64 MiB.
const SHAPE: (usize, usize) = (4, 608);
/// The owner's uplink, in Mbit/s.
const UPLINK: u32 = 100;
const WORKERS: usize = 8;
/// How long a broadcast may take.
const LONG: Duration = Duration::from_secs(300);
/// How often each is measured.
const ROUNDS: usize = 3;

/// What one broadcast took, and what the owner sent, in copies of the version.
#[derive(Clone, Copy, Debug)]
struct Measured {
    seconds: f64,
    copies: f64,
}

fn main() {
    let from = tempfile::tempdir().unwrap();
    save(&Policy::random(PolicyConfig::tiny(SHAPE.0, SHAPE.1), 1).unwrap(), from.path()).unwrap();
    let bytes: u64 =
        std::fs::read_dir(from.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let line = bytes as f64 * 8.0 / (f64::from(UPLINK) * 1e6);
    println!(
        "a version of {:.1} MiB, an uplink of {UPLINK} Mbit/s: {line:.2} s if nothing else were sent",
        bytes as f64 / 1_048_576.0
    );
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let Some(one) = broadcast(from.path(), 1, true, bytes) else {
            println!("skipped: this needs root, for network namespaces");
            return;
        };
        let all = broadcast(from.path(), WORKERS, true, bytes).unwrap();
        println!(
            "round {round}: one worker {:.2} s; {WORKERS} workers {:.2} s = {:.2} of it, the owner sent {:.2} copies",
            one.seconds,
            all.seconds,
            all.seconds / one.seconds,
            all.copies
        );
        ratios.push((all.seconds / one.seconds, all.copies));
    }
    let star = broadcast(from.path(), WORKERS, false, bytes).unwrap();
    println!(
        "star: {WORKERS} workers that pass nothing on {:.2} s, the owner sent {:.2} copies",
        star.seconds, star.copies
    );
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (least, median, most) = (ratios[0].0, ratios[ROUNDS / 2].0, ratios[ROUNDS - 1].0);
    let copies = ratios.iter().map(|ratio| ratio.1).fold(0.0, f64::max);
    println!(
        "pipeline: {median:.2} ({least:.2} to {most:.2}) of one worker's time (target 1.3); at most {copies:.2} copies (target 1.5)"
    );
}

/// Starts the workers, lets them find each other, starts the owner, and waits until every worker has the version.
fn broadcast(from: &Path, workers: usize, share: bool, bytes: u64) -> Option<Measured> {
    let mut lab = Lab::new("broadcast")?;
    let switch = lab.switch("switch");
    let owner = lab.machine_on(&switch, "owner", "10.0.0.100/24");
    shape(&owner, "eth0", UPLINK);
    // An owner that shares nothing by dealing it round offers everything to everybody: a star.
    let config = format!("[trainer]\npolicy = \"large\"\nfrom = \"{}\"\n[sampler]\nshare = {share}\n", from.display());
    let id = lab.key(&owner);
    let mut pupils: Vec<Host> = Vec::new();
    for number in 0..workers {
        let machine = lab.machine_on(&switch, &format!("w{number}"), &format!("10.0.0.{}/24", number + 1));
        let config = format!("[sampler]\npolicy = \"large@{id}\"\nslots = 0\nshare = {share}\n");
        let door = pupils.first().map(Host::ticket);
        pupils.push(start(&lab, &machine, &config, door.as_deref()));
    }
    let neighbours = if share { (workers - 1).min(4) } else { 0 };
    for pupil in &pupils {
        wait_for("neighbours", || (connected(pupil)? >= neighbours).then_some(()));
    }
    let door = pupils[0].ticket();
    let trainer = start(&lab, &owner, &config, Some(&door));
    for pupil in &pupils {
        wait_long(pupil);
    }
    let published = trainer.wait_for("publication", |trainer| trainer.logged("published"));
    let last = pupils.iter().filter_map(|pupil| pupil.logged("a version is whole")).fold(0.0, f64::max);
    // What left through the plug, framing and gossip included.
    let copies = lab.sent(&owner, "eth0") as f64 / bytes as f64;
    std::thread::sleep(Duration::from_millis(200));
    Some(Measured { seconds: last - published, copies })
}

/// An owner that sends every copy itself takes longer than a test would wait.
fn wait_long(pupil: &Host) {
    let until = Instant::now() + LONG;
    while pupil.logged("a version is whole").is_none() {
        assert!(Instant::now() < until, "no version within {LONG:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn start(lab: &Lab, machine: &str, config: &str, door: Option<&str>) -> Host {
    let mut args = vec!["--no-mdns", "--listen", "/ip4/0.0.0.0/udp/7600/quic-v1", "--listen", "/ip4/0.0.0.0/tcp/7600"];
    args.extend(door.iter().flat_map(|door| ["--bootstrap", *door]));
    lab.node(machine, config, &args)
}

fn connected(host: &Host) -> Option<usize> {
    let status: Value = host.try_ask(&["status"])?;
    Some(status["training"]["connected"].as_array()?.len())
}
