//! How many samplers a learner needs, and which ones are worth their price.
//!
//! With `R` rollouts in an update, `T` seconds for an update, `T_b` until a version has reached the last sampler that is needed, `T_g`
//! to sample a rollout, `S` the bound on staleness, `k` updates between publications, `Q` rollouts that wait, and samplers that deliver
//! `μᵢ` rollouts a second and lose `t_swap` seconds at each swap, the learner stays busy and nothing grows too old if
//!
//! * **throughput**: `Σ μᵢ · (1 − t_swap / (k·T)) ≥ R / T`;
//! * **freshness**: `(k − 1) + ⌈(T_b + T_g) / T⌉ + ⌈Q / R⌉ ≤ S`;
//! * **overlap**, where samplers stand still while a version arrives: `Σ μᵢ ≥ S·R / (S·T − T_b)`, which needs `S·T > T_b`.
//!
//! With `S = 0` nothing overlaps and an update takes `T + T_b + T_g` and the time to sample `R`. The publications on ECHO-2 name such a
//! rule without its formulas; these are derived from the same quantities.

use std::time::Duration;

use chorus_protocol::NodeId;

/// Rates are compared with this much tolerance, so that rounding does not wake a sampler.
const CLOSE: f64 = 1e-9;

/// What was measured of a run, or is planned. Times in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Rollouts in an update.
    pub rollouts: f64,
    /// One update.
    pub step: f64,
    /// From publication to the last sampler that is needed.
    pub spread: f64,
    /// One rollout, from assignment to arrival.
    pub sample: f64,
    /// What a sampler loses at each swap.
    pub swap: f64,
    /// Updates between two publications.
    pub period: f64,
    /// The bound on staleness.
    pub staleness: u32,
    /// Rollouts that wait in the buffer.
    pub queued: f64,
}

/// What the rule says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Rollouts a second that all samplers together must deliver to keep the learner busy; infinite when no number of them can.
    pub needed: f64,
    /// Steps by which rollouts will be behind when they are used.
    pub lag: f64,
    /// Whether that is within the bound.
    pub fresh: bool,
}

impl Load {
    /// Applies the rule. `pauses` says whether samplers stand still while a version arrives.
    #[must_use]
    pub fn verdict(&self, pauses: bool) -> Verdict {
        let staleness = f64::from(self.staleness);
        let period = self.period.max(1.0);
        let share = 1.0 - self.swap / (period * self.step);
        let throughput = if share > 0.0 { self.rollouts / self.step / share } else { f64::INFINITY };
        let window = staleness * self.step - self.spread;
        let overlap = if window > 0.0 { staleness * self.rollouts / window } else { f64::INFINITY };
        let needed = match (self.staleness, pauses) {
            // Nothing overlaps: no number of samplers keeps the learner busy all the time.
            (0, _) => f64::INFINITY,
            (_, true) => throughput.max(overlap),
            (_, false) => throughput,
        };
        let lag = (period - 1.0)
            + ((self.spread + self.sample) / self.step).ceil()
            + (self.queued / self.rollouts.max(1.0)).ceil();
        Verdict { needed, lag, fresh: lag <= staleness }
    }

    /// Returns the share of time in which the learner learns, when all samplers together deliver `rate` rollouts a second.
    #[must_use]
    pub fn utilisation(&self, rate: f64) -> f64 {
        let collect = if rate > 0.0 { self.rollouts / rate } else { f64::INFINITY };
        if self.staleness == 0 {
            return self.step / (self.step + self.spread + self.sample + collect);
        }
        (self.step / collect).min(1.0)
    }

    /// Returns how many samplers of `rate` rollouts a second each are needed; none when no number of them is enough.
    #[must_use]
    pub fn samplers_needed(&self, rate: f64, pauses: bool) -> Option<u32> {
        let many = (self.verdict(pauses).needed / rate - CLOSE).ceil();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and u32::MAX")]
        let many = many.is_finite().then_some(many.clamp(0.0, f64::from(u32::MAX)) as u32);
        many
    }
}

