//! Members that wait to be begun, and with which weights they may be.

use chorus_machine::{Outbox, Time};
use chorus_protocol::Text;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{Assignment, Credit, GroupId, Refusal, Want};

use super::{MAX_WORK, Sampler, SamplerAwaits, SamplerEffect};

/// One member to sample.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) group: GroupId,
    pub(super) member: u16,
    environment: Text<96>,
    seed: u64,
    want: Want,
    pub(super) deadline: Time,
}

/// Whether weights serve a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Now,
    AfterRefresh,
    NeverMore,
}

impl Work {
    fn fit(&self, serving: Option<(Version, u64)>) -> Fit {
        match (self.want, serving) {
            (Want::AtLeast { step }, Some((_, have))) if have >= step => Fit::Now,
            (Want::Exactly { version, .. }, Some((have, _))) if have == version => Fit::Now,
            (Want::Exactly { step, .. }, Some((_, have))) if have > step => Fit::NeverMore,
            _ => Fit::AfterRefresh,
        }
    }

    pub(super) fn awaits(&self) -> SamplerAwaits {
        match self.want {
            Want::AtLeast { step } => SamplerAwaits::Version { step, exactly: None },
            Want::Exactly { version, step } => SamplerAwaits::Version { step, exactly: Some(version) },
        }
    }
}

impl Sampler {
    pub(super) fn assigned(
        &mut self,
        now: Time,
        credit: Credit,
        work: Vec<Assignment>,
        out: &mut Outbox<SamplerEffect>,
    ) {
        self.credit = Some(credit);
        // An update that changes no weight makes no new version: the one that serves stands for a later step from now on.
        if let Some((version, step)) = self.serving
            && version == credit.version
            && step < credit.step
        {
            self.serves(version, credit.step, out);
        }
        let mut refused = Vec::new();
        for item in work {
            let deadline = now + std::time::Duration::from_millis(u64::from(item.deadline_ms));
            for member in (0..item.members).map(|n| item.first.saturating_add(n)) {
                let known = self.running.contains_key(&(item.group, member))
                    || self.work.iter().any(|work| work.group == item.group && work.member == member);
                if known {
                    self.received += 1;
                } else if self.received >= credit.until || self.work.len() >= MAX_WORK {
                    refused.push((item.group, member));
                } else {
                    self.received += 1;
                    let (environment, seed, want) = (item.environment.clone(), item.seed, item.want);
                    self.work.push_back(Work { group: item.group, member, environment, seed, want, deadline });
                }
            }
        }
        self.give_up(refused, Refusal::Full, out);
    }

    /// Gives up what nobody waits for any more.
    pub(super) fn drop_late(&mut self, now: Time, out: &mut Outbox<SamplerEffect>) {
        let serving = self.serving;
        for (reason, bad) in [
            (
                Refusal::Deadline,
                (|work: &Work, now, _| work.deadline <= now) as fn(&Work, Time, Option<(Version, u64)>) -> bool,
            ),
            (Refusal::Stale, |work, _, serving| work.fit(serving) == Fit::NeverMore),
        ] {
            let gone = self.work.iter().filter(|work| bad(work, now, serving));
            let gone: Vec<_> = gone.map(|work| (work.group, work.member)).collect();
            if !gone.is_empty() {
                self.work.retain(|work| !bad(work, now, serving));
                self.give_up(gone, reason, out);
            }
        }
    }

    /// Begins what may be begun, in order; asks for the weights that the rest waits for.
    pub(super) fn begin(&mut self, out: &mut Outbox<SamplerEffect>) {
        let mut index = 0;
        while self.running.len() < usize::from(self.cfg.slots) && !self.is_full() && !self.spool.disk_failed() {
            let Some(work) = self.work.get(index) else { break };
            if work.fit(self.serving) == Fit::Now {
                let Some(work) = self.work.remove(index) else { break };
                let Some((version, _)) = self.serving else { break };
                out.push(SamplerEffect::Start {
                    group: work.group,
                    member: work.member,
                    environment: work.environment.clone(),
                    seed: work.seed,
                    version,
                });
                self.running.insert((work.group, work.member), work);
            } else {
                self.refresh_for(index, out);
                index += 1;
            }
        }
    }

    fn refresh_for(&mut self, index: usize, out: &mut Outbox<SamplerEffect>) {
        let (Some(work), Some(credit)) = (self.work.get(index), self.credit) else { return };
        let (version, step) = match work.want {
            Want::AtLeast { .. } => (credit.version, credit.step),
            Want::Exactly { version, step } => (version, step),
        };
        if self.refreshing != Some(version) && self.serving.map(|(version, _)| version) != Some(version) {
            self.refreshing = Some(version);
            out.push(SamplerEffect::Refresh { version, step });
        }
    }
}
