//! What the node says of itself.

use std::sync::atomic::Ordering;

use reqwest::Method;
use serde_json::json;

use crate::backend::node;
use crate::client::{assert_error, start};

#[tokio::test]
async fn status_and_peers_are_passed_on() {
    let api = start().await;
    assert_eq!(api.get("/v1/status").await, (200, json!({ "node": node(1), "peers": 2 })));
    assert_eq!(api.get("/v1/peers").await, (200, json!({ "object": "list", "peers": [{ "node": node(2) }] })));
    let path = format!("/v1/peers/{}", node(2));
    let (status, body) = api.post(&path, &json!({ "blocked": true })).await;
    assert_eq!((status, body), (200, json!({ "node": node(2), "blocked": true })));
    assert_error(&api.post(&path, &json!({})).await, 400, "missing_field");
    assert_error(&api.post(&path, &json!({ "blocked": "yes" })).await, 400, "invalid_type");
    assert_error(&api.post("/v1/peers/nobody", &json!({ "blocked": true })).await, 400, "invalid_value");
    assert_error(
        &api.post(&format!("/v1/peers/{}", node(3)), &json!({ "blocked": true })).await,
        404,
        "peer_not_found",
    );
}

#[tokio::test]
async fn the_ledger_is_read_page_by_page() {
    let api = start().await;
    let page = json!({ "object": "list", "entries": [{ "seq": 1 }], "total": 5, "next": "abc" });
    assert_eq!(api.get("/v1/ledger").await, (200, page));
    let path = format!("/v1/ledger?kind=receipt&author={}&after=abc&limit=7", node(2));
    assert_eq!(api.get(&path).await.0, 200);
    let filters = api.rote.filters.lock().unwrap().clone();
    assert_eq!((filters[0].limit, filters[0].kind.as_deref(), filters[0].after.as_deref()), (1_000, None, None));
    assert_eq!((filters[1].limit, filters[1].author), (7, Some(node(2))));
    assert_eq!((filters[1].kind.as_deref(), filters[1].after.as_deref()), (Some("receipt"), Some("abc")));
    for bad in ["kind=rumour", "author=ann", "limit=0", "limit=99999", "limit=x"] {
        assert_error(&api.get(&format!("/v1/ledger?{bad}")).await, 400, "invalid_value");
    }
    assert_error(&api.get("/v1/ledger?sort=up").await, 400, "unknown_field");
    let hash = "0".repeat(64);
    assert_eq!(api.get(&format!("/v1/ledger/{hash}")).await, (200, json!({ "hash": hash })));
    assert_error(&api.get(&format!("/v1/ledger/{}", "1".repeat(64))).await, 404, "entry_not_found");
    assert_error(&api.get("/v1/ledger/abc").await, 400, "invalid_value");
}

#[tokio::test]
async fn health_says_what_is_waited_for() {
    let api = start().await;
    assert_eq!(api.get("/healthz").await, (200, json!({ "status": "ok", "waiting_for": [] })));
    api.rote.starting.store(true, Ordering::SeqCst);
    assert_eq!(api.get("/healthz").await, (503, json!({ "status": "starting", "waiting_for": ["the model"] })));
    // A model that is not there yet is no unknown model.
    let chat = json!({ "model": "tiny/model", "messages": [{ "role": "user", "content": "Hello" }] });
    assert_error(&api.post("/v1/chat/completions", &chat).await, 503, "starting");
    assert_error(&api.post("/v1/embeddings", &json!({ "model": "mini", "input": "a" })).await, 503, "starting");
    api.rote.starting.store(false, Ordering::SeqCst);
    assert_eq!(api.post("/v1/chat/completions", &chat).await.0, 200);
}

#[tokio::test]
async fn metrics_are_the_nodes_and_the_apis() {
    let api = start().await;
    api.get("/v1/models").await;
    api.get("/v1/models/nobody").await;
    api.get("/no/such/route").await;
    let response = api.request(Method::GET, "/metrics").send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    for line in [
        "chorus_peers 2",
        "chorus_http_requests_total{method=\"GET\",route=\"/v1/models\",status=\"200\"} 1",
        "chorus_http_requests_total{method=\"GET\",route=\"/v1/models/{*model}\",status=\"404\"} 1",
        "chorus_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"} 1",
        "chorus_http_head_seconds_count{route=\"/v1/models\"} 1",
        "chorus_http_active_requests 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_said() {
    let api = start().await;
    assert_error(&api.get("/v2/models").await, 404, "unknown_route");
    let response = api.request(Method::DELETE, "/v1/models").send().await.unwrap();
    assert_eq!(response.headers()["allow"], "GET,HEAD");
    assert_error(&crate::client::json(response).await, 405, "method_not_allowed");
    let response = api.request(Method::GET, "/v1/models").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"].len(), 32);
    assert!(response.headers().contains_key("content-length"));
    let head = api.request(Method::HEAD, "/healthz").send().await.unwrap();
    assert_eq!(head.status(), 200);
}
