//! Every request gets an id, a line in the log and a place in the metrics.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use chorus_protocol::TaskId;
use futures::StreamExt;
use tracing::Instrument;

use crate::app::App;
use crate::guard;
use crate::listener::{Busy, ConnectionHandle};
use crate::metrics::{Counter, Desc, Gauge, Histogram, Registry, SECONDS, Series};

/// The header by which a request is found in the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The route label of requests that match none.
const NO_ROUTE: &str = "none";

const REQUESTS: Desc =
    Desc::new("chorus_http_requests_total", "Requests that were answered.").labels(&["method", "route", "status"]);
const HEAD_SECONDS: Desc =
    Desc::new("chorus_http_head_seconds", "Time from a request's head to its answer's head.").labels(&["route"]);
const ACTIVE: Desc = Desc::new("chorus_http_active_requests", "Requests whose answer is not yet whole.");

/// The API's own metrics.
#[derive(Debug)]
pub(crate) struct HttpMetrics {
    registry: Registry,
    requests: Arc<Series<Counter>>,
    head: Arc<Series<Histogram>>,
    active: Arc<Gauge>,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        let registry = Registry::default();
        Self {
            requests: registry.counters(&REQUESTS),
            head: registry.histograms(&HEAD_SECONDS, SECONDS),
            active: registry.gauge(&ACTIVE),
            registry,
        }
    }
}

impl HttpMetrics {
    pub(crate) fn render(&self) -> String {
        self.registry.render()
    }
}

/// What lasts for as long as an answer is on its way.
struct Underway {
    active: Arc<Gauge>,
    _busy: Option<Busy>,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.active.add(-1.0);
    }
}

/// The outermost layer: checks a request, passes it on, and notes how it went.
pub(crate) async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let busy = request.extensions().get::<ConnectInfo<ConnectionHandle>>().map(|info| info.0.busy());
    app.metrics.active.add(1.0);
    let underway = Underway { active: Arc::clone(&app.metrics.active), _busy: busy };
    let id = TaskId::from_bytes(app.backend.draw_id());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, MatchedPath::as_str).to_owned();
    let span = tracing::debug_span!("http", id = %id.fmt_short(), %method, route);
    let mut response = match guard::check(&app.cfg, &request) {
        Ok(()) => next.run(request).instrument(span.clone()).await,
        Err(fault) => fault.into_response(),
    };
    let status = response.status();
    app.metrics.requests.with(&[known(method.as_str()), &route, status.as_str()]).inc();
    app.metrics.head.with(&[&route]).observe_duration(started.elapsed());
    span.in_scope(|| tracing::debug!(status = status.as_u16(), elapsed = ?started.elapsed(), "answered"));
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    // Wrapping hides the body's length.
    let length = response.body().size_hint().exact();
    if let (Some(length), false) = (length, status == StatusCode::NO_CONTENT) {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(|body| held(body, underway))
}

/// Keeps `underway` until the body is sent or dropped.
fn held(body: Body, underway: Underway) -> Body {
    let pieces = body.into_data_stream().map(move |piece| {
        let _ = &underway;
        piece
    });
    Body::from_stream(pieces)
}

/// A method is text that a client chooses; only the usual ones are labels.
fn known(method: &str) -> &str {
    match method {
        "GET" | "POST" | "DELETE" | "HEAD" | "OPTIONS" | "PUT" | "PATCH" => method,
        _ => "other",
    }
}
