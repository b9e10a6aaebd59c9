//! A policy that is trained by one process and sampled by others: it learns, and it outlives whoever is killed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chorus_tests::{Node, NodeOptions, Swarm, wait_for};
use serde_json::{Value, json};

use crate::input::in_dir;

/// The tiny policy that lies in the tree.
fn ready() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/trainer/policies/arithmetic-2")
}

/// Small updates, so that a test sees many of them.
pub(crate) fn trainer(more: &str) -> NodeOptions {
    let config = format!(
        "[engine]\nthreads = 1\n[trainer]\npolicy = \"lesson\"\nfrom = \"{}\"\nbatch = 4\nmembers = 4\nevaluate_every = 1000\n{more}",
        ready().display()
    );
    NodeOptions { config, ..NodeOptions::asker() }
}

pub(crate) fn sampler(trainer: &Node) -> NodeOptions {
    // One thread, since other tests want the processor too.
    let config = "[engine]\nthreads = 1\n".to_owned();
    NodeOptions { config, args: vec!["--sample".into(), format!("lesson@{}", trainer.id())], ..NodeOptions::asker() }
}

fn training(node: &Node) -> Option<Value> {
    let (status, room) = node.get("/v1/training");
    (status == 200).then_some(room)
}

fn step(node: &Node) -> u64 {
    training(node).and_then(|room| room["step"].as_u64()).unwrap_or_default()
}

fn wait_step(node: &Node, least: u64) {
    wait_for(&format!("step {least}; the trainer said {:?}", training(node)), || (step(node) >= least).then_some(()));
}

fn serving(node: &Node) -> u64 {
    training(node).and_then(|room| room["serving"]["step"].as_u64()).unwrap_or_default()
}

#[test]
fn samplers_follow_the_trainer_and_every_update_uses_what_they_sampled() {
    let mut swarm = Swarm::new("it-training");
    let teacher = swarm.start(&trainer("staleness = 2"));
    let room =
        wait_for("the first version", || training(&swarm.nodes[teacher]).filter(|room| room["published"].is_object()));
    assert!(room["learner"]["waits_for"].as_str().unwrap().contains("a sampler"), "{room}");
    let options = sampler(&swarm.nodes[teacher]);
    let pupils = [swarm.start(&options), swarm.start(&options)];
    wait_step(&swarm.nodes[teacher], 6);
    for pupil in pupils {
        wait_for("a sampler that follows", || (serving(&swarm.nodes[pupil]) >= 4).then_some(()));
        let room = training(&swarm.nodes[pupil]).unwrap();
        assert!(room["counted"].as_u64().unwrap() > 0, "each of them is of use: {room}");
        assert_eq!(room["refused"], 0, "nobody samples in vain: {room}");
    }
    let room = training(&swarm.nodes[teacher]).unwrap();
    assert_eq!(room["used"].as_u64().unwrap() % 16, 0, "updates of 4 groups of 4: {room}");
    assert!(room["lags"].as_array().unwrap()[3..].iter().all(|lag| *lag == json!(0)), "none beyond S = 2: {room}");
    assert_eq!(
        (&room["audit"]["struck"], room["audit"]["recomputed"].as_u64().unwrap() > 0),
        (&json!(0), true),
        "{room}"
    );
    let ways: Vec<&str> =
        room["connected"].as_array().unwrap().iter().filter_map(|node| node["way"].as_str()).collect();
    assert_eq!(ways, ["Quic", "Quic"], "{room}");
    let curve = swarm.nodes[teacher].get_text("/v1/training/curve?form=csv");
    assert!(curve.lines().count() >= 7, "{curve}");
    let verified = swarm.nodes[pupils[0]].command(&["policy", "verify"]).output().unwrap();
    let verified = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(verified.contains("whole"), "{verified}");
}

