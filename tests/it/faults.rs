//! Crashes, partitions and other bad days.

use std::time::{Duration, Instant};

use chorus_tests::{NodeOptions, Swarm, wait_for};
use serde_json::{Value, json};

/// A long answer, so that there is a middle to crash in.
pub(crate) fn long_task() -> Value {
    let question = "Tell a very long story about a lighthouse keeper, year by year.";
    json!({"question": question, "strategy": "direct", "max_tokens": 300, "temperature": 1.0, "seed": 3, "deadline_s": 55})
}

/// The index of the node that runs a job now.
pub(crate) fn runner(swarm: &Swarm) -> usize {
    wait_for("an executor at work", || {
        swarm
            .nodes
            .iter()
            .position(|node| node.runs() && node.status()["executor"]["running"].as_u64().unwrap_or(0) > 0)
    })
}

#[test]
fn the_executor_is_killed_in_mid_answer_and_there_is_an_answer_all_the_same() {
    let mut swarm = Swarm::new("it-kill-executor");
    let asker = swarm.start(&NodeOptions::asker());
    for _ in 0..3 {
        swarm.start(&NodeOptions::real());
    }
    swarm.wait_agreement(4);
    let task = swarm.nodes[asker].submit(&long_task());
    let victim = runner(&swarm);
    let killed = Instant::now();
    swarm.nodes[victim].kill();
    let events = swarm.nodes[asker].events(&task);
    let last = events.last().unwrap();
    assert_eq!(last["event"], "finished", "{events:?}");
    assert!(events.iter().any(|event| event["event"] == "lost"), "the loss is told");
    let elected = events.iter().filter(|event| event["event"] == "elected").count();
    assert!(elected >= 2, "{elected} elections");
    let lost = events.iter().position(|event| event["event"] == "lost").unwrap();
    let again = events[lost..].iter().find(|event| event["event"] == "elected").expect("a second election");
    let gap = again["elapsed_ms"].as_f64().unwrap() - events[lost]["elapsed_ms"].as_f64().unwrap();
    assert!(gap < 1_000.0, "re-elected {gap} ms after the loss was noticed");
    eprintln!("answered {:?} after the kill; re-elected in {gap:.1} ms", killed.elapsed());
}

#[test]
fn the_requester_is_killed_and_the_executor_stops_its_work() {
    let mut swarm = Swarm::new("it-kill-requester");
    let asker = swarm.start(&NodeOptions::asker());
    swarm.start(&NodeOptions::real());
    swarm.wait_agreement(2);
    let mut body = long_task();
    body["max_tokens"] = json!(1_500);
    let _ = swarm.nodes[asker].submit(&body);
    let worker = runner(&swarm);
    swarm.nodes[asker].kill();
    let killed = Instant::now();
    wait_for("the executor to be free again", || {
        (swarm.nodes[worker].status()["executor"]["running"] == json!(0)).then_some(())
    });
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
}

#[test]
fn a_killed_node_comes_back_with_its_ledger_and_goes_on_with_its_chain() {
    let mut swarm = Swarm::of("it-restart", 3);
    let task = swarm.nodes[0].submit(&json!({"question": "Hello?", "strategy": "direct", "max_tokens": 8}));
    let _ = swarm.nodes[0].events(&task);
    let own = |swarm: &Swarm, id: &str| -> Vec<u64> {
        let (_, ledger) = swarm.nodes[0].get("/v1/ledger");
        let rows = ledger["entries"].as_array().cloned().unwrap_or_default();
        rows.iter().filter(|row| row["author"] == id).filter_map(|row| row["seq"].as_u64()).collect()
    };
    let id = swarm.nodes[0].id();
    let before = wait_for("the receipt on disk", || {
        let seqs = own(&swarm, &id);
        (seqs.len() >= 2).then_some(seqs)
    });
    swarm.nodes[0].kill();
    swarm.restart(0);
    swarm.wait_agreement(3);
    wait_for("a capability behind what was there", || {
        (own(&swarm, &id).iter().max() > before.iter().max()).then_some(())
    });
    assert_eq!(swarm.nodes[0].status()["ledger"]["quarantined"], json!(0), "no number was used twice");
}

