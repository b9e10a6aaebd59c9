//! `chorus status`, `chorus peers` and the ticket: what a running node says of itself.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{block_on, trainer};
use crate::client::ApiClient;
use crate::config::Config;
use crate::error::CommandError;
use crate::process;

#[derive(Debug, clap::Args)]
pub(crate) struct PeersArgs {
    /// Print JSON for a program instead of a table for a person
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<PeersCommand>,
}

#[derive(Debug, Subcommand)]
enum PeersCommand {
    /// Refuse a node until it is unblocked or this node restarts
    Block {
        /// The node's id (did:key:…)
        node: String,
    },
    /// Let a blocked node in again
    Unblock {
        /// The node's id (did:key:…)
        node: String,
    },
}

/// Prints what the node is doing, and what it waits for.
pub(crate) fn status(config: &Config, json: bool) -> Result<(), CommandError> {
    let status = block_on(async { ApiClient::new(config)?.get("/v1/status").await })?;
    if json {
        println!("{status:#}");
    } else {
        print!("{}", status_text(&status));
    }
    Ok(())
}

fn status_text(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let ledger = &status["ledger"];
    let mut lines = vec![
        format!("node      {}", text(&status["node"])),
        format!(
            "name      {}  (network {}, {})",
            text(&status["name"]),
            text(&status["network"]),
            text(&status["software"])
        ),
        format!("up        {} s", status["uptime_s"]),
        format!("peers     {}", status["peers"]),
        format!(
            "ledger    {} entries, {} capabilities, {} quarantined, digest {}",
            ledger["entries"],
            ledger["capabilities"],
            ledger["quarantined"],
            text(&ledger["digest"]).get(..12).unwrap_or("-")
        ),
        format!("engine    {}", text(&status["engine"]["state"])),
        format!("working   {} of {} slots", status["executor"]["running"], status["executor"]["slots"]),
    ];
    for job in status["jobs"].as_array().into_iter().flatten() {
        lines.push(format!("job       {} waits for {}", text(&job["job"]), text(&job["waiting_for"])));
    }
    for task in status["tasks"].as_array().into_iter().flatten() {
        lines.push(format!("task      {} waits for {}", text(&task["task"]), text(&task["waiting_for"])));
    }
    lines.push(format!("idle      {}", text(&status["idle_because"])));
    let mut out = lines.join("\n") + "\n";
    if status["training"].is_object() {
        out.push_str(&trainer::status_text(&status["training"]));
    }
    out
}

/// Prints who is connected, or changes who may be.
pub(crate) fn peers(config: &Config, args: PeersArgs) -> Result<(), CommandError> {
    let api = ApiClient::new(config)?;
    match args.command {
        Some(PeersCommand::Block { node }) => set_blocked(&api, &node, true),
        Some(PeersCommand::Unblock { node }) => set_blocked(&api, &node, false),
        None => list(&api, args.json),
    }
}

fn set_blocked(api: &ApiClient, node: &str, blocked: bool) -> Result<(), CommandError> {
    block_on(api.post(&format!("/v1/peers/{node}"), &json!({ "blocked": blocked })))?;
    println!("{node} is {}", if blocked { "blocked" } else { "let in" });
    Ok(())
}

fn list(api: &ApiClient, json: bool) -> Result<(), CommandError> {
    let peers = block_on(api.get("/v1/peers"))?;
    if json {
        println!("{peers:#}");
        return Ok(());
    }
    let peers = peers["peers"].as_array().cloned().unwrap_or_default();
    if peers.is_empty() {
        println!("no peers; `chorus doctor` says why");
    }
    for peer in peers {
        let text = |key: &str| peer[key].as_str().unwrap_or("-").to_owned();
        let rtt = peer["rtt_ms"].as_f64().map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2} ms"));
        println!("{}  {:<16} {:>10}  {}  {}", text("node"), text("name"), rtt, text("address"), text("agent"));
    }
    Ok(())
}

/// Prints the ticket by which others join: from the running node, or from the configuration alone.
pub(crate) fn ticket(config: &Config, offline: bool) -> Result<(), CommandError> {
    if offline {
        println!("{}", process::offline_ticket(config)?);
        return Ok(());
    }
    let status = block_on(async { ApiClient::new(config)?.get("/v1/status").await })?;
    match status["ticket"].as_str() {
        Some(ticket) => println!("{ticket}"),
        None => return Err(CommandError::failed("the node listens nowhere yet")),
    }
    Ok(())
}