#[test]
fn a_node_that_samples_for_anybody_is_hired_by_the_beacon_accounts_for_each_term_and_is_free_again() {
    let mut swarm = Swarm::new("it-hired");
    let teacher = swarm.start(&trainer("staleness = 2\nterm_s = 2\nsteps = 600"));
    let anybody = NodeOptions {
        config: "[engine]\nthreads = 1\n[sampler]\npolicy = \"any\"\nprice = 1.5\n".into(),
        ..NodeOptions::asker()
    };
    let pupil = swarm.start(&anybody);
    let room = wait_for("a sampler that is hired", || {
        training(&swarm.nodes[pupil]).filter(|room| room["hired_for_s"].is_number())
    });
    assert!(room["policy"].as_str().unwrap().starts_with("lesson@"), "it learned the policy from its lease: {room}");
    let hiring = wait_for("a trainer that knows whom it pays", || {
        training(&swarm.nodes[teacher])
            .map(|room| room["hiring"].clone())
            .filter(|hiring| hiring["price_per_hour"] == json!(1.5))
    });
    assert_eq!(hiring["offers"].as_array().map(Vec::len), Some(1), "{hiring}");
    wait_for("receipts of two terms", || {
        let (_, page) = swarm.nodes[teacher].get("/v1/ledger?kind=receipt");
        let receipts = page["entries"].as_array()?.clone();
        let good = |entry: &&Value| {
            let receipt = &entry["body"]["receipt"];
            receipt["kind"] == "sample" && receipt["verdict"] == "accepted" && receipt["tokens"].as_u64() > Some(0)
        };
        (receipts.iter().filter(good).count() >= 2).then_some(())
    });
    wait_for("the run's end", || {
        training(&swarm.nodes[teacher])
            .filter(|room| room["state"].as_str().is_some_and(|state| state.starts_with("done")))
    });
    wait_for("a sampler that is free again", || training(&swarm.nodes[pupil]).filter(|room| room["name"] == "any"));
    let policies = std::fs::read_dir(swarm.nodes[pupil].dir().join("policies")).unwrap().count();
    assert_eq!(policies, 0, "what it fetched for somebody else is gone");
}

/// Learns nothing, once a second, until the trainer is gone: so a run has a need that does not depend on this machine's speed.
fn learn_slowly(api: String) -> std::thread::JoinHandle<reqwest::Result<()>> {
    std::thread::spawn(move || {
        let http = reqwest::blocking::Client::builder().no_proxy().build()?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let batch = http.get(format!("{api}/v1/training/batch?wait_s=20")).send()?.bytes()?;
            let weights = http.get(format!("{api}/v1/training/weights")).send()?;
            let step = weights.headers().get("x-chorus-step").and_then(|step| step.to_str().ok()).map(str::to_owned);
            if let (Some(step), false) = (step, batch.is_empty()) {
                let url = format!("{api}/v1/training/weights?step={step}&gradient=0&importance=0");
                let bytes = weights.bytes()?;
                http.post(url)
                    .header("content-type", "application/octet-stream")
                    .body(bytes)
                    .send()?
                    .error_for_status()?;
            }
        }
    })
}

#[test]
fn a_dear_sampler_is_let_go_while_a_cheap_one_is_enough_and_hired_when_that_one_is_gone() {
    let mut swarm = Swarm::new("it-price");
    let teacher = swarm.start(&trainer("staleness = 2\nterm_s = 2\nexternal = true"));
    let asks = |price: f64| NodeOptions {
        config: format!("[engine]\nthreads = 1\n[sampler]\npolicy = \"any\"\nprice = {price:?}\n"),
        ..NodeOptions::asker()
    };
    let cheap = swarm.start(&asks(1.0));
    swarm.start(&asks(50.0));
    let wants = |swarm: &Swarm, prices: &[f64]| {
        wait_for(&format!("a run that wants those who ask {prices:?} an hour"), || {
            let room = training(&swarm.nodes[teacher])?;
            let offers = room["hiring"]["offers"].as_array()?;
            let wanted = offers.iter().filter(|offer| offer["wanted"] == true);
            let mut wanted: Vec<f64> = wanted.filter_map(|offer| offer["price_per_hour"].as_f64()).collect();
            wanted.sort_by(f64::total_cmp);
            (wanted == prices && room["hiring"]["price_per_hour"] == json!(prices.iter().sum::<f64>())).then_some(())
        });
    };
    // Nobody knows yet what is needed.
    wants(&swarm, &[1.0, 50.0]);
    let learner = learn_slowly(swarm.nodes[teacher].api().to_owned());
    wants(&swarm, &[1.0]);
    // A busy machine may keep the cheap one from answering in time; then the dear one steps in, and it is waited for again.
    let mut then = step(&swarm.nodes[teacher]);
    wait_for("two steps at the lower price", || {
        let room = training(&swarm.nodes[teacher])?;
        let now = room["step"].as_u64()?;
        if room["hiring"]["price_per_hour"].as_f64()? >= 50.0 {
            then = now;
        }
        (now >= then + 2).then_some(())
    });
    swarm.nodes[cheap].kill();
    wants(&swarm, &[50.0]);
    let then = step(&swarm.nodes[teacher]);
    wait_step(&swarm.nodes[teacher], then + 2);
    swarm.nodes[teacher].kill();
    assert!(learner.join().unwrap().is_err(), "it ends with its trainer");
}

