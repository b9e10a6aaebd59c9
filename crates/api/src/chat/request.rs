//! Reads a chat completion request of OpenAI's API.
//!
//! What is not supported and would change the answer is refused with the name of the field; what is merely unknown is ignored,
//! as every compatible server does, except inside the `chorus` object, which is ours.

use chorus_core::TaskSpec;
use chorus_protocol::TaskId;
use chorus_protocol::job::Role;
use serde_json::Value;

use crate::backend::ChatTurn;
use crate::error::{Fault, SWARM_MODEL};
use crate::fields::{Fields, wrong_type};
use crate::options::{self, Sampling};
use crate::shape::Shape;

/// Messages of one request.
const MAX_MESSAGES: usize = 1_024;
/// The most tokens of an answer when the request does not say. A small model that does not find its end would go on for as
/// long as its context.
const DEFAULT_MAX_TOKENS: u32 = 512;

/// A request, understood.
#[derive(Clone, Debug)]
pub(crate) struct ChatRequest {
    pub model: String,
    pub turns: Vec<ChatTurn>,
    pub sampling: Sampling,
    pub shape: Shape,
    pub stream: bool,
    pub include_usage: bool,
    /// Whether a task of the swarm goes on when the client leaves.
    pub background: bool,
}

impl ChatRequest {
    /// Returns whether the swarm is asked.
    pub(crate) fn is_for_swarm(&self) -> bool {
        self.model == SWARM_MODEL
    }

    /// Reads a request. The options of the `chorus` object go into `spec`, which holds the defaults of everything else too.
    pub(crate) fn read(body: &Value, spec: &mut TaskSpec) -> Result<Self, Fault> {
        let fields = Fields::root(body)?;
        refuse_unsupported(&fields)?;
        let model = fields.required_str("model")?.to_owned();
        let stream = fields.bool("stream")?;
        let defaults = Sampling {
            max_tokens: DEFAULT_MAX_TOKENS,
            temperature: f64::from(spec.temperature_milli) / 1_000.0,
            top_p: f64::from(spec.top_p_milli) / 1_000.0,
            seed: None,
        };
        Ok(Self {
            turns: turns(&fields)?,
            sampling: options::sampling(&fields, defaults)?,
            shape: Shape::read(&fields)?,
            include_usage: include_usage(&fields, stream)?,
            background: swarm_options(&fields, &model, spec)?,
            stream,
            model,
        })
    }

    /// Splits the chat into the question and what was said before it, as a task wants it.
    pub(crate) fn question(&self) -> Result<(&str, &[ChatTurn]), Fault> {
        match self.turns.split_last() {
            Some((last, before)) if last.role == Role::User => Ok((&last.content, before)),
            _ => {
                let message = "the last message must be the user's: it is the question that the swarm answers";
                Err(Fault::field("messages", "invalid_value", message))
            }
        }
    }
}

/// Refuses what would change the answer and is not done here.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), Fault> {
    let refuse = |name: &str, why: &str| Err(Fault::field(name, "unsupported_parameter", format!("'{name}' {why}")));
    if fields.int("n", 1, u64::MAX)?.is_some_and(|n| n > 1) {
        return refuse("n", "must be 1; send the request several times, with a seed of its own each");
    }
    for name in ["tools", "functions"] {
        if fields.array(name)?.is_some_and(|list| !list.is_empty()) {
            return refuse(name, "is not supported by this version; leave it out, and describe the tools in a message");
        }
    }
    for name in ["tool_choice", "function_call"] {
        if fields.get(name).is_some_and(|choice| !matches!(choice.as_str(), Some("none" | "auto"))) {
            return refuse(name, "is not supported by this version; leave it out");
        }
    }
    for name in ["presence_penalty", "frequency_penalty"] {
        if fields.number(name, -2.0, 2.0)?.is_some_and(|penalty| penalty != 0.0) {
            return refuse(name, "is not supported by this version; leave it out, or set it to 0");
        }
    }
    if fields.bool("logprobs")? {
        return refuse("logprobs", "is not supported by this version; leave it out");
    }
    if fields.object("logit_bias")?.is_some_and(|_| fields.get("logit_bias").is_some_and(|bias| *bias != empty())) {
        return refuse("logit_bias", "is not supported by this version; leave it out");
    }
    for name in ["audio", "web_search_options"] {
        if fields.get(name).is_some() {
            return refuse(name, "is not supported; leave it out");
        }
    }
    let text_alone = fields.array("modalities")?.is_none_or(|list| list.iter().all(|modality| modality == "text"));
    if text_alone { Ok(()) } else { refuse("modalities", "other than text are not supported; leave it out") }
}

