//! Networks of a test's own: Linux network namespaces joined by virtual cables, with routers that translate addresses.
//!
//! A [`Lab`] names its namespaces after this process, so that tests run side by side, and removes them when it is dropped, on a
//! panic too; what a killed run left behind goes when the next one begins. Making namespaces takes root: where that is missing,
//! [`Lab::new`] says so and gives nothing, and the test is skipped.
//!
//! The addresses between the routers are ones that the Internet routes, because `AutoNAT` does not probe private ones. No packet
//! leaves the namespaces: they have no cable to the host.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{binary, wait_for};

const PREFIX: &str = "chorus-";
const LOG_LINES: usize = 25;

/// The namespaces of one test.
#[derive(Debug)]
pub struct Lab {
    tag: String,
    dir: TempDir,
    spaces: Vec<String>,
    cables: usize,
}

impl Lab {
    /// Makes an empty laboratory, or says on the terminal why this test is skipped.
    ///
    /// # Panics
    /// When there is no temporary directory.
    #[must_use]
    pub fn new(test: &str) -> Option<Self> {
        sweep();
        let dir = tempfile::Builder::new().prefix("chorus-lab-").tempdir().expect("a temporary directory");
        let tag = format!("{PREFIX}{}-{test}", std::process::id());
        let mut lab = Self { tag, dir, spaces: Vec::new(), cables: 0 };
        let probe = lab.try_space("probe").and_then(|probe| {
            ip(&["-n", &probe, "link", "add", "br0", "type", "bridge"])?;
            output(Command::new("iptables").args(["-V"]))
        });
        if let Err(why) = probe {
            // Written past the capture of the test runner: a skipped test must not look like one that passed.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED {test}: no network namespaces here (root, iproute2 and iptables are needed): {why}"
            );
            return None;
        }
        Some(lab)
    }

    fn try_space(&mut self, name: &str) -> Result<String, String> {
        let space = format!("{}-{name}", self.tag);
        ip(&["netns", "add", &space])?;
        self.spaces.push(space.clone());
        ip(&["-n", &space, "link", "set", "lo", "up"])?;
        Ok(space)
    }

    /// Makes a namespace: a machine without a cable.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn machine(&mut self, name: &str) -> String {
        self.try_space(name).unwrap_or_else(|why| panic!("namespace {name}: {why}"))
    }

    /// Makes a switch that cables can be plugged into.
    pub fn switch(&mut self, name: &str) -> String {
        let space = self.machine(name);
        must(&["-n", &space, "link", "add", "br0", "type", "bridge", "forward_delay", "0"]);
        must(&["-n", &space, "link", "set", "br0", "up"]);
        space
    }

    /// Plugs a machine into a switch with a cable that bears an address; returns the plug's name on the switch's side.
    pub fn plug(&mut self, machine: &str, port: &str, addr: &str, switch: &str) -> String {
        self.cables += 1;
        let plug = format!("port{}", self.cables);
        must(&["link", "add", port, "netns", machine, "type", "veth", "peer", "name", &plug, "netns", switch]);
        must(&["-n", switch, "link", "set", &plug, "master", "br0", "up"]);
        // Duplicate address detection would keep an IPv6 address from being used for a second.
        let nodad: &[&str] = if addr.contains(':') { &["nodad"] } else { &[] };
        must(&[&["-n", machine, "addr", "add", addr, "dev", port][..], nodad].concat());
        must(&["-n", machine, "link", "set", port, "up"]);
        plug
    }

    /// Makes a machine on a switch.
    pub fn machine_on(&mut self, switch: &str, name: &str, addr: &str) -> String {
        let machine = self.machine(name);
        self.plug(&machine, "eth0", addr, switch);
        machine
    }

    /// Makes a home: a router on the switch with the outer address, which lets nothing in that was not asked for, and behind it
    /// one machine that it translates the addresses of.
    pub fn home(&mut self, switch: &str, name: &str, outer: &str) -> String {
        let router = self.machine_on(switch, &format!("{name}-nat"), outer);
        let lan = self.switch(&format!("{name}-lan"));
        self.plug(&router, "lan0", "192.168.1.1/24", &lan);
        let machine = self.machine_on(&lan, name, "192.168.1.2/24");
        must(&["-n", &machine, "route", "add", "default", "via", "192.168.1.1"]);
        inside(&router, "sysctl -qw net.ipv4.ip_forward=1");
        inside(&router, "iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE");
        for chain in ["INPUT", "FORWARD"] {
            inside(
                &router,
                &format!("iptables -A {chain} -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"),
            );
            inside(&router, &format!("iptables -A {chain} -i eth0 -j DROP"));
        }
        machine
    }

    /// Lets a home's router drop all that comes from an address, asked for or not.
    pub fn shun(&self, home: &str, outer: &str) {
        inside(&format!("{}-{home}-nat", self.tag), &format!("iptables -I FORWARD -s {outer} -j DROP"));
    }

    /// Makes the key of a node that is still to be started, and returns its id.
    ///
    /// # Panics
    /// When the binary refuses.
    #[must_use]
    pub fn key(&self, machine: &str) -> String {
        let dir = self.dir.path().join(machine);
        let said = |words: &[&str]| {
            let output =
                Command::new(binary()).arg("--data-dir").arg(&dir).args(words).output().expect("the binary runs");
            assert!(output.status.success(), "{words:?}: {output:?}");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        said(&["node", "ticket", "--offline"]);
        said(&["key", "show"])
    }

    /// Returns how many bytes have left a machine through a port.
    ///
    /// # Panics
    /// When there is no such port.
    #[must_use]
    pub fn sent(&self, machine: &str, port: &str) -> u64 {
        inside(machine, &format!("cat /sys/class/net/{port}/statistics/tx_bytes")).trim().parse().expect("a number")
    }

    /// Gives a namespace a hosts file of its own.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn hosts(&self, machine: &str, lines: &str) {
        let etc = etc_of(machine);
        fs::create_dir_all(&etc).and_then(|()| fs::write(etc.join("hosts"), lines)).expect("a hosts file");
    }

    /// Starts a node without a model in a namespace, with a configuration file, and waits for its API.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn node(&self, machine: &str, config: &str, args: &[&str]) -> Host {
        let dir = self.dir.path().join(machine);
        let mut host = Host { dir, space: machine.to_owned(), args: Vec::new(), child: None };
        host.args = ["--network", &self.tag, "--model", "none", "--api", "127.0.0.1:7700", "--data-dir"]
            .map(str::to_owned)
            .to_vec();
        host.args.push(host.dir.display().to_string());
        host.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        fs::create_dir_all(&host.dir).expect("a directory for the node");
        fs::write(host.dir.join("chorus.toml"), config).expect("a configuration file");
        host.start();
        host
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for space in &self.spaces {
            remove(space);
        }
    }
}

