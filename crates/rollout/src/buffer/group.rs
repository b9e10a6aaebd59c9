//! One group: its task, and where each member stands.

use std::sync::Arc;

use chorus_machine::Time;
use chorus_protocol::rollout::Rollout;
use chorus_protocol::{NodeId, Text};

use super::FrameKey;

/// Samplers that a group remembers to have been given to.
const MAX_PAST: usize = 16;

/// Where a member stands.
#[derive(Clone, Debug)]
pub(super) enum Member {
    /// Nobody samples it.
    Idle,
    /// Somebody samples it.
    Out { to: NodeId, since: Time, deadline: Time, floor: u64 },
    /// It is here, and on disk once `durable`.
    Here { frame: FrameKey, rollout: Arc<Rollout>, oldest: u64, durable: bool },
}

/// A group that is open.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) environment: Text<96>,
    pub(super) seed: u64,
    pub(super) members: Vec<Member>,
    /// Who was asked for members, the latest last.
    pub(super) past: Vec<NodeId>,
    /// It was open before a restart, so whom it was given to is not known.
    pub(super) adopted: bool,
}

impl Group {
    pub(super) fn new((environment, seed): (Text<96>, u64), members: u16, adopted: bool) -> Self {
        Self { environment, seed, members: vec![Member::Idle; usize::from(members)], past: Vec::new(), adopted }
    }

    /// Returns whether every member is here for good.
    pub(super) fn is_ready(&self) -> bool {
        self.members.iter().all(|member| matches!(member, Member::Here { durable: true, .. }))
    }

    /// Returns the oldest step of weights in it, or that may come into it.
    pub(super) fn oldest(&self) -> Option<u64> {
        let steps = self.members.iter().filter_map(|member| match member {
            Member::Idle => None,
            Member::Out { floor, .. } => Some(*floor),
            Member::Here { oldest, .. } => Some(*oldest),
        });
        steps.min()
    }

    pub(super) fn was_given_to(&self, sampler: &NodeId) -> bool {
        self.adopted || self.past.contains(sampler)
    }

    pub(super) fn give_to(&mut self, sampler: NodeId) {
        self.past.retain(|past| *past != sampler);
        if self.past.len() >= MAX_PAST {
            self.past.remove(0);
        }
        self.past.push(sampler);
    }
}
