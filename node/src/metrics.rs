//! What is counted and measured, as Prometheus reads it.

use std::sync::Arc;

use chorus_api::metrics::{Counter, Desc, Gauge, Histogram, Registry, SECONDS};
use chorus_core::{NodeEvent, Status, TaskAnswer, TaskError};
use chorus_net::NetEvent;

static PEERS: Desc = Desc::new("chorus_peers", "Connected peers.");
static ENTRIES: Desc = Desc::new("chorus_ledger_entries", "Entries in the ledger's set.");
static LEDGER_BYTES: Desc = Desc::new("chorus_ledger_bytes", "Bytes of the ledger's entries, as encoded.");
static CAPABILITIES: Desc = Desc::new("chorus_ledger_capabilities", "Nodes that offer something.");
static POLICIES: Desc = Desc::new("chorus_ledger_policies", "Policies that their owners say they train.");
static ACCUSATIONS: Desc = Desc::new("chorus_ledger_accusations", "Accusations of misbehaviour in the ledger's set.");
static QUARANTINED: Desc = Desc::new("chorus_ledger_quarantined", "Authors convicted of equivocation.");
static RUNNING: Desc = Desc::new("chorus_executor_running", "Jobs that run here.");
static RESERVED: Desc = Desc::new("chorus_executor_reserved", "Slots that are kept for bids.");
static SLOTS: Desc = Desc::new("chorus_executor_slots", "Slots in all.");
static JOBS: Desc = Desc::new("chorus_jobs", "Jobs under way that this node asked for.");
static TASKS: Desc = Desc::new("chorus_tasks", "Tasks under way.");
static SENT: Desc = Desc::new("chorus_direct_sent_total", "Direct messages sent.");
static SENT_BYTES: Desc = Desc::new("chorus_direct_sent_bytes_total", "Bytes of direct messages sent.");
static RECEIVED: Desc = Desc::new("chorus_direct_received_total", "Direct messages received.");
static RECEIVED_BYTES: Desc = Desc::new("chorus_direct_received_bytes_total", "Bytes of direct messages received.");
static GOSSIP: Desc = Desc::new("chorus_gossip_received_total", "Gossiped frames received.");
static GOSSIP_BYTES: Desc = Desc::new("chorus_gossip_received_bytes_total", "Bytes of gossiped frames received.");
static SEND_FAILURES: Desc = Desc::new("chorus_send_failures_total", "Direct messages that were not acknowledged.");
static BANS: Desc = Desc::new("chorus_bans_total", "Peers banned.");
static PENALTIES: Desc = Desc::new("chorus_penalties_total", "Breaches of protocol by peers.");
static OVERLOADS: Desc = Desc::new("chorus_overloads_total", "Effects refused because a queue was full.");
static APPENDS_FAILED: Desc = Desc::new("chorus_appends_failed_total", "Own entries that did not reach the disk.");
static FINISHED: Desc = Desc::new("chorus_tasks_finished_total", "Tasks that ended with an answer.");
static FAILED: Desc = Desc::new("chorus_tasks_failed_total", "Tasks that ended without one.");
static TOKENS: Desc = Desc::new("chorus_completion_tokens_total", "Tokens written for this node's tasks.");
static TASK_SECONDS: Desc = Desc::new("chorus_task_seconds", "From question to answer.");

/// Counters are driven by what happens; gauges are set when somebody asks.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    gauges: [Arc<Gauge>; 12],
    sent: Arc<Counter>,
    sent_bytes: Arc<Counter>,
    received: Arc<Counter>,
    received_bytes: Arc<Counter>,
    gossip: Arc<Counter>,
    gossip_bytes: Arc<Counter>,
    send_failures: Arc<Counter>,
    bans: Arc<Counter>,
    penalties: Arc<Counter>,
    overloads: Arc<Counter>,
    appends_failed: Arc<Counter>,
    finished: Arc<Counter>,
    failed: Arc<Counter>,
    tokens: Arc<Counter>,
    task_seconds: Arc<Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::default();
        let counter = |desc| registry.counter(desc);
        let gauges = [
            &PEERS,
            &ENTRIES,
            &LEDGER_BYTES,
            &CAPABILITIES,
            &POLICIES,
            &ACCUSATIONS,
            &QUARANTINED,
            &RUNNING,
            &RESERVED,
            &SLOTS,
            &JOBS,
            &TASKS,
        ]
        .map(|desc| registry.gauge(desc));
        Self {
            gauges,
            sent: counter(&SENT),
            sent_bytes: counter(&SENT_BYTES),
            received: counter(&RECEIVED),
            received_bytes: counter(&RECEIVED_BYTES),
            gossip: counter(&GOSSIP),
            gossip_bytes: counter(&GOSSIP_BYTES),
            send_failures: counter(&SEND_FAILURES),
            bans: counter(&BANS),
            penalties: counter(&PENALTIES),
            overloads: counter(&OVERLOADS),
            appends_failed: counter(&APPENDS_FAILED),
            finished: counter(&FINISHED),
            failed: counter(&FAILED),
            tokens: counter(&TOKENS),
            task_seconds: registry.histogram(&TASK_SECONDS, SECONDS),
            registry,
        }
    }
}

impl Metrics {
    pub(crate) fn on_net(&self, event: &NetEvent) {
        match event {
            NetEvent::Message { bytes, .. } => {
                self.received.inc();
                self.received_bytes.add(bytes.len() as u64);
            }
            NetEvent::Gossip { bytes, .. } => {
                self.gossip.inc();
                self.gossip_bytes.add(bytes.len() as u64);
            }
            NetEvent::SendFailed { .. } => self.send_failures.inc(),
            NetEvent::Banned { .. } => self.bans.inc(),
            _ => {}
        }
    }

    pub(crate) fn on_event(&self, event: &NodeEvent) {
        if matches!(event, NodeEvent::AppendFailed { .. }) {
            self.appends_failed.inc();
        }
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.inc();
        self.sent_bytes.add(bytes as u64);
    }

    pub(crate) fn penalised(&self) {
        self.penalties.inc();
    }

    pub(crate) fn overloaded(&self) {
        self.overloads.inc();
    }

    pub(crate) fn task_done(&self, result: &Result<Box<TaskAnswer>, TaskError>) {
        match result {
            Ok(answer) => {
                self.finished.inc();
                self.tokens.add(answer.completion_tokens);
                self.task_seconds.observe_duration(answer.elapsed);
            }
            Err(_) => self.failed.inc(),
        }
    }

    /// Sets the gauges and writes everything.
    #[allow(clippy::cast_precision_loss, reason = "gauges are floats")]
    pub(crate) fn render(&self, status: &Status, peers: usize) -> String {
        let values = [
            peers,
            status.ledger.entries,
            status.ledger.bytes,
            status.ledger.capabilities,
            status.ledger.policies,
            status.ledger.accusations,
            status.ledger.quarantined,
            status.executor.running,
            status.executor.reserved,
            status.executor.slots,
            status.jobs.len(),
            status.tasks.len(),
        ];
        for (gauge, value) in self.gauges.iter().zip(values) {
            gauge.set(value as f64);
        }
        self.registry.render()
    }
}
