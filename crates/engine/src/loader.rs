//! Loads a model with mistral.rs, so that nothing it does can take the process down.
//!
//! 1. `source::inspect` has found the files whole.
//! 2. The memory that the weights need is compared with what the system has: a failed allocation
//!    ends the process, so it must not be tried.
//! 3. mistral.rs loads on a blocking thread with a runtime of its own; a panic there becomes an error.
//!
//! The prefix cache is off. In mistral.rs 0.8.1 it counts only entries on a GPU when it decides what
//! to evict (`prefix_cacher.rs`, `evict_caches`), so on the CPU it keeps the key-value cache of every
//! finished request for ever. Without it the answer to a prompt also cannot depend on the prompts
//! that came before.
//!
//! Weights stored in single precision are computed in it on a CPU. Left alone, mistral.rs would round them to half
//! precision, which is slower there, and the log-probabilities of a policy under training would be up to a fiftieth off its
//! trainer's.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use mistralrs::{DeviceMapSetting, GgufModelBuilder, Model, ModelDType, Request, TextModelBuilder};
use tokio::sync::mpsc;

use crate::{EngineError, ModelSource, source};

/// A model needs at least this many bytes of memory per byte of weights on disk. SmolLM2-135M as Q8_0
/// (145 MB) was measured at 392 MB at its peak, requests included: mostly its embedding table expanded
/// to f32, of which larger models have relatively less. Less than this is certain to fail.
const MIN_MEMORY_PER_WEIGHT_BYTE: f64 = 1.1;

/// What to load, and how.
#[derive(Debug, Clone)]
pub(crate) struct LoadSpec {
    pub(crate) source: ModelSource,
    pub(crate) max_concurrent: usize,
    pub(crate) force_cpu: bool,
}

/// A loaded model with a running engine thread.
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    /// Leads to the engine thread; closed when the thread is gone.
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) context: u32,
    pub(crate) on_cpu: bool,
}

/// Loads the model. Takes from milliseconds to minutes; never blocks the async threads.
pub(crate) async fn load(spec: &LoadSpec) -> Result<Loaded, EngineError> {
    let path = spec.source.path();
    let spec = spec.clone();
    let loading = tokio::task::spawn_blocking(move || {
        catch_unwind(AssertUnwindSafe(|| load_blocking(&spec)))
            .unwrap_or_else(|panic| Err(failure(&spec.source, &panic_text(panic.as_ref()))))
    });
    loading
        .await
        .unwrap_or_else(|error| Err(EngineError::ModelCorrupt { path, reason: format!("loading broke off: {error}") }))
}

fn load_blocking(spec: &LoadSpec) -> Result<Loaded, EngineError> {
    let mut dtype = ModelDType::Auto;
    if !matches!(spec.source, ModelSource::Hub(_)) {
        let inspection = source::inspect(&spec.source)?;
        check_memory(inspection.bytes, available_memory())?;
        if inspection.quantisation == "F32" && (spec.force_cpu || !cfg!(any(feature = "cuda", feature = "metal"))) {
            dtype = ModelDType::F32;
        }
    }
    // mistral.rs runs a request of its own when it is built on a multi-threaded runtime; the
    // calibration does that job here.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| EngineError::Crashed { detail: format!("no runtime: {error}") })?;
    let model = runtime.block_on(build(spec, dtype)).map_err(|reason| failure(&spec.source, &reason))?;
    let describe = |error: &dyn std::fmt::Display| failure(&spec.source, &error.to_string());
    let config = model.config().map_err(|error| describe(&error))?;
    let context = (config.max_seq_len)
        .and_then(|context| u32::try_from(context).ok())
        .ok_or_else(|| describe(&"it is not a text model"))?;
    let requests = model.inner().get_sender(None).map_err(|error| describe(&error))?;
    let on_cpu = config.device.is_cpu();
    Ok(Loaded { model: Arc::new(model), requests, context, on_cpu })
}

