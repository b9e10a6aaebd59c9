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

#[test]
fn an_answers_form_and_end_go_through_the_swarm() {
    let mut swarm = Swarm::new("it-form");
    let asker = swarm.start(&NodeOptions::asker());
    swarm.start(&NodeOptions::default());
    swarm.wait_agreement(2);
    let ask = |more: Value| {
        let mut body = json!({"model": "chorus", "max_tokens": 24, "temperature": 1.0, "seed": 9});
        body["messages"] = json!([{"role": "user", "content": "Hello?"}]);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, reply) = swarm.nodes[asker].post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{reply}");
        let choice = &reply["choices"][0];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&choice["message"]["content"]), text(&choice["finish_reason"]))
    };
    // A model of random weights does not find its end, and writes what a grammar tells it to.
    let (whole, finish) = ask(json!({}));
    assert_eq!(finish, "length", "{whole}");
    let schema = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}});
    let (formed, finish) = ask(json!({ "response_format": schema }));
    assert!(matches!(formed.as_str(), "\"yes\"" | "\"no\"") && finish == "stop", "{formed} {finish}");
    let middle: String = whole.chars().skip(8).take(3).collect();
    let (cut, finish) = ask(json!({ "stop": [&middle] }));
    assert_eq!((cut.as_str(), finish.as_str()), (whole[..whole.find(&middle).unwrap()].trim(), "stop"));
}

#[test]
fn tokens_are_counted_as_they_are_written_and_read() {
    let swarm = Swarm::of("it-tokens", 1);
    let task = swarm.nodes[0].submit(&json!({"question": "Hello?", "strategy": "direct", "max_tokens": 40}));
    let events = swarm.nodes[0].events(&task);
    let counts: Vec<u64> =
        events.iter().filter(|event| event["event"] == "text").map(|event| event["tokens"].as_u64().unwrap()).collect();
    let written = events.last().unwrap()["result"]["completion_tokens"].as_u64().unwrap();
    assert!(counts.is_sorted() && counts.last().is_some_and(|last| *last <= written), "{counts:?} of {written}");
    let (status, reply) =
        swarm.nodes[0].post("/v1/embeddings", &json!({"model": "all-MiniLM-L6-v2", "input": ["Hello", "Hello there"]}));
    // Each text has a beginning and an end.
    assert_eq!((status, &reply["usage"]["prompt_tokens"]), (200, &json!(3 + 4)), "{reply}");
}
