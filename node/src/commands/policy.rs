//! `chorus policy`: the versions of policies that lie on this node's disk, and what the ledger says of others.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chorus_protocol::policy::{Manifest, Version};
use chorus_protocol::{Verified, WallTime};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::block_on;
use super::ledger::online_rows;
use crate::client::ApiClient;
use crate::config::{Config, EngineKind, SamplerSection};
use crate::driver::wall;
use crate::error::{CommandError, Kind};
use crate::process;
use crate::training::library::Library;
use crate::training::parse_policy;

/// Where a node listens that only pulls.
const ANY_PORT: [&str; 2] = ["/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/tcp/0"];
/// How often the node that pulls is asked how far it is.
const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// List the versions on this node's disk, the oldest step first, and the policies that the running node's ledger knows
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a version's manifest
    Show {
        /// The version, or the beginning of its name
        version: String,
    },
    /// Fetch a policy's newest version from whoever has it, and check it
    Pull {
        /// The policy
        #[arg(value_name = "NAME@ID")]
        policy: String,
        /// Directory for its files, which must not exist yet
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Give up after so many seconds without a new chunk
        #[arg(long, default_value_t = 60)]
        patience: u64,
    },
    /// Hash every chunk again and say which are missing or damaged
    Verify {
        /// The version, or the beginning of its name; all if left out
        version: Option<String>,
    },
}

pub(crate) fn policy(config: &Config, command: &PolicyCommand) -> Result<(), CommandError> {
    match command {
        PolicyCommand::Ls { json } => list(config, *json),
        PolicyCommand::Show { version } => show(config, version),
        PolicyCommand::Pull { policy, to, patience } => pull(config, policy, to, Duration::from_secs(*patience)),
        PolicyCommand::Verify { version } => verify(config, version.as_deref()),
    }
}

/// Runs a node that keeps the policy's versions and does nothing else, until it has the newest one whole.
fn pull(config: &Config, policy: &str, to: &Path, patience: Duration) -> Result<(), CommandError> {
    if to.exists() {
        return Err(
            CommandError::usage(format!("{} exists already", to.display())).hint("name a new directory with --to")
        );
    }
    let id = parse_policy(policy)?;
    let mut config = config.clone();
    // A node of its own, with a key of its own: another one may run in this data directory.
    config.data_dir = config.data_dir.join("pull");
    config.sampler = SamplerSection { policy: policy.to_owned(), slots: 0, ..SamplerSection::default() };
    config.trainer.policy.clear();
    config.engine.kind = EngineKind::None;
    config.net.listen = ANY_PORT.map(str::to_owned).to_vec();
    config.net.bulk = vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)];
    config.api.listen = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    config.api.token.clear();
    let runtime = tokio::runtime::Runtime::new().map_err(CommandError::machine)?;
    let version = runtime.block_on(async {
        tokio::select! {
            ended = process::run(config.clone()) => {
                ended.and(Err(CommandError::failed("interrupted; what came so far is kept, and the next pull goes on from there")))
            }
            whole = wait_whole(&config, patience) => whole,
        }
    });
    runtime.shutdown_background();
    let version = version?;
    let library = Library::open(&config.data_dir, &id, &config.network_id()?).map_err(CommandError::machine)?;
    copy(&library.directory(version), to).map_err(CommandError::machine)?;
    println!("{version} is in {}", to.display());
    Ok(())
}

