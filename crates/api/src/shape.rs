//! What a request says about an answer's form: OpenAI's `stop` and `response_format`, of a chat and of a task.

use chorus_core::TaskSpec;
use chorus_protocol::job::{MAX_SCHEMA_BYTES, MAX_STOP_BYTES, MAX_STOPS};
use serde_json::Value;

use crate::error::Fault;
use crate::fields::{Fields, wrong_type};

/// The fields that are read here.
pub(crate) const NAMES: [&str; 2] = ["stop", "response_format"];

/// An answer's form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// A JSON Schema that the answer must satisfy.
    pub json_schema: Option<String>,
}

impl Shape {
    pub(crate) fn read(fields: &Fields<'_>) -> Result<Self, Fault> {
        Ok(Self { stop: stops(fields)?, json_schema: json_schema(fields)? })
    }

    /// Writes the form into a task.
    pub(crate) fn apply(&self, spec: &mut TaskSpec) {
        spec.stop.clone_from(&self.stop);
        spec.json_schema.clone_from(&self.json_schema);
    }
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>, Fault> {
    let stops: Vec<&str> = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) => {
            let strings = list
                .iter()
                .enumerate()
                .map(|(at, stop)| stop.as_str().ok_or_else(|| wrong_type(&format!("stop[{at}]"), "a string", stop)));
            strings.collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", other)),
    };
    let sound = |stop: &&str| !stop.is_empty() && stop.len() <= MAX_STOP_BYTES;
    if stops.len() > MAX_STOPS || !stops.iter().all(sound) {
        let message = format!("'stop' takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes; shorten it");
        return Err(Fault::field("stop", "invalid_value", message));
    }
    Ok(stops.into_iter().map(str::to_owned).collect())
}

/// Returns the schema that `response_format` wants.
fn json_schema(fields: &Fields<'_>) -> Result<Option<String>, Fault> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    format.required("type")?;
    let kinds = [("text", 0), ("json_object", 1), ("json_schema", 2)];
    let schema = match format.word("type", &kinds)? {
        Some(2) => {
            let value = format.required("json_schema")?;
            let spec = Fields::at(format.path("json_schema"), value)?;
            let schema = spec.required("schema")?;
            Fields::at(spec.path("schema"), schema)?;
            schema.to_string()
        }
        Some(1) => r#"{"type":"object"}"#.to_owned(),
        _ => return Ok(None),
    };
    if schema.len() > MAX_SCHEMA_BYTES {
        let message = format!("the schema has {} bytes and {MAX_SCHEMA_BYTES} fit; shorten it", schema.len());
        return Err(Fault::field("response_format.json_schema.schema", "invalid_value", message));
    }
    Ok(Some(schema))
}
