//! Listens, routes, and ends in good order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::app::{App, Shared};
use crate::backend::Backend;
use crate::config::{ApiConfig, ApiError};
use crate::error::Fault;
use crate::guard::{HEALTH_ROUTE, WEIGHTS_ROUTE};
use crate::listener::{ConnectionHandle, Listener};
use crate::{chat, embeddings, journal, models, node, observe, tasks, training};

/// How long answers that are under way may take once the node ends. Streams end at once.
const DRAIN: Duration = Duration::from_secs(5);

/// A running API.
#[derive(Debug)]
pub struct BoundApi {
    local_addr: SocketAddr,
    server: JoinHandle<()>,
}

impl BoundApi {
    /// Returns where it listens, with the port that the system chose if none was given.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Waits until the shutdown token has fired and the last answer is sent, or given up.
    pub async fn stopped(self) {
        if let Err(error) = self.server.await {
            tracing::error!(%error, "the API ended by itself");
        }
    }
}

/// Starts the API. It runs until `shutdown` fires.
///
/// # Errors
/// [`ApiError`] when the configuration is unsafe or the address cannot be listened on.
pub async fn serve(
    cfg: ApiConfig,
    backend: Arc<dyn Backend>,
    shutdown: CancellationToken,
) -> Result<BoundApi, ApiError> {
    cfg.validate()?;
    let listen = cfg.listen;
    let socket = TcpListener::bind(listen).await.map_err(|source| ApiError::from_bind(listen, source))?;
    let local_addr = socket.local_addr().map_err(|source| ApiError::from_bind(listen, source))?;
    let listener = Listener::new(socket, cfg.max_connections, cfg.idle_timeout, cfg.write_timeout);
    let app = Arc::new(Shared::new(cfg, backend, shutdown.clone()));
    journal::restore(&app).await;
    let service = router(app).into_make_service_with_connect_info::<ConnectionHandle>();
    let serving = axum::serve(listener, service).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let server = tokio::spawn(async move {
        let mut serving = std::pin::pin!(serving.into_future());
        let ended = tokio::select! {
            ended = &mut serving => Ok(ended),
            () = shutdown.cancelled() => timeout(DRAIN, &mut serving).await,
        };
        if ended.is_err() {
            tracing::warn!("some answers were not whole when the node ended");
        }
    });
    tracing::info!(%local_addr, "the API listens");
    Ok(BoundApi { local_addr, server })
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::one))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/tasks", get(tasks::list).post(tasks::create))
        .route("/v1/tasks/{id}", get(tasks::one).delete(tasks::cancel))
        .route("/v1/tasks/{id}/events", get(tasks::events))
        .route("/v1/status", get(node::status))
        .route("/v1/peers", get(node::peers))
        .route("/v1/peers/{node}", post(node::set_blocked))
        .route("/v1/training", get(training::status))
        .route("/v1/training/curve", get(training::curve))
        .route("/v1/training/evidence/{hash}", get(training::evidence))
        .route("/v1/training/batch", get(training::batch))
        .route(WEIGHTS_ROUTE, get(training::weights).post(training::learned))
        .route("/v1/ledger", get(node::ledger))
        .route("/v1/ledger/{hash}", get(node::ledger_entry))
        .route("/metrics", get(node::metrics))
        .route(HEALTH_ROUTE, get(node::health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(Arc::clone(&app), observe::observe))
        .with_state(app)
}

async fn no_route(request: Request) -> Response {
    let path: String = request.uri().path().chars().take(80).collect();
    let message = format!(
        "there is no {path} here; the API has /v1/chat/completions, /v1/models, /v1/embeddings, /v1/tasks, /v1/status, \
         /v1/peers, /v1/training, /v1/ledger, /metrics and /healthz"
    );
    Fault::new(StatusCode::NOT_FOUND, "unknown_route", message).into_response()
}

async fn no_method(request: Request) -> Response {
    // axum adds the header.
    let message = format!("{} is not a method of this route; the 'Allow' header has those that are", request.method());
    Fault::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response()
}
