//! Lets an engine thread compute a small model by itself.
//!
//! candle and mistral.rs hand every normalisation, rotation and attention to rayon, whatever its size, and a thread that is
//! not in a pool hands it to one that is and sleeps until it is done: some forty changes of thread for each token of a model
//! with two layers, half of its time, and far more of it when other work keeps the processors busy. A thread that is alone in
//! a pool of its own does such work itself, at once.
//!
//! Attention has a pool of its own in mistral.rs (`FLASH_ATTN_POOL`), so one change to and fro for each layer is left.

use std::{
    cell::OnceCell,
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Weights on disk up to which one thread is faster than several that wait for each other: on two busy cores it made twice the
/// tokens with 1 and with 3 MiB, and as many with 15.
pub(crate) const MAX_SMALL_BYTES: u64 = 8 << 20;
/// rayon never frees the few kilobytes that describe a thread that joined a pool by itself (its documentation of
/// `use_current_thread`), and every version that is loaded has a new thread. Later ones compute as any.
const MAX_THREADS: usize = 20_000;

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static POOL: OnceCell<Option<ThreadPool>> = const { OnceCell::new() };
}

/// Makes the calling thread the only one of its pool, if it is in none.
pub(crate) fn compute_alone() {
    POOL.with(|pool| {
        pool.get_or_init(|| {
            let join = || ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().ok();
            (THREADS.fetch_add(1, Ordering::Relaxed) < MAX_THREADS).then(join).flatten()
        });
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn what_is_given_to_rayon_is_done_by_the_thread_itself() {
        let by = std::thread::spawn(|| {
            compute_alone();
            compute_alone();
            let me = std::thread::current().id();
            (0..100).into_par_iter().all(|_| std::thread::current().id() == me)
        });
        assert!(by.join().unwrap());
    }
}
