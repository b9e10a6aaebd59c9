//! `/v1/tasks`: ask the swarm, watch what happens, take a task back.
//!
//! Events are server-sent events, one JSON object each, with the event's number as `id`. A client that was cut off sends the last
//! number it saw as `Last-Event-ID`, as browsers do by themselves, and goes on behind it; `?from=N` begins at a number of choice.
//! A task that was taken outlives the process ([`journal`]). After a restart its numbers go on at a multiple of 2²⁰, and what lies
//! between is told as `missed`.
//!
//! A stream ends with the task. Who comes back after that and has seen everything is answered with 204, which tells a browser's
//! `EventSource` to stop.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use chorus_core::TaskSpec;
use chorus_protocol::TaskId;
use chorus_protocol::Text;
use chorus_protocol::job::{Role, Turn};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::app::{App, read_body, within};
use crate::chat::fresh_seed;
use crate::error::{BackendError, Fault};
use crate::fields::{self, Fields};
use crate::journal;
use crate::options::{self, Sampling};
use crate::shape::{self, Shape};
use crate::task_log::{LogItem, TaskState, TaskSummary};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Fields of a task besides those of [`shape::NAMES`] and [`options::NAMES`].
const NAMES: [&str; 7] = ["question", "context", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"];

type Params = Query<BTreeMap<String, String>>;

/// `POST /v1/tasks`.
pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, Fault> {
    let body = fields::parse(&read_body(&app, request).await?)?;
    let task = TaskId::from_bytes(app.backend.draw_id());
    let spec = read(&app, task, &body)?;
    // The task goes on by itself; who wants its events asks for them.
    journal::accept(&app, spec, body).await?;
    let url = format!("/v1/tasks/{task}");
    let body = json!({ "id": task, "object": "task", "state": TaskState::Running, "url": url, "events": format!("{url}/events") });
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, url)], Json(body)).into_response())
}

/// Reads what is asked. What the request leaves open and must not change when it is read again is the seed alone.
pub(crate) fn read(app: &App, task: TaskId, body: &Value) -> Result<TaskSpec, Fault> {
    let fields = Fields::root(body)?;
    let known: Vec<&str> = NAMES.into_iter().chain(shape::NAMES).chain(options::NAMES).collect();
    fields.only(&known)?;
    let mut spec = TaskSpec::new(task, fields.required_str("question")?);
    spec.deadline = app.cfg.task_deadline;
    spec.context = context(&fields)?;
    options::apply(&fields, &mut spec)?;
    Shape::read(&fields)?.apply(&mut spec);
    let defaults = Sampling {
        max_tokens: spec.max_tokens,
        temperature: f64::from(spec.temperature_milli) / 1_000.0,
        top_p: f64::from(spec.top_p_milli) / 1_000.0,
        seed: None,
    };
    options::sampling(&fields, defaults)?.apply(&mut spec, fresh_seed(app));
    spec.validate()?;
    Ok(spec)
}

/// Reads the chat before the question.
fn context(fields: &Fields<'_>) -> Result<Vec<Turn>, Fault> {
    const ROLES: [(&str, Role); 3] = [("system", Role::System), ("user", Role::User), ("assistant", Role::Assistant)];
    let turns = fields.array("context")?.map(Vec::as_slice).unwrap_or_default();
    let read = |(at, turn): (usize, &Value)| {
        let turn = Fields::at(format!("context[{at}]"), turn)?;
        turn.only(&["role", "content"])?;
        turn.required_str("role")?;
        let role = turn.word("role", &ROLES)?.unwrap_or(Role::User);
        let content = Text::new(turn.required_str("content")?).map_err(|error| {
            let path = turn.path("content");
            Fault::field(path.clone(), "context_length_exceeded", format!("'{path}' is too long: {error}"))
        })?;
        Ok(Turn { role, content })
    };
    turns.iter().enumerate().map(read).collect()
}

/// `GET /v1/tasks`.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({ "object": "list", "data": app.backend.tasks().summaries() }))
}

