//! What outlives a crash: a task its requester, a stream its executor, a job's id the way between two logs.

use std::process::Stdio;
use std::time::{Duration, Instant};

use chorus_tests::{NodeOptions, Swarm, sse_data, wait_for};
use serde_json::{Value, json};

use crate::faults::{long_task, runner};

#[test]
fn a_task_outlives_the_node_that_asked() {
    let mut swarm = Swarm::new("it-survive");
    let asker = swarm.start(&NodeOptions::asker());
    swarm.start(&NodeOptions::real());
    swarm.wait_agreement(2);
    let short = json!({"question": "Say hello.", "strategy": "direct", "max_tokens": 8, "temperature": 0});
    let done = swarm.nodes[asker].submit(&short);
    let told = swarm.nodes[asker].events(&done).pop().unwrap();
    let path = format!("/v1/tasks/{done}");
    let task = swarm.nodes[asker].submit(&json!({"max_tokens": 120, "question": long_task()["question"],
        "strategy": "direct", "deadline_s": 55}));
    let _ = runner(&swarm);
    swarm.nodes[asker].kill();
    swarm.restart(asker);
    assert_eq!(swarm.nodes[asker].get(&path).1["result"], told["result"], "a task that ended is still there");
    let events = sse_data(&swarm.nodes[asker].get_text(&format!("/v1/tasks/{task}/events?from=1")));
    let kinds: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    assert_eq!((kinds[..3].to_vec(), *kinds.last().unwrap()), (vec!["missed", "resumed", "accepted"], "finished"));
    let numbers: Vec<u64> = events[1..].iter().filter_map(|event| event["index"].as_u64()).collect();
    assert_eq!(numbers[0], 1 << 20);
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{numbers:?}");
    let shown = swarm.nodes[asker].get(&format!("/v1/tasks/{task}")).1;
    assert_eq!(shown["state"], "finished", "{shown}");
    assert!(shown["result"]["completion_tokens"].as_u64().unwrap() > 8, "{shown}");
}

#[test]
fn a_task_whose_time_was_up_before_its_node_came_back_says_so() {
    let mut swarm = Swarm::new("it-interrupted");
    let asker = swarm.start(&NodeOptions::asker());
    // Nobody can do it, so it waits.
    let task = swarm.nodes[asker].submit(&json!({"question": "Hello?", "strategy": "direct", "deadline_s": 1}));
    swarm.nodes[asker].kill();
    std::thread::sleep(Duration::from_millis(1_100));
    swarm.restart(asker);
    let last = swarm.nodes[asker].events(&task).pop().unwrap();
    assert_eq!((&last["event"], &last["error"]["kind"]), (&json!("failed"), &json!("interrupted")), "{last}");
    assert!(last["error"]["message"].as_str().unwrap().contains("ask again"), "{last}");
}

#[test]
fn a_stream_goes_on_when_its_executor_is_killed() {
    let mut swarm = Swarm::new("it-stream");
    let asker = swarm.start(&NodeOptions::asker());
    for _ in 0..2 {
        swarm.start(&NodeOptions::real());
    }
    swarm.wait_agreement(3);
    let body = json!({"model": "chorus", "max_tokens": 150, "temperature": 1.0, "seed": 5, "stream": true,
        "messages": [{"role": "user", "content": long_task()["question"]}], "chorus": {"deadline_s": 55}});
    let url = format!("{}/v1/chat/completions", swarm.nodes[asker].api());
    let stream = || {
        let http = reqwest::blocking::Client::builder().no_proxy().timeout(chorus_tests::PATIENCE).build().unwrap();
        let chunks = sse_data(&http.post(&url).json(&body).send().unwrap().text().unwrap());
        let text = |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        let finish = chunks.last().unwrap()["choices"][0]["finish_reason"].clone();
        (chunks.iter().filter_map(text).collect::<String>(), finish)
    };
    let whole = stream();
    assert_eq!(whole.1, "length", "the answer is cut at its limit, so that it has a middle: {whole:?}");
    let broken = std::thread::scope(|scope| {
        let streaming = scope.spawn(&stream);
        let victim = runner(&swarm);
        std::thread::sleep(Duration::from_millis(500));
        swarm.nodes[victim].signal("KILL");
        streaming.join().unwrap()
    });
    assert_eq!(broken, whole, "same seed, same weights: the client sees one text");
}

#[test]
fn a_jobs_id_is_in_the_log_of_every_node_that_it_touched() {
    let mut swarm = Swarm::new("it-spans");
    let asker = swarm.start(&NodeOptions::asker());
    let worker = swarm.start(&NodeOptions::default());
    swarm.wait_agreement(2);
    let task = swarm.nodes[asker].submit(&json!({"question": "Hello?", "strategy": "direct", "max_tokens": 8}));
    let events = swarm.nodes[asker].events(&task);
    let job = events.iter().find_map(|event| event["job"].as_str()).unwrap().to_owned();
    let said = |node: usize, message: &str| {
        let log = swarm.nodes[node].log();
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.any(|line| {
            line["message"] == message && line["span"]["name"] == "job" && line["span"]["id"] == job.as_str()
        })
    };
    wait_for("the job on both sides", || {
        (said(asker, "leased") && said(asker, "done") && said(worker, "done")).then_some(())
    });
    assert!(!said(worker, "leased"), "a lease is its requester's");
}

#[test]
fn a_question_to_a_node_that_falls_silent_ends_with_what_to_do() {
    let mut swarm = Swarm::new("it-silent");
    let asker = swarm.start(&NodeOptions::asker());
    swarm.start(&NodeOptions::real());
    swarm.wait_agreement(2);
    let args = ["ask", "--strategy", "direct", "--max-tokens", "1500", "Tell a very long story about a lighthouse."];
    let mut asking = swarm.nodes[asker].command(&args);
    let asking = asking.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = runner(&swarm);
    swarm.nodes[asker].signal("STOP");
    let stopped = Instant::now();
    let output = asking.wait_with_output().unwrap();
    swarm.nodes[asker].signal("CONT");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(stopped.elapsed() < Duration::from_secs(30), "{:?}", stopped.elapsed());
    assert!(text.contains("fell silent") && text.contains("/v1/tasks/"), "{text}");
}
