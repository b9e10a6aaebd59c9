//! What a trainer or a sampler says of itself, `/v1/training` and its curve; and the desk at which a trainer outside the node works:
//! batches out, weights in. `protocol/spec/rollout.md` has the columns of a batch.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::app::{App, within};
use crate::backend::{CurveForm, Pieces, Update};
use crate::error::{BackendError, Fault};

/// The step that a batch or weights are of.
const STEP: HeaderName = HeaderName::from_static("x-chorus-step");
/// What a body of numbers is.
const NUMBERS: &str = "application/octet-stream";
/// How long a batch is waited for when the request does not say, and at most.
const WAIT: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(60));

/// How long evidence is fetched at most; the backend gives up by itself when nothing comes.
const FETCH: Duration = Duration::from_secs(120);

/// What stands behind the question mark.
type Params = BTreeMap<String, String>;

/// `GET /v1/training`.
pub(crate) async fn status(State(app): State<App>) -> Result<Json<Value>, Fault> {
    within(app.cfg.request_timeout, "the training room", app.backend.training()).await.map(Json)
}

/// `GET /v1/training/curve?form=text|csv|svg`.
pub(crate) async fn curve(State(app): State<App>, Query(params): Query<Params>) -> Result<Response, Fault> {
    only(&params, &["form"])?;
    let (form, kind) = match params.get("form").map(String::as_str) {
        None | Some("text") => (CurveForm::Text, "text/plain; charset=utf-8"),
        Some("csv") => (CurveForm::Csv, "text/csv; charset=utf-8"),
        Some("svg") => (CurveForm::Svg, "image/svg+xml"),
        Some(_) => return Err(Fault::field("form", "invalid_value", "'form' must be one of: text, csv, svg")),
    };
    let curve = within(app.cfg.request_timeout, "the learning curve", app.backend.curve(form)).await?;
    Ok(([(header::CONTENT_TYPE, kind)], curve).into_response())
}

/// `GET /v1/training/evidence/{hash}`.
pub(crate) async fn evidence(State(app): State<App>, Path(hash): Path<String>) -> Result<Response, Fault> {
    let hash = hash.parse().map_err(|error| Fault::field("hash", "invalid_value", format!("{error}")))?;
    let _place = app.stream()?;
    let bytes = tokio::select! {
        bytes = within(FETCH, "the evidence", app.backend.evidence(hash)) => bytes?,
        () = app.shutdown.cancelled() => return Err(BackendError::ShuttingDown.into()),
    };
    Ok(numbers(Body::from(bytes)).into_response())
}

/// `GET /v1/training/batch?wait_s=`.
pub(crate) async fn batch(State(app): State<App>, Query(params): Query<Params>) -> Result<Response, Fault> {
    only(&params, &["wait_s"])?;
    let most = WAIT.1.as_secs();
    let wait = number(&params, "wait_s", &format!("seconds from 0 to {most}"), |wait: &u64| *wait <= most)?;
    let wait = wait.map_or(WAIT.0, Duration::from_secs);
    let _place = app.stream()?;
    let batch = within(wait + app.cfg.request_timeout, "the batch", app.backend.batch(wait));
    let batch = tokio::select! {
        batch = batch => batch?,
        () = app.shutdown.cancelled() => return Err(BackendError::ShuttingDown.into()),
    };
    Ok(match batch {
        Some(batch) => ([(STEP, step(batch.step))], numbers(Body::from(batch.columns))).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

/// `GET /v1/training/weights`.
pub(crate) async fn weights(State(app): State<App>) -> Result<Response, Fault> {
    let weights = within(app.cfg.request_timeout, "the weights", app.backend.weights()).await?;
    let length = HeaderValue::from(weights.bytes);
    let body = numbers(Body::from_stream(weights.pieces));
    Ok(([(STEP, step(weights.step)), (header::CONTENT_LENGTH, length)], body).into_response())
}

/// `POST /v1/training/weights?step=`.
pub(crate) async fn learned(
    State(app): State<App>,
    Query(params): Query<Params>,
    request: Request,
) -> Result<Json<Value>, Fault> {
    only(&params, &["step", "gradient", "importance"])?;
    let Some(step) = number(&params, "step", "the step of the batch that was learned from", |_| true)? else {
        let message = "'step' is missing; it is the step of the batch that was learned from, as in ?step=12";
        return Err(Fault::field("step", "missing_field", message));
    };
    let figure = "a finite number of 0 or more";
    let gradient = number(&params, "gradient", figure, |n: &f64| n.is_finite() && *n >= 0.0)?.unwrap_or_default();
    let importance = number(&params, "importance", figure, |n: &f32| n.is_finite() && *n >= 0.0)?.unwrap_or_default();
    let limit = app.cfg.max_weights_bytes;
    let pieces = bounded(request.into_body(), limit);
    let learned = app.backend.learned(Update { step, gradient, importance }, pieces);
    let step = within(app.cfg.weights_timeout, "the update", learned).await?;
    Ok(Json(json!({ "step": step })))
}

/// Passes a body on up to its largest size.
fn bounded(body: Body, limit: usize) -> Pieces {
    let mut left = limit;
    let pieces = body.into_data_stream().map(move |piece| {
        let piece = piece.map_err(|error| BackendError::InvalidRequest {
            param: None,
            reason: format!("the body broke off: {error}; send the request again"),
        })?;
        left = left.checked_sub(piece.len()).ok_or(BackendError::TooLarge { limit })?;
        Ok(piece)
    });
    pieces.boxed()
}

fn numbers(body: Body) -> Response {
    ([(header::CONTENT_TYPE, NUMBERS)], body).into_response()
}

fn step(step: u64) -> HeaderValue {
    HeaderValue::from(step)
}

fn only(params: &Params, known: &[&str]) -> Result<(), Fault> {
    match params.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let message = format!("unknown parameter '{name}'; known here: {}", known.join(", "));
            Err(Fault::field(name.clone(), "unknown_field", message))
        }
    }
}

/// Reads a number that may be missing.
fn number<T: FromStr>(params: &Params, name: &str, what: &str, holds: impl Fn(&T) -> bool) -> Result<Option<T>, Fault> {
    let Some(text) = params.get(name) else { return Ok(None) };
    match text.parse().ok().filter(holds) {
        Some(number) => Ok(Some(number)),
        None => Err(Fault::field(name, "invalid_value", format!("'{name}' must be {what}"))),
    }
}
