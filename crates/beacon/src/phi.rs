//! φ: how well a capability fits a requirement. The one function behind every election, so that a bidder cannot score itself.
//!
//! 1. **Hard constraints.** A model with at least `min_context` tokens of context (the named model, if one is named), and the
//!    tool, if one is named. A requirement that names a tool, no model and no context needs no model. One constraint that is
//!    not met makes the result `None`: the node cannot do the job. A requirement that names a policy wants a node that offers to
//!    sample for it, and nothing else.
//! 2. **Meaning** `e`: the largest cosine between the requirement's embedding and a skill's, clipped to [0, 1]. A node whose
//!    skills carry no embedding has shown nothing, so its `e` is 0.
//! 3. **Words** `t`: the share of the requirement's tags that any of the skills carries.
//!
//! ```text
//!        ⎧ 1                  the requirement asks for neither
//!  φ  =  ⎨ e                  only an embedding
//!        ⎪ t                  only tags
//!        ⎩ 0.7·e + 0.3·t      both
//! ```
//!
//! Symphony has φ in [0, 1], "for instance the cosine"; its code compares strings letter by letter, which routes by spelling.
//! Cosines of quantised embeddings are integer arithmetic up to one division, so every node computes the same φ.

use std::time::Duration;

use chorus_protocol::capability::{Capability, ModelOffer};
use chorus_protocol::job::{Payload, Requirement};

/// The share of the embedding in φ when tags are asked for too.
pub const EMBEDDING_SHARE: f64 = 0.7;
/// Bytes of text that make one token of English, roughly: for estimates of time alone, never of fit.
const BYTES_PER_TOKEN: f64 = 4.0;

/// Returns how well `capability` fits `requirement`, in [0, 1], or `None` when it does not meet a hard constraint.
#[must_use]
pub fn phi(capability: &Capability, requirement: &Requirement) -> Option<f64> {
    if !meets(capability, requirement) {
        return None;
    }
    let score = match (requirement.embedding.is_some(), !requirement.tags.is_empty()) {
        (false, false) => 1.0,
        (true, false) => meaning(capability, requirement),
        (false, true) => words(capability, requirement),
        (true, true) => {
            EMBEDDING_SHARE * meaning(capability, requirement)
                + (1.0 - EMBEDDING_SHARE) * words(capability, requirement)
        }
    };
    Some(score.clamp(0.0, 1.0))
}

/// Returns a match score in thousandths, as it stands in messages.
#[must_use]
pub fn milli(score: f64) -> u16 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1000")]
    let milli = (score.clamp(0.0, 1.0) * 1_000.0).round() as u16;
    milli
}

/// Returns the model with which `capability` would do this, if it has one: the first that is large enough.
#[must_use]
pub fn model_for<'a>(capability: &'a Capability, requirement: &Requirement) -> Option<&'a ModelOffer> {
    capability.models.iter().find(|offer| {
        offer.context >= requirement.min_context && requirement.model.as_ref().is_none_or(|name| *name == offer.name)
    })
}

fn meets(capability: &Capability, requirement: &Requirement) -> bool {
    if let Some(policy) = &requirement.policy {
        return capability.sampling.as_ref().is_some_and(|offer| offer.covers(policy));
    }
    let needs_no_model = requirement.tool.is_some() && requirement.model.is_none() && requirement.min_context == 0;
    let has_model = needs_no_model || model_for(capability, requirement).is_some();
    let has_tool = requirement.tool.as_ref().is_none_or(|name| capability.tools.iter().any(|tool| tool.name == *name));
    capability.slots > 0 && has_model && has_tool
}

fn meaning(capability: &Capability, requirement: &Requirement) -> f64 {
    let Some(wanted) = &requirement.embedding else { return 0.0 };
    let offered = capability.skills.iter().filter_map(|skill| skill.embedding.as_ref());
    offered.map(|skill| skill.cosine(wanted)).fold(0.0, f64::max).min(1.0)
}

fn words(capability: &Capability, requirement: &Requirement) -> f64 {
    let carried = |tag: &_| capability.skills.iter().any(|skill| skill.tags.contains(tag));
    let hits = requirement.tags.iter().filter(|tag| carried(tag)).count();
    ratio(hits, requirement.tags.len())
}

fn ratio(part: usize, whole: usize) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "at most eight tags")]
    let share = part as f64 / whole.max(1) as f64;
    share
}

/// Says which constraint none of `capabilities` meets: the first in the order in which a person would look for it.
pub fn why_nobody<'a>(capabilities: impl Iterator<Item = &'a Capability> + Clone, requirement: &Requirement) -> String {
    let any = |test: &dyn Fn(&Capability) -> bool| capabilities.clone().any(test);
    if !any(&|_| true) {
        return "the ledger knows no node yet".to_owned();
    }
    if let Some(policy) = &requirement.policy {
        return format!("no node offers to sample for {policy}");
    }
    if let Some(tool) = &requirement.tool
        && !any(&|c| c.tools.iter().any(|offer| offer.name == *tool))
    {
        return format!("no node offers the tool '{tool}'");
    }
    match &requirement.model {
        Some(model) if !any(&|c| c.models.iter().any(|offer| offer.name == *model)) => {
            return format!("no node runs the model '{model}'");
        }
        None if !any(&|c| !c.models.is_empty()) => return "no node runs a model".to_owned(),
        _ => {}
    }
    if !any(&|c| model_for(c, requirement).is_some()) {
        return format!("no such model holds the {} tokens of prompt and answer", requirement.min_context);
    }
    "no single node meets all of the requirement".to_owned()
}

