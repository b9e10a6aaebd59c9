//! What breaks, and what happens then.

use std::time::{Duration, Instant};

use futures::future::join_all;

use super::*;
use crate::Finish;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_ends_the_answer_at_once() {
    let tiny = Tiny::open_with(|config| config.max_concurrent = 1).await;
    let (sender, mut receiver) = mpsc::channel(4);
    let cancel = CancellationToken::new();
    let request = sampled("hello", 900, 1);
    let generating = tiny.engine.generate(request, sender, cancel.clone());
    let cancelling = async {
        receiver.recv().await.unwrap();
        cancel.cancel();
        Instant::now()
    };
    let (answer, cancelled) = tokio::join!(generating, cancelling);
    let answer = answer.unwrap();
    assert_eq!(answer.finish, Finish::Cancelled);
    assert!(answer.completion_tokens < 600, "{}", answer.completion_tokens);
    assert!(cancelled.elapsed() < Duration::from_millis(200), "{:?}", cancelled.elapsed());
    // The only slot is free again, and so is the engine.
    let started = Instant::now();
    tiny.generate(ask("next", 2)).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_future_frees_the_slot_and_the_engine() {
    let tiny = Tiny::open_with(|config| config.max_concurrent = 1).await;
    let (sender, mut receiver) = mpsc::channel(1);
    let generating = tiny.engine.generate(sampled("hello", 900, 1), sender, CancellationToken::new());
    tokio::select! {
        _ = generating => panic!("it cannot be done yet"),
        _ = receiver.recv() => {}
    }
    let started = Instant::now();
    tiny.generate(ask("next", 2)).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    becomes_idle(&tiny).await;
}

/// Waits until no request runs or waits; a slot is freed when mistral.rs let go of its request.
async fn becomes_idle(tiny: &Tiny) {
    let started = Instant::now();
    while tiny.engine.load().running + tiny.engine.load().queued > 0 {
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", tiny.engine.load());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_bounded_and_waiting_can_be_cancelled() {
    let tiny = Tiny::open_with(|config| {
        config.max_concurrent = 1;
        config.max_queued = 2;
    })
    .await;
    let cancel = CancellationToken::new();
    let generate = |cancel: &CancellationToken| {
        let (sender, _) = mpsc::channel(1);
        tiny.engine.generate(sampled("hello", 900, 1), sender, cancel.clone())
    };
    let (running, waiting) = (CancellationToken::new(), CancellationToken::new());
    let refused = async {
        while tiny.engine.load().queued < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let refused = generate(&cancel).await.unwrap_err();
        waiting.cancel();
        refused
    };
    let finish = async {
        let refused = refused.await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        running.cancel();
        refused
    };
    let (first, second, third, refused) =
        tokio::join!(generate(&running), generate(&waiting), generate(&waiting), finish);
    assert_eq!(refused, EngineError::Overloaded { queued: 2, limit: 2 });
    assert!(refused.is_retryable() && refused.is_retryable_elsewhere());
    assert_eq!(first.unwrap().finish, Finish::Cancelled);
    assert_eq!(second.unwrap_err(), EngineError::Cancelled);
    assert_eq!(third.unwrap_err(), EngineError::Cancelled);
    becomes_idle(&tiny).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_does_not_slow_the_others() {
    let tiny = Tiny::open().await;
    let (sender, mut receiver) = mpsc::channel(1);
    let slow = tiny.engine.generate(sampled("slow", 400, 1), sender, CancellationToken::new());
    let reading = async {
        let mut text = String::new();
        while let Some(chunk) = receiver.recv().await {
            text.push_str(&chunk.text);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        text
    };
    let fast = async {
        let started = Instant::now();
        let answer = tiny.generate(sampled("fast", 100, 2)).await.unwrap();
        (answer, started.elapsed())
    };
    let (slow, text, (fast, took)) = tokio::join!(slow, reading, fast);
    assert_eq!(text, slow.unwrap().text, "nothing is lost");
    assert_eq!(fast.completion_tokens, 100);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_the_engine_thread_is_an_error_and_the_next_request_works() {
    let tiny = Tiny::open().await;
    let reference = tiny.generate(sampled("hello", 20, 3)).await.unwrap();
    for crash in 1..=3 {
        testing::panic_after(&tiny.engine, 5);
        let error = tiny.generate(sampled("hello", 20, 3)).await.unwrap_err();
        assert!(matches!(error, EngineError::Crashed { .. }), "{error}");
        assert!(error.is_retryable_elsewhere());
        let started = Instant::now();
        let answer = tiny.generate(sampled("hello", 20, 3)).await.unwrap();
        assert_eq!(answer.token_ids, reference.token_ids);
        assert_eq!(tiny.engine.load().restarts, crash);
        // The first restart keeps the weights; the later ones load them, with back-off.
        assert!(started.elapsed() < Duration::from_secs(2), "crash {crash}: {:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_fails_the_request_that_ran_and_those_that_wait_are_served() {
    let tiny = Tiny::open().await;
    testing::panic_after(&tiny.engine, 40);
    let batch = (0..8).map(|seed| tiny.generate(sampled("hello", 60, seed)));
    let batch = tokio::time::timeout(Duration::from_secs(20), join_all(batch)).await.unwrap();
    let crashed = |result: &Result<Generated, EngineError>| matches!(result, Err(EngineError::Crashed { .. }));
    assert_eq!(batch.iter().filter(|result| crashed(result)).count(), 1, "{batch:?}");
    assert_eq!(batch.iter().filter(|result| result.is_ok()).count(), 7, "{batch:?}");
    assert_eq!(tiny.generate(ask("next", 5)).await.unwrap().completion_tokens, 5);
    assert_eq!(tiny.engine.load().restarts, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_cannot_come_back_says_why_and_comes_back_when_it_can() {
    let tiny = Tiny::open_with(|config| config.restart_wait = Duration::from_millis(300)).await;
    let weights = tiny.dir.path().join("model.safetensors");
    let hidden = tiny.dir.path().join("hidden");
    // The first crash is cured without the file; the second needs it.
    testing::panic_after(&tiny.engine, 0);
    tiny.generate(ask("x", 3)).await.unwrap_err();
    tiny.generate(ask("x", 3)).await.unwrap();
    std::fs::rename(&weights, &hidden).unwrap();
    testing::panic_after(&tiny.engine, 0);
    tiny.generate(ask("x", 3)).await.unwrap_err();
    tokio::time::sleep(Duration::from_millis(400)).await;
    let error = tiny.generate(ask("x", 3)).await.unwrap_err();
    let EngineError::Crashed { detail } = &error else { panic!("{error}") };
    assert!(detail.contains("safetensors"), "{detail}");
    std::fs::rename(&hidden, &weights).unwrap();
    let started = Instant::now();
    while tiny.generate(ask("x", 3)).await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}

/// What the model is was told to others by its fingerprint; under that name nothing else may answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_weights_in_the_same_place_are_not_taken_for_the_model() {
    let tiny = Tiny::open_with(|config| config.restart_wait = Duration::from_millis(300)).await;
    testing::panic_after(&tiny.engine, 0);
    tiny.generate(ask("x", 3)).await.unwrap_err();
    let before = tiny.generate(ask("x", 3)).await.unwrap();
    // The second crash is cured by loading the files again.
    testing::write_tiny_model(tiny.dir.path(), SEED + 1).unwrap();
    testing::panic_after(&tiny.engine, 0);
    tiny.generate(ask("x", 3)).await.unwrap_err();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let error = tiny.generate(ask("x", 3)).await.unwrap_err();
    let EngineError::Crashed { detail } = &error else { panic!("{error}") };
    assert!(detail.contains("not those that were loaded before"), "{detail}");
    testing::write_tiny_model(tiny.dir.path(), SEED).unwrap();
    let started = Instant::now();
    let after = loop {
        match tiny.generate(ask("x", 3)).await {
            Ok(answer) => break answer,
            Err(_) => assert!(started.elapsed() < Duration::from_secs(10)),
        }
    };
    assert_eq!(after.token_ids, before.token_ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_paths_and_damaged_models_are_typed_errors() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_tiny_model(dir.path(), SEED).unwrap();
    let open = |path: &Path| MistralEngine::open(config(path));

    let missing = MistralConfig::new(ModelSource::Gguf(dir.path().join("none.gguf")));
    let error = MistralEngine::open(missing).await.unwrap_err();
    assert!(matches!(error, EngineError::ModelNotFound { .. }), "{error}");
    assert!(error.to_string().contains("scripts/models"), "{error}");

    let garbage = dir.path().join("garbage.gguf");
    std::fs::write(&garbage, vec![7u8; 4096]).unwrap();
    let error = open(&garbage).await.unwrap_err();
    assert!(matches!(error, EngineError::ModelCorrupt { .. }), "{error}");

    // Whole files whose contents contradict each other: found by mistral.rs, by error or by panic.
    let config_path = dir.path().join("config.json");
    let good = std::fs::read_to_string(&config_path).unwrap();
    let changes = [
        ("\"hidden_size\":128", "\"hidden_size\":96"),
        ("\"num_attention_heads\":4", "\"num_attention_heads\":0"),
        ("\"LlamaForCausalLM\"", "\"NoSuchForCausalLM\""),
        ("\"num_hidden_layers\":4", "\"num_hidden_layers\":5"),
    ];
    for (from, to) in changes {
        let bad = good.replace(from, to);
        assert_ne!(bad, good);
        std::fs::write(&config_path, bad).unwrap();
        let error = open(dir.path()).await.unwrap_err();
        assert!(matches!(error, EngineError::ModelCorrupt { .. }), "{to}: {error}");
    }
    std::fs::write(&config_path, good).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let error = open(dir.path()).await.unwrap_err();
    assert!(matches!(error, EngineError::ModelCorrupt { .. }), "{error}");
}