/// A sampler that can be hired.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    /// Who.
    pub node: NodeId,
    /// What an hour costs, in any unit that all offers share.
    pub price: f64,
    /// Rollouts a second, as measured, or as it says.
    pub rate: f64,
    /// The share of its rollouts that arrive and count, 0 to 1.
    pub reliability: f64,
}

impl Offer {
    /// Rollouts a second that count.
    fn worth(&self) -> f64 {
        (self.rate * self.reliability.clamp(0.0, 1.0)).max(0.0)
    }
}

/// Which samplers to use, changed only when it matters.
#[derive(Clone, Debug, PartialEq)]
pub struct Activation {
    /// How much more than needed is hired, in percent. Default 20.
    pub margin_percent: u32,
    /// How much more than hired may be active before somebody is let go, in percent of what is needed. Default 30.
    pub slack_percent: u32,
    /// How long a choice stands at least, unless there are too few. Default 30 s.
    pub rest: Duration,
    active: Vec<NodeId>,
    chosen_at: Option<Duration>,
}

impl Default for Activation {
    fn default() -> Self {
        Self {
            margin_percent: 20,
            slack_percent: 30,
            rest: Duration::from_secs(30),
            active: Vec::new(),
            chosen_at: None,
        }
    }
}

/// What an [`Activation`] decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Who is active, by node.
    pub active: Vec<NodeId>,
    /// Rollouts a second that they deliver and that count.
    pub rate: f64,
    /// What an hour of all of them costs.
    pub price: f64,
    /// Whether that is as much as is needed.
    pub enough: bool,
}

impl Activation {
    /// Decides who is active. `needed` is [`Verdict::needed`]; `now` is any clock that does not go back.
    ///
    /// Who is active stays while there are enough and not far too many. Otherwise the cheapest set is chosen: by price for each
    /// rollout that counts, until the need and its margin are met; then whoever is not needed any more is left out, the dearest
    /// first. For rates that are small beside the need this is the best set; else it costs at most one sampler more.
    pub fn choose(&mut self, now: Duration, needed: f64, offers: &[Offer]) -> Choice {
        let able = |offer: &&Offer| offer.worth() > 0.0 && offer.price.is_finite() && offer.price >= 0.0;
        let mut offers: Vec<&Offer> = offers.iter().filter(able).collect();
        let target = needed * (1.0 + f64::from(self.margin_percent) / 100.0);
        let have: f64 =
            offers.iter().filter(|offer| self.active.contains(&offer.node)).map(|offer| offer.worth()).sum();
        let most = target + needed * f64::from(self.slack_percent) / 100.0;
        let rested = self.chosen_at.is_none_or(|at| now.saturating_sub(at) >= self.rest);
        let stands = have + CLOSE >= needed && (have <= most || !rested);
        if !stands {
            offers.sort_by(|a, b| {
                let by_cost = (a.price / a.worth()).total_cmp(&(b.price / b.worth()));
                by_cost.then(b.worth().total_cmp(&a.worth())).then(a.node.cmp(&b.node))
            });
            let (mut rate, mut chosen) = (0.0, Vec::new());
            for offer in &offers {
                if rate + CLOSE >= target {
                    break;
                }
                rate += offer.worth();
                chosen.push(*offer);
            }
            chosen.sort_by(|a, b| b.price.total_cmp(&a.price).then(a.node.cmp(&b.node)));
            chosen.retain(|offer| {
                let spare = rate - offer.worth() + CLOSE >= target;
                if spare {
                    rate -= offer.worth();
                }
                !spare
            });
            self.active = chosen.into_iter().map(|offer| offer.node).collect();
            self.active.sort_unstable();
            self.chosen_at = Some(now);
        }
        let active: Vec<&Offer> = offers.into_iter().filter(|offer| self.active.contains(&offer.node)).collect();
        let rate = active.iter().map(|offer| offer.worth()).sum::<f64>();
        let mut nodes: Vec<NodeId> = active.iter().map(|offer| offer.node).collect();
        nodes.sort_unstable();
        let price = active.iter().map(|offer| offer.price).sum();
        Choice { active: nodes, rate, price, enough: rate + CLOSE >= needed }
    }
}

#[cfg(test)]
mod tests {
    use chorus_protocol::SecretKey;

    use super::*;

