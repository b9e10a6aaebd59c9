//! Reads a request's fields one by one, so that every mistake is answered with the name of the field, what it should be, and
//! what it was.

use axum::http::StatusCode;
use serde_json::{Map, Value};

use crate::error::Fault;

/// An object of a request, and where in the request it stands.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

/// Parses a body that must be a JSON object.
pub(crate) fn parse(body: &[u8]) -> Result<Value, Fault> {
    let value: Value = serde_json::from_slice(body).map_err(|error| {
        Fault::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {error}; correct it"))
    })?;
    if value.is_object() {
        return Ok(value);
    }
    let found = kind(&value);
    Err(Fault::new(StatusCode::BAD_REQUEST, "invalid_type", format!("the body must be a JSON object, and is {found}")))
}

impl<'a> Fields<'a> {
    /// Reads an object that [`parse`] returned.
    pub(crate) fn root(value: &'a Value) -> Result<Self, Fault> {
        Self::at(String::new(), value)
    }

    /// Reads a value that must be an object, at a place in the request.
    pub(crate) fn at(path: String, value: &'a Value) -> Result<Self, Fault> {
        value
            .as_object()
            .map(|map| Self { path: path.clone(), map })
            .ok_or_else(|| wrong_type(&path, "an object", value))
    }

    /// Returns the full name of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Returns a field; `null` counts as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Refuses every field but these.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), Fault> {
        match self.map.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let path = self.path(name);
                let message = format!("unknown field '{path}'; known here are: {}", known.join(", "));
                Err(Fault::field(path, "unknown_field", message))
            }
        }
    }

    /// Returns a field that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<&'a Value, Fault> {
        self.get(name).ok_or_else(|| {
            let path = self.path(name);
            let message = format!("'{path}' is missing; add it");
            Fault::field(path, "missing_field", message)
        })
    }

    pub(crate) fn str(&self, name: &str) -> Result<Option<&'a str>, Fault> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(crate) fn required_str(&self, name: &str) -> Result<&'a str, Fault> {
        let value = self.required(name)?;
        value.as_str().ok_or_else(|| wrong_type(&self.path(name), "a string", value))
    }

    pub(crate) fn bool(&self, name: &str) -> Result<bool, Fault> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(crate) fn array(&self, name: &str) -> Result<Option<&'a Vec<Value>>, Fault> {
        self.typed(name, "an array", Value::as_array)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>, Fault> {
        self.get(name).map(|value| Self::at(self.path(name), value)).transpose()
    }

    /// Returns a whole number between two bounds, both included.
    pub(crate) fn int(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().ok_or_else(|| match value.as_i64() {
            Some(_) => self.out_of_range(name, min, max, value),
            None => wrong_type(&self.path(name), "a whole number", value),
        })?;
        if number < min || number > max {
            return Err(self.out_of_range(name, min, max, value));
        }
        Ok(Some(number))
    }

    /// Returns a number between two bounds, both included.
    pub(crate) fn number(&self, name: &str, min: f64, max: f64) -> Result<Option<f64>, Fault> {
        let Some(number) = self.typed(name, "a number", Value::as_f64)? else { return Ok(None) };
        if !(min..=max).contains(&number) {
            return Err(self.out_of_range(name, min, max, number));
        }
        Ok(Some(number))
    }

    /// Returns the value that a word stands for.
    pub(crate) fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, Fault> {
        let Some(text) = self.str(name)? else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                let path = self.path(name);
                let shown: String = text.chars().take(40).collect();
                let message = format!("'{path}' is '{shown}'; it must be one of: {}", known.join(", "));
                Err(Fault::field(path, "invalid_value", message))
            }
        }
    }

    fn typed<T>(&self, name: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&self.path(name), expected, value))
    }

    fn out_of_range(
        &self,
        name: &str,
        min: impl std::fmt::Display,
        max: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Fault {
        let path = self.path(name);
        let message = format!("'{path}' is {found}; it must lie between {min} and {max}");
        Fault::field(path, "invalid_value", message)
    }
}

/// A field has a value of another type than it should.
pub(crate) fn wrong_type(path: &str, expected: &str, found: &Value) -> Fault {
    let message = format!("'{path}' must be {expected}, and is {}", kind(found));
    Fault::field(path, "invalid_type", message)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    #[test]
    fn mistakes_are_named() {
        let value = json!({"a": {"n": -1, "s": 3, "f": 2.5, "x": null, "w": "blue"}});
        let fields = Fields::root(&value).unwrap().object("a").unwrap().unwrap();
        let message = |fault: Fault| fault.message().to_owned();
        assert_eq!(message(fields.int("n", 1, 9).unwrap_err()), "'a.n' is -1; it must lie between 1 and 9");
        assert_eq!(message(fields.int("f", 1, 9).unwrap_err()), "'a.f' must be a whole number, and is a number");
        assert_eq!(message(fields.str("s").unwrap_err()), "'a.s' must be a string, and is a number");
        assert_eq!(message(fields.number("f", 0.0, 2.0).unwrap_err()), "'a.f' is 2.5; it must lie between 0 and 2");
        assert_eq!(message(fields.required("x").unwrap_err()), "'a.x' is missing; add it");
        let word = fields.word("w", &[("red", 1), ("green", 2)]).unwrap_err();
        assert_eq!(message(word), "'a.w' is 'blue'; it must be one of: red, green");
        assert!(message(fields.only(&["n", "s", "f", "x"]).unwrap_err()).contains("unknown field 'a.w'"));
        assert_eq!(fields.str("x").unwrap(), None);
    }

    #[test]
    fn a_body_must_be_an_object() {
        assert!(parse(b"{").unwrap_err().message().contains("not JSON"));
        assert!(parse(b"[]").unwrap_err().message().contains("an array"));
        assert!(parse(b"{}").is_ok());
    }
}
