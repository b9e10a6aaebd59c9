//! What a person gets wrong: each mistake ends in an exit code and a sentence that says what to do.

use std::fs;

use chorus_tests::{NodeOptions, Swarm, binary, models_dir, wait_for};

fn run(args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new(binary()).args(args).output().expect("the binary runs");
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

pub(crate) fn in_dir(dir: &tempfile::TempDir, args: &[&str]) -> (i32, String) {
    let data = dir.path().display().to_string();
    let mut all = vec!["--data-dir", &data, "--no-mdns", "--api", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0"];
    all.extend(args);
    run(&all)
}

#[test]
fn an_unknown_key_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("chorus.toml"), "[net]\nlisten_to = []\n").unwrap();
    let (code, text) = in_dir(&dir, &["config", "show"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("listen_to") && text.contains("config show"), "{text}");
}

#[test]
fn a_wrong_model_path_ends_the_start_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let (code, text) = in_dir(&dir, &["--model", "/no/such/model.gguf", "node", "run"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("/no/such/model.gguf") && text.contains("scripts/models"), "{text}");
}

#[test]
fn a_corrupt_model_file_is_refused_and_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let good = models_dir().join("SmolLM2-135M-Instruct.Q8_0.gguf");
    let mut bytes = fs::read(&good).unwrap_or_else(|error| panic!("{}: {error}; run scripts/models", good.display()));
    bytes.truncate(bytes.len() / 3);
    let bad = dir.path().join("cut.gguf");
    fs::write(&bad, bytes).unwrap();
    let (code, text) = in_dir(&dir, &["--model", &bad.display().to_string(), "node", "run"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("damaged") && !text.contains("panicked"), "{text}");
}

#[test]
fn a_port_in_use_names_the_flag() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().display().to_string();
    let api = format!("127.0.0.1:{port}");
    let listen = "/ip4/127.0.0.1/tcp/0";
    let (code, text) =
        run(&["--data-dir", &data, "--no-mdns", "--model", "none", "--listen", listen, "--api", &api, "node", "run"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("--api") || text.contains("--instance"), "{text}");
    let listen = format!("/ip4/127.0.0.1/tcp/{port}");
    let (code, text) = run(&[
        "--data-dir",
        &data,
        "--no-mdns",
        "--model",
        "none",
        "--api",
        "127.0.0.1:0",
        "--listen",
        &listen,
        "node",
        "run",
    ]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("--listen") && text.contains("--instance"), "{text}");
}

#[test]
fn two_processes_cannot_share_a_directory() {
    let mut swarm = Swarm::new("it-shared-dir");
    swarm.start(&NodeOptions::asker());
    let output = swarm.nodes[0].cli(&["node", "run"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("another") || text.contains("lock"), "{text}");
}

#[test]
fn two_nodes_with_one_key_are_noticed() {
    let mut swarm = Swarm::new("it-one-key");
    swarm.start(&NodeOptions::asker());
    swarm.start(&NodeOptions::asker());
    let key = String::from_utf8(swarm.nodes[1].cli(&["key", "export"]).stdout).unwrap();
    // A third node is started with the second one's key.
    let twin_dir = tempfile::tempdir().unwrap();
    fs::write(twin_dir.path().join("node.key"), key).unwrap();
    let twin = swarm.start(&NodeOptions { data_dir: Some(twin_dir.path().to_owned()), ..NodeOptions::asker() });
    wait_for("somebody to notice", || {
        let noticed = [0, 1, twin].iter().any(|&node| {
            let status = swarm.nodes[node].status();
            swarm.nodes[node].log().contains("a key of its own") || status["ledger"]["quarantined"].as_u64() > Some(0)
        });
        noticed.then_some(())
    });
}

#[test]
fn a_command_without_a_node_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().display().to_string();
    let (code, text) = run(&["--data-dir", &data, "--api", "127.0.0.1:1", "status"]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("chorus node run"), "{text}");
}

#[test]
fn a_stopped_nodes_ledger_can_be_listed_verified_and_exported() {
    let mut swarm = Swarm::of("it-offline", 2);
    swarm.nodes[1].kill();
    let verified = swarm.nodes[1].cli(&["ledger", "verify"]);
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(verified.status.success() && text.contains("2 capabilities"), "{text}");
    let listed = swarm.nodes[1].cli(&["ledger", "ls"]);
    assert_eq!(String::from_utf8_lossy(&listed.stdout).lines().filter(|line| line.contains("capability")).count(), 2);
    let exported = swarm.nodes[1].cli(&["ledger", "export"]);
    assert!(String::from_utf8_lossy(&exported.stdout).lines().count() >= 2);
}
