//! Runs whole `chorus` processes for tests: each with a directory, ports and a log of its own, all on loopback.
//!
//! A [`Swarm`] owns its nodes and a scratch directory; dropping it kills what still runs. A node that does not do what a test
//! waits for fails the test with its log's last lines, so that a red run explains itself.
#![allow(clippy::panic, reason = "a harness fails tests")]

pub mod netns;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use reqwest::blocking::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before the test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
const LOG_LINES: usize = 25;

/// Returns the binary under test: `CHORUS_BIN`, or the one beside this test's own.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn binary() -> PathBuf {
    let path = std::env::var_os("CHORUS_BIN").map_or_else(
        || {
            let me = std::env::current_exe().expect("a test has an executable");
            let release = me.parent().and_then(Path::parent).expect("…/release/deps/it").to_owned();
            release.join("chorus")
        },
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing; run scripts/test, or cargo build --release first", path.display());
    path
}

/// Returns a directory with a language model of random weights, made once a test run: small enough to load in milliseconds.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn tiny_model() -> &'static Path {
    static MODEL: OnceLock<TempDir> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            let dir = tempfile::tempdir().expect("a temporary directory");
            chorus_engine::testing::write_tiny_model(dir.path(), 7).expect("a model of random weights");
            dir
        })
        .path()
}

/// Returns where `scripts/models` puts the default models.
///
/// # Panics
/// When neither `CHORUS_MODELS` nor a home directory is set.
#[must_use]
pub fn models_dir() -> PathBuf {
    std::env::var_os("CHORUS_MODELS").map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
            cache.unwrap_or_else(home).join("chorus/models")
        },
        PathBuf::from,
    )
}

/// Waits until `ready` gives something.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(Instant::now() < until, "waited {PATIENCE:?} in vain for: {what}");
        std::thread::sleep(POLL);
    }
}

/// How to start a node.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// The model; `none` for a node that only asks, absent for the tiny one.
    pub model: Option<String>,
    /// Lines of the configuration file.
    pub config: String,
    /// More arguments.
    pub args: Vec<String>,
    /// The data directory, where it is not one of the swarm's own.
    pub data_dir: Option<PathBuf>,
    /// Whether [`Node::limit_files`] will be used: then a file that may not grow is an error to the process, as a full disk is,
    /// and not a signal that ends it.
    pub limited: bool,
}

impl NodeOptions {
    /// A node without a model.
    #[must_use]
    pub fn asker() -> Self {
        Self { model: Some("none".to_owned()), ..Self::default() }
    }

    /// A node with the default model: slow enough that its answers have a middle.
    ///
    /// # Panics
    /// When the model is missing.
    #[must_use]
    pub fn real() -> Self {
        let model = models_dir().join("SmolLM2-135M-Instruct.Q8_0.gguf");
        assert!(model.exists(), "{} is missing; run scripts/models", model.display());
        Self { model: Some(model.display().to_string()), ..Self::default() }
    }
}

/// Nodes of one test.
#[derive(Debug)]
pub struct Swarm {
    dir: TempDir,
    network: String,
    bootstrap: Vec<String>,
    /// The nodes, in the order of their start.
    pub nodes: Vec<Node>,
}

impl Swarm {
    /// Makes a swarm without nodes.
    ///
    /// # Panics
    /// When there is no temporary directory.
    #[must_use]
    pub fn new(network: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("chorus-it-").tempdir().expect("a temporary directory");
        Self { dir, network: network.to_owned(), bootstrap: Vec::new(), nodes: Vec::new() }
    }

    /// Starts `n` nodes with the tiny model and waits until their ledgers agree.
    #[must_use]
    pub fn of(network: &str, n: usize) -> Self {
        let mut swarm = Self::new(network);
        for _ in 0..n {
            swarm.start(&NodeOptions::default());
        }
        swarm.wait_agreement(n);
        swarm
    }

    /// Starts one more node and waits for its API.
    pub fn start(&mut self, options: &NodeOptions) -> usize {
        let index = self.nodes.len();
        let dir = options.data_dir.clone().unwrap_or_else(|| self.dir.path().join(index.to_string()));
        let node = Node::prepare(dir, &self.network, options);
        self.nodes.push(node);
        self.restart(index);
        if self.bootstrap.len() < 2 {
            let ticket = wait_for("a ticket", || self.nodes[index].try_status()?["ticket"].as_str().map(str::to_owned));
            self.bootstrap.push(ticket);
        }
        index
    }

    /// Starts a node that was killed, with the disk it had.
    pub fn restart(&mut self, index: usize) {
        let bootstrap = self.bootstrap.clone();
        let node = &mut self.nodes[index];
        node.spawn(&bootstrap);
        node.wait_api();
    }

    /// Waits until all living nodes have one digest and `capabilities` capabilities.
    ///
    /// # Panics
    /// When they do not come to agree.
    pub fn wait_agreement(&self, capabilities: usize) {
        wait_for(&format!("ledgers that agree on {capabilities} capabilities"), || {
            let views: Option<Vec<Value>> = self
                .nodes
                .iter()
                .filter(|node| node.runs())
                .map(|node| Some(node.try_status()?["ledger"].clone()))
                .collect();
            let views = views?;
            let first = views.first()?;
            let agree = views.iter().all(|view| view["digest"] == first["digest"]);
            (agree && first["capabilities"] == json!(capabilities)).then_some(())
        });
    }
}

/// One node process.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    args: Vec<String>,
    limited: bool,
    child: Option<Child>,
    api: String,
    http: Client,
}

