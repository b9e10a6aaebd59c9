//! A policy on disk: the directory that Hugging Face's tools and mistral.rs load.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::Path;

use candle_core::{Device, Result, Tensor};
use serde::Serialize;

use super::tokenizer::{tokenizer_config_json, tokenizer_json};
use super::{Policy, PolicyConfig};

/// Writes a policy into a directory, which is made if there is none.
///
/// # Errors
/// candle's, or those of the file system.
pub fn save(policy: &Policy, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let tensors: HashMap<&str, Tensor> =
        policy.weights().iter().map(|(name, weight)| (name.as_str(), weight.as_tensor().clone())).collect();
    candle_core::safetensors::save(&tensors, directory.join("model.safetensors"))?;
    write(&directory.join("config.json"), policy.config())?;
    write(&directory.join("tokenizer.json"), &tokenizer_json())?;
    write(&directory.join("tokenizer_config.json"), &tokenizer_config_json())?;
    Ok(())
}

/// Reads a policy from a directory.
///
/// # Errors
/// candle's, when a file is missing or does not hold a policy of the llama architecture.
pub fn load(directory: &Path) -> Result<Policy> {
    let config = fs::read(directory.join("config.json"))?;
    let config: PolicyConfig =
        serde_json::from_slice(&config).map_err(|error| candle_core::Error::Msg(format!("config.json: {error}")))?;
    let tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu)?.into_iter().collect();
    Policy::from_tensors(config, tensors)
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    fs::write(path, serde_json::to_vec_pretty(value)?)
}
