//! Tasks and their events.

use std::time::Duration;

use chorus_api::ApiConfig;
use chorus_core::Strategy;
use chorus_protocol::TaskId;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::backend::{SLOW, WORDS};
use crate::client::{Api, Sse, assert_error, config, events, eventually, read_events, start, start_with};

pub async fn create(api: &Api, body: &Value) -> String {
    let (status, accepted) = api.post("/v1/tasks", body).await;
    assert_eq!(status, 202, "{accepted}");
    let id = accepted["id"].as_str().unwrap().to_owned();
    assert_eq!(accepted["events"], format!("/v1/tasks/{id}/events"));
    id
}

pub async fn follow(api: &Api, path: &str, last: Option<u64>) -> Response {
    let mut request = api.request(Method::GET, path);
    if let Some(last) = last {
        request = request.header("Last-Event-ID", last.to_string());
    }
    request.send().await.unwrap()
}

pub fn ids(events: &[Sse]) -> Vec<u64> {
    events.iter().map(|event| event.id.unwrap()).collect()
}

pub fn kind(event: &Sse) -> String {
    serde_json::from_str::<Value>(&event.data).unwrap()["event"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_task_is_taken_followed_and_shown() {
    let api = start().await;
    let request = api.request(Method::POST, "/v1/tasks").json(&json!({ "question": "2 + 2?" }));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 202);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let all = events(follow(&api, &format!("{location}/events"), None).await).await;
    assert_eq!(ids(&all), (0..6).collect::<Vec<_>>());
    let kinds: Vec<String> = all.iter().map(kind).collect();
    assert_eq!(kinds, ["accepted", "text", "text", "text", "text", "finished"]);
    let (status, shown) = api.get(&location).await;
    assert_eq!((status, &shown["state"], &shown["question"]), (200, &json!("finished"), &json!("2 + 2?")));
    assert_eq!((&shown["result"]["answer"], &shown["result"]["text"]), (&json!("4"), &json!(WORDS.concat())));
    assert_eq!(shown["events"], 6);
    let (_, list) = api.get("/v1/tasks").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!(list["data"][0]["id"], shown["id"]);
    assert_eq!(api.rote.specs.lock().unwrap()[0].strategy, Strategy::Chains { planners: 3 });
}

#[tokio::test]
async fn every_option_is_read_and_every_mistake_named() {
    let api = start().await;
    create(
        &api,
        &json!({
            "question": "2 + 2?", "strategy": "direct", "planners": 3, "weighting": "match_score", "risk": "low",
            "deadline_s": 180, "max_tokens": 256, "temperature": 0.5, "seed": 0, "model": null, "skill": "arithmetic",
            "context": [{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Hello" }],
        }),
    )
    .await;
    let spec = api.rote.specs.lock().unwrap()[0].clone();
    assert_eq!((spec.strategy, spec.seed, spec.temperature_milli, spec.context.len()), (Strategy::Direct, 0, 500, 2));
    assert_eq!((spec.deadline, spec.max_tokens, spec.model), (Duration::from_secs(180), 256, None));
    for (body, param) in [
        (json!({}), "question"),
        (json!({ "question": 3 }), "question"),
        (json!({ "question": "?", "strategy": "react" }), "strategy"),
        (json!({ "question": "?", "deadline_s": 0 }), "deadline_s"),
        (json!({ "question": "?", "planners": 99 }), "planners"),
        (json!({ "question": "?", "context": [{ "role": "tool", "content": "x" }] }), "context[0].role"),
        (json!({ "question": "?", "context": [{ "role": "user" }] }), "context[0].content"),
        (json!({ "question": "?", "qestion": "?" }), "qestion"),
    ] {
        let (status, reply) = api.post("/v1/tasks", &body).await;
        assert_eq!((status, &reply["error"]["param"]), (400, &json!(param)), "{body}: {reply}");
    }
    assert_error(&api.post("/v1/tasks", &json!({ "question": " " })).await, 400, "invalid");
    assert_error(&api.post("/v1/tasks", &json!({ "question": "x".repeat(100_000) })).await, 400, "too_long");
    assert_error(&api.post("/v1/tasks", &json!({ "question": "full" })).await, 429, "overloaded");
    assert_eq!(api.get("/v1/tasks").await.1["data"].as_array().unwrap().len(), 1, "what was refused leaves no trace");
}

#[tokio::test]
async fn a_stream_that_broke_goes_on_where_it_stopped() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    let path = format!("/v1/tasks/{id}/events");
    // Cut off in the middle, several times, while the task goes on.
    let (mut all, mut last) = (Vec::new(), None);
    for count in [1, 3, 2, 5] {
        let part = read_events(follow(&api, &path, last).await, count).await;
        assert_eq!(part.len(), count);
        last = part.last().unwrap().id;
        all.extend(part);
        tokio::time::sleep(SLOW * 2).await;
    }
    let (status, _) = api.delete(&format!("/v1/tasks/{id}")).await;
    assert_eq!(status, 202);
    all.extend(events(follow(&api, &path, last).await).await);
    assert_eq!(ids(&all), (0..all.len() as u64).collect::<Vec<_>>(), "nothing lost, nothing twice");
    assert_eq!(kind(all.last().unwrap()), "failed");
    // The whole again, and parts of it.
    assert_eq!(events(follow(&api, &path, None).await).await, all);
    assert_eq!(events(follow(&api, &format!("{path}?from=4"), None).await).await, all[4..]);
    assert_eq!(events(follow(&api, &format!("{path}?from=1"), Some(6)).await).await, all[7..], "the header counts");
    // Whoever has seen everything is told not to come back.
    let end = all.last().unwrap().id.unwrap();
    assert_eq!(follow(&api, &path, Some(end)).await.status(), 204);
    assert_eq!(follow(&api, &format!("{path}?from=9999"), None).await.status(), 204);
    for bad in [format!("{path}?from=x"), format!("{path}?from=-1")] {
        assert_error(&api.get(&bad).await, 400, "invalid_value");
    }
}

#[tokio::test]
async fn many_readers_of_one_task_see_the_same() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    let path = format!("/v1/tasks/{id}/events");
    let readers: Vec<_> = (0..8).map(|from| follow(&api, &path, (from > 0).then(|| from - 1))).collect();
    let readers = futures::future::join_all(readers).await;
    let reading = tokio::spawn(futures::future::join_all(readers.into_iter().map(events)));
    tokio::time::sleep(SLOW * 5).await;
    api.delete(&format!("/v1/tasks/{id}")).await;
    let all = reading.await.unwrap();
    for (from, seen) in all.iter().enumerate() {
        assert_eq!(*seen, all[0][from..], "reader {from}");
    }
}

#[tokio::test]
async fn a_silent_stream_says_that_it_lives() {
    let api = start_with(ApiConfig { keep_alive: Duration::from_millis(30), ..config() }).await;
    let task = TaskId::from_bytes([9; 16]);
    api.rote.tasks.open(task, chorus_api::TaskMeta::default()).unwrap();
    let mut response = follow(&api, &format!("/v1/tasks/{task}/events"), None).await;
    for _ in 0..3 {
        let comment = response.chunk().await.unwrap().unwrap();
        assert_eq!(&comment[..], b": keep-alive\n\n");
    }
}

#[tokio::test]
async fn a_task_is_taken_back_once() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    let path = format!("/v1/tasks/{id}");
    let (status, body) = api.delete(&path).await;
    assert_eq!((status, &body["cancelling"]), (202, &json!(true)));
    events(follow(&api, &format!("{path}/events"), None).await).await;
    let (status, body) = api.delete(&path).await;
    assert_eq!((status, &body["state"]), (200, &json!("failed")));
    assert_eq!(api.rote.cancelled.lock().unwrap().len(), 1);
    let (_, shown) = api.get(&path).await;
    assert_eq!(shown["error"]["kind"], "cancelled", "{shown}");
    for (id, status, code) in [("abc", 400, "invalid_value"), (&"0".repeat(32), 404, "task_not_found")] {
        assert_error(&api.get(&format!("/v1/tasks/{id}")).await, status, code);
        assert_error(&api.get(&format!("/v1/tasks/{id}/events")).await, status, code);
        assert_error(&api.delete(&format!("/v1/tasks/{id}")).await, status, code);
    }
}

#[tokio::test]
async fn a_watcher_that_leaves_does_not_end_the_task() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    assert_eq!(read_events(follow(&api, &format!("/v1/tasks/{id}/events"), None).await, 2).await.len(), 2);
    tokio::time::sleep(SLOW * 5).await;
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.1["state"], "running");
    assert!(api.rote.cancelled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn streams_end_when_the_node_does() {
    let mut api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    let response = follow(&api, &format!("/v1/tasks/{id}/events"), None).await;
    let chat = json!({ "model": "tiny/model", "messages": [{ "role": "user", "content": "slow" }] });
    let waiting = api.request(Method::POST, "/v1/chat/completions").json(&chat).send();
    let waiting = tokio::spawn(waiting);
    eventually("the request", || !api.rote.requests.lock().unwrap().is_empty()).await;
    api.shutdown.cancel();
    let stopped = api.bound.take().unwrap().stopped();
    assert!(tokio::time::timeout(Duration::from_secs(4), stopped).await.is_ok(), "it does not wait for its clients");
    events(response).await;
    assert_error(&crate::client::json(waiting.await.unwrap().unwrap()).await, 503, "shutting_down");
}