#[test]
fn a_node_that_joins_learns_of_the_policy_from_its_ledger_alone() {
    let mut swarm = Swarm::new("it-policy-known");
    let teacher = swarm.start(&trainer("staleness = 2\nsteps = 1"));
    let policy = |node: &Node| {
        let (_, page) = node.get("/v1/ledger?kind=policy");
        let entry = page["entries"].as_array()?.last()?.clone();
        Some((entry["author"].clone(), entry["body"]["policy"].clone()))
    };
    let plain = swarm.start(&NodeOptions::asker());
    let (owner, known) = wait_for("the policy", || policy(&swarm.nodes[plain]));
    assert_eq!((owner, &known["name"]), (json!(swarm.nodes[teacher].id()), &json!("lesson")));
    assert_eq!((&known["step"], &known["running"]), (&json!(0), &json!(true)));
    assert_eq!(known["environments"], json!(["arithmetic-2"]));
    let named = format!("lesson@{}", swarm.nodes[teacher].id());
    let listed = swarm.nodes[plain].command(&["policy", "ls"]).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains(&named) && listed.contains("arithmetic-2"), "{listed}");
    // What it reads there is all that it takes to sample; the end is told too.
    let args = vec!["--sample".into(), named];
    let pupil = swarm.start(&NodeOptions { config: "[engine]\nthreads = 1\n".into(), args, ..NodeOptions::asker() });
    wait_for("the end of the run", || {
        let (_, known) = policy(&swarm.nodes[plain])?;
        (known["step"] == json!(1) && known["running"] == json!(false)).then_some(())
    });
    wait_for("a sampler that waits for nothing any more", || {
        let waits_for = training(&swarm.nodes[pupil])?["waits_for"].as_str()?.to_owned();
        waits_for.contains("run has ended").then_some(())
    });
    // The trainer need not be there for it to be known.
    swarm.nodes[teacher].kill();
    let late = swarm.start(&NodeOptions::asker());
    let (_, known) = wait_for("the policy on a node that came late", || policy(&swarm.nodes[late]));
    assert_eq!(known["step"], json!(1));
}

#[test]
fn in_the_sequential_mode_every_update_uses_its_own_weights() {
    let mut swarm = Swarm::new("it-sequential");
    let teacher = swarm.start(&trainer("sequential = true"));
    let options = sampler(&swarm.nodes[teacher]);
    swarm.start(&options);
    wait_step(&swarm.nodes[teacher], 3);
    let room = training(&swarm.nodes[teacher]).unwrap();
    let lags = room["lags"].as_array().unwrap();
    assert!(lags[0].as_u64().unwrap() >= 48 && lags[1..].iter().all(|lag| *lag == json!(0)), "{room}");
}

