//! The simulator's command line.
//!
//! Exit codes: 0 everything held; 1 an invariant, a bound or the determinism did not; 2 the command or the scenario is no good.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use chorus_sim::{AnyScenario, Ran};
use clap::{Parser, Subcommand};

/// Runs Chorus nodes by the thousand in virtual time, and training runs with hundreds of samplers.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one scenario.
    Run {
        /// Its name (see `list`), or the path of a TOML file.
        scenario: String,
        /// Seed to use in place of the scenario's own.
        #[arg(long)]
        seed: Option<u64>,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
        /// Run it twice and compare the traces.
        #[arg(long)]
        twice: bool,
        /// Print the events of all tasks first.
        #[arg(long)]
        watch: bool,
    },
    /// Run every scenario that comes with the simulator, each twice.
    All {
        /// Seeds to run each with, counted from its own.
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Print the figures as JSON, one object a line.
        #[arg(long)]
        json: bool,
    },
    /// List the scenarios that come with the simulator.
    List,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::List => {
            for scenario in AnyScenario::all() {
                println!("{:<32} {}", scenario.name(), scenario.about());
            }
            ExitCode::SUCCESS
        }
        Command::Run { scenario, seed, json, twice, watch } => match load(&scenario) {
            Err(error) => {
                eprintln!("{error}");
                ExitCode::from(2)
            }
            Ok(scenario) => {
                let seed = seed.unwrap_or(scenario.seed());
                if watch {
                    scenario.watch(seed).iter().for_each(|line| println!("{line}"));
                }
                verdict(run(&scenario, seed, json, twice))
            }
        },
        Command::All { seeds, json } => {
            let good = AnyScenario::all().fold(true, |good, scenario| {
                (0..seeds).fold(good, |good, more| run(&scenario, scenario.seed() + more, json, true) && good)
            });
            verdict(good)
        }
    }
}

fn verdict(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load(name: &str) -> Result<AnyScenario, String> {
    if let Some(scenario) = AnyScenario::built_in(name) {
        return Ok(scenario);
    }
    let text = std::fs::read_to_string(Path::new(name)).map_err(|error| {
        format!("{name} is neither a scenario of `chorus-sim list` nor a file that can be read: {error}")
    })?;
    AnyScenario::parse(name, &text).map_err(|error| error.to_string())
}

/// Runs a scenario and prints what it showed. Returns whether everything held.
fn run(scenario: &AnyScenario, seed: u64, json: bool, twice: bool) -> bool {
    let started = Instant::now();
    let ran = scenario.run(seed);
    print(&ran, started.elapsed().as_secs_f64(), json);
    let mut good = ran.good;
    if twice {
        let again = scenario.run(seed);
        if again.trace != ran.trace {
            println!("  NOT DETERMINISTIC: {} and {}", ran.trace, again.trace);
            println!("  again with {} --twice", ran.again);
            good = false;
        }
    }
    good
}

fn print(ran: &Ran, took: f64, json: bool) {
    if json {
        let mut figures = ran.figures.clone();
        figures["wall_s"] = took.into();
        println!("{figures}");
        return;
    }
    print!("{}", ran.text);
    println!("  took       {took:.2} s, {:.1} virtual seconds a second", ran.virtual_s / took);
}
