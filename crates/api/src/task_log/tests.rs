#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use chorus_core::{TaskAnswer, TaskError, TaskEvent, TaskEventKind};
use chorus_machine::Rng;
use chorus_protocol::{JobId, SecretKey, TaskId};
use chorus_scheduler::Place;
use futures::StreamExt;

use super::*;

fn task(number: u8) -> TaskId {
    TaskId::from_bytes([number; 16])
}

fn event(task: TaskId, index: u64, text: &str) -> TaskEvent {
    let place = Place { job: JobId::default(), chain: 0, stage: "answer", step: None };
    let node = SecretKey::from_bytes(&[1; 32]).node_id();
    TaskEvent {
        task,
        index,
        at: Default::default(),
        elapsed: Duration::ZERO,
        kind: TaskEventKind::Text { place, node, tokens: 1, text: text.to_owned() },
    }
}

fn answer(task: TaskId) -> TaskAnswer {
    TaskAnswer {
        task,
        answer: "4".to_owned(),
        text: "It is 4.".to_owned(),
        finish: chorus_protocol::job::Finish::Stop,
        margin: 1.0,
        tie: false,
        low_margin: false,
        votes: Vec::new(),
        chains: Vec::new(),
        prompt_tokens: 3,
        completion_tokens: 4,
        jobs: 1,
        elapsed: Duration::from_millis(5),
        strategy: "direct",
        fallback: None,
    }
}

/// Reads to the end. Returns what was read and what was missed, by number.
async fn read(stream: TaskStream) -> (Vec<u64>, Vec<u64>) {
    let (mut seen, mut missed) = (Vec::new(), Vec::new());
    let mut stream = stream;
    while let Some(item) = stream.next().await {
        match item {
            LogItem::Event(event) => seen.push(event.index),
            LogItem::Missed { from, to } => missed.extend(from..=to),
            LogItem::Recorded(recorded) => panic!("{recorded:?} was never restored"),
        }
    }
    (seen, missed)
}