fn empty() -> Value {
    Value::Object(serde_json::Map::new())
}

fn turns(fields: &Fields<'_>) -> Result<Vec<ChatTurn>, Fault> {
    let value = fields.required("messages")?;
    let messages = value.as_array().ok_or_else(|| wrong_type("messages", "an array", value))?;
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("'messages' has {} elements; give 1 to {MAX_MESSAGES}", messages.len());
        return Err(Fault::field("messages", "invalid_value", message));
    }
    messages.iter().enumerate().map(|(at, message)| turn(&Fields::at(format!("messages[{at}]"), message)?)).collect()
}

fn turn(message: &Fields<'_>) -> Result<ChatTurn, Fault> {
    const ROLES: [(&str, Role); 4] =
        [("system", Role::System), ("developer", Role::System), ("user", Role::User), ("assistant", Role::Assistant)];
    message.required_str("role")?;
    let role = message.word("role", &ROLES)?.unwrap_or(Role::User);
    if message.array("tool_calls")?.is_some_and(|calls| !calls.is_empty()) {
        let path = message.path("tool_calls");
        let text = format!("'{path}' is not supported by this version; write what the tool said into a message");
        return Err(Fault::field(path, "unsupported_parameter", text));
    }
    let content = match message.required("content")? {
        Value::String(text) => text.clone(),
        Value::Array(parts) => joined(message, parts)?,
        other => return Err(wrong_type(&message.path("content"), "a string or an array of text parts", other)),
    };
    Ok(ChatTurn { role, content })
}

/// Joins the text parts of a message. Anything but text is refused.
fn joined(message: &Fields<'_>, parts: &[Value]) -> Result<String, Fault> {
    let mut content = String::new();
    for (at, part) in parts.iter().enumerate() {
        let part = Fields::at(format!("{}[{at}]", message.path("content")), part)?;
        let kind = part.required_str("type")?;
        if kind != "text" {
            let path = part.path("type");
            let shown: String = kind.chars().take(40).collect();
            let text = format!("'{path}' is '{shown}'; the models here read text alone, so send text parts");
            return Err(Fault::field(path, "unsupported_parameter", text));
        }
        content.push_str(part.required_str("text")?);
    }
    Ok(content)
}

fn include_usage(fields: &Fields<'_>, stream: bool) -> Result<bool, Fault> {
    let Some(options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        let message = "'stream_options' is for streams alone; set 'stream' to true, or leave it out";
        return Err(Fault::field("stream_options", "invalid_value", message));
    }
    options.bool("include_usage")
}

/// Reads the `chorus` object. Returns whether the task goes on when the client leaves.
fn swarm_options(fields: &Fields<'_>, model: &str, spec: &mut TaskSpec) -> Result<bool, Fault> {
    let Some(chorus) = fields.object("chorus")? else { return Ok(false) };
    if model != SWARM_MODEL {
        let message = format!("'chorus' is for the swarm; ask the model '{SWARM_MODEL}', or leave it out");
        return Err(Fault::field("chorus", "invalid_value", message));
    }
    let known: Vec<&str> = options::NAMES.into_iter().chain(["background"]).collect();
    chorus.only(&known)?;
    options::apply(&chorus, spec)?;
    chorus.bool("background")
}

