//! The engine over HTTP, against a small server made here.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

use super::*;
use crate::{Finish, OpenAiConfig, OpenAiEngine};

/// What the server does with `POST /v1/chat/completions`.
#[derive(Clone)]
enum Reply {
    /// Streams these events, then closes.
    Events(Vec<String>),
    /// Streams these events, then goes silent without closing.
    Silence(Vec<String>),
    /// Answers with a status and a body.
    Status(u16, String),
}

struct Server {
    url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(reply: Reply) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, reply.clone(), Arc::clone(&seen)));
            }
        });
        Self { url, requests }
    }

    async fn engine(&self) -> OpenAiEngine {
        let mut config = OpenAiConfig::new(&self.url, "m");
        config.api_key = Some("secret".to_owned());
        config.token_timeout = Duration::from_millis(200);
        config.first_token_timeout = Duration::from_millis(400);
        OpenAiEngine::connect(config).await.unwrap()
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let mut buffer = [0u8; 4096];
        let read = stream.read(&mut buffer).await.ok()?;
        bytes.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Some(text);
            }
        }
        if read == 0 {
            return None;
        }
    }
}

async fn serve(mut stream: TcpStream, reply: Reply, seen: Arc<Mutex<Vec<String>>>) {
    let Some(request) = read_request(&mut stream).await else { return };
    let is_list = request.starts_with("GET /v1/models");
    seen.lock().await.push(request);
    if is_list {
        let body = r#"{"object":"list","data":[{"id":"m"},{"id":"n"}]}"#;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
        drop(stream.write_all((head + body).as_bytes()).await);
        return;
    }
    const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    match reply {
        Reply::Status(status, body) => {
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            drop(stream.write_all((head + &body).as_bytes()).await);
        }
        Reply::Events(events) | Reply::Silence(events) if events.is_empty() => {
            drop(stream.write_all(STREAM.as_bytes()).await);
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        Reply::Events(ref events) | Reply::Silence(ref events) => {
            drop(stream.write_all(STREAM.as_bytes()).await);
            for event in events {
                drop(stream.write_all(format!("data: {event}\n\n").as_bytes()).await);
                drop(stream.flush().await);
            }
            if matches!(reply, Reply::Silence(_)) {
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        }
    }
}

fn text(content: &str) -> String {
    serde_json::json!({ "choices": [{ "index": 0, "delta": { "content": content }, "finish_reason": null,
        "logprobs": { "content": [{ "token": content, "logprob": -0.5 }] } }] })
    .to_string()
}

fn last(reason: &str) -> String {
    serde_json::json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": reason }] }).to_string()
}

#[tokio::test]
async fn an_answer_is_streamed_from_an_endpoint() {
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3}}"#;
    let events = vec![text("Hel"), text("lo"), text(" é"), last("length"), usage.to_owned(), "[DONE]".to_owned()];
    let server = Server::start(Reply::Events(events)).await;
    let engine = server.engine().await;
    let request = GenerateRequest {
        logprobs: true,
        json_schema: Some(r#"{"type":"string"}"#.to_owned()),
        sampling: Sampling { seed: 9, temperature: 0.5, top_p: 0.75, top_k: 3 },
        ..ask("hi", 3)
    };
    let (answer, pieces) = stream(&engine, request).await;
    let answer = answer.unwrap();
    assert_eq!((answer.text.as_str(), pieces.concat().as_str()), ("Hello é", "Hello é"));
    assert_eq!(answer.finish, Finish::Length);
    assert_eq!((answer.prompt_tokens, answer.completion_tokens), (11, 3));
    assert_eq!(answer.logprobs, [-0.5; 3]);
    assert!(answer.token_ids.is_empty());

    let requests = server.requests.lock().await;
    let (head, body) = requests[1].split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
    assert!(head.to_ascii_lowercase().contains("authorization: bearer secret"), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["messages"][0]["content"], "hi");
    assert_eq!((&body["seed"], &body["top_k"], &body["max_tokens"]), (&9.into(), &3.into(), &3.into()));
    assert_eq!(body["temperature"].as_f64(), Some(0.5));
    assert_eq!(body["response_format"]["json_schema"]["schema"]["type"], "string");
    assert!(!format!("{engine:?}").contains("secret"));
}

#[tokio::test]
async fn an_unknown_model_and_a_closed_port_are_found_when_connecting() {
    let server = Server::start(Reply::Events(Vec::new())).await;
    let error = OpenAiEngine::connect(OpenAiConfig::new(&server.url, "other")).await.unwrap_err();
    assert!(error.to_string().contains("m, n"), "{error}");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let error = OpenAiEngine::connect(OpenAiConfig::new(closed, "m")).await.unwrap_err();
    assert!(matches!(error, EngineError::Unreachable { .. }) && error.is_retryable(), "{error}");
    let error = OpenAiEngine::connect(OpenAiConfig::new("ftp://x", "m")).await.unwrap_err();
    assert!(matches!(error, EngineError::InvalidRequest { .. }), "{error}");
}

#[tokio::test]
async fn errors_of_the_endpoint_are_typed() {
    let busy = r#"{"error":{"message":"too many","type":"rate"}}"#;
    let long = r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#;
    let cases: [(u16, &str, fn(&EngineError) -> bool); 4] = [
        (429, busy, |e| {
            matches!(e, EngineError::Remote { status: 429, message } if message == "too many") && e.is_retryable()
        }),
        (500, "oops", |e| matches!(e, EngineError::Remote { status: 500, .. }) && e.is_retryable()),
        (401, "no", |e| {
            matches!(e, EngineError::Remote { status: 401, .. }) && !e.is_retryable() && e.is_retryable_elsewhere()
        }),
        (400, long, |e| matches!(e, EngineError::ContextExceeded { .. }) && e.is_retryable_elsewhere()),
    ];
    for (status, body, expected) in cases {
        let server = Server::start(Reply::Status(status, body.to_owned())).await;
        let error = run(&server.engine().await, ask("hi", 3)).await.unwrap_err();
        assert!(expected(&error), "{status}: {error}");
    }
}

#[tokio::test]
async fn a_broken_silent_or_senseless_endpoint_is_an_error_and_never_a_short_answer() {
    let broken = Server::start(Reply::Events(vec![text("half")])).await;
    let error = run(&broken.engine().await, ask("hi", 3)).await.unwrap_err();
    assert!(matches!(error, EngineError::Unreachable { .. }), "{error}");
    for events in [vec![], vec![text("half")]] {
        let silent = Server::start(Reply::Silence(events)).await;
        let error = run(&silent.engine().await, ask("hi", 3)).await.unwrap_err();
        assert!(matches!(error, EngineError::Timeout { .. }), "{error}");
    }
    for nonsense in ["not json".to_owned(), "x".repeat(300 << 10)] {
        let server = Server::start(Reply::Silence(vec![nonsense])).await;
        let error = run(&server.engine().await, ask("hi", 3)).await.unwrap_err();
        assert!(matches!(error, EngineError::Unreachable { .. }), "{error}");
    }
    let failing = Server::start(Reply::Silence(vec![r#"{"error":{"message":"died"}}"#.to_owned()])).await;
    let error = run(&failing.engine().await, ask("hi", 3)).await.unwrap_err();
    assert!(matches!(&error, EngineError::Remote { message, .. } if message == "died"), "{error}");
}

#[tokio::test]
async fn cancelling_ends_a_remote_answer() {
    let server = Server::start(Reply::Silence(vec![text("a")])).await;
    let engine = server.engine().await;
    let (sender, mut receiver) = mpsc::channel(1);
    let cancel = CancellationToken::new();
    let generating = engine.generate(ask("hi", 3), sender, cancel.clone());
    let (answer, ()) = tokio::join!(generating, async {
        receiver.recv().await.unwrap();
        cancel.cancel();
    });
    let answer = answer.unwrap();
    assert_eq!((answer.finish, answer.text.as_str()), (Finish::Cancelled, "a"));
}