#[test]
fn a_killed_sampler_is_replaced_and_takes_part_again_when_it_is_back() {
    let mut swarm = Swarm::new("it-sampler-killed");
    let teacher = swarm.start(&trainer("staleness = 2"));
    let options = sampler(&swarm.nodes[teacher]);
    let pupils = [swarm.start(&options), swarm.start(&options)];
    wait_step(&swarm.nodes[teacher], 3);
    swarm.nodes[pupils[0]].kill();
    let then = step(&swarm.nodes[teacher]);
    wait_step(&swarm.nodes[teacher], then + 3);
    swarm.restart(pupils[0]);
    wait_for("rollouts of the one that is back", || {
        (training(&swarm.nodes[pupils[0]])?["counted"].as_u64()? > 0).then_some(())
    });
}

#[test]
fn a_killed_trainer_goes_on_where_its_checkpoint_is() {
    let mut swarm = Swarm::new("it-trainer-killed");
    let teacher = swarm.start(&trainer("staleness = 2"));
    let options = sampler(&swarm.nodes[teacher]);
    let pupil = swarm.start(&options);
    wait_step(&swarm.nodes[teacher], 4);
    swarm.nodes[teacher].kill();
    wait_for("a sampler that says what it waits for", || {
        let room = training(&swarm.nodes[pupil])?;
        room["connected"].as_array()?.is_empty().then_some(())
    });
    swarm.restart(teacher);
    let again = wait_for("the run that goes on", || {
        training(&swarm.nodes[teacher]).filter(|room| room["published"].is_object())
    });
    assert!(again["step"].as_u64().unwrap() >= 3, "at most the update under way is done again: {again}");
    let then = step(&swarm.nodes[teacher]);
    wait_step(&swarm.nodes[teacher], then + 3);
    wait_for("a sampler that follows", || (serving(&swarm.nodes[pupil]) > then).then_some(()));
    let steps: Vec<u64> = swarm.nodes[teacher]
        .get_text("/v1/training/curve?form=csv")
        .lines()
        .skip(1)
        .filter_map(|line| line.split(',').next()?.parse().ok())
        .collect();
    assert!(steps.windows(2).all(|pair| pair[0] + 1 == pair[1]), "one curve, every step once: {steps:?}");
}

#[test]
fn a_damaged_version_is_not_served_and_is_fetched_again() {
    let mut swarm = Swarm::new("it-damaged");
    let teacher = swarm.start(&trainer("staleness = 2\nsteps = 2"));
    let options = sampler(&swarm.nodes[teacher]);
    let pupil = swarm.start(&options);
    wait_for("the last version", || (serving(&swarm.nodes[pupil]) == 2).then_some(()));
    swarm.nodes[pupil].kill();
    let policies = swarm.nodes[pupil].dir().join("policies");
    let library = std::fs::read_dir(&policies).unwrap().next().unwrap().unwrap().path();
    for entry in std::fs::read_dir(&library).unwrap().map(|entry| entry.unwrap().path()) {
        let weights = entry.join("model.safetensors");
        if let Ok(mut bytes) = std::fs::read(&weights) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
            std::fs::write(&weights, bytes).unwrap();
        }
    }
    let told = swarm.nodes[pupil].command(&["policy", "verify"]).output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&told.stdout).contains("damaged"), "{told:?}");
    swarm.restart(pupil);
    wait_for("the version to serve again", || (serving(&swarm.nodes[pupil]) == 2).then_some(()));
    let told = swarm.nodes[pupil].command(&["policy", "verify"]).output().unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("whole"), "{told:?}");
}

