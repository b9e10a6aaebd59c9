//! Chat completions, models and embeddings, beside the shapes that OpenAI documents.

use std::sync::atomic::Ordering;
use std::time::Duration;

use chorus_api::ApiConfig;
use chorus_core::{Strategy, Weighting};
use chorus_protocol::job::{Risk, Role};
use reqwest::Method;
use serde_json::{Value, json};

use crate::backend::WORDS;
use crate::client::{assert_error, config, eventually, read_events, start, start_with};

/// The chat completion object of OpenAI's API reference, with its optional members of usage left out.
const DOCUMENTED: &str = r#"{
  "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT", "object": "chat.completion", "created": 1741569952,
  "model": "gpt-4.1-2025-04-14",
  "choices": [{
    "index": 0,
    "message": {"role": "assistant", "content": "Hello! How can I assist you today?", "refusal": null, "annotations": []},
    "logprobs": null, "finish_reason": "stop"
  }],
  "usage": {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}
}"#;

/// The chunks of its streaming example: the first, one with text, the last.
const DOCUMENTED_CHUNKS: [&str; 3] = [
    r#"{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini","system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
    r#"{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini","system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}"#,
    r#"{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini","system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}"#,
];

fn chat(model: &str, content: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": content }] })
}

fn streamed(model: &str, content: &str) -> Value {
    let mut body = chat(model, content);
    body["stream"] = json!(true);
    body
}

/// Asserts that everything `documented` has is there, with a value of the same type. A string may be `null`.
fn assert_shape(documented: &Value, ours: &Value, path: &str) {
    match (documented, ours) {
        (Value::Object(documented), Value::Object(ours)) => {
            for (name, value) in documented {
                let own = ours.get(name).unwrap_or_else(|| panic!("{path}.{name} is missing"));
                assert_shape(value, own, &format!("{path}.{name}"));
            }
        }
        (Value::Array(documented), Value::Array(ours)) => {
            assert_eq!(documented.len(), ours.len(), "{path}");
            documented.iter().zip(ours).for_each(|(documented, ours)| assert_shape(documented, ours, path));
        }
        (Value::String(_), Value::String(_) | Value::Null) | (Value::Number(_), Value::Number(_)) => {}
        (documented, ours) => assert_eq!(documented, ours, "{path}"),
    }
}

