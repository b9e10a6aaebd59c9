//! One TOML file with every default written out, and the flags that override it.
//!
//! An unknown key is an error: a misspelt setting that is silently ignored costs somebody an evening.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use chorus_core::SelectionRule;
use chorus_protocol::NetworkId;
use serde::{Deserialize, Serialize};

use crate::error::CommandError;

/// The configuration file's name in the data directory.
pub(crate) const CONFIG_FILE: &str = "chorus.toml";
const P2P_PORT: u16 = 7600;
const API_PORT: u16 = 7700;
const BULK_PORT: u16 = 7800;
/// The most nodes that `--instance` can put on one host before their ports meet.
const MAX_INSTANCE: u16 = 99;
/// The dearest hour of sampling: in thousandths it fits what crosses the wire.
const MAX_PRICE: f64 = 4_000_000.0;

/// Everything a person can set.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The swarm's name; nodes of another name are strangers.
    pub network: String,
    /// A name for people; it need not be unique.
    pub name: String,
    /// Where the key, the ledger and the log of this node live.
    pub data_dir: PathBuf,
    pub net: NetSection,
    pub api: ApiSection,
    pub engine: EngineSection,
    pub beacon: BeaconSection,
    pub sampler: SamplerSection,
    pub trainer: TrainerSection,
    /// What this node says it is good at.
    #[serde(rename = "skill")]
    pub skills: Vec<SkillSection>,
}

/// How this node meets others.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NetSection {
    /// Multiaddresses to listen on.
    pub listen: Vec<String>,
    /// Multiaddresses (with /p2p/) or tickets of peers to find the swarm by.
    pub bootstrap: Vec<String>,
    /// File with more of them, as `peers = [...]`; see testnet/bootstrap.toml.
    pub bootstrap_file: String,
    /// Find peers on the local network.
    pub mdns: bool,
    /// Carry the traffic of peers that cannot be reached directly.
    pub relay_server: bool,
    /// Multiaddresses under which others reach this node, where it cannot find out by itself.
    pub external: Vec<String>,
    /// UDP addresses for the bulk plane, over which rollouts and weights travel; none: libp2p carries them, slowly.
    pub bulk: Vec<SocketAddr>,
}

/// The local HTTP API.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ApiSection {
    /// Where it listens. Beyond loopback it wants a token.
    pub listen: SocketAddr,
    /// The bearer token; empty for none.
    pub token: String,
}

/// Which engine runs the jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EngineKind {
    /// A model in this process, with mistral.rs.
    Mistral,
    /// A server that speaks OpenAI's API.
    Openai,
    /// None: the node asks, and does not answer.
    None,
}

/// The language model.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EngineSection {
    pub kind: EngineKind,
    /// A GGUF file, a directory in Hugging Face layout, or a Hugging Face model id. For `openai`: the model's name there.
    pub model: String,
    /// For `openai`: the server's address, e.g. <http://127.0.0.1:8080/v1>.
    pub url: String,
    /// For `openai`: the environment variable that holds the key.
    pub api_key_env: String,
    /// Jobs at a time.
    pub slots: u16,
    /// Jobs that may wait for a slot.
    pub queue: usize,
    /// Tokens of prompt and answer together; 0 is the model's own limit.
    pub context: u32,
    /// Processor threads; 0 is one a core.
    pub threads: usize,
    /// Stands before every job's own prompt.
    pub system_prompt: String,
    /// Directory of the all-MiniLM-L6-v2 embedder; empty for none.
    pub embedder: String,
}

/// How elections are held.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BeaconSection {
    /// `random`, `score`, `score_reputation`, `linucb` or `discounted`.
    #[serde(with = "rule")]
    pub selection: SelectionRule,
    /// How long bids are compared at least, in milliseconds, unless enough have come before.
    pub window_ms: u64,
    /// How long at most, in milliseconds: in between the window follows how long bids really take.
    pub window_max_ms: u64,
}

/// For whose policy this node samples.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SamplerSection {
    /// The policy, as `name@did:key:…`; `any` for that of whatever trainer hires this node; empty for none.
    pub policy: String,
    /// Rollouts that are sampled, or wait for the engine, at a time; 0 for a node that only keeps versions for others.
    pub slots: u16,
    /// What an hour of it costs, in the unit that the swarm reckons in; 0 asks for nothing.
    pub price: f64,
    /// The largest version that is taken, in MiB.
    pub max_policy_mb: u64,
    /// Pass versions on to other samplers.
    pub share: bool,
    /// Disk for rollouts that the trainer has not acknowledged, in MiB.
    pub spool_mb: usize,
    /// When that is full while the trainer is away: drop the oldest rollouts rather than stop.
    pub drop_oldest: bool,
}

