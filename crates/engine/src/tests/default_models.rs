//! The default models, as `scripts/models` fetches them.

use super::*;
use crate::{EMBEDDING_DIMENSIONS, Embedder, Finish};

/// The first requantised file that is there, else the shipped one.
fn language_model() -> std::path::PathBuf {
    let names = ["SmolLM2-135M-Instruct.Q8_0.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"];
    let found = names.iter().find_map(|name| testing::default_model(name).ok());
    found.unwrap_or_else(|| panic!("{}", testing::default_model(names[1]).unwrap_err()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn smollm2_answers_plans_by_grammar_and_repeats_itself() {
    let engine =
        MistralEngine::open(MistralConfig { context: Some(1_024), ..config(&language_model()) }).await.unwrap();
    let info = engine.info().remove(0);
    assert_eq!(info.architecture, "llama");
    assert!(["Q8_0", "Q4_1"].contains(&info.quantisation.as_str()), "{info:?}");

    let answer = run(&engine, ask("What is the capital of France? Answer in one word.", 16)).await.unwrap();
    assert!(answer.text.contains("Paris"), "{:?}", answer.text);
    assert_eq!(answer.finish, Finish::Stop);

    let schema = r#"{"type":"object","properties":{"steps":{"type":"array","minItems":2,"maxItems":3,
        "items":{"type":"string","maxLength":60}}},"required":["steps"],"additionalProperties":false}"#;
    let plan = GenerateRequest {
        json_schema: Some(schema.to_owned()),
        logprobs: true,
        ..sampled("Split this task into steps: bake a cake.", 160, 42)
    };
    let first = run(&engine, plan.clone()).await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&first.text).unwrap();
    assert!((2..=3).contains(&json["steps"].as_array().unwrap().len()), "{json}");

    // Again, beside another request.
    let company = sampled("Tell me about the sea.", 60, 1);
    let (again, _) = tokio::join!(run(&engine, plan), run(&engine, company));
    let again = again.unwrap();
    assert_eq!((again.token_ids, again.logprobs), (first.token_ids, first.logprobs));

    let long = ask(&"word ".repeat(2_000), 5);
    let error = run(&engine, long).await.unwrap_err();
    assert!(matches!(error, EngineError::ContextExceeded { context: 1_024, .. }), "{error}");
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn minilm_embeds_what_means_the_same_alike() {
    let embedder = Embedder::open(testing::default_model("all-MiniLM-L6-v2").unwrap()).await.unwrap();
    let texts: Vec<String> = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "",
        "Prove that the square root of two is irrational.",
    ]
    .map(str::to_owned)
    .to_vec();
    let embedded = embedder.embed(&texts).await.unwrap();
    let (together, mut counted) = (embedded.embeddings, 0);
    for (text, embedding) in texts.iter().zip(&together) {
        assert_eq!(embedding.len(), EMBEDDING_DIMENSIONS);
        assert!((dot(embedding, embedding) - 1.0).abs() < 1e-4, "{text:?}");
        // Padding must not matter.
        let alone = embedder.embed(std::slice::from_ref(text)).await.unwrap();
        assert!(dot(&alone.embeddings[0], embedding) > 0.9999, "{text:?}");
        counted += alone.tokens;
    }
    assert_eq!(embedded.tokens, counted);
    assert_eq!(embedder.embed(&texts[3..4]).await.unwrap().tokens, 2, "an empty text has a beginning and an end");
    let (same, other) = (dot(&together[0], &together[1]), dot(&together[0], &together[2]));
    assert!((0.70..0.80).contains(&same), "{same}");
    assert!(other < 0.25, "{other}");
    assert!(dot(&together[0], &together[4]) < 0.2);

    let long = vec!["word ".repeat(50_000); 2];
    let long = embedder.embed(&long).await.unwrap();
    assert_eq!((long.embeddings.len(), long.tokens), (2, 2 * 256), "what is cut off is not read");
    assert!(embedder.embed(&vec![String::new(); 2_000]).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_without_a_bert_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = Embedder::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, EngineError::ModelNotFound { .. }), "{error}");
    testing::write_tiny_model(dir.path(), 1).unwrap();
    let error = Embedder::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, EngineError::ModelUnsupported { .. }), "{error}");
}