impl Node {
    fn prepare(dir: PathBuf, network: &str, options: &NodeOptions) -> Self {
        fs::create_dir_all(&dir).expect("a directory for the node");
        fs::write(dir.join("chorus.toml"), &options.config).expect("a configuration file");
        let model = options.model.clone().unwrap_or_else(|| tiny_model().display().to_string());
        let mut args: Vec<String> =
            ["--network", network, "--no-mdns", "--api", "127.0.0.1:0", "--bulk", "127.0.0.1:0", "--model", &model]
                .map(str::to_owned)
                .to_vec();
        args.extend(
            ["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--listen", "/ip4/127.0.0.1/tcp/0"].map(str::to_owned),
        );
        args.extend(["--data-dir".to_owned(), dir.display().to_string()]);
        args.extend(options.args.iter().cloned());
        let http = Client::builder().no_proxy().timeout(PATIENCE).build().expect("an HTTP client");
        Self { dir, args, limited: options.limited, child: None, api: String::new(), http }
    }

    /// Starts the process.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(&mut self, bootstrap: &[String]) {
        let _ = fs::remove_file(self.dir.join("run.json"));
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log file");
        let mut command = if self.limited {
            let mut shell = Command::new("sh");
            shell.args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#]).arg(binary());
            shell
        } else {
            Command::new(binary())
        };
        command.args(&self.args);
        for peer in bootstrap {
            command.args(["--bootstrap", peer]);
        }
        command.args(["node", "run", "--log-format", "json"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("the binary runs"));
    }

    /// Waits until the API answers.
    ///
    /// # Panics
    /// When it does not, or the process ends.
    pub fn wait_api(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = fs::read_to_string(self.dir.join("run.json"))
                && let Ok(run) = serde_json::from_str::<Value>(&text)
                && let Some(api) = run["api"].as_str()
            {
                self.api = format!("http://{api}");
                if self.try_status().is_some() {
                    return;
                }
            }
            assert!(self.runs(), "the node ended; its log:\n{}", self.log_tail());
            assert!(Instant::now() < until, "the API does not answer; the node's log:\n{}", self.log_tail());
            std::thread::sleep(POLL);
        }
    }

    /// Returns whether the process runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.child
            .as_ref()
            .is_some_and(|child| Path::new(&format!("/proc/{}/stat", child.id())).exists() && !zombie(child.id()))
    }

    /// Returns the process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the node was started").id()
    }

    /// Ends the process as a crash would: `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends the process a signal, by its name without `SIG`.
    ///
    /// # Panics
    /// When there is no `kill`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status();
        assert!(sent.expect("a `kill`").success());
    }

    /// Lets the process's files grow to `bytes` and no further, or as they like. For a process that writes, none is a full disk.
    /// Needs no privilege, unlike a file system of its own. Returns whether this system can do it.
    #[must_use]
    pub fn limit_files(&self, bytes: Option<u64>) -> bool {
        let soft = bytes.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
        let args = [format!("--pid={}", self.pid()), format!("--fsize={soft}:unlimited")];
        self.limited && Command::new("prlimit").args(args).status().is_ok_and(|status| status.success())
    }

    /// Returns where the API listens.
    #[must_use]
    pub fn api(&self) -> &str {
        &self.api
    }

    /// Returns the node's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log.json")
    }

    /// Returns the whole log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Returns the node's status, or `None` while it does not answer.
    #[must_use]
    pub fn try_status(&self) -> Option<Value> {
        self.http.get(format!("{}/v1/status", self.api)).timeout(Duration::from_secs(5)).send().ok()?.json().ok()
    }

    /// Returns the node's status.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn status(&self) -> Value {
        self.try_status().unwrap_or_else(|| panic!("no status; the node's log:\n{}", self.log_tail()))
    }

    /// Returns the node's id.
    #[must_use]
    pub fn id(&self) -> String {
        self.status()["node"].as_str().unwrap_or_default().to_owned()
    }

    /// Sends a GET and returns status and JSON body.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn get(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(format!("{}{path}", self.api)).send().expect("an answer");
        (response.status().as_u16(), response.json().unwrap_or_default())
    }

    /// Sends a GET and returns the body as text.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn get_text(&self, path: &str) -> String {
        self.http
            .get(format!("{}{path}", self.api))
            .send()
            .and_then(reqwest::blocking::Response::text)
            .expect("an answer")
    }

    /// Sends a POST and returns status and JSON body.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.http.post(format!("{}{path}", self.api)).json(body).send().expect("an answer");
        (response.status().as_u16(), response.json().unwrap_or_default())
    }

    /// Hands a task in and returns its id.
    ///
    /// # Panics
    /// When it is not taken.
    #[must_use]
    pub fn submit(&self, body: &Value) -> String {
        let (status, accepted) = self.post("/v1/tasks", body);
        assert_eq!(status, 202, "{accepted}");
        accepted["id"].as_str().expect("an id").to_owned()
    }

    /// Returns the events of a task so far known, following it to its end.
    ///
    /// # Panics
    /// When the stream breaks.
    #[must_use]
    pub fn events(&self, task: &str) -> Vec<Value> {
        sse_data(&self.get_text(&format!("/v1/tasks/{task}/events")))
    }

    /// Prepares a command of the binary against this node.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(&self.args).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command of the binary against this node.
    ///
    /// # Panics
    /// When the binary cannot be run.
    #[must_use]
    pub fn cli(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }
}

/// Returns the data of server-sent events, as far as it is JSON.
#[must_use]
pub fn sse_data(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data:")?.trim()).ok()).collect()
}

fn zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}
