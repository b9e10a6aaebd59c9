//! `/v1/models`: the swarm, and what this node itself runs.

use axum::Json;
use axum::extract::{Path, State};
use chorus_protocol::Hash;
use serde_json::{Value, json};

use crate::app::App;
use crate::backend::{ModelCard, ModelKind};
use crate::error::{BackendError, Fault, SWARM_MODEL};

/// `GET /v1/models`.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({ "object": "list", "data": cards(&app) }))
}

/// `GET /v1/models/{model}`. A model's name may hold slashes.
pub(crate) async fn one(State(app): State<App>, Path(model): Path<String>) -> Result<Json<Value>, Fault> {
    let known = cards(&app);
    let found = known.iter().find(|card| card["id"] == model.as_str()).cloned();
    found.map(Json).ok_or_else(|| {
        let available = known.iter().filter_map(|card| card["id"].as_str()).map(str::to_owned).collect();
        BackendError::ModelNotFound { model: model.chars().take(80).collect(), available }.into()
    })
}

/// Returns the names that may be asked for: of chat models with the swarm's first, of embedders alone.
pub(crate) fn names(cards: &[ModelCard], kind: ModelKind) -> Vec<String> {
    let swarm = (kind == ModelKind::Chat).then(|| SWARM_MODEL.to_owned());
    let own = cards.iter().filter(|card| card.kind == kind).map(|card| card.name.clone());
    swarm.into_iter().chain(own).collect()
}

/// Says that a model is not here, or not yet.
pub(crate) fn not_found(app: &App, cards: &[ModelCard], model: &str, kind: ModelKind) -> BackendError {
    let waiting_for = app.backend.health().waiting_for;
    if !waiting_for.is_empty() {
        return BackendError::Starting { what: format!("this node ({})", waiting_for.join(", ")) };
    }
    BackendError::ModelNotFound { model: model.chars().take(80).collect(), available: names(cards, kind) }
}

fn cards(app: &App) -> Vec<Value> {
    let swarm = json!({
        "id": SWARM_MODEL,
        "object": "model",
        "created": app.started,
        "owned_by": "swarm",
        "chorus": { "kind": "swarm" },
    });
    let models = app.backend.models();
    std::iter::once(swarm).chain(models.iter().map(|model| card(app, model))).collect()
}

fn card(app: &App, model: &ModelCard) -> Value {
    let kind = match model.kind {
        ModelKind::Chat => "chat",
        ModelKind::Embedding => "embedding",
    };
    let fingerprint = Some(model.fingerprint).filter(|fingerprint| *fingerprint != Hash::ZERO);
    json!({
        "id": model.name,
        "object": "model",
        "created": app.started,
        "owned_by": "this-node",
        "chorus": {
            "kind": kind,
            "context": model.context,
            "architecture": model.architecture,
            "quantisation": model.quantisation,
            "fingerprint": fingerprint,
        },
    })
}
