//! What a trainer or a sampler says of itself: `/v1/training` and its curve.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use crate::app::{App, within};
use crate::backend::CurveForm;
use crate::error::Fault;

/// `GET /v1/training`.
pub(crate) async fn status(State(app): State<App>) -> Result<Json<Value>, Fault> {
    within(app.cfg.request_timeout, "the training room", app.backend.training()).await.map(Json)
}

/// `GET /v1/training/curve?form=text|csv|svg`.
pub(crate) async fn curve(
    State(app): State<App>,
    Query(params): Query<BTreeMap<String, String>>,
) -> Result<Response, Fault> {
    let mut form = CurveForm::default();
    for (name, value) in &params {
        form = match (name.as_str(), value.as_str()) {
            ("form", "text") => CurveForm::Text,
            ("form", "csv") => CurveForm::Csv,
            ("form", "svg") => CurveForm::Svg,
            ("form", _) => {
                return Err(Fault::field("form", "invalid_value", "'form' must be one of: text, csv, svg"));
            }
            _ => {
                let message = format!("unknown parameter '{name}'; known here is: form");
                return Err(Fault::field(name.clone(), "unknown_field", message));
            }
        };
    }
    let kind = match form {
        CurveForm::Text => "text/plain; charset=utf-8",
        CurveForm::Csv => "text/csv; charset=utf-8",
        CurveForm::Svg => "image/svg+xml",
    };
    let curve = within(app.cfg.request_timeout, "the learning curve", app.backend.curve(form)).await?;
    Ok(([(header::CONTENT_TYPE, kind)], curve).into_response())
}
