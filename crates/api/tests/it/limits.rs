//! Sizes, numbers and times.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chorus_api::ApiConfig;
use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{PATIENCE, assert_error, config, eventually, json as reply, read_events, start_with};

const SHORT: Duration = Duration::from_millis(250);

#[tokio::test]
async fn a_body_is_limited_whether_announced_or_not() {
    let api = start_with(ApiConfig { max_body_bytes: 1_000, ..config() }).await;
    let body = |len: usize| json!({ "question": "x".repeat(len) }).to_string();
    for (len, status) in [(900, 202), (1_001, 413), (50_000, 413), (5_000_000, 413)] {
        let post = || api.request(Method::POST, "/v1/tasks").header("content-type", "application/json");
        // A client may be cut off while it still sends; then it has seen no answer, but the task was not taken either.
        if let Ok(response) = post().body(body(len)).send().await {
            assert_eq!(response.status(), status, "{len} announced");
        } else {
            assert!(len > 1_000_000, "{len} announced");
        }
        let pieces = futures::stream::iter(
            body(len).into_bytes().chunks(100).map(<[u8]>::to_vec).map(Ok::<_, std::io::Error>).collect::<Vec<_>>(),
        );
        if let Ok(response) = post().body(reqwest::Body::wrap_stream(pieces)).send().await {
            assert_eq!(response.status(), status, "{len} in pieces");
        } else {
            assert!(len > 1_000_000, "{len} in pieces");
        }
    }
    assert_eq!(api.rote.specs.lock().unwrap().len(), 2);
    // Refused by its announcement alone, before a byte of it is sent.
    let announced =
        "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1001\r\n\r\n";
    let answer = api.raw(announced).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"), "{answer}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let api = start_with(ApiConfig { body_timeout: SHORT, ..config() }).await;
    let half =
        "POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    let answer = api.raw(half).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"), "{answer}");
}

#[tokio::test]
async fn a_head_that_drips_is_not_waited_for() {
    let api = start_with(ApiConfig { idle_timeout: SHORT, ..config() }).await;
    let mut socket = api.socket().await;
    let started = Instant::now();
    let mut dripped = 0;
    for byte in
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
            .iter()
            .cycle()
    {
        if socket.write_all(&[*byte]).await.is_err() {
            break;
        }
        dripped += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(started.elapsed() < PATIENCE, "{dripped} bytes and still open");
    }
    assert!(started.elapsed() >= SHORT);
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let api = start_with(ApiConfig { idle_timeout: SHORT, ..config() }).await;
    let mut idle = api.socket().await;
    let started = Instant::now();
    let mut nothing = Vec::new();
    tokio::time::timeout(PATIENCE, idle.read_to_end(&mut nothing)).await.unwrap().unwrap();
    assert!(started.elapsed() >= SHORT && nothing.is_empty());
    // Longer than the idle time, and not closed, because something is under way.
    let body = json!({ "model": "tiny/model", "stream": true, "messages": [{ "role": "user", "content": "slow" }] });
    let started = Instant::now();
    let response = api.request(Method::POST, "/v1/chat/completions").json(&body).send().await.unwrap();
    assert_eq!(read_events(response, 40).await.len(), 40);
    assert!(started.elapsed() > SHORT * 2);
    // Kept alive between requests that come in time, for longer than the idle time in all.
    let mut socket = api.socket().await;
    for _ in 0..4 {
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut answer = [0; 512];
        let len = socket.read(&mut answer).await.unwrap();
        assert!(String::from_utf8_lossy(&answer[..len]).starts_with("HTTP/1.1 200"));
        tokio::time::sleep(SHORT / 2).await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let api = start_with(ApiConfig { write_timeout: SHORT, ..config() }).await;
    let task = chorus_protocol::TaskId::from_bytes([3; 16]);
    api.rote.tasks.open(task, chorus_api::TaskMeta { question: "x".repeat(400), ..Default::default() }).unwrap();
    let mut socket = api.socket().await;
    // Pipelined requests whose answers nobody reads, until the socket's buffers are full.
    let request = "GET /v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1_000);
    let flooded = tokio::time::timeout(PATIENCE, async { while socket.write_all(request.as_bytes()).await.is_ok() {} });
    assert!(flooded.await.is_ok(), "the connection is still open");
    assert_eq!(api.get("/healthz").await.0, 200);
}

#[tokio::test]
async fn completions_and_streams_are_limited_in_number() {
    let api = start_with(ApiConfig { max_generations: 2, max_streams: 1, ..config() }).await;
    let body = json!({ "model": "tiny/model", "stream": true, "messages": [{ "role": "user", "content": "slow" }] });
    let post = || api.request(Method::POST, "/v1/chat/completions").json(&body).send();
    let held: Vec<_> = join_all([post(), post()]).await.into_iter().map(Result::unwrap).collect();
    assert!(held.iter().all(|response| response.status() == 200));
    let refused = post().await.unwrap();
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_error(&reply(refused).await, 429, "overloaded");
    // What does not generate is still answered.
    assert_eq!(api.get("/v1/status").await.0, 200);
    drop(held);
    eventually("both to stop", || api.rote.stopped.load(Ordering::SeqCst) == 2).await;
    assert_eq!(post().await.unwrap().status(), 200);

    let (_, task) = api.post("/v1/tasks", &json!({ "question": "slow" })).await;
    let path = task["events"].as_str().unwrap();
    let first = api.request(Method::GET, path).send().await.unwrap();
    assert_eq!(first.status(), 200);
    assert_error(&api.get(path).await, 429, "overloaded");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_their_turn() {
    let api = start_with(ApiConfig { max_connections: 2, idle_timeout: SHORT, ..config() }).await;
    let (_first, _second) = (api.socket().await, api.socket().await);
    let started = Instant::now();
    assert_eq!(api.get("/healthz").await.0, 200);
    assert!(started.elapsed() >= SHORT / 2, "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_node_that_hangs_is_not_waited_for() {
    let api = start_with(ApiConfig { request_timeout: SHORT, ..config() }).await;
    api.rote.hang.store(true, Ordering::SeqCst);
    let answer = api.get("/v1/status").await;
    assert_error(&answer, 504, "timeout");
    assert!(answer.1["error"]["message"].as_str().unwrap().contains("the status"), "{}", answer.1);
}
