//! `chorus key`: the node's identity, to be backed up and restored.

use std::io::Read;
use std::path::PathBuf;

use clap::Subcommand;

use crate::config::Config;
use crate::error::CommandError;
use crate::keyfile;

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Print the node's public id
    Show,
    /// Print the secret key; whoever has it is this node
    Export,
    /// Take a secret key from a file, or from standard input, into a data directory that has none
    Import {
        /// File that holds the key; standard input if left out
        file: Option<PathBuf>,
    },
}

pub(crate) fn key(config: &Config, command: &KeyCommand) -> Result<(), CommandError> {
    let load = || {
        keyfile::load(&config.data_dir)
            .map_err(|error| CommandError::machine(error).hint("`chorus node run` makes a key at its first start"))
    };
    match command {
        KeyCommand::Show => println!("{}", load()?.node_id()),
        KeyCommand::Export => println!("{}", hex::encode(load()?.to_bytes().as_ref())),
        KeyCommand::Import { file } => {
            let text = read(file.as_ref())?;
            let key = keyfile::parse(&text)
                .ok_or_else(|| CommandError::usage("no key there: 64 hexadecimal digits are expected"))?;
            keyfile::save(&config.data_dir, &key).map_err(CommandError::machine)?;
            println!("{}", key.node_id());
        }
    }
    Ok(())
}

fn read(file: Option<&PathBuf>) -> Result<zeroize::Zeroizing<String>, CommandError> {
    let mut text = zeroize::Zeroizing::new(String::new());
    match file {
        Some(path) => {
            *text = std::fs::read_to_string(path)
                .map_err(|error| CommandError::machine(format!("cannot read {}: {error}", path.display())))?;
        }
        None => {
            std::io::stdin().take(4_096).read_to_string(&mut text).map_err(CommandError::machine)?;
        }
    }
    Ok(text)
}