async fn build(spec: &LoadSpec, dtype: ModelDType) -> Result<Model, String> {
    let sequences = spec.max_concurrent.max(1);
    let built = match &spec.source {
        ModelSource::Gguf(path) => {
            let (dir, file) = split(path)?;
            let mut builder =
                GgufModelBuilder::new(dir, vec![file]).with_max_num_seqs(sequences).with_prefix_cache_n(None);
            if spec.force_cpu {
                builder = builder.with_force_cpu();
            }
            builder.build().await
        }
        ModelSource::Directory(path) => {
            let dir = path.to_str().ok_or("its path is not UTF-8")?;
            text_builder(dir, sequences, spec.force_cpu).with_dtype(dtype).build().await
        }
        ModelSource::Hub(name) => text_builder(name, sequences, spec.force_cpu).build().await,
    };
    built.map_err(|error| format!("{error:#}"))
}

fn text_builder(model: &str, sequences: usize, force_cpu: bool) -> TextModelBuilder {
    let builder = TextModelBuilder::new(model).with_max_num_seqs(sequences).with_prefix_cache_n(None);
    let builder = if force_cpu { builder.with_force_cpu() } else { builder };
    if force_cpu || !cfg!(any(feature = "cuda", feature = "metal")) {
        // There is one device. To find that out, mistral.rs would read what the system says of every process and thread, which
        // takes longer than a small model does.
        return builder.with_device_mapping(DeviceMapSetting::dummy());
    }
    builder
}

/// Splits a path into a directory that exists for mistral.rs (it would look on the hub otherwise)
/// and a file name.
fn split(path: &Path) -> Result<(String, String), String> {
    let file = path.file_name().and_then(|name| name.to_str()).ok_or("its name is not UTF-8")?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    let dir = dir.to_str().ok_or("its path is not UTF-8")?;
    Ok((dir.to_owned(), file.to_owned()))
}

/// Turns the text of a failed load into an error.
fn failure(source: &ModelSource, reason: &str) -> EngineError {
    if is_out_of_memory(reason) {
        return EngineError::OutOfMemory { detail: reason.to_owned() };
    }
    match source {
        ModelSource::Hub(model) => EngineError::HubUnavailable { model: model.clone(), reason: reason.to_owned() },
        _ => EngineError::ModelCorrupt { path: source.path(), reason: reason.to_owned() },
    }
}

/// Recognises a GPU's or an allocator's report that memory ran out.
pub(crate) fn is_out_of_memory(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    ["out of memory", "out_of_memory", "outofmemory", "failed to allocate"].iter().any(|sign| text.contains(sign))
}

pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a message".to_owned())
}

fn check_memory(weights: u64, available: Option<u64>) -> Result<(), EngineError> {
    let needed = weights as f64 * MIN_MEMORY_PER_WEIGHT_BYTE;
    match available {
        // With a GPU the weights pass through the system's memory file by file, not all at once.
        Some(available) if needed > available as f64 && !cfg!(any(feature = "cuda", feature = "metal")) => {
            Err(EngineError::OutOfMemory {
                detail: format!(
                    "the weights need about {:.0} MB, {} MB are available",
                    needed / 1e6,
                    available / 1_000_000
                ),
            })
        }
        _ => Ok(()),
    }
}

/// Returns the bytes that can be allocated without swapping, where the system says so.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn weights_that_do_not_fit_are_refused_before_they_are_read() {
        assert!(check_memory(1_000_000, Some(2_000_000)).is_ok());
        assert!(check_memory(1_000_000, None).is_ok());
        let refused = check_memory(2_000_000_000, Some(1_000_000_000));
        assert!(matches!(refused, Err(EngineError::OutOfMemory { .. })), "{refused:?}");
    }

    #[test]
    fn memory_errors_are_told_from_others() {
        assert!(is_out_of_memory("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"));
        assert!(!is_out_of_memory("shape mismatch"));
    }
}
