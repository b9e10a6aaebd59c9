//! The simulator's command line.
//!
//! Exit codes: 0 everything held; 1 an invariant, a bound or the determinism did not; 2 the command or the scenario is no good.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use chorus_sim::scenario::BUILT_IN;
use chorus_sim::{Mutant, Outcome, Scenario, World};
use clap::{Parser, Subcommand};

/// Runs Chorus nodes by the thousand in virtual time.
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
            for (name, _) in BUILT_IN {
                let about = Scenario::built_in(name).map(|scenario| scenario.about).unwrap_or_default();
                println!("{name:<32} {about}");
            }
            ExitCode::SUCCESS
        }
        Command::Run { scenario, seed, json, twice, watch } => match load(&scenario) {
            Err(error) => {
                eprintln!("{error}");
                ExitCode::from(2)
            }
            Ok(scenario) => {
                let seed = seed.unwrap_or(scenario.seed);
                if watch {
                    chorus_sim::watch(&scenario, seed).watched.iter().for_each(|line| println!("{line}"));
                }
                verdict(run(&scenario, seed, json, twice))
            }
        },
        Command::All { seeds, json } => {
            let scenarios = BUILT_IN.iter().filter_map(|(name, _)| Scenario::built_in(name));
            let good = scenarios.fold(true, |good, scenario| {
                (0..seeds).fold(good, |good, more| run(&scenario, scenario.seed + more, json, true) && good)
            });
            verdict(good)
        }
    }
}

fn verdict(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load(name: &str) -> Result<Scenario, String> {
    if let Some(scenario) = Scenario::built_in(name) {
        return Ok(scenario);
    }
    let text = std::fs::read_to_string(Path::new(name)).map_err(|error| {
        format!("{name} is neither a scenario of `chorus-sim list` nor a file that can be read: {error}")
    })?;
    Scenario::parse(name, &text).map_err(|error| error.to_string())
}

/// Runs a scenario and prints what it showed. Returns whether everything held.
fn run(scenario: &Scenario, seed: u64, json: bool, twice: bool) -> bool {
    let mut world = World::new(scenario.clone(), seed, Mutant::None);
    let started = Instant::now();
    let outcome = world.run();
    let took = started.elapsed().as_secs_f64();
    drop(world);
    print(&outcome, took, json);
    let mut good = outcome.is_good();
    if twice {
        let again = chorus_sim::run(scenario, seed);
        if again.report.trace != outcome.report.trace {
            println!("  NOT DETERMINISTIC: {} and {}", outcome.report.trace, again.report.trace);
            println!("  again with {} --twice", outcome.report.again);
            good = false;
        }
    }
    good
}

fn print(outcome: &Outcome, took: f64, json: bool) {
    if json {
        let mut figures = serde_json::to_value(&outcome.report).unwrap_or_default();
        figures["wall_s"] = took.into();
        println!("{figures}");
        return;
    }
    print!("{}", outcome.report);
    println!("  took       {took:.2} s, {:.1} virtual seconds a second", outcome.report.virtual_s / took);
}
