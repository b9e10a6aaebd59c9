//! Who may ask: the checks that every request passes before anything of its body is read.
//!
//! 1. **Host.** A web page can make a browser resolve the page's own name to 127.0.0.1 and then read a service there (DNS
//!    rebinding). The browser still says the page's name in `Host`, so a node on loopback answers to its own names alone.
//! 2. **Origin.** A browser that sends a page's request elsewhere says so in `Origin`. The API is for no other page: there is no
//!    CORS, and an `Origin` that is not this very host is refused.
//! 3. **Token.** If there is one, it must be sent as `Authorization: Bearer`; it is compared in constant time. `/healthz` says
//!    nothing worth a token and is open.
//! 4. **Body.** One that is announced too large is refused unread, and one that is not JSON too: `application/json` is a type
//!    that a browser does not send to another host without asking first. The one route that takes a policy's weights has a limit of its
//!    own and wants `application/octet-stream`, for which the same holds.

use std::hint::black_box;

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};

use crate::config::ApiConfig;
use crate::error::{BackendError, Fault};

/// The one route that needs no token.
pub(crate) const HEALTH_ROUTE: &str = "/healthz";
/// The one route whose body is no JSON.
pub(crate) const WEIGHTS_ROUTE: &str = "/v1/training/weights";

/// Says whether a request may pass.
pub(crate) fn check(config: &ApiConfig, request: &Request) -> Result<(), Fault> {
    let headers = request.headers();
    let host = text(headers, HOST).or_else(|| request.uri().authority().map(|authority| authority.as_str()));
    check_host(config, host)?;
    check_origin(headers, host)?;
    if request.uri().path() != HEALTH_ROUTE {
        check_token(config, headers)?;
    }
    check_body(config, request)
}

fn check_host(config: &ApiConfig, host: Option<&str>) -> Result<(), Fault> {
    // Beyond loopback a node has names it does not know of, and a token that no page has.
    if !config.listen.ip().is_loopback() {
        return Ok(());
    }
    let name = host.map(host_name).unwrap_or_default();
    let own = ["localhost", "127.0.0.1", "[::1]"].into_iter().any(|own| own.eq_ignore_ascii_case(name));
    let listened = name.trim_matches(['[', ']']) == config.listen.ip().to_string();
    if own || listened || config.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name)) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    let message = format!(
        "this node does not answer to the host name '{shown}'; call it as localhost or 127.0.0.1, or add the name to \
         api.allowed_hosts in the configuration file"
    );
    Err(Fault::new(StatusCode::FORBIDDEN, "host_not_allowed", message))
}

/// Returns a host without its port.
fn host_name(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.find(']')) {
        Some(end) => &host[..end + 2],
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

fn check_origin(headers: &HeaderMap, host: Option<&str>) -> Result<(), Fault> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let authority = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    if authority.is_some() && authority == host {
        return Ok(());
    }
    let message =
        "pages of other sites may not use this API; call it from a program, or from a page that this node serves";
    Err(Fault::new(StatusCode::FORBIDDEN, "origin_not_allowed", message))
}

fn check_token(config: &ApiConfig, headers: &HeaderMap) -> Result<(), Fault> {
    let Some(token) = &config.token else { return Ok(()) };
    let given = text(headers, AUTHORIZATION).and_then(|value| value.split_once(' '));
    match given {
        Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") && same(given.trim(), token) => Ok(()),
        given => {
            let wrong = if given.is_some() { "the token is wrong" } else { "a token is missing" };
            let message = format!("{wrong}; send 'Authorization: Bearer …' with the node's api.token");
            Err(Fault::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
        }
    }
}

fn check_body(config: &ApiConfig, request: &Request) -> Result<(), Fault> {
    let headers = request.headers();
    let (limit, kind, words) = match request.uri().path() {
        WEIGHTS_ROUTE => (config.max_weights_bytes, "application/octet-stream", "safetensors"),
        _ => (config.max_body_bytes, "application/json", "JSON"),
    };
    let announced = text(headers, CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large(limit));
    }
    if *request.method() != Method::POST {
        return Ok(());
    }
    let essence = text(headers, CONTENT_TYPE).and_then(|value| value.split(';').next()).map(str::trim);
    if essence.is_some_and(|essence| essence.eq_ignore_ascii_case(kind)) {
        return Ok(());
    }
    let message = format!("the body must be {words}; send it with 'Content-Type: {kind}'");
    Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
}

/// A body is larger than it may be.
pub(crate) fn too_large(limit: usize) -> Fault {
    BackendError::TooLarge { limit }.into()
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Compares in a time that depends on the length of `given` alone.
fn same(given: &str, token: &str) -> bool {
    let (given, token) = (given.as_bytes(), token.as_bytes());
    let mut differs = given.len() ^ token.len();
    for (at, byte) in given.iter().enumerate() {
        let other = token.get(at % token.len().max(1)).copied().unwrap_or_default();
        differs |= usize::from(black_box(byte ^ other));
    }
    black_box(differs) == 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn tokens_are_the_same_or_not() {
        assert!(same("secret", "secret"));
        for other in ["", "s", "secre", "secrets", "Secret", "secretsecret"] {
            assert!(!same(other, "secret"), "{other}");
        }
        assert!(!same("a", "") && same("", ""));
    }

    #[test]
    fn a_host_is_read_without_its_port() {
        for (host, name) in
            [("localhost:7700", "localhost"), ("127.0.0.1", "127.0.0.1"), ("[::1]:7700", "[::1]"), ("[::1]", "[::1]")]
        {
            assert_eq!(host_name(host), name);
        }
    }

    #[test]
    fn loopback_answers_to_its_own_names() {
        let config = ApiConfig {
            allowed_hosts: vec!["box.lan".to_owned()],
            ..ApiConfig::new("127.0.0.1:7700".parse().unwrap())
        };
        for good in ["localhost", "LOCALHOST:1", "127.0.0.1:7700", "[::1]:7700", "Box.lan:7700"] {
            assert!(check_host(&config, Some(good)).is_ok(), "{good}");
        }
        for bad in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:7700", "", "[::2]"] {
            assert!(check_host(&config, Some(bad)).is_err(), "{bad}");
        }
        assert!(check_host(&config, None).is_err());
    }
}