/// `GET /v1/tasks/{id}`.
pub(crate) async fn one(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Fault> {
    let (task, summary) = find(&app, &id)?;
    let mut body = shown(&summary);
    if let Some(mut last) = app.backend.tasks().last_event(task) {
        for part in ["result", "error"] {
            if let Some(value) = last.get_mut(part) {
                body[part] = value.take();
            }
        }
    }
    Ok(Json(body))
}

/// `DELETE /v1/tasks/{id}`. A task that has ended stays as it is.
pub(crate) async fn cancel(State(app): State<App>, Path(id): Path<String>) -> Result<Response, Fault> {
    let (task, summary) = find(&app, &id)?;
    if summary.state != TaskState::Running {
        return Ok(Json(shown(&summary)).into_response());
    }
    within(app.cfg.request_timeout, "taking the task back", app.backend.cancel(task)).await?;
    let mut body = shown(&summary);
    body["cancelling"] = json!(true);
    Ok((StatusCode::ACCEPTED, Json(body)).into_response())
}

/// `GET /v1/tasks/{id}/events`.
pub(crate) async fn events(
    State(app): State<App>,
    Path(id): Path<String>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let (task, summary) = find(&app, &id)?;
    let from = first_wanted(&headers, &params)?;
    if summary.state != TaskState::Running && from >= summary.events {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let permit = app.stream()?;
    let items = app.backend.tasks().subscribe(task, from).ok_or(BackendError::TaskNotFound { task })?;
    let events = items.map(move |item| {
        let _ = &permit;
        Ok::<_, Infallible>(event(task, &item))
    });
    let events = events.take_until(app.shutdown.clone().cancelled_owned());
    let keep_alive = KeepAlive::new().interval(app.cfg.keep_alive).text("keep-alive");
    Ok(Sse::new(events).keep_alive(keep_alive).into_response())
}

fn event(task: TaskId, item: &LogItem) -> Event {
    match item {
        LogItem::Event(event) => {
            // Events are plain data, which always serialises.
            let data = serde_json::to_string(&**event).unwrap_or_default();
            Event::default().id(event.index.to_string()).data(data)
        }
        LogItem::Recorded(recorded) => Event::default().id(recorded.index.to_string()).data(recorded.event.to_string()),
        LogItem::Missed { from, to } => {
            let data = json!({ "task": task, "event": "missed", "from": from, "to": to });
            Event::default().id(to.to_string()).data(data.to_string())
        }
    }
}

/// Returns the number of the first event that a client wants. What it saw last outweighs where it once began, because a browser
/// sends both when it comes back.
fn first_wanted(headers: &HeaderMap, params: &Params) -> Result<u64, Fault> {
    let number = |name: &str, text: &str| {
        let shown: String = text.chars().take(40).collect();
        let message = format!("'{name}' is '{shown}'; it must be the number of an event, from 0");
        text.trim().parse::<u64>().map_err(|_| Fault::field(name, "invalid_value", message))
    };
    if let Some(last) = headers.get(LAST_EVENT_ID) {
        let last = number("Last-Event-ID", last.to_str().unwrap_or("not text"))?;
        return Ok(last.saturating_add(1));
    }
    params.get("from").map_or(Ok(0), |from| number("from", from))
}

fn find(app: &App, id: &str) -> Result<(TaskId, TaskSummary), Fault> {
    let task: TaskId = id.parse().map_err(|_| {
        let message = "a task's id is 32 hexadecimal digits; GET /v1/tasks lists those that are kept";
        Fault::field("id", "invalid_value", message)
    })?;
    let summary = app.backend.tasks().summary(task).ok_or(BackendError::TaskNotFound { task })?;
    Ok((task, summary))
}

fn shown(summary: &TaskSummary) -> Value {
    let mut body = json!(summary);
    body["object"] = json!("task");
    body["url"] = json!(format!("/v1/tasks/{}", summary.id));
    body
}