fn text_of(chunks: &[String]) -> String {
    let texts = chunks.iter().filter_map(|chunk| serde_json::from_str::<Value>(chunk).ok());
    texts.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

#[tokio::test]
async fn an_answer_has_the_documented_shape() {
    let api = start().await;
    for model in ["tiny/model", "chorus"] {
        let (status, reply) = api.post("/v1/chat/completions", &chat(model, "Hello")).await;
        assert_eq!(status, 200, "{reply}");
        assert_shape(&serde_json::from_str(DOCUMENTED).unwrap(), &reply, model);
        assert_eq!(reply["choices"][0]["message"]["content"], WORDS.concat());
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        assert_eq!(reply["model"], model);
        assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
        let usage = &reply["usage"];
        let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
        assert_eq!(usage["total_tokens"], json!(sum));
    }
}

#[tokio::test]
async fn a_stream_has_the_documented_shape_and_order() {
    let api = start().await;
    for model in ["tiny/model", "chorus"] {
        let chunks = api.stream("/v1/chat/completions", &streamed(model, "Hello")).await;
        assert_eq!(chunks.last().unwrap(), "[DONE]", "{chunks:?}");
        let parsed: Vec<Value> =
            chunks[..chunks.len() - 1].iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect();
        let places = [0, 1, parsed.len() - 1];
        for (documented, place) in DOCUMENTED_CHUNKS.iter().zip(places) {
            assert_shape(&serde_json::from_str(documented).unwrap(), &parsed[place], &format!("{model} {place}"));
        }
        assert_eq!(parsed[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
        assert_eq!(text_of(&chunks), WORDS.concat());
        let finishes = parsed.iter().filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null()).count();
        assert_eq!(finishes, 1, "{chunks:?}");
        assert!(parsed.iter().all(|chunk| chunk["id"] == parsed[0]["id"] && chunk["created"] == parsed[0]["created"]));
        assert!(parsed.iter().all(|chunk| chunk.get("usage").is_none()), "usage was not asked for");
    }
}

#[tokio::test]
async fn usage_is_streamed_when_asked_for() {
    let api = start().await;
    for (model, prompt) in [("tiny/model", 11), ("chorus", 21)] {
        let mut body = streamed(model, "Hello");
        body["stream_options"] = json!({ "include_usage": true });
        let chunks = api.stream("/v1/chat/completions", &body).await;
        let parsed: Vec<Value> =
            chunks[..chunks.len() - 1].iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect();
        let (last, before) = parsed.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(
            last["usage"],
            json!({ "prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4 })
        );
        assert!(before.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()), "{chunks:?}");
    }
}

#[tokio::test]
async fn every_setting_reaches_the_engine() {
    let api = start().await;
    let body = json!({
        "model": "tiny/model",
        "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hello" }],
        "temperature": 0.25, "top_p": 0.5, "seed": 42, "max_completion_tokens": 9, "stop": ["\n", "END"],
        "response_format": { "type": "json_object" },
    });
    assert_eq!(api.post("/v1/chat/completions", &body).await.0, 200);
    let request = api.rote.requests.lock().unwrap()[0].clone();
    assert_eq!((request.turns[0].role, request.turns[1].content.as_str()), (Role::System, "Hello"));
    assert_eq!((request.temperature, request.top_p, request.seed, request.max_tokens), (0.25, 0.5, 42, 9));
    assert_eq!(request.stop, ["\n", "END"]);
    assert_eq!(request.json_schema.as_deref(), Some(r#"{"type":"object"}"#));
    // Without a seed, two requests do not share one.
    for _ in 0..2 {
        api.post("/v1/chat/completions", &chat("tiny/model", "Hello")).await;
    }
    let requests = api.rote.requests.lock().unwrap();
    assert_ne!(requests[1].seed, requests[2].seed);
}

#[tokio::test]
async fn every_setting_reaches_the_swarm() {
    let api = start().await;
    let mut body = json!({
        "model": "chorus",
        "messages": [
            { "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hi" },
            { "role": "assistant", "content": "Hello" }, { "role": "user", "content": "2 + 2?" },
        ],
        "temperature": 0, "top_p": 1, "seed": 7, "max_tokens": 33,
    });
    let (_, reply) = api.post("/v1/chat/completions", &body).await;
    body["chorus"] = json!({
        "strategy": "chains", "planners": 5, "weighting": "calibrated", "risk": "high", "deadline_s": 9.5, "model": "tiny",
    });
    let (_, chains) = api.post("/v1/chat/completions", &body).await;
    let specs = api.rote.specs.lock().unwrap();
    let spec = &specs[0];
    assert_eq!((spec.question.as_str(), spec.context.len(), spec.context[2].role), ("2 + 2?", 3, Role::Assistant));
    assert_eq!((spec.temperature_milli, spec.top_p_milli, spec.seed, spec.max_tokens), (0, 1_000, 7, 33));
    assert_eq!((spec.strategy, spec.model.as_ref()), (Strategy::Direct, None));
    let spec = &specs[1];
    assert_eq!(spec.strategy, Strategy::Chains { planners: 5 });
    assert_eq!((spec.weighting, spec.risk), (Weighting::Calibrated, Risk::High));
    assert_eq!(spec.deadline, Duration::from_millis(9_500));
    assert_eq!(spec.model.as_ref().unwrap().as_str(), "tiny");
    for (reply, spec) in [(reply, &specs[0]), (chains, spec)] {
        assert_eq!(reply["chorus"]["task"], spec.task.to_string());
        assert_eq!((&reply["chorus"]["answer"], &reply["chorus"]["margin"]), (&json!("4"), &json!(1.0)));
        assert_eq!(reply["chorus"]["strategy"], spec.strategy.name());
    }
}

#[tokio::test]
async fn chains_stream_their_answer_at_the_end() {
    let api = start().await;
    let mut body = streamed("chorus", "Hello");
    body["chorus"] = json!({ "strategy": "chains" });
    let chunks = api.stream("/v1/chat/completions", &body).await;
    assert_eq!(text_of(&chunks), WORDS.concat());
    assert_eq!(chunks.len(), 4, "opening, answer, end, done: {chunks:?}");
}

#[tokio::test]
async fn an_answers_form_reaches_the_swarm_and_its_end_comes_back() {
    let api = start().await;
    let mut body = chat("chorus", "cut");
    body["stop"] = json!(["\n", "END"]);
    body["response_format"] =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "type": "array" } } });
    let (_, reply) = api.post("/v1/chat/completions", &body).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "length", "{reply}");
    body["stream"] = json!(true);
    let chunks = api.stream("/v1/chat/completions", &body).await;
    assert!(chunks.iter().any(|chunk| chunk.contains(r#""finish_reason":"length""#)), "{chunks:?}");
    let task = json!({ "question": "cut", "stop": "END", "response_format": { "type": "json_object" } });
    assert_eq!(api.post("/v1/tasks", &task).await.0, 202);
    let specs = api.rote.specs.lock().unwrap();
    let form = |at: usize| (specs[at].stop.join("|"), specs[at].json_schema.clone().unwrap());
    assert_eq!(form(0), ("\n|END".to_owned(), r#"{"type":"array"}"#.to_owned()));
    assert_eq!(form(1), form(0));
    assert_eq!(form(2), ("END".to_owned(), r#"{"type":"object"}"#.to_owned()));
}

#[tokio::test]
async fn an_executor_lost_in_the_middle_is_not_noticed_or_ends_the_stream() {
    let api = start().await;
    let chunks = api.stream("/v1/chat/completions", &streamed("chorus", "lost")).await;
    assert_eq!(text_of(&chunks), WORDS.concat());
    assert_eq!(chunks.last().unwrap(), "[DONE]");
    // One that answers differently cannot be hidden in a stream, and does not matter without one.
    let chunks = api.stream("/v1/chat/completions", &streamed("chorus", "differ")).await;
    assert_eq!(text_of(&chunks), "The answers, ");
    let error: Value = serde_json::from_str(&chunks[chunks.len() - 2]).unwrap();
    assert_eq!(error["error"]["code"], "answer_diverged", "{chunks:?}");
    let (_, tasks) = api.get("/v1/tasks").await;
    let task = format!("/v1/tasks/{}", tasks["data"][0]["id"].as_str().unwrap());
    assert!(error["error"]["message"].as_str().unwrap().contains(&task), "it says where the whole answer is: {error}");
    assert_eq!(api.get(&task).await.1["result"]["text"], WORDS.concat());
    assert!(api.rote.cancelled.lock().unwrap().is_empty());
    let (status, reply) = api.post("/v1/chat/completions", &chat("chorus", "differ")).await;
    assert_eq!((status, &reply["choices"][0]["message"]["content"]), (200, &json!(WORDS.concat())));
}

#[tokio::test]
async fn errors_have_openais_shape() {
    let api = start().await;
    for (body, status, code, param) in [
        (chat("nobody", "Hello"), 404, "model_not_found", json!("model")),
        (chat("mini", "Hello"), 400, "invalid_value", json!("model")),
        (json!({ "messages": [] }), 400, "missing_field", json!("model")),
        (json!({ "model": "chorus", "messages": [] }), 400, "invalid_value", json!("messages")),
        (chat("tiny/model", "fail"), 400, "context_length_exceeded", json!("messages")),
        (streamed("tiny/model", "fail"), 400, "context_length_exceeded", json!("messages")),
        (chat("tiny/model", "panic"), 503, "engine_failed", json!(null)),
        (chat("chorus", "fail"), 504, "deadline", json!(null)),
        (streamed("chorus", "fail"), 504, "deadline", json!(null)),
        (chat("chorus", "full"), 429, "overloaded", json!(null)),
        (chat("chorus", " "), 400, "invalid", json!(null)),
    ] {
        let reply = api.post("/v1/chat/completions", &body).await;
        assert_error(&reply, status, code);
        assert_eq!(reply.1["error"]["param"], param, "{}", reply.1);
    }
    let (_, body) = api.post("/v1/chat/completions", &chat("nobody", "Hello")).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("chorus") && message.contains("tiny/model") && !message.contains("mini"), "{message}");
    let refused = api.request(Method::POST, "/v1/chat/completions").json(&chat("chorus", "full"));
    assert_eq!(refused.send().await.unwrap().headers()["retry-after"], "1");
    let garbage =
        api.request(Method::POST, "/v1/chat/completions").header("content-type", "application/json").body("{");
    assert_error(&crate::client::json(garbage.send().await.unwrap()).await, 400, "invalid_json");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_work() {
    let api = start().await;
    // Streaming from this node's own engine.
    let response = api.request(Method::POST, "/v1/chat/completions").json(&streamed("tiny/model", "slow")).send().await;
    assert!(read_events(response.unwrap(), 3).await.len() == 3);
    eventually("the engine's stop", || api.rote.stopped.load(Ordering::SeqCst) == 1).await;
    // Waiting for the whole of it.
    let waiting = api.request(Method::POST, "/v1/chat/completions").json(&chat("tiny/model", "slow"));
    assert!(waiting.timeout(Duration::from_millis(300)).send().await.is_err());
    eventually("the engine's second stop", || api.rote.stopped.load(Ordering::SeqCst) == 2).await;
    // The swarm, in both ways.
    let response =
        api.request(Method::POST, "/v1/chat/completions").json(&streamed("chorus", "slow")).send().await.unwrap();
    let task = response.headers()["x-chorus-task"].to_str().unwrap().to_owned();
    assert!(read_events(response, 3).await.len() == 3);
    eventually("the task's end", || api.rote.cancelled.lock().unwrap().len() == 1).await;
    assert_eq!(api.rote.cancelled.lock().unwrap()[0].to_string(), task);
    let waiting = api.request(Method::POST, "/v1/chat/completions").json(&chat("chorus", "slow"));
    assert!(waiting.timeout(Duration::from_millis(300)).send().await.is_err());
    eventually("the second task's end", || api.rote.cancelled.lock().unwrap().len() == 2).await;
    let (_, tasks) = api.get("/v1/tasks").await;
    assert!(tasks["data"].as_array().unwrap().iter().all(|task| task["state"] == "failed"), "{tasks}");
}

#[tokio::test]
async fn a_client_that_leaves_a_background_task_lets_it_go_on() {
    let api = start().await;
    let mut body = streamed("chorus", "slow");
    body["chorus"] = json!({ "background": true });
    let response = api.request(Method::POST, "/v1/chat/completions").json(&body).send().await.unwrap();
    let task = response.headers()["x-chorus-task"].to_str().unwrap().to_owned();
    assert!(read_events(response, 3).await.len() == 3);
    let path = format!("/v1/tasks/{task}");
    let before = api.get(&path).await.1["events"].as_u64().unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (_, now) = api.get(&path).await;
    assert!(now["state"] == "running" && now["events"].as_u64().unwrap() > before, "{now}");
    assert!(api.rote.cancelled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_generation_that_takes_too_long_is_ended_with_a_reason() {
    let api = start_with(ApiConfig { generate_timeout: Duration::from_millis(200), ..config() }).await;
    let reply = api.post("/v1/chat/completions", &chat("tiny/model", "slow")).await;
    assert_error(&reply, 504, "timeout");
    assert!(reply.1["error"]["message"].as_str().unwrap().contains("200.0ms"), "{}", reply.1);
    eventually("the engine's stop", || api.rote.stopped.load(Ordering::SeqCst) == 1).await;
    let chunks = api.stream("/v1/chat/completions", &streamed("tiny/model", "slow")).await;
    assert!(chunks[chunks.len() - 2].contains(r#""code":"timeout""#), "{chunks:?}");
}

#[tokio::test]
async fn models_are_listed() {
    let api = start().await;
    let (status, list) = api.get("/v1/models").await;
    assert_eq!((status, &list["object"]), (200, &json!("list")));
    let documented =
        json!({ "id": "model-id-0", "object": "model", "created": 1_686_935_002, "owned_by": "organization-owner" });
    let models = list["data"].as_array().unwrap();
    models.iter().for_each(|model| assert_shape(&documented, model, "model"));
    let ids: Vec<&str> = models.iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["chorus", "tiny/model", "mini"]);
    assert_eq!(api.get("/v1/models/tiny/model").await.1["id"], "tiny/model");
    assert_error(&api.get("/v1/models/nobody").await, 404, "model_not_found");
}

#[tokio::test]
async fn embeddings_have_the_documented_shape() {
    let api = start().await;
    let (status, reply) = api.post("/v1/embeddings", &json!({ "model": "mini", "input": "abc" })).await;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(
        reply,
        json!({
            "object": "list",
            "data": [{ "object": "embedding", "embedding": [3.0, -0.5], "index": 0 }],
            "model": "mini",
            "usage": { "prompt_tokens": 3, "total_tokens": 3 },
        })
    );
    let body = json!({ "model": "mini", "input": ["a", "abcd"], "encoding_format": "base64", "dimensions": 2 });
    let (_, reply) = api.post("/v1/embeddings", &body).await;
    // 1.0 and -0.5, then 4.0 and -0.5, as little-endian floats of 32 bits.
    assert_eq!(reply["data"][0]["embedding"], "AACAPwAAAL8=");
    assert_eq!(reply["data"][1]["embedding"], "AACAQAAAAL8=");
    for (body, status, code) in [
        (json!({ "model": "nobody", "input": "a" }), 404, "model_not_found"),
        (json!({ "model": "mini" }), 400, "missing_field"),
        (json!({ "model": "mini", "input": 3 }), 400, "invalid_type"),
        (json!({ "model": "mini", "input": [1, 2] }), 400, "invalid_type"),
        (json!({ "model": "mini", "input": [] }), 400, "invalid_value"),
        (json!({ "model": "mini", "input": "" }), 400, "invalid_value"),
        (json!({ "model": "mini", "input": "a", "dimensions": 3 }), 400, "invalid_value"),
        (json!({ "model": "mini", "input": "a", "encoding_format": "hex" }), 400, "invalid_value"),
    ] {
        assert_error(&api.post("/v1/embeddings", &body).await, status, code);
    }
    api.rote.no_embedder.store(true, Ordering::SeqCst);
    assert_error(&api.post("/v1/embeddings", &json!({ "model": "mini", "input": "a" })).await, 503, "no_embedder");
}
