//! Answers: what is streamed, where they end, what is recorded about them.

use mistralrs::{TextMessageRole, TextMessages};

use super::*;
use crate::Finish;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_streamed_in_pieces_that_make_its_text() {
    let tiny = Tiny::open().await;
    let (answer, pieces) = stream(&tiny.engine, sampled("hello", 40, 1)).await;
    let answer = answer.unwrap();
    assert_eq!(pieces.concat(), answer.text);
    assert!(pieces.len() > 10, "{} pieces", pieces.len());
    assert_eq!(answer.finish, Finish::Length);
    assert_eq!(answer.completion_tokens, 40);
    assert_eq!(answer.token_ids.len(), 40);
    assert!(answer.logprobs.is_empty());
    // One token a byte, and only the first piece loses its leading white space.
    assert!(answer.text.is_ascii() && answer.text.len() > 35, "{:?}", answer.text);
    assert_eq!(answer.model, tiny.engine.info()[0]);
    assert!(answer.prefill.as_nanos() > 0 && answer.decode.as_nanos() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_say_how_many_tokens_were_made_however_they_were_merged() {
    let tiny = Tiny::open().await;
    // A reader that takes nothing until the end gets the first piece, and all the others as one.
    let (sender, mut receiver) = mpsc::channel::<crate::Chunk>(1);
    let generating = tiny.engine.generate(sampled("hello", 40, 1), sender, CancellationToken::new());
    let reading = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let mut chunks = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            chunks.push(chunk);
        }
        chunks
    };
    let (answer, chunks) = tokio::join!(generating, reading);
    assert!(chunks.len() < 20, "{} pieces of 40 tokens were not merged", chunks.len());
    assert!(chunks.is_sorted_by_key(|chunk| chunk.tokens) && chunks[0].tokens >= 1, "{chunks:?}");
    assert_eq!(chunks.last().unwrap().tokens, answer.unwrap().completion_tokens);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_is_described() {
    let tiny = Tiny::open_with(|config| config.context = Some(300)).await;
    let info = tiny.engine.info().remove(0);
    let weights = std::fs::read(tiny.dir.path().join("model.safetensors")).unwrap();
    assert_eq!(info.fingerprint, *blake3::hash(&weights).as_bytes());
    assert_eq!(info.bytes, weights.len() as u64);
    assert_eq!((info.architecture.as_str(), info.quantisation.as_str()), ("llama", "F32"));
    assert_eq!(info.context, 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_text_ends_the_answer_and_is_not_in_it() {
    let tiny = Tiny::open().await;
    let whole = tiny.generate(sampled("hello", 60, 3)).await.unwrap();
    for (from, len) in [(0, 1), (20, 1), (20, 3), (30, 6)] {
        let stop = whole.text[from..from + len].to_owned();
        let request = GenerateRequest { stop: vec![stop.clone()], ..sampled("hello", 60, 3) };
        let (answer, pieces) = stream(&tiny.engine, request).await;
        let answer = answer.unwrap();
        let expected = &whole.text[..whole.text.find(&stop).unwrap()];
        assert_eq!(answer.text, expected);
        assert_eq!(pieces.concat(), expected);
        assert_eq!(answer.finish, Finish::Stop);
        // The tokens are the answer's and the stop text's, one a byte, however the engine overran.
        let tokens = answer.token_ids.len();
        assert_eq!(answer.token_ids, whole.token_ids[..tokens]);
        assert_eq!(tokens, expected.len() + len + whole.token_ids.len() - whole.text.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logprobs_are_natural_logarithms_of_the_models_own_probabilities() {
    let tiny = Tiny::open().await;
    let request = GenerateRequest { logprobs: true, ..ask("what is this", 12) };
    let answer = tiny.generate(request).await.unwrap();
    assert_eq!(answer.logprobs.len(), answer.token_ids.len());

    // The same prompt's logits, straight from mistral.rs, through a softmax of our own.
    let live = tiny.engine.live().await.unwrap();
    let messages = TextMessages::new().add_message(TextMessageRole::User, "what is this");
    let raw = live.loaded.model.send_raw_chat_request(messages).await.unwrap();
    let (chunks, tokens) = raw;
    assert_eq!(tokens.len() as u32, answer.prompt_tokens);
    let logits = chunks.last().unwrap().flatten_to(candle_core::D::Minus2).unwrap();
    let rows = logits.to_dtype(candle_core::DType::F32).unwrap().to_vec2::<f32>().unwrap();
    let last = rows.last().unwrap();
    let total = last.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
    let best = last.iter().copied().fold(f32::MIN, f32::max);
    assert_eq!(last[answer.token_ids[0] as usize], best);
    let expected = f64::from(best) - total;
    assert!((f64::from(answer.logprobs[0]) - expected).abs() < 1e-4, "{} {expected}", answer.logprobs[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scoring_an_answer_gives_the_logprobs_it_was_sampled_with() {
    let tiny = Tiny::open().await;
    let request = GenerateRequest { logprobs: true, ..sampled("hello there", 30, 5) };
    let answer = tiny.generate(request).await.unwrap();
    let messages = [ChatMessage::user("hello there")];
    let cancel = CancellationToken::new();
    let scores = tiny.engine.score(&messages, &answer.token_ids, cancel.clone()).await.unwrap();
    assert_eq!(scores, answer.logprobs);
    // An answer that ends in half a character ends without a last message from mistral.rs.
    let half = [4 + 0xc3];
    let scores = tiny.engine.score(&messages, &half, cancel.clone()).await.unwrap();
    assert!(scores.len() == 1 && scores[0] < -5.0, "{scores:?}");
    // The end token ends it; nothing can follow.
    let ended = tiny.engine.score(&messages, &[40, 2, 41], cancel).await.unwrap_err();
    assert!(matches!(ended, EngineError::InvalidRequest { .. }), "{ended}");
}

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "name": { "type": "string", "pattern": "^[a-z]{1,8}$" },
        "parts": {
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": { "type": "integer", "minimum": 0, "maximum": 99 }
        }
    },
    "required": ["name", "parts"],
    "additionalProperties": false
}"#;

fn satisfies_schema(text: &str) -> bool {
    let Ok(json) = serde_json::from_str::<serde_json::Value>(text) else { return false };
    let Some(object) = json.as_object() else { return false };
    let name = object.get("name").and_then(|name| name.as_str()).unwrap_or_default();
    let parts = object.get("parts").and_then(|parts| parts.as_array()).cloned().unwrap_or_default();
    object.len() == 2
        && (1..=8).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase())
        && (1..=3).contains(&parts.len())
        && parts.iter().all(|part| part.as_u64().is_some_and(|part| part <= 99))
}

/// A model of random weights would never write this by itself: each token must come from the mask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grammar_and_the_sampling_hook_compose() {
    let tiny = Tiny::open().await;
    let request = |seed: u64| GenerateRequest {
        json_schema: Some(SCHEMA.to_owned()),
        logprobs: true,
        ..sampled("plan", 120, seed)
    };
    let mut alone = Vec::new();
    let mut texts = std::collections::BTreeSet::new();
    for seed in 0..16 {
        let answer = tiny.generate(request(seed)).await.unwrap();
        assert!(satisfies_schema(&answer.text), "seed {seed}: {:?}", answer.text);
        assert_eq!(answer.finish, Finish::Stop);
        assert_eq!(answer.token_ids.last(), Some(&0), "the grammar's end token");
        assert!(answer.token_ids.len() <= answer.text.len() + 1, "it went on after the end");
        assert!(answer.logprobs.iter().all(|logprob| logprob.is_finite() && *logprob <= 0.0));
        texts.insert(answer.text.clone());
        alone.push(answer);
    }
    assert!(texts.len() > 12, "seeds must matter: {texts:?}");
    let together = futures::future::join_all((0..16).map(|seed| tiny.generate(request(seed)))).await;
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!(together.unwrap().text, alone.text);
    }
    let greedy = GenerateRequest { json_schema: Some(SCHEMA.to_owned()), ..ask("plan", 120) };
    let answer = tiny.generate(greedy).await.unwrap();
    assert!(satisfies_schema(&answer.text), "{:?}", answer.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_schemas_are_typed_errors_and_harm_nobody() {
    let tiny = Tiny::open().await;
    for schema in ["{", r#"{"type": "no such type"}"#, r##"{"$ref": "#/nowhere"}"##, "7"] {
        let request = GenerateRequest { json_schema: Some(schema.to_owned()), ..ask("x", 5) };
        let error = tiny.generate(request).await.unwrap_err();
        assert!(matches!(error, EngineError::InvalidSchema { .. }), "{schema}: {error}");
        assert!(!error.is_retryable_elsewhere());
    }
    assert_eq!(tiny.generate(ask("x", 5)).await.unwrap().completion_tokens, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_context_bounds_prompt_and_answer_together() {
    let tiny = Tiny::open_with(|config| config.context = Some(64)).await;
    let short = tiny.generate(ask("0123456789", 1_000)).await.unwrap();
    assert_eq!(short.prompt_tokens + short.completion_tokens, 64);
    assert_eq!(short.finish, Finish::Length);
    // One token a byte, plus the chat template.
    let error = tiny.generate(ask(&"x".repeat(60), 5)).await.unwrap_err();
    let EngineError::ContextExceeded { prompt_tokens, context: 64 } = error else { panic!("{error}") };
    assert!((64..120).contains(&prompt_tokens), "{prompt_tokens}");
    assert!(error.is_retryable_elsewhere() && !error.is_retryable());
    // A megabyte is refused without being tokenised.
    let started = std::time::Instant::now();
    let error = tiny.generate(ask(&"x".repeat(1 << 20), 5)).await.unwrap_err();
    assert!(matches!(error, EngineError::ContextExceeded { .. }), "{error}");
    assert!(started.elapsed().as_millis() < 50, "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senseless_requests_are_refused() {
    let tiny = Tiny::open().await;
    let good = ask("x", 5);
    let bad = [
        GenerateRequest { messages: Vec::new(), ..good.clone() },
        GenerateRequest { max_tokens: 0, ..good.clone() },
        GenerateRequest { sampling: Sampling::seeded(0, f32::NAN), ..good.clone() },
        GenerateRequest { sampling: Sampling { top_p: 1.5, ..Sampling::greedy() }, ..good.clone() },
        GenerateRequest { stop: vec![String::new()], ..good.clone() },
        GenerateRequest { stop: vec!["x".to_owned(); 17], ..good },
    ];
    for request in bad {
        let error = tiny.generate(request).await.unwrap_err();
        assert!(matches!(error, EngineError::InvalidRequest { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_without_a_chat_template_still_answers() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_tiny_model(dir.path(), SEED).unwrap();
    let path = dir.path().join("tokenizer_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("chat_template");
    std::fs::write(&path, json.to_string()).unwrap();
    let engine = MistralEngine::open(config(dir.path())).await.unwrap();
    let answer = run(&engine, ask("hello", 8)).await.unwrap();
    assert_eq!(answer.prompt_tokens as usize, "user: hello\n\nassistant:".len());
    assert_eq!(answer.completion_tokens, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calibration_measures_in_less_than_two_seconds() {
    let tiny = Tiny::open().await;
    let speed = tiny.engine.calibrate().await.unwrap();
    assert!(speed.took.as_secs_f32() < 2.0, "{speed:?}");
    assert!(speed.prefill_tokens_per_s > 10.0 && speed.decode_tokens_per_s > 10.0, "{speed:?}");
}