/// The policy that this node trains.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TrainerSection {
    /// What the policy is called; empty on a node that does not train.
    pub policy: String,
    /// The directory of the policy to begin with, in Hugging Face's layout. A run that was begun goes on from its own checkpoint.
    pub from: String,
    /// Where tasks come from, each as often as the others.
    pub environments: Vec<String>,
    /// Somebody outside learns, over the local API (scripts/python); rate, anneal, kl and micro_batch are then its own affair.
    pub external: bool,
    /// Every update waits for rollouts of its own weights.
    pub sequential: bool,
    /// Otherwise: how many updates the weights that wrote a rollout may be behind.
    pub staleness: u32,
    /// Tasks in an update.
    pub batch: usize,
    /// Answers to each task.
    pub members: u16,
    /// AdamW's rate, and the updates over which it falls to a tenth.
    pub rate: f64,
    pub anneal: u32,
    /// Weight of the divergence from the policy that the run began with; 0 for none.
    pub kl: f64,
    /// Rollouts that are learned from at a time; 0 for all of an update. Changes memory and not what is learned.
    pub micro_batch: usize,
    /// Updates after which the run ends; 0 for no end.
    pub steps: u64,
    /// The held-out reward at which the run ends; 0 for none.
    pub until: f64,
    /// Samplers that are hired at a time, at most.
    pub samplers: usize,
    /// How long a sampler is hired for, in seconds; who is still wanted then is hired again.
    pub term_s: u64,
    /// Updates between two versions.
    pub publish_every: u64,
    /// What this node may send of a version beyond one copy, in percent, while samplers pass it on among themselves.
    pub extra_percent: u32,
    /// Updates between two looks at held-out tasks.
    pub evaluate_every: u64,
    /// Same seed, same tasks.
    pub seed: u64,
}

/// The selection rule by its name, as the beacon knows it.
mod rule {
    use chorus_core::SelectionRule;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(rule: &SelectionRule, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(rule.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SelectionRule, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(de::Error::custom)
    }
}

/// Something this node is good at.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SkillSection {
    /// A sentence; its meaning is compared with what a job asks for.
    pub text: String,
    /// Words that a job may ask for.
    #[serde(default)]
    pub tags: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            network: "chorus".to_owned(),
            name: String::new(),
            data_dir: default_data_dir(),
            net: NetSection::default(),
            api: ApiSection::default(),
            engine: EngineSection::default(),
            beacon: BeaconSection::default(),
            sampler: SamplerSection::default(),
            trainer: TrainerSection::default(),
            skills: Vec::new(),
        }
    }
}

impl Default for NetSection {
    fn default() -> Self {
        Self {
            listen: vec![format!("/ip4/0.0.0.0/udp/{P2P_PORT}/quic-v1"), format!("/ip4/0.0.0.0/tcp/{P2P_PORT}")],
            bootstrap: Vec::new(),
            bootstrap_file: String::new(),
            mdns: true,
            relay_server: true,
            external: Vec::new(),
            bulk: vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), BULK_PORT)],
        }
    }
}

impl Default for ApiSection {
    fn default() -> Self {
        Self { listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), API_PORT), token: String::new() }
    }
}

impl Default for EngineSection {
    fn default() -> Self {
        Self {
            kind: EngineKind::Mistral,
            model: String::new(),
            url: String::new(),
            api_key_env: "OPENAI_API_KEY".to_owned(),
            slots: 1,
            queue: 8,
            context: 0,
            threads: 0,
            system_prompt: "You are a helpful assistant.".to_owned(),
            embedder: String::new(),
        }
    }
}

impl Default for SamplerSection {
    fn default() -> Self {
        Self {
            policy: String::new(),
            slots: 16,
            price: 0.0,
            max_policy_mb: 16_384,
            share: true,
            spool_mb: 256,
            drop_oldest: false,
        }
    }
}

impl Default for TrainerSection {
    fn default() -> Self {
        Self {
            policy: String::new(),
            from: String::new(),
            environments: vec!["arithmetic-2".to_owned()],
            external: false,
            sequential: false,
            staleness: 2,
            batch: 16,
            members: 8,
            rate: 6e-4,
            anneal: 4_000,
            kl: 0.0,
            micro_batch: 0,
            steps: 0,
            until: 0.0,
            samplers: 64,
            term_s: 60,
            publish_every: 1,
            extra_percent: 40,
            evaluate_every: 25,
            seed: 1,
        }
    }
}

impl Default for BeaconSection {
    fn default() -> Self {
        let beacon = chorus_core::BeaconConfig::default();
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self { selection: beacon.selection, window_ms: millis(beacon.window), window_max_ms: millis(beacon.window_max) }
    }
}

