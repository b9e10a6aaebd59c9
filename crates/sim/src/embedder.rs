//! A virtual embedder: a text becomes the sum of one pseudo-random direction a word.
//!
//! Texts that share words lie close to each other, as with a real embedder, and the same text always gives the same embedding.
//! Each text is computed once in a run.

use std::collections::BTreeMap;

use chorus_machine::Rng;
use chorus_protocol::Embedding;
use chorus_protocol::embedding::DIMENSIONS;

/// Texts remembered before the memory is emptied.
const MAX_TEXTS: usize = 65_536;

/// The one embedder that all virtual nodes share.
#[derive(Debug, Default)]
pub struct Embedder {
    known: BTreeMap<String, Embedding>,
}

impl Embedder {
    /// Embeds a text.
    pub fn embed(&mut self, text: &str) -> Embedding {
        if let Some(known) = self.known.get(text) {
            return known.clone();
        }
        if self.known.len() >= MAX_TEXTS {
            self.known.clear();
        }
        let embedding = compute(text);
        self.known.insert(text.to_owned(), embedding.clone());
        embedding
    }
}

fn compute(text: &str) -> Embedding {
    let mut sum = [0.0f32; DIMENSIONS];
    add(&mut sum, "", 0.1);
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        add(&mut sum, &word.to_lowercase(), 1.0);
    }
    Embedding::from_f32(&sum).unwrap_or_else(|| {
        let mut unit = [0.0f32; DIMENSIONS];
        unit[0] = 1.0;
        Embedding::from_f32(&unit).expect("a unit vector is finite and not zero")
    })
}

fn add(sum: &mut [f32; DIMENSIONS], word: &str, weight: f32) {
    let mut rng = Rng::from_seed(blake3::derive_key("chorus simulated embedder v1", word.as_bytes()));
    for slot in sum {
        #[allow(clippy::cast_possible_truncation, reason = "a direction needs no more digits")]
        let component = (2.0 * rng.unit() - 1.0) as f32;
        *slot += weight * component;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_share_words_are_close_and_others_are_not() {
        let mut embedder = Embedder::default();
        let maths = embedder.embed("solve equations and arithmetic");
        assert_eq!(maths, embedder.embed("solve equations and arithmetic"));
        let near = maths.cosine(&embedder.embed("arithmetic and equations"));
        let far = maths.cosine(&embedder.embed("paint a landscape"));
        assert!(near > 0.7 && far < 0.3, "near {near}, far {far}");
        embedder.embed("");
    }
}
