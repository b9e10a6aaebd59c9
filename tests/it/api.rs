//! The HTTP API of a real node.

use chorus_tests::{NodeOptions, Swarm};
use serde_json::{Value, json};

#[test]
fn chat_completions_by_the_swarm_and_by_the_nodes_own_engine() {
    let swarm = Swarm::of("it-chat", 2);
    let (_, models) = swarm.nodes[0].get("/v1/models");
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().filter_map(|model| model["id"].as_str()).collect();
    assert!(names.contains(&"chorus") && names.len() >= 2, "{names:?}");
    for model in names.into_iter().filter(|name| *name != "all-MiniLM-L6-v2") {
        let body = json!({"model": model, "max_tokens": 12, "messages": [{"role": "user", "content": "Hello"}]});
        let (status, reply) = swarm.nodes[0].post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{model}: {reply}");
        assert_eq!(reply["choices"][0]["message"]["role"], "assistant", "{model}: {reply}");
        assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() > 0, "{model}: {reply}");
    }
    let (status, reply) = swarm.nodes[0].post("/v1/chat/completions", &json!({"model": "nobody", "messages": []}));
    assert!(status == 404 || status == 400, "{status} {reply}");
}

#[test]
fn events_resume_where_they_stopped() {
    let swarm = Swarm::of("it-resume", 2);
    let task = swarm.nodes[0].submit(&json!({"question": "Hello?", "strategy": "direct", "max_tokens": 8}));
    let all = swarm.nodes[0].events(&task);
    let rest = swarm.nodes[0].get_text(&format!("/v1/tasks/{task}/events?from=2"));
    let rest: Vec<Value> =
        rest.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data:")?.trim()).ok()).collect();
    assert_eq!(rest[..], all[2..]);
}

#[test]
fn health_and_metrics_are_there() {
    let mut swarm = Swarm::new("it-metrics");
    swarm.start(&NodeOptions::asker());
    let (status, _) = swarm.nodes[0].get("/healthz");
    assert_eq!(status, 200);
    let metrics = swarm.nodes[0].get_text("/metrics");
    for name in ["chorus_peers", "chorus_ledger_entries"] {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} is missing in\n{metrics}");
    }
}
