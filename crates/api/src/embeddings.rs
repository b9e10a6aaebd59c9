//! `POST /v1/embeddings`, as OpenAI defines it, by this node's own embedder.

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use crate::app::{App, read_body, within};
use crate::backend::{Embedded, ModelKind};
use crate::error::{BackendError, Fault};
use crate::fields::{self, Fields, wrong_type};
use crate::models;

/// Texts of one request.
const MAX_INPUTS: usize = 256;

/// `POST /v1/embeddings`.
pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Json<Value>, Fault> {
    let body = fields::parse(&read_body(&app, request).await?)?;
    let fields = Fields::root(&body)?;
    let model = fields.required_str("model")?;
    check_model(&app, model)?;
    let inputs = inputs(&fields)?;
    let base64 = fields.word("encoding_format", &[("float", false), ("base64", true)])?.unwrap_or(false);
    let dimensions = fields.int("dimensions", 1, u64::from(u32::MAX))?;
    let _permit = app.generation()?;
    let count = inputs.len();
    let embedded = within(app.cfg.generate_timeout, "the embedder", app.backend.embed(inputs)).await?;
    check_vectors(&embedded, count, dimensions)?;
    let data: Vec<Value> = embedded.vectors.iter().enumerate().map(|(at, vector)| datum(at, vector, base64)).collect();
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": model,
        "usage": { "prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens },
    })))
}

fn check_model(app: &App, model: &str) -> Result<(), Fault> {
    let cards = app.backend.models();
    if cards.iter().any(|card| card.kind == ModelKind::Embedding && card.name == model) {
        return Ok(());
    }
    let missing = models::not_found(app, &cards, model, ModelKind::Embedding);
    let none = matches!(&missing, BackendError::ModelNotFound { available, .. } if available.is_empty());
    Err(if none { BackendError::NoEmbedder } else { missing }.into())
}

fn inputs(fields: &Fields<'_>) -> Result<Vec<String>, Fault> {
    let value = fields.required("input")?;
    let inputs: Vec<String> = match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(list) => {
            let texts = list.iter().enumerate().map(|(at, text)| {
                let expected = "a string (tokens are not taken; send the text)";
                text.as_str().map(str::to_owned).ok_or_else(|| wrong_type(&format!("input[{at}]"), expected, text))
            });
            texts.collect::<Result<_, _>>()?
        }
        other => return Err(wrong_type("input", "a string or an array of strings", other)),
    };
    if inputs.is_empty() || inputs.len() > MAX_INPUTS || inputs.iter().any(String::is_empty) {
        let message = format!("'input' takes 1 to {MAX_INPUTS} texts, none of them empty; split the request");
        return Err(Fault::field("input", "invalid_value", message));
    }
    Ok(inputs)
}

fn check_vectors(embedded: &Embedded, count: usize, dimensions: Option<u64>) -> Result<(), Fault> {
    if embedded.vectors.len() != count {
        let reason = format!("the embedder gave {} vectors for {count} texts", embedded.vectors.len());
        return Err(BackendError::Engine { reason, retryable: false }.into());
    }
    let own = embedded.vectors.first().map_or(0, Vec::len) as u64;
    match dimensions {
        Some(wanted) if wanted != own => {
            let message = format!("'dimensions' is {wanted} and this model gives {own}; leave it out");
            Err(Fault::field("dimensions", "invalid_value", message))
        }
        _ => Ok(()),
    }
}

fn datum(index: usize, vector: &[f32], base64: bool) -> Value {
    let embedding = if base64 {
        let bytes: Vec<u8> = vector.iter().flat_map(|component| component.to_le_bytes()).collect();
        json!(encode_base64(&bytes))
    } else {
        json!(vector)
    };
    json!({ "object": "embedding", "index": index, "embedding": embedding })
}

/// Encodes bytes as base64 (RFC 4648, section 4) with padding.
fn encode_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or_default());
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            let sextet = bits >> (18 - 6 * place) & 63;
            let letter = if place <= group.len() { ALPHABET[sextet as usize] } else { b'=' };
            out.push(char::from(letter));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        // RFC 4648, section 10.
        for (text, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode_base64(text.as_bytes()), encoded);
        }
        assert_eq!(encode_base64(&[0xff, 0xfe, 0xfb]), "//77");
    }
}
