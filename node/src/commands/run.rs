//! `chorus node run`, and the hidden command with which the models are installed.

use std::path::PathBuf;

use chorus_engine::{QuantKind, requantize as rewrite, thread_env};

use crate::config::Config;
use crate::error::CommandError;
use crate::logs::{self, LogFormat};
use crate::process;

#[derive(Debug, clap::Args)]
pub(crate) struct RequantizeArgs {
    /// The GGUF file to read
    source: PathBuf,
    /// The GGUF file to write
    target: PathBuf,
    /// The quantisation to write: q4_0 or q8_0
    kind: String,
}

/// Starts a node in the foreground.
pub(crate) fn run(config: Config, format: LogFormat) -> Result<(), CommandError> {
    logs::init(format);
    limit_threads(config.engine.threads);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(CommandError::machine)?;
    let ended = runtime.block_on(process::run(config));
    // Whatever still blocks (a model that is loading, say) does not hold up the end.
    runtime.shutdown_background();
    ended
}

/// candle's and mistral.rs's thread pools read their sizes from the environment, once. A process cannot set its own environment
/// safely while threads run, so it starts itself again with the right one.
fn limit_threads(threads: usize) {
    const MARK: &str = "CHORUS_THREADS_SET";
    if threads == 0 || std::env::var_os(MARK).is_some() {
        return;
    }
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let Ok(me) = std::env::current_exe() else { return };
        let error = std::process::Command::new(me)
            .args(std::env::args_os().skip(1))
            .envs(thread_env(threads))
            .env(MARK, "1")
            .exec();
        tracing::warn!(%error, "engine.threads has no effect");
    }
    #[cfg(not(unix))]
    tracing::warn!("engine.threads has no effect on this system; set RAYON_NUM_THREADS={threads} instead");
}

/// Writes a model file in another quantisation.
pub(crate) fn requantize(args: &RequantizeArgs) -> Result<(), CommandError> {
    let kind = match args.kind.as_str() {
        "q4_0" => QuantKind::Q4_0,
        "q8_0" => QuantKind::Q8_0,
        other => return Err(CommandError::usage(format!("'{other}' is no quantisation; use q4_0 or q8_0"))),
    };
    rewrite(&args.source, &args.target, kind).map_err(CommandError::machine)?;
    println!("{}", args.target.display());
    Ok(())
}