/// Asserts that every number from `from` to the end came once, in order, as an event or as missed.
fn assert_complete(seen: &[u64], missed: &[u64], from: u64, end: u64) {
    assert!(seen.is_sorted() && missed.is_sorted());
    let mut all = [seen, missed].concat();
    all.sort_unstable();
    assert_eq!(all, (from..end).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_readers_lose_and_repeat_nothing() {
    const EVENTS: u64 = 2_000;
    let log = Arc::new(TaskLog::default());
    let mut readers = Vec::new();
    for number in 0..4 {
        log.open(task(number), TaskMeta::default()).unwrap();
        for from in [0, 1, 7, EVENTS / 2, EVENTS - 1, EVENTS] {
            let stream = log.subscribe(task(number), from).unwrap();
            readers.push((from, tokio::spawn(read(stream))));
        }
    }
    let writers: Vec<_> = (0..4)
        .map(|number| {
            let log = Arc::clone(&log);
            tokio::spawn(async move {
                for index in 0..EVENTS {
                    log.push(event(task(number), index, "x"));
                    if index % 64 == u64::from(number) {
                        tokio::task::yield_now().await;
                    }
                }
                log.finish(task(number), Ok(answer(task(number))));
            })
        })
        .collect();
    // Readers that come while it is written.
    for round in 0..40u64 {
        let stream = log.subscribe(task(u8::try_from(round % 4).unwrap()), round * 50).unwrap();
        readers.push((round * 50, tokio::spawn(read(stream))));
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for (from, reader) in readers {
        let (seen, missed) = tokio::time::timeout(Duration::from_secs(20), reader).await.unwrap().unwrap();
        assert!(missed.is_empty());
        // One more than was pushed: the end, which the log makes of the outcome.
        assert_complete(&seen, &missed, from, EVENTS + 1);
    }
}

#[tokio::test]
async fn whatever_is_forgotten_is_said() {
    for seed in 0..40 {
        let mut rng = Rng::from_u64(seed);
        let events = usize::try_from(1 + rng.below(12)).unwrap();
        let limits = TaskLogLimits { tasks: 2, events, task_bytes: 1 << 20, bytes: 1 << 20 };
        let log = TaskLog::new(limits);
        let (mut streams, mut next) = (Vec::new(), 0);
        log.open(task(1), TaskMeta::default()).unwrap();
        for _ in 0..300 {
            match rng.below(4) {
                0 => {
                    let from = rng.below(next + 2);
                    streams.push((from, log.subscribe(task(1), from).unwrap(), Vec::new(), Vec::new()));
                }
                1 if !streams.is_empty() => {
                    let at = usize::try_from(rng.below(streams.len() as u64)).unwrap();
                    let (_, stream, seen, missed) = &mut streams[at];
                    match futures::poll!(stream.next()) {
                        std::task::Poll::Ready(Some(LogItem::Event(event))) => seen.push(event.index),
                        std::task::Poll::Ready(Some(LogItem::Missed { from, to })) => missed.extend(from..=to),
                        _ => {}
                    }
                }
                _ => {
                    log.push(event(task(1), next, "abc"));
                    // The same again is no new event.
                    log.push(event(task(1), next, "abc"));
                    next += 1;
                }
            }
        }
        log.finish(task(1), Err(TaskError::Cancelled));
        for (from, stream, mut seen, mut missed) in streams {
            let (rest, rest_missed) = read(stream).await;
            seen.extend(rest);
            missed.extend(rest_missed);
            assert_complete(&seen, &missed, from, next + 1);
        }
    }
}

#[tokio::test]
async fn a_writer_does_not_wait_for_its_readers() {
    let log = TaskLog::default();
    log.open(task(1), TaskMeta::default()).unwrap();
    let idle = log.subscribe(task(1), 0).unwrap();
    let count = u64::try_from(MAX_EVENTS).unwrap() * 2;
    for index in 0..count {
        log.push(event(task(1), index, "word"));
    }
    log.finish(task(1), Ok(answer(task(1))));
    let (seen, missed) = read(idle).await;
    assert_complete(&seen, &missed, 0, count + 1);
    assert!(seen.len() <= MAX_EVENTS && !missed.is_empty());
}

#[tokio::test]
async fn the_last_event_says_how_it_ended_once() {
    let log = TaskLog::default();
    for (number, own_end) in [(1, true), (2, false)] {
        log.open(task(number), TaskMeta::default()).unwrap();
        log.push(event(task(number), 0, "x"));
        if own_end {
            let kind = TaskEventKind::Finished { result: Box::new(answer(task(number))) };
            log.push(TaskEvent { kind, ..event(task(number), 1, "") });
        }
        log.finish(task(number), Ok(answer(task(number))));
        log.finish(task(number), Err(TaskError::Cancelled));
        log.push(event(task(number), 2, "too late"));
        let items: Vec<_> = log.subscribe(task(number), 0).unwrap().collect().await;
        assert_eq!(items.len(), 2, "{items:?}");
        let LogItem::Event(last) = &items[1] else { panic!("{items:?}") };
        assert!(matches!(&last.kind, TaskEventKind::Finished { result } if result.answer == "4"), "{last:?}");
        assert_eq!(last.index, 1);
        assert!(log.outcome(task(number)).unwrap().is_ok());
        assert_eq!(log.summary(task(number)).unwrap().state, TaskState::Finished);
    }
}

#[tokio::test]
async fn tasks_that_ended_first_are_forgotten_first() {
    let log = TaskLog::new(TaskLogLimits { tasks: 3, ..TaskLogLimits::default() });
    for number in 1..=3 {
        log.open(task(number), TaskMeta::default()).unwrap();
        log.push(event(task(number), 0, "x"));
    }
    assert_eq!(log.open(task(4), TaskMeta::default()), Err(TaskLogFull { limit: 3 }));
    assert_eq!(log.running(), 3);
    log.finish(task(2), Err(TaskError::Cancelled));
    log.finish(task(1), Err(TaskError::Cancelled));
    let reader = log.subscribe(task(2), 0).unwrap();
    log.open(task(4), TaskMeta::default()).unwrap();
    assert!(log.summary(task(2)).is_none() && log.summary(task(1)).is_some());
    // Who reads already reads on to the end.
    assert_eq!(read(reader).await.0, [0, 1]);
    let ids: Vec<_> = log.summaries().iter().map(|summary| summary.id).collect();
    assert_eq!(ids, [task(4), task(3), task(1)], "newest first");
    log.discard(task(4));
    assert!(log.subscribe(task(4), 0).is_none());
    log.open(task(5), TaskMeta::default()).unwrap();
    assert!(log.summary(task(1)).is_some(), "the place of the discarded task is free");
    assert_eq!(log.running(), 2);
}

#[test]
fn bytes_are_bounded_over_all_tasks() {
    let one = weight(&event(task(1), 0, "0123456789"));
    let limits = TaskLogLimits { tasks: 100, events: 1_000, task_bytes: 50 * one, bytes: 100 * one };
    let log = TaskLog::new(limits);
    for number in 0..20 {
        log.open(task(number), TaskMeta::default()).unwrap();
        for index in 0..60 {
            log.push(event(task(number), index, "0123456789"));
        }
        if number % 3 == 0 {
            log.finish(task(number), Err(TaskError::Cancelled));
        }
        let held = {
            let inner = lock(&log.inner);
            let held: usize = inner.records.values().map(|record| lock(&record.ring).bytes).sum();
            assert_eq!(inner.bytes, held);
            assert!(inner.records.values().all(|record| lock(&record.ring).bytes <= limits.task_bytes));
            held
        };
        // Tasks under way keep their newest event each, whatever the bound.
        assert!(held <= limits.bytes + 20 * one, "{held} after task {number}");
    }
}

#[test]
fn a_first_event_opens_its_task_and_a_later_one_does_not() {
    let log = TaskLog::default();
    log.push(event(task(1), 3, "late"));
    assert!(log.summary(task(1)).is_none());
    log.push(event(task(1), 0, "first"));
    assert_eq!(log.summary(task(1)).unwrap().events, 1);
}

#[test]
fn a_question_is_cut_at_a_character() {
    let log = TaskLog::default();
    let question = "ä".repeat(MAX_QUESTION_CHARS + 1);
    log.open(task(1), TaskMeta { question, strategy: String::new() }).unwrap();
    assert_eq!(log.summary(task(1)).unwrap().meta.question.chars().count(), MAX_QUESTION_CHARS);
}
