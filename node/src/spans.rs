//! One span a job, with its id, on the side that asked for it; the executor opens the other (`executor`).
//!
//! Elections, leases, losses and the end are logged inside the span, so one search for a job's id finds all of it, in the logs of
//! every node that it touched. A hedge is leased under an id of its own, which its executor cannot know to be the same job: the
//! requester's line says `lease` beside the span's `id`, and so joins the two.

use std::collections::BTreeMap;

use chorus_core::{JobError, JobEvent, JobEventKind, hedge_id};
use chorus_protocol::job::JobKind;
use chorus_protocol::{JobId, TaskId};
use tracing::Span;

/// Jobs whose spans are held: more than a node may have under way.
const MAX_SPANS: usize = 4_096;

/// The spans of the jobs that this node asked for and that are under way.
#[derive(Default)]
pub(crate) struct JobSpans {
    open: BTreeMap<JobId, Span>,
}

impl JobSpans {
    /// Opens a job's span.
    pub(crate) fn submitted(&mut self, job: JobId, task: TaskId, kind: JobKind) {
        if self.open.len() < MAX_SPANS {
            let span = tracing::info_span!("job", id = %job, kind = ?kind, %task);
            span.in_scope(|| tracing::info!("submitted"));
            self.open.insert(job, span);
        }
    }

    /// Logs what happened to a job.
    pub(crate) fn on_event(&self, event: &JobEvent) {
        let Some(span) = self.open.get(&event.job) else { return };
        let _inside = span.enter();
        match &event.kind {
            JobEventKind::Announced { beacon, candidates } => tracing::debug!(%beacon, candidates, "announced"),
            JobEventKind::Bid { node, score, .. } => tracing::debug!(bidder = %node.fmt_short(), score, "bid"),
            JobEventKind::Elected { node, score, fence, bids, hedge } => {
                let lease = if *hedge { hedge_id(event.job) } else { event.job };
                tracing::info!(executor = %node.fmt_short(), %lease, fence, hedge, score, bids, "leased");
            }
            JobEventKind::Started { node } => tracing::debug!(executor = %node.fmt_short(), "started"),
            JobEventKind::Lost { node, reason } => tracing::warn!(executor = %node.fmt_short(), reason, "lost"),
            JobEventKind::Finished { node, tokens, elapsed } => {
                tracing::info!(executor = %node.fmt_short(), tokens, ?elapsed, "done");
            }
            JobEventKind::Progress { .. } => {}
        }
    }

    /// Closes a job's span.
    pub(crate) fn ended(&mut self, job: &JobId, error: Option<&JobError>) {
        let Some(span) = self.open.remove(job) else { return };
        span.in_scope(|| match error {
            None => {}
            Some(JobError::Cancelled) => tracing::info!("cancelled"),
            Some(error) => tracing::warn!(%error, "failed"),
        });
    }
}
