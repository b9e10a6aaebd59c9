//! Tasks over a restart: two APIs, one after the other, on one disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use chorus_core::EVENTS_A_RUN;
use chorus_protocol::TaskId;
use serde_json::{Value, json};

use crate::backend::{Rote, SLOW, WORDS};
use crate::client::{Api, assert_error, config, events, eventually, start, start_on};
use crate::tasks::{create, follow, ids, kind};

/// Starts an API on what another one has on disk. Of that one nothing else is left.
async fn restart(before: &Api) -> Api {
    start_on(config(), Rote { disk: Arc::clone(&before.rote.disk), ..Rote::default() }).await
}

/// What is on disk of a task.
fn record(api: &Api, id: &str) -> Value {
    let task: TaskId = id.parse().unwrap();
    serde_json::from_slice(&api.rote.disk.lock().unwrap()[&task]).unwrap()
}

fn edit(api: &Api, id: &str, edit: impl FnOnce(&mut Value)) {
    let mut changed = record(api, id);
    edit(&mut changed);
    api.rote.disk.lock().unwrap().insert(id.parse().unwrap(), changed.to_string().into_bytes());
}

async fn ended(api: &Api, id: &str) -> Value {
    let path = format!("/v1/tasks/{id}");
    events(follow(api, &format!("{path}/events"), None).await).await;
    api.get(&path).await.1
}

#[tokio::test]
async fn a_task_is_on_disk_before_it_is_acknowledged_or_it_is_not_taken() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow", "max_tokens": 9 })).await;
    let asked = record(&api, &id)["state"]["asked"].clone();
    let seed = api.rote.specs.lock().unwrap()[0].seed;
    assert_eq!((&asked["question"], &asked["max_tokens"], &asked["seed"]), (&json!("slow"), &json!(9), &json!(seed)));
    api.rote.disk_full.store(true, Ordering::SeqCst);
    let refused = api.post("/v1/tasks", &json!({ "question": "slow" })).await;
    assert_error(&refused, 507, "disk_failed");
    assert!(refused.1["error"]["message"].as_str().unwrap().contains("free some space"), "{}", refused.1);
    api.rote.disk_full.store(false, Ordering::SeqCst);
    // What the node does not take leaves nothing on disk.
    assert_error(&api.post("/v1/tasks", &json!({ "question": "full" })).await, 429, "overloaded");
    assert_eq!(api.rote.disk.lock().unwrap().len(), 1);
    assert_eq!(api.rote.specs.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_task_that_ended_is_shown_again() {
    let api = start().await;
    let done = create(&api, &json!({ "question": "2 + 2?" })).await;
    let failed = create(&api, &json!({ "question": "fail" })).await;
    let before = [ended(&api, &done).await, ended(&api, &failed).await];
    let is_ended = |id| record(&api, id)["state"].get("ended").is_some();
    eventually("both ends on disk", || is_ended(&done) && is_ended(&failed)).await;
    let api = restart(&api).await;
    assert_eq!(
        [api.get(&format!("/v1/tasks/{done}")).await.1, api.get(&format!("/v1/tasks/{failed}")).await.1],
        before
    );
    assert_eq!(before[0]["result"]["text"], WORDS.concat());
    assert_eq!(before[1]["error"]["kind"], "deadline");
    let (_, list) = api.get("/v1/tasks").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    let path = format!("/v1/tasks/{done}/events");
    let all = events(follow(&api, &path, None).await).await;
    assert_eq!(all.iter().map(kind).collect::<Vec<_>>(), ["missed", "finished"], "only the last event is kept");
    assert_eq!(ids(&all), [4, 5]);
    assert_eq!(events(follow(&api, &path, Some(4)).await).await, all[1..]);
    assert_eq!(follow(&api, &path, Some(5)).await.status(), 204);
    assert!(api.rote.specs.lock().unwrap().is_empty(), "nothing is run again");
}

#[tokio::test]
async fn a_task_under_way_is_run_again_under_its_id_and_with_its_seed() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow", "deadline_s": 50 })).await;
    let first = api.rote.specs.lock().unwrap()[0].clone();
    edit(&api, &id, |record| record["state"]["asked"]["question"] = json!("2 + 2?"));
    tokio::time::sleep(SLOW).await;
    let api = restart(&api).await;
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.0, 200, "it is there at once");
    let path = format!("/v1/tasks/{id}/events");
    let seen = events(follow(&api, &path, Some(3)).await).await;
    assert_eq!((kind(&seen[0]), kind(seen.last().unwrap())), ("missed".to_owned(), "finished".to_owned()));
    assert_eq!(ids(&seen[1..]), (EVENTS_A_RUN..EVENTS_A_RUN + 6).collect::<Vec<_>>());
    let again = api.rote.specs.lock().unwrap()[0].clone();
    assert_eq!((again.task, again.seed, again.restarts), (first.task, first.seed, 1));
    assert!(again.deadline < first.deadline, "the time that is left");
    eventually("the end on disk", || record(&api, &id)["state"].get("ended").is_some()).await;
}

#[tokio::test]
async fn a_task_that_cannot_be_run_again_says_why() {
    let api = start().await;
    let id = create(&api, &json!({ "question": "slow" })).await;
    let before = record(&api, &id);
    let cases: [(fn(&mut Value), &str); 3] = [
        (|record| record["until_ms"] = json!(1), "time was up"),
        (|record| record["restarts"] = json!(3), "4 times"),
        (|record| record["state"]["asked"]["strategy"] = json!("magic"), "not understood"),
    ];
    for (spoil, why) in cases {
        edit(&api, &id, |record| *record = before.clone());
        edit(&api, &id, spoil);
        let api = restart(&api).await;
        let shown = ended(&api, &id).await;
        assert_eq!((&shown["state"], &shown["error"]["kind"]), (&json!("failed"), &json!("interrupted")), "{shown}");
        let message = shown["error"]["message"].as_str().unwrap();
        assert!(message.contains(why) && message.contains("ask again"), "{message}");
        eventually("the end on disk", || record(&api, &id)["state"].get("ended").is_some()).await;
        let api = restart(&api).await;
        assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.1["error"]["kind"], "interrupted");
        assert!(api.rote.specs.lock().unwrap().is_empty());
    }
    // A record that is no record is deleted, and harms nobody.
    api.rote.disk.lock().unwrap().insert(id.parse().unwrap(), b"{".to_vec());
    let api = restart(&api).await;
    assert_eq!(api.get(&format!("/v1/tasks/{id}")).await.0, 404);
    assert!(api.rote.disk.lock().unwrap().is_empty());
}
