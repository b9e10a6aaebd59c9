//! `chorus policy`: the versions of policies that lie on this node's disk.

use chorus_protocol::Verified;
use chorus_protocol::policy::{Manifest, Version};
use clap::Subcommand;
use serde_json::json;

use crate::config::Config;
use crate::error::CommandError;
use crate::training::library::Library;

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// List the versions on this node's disk, the oldest step first
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
        PolicyCommand::Verify { version } => verify(config, version.as_deref()),
    }
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
                "policy": manifest.policy.name, "owner": manifest.policy.owner, "version": version, "parent": manifest.parent,
                "step": manifest.step, "made": manifest.made, "bytes": bytes, "chunks": manifest.chunks.len(),
            });
            println!("{row}");
        } else {
            println!("{version}  step {:>6}  {:>9.1} KiB  {}", manifest.step, kib(bytes), manifest.policy);
        }
    }
    Ok(())
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