/// Makes the defaults of a chat with the swarm.
pub(crate) fn default_spec(task: TaskId) -> TaskSpec {
    let mut spec = TaskSpec::new(task, String::new());
    spec.strategy = chorus_core::Strategy::Direct;
    spec
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<ChatRequest, Fault> {
        ChatRequest::read(&body, &mut default_spec(TaskId::default()))
    }

    fn with(field: &str, value: Value) -> Value {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]});
        body[field] = value;
        body
    }

    #[test]
    fn a_plain_request_is_read() {
        let request = read(json!({
            "model": "tiny",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "?", "name": "ann"},
            ],
            "stop": "\n", "seed": 7, "stream": true, "stream_options": {"include_usage": true},
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
            "user": "ignored", "n": 1, "tools": [], "tool_choice": "none", "presence_penalty": 0, "logit_bias": {},
        }))
        .unwrap();
        assert_eq!(request.turns[0], ChatTurn { role: Role::System, content: "Be brief.".to_owned() });
        assert_eq!(request.turns[1].content, "Hello");
        assert_eq!((request.shape.stop.as_slice(), request.sampling.seed), (["\n".to_owned()].as_slice(), Some(7)));
        assert!(request.stream && request.include_usage && !request.background);
        assert_eq!(request.shape.json_schema.as_deref(), Some(r#"{"type":"integer"}"#));
        assert_eq!(request.question().unwrap().0, "?");
    }

    #[test]
    fn every_mistake_names_its_field() {
        for (field, value) in [
            ("model", json!(3)),
            ("model", json!(null)),
            ("messages", json!("hello")),
            ("messages", json!([])),
            ("messages", json!([{"role": "wizard", "content": "x"}])),
            ("messages", json!([{"role": "tool", "content": "x"}])),
            ("messages", json!([{"role": "user"}])),
            ("messages", json!([{"role": "user", "content": 5}])),
            ("messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
            ("temperature", json!("hot")),
            ("temperature", json!(3)),
            ("top_p", json!([])),
            ("max_tokens", json!(-1)),
            ("max_completion_tokens", json!(1.5)),
            ("seed", json!("x")),
            ("stop", json!(["a", 1])),
            ("stop", json!([""])),
            ("stop", json!(["1", "2", "3", "4", "5", "6", "7", "8", "9"])),
            ("stream", json!("yes")),
            ("stream_options", json!({"include_usage": true})),
            ("response_format", json!({"type": "xml"})),
            ("response_format", json!({"type": "json_schema"})),
            ("response_format", json!({"type": "json_schema", "json_schema": {"name": "x", "schema": 3}})),
            ("n", json!(2)),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("required")),
            ("logprobs", json!(true)),
            ("presence_penalty", json!(0.5)),
            ("logit_bias", json!({"50256": -100})),
            ("modalities", json!(["audio"])),
            ("chorus", json!({"strategy": "direct"})),
        ] {
            let fault = read(with(field, value.clone())).unwrap_err();
            let body = fault.to_json();
            let param = body["error"]["param"].as_str().unwrap_or_default();
            assert!(param.starts_with(field), "{field} = {value}: {body}");
            assert!(fault.message().contains(field) || fault.message().contains("schema"), "{field}: {body}");
        }
    }

    #[test]
    fn the_swarms_options_are_strict() {
        let mut body = with("model", json!("chorus"));
        body["chorus"] = json!({"strategy": "chains", "planners": 2, "background": true});
        let mut spec = default_spec(TaskId::default());
        assert!(ChatRequest::read(&body, &mut spec).unwrap().background);
        assert_eq!(spec.strategy, chorus_core::Strategy::Chains { planners: 2 });
        body["chorus"] = json!({"stratgy": "chains"});
        let fault = read(body.clone()).unwrap_err();
        assert!(fault.message().contains("chorus.stratgy") && fault.message().contains("strategy"), "{fault:?}");
        body["chorus"] = json!({});
        body["messages"] = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        assert!(read(body).unwrap().question().is_err());
    }
}
