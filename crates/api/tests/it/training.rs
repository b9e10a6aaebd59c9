//! The training room, and the desk of a trainer outside the node.

use std::time::{Duration, Instant};

use chorus_api::{ApiConfig, Update};
use reqwest::{Method, RequestBuilder};
use serde_json::json;

use crate::client::{Api, PATIENCE, assert_error, config, json as reply, start, start_with};

fn weights(api: &Api, query: &str) -> RequestBuilder {
    api.request(Method::POST, &format!("/v1/training/weights?{query}"))
        .header("content-type", "application/octet-stream")
}

#[tokio::test]
async fn training_is_told_and_its_curve_drawn_in_the_form_that_was_asked_for() {
    let api = start().await;
    assert_eq!(api.get("/v1/training").await, (200, json!({ "role": "trainer", "step": 3 })));
    assert_error(&api.get("/v1/training/curve").await, 404, "no_training");
    assert_error(&api.get("/v1/training/curve?form=png").await, 400, "invalid_value");
    assert_error(&api.get("/v1/training/curve?size=9").await, 400, "unknown_field");
    let csv = api.raw("GET /v1/training/curve?form=csv HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
    assert!(csv.contains("text/csv") && csv.ends_with("step,seconds\n"), "{csv}");
}

#[tokio::test]
async fn a_batch_is_numbers_with_its_step_and_its_absence_is_said_in_time() {
    let api = start().await;
    let begun = Instant::now();
    let none = api.request(Method::GET, "/v1/training/batch?wait_s=1").send().await.unwrap();
    assert_eq!(none.status(), 204);
    assert!(begun.elapsed() >= Duration::from_secs(1), "it waits");
    for bad in ["wait_s=61", "wait_s=-1", "wait_s=x"] {
        assert_error(&api.get(&format!("/v1/training/batch?{bad}")).await, 400, "invalid_value");
    }
    assert_error(&api.get("/v1/training/batch?wait=1").await, 400, "unknown_field");
    *api.rote.batch.lock().unwrap() = Some(7);
    for path in ["/v1/training/batch", "/v1/training/weights"] {
        let response = api.request(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["content-type"], "application/octet-stream");
        assert_eq!(response.headers()["x-chorus-step"], "7");
        let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
        let body = response.bytes().await.unwrap();
        assert_eq!(body, if path.ends_with("batch") { "columns" } else { "halfhalf" });
        assert_eq!(length, body.len());
    }
}

#[tokio::test]
async fn who_waits_for_a_batch_is_sent_away_when_the_node_ends() {
    let mut api = start().await;
    let waiting = tokio::spawn(api.request(Method::GET, "/v1/training/batch?wait_s=60").send());
    tokio::time::sleep(Duration::from_millis(100)).await;
    api.shutdown.cancel();
    tokio::time::timeout(PATIENCE / 2, api.bound.take().unwrap().stopped()).await.unwrap();
    let (status, body) = reply(waiting.await.unwrap().unwrap()).await;
    assert_error(&(status, body), 503, "shutting_down");
}

#[tokio::test]
async fn evidence_comes_as_the_bytes_that_it_is_or_the_reason_why_it_does_not() {
    let api = start().await;
    let hash = "ab".repeat(32);
    let response = api.request(Method::GET, &format!("/v1/training/evidence/{hash}")).send().await.unwrap();
    assert_eq!(
        (response.status().as_u16(), response.headers()["content-type"].to_str().unwrap()),
        (200, "application/octet-stream")
    );
    assert_eq!(response.bytes().await.unwrap(), vec![0xab; 32]);
    let none = api.get(&format!("/v1/training/evidence/{}", "00".repeat(32))).await;
    assert_error(&none, 404, "no_evidence");
    assert_error(&api.get("/v1/training/evidence/12").await, 400, "invalid_value");
}

#[tokio::test]
async fn weights_are_taken_for_the_step_that_waits_and_for_no_other() {
    let api = start().await;
    assert_error(&api.get("/v1/training/weights").await, 409, "not_external");
    let early = reply(weights(&api, "step=7").body("abc").send().await.unwrap()).await;
    assert_error(&early, 409, "other_step");
    *api.rote.batch.lock().unwrap() = Some(7);
    let other = reply(weights(&api, "step=6").body("abc").send().await.unwrap()).await;
    assert_error(&other, 409, "other_step");
    assert!(other.1["error"]["message"].as_str().unwrap().contains("step=7"), "it says which is expected: {}", other.1);
    for (query, code) in [
        ("", "missing_field"),
        ("step=x", "invalid_value"),
        ("step=7&gradient=NaN", "invalid_value"),
        ("step=7&importance=-1", "invalid_value"),
        ("step=7&loss=1", "unknown_field"),
    ] {
        assert_error(&reply(weights(&api, query).body("abc").send().await.unwrap()).await, 400, code);
    }
    let json = reply(api.request(Method::POST, "/v1/training/weights?step=7").json(&json!({})).send().await.unwrap());
    assert_error(&json.await, 415, "unsupported_media_type");
    assert!(api.rote.learned.lock().unwrap().is_empty());
    let taken = weights(&api, "step=7&gradient=0.5&importance=1.25").body("abc").send().await.unwrap();
    assert_eq!(reply(taken).await, (200, json!({ "step": 8 })));
    let update = Update { step: 7, gradient: 0.5, importance: 1.25 };
    assert_eq!(*api.rote.learned.lock().unwrap(), [(update, 3)]);
}

#[tokio::test]
async fn weights_have_a_limit_of_their_own_whether_announced_or_not() {
    let api = start_with(ApiConfig { max_body_bytes: 100, max_weights_bytes: 1_000, ..config() }).await;
    *api.rote.batch.lock().unwrap() = Some(0);
    for (len, status) in [(900, 200), (1_000, 200), (1_001, 413)] {
        let announced = weights(&api, "step=0").body(vec![0; len]).send().await.unwrap();
        assert_eq!(announced.status(), status, "{len} announced");
        let pieces = vec![0; len].chunks(100).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect::<Vec<_>>();
        let body = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
        let in_pieces = reply(weights(&api, "step=0").body(body).send().await.unwrap()).await;
        assert_eq!(in_pieces.0, status, "{len} in pieces: {}", in_pieces.1);
    }
    assert_eq!(api.rote.learned.lock().unwrap().len(), 4);
}
