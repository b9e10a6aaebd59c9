//! `chorus config`: the settings in force.

use clap::Subcommand;

use crate::config::Config;
use crate::error::CommandError;

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting, defaults and flags included, as a file that can be saved
    Show,
}

pub(crate) fn config(config: &Config, command: &ConfigCommand) -> Result<(), CommandError> {
    match command {
        ConfigCommand::Show => print!("{}", config.to_toml()?),
    }
    Ok(())
}
