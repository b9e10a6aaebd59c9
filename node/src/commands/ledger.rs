//! `chorus ledger`: the replicated set of entries, of a running node or of a stopped one's disk.

use std::path::PathBuf;

use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::{Hash, Verified};
use clap::Subcommand;
use serde_json::{Value, json};

use super::block_on;
use crate::client::ApiClient;
use crate::config::Config;
use crate::error::{CommandError, Kind};
use crate::storage;

/// Entries that are asked for at a time.
const PAGE: usize = 10_000;

#[derive(Debug, Subcommand)]
pub(crate) enum LedgerCommand {
    /// List entries, newest last
    Ls {
        /// Only this kind
        #[arg(long, value_parser = Body::KINDS)]
        kind: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print one entry
    Show {
        /// The entry's hash
        hash: String,
    },
    /// Check every signature and every chain on a stopped node's disk
    Verify,
    /// Write all entries as JSON lines
    Export {
        /// Where to; standard output if left out
        file: Option<PathBuf>,
    },
}

pub(crate) fn ledger(config: &Config, command: LedgerCommand) -> Result<(), CommandError> {
    match command {
        LedgerCommand::Ls { kind, json } => {
            for row in rows(config, kind.as_deref())? {
                print_row(&row, json);
            }
            Ok(())
        }
        LedgerCommand::Show { hash } => show(config, &hash),
        LedgerCommand::Verify => verify(config),
        LedgerCommand::Export { file } => export(config, file),
    }
}

/// All entries, or those of a kind: from the running node, or else from the disk.
fn rows(config: &Config, kind: Option<&str>) -> Result<Vec<Value>, CommandError> {
    match block_on(online_rows(config, kind)) {
        Err(error) if error.kind() == Kind::NotRunning => {
            let entries = storage::read_stopped(config)?;
            let wanted = |entry: &&Verified<Entry>| kind.is_none_or(|kind| entry.body.kind() == kind);
            Ok(entries.iter().filter(wanted).map(row).collect())
        }
        rows => rows,
    }
}

/// Entries that the running node holds.
pub(super) async fn online_rows(config: &Config, kind: Option<&str>) -> Result<Vec<Value>, CommandError> {
    let api = ApiClient::new(config)?;
    let first = kind.map_or_else(String::new, |kind| format!("&kind={kind}"));
    let (mut rows, mut path) = (Vec::new(), format!("/v1/ledger?limit={PAGE}{first}"));
    loop {
        let page = api.get(&path).await?;
        rows.extend(page["entries"].as_array().cloned().unwrap_or_default());
        match page["next"].as_str() {
            Some(next) => path = format!("/v1/ledger?limit={PAGE}{first}&after={next}"),
            None => return Ok(rows),
        }
    }
}

/// One entry as JSON, the same online and offline.
pub(crate) fn row(entry: &Verified<Entry>) -> Value {
    json!({
        "hash": entry.hash(),
        "author": entry.author(),
        "seq": entry.seq,
        "prev": entry.prev,
        "wall_time": entry.wall_time,
        "expires": entry.expires,
        "kind": entry.body.kind(),
        "bytes": entry.encoded_len(),
        "body": entry.body,
    })
}

fn print_row(row: &Value, json: bool) {
    if json {
        println!("{row}");
        return;
    }
    let text = |key: &str| row[key].as_str().unwrap_or("-");
    println!(
        "{}  {:<12} {:>5}  {}  {}",
        text("hash").get(..12).unwrap_or("-"),
        text("kind"),
        row["seq"],
        text("author"),
        summary(row)
    );
}

fn summary(row: &Value) -> String {
    let body = &row["body"];
    match row["kind"].as_str() {
        Some("capability") => {
            let models: Vec<&str> = body["capability"]["models"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|m| m["name"].as_str())
                .collect();
            format!("{} offers {}", body["capability"]["name"].as_str().unwrap_or("-"), models.join(", "))
        }
        Some("receipt") => format!(
            "{} by {} in {} ms",
            body["receipt"]["verdict"].as_str().unwrap_or("-"),
            body["receipt"]["executor"].as_str().unwrap_or("-"),
            body["receipt"]["observed_ms"]
        ),
        Some("policy") => {
            let policy = &body["policy"];
            let state = if policy["running"] == true { "training" } else { "ended" };
            format!("{} at step {}, {state}", policy["name"].as_str().unwrap_or("-"), policy["step"])
        }
        Some("misbehaviour") => {
            let accusation = &body["misbehaviour"];
            let text = |key: &str| accusation[key].as_str().unwrap_or("-");
            format!("accuses {} of {}, evidence {}", text("accused"), text("charge"), text("evidence"))
        }
        _ => String::new(),
    }
}

fn show(config: &Config, hash: &str) -> Result<(), CommandError> {
    let found =
        rows(config, None)?.into_iter().find(|row| row["hash"].as_str().is_some_and(|full| full.starts_with(hash)));
    match found {
        Some(row) => {
            println!("{row:#}");
            Ok(())
        }
        None => {
            Err(CommandError::failed(format!("the ledger holds no entry {hash}")).hint("`chorus ledger ls` lists them"))
        }
    }
}

/// Checks what is on disk from nothing but the bytes: signatures, and the links between an author's neighbouring entries.
fn verify(config: &Config) -> Result<(), CommandError> {
    let network = config.network_id()?;
    let entries = storage::read_stopped(config)?;
    let mut checked = Vec::with_capacity(entries.len());
    for entry in &entries {
        let entry = entry.to_wire().verify(&network).map_err(|error| {
            CommandError::failed(format!("entry {}: {error}", entry.hash()))
                .hint("move the data directory's ledger away; the swarm brings it back")
        })?;
        checked.push(entry);
    }
    let links = check_links(&checked)?;
    let of_kind = |kind: &str| checked.iter().filter(|entry| entry.body.kind() == kind).count();
    println!(
        "{} entries hold: {} capabilities, {} receipts, {} retirements, {} policies, {} accusations; {links} links checked",
        checked.len(),
        of_kind("capability"),
        of_kind("receipt"),
        of_kind("retire"),
        of_kind("policy"),
        of_kind("misbehaviour")
    );
    Ok(())
}

/// Follows `prev` wherever both ends are there; compaction leaves gaps, which prove nothing.
fn check_links(entries: &[Verified<Entry>]) -> Result<usize, CommandError> {
    let mut by_place = std::collections::BTreeMap::new();
    for entry in entries {
        if let Some(other) = by_place.insert((entry.author(), entry.seq), entry) {
            return Err(CommandError::failed(format!(
                "{} wrote two entries numbered {}: {} and {}",
                entry.author(),
                entry.seq,
                other.hash(),
                entry.hash()
            )));
        }
    }
    let mut links = 0;
    for entry in entries {
        let before = entry.seq.checked_sub(1).and_then(|seq| by_place.get(&(entry.author(), seq)));
        let expected = if entry.seq == 1 { Some(Hash::ZERO) } else { before.map(|before| before.hash()) };
        if let Some(expected) = expected {
            if entry.prev != expected {
                return Err(CommandError::failed(format!("entry {} does not link to the one before it", entry.hash())));
            }
            links += 1;
        }
    }
    Ok(links)
}

fn export(config: &Config, file: Option<PathBuf>) -> Result<(), CommandError> {
    use std::io::Write;
    let rows = rows(config, None)?;
    let mut out: Box<dyn Write> = match &file {
        Some(path) => Box::new(std::io::BufWriter::new(
            std::fs::File::create(path)
                .map_err(|error| CommandError::machine(format!("cannot write {}: {error}", path.display())))?,
        )),
        None => Box::new(std::io::stdout().lock()),
    };
    for row in &rows {
        writeln!(out, "{row}").map_err(CommandError::machine)?;
    }
    out.flush().map_err(CommandError::machine)?;
    if let Some(path) = file {
        println!("{} entries in {}", rows.len(), path.display());
    }
    Ok(())
}
