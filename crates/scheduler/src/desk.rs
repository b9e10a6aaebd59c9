//! What a task is handed while it works: the clock, the outbox, and the tables by which answers find their way back.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time};
use chorus_protocol::{Embedding, JobId, TaskId};

use crate::requirement::{Needed, Slot, tags_of};
use crate::scheduler::{SchedulerConfig, SchedulerEffect};

/// Embeddings of skills that are kept. Plans use the same few words again and again.
const MAX_CACHED_EMBEDDINGS: usize = 256;
/// How long the embedder may take before a job goes on without its embedding.
pub(crate) const EMBED_TIMEOUT: Duration = Duration::from_secs(2);

/// Who waits for what.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    /// Jobs under way.
    pub(crate) jobs: BTreeMap<JobId, TaskId>,
    /// Texts at the embedder, and who wants them.
    pub(crate) embeds: BTreeMap<u64, (TaskId, String)>,
    next_embed: u64,
    cache: Cache,
}

impl Routes {
    /// Takes an embedding in, keeps it, and returns the task that waits for it.
    pub(crate) fn embedded(&mut self, request: u64, embedding: Option<&Embedding>) -> Option<TaskId> {
        let (task, text) = self.embeds.remove(&request)?;
        if let Some(embedding) = embedding {
            self.cache.put(text, embedding.clone());
        }
        Some(task)
    }

    /// Forgets everything that an ended task waits for.
    pub(crate) fn forget(&mut self, task: TaskId) {
        self.jobs.retain(|_, owner| *owner != task);
        self.embeds.retain(|_, (owner, _)| *owner != task);
    }
}

/// The embeddings of the last few texts, oldest out first.
#[derive(Debug, Default)]
struct Cache {
    embeddings: BTreeMap<String, Embedding>,
    order: VecDeque<String>,
}

impl Cache {
    fn put(&mut self, text: String, embedding: Embedding) {
        if self.embeddings.insert(text.clone(), embedding).is_some() {
            return;
        }
        self.order.push_back(text);
        if self.order.len() > MAX_CACHED_EMBEDDINGS
            && let Some(oldest) = self.order.pop_front()
        {
            self.embeddings.remove(&oldest);
        }
    }
}

/// The scheduler's side of one call.
#[derive(Debug)]
pub(crate) struct Desk<'d, 'c> {
    pub(crate) cx: &'d mut Ctx<'c>,
    pub(crate) out: &'d mut Outbox<SchedulerEffect>,
    pub(crate) config: &'d SchedulerConfig,
    pub(crate) routes: &'d mut Routes,
}

impl Desk<'_, '_> {
    pub(crate) fn now(&self) -> Time {
        self.cx.now
    }

    /// Draws a job's id. It is random, so nobody can guess the id of another's job.
    pub(crate) fn draw_job(&mut self, task: TaskId) -> JobId {
        let job = JobId::from_bytes(self.cx.rng.bytes());
        self.routes.jobs.insert(job, task);
        job
    }

    /// Asks for a text's embedding, or finds it in the cache.
    pub(crate) fn embed(&mut self, task: TaskId, text: &str) -> Result<Embedding, (u64, Time)> {
        if let Some(embedding) = self.routes.cache.embeddings.get(text) {
            return Ok(embedding.clone());
        }
        let request = self.routes.next_embed;
        self.routes.next_embed += 1;
        self.routes.embeds.insert(request, (task, text.to_owned()));
        self.out.push(SchedulerEffect::Embed { request, text: text.to_owned() });
        Err((request, self.cx.now + EMBED_TIMEOUT))
    }

    /// Asks for a skill by its text.
    pub(crate) fn need(&mut self, task: TaskId, text: &str, known: &[chorus_protocol::capability::Skill]) -> Slot {
        match self.embed(task, text) {
            Ok(embedding) => {
                Slot::Known(Needed { label: text.to_owned(), embedding: Some(embedding), tags: tags_of(text, known) })
            }
            Err((request, due)) => Slot::Asked { request, due },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn the_cache_is_bounded_and_drops_the_oldest() {
        let mut cache = Cache::default();
        let embedding = Embedding::from_f32(&[1.0; 384]).unwrap();
        for i in 0..=MAX_CACHED_EMBEDDINGS {
            cache.put(i.to_string(), embedding.clone());
            cache.put(i.to_string(), embedding.clone());
        }
        assert_eq!((cache.embeddings.len(), cache.order.len()), (MAX_CACHED_EMBEDDINGS, MAX_CACHED_EMBEDDINGS));
        assert!(!cache.embeddings.contains_key("0"));
    }
}
