//! The commands' side of the local API.

use std::time::Duration;

use futures::StreamExt;
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::Value;

use crate::config::Config;
use crate::error::{CommandError, Kind};
use crate::process::RUN_FILE;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
const FETCH_TIMEOUT: Duration = Duration::from_secs(130);
/// How long an event stream may be silent. The API sends a comment every five seconds when it has nothing to say.
const SILENCE: Duration = Duration::from_secs(16);
/// The longest line that an event stream may hold.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// A connection to the node that this configuration describes.
pub(crate) struct ApiClient {
    http: Client,
    base: String,
    token: String,
}

/// One server-sent event.
pub(crate) struct SseEvent {
    /// The event's id; a later connection can resume behind it.
    pub id: Option<String>,
    /// The event's data.
    pub data: Value,
}

impl ApiClient {
    pub(crate) fn new(config: &Config) -> Result<Self, CommandError> {
        let http =
            Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy().build().map_err(CommandError::machine)?;
        Ok(Self { http, base: format!("http://{}", address(config)), token: config.api.token.clone() })
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value, CommandError> {
        let request = self.http.get(format!("{}{path}", self.base)).timeout(REQUEST_TIMEOUT);
        Self::json(self.send(request).await?).await
    }

    /// Gets what is not JSON, as it is.
    pub(crate) async fn text(&self, path: &str) -> Result<String, CommandError> {
        let request = self.http.get(format!("{}{path}", self.base)).timeout(REQUEST_TIMEOUT);
        self.send(request).await?.text().await.map_err(CommandError::machine)
    }

    /// Gets bytes for which the node may have to ask others.
    pub(crate) async fn bytes(&self, path: &str) -> Result<Vec<u8>, CommandError> {
        let request = self.http.get(format!("{}{path}", self.base)).timeout(FETCH_TIMEOUT);
        self.send(request).await?.bytes().await.map(Into::into).map_err(CommandError::machine)
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, CommandError> {
        let request = self.http.post(format!("{}{path}", self.base)).timeout(REQUEST_TIMEOUT).json(body);
        Self::json(self.send(request).await?).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), CommandError> {
        let request = self.http.delete(format!("{}{path}", self.base)).timeout(REQUEST_TIMEOUT);
        self.send(request).await.map(|_| ())
    }

    /// Follows an event stream from behind `last` until `on_event` returns `false` or the server ends it.
    pub(crate) async fn events(
        &self,
        path: &str,
        last: Option<&str>,
        mut on_event: impl FnMut(SseEvent) -> bool,
    ) -> Result<(), CommandError> {
        let mut request = self.http.get(format!("{}{path}", self.base));
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let mut body = self.send(request).await?.bytes_stream();
        let mut pending = Vec::new();
        while let Some(piece) = self.piece(body.next()).await? {
            pending.extend_from_slice(&piece);
            while let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = pending.drain(..end + 2).collect();
                if let Some(event) = parse_event(&String::from_utf8_lossy(&block))
                    && !on_event(event)
                {
                    return Ok(());
                }
            }
            if pending.len() > MAX_EVENT_BYTES {
                return Err(CommandError::failed("the node sent an event that is too long"));
            }
        }
        Ok(())
    }

    /// Waits for the next piece of an event stream, which may be a comment.
    async fn piece(
        &self,
        next: impl Future<Output = Option<reqwest::Result<impl Into<Vec<u8>>>>>,
    ) -> Result<Option<Vec<u8>>, CommandError> {
        match tokio::time::timeout(SILENCE, next).await {
            Ok(piece) => {
                let piece = piece.transpose();
                let piece = piece.map_err(|error| CommandError::failed(format!("the stream of events broke: {error}")));
                Ok(piece?.map(Into::into))
            }
            Err(_) => Err(CommandError::failed(format!("the node at {} fell silent for {SILENCE:?}", self.base))
                .hint("it may be stopped, or its machine overloaded: `chorus doctor` says what blocks it")),
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, CommandError> {
        let request = if self.token.is_empty() { request } else { request.bearer_auth(&self.token) };
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        let message = body["error"]["message"].as_str().unwrap_or("no reason given").to_owned();
        let kind = if status == StatusCode::BAD_REQUEST { Kind::Usage } else { Kind::Failed };
        Err(CommandError::new(kind, message))
    }

    async fn json(response: Response) -> Result<Value, CommandError> {
        response.json().await.map_err(|error| CommandError::failed(format!("the node's answer is no JSON: {error}")))
    }

    fn unreachable(&self, error: &reqwest::Error) -> CommandError {
        if error.is_timeout() && !error.is_connect() {
            return CommandError::failed(format!("the node at {} did not answer in time", self.base))
                .hint("`chorus doctor` says what blocks it");
        }
        CommandError::new(Kind::NotRunning, format!("no node answers at {}", self.base))
            .hint("start one with `chorus node run`, or name another with --instance N or --api IP:PORT")
    }
}

/// Where the node listens: as configured, or, where the system chose the port, as the running node wrote it down.
fn address(config: &Config) -> String {
    if config.api.listen.port() == 0 {
        let text = std::fs::read_to_string(config.data_dir.join(RUN_FILE)).unwrap_or_default();
        let run: Value = serde_json::from_str(&text).unwrap_or_default();
        if let Some(api) = run["api"].as_str() {
            return api.to_owned();
        }
    }
    config.api.listen.to_string()
}

fn parse_event(block: &str) -> Option<SseEvent> {
    let (mut id, mut data) = (None, String::new());
    for line in block.lines() {
        if let Some(value) = line.strip_prefix("id:") {
            id = Some(value.trim().to_owned());
        } else if let Some(value) = line.strip_prefix("data:") {
            data.push_str(value.trim_start());
        }
    }
    if data.is_empty() {
        return None;
    }
    serde_json::from_str(&data).ok().map(|data| SseEvent { id, data })
}
