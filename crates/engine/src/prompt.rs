//! What a request must be like, and its prompt before it is tokenised.

use mistralrs::{Constraint, TextMessageRole, TextMessages};

use crate::{ChatMessage, EngineError, GenerateRequest, Role, Sampling, run::count, supervisor::Live};

/// No tokenizer in use packs more bytes than this into each token of a long text.
const MAX_BYTES_PER_TOKEN: usize = 64;
const MAX_MESSAGES: usize = 1_024;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_SCHEMA_BYTES: usize = 64 << 10;

/// A prompt before it is tokenised.
pub(crate) enum Prompt {
    Chat(TextMessages),
    Text(String),
}

impl Prompt {
    /// Renders messages for the model's chat template, or plainly if it has none.
    pub(crate) fn render(messages: &[ChatMessage], has_chat_template: bool) -> Self {
        if has_chat_template {
            let chat = messages.iter().fold(TextMessages::new(), |chat, message| {
                let role = match message.role {
                    Role::System => TextMessageRole::System,
                    Role::User => TextMessageRole::User,
                    Role::Assistant => TextMessageRole::Assistant,
                };
                chat.add_message(role, &message.content)
            });
            return Self::Chat(chat);
        }
        let mut text = String::new();
        for message in messages {
            text.push_str(message.role.as_str());
            text.push_str(": ");
            text.push_str(&message.content);
            text.push_str("\n\n");
        }
        text.push_str("assistant:");
        Self::Text(text)
    }
}

/// Refuses what no engine here serves.
pub(crate) fn check_request(request: &GenerateRequest) -> Result<(), EngineError> {
    check_sampling(&request.sampling, request.max_tokens)?;
    let problem = if request.messages.is_empty() || request.messages.len() > MAX_MESSAGES {
        format!("it has {} messages; 1 to {MAX_MESSAGES} are possible", request.messages.len())
    } else if request.stop.len() > MAX_STOPS {
        format!("it has {} stop texts; at most {MAX_STOPS} are possible", request.stop.len())
    } else if request.stop.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        format!("a stop text must have 1 to {MAX_STOP_BYTES} bytes")
    } else {
        return Ok(());
    };
    Err(EngineError::InvalidRequest { reason: problem })
}

/// Refuses ways of drawing that mean nothing.
pub(crate) fn check_sampling(sampling: &Sampling, max_tokens: u32) -> Result<(), EngineError> {
    let &Sampling { temperature, top_p, .. } = sampling;
    let problem = if max_tokens == 0 {
        "max_tokens is 0".to_owned()
    } else if !(0.0..=100.0).contains(&temperature) {
        format!("temperature is {temperature}; 0 to 100 are possible")
    } else if !(0.0..=1.0).contains(&top_p) {
        format!("top_p is {top_p}; 0 to 1 are possible")
    } else {
        return Ok(());
    };
    Err(EngineError::InvalidRequest { reason: problem })
}

/// Reads a JSON Schema.
pub(crate) fn parse_schema(schema: &str) -> Result<serde_json::Value, EngineError> {
    let invalid = |reason: String| EngineError::InvalidSchema { reason };
    if schema.len() > MAX_SCHEMA_BYTES {
        return Err(invalid(format!("it has {} bytes, at most {MAX_SCHEMA_BYTES}", schema.len())));
    }
    serde_json::from_str(schema).map_err(|error| invalid(format!("it is not JSON: {error}")))
}

/// Returns what keeps an answer to its schema.
pub(crate) fn constraint(schema: Option<&str>) -> Result<Constraint, EngineError> {
    let Some(schema) = schema else { return Ok(Constraint::None) };
    let mut schema = parse_schema(schema)?;
    // Free white space lets a small model write blanks until its tokens are used up.
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| {
            serde_json::json!({
                "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
            })
        });
    }
    Ok(Constraint::JsonSchema(schema))
}

/// Refuses a prompt that cannot fit, before it is tokenised.
pub(crate) fn check_prompt_bytes(messages: &[ChatMessage], context: u32) -> Result<(), EngineError> {
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    let at_least = bytes / MAX_BYTES_PER_TOKEN;
    if at_least > context as usize {
        return Err(EngineError::ContextExceeded { prompt_tokens: count(at_least), context });
    }
    Ok(())
}

/// Returns how many tokens an answer may have.
pub(crate) fn room_for_answer(prompt: &[u32], live: &Live) -> Result<u32, EngineError> {
    let (prompt_tokens, context) = (count(prompt.len()), live.info.context);
    match context.checked_sub(prompt_tokens) {
        None | Some(0) => Err(EngineError::ContextExceeded { prompt_tokens, context }),
        Some(room) => Ok(room),
    }
}
