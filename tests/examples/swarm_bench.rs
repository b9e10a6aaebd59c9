//! What the swarm adds to a generation: five real processes on loopback, ratios within one run.
//!
//! Run it with `scripts/bench swarm`, or `cargo run --release -p chorus-tests --example swarm_bench`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::time::Instant;

use chorus_tests::{Node, NodeOptions, Swarm, models_dir};
use serde_json::{Value, json};

/// Pairs of requests, one to the bare engine and one through the swarm, alternating.
const PAIRS: usize = 60;
/// Elections of which the distribution is printed.
const ELECTIONS: usize = 300;
/// Pairs with the default model and long answers.
const LONG_PAIRS: usize = 12;
/// Tokens of a long answer.
const LONG_TOKENS: u32 = 128;

/// Asks for an answer; returns how long it took in milliseconds, and its tokens.
fn chat(node: &Node, model: &str, max_tokens: u32, seed: usize) -> (f64, u64) {
    let body = json!({
        "model": model, "max_tokens": max_tokens, "temperature": 0.0, "seed": seed,
        // A system message of its own, so that the node's does not stand before one of the two.
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": format!("Count from {seed} to one thousand, in words.")},
        ],
        // A text that may not end before the limit, so that all answers have as many tokens as were asked for.
        "response_format": {"type": "json_schema", "json_schema": {"name": "text", "schema": {"type": "string", "minLength": 4_000}}},
    });
    let started = Instant::now();
    let (status, reply) = node.post("/v1/chat/completions", &body);
    let took = started.elapsed().as_secs_f64() * 1e3;
    assert_eq!(status, 200, "{reply}");
    (took, reply["usage"]["completion_tokens"].as_u64().unwrap())
}

/// Asks the bare engine and the swarm for one and the same answer, each of them first in every other pair. The engine keeps nothing
/// of a prompt, so whoever comes second gains nothing.
fn pair(node: &Node, own: &str, max_tokens: u32, seed: usize) -> [(f64, u64); 2] {
    if seed.is_multiple_of(2) {
        let alone = chat(node, own, max_tokens, seed);
        return [alone, chat(node, "chorus", max_tokens, seed)];
    }
    let through = chat(node, "chorus", max_tokens, seed);
    [chat(node, own, max_tokens, seed), through]
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let index = ((sorted.len() - 1) as f64 * q).round() as usize;
    sorted[index]
}

fn row(what: &str, value: String, target: &str, holds: bool) {
    println!("{what:<62} {value:>28}   target {target:<12} {}", if holds { "holds" } else { "FALLS SHORT" });
}

/// A swarm of `n` nodes with one model; the first one asks, and its own engine is the bare one.
fn swarm(name: &str, n: usize, model: Option<String>) -> (Swarm, String) {
    let mut swarm = Swarm::new(name);
    for _ in 0..n {
        swarm.start(&NodeOptions { model: model.clone(), ..NodeOptions::default() });
    }
    swarm.wait_agreement(n);
    let (_, models) = swarm.nodes[0].get("/v1/models");
    let own = models["data"].as_array().unwrap().iter().filter_map(|m| m["id"].as_str()).find(|id| *id != "chorus");
    let own = own.unwrap().to_owned();
    (swarm, own)
}

fn overhead() {
    let (swarm, own) = swarm("bench-overhead", 5, None);
    let node = &swarm.nodes[0];
    for seed in 0..5 {
        chat(node, &own, 1, seed);
        chat(node, "chorus", 1, seed);
    }
    let (mut bare, mut added) = (Vec::new(), Vec::new());
    for seed in 0..PAIRS {
        let [alone, through] = pair(node, &own, 8, 1_000 + seed).map(|(took, _)| took);
        bare.push(alone);
        added.push(through - alone);
    }
    let (low, median, high) = (quantile(&added, 0.25), quantile(&added, 0.5), quantile(&added, 0.75));
    println!("bare engine, tiny model, 8 tokens: {:.2} ms (median of {PAIRS})", quantile(&bare, 0.5));
    row(
        "direct through the swarm adds, per job",
        format!("{median:.2} ms ({low:.2} to {high:.2})"),
        "< 10 ms",
        median < 10.0,
    );
    elections(node);
}

fn elections(node: &Node) {
    let mut waits = Vec::new();
    for seed in 0..ELECTIONS {
        let task = node.submit(&json!({"question": "Go.", "strategy": "direct", "max_tokens": 1, "seed": seed}));
        let events = node.events(&task);
        let at = |kind: &str| events.iter().find(|e| e["event"] == kind).and_then(|e: &Value| e["elapsed_ms"].as_f64());
        if let (Some(announced), Some(elected)) = (at("announced"), at("elected")) {
            waits.push(elected - announced);
        }
    }
    assert!(waits.len() * 10 >= ELECTIONS * 9, "{} of {ELECTIONS} elections were seen", waits.len());
    let (p50, p99) = (quantile(&waits, 0.5), quantile(&waits, 0.99));
    println!(
        "elections among 5 nodes, announced to elected, the early-closing window included ({} of them):",
        waits.len()
    );
    row("  p50", format!("{p50:.2} ms"), "< 10 ms", p50 < 10.0);
    row("  p99", format!("{p99:.2} ms"), "< 50 ms", p99 < 50.0);
}

fn share_of_a_long_answer() {
    let model = models_dir().join("SmolLM2-135M-Instruct.Q8_0.gguf");
    if !model.exists() {
        println!("the default model is missing; run scripts/models");
        return;
    }
    // One node, so that both ways run on the very same engine with the very same neighbours.
    let (swarm, own) = swarm("bench-long", 1, Some(model.display().to_string()));
    let node = &swarm.nodes[0];
    chat(node, &own, 4, 0);
    let (mut bare, mut ratio) = (Vec::new(), Vec::new());
    for seed in 0..LONG_PAIRS {
        let [alone, through] = pair(node, &own, LONG_TOKENS, 1_000 + seed);
        assert_eq!(alone.1, through.1, "the same prompt and seed give the same tokens both ways");
        assert_eq!(alone.1, u64::from(LONG_TOKENS), "the answer ended before its limit");
        bare.push(alone.0);
        ratio.push((through.0 / alone.0 - 1.0) * 100.0);
    }
    let quartiles = |values: &[f64]| [0.25, 0.5, 0.75].map(|q| quantile(values, q));
    let ([_, bare, _], [low, median, high]) = (quartiles(&bare), quartiles(&ratio));
    println!("bare engine, default model, {LONG_TOKENS} tokens: {bare:.0} ms (median of {LONG_PAIRS})");
    row(
        "direct through the swarm adds to a 128-token answer",
        format!("{median:.2} % ({low:.2} to {high:.2})"),
        "< 2 %",
        median < 2.0,
    );
}

fn main() {
    overhead();
    share_of_a_long_answer();
}
