//! Who is let in.

use std::sync::Arc;

use chorus_api::{ApiConfig, ApiError, serve};
use reqwest::Method;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::backend::{Face, Rote};
use crate::client::{assert_error, config, json, start, start_with};

const TOKEN: &str = "0123456789abcdef";

#[tokio::test]
async fn a_token_is_wanted_everywhere_but_for_health() {
    let api = start_with(ApiConfig { token: Some(TOKEN.to_owned()), ..config() }).await;
    let paths = ["/v1/models", "/v1/tasks", "/v1/status", "/v1/peers", "/v1/ledger", "/metrics", "/no/such/route"];
    for path in paths {
        for header in [None, Some("Bearer"), Some("Bearer wrong"), Some("Basic 0123456789abcdef"), Some(TOKEN)] {
            let mut request = api.request(Method::GET, path);
            if let Some(header) = header {
                request = request.header("authorization", header);
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            assert_error(&json(response).await, 401, "invalid_api_key");
        }
        let with = api.request(Method::GET, path).bearer_auth(TOKEN).send().await.unwrap();
        assert_ne!(with.status(), 401, "{path}");
    }
    let prefixes = (0..TOKEN.len()).map(|end| &TOKEN[..end]).chain(["0123456789abcdef0"]);
    for wrong in prefixes {
        let response = api.request(Method::GET, "/v1/models").bearer_auth(wrong).send().await.unwrap();
        assert_eq!(response.status(), 401, "{wrong}");
    }
    assert_eq!(api.get("/healthz").await.0, 200);
    let body = json!({ "question": "2 + 2?" });
    assert_error(&api.post("/v1/tasks", &body).await, 401, "invalid_api_key");
    assert!(api.rote.specs.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_page_that_renames_itself_to_loopback_is_refused() {
    let api = start_with(ApiConfig { allowed_hosts: vec!["box.lan".to_owned()], ..config() }).await;
    for (host, allowed) in [
        ("localhost", true),
        ("127.0.0.1:7700", true),
        ("[::1]", true),
        ("box.lan:7700", true),
        ("evil.example", false),
        ("evil.example:7700", false),
        ("127.0.0.1.evil.example", false),
        ("", false),
    ] {
        let answer = api.raw(&format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), allowed, "{host}: {answer}");
        if !allowed {
            assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("host_not_allowed"), "{host}: {answer}");
        }
    }
    let none = api.raw("GET /v1/models HTTP/1.0\r\n\r\n").await;
    assert!(none.contains(" 403 "), "{none}");
}

#[tokio::test]
async fn pages_of_other_sites_are_refused() {
    let api = start().await;
    let own = api.base.clone();
    for (origin, allowed) in [
        (own.as_str(), true),
        ("http://evil.example", false),
        ("http://localhost:3000", false),
        ("http://127.0.0.1", false),
        ("null", false),
    ] {
        let response = api.request(Method::GET, "/v1/status").header("origin", origin).send().await.unwrap();
        assert_eq!(response.status() == 200, allowed, "{origin}");
        assert!(!response.headers().contains_key("access-control-allow-origin"));
    }
    let preflight =
        api.request(Method::OPTIONS, "/v1/tasks").header("origin", "http://evil.example").send().await.unwrap();
    assert_eq!(preflight.status(), 403);
    // What a page may send elsewhere without being asked is no JSON.
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        let request = api.request(Method::POST, "/v1/tasks").header("content-type", content_type);
        let response = request.body(r#"{"question": "2 + 2?"}"#).send().await.unwrap();
        assert_error(&json(response).await, 415, "unsupported_media_type");
    }
    assert!(api.rote.specs.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_unsafe_configuration_does_not_start() {
    let start = |cfg| serve(cfg, Arc::new(Face(Arc::new(Rote::default()))), CancellationToken::new());
    let error = start(ApiConfig::new("0.0.0.0:0".parse().unwrap())).await.unwrap_err();
    assert!(matches!(error, ApiError::TokenRequired { .. }), "{error}");
    let running = crate::client::start().await;
    let taken = running.bound.as_ref().unwrap().local_addr();
    let error = start(ApiConfig::new(taken)).await.unwrap_err();
    assert!(matches!(error, ApiError::PortInUse { listen } if listen == taken), "{error}");
    let text = error.to_string();
    assert!(text.contains("--api") && text.contains("--instance"), "{text}");
    let nowhere = ApiConfig { token: Some(TOKEN.to_owned()), ..ApiConfig::new("192.0.2.1:0".parse().unwrap()) };
    let error = start(nowhere).await.unwrap_err();
    assert!(matches!(error, ApiError::Listen { .. }) && error.to_string().contains("--api"), "{error}");
}
