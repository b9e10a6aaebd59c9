//! A running API, and a client of it.

use std::sync::Arc;
use std::time::Duration;

use chorus_api::{ApiConfig, BoundApi, serve};
use futures::StreamExt;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::backend::{Face, Rote};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Api {
    pub rote: Arc<Rote>,
    pub http: reqwest::Client,
    pub base: String,
    pub shutdown: CancellationToken,
    pub bound: Option<BoundApi>,
}

impl Drop for Api {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub fn config() -> ApiConfig {
    ApiConfig::new("127.0.0.1:0".parse().unwrap())
}

pub async fn start() -> Api {
    start_with(config()).await
}

pub async fn start_with(cfg: ApiConfig) -> Api {
    start_on(cfg, Rote::default()).await
}

pub async fn start_on(cfg: ApiConfig, rote: Rote) -> Api {
    let rote = Arc::new(rote);
    let shutdown = CancellationToken::new();
    let bound = serve(cfg, Arc::new(Face(Arc::clone(&rote))), shutdown.clone()).await.unwrap();
    let base = format!("http://{}", bound.local_addr());
    let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
    Api { rote, http, base, shutdown, bound: Some(bound) }
}

impl Api {
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        json(self.request(Method::GET, path).send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        json(self.request(Method::POST, path).json(body).send().await.unwrap()).await
    }

    pub async fn delete(&self, path: &str) -> (u16, Value) {
        json(self.request(Method::DELETE, path).send().await.unwrap()).await
    }

    /// Posts, and returns the data of every event of the answer.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let response = self.request(Method::POST, path).json(body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        events(response).await.into_iter().map(|event| event.data).collect()
    }

    /// Sends bytes as they are, and returns everything that comes back until the connection closes.
    pub async fn raw(&self, request: &str) -> String {
        let mut socket = self.socket().await;
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(PATIENCE, socket.read_to_end(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub async fn socket(&self) -> TcpStream {
        TcpStream::connect(self.bound.as_ref().unwrap().local_addr()).await.unwrap()
    }
}

pub async fn json(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// One server-sent event.
#[derive(Clone, Debug, PartialEq)]
pub struct Sse {
    pub id: Option<u64>,
    pub data: String,
}

/// Reads a stream to its end.
pub async fn events(response: Response) -> Vec<Sse> {
    read_events(response, usize::MAX).await
}

/// Reads a stream until it has brought `count` events, and drops it.
pub async fn read_events(response: Response, count: usize) -> Vec<Sse> {
    let mut pieces = response.bytes_stream();
    let (mut pending, mut events) = (String::new(), Vec::new());
    while events.len() < count
        && let Some(piece) = pieces.next().await
    {
        pending.push_str(&String::from_utf8_lossy(&piece.unwrap()));
        while let Some(end) = pending.find("\n\n") {
            let block: String = pending.drain(..end + 2).collect();
            events.extend(parse(&block));
        }
    }
    events.truncate(count);
    events
}

fn parse(block: &str) -> Option<Sse> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some(Sse { id: field("id:").map(|id| id.parse().unwrap()), data: field("data:")?.to_owned() })
}

/// Waits until something holds.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not happen");
}

/// Asserts that a reply is an error of OpenAI's shape.
pub fn assert_error(reply: &(u16, Value), status: u16, code: &str) {
    let (got, body) = reply;
    assert_eq!(*got, status, "{body}");
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
    assert_eq!(error["code"], code, "{body}");
    assert!(error["message"].as_str().unwrap().len() > 10, "{body}");
    assert!(error["type"].is_string() && error.contains_key("param"), "{body}");
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
}
