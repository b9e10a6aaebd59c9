//! A training room's figures, as Prometheus reads them. They are read off the status, so the two never disagree.

use std::sync::Arc;

use chorus_api::metrics::{Desc, Gauge, Registry, Series};
use serde_json::Value;

static STEP: Desc =
    Desc::new("chorus_training_step", "Updates of the policy; on a sampler, of the version that serves.");
static UTILISATION: Desc = Desc::new("chorus_trainer_utilisation", "Share of time in which the learner learns.");
static NEEDED: Desc = Desc::new("chorus_trainer_rollouts_needed", "Rollouts a second that keep the learner busy.");
static RATE: Desc = Desc::new("chorus_trainer_rollouts_rate", "Rollouts a second that the samplers deliver.");
static LAGS: Desc =
    Desc::new("chorus_trainer_used_rollouts", "Rollouts that were learned from, by how many updates they were behind.")
        .labels(&["lag"]);
static REFUSED: Desc =
    Desc::new("chorus_trainer_refused_rollouts", "Rollouts that do not count, by reason.").labels(&["reason"]);
static HELD: Desc = Desc::new("chorus_trainer_held_rollouts", "Rollouts that wait in the buffer.");
static TOKENS_RATE: Desc = Desc::new("chorus_trainer_tokens_rate", "Sampled tokens a second that arrive.");
static BYTES: Desc = Desc::new("chorus_trainer_bytes_per_token", "Bytes of signed frames for each sampled token.");
static SPREAD: Desc = Desc::new(
    "chorus_trainer_spread_seconds",
    "From a version's publication to a sampler that serves it, a moving mean.",
);
static REACH: Desc = Desc::new(
    "chorus_trainer_reach_seconds",
    "From a version's publication until no sampler serves an older one, a moving mean.",
);
static HIRED: Desc = Desc::new("chorus_trainer_hired_samplers", "Samplers that hold a lease.");
static PRICE: Desc = Desc::new("chorus_trainer_price_per_hour", "What the hired samplers ask for together.");
static REWARD: Desc = Desc::new("chorus_trainer_reward", "Mean reward of the last update's rollouts.");
static HELD_OUT: Desc =
    Desc::new("chorus_trainer_held_out_reward", "Mean reward over held-out tasks, when last measured.");
static CREDIT: Desc = Desc::new("chorus_sampler_credit", "Rollouts that this node may have begun since it said hello.");
static COUNTED: Desc = Desc::new("chorus_sampler_counted", "Rollouts of this node that count.");
static SPOOLED: Desc =
    Desc::new("chorus_sampler_spooled_bytes", "Bytes of rollouts that the trainer has not acknowledged.");
static CHUNKS: Desc = Desc::new("chorus_policy_chunks_sent", "Chunks of versions that were sent to others.");
static CONNECTED: Desc = Desc::new("chorus_bulk_sessions", "Nodes that are connected over the bulk plane.");

/// Where in a trainer's status each figure stands.
static TRAINER: [(&Desc, &str); 14] = [
    (&STEP, "/step"),
    (&UTILISATION, "/learner/utilisation"),
    (&NEEDED, "/capacity/needed_per_s"),
    (&RATE, "/capacity/delivered_per_s"),
    (&HELD, "/rollouts_held"),
    (&TOKENS_RATE, "/tokens_per_s"),
    (&BYTES, "/bytes_per_token"),
    (&SPREAD, "/capacity/spread_s"),
    (&REACH, "/reach_s"),
    (&HIRED, "/hiring/hired"),
    (&PRICE, "/hiring/price_per_hour"),
    (&REWARD, "/reward"),
    (&HELD_OUT, "/held_out"),
    (&CHUNKS, "/chunks_sent"),
];
/// And in a sampler's.
static SAMPLER: [(&Desc, &str); 5] = [
    (&STEP, "/serving/step"),
    (&CREDIT, "/credit_until"),
    (&COUNTED, "/counted"),
    (&SPOOLED, "/spooled_bytes"),
    (&CHUNKS, "/chunks_sent"),
];

/// See the module.
#[derive(Debug)]
pub(crate) struct TrainingMetrics {
    registry: Registry,
    gauges: Vec<(&'static str, Arc<Gauge>)>,
    lags: Arc<Series<Gauge>>,
    refused: Arc<Series<Gauge>>,
    connected: Arc<Gauge>,
}

impl TrainingMetrics {
    /// Makes the metrics of a room: those that its role has.
    pub(crate) fn new(status: &Value) -> Self {
        let registry = Registry::default();
        let places = if status["role"] == "trainer" { &TRAINER[..] } else { &SAMPLER[..] };
        let gauges = places.iter().map(|(desc, place)| (*place, registry.gauge(desc))).collect();
        let (lags, refused) = (registry.gauges(&LAGS), registry.gauges(&REFUSED));
        let connected = registry.gauge(&CONNECTED);
        Self { registry, gauges, lags, refused, connected }
    }

    /// Sets everything to what the status says, and writes it.
    #[allow(clippy::cast_precision_loss, reason = "gauges are floats")]
    pub(crate) fn render(&self, status: &Value) -> String {
        for (place, gauge) in &self.gauges {
            gauge.set(status.pointer(place).and_then(Value::as_f64).unwrap_or_default());
        }
        for (lag, many) in status["lags"].as_array().into_iter().flatten().enumerate() {
            if many.as_f64().is_some_and(|many| many > 0.0) {
                self.lags.with(&[&lag.to_string()]).set(many.as_f64().unwrap_or_default());
            }
        }
        for refused in status["refused"].as_array().into_iter().flatten() {
            let reason = refused["reason"].as_str().unwrap_or("unknown");
            self.refused.with(&[reason]).set(refused["rollouts"].as_f64().unwrap_or_default());
        }
        self.connected.set(status["connected"].as_array().map_or(0, Vec::len) as f64);
        self.registry.render()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_status_says_is_what_is_measured() {
        let status = json!({
            "role": "trainer", "step": 7, "learner": { "utilisation": 0.5 }, "lags": [3, 0, 2], "connected": [{}, {}],
            "refused": [{ "reason": "stale", "rollouts": 4 }], "reward": null,
        });
        let text = TrainingMetrics::new(&status).render(&status);
        for line in [
            "chorus_training_step 7",
            "chorus_trainer_utilisation 0.5",
            "chorus_trainer_used_rollouts{lag=\"2\"} 2",
            "chorus_trainer_refused_rollouts{reason=\"stale\"} 4",
            "chorus_bulk_sessions 2",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("chorus_sampler_credit") && !text.contains("lag=\"1\""), "{text}");
    }
}