#[test]
fn a_partition_heals_and_the_ledgers_agree_again() {
    let swarm = Swarm::of("it-partition", 4);
    let ids: Vec<String> = swarm.nodes.iter().map(chorus_tests::Node::id).collect();
    let set_blocked = |blocked: bool| {
        for (a, b) in [(0, 2), (0, 3), (1, 2), (1, 3)] {
            for (here, there) in [(a, b), (b, a)] {
                let (status, body) =
                    swarm.nodes[here].post(&format!("/v1/peers/{}", ids[there]), &json!({"blocked": blocked}));
                assert_eq!(status, 200, "{body}");
            }
        }
    };
    set_blocked(true);
    wait_for("two halves of two", || swarm.nodes.iter().all(|node| node.status()["peers"] == json!(1)).then_some(()));
    // Work in one half goes on, and leaves an entry that the other half cannot have.
    let task = swarm.nodes[0].submit(&json!({"question": "Hello?", "strategy": "direct", "max_tokens": 8}));
    let events = swarm.nodes[0].events(&task);
    assert_eq!(events.last().unwrap()["event"], "finished", "{events:?}");
    wait_for("the halves to differ", || {
        (swarm.nodes[0].status()["ledger"]["digest"] != swarm.nodes[2].status()["ledger"]["digest"]).then_some(())
    });
    set_blocked(false);
    swarm.wait_agreement(4);
}

#[test]
fn a_prompt_longer_than_the_context_is_a_clear_error() {
    let swarm = Swarm::of("it-context", 2);
    let question = "word ".repeat(9_000);
    let task = swarm.nodes[0].submit(&json!({"question": question, "strategy": "direct", "max_tokens": 8}));
    let events = swarm.nodes[0].events(&task);
    let last = events.last().unwrap();
    assert_eq!(last["event"], "failed", "{last}");
    let text = last["error"].to_string();
    assert!(text.contains("holds the") || text.contains("context"), "{text}");
}

#[test]
fn a_question_that_no_node_can_serve_says_what_is_missing() {
    let swarm = Swarm::of("it-nobody", 2);
    let body = json!({"question": "Hello?", "strategy": "direct", "model": "no-such-model", "max_tokens": 8});
    let task = swarm.nodes[0].submit(&body);
    let events = swarm.nodes[0].events(&task);
    let last = events.last().unwrap();
    assert_eq!(last["event"], "failed", "{last}");
    assert!(last["error"].to_string().contains("no-such-model"), "{last}");
}

#[test]
fn a_full_disk_is_told_and_harms_nobody_and_the_node_goes_on_when_there_is_room() {
    let mut swarm = Swarm::new("it-full");
    swarm.start(&NodeOptions::default());
    swarm.start(&NodeOptions::default());
    swarm.wait_agreement(2);
    let cramped = swarm.start(&NodeOptions { limited: true, ..NodeOptions::asker() });
    swarm.wait_agreement(3);
    if !swarm.nodes[cramped].limit_files(Some(0)) {
        eprintln!(
            "skipped: this system has no `prlimit` to fill a disk with; the store's own test covers the error alone"
        );
        return;
    }
    let task = json!({"question": "Hello?", "strategy": "direct", "max_tokens": 4});
    for _ in 0..5 {
        let (status, refused) = swarm.nodes[cramped].post("/v1/tasks", &task);
        assert_eq!((status, &refused["error"]["code"]), (507, &json!("disk_failed")), "{refused}");
        assert!(refused["error"]["message"].as_str().unwrap().contains("free some space"), "{refused}");
        // A chat is not kept, so it needs no disk, though its receipt cannot be written.
        let chat = json!({"model": "chorus", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello?"}]});
        let (status, reply) = swarm.nodes[cramped].post("/v1/chat/completions", &chat);
        assert_eq!(status, 200, "{reply}");
    }
    let asked = swarm.nodes[0].submit(&task);
    assert_eq!(swarm.nodes[0].events(&asked).last().unwrap()["event"], "finished");
    assert!(swarm.nodes[cramped].limit_files(None));
    let asked = wait_for("the node to go on", || {
        let (status, accepted) = swarm.nodes[cramped].post("/v1/tasks", &task);
        (status == 202).then(|| accepted["id"].as_str().unwrap().to_owned())
    });
    assert_eq!(swarm.nodes[cramped].events(&asked).last().unwrap()["event"], "finished");
}
