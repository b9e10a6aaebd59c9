//! What the node says of itself: `/v1/status`, `/v1/peers`, `/v1/ledger`, `/metrics` and `/healthz`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chorus_protocol::entry::Body;
use chorus_protocol::{Hash, NodeId};
use serde_json::{Value, json};

use crate::app::{App, read_body, within};
use crate::backend::LedgerFilter;
use crate::error::Fault;
use crate::fields::{self, Fields};
use crate::metrics::CONTENT_TYPE;

/// Entries of a page when the request does not say.
const DEFAULT_PAGE: usize = 1_000;
/// Entries of a page at most.
const MAX_PAGE: usize = 10_000;
/// Characters of a cursor.
const MAX_CURSOR_CHARS: usize = 128;

/// `GET /v1/status`.
pub(crate) async fn status(State(app): State<App>) -> Result<Json<Value>, Fault> {
    within(app.cfg.request_timeout, "the status", app.backend.status()).await.map(Json)
}

/// `GET /v1/peers`.
pub(crate) async fn peers(State(app): State<App>) -> Result<Json<Value>, Fault> {
    let peers = within(app.cfg.request_timeout, "the list of peers", app.backend.peers()).await?;
    Ok(Json(json!({ "object": "list", "peers": peers })))
}

/// `POST /v1/peers/{node}` with `{"blocked": true | false}`.
pub(crate) async fn set_blocked(
    State(app): State<App>,
    Path(node): Path<String>,
    request: Request,
) -> Result<Json<Value>, Fault> {
    let node = node_id("node", &node)?;
    let body = fields::parse(&read_body(&app, request).await?)?;
    let fields = Fields::root(&body)?;
    fields.only(&["blocked"])?;
    fields.required("blocked")?;
    let blocked = fields.bool("blocked")?;
    within(app.cfg.request_timeout, "blocking the node", app.backend.set_blocked(node, blocked)).await?;
    Ok(Json(json!({ "node": node, "blocked": blocked })))
}

fn node_id(field: &str, text: &str) -> Result<NodeId, Fault> {
    text.parse().map_err(|error| Fault::field(field, "invalid_value", format!("{error}")))
}

/// `GET /v1/ledger?kind=…&author=…&after=…&limit=…`.
pub(crate) async fn ledger(
    State(app): State<App>,
    Query(params): Query<BTreeMap<String, String>>,
) -> Result<Json<Value>, Fault> {
    let filter = filter(&params)?;
    let page = within(app.cfg.request_timeout, "the ledger", app.backend.ledger(filter)).await?;
    Ok(Json(json!({ "object": "list", "entries": page.entries, "total": page.total, "next": page.next })))
}

fn filter(params: &BTreeMap<String, String>) -> Result<LedgerFilter, Fault> {
    let mut filter = LedgerFilter { limit: DEFAULT_PAGE, ..LedgerFilter::default() };
    for (name, value) in params {
        let wrong = |what: &str| Fault::field(name.clone(), "invalid_value", format!("'{name}' must be {what}"));
        match name.as_str() {
            "kind" if Body::KINDS.contains(&value.as_str()) => filter.kind = Some(value.clone()),
            "kind" => return Err(wrong(&format!("one of: {}", Body::KINDS.join(", ")))),
            "author" => filter.author = Some(node_id("author", value)?),
            "after" if value.len() <= MAX_CURSOR_CHARS => filter.after = Some(value.clone()),
            "after" => return Err(wrong("the 'next' of the page before")),
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit));
                filter.limit = limit.ok_or_else(|| wrong("a number between 1 and 10000"))?;
            }
            _ => {
                let message = format!("unknown parameter '{name}'; known here are: kind, author, after, limit");
                return Err(Fault::field(name.clone(), "unknown_field", message));
            }
        }
    }
    Ok(filter)
}

/// `GET /v1/ledger/{hash}`.
pub(crate) async fn ledger_entry(State(app): State<App>, Path(hash): Path<String>) -> Result<Json<Value>, Fault> {
    let hash: Hash = hash.parse().map_err(|_| {
        let message = "an entry's hash is 64 hexadecimal digits; GET /v1/ledger lists them";
        Fault::field("hash", "invalid_value", message)
    })?;
    within(app.cfg.request_timeout, "the ledger", app.backend.ledger_entry(hash)).await.map(Json)
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, Fault> {
    let node = async { Ok(app.backend.metrics().await) };
    let mut text = within(app.cfg.request_timeout, "the metrics", node).await?;
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&app.metrics.render());
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}

/// `GET /healthz`: 200 when the node is ready for work, else 503 with what is waited for.
pub(crate) async fn health(State(app): State<App>) -> Response {
    let waiting_for = app.backend.health().waiting_for;
    let (status, word) = match waiting_for.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
    };
    (status, Json(json!({ "status": word, "waiting_for": waiting_for }))).into_response()
}