fn default_data_dir() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let base = std::env::var_os("XDG_DATA_HOME").map_or_else(|| home().join(".local/share"), PathBuf::from);
    base.join("chorus")
}

/// Where the models are kept that `scripts/models` fetched.
pub(crate) fn models_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CHORUS_MODELS") {
        return dir.into();
    }
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    base.join("chorus/models")
}

/// The flags that override the file. All of them are global, so they can stand anywhere on the line.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Overrides {
    /// Configuration file [default: <data dir>/chorus.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the node's key, ledger and configuration
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Shift every port by N and use a data directory of its own, so that many nodes share a host (0 to 99)
    #[arg(long, global = true, value_name = "N")]
    pub instance: Option<u16>,
    /// The swarm's name
    #[arg(long, global = true, value_name = "NAME")]
    pub network: Option<String>,
    /// A name for people
    #[arg(long, global = true, value_name = "NAME")]
    pub name: Option<String>,
    /// Multiaddress to listen on (may be given several times)
    #[arg(long, global = true, value_name = "ADDR")]
    pub listen: Vec<String>,
    /// Multiaddress or ticket of a peer to find the swarm by (may be given several times)
    #[arg(long, global = true, value_name = "PEER")]
    pub bootstrap: Vec<String>,
    /// Address of the HTTP API
    #[arg(long, global = true, value_name = "IP:PORT")]
    pub api: Option<SocketAddr>,
    /// GGUF file, model directory or Hugging Face id; `none` for a node that only asks
    #[arg(long, global = true, value_name = "MODEL")]
    pub model: Option<String>,
    /// Do not look for peers on the local network
    #[arg(long, global = true)]
    pub no_mdns: bool,
    /// UDP address for rollouts and weights (may be given several times)
    #[arg(long, global = true, value_name = "IP:PORT")]
    pub bulk: Vec<SocketAddr>,
    /// Sample for this policy
    #[arg(long, global = true, value_name = "NAME@ID")]
    pub sample: Option<String>,
}

impl Config {
    /// Reads the file, applies the flags, and checks the whole.
    pub(crate) fn load(flags: &Overrides) -> Result<Self, CommandError> {
        let mut config = Self::default();
        let data_dir = flags.data_dir.clone().unwrap_or_else(|| instance_dir(&config.data_dir, flags.instance));
        let file = flags.config.clone().unwrap_or_else(|| data_dir.join(CONFIG_FILE));
        if flags.config.is_some() || file.exists() {
            config = Self::read(&file)?;
            if flags.data_dir.is_none() && config.data_dir == default_data_dir() {
                config.data_dir = data_dir;
            }
        } else {
            config.data_dir = data_dir;
        }
        config.apply(flags);
        if let Some(instance) = flags.instance {
            config.shift_ports(instance)?;
        }
        config.validate()?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self, CommandError> {
        let text = fs::read_to_string(path)
            .map_err(|error| CommandError::usage(format!("cannot read {}: {error}", path.display())))?;
        toml::from_str(&text).map_err(|error| {
            CommandError::usage(format!("{}: {error}", path.display()))
                .hint("`chorus config show` prints every key with its default")
        })
    }

    fn apply(&mut self, flags: &Overrides) {
        if let Some(dir) = &flags.data_dir {
            self.data_dir.clone_from(dir);
        }
        if let Some(network) = &flags.network {
            self.network.clone_from(network);
        }
        if let Some(name) = &flags.name {
            self.name.clone_from(name);
        }
        if !flags.listen.is_empty() {
            self.net.listen.clone_from(&flags.listen);
        }
        self.net.bootstrap.extend(flags.bootstrap.iter().cloned());
        if let Some(api) = flags.api {
            self.api.listen = api;
        }
        match flags.model.as_deref() {
            Some("none") => self.engine.kind = EngineKind::None,
            Some(model) => model.clone_into(&mut self.engine.model),
            None => {}
        }
        if flags.no_mdns {
            self.net.mdns = false;
        }
        if !flags.bulk.is_empty() {
            self.net.bulk.clone_from(&flags.bulk);
        }
        if let Some(policy) = &flags.sample {
            self.sampler.policy.clone_from(policy);
        }
    }

    fn shift_ports(&mut self, by: u16) -> Result<(), CommandError> {
        if by > MAX_INSTANCE {
            return Err(CommandError::usage(format!("--instance takes 0 to {MAX_INSTANCE}")));
        }
        let port = self.api.listen.port();
        self.api.listen.set_port(if port == 0 { 0 } else { port.saturating_add(by) });
        for listen in &mut self.net.listen {
            *listen = shift_port(listen, by);
        }
        for bulk in &mut self.net.bulk {
            let port = bulk.port();
            bulk.set_port(if port == 0 { 0 } else { port.saturating_add(by) });
        }
        Ok(())
    }

    fn validate(&self) -> Result<(), CommandError> {
        self.network_id()?;
        if !self.api.listen.ip().is_loopback() && self.api.token.is_empty() {
            return Err(CommandError::usage(format!(
                "the API at {} can be reached by others, so it wants a token",
                self.api.listen
            ))
            .hint("set api.token in the configuration file, or use --api 127.0.0.1:7700"));
        }
        if self.engine.kind == EngineKind::Openai && self.engine.url.is_empty() {
            return Err(CommandError::usage("engine.kind = \"openai\" wants engine.url")
                .hint("e.g. engine.url = \"http://127.0.0.1:8080/v1\""));
        }
        if !(0.0..=MAX_PRICE).contains(&self.sampler.price) {
            return Err(CommandError::usage(format!("sampler.price is {}, which is no price", self.sampler.price))
                .hint(format!("it is what an hour of sampling costs: from 0 to {MAX_PRICE}")));
        }
        if self.engine.slots == 0 && self.engine.kind != EngineKind::None {
            return Err(CommandError::usage("engine.slots is 0, so the node would never answer")
                .hint("use --model none for a node that only asks"));
        }
        Ok(())
    }

    /// Returns every peer to find the swarm by: configured, by flag, and from the bootstrap file.
    pub(crate) fn bootstrap_peers(&self) -> Result<Vec<String>, CommandError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Bootstrap {
            peers: Vec<String>,
        }
        let mut peers = self.net.bootstrap.clone();
        if !self.net.bootstrap_file.is_empty() {
            let path = &self.net.bootstrap_file;
            let text = fs::read_to_string(path)
                .map_err(|error| CommandError::usage(format!("cannot read net.bootstrap_file {path}: {error}")))?;
            let list: Bootstrap =
                toml::from_str(&text).map_err(|error| CommandError::usage(format!("{path}: {error}")))?;
            peers.extend(list.peers);
        }
        Ok(peers)
    }

