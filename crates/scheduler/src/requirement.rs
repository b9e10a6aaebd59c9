//! What a job asks of its executor in public, and how little that gives away.
//!
//! A requirement is gossiped, so it never holds the question or anything that can be turned back into it:
//!
//! - a planner is looked for by a constant;
//! - a step is looked for by the *kind of work* that its plan names: at most four words, of which the embedding travels, and as
//!   tags only words that nodes of the ledger use for their skills;
//! - the whole question is looked for by a skill that the user names, or else by the public skill that lies nearest to it. The
//!   question's own embedding never leaves the node.

use chorus_machine::Time;
use chorus_protocol::Embedding;
use chorus_protocol::bounded::{List, Text};
use chorus_protocol::capability::{ModelName, Skill, Tag};
use chorus_protocol::job::{Requirement, Turn};

/// Tags of a requirement that were taken from free words, when the ledger's own are not known.
const MAX_FREE_TAGS: usize = 3;
/// Bytes of a token of English, on average. An estimate that is too low is refused by the executor, and the job goes elsewhere;
/// one that is too high would find nobody.
const BYTES_PER_TOKEN: usize = 4;
/// Tokens that a chat template puts around a turn.
const TOKENS_PER_TURN: usize = 8;

/// Words that say nothing about a skill.
const STOP_WORDS: [&str; 14] = [
    "and", "the", "for", "with", "from", "into", "general", "basic", "simple", "skill", "skills", "kind", "work",
    "task",
];

/// The skill that a job's executor should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needed {
    /// What it is called in reports.
    pub(crate) label: String,
    /// What it means; absent without an embedder.
    pub(crate) embedding: Option<Embedding>,
    /// Words to match exactly.
    pub(crate) tags: Vec<Tag>,
}

/// A skill whose embedding may still be on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Nobody asked for it yet.
    Unasked,
    /// The embedder was asked, and is waited for until then.
    Asked {
        /// The request.
        request: u64,
        /// When the job goes on without it.
        due: Time,
    },
    /// It is there.
    Known(Needed),
}

impl Slot {
    pub(crate) fn known(&self) -> Option<&Needed> {
        match self {
            Self::Known(needed) => Some(needed),
            Self::Unasked | Self::Asked { .. } => None,
        }
    }

    pub(crate) fn due(&self) -> Option<Time> {
        match self {
            Self::Asked { due, .. } => Some(*due),
            Self::Unasked | Self::Known(_) => None,
        }
    }
}

/// Makes a requirement that a capability can be matched with.
pub(crate) fn requirement(needed: &Needed, model: Option<&ModelName>, turns: &[Turn], max_tokens: u32) -> Requirement {
    let bytes = turns.iter().fold(0usize, |sum, turn| sum.saturating_add(turn.content.len()));
    let prompt = bytes / BYTES_PER_TOKEN + turns.len() * TOKENS_PER_TURN;
    Requirement {
        embedding: needed.embedding.clone(),
        tags: List::truncated(needed.tags.iter().cloned()),
        model: model.cloned(),
        tool: None,
        min_context: u32::try_from(prompt).unwrap_or(u32::MAX).saturating_add(max_tokens),
        policy: None,
    }
}

/// Takes the tags out of a skill's text. Where skills of the ledger are known, only their words count; else a few plain words.
pub(crate) fn tags_of(text: &str, known: &[Skill]) -> Vec<Tag> {
    let mut tags: Vec<Tag> = Vec::new();
    let whole = text.to_lowercase();
    let words = whole
        .split(|c: char| !c.is_alphanumeric() && c != '-')
        .filter(|word| word.len() > 2 && !STOP_WORDS.contains(word));
    for word in words {
        let Ok(tag) = Text::new(word) else { continue };
        let usable = if known.is_empty() {
            tags.len() < MAX_FREE_TAGS && !word.contains(char::is_numeric)
        } else {
            is_known(&tag, known)
        };
        if usable && !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    tags
}

fn is_known(tag: &Tag, known: &[Skill]) -> bool {
    known.iter().any(|skill| skill.tags.contains(tag))
}

/// Returns the public skill that lies nearest to a meaning.
pub(crate) fn nearest(meaning: &Embedding, skills: &[Skill]) -> Option<Needed> {
    let scored = skills.iter().filter_map(|skill| Some((skill.embedding.as_ref()?, skill)));
    scored.max_by(|(a, _), (b, _)| meaning.cosine(a).total_cmp(&meaning.cosine(b))).map(|(embedding, skill)| Needed {
        label: skill.text.as_str().to_owned(),
        embedding: Some(embedding.clone()),
        tags: skill.tags.iter().cloned().collect(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use chorus_protocol::job::Role;

    use super::*;

    fn axis(i: usize) -> Embedding {
        let mut vector = [0.0; 384];
        vector[i] = 1.0;
        Embedding::from_f32(&vector).unwrap()
    }

    fn skill(text: &str, tags: &[&str], embedding: Option<Embedding>) -> Skill {
        Skill {
            text: Text::truncated(text),
            tags: List::truncated(tags.iter().map(|tag| Text::truncated(tag))),
            embedding,
        }
    }

    fn words(tags: &[Tag]) -> Vec<&str> {
        tags.iter().map(Text::as_str).collect()
    }

    #[test]
    fn only_words_of_the_ledger_become_tags_where_it_is_known() {
        let known = [skill("sums", &["arithmetic", "math"], None), skill("laws", &["law"], None)];
        assert_eq!(words(&tags_of("arithmetic for Alice and math", &known)), ["arithmetic", "math"]);
        assert!(tags_of("secret plans", &known).is_empty());
        assert_eq!(
            words(&tags_of("Date reasoning with 4711 and calendar dates", &[])),
            ["date", "reasoning", "calendar"]
        );
    }

    #[test]
    fn a_question_is_looked_for_by_the_nearest_public_skill() {
        let skills = [skill("a", &["x"], Some(axis(0))), skill("b", &["y"], Some(axis(1))), skill("c", &[], None)];
        let mut vector = [0.0; 384];
        (vector[0], vector[1]) = (0.2, 0.9);
        let found = nearest(&Embedding::from_f32(&vector).unwrap(), &skills).unwrap();
        assert_eq!(
            (found.label.as_str(), found.embedding),
            ("b", Some(axis(1))),
            "it is the skill's embedding that travels"
        );
        assert_eq!(nearest(&axis(0), &skills[2..]), None);
    }

    #[test]
    fn the_context_holds_prompt_and_answer() {
        let turn = Turn { role: Role::User, content: Text::truncated(&"x".repeat(400)) };
        assert_eq!(requirement(&Needed::default(), None, &[turn], 50).min_context, 100 + 8 + 50);
    }
}
