//! The commands, one file each. `node run` starts a process; the others speak to a running one, or read a stopped one's disk.

mod ask;
mod config;
mod doctor;
mod key;
mod ledger;
mod policy;
mod run;
mod status;
mod trainer;

use clap::{Parser, Subcommand};

pub(crate) use ledger::row as entry_row;

use crate::config::{Config, Overrides};
use crate::error::CommandError;
use crate::logs::LogFormat;

/// Turns a crowd of consumer GPUs into one machine that answers and learns, with no machine in charge.
#[derive(Debug, Parser)]
#[command(name = "chorus", version, about, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    flags: Overrides,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a node, or look after one
    #[command(subcommand)]
    Node(NodeCommand),
    /// Run a task on the swarm and watch it happen
    Ask(ask::AskArgs),
    /// What this node is doing, and what it waits for
    Status(Json),
    /// Who is connected
    Peers(status::PeersArgs),
    /// Check this machine and the node on it, and say what to do
    Doctor,
    /// Look at the replicated ledger, of a running node or of a stopped one's disk
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Train a policy on what the swarm samples
    #[command(subcommand)]
    Trainer(trainer::TrainerCommand),
    /// The versions of policies on this node's disk, and the policies that others train
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// The configuration in force
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// The node's identity
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Write a model file in another quantisation
    #[command(hide = true)]
    Requantize(run::RequantizeArgs),
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Start a node in the foreground
    Run {
        /// How log lines look
        #[arg(long, value_enum, default_value_t)]
        log_format: LogFormat,
    },
    /// Print the ticket by which others join this node's swarm
    Ticket {
        /// Make it from the configuration alone, and the key if there is none yet, without asking a running node
        #[arg(long)]
        offline: bool,
    },
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct Json {
    /// Print JSON for a program instead of a table for a person
    #[arg(long)]
    json: bool,
}

/// Does what the command line says.
pub(crate) fn dispatch(cli: Cli) -> Result<(), CommandError> {
    let Cli { flags, command } = cli;
    let config = || Config::load(&flags);
    match command {
        Command::Node(NodeCommand::Run { log_format }) => run::run(config()?, log_format),
        Command::Node(NodeCommand::Ticket { offline }) => status::ticket(&config()?, offline),
        Command::Ask(args) => ask::ask(&config()?, &args),
        Command::Status(Json { json }) => status::status(&config()?, json),
        Command::Peers(args) => status::peers(&config()?, args),
        Command::Doctor => doctor::doctor(&config()?),
        Command::Ledger(command) => ledger::ledger(&config()?, command),
        Command::Trainer(command) => {
            let model = flags.model.is_some();
            trainer::trainer(config()?, model, command)
        }
        Command::Policy(command) => policy::policy(&config()?, &command),
        Command::Config(command) => config::config(&config()?, &command),
        Command::Key(command) => key::key(&config()?, &command),
        Command::Requantize(args) => run::requantize(&args),
    }
}

/// Runs an async command to its end on a small runtime.
fn block_on<T>(future: impl Future<Output = Result<T, CommandError>>) -> Result<T, CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::machine)?;
    runtime.block_on(future)
}