#[test]
fn a_full_disk_stops_a_sampler_or_a_trainer_and_nothing_that_was_acknowledged_is_lost() {
    let mut swarm = Swarm::new("it-training-full");
    let limited = |options: NodeOptions| NodeOptions { limited: true, ..options };
    let teacher = swarm.start(&limited(trainer("staleness = 2")));
    let options = limited(sampler(&swarm.nodes[teacher]));
    let pupil = swarm.start(&options);
    wait_step(&swarm.nodes[teacher], 2);
    for (full, says) in [(pupil, "/waits_for"), (teacher, "/learner/waits_for")] {
        if !swarm.nodes[full].limit_files(Some(0)) {
            return;
        }
        wait_for("a status that names the disk", || {
            let room = training(&swarm.nodes[full])?;
            room.pointer(says)?.as_str()?.contains("disk").then_some(())
        });
        assert!(swarm.nodes[full].limit_files(None));
        let then = step(&swarm.nodes[teacher]);
        wait_step(&swarm.nodes[teacher], then + 3);
    }
    let room = training(&swarm.nodes[teacher]).unwrap();
    let lost = training(&swarm.nodes[pupil]).unwrap()["counted"].as_u64().unwrap();
    assert!(room["taken"].as_u64().unwrap() >= lost, "what a sampler was told that counts, counts: {room}");
}

#[test]
fn a_full_disk_that_takes_no_version_is_named_and_the_version_comes_when_there_is_room() {
    let mut swarm = Swarm::new("it-version-full");
    let teacher = swarm.start(&trainer("staleness = 2\nsteps = 3"));
    let keeper =
        NodeOptions { config: "[sampler]\nslots = 0\n".into(), limited: true, ..sampler(&swarm.nodes[teacher]) };
    let keeper = swarm.start(&keeper);
    wait_for("the first version", || training(&swarm.nodes[keeper])?["whole"]["step"].as_u64());
    if !swarm.nodes[keeper].limit_files(Some(0)) {
        return;
    }
    let options = sampler(&swarm.nodes[teacher]);
    swarm.start(&options);
    wait_for("a status that names the disk", || {
        training(&swarm.nodes[keeper])?["waits_for"].as_str()?.contains("disk").then_some(())
    });
    let last = wait_for("the last version", || {
        let room = training(&swarm.nodes[teacher])?;
        (room["published"]["step"] == 3).then(|| room["published"]["version"].clone())
    });
    // It cannot even be begun here, and no other comes after it.
    let versions = |place: &str| training(&swarm.nodes[keeper]).map(|room| room[place]["version"].clone());
    wait_for("word of the last version", || (versions("arriving")? == last).then_some(()));
    assert!(swarm.nodes[keeper].limit_files(None));
    wait_for("all of the last version", || (versions("whole")? == last).then_some(()));
}

#[test]
fn a_version_arrives_though_the_node_it_comes_from_is_killed() {
    let mut swarm = Swarm::new("it-provider-killed");
    let teacher = swarm.start(&trainer("staleness = 2\nsteps = 1"));
    let mirror = NodeOptions { config: "[sampler]\nslots = 0\n".into(), ..sampler(&swarm.nodes[teacher]) };
    let first = swarm.start(&mirror);
    let whole = |node: &Node| training(node)?["whole"]["version"].as_str().map(str::to_owned);
    let version = wait_for("a first copy", || whole(&swarm.nodes[first]));
    // The owner is there and says nothing: who comes now has only the first copy to fetch from.
    swarm.nodes[teacher].signal("STOP");
    let second = swarm.start(&mirror);
    swarm.nodes[first].kill();
    let room = wait_for("a sampler that lacks somebody", || training(&swarm.nodes[second]));
    swarm.nodes[teacher].signal("CONT");
    assert_eq!(wait_for("the version", || whole(&swarm.nodes[second])), version, "before: {room}");
}

#[test]
fn what_a_trainer_cannot_begin_with_is_said_at_once() {
    for (config, told) in [
        ("[trainer]\npolicy = \"p\"\nfrom = \"/nowhere\"\n", "no policy to begin with"),
        ("[trainer]\npolicy = \"p\"\nenvironments = [\"chess-1\"]\n", "no environment"),
        ("[trainer]\npolicy = \"p\"\n[sampler]\npolicy = \"q@did:key:z6Mk\"\n", "not both"),
        ("[sampler]\npolicy = \"nobody\"\n", "is no policy"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chorus.toml"), config).unwrap();
        let (code, said) = in_dir(&dir, &["--model", "none", "--bulk", "127.0.0.1:0", "node", "run"]);
        assert!(code == 2 && said.contains(told), "{code}: {said}");
    }
}
