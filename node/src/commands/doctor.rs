//! `chorus doctor`: checks this machine and the node on it, one line a finding, and says what to do.

use std::net::TcpListener;
use std::path::Path;

use serde_json::Value;

use super::block_on;
use crate::client::ApiClient;
use crate::config::{Config, EngineKind, models_dir};
use crate::error::{CommandError, Kind};
use crate::keyfile;

/// Room that a node should have, in MiB.
const MIN_DISK_MIB: u64 = 512;

/// What one check found.
enum Finding {
    Good(String),
    /// Works, but not as it could.
    Weak(String, &'static str),
    /// Does not work.
    Bad(String, &'static str),
}

pub(crate) fn doctor(config: &Config) -> Result<(), CommandError> {
    let mut findings = vec![key(config), disk(&config.data_dir), model(config), embedder(config)];
    match block_on(async { ApiClient::new(config)?.get("/v1/status").await }) {
        Ok(status) => findings.extend(running(&status)),
        Err(error) if error.kind() == Kind::NotRunning => findings.extend(ports(config)),
        Err(error) => findings
            .push(Finding::Bad(format!("the API at {} answers: {error}", config.api.listen), "is the token right?")),
    }
    let mut bad = 0;
    for finding in findings {
        match finding {
            Finding::Good(what) => println!("ok    {what}"),
            Finding::Weak(what, advice) => println!("weak  {what}\n      {advice}"),
            Finding::Bad(what, advice) => {
                bad += 1;
                println!("BAD   {what}\n      {advice}");
            }
        }
    }
    if bad == 0 { Ok(()) } else { Err(CommandError::failed(format!("{bad} things block this node"))) }
}

fn key(config: &Config) -> Finding {
    if !config.data_dir.join(keyfile::KEY_FILE).exists() {
        return Finding::Good(format!("no key in {} yet; the first start makes one", config.data_dir.display()));
    }
    match keyfile::load(&config.data_dir) {
        Ok(key) => Finding::Good(format!("key of {}", key.node_id())),
        Err(error) => {
            Finding::Bad(error.to_string(), "restore the file from a backup, or move it away to become a new node")
        }
    }
}

fn disk(dir: &Path) -> Finding {
    let Some(free) = free_mib(dir) else {
        return Finding::Weak(format!("the room at {} is unknown", dir.display()), "check it by hand with df");
    };
    if free < MIN_DISK_MIB {
        return Finding::Bad(
            format!("{free} MiB free at {}", dir.display()),
            "free some space, or choose another --data-dir",
        );
    }
    Finding::Good(format!("{free} MiB free at {}", dir.display()))
}

/// Free room as `df` sees it: the standard library has no call for it.
fn free_mib(dir: &Path) -> Option<u64> {
    let existing = dir.ancestors().find(|path| path.exists())?;
    let output = std::process::Command::new("df").arg("-Pm").arg(existing).output().ok()?;
    String::from_utf8(output.stdout).ok()?.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()
}

fn model(config: &Config) -> Finding {
    match config.engine.kind {
        EngineKind::None => {
            Finding::Weak("no model: this node asks and does not answer".to_owned(), "give it one with --model")
        }
        EngineKind::Openai => Finding::Good(format!("the model is served by {}", config.engine.url)),
        EngineKind::Mistral => {
            let name =
                if config.engine.model.is_empty() { crate::process::DEFAULT_MODEL } else { &config.engine.model };
            let fetched = models_dir().join(name);
            if fetched.exists() || Path::new(name).exists() {
                return Finding::Good(format!("model {name}"));
            }
            let advice =
                "run scripts/models for the default model; a Hugging Face id (owner/name) is fetched at the start";
            if name.contains('/') && !name.ends_with(".gguf") {
                Finding::Weak(format!("model {name} is not on this machine"), advice)
            } else {
                Finding::Bad(format!("model {name} is not on this machine"), advice)
            }
        }
    }
}

fn embedder(config: &Config) -> Finding {
    let dir = crate::process::embedder_dir(config);
    if dir.join("tokenizer.json").exists() {
        return Finding::Good("embedder all-MiniLM-L6-v2".to_owned());
    }
    Finding::Weak(
        format!("no embedder in {}", dir.display()),
        "jobs are then matched by tags alone; scripts/models fetches it",
    )
}

fn ports(config: &Config) -> Vec<Finding> {
    let api = match TcpListener::bind(config.api.listen) {
        Ok(_) => Finding::Good(format!("no node runs; {} is free for its API", config.api.listen)),
        Err(error) => Finding::Bad(
            format!("{} cannot be used for the API: {error}", config.api.listen),
            "another program has it: use --api or --instance N",
        ),
    };
    vec![api]
}

fn running(status: &Value) -> Vec<Finding> {
    let peers = status["peers"].as_u64().unwrap_or(0);
    let peers = if peers > 0 {
        Finding::Good(format!("{peers} peers"))
    } else {
        Finding::Weak(
            "the node runs and has no peers".to_owned(),
            "give it the ticket of another (`chorus node ticket` there, --bootstrap here); both need the same --network; \
             a firewall must let UDP and TCP of the listen port in on one of the two",
        )
    };
    let quarantined = status["ledger"]["self_quarantined"].as_bool() == Some(true);
    let standing = if quarantined {
        Finding::Bad(
            "this node is quarantined: two different entries with one number were signed with its key".to_owned(),
            "another node runs with the same key; stop one of them, move node.key away here, and start as a new node",
        )
    } else {
        Finding::Good("in good standing".to_owned())
    };
    let engine = Finding::Good(format!("engine: {}", status["engine"]["state"].as_str().unwrap_or("unknown")));
    let idle = Finding::Good(status["idle_because"].as_str().unwrap_or("working").to_owned());
    vec![peers, standing, engine, idle]
}