    const LOAD: Load =
        Load { rollouts: 64.0, step: 4.0, spread: 3.0, sample: 2.0, swap: 0.5, period: 1.0, staleness: 2, queued: 0.0 };

    fn offer(n: u8, price: f64, rate: f64, reliability: f64) -> Offer {
        Offer { node: SecretKey::from_bytes(&[n; 32]).node_id(), price, rate, reliability }
    }

    #[test]
    fn the_rule_is_what_the_formulas_say() {
        let verdict = LOAD.verdict(false);
        assert!((verdict.needed - 16.0 / 0.875).abs() < 1e-9);
        assert_eq!((verdict.lag, verdict.fresh), (2.0, true));
        // S·R / (S·T − T_b) = 128 / 5.
        assert!((LOAD.verdict(true).needed - 25.6).abs() < 1e-9);
        assert_eq!(LOAD.samplers_needed(4.0, true), Some(7));
        assert!(!Load { staleness: 1, ..LOAD }.verdict(false).fresh);
        // With a large bound the pause does not matter: R / T.
        let patient = Load { staleness: 10_000, swap: 0.0, ..LOAD };
        assert!((patient.verdict(true).needed - 16.0).abs() < 0.01);
        // The version takes longer than the bound lasts: nobody can.
        assert_eq!(Load { spread: 9.0, ..LOAD }.samplers_needed(4.0, true), None);
    }

    #[test]
    fn without_staleness_everything_takes_its_turn() {
        let sequential = Load { staleness: 0, ..LOAD };
        assert_eq!(sequential.samplers_needed(1000.0, false), None);
        assert!((sequential.utilisation(64.0) - 4.0 / 10.0).abs() < 1e-9);
        assert_eq!(LOAD.utilisation(8.0), 0.5);
        assert_eq!(LOAD.utilisation(100.0), 1.0);
        assert_eq!(LOAD.utilisation(0.0), 0.0);
    }

    #[test]
    fn the_cheapest_rollouts_are_hired_first_and_unreliable_ones_cost_more() {
        let offers =
            [offer(1, 1.0, 10.0, 1.0), offer(2, 1.0, 10.0, 0.5), offer(3, 3.0, 20.0, 1.0), offer(4, 0.1, 0.0, 1.0)];
        let choice = Activation::default().choose(Duration::ZERO, 20.0, &offers);
        // 24 with its margin: 1 (0.1 each), 3 (0.15 each); 2 costs 0.2 each and is not needed.
        assert_eq!(choice.active.len(), 2);
        assert!(!choice.active.contains(&offers[1].node) && choice.enough);
        assert!((choice.price - 4.0).abs() < 1e-9);
        let all = Activation::default().choose(Duration::ZERO, 1000.0, &offers);
        assert_eq!((all.active.len(), all.enough), (3, false));
    }

    #[test]
    fn what_a_later_offer_made_needless_is_let_go() {
        // The small one is cheapest for each rollout, but the large one alone is enough.
        let offers = [offer(1, 0.9, 10.0, 1.0), offer(2, 10.0, 100.0, 1.0)];
        let choice = Activation { margin_percent: 0, ..Activation::default() }.choose(Duration::ZERO, 95.0, &offers);
        assert_eq!(choice.active, [offers[1].node]);
    }

    #[test]
    fn a_choice_stands_until_it_matters() {
        let mut activation = Activation::default();
        let mut offers: Vec<Offer> = (1..=8).map(|n| offer(n, 1.0, 5.0, 1.0)).collect();
        let at = Duration::from_secs;
        let first = activation.choose(at(0), 20.0, &offers);
        assert_eq!(first.active.len(), 5);
        // A better price alone moves nobody, nor does a need that is a little smaller.
        offers[7].price = 0.5;
        assert_eq!(activation.choose(at(100), 17.0, &offers).active, first.active);
        // A need that is far smaller does, but not at once after a choice.
        assert_eq!(activation.choose(at(100), 5.0, &offers).active.len(), 2);
        assert_eq!(activation.choose(at(101), 5.0, &offers[1..]).active.len(), 2);
        // Too few do at once.
        assert!(activation.choose(at(102), 30.0, &offers).enough);
    }
}