/// A node in a namespace. Its API listens on the namespace's own loopback, so it is asked by the command line, from inside.
#[derive(Debug)]
pub struct Host {
    dir: PathBuf,
    space: String,
    args: Vec<String>,
    child: Option<Child>,
}

impl Host {
    fn command(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space]).arg(binary()).args(&self.args).stdin(Stdio::null());
        command
    }

    /// Starts the node, with the disk it has, and waits for its API.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("log.json")).expect("a log file");
        let mut command = self.command();
        command.args(["node", "run", "--log-format", "json"]).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("the binary runs"));
        self.wait_for("its API", |host| host.try_ask(&["status"]).map(drop));
    }

    /// Waits until `ready` gives something.
    ///
    /// # Panics
    /// When it does not, with the node's last words.
    pub fn wait_for<T>(&self, what: &str, mut ready: impl FnMut(&Self) -> Option<T>) -> T {
        let run = std::panic::AssertUnwindSafe(|| wait_for(what, || ready(self)));
        std::panic::catch_unwind(run).unwrap_or_else(|_| panic!("{}: no {what}; {}", self.space, self.last_words()))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log.json")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let mut words = format!("its peers: {:?}; its log:\n", self.try_ask(&["peers"]));
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            let _ = writeln!(words, "{line}");
        }
        words
    }

    /// Returns when the node's log first said this, in seconds of the day.
    #[must_use]
    pub fn logged(&self, text: &str) -> Option<f64> {
        let log = fs::read_to_string(self.dir.join("log.json")).unwrap_or_default();
        let said: Value = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["message"].as_str().is_some_and(|message| message.starts_with(text)))?;
        let time = said["timestamp"].as_str()?.split(['T', 'Z']).nth(1)?.to_owned();
        time.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
    }

    /// Asks the running node with a command of the binary.
    #[must_use]
    pub fn try_ask(&self, args: &[&str]) -> Option<Value> {
        let output = self.command().args(args).arg("--json").output().ok()?;
        output.status.success().then(|| serde_json::from_slice(&output.stdout).ok())?
    }

    /// Returns the node's id.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn id(&self) -> String {
        let status = self.try_ask(&["status"]).expect("a status");
        status["node"].as_str().expect("an id").to_owned()
    }

    /// Returns the ticket by which others join.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn ticket(&self) -> String {
        let status = self.try_ask(&["status"]).expect("a status");
        status["ticket"].as_str().expect("a ticket").to_owned()
    }

    /// Returns the ticket that the configuration alone makes.
    ///
    /// # Panics
    /// When the binary cannot be run.
    #[must_use]
    pub fn offline_ticket(&self) -> String {
        let output = self.command().args(["node", "ticket", "--offline"]).output().expect("the binary runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Returns a connected peer, as `chorus peers` tells of it.
    #[must_use]
    pub fn peer(&self, id: &str) -> Option<Value> {
        let peers = self.try_ask(&["peers"])?;
        peers["peers"].as_array()?.iter().find(|peer| peer["node"] == json!(id)).cloned()
    }

    /// Waits until a peer is connected, and returns what is told of it.
    #[must_use]
    pub fn wait_peer(&self, id: &str) -> Value {
        self.wait_for(&format!("peer {id}"), |host| host.peer(id))
    }

    /// Ends the node as it wishes to be ended.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            let _ = child.wait();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until the ledgers of all hosts are one, with so many capabilities.
///
/// # Panics
/// When they do not come to agree.
pub fn wait_agreement(hosts: &[&Host], capabilities: usize) {
    hosts[0].wait_for(&format!("ledgers that agree on {capabilities} capabilities"), |first| {
        let ledger = |host: &Host| Some(host.try_ask(&["status"])?["ledger"].clone());
        let one = ledger(first)?;
        let agree = hosts[1..].iter().all(|host| ledger(host).is_some_and(|other| other["digest"] == one["digest"]));
        (agree && one["capabilities"] == json!(capabilities)).then_some(())
    });
}

/// Runs `ip`.
///
/// # Panics
/// When it fails.
pub fn must(args: &[&str]) {
    ip(args).unwrap_or_else(|why| panic!("ip {}: {why}", args.join(" ")));
}

/// Lets no more than so many Mbit/s leave a machine through a port.
///
/// # Panics
/// When the system refuses.
pub fn shape(machine: &str, port: &str, mbit: u32) {
    inside(machine, &format!("tc qdisc add dev {port} root tbf rate {mbit}mbit burst 64kb latency 50ms"));
}

fn inside(space: &str, args: &str) -> String {
    let args: Vec<&str> = args.split_whitespace().collect();
    let output = ip(&[&["netns", "exec", space][..], &args].concat());
    String::from_utf8_lossy(&output.unwrap_or_else(|why| panic!("{args:?} in {space}: {why}")).stdout).into_owned()
}

fn ip(args: &[&str]) -> Result<Output, String> {
    output(Command::new("ip").args(args))
}

fn output(command: &mut Command) -> Result<Output, String> {
    let run = command.stdin(Stdio::null()).output();
    let output = run.map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() { Ok(output) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

fn etc_of(space: &str) -> PathBuf {
    Path::new("/etc/netns").join(space)
}

fn remove(space: &str) {
    let _ = ip(&["netns", "delete", space]);
    let _ = fs::remove_dir_all(etc_of(space));
}

/// Removes the namespaces of test runs that were killed.
fn sweep() {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&name);
        }
    }
}