    /// Returns the network's name as a type that only valid names have.
    pub(crate) fn network_id(&self) -> Result<NetworkId, CommandError> {
        self.network.parse().map_err(CommandError::usage)
    }

    /// Returns the whole configuration as a file that [`Config::load`] reads back.
    pub(crate) fn to_toml(&self) -> Result<String, CommandError> {
        let body = toml::to_string_pretty(self).map_err(CommandError::machine)?;
        Ok(format!(
            "# Chorus: every setting in force. Save it as chorus.toml in the data directory and change what you like.\n{body}"
        ))
    }
}

fn instance_dir(base: &Path, instance: Option<u16>) -> PathBuf {
    match instance {
        Some(n) if n > 0 => base.join(format!("instance-{n}")),
        _ => base.to_owned(),
    }
}

/// Adds `by` to the port in a multiaddress like `/ip4/0.0.0.0/tcp/7600`; port 0 stays 0.
fn shift_port(address: &str, by: u16) -> String {
    let mut parts: Vec<String> = address.split('/').map(str::to_owned).collect();
    for i in 1..parts.len() {
        if matches!(parts[i - 1].as_str(), "tcp" | "udp")
            && let Ok(port) = parts[i].parse::<u16>()
            && port != 0
        {
            parts[i] = port.saturating_add(by).to_string();
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_read_back() {
        let config = Config::default();
        let text = config.to_toml().expect("plain data");
        let back: Config = toml::from_str(&text).expect("its own output");
        assert_eq!(back.to_toml().expect("plain data"), text);
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = toml::from_str::<Config>("[net]\nlisten_on = []\n").expect_err("unknown key");
        assert!(error.to_string().contains("listen_on"), "{error}");
    }

    #[test]
    fn an_instance_shifts_every_port_and_moves_the_directory() {
        let flags = Overrides { instance: Some(3), ..Overrides::default() };
        let config = Config::load(&flags).expect("valid");
        assert_eq!(config.api.listen.port(), API_PORT + 3);
        assert!(config.net.listen.iter().all(|address| address.contains(&(P2P_PORT + 3).to_string())));
        assert!(config.data_dir.ends_with("instance-3"));
    }

    #[test]
    fn an_api_that_others_reach_wants_a_token() {
        let flags = Overrides { api: Some(SocketAddr::from(([0, 0, 0, 0], 1))), ..Overrides::default() };
        let error = Config::load(&flags).expect_err("no token");
        assert!(error.to_string().contains("token"), "{error}");
    }
}
