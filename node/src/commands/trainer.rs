//! `chorus trainer`: train a policy on what the swarm samples, and look at how it goes.

use std::path::{Path, PathBuf};

use chorus_protocol::Hash;
use chorus_protocol::misbehaviour::Evidence;
use clap::Subcommand;
use serde_json::Value;

use super::block_on;
use super::ledger::online_rows;
use super::run;
use crate::client::ApiClient;
use crate::config::{Config, EngineKind};
use crate::error::CommandError;
use crate::logs::LogFormat;
use crate::training::evidence;

#[derive(Debug, Subcommand)]
pub(crate) enum TrainerCommand {
    /// Start a node that trains a policy, in the foreground
    Run(Box<RunArgs>),
    /// How far the run is, and what it waits for
    Status {
        /// Print JSON for a program instead of a table for a person
        #[arg(long)]
        json: bool,
    },
    /// List the accusations that the ledger holds; or check what a convicted sampler signed
    Evidence {
        /// A file, as kept under training/evidence in the data directory; or the beginning of the hash of evidence that the ledger
        /// names, which a running node that trains or samples fetches
        what: Option<String>,
        /// Print JSON for a program instead of a table for a person
        #[arg(long)]
        json: bool,
    },
    /// The learning curve
    Curve {
        /// Write comma-separated values
        #[arg(long, conflicts_with = "svg")]
        csv: bool,
        /// Write a picture
        #[arg(long)]
        svg: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// What the policy is called
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// Directory of the policy to begin with
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Where tasks come from: arithmetic-N, knights-N, sokoban-N (may be given several times)
    #[arg(long = "env", value_name = "NAME")]
    environments: Vec<String>,
    /// Updates that the weights of a rollout may be behind
    #[arg(long, value_name = "S", conflicts_with = "sequential")]
    staleness: Option<u32>,
    /// Let every update wait for rollouts of its own weights
    #[arg(long)]
    sequential: bool,
    /// Let a program outside the node learn, over the local API
    #[arg(long)]
    external: bool,
    /// End after so many updates
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// End when the held-out reward is this high
    #[arg(long, value_name = "REWARD")]
    until: Option<f64>,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

pub(crate) fn trainer(mut config: Config, model: bool, command: TrainerCommand) -> Result<(), CommandError> {
    match command {
        TrainerCommand::Run(args) => {
            let format = args.log_format;
            apply(&mut config, *args, model)?;
            run::run(config, format)
        }
        TrainerCommand::Status { json } => status(&config, json),
        TrainerCommand::Evidence { what, json } => match what {
            None => accusations(&config, json),
            Some(what) => check_evidence(&config, &what),
        },
        TrainerCommand::Curve { csv, svg } => curve(
            &config,
            if csv {
                "csv"
            } else if svg {
                "svg"
            } else {
                "text"
            },
        ),
    }
}

fn apply(config: &mut Config, args: RunArgs, model: bool) -> Result<(), CommandError> {
    let section = &mut config.trainer;
    if let Some(policy) = args.policy {
        section.policy = policy;
    }
    if let Some(from) = args.from {
        section.from = from.display().to_string();
    }
    if !args.environments.is_empty() {
        section.environments = args.environments;
    }
    section.external |= args.external;
    section.sequential |= args.sequential;
    section.staleness = args.staleness.unwrap_or(section.staleness);
    section.steps = args.steps.unwrap_or(section.steps);
    section.until = args.until.unwrap_or(section.until);
    if section.policy.is_empty() {
        return Err(CommandError::usage("the policy needs a name").hint("e.g. --policy arithmetic"));
    }
    // A trainer needs its memory and its processor for learning; who wants it to answer as well says so.
    if !model {
        config.engine.kind = EngineKind::None;
    }
    Ok(())
}

/// Lists what the ledger of the running node says that others did.
fn accusations(config: &Config, json: bool) -> Result<(), CommandError> {
    let rows = block_on(online_rows(config, Some("misbehaviour")))?;
    if rows.is_empty() && !json {
        println!("nobody is accused of anything");
    }
    for row in &rows {
        if json {
            println!("{row}");
            continue;
        }
        let accusation = &row["body"]["misbehaviour"];
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        println!(
            "{}  {} is accused of {} in {}, version {}, by {}",
            text(&accusation["evidence"]),
            text(&accusation["accused"]),
            text(&accusation["charge"]),
            text(&accusation["policy"]["name"]),
            text(&accusation["version"]).get(..8).unwrap_or("-"),
            text(&row["author"]),
        );
    }
    Ok(())
}

/// Computes evidence again: a file's, or what the running node has or fetches.
fn check_evidence(config: &Config, what: &str) -> Result<(), CommandError> {
    let network = config.network_id()?;
    let path = Path::new(what);
    let (accused, verdict) = if path.exists() {
        evidence::check_file(path, &config.data_dir, &network)?
    } else {
        evidence::check(&fetch(config, what)?, &config.data_dir, &network)?
    };
    println!("{accused} is convicted: {verdict:?}");
    Ok(())
}

/// Has the running node fetch the evidence of an accusation.
fn fetch(config: &Config, begins: &str) -> Result<Vec<u8>, CommandError> {
    let rows = block_on(online_rows(config, Some("misbehaviour")))?;
    let named = |row: &Value| row["body"]["misbehaviour"]["evidence"].as_str().map(str::to_owned);
    let known = rows.iter().filter_map(named).find(|hash| hash.starts_with(begins));
    let hash = known.or_else(|| begins.parse::<Hash>().ok().map(|hash| hash.to_string())).ok_or_else(|| {
        CommandError::usage(format!("'{begins}' is no file, and no accusation names evidence that begins so"))
            .hint("chorus trainer evidence lists the accusations that the ledger holds")
    })?;
    let bytes = block_on(async { ApiClient::new(config)?.bytes(&format!("/v1/training/evidence/{hash}")).await })?;
    if Evidence::hash(&bytes).to_string() == hash {
        Ok(bytes)
    } else {
        Err(CommandError::failed("what the node sent does not have the evidence's hash; is it a node of this version?"))
    }
}

fn status(config: &Config, json: bool) -> Result<(), CommandError> {
    let status = block_on(async { ApiClient::new(config)?.get("/v1/training").await })?;
    if json {
        println!("{status:#}");
    } else {
        print!("{}", status_text(&status));
    }
    Ok(())
}

/// A room's status for a person; `chorus status` shows it too.
pub(super) fn status_text(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let number = |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |number| format!("{number:.3}"));
    let version = |value: &Value| match value["version"].as_str() {
        Some(version) => format!("{} (step {})", version.get(..8).unwrap_or(version), value["step"]),
        None => "none yet".to_owned(),
    };
    let connected = status["connected"].as_array().map_or(0, Vec::len);
    let mut lines = vec![format!("policy    {}@{}", text(&status["name"]), text(&status["owner"]))];
    if status["role"] == "trainer" {
        let learner = &status["learner"];
        let busy = learner["utilisation"].as_f64().unwrap_or_default() * 100.0;
        lines.extend([
            format!("trainer   {}; {}", text(&status["state"]), text(&status["mode"])),
            format!("step      {}, published {}{}", status["step"], version(&status["published"]), reach(status)),
            format!("reward    {} of rollouts, {} held out", number(&status["reward"]), number(&status["held_out"])),
            format!("learner   busy {busy:.0} % of the time; waits for {}", text(&learner["waits_for"])),
            format!(
                "rollouts  {} taken, {} used, {} given to another sampler",
                status["taken"], status["used"], status["reissued"]
            ),
            format!(
                "samplers  {} deliver {} rollouts/s; {} are needed to keep the learner busy",
                status["samplers"].as_array().map_or(0, Vec::len),
                number(&status["capacity"]["delivered_per_s"]),
                status["capacity"]["samplers_needed"]
                    .as_u64()
                    .map_or_else(|| "an unknown number".to_owned(), |n| n.to_string()),
            ),
            hired(&status["hiring"]),
            format!(
                "stream    {} tokens/s, {} bytes a token; {connected} connected",
                number(&status["tokens_per_s"]),
                number(&status["bytes_per_token"])
            ),
        ]);
        return lines.join("\n") + "\n";
    }
    lines.extend([
        format!("sampler   serves {}; waits for {}", version(&status["serving"]), text(&status["waits_for"])),
        format!(
            "lease     {}",
            status["hired_for_s"].as_u64().map_or_else(|| "none".to_owned(), |left| format!("for {left} s more"))
        ),
        format!("weights   newest whole {}; {connected} connected", version(&status["whole"])),
        format!(
            "rollouts  {} count, {} do not, {} lost; {} frames wait for the trainer",
            status["counted"], status["refused"], status["lost"], status["spooled_frames"]
        ),
    ]);
    if let Some(of) = status["arriving"]["of"].as_u64() {
        let arriving = &status["arriving"];
        lines.push(format!("arriving  {}: {} of {of} chunks", version(arriving), arriving["chunks"]));
    }
    lines.join("\n") + "\n"
}

/// How long a version takes to everybody.
fn reach(status: &Value) -> String {
    status["reach_s"].as_f64().map_or_else(String::new, |reach| format!("; a version is everywhere after {reach:.2} s"))
}

/// Who samples, and what it costs.
fn hired(hiring: &Value) -> String {
    let offers = hiring["offers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let hired = offers.iter().filter(|offer| !offer["hired_for_s"].is_null()).count();
    let price = hiring["price_per_hour"].as_f64().unwrap_or_default();
    let cost = if price > 0.0 { format!(" for {price} an hour") } else { String::new() };
    let trouble = hiring["trouble"].as_str().filter(|_| hired == 0).map(|why| format!("; {why}")).unwrap_or_default();
    format!("hired     {hired} of {} that offer to sample{cost}{trouble}", offers.len())
}

fn curve(config: &Config, form: &str) -> Result<(), CommandError> {
    let text = block_on(async { ApiClient::new(config)?.text(&format!("/v1/training/curve?form={form}")).await })?;
    print!("{text}");
    Ok(())
}
