//! The node without its body: owns the protocol machines and routes between them.
//!
//! [`Node`] is itself a machine. The process in `node/` drives it with sockets, a disk and an engine; the simulator in
//! `crates/sim` drives the same value with models of them. What it decides, it decides here.
//!
//! ```text
//!                 ┌────────────────────────── Node ──────────────────────────┐
//!  Command ──────▶│ scheduler ──JobSpec──▶ requester ──┐                     │
//!                 │     ▲  ◀──JobDone────      ▲       ├── Direct, Beacon ──▶│──▶ Publish, Send
//!  Network ──────▶│     │              capability│     │                     │
//!   frames        │  Embedded         receipts   │   executor ──────────────▶│──▶ Run, Stop, Embed
//!  Engine  ──────▶│                        ledger ◀──Append── requester      │
//!  Store   ──────▶│                          └───────────────────────────────│──▶ Persist
//!                 └──────────────────────────────────────────────────────────┘
//! ```
//!
//! The machines never call each other: an effect of one becomes an input of another here, in order, until nothing is left to
//! route. What a node sends to itself (its own beacon, its own bid) takes the same way without touching the network, so a
//! network of one works like any other.
//!
//! Order of durability: the ledger publishes an entry of its own only on [`StoreInput::Persisted`]; nothing is acknowledged
//! before it is on disk.

mod config;
mod frames;
mod io;
mod node;
mod status;

pub use config::NodeConfig;
pub use io::{Acceptance, Command, Effect, EngineInput, Input, NetInput, NodeEvent, Restored, StoreInput, Topic};
pub use node::Node;
pub use status::{ExecutorStatus, JobStatus, LedgerStatus, Status};

pub use chorus_beacon::{
    BeaconConfig, JobDone, JobError, JobEvent, JobEventKind, JobSpec, RunId, SelectionRule, hedge_id,
};
pub use chorus_ledger::{Ledger, LedgerConfig, LedgerEvent, PersistBatch};
pub use chorus_machine::Time;
pub use chorus_scheduler::spec::EVENTS_A_RUN;
pub use chorus_scheduler::{
    AnswerFormat, SchedulerConfig, Strategy, TaskAnswer, TaskError, TaskEvent, TaskEventKind, TaskSpec, Weighting,
};
