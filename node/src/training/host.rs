//! Rooms of a node that samples for anybody: one at a time, for the policy of the lease that it holds.
//!
//! ```text
//!             Granted(policy)                 nobody hires it again, all is delivered
//!   idle ────────────────────────▶ Room ──────────────────────────────────────────────▶ idle
//!     ▲ every session is refused                a lease for another policy ──▶ its Room
//! ```
//!
//! The policy's weights are fetched when it is hired, and deleted when its room closes: nobody fills this node's disk by hiring it.

use std::time::Duration;

use chorus_net::{BulkEvent, BulkHandle};
use chorus_protocol::policy::PolicyId;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::lease::{self, Grant};
use super::library::Library;
use super::room::{Ask, News, Room, Sources};
use super::{Means, Serving, open};

/// How long a room stays open for the next lease.
const LINGER: Duration = Duration::from_secs(20);

/// See the module.
pub(super) struct Host {
    means: Means,
    bulk: BulkHandle,
    serving: Serving,
    sources: Sources,
}

impl Host {
    pub(super) fn new(means: Means, bulk: BulkHandle, serving: Serving, sources: Sources) -> Self {
        Self { means, bulk, serving, sources }
    }

    /// Runs until the shutdown token fires.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let mut next = None;
        while !shutdown.is_cancelled() {
            let grant = match next.take() {
                Some(grant) => grant,
                None => match self.idle(&shutdown).await {
                    Some(grant) => grant,
                    None => return,
                },
            };
            let Some(policy) = self.admit(&grant) else { continue };
            let directory = Library::root(&self.means.config.data_dir.join("training"), &policy);
            match open(&mut self.means, &self.bulk, &policy, &directory, &self.serving) {
                Ok(opened) => {
                    tracing::info!(%policy, "sampling for a policy that this node had no part in");
                    let (net, node) = (self.means.net.clone(), self.means.node.clone());
                    let mut room = Room::new(opened, net, node, self.sources, Some(LINGER));
                    room.grant(grant);
                    (self.sources, next) = room.run(shutdown.clone()).await;
                    self.serving.set(None);
                    Library::delete(&self.means.config.data_dir, &policy);
                }
                Err(error) => {
                    tracing::error!(%error, %policy, "its room does not open");
                    lease::refuse(&self.means.inputs, grant.run, "this node cannot open a room for it now");
                }
            }
        }
    }

    /// Waits to be hired. Nothing when the process ends.
    async fn idle(&mut self, shutdown: &CancellationToken) -> Option<Grant> {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return None,
                Some(ask) = self.sources.asks.recv() => answer(ask),
                Some(news) = self.sources.news.recv() => if let News::Granted(grant) = news { return Some(grant) },
                Some(event) = self.sources.events.recv() => if let BulkEvent::Opened { session, .. } = event {
                    self.bulk.close(session);
                },
                else => return None,
            }
        }
    }

    /// Returns the policy to sample for, or ends the run: only a policy's trainer hires for it, and not itself.
    fn admit(&self, grant: &Grant) -> Option<PolicyId> {
        let policy = grant.policy.clone().filter(|policy| policy.owner == grant.run.requester);
        let policy = policy.filter(|policy| policy.owner != self.means.key.node_id());
        if policy.is_none() {
            lease::refuse(&self.means.inputs, grant.run, "only a policy's trainer hires samplers for it");
        }
        policy
    }
}

fn answer(ask: Ask) {
    // Whoever asked may have gone meanwhile.
    match ask {
        Ask::Status(reply) => {
            let status = json!({
                "role": "sampler",
                "name": super::ANYBODY,
                "owner": "nobody yet",
                "waits_for": "a trainer to hire this node: chorus ledger ls shows what it offers",
                "connected": [],
                "counted": 0,
                "refused": 0,
                "lost": 0,
                "spooled_frames": 0,
            });
            let _ = reply.send(status);
        }
        Ask::Curve(reply) => {
            let _ = reply.send(None);
        }
        Ask::Evidence(_, reply) => {
            let _ = reply.send(Err("this node is between two leases; ask one that trains or samples".to_owned()));
        }
    }
}
