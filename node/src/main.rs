//! `chorus`: a node of the swarm, and the commands that speak to it.
//!
//! ```text
//!  main ── parse ──▶ Config ──▶ commands::run ──▶ process::start ──▶ driver: the one loop around core::Node
//!                         └───▶ commands::{ask, status, …} ──HTTP──▶ a running node's API
//! ```

mod backend;
mod capability;
mod client;
mod commands;
mod config;
mod driver;
mod error;
mod executor;
mod keyfile;
mod logs;
mod metrics;
mod net_log;
mod process;
mod spans;
mod storage;
mod training;

use std::process::ExitCode;

use clap::Parser;

/// The system's gives memory back to the kernel with every large buffer that is freed, and asks for it again at once: half of the stream
/// benchmark's time in the kernel went there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match commands::dispatch(commands::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            error.exit_code()
        }
    }
}
