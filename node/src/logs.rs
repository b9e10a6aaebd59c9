//! Logs: lines for people on a terminal, JSON for machines by flag.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// One readable line an event.
    #[default]
    Text,
    /// One JSON object an event, with its spans.
    Json,
}

/// What is worth a line when `RUST_LOG` does not say otherwise. Libraries speak up only when something is wrong.
const DEFAULT_FILTER: &str = "warn,chorus=info,chorus_node=info,chorus_net=info,chorus_engine=info,chorus_api=info,chorus_store=info,libp2p_mdns=error,libp2p_kad=error";

/// Installs the subscriber. Logs go to standard error, so that answers on standard output stay clean.
pub(crate) fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    // A log that cannot be written (a full disk) is no reason to fail; reporting that on the same standard error would be one.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).log_internal_errors(false);
    match format {
        LogFormat::Text => builder.with_ansi(stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(true).init(),
    }
}