/// Estimates how long `capability` needs for `payload` by its own measurements: reading at its prefill rate, then writing
/// `max_tokens` at its decode rate. `None` when the capability carries no rates.
#[must_use]
pub fn claimed_time(capability: &Capability, requirement: &Requirement, payload: &Payload) -> Option<Duration> {
    #[allow(clippy::cast_precision_loss, reason = "lengths below a megabyte")]
    let bytes = payload.turns.iter().map(|turn| turn.content.len()).sum::<usize>() as f64;
    time_for(capability, requirement, bytes / BYTES_PER_TOKEN, f64::from(payload.max_tokens))
}

/// Estimates how long `capability` needs to read and write that many tokens, by its own measurements.
#[must_use]
pub fn time_for(capability: &Capability, requirement: &Requirement, read: f64, written: f64) -> Option<Duration> {
    let model = model_for(capability, requirement)?;
    let decode = model.decode.tokens_per_s();
    if decode <= 0.0 {
        return None;
    }
    let prefill = model.prefill.tokens_per_s().max(decode);
    Duration::try_from_secs_f64((read / prefill + written / decode).clamp(0.0, 1e6)).ok()
}

#[cfg(test)]
mod tests {
    use chorus_protocol::Embedding;
    use chorus_protocol::bounded::{List, Text};

    use super::*;
    use crate::testing::{capability, skill};

    fn axis(i: usize) -> Embedding {
        let mut vector = [0.0; 384];
        vector[i] = 1.0;
        Embedding::from_f32(&vector).unwrap()
    }

    fn tags(words: &[&str]) -> List<Text<32>, 8> {
        List::truncated(words.iter().map(|w| Text::truncated(w)))
    }

    #[test]
    fn hard_constraints_are_hard() {
        let mut node = capability(1, 4096);
        node.skills = List::truncated([skill(&["math"], None)]);
        let mut wanted = Requirement::default();
        assert_eq!(phi(&node, &wanted), Some(1.0));
        wanted.min_context = 4097;
        assert_eq!(phi(&node, &wanted), None);
        assert!(why_nobody([&node].into_iter(), &wanted).contains("4097"));
        wanted.min_context = 0;
        wanted.model = Some(Text::truncated("another"));
        assert_eq!(phi(&node, &wanted), None);
        assert!(why_nobody([&node].into_iter(), &wanted).contains("another"));
        wanted.model = None;
        wanted.tool = Some(Text::truncated("search"));
        assert_eq!(phi(&node, &wanted), None);
        assert!(why_nobody([&node].into_iter(), &wanted).contains("search"));
        node.slots = 0;
        assert_eq!(phi(&node, &Requirement::default()), None, "a node without a slot runs nothing");
        node.models = List::default();
        assert!(why_nobody([&node].into_iter(), &Requirement::default()).contains("no node runs a model"));
    }

    #[test]
    fn meaning_and_words_are_weighed_as_documented() {
        let mut node = capability(1, 4096);
        node.skills = List::truncated([skill(&["math"], Some(axis(0))), skill(&["law", "tax"], Some(axis(1)))]);
        let ask = |embedding: Option<Embedding>, words: &[&str]| {
            let wanted = Requirement { embedding, tags: tags(words), ..Requirement::default() };
            phi(&node, &wanted).unwrap()
        };
        assert_eq!(ask(Some(axis(1)), &[]), 1.0, "the best skill counts, not the first");
        assert_eq!(ask(Some(axis(2)), &[]), 0.0);
        assert_eq!(ask(None, &["math", "tax", "cooking", "dance"]), 0.5, "tags may come from several skills");
        assert!((ask(Some(axis(0)), &["cooking"]) - 0.7).abs() < 1e-12);
        assert!((ask(Some(axis(2)), &["law"]) - 0.3).abs() < 1e-12);
    }

    #[test]
    fn opposite_meaning_is_clipped_and_no_embedding_shows_nothing() {
        let mut minus = [0.0; 384];
        minus[0] = -1.0;
        let mut node = capability(1, 4096);
        node.skills = List::truncated([skill(&[], Embedding::from_f32(&minus))]);
        let wanted = Requirement { embedding: Some(axis(0)), ..Requirement::default() };
        assert_eq!(phi(&node, &wanted), Some(0.0));
        node.skills = List::truncated([skill(&[], None)]);
        assert_eq!(phi(&node, &wanted), Some(0.0));
    }

    #[test]
    fn time_is_reading_plus_writing() {
        let node = capability(1, 4096);
        let time = time_for(&node, &Requirement::default(), 1000.0, 100.0).unwrap();
        assert!((time.as_secs_f64() - (1000.0 / 500.0 + 100.0 / 50.0)).abs() < 1e-9);
    }
}
