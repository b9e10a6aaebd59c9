//! What a node weighs: memory and time from start to joined.

use std::fs;
use std::time::{Duration, Instant};

use chorus_tests::{NodeOptions, Swarm, wait_for};
use serde_json::json;

const MAX_RESIDENT_MIB: u64 = 60;
const MAX_JOIN: Duration = Duration::from_secs(1);
/// Starts that are measured; the machine is noisy, so the median counts.
const STARTS: usize = 5;

fn resident_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap() / 1024
}

#[test]
fn a_node_without_a_model_is_small_and_joins_within_a_second() {
    let mut swarm = Swarm::new("it-weight");
    swarm.start(&NodeOptions::asker());
    let newcomer = swarm.start(&NodeOptions::asker());
    swarm.wait_agreement(2);
    let mut joins: Vec<Duration> = (0..STARTS)
        .map(|_| {
            swarm.nodes[newcomer].kill();
            let started = Instant::now();
            swarm.restart(newcomer);
            wait_for("a peer", || (swarm.nodes[newcomer].status()["peers"] == json!(1)).then_some(()));
            started.elapsed()
        })
        .collect();
    joins.sort();
    let resident = resident_mib(swarm.nodes[newcomer].pid());
    eprintln!("resident {resident} MiB; start to joined {:?} (median of {joins:?})", joins[STARTS / 2]);
    assert!(joins[STARTS / 2] < MAX_JOIN, "{joins:?}");
    assert!(resident < MAX_RESIDENT_MIB, "{resident} MiB");
}