async fn wait_whole(config: &Config, patience: Duration) -> Result<Version, CommandError> {
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} chunks  {per_sec}").map_err(CommandError::machine)?,
    );
    let (mut progress, mut since) = (0, Instant::now());
    loop {
        tokio::time::sleep(POLL).await;
        // The node's API comes up within a moment.
        let Ok(status) = ApiClient::new(config)?.get("/v1/training").await else { continue };
        if let Some(whole) = status["whole"]["version"].as_str().filter(|_| status["arriving"].is_null()) {
            bar.finish_and_clear();
            return whole.parse().map(Version::from_hash).map_err(CommandError::failed);
        }
        let arriving = &status["arriving"];
        if let (Some(have), Some(of)) = (arriving["chunks"].as_u64(), arriving["of"].as_u64()) {
            bar.set_length(of);
            bar.set_position(have);
            bar.set_message(format!("step {}", arriving["step"]));
            if have != progress {
                (progress, since) = (have, Instant::now());
            }
        }
        if since.elapsed() > patience {
            bar.abandon();
            let connected = status["connected"].as_array().map_or(0, Vec::len);
            return Err(CommandError::failed(format!(
                "nothing came for {patience:?}; {connected} nodes that have the policy are connected, and it waits for {}",
                status["weights_wait_for"].as_str().unwrap_or("nothing")
            ))
            .hint("give a peer of the swarm with --bootstrap, and look whether the trainer runs"));
        }
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

type Found = (Library, Verified<Manifest>);

fn versions(config: &Config, begins: Option<&str>) -> Result<Vec<Found>, CommandError> {
    let libraries = Library::all(&config.data_dir, &config.network_id()?);
    let each = |library: Library| {
        let manifests = library.manifests();
        manifests.into_iter().map(move |manifest| (library.clone(), manifest))
    };
    let wanted = |found: &Found| begins.is_none_or(|begins| found.1.version.to_string().starts_with(begins));
    let mut found: Vec<Found> = libraries.into_iter().flat_map(each).filter(wanted).collect();
    found.sort_by_key(|(_, manifest)| (manifest.policy.clone(), manifest.step, manifest.made));
    match (begins, found.is_empty()) {
        (Some(begins), true) => Err(CommandError::failed(format!("no version here begins with '{begins}'"))
            .hint("chorus policy ls lists those that are here")),
        _ => Ok(found),
    }
}

fn list(config: &Config, as_json: bool) -> Result<(), CommandError> {
    let found = versions(config, None)?;
    if found.is_empty() && !as_json {
        println!("no versions here; a node that trains or samples keeps its newest ones");
    }
    for (_, manifest) in found {
        let (version, bytes) = (manifest.version, manifest.total_bytes());
        if as_json {
            let row = json!({
                "source": "disk", "policy": manifest.policy.name, "owner": manifest.policy.owner, "version": version, "parent": manifest.parent,
                "step": manifest.step, "made": manifest.made, "bytes": bytes, "chunks": manifest.chunks.len(),
            });
            println!("{row}");
        } else {
            println!("{version}  step {:>6}  {:>9.1} KiB  {}", manifest.step, kib(bytes), manifest.policy);
        }
    }
    let known = match block_on(online_rows(config, Some("policy"))) {
        Err(error) if error.kind() == Kind::NotRunning => Vec::new(),
        known => known?,
    };
    for row in &known {
        print_known(row, as_json);
    }
    Ok(())
}

/// What an owner says of a policy in the ledger.
fn print_known(row: &Value, as_json: bool) {
    let (owner, policy) = (&row["author"], &row["body"]["policy"]);
    let said = WallTime::from_millis(row["wall_time"].as_u64().unwrap_or_default());
    if as_json {
        let row = json!({
            "source": "ledger", "policy": policy["name"], "owner": owner, "version": policy["version"], "step": policy["step"],
            "environments": policy["environments"], "running": policy["running"], "said": said,
        });
        return println!("{row}");
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let environments: Vec<String> = policy["environments"].as_array().into_iter().flatten().map(text).collect();
    println!(
        "{}@{}  step {}  version {}  {}  {}, said {} s ago",
        text(&policy["name"]),
        text(owner),
        policy["step"],
        text(&policy["version"]).get(..8).unwrap_or("-"),
        environments.join(", "),
        if policy["running"] == true { "training" } else { "ended" },
        wall().since(said).as_secs()
    );
}

#[allow(clippy::cast_precision_loss, reason = "a size for people")]
fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

fn show(config: &Config, begins: &str) -> Result<(), CommandError> {
    for (library, manifest) in versions(config, Some(begins))? {
        let parent = manifest.parent.map_or_else(|| "none".to_owned(), |parent: Version| parent.to_string());
        println!("policy   {}@{}", manifest.policy.name, manifest.policy.owner);
        println!("version  {}", manifest.version);
        println!("step     {}   from {parent}", manifest.step);
        println!("signed   by {}", manifest.author());
        println!("chunks   {} of {} bytes", manifest.chunks.len(), manifest.chunk_bytes);
        for file in &manifest.files {
            println!("file     {:<28} {:>12} bytes", file.name.as_str(), file.bytes);
        }
        println!("files in {}", library.directory(manifest.version).display());
    }
    Ok(())
}

fn verify(config: &Config, begins: Option<&str>) -> Result<(), CommandError> {
    let mut damaged = 0;
    for (library, manifest) in versions(config, begins)? {
        let bad = library.missing(&manifest);
        let strange = manifest.author() != manifest.policy.owner || manifest.check().is_err();
        damaged += usize::from(strange || !bad.is_empty());
        let verdict = match (strange, bad.as_slice()) {
            (true, _) => "the manifest is not its owner's, or not what it says".to_owned(),
            (false, []) => "whole".to_owned(),
            (false, bad) => {
                format!("{} of {} chunks are missing or damaged: {bad:?}", bad.len(), manifest.chunks.len())
            }
        };
        println!("{}  step {:>6}  {verdict}", manifest.version, manifest.step);
    }
    if damaged > 0 {
        return Err(CommandError::failed(format!("{damaged} versions are not whole"))
            .hint("they never serve as they are; a node that runs fetches what is missing of the newest"));
    }
    Ok(())
}
